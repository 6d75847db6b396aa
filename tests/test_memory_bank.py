"""The operator against its definition: outputs, states, every gradient, at odd sizes and with extreme
gates."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils.checkpoint

from stackformer import implementation as implementation_of
from stackformer import memory_bank
from stackformer.implementation import can_decode_token
from stackformer.library import is_available
from stackformer.memory_bank import (
    banked_linear_attention,
    banked_linear_attention_step,
    combine_chunks,
    init_memory_bank,
    reverse_banked_linear_attention,
    which_implementation,
)
from stackformer.mixer_banked_linear_attention import FEATURE_MAPS

# Where no compiler was at hand when the package was installed, there is no C++ library.
CHUNKED = [
    "chunk",
    pytest.param("cpp", marks=pytest.mark.skipif(not is_available(), reason="the C++ library was not built")),
]
NAMES = ("query", "key", "value", "read", "write", "log_decay", "memory", "normalizer")


# Triton's interpreter computes in NumPy, which warns of NaN and infinities.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


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
        (result * torch.randn(result.shape, generator=generator).to(result)).sum()
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


# Every implementation whose gradients are derived by hand, against autograd through the recurrence.

DEVICES = {"triton": "cuda" if torch.cuda.is_available() else "cpu"}
WITHOUT_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")
DERIVED = [*CHUNKED, pytest.param("triton", marks=WITHOUT_TRITON)]
# The largest error, relative to the largest element of a tensor.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 4e-2}

# Memories are wiped at these places of log_decay [B, T, H, R], of at least 40 tokens.
WIPED = {
    "the first token": lambda x: x[:, :1],
    "the last token": lambda x: x[:, -1:],
    "inside of a chunk": lambda x: x[:, 9:10],
    "at both sides of a chunk's end": lambda x: x[:, 15:17],
    "some memories": lambda x: x[:, 5:50:22, :, 1:],
    "some heads": lambda x: x[:, 30:33, 1:],
    "several": lambda x: x[:, 3::11],
    "every token": lambda x: x,
}


class Case(NamedTuple):
    """A row of the table.

    Attributes:
        sizes: arguments of `make_inputs`.
        options: arguments of `banked_linear_attention`.
        change: changes the inputs in place.
        dtypes: dtypes of queries, keys and values. In float16 read, write and log decay are float16, too.
        cancels: names of the inputs whose gradients are rounding errors of sums that cancel.
        finite: false if some results are no numbers; gradients have no definition then.
    """

    sizes: dict[str, Any] = {}
    options: dict[str, Any] = {}
    change: Callable[[dict[str, torch.Tensor]], Any] = lambda inputs: None
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    cancels: tuple[str, ...] = ()
    finite: bool = True


def wiped(where, log_decay, chunk_size=16):
    """The case of memories that are wiped, or nearly, at a place of `WIPED`."""
    # A token that reads itself alone reads the same, whatever it reads with.
    cancels = ("query", "read", "log_decay") if where == "every token" else ()
    return Case(
        {"time": 40, "batch": 1},
        {"chunk_size": chunk_size},
        lambda inputs: WIPED[where](inputs["log_decay"]).fill_(log_decay),
        cancels=cancels,
    )


def some_keep_some_erase(inputs):
    inputs["log_decay"].masked_fill_(inputs["log_decay"] > -0.5, 0.0)
    inputs["log_decay"][:, ::17] = -300.0


def zero_writes(inputs):
    for name in ("write", "log_decay"):
        inputs[name][:, 5:15] = 0.0


def values_that_are_no_numbers(inputs):
    inputs["value"][0, 7, 1, 2], inputs["value"][1, 100, 0, 0] = torch.nan, torch.inf


EVERY = tuple(TOLERANCES)
CASES = {
    "one token": Case({"time": 1}, dtypes=EVERY),
    "one token, one memory": Case({"time": 1, "memories": 1}, cancels=("read",)),
    "one token less than a chunk": Case({"time": 63}),
    "one chunk": Case({"time": 64, "memories": 2}),
    "one token more than a chunk": Case({"time": 65}, dtypes=EVERY),
    "several chunks": Case({"time": 150, "memories": 1}, cancels=("read",)),
    "several chunks, many memories": Case({"time": 150, "memories": 17, "batch": 1}),
    # Without `eps` the gradients of the only memory's weights are rounding errors.
    "one memory, large eps": Case({"time": 20, "memories": 1}, {"chunk_size": 16, "eps": 0.5}),
    "chunks of one token": Case({"time": 11, "batch": 1}, {"chunk_size": 1}),
    "chunks of no power of two": Case({"time": 50}, {"chunk_size": 7}),
    "long chunks": Case({"time": 150, "memories": 2, "heads": 1}, {"chunk_size": 128}, dtypes=EVERY),
    "a chunk longer than the text": Case({"time": 21}, {"chunk_size": 1000}),
    "sizes of a register": Case(
        {"time": 100, "batch": 1, "heads": 1, "key_size": 64, "value_size": 64, "memories": 1},
        dtypes=EVERY,
        cancels=("read",),
    ),
    "wide keys": Case({"time": 40, "batch": 1, "key_size": 70, "value_size": 17, "memories": 2}),
    "wide values": Case({"time": 40, "batch": 1, "key_size": 7, "value_size": 128, "memories": 5}),
    "no decay": Case({"time": 40, "rate": 0.0}),
    "large decays": Case({"time": 40, "rate": 5.0}, {"chunk_size": 32}),
    "larger decays": Case({"time": 40, "batch": 1, "rate": 50.0}, {"chunk_size": 32}),
    "decays that leave nothing": Case({"time": 20, "rate": 5000.0}, cancels=("query", "read")),
    "some tokens keep, some erase": Case({"time": 70}, change=some_keep_some_erase),
    "some tokens write nothing": Case({"time": 20}, {"chunk_size": 8}, change=zero_writes),
    "values that are no numbers": Case(
        {"time": 150, "memories": 2},
        {"chunk_size": 128},
        values_that_are_no_numbers,
        finite=False,
    ),
    **{f"-inf wipes {where}": wiped(where, -torch.inf) for where in WIPED},
    **{f"-95 wipes {where}": wiped(where, -95.0) for where in WIPED},
    **{f"{decay} wipes several": wiped("several", decay) for decay in (-1e30, -1e4, -110.0)},
    "-inf wipes several in one chunk": wiped("several", -torch.inf, chunk_size=64),
}


def case_inputs(case, dtype):
    """The inputs of a case: queries, keys and values in the dtype, the others in float32 at least."""
    inputs = {name: tensor.detach() for name, tensor in make_inputs(**case.sizes).items()}
    case.change(inputs)
    low = NAMES[:6] if dtype == torch.float16 else NAMES[:3]
    high = torch.promote_types(dtype, torch.float32)
    return {name: tensor.to(dtype if name in low else high) for name, tensor in inputs.items()}


@cache
def expected_results(name, dtype):
    """The results of a case, and its gradients, by the recurrence in float64."""
    case = CASES[name]
    inputs = {key: x.double().requires_grad_() for key, x in case_inputs(case, dtype).items()}
    return results_and_gradients(inputs, "recurrent", **case.options)


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(name, dtype, id=f"{name}, {str(dtype).removeprefix('torch.')}")
        for name, case in CASES.items()
        for dtype in case.dtypes
    ],
)
@pytest.mark.parametrize("implementation", DERIVED)
def test_derived_gradients(monkeypatch, implementation, name, dtype):
    """Outputs, final states and the gradients of all eight inputs are those of the recurrence."""
    case, device = CASES[name], DEVICES.get(implementation, "cpu")
    if implementation == "triton":
        if dtype == torch.float64:
            pytest.skip("the kernels take no float64")
        multiply_bfloat16_in_the_interpreter(monkeypatch)
    inputs = {key: x.to(device).requires_grad_() for key, x in case_inputs(case, dtype).items()}
    actual = results_and_gradients(inputs, implementation, **case.options)
    state_dtype = torch.promote_types(dtype, torch.float32)
    for key, tensor in actual.items():
        like = {"output": dtype}.get(key, state_dtype)
        assert tensor.dtype == (inputs[key.split()[-1]].dtype if "gradient" in key else like), key
    actual = {key: tensor.detach().cpu().double() for key, tensor in actual.items()}
    compared = dict(expected_results(name, dtype))
    for key in case.cancels if case.finite else NAMES:
        compared.pop(f"gradient of {key}")
    if case.finite:
        nothing = inputs["log_decay"].detach().cpu() < -1e3
        assert (actual["gradient of log_decay"][nothing] == 0).all()
        assert_same(compared, actual, TOLERANCES[dtype])
        return
    for key, reference in compared.items():
        is_number = torch.isfinite(reference)
        assert torch.equal(torch.isfinite(actual[key]), is_number) and is_number.sum() > 0, key
        numbers = reference.detach()[is_number]
        torch.testing.assert_close(actual[key][is_number], numbers, rtol=1e-3, atol=1e-4)


def multiply_bfloat16_in_the_interpreter(monkeypatch):
    """Lets Triton's interpreter, which keeps bfloat16 as integers, multiply bfloat16 as float32."""
    if DEVICES["triton"] == "cuda":
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def create_exact_dot(self, a, b, *arguments):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_exact_dot)


