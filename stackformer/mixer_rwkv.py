# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""RWKV-4's time mix as a token mixer.

Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), equations 11 to 15. Its
channel mix is in feed_forward.py. Keys, values and gates depend on a token and the one before it, not on the
state, so all tokens of a text are computed at once. Each channel has a decay w < 0 and a bonus u, and each
token has the weight exp(k):

    wkv_t = (a_(t-1) + exp(u + k_t) v_t) / (b_(t-1) + exp(u + k_t))
    a_t = exp(w) a_(t-1) + exp(k_t) v_t,    b_t = exp(w) b_(t-1) + exp(k_t)

A state [B, 3, d] holds a / exp(p), b / exp(p) and p, where p is the largest exponent in a and b. So no key
makes the state overflow (the paper's appendix on stability). At the beginning of a row the state is zeros.

Letters: n active tokens, B' rows, T' tokens of a row, d core width. `wkv` is a pure function on [B, T, d].
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
    receptance: Tensor  # [n, d], the inputs of the gate, mixtures of each token with the one before
    last_token: Tensor  # [B', 1, d], after these tokens


class TimeMix(Mixer):
    """Weighted averages of all values so far, with a decay for each channel (equations 11 to 15)."""

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
        """Returns log(-w) [d], such that weights decay per token by a factor between 0.993 and 2e-9.

        These are the decays of a layer halfway up an RWKV-4.
        """
        return -5 + 8 * torch.linspace(0, 1, len(self.time_decay)) ** 1.35

    def initial_first(self) -> Tensor:
        """Returns u [d], such that exp(u) is around 0.3, alternating between neighbouring channels."""
        return math.log(0.3) + 0.5 * ((torch.arange(len(self.time_first)) + 1) % 3 - 1)

    def state_spec(self) -> StateSpec:
        """Specifies the state of `wkv`, and the last token."""
        size = len(self.time_decay)
        return TensorSpec("wkv", (3, size)), TensorSpec("last_token", (1, size))

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: TimeMixState | None
    ) -> TimeMixInputs:
        """Computes the inputs of the recurrence. The pointer is not used."""
        mixtures, last_token = self.shift(hidden, layout, None if state is None else state.last_token)
        key, value, receptance = mixtures
        rows = layout.to_rows(self.k_proj(key), self.v_proj(value))
        return TimeMixInputs(rows[0], rows[1], receptance, last_token)

    def mix(
        self, hidden: Tensor, inputs: TimeMixInputs, layout: TokenLayout, state: TimeMixState | None
    ) -> tuple[Tensor, TimeMixState, None]:
        """Averages the values so far, and gates the averages."""
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
    """Averages the values so far, with weights exp(key) that decay with time.

    Args:
        decay: [d], w, at most 0; bonus: [d], u; key, value: [B, T, d].
        state: [B, 3, d] before the first token. Zeros in a row, or `None` for all rows, stand for the
            beginning.

    Returns:
        The averages [B, T, d], in the dtype of `value`, and the states before the first token and after every
        token [B, 1 + T, 3, d], float32 at least. Gradients flow through a and b of a state. The scale p has
        no gradient.
    """
    dtype, output_dtype = at_least_float32(key), value.dtype
    decay, bonus, key, value = (x.to(dtype) for x in (decay, bonus, key, value))
    states = _states(decay, key, value, state)
    a, b, p = states[:, :-1].unbind(2)  # [B, T, d] each, before each token
    p, own = p.detach().masked_fill(b == 0, -torch.inf), bonus + key
    top = torch.maximum(p, own.detach())
    old, new = (p - top).exp(), (own - top).exp()
    return ((old * a + new * value) / (old * b + new)).to(output_dtype), states


def _states(decay: Tensor, key: Tensor, value: Tensor, state: Tensor | None) -> Tensor:
    """Returns the states before the first token and after every token [B, 1 + T, 3, d]."""
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
    # [B, 1 + T, 2, d] and [B, 1 + T, 1, d] -> [B, 1 + T, 3, d]
    return torch.cat([sums, torch.cat([state[:, None, 2], p[:, 1:]], dim=1).unsqueeze(2)], dim=2)


def _linear_scan(factor: Tensor, inputs: Tensor, initial: Tensor) -> Tensor:
    """Computes h_t = factor_t h_(t-1) + inputs_t from h_0 = `initial`.

    It splits the tokens into about sqrt(T) chunks, scans all chunks in parallel from zeros, and then adds the
    contribution of the state that enters each chunk.

    Args:
        factor: [B, T, 1, d], in [0, 1]; inputs: [B, T, 2, d]; initial: [B, 2, d].

    Returns:
        All h [B, 1 + T, 2, d].
    """
    length = inputs.shape[1]
    size = math.isqrt(length - 1) + 1
    missing = -length % size
    # [B, T, ., d] -> [B, chunks, C, ., d] -> C times [B, chunks, ., d]
    factors, steps = (
        nn.functional.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, size)).unbind(2)
        for x in (factor, inputs)
    )
    inside, products = [steps[0]], [factors[0]]  # one tensor for each place in a chunk
    for step, factor in zip(steps[1:], factors[1:], strict=True):
        inside.append(torch.addcmul(step, factor, inside[-1]))
        products.append(factor * products[-1])
    entering = [initial]  # the state before each chunk
    for last, product in zip(inside[-1].unbind(1), products[-1].unbind(1), strict=True):
        entering.append(torch.addcmul(last, product, entering[-1]))
    carried = torch.stack(entering[:-1], dim=1)  # [B, chunks, 2, d]
    places = [torch.addcmul(x, product, carried) for x, product in zip(inside, products, strict=True)]
    # C times [B, chunks, 2, d] -> [B, chunks, C, 2, d] -> [B, T, 2, d]
    scanned = torch.stack(places, dim=2).flatten(1, 2)[:, :length]
    return torch.cat([initial.unsqueeze(1), scanned], dim=1)


__all__ = ["TimeMix", "wkv"]
