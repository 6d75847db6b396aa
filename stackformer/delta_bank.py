# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The banked delta rule: the operator, as a recurrence, in chunks, and one token at a time.

Per head, with memories m = 1..R, each a matrix M_m [K, V]:

    held  = sum_m write[m] exp(log_decay[m]) M_m^T key
    error = value - held
    M_m  <- exp(log_decay[m]) M_m + write[m] key (step_size error)^T
    output = sum_m read[m] M_m^T query

A token corrects what the bank holds for its key, by `step_size` of the error, and spreads the correction over
the memories that it writes to. A read includes the token's own write. With one memory and unit gates this is
the delta rule (Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers", equation 24;
with decay: Yang et al. 2024, "Gated Delta Networks", equation 10). R memories are one delta rule with keys
write (x) key of size R K, and a decay for each memory. If these have at most length 1, and the step size is
at most 2, the transition of the state has no eigenvalue above 1. From a step size of 1 on, eigenvalues may be
negative, with which a state can be tracked (Grazzi et al. 2024, "Unlocking State-Tracking in Linear RNNs
Through Negative Eigenvalues").

All forms are causal for NaN and infinities, too: the arguments of a token change no bit of the outputs before
that token, except that its log decay may change the roundings in its chunk.

Letters: B batch, T time, H heads, K key size, V value size, R memories per head, N chunks of C tokens.
Plain tensors in, plain tensors out: nothing here knows of a configuration or a cache.

The table `IMPLEMENTATIONS` says which implementations there are, when each of them can run, and what runs it.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import (
    MAX_CHUNK,
    NOTHING,
    ChunkGroup,
    Gates,
    bounded,
    causal_product,
    check_chunk_size,
    chunk_groups,
    expand,
    from_chunks,
    in_chunks,
    safe_chunk_length,
    scan,
)
from .delta_bank_cpu import correct
from .dtypes import at_least_float32
from .implementation import (
    Implementation,
    agree_on,
    can_look_at,
    check_inputs,
    check_tensors,
    choose,
    library_obstacle,
    recurrent_obstacle,
    triton_obstacle,
    without_autocast,
)

# Tokens per chunk: longer chunks do less work on states and more on triangular systems.
_CHUNK_SIZE = 64


def banked_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    max_decay: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Corrects and reads a bank of fast weights, causally.

    Args:
        query, key: [B, T, H, K]. If a key times its write weights is longer than 1, the state may grow
            without bound.
        value: [B, T, H, V].
        read, write: [B, T, H, R], weights of the memories. A token whose write weights and log decays are
            zero leaves every memory as it was.
        log_decay: [B, T, H, R], <= 0, the logarithm of the factor by which each token scales each memory.
            -inf wipes a memory: nothing is left of it, and no gradient passes.
        step_size: [B, T, H], the fraction of the error that is corrected, from 0 to 2.
        initial_state: memory [B, H, R, K, V]; zeros if `None`.
        chunk_size: tokens per chunk. It changes speed and memory, not the result. `None` takes 64; "triton"
            takes at most 64, or 32 for float32 and wide heads.
        implementation: as in `banked_linear_attention`: "recurrent" (the definition, one token after
            another), "chunk" (a few large matrix products and a triangular system per chunk, with a backward
            pass of its own), "cpp" (the same in C++, for CPUs, where it was built), "triton" (the same as
            kernels for a GPU), or `None` for the fastest that can run.
        max_decay: a bound on `-log_decay` of all tokens, as in `banked_linear_attention`.

    Returns:
        The output [B, T, H, V] in the dtype of `value`, and the final memory in float32 (float64 for float64
        inputs).

    Raises:
        ValueError: if shapes, dtypes or devices do not go together, for numbers out of range, or for an
            `implementation` that is unknown or cannot run here, STACKFORMER_IMPLEMENTATION included.
    """
    _check(query, key, value, read, write, log_decay, step_size, _named("initial_state", initial_state))
    chunk_size = _CHUNK_SIZE if chunk_size is None else chunk_size
    check_chunk_size(chunk_size)
    chunk_size = min(chunk_size, MAX_CHUNK)
    if max_decay is not None and not max_decay >= 0:
        raise ValueError(f"`max_decay` must be at least 0, got {max_decay}")
    implementation = which_implementation(query, key, value, read, implementation)

    dtype = at_least_float32(query)
    if initial_state is None:
        batch, _, heads, key_size = query.shape
        memory = query.new_zeros(batch, heads, read.shape[-1], key_size, value.shape[-1], dtype=dtype)
    else:
        memory = initial_state.to(dtype)
    tensors = (query, key, value, read, write, log_decay, step_size, memory)
    with without_autocast(query.device):
        return IMPLEMENTATIONS[implementation].run(tensors, chunk_size, max_decay)


# The table of implementations.

# Query, key, value, read, write, log decay, step size and memory.
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _run_recurrent(tensors: Tensors, chunk_size: int, max_decay: float | None) -> tuple[Tensor, Tensor]:
    """Computes the definition, token by token; autograd differentiates it."""
    *inputs, memory = tensors
    steps, outputs = [tensor.to(memory.dtype).unbind(1) for tensor in inputs], []
    for query, key, value, read, write, log_decay, step_size in zip(*steps, strict=True):
        output, memory = _step(query, key, value, read, write, log_decay, step_size, memory)
        outputs.append(output)
    return torch.stack(outputs, dim=1).to(tensors[2].dtype), memory


def _run_chunk(tensors: Tensors, chunk_size: int, max_decay: float | None) -> tuple[Tensor, Tensor]:
    length = safe_chunk_length(chunk_size, max_decay, tensors[5], tensors[7].dtype)
    return _ChunkedDeltaRule.apply(*tensors, length)


def _triton_obstacle(query: Tensor, key: Tensor, value: Tensor, read: Tensor, asked: bool) -> str | None:
    found = triton_obstacle(query, asked)
    if found is not None:
        return found
    from .delta_bank_triton import obstacle

    found = obstacle(query, key, value, read)
    if found is None and not asked and not _triton_works(query.device):
        return f"its kernels do not work on {query.device}"
    return found


@torch.compiler.assume_constant_result
@cache
def _triton_works(device: torch.device) -> bool:
    """Returns whether the kernels work on a device. They are tried once per device, on a small example."""
    return agree_on(device, _example)


def _example(device: torch.device, implementation: str) -> list[Tensor]:
    """Returns the output and the gradients of a small example, with keys of length 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(1, 40, 2, size, generator=generator) for size in (16, 16, 16, 2, 2, 2, 1)]
    tensors[1] = torch.nn.functional.normalize(tensors[1], dim=-1)
    tensors[4] = tensors[4].softmax(-1).sqrt()
    inputs = query, key, value, read, write, decay, step = [x.to(device).requires_grad_() for x in tensors]
    output, _ = banked_delta_rule(
        query, key, value, read, write, -decay, step[..., 0], implementation=implementation, max_decay=1.0
    )
    return [output, *torch.autograd.grad(output.square().sum(), inputs)]


