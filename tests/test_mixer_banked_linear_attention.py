"""Decoding in one call of the C++ library, against the modules that it stands for."""

import copy

import pytest
import torch

from stackformer import mixer_banked_linear_attention
from stackformer.library import is_available
from stackformer.mixer_bank import BankMixer
from stackformer.mixer_banked_linear_attention import BankState
from stackformer.token_layout import TokenLayout
from tests.models import tiny_model

pytestmark = pytest.mark.skipif(not is_available(), reason="the C++ library was not built")

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 5e-3}


def example(dtype=torch.float64, rows=3, **fields):
    """A mixer whose weights are all random, tokens for it, and a state from before."""
    torch.manual_seed(0)
    model = tiny_model(torch.float64, **fields)
    mixer = model.model.layers[0].mixer
    for parameter in mixer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    size, levels = model.config.core_size, model.config.stack_depth
    hidden = torch.randn(5 * rows, size, dtype=torch.float64)
    pointer = torch.rand(5 * rows, levels, dtype=torch.float64) / levels
    with torch.no_grad():
        _, state, _ = mixer(hidden, pointer, TokenLayout.full(rows, 5), None)
    accurate = torch.promote_types(dtype, torch.float32)
    state = BankState(*(tensor.to(accurate) for tensor in state))
    return mixer.to(dtype), (hidden[:rows].to(dtype), pointer[:rows].to(accurate)), state


def in_one_call(monkeypatch):
    """The options of the calls that are made, as they come."""
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return original(*args, **options)

    original = mixer_banked_linear_attention.decode_token
    monkeypatch.setattr(mixer_banked_linear_attention, "decode_token", counted)
    return calls


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "fields",
    [
        {"stack_depth": 1, "max_ponder_steps": 1, "num_memory_banks": 1},
        {"num_memory_banks": 3, "conv_kernel_size": 2},
        {"num_memory_banks": 1, "conv_kernel_size": 1, "num_attention_heads": 1},
    ],
    ids=["plain", "banks", "no past"],
)
def test_is_what_the_modules_do(monkeypatch, fields, dtype):
    mixer, tokens, state = example(dtype, **fields)
    calls = in_one_call(monkeypatch)
    layout = TokenLayout.full(len(tokens[0]), 1)
    expected = mixer(*tokens, layout, state)  # with gradients, and so one module after another
    assert not calls
    before = [tensor.clone() for tensor in state]
    with torch.no_grad():
        actual = mixer(*tokens, layout, state)
    assert len(calls) == 1
    assert all(map(torch.equal, before, state)), "the old state was written to"
    for one, other in zip(
        (actual[0], *actual[1], *actual[2]), (expected[0], *expected[1], *expected[2]), strict=True
    ):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - other).norm() <= TOLERANCES[dtype] * max(1, other.norm())


def test_many_heads_on_several_threads():
    mixer, tokens, state = example(rows=9, num_attention_heads=4)
    layout = TokenLayout.full(9, 1)
    expected = mixer(*tokens, layout, state)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            actual = mixer(*tokens, layout, state)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


def test_under_autocast(monkeypatch):
    mixer, tokens, state = example(torch.float32)
    layout = TokenLayout.full(len(tokens[0]), 1)
    calls = in_one_call(monkeypatch)
    expected = mixer(*tokens, layout, state)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = mixer(*tokens, layout, state)
    assert calls and actual[0].dtype == torch.bfloat16 and actual[1][0].dtype == torch.float32
    assert (actual[0] - expected[0]).norm() < 0.03 * expected[0].norm()


@pytest.mark.parametrize("name", ["conv", "norm"])
@pytest.mark.parametrize("change", ["hook", "forward", "module"])
def test_modules_that_were_changed_are_called(name, change):
    mixer, tokens, state = example()
    module, called = getattr(mixer, name), []
    if change == "hook":
        module.register_forward_hook(lambda *_: called.append(name))
    elif change == "forward":
        original = module.forward
        module.forward = lambda *args: called.append(name) or original(*args)
    else:

        class Other(type(module)):
            def forward(self, *args):
                called.append(name)
                return super().forward(*args)

        module.__class__ = Other
    with torch.no_grad():
        mixer(*tokens, TokenLayout.full(len(tokens[0]), 1), state)
    assert called == [name]


