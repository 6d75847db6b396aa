# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Operations with hand-written gradients for CPUs, which read and write less memory than torch's own.

Each computes the expression in its docstring. Where torch's own operators are as fast, they are used: on a
GPU, in compiled graphs, and for small tensors.
"""

import torch
from torch import Tensor, nn

# The dtypes for which oneDNN has fast convolutions on this processor.
_CONVOLVED_BY_ONEDNN = {torch.float32}
if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _CONVOLVED_BY_ONEDNN.add(torch.bfloat16)

# From this number of elements on, memory traffic determines the time of a normalisation, not its calls.
_MANY = 2**14

_SHORTEST = 1e-12  # length by which shorter vectors are divided


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation (Zhang and Sennrich 2019, equation 4)."""

    def forward(self, x: Tensor) -> Tensor:
        if self._is_fused_for(x):
            eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
            return _Normalise.apply(x, self.weight, eps)
        return super().forward(x)

    def _is_fused_for(self, x: Tensor) -> bool:
        """Whether `_Normalise` is faster than torch's own normalisation of `x`."""
        if x.device.type != "cpu" or x.numel() < _MANY or torch.compiler.is_compiling():
            return False
        return self.weight is not None and x.dtype == self.weight.dtype and x.dtype.itemsize >= 4


class _Normalise(torch.autograd.Function):
    """Root mean square normalisation of x [..., F], with a gradient that reads and writes x less often.

    On CPUs, torch's own gradient is a chain of operators with three times the memory traffic.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()  # [..., 1]
        scale = (square / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * weight).mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        product = (grad * x).flatten(0, -2)  # [n, F]
        with torch.autocast(x.device.type, enabled=False):
            along = (product @ weight).view_as(scale) * (scale**3 / -x.shape[-1])
            grad_weight = scale.flatten() @ product
        return (grad * weight).mul_(scale).addcmul_(x, along), grad_weight, None


def unit_length(x: Tensor) -> Tensor:
    """Returns x [..., F] divided by its length, or by 1e-12 where it is shorter."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nn.functional.normalize(x, dim=-1, eps=_SHORTEST)
    return _UnitLength.apply(x)


class _UnitLength(torch.autograd.Function):
    """`unit_length`, with a gradient that reads and writes x less often than torch's own."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=_SHORTEST)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = (grad * unit).sum(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).div_(length)


def swish_gate(gate: Tensor, value: Tensor) -> Tensor:
    """Returns silu(gate) * value, for two tensors of the same shape."""
    if torch.is_grad_enabled() and gate.dtype == value.dtype and not torch.compiler.is_compiling():
        return _SwishGate.apply(gate, value)
    return nn.functional.silu(gate) * value


class _SwishGate(torch.autograd.Function):
    """silu(gate) * value. Keeps only its two arguments for the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return nn.functional.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * value, gate)
        return grad_gate, nn.functional.silu(gate).mul_(grad)


def depthwise_convolution(window: Tensor, weight: Tensor) -> Tensor:
    """Convolves each channel by itself, causally.

    Args:
        window: [B', kernel - 1 + T', channels], the past in front.
        weight: [channels, 1, kernel].

    Returns:
        [B', T', channels]
    """
    length = window.shape[1] - weight.shape[-1] + 1
    if length == 1:
        return (window * weight.squeeze(1).t()).sum(1, keepdim=True)
    if window.device.type == "cpu" and window.dtype in _CONVOLVED_BY_ONEDNN:
        return _DepthwiseConvolution.apply(window, weight)
    taps = weight.squeeze(1).unbind(-1)  # [channels] each
    mixed = window[:, :length] * taps[0]
    for offset, tap in enumerate(taps[1:], start=1):
        mixed = torch.addcmul(mixed, window[:, offset : offset + length], tap)
    return mixed


class _DepthwiseConvolution(torch.autograd.Function):
    """Convolves with oneDNN's kernels for images, of height 1 here, with dense channels.

    They are fast on CPUs in float32 and bfloat16, except for the gradient of the weights, which is slow for a
    few long rows. `backward` computes this gradient itself.
    """

    @staticmethod
    def forward(ctx, window: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(window, weight)
        return _convolve_as_image(window, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        window, weight = ctx.saved_tensors
        length, size = grad.shape[1], weight.shape[-1]
        grad_window = _convolve_as_image(nn.functional.pad(grad, (0, 0, size - 1, size - 1)), weight.flip(-1))
        product = torch.empty_like(grad)  # reused, because allocating memory takes as long as writing to it
        sums = [
            torch.mul(grad, window[:, offset : offset + length], out=product).sum((0, 1))
            for offset in range(size)
        ]
        return grad_window, torch.stack(sums, dim=-1).unsqueeze(1)


def _convolve_as_image(window: Tensor, weight: Tensor) -> Tensor:
    """Convolves [B', W, channels] to [B', W - kernel + 1, channels] as images of height 1."""
    image = window.transpose(1, 2).unsqueeze(2)  # [B', channels, 1, W]
    return nn.functional.conv2d(image, weight.unsqueeze(2), groups=len(weight)).squeeze(2).transpose(1, 2)


__all__ = ["RMSNorm", "depthwise_convolution", "swish_gate", "unit_length"]
