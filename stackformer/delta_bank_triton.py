# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The banked delta rule on a GPU: the chunk form of delta_bank.py as Triton kernels, and its gradients.

The mathematics, the letters and the bounds on exponents are those of delta_bank.py. Time is cut into N chunks
of C tokens, each of them one tile. G is the cumulative sum of `log_decay` inside a chunk; the states at the
N + 1 boundaries of chunks are S_0 .. S_N, with gradients dS_0 .. dS_N.

    forward     G; weights and inverse systems of all chunks; errors and S from chunk to chunk; outputs
    backward    G, weights and inverses again; gradients of what tokens write and miss, and dS, from the last
                chunk to the first; those of reads, holds and writes through the states; all others

What goes from chunk to chunk is computed for each block of V by one program, since columns of values never
meet there. It keeps its R states in global memory. The other kernels compute all chunks at once. Saved for
the backward pass are inputs, errors and states at boundaries: N R K V elements per head, and as many
gradients in the backward pass.

All tiles are float32. Their products are TF32 where torch allows it or the inputs are not float32, and as
three TF32 products where not. Triangular systems are solved by substitution, without products.
"""

import re

import torch
from torch import Tensor

# The import is in a `try`, since transformers asks users of remote code to install all other imports.
try:
    import triton
    import triton.language as tl
except ImportError:  # delta_bank.py does not import this module then
    raise

from .delta_bank_cpu import check_call
from .library import check_layout
from .memory_bank_triton import (
    _NOTHING,
    _column,
    _dense,
    _gates,
    _kernel,
    _load,
    _load_gates,
    _load_row,
    _store,
    _tile,
    _total_kernel,
    obstacle,
)

_MAX_CHUNK = 64  # tokens per tile
_MAX_BLOCK = 64  # columns of keys or values per tile


# Kernels. Rows, slots and padding are those of memory_bank_triton.py.


@triton.jit
def _chunk(slot, chunk, time, H: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Returns batch, head, first token and end of a chunk; its tokens, their rows, and which are in it."""
    batch, head = slot // H, slot % H
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, time)
    tokens = start + tl.arange(0, BLOCK)
    return batch, head, start, stop, tokens, (batch * time + tokens) * H + head, tokens < stop


