# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Banked linear attention: the operator, as a recurrence, in chunks, one token at a time, and in reverse.

Per head, with memories m = 1..R, each a matrix `memory[m]` [K, V] and a key sum `normalizer[m]` [K]:

    memory[m]     <- exp(log_decay[m]) memory[m]     + write[m] key value^T
    normalizer[m] <- exp(log_decay[m]) normalizer[m] + write[m] key
    output = (query^T sum_m read[m] memory[m]) / (query^T sum_m read[m] normalizer[m] + eps)

A read includes the token's own write. With one memory, unit gates and no decay this is the causal linear
attention of Katharopoulos et al. 2020, "Transformers are RNNs" (equations 18 to 20).

All forms are causal for NaN and infinities, too: the query, key, value, read and write of a token change no
bit of the outputs before that token. Its log decay, NaN included, may change the roundings of the outputs
before it in its chunk, since the exponents of a chunk are centred.

A float32 memory without decay loses new tokens when it stands for many old ones, because the sum is rounded
once per chunk of C tokens, or once per token in decoding (C = 1). After N tokens, the share of new writes
that an element loses or gains is at most 2^-24 N / C, if all writes have one sign and size. That is 0.5% at
10 million tokens for C = 128, and 60% in decoding (measured: 0.06% and 5%). From 100 million tokens on,
decoding adds nothing to such a memory. A decay of a nats per token bounds N by 1 / a. A float64 model has
float64 memories. docs/design.md has the measurements.

Letters: B batch, T time, H heads, K key size, V value size, R memories per head, C chunk length.
Plain tensors in, plain tensors out: nothing here knows of a configuration or a cache.

