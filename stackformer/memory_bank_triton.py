# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Banked linear attention on a GPU: the chunk form of memory_bank.py as Triton kernels, and its gradients.

The mathematics, the letters and the bounds on exponents are those of memory_bank.py. Time is cut into N chunks
of C tokens, and chunks into blocks of at most 64. G is the cumulative sum of `log_decay` inside a chunk; the
states at the N + 1 boundaries of chunks are M_0 .. M_N, and those of the normalizer z_0 .. z_N.

    forward     G; M by a scan over chunks, parallel over B, H, R and blocks of K and V;
                outputs, parallel over blocks of tokens
    backward    M again; dM by the same scan from the end, which also takes <M_n, dM_n>;
                gradients of query and read, parallel over blocks of the tokens that read;
                gradients of key, value and write, parallel over blocks of the tokens that are read;
                gradients of the decay, from the others:

    sum over i >= t in the chunk of (read_im dread_im - write_im dwrite_im) + <M_nm, dM_nm> + <z_nm, dz_nm>

with n the boundary at the chunk's end: a decay scales all that was there before it, so its gradient is what
later reads take from it, less what was written later, and what the chunk leaves.

Inside a chunk, the product of queries and keys is taken once for all memories; keys expanded to R*K and states
per token exist nowhere. The normalizer is a vector beside each matrix, not one more column of it. Saved for
the backward pass are the inputs, the outputs and the initial state; the states at the boundaries are work
space of N R K V elements per head in each pass, twice that in the backward pass.

