# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Fixed-size attention as a token mixer: one symmetric matrix per head represents all tokens.

De Brebisson and Vincent 2016, "A Cheap Linear Attention Mechanism with Fast Lookups and Fixed-Size
Representations" (arXiv 1609.05866). Softmax attention reads H^T softmax(H q) from the vectors H [T, k] of a
text. Without the softmax, H^T H q = C q needs only the matrix C = sum_t h_t h_t^T. The gated form chooses the
features to write:

    f_t = sigmoid(W h_t + b) * h_t,    C_t = decay C_(t-1) + rate f_t f_t^T,    y_t = C_t q_t

Banked linear attention with one bank differs in three ways: its keys are not its values, features are
non-negative, and a normalizer divides what is read. Here, C is symmetric and nothing is divided. In the
paper, the h_t are states of a recurrent network over a document, and another network asks about it. In a
language model, h_t and q_t come from a short convolution over the tokens, and every token asks.

Letters: n active tokens, B' rows, T' tokens of a row, d core width, H heads, K head size. In the functions
below, C is the number of tokens of a chunk.
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
from .mixer_fast_weights import add_outer_products, count_tokens, decay_powers
from .state import State, StateSpec, TensorSpec
from .token_layout import TokenLayout

DEFAULT_CHUNK_SIZE = 64


class FixedSizeState(NamedTuple):
    """The state of [`FixedSizeAttention`], float32 at least."""

    matrix: Tensor  # [B', H, K, K], C
    past: Tensor  # [B', kernel - 1, 2 d], the last inputs of the convolution


class FixedSizeInputs(NamedTuple):
    """The inputs of the recurrence."""

    query: Tensor  # [B', T', H, K]
    feature: Tensor  # [B', T', H, K], f
    counts: Tensor | None  # [B'], the number of tokens of each row; None if all have T'
    past: Tensor  # [B', kernel - 1, 2 d], of the convolution, after these tokens


class FixedSizeAttention(Mixer):
    """Gated fixed-size attention. `num_attention_heads` 1 is the paper's single matrix."""

    state_type = FixedSizeState
    num_reversible = 1  # the matrix; the past of the convolution is stored

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.num_heads = config.num_attention_heads
        self.head_dim = size // self.num_heads
        self.decay = config.fast_weights_decay
        self.rate = config.fast_weights_rate
        self.chunk_size = config.chunk_size or DEFAULT_CHUNK_SIZE
        self.qh_proj = nn.Linear(size, 2 * size, bias=False)
        self.kernel_size = config.conv_kernel_size
        self.conv = ShortConvolution.of(2 * size, self.kernel_size)
        self.past_spec = past_spec(self.kernel_size, 2 * size)
        self.feature_proj = nn.Linear(size, size)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """Specifies the matrices, and the last inputs of the convolution."""
        return TensorSpec("matrix", (self.num_heads, self.head_dim, self.head_dim)), self.past_spec

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: FixedSizeState | None
    ) -> FixedSizeInputs:
        """Computes queries and features. Of `state`, only `past` is read. The pointer is not used."""
        rows, past = convolve(
            self.conv,
            self.kernel_size,
            layout.to_rows(self.qh_proj(hidden)),
            None if state is None else state.past,
            layout,
        )
        query, vector = rows.chunk(2, dim=-1)  # [B', T', d] each
        feature = self.feature_proj(vector).sigmoid() * vector
        query, feature = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (query, feature))
        return FixedSizeInputs(query, feature, layout.row_lengths, past)

    def mix(
        self, hidden: Tensor, inputs: FixedSizeInputs, layout: TokenLayout, state: FixedSizeState | None
    ) -> tuple[Tensor, FixedSizeState, None]:
        """Writes and then reads the matrix, in the order of the tokens. It is zeros at the beginning."""
        query, feature, counts, past = inputs
        before = None if state is None else state.matrix
        mixed, matrix = fixed_size_attention(
            query, feature, self.decay, self.rate, before, counts, self.chunk_size
        )
        mixed = self.norm(layout.to_tokens(mixed)).flatten(1)  # [n, H, K] -> [n, d]
        return self.o_proj(swish_gate(self.gate_proj(hidden), mixed)), FixedSizeState(matrix, past), None

    def total_decay(self, inputs: FixedSizeInputs) -> Tensor:
        """See [`Mixer.total_decay`]: [B', H]."""
        counts = _counts(inputs).to(at_least_float32(inputs.feature))
        return (counts * -math.log(self.decay)).unsqueeze(-1).expand(-1, self.num_heads)

    def reverse(self, inputs: FixedSizeInputs, state: State) -> State:
        """See [`Mixer.reverse`]: C before is what is left of C without the tokens' writes, undecayed.

        The paper undoes the writes in the same way, instead of storing a matrix for each token.
        """
        matrix, counts = state[0], _counts(inputs)
        feature = inputs.feature.to(matrix.dtype).transpose(1, 2)  # [B', H, T', K]
        with torch.autocast(matrix.device.type, enabled=False):
            writes = add_outer_products(
                torch.zeros_like(matrix), feature, feature, counts, self.decay, self.rate
            )
        growth = self.decay ** -counts.to(matrix.dtype)
        return (growth.view(-1, 1, 1, 1) * (matrix - writes),)


