# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Speed and memory of reading a prompt over its length, beside transformers' models.

    python -m benchmarks.prefill --time 512 2048 8192 16384 --json outputs/prefill.json

A prompt of random bytes is read at once, into a cache, and the logits after its last token are computed. All
models have the same number of parameters within 2%, one dtype, and the same threads. Before anything is
timed, every model must give the same logits for a text read at once and in chunks.
"""

import torch
from transformers import PreTrainedModel

from benchmarks import harness, models
from experiments.command_line import COUNT, NATURAL, run_main
from experiments.rows import BANKS, LLAMA, MAMBA2, PLAIN, QWEN3_NEXT, RWKV, STACK


def measure(length: int, built: dict[str, PreTrainedModel], args) -> list[harness.Row]:
    """The rows of one length."""
    ids = models.random_ids(args.batch_size, length, args.device)
    sides = {
        name: torch.no_grad()(lambda model=model: models.read(model, ids))
        for name, model in built.items()
        if name != RWKV or length <= args.max_rwkv
    }
    return harness.measure(
        {"T": length, "tokens": ids.numel()}, sides, args, base=args.models[0], memory=True
    )


def main(argv: list[str] | None = None) -> dict:
    """Measure as `argv` says (default: the command line)."""
    parser = harness.parser(__doc__)
    harness.add_timing(parser, repeats=7)
    harness.add_plot(parser)
    models.add_arguments(parser, (PLAIN, BANKS, STACK, LLAMA, MAMBA2, QWEN3_NEXT))
    parser.add_argument("--time", type=COUNT, nargs="+", default=[512, 2048, 8192, 16384], help="lengths T")
    parser.add_argument("--batch_size", type=COUNT, default=1, help="prompts read together")
    parser.add_argument(
        "--max_rwkv", type=NATURAL, default=512, help="longest T for RWKV, a loop over tokens"
    )
    args = parser.parse_args(argv)
    built = models.build_to_infer(args)
    rows = [row for length in args.time for row in measure(length, built, args)]
    return harness.report_speed(
        args, rows, models.describe(built), "prefill", "Peak memory, with the cache", "prompt length T"
    )


if __name__ == "__main__":
    run_main(main)
