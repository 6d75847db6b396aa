# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Halting that trains and saves: the distribution over steps, its losses, its log, its threshold."""

import json
import logging
import math

import pytest
import torch
from transformers import TrainingArguments

from benchmarks import frontier
from stackformer import StackformerCache, build_byte_tokenizer
from stackformer.processing_stack import divergence_from_geometric, entropy
from stackformer.training.trainer import StackformerTrainer, ponder_metrics, ponder_sums
from tests.models import random_ids, tiny_model
from tests.test_modeling import CLOSE, assert_same_state, read_in_pieces
from tests.test_training import make_rows

THRESHOLDS = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]


def test_distribution_over_steps():
    """It is the mass that the trace shows to be dropped, whatever was gathered out on the way."""
    model, ids = tiny_model(), random_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    outputs = model(ids, attention_mask=mask, output_stack_trace=True)
    distribution, trace = outputs.ponder_distribution, outputs.stack_trace
    assert distribution.shape == (3, 20, 4)
    assert not distribution[0, :6].any()
    torch.testing.assert_close(distribution.sum(-1), mask.double(), **CLOSE)
    torch.testing.assert_close((distribution * torch.arange(1, 5)).sum(-1), outputs.ponder_steps, **CLOSE)
    mass = trace.pointer.sum(-1)  # before each step, 0 once it is flushed
    left = torch.nn.functional.pad(mass[..., 1:], (0, 1))
    torch.testing.assert_close(distribution, mass - left, **CLOSE)
    assert torch.equal(distribution > 0, trace.active)


def test_divergence_from_the_geometric_prior():
    prior = torch.tensor([0.3 * 0.7**k for k in range(4)], dtype=torch.float64)
    prior /= prior.sum()
    torch.testing.assert_close(divergence_from_geometric(prior, 0.3), prior.new_zeros(()), **CLOSE)
    once = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64, requires_grad=True)
    divergence = divergence_from_geometric(once, 0.3)
    assert math.isclose(divergence.detach(), -math.log(prior[0]), rel_tol=1e-9)
    divergence.backward()
    assert once.grad.isfinite().all()
    some = torch.rand(5, 4, dtype=torch.float64).softmax(-1)
    expected = torch.nn.functional.kl_div(prior.log().expand(5, 4), some, reduction="none").sum(-1)
    torch.testing.assert_close(divergence_from_geometric(some, 0.3), expected, **CLOSE)
    assert math.isclose(entropy(torch.full((4,), 0.25)), math.log(4), rel_tol=1e-6)


def test_the_prior_in_the_training_loss():
    ids = random_ids(2, 20)
    labels = ids.clone()
    labels[0, :10] = -100
    plain = tiny_model(ponder_loss_type="geometric_prior").train()
    model = tiny_model(ponder_loss_type="geometric_prior", ponder_prior=0.3, ponder_loss_coef=0.1).train()
    counted = labels[:, 1:] != -100
    for items in (None, 50):
        outputs = model(ids, labels=labels, num_items_in_batch=items)
        losses = divergence_from_geometric(outputs.ponder_distribution[:, :-1], 0.3)[counted]
        expected = plain(ids, labels=labels, num_items_in_batch=items).loss
        expected = expected + 0.1 * losses.sum() / (counted.sum() if items is None else items)
        torch.testing.assert_close(outputs.loss, expected, **CLOSE)
        assert losses.mean() > 0.01
    assert torch.equal(model.eval()(ids, labels=labels).loss, plain.eval()(ids, labels=labels).loss)


@pytest.mark.parametrize(("rate", "expected"), [(0.9, 1.11), (0.05, 2.44)])
def test_the_prior_is_learned(rate, expected):
    """With no text to learn, the mean depth goes to the prior's, from where the action projection starts."""
    model, ids = tiny_model(halting_threshold=0.0), random_ids(2, 10)
    optimizer = torch.optim.Adam(model.model.action_proj.parameters(), lr=0.2)
    for _ in range(60):
        outputs = model(ids)
        divergence_from_geometric(outputs.ponder_distribution, rate).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(float(outputs.ponder_steps.mean()) - expected) < 0.2


@torch.no_grad()
def test_a_higher_threshold_is_less_depth():
    model, ids = tiny_model(), random_ids(2, 40)
    computed, at_second_step = [], None
    for threshold in THRESHOLDS:
        trace = model(ids, halting_threshold=threshold, output_stack_trace=True).stack_trace
        computed.append(float(trace.active.double().mean()))
        # The first step is the same for all: what stops there does so for every higher threshold.
        assert at_second_step is None or (trace.active[:, :, 1] <= at_second_step).all()
        at_second_step = trace.active[:, :, 1]
    assert computed == sorted(computed, reverse=True) and computed[0] == 1 and computed[-1] < 0.5
    model.config.halting_threshold = THRESHOLDS[3]
    same = model(ids).logits
    model.config.halting_threshold = 0.4
    assert torch.equal(model(ids, halting_threshold=THRESHOLDS[3]).logits, same)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@torch.no_grad()
def test_any_split_gives_the_same_at_any_threshold(threshold):
    model, ids = tiny_model(halting_threshold=threshold), random_ids(4, 17)
    expected = model(ids, use_cache=True)
    for sizes in ([1] * 17, [5, 1, 11]):
        logits, cache = read_in_pieces(model, ids, sizes)
        torch.testing.assert_close(logits, expected.logits, **CLOSE)
        assert_same_state(cache, expected.past_key_values)


