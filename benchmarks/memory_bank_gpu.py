# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of the Triton kernels, beside flash-linear-attention's and the limits of the GPU.

    pip install "flash-linear-attention>=0.5"
    python -m benchmarks.memory_bank_gpu --json outputs/memory_bank_gpu.json

The peers are `chunk_simple_gla` for one memory and, for several, `chunk_gla` on queries and keys that are
expanded to R*K, which is what R memories with decays of their own are without a kernel for them. Peers have
no normalizer, so they do less. Before anything is timed, all sides' outputs and gradients are compared with
the plain PyTorch chunks in float32. Sides are interleaved, times are medians between CUDA events.

The last columns say what part of the measured rate of a large matrix product, and of a large copy, the FLOPs
and bytes of `work` come to: the larger one is how near the kernels are to what bounds them.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.command_line import COUNT, POSITIVE, Parser, check_output_file, run_main
from experiments.report import commit, machine_line, write_json
from stackformer.memory_bank import banked_linear_attention

try:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla
except ImportError:
    chunk_gla = chunk_simple_gla = None

MAX_DECAY = 0.1
NAMES = ("query", "key", "value", "read", "write", "log_decay")
Side = Callable[..., Tensor]


class Sizes(NamedTuple):
    """The sizes of one comparison."""

    batch: int
    time: int
    heads: int
    head_dim: int
    memories: int


def ours(*inputs: Tensor, chunk_size: int = 64, implementation: str = "triton") -> Tensor:
    """Runs the bank, normalizer and gates included."""
    options = {"chunk_size": chunk_size, "implementation": implementation, "max_decay": MAX_DECAY}
    return banked_linear_attention(*inputs, **options)[0]


def fla_sums(
    query: Tensor, key: Tensor, value: Tensor, read: Tensor, write: Tensor, log_decay: Tensor
) -> Tensor:
    """Runs flash-linear-attention on the same inputs: everything but the normalizer."""
    if read.shape[-1] == 1:
        query, key = query * read.to(query), key * write.to(key)
        return chunk_simple_gla(query, key, value, g=log_decay.squeeze(-1), scale=1.0)[0]
    query = (read.to(query).unsqueeze(-1) * query.unsqueeze(-2)).flatten(-2)
    decay = log_decay.repeat_interleave(key.shape[-1], dim=-1)
    key = (write.to(key).unsqueeze(-1) * key.unsqueeze(-2)).flatten(-2)
    return chunk_gla(query, key, value, g=decay, scale=1.0)[0]


def fla_quotient(*inputs: Tensor) -> Tensor:
    """Runs flash-linear-attention with a normalizer from a second call, to compare results."""
    query, key, value, *gates = inputs
    ones = torch.ones_like(value)
    return fla_sums(*inputs) / (fla_sums(query, key, ones, *gates) + 1e-6)


def make_inputs(sizes: Sizes, dtype: torch.dtype, device: str = "cuda") -> list[Tensor]:
    """Returns random query, key and value in `dtype`, and gates in float32, as a model makes them."""
    shape = sizes.batch, sizes.time, sizes.heads
    query, key = (torch.rand(*shape, sizes.head_dim, device=device, dtype=dtype) + 0.1 for _ in range(2))
    value = torch.randn(*shape, sizes.head_dim, device=device, dtype=dtype)
    read, write = (torch.randn(*shape, sizes.memories, device=device).softmax(-1) for _ in range(2))
    log_decay = -MAX_DECAY * write * torch.rand_like(write)
    return [tensor.requires_grad_() for tensor in (query, key, value, read, write, log_decay)]


def work(sizes: Sizes, chunk_size: int, element_size: int, backward: bool) -> tuple[float, float]:
    """Returns the bytes that must move and the FLOPs of matrix products, forward or forward and backward.

    Counted once each, recomputation aside: inputs, outputs and their gradients; states at boundaries of
    chunks, written and read, in the inputs' precision; half of every square product inside a chunk, since it
    is causal.
    """
    batch, time, heads, head_dim, memories = sizes
    tokens = batch * time * heads
    state = memories * head_dim**2
    gates = 3 * 4 * memories
    features = element_size * head_dim
    states = 2 * element_size * state / chunk_size
    moved = 4 * features + gates + states
    products = chunk_size * (2 * head_dim + memories) + 4 * state
    if backward:
        # Inputs, outputs and their gradient are read, gradients of the inputs written; states both ways.
        moved += 5 * features + gates + 3 * features + gates + 2 * states
        products += chunk_size * (5 * head_dim + 3 * memories) + 10 * state
    return tokens * moved, tokens * products


