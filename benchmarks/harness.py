# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The harness of all benchmarks: sides that take turns, peak memory, the machine's speed, tables, plots.

A benchmark compares sides on the same work in one run. Its result is a list of rows, one for each side of
each case; `report` prints them as Markdown, writes them as JSON (every sample included) and plots them.
"""

import argparse
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from experiments.command_line import COUNT, NOT_NEGATIVE, Parser, check_output_file, check_picture_file
from experiments.loading import check_device
from experiments.report import commit, draw_or_warn, machine_line, save_figure, write_json

Row = dict[str, Any]
Work = Callable[[], Any]

# Matrix products that say what the machine can do at the moment: one large, one of many chunk-sized ones.
LARGE_PRODUCT, SMALL_PRODUCTS = "sgemm 1024", "batched sgemm 64"
MACHINE = (LARGE_PRODUCT, SMALL_PRODUCTS)

# Of `add_timing`. Other work of the machine makes a wall clock run on, and hardly the clock of a process.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}

# The modes of an operator's benchmark.
FORWARD, BACKWARD = "forward", "forward and backward"


class BenchmarkParser(Parser):
    """A parser that checks what `parser` and `add_plot` add."""

    def parse_args(self, args=None, namespace=None):
        """As argparse's.

        Raises:
            ValueError: for a value out of its range, or a place that cannot be used.
        """
        parsed = super().parse_args(args, namespace)
        check_output_file("json", parsed.json)
        check_picture_file("plot", vars(parsed).get("plot"))
        check_device("device", parsed.device)
        return parsed


def parser(doc: str) -> BenchmarkParser:
    """A parser of a benchmark's command line, with the arguments that all have."""
    parser = BenchmarkParser(description=doc.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--json", default=None, help="file to write all measurements to")
    return parser


def add_timing(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Adds the options of `measure`."""
    parser.add_argument("--repeats", type=COUNT, default=repeats, help="timed calls of each side")
    parser.add_argument(
        "--budget", type=NOT_NEGATIVE, default=30.0, help="seconds per case, after which 3 repeats are enough"
    )
    parser.add_argument(
        "--clock",
        default="wall",
        choices=list(CLOCKS),
        help="process: CPU seconds of the process, for one thread on a machine that does other work",
    )


def add_plot(parser: argparse.ArgumentParser) -> None:
    """For benchmarks that draw."""
    parser.add_argument("--plot", default=None, help="file to draw to, such as a .png or .svg")


def add_operator(parser: argparse.ArgumentParser, time: list[int], memories: list[int]) -> None:
    """Adds the sizes of an operator on banks of memories, with these defaults, and the modes and threads."""
    parser.add_argument("--time", type=COUNT, nargs="+", default=time, help="lengths T")
    parser.add_argument("--memories", type=COUNT, nargs="+", default=memories, help="memories per head R")
    parser.add_argument("--batch_size", type=COUNT, default=1, help="batch size")
    parser.add_argument("--heads", type=COUNT, default=4, help="heads")
    parser.add_argument("--head_dim", type=COUNT, nargs="+", default=[64], help="key and value sizes K = V")
    parser.add_argument("--modes", nargs="+", default=[FORWARD, BACKWARD], choices=[FORWARD, BACKWARD])
    parser.add_argument("--threads", type=COUNT, nargs="+", default=[1, 2], help="numbers of threads")


def operator_cases(args: argparse.Namespace) -> Iterator[tuple[int, str, int]]:
    """Yields head size, mode and length of each case of `add_operator`, with torch's threads set for it."""
    threads_before = torch.get_num_threads()
    for threads in args.threads:
        torch.set_num_threads(threads)
        yield from itertools.product(args.head_dim, args.modes, args.time)
    torch.set_num_threads(threads_before)


def operator_call(operator: Callable[..., Tensor], inputs: list[Tensor], mode: str) -> Work:
    """Returns a function that makes one call, with the gradients of all inputs or without any."""
    if mode == FORWARD:
        return torch.no_grad()(lambda: operator(*inputs))
    inputs = [x.detach().requires_grad_() for x in inputs]
    gradient = torch.randn_like(operator(*inputs))
    return lambda: torch.autograd.grad(operator(*inputs), inputs, gradient)


def take_turns(
    sides: Mapping[str, Work],
    repeats: int,
    budget: float = float("inf"),
    device: str = "cpu",
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of every call of every side; one call of each is for warming up and not counted.

    Sides take turns, and every other round goes backwards, so that what the machine does meanwhile, and what
    one side leaves in its caches for the next, hits all alike.

    Args:
        sides: what to call, by name.
        repeats: rounds.
        budget: seconds after which no further round begins, once there were 3.
        device: synchronised before the clock is read.
        clock: one of `CLOCKS`.
    """
    for work in sides.values():
        work()
    names, seconds = list(sides), {name: [] for name in sides}
    started = time.perf_counter()
    for round_ in tqdm(range(repeats), leave=False):
        if round_ >= 3 and time.perf_counter() - started > budget:
            break
        for name in names if round_ % 2 == 0 else reversed(names):
            seconds[name].append(_seconds(sides[name], device, CLOCKS[clock]))
    return seconds


def _seconds(work: Work, device: str, clock: Callable[[], float]) -> float:
    _synchronize(device)
    started = clock()
    work()
    _synchronize(device)
    return clock() - started


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Work, device: str = "cpu") -> int:
    """Most bytes that torch's allocator held at one time during `work()`, above what it held before.

    On a CPU every allocation and release is followed with torch's profiler: tensors, work space of operators,
    and what extensions take from torch, to the byte and whatever else the process does. What a library takes
    from the operating system itself, such as the C++ memory bank's work space for a chunk, is not seen.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its own start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine_sides(device: str = "cpu") -> dict[str, Work]:
    """The sides `MACHINE`: products of two 1024 x 1024 matrices, and of 512 pairs of 64 x 64."""
    large, small = torch.randn(1024, 1024, device=device), torch.randn(512, 64, 64, device=device)
    return {LARGE_PRODUCT: lambda: large @ large, SMALL_PRODUCTS: lambda: small @ small}


# Floating-point operations of each of the machine's sides.
MACHINE_FLOPS = {LARGE_PRODUCT: 2 * 1024**3, SMALL_PRODUCTS: 512 * 2 * 64**3}


def measure(
    case: Row,
    sides: Mapping[str, Work],
    args: argparse.Namespace,
    base: str,
    memory: bool = False,
    **columns: Mapping[str, Any],
) -> list[Row]:
    """A row for each side of a case: median seconds, and their ratio to those of the side `base`.

    Args:
        case: what the sides have in common, such as the length.
        args: of `parser` and `add_timing`.
        base: the side that ratios refer to; without it there are none.
        memory: whether to measure the peak, too, except of the machine's own sides.
        columns: more values by the name of the side.
    """
    samples = take_turns(sides, args.repeats, args.budget, args.device, args.clock)
    rows = []
    for name, seconds in samples.items():
        row = {**case, "side": name, "seconds": statistics.median(seconds), "samples": seconds}
        row["ratio"] = row["seconds"] / statistics.median(samples[base]) if base in samples else None
        if memory and name not in MACHINE:
            row["peak_bytes"] = peak_bytes(sides[name], args.device)
        row |= {column: values[name] for column, values in columns.items() if name in values}
        rows.append(row)
    return rows


def table(rows: Iterable[Row], index: str, cell: Callable[[Row], str]) -> str:
    """Markdown: a line for each value of `index`, a column for each side, "-" where it was not measured."""
    rows = list(rows)
    names = list(dict.fromkeys(row["side"] for row in rows))
    cells = {(row[index], row["side"]): cell(row) for row in rows}
    lines = [f"| {index} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for value in dict.fromkeys(row[index] for row in rows):
        label = f"{value:,}" if isinstance(value, int) else str(value)
        lines.append(f"| {label} | " + " | ".join(cells.get((value, name), "-") for name in names) + " |")
    return "\n".join(lines)


def milliseconds(row: Row) -> str:
    """Time, and how many times the base's it is."""
    ratio = "" if row["ratio"] is None else f" ({row['ratio']:.2f}x)"
    return f"{_digits(1e3 * row['seconds'])} ms{ratio}"


def tokens_per_second(row: Row) -> str:
    """Speed, and how many times the base's it is."""
    ratio = "" if row["ratio"] is None else f" ({1 / row['ratio']:.2f}x)"
    return f"{_digits(row['tokens'] / row['seconds'])}{ratio}"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{_digits(count)} {unit}"


def _digits(number: float) -> str:
    """Three significant digits, and no exponent."""
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def report(args: argparse.Namespace, rows: list[Row], tables: Mapping[str, str]) -> dict[str, Any]:
    """Print the tables (Markdown, by what stands above each), write the JSON file, return its content."""
    content = {
        "machine": machine_line(),
        "load_average": os.getloadavg(),
        "commit": commit(),
        "arguments": vars(args),
        "rows": rows,
    }
    print(f"{content['machine']}; load average {content['load_average'][0]:.1f}")
    for heading, text in tables.items():
        print(f"\n{heading}\n\n{text}")
    if args.json:
        write_json(args.json, content)
    return content


def report_speed(
    args: argparse.Namespace, rows: list[Row], models: str, what: str, memory: str, x_label: str
) -> dict[str, Any]:
    """`report` of rows over the length T: tokens/s of `what`, peak bytes under the heading `memory`, and, if
    asked for, a plot of the time per token.

    Args:
        models: the table of the models.
    """
    tables = {
        "Models": models,
        f"{what.capitalize()}, tokens/s (in brackets: times {args.models[0]})": table(
            rows, "T", tokens_per_second
        ),
        memory: table(rows, "T", lambda row: size(row["peak_bytes"])),
    }
    content = report(args, rows, tables)
    if args.plot:
        draw_or_warn(
            plot_lines,
            args.plot,
            {what: rows},
            "T",
            lambda row: 1e6 * row["seconds"] / row["tokens"],
            x_label,
            "microseconds per token",
        )
    return content


def plot_lines(
    path: str,
    panels: Mapping[str, Iterable[Row]],
    x: str,
    y: Callable[[Row], float],
    x_label: str,
    y_label: str,
) -> None:
    """Lines over `x`, one for each side, both axes logarithmic: a straight line is a power, its slope the
    exponent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            lines.setdefault(row["side"], []).append((row[x], y(row)))
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(title=title, xlabel=x_label, xscale="log", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel(y_label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    save_figure(path, figure)
    pyplot.close(figure)
