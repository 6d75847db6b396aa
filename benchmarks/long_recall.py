# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""What full backpropagation through long contexts learns, and truncated backpropagation does not.

    python -m benchmarks.long_recall --json outputs/long_recall.json

The task is `distant_recall` (tasks/recall.py): a few pairs of keys and values at the start, distraction, and
at the end the questions. A small model is trained by the `LongContextTrainer`, with states that are computed
backwards ("reverse"), or with gradients that end at each piece ("truncated"); the state is carried in both.
Both go through the same stages, from short contexts to long ones, with the same initial weights, sequences,
steps, rates and pieces: at every stage a context is cut into `--pieces` pieces, or more where those would be
longer than `--piece_size`. Before and after each stage the model is tested on other sequences of its length.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, set_seed

import stackformer  # noqa: F401  (registers the model)
from benchmarks.tasks import IGNORED, Task, seeded
from benchmarks.tasks.recall import DistantRecall
from benchmarks.tasks.run import TRAIN, evaluate
from scripts.report import commit, machine_line, write_json
from scripts.train import read_preset
from stackformer.long_context import METHODS
from stackformer.long_context_trainer import LongContextArguments, LongContextTrainer

SMALL = (
    "hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=1,num_memory_banks=4,"
    "max_decay_rate=0,feature_map=relu"
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
    model: PreTrainedModel, task: Task, length: int, steps: int, method: str, args: argparse.Namespace
) -> float:
    """Train for one stage; the loss of its last steps."""
    batch_size = min(max(args.tokens_per_step // length, 1), args.max_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = LongContextArguments(
            output_dir=folder,
            context_length=None,
            piece_size=min(-(-length // args.pieces), args.piece_size),
            backpropagation=method,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            adam_beta2=0.99,
            logging_steps=max(steps // 4, 1),
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
        )
        documents = Documents(task, steps * batch_size, length, args.seed)
        trainer = LongContextTrainer(model, arguments, train_dataset=documents)
        trainer.remove_callback(PrinterCallback)  # the table says it
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


def stages(method: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train a new model with one method, a row of results for each stage."""
    task = DistantRecall(num_kv_pairs=args.num_kv_pairs)
    set_seed(args.seed)
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = read_preset(args.config, args.config_overrides, vocab_size=task.vocab_size, **tokens)
    model = AutoModelForCausalLM.from_config(config)

    def accuracy(length: int) -> float | None:
        return evaluate(model.eval(), task, length, args.num_test, 8, args.piece_size)["accuracy"]

    for length, steps in zip(args.lengths, args.steps, strict=True):
        before, started = accuracy(length), time.perf_counter()
        loss = train(model, task, length, steps, method, args)
        seconds = time.perf_counter() - started
        yield {
            "method": method, "length": length, "steps": steps, "loss": loss, "before": before,
            "accuracy": accuracy(length), "chance": 1 / task.num_answers, "seconds": seconds,
        }  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and test as `argv` says (default: the command line)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["reverse", "truncated"], choices=METHODS)
    lengths, steps = [128, 512, 2048, 8192, 32768, 131072], [300, 100, 60, 60, 60, 60]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="tokens of contexts")
    parser.add_argument("--steps", type=int, nargs="+", default=steps, help="steps at each length")
    parser.add_argument("--tokens_per_step", type=int, default=32768, help="batch size times length")
    parser.add_argument("--max_batch_size", type=int, default=64, help="sequences of a step at most")
    parser.add_argument("--pieces", type=int, default=4, help="pieces of a context at least")
    parser.add_argument("--piece_size", type=int, default=4096, help="tokens of a piece at most")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="the largest of each stage")
    parser.add_argument("--num_kv_pairs", type=int, default=4, help="pairs to keep")
    parser.add_argument("--num_test", type=int, default=64, help="test sequences of each length")
    parser.add_argument("--config", default="configs/plain-tiny.json", help="preset of the model")
    parser.add_argument("--config_overrides", default=SMALL, help="fields other than the preset's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sequences")
    parser.add_argument("--json", default=None, help="file to write the results to")
    args = parser.parse_args(argv)
    if len(args.steps) != len(args.lengths):
        raise ValueError(f"steps={args.steps}: expected as many as lengths={args.lengths}.")
    rows = []
    print("| method | tokens | steps | loss | accuracy before, after (chance) | seconds |")
    print("|---|---|---|---|---|---|")
    for method in args.methods:
        for row in stages(method, args):
            rows.append(row)
            print(
                f"| {method} | {row['length']:,} | {row['steps']} | {row['loss']:.3f} | "
                f"{row['before']:.3f}, {row['accuracy']:.3f} ({row['chance']:.3f}) | {row['seconds']:.0f} |",
                flush=True,
            )
    results = {"machine": machine_line(), "commit": commit(), "arguments": vars(args), "rows": rows}
    print(results["machine"])
    if args.json:
        write_json(args.json, results)
    return results


if __name__ == "__main__":
    main()
