# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer with ponder steps in its log, so that a collapse of the depth is seen as it happens,
with weight decay for weights only, and with checkpoints that are complete.

Not needed to train: the model's loss is complete without it. Each of these is a class of its own, to be put
before any other Trainer.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.training_args import ParallelMode
from transformers.utils import logging

from ..labels import label_each_token
from ..processing_stack import entropy, expected_steps
from .checkpoints import WholeCheckpoints

logger = logging.get_logger(__name__)

# Below both, practically every token is done after one step, and stays so: what is no more computed has no
# gradient.
COLLAPSED_STEPS, COLLAPSED_ENTROPY = 1.05, 0.2


# Parameters of the model without weight decay, beside biases and norms: by a part of their name, which is how
# the Trainer tells those. A mark on the parameter (`_no_weight_decay` in other models) would be lost in
# loading, copying and sharding, and the Trainer does not ask for it.
UNDECAYED = re.compile(r"(?:^|\.)(?:step_gate|time_decay|time_first|shift|initial_memory|persistent)(?:$|\.)")


class PonderLogging:
    """Put before a Trainer class to log how deep the model ponders: `class Mine(PonderLogging, SFTTrainer)`.

    Logged are means over the tokens, padding apart, since the last log entry, over all processes; for an
    evaluation they are among its metrics, over its tokens alone, with the prefix of these ("eval_", or
    "eval_NAME_" where there are several data sets; "test_" of `predict`):

    - `ponder_steps`, `ponder_steps_std`: mean of the tokens' expected ponder steps, and its spread
    - `ponder_entropy`: of the step at which mass is dropped, in nats; 0 if all of it is at the same
    - `ponder_computed`: share of the token-steps that were computed, up to `halting_threshold`
    - `ponder_dropped_1` ...: mass dropped at each step

    A warning, once, tells that the depth collapsed in training. Nothing is read from a GPU but when a log
    entry is written.

    The tokens are those that the model reads for the loss, whatever the Trainer makes the loss of; what it
    generates in between (as GRPO does) does not count.
    """

    # Sums of `ponder_sums`, by whether in training; shared defaults, replaced by each Trainer's own.
    _ponder_sums: Mapping[bool, Tensor] = MappingProxyType({})
    _watching = False
    _warned_of_collapse = False

    def compute_loss(self, model, *args, **kwargs):
        """As in the Trainer; what the model's outputs say of its depth is added up."""
        with self._watch(model):
            return super().compute_loss(model, *args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As in the Trainer, which calls the model itself where rows have no labels, and so no loss."""
        names = self.label_names  # type: ignore[attr-defined]
        unlabelled = isinstance(inputs, Mapping) and any(inputs.get(name) is None for name in names)
        with self._watch(model) if unlabelled else nullcontext():
            return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As in the Trainer, with the depth among the metrics."""
        self._take_sums(training=False)
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = self._take_metrics(training=False)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in the Trainer; with the training loss goes the depth since the last time."""
        if "loss" in logs and (metrics := self._take_metrics(training=True)):
            self._warn_of_collapse(metrics)
            logs = {**logs, **metrics}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _watch(self, model: nn.Module) -> Iterator[None]:
        """Add up the depth of all that `model` reads meanwhile. A hook sees the outputs, because not every
        Trainer returns them, and those of TRL replace the forward of the head, which then drops the depth."""
        if self._watching:
            yield
            return
        handle = _reader(model).register_forward_hook(self._add_outputs)
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
            handle.remove()

    def _add_outputs(self, model: nn.Module, _: Any, outputs: Any) -> None:
        distribution = outputs.get("ponder_distribution") if isinstance(outputs, Mapping) else None
        if distribution is not None and distribution.shape[-1] > 1:
            sums = ponder_sums(distribution.detach())
            before = self._ponder_sums.get(model.training, 0)
            self._ponder_sums = {**self._ponder_sums, model.training: before + sums}

    def _take_sums(self, training: bool) -> Tensor | None:
        """What was added up since the last time."""
        sums = self._ponder_sums.get(training)
        self._ponder_sums = {key: x for key, x in self._ponder_sums.items() if key != training}
        return sums

    def _take_metrics(self, training: bool) -> dict[str, float]:
        sums = self._take_sums(training)
        if sums is None:
            return {}
        return ponder_metrics(self.accelerator.reduce(sums, "sum"))  # type: ignore[attr-defined]

    def _warn_of_collapse(self, metrics: dict[str, float]) -> None:
        shallow = metrics["ponder_steps"] < COLLAPSED_STEPS and metrics["ponder_entropy"] < COLLAPSED_ENTROPY
        if shallow and not self._warned_of_collapse:
            self._warned_of_collapse = True
            logger.warning(
                f"Pondering has collapsed: tokens are done after {metrics['ponder_steps']:.2f} ponder steps "
                "on average, nearly all of them after one. A lower learning rate or `ponder_loss_coef`, or "
                '`ponder_loss_type="geometric_prior"`, keeps the depth; see docs/training.md.'
            )


class SelectiveDecay:
    """Put before a Trainer class to keep its weight decay to weights.

    The Trainer exempts biases and norms, by their names. Here `UNDECAYED` are exempt, too: gates that start
    small, rates of forgetting, mixtures with the token before, and what a memory starts from. A decay pulls
    these to zero, which is no neutral value of theirs: a ponder step with a gate of zero is none.
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters that weight decay is for."""
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if not UNDECAYED.search(name)]


class EvaluatedFirst:
    """Put before a Trainer class that may evaluate a model before it trains it, in several processes.

    An evaluation prepares the model without wrapping it, and accelerate prepares nothing twice: the training
    after it would not exchange gradients, and every process would train a model of its own.
    """

    def train(self, *args, **kwargs):
        """As in the Trainer, with a model that is prepared for training."""
        trainer: Any = self
        wraps = trainer.args.parallel_mode == ParallelMode.DISTRIBUTED
        wraps = wraps and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        if wraps and not isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel):
            # Taken out of what an evaluation put around it: autocast, a compiler.
            extract_model_from_parallel(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=True)
            trainer.model_wrapped = trainer.model
            vars(trainer.model).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)  # type: ignore[misc]


class StackformerTrainer(PonderLogging, SelectiveDecay, WholeCheckpoints, EvaluatedFirst, Trainer):
    """transformers' [`Trainer`] that logs how deep the model ponders, decays no gate and no memory, leaves no
    checkpoint half-written, and may be evaluated first: see [`PonderLogging`], [`SelectiveDecay`],
    [`WholeCheckpoints`] and [`EvaluatedFirst`]. Its losses are means over the labels that the model counts,
    which are none of padding.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            self._check_deepspeed()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """As in the Trainer, of the labels that the model's loss counts."""
        return super()._get_num_items_in_batch([_with_counted_labels(x) for x in batch_samples], device)

    def _check_deepspeed(self) -> None:
        """ZeRO-2 and ZeRO-3 add up the gradients of the processes in the order in which each has them. Where
        tokens halt at different depths that order differs, and parameters get the gradients of others."""
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        stage = settings.get("zero_optimization", {}).get("stage", 0)
        config = self.model.config.to_dict()
        halts = config.get("max_ponder_steps", 1) > 1 and config.get("halting_threshold", 0) > 0
        if stage > 1 and halts:
            raise ValueError(
                "DeepSpeed's `zero_optimization.stage` must be 0 or 1 for a model whose tokens halt at "
                f"different depths (or `halting_threshold` 0), got {stage}"
            )


def _with_counted_labels(batch: Any) -> Any:
    """A batch whose labels are those that the model's loss counts: what padding, or the end of the document
    before, would predict is no label."""
    if not isinstance(batch, Mapping) or "shift_labels" in batch or batch.get("labels") is None:
        return batch
    labels = batch["labels"]
    names = ("attention_mask", "position_ids", "seq_idx", "cu_seq_lens_q")
    others: dict[str, Any] = {name: batch.get(name) for name in names}
    counted = label_each_token(labels.shape, labels, None, **others)
    return {**batch, "labels": nn.functional.pad(counted[:, :-1], (1, 0), value=-100)}


def _reader(model: nn.Module) -> nn.Module:
    """The part of `model` that reads the tokens: the innermost model, without head and wrappers. A compiled
    model is taken as it is, since a hook inside would be compiled, too; so is one that is copied to several
    GPUs."""
    if isinstance(model, nn.DataParallel) or is_compiled_module(model):
        return model
    return [model, *(module for module in model.modules() if isinstance(module, PreTrainedModel))][-1]


def ponder_sums(distribution: Tensor) -> Tensor:
    """Sums over the tokens of a distribution over halting steps [B, T, P], for `ponder_metrics`: [4 + P].

    They are of 1, the expected steps, their square, and the computed steps; then of the mass dropped at each
    step.
    """
    tokens = distribution.flatten(0, 1).float()
    ones = tokens.any(-1).float()  # not padding
    mean = expected_steps(tokens)
    numbers = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device)
    # The step at which the rest of its mass was flushed is the last at which a token was computed.
    computed = ((tokens > 0) * numbers).amax(-1).float()
    return torch.cat([torch.stack([ones, mean, mean.square(), computed], dim=-1), tokens], dim=-1).sum(0)


def ponder_metrics(sums: Tensor) -> dict[str, float]:
    """What [`PonderLogging`] logs, from sums of `ponder_sums`."""
    (count, *_), max_steps = sums.tolist(), len(sums) - 4
    mean, square, computed, *_ = (sums[1:] / max(count, 1)).tolist()
    dropped = sums[4:] / max(count, 1)
    metrics: dict[str, Any] = {
        "ponder_steps": mean,
        "ponder_steps_std": max(square - mean**2, 0.0) ** 0.5,
        "ponder_entropy": float(entropy(dropped)),
        "ponder_computed": computed / max_steps,
    }
    metrics |= {f"ponder_dropped_{step}": mass for step, mass in enumerate(dropped.tolist(), start=1)}
    return {name: round(value, 4) for name, value in metrics.items()}


__all__ = ["EvaluatedFirst", "PonderLogging", "SelectiveDecay", "StackformerTrainer"]
