# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Sequences whose tokens are split over processes: each process reads a chunk of its own, all at once.

    shard = shard_sequence(**batch, group=group)
    loss = model(**shard, cache=SequenceParallelCache(model.config, group)).loss
    loss.backward()

A chunk of tokens changes a slice of the state by a decay and an update. Each process computes the decay and
the update of its chunk, and the processes exchange them. Then each process combines those of the chunks
before its own into the state that its chunk starts from (Sun et al. 2025, "LASP-2: Rethinking Sequence
Parallelism for Linear Attention and Its Hybrid"). The exchanged data do not grow with the number of tokens.
The backward pass sends the gradients the other way. Logits, losses and gradients are those of one process
that reads everything.

Letters: B batch, T time, N processes; B' rows with active tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..cache_stackformer import Slot, StackformerCache, StackformerCacheLayer
from ..configuration_stackformer import StackformerConfig
from ..mixer import Mixer
from ..state import Start, put_rows, take_rows
from ..token_layout import TokenLayout
from .long_context import shifted_labels


def shard_sequence(
    input_ids: Tensor,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Returns the model's arguments on this process, from a batch that all processes have.

    The processes take chunks of the tokens in the order of their ranks, of equal length or one token more.
    The last token of a chunk predicts the first of the next. The losses of all processes add up to the loss
    of the whole batch, and so do their gradients. DDP and FSDP average gradients: there, multiply the loss by
    the number of processes.

    Args:
        input_ids: [B, T], T at least the number of processes.
        labels: [B, T], shifted inside, -100 is ignored; or `shift_labels`: [B, T], the label of each token.
        attention_mask: [B, T], 0 for padding.
        num_items_in_batch: divisor of the summed loss; the number of labels of the batch if `None`.
        group: the processes; all if `None`.

    Raises:
        ValueError: for fewer tokens than processes, or labels of another shape.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if input_ids.shape[1] < size:
        raise ValueError(
            f"`input_ids` must have at least as many tokens as there are processes ({size}), got shape "
            f"{tuple(input_ids.shape)}"
        )

    def chunk(tensor: Tensor) -> Tensor:
        return tensor.tensor_split(size, dim=1)[rank].contiguous()

    shard: dict[str, Any] = {"input_ids": chunk(input_ids)}
    if attention_mask is not None:
        shard["attention_mask"] = chunk(attention_mask)
    if labels is not None or shift_labels is not None:
        shift_labels = shifted_labels(input_ids, labels, shift_labels, attention_mask)
        shard["labels"] = shard["shift_labels"] = chunk(shift_labels)
        if num_items_in_batch is None:
            num_items_in_batch = shift_labels.ne(-100).sum().clamp(min=1)
        shard["num_items_in_batch"] = num_items_in_batch
    return shard


class SequenceParallelCache(StackformerCache):
    """The cache of a model that reads a chunk of a sequence while other processes read the other chunks.

    The cache is for one call of the model on each process, which starts at the beginning of the sequences.
    All processes must have the same number of rows, and all or none must run the backward pass. After the
    call, the cache holds the state after the process' chunk.

    Args:
        config ([`StackformerConfig`]): of the model.
        group: the processes; all if `None`. Where something else communicates during the backward pass, such
            as DDP, give the cache a group of its own (`torch.distributed.new_group`).
    """

    def __init__(self, config: StackformerConfig, group: dist.ProcessGroup | None = None):
        super().__init__(config)
        self._config, self._exchange = config, _Exchange(group)
        self.layers = [_ChunkLayer(self._exchange) for _ in range(config.num_hidden_layers)]

    def whole(self) -> StackformerCache:
        """Returns the state after the whole sequence, without a graph, on every process: to generate from."""
        cache = StackformerCache(self._config)
        device = self.layers[0].slices[0][0].device
        length = torch.tensor(self.get_seq_length(), device=device)
        dist.all_reduce(length, group=self._exchange.group)
        for plain, layer in zip(cache.layers, self.layers, strict=True):
            slices = {
                index: tuple(self._exchange.from_last(tensor) for tensor in layer.slices[index])
                for index in sorted(layer.slices)
            }
            plain.load(slices, int(length), device)
        return cache


class _ChunkLayer(StackformerCacheLayer):
    """A layer that gets the state before the process' chunk from the processes before it."""

    is_shared = True

    def __init__(self, exchange: "_Exchange"):
        super().__init__()
        self._exchange = exchange

    def for_call(self) -> StackformerCacheLayer:
        """See the base class. Returns this layer."""
        return self

    def open(
        self, index: int, layer: nn.Module, hidden: Tensor, pointer: Tensor, layout: TokenLayout
    ) -> Slot:
        """See the base class. Raises a ValueError if slice `index` was opened before."""
        if index in self.slices:
            raise ValueError(
                f"A SequenceParallelCache must be new for each call, slice {index} was read before"
            )
        return _ChunkSlot(self, index, layout, self._exchange)


class _ChunkSlot(Slot):
    """A slot that computes the state before the process' chunk, once the mixer's tokens are known."""

    def __init__(self, layer: _ChunkLayer, index: int, layout: TokenLayout, exchange: "_Exchange"):
        super().__init__(layer, index, layout)
        self._exchange = exchange
        # A checkpointed layer runs again in the backward pass, where it cannot ask the other processes.
        self._received: list[Tensor] = []

    def start(self, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        if not mixer.is_splittable:
            raise ValueError(
                "`mixer_types` must be mixers whose tokens can be split over processes, got "
                f"{type(mixer).__name__}, which has no `carry`"
            )
        known = iter(self._received.copy())

        def gather(*tensors: Tensor) -> list[Tensor]:
            tensors = put_rows(None, tensors, layout)
            numbers = torch.cat([tensor.flatten() for tensor in tensors])
            before = next(known, None)
            gathered = self._exchange(numbers, before)
            if before is None:
                self._received.append(gathered.detach())
            parts = gathered.split([tensor.numel() for tensor in tensors], dim=1)
            return [part.unflatten(1, tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

        first = not self._received
        state, inputs = mixer.carry(hidden, pointer, layout, gather)
        if first:
            self._layer.slices[self._index] = state
        return Start(take_rows(state, layout.rows), inputs)


class _Exchange:
    """The communication between the processes of a group."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self._chain: Tensor | None = None

    def __call__(self, numbers: Tensor, known: Tensor | None = None) -> Tensor:
        """Returns the numbers [n] of each process as [N, n], with zeros for this process and those after it.

        Args:
            known: the result of the first call, if a checkpointed layer calls again.
        """
        if self._chain is None:
            self._chain = torch.zeros((), device=numbers.device, requires_grad=True)
        if known is not None:
            return _GatherEarlier.apply(numbers, self._chain, self.group, known)[0]
        gathered, self._chain = _GatherEarlier.apply(numbers, self._chain, self.group, None)
        return gathered

    def from_last(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of the last process in place of `tensor`."""
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(tensor, group=self.group, group_src=dist.get_world_size(self.group) - 1)
        return tensor


class _GatherEarlier(torch.autograd.Function):
    """Gathers numbers [n] of all processes as [N, n], with zeros for this process and those after it.

    All processes must exchange gradients equally often and in the same order, although their tokens and the
    order of autograd differ. A chain through all exchanges ensures this: the backward pass of an exchange
    waits for that of the next one.
    """

    @staticmethod
    def forward(ctx, numbers, chain, group, known):
        ctx.group = group
        if known is not None:
            return known.clone(), chain.clone()
        gathered = numbers.new_empty(dist.get_world_size(group), *numbers.shape)
        dist.all_gather(list(gathered), numbers, group=group)
        gathered[dist.get_rank(group) :] = 0
        return gathered, chain.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_chain):
        grad = grad.clone(memory_format=torch.contiguous_format)
        grad[dist.get_rank(ctx.group) :] = 0
        received = torch.empty_like(grad)
        dist.all_to_all_single(received, grad, group=ctx.group)
        return received.sum(0), grad_chain, None, None


__all__ = ["SequenceParallelCache", "shard_sequence"]
