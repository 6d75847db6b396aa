"""Continuous attention: closed forms against integrals and refits, one block at a time as the reference."""

import json
from pathlib import Path

import pytest
import torch

from stackformer import StackformerCache, StackformerConfig, StackformerForCausalLM, mixer_continuous
from stackformer.mixer_attention import Attention
from stackformer.mixer_continuous import (
    ContinuousAttention,
    basis_values,
    bin_masses,
    divergence_from_prior,
    expected_basis,
    gaussian,
    memory_fit,
    quantiles,
    radial_basis,
    ridge_regression,
    uniform_positions,
)
from stackformer.token_layout import TokenLayout
from tests.models import SHAPES, random_ids, spread_weights, tiny_config, tiny_model
from tests.test_cache import read_calls, recording_cache
from tests.test_modeling import CLOSE, assert_same_state, padded, read_in_pieces

SIZE, BLOCK, BASIS, WIDTHS = 16, 4, 8, (0.1, 0.3)
DOUBLE = torch.zeros((), dtype=torch.float64)
both = pytest.mark.parametrize("sticky", [False, True], ids=["uniform", "sticky"])
every_name = pytest.mark.parametrize("name", ["infinity-former", "sticky memories on a stack"])


def mixer(sticky: bool = False, window: int = 6) -> ContinuousAttention:
    config = StackformerConfig(
        hidden_size=SIZE,
        bottleneck_size=None,
        num_attention_heads=2,
        sliding_window=window,
        memory_block=BLOCK,
        num_basis_functions=BASIS,
        basis_widths=list(WIDTHS),
        sticky_memories=sticky,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return spread_weights(ContinuousAttention(config), noise=0.3).double()


def read(module, hidden, state=None):
    layout = TokenLayout.full(*hidden.shape[:2])
    mixed, state, _ = module(hidden.flatten(0, 1), torch.ones(layout.num_tokens, 1), layout, state)
    return mixed.view(hidden.shape), state


def hidden_tokens(batch=2, length=19):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, SIZE, generator=generator, dtype=torch.float64)


def integral(values, positions):
    return torch.trapezoid(values, positions, dim=0)


def test_expected_basis_is_the_integral():
    centres, widths = radial_basis(BASIS, WIDTHS, DOUBLE)
    mean = torch.tensor([0.0, 0.31, 0.9], dtype=torch.float64)
    variance = torch.tensor([0.001, 0.04, 0.6], dtype=torch.float64)
    t = torch.linspace(-8, 9, 17_001, dtype=torch.float64)
    density = gaussian(t[:, None], mean, variance)
    expected = integral(density[:, :, None] * basis_values(t, centres, widths)[:, None], t)
    torch.testing.assert_close(expected_basis(mean, variance, centres, widths), expected)


def test_bin_masses_are_integrals():
    mean = torch.tensor([0.2, 0.77], dtype=torch.float64)
    variance = torch.tensor([0.003, 0.2], dtype=torch.float64)
    masses = bin_masses(mean, variance, 5)
    for number in range(5):
        t = torch.linspace(number / 5, (number + 1) / 5, 20_001, dtype=torch.float64)
        expected = integral(gaussian(t[:, None], mean, variance), t)
        torch.testing.assert_close(masses[:, number], expected)
    assert torch.equal(
        bin_masses(torch.tensor(0.3), torch.tensor(0.0), 4), torch.tensor([0.0, 1.0, 0.0, 0.0])
    )


def test_divergence_from_the_prior_is_the_integral():
    """With the prior at the density's own mean, and at a given one; it is 0 for the prior itself."""
    mean = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    variance = torch.tensor([0.0004, 0.01, 0.3], dtype=torch.float64)
    t = torch.linspace(-6, 7, 260_001, dtype=torch.float64)[:, None]
    log_density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(t)
    for prior_mean in (None, 0.4):
        prior = torch.distributions.Normal(
            mean if prior_mean is None else torch.full_like(mean, prior_mean), 0.2
        )
        expected = integral(log_density.exp() * (log_density - prior.log_prob(t)), t)
        torch.testing.assert_close(divergence_from_prior(mean, variance, prior_mean, 0.2), expected)
    itself = torch.full_like(mean, 0.4), torch.full_like(mean, 0.04)
    torch.testing.assert_close(divergence_from_prior(*itself, 0.4, 0.2), torch.zeros_like(mean))