def _run_triton(tensors: Tensors, chunk_size: int, max_decay: float | None) -> tuple[Tensor, Tensor]:
    from .delta_bank_triton import chunk_length, chunked_delta_rule

    length = chunk_length(chunk_size, *tensors[:4])
    return chunked_delta_rule(*tensors, safe_chunk_length(length, max_decay, tensors[5], tensors[7].dtype))


def _run_cpp(tensors: Tensors, chunk_size: int, max_decay: float | None) -> tuple[Tensor, Tensor]:
    return correct(*tensors, safe_chunk_length(chunk_size, max_decay, tensors[5], tensors[7].dtype))


# A call that asks for none takes the first one without an obstacle.
IMPLEMENTATIONS = {
    "cpp": Implementation(library_obstacle, _run_cpp),
    "recurrent": Implementation(recurrent_obstacle, _run_recurrent),
    "triton": Implementation(_triton_obstacle, _run_triton),
    "chunk": Implementation(lambda *_: None, _run_chunk),
}


def which_implementation(
    query: Tensor, key: Tensor, value: Tensor, read: Tensor, implementation: str | None = None
) -> str:
    """Returns the name of the implementation that `banked_delta_rule` runs for these inputs.

    Args:
        query, key: [B, T, H, K]; value: [B, T, H, V]; read: [B, T, H, R].
        implementation: as in `banked_delta_rule`.

    Raises:
        ValueError: for an `implementation` that is unknown or cannot run here, and for such a value of the
            environment variable STACKFORMER_IMPLEMENTATION, which is taken if `implementation` is `None`.
    """
    return choose(IMPLEMENTATIONS, (query, key, value, read), implementation)


