"""The delta rule on banks as a mixer: one call decodes what the modules do, rows are alone, splits do not
matter, and banks start with their half-lives."""

import math

import pytest
import torch

from stackformer import StackformerConfig, StackformerForCausalLM, mixer_banked_delta_rule
from stackformer.mixer_bank import BankMixer
from stackformer.mixer_banked_delta_rule import BankedDeltaRule, DeltaBankState
from stackformer.token_layout import TokenLayout
from tests.models import SHAPES, random_ids, tiny_config, tiny_model
from tests.test_modeling import assert_same_state, gradients_whole_and_through_the_cache, read_in_pieces

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
PLAIN = SHAPES["plain core"] | {"mixer_types": ["banked_delta_rule"] * 2}
STACK = SHAPES["halting stack"] | {"mixer_types": ["banked_delta_rule"] * 2}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}


def example(dtype=torch.float64, rows=3, **fields):
    """A mixer with noise on all weights, one token for each row, their pointers, and a state."""
    torch.manual_seed(0)
    config = tiny_config(mixer_types=["banked_delta_rule"] * 2, **fields)
    mixer = BankedDeltaRule(config).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    hidden = torch.randn(rows, 16, dtype=torch.float64)
    pointer = torch.rand(rows, config.stack_depth, dtype=torch.float64)
    pointer /= pointer.sum(-1, keepdim=True)
    shapes = [spec.shape for spec in mixer.state_spec()]
    accurate = torch.promote_types(dtype, torch.float32)
    state = DeltaBankState(*(torch.randn(rows, *shape).to(accurate) for shape in shapes))
    return mixer.to(dtype), hidden.to(dtype), pointer.to(accurate), state


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "fields",
    [
        {"stack_depth": 1, "max_ponder_steps": 1, "num_memory_banks": 1},
        {"num_memory_banks": 3, "conv_kernel_size": 2},
        {"num_memory_banks": 2, "conv_kernel_size": 1, "num_attention_heads": 1},
    ],
    ids=["plain", "banks", "no past"],
)
@torch.no_grad()
def test_one_call_decodes_what_the_modules_do(monkeypatch, fields, dtype):
    mixer, hidden, pointer, state = example(dtype, **fields)
    layout, calls = TokenLayout.full(len(hidden), 1), []
    original = mixer_banked_delta_rule.decode_token
    monkeypatch.setattr(
        mixer_banked_delta_rule, "decode_token", lambda *args, **kw: calls.append(1) or original(*args, **kw)
    )
    mixed, after, weights = mixer(hidden, pointer, layout, state)
    assert calls or not mixer.can_decode_token(hidden, layout)
    inputs = mixer.project(hidden, pointer, layout, state)
    expected, expected_after, expected_weights = mixer.mix(hidden, inputs, layout, state)
    close = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    torch.testing.assert_close(mixed, expected, **close)
    torch.testing.assert_close(tuple(after), tuple(expected_after), **close)
    torch.testing.assert_close(tuple(weights), tuple(expected_weights))
    if calls:  # in place, the same bits
        written = mixer(hidden, pointer, layout, DeltaBankState(*(x.clone() for x in state)), None, True)
        assert torch.equal(written[0], mixed) and all(map(torch.equal, written[1], after))


@torch.no_grad()
def test_rows_of_a_batch_are_alone():
    """Paddings, anywhere, and halted tokens of a compiled step leave no trace in output and state."""
    mixer, _, _, state = example()
    hidden = torch.randn(3, 13, 16, dtype=torch.float64)
    mask = torch.ones(3, 13, dtype=torch.bool)
    mask[0, :2], mask[1, 5:7], mask[2, 4:] = False, False, False
    layout = TokenLayout.from_mask(mask)
    pointer = torch.rand(3, 13, 3, dtype=torch.float64)
    mixed, after, _ = mixer(layout.gather(hidden), layout.gather(pointer), layout, state)
    mixed = layout.scatter(mixed, torch.zeros_like(hidden))
    for row in range(3):
        before = DeltaBankState(*(x[row : row + 1] for x in state))
        alone = TokenLayout.full(1, int(mask[row].sum()))
        expected = mixer(hidden[row, mask[row]], pointer[row, mask[row]], alone, before)
        torch.testing.assert_close(mixed[row, mask[row]], expected[0], **CLOSE)
        torch.testing.assert_close(tuple(x[row : row + 1] for x in after), tuple(expected[1]), **CLOSE)

    thinking = torch.tensor([True, False, True])
    one_token = TokenLayout.full(3, 1).masked(thinking)
    after = mixer(hidden[:, 0], pointer[:, 0] * thinking.unsqueeze(1), one_token, state)[1]
    changed = [
        [not torch.equal(x[row], y[row]) for x, y in zip(after, state, strict=True)] for row in range(3)
    ]
    assert changed == [[True, True], [False, False], [True, True]]


@torch.no_grad()
def test_keys_have_at_most_length_one_over_all_memories():
    mixer, hidden, pointer, state = example()
    query, key, _, read, write, log_decay, step_size = mixer.project(
        hidden, pointer, TokenLayout.full(3, 1), state
    ).operands
    torch.testing.assert_close(key.norm(dim=-1), torch.ones_like(step_size), **CLOSE)
    torch.testing.assert_close(query.norm(dim=-1), torch.ones_like(step_size), **CLOSE)
    for weights in (read, write):
        length = pointer.norm(dim=-1)[:, None, None].expand_as(step_size)
        torch.testing.assert_close(weights.norm(dim=-1), length)
    assert (log_decay <= 0).all() and (step_size >= 0).all() and (step_size <= 2).all()


