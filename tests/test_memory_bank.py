"""The operator against its definition: outputs, states, every gradient, at odd sizes and with extreme
gates."""

import pytest
import torch

from stackformer.memory_bank import (
    FEATURE_MAPS,
    banked_linear_attention,
    banked_linear_attention_step,
    init_memory_bank,
    reverse_banked_linear_attention,
)
from stackformer.memory_bank_cpu import is_available

# Where no compiler was at hand when the package was installed, there is no C++ library.
CHUNKED = [
    "chunk",
    pytest.param("cpp", marks=pytest.mark.skipif(not is_available(), reason="the C++ library was not built")),
]
NAMES = ("query", "key", "value", "read", "write", "log_decay", "memory", "normalizer")


def make_inputs(
    batch=2, time=65, heads=2, key_size=5, value_size=3, memories=3, rate=1.0, dtype=torch.float64
):
    """Random inputs with a non-zero initial state, ready for gradients."""
    generator = torch.Generator().manual_seed(time * 1000 + memories * 10 + key_size)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=dtype)

    gates = (batch, time, heads, memories)
    inputs = {
        "query": rand(batch, time, heads, key_size) + 0.1,
        "key": rand(batch, time, heads, key_size) + 0.1,
        "value": rand(batch, time, heads, value_size) - 0.5,
        "read": rand(*gates),
        "write": rand(*gates),
        "log_decay": -rate * rand(*gates),
        "memory": rand(batch, heads, memories, key_size, value_size) - 0.5,
        "normalizer": rand(batch, heads, memories, key_size) + 0.1,
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def run(inputs, implementation, **kwargs):
    *tokens, memory, normalizer = inputs.values()
    return banked_linear_attention(
        *tokens, initial_state=(memory, normalizer), implementation=implementation, **kwargs
    )


def results_and_gradients(inputs, implementation, **kwargs):
    """Output, final state, and all gradients under random gradients of the output *and* of the final
    state."""
    output, (memory, normalizer) = run(inputs, implementation, **kwargs)
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (result * torch.randn(result.shape, generator=generator).to(result.dtype)).sum()
        for result in (output, memory, normalizer)
    )
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    named = {f"gradient of {name}": gradient for name, gradient in zip(NAMES, gradients, strict=True)}
    return {"output": output, "final memory": memory, "final normalizer": normalizer, **named}


def assert_same(expected, actual, rtol):
    for name, reference in expected.items():
        scale = reference.abs().max().clamp(min=1e-3)  # some gradients cancel to rounding errors
        error = (actual[name] - reference).abs().max() / scale
        assert torch.isfinite(actual[name]).all(), f"{name} is not finite"
        assert error < rtol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("memories", [1, 3, 16])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_chunk_equals_recurrent(implementation, time, memories):
    inputs = make_inputs(time=time, memories=memories)
    expected = results_and_gradients(inputs, "recurrent")
    assert_same(expected, results_and_gradients(inputs, implementation), rtol=1e-11)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 100, 1000])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_chunk_size_changes_nothing(implementation, chunk_size):
    inputs = make_inputs(time=101)
    expected = results_and_gradients(inputs, "recurrent")
    assert_same(expected, results_and_gradients(inputs, implementation, chunk_size=chunk_size), rtol=1e-11)


@pytest.mark.parametrize("groups", [1, 3])
def test_small_work_space(monkeypatch, groups):
    """Chunks in groups of one or a few: states are recomputed at every group boundary."""
    inputs = make_inputs(time=150)
    expected = results_and_gradients(inputs, "recurrent")
    per_chunk = 2 * 2 * (16 * (16 + 15) + 15 * 4)
    monkeypatch.setattr("stackformer.memory_bank._WORKSPACE", groups * per_chunk)
    assert_same(expected, results_and_gradients(inputs, "chunk", chunk_size=16), rtol=1e-11)


