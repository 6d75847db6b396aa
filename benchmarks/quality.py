# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The value of depth, stack, banks and halting: bits per byte beside baselines, over several seeds.

    python -m benchmarks.quality --data_path enwik8 --steps 600 --jobs 2
    python -m benchmarks.quality --data_path enwik8 --rows "stack, P = 4" attention --seeds 1 2

Every row is a preset with other fields. Runs that are finished are not repeated. Prints a
Markdown table, median and range over the seeds, and draws it.
"""

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments import study
from experiments.command_line import Parser, check_output_file, check_picture_file, run_main
from experiments.presets import read_preset
from experiments.report import draw_or_warn, machine_line
from experiments.rows import QUALITY
from stackformer.processing_stack import NO_OP, POP


@dataclass(frozen=True)
class Run(study.Run):
    """With the mean depth of random halting, if halting is not learned."""

    depth: float | None = None


class RandomActions(nn.Module):
    """In place of `ActionProjection`: no-ops, and after every step, with a given probability, the return."""

    def __init__(self, return_probability: float) -> None:
        super().__init__()
        self.return_probability = return_probability

    def forward(self, thought: Tensor) -> Tensor:
        """Logits [n, 3] of actions that are certain."""
        returns = torch.rand(len(thought), device=thought.device) < self.return_probability
        actions = nn.functional.one_hot(torch.where(returns, POP, NO_OP), 3)
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


def measure(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """`study.measure`, with halting as the run has it, and with the depth that came of it."""
    model, tokenizer, texts = study.build(run, args)
    if run.depth is not None:
        probability = return_probability(run.depth, model.config.max_ponder_steps)
        model.model.action_proj = RandomActions(probability)
    measured, trainer = study.train(model, tokenizer, texts, run.seed, args)
    return measured | {"ponder_steps": mean_ponder_steps(model, trainer.get_eval_dataloader())}


@torch.no_grad()
def mean_ponder_steps(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> float:
    """Mean over the tokens of the first 16 batches."""
    batches = itertools.islice(batches, 16)
    steps = [model(batch["input_ids"].to(model.device)).ponder_steps for batch in batches]
    return torch.cat(steps).double().mean().item()


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of all rows and seeds that are asked for, and of those that others take their depth from."""

    def lines_of(names: Iterable[str], learned: dict[tuple[str, int], float]) -> list[dict[str, Any]]:
        runs = []
        for seed, name in itertools.product(args.seeds, names):
            row = QUALITY[name]
            depth = row.depth if row.depth_of is None else learned[row.depth_of, seed]
            runs.append(Run(name, args.preset, row.overrides, seed, depth))
        return study.run_all(runs, measure, args, args.json)

    first = lines_of(dict.fromkeys(QUALITY[name].depth_of or name for name in args.rows), {})
    learned = {(line["row"], line["seed"]): line["ponder_steps"] for line in first}
    return first + lines_of([name for name in args.rows if QUALITY[name].depth_of], learned)


def main(argv: list[str] | None = None) -> study.Rows:
    """Run what `argv` says (default: the command line); medians and ranges of each row."""
    parser = Parser(description=__doc__.split("\n")[0])
    study.add_arguments(parser)
    parser.set_defaults(train_range="0:3600000", eval_range="3600000:3800000", seeds=[1, 2, 3])
    parser.add_argument("--preset", default="configs/stackformer-tiny.json", help="rows change its fields")
    parser.add_argument(
        "--rows", nargs="+", default=list(QUALITY), choices=QUALITY, metavar="ROW", help=", ".join(QUALITY)
    )
    parser.add_argument("--json", default="outputs/quality.jsonl", help="file of finished runs, a line each")
    parser.add_argument("--plot", default="outputs/quality.png", help="picture to write")
    args = parser.parse_args(argv)
    check_output_file("json", args.json)
    check_picture_file("plot", args.plot)
    read_preset(args.preset)
    study.check(args)
    rows = study.summarize(run_all(args), ("bits_per_byte", "ponder_steps", "parameters", "seconds"))
    rows = {name: rows[name] for name in args.rows}
    print(machine_line())
    print(f"{args.steps} steps of {args.batch_size} x {args.block_size} bytes, seeds {args.seeds}\n")
    columns = {
        "parameters": lambda row: f"{row['parameters'].median / 1000:,.0f} k",
        "mean ponder steps": lambda row: f"{row['ponder_steps'].median:.2f}",
        "bits per byte (range)": lambda row: row["bits_per_byte"].text(".3f"),
        "training time": lambda row: f"{row['seconds'].median:.0f} s",
    }
    print(study.table(rows, columns))
    panels = {"bits_per_byte": "bits per byte: median and range over the seeds"}
    draw_or_warn(study.draw, rows, panels, args.plot)
    return rows


if __name__ == "__main__":
    run_main(main)