def test_generate_takes_a_threshold():
    model, ids = tiny_model(), random_ids(2, 6)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    outputs = model.generate(ids, halting_threshold=0.9, **options)
    assert not torch.equal(outputs, model.generate(ids, **options)), "the threshold does not show"
    uncached = model.generate(ids, halting_threshold=0.9, use_cache=False, **options)
    model.config.halting_threshold = 0.9
    assert torch.equal(outputs, model.generate(ids, **options))
    assert torch.equal(outputs, uncached)
    with pytest.raises(ValueError, match="`halting_threshold` must be at least 0 and less than 1, got 1"):
        model(ids, halting_threshold=1)


@torch.no_grad()
def test_rows_are_written_in_place_only_where_nobody_sees_it():
    """Decoding with halted rows makes no copies of the others; every copy of the cache stays as it was."""
    model, ids = tiny_model(halting_threshold=0.5), random_ids(6, 30)
    cache = model(ids[:, :10], use_cache=True).past_key_values
    copies, addresses = [], []
    for t in range(10, 30):
        if t % 4 == 0:
            copies.append((t, cache.detach() if t % 8 else cache.clone()))
        cache = model(ids[:, t : t + 1], past_key_values=cache).past_key_values
        addresses.append(cache.layers[0].slices[1][0].data_ptr())
    assert len(set(addresses)) < len(addresses) / 2, "every step made a new state"
    for t, copy in [*copies, (30, cache)]:
        assert_same_state(copy, model(ids[:, :t], use_cache=True).past_key_values)
    # A graph never sees a state change: with gradients, states are replaced.
    with torch.enable_grad():
        for t in range(2):
            held = cache.layers[0].slices[1][0]
            value = held.clone()
            cache = model(ids[:, t : t + 1], past_key_values=cache).past_key_values
            assert torch.equal(held, value)
    # Nor does a state of inference mode outside of it.
    with torch.inference_mode():
        cache = StackformerCache(model.config)
        for t in range(4):
            model(ids[:, t : t + 1], past_key_values=cache)
    for t in range(4, 8):
        model(ids[:, t : t + 1], past_key_values=cache)
    assert_same_state(cache, model(ids[:, :8], use_cache=True).past_key_values)


def test_the_log_shows_the_depth(tmp_path):
    """Means over all tokens since the last entry, of training and of evaluation apart."""
    rows, model = make_rows(8), tiny_model()
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
        logging_steps=2, learning_rate=0.0, train_sampling_strategy="sequential", save_strategy="no",
        eval_strategy="steps", eval_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = StackformerTrainer(model, args, train_dataset=rows, eval_dataset=rows[:3])
    trainer.train()

    def expected(some):
        outputs = model(torch.stack([row["input_ids"] for row in some]), output_stack_trace=True)
        steps, distribution = outputs.ponder_steps, outputs.ponder_distribution.mean((0, 1))
        return {
            "ponder_steps": steps.mean(),
            "ponder_steps_std": steps.std(correction=0),
            "ponder_entropy": torch.special.entr(distribution).sum(),
            "ponder_computed": outputs.stack_trace.active.double().mean(),
            **{f"ponder_dropped_{k}": mass for k, mass in enumerate(distribution, start=1)},
        }

    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    for name, value in expected(rows).items():
        assert math.isclose(entry[name], value, abs_tol=2e-4), name
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2 and "ponder_steps" not in evaluations[0]
    for name, value in expected(rows[:3]).items():
        assert math.isclose(evaluations[1][f"eval_{name}"], value, abs_tol=2e-4), name


@pytest.mark.parametrize("collapsed", [True, False])
def test_a_collapse_is_told_once(tmp_path, monkeypatch, collapsed):
    warnings = []
    logger = logging.getLogger("stackformer.training.trainer")
    monkeypatch.setattr(logger, "warning", warnings.append)
    model = tiny_model()
    if collapsed:
        with torch.no_grad():
            model.model.action_proj.bias[2] = 30
    args = TrainingArguments(
        str(tmp_path), max_steps=3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = StackformerTrainer(model, args, train_dataset=make_rows(4))
    trainer.train()
    assert len(warnings) == collapsed
    assert not collapsed or "done after 1.00 ponder steps" in warnings[0]


def test_padding_does_not_count():
    distribution = torch.tensor([[[0.5, 0.5], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    metrics = ponder_metrics(ponder_sums(distribution))
    assert metrics["ponder_steps"] == 1.25 and metrics["ponder_steps_std"] == 0.25
    assert metrics["ponder_computed"] == 0.75
    assert metrics["ponder_dropped_1"] == 0.75 and metrics["ponder_dropped_2"] == 0.25


def test_frontier(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    tiny_model(torch.float32).save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text").write_bytes(bytes(range(256)) * 2)
    options = "--range 0 100 --thresholds 0 0.5 --batch_size 1 3 --block_size 20 --tokens 2 --repeats 1"
    files = ["--json", f"{tmp_path}/out.json", "--plot", f"{tmp_path}/out.png"]
    frontier.main(["--model", str(tmp_path), "--text", f"{tmp_path}/text", *options.split(), *files])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    quality = [row for row in rows if row["use"] == "evaluation"]
    assert [row["threshold"] for row in quality] == [0, 0.5]
    assert quality[0]["computed"] == 1 > quality[1]["computed"]
    assert len(rows) == 2 + 2 * 2 * 2
    assert (tmp_path / "out.png").stat().st_size > 1000
