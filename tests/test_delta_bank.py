"""The banked delta rule: all implementations compute the recurrence, which is written naively here."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from stackformer import delta_bank
from stackformer import implementation as implementation_of
from stackformer.delta_bank import banked_delta_rule, banked_delta_rule_step, which_implementation
from stackformer.library import is_available

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
NAMES = ("query", "key", "value", "read", "write", "log_decay", "step_size", "initial_state")
CHUNKED = [
    "chunk",
    pytest.param("cpp", marks=pytest.mark.skipif(not is_available(), reason="the library was not built")),
]
every_chunked = pytest.mark.parametrize("implementation", CHUNKED)
# One memory without decay, a bank, a bank that forgets all, sizes of whole vectors, and the smallest ones.
SIZES = [
    {"memories": 1, "rate": 0.0},
    {"memories": 3},
    {"memories": 2, "rate": 40.0},
    {"memories": 4, "key_size": 16, "value_size": 32, "heads": 1},
    {"memories": 5, "key_size": 1, "value_size": 1, "batch": 1},
]


def make_inputs(
    time=19, batch=2, heads=3, key_size=5, value_size=4, memories=3, rate=0.7, dtype=torch.float64, seed=0
):
    """The tensors of a call by name, with keys of length 1 over all memories, and a state that is not 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    tensors = {
        "query": normalize(normal(time, heads, key_size), dim=-1),
        "key": normalize(normal(time, heads, key_size), dim=-1),
        "value": normal(time, heads, value_size),
        "read": normal(time, heads, memories).softmax(-1),
        "write": normal(time, heads, memories).softmax(-1).sqrt(),
        "log_decay": -rate * normal(time, heads, memories).sigmoid(),
        "step_size": 2 * normal(time, heads).sigmoid(),
        "initial_state": normal(heads, memories, key_size, value_size),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def naive(query, key, value, read, write, log_decay, step_size, initial_state):
    """Token by token, as in the docstring of the module."""
    state, outputs = initial_state, []
    for q, k, v, r, w, g, b in zip(
        *(x.unbind(1) for x in (query, key, value, read, write, log_decay, step_size)), strict=True
    ):
        kept = g.exp()[..., None, None] * state
        held = torch.einsum("bhm,bhk,bhmkv->bhv", w, k, kept)
        change = b.unsqueeze(-1) * (v - held)
        state = kept + torch.einsum("bhm,bhk,bhv->bhmkv", w, k, change)
        outputs.append(torch.einsum("bhm,bhk,bhmkv->bhv", r, q, state))
    return torch.stack(outputs, dim=1), state


def with_gradients(function, inputs, **options):
    """Output and final state, and the gradients of both with respect to all inputs."""
    results = function(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
        for x in results
    )
    return [*results, *torch.autograd.grad(loss, tuple(inputs.values()))]


def compare(actual, expected, **close):
    for name, one, other in zip(("output", "state", *NAMES), actual, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", **close)


@every_chunked
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 33, 100])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_the_recurrence(implementation, sizes, chunk_size):
    """Outputs, final state and all gradients, from a state, in chunks that do not divide the length."""
    for time in (1, 7, 70):
        inputs = make_inputs(time, **sizes)
        actual = with_gradients(
            banked_delta_rule, inputs, implementation=implementation, chunk_size=chunk_size
        )
        compare(actual, with_gradients(naive, inputs), **CLOSE)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_recurrence_and_one_step(sizes):
    inputs = make_inputs(6, **sizes)
    expected = with_gradients(naive, inputs)
    compare(with_gradients(banked_delta_rule, inputs, implementation="recurrent"), expected, **CLOSE)

    def by_steps(initial_state, **inputs):
        state, outputs = initial_state, []
        for token in range(6):
            output, state = banked_delta_rule_step(*(x[:, token] for x in inputs.values()), state)
            outputs.append(output)
        return torch.stack(outputs, dim=1), state

    compare(with_gradients(by_steps, inputs), expected, **CLOSE)


