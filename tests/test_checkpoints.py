# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints and models on disk: whole, whenever the process that writes them is killed."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

from experiments.report import write_json
from experiments.training import find_checkpoint
from stackformer import build_byte_tokenizer
from stackformer.files import replaced_file
from stackformer.training.checkpoints import checkpoint_fault, newest_checkpoint, replace_model
from stackformer.training.trainer import StackformerTrainer
from tests.models import random_ids, tiny_model
from tests.test_training import make_rows

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


# Kills


def kill(script: str, folder: Path, *options: str) -> list[dict]:
    """What tests/kill_worker.py found."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.kill_worker", script, str(folder), *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout.splitlines()[-1])


def check_kills(kills: list[dict], least: int) -> None:
    """Each is resumed from a complete checkpoint, and ends in the weights that it would have had."""
    for one in kills:
        assert one["status"] == [] and one["same"], one
        # Of what was there in half, nothing is left but the file that was not even found by its name.
        assert not [name for name in one["left"] if not name.endswith(Path(one["event"][1]).suffix)], one
        assert len(one["left"]) <= (".partial" in one["event"][1]), one
    assert len(kills) >= least
    resumed = Counter(one["resumed"] for one in kills)
    assert set(resumed) == {"checkpoint-2", "checkpoint-4"}, resumed


@pytest.mark.parametrize(
    ("script", "options"), [("train", ["--every", "16"]), ("train_long", ["--every", "20", "--plain"])]
)
def test_a_killed_run_resumes(tmp_path, script, options):
    """A few kills for each script, with checkpoints that are written in one step, and with the Trainer's."""
    check_kills(kill(script, tmp_path, *options), least=4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--plain"]], ids=["whole", "plain"])
@pytest.mark.parametrize("script", ["train", "train_long", "tasks"])
def test_a_run_that_is_killed_anywhere_resumes(tmp_path, script, options):
    """At each file of a checkpoint, of the model, of what else is written: before it and in the middle."""
    check_kills(kill(script, tmp_path, *options), least=60)


# Complete or not


def arguments(folder: Path, **changes) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(defaults | changes))


