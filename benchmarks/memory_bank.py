# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of the memory bank over the length, beside its alternatives.

    python -m benchmarks.memory_bank --time 256 1024 4096 16384 --head_dim 64 --threads 1 2 \
        --json outputs/memory_bank.json --plot outputs/memory_bank.png

Ours, in C++ where it was built and in torch, is complete: feature map, read and write weights, decay,
normalizer; gradients of all inputs. In C++ it is measured in bfloat16, too. The peers, in float32, have no
gates: the C++ kernel of pytorch-fast-transformers alone (no feature map, no normalizer), its
`CausalLinearAttention` (both), and PyTorch's scaled_dot_product_attention, which is quadratic. Before
anything is timed, ours is compared to the recurrence that defines it and to fast-transformers.

The machine's own speed is measured in the same rounds, with one large matrix product and with many of 64 x
64. What a side reaches of the large one is counted with the operations that any implementation needs:
    linear attention, per token and head:  4 R K (V + 1)    a multiplication and an addition for writing each
                                                            element of the state (normalizer included), and
                                                            for reading it; none for decay
    softmax attention, per token and head: T (K + V)        two products over half of T on average
and three times that with the backward pass. What is computed on top (attention inside a chunk, or twice in
the backward pass) does not count.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import harness
from experiments.command_line import NATURAL, run_main
from experiments.report import draw_or_warn
from stackformer.library import is_available
from stackformer.memory_bank import banked_linear_attention

try:
    from fast_transformers.attention import CausalLinearAttention
    from fast_transformers.causal_product import causal_dot_product
    from fast_transformers.masking import LengthMask, TriangularCausalMask
except ImportError:
    CausalLinearAttention = None

MAX_DECAY = 0.1
KERNEL, LINEAR, SOFTMAX = "fast-transformers kernel", "fast-transformers", "softmax (SDPA)"
Attention = Callable[..., Tensor]


# Our implementations; the C++ one where it was built, with queries, keys and values in float32 or bfloat16.
OURS = {"chunk": "bank torch"}
LOW = "cpp in bfloat16"
if is_available():
    OURS = {"cpp": "bank C++", LOW: "bank C++, bfloat16"} | OURS


def name_of(implementation: str, memories: int) -> str:
    """Returns the name of our side with so many memories per head."""
    return f"{OURS[implementation]}, R={memories}"


def bank(implementation: str, query, key, value, read, write, log_decay) -> Tensor:
    """Runs our operator, with its feature map."""
    query, key = functional.elu(query) + 1, functional.elu(key) + 1
    options = {"max_decay": MAX_DECAY, "implementation": implementation.split()[0]}
    return banked_linear_attention(query, key, value, read, write, log_decay, **options)[0]


def tokens_for(implementation: str, inputs: list[Tensor]) -> list[Tensor]:
    """Returns query, key and value in the dtype of the implementation, and the others as they are."""
    return [x.bfloat16() for x in inputs[:3]] + inputs[3:] if implementation == LOW else inputs


def softmax_attention(query, key, value) -> Tensor:
    """Runs the quadratic peer."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def linear_attention(query, key, value) -> Tensor:
    """Runs the linear peer, with its feature map and normalizer."""
    batch, length = query.shape[:2]
    lengths = LengthMask(torch.full((batch,), length))
    attention = CausalLinearAttention(query.shape[-1])
    return attention(query, key, value, TriangularCausalMask(length), lengths, lengths)


def gates(tokens: tuple[int, ...], memories: int, device: str = "cpu") -> list[Tensor]:
    """Returns read weights, write weights and log decay [B, T, H, R], made as the model makes them."""
    read, write, decay = torch.randn(3, *tokens, memories, device=device)
    write = write.softmax(-1)
    return [read.softmax(-1), write, -MAX_DECAY * write * decay.sigmoid()]


def check(head_dim: int, memories: list[int]) -> None:
    """Raises an error unless ours equals the recurrence, gradients too, and without gates the linear peer."""
    torch.manual_seed(0)
    tokens = (1, 150, 2)
    for count in memories:
        inputs = [*torch.randn(3, *tokens, head_dim).double(), *(x.double() for x in gates(tokens, count))]
        results = {}
        for implementation in ("recurrent", *OURS):
            taken = inputs if implementation != LOW else [x.float() for x in inputs]
            taken = [x.detach().requires_grad_() for x in tokens_for(implementation, taken)]
            output = bank(implementation, *taken)
            results[implementation] = [output, *torch.autograd.grad(output.square().sum(), taken)]
        for implementation in OURS:
            # In bfloat16 the output and the gradients of query, key and value: those of gates may cancel.
            compared, tolerance = (4, 0.05) if implementation == LOW else (None, 1e-7)
            for actual, expected in zip(
                results[implementation][:compared], results["recurrent"], strict=False
            ):
                atol = tolerance * max(1.0, float(expected.detach().abs().max()))
                torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)
    if CausalLinearAttention is not None:
        inputs = list(torch.randn(3, *tokens, head_dim))
        one = torch.ones(*tokens, 1)
        for implementation in OURS:
            output = bank(implementation, *tokens_for(implementation, inputs), one, one, 0 * one)
            tolerance = 0.05 if implementation == LOW else 1e-4
            expected = linear_attention(*inputs)
            torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


def flops(length: int, head_dim: int, memories: int | None) -> int:
    """Returns the operations per token and head of a forward pass, of softmax attention for `None`."""
    return 2 * length * head_dim if memories is None else 4 * memories * head_dim * (head_dim + 1)


def sides(length: int, head_dim: int, args: argparse.Namespace) -> dict[str, tuple[Attention, list, int]]:
    """Returns each side's function, its inputs and its operations per token and head."""
    torch.manual_seed(0)
    tokens = (args.batch_size, length, args.heads)
    inputs = list(torch.randn(3, *tokens, head_dim, device=args.device))
    result: dict[str, tuple[Attention, list, int]] = {}
    for count in args.memories:
        full = inputs + gates(tokens, count, args.device)
        for implementation in args.implementations:
            taken = tokens_for(implementation, full)
            side = (partial(bank, implementation), taken, flops(length, head_dim, count))
            result[name_of(implementation, count)] = side
    if CausalLinearAttention is not None:
        rows = [x.transpose(1, 2).contiguous() for x in inputs]
        result[KERNEL] = (causal_dot_product, rows, flops(length, head_dim, 1))
        result[LINEAR] = (linear_attention, inputs, flops(length, head_dim, 1))
    if length <= args.max_quadratic:
        result[SOFTMAX] = (softmax_attention, inputs, flops(length, head_dim, None))
    return result


