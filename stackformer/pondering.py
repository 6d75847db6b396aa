# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The loop over ponder steps. Tokens that halt leave the computation, and their results are collected.
Letters: B batch, T time, n active tokens, D hidden size, P ponder steps.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled

from .adapters import adapters_by_token, mixed_batch_hooks
from .cache_stackformer import StackformerCache
from .core_stackformer import think
from .mixer import Told
from .processing_stack import Stack, flush_stack, init_stack, step_stack
from .stack_trace import StackTrace
from .token_layout import TokenLayout


class PonderOptions(NamedTuple):
    """The halting rule of one call, and the records to keep of it.

    Args:
        halting_threshold: a token halts when less mass than this is left on its stack; 0 for never.
        depths: [B, T], the steps after which each token halts. It replaces `halting_threshold`.
        keep_thoughts: whether to return the thoughts of every step.
        keep_trace: whether to return a [`StackTrace`].
    """

    halting_threshold: float
    depths: Tensor | None = None
    keep_thoughts: bool = False
    keep_trace: bool = False


class Pondered(NamedTuple):
    """The result of pondering."""

    output: Tensor  # [B, T, D], the accumulated output of each token's stack
    distribution: Tensor  # [B, T, P], each token's distribution over halting steps
    thoughts: tuple[Tensor, ...] | None  # P + 1 of [B, T, D]: the embeddings, then the thoughts of each step
    trace: StackTrace | None
    mixer_loss: Tensor | None  # [B, T], the losses of all mixers; None if there are none


def ponder(
    model: Any, embeds: Tensor, layout: TokenLayout, cache: Cache | None, options: PonderOptions
) -> Pondered:
    """Applies the core of a `StackformerModel` to embeddings [B, T, D] until every token has halted.

    With feedback, all ponder steps share one slice of state: the first step of a token reads the state that
    the last step of the previous token wrote. So the tokens of a row are computed one after another, each
    through all of its steps.
    """
    if options.depths is not None:
        check_depths(options.depths, layout)
    if not model.config.feedback:
        return _ponder_together(model, embeds, layout, cache, options)
    if layout.documents is not None:
        return _ponder_documents(model, embeds, layout, options)
    if cache is None:
        cache = StackformerCache(model.config)
        cache.layers = [cache_layer.for_call() for cache_layer in cache.layers]
    if layout.length <= 1:
        return _ponder_together(model, embeds, layout, cache, options)
    results = []
    for positions, part in layout.one_by_one():
        depths = None if options.depths is None else options.depths[:, positions]
        part_options = options._replace(depths=depths)
        results.append(_ponder_together(model, embeds[:, positions], part, cache, part_options))
    return _map_tensors(lambda *parts: torch.cat(parts, dim=1), *results)


def _ponder_documents(model: Any, embeds: Tensor, layout: TokenLayout, options: PonderOptions) -> Pondered:
    """`ponder` with feedback for packed documents. Each document becomes a row of its own meanwhile."""
    # [B, T, ...] -> [n, ...] -> [B', T', ...], and back for the results
    rows, depths = _map_tensors(lambda x: layout.to_rows(layout.gather(x)), (embeds, options.depths))
    result = ponder(model, rows, layout.as_batch(), None, options._replace(depths=depths))
    return _map_tensors(
        lambda x: layout.scatter(
            layout.to_tokens(x), x.new_zeros(layout.batch_size, layout.length, *x.shape[2:])
        ),
        result,
    )


