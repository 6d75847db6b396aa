"""The kernels against the definition, on a GPU or in Triton's interpreter: outputs, states, all gradients."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from stackformer import memory_bank
from stackformer.memory_bank import banked_linear_attention
from tests.test_memory_bank import LATER, NAMES, WIPED, WRONG, assert_causal, assert_same, make_inputs, run
from tests.test_memory_bank_cpu import VIEWS

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATE = ("memory", "normalizer")


# Triton's interpreter computes in NumPy, which warns of NaN and infinities.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """Triton's interpreter keeps bfloat16 as integers, and multiplies those."""
    if DEVICE == "cuda":
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def create_exact_dot(self, a, b, *arguments):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_exact_dot)


def results_and_gradients(inputs, implementation, **kwargs):
    """As in the tests of the operator, with the same random gradients for every dtype."""
    output, (memory, normalizer) = run(inputs, implementation, **kwargs)
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (result * torch.randn(result.shape, generator=generator).to(result)).sum()
        for result in (output, memory, normalizer)
    )
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    named = {f"gradient of {name}": gradient for name, gradient in zip(NAMES, gradients, strict=True)}
    return {"output": output, "final memory": memory, "final normalizer": normalizer, **named}


def assert_kernels_agree(inputs, rtol=1e-4, dtype=torch.float32, **kwargs):
    """The kernels on `inputs` in `dtype` (states in float32), and the recurrence in float64 on the same."""
    low = {
        name: tensor.detach().to(torch.float32 if name in STATE else dtype) for name, tensor in inputs.items()
    }
    exact = {name: tensor.double().requires_grad_() for name, tensor in low.items()}
    low = {name: tensor.to(DEVICE).requires_grad_() for name, tensor in low.items()}
    actual = results_and_gradients(low, "triton", **kwargs)
    for name, tensor in low.items():
        assert actual[f"gradient of {name}"].dtype == tensor.dtype, name
    assert actual["output"].dtype == dtype and actual["final memory"].dtype == torch.float32
    actual = {name: tensor.detach().cpu().double() for name, tensor in actual.items()}
    assert_same(results_and_gradients(exact, "recurrent", **kwargs), actual, rtol)