def test_divergence_has_finite_gradients_even_without_a_width():
    mean = torch.tensor([0.3, 0.3], requires_grad=True)
    variance = torch.tensor([0.0, 0.01], requires_grad=True)
    divergence_from_prior(mean, variance, 0.5, 0.05).sum().backward()
    assert mean.grad.isfinite().all() and variance.grad.isfinite().all()
    # (mu - mu_0) / s_0^2, and (1 / s_0^2 - 1 / s^2) / 2
    torch.testing.assert_close(mean.grad, torch.full((2,), -0.2 / 0.0025))
    torch.testing.assert_close(variance.grad[1], torch.tensor((1 / 0.0025 - 1 / 0.01) / 2))


PENALTY = {"density_loss_coef": 0.1, "density_prior_mean": 0.4, "density_prior_width": 0.3}


def recorded_densities(monkeypatch) -> list[torch.Tensor]:
    """The divergences that mixers compute from here on, [B', H, width] each."""
    divergences = []

    def record(*args):
        divergences.append(divergence_from_prior(*args))
        return divergences[-1]

    monkeypatch.setattr(mixer_continuous, "divergence_from_prior", record)
    return divergences


@every_name
def test_training_loss_adds_the_penalty_and_evaluation_does_not(name):
    ids = random_ids(2, 17)
    labels = ids.clone()
    labels[0, :10] = -100
    plain, model = tiny_model(**SHAPES[name]).train(), tiny_model(**SHAPES[name], **PENALTY).train()
    losses = model.model(ids).mixer_loss
    assert losses.shape == ids.shape and losses.min() > 0
    counted = labels[:, 1:] != -100
    for items in (None, 50):
        expected = plain(ids, labels=labels, num_items_in_batch=items).loss
        penalty = losses[:, :-1][counted].sum() / (counted.sum() if items is None else items)
        actual = model(ids, labels=labels, num_items_in_batch=items).loss
        torch.testing.assert_close(actual, expected + 0.1 * penalty, **CLOSE)
    assert torch.equal(model.eval()(ids, labels=labels).loss, plain.eval()(ids, labels=labels).loss)
    assert model.model(ids).mixer_loss is None and plain.train().model(ids).mixer_loss is None


def test_the_penalty_is_a_sum_over_heads_and_layers(monkeypatch):
    model = tiny_model(**SHAPES["infinity-former"], **PENALTY).train()
    divergences = recorded_densities(monkeypatch)
    losses = model.model(random_ids(2, 4)).mixer_loss  # less than a block
    assert [x.shape for x in divergences] == [(2, 2, 4)] * 2
    torch.testing.assert_close(losses, torch.stack(divergences).sum((0, 2)), **CLOSE)


@every_name
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_the_penalty_has_gradients_for_means_and_variances(name, checkpointing):
    """Rows 0 and 1 of `density_proj` are mean and variance. Without a prior mean, the mean has none."""
    model, ids = tiny_model(**SHAPES[name], **PENALTY).train(), random_ids(2, 17)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    projection = model.model.layers[0].mixer.density_proj
    (grad,) = torch.autograd.grad(model.model(ids).mixer_loss.sum(), projection.weight)
    assert grad.abs().amax(1).min() > 1e-3
    if name == "infinity-former":  # on a stack, later layers and steps depend on the means
        one = tiny_model(
            **(SHAPES[name] | {"num_hidden_layers": 1, "mixer_types": ["continuous_attention"]}),
            **(PENALTY | {"density_prior_mean": None}),
        ).train()
        (grad,) = torch.autograd.grad(
            one.model(ids).mixer_loss.sum(), one.model.layers[0].mixer.density_proj.bias
        )
        assert grad[0] == 0 and grad[1].abs() > 1e-3


@every_name
def test_padding_and_halted_tokens_have_no_penalty(name):
    model, ids = tiny_model(**SHAPES[name], **PENALTY).train(), random_ids(2, 9)
    mask = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1], [0] * 5 + [1] * 9])
    losses = model.model(padded(ids, mask), attention_mask=mask).mixer_loss
    expected = model.model(ids).mixer_loss
    assert (losses[mask == 0] == 0).all()
    torch.testing.assert_close(torch.stack([losses[row, mask[row].bool()] for row in range(2)]), expected)
    if model.config.max_ponder_steps == 1:
        return
    # Row 1 halts after the first step: row 0 has later terms, and row 1 has none.
    depths = torch.tensor([[4] * 9, [1] * 9])
    losses = model.model(ids, ponder_depths=depths).mixer_loss
    once = model.model(ids, ponder_depths=torch.ones_like(depths)).mixer_loss
    torch.testing.assert_close(losses[1], once[1], **CLOSE)
    assert (losses[0] > once[0]).all()


