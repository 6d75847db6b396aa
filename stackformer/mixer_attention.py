# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Softmax attention as a token mixer, for decoders and hybrid models.

Vaswani et al. 2017, "Attention Is All You Need", equation 1, with rotary positions (Su et al. 2021,
"RoFormer", equation 34). It uses transformers' attention interface: `attn_implementation` chooses the kernel.
The stack pointer is not used: an active token has its full weight at every ponder step.

The keys and values of a row have no gaps between them. Those of the past come first, right-aligned, and those
of this call follow, left-aligned. So distances between slots are distances between active tokens of the row,
and padding changes no position.

Letters: n active tokens, B' rows, T tokens of the past, T' tokens of the call, H heads, K head size.
"""

import math
from collections.abc import Callable
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
from .implementation import can_look_at
from .layers_stackformer import ResidualProjection, all_rows
from .mixer import Mixer
from .state import StateSpec, TensorSpec
from .token_layout import TokenLayout


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
        cos, sin = rotary_embedding(positions, self.head_dim, self.config.rope_parameters["rope_theta"])
        query, key = apply_rotary_pos_emb(query, key, cos.to(key.dtype), sin.to(key.dtype), unsqueeze_dim=2)
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
            key, value = self._with_persistent(self.persistent, key, value)
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

    def _with_persistent(self, tokens: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts keys and values of persistent tokens, at position 0, in front of those [B', T + T', H, K]."""
        if self.config.sliding_window is not None and "flash" in str(self.config._attn_implementation):
            raise ValueError(
                "`attn_implementation` must be able to see `num_persistent_tokens` outside of a "
                f"`sliding_window`, as 'sdpa' is, got {self.config._attn_implementation!r}"
            )
        weights = all_rows(tokens, self.config.num_persistent_tokens, key.device)
        rows = self.qkv_proj(weights).to(key.dtype).unflatten(-1, (3, self.num_heads, self.head_dim))
        _, keys, values = rows.expand(len(key), -1, -1, -1, -1).unbind(2)
        return torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)


def attend_to_numbers(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Calls `attend`, and keeps a NaN in a key or value from reaching the tokens before it.

    The kernels of softmax attention multiply masked values by 0, and 0 * NaN is NaN. If the result is not
    finite, this function attends again without the keys and values that are not finite, and sets the tokens
    that see them to NaN. It finds these tokens by attending to marks. On a GPU and in compiled graphs the
    result is not checked: there, NaN may spread to earlier tokens.

    Args:
        attend: maps queries [B', T', H, K] and keys and values [B', T + T', H, K] to [B', T', H, K].
    """
    mixed = attend(query, key, value)
    if query.shape[1] == 1 or not can_look_at(mixed) or math.isfinite(mixed.detach().sum()):
        return mixed
    lost = ~torch.isfinite(key.detach() + value.detach()).all(-1, keepdim=True)
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


def rotary_embedding(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines [..., size] of the rotations at `positions` [...], float32.

    They are not kept in a buffer, because a buffer would be rounded together with the weights.
    """
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angles = positions.unsqueeze(-1) * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _last_of_rows(slots: Tensor, count: int, layout: TokenLayout) -> Tensor:
    """Returns the last `count` tokens [B', count, H, K] of each row of `slots` [B', T + T', H, K].

    A row that has fewer tokens gets zeros in front.
    """
    missing = count - slots.shape[1]
    if missing > 0:
        slots = nn.functional.pad(slots, (0, 0, 0, 0, missing, 0))
    return layout.last_of_rows(slots, count)


__all__ = ["Attention", "AttentionState", "attend_to_numbers", "rotary_embedding", "rotary_head_size"]
