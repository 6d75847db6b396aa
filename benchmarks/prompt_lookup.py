# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Tokens per second that rolling back gains: prompt-lookup decoding beside greedy decoding, on a text that
repeats.

    python -m scripts.demo
    python -m benchmarks.prompt_lookup --model outputs/demo

Prompt lookup drafts tokens by finding the last ones earlier in the text; the model checks a draft in one
call, and the cache takes back what was wrong. Both sides give the same tokens, which is checked, and take
turns.
"""

import argparse
import statistics
import time

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import stackformer  # noqa: F401  (registers the model)
from scripts.report import machine_line, write_json

PROMPT = "def add(a, b):\n    return a + b\n\n" * 8


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Measure as `argv` says (default: the command line)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="saved model, with its tokenizer")
    parser.add_argument("--prompt", default=PROMPT, help="what both sides go on from")
    parser.add_argument("--new_tokens", type=int, default=200, help="tokens to generate")
    parser.add_argument("--draft", type=int, default=10, help="tokens of a draft")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side")
    parser.add_argument("--json", default=None, help="file to write the results to")
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    ids = AutoTokenizer.from_pretrained(args.model)(args.prompt, return_tensors="pt").input_ids
    options = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": None}
    sides = {"greedy": {}, "prompt lookup": {"prompt_lookup_num_tokens": args.draft}}
    calls = {name: count_calls(model, ids, {**options, **side}) for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in tqdm(range(args.repeats), leave=False):
        results = []
        for name, side in sides.items():
            started = time.perf_counter()
            results.append(model.generate(ids, **options, **side))
            times[name].append(time.perf_counter() - started)
        if not torch.equal(*results):
            raise RuntimeError("prompt lookup did not give the tokens of greedy decoding")
    rates = {name: args.new_tokens / statistics.median(values) for name, values in times.items()}
    print(machine_line())
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} tokens/s, {calls[name]} calls of the model for {args.new_tokens} tokens")
    print(f"gain: {rates['prompt lookup'] / rates['greedy']:.2f} times")
    if args.json:
        write_json(args.json, {"machine": machine_line(), "tokens_per_second": rates, "calls": calls})
    return rates


def count_calls(model: torch.nn.Module, ids: torch.Tensor, options: dict) -> int:
    """How often the model is called for one generation (which also warms up)."""
    count = 0

    def increase(*_):
        nonlocal count
        count += 1

    hook = model.register_forward_pre_hook(increase)
    model.generate(ids, **options)
    hook.remove()
    return count


if __name__ == "__main__":
    main()