The table `IMPLEMENTATIONS` says which implementations there are, when each of them can run, and what runs it.
"""

import math
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
from .memory_bank_cpu import attend

State = tuple[Tensor, Tensor]


def banked_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    initial_state: State | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    max_decay: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, State]:
    """Attends to a bank of linear-attention memories, causally.

    Args:
        query, key: [B, T, H, K], after the feature map (non-negative, or the normalizer may vanish).
        value: [B, T, H, V].
        read, write: [B, T, H, R], weights of the memories, >= 0. A token whose write weights and log decays
            are zero leaves every memory as it was.
        log_decay: [B, T, H, R], <= 0, the logarithm of the factor by which each token scales each memory.
            -inf wipes a memory: nothing is left of it, and no gradient passes.
        initial_state: memory [B, H, R, K, V] and normalizer [B, H, R, K]; zeros if `None`.
        chunk_size: tokens per chunk. It changes speed and memory, not the result. `None` takes 64, or 128
            from 4 memories on, since the backward pass needs one state per chunk.
        implementation: "recurrent" (the definition, one token after another), "chunk" (a few large matrix
            products per chunk, with a backward pass of its own), "cpp" (the same in C++, for CPUs, where it
            was built) or "triton" (the same as kernels for a GPU). `None` takes the one that the environment
            variable STACKFORMER_IMPLEMENTATION names, and without it the fastest: "cpp" if it can run, else
            "recurrent" for one token, and "triton" if it can run or "chunk" for more.
            `which_implementation` says which one that is.
        max_decay: a bound on `-log_decay` of all tokens, if the caller knows one. Chunks are shortened as far
            as the bound demands, so that no exponential overflows. Infinity stands for no bound and shortens
            chunks to a few tokens. `None` measures the decay of each chunk, so that a few tokens that wipe
            memories shorten no chunk. The measurement costs a synchronisation on a GPU and a graph break
            under `torch.compile`.
        eps: added to the denominator.

    Returns:
        The output [B, T, H, V] in the dtype of `value`, and the final state in float32 (float64 for float64
        inputs).

    Raises:
        ValueError: if shapes, dtypes or devices do not go together, for numbers out of range, or for an
            `implementation` that is unknown or cannot run here, STACKFORMER_IMPLEMENTATION included.
    """
    keys, gates = {"query": query, "key": key}, {"read": read, "write": write, "log_decay": log_decay}
    check_inputs(keys, value, gates, _named_state("initial_state", initial_state))
    if chunk_size is None:
        chunk_size = 64 if read.shape[-1] < 4 else 128
    check_chunk_size(chunk_size)
    chunk_size = min(chunk_size, MAX_CHUNK)
    _check_eps(eps)
    if max_decay is not None and not max_decay >= 0:
        raise ValueError(f"`max_decay` must be at least 0, got {max_decay}")
    implementation = which_implementation(query, key, value, read, implementation)

    if initial_state is None:
        memory, normalizer = init_memory_bank(query, value, read)
    else:
        dtype = at_least_float32(query)
        memory, normalizer = (tensor.to(dtype) for tensor in initial_state)
    tensors = (query, key, value, read, write, log_decay, memory, normalizer)
    with without_autocast(query.device):
        output, memory, normalizer = IMPLEMENTATIONS[implementation].run(tensors, chunk_size, max_decay, eps)
    return output, (memory, normalizer)


# The table of implementations.

# Query, key, value, read, write, log decay, memory and normalizer.
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Results = tuple[Tensor, Tensor, Tensor]  # output, memory, normalizer


def _chunk_length(chunk_size: int, max_decay: float | None, tensors: Tensors) -> int:
    return safe_chunk_length(chunk_size, max_decay, tensors[5], tensors[6].dtype)


def _run_cpp(tensors: Tensors, chunk_size: int, max_decay: float | None, eps: float) -> Results:
    return attend(*tensors, _chunk_length(chunk_size, max_decay, tensors), eps)


def _run_recurrent(tensors: Tensors, chunk_size: int, max_decay: float | None, eps: float) -> Results:
    """Computes the definition, token by token; autograd differentiates it."""
    *inputs, memory, normalizer = tensors
    dtype, state, outputs = memory.dtype, (memory, normalizer), []
    steps = [tensor.to(dtype).unbind(1) for tensor in inputs]
    for query, key, value, read, write, log_decay in zip(*steps, strict=True):
        output, state = _step(query, key, value, read, write, log_decay, state, eps)
        outputs.append(output)
    return torch.stack(outputs, dim=1).to(tensors[2].dtype), *state


def _triton_obstacle(query: Tensor, key: Tensor, value: Tensor, read: Tensor, asked: bool) -> str | None:
    found = triton_obstacle(query, asked)
    if found is not None:
        return found
    from .memory_bank_triton import obstacle

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
    """Returns the output and the gradients of a small example."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(1, 40, 2, size, generator=generator) + 0.1 for size in (16, 16, 16, 2, 2, 2)]
    inputs = query, key, value, read, write, decay = [x.to(device).requires_grad_() for x in tensors]
    output, _ = banked_linear_attention(
        query, key, value, read, write, -decay, implementation=implementation, max_decay=2.0
    )
    return [output, *torch.autograd.grad(output.square().sum(), inputs)]


def _run_triton(tensors: Tensors, chunk_size: int, max_decay: float | None, eps: float) -> Results:
    from .memory_bank_triton import chunk_length, chunked_attention

    return chunked_attention(*tensors, _chunk_length(chunk_length(chunk_size), max_decay, tensors), eps)


def _run_chunk(tensors: Tensors, chunk_size: int, max_decay: float | None, eps: float) -> Results:
    return _ChunkedAttention.apply(*tensors, _chunk_length(chunk_size, max_decay, tensors), eps)


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
    """Returns the name of the implementation that `banked_linear_attention` runs for these inputs.

    Args:
        query, key: [B, T, H, K]; value: [B, T, H, V]; read: [B, T, H, R].
        implementation: as in `banked_linear_attention`.

    Raises:
        ValueError: for an `implementation` that is unknown or cannot run here, and for such a value of the
            environment variable STACKFORMER_IMPLEMENTATION, which is taken if `implementation` is `None`.
    """
    return choose(IMPLEMENTATIONS, (query, key, value, read), implementation)