def _counts(inputs: FixedSizeInputs) -> Tensor:
    """Returns the number of tokens [B'] of each row."""
    if inputs.counts is not None:
        return inputs.counts
    rows, length = inputs.feature.shape[:2]
    return torch.full((rows,), length, device=inputs.feature.device)


def fixed_size_attention(
    query: Tensor,
    feature: Tensor,
    decay: float = 1.0,
    rate: float = 1.0,
    initial_state: Tensor | None = None,
    counts: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Computes C_t = decay C_(t-1) + rate f_t f_t^T and y_t = C_t q_t, chunk by chunk.

    For token i of a chunk that starts with C_0: y_i = decay^(i+1) C_0 q_i + rate sum_(j<=i) decay^(i-j)
    f_j (f_j . q_i).

    Args:
        query, feature: [B, T, H, K].
        decay: above 0, at most 1, per token; rate: at least 0.
        initial_state: [B, H, K, K]; zeros if `None`.
        counts: [B], the number of tokens of each row. Later slots write nothing. `None` if all have T.
        chunk_size: tokens per chunk. It changes the speed, not the results.

    Returns:
        The outputs [B, T, H, K] in the dtype of `feature`, and the last C [B, H, K, K], float32 at least.

    Raises:
        ValueError: if `chunk_size` is below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    dtype, length = at_least_float32(feature), feature.shape[1]
    size = feature.shape[-1]
    if initial_state is None:
        initial_state = feature.new_zeros(len(feature), feature.shape[2], size, size)
    matrix, outputs = initial_state.to(dtype), []
    queries, features = (x.to(dtype).transpose(1, 2) for x in (query, feature))  # [B, H, T, K]
    with torch.autocast(feature.device.type, enabled=False):
        for start in range(0, length, chunk_size):
            q, f = (x[:, :, start : start + chunk_size] for x in (queries, features))
            place = torch.arange(q.shape[2], device=q.device, dtype=dtype)
            since = place.unsqueeze(-1) - place  # [C, C], i - j
            weights = torch.where(since >= 0, rate * decay ** since.clamp(min=0), 0)
            kept = decay * decay_powers(decay, q.shape[2], q).flip(0).unsqueeze(-1)  # [C, 1]: decay^(i + 1)
            outputs.append(kept * (q @ matrix.mT) + (weights * (q @ f.mT)) @ f)
            here = count_tokens(counts, start, q.shape[2])
            matrix = add_outer_products(matrix, f, f, here, decay, rate)
        if min(length, chunk_size) > 1 and can_look_at(matrix) and not math.isfinite(matrix.detach().sum()):
            # The products above multiply later tokens by 0, and 0 * NaN is NaN. Chunks of one token do not.
            return fixed_size_attention(query, feature, decay, rate, initial_state, counts, chunk_size=1)
        return torch.cat(outputs, dim=2).transpose(1, 2).to(feature.dtype), matrix


__all__ = ["FixedSizeAttention", "fixed_size_attention"]
