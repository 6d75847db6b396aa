# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The Trainer of this package: the depth is in the metrics it belongs to, and only weights decay."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from experiments.presets import read_preset
from stackformer.tokenization_stackformer import build_byte_tokenizer
from stackformer.training.long_context_trainer import LongContextArguments, LongContextTrainer
from stackformer.training.trainer import (
    PonderLogging,
    SelectiveDecay,
    StackformerTrainer,
    ponder_metrics,
    ponder_sums,
)
from tests.models import tiny_model
from tests.test_training import make_rows

torch.set_num_threads(1)
PRESETS = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))


@pytest.fixture
def arguments(tmp_path):
    def make(**changes):
        defaults = {
            "output_dir": str(tmp_path),
            "learning_rate": 0.0,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return TrainingArguments(**(defaults | changes))

    return make


@torch.no_grad()
def depth_of(model, rows, prefix="") -> dict[str, float]:
    """The metrics of rows that are read once, in one batch."""
    distribution = model(torch.stack([row["input_ids"] for row in rows])).ponder_distribution
    metrics = ponder_metrics(ponder_sums(distribution))
    return {prefix + name: pytest.approx(value, abs=2e-4) for name, value in metrics.items()}


def ponder_entries(metrics) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "ponder" in name}


# Depth


def test_evaluation_and_prediction_return_their_depth(arguments):
    """Each its own: nothing of one is left for the next."""
    model, rows = tiny_model(), make_rows(9)
    trainer = StackformerTrainer(model, arguments(), train_dataset=rows[:2])
    first, second, third = rows[2:5], rows[5:7], rows[7:]
    assert depth_of(model, first)["ponder_steps"] != depth_of(model, second)["ponder_steps"].expected
    assert ponder_entries(trainer.predict(first).metrics) == depth_of(model, first, "test_")
    assert ponder_entries(trainer.evaluate(second)) == depth_of(model, second, "eval_")
    assert ponder_entries(trainer.state.log_history[-1]) == depth_of(model, second, "eval_")
    named = trainer.predict(third, metric_key_prefix="final").metrics
    assert ponder_entries(named) == depth_of(model, third, "final_")
    unlabelled = [{"input_ids": row["input_ids"]} for row in first]
    assert ponder_entries(trainer.predict(unlabelled).metrics) == depth_of(model, first, "test_")
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert ponder_entries(entry) == depth_of(model, rows[:2])