def test_the_penalty_of_parts_is_that_of_the_whole():
    """Through a cache, packed, and with feedback."""
    model, ids = tiny_model(**SHAPES["infinity-former"], **PENALTY).train(), random_ids(1, 20)
    whole = model.model(ids).mixer_loss
    first = model.model(ids[:, :7], use_cache=True)
    rest = model.model(ids[:, 7:], cache=first.cache)
    torch.testing.assert_close(torch.cat([first.mixer_loss, rest.mixer_loss], dim=1), whole, **CLOSE)
    positions = torch.cat([torch.arange(13), torch.arange(7)]).unsqueeze(0)
    packed = model.model(ids, position_ids=positions).mixer_loss
    separate = [model.model(part).mixer_loss for part in ids.split([13, 7], dim=1)]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), **CLOSE)
    model = tiny_model(**SHAPES["infinity-former"], **PENALTY, feedback=True).train()
    torch.testing.assert_close(model.model(ids).mixer_loss, whole, **CLOSE)


def test_ridge_regression_minimises_its_loss():
    """Whose gradient, of squares of errors at the positions and outside plus the penalty, is zero."""
    centres, widths = radial_basis(BASIS, WIDTHS, DOUBLE)
    positions, signal = uniform_positions(10), torch.randn(10, 3, dtype=torch.float64)
    coefficients = (ridge_regression(positions, centres, widths, 0.7) @ signal).requires_grad_()
    outside = torch.cat([torch.arange(-5, 0), torch.arange(10, 15)]).double() / 10 + 0.05
    error = (basis_values(positions, centres, widths) @ coefficients - signal).square().sum()
    beyond = (basis_values(outside, centres, widths) @ coefficients).square().sum()
    (error + beyond + 0.7 * coefficients.square().sum()).backward()
    assert coefficients.grad.abs().max() < 1e-10


def test_contraction_is_a_refit_of_the_squeezed_signal():
    tau, ridge = 0.6, 0.2
    fit = memory_fit(BASIS, WIDTHS, BLOCK, tau, ridge, torch.float64, torch.device("cpu"))
    basis = radial_basis(BASIS, WIDTHS, DOUBLE)
    old, block = (torch.randn(size, 3, dtype=torch.float64) for size in (BASIS, BLOCK))
    samples = basis_values((torch.arange(BASIS) + 0.5).double() / BASIS, *basis) @ old
    positions = [tau * (m + 0.5) / BASIS for m in range(BASIS)]
    positions += [tau + (1 - tau) * (n + 0.5) / BLOCK for n in range(BLOCK)]
    refit = ridge_regression(torch.tensor(positions, dtype=torch.float64), *basis, ridge)
    expected = refit @ torch.cat([samples, block])
    torch.testing.assert_close(fit.contraction @ old + fit.later_block @ block, expected)
    torch.testing.assert_close(fit.samples @ samples, fit.contraction @ old)


def test_a_memory_recalls_smooth_signals_and_old_ones_less():
    """A slow wave over six blocks of 32, read where each block now is: all but the oldest are there."""
    fit = memory_fit(32, (1.5 / 32,), 32, 0.75, 0.1, torch.float64, torch.device("cpu"))
    basis = radial_basis(32, (1.5 / 32,), DOUBLE)
    blocks = torch.sin(torch.arange(192, dtype=torch.float64) / 15).unsqueeze(1).split(32)
    memory = fit.first_block @ blocks[0]
    for block in blocks[1:]:
        memory = fit.contraction @ memory + fit.later_block @ block
    errors = []
    for age, block in enumerate(reversed(blocks)):
        positions = 0.75**age * (0.75 + 0.25 * uniform_positions(32))
        recalled = basis_values(positions, *basis) @ memory
        errors.append(((recalled - block).square().mean() / block.square().mean()).item())
    assert max(errors[:5]) < 0.01 < 0.1 < errors[5]


