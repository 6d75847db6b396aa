# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Small layers that the core and its mixers share. Each type has an initialisation of its own."""

import torch
from torch import Tensor, nn

from .dtypes import at_least_float32
from .fused_ops import RMSNorm, depthwise_convolution
from .state import TensorSpec
from .token_layout import TokenLayout

# The normalisations by their name in `config.norm_type`.
NORMS: dict[str, type[nn.Module]] = {"layer_norm": nn.LayerNorm, "rms_norm": RMSNorm}


class ResidualProjection(nn.Linear):
    """A projection onto a residual stream. It starts at zero, so that every block starts as the identity.

    Zhang et al. 2019, "Fixup Initialization". docs/experiments.md measures the gain.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)


class SliceProjection(nn.Linear):
    """A projection between embedding and core. It starts as the identity on the channels that both have.

    So the core starts with a slice of the embedding.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)


class ShortConvolution(nn.Conv1d):
    """Causal depth-wise convolution. The model has no positions, so this layer tells it the order of tokens.

    `convolve` calls it. It has the constructor and the call of `nn.Conv1d`, so that adapters can wrap it.
    """

    @classmethod
    def of(cls, channels: int, kernel_size: int) -> "ShortConvolution":
        """Returns a convolution with one filter for each channel."""
        return cls(channels, channels, kernel_size, groups=channels, bias=False)

    def forward(self, window: Tensor) -> Tensor:
        """Convolves a window [B', channels, kernel - 1 + T'], the past in front, to [B', channels, T']."""
        if self.groups != self.in_channels or self.out_channels != self.in_channels:  # made by an adapter
            return super().forward(window)
        weight = self.weight.to(window.dtype)
        # [B', channels, .] -> [B', ., channels], and back
        return depthwise_convolution(window.transpose(1, 2), weight).transpose(1, 2)


class TokenShift(nn.Module):
    """Mixtures of each token with the one before it, with a weight for each channel.

    Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", equations 11 to 13.
    """

    def __init__(self, size: int, num_mixtures: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_mixtures, size))

    def initial_weight(self) -> Tensor:
        """Returns weights from 0 (the token before) in the first channel towards 1 (the token itself).

        These are the weights of a layer halfway up an RWKV-4.
        """
        channel = torch.arange(self.weight.shape[1]) / self.weight.shape[1]
        return channel.sqrt().expand_as(self.weight)

    def forward(
        self, hidden: Tensor, layout: TokenLayout, past: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Mixes active tokens [n, d], whose rows follow `past` [B', 1, d] (zeros if `None`).

        Returns:
            The mixtures [n, d] each, and the new past [B', 1, d], float32 at least.
        """
        rows = layout.to_rows(hidden)
        if past is None:
            past = rows.new_zeros(rows.shape[0], 1, rows.shape[2])
        window = torch.cat([past.to(rows.dtype), rows], dim=1)  # [B', 1 + T', d]
        before = layout.to_tokens(window[:, :-1])  # [n, d]
        past = layout.last_of_rows(window, 1).to(at_least_float32(rows))
        return [torch.lerp(before, hidden, weight) for weight in self.weight.to(hidden.dtype)], past


def convolve(
    conv: nn.Module, kernel_size: int, rows: Tensor, past: Tensor | None, layout: TokenLayout
) -> tuple[Tensor, Tensor]:
    """Convolves rows [B', T', channels] that follow `past` [B', kernel - 1, channels], zeros if `None`.

    Args:
        conv: a [`ShortConvolution`], or the module with which an adapter replaced it.

    Returns:
        The rows [B', T', channels], and the past for the next call [B', kernel - 1, channels], float32 at
        least.
    """
    history = kernel_size - 1
    if past is None:
        past = rows.new_zeros(rows.shape[0], history, rows.shape[2])
    window = torch.cat([past.to(rows.dtype), rows], dim=1)
    mixed = conv(window.transpose(1, 2)).transpose(1, 2)  # [B', ., channels] -> [B', channels, .], and back
    return mixed, layout.last_of_rows(window, history).to(at_least_float32(rows))


def all_rows(embedding: nn.Module, count: int, device: torch.device) -> Tensor:
    """Returns the first `count` rows [count, size] of an embedding by calling it.

    Its weights may be offloaded, and an adapter may add to them, so they are not read directly.
    """
    return embedding(torch.arange(count, device=device))


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """Applies a linear layer to x [..., F]. Quantised layers accept at most three dimensions."""
    if type(linear) is nn.Linear or x.dim() <= 3:
        return linear(x)
    # [..., F] -> [M, F] -> [M, G] -> [..., G]
    return linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def past_spec(kernel_size: int, channels: int) -> TensorSpec:
    """Specifies the past that `convolve` takes and returns."""
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
