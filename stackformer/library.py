# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The border to the C++ library: its structs, how it is loaded, and pointers to tensors.

setup.py builds the library where it finds a compiler. The library is loaded with ctypes and knows nothing of
torch, so that one build serves every version of torch. Nothing depends on the library: without it, torch
computes the same (memory_bank.py, delta_bank.py).

The library reads and writes wherever a pointer leads, so every tensor is checked before it becomes a pointer:
`check_layout` checks its shape, dtype and device, and `address_of` that it has elements in memory.
"""

import ctypes
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INPUTS = ("query", "key", "value", "read", "write", "log_decay")
# `Precision` of csrc/memory_bank.cpp, by the dtype of queries, keys, values and output.
PRECISIONS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


class Tokens(ctypes.Structure):
    """The pointer and the strides of a tensor [B, T, H, ...] whose last dimension is dense."""

    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("batch", "time", "head")]


class Problem(ctypes.Structure):
    """`Problem` of csrc/memory_bank.cpp, field by field."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("batch", "time", "heads", "key_size", "value_size")]
        + [(n, ctypes.c_int64) for n in ("memories", "chunk")]
        + [("eps", ctypes.c_double)]
        + [(n, Tokens) for n in (*INPUTS, "step_size")]
        + [(n, ctypes.c_void_p) for n in ["memory", "normalizer", "start_memory", "start_normalizer"]]
        + [(n, Tokens) for n in ["output", "denominator", "errors"]]
        + [(n, ctypes.c_void_p) for n in ["final_memory", "final_normalizer"]]
        + [(f"grad_{n}", Tokens) for n in ("output", *INPUTS, "step_size")]
    )


class Step(ctypes.Structure):
    """`Step` of csrc/memory_bank.cpp, field by field."""

    _fields_ = (
        [
            (n, ctypes.c_int64)
            for n in ("batch", "count", "heads", "size", "banks", "levels", "taps", "feature_map")
        ]
        + [(n, ctypes.c_double) for n in ("eps", "norm_eps")]
        + [(n, ctypes.c_void_p) for n in ("projected", "conv_weight")]
        + [(n, ctypes.c_void_p) for n in ("pointer", "read", "write", "log_decay", "step_size")]
        + [(n, ctypes.c_void_p) for n in ("norm_weight", "gate", "past", "memory", "normalizer")]
        + [(n, ctypes.c_void_p) for n in ("new_past", "new_memory", "new_normalizer", "output", "rows")]
    )


# `stackformer_abi` of csrc/memory_bank.cpp is the same number: it changes with what the functions do, here
# and there, and with the sizes of the structs.
ABI = (3 * 10000 + ctypes.sizeof(Problem)) * 10000 + ctypes.sizeof(Step)


def load_library(folder: Path) -> ctypes.CDLL | None:
    """Loads the library in a folder that was built for this platform and for this file.

    Returns:
        The library, or `None` if there is none, with a warning if there is one for another version.
    """
    others = []
    for path in sorted(folder.glob("_memory_bank.*")):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # built for another platform
            continue
        if abi_of(library) != ABI:  # it would read structs that it was not built for
            others.append(path.name)
            continue
        library.stackformer_memory_bank.argtypes = [ctypes.POINTER(Problem)] + [ctypes.c_int] * 3
        library.stackformer_step.argtypes = [ctypes.POINTER(Step)] + [ctypes.c_int] * 2
        return library
    if others:
        warnings.warn(
            f"{', '.join(others)} in {folder} was built for another version of stackformer and is not used; "
            "torch is, which is slower. Install stackformer again to build it anew.",
            stacklevel=2,
        )
    return None


def abi_of(library: ctypes.CDLL) -> int | None:
    """Returns the number that a library was built with; `None` for one from before there were numbers."""
    try:
        function = library.stackformer_abi
    except AttributeError:
        return None
    function.restype = ctypes.c_int64
    return function()


LIBRARY = load_library(Path(__file__).parent)


def is_available() -> bool:
    """Returns whether the library was built for this platform."""
    return LIBRARY is not None