@pytest.mark.parametrize("implementation", CHUNKED)
@pytest.mark.parametrize(
    "heads, key_size, value_size, memories", [(1, 64, 64, 1), (3, 33, 17, 2), (2, 7, 130, 5)]
)
@pytest.mark.parametrize("dtype,rtol", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_sizes_that_fill_no_register(implementation, heads, key_size, value_size, memories, dtype, rtol):
    inputs = make_inputs(1, 100, heads, key_size, value_size, memories, dtype=dtype)
    expected = results_and_gradients(inputs, "recurrent")
    if memories == 1:  # what one memory is read with cancels from numerator and denominator
        expected.pop("gradient of read")
    assert_same(expected, results_and_gradients(inputs, implementation), rtol=rtol)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_strided_inputs(implementation):
    """Slices of a projection, as a mixer has them, and weights that are the same for all heads."""
    inputs = make_inputs(time=70, key_size=4, value_size=4)
    joint = torch.stack([inputs[name] for name in NAMES[:3]], dim=2).detach()
    strided = {name: tensor.detach() for name, tensor in inputs.items()}
    strided |= dict(zip(NAMES[:3], joint.unbind(2), strict=True))
    strided["read"] = strided["read"][:, :, :1].expand_as(strided["read"])
    strided["log_decay"] = strided["log_decay"].transpose(1, 2).contiguous().transpose(1, 2)
    strided = {name: tensor.requires_grad_() for name, tensor in strided.items()}
    expected = results_and_gradients(strided, "recurrent")
    assert_same(expected, results_and_gradients(strided, implementation), rtol=1e-11)


@pytest.mark.parametrize("implementation", CHUNKED)
@pytest.mark.parametrize("time, value_size", [(1, 3), (1, 64), (70, 3)])
def test_without_gradients(implementation, time, value_size):
    inputs = make_inputs(time=time, value_size=value_size)
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    expected = run(inputs, "recurrent")
    actual = run(inputs, implementation)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    assert not actual[0].requires_grad
    assert torch.equal(inputs["memory"], make_inputs(time=time, value_size=value_size)["memory"])


@pytest.mark.parametrize("rate", [0.0, 5.0, 50.0, 5000.0])
@pytest.mark.parametrize("dtype,rtol", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_extreme_decays(implementation, rate, dtype, rtol):
    inputs = make_inputs(time=130, rate=rate, dtype=dtype)
    expected = results_and_gradients(inputs, "recurrent")
    assert_same(expected, results_and_gradients(inputs, implementation), rtol=rtol)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_decays_mixed_from_none_to_complete(implementation):
    """Some tokens keep everything, some erase everything: one chunk holds both."""
    inputs = make_inputs(time=130)
    with torch.no_grad():
        inputs["log_decay"].masked_fill_(inputs["log_decay"] > -0.5, 0.0)
        inputs["log_decay"][:, ::17] = -300.0
    expected = results_and_gradients(inputs, "recurrent")
    assert_same(expected, results_and_gradients(inputs, implementation), rtol=1e-10)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_zero_writes_leave_the_state_alone(implementation):
    inputs = make_inputs(time=70)
    with torch.no_grad():
        inputs["write"].zero_()
        inputs["log_decay"].zero_()
    for each in ("recurrent", implementation):
        _, (memory, normalizer) = run(inputs, each)
        assert torch.equal(memory, inputs["memory"])
        assert torch.equal(normalizer, inputs["normalizer"])
    expected = results_and_gradients(inputs, "recurrent")
    assert_same(expected, results_and_gradients(inputs, implementation), rtol=1e-11)


@pytest.mark.parametrize("memories", [1, 3])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_gradcheck(implementation, memories):
    inputs = make_inputs(batch=1, time=9, memories=memories)

    def function(*tensors):
        *tokens, memory, normalizer = tensors
        output, state = banked_linear_attention(
            *tokens,
            initial_state=(memory, normalizer),
            chunk_size=4,
            implementation=implementation,
            max_decay=1.0,
        )
        return output, *state

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("implementation", CHUNKED)
def test_any_split_is_the_same(implementation):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(time=90).items()}
    *tokens, memory, normalizer = inputs.values()
    whole, final = banked_linear_attention(
        *tokens, initial_state=(memory, normalizer), implementation=implementation
    )
    state, parts = (memory, normalizer), []
    for start, stop in [(0, 1), (1, 40), (40, 41), (41, 90)]:
        part, state = banked_linear_attention(
            *(x[:, start:stop] for x in tokens), initial_state=state, implementation=implementation
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_step_is_the_recurrence(implementation):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(time=4).items()}
    *tokens, memory, normalizer = inputs.values()
    expected, final = run(inputs, implementation)
    state = (memory, normalizer)
    for t in range(4):
        output, state = banked_linear_attention_step(*(x[:, t] for x in tokens), state)
        torch.testing.assert_close(output, expected[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time", [1, 64, 150])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_reverse_restores_the_initial_state(implementation, time):
    inputs = make_inputs(time=time, rate=0.1)
    _, final = run(inputs, implementation)
    arguments = (inputs[name] for name in ("key", "value", "write", "log_decay"))
    memory, normalizer = reverse_banked_linear_attention(*arguments, final)
    torch.testing.assert_close(memory, inputs["memory"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(normalizer, inputs["normalizer"], rtol=1e-9, atol=1e-9)


def test_low_precision_inputs_keep_a_float32_state():
    inputs = {name: tensor.detach() for name, tensor in make_inputs(time=70, dtype=torch.float32).items()}
    *tokens, memory, normalizer = inputs.values()
    expected, _ = banked_linear_attention(*tokens, initial_state=(memory, normalizer))
    halves = [x.bfloat16() for x in tokens]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = banked_linear_attention(*halves, initial_state=(memory, normalizer))
    assert output.dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in state)
    assert (output - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("implementation", CHUNKED)
@pytest.mark.parametrize(
    "time, key_size, value_size, memories",
    [(1, 5, 3, 3), (150, 64, 64, 1), (77, 33, 17, 16), (130, 8, 130, 2)],
)
def test_bfloat16_tokens(implementation, time, key_size, value_size, memories):
    """Products may round what they take to bfloat16: every result is as close as a few of its roundings, and
    states and gates keep float32."""
    exact = make_inputs(2, time, 3, key_size, value_size, memories, rate=0.1, dtype=torch.float32)
    inputs = {
        name: (tensor.bfloat16() if name in NAMES[:3] else tensor).detach().requires_grad_()
        for name, tensor in exact.items()
    }
    expected = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expected = results_and_gradients(expected, "recurrent")
    actual = results_and_gradients(inputs, implementation)
    for name, tensor in actual.items():
        low = name.split()[-1] in (*NAMES[:3], "output")
        assert tensor.dtype == (torch.bfloat16 if low else torch.float32), name
    if memories == 1:  # what one memory is read with cancels from numerator and denominator
        expected.pop("gradient of read")
    for name, reference in expected.items():
        error = (actual[name].double() - reference).norm() / reference.norm()
        assert error < 0.015, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("implementation", CHUNKED)
def test_autocast_does_not_touch_the_backward_pass(implementation):
    inputs = make_inputs(time=70, dtype=torch.float32)
    expected = results_and_gradients(inputs, implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results_and_gradients(inputs, implementation)
    assert_same(expected, actual, rtol=1e-6)


def test_memory_grows_without_the_bank(monkeypatch):
    """No tensor of the forward or backward pass has T*R*K elements, and what is saved does not either."""
    batch, time, heads, key_size, memories = 1, 1024, 1, 16, 16
    monkeypatch.setattr("stackformer.memory_bank._WORKSPACE", 2**15)
    inputs = make_inputs(batch, time, heads, key_size, key_size, memories, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    with Watch():
        results_and_gradients(inputs, "chunk")
    assert largest <= time * max(key_size + 1, memories) + 16 * memories * key_size * (key_size + 1)
    assert largest < time * memories * key_size / 2


@pytest.mark.parametrize("implementation", CHUNKED)
def test_equals_fast_transformers(implementation):
    """One memory without decay is fast-transformers' CausalLinearAttention.

    To run this one: pip install torch setuptools wheel, then, with nvcc not on PATH,
    pip install --no-build-isolation "stackformer[fast-transformers]" (compiles for about five minutes).
    """
    pytest.importorskip("fast_transformers")
    from fast_transformers.attention import CausalLinearAttention
    from fast_transformers.masking import LengthMask, TriangularCausalMask

    torch.manual_seed(0)
    batch, time, heads, size = 2, 150, 4, 32
    query, key, value = (torch.randn(batch, time, heads, size, requires_grad=True) for _ in range(3))
    attention = CausalLinearAttention(size)
    lengths = LengthMask(torch.full((batch,), time))
    theirs = attention(query, key, value, TriangularCausalMask(time), lengths, lengths)
    phi = [torch.nn.functional.elu(x) + 1 for x in (query, key)]
    ones = torch.ones(batch, time, heads, 1)
    ours, _ = banked_linear_attention(
        *phi, value, ones, ones, torch.zeros_like(ones), implementation=implementation
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(theirs)
    for mine, reference in zip(
        torch.autograd.grad(ours, (query, key, value), gradient),
        torch.autograd.grad(theirs, (query, key, value), gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"implementation": "fast"}, "implementation"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"key": torch.zeros(2, 5, 2, 6)}, "`key` must have shape"),
        ({"write": torch.zeros(2, 5, 2, 4)}, "`write` must have shape"),
        ({"query": torch.zeros(2, 0, 2, 5)}, "at least one token"),
        ({"initial_state": (torch.zeros(1), torch.zeros(1))}, r"initial_state\[0\]"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = {name: tensor for name, tensor in make_inputs(time=5).items() if name not in NAMES[-2:]}
    with pytest.raises(ValueError, match=message):
        banked_linear_attention(**(inputs | change))


def test_initial_state_defaults_to_zeros():
    inputs = {name: tensor for name, tensor in make_inputs(time=5).items() if name not in NAMES[-2:]}
    zeros = init_memory_bank(inputs["query"], inputs["value"], inputs["read"])
    for implementation in ("recurrent", "chunk", None):
        torch.testing.assert_close(
            banked_linear_attention(**inputs, implementation=implementation),
            banked_linear_attention(**inputs, implementation=implementation, initial_state=zeros),
        )


def test_the_feature_map_keeps_its_result_only():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(FEATURE_MAPS["elu_plus_one"](x), torch.nn.functional.elu(x) + 1)
    assert torch.autograd.gradcheck(FEATURE_MAPS["elu_plus_one"], x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        result = FEATURE_MAPS["elu_plus_one"](x)
    assert kept == [result.data_ptr()]