@triton.jit
def _load_tile(pointer, rows, valid, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    return _load(pointer, rows, valid, first, WIDTH, BLOCK).to(tl.float32)


@triton.jit
def _load_column(pointer, rows, valid):
    return tl.load(pointer + rows, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _square(place, BLOCK: tl.constexpr):
    """Returns the offsets of a chunk's tile [BLOCK, BLOCK]."""
    index = tl.arange(0, BLOCK)
    return place * BLOCK * BLOCK + index[:, None] * BLOCK + index[None, :]


@triton.jit
def _causal_product(weights, columns, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Computes lower triangular weights times columns [BLOCK, BLOCK_V].

    A plain product multiplies columns of later tokens by 0, which is NaN where a column is not finite. Such
    values are left out of it, and the results of their own tokens and of later ones are set to NaN.
    """
    index = tl.arange(0, BLOCK)
    is_number = tl.abs(columns) < float("inf")
    lost_from = tl.min(tl.where(is_number, BLOCK, index[:, None]), 0)
    products = tl.dot(weights, tl.where(is_number, columns, 0.0), input_precision=PRECISION)
    return tl.where(index[:, None] >= lost_from[None, :], float("nan"), products)


@triton.jit
def _scores(
    features, other_features, rows, valid, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns the products of a chunk's features with its other features [BLOCK, BLOCK], without a mask."""
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first_k in range(0, K, BLOCK_K):
        own = _load_tile(features, rows, valid, first_k, K, BLOCK_K)
        others = _load_tile(other_features, rows, valid, first_k, K, BLOCK_K)
        products = tl.dot(own, tl.trans(others), products, input_precision=PRECISION)
    return products


@_kernel
def _systems_kernel(
    query, key, read, write, step_size, total, weights, inverse, time, chunks, H: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the weights with which tokens read in their chunk, and (1 + A diag(b))^-1. Grid: B*H*N."""
    slot, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    batch, head, start, stop, tokens, rows, valid = _chunk(slot, chunk, time, H, CHUNK, BLOCK)
    reads, from_center, _ = _gates(
        read, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, False
    )
    writes, to_center, _ = _gates(
        write, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, True
    )
    read_inside, hold_inside, write_inside = reads * from_center, writes * from_center, writes * to_center
    index = tl.arange(0, BLOCK)
    own, other = index[:, None], index[None, :]
    square = _square(slot * chunks + chunk, BLOCK)
    inside = tl.dot(read_inside, tl.trans(write_inside), input_precision=PRECISION)
    inside *= _scores(query, key, rows, valid, K, BLOCK, BLOCK_K, PRECISION)
    tl.store(weights + square, tl.where(own >= other, inside, 0.0))
    holding = tl.dot(hold_inside, tl.trans(write_inside), input_precision=PRECISION)
    holding *= _scores(key, key, rows, valid, K, BLOCK, BLOCK_K, PRECISION)
    # Column i of `system` are the factors of the rows above row i of the inverse. Rows below it, which may be
    # no numbers, take no part.
    steps = _load_column(step_size, rows, valid)
    system = tl.trans(tl.where(own > other, holding * steps[None, :], 0.0))
    solved = tl.where(own == other, 1.0, tl.zeros([BLOCK, BLOCK], tl.float32))
    for row in range(1, stop - start):
        above = tl.where(own < row, _column(system, row)[:, None] * solved, 0.0)
        solved = tl.where(own == row, solved - tl.sum(above, 0)[None, :], solved)
    tl.store(inverse + square, solved)


@_kernel
def _errors_kernel(
    key, value, write, step_size, total, inverse, states, errors, time, chunks, H: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes errors, and states at all boundaries from the first one. Grid: B*H, blocks of V."""
    slot, first_v = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_V
    features = tl.arange(0, BLOCK_K)
    is_key = features < K
    for chunk in range(chunks):
        batch, head, start, stop, tokens, rows, valid = _chunk(slot, chunk, time, H, CHUNK, BLOCK)
        writes, _, from_start = _gates(
            write, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, False
        )
        hold_state = writes * from_start
        writes, _, to_end = _gates(
            write, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, True
        )
        write_state = writes * to_end
        keys = _load_tile(key, rows, valid, 0, K, BLOCK_K)
        missing = _load_tile(value, rows, valid, first_v, V, BLOCK_V)
        place = (slot * (chunks + 1) + chunk) * R * K
        for memory in range(R):
            tile = _load(states, place + memory * K + features, is_key, first_v, V, BLOCK_V)
            held_key = keys * _column(hold_state, memory)[:, None]
            missing = tl.dot(-held_key, tile, missing, input_precision=PRECISION)
        solved = tl.load(inverse + _square(slot * chunks + chunk, BLOCK))
        error = _causal_product(solved, missing, BLOCK, PRECISION)
        _store(errors, rows, valid, first_v, error, V, BLOCK_V)
        change = tl.where(valid[:, None], _load_column(step_size, rows, valid)[:, None] * error, 0.0)
        last = total + ((batch * time + stop - 1) * H + head) * R
        for memory in range(R):
            lines = place + memory * K + features
            tile = _load(states, lines, is_key, first_v, V, BLOCK_V) * tl.exp(tl.load(last + memory))
            written_key = keys * _column(write_state, memory)[:, None]
            tile = tl.dot(tl.trans(written_key), change, tile, input_precision=PRECISION)
            _store(states, lines + R * K, is_key, first_v, tile, V, BLOCK_V)
        tl.debug_barrier()  # the next chunk reads what other threads have stored


@_kernel
def _outputs_kernel(
    query, read, step_size, total, weights, states, errors, output, time, chunks, H: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes outputs. Grid: B*H*N, blocks of V."""
    slot, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    first_v = tl.program_id(1) * BLOCK_V
    batch, head, start, stop, tokens, rows, valid = _chunk(slot, chunk, time, H, CHUNK, BLOCK)
    change = _load(errors, rows, valid, first_v, V, BLOCK_V)
    change *= _load_column(step_size, rows, valid)[:, None]
    inside = tl.load(weights + _square(slot * chunks + chunk, BLOCK))
    sums = _causal_product(inside, change, BLOCK, PRECISION)
    reads, _, from_start = _gates(
        read, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, False
    )
    read_state = reads * from_start
    queries = _load_tile(query, rows, valid, 0, K, BLOCK_K)
    features = tl.arange(0, BLOCK_K)
    lines = (slot * (chunks + 1) + chunk) * R * K + features
    for memory in range(R):
        tile = _load(states, lines + memory * K, features < K, first_v, V, BLOCK_V)
        read_query = queries * _column(read_state, memory)[:, None]
        sums = tl.dot(read_query, tile, sums, input_precision=PRECISION)
    _store(output, rows, valid, first_v, sums, V, BLOCK_V)


@_kernel
def _grad_errors_kernel(
    query, key, read, write, step_size, total, weights, inverse, states, grad_output, grad_changes,
    grad_missings, time, chunks, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes gradients of what tokens write and of what they miss, and those of states from the last one.

    `states` are these gradients at all boundaries. Grid: B*H, blocks of V.
    """
    slot, first_v = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_V
    features = tl.arange(0, BLOCK_K)
    is_key = features < K
    for step in range(chunks):
        chunk = chunks - 1 - step
        batch, head, start, stop, tokens, rows, valid = _chunk(slot, chunk, time, H, CHUNK, BLOCK)
        reads, _, from_start = _gates(
            read, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, False
        )
        writes, _, to_end = _gates(
            write, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, True
        )
        read_state, hold_state, write_state = reads * from_start, writes * from_start, writes * to_end
        keys = _load_tile(key, rows, valid, 0, K, BLOCK_K)
        gradient = _load_tile(grad_output, rows, valid, first_v, V, BLOCK_V)
        square = _square(slot * chunks + chunk, BLOCK)
        grad_change = tl.dot(tl.trans(tl.load(weights + square)), gradient, input_precision=PRECISION)
        place = (slot * (chunks + 1) + chunk + 1) * R * K
        for memory in range(R):
            tile = _load(states, place + memory * K + features, is_key, first_v, V, BLOCK_V)
            written_key = keys * _column(write_state, memory)[:, None]
            grad_change = tl.dot(written_key, tile, grad_change, input_precision=PRECISION)
        _store(grad_changes, rows, valid, first_v, grad_change, V, BLOCK_V)
        grad_error = grad_change * _load_column(step_size, rows, valid)[:, None]
        solved = tl.trans(tl.load(inverse + square))
        grad_missing = tl.dot(solved, grad_error, input_precision=PRECISION)
        _store(grad_missings, rows, valid, first_v, grad_missing, V, BLOCK_V)
        queries = _load_tile(query, rows, valid, 0, K, BLOCK_K)
        last = total + ((batch * time + stop - 1) * H + head) * R
        for memory in range(R):
            lines = place + memory * K + features
            tile = _load(states, lines, is_key, first_v, V, BLOCK_V) * tl.exp(tl.load(last + memory))
            read_query = queries * _column(read_state, memory)[:, None]
            tile = tl.dot(tl.trans(read_query), gradient, tile, input_precision=PRECISION)
            held_key = keys * _column(hold_state, memory)[:, None]
            tile = tl.dot(tl.trans(-held_key), grad_missing, tile, input_precision=PRECISION)
            _store(states, lines - R * K, is_key, first_v, tile, V, BLOCK_V)
        tl.debug_barrier()  # the next chunk reads what other threads have stored


@_kernel
def _grad_states_kernel(
    features, columns, weight, step_size, total, states, other_states, grad_features, grad_weight, inner,
    time, chunks, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WRITES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes gradients, through the states, of features and of their weights times decays.

    Features that read have states at their chunk's beginning, and columns that are gradients of what is read.
    With WRITES, states are gradients at the chunk's end, and columns errors; `inner` [B*H, N, R] becomes the
    inner products of gradients and `other_states`. Grid: B*H*N.
    """
    slot, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    batch, head, start, stop, tokens, rows, valid = _chunk(slot, chunk, time, H, CHUNK, BLOCK)
    weights, _, to_edge = _gates(
        weight, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, WRITES
    )
    weights *= to_edge
    own = _load_tile(features, rows, valid, 0, K, BLOCK_K)
    grad = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    grad_weights = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    keys, memories = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    products = tl.zeros([BLOCK_R], tl.float32)
    lines = (slot * (chunks + 1) + chunk + (1 if WRITES else 0)) * R * K + keys
    for first_v in range(0, V, BLOCK_V):
        column = _load_tile(columns, rows, valid, first_v, V, BLOCK_V)
        if WRITES:
            column *= _load_column(step_size, rows, valid)[:, None]
        for memory in range(R):
            tile = _load(states, lines + memory * K, keys < K, first_v, V, BLOCK_V)
            if WRITES:
                other = _load(other_states, lines + (memory - R) * K, keys < K, first_v, V, BLOCK_V)
                products += tl.where(memories == memory, tl.sum(tile * other), 0.0)
            product = tl.dot(column, tl.trans(tile), input_precision=PRECISION)
            grad += product * _column(weights, memory)[:, None]
            gradient = tl.sum(product * own, 1)
            grad_weights += tl.where(memories[None, :] == memory, gradient[:, None], 0.0)
    _store(grad_features, rows, valid, 0, grad, K, BLOCK_K)
    _store(grad_weight, rows, valid, 0, grad_weights, R, BLOCK_R)
    if WRITES:
        tl.store(inner + (slot * chunks + chunk) * R + memories, products, mask=memories < R)


@_kernel
def _grad_inputs_kernel(
    query, key, read, write, log_decay, step_size, total, errors, grad_output, grad_changes, grad_missings,
    grad_read_query, grad_read_state, grad_held_key, grad_hold_state, grad_written_key, grad_write_state,
    inner, grad_query, grad_key, grad_read, grad_write, grad_decay, grad_step, time, chunks, H: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes gradients of all inputs but the values, from those through the states. Grid: B*H*N.

    As `_group_backward` of delta_bank.py does. Gradients of what is held have the other sign.
    """
    slot, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    batch, head, start, stop, tokens, rows, valid = _chunk(slot, chunk, time, H, CHUNK, BLOCK)
    steps = _load_column(step_size, rows, valid)
    index = tl.arange(0, BLOCK)
    own, other = index[:, None], index[None, :]
    reads, from_center, from_start = _gates(
        read, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, False
    )
    writes, to_center, to_end = _gates(
        write, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, True
    )
    write_inside = writes * to_center
    # Every exponential of the gates is its own derivative; the midpoint cancels.

    # Reads of the output inside the chunk. What is above the diagonal may be infinite.
    grad_weights = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first_v in range(0, V, BLOCK_V):
        error = _load(errors, rows, valid, first_v, V, BLOCK_V)
        gradient = _load_tile(grad_output, rows, valid, first_v, V, BLOCK_V)
        grad_weights = tl.dot(gradient, tl.trans(error), grad_weights, input_precision=PRECISION)
    grad_weights *= steps[None, :]
    scores = _scores(query, key, rows, valid, K, BLOCK, BLOCK_K, PRECISION)
    grad_inside = tl.where(own >= other, grad_weights * scores, 0.0)
    inside = tl.dot(reads * from_center, tl.trans(write_inside), input_precision=PRECISION)
    grad_scores = tl.where(own >= other, grad_weights * inside, 0.0)
    grad_r = tl.dot(grad_inside, write_inside, input_precision=PRECISION) * from_center
    grad_r += _load(grad_read_state, rows, valid, 0, R, BLOCK_R) * from_start
    _store(grad_read, rows, valid, 0, grad_r, R, BLOCK_R)
    grad_inside = tl.dot(tl.trans(grad_inside), reads * from_center, input_precision=PRECISION)
    grad_total = grad_r * reads

    # Reads of what is held, whose gradients are those of what tokens miss, with the other sign.
    grad_steps = tl.zeros([BLOCK], tl.float32)
    met = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first_v in range(0, V, BLOCK_V):
        error = _load(errors, rows, valid, first_v, V, BLOCK_V)
        grad_steps += tl.sum(_load(grad_changes, rows, valid, first_v, V, BLOCK_V) * error, 1)
        gradient = _load(grad_missings, rows, valid, first_v, V, BLOCK_V)
        met = tl.dot(gradient, tl.trans(error), met, input_precision=PRECISION)
    scores = _scores(key, key, rows, valid, K, BLOCK, BLOCK_K, PRECISION)
    grad_holding = tl.where(own > other, -met * scores, 0.0)
    inside = tl.dot(writes * from_center, tl.trans(write_inside), input_precision=PRECISION)
    grad_steps += tl.sum(tl.where(own > other, grad_holding * inside, 0.0), 0)
    tl.store(grad_step + rows, grad_steps.to(grad_step.dtype.element_ty), mask=valid)
    grad_key_scores = tl.where(own > other, -met * steps[None, :] * inside, 0.0)
    grad_holding *= steps[None, :]
    grad_hold = tl.dot(grad_holding, write_inside, input_precision=PRECISION) * from_center
    grad_hold -= _load(grad_hold_state, rows, valid, 0, R, BLOCK_R) * from_start
    grad_inside = tl.dot(tl.trans(grad_holding), writes * from_center, grad_inside, input_precision=PRECISION)
    grad_total += grad_hold * writes

    # Writes and decays.
    grad_end = _load(grad_write_state, rows, valid, 0, R, BLOCK_R) * to_end
    _store(grad_write, rows, valid, 0, grad_hold + grad_inside * to_center + grad_end, R, BLOCK_R)
    leaving = grad_end * writes
    grad_total -= grad_inside * write_inside + leaving
    last = (batch * time + stop - 1) * H + head
    kept = _load_row(inner, slot * chunks + chunk, R, BLOCK_R) * tl.exp(_load_row(total, last, R, BLOCK_R))
    gradient = tl.cumsum(grad_total, 0, reverse=True) + (tl.sum(leaving, 0) + kept)[None, :]
    # No gradient passes a wiped memory; the sum has the rounding errors of terms that cancel.
    decays = _load_gates(log_decay, rows, valid, R, BLOCK_R)
    gradient = tl.where(decays <= _NOTHING, 0.0, gradient)
    _store(grad_decay, rows, valid, 0, gradient, R, BLOCK_R)

    # Queries and keys.
    grad_key_scores += tl.trans(grad_key_scores)
    for first_k in range(0, K, BLOCK_K):
        keys = _load_tile(key, rows, valid, first_k, K, BLOCK_K)
        grad = _load(grad_read_query, rows, valid, first_k, K, BLOCK_K)
        grad = tl.dot(grad_scores, keys, grad, input_precision=PRECISION)
        _store(grad_query, rows, valid, first_k, grad, K, BLOCK_K)
        grad = _load(grad_written_key, rows, valid, first_k, K, BLOCK_K)
        grad -= _load(grad_held_key, rows, valid, first_k, K, BLOCK_K)
        grad = tl.dot(grad_key_scores, keys, grad, input_precision=PRECISION)
        queries = _load_tile(query, rows, valid, first_k, K, BLOCK_K)
        grad = tl.dot(tl.trans(grad_scores), queries, grad, input_precision=PRECISION)
        _store(grad_key, rows, valid, first_k, grad, K, BLOCK_K)


# Launches.


class _Plan:
    """Sizes, tiles and precision of one call, and the launches that forward and backward share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, read: Tensor, chunk_size: int):
        self.batch, self.time, self.heads, self.key_size = query.shape
        self.value_size, self.memories = value.shape[-1], read.shape[-1]
        self.slots = self.batch * self.heads
        chunk = chunk_length(min(chunk_size, triton.next_power_of_2(self.time)), query, key, value, read)
        self.chunks = triton.cdiv(self.time, chunk)
        exact = _is_float32(query, key, value) and not torch.backends.cuda.matmul.allow_tf32
        self.gates = {"H": self.heads, "R": self.memories, "CHUNK": chunk, "BLOCK_R": _tile(self.memories)}
        wide = _is_wide(query, value, read)
        # Of kernels that take keys in blocks, and of those that take them whole, as lines of states.
        self.keys = {
            **self.gates,
            "K": self.key_size,
            "BLOCK": max(16, chunk),
            "BLOCK_K": min(_tile(self.key_size), _MAX_BLOCK),
            "PRECISION": "tf32x3" if exact else "tf32",
            "num_warps": 8 if wide else 4,
            # States are stored and loaded by one kernel: no load may be early.
            "num_stages": 1,
        }
        block_v = min(_tile(self.value_size), _MAX_BLOCK)
        self.values = {**self.keys, "V": self.value_size, "BLOCK_V": block_v, "num_warps": 8}
        self.sizes = {**self.values, "BLOCK_K": _tile(self.key_size), "num_warps": self.keys["num_warps"]}
        self.per_chunk = (self.slots * self.chunks,)
        self.blocks = triton.cdiv(self.value_size, block_v)

    def states(self, like: Tensor) -> Tensor:
        """Returns room for the states at all boundaries, with values like `like` [B, H, R, K, V]."""
        return like.new_empty(*like.shape[:2], self.chunks + 1, *like.shape[2:], dtype=torch.float32)

    def systems(self, query, key, read, write, log_decay, step_size) -> tuple[Tensor, Tensor, Tensor]:
        """Returns G [B, T, H, R], and weights and inverse systems [B*H, N, BLOCK, BLOCK]."""
        total = torch.empty_like(log_decay, dtype=torch.float32)
        block = int(self.keys["BLOCK"])
        _total_kernel[self.per_chunk](log_decay, total, self.time, self.chunks, **self.gates)
        weights = total.new_empty(self.slots, self.chunks, block, block)
        inverse = torch.empty_like(weights)
        _systems_kernel[self.per_chunk](
            query, key, read, write, step_size, total, weights, inverse, self.time, self.chunks, **self.keys
        )
        return total, weights, inverse

    def through_states(self, features, columns, weight, step_size, total, states, others=None):
        """Returns the gradients of features [B, T, H, K] and weights [B, T, H, R], and the inner products.

        With `others`, features are written, and inner products are those with `others`.
        """
        grads = tuple(torch.empty_like(x, dtype=torch.float32) for x in (features, weight))
        inner = total.new_empty(self.slots, self.chunks, self.memories)
        _grad_states_kernel[self.per_chunk](
            features, columns, weight, step_size, total, states, states if others is None else others, *grads,
            inner, self.time, self.chunks, **self.sizes, WRITES=others is not None,
        )  # fmt: skip
        return grads, inner


def chunk_length(chunk_size: int, query: Tensor, key: Tensor, value: Tensor, read: Tensor) -> int:
    """Returns the tokens per chunk for up to `chunk_size`: a power of two, as long as the tiles allow."""
    large = _is_float32(query, key, value) or _is_wide(query, value, read)
    longest = _MAX_CHUNK // 2 if large else _MAX_CHUNK
    return 1 << (min(chunk_size, longest).bit_length() - 1)


def _is_float32(*tensors: Tensor) -> bool:
    return torch.float32 in {tensor.dtype for tensor in tensors}


def _is_wide(query: Tensor, value: Tensor, read: Tensor) -> bool:
    """Returns whether tiles of a chunk are too wide to keep many of them in registers."""
    return max(query.shape[-1], value.shape[-1]) > 64 or read.shape[-1] > 32


# Operators of torch, so that torch.compile takes them as they are and torch knows their gradients. Named
# after this module: code that came with a model from the Hub registers its own beside the package's.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    memory: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns output and errors [B, T, H, V], final memory, and memories at boundaries [B, H, N + 1, ...]."""
    inputs = (query, key, value, read, write, log_decay, step_size)
    check_call(inputs, memory, chunk_size)
    query, key, value, read, write, log_decay, step_size = _dense(*inputs)
    plan = _Plan(query, key, value, read, chunk_size)
    output, errors = torch.empty_like(value), torch.empty_like(value, dtype=torch.float32)
    states = plan.states(memory)
    states[:, :, 0] = memory
    with torch.cuda.device_of(query):
        total, weights, inverse = plan.systems(query, key, read, write, log_decay, step_size)
        _errors_kernel[plan.slots, plan.blocks](
            key, value, write, step_size, total, inverse, states, errors, plan.time, plan.chunks, **plan.sizes
        )
        _outputs_kernel[(*plan.per_chunk, plan.blocks)](
            query, read, step_size, total, weights, states, errors, output, plan.time, plan.chunks,
            **plan.sizes,
        )  # fmt: skip
    return output, errors, states[:, :, -1].clone(), states


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    errors: Tensor,
    states: Tensor,
    grad_output: Tensor,
    grad_memory: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of the first seven arguments and of the initial memory."""
    inputs = (query, key, value, read, write, log_decay, step_size)
    _check_backward(inputs, errors, states, grad_output, grad_memory, chunk_size)
    query, key, value, read, write, log_decay, step_size = _dense(*inputs)
    errors, states, grad_output = _dense(errors, states, grad_output)
    plan = _Plan(query, key, value, read, chunk_size)
    grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
    grad_read, grad_write, grad_decay, grad_step = (
        torch.empty_like(x) for x in (read, write, log_decay, step_size)
    )
    grad_changes, grad_missings = torch.empty_like(errors), torch.empty_like(errors)
    grad_states = plan.states(grad_memory)
    grad_states[:, :, -1] = grad_memory
    with torch.cuda.device_of(query):
        total, weights, inverse = plan.systems(query, key, read, write, log_decay, step_size)
        _grad_errors_kernel[plan.slots, plan.blocks](
            query, key, read, write, step_size, total, weights, inverse, grad_states, grad_output,
            grad_changes, grad_missings, plan.time, plan.chunks, **plan.sizes,
        )  # fmt: skip
        reading, _ = plan.through_states(query, grad_output, read, step_size, total, states)
        holding, _ = plan.through_states(key, grad_missings, write, step_size, total, states)
        writing, inner = plan.through_states(key, errors, write, step_size, total, grad_states, others=states)
        _grad_inputs_kernel[plan.per_chunk](
            query, key, read, write, log_decay, step_size, total, errors, grad_output, grad_changes,
            grad_missings, *reading, *holding, *writing, inner, grad_query, grad_key, grad_read, grad_write,
            grad_decay, grad_step, plan.time, plan.chunks, **plan.values,
        )  # fmt: skip
    grad_value = grad_missings if value.dtype == torch.float32 else grad_missings.to(value.dtype)
    grad_gates = grad_read, grad_write, grad_decay, grad_step
    return grad_query, grad_key, grad_value, *grad_gates, grad_states[:, :, 0].clone()


def _check_backward(inputs, errors, states, grad_output, grad_memory, chunk_size: int) -> None:
    """Raises a ValueError unless the tensors of the backward pass go together: kernels follow any pointer."""
    check_call(inputs, grad_memory, chunk_size, prefix="grad_")
    query, key, value, read = inputs[:4]
    chunks = _Plan(query, key, value, read, chunk_size).chunks
    boundaries = (*grad_memory.shape[:2], chunks + 1, *grad_memory.shape[2:])
    names, tensors = ("errors", "states", "grad_output"), (errors, states, grad_output)
    shapes = (value.shape, boundaries, value.shape)
    check_layout(query.device, zip(names, tensors, shapes, strict=True))
    for name, tensor in (("errors", errors), ("states", states)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"`{name}` must be torch.float32, got {tensor.dtype}")


@_forward.register_fake
def _(query, key, value, read, write, log_decay, step_size, memory, chunk_size):
    check_call((query, key, value, read, write, log_decay, step_size), memory, chunk_size)
    plan = _Plan(query, key, value, read, chunk_size)
    errors = value.new_empty(value.shape, dtype=torch.float32)
    final = memory.new_empty(memory.shape, dtype=torch.float32)
    return value.new_empty(value.shape), errors, final, plan.states(memory)


@_backward.register_fake
def _(*arguments):
    *inputs, errors, states, grad_output, grad_memory, chunk_size = arguments
    _check_backward(inputs, errors, states, grad_output, grad_memory, chunk_size)
    grad_initial = grad_memory.new_empty(grad_memory.shape, dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in inputs), grad_initial


def _keep(ctx, inputs, output):
    *tensors, memory, ctx.chunk_size = inputs
    _, errors, _, states = output
    ctx.save_for_backward(*tensors, errors, states)
    # States are large: no zeros are made for the gradients of those that are saved.
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, _grad_errors, grad_memory, _grad_states):
    *inputs, errors, states = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(inputs[2])
    if grad_memory is None:
        grad_memory = torch.zeros_like(states[:, :, 0])
    return *_backward(*inputs, errors, states, grad_output, grad_memory, ctx.chunk_size), None


_forward.register_autograd(_differentiate, setup_context=_keep)


def chunked_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    memory: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Computes `banked_delta_rule` for inputs without an `obstacle`, in chunks of at most `chunk_size`.

    Args:
        query, key: [B, T, H, K]; value: [B, T, H, V]; read, write, log_decay: [B, T, H, R]; step_size:
            [B, T, H].
        memory: the initial state [B, H, R, K, V], float32.
        chunk_size: as short as the decay demands; rounded down as by `chunk_length`.

    Returns:
        The output [B, T, H, V] in the dtype of `value`, and the final memory.
    """
    output, _, memory, _ = _forward(
        query, key, value, read, write, log_decay, step_size, memory, chunk_size
    )  # fmt: skip
    return output, memory


__all__ = ["chunk_length", "chunked_delta_rule", "obstacle"]