def banked_linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    state: State,
    eps: float = 1e-6,
) -> tuple[Tensor, State]:
    """Computes one token of `banked_linear_attention`: one step of the recurrence.

    Args:
        query, key: [B, H, K]; value: [B, H, V]; read, write, log_decay: [B, H, R].
        state: memory [B, H, R, K, V] and normalizer [B, H, R, K]. The state is not changed in place.
        eps: added to the denominator.

    Returns:
        The output [B, H, V] and the new state.

    Raises:
        ValueError: if shapes, dtypes or devices do not go together, or `eps` is out of range.
    """
    keys, gates = {"query": query, "key": key}, {"read": read, "write": write, "log_decay": log_decay}
    check_inputs(keys, value, gates, _named_state("state", state), dimensions=3)
    _check_eps(eps)
    return _step(query, key, value, read, write, log_decay, state, eps)


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    state: State,
    eps: float,
) -> tuple[Tensor, State]:
    """Computes `banked_linear_attention_step` for checked tensors."""
    memory, normalizer = state
    decay = log_decay.exp().unsqueeze(-1)  # [B, H, R, 1]
    written_key = write.unsqueeze(-1) * key.unsqueeze(-2)  # [B, H, R, K]
    memory = decay.unsqueeze(-1) * memory + written_key.unsqueeze(-1) * value[..., None, None, :]
    normalizer = decay * normalizer + written_key
    read_query = (read.unsqueeze(-1) * query.unsqueeze(-2)).flatten(-2)  # [B, H, R*K]
    numerator = (read_query.unsqueeze(-2) @ memory.flatten(-3, -2)).squeeze(-2)
    denominator = (read_query * normalizer.flatten(-2)).sum(-1, keepdim=True)
    return numerator / (denominator + eps), (memory, normalizer)


def reverse_banked_linear_attention(
    key: Tensor,
    value: Tensor,
    write: Tensor,
    log_decay: Tensor,
    final_state: State,
    chunk_size: int = 512,
) -> State:
    """Returns the state before some tokens, from the state after them: it undoes their writes and decays.

    A memory that has decayed by exp(-a) comes back with its rounding error amplified by exp(a): undo only as
    much decay as the dtype can bear. A memory that was wiped comes back as NaN or infinities.

    Args:
        key: [B, T, H, K]; value: [B, T, H, V]; write, log_decay: [B, T, H, R]: the arguments of
            `banked_linear_attention`.
        final_state: memory [B, H, R, K, V] and normalizer [B, H, R, K] after the T tokens.
        chunk_size: tokens per chunk; a chunk is undone at once.

    Returns:
        The state before the T tokens, in the dtype of `final_state`.

    Raises:
        ValueError: if shapes, dtypes or devices do not go together, or `chunk_size` is not positive.
    """
    state = _named_state("final_state", final_state)
    check_inputs({"key": key}, value, {"write": write, "log_decay": log_decay}, state)
    check_chunk_size(chunk_size)
    memory, normalizer = final_state
    dtype = memory.dtype
    for stop in range(key.shape[1], 0, -chunk_size):
        chunk = slice(max(stop - chunk_size, 0), stop)
        gates = log_decay[:, chunk].to(dtype).transpose(1, 2).cumsum(2)  # [B, H, C, R]
        total = gates[:, :, -1]  # [B, H, R]
        weight = write[:, chunk].to(dtype).transpose(1, 2)  # [B, H, C, R]
        weight = weight * (total.unsqueeze(2) - gates).exp()
        keys = key[:, chunk].to(dtype).transpose(1, 2)  # [B, H, C, K]
        values = value[:, chunk].to(dtype).transpose(1, 2)  # [B, H, C, V]
        written_key = expand(weight, keys)  # [B, H, C, R*K]
        written = (written_key.transpose(-1, -2) @ values).view_as(memory)  # [B, H, R, K, V]
        growth = (-total).exp().unsqueeze(-1)  # [B, H, R, 1]
        memory = (memory - written) * growth.unsqueeze(-1)
        normalizer = (normalizer - written_key.sum(2).view_as(normalizer)) * growth
    return memory, normalizer


