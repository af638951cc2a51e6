"""The language model in a local folder (MODEL=…), and its adapter (LoRA), which alone is trained.

    folder = base_folder(settings)                            with SMALL=1 a tiny one, made here
    model = with_adapter(load_base(folder), LoraConfig(…))
    weights = adapter_of(model)                               model.load_state_dict takes them

Nothing is fetched: the hub is switched off for this process.  Weights are read from *.safetensors
alone, which cannot hold code.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.settings import Settings, UserError
from hpo.train.pairs import FOLDER
from hpo.train.training import gpu_has_bf16, pick_device
from hpo.words import one_line

ADAPTER = "lora_"  # in the name of each parameter of an adapter
TINY = FOLDER / "tiny-language-model"


def base_folder(settings: Settings) -> Path:
    """Return the folder of the model that is fine-tuned.

    Raises:
        UserError: there is none.
    """
    if settings.model:
        return settings.model
    if settings.small:
        return TINY
    raise UserError(
        "MODEL is not set: give the folder of a language model (config.json, *.safetensors and its "
        "tokenizer), or SMALL=1 for a tiny one"
    )


def prepare_base(settings: Settings) -> None:
    """Check the model's folder, without reading its weights; make the tiny model if need be.

    Raises:
        UserError: it is no folder of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = base_folder(settings)
    if folder == TINY and not TINY.exists():
        _make_tiny(TINY)
    for pattern in ("config.json", "*.safetensors", "tokenizer*"):
        if not any(folder.glob(pattern)):
            raise UserError(f"MODEL: {folder} has no {pattern}: is it a model's folder?")
    try:
        models: Any = AutoModelForCausalLM
        with torch.device("meta"):
            models.from_config(AutoConfig.from_pretrained(folder))
        tokenizer_of(folder)
    except UserError:
        raise
    except Exception as error:  # whatever a broken folder raises
        raise UserError(f"MODEL: {folder} cannot be used: {one_line(error)[:300]}") from error


def tokenizer_of(folder: str | Path) -> Any:
    """Return the tokenizer of a model; where it knows no padding, the end of a text pads.

    Raises:
        UserError: it knows no end of a text, so that no model could learn where to stop.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"MODEL: the tokenizer in {folder} has no eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: str | Path, checkpointing: bool = False) -> Any:
    """Return the model in a folder: bf16 where the GPU has it, float32 elsewhere.

    With `checkpointing` a part of the forward pass is computed twice, to need less memory.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    # peft asks for what is called otherwise since transformers 5.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated")
    dtype = torch.bfloat16 if gpu_has_bf16(pick_device()) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    model.config.use_cache = False  # of use in writing alone
    if checkpointing:
        old = "gradient_checkpointing_enable"  # its name until transformers 5
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)
        enable({"use_reentrant": False})
    return model


def with_adapter(base: Any, lora: Any) -> Any:
    """Return the base with a new adapter, the only part of it that is trained.

    Its load_state_dict takes the adapter's weights alone, too.
    """
    from peft import get_peft_model

    model = get_peft_model(base, lora)
    model.register_load_state_dict_post_hook(_the_base_may_be_missing)
    return model


def _the_base_may_be_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if ADAPTER in name]


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the adapter, by their names in the model."""
    return {name: tensor for name, tensor in model.state_dict().items() if ADAPTER in name}


def _make_tiny(folder: Path) -> None:
    """Write a language model of 0.2 million random weights, whole or not at all.

    Other workers may do the same just now: the weights are the same.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _bytewise_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "max_position_embeddings": 512}
    marks: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    # Weights that are larger than usual: a frozen output layer has to be able to be sure.
    config = LlamaConfig(initializer_range=0.15, **sizes, **heads, **marks)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not folder.exists():
            os.rename(temporary, folder)
    except OSError as error:
        if not folder.exists():
            raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _bytewise_tokenizer() -> Any:
    """Return a tokenizer whose tokens are the bytes, besides <pad> (0) and <end> (1)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    wrapped: Any = PreTrainedTokenizerFast
    return wrapped(tokenizer_object=bytewise, pad_token="<pad>", eos_token="<end>")
