# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The rows of all tables: which models are compared. To add a row, add it here.

`COMPARED`   systems of equal size on text: scripts/compare.py
`QUALITY`    depth, stack, banks and halting, each on its own: benchmarks/quality.py
`TEXT`       memories, and models of transformers, at 20 bytes per parameter: benchmarks/text.py
`PRESETS`    all presets: benchmarks/presets.py
`FAMILIES`   models of any size, for speed and memory: benchmarks/models.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformers import LlamaConfig, Mamba2Config, PreTrainedConfig, Qwen3NextConfig, RwkvConfig

from stackformer import StackformerConfig

LLAMA, MAMBA2, RWKV, QWEN3_NEXT = "llama", "mamba2", "rwkv", "qwen3_next"
CONFIGS = Path(__file__).parent.parent / "configs"


class Row(NamedTuple):
    """A model of a table.

    Args:
        preset: the name of a file in configs/.
        overrides: other fields than the preset's, as in `scripts.train --config_overrides`.
        note: what the report says about it.
        depth: tokens halt at random, at this mean depth, instead of when they have learned to.
        depth_of: as `depth`, at the mean depth that this row learned with the same seed.
    """

    preset: str
    overrides: str | None = None
    note: str = ""
    depth: float | None = None
    depth_of: str | None = None

    @property
    def path(self) -> str:
        """The file of the preset."""
        return str(CONFIGS / f"{self.preset}.json")


# Instead of positions, what is linear has a short convolution: without either, it has no word order.
LINEAR = "conv_kernel_size=4,intermediate_size=568"
_SUMS, _CORRECTIONS = 'mixer_types=["banked_linear_attention"]', 'mixer_types=["banked_delta_rule"]'
FAST_TRANSFORMERS = "linear attention (fast-transformers)"
COMPARED = {
    "softmax decoder": Row(
        "softmax-tiny",
        None,
        "Al-Rfou et al. 2018 in small: 2 layers, with rotary positions instead of embeddings of positions in "
        "every layer. Left out: auxiliary losses (of layers in between, of the second next character), SGD "
        "with momentum, dropout.",
    ),
    "linear attention": Row(
        "linear-tiny", LINEAR, "Katharopoulos et al. 2020, with a convolution over 4 bytes."
    ),
    FAST_TRANSFORMERS: Row(
        "linear-tiny",
        f'{LINEAR},mixer_types=["fast_transformers","fast_transformers"]',
        "the same with the operator of pytorch-fast-transformers, which agreed on the same weights.",
    ),
    "fixed-size attention": Row(
        "fixed-size-tiny",
        None,
        "de Brebisson & Vincent 2016, gated: sums of f f^T, with one matrix per layer and without decay. The "
        "vectors come from a convolution over 4 bytes instead of a recurrent network.",
    ),
    "fast weights": Row("fast-weights-tiny", None, "decayed sums of outer products, Ba et al. 2016."),
    "fast weights, inner loop": Row(
        "inner-loop-tiny",
        None,
        "Ba et al. 2016 in full: a recurrent cell that settles in decayed sums of its own past, in one inner "
        "step. One vector and one matrix per layer, no heads. A token is added with weight 0.002 instead "
        "of the paper's 0.5, with which text is not learned at this width (docs/experiments.md).",
    ),
    "delta rule": Row("delta-tiny", None, "Schlag et al. 2021, Yang et al. 2024; without decay."),
    "RWKV": Row("rwkv-tiny", None, "RWKV-4, Peng et al. 2023."),
    "coupled": Row("coupled-tiny", None, "a reversible recurrent cell (Gomez et al. 2017), token by token."),
    "coupled angles": Row("coupled-angles-tiny", None, "the same with states that wrap around."),
    "memory bank": Row(
        "plain-tiny",
        "hidden_size=176,intermediate_size=552,num_memory_banks=4",
        "linear attention to 4 banks per head that decay where they are written to; no stack.",
    ),
    "memory bank, 2 of 4": Row(
        "plain-tiny",
        "hidden_size=176,intermediate_size=552,num_memory_banks=4,num_banks_per_tok=2",
        "the same where a token writes to 2 of the 4 banks of each head, and reads 2.",
    ),
    "Stackformer": Row(
        "stackformer-tiny",
        None,
        "4 banks per head and stack level, that add in one layer and correct in the other, 3 levels, up to 3 "
        "ponder steps, in a bottleneck.",
    ),
    "Stackformer, one bank": Row(
        "stackformer-tiny", "num_memory_banks=1", "the same with one memory per head and level."
    ),
    "Stackformer, sums alone": Row(
        "stackformer-tiny",
        _SUMS,
        "the same without the delta rule.",
    ),
}

