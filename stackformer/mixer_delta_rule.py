# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The delta rule as a token mixer: each token corrects the value that fast weights hold for its key.

Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers" (arXiv 2102.11174). Each head
has fast weights S [K, V]. For each token, S decays by a factor a, then predicts the value of the token's key,
and is changed by a fraction b of the error (Yang et al. 2024, "Gated Delta Networks", arXiv 2412.06464; a = 1
is the plain delta rule):

    S_t = a_t S_(t-1) + k_t u_t^T,    u_t = b_t (v_t - a_t S_(t-1)^T k_t),    y_t = S_t^T q_t

Fast weights that add without correcting are banked linear attention with one bank
(configs/fast-weights-tiny.json).

Letters: n active tokens, B' rows, T' tokens of a row, d core width, H heads, K key size, V value size, C
tokens of a chunk.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_stackformer import StackformerConfig
from .dtypes import at_least_float32
from .fused_ops import RMSNorm, swish_gate
from .implementation import can_look_at
from .layers_stackformer import ResidualProjection, ShortConvolution, convolve, past_spec
from .mixer import Mixer
from .state import StateSpec, TensorSpec
from .token_layout import TokenLayout


class DeltaRuleState(NamedTuple):
    """The state of [`DeltaRule`], float32 at least."""

    fast_weights: Tensor  # [B', H, K, V]
    past: Tensor  # [B', kernel - 1, 3 d], the last inputs of the convolution


class DeltaRuleInputs(NamedTuple):
    """The inputs of the recurrence."""

    # From query to log decay: the first arguments of `delta_rule`.
    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    past: Tensor  # [B', kernel - 1, 3 d], of the convolution, after these tokens


