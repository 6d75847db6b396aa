"""The coupled cell: it goes back exactly, and trains as if every state had been kept."""

import pytest
import torch

from stackformer import StackformerConfig, mixer_coupled
from stackformer.mixer_coupled import Coupled, CoupledState
from stackformer.token_layout import TokenLayout
from stackformer.training.long_context import long_context_backward
from tests.models import SHAPES, random_ids, spread_weights, tiny_model
from tests.test_long_context import assert_same_gradients

SIZE, STATE, CHUNK = 8, 5, 4


def coupled(dtype: torch.dtype = torch.float64, chunk_size: int = CHUNK) -> Coupled:
    torch.manual_seed(0)
    config = StackformerConfig(
        hidden_size=SIZE, bottleneck_size=None, coupled_state_size=STATE, chunk_size=chunk_size
    )
    return spread_weights(Coupled(config)).to(dtype)


def inputs(length: int, dtype: torch.dtype = torch.float64, padded: bool = False):
    """Tokens [n, d], pointer, layout, and a state to begin with, in fixed-point numbers."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, length, dtype=torch.bool)
    if padded:
        mask[0, : length // 2], mask[1, length // 3 : length // 2] = False, False
    layout = TokenLayout.from_mask(mask)
    hidden = torch.randn(layout.num_tokens, SIZE, generator=generator).to(dtype)
    start = torch.randint(-(2**22), 2**22, (3, 2, STATE), generator=generator).double() * 2.0**-20
    return hidden, torch.ones(layout.num_tokens, 1), layout, CoupledState(start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_goes_back_exactly(dtype):
    """Every bit, from the state alone; without fixed-point numbers it is not even close to that."""
    mixer = coupled(dtype, chunk_size=64)
    hidden, pointer, layout, start = inputs(300, dtype, padded=True)
    end = mixer(hidden, pointer, layout, start)[1]
    assert (end[0] - start[0]).abs().amax(-1).min() > 1
    assert mixer.num_reversible == 1
    assert torch.equal(mixer.reverse(mixer.project(hidden, pointer, layout, None), end)[0], start[0])
    assert mixer.total_decay(mixer.project(hidden, pointer, layout, None)).tolist() == [[0, 0]] * 3


@torch.no_grad()
def test_without_fixed_point_numbers_it_would_not_go_back(monkeypatch):
    mixer = coupled(torch.float32, chunk_size=64)
    hidden, pointer, layout, start = inputs(100, torch.float32)
    monkeypatch.setattr(mixer_coupled._FixedPoint, "apply", lambda x: x.double())
    end = mixer(hidden, pointer, layout, CoupledState(start[0] / 3))[1]
    assert not torch.equal(mixer.reverse(mixer.project(hidden, pointer, layout, None), end)[0], start[0] / 3)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("length", [1, 11])
def test_gradients_are_those_through_stored_states(length, padded):
    mixer = coupled()
    hidden, pointer, layout, (start,) = inputs(length, padded=padded)
    weights = torch.randn(3, 2, STATE, dtype=torch.float64)

    def gradients(forward):
        leaves = [hidden.clone().requires_grad_(), start.clone().requires_grad_(), *mixer.parameters()]
        mixed, end = forward(*leaves[:2])
        loss = mixed.square().sum() + (weights * end).sum()
        return loss, torch.autograd.grad(loss, leaves)

    def reversible(hidden, state):
        mixed, (end,), _ = mixer(hidden, pointer, layout, CoupledState(state))
        return mixed, end

    def stored(hidden, state):
        mixed, end = mixer.scan(layout.to_rows(hidden), mixer_coupled._real_slots(layout), state)
        return layout.to_tokens(mixed), end

    torch.testing.assert_close(gradients(reversible), gradients(stored), rtol=1e-8, atol=1e-10)


def test_gradients_of_gradients_are_an_error():
    mixer = coupled()
    hidden, pointer, layout, state = inputs(5)
    mixed = mixer(hidden.requires_grad_(), pointer, layout, state)[0]
    (grad,) = torch.autograd.grad(mixed.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class _Held:
    """A tensor that autograd keeps; `live` is the bytes of all of them, `peak` the most there were."""

    live = peak = 0

    def __init__(self, tensor: torch.Tensor, given: set[int]):
        self.tensor, self.nbytes = tensor, 0 if tensor.data_ptr() in given else tensor.nbytes
        _Held.live += self.nbytes
        _Held.peak = max(_Held.peak, _Held.live)

    def __del__(self):
        _Held.live -= self.nbytes


def peak_bytes(length: int, stored: bool) -> int:
    """The most that autograd held at any time in a forward and backward pass, besides what it was given."""
    mixer, (hidden, _, _, (state,)) = coupled(), inputs(length)
    rows, parameters = hidden.view(3, length, SIZE), list(mixer.parameters())
    _Held.live = _Held.peak = 0
    given = {tensor.data_ptr() for tensor in [rows, state, *parameters]}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: _Held(x, given), lambda held: held.tensor):
        if stored:
            mixed, end = mixer.scan(rows, None, state)
        else:
            mixed, end = mixer_coupled._ReversibleScan.apply(mixer, None, rows, state, *parameters)
        (mixed.sum() + end.sum()).backward()
    return _Held.peak


def test_memory_does_not_grow_with_time():
    short, long = peak_bytes(4 * CHUNK, stored=False), peak_bytes(16 * CHUNK, stored=False)
    assert long == short > 0
    assert peak_bytes(16 * CHUNK, stored=True) > 3 * peak_bytes(4 * CHUNK, stored=True)


def test_reversed_over_chunks():
    """Training chunk by chunk, from the last state on, is training on the whole."""
    shape = SHAPES["coupled"] | {"mixer_types": ["coupled"] * 2}
    ids = random_ids(2, 23)
    expected, model = tiny_model(**shape).train(), tiny_model(**shape).train()
    expected(ids, labels=ids).loss.backward()
    output = long_context_backward(model, ids, labels=ids, chunk_size=6, method="reverse", max_log_decay=0)
    assert_same_gradients(model, expected)
    assert output.drift < 1e-12 and output.num_anchors == 0  # whatever it grows by: it is exact


def test_states_are_fixed_point_numbers_in_any_model():
    model = tiny_model(torch.bfloat16, mixer_types=["coupled"] * 2)
    with torch.no_grad():
        cache = model(random_ids(2, 9), use_cache=True).past_key_values
    for layer in cache.layers:
        for (state,) in layer.slices.values():
            assert state.dtype == torch.float64 and state.any()
            assert torch.equal((state * 2.0**20).round(), state * 2.0**20)


def test_states_are_half_as_wide_as_the_core():
    assert StackformerConfig(bottleneck_size=36).coupled_state_size == 18