_PLAIN = "bottleneck_size=none,num_memory_banks=1,stack_depth=1,max_ponder_steps=1"
_TINY = "stackformer-tiny"
QUALITY = {
    "stack, P = 1": Row(_TINY, "max_ponder_steps=1,stack_depth=1"),
    "stack, P = 2": Row(_TINY, "max_ponder_steps=2"),
    "stack, P = 4": Row(_TINY, "max_ponder_steps=4"),
    "stack, P = 8": Row(_TINY, "max_ponder_steps=8"),
    "untied, 4 x the layers, P = 1": Row(_TINY, "max_ponder_steps=1,stack_depth=1,num_hidden_layers=8"),
    # As many layers with the parameters of the stack, and as many parameters with its layers.
    "8 narrow layers, P = 1": Row(
        _TINY, "max_ponder_steps=1,stack_depth=1,num_hidden_layers=8,bottleneck_size=80"
    ),
    "2 wide layers, P = 1": Row(_TINY, "max_ponder_steps=1,stack_depth=1,bottleneck_size=320"),
    "attention": Row(
        _TINY, f'{_PLAIN},hidden_size=192,intermediate_size=528,mixer_types=["attention","attention"]'
    ),
    "linear attention": Row(
        _TINY, f"{_PLAIN},hidden_size=176,intermediate_size=568,max_decay_rate=0,{_SUMS}"
    ),
    "no stack, no halting, P = 4": Row(_TINY, "max_ponder_steps=4,stack_depth=1", depth=4),
    "random halting, P = 4": Row(_TINY, "max_ponder_steps=4", depth_of="stack, P = 4"),
    "one bank, P = 4": Row(_TINY, "max_ponder_steps=4,num_memory_banks=1"),
    "sums alone, P = 4": Row(_TINY, f"max_ponder_steps=4,{_SUMS}"),
    "1 bank of their size, P = 4": Row(_TINY, "max_ponder_steps=4,num_memory_banks=1,num_attention_heads=1"),
}

_TEXT = "hidden_size=96,intermediate_size=264"
_PEER = "hidden_size=96,intermediate_size=264,num_attention_heads=4,num_key_value_heads=4,head_dim=24"
TEXT = {
    "one bank": Row("plain-tiny", _TEXT),
    "4 banks": Row("plain-tiny", f"{_TEXT},num_memory_banks=4"),
    "delta rule": Row("plain-tiny", f"{_TEXT},{_CORRECTIONS}"),
    "4 delta banks": Row("plain-tiny", f"{_TEXT},num_memory_banks=4,{_CORRECTIONS}"),
    "4 banks, then 4 delta banks": Row(
        "plain-tiny",
        f'{_TEXT},num_memory_banks=4,mixer_types=["banked_linear_attention","banked_delta_rule"]',
    ),
    LLAMA: Row("peers/llama", _PEER.replace("264", "302")),
    QWEN3_NEXT: Row(
        "peers/qwen3_next",
        f"{_PEER},linear_num_key_heads=4,linear_num_value_heads=4,linear_key_head_dim=24,"
        "linear_value_head_dim=24",
    ),
    MAMBA2: Row("peers/mamba2", "hidden_size=96,num_heads=6,state_size=32"),
    RWKV: Row("peers/rwkv", "hidden_size=96,attention_hidden_size=96,intermediate_size=400"),
}

PRESETS = {path.stem: str(path) for path in sorted(CONFIGS.glob("*-tiny.json"))}

VOCABULARY = 261
HEAD = 64
SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


