# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""What depth, stack, banks and halting are worth: bits per byte beside baselines, over several seeds.

    python -m benchmarks.quality --data_path enwik8 --steps 600 --jobs 2
    python -m benchmarks.quality --data_path enwik8 --rows "stack, P = 4" attention --seeds 1 2

Every row is a preset with other fields, trained as `scripts.train` does, all on the same batches. A run that
is finished is a line of a file and is not repeated: a command that was stopped, or has more rows or
seeds, goes on from there. Prints a Markdown table, median and range over the seeds, and draws it.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from scripts.data import DataArguments, load_splits, load_tokenizer
from scripts.report import commit, machine_line
from scripts.train import build_config, build_trainer
from stackformer.processing_stack import DEQUEUE, NOOP


class Row(NamedTuple):
    """A model of the table."""

    overrides: str  # of the preset, as in `scripts.train --config_overrides`
    depth_of: str | None = None  # random halting at the mean depth that this row learned, same seed
    halts: bool = True  # else every token takes all ponder steps


PLAIN = "bottleneck_size=none,num_memory_banks=1,stack_depth=1,max_ponder_steps=1"
ROWS = {
    "stack, P = 1": Row("max_ponder_steps=1,stack_depth=1"),
    "stack, P = 2": Row("max_ponder_steps=2"),
    "stack, P = 4": Row("max_ponder_steps=4"),
    "stack, P = 8": Row("max_ponder_steps=8"),
    "untied, 4 x the layers, P = 1": Row("max_ponder_steps=1,stack_depth=1,num_hidden_layers=8"),
    "attention": Row(f'{PLAIN},hidden_size=192,intermediate_size=528,mixer_types=["attention","attention"]'),
    "linear attention": Row(f"{PLAIN},hidden_size=176,intermediate_size=568,max_decay_rate=0"),
    "no stack, no halting, P = 4": Row("max_ponder_steps=4,stack_depth=1", halts=False),
    "random halting, P = 4": Row("max_ponder_steps=4", depth_of="stack, P = 4"),
    "4 banks, P = 4": Row("max_ponder_steps=4,num_memory_banks=4"),
    "1 bank of their size, P = 4": Row("max_ponder_steps=4,num_memory_banks=1,num_attention_heads=1"),
}


class RandomActions(nn.Module):
    """In place of `ActionProjection`: no-ops, and after every step, with a given probability, the return."""

    def __init__(self, return_probability: float) -> None:
        super().__init__()
        self.return_probability = return_probability

    def forward(self, thought: Tensor) -> Tensor:
        """Logits [n, 3] of actions that are certain."""
        returns = torch.rand(len(thought), device=thought.device) < self.return_probability
        actions = nn.functional.one_hot(torch.where(returns, DEQUEUE, NOOP), 3)
        return actions.to(thought.dtype).log().clamp(min=-1e4)


def return_probability(mean_depth: float, max_depth: int) -> float:
    """The probability of returning after each step that gives depths 1 to `max_depth` this mean."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        # Step k + 1 is reached with probability (1 - middle) ** k.
        too_deep = sum((1 - middle) ** k for k in range(max_depth)) > mean_depth
        low, high = (middle, high) if too_deep else (low, middle)
    return high


class CountSteps(TrainerCallback):
    """Adds this run's steps to those of the other processes."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        with _steps_done.get_lock():
            _steps_done.value += 1


def start_worker(steps_done: Any, threads: int) -> None:
    """What a process keeps between its runs."""
    global _steps_done
    _steps_done = steps_done
    torch.set_num_threads(threads)


