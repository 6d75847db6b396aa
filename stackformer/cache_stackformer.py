# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The recurrent state of a Stackformer as a transformers `Cache`: constant in size, whatever was read."""

import copy
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
from .state import State, StateOfAllRows, StateSpec, find_mismatch
from .token_layout import TokenLayout

# Tokens that can be rolled back by default: far more than assisted decoding drafts at once.
ROLLBACK_WINDOW = 256


class _Call(NamedTuple):
    """What one core layer read in one call of one slice: enough to compute the slice's state again."""

    start: int  # tokens since the anchor
    advance: Callable[[Tensor, Tensor, TokenLayout, State | None], State]
    hidden: Tensor  # [n, d]
    pointer: Tensor  # [n, S]
    layout: TokenLayout

    def replay(self, state: State | None, stop: int) -> State | None:
        """The slice's state (all batch rows) after those tokens of this call that come before token
        `stop`."""
        keep = self.layout.before(stop - self.start, self.hidden.device).nonzero().squeeze(-1)
        layout = self.layout.select(keep)
        if layout.num_tokens == 0:
            return state
        new = self.advance(self.hidden[keep], self.pointer[keep], layout, take_rows(state, layout.rows))
        return put_rows(state, new, layout)

    def after(self, stop: int) -> "_Call":
        """What is left of this call from token `stop` on, counted from there."""
        keep = (~self.layout.before(stop - self.start, self.hidden.device)).nonzero().squeeze(-1)
        layout = self.layout.select(keep)
        return _Call(self.start - stop, self.advance, self.hidden[keep], self.pointer[keep], layout)


