"""Tokens that use only some of the banks: which ones, what the router learns, and that all paths agree."""

import pytest
import torch

from stackformer import mixer_banked_delta_rule, mixer_banked_linear_attention
from stackformer.mixer_bank import bank_shares
from stackformer.token_layout import TokenLayout
from tests.models import SHAPES, random_ids, tiny_model
from tests.test_modeling import assert_same_state, gradients_whole_and_through_the_cache, read_in_pieces

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
MIXERS = {
    "banked_linear_attention": mixer_banked_linear_attention,
    "banked_delta_rule": mixer_banked_delta_rule,
}
every_mixer = pytest.mark.parametrize("mixer_type", MIXERS)


def choosing(mixer_type: str, chosen: int, **fields):
    """A model whose tokens use so many of four banks, in layers of one type."""
    fields = {"num_memory_banks": 4, "num_banks_per_tok": chosen} | fields
    return tiny_model(mixer_types=[mixer_type] * 2, **fields)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_banks_of_the_largest_logits_are_chosen(count):
    logits = torch.randn(5, 2, 4, dtype=torch.float64)
    shares, every = bank_shares(logits, count), logits.softmax(-1)
    assert ((shares > 0).sum(-1) == count).all()
    assert (shares.topk(count).indices == every.topk(count).indices).all()


def test_of_equal_logits_the_first_are_chosen():
    shares = bank_shares(torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert (shares > 0).tolist() == [[True, True, False, False]] * 2


@every_mixer
@torch.no_grad()
def test_all_banks_are_as_without_a_choice(mixer_type):
    ids = random_ids(2, 9)
    expected = choosing(mixer_type, None)(ids).logits
    assert torch.equal(choosing(mixer_type, 4)(ids).logits, expected)
    assert (choosing(mixer_type, 3)(ids).logits - expected).abs().max() > 1e-3


@every_mixer
@pytest.mark.parametrize("chosen", [1, 2])
@pytest.mark.parametrize("sizes", [[1] * 21, [4, 1, 7, 9]], ids=str)
@torch.no_grad()
def test_any_split_gives_the_same(mixer_type, chosen, sizes):
    """Whole, in pieces, and token by token in one call of the C++ library."""
    model, ids = choosing(mixer_type, chosen), random_ids(2, 21)
    expected = model(ids, use_cache=True)
    logits, cache = read_in_pieces(model, ids, sizes)
    torch.testing.assert_close(logits, expected.logits, **CLOSE)
    assert_same_state(cache, expected.past_key_values)


@every_mixer
@pytest.mark.parametrize("chosen", [1, 2])
def test_one_call_decodes_what_the_modules_do(monkeypatch, mixer_type, chosen):
    """From a state that is not zero. Only without gradients is there one call."""
    model, calls = choosing(mixer_type, chosen), []
    original = MIXERS[mixer_type].decode_token
    monkeypatch.setattr(
        MIXERS[mixer_type], "decode_token", lambda *args, **kw: calls.append(1) or original(*args, **kw)
    )
    mixer = model.model.layers[0].mixer
    hidden = torch.randn(3, 16, dtype=torch.float64)
    pointer = torch.rand(3, 3, dtype=torch.float64) / 3
    state = mixer.state_type(*(torch.rand(3, *x.shape, dtype=torch.float64) for x in mixer.state_spec()))
    expected = mixer(hidden, pointer, TokenLayout.full(3, 1), state)
    assert not calls
    with torch.no_grad():
        actual = mixer(hidden, pointer, TokenLayout.full(3, 1), state)
    assert calls or not mixer.can_decode_token(hidden, TokenLayout.full(3, 1))
    torch.testing.assert_close(actual[0], expected[0], **CLOSE)
    torch.testing.assert_close(tuple(actual[1]), tuple(expected[1]), **CLOSE)
    torch.testing.assert_close(tuple(actual[2]), tuple(expected[2]), **CLOSE)


@every_mixer
@pytest.mark.parametrize("length, gradients", [(1, False), (1, True), (6, False)])
def test_a_bank_that_is_not_written_to_keeps_every_bit(mixer_type, length, gradients):
    """In float32, with one token and with several, in C++ and in torch, from any state and from none."""
    model = choosing(mixer_type, 1).float()
    mixer = model.model.layers[0].mixer
    with torch.no_grad():  # of every head, tokens write to bank 2 only
        mixer.write_proj.weight.zero_()
        mixer.write_proj.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0] * 2))
    hidden, pointer = torch.randn(3 * length, 16), torch.rand(3 * length, 3)
    layout = TokenLayout.full(3, length)
    for random in (torch.randn, torch.zeros):
        state = mixer.state_type(*(random(3, *x.shape) for x in mixer.state_spec()))
        with torch.set_grad_enabled(gradients):
            after = mixer(hidden, pointer, layout, state)[1]
        for old, new in zip(state[:-1], after[:-1], strict=True):
            old, new = (x.unflatten(2, (3, 4)) for x in (old, new))  # [B, H, S, N, ...]
            same = (old == new).flatten(4).all(-1)
            assert same[..., [0, 1, 3]].all() and not same[..., 2].any()


@every_mixer
@pytest.mark.parametrize("chosen", [1, 2])
def test_the_router_learns(mixer_type, chosen):
    """Of one bank, too, except for reads: what is read is normalised."""
    model, ids = choosing(mixer_type, chosen).train(), random_ids(2, 20)
    expected, actual = gradients_whole_and_through_the_cache(model, ids)
    torch.testing.assert_close(actual, expected, **CLOSE)
    names = [name for name, _ in model.named_parameters()]
    size = max(gradient.norm() for gradient in actual)
    assert size < 1e3
    for name, gradient in zip(names, actual, strict=True):
        if "write_proj" in name or ("read_proj" in name and chosen > 1):
            assert gradient.abs().max() > 1e-5 * size, name


@every_mixer
@pytest.mark.parametrize("chosen", [1, 2])
def test_compiles_to_one_graph(mixer_type, chosen):
    ids = random_ids(2, 9)
    fields = SHAPES["one step"] | {"num_memory_banks": 4}

    def loss_and_gradients(model, forward):
        outputs = forward(ids, labels=ids)
        outputs.loss.backward()
        return [outputs.loss.detach(), *(parameter.grad for parameter in model.parameters())]

    eager, model = (choosing(mixer_type, chosen, **fields).train() for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss_and_gradients(model, compiled), loss_and_gradients(eager, eager), **CLOSE)
    torch._dynamo.reset()