def _ponder_together(
    model: Any, embeds: Tensor, layout: TokenLayout, cache: Cache | None, options: PonderOptions
) -> Pondered:
    """`ponder` for all tokens in parallel: runs the loop over ponder steps."""
    config = model.config
    num_steps = config.max_ponder_steps
    tokens = _Tokens.begin(embeds, layout, config)
    record = _Record(embeds, options)
    hooks = mixed_batch_hooks(model)
    steps_left = range(0)
    for step in range(1, num_steps + 1):
        if len(tokens.embedding) == 0:
            steps_left = range(step, num_steps + 1)
            break
        with adapters_by_token(hooks, tokens.layout) if hooks else nullcontext():
            thought, actions, told = think(model, tokens.stack, tokens.layout, step, cache)
        record.add(tokens, thought, actions, told)
        if step == num_steps:
            tokens.stack = flush_stack(tokens.stack, None, thought, step)
            break
        tokens.stack = step_stack(tokens.stack, actions, thought, tokens.embedding, step, model.return_norm)
        tokens.halt(thought, step, options)

    output, distribution = tokens.collect()
    if steps_left and _spans_processes(model, cache):
        output = _run_remaining_steps(model, output, embeds, steps_left, cache)
    elif steps_left and torch.is_grad_enabled():
        output = _keep_in_graph(model, output, steps_left)
    if cache is not None:
        for cache_layer in cache.layers:
            cache_layer.advance(embeds.shape[1])
    return Pondered(output, distribution, *record.collect(num_steps))


def check_depths(depths: Tensor, layout: TokenLayout) -> None:
    """Raises a ValueError unless depths are [B, T] and at least 1 for every active token."""
    shape = (layout.batch_size, layout.length)
    if tuple(depths.shape) != shape:
        raise ValueError(f"`ponder_depths` must have shape {shape}, got {tuple(depths.shape)}")
    asked = layout.gather(depths)
    if asked.numel() and not torch.compiler.is_compiling() and not (asked >= 1).all():
        raise ValueError(f"`ponder_depths` must be at least 1 for every token, got {float(asked.min())}")


class _Tokens:
    """The tokens that are still computed, and the results of those that have halted."""

    def __init__(self, layout: TokenLayout, embedding: Tensor, stack: Stack):
        self.layout, self.embedding, self.stack = layout, embedding, stack
        # For each group of tokens that halted: places in B * T, outputs [., D], distributions [., P].
        self.finished: list[tuple[Tensor, ...]] = []

    @classmethod
    def begin(cls, embeds: Tensor, layout: TokenLayout, config: Any) -> "_Tokens":
        """Returns all active tokens, with all mass on level 0 of their stacks."""
        embedding = layout.gather(embeds)  # [n, D]
        stack = init_stack(embedding, config.stack_depth, config.max_ponder_steps)
        if layout.thinking is not None:  # padding has no mass
            stack = stack._replace(pointer=stack.pointer * layout.thinking.unsqueeze(-1))
        return cls(layout, embedding, stack)

    def halt(self, thought: Tensor, step: int, options: PonderOptions) -> None:
        """Drops the remaining mass of the tokens that halt after a step, and gathers these tokens out.

        In compiled decoding, shapes must not depend on which tokens halt. There, these tokens stay in the
        computation and are masked.
        """
        if options.depths is not None:
            done = self.layout.gather(options.depths) <= step
        elif options.halting_threshold > 0:
            done = self.stack.pointer.sum(-1) < options.halting_threshold
        else:
            return
        self.stack = flush_stack(self.stack, done, thought, step)
        if torch.compiler.is_compiling() and self.layout.length == 1:
            thinking = ~done if self.layout.thinking is None else self.layout.thinking & ~done
            self.layout = self.layout.masked(thinking)
            return
        leaving = done.nonzero().squeeze(-1)
        if len(leaving) > 0:
            output, dropped = (x.index_select(0, leaving) for x in (self.stack.output, self.stack.dropped))
            self.finished.append((self.layout.places(leaving), output, dropped))
            staying = (~done).nonzero().squeeze(-1)
            self.layout = self.layout.select(staying)
            self.stack = Stack(*(x.index_select(0, staying) for x in self.stack))
            self.embedding = self.embedding.index_select(0, staying)

    def collect(self) -> tuple[Tensor, ...]:
        """Returns outputs [B, T, D] and distributions over halting steps [B, T, P] of all tokens."""
        return self.layout.spread(self.finished, (self.stack.output, self.stack.dropped))


