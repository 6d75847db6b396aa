# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""RWKV-4's two blocks: time mix as a token mixer, channel mix as a feed-forward.

Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), equations 11 to 18.
Keys, values and gates come from a token and the one before it, never from the state, so that all of a text is
computed at once. Per channel, with decay w < 0, bonus u and the weight exp(k) of each token,

    wkv_t = (a_(t-1) + exp(u + k_t) v_t) / (b_(t-1) + exp(u + k_t))
    a_t = exp(w) a_(t-1) + exp(k_t) v_t,    b_t = exp(w) b_(t-1) + exp(k_t)

A state [B, 3, d] is a and b divided by exp(p), and p: the largest exponent in them, so that nothing overflows
whatever the keys are (the paper's appendix on stability). Without any token it is zeros, b included.
"""

import math

import torch
from torch import Tensor, nn

from .configuration_stackformer import StackformerConfig
from .dtypes import at_least_float32
from .layers_stackformer import ResidualProjection
from .mixer import Mixer
from .state import StateSpec, TensorSpec
from .token_layout import TokenLayout


class TokenShift(nn.Module):
    """Mixtures of each token with the one before it, a weight for each channel (equations 11 to 13)."""

    def __init__(self, size: int, num_mixtures: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_mixtures, size))

    def initial_weight(self) -> Tensor:
        """From the token before, in the first channels, to the token itself: as halfway up an RWKV-4."""
        channel = torch.arange(self.weight.shape[1]) / self.weight.shape[1]
        return channel.sqrt().expand_as(self.weight)

    def forward(
        self, hidden: Tensor, layout: TokenLayout, past: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Mixtures [n, d] of active tokens [n, d] that follow `past` [B', 1, d] (`None`: zeros); new past."""
        rows = layout.to_rows(hidden)
        if past is None:
            past = rows.new_zeros(rows.shape[0], 1, rows.shape[2])
        window = torch.cat([past.to(rows.dtype), rows], dim=1)
        before = layout.to_tokens(window[:, :-1])
        past = layout.last_of_rows(window, 1).to(at_least_float32(rows))
        return [torch.lerp(before, hidden, weight) for weight in self.weight.to(hidden.dtype)], past


class TimeMix(Mixer):
    """Weighted averages of all earlier values, a decay for each channel (equations 11 to 15)."""

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

    def forward(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...], None]:
        """Mix the active tokens along time.

        Args:
            hidden: [n, d], normalised; pointer: [n, S], not used; layout: of the n tokens.
            state: of `wkv` [B', 3, d], and the last token [B', 1, d], both float32 at least; `None` for the
                beginning.

        Returns:
            The mixed tokens [n, d], the new state, and no bank weights.
        """
        memory, past = (None, None) if state is None else state
        (key, value, receptance), past = self.shift(hidden, layout, past)
        mixed, memories = wkv(
            -self.time_decay.to(at_least_float32(hidden)).exp(),
            self.time_first,
            layout.to_rows(self.k_proj(key)),
            layout.to_rows(self.v_proj(value)),
            memory,
        )
        memory = layout.last_of_rows(memories, 1).squeeze(1)
        gate = self.receptance_proj(receptance).sigmoid()
        return self.o_proj(gate * layout.to_tokens(mixed)), (memory, past), None


class ChannelMix(nn.Module):
    """Gated feed-forward on a token and the one before it (equations 16 to 18)."""

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.shift = TokenShift(size, 2)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.receptance_proj = nn.Linear(size, size, bias=False)
        self.down_proj = ResidualProjection(config.intermediate_size, size)

    def state_spec(self) -> StateSpec:
        """The last token."""
        return (TensorSpec("last_token_of_channel_mix", (1, self.shift.weight.shape[1])),)

    def forward(self, hidden: Tensor, layout: TokenLayout, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Active tokens [n, d] that follow `past` [B', 1, d]: the output [n, d] and the new past."""
        (key, receptance), past = self.shift(hidden, layout, past)
        output = self.down_proj(self.up_proj(key).relu().square())
        return self.receptance_proj(receptance).sigmoid() * output, past


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


def reverse_wkv(decay: Tensor, key: Tensor, value: Tensor, final_state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before some tokens, from the state after them, and what is left of it to go by.

    Its relative error is the rounding error of the final state divided by what is left. RWKV-4 forgets by
    design: with initial decays, most channels have nothing left after a few tokens in float32.

    Args:
        decay: [d]; key, value: [B, T, d], as they were on the way forward.
        final_state: [B, 3, d], after the T tokens.

    Returns:
        The state [B, 3, d] before the T tokens, zeros where it is forgotten, and its share [B, d] of the
        weight b in the final state, 0 where that is within the rounding errors of T sums.
    """
    dtype = final_state.dtype
    decay, key, value = (x.to(dtype) for x in (decay, key, value))
    written = _states(decay, key, value, None)[:, -1]
    p = final_state[:, 2:]
    sums = final_state[:, :2] - (written[:, 2:] - p).exp() * written[:, :2]
    left = sums[:, 1] / final_state[:, 1]
    left = left * (left > torch.finfo(dtype).eps * key.shape[1])
    state = torch.cat([sums, p - decay * key.shape[1]], dim=1)
    return torch.where(left.unsqueeze(1) > 0, state, 0), left


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


__all__ = ["ChannelMix", "TimeMix", "TokenShift", "reverse_wkv", "wkv"]
