# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Full backpropagation through any number of tokens, in activation memory that does not grow with them.

The tokens are read in chunks, without a graph. Then, from the last chunk to the first, each is run again with
a graph, from the state at its start, and backwards, with the gradient of its end state that the chunk after
it gave. The losses and gradients are those of one forward and backward pass over all tokens. Three methods
differ in how a chunk gets its initial state:

- "reverse" computes it from the state at the chunk's end. Ponder step k and layer l have a slice of the state
  of their own, and what is written to it depends on lower slices only, so that one pass upward through the
  model inverts each slice as it comes to it and runs it with a graph at once. What has decayed by a nats
  comes back with its rounding errors amplified by exp(a) (MacKay et al. 2018, "Reversible Recurrent Neural
  Networks", section 3: finite precision cannot forget and reverse). Rounding errors are in proportion to
  what a memory became, too: one that has grown by exp(b) comes back with errors that are as much larger
  beside what it was. So a memory is copied instead, it is anchored, where decay and growth since it was last
  copied would come to more than `max_log_decay`.
- "stored" copies all of the state at the start of every chunk: exact, for any mixer and any decay. It is
  what "reverse" does, too, for mixers that cannot be run backwards, and for models with feedback.
- "truncated" cuts the graph between chunks: truncated backpropagation through time, for comparison.

Besides states, a chunk keeps the past of the convolutions, and the number of ponder steps of each token.

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

# What a chunk keeps of one slice of a layer's state: which memories are anchored [B, H, R], their tensors
# before the chunk, and the tensors that are not reversible. Or `None`, all tensors, and none.
Kept = tuple[Tensor | None, State, State]


class DriftError(RuntimeError):
    """States that were computed backwards are too far from what they were."""


@dataclass
class LongContextOutput:
    """What `long_context_backward` returns; the gradients are in the parameters.

    Args:
        loss (`torch.FloatTensor`): mean over the labels of all chunks (or their sum by
            `num_items_in_batch`), ponder loss included.
        cache ([`StackformerCache`]): the state after the last token, without a graph.
        drift (`float`): largest error of a memory that was computed backwards, relative to the largest memory
            of its head. It is measured where it is largest: at the end of the chunks that start from an
            anchor, or from the first token.
        num_anchors (`int`): memories (matrices, with their key sums) that were copied.
        kept_bytes (`int`): bytes that were kept between the forward and the backward pass, besides the tokens
            themselves.
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
    """Add the gradients of the loss over T tokens to those of the parameters, chunk by chunk.

    Args:
        model: a causal language model with a recurrent state, possibly wrapped (DDP, FSDP2, PEFT).
        input_ids: [B, T], on any device: chunks are moved to the model's.
        labels: [B, T], shifted inside, -100 is ignored; or `shift_labels`: [B, T], the label of each token.
        attention_mask: [B, T], 0 for padding.
        cache: a state to go on from. No gradient flows into it, and it is not changed.
        num_items_in_batch: what the summed loss is divided by; the number of labels if `None`.
        chunk_size: tokens that are run at once. Activation memory is proportional to it.
        method: "reverse", "stored" or "truncated".
        max_log_decay: nats by which a memory may decay, or grow, before it is anchored (method "reverse"):
            rounding errors are amplified by up to exp(max_log_decay).
        max_drift: relative error of a memory computed backwards that is an error.
        storage: where anchors and stored states are kept: "device", "cpu", or a folder for files, which are
            removed again.
        scale_loss: applied to the loss of each chunk before its backward pass (gradient scaling); not to the
            loss that is returned.

    Raises:
        ValueError: for an argument out of range.
        DriftError: where memories computed backwards are off by more than `max_drift`; do not step the
            optimizer then.
    """
    _check_options(chunk_size, method, max_log_decay, max_drift, storage)
    shift_labels = shifted_labels(input_ids, labels, shift_labels, attention_mask)
    _check_inputs(model, input_ids, shift_labels, num_items_in_batch)
    if num_items_in_batch is None:
        num_items_in_batch = shift_labels.ne(-100).sum().clamp(min=1)

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
    """The loss of `long_context_backward`, and the state after the last token, without any gradient."""
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    shift_labels = shifted_labels(input_ids, labels, shift_labels, attention_mask)
    _check_inputs(model, input_ids, shift_labels, num_items_in_batch)
    if num_items_in_batch is None:
        num_items_in_batch = shift_labels.ne(-100).sum().clamp(min=1)
    chunks = _Chunks(model, input_ids, shift_labels, attention_mask, chunk_size)
    cache = chunks.initial(cache)
    loss = torch.zeros((), device=chunks.device)
    for number in range(len(chunks)):
        loss = loss + chunks.loss(number, cache, num_items_in_batch)
    return LongContextOutput(loss=loss, cache=cache)


class _Chunks:
    """The tokens in chunks, on the model's device, and one call of the model for each.

    Both calls of a chunk, without and with a graph, draw the same random numbers (dropout).
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
        """A state of one's own to begin with."""
        return StackformerCache(self.config) if past is None else past.detach()

    def read(self, number: int, cache: StackformerCache) -> None:
        """Advance the state, without a graph."""
        with torch.no_grad(), self._randomness(number):
            self.model(**self._inputs(number), cache=cache, logits_to_keep=1)

    def loss(
        self, number: int, cache: StackformerCache, num_items_in_batch: Tensor | int, **kwargs: Any
    ) -> Tensor:
        """Advance the state; the loss."""
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
        """Run a chunk forward and backward; its loss.

        Args:
            ends: gives the chunk's end states and their gradients, after the forward pass.
            last: whether this is the last backward pass: DDP exchanges gradients after that one only. FSDP2
                does after each, because gradients that it did not reduce would not be sharded.
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
    """The forward pass: `recorder` ends in the state after all tokens, `kept` with what each chunk needs."""
    # With feedback there is no inverse whose errors could let a token halt at another step.
    config = chunks.config
    halts = config.halting_threshold > 0 and config.max_ponder_steps > 1 and not config.feedback
    for number in range(len(chunks)):
        chunks.read(number, recorder)
        depths, states = zip(*(layer.take() for layer in recorder.layers), strict=True)
        kept.push((depths[0] if halts else None, states))


def _rewind(
    chunks: _Chunks, recorder: StackformerCache, kept: "_Storage", max_drift: float, **run: Any
) -> LongContextOutput:
    """The backward pass, from the last chunk to the first."""
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
            if not worst <= max_drift:  # nor is what is not a number
                raise DriftError(
                    f"A memory computed backwards is off by {worst:.1e} of its size at the end of chunk "
                    f"{number} of {len(chunks)}, `max_drift` is {max_drift:.1e}: lower `max_log_decay`, "
                    "compute in float32 if it was less, or use the method 'stored'"
                )
            drift = max(drift, worst)
    cache = StackformerCache(chunks.config)
    for plain, layer in zip(cache.layers, recorder.layers, strict=True):
        plain.load(layer.slices, layer.seen_tokens, chunks.device)
    anchors = sum(layer.num_anchors for layer in recorder.layers)
    return LongContextOutput(loss=loss, cache=cache, drift=drift, num_anchors=anchors)


def _with_layers(cache: StackformerCache, make: Callable[[Any], StackformerCacheLayer]) -> StackformerCache:
    """A cache whose layers are made of those of `cache`."""
    result = copy.copy(cache)
    result.layers = [make(layer) for layer in cache.layers]
    return result


class _RecordingLayer(StackformerCacheLayer):
    """A layer of the forward pass: it notes what the backward pass will need to have each chunk's start."""

    def __init__(self, layer: StackformerCacheLayer, method: str, max_log_decay: float):
        super().__init__()
        self.slices, self.seen_tokens = dict(layer.slices), layer.seen_tokens
        self.num_anchors = 0
        self._reverse, self._max_log_decay = method == "reverse", max_log_decay
        self._depths: Tensor | None = None  # [B, T], ponder steps of the chunk's tokens
        self._kept: dict[int, Kept] = {}
        self._begun: set[int] = set()  # slices that were read in the chunk; with feedback, they are again
        # By slice, for the chunks that will be undone down to each memory's anchor: the nats by which it
        # decayed in them, and the least, over their starts, of these and the log of the size of its head's
        # memories. The chunk that begins with the anchor need not be undone, so it does not count.
        self._undone: dict[int, tuple[Tensor | float, Tensor | float]] = {}

    def for_call(self) -> StackformerCacheLayer:
        """See the base class: always this layer."""
        return self

    def open(
        self, index: int, layer: nn.Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout
    ) -> Slot:
        """The slot of slice `index`. With feedback, it is opened again, and finds what was written since."""
        return Slot(self, index, layout) if index in self._begun else _RecordingSlot(self, index, layout)

    def start(self, index: int, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        """Note what the backward pass needs of the state of slice `index`, which a mixer goes on from."""
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
        """What has to be kept of the chunk just read: the tokens' ponder steps, and for each slice that was
        there before the chunk, what it takes to know what it was."""
        taken = self._depths, self._kept
        self._depths, self._kept, self._begun = None, {}, set()
        return taken

    def _keep(self, index: int, state: State, mixer: Mixer, decay: Tensor, layout: TokenLayout) -> Kept:
        """What to keep of a state whose memories will decay by `decay` [B', ...] in the chunk."""
        (decay,) = put_rows(None, (decay,), layout)
        memories, rest = state[: mixer.num_reversible], state[mixer.num_reversible :]
        sizes = memories[0].detach().flatten(decay.dim()).norm(dim=-1).log()
        decayed, least = self._undone.get(index, (0.0, math.inf))
        largest = sizes.amax(-1, keepdim=True).expand_as(sizes)
        largest = largest.masked_fill(largest.isneginf(), math.inf)  # nothing is there yet
        least = (decayed + largest).clamp(max=least)
        decayed = decayed + decay
        if index not in self._undone:  # a state from before the first chunk: nothing else tells what it was
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
    """A slot of a [`_RecordingLayer`], which is asked for the state when the mixer's tokens are known."""

    def start(self, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        return cast(_RecordingLayer, self._layer).start(self._index, mixer, hidden, pointer, layout)


class _RewindingLayer(StackformerCacheLayer):
    """A layer of the backward pass: it holds the state, and its gradient, at the end of the chunk at hand."""

    def __init__(self, layer: StackformerCacheLayer):
        super().__init__()
        self._ends = dict(layer.slices)
        self._grads: dict[int, State] = {}
        self._kept: dict[int, Any] = {}
        self._starts: dict[int, State] = {}  # leaves of the chunk's graph
        self._recomputed: dict[int, State] = {}  # its end states, with the graph
        self._reversible: dict[int, tuple[int, int]] = {}  # tensors, and their leading dimensions

    def begin(self, kept: dict[int, Kept]) -> None:
        """Go on with the chunk that kept `kept`."""
        # What was not reversible is a leaf of the new graph as it is.
        self._kept = {index: (*start, _leaves(rest)) for index, (*start, rest) in kept.items()}
        self._starts, self._recomputed = {}, {}

    def for_call(self) -> StackformerCacheLayer:
        """See the base class: always this layer."""
        return self

    def open(
        self, index: int, layer: nn.Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout
    ) -> Slot:
        """The slot of slice `index`. With feedback, it is opened again, and finds what was written since."""
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
        if index not in self._starts:  # it is there when a layer is checkpointed
            self._starts[index] = self._rebuild(index, mixer, inputs, layout)
        return Start(take_rows(self._starts[index], layout.rows), inputs)

    def written(self, index: int) -> State | None:
        """The end state of slice `index`, as far as it is written in this chunk."""
        return self._recomputed.get(index)

    def write(self, index: int, state: State, layout: TokenLayout) -> None:
        """Take the end state of slice `index` for the rows of `layout`, with its graph."""
        old = self._recomputed.get(index, self._starts.get(index))
        self._recomputed[index] = put_rows(old, state, layout)

    def end_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The chunk's end states, with their graph, and the gradients that the chunks after it gave them."""
        for index, grads in self._grads.items():
            if index in self._recomputed:
                yield from zip(self._recomputed[index], grads, strict=True)

    def finish(self) -> list[Tensor]:
        """Go over to the start of the chunk, the end of the one before. Returns errors that can be told."""
        errors = [error for index in self._recomputed for error in self._errors(index)]
        for index in self._recomputed:
            self._grads.pop(index, None)
            del self._ends[index]
            if index in self._starts:  # else the slice was not there before this chunk
                start = self._starts[index]
                self._ends[index] = tuple(tensor.detach() for tensor in start)
                self._grads[index] = tuple(
                    torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in start
                )
        return errors

    @torch.no_grad()
    def _rebuild(self, index: int, mixer: Mixer, inputs: Any, layout: TokenLayout) -> State:
        """The state of slice `index` at the chunk's start, from the mixer's inputs unless all was kept."""
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
        """Of the memories at the end of the chunk that were computed backwards, those whose start is known,
        because it was an anchor or there was none: how far they are from what comes of it, relative to the
        largest memory of their head."""
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
    """A slot of a [`_RewindingLayer`], which is asked for the state when the mixer's tokens are known."""

    def __init__(self, layer: _RewindingLayer, index: int, layout: TokenLayout):
        super().__init__(layer, index, layout)
        self._state = take_rows(layer.written(index), layout.rows)

    def start(self, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        if self._state is not None:
            return Start(self._state)
        return cast(_RewindingLayer, self._layer).start(self._index, mixer, hidden, pointer, layout)


def _stored(mixer: Mixer, rest: State) -> Any:
    """The mixer's state, of which only the tensors that are not reversible are known."""
    count = len(mixer.state_spec()) - mixer.num_reversible  # the feed-forward's past may come after these
    return mixer.state_type(*[None] * mixer.num_reversible, *rest[:count])


def _leaves(tensors: Iterable[Tensor]) -> State:
    """The same, as leaves of a new graph; counters and the like have no gradient."""
    return tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors)


class _Storage:
    """What the chunks keep: a stack of nested tuples, lists and dicts of tensors, on a device or in files.

    In memory, tensors are copied into slabs: small ones that stay between large ones that go would keep the
    freed memory in fragments, which then grows with the number of chunks.
    """

    SLAB_BYTES = 2**20

    def __init__(self, place: str, device: torch.device):
        self.num_bytes = 0
        self._device = device
        self._folder = None if place in ("device", "cpu") else place
        self._slab = torch.empty(0, dtype=torch.uint8, device="cpu" if place == "cpu" else device)
        self._free = 0  # where the slab's unused part begins
        self._files: tempfile.TemporaryDirectory | None = None
        self._chunks: list[Any] = []

    def __enter__(self) -> "_Storage":
        if self._folder is not None:
            self._files = tempfile.TemporaryDirectory(prefix="long-context-", dir=self._folder)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._files is not None:
            self._files.cleanup()

    def push(self, chunk: Any) -> None:
        self.num_bytes += sum(leaf.nbytes for leaf in tree_leaves(chunk) if isinstance(leaf, Tensor))
        if self._files is not None:
            path = Path(self._files.name) / f"{len(self._chunks)}.pt"
            # Clones, since a view would bring all of its storage.
            torch.save(tree_map_only(Tensor, torch.clone, chunk), path)
            chunk = path
        else:
            chunk = tree_map_only(Tensor, self._copy, chunk)
        self._chunks.append(chunk)

    def pop(self) -> Any:
        chunk = self._chunks.pop()
        if self._files is not None:
            path, chunk = chunk, torch.load(chunk, map_location=self._device, weights_only=True)
            path.unlink()
        return tree_map_only(Tensor, lambda tensor: tensor.to(self._device), chunk)

    def _copy(self, tensor: Tensor) -> Tensor:
        start = -(-self._free // 16) * 16  # a tensor's storage begins at a multiple of its elements
        if start + tensor.nbytes > len(self._slab):
            self._slab, start = self._slab.new_empty(max(tensor.nbytes, self.SLAB_BYTES)), 0
        self._free = start + tensor.nbytes
        return self._slab[start : self._free].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def shifted_labels(
    input_ids: Tensor, labels: Tensor | None, shift_labels: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """The label of each token [B, T], from exactly one of `labels` and `shift_labels`."""
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
