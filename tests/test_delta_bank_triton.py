"""The border to the Triton kernels of the banked delta rule: which tensors they take, and when.

Their outputs, states and gradients are in tests/test_delta_bank.py; tests/test_memory_bank_triton.py compiles
them to machine code.
"""

import subprocess
import sys
import warnings

import pytest
import torch

from stackformer import delta_bank
from stackformer import implementation as implementation_of
from stackformer.delta_bank import banked_delta_rule
from tests.test_delta_bank import NAMES, as_taken, make_inputs, with_gradients
from tests.test_memory_bank import WRONG
from tests.test_memory_bank_cpu import VIEWS

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small_inputs(time=9, batch=1, **sizes):
    inputs, _ = as_taken("triton", make_inputs(time, batch, **sizes))
    return {name: x.detach() for name, x in inputs.items()}


def run(inputs, **options):
    return banked_delta_rule(**inputs, implementation="triton", **options)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("place", range(8), ids=NAMES)
def test_the_operators_called_with_a_wrong_tensor(place, wrong):
    """They raise before a kernel follows its pointer."""
    from stackformer.delta_bank_triton import _backward, _forward

    inputs = list(small_inputs(4).values())
    output, errors, memory, states = _forward(*inputs, 8)
    results = (errors, states, output, memory)
    inputs[place] = wrong(inputs[place])
    with pytest.raises((ValueError, RuntimeError), match="must"):
        run(dict(zip(NAMES, inputs, strict=True)), max_decay=1.0)
    with pytest.raises((ValueError, RuntimeError)):
        _forward(*inputs, 8)
    if place < 7:
        with pytest.raises((ValueError, RuntimeError)):
            _backward(*inputs[:7], *results, 8)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("place", range(4))
def test_the_backward_pass_called_with_a_wrong_result(place, wrong):
    from stackformer.delta_bank_triton import _backward, _forward

    *inputs, memory = small_inputs(4).values()
    output, errors, memory, states = _forward(*inputs, memory, 8)
    results = [errors, states, output, memory]
    results[place] = wrong(results[place])
    with pytest.raises((ValueError, RuntimeError)):
        _backward(*inputs, *results, 8)


def test_a_batch_without_rows():
    inputs = {name: x.requires_grad_() for name, x in small_inputs(4, batch=0).items()}
    _, _, *gradients = with_gradients(banked_delta_rule, inputs, implementation="triton")
    assert [x.shape for x in gradients] == [x.shape for x in inputs.values()]


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_as_what_they_are(view):
    inputs = small_inputs()
    expected, _ = run(inputs)
    for name, tensor in inputs.items():
        assert torch.equal(run(inputs | {name: view(tensor)})[0], expected), name


def test_only_one_result_has_a_gradient():
    inputs = {name: x.requires_grad_() for name, x in small_inputs().items()}
    for result in range(2):
        gradients = [
            torch.autograd.grad(banked_delta_rule(**inputs, implementation=name)[result].sum(), inputs["key"])
            for name in ("triton", "chunk")
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_the_operator_obeys_the_rules_of_torch():
    """Fake tensors have the right shapes, and nothing is aliased or written to."""
    from stackformer.delta_bank_triton import _backward, _forward

    inputs = tuple(small_inputs().values())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_forward, (*inputs, 8), test_utils=tests)
    output, errors, memory, states = _forward(*inputs, 8)
    arguments = (*inputs[:7], errors, states, output, memory, 8)
    torch.library.opcheck(_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_without_a_graph_break():
    inputs = small_inputs()

    def correct(inputs):
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        output, state = run(inputs, max_decay=1.0)
        return output.square().sum() + state.square().sum()

    expected = torch.autograd.grad(correct(inputs), list(inputs.values()))
    compiled = torch.compile(correct, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(inputs), list(inputs.values())), expected)
    torch._dynamo.reset()


def test_no_second_derivatives():
    inputs = small_inputs(3)
    inputs["query"].requires_grad_()
    (gradient,) = torch.autograd.grad(run(inputs)[0].sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_what_the_kernels_cannot_do_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r"'triton'.*`query` must be float32.*float64"):
        run(make_inputs(2))
    with pytest.raises(ValueError, match=r"'triton'.*at most 128.*200"):
        run(small_inputs(2, value_size=200))
    with pytest.raises(ValueError, match=r"'triton'.*at most 64 memories.*65"):
        run(small_inputs(2, memories=65))
    monkeypatch.setattr("stackformer.memory_bank_triton.INTERPRETED", False)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"'triton'.*CUDA device, not on cpu"):
            run(small_inputs(2))
    monkeypatch.setattr(implementation_of, "HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"'triton'.*not installed"):
        run(small_inputs(2))


def test_tensors_on_the_cpu_need_no_triton():
    """Neither the package nor the operator imports it."""
    script = (
        "import sys, torch; from stackformer.delta_bank import banked_delta_rule as correct\n"
        "x = torch.rand(1, 9, 1, 4); correct(x, x, x, x, x, -x, x[..., 0])\n"
        "assert not any('triton' in name for name in sys.modules if name.startswith('stackformer'))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("failure", [None, "raises", "wrong"])
def test_kernels_are_tried_before_they_are_relied_on(monkeypatch, failure):
    from stackformer import delta_bank_triton

    chunked_delta_rule = delta_bank_triton.chunked_delta_rule

    def broken(*args):
        if failure == "raises":
            raise RuntimeError("no such instruction")
        output, state = chunked_delta_rule(*args)
        return 2 * output, state

    if failure is not None:
        monkeypatch.setattr(delta_bank_triton, "chunked_delta_rule", broken)
    delta_bank._triton_works.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert delta_bank._triton_works(torch.device(DEVICE)) == (failure is None)
    delta_bank._triton_works.cache_clear()
    assert any("torch's are used" in str(warning.message) for warning in caught) == (failure is not None)
