# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Bits per byte and perplexity of a saved model on a text: in windows, and with its state carried along.

    python -m scripts.evaluate --model_name_or_path runs/tiny --text text.txt
    python -m scripts.evaluate --model_name_or_path runs/tiny --text enwik8 --range 95000000:96000000 \
        --window 1024 --stride 256 --chunk_length 512 --json results/tiny.json
    python -m scripts.evaluate --model_name_or_path runs/tiny --text text.txt --no_windowed
    python -m scripts.evaluate --model_name_or_path runs/tiny --text enwik8 --range 95000000:96000000 \
        --no_windowed --no_carry_state --context_length 8192

windowed   every token is predicted from at most `window` tokens before it and, once there are that many,
           from more than `window - stride`: the usual measure of a model with a limited context.
carried    the text is read once, from its start, in chunks; the cache is carried over, so the context is all
           of the text so far. With a cache that grows this slows down; with a state of one size it does not.

Both predict every token but the first one exactly once. Works for any causal language model of transformers
(carried: for those that return a cache).

--context_length reads contexts of so many tokens, each from its own start, and prints the bits of a token by
its position in the context: a model that remembers predicts late tokens better than early ones. A context
starts every `context_stride` tokens, so the same tokens are early in one context and late in another.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from experiments.command_line import COUNT, DataclassParser, check_input_file, check_output_file, run_main
from experiments.data import encode, parse_range, read_bytes
from experiments.loading import check_device, check_source, load_model, load_saved_tokenizer
from experiments.report import bits_per_byte, commit, machine_line, write_json
from stackformer.versions import CACHE_NAME


@dataclass
class EvaluationArguments:
    model_name_or_path: str = field(metadata={"help": "Folder of a saved model and its tokenizer."})
    text: str = field(metadata={"help": "Text file; read as bytes."})
    range: str | None = field(
        default=None, metadata={"help": "START:STOP in bytes; all of the file if not given."}
    )
    windowed: bool = field(default=True, metadata={"help": "Evaluate in windows."})
    window: int = field(default=256, metadata={"help": "Tokens of context, at most, in a window."})
    stride: int | None = field(
        default=None, metadata={"help": "Tokens between windows; half a window if not given."}
    )
    batch_size: int = field(default=16, metadata={"help": "Windows at once."})
    carry_state: bool = field(
        default=True, metadata={"help": "Evaluate with the state carried across the text."}
    )
    chunk_length: int = field(default=256, metadata={"help": "Tokens at once where the state is carried."})
    context_length: int | None = field(
        default=None, metadata={"help": "Also print bits by position in contexts of so many tokens."}
    )
    context_stride: int = field(default=1024, metadata={"help": "Tokens between the starts of contexts."})
    device: str = field(default="cpu", metadata={"help": "Device of the model, such as cuda."})
    json: str | None = field(default=None, metadata={"help": "File to write the results to."})

    def __post_init__(self) -> None:
        for name in ("window", "stride", "batch_size", "chunk_length", "context_length", "context_stride"):
            COUNT.check(name, getattr(self, name))
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"stride={self.stride}: expected 1 <= stride <= window={self.window}.")
        if not self.windowed and not self.carry_state and self.context_length is None:
            raise ValueError(
                "windowed=False, carry_state=False, context_length=None: expected one of them to evaluate."
            )
        if self.range is not None:
            parse_range(self.range, None, "range")


def window_spans(num_predictions: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (start, first, stop): inputs start..stop-1, of which first..stop-1 predict a token anew.

    Each is min(window, num_predictions) long; together, first..stop-1 cover 0..num_predictions-1 once.

    Raises:
        ValueError: unless 1 <= stride <= window.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride}: expected 1 <= stride <= window={window}.")
    stops = [*range(min(window, num_predictions), num_predictions, stride), num_predictions]
    return [(max(0, stop - window), first, stop) for first, stop in zip([0, *stops[:-1]], stops, strict=True)]


