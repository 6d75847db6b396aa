# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Decoding speed and size of the state over the context, beside transformers' models.

    python -m benchmarks.decode --contexts 1024 32768 --batch_size 1 8 --json outputs/decode.json
    python -m benchmarks.decode --contexts 1024 32768 1048576 --batch_size 1 --models "plain core" llama

A greedy loop calls every model on one token after another, from the state after a context; all have the same
number of parameters within 2%, one dtype, and the same threads. "compiled" is `torch.compile` of the whole
step with a static cache. The contexts:
- ours: random bytes that are really read, in chunks
- Llama: random keys and values of that length; it is left out where they would take more than
  `--max_cache_bytes`. Its dynamic cache, which `generate` takes by default, copies them all at every token
- other recurrent models: the state after `--chunk_size` tokens at most, as neither its size nor the time of a
  step depends on the length. RWKV of transformers mixes up the rows of a batch, and runs for one row only.
"via generate" is `generate` on a prompt of one token, with whatever it does besides calling the model.
Before anything is timed, every model must give the same logits for a text read at once and in chunks, and
every compiled step those of the same model.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import harness, models
from experiments.command_line import COUNT, POSITIVE, run_main
from experiments.report import draw_or_warn
from experiments.rows import BANKS, LLAMA, MAMBA2, OURS, PLAIN, RWKV, STACK

COMPILED = ", compiled"


