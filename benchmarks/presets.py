# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""One table over all presets: recall, state tracking, sorting, text, speed, sizes.

    python -m benchmarks.presets --data_path enwik8
    python -m benchmarks.presets --data_path enwik8 --rows titans-mac-tiny rwkv-tiny --columns recall text

Every preset of `configs/` that is called tiny is trained on each task, in small, and on text, as it is. In
small means the widths, the window, and the chunks and blocks of memories of `SMALL`: of 8 tokens, so that
only what is remembered helps any further back (softmax attention without a window sees all). All are trained
with the same steps, batches and learning rate, which suit some better than others. The output folder gets
the table (report.md) and the runs that are finished (runs.jsonl, a line for each cell), which are not
repeated.

recall           multi-query associative recall: accuracy
state tracking   parity of strings longer than any that was trained: accuracy
sorting          symbols by how often they were seen (infinity-former): accuracy
text             bits per byte; tokens per second of the process's own time, so that other processes do not
                 count, in training and in a greedy loop; bytes of the state after a block; parameters
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import models
from benchmarks.decode import GreedyLoop
from benchmarks.tasks import run as tasks
from benchmarks.tasks.heat_map import read_rows
from experiments import study
from experiments.command_line import COUNT, NOT_NEGATIVE, Parser, check_output_folder, run_main
from experiments.engine import CountSteps
from experiments.report import commit, machine_line, write_text
from experiments.rows import PRESETS

TEXT = "text"
DECODED = 64  # tokens of the greedy loop

# Fields of presets on tasks; `None` in a preset stays.
SMALL = {
    "hidden_size": 64, "bottleneck_size": 48, "intermediate_size": 128, "bottleneck_intermediate_size": 64,
    "sliding_window": 8, "memory_block": 8, "memory_chunk_size": 8,
}  # fmt: skip
OPTIONAL = ("bottleneck_size", "sliding_window")


class Column(NamedTuple):
    """A task that presets are trained on."""

    task: str
    options: dict[str, Any]
    train_length: int
    test_length: int
    steps: int
    batch_size: int


COLUMNS = {
    "recall": Column("mqar", {"vocab_size": 32, "num_kv_pairs": 4}, 32, 32, 400, 32),
    "state tracking": Column("parity", {}, 16, 32, 300, 32),
    "sorting": Column("sorting", {"num_symbols": 5}, 64, 64, 200, 16),
}


@dataclass(frozen=True)
class TaskRun(study.Run):
    """A preset on a task."""

    column: str
    task: str
    options: str  # JSON
    train_length: int
    test_length: int
    num_test: int


def small(preset: str) -> str:
    """The fields of a preset that are others on tasks, as JSON."""
    given = json.loads(Path(preset).read_text(encoding="utf-8"))
    fields = {name: x for name, x in SMALL.items() if name not in OPTIONAL or given.get(name) is not None}
    return json.dumps(fields)


def measure_task(run: TaskRun, args: argparse.Namespace) -> dict[str, Any]:
    """Train and test a preset on a task."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        options, systems, training = tasks.parse([
            "--task", run.task, "--task_options", run.options, "--config", run.preset, "--config_overrides",
            run.overrides, "--seeds", str(run.seed), "--train_length", str(run.train_length),
            "--test_lengths", str(run.test_length), "--num_test", str(run.num_test),
            "--max_steps", str(args.steps), "--per_device_train_batch_size", str(args.batch_size),
            "--learning_rate", str(args.learning_rate), "--warmup_steps", str(args.warmup_steps),
            "--output_dir", folder, "--disable_tqdm", "true",
        ])  # fmt: skip
        [task_run] = tasks.plan(options, systems, training)
        started = time.process_time()
        with contextlib.redirect_stdout(nowhere):  # the Trainer prints between the lines of the progress bar
            tasks.train(task_run, options, training, callbacks=[CountSteps()])
        seconds = time.process_time() - started
        tasks.measure(task_run, options, training)
        [result] = read_rows(folder)
    return {
        "accuracy": result["accuracy"],
        "chance": result["chance"],
        "cpu_seconds": round(seconds, 1),
        "machine": machine_line(),
        "commit": commit(),
    }


def measure_text(run: study.Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate a preset on text, and decode with it."""
    model, tokenizer, texts = study.build(run, args)
    measured, _ = study.train(model, tokenizer, texts, run.seed, args)
    model.eval()
    _, cache = models.read(model, models.random_ids(1, args.block_size))
    loop = GreedyLoop(model, cache, 1, DECODED)
    loop()
    started = time.process_time()
    loop()
    return measured | {
        "training_speed": args.steps * args.batch_size * args.block_size / measured["cpu_seconds"],
        "decoding_speed": DECODED / (time.process_time() - started),
        "state_bytes": study.state_bytes(model, args.block_size),
    }


