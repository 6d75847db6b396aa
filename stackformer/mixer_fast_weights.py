# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Fast weights with an inner loop as a token mixer: a recurrent network that attends to its recent past.

Ba et al. 2016, "Using Fast Weights to Attend to the Recent Past" (arXiv 1610.06258, section 3 and equations
1 and 2). A vector h follows the tokens x. A matrix A, the fast weights, stores the recent h. Each token
settles for S inner steps, in which A pulls h towards the stored vectors that are similar to it:

    given   = W h(t-1) + U x(t)
    h_0     = f(given)
    h_(s+1) = f(LN(given + A(t-1) h_s))       for s = 0 .. S-1, with f = ReLU
    h(t)    = h_S
    A(t)    = decay A(t-1) + rate h(t) h(t)^T

h(t) depends on h(t-1), so tokens are computed one after another. Unlike attention, the cell can track state.
Inside a chunk of tokens, A is not computed. A product with A is attention without a softmax to the vectors of
the chunk, plus a product with the matrix at the start of the chunk (the paper's section 3.1, in chunks):

    A(t-1) g = decay^j A_0 g + rate sum_(i<j) decay^(j-1-i) h_i (h_i . g)     for token j of the chunk

So a backward pass keeps one matrix for each chunk, instead of one for each token. The stack pointer is not
used.

Letters: B' rows, T' time, d core width, C tokens of a chunk, S inner steps, n active tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_stackformer import StackformerConfig
from .dtypes import at_least_float32
from .layers_stackformer import ResidualProjection
from .mixer import Mixer
from .state import StateSpec, TensorSpec
from .token_layout import TokenLayout

DEFAULT_CHUNK_SIZE = 32


class FastWeightsState(NamedTuple):
    """The state of [`FastWeights`], float32 at least."""

    vector: Tensor  # [B', d], h after the last token
    fast_weights: Tensor  # [B', d, d], A, which holds this h already


class RecurrentProjection(nn.Linear):
    """The projection W of h(t-1) onto h(t). It starts as 0.05 times the identity, as in the paper."""

    INITIAL = 0.05

    def __init__(self, size: int):
        super().__init__(size, size, bias=False)

    def initial_weight(self) -> Tensor:
        """Returns the initial weight [d, d]."""
        return self.INITIAL * torch.eye(self.in_features)


class FastWeights(Mixer):
    """A recurrent network whose vector settles in the fast weights that the vectors before have left."""

    state_type = FastWeightsState

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.size = size
        self.num_inner_steps = config.fast_weights_steps
        self.decay = config.fast_weights_decay
        self.rate = config.fast_weights_rate
        self.chunk_size = config.chunk_size or DEFAULT_CHUNK_SIZE
        self.in_proj = nn.Linear(size, size, bias=False)
        self.recurrent_proj = RecurrentProjection(size)
        self.norm = nn.LayerNorm(size, eps=config.rms_norm_eps)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """Specifies the vector and the fast weights."""
        return TensorSpec("vector", (self.size,)), TensorSpec("fast_weights", (self.size, self.size))

    def project(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: FastWeightsState | None
    ) -> Tensor:
        """Computes U x, as rows [B', T', d]. The pointer is not used."""
        return layout.to_rows(self.in_proj(hidden))

    def mix(
        self, hidden: Tensor, inputs: Tensor, layout: TokenLayout, state: FastWeightsState | None
    ) -> tuple[Tensor, FastWeightsState, None]:
        """Runs the recurrence over the tokens. Vector and fast weights are zeros at the beginning."""
        dtype = at_least_float32(inputs)
        if state is None:
            vector = inputs.new_zeros(len(inputs), self.size, dtype=dtype)
            matrix = inputs.new_zeros(len(inputs), self.size, self.size, dtype=dtype)
        else:
            vector, matrix = state.vector.to(dtype), state.fast_weights.to(dtype)
        vectors = []
        with torch.autocast(inputs.device.type, enabled=False):
            for start in range(0, inputs.shape[1], self.chunk_size):
                chunk = inputs[:, start : start + self.chunk_size]
                counts = count_tokens(layout.row_lengths, start, chunk.shape[1])
                part = self._settle_chunk(chunk, vector, matrix)
                vectors.append(part)
                vector = last_vector(part, vector, counts)
                matrix = add_outer_products(matrix, part, part, counts, self.decay, self.rate)
        mixed = layout.to_tokens(torch.cat(vectors, dim=1)).to(hidden.dtype)
        return self.o_proj(mixed), FastWeightsState(vector, matrix), None

    def _settle_chunk(self, chunk: Tensor, vector: Tensor, matrix: Tensor) -> Tensor:
        """Computes the vectors h [B', C, d] of a chunk from its terms U x [B', C, d].

        Args:
            vector: [B', d], h before the chunk; matrix: [B', d, d], A before the chunk.
        """
        weight = self.norm.weight.dtype  # of the projections, which a cast model computes in
        decays = decay_powers(self.decay, chunk.shape[1], matrix)  # [C], of the oldest token first
        settled: list[Tensor] = []
        for place, drive in enumerate(chunk.to(weight).unbind(1)):
            given = (self.recurrent_proj(vector.to(weight)) + drive).to(matrix.dtype)
            vector = given.relu()
            past = torch.stack(settled, dim=1) if settled else None  # [B', place, d]
            for _ in range(self.num_inner_steps):
                pull = self.decay**place * _times(matrix, vector)
                if past is not None:
                    similar = decays[len(decays) - place :] * _times(past, vector)  # [B', place]
                    pull = pull + self.rate * _times(past.mT, similar)
                vector = self.norm((given + pull).to(weight)).to(matrix.dtype).relu()
            settled.append(vector)
        return torch.stack(settled, dim=1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Returns the products [B', M] of matrices [B', M, N] and vectors [B', N]."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def count_tokens(row_lengths: Tensor | None, start: int, size: int) -> Tensor | None:
    """Returns the number of tokens [B'] that each row has in a chunk; `None` if all slots hold tokens.

    Args:
        row_lengths: [B'], as in [`TokenLayout`].
        start: the place of the chunk in the rows; size: its number C of slots.
    """
    return None if row_lengths is None else (row_lengths - start).clamp(min=0, max=size)


def last_vector(vectors: Tensor, before: Tensor, counts: Tensor | None) -> Tensor:
    """Returns the last [B', d] of the first `counts` [B'] vectors [B', C, d]; `before` if there is none."""
    if counts is None:
        return vectors[:, -1]
    index = counts.view(-1, 1, 1).expand(-1, 1, vectors.shape[2])
    return torch.cat([before.unsqueeze(1), vectors], dim=1).gather(1, index).squeeze(1)


def decay_powers(decay: float, count: int, like: Tensor) -> Tensor:
    """Returns decay^(count - 1), ..., decay, 1 as a tensor [count] like `like`."""
    exponents = torch.arange(count - 1, -1, -1, device=like.device, dtype=like.dtype)
    return decay**exponents


def add_outer_products(
    matrix: Tensor, left: Tensor, right: Tensor, counts: Tensor | None, decay: float, rate: float
) -> Tensor:
    """Returns the matrix after M <- decay M + rate l r^T for the first `counts` tokens of each row.

    Args:
        matrix: [..., K, V], the matrix M before, of rows [B', ...].
        left: [..., C, K], the vectors l; right: [..., C, V], the vectors r.
        counts: [B'], the number of tokens of each row; `None` if all have C.
        decay: above 0, at most 1; rate: at least 0.
    """
    if counts is None:
        kept: Tensor | float = decay ** left.shape[-2]
        decays = decay_powers(decay, left.shape[-2], matrix)
    else:
        later = counts.unsqueeze(-1) - 1 - torch.arange(left.shape[-2], device=left.device)  # [B', C]
        decays = torch.where(later >= 0, decay ** later.clamp(min=0).to(matrix.dtype), 0)
        decays = decays.view(len(counts), *(1,) * (left.dim() - 3), -1)  # [B', ..., C]
        kept = (decay ** counts.to(matrix.dtype)).view(-1, *(1,) * (matrix.dim() - 1))
    return kept * matrix + rate * (left * decays.unsqueeze(-1)).mT @ right


__all__ = [
    "FastWeights",
    "RecurrentProjection",
    "add_outer_products",
    "count_tokens",
    "decay_powers",
    "last_vector",
]
