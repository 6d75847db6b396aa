# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Memories on disk: the state of a cache as one safetensors file that identifies the model it belongs to.

The metadata of the file holds a description as JSON: the format version, the number of tokens seen, the
identity of the model (identity.py) and a SHA-256 of the description and the tensors. The tensors are called
`layer.<i>.slice.<k>.<name>`, with the names of the mixers' states. A mismatch, a damaged file or an unknown
version is an error.

Version 1 had the description in a second file, `memory.json`, and numbers in place of names. It can still be
read.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .files import write_file
from .identity import find_difference
from .state import State, StateSpec, TensorSpec, find_mismatch

FORMAT, FORMAT_VERSION = "stackformer-memory", 2
MEMORY_FILE = "memory.safetensors"
JSON_FILE = "memory.json"  # of version 1

# The greatest length of a description, in characters, and of the header that holds it, in bytes.
_LONGEST_JSON, _LONGEST_HEADER = 2**20, 2**23
# The largest number of tokens seen that fits into int64.
_MOST_TOKENS = 2**63 - 1

Slices = list[dict[int, State]]


class Memory(NamedTuple):
    """The contents of a memory file."""

    slices: Slices  # by layer, the state of each slice
    seen_tokens: int


def write_memory(
    directory: str | os.PathLike,
    slices: Slices,
    specs: Sequence[StateSpec],
    seen_tokens: int,
    identity: dict[str, Any],
) -> None:
    """Writes the state to `memory.safetensors` in `directory`. The file is replaced as a whole.

    Args:
        slices: by layer, the state of each slice; specs: by layer, the specification of its state.
        seen_tokens: the number of positions seen.
        identity: of the model, see `model_identity`.
    """
    tensors = {
        f"layer.{layer}.slice.{index}.{tensor_spec.name}": tensor.detach().cpu().contiguous()
        for layer, (states, spec) in enumerate(zip(slices, specs, strict=True))
        for index, state in states.items()
        for tensor, tensor_spec in zip(state, spec, strict=True)
    }
    description = {
        "format_version": FORMAT_VERSION,
        "seen_tokens": seen_tokens,
        "batch_size": len(next(iter(tensors.values()))),
        "model": identity,
    }
    description["sha256"] = _digest(description, tensors)
    metadata = {"format": FORMAT, "description": json.dumps(description)}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / MEMORY_FILE, save(tensors, metadata))
    (folder / JSON_FILE).unlink(missing_ok=True)  # it described a memory that is replaced now


def has_description(path: str | os.PathLike) -> bool:
    """Whether a safetensors file holds a description. Files of version 1 do not.

    Raises:
        ValueError: for anything that is no safetensors file.
    """
    with open(path, "rb") as file:
        return "description" in _read_header(file, path).metadata


def read_memory(
    path: str | os.PathLike,
    json_path: str | os.PathLike | None,
    identity: dict[str, Any],
    specs: Sequence[StateSpec],
    num_slices: int,
) -> Memory:
    """Reads a memory, and checks that it is complete and belongs to the model of `identity`.

    Args:
        path: the safetensors file; json_path: the description of version 1, `None` for later versions.
        specs: by layer, the specification of its state; num_slices: the most slices of a layer.

    Raises:
        ValueError: for files that are damaged, of another format or version, or of another model.
    """
    # The file is opened only once, because it may be replaced while it is read. Its tensors are read only
    # after the header has been checked against the model.
    with open(path, "rb") as file:
        header = _read_header(file, path)
        if json_path is None:
            if "description" not in header.metadata:
                raise ValueError(f"{path} is not a Stackformer memory: it has no description")
            text = header.metadata["description"]
            description = _parse_description(text, path, FORMAT_VERSION, {"sha256", "batch_size"})
        else:
            description = _read_json(json_path)
        where = json_path or path
        difference = find_difference(description["model"], identity)
        if difference is not None:
            raise ValueError(f"{where} is the memory of a model with {difference}")
        spelling = {
            (name if json_path is None else f"layer.{layer}.slice.{index}.{part}"): (layer, index, part)
            for layer, spec in enumerate(specs)
            for index in range(num_slices)
            for part, name in enumerate(f"layer.{layer}.slice.{index}.{x.name}" for x in spec)
        }
        if unknown := sorted(set(header.tensors) - spelling.keys()):
            raise ValueError(f"{path} does not fit the model: it has unknown tensors {unknown[:3]}")
        for name, (dtype, shape) in header.tensors.items():
            layer, _, part = spelling[name]
            _check_tensor(path, name, dtype, shape, specs[layer][part], description)
        if json_path is not None and header.size != description["tensors"]["bytes"]:
            raise _not_described(path, header.size, description["tensors"])
        file.seek(0)
        data = file.read()
    if json_path is not None and hashlib.sha256(data).hexdigest() != description["tensors"]["sha256"]:
        raise _not_described(path, len(data), description["tensors"])
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise _no_safetensors(path, error) from error
    if json_path is None and description.pop("sha256") != _digest(description, tensors):
        raise ValueError(f"{path} is damaged: its contents are not what was written")
    slices = _arrange(path, {spelling[name]: tensor for name, tensor in tensors.items()}, specs)
    return Memory(slices, description["seen_tokens"])


