# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The recurrent state of a Stackformer as a transformers `Cache`: constant in size, whatever was read."""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi
from torch import Tensor
from torch.nn import Module
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file

from .configuration_stackformer import StackformerConfig
from .identity import Mark, active_adapters, model_identity, unwrap
from .memory_file import JSON_FILE, MEMORY_FILE, has_description, read_memory, write_memory
from .mixer import Mixer
from .rollback import Recording
from .state import Start, State, StateSpec, find_mismatch, put_rows, take_rows
from .token_layout import TokenLayout

# Tokens that can be rolled back by default: far more than assisted decoding drafts at once.
ROLLBACK_WINDOW = 256


class Slot:
    """A slice of a layer's state in one call: how a core layer finds its state, and how the new one is
    written.

    It is bound to the state when it is made: a checkpointed layer that runs again in the backward pass, after
    the write, finds what it found before.
    """

    def __init__(self, layer: "StackformerCacheLayer", index: int, layout: TokenLayout):
        self._layer, self._index, self._layout = layer, index, layout
        self._state = take_rows(layer.slices.get(index), layout.rows)

    def start(self, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        """What the layer goes on from, to mix `hidden` [n, d], `pointer` [n, S] and `layout`."""
        return Start(self._state)

    def write(self, state: State) -> None:
        """Put the new state of the rows in place of the old one."""
        self._layer.write(self._index, state, self._layout)


class BufferSlot(Slot):
    """A slot of a [`StackformerBufferLayer`]: a mixer that can writes into the buffers itself."""

    def __init__(self, layer: "StackformerBufferLayer", index: int, layout: TokenLayout):
        self._layer: StackformerBufferLayer
        self._layer, self._index, self._layout, self._is_written = layer, index, layout, False

    def start(self, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        """As in the base class; all rows [B, ...], where the mixer writes in place."""
        state = self._layer.slices.get(self._index)
        if state is not None and mixer.writes_in_place(hidden, layout, state):
            self._layer.is_overwritten = self._is_written = True
            return Start(state, in_place=True)
        return Start(take_rows(state, layout.rows))

    def write(self, state: State) -> None:
        """As in the base class, unless the mixer wrote in place."""
        if not self._is_written:
            super().write(state)


class StackformerCacheLayer(CacheLayerMixin):
    """The state of one core layer: a tuple of tensors, batch first, for every slice. There is one slice for
    each ponder step, or a single one with feedback.

    Tensors are replaced, never written to, so gradients flow through the cache, and a state that is kept for
    a rollback costs no copy. Without gradients, a [`StackformerBufferLayer`] takes its place (`for_call`).

    While it records the past, `crop` computes older states again (rollback.py).
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False
    is_shared = False  # by processes that all have to read and write each slice
    is_of_stackformer = True  # where types are not: the package and a copy of it from a checkpoint may meet

    def __init__(self, rollback_window: int = ROLLBACK_WINDOW, **kwargs):
        super().__init__()
        self.is_initialized: bool = False
        self.slices: dict[int, State] = {}
        self.mark: Mark | None = None  # of the model that the state belongs to
        self.seen_tokens = 0
        self.rollback_window = rollback_window
        self.recording: Recording | None = None
        self._is_broken = False  # by a call that failed halfway

    def for_call(self) -> "StackformerCacheLayer":
        """The layer to use in the next call of the model: this one, or one of the other kind with its state.

        Calls without gradients write into buffers: otherwise, decoding copies the rows of tokens that have
        halted at every step, and allocates large states anew at every token.
        """
        if torch.is_grad_enabled() or self.recording is not None or torch.compiler.is_compiling():
            return self
        return StackformerBufferLayer.of(self)

    def check(self, spec: StateSpec, num_slices: int, batch_size: int) -> str | None:
        """Says what keeps this layer's state from being read for a batch; `None` if nothing does.

        Args:
            spec: of the state of the model's core layer; num_slices: how many of them there are.
            batch_size: rows of the input.
        """
        if self._is_broken:
            return "a state that a failed call left incomplete: `reset` it, or go on from a copy"
        if unknown := [index for index in self.slices if not 0 <= index < num_slices]:
            return f"states of ponder steps {unknown} in a model whose states are {list(range(num_slices))}"
        for state in self.slices.values():
            if mismatch := find_mismatch(state, spec):
                return mismatch
            if len(state[0]) != batch_size:
                return (
                    f"{len(state[0])} rows for an input of {batch_size}: repeat or select its rows with "
                    "`batch_repeat_interleave` or `batch_select_indices`"
                )
        return None

    def begin_call(self, length: int) -> Callable[[], None]:
        """Returns a function that undoes what a call of the model, on `length` tokens, does to this layer."""
        slices, seen_tokens, is_initialized = dict(self.slices), self.seen_tokens, self.is_initialized
        recording = None if self.recording is None else self.recording.copy()

        def undo() -> None:
            self.slices, self.seen_tokens, self.is_initialized = slices, seen_tokens, is_initialized
            self.recording = recording

        return undo

    def open(self, index: int, layer: Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Slot:
        """The slot of slice `index` for a core layer that is about to read `hidden` [n, d]."""
        if self.recording is not None:
            self.recording.add(index, layer.advance, hidden, pointer, layout)  # type: ignore[arg-type]
        return Slot(self, index, layout)

    def write(self, index: int, state: State, layout: TokenLayout) -> None:
        """Replace the state of slice `index` for the rows of `layout`."""
        self.slices[index] = put_rows(self.slices.get(index), state, layout)
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions as seen; what fell out of the window can no longer be rolled back."""
        self.seen_tokens += tokens
        if self.recording is not None:
            self.recording.count(tokens)

    @property
    def record_past(self) -> bool:
        """Whether the past is recorded, so that `crop` can go back."""
        return self.recording is not None

    def activate_past_recording(self) -> None:
        """From now on, record what `crop` needs."""
        if self.recording is None:
            self.recording = Recording(self.slices, self.rollback_window)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put this layer back as it was."""
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens: the state is what it would be without them.

        Raises:
            ValueError: for a positive number, and for more tokens than were recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove` must be 0 or negative, got {tokens_to_remove}")
        recorded = 0 if self.recording is None else self.recording.num_tokens
        if -tokens_to_remove > recorded:
            raise ValueError(
                f"`tokens_to_remove` must go back at most the {recorded} tokens recorded since "
                f"`activate_past_recording` and the last `crop` or change of the batch "
                f"(`rollback_window` is {self.rollback_window}), got {tokens_to_remove}"
            )
        if tokens_to_remove and self.recording is not None:
            self.slices = self.recording.without_last(-tokens_to_remove)
            self.seen_tokens += tokens_to_remove
        self._restart_recording()

    def _restart_recording(self) -> None:
        if self.recording is not None:
            self.recording.restart(self.slices)

    def load(self, slices: dict[int, State], seen_tokens: int, device: torch.device) -> None:
        """Take over a state that was saved."""
        self.slices, self.seen_tokens, self.is_initialized = slices, seen_tokens, True
        self._is_broken = False
        self.map_(lambda tensor: tensor.to(device))

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor of the state by what `function` returns for it."""
        self.slices = {index: tuple(map(function, state)) for index, state in self.slices.items()}
        self._restart_recording()

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "StackformerCacheLayer":
        """A copy of the layer with what `function` returns for every tensor of the state."""
        layer = copy.copy(self)
        StackformerCacheLayer.map_(layer, function)
        return layer

    def __getstate__(self) -> dict:
        """Copies and pickles hold the state, not the layers that computed it."""
        recording = self.recording and Recording(self.slices, self.rollback_window)
        return {**self.__dict__, "slices": dict(self.slices), "recording": recording}

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
        self.mark = None
        self.seen_tokens = 0
        self.is_initialized = self._is_broken = False
        self._restart_recording()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._check_rows("beam_idx", beam_idx)
        self.map_(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if repeats < 1:
            raise ValueError(f"`repeats` must be at least 1, got {repeats}")
        self.map_(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a boolean mask)."""
        self._check_rows("indices", indices)
        self.map_(lambda tensor: tensor[indices.to(tensor.device)])

    def _check_rows(self, name: str, indices: Tensor) -> None:
        """Raises a ValueError for indices that are no rows. Those on a GPU are not looked at: it would wait
        for them."""
        rows = self.batch_size
        if rows < 0:
            return
        if indices.dim() != 1 or (indices.dtype == torch.bool and len(indices) != rows):
            raise ValueError(f"`{name}` must be rows of the {rows} in the cache, got {indices}")
        if indices.dtype == torch.bool or indices.device.type != "cpu" or len(indices) == 0:
            return
        if indices.is_floating_point() or not 0 <= indices.min() <= indices.max() < rows:
            raise ValueError(f"`{name}` must be rows of the {rows} in the cache, got {indices.tolist()}")

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


class StackformerBufferLayer(StackformerCacheLayer):
    """The state of one core layer in buffers of its own, which calls without gradients write to.

    Whoever wants to keep a state takes a `clone` of the cache. The buffers of states that grow are replaced:
    the keys and values of softmax attention without a window.
    """

    def __init__(self, rollback_window: int = ROLLBACK_WINDOW, **kwargs):
        super().__init__(rollback_window)
        self.is_overwritten = False  # by the call that is under way

    @classmethod
    def of(cls, layer: StackformerCacheLayer) -> "StackformerBufferLayer":
        """A layer with a copy of the state of another one."""
        buffers = cls(layer.rollback_window)
        buffers.__dict__.update(layer.__dict__)
        buffers.slices = {index: _copies(state) for index, state in layer.slices.items()}
        return buffers

    def for_call(self) -> StackformerCacheLayer:
        """See the base class."""
        if torch.is_grad_enabled() or self.recording is not None:
            functional = StackformerCacheLayer(self.rollback_window)
            functional.__dict__.update(self.__dict__)
            return functional
        are_read_only = any(state[0].is_inference() for state in self.slices.values())
        return type(self).of(self) if are_read_only and not torch.is_inference_mode_enabled() else self

    def begin_call(self, length: int) -> Callable[[], None]:
        """See the base class. A longer call gets buffers of its own, so that it can be undone. A call of one
        token that wrote to the buffers and failed leaves a layer that refuses to be read."""
        self.is_overwritten = False
        restore = super().begin_call(length)
        is_undoable = length > 1 and not self.is_compileable
        if is_undoable:
            self.slices = {index: _copies(state) for index, state in self.slices.items()}

        def undo() -> None:
            restore()
            self._is_broken = self.is_overwritten and not is_undoable

        return undo

    def open(self, index: int, layer: Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Slot:
        """See the base class."""
        return BufferSlot(self, index, layout)

    def write(self, index: int, state: State, layout: TokenLayout) -> None:
        """Copy the new state of the rows of `layout` into the buffers of slice `index`. Those of a state that
        grows are replaced."""
        old = self.slices.get(index)
        if old is None:
            self.slices[index], self.is_initialized = _copies(put_rows(None, state, layout)), True
        elif any(x.shape[1:] != y.shape[1:] for x, y in zip(old, state, strict=True)):
            self.slices[index] = put_rows(old, state, layout)
        else:
            self.is_overwritten = True
            _overwrite(old, state, layout)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> StackformerCacheLayer:
        """See the base class. The copy has buffers of its own."""
        return super().mapped(lambda tensor: _apart(function(tensor), tensor))


class StackformerStaticCacheLayer(StackformerBufferLayer):
    """Buffers for compiled decoding and CUDA graphs: addresses and shapes never change.

    For inference: no gradient flows through it, and it records no past.
    """

    is_compileable = True

    def __init__(self, **kwargs):
        super().__init__()
        self._num_slices = 1  # known when the cache meets its model
        self._seen: Tensor | None = None  # a tensor, since a counter in Python would recompile every step

    def for_call(self) -> StackformerCacheLayer:
        """See the base class: always this layer."""
        return self

    def check(self, spec: StateSpec, num_slices: int, batch_size: int) -> str | None:
        """As for a layer that is not static; a state that grows does not fit, either."""
        self._num_slices = num_slices
        if growing := [tensor.name for tensor in spec if None in tensor.shape]:
            return (
                f"a state that grows, {growing}, which no static cache can hold: attention needs a "
                "`sliding_window`"
            )
        return super().check(spec, num_slices, batch_size)

    def open(self, index: int, layer: Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Slot:
        """See the base class. The layer itself writes, by `write`: with gradients on, too."""
        return Slot(self, index, layout)

    def write(self, index: int, state: State, layout: TokenLayout) -> None:
        """Copy the new state of slice `index` into its buffers; the first call allocates all slices."""
        self.is_overwritten = True
        if not self.slices:
            for number in range(self._num_slices):
                shapes = [(layout.batch_size, *tensor.shape[1:]) for tensor in state]
                buffers = tuple(x.new_zeros(shape) for x, shape in zip(state, shapes, strict=True))
                if not torch.compiler.is_compiling():
                    for buffer in buffers:
                        torch._dynamo.mark_static_address(buffer)
                self.slices[number] = buffers
            self.is_initialized = True
        _overwrite(self.slices[index], tuple(tensor.detach() for tensor in state), layout)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions as seen."""
        if self._seen is None:
            self._seen = torch.zeros((), dtype=torch.long, device=self.slices[0][0].device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self._seen)
        self._seen.add_(tokens)

    def get_seq_length(self) -> int:
        """Positions seen so far, padding included. Reading it is a synchronisation on a GPU."""
        return 0 if self._seen is None else int(self._seen)

    def activate_past_recording(self) -> None:
        raise ValueError(
            "A static cache records no past: assisted decoding needs a cache that is not static."
        )

    def load(self, slices: dict[int, State], seen_tokens: int, device: torch.device) -> None:
        """Take over a state that was saved."""
        super().load(slices, 0, device)
        self._seen = torch.tensor(seen_tokens, device=device)

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Write what `function` returns for the state into the buffers; replace those whose shape changes."""
        for index, state in self.slices.items():
            results = tuple(map(function, state))
            if all(new.shape == old.shape for new, old in zip(results, state, strict=True)):
                for buffer, tensor in zip(state, results, strict=True):
                    buffer.copy_(tensor)
            else:
                self.slices[index] = results

    def mapped(self, function: Callable[[Tensor], Tensor]) -> StackformerCacheLayer:
        """A copy of the layer with buffers of its own."""
        layer = super().mapped(function)
        layer._seen = None if self._seen is None else self._seen.clone()  # type: ignore[attr-defined]
        return layer

    def reset(self) -> None:
        """Forget everything, and keep the buffers."""
        self._is_broken, self.mark = False, None
        for state in self.slices.values():
            for buffer in state:
                buffer.zero_()
        if self._seen is not None:
            self._seen.zero_()


def _overwrite(buffers: State, state: State, layout: TokenLayout) -> None:
    """Copy a state of the rows of `layout` into buffers of all rows."""
    for buffer, tensor in zip(buffers, state, strict=True):
        if layout.rows is None:
            buffer.copy_(tensor)
        else:
            buffer.index_copy_(0, layout.rows, tensor)


def _copies(state: State) -> State:
    return tuple(torch.clone(tensor, memory_format=torch.contiguous_format) for tensor in state)


def _apart(tensor: Tensor, original: Tensor) -> Tensor:
    """`tensor`, in memory of its own."""
    same = tensor.untyped_storage().data_ptr() == original.untyped_storage().data_ptr()
    return tensor.clone() if same else tensor


def _upload(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **kwargs,
) -> str:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    kwargs.setdefault("commit_message", "Upload memory")
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        revision=revision,
        allow_patterns=[MEMORY_FILE],
        **kwargs,
    ).commit_url


AnyMemory = TypeVar("AnyMemory", bound="_Memory")


class _Memory(Cache):
    """What both kinds of cache can do: be saved, copied, and told which model they belong to."""

    layers: list[StackformerCacheLayer]

    @property
    def mark(self) -> Mark | None:
        """Whose memory this is; `None` before the first call."""
        return self.layers[0].mark

    def bind(self: "AnyMemory", mark: Mark) -> "AnyMemory":
        """Declare whose memory this is. Returns itself."""
        for layer in self.layers:
            layer.mark = mark
        return self

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        model: PreTrainedModel | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Write the memory to a folder: one file, `memory.safetensors`, which says whose memory it is.

        The file appears whole, or the one that was there before stays.

        Args:
            model: whose memory it is; known already for a cache that the model or `generate` made.
            push_to_hub: whether to upload the folder afterwards.
            kwargs: for [`~StackformerCache.push_to_hub`]; `repo_id` is the folder's name if not given.

        Raises:
            ValueError: if the memory is empty or belongs to another model, or if the model is not known.
        """
        if self.batch_size < 1:
            raise ValueError("This memory is empty: read something with the model before saving it.")
        mark = self.mark
        if model is not None:
            model = unwrap(model)
        elif mark is not None:
            model = mark.model
        if model is None:
            raise ValueError(
                "`model` must be whose memory this is: the cache does not know it (any more), got None"
            )
        check_cache(self, model, self.batch_size)
        if mark is not None and (active := active_adapters(model)) != mark.adapters:
            raise ValueError(
                f"`model` must have the adapters active that read this memory, {sorted(mark.adapters)}, got "
                f"{sorted(active)}"
            )
        slices = [layer.slices for layer in self.layers]
        specs = [layer.state_spec for layer in model.layers]
        write_memory(save_directory, slices, specs, self.get_seq_length(), model_identity(model))
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            _upload(save_directory, repo_id, **kwargs)

    def push_to_hub(self, repo_id: str, model: PreTrainedModel | None = None, **kwargs) -> str:
        """Upload the memory to the Hub, into a model repository (the model's own, or one for memories).

        Args:
            repo_id: the repository, created if need be.
            kwargs: `private`, `token`, `revision`, `commit_message` and `path_in_repo`, as in
                huggingface_hub.

        Returns:
            The URL of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, model=model)
            return _upload(folder, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls: "type[AnyMemory]",
        pretrained_model_name_or_path: str | os.PathLike,
        model: PreTrainedModel,
        **kwargs,
    ) -> "AnyMemory":
        """Load a memory from a folder or from the Hub, for the model that wrote it.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or a repository on the Hub.
            model: the model, with the same adapters active, if there are any; the memory goes to its device.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir`, ... as in other `from_pretrained` methods.

        Raises:
            ValueError: if the memory is of another model, damaged, or of an unknown format version.
            OSError: if there is no memory.
        """
        model = unwrap(model)
        path = cached_file(pretrained_model_name_or_path, MEMORY_FILE, **kwargs)
        if not has_description(path):  # written by a version that had a file for each
            json_path = cached_file(pretrained_model_name_or_path, JSON_FILE, **kwargs)
        else:
            json_path = None
        specs = [layer.state_spec for layer in model.layers]
        memory = read_memory(path, json_path, model_identity(model), specs, model.config.num_slices)
        cache = cls(model.config).bind(model.mark())
        for layer, states in zip(cache.layers, memory.slices, strict=True):
            layer.load(states, memory.seen_tokens, model.device)
        return cache

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first write."""
        return self.layers[0].batch_size

    def clone(self: "AnyMemory") -> "AnyMemory":
        """An independent copy. Gradients flow through it to this one."""
        return self._mapped(torch.clone)

    def detach(self: "AnyMemory") -> "AnyMemory":
        """The same state, cut off from its graph: for truncated backpropagation through time."""
        return self._mapped(Tensor.detach)

    @property
    def num_bytes(self) -> int:
        """Size of the state in bytes. It depends on the number of tokens seen only where a mixer's state
        grows: softmax attention without a window."""
        states = (state for layer in self.layers for state in layer.slices.values())
        return sum(tensor.nbytes for state in states for tensor in state)

    def _mapped(self: "AnyMemory", function: Callable[[Tensor], Tensor]) -> "AnyMemory":
        mapped = copy.copy(self)
        mapped.layers = [layer.mapped(function) for layer in self.layers]
        return mapped


class StackformerCache(_Memory, DynamicCache):
    """The memory of a Stackformer: what it kept of everything it has read.

    `forward` and `generate` return it, and take it back. It has one layer per core layer, each with one slice
    of state per ponder step, or a single one with `config.feedback`. States are float32 (float64 in a float64
    model, and in coupled cells), keys and values of softmax attention as they were computed.

    Args:
        config ([`StackformerConfig`]): of the model that it is for.
        rollback_window (`int`, defaults to 256): Tokens that `crop` can take back, once
            `activate_past_recording` was called. It bounds what is recorded.

    Example:

    ```python
    >>> memory = model(input_ids, use_cache=True).cache
    >>> branch = memory.clone()
    >>> model(more_ids, cache=branch)
    ```
    """

    def __init__(self, config: StackformerConfig, rollback_window: int = ROLLBACK_WINDOW):
        if rollback_window < 0:
            raise ValueError(f"`rollback_window` must be at least 0, got {rollback_window}")
        layers = [StackformerCacheLayer(rollback_window) for _ in range(config.num_hidden_layers)]
        Cache.__init__(self, layers=layers)


class StackformerStaticCache(_Memory, StaticCache):
    """A memory that is written in place, for compiled decoding and CUDA graphs: addresses and shapes never
    change. For inference: no gradient flows through it, and it records no past.

    Args:
        config ([`StackformerConfig`]): of the model that it is for. Its state must not grow: softmax
            attention needs a `sliding_window`.
    """

    def __init__(self, config: StackformerConfig):
        layers = [StackformerStaticCacheLayer() for _ in range(config.num_hidden_layers)]
        Cache.__init__(self, layers=layers)


def check_cache(cache: Any, model: PreTrainedModel, batch_size: int) -> None:
    """Checks that a cache is one that a model can go on from, and makes it the model's own if it is nobody's.

    Args:
        cache: what was given as a cache; model: the base model; batch_size: rows of the input.

    Raises:
        ValueError: for anything that is no cache of a Stackformer; for a cache of another model, of another
            number of rows, or that a failed call left incomplete.
    """
    check_kind(cache, model)
    for number, (layer, core_layer) in enumerate(zip(cache.layers, model.layers, strict=True)):
        if layer.mark is not None and layer.mark.number != model.number:
            _check_owner(layer.mark, model)
        problem = layer.check(core_layer.state_spec, model.config.num_slices, batch_size)
        if problem is not None:
            raise ValueError(f"`cache` does not fit the model and its input: layer {number} has {problem}")
        if layer.mark is None or layer.mark.number != model.number:
            layer.mark = model.mark()


@contextmanager
def call_of_model(cache: Cache, length: int) -> Iterator[None]:
    """Surrounds a call of a model on `length` tokens, which gets the kind of layers that it needs. If it
    fails, or is interrupted, the cache is left as it was, or marked as unusable."""
    cache.layers = [layer.for_call() for layer in cache.layers]
    undo = [layer.begin_call(length) for layer in cache.layers]
    try:
        yield
    except BaseException:
        for function in undo:
            function()
        raise


def check_kind(cache: Any, model: PreTrainedModel) -> None:
    """Raises a ValueError for anything that is no cache of a Stackformer with as many layers as `model`."""
    # Not every Cache has layers, and some have them later.
    layers = getattr(cache, "layers", []) if isinstance(cache, Cache) else []
    ours = all(getattr(layer, "is_of_stackformer", False) for layer in layers)
    if len(layers) != len(model.layers) or not ours:
        found = f" of {len(layers)} layers" if layers else ""
        raise ValueError(
            f"`cache` must be a StackformerCache of {len(model.layers)} layers (or a "
            f"DynamicCache(config=model.config)), got {type(cache).__name__}{found}"
        )


@torch.compiler.disable
def _check_owner(mark: Mark, model: PreTrainedModel) -> None:
    difference = mark.difference(model)
    if difference is not None:
        raise ValueError(f"`cache` is the memory of another model: {difference}")


__all__ = [
    "Slot",
    "StackformerBufferLayer",
    "StackformerCache",
    "StackformerCacheLayer",
    "StackformerStaticCache",
    "StackformerStaticCacheLayer",
    "call_of_model",
    "check_cache",
    "check_kind",
]