class DeltaRule(Mixer):
    """Fast weights with normalised keys and queries, after a short convolution and SiLU: Gated DeltaNet."""

    state_type = DeltaRuleState

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.num_heads = config.num_attention_heads
        self.head_dim = size // self.num_heads
        self.max_decay_rate = config.max_decay_rate
        self.chunk_size = config.chunk_size
        self.qkv_proj = nn.Linear(size, 3 * size, bias=False)
        self.kernel_size = config.conv_kernel_size
        self.conv = ShortConvolution.of(3 * size, self.kernel_size)
        self.past_spec = past_spec(self.kernel_size, 3 * size)
        self.write_proj = nn.Linear(size, self.num_heads)
        self.decay_proj = nn.Linear(size, self.num_heads)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """Specifies the fast weights, and the last inputs of the convolution."""
        fast_weights = TensorSpec("fast_weights", (self.num_heads, self.head_dim, self.head_dim))
        return fast_weights, self.past_spec

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: DeltaRuleState | None
    ) -> DeltaRuleInputs:
        """Computes the inputs of the recurrence. The pointer is not used."""
        dtype = at_least_float32(hidden)
        write = self.write_proj(hidden).to(dtype).sigmoid()
        log_decay = -self.max_decay_rate * self.decay_proj(hidden).to(dtype).sigmoid()
        if layout.thinking is not None:  # the other tokens are computed, but must not change the weights
            thinking = layout.thinking.unsqueeze(1)
            write, log_decay = write * thinking, log_decay * thinking
        rows, write, log_decay = layout.to_rows(self.qkv_proj(hidden), write, log_decay)
        rows, past = convolve(
            self.conv, self.kernel_size, rows, None if state is None else state.past, layout
        )
        # [B', T', 3 d] -> [B', T', H, K] three times
        rows = nn.functional.silu(rows).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = rows.unbind(2)
        query = nn.functional.normalize(query.to(dtype), dim=-1)
        key = nn.functional.normalize(key.to(dtype), dim=-1)
        return DeltaRuleInputs((query, key, value, write, log_decay), past)

    def mix(
        self, hidden: Tensor, inputs: DeltaRuleInputs, layout: TokenLayout, state: DeltaRuleState | None
    ) -> tuple[Tensor, DeltaRuleState, None]:
        """Corrects and then reads the fast weights, in the order of the tokens."""
        before = None if state is None else state.fast_weights
        mixed, fast_weights = delta_rule(*inputs.operands, before, self.chunk_size)
        mixed = self.norm(layout.to_tokens(mixed)).flatten(1)  # [n, H, V] -> [n, d]
        output = self.o_proj(swish_gate(self.gate_proj(hidden), mixed))
        return output, DeltaRuleState(fast_weights, inputs.past), None


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes and reads T tokens, chunk by chunk. For chunks of one token, it is the recurrence itself.

    Let a chunk start with S, and let g be the cumulated products of a in the chunk. The changes U [C, V]
    solve a triangular system (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over
    Sequence Length", arXiv 2406.06484, the UT transform; here with decay):

        (1 + tril(diag(b) (K K^T * G), -1)) U = diag(b) (V - diag(g) K S),    G_ij = g_i / g_j for j <= i

    U is linear in S. So the systems of all chunks are solved at once, for V and for diag(g) K. Only two small
    products remain to be computed one chunk after another.

    Args:
        query, key: [B, T, H, K]. If |key| > 1, the state may grow without bound.
        value: [B, T, H, V].
        write: [B, T, H], b in [0, 1]; log_decay: [B, T, H], log a <= 0. A token for which both are zero does
            not change the state.
        initial_state: [B, H, K, V]; zeros if `None`.
        chunk_size: C; it changes the speed, not the results. 32 if `None`.

    Returns:
        The output [B, T, H, V] in the dtype of `value`, and the final state [B, H, K, V], float32 at least. A
        token that is NaN does not change the outputs before it, or, on a GPU and in compiled graphs, those
        before its chunk.

    Raises:
        ValueError: if `chunk_size` is not positive.
    """
    tokens = (query, key, value, write, log_decay)
    chunk_size = 32 if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    dtype, output_dtype = at_least_float32(query), value.dtype
    length, size = query.shape[1], min(chunk_size, query.shape[1])

    def chunks(tokens: Tensor) -> Tensor:
        """Maps [B, T, H, ...] to [B, H, chunks, C, ...], padded at the end with tokens without effect."""
        padding = (0, 0) * (tokens.dim() - 2) + (0, -length % size)
        padded = nn.functional.pad(tokens.to(dtype), padding)
        return padded.unflatten(1, (-1, size)).movedim(
            3, 1
        )  # [B, chunks, C, H, ...] -> [B, H, chunks, C, ...]

    with torch.autocast(query.device.type, enabled=False):
        query, key, value, write, log_decay = map(chunks, (query, key, value, write, log_decay))
        total = log_decay.cumsum(-1)
        future = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
        # G, [B, H, chunks, C, C]
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
        since_start, write = total.exp().unsqueeze(-1), write.unsqueeze(-1)
        changes, corrections = torch.linalg.solve_triangular(
            write * decay * (key @ key.mT),  # the solver reads only the part below the diagonal
            write * torch.cat([value, since_start * key], dim=-1),
            upper=False,
            unitriangular=True,
        ).split([value.shape[-1], key.shape[-1]], dim=-1)
        until_end = decay[..., -1, :].unsqueeze(-1) * key
        if initial_state is None:
            initial_state = value.new_zeros(*value.shape[:2], key.shape[-1], value.shape[-1])
        state, starts, written = initial_state.to(dtype), [], []
        for change, correction, end, kept in zip(
            changes.unbind(2), corrections.unbind(2), until_end.unbind(2), since_start.unbind(2), strict=True
        ):
            starts.append(state)
            written.append(change - correction @ state)
            state = kept[..., -1:, :] * state + end.mT @ written[-1]
        if size > 1 and can_look_at(state) and not math.isfinite(state.detach().sum()):
            # The products below multiply later tokens by 0, and 0 * NaN is NaN. Chunks of one token do not.
            return delta_rule(*tokens, initial_state, chunk_size=1)
        output = since_start * (query @ torch.stack(starts, dim=2))
        output = output + (decay * (query @ key.mT)) @ torch.stack(written, dim=2)
        # [B, H, chunks, C, V] -> [B, chunks, C, H, V] -> [B, T, H, V]
        return output.movedim(1, 3).flatten(1, 2)[:, :length].to(output_dtype), state


__all__ = ["DeltaRule", "delta_rule"]
