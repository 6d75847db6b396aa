# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Small layers that the core and its mixers share; a type of its own gets an initial value of its own."""

import torch
from torch import Tensor, nn

from .dtypes import at_least_float32
from .fused_ops import RMSNorm, depthwise_convolution
from .state import TensorSpec
from .token_layout import TokenLayout

# The normalisations by their name in `config.norm_type`.
NORMS: dict[str, type[nn.Module]] = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}


class ResidualProjection(nn.Linear):
    """A projection onto a residual stream. It starts at zero, so that every block starts as the identity
    (Zhang et al. 2019, "Fixup Initialization"); docs/experiments.md has what that gains."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)


class SliceProjection(nn.Linear):
    """A projection between embedding and core. It starts as the identity on the channels that both have, so
    that the core starts out thinking in a slice of the embedding."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)


class ShortConvolution(nn.Conv1d):
    """Causal depth-wise convolution: without positions, this is what tells word order.

    `convolve` calls it. It is made, and called, like any `nn.Conv1d`, so that adapters can be put on it.
    """

    @classmethod
    def of(cls, channels: int, kernel_size: int) -> "ShortConvolution":
        """One filter for each channel."""
        return cls(channels, channels, kernel_size, groups=channels, bias=False)

    def forward(self, window: Tensor) -> Tensor:
        """Window [B', channels, kernel - 1 + T'], the past in front, to [B', channels, T']."""
        if self.groups != self.in_channels or self.out_channels != self.in_channels:  # an adapter's
            return super().forward(window)
        weight = self.weight.to(window.dtype)
        return depthwise_convolution(window.transpose(1, 2), weight).transpose(1, 2)


class TokenShift(nn.Module):
    """Mixtures of each token with the one before it, a weight for each channel (Peng et al. 2023, "RWKV:
    Reinventing RNNs for the Transformer Era", equations 11 to 13)."""

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


def convolve(
    conv: nn.Module, kernel_size: int, rows: Tensor, past: Tensor | None, layout: TokenLayout
) -> tuple[Tensor, Tensor]:
    """Convolves rows [B', T', channels] that follow `past` [B', kernel - 1, channels], zeros if `None`.

    Args:
        conv: a [`ShortConvolution`], or what an adapter put in its place.

    Returns:
        The rows [B', T', channels], and the past of the tokens that come next, float32 at least.
    """
    history = kernel_size - 1
    if past is None:
        past = rows.new_zeros(rows.shape[0], history, rows.shape[2])
    window = torch.cat([past.to(rows.dtype), rows], dim=1)
    mixed = conv(window.transpose(1, 2)).transpose(1, 2)
    return mixed, layout.last_of_rows(window, history).to(at_least_float32(rows))


def all_rows(embedding: nn.Module, count: int, device: torch.device) -> Tensor:
    """The weights [count, size] of an embedding: asked for, not taken, since they may be kept elsewhere and
    an adapter may add to them."""
    return embedding(torch.arange(count, device=device))


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """Applies a linear layer to x [..., F] of any number of dimensions: quantised ones take at most three."""
    if type(linear) is nn.Linear or x.dim() <= 3:
        return linear(x)
    return linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def past_spec(kernel_size: int, channels: int) -> TensorSpec:
    """The past that `convolve` takes and returns."""
    return TensorSpec("past", (kernel_size - 1, channels))


__all__ = [
    "NORMS",
    "ResidualProjection",
    "ShortConvolution",
    "SliceProjection",
    "TokenShift",
    "all_rows",
    "apply_linear",
    "convolve",
    "past_spec",
]
