# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Text at 20 tokens per parameter, each model at its own best learning rate: bits per byte, by position too.

    python -m benchmarks.text --data_path enwik8 --jobs 2
    python -m benchmarks.text --data_path enwik8 --rows "one bank" llama --learning_rates 3e-3 --seeds 0

Every row is a preset with other fields, or a model of transformers of the same size, which has 0.25 million
parameters and reads 6 million bytes in blocks of 1,024. Every learning rate is tried with the first seed, and
the other seeds are trained at the one that was best. Runs that are finished are not repeated.

Prints a Markdown table, median and range over the seeds, and draws it. Beside the validation loss of blocks,
it has the loss by position in contexts of 8,192 bytes, on the same bytes at every position: that of a model
that remembers falls on where no block of the training reached.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import study
from experiments.command_line import COUNT, POSITIVE, Parser, check_output_file, check_picture_file, run_main
from experiments.data import encode, parse_range, read_bytes
from experiments.report import draw_or_warn, machine_line
from experiments.rows import TEXT
from scripts.evaluate import mean_bits, nll_by_position, position_bins


@dataclass(frozen=True)
class Run(study.Run):
    """At a learning rate of its own."""

    learning_rate: float = 0.0


def measure(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Measures what `study.train` does, and the bits of a byte by position in long contexts."""
    args = argparse.Namespace(**vars(args) | {"learning_rate": run.learning_rate})
    model, tokenizer, texts = study.build(run, args)
    measured, _ = study.train(model, tokenizer, texts, run.seed, args)
    ids = torch.from_numpy(encode(read_bytes(args.data_path, args.long_range), tokenizer).astype(np.int64))
    nll = nll_by_position(model.eval(), ids.to(model.device), args.context_length, args.block_size)
    bits = mean_bits(nll, args.block_size)
    return measured | {f"at {positions}": value for positions, value in bits.items()}


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of each row's best learning rate: all rates with the first seed, then all seeds."""

    def lines_of(rates: dict[str, Iterable[float]], seeds: Iterable[int]) -> list[dict[str, Any]]:
        runs = [
            Run(name, TEXT[name].path, TEXT[name].overrides, seed, rate)
            for seed in seeds
            for name in args.rows
            for rate in rates[name]
        ]
        return study.run_all(runs, measure, args, args.json)

    first = lines_of(dict.fromkeys(args.rows, args.learning_rates), args.seeds[:1])
    best = {}
    for name in args.rows:
        of_row = [line for line in first if line["row"] == name]
        best[name] = [min(of_row, key=lambda line: line["bits_per_byte"])["learning_rate"]]
    return lines_of(best, args.seeds)


def main(argv: list[str] | None = None) -> study.Rows:
    """Run what `argv` says (default: the command line); medians and ranges of each row."""
    parser = Parser(description=__doc__.split("\n")[0])
    study.add_arguments(parser)
    parser.set_defaults(
        train_range="0:3600000", eval_range="3700000:3765536", seeds=[0, 1, 2], steps=730, block_size=1024
    )
    parser.add_argument(
        "--learning_rates", type=POSITIVE, nargs="+", default=[1e-3, 3e-3, 6e-3, 1e-2],
        help="tried with the first seed; --learning_rate is not used",
    )  # fmt: skip
    parser.add_argument("--context_length", type=COUNT, default=8192, help="bytes of a long context")
    parser.add_argument(
        "--long_range",
        default="3700000:3831072",
        help="START:STOP in bytes, cut into long contexts",
    )
    parser.add_argument(
        "--rows", nargs="+", default=list(TEXT), choices=TEXT, metavar="ROW", help=", ".join(TEXT)
    )
    parser.add_argument("--json", default="outputs/text.jsonl", help="file of finished runs, a line each")
    parser.add_argument("--plot", default="outputs/text.png", help="picture to write")
    args = parser.parse_args(argv)
    check_output_file("json", args.json)
    check_picture_file("plot", args.plot)
    study.check(args)
    check_long_contexts(args)
    positions = [
        f"at {start}-{stop - 1}" for start, stop in position_bins(args.context_length, args.block_size)
    ]
    lines = run_all(args)
    keys = ("bits_per_byte", "parameters", "tokens_per_second", "learning_rate", *positions)
    rows = study.summarize(lines, keys)
    print(machine_line())
    print(f"{args.steps} steps of {args.batch_size} x {args.block_size} bytes, seeds {args.seeds}\n")
    columns = {
        "parameters": lambda row: f"{row['parameters'].median / 1000:,.0f} k",
        "learning rate": lambda row: row["learning_rate"].text("g"),
        "bits per byte (range)": lambda row: row["bits_per_byte"].text(".3f"),
        **{name: lambda row, name=name: format(row[name].median, ".3f") for name in positions},
        "bytes per second": lambda row: f"{row['tokens_per_second'].median:,.0f}",
    }
    print(study.table(rows, columns))
    panels = {"bits_per_byte": "bits per byte: median and range over the seeds"}
    draw_or_warn(study.draw, rows, panels, args.plot)
    return rows


def check_long_contexts(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: unless `long_range` is a part of the text that is long enough for `context_length`.
    """
    start, stop = parse_range(args.long_range, Path(args.data_path).stat().st_size, "long_range")
    needed = 2 * args.context_length - args.block_size
    if args.context_length % args.block_size or stop - start < needed:
        raise ValueError(
            f"context_length={args.context_length}: expected a multiple of block_size={args.block_size}, and "
            f"{needed} bytes of long_range, got {stop - start}."
        )


if __name__ == "__main__":
    run_main(main)