def run_all(args: argparse.Namespace) -> study.Rows:
    """Every number of the table that was asked for, by preset."""
    path = Path(args.output_dir) / "runs.jsonl"
    rows: study.Rows = {name: {} for name in args.rows}
    for name in args.columns:
        if name == TEXT:
            runs = [study.Run(row, PRESETS[row], None, seed) for seed in args.seeds for row in args.rows]
            lines = study.run_all(runs, measure_text, args, path)
            measured = ["bits_per_byte", "training_speed", "decoding_speed", "state_bytes", "parameters"]
            found = study.summarize(lines, measured)
        else:
            column = COLUMNS[name]
            task_args = argparse.Namespace(
                steps=args.task_steps or column.steps, batch_size=column.batch_size, data_path=None,
                train_range=None, eval_range=None, block_size=None, learning_rate=args.task_learning_rate,
                warmup_steps=args.warmup_steps, jobs=args.jobs, threads=args.threads,
            )  # fmt: skip
            runs = [
                TaskRun(
                    row, PRESETS[row], small(PRESETS[row]), seed, name, column.task,
                    json.dumps(column.options), column.train_length, column.test_length, args.num_test,
                )
                for seed in args.seeds
                for row in args.rows
            ]  # fmt: skip
            lines = study.run_all(runs, measure_task, task_args, path)
            found = {row: {name: x["accuracy"]} for row, x in study.summarize(lines, ["accuracy"]).items()}
        for row, numbers in found.items():
            rows[row] |= numbers
    return rows


def table(rows: study.Rows) -> str:
    """Markdown, "-" where nothing was measured."""

    def show(key: str, spec: str, scale: float = 1.0, unit: str = ""):
        def cell(row: dict[str, study.Spread]) -> str:
            return study.Spread(*(x / scale for x in row[key])).text(spec) + unit if key in row else "-"

        return cell

    columns = {name: show(name, ".2f") for name in COLUMNS} | {
        "bits per byte": show("bits_per_byte", ".3f"),
        "training, tokens/s": show("training_speed", ",.0f"),
        "decoding, tokens/s": show("decoding_speed", ",.0f"),
        "state": show("state_bytes", ",.0f", 1000, " kB"),
        "parameters": show("parameters", ",.0f", 1000, " k"),
    }
    return study.table(rows, columns)


def main(argv: list[str] | None = None) -> study.Rows:
    """Run what `argv` says (default: the command line); the numbers of each preset."""
    parser = Parser(description=__doc__.split("\n")[0])
    study.add_arguments(parser)
    parser.set_defaults(
        steps=100, warmup_steps=10, learning_rate=3e-3, train_range="0:3600000", eval_range="3600000:3632768"
    )
    parser.add_argument("--rows", nargs="+", default=list(PRESETS), choices=PRESETS, help="presets")
    every = [*COLUMNS, TEXT]
    parser.add_argument("--columns", nargs="+", default=every, choices=every, help="what to measure")
    parser.add_argument("--task_steps", type=COUNT, help="training steps on every task; its own if not given")
    parser.add_argument("--task_learning_rate", type=NOT_NEGATIVE, default=3e-3, help="on tasks")
    parser.add_argument("--num_test", type=COUNT, default=256, help="test sequences of a task")
    parser.add_argument("--output_dir", default="outputs/presets", help="folder of the table")
    args = parser.parse_args(argv)
    check_output_folder("output_dir", args.output_dir)
    if TEXT in args.columns:
        study.check(args)
    rows = run_all(args)
    chances = ", ".join(
        f"{1 / tasks.build_task(x.task, x.options).num_answers:.2f} at {name}" for name, x in COLUMNS.items()
    )
    text = f"""{machine_line()}

Text: {args.steps} steps of {args.batch_size} x {args.block_size} bytes. Guessing has {chances}.

{table(rows)}
"""
    write_text(Path(args.output_dir) / "report.md", text)
    print(text)
    return rows


if __name__ == "__main__":
    run_main(main)
