# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The infinity-former as a token mixer: sliding-window attention plus attention to a continuous memory.

Martins et al. 2022, "infinity-former: Infinite Memory Transformer". The long-term memory of a row is a signal
on [0, 1], with the oldest tokens on the left. It is a sum of Gaussian radial basis functions:
x(t) = B^T psi(t), with psi_j(t) = N(t; c_j, s_j^2) (equation 3). A ridge regression gives its coefficients B
(equation 4), and tokens attend to it with Gaussian densities (equations 7 to 11).

The memory has a fixed size. After each block of tokens, the old signal is sampled and contracted to [0, tau],
the block takes [tau, 1], and both are fitted again (section 3.2). The samples are uniform, or dense where
tokens attended most ("sticky memories", section 3.3). The training loss may penalise wide densities
(`divergence_from_prior`).

Letters: n active tokens, B' rows, T' tokens of a row in one call, d core width, H heads, K head size, N basis
functions, C tokens of a block.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_stackformer import StackformerConfig
from .dtypes import at_least_float32
from .layers_stackformer import ResidualProjection, apply_linear
from .mixer import Mixed, Mixer
from .mixer_attention import Attention, AttentionState
from .state import State, StateSpec, TensorSpec
from .token_layout import ChunkGrid, TokenLayout

# The fraction of sticky samples that is always uniform. Different splits of a text into calls change the
# histogram by rounding errors. This fraction bounds how far they move a sample (20 times the error).
UNIFORM_SHARE = 0.05


class ContinuousState(NamedTuple):
    """The state of [`ContinuousAttention`]: that of [`Attention`], then the memory, float32 at least."""

    key: Tensor  # as in `AttentionState`
    value: Tensor
    seen: Tensor
    coefficients: Tensor  # [B', N, d], of the memory
    pending: Tensor  # [B', C - 1, d], the tokens of an unfinished block, with zeros behind them
    looked: Tensor | None = None  # [B', N], for sticky memories: the attention to each part of [0, 1]


