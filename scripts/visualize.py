# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Draw what a Stackformer did at every token: how long it pondered, where on its stack, in which memories.

    python -m scripts.visualize --model outputs/demo --text "The quick brown fox" --output picture.png

From top to bottom: surprise (bits) and ponder steps; probability mass on each stack level, step by step; how
much was read from and written to each memory bank by each core layer (mean over heads, weighted by the mass
of each step).
"""

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import stackformer  # noqa: F401  (registers the model)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)


@torch.no_grad()
def draw_trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    path: str | Path,
    max_tokens: int = 100,
) -> None:
    """Write the picture of the first `max_tokens` tokens of `text` to `path` (PNG).

    Raises:
        ValueError: if the text has fewer than two tokens.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :max_tokens]
    if ids.shape[1] < 2:
        raise ValueError(f"text={text!r}: expected at least two tokens, got {ids.shape[1]}.")
    outputs = model(ids.to(model.device), output_stack_trace=True)
    trace, config = outputs.stack_trace, model.config
    labels = [_printable(tokenizer.decode([token])) for token in ids[0].tolist()]
    mass = trace.pointer[0].sum(-1)  # [T, P]

    figure, axes = plt.subplots(
        4,
        1,
        figsize=(max(8.0, 0.17 * len(labels)), 10),
        height_ratios=[2, config.max_ponder_steps * config.stack_depth / 3 + 1, 1.5, 1.5],
        layout="constrained",
        sharex=True,
    )
    _draw_surprise(
        axes[0], _surprise(outputs.logits[0], ids[0]), outputs.ponder_steps[0], config.max_ponder_steps
    )
    rows = [
        f"step {p + 1}, level {s}" for p in range(config.max_ponder_steps) for s in range(config.stack_depth)
    ]
    _draw_heat(axes[1], trace.pointer[0].flatten(1), rows, "Stack pointer (probability mass)", maximum=1.0)
    rows = [
        f"layer {i + 1}, bank {n + 1}"
        for i in range(config.num_hidden_layers)
        for n in range(config.num_memory_banks)
    ]
    for axis, weights, title in (
        (axes[2], trace.bank_writes[0], "Memory banks written"),
        (axes[3], trace.bank_reads[0], "Memory banks read"),
    ):
        share = (weights.mean(-2) * mass[..., None, None]).sum(1) / mass.sum(1)[:, None, None]  # [T, L, N]
        _draw_heat(axis, share.flatten(1), rows, title, maximum=1.0)
    axes[3].set_xticks(range(len(labels)), labels, family="monospace", fontsize=8)
    partial = Path(f"{path}.partial")
    figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)
    partial.replace(path)


def _surprise(logits: Tensor, ids: Tensor) -> Tensor:
    """Bits of each token given those before it [T]; not a number for the first."""
    nats = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:].to(logits.device), reduction="none")
    return torch.cat([nats.new_full((1,), math.nan), nats / math.log(2)])


def _draw_surprise(axis: plt.Axes, bits: Tensor, ponder_steps: Tensor, max_steps: int) -> None:
    axis.bar(range(len(bits)), bits.tolist(), color="#c9d6e8", width=0.9)
    axis.set_ylabel("surprise (bits)", color="#5b7aa5")
    axis.set_title("Surprise and expected ponder steps", loc="left", fontsize=10)
    steps = axis.twinx()
    steps.plot(range(len(bits)), ponder_steps.tolist(), color="#c0392b", marker=".", linewidth=1)
    steps.set_ylabel("ponder steps", color="#c0392b")
    steps.set_ylim(0, max_steps + 0.2)


def _draw_heat(axis: plt.Axes, values: Tensor, rows: list[str], title: str, maximum: float) -> None:
    """A heat map of `values` [T, rows]."""
    axis.imshow(
        values.T.float().cpu().numpy(),
        aspect="auto",
        cmap="magma",
        vmin=0,
        vmax=maximum,
        interpolation="nearest",
    )
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    axis.set_title(title, loc="left", fontsize=10)


def _printable(token: str) -> str:
    return {"\n": "\u21b5", " ": "\u2423", "\t": "\u21e5", "$": r"\$"}.get(token, token)


def main(argv: list[str] | None = None) -> None:
    """Draw as `argv` says (default: the command line)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="saved model, with its tokenizer")
    parser.add_argument("--text", required=True, help="what the model reads")
    parser.add_argument("--output", default="picture.png", help="PNG file to write")
    parser.add_argument("--max_tokens", type=int, default=100, help="tokens to show")
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    draw_trace(model, AutoTokenizer.from_pretrained(args.model), args.text, args.output, args.max_tokens)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