def banked_delta_rule_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes one token of `banked_delta_rule`: one step of the recurrence.

    Args:
        query, key: [B, H, K]; value: [B, H, V]; read, write, log_decay: [B, H, R]; step_size: [B, H].
        state: memory [B, H, R, K, V]. It is not changed in place.

    Returns:
        The output [B, H, V] and the new memory.

    Raises:
        ValueError: if shapes, dtypes or devices do not go together.
    """
    _check(query, key, value, read, write, log_decay, step_size, _named("state", state), dimensions=3)
    return _step(query, key, value, read, write, log_decay, step_size, state)


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    memory: Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes `banked_delta_rule_step` for checked tensors."""
    written_key = expand(write, key).unsqueeze(-1)  # [B, H, R*K, 1]
    read_query = expand(read, query).unsqueeze(-2)  # [B, H, 1, R*K]
    kept = (log_decay.exp()[..., None, None] * memory).flatten(-3, -2)  # [B, H, R*K, V]
    held = (written_key * kept).sum(-2)  # [B, H, V]
    change = step_size.unsqueeze(-1) * (value - held)
    kept = kept + written_key * change.unsqueeze(-2)
    output = (read_query @ kept).squeeze(-2)
    return output, kept.view_as(memory)


def _named(name: str, state: Tensor | None) -> dict[str, Tensor]:
    """Returns the memory by the name that errors give it; nothing for `None`."""
    return {} if state is None else {name: state}


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    state: dict[str, Tensor],
    dimensions: int = 4,
) -> None:
    """Raises a ValueError that names the first wrong input of the operator, if there is one."""
    gates = {"read": read, "write": write, "log_decay": log_decay}
    check_inputs({"query": query, "key": key}, value, gates, state, dimensions)
    check_tensors("query", query.device, [("step_size", step_size, tuple(query.shape[:-1]))])


# The chunk form.
#
# Let G be the cumulative sum of log_decay in a chunk that starts with the states S_m. The errors E [C, V] of
# its tokens solve a triangular system (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta
# Rule over Sequence Length", arXiv 2406.06484, the UT transform; here for a bank), with b the step sizes:
#     (1 + A diag(b)) E = V - sum_m diag(write_m exp(G_m)) K S_m
#     A_ij = (k_i . k_j) sum_m write_im write_jm exp(G_im - G_jm)    for j < i, else 0
# One product of keys for all memories, times a product of rank R, as in banked linear attention (chunks.py).
# A bank is read for what it holds with the key and the write weights, before the token's own write; and
# diag(b) E is what the tokens write. So the output and the states follow as in banked linear attention.
#
# The inverses of all systems of a group are computed at once. Only the products with the state are computed
# one chunk after another. The backward pass keeps the errors of all tokens and one state per group.


class _Group:
    """The tensors that both passes of a group of chunks need; query to step size are [B*H, N, C, F]."""

    def __init__(self, chunks: list[Tensor]):
        self.query, self.key, self.value, self.read, self.write, log_decay, self.step_size = chunks
        self.gates = gates = Gates(self.read, self.write, log_decay)
        # The weights with which a token reads what is held for its key.
        self.hold_inside, self.hold_state = self.write * gates.from_center, self.write * gates.from_start
        self.scores = self.query @ self.key.transpose(-1, -2)  # [B*H, N, C, C], like the next four
        self.inside = (gates.read_inside @ gates.write_inside.transpose(-1, -2)).tril_()
        self.key_scores = self.key @ self.key.transpose(-1, -2)
        self.holding = (self.hold_inside @ gates.write_inside.transpose(-1, -2)).tril_(-1)
        self.system = self.key_scores.tril(-1).mul_(self.holding)  # A
        # The solver reads only what is below the diagonal.
        self.inverse = torch.linalg.solve_triangular(
            self.system * self.step_size.transpose(-1, -2),
            torch.eye(self.key.shape[-2], dtype=self.key.dtype, device=self.key.device),
            upper=False,
            unitriangular=True,
        )
        self.read_query = expand(gates.read_state, self.query)  # [B*H, N, C, R*K], like the next two
        self.held_key = expand(self.hold_state, self.key)
        self.written_key = expand(gates.write_state, self.key)
        key_size = self.key.shape[-1]
        self.decay = gates.decay.repeat_interleave(key_size, dim=-1).unsqueeze(-1)  # [B*H, N, R*K, 1]


class _GroupResults(NamedTuple):
    """The results of all groups of chunks."""

    groups: list[ChunkGroup]
    output: Tensor  # [B, T, H, V]
    errors: Tensor  # [B, T, H, V]
    group_states: Tensor  # [groups, B*H, R*K, V], at the start of each
    state: Tensor  # [B*H, R*K, V], after the last one