@torch.no_grad()
def windowed_nll(
    model: PreTrainedModel, ids: torch.Tensor, window: int, stride: int, batch_size: int = 16
) -> float:
    """Sum of -log p(token) in nats over `ids[1:]`, each from its window; ids: [tokens], on its device."""
    COUNT.check("batch_size", batch_size)
    spans = window_spans(len(ids) - 1, window, stride)
    total = 0.0
    with tqdm(total=len(ids) - 1, desc="windowed", unit="token") as progress:
        for batch in (spans[index : index + batch_size] for index in range(0, len(spans), batch_size)):
            inputs = torch.stack([ids[start:stop] for start, _, stop in batch])
            logits = model(input_ids=inputs, use_cache=False).logits
            for row, (start, first, stop) in zip(logits, batch, strict=True):
                total += _nll(row[first - start :], ids[first + 1 : stop + 1])
            progress.update(batch[-1][2] - batch[0][1])
    return total


@torch.no_grad()
def carried_nll(model: PreTrainedModel, ids: torch.Tensor, chunk_length: int) -> float:
    """Sum of -log p(token) in nats over `ids[1:]`, each from all before; ids: [tokens], on its device.

    The inputs are `ids[:-1]` in chunks, so the last logits of a chunk predict the first token of the next.

    Raises:
        ValueError: if `chunk_length` is not positive, or the model returns no cache.
    """
    if chunk_length < 1:
        raise ValueError(f"chunk_length={chunk_length}: expected at least 1.")
    total, cache = 0.0, None
    with tqdm(total=len(ids) - 1, desc="carried", unit="token") as progress:
        for inputs, targets in zip(ids[:-1].split(chunk_length), ids[1:].split(chunk_length), strict=True):
            outputs = model(input_ids=inputs[None], use_cache=True, **{CACHE_NAME: cache})
            cache = outputs.get(CACHE_NAME)
            if cache is None:
                raise ValueError(f"carry_state: {type(model).__name__} returned no cache to carry.")
            total += _nll(outputs.logits[0], targets)
            progress.update(len(inputs))
    return total


@torch.no_grad()
def nll_by_position(
    model: PreTrainedModel, ids: torch.Tensor, context_length: int, stride: int, batch_size: int = 1
) -> torch.Tensor:
    """Mean -log p(token) in nats at each position but the first of contexts of `context_length` tokens.

    A context starts at every `stride` tokens. Tokens count that are once in each `stride` of positions, so
    positions from one multiple of the stride to another are compared on the same tokens.

    Args:
        ids: [tokens], on its device.
        batch_size: contexts at once.

    Returns:
        [context_length - 1], in float64.

    Raises:
        ValueError: if `stride` does not divide `context_length`, or the text is too short for every position
            to count: it must have `2 * context_length - stride` tokens.
    """
    COUNT.check("batch_size", batch_size)
    if not context_length >= 2 or not 1 <= stride <= context_length or context_length % stride:
        raise ValueError(
            f"context_stride={stride}: expected a divisor of context_length={context_length}, which is at "
            "least 2."
        )
    needed = 2 * context_length - stride
    if len(ids) < needed:
        raise ValueError(
            f"context_length={context_length}: expected a text of at least {needed} tokens, got {len(ids)}."
        )
    contexts = ids.unfold(0, context_length, stride)  # [contexts, context_length], a view
    starts = stride * torch.arange(len(contexts))
    first, stop = context_length - stride, stride * len(contexts)  # the tokens that count
    total = torch.zeros(context_length - 1, dtype=torch.float64)
    count = torch.zeros(context_length - 1, dtype=torch.float64)
    batches = zip(contexts.split(batch_size), starts.split(batch_size), strict=True)
    for rows, places in tqdm(list(batches), desc="by position", unit="batch"):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        tokens = places.unsqueeze(1) + torch.arange(1, context_length)
        counted = (tokens >= first) & (tokens < stop)
        total += (losses.double().cpu() * counted).sum(0)
        count += counted.sum(0)
    return total / count


