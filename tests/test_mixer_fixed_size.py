"""Fixed-size attention: the recurrence, written naively, is the reference; it can be run backwards."""

import pytest
import torch

from stackformer.mixer_fixed_size import FixedSizeAttention, FixedSizeState, fixed_size_attention
from stackformer.token_layout import TokenLayout
from stackformer.training.long_context import long_context_backward
from tests.models import SHAPES, random_ids, spread_weights, tiny_config, tiny_model
from tests.test_long_context import assert_same_gradients
from tests.test_modeling import assert_same_state, gradients_whole_and_through_the_cache, read_in_pieces

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def make_inputs(length, batch=2, heads=3, size=5):
    """Query, feature and a state that is neither zero nor symmetric, in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [normal(length, heads, size), normal(length, heads, size), normal(heads, size, size)]


def naive(query, feature, state, decay, rate):
    """Token by token, as in the paper."""
    outputs = []
    for q, f in zip(query.unbind(1), feature.unbind(1), strict=True):
        state = decay * state + rate * torch.einsum("bhk,bhv->bhkv", f, f)
        outputs.append(torch.einsum("bhkv,bhv->bhk", state, q))
    return torch.stack(outputs, dim=1), state


def with_gradients(function, inputs):
    results = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in results)
    return [*results, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(("decay", "rate"), [(1.0, 1.0), (0.9, 0.5), (1e-3, 2.0)])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
def test_it_is_the_recurrence(chunk_size, decay, rate):
    """Outputs, final state and all gradients, from a state, in chunks that do not divide the length."""

    def chunked(query, feature, state):
        return fixed_size_attention(query, feature, decay, rate, state, chunk_size=chunk_size)

    for length in (1, 7, 19):
        inputs = make_inputs(length)
        expected = with_gradients(lambda *x: naive(*x, decay, rate), inputs)
        torch.testing.assert_close(with_gradients(chunked, inputs), expected, **CLOSE)


@torch.no_grad()
def test_it_is_attention_without_the_softmax():
    """Read after all of a text, it is H^T H q, as in the paper."""
    query, feature, _ = make_inputs(9)
    output, matrix = fixed_size_attention(query, feature, chunk_size=4)
    scores = torch.einsum("bthk,bhk->bth", feature, query[:, -1])
    torch.testing.assert_close(output[:, -1], torch.einsum("bth,bthk->bhk", scores, feature), **CLOSE)
    torch.testing.assert_close(matrix, matrix.mT, **CLOSE)


@torch.no_grad()
def test_no_state_is_zeros_and_no_tokens_change_nothing():
    query, feature, state = make_inputs(9)
    expected = fixed_size_attention(query, feature, 0.9, 1.0, torch.zeros_like(state), chunk_size=4)
    torch.testing.assert_close(
        fixed_size_attention(query, feature, 0.9, 1.0, chunk_size=4), expected, rtol=0, atol=0
    )
    none = torch.zeros(2, dtype=torch.long)
    assert torch.equal(fixed_size_attention(query, feature, 0.9, 1.0, state, none, chunk_size=4)[1], state)


def test_bad_chunk_size():
    query, feature, _ = make_inputs(3)
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        fixed_size_attention(query, feature, chunk_size=0)


def mixer_and_tokens(decay: float):
    torch.manual_seed(0)
    mixer = spread_weights(FixedSizeAttention(tiny_config(fast_weights_decay=decay))).double()
    hidden = torch.randn(3, 13, 16, dtype=torch.float64)
    state = FixedSizeState(
        torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.randn(3, 3, 32, dtype=torch.float64)
    )
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[0, :2], mask[1, 5:7], mask[2, 3:] = False, False, False
    return mixer, hidden, mask, state


@torch.no_grad()
def test_rows_of_a_batch_are_alone():
    """Paddings, anywhere, and halted tokens of a compiled step leave no trace in output and state."""
    mixer, hidden, mask, state = mixer_and_tokens(decay=0.9)
    layout = TokenLayout.from_mask(mask)
    mixed, after, _ = mixer(layout.gather(hidden), None, layout, state)
    mixed = layout.scatter(mixed, torch.zeros_like(hidden))
    for row in range(3):
        alone = hidden[row, mask[row]]
        before = FixedSizeState(*(x[row : row + 1] for x in state))
        expected = mixer(alone, None, TokenLayout.full(1, len(alone)), before)
        torch.testing.assert_close(mixed[row, mask[row]], expected[0], **CLOSE)
        torch.testing.assert_close(tuple(x[row : row + 1] for x in after), tuple(expected[1]), **CLOSE)

    one_token = TokenLayout.full(3, 1).masked(torch.tensor([True, False, True]))
    after = mixer(hidden[:, 0], None, one_token, state)[1]
    changed = [
        [not torch.equal(x[row], y[row]) for x, y in zip(after, state, strict=True)] for row in range(3)
    ]
    assert changed == [[True, True], [False, False], [True, True]]


@pytest.mark.parametrize("decay", [1.0, 0.9])
@torch.no_grad()
def test_it_goes_back(decay):
    mixer, hidden, mask, state = mixer_and_tokens(decay)
    layout = TokenLayout.from_mask(mask)
    inputs = mixer.project(layout.gather(hidden), None, layout, state)
    end = mixer.mix(layout.gather(hidden), inputs, layout, state)[1]
    torch.testing.assert_close(mixer.reverse(inputs, end)[0], state.matrix, **CLOSE)
    expected = -mask.sum(1).double() * torch.tensor(decay, dtype=torch.float64).log()
    torch.testing.assert_close(mixer.total_decay(inputs), expected.unsqueeze(1).expand(3, 2), **CLOSE)


PLAIN = SHAPES["plain core"] | {"mixer_types": ["fixed_size_attention"] * 2}
both = pytest.mark.parametrize("shape", [PLAIN, SHAPES["fixed-size attention"]], ids=["plain", "stack"])


@both
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


@both
def test_long_contexts_compute_states_backwards(shape):
    ids = random_ids(2, 23)
    expected, model = tiny_model(**shape).train(), tiny_model(**shape).train()
    expected(ids, labels=ids).loss.backward()
    output = long_context_backward(model, ids, labels=ids, chunk_size=6, method="reverse")
    assert_same_gradients(model, expected)
    assert output.drift < 1e-10


@torch.no_grad()
def test_states_are_float32_under_autocast():
    model, ids = tiny_model(torch.float32, noise=0.05, **PLAIN), random_ids(2, 40)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, use_cache=True)
    state = outputs.past_key_values.layers[0].slices[0]
    assert {tensor.dtype for tensor in state} == {torch.float32}
    assert (outputs.logits.float() - expected).abs().mean() < 0.05 * expected.std()
