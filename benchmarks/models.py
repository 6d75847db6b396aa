# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Builds the models of the speed benchmarks, ours and transformers' own, with the same number of parameters.

experiments/rows.py lists them (`FAMILIES`). The width of a model is the one that comes nearest to the number
of parameters with the usual size of its family, and the size makes up for the rest, so that all agree within
2%.
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from experiments.command_line import COUNT
from experiments.rows import FAMILIES, HEAD, Family
from stackformer import StackformerCache, StackformerConfig, StackformerStaticCache
from stackformer.versions import CACHE_NAME

TOLERANCE = 0.02  # of the number of parameters


def add_arguments(parser: argparse.ArgumentParser, models: Iterable[str]) -> None:
    """Adds the options that choose the models, and their size."""
    parser.add_argument("--models", nargs="+", default=list(models), choices=list(FAMILIES))
    parser.add_argument("--parameters", type=COUNT, default=10_000_000, help="parameters of every model")
    parser.add_argument("--threads", type=COUNT, default=None, help="threads; torch's default if not given")
    parser.add_argument("--layers", type=COUNT, default=8, help="layers; the stack has half, mamba2 twice")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the weights; in training, they are float32 and bfloat16 is what autocast makes of products",
    )


def build_all(args: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """The models of `add_arguments`, in evaluation mode, on `args.device`; also sets the threads."""
    if args.threads:
        torch.set_num_threads(args.threads)
    configs = {name: matched_config(FAMILIES[name], args.parameters, args.layers) for name in args.models}
    return {name: build(config).to(args.device) for name, config in configs.items()}


def build_to_infer(args: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """`build_all`, checked by `check_cache`, with weights of `args.dtype`."""
    models = build_all(args)
    check_cache(models)
    return {name: model.to(getattr(torch, args.dtype)) for name, model in models.items()}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, the same each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def matched_config(family: Family, parameters: int, layers: int) -> PreTrainedConfig:
    """The config of a family that has so many parameters.

    Raises:
        ValueError: if none comes within 2%.
    """

    def count(width: int, size: int) -> int:
        return num_parameters(family.config(width, size, layers))

    width, excess = HEAD, count(HEAD, family.usual(HEAD)) - parameters
    while excess < 0:
        wider = width + family.step
        wider_excess = count(wider, family.usual(wider)) - parameters
        if abs(wider_excess) > abs(excess):
            break
        width, excess = wider, wider_excess
    size = family.usual(width)
    size = max(1, size - round(excess / (count(width, size + 1) - count(width, size))))
    if abs(count(width, size) - parameters) > TOLERANCE * parameters:
        raise ValueError(
            f"`parameters` must be possible with {layers} layers; the nearest to {parameters:,} is "
            f"{count(width, size):,} with a width of {width}"
        )
    return family.config(width, size, layers)


def num_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the model of a config, which is not built."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def describe(models: dict[str, PreTrainedModel]) -> str:
    """Markdown: what the models are."""
    lines = ["| model | class | parameters |", "|---|---|---|"]
    for name, model in models.items():
        lines.append(f"| {name} | {type(model).__name__} | {model.num_parameters():,} |")
    return "\n".join(lines)


def random_ids(batch: int, length: int, device: str = "cpu") -> Tensor:
    """Bytes [B, T]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, length), generator=generator).to(device)


# What the models call their cache, if not what most do.
_CACHE_NAMES = {"mamba2": "cache_params", "rwkv": "state"}


def read(model: PreTrainedModel, ids: Tensor, cache: Any = None, step: Callable | None = None) -> tuple:
    """Logits after the last of the tokens [B, T] that follow `cache`, and the cache after them.

    Args:
        step: called in place of the model, such as a compiled one.
    """
    name = _CACHE_NAMES.get(model.config.model_type, CACHE_NAME)
    keep = {} if model.config.model_type == "rwkv" else {"logits_to_keep": 1}
    outputs = (model if step is None else step)(ids, use_cache=True, **{name: cache}, **keep)
    return outputs.logits[:, -1], outputs[name]


@torch.no_grad()
def check_cache(models: dict[str, PreTrainedModel]) -> None:
    """Raise an error unless a text read in chunks has the logits of the text read at once."""
    for name, model in models.items():
        ids = random_ids(1, 40, model.device)
        expected, cache = model(ids, use_cache=False).logits[:, -1], None
        for chunk in ids.split([38, 1, 1], dim=1):
            logits, cache = read(model, chunk, cache)
        torch.testing.assert_close(
            logits, expected, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def state_bytes(cache: Any) -> int:
    """Bytes of all tensors in a cache, each storage counted once."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(item: Any) -> None:
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            for value in item.values():
                visit(value)
        elif isinstance(item, (list, tuple)):
            for value in item:
                visit(value)
        elif hasattr(item, "__dict__"):
            visit(vars(item))

    visit(cache)
    return sum(found.values())


def bytes_per_token(model: PreTrainedModel) -> int:
    """Of Llama's cache of keys and values."""
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * model.dtype.itemsize


def keys_and_values(model: PreTrainedModel, batch: int, length: int, room: int | None = None) -> Any:
    """A cache with random keys and values of `length` tokens.

    Args:
        room: further tokens for which a static cache has space; `None` makes a dynamic one, which grows.
    """
    config = model.config
    cache = DynamicCache(config=config) if room is None else StaticCache(config, max_cache_len=length + room)
    heads, size = config.num_key_value_heads, config.head_dim
    for index in range(config.num_hidden_layers):
        keys, values = torch.randn(2, batch, heads, length, size, device=model.device, dtype=model.dtype)
        cache.update(keys, values, index)
    return cache


def static_copy(cache: StackformerCache, config: StackformerConfig) -> StackformerStaticCache:
    """The same state in buffers that are written in place, for a compiled model."""
    static = StackformerStaticCache(config)
    for new, old in zip(static.layers, cache.clone().layers, strict=True):
        new.load(old.slices, old.get_seq_length(), old.slices[0][0].device)
    return static
