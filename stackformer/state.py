# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The recurrent state of a layer: the specification of its tensors, and operations on all of them.

A state is a tuple of tensors, batch rows first. Every mixer names the tensors of its state (a NamedTuple,
`Mixer.state_type`) and specifies their shapes and types (`Mixer.state_spec`). A cache checks, saves, moves
and reorders states by this specification alone.

Letters: B batch rows, B' rows with active tokens.
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
        shape: of one batch row. `None` stands for a dimension that grows with the number of tokens.
        integer: whether the tensor holds integers (int64) instead of floating-point numbers.
    """

    name: str
    shape: tuple[int | None, ...]
    integer: bool = False

    def matches(self, tensor: Tensor) -> bool:
        """Whether a tensor [B, ...] has the specified type and shape, for any B."""
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
    """The state from which a layer continues in one call.

    Args:
        state: of the rows with active tokens [B', ...], or with `in_place` of all batch rows [B, ...];
            `None` at the beginning of the sequences.
        inputs: the result of `Mixer.project` for the tokens of the call, if it is known already.
        in_place: whether the mixer writes the new state into the tensors of `state`.
    """

    state: State | None = None
    inputs: Any = None
    in_place: bool = False


def find_mismatch(state: Sequence[Tensor], spec: StateSpec) -> str | None:
    """Describes the first difference between a state and its specification; `None` if there is none.

    All tensors of a state must have the same number of rows.
    """
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
    """Returns the batch rows `rows` [B'] of a state; all rows if `rows` is `None`."""
    if state is None or rows is None:
        return state
    return tuple(tensor.index_select(0, rows) for tensor in state)  # type: ignore[return-value]


def put_rows(old: State | None, new: State, layout: TokenLayout) -> State:
    """Returns the state `old` [B, ...] with the rows of `layout` replaced by `new` [B', ...].

    `old` is zeros if `None`. If a state has grown along dimension 1, all rows are padded with zeros in front.
    """
    if layout.rows is None:
        return new
    if old is None:
        old = tuple(tensor.new_zeros(layout.batch_size, *tensor.shape[1:]) for tensor in new)
    pairs = (_pad_front(past, tensor) for past, tensor in zip(old, new, strict=True))
    return tuple(past.index_copy(0, layout.rows, tensor) for past, tensor in pairs)


def _pad_front(*tensors: Tensor) -> list[Tensor]:
    """Pads tensors [B, length, ...] with zeros in front, to the length of the longest."""
    if tensors[0].dim() == 1 or len({tensor.shape[1] for tensor in tensors}) == 1:
        return list(tensors)
    length = max(tensor.shape[1] for tensor in tensors)
    return [
        nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (length - tensor.shape[1], 0))
        for tensor in tensors
    ]


__all__ = ["Start", "State", "StateSpec", "TensorSpec", "find_mismatch", "put_rows", "take_rows"]