def combine_chunks(log_decay: Tensor, memory: Tensor, normalizer: Tensor) -> State:
    """Returns the state after N spans of tokens, one after another, from the state that each makes alone.

    A span is the tokens that one process holds, of any number. It turns a state into exp(log_decay) times
    that state, plus the state that it makes of an empty one. This is an associative operation (Blelloch 1990,
    "Prefix Sums and Their Applications", section 4.1).

    Args:
        log_decay: [N, B, H, R], the sum over the tokens of each span.
        memory: [N, B, H, R, K, V] and normalizer: [N, B, H, R, K], made of an empty state.

    Returns:
        memory [B, H, R, K, V] and normalizer [B, H, R, K]

    Raises:
        ValueError: if shapes, dtypes or devices do not go together.
    """
    if log_decay.dim() != 4:
        raise ValueError(
            f"`log_decay` must have shape [spans, batch, heads, memories], got {tuple(log_decay.shape)}"
        )
    bank = (*log_decay.shape, *memory.shape[4:6])
    expected = (("log_decay", log_decay, bank[:4]), ("memory", memory, bank))
    check_tensors("log_decay", log_decay.device, (*expected, ("normalizer", normalizer, bank[:5])))
    # The decay over all later spans.
    later = torch.cat([log_decay[1:], torch.zeros_like(log_decay[:1])]).flip(0).cumsum(0).flip(0)
    kept = later.exp().unsqueeze(-1)  # [N, B, H, R, 1]
    return (kept.unsqueeze(-1) * memory).sum(0), (kept * normalizer).sum(0)


def init_memory_bank(query: Tensor, value: Tensor, read: Tensor) -> State:
    """Returns an empty memory [B, H, R, K, V] and normalizer [B, H, R, K], in float32 at least.

    Args:
        query: [B, ..., H, K]; value: [B, ..., H, V]; read: [B, ..., H, R].
    """
    batch, heads, key_size = query.shape[0], query.shape[-2], query.shape[-1]
    dtype = at_least_float32(query)
    memory = torch.zeros(
        batch, heads, read.shape[-1], key_size, value.shape[-1], dtype=dtype, device=query.device
    )
    return memory, torch.zeros_like(memory[..., 0])


def _named_state(name: str, state: State | None) -> dict[str, Tensor]:
    """Returns memory and normalizer by the names that errors give them; nothing for `None`."""
    if state is None:
        return {}
    if len(state) != 2:
        raise ValueError(f"`{name}` must be a memory and a normalizer, got {len(state)} tensors")
    return {f"{name}[0]": state[0], f"{name}[1]": state[1]}


def _check_eps(eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"`eps` must be at least 0 and finite, got {eps}")


# The chunk form.
#
# Inside a chunk, with G the cumulative sum of log_decay and c its midpoint, token j weighs at i >= j
#     (q_i . k_j) * sum_m [read_im exp(G_im - c_m)] [write_jm exp(c_m - G_jm)],
# one product of queries and keys for all memories times a product of rank R; c_m keeps the exponents small.
# Across chunks, two products with inner dimension R*K read and update the states. The normalizer is one more
# value column, which is 1 for every token. A group of chunks is computed at once: that bounds the work space,
# so that memory does not grow with T*R*K. The backward pass keeps one state per group, and recomputes the
# others.


def _with_ones(value: Tensor) -> Tensor:
    """Returns [..., V] with the column of the normalizer, as [..., V+1]."""
    return torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)


class _GroupResults(NamedTuple):
    """The results of all groups of chunks."""

    groups: list[ChunkGroup]
    output: Tensor  # [B, T, H, V]
    denominator: Tensor  # [B, T, H, 1]
    group_states: Tensor  # [groups, B*H, R*K, V+1], at the start of each
    state: Tensor  # [B*H, R*K, V+1], after the last one