def measure(head_dim: int, mode: str, length: int, args: argparse.Namespace) -> list[harness.Row]:
    """Measures one case and returns its rows."""
    every = sides(length, head_dim, args)
    calls = {name: harness.operator_call(*side[:2], mode) for name, side in every.items()}
    calls |= harness.machine_sides(args.device)
    tokens = args.batch_size * length * args.heads * (3 if mode == harness.BACKWARD else 1)
    counted = {name: tokens * side[2] for name, side in every.items()} | harness.MACHINE_FLOPS
    case = {"mode": mode, "threads": torch.get_num_threads(), "K=V": head_dim, "T": length}
    base = name_of(args.implementations[0], args.memories[0])
    rows = harness.measure(case, calls, args, base=base, memory=True, flops=counted)
    for row in rows:
        row["gflops"] = row["flops"] / row["seconds"] / 1e9
    speed = next(row["gflops"] for row in rows if row["side"] == harness.LARGE_PRODUCT)
    for row in rows:
        row["fraction_of_machine"] = row["gflops"] / speed
    return rows


def tables(rows: list[harness.Row]) -> dict[str, str]:
    """Returns tables of time, memory and share of the machine's speed, by mode, threads and head size."""
    result = {}
    for mode, threads, size in dict.fromkeys((r["mode"], r["threads"], r["K=V"]) for r in rows):
        chosen = [r for r in rows if (r["mode"], r["threads"], r["K=V"]) == (mode, threads, size)]
        compared = [row for row in chosen if row["side"] not in harness.MACHINE]
        title = f"{mode}, {threads} thread{'s' * (threads > 1)}, K=V={size}"
        result[f"Time, {title}"] = harness.table(compared, "T", harness.milliseconds)
        result[f"Peak memory, {title}"] = harness.table(
            compared, "T", lambda row: harness.size(row["peak_bytes"])
        )
        result[f"GFLOP/s, and per cent of the large product, {title}"] = harness.table(
            chosen, "T", lambda row: f"{row['gflops']:.1f} ({100 * row['fraction_of_machine']:.0f}%)"
        )
    return result


def plot(rows: list[harness.Row], path: str) -> None:
    """Draws time over length."""
    rows = [row for row in rows if row["side"] not in harness.MACHINE]
    panels: dict[str, list] = {}
    for row in rows:
        title = f"{row['mode']}, threads: {row['threads']}, K=V={row['K=V']}"
        panels.setdefault(title, []).append(row)
    harness.plot_lines(path, panels, "T", lambda row: 1e3 * row["seconds"], "length T", "milliseconds")


def main(argv: list[str] | None = None) -> dict:
    """Measures as `argv` says (default: the command line)."""
    parser = harness.parser(__doc__)
    harness.add_timing(parser, repeats=15)
    harness.add_plot(parser)
    harness.add_operator(parser, time=[256, 1024, 4096, 16384, 65536], memories=[1, 4, 16])
    parser.add_argument("--implementations", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--max_quadratic", type=NATURAL, default=8192, help="longest T for softmax attention")
    args = parser.parse_args(argv)
    if CausalLinearAttention is None:
        print("pytorch-fast-transformers is not installed: not measured")
    for head_dim in args.head_dim:
        check(head_dim, args.memories)
    rows = [row for case in harness.operator_cases(args) for row in measure(*case, args)]
    print(f"B={args.batch_size}, H={args.heads}; ratios: time relative to {rows[0]['side']}")
    content = harness.report(args, rows, tables(rows))
    if args.plot:
        draw_or_warn(plot, rows, args.plot)
    return content


if __name__ == "__main__":
    run_main(main)