class _Record:
    """Records the mixers' losses, and thoughts and trace of every step as far as the options ask for them."""

    def __init__(self, embeds: Tensor, options: PonderOptions):
        self._options = options
        self._thoughts: list[Tensor] = [embeds]
        self._steps: list[list[Tensor]] = []
        self._loss: Tensor | None = None

    def add(self, tokens: _Tokens, thought: Tensor, actions: Tensor, told: list[Told]) -> None:
        """Records one step. Tokens that have halted keep their last thought, and have no further losses."""
        losses = [of_layer for of_layer in told if isinstance(of_layer, Tensor)]
        if losses:
            batch = losses[0].new_zeros(tokens.layout.batch_size, tokens.layout.length)
            of_step = tokens.layout.scatter(torch.stack(losses).sum(0), batch)
            self._loss = of_step if self._loss is None else self._loss + of_step
        if self._options.keep_trace:
            bank_weights = [None if isinstance(of_layer, Tensor) else of_layer for of_layer in told]
            step = StackTrace.of_step(tokens.layout, tokens.stack.pointer, actions, bank_weights)
            self._steps.append(step)
        if self._options.keep_thoughts:
            self._thoughts.append(tokens.layout.scatter(thought, self._thoughts[-1]))

    def collect(self, num_steps: int) -> tuple[tuple[Tensor, ...] | None, StackTrace | None, Tensor | None]:
        """Returns the thoughts and the trace of `num_steps` steps, and the mixers' losses [B, T].

        Steps that no token needed repeat the last thoughts, and are zeros in the trace. The losses are sums
        over layers and steps.
        """
        thoughts = self._thoughts + self._thoughts[-1:] * (num_steps + 1 - len(self._thoughts))
        trace = StackTrace.of_steps(self._steps, num_steps) if self._steps else None
        return tuple(thoughts) if self._options.keep_thoughts else None, trace, self._loss


def _map_tensors(function: Callable[..., Tensor], *trees):
    """Applies a function to the corresponding tensors of trees that have the same structure."""
    return tree_map(lambda *leaves: None if leaves[0] is None else function(*leaves), *trees)


def _spans_processes(model: Any, cache: Cache | None) -> bool:
    """Whether each run of the core involves other processes, which hold a part of its weights or state."""
    if cache is not None and cache.layers[0].is_shared:
        return True
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if is_deepspeed_zero3_enabled():
        return True
    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def _keep_in_graph(model: Any, output: Tensor, steps_left: range) -> Tensor:
    """Returns `output` unchanged, but connected in the graph to the parameters that no token needed.

    DDP exchanges gradients, so every process must have a gradient of each parameter.
    """
    if steps_left.start > 2:
        return output
    # `start` 1: no step ran, and no parameter was used. 2: one step ran, without the gate, and no step has
    # read the frames that it wrote.
    unused = [model] if steps_left.start == 1 else [model.step_gate, model.return_norm]
    parameters = [x for module in unused if module is not None for x in module.parameters()]
    sums = [x.sum().to(output.device) for x in parameters if x.requires_grad]
    return output + 0 * torch.stack(sums).sum() if sums else output


def _run_remaining_steps(
    model: Any, output: Tensor, embeds: Tensor, steps: range, cache: Cache | None
) -> Tensor:
    """Runs the remaining steps on one token without mass in each row, and returns `output` unchanged.

    Every process must run the core equally often: a sharded layer is gathered from all processes each time it
    runs, every process needs a gradient of each parameter, and all processes exchange the state of a sequence
    that is split over them.
    """
    # The token depends on the outputs, so that the backward pass also runs these steps before the others.
    # `nan_to_num` keeps a NaN in one token from reaching all others through the sums below.
    embedding = (output[:, 0] + embeds[:, 0]).nan_to_num()
    no_token = torch.zeros(len(embedding), dtype=torch.bool, device=embedding.device)
    layout = TokenLayout.full(len(embedding), 1).masked(no_token)
    stack = init_stack(embedding, model.config.stack_depth, model.config.max_ponder_steps)
    weightless = torch.zeros_like(stack.pointer)  # a token without mass neither writes nor decays a memory
    shared = cache if cache is not None and cache.layers[0].is_shared else None
    for step in steps:
        stack = stack._replace(pointer=weightless)
        thought, actions, _ = think(model, stack, layout, step, shared)
        stack = step_stack(stack, actions, thought, embedding, step, model.return_norm)
    return output + 0 * (thought.sum() + stack.frames.sum()).nan_to_num()


__all__ = ["PonderOptions", "Pondered", "ponder"]
