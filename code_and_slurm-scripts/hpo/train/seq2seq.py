"""Texts as bytes for an encoder-decoder model: tokens, batches, loss, and exact matches.

    for batch in batches(pairs, 256, seed, epoch):        the same for every configuration
        for micro, last in micro_batches(batch, 32):      as much as fits into memory at once
            summed_loss(model, micro) …
    loss = evaluate(model, validation)
    share = exact_match(model, test)

A token is a byte + 3, as in ByT5: no tokeniser has to be learnt or fetched, and every language and
every sign can be written.  With several processes to a trial (hpo/train/ddp.py) each takes its own
share of every batch; a batch is the same set of pairs, however many there are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hpo.train import ddp
from hpo.train.pairs import Pair
from hpo.train.training import gpu_has_bf16

PAD, END, FIRST_BYTE = 0, 1, 3
VOCABULARY = FIRST_BYTE + 256
IGNORED = -100  # cross-entropy's mark for what is no target
EVALUATION_BATCH = 128  # pairs


def batches(pairs: Sequence[Pair], size: int, seed: int, epoch: int) -> list[list[Pair]]:
    """Return the whole batches of an epoch, of `size` pairs each, in an order of its own.

    Pairs that fill no whole batch are left out; the next epoch's order brings them in.  Fewer
    than `size` pairs are one batch.
    """
    order = random.Random(f"{seed}/{epoch}").sample(pairs, len(pairs))
    size = min(size, len(pairs))
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


def micro_batches(batch: Sequence[Pair], most: int) -> Iterator[tuple[Sequence[Pair], bool]]:
    """Yield this process's share of a batch, `most` pairs at a time, and whether it is the last."""
    share = batch[ddp.rank() :: ddp.processes()]
    for start in range(0, len(share), most):
        yield share[start : start + most], start + most >= len(share)


def targets(batch: Sequence[Pair]) -> int:
    """Return how many tokens the model has to predict: the outputs' bytes and their ends."""
    return sum(len(output) + 1 for _, output in batch)


def tokens(texts: Sequence[bytes], device: torch.device, padding: int = PAD) -> Tensor:
    """Return the texts' tokens, each text with END behind it: (n, longest + 1) int64."""
    width = max(map(len, texts)) + 1
    rows = [
        [byte + FIRST_BYTE for byte in text] + [END] + [padding] * (width - 1 - len(text))
        for text in texts
    ]
    return torch.tensor(rows, device=device)


def text_of(row: Sequence[int]) -> bytes:
    """Return the text of one row of tokens: its bytes up to the first END."""
    row = row[: row.index(END)] if END in row else row
    return bytes(token - FIRST_BYTE for token in row if token >= FIRST_BYTE)


def precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for a forward pass: bf16 on a GPU that has it, float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=gpu_has_bf16(device))


def summed_loss(model: nn.Module, batch: Sequence[Pair]) -> Tensor:
    """Return the cross-entropy summed over the batch's targets: () float32, with gradients."""
    device = next(model.parameters()).device
    inputs = tokens([source for source, _ in batch], device)
    labels = tokens([output for _, output in batch], device, padding=IGNORED)
    with precision(device):
        loss = model(input_ids=inputs, attention_mask=inputs != PAD, labels=labels).loss
    return loss.float() * targets(batch)  # type: ignore[no-any-return]  # it is their mean


@torch.no_grad()
def evaluate(model: nn.Module, pairs: Sequence[Pair]) -> float:
    """Return the mean cross-entropy per token over all of `pairs`, the same in every process."""
    model.eval()
    total = torch.zeros((), device=next(model.parameters()).device)
    for batch, _ in micro_batches(pairs, EVALUATION_BATCH):
        total += summed_loss(model, batch)
    return ddp.total(total) / targets(pairs)


@torch.no_grad()
def exact_match(model: Any, pairs: Sequence[Pair]) -> float:
    """Return the share (0 … 1) of pairs whose output the model writes without a mistake.

    Args:
        model: with `generate`, on its device; it always takes the likeliest next byte.
        pairs: the input and the expected output.
    """
    model.eval()
    right = 0
    for start in range(0, len(pairs), EVALUATION_BATCH):
        batch = pairs[start : start + EVALUATION_BATCH]
        inputs = tokens([source for source, _ in batch], model.device)
        longest = max(len(output) for _, output in batch) + 1
        with precision(model.device):
            rows = model.generate(
                input_ids=inputs,
                attention_mask=inputs != PAD,
                max_new_tokens=longest + 1,  # one that goes on too long is wrong
                do_sample=False,
                num_beams=1,
            ).tolist()
        right += sum(
            text_of(row[1:]) == output for row, (_, output) in zip(rows, batch, strict=True)
        )
    return right / len(pairs)
