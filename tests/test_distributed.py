# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Two processes train as one does on the same batches, also when their tokens halt at different depths."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import scripts.train
from stackformer.training.checkpoints import checkpoint_fault, newest_checkpoint
from tests.distributed_worker import train
from tests.models import random_ids, tiny_model

ROOT = Path(__file__).parents[1]
CONFIGS = {"ddp": "ddp.yaml", "fsdp2": "fsdp2.yaml", "native": "ddp.yaml", "deepspeed": "deepspeed.yaml"}
# The models are in float64, but the Trainer keeps losses in float32.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
BATCH = 2
sharded = [pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "native")]


def make_rows(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """For every other step, rows that halt at once (for the first process) and deep ones (for the second).

    The rest are mixed. The number of labels differs from row to row, so that a mean of means would show.
    """
    repeated = torch.arange(256).unsqueeze(1).expand(-1, 12)
    with torch.no_grad():
        depth = model(repeated, output_stack_trace=True).stack_trace.active.sum(-1)
    order = depth.sum(-1).argsort()
    shallow, deep = repeated[order[:8]], repeated[order[-8:]]
    assert depth[order[:8]].max() == 1 and depth[order[-8:]].amax(-1).min() > 2
    rows = []
    for first in range(0, 8, BATCH):
        for ids in (*shallow[first : first + BATCH], *deep[first : first + BATCH]):
            ids = ids.clone()
            if first % 4:
                ids[:6] = random_ids(1, 6, seed=len(rows))
            mask = (torch.arange(12) >= len(rows) % 3).long()
            labels = ids.masked_fill((mask == 0) | (torch.arange(12) < len(rows) % 5), -100)
            rows.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return rows


@pytest.fixture
def folder(tmp_path):
    """A model whose tokens halt, with a price on pondering, and rows to train it on."""
    model = tiny_model(ponder_loss_coef=0.05)
    torch.save(make_rows(model), tmp_path / "rows.pt")
    model.save_pretrained(tmp_path)
    return tmp_path


def launch(folder: Path, strategy: str, config: Path | None = None, **arguments) -> dict:
    """Run the worker in two processes, with the file of configs/accelerate for GPUs; its result."""
    worker = ["tests.distributed_worker", strategy, str(folder), "--arguments", json.dumps(arguments)]
    launch_module(strategy, worker, config)
    result = torch.load(folder / f"{strategy}.pt", weights_only=False)
    assert result["processes"] == 2
    return result


def launch_module(strategy: str, command: list[str], config: Path | None = None) -> None:
    """Run a module in two processes on CPUs.

    `accelerate launch --cpu` starts one process only, unless there is MPI. So the launcher is not told.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port),
        "--config_file", str(config or ROOT / "configs" / "accelerate" / CONFIGS[strategy]), "-m", *command,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        errors = process.communicate(timeout=300)[1]  # DeepSpeed compiles an operator the first time
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its processes, which have sessions of their own
            process.wait(30)
    assert process.returncode == 0, errors[-5000:]


def assert_same_training(actual: dict, expected: dict) -> None:
    torch.testing.assert_close(actual["losses"], expected["losses"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual["grad_norms"], expected["grad_norms"], **CLOSE)
    torch.testing.assert_close(actual["weights"], expected["weights"], **CLOSE)


@pytest.mark.parametrize("strategy", ["ddp", *sharded])
def test_two_processes_train_as_one(folder, strategy):
    """With nothing said about unused parameters: every process must have a gradient of each."""
    expected = train(folder, "single", batch_size=2 * BATCH)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert not any(torch.equal(expected["weights"][name], weight) for name, weight in before.items())
    actual = launch(folder, strategy, ddp_find_unused_parameters=False)
    assert_same_training(actual, expected)
    assert actual["sharded"] == (0 if strategy == "ddp" else 2)
    if strategy == "native":
        saved = AutoModelForCausalLM.from_pretrained(folder / "saved", dtype="auto").state_dict()
        torch.testing.assert_close(saved, expected["weights"], **CLOSE)


@pytest.fixture
def group_of_one(tmp_path):
    """A process group that has this process only."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("training", [False, True])
def test_halting_saves_steps_where_processes_share_nothing(group_of_one, training):
    """In inference, and under DDP, which only needs a gradient of every parameter."""
    model = tiny_model(halting_threshold=0.9).train(training)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    ids = make_rows(tiny_model())[0]["input_ids"].unsqueeze(0)  # done after one step
    if not training:
        with torch.no_grad():
            model(ids)
    else:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second one would fail if a parameter had had no gradient
            parallel(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        calls = calls[::2]
    assert len(calls) == 1


def test_every_parameter_has_a_gradient_whatever_is_padding(group_of_one):
    parallel = torch.nn.parallel.DistributedDataParallel(tiny_model().train())
    ids = random_ids(2, 5)
    for mask in (torch.zeros(2, 5), torch.ones(2, 5)):
        parallel(input_ids=ids, labels=ids, attention_mask=mask.long()).logits.sum().backward()


def test_reentrant_checkpoints_under_ddp_are_refused(group_of_one):
    """Each ponder step would be taken for all of a layer's gradient."""
    ids = random_ids(2, 5)
    for options, possible in (
        ({"use_reentrant": True}, False),
        ({"use_reentrant": False}, True),
    ):
        for steps in (1, 3):
            model = tiny_model(max_ponder_steps=steps, halting_threshold=0.0).train()
            model.gradient_checkpointing_enable(options)
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            if possible or steps == 1:
                parallel(input_ids=ids, labels=ids).loss.backward()
            else:
                with pytest.raises(ValueError, match="must be {'use_reentrant': False} with several ponder"):
                    parallel(input_ids=ids, labels=ids)
    model(ids, labels=ids).loss.backward()  # without DDP, it is as good


@pytest.mark.parametrize("more", [{}, pytest.param({"bf16": True}, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_after_an_evaluation(folder, more):
    """accelerate prepares a model once, and an evaluation does not need gradients to be exchanged."""
    if more:
        tiny_model(torch.float32, ponder_loss_coef=0.05).save_pretrained(folder)
    train_with = {"stackformer_trainer": True, **more}
    expected = train(folder, "single", batch_size=2 * BATCH, **train_with)
    actual = launch(folder, "ddp", evaluate_first=True, **train_with)
    if more:
        torch.testing.assert_close(actual["losses"], expected["losses"], rtol=1e-2, atol=0)
        torch.testing.assert_close(actual["grad_norms"], expected["grad_norms"], rtol=5e-2, atol=0)
    else:
        assert_same_training(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "native"])
def test_checkpointing_and_accumulation_in_two_processes(folder, strategy):
    """Accumulation defers what the processes exchange, and replayed layers gather their weights once more."""
    more = {"gradient_accumulation_steps": 2, "max_steps": 2}
    expected = train(folder, "single", batch_size=2 * BATCH, **more)
    more |= {"gradient_checkpointing": True}
    assert_same_training(launch(folder, strategy, **more), expected)


@pytest.mark.slow
def test_sharded_checkpoints(folder):
    """A run that goes on from a sharded checkpoint ends where it would have; so do merged shards."""
    expected = launch(folder, "fsdp2", save_strategy="steps", save_steps=2)
    checkpoint = folder / "fsdp2" / "checkpoint-2"
    resumed = launch(folder, "fsdp2", resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(resumed["weights"], expected["weights"], rtol=0, atol=0)
    shards = folder / "fsdp2" / "checkpoint-4" / "pytorch_model_fsdp_0"
    merge_fsdp_weights(str(shards), str(folder / "merged"))
    merged = load_file(folder / "merged" / "model.safetensors")
    torch.testing.assert_close(merged, expected["weights"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "native"])
def test_long_contexts_in_two_processes(folder, strategy):
    """Documents on four streams: those of one process halt at once, and end before those of the other."""
    rows = torch.load(folder / "rows.pt")
    ids = [row["input_ids"] for row in rows]
    shallow, deep = torch.cat([ids[0], ids[4]]), torch.cat([ids[2], ids[6], ids[3], ids[7], ids[2]])
    torch.save([shallow, shallow[:9], deep, deep[:31]], folder / "rows.pt")
    more = {"context_length": 16, "chunk_size": 5, "num_train_epochs": 2, "max_steps": -1}
    expected = train(folder, "single", batch_size=2 * BATCH, **more)
    assert len(expected["losses"]) == 8
    assert_same_training(launch(folder, strategy, **more), expected)
    if strategy == "ddp":
        assert_same_training(launch(folder, strategy, evaluate_first=True, **more), expected)


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2, "max_steps": 2}])
def test_deepspeed(folder, more):
    """It adds up gradients in float32, and clips them by a norm of its own."""
    more = {"stackformer_trainer": True, **more}
    expected = train(folder, "single", batch_size=2 * BATCH, **more)
    actual = launch(folder, "deepspeed", **more)
    for name in ("losses", "grad_norms"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual["weights"], expected["weights"], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_checkpoints(folder):
    """A run goes on from a checkpoint that is complete, and not from one without a process' part."""
    train_with = {"stackformer_trainer": True, "save_strategy": "steps", "save_steps": 2}
    expected = launch(folder, "deepspeed", **train_with)
    run = folder / "deepspeed"
    assert {path.name for path in run.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert newest_checkpoint(run, 2) == str(run / "checkpoint-4")
    next((run / "checkpoint-4").glob("global_step4/*zero_pp_rank_1_*optim_states.pt")).unlink()
    assert "global_step4 has no *zero_pp_rank_1_*" in checkpoint_fault(run / "checkpoint-4", 2)
    resumed = launch(
        folder, "deepspeed", stackformer_trainer=True, resume_from_checkpoint=newest_checkpoint(run, 2)
    )
    torch.testing.assert_close(resumed["weights"], expected["weights"], rtol=0, atol=0)


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_in_other_stages_is_refused(folder, tmp_path):
    """It mixes up gradients: without the check, those of the step gate and the norm of a return."""
    config = tmp_path / "zero2.yaml"
    text = (ROOT / "configs" / "accelerate" / "deepspeed.yaml").read_text()
    config.write_text(text.replace("zero_stage: 1", "zero_stage: 2"))
    with pytest.raises(AssertionError, match="`zero_optimization.stage` must be 0 or 1 for a model whose"):
        launch(folder, "deepspeed", config, stackformer_trainer=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("deepspeed", marks=needs_deepspeed)])
def test_the_training_script(tmp_path, strategy):
    """The model that it saves is that of one process, also if it resumes past a checkpoint with a hole."""
    preset, text = tmp_path / "preset.json", tmp_path / "text"
    fields = {"hidden_size": 24, "bottleneck_size": 16, "num_attention_heads": 2, "halting_threshold": 0.2}
    preset.write_text(json.dumps(fields))
    text.write_bytes(b"".join(b"%d " % (number * number) for number in range(2000)))
    argv = [
        "--config", str(preset), "--dataset", str(text), "--block_size", "32", "--use_cpu",
        "--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-2", "--weight_decay", "0.1",
        "--tokenizer", "bpe:270",
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    scripts.train.main([*argv, "--per_device_train_batch_size", "4", "--output_dir", str(one)])
    argv += ["--per_device_train_batch_size", "2", "--output_dir", str(two)]
    launch_module(strategy, ["tests.train_worker", strategy, *argv])
    expected = load_file(one / "model.safetensors")
    torch.testing.assert_close(load_file(two / "model.safetensors"), expected, rtol=1e-3, atol=1e-4)

    before = (two / "model.safetensors").read_bytes()
    (two / "checkpoint-4" / "rng_state_1.pth").unlink()
    launch_module(strategy, ["tests.train_worker", strategy, *argv, "--resume_from_checkpoint", "last"])
    assert (two / "model.safetensors").read_bytes() == before
    assert (two / "checkpoint-4" / "rng_state_1.pth").is_file()
    assert len(AutoTokenizer.from_pretrained(two)) == 270
