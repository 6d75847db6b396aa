# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Profiles a training step, a prefill and a decode step by operator, with torch's profiler.

    python -m benchmarks.profile_model --models stack --rows 12 --json outputs/profile.json

Shares are of the time in operators, each without the operators that it calls; time in Python is not in them.
"""

from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks import harness, models
from benchmarks.decode import GreedyLoop
from benchmarks.training import training_step
from experiments.command_line import COUNT, run_main
from experiments.rows import PLAIN, STACK


def profiled(work: harness.Work, calls: int) -> list[harness.Row]:
    """A row per operator for `calls` calls of `work`, after one for warming up; the slowest first."""
    work()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(calls):
            work()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        {
            "operator": event.key,
            "calls": event.count / calls,
            "seconds": event.self_cpu_time_total / calls / 1e6,
            "share": event.self_cpu_time_total / total,
        }
        for event in events
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def uses(model: PreTrainedModel, args) -> Iterator[tuple[str, harness.Work]]:
    """Yields the three uses of a model that are profiled."""
    ids = models.random_ids(args.batch_size, args.time, args.device)
    yield "decode step", GreedyLoop(model, models.read(model, ids)[1], args.batch_size, tokens=1)
    yield "prefill", torch.no_grad()(lambda: models.read(model, ids))
    yield "training step", training_step(model.train(), ids)


def table(rows: list[harness.Row]) -> str:
    """Markdown."""
    lines = ["| operator | calls | ms | share |", "|---|---|---|---|"]
    for row in rows:
        cells = f"{row['calls']:,.0f} | {1e3 * row['seconds']:.2f} | {row['share']:.1%}"
        lines.append(f"| `{row['operator']}` | {cells} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Measure as `argv` says (default: the command line)."""
    parser = harness.parser(__doc__)
    parser.add_argument("--repeats", type=COUNT, default=3, help="calls that the profile is the mean of")
    models.add_arguments(parser, (PLAIN, STACK))
    parser.add_argument(
        "--time", type=COUNT, default=2048, help="tokens T of a training step and of a prompt"
    )
    parser.add_argument("--batch_size", type=COUNT, default=1, help="rows")
    parser.add_argument("--rows", type=COUNT, default=12, help="operators in a table; the file has all")
    args = parser.parse_args(argv)
    built = models.build_all(args)
    rows, tables = [], {"Models": models.describe(built)}
    for name, model in built.items():
        for use, work in uses(model, args):
            found = profiled(work, args.repeats)
            rows += [{"model": name, "use": use, **row} for row in found]
            total = sum(row["seconds"] for row in found)
            title = f"{name}, {use}, B={args.batch_size}, T={args.time}"
            tables[f"{title}: {1e3 * total:.1f} ms in operators"] = table(found[: args.rows])
    return harness.report(args, rows, tables)


if __name__ == "__main__":
    run_main(main)
