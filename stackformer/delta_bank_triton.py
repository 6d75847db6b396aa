# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The banked delta rule on a GPU: the chunk form of delta_bank.py as Triton kernels, and its gradients.

The mathematics, the letters and the bounds on exponents are those of delta_bank.py. Time is cut into N chunks
of C tokens, each of them one tile. G is the cumulative sum of `log_decay` inside a chunk; the states at the
N + 1 boundaries of chunks are S_0 .. S_N, with gradients dS_0 .. dS_N.

    forward     G; weights and inverse systems of all chunks; errors and S from chunk to chunk; outputs
    backward    G, weights and inverses again; gradients of what tokens write and miss, and dS, from the last
                chunk to the first; all other gradients, chunk by chunk

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
_MAX_BLOCK = 64  # columns of values per tile


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
def _inside(
    queries, keys, read_inside, hold_inside, write_inside, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """Returns four tiles [BLOCK, BLOCK] without a mask: scores, their gates, scores of keys, and their gates.

    Gates are the sums over memories of weights and decays, from a token that reads to one that writes.
    """
    theirs, other = tl.trans(keys), tl.trans(write_inside)
    scores = tl.dot(queries, theirs, input_precision=PRECISION)
    inside = tl.dot(read_inside, other, input_precision=PRECISION)
    key_scores = tl.dot(keys, theirs, input_precision=PRECISION)
    holding = tl.dot(hold_inside, other, input_precision=PRECISION)
    return scores, inside, key_scores, holding


@_kernel
def _systems_kernel(
    query, key, read, write, step_size, total, weights, inverse, time, chunks, H: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the weights with which a chunk's tokens read, and the inverse of 1 + A diag(b). Grid: B*H*N."""
    slot, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    batch, head, start, stop, tokens, rows, valid = _chunk(slot, chunk, time, H, CHUNK, BLOCK)
    reads, from_center, _ = _gates(
        read, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, False
    )
    writes, to_center, _ = _gates(
        write, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, True
    )
    scores, inside, key_scores, holding = _inside(
        _load_tile(query, rows, valid, 0, K, BLOCK_K), _load_tile(key, rows, valid, 0, K, BLOCK_K),
        reads * from_center, writes * from_center, writes * to_center, BLOCK, PRECISION,
    )  # fmt: skip
    index = tl.arange(0, BLOCK)
    own, other = index[:, None], index[None, :]
    square = _square(slot * chunks + chunk, BLOCK)
    tl.store(weights + square, tl.where(own >= other, scores * inside, 0.0))
    # Column i of `system` are the factors of the rows above row i of the inverse. Rows below it, which may be
    # no numbers, take no part.
    steps = _load_column(step_size, rows, valid)
    system = tl.trans(tl.where(own > other, key_scores * holding * steps[None, :], 0.0))
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
def _grad_inputs_kernel(
    query, key, read, write, log_decay, step_size, total, states, grad_states, errors, grad_output,
    grad_changes, grad_missings, grad_query, grad_key, grad_read, grad_write, grad_decay, grad_step, time,
    chunks, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes gradients of all inputs but the values, as `_group_backward` of delta_bank.py. Grid: B*H*N."""
    slot, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    batch, head, start, stop, tokens, rows, valid = _chunk(slot, chunk, time, H, CHUNK, BLOCK)
    reads, from_center, from_start = _gates(
        read, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, False
    )
    writes, to_center, to_end = _gates(
        write, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, True
    )
    queries = _load_tile(query, rows, valid, 0, K, BLOCK_K)
    keys = _load_tile(key, rows, valid, 0, K, BLOCK_K)
    steps = _load_column(step_size, rows, valid)
    decay = tl.exp(_load_row(total, (batch * time + stop - 1) * H + head, R, BLOCK_R))

    # Through the states.
    read_state, hold_state, write_state = reads * from_start, writes * from_start, writes * to_end
    grad_q, grad_k = tl.zeros([BLOCK, BLOCK_K], tl.float32), tl.zeros([BLOCK, BLOCK_K], tl.float32)
    grad_weights, met = tl.zeros([BLOCK, BLOCK], tl.float32), tl.zeros([BLOCK, BLOCK], tl.float32)
    grad_read_state = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    grad_hold_state = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    grad_write_state = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    grad_steps = tl.zeros([BLOCK], tl.float32)
    inner = tl.zeros([BLOCK_R], tl.float32)
    features, memories = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    lines = (slot * (chunks + 1) + chunk) * R * K + features
    for first_v in range(0, V, BLOCK_V):
        gradient = _load_tile(grad_output, rows, valid, first_v, V, BLOCK_V)
        grad_missing = _load(grad_missings, rows, valid, first_v, V, BLOCK_V)
        error = _load(errors, rows, valid, first_v, V, BLOCK_V)
        change = steps[:, None] * error
        grad_steps += tl.sum(_load(grad_changes, rows, valid, first_v, V, BLOCK_V) * error, 1)
        grad_weights = tl.dot(gradient, tl.trans(change), grad_weights, input_precision=PRECISION)
        met = tl.dot(grad_missing, tl.trans(error), met, input_precision=PRECISION)
        for memory in range(R):
            is_memory = memories[None, :] == memory
            tile = _load(states, lines + memory * K, features < K, first_v, V, BLOCK_V)
            grad_tile = _load(grad_states, lines + (R + memory) * K, features < K, first_v, V, BLOCK_V)
            inner += tl.where(memories == memory, tl.sum(tile * grad_tile), 0.0)
            tile = tl.trans(tile)
            product = tl.dot(gradient, tile, input_precision=PRECISION)
            grad_q += product * _column(read_state, memory)[:, None]
            grad_read_state += tl.where(is_memory, tl.sum(product * queries, 1)[:, None], 0.0)
            product = -tl.dot(grad_missing, tile, input_precision=PRECISION)
            grad_k += product * _column(hold_state, memory)[:, None]
            grad_hold_state += tl.where(is_memory, tl.sum(product * keys, 1)[:, None], 0.0)
            product = tl.dot(change, tl.trans(grad_tile), input_precision=PRECISION)
            grad_k += product * _column(write_state, memory)[:, None]
            grad_write_state += tl.where(is_memory, tl.sum(product * keys, 1)[:, None], 0.0)

    # Inside the chunk: reads of the output, and of what is held.
    read_inside, hold_inside, write_inside = reads * from_center, writes * from_center, writes * to_center
    scores, inside, key_scores, holding = _inside(
        queries, keys, read_inside, hold_inside, write_inside, BLOCK, PRECISION
    )
    index = tl.arange(0, BLOCK)
    own, other = index[:, None], index[None, :]
    grad_weights = tl.where(own >= other, grad_weights, 0.0)
    met = tl.where(own > other, met, 0.0)
    grad_steps -= tl.sum(met * key_scores * holding, 0)
    grad_system = -met * steps[None, :]
    grad_scores, grad_inside = grad_weights * inside, grad_weights * scores
    grad_key_scores, grad_holding = grad_system * holding, grad_system * key_scores
    grad_q = tl.dot(grad_scores, keys, grad_q, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(grad_scores), queries, grad_k, input_precision=PRECISION)
    grad_key_scores += tl.trans(grad_key_scores)
    grad_k = tl.dot(grad_key_scores, keys, grad_k, input_precision=PRECISION)
    _store(grad_query, rows, valid, 0, grad_q, K, BLOCK_K)
    _store(grad_key, rows, valid, 0, grad_k, K, BLOCK_K)
    tl.store(grad_step + rows, grad_steps.to(grad_step.dtype.element_ty), mask=valid)

    # Gates: every exponential is its own derivative; the midpoint cancels.
    grad_write_inside = tl.dot(tl.trans(grad_inside), read_inside, input_precision=PRECISION)
    grad_write_inside = tl.dot(
        tl.trans(grad_holding), hold_inside, grad_write_inside, input_precision=PRECISION
    )
    grad_r = tl.dot(grad_inside, write_inside, input_precision=PRECISION) * from_center
    grad_r += grad_read_state * from_start
    grad_hold = tl.dot(grad_holding, write_inside, input_precision=PRECISION) * from_center
    grad_hold += grad_hold_state * from_start
    grad_w = grad_hold + grad_write_inside * to_center + grad_write_state * to_end
    _store(grad_read, rows, valid, 0, grad_r, R, BLOCK_R)
    _store(grad_write, rows, valid, 0, grad_w, R, BLOCK_R)
    leaving = grad_write_state * write_state
    gradient = grad_r * reads + grad_hold * writes - grad_write_inside * write_inside - leaving
    gradient = tl.cumsum(gradient, 0, reverse=True) + (tl.sum(leaving, 0) + inner * decay)[None, :]
    # No gradient passes a wiped memory; the sum has the rounding errors of terms that cancel.
    decays = _load_gates(log_decay, rows, valid, R, BLOCK_R)
    gradient = tl.where(decays <= _NOTHING, 0.0, gradient)
    _store(grad_decay, rows, valid, 0, gradient, R, BLOCK_R)


# Launches.


class _Plan:
    """Sizes, tiles and precision of one call, and the launches that forward and backward share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, read: Tensor, chunk_size: int):
        self.batch, self.time, self.heads, self.key_size = query.shape
        self.value_size, self.memories = value.shape[-1], read.shape[-1]
        self.slots = self.batch * self.heads
        chunk = chunk_length(min(chunk_size, triton.next_power_of_2(self.time)), query, value, read)
        self.chunks = triton.cdiv(self.time, chunk)
        exact = torch.float32 in {x.dtype for x in (query, key, value)}
        exact = exact and not torch.backends.cuda.matmul.allow_tf32
        self.gates = {"H": self.heads, "R": self.memories, "CHUNK": chunk, "BLOCK_R": _tile(self.memories)}
        self.keys = {
            **self.gates,
            "K": self.key_size,
            "BLOCK": max(16, chunk),
            "BLOCK_K": _tile(self.key_size),
            "PRECISION": "tf32x3" if exact else "tf32",
            "num_warps": 8 if _is_wide(query, value, read) else 4,
            # States are stored and loaded by one kernel: no load may be early.
            "num_stages": 1,
        }
        block_v = min(_tile(self.value_size), _MAX_BLOCK)
        self.sizes = {**self.keys, "V": self.value_size, "BLOCK_V": block_v}
        self.per_chunk = (self.slots * self.chunks,)
        self.blocks = triton.cdiv(self.value_size, block_v)

    def states(self, like: Tensor) -> Tensor:
        """Returns room for the states at all boundaries, with values like `like` [B, H, R, K, V]."""
        return like.new_empty(*like.shape[:2], self.chunks + 1, *like.shape[2:], dtype=torch.float32)

    def systems(self, query, key, read, write, log_decay, step_size) -> tuple[Tensor, Tensor, Tensor]:
        """Returns G [B, T, H, R], and weights and inverse systems [B*H, N, BLOCK, BLOCK]."""
        total = torch.empty_like(log_decay, dtype=torch.float32)
        _total_kernel[self.per_chunk](log_decay, total, self.time, self.chunks, **self.gates)
        block = self.keys["BLOCK"]
        weights = total.new_empty(self.slots, self.chunks, block, block)
        inverse = torch.empty_like(weights)
        _systems_kernel[self.per_chunk](
            query, key, read, write, step_size, total, weights, inverse, self.time, self.chunks, **self.keys
        )
        return total, weights, inverse


def chunk_length(chunk_size: int, query: Tensor, value: Tensor, read: Tensor) -> int:
    """Returns the tokens per chunk for up to `chunk_size`: a power of two, as long as the tiles allow."""
    longest = _MAX_CHUNK // 2 if _is_wide(query, value, read) else _MAX_CHUNK
    return 1 << (min(chunk_size, longest).bit_length() - 1)


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
    return output, errors, states[:, :, -1].contiguous().clone(), states


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
    query, key, value, read, write, log_decay, step_size = inputs = _dense(*inputs)
    errors, states, grad_output = _dense(errors, states, grad_output)
    plan = _Plan(query, key, value, read, chunk_size)
    grad_query, grad_key, _, *grad_gates = (torch.empty_like(x) for x in inputs)
    grad_changes, grad_missings = torch.empty_like(errors), torch.empty_like(errors)
    grad_states = plan.states(grad_memory)
    grad_states[:, :, -1] = grad_memory
    with torch.cuda.device_of(query):
        total, weights, inverse = plan.systems(query, key, read, write, log_decay, step_size)
        _grad_errors_kernel[plan.slots, plan.blocks](
            query, key, read, write, step_size, total, weights, inverse, grad_states, grad_output,
            grad_changes, grad_missings, plan.time, plan.chunks, **plan.sizes,
        )  # fmt: skip
        _grad_inputs_kernel[plan.per_chunk](
            query, key, read, write, log_decay, step_size, total, states, grad_states, errors, grad_output,
            grad_changes, grad_missings, grad_query, grad_key, *grad_gates, plan.time, plan.chunks,
            **plan.sizes,
        )  # fmt: skip
    grad_value = grad_missings if value.dtype == torch.float32 else grad_missings.to(value.dtype)
    return grad_query, grad_key, grad_value, *grad_gates, grad_states[:, :, 0].contiguous().clone()


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
