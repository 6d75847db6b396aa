# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The cost of backpropagation through long contexts: memory, time, bytes kept, and the error of reversal.

    python -m benchmarks.long_context --json outputs/long_context.json --plot outputs/long_context.png
    python -m benchmarks.long_context --lengths 4096 16384 --decays 0 0.001 0.01    # small

Three questions, on random tokens and a new model whose weights are moved (in a new one core layers do not yet
influence each other, which would hide errors):

- memory and tokens per second of each side against length: one forward and backward pass ("plain"), the same
  with gradient checkpointing, and chunks whose states are stored or reversed. Each measurement is a process
  of its own; memory is its peak above what model and libraries take (on a GPU: what was allocated), the
  tokens included.
- bytes kept per token, and memories copied, against the largest decay per token.
- drift and error of the gradients of "reverse" against length and decay: those of "stored" are exact.

A side that needs more than `--max_gib` is left out at longer contexts.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

import stackformer  # noqa: F401  (registers the model)
from experiments.command_line import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Parser,
    check_output_file,
    check_picture_file,
    run_main,
)
from experiments.presets import read_preset
from experiments.report import commit, draw_or_warn, machine_line, save_figure, write_json
from stackformer.training.long_context import DriftError, long_context_backward

SIDES = ("plain", "checkpointing", "stored", "reverse")
MIB = 2**20


