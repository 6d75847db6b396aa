# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of the banked delta rule over the length, beside the memory bank and Qwen3-Next's.

    python -m benchmarks.delta_bank --json outputs/delta_bank.json

The sides, which take turns, are:
- the memory bank, with read and write weights, decay and normalizer
- the banked delta rule, with the same but a normalizer, in C++ where it was built, and in torch
- for one memory, `torch_chunk_gated_delta_rule` of transformers' Qwen3-Next, which users without a GPU get.
  It is the delta rule with a decay, and has no read and write weights.
They are the operators alone: queries and keys are ready, positive for the memory bank, and of length 1 for
the delta rules. All have the gradients of all their inputs. Before anything is timed, our delta rule is
compared to the recurrence that defines it, and for one memory to Qwen3-Next's.

Models with the two mixers, with the same number of parameters:

    python -m benchmarks.training --models "plain core, 4 banks" "plain core, 4 delta banks"
    python -m benchmarks.decode --models "plain core, 4 banks" "plain core, 4 delta banks"
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from benchmarks import harness
from benchmarks.memory_bank import MAX_DECAY, gates
from experiments.command_line import run_main
from stackformer.delta_bank import banked_delta_rule
from stackformer.library import is_available
from stackformer.memory_bank import banked_linear_attention

OURS = {"cpp": "C++", "chunk": "torch"} if is_available() else {"chunk": "torch"}
QWEN3_NEXT = "Qwen3-Next torch"
Operator = Callable[..., Tensor]


def bank_name(implementation: str) -> str:
    """Returns the name of the memory bank's side."""
    return f"bank {OURS[implementation]}"


def delta_name(implementation: str) -> str:
    """Returns the name of the banked delta rule's side."""
    return f"delta bank {OURS[implementation]}"


def bank(implementation: str, query, key, value, read, write, log_decay) -> Tensor:
    """Runs the memory bank."""
    options = {"max_decay": MAX_DECAY, "implementation": implementation}
    return banked_linear_attention(query, key, value, read, write, log_decay, **options)[0]


def delta_bank(implementation: str, query, key, value, read, write, log_decay, step_size) -> Tensor:
    """Runs the banked delta rule."""
    options = {"max_decay": MAX_DECAY, "implementation": implementation}
    return banked_delta_rule(query, key, value, read, write, log_decay, step_size, **options)[0]


def qwen3_next(query, key, value, log_decay, step_size) -> Tensor:
    """Runs the peer. It divides queries by the root of their size."""
    return torch_chunk_gated_delta_rule(query, key, value, log_decay.squeeze(-1), step_size)[0]


def delta_inputs(tokens: tuple[int, ...], head_dim: int, memories: int, device: str = "cpu") -> list[Tensor]:
    """Returns query to step size as the model makes them: queries, keys and write weights of length 1."""
    query, key, value = torch.randn(3, *tokens, head_dim, device=device)
    query, key = (functional.normalize(x, dim=-1) for x in (query, key))
    read, write, log_decay = gates(tokens, memories, device)
    return [query, key, value, read, write.sqrt(), log_decay, 2 * torch.rand(tokens, device=device)]


def bank_inputs(inputs: list[Tensor]) -> list[Tensor]:
    """Returns the memory bank's inputs for those of the delta rule: positive, with shares to write with."""
    query, key, value, read, write, log_decay, _ = inputs
    return [functional.elu(query) + 1, functional.elu(key) + 1, value, read, write.square(), log_decay]


def peer_inputs(inputs: list[Tensor]) -> list[Tensor]:
    """Returns the inputs of `qwen3_next` among those of the banked delta rule with one memory."""
    return [*inputs[:3], *inputs[5:]]


def with_gradients(operator: Operator, inputs: list[Tensor]) -> list[Tensor]:
    """Returns the output and the gradients of all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = operator(*inputs)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Raises an error unless all tensors are close, relative to the largest element of each."""
    for a, b in zip(actual, expected, strict=True):
        atol = tolerance * max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol)


