# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Full backpropagation through any number of tokens, in activation memory that does not grow with them.

The model first reads the tokens in chunks, without a graph. Then it runs each chunk again with a graph, from
the last chunk to the first: forward from the state at the chunk's start, and backward with the gradient of
its end state, which comes from the chunk after it. Losses and gradients are those of one forward and backward
pass over all tokens. The methods differ in how they find the state at the start of a chunk:

- "reverse" computes it from the state at the chunk's end. Each ponder step and layer has a slice of the state
  of its own, and writes to a slice depend on lower slices only, so one pass upward through the model reverses
  each slice and runs it with a graph at once. Reversing a decay of a nats amplifies rounding errors by exp(a)
  (MacKay et al. 2018, "Reversible Recurrent Neural Networks", section 3: finite precision cannot forget and
  reverse). Rounding errors are in proportion to the size of a memory at the end, so a memory that grew by
  exp(b) comes back with relative errors that are larger by exp(b). Therefore a memory is anchored, which
  means copied, before its decay and growth since the last copy come to more than `max_log_decay`.
- "stored" copies the whole state at the start of every chunk. It is exact, for any mixer and any decay.
  "reverse" does the same for mixers that cannot be run backwards, and for models with feedback.
- "truncated" cuts the graph between chunks: truncated backpropagation through time, for comparison.

With each chunk, the past of the convolutions and the number of ponder steps of each token are kept, too.