def _in_groups(
    inputs: tuple[Tensor, ...], memory: Tensor, normalizer: Tensor, length: int, eps: float, prepared: bool
) -> _GroupResults:
    """Computes the chunk form, without gradients.

    Args:
        inputs: query, key, value, read, write and log decay; the log decay is finite or NaN.
        memory, normalizer: the initial state.
        length: tokens per chunk.
        eps: added to the denominator.
        prepared: whether values that are not finite stay in their column, from their token on. That takes
            more time.
    """
    batch, time, heads, key_size = inputs[0].shape
    memories, value_size = inputs[3].shape[-1], inputs[2].shape[-1]
    columns = memories * key_size
    groups = chunk_groups(
        time, length, batch * heads * (length * (length + columns) + columns * (value_size + 1))
    )
    state = torch.cat([memory, normalizer.unsqueeze(-1)], dim=-1)  # [B, H, R, K, V+1]
    state = state.reshape(batch * heads, columns, value_size + 1)  # [B*H, R*K, V+1]
    group_states, outputs, denominators = [], [], []
    for group in groups:
        q, k, v, r, w, g = (in_chunks(tensor, group, memory.dtype) for tensor in inputs)
        v = _with_ones(v)
        gates = Gates(r, w, g)
        group_states.append(state)
        starts, state = scan(state, gates.decay, expand(gates.write_state, k).transpose(-1, -2) @ v)
        weights = (q @ k.transpose(-1, -2)).mul_(_inside(gates)).tril_()
        sums = causal_product(weights, v) if prepared else weights @ v
        sums = sums + expand(gates.read_state, q) @ starts
        denominator = sums[..., -1:] + eps
        outputs.append(from_chunks(sums[..., :-1] / denominator, heads))
        denominators.append(from_chunks(denominator, heads))
    return _GroupResults(
        groups, torch.cat(outputs, dim=1), torch.cat(denominators, dim=1), torch.stack(group_states), state
    )


class _ChunkedAttention(torch.autograd.Function):
    """Computes `banked_linear_attention` in chunks, with gradients that are written out."""

    @staticmethod
    def forward(ctx, query, key, value, read, write, log_decay, memory, normalizer, length, eps):
        inputs = (query, key, value, read, write, bounded(log_decay, memory.dtype))
        # Being prepared for values that are no numbers takes time. Where the results may be looked at, it is
        # done only if there are such values.
        may_ask = can_look_at(value)
        results = _in_groups(inputs, memory, normalizer, length, eps, prepared=not may_ask)
        # The last token reads every other one, through a product or a state: it tells of all.
        if may_ask and not math.isfinite(results.output[:, -1].sum()):
            results = _in_groups(inputs, memory, normalizer, length, eps, prepared=True)
        output = results.output.to(value.dtype)
        ctx.groups = results.groups
        ctx.save_for_backward(
            query, key, value, read, write, log_decay, output, results.denominator, results.group_states
        )  # fmt: skip
        state = results.state.view(*memory.shape[:-1], memory.shape[-1] + 1)
        return output, state[..., :-1].contiguous(), state[..., -1].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_memory, grad_normalizer):
        with without_autocast(grad_output.device):
            return _ChunkedAttention._backward(ctx, grad_output, grad_memory, grad_normalizer)

    @staticmethod
    def _backward(ctx, grad_output, grad_memory, grad_normalizer):
        query, key, value, read, write, log_decay, output, denominator, group_states = ctx.saved_tensors
        dtype = denominator.dtype
        inputs = (query, key, value, read, write, bounded(log_decay, dtype))
        heads = query.shape[2]
        grad_sums = grad_output.to(dtype) / denominator
        grad_sums = torch.cat([grad_sums, -(grad_sums * output).sum(-1, keepdim=True)], dim=-1)
        grad_state = torch.cat([grad_memory, grad_normalizer.unsqueeze(-1)], dim=-1).view_as(group_states[0])
        grads: list[list[Tensor]] = [[] for _ in range(6)]
        for group, state in zip(reversed(ctx.groups), reversed(group_states.unbind()), strict=True):
            chunks = [in_chunks(x, group, dtype) for x in inputs]
            group_grads, grad_state = _group_backward(
                chunks, state, in_chunks(grad_sums, group, dtype), grad_state
            )
            for collected, grad in zip(grads, group_grads, strict=True):
                collected.append(from_chunks(grad, heads))
        results = [torch.cat(parts[::-1], dim=1) for parts in grads]
        # No gradient passes a wiped memory; the sum has the rounding errors of terms that cancel.
        results[5].masked_fill_(inputs[5] <= NOTHING[dtype], 0.0)
        given = (query, key, value, read, write, log_decay)  # a checkpoint lets tensors be unpacked only once
        results = [grad.to(x.dtype) for grad, x in zip(results, given, strict=True)]
        grad_state = grad_state.view(*grad_memory.shape[:-1], grad_memory.shape[-1] + 1)
        return *results, grad_state[..., :-1], grad_state[..., -1], None, None