class StackformerCacheLayer(CacheLayerMixin):
    """The state of one core layer: for every slice (ponder step; one in all with feedback), its mixer's tuple
    of tensors, batch first.

    Tensors are replaced, so gradients flow through the cache, and a state that is kept for a rollback costs
    no copy. Written in place, without gradients, are only tensors that the layer itself made, for some of the
    rows or for a mixer that can, and only as long as nobody can hold them: looking at `slices` ends that.
    Without this, decoding would copy the rows of tokens that have halted at every step, which takes as long
    as computing them, and large states would be new memory at every token.

    While it records the past, the layer holds an anchor (an older state) and what was read since, and `crop`
    computes the state in between again.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False
    is_shared = False  # by processes that all have to read and write each slice
    is_of_stackformer = True  # where types are not: the package and a copy of it from a checkpoint may meet

    def __init__(self, rollback_window: int = ROLLBACK_WINDOW, **kwargs):
        super().__init__()
        self.is_initialized: bool = False
        self._slices: dict[int, State] = {}
        self._private: set[int] = set()  # slices whose tensors only this layer holds
        self._overwritten = False  # whether the call that is under way wrote in place
        self._is_broken = False  # by a call that failed halfway
        self._fits: tuple[int, int] | None = None  # the model's number and the rows that were checked last
        self.mark: Mark | None = None  # whose state this is
        self.seen_tokens = 0
        self.rollback_window = rollback_window
        self.record_past = False
        self._anchor: dict[int, State] = {}
        self._calls: dict[int, list[_Call]] = {}
        self._recorded_tokens = 0

    @property
    def slices(self) -> dict[int, State]:
        """The state of each slice that was written. Its tensors will not be written in place."""
        self._private.clear()
        self._fits = None  # whoever holds the dictionary may change it
        return self._slices

    @slices.setter
    def slices(self, slices: dict[int, State]) -> None:
        self._private.clear()
        self._fits, self._is_broken = None, False
        self._slices = slices

    def check(self, spec: StateSpec, num_slices: int, batch_size: int) -> str | None:
        """Says what keeps this layer's state from being read for a batch; `None` if nothing does.

        Args:
            spec: of the state of the model's core layer; num_slices: how many of them there are.
            batch_size: rows of the input.
        """
        if self._is_broken:
            return "a state that a failed call left incomplete: `reset` it, or go on from a copy"
        if unknown := [index for index in self._slices if not 0 <= index < num_slices]:
            return f"states of ponder steps {unknown} in a model whose states are {list(range(num_slices))}"
        for state in self._slices.values():
            if mismatch := find_mismatch(state, spec):
                return mismatch
            if len(state[0]) != batch_size:
                return (
                    f"{len(state[0])} rows for an input of {batch_size}: repeat or select its rows with "
                    "`batch_repeat_interleave` or `batch_select_indices`"
                )
        return None

    def begin_call(self) -> Callable[[], None]:
        """Returns a function that undoes what a call of the model has done to this layer since.

        A state that was written in place cannot be had back: the layer refuses to be read then.
        """
        before = (dict(self._slices), set(self._private), self.seen_tokens, self.is_initialized)
        anchor, recorded = dict(self._anchor), self._recorded_tokens
        calls = {index: list(calls) for index, calls in self._calls.items()}
        self._overwritten = False

        def undo() -> None:
            self._slices, self._private, self.seen_tokens, self.is_initialized = before
            self._anchor, self._calls, self._recorded_tokens = anchor, calls, recorded
            self._fits, self._is_broken = None, self._overwritten

        return undo

    def read(self, index: int, layout: TokenLayout) -> State | Callable[..., tuple[State]] | None:
        """The state of slice `index` for the rows of `layout`, or a function that gives it to a mixer; `None`
        before the first write."""
        if index in self._slices and self._may_write_in_place(index):
            return functools.partial(self._lend, index)
        return take_rows(self._slices.get(index), layout.rows)

    def _lend(self, index: int, mixer: Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout):
        """The state of the rows of `layout`; of all rows to a mixer that writes in place, copied first if
        others may hold it."""
        state = self._slices[index]
        writes_in_place = getattr(mixer, "writes_in_place", None)
        if writes_in_place is None or not writes_in_place(hidden, layout, state):
            return (take_rows(state, layout.rows),)
        if index not in self._private:
            state = self._slices[index] = tuple(map(torch.clone, state))
            self._private.add(index)
        else:
            self._overwritten = True
        return (StateOfAllRows(state),)

    def write(self, index: int, state: State, layout: TokenLayout) -> None:
        """Replace the state of slice `index` for the rows of `layout`."""
        old = self._slices.get(index)
        if old is not None and index in self._private and self._may_write_in_place(index):
            if all(new is past for past, new in zip(old, state, strict=True)):
                return  # the mixer wrote in place
            same = all(new.shape[1:] == past.shape[1:] for past, new in zip(old, state, strict=True))
            if layout.rows is not None and same:
                self._overwritten = True
                for past, new in zip(old, state, strict=True):
                    past.index_copy_(0, layout.rows, new)
                return
        self._slices[index] = put_rows(old, state, layout)
        self.is_initialized = True
        if layout.rows is None or torch.is_grad_enabled():
            self._private.discard(index)
        else:
            self._private.add(index)

    def _may_write_in_place(self, index: int) -> bool:
        """Whether slice `index` may be written in place if nobody else holds it: no graph, no anchor."""
        if self.record_past or torch.is_grad_enabled():
            return False
        return torch.is_inference_mode_enabled() or not self._slices[index][0].is_inference()

    def record(
        self, index: int, advance: Callable, hidden: Tensor, pointer: Tensor, layout: TokenLayout
    ) -> None:
        """Keep what slice `index` read in this call, if the past is recorded.

        Args:
            advance: computes the slice's new state from `hidden`, `pointer`, `layout` and its old state.
        """
        if self.record_past:
            call = _Call(self._recorded_tokens, advance, hidden, pointer, layout)
            self._calls.setdefault(index, []).append(call)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions as seen; what fell out of the window can no longer be rolled back."""
        self.seen_tokens += tokens
        if self.record_past:
            self._recorded_tokens += tokens
            if self._recorded_tokens > 2 * self.rollback_window:
                self._move_anchor(self._recorded_tokens - self.rollback_window)

    def activate_past_recording(self) -> None:
        """From now on, keep what `crop` needs."""
        if not self.record_past:
            self.record_past = True
            self._restart_window()

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
        if -tokens_to_remove > self._recorded_tokens:
            raise ValueError(
                f"`tokens_to_remove` must go back at most the {self._recorded_tokens} tokens recorded since "
                f"`activate_past_recording` and the last `crop` or change of the batch "
                f"(`rollback_window` is {self.rollback_window}), got {tokens_to_remove}"
            )
        if tokens_to_remove:
            self.slices = self._replayed(self._recorded_tokens + tokens_to_remove)
            self.seen_tokens += tokens_to_remove
        self._restart_window()

    def _replayed(self, stop: int) -> dict[int, State]:
        """All slices after `stop` tokens since the anchor."""
        slices = {}
        for index in self._slices:
            state = self._anchor.get(index)
            for call in self._calls.get(index, []):
                if call.start < stop:
                    state = call.replay(state, stop)
            if state is not None:
                slices[index] = state
        return slices

    def _move_anchor(self, stop: int) -> None:
        self._anchor = self._replayed(stop)
        self._calls = {
            index: [call.after(stop) for call in calls if call.start + call.layout.length > stop]
            for index, calls in self._calls.items()
        }
        self._recorded_tokens -= stop

    def _restart_window(self) -> None:
        # Without a past to go back to, an anchor would only keep old tensors alive.
        self._anchor = dict(self.slices) if self.record_past else {}
        self._calls, self._recorded_tokens = {}, 0

    def load(self, slices: dict[int, State], seen_tokens: int, device: torch.device) -> None:
        """Take over a state that was saved."""
        self.slices, self.seen_tokens, self.is_initialized = slices, seen_tokens, True
        self.map_(lambda tensor: tensor.to(device))

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every state tensor by what `function` makes of it."""
        self.slices = {index: tuple(map(function, state)) for index, state in self.slices.items()}
        self._restart_window()

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "StackformerCacheLayer":
        """A copy of the layer whose state tensors are what `function` makes of this one's."""
        layer = copy.copy(self)
        StackformerCacheLayer.map_(layer, function)
        return layer

    def __getstate__(self) -> dict:
        """Copies and pickles hold the state, not the layers that computed it."""
        slices = self.slices  # the copy will hold them, too
        anchor = dict(slices) if self.record_past else {}
        state = {
            "_anchor": anchor, "_private": set(), "_calls": {}, "_recorded_tokens": 0, "_fits": None,
        }  # fmt: skip
        return {**self.__dict__, **state}

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first write."""
        return next(iter(self._slices.values()))[0].shape[0] if self._slices else -1

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
        self.is_initialized = False
        self._restart_window()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._check_rows("beam_idx", beam_idx)
        self._copy_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if repeats < 1:
            raise ValueError(f"`repeats` must be at least 1, got {repeats}")
        self._copy_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a boolean mask)."""
        self._check_rows("indices", indices)
        self._copy_rows(lambda tensor: tensor[indices.to(tensor.device)])

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

    def _copy_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """`map_` for a function whose results are new tensors, which nobody else holds."""
        self.map_(function)
        if not (self.record_past or torch.is_grad_enabled()):
            self._private.update(self._slices)

    def offload(self) -> None:
        """Move the state to the CPU; `prefetch` moves it back."""
        if self._slices:
            self.device = next(iter(self._slices.values()))[0].device
            self.map_(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move an offloaded state back to its device."""
        if self._slices:
            self.map_(lambda tensor: tensor.to(self.device, non_blocking=True))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("A Stackformer cache holds no keys and values: it cannot be used by another model.")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise ValueError("A Stackformer cache holds no keys and values: it cannot be used by another model.")


class StackformerStaticCacheLayer(StackformerCacheLayer):
    """A layer that writes in place, for compiled decoding and CUDA graphs: addresses and shapes never change.

    For inference: no gradient flows through it, and it records no past.
    """

    is_compileable = True

    def __init__(self, **kwargs):
        super().__init__()
        self._num_slices = 1  # known when the cache meets its model
        self._seen: Tensor | None = None  # a tensor, since a counter in Python would recompile every step

    def _may_write_in_place(self, index: int) -> bool:
        """Only the layer itself does, by `write`."""
        return False

    def check(self, spec: StateSpec, num_slices: int, batch_size: int) -> str | None:
        """As for a layer that is not static; a state that grows does not fit, either."""
        self._num_slices = num_slices
        if growing := [tensor.name for tensor in spec if None in tensor.shape]:
            return (
                f"a state that grows, {growing}, which no static cache can hold: attention needs a "
                "`sliding_window`"
            )
        return super().check(spec, num_slices, batch_size)

    def write(self, index: int, state: State, layout: TokenLayout) -> None:
        """Copy the new state of slice `index` into its buffers; the first call allocates all slices."""
        self._overwritten = True
        if not self._slices:
            for number in range(self._num_slices):
                shapes = [(layout.batch_size, *tensor.shape[1:]) for tensor in state]
                buffers = tuple(x.new_zeros(shape) for x, shape in zip(state, shapes, strict=True))
                if not torch.compiler.is_compiling():
                    for buffer in buffers:
                        torch._dynamo.mark_static_address(buffer)
                self._slices[number] = buffers
            self.is_initialized = True
        for buffer, tensor in zip(self._slices[index], state, strict=True):
            if layout.rows is None:
                buffer.copy_(tensor.detach())
            else:
                buffer.index_copy_(0, layout.rows, tensor.detach())

    def advance(self, tokens: int) -> None:
        """Count `tokens` more positions as seen."""
        if self._seen is None:
            self._seen = torch.zeros((), dtype=torch.long, device=self._slices[0][0].device)
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

    def begin_call(self) -> Callable[[], None]:
        """See the base class. There is no going back from what was written to buffers."""
        self._overwritten = False

        def undo() -> None:
            self._fits, self._is_broken = None, self._overwritten

        return undo

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Write what `function` makes of the state into the buffers, or replace those whose shape changes."""
        for index, state in self._slices.items():
            results = tuple(map(function, state))
            if all(new.shape == old.shape for new, old in zip(results, state, strict=True)):
                for buffer, tensor in zip(state, results, strict=True):
                    buffer.copy_(tensor)
            else:
                self._slices[index] = results

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "StackformerCacheLayer":
        """A copy of the layer with buffers of its own."""
        layer = super().mapped(function)
        layer._seen = None if self._seen is None else self._seen.clone()
        return layer

    def reset(self) -> None:
        """Forget everything, and keep the buffers."""
        self._is_broken, self.mark = False, None
        for state in self._slices.values():
            for buffer in state:
                buffer.zero_()
        if self._seen is not None:
            self._seen.zero_()


def take_rows(state: State | None, rows: Tensor | None) -> State | None:
    """The batch rows `rows` [B'] of a state, all if `None`."""
    if state is None or rows is None:
        return state
    return tuple(tensor.index_select(0, rows) for tensor in state)


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
        torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (length - tensor.shape[1], 0))
        for tensor in tensors
    ]


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
        # A compiled graph checks when it is made, and must not change what it would then depend on.
        compiling = torch.compiler.is_compiling()
        if not compiling and layer._fits == (model.number, batch_size):
            continue
        if layer.mark is not None and layer.mark.number != model.number:
            _check_owner(layer.mark, model)
        problem = layer.check(core_layer.state_spec, model.config.num_slices, batch_size)
        if problem is not None:
            raise ValueError(f"`cache` does not fit the model and its input: layer {number} has {problem}")
        if layer.mark is None or layer.mark.number != model.number:
            layer.mark = model.mark()
        if not compiling:
            layer._fits = model.number, batch_size


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


__all__ = ["StackformerCache", "StackformerCacheLayer", "StackformerStaticCache"]