class ContinuousAttention(Mixer):
    """Sliding-window attention plus continuous attention to a long-term memory. The state has a fixed size.

    The memory takes in whole blocks of `memory_block` tokens, counted from the beginning of the row. A token
    sees the memory of the blocks before its own, and through the window all of its own block and more. Unlike
    in the paper, gradients flow through the memory.

    With `density_loss_coef` above 0, `forward` returns in training a loss for each token [n] as its third
    result: the divergence of the token's densities from the prior, summed over heads.
    """

    state_type = ContinuousState

    def __init__(self, config: StackformerConfig):
        super().__init__()
        if config.sliding_window is None or config.sliding_window < config.memory_block:
            raise ValueError(
                "`sliding_window` must be at least the `memory_block` of continuous attention, "
                f"{config.memory_block}, so that no token is out of sight before the memory has it, got "
                f"{config.sliding_window}"
            )
        self.num_heads = config.num_attention_heads
        self.head_dim = config.core_size // config.num_attention_heads
        self.block = config.memory_block
        self.sticky = config.sticky_memories
        self.num_basis = config.num_basis_functions
        self.has_loss = config.density_loss_coef > 0
        self.prior_mean, self.prior_width = config.density_prior_mean, config.density_prior_width
        self.fit = (
            config.num_basis_functions,
            tuple(config.basis_widths),
            config.memory_block,
            config.memory_contraction,
            config.memory_ridge,
        )

        size = config.core_size
        self.short_term = Attention(config)
        self.smooth = nn.Conv1d(size, size, kernel_size=3, padding=1)
        self.q_proj = nn.Linear(size, size, bias=False)
        self.kv_proj = nn.Linear(size, 2 * size, bias=False)
        self.density_proj = nn.Linear(self.num_basis, 2)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """Specifies the state of attention, then the other fields of `ContinuousState`."""
        size = self.kv_proj.in_features
        own = [
            TensorSpec("coefficients", (self.num_basis, size)),
            TensorSpec("pending", (self.block - 1, size)),
        ]
        if self.sticky:
            own.append(TensorSpec("looked", (self.num_basis,)))
        return *self.short_term.state_spec(), *own

    def forward(
        self,
        hidden: Tensor,
        pointer: Tensor,
        layout: TokenLayout,
        state: ContinuousState | None = None,
        inputs: None = None,
        in_place: bool = False,
    ) -> Mixed:
        """See [`Mixer.forward`]. The pointer is not used."""
        past = None if state is None else AttentionState(state.key, state.value, state.seen)
        short, recent, _ = self.short_term(hidden, pointer, layout, past)
        seen = torch.zeros_like(recent[2]) if state is None else state.seen
        grid = ChunkGrid.of(seen, layout, self.block, fresh=state is None)
        # A compiled graph must not depend on values. Otherwise, the memory is updated only for full blocks.
        updates = grid.num_chunks if torch.compiler.is_compiling() else int(grid.ended.max()) // self.block

        dtype = at_least_float32(hidden)
        rows = layout.to_rows(hidden).to(dtype)
        if state is None:
            memory, pending = rows.new_zeros(len(rows), self.num_basis, rows.shape[2]), None
        else:
            memory, pending = state.coefficients.to(dtype), state.pending.to(dtype)
        looked = None if state is None else state.looked
        if looked is None:
            looked = rows.new_zeros(len(rows), self.num_basis)
        tokens = grid.place(rows, pending)
        query = grid.to_chunks(layout.to_rows(self.q_proj(hidden)))  # [B', num_chunks, width, d]

        parts, losses = [], []
        for number in range(grid.num_chunks):
            mixed, mean, variance = self._attend(query[:, number], memory)
            parts.append(mixed)
            if self.has_loss and self.training:
                losses.append(divergence_from_prior(mean, variance, self.prior_mean, self.prior_width).sum(1))
            if self.sticky:
                masses = bin_masses(mean.detach(), variance.detach(), self.num_basis).sum(1)
                looked = looked + masses.masked_fill(~grid.real[:, number].unsqueeze(-1), 0.0).sum(1)
            if number < updates:
                full = grid.full[:, number].view(-1, 1, 1)
                block = tokens[:, number * self.block : (number + 1) * self.block]
                first = (seen < self.block).view(-1, 1, 1) if number == 0 else None
                memory = torch.where(full, self._update(memory, block, looked, first, hidden.dtype), memory)
                looked = looked.masked_fill(full.squeeze(-1), 0)
        # num_chunks times [B', width, d] -> [B', num_chunks, width, d] -> [B', T', d] -> [n, d]
        mixed = layout.to_tokens(grid.to_rows(torch.stack(parts, dim=1)))
        kept = (memory, grid.pending(tokens), looked if self.sticky else None)
        after: State = ContinuousState(*recent, *kept)  # type: ignore[arg-type,assignment,call-arg]
        loss = layout.to_tokens(grid.to_rows(torch.stack(losses, dim=1))) if losses else None  # [n]
        return short + self.o_proj(mixed), after, loss

    def densities(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the densities on [0, 1] with which queries [..., T', K] attend, from keys [..., N, K].

        Returns:
            Means and variances [..., T'], float32 at least.
        """
        scores = query @ key.mT * self.head_dim**-0.5
        mean, variance = apply_linear(self.density_proj, scores).to(at_least_float32(scores)).unbind(-1)
        return mean.sigmoid(), nn.functional.softplus(variance)

    def _attend(self, query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attends to the memory [B', N, d] with queries [B', T', d].

        Returns:
            Values [B', T', d], and means and variances [B', H, T'] of the densities.
        """
        heads = (-1, self.num_heads, self.head_dim)
        # [B', N, 2 d] -> [B', N, d] -> [B', N, H, K] -> [B', H, N, K]
        key, value = (
            x.unflatten(-1, heads[1:]).transpose(1, 2)
            for x in self.kv_proj(memory.to(query.dtype)).chunk(2, dim=-1)
        )
        mean, variance = self.densities(query.unflatten(-1, heads[1:]).transpose(1, 2), key)
        centres, widths = radial_basis(self.num_basis, self.fit[1], mean)
        weights = expected_basis(mean, variance, centres, widths)  # [B', H, T', N]
        return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2), mean, variance

    def _update(
        self, memory: Tensor, block: Tensor, looked: Tensor, first: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Returns the memory [B', N, d] after a block [B', C, d] of tokens.

        Args:
            looked: [B', N], for sticky memories, the histogram that determines where the old signal is
                sampled.
            first: [B', 1, 1], marks rows without an old signal; `None` if there are none.
            dtype: of the activations, in which the block is smoothed.
        """
        smoothed = block.to(dtype).mT
        smoothed = (self.smooth(smoothed).sigmoid() * smoothed).mT.to(memory.dtype)
        with torch.autocast(memory.device.type, enabled=False):
            fit = memory_fit(*self.fit, memory.dtype, memory.device)
            if self.sticky:
                centres, widths = radial_basis(self.num_basis, self.fit[1], memory)
                samples = basis_values(quantiles(looked, self.num_basis), centres, widths) @ memory
                old = fit.samples @ samples
            else:
                old = fit.contraction @ memory
            updated = old + fit.later_block @ smoothed
            return updated if first is None else torch.where(first, fit.first_block @ smoothed, updated)


class MemoryFit(NamedTuple):
    """Matrices that compute the coefficients of a memory. Each is a part of a ridge regression."""

    first_block: Tensor  # [N, C], for a block that takes all of [0, 1]
    later_block: Tensor  # [N, C], for a block that takes [tau, 1]
    samples: Tensor  # [N, N], for the samples of the old signal, in [0, tau]
    contraction: Tensor  # [N, N], maps old coefficients to new ones, with uniform samples


@torch.compiler.assume_constant_result
def memory_fit(
    num_basis: int,
    widths: tuple[float, ...],
    block: int,
    contraction: float,
    ridge: float,
    dtype: torch.dtype,
    device: torch.device,
) -> MemoryFit:
    """Returns the matrices for a memory of these sizes, computed once in float64 and cached.

    They are not buffers of the module, because buffers would be rounded together with the weights.
    """
    return _memory_fit(num_basis, widths, block, contraction, ridge, dtype, device)


@lru_cache(maxsize=32)
def _memory_fit(num_basis, widths, block, contraction, ridge, dtype, device) -> MemoryFit:
    """Computes the result of `memory_fit`."""
    with torch.inference_mode(False), torch.no_grad():
        basis = radial_basis(num_basis, widths, torch.zeros((), dtype=torch.float64))
        samples, tokens = uniform_positions(num_basis), uniform_positions(block)
        squeezed = torch.cat([contraction * samples, contraction + (1 - contraction) * tokens])
        of_samples, later_block = ridge_regression(squeezed, *basis, ridge).split([num_basis, block], dim=1)
        matrices = (
            ridge_regression(tokens, *basis, ridge),
            later_block,
            of_samples,
            of_samples @ basis_values(samples, *basis),
        )
        return MemoryFit(*(matrix.contiguous().to(device, dtype) for matrix in matrices))


def uniform_positions(count: int) -> Tensor:
    """Returns the centres of `count` equal parts of [0, 1], float64 [count]."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def radial_basis(num_basis: int, widths: tuple[float, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns centres and widths [N] of basis functions: all widths at each of N / len(widths) centres."""
    centres = torch.linspace(0, 1, num_basis // len(widths), dtype=like.dtype, device=like.device)
    of_each = torch.tensor(widths, dtype=like.dtype, device=like.device)
    return centres.repeat_interleave(len(widths)), of_each.repeat(num_basis // len(widths))


def gaussian(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Returns the normal density at `x`."""
    return torch.exp(-((x - mean) ** 2) / (2 * variance)) / (2 * math.pi * variance).sqrt()


def basis_values(positions: Tensor, centres: Tensor, widths: Tensor) -> Tensor:
    """Returns psi_j(t) [..., N] at positions t [...]."""
    return gaussian(positions.unsqueeze(-1), centres, widths**2)


def expected_basis(mean: Tensor, variance: Tensor, centres: Tensor, widths: Tensor) -> Tensor:
    """Returns E[psi_j(t)] [..., N] under normal densities of `mean` and `variance` [...].

    The product of two Gaussians integrates to a third: N(mean; c_j, variance + s_j^2) (equation 10).
    """
    return gaussian(mean.unsqueeze(-1), centres, variance.unsqueeze(-1) + widths**2)


def divergence_from_prior(
    mean: Tensor, variance: Tensor, prior_mean: float | None, prior_width: float
) -> Tensor:
    """Returns the divergence of normal densities N(mean, variance) from a prior, in nats, shaped as `mean`.

    KL(N(mu, s^2) || N(mu_0, s_0^2)) = (s^2 / s_0^2 - log(s^2 / s_0^2) - 1 + (mu - mu_0)^2 / s_0^2) / 2, the
    regulariser of Martins et al. 2022 (arXiv 2109.00301). It keeps the densities from becoming uniform.

    Args:
        mean, variance: of any one shape.
        prior_mean: mu_0. If `None`, it is `mean`: the last term is 0, and `mean` gets no gradient.
        prior_width: s_0, above 0.
    """
    ratio = (variance / prior_width**2).clamp(min=torch.finfo(variance.dtype).tiny)
    divergence = (ratio - ratio.log() - 1) / 2
    if prior_mean is None:
        return divergence
    return divergence + ((mean - prior_mean) / prior_width).square() / 2


def ridge_regression(positions: Tensor, centres: Tensor, widths: Tensor, ridge: float) -> Tensor:
    """Returns the matrix G [N, T] that maps a signal's values [T, d] at `positions` [T] to coefficients.

    G = (F F^T + ridge I)^-1 F with F = psi(positions) (equation 4). As in the authors' code, the signal is
    also fitted to 0 at T / 2 positions on either side of [0, 1].
    """
    outside = uniform_positions(len(positions)).to(positions) - 0.5
    outside = torch.where(outside < 0, outside, outside + 1)
    values = basis_values(torch.cat([positions, outside]), centres, widths).mT
    gram = values @ values.mT + ridge * torch.eye(len(values), dtype=values.dtype, device=values.device)
    return torch.linalg.solve(gram, values[:, : len(positions)])


def bin_masses(mean: Tensor, variance: Tensor, num_bins: int) -> Tensor:
    """Returns the mass [..., num_bins] of normal densities [...] in `num_bins` equal parts of [0, 1]."""
    edges = torch.linspace(0, 1, num_bins + 1, dtype=mean.dtype, device=mean.device)
    deviation = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt().unsqueeze(-1)
    return torch.special.ndtr((edges - mean.unsqueeze(-1)) / deviation).diff(dim=-1)


def quantiles(histogram: Tensor, count: int) -> Tensor:
    """Returns `count` positions [..., count] in [0, 1], distributed as a histogram [..., bins].

    They are the quantiles of the histogram at `uniform_positions`, so they are the same in every call, unlike
    random samples. The histogram is mixed with a uniform one (`UNIFORM_SHARE`), which alone remains if it is
    empty.
    """
    bins = histogram.shape[-1]
    total = histogram.sum(-1, keepdim=True).clamp(min=torch.finfo(histogram.dtype).tiny)
    density = (1 - UNIFORM_SHARE) * histogram / total + UNIFORM_SHARE / bins
    density = density / density.sum(-1, keepdim=True)
    after = density.cumsum(-1)
    levels = uniform_positions(count).to(histogram).expand(*histogram.shape[:-1], count).contiguous()
    number = torch.searchsorted(after, levels).clamp(max=bins - 1)
    begins, mass = (after - density).gather(-1, number), density.gather(-1, number)
    return (number + (levels - begins) / mass) / bins


__all__ = ["ContinuousAttention"]
