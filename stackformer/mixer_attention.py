# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Softmax attention as a token mixer, for decoders and hybrid models.

Vaswani et al. 2017, "Attention Is All You Need", equation 1, with rotary positions (Su et al. 2021,
"RoFormer", equation 34). It uses transformers' attention interface: `attn_implementation` chooses the kernel.
The stack pointer is not used: an active token has its full weight at every ponder step.

The keys and values of a row have no gaps between them. Those of the past come first, right-aligned, and those
of this call follow, left-aligned. So distances between slots are distances between active tokens of the row,
and padding changes no position. Angles are exact at any position (`rotary_embedding`), so that a model with a
window runs for ever.

Letters: n active tokens, B' rows, T tokens of the past, T' tokens of the call, H heads, K head size.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .configuration_stackformer import StackformerConfig
from .dtypes import at_least_float32
from .implementation import can_look_at
from .layers_stackformer import ResidualProjection, all_rows
from .mixer import Mixer
from .state import StateSpec, TensorSpec
from .token_layout import TokenLayout

# Angles of rotary positions are multiples of 2 ** -TURN_BITS turns, see `rotary_embedding`. The number is
# even, and products of half and all of its bits fit into int64.
TURN_BITS = 42


class AttentionState(NamedTuple):
    """The state of [`Attention`]. T is the longest past, or with a window always `sliding_window` - 1."""

    key: Tensor  # [B', T, H, K], rotated, the newest last; zeros in front in rows that have fewer tokens
    value: Tensor  # [B', T, H, K]
    seen: Tensor  # [B'], the number of tokens seen, int64


class AttentionInputs(NamedTuple):
    """Queries, keys and values of the tokens of a call."""

    query: Tensor  # [B', T', H, K], rotated
    key: Tensor  # [B', T', H, K], rotated
    value: Tensor  # [B', T', H, K]
    seen: Tensor  # [B'], the number of tokens seen before


