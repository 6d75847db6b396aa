# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Counts the package's functions that one step runs, and the moves between files that a reader makes.

    python -m benchmarks.walk

A training step is the loss and its backward pass; a decoding step reads one token. Both are taken of a plain
core and of a stack of 4 ponder steps, each of one layer. A move is a call from one file of the package to
another; each is counted as often as it happens.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import stackformer
from experiments.command_line import Parser, check_output_file, run_main
from experiments.report import write_json
from stackformer import StackformerConfig, StackformerForCausalLM

PACKAGE = Path(stackformer.__file__).parent
MODELS = {
    "plain core": {"bottleneck_size": None, "stack_depth": 1, "max_ponder_steps": 1, "num_memory_banks": 1},
    "4 steps": {"bottleneck_size": 16, "stack_depth": 3, "max_ponder_steps": 4, "halting_threshold": 0.0},
}


def walk(step: Callable[[], Any]) -> dict[str, Any]:
    """Runs a step: its functions, files, and moves between files."""
    functions: set[tuple[str, str]] = set()
    moves: Counter[tuple[tuple[str, str], tuple[str, str]]] = Counter()
    stack: list[tuple[str, str] | None] = []

    def trace(frame, event, argument) -> None:
        if event == "call":
            path = Path(frame.f_code.co_filename)
            here = None
            if path.is_relative_to(PACKAGE) and not frame.f_code.co_name.startswith("<"):
                here = (str(path.relative_to(PACKAGE)), frame.f_code.co_qualname)
                functions.add(here)
                caller = next((place for place in reversed(stack) if place is not None), None)
                if caller is not None and caller[0] != here[0]:
                    moves[caller, here] += 1
            stack.append(here)
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(trace)
    try:
        step()
    finally:
        sys.setprofile(None)
    return {
        "functions": len(functions),
        "files": len({path for path, _ in functions}),
        "moves": moves.total(),
        "walk": [f"{count:4} {a[0]}:{a[1]} -> {b[0]}:{b[1]}" for (a, b), count in moves.most_common()],
    }


def steps(fields: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """A training step and a decoding step of a model with these fields."""
    torch.manual_seed(0)
    config = StackformerConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **fields)
    model, ids = StackformerForCausalLM(config), torch.arange(40).view(2, 20)
    outputs = model.eval()(ids, use_cache=True)

    def train() -> None:
        model.train()(ids, labels=ids).loss.backward()

    @torch.no_grad()
    def decode() -> None:
        model.eval()(ids[:, :1], cache=outputs.cache)

    return {"training": train, "decoding": decode}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints a table as `argv` says (default: the command line), and returns what --json holds."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--moves", action="store_true", help="print each move")
    args = parser.parse_args(argv)
    check_output_file("json", args.json)
    results = {}
    print("| step | functions | files | moves |\n|---|---|---|---|")
    for name, fields in MODELS.items():
        for kind, step in steps(fields).items():
            step()  # what happens once only is no part of it
            row = results[f"{name}, {kind}"] = walk(step)
            print(f"| {name}, {kind} | {row['functions']} | {row['files']} | {row['moves']} |")
            if args.moves:
                print("\n".join(row["walk"]))
    if args.json:
        write_json(args.json, results)
    return results


if __name__ == "__main__":
    run_main(main)
