# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The recurrent state of a Stackformer as a transformers `Cache`. Its size does not depend on the text read.

A cache has one layer per core layer. A cache layer holds slices of state, one per ponder step, or a single
one with feedback. There are three kinds of cache layer:

- `StackformerCacheLayer` replaces tensors: gradients flow through it, and it can roll back.
- `StackformerBufferLayer` writes into buffers: calls without gradients use it.
- `StackformerStaticCacheLayer` writes into buffers that never move: compiled decoding uses it.
"""

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

# The default number of tokens that can be rolled back: many more than assisted decoding drafts at once.
ROLLBACK_WINDOW = 256


class Slot:
    """Reads and writes one slice of a layer's state during one call.

    The slot keeps the state that it found when it was made. So a checkpointed layer that runs again in the
    backward pass, after the write, starts from the same state as before.
    """

    def __init__(self, layer: "StackformerCacheLayer", index: int, layout: TokenLayout):
        self._layer, self._index, self._layout = layer, index, layout
        self._state = take_rows(layer.slices.get(index), layout.rows)

    def start(self, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        """Returns the state from which `mixer` continues, to mix `hidden` [n, d] with `pointer` [n, S]."""
        return Start(self._state)

    def write(self, state: State) -> None:
        """Replaces the state of the rows in the cache by their new state."""
        self._layer.write(self._index, state, self._layout)


class BufferSlot(Slot):
    """A slot of a [`StackformerBufferLayer`]. A mixer that can write in place writes into the buffers."""

    def __init__(self, layer: "StackformerBufferLayer", index: int, layout: TokenLayout):
        self._layer: StackformerBufferLayer
        self._layer, self._index, self._layout, self._is_written = layer, index, layout, False

    def start(self, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        """See the base class. If the mixer writes in place, the state has all batch rows [B, ...]."""
        state = self._layer.slices.get(self._index)
        if state is not None and mixer.writes_in_place(hidden, layout, state):
            self._layer.is_overwritten = self._is_written = True
            return Start(state, in_place=True)
        return Start(take_rows(state, layout.rows))

    def write(self, state: State) -> None:
        """See the base class. Does nothing if the mixer wrote in place."""
        if not self._is_written:
            super().write(state)


class StackformerCacheLayer(CacheLayerMixin):
    """The state of one core layer: a tuple of tensors, batch first, for every slice.

    There is one slice per ponder step, or a single one with feedback. Tensors are replaced, never written to.
    So gradients flow through the cache, and a state that is kept for a rollback costs no copy. Calls without
    gradients use a [`StackformerBufferLayer`] instead (`for_call`). While the layer records the past, `crop`
    can compute older states again (rollback.py).
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False
    is_shared = False  # whether several processes hold the state and must all read and write each slice
    # Identifies the layer where its type cannot: a checkpoint's copy of this package has types of its own.
    is_of_stackformer = True

    def __init__(self, rollback_window: int = ROLLBACK_WINDOW, **kwargs):
        super().__init__()
        self.is_initialized: bool = False
        self.slices: dict[int, State] = {}
        self.mark: Mark | None = None  # of the model that the state belongs to
        self.seen_tokens = 0
        self.rollback_window = rollback_window
        self.recording: Recording | None = None
        self._is_broken = False  # whether a failed call left the state incomplete

    def for_call(self) -> "StackformerCacheLayer":
        """Returns the layer for the next call of the model: this one, or a buffer layer with its state.

        Calls without gradients write into buffers. Otherwise, decoding would copy the rows of halted tokens
        at every ponder step, and allocate large states again for every token.
        """
        if torch.is_grad_enabled() or self.recording is not None or torch.compiler.is_compiling():
            return self
        return StackformerBufferLayer.of(self)

    def check(self, spec: StateSpec, num_slices: int, batch_size: int) -> str | None:
        """Returns the reason why this layer's state does not fit a batch; `None` if it fits.

        Args:
            spec: the state's specification in the model's core layer.
            num_slices: the number of slices in the model.
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
        """Returns a function that undoes the effects of the next call, on `length` tokens, on this layer."""
        slices, seen_tokens, is_initialized = dict(self.slices), self.seen_tokens, self.is_initialized
        recording = None if self.recording is None else self.recording.copy()

        def undo() -> None:
            self.slices, self.seen_tokens, self.is_initialized = slices, seen_tokens, is_initialized
            self.recording = recording

        return undo

    def open(self, index: int, layer: Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Slot:
        """Returns a slot for slice `index`, from which the core layer `layer` takes its state in this call.

        Args:
            hidden: [n, d], the layer's input; pointer: [n, S], the stack pointers; layout: of these tokens.
        """
        if self.recording is not None:
            self.recording.add(index, layer.advance, hidden, pointer, layout)  # type: ignore[arg-type]
        return Slot(self, index, layout)

    def write(self, index: int, state: State, layout: TokenLayout) -> None:
        """Replaces the state of slice `index` for the rows of `layout`."""
        self.slices[index] = put_rows(self.slices.get(index), state, layout)
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more positions as seen. Tokens before the rollback window become final."""
        self.seen_tokens += tokens
        if self.recording is not None:
            self.recording.count(tokens)

    @property
    def record_past(self) -> bool:
        """Whether the past is recorded, so that `crop` can go back."""
        return self.recording is not None

    def activate_past_recording(self) -> None:
        """Starts to record the tokens that `crop` may have to compute again."""
        if self.recording is None:
            self.recording = Recording(self.slices, self.rollback_window)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can restore an earlier state of this layer."""
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Restores the state before the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: for a positive number, or for more tokens than were recorded.
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
        """Makes the present state the earliest that `crop` can restore, while the layer records."""
        if self.recording is not None:
            self.recording.restart(self.slices)

    def load(self, slices: dict[int, State], seen_tokens: int, device: torch.device) -> None:
        """Takes over a saved state and moves it to `device`."""
        self.slices, self.seen_tokens, self.is_initialized = slices, seen_tokens, True
        self._is_broken = False
        self.map_(lambda tensor: tensor.to(device))

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor of the state by the result of `function` for it."""
        self.slices = {index: tuple(map(function, state)) for index, state in self.slices.items()}
        self._restart_recording()

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "StackformerCacheLayer":
        """Returns a copy of the layer whose tensors are the results of `function`."""
        layer = copy.copy(self)
        StackformerCacheLayer.map_(layer, function)
        return layer

    def __getstate__(self) -> dict:
        """Copies and pickles hold the state without the recorded calls, which refer to the model's layers."""
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
        """Returns -1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the length and the offset of a full attention mask."""
        return self.seen_tokens + query_length, 0

    def reset(self) -> None:
        """Empties the layer, which may then serve any model."""
        self.slices = {}
        self.mark = None
        self.seen_tokens = 0
        self.is_initialized = self._is_broken = False
        self._restart_recording()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces row i by row `beam_idx[i]`, for beam search."""
        self._check_rows("beam_idx", beam_idx)
        self.map_(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        if repeats < 1:
            raise ValueError(f"`repeats` must be at least 1, got {repeats}")
        self.map_(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows `indices` (integers or a boolean mask)."""
        self._check_rows("indices", indices)
        self.map_(lambda tensor: tensor[indices.to(tensor.device)])

    def _check_rows(self, name: str, indices: Tensor) -> None:
        """Raises a ValueError for indices that are no rows of the batch.

        The values of indices on a GPU are not checked, because reading them would wait for the GPU.
        """
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
        """Moves the state to the CPU. `prefetch` moves it back."""
        if self.slices:
            self.device = next(iter(self.slices.values()))[0].device
            self.map_(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves an offloaded state back to its device."""
        if self.slices:
            self.map_(lambda tensor: tensor.to(self.device, non_blocking=True))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("A Stackformer cache holds no keys and values: it cannot be used by another model.")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise ValueError("A Stackformer cache holds no keys and values: it cannot be used by another model.")


class StackformerBufferLayer(StackformerCacheLayer):
    """The state of one core layer in buffers, which calls without gradients write into.

    A call overwrites the old state, so keep a `clone` of the cache to return to it. States that grow, which
    are the keys and values of softmax attention without a window, get new buffers at each call.
    """

    def __init__(self, rollback_window: int = ROLLBACK_WINDOW, **kwargs):
        super().__init__(rollback_window)
        self.is_overwritten = False  # whether the present call has written into the buffers

    @classmethod
    def of(cls, layer: StackformerCacheLayer) -> "StackformerBufferLayer":
        """Returns a buffer layer with a copy of another layer's state."""
        buffers = cls(layer.rollback_window)
        buffers.__dict__.update(layer.__dict__)
        buffers.slices = {index: _copies(state) for index, state in layer.slices.items()}
        return buffers

    def for_call(self) -> StackformerCacheLayer:
        """Returns this layer, or a [`StackformerCacheLayer`] for calls with gradients or a recording.

        Buffers that were made in inference mode are copied for calls outside of it, which cannot write to
        them.
        """
        if torch.is_grad_enabled() or self.recording is not None:
            functional = StackformerCacheLayer(self.rollback_window)
            functional.__dict__.update(self.__dict__)
            return functional
        are_read_only = any(state[0].is_inference() for state in self.slices.values())
        return type(self).of(self) if are_read_only and not torch.is_inference_mode_enabled() else self

    def begin_call(self, length: int) -> Callable[[], None]:
        """See the base class.

        A call of several tokens writes into copies of the buffers, so that it can be undone. A call of one
        token writes into the buffers themselves. If it fails after a write, the layer refuses further calls.
        """
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
        """Copies the new state of the rows of `layout` into the buffers of slice `index`.

        A state that has grown replaces its buffers.
        """
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
    """The state of one core layer in buffers whose addresses and shapes never change.

    It serves compiled decoding and CUDA graphs. No gradient flows through it, and it records no past.
    """

    is_compileable = True

    def __init__(self, **kwargs):
        super().__init__()
        self._num_slices = 1  # `check` sets it, when the cache is first used with a model
        self._seen: Tensor | None = None  # a tensor, because a Python integer would recompile every step

    def for_call(self) -> StackformerCacheLayer:
        """Returns this layer."""
        return self

    def check(self, spec: StateSpec, num_slices: int, batch_size: int) -> str | None:
        """See the base class. A state that grows does not fit a static layer."""
        self._num_slices = num_slices
        if growing := [tensor.name for tensor in spec if None in tensor.shape]:
            return (
                f"a state that grows, {growing}, which no static cache can hold: attention needs a "
                "`sliding_window`"
            )
        return super().check(spec, num_slices, batch_size)

    def open(self, index: int, layer: Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Slot:
        """See the base class. Mixers never write in place here: `write` copies, with gradients on, too."""
        return Slot(self, index, layout)

    def write(self, index: int, state: State, layout: TokenLayout) -> None:
        """Copies the new state of slice `index` into its buffers. The first write allocates all slices."""
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
        """Counts `tokens` more positions as seen."""
        if self._seen is None:
            self._seen = torch.zeros((), dtype=torch.long, device=self.slices[0][0].device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self._seen)
        self._seen.add_(tokens)

    def get_seq_length(self) -> int:
        """Positions seen so far, padding included. On a GPU, the call waits for the device."""
        return 0 if self._seen is None else int(self._seen)

    def activate_past_recording(self) -> None:
        raise ValueError(
            "A static cache records no past: assisted decoding needs a cache that is not static."
        )

    def load(self, slices: dict[int, State], seen_tokens: int, device: torch.device) -> None:
        """Takes over a saved state and moves it to `device`."""
        super().load(slices, 0, device)
        self._seen = torch.tensor(seen_tokens, device=device)

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Writes the results of `function` into the buffers. Results of another shape replace the buffers."""
        for index, state in self.slices.items():
            results = tuple(map(function, state))
            if all(new.shape == old.shape for new, old in zip(results, state, strict=True)):
                for buffer, tensor in zip(state, results, strict=True):
                    buffer.copy_(tensor)
            else:
                self.slices[index] = results

    def mapped(self, function: Callable[[Tensor], Tensor]) -> StackformerCacheLayer:
        """See the base class. The copy has buffers of its own."""
        layer = super().mapped(function)
        layer._seen = None if self._seen is None else self._seen.clone()  # type: ignore[attr-defined]
        return layer

    def reset(self) -> None:
        """Fills the buffers with zeros, and keeps them. The layer may then serve any model."""
        self._is_broken, self.mark = False, None
        for state in self.slices.values():
            for buffer in state:
                buffer.zero_()
        if self._seen is not None:
            self._seen.zero_()


def _overwrite(buffers: State, state: State, layout: TokenLayout) -> None:
    """Copies the state of the rows of `layout` [B', ...] into buffers of all rows [B, ...]."""
    for buffer, tensor in zip(buffers, state, strict=True):
        if layout.rows is None:
            buffer.copy_(tensor)
        else:
            buffer.index_copy_(0, layout.rows, tensor)


def _copies(state: State) -> State:
    """Copies every tensor of a state, contiguously."""
    return tuple(torch.clone(tensor, memory_format=torch.contiguous_format) for tensor in state)


def _apart(tensor: Tensor, original: Tensor) -> Tensor:
    """Returns `tensor`, as a copy if it shares memory with `original`."""
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
    """Uploads a folder's memory file to the Hub. Returns the URL of the commit."""
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
    """The methods of both kinds of cache: saving, loading, copying, and binding to a model."""

    layers: list[StackformerCacheLayer]

    @property
    def mark(self) -> Mark | None:
        """The mark of the model that filled this memory; `None` before the first call."""
        return self.layers[0].mark

    def bind(self: "AnyMemory", mark: Mark) -> "AnyMemory":
        """Declares this memory to belong to the model of `mark`. Returns the cache itself."""
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
        """Writes the memory to a folder, as the file `memory.safetensors`, which identifies the model.

        The file is replaced as a whole: a write that fails leaves the previous file.

        Args:
            model: the model that filled the memory. Not needed for a cache that the model or `generate` made.
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
        """Uploads the memory to a model repository on the Hub (the model's own, or one for memories).

        Args:
            repo_id: the repository. It is created if it does not exist.
            model: see `save_pretrained`.
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
        """Loads a memory from a folder or from the Hub, for the model that filled it.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or a repository on the Hub.
            model: the model, with the same adapters active. The memory is loaded to its device.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir`, ... as in other `from_pretrained` methods.

        Raises:
            ValueError: if the memory is of another model, damaged, or of an unknown format version.
            OSError: if there is no memory.
        """
        model = unwrap(model)
        path = cached_file(pretrained_model_name_or_path, MEMORY_FILE, **kwargs)
        if not has_description(path):  # an older version wrote the description to a second file
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
        """Returns an independent copy. Gradients flow from the copy to this cache."""
        return self._mapped(torch.clone)

    def detach(self: "AnyMemory") -> "AnyMemory":
        """Returns the same state without its graph, for truncated backpropagation through time."""
        return self._mapped(Tensor.detach)

    @property
    def num_bytes(self) -> int:
        """Size of the state in bytes.

        It grows with the number of tokens only for softmax attention without a window.
        """
        states = (state for layer in self.layers for state in layer.slices.values())
        return sum(tensor.nbytes for state in states for tensor in state)

    def _mapped(self: "AnyMemory", function: Callable[[Tensor], Tensor]) -> "AnyMemory":
        """Returns a copy of the cache whose tensors are the results of `function`."""
        mapped = copy.copy(self)
        mapped.layers = [layer.mapped(function) for layer in self.layers]
        return mapped


class StackformerCache(_Memory, DynamicCache):
    """The memory of a Stackformer: its recurrent state after all tokens that it has read.

    `forward` and `generate` return a cache and accept it in the next call. A cache has one layer per core
    layer, each with one slice of state per ponder step, or a single slice with `config.feedback`. States are
    float32 (float64 in a float64 model, and in coupled cells). Keys and values of softmax attention keep the
    dtype in which they were computed.

    Args:
        config ([`StackformerConfig`]): the configuration of the model.
        rollback_window (`int`, defaults to 256): Number of tokens that `crop` can take back, once
            `activate_past_recording` was called. At most twice as many tokens are recorded.

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
    """A memory for compiled decoding and CUDA graphs, in buffers whose addresses and shapes never change.

    No gradient flows through it, and it records no past.

    Args:
        config ([`StackformerConfig`]): the configuration of the model. Its state must not grow: softmax
            attention needs a `sliding_window`.
    """

    def __init__(self, config: StackformerConfig):
        layers = [StackformerStaticCacheLayer() for _ in range(config.num_hidden_layers)]
        Cache.__init__(self, layers=layers)


def check_cache(cache: Any, model: PreTrainedModel, batch_size: int) -> None:
    """Checks that a model can continue from a cache, and binds a cache without an owner to the model.

    Args:
        cache: the argument to check; model: the base model; batch_size: rows of the input.

    Raises:
        ValueError: for an argument that is no cache of a Stackformer, and for a cache of another model, of
            another number of rows, or left incomplete by a failed call.
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
    """Prepares a cache for one call of a model on `length` tokens, and restores it if the call fails.

    The cache gets the kind of layers that the call needs. A call that fails or is interrupted leaves the
    cache as it was, or, if it wrote in place, marked as unusable.
    """
    cache.layers = [layer.for_call() for layer in cache.layers]
    undo = [layer.begin_call(length) for layer in cache.layers]
    try:
        yield
    except BaseException:
        for function in undo:
            function()
        raise


def check_kind(cache: Any, model: PreTrainedModel) -> None:
    """Raises a ValueError unless `cache` is a cache of a Stackformer with as many layers as `model`."""
    # Some caches of transformers have no layers, or get them only in the first call.
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
    """Raises a ValueError if the model of `mark` differs from `model`."""
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
