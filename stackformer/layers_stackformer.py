# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Small layers that the model and its mixers share; a type of its own gets an initial value of its own."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .dtypes import at_least_float32
from .state import TensorSpec
from .token_layout import TokenLayout

# The dtypes that oneDNN has fast convolutions for on this processor.
_CONVOLVED_BY_ONEDNN = {torch.float32}
if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _CONVOLVED_BY_ONEDNN.add(torch.bfloat16)

# Elements from which on a normalisation is memory traffic rather than calls.
_MANY = 2**14


class _Normalise(torch.autograd.Function):
    """Root mean square normalisation of x [..., F], with a gradient in closed form: torch's own, on CPUs, is
    a chain of operators that reads and writes x three times as often."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        scale = (square / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * weight).mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        product = (grad * x).flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            along = (product @ weight).view_as(scale) * (scale**3 / -x.shape[-1])
            grad_weight = scale.flatten() @ product
        return (grad * weight).mul_(scale).addcmul_(x, along), grad_weight, None


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation (Zhang and Sennrich 2019, equation 4)."""

    def forward(self, x: Tensor) -> Tensor:
        same_dtype = self.elementwise_affine and x.dtype == self.weight.dtype
        plain = x.device.type == "cpu" and same_dtype and x.dtype.itemsize >= 4
        if plain and x.numel() >= _MANY and not torch.compiler.is_compiling():
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            return _Normalise.apply(x, self.weight, eps)
        return super().forward(x)


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


class _DepthwiseConvolution(torch.autograd.Function):
    """Windows [B', W, channels] and weights [channels, 1, kernel] to [B', W - kernel + 1, channels], by
    oneDNN's kernels for images (of height 1) whose channels are dense. They are fast on CPUs in float32 and
    bfloat16, but for the gradient of the weights, which for a few long rows takes longer than all else."""

    @staticmethod
    def forward(ctx, window: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(window, weight)
        return _convolve_as_image(window, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        window, weight = ctx.saved_tensors
        length, size = grad.shape[1], weight.shape[-1]
        grad_window = _convolve_as_image(nn.functional.pad(grad, (0, 0, size - 1, size - 1)), weight.flip(-1))
        product = torch.empty_like(grad)  # one for all: new memory takes as long as what is written to it
        sums = [
            torch.mul(grad, window[:, offset : offset + length], out=product).sum((0, 1))
            for offset in range(size)
        ]
        return grad_window, torch.stack(sums, dim=-1).unsqueeze(1)


def _convolve_as_image(window: Tensor, weight: Tensor) -> Tensor:
    image = window.transpose(1, 2).unsqueeze(2)
    return nn.functional.conv2d(image, weight.unsqueeze(2), groups=len(weight)).squeeze(2).transpose(1, 2)


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
        return self._mix(window.transpose(1, 2)).transpose(1, 2)

    def _mix(self, window: Tensor) -> Tensor:
        weight = self.weight.to(window.dtype)
        length = window.shape[1] - weight.shape[-1] + 1
        if length == 1:
            return (window * weight.squeeze(1).t()).sum(1, keepdim=True)
        if window.device.type == "cpu" and window.dtype in _CONVOLVED_BY_ONEDNN:
            return _DepthwiseConvolution.apply(window, weight)
        taps = weight.squeeze(1).unbind(-1)
        mixed = window[:, :length] * taps[0]
        for offset, tap in enumerate(taps[1:], start=1):
            mixed = torch.addcmul(mixed, window[:, offset : offset + length], tap)
        return mixed


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


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear layer on x [..., F] of any number of dimensions: quantised ones take three at most."""
    if type(linear) is nn.Linear or x.dim() <= 3:
        return linear(x)
    return linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def past_spec(kernel_size: int, channels: int) -> TensorSpec:
    """The past that `convolve` takes and returns."""
    return TensorSpec("past", (kernel_size - 1, channels))


class _SwishGate(torch.autograd.Function):
    """silu(gate) * value, which keeps what it is given and nothing else for the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return nn.functional.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * value, gate)
        return grad_gate, nn.functional.silu(gate).mul_(grad)


def swish_gate(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, both of one shape."""
    if torch.is_grad_enabled() and gate.dtype == value.dtype and not torch.compiler.is_compiling():
        return _SwishGate.apply(gate, value)
    return nn.functional.silu(gate) * value


class GatedMLP(nn.Module):
    """Gated feed-forward (Shazeer 2020, "GLU Variants Improve Transformer", equation 6)."""

    def __init__(self, input_size: int, intermediate_size: int, output_size: int, hidden_act: str):
        super().__init__()
        self.gate_proj = nn.Linear(input_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(input_size, intermediate_size, bias=False)
        self.down_proj = ResidualProjection(intermediate_size, output_size)
        self.act_fn = ACT2FN[hidden_act]
        self.is_swish = hidden_act in ("silu", "swish")

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        return self.down_proj(swish_gate(gate, up) if self.is_swish else self.act_fn(gate) * up)
