# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The course of a training run in one picture, from what the Trainer logged.

`TrainingPlot` is a callback for any Trainer: `training.png` in the output folder is drawn anew at each
evaluation and at the end; if that fails, a warning says so, and the run goes on. It has a panel for each of
these that was logged: loss, bits per byte, ponder steps (a band where their standard deviation was logged,
too), entropies.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from experiments.report import draw_or_warn, save_figure

# The panels by title, each with what the name of a logged number must contain to be in it.
PANELS = {
    "loss": "loss",
    "bits per byte": "bits_per_byte",
    "ponder steps": "ponder_steps",
    "entropy": "entropy",
}
SPREAD = "_std"

Series = dict[str, tuple[list[int], list[float]]]


class TrainingPlot(TrainerCallback):
    """Draws `training.png` in the output folder.

    Args:
        at_end: whether at the end of the training, too; False where the model is saved, and then evaluated.
    """

    def __init__(self, at_end: bool = True):
        self.at_end = at_end

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if state.global_step > 0:
            self._draw(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        if self.at_end:
            self._draw(args, state)

    @staticmethod
    def _draw(args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero:
            draw_or_warn(draw_training, state.log_history, Path(args.output_dir) / "training.png")


def draw_training(log_history: list[dict[str, Any]], path: str | Path) -> None:
    """Write the picture of a Trainer's `state.log_history`, as in trainer_state.json, to `path` (PNG).

    Raises:
        ValueError: if nothing that has a panel was logged.
    """
    logged = _series(log_history)
    panels = {
        title: {name: points for name, points in logged.items() if part in name and name != "train_loss"}
        for title, part in PANELS.items()
    }
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        raise ValueError(
            f"log_history has {sorted(logged)}: expected some number with any of {list(PANELS.values())}."
        )
    figure = Figure(figsize=(7, 0.4 + 2.1 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, series) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, series)
        axis.set_title(title, loc="left", fontsize=9)
    axes[-1].set_xlabel("step", fontsize=8)
    save_figure(path, figure, dpi=110)


def _series(log_history: list[dict[str, Any]]) -> Series:
    """Steps and values of each number that was logged, by its name."""
    series: Series = {}
    for entry in log_history:
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return series


def _draw_panel(axis: Axes, series: Series) -> None:
    """Lines; a standard deviation is a band around its mean."""
    for name, (steps, values) in series.items():
        if name.endswith(SPREAD):
            continue
        (line,) = axis.plot(
            steps, values, label=name, linewidth=1.2, marker="o" if len(steps) < 20 else None, markersize=3
        )
        _, spread = series.get(name.removesuffix("_mean") + SPREAD, (steps, []))
        if len(spread) == len(values):
            low, high = zip(*((v - s, v + s) for v, s in zip(values, spread, strict=True)), strict=True)
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.legend(fontsize=7, frameon=False)
    axis.tick_params(labelsize=7)
    axis.grid(color="0.92", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)


__all__ = ["TrainingPlot", "draw_training"]
