# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Tables and the picture of the results of `benchmarks.tasks.run`: accuracy by length and depth.

    python -m benchmarks.tasks.heat_map --results outputs/tasks --measure final --output heat_map.png

One panel for each task and system; its rows are depths (ponder steps of the training, and of the test where
they differ), its columns lengths, a line after those of the training. A cell is the median over seeds; the
tables also have the lowest and the highest. A system that was trained with several learning rates is shown at
the one with the best mean of the measure.
"""

import statistics
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

from experiments.command_line import Parser, check_output_file, run_main  # noqa: E402
from experiments.engine import read_lines  # noqa: E402
from experiments.report import save_figure  # noqa: E402

RESULTS = "results.jsonl"  # in the folder of each run
MEASURES = ("accuracy", "final", "exact")
Rows = list[dict[str, Any]]


def read_rows(path: str | Path) -> Rows:
    """The rows of a file of results, or of all of them under a folder; none if there is none."""
    path = Path(path)
    files = sorted(path.rglob(RESULTS)) if path.is_dir() else [path] if path.exists() else []
    return [row for file in files for row in read_lines(file)]


def panels(rows: Rows, measure: str = "accuracy") -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """{(task, system): {depth: {length: median over seeds}}}, everything in order.

    Raises:
        ValueError: for an unknown measure.
    """
    values = _values(rows, measure)
    return {
        key: {
            depth: {length: statistics.median(seeds) for length, seeds in cells.items()}
            for depth, cells in table.items()
        }
        for key, table in values.items()
    }


def best_rates(rows: Rows, measure: str = "accuracy") -> dict[tuple[str, str], float | None]:
    """{(task, system): the learning rate with the best mean of `measure`, over all its rows}."""
    found: dict[tuple[str, str], dict[float | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["task"], row["system"]][row.get("learning_rate")].append(row[measure])
    return {key: max(rates, key=lambda rate: fmean(rates[rate])) for key, rates in found.items()}


def _values(rows: Rows, measure: str) -> dict[tuple[str, str], dict[str, dict[int, list[float]]]]:
    """{(task, system): {depth: {length: one value for each seed}}}, at the best learning rates, in order."""
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: expected one of {MEASURES}.")
    rates = best_rates(rows, measure)
    values: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        if row.get("learning_rate") != rates[row["task"], row["system"]]:
            continue
        settings = (row["train_depth"], row["depth"], row["halting_threshold"])
        depth = tuple(-1 if value is None else value for value in settings)  # which sorts
        values[row["task"], row["system"], depth, row["length"]].append(row[measure])
    result: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    for task, system, depth, length in sorted(values):
        result[task, system][_depth_label(*depth)][length] = values[task, system, depth, length]
    return result


def print_tables(rows: Rows, measure: str = "accuracy") -> None:
    """Print a table for each task: systems and depths by length, and what guessing has."""
    chance = {row["task"]: row["chance"] for row in rows}
    values, rates = _values(rows, measure), best_rates(rows, measure)
    several = len({row.get("learning_rate") for row in rows}) > 1
    for task in sorted(chance):
        lengths = sorted({row["length"] for row in rows if row["task"] == task})
        print(
            f"\n{task}: {measure} by length, median over seeds (lowest to highest); guessing has "
            f"{chance[task]:.3f}"
        )
        print(f"{'':40}" + "".join(f"{length:>20}" for length in lengths))
        for (_, system), table in ((key, table) for key, table in values.items() if key[0] == task):
            rate = f", {rates[task, system]:g}" if several else ""
            for depth, cells in table.items():
                figures = (_figure(cells.get(length)) for length in lengths)
                print(f"{f'{system}{rate}, {depth}':40}" + "".join(f"{figure:>20}" for figure in figures))


def _figure(seeds: list[float] | None) -> str:
    if seeds is None:
        return "-"
    spread = f" ({min(seeds):.3f}-{max(seeds):.3f})" if len(seeds) > 1 else ""
    return f"{statistics.median(seeds):.3f}{spread}"


def draw_heat_map(rows: Rows, path: str | Path, measure: str = "accuracy") -> None:
    """Write the picture of the rows to `path` (PNG).

    Raises:
        ValueError: without rows, or for an unknown measure.
    """
    if not rows:
        raise ValueError(f"rows={rows!r}: expected at least one result to draw.")
    tables = panels(rows, measure)
    chance = {row["task"]: row["chance"] for row in rows}
    train_length = {(row["task"], row["system"]): row["train_length"] for row in rows}
    tasks, systems = (sorted({key[i] for key in tables}) for i in range(2))
    num_depths = max(len(table) for table in tables.values())
    num_lengths = max(len(cells) for table in tables.values() for cells in table.values())
    figure, axes = plt.subplots(
        len(tasks),
        len(systems),
        figsize=((0.75 * num_lengths + 2.2) * len(systems), (0.45 * num_depths + 1.2) * len(tasks)),
        layout="constrained",
        squeeze=False,
    )
    for i, task in enumerate(tasks):
        for j, system in enumerate(systems):
            axis = axes[i][j]
            if (task, system) not in tables:
                axis.set_axis_off()
                continue
            image = _draw_panel(axis, tables[task, system], chance[task], train_length[task, system])
            axis.set_title(f"{task}, {system}", loc="left", fontsize=10)
        figure.colorbar(image, ax=list(axes[i]), label=f"{measure}, from chance")
    save_figure(path, figure, dpi=110)
    plt.close(figure)


def _draw_panel(
    axis: plt.Axes, table: dict[str, dict[int, float]], chance: float, train_length: int
) -> matplotlib.image.AxesImage:
    lengths = sorted({length for cells in table.values() for length in cells})
    values = [[cells.get(length, float("nan")) for length in lengths] for cells in table.values()]
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=chance, vmax=1)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            dark = value < (1 + chance) / 2
            axis.text(
                x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set_yticks(range(len(table)), list(table))
    axis.set_xlabel("length")
    trained = sum(length <= train_length for length in lengths)
    if 0 < trained < len(lengths):
        axis.axvline(trained - 0.5, color="red", linewidth=2)
    return image


def _depth_label(trained: int, tested: int, threshold: float) -> str:
    if trained == -1:
        return "one pass"
    label = f"P = {trained}" if trained == tested else f"P = {trained}, tested with {tested}"
    return label if threshold == -1 else f"{label}, threshold {threshold:g}"


def main(argv: list[str] | None = None) -> None:
    """Print and draw as `argv` says (default: the command line)."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", required=True, help="output folder of benchmarks.tasks.run")
    parser.add_argument("--measure", default="accuracy", choices=MEASURES, help="what to show")
    parser.add_argument("--output", default="heat_map.png", help="PNG file to write")
    args = parser.parse_args(argv)
    check_output_file("output", args.output)
    if not Path(args.results).exists():
        raise ValueError(f"results={args.results!r}: expected a folder of benchmarks.tasks.run, found none.")
    rows = read_rows(args.results)
    if not rows:
        raise ValueError(f"results={args.results!r}: expected a folder with results, found none in it.")
    print_tables(rows, args.measure)
    draw_heat_map(rows, args.output, args.measure)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_main(main)
