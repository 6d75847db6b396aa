"""Trained on documents of any length, with the state carried: the Trainer, no more and no less."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from stackformer.training.long_context_trainer import (
    DocumentStreams,
    LongContextArguments,
    LongContextTrainer,
)
from tests.models import random_ids, tiny_model

torch.set_num_threads(1)


def model_for(dtype: torch.dtype = torch.float64, **overrides):
    return tiny_model(dtype, **({"ponder_loss_coef": 0.1} | overrides))


@pytest.fixture
def arguments(tmp_path):
    def make(**changes):
        defaults = {
            "output_dir": str(tmp_path),
            "optim": "sgd",
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "chunk_size": 8,
            "context_length": 20,
        }
        return LongContextArguments(**(defaults | changes))

    return make


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def documents(*lengths: int) -> list[torch.Tensor]:
    return [random_ids(1, length, seed=length)[0] for length in lengths]


def test_streams_read_every_token_once_in_order():
    """Seven documents on three streams, in segments of ten."""
    given = documents(31, 5, 12, 40, 11, 3, 25)
    streams = DocumentStreams(given, 3, 10)
    read: list[list[int]] = [[] for _ in range(3)]
    finished = []
    for step in range(streams.num_steps):
        items = [streams[3 * step + stream] for stream in range(3)]
        assert len({len(item["input_ids"]) for item in items}) == 1
        for stream, item in enumerate(items):
            if not item["continues"]:
                finished.append(read[stream])
                read[stream] = []
            tokens = item["attention_mask"].bool()
            assert item["shift_labels"][~tokens].eq(-100).all()
            assert read[stream][-1:] == item["input_ids"][:1].tolist() or not item["continues"]
            read[stream] = read[stream][:-1] + item["input_ids"][tokens].tolist()
            read[stream] += item["shift_labels"][tokens][-1:].tolist()
    finished += read
    assert sorted(x for x in finished if x) == sorted(x.tolist() for x in given)
    assert len(streams) == 3 * streams.num_steps == 21
    with pytest.raises(ValueError, match="at least two tokens each, got 1: 1"):
        DocumentStreams(documents(4, 1), 1)


IDS = [3, 1, 4, 1, 5, 9]


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "`documents` must be at least one, got none"),
        ("a text", "`documents` must be a list of documents, got str"),
        ({"input_ids": IDS}, "`documents` must be a list of documents, got dict"),
        (iter([IDS]), "`documents` must be a list of documents, got list_iterator"),
        ([IDS, "a text"], "or dicts with `input_ids`, got a str as document 1"),
        ([b"bytes"], "or dicts with `input_ids`, got a bytes as document 0"),
        ([{"text": "a"}], r"or dicts with `input_ids`, got \['text'\] as document 0"),
        ([IDS, ["a", "b"]], "integers as `input_ids`, got shape .2,. of <U1 in document 1"),
        ([[0.5, 1.5]], "integers as `input_ids`, got shape .2,. of float64 in document 0"),
        ([torch.ones(3)], "integers as `input_ids`, got shape .3,. of float32 in document 0"),
        ([[IDS, IDS]], "integers as `input_ids`, got shape .2, 6. of int64 in document 0"),
        ([[True, False]], "integers as `input_ids`, got shape .2,. of bool in document 0"),
        ([IDS, [1, -2, 3]], "ids below 261, not negative, as `input_ids`, got -2 in document 1"),
        ([[1, 261, 3]], "ids below 261, not negative, as `input_ids`, got 261 in document 0"),
        ([{"input_ids": IDS, "labels": [1]}], "as many `labels` as `input_ids`, got 1 and 6 in document 0"),
        ([{"input_ids": IDS, "labels": IDS + [1]}], "as many .*, got 7 and 6 in document 0"),
        ([{"input_ids": IDS, "labels": [-1] * 6}], "or -100, as `labels`, got -1 in document 0"),
        ([{"input_ids": IDS, "labels": [300] * 6}], "or -100, as `labels`, got 300 in document 0"),
        ([{"input_ids": IDS, "labels": [1.0] * 6}], "integers as `labels`, got shape .6,. of float64"),
    ],
)
def test_bad_documents(given, message):
    with pytest.raises(ValueError, match=message):
        DocumentStreams(given, 1, vocab_size=261)


def test_documents_may_be_anything_with_ids():
    labels = [-100, 2, -100, 4, 5, 6]
    for given in (IDS, tuple(IDS), torch.tensor(IDS), np.array(IDS, np.uint8), {"input_ids": IDS}):
        assert DocumentStreams([given], 1)[0]["input_ids"].tolist() == IDS[:-1]
    item = DocumentStreams([{"input_ids": IDS, "labels": labels}], 1, vocab_size=10)[0]
    assert item["shift_labels"].tolist() == labels[1:]


@pytest.mark.parametrize("number", [0, -1])
def test_bad_numbers_of_streams(number):
    with pytest.raises(ValueError, match=f"`num_streams` must be at least 1, got {number}"):
        DocumentStreams([IDS], number)


@pytest.mark.parametrize(
    "name, value",
    [
        ("context_length", 0), ("chunk_size", 0), ("backpropagation", "magic"), ("max_log_decay", -1.0),
        ("max_drift", float("nan")), ("state_storage", "nowhere"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_at_once(arguments, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*got {value!r}"):
        arguments(**{name: value})


def test_the_trainer_checks_the_vocabulary(arguments):
    with pytest.raises(ValueError, match="ids below 261, .* got 261 in document 0"):
        LongContextTrainer(model_for(), arguments(), train_dataset=[[1, 261]])
    trainer = LongContextTrainer(model_for(), arguments(), eval_dataset=[[1, 2], [1, 999]])
    with pytest.raises(ValueError, match="ids below 261, .* got 999 in document 1"):
        trainer.evaluate()


def test_a_step_without_labels_changes_nothing(arguments):
    """A segment of a prompt, all of which is masked, is no division by zero."""
    ids = random_ids(1, 41)[0]
    labels = ids.clone()
    labels[:25] = -100  # the first of two segments, and a part of the second
    model = model_for()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = arguments(max_steps=1)
    given = [{"input_ids": ids, "labels": labels}]
    trainer = LongContextTrainer(model, args, train_dataset=given, eval_dataset=given)
    trainer.train()
    assert logged(trainer, "loss") == [0.0]
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    args.max_steps = 2
    trainer = LongContextTrainer(model, args, train_dataset=given)
    trainer.train()
    assert logged(trainer, "loss")[1] > 1


def test_whole_documents_are_the_plain_trainer(arguments, tmp_path):
    """Losses, norms of the gradients and weights, with rows that differ in length, accumulated over steps."""
    given = documents(30, 17, 25, 22)
    args = arguments(
        context_length=None, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2
    )
    trainer = LongContextTrainer(model_for(), args, train_dataset=given)
    trainer.train()
    rows = [
        {name: item[name] for name in ("input_ids", "attention_mask", "labels", "shift_labels")}
        for item in trainer.train_dataset
    ]
    plain_args = TrainingArguments(
        output_dir=str(tmp_path), optim="sgd", learning_rate=0.05, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
        train_sampling_strategy="sequential", remove_unused_columns=False,
    )  # fmt: skip
    plain = Trainer(model_for(), plain_args, train_dataset=rows)
    plain.train()
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(logged(trainer, name), logged(plain, name), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(trainer.model.state_dict(), plain.model.state_dict(), rtol=1e-7, atol=1e-9)
    assert max(logged(trainer, "drift")) < 1e-10
    assert all(logged(trainer, "kept_bytes_per_token"))
    assert trainer.state.num_input_tokens_seen == 2 * sum(len(x) - 1 for x in given)


def test_the_state_is_carried_to_the_next_step(arguments):
    """Without learning, the losses of the segments are those of one pass over the documents."""
    given = documents(50, 35)
    args = arguments(learning_rate=0.0, per_device_train_batch_size=2, num_train_epochs=2)
    model = model_for(ponder_loss_coef=0.0)
    trainer = LongContextTrainer(model, args, train_dataset=given, eval_dataset=given)
    trainer.train()
    with torch.no_grad():
        nll = [
            nn.functional.cross_entropy(trainer.model(ids[None, :-1]).logits[0], ids[1:], reduction="none")
            for ids in given
        ]
    steps = [torch.cat([row[start : start + 20] for row in nll]).mean().item() for start in (0, 20, 40)]
    assert logged(trainer, "loss") == pytest.approx(2 * steps, rel=1e-5)
    args.per_device_eval_batch_size = 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(steps) / 3, rel=1e-5)


def test_a_run_resumes_in_the_middle_of_its_documents(arguments, tmp_path):
    """To the last bit, in float32."""

    def run(resume=None):
        args = arguments(
            per_device_train_batch_size=2, optim="adamw_torch", num_train_epochs=2, context_length=12,
            save_strategy="steps", save_steps=1,
        )  # fmt: skip
        model = model_for(dtype=torch.float32, max_ponder_steps=2)
        trainer = LongContextTrainer(model, args, train_dataset=documents(40, 25))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    assert whole.state.global_step == 8
    for step in (3, 4):
        resumed = run(str(tmp_path / f"checkpoint-{step}"))
        assert logged(resumed, "loss") == logged(whole, "loss")
        weights = resumed.model.state_dict()
        assert all(torch.equal(weights[name], x) for name, x in whole.model.state_dict().items()), step
    (tmp_path / "checkpoint-3" / "streams_0_of_1.pt").unlink()
    with pytest.raises(ValueError, match="must hold streams_0_of_1.pt"):
        run(str(tmp_path / "checkpoint-3"))


def test_bad_trainer_arguments(arguments):
    with pytest.raises(ValueError, match="`train_sampling_strategy` must be 'sequential'.*'random'"):
        arguments(train_sampling_strategy="random")
    with pytest.raises(ValueError, match="`args` must be LongContextArguments, got NoneType"):
        LongContextTrainer(model_for())