SIZES = {
    "one token": {"time": 1, "heads": 1},
    # With `eps`, since without it the gradients of the only memory's weights are rounding errors.
    "one memory": {"time": 20, "memories": 1, "chunk_size": 16, "eps": 0.5},
    "part of a chunk": {"time": 70, "batch": 2},
    "blocks in a chunk": {"time": 150, "memories": 2, "chunk_size": 128, "heads": 1},
    "no power of two": {"time": 11, "memories": 4, "chunk_size": 7},
    "many memories": {"time": 17, "memories": 17, "heads": 1},
    "wide keys": {"time": 20, "memories": 2, "key_size": 70},
    "wide values": {"time": 20, "memories": 2, "value_size": 70},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_kernels_equal_the_recurrence(sizes):
    options = {name: sizes[name] for name in ("chunk_size", "eps") if name in sizes}
    inputs = make_inputs(**{"batch": 1} | {name: size for name, size in sizes.items() if name not in options})
    assert_kernels_agree(inputs, **options)


@pytest.mark.parametrize("dtype,rtol", [(torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
def test_low_precision(dtype, rtol):
    assert_kernels_agree(make_inputs(time=40, batch=1), rtol=rtol, dtype=dtype, chunk_size=32)


@pytest.mark.parametrize("rate", [0.0, 5.0, 50.0])
def test_extreme_decays(rate):
    """Chunks become as short as four tokens, of which the padding of a tile must not overflow."""
    assert_kernels_agree(make_inputs(time=20, batch=1, memories=2, rate=rate), chunk_size=32)


def test_a_token_that_erases_everything():
    inputs = make_inputs(time=6, batch=1, heads=1)
    with torch.no_grad():
        inputs["log_decay"][:, 3] = -300.0
    assert_kernels_agree(inputs)


@pytest.mark.parametrize(
    "which", ["the first token", "at both sides of a chunk's end", "some memories", "several"]
)
@pytest.mark.parametrize("log_decay", [-torch.inf, -95.0])
def test_wiped_memories(which, log_decay):
    inputs = make_inputs(time=40, batch=1)
    with torch.no_grad():
        WIPED[which](inputs["log_decay"]).fill_(log_decay)
    assert_kernels_agree(inputs, chunk_size=32)


def test_nothing_passes_where_all_is_wiped():
    inputs = {name: x.float().detach().to(DEVICE) for name, x in make_inputs(time=20, batch=1).items()}
    inputs["log_decay"][:, 3::4] = -torch.inf
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    gradient = results_and_gradients(inputs, "triton")["gradient of log_decay"]
    assert (gradient[:, 3::4] == 0).all() and (gradient[:, :3] != 0).all()


@pytest.mark.parametrize("value", LATER.values(), ids=LATER.keys())
@pytest.mark.parametrize("name", NAMES[:6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_later_token_that_is_no_number_changes_nothing_before_it(dtype, name, value):
    assert_causal("triton", dtype, name, value, times=(1, 9, 15, 16), time=20, heads=1)


def test_values_that_are_no_numbers_stay_in_their_column():
    """From their token on; blocks of a chunk as well as chunks are crossed."""
    inputs = {name: x.float().detach() for name, x in make_inputs(time=150, memories=2, batch=1).items()}
    inputs["value"][0, 7, 1, 2], inputs["value"][0, 100, 0, 0] = torch.nan, torch.inf
    expected, _ = run(inputs, "recurrent")
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    actual = run(inputs, "triton", chunk_size=128)[0].cpu()
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(actual), finite) and 0 < (~finite).sum() < finite.numel()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("place", range(8), ids=NAMES)
def test_the_operators_called_with_a_wrong_tensor(place, wrong):
    """They raise before a kernel follows its pointer."""
    from stackformer.memory_bank_triton import _backward, _forward

    inputs = [tensor.detach().float().to(DEVICE) for tensor in make_inputs(time=4, batch=1).values()]
    output, memory, normalizer, denominator = _forward(*inputs, 8, 1e-6)
    results = (output, denominator, output, memory, normalizer)
    inputs[place] = wrong(inputs[place])
    with pytest.raises((ValueError, RuntimeError), match="must"):
        run(dict(zip(NAMES, inputs, strict=True)), "triton", max_decay=1.0)
    with pytest.raises((ValueError, RuntimeError)):
        _forward(*inputs, 8, 1e-6)
    with pytest.raises((ValueError, RuntimeError)):
        _backward(*inputs, *results, 8)


def test_a_batch_without_rows():
    inputs = {name: x.float().detach().to(DEVICE) for name, x in make_inputs(time=4, batch=0).items()}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    results = results_and_gradients(inputs, "triton")
    assert all(results[f"gradient of {name}"].shape == x.shape for name, x in inputs.items())


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_as_what_they_are(view):
    inputs = {name: x.float().detach().to(DEVICE) for name, x in make_inputs(time=20, batch=1).items()}
    expected, _ = run(inputs, "triton")
    for name, tensor in inputs.items():
        assert torch.equal(run(inputs | {name: view(tensor)}, "triton")[0], expected), name


def test_zero_writes_leave_the_state_alone():
    inputs = make_inputs(time=20, batch=1)
    with torch.no_grad():
        for name in ("write", "log_decay"):
            inputs[name][:, 5:15] = 0.0
    assert_kernels_agree(inputs, chunk_size=8)
    with torch.no_grad():
        for name in ("write", "log_decay"):
            inputs[name].zero_()
    inputs = {name: tensor.detach().to(DEVICE, torch.float32) for name, tensor in inputs.items()}
    _, state = run(inputs, "triton")
    assert all(torch.equal(actual, inputs[name]) for actual, name in zip(state, STATE, strict=True))


def test_strides_change_nothing():
    """Query, key and value as parts of one projection, and gates with heads first."""
    inputs = {name: x.detach().float().to(DEVICE) for name, x in make_inputs(time=20, batch=1).items()}
    expected, _ = run(inputs, "triton")
    for name in ("query", "key", "value"):
        inputs[name] = torch.cat([inputs[name]] * 2, dim=-1)[..., : inputs[name].shape[-1]]
    for name in ("read", "write", "log_decay"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(inputs[name].is_contiguous() for name in NAMES[:6])
    assert torch.equal(run(inputs, "triton")[0], expected)


def test_the_operator_obeys_the_rules_of_torch():
    """Fake tensors have the right shapes, and nothing is aliased or written to."""
    from stackformer.memory_bank_triton import _forward

    inputs = [tensor.detach().float().to(DEVICE) for tensor in make_inputs(time=9, batch=1).values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_forward, (*inputs, 8, 1e-6), test_utils=tests)


def test_compiled_without_a_graph_break():
    inputs = {name: x.detach().float().to(DEVICE) for name, x in make_inputs(time=9, batch=1).items()}

    def attend(inputs):
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        output, state = run(inputs, "triton", max_decay=1.0)
        return (output.sum() + state[0].sum() + state[1].square().sum()) / 100

    expected = torch.autograd.grad(attend(inputs), list(inputs.values()))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(inputs), list(inputs.values())), expected)
    torch._dynamo.reset()


def test_no_second_derivatives():
    inputs = {name: x.detach().float().to(DEVICE) for name, x in make_inputs(time=3, batch=1).items()}
    inputs["query"].requires_grad_()
    (gradient,) = torch.autograd.grad(run(inputs, "triton")[0].sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_what_the_kernels_cannot_do_is_said(monkeypatch):
    def attempt(**sizes):
        inputs = {"dtype": torch.float32, "batch": 1, "heads": 1, "time": 2, **sizes}
        *tokens, _, _ = (tensor.detach().to(DEVICE) for tensor in make_inputs(**inputs).values())
        banked_linear_attention(*tokens, implementation="triton")

    with pytest.raises(ValueError, match="'triton'.*`query` must be float32.*float64"):
        attempt(dtype=torch.float64)
    with pytest.raises(ValueError, match="'triton'.*at most 128.*200"):
        attempt(value_size=200)
    with pytest.raises(ValueError, match="'triton'.*at most 64 memories.*65"):
        attempt(memories=65)
    monkeypatch.setattr("stackformer.memory_bank_triton.INTERPRETED", False)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="'triton'.*CUDA device, not on cpu"):
            attempt()
    monkeypatch.setattr(memory_bank, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="'triton'.*not installed"):
        attempt()


def test_tensors_on_the_cpu_need_no_triton():
    """Neither the package nor the operator imports it."""
    script = (
        "import sys, torch; from stackformer.memory_bank import banked_linear_attention as attend\n"
        "x = torch.rand(1, 9, 1, 4); attend(x, x, x, x, x, -x)\n"
        "assert 'stackformer.memory_bank_triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu():
    """To machine code of compute capability 9.0: all tiles fit a multiprocessor's 227 KiB, and in bfloat16
    next to nothing is spilled from registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    worker = Path(__file__).parent / "triton_compile_worker.py"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", worker], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == {
        "_total_kernel", "_scan_kernel", "_sums_kernel", "_grad_sums_kernel", "_grad_kernel",
        "_grad_decay_kernel",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared_bytes"] <= 227 * 1024, kernel
        assert kernel["stack_bytes"] <= (64 if kernel["dtype"] == "bfloat16" else 1024), kernel


@pytest.mark.parametrize("failure", [None, "raises", "wrong"])
def test_kernels_are_tried_before_they_are_relied_on(monkeypatch, failure):
    from stackformer import memory_bank_triton

    chunked_attention = memory_bank_triton.chunked_attention

    def broken(*args):
        if failure == "raises":
            raise RuntimeError("no such instruction")
        output, *state = chunked_attention(*args)
        return 2 * output, *state

    if failure is not None:
        monkeypatch.setattr(memory_bank_triton, "chunked_attention", broken)
    memory_bank._triton_works.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert memory_bank._triton_works(torch.device(DEVICE)) == (failure is None)
    memory_bank._triton_works.cache_clear()
    assert any("torch's are used" in str(warning.message) for warning in caught) == (failure is not None)
