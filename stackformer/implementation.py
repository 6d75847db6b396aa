# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""How an operator chooses one of its implementations, and what they share.

The operators (memory_bank.py, delta_bank.py) have a table each: name, when the implementation can run, and
what runs it.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .library import DTYPES, is_available

# The variable names the implementation for calls that name none. It is read once: reading it takes time.
ENVIRONMENT_VARIABLE = "STACKFORMER_IMPLEMENTATION"
FROM_ENVIRONMENT = os.environ.get(ENVIRONMENT_VARIABLE) or None
HAS_LIBRARY = is_available()
HAS_TRITON = find_spec("triton") is not None


class Implementation(NamedTuple):
    """A row of a table: one way to run an operator.

    Attributes:
        obstacle: says why it cannot run for some tensors; `None` if it can. It takes query,
            key, value and read, and whether the caller asks for this implementation. If the caller asks for
            none, it is an obstacle, too, that an implementation further down is faster.
        run: runs it. It takes the operator's tensors and options.
    """

    obstacle: Callable[..., str | None]
    run: Callable[..., Any]


def choose(
    table: Mapping[str, Implementation], tensors: tuple[Tensor, ...], implementation: str | None
) -> str:
    """Returns the name of the implementation that runs.

    Args:
        table: a call that asks for none takes the first one without an obstacle.
        tensors: the arguments of `Implementation.obstacle`: query, key, value and read.
        implementation: the one that the caller asks for. `None` takes the one that the environment variable
            names, if it is set.

    Raises:
        ValueError: for an implementation that is unknown or cannot run here.
    """
    name = FROM_ENVIRONMENT if implementation is None else implementation
    if name is None:
        return next(name for name, row in table.items() if row.obstacle(*tensors, False) is None)
    source, otherwise = "`implementation`", "None"
    if implementation is None:
        source, otherwise = f"`{ENVIRONMENT_VARIABLE}`", "not set"
    if name not in table:
        raise ValueError(f"{source} must be one of {tuple(table)} or {otherwise}, got {name!r}")
    obstacle = table[name].obstacle(*tensors, True)
    if obstacle is not None:
        raise ValueError(f"{source} must be another than {name!r} here: {obstacle}")
    return name


def library_obstacle(tensor: Tensor, *_: Any) -> str | None:
    """Says why the C++ library cannot run for a tensor; `None` if it can."""
    if not HAS_LIBRARY:
        return "the C++ library was not built (it is with the package, if there is a compiler)"
    if tensor.device.type != "cpu":
        return f"tensors must be on the CPU, not on {tensor.device}"
    return None


def recurrent_obstacle(query: Tensor, key: Tensor, value: Tensor, read: Tensor, asked: bool) -> str | None:
    """Says why the recurrence, token by token, should not run; `None` if it should."""
    return None if asked or query.shape[1] == 1 else "it is slow for several tokens"


def triton_obstacle(query: Tensor, asked: bool) -> str | None:
    """Says why Triton cannot run, or should not if nobody asks for it; `None` if it can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if not asked and not query.is_cuda:
        return "it is slow in Triton's interpreter"
    return None


def can_decode_token(hidden: Tensor) -> bool:
    """Returns whether the C++ library can decode a token with these hidden states, as far as tensors decide.

    The library runs on plain tensors on the CPU, without gradients and outside of torch.compile, unless
    STACKFORMER_IMPLEMENTATION names an implementation other than "cpp".
    """
    if torch.is_grad_enabled() or FROM_ENVIRONMENT not in (None, "cpp"):
        return False
    return can_look_at(hidden) and library_obstacle(hidden) is None


def agree_on(device: torch.device, example: Callable[[torch.device, str], Any]) -> bool:
    """Returns whether Triton's kernels compile on a device and agree there with the definition.

    Args:
        example: takes a device and the name of an implementation. It runs a small example, and returns the
            results and gradients.
    """
    try:
        with torch.enable_grad():
            results = [example(device, implementation) for implementation in ("recurrent", "triton")]
        torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
    except Exception as error:  # whatever a compiler or a driver may raise
        warnings.warn(f"Triton's kernels do not work on {device}, torch's are used: {error}", stacklevel=2)
        return False
    return True


def can_look_at(tensor: Tensor) -> bool:
    """Returns whether the operators that run may depend on the elements of a tensor.

    On a GPU they would have to be waited for. Where operators are recorded, or run for many tensors at once,
    and in tensors of a subclass or with a tangent, there is no one answer.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if type(tensor) is not Tensor or forward_ad._current_level >= 0:
        return False
    watched = torch._C._len_torch_dispatch_stack() > 0
    return not watched and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Returns a context in which products keep the dtypes that they are given."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def check_inputs(
    keys: Mapping[str, Tensor],
    value: Tensor,
    gates: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    dimensions: int = 4,
) -> None:
    """Raises a ValueError that names the first wrong input of the operator, if there is one.

    Args:
        keys: query and key, or key alone: [B, T, H, K], or [B, H, K] for three `dimensions`.
        value: [B, T, H, V], or [B, H, V].
        gates: read, write and log decay, or some of them: [B, T, H, R], or [B, H, R].
        state: a memory [B, H, R, K, V] and a normalizer [B, H, R, K], or the first of them, or neither.
        dimensions: 4 for inputs with a time dimension, 3 for one token.
    """
    of, like = next(iter(keys.items()))
    if like.dim() != dimensions:
        letters = "[batch, time, heads, key size]" if dimensions == 4 else "[batch, heads, key size]"
        raise ValueError(f"`{of}` must have shape {letters}, got {tuple(like.shape)}")
    gate, one_gate = next(iter(gates.items()))
    for name, tensor in ((of, like), ("value", value), (gate, one_gate)):
        if 0 in tensor.shape[1:]:
            raise ValueError(
                f"`{name}` must have at least one token, head and feature, got shape {tuple(tensor.shape)}"
            )
    tokens, key_size = tuple(like.shape[:-1]), like.shape[-1]
    value_size, memories = (x.shape[-1] if x.dim() > 0 else 0 for x in (value, one_gate))
    expected = [(name, tensor, (*tokens, key_size)) for name, tensor in keys.items()]
    expected.append(("value", value, (*tokens, value_size)))
    expected += [(name, tensor, (*tokens, memories)) for name, tensor in gates.items()]
    bank = (tokens[0], tokens[-1], memories, key_size)
    expected += zip(state, state.values(), ((*bank, value_size), bank), strict=False)
    check_tensors(of, like.device, expected)


def check_tensors(
    of: str, device: torch.device, expected: Iterable[tuple[str, Tensor, tuple[int, ...]]]
) -> None:
    """Raises a ValueError that names the first tensor that does not go with the others.

    Args:
        of: the name of the tensor that the others have to go with.
        device: the device of that tensor.
        expected: name, tensor and shape of each tensor.
    """
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(
                f"`{name}` must have shape {tuple(shape)} to go with `{of}`, got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"`{name}` must be one of {DTYPES}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"`{name}` must be on {device} as `{of}` is, got a tensor on {tensor.device}")