class Family(NamedTuple):
    """Models of one kind and any size: `config(width, size, layers)`, for widths in multiples of `step`, and
    the usual size for a width.

    All have byte-sized vocabularies, untied embeddings and heads of 64 channels. Mamba-2, whose layers have
    no feed-forward, has twice as many of them; the stack, which runs each several times, half as many.
    """

    config: Callable[[int, int, int], PreTrainedConfig]
    usual: Callable[[int], int]
    step: int = HEAD


def _plain(width: int, size: int, layers: int) -> StackformerConfig:
    return StackformerConfig(
        hidden_size=width, bottleneck_size=None, intermediate_size=size, num_hidden_layers=layers,
        num_attention_heads=width // HEAD, num_memory_banks=1, stack_depth=1, max_ponder_steps=1,
        mixer_types=["banked_linear_attention"] * layers, **SPECIAL,
    )  # fmt: skip


def _banks(width: int, size: int, layers: int) -> StackformerConfig:
    config = _plain(width, size, layers)
    config.num_memory_banks = StackformerConfig.num_memory_banks
    return config


def _delta_banks(width: int, size: int, layers: int) -> StackformerConfig:
    config = _banks(width, size, layers)
    config.mixer_types = ["banked_delta_rule"] * layers
    return config


def _stack(width: int, size: int, layers: int) -> StackformerConfig:
    return StackformerConfig(
        hidden_size=2 * width, bottleneck_size=width, intermediate_size=size,
        num_hidden_layers=max(1, layers // 2), num_attention_heads=width // HEAD, **SPECIAL,
    )  # fmt: skip


def _llama(width: int, size: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=size, num_hidden_layers=layers,
        num_attention_heads=width // HEAD, max_position_embeddings=2**21, **SPECIAL,
    )  # fmt: skip


def _mamba2(width: int, size: int, layers: int) -> Mamba2Config:
    return Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=width, num_heads=2 * width // HEAD, head_dim=HEAD, n_groups=1,
        state_size=size, num_hidden_layers=2 * layers, **SPECIAL,
    )  # fmt: skip


def _rwkv(width: int, size: int, layers: int) -> RwkvConfig:
    return RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=size, num_hidden_layers=max(2, layers),
        **SPECIAL,
    )  # fmt: skip


def _qwen3_next(width: int, size: int, layers: int) -> Qwen3NextConfig:
    heads = width // HEAD
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers - 1)]
    return Qwen3NextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=size, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=HEAD, linear_num_key_heads=heads,
        linear_num_value_heads=heads, linear_key_head_dim=HEAD, linear_value_head_dim=HEAD,
        layer_types=[*kinds, "full_attention"], mlp_only_layers=list(range(layers)),
        max_position_embeddings=2**21, **SPECIAL,
    )  # fmt: skip


PLAIN, BANKS, DELTA_BANKS, STACK = "plain core", "plain core, 4 banks", "plain core, 4 delta banks", "stack"
OURS = (PLAIN, BANKS, DELTA_BANKS, STACK)
FAMILIES = {
    PLAIN: Family(_plain, lambda width: 3 * width),
    BANKS: Family(_banks, lambda width: 3 * width),
    DELTA_BANKS: Family(_delta_banks, lambda width: 3 * width),
    STACK: Family(_stack, lambda width: 3 * width),
    LLAMA: Family(_llama, lambda width: 8 * width // 3),
    MAMBA2: Family(_mamba2, lambda width: 128, HEAD // 2),
    RWKV: Family(_rwkv, lambda width: 4 * width),
    QWEN3_NEXT: Family(_qwen3_next, lambda width: 8 * width // 3),
}


__all__ = [
    "BANKS",
    "COMPARED",
    "DELTA_BANKS",
    "FAMILIES",
    "FAST_TRANSFORMERS",
    "HEAD",
    "LLAMA",
    "MAMBA2",
    "OURS",
    "PLAIN",
    "PRESETS",
    "QUALITY",
    "QWEN3_NEXT",
    "RWKV",
    "STACK",
    "TEXT",
    "Family",
    "Row",
]