class Attention(Mixer):
    """Causal multi-head softmax attention, to all earlier tokens or to those in a sliding window."""

    state_type = AttentionState
    is_causal = True
    num_key_value_groups = 1  # as many heads of keys and values as of queries

    def __init__(self, config: StackformerConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = rotary_head_size(config)
        size = config.core_size
        self.qkv_proj = nn.Linear(size, 3 * size, bias=False)
        self.persistent = None
        if config.num_persistent_tokens > 0:
            self.persistent = nn.Embedding(config.num_persistent_tokens, size)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """Specifies rotated keys and values of the past, and the number of tokens seen."""
        window = self.config.sliding_window
        slots = (None if window is None else window - 1, self.num_heads, self.head_dim)
        return TensorSpec("key", slots), TensorSpec("value", slots), TensorSpec("seen", (), integer=True)

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: AttentionState | None
    ) -> AttentionInputs:
        """Computes queries, keys and values of the tokens. The pointer is not used."""
        # [n, 3 d] -> [B', T', 3 d] -> [B', T', 3, H, K]
        rows = layout.to_rows(self.qkv_proj(hidden)).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = rows.unbind(2)  # [B', T', H, K] each
        seen = rows.new_zeros(len(rows), dtype=torch.long) if state is None else state.seen
        positions = seen.unsqueeze(1) + torch.arange(rows.shape[1], device=rows.device)
        query, key = self._rotate(query, key, positions)
        return AttentionInputs(query, key, value, seen)

    def mix(
        self, hidden: Tensor, inputs: AttentionInputs, layout: TokenLayout, state: AttentionState | None
    ) -> tuple[Tensor, AttentionState, None]:
        """Attends to the past and to these tokens."""
        query, key, value, seen = inputs
        if state is not None:
            key = torch.cat([state.key.to(key.dtype), key], dim=1)
            value = torch.cat([state.value.to(value.dtype), value], dim=1)
        mixed = self._attend(query, key, value, seen)

        seen = seen + (query.shape[1] if layout.row_lengths is None else layout.row_lengths)
        if self.config.sliding_window is not None:
            kept = self.config.sliding_window - 1
        elif state is None or layout.positions is None:
            kept = key.shape[1]
        else:
            kept = int(seen.max())
        state = AttentionState(_last_of_rows(key, kept, layout), _last_of_rows(value, kept, layout), seen)
        return self.o_proj(layout.to_tokens(mixed).flatten(1)), state, None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """Attends from queries [B', T', H, K] to keys and values [B', T + T', H, K].

        Args:
            seen: [B'], the number of tokens in the past. Earlier slots of the past are empty.

        Returns:
            [B', T', H, K].
        """
        name, window = self.config._attn_implementation, self.config.sliding_window
        (batch_size, length), total = query.shape[:2], key.shape[1]
        past, mask_function, real = total - length, causal_mask_function, None
        if window is not None and total <= window:
            window = None  # all tokens are inside the window
        if window is not None:
            mask_function = sliding_window_causal_mask_function(window)
        if past > 0:
            real = torch.arange(total, device=key.device) >= past - seen.unsqueeze(1)
        if self.persistent is not None:
            reach = self.config.sliding_window
            if past == 0 and total <= (reach or total) and reach != 1:
                reach = None  # the rows begin here, and end inside the window
            query, key, value = self._with_persistent(self.persistent, query, key, value, seen, reach)
            added = key.shape[1] - total
            past, total = past + added, total + added
            if window is not None:
                mask_function = or_masks(mask_function, lambda batch, head, q, kv: kv < added)
            if real is not None:
                real = nn.functional.pad(real, (added, 0), value=True)
        mask = ALL_MASK_ATTENTION_FUNCTIONS[name](
            batch_size=batch_size,
            q_length=length,
            kv_length=total,
            q_offset=past,
            mask_function=mask_function,
            attention_mask=real,
            local_size=window,
            dtype=query.dtype,
            device=query.device,
        )
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B', H, ., K]
            options = {"scaling": self.head_dim**-0.5, "dropout": 0.0, "sliding_window": window}
            return interface(self, query, key, value, mask, **options)[0]

        return attend_to_numbers(attend, query, key, value)

    def _with_persistent(
        self,
        tokens: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor,
        reach: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Puts keys and values of persistent tokens, at position 0, in front of those [B', T + T', H, K].

        With a window, tokens that are further away see them at the window's distance. Otherwise, logits would
        depend on the position for ever, at distances that training never showed. So a query is rotated twice,
        first for the persistent tokens, then for the others. A key has zeros where it must not be compared.

        Args:
            query: [B', T', H, K]; seen: [B'], the number of tokens in the past.
            reach: the largest distance to the persistent tokens; `None` for any.

        Returns:
            Queries, keys and values. With `reach`, queries and keys have the size 2 K.
        """
        if self.config.sliding_window is not None and "flash" in str(self.config._attn_implementation):
            raise ValueError(
                "`attn_implementation` must be able to see `num_persistent_tokens` outside of a "
                f"`sliding_window`, as 'sdpa' is, got {self.config._attn_implementation!r}"
            )
        weights = all_rows(tokens, self.config.num_persistent_tokens, key.device)
        rows = self.qkv_proj(weights).to(key.dtype).unflatten(-1, (3, self.num_heads, self.head_dim))
        _, keys, values = rows.expand(len(key), -1, -1, -1, -1).unbind(2)
        if reach is not None:
            positions = seen.unsqueeze(1) + torch.arange(query.shape[1], device=query.device)
            back = positions.clamp(max=reach) - positions
            near, _ = self._rotate(query, query, back)
            query = torch.cat([near, query], dim=-1)
            keys = nn.functional.pad(keys, (0, self.head_dim))
            key = nn.functional.pad(key, (self.head_dim, 0))
        return query, torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)

    def _rotate(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates queries and keys [B', T', H, K] by `positions` [B', T']."""
        theta = self.config.rope_parameters["rope_theta"]
        cos, sin = rotary_embedding(positions, self.head_dim, theta, at_least_float32(key))
        return apply_rotary_pos_emb(query, key, cos.to(key.dtype), sin.to(key.dtype), unsqueeze_dim=2)


def attend_to_numbers(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Calls `attend`, and keeps a NaN in a key or value from reaching the tokens before it.

    The kernels of softmax attention multiply masked values by 0, and 0 * NaN is NaN. If the result is not
    finite, this function attends again without the keys and values that are not finite, and sets the tokens
    that see them to NaN. It finds these tokens by attending to marks. On a GPU and in compiled graphs the
    result is not checked: there, NaN may spread to earlier tokens.

    Args:
        attend: maps queries [B', T', H, K] and keys and values [B', T + T', H, K] to [B', T', H, K]. Queries
            and keys may have another size than values.
    """
    mixed = attend(query, key, value)
    if query.shape[1] == 1 or not can_look_at(mixed) or math.isfinite(mixed.detach().sum()):
        return mixed
    lost = ~(torch.isfinite(key).all(-1, keepdim=True) & torch.isfinite(value).all(-1, keepdim=True))
    mixed = attend(query, key.masked_fill(lost, 0.0), value.masked_fill(lost, 0.0))
    marks = lost.to(value.dtype).expand_as(value)
    seen = attend(torch.zeros_like(query), torch.zeros_like(key), marks) > 0
    return mixed.masked_fill(seen, torch.nan)


def rotary_head_size(config: StackformerConfig) -> int:
    """Returns the size of a head. Raises a ValueError if it is odd, because it cannot be rotated then."""
    size = config.core_size // config.num_attention_heads
    if size % 2:
        raise ValueError(
            f"`num_attention_heads` must leave the heads of attention an even size, got "
            f"{config.num_attention_heads} heads of size {size}"
        )
    return size


def rotary_embedding(
    positions: Tensor, size: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines [..., size] of the rotations at `positions` [...], in `dtype`.

    Floating-point angles lose digits as positions grow. In float32 they are wrong by half a radian at 10
    million tokens, and from 2 ** 24 on two neighbours have the same angle. So angles are integers here, in
    units of 2 ** -TURN_BITS turns and modulo one turn. The angle between two tokens then depends only on
    their distance, at any positions. Frequencies (Su et al. 2021, equation 15) are rounded to such units,
    which moves the angle between two tokens by at most 2 ** -43 turns per token between them.

    Args:
        positions: int64.
        size: the head size, even.
        theta: the base of the frequencies.
        dtype: float32 or float64.
    """
    if torch.compiler.is_compiling():  # a constant of the graph
        turns = torch.tensor(_turns_per_token(size, theta), device=positions.device)
    else:
        turns = _turns_on(size, theta, positions.device)
    # positions * turns modulo 2 ** TURN_BITS, in two parts whose products are below 2 ** 63
    one_turn, half = 2**TURN_BITS - 1, TURN_BITS // 2
    positions = positions.unsqueeze(-1) & one_turn
    angles = (positions & (2**half - 1)) * turns
    angles = angles + ((((positions >> half) * (turns & (2**half - 1))) & (2**half - 1)) << half)
    angles = ((angles + 2 ** (TURN_BITS - 1)) & one_turn) - 2 ** (TURN_BITS - 1)  # half a turn either way
    radians = angles.to(dtype) * (2 * math.pi / 2**TURN_BITS)
    radians = torch.cat([radians, radians], dim=-1)
    return radians.cos(), radians.sin()


def _turns_per_token(size: int, theta: float) -> list[int]:
    """Returns the `size` / 2 frequencies of rotary positions, in 2 ** -TURN_BITS turns per token."""
    exponents = [2 * i / size for i in range(size // 2)]
    return [round(theta**-x / (2 * math.pi) * 2**TURN_BITS) % 2**TURN_BITS for x in exponents]


@lru_cache(maxsize=32)
def _turns_on(size: int, theta: float, device: torch.device) -> Tensor:
    """Returns `_turns_per_token` as a tensor on a device, so that a GPU is not waited for in every call."""
    with torch.inference_mode(False):
        return torch.tensor(_turns_per_token(size, theta), device=device)


def _last_of_rows(slots: Tensor, count: int, layout: TokenLayout) -> Tensor:
    """Returns the last `count` tokens [B', count, H, K] of each row of `slots` [B', T + T', H, K].

    A row that has fewer tokens gets zeros in front.
    """
    missing = count - slots.shape[1]
    if missing > 0:
        slots = nn.functional.pad(slots, (0, 0, 0, 0, missing, 0))
    return layout.last_of_rows(slots, count)


__all__ = ["Attention", "AttentionState", "attend_to_numbers", "rotary_embedding", "rotary_head_size"]
