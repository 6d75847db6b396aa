# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Memories on disk: the state of a cache as safetensors, and a JSON that says which model it belongs to.

A memory only means something to the model that wrote it, so a file names its model by a fingerprint of the
weights and by those fields of the configuration that shape the state. A mismatch, a damaged file or an
unknown version is an error.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

FORMAT_VERSION = 1
TENSORS_FILE = "memory.safetensors"
JSON_FILE = "memory.json"

# Fields that change neither the state nor what the model makes of it, or that may be moved at inference.
_FREE_FIELDS = {
    "chunk_size", "halting_threshold", "initializer_range", "ponder_loss_coef", "tie_word_embeddings",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip

Slices = list[dict[int, tuple[Tensor, ...]]]


def model_identity(model: PreTrainedModel) -> dict[str, Any]:
    """What a memory knows its model by: the architecture, and a SHA-256 of the weights without any head."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.base_model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    fields = [
        name for name in type(model.config).__annotations__ if name not in {*_FREE_FIELDS, "model_type"}
    ]
    return {
        "config": {name: getattr(model.config, name) for name in sorted(fields)},
        "fingerprint": digest.hexdigest(),
    }


def write_memory(
    directory: str | os.PathLike, slices: Slices, seen_tokens: int, identity: dict[str, Any]
) -> None:
    """Write the state (of each layer, by slice) to `directory`. Files appear whole; the JSON comes last."""
    tensors = {
        f"layer.{layer}.slice.{index}.{part}": tensor.detach().cpu().contiguous()
        for layer, states in enumerate(slices)
        for index, state in states.items()
        for part, tensor in enumerate(state)
    }
    data = save(tensors)
    description = {
        "format": "stackformer-memory",
        "format_version": FORMAT_VERSION,
        "seen_tokens": seen_tokens,
        "batch_size": len(next(iter(tensors.values()))),
        "tensors": {"file": TENSORS_FILE, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "model": identity,
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=2) + "\n"
    for name, content in ((TENSORS_FILE, data), (JSON_FILE, text.encode())):
        (folder / f"{name}.partial").write_bytes(content)
    for name in (TENSORS_FILE, JSON_FILE):
        (folder / f"{name}.partial").replace(folder / name)


def read_memory(
    json_path: str | os.PathLike, tensors_path: str | os.PathLike, identity: dict[str, Any], num_layers: int
) -> tuple[Slices, int]:
    """The state and the number of tokens seen, if the files are whole and belong to the model of `identity`.

    Raises:
        ValueError: for files that are damaged, of another format or version, or of another model.
    """
    description = _read_description(json_path)
    _check_identity(description["model"], identity, json_path)
    data = Path(tensors_path).read_bytes()
    expected = description["tensors"]
    if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise ValueError(
            f"{tensors_path} is damaged or not the file that {json_path} describes: expected "
            f"{expected['bytes']} bytes with SHA-256 {expected['sha256'][:12]}..., got {len(data)} bytes"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{tensors_path} is no safetensors file: {error}") from error
    return _unflatten(tensors, num_layers), description["seen_tokens"]


def _read_description(path: str | os.PathLike) -> dict[str, Any]:
    try:
        description = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: expected the JSON of a Stackformer memory ({error})") from error
    if not isinstance(description, dict) or description.get("format") != "stackformer-memory":
        raise ValueError(f"{path} is not a Stackformer memory: expected `format` to be 'stackformer-memory'")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}, expected {FORMAT_VERSION}")
    missing = {"seen_tokens", "tensors", "model"} - description.keys()
    if missing:
        raise ValueError(f"{path} is damaged: expected the keys {sorted(missing)}, too")
    return description


def _check_identity(found: dict[str, Any], expected: dict[str, Any], path: str | os.PathLike) -> None:
    names = found["config"].keys() | expected["config"].keys()
    differing = {
        name: (found["config"].get(name), expected["config"].get(name))
        for name in sorted(names)
        if found["config"].get(name) != expected["config"].get(name)
    }
    if differing:
        details = ", ".join(
            f"{name}={theirs!r} instead of {ours!r}" for name, (theirs, ours) in differing.items()
        )
        raise ValueError(f"{path} is the memory of a model with another configuration: {details}")
    if found["fingerprint"] != expected["fingerprint"]:
        raise ValueError(
            f"{path} is the memory of a model with other weights (or the same in another dtype): fingerprint "
            f"{found['fingerprint'][:12]}..., expected {expected['fingerprint'][:12]}..."
        )


def _unflatten(tensors: dict[str, Tensor], num_layers: int) -> Slices:
    slices: list[dict[int, dict[int, Tensor]]] = [{} for _ in range(num_layers)]
    for name, tensor in tensors.items():
        _, layer, _, index, part = name.split(".")
        slices[int(layer)].setdefault(int(index), {})[int(part)] = tensor
    return [
        {index: tuple(parts[i] for i in range(len(parts))) for index, parts in sorted(states.items())}
        for states in slices
    ]
