# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The recurrent state of a layer: the names, shapes and types of its tensors, and operations on all of them.

A state is a tuple of tensors, batch rows first. Every mixer names the tensors of its own (a NamedTuple,
`Mixer.state_type`) and specifies them (`Mixer.state_spec`). A cache checks, saves, moves and reorders states
by their specification, and knows nothing else about them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .token_layout import TokenLayout

State = tuple[Tensor, ...]
AnyState = TypeVar("AnyState", bound=State)


class TensorSpec(NamedTuple):
    """One tensor of a state.

    Args:
        name: unique in the state of the layer.
        shape: of one batch row; `None` for a dimension that grows with the tokens that were read.
        integer: whether it holds integers (int64). All others hold floating-point numbers.
    """

    name: str
    shape: tuple[int | None, ...]
    integer: bool = False

    def matches(self, tensor: Tensor) -> bool:
        """Whether a tensor [B, ...] is as specified, whatever B is."""
        same_kind = tensor.dtype == torch.int64 if self.integer else tensor.is_floating_point()
        shape = tensor.shape[1:]
        return (
            same_kind
            and tensor.dim() == len(self.shape) + 1
            and all(expected in (None, size) for expected, size in zip(self.shape, shape, strict=True))
        )

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"`{self.name}` [batch{', ' if sizes else ''}{sizes}]{' of int64' if self.integer else ''}"


StateSpec = tuple[TensorSpec, ...]


class Start(NamedTuple):
    """What a layer goes on from in one call.

    Args:
        state: of the layer's rows [B', ...]; of all batch rows [B, ...] with `in_place`; `None` at the
            beginning of the sequences.
        inputs: what `Mixer.project` returns for the tokens of the call, where that is known already.
        in_place: whether the mixer writes the new state into the tensors of `state`.
    """

    state: State | None = None
    inputs: Any = None
    in_place: bool = False


def find_mismatch(state: Sequence[Tensor], spec: StateSpec) -> str | None:
    """Says what is wrong with a state; `None` if it is as specified, and has as many rows in all tensors."""
    if len(state) != len(spec):
        names = [tensor_spec.name for tensor_spec in spec]
        return f"{len(state)} tensors instead of the {len(spec)} tensors {names}"
    for tensor, tensor_spec in zip(state, spec, strict=True):
        if not tensor_spec.matches(tensor):
            return f"a tensor of shape {list(tensor.shape)} and {tensor.dtype} instead of {tensor_spec}"
    rows = {len(tensor) for tensor in state}
    if len(rows) > 1:
        return f"tensors of different numbers of rows, {sorted(rows)}"
    return None


def take_rows(state: AnyState | None, rows: Tensor | None) -> AnyState | None:
    """The batch rows `rows` [B'] of a state, all if `None`."""
    if state is None or rows is None:
        return state
    return tuple(tensor.index_select(0, rows) for tensor in state)  # type: ignore[return-value]


def put_rows(old: State | None, new: State, layout: TokenLayout) -> State:
    """`old`, zeros if `None`, with the rows of `layout` replaced by `new`.

    A state may grow along dimension 1: then what is new comes last, and shorter rows get zeros in front.
    """
    if layout.rows is None:
        return new
    if old is None:
        old = tuple(tensor.new_zeros(layout.batch_size, *tensor.shape[1:]) for tensor in new)
    pairs = (_as_long(past, tensor) for past, tensor in zip(old, new, strict=True))
    return tuple(past.index_copy(0, layout.rows, tensor) for past, tensor in pairs)


def _as_long(*tensors: Tensor) -> list[Tensor]:
    """The tensors [B, length, ...] with zeros in front of the shorter ones."""
    if tensors[0].dim() == 1 or len({tensor.shape[1] for tensor in tensors}) == 1:
        return list(tensors)
    length = max(tensor.shape[1] for tensor in tensors)
    return [
        nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (length - tensor.shape[1], 0))
        for tensor in tensors
    ]


__all__ = ["Start", "State", "StateSpec", "TensorSpec", "find_mismatch", "put_rows", "take_rows"]