class GreedyLoop:
    """A model that goes on from a cache, token by token; each call continues where the last one ended.

    Args:
        step: called in place of the model, such as a compiled one.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Any, batch: int, tokens: int, step: Callable | None = None
    ):
        self.model, self.cache, self.tokens, self.step = model, cache, tokens, step
        self.ids = models.random_ids(batch, 1, model.device)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        for _ in range(self.tokens):
            logits, self.cache = models.read(self.model, self.ids, self.cache, self.step)
            self.ids = logits.argmax(-1, keepdim=True)
        return logits


@torch.no_grad()
def contexts(model: PreTrainedModel, lengths: list[int], chunk: int) -> Iterator[Any]:
    """The cache after random bytes of each length, in ascending order; it may be continued."""
    cache, seen = None, 0
    for length in sorted(lengths):
        while seen < length:
            ids = models.random_ids(1, min(chunk, length - seen), model.device)
            cache = models.read(model, ids, cache)[1]
            seen += ids.shape[1]
        yield cache


def loops(length: int, batch: int, built: dict, states: dict, args) -> dict[str, GreedyLoop]:
    """The sides of one case, each with a state of its own."""
    result = {}
    for name, model in built.items():
        cache = context_cache(name, model, length, batch, states, args, static=False)
        if cache is None:
            continue
        result[name] = GreedyLoop(model, cache, batch, args.tokens)
        if args.compile and name in (*OURS, LLAMA):
            cache = context_cache(name, model, length, batch, states, args, static=True)
            step = torch.compile(model, fullgraph=True, dynamic=False)
            result[name + COMPILED] = GreedyLoop(model, cache, batch, args.tokens, step)
    return result


def context_cache(
    name: str, model: PreTrainedModel, length: int, batch: int, states: dict, args, static: bool
) -> Any:
    """A cache of `batch` rows after `length` tokens; `None` where it is not to be had, see above."""
    if name == LLAMA:
        if batch * length * models.bytes_per_token(model) > args.max_cache_bytes:
            return None
        room = args.tokens * (args.repeats + 1) if static else None  # for the warm-up and all repeats
        return models.keys_and_values(model, batch, length, room)
    if name in OURS:
        cache = states[name, length].clone()
        cache.batch_repeat_interleave(batch)
        return models.static_copy(cache, model.config) if static else cache
    if name == RWKV and batch > 1:
        return None
    return models.read(model, models.random_ids(batch, min(length, args.chunk_size), model.device))[1]


def check_compiled(sides: dict[str, GreedyLoop]) -> None:
    """Raise an error unless a compiled loop of ours gives the logits of the eager one."""
    for name in OURS:
        if name + COMPILED in sides:
            expected, actual = sides[name](), sides[name + COMPILED]()
            tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def measure(
    length: int, batch: int, built: dict, states: dict, args: argparse.Namespace
) -> list[harness.Row]:
    """The rows of one case."""
    sides = loops(length, batch, built, states, args)
    check_compiled(sides)
    case = {"context": length, "batch": batch, "tokens": batch * args.tokens}
    rows = harness.measure(case, sides, args, base=args.models[0])
    for row in rows:
        row["state_bytes"] = models.state_bytes(sides[row["side"]].cache)
    return rows


def measure_contexts(
    name: str, model: PreTrainedModel, lengths: list[int], states: dict, args
) -> list[harness.Row]:
    """The rows of one of our models for one row of text, after contexts of all lengths in turn."""
    sides = {
        f"{length:,}": GreedyLoop(model, states[name, length].clone(), 1, args.tokens) for length in lengths
    }
    case = {"context": f"{name}, in turn", "batch": 1, "tokens": args.tokens}
    return harness.measure(case, sides, args, base=f"{lengths[0]:,}")


def measure_generate(built: dict[str, PreTrainedModel], args: argparse.Namespace) -> list[harness.Row]:
    """The rows of `generate`, on a prompt of one token."""
    options = {"do_sample": False, "max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
    ids = models.random_ids(1, 1, args.device)
    mask = torch.ones_like(ids)
    sides = {
        name: lambda model=model: model.generate(ids, attention_mask=mask, **options)
        for name, model in built.items()
        if name != RWKV
    }
    case = {"context": "via generate", "batch": 1, "tokens": args.tokens}
    return harness.measure(case, sides, args, base=args.models[0])


def main(argv: list[str] | None = None) -> dict:
    """Measure as `argv` says (default: the command line)."""
    parser = harness.parser(__doc__)
    harness.add_timing(parser, repeats=9)
    harness.add_plot(parser)
    models.add_arguments(parser, (PLAIN, BANKS, STACK, LLAMA, MAMBA2, RWKV))
    parser.add_argument("--contexts", type=COUNT, nargs="+", default=[1024, 32768], help="tokens read before")
    parser.add_argument("--batch_size", type=COUNT, nargs="+", default=[1, 8], help="rows decoded together")
    parser.add_argument("--tokens", type=COUNT, default=32, help="tokens decoded in a timed call")
    parser.add_argument("--chunk_size", type=COUNT, default=2048, help="tokens read at once")
    parser.add_argument("--max_cache_bytes", type=POSITIVE, default=4e9, help="of Llama's keys and values")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled sides, too"
    )
    args = parser.parse_args(argv)
    # All models share the code object that is compiled: by default, it may have 8 graphs.
    torch._dynamo.config.recompile_limit = 256
    built = models.build_to_infer(args)
    lengths = sorted(args.contexts)
    states = {}
    for name in set(built) & set(OURS):
        for length, cache in zip(lengths, contexts(built[name], lengths, args.chunk_size), strict=True):
            states[name, length] = cache.clone()
    rows = []
    for batch in args.batch_size:
        for length in lengths:
            rows += measure(length, batch, built, states, args)
    rows += measure_generate(built, args)
    measured = list(rows)
    every_table = tables(rows, built, args)
    if len(lengths) > 1:
        in_turn = [
            row
            for name, model in built.items()
            if name in OURS
            for row in measure_contexts(name, model, lengths, states, args)
        ]
        rows += in_turn
        every_table[
            f"Decoding after contexts of each length in turn, tokens/s (in brackets: times {lengths[0]:,})"
        ] = harness.table(in_turn, "context", harness.tokens_per_second)
    content = harness.report(args, rows, every_table)
    if args.plot:
        draw_or_warn(plot, measured, args.plot)
    return content


def tables(rows: list[harness.Row], built: dict, args: argparse.Namespace) -> dict[str, str]:
    """Speed and bytes for every batch size."""
    result = {"Models": models.describe(built)}
    for batch in args.batch_size:
        chosen = [row for row in rows if row["batch"] == batch]
        result[f"Decoding, tokens/s, batch {batch} (in brackets: times {args.models[0]})"] = harness.table(
            chosen, "context", harness.tokens_per_second
        )
        result[f"State, batch {batch}"] = harness.table(
            [row for row in chosen if "state_bytes" in row],
            "context",
            lambda row: harness.size(row["state_bytes"]),
        )
    return result


def plot(rows: list[harness.Row], path: str) -> None:
    """Time per token over context."""
    panels: dict[str, list] = {}
    for row in rows:
        if "state_bytes" in row:
            panels.setdefault(f"batch {row['batch']}", []).append(row)
    harness.plot_lines(
        path,
        panels,
        "context",
        lambda row: 1e3 * row["seconds"] / row["tokens"],
        "tokens read before",
        "milliseconds per token",
    )


if __name__ == "__main__":
    run_main(main)
