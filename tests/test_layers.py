import pytest
import torch
from torch import nn

from stackformer.fused_ops import _MANY, RMSNorm, _Normalise, swish_gate, unit_length
from stackformer.layers_stackformer import ShortConvolution


@pytest.mark.parametrize(
    ("batch", "length", "channels", "kernel"), [(2, 9, 6, 4), (1, 33, 5, 1), (3, 1, 7, 4)]
)
def test_short_convolution_in_float32_has_kernels_of_its_own(batch, length, channels, kernel):
    conv = ShortConvolution.of(channels, kernel)
    exact = ShortConvolution.of(channels, kernel).double()
    exact.load_state_dict(conv.state_dict())
    window = torch.randn(batch, channels, kernel - 1 + length)
    results = []
    for layer, inputs in ((conv, window), (exact, window.double())):
        inputs.requires_grad_()
        output = layer(inputs)
        gradients = torch.autograd.grad(output.square().sum(), [inputs, layer.weight])
        results.append([output, *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_short_convolution_is_torchs():
    conv = ShortConvolution.of(6, 4).double()
    window = torch.randn(2, 6, 12, dtype=torch.float64)
    expected = nn.functional.conv1d(window, conv.weight, groups=6)
    torch.testing.assert_close(conv(window), expected)
    torch.testing.assert_close(conv(window[..., :4]), expected[..., :1])


def test_rms_norm_has_torchs_gradients():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        _Normalise.apply(x, weight, 1e-3), nn.functional.rms_norm(x, (5,), weight, eps=1e-3)
    )
    assert torch.autograd.gradcheck(lambda x, weight: _Normalise.apply(x, weight, 1e-3), (x, weight))


def test_unit_length_has_torchs_gradients():
    """Of a vector of zeros, too, which has no length."""
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    x[1] = 0
    x.requires_grad_()
    weights = torch.randn_like(x)
    actual, expected = unit_length(x), nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad((weights * unit).sum(), x)[0] for unit in (actual, expected)]
    torch.testing.assert_close(*gradients)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_length, (y,))
    with torch.no_grad():
        torch.testing.assert_close(unit_length(x), expected)


def test_rms_norm_has_its_gradients_under_autocast():
    norm, x = RMSNorm(64), torch.randn(_MANY // 64, 64)
    (expected,) = torch.autograd.grad(norm(x).cos().sum(), norm.weight)
    with torch.autocast("cpu", torch.bfloat16):
        (actual,) = torch.autograd.grad(norm(x).cos().sum(), norm.weight)
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, _MANY // 64])
def test_rms_norm_is_torchs_for_few_rows_and_many(rows, dtype):
    norm, torchs = RMSNorm(64, eps=1e-6).to(dtype), nn.RMSNorm(64, eps=1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        torchs.load_state_dict(norm.state_dict())
    x = torch.randn(rows, 64, dtype=dtype, requires_grad=True)
    results = []
    for layer in (norm, torchs):
        output = layer(x)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), [x, layer.weight])])
    assert isinstance(results[0][0].grad_fn, torch.autograd.function.BackwardCFunction) == (
        rows > 1 and dtype == torch.float32
    )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_swish_gate_has_its_gradients_and_keeps_little():
    gate, value = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(swish_gate(gate, value), nn.functional.silu(gate) * value)
    assert torch.autograd.gradcheck(swish_gate, (gate, value))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        swish_gate(gate, value)
    assert set(kept) == {gate.data_ptr(), value.data_ptr()}