def test_an_evaluation_that_broke_off_leaves_nothing(arguments, monkeypatch):
    model, rows = tiny_model(), make_rows(6)
    trainer = StackformerTrainer(model, arguments())
    with monkeypatch.context() as patch:
        patch.setattr(trainer.callback_handler, "on_prediction_step", lambda *unused: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate(rows[:4])
    assert ponder_entries(trainer.evaluate(rows[4:])) == depth_of(model, rows[4:], "eval_")


def test_several_evaluation_sets_have_their_own_depth(arguments):
    model, rows = tiny_model(), make_rows(8)
    sets = {"short": rows[2:5], "other": rows[5:]}
    args = arguments(eval_strategy="steps", eval_steps=2)
    trainer = StackformerTrainer(model, args, train_dataset=rows[:2], eval_dataset=sets)
    trainer.train()
    expected = {name: depth_of(model, some, f"eval_{name}_") for name, some in sets.items()}
    for name in sets:
        (entry,) = (x for x in trainer.state.log_history if f"eval_{name}_loss" in x)
        assert ponder_entries(entry) == expected[name]
    assert ponder_entries(trainer.evaluate()) == expected["short"] | expected["other"]


class WithoutOutputs(Trainer):
    """A Trainer whose loss is its own, as GRPO's is: it refuses to return outputs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("does not support returning outputs")
        return model(inputs["input_ids"]).logits.logsumexp(-1).mean()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None


def test_a_trainer_that_returns_no_outputs(arguments):
    class Mine(PonderLogging, WithoutOutputs):
        pass

    model, rows = tiny_model(), make_rows(4)
    trainer = Mine(model, arguments(max_steps=1), train_dataset=rows[:2], eval_dataset=rows[2:])
    trainer.train()
    assert ponder_entries(trainer.state.log_history[0]) == depth_of(model, rows[:2])
    assert ponder_entries(trainer.evaluate()) == depth_of(model, rows[2:], "eval_")


def test_grpo(tmp_path):
    """The real one. What it samples is random, so its depth is compared with what the loss read."""
    trl = pytest.importorskip("trl", reason="trl is optional")
    import datasets

    class Mine(PonderLogging, trl.GRPOTrainer):
        pass

    model, tokenizer = tiny_model(torch.float32), build_byte_tokenizer()
    read = []
    args = trl.GRPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, num_generations=2, logging_steps=1,
        max_completion_length=4, learning_rate=0.0, save_strategy="no", report_to="none", use_cpu=True,
        bf16=False, disable_tqdm=True, per_device_eval_batch_size=2, gradient_checkpointing=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": "Once"}, {"prompt": "Two men"}])
    trainer = Mine(
        model, reward_funcs=lambda completions, **unused: [float(len(x)) for x in completions], args=args,
        train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    compute_loss = trainer._compute_loss

    def noting(model, inputs):
        read.append(torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).sum().item())
        return compute_loss(model, inputs)

    trainer._compute_loss = noting
    sums = []
    take = trainer._take_sums
    trainer._take_sums = lambda training: sums.append(take(training)) or sums[-1]
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2 and all(1 < entry["ponder_steps"] < 4 for entry in entries)
    counts = [x[0].item() for x in sums if x is not None]
    assert counts == read, "tokens other than those of the loss were counted"
    assert 1 < trainer.evaluate()["eval_ponder_steps"] < 4


@pytest.mark.parametrize("wrap", [pytest.param("compile", marks=pytest.mark.slow), "peft"])
def test_wrapped_models_have_their_depth(arguments, wrap):
    model, rows = tiny_model(torch.float32), make_rows(4)
    expected = depth_of(model, rows[:2]), depth_of(model, rows[2:], "eval_")
    if wrap == "peft":
        peft = pytest.importorskip("peft", reason="peft is optional")
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
        )
        changes = {}
    else:
        changes = {"torch_compile": True, "torch_compile_backend": "eager"}
    args = arguments(max_steps=1, **changes)
    trainer = StackformerTrainer(model, args, train_dataset=rows[:2], eval_dataset=rows[2:])
    trainer.train()
    assert ponder_entries(trainer.state.log_history[0]) == expected[0]
    assert ponder_entries(trainer.evaluate()) == expected[1]


# Weight decay


def undecayed_names(trainer_class, model, args) -> set[str]:
    trainer = trainer_class(model, args)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: group["params"] for group in trainer.optimizer.param_groups}
    assert set(groups) == {0.0, 0.1}
    return {names[id(parameter)] for parameter in groups[0.0]}


def expected_undecayed(model) -> set[str]:
    """All that is no matrix of a projection, an embedding of tokens or a convolution."""
    decayed = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d) or name == "model.embed_tokens"
    }
    return {name for name, _ in model.named_parameters()} - decayed


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", ["plain", "long"])
def test_only_weights_decay(arguments, tmp_path, preset, kind):
    model = AutoModelForCausalLM.from_config(read_preset(str(preset)))
    if kind == "plain":
        undecayed = undecayed_names(StackformerTrainer, model, arguments(weight_decay=0.1))
    else:
        args = LongContextArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
        undecayed = undecayed_names(LongContextTrainer, model, args)
    assert undecayed == expected_undecayed(model)
    fields = json.loads(preset.read_text())
    ours = {
        "step_gate.weight": fields["max_ponder_steps"] > 1,
        "time_decay": "rwkv" in preset.stem,
        "time_first": "rwkv" in preset.stem,
        "mixer.shift.weight": "rwkv" in preset.stem,
        "mlp.shift.weight": "rwkv" in preset.stem,
        "initial_memory": "titans" in preset.stem,
        "persistent.weight": "titans" in preset.stem,
        "layernorm.weight": True,
    }
    found = {ending: any(name.endswith(ending) for name in undecayed) for ending in ours}
    assert found == ours


def test_weight_decay_moves_no_gate(arguments):
    """In a run: with a rate but without gradients, Adam moves what decays and nothing else."""
    model = tiny_model(torch.float32, mixer_types=["neural_memory", "banked_linear_attention"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = StackformerTrainer(model, arguments(weight_decay=0.1, learning_rate=0.1))
    trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "model.step_gate.weight" not in moved
    assert moved == {name for name, _ in model.named_parameters()} - expected_undecayed(model)


def test_another_trainer_keeps_its_decay_to_weights(arguments):
    class Mine(SelectiveDecay, Trainer):
        pass

    plain = undecayed_names(Trainer, tiny_model(), arguments(weight_decay=0.1))
    ours = undecayed_names(Mine, tiny_model(), arguments(weight_decay=0.1))
    assert ours - plain == {"model.step_gate.weight"} and plain < ours


# Labels


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_loss_is_the_mean_over_the_labels_that_count(arguments, padding_side, accumulated):
    """With the collator of transformers, whose labels are those of all tokens but padding."""
    model, tokenizer = tiny_model(ponder_loss_coef=0.0), build_byte_tokenizer()
    tokenizer.padding_side = padding_side
    lengths = (5, 12, 7, 3)
    rows = [
        {"input_ids": row["input_ids"][:length]} for row, length in zip(make_rows(4), lengths, strict=True)
    ]
    alone = [model(row["input_ids"][None], labels=row["input_ids"][None]).loss.item() for row in rows]
    counts = [length - 1 for length in lengths]
    expected = sum(n * loss for n, loss in zip(counts, alone, strict=True)) / sum(counts)
    trainer = StackformerTrainer(
        model,
        arguments(
            max_steps=1,
            per_device_train_batch_size=4 // accumulated,
            gradient_accumulation_steps=accumulated,
            logging_nan_inf_filter=False,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    assert trainer.train().training_loss == pytest.approx(expected, abs=1e-6)


def test_labels_of_packed_documents_that_count(arguments):
    """The first token of a document is no label of the one before."""
    model, ids = tiny_model(ponder_loss_coef=0.0), make_rows(1)[0]["input_ids"][:12]
    positions = torch.tensor([*range(5), *range(7)])
    row = {"input_ids": ids, "labels": ids, "position_ids": positions}
    expected = model(ids[None], labels=ids[None], position_ids=positions[None]).loss.item()
    trainer = StackformerTrainer(
        model, arguments(max_steps=1, per_device_train_batch_size=1), train_dataset=[row]
    )
    assert trainer.train().training_loss == pytest.approx(expected, abs=1e-6)
