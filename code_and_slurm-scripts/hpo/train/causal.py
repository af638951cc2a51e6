"""What a causal language model is trained on, and its loss per token, for the Trainer.

examples("training", tokens, folder, length)     a list, which the Trainer takes as a data set
Trainer(…, preprocess_logits_for_metrics=token_losses, compute_metrics=loss_per_token)
with says_what_to_lower(config, "micro_batch", "length"): …       where memory may be short
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from hpo.settings import Settings
from hpo.train.base_model import tokenizer_of
from hpo.train.texts import Row, load_texts
from hpo.words import one_line

IGNORED = -100  # the mark for what is no target: of the prompt, and of what fills a batch

# What a Trainer needs to be an objective, for any model: hpo/loops/huggingface.py says why.
TRAINER_OPTIONS: dict[str, Any] = {
    "use_cpu": not torch.cuda.is_available(),
    "save_only_model": True,
    "save_total_limit": 2,
    "label_names": ["labels"],  # it cannot find out through an adapter
    "remove_unused_columns": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "ddp_find_unused_parameters": False,
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}

# A row, and the tokenizer → the tokens that the model is given, and those that it has to write.
Tokens: TypeAlias = "Callable[[Row, Any], tuple[list[int], list[int]]]"
Example: TypeAlias = "dict[str, list[int]]"  # input_ids, attention_mask, labels


def examples(part: str, tokens: Tokens, folder: str, length: int) -> list[Example]:
    """Return the examples of a part of the data ("training", …), tokenised once per process.

    Args:
        part: a field of `hpo.train.texts.Texts`.
        tokens: of a row.
        folder: of the model, with its tokenizer.
        length: tokens of an example, at most.
    """
    return _examples(part, tokens, folder, length, Settings.from_env().train_images)


@cache
def _examples(part: str, tokens: Tokens, folder: str, length: int, number: int) -> list[Example]:
    tokenizer, rows = tokenizer_of(folder), getattr(load_texts(Settings.from_env()), part)
    return [example for row in rows for example in cut(row, *tokens(row, tokenizer), length)]


def cut(row: Row, given: list[int], written: list[int], length: int) -> list[Example]:
    """Return the examples of a row, none longer than `length` tokens.

    A long text becomes several examples.  A long prompt loses its beginning, of which at least half
    of the length is left; then a long answer loses its end.
    """
    if "prompt" in row:
        given = given[-max(length // 2, length - len(written)) :]
        return [_example(given, written[: length - len(given)])]
    room = length - len(given)
    return [_example(given, written[at : at + room]) for at in range(0, len(written), room)]


def _example(given: list[int], written: list[int]) -> Example:
    return {
        "input_ids": given + written,
        "attention_mask": [1] * len(given + written),
        "labels": [IGNORED] * len(given) + written,
    }


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Return each example's loss, summed over its targets, and their number: (n, 2) float32.

    Instead of the logits, (n, tokens, vocabulary), which would fill the memory.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]  # each token is predicted from those before it
    losses = functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.sum(1), (targets != IGNORED).sum(1).float()], 1)


def loss_per_token(prediction: Any) -> dict[str, float]:
    """Return the mean of the losses over all targets; those of the Trainer are means of means."""
    loss, number = prediction.predictions.astype("float64").sum(0)
    return {"loss_per_token": float(loss / number)}


@contextmanager
def says_what_to_lower(config: Mapping[str, Any], *names: str) -> Iterator[None]:
    """Name what makes a trial need less memory, if it has not enough.

    Raises:
        MemoryError: the GPU's, or the machine's, is full.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not full and "can't allocate memory" not in str(error):
            raise
        values = ", ".join(f"{name}={config[name]}" for name in names)
        raise MemoryError(f"lower one of {values}: {one_line(error)[:200]}") from error
