# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Draws the parts of its long-term memory that an infinity-former attends to while it answers.

    python -m benchmarks.tasks.densities --length 256 \\
        --run outputs/sorting/sorting/infinity-former/depth1-seed0

A panel for each layer and head: answers downwards, in the order they are asked for, the memory from left to
right, 0 the oldest and 1 the newest; what is drawn is the density that the head attends with, a mean over
sequences. Lines are where blocks begin, which a memory that is sampled uniformly squeezes alike, each by
`memory_contraction`; sticky memories give them other places.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.tasks import IGNORED, Task, seeded
from benchmarks.tasks.run import TEST, build_task
from experiments.command_line import COUNT, Parser, check_picture_file, run_main
from experiments.loading import load_model
from experiments.presets import read_json
from experiments.report import save_figure
from stackformer.mixer_continuous import ContinuousAttention, gaussian


@torch.no_grad()
def looks(model: PreTrainedModel, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Means and variances [B, H, T] of the densities that tokens [B, T] attend with, for each layer that has
    such a memory; for models that take one ponder step."""
    mixers = [layer.mixer for layer in model.model.layers if isinstance(layer.mixer, ContinuousAttention)]
    seen: dict[nn.Module, list[Tensor]] = {mixer.density_proj: [] for mixer in mixers}
    handles = [
        module.register_forward_hook(lambda module, _, output: seen[module].append(output)) for module in seen
    ]
    try:
        model(input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    joined = (torch.cat(blocks, dim=2)[:, :, : input_ids.shape[1]] for blocks in seen.values())
    return [(x[..., 0].sigmoid(), nn.functional.softplus(x[..., 1])) for x in joined]


def answer_densities(
    model: PreTrainedModel, task: Task, length: int, num_test: int, points: int = 100
) -> Tensor:
    """Mean density over test sequences, at the middles of parts of [0, 1]: [layers, H, answers, points]."""
    input_ids, labels = task.sample(num_test, length, seeded(TEST, length))
    asked = (labels[0] != IGNORED).nonzero().squeeze(1)
    positions = (torch.arange(points) + 0.5) / points
    return torch.stack([
        gaussian(positions, mean[..., asked].unsqueeze(-1), variance[..., asked].unsqueeze(-1)).mean(0)
        for mean, variance in looks(model, input_ids)
    ])  # fmt: skip


def draw(densities: Tensor, contraction: float, num_blocks: int, path: str | Path) -> None:
    """Write the picture (PNG) of densities [layers, H, answers, points] of a memory of so many blocks."""
    from matplotlib.figure import Figure

    layers, heads = densities.shape[:2]
    figure = Figure(figsize=(1 + 2.4 * heads, 0.5 + 2.2 * layers), layout="constrained")
    axes = figure.subplots(layers, heads, sharex=True, sharey=True, squeeze=False)
    for layer, row in enumerate(axes):
        for head, axis in enumerate(row):
            image = densities[layer, head].clamp(max=float(densities.quantile(0.99))).numpy()
            axis.imshow(
                image,
                aspect="auto",
                extent=(0, 1, len(image), 0),
                cmap="magma",
                vmin=0,
                interpolation="nearest",
            )
            for number in range(1, num_blocks):
                axis.axvline(contraction**number, color="white", linewidth=0.5, alpha=0.6)
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
    figure.supxlabel("the memory: 0 the oldest, 1 the newest", fontsize=9)
    figure.supylabel("answer", fontsize=9)
    save_figure(path, figure, dpi=80)


def main(argv: list[str] | None = None) -> Tensor:
    """Draw what `argv` says (default: the command line)."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True, help="folder of a run of benchmarks.tasks.run")
    parser.add_argument("--length", type=COUNT, required=True, help="length of the sequences")
    parser.add_argument("--num_test", type=COUNT, default=64, help="sequences")
    parser.add_argument("--output", default="outputs/densities.png", help="picture to write")
    args = parser.parse_args(argv)
    check_picture_file("output", args.output)
    if not (Path(args.run) / "run.json").is_file():
        raise ValueError(f"run={args.run!r}: expected the folder of a run of benchmarks.tasks.run.")
    settings = read_json("run", Path(args.run) / "run.json")["settings"]
    model = load_model("run", args.run)
    if not any(isinstance(layer.mixer, ContinuousAttention) for layer in model.model.layers):
        raise ValueError(f"run={args.run!r}: expected a model with continuous attention.")
    task = build_task(settings["task"], settings["options"])
    densities = answer_densities(model, task, args.length, args.num_test)
    draw(densities, model.config.memory_contraction, args.length // model.config.memory_block, args.output)
    return densities


__all__ = ["answer_densities", "draw", "looks"]


if __name__ == "__main__":
    run_main(main)