def run(row: Row, mean_depth: float | None, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one model; what is returned is added to the line of the run."""
    data = DataArguments(
        args.data_path, train_range=args.train_range, eval_range=args.eval_range, block_size=args.block_size
    )
    texts = load_splits(data)
    tokenizer = load_tokenizer("byte", texts[0])
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(build_config(args.preset, row.overrides, tokenizer))
    if not row.halts:
        mean_depth = model.config.max_ponder_steps
    if mean_depth is not None:
        probability = return_probability(mean_depth, model.config.max_ponder_steps)
        model.model.action_proj = RandomActions(probability)
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
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = build_trainer(model, tokenizer, texts, args.block_size, options)
        trainer.add_callback(CountSteps)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        score = trainer.evaluate()["eval_bits_per_byte"]
    return {
        "bits_per_byte": score,
        "ponder_steps": mean_ponder_steps(model, trainer.get_eval_dataloader()),
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 1),
        "machine": machine_line(),
        "commit": commit(),
    }


@torch.no_grad()
def mean_ponder_steps(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> float:
    """Mean over the tokens of the first 16 batches."""
    batches = itertools.islice(batches, 16)
    steps = [model(batch["input_ids"].to(model.device)).ponder_steps for batch in batches]
    return torch.cat(steps).double().mean().item()


def identify(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """All that a run's result depends on: two runs with the same are the same run."""
    options = ("steps", "data_path", "train_range", "eval_range", "block_size", "batch_size")
    options += ("learning_rate", "warmup_steps")
    preset = json.loads(Path(args.preset).read_text(encoding="utf-8"))
    return {
        "row": name,
        **ROWS[name]._asdict(),
        "seed": seed,
        "preset": preset,
        **{option: getattr(args, option) for option in options},
    }


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run what is not in `args.json` yet, and return all lines that were asked for.

    A row that takes its depth from another one waits for the other's run of the same seed.
    """
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )

    def find(name: str, seed: int) -> dict[str, Any] | None:
        wanted = identify(name, seed, args)
        return next((line for line in lines if wanted.items() <= line.items()), None)

    names = list(dict.fromkeys(name for row in args.rows for name in (ROWS[row].depth_of, row) if name))
    waiting = [(name, seed) for seed in args.seeds for name in names if find(name, seed) is None]
    context = multiprocessing.get_context("spawn")
    steps_done = context.Value("q", 0)
    with (
        tqdm(total=len(waiting) * args.steps, unit="step") as bar,
        ProcessPoolExecutor(args.jobs, context, start_worker, (steps_done, args.threads)) as pool,
        path.open("a", encoding="utf-8") as file,
    ):
        running = {}
        while waiting or running:
            for name, seed in list(waiting):
                source = ROWS[name].depth_of
                source_line = find(source, seed) if source else None
                if source is None or source_line is not None:
                    depth = source_line and source_line["ponder_steps"]
                    waiting.remove((name, seed))
                    running[pool.submit(run, ROWS[name], depth, seed, args)] = name, seed
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                name, seed = running.pop(future)
                lines.append(identify(name, seed, args) | future.result())
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
                tqdm.write(f"{name}, seed {seed}: {lines[-1]['bits_per_byte']:.4f}")
            bar.update(steps_done.value - bar.n)
    return [line for name in args.rows for seed in args.seeds if (line := find(name, seed))]


def summarize(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians over the seeds, and the range of the bits per byte, of each row."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        rows.setdefault(line["row"], []).append(line)
    measured = ("bits_per_byte", "ponder_steps", "parameters", "seconds")
    return {
        name: {
            **{key: statistics.median(run[key] for run in runs) for key in measured},
            "lowest": min(run["bits_per_byte"] for run in runs),
            "highest": max(run["bits_per_byte"] for run in runs),
        }
        for name, runs in rows.items()
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | parameters | mean ponder steps | bits per byte (range) | training time |",
        "|---" * 5 + "|",
    ]
    for name, row in rows.items():
        score = f"{row['bits_per_byte']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"
        size, depth, seconds = row["parameters"] / 1000, row["ponder_steps"], row["seconds"]
        lines.append(f"| {name} | {size:,.0f} k | {depth:.2f} | {score} | {seconds:.0f} s |")
    return "\n".join(lines)


def draw(rows: dict[str, dict[str, Any]], path: str | Path) -> None:
    """Write a picture (PNG) of the medians and ranges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1 + 0.4 * len(rows)), layout="constrained")
    for place, row in enumerate(rows.values()):
        axis.plot([row["lowest"], row["highest"]], [place, place], color="tab:blue")
        axis.plot(row["bits_per_byte"], place, "o", color="tab:blue")
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.set_xlabel("bits per byte: median and range over the seeds")
    axis.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run what `argv` says (default: the command line); medians and ranges of each row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", required=True, help="text file, such as enwik8")
    parser.add_argument("--preset", default="configs/stackformer-tiny.json", help="rows change its fields")
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run each")
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--batch_size", type=int, default=8, help="blocks per step")
    parser.add_argument("--block_size", type=int, default=256, help="bytes of a block")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="highest; it falls as a cosine")
    parser.add_argument("--warmup_steps", type=int, default=50, help="steps until it is highest")
    parser.add_argument("--train_range", default="0:3600000", help="START:STOP in bytes")
    parser.add_argument("--eval_range", default="3600000:3800000", help="START:STOP in bytes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, a process each")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--json", default="outputs/quality.jsonl", help="file of finished runs, a line each")
    parser.add_argument("--plot", default="outputs/quality.png", help="picture to write")
    args = parser.parse_args(argv)
    rows = summarize(run_all(args))
    print(machine_line())
    print(f"{args.steps} steps of {args.batch_size} x {args.block_size} bytes, seeds {args.seeds}\n")
    print(table(rows))
    draw(rows, args.plot)
    return rows


if __name__ == "__main__":
    main()
