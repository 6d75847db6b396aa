# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""PEFT's mixed batches: an adapter for each row of a batch (`adapter_names`), in a core that computes tokens.

PEFT gives the names of the adapters to every layer that has some, by a hook, and takes the first dimension of
the layer's input for the rows. In the core it is the tokens that are active.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from .token_layout import TokenLayout


def mixed_batch_hooks(model: nn.Module) -> list[partial]:
    """The hooks of PEFT that choose adapters by row; none, as a rule."""
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
    """Lets the hooks name the adapter of each of the n active tokens, that of its row."""
    before = [hook.keywords["adapter_names"] for hook in hooks]
    rows = layout.row_of_tokens().tolist() if hooks else []
    try:
        for hook, names in zip(hooks, before, strict=True):
            if len(names) == layout.batch_size:  # else PEFT says what is wrong
                hook.keywords["adapter_names"] = [names[row] for row in rows]
        yield
    finally:
        for hook, names in zip(hooks, before, strict=True):
            hook.keywords["adapter_names"] = names