def mean_bits(nll: torch.Tensor, stride: int) -> dict[str, float]:
    """Mean bits of a token in each of `position_bins`, by "first-last"; nll: of `nll_by_position`."""
    return {
        f"{start}-{stop - 1}": nll[start - 1 : stop - 1].mean().item() / math.log(2)
        for start, stop in position_bins(len(nll) + 1, stride)
    }


def position_bins(context_length: int, stride: int) -> list[tuple[int, int]]:
    """Positions start..stop-1 of a context: the first `stride`, then as many as all before, and so on."""
    edges = [1]
    while edges[-1] < context_length:
        edges.append(min(context_length, stride if len(edges) == 1 else 2 * edges[-1]))
    return list(zip(edges[:-1], edges[1:], strict=True))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Evaluate as `argv` says (default: the command line), print a table, and return what --json holds."""
    (args,) = DataclassParser(
        EvaluationArguments, description=__doc__.split("\n")[0]
    ).parse_args_into_dataclasses(argv)
    check_source("model_name_or_path", args.model_name_or_path)
    check_input_file("text", args.text)
    check_output_file("json", args.json)
    check_device("device", args.device)
    data = read_bytes(args.text, args.range)
    tokenizer = load_saved_tokenizer("model_name_or_path", args.model_name_or_path)
    ids = torch.from_numpy(encode(data, tokenizer).astype(np.int64)).to(args.device)
    if len(ids) < 2:
        raise ValueError(f"text={args.text!r}: expected at least two tokens, got {len(ids)}.")
    model = load_model("model_name_or_path", args.model_name_or_path, args.device)

    runs = {}
    if args.windowed:
        stride = max(1, args.window // 2) if args.stride is None else args.stride
        runs["windowed"] = lambda: windowed_nll(model, ids, args.window, stride, args.batch_size)
    if args.carry_state:
        runs["carried"] = lambda: carried_nll(model, ids, args.chunk_length)
    results = {name: _measure(run, len(ids), len(data)) for name, run in runs.items()}
    report = {
        "results": results,
        "by_position": {}
        if args.context_length is None
        else mean_bits(
            nll_by_position(model, ids, args.context_length, args.context_stride), args.context_stride
        ),
        "tokens": len(ids),
        "bytes": len(data),
        "parameters": model.num_parameters(),
        "machine": machine_line(),
        "commit": commit(),
        "arguments": asdict(args),
    }
    print_table(report)
    if args.json:
        write_json(args.json, report)
    return report


def print_table(report: dict[str, Any]) -> None:
    """Print the results, one row each, over the machine line."""
    print(f"{'':10} {'bits/byte':>10} {'perplexity':>11} {'tokens':>10} {'seconds':>9} {'tokens/s':>9}")
    for name, row in report["results"].items():
        speed = row["predictions"] / row["seconds"]
        print(
            f"{name:10} {row['bits_per_byte']:10.4f} {row['perplexity']:11.4f} {row['predictions']:10d} "
            f"{row['seconds']:9.1f} {speed:9.0f}"
        )
    for positions, bits in report["by_position"].items():
        print(f"positions {positions:>16} {bits:8.4f} bits per token")
    print(f"{report['parameters']:,} parameters; {report['machine']}")


def _measure(run, num_tokens: int, num_bytes: int) -> dict[str, float]:
    started = time.perf_counter()
    mean_nll = run() / (num_tokens - 1)
    return {
        "bits_per_byte": bits_per_byte(mean_nll, num_tokens, num_bytes),
        "perplexity": math.exp(mean_nll),
        "predictions": num_tokens - 1,
        "seconds": time.perf_counter() - started,
    }


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -log p(target), from logits [tokens, vocab] of any dtype and targets [tokens]."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()


__all__ = [
    "EvaluationArguments",
    "carried_nll",
    "main",
    "mean_bits",
    "nll_by_position",
    "position_bins",
    "print_table",
    "window_spans",
    "windowed_nll",
]


if __name__ == "__main__":
    run_main(main)
