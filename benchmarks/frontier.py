# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The price of halting early in a trained model: bits per byte and time over the halting threshold.

    python -m benchmarks.frontier --model runs/tiny --text other.txt --json outputs/frontier.json \
        --plot outputs/frontier.png

The threshold needs no training: it is an argument of the model's call and of `generate`. For each, the text
is evaluated in blocks of T tokens, each from its own start; `computed` is the share of the token-steps that
were computed. Then it is read with a cache in batches of the sizes asked for (prefill), and token by token
(decode), all thresholds taking turns.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import harness
from experiments.command_line import COUNT, NATURAL, THRESHOLD, check_input_file, run_main
from experiments.data import encode, parse_range
from experiments.loading import check_source, load_model, load_saved_tokenizer
from experiments.report import bits_per_byte, draw_or_warn, save_figure
from stackformer.training.trainer import ponder_metrics, ponder_sums


@torch.no_grad()
def evaluate(model: PreTrainedModel, blocks: Tensor, num_bytes: int, threshold: float) -> harness.Row:
    """Bits per byte and depth of one threshold, on blocks [rows, T]."""
    nll, sums = 0.0, torch.zeros(())
    for batch in blocks.split(16):
        outputs = model(batch, labels=batch, use_cache=False, halting_threshold=threshold)
        nll += float(outputs.loss) * len(batch)
        sums = sums + ponder_sums(outputs.ponder_distribution).cpu()
    metrics = ponder_metrics(sums)
    return {
        "threshold": threshold,
        "bits_per_byte": bits_per_byte(nll / len(blocks), blocks.numel(), num_bytes),
        "ponder_steps": metrics["ponder_steps"],
        "computed": metrics["ponder_computed"],
    }


def prefill(model: PreTrainedModel, ids: Tensor, threshold: float) -> harness.Work:
    """Reading `ids` [B, T] into a cache."""
    return torch.no_grad()(lambda: model(ids, use_cache=True, logits_to_keep=1, halting_threshold=threshold))


def decode(model: PreTrainedModel, ids: Tensor, threshold: float) -> harness.Work:
    """Reading `ids` [B, T] token by token."""

    @torch.no_grad()
    def work() -> None:
        cache = None
        for token in ids.split(1, dim=1):
            cache = model(token, cache=cache, use_cache=True, halting_threshold=threshold).cache

    return work


def measure(
    model: PreTrainedModel, blocks: Tensor, batch: int, args: argparse.Namespace
) -> list[harness.Row]:
    """Rows of prefill and decoding at one batch size: a side for each threshold, the first is the base."""
    ids = blocks[torch.arange(batch) % len(blocks)]
    rows = []
    for use, make, part in (("prefill", prefill, ids), ("decode", decode, ids[:, : args.tokens])):
        sides = {str(threshold): make(model, part, threshold) for threshold in args.thresholds}
        case = {"use": use, "batch": batch, "case": f"{use}, batch {batch}", "tokens": part.numel()}
        rows += harness.measure(case, sides, args, base=str(args.thresholds[0]))
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure as `argv` says (default: the command line)."""
    parser = harness.parser(__doc__)
    harness.add_timing(parser, repeats=5)
    harness.add_plot(parser)
    parser.add_argument("--model", required=True, help="saved model, with its tokenizer")
    parser.add_argument("--text", required=True, help="file to evaluate on")
    parser.add_argument("--range", type=NATURAL, nargs=2, default=None, help="bytes of the file, from and to")
    parser.add_argument(
        "--thresholds", type=THRESHOLD, nargs="+", default=[0.0, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8],
        help="halting thresholds; times refer to the first",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=COUNT, nargs="+", default=[1, 8, 64], help="rows timed together")
    parser.add_argument("--block_size", type=COUNT, default=256, help="tokens T of a block")
    parser.add_argument("--tokens", type=COUNT, default=16, help="tokens decoded in a timed call")
    args = parser.parse_args(argv)
    check_source("model", args.model)
    check_input_file("text", args.text)
    if args.range is not None:
        parse_range("{}:{}".format(*args.range), Path(args.text).stat().st_size, "range")
    blocks, num_bytes = load(args)
    model = load_model("model", args.model, args.device)
    quality = [evaluate(model, blocks, num_bytes, threshold) for threshold in args.thresholds]
    times = [row for batch in args.batch_size for row in measure(model, blocks, batch, args)]
    tables = {
        "Quality over the halting threshold": quality_table(quality),
        f"Time (in brackets: times that at {args.thresholds[0]})": harness.table(
            times, "case", harness.milliseconds
        ),
    }
    rows = [{**row, "use": "evaluation"} for row in quality] + times
    content = harness.report(args, rows, tables)
    if args.plot:
        draw_or_warn(plot, quality, times, args.plot)
    return content


def load(args: argparse.Namespace) -> tuple[Tensor, int]:
    """The text as blocks [rows, T], and how many of its bytes they are."""
    with open(args.text, "rb") as file:
        start, stop = args.range or (0, None)
        file.seek(start)
        text = file.read(None if stop is None else stop - start)
    tokenizer = load_saved_tokenizer("model", args.model)
    ids = torch.from_numpy(encode(text, tokenizer).astype("int64"))
    rows = len(ids) // args.block_size
    if rows == 0:
        raise ValueError(f"`text` must have at least {args.block_size} tokens (`block_size`), got {len(ids)}")
    kept = rows * args.block_size
    return ids[:kept].view(rows, -1).to(args.device), round(len(text) * kept / len(ids))


def quality_table(quality: list[harness.Row]) -> str:
    """Markdown: a line for each threshold."""
    lines = ["| threshold | bits per byte | ponder steps | computed |", "|---|---|---|---|"]
    for row in quality:
        lines.append(
            f"| {row['threshold']} | {row['bits_per_byte']:.3f} | {row['ponder_steps']:.2f} "
            f"| {row['computed']:.0%} |"
        )
    return "\n".join(lines)


def plot(quality: list[harness.Row], times: list[harness.Row], path: str) -> None:
    """Bits per byte over depth, and over the time of each use in units of its time at the first threshold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    bits = {str(row["threshold"]): row["bits_per_byte"] for row in quality}
    left.plot([row["ponder_steps"] for row in quality], list(bits.values()), marker="o", label="expected")
    for row in quality:
        left.annotate(str(row["threshold"]), (row["ponder_steps"], row["bits_per_byte"]))
    left.set(xlabel="mean ponder steps (at each point: the threshold)", ylabel="bits per byte")
    for case in dict.fromkeys(row["case"] for row in times):
        points = [(row["ratio"], bits[row["side"]]) for row in times if row["case"] == case]
        right.plot(*zip(*points, strict=True), marker="o", label=case)
    right.set(xlabel="time, of that at the first threshold")
    right.legend()
    for axis in (left, right):
        axis.grid(True, alpha=0.3)
    save_figure(path, figure)
    pyplot.close(figure)


if __name__ == "__main__":
    run_main(main)