def test_weights_of_a_type_of_their_own(monkeypatch):
    """Such as quantised ones, whose elements are not what lies in their memory."""

    class Quantised(torch.Tensor):
        pass

    mixer, tokens, state = example()
    layout = TokenLayout.full(len(tokens[0]), 1)
    expected = mixer(*tokens, layout, state)[0]
    calls = in_one_call(monkeypatch)
    mixer.conv.weight = torch.nn.Parameter(mixer.conv.weight.detach().as_subclass(Quantised))
    with torch.no_grad():
        actual = mixer(*tokens, layout, state)[0]
    assert not calls
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("tangent", [False, True])
def test_tokens_that_are_more_than_their_elements(monkeypatch, tangent):
    """Fake ones, and ones with a tangent, go through the modules, which know what to do."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd import forward_ad

    mixer, tokens, state = example(feature_map="elu_plus_one")
    layout = TokenLayout.full(len(tokens[0]), 1)
    calls = in_one_call(monkeypatch)
    if not tangent:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            tokens, state = [mode.from_tensor(x) for x in tokens], BankState(*map(mode.from_tensor, state))
            assert mixer(*tokens, layout, state)[0].shape == tokens[0].shape
    else:
        with forward_ad.dual_level(), torch.no_grad():
            hidden = forward_ad.make_dual(tokens[0], torch.ones_like(tokens[0]))
            with pytest.raises(NotImplementedError):  # it is not lost
                mixer(hidden, tokens[1], layout, state)
    assert not calls


def test_not_for_another_feature_map(monkeypatch):
    mixer, tokens, state = example(feature_map="relu")
    calls = in_one_call(monkeypatch)
    layout = TokenLayout.full(len(tokens[0]), 1)
    with torch.no_grad():
        actual = mixer(*tokens, layout, state)[0]
    assert not calls
    torch.testing.assert_close(actual, mixer(*tokens, layout, state)[0])


def test_tokens_that_no_longer_think_leave_the_convolution(monkeypatch):
    """Where tokens are masked, not left out, the past of those that are done does not move."""
    mixer, tokens, state = example()
    calls = in_one_call(monkeypatch)
    thinking = torch.tensor([True, False, True])
    with torch.no_grad():
        _, (*_, past), _ = mixer(*tokens, TokenLayout.full(3, 1).masked(thinking), state)
    assert not calls
    assert torch.equal(past[1], state[2][1]) and not torch.equal(past[0], state[2][0])


def test_rows_in_place(monkeypatch):
    """As with a state of these rows only; the others are as they were."""
    mixer, tokens, state = example(rows=5, num_memory_banks=2)
    rows = torch.tensor([0, 3])
    layout = TokenLayout.from_mask(torch.tensor([True, False, False, True, False]).unsqueeze(1))
    tokens = [tensor[rows] for tensor in tokens]
    own, whole = (BankState(*(x[rows] for x in state)), BankState(*(x.clone() for x in state)))
    with torch.no_grad():
        expected = mixer(*tokens, layout, own)
        actual = mixer(*tokens, layout, whole, in_place=True)
    assert torch.equal(actual[0], expected[0])
    for new, written, part, before in zip(actual[1], whole, expected[1], state, strict=True):
        assert new is written
        assert torch.equal(written[rows], part)
        assert torch.equal(written[[1, 2, 4]], before[[1, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feed_forward_type", ["gated", "rwkv_channel_mix"])
def test_decoding_in_place_changes_nothing(monkeypatch, dtype, feed_forward_type):
    """Where rows halt at different depths. A feed-forward with a past has a part of the state that the mixer
    knows nothing of: it is not written in place."""
    fields = {"num_memory_banks": 2, "stack_depth": 3, "max_ponder_steps": 4, "halting_threshold": 0.4}
    model = tiny_model(dtype, feed_forward_type=feed_forward_type, **fields)
    ids = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def decode():
        outputs = model(ids[:, :2])
        logits = []
        for t in range(2, ids.shape[1]):
            outputs = model(ids[:, t : t + 1], past_key_values=outputs.past_key_values)
            logits.append(outputs.logits)
        return torch.stack(logits), [layer.slices for layer in outputs.past_key_values.layers]

    calls = in_one_call(monkeypatch)
    logits, slices = decode()
    some_rows = [options for options in calls if options["in_place"] and options["rows"] is not None]
    all_rows = [options for options in calls if options["in_place"] and options["rows"] is None]
    if feed_forward_type == "gated":
        assert len(some_rows) > 10 and len(all_rows) > 10
    else:
        assert not some_rows and not all_rows
    monkeypatch.delattr(BankMixer, "writes_in_place")
    expected_logits, expected_slices = decode()
    assert torch.equal(logits, expected_logits)
    torch.testing.assert_close(slices, expected_slices, rtol=0, atol=0)


def test_what_others_hold_is_not_written():
    """Neither a copy of the cache, nor one that was copied, nor a state with gradients."""
    model = tiny_model(num_memory_banks=2, stack_depth=2, max_ponder_steps=2, halting_threshold=0.0)
    ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def go_on(cache, start):
        return torch.stack(
            [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(start, ids.shape[1])]
        )

    with torch.no_grad():
        cache = model(ids[:, :2], use_cache=True).past_key_values
        for t in (2, 3):
            model(ids[:, t : t + 1], past_key_values=cache)
    branch, clone, detached = copy.deepcopy(cache), cache.clone(), cache.detach()
    expected = go_on(cache, 4)
    for other in (branch, clone, detached):
        assert torch.equal(go_on(other, 4), expected)

    cache = model(ids[:, :4], use_cache=True).past_key_values
    held = [tensor for layer in cache.layers for state in layer.slices.values() for tensor in state]
    before = [tensor.clone() for tensor in held]
    go_on(cache, 4)
    assert all(map(torch.equal, held, before)), "a graph was overwritten"


def test_reordered_rows_are_not_copied_again():
    """What beam search does at every token leaves a state that only the cache holds."""
    model = tiny_model(num_memory_banks=2, stack_depth=1, max_ponder_steps=1)
    ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        addresses = [tensor.data_ptr() for tensor in cache.layers[0].slices[0]]
        logits = model(ids[[1, 0], 7:], past_key_values=cache).logits
        expected = model(ids[[1, 0]]).logits[:, 7:]
    assert [tensor.data_ptr() for tensor in cache.layers[0].slices[0]] == addresses
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("halting_threshold", [0.0, 0.4])
@pytest.mark.parametrize("rows", [1, 3])
def test_cache_of_another_batch(rows, halting_threshold):
    """It raises, and reads nothing that is not there."""
    fields = {"num_memory_banks": 2, "stack_depth": 2, "max_ponder_steps": 3}
    model = tiny_model(halting_threshold=halting_threshold, **fields)
    ids = torch.randint(0, 256, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(ids[:2, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"2 rows for an input of {rows}"):
            model(ids[:rows, 4:], past_key_values=cache)
