# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of the Triton kernels, beside flash-linear-attention's and the limits of the GPU.

    pip install "flash-linear-attention>=0.5"
    python -m benchmarks.memory_bank_gpu --json outputs/memory_bank_gpu.json

Both operators are measured, the memory bank and the banked delta rule ("delta bank"), beside their plain
PyTorch chunks and a peer. The memory bank's peers are `chunk_simple_gla` for one memory and, for several,
`chunk_gla` on queries and keys that are expanded to R*K, which is what R memories with decays of their own
are without a kernel for them. Peers have no normalizer, so they do less. The delta bank's peer is
`chunk_gated_delta_rule`, for one memory and inputs that are not float32. Before anything is timed, all sides'
outputs and gradients are compared with the plain PyTorch chunks in float32. Sides are interleaved, times are
medians between CUDA events.

The last columns say what part of the measured rate of a large matrix product, and of a large copy, the FLOPs
and bytes of `WORK` come to: the larger one is how near the kernels are to what bounds them.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from experiments.command_line import COUNT, POSITIVE, Parser, check_output_file, run_main
from experiments.report import commit, machine_line, write_json
from stackformer.delta_bank import banked_delta_rule
from stackformer.memory_bank import banked_linear_attention

try:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla
except ImportError:
    chunk_gated_delta_rule = chunk_gla = chunk_simple_gla = None

MAX_DECAY = 0.1
# The delta bank takes all of these, the bank all but the last.
NAMES = ("query", "key", "value", "read", "write", "log_decay", "step_size")
MAX_DELTA_CHUNK = 64  # tokens; longer chunks are cut to this
TORCH = "torch chunks"
Side = Callable[..., Tensor]


class Sizes(NamedTuple):
    """The sizes of one comparison."""

    batch: int
    time: int
    heads: int
    head_dim: int
    memories: int


def bank(*inputs: Tensor, chunk_size: int = 64, implementation: str = "triton") -> Tensor:
    """Runs the bank, normalizer and gates included."""
    options = {"chunk_size": chunk_size, "implementation": implementation, "max_decay": MAX_DECAY}
    return banked_linear_attention(*inputs, **options)[0]


def delta_bank(*inputs: Tensor, chunk_size: int = 64, implementation: str = "triton") -> Tensor:
    """Runs the banked delta rule."""
    options = {"chunk_size": chunk_size, "implementation": implementation, "max_decay": MAX_DECAY}
    return banked_delta_rule(*inputs, **options)[0]


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


def fla_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
) -> Tensor:
    """Runs flash-linear-attention's gated delta rule on the same inputs, of one memory."""
    query, key = query * read.to(query), key * write.to(key)
    return chunk_gated_delta_rule(query, key, value, g=log_decay.squeeze(-1), beta=step_size, scale=1.0)[0]


def make_inputs(operator: str, sizes: Sizes, dtype: torch.dtype, device: str = "cuda") -> list[Tensor]:
    """Returns random query, key and value in `dtype`, and gates in float32, as a model makes them."""
    shape = sizes.batch, sizes.time, sizes.heads
    query, key = (torch.rand(*shape, sizes.head_dim, device=device, dtype=dtype) + 0.1 for _ in range(2))
    value = torch.randn(*shape, sizes.head_dim, device=device, dtype=dtype)
    read, write = (torch.randn(*shape, sizes.memories, device=device).softmax(-1) for _ in range(2))
    inputs = [query, key, value, read, write, -MAX_DECAY * write * torch.rand_like(write)]
    if operator == DELTA:
        inputs[:2] = [normalize(torch.randn_like(x).float(), dim=-1).to(dtype) for x in inputs[:2]]
        inputs[4] = write.sqrt()
        inputs.append(2 * torch.rand(shape, device=device))
    return [tensor.requires_grad_() for tensor in inputs]


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


def delta_work(sizes: Sizes, chunk_size: int, element_size: int, backward: bool) -> tuple[float, float]:
    """Returns the same as `work` for the delta bank, whose states and errors are float32.

    Solving a triangular system is counted as one product of half a square with the values.
    """
    batch, time, heads, head_dim, memories = sizes
    tokens = batch * time * heads
    state = memories * head_dim**2
    gates = 3 * 4 * memories + 4
    features = element_size * head_dim
    states, errors = 2 * 4 * state / chunk_size, 4 * head_dim
    moved = 4 * features + gates + errors + states
    products = chunk_size * (4 * head_dim + 2 * memories) + 6 * state
    if backward:
        # Inputs but values, errors and the output's gradient are read, and gradients of the inputs written;
        # states are read, and their gradients written and read.
        moved += 3 * features + gates + errors + 3 * features + gates + 1.5 * states
        products += chunk_size * (8 * head_dim + 4 * memories) + 12 * state
    return tokens * moved, tokens * products


