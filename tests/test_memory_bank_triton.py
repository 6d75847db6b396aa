"""The border to the Triton kernels, on a GPU or in Triton's interpreter: which tensors they take, and when.

Their outputs, states and gradients are in the table of tests/test_memory_bank.py.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from stackformer import implementation as implementation_of
from stackformer import memory_bank
from stackformer.memory_bank import banked_linear_attention
from tests.test_memory_bank import (
    LATER,
    NAMES,
    WRONG,
    assert_causal,
    make_inputs,
    multiply_bfloat16_in_the_interpreter,
    results_and_gradients,
    run,
)
from tests.test_memory_bank_cpu import VIEWS

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATE = ("memory", "normalizer")


# Triton's interpreter computes in NumPy, which warns of NaN and infinities.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    multiply_bfloat16_in_the_interpreter(monkeypatch)


@pytest.mark.parametrize("value", LATER.values(), ids=LATER.keys())
@pytest.mark.parametrize("name", NAMES[:6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_later_token_that_is_no_number_changes_nothing_before_it(dtype, name, value):
    assert_causal("triton", dtype, name, value, times=(1, 9, 15, 16), time=20, heads=1)


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
    monkeypatch.setattr(implementation_of, "HAS_TRITON", False)
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
