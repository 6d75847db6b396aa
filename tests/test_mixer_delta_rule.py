"""The delta rule: the recurrence, written naively, is the reference; rows are alone, splits do not matter."""

import pytest
import torch
from torch.nn.functional import normalize

from stackformer.mixer_delta_rule import DeltaRule, DeltaRuleState, delta_rule
from stackformer.token_layout import TokenLayout
from tests.models import SHAPES, random_ids, tiny_config, tiny_model
from tests.test_modeling import assert_same_state, gradients_whole_and_through_the_cache, read_in_pieces

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def make_inputs(length, batch=2, heads=3, key_size=5, value_size=4, decay=0.7, seed=0):
    """Query, key, value, write, log decay and a state that is not zero, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    query, key = (normalize(normal(length, heads, key_size), dim=-1) for _ in range(2))
    write, log_decay = normal(length, heads).sigmoid(), -decay * normal(length, heads).sigmoid()
    inputs = query, key, normal(length, heads, value_size), write, log_decay
    return [x.requires_grad_() for x in (*inputs, normal(heads, key_size, value_size))]


def naive(query, key, value, write, log_decay, state):
    """Token by token, as in the papers."""
    outputs = []
    for q, k, v, b, a in zip(*(x.unbind(1) for x in (query, key, value, write, log_decay)), strict=True):
        state = a.exp()[..., None, None] * state
        missing = v - torch.einsum("bhkv,bhk->bhv", state, k)
        state = state + torch.einsum("bhk,bhv->bhkv", k, b.unsqueeze(-1) * missing)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q))
    return torch.stack(outputs, dim=1), state


def in_two_calls(query, key, value, write, log_decay, state, first=4):
    """The second goes on from the state of the first; then each token by itself."""
    tokens, outputs = (query, key, value, write, log_decay), []
    sizes = [first] + [1] * (query.shape[1] - first)
    for span in zip(*(x.split(sizes, dim=1) for x in tokens), strict=True):
        output, state = delta_rule(*span, state, chunk_size=3)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def with_gradients(function, inputs):
    """Output and final state, and the gradients of both with respect to all inputs."""
    results = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in results)
    return [*results, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("decay", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
def test_it_is_the_recurrence(chunk_size, decay):
    """Outputs, final state and all gradients, from a state, in chunks that do not divide the length."""
    for length in (1, 7, 19):
        inputs = make_inputs(length, decay=decay)
        actual = with_gradients(lambda *x: delta_rule(*x, chunk_size=chunk_size), inputs)
        torch.testing.assert_close(actual, with_gradients(naive, inputs), **CLOSE)


def test_splits_and_single_tokens():
    inputs = make_inputs(11)
    torch.testing.assert_close(with_gradients(in_two_calls, inputs), with_gradients(naive, inputs), **CLOSE)


@torch.no_grad()
def test_no_state_is_zeros_and_zero_gates_change_nothing():
    *tokens, state = make_inputs(9)
    expected = delta_rule(*tokens, torch.zeros_like(state), chunk_size=4)
    torch.testing.assert_close(delta_rule(*tokens, chunk_size=4), expected, rtol=0, atol=0)
    query, key, value, write, log_decay = tokens
    none = torch.zeros_like(write)
    assert torch.equal(delta_rule(query, key, value, none, none, state, chunk_size=4)[1], state)


@torch.no_grad()
def test_it_corrects_what_it_holds():
    """Of many values written to a key, the last is read: a sum would hold all of them."""
    query, key, value, write, _, state = make_inputs(40)
    key = key[:, :1].expand_as(key)
    output, _ = delta_rule(key, key, value, torch.ones_like(write), torch.zeros_like(write), state)
    torch.testing.assert_close(output, value, **CLOSE)


@torch.no_grad()
def test_long_texts_in_float32():
    """With full writes to keys that are all alike, and with decays that vanish, nothing grows."""
    query, key, value, write, log_decay, _ = (x.float() for x in make_inputs(1000, decay=100.0))
    key = normalize(key[:, :1] + 0.01 * key, dim=-1)
    for gates in (torch.zeros_like(write), log_decay):
        output, state = delta_rule(query, key, value, torch.ones_like(write), gates)
        inputs = [x.double() for x in (query, key, value, torch.ones_like(write), gates)]
        expected = naive(*inputs, torch.zeros_like(state).double())
        torch.testing.assert_close((output.double(), state.double()), expected, rtol=1e-3, atol=1e-3)


def test_bad_chunk_size():
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        delta_rule(*make_inputs(3), chunk_size=0)


@torch.no_grad()
def test_rows_of_a_batch_are_alone():
    """Paddings, anywhere, and halted tokens of a compiled step leave no trace in output and state."""
    torch.manual_seed(0)
    mixer = DeltaRule(tiny_config()).double()
    for parameter in mixer.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    hidden = torch.randn(3, 13, 16, dtype=torch.float64)
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[0, :2], mask[1, 5:7], mask[2, 4:] = False, False, False
    state = DeltaRuleState(
        torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.randn(3, 3, 48, dtype=torch.float64)
    )
    layout = TokenLayout.from_mask(mask)
    mixed, after, _ = mixer(layout.gather(hidden), None, layout, state)
    mixed = layout.scatter(mixed, torch.zeros_like(hidden))
    for row in range(3):
        alone = hidden[row, mask[row]]
        before = DeltaRuleState(*(x[row : row + 1] for x in state))
        expected = mixer(alone, None, TokenLayout.full(1, len(alone)), before)
        torch.testing.assert_close(mixed[row, mask[row]], expected[0], **CLOSE)
        torch.testing.assert_close(tuple(x[row : row + 1] for x in after), tuple(expected[1]), **CLOSE)

    one_token = TokenLayout.full(3, 1).masked(torch.tensor([True, False, True]))
    after = mixer(hidden[:, 0], None, one_token, state)[1]
    changed = [
        [not torch.equal(x[row], y[row]) for x, y in zip(after, state, strict=True)] for row in range(3)
    ]
    assert changed == [[True, True], [False, False], [True, True]]


PLAIN = SHAPES["plain core"] | {"mixer_types": ["delta_rule"] * 2}


@pytest.mark.parametrize("shape", [PLAIN, SHAPES["delta rule"]], ids=["plain", "stack"])
@torch.no_grad()
def test_splits_of_a_text(shape):
    model, ids = tiny_model(**shape), random_ids(2, 15)
    expected = model(ids, use_cache=True)
    logits, cache = read_in_pieces(model, ids, [4, 1, 9, 1])
    torch.testing.assert_close(logits, expected.logits, **CLOSE)
    assert_same_state(cache, expected.past_key_values)


def test_gradients_flow_through_the_cache():
    model, ids = tiny_model(**PLAIN).train(), random_ids(2, 20)
    expected, actual = gradients_whole_and_through_the_cache(model, ids)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert all(gradient.abs().max() > 0 for gradient in actual)


@torch.no_grad()
def test_states_are_float32_under_autocast():
    model, ids = tiny_model(torch.float32, noise=0.05, **PLAIN), random_ids(2, 40)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, use_cache=True)
    state = outputs.past_key_values.layers[0].slices[0]
    assert {tensor.dtype for tensor in state} == {torch.float32}
    assert (outputs.logits.float() - expected).abs().mean() < 0.05 * expected.std()