@every_chunked
def test_groups_of_chunks(monkeypatch, implementation):
    """However few chunks fit the work space."""
    inputs = make_inputs(150)
    expected = with_gradients(naive, inputs)
    for workspace in (1, 2**13):
        monkeypatch.setattr("stackformer.chunks.WORKSPACE", workspace)
        actual = with_gradients(banked_delta_rule, inputs, implementation=implementation, chunk_size=16)
        compare(actual, expected, **CLOSE)


@every_chunked
def test_splits_and_single_tokens(implementation):
    inputs = make_inputs(21)

    def in_calls(initial_state, **inputs):
        state, outputs = initial_state, []
        for part in zip(*(x.split([4, 1, 1, 15], dim=1) for x in inputs.values()), strict=True):
            output, state = banked_delta_rule(*part, state, chunk_size=6, implementation=implementation)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    compare(with_gradients(in_calls, inputs), with_gradients(naive, inputs), **CLOSE)


@every_chunked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(implementation, dtype):
    """The state is in float32; results and gradients have the dtypes of their tensors."""
    inputs = make_inputs(90, key_size=16, value_size=16, dtype=dtype)
    inputs["initial_state"] = inputs["initial_state"].detach().float().requires_grad_()
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    actual = with_gradients(banked_delta_rule, inputs, implementation=implementation)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    assert [x.dtype for x in actual[2:]] == [x.dtype for x in inputs.values()]
    for name, one, other in zip(
        ("output", "state", *NAMES), actual, with_gradients(naive, exact), strict=True
    ):
        error = (one.double() - other).norm() / other.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.03), (name, error)


@torch.no_grad()
@every_chunked
def test_no_state_is_zeros_and_zero_gates_change_nothing(implementation):
    inputs = make_inputs(9)
    none = torch.zeros_like(inputs["write"])
    options = {"implementation": implementation, "chunk_size": 4}
    kept = banked_delta_rule(**(inputs | {"write": none, "log_decay": none}), **options)[1]
    assert torch.equal(kept, inputs["initial_state"])
    zeros = inputs | {"initial_state": torch.zeros_like(inputs["initial_state"])}
    without = inputs | {"initial_state": None}
    compare_results = zip(
        banked_delta_rule(**without, **options), banked_delta_rule(**zeros, **options), strict=True
    )
    assert all(torch.equal(one, other) for one, other in compare_results)