def train(folder: Path, trainer_class=Trainer, resume=None, **changes) -> Trainer:
    rows = make_rows(8)
    model = tiny_model(torch.float32)
    args = arguments(folder, **changes)
    trainer = trainer_class(
        model, args, train_dataset=rows, eval_dataset=rows[:2], processing_class=build_byte_tokenizer()
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with two checkpoints, which nobody changes."""
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(logging.get_logger("stackformer.training.checkpoints"), "warning", told.append)
    return told


NEEDED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def test_whole_checkpoints_have_no_fault(run):
    assert {path.name for path in run.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert newest_checkpoint(run) == str(run / "checkpoint-4")
    assert checkpoint_fault(run / "checkpoint-4") is None
    assert newest_checkpoint(run / "nowhere") is None


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_without_a_file(copy, warnings, name):
    (copy / "checkpoint-4" / name).unlink()
    assert checkpoint_fault(copy / "checkpoint-4") is not None
    assert newest_checkpoint(copy) == str(copy / "checkpoint-2")
    (warning,) = warnings
    assert str(copy / "checkpoint-4") in warning and f"has no {name.split('.')[0]}" in warning.replace(
        "weights (", ""
    )


def test_every_file_that_is_cut_off_is_seen(copy):
    """At any place: after its first bytes, in the middle, before its last byte."""
    folder, seen = copy / "checkpoint-4", set()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.suffix in (".py", ".jinja"):
            continue
        for size in (0, 1, 9, len(content) // 2, len(content) - 1):
            if content[:size].strip() == content.strip():
                continue  # only a line break is missing
            path.write_bytes(content[:size])
            assert f"{path.name} is cut off" in checkpoint_fault(folder), (path.name, size)
        path.write_bytes(content)
        seen.add(path.name)
    assert seen >= {*NEEDED, "config.json", "tokenizer.json", "training_args.bin"}
    assert checkpoint_fault(folder) is None


def test_weights_in_several_files(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    train(tmp_path, max_steps=1, save_steps=1)
    (checkpoint / "model.safetensors").unlink()
    tiny_model(torch.float32).save_pretrained(checkpoint, max_shard_size="20KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1 and checkpoint_fault(checkpoint) is None
    shards[1].rename(tmp_path / "away")
    assert checkpoint_fault(checkpoint) == f"it has no {shards[1].name}"
    shards[1].write_bytes((tmp_path / "away").read_bytes()[:-1])
    assert checkpoint_fault(checkpoint).startswith(f"{shards[1].name} is cut off")


def test_sharded_checkpoints_of_several_processes(copy):
    """As FSDP writes them: folders of parts with a list of these, and a random state of each process."""
    checkpoint = copy / "checkpoint-4"
    for name, folder in (("model.safetensors", "pytorch_model_fsdp_0"), ("optimizer.pt", "optimizer_0")):
        (checkpoint / name).unlink()
        distributed.save({"state": {"weight": torch.ones(100)}}, checkpoint_id=checkpoint / folder)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert checkpoint_fault(checkpoint) is None
    assert checkpoint_fault(checkpoint, 2) == "it has no rng_state.pth or rng_state_1.pth"
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert checkpoint_fault(checkpoint, 2) is None
    for folder in ("optimizer_0", "pytorch_model_fsdp_0"):
        (part,) = (checkpoint / folder).glob("*.distcp")
        content = part.read_bytes()
        part.write_bytes(content[:-1])
        assert checkpoint_fault(checkpoint, 2) == f"{part.name} of {folder} is cut off"
        part.unlink()
        assert checkpoint_fault(checkpoint, 2) == f"{folder} has no {part.name}"
        part.write_bytes(content)
        (checkpoint / folder / ".metadata").rename(copy / folder)
        assert checkpoint_fault(checkpoint, 2) == f"{folder} has no .metadata"
        (copy / folder).rename(checkpoint / folder / ".metadata")


def test_checkpoints_of_the_model_only(tmp_path):
    train(tmp_path, save_only_model=True)
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path, model_only=True) == str(tmp_path / "checkpoint-4")


def test_the_command_says_what_is_missing(copy):
    def find(**changes):
        return find_checkpoint(arguments(copy, **changes))

    assert find() is None
    assert find(resume_from_checkpoint="last") == str(copy / "checkpoint-4")
    named = str(copy / "checkpoint-4")
    assert find(resume_from_checkpoint=named) == named
    (copy / "checkpoint-4" / "optimizer.pt").unlink()
    assert find(resume_from_checkpoint="last") == str(copy / "checkpoint-2")
    with pytest.raises(
        ValueError, match="checkpoint-4': expected a complete checkpoint, but it has no optimizer.pt"
    ):
        find(resume_from_checkpoint=named)
    (copy / "checkpoint-2" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="resume_from_checkpoint='last': expected a complete checkpoint in"):
        find(resume_from_checkpoint="last")
    with pytest.raises(ValueError, match="expected a complete checkpoint, but trainer_state.json is cut off"):
        find(resume_from_checkpoint=str(copy / "checkpoint-2"))


# What the Trainer does with checkpoints, with these, too


def test_the_best_checkpoint_is_known_by_its_name(tmp_path):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    }
    for trainer_class in (Trainer, StackformerTrainer):
        folder = tmp_path / trainer_class.__name__
        trainer = train(folder, trainer_class, **options)
        best = folder / f"checkpoint-{trainer.state.best_global_step}"
        assert trainer.state.best_model_checkpoint == str(best)
        state = json.loads((best / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(best)
        assert best.is_dir() and len(list(folder.iterdir())) <= 2
    assert not [path for path in folder.iterdir() if path.name.startswith("_")]


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path):
    first = train(tmp_path, StackformerTrainer)
    (tmp_path / "checkpoint-4" / "left.txt").write_text("of the run before")
    (tmp_path / "_partial-checkpoint" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "_partial-checkpoint" / "checkpoint-4" / "left.txt").write_text("of one that was killed")
    second = train(tmp_path, StackformerTrainer, resume=str(tmp_path / "checkpoint-2"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert not (tmp_path / "checkpoint-4" / "left.txt").exists()
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name])


def test_what_is_uploaded_has_its_name(tmp_path, monkeypatch):
    uploaded = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    monkeypatch.setattr(
        Trainer,
        "_push_from_checkpoint",
        lambda self, folder: uploaded.append((folder, Path(folder).is_dir())),
    )
    train(tmp_path, StackformerTrainer, push_to_hub=True)
    assert uploaded == [(str(tmp_path / f"checkpoint-{step}"), True) for step in (2, 4)]


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    train(tmp_path, StackformerTrainer, max_steps=2)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(StackformerTrainer, "_save_rng_state", lambda *unused: (_ for _ in ()).throw(
            OSError(28, "No space left on device")
        ))  # fmt: skip
        train(tmp_path, StackformerTrainer, resume=str(tmp_path / "checkpoint-2"))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()
    train(tmp_path, StackformerTrainer, resume=str(tmp_path / "checkpoint-2"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


# The model


class Killed(Exception):
    pass


def save(folder: Path, seed: int, shards: bool = False, **fields) -> torch.nn.Module:
    model = tiny_model(torch.float32, **fields)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    build_byte_tokenizer().save_pretrained(folder)
    return model


def logits_of(folder: Path) -> torch.Tensor | None:
    """What a reader of the folder gets; None if it is told that there is no model."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return None
    with torch.no_grad():
        return model.eval()(random_ids(1, 12)).logits


@pytest.mark.parametrize("old_shards", [False, True])
@pytest.mark.parametrize("new_shards", [False, True])
@pytest.mark.parametrize("fields", [{}, {"hidden_size": 32}])
def test_a_reader_finds_one_of_two_models(tmp_path, monkeypatch, old_shards, new_shards, fields):
    """Or none, but never parts of two, whenever the one is replaced by the other."""
    old, new = tmp_path / "old", tmp_path / "new"
    save(old, 1, old_shards)
    save(new, 2, new_shards, **fields)
    expected = [logits_of(old), logits_of(new)]
    operations = {"replace": Path.replace, "unlink": Path.unlink}
    seen, finished, number = [], False, 0
    while not finished:
        folder, moved = tmp_path / f"folder-{number}", tmp_path / f"moved-{number}"
        shutil.copytree(old, folder), shutil.copytree(new, moved)
        left = number

        def stop_at(name):
            def operation(path, *args, **kwargs):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return operations[name](path, *args, **kwargs)

            return operation

        with monkeypatch.context() as patch:
            for name in operations:
                patch.setattr(Path, name, stop_at(name))
            try:
                replace_model(moved, folder)
                finished = True
            except Killed:
                pass
        logits = logits_of(folder)
        which = [i for i, x in enumerate(expected) if logits is not None and torch.equal(logits, x)]
        assert logits is None or len(which) == 1
        seen.append(which[0] if which else None)
        number += 1
    order = [0, None, 1]
    assert seen == sorted(seen, key=order.index) and seen[0] == 0 and seen[-1] == 1
    one_file = not old_shards and not new_shards and not fields
    assert (None in seen) != one_file
    assert not moved.exists()
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in new.iterdir()}


# Other files


def test_a_file_is_replaced_by_several_writers(tmp_path):
    """Each has a file of its own until it is whole; what fails leaves nothing."""
    path = tmp_path / "a.json"
    with replaced_file(path) as first, replaced_file(path) as second:
        assert first.name != second.name
        first.write(b"1")
        second.write(b"2")
        assert not path.exists()
    assert path.read_text() == "1"
    with pytest.raises(Killed), replaced_file(path) as partial:
        partial.write(b"half")
        raise Killed
    assert [x.name for x in path.parent.iterdir()] == ["a.json"] and path.read_text() == "1"
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": 1})
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
