"""The coupled cell: it goes back exactly, and trains as if every state had been kept."""

import math

import pytest
import torch
from torch.nn.functional import silu

from stackformer import StackformerConfig, mixer_coupled
from stackformer.mixer_coupled import Coupled, CoupledAngles, CoupledState
from stackformer.token_layout import TokenLayout
from stackformer.training.long_context import long_context_backward
from tests.models import SHAPES, random_ids, spread_weights, tiny_model
from tests.test_long_context import assert_same_gradients

SIZE, STATE, CHUNK = 8, 5, 4
KINDS = {"coupled": Coupled, "coupled_angles": CoupledAngles}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def coupled(
    kind: type[Coupled] = Coupled, dtype: torch.dtype = torch.float64, chunk_size: int = CHUNK
) -> Coupled:
    torch.manual_seed(0)
    config = StackformerConfig(
        hidden_size=SIZE, bottleneck_size=None, coupled_state_size=STATE, chunk_size=chunk_size
    )
    return spread_weights(kind(config)).to(dtype)


def inputs(length: int, dtype: torch.dtype = torch.float64, padded: bool = False):
    """Tokens [n, d], pointer, layout, and a state to begin with, in fixed-point numbers from -1/2 to 1/2."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, length, dtype=torch.bool)
    if padded:
        mask[0, : length // 2], mask[1, length // 3 : length // 2] = False, False
    layout = TokenLayout.from_mask(mask)
    hidden = torch.randn(layout.num_tokens, SIZE, generator=generator).to(dtype)
    start = torch.randint(-(2**19), 2**19, (3, 2, STATE), generator=generator).double() * 2.0**-20
    return hidden, torch.ones(layout.num_tokens, 1), layout, CoupledState(start)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_goes_back_exactly(dtype, kind):
    """Every bit, from the state alone; without fixed-point numbers it is not even close to that."""
    mixer = coupled(kind, dtype, chunk_size=64)
    hidden, pointer, layout, start = inputs(300, dtype, padded=True)
    end = mixer(hidden, pointer, layout, start)[1]
    assert (end[0] - start[0]).abs().amax(-1).min() > (1 if kind is Coupled else 0.05)
    assert mixer.num_reversible == 1
    assert torch.equal(mixer.reverse(mixer.project(hidden, pointer, layout, None), end)[0], start[0])
    assert mixer.total_decay(mixer.project(hidden, pointer, layout, None)).tolist() == [[0, 0]] * 3


@every_kind
@torch.no_grad()
def test_without_fixed_point_numbers_it_would_not_go_back(monkeypatch, kind):
    mixer = coupled(kind, torch.float32, chunk_size=64)
    hidden, pointer, layout, start = inputs(100, torch.float32)
    monkeypatch.setattr(mixer_coupled._FixedPoint, "apply", lambda x, bits: x.double())
    end = mixer(hidden, pointer, layout, CoupledState(start[0] / 3))[1]
    assert not torch.equal(mixer.reverse(mixer.project(hidden, pointer, layout, None), end)[0], start[0] / 3)


@every_kind
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("length", [1, 11])
def test_gradients_are_those_through_stored_states(length, padded, kind):
    mixer = coupled(kind)
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


def peak_bytes(length: int, stored: bool, kind: type[Coupled]) -> int:
    """The most that autograd held at any time in a forward and backward pass, besides what it was given."""
    mixer, (hidden, _, _, (state,)) = coupled(kind), inputs(length)
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


@every_kind
def test_memory_does_not_grow_with_time(kind):
    short, long = (peak_bytes(count * CHUNK, stored=False, kind=kind) for count in (4, 16))
    assert long == short > 0
    short, long = (peak_bytes(count * CHUNK, stored=True, kind=kind) for count in (4, 16))
    assert long > 3 * short


@pytest.mark.parametrize("name", KINDS)
def test_reversed_over_chunks(name):
    """Training chunk by chunk, from the last state on, is training on the whole."""
    shape = SHAPES["coupled"] | {"mixer_types": [name] * 2}
    ids = random_ids(2, 23)
    expected, model = tiny_model(**shape).train(), tiny_model(**shape).train()
    expected(ids, labels=ids).loss.backward()
    output = long_context_backward(model, ids, labels=ids, chunk_size=6, method="reverse", max_log_decay=0)
    assert_same_gradients(model, expected)
    assert output.drift < 1e-12 and output.num_anchors == 0  # whatever it grows by: it is exact


@pytest.mark.parametrize("name", KINDS)
def test_states_are_fixed_point_numbers_in_any_model(name):
    model = tiny_model(torch.bfloat16, mixer_types=[name] * 2)
    with torch.no_grad():
        cache = model(random_ids(2, 9), use_cache=True).past_key_values
    for layer in cache.layers:
        for (state,) in layer.slices.values():
            assert state.dtype == torch.float64 and state.any()
            units = state * 2.0 ** KINDS[name].fraction_bits
            assert torch.equal(units.round(), units)


def test_states_are_half_as_wide_as_the_core():
    assert StackformerConfig(bottleneck_size=36).coupled_state_size == 18


def naive_angles(mixer: CoupledAngles, row: torch.Tensor, first, second):
    """The recurrence of one row [T, d] in plain sums of radians, without wrapping around or rounding."""

    def see(angle):
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    outputs = []
    for token in row:
        drives = (mixer.in_proj.weight @ token + mixer.in_proj.bias).chunk(2)
        gate, value = (mixer.first_proj.weight @ see(second) + drives[0]).chunk(2)
        first = first + math.pi * (0.5 + gate / 3).clamp(0, 1) * value.clamp(-1, 1)
        gate, value = (mixer.second_proj.weight @ see(first) + drives[1]).chunk(2)
        second = second + math.pi * (0.5 + gate / 3).clamp(0, 1) * value.clamp(-1, 1)
        outputs.append(
            mixer.o_proj(silu(mixer.gate_proj(token)) * mixer.norm(see(torch.cat([first, second]))))
        )
    return torch.stack(outputs)


def test_angles_are_sums_modulo_a_turn(monkeypatch):
    """Values to the precision of the rounding, and gradients to that of float64 once nothing is rounded."""
    mixer = coupled(CoupledAngles)
    hidden, pointer, layout, (start,) = inputs(9)
    weights = torch.randn(3, 9, SIZE, dtype=torch.float64)

    def ours():
        leaves = [hidden.clone().requires_grad_(), start.clone().requires_grad_(), *mixer.parameters()]
        mixed = mixer(leaves[0], pointer, layout, CoupledState(leaves[1]))[0].view(3, 9, SIZE)
        return mixed, torch.autograd.grad((mixed * weights).sum(), leaves)

    leaves = [hidden.clone().requires_grad_(), start.clone().requires_grad_(), *mixer.parameters()]
    rows, radians = leaves[0].view(3, 9, SIZE), 2 * math.pi * leaves[1]
    expected = torch.stack(
        [naive_angles(mixer, row, *state) for row, state in zip(rows, radians, strict=True)]
    )
    gradients = torch.autograd.grad((expected * weights).sum(), leaves)
    torch.testing.assert_close(
        ours()[0][:, :5], expected[:, :5], rtol=1e-3, atol=1e-3
    )  # errors grow with time
    monkeypatch.setattr(mixer_coupled._FixedPoint, "apply", lambda x, bits: x.double())
    torch.testing.assert_close(ours(), (expected, gradients), rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_angles_stay_within_a_turn():
    mixer = coupled(CoupledAngles)
    hidden, pointer, layout, state = inputs(500)
    end = mixer(hidden, pointer, layout, state)[1][0]
    assert end.min() >= -0.5 and end.max() < 0.5 and end.std() > 0.1
    assert torch.equal(mixer.wrap(end + 3), end) and torch.equal(mixer.wrap(end - 7), end)


@every_kind
@torch.no_grad()
def test_the_effect_of_the_previous_token_fades_or_not(kind):
    """Of another token before the last: as 1 / T on numbers that grow, and not at all on angles."""
    mixer = coupled(kind, torch.float32, chunk_size=64)
    effects = []
    for length in (10, 100, 1000):
        hidden, pointer, layout, _ = inputs(length, torch.float32)
        other = hidden.clone()
        other.view(3, length, SIZE)[:, -2] *= -1
        outputs = [mixer(x, pointer, layout)[0].view(3, length, SIZE)[:, -1] for x in (hidden, other)]
        effects.append(((outputs[0] - outputs[1]).norm() / outputs[0].norm()).item())
    if kind is Coupled:
        assert effects[2] < 0.1 * effects[0] and effects[2] < 0.02
    else:
        assert min(effects) > 0.3
