# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The loop over ponder steps: which tokens are computed at each, and what becomes of those that are done.

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
from .core_stackformer import BankWeights, think
from .processing_stack import Stack, flush_stack, init_stack, step_stack
from .stack_trace import StackTrace
from .token_layout import TokenLayout


class PonderOptions(NamedTuple):
    """How deep tokens ponder, and what is recorded of it.

    Args:
        halting_threshold: a token is done when less mass than this is left on its stack; 0 for never.
        depths: [B, T], the steps after which each token is done, instead.
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
    distribution: Tensor  # [B, T, P], over halting steps
    thoughts: tuple[Tensor, ...] | None  # P + 1 of [B, T, D]: the embeddings, and after each step
    trace: StackTrace | None


def ponder(
    model: Any, embeds: Tensor, layout: TokenLayout, cache: Cache | None, options: PonderOptions
) -> Pondered:
    """Apply the core of a `StackformerModel` to embeddings [B, T, D] until every token's stack is empty.

    With feedback, the ponder steps share one slice of state: the first step of a token reads what the last
    step of the token before it wrote. So one token of each row comes after the other, with all of its steps.
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
    """`ponder` with feedback for packed documents: each becomes a row of its own, and goes back."""
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
    """`ponder` for all tokens at once, step by step."""
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
            thought, actions, bank_weights = think(model, tokens.stack, tokens.layout, step, cache)
        record.add(tokens, thought, actions, bank_weights)
        if step == num_steps:
            tokens.stack = flush_stack(tokens.stack, None, thought, step)
            break
        tokens.stack = step_stack(tokens.stack, actions, thought, tokens.embedding, step, model.return_norm)
        tokens.halt(thought, step, options)

    output, distribution = tokens.collect()
    if steps_left and _is_shared(model, cache):
        output = _keep_up(model, output, embeds, steps_left, cache)
    elif steps_left and torch.is_grad_enabled():
        output = _keep_in_graph(model, output, steps_left)
    if cache is not None:
        for cache_layer in cache.layers:
            cache_layer.advance(embeds.shape[1])
    return Pondered(output, distribution, *record.collect(num_steps))


def check_depths(depths: Tensor, layout: TokenLayout) -> None:
    """Raises a ValueError for depths of another shape, or of less than one step for a token that is read."""
    shape = (layout.batch_size, layout.length)
    if tuple(depths.shape) != shape:
        raise ValueError(f"`ponder_depths` must have shape {shape}, got {tuple(depths.shape)}")
    asked = layout.gather(depths)
    if asked.numel() and not torch.compiler.is_compiling() and not (asked >= 1).all():
        raise ValueError(f"`ponder_depths` must be at least 1 for every token, got {float(asked.min())}")


class _Tokens:
    """The tokens that are still computed, and the results of those that are done."""

    def __init__(self, layout: TokenLayout, embedding: Tensor, stack: Stack):
        self.layout, self.embedding, self.stack = layout, embedding, stack
        self.finished: list[tuple[Tensor, ...]] = []  # places, outputs, distributions

    @classmethod
    def begin(cls, embeds: Tensor, layout: TokenLayout, config: Any) -> "_Tokens":
        """All active tokens, on level 0 of their stacks."""
        embedding = layout.gather(embeds)  # [n, D]
        stack = init_stack(embedding, config.stack_depth, config.max_ponder_steps)
        if layout.thinking is not None:  # padding has no mass
            stack = stack._replace(pointer=stack.pointer * layout.thinking.unsqueeze(-1))
        return cls(layout, embedding, stack)

    def halt(self, thought: Tensor, step: int, options: PonderOptions) -> None:
        """Let the tokens go that are done after a step: their remaining mass drops, and they are gathered
        out. A compiled graph cannot depend on which ones these are: there, they are masked instead."""
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
        """Outputs [B, T, D] and distributions over halting steps [B, T, P] of all tokens."""
        return self.layout.spread(self.finished, (self.stack.output, self.stack.dropped))


class _Record:
    """The thoughts of every step, and the trace, where they are asked for."""

    def __init__(self, embeds: Tensor, options: PonderOptions):
        self._options = options
        self._thoughts: list[Tensor] = [embeds]
        self._steps: list[list[Tensor]] = []

    def add(self, tokens: _Tokens, thought: Tensor, actions: Tensor, bank_weights: list[BankWeights]) -> None:
        """One step of the tokens that are computed."""
        if self._options.keep_trace:
            step = StackTrace.of_step(tokens.layout, tokens.stack.pointer, actions, bank_weights)
            self._steps.append(step)
        if self._options.keep_thoughts:
            self._thoughts.append(tokens.layout.scatter(thought, self._thoughts[-1]))

    def collect(self, num_steps: int) -> tuple[tuple[Tensor, ...] | None, StackTrace | None]:
        """The thoughts and the trace of `num_steps` steps, some of which no token may have needed."""
        thoughts = self._thoughts + self._thoughts[-1:] * (num_steps + 1 - len(self._thoughts))
        trace = StackTrace.of_steps(self._steps, num_steps) if self._steps else None
        return tuple(thoughts) if self._options.keep_thoughts else None, trace


def _map_tensors(function: Callable[..., Tensor], *trees):
    """Applies a function to the tensors that have the same place in trees of one structure."""
    return tree_map(lambda *leaves: None if leaves[0] is None else function(*leaves), *trees)


def _is_shared(model: Any, cache: Cache | None) -> bool:
    """Whether other processes take part in each run of the core: its weights are gathered from them, or its
    state comes from them."""
    if cache is not None and cache.layers[0].is_shared:
        return True
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if is_deepspeed_zero3_enabled():
        return True
    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def _keep_in_graph(model: Any, output: Tensor, steps_left: range) -> Tensor:
    """Returns `output`, unchanged, as a function of the parameters that no token needed: where gradients are
    exchanged (DDP), every process must have one for each of them."""
    if steps_left.start > 2:
        return output
    # After a single step, nothing has read the frames that were written, and no gate was needed.
    unused = [model] if steps_left.start == 1 else [model.step_gate, model.return_norm]
    parameters = [x for module in unused if module is not None for x in module.parameters()]
    sums = [x.sum().to(output.device) for x in parameters if x.requires_grad]
    return output + 0 * torch.stack(sums).sum() if sums else output


def _keep_up(model: Any, output: Tensor, embeds: Tensor, steps: range, cache: Cache | None) -> Tensor:
    """Runs the remaining steps on one token without mass in each row, and returns `output` unchanged.

    Every process must run the core equally often: a sharded layer is gathered from all processes each time it
    runs, all must have a gradient of each parameter, and all take part in the state of a sequence that is
    split over them.
    """
    # The token is made of the outputs, so that the backward pass, too, runs these steps before the others. A
    # token that is no number must stay the only one.
    embedding = (output[:, 0] + embeds[:, 0]).nan_to_num()
    nobody = torch.zeros(len(embedding), dtype=torch.bool, device=embedding.device)
    layout = TokenLayout.full(len(embedding), 1).masked(nobody)
    stack = init_stack(embedding, model.config.stack_depth, model.config.max_ponder_steps)
    weightless = torch.zeros_like(stack.pointer)  # writes nothing, decays nothing
    shared = cache if cache is not None and cache.layers[0].is_shared else None
    for step in steps:
        stack = stack._replace(pointer=weightless)
        thought, actions, _ = think(model, stack, layout, step, shared)
        stack = step_stack(stack, actions, thought, embedding, step, model.return_norm)
    return output + 0 * (thought.sum() + stack.frames.sum()).nan_to_num()


__all__ = ["PonderOptions", "Pondered", "ponder"]
