# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer with ponder steps in its log, so that a collapse of the depth is seen as it happens.

Not needed to train: the model's loss is complete without it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from .processing_stack import entropy, expected_steps

logger = logging.get_logger(__name__)

# Below both, practically every token is done after one step, and stays so: what is no more computed has no
# gradient.
COLLAPSED_STEPS, COLLAPSED_ENTROPY = 1.05, 0.2


class PonderLogging:
    """Put before a Trainer class to log how deep the model ponders: `class Mine(PonderLogging, SFTTrainer)`.

    Logged are means over the tokens, padding apart, since the last log entry, over all processes; with the
    prefix "eval_" in evaluation:

    - `ponder_steps`, `ponder_steps_std`: mean of the tokens' expected ponder steps, and its spread
    - `ponder_entropy`: of the step at which mass is dropped, in nats; 0 if all of it is at the same
    - `ponder_computed`: share of the token-steps that were computed, up to `halting_threshold`
    - `ponder_dropped_1` ...: mass dropped at each step

    A warning, once, tells that the depth collapsed in training. Nothing is read from a GPU but when a log
    entry is written.
    """

    _ponder_sums: dict[bool, Tensor]  # by whether in training
    _warned_of_collapse = False

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """As in the Trainer; the outputs' `ponder_distribution` is added up."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        distribution = outputs.get("ponder_distribution") if isinstance(outputs, Mapping) else None
        if distribution is not None and distribution.shape[-1] > 1:
            self.__dict__.setdefault("_ponder_sums", {})
            sums = ponder_sums(distribution.detach())
            self._ponder_sums[model.training] = self._ponder_sums.get(model.training, 0) + sums
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in the Trainer, with what was added up since the last time."""
        training = "loss" in logs
        sums = self.__dict__.get("_ponder_sums", {}).pop(training, None)
        if sums is not None and (training or any(name.startswith("eval_") for name in logs)):
            sums = self.accelerator.reduce(sums, "sum")  # type: ignore[attr-defined]
            metrics = ponder_metrics(sums)
            if training:
                self._warn_of_collapse(metrics)
            logs = {**logs, **{("" if training else "eval_") + name: x for name, x in metrics.items()}}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _warn_of_collapse(self, metrics: dict[str, float]) -> None:
        shallow = metrics["ponder_steps"] < COLLAPSED_STEPS and metrics["ponder_entropy"] < COLLAPSED_ENTROPY
        if shallow and not self._warned_of_collapse:
            self._warned_of_collapse = True
            logger.warning(
                f"Pondering has collapsed: tokens are done after {metrics['ponder_steps']:.2f} ponder steps "
                "on average, nearly all of them after one. A lower learning rate or `ponder_loss_coef`, or "
                '`ponder_loss_type="geometric_prior"`, keeps the depth; see docs/training.md.'
            )


class StackformerTrainer(PonderLogging, Trainer):
    """transformers' [`Trainer`] that logs how deep the model ponders: see [`PonderLogging`]."""


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


__all__ = ["PonderLogging", "StackformerTrainer"]