def _inside(gates: Gates) -> Tensor:
    """Returns the weight of token j at token i of the same chunk, over all memories, as [B*H, N, C, C].

    Only j <= i has a meaning: the other elements may be infinities or NaN.
    """
    return gates.read_inside @ gates.write_inside.transpose(-1, -2)


def _group_backward(
    chunks: list[Tensor], state: Tensor, grad_sums: Tensor, grad_state: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Computes the gradients of a group's inputs and initial state.

    Args:
        chunks: query, key, value, read, write and log decay of the group, each [B*H, N, C, F].
        state: the state at the start of the group [B*H, R*K, V+1].
        grad_sums: the gradients of numerators and denominators [B*H, N, C, V+1].
        grad_state: the gradient of the state after the group [B*H, R*K, V+1].
    """
    q, k, v, r, w, g = chunks
    v = _with_ones(v)
    gates = Gates(r, w, g)
    read_query, written_key = expand(gates.read_state, q), expand(gates.write_state, k)
    starts, _ = scan(state, gates.decay, written_key.transpose(-1, -2) @ v)
    # From the last chunk to the first: gradients of each chunk's final state and of the group's initial one.
    decay = gates.decay.flip(1)
    grad_ends, grad_state = scan(grad_state, decay, (read_query.transpose(-1, -2) @ grad_sums).flip(1))
    grad_ends = grad_ends.flip(1)

    scores, inside = q @ k.transpose(-1, -2), _inside(gates).tril()
    grad_weights = grad_sums @ v.transpose(-1, -2)
    grad_scores = grad_weights * inside  # `inside` is lower triangular
    grad_inside = (grad_weights * scores).tril()
    grad_read_query = (grad_sums @ starts.transpose(-1, -2)).unflatten(-1, (r.shape[-1], -1))
    grad_written_key = (v @ grad_ends.transpose(-1, -2)).unflatten(-1, (r.shape[-1], -1))

    grad_q = grad_scores @ k + (gates.read_state.unsqueeze(-2) @ grad_read_query).squeeze(-2)
    grad_k = grad_scores.transpose(-1, -2) @ q
    grad_k = grad_k + (gates.write_state.unsqueeze(-2) @ grad_written_key).squeeze(-2)
    grad_v = (scores * inside).transpose(-1, -2) @ grad_sums + written_key @ grad_ends

    grad_read_inside = grad_inside @ gates.write_inside
    grad_write_inside = grad_inside.transpose(-1, -2) @ gates.read_inside
    grad_read_state = (grad_read_query @ q.unsqueeze(-1)).squeeze(-1)
    grad_write_state = (grad_written_key @ k.unsqueeze(-1)).squeeze(-1)
    grad_r = grad_read_inside * gates.from_center + grad_read_state * gates.from_start
    grad_w = grad_write_inside * gates.to_center + grad_write_state * gates.to_end

    # Every exponential is its own derivative; the midpoint cancels.
    leaving = grad_write_state * gates.write_state
    grad_total = grad_r * r - grad_write_inside * gates.write_inside - leaving
    grad_decay = (starts * grad_ends).sum(-1).unflatten(-1, (r.shape[-1], -1)).sum(-1) * gates.decay
    grad_total[..., -1, :] += leaving.sum(-2) + grad_decay
    grad_g = grad_total.flip(-2).cumsum(-2).flip(-2)
    return (grad_q, grad_k, grad_v[..., :-1], grad_r, grad_w, grad_g), grad_state
