# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer, unmodified: its losses, steps, checkpoints, evaluation are as they should be."""

import math

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from stackformer import StackformerForCausalLM
from tests.models import random_ids, spread_weights, tiny_config, tiny_model

torch.set_num_threads(1)
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def make_rows(count: int, length: int = 20) -> list[dict[str, torch.Tensor]]:
    """Rows of which each has another number of labels."""
    rows = []
    for index, ids in enumerate(random_ids(count, length)):
        labels = ids.clone()
        labels[: 1 + 5 * index % (length - 3)] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@pytest.fixture
def arguments(tmp_path):
    def make(**changes):
        defaults = {
            "output_dir": str(tmp_path),
            "optim": "sgd",  # its steps are the gradients: Adam's would hide a wrong factor
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return TrainingArguments(**(defaults | changes))

    return make


def train(args, rows, model=None, resume=None, **options) -> Trainer:
    model = tiny_model(ponder_loss_coef=0.1) if model is None else model
    trainer = Trainer(model, args, train_dataset=rows, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_accumulated_steps_are_one_step(arguments):
    """Each row counts by its labels, in the cross-entropy and in the ponder loss, however it is batched."""
    rows = make_rows(8)
    args = arguments(per_device_train_batch_size=4, max_steps=2, train_sampling_strategy="sequential")
    whole = train(args, rows)
    args = arguments(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=2,
        train_sampling_strategy="sequential",
    )
    pieces = train(args, rows)
    # The Trainer keeps its running loss in float32; steps are in the model's float64.
    torch.testing.assert_close(logged(pieces, "loss"), logged(whole, "loss"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logged(pieces, "grad_norm"), logged(whole, "grad_norm"), **CLOSE)
    torch.testing.assert_close(pieces.model.state_dict(), whole.model.state_dict(), **CLOSE)

    # By hand, so that both are not wrong alike.
    model = tiny_model(ponder_loss_coef=0.1).train().requires_grad_(False)
    outputs = model(torch.stack([row["input_ids"] for row in rows[:4]]))
    labels = torch.stack([row["labels"] for row in rows[:4]])[:, 1:]
    entropy = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten())
    ponder = outputs.ponder_steps[:, :-1][labels != -100].mean()
    assert math.isclose(logged(whole, "loss")[0], entropy + 0.1 * ponder, rel_tol=1e-6)
    assert 0.1 * ponder > 0.1, "the ponder loss is too small to show"


def test_gradient_checkpointing(arguments):
    """The same losses, with each layer computed twice."""
    calls = []

    def run(**changes):
        model = tiny_model(ponder_loss_coef=0.1)
        model.model.layers[0].mixer.register_forward_hook(lambda *unused: calls.append(model))
        args = arguments(max_steps=3, per_device_train_batch_size=2, max_grad_norm=0.5, **changes)
        return train(args, make_rows(6), model)

    plain, checkpointed = run(), run(gradient_checkpointing=True)
    torch.testing.assert_close(logged(checkpointed, "loss"), logged(plain, "loss"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(checkpointed.model.state_dict(), plain.model.state_dict(), **CLOSE)
    assert calls.count(checkpointed.model) == 2 * calls.count(plain.model) > 0


def test_a_resumed_run_is_the_uninterrupted_run(arguments, tmp_path):
    """To the last bit, in float32, with shuffled rows, a schedule and an optimiser that has a state."""
    rows = make_rows(10)

    def run(resume=None, **changes):
        options = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "num_train_epochs": 2} | changes
        args = arguments(per_device_train_batch_size=2, save_strategy="steps", save_steps=3, **options)
        return train(args, rows, tiny_model(torch.float32, ponder_loss_coef=0.1), resume)

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-3"))
    other = run(data_seed=1, seed=1)
    assert resumed.state.global_step == 10
    assert logged(resumed, "loss") == logged(whole, "loss")
    weights = whole.model.state_dict()
    assert all(torch.equal(resumed.model.state_dict()[name], weight) for name, weight in weights.items())
    assert not torch.equal(other.model.lm_head.weight, whole.model.lm_head.weight), "the order does not show"


@pytest.mark.parametrize(
    "strategy",
    [
        "random",
        "sequential",
        pytest.param(
            "group_by_length",
            marks=pytest.mark.xfail(strict=True, reason="transformers draws its order from where it resumes"),
        ),
    ],
)
def test_the_order_of_a_resumed_run(arguments, tmp_path, strategy):
    """In the second epoch the rows come as they would have, but for those that are grouped by length."""
    rows = [{"input_ids": ids, "labels": ids} for n in range(16) for ids in random_ids(1, 4 + n, seed=n)]

    def run(resume=None):
        read = []

        def collate(batch):
            read.append([len(row["labels"]) for row in batch])
            return {name: batch[0][name][None] for name in ("input_ids", "labels")}

        args = arguments(
            per_device_train_batch_size=2, num_train_epochs=2, save_strategy="steps", save_steps=11,
            train_sampling_strategy=strategy,
        )  # fmt: skip
        torch.manual_seed(0)
        train(args, rows, tiny_model(torch.float32), resume, data_collator=collate)
        return read

    whole = run()
    assert run(str(tmp_path / "checkpoint-11")) == whole[11:]


def test_label_smoothing(arguments):
    """(1 - e) * cross-entropy + e * mean over the vocabulary. The Trainer has to know to shift the labels.

    It asks the model for no loss, so there is none for pondering.
    """
    rows = make_rows(3)
    args = arguments(max_steps=1, per_device_train_batch_size=3, label_smoothing_factor=0.2)
    trainer = train(args, rows)
    model = tiny_model().train().requires_grad_(False)
    logits = model(torch.stack([row["input_ids"] for row in rows])).logits[:, :-1]
    labels = torch.stack([row["labels"] for row in rows])[:, 1:]
    log_probs = logits.log_softmax(-1)[labels != -100]
    nll = -log_probs.gather(-1, labels[labels != -100].unsqueeze(-1)).mean()
    expected = 0.8 * nll - 0.2 * log_probs.mean()
    assert math.isclose(logged(trainer, "loss")[0], expected, rel_tol=1e-6)
    assert abs(nll - expected) > 0.01, "smoothing does not show"


def test_evaluation_is_the_cross_entropy(arguments):
    """Without the ponder loss; and the predictions are logits only, without caches or traces."""
    model, rows = tiny_model(ponder_loss_coef=0.1), make_rows(5)[2:]  # batches of 2 and 1
    args = arguments(per_device_eval_batch_size=2, logging_steps=10)
    trainer = Trainer(model, args, eval_dataset=rows)
    model.config.use_cache = True  # the Trainer turns it off, but it is not said that it stays so
    metrics = trainer.evaluate()
    predictions = trainer.predict(rows)
    with torch.no_grad():
        logits = model(torch.stack([row["input_ids"] for row in rows])).logits
    assert predictions.predictions.shape == logits.shape
    torch.testing.assert_close(torch.from_numpy(predictions.predictions), logits, **CLOSE)
    # The Trainer takes the mean over rows, of which each has the loss of its batch.
    batches = [slice(0, 2), slice(2, 3)]
    labels = torch.stack([row["labels"] for row in rows])
    losses = [
        nn.functional.cross_entropy(logits[part, :-1].flatten(0, 1), labels[part, 1:].flatten()).item()
        for part in batches
    ]
    expected = (2 * losses[0] + losses[1]) / 3
    assert math.isclose(metrics["eval_loss"], expected, rel_tol=1e-6)
    assert math.isclose(predictions.metrics["test_loss"], expected, rel_tol=1e-6)


def test_bfloat16(arguments):
    """Mixed precision: finite losses near those of float32, and weights that stay in float32."""
    rows = make_rows(6)

    def run(**changes):
        args = arguments(max_steps=3, per_device_train_batch_size=2, max_grad_norm=0.5, **changes)
        return train(args, rows, tiny_model(torch.float32, noise=0.05, ponder_loss_coef=0.1))

    full, mixed = run(), run(bf16=True)
    assert logged(mixed, "loss") != logged(full, "loss"), "nothing was computed in bfloat16"
    torch.testing.assert_close(logged(mixed, "loss"), logged(full, "loss"), rtol=0.02, atol=0)
    assert all(math.isfinite(norm) for norm in logged(mixed, "grad_norm"))
    assert {weight.dtype for weight in mixed.model.parameters()} == {torch.float32}


def test_tensorboard(arguments, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is an optional logger")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = train(arguments(max_steps=2, report_to="tensorboard"), make_rows(4))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    torch.testing.assert_close(losses, logged(trainer, "loss"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ponder_loss_coef", [0.0, 0.05])
def test_it_learns(arguments, ponder_loss_coef):
    """A text that repeats itself, from the model's own initial values: nearly all of it in 40 steps."""
    ids = torch.tensor(list(b"the cat sat on the mat, " * 2))
    torch.manual_seed(0)
    model = StackformerForCausalLM(tiny_config(initializer_range=0.02, ponder_loss_coef=ponder_loss_coef))
    args = arguments(optim="adamw_torch", learning_rate=0.02, max_steps=40, per_device_train_batch_size=2)
    trainer = train(args, [{"input_ids": ids, "labels": ids}] * 2, model)
    losses = logged(trainer, "loss")
    assert losses[0] > 5 and losses[-1] - ponder_loss_coef * 4 < 0.5, losses
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 0.5


def test_training_turns_the_cache_off_and_generation_still_works(arguments):
    """The Trainer sets `use_cache` to False for itself; `generate` has its own."""
    model = spread_weights(tiny_model(torch.float32), noise=0.0)
    trainer = train(arguments(max_steps=1), make_rows(2), model)
    generated = trainer.model.eval().generate(random_ids(1, 5), max_new_tokens=4, do_sample=False)
    again = trainer.model.generate(random_ids(1, 5), max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(generated, again)