Products take bfloat16 operands for bfloat16 inputs, and else float32 ones: as TF32 where torch allows it or
the inputs are float16 (whose digits TF32 has, with float32's range), as three TF32 products where not.
Gates, decays, sums and the states that are handed on are float32.
"""

import re

import torch
from torch import Tensor

# In a `try`, since transformers asks the users of remote code to install whatever is imported elsewhere.
try:
    import triton
    import triton.language as tl
except ImportError:  # memory_bank.py does not import this module then
    raise

# With TRITON_INTERPRET=1 kernels run on the CPU, in NumPy.
INTERPRETED = triton.knobs.runtime.interpret
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_FEATURES = 128  # K and V: tiles of [64, K], [64, V] and [K, V] share one multiprocessor's memory
_MAX_MEMORIES = 128
_MAX_BLOCK = 64  # tokens per tile
_MAX_CHUNK = 256  # gates [C, R] are one tile of the cumulative sums


def unsupported(query: Tensor, key: Tensor, value: Tensor, read: Tensor) -> str | None:
    """Why these inputs of `banked_linear_attention` are none for the kernels; `None` if they are."""
    if not (query.is_cuda or INTERPRETED):
        return f"tensors must be on a CUDA device, not on {query.device}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in _DTYPES:
            return f"`{name}` must be float32, bfloat16 or float16, not {tensor.dtype}"
    if max(query.shape[-1], value.shape[-1]) > _MAX_FEATURES:
        return f"key and value sizes must be at most {_MAX_FEATURES}, not {query.shape[-1]}, {value.shape[-1]}"
    if read.shape[-1] > _MAX_MEMORIES:
        return f"there must be at most {_MAX_MEMORIES} memories per head, not {read.shape[-1]}"
    return None


# Kernels. A "row" is a token of a head in a contiguous [B, T, H, ...], or a line of a state in [..., K, V]; tiles
# are padded to powers of two, with zeros that change no sum.


@triton.jit
def _load(pointer, rows, valid, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns `first` to `first + BLOCK` of rows of WIDTH elements [rows, BLOCK]; zeros where there are none."""
    columns = first + tl.arange(0, BLOCK)
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, rows, valid, first, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = first + tl.arange(0, BLOCK)
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointer + rows[:, None] * WIDTH + columns[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_gates(pointer, rows, valid, R: tl.constexpr, BLOCK_R: tl.constexpr):
    return _load(pointer, rows, valid, 0, R, BLOCK_R).to(tl.float32)


@triton.jit
def _load_total(total, batch, head, tokens, stop, time, H: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """G; after the chunk's last token what it is there, which keeps exponents small for tokens that are none."""
    rows = (batch * time + tl.minimum(tokens, stop - 1)) * H + head
    return _load(total, rows, tokens >= 0, 0, R, BLOCK_R)


@triton.jit
def _load_row(pointer, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row [BLOCK]."""
    columns = tl.arange(0, BLOCK)
    return tl.load(pointer + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)


@triton.jit
def _column(tile, index):
    """Column `index` [rows] of a tile [rows, columns] in registers."""
    columns = tl.arange(0, tile.shape[1])
    return tl.sum(tl.where(columns[None, :] == index, tile, 0.0), 1)


@triton.jit
def _center(total, batch, head, start, stop, time, H: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The chunk's midpoint of G, and its end [BLOCK_R]."""
    first = _load_row(total, (batch * time + start) * H + head, R, BLOCK_R)
    last = _load_row(total, (batch * time + stop - 1) * H + head, R, BLOCK_R)
    return (first + last) / 2, last


@triton.jit
def _total_kernel(
    log_decay, total, time, H: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """G. Grid: chunks, B*H."""
    batch, head = tl.program_id(1).to(tl.int64) // H, tl.program_id(1) % H
    tokens = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    rows, valid = (batch * time + tokens) * H + head, tokens < time
    gates = _load_gates(log_decay, rows, valid, R, BLOCK_R)
    _store(total, rows, valid, 0, tl.cumsum(gates, 0), R, BLOCK_R)


@triton.jit
def _scan_kernel(
    features, columns, extra, weight, total, state, vector, states, vectors, final_state, final_vector,
    other_states, other_vectors, inner, time, chunks, heads, H: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States [K, V] and vectors [K] of one memory at all boundaries of chunks, handed on from chunk to chunk.

    Forward, features and columns are keys and values, weighted with what was written and lasts to the end of
    the chunk; with REVERSE, they are queries and gradients of the sums, weighted with what is read of the
    chunk's beginning, `extra` are the gradients of the denominators, and `inner` [parts, B*H, N, R] becomes
    parts of the inner products with `other_states` and `other_vectors`. Grid: B*H*R, blocks of K, blocks of V.
    """
    slot, memory = tl.program_id(0).to(tl.int64) // R, tl.program_id(0) % R
    batch, head = slot // H, slot % H
    first_k, first_v = tl.program_id(1) * BLOCK_K, tl.program_id(2) * BLOCK_V
    keys = first_k + tl.arange(0, BLOCK_K)
    is_key = keys < K
    has_vector = keys < tl.where(first_v == 0, K, 0)  # those of the first block of V
    part = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    lines = (slot * R + memory) * K + keys
    tile = _load(state, lines, is_key, first_v, V, BLOCK_V).to(tl.float32)
    line = tl.load(vector + lines, mask=has_vector, other=0.0).to(tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        boundary = chunk + 1 if REVERSE else chunk
        places = ((slot * (chunks + 1) + boundary) * R + memory) * K + keys
        _store(states, places, is_key, first_v, tile, V, BLOCK_V)
        tl.store(vectors + places, line, mask=has_vector)
        if REVERSE:
            other_tile = _load(other_states, places, is_key, first_v, V, BLOCK_V).to(tl.float32)
            other_line = tl.load(other_vectors + places, mask=has_vector, other=0.0)
            product = tl.sum(tl.sum(tile * other_tile, 1) + line * other_line, 0)
            tl.store(inner + ((part * heads + slot) * chunks + chunk) * R + memory, product)
        start = chunk * CHUNK
        stop = tl.minimum(start + CHUNK, time)
        last = tl.load(total + ((batch * time + stop - 1) * H + head) * R + memory)
        tile *= tl.exp(last)
        line *= tl.exp(last)
        for block in range(0, CHUNK, BLOCK):
            tokens = start + block + tl.arange(0, BLOCK)
            rows, valid = (batch * time + tokens) * H + head, tokens < stop
            cells = rows * R + memory
            weights = tl.load(weight + cells, mask=valid, other=0.0).to(tl.float32)
            gates = tl.load(total + cells, mask=valid, other=0.0)
            weights *= tl.exp(gates if REVERSE else last - gates)
            values = _load(columns, rows, valid, first_v, V, BLOCK_V).to(states.dtype.element_ty)
            weighted = _load(features, rows, valid, first_k, K, BLOCK_K).to(tl.float32) * weights[:, None]
            tile = tl.dot(tl.trans(weighted.to(values.dtype)), values, tile, input_precision=PRECISION)
            if REVERSE:
                weighted *= tl.load(extra + rows, mask=valid, other=0.0)[:, None]
            line += tl.sum(weighted, 0)
    boundary = 0 if REVERSE else chunks
    places = ((slot * (chunks + 1) + boundary) * R + memory) * K + keys
    _store(states, places, is_key, first_v, tile, V, BLOCK_V)
    tl.store(vectors + places, line, mask=has_vector)
    _store(final_state, lines, is_key, first_v, tile, V, BLOCK_V)
    tl.store(final_vector + lines, line, mask=has_vector)


@triton.jit
def _output_kernel(
    query, key, value, read, write, total, states, vectors, output, denominator, eps, time, chunks,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and denominators of a block of tokens. Grid: blocks of tokens, B*H."""
    PER_CHUNK: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    dtype = states.dtype.element_ty
    chunk, block = tl.program_id(0) // PER_CHUNK, tl.program_id(0) % PER_CHUNK
    slot = tl.program_id(1).to(tl.int64)
    batch, head = slot // H, slot % H
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, time)
    center, _ = _center(total, batch, head, start, stop, time, H, R, BLOCK_R)
    tokens = start + block * BLOCK + tl.arange(0, BLOCK)
    rows, valid = (batch * time + tokens) * H + head, tokens < stop
    q = _load(query, rows, valid, 0, K, BLOCK_K).to(dtype)
    gates = _load_total(total, batch, head, tokens, stop, time, H, R, BLOCK_R)
    r = _load_gates(read, rows, valid, R, BLOCK_R)
    read_inside, read_state = r * tl.exp(gates - center[None, :]), r * tl.exp(gates)
    sums = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    denominators = tl.zeros([BLOCK], tl.float32) + eps
    for other in range(block + 1):
        others = start + other * BLOCK + tl.arange(0, BLOCK)
        other_rows, other_valid = (batch * time + others) * H + head, others < stop
        k = _load(key, other_rows, other_valid, 0, K, BLOCK_K).to(dtype)
        v = _load(value, other_rows, other_valid, 0, V, BLOCK_V).to(dtype)
        w = _load_gates(write, other_rows, other_valid, R, BLOCK_R)
        g = _load_total(total, batch, head, others, stop, time, H, R, BLOCK_R)
        write_inside = w * tl.exp(center[None, :] - g)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        inside = tl.dot(read_inside, tl.trans(write_inside), input_precision=PRECISION)
        weights = tl.where(tokens[:, None] >= others[None, :], scores * inside, 0.0)
        sums = tl.dot(weights.to(dtype), v, sums, input_precision=PRECISION)
        denominators += tl.sum(weights, 1)
    keys = tl.arange(0, BLOCK_K)
    places = (slot * (chunks + 1) + chunk) * R * K + keys
    for memory in range(R):
        lines = places + memory * K
        tile = _load(states, lines, keys < K, 0, V, BLOCK_V)
        line = tl.load(vectors + lines, mask=keys < K, other=0.0)
        weighted = q.to(tl.float32) * _column(read_state, memory)[:, None]
        sums = tl.dot(weighted.to(dtype), tile, sums, input_precision=PRECISION)
        denominators += tl.sum(weighted * line[None, :], 1)
    _store(output, rows, valid, 0, sums / denominators[:, None], V, BLOCK_V)
    tl.store(denominator + rows, denominators, mask=valid)


@triton.jit
def _grad_sums_kernel(
    grad_output, output, denominator, grad_sums, grad_denominator, tokens, V: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of the sums that outputs are quotients of. Grid: blocks of the B*T*H rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < tokens
    denominators = tl.load(denominator + rows, mask=valid, other=1.0)
    gradient = _load(grad_output, rows, valid, 0, V, BLOCK_V).to(tl.float32) / denominators[:, None]
    outputs = _load(output, rows, valid, 0, V, BLOCK_V).to(tl.float32)
    _store(grad_sums, rows, valid, 0, gradient, V, BLOCK_V)
    tl.store(grad_denominator + rows, -tl.sum(gradient * outputs, 1), mask=valid)


@triton.jit
def _grad_read_kernel(
    query, key, value, read, write, total, states, vectors, grad_sums, grad_denominator, grad_query,
    grad_read, time, chunks, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of query and read, for a block of tokens. Grid: blocks of tokens, B*H."""
    PER_CHUNK: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    dtype = states.dtype.element_ty
    chunk, block = tl.program_id(0) // PER_CHUNK, tl.program_id(0) % PER_CHUNK
    slot = tl.program_id(1).to(tl.int64)
    batch, head = slot // H, slot % H
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, time)
    center, _ = _center(total, batch, head, start, stop, time, H, R, BLOCK_R)
    tokens = start + block * BLOCK + tl.arange(0, BLOCK)
    rows, valid = (batch * time + tokens) * H + head, tokens < stop
    q = _load(query, rows, valid, 0, K, BLOCK_K).to(dtype)
    gradient = _load(grad_sums, rows, valid, 0, V, BLOCK_V)
    extra = tl.load(grad_denominator + rows, mask=valid, other=0.0)
    gates = _load_total(total, batch, head, tokens, stop, time, H, R, BLOCK_R)
    r = _load_gates(read, rows, valid, R, BLOCK_R)
    from_center, from_start = tl.exp(gates - center[None, :]), tl.exp(gates)
    read_inside, read_state = r * from_center, r * from_start
    grad_q = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    grad_inside = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    for other in range(block + 1):
        others = start + other * BLOCK + tl.arange(0, BLOCK)
        other_rows, other_valid = (batch * time + others) * H + head, others < stop
        k = _load(key, other_rows, other_valid, 0, K, BLOCK_K).to(dtype)
        v = _load(value, other_rows, other_valid, 0, V, BLOCK_V).to(dtype)
        w = _load_gates(write, other_rows, other_valid, R, BLOCK_R)
        g = _load_total(total, batch, head, others, stop, time, H, R, BLOCK_R)
        write_inside = w * tl.exp(center[None, :] - g)
        causal = tokens[:, None] >= others[None, :]
        grad_weights = tl.dot(gradient, tl.trans(v), input_precision=PRECISION) + extra[:, None]
        inside = tl.dot(read_inside, tl.trans(write_inside), input_precision=PRECISION)
        grad_scores = tl.where(causal, grad_weights * inside, 0.0)
        grad_q = tl.dot(grad_scores.to(dtype), k, grad_q, input_precision=PRECISION)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        grad_products = tl.where(causal, grad_weights * scores, 0.0)
        grad_inside = tl.dot(grad_products, write_inside, grad_inside, input_precision=PRECISION)
    keys, memories = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    places = (slot * (chunks + 1) + chunk) * R * K + keys
    grad_state = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    for memory in range(R):
        lines = places + memory * K
        tile = _load(states, lines, keys < K, 0, V, BLOCK_V)
        line = tl.load(vectors + lines, mask=keys < K, other=0.0)
        grad_query_m = tl.dot(gradient, tl.trans(tile), input_precision=PRECISION)
        grad_query_m += extra[:, None] * line[None, :]
        grad_q += grad_query_m * _column(read_state, memory)[:, None]
        inner = tl.sum(grad_query_m * q.to(tl.float32), 1)
        grad_state = tl.where(memories[None, :] == memory, inner[:, None], grad_state)
    _store(grad_query, rows, valid, 0, grad_q, K, BLOCK_K)
    _store(grad_read, rows, valid, 0, grad_inside * from_center + grad_state * from_start, R, BLOCK_R)


@triton.jit
def _grad_write_kernel(
    query, key, value, read, write, total, grad_states, grad_vectors, grad_sums, grad_denominator,
    grad_key, grad_value, grad_write, time, chunks, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of key, value and write, for a block of tokens. Grid: blocks of tokens, B*H.

    Products inside the chunk are transposed: rows are the tokens that are read, columns those that read.
    """
    PER_CHUNK: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    dtype = grad_states.dtype.element_ty
    chunk, block = tl.program_id(0) // PER_CHUNK, tl.program_id(0) % PER_CHUNK
    slot = tl.program_id(1).to(tl.int64)
    batch, head = slot // H, slot % H
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, time)
    center, last = _center(total, batch, head, start, stop, time, H, R, BLOCK_R)
    tokens = start + block * BLOCK + tl.arange(0, BLOCK)
    rows, valid = (batch * time + tokens) * H + head, tokens < stop
    k = _load(key, rows, valid, 0, K, BLOCK_K).to(dtype)
    v = _load(value, rows, valid, 0, V, BLOCK_V).to(dtype)
    gates = _load_total(total, batch, head, tokens, stop, time, H, R, BLOCK_R)
    w = _load_gates(write, rows, valid, R, BLOCK_R)
    to_center, to_end = tl.exp(center[None, :] - gates), tl.exp(last[None, :] - gates)
    write_inside, write_state = w * to_center, w * to_end
    grad_k = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    grad_v = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    grad_inside = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    for other in range(block, PER_CHUNK):
        others = start + other * BLOCK + tl.arange(0, BLOCK)
        other_rows, other_valid = (batch * time + others) * H + head, others < stop
        q = _load(query, other_rows, other_valid, 0, K, BLOCK_K).to(dtype)
        gradient = _load(grad_sums, other_rows, other_valid, 0, V, BLOCK_V)
        extra = tl.load(grad_denominator + other_rows, mask=other_valid, other=0.0)
        r = _load_gates(read, other_rows, other_valid, R, BLOCK_R)
        g = _load_total(total, batch, head, others, stop, time, H, R, BLOCK_R)
        read_inside = r * tl.exp(g - center[None, :])
        causal = tokens[:, None] <= others[None, :]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        inside = tl.dot(write_inside, tl.trans(read_inside), input_precision=PRECISION)
        weights = tl.where(causal, scores * inside, 0.0)
        grad_v = tl.dot(weights.to(dtype), gradient, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(gradient), input_precision=PRECISION) + extra[None, :]
        grad_scores = tl.where(causal, grad_weights * inside, 0.0)
        grad_k = tl.dot(grad_scores.to(dtype), q, grad_k, input_precision=PRECISION)
        grad_products = tl.where(causal, grad_weights * scores, 0.0)
        grad_inside = tl.dot(grad_products, read_inside, grad_inside, input_precision=PRECISION)
    keys, memories = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    places = (slot * (chunks + 1) + chunk + 1) * R * K + keys
    grad_state = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    for memory in range(R):
        lines = places + memory * K
        tile = _load(grad_states, lines, keys < K, 0, V, BLOCK_V)
        line = tl.load(grad_vectors + lines, mask=keys < K, other=0.0)
        weight = _column(write_state, memory)[:, None]
        weighted = k.to(tl.float32) * weight
        grad_v = tl.dot(weighted.to(dtype), tile, grad_v, input_precision=PRECISION)
        grad_key_m = tl.dot(v, tl.trans(tile), input_precision=PRECISION) + line[None, :]
        grad_k += grad_key_m * weight
        inner = tl.sum(grad_key_m * k.to(tl.float32), 1)
        grad_state = tl.where(memories[None, :] == memory, inner[:, None], grad_state)
    _store(grad_key, rows, valid, 0, grad_k, K, BLOCK_K)
    _store(grad_value, rows, valid, 0, grad_v, V, BLOCK_V)
    _store(grad_write, rows, valid, 0, grad_inside * to_center + grad_state * to_end, R, BLOCK_R)


@triton.jit
def _grad_decay_kernel(
    read, write, grad_read, grad_write, inner, grad_decay, time, chunks, heads, parts, H: tl.constexpr,
    R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of log_decay, as in the module's docstring. Grid: chunks, B*H."""
    chunk, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = slot // H, slot % H
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    rows, valid = (batch * time + tokens) * H + head, tokens < time
    reads = _load_gates(read, rows, valid, R, BLOCK_R) * _load_gates(grad_read, rows, valid, R, BLOCK_R)
    writes = _load_gates(write, rows, valid, R, BLOCK_R) * _load_gates(grad_write, rows, valid, R, BLOCK_R)
    gradient = tl.cumsum(reads - writes, 0, reverse=True)
    for part in range(parts):
        gradient += _load_row(inner, (part * heads + slot) * chunks + chunk, R, BLOCK_R)[None, :]
    _store(grad_decay, rows, valid, 0, gradient, R, BLOCK_R)


# Launches.


class _Plan:
    """Sizes, tiles and precisions of one call, and the launches that forward and backward share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, read: Tensor, chunk_size: int):
        self.batch, self.time, self.heads, self.key_size = query.shape
        self.value_size, self.memories = value.shape[-1], read.shape[-1]
        self.slots = self.batch * self.heads
        chunk = min(chunk_size, _MAX_CHUNK, triton.next_power_of_2(self.time))
        chunk = 1 << (chunk.bit_length() - 1)  # the largest power of two up to it
        self.chunks = triton.cdiv(self.time, chunk)
        dtypes = {tensor.dtype for tensor in (query, key, value)}
        self.dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
        exact = torch.float32 in dtypes and not torch.backends.cuda.matmul.allow_tf32
        precision = "tf32x3" if exact else "tf32"
        self.gates = {"H": self.heads, "R": self.memories, "CHUNK": chunk, "BLOCK_R": _tile(self.memories)}
        self.sizes = {
            **self.gates,
            "K": self.key_size,
            "V": self.value_size,
            "BLOCK": max(16, min(chunk, _MAX_BLOCK)),
            "BLOCK_K": _tile(self.key_size),
            "BLOCK_V": _tile(self.value_size),
            "PRECISION": precision,
        }
        self.launch = {"num_warps": 8 if max(self.sizes["BLOCK_K"], self.sizes["BLOCK_V"]) > 64 else 4}

    def per_chunk(self) -> tuple[int, int]:
        """The grid of the kernels that handle gates."""
        return self.chunks, self.slots

    def per_block(self) -> tuple[int, int]:
        """The grid of the kernels that handle tokens."""
        return self.chunks * triton.cdiv(self.sizes["CHUNK"], self.sizes["BLOCK"]), self.slots

    def total(self, log_decay: Tensor) -> Tensor:
        total = torch.empty_like(log_decay, dtype=torch.float32)
        _total_kernel[self.per_chunk()](log_decay, total, self.time, **self.gates)
        return total

    def scan(self, features, columns, extra, weight, total, state, vector, others=None):
        """States and vectors at all boundaries, the ones handed on at the end, and inner products with
        `others`."""
        sizes = {k: v for k, v in self.sizes.items() if k != "BLOCK_R"}
        sizes["BLOCK_K"], sizes["BLOCK_V"] = min(64, sizes["BLOCK_K"]), min(64, sizes["BLOCK_V"])
        blocks = (triton.cdiv(self.key_size, sizes["BLOCK_K"]), triton.cdiv(self.value_size, sizes["BLOCK_V"]))
        shape = (self.slots, self.chunks + 1, self.memories, self.key_size)
        states = state.new_empty(*shape, self.value_size, dtype=self.dtype)
        vectors = vector.new_empty(shape)
        final = torch.empty_like(state), torch.empty_like(vector)
        inner = state.new_empty(blocks[0] * blocks[1], self.slots, self.chunks, self.memories)
        _scan_kernel[self.slots * self.memories, *blocks](
            features, columns, extra, weight, total, state, vector, states, vectors, *final,
            *(others or (states, vectors)), inner, self.time, self.chunks, self.slots,
            **sizes, REVERSE=others is not None,
        )  # fmt: skip
        return (states, vectors), final, inner


def _tile(size: int) -> int:
    """The tile for so many columns: a power of two that matrix units take."""
    return max(16, triton.next_power_of_2(size))


# Operators of torch, so that torch.compile takes them as they are and torch knows their gradients. Named after
# this module: code that came with a model from the Hub registers its own beside the package's.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, T, H, V], final memory and normalizer, and denominators [B, T, H]."""
    query, key, value, read, write, log_decay, memory, normalizer = (
        x.contiguous() for x in (query, key, value, read, write, log_decay, memory, normalizer)
    )
    plan = _Plan(query, key, value, read, chunk_size)
    output, denominator = torch.empty_like(value), query.new_empty(query.shape[:-1], dtype=torch.float32)
    with torch.cuda.device_of(query):
        total = plan.total(log_decay)
        states, final, _ = plan.scan(key, value, total, write, total, memory, normalizer)
        _output_kernel[plan.per_block()](
            query, key, value, read, write, total, *states, output, denominator, eps, plan.time,
            plan.chunks, **plan.sizes, **plan.launch,
        )  # fmt: skip
    return output, *final, denominator


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    output: Tensor,
    denominator: Tensor,
    grad_output: Tensor,
    grad_memory: Tensor,
    grad_normalizer: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first eight arguments."""
    query, key, value, read, write, log_decay, memory, normalizer = (
        x.contiguous() for x in (query, key, value, read, write, log_decay, memory, normalizer)
    )
    grad_output, grad_final = grad_output.contiguous(), (grad_memory.contiguous(), grad_normalizer.contiguous())
    plan = _Plan(query, key, value, read, chunk_size)
    grad_sums = torch.empty_like(value, dtype=plan.dtype)
    grad_denominator = torch.empty_like(denominator)
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    # In float32, whatever the gates are: the gradients of the decay are made of them.
    grad_read, grad_write = (torch.empty_like(x, dtype=torch.float32) for x in (read, write))
    grad_decay = torch.empty_like(log_decay)
    with torch.cuda.device_of(query):
        total = plan.total(log_decay)
        states, _, _ = plan.scan(key, value, total, write, total, memory, normalizer)
        block = plan.sizes["BLOCK"]
        _grad_sums_kernel[triton.cdiv(denominator.numel(), block),](
            grad_output, output, denominator, grad_sums, grad_denominator, denominator.numel(),
            V=plan.value_size, BLOCK=block, BLOCK_V=plan.sizes["BLOCK_V"],
        )  # fmt: skip
        grad_states, grad_initial, inner = plan.scan(
            query, grad_sums, grad_denominator, read, total, *grad_final, others=states
        )
        _grad_read_kernel[plan.per_block()](
            query, key, value, read, write, total, *states, grad_sums, grad_denominator, grad_query,
            grad_read, plan.time, plan.chunks, **plan.sizes, **plan.launch,
        )  # fmt: skip
        _grad_write_kernel[plan.per_block()](
            query, key, value, read, write, total, *grad_states, grad_sums, grad_denominator, grad_key,
            grad_value, grad_write, plan.time, plan.chunks, **plan.sizes, **plan.launch,
        )  # fmt: skip
        _grad_decay_kernel[plan.per_chunk()](
            read, write, grad_read, grad_write, inner, grad_decay, plan.time, plan.chunks, plan.slots,
            inner.shape[0], **plan.gates,
        )  # fmt: skip
    grad_gates = grad_read.to(read.dtype), grad_write.to(write.dtype), grad_decay
    return grad_query, grad_key, grad_value, *grad_gates, *grad_initial


@_forward.register_fake
def _(query, key, value, read, write, log_decay, memory, normalizer, chunk_size, eps):
    denominator = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (value, memory, normalizer)), denominator


@_backward.register_fake
def _(*arguments):
    return tuple(x.new_empty(x.shape) for x in arguments[:8])


def _keep(ctx, inputs, output):
    *tensors, ctx.chunk_size, _ = inputs
    ctx.save_for_backward(*tensors, output[0], output[3])


def _differentiate(ctx, grad_output, grad_memory, grad_normalizer, _):
    grads = _backward(*ctx.saved_tensors, grad_output, grad_memory, grad_normalizer, ctx.chunk_size)
    return *grads, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`banked_linear_attention` for inputs that are not `unsupported`, in chunks of at most `chunk_size`.

    Args:
        query, key: [B, T, H, K]; value: [B, T, H, V]; read, write, log_decay: [B, T, H, R].
        memory, normalizer: the initial state [B, H, R, K, V] and [B, H, R, K], float32.
        chunk_size: as short as the decay demands; rounded down to a power of two, and to 256.
        eps: added to the denominator.

    Returns:
        The output [B, T, H, V] in the dtype of `value`, and the final memory and normalizer.
    """
    return _forward(
        query, key, value, read, write, log_decay, memory, normalizer, chunk_size, eps
    )[:3]  # fmt: skip
