# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Adapters of PEFT and trainers of TRL work on this model as they come: trained, saved, reloaded, merged."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from stackformer import StackformerCache, StackformerForCausalLM, build_byte_tokenizer
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
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": True, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **options)


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


KINDS = {
    "LoHa on the convolution": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["conv"]),
    "LoKr on the convolution": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", r=4, target_modules=["conv"]),
    "LoRA on the convolution": lambda: lora(["conv"], r=48),  # PEFT wants a multiple of the channels
    "DoRA": lambda: lora("all-linear", use_dora=True),
    "IA3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "embeddings": lambda: lora(["embed_tokens", "persistent"]),
    "whole modules": lambda: lora(["qkv_proj"], modules_to_save=["norm", "lm_head"]),
}
MIXERS = [
    {},
    {"mixer_types": ["banked_delta_rule", "neural_memory"]},
    {"mixer_types": ["attention", "memory_as_context"], "num_persistent_tokens": 2},
]


@pytest.mark.parametrize("shape", MIXERS, ids=["bank", "delta, memory", "attention, context"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@torch.no_grad()
def test_adapters_of_all_kinds(kind, shape):
    """Read at once, in parts and token by token; and merged, where PEFT can."""
    config = kind()
    if config.target_modules == {"conv"} and "mixer_types" in shape and "attention" in shape["mixer_types"]:
        shape = shape | {"mixer_types": ["banked_linear_attention", "memory_as_context"]}
    base, ids = tiny_model(**shape), random_ids(2, 9)
    before = base(ids).logits
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=generator))
    expected = model(ids).logits
    assert (expected - before).abs().max() > 1e-3
    for size in (5, 1):
        cache, logits = None, []
        for part in ids.split(size, dim=1):
            outputs = model(part, cache=cache, use_cache=True)
            cache = outputs.cache
            logits.append(outputs.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)
    text = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False), text)
    if config.target_modules != {"conv"} or not isinstance(config, peft.LoraConfig):
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("halting_threshold", [0.0, 0.4])
@torch.no_grad()
def test_an_adapter_for_each_row(rows, halting_threshold):
    """PEFT's mixed batches: with padding, with tokens that halt, and where tokens are as many as rows."""
    model = peft.get_peft_model(tiny_model(halting_threshold=halting_threshold), lora("all-linear"))
    model.add_adapter("other", lora("all-linear"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    names = ["default", "other", "__base__", "other"][:rows]
    for length in (1, 4, 9):
        ids, mask = random_ids(rows, length), torch.ones(rows, length, dtype=torch.long)
        if length == 4:  # so many tokens as rows, which are not one of each
            mask[:] = 0
            mask[0, : rows - 1], mask[1, -1] = 1, 1
        elif length > 1:
            mask[0, :4], mask[1, -2:] = 0, 0
        together = model(ids, attention_mask=mask, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
            real = mask[row].bool()
            torch.testing.assert_close(together[row][real], alone[0][real], **CLOSE)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    texts = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        assert torch.equal(texts[row], model.generate(input_ids=ids[row : row + 1], **options)[0])


@torch.no_grad()
def test_a_memory_says_which_adapters_read_it(tmp_path):
    """Saved and loaded by the PEFT model itself; refused with other adapters, or without them."""
    model = spread_adapter(peft.get_peft_model(tiny_model(torch.float32), lora("all-linear"))).eval()
    ids, more = random_ids(1, 9), random_ids(1, 4, seed=1)
    memory = model(ids, use_cache=True).cache
    memory.save_pretrained(tmp_path / "adapted")
    loaded = StackformerCache.from_pretrained(tmp_path / "adapted", model)
    assert torch.equal(model(more, cache=loaded).logits, model(more, cache=memory.clone()).logits)
    with model.disable_adapter():
        with pytest.raises(ValueError, match="other active adapters"):
            StackformerCache.from_pretrained(tmp_path / "adapted", model)
        with pytest.raises(ValueError, match=r"active that read this memory, \['default'\], got \[\]"):
            memory.save_pretrained(tmp_path / "mistaken")
        plain = model(ids, use_cache=True).cache
        plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="other active adapters"):
        StackformerCache.from_pretrained(tmp_path / "plain", model)
    with pytest.raises(ValueError, match=r"\[\], got \['default'\]"):
        plain.save_pretrained(tmp_path / "mistaken")
    # Without its adapter, the model is the one that it was made of.
    StackformerCache.from_pretrained(tmp_path / "plain", tiny_model(torch.float32))
    model.add_adapter("other", lora(["qkv_proj"]))
    StackformerCache.from_pretrained(tmp_path / "adapted", model)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="other active adapters"):
        StackformerCache.from_pretrained(tmp_path / "adapted", model)
    model.set_adapter("default")
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="other weights"):
        StackformerCache.from_pretrained(tmp_path / "adapted", merged)


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