@torch.no_grad()
@every_chunked
def test_it_corrects_what_it_holds(implementation):
    """Of many values written to a key, the last is read, whichever memories it was written to."""
    inputs = make_inputs(40)
    key = inputs["key"][:, :1].expand_as(inputs["key"])
    write = inputs["write"][:, :1].expand_as(inputs["write"])
    ones = torch.ones_like(inputs["step_size"])
    output, _ = banked_delta_rule(
        key, key, inputs["value"], write, write, 0 * write, ones, implementation=implementation
    )
    torch.testing.assert_close(output, inputs["value"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("step", [1.0, 2.0])
def test_it_stays_bounded_over_100000_tokens(step):
    """With keys almost alike, in float32: the transitions alone, which may only turn and shrink it."""
    generator = torch.Generator().manual_seed(0)
    state, norms = torch.randn(1, 1, 4, 8, 8, generator=generator), []
    for _ in range(25):
        query, key = torch.randn(2, 1, 4000, 1, 8, generator=generator)
        key = normalize(key[:, :1] + 0.1 * key, dim=-1)
        share = torch.randn(1, 4000, 1, 4, generator=generator).softmax(-1)
        steps = torch.full((1, 4000, 1), step)
        gates = (share, share.sqrt(), torch.zeros_like(share), steps)
        _, state = banked_delta_rule(query, key, torch.zeros_like(query), *gates, state)
        norms.append(float(state.norm()))
    assert math.isfinite(norms[-1]) and max(norms) <= norms[0] * (1 + 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("decay", [0.0, 100.0])
def test_long_texts_in_float32(decay):
    """With full writes to keys that are all alike, and with decays that vanish, nothing grows."""
    inputs = {name: x.detach().float() for name, x in make_inputs(1000, rate=decay).items()}
    inputs["key"] = normalize(inputs["key"][:, :1] + 0.01 * inputs["key"], dim=-1)
    inputs["step_size"] = torch.ones_like(inputs["step_size"])
    exact = naive(**{name: x.double() for name, x in inputs.items()})
    for implementation in ("chunk", None):
        actual = banked_delta_rule(**inputs, implementation=implementation)
        for one, other in zip(actual, exact, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@every_chunked
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_that_is_no_number(implementation, name, value, dtype):
    """Nothing before and beside it changes; behind it, the same outputs are numbers as in the recurrence."""
    inputs = {key: x.detach() for key, x in make_inputs(40, dtype=dtype).items()}
    options = {"chunk_size": 16, "implementation": implementation}
    before, _ = banked_delta_rule(**inputs, **options)
    inputs[name] = inputs[name].clone()
    inputs[name][0, 20, 1, ...] = -value if name == "log_decay" else value
    if name == "value":
        inputs[name][0, 20, 1, 1:] = 0.5
    actual, _ = banked_delta_rule(**inputs, **options)
    expected, _ = banked_delta_rule(**inputs, implementation="recurrent")
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else CLOSE
    torch.testing.assert_close(actual[0, :20], before[0, :20], **close)
    torch.testing.assert_close(actual[:, :, 0], before[:, :, 0], **close)
    torch.testing.assert_close(actual[1], before[1], **close)
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite], **close)
    assert torch.equal(actual.isfinite(), finite)


@every_chunked
def test_wiped_memories(implementation):
    """-inf leaves nothing of them, and no gradient passes."""
    inputs = make_inputs(50)
    with torch.no_grad():
        inputs["log_decay"][0, 20, :, 1] = -torch.inf
        inputs["log_decay"][1, ::7] = -torch.inf
    actual = with_gradients(banked_delta_rule, inputs, implementation=implementation, chunk_size=16)
    expected = with_gradients(naive, inputs)
    expected[2 + NAMES.index("log_decay")].nan_to_num_(0.0)
    compare(actual, expected, **CLOSE)


def test_compiled():
    inputs = {name: x.detach().requires_grad_() for name, x in make_inputs(40).items()}

    def run(**inputs):
        return banked_delta_rule(**inputs, max_decay=0.7)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compare(with_gradients(compiled, inputs), with_gradients(run, inputs), **CLOSE)


def test_which_implementation_runs(monkeypatch):
    long, one = (list(make_inputs(time).values())[:4] for time in (5, 1))
    assert which_implementation(*long) == ("cpp" if is_available() else "chunk")
    monkeypatch.setattr(implementation_of, "HAS_LIBRARY", False)
    assert which_implementation(*long) == "chunk" and which_implementation(*one) == "recurrent"
    monkeypatch.setattr(implementation_of, "FROM_ENVIRONMENT", "recurrent")
    assert which_implementation(*long) == "recurrent"
    with pytest.raises(ValueError, match=r"`implementation` must be one of .*'chunk'.* or None, got 'fast'"):
        which_implementation(*long, implementation="fast")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1, got 0"),
        ({"max_decay": -1.0}, "`max_decay` must be at least 0, got -1.0"),
        ({"step_size": torch.ones(2, 3)}, r"`step_size` must have shape \(2, 3, 3\) to go with `query`"),
        ({"key": torch.ones(2, 3, 3, 4)}, r"`key` must have shape \(2, 3, 3, 5\)"),
        ({"initial_state": torch.ones(2, 3, 3, 5, 5)}, r"`initial_state` must have shape \(2, 3, 3, 5, 4\)"),
        ({"write": torch.ones(2, 3, 3, 3).int()}, "`write` must be one of"),
        ({"value": torch.ones(2, 3, 3, 4, device="meta")}, "`value` must be on cpu as `query` is"),
    ],
    ids=str,
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        banked_delta_rule(**(make_inputs(3) | changes))


def test_the_table_names_what_the_docstring_names():
    assert all(f'"{name}"' in banked_delta_rule.__doc__ for name in delta_bank.IMPLEMENTATIONS)
