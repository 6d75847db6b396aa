# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""RWKV-4's time mix as a token mixer.

Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), equations 11 to 15; its
channel mix is in feed_forward.py. Keys, values and gates come from a token and the one before it, never from
the state, so all tokens of a text are computed at once. Per channel, with decay w < 0, bonus u and the weight
exp(k) of each token,

    wkv_t = (a_(t-1) + exp(u + k_t) v_t) / (b_(t-1) + exp(u + k_t))
    a_t = exp(w) a_(t-1) + exp(k_t) v_t,    b_t = exp(w) b_(t-1) + exp(k_t)

A state [B, 3, d] is a and b divided by exp(p), and p: the largest exponent in them, so that nothing overflows
whatever the keys are (the paper's appendix on stability). Without any token it is zeros, b included.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_stackformer import StackformerConfig
from .dtypes import at_least_float32
from .layers_stackformer import ResidualProjection, TokenShift
from .mixer import Mixer
from .state import StateSpec, TensorSpec
from .token_layout import TokenLayout


class TimeMixState(NamedTuple):
    """The state of [`TimeMix`], float32 at least."""

    wkv: Tensor  # [B', 3, d]
    last_token: Tensor  # [B', 1, d]


class TimeMixInputs(NamedTuple):
    """The inputs of the recurrence."""

    key: Tensor  # [B', T', d]
    value: Tensor  # [B', T', d]
    receptance: Tensor  # [n, d], mixtures of each token with the one before
    last_token: Tensor  # [B', 1, d]


class TimeMix(Mixer):
    """Weighted averages of all earlier values, a decay for each channel (equations 11 to 15)."""

    state_type = TimeMixState

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.time_decay = nn.Parameter(torch.empty(size))  # log(-w)
        self.time_first = nn.Parameter(torch.empty(size))  # u
        self.shift = TokenShift(size, 3)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.receptance_proj = nn.Linear(size, size, bias=False)
        self.o_proj = ResidualProjection(size, size)

    def initial_decay(self) -> Tensor:
        """From 0.993 to 2e-9 of the weight left after each token: as halfway up an RWKV-4."""
        return -5 + 8 * torch.linspace(0, 1, len(self.time_decay)) ** 1.35

    def initial_first(self) -> Tensor:
        """Around 0.3 of the weight that the token will have for those after it, zigzagging."""
        return math.log(0.3) + 0.5 * ((torch.arange(len(self.time_first)) + 1) % 3 - 1)

    def state_spec(self) -> StateSpec:
        """The state of `wkv`, and the last token."""
        size = len(self.time_decay)
        return TensorSpec("wkv", (3, size)), TensorSpec("last_token", (1, size))

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: TimeMixState | None
    ) -> TimeMixInputs:
        """The inputs of the recurrence; the pointer is not used."""
        mixtures, last_token = self.shift(hidden, layout, None if state is None else state.last_token)
        key, value, receptance = mixtures
        rows = layout.to_rows(self.k_proj(key), self.v_proj(value))
        return TimeMixInputs(rows[0], rows[1], receptance, last_token)

    def mix(
        self, hidden: Tensor, inputs: TimeMixInputs, layout: TokenLayout, state: TimeMixState | None
    ) -> tuple[Tensor, TimeMixState, None]:
        """Average the values so far."""
        mixed, states = wkv(
            -self.time_decay.to(at_least_float32(hidden)).exp(),
            self.time_first,
            inputs.key,
            inputs.value,
            None if state is None else state.wkv,
        )
        gate = self.receptance_proj(inputs.receptance).sigmoid()
        last = layout.last_of_rows(states, 1).squeeze(1)  # [B', 1 + T', 3, d] -> [B', 3, d]
        return self.o_proj(gate * layout.to_tokens(mixed)), TimeMixState(last, inputs.last_token), None


def wkv(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The average of the values so far, under weights exp(key) that decay with time.

    Args:
        decay: [d], w, at most 0; bonus: [d], u; key, value: [B, T, d].
        state: [B, 3, d] before the first token; zeros, for some rows or all, or `None` for the beginning.

    Returns:
        The averages [B, T, d], in the dtype of `value`, and the states before the first and after every
        token [B, 1 + T, 3, d], float32 at least. Gradients flow through a and b of a state, to which p is
        just a scale.
    """
    dtype, output_dtype = at_least_float32(key), value.dtype
    decay, bonus, key, value = (x.to(dtype) for x in (decay, bonus, key, value))
    states = _states(decay, key, value, state)
    a, b, p = states[:, :-1].unbind(2)
    p, own = p.detach().masked_fill(b == 0, -torch.inf), bonus + key
    top = torch.maximum(p, own.detach())
    old, new = (p - top).exp(), (own - top).exp()
    return ((old * a + new * value) / (old * b + new)).to(output_dtype), states


def _states(decay: Tensor, key: Tensor, value: Tensor, state: Tensor | None) -> Tensor:
    """States before the first and after every token [B, 1 + T, 3, d]."""
    if state is None:
        state = key.new_zeros(key.shape[0], 3, key.shape[2])
    state = state.to(key.dtype)
    with torch.no_grad():
        p = state[:, 2:].masked_fill(state[:, 1:2] == 0, -torch.inf)
        drift = decay * torch.arange(key.shape[1] + 1, device=key.device).unsqueeze(1)
        p = (torch.cat([p, key], dim=1) - drift).cummax(1).values + drift
    keep = (p[:, :-1] + decay - p[:, 1:]).exp()
    weight = (key - p[:, 1:]).exp()
    sums = _linear_scan(keep.unsqueeze(2), torch.stack([weight * value, weight], dim=2), state[:, :2])
    return torch.cat([sums, torch.cat([state[:, None, 2], p[:, 1:]], dim=1).unsqueeze(2)], dim=2)


def _linear_scan(factor: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
    """h_0 = initial [B, ...], h_t = factor_t h_(t-1) + inputs_t: all h [B, 1 + T, ...], factors in [0, 1].

    The square root of T blocks side by side, and then what goes from block to block.
    """
    length = inputs.shape[1]
    size = math.isqrt(length - 1) + 1
    missing = -length % size
    factors, steps = (
        nn.functional.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, size)).unbind(2)
        for x in (factor, inputs)
    )
    inside, products = [steps[0]], [factors[0]]  # [B, blocks, ...] each, by place in the block
    for step, factor in zip(steps[1:], factors[1:], strict=True):
        inside.append(torch.addcmul(step, factor, inside[-1]))
        products.append(factor * products[-1])
    entering = [initial]
    for last, product in zip(inside[-1].unbind(1), products[-1].unbind(1), strict=True):
        entering.append(torch.addcmul(last, product, entering[-1]))
    carried = torch.stack(entering[:-1], dim=1)
    blocks = [torch.addcmul(x, product, carried) for x, product in zip(inside, products, strict=True)]
    scanned = torch.stack(blocks, dim=2).flatten(1, 2)[:, :length]
    return torch.cat([initial.unsqueeze(1), scanned], dim=1)


__all__ = ["TimeMix", "wkv"]
