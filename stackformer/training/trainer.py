# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer with ponder steps in its log, decay for weights only, and complete checkpoints.

The log shows a collapse of the depth as it happens. Any other Trainer can train the model, too, with the same
loss. Each addition is a class of its own, which can be put before any Trainer class.
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

# Below both thresholds, nearly every token is done after one step. This is final, because steps that are not
# computed have no gradient.
COLLAPSED_STEPS, COLLAPSED_ENTROPY = 1.05, 0.2


# Parameters without weight decay, besides biases and norms, by a part of their names. The Trainer goes by
# names, too. A mark on the parameter (`_no_weight_decay` in other models) would be lost in loading, copying
# and sharding, and the Trainer does not read it.
UNDECAYED = re.compile(r"(?:^|\.)(?:step_gate|time_decay|time_first|shift|initial_memory|persistent)(?:$|\.)")


class PonderLogging:
    """Put before a Trainer class to log how deep the model ponders: `class Mine(PonderLogging, SFTTrainer)`.

    The log has means over all tokens except padding, since the last log entry, over all processes. An
    evaluation has them among its metrics, over its own tokens, with its prefix ("eval_", "eval_NAME_" for one
    of several data sets, "test_" for `predict`):

    - `ponder_steps`, `ponder_steps_std`: mean and spread of the tokens' expected ponder steps
    - `ponder_entropy`: of the step at which mass is dropped, in nats; 0 if all mass is dropped at one step
    - `ponder_computed`: share of the token-steps that were computed, up to `halting_threshold`
    - `ponder_dropped_1` ...: mass dropped at each step

    If the depth collapses in training, a warning says so, once. A GPU is read only when a log entry is
    written.

    The tokens are those that the model reads for the loss, for any kind of loss. Tokens that the Trainer
    generates in between (as GRPO does) do not count.
    """

    # Sums of `ponder_sums` in training (True) and evaluation (False). A Trainer replaces the shared default.
    _ponder_sums: Mapping[bool, Tensor] = MappingProxyType({})
    _watching = False
    _warned_of_collapse = False

    def compute_loss(self, model, *args, **kwargs):
        """As in the Trainer. Adds up the depth that the model's outputs report."""
        with self._watch(model):
            return super().compute_loss(model, *args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As in the Trainer. Adds up the depth here if rows have no labels, and thus no loss."""
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
        """As in the Trainer, with the depth since the last entry beside the training loss."""
        if "loss" in logs and (metrics := self._take_metrics(training=True)):
            self._warn_of_collapse(metrics)
            logs = {**logs, **metrics}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _watch(self, model: nn.Module) -> Iterator[None]:
        """Add up the depth of all tokens that `model` reads in the block.

        A hook reads the outputs, because not every Trainer returns them, and because TRL's Trainers replace
        the forward of the head, which then drops the depth.
        """
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
        """Returns the sums since the last call, and clears them."""
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
    """Put before a Trainer class to restrict its weight decay to weights.

    The Trainer exempts biases and norms, by their names. This class also exempts `UNDECAYED`: gates that
    start small, rates of forgetting, mixtures with the token before, and the initial value of a memory.
    Weight decay pulls a parameter to zero, which is not neutral for these: a gate of zero turns a ponder step
    off.
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the names of the parameters with weight decay."""
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in names if not UNDECAYED.search(name)]


class EvaluatedFirst:
    """Put before a Trainer class that may evaluate a model before training, in several processes.

    An evaluation prepares the model without wrapping it for training, and accelerate prepares a model only
    once. So the training after it would not exchange gradients, and each process would train its own model.
    """

    def train(self, *args, **kwargs):
        """As in the Trainer, with the model prepared for training again."""
        trainer: Any = self
        wraps = trainer.args.parallel_mode == ParallelMode.DISTRIBUTED
        wraps = wraps and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        if wraps and not isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel):
            # Remove the wrappers of an evaluation: autocast, a compiler.
            extract_model_from_parallel(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=True)
            trainer.model_wrapped = trainer.model
            vars(trainer.model).pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)  # type: ignore[misc]


class StackformerTrainer(PonderLogging, SelectiveDecay, WholeCheckpoints, EvaluatedFirst, Trainer):
    """transformers' [`Trainer`] with the depth in its log, weight decay for weights only, complete
    checkpoints, and evaluation before training: see [`PonderLogging`], [`SelectiveDecay`],
    [`WholeCheckpoints`] and [`EvaluatedFirst`]. Its losses are means over the labels that the model counts,
    without padding.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            self._check_deepspeed()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """As in the Trainer, for the labels that the model's loss counts."""
        return super()._get_num_items_in_batch([_with_counted_labels(x) for x in batch_samples], device)

    def _check_deepspeed(self) -> None:
        """Raises a ValueError for ZeRO-2 and ZeRO-3 if tokens can halt at different depths.

        These stages add up the gradients of the processes in the order in which each process computes them.
        The order differs between depths, and parameters would get the gradients of other parameters.
        """
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
    """Returns a batch with only the labels that the model's loss counts.

    Padding predicts no label, nor does the last token of a packed document.
    """
    if not isinstance(batch, Mapping) or "shift_labels" in batch or batch.get("labels") is None:
        return batch
    labels = batch["labels"]
    names = ("attention_mask", "position_ids", "seq_idx", "cu_seq_lens_q")
    others: dict[str, Any] = {name: batch.get(name) for name in names}
    counted = label_each_token(labels.shape, labels, None, **others)
    return {**batch, "labels": nn.functional.pad(counted[:, :-1], (1, 0), value=-100)}


def _reader(model: nn.Module) -> nn.Module:
    """Returns the part of `model` that reads the tokens: the innermost model, without head and wrappers.

    A compiled model is returned as it is, because a hook inside would be compiled, too. So is a model that is
    copied to several GPUs.
    """
    if isinstance(model, nn.DataParallel) or is_compiled_module(model):
        return model
    return [model, *(module for module in model.modules() if isinstance(module, PreTrainedModel))][-1]


def ponder_sums(distribution: Tensor) -> Tensor:
    """Returns sums [4 + P] over the tokens of a distribution over halting steps [B, T, P].

    The sums, for `ponder_metrics`, are of 1, the expected steps, their square, the computed steps, and the
    mass dropped at each of the P steps.
    """
    tokens = distribution.flatten(0, 1).float()
    ones = tokens.any(-1).float()  # not padding
    mean = expected_steps(tokens)
    numbers = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device)
    # The last step at which a token was computed is the one that flushed the rest of its mass.
    computed = ((tokens > 0) * numbers).amax(-1).float()
    return torch.cat([torch.stack([ones, mean, mean.square(), computed], dim=-1), tokens], dim=-1).sum(0)


def ponder_metrics(sums: Tensor) -> dict[str, float]:
    """Returns the values that [`PonderLogging`] logs, from sums of `ponder_sums`."""
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
