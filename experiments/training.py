# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Training a causal language model on a text: its options, its Trainer, and the files that it leaves.

scripts/train.py and scripts/train_long.py are the commands.
"""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

import stackformer  # noqa: F401  (importing it registers the Auto classes)
from experiments.command_line import COUNT, NATURAL, NOT_NEGATIVE, check_output_folder
from experiments.data import Blocks, DataArguments, check_tokenizer, encode, load_tokenizer
from experiments.loading import check_source, has_tokenizer, load_model
from experiments.presets import build_config, read_preset
from experiments.report import bits_per_byte, commit, machine_line, write_json
from stackformer.training.checkpoints import PARTIAL, checkpoint_fault, newest_checkpoint, replace_model
from stackformer.training.trainer import StackformerTrainer

logger = logging.get_logger(__name__)


@dataclass
class ModelArguments:
    config: str | None = field(default=None, metadata={"help": "JSON preset of a new model."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'Fields other than in the preset, "name=value,name=value"; lists as JSON.'},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Saved model to start from instead."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "byte, bpe:VOCAB, or a saved tokenizer. Default: byte, or that of --model_name_or_path."
        },
    )


# Defaults of TrainingArguments for a small model, in all training scripts.
SMALL_MODEL_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below one it is a share of the steps
    "save_total_limit": 2,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "report_to": "none",
}

# The loss is logged so often by default: each of so many parts of a run, and at least every so many steps.
LOGGED_SHARE, LOGGED_STEPS = 0.05, 50
# Fewer bytes than these teach a model little more than which bytes there are.
LITTLE_TEXT = 100_000


def check_model(args: ModelArguments) -> None:
    """Raises:
    ValueError: unless there is a preset or a saved model, and all that goes with it fits.
    """
    if (args.config is None) == (args.model_name_or_path is None):
        raise ValueError(
            f"config={args.config!r}, model_name_or_path={args.model_name_or_path!r}: expected exactly one."
        )
    if args.model_name_or_path is not None:
        if args.config_overrides:
            raise ValueError(
                f"config_overrides={args.config_overrides!r}: expected none with model_name_or_path."
            )
        check_source("model_name_or_path", args.model_name_or_path)
    else:
        read_preset(str(args.config), args.config_overrides)
    if args.tokenizer is not None:
        check_tokenizer(args.tokenizer)


def check_training(args: TrainingArguments) -> None:
    """Raises:
    ValueError: for numbers that no training can have, and an output folder that cannot be written to.
    """
    check_output_folder("output_dir", args.output_dir)
    for name in (
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
        "save_total_limit",
    ):  # fmt: skip
        COUNT.check(name, getattr(args, name))
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "warmup_steps"):
        NOT_NEGATIVE.check(name, getattr(args, name))
    for name in ("seed", "data_seed"):
        NATURAL.check(name, getattr(args, name))
    if args.max_steps != -1:
        COUNT.check("max_steps", args.max_steps)
    elif args.num_train_epochs == 0:
        raise ValueError("num_train_epochs=0.0: expected more than 0, or --max_steps.")


def build_model(args: ModelArguments, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A new model from `args.config`, or the saved one of `args.model_name_or_path`; exactly one is given."""
    check_model(args)
    if args.config:
        model = AutoModelForCausalLM.from_config(build_config(args.config, args.config_overrides, tokenizer))
    else:
        model = load_model("model_name_or_path", str(args.model_name_or_path))
    if model.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"vocab_size={model.config.vocab_size}: expected the tokenizer's {len(tokenizer)} or more."
        )
    return model


def choose_tokenizer(
    args: ModelArguments, checkpoint: str | None, train_text: bytes
) -> PreTrainedTokenizerFast:
    """The tokenizer of the checkpoint that a run goes on from, the one asked for, or that of the model.

    A sharded checkpoint has none: there, what was asked for is made once more.
    """
    sources = {
        "resume_from_checkpoint": checkpoint if checkpoint and has_tokenizer(checkpoint) else None,
        "tokenizer": args.tokenizer,
        "model_name_or_path": args.model_name_or_path,
    }
    name, source = next(((name, x) for name, x in sources.items() if x), ("tokenizer", "byte"))
    return load_tokenizer(source, train_text, name)