def check(head_dim: int, memories: list[int]) -> None:
    """Raises an error unless outputs and gradients are the recurrence's, Qwen3-Next's for one memory."""
    torch.manual_seed(0)
    for count in memories:
        inputs = [x.double() for x in delta_inputs((1, 150, 2), head_dim, count)]
        expected = with_gradients(partial(delta_bank, "recurrent"), inputs)
        for implementation in OURS:
            assert_close(with_gradients(partial(delta_bank, implementation), inputs), expected, 1e-7)
    inputs = [x.float() for x in delta_inputs((1, 150, 2), head_dim, 1)]
    expected = with_gradients(partial(delta_bank, "recurrent"), inputs)
    actual = with_gradients(lambda *x: head_dim**0.5 * qwen3_next(*x), peer_inputs(inputs))
    assert_close(actual, [expected[0], *peer_inputs(expected[1:])], 1e-4)


def measure(
    head_dim: int, mode: str, length: int, memories: int, args: argparse.Namespace
) -> list[harness.Row]:
    """Measures one case and returns its rows. Ratios are relative to the memory bank."""
    torch.manual_seed(0)
    inputs = delta_inputs((args.batch_size, length, args.heads), head_dim, memories, args.device)
    base, *_ = args.implementations
    sides: dict[str, tuple[Operator, list[Tensor]]] = {
        bank_name(base): (partial(bank, base), bank_inputs(inputs))
    }
    for implementation in args.implementations:
        sides[delta_name(implementation)] = (partial(delta_bank, implementation), inputs)
    if memories == 1:
        sides[QWEN3_NEXT] = (qwen3_next, peer_inputs(inputs))
    calls = {name: harness.operator_call(*side, mode) for name, side in sides.items()}
    case = {"mode": mode, "threads": torch.get_num_threads(), "K=V": head_dim, "R": memories, "T": length}
    return harness.measure(case, calls, args, base=bank_name(base), memory=True)


def ratios(rows: list[harness.Row], ours: str, reference: str) -> list[harness.Row]:
    """Returns rows with the quotients of time: delta bank by bank, and Qwen3-Next's by delta bank.

    Args:
        ours: the side of the delta bank.
        reference: the side of the memory bank.
    """
    result = []
    for upper, lower in ((ours, reference), (QWEN3_NEXT, ours)):
        for memories in dict.fromkeys(row["R"] for row in rows):
            chosen = [row for row in rows if row["R"] == memories]
            seconds = {(row["T"], row["side"]): row["seconds"] for row in chosen}
            side = f"{upper} / {lower}, R={memories}"
            for length in dict.fromkeys(row["T"] for row in chosen):
                if (length, upper) in seconds:
                    quotient = seconds[length, upper] / seconds[length, lower]
                    result.append({"T": length, "side": side, "quotient": quotient})
    return result


def tables(rows: list[harness.Row], ours: str, reference: str) -> dict[str, str]:
    """Returns tables of time, memory and ratios, by mode, threads and head size."""
    result = {}
    for mode, threads, size in dict.fromkeys((r["mode"], r["threads"], r["K=V"]) for r in rows):
        chosen = [r for r in rows if (r["mode"], r["threads"], r["K=V"]) == (mode, threads, size)]
        title = f"{mode}, {threads} thread{'s' * (threads > 1)}, K=V={size}"
        for memories in dict.fromkeys(row["R"] for row in chosen):
            same = [row for row in chosen if row["R"] == memories]
            result[f"Time, {title}, R={memories}"] = harness.table(same, "T", harness.milliseconds)
            result[f"Peak memory, {title}, R={memories}"] = harness.table(
                same, "T", lambda row: harness.size(row["peak_bytes"])
            )
        result[f"Ratios of time, {title} (goals: at most 1.5 to the bank, Qwen3-Next at least 3)"] = (
            harness.table(ratios(chosen, ours, reference), "T", lambda row: f"{row['quotient']:.2f}")
        )
    return result


def main(argv: list[str] | None = None) -> dict:
    """Measures as `argv` says (default: the command line)."""
    parser = harness.parser(__doc__)
    harness.add_timing(parser, repeats=15)
    harness.add_operator(parser, time=[1024, 4096, 16384], memories=[1, 4, 12])
    parser.add_argument("--implementations", nargs="+", default=list(OURS), choices=list(OURS))
    args = parser.parse_args(argv)
    for head_dim in args.head_dim:
        check(head_dim, args.memories)
    rows = [
        row
        for case in harness.operator_cases(args)
        for memories in args.memories
        for row in measure(*case, memories, args)
    ]
    base, *_ = args.implementations
    print(f"B={args.batch_size}, H={args.heads}; in brackets: time relative to {bank_name(base)}")
    return harness.report(args, rows, tables(rows, delta_name(base), bank_name(base)))


if __name__ == "__main__":
    run_main(main)