def check_problem(inputs: Sequence[Tensor], state: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raises a ValueError unless the tensors of an operator go together, and are all where the first one is.

    Args:
        inputs: query to log decay [B, T, H, ...], and step sizes [B, T, H] for the delta rule.
        state: memory [B, H, R, K, V], and normalizer [B, H, R, K] for linear attention, or their gradients.
        names: of all of these.
    """
    count = len(names) - len(state)
    if len(inputs) != count:
        expected = tuple(names[:count])
        raise ValueError(f"`inputs` must be the {count} tensors {expected}, got {len(inputs)}")
    query, _, value, read = inputs[:4]
    if any(tensor.dim() != 4 or 0 in tensor.shape[1:] for tensor in (query, value, read)):
        raise ValueError(
            "`query`, `value` and `read` must have at least one token, head and feature, got shapes "
            f"{[tuple(tensor.shape) for tensor in (query, value, read)]}"
        )
    batch, time, heads, key_size = query.shape
    values, gates = (batch, time, heads, value.shape[3]), (batch, time, heads, read.shape[3])
    bank = (batch, heads, read.shape[3], key_size, value.shape[3])
    tokens = (query.shape, query.shape, values, gates, gates, gates, gates[:3])[:count]
    shapes = (*tokens, *(bank, bank[:4])[: len(state)])
    check_layout(query.device, zip(names, (*inputs, *state), shapes, strict=True))


def check_length(length: int) -> None:
    """Raises a ValueError unless chunks have at least one token."""
    if length < 1:
        raise ValueError(f"`length` must be at least 1, got {length}")


def check_precision(name: str, tensor: Tensor) -> None:
    """Raises a ValueError unless a tensor has the precision of a state."""
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`{name}` must be torch.float32 or torch.float64, got {tensor.dtype}")


def taken_dtypes(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[torch.dtype]:
    """Returns the dtypes in which the library takes the inputs of an operator.

    They are the dtype of the state, and bfloat16 for query, key and value if all three are bfloat16.
    """
    low = dtype == torch.float32 and all(tensor.dtype == torch.bfloat16 for tensor in inputs[:3])
    return [torch.bfloat16 if low else dtype] * 3 + [dtype] * (len(inputs) - 3)


def problem_of(inputs: Sequence[Tensor], names: Sequence[str], length: int, **results: Tensor) -> Problem:
    """Returns a problem with the sizes of an operator, its inputs and `results`, in chunks of `length`."""
    query, _, value, read = inputs[:4]
    batch, time, heads, key_size = query.shape
    return Problem(
        batch=batch,
        time=time,
        heads=heads,
        key_size=key_size,
        value_size=value.shape[-1],
        memories=read.shape[-1],
        chunk=min(length, time),
        **{name: tokens_of(tensor) for name, tensor in zip(names, inputs, strict=True)},
        **{name: tokens_of(tensor) for name, tensor in results.items()},
    )


def run_problem(problem: Problem, dtype: torch.dtype, backwards: bool) -> None:
    """Runs an operator in chunks. `dtype` is the one of queries, keys, values and output."""
    assert LIBRARY is not None
    if LIBRARY.stackformer_memory_bank(problem, PRECISIONS[dtype], backwards, torch.get_num_threads()):
        raise MemoryError("no memory for the work space of a bank of memories")


def check_layout(device: torch.device, expected: Iterable[tuple[str, Tensor, tuple[int, ...]]]) -> None:
    """Raises a ValueError that names the first tensor whose elements are not what a pointer to them says.

    Args:
        device: where all tensors must be.
        expected: name, tensor and shape of each.
    """
    for name, tensor, shape in expected:
        if tensor.shape != shape or tensor.dtype not in DTYPES or tensor.device != device:
            raise ValueError(
                f"`{name}` must have shape {tuple(shape)}, be one of {DTYPES} and on {device}, got "
                f"{tuple(tensor.shape)}, {tensor.dtype} and {tensor.device}"
            )


def address_of(tensor: Tensor) -> int:
    """Returns the address of the elements, and raises a ValueError if they are not in memory."""
    address = tensor.data_ptr()
    if not address and tensor.numel() > 0:
        raise ValueError(
            f"tensors must have their elements in memory, got a {type(tensor).__name__} of shape "
            f"{tuple(tensor.shape)} without any"
        )
    return address


def tokens_of(tensor: Tensor) -> Tokens:
    return Tokens(address_of(tensor), *tensor.stride()[:3])


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor in the dtype, with a dense last dimension, and with the sign that is in memory."""
    if tensor.dtype != dtype:  # `to` takes ten times as long, and decoding has many tensors
        tensor = tensor.to(dtype)
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.stride()[-1] == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor in the dtype, with all dimensions dense, and with the sign that is in memory."""
    if tensor.dtype == dtype and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.to(dtype).contiguous().resolve_neg()


def is_plain(*tensors: Tensor) -> bool:
    """Returns whether every tensor is no more than the elements in its memory.

    Tensors of a subclass, such as fake ones, and tangents of forward-mode differentiation are more than that.
    """
    return forward_ad._current_level < 0 and all(type(tensor) is Tensor for tensor in tensors)
