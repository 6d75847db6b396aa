import pytest
import torch
from torch import nn

from stackformer.layers_stackformer import ShortConvolution


@pytest.mark.parametrize(
    ("batch", "length", "channels", "kernel"), [(2, 9, 6, 4), (1, 33, 5, 1), (3, 1, 7, 4)]
)
def test_short_convolution_in_float32_has_kernels_of_its_own(batch, length, channels, kernel):
    conv = ShortConvolution(channels, kernel)
    exact = ShortConvolution(channels, kernel).double()
    exact.load_state_dict(conv.state_dict())
    window = torch.randn(batch, kernel - 1 + length, channels)
    results = []
    for layer, inputs in ((conv, window), (exact, window.double())):
        inputs.requires_grad_()
        output = layer(inputs)
        gradients = torch.autograd.grad(output.square().sum(), [inputs, layer.weight])
        results.append([output, *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_short_convolution_is_torchs():
    conv = ShortConvolution(6, 4).double()
    window = torch.randn(2, 12, 6, dtype=torch.float64)
    expected = nn.functional.conv1d(window.mT, conv.weight, groups=6).mT
    torch.testing.assert_close(conv(window), expected)
    torch.testing.assert_close(conv(window[:, :4]), expected[:, :1])