def test_quantiles_are_as_dense_as_the_histogram_is_high():
    assert torch.allclose(quantiles(torch.zeros(2, 5), 10), uniform_positions(10).float())
    assert torch.allclose(quantiles(torch.full((3,), 2.0), 6), uniform_positions(6).float())
    histogram = torch.tensor([0.0, 3.0, 0.0, 1.0])
    positions = quantiles(histogram, 400)
    assert (positions.diff() > 0).all() and positions[0] > 0 and positions[-1] < 1
    counts = torch.histc(positions, 4, 0, 1) / 400
    torch.testing.assert_close(counts, 0.95 * histogram / 4 + 0.05 / 4, rtol=0, atol=0.01)


@both
@torch.no_grad()
def test_it_is_the_paper_one_token_and_one_block_at_a_time(sticky):
    """A plain loop over rows, heads and tokens, by the equations."""
    module, hidden = mixer(sticky), hidden_tokens()
    basis = radial_basis(BASIS, WIDTHS, DOUBLE)
    fit = memory_fit(BASIS, WIDTHS, BLOCK, 0.75, 0.1, torch.float64, torch.device("cpu"))
    layout = TokenLayout.full(*hidden.shape[:2])
    short = module.short_term(hidden.flatten(0, 1), None, layout, None)[0].view(hidden.shape)
    expected = short.clone()
    for row, tokens in enumerate(hidden):
        memory = torch.zeros(BASIS, SIZE, dtype=torch.float64)
        for number, block in enumerate(tokens.split(BLOCK)):
            looked = torch.zeros(BASIS, dtype=torch.float64)
            keys, values = module.kv_proj(memory).chunk(2, dim=-1)
            for place, token in enumerate(block):
                read_values = []
                for head in (slice(0, 8), slice(8, 16)):
                    scores = keys[:, head] @ module.q_proj(token)[head] / 8**0.5
                    mean, variance = module.density_proj(scores)
                    mean, variance = mean.sigmoid(), torch.nn.functional.softplus(variance)
                    read_values.append(expected_basis(mean, variance, *basis) @ values[:, head])
                    looked += bin_masses(mean, variance, BASIS)
                expected[row, number * BLOCK + place] += module.o_proj(torch.cat(read_values))
            smoothed = (module.smooth(block.T).sigmoid() * block.T).T
            if number == 0:
                memory = fit.first_block @ smoothed
            elif len(block) == BLOCK:
                positions = quantiles(looked, BASIS) if sticky else uniform_positions(BASIS)
                samples = basis_values(positions, *basis) @ memory
                memory = fit.samples @ samples + fit.later_block @ smoothed
    torch.testing.assert_close(read(module, hidden)[0], expected, **CLOSE)
    assert (expected - short)[:, :BLOCK].abs().max() == 0 < (expected - short)[:, BLOCK:].abs().amax(-1).min()


@both
@pytest.mark.parametrize("sizes", [[1] * 19, [3, 1, 9, 6], [4, 8, 7], [18, 1]], ids=str)
@torch.no_grad()
def test_any_split_gives_the_same(sticky, sizes):
    module, hidden = mixer(sticky), hidden_tokens()
    expected, expected_state = read(module, hidden)
    state, parts = None, []
    for part in hidden.split(sizes, dim=1):
        mixed, state = read(module, part, state)
        parts.append(mixed)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    torch.testing.assert_close(state, expected_state, **CLOSE)


@both
@torch.no_grad()
def test_no_token_sees_a_later_one_and_the_memory_reaches_beyond_the_window(sticky):
    module, hidden = mixer(sticky), hidden_tokens(1, 30)
    expected = read(module, hidden)[0]
    for position in (0, 3, 4, 11, 29):
        changed = hidden.clone()
        changed[0, position] += 1
        difference = (read(module, changed)[0] - expected).abs().amax(-1)[0]
        assert not difference[:position].any() and difference[position] > 1e-6
        assert (difference[position + 6 :] > 1e-9).all()
    alone = read(module.short_term, hidden)[0]
    hidden[0, 0] += 1
    assert not (read(module.short_term, hidden)[0] - alone)[0, 6:].any()


@torch.no_grad()
def test_sticky_samples_are_where_tokens_looked():
    """Two mixers of the same weights differ, from the third block on: the first that was contracted."""
    difference = (read(mixer(True), hidden_tokens())[0] - read(mixer(False), hidden_tokens())[0]).abs()
    assert difference[:, : 2 * BLOCK].max() < 1e-12 < 1e-6 < difference[:, 2 * BLOCK :].max()