class _Header(NamedTuple):
    """The header of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, list[int]]]  # dtype and shape, by name
    size: int  # bytes of the file


def _read_header(file: BinaryIO, path: str | os.PathLike) -> _Header:
    """Reads the header of a safetensors file, and checks the length of the file.

    The safetensors library opens a file twice, for its header and for its tensors. If the file is replaced in
    between, the two come from different files. So this function reads the header of an open file.

    Raises:
        ValueError: for anything that is no safetensors file.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"it has a header of {length} bytes")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != expected:
            raise ValueError(f"it has {size} of {expected} bytes")
        tensors = {name: (entry["dtype"], list(entry["shape"])) for name, entry in header.items()}
        return _Header(dict(metadata), tensors, size)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _no_safetensors(path, error) from error


def _no_safetensors(path: str | os.PathLike, error: Exception) -> ValueError:
    """Returns the error for a file that is no safetensors file."""
    return ValueError(f"{path} is damaged or no memory: expected a safetensors file ({error})")


def _not_described(path: str | os.PathLike, size: int, expected: dict[str, Any]) -> ValueError:
    """Returns the error for a file of version 1 that its description does not fit."""
    return ValueError(
        f"{path} is damaged or not the file that was described: expected {expected['bytes']} bytes with "
        f"SHA-256 {str(expected['sha256'])[:12]}..., got {size} bytes"
    )


def _digest(description: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Returns the SHA-256 of a description and of tensors, in hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads the description of a memory of version 1."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_LONGEST_JSON + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: expected the JSON of a Stackformer memory ({error})") from error
    description = _parse_description(text, path, 1, {"format", "tensors"})
    tensors = description["tensors"]
    if not isinstance(tensors, dict) or not tensors.keys() >= {"bytes", "sha256"}:
        raise ValueError(f"{path} is damaged: expected `bytes` and `sha256` of the tensors, got {tensors!r}")
    return description


def _parse_description(
    text: str, path: str | os.PathLike, version: int, others: Iterable[str]
) -> dict[str, Any]:
    """Parses a description and checks its fields. `others` are the keys that only this version requires."""
    try:
        if len(text) > _LONGEST_JSON:
            raise ValueError(f"it is longer than {_LONGEST_JSON} characters")
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: expected the JSON of a Stackformer memory ({error})") from error
    if not isinstance(description, dict) or ("format" in others and description.get("format") != FORMAT):
        raise ValueError(f"{path} is not a Stackformer memory: expected `format` to be {FORMAT!r}")
    if description.get("format_version") != version:
        raise ValueError(
            f"{path} has format version {description.get('format_version')!r}, expected {version}"
        )
    if missing := sorted({"seen_tokens", "model", *others} - description.keys()):
        raise ValueError(f"{path} is damaged: expected the keys {missing}, too")
    seen, model = description["seen_tokens"], description["model"]
    if type(seen) is not int or not 0 <= seen <= _MOST_TOKENS:
        raise ValueError(f"{path} is damaged: expected `seen_tokens` to be a number of tokens, got {seen!r}")
    if not isinstance(model, dict) or not isinstance(model.get("config"), dict) or "fingerprint" not in model:
        raise ValueError(f"{path} is damaged: expected `model` to have a `config` and a `fingerprint`")
    return description


def _check_tensor(
    path: str | os.PathLike,
    name: str,
    dtype: str,
    shape: list[int],
    spec: TensorSpec,
    description: dict[str, Any],
) -> None:
    """Raises a ValueError for a tensor of another shape or type than specified."""
    kinds = ("I64",) if spec.integer else ("F32", "F64", "F16", "BF16")
    seen = description["seen_tokens"]
    fits = len(shape) == len(spec.shape) + 1 and all(
        size <= seen if expected is None else size == expected
        for size, expected in zip(shape[1:], spec.shape, strict=True)
    )
    rows = description.get("batch_size")
    if dtype not in kinds or not fits or shape[0] < 1 or rows not in (None, shape[0]):
        raise ValueError(f"{path} does not fit the model: {name} is {shape} of {dtype}, expected {spec}")


def _arrange(
    path: str | os.PathLike, tensors: dict[tuple[int, int, int], Tensor], specs: Sequence[StateSpec]
) -> Slices:
    """Arranges tensors by layer and slice, from the keys (layer, slice, number of the tensor in the state).

    Raises:
        ValueError: if tensors are missing or do not fit, or if they hold values that no state can have.
    """
    slices: Slices = [{} for _ in specs]
    for layer, index, _ in sorted(tensors):
        if index in slices[layer]:
            continue
        parts = range(len(specs[layer]))
        if missing := [specs[layer][part].name for part in parts if (layer, index, part) not in tensors]:
            raise ValueError(f"{path} is damaged: slice {index} of layer {layer} has no {missing}")
        state = tuple(tensors[layer, index, part] for part in parts)
        if mismatch := find_mismatch(state, specs[layer]):
            raise ValueError(f"{path} does not fit the model: layer {layer}, slice {index} has {mismatch}")
        if not all(math.isfinite(tensor.sum(dtype=torch.float64)) for tensor in state):
            raise ValueError(f"{path} is damaged: slice {index} of layer {layer} is not finite")
        if any(tensor.dtype == torch.int64 and (tensor < 0).any() for tensor in state):
            raise ValueError(f"{path} is damaged: a counter in slice {index} of layer {layer} is negative")
        slices[layer][index] = state
    present = [states.keys() for states in slices]
    if not present[0] or any(keys != present[0] for keys in present):
        steps = [sorted(keys) for keys in present]
        raise ValueError(f"{path} is damaged: its layers have states of different ponder steps, {steps}")
    if len({len(state[0]) for states in slices for state in states.values()}) > 1:
        raise ValueError(f"{path} is damaged: its states have different numbers of rows")
    return slices