def milliseconds(call: Callable[[], object]) -> float:
    """Returns the milliseconds of one call, between CUDA events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def peaks(dtype: torch.dtype, repeats: int = 20) -> tuple[float, float]:
    """Measures bytes per second of a large copy, and FLOPs per second of a large matrix product."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    left, right = torch.randn(2, 8192, 8192, device="cuda", dtype=dtype)
    copies, products = [], []
    for _ in range(repeats):
        copies.append(milliseconds(lambda: target.copy_(source)))
        products.append(milliseconds(lambda: left @ right))
    rate = 2e3 * source.numel() / statistics.median(copies)
    return rate, 2e3 * 8192**3 / statistics.median(products)


def errors(side: Side, inputs: list[Tensor], reference: Side) -> dict[str, float]:
    """Returns the errors of output and gradients: norm of the difference by norm of the float32 reference."""
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    output, expected = side(*inputs), reference(*exact)
    gradient = torch.randn_like(expected)
    actual = [output, *torch.autograd.grad(output, inputs, gradient.to(output))]
    wanted = [expected, *torch.autograd.grad(expected, exact, gradient)]
    return {
        name: float((a.detach().float() - w.detach()).norm() / w.detach().norm())
        for name, a, w in zip(("output", *NAMES), actual, wanted, strict=True)
    }


def sides_for(sizes: Sizes, chunk_sizes: list[int]) -> dict[str, Side]:
    """Returns ours with every chunk size, and the peer if it is installed."""
    sides: dict[str, Side] = {f"bank, C={size}": partial(ours, chunk_size=size) for size in chunk_sizes}
    if chunk_gla is not None:
        sides["fla simple_gla" if sizes.memories == 1 else "fla gla, R*K keys"] = fla_sums
    return sides


def check(sizes: Sizes, chunk_sizes: list[int], dtype: torch.dtype, tolerance: float) -> dict[str, float]:
    """Returns the largest error of each side at a short length, and raises if one is above `tolerance`."""
    inputs = make_inputs(sizes._replace(time=min(sizes.time, 1000)), dtype)
    largest = {}
    for name, side in sides_for(sizes, chunk_sizes).items():
        found = errors(
            fla_quotient if side is fla_sums else side, inputs, partial(ours, implementation="chunk")
        )
        if sizes.memories == 1:
            del found["read"]  # rounding errors: one memory's weights cancel but for eps
        largest[name] = max(found.values())
        if not largest[name] < tolerance:
            raise RuntimeError(f"{name} at {sizes} is wrong: relative errors {found}")
    return largest