def _in_groups(inputs: tuple[Tensor, ...], memory: Tensor, length: int, prepared: bool) -> _GroupResults:
    """Computes the chunk form, without gradients.

    Args:
        inputs: query to step size; the log decay is finite or NaN.
        memory: the initial state.
        length: tokens per chunk.
        prepared: whether values that are not finite stay in their column, from their token on. That takes
            more time.
    """
    batch, time, heads, _ = inputs[0].shape
    *_, memories, key_size, value_size = memory.shape
    columns = memories * key_size
    groups = chunk_groups(
        time, length, batch * heads * (3 * length * (length + columns) + columns * value_size)
    )
    state = memory.reshape(batch * heads, columns, value_size)
    group_states, outputs, errors = [], [], []
    for group in groups:
        part = _Group([in_chunks(tensor, group, memory.dtype) for tensor in inputs])
        group_states.append(state)
        starts, found = [], []
        for chunk in range(group.chunks):
            starts.append(state)
            missing = part.value[:, chunk] - part.held_key[:, chunk] @ state
            inverse = part.inverse[:, chunk]
            found.append(causal_product(inverse, missing) if prepared else inverse @ missing)
            change = part.step_size[:, chunk] * found[-1]
            kept = part.decay[:, chunk] * state
            state = torch.baddbmm(kept, part.written_key[:, chunk].transpose(-1, -2), change)
        error = torch.stack(found, dim=1)
        weights, change = part.scores.tril().mul_(part.inside), part.step_size * error
        output = causal_product(weights, change) if prepared else weights @ change
        output = output + part.read_query @ torch.stack(starts, dim=1)
        outputs.append(from_chunks(output, heads))
        errors.append(from_chunks(error, heads))
    return _GroupResults(
        groups, torch.cat(outputs, dim=1), torch.cat(errors, dim=1), torch.stack(group_states), state
    )


class _ChunkedDeltaRule(torch.autograd.Function):
    """Computes `banked_delta_rule` in chunks, with gradients that are written out."""

    @staticmethod
    def forward(ctx, query, key, value, read, write, log_decay, step_size, memory, length):
        tensors = (query, key, value, read, write, log_decay, step_size)
        inputs = _as_inputs(tensors, memory.dtype)
        # As in banked linear attention: being prepared for values that are no numbers takes time.
        may_ask = can_look_at(value)
        results = _in_groups(inputs, memory, length, prepared=not may_ask)
        if may_ask and not (
            math.isfinite(results.output[:, -1].sum()) and math.isfinite(results.state.sum())
        ):
            results = _in_groups(inputs, memory, length, prepared=True)
        ctx.groups = results.groups
        ctx.save_for_backward(*tensors, results.errors, results.group_states)
        return results.output.to(value.dtype), results.state.view_as(memory)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_memory):
        with without_autocast(grad_output.device):
            return _ChunkedDeltaRule._backward(ctx, grad_output, grad_memory)

    @staticmethod
    def _backward(ctx, grad_output, grad_memory):
        *tensors, errors, group_states = ctx.saved_tensors
        dtype, heads = errors.dtype, errors.shape[2]
        inputs = _as_inputs(tensors, dtype)
        grad_state = grad_memory.reshape(group_states[0].shape)
        grads: list[list[Tensor]] = [[] for _ in range(7)]
        for group, state in zip(reversed(ctx.groups), reversed(group_states.unbind()), strict=True):
            part = _Group([in_chunks(x, group, dtype) for x in inputs])
            error, grad = (in_chunks(x, group, dtype) for x in (errors, grad_output))
            group_grads, grad_state = _group_backward(part, error, state, grad, grad_state)
            for collected, grad in zip(grads, group_grads, strict=True):
                collected.append(from_chunks(grad, heads))
        results = [torch.cat(parts[::-1], dim=1) for parts in grads]
        # No gradient passes a wiped memory; the sum has the rounding errors of terms that cancel.
        results[5].masked_fill_(inputs[5] <= NOTHING[dtype], 0.0)
        results[6] = results[6].squeeze(-1)
        results = [grad.to(x.dtype) for grad, x in zip(results, tensors, strict=True)]
        return *results, grad_state.view_as(grad_memory), None


