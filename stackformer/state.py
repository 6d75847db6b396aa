# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The recurrent state of a layer: what its tensors are called, and what they must look like.

A state is a tuple of tensors, batch rows first. Every mixer has a specification of its state; what checks,
saves or compares states goes by it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class StateOfAllRows(tuple):
    """A mixer's state [B, ...], of which it writes the rows of its layout in place."""


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


__all__ = ["State", "StateSpec", "TensorSpec", "find_mismatch"]
