# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""PEFT's mixed batches, with an adapter for each row of a batch (`adapter_names`), in the core.

PEFT passes the names of the adapters to every layer with adapters by a hook. It expects that the first
dimension of the layer's input is the rows of the batch. In the core, this dimension is the active tokens.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from .token_layout import TokenLayout


def mixed_batch_hooks(model: nn.Module) -> list[partial]:
    """Returns the hooks by which PEFT chooses adapters for each row; none without a mixed batch."""
    if "peft" not in sys.modules:
        return []
    return [
        hook
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, partial) and "adapter_names" in hook.keywords
    ]


@contextmanager
def adapters_by_token(hooks: list[partial], layout: TokenLayout) -> Iterator[None]:
    """Makes the hooks choose an adapter for each of the n active tokens: the adapter of its row."""
    before = [hook.keywords["adapter_names"] for hook in hooks]
    rows = layout.row_of_tokens().tolist() if hooks else []
    try:
        for hook, names in zip(hooks, before, strict=True):
            if len(names) == layout.batch_size:  # otherwise PEFT raises an error
                hook.keywords["adapter_names"] = [names[row] for row in rows]
        yield
    finally:
        for hook, names in zip(hooks, before, strict=True):
            hook.keywords["adapter_names"] = names
