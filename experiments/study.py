# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Studies: many models trained alike, on the same batches, over several seeds, to a table and a picture.

    runs = [Run("plain", "configs/plain-tiny.json", None, seed) for seed in args.seeds]
    lines = run_all(runs, measure, args, "runs.jsonl")
    rows = summarize(lines, ["bits_per_byte", "tokens_per_second"])
    print(table(rows, {"bits per byte": lambda row: row["bits_per_byte"].text(".3f")}))

Every run is a preset with other fields, trained as `scripts.train` does, in a process of its own. A finished
run is a line of a file, and is skipped: a command that was stopped, or has more rows or seeds, continues from
there. `args` are those of `add_arguments`. A study that does something else with a model passes its own
function in place of `measure`, and its own `Run` if that takes more than a preset and a seed.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from experiments.command_line import COUNT, NATURAL, NOT_NEGATIVE, check_input_file
from experiments.data import DataArguments, load_splits, load_tokenizer, parse_range
from experiments.engine import CountSteps, execute, read_lines
from experiments.presets import build_config
from experiments.report import commit, machine_line, save_figure
from experiments.training import build_trainer

# The options that a run's result depends on.
OPTIONS = (
    "steps", "data_path", "train_range", "eval_range", "block_size", "batch_size", "learning_rate",
    "warmup_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training."""

    row: str  # of the table
    preset: str  # JSON file
    overrides: str | None  # of the preset, as in `scripts.train --config_overrides`
    seed: int


class Spread(NamedTuple):
    """Of one number over the runs of a row."""

    median: float
    lowest: float
    highest: float

    def text(self, spec: str) -> str:
        """The median, and the range if there is one, each in the format `spec`."""
        median, lowest, highest = (format(value, spec) for value in self)
        return median if self.lowest == self.highest else f"{median} ({lowest} to {highest})"


Rows = dict[str, dict[str, Spread]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, the training, and how many runs at a time."""
    parser.add_argument("--data_path", required=True, help="text file, such as enwik8")
    parser.add_argument("--train_range", help="START:STOP in bytes; the first 90%% if not given")
    parser.add_argument("--eval_range", help="START:STOP in bytes; from 90%% to 95%% if not given")
    parser.add_argument("--seeds", type=NATURAL, nargs="+", default=[1], help="one run each")
    parser.add_argument("--steps", type=COUNT, default=600, help="training steps")
    parser.add_argument("--batch_size", type=COUNT, default=8, help="blocks per step")
    parser.add_argument("--block_size", type=COUNT, default=256, help="bytes of a block")
    parser.add_argument(
        "--learning_rate", type=NOT_NEGATIVE, default=2e-3, help="highest; it falls as a cosine"
    )
    parser.add_argument("--warmup_steps", type=NATURAL, default=50, help="steps until it is highest")
    parser.add_argument("--jobs", type=COUNT, default=1, help="runs at the same time, a process each")
    parser.add_argument("--threads", type=COUNT, default=1, help="threads of each process")


def check(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: unless the text is there and has the ranges that `add_arguments` read.
    """
    check_input_file("data_path", args.data_path)
    size = Path(args.data_path).stat().st_size
    for name in ("train_range", "eval_range"):
        if (text := getattr(args, name)) is not None:
            parse_range(text, size, name)
    if args.block_size < 2:
        raise ValueError(f"block_size={args.block_size}: expected at least 2, a token and one to predict.")


def build(
    run: Run, args: argparse.Namespace
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, tuple[bytes, bytes]]:
    """A run's model, which is new, its tokenizer, and the texts to train and to evaluate on."""
    ranges = {"train_range": args.train_range, "eval_range": args.eval_range}
    texts = load_splits(DataArguments(args.data_path, **ranges))
    tokenizer = load_tokenizer("byte", texts[0])
    set_seed(run.seed)
    model = AutoModelForCausalLM.from_config(build_config(run.preset, run.overrides, tokenizer))
    return model, tokenizer, texts


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: tuple[bytes, bytes],
    seed: int,
    args: argparse.Namespace,
) -> tuple[dict[str, Any], Trainer]:
    """Train and evaluate a model: what was measured, and the Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.warmup_steps,
            weight_decay=0.1,
            adam_beta2=0.99,
            seed=seed,
            include_num_input_tokens_seen=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = build_trainer(model, tokenizer, texts, args.block_size, options)
        trainer.add_callback(CountSteps)
        trainer.remove_callback(PrinterCallback)  # it would print between the lines of the progress bar
        started, started_cpu = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        score = trainer.evaluate()["eval_bits_per_byte"]
    measured = {
        "bits_per_byte": score,
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),  # of all threads: on a busy machine, the better measure
        "tokens_per_second": round(trainer.state.num_input_tokens_seen / seconds, 1),
        "machine": machine_line(),
        "commit": commit(),
    }
    return measured, trainer


@torch.no_grad()
def state_bytes(model: PreTrainedModel, length: int) -> int:
    """Size of the state of one row after so many tokens."""
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    return model.eval()(ids, use_cache=True).cache.num_bytes


def measure(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate a run's model: quality, speed, and sizes of the model and of its state."""
    model, tokenizer, texts = build(run, args)
    measured, _ = train(model, tokenizer, texts, run.seed, args)
    return measured | {"state_bytes": state_bytes(model, args.block_size)}


def identify(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """All that a run's result depends on: two runs with the same are the same run."""
    preset = json.loads(Path(run.preset).read_text(encoding="utf-8"))
    options = {option: getattr(args, option) for option in OPTIONS}
    return options | asdict(run) | {"preset": preset}  # a run may have options of its own


def run_all(
    runs: Iterable[Run],
    measure: Callable[..., dict[str, Any]],
    args: argparse.Namespace,
    path: str | Path,
) -> list[dict[str, Any]]:
    """The lines of `runs`: from the file, and from `measure` for those that are missing.

    Args:
        measure: takes a run and `args`; a function of a module, since it is called in another process. A line
            has the fields of `identify`, and those of its result.
        path: the file of finished runs, a line (JSON) each; new lines are appended.
    """
    path, runs = Path(path), list(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read_lines(path)

    def find(run: Run) -> dict[str, Any] | None:
        wanted = identify(run, args)
        return next((line for line in lines if wanted.items() <= line.items()), None)

    missing = [run for run in dict.fromkeys(runs) if find(run) is None]
    results = execute(missing, partial(measure, args=args), args.steps, args.jobs, args.threads)
    with path.open("a", encoding="utf-8") as file, closing(results):
        for run, measured in results:
            lines.append(identify(run, args) | measured)
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
            numbers = [f"{key} {x:.4g}" for key, x in measured.items() if isinstance(x, float)]
            tqdm.write(f"{run.row}, seed {run.seed}: {', '.join(numbers)}")
    return [line for run in runs if (line := find(run)) is not None]


def summarize(lines: Iterable[dict[str, Any]], keys: Sequence[str]) -> Rows:
    """Median and range of what was measured as `keys`, for each row, in the order of the lines."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        runs.setdefault(line["row"], []).append(line)
    return {
        name: {key: _spread([line[key] for line in of_row]) for key in keys} for name, of_row in runs.items()
    }


def _spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def table(rows: Rows, columns: dict[str, Callable[[dict[str, Spread]], str]]) -> str:
    """Markdown, from how each column, by its title, shows a row."""
    lines = [f"| model | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(show(row) for show in columns.values())} |")
    return "\n".join(lines)


def draw(rows: Rows, panels: dict[str, str], path: str | Path, logarithmic: Sequence[str] = ()) -> None:
    """Write a picture (PNG) of medians and ranges.

    Args:
        panels: what was measured, to its label: a panel each.
        logarithmic: what has a logarithmic axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 4 * len(panels), 1 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for place, row in enumerate(rows.values()):
            spread = row[key]
            axis.plot([spread.lowest, spread.highest], [place, place], color="tab:blue")
            axis.plot(spread.median, place, "o", color="tab:blue")
        axis.set_xscale("log" if key in logarithmic else "linear")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    save_figure(path, figure)


__all__ = [
    "Rows",
    "Run",
    "Spread",
    "add_arguments",
    "build",
    "check",
    "draw",
    "measure",
    "run_all",
    "state_bytes",
    "summarize",
    "table",
    "train",
]
