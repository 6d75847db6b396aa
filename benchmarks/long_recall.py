# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Recall over long contexts: full backpropagation learns it, truncated backpropagation does not.

    python -m benchmarks.long_recall --json outputs/long_recall.json

The task is `distant_recall` (tasks/recall.py): pairs of keys and values at the start, marked as worth
keeping, then pairs to ignore, and questions at the end. A small model learns it on short contexts, through
the whole of which gradients flow. Then it goes on with long contexts only, in which the pairs to keep have a
mark that it has never seen: with states that are computed backwards ("reverse"), or with gradients that end
at each chunk ("truncated"). Both start from the same weights, carry the state on from chunk to chunk, and
have the same sequences, steps, rates and chunks. Tests are on other sequences.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, set_seed

import stackformer  # noqa: F401  (registers the model)
from benchmarks.tasks import IGNORED, Task, seeded
from benchmarks.tasks.recall import DistantRecall
from benchmarks.tasks.run import TRAIN, evaluate
from experiments.command_line import COUNT, NATURAL, NOT_NEGATIVE, Parser, check_output_file, run_main
from experiments.presets import read_preset
from experiments.report import commit, machine_line, write_json
from stackformer.training.long_context import METHODS
from stackformer.training.long_context_trainer import LongContextArguments, LongContextTrainer

SMALL = (
    "hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=1,num_memory_banks=4,"
    "max_decay_rate=0"
)


@dataclass(frozen=True)
class Documents(Sequence):
    """Sequences of a task as documents, each made when it is asked for."""

    task: Task
    size: int
    length: int
    seed: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, Tensor]:  # type: ignore[override]
        if not 0 <= number < self.size:
            raise IndexError(f"{number} is not among {self.size} sequences")
        ids, labels = self.task.sample(1, self.length, seeded(TRAIN, self.seed, self.length, number))
        # A document's labels are those of the tokens before them, and its last token is only a label.
        return {
            "input_ids": torch.nn.functional.pad(ids[0], (0, 1)),
            "labels": torch.nn.functional.pad(labels[0], (1, 0), value=IGNORED),
        }


def train(
    model: PreTrainedModel,
    task: Task,
    length: int,
    steps: int,
    batch_size: int,
    args: argparse.Namespace,
    **arguments: Any,
) -> float:
    """Train on sequences of one length; the loss of the last quarter of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        training = LongContextArguments(
            output_dir=folder,
            context_length=None,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            adam_beta2=0.99,
            logging_steps=max(steps // 4, 1),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            **arguments,
        )
        documents = Documents(task, steps * batch_size, length, args.seed)
        trainer = LongContextTrainer(model, training, train_dataset=documents)
        trainer.remove_callback(PrinterCallback)  # the table says it
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the model that knows short contexts, and one for each method that goes on from it."""
    known, new = (DistantRecall(args.num_kv_pairs, other_mark=other) for other in (False, True))
    set_seed(args.seed)
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = read_preset(args.config, args.config_overrides, vocab_size=known.vocab_size, **tokens)
    start = AutoModelForCausalLM.from_config(config)

    def row(model: PreTrainedModel, method: str | None, started: float, loss: float) -> dict[str, Any]:
        seconds = time.perf_counter() - started
        accuracies = {
            name: evaluate(model.eval(), task, length, args.num_test, 8, args.chunk_size)["accuracy"]
            for name, task, length in (
                ("short", known, args.short_length),
                ("known_mark", known, args.length),
                ("new_mark", new, args.length),
            )
        }
        return {"method": method, "loss": loss, "seconds": seconds, **accuracies}

    started = time.perf_counter()
    short = {"chunk_size": args.short_length, "learning_rate": args.short_learning_rate}
    loss = train(start, known, args.short_length, args.short_steps, args.short_batch_size, args, **short)
    rows = [row(start, None, started, loss)]
    for method in args.methods:
        model, started = copy.deepcopy(start), time.perf_counter()
        long = {"chunk_size": args.chunk_size, "learning_rate": args.learning_rate}
        loss = train(
            model, new, args.length, args.steps, args.batch_size, args, backpropagation=method, **long
        )
        rows.append(row(model, method, started, loss))
    return rows


def print_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"Accuracy; guessing has {1 / DistantRecall.num_values:.3f}.\n")
    short, long = f"{args.short_length:,} tokens", f"{args.length:,} tokens"
    print(f"| trained on | {short} | {long} | {long}, new mark | seconds |\n|---|---|---|---|---|")
    for row in rows:
        trained = short if row["method"] is None else f"{long}, new mark, {row['method']}"
        print(
            f"| {trained} | {row['short']:.3f} | {row['known_mark']:.3f} | {row['new_mark']:.3f} | "
            f"{row['seconds']:.0f} |"
        )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and test as `argv` says (default: the command line)."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["reverse", "truncated"], choices=METHODS)
    parser.add_argument("--length", type=COUNT, default=131072, help="tokens of a long context")
    parser.add_argument("--steps", type=COUNT, default=60, help="on long contexts")
    parser.add_argument("--batch_size", type=COUNT, default=1, help="long contexts of a step")
    parser.add_argument("--chunk_size", type=COUNT, default=4096, help="tokens that are run at once")
    parser.add_argument("--learning_rate", type=NOT_NEGATIVE, default=5e-3, help="on long contexts")
    parser.add_argument("--short_length", type=COUNT, default=128, help="tokens of a short context")
    parser.add_argument("--short_steps", type=COUNT, default=600, help="on short contexts")
    parser.add_argument("--short_batch_size", type=COUNT, default=64, help="short contexts of a step")
    parser.add_argument("--short_learning_rate", type=NOT_NEGATIVE, default=1e-2, help="on short contexts")
    parser.add_argument("--num_kv_pairs", type=COUNT, default=4, help="pairs to keep")
    parser.add_argument("--num_test", type=COUNT, default=32, help="test sequences")
    parser.add_argument("--config", default="configs/plain-tiny.json", help="preset of the model")
    parser.add_argument("--config_overrides", default=SMALL, help="fields other than the preset's")
    parser.add_argument("--seed", type=NATURAL, default=0, help="of weights and sequences")
    parser.add_argument("--json", default=None, help="file to write the results to")
    args = parser.parse_args(argv)
    check_output_file("json", args.json)
    read_preset(args.config, args.config_overrides)
    results = {"machine": machine_line(), "commit": commit(), "arguments": vars(args), "rows": measure(args)}
    print(results["machine"])
    print_table(results["rows"], args)
    if args.json:
        write_json(args.json, results)
    return results


if __name__ == "__main__":
    run_main(main)