@pytest.mark.parametrize("shape", [PLAIN, STACK], ids=["plain", "stack"])
@torch.no_grad()
def test_splits_of_a_text(shape):
    model, ids = tiny_model(**shape), random_ids(2, 15)
    expected = model(ids, use_cache=True)
    logits, cache = read_in_pieces(model, ids, [4, 1, 9, 1])
    torch.testing.assert_close(logits, expected.logits, **CLOSE)
    assert_same_state(cache, expected.past_key_values)


@torch.no_grad()
def test_decoding_in_place_changes_nothing(monkeypatch):
    model = tiny_model(**STACK)
    ids = random_ids(6, 20)

    def decode():
        outputs = model(ids[:, :2])
        logits = []
        for t in range(2, ids.shape[1]):
            outputs = model(ids[:, t : t + 1], past_key_values=outputs.past_key_values)
            logits.append(outputs.logits)
        return torch.stack(logits), [layer.slices for layer in outputs.past_key_values.layers]

    logits, slices = decode()
    monkeypatch.delattr(BankMixer, "writes_in_place")
    expected_logits, expected_slices = decode()
    assert torch.equal(logits, expected_logits)
    torch.testing.assert_close(slices, expected_slices, rtol=0, atol=0)


def test_gradients_flow_through_the_cache():
    model, ids = tiny_model(**PLAIN).train(), random_ids(2, 20)
    expected, actual = gradients_whole_and_through_the_cache(model, ids)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert all(gradient.abs().max() > 0 for gradient in actual)


def test_a_bank_that_is_not_written_has_gradients():
    """The root of a share that is 0 in float32 has none of its own."""
    mixer, hidden, pointer, _ = (
        x.float() if isinstance(x, torch.Tensor) else x for x in example(torch.float32, num_memory_banks=2)
    )
    with torch.no_grad():
        mixer.write_proj.bias.copy_(torch.tensor([200.0, -200.0] * 2))
    mixed, *_ = mixer(hidden, pointer, TokenLayout.full(3, 1))
    mixed.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


@torch.no_grad()
def test_states_are_float32_under_autocast():
    model, ids = tiny_model(torch.float32, noise=0.05, **PLAIN), random_ids(2, 40)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, use_cache=True)
    state = outputs.past_key_values.layers[0].slices[0]
    assert {tensor.dtype for tensor in state} == {torch.float32}
    assert (outputs.logits.float() - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("mixer_type", ["banked_linear_attention", "banked_delta_rule"])
@pytest.mark.parametrize("banks, heads", [(1, 4), (4, 1), (4, 2), (3, 2)])
@torch.no_grad()
def test_memories_start_with_their_half_lives(mixer_type, banks, heads):
    """Of tokens that write evenly, half of a memory is left after so many."""
    config = StackformerConfig(
        hidden_size=16, bottleneck_size=None, num_hidden_layers=1, num_attention_heads=heads,
        num_memory_banks=banks, stack_depth=1, max_ponder_steps=1, mixer_types=[mixer_type],
        initial_half_lives=[5.0, 2000.0],
    )  # fmt: skip
    mixer = StackformerForCausalLM(config).model.layers[0].mixer
    weights = mixer.route(torch.zeros(1, 16), torch.float32)
    half_lives = (-math.log(2) / weights.log_decay[0]).t().flatten()  # [H, N] -> [N H]
    factor = 16 if mixer_type == "banked_delta_rule" else 1
    expected = factor * torch.logspace(math.log10(5), math.log10(2000), banks * heads)
    torch.testing.assert_close(half_lives, expected, rtol=1e-3, atol=0)


@torch.no_grad()
def test_banks_start_with_the_same_weight_in_a_normalised_read():
    """The longer a bank holds its tokens, the smaller its share in a read. What the delta rule holds does not
    grow with the tokens."""
    fields = {"hidden_size": 16, "bottleneck_size": None, "num_hidden_layers": 1, "num_memory_banks": 4}
    for mixer_type, weight in (("banked_linear_attention", -1), ("banked_delta_rule", 0)):
        config = StackformerConfig(**fields, mixer_types=[mixer_type], initial_half_lives=[5.0, 2000.0])
        mixer = StackformerForCausalLM(config).model.layers[0].mixer
        weights = mixer.route(torch.zeros(1, 16), torch.float32)
        half_lives = -math.log(2) / weights.log_decay
        expected = half_lives**weight
        torch.testing.assert_close(weights.read, expected / expected.sum(-1, keepdim=True))


def test_half_lives_shorter_than_the_rate_allows():
    """The fastest memories start near the rate, and no number is infinite; without decay there are none."""
    fields = {"hidden_size": 16, "bottleneck_size": None, "num_hidden_layers": 1, "num_memory_banks": 4}
    model = StackformerForCausalLM(StackformerConfig(**fields, initial_half_lives=[0.5, 0.5]))
    torch.testing.assert_close(model.model.layers[0].mixer.decay_proj.bias.sigmoid(), torch.full((16,), 0.9))
    model = StackformerForCausalLM(StackformerConfig(**fields, max_decay_rate=0.0))
    assert model.model.layers[0].mixer.decay_proj.bias.abs().max() == 0
    for value in ([4.0], [0.0, 4.0], [8.0, 4.0], "long", [4.0, math.inf]):
        with pytest.raises(ValueError, match="`initial_half_lives` must be two numbers above 0"):
            StackformerConfig(**fields, initial_half_lives=value)
    with pytest.raises(ValueError, match="`max_step_size` must be a number above 0 and at most 2, got 2.5"):
        StackformerConfig(**fields, max_step_size=2.5)
