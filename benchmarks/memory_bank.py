# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Time of the memory bank, forward and backward, beside what a user would take instead, on the same work.

    python -m benchmarks.memory_bank --time 1024 4096 16384 --json outputs/memory_bank.json

Sides are interleaved in one run and medians reported, with ratios to ours with one memory; the peers are
PyTorch's scaled_dot_product_attention (quadratic) and, where installed, the C++ kernel of
pytorch-fast-transformers with its normalizer. Before anything is timed, results are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from scripts.report import machine_line, write_json
from stackformer.memory_bank import banked_linear_attention

try:
    from fast_transformers.attention import CausalLinearAttention
    from fast_transformers.masking import LengthMask, TriangularCausalMask
except ImportError:
    CausalLinearAttention = None

Side = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def bank(memories: int) -> Side:
    """Ours, complete: feature map, gates, normalizer; decay for several memories only, as peers have none."""

    def attend(query, key, value):
        gates = query.new_full((*query.shape[:3], memories), 1 / memories)
        decay = torch.zeros_like(gates) if memories == 1 else -0.1 * gates
        query, key = (torch.nn.functional.elu(x) + 1 for x in (query, key))
        return banked_linear_attention(query, key, value, gates, gates, decay, max_decay=0.1)[0]

    return attend


def softmax_attention(query, key, value):
    """The quadratic peer."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def fast_transformers(query, key, value):
    """The linear peer."""
    batch, length = query.shape[:2]
    lengths = LengthMask(torch.full((batch,), length))
    return CausalLinearAttention(query.shape[-1])(
        query, key, value, TriangularCausalMask(length), lengths, lengths
    )


def seconds(side: Side, inputs: list[torch.Tensor], gradient: torch.Tensor) -> float:
    """One forward and backward pass."""
    started = time.perf_counter()
    torch.autograd.grad(side(*inputs), inputs, gradient)
    return time.perf_counter() - started


def measure(length: int, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of every side at one length."""
    shape = (args.batch_size, length, args.heads, args.head_dim)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(shape)
    sides: dict[str, Side] = {f"bank, R={memories}": bank(memories) for memories in args.memories}
    if CausalLinearAttention is not None:
        sides["fast-transformers"] = fast_transformers
        torch.testing.assert_close(bank(1)(*inputs), fast_transformers(*inputs), rtol=1e-3, atol=1e-4)
    if length <= args.max_quadratic:
        sides["softmax (SDPA)"] = softmax_attention
    for side in sides.values():
        seconds(side, inputs, gradient)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in tqdm(range(args.repeats), desc=f"T={length}", leave=False):
        for name, side in sides.items():
            times[name].append(seconds(side, inputs, gradient))
    return {name: statistics.median(values) for name, values in times.items()}


def table(results: dict[int, dict[str, float]]) -> str:
    """Markdown: milliseconds, and the ratio to ours with one memory."""
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    lines = ["| T | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for length, row in results.items():
        base = row.get("bank, R=1", next(iter(row.values())))
        cells = [f"{1e3 * row[n]:.1f} ms ({row[n] / base:.1f}x)" if n in row else "-" for n in names]
        lines.append(f"| {length:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[int, dict[str, float]]:
    """Measure as `argv` says (default: the command line) and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--time", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="lengths T")
    parser.add_argument("--memories", type=int, nargs="+", default=[1, 4, 16], help="memories per head R")
    parser.add_argument("--batch_size", type=int, default=1, help="batch size")
    parser.add_argument("--heads", type=int, default=4, help="heads")
    parser.add_argument("--head_dim", type=int, default=64, help="key and value size")
    parser.add_argument("--max_quadratic", type=int, default=4096, help="longest T for softmax attention")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each side")
    parser.add_argument("--threads", type=int, default=None, help="threads; torch's default if not given")
    parser.add_argument("--json", default=None, help="file to write the results to")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine_line())
    results = {length: measure(length, args) for length in args.time}
    print(f"forward and backward, B={args.batch_size} H={args.heads} K=V={args.head_dim}\n")
    print(table(results))
    if args.json:
        write_json(args.json, {"machine": machine_line(), "arguments": vars(args), "seconds": results})
    return results


if __name__ == "__main__":
    main()
