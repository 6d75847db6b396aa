# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Adapters of PEFT and trainers of TRL work on this model as they come: trained, saved, reloaded, merged."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from stackformer import StackformerForCausalLM, build_byte_tokenizer
from tests.models import random_ids, spread_weights, tiny_config, tiny_model

peft = pytest.importorskip("peft", reason="adapters need the optional package peft")
torch.set_num_threads(1)
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
# The linear modules of a Stackformer, by the last part of their names.
CORE = ["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "read_proj", "write_proj"]
TARGETS = {
    "all-linear": "all-linear",
    "core": CORE,
    "decay_proj": ["decay_proj"],
    "action_proj": ["action_proj"],
}


def lora(targets, **options):
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, init_lora_weights=True, **options
    )


def spread_adapter(model):
    """LoRA starts at zero, which hides every mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def training_arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def adapted_modules(model) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    return [name.removesuffix(".base_layer") for name in names if name.endswith(".base_layer")]


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_an_adapter_is_a_change_of_the_weights(targets):
    """Base and adapter apart give what a model with W + s B A gives: the nonlinearities come after both."""
    base, ids = tiny_model(), random_ids(2, 20)
    with torch.no_grad():
        before = base(ids).logits
    model = spread_adapter(peft.get_peft_model(base, lora(targets))).eval()
    weights = tiny_model().state_dict()
    for name in adapted_modules(model):
        module = model.get_submodule(name)
        delta = module.lora_B["default"].weight @ module.lora_A["default"].weight
        weights[name.removeprefix("base_model.model.") + ".weight"] += 2 * delta.detach()
    expected = tiny_model()
    expected.load_state_dict(weights)
    with torch.no_grad():
        logits, expected = model(ids).logits, expected(ids).logits
        assert (expected - before).abs().max() > 0.01
        torch.testing.assert_close(logits, expected, **CLOSE)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, **CLOSE)


def test_all_linear_is_all_linear():
    """All but the head, which PEFT leaves out."""
    base = tiny_model()
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    model = peft.get_peft_model(base, lora("all-linear"))
    adapted = {name.removeprefix("base_model.model.") for name in adapted_modules(model)}
    assert adapted == linear - {"lm_head"}
    assert {name.rpartition(".")[2] for name in adapted} == {*CORE, "decay_proj", "action_proj"}


@pytest.mark.parametrize("targets", ["all-linear", CORE], ids=["all-linear", "core"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_train_save_reload_merge(tmp_path, targets, checkpointing):
    ids = random_ids(4, 20)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    model = peft.get_peft_model(tiny_model(ponder_loss_coef=0.1), lora(targets))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    args = training_arguments(tmp_path, gradient_checkpointing=checkpointing)
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        elif "lora_B" in name:
            assert parameter.any(), f"{name} did not learn"
    trainer.save_model(str(tmp_path / "adapter"))

    base = tiny_model()
    with torch.no_grad():
        before = base(ids).logits
        expected = model.eval()(ids).logits
        reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(reloaded(ids).logits, expected, **CLOSE)
        assert (expected - before).abs().max() > 0.01, "training changed nothing"
        generated = reloaded.generate(input_ids=ids[:, :5], max_new_tokens=3, do_sample=False)
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, **CLOSE)
        assert torch.equal(generated, merged.generate(ids[:, :5], max_new_tokens=3, do_sample=False))
        merged.save_pretrained(tmp_path / "merged")
        alone = StackformerForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
        torch.testing.assert_close(alone(ids).logits, expected, **CLOSE)


def test_prompt_tuning():
    """Virtual tokens are embeddings like others, left of the text."""
    model = peft.get_peft_model(
        tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    ids = random_ids(2, 9)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        virtual = model.get_prompt(batch_size=2).to(torch.float64)
        embeds = model.base_model.get_input_embeddings()(ids)
        expected = model.base_model(inputs_embeds=torch.cat([virtual, embeds], dim=1)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_prefix_tuning_says_that_it_cannot_work():
    """It makes keys and values for an attention that is not there."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ids = random_ids(2, 9)
    with pytest.raises(ValueError, match="`cache` must be a StackformerCache"):
        peft.get_peft_model(tiny_model(), config)(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("packing", [False, True], ids=["", "packing"])
def test_trl_sft(tmp_path, adapter, packing):
    """TRL's supervised fine-tuning, unmodified, on texts of different lengths."""
    trl = pytest.importorskip("trl", reason="supervised fine-tuning needs the optional package trl")
    from datasets import Dataset

    torch.manual_seed(0)
    model = spread_weights(
        StackformerForCausalLM(tiny_config(halting_threshold=0.1, ponder_loss_coef=0.05)), 0.05
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        max_length=32,
        packing=packing,
        learning_rate=0.01,
        disable_tqdm=True,
    )
    texts = ["the cat sat on the mat " * count for count in (1, 2, 1, 3)]
    trainer = trl.SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=build_byte_tokenizer(),
        peft_config=lora("all-linear") if adapter else None,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    if adapter:
        trainer.save_model(str(tmp_path / "adapter"))
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    else:
        for name, weight in trainer.model.state_dict().items():
            assert not torch.equal(weight, before[name]), f"{name} did not learn"