Letters: B batch, T time, H heads, R memories per head, K key size, V value size; B' rows with active tokens.
"""

import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.utils import logging

from ..cache_stackformer import Slot, StackformerCache, StackformerCacheLayer
from ..labels import check_num_items, label_each_token
from ..mixer import Mixer
from ..state import Start, State, put_rows, take_rows
from ..token_layout import TokenLayout

logger = logging.get_logger(__name__)

METHODS = ("reverse", "stored", "truncated")

# The parts of one slice of a layer's state that are kept with a chunk: a mask [B, H, R] of the anchored
# memories, their tensors before the chunk, and the tensors that are not reversible. For a state that is
# stored as a whole: `None`, all tensors, and ().
Kept = tuple[Tensor | None, State, State]


class DriftError(RuntimeError):
    """Reconstructed states differ from the originals by more than `max_drift`."""


@dataclass
class LongContextOutput:
    """The result of `long_context_backward`. The gradients are in the parameters.

    Args:
        loss (`torch.FloatTensor`): mean over the labels of all chunks (or their sum divided by
            `num_items_in_batch`), ponder loss included.
        cache ([`StackformerCache`]): the state after the last token, without a graph.
        drift (`float`): largest error of a reconstructed memory, relative to the largest memory of its head.
            It is measured where it is largest: at the end of chunks that start from an anchor, or from the
            first token.
        num_anchors (`int`): number of copied memories (a matrix with its key sum is one).
        kept_bytes (`int`): bytes kept between the forward and the backward pass, besides the tokens.
    """

    loss: Tensor
    cache: StackformerCache
    drift: float = 0.0
    num_anchors: int = 0
    kept_bytes: int = 0


def long_context_backward(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: StackformerCache | None = None,
    num_items_in_batch: Tensor | int | None = None,
    chunk_size: int = 1024,
    method: str = "reverse",
    max_log_decay: float = 6.0,
    max_drift: float = 1e-2,
    storage: str = "device",
    scale_loss: Callable[[Tensor], Tensor] | None = None,
) -> LongContextOutput:
    """Add the gradients of the loss over T tokens to the gradients of the parameters, chunk by chunk.

    Args:
        model: a causal language model with a recurrent state, possibly wrapped (DDP, FSDP2, PEFT).
        input_ids: [B, T], on any device; each chunk is moved to the model's device.
        labels: [B, T], shifted inside, -100 is ignored; or `shift_labels`: [B, T], the label of each token.
        attention_mask: [B, T], 0 for padding.
        cache: the state to start from. No gradient flows into the cache, and it is not changed.
        num_items_in_batch: divisor of the summed loss; the number of labels if `None`.
        chunk_size: number of tokens that run at once. Activation memory is proportional to it.
        method: "reverse", "stored" or "truncated".
        max_log_decay: nats by which a memory may decay or grow before it is anchored (method "reverse").
            Rounding errors are amplified by up to exp(max_log_decay).
        max_drift: largest relative error that a reconstructed memory may have.
        storage: the place of anchors and stored states: "device", "cpu", or a folder for temporary files.
        scale_loss: applied to the loss of each chunk before its backward pass (gradient scaling). The
            returned loss is not scaled.

    Raises:
        ValueError: for an argument out of range.
        DriftError: if a reconstructed memory is off by more than `max_drift`. Do not step the optimizer then.
    """
    _check_options(chunk_size, method, max_log_decay, max_drift, storage)
    shift_labels, num_items_in_batch = _targets(
        model, input_ids, labels, shift_labels, attention_mask, num_items_in_batch
    )

    chunks = _Chunks(model, input_ids, shift_labels, attention_mask, chunk_size)
    cache = chunks.initial(cache)
    if chunks.config.feedback and method == "reverse":
        logger.warning_once(
            "A model with feedback cannot be run backwards: states are stored for every chunk"
        )
        method = "stored"
    run = {"num_items_in_batch": num_items_in_batch, "scale_loss": scale_loss or nn.Identity()}
    if method == "truncated":
        return _truncated(chunks, cache, **run)
    with _Storage(storage, chunks.device) as kept:
        recorder = _with_layers(cache, lambda layer: _RecordingLayer(layer, method, max_log_decay))
        _read(chunks, recorder, kept)
        output = _rewind(chunks, recorder, kept, max_drift, **run)
        output.kept_bytes = kept.num_bytes
        return output


@torch.no_grad()
def long_context_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: StackformerCache | None = None,
    num_items_in_batch: Tensor | int | None = None,
    chunk_size: int = 1024,
) -> LongContextOutput:
    """Compute the loss of `long_context_backward`, and the state after the last token, without gradients."""
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    shift_labels, num_items_in_batch = _targets(
        model, input_ids, labels, shift_labels, attention_mask, num_items_in_batch
    )
    chunks = _Chunks(model, input_ids, shift_labels, attention_mask, chunk_size)
    cache = chunks.initial(cache)
    loss = torch.zeros((), device=chunks.device)
    for number in range(len(chunks)):
        loss = loss + chunks.loss(number, cache, num_items_in_batch)
    return LongContextOutput(loss=loss, cache=cache)


class _Chunks:
    """The tokens in chunks, on the model's device, and the model's calls on them.

    The two calls on a chunk, without and with a graph, draw the same random numbers (dropout).
    """

    def __init__(
        self, model: Any, input_ids: Tensor, shift_labels: Tensor, attention_mask: Tensor | None, size: int
    ):
        unwrapped = extract_model_from_parallel(model)
        self.model, self.device, self.config = model, unwrapped.device, unwrapped.config
        self.input_ids, self.shift_labels, self.attention_mask = input_ids, shift_labels, attention_mask
        self.size = size
        self.seed = int(torch.randint(2**32, ()))

    def __len__(self) -> int:
        return -(-self.input_ids.shape[1] // self.size)

    def initial(self, past: StackformerCache | None) -> StackformerCache:
        """Returns the cache to start with: an empty one, or `past` without its graph."""
        return StackformerCache(self.config) if past is None else past.detach()

    def read(self, number: int, cache: StackformerCache) -> None:
        """Advance the state by a chunk, without a graph."""
        with torch.no_grad(), self._randomness(number):
            self.model(**self._inputs(number), cache=cache, logits_to_keep=1)

    def loss(
        self, number: int, cache: StackformerCache, num_items_in_batch: Tensor | int, **kwargs: Any
    ) -> Tensor:
        """Advance the state by a chunk. Returns the loss."""
        labels = self._chunk(self.shift_labels, number).contiguous()
        targets = {"labels": labels, "shift_labels": labels, "num_items_in_batch": num_items_in_batch}
        return self.model(**self._inputs(number), **targets, cache=cache, **kwargs).loss

    def backward(
        self,
        number: int,
        cache: StackformerCache,
        ends: Callable[[], list[tuple[Tensor, Tensor]]],
        last: bool,
        num_items_in_batch: Tensor | int,
        scale_loss: Callable[[Tensor], Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """Run a chunk forward and backward. Returns the loss.

        Args:
            ends: returns the chunk's end states and their gradients. It is called after the forward pass.
            last: whether this is the last backward pass. DDP exchanges gradients after the last pass only.
                FSDP2 exchanges them after each, because gradients that are not reduced are not sharded.
        """
        wait = not last and isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if wait else nullcontext(), self._randomness(number):
            loss = self.loss(number, cache, num_items_in_batch, **kwargs)
            states = [(state, grad) for state, grad in ends() if state.requires_grad]
            torch.autograd.backward(
                [scale_loss(loss), *(state for state, _ in states)], [None, *(grad for _, grad in states)]
            )
        return loss.detach()

    def _inputs(self, number: int) -> dict[str, Tensor]:
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {name: self._chunk(x, number) for name, x in inputs.items() if x is not None}

    def _chunk(self, tensor: Tensor, number: int) -> Tensor:
        return tensor[:, number * self.size : (number + 1) * self.size].to(self.device)

    @contextmanager
    def _randomness(self, number: int) -> Iterator[None]:
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            if self.device.type == "cpu":  # `torch.manual_seed` keeps a stack trace for each other backend
                torch.default_generator.manual_seed(self.seed + number)
            else:
                torch.manual_seed(self.seed + number)
            yield


def _truncated(chunks: _Chunks, cache: StackformerCache, **run: Any) -> LongContextOutput:
    loss = torch.zeros((), device=chunks.device)
    for number in range(len(chunks)):
        loss = loss + chunks.backward(number, cache, list, number == len(chunks) - 1, **run)
        cache = cache.detach()
    return LongContextOutput(loss=loss, cache=cache)


def _read(chunks: _Chunks, recorder: StackformerCache, kept: "_Storage") -> None:
    """Run the forward pass. `recorder` ends in the state after all tokens; `kept` gets an entry per chunk."""
    # Depths are kept so that no token halts at another step because of errors in a reconstructed state. With
    # feedback, no state is reconstructed.
    config = chunks.config
    halts = config.halting_threshold > 0 and config.max_ponder_steps > 1 and not config.feedback
    for number in range(len(chunks)):
        chunks.read(number, recorder)
        depths, states = zip(*(layer.take() for layer in recorder.layers), strict=True)
        kept.push((depths[0] if halts else None, states))


def _rewind(
    chunks: _Chunks, recorder: StackformerCache, kept: "_Storage", max_drift: float, **run: Any
) -> LongContextOutput:
    """Run the backward pass, from the last chunk to the first."""
    rewinder = _with_layers(recorder, _RewindingLayer)
    loss, drift = torch.zeros((), device=chunks.device), 0.0

    def ends() -> list[tuple[Tensor, Tensor]]:
        return [pair for layer in rewinder.layers for pair in layer.end_gradients()]

    for number in reversed(range(len(chunks))):
        depths, states = kept.pop()
        for layer, state in zip(rewinder.layers, states, strict=True):
            layer.begin(state)
        loss = loss + chunks.backward(number, rewinder, ends, number == 0, ponder_depths=depths, **run)
        errors = [error for layer in rewinder.layers for error in layer.finish()]
        if errors:
            worst = float(torch.stack(errors).max())
            if not worst <= max_drift:  # true for NaN, too
                raise DriftError(
                    f"A reconstructed memory is off by {worst:.1e} of its size at the end of chunk "
                    f"{number} of {len(chunks)}, `max_drift` is {max_drift:.1e}: lower `max_log_decay`, "
                    "compute in float32 if the dtype has less precision, or use the method 'stored'"
                )
            drift = max(drift, worst)
    cache = StackformerCache(chunks.config)
    for plain, layer in zip(cache.layers, recorder.layers, strict=True):
        plain.load(layer.slices, layer.seen_tokens, chunks.device)
    anchors = sum(layer.num_anchors for layer in recorder.layers)
    return LongContextOutput(loss=loss, cache=cache, drift=drift, num_anchors=anchors)


def _with_layers(cache: StackformerCache, make: Callable[[Any], StackformerCacheLayer]) -> StackformerCache:
    """Returns a copy of `cache` with the layers that `make` returns for its layers."""
    result = copy.copy(cache)
    result.layers = [make(layer) for layer in cache.layers]
    return result


class _RecordingLayer(StackformerCacheLayer):
    """A layer of the forward pass. It keeps what the backward pass needs to find the start of each chunk."""

    def __init__(self, layer: StackformerCacheLayer, method: str, max_log_decay: float):
        super().__init__()
        self.slices, self.seen_tokens = dict(layer.slices), layer.seen_tokens
        self.num_anchors = 0
        self._reverse, self._max_log_decay = method == "reverse", max_log_decay
        self._depths: Tensor | None = None  # [B, T], ponder steps of the chunk's tokens
        self._kept: dict[int, Kept] = {}
        self._begun: set[int] = set()  # slices that the chunk has read; feedback reads them again
        # For each slice, over the chunks that are reversed down to a memory's anchor: the memory's decay in
        # nats, and the minimum, over the starts of these chunks, of the decay until there plus the log of the
        # size of the largest memory in the head. The chunk that starts with the anchor does not count, since
        # it is not reversed.
        self._undone: dict[int, tuple[Tensor | float, Tensor | float]] = {}

    def for_call(self) -> StackformerCacheLayer:
        """See the base class. Returns this layer."""
        return self

    def open(
        self, index: int, layer: nn.Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout
    ) -> Slot:
        """See the base class. Feedback opens a slice again, and each slot starts from the newest state."""
        return Slot(self, index, layout) if index in self._begun else _RecordingSlot(self, index, layout)

    def start(self, index: int, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        """Keep what the backward pass needs of slice `index`. Returns the state, for the mixer."""
        self._begun.add(index)
        self._count_step(layout, hidden.device)
        state = self.slices.get(index)
        if state is None:
            return Start()
        rows = cast(State, take_rows(state, layout.rows))
        if self._reverse and mixer.num_reversible > 0:
            inputs = mixer.project(hidden, pointer, layout, _stored(mixer, rows[mixer.num_reversible :]))
            self._kept[index] = self._keep(index, state, mixer, mixer.total_decay(inputs), layout)
            return Start(rows, inputs)
        if self._reverse:
            logger.warning_once(
                f"{type(mixer).__name__} cannot be run backwards: its state is stored for every chunk"
            )
        self._kept[index] = None, state, ()
        return Start(rows)

    def write(self, index: int, state: State, layout: TokenLayout) -> None:
        """Replace the state of slice `index` for the rows of `layout`."""
        super().write(index, state, layout)
        self._undone.setdefault(index, (0.0, math.inf))

    def take(self) -> tuple[Tensor | None, dict[int, Kept]]:
        """Returns and clears what was kept with the chunk just read: the tokens' ponder steps, and the parts
        of each slice that existed before the chunk."""
        taken = self._depths, self._kept
        self._depths, self._kept, self._begun = None, {}, set()
        return taken

    def _keep(self, index: int, state: State, mixer: Mixer, decay: Tensor, layout: TokenLayout) -> Kept:
        """Select the parts to keep of a state whose memories decay by `decay` [B', ...] in the chunk."""
        (decay,) = put_rows(None, (decay,), layout)
        memories, rest = state[: mixer.num_reversible], state[mixer.num_reversible :]
        sizes = memories[0].detach().flatten(decay.dim()).norm(dim=-1).log()
        decayed, least = self._undone.get(index, (0.0, math.inf))
        largest = sizes.amax(-1, keepdim=True).expand_as(sizes)
        largest = largest.masked_fill(largest.isneginf(), math.inf)  # the memories are empty
        least = (decayed + largest).clamp(max=least)
        decayed = decayed + decay
        if index not in self._undone:  # a state of the caller, which exists nowhere else
            anchored = torch.ones_like(decay, dtype=torch.bool)
        elif mixer.reverses_exactly:
            anchored = torch.zeros_like(decay, dtype=torch.bool)
        else:
            anchored = decayed + sizes - least > self._max_log_decay
        self._undone[index] = decayed.masked_fill(anchored, 0), least.masked_fill(anchored, math.inf)
        self.num_anchors += int(anchored.sum())
        return anchored, tuple(tensor[anchored] for tensor in memories), rest

    def _count_step(self, layout: TokenLayout, device: torch.device) -> None:
        if self._depths is None:
            self._depths = torch.zeros(layout.batch_size, layout.length, dtype=torch.int16, device=device)
        if layout.positions is None:
            self._depths += 1
        else:
            self._depths.view(-1)[layout.positions] += 1


class _RecordingSlot(Slot):
    """A slot of a [`_RecordingLayer`]. It asks the layer for the state once the mixer's tokens are known."""

    def start(self, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        return cast(_RecordingLayer, self._layer).start(self._index, mixer, hidden, pointer, layout)


class _RewindingLayer(StackformerCacheLayer):
    """A layer of the backward pass. It holds the state at the end of the current chunk, and its gradient."""

    def __init__(self, layer: StackformerCacheLayer):
        super().__init__()
        self._ends = dict(layer.slices)
        self._grads: dict[int, State] = {}
        self._kept: dict[int, Any] = {}
        self._starts: dict[int, State] = {}  # leaves of the chunk's graph
        self._recomputed: dict[int, State] = {}  # end states of the chunk, with the graph
        self._reversible: dict[int, tuple[int, int]] = {}  # number of tensors, and of leading dimensions

    def begin(self, kept: dict[int, Kept]) -> None:
        """Begin the chunk with which `kept` was kept."""
        # Tensors that are not reversible are leaves of the new graph.
        self._kept = {index: (*start, _leaves(rest)) for index, (*start, rest) in kept.items()}
        self._starts, self._recomputed = {}, {}

    def for_call(self) -> StackformerCacheLayer:
        """See the base class. Returns this layer."""
        return self

    def open(
        self, index: int, layer: nn.Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout
    ) -> Slot:
        """See the base class. Feedback opens a slice again, and each slot starts from the newest state."""
        return _RewindingSlot(self, index, layout)

    def start(self, index: int, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        """Find the state of slice `index` at the chunk's start."""
        if index not in self._kept:
            return Start()
        anchored, _, rest = self._kept[index]
        inputs = None
        if anchored is not None and not anchored.all():
            stored = _stored(mixer, cast(State, take_rows(rest, layout.rows)))
            inputs = mixer.project(hidden, pointer, layout, stored)
        if index not in self._starts:  # a checkpointed layer asks twice
            self._starts[index] = self._rebuild(index, mixer, inputs, layout)
        return Start(take_rows(self._starts[index], layout.rows), inputs)

    def written(self, index: int) -> State | None:
        """The newest state of slice `index`; `None` before the chunk writes one."""
        return self._recomputed.get(index)

    def write(self, index: int, state: State, layout: TokenLayout) -> None:
        """Replace the end state of slice `index`, with its graph, for the rows of `layout`."""
        old = self._recomputed.get(index, self._starts.get(index))
        self._recomputed[index] = put_rows(old, state, layout)

    def end_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the chunk's end states, with their graph, and their gradients from the chunks after it."""
        for index, grads in self._grads.items():
            if index in self._recomputed:
                yield from zip(self._recomputed[index], grads, strict=True)

    def finish(self) -> list[Tensor]:
        """Move to the start of the chunk, which is the end of the one before. Returns the known errors."""
        errors = [error for index in self._recomputed for error in self._errors(index)]
        for index in self._recomputed:
            self._grads.pop(index, None)
            del self._ends[index]
            if index in self._starts:  # otherwise the slice did not exist before this chunk
                start = self._starts[index]
                self._ends[index] = tuple(tensor.detach() for tensor in start)
                self._grads[index] = tuple(
                    torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in start
                )
        return errors

    @torch.no_grad()
    def _rebuild(self, index: int, mixer: Mixer, inputs: Any, layout: TokenLayout) -> State:
        """Reconstruct slice `index` at the chunk's start. `inputs` are `None` if all memories were kept."""
        anchored, kept, rest = self._kept[index]
        if anchored is None:
            return _leaves(kept)
        start = self._ends[index][: len(kept)]
        self._reversible[index] = len(kept), anchored.dim()
        if inputs is not None:
            end = cast(State, take_rows(start, layout.rows))
            start = put_rows(start, mixer.reverse(inputs, end), layout)
        return _leaves(x.index_put((anchored,), y) for x, y in zip(start, kept, strict=True)) + rest

    @torch.no_grad()
    def _errors(self, index: int) -> list[Tensor]:
        """Returns the largest errors of reconstructed memories at the chunk's end, relative to the largest
        memory of their head.

        An error is known where the chunk started from an anchor, or from nothing: then the chunk has computed
        the true memories anew.
        """
        anchored = self._kept[index][0] if index in self._kept else None
        if index not in self._reversible or (index in self._kept and anchored is None):
            return []
        count, dims = self._reversible[index]
        errors = []
        for new, old in zip(self._recomputed[index][:count], self._ends[index][:count], strict=True):
            size = new.flatten(dims).norm(dim=-1).amax(-1, keepdim=True)
            error = (new - old).flatten(dims).norm(dim=-1) / size
            known = size > 0 if anchored is None else anchored & (size > 0)
            errors.append(error[known.expand_as(error)])
        return [error.max() for error in errors if error.numel()]


class _RewindingSlot(Slot):
    """A slot of a [`_RewindingLayer`]. It asks the layer for the state once the mixer's tokens are known."""

    def __init__(self, layer: _RewindingLayer, index: int, layout: TokenLayout):
        super().__init__(layer, index, layout)
        self._state = take_rows(layer.written(index), layout.rows)

    def start(self, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        if self._state is not None:
            return Start(self._state)
        return cast(_RewindingLayer, self._layer).start(self._index, mixer, hidden, pointer, layout)


def _stored(mixer: Mixer, rest: State) -> Any:
    """Returns the mixer's state with `None` in place of its reversible tensors."""
    count = len(mixer.state_spec()) - mixer.num_reversible  # the feed-forward's past may follow
    return mixer.state_type(*[None] * mixer.num_reversible, *rest[:count])


def _leaves(tensors: Iterable[Tensor]) -> State:
    """Returns the tensors as leaves of a new graph. Integers, such as counters, have no gradient."""
    return tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors)


class _Storage:
    """A stack with an entry for each chunk, on a device or in files.

    An entry is a nested tuple, list or dict of tensors. In memory, tensors are copied into slabs. Otherwise
    small tensors that stay between large ones that are freed would fragment the memory, which would then grow
    with the number of chunks.
    """

    SLAB_BYTES = 2**20

    def __init__(self, place: str, device: torch.device):
        self.num_bytes = 0
        self._device = device
        self._folder = None if place in ("device", "cpu") else place
        self._slab = torch.empty(0, dtype=torch.uint8, device="cpu" if place == "cpu" else device)
        self._free = 0  # offset of the slab's unused part
        self._files: tempfile.TemporaryDirectory | None = None
        self._entries: list[Any] = []

    def __enter__(self) -> "_Storage":
        if self._folder is not None:
            self._files = tempfile.TemporaryDirectory(prefix="long-context-", dir=self._folder)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._files is not None:
            self._files.cleanup()

    def push(self, entry: Any) -> None:
        self.num_bytes += sum(leaf.nbytes for leaf in tree_leaves(entry) if isinstance(leaf, Tensor))
        if self._files is not None:
            path = Path(self._files.name) / f"{len(self._entries)}.pt"
            # Clones, because a view is saved with all of its storage.
            torch.save(tree_map_only(Tensor, torch.clone, entry), path)
            entry = path
        else:
            entry = tree_map_only(Tensor, self._copy, entry)
        self._entries.append(entry)

    def pop(self) -> Any:
        entry = self._entries.pop()
        if self._files is not None:
            path, entry = entry, torch.load(entry, map_location=self._device, weights_only=True)
            path.unlink()
        return tree_map_only(Tensor, lambda tensor: tensor.to(self._device), entry)

    def _copy(self, tensor: Tensor) -> Tensor:
        start = -(-self._free // 16) * 16  # an offset must be a multiple of the element size
        if start + tensor.nbytes > len(self._slab):
            self._slab, start = self._slab.new_empty(max(tensor.nbytes, self.SLAB_BYTES)), 0
        self._free = start + tensor.nbytes
        return self._slab[start : self._free].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def shifted_labels(
    input_ids: Tensor, labels: Tensor | None, shift_labels: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """Returns the label of each token [B, T], from exactly one of `labels` and `shift_labels`."""
    if (labels is None) == (shift_labels is None):
        raise ValueError("You must specify exactly one of `labels` and `shift_labels`")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"`input_ids` must have the shape [B, T], both at least 1, got {tuple(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape {tuple(input_ids.shape)} of `input_ids`, got "
            f"{tuple(attention_mask.shape)}"
        )
    return label_each_token(input_ids.shape, labels, shift_labels, attention_mask)


def _check_options(
    chunk_size: int, method: str, max_log_decay: float, max_drift: float, storage: str
) -> None:
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {method!r}")
    for name, value in (("max_log_decay", max_log_decay), ("max_drift", max_drift)):
        if not value >= 0:
            raise ValueError(f"`{name}` must be at least 0, got {value}")
    if storage not in ("device", "cpu") and not os.path.isdir(storage):
        raise ValueError(f"`storage` must be 'device', 'cpu' or an existing folder, got {storage!r}")


def _targets(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    attention_mask: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> tuple[Tensor, Tensor | int]:
    """Returns the label of each token [B, T], checked, and the divisor of the summed loss."""
    shift_labels = shifted_labels(input_ids, labels, shift_labels, attention_mask)
    _check_inputs(model, input_ids, shift_labels, num_items_in_batch)
    if num_items_in_batch is None:
        num_items_in_batch = shift_labels.ne(-100).sum().clamp(min=1)
    return shift_labels, num_items_in_batch


def _check_inputs(
    model: nn.Module,
    input_ids: Tensor,
    shift_labels: Tensor,
    num_items_in_batch: Tensor | int | None,
) -> None:
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`input_ids` must be integers (int64 or int32), got {input_ids.dtype}")
    if shift_labels.dtype != torch.int64:
        raise ValueError(f"`labels` or `shift_labels` must be int64, got {shift_labels.dtype}")
    check_num_items(num_items_in_batch)
    size = extract_model_from_parallel(model).config.vocab_size
    labels = shift_labels.masked_fill(shift_labels == -100, 0)
    for name, values, others in (
        ("`input_ids`", input_ids, ""),
        ("`labels` or `shift_labels`", labels, ", or -100"),
    ):
        low, high = torch.stack(values.aminmax()).tolist()
        if low < 0 or high >= size:
            raise ValueError(
                f"{name} must be ids of the {size} tokens of the vocabulary{others}, got "
                f"{low if low < 0 else high}"
            )


__all__ = [
    "METHODS",
    "DriftError",
    "LongContextOutput",
    "long_context_backward",
    "long_context_loss",
]