@every_name
@pytest.mark.parametrize("sizes", [[14], [1] * 14, [6, 1, 7]], ids=["whole", "one by one", "split"])
@torch.no_grad()
def test_padding_changes_nothing(name, sizes):
    model, ids = tiny_model(**SHAPES[name]), random_ids(2, 9)
    mask = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1], [0] * 5 + [1] * 9])
    expected = model(ids, use_cache=True)
    logits, cache = read_in_pieces(model, padded(ids, mask), sizes, mask)
    for row in range(2):
        torch.testing.assert_close(logits[row, mask[row].bool()], expected.logits[row], **CLOSE)
    assert_same_state(cache, expected.past_key_values)


@every_name
@torch.no_grad()
def test_packed_documents_are_separate(name):
    model, ids = tiny_model(**SHAPES[name]), random_ids(1, 20)
    positions = torch.cat([torch.arange(13), torch.arange(7)]).unsqueeze(0)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    separate = [model(part).logits for part in ids.split([13, 7], dim=1)]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), **CLOSE)


@every_name
def test_crop_and_files(name, tmp_path):
    model, ids = tiny_model(**SHAPES[name]), random_ids(2, 20)
    cache = read_calls(model, ids, [15, 1, 4], recording_cache(model))
    cache.crop(-7)
    expected = read_calls(model, ids, [13], recording_cache(model))
    assert_same_state(cache, expected)
    cache.save_pretrained(tmp_path, model=model)
    assert_same_state(StackformerCache.from_pretrained(tmp_path, model), expected)


@torch.no_grad()
def test_the_state_is_constant_and_float32():
    model = tiny_model(torch.float32, noise=0.05, **SHAPES["infinity-former"])
    sizes = {n: model(random_ids(2, n), use_cache=True).past_key_values.num_bytes for n in (1, 6, 40)}
    per_row = 2 * (2 * 6 * 24 * 4 + 8 + 8 * 24 * 4 + 4 * 24 * 4)  # window, count, memory, pending block
    assert set(sizes.values()) == {2 * per_row}
    expected = model(random_ids(2, 40), use_cache=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(random_ids(2, 40), use_cache=True)
    memory, pending = outputs.past_key_values.layers[0].slices[0][3:]
    assert memory.dtype == pending.dtype == torch.float32
    exact = expected.past_key_values.layers[0].slices[0][3]
    assert (memory - exact).norm() / exact.norm() < 0.01


@both
def test_gradients_flow_through_the_memory(sticky):
    module, hidden = mixer(sticky), hidden_tokens(1, 11).requires_grad_()
    whole = torch.autograd.grad(read(module, hidden)[0][:, -1].sum(), (hidden, *module.parameters()))
    state = read(module, hidden[:, :6])[1]
    split = torch.autograd.grad(
        read(module, hidden[:, 6:], state)[0][:, -1].sum(), (hidden, *module.parameters())
    )
    torch.testing.assert_close(split, whole, **CLOSE)
    assert whole[0][0, :4].abs().amax(-1).min() > 1e-8, "the window ends at 5"
    if not sticky:  # where the memory is sampled has no gradient
        assert torch.autograd.gradcheck(lambda x: read(module, x)[0], hidden, fast_mode=True)


def test_a_window_shorter_than_a_block_is_refused():
    for window in (None, 4):
        with pytest.raises(
            ValueError, match="`sliding_window` must be at least the `memory_block`.*5, .*got"
        ):
            ContinuousAttention(tiny_config(**(SHAPES["infinity-former"] | {"sliding_window": window})))


@pytest.mark.parametrize(
    "field, value",
    [
        ("memory_block", 0),
        ("num_basis_functions", 1.5),
        ("memory_contraction", 1.0),
        ("memory_contraction", 0),
        ("memory_ridge", 0.0),
        ("basis_widths", []),
        ("density_loss_coef", -1.0),
        ("density_prior_width", 0.0),
        ("density_prior_mean", 1.5),
        ("basis_widths", [0.1, 0.0]),
        ("basis_widths", [0.1, 0.2, 0.3]),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*, got "):
        StackformerConfig(**{field: value})


def test_preset():
    fields = json.loads((Path(__file__).parent.parent / "configs" / "infinity-tiny.json").read_text())
    model = StackformerForCausalLM(StackformerConfig(**fields))
    assert abs(model.num_parameters() - 1_010_000) < 5_000
    assert isinstance(model.model.layers[1].mixer.short_term, Attention)
