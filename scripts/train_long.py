# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Train on a text of any length with full backpropagation, and with the state carried all the way through it.

The text is cut into documents, as many as there are rows in a batch if not said otherwise, which are read
side by side. At each step every one of them goes on by `context_length` tokens, through all of which
gradients flow:

    python -m scripts.train_long --config configs/long-tiny.json --dataset enwik8 --data_path enwik8 \
        --train_range 0:3600000 --eval_range 3600000:3800000 --context_length 16384 --chunk_size 512 \
        --per_device_train_batch_size 4 --max_steps 100 --output_dir runs/long

With states stored in files instead of computed backwards; with truncated backpropagation, to compare:

    python -m scripts.train_long ... --backpropagation stored --state_storage /tmp
    python -m scripts.train_long ... --backpropagation truncated

Otherwise the options, and what is written, are those of scripts.train; `--block_size` says nothing here.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from experiments.command_line import COUNT, DataclassParser, run_main
from experiments.data import DataArguments, encode, load_splits
from experiments.report import bits_per_byte
from experiments.training import (
    SMALL_MODEL_DEFAULTS,
    ModelArguments,
    build_model,
    check_model,
    check_training,
    choose_tokenizer,
    find_checkpoint,
    train_and_save,
)
from stackformer.training.long_context_trainer import LongContextArguments, LongContextTrainer, streams_files


@dataclass
class LongDataArguments(DataArguments):
    num_documents: int | None = field(
        default=None, metadata={"help": "Documents to cut the training text into; the rows of a batch."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        COUNT.check("num_documents", self.num_documents)


def make_parser() -> DataclassParser:
    """The command line: model, data and LongContextArguments, with defaults for a small model."""
    parser = DataclassParser(
        (ModelArguments, LongDataArguments, LongContextArguments), description=__doc__.split("\n")[0]
    )
    parser.set_defaults(
        output_dir="runs/train-long",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=1,
        logging_steps=1,
        save_steps=100,
        **SMALL_MODEL_DEFAULTS,
    )
    return parser


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: tuple[bytes, bytes],
    num_documents: int | None,
    args: LongContextArguments,
) -> LongContextTrainer:
    """A trainer on the training text in parts of the same length, evaluated on the other text in one."""
    train_ids, eval_ids = (encode(text, tokenizer) for text in texts)
    if len(eval_ids) < 2:
        raise ValueError(f"eval_range: expected at least 2 tokens to evaluate, got {len(eval_ids)}.")
    parts = num_documents or args.train_batch_size * args.world_size
    if not 1 <= parts <= len(train_ids) // 2:
        raise ValueError(f"num_documents={parts}: expected 1 to {len(train_ids) // 2}, half of the tokens.")
    return LongContextTrainer(
        model,
        args,
        train_dataset=np.array_split(train_ids, parts),
        eval_dataset=[eval_ids],
        processing_class=tokenizer,
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train as `argv` says (default: the command line) and return what metrics.json holds."""
    model_args, data_args, args = make_parser().parse_args_into_dataclasses(argv)
    check_training(args)
    check_model(model_args)
    checkpoint = find_checkpoint(args, streams_files(args))
    set_seed(args.seed)
    texts = load_splits(data_args)
    tokenizer = choose_tokenizer(model_args, checkpoint, texts[0])
    model = build_model(model_args, tokenizer)
    trainer = build_trainer(model, tokenizer, texts, data_args.num_documents, args)
    num_eval_tokens = len(trainer.eval_dataset[0])

    def measure() -> float:
        return bits_per_byte(trainer.evaluate()["eval_loss"], num_eval_tokens, len(texts[1]))

    return train_and_save(trainer, measure, checkpoint, texts, data_args)


if __name__ == "__main__":
    run_main(main)
