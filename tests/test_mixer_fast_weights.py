"""Fast weights with an inner loop: the equations, with the matrix itself, are the reference."""

import pytest
import torch
from torch.nn.functional import layer_norm

from stackformer import StackformerConfig
from stackformer.mixer_fast_weights import FastWeights, FastWeightsState, add_outer_products
from stackformer.token_layout import TokenLayout
from tests.models import SHAPES, random_ids, spread_weights, tiny_config, tiny_model
from tests.test_modeling import assert_same_state, gradients_whole_and_through_the_cache, read_in_pieces

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SIZE = 7


def fast_weights(steps: int = 2, chunk_size: int | None = 4, **fields) -> FastWeights:
    torch.manual_seed(0)
    fields = {"num_attention_heads": 1, "fast_weights_steps": steps, "chunk_size": chunk_size} | fields
    return spread_weights(
        FastWeights(StackformerConfig(hidden_size=SIZE, bottleneck_size=None, **fields))
    ).double()


def inputs(length: int, batch: int = 3):
    """Tokens [batch, length, d], and a state that is not zero."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(batch, length, SIZE), FastWeightsState(normal(batch, SIZE), 0.3 * normal(batch, SIZE, SIZE))


def naive(mixer: FastWeights, hidden, vector, matrix):
    """Equations 1 and 2, token by token, with a matrix for each token."""
    outputs = []
    for x in hidden.unbind(1):
        given = vector @ mixer.recurrent_proj.weight.mT + x @ mixer.in_proj.weight.mT
        settling = given.relu()
        for _ in range(mixer.num_inner_steps):
            pulled = given + torch.einsum("bij,bj->bi", matrix, settling)
            settling = layer_norm(pulled, (SIZE,), mixer.norm.weight, mixer.norm.bias, mixer.norm.eps).relu()
        vector = settling
        matrix = mixer.decay * matrix + mixer.rate * torch.einsum("bi,bj->bij", vector, vector)
        outputs.append(vector @ mixer.o_proj.weight.mT)
    return torch.stack(outputs, dim=1), vector, matrix


def whole(mixer: FastWeights, hidden, *state):
    layout = TokenLayout.full(*hidden.shape[:2])
    mixed, state, none = mixer(hidden.flatten(0, 1), None, layout, FastWeightsState(*state))
    assert none is None
    return mixed.view(hidden.shape), *state


def in_calls(mixer: FastWeights, hidden, *state, sizes=(5, 1, 1, 4)):
    """Every call goes on from the state of the one before it."""
    outputs = []
    for part in hidden.split([*sizes, hidden.shape[1] - sum(sizes)], dim=1):
        mixed, *state = whole(mixer, part, *state)
        outputs.append(mixed)
    return torch.cat(outputs, dim=1), *state


def with_gradients(function, mixer, hidden, state):
    """Outputs and last state, and the gradients with respect to tokens, first state and weights."""
    leaves = [x.clone().requires_grad_() for x in (hidden, *state)]
    results = function(mixer, *leaves)
    generator = torch.Generator().manual_seed(2)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in results)
    gradients = torch.autograd.grad(loss, [*leaves, *mixer.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    return [*results, *gradients]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, None])
def test_it_is_the_recurrence(chunk_size, steps):
    """Outputs, state and all gradients, from a state, in chunks that do not divide the length."""
    for length in (2, 13):
        mixer, (hidden, state) = fast_weights(steps, chunk_size), inputs(length)
        expected = with_gradients(naive, mixer, hidden, state)
        torch.testing.assert_close(with_gradients(whole, mixer, hidden, state), expected, **CLOSE)


@pytest.mark.parametrize(("decay", "rate"), [(1.0, 1.0), (0.5, 0.1), (1e-3, 2.0)])
def test_decay_and_rate(decay, rate):
    mixer = fast_weights(fast_weights_decay=decay, fast_weights_rate=rate)
    hidden, state = inputs(11)
    expected = with_gradients(naive, mixer, hidden, state)
    torch.testing.assert_close(with_gradients(whole, mixer, hidden, state), expected, **CLOSE)


def test_splits_and_single_tokens():
    mixer, (hidden, state) = fast_weights(), inputs(13)
    expected = with_gradients(naive, mixer, hidden, state)
    torch.testing.assert_close(with_gradients(in_calls, mixer, hidden, state), expected, **CLOSE)


@torch.no_grad()
def test_no_state_is_zeros():
    mixer, (hidden, state) = fast_weights(), inputs(9)
    mixed, after, _ = mixer(hidden.flatten(0, 1), None, TokenLayout.full(3, 9))
    expected = whole(mixer, hidden, *(torch.zeros_like(x) for x in state))
    torch.testing.assert_close((mixed.view(hidden.shape), *after), expected, rtol=0, atol=0)


@torch.no_grad()
def test_it_starts_as_in_the_paper():
    """W is 0.05 times the identity, and by default a token settles in one step."""
    mixer = tiny_model(noise=0.0, mixer_types=["fast_weights"] * 2).model.layers[0].mixer
    assert torch.equal(mixer.recurrent_proj.weight, 0.05 * torch.eye(16))
    assert (mixer.num_inner_steps, mixer.decay, mixer.rate) == (1, 0.95, 0.5)


@torch.no_grad()
def test_settling_recalls_what_was_similar():
    """Of stored vectors without overlap, a part of one brings back the rest, and more steps bring more."""
    size, pull = 12, []
    for steps in (1, 4):
        config = StackformerConfig(
            hidden_size=size, bottleneck_size=None, num_attention_heads=1, fast_weights_steps=steps
        )
        mixer = FastWeights(config).double()
        mixer.in_proj.weight.copy_(torch.eye(size))
        mixer.recurrent_proj.weight.zero_()
        stored = torch.zeros(1, 2, size, dtype=torch.float64)
        stored[0, 0, :4], stored[0, 1, 4:8] = 1, 1
        cue = torch.zeros(1, 1, size, dtype=torch.float64)
        cue[0, 0, 0] = 1
        matrix = add_outer_products(torch.zeros(1, size, size), stored, stored, None, 1.0, 0.5)
        state = FastWeightsState(torch.zeros(1, size, dtype=torch.float64), matrix)
        vector = mixer(cue.flatten(0, 1), None, TokenLayout.full(1, 1), state)[1].vector[0]
        assert vector[1:4].min() > 0 and vector[4:].abs().max() == 0
        pull.append(float(vector[1:4].mean() / vector[0]))
    assert pull[1] > 1.5 * pull[0]


@torch.no_grad()
def test_rows_of_a_batch_are_alone():
    """Paddings, anywhere, and halted tokens of a compiled step leave no trace in output and state."""
    mixer, (hidden, state) = fast_weights(), inputs(13)
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[0, :2], mask[1, 5:7], mask[2, 3:] = False, False, False
    layout = TokenLayout.from_mask(mask)
    mixed, after, _ = mixer(layout.gather(hidden), None, layout, state)
    mixed = layout.scatter(mixed, torch.zeros_like(hidden))
    for row in range(3):
        alone = hidden[row : row + 1, mask[row]]
        expected, *expected_state = whole(mixer, alone, *(x[row : row + 1] for x in state))
        torch.testing.assert_close(mixed[row : row + 1, mask[row]], expected, **CLOSE)
        torch.testing.assert_close([x[row : row + 1] for x in after], expected_state, **CLOSE)

    one_token = TokenLayout.full(3, 1).masked(torch.tensor([True, False, True]))
    after = mixer(hidden[:, 0], None, one_token, state)[1]
    changed = [
        [not torch.equal(x[row], y[row]) for x, y in zip(after, state, strict=True)] for row in range(3)
    ]
    assert changed == [[True, True], [False, False], [True, True]]


@torch.no_grad()
def test_nothing_grows_over_long_texts():
    """The fast weights stay below rate / (1 - decay) times the square of the longest vector."""
    mixer = fast_weights(steps=3, chunk_size=None).float()
    hidden = torch.randn(1, 2000, SIZE)
    state = mixer(hidden.flatten(0, 1), None, TokenLayout.full(1, 2000))[1]
    bound = mixer.norm.weight.abs().max() * SIZE**0.5 + mixer.norm.bias.norm()
    assert state.vector.norm() <= bound
    assert torch.linalg.matrix_norm(state.fast_weights, 2) <= 0.5 / 0.05 * bound**2


PLAIN = SHAPES["plain core"] | {"mixer_types": ["fast_weights"] * 2, "fast_weights_steps": 3}


@pytest.mark.parametrize("shape", [PLAIN, SHAPES["inner loop"]], ids=["plain", "stack"])
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
def test_states_are_float32_in_lower_precisions():
    model, ids = tiny_model(torch.float32, noise=0.05, **PLAIN), random_ids(2, 40)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(ids, use_cache=True)
    cast = model.to(torch.bfloat16)(ids, use_cache=True)
    for outputs in (autocast, cast):
        state = outputs.past_key_values.layers[0].slices[0]
        assert {tensor.dtype for tensor in state} == {torch.float32}
        assert (outputs.logits.float() - expected).abs().mean() < 0.1 * expected.std()


def test_the_state_is_a_vector_and_a_matrix():
    spec = FastWeights(tiny_config()).state_spec()
    assert [(tensor.name, tensor.shape) for tensor in spec] == [("vector", (16,)), ("fast_weights", (16, 16))]
