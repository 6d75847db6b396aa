# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Identifies the model to which a memory belongs.

Only the model that filled a memory can continue from it. Inside of a process, every model has a mark, and its
caches carry this mark. In files, a model is identified by the fields of its configuration that shape the
state, and by a digest of its weights, which include those of active adapters only.
"""

import hashlib
import itertools
import json
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.modeling_utils import PreTrainedModel

from .configuration_stackformer import StackformerConfig

# Fields that affect neither the state nor its use, or that may be changed at inference.
_FREE_FIELDS = {
    "chunk_size", "density_loss_coef", "density_prior_mean", "density_prior_width", "halting_threshold",
    "initializer_range", "ponder_loss_coef", "ponder_loss_type", "ponder_prior", "tie_word_embeddings",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip
# Number of elements of each weight in the quick digest.
_SAMPLES = 8

_numbers = itertools.count(1)


class Mark:
    """The identity of the model that filled a cache.

    It holds a weak reference to the model. When the model is gone, its configuration, the names of its
    adapters and the digest `sample` remain.

    Args:
        model: the base model.
        number: a number that no other model of this process has.
        sample: digest of a few elements of all weights; `None` if it is not known.
    """

    def __init__(self, model: PreTrainedModel, number: int, sample: str | None):
        self.number, self.sample = number, sample
        self.config, self.adapters = identity_fields(model), active_adapters(model)
        self._model: weakref.ref | None = weakref.ref(model)

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, or `None` if it is gone."""
        return None if self._model is None else self._model()

    def __getstate__(self) -> dict[str, Any]:
        """Pickles leave out the model, and the number, which is valid in this process only."""
        return {**self.__dict__, "number": 0, "_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mark":
        return self  # a copy of a cache belongs to the same model

    def difference(self, model: PreTrainedModel) -> str | None:
        """Describes how the model of this mark differs from `model`; `None` if no difference is known."""
        if self.model is model:
            return None
        if self.model is not None:
            return find_difference(model_identity(self.model), model_identity(model))
        # The model is gone, so only its configuration and the digest of a few of its weights can be compared.
        found, expected = self.sample, None if self.sample is None else sample_digest(model)
        return find_difference(
            {"config": self.config, "fingerprint": found},
            {"config": identity_fields(model), "fingerprint": expected},
        )


def new_number() -> int:
    """Returns a number that no other model of this process has."""
    return next(_numbers)


def unwrap(model: Any) -> PreTrainedModel:
    """Returns the base model inside of heads and of the wrappers of accelerate, torch.compile, DDP and PEFT.

    Raises:
        ValueError: if there is no Stackformer inside.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, PreTrainedModel) and module.config.model_type == "stackformer":
            return module.base_model
    raise ValueError(f"`model` must be a Stackformer, possibly wrapped, got {type(model).__name__}")


def model_identity(model: Any) -> dict[str, Any]:
    """Returns the architecture of a model, and a SHA-256 of its weights without any head.

    Returns:
        `config`, see `identity_fields`, and `fingerprint`, the SHA-256 in hexadecimal digits.
    """
    model, digest = unwrap(model), hashlib.sha256()
    for name, tensor in sorted(_active_weights(model), key=lambda item: item[0]):
        if name.endswith(".weight.absmax"):  # bitsandbytes rounds and reorders these when it first uses them
            tensor = tensor.flatten().to(torch.bfloat16).sort().values
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _plain_parts(tensor):
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {"config": identity_fields(model), "fingerprint": digest.hexdigest()}


@torch.compiler.assume_constant_result  # torch.compile cannot trace json
def identity_fields(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the fields of a model's configuration that affect its state or its use, as JSON values."""
    names = set(type(model.config).__annotations__) - _FREE_FIELDS - {"model_type"}
    return json.loads(json.dumps({name: getattr(model.config, name) for name in sorted(names)}))


def find_difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Describes how two models differ, given their `model_identity`; `None` if they are the same.

    A field that `found` lacks has its default value, because an older version may have written `found`.
    """
    config = {**StackformerConfig().to_dict(), **found["config"]}
    fields = [name for name, value in expected["config"].items() if config[name] != value]
    if fields:
        return "another configuration: " + ", ".join(
            f"{name}={config[name]!r} instead of {expected['config'][name]!r}" for name in fields
        )
    if found["fingerprint"] != expected["fingerprint"]:
        return (
            "other weights (or the same in another dtype, or other active adapters): fingerprint "
            f"{found['fingerprint'][:12]}..., expected {expected['fingerprint'][:12]}..."
        )
    return None


def active_adapters(model: PreTrainedModel) -> frozenset[str]:
    """Returns the names of the adapters that are active in the model."""
    if "peft" not in sys.modules:
        return frozenset()
    return frozenset(
        name
        for module in model.modules()
        if getattr(module, "adapter_layer_names", None) is not None and not module.disable_adapters
        for name in module.active_adapters
    )


@torch.no_grad()
def sample_digest(model: PreTrainedModel) -> str:
    """Returns a digest of names, shapes and a few elements of all weights.

    It distinguishes models without reading all their weights.
    """
    digest, samples = hashlib.sha256(), []
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        if type(parameter) is nn.Parameter and parameter.device.type != "meta" and parameter.numel():
            step = max(parameter.numel() // _SAMPLES, 1)
            samples.append(parameter.detach().flatten()[::step][:_SAMPLES].double().cpu())
    if samples:
        digest.update(torch.cat(samples).numpy().data)
    return digest.hexdigest()


def _active_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of the model and of active adapters, under their names in a model without adapters.

    PEFT wraps a module that has an adapter. The module itself becomes `base_layer` or `original_module`. The
    weights of each adapter are in dictionaries of the wrapper, which `adapter_layer_names` lists.
    """
    active_by_prefix: dict[str, set[str]] = {}  # active adapters, by the prefix of adapters' weights
    wrapped: list[str] = []
    for name, module in model.named_modules():
        layer_names = getattr(module, "adapter_layer_names", None)
        if layer_names is None:
            continue
        active = set() if module.disable_adapters else set(module.active_adapters)
        wrapped.append(name)
        for layer_name in layer_names:
            active_by_prefix[f"{name}.{layer_name}."] = active
        for adapter, scaling in getattr(module, "scaling", {}).items():
            if adapter in active:
                yield f"{name}.scaling.{adapter}", torch.tensor(float(scaling))
    for name, tensor in _all_weights(model):
        prefix = next((prefix for prefix in active_by_prefix if name.startswith(prefix)), None)
        if prefix is not None and name.removeprefix(prefix).split(".")[0] not in active_by_prefix[prefix]:
            continue
        for wrapper in wrapped:
            for inner in ("base_layer", "original_module"):
                name = name.replace(f"{wrapper}.{inner}.", f"{wrapper}.")
        yield name, tensor


def _all_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields the state dict, including weights that accelerate keeps on disk or in main memory."""
    offloaded: dict[str, tuple[Mapping[str, Tensor], str]] = {}  # by name: accelerate's store, and its key
    for prefix, module in model.named_modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.device.type == "meta":
                    offloaded[f"{prefix}.{name}" if prefix else name] = (weights, name)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            weights, key = offloaded.get(name, ({}, ""))
            yield name, weights[key] if name in offloaded else tensor


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the dense tensors of which a tensor consists: itself, or the parts of a quantised tensor."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain_parts(getattr(tensor, name))
    elif tensor.device.type == "meta":
        raise ValueError("`model` must have its weights: some of them are on the meta device, without data")
    else:
        yield tensor