def block_nll(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood of each block [B], from its logits [B, T, vocab] and labels [B, T].

    Not the model's loss, which may have other terms in it than the likelihood of the text.
    """
    if isinstance(logits, tuple):  # what else the model returns comes after its logits
        logits = logits[0]
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].float().mT, labels[:, 1:], reduction="none")
    return nll.mean(dim=1)


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: tuple[bytes, bytes],
    block_size: int,
    args: TrainingArguments,
) -> Trainer:
    """A Trainer on the blocks of the training text: bits per byte in evaluation, depth in its log.

    A warning tells of a text that is too small to teach much.
    """
    train_ids, eval_ids = (encode(text, tokenizer) for text in texts)
    train_blocks = Blocks(train_ids, block_size, "training")
    eval_blocks = Blocks(eval_ids, block_size, "evaluation")
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    warn_of_little_text(len(texts[0]), len(train_blocks), batch)
    num_eval_bytes = len(texts[1])

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        mean_nll = float(np.mean(prediction.predictions, dtype=np.float64))
        return {"bits_per_byte": bits_per_byte(mean_nll, len(eval_ids), num_eval_bytes)}

    return StackformerTrainer(
        model,
        args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=block_nll,
        callbacks=[LogEvenly()],
    )


def warn_of_little_text(num_bytes: int, num_blocks: int, batch: int) -> None:
    """Say so if a training text can teach a model little, or has not even a batch of blocks."""
    advice = "give a longer text, or a smaller --block_size and --per_device_train_batch_size"
    if num_blocks < batch:
        logger.warning(f"The training text has {num_blocks} blocks, less than a batch of {batch}: {advice}.")
    elif num_bytes < LITTLE_TEXT:
        logger.warning(
            f"The training text has {num_bytes:,} bytes: less than {LITTLE_TEXT:,} teach a language model "
            "little, in any number of epochs."
        )


class LogEvenly(TrainerCallback):
    """Logs at least every `LOGGED_STEPS` steps, if `logging_steps` is the default, `LOGGED_SHARE` of the run.
    The same holds for evaluations that follow the log."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        steps = min(LOGGED_STEPS, math.ceil(LOGGED_SHARE * state.max_steps))
        if args.logging_steps == LOGGED_SHARE:
            state.logging_steps = steps
        if args.eval_steps == LOGGED_SHARE:
            state.eval_steps = steps


def save(trainer: Trainer) -> None:
    """Save model and tokenizer to the output folder, once all files are written, so that a reader finds the
    model that was there before or this one (see `replace_model`)."""
    output_dir = Path(trainer.args.output_dir)
    partial = output_dir / "_partial-model"  # an underscore keeps it off the Hub
    if trainer.is_world_process_zero():
        for left_over in (partial, output_dir / PARTIAL):  # of a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    config = trainer.model.config
    use_cache, config.use_cache = config.use_cache, True  # the Trainer turns it off, for itself only
    if trainer.is_fsdp_enabled:  # checkpoints may be in parts, a model for others is in one
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(partial))
    config.use_cache = use_cache
    if trainer.is_world_process_zero():
        replace_model(partial, output_dir)


def draw_course(trainer: Trainer) -> None:
    """Have a picture drawn at each evaluation, where it can be; the last one is after the model is saved."""
    if find_spec("matplotlib") is None:
        return
    try:
        from experiments.plot import TrainingPlot
    except Exception as error:  # an installation that does not fit
        logger.warning(f"No picture will be drawn, matplotlib cannot be imported: {error}")
        return
    trainer.add_callback(TrainingPlot(at_end=False))


def train_and_save(
    trainer: Trainer,
    measure: Callable[[], float],
    checkpoint: str | None,
    texts: tuple[bytes, bytes],
    data_args: DataArguments,
) -> dict[str, Any]:
    """Train, save the model, and write metrics.json, which is returned.

    Args:
        measure: the bits per byte of the evaluation text.
        checkpoint: where to go on, or `None`.
    """
    args, model = trainer.args, trainer.model
    # The weights of a checkpoint are read when training starts, so before that there is nothing to measure;
    # nor can models be run before that with DeepSpeed and FSDP.
    later = checkpoint or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    before = None if later else measure()
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    wall_time = time.perf_counter() - started
    save(trainer)
    after = measure()
    model.config.use_cache = True

    metrics = {
        "bits_per_byte_before": before,
        "bits_per_byte": after,
        "seed": args.seed,
        "machine": machine_line(),
        "commit": commit(),
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "wall_time_seconds": round(wall_time, 2),
        "train_bytes": len(texts[0]),
        "eval_bytes": len(texts[1]),
        "data": vars(data_args),
        "config": model.config.to_diff_dict(),
    }
    if trainer.is_world_process_zero():
        write_json(Path(args.output_dir) / "metrics.json", metrics)
        start = f"{before:.4f}" if before is not None else "resumed" if checkpoint else "new"
        print(f"bits per byte: {start} -> {after:.4f} after {metrics['steps']} steps in {wall_time:.1f} s")
        print(metrics["machine"])
    return metrics


def find_checkpoint(args: TrainingArguments, files: Sequence[str] = ()) -> str | None:
    """Finds the checkpoint to resume from: a path, the newest complete one for "last", or None.

    Args:
        files: that it must have, beside those of any checkpoint.

    Raises:
        ValueError: if there is none, or the one that is named is not complete.
    """
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None:
        return None
    needs = {"num_processes": args.world_size, "model_only": args.save_only_model, "files": files}
    if checkpoint == "last":
        found = newest_checkpoint(args.output_dir, **needs)
        if found is None:
            raise ValueError(
                f"resume_from_checkpoint='last': expected a complete checkpoint in {args.output_dir!r}."
            )
        return found
    if not Path(checkpoint).is_dir():
        raise ValueError(f"resume_from_checkpoint={checkpoint!r}: expected a checkpoint folder or 'last'.")
    if fault := checkpoint_fault(checkpoint, **needs):
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r}: expected a complete checkpoint, but {fault}."
        )
    return checkpoint


__all__ = [
    "LITTLE_TEXT",
    "LOGGED_SHARE",
    "LOGGED_STEPS",
    "SMALL_MODEL_DEFAULTS",
    "ModelArguments",
    "block_nll",
    "build_model",
    "build_trainer",
    "check_model",
    "check_training",
    "choose_tokenizer",
    "draw_course",
    "find_checkpoint",
    "save",
    "train_and_save",
    "warn_of_little_text",
]
