# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Kills trainings at every file that they write, and resumes them: see tests/test_checkpoints.py.

    python -m tests.kill_worker train FOLDER

A run has four steps, with checkpoints after two and after four. From the second checkpoint on it is killed at
each event in its folder: a file is about to be written, is written in half, is renamed or deleted, or a
folder is. (Of the files of Python code that are copied beside the weights, one stands for all.) Then the same
command resumes from "last". Every run is a fork of this process, which has imported all there is to import:
that takes most of the time of a short run.

The result, on the last line, is JSON: for each kill its event, what the folder was resumed from, and whether
the weights at the end are those of a run that was not killed.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.tasks import run as tasks
from scripts import train, train_long
from stackformer.training.checkpoints import WholeCheckpoints, newest_checkpoint

LEFT_OVER = re.compile("partial|replaced")
TEXT = bytes(range(32, 127)) * 12
PRESET = {
    "model_type": "stackformer",
    "hidden_size": 16,
    "bottleneck_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "stack_depth": 2,
    "max_ponder_steps": 2,
    "max_decay_rate": 0.001,
}
COMMON = [
    "--per_device_train_batch_size", "2", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2",
    "--save_total_limit", "1", "--logging_steps", "1", "--disable_tqdm", "True", "--use_cpu",
    "--learning_rate", "1e-2",
]  # fmt: skip


def commands(folder: Path) -> dict[str, tuple[Callable[[list[str]], Any], list[str], Path]]:
    """By name: the main function, its arguments, and the folder of the run in the output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    preset, text = folder / "tiny.json", folder / "text"
    preset.write_text(json.dumps(PRESET))
    text.write_bytes(TEXT)
    data = ["--config", str(preset), "--dataset", str(text), "--block_size", "16"]
    long = ["--context_length", "12", "--chunk_size", "6", "--num_documents", "3"]
    task = [
        "--config", str(preset), "--task", "parity", "--test_lengths", "4", "--num_test", "4",
        "--train_length", "4",
    ]  # fmt: skip
    return {
        "train": (train.main, [*data, *COMMON], Path()),
        "train_long": (train_long.main, [*data, *long, *COMMON], Path()),
        "tasks": (tasks.main, [*task, *COMMON], Path("parity/tiny/depth2-seed0")),
    }


class Killer:
    """Numbers the events in a folder, from the second checkpoint on, and kills this process at one of them.

    Args:
        number: of the event; None for none.
        half: whether a file is there in half by then.
    """

    def __init__(self, folder: Path, number: int | None, half: bool = False):
        self.folder, self.number, self.half = str(folder.resolve()), number, half
        self.events: list[tuple[str, str]] = []
        self.begun = self.busy = False
        sys.addaudithook(self.audit)
        self.wrap(torch, "save", lambda args, kwargs: args[1])
        self.wrap(safetensors.torch, "serialize_file", lambda args, kwargs: args[1])
        self.wrap(
            PreTrainedTokenizerFast,
            "save_pretrained",
            lambda args, kwargs: Path(args[1]) / "tokenizer.json",
        )

    def audit(self, event: str, args: tuple) -> None:
        if self.busy:
            return
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.note("write", args[0])
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            self.note(event.partition(".")[2], str(args[0]))

    def wrap(self, owner: Any, name: str, path_of: Callable[[tuple, dict], Any]) -> None:
        """Events of a function that writes a file where no audit hook sees it."""
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            path = str(path_of(args, kwargs))
            self.note("write", path, lambda: function(*args, **kwargs))
            return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    def note(self, what: str, path: str, write: Callable[[], Any] | None = None) -> None:
        path = os.path.realpath(path)
        self.begun |= "checkpoint-4" in path
        code = path.endswith(".py") and not path.endswith("modeling_stackformer.py")
        if not self.begun or not path.startswith(self.folder) or code:
            return
        self.events.append((what, os.path.relpath(path, self.folder)))
        if len(self.events) - 1 != self.number:
            return
        self.busy = True
        if self.half and write is not None:
            write()
            os.truncate(path, os.path.getsize(path) // 2)
        elif self.half:
            Path(path).write_text('{"cut')
        os.kill(os.getpid(), signal.SIGKILL)


def run(main: Callable[[list[str]], Any], argv: list[str], prepare: Callable[[], Killer | None]) -> Any:
    """Call `main` in a fork of this process: its exit status, or the events if nobody killed it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        killer = prepare()
        try:
            main(argv)
            os.write(writer, json.dumps(killer.events if killer else []).encode())
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        events = file.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(events) if status == 0 else status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("script", choices=["train", "train_long", "tasks"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plain", action="store_true", help="save as transformers' own Trainer does")
    parser.add_argument(
        "--every", type=int, default=1, help="only every so many kills, beginning with the first"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    shutil._use_fd_functions = False  # so that what is removed has its path
    if options.plain:
        for name in ("_save_checkpoint", "_get_output_dir", "_push_from_checkpoint"):
            delattr(WholeCheckpoints, name)
    main, argv, inside = commands(options.folder)[options.script]
    files = ["streams_0_of_1.pt"] if options.script == "train_long" else []
    resume = [] if options.script == "tasks" else ["--resume_from_checkpoint", "last"]

    whole = options.folder / "whole"
    events = run(main, [*argv, "--output_dir", str(whole)], partial(Killer, whole, None))
    expected = (whole / inside / "model.safetensors").read_bytes()
    kills = [
        (number, half)
        for number, (what, _) in enumerate(events)
        for half in ((False, True) if what == "write" else (False,))
    ]
    result, first = [], options.folder / "first"
    run(main, [*argv, "--output_dir", str(first)], partial(Killer, first, 0))  # as far as all others, too
    for number, half in kills[:: options.every]:
        folder = options.folder / f"killed-{number}-{half}"
        shutil.copytree(first, folder)
        command = [*argv, *resume, "--output_dir", str(folder)]
        status = run(main, command, partial(Killer, folder, number, half))
        assert status == signal.SIGKILL, f"{events[number]}: {status}"
        resumed = newest_checkpoint(folder / inside, files=files)
        status = run(main, command, lambda: None)
        weights = folder / inside / "model.safetensors"
        result.append({
            "event": events[number],
            "half": half,
            "resumed": resumed and Path(resumed).name,
            "status": status,
            "same": weights.is_file() and weights.read_bytes() == expected,
            "left": [path.name for path in folder.rglob("*") if LEFT_OVER.search(path.name)],
        })  # fmt: skip
        shutil.rmtree(folder)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
