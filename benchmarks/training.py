# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Training speed and memory over the context, at fixed tokens per step, beside transformers' models.

    python -m benchmarks.training --time 512 2048 8192 --tokens_per_step 8192 --json outputs/training.json

A step is forward, backward and AdamW on the same random bytes for every model; all have the same number of
parameters within 2%, one dtype, and the same threads. Llama attends with scaled_dot_product_attention;
Mamba-2, qwen3_next and RWKV run what transformers has without CUDA kernels, as a user without an accelerator
gets. A new stack starts by pondering at full depth, so nothing halts. Peak memory is what a step needs
besides parameters and the optimizer's state. Before anything is timed, two steps must lower the loss.
"""

import torch
from transformers import PreTrainedModel

from benchmarks import harness, models
from experiments.command_line import COUNT, NATURAL, run_main
from experiments.rows import BANKS, LLAMA, MAMBA2, PLAIN, QWEN3_NEXT, RWKV, STACK


def training_step(
    model: PreTrainedModel, ids: torch.Tensor, learning_rate: float = 1e-3, dtype: str = "float32"
) -> harness.Work:
    """One step of AdamW on the batch `ids`, in float32 or under autocast; it returns the loss before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    def step() -> torch.Tensor:
        with torch.autocast(ids.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def check(built: dict[str, PreTrainedModel], dtype: str) -> None:
    """Raise an error unless two steps lower every model's loss on the batch they are made on."""
    for name, model in built.items():
        step = training_step(model, models.random_ids(2, 64, model.device), dtype=dtype)
        losses = [float(step()) for _ in range(3)]
        if not losses[0] > losses[2]:
            raise RuntimeError(f"{name} does not learn: losses {losses}")


def measure(length: int, built: dict[str, PreTrainedModel], args) -> list[harness.Row]:
    """The rows of one context length."""
    ids = models.random_ids(max(1, args.tokens_per_step // length), length, args.device)
    sides = {
        name: training_step(model, ids, dtype=args.dtype)
        for name, model in built.items()
        if name != RWKV or length <= args.max_rwkv
    }
    return harness.measure(
        {"T": length, "tokens": ids.numel()}, sides, args, base=args.models[0], memory=True
    )


def main(argv: list[str] | None = None) -> dict:
    """Measure as `argv` says (default: the command line)."""
    parser = harness.parser(__doc__)
    harness.add_timing(parser, repeats=5)
    harness.add_plot(parser)
    models.add_arguments(parser, (PLAIN, BANKS, STACK, LLAMA, MAMBA2, QWEN3_NEXT))
    parser.add_argument("--time", type=COUNT, nargs="+", default=[512, 2048, 8192, 16384], help="contexts T")
    parser.add_argument("--tokens_per_step", type=COUNT, default=16384, help="tokens of a batch")
    parser.add_argument(
        "--max_rwkv", type=NATURAL, default=512, help="longest T for RWKV, a loop over tokens"
    )
    args = parser.parse_args(argv)
    built = {name: model.train() for name, model in models.build_all(args).items()}
    check(built, args.dtype)
    rows = [row for length in args.time for row in measure(length, built, args)]
    return harness.report_speed(
        args, rows, models.describe(built), "training", "Peak memory of a step", "context T"
    )


if __name__ == "__main__":
    run_main(main)
