# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Tokens per second that rolling back gains: prompt-lookup decoding beside greedy decoding, on a text that
repeats.

    python -m scripts.demo
    python -m benchmarks.prompt_lookup --model outputs/demo

Prompt lookup drafts tokens by finding the last ones earlier in the text; the model checks a draft in one
call, and the cache takes back what was wrong. Both sides must give the same tokens, which is checked before
anything is timed.
"""

import torch

from benchmarks import harness
from experiments.command_line import COUNT, read_text, run_main
from experiments.loading import check_source, load_model, load_saved_tokenizer

PROMPT = "def add(a, b):\n    return a + b\n\n" * 8
GREEDY, LOOKUP = "greedy", "prompt lookup"


def main(argv: list[str] | None = None) -> dict:
    """Measure as `argv` says (default: the command line)."""
    parser = harness.parser(__doc__)
    harness.add_timing(parser, repeats=7)
    parser.add_argument("--model", required=True, help="saved model, with its tokenizer")
    parser.add_argument("--prompt", default=PROMPT, help="what both sides go on from")
    parser.add_argument("--new_tokens", type=COUNT, default=200, help="tokens to generate")
    parser.add_argument("--draft", type=COUNT, default=10, help="tokens of a draft")
    args = parser.parse_args(argv)
    check_source("model", args.model)
    if not read_text("prompt", args.prompt):
        raise ValueError("prompt='': expected a text to go on from.")
    tokenizer = load_saved_tokenizer("model", args.model)
    model = load_model("model", args.model, args.device)
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    greedy = {"max_new_tokens": args.new_tokens, "do_sample": False, "eos_token_id": None}
    options = {GREEDY: greedy, LOOKUP: {**greedy, "prompt_lookup_num_tokens": args.draft}}
    sides = {
        name: lambda kwargs=kwargs: model.generate(ids.to(args.device), **kwargs)
        for name, kwargs in options.items()
    }
    calls, results = zip(*(count_calls(model, work) for work in sides.values()), strict=True)
    if not torch.equal(*results):
        raise RuntimeError("prompt lookup did not give the tokens of greedy decoding")
    case = {"text": "repeating", "tokens": args.new_tokens}
    rows = harness.measure(case, sides, args, base=GREEDY, calls=dict(zip(sides, calls, strict=True)))
    tables = {
        f"Tokens/s (in brackets: times {GREEDY})": harness.table(rows, "text", harness.tokens_per_second),
        f"Calls of the model for {args.new_tokens} tokens": harness.table(
            rows, "text", lambda row: str(row["calls"])
        ),
    }
    return harness.report(args, rows, tables)


def count_calls(model: torch.nn.Module, work: harness.Work) -> tuple[int, torch.Tensor]:
    """Returns the number of calls of the model by `work`, and its result."""
    count = 0

    def increase(*_):
        nonlocal count
        count += 1

    hook = model.register_forward_pre_hook(increase)
    result = work()
    hook.remove()
    return count, result


if __name__ == "__main__":
    run_main(main)