BANK, DELTA = "bank", "delta bank"
OPERATORS = {BANK: bank, DELTA: delta_bank}
WORK = {BANK: work, DELTA: delta_work}


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
        for name, a, w in zip(("output", *NAMES[: len(inputs)]), actual, wanted, strict=True)
    }


def sides_for(operator: str, sizes: Sizes, chunk_sizes: list[int], dtype: torch.dtype) -> dict[str, Side]:
    """Returns ours with every chunk size, PyTorch's chunks, and the peer if it is installed."""
    ours = OPERATORS[operator]
    if operator == DELTA:
        chunk_sizes = sorted({min(size, MAX_DELTA_CHUNK) for size in chunk_sizes})
    sides: dict[str, Side] = {f"{operator}, C={size}": partial(ours, chunk_size=size) for size in chunk_sizes}
    sides[TORCH] = partial(ours, implementation="chunk")
    if operator == BANK and chunk_gla is not None:
        sides["fla simple_gla" if sizes.memories == 1 else "fla gla, R*K keys"] = fla_sums
    if (
        operator == DELTA
        and chunk_gated_delta_rule is not None
        and sizes.memories == 1
        and dtype != torch.float32
    ):
        sides["fla gated_delta_rule"] = fla_delta
    return sides


def check(
    operator: str,
    sizes: Sizes,
    chunk_sizes: list[int],
    dtype: torch.dtype,
    tolerance: float,
    device: str = "cuda",
) -> dict[str, float]:
    """Returns the largest error of each side at a short length, and raises if one is above `tolerance`."""
    inputs = make_inputs(operator, sizes._replace(time=min(sizes.time, 1000)), dtype, device)
    reference = partial(OPERATORS[operator], implementation="chunk")
    largest = {}
    for name, side in sides_for(operator, sizes, chunk_sizes, dtype).items():
        found = errors(fla_quotient if side is fla_sums else side, inputs, reference)
        if operator == BANK and sizes.memories == 1:
            del found["read"]  # rounding errors: one memory's weights cancel but for eps
        largest[name] = max(found.values())
        if not largest[name] < tolerance:
            raise RuntimeError(f"{name} at {sizes} is wrong: relative errors {found}")
    return largest


def measure(operator: str, sizes: Sizes, args: argparse.Namespace, rates: tuple[float, float]) -> list[dict]:
    """Returns a row for each side: forward, and forward with backward."""
    dtype = getattr(torch, args.dtype)
    inputs = make_inputs(operator, sizes, dtype)
    gradient = torch.randn_like(inputs[2])

    def forward(side: Side) -> None:
        with torch.no_grad():
            side(*inputs)

    def both(side: Side) -> None:
        torch.autograd.grad(side(*inputs), inputs, gradient)

    times: dict[tuple[str, bool], list[float]] = {}
    memory: dict[str, int] = {}
    sides = sides_for(operator, sizes, args.chunk_sizes, dtype)
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
        row = {
            "operator": operator,
            **sizes._asdict(),
            "side": name,
            "pass": "forward + backward" if backward else "forward",
        }
        row |= {"milliseconds": median, "work_space_bytes": memory[name]}
        if name.startswith(operator):
            chunk_size = int(name.split("=")[1])
            moved, products = WORK[operator](sizes, chunk_size, inputs[0].element_size(), backward)
            row["bandwidth"] = moved / (median / 1e3) / rates[0]
            row["matrix_rate"] = products / (median / 1e3) / rates[1]
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Returns Markdown; the ratio is to our fastest kernels for the same operator, pass and sizes."""
    lines = [
        "| operator | T | R | pass | side | ms | ratio | GiB | of matrix rate | of bandwidth |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        same = [
            other["milliseconds"]
            for other in rows
            if other["side"].startswith(row["operator"])
            and all(other[name] == row[name] for name in ("operator", "time", "memories", "pass"))
        ]
        cells = [
            row["operator"],
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
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=list(OPERATORS))
    lengths = [2048, 4096, 8192, 16384, 32768, 65536]
    parser.add_argument("--time", type=COUNT, nargs="+", default=lengths, help="lengths T")
    parser.add_argument("--memories", type=COUNT, nargs="+", default=[1, 4, 16], help="memories per head R")
    parser.add_argument(
        "--chunk_sizes",
        type=COUNT,
        nargs="+",
        default=[64, 128, 256],
        help="our chunk sizes C; the delta bank takes 64 at most",
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
    rows = []
    accuracy: dict[str, dict[int, dict[str, float]]] = {operator: {} for operator in args.operators}
    for operator, memories in itertools.product(args.operators, args.memories):
        sizes = Sizes(args.batch_size, min(args.time), args.heads, args.head_dim, memories)
        found = check(operator, sizes, args.chunk_sizes, dtype, args.tolerance)
        accuracy[operator][memories] = found
        print(f"R={memories}, largest relative errors:", {k: f"{v:.1e}" for k, v in found.items()})
        for time in args.time:
            rows += measure(operator, sizes._replace(time=time), args, rates)
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