@pytest.mark.parametrize("groups", [1, 3])
def test_small_work_space(monkeypatch, groups):
    """Chunks in groups of one or a few: states are recomputed at every group boundary."""
    inputs = make_inputs(time=150)
    expected = results_and_gradients(inputs, "recurrent")
    per_chunk = 2 * 2 * (16 * (16 + 15) + 15 * 4)
    monkeypatch.setattr("stackformer.chunks.WORKSPACE", groups * per_chunk)
    assert_same(expected, results_and_gradients(inputs, "chunk", chunk_size=16), rtol=1e-11)


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


@pytest.mark.parametrize("implementation", ["recurrent", *CHUNKED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time", [1, 70])
def test_of_a_wiped_memory_nothing_is_left(implementation, dtype, time):
    """Not even in the last digit: the same as from an empty state, with other tokens before."""
    inputs = {name: x.detach() for name, x in make_inputs(time=time).items()}
    inputs = {name: x.to(dtype if name in NAMES[:3] else torch.float32) for name, x in inputs.items()}
    if dtype == torch.float64:
        inputs = {name: x.double() for name, x in inputs.items()}
    inputs["log_decay"][:, 0] = -torch.inf
    output, state = run(inputs, implementation, chunk_size=32)
    inputs["memory"], inputs["normalizer"] = (torch.zeros_like(inputs[name]) for name in NAMES[-2:])
    expected, expected_state = run(inputs, implementation, chunk_size=32)
    assert torch.equal(output, expected) and all(map(torch.equal, state, expected_state))


@pytest.mark.parametrize("log_decay", [-torch.inf, -1e5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wiped_token_does_not_shorten_all_chunks(monkeypatch, dtype, log_decay):
    """Nor does one that forgets much, if the chunk has room for that."""
    lengths = []
    original = memory_bank.safe_chunk_length
    monkeypatch.setattr(
        memory_bank,
        "safe_chunk_length",
        lambda *args: lengths.append(original(*args)) or lengths[-1],
    )
    inputs = make_inputs(time=200, rate=0.1)
    inputs = {name: x.detach().to(dtype) for name, x in inputs.items()}
    inputs["log_decay"][:, 5::64] = log_decay
    run(inputs, "chunk", chunk_size=64)
    inputs["log_decay"][:, 6] = log_decay
    run(inputs, "chunk", chunk_size=64)
    run(inputs, "chunk", chunk_size=64, max_decay=torch.inf)
    assert lengths[0] == 64 and lengths[1] >= 2 and lengths[2] >= 2


def test_combined_spans_that_wipe():
    """What was before a span that wipes is gone, in those memories only."""
    log_decay = -torch.rand(3, 1, 1, 2, dtype=torch.float64)
    log_decay[1, :, :, 0] = -torch.inf
    memory, normalizer = torch.rand(3, 1, 1, 2, 4, 5).double(), torch.rand(3, 1, 1, 2, 4).double()
    log_decay.requires_grad_()
    combined, keys = combine_chunks(log_decay, memory, normalizer)
    kept = log_decay.exp()[..., None]
    torch.testing.assert_close(keys, normalizer[2] + kept[2] * (normalizer[1] + kept[1] * normalizer[0]))
    assert torch.equal(combined[..., 0, :, :], (memory[2] + kept[2, ..., None] * memory[1])[..., 0, :, :])
    combined.sum().backward()
    assert torch.isfinite(log_decay.grad).all() and log_decay.grad[1, 0, 0, 0] == 0


def test_no_way_back_to_before_a_wipe():
    """It says so with NaN or infinities, not with numbers."""
    inputs = {name: x.detach() for name, x in make_inputs(time=20).items()}
    inputs["log_decay"][:, 5, :, 0] = -torch.inf
    arguments = [inputs[name] for name in ("key", "value", "write", "log_decay")]
    memory, normalizer = reverse_banked_linear_attention(*arguments, run(inputs, "recurrent")[1])
    assert not torch.isfinite(memory[:, :, 0]).any() and not torch.isfinite(normalizer[:, :, 0]).any()
    torch.testing.assert_close(memory[:, :, 1:], inputs["memory"][:, :, 1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["recurrent", *CHUNKED])
@pytest.mark.parametrize("log_decay", [torch.nan, torch.inf, 3.0, 1e30])
@pytest.mark.parametrize("time", [1, 40])
def test_growing_memories_crash_nothing(implementation, log_decay, time):
    inputs = make_inputs(time=time)
    with torch.no_grad():
        inputs["log_decay"][:, ::7] = log_decay
    results = results_and_gradients(inputs, implementation)
    assert results["output"].shape == inputs["value"].shape


LATER = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


@pytest.mark.parametrize("value", LATER.values(), ids=LATER.keys())
@pytest.mark.parametrize("name", NAMES[:6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["recurrent", *CHUNKED])
def test_a_later_token_that_is_no_number_changes_nothing_before_it(implementation, dtype, name, value):
    """Every bit is as it was; a log decay may change roundings, as every other log decay does."""
    assert_causal(implementation, dtype, name, value, times=(1, 9, 15, 16, 39), time=40)


def assert_causal(implementation, dtype, name, value, times, **sizes):
    """The output before each of some tokens does not depend on whether this token is a number."""
    inputs = make_inputs(batch=1, rate=0.3, dtype=torch.float64, **sizes)
    low = dtype in (torch.bfloat16, torch.float16)
    inputs = {
        key: x.detach().to(torch.float32 if low and key not in NAMES[:3] else dtype)
        for key, x in inputs.items()
    }
    options = {"max_decay": 0.3, "chunk_size": 16}
    expected, _ = run(inputs, implementation, **options)
    for time in times:
        changed = inputs | {name: inputs[name].clone()}
        changed[name][:, time, :, 0] = value
        output, state = run(changed, implementation, **options)
        if name == "log_decay":
            tolerance = {"rtol": 1e-2, "atol": 1e-2} if low else {}
            torch.testing.assert_close(output[:, :time], expected[:, :time], **tolerance)
        else:
            assert torch.equal(output[:, :time], expected[:, :time]), time
        if name in ("key", "value", "write"):
            assert not torch.isfinite(state[0]).all()


def test_measured_chunks_ignore_what_is_no_number():
    """Large decays beside it still shorten the chunks."""
    inputs = {name: x.detach() for name, x in make_inputs(time=40, rate=30.0, dtype=torch.float32).items()}
    expected, _ = run(inputs, "recurrent")
    inputs["log_decay"][:, 30] = torch.nan
    for implementation in ("chunk", None):
        output, _ = run(inputs, implementation)
        torch.testing.assert_close(output[:, :30], expected[:, :30], rtol=1e-4, atol=1e-5)


def test_compiled_chunks_are_causal_too():
    """There is no look at the values, so they are prepared for in every chunk."""
    inputs = {name: x.detach() for name, x in make_inputs(time=40).items()}
    expected, _ = run(inputs, "chunk", max_decay=1.0, chunk_size=16)
    compiled = torch.compile(
        lambda inputs: run(inputs, "chunk", max_decay=1.0, chunk_size=16)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(inputs), expected)
    inputs["value"][0, 7, 1, 2] = torch.nan
    output = compiled(inputs)
    assert torch.equal(torch.isnan(output), torch.isnan(run(inputs, "recurrent")[0]))
    torch.testing.assert_close(output[:, :7], expected[:, :7])


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


@pytest.mark.parametrize("implementation", ["recurrent", *CHUNKED])
def test_gradients_inside_a_checkpoint(implementation):
    inputs = list(make_inputs(time=20).values())

    def loss(*inputs):
        *tokens, memory, normalizer = inputs
        output, state = banked_linear_attention(
            *tokens, initial_state=(memory, normalizer), chunk_size=8, implementation=implementation
        )
        return output.sum() + sum(x.square().sum() for x in state)

    checkpointed = torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False)
    actual, expected = torch.autograd.grad(checkpointed, inputs), torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def share_lost(seen: float, implementation: str, chunk_size: int, time: int = 1024) -> float:
    """Of what `time` tokens add to a float32 memory without decay that stands for `seen` tokens, the largest
    share that an element loses or gains by rounding. The state is `seen` times their mean."""
    generator = torch.Generator().manual_seed(0)
    key, value = torch.rand(2, 1, time, 2, 8, generator=generator, dtype=torch.float64) + 0.5
    ones = torch.ones(1, time, 2, 1, dtype=torch.float64)
    tokens = [x.float().double() for x in (key, key, value, ones, ones, 0 * ones)]
    _, added = banked_linear_attention(*tokens, implementation="chunk")
    state = [(seen / time * x).float() for x in added]
    options = {"implementation": implementation, "chunk_size": chunk_size}
    _, after = banked_linear_attention(*(x.float() for x in tokens), initial_state=tuple(state), **options)
    errors = [
        ((end.double() - start.double()) / x - 1).abs().max()
        for end, start, x in zip(after, state, added, strict=True)
    ]
    return float(max(errors))


@pytest.mark.parametrize("chunk_size", [16, 64, 128])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_what_a_long_sum_keeps_of_new_tokens(implementation, chunk_size):
    """The bound of the module's docstring at 10 million tokens: 2^-24 N / C, with one rounding per chunk."""
    bound = 2.0**-24 * 10_001_024 / chunk_size
    assert share_lost(1e7, implementation, chunk_size) < bound
    assert share_lost(1e5, implementation, chunk_size) < 0.01 * bound + 1e-5  # as loose, if less was seen


def test_what_a_long_sum_keeps_of_single_tokens():
    """Token by token, C is 1: a few per cent are lost at 10 million tokens, and all at a billion."""
    assert 0.001 < share_lost(1e7, "recurrent", 1) < 2.0**-24 * 10_001_024
    assert share_lost(1e9, "recurrent", 1) == 1
    assert share_lost(1e9, CHUNKED[0], 128) < 2.0**-24 * 1e9 / 128 * 1.001


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
    monkeypatch.setattr("stackformer.chunks.WORKSPACE", 2**15)
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


# What a tensor may be that no implementation takes, made of a good one.
WRONG = {
    "on another device": lambda x: x.to("meta"),
    "integers": lambda x: x.long(),
    "booleans": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex128),
    "eight bits": lambda x: x.to(torch.float8_e4m3fn),
    "too long": lambda x: torch.cat([x, x], dim=-1),
    "too short": lambda x: x[..., :-1],
    "without elements": lambda x: x[..., :0],
    "without dimensions": lambda x: x.sum(),
    "with a dimension more": lambda x: x.unsqueeze(0),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("time", [1, 4])
@pytest.mark.parametrize("implementation", ["recurrent", *CHUNKED, None])
def test_a_wrong_tensor_is_named(implementation, time, name, wrong):
    """And nobody follows its pointer."""
    inputs = {name: x.detach() for name, x in make_inputs(time=time).items()}
    inputs[name] = wrong(inputs[name])
    with pytest.raises(ValueError, match="must") as error:
        run(inputs, implementation, max_decay=1.0)
    assert_named(error, name, wrong, {"memory": "initial_state[0]", "normalizer": "initial_state[1]"})


def assert_named(error, name, wrong, names):
    if name in ("query", "value", "read", "write") and wrong in (WRONG["too long"], WRONG["too short"]):
        return  # the others are as wrong
    assert f"`{names.get(name, name)}`" in str(error.value)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_tensor_of_a_step_is_named(name, wrong):
    inputs = {name: x.detach() for name, x in make_inputs(time=1).items()}
    inputs |= {n: inputs[n][:, 0] for n in NAMES[:6]}
    inputs[name] = wrong(inputs[name])
    *tokens, memory, normalizer = inputs.values()
    with pytest.raises(ValueError, match="must") as error:
        banked_linear_attention_step(*tokens, (memory, normalizer))
    assert_named(error, name, wrong, {"memory": "state[0]", "normalizer": "state[1]"})


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("name", ["key", "value", "write", "log_decay", "memory", "normalizer"])
def test_a_wrong_tensor_on_the_way_back_is_named(name, wrong):
    inputs = {name: x.detach() for name, x in make_inputs(time=4).items()}
    inputs[name] = wrong(inputs[name])
    state = (inputs["memory"], inputs["normalizer"])
    with pytest.raises(ValueError, match="must") as error:
        reverse_banked_linear_attention(*(inputs[n] for n in ("key", "value", "write", "log_decay")), state)
    assert_named(error, name, wrong, {"memory": "final_state[0]", "normalizer": "final_state[1]"})


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("name", ["log_decay", "memory", "normalizer"])
def test_a_wrong_tensor_of_spans_is_named(name, wrong):
    inputs = {
        "log_decay": -torch.rand(5, 2, 3, 4),
        "memory": torch.rand(5, 2, 3, 4, 6, 7),
        "normalizer": torch.rand(5, 2, 3, 4, 6),
    }
    if name == "memory" and wrong in (WRONG["too long"], WRONG["too short"], WRONG["without elements"]):
        pytest.skip("a memory may have any number of values")
    inputs[name] = wrong(inputs[name])
    with pytest.raises(ValueError, match="must") as error:
        combine_chunks(**inputs)
    assert f"`{name}`" in str(error.value)


@pytest.mark.parametrize("implementation", ["recurrent", "chunk"])
@pytest.mark.parametrize("time", [1, 70])
def test_without_elements_in_memory_it_says_the_shapes(implementation, time):
    """On the meta device, where there is nothing to measure either."""
    inputs = {name: x.to("meta") for name, x in make_inputs(time=time).items()}
    output, (memory, normalizer) = run(inputs, implementation)
    assert output.shape == inputs["value"].shape and output.is_meta
    assert memory.shape == inputs["memory"].shape and normalizer.shape == inputs["normalizer"].shape


@pytest.mark.parametrize("implementation", ["recurrent", *CHUNKED])
@pytest.mark.parametrize("time", [1, 70])
def test_a_batch_without_rows(implementation, time):
    inputs = make_inputs(batch=0, time=time)
    for name, tensor in results_and_gradients(inputs, implementation).items():
        expected = inputs["value"] if name == "output" else inputs[name.split()[-1]]
        assert tensor.shape == expected.shape, name


@pytest.mark.parametrize(
    "change,message",
    [
        ({"implementation": "fast"}, "implementation"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": -3}, "chunk_size"),
        ({"chunk_size": 2.5}, "`chunk_size` must be an integer.*2.5"),
        ({"chunk_size": float("nan")}, "`chunk_size` must be an integer.*nan"),
        ({"eps": -1e-6}, "`eps` must be at least 0.*-1e-06"),
        ({"eps": float("nan")}, "`eps` must be at least 0.*nan"),
        ({"eps": float("inf")}, "`eps` must be .*finite.*inf"),
        ({"max_decay": -0.1}, "`max_decay` must be at least 0.*-0.1"),
        ({"max_decay": float("nan")}, "`max_decay` must be at least 0.*nan"),
        ({"initial_state": (torch.zeros(1),)}, "`initial_state` must be a memory and a normalizer"),
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


@pytest.mark.parametrize("library", [False, pytest.param(True, marks=CHUNKED[1].marks)])
def test_the_first_implementation_that_can_run_is_taken(monkeypatch, library):
    monkeypatch.setattr(implementation_of, "HAS_LIBRARY", library)
    for time, expected in ((1, "recurrent"), (5, "chunk")):
        *tokens, _, _ = make_inputs(time=time).values()
        assert which_implementation(*tokens[:4]) == ("cpp" if library else expected)
        assert which_implementation(*(x.to("meta") for x in tokens[:4])) == expected
        assert which_implementation(*tokens[:4], implementation="recurrent") == "recurrent"


@pytest.mark.parametrize("name", ["recurrent", *CHUNKED])
def test_the_environment_names_an_implementation(monkeypatch, name):
    """Calls that name none take it; it also switches decoding in one call off, unless it is "cpp"."""
    inputs = {key: x.detach() for key, x in make_inputs(time=5).items()}
    tokens = [inputs[key] for key in NAMES[:4]]
    ran, row = [], memory_bank.IMPLEMENTATIONS[name]
    watched = row._replace(run=lambda *args: ran.append(name) or row.run(*args))
    monkeypatch.setitem(memory_bank.IMPLEMENTATIONS, name, watched)
    monkeypatch.setattr(implementation_of, "FROM_ENVIRONMENT", name)
    assert which_implementation(*tokens) == name
    assert which_implementation(*tokens, implementation="chunk") == "chunk"
    run(inputs, None)
    assert ran == [name]
    with torch.no_grad():
        assert can_decode_token(inputs["query"]) == (name == "cpp")


def test_what_the_environment_may_not_name(monkeypatch):
    inputs = make_inputs(time=5)
    monkeypatch.setattr(implementation_of, "FROM_ENVIRONMENT", "fast")
    message = r"`STACKFORMER_IMPLEMENTATION` must be one of \('cpp', .*\) or not set, got 'fast'"
    with pytest.raises(ValueError, match=message):
        run(inputs, None)
    run(inputs, "chunk")
    monkeypatch.setattr(implementation_of, "HAS_LIBRARY", False)
    monkeypatch.setattr(implementation_of, "HAS_TRITON", False)
    for name, reason in (("cpp", "the C.. library was not built"), ("triton", "Triton is not installed")):
        monkeypatch.setattr(implementation_of, "FROM_ENVIRONMENT", name)
        with pytest.raises(ValueError, match=f"`STACKFORMER_IMPLEMENTATION` .*than '{name}' here: {reason}"):
            run(inputs, None)
        with pytest.raises(ValueError, match=f"`implementation` must .* than '{name}' here: {reason}"):
            run(inputs, name)


def test_the_environment_is_read():
    script = (
        "import torch; from stackformer.memory_bank import which_implementation\n"
        "print(which_implementation(*torch.rand(4, 1, 9, 1, 4)))"
    )
    for value, expected in (("recurrent", "recurrent"), ("", "cpp" if is_available() else "chunk")):
        environment = os.environ | {"STACKFORMER_IMPLEMENTATION": value}
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.stdout == expected + "\n", result.stderr


def test_decoding_in_one_call_is_for_plain_tensors_without_gradients():
    hidden = torch.rand(2, 4)
    assert not can_decode_token(hidden)
    with torch.no_grad():
        assert can_decode_token(hidden) == is_available()
        assert not can_decode_token(hidden.to("meta"))
        assert not can_decode_token(torch.nn.Parameter(hidden))


def test_bad_numbers_of_steps_and_ways_back_are_named():
    inputs = {name: x.detach() for name, x in make_inputs(time=1).items()}
    *tokens, memory, normalizer = inputs.values()
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`eps` must be at least 0"):
            banked_linear_attention_step(*(x[:, 0] for x in tokens), (memory, normalizer), eps=eps)
    _, key, value, _, write, log_decay = tokens
    for chunk_size in (0, -1, 0.5):
        with pytest.raises(ValueError, match="`chunk_size` must be an integer"):
            reverse_banked_linear_attention(
                key, value, write, log_decay, (memory, normalizer), chunk_size=chunk_size
            )


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
