# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The recurrent state of a Stackformer as a transformers `Cache`: constant in size, whatever was read."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_stackformer import StackformerConfig


class StackformerCacheLayer(CacheLayerMixin):
    """The state of one core layer: for every slice (ponder step), its mixer's tuple of tensors, batch first.

    Tensors are replaced, never written in place, so gradients flow through the cache.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.slices: dict[int, tuple[Tensor, ...]] = {}
        self.seen_tokens = 0

    def read(self, index: int, rows: Tensor | None) -> tuple[Tensor, ...] | None:
        """Slice `index` for batch rows `rows` [B'] (`None`: all rows); `None` before the first write."""
        state = self.slices.get(index)
        if state is None or rows is None:
            return state
        return tuple(tensor.index_select(0, rows) for tensor in state)

    def write(self, index: int, state: tuple[Tensor, ...], rows: Tensor | None, batch_size: int) -> None:
        """Replace the state of slice `index`, for the batch rows `rows` [B'] (all if `None`)."""
        if rows is not None:
            old = self.slices.get(index)
            if old is None:
                old = tuple(tensor.new_zeros(batch_size, *tensor.shape[1:]) for tensor in state)
            state = tuple(past.index_copy(0, rows, new) for past, new in zip(old, state, strict=True))
        self.slices[index] = state
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions as seen."""
        self.seen_tokens += tokens

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every state tensor by what `function` makes of it."""
        self.slices = {index: tuple(map(function, state)) for index, state in self.slices.items()}

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first write."""
        return next(iter(self.slices.values()))[0].shape[0] if self.slices else -1

    def get_seq_length(self) -> int:
        """Positions seen so far, padding included."""
        return self.seen_tokens

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a full attention mask."""
        return self.seen_tokens + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.slices = {}
        self.seen_tokens = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.map_(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.map_(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a boolean mask)."""
        self.map_(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Move the state to the CPU; `prefetch` moves it back."""
        if self.slices:
            self.device = next(iter(self.slices.values()))[0].device
            self.map_(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move an offloaded state back to its device."""
        if self.slices:
            self.map_(lambda tensor: tensor.to(self.device, non_blocking=True))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("A Stackformer cache holds no keys and values: it cannot be used by another model.")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise ValueError("A Stackformer cache holds no keys and values: it cannot be used by another model.")


class StackformerCache(Cache):
    """The memory of a Stackformer: what it kept of everything it has read.

    Returned as `past_key_values`, taken back by `forward` and `generate`. It has one layer per core layer,
    each with one slice of state per ponder step. States are float32 (float64 in a float64 model).

    Args:
        config ([`StackformerConfig`]): of the model that it is for.

    Example:

    ```python
    >>> outputs = model(input_ids, use_cache=True)
    >>> memory = outputs.past_key_values
    >>> branch = memory.clone()
    >>> model(more_ids, past_key_values=branch)
    ```
    """

    def __init__(self, config: StackformerConfig):
        super().__init__(layers=[StackformerCacheLayer() for _ in range(config.num_hidden_layers)])

    def clone(self) -> "StackformerCache":
        """An independent copy. Gradients flow through it to this one."""
        return self._mapped(torch.clone)

    def detach(self) -> "StackformerCache":
        """The same state, cut off from its graph: for truncated backpropagation through time."""
        return self._mapped(Tensor.detach)

    @property
    def num_bytes(self) -> int:
        """Size of the state in bytes. It does not depend on the number of tokens seen."""
        states = (state for layer in self.layers for state in layer.slices.values())
        return sum(tensor.nbytes for state in states for tensor in state)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "StackformerCache":
        copy = StackformerCache.__new__(StackformerCache)
        Cache.__init__(copy, layers=[StackformerCacheLayer() for _ in self.layers])
        for new, old in zip(copy.layers, self.layers, strict=True):
            new.slices, new.seen_tokens = dict(old.slices), old.seen_tokens
            new.is_initialized = old.is_initialized
            new.map_(function)
        return copy


__all__ = ["StackformerCache", "StackformerCacheLayer"]
