# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Gated linear attention to a bank of decaying memories: the default token mixer of Stackformer.

Letters: n active tokens, B' rows, T' tokens of a row, d core width, H heads, K = V head size, S stack levels,
N memory banks, R = S * N memories of a head.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .configuration_stackformer import StackformerConfig
from .dtypes import at_least_float32
from .fused_ops import RMSNorm, swish_gate
from .layers_stackformer import ResidualProjection, ShortConvolution, convolve, past_spec
from .memory_bank import (
    banked_linear_attention,
    can_decode_token,
    combine_chunks,
    decode_token,
    reverse_banked_linear_attention,
)
from .mixer import Mixed, Mixer
from .state import State, StateSpec, TensorSpec
from .token_layout import TokenLayout


class _EluPlusOne(torch.autograd.Function):
    """elu(x) + 1. It keeps its result for the backward pass, as does what is given the result, and not x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        result = nn.functional.elu(x).add_(1)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return grad * result.clamp(max=1)


def _elu_plus_one(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _EluPlusOne.apply(x)
    return nn.functional.elu(x).add_(1)


# Feature maps by name. All are non-negative, so that no normalizer vanishes between terms of both signs.
FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu_plus_one": _elu_plus_one,
    "relu": nn.functional.relu,
    "softplus": nn.functional.softplus,
    "softmax": lambda x: x.softmax(-1),
    "exp": lambda x: x.clamp(max=20.0).exp(),
}


class BankState(NamedTuple):
    """The state of [`BankedLinearAttention`], float32 at least."""

    memory: Tensor  # [B', H, R, K, V]
    normalizer: Tensor  # [B', H, R, K]
    past: Tensor  # [B', kernel - 1, 3 d], the last inputs of the convolution


class BankInputs(NamedTuple):
    """The inputs of the recurrence."""

    # From query to log decay, [B', T', H, ...] each: the first arguments of `banked_linear_attention`.
    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    bank_weights: tuple[Tensor, Tensor, Tensor]  # read, write, log decay times write, [n, H, N] each
    past: Tensor  # [B', kernel - 1, 3 d], of the convolution, after these tokens


class BankedLinearAttention(Mixer):
    """Linear attention to S*N memories per head. The stack pointer and a softmax over banks weight them."""

    state_type = BankState
    num_reversible = 2  # memory and normalizer; the past of the convolution is stored
    is_splittable = True

    def __init__(self, config: StackformerConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_banks = config.num_memory_banks
        self.num_memories = config.num_memory_banks * config.stack_depth
        self.head_dim = config.core_size // config.num_attention_heads
        self.max_decay_rate = config.max_decay_rate
        self.chunk_size = config.chunk_size
        self.feature_map = FEATURE_MAPS[config.feature_map]

        size = config.core_size
        self.qkv_proj = nn.Linear(size, 3 * size, bias=False)
        self.kernel_size = config.conv_kernel_size
        self.conv = ShortConvolution.of(3 * size, self.kernel_size)
        self.past_spec = past_spec(self.kernel_size, 3 * size)
        self.decay_proj = nn.Linear(size, self.num_heads * self.num_banks)
        if self.num_banks > 1:
            self.read_proj = nn.Linear(size, self.num_heads * self.num_banks)
            self.write_proj = nn.Linear(size, self.num_heads * self.num_banks)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """Specifies the memories, their key sums, and the last inputs of the convolution."""
        memories = (self.num_heads, self.num_memories, self.head_dim)
        return (
            TensorSpec("memory", (*memories, self.head_dim)),
            TensorSpec("normalizer", memories),
            self.past_spec,
        )

    def forward(
        self,
        hidden: Tensor,
        pointer: Tensor,
        layout: TokenLayout,
        state: BankState | None = None,
        inputs: BankInputs | None = None,
        in_place: bool = False,
    ) -> Mixed:
        """See [`Mixer.forward`]. A single token of each row is mixed by `_decode_token` where possible."""
        if not in_place and state is not None and inputs is None and self._can_decode_token(hidden, layout):
            return self._decode_token(hidden, pointer, None, state)
        if in_place:
            return self._decode_token(hidden, pointer, layout, cast(BankState, state))
        if inputs is None:
            inputs = self.project(hidden, pointer, layout, state)
        return self.mix(hidden, inputs, layout, state)

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: BankState | None
    ) -> BankInputs:
        """Computes the inputs of the recurrence. Of `state`, only `past` is read."""
        weights = self._gates(hidden, pointer.dtype)
        addressed = (address_memories(pointer, weight) for weight in weights)  # [n, H, R] each
        rows, read, write, log_decay = layout.to_rows(self.qkv_proj(hidden), *addressed)
        rows, past = convolve(
            self.conv, self.kernel_size, rows, None if state is None else state.past, layout
        )
        # [B', T', 3 d] -> [B', T', H, K] three times
        query, key, value = rows.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        query, key = self.feature_map(query), self.feature_map(key)
        if torch.is_grad_enabled():  # a view would keep the memory of all three until the backward pass
            value = value.contiguous()
        return BankInputs((query, key, value, read, write, log_decay), weights, past)

    def mix(
        self, hidden: Tensor, inputs: BankInputs, layout: TokenLayout, state: BankState | None
    ) -> tuple[Tensor, BankState, tuple[Tensor, Tensor, Tensor]]:
        """Writes each token to the memories and then reads them, in the order of the tokens."""
        mixed, (memory, normalizer) = banked_linear_attention(
            *inputs.operands,
            initial_state=None if state is None else (state.memory, state.normalizer),
            chunk_size=self.chunk_size,
            max_decay=self.max_decay_rate,
        )
        mixed = self.norm(layout.to_tokens(mixed)).flatten(1)  # [n, H, V] -> [n, d]
        output = self.o_proj(swish_gate(self.gate_proj(hidden), mixed))
        return output, BankState(memory, normalizer, inputs.past), inputs.bank_weights

    def _decode_token(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout | None, state: BankState
    ) -> Mixed:
        """Mixes one token of each row in one call of the C++ library. With a `layout`, it writes in place."""
        weights = self._gates(hidden, pointer.dtype)
        projected, gate = self.qkv_proj(hidden), self.gate_proj(hidden)
        mixed, new = decode_token(
            projected,
            self.conv.weight,
            pointer,
            weights,
            self.norm.weight,
            gate,
            state,
            cast(float, self.norm.eps),
            rows=None if layout is None else layout.rows,
            in_place=layout is not None,
        )
        return self.o_proj(mixed), BankState(*new) if layout is None else state, weights

    def _can_decode_token(self, hidden: Tensor, layout: TokenLayout) -> bool:
        """Whether `_decode_token` gives the same result as `project` and `mix`.

        This holds for one token of each row, on a CPU, without gradients, and with modules that no adapter or
        hook has changed.
        """
        if layout.row_length != 1 or layout.thinking is not None or not can_decode_token(hidden):
            return False
        if self.feature_map is not FEATURE_MAPS["elu_plus_one"]:
            return False
        return _is_untouched(self.conv, ShortConvolution) and _is_untouched(self.norm, RMSNorm)

    def writes_in_place(self, hidden: Tensor, layout: TokenLayout, state: State) -> bool:
        """See [`Mixer.writes_in_place`]."""
        if (
            len(state) != 3
            or len(state[0]) != layout.batch_size
            or not self._can_decode_token(hidden, layout)
        ):
            return False
        dtype = at_least_float32(hidden)
        return all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in state)

    def total_decay(self, inputs: BankInputs) -> Tensor:
        """See [`Mixer.total_decay`]: [B', H, R]."""
        return -inputs.operands[-1].sum(1)

    def reverse(self, inputs: BankInputs, state: State) -> State:
        """See [`Mixer.reverse`]: memory and normalizer."""
        _, key, value, _, write, log_decay = inputs.operands
        return reverse_banked_linear_attention(key, value, write, log_decay, (state[0], state[1]))

    def carry(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, gather: Callable[..., list[Tensor]]
    ) -> tuple[BankState, BankInputs]:
        """See [`Mixer.carry`]."""
        history = self.kernel_size - 1
        rows = nn.functional.pad(layout.to_rows(hidden), (0, 0, history, 0))
        latest = self.qkv_proj(layout.last_of_rows(rows, history)).to(at_least_float32(hidden))
        counts = latest.new_full((len(rows),), layout.row_length)
        if layout.row_lengths is not None:
            counts = layout.row_lengths.to(latest.dtype)
        past = _last_of_parts(*gather(latest, counts))
        past_here = past if layout.rows is None else past.index_select(0, layout.rows)
        inputs = self.project(hidden, pointer, layout, BankState(None, None, past_here))  # type: ignore[arg-type]
        _, (memory, normalizer) = banked_linear_attention(
            *inputs.operands, chunk_size=self.chunk_size, max_decay=self.max_decay_rate
        )
        memory, normalizer = combine_chunks(*gather(-self.total_decay(inputs), memory, normalizer))
        return BankState(memory, normalizer, past), inputs

    def _gates(self, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Returns read weights, write weights and log decay times write, [n, H, N] each, in `dtype`."""

        def logits(projection: nn.Linear) -> Tensor:
            return projection(hidden).to(dtype).unflatten(-1, (self.num_heads, self.num_banks))

        log_decay = -self.max_decay_rate * logits(self.decay_proj).sigmoid()
        if self.num_banks == 1:
            one = torch.ones_like(log_decay)
            return one, one, log_decay
        write = logits(self.write_proj).softmax(-1)
        return logits(self.read_proj).softmax(-1), write, write * log_decay


def address_memories(pointer: Tensor, bank_weights: Tensor) -> Tensor:
    """Computes the weights of each head's S*N memories: pointer times bank weights, for each level and bank.

    Writes are weighted by the mass that is still on the stack. So the final memory is the sum of the memories
    after each step, weighted by the mass dropped at that step. This is exact without decay. With decay, the
    two differ: decayed to the power p, a memory is not p times the decayed one. At a decay of 1 nat per full
    write, 6 steps and 3 levels, they differ by 19% for one bank and by 2% for four (docs/design.md).

    Args:
        pointer: [n, S]; bank_weights: [n, H, N].

    Returns:
        [n, H, S*N], level by level.
    """
    # [n, 1, S, 1] * [n, H, 1, N] -> [n, H, S, N] -> [n, H, S*N]
    return (pointer[:, None, :, None] * bank_weights.unsqueeze(-2)).flatten(-2)


def _is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of type `kind`, with a plain weight, its own `forward`, and no hooks.

    Adapters replace modules, accelerate replaces the `forward` of modules whose weights it moves, and
    quantised weights have types of their own.
    """
    if type(module) is not kind or type(module.weight) not in (Tensor, nn.Parameter):
        return False
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def _last_of_parts(latest: Tensor, counts: Tensor) -> Tensor:
    """Returns the last c entries [B, c, F] of a sequence that is split into P consecutive parts.

    Args:
        latest: [P, B, c, F], the last c entries of each part, right-aligned. A part that has fewer than c has
            zeros in front of them.
        counts: [P, B], the number of entries of each part. Numbers above c count as c.
    """
    size = latest.shape[2]
    real = torch.arange(size, device=latest.device) >= size - counts.unsqueeze(-1)  # [P, B, c]
    # [P, B, c] -> [B, P c], sorted so that real entries come last, in their order
    order = real.transpose(0, 1).flatten(1).int().argsort(dim=1, stable=True)
    order = order[:, order.shape[1] - size :].unsqueeze(-1).expand(-1, -1, latest.shape[3])  # [B, c, F]
    return latest.transpose(0, 1).flatten(1, 2).gather(1, order)
