# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Train a causal language model on a text with transformers' Trainer, and measure it in bits per byte.

A new model from a preset, on the bytes of a file:

    python -m scripts.train --config configs/stackformer-tiny.json --dataset text.txt --output_dir runs/tiny

With other fields than the preset's, other parts of the file, and other options of TrainingArguments:

    python -m scripts.train --config configs/stackformer-tiny.json \
        --config_overrides "num_memory_banks=4,max_ponder_steps=3" --dataset enwik8 --data_path enwik8 \
        --train_range 0:3600000 --eval_range 3600000:3800000 --block_size 256 \
        --max_steps 1000 --per_device_train_batch_size 16 --learning_rate 2e-3 --output_dir runs/enwik8

On a dataset of the `datasets` library, with a BPE trained on it:

    python -m scripts.train --config configs/stackformer-tiny.json --tokenizer bpe:4096 \
        --dataset Salesforce/wikitext --dataset_config wikitext-2-raw-v1 --output_dir runs/wikitext

Resume a run that was stopped (the same command, and); start a new run from the weights of another:

    python -m scripts.train ... --resume_from_checkpoint last
    python -m scripts.train --model_name_or_path runs/tiny --dataset other.txt --output_dir runs/other

The output folder gets the model, its tokenizer, metrics.json and, where matplotlib is installed, the course
of the run in training.png. The evaluation here predicts each block from its own start;
`python -m scripts.evaluate` also carries the state across the whole text.

Of a file, the first 90% are trained on and the next 5% are evaluated, at least a block of each. A text of
less than 100,000 bytes, or of fewer blocks than a batch has, can teach little: a warning says so.

The loss is logged 20 times, and at least every 50 steps, if --logging_steps does not say otherwise. A run
that was killed resumes from the newest checkpoint that is complete.
"""

from typing import Any

from transformers import TrainingArguments, set_seed

from experiments.command_line import DataclassParser, run_main
from experiments.data import DataArguments, load_splits
from experiments.training import (
    LOGGED_SHARE,
    SMALL_MODEL_DEFAULTS,
    ModelArguments,
    build_model,
    build_trainer,
    check_model,
    check_training,
    choose_tokenizer,
    draw_course,
    find_checkpoint,
    train_and_save,
)


def make_parser() -> DataclassParser:
    """The command line: model, data and transformers' TrainingArguments, with defaults for a small model."""
    parser = DataclassParser(
        (ModelArguments, DataArguments, TrainingArguments), description=__doc__.split("\n")[0]
    )
    parser.set_defaults(
        output_dir="runs/train",
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        logging_steps=LOGGED_SHARE,
        save_steps=500,
        include_num_input_tokens_seen=True,
        **SMALL_MODEL_DEFAULTS,
    )
    return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train as `argv` says (default: the command line) and return what metrics.json holds."""
    model_args, data_args, args = make_parser().parse_args_into_dataclasses(argv)
    check_training(args)
    check_model(model_args)
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    texts = load_splits(data_args)
    tokenizer = choose_tokenizer(model_args, checkpoint, texts[0])
    model = build_model(model_args, tokenizer)
    trainer = build_trainer(model, tokenizer, texts, data_args.block_size, args)
    draw_course(trainer)
    return train_and_save(
        trainer, lambda: trainer.evaluate()["eval_bits_per_byte"], checkpoint, texts, data_args
    )


__all__ = ["main", "make_parser"]


if __name__ == "__main__":
    run_main(main)