def measure(sizes: Sizes, args: argparse.Namespace, rates: tuple[float, float]) -> list[dict]:
    """Returns a row for each side: forward, and forward with backward."""
    dtype = getattr(torch, args.dtype)
    inputs = make_inputs(sizes, dtype)
    gradient = torch.randn_like(inputs[2])

    def forward(side: Side) -> None:
        with torch.no_grad():
            side(*inputs)

    def both(side: Side) -> None:
        torch.autograd.grad(side(*inputs), inputs, gradient)

    times: dict[tuple[str, bool], list[float]] = {}
    memory: dict[str, int] = {}
    sides = sides_for(sizes, args.chunk_sizes)
    for name, side in list(sides.items()):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            for _ in range(3):  # the first one compiles, and tunes where a side does
                both(side)
                forward(side)
        except torch.cuda.OutOfMemoryError:
            del sides[name]
            continue
        memory[name] = torch.cuda.max_memory_allocated() - before
    for _ in tqdm(range(args.repeats), desc=str(sizes), leave=False):
        for name, side in sides.items():
            for backward, pass_ in ((False, forward), (True, both)):
                times.setdefault((name, backward), []).append(milliseconds(lambda: pass_(side)))  # noqa: B023
    rows = []
    for (name, backward), values in times.items():
        median = statistics.median(values)
        row = {**sizes._asdict(), "side": name, "pass": "forward + backward" if backward else "forward"}
        row |= {"milliseconds": median, "work_space_bytes": memory[name]}
        if name.startswith("bank"):
            moved, products = work(sizes, int(name.split("=")[1]), inputs[0].element_size(), backward)
            row["bandwidth"] = moved / (median / 1e3) / rates[0]
            row["matrix_rate"] = products / (median / 1e3) / rates[1]
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Returns Markdown; the ratio is to our fastest of the same pass and sizes."""
    lines = ["| T | R | pass | side | ms | ratio | GiB | of matrix rate | of bandwidth |", "|---" * 9 + "|"]
    for row in rows:
        same = [
            other["milliseconds"]
            for other in rows
            if other["side"].startswith("bank")
            and all(other[name] == row[name] for name in ("time", "memories", "pass"))
        ]
        cells = [
            f"{row['time']:,}",
            str(row["memories"]),
            row["pass"],
            row["side"],
            f"{row['milliseconds']:.3f}",
            f"{row['milliseconds'] / min(same):.2f}x",
            f"{row['work_space_bytes'] / 2**30:.2f}",
            *(f"{row[name]:.0%}" if name in row else "-" for name in ("matrix_rate", "bandwidth")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    """Measures as `argv` says (default: the command line) and prints the table."""
    parser = Parser(description=__doc__.split("\n")[0])
    lengths = [2048, 4096, 8192, 16384, 32768, 65536]
    parser.add_argument("--time", type=COUNT, nargs="+", default=lengths, help="lengths T")
    parser.add_argument("--memories", type=COUNT, nargs="+", default=[1, 4, 16], help="memories per head R")
    parser.add_argument(
        "--chunk_sizes", type=COUNT, nargs="+", default=[64, 128, 256], help="our chunk sizes C"
    )
    parser.add_argument("--batch_size", type=COUNT, default=1, help="batch size")
    parser.add_argument("--heads", type=COUNT, default=16, help="heads")
    parser.add_argument("--head_dim", type=COUNT, default=64, help="key and value size")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--tolerance", type=POSITIVE, default=0.03, help="largest relative error that is accepted"
    )
    parser.add_argument("--repeats", type=COUNT, default=20, help="timed passes of each side")
    parser.add_argument("--json", default=None, help="file to write the results to")
    args = parser.parse_args(argv)
    check_output_file("json", args.json)
    if not torch.cuda.is_available():
        parser.error(
            "this benchmark needs a CUDA GPU, and torch finds none; benchmarks.memory_bank runs on a CPU"
        )
    print(machine_line())
    if chunk_gla is None:
        print('Without peers: pip install "flash-linear-attention>=0.5" to compare.')
    dtype = getattr(torch, args.dtype)
    rates = peaks(dtype)
    print(f"measured: copy {rates[0] / 1e9:.0f} GB/s, {args.dtype} product {rates[1] / 1e12:.0f} TFLOP/s\n")
    rows, accuracy = [], {}
    for memories in args.memories:
        sizes = Sizes(args.batch_size, min(args.time), args.heads, args.head_dim, memories)
        accuracy[memories] = check(sizes, args.chunk_sizes, dtype, args.tolerance)
        print(
            f"R={memories}, largest relative errors:", {k: f"{v:.1e}" for k, v in accuracy[memories].items()}
        )
        for time in args.time:
            rows += measure(sizes._replace(time=time), args, rates)
    print(f"\n{args.dtype}, B={args.batch_size} H={args.heads} K=V={args.head_dim}\n\n{table(rows)}")
    if args.json:
        write_json(
            args.json,
            {
                "machine": machine_line(),
                "commit": commit(),
                "arguments": vars(args),
                "bytes_per_second": rates[0],
                "flops_per_second": rates[1],
                "relative_errors": accuracy,
                "rows": rows,
            },
        )
    return rows


if __name__ == "__main__":
    run_main(main)