def build_model(args: argparse.Namespace, **fields: Any) -> PreTrainedModel:
    """A new model, its weights moved by noise, on the device that is there."""
    torch.manual_seed(0)
    config = read_preset(args.config, args.config_overrides)
    for name, value in fields.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += args.noise * torch.randn_like(parameter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def random_tokens(args: argparse.Namespace, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (args.batch_size, length), generator=torch.Generator().manual_seed(1))


def peak_memory() -> int:
    """Bytes: allocated on the GPU at most, or resident at most where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def backward(model: PreTrainedModel, ids: torch.Tensor, side: str, args: argparse.Namespace) -> dict:
    """One forward and backward pass; what was kept, if the side tells."""
    if side in ("plain", "checkpointing"):
        if side == "checkpointing":
            model.gradient_checkpointing_enable()
        ids = ids.to(model.device)
        model(ids, labels=ids).loss.backward()
        return {}
    output = long_context_backward(
        model, ids, labels=ids, chunk_size=args.chunk_size, method=side, max_log_decay=args.max_log_decay,
        storage=args.storage,
    )  # fmt: skip
    return {"drift": output.drift, "anchors": output.num_anchors, "kept_bytes": output.kept_bytes}


def measure(side: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Memory of passes, and time of one (after a short one to warm up), in a process of its own."""
    torch.set_num_threads(args.threads)
    model = build_model(args)
    before = peak_memory()
    backward(model, random_tokens(args, 2 * args.chunk_size), side, args)
    model.zero_grad(set_to_none=False)
    ids = random_tokens(args, length)
    started = time.perf_counter()
    result = backward(model, ids, side, args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = peak_memory()
    return result | {
        "bytes": peak - before, "peak_bytes": peak, "tokens_per_second": ids.numel() / seconds
    }  # fmt: skip


def alone(function: Any, *arguments: Any) -> Any:
    """Call in a new process; None if it did not survive (no memory)."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (BrokenProcessPool, torch.OutOfMemoryError, MemoryError):
            return None


def measure_lengths(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each length and side, until a side needs too much."""
    rows: list[dict[str, Any]] = []
    left_out: set[str] = set()
    for length in args.lengths:
        for side in tqdm(SIDES, desc=f"{length} tokens", leave=False):
            if side in left_out:
                continue
            result = alone(measure, side, length, args)
            # What a pass takes grows with its length at most in proportion.
            if result is None or 4 * result["bytes"] > args.max_gib * 2**30:
                left_out.add(side)
            rows.append({"side": side, "length": length} | (result or {}))
    return rows


def measure_decays(args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each decay and length: what "reverse" keeps beside "stored", its drift, its gradients' error."""
    rows = []
    for decay in tqdm(args.decays, desc="decays", leave=False):
        for length in args.drift_lengths:
            ids, gradients, kept = random_tokens(args, length), [], []
            row: dict[str, Any] = {"max_decay_rate": decay, "length": length}
            try:
                for side in ("stored", "reverse"):
                    model = build_model(args, max_decay_rate=decay)
                    output = backward(model, ids, side, args)
                    gradients.append(torch.cat([x.grad.flatten() for x in model.parameters()]))
                    kept.append(output["kept_bytes"] / ids.numel())
            except DriftError as error:
                rows.append(row | {"error": str(error)})
                continue
            exact, reversed_ = gradients
            rows.append(
                row
                | {"stored_bytes_per_token": kept[0], "reverse_bytes_per_token": kept[1]}
                | {"anchors": output["anchors"], "drift": output["drift"]}
                | {"gradient_error": float((reversed_ - exact).norm() / exact.norm())}
            )
    return rows


def print_tables(lengths: list[dict[str, Any]], decays: list[dict[str, Any]]) -> None:
    print("| tokens | " + " | ".join(SIDES) + " |\n" + "|---" * (len(SIDES) + 1) + "|")
    for length in dict.fromkeys(row["length"] for row in lengths):
        cells = {row["side"]: row for row in lengths if row["length"] == length}
        texts = [_cell(cells.get(side)) for side in SIDES]
        print(f"| {length:,} | " + " | ".join(texts) + " |")
    print("\nBytes kept per token, memories copied, drift, and relative error of the gradients:\n")
    print("| max_decay_rate | tokens | reverse, stored | copied | drift | gradients |")
    print("|---|---|---|---|---|---|")
    for row in decays:
        if "error" in row:
            print(f"| {row['max_decay_rate']:g} | {row['length']:,} | {row['error']} |")
            continue
        print(
            f"| {row['max_decay_rate']:g} | {row['length']:,} | {row['reverse_bytes_per_token']:,.0f}, "
            f"{row['stored_bytes_per_token']:,.0f} | {row['anchors']:,} | {row['drift']:.1e} | "
            f"{row['gradient_error']:.1e} |"
        )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "bytes" not in row:
        return "-"
    return f"{row['bytes'] / MIB:,.0f} MiB, {row['tokens_per_second']:,.0f}/s"


def plot(lengths: list[dict[str, Any]], path: str) -> None:
    """Memory and speed against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, name, scale in zip(axes, ("bytes", "tokens_per_second"), (MIB, 1), strict=True):
        for side in SIDES:
            rows = [row for row in lengths if row["side"] == side and name in row]
            axis.plot([row["length"] for row in rows], [row[name] / scale for row in rows], "o-", label=side)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=name.replace("bytes", "MiB"))
    axes[0].legend()
    save_figure(path, figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure as `argv` says (default: the command line)."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/long-tiny.json", help="preset of the model")
    parser.add_argument("--config_overrides", default=None, help="fields other than the preset's, name=value")
    lengths = [4096, 16384, 65536, 262144, 1048576]
    parser.add_argument("--lengths", type=COUNT, nargs="+", default=lengths, help="tokens of a context")
    parser.add_argument(
        "--decays", type=NOT_NEGATIVE, nargs="*", default=[0, 1e-4, 1e-3, 1e-2, 1], help="max_decay_rate"
    )
    parser.add_argument(
        "--drift_lengths", type=COUNT, nargs="+", default=[16384, 65536, 262144], help="tokens for --decays"
    )
    parser.add_argument("--batch_size", type=COUNT, default=1, help="rows")
    parser.add_argument("--chunk_size", type=COUNT, default=1024, help="tokens run at once")
    parser.add_argument("--max_log_decay", type=NOT_NEGATIVE, default=6.0, help="nats undone at most")
    parser.add_argument("--storage", default="device", help="where states are kept: device, cpu or a folder")
    parser.add_argument(
        "--noise", type=NOT_NEGATIVE, default=0.05, help="standard deviation added to the weights"
    )
    parser.add_argument("--max_gib", type=POSITIVE, default=8.0, help="memory that a side may take")
    parser.add_argument("--threads", type=COUNT, default=1, help="threads of torch")
    parser.add_argument("--json", default=None, help="file to write the results to")
    parser.add_argument("--plot", default=None, help="picture to write")
    args = parser.parse_args(argv)
    check_output_file("json", args.json)
    check_picture_file("plot", args.plot)
    if args.storage not in ("device", "cpu") and not Path(args.storage).is_dir():
        raise ValueError(f"storage={args.storage!r}: expected device, cpu or a folder that is there.")
    read_preset(args.config, args.config_overrides)
    torch.set_num_threads(args.threads)
    results = {"machine": machine_line(), "commit": commit(), "arguments": vars(args)}
    results |= {"lengths": measure_lengths(args), "decays": measure_decays(args)}
    print(results["machine"])
    print_tables(results["lengths"], results["decays"])
    if args.json:
        write_json(args.json, results)
    if args.plot:
        draw_or_warn(plot, results["lengths"], args.plot)
    return results


if __name__ == "__main__":
    run_main(main)