def _as_inputs(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns query to step size with a bounded log decay, and a feature dimension for the step size."""
    *others, log_decay, step_size = tensors
    return *others, bounded(log_decay, dtype), step_size.unsqueeze(-1)


def _group_backward(
    part: _Group, error: Tensor, state: Tensor, grad_output: Tensor, grad_state: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Computes the gradients of a group's inputs and initial state.

    Args:
        error: of the group's tokens [B*H, N, C, V].
        state: at the start of the group [B*H, R*K, V].
        grad_output: [B*H, N, C, V].
        grad_state: the gradient of the state after the group [B*H, R*K, V].
    """
    q, k, gates, step_size = part.query, part.key, part.gates, part.step_size
    change = step_size * error
    starts, _ = scan(state, gates.decay, part.written_key.transpose(-1, -2) @ change)

    # From the last chunk to the first: gradients of what the tokens write, of what they were missing, and of
    # each chunk's final state.
    weights = part.scores.tril().mul_(part.inside)
    read_here = weights.transpose(-1, -2) @ grad_output
    read_state = part.read_query.transpose(-1, -2) @ grad_output
    grad_changes, grad_missings, grad_ends = [], [], []
    for chunk in reversed(range(k.shape[1])):
        grad_ends.append(grad_state)
        grad_change = torch.baddbmm(read_here[:, chunk], part.written_key[:, chunk], grad_state)
        grad_missing = part.inverse[:, chunk].transpose(-1, -2) @ (step_size[:, chunk] * grad_change)
        grad_state = torch.addcmul(read_state[:, chunk], part.decay[:, chunk], grad_state)
        grad_state = grad_state - part.held_key[:, chunk].transpose(-1, -2) @ grad_missing
        grad_changes.append(grad_change)
        grad_missings.append(grad_missing)
    grad_change, grad_missing, grad_end = (
        torch.stack(parts[::-1], dim=1) for parts in (grad_changes, grad_missings, grad_ends)
    )

    # Inside the chunks: reads of the output, and of what is held, whose gradient is -grad_missing.
    grad_weights = (grad_output @ change.transpose(-1, -2)).tril_()
    grad_scores, grad_inside = grad_weights * part.inside, grad_weights * part.scores
    met = (grad_missing @ error.transpose(-1, -2)).tril_(-1)
    grad_step = (grad_change * error).sum(-1) - (met * part.system).sum(-2)
    grad_system = met.mul_(-step_size.transpose(-1, -2))
    grad_key_scores, grad_holding = grad_system * part.holding, grad_system * part.key_scores

    # Through the states, [B*H, N, C, R, K] each.
    memories = (part.read.shape[-1], -1)
    grad_read_query = (grad_output @ starts.transpose(-1, -2)).unflatten(-1, memories)
    grad_held_key = (grad_missing @ starts.transpose(-1, -2)).neg_().unflatten(-1, memories)
    grad_written_key = (change @ grad_end.transpose(-1, -2)).unflatten(-1, memories)

    def over_memories(weights: Tensor, grad: Tensor) -> Tensor:
        return (weights.unsqueeze(-2) @ grad).squeeze(-2)  # [..., R], [..., R, K] -> [..., K]

    def over_features(grad: Tensor, features: Tensor) -> Tensor:
        return (grad @ features.unsqueeze(-1)).squeeze(-1)  # [..., R, K], [..., K] -> [..., R]

    grad_q = grad_scores @ k + over_memories(gates.read_state, grad_read_query)
    grad_k = grad_scores.transpose(-1, -2) @ q
    grad_k = grad_k + (grad_key_scores + grad_key_scores.transpose(-1, -2)) @ k
    grad_k = grad_k + over_memories(part.hold_state, grad_held_key)
    grad_k = grad_k + over_memories(gates.write_state, grad_written_key)

    grad_write_inside = grad_inside.transpose(-1, -2) @ gates.read_inside
    grad_write_inside = grad_write_inside + grad_holding.transpose(-1, -2) @ part.hold_inside
    grad_write_state = over_features(grad_written_key, k)
    grad_r = (grad_inside @ gates.write_inside) * gates.from_center
    grad_r = grad_r + over_features(grad_read_query, q) * gates.from_start
    grad_hold = (grad_holding @ gates.write_inside) * gates.from_center
    grad_hold = grad_hold + over_features(grad_held_key, k) * gates.from_start
    grad_w = grad_hold + grad_write_inside * gates.to_center + grad_write_state * gates.to_end

    # Every exponential is its own derivative; the midpoint cancels.
    leaving = grad_write_state * gates.write_state
    grad_total = grad_r * part.read + grad_hold * part.write
    grad_total = grad_total - grad_write_inside * gates.write_inside - leaving
    grad_decay = (starts * grad_end).sum(-1).unflatten(-1, memories).sum(-1) * gates.decay
    grad_total[..., -1, :] += leaving.sum(-2) + grad_decay
    grad_g = grad_total.flip(-2).cumsum(-2).flip(-2)
    grads = (grad_q, grad_k, grad_missing, grad_r, grad_w, grad_g, grad_step.unsqueeze(-1))
    return grads, grad_state
