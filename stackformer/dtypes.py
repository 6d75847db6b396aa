# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The precision of gates, decays and states."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """Returns the dtype of gates, decays and states for inputs like `tensor`: float32 or float64.

    In a lower precision, a decay close to 1 would round to 1, and a long sum would stop growing.
    """
    return torch.promote_types(tensor.dtype, torch.float32)


__all__ = ["at_least_float32"]
