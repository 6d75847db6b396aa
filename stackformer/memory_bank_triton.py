# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Banked linear attention on a GPU: the chunk form of memory_bank.py as Triton kernels, and its gradients.

The mathematics, the letters and the bounds on exponents are those of memory_bank.py. Time is cut into N
chunks of C tokens, and chunks into blocks of at most 64. G is the cumulative sum of `log_decay` inside a
chunk; the states at the N + 1 boundaries of chunks are M_0 .. M_N, those of the normalizer z_0 .. z_N.

    forward     G; M by a scan over chunks; outputs
    backward    M again; their gradients dM by the same scan from the end, which also takes <M_n, dM_n>;
                gradients of query and read, of key and write, of value; and from those, of the decay:

    sum over i >= t in the chunk of (read_im dread_im - write_im dwrite_im) + <M_nm, dM_nm> + <z_nm, dz_nm>

with n the boundary at the chunk's end: a decay scales all that was there before it, so its gradient is what
later reads take from it, less what was written later, and what the chunk leaves. Reading with time and
writing against it are the same computation, so the same three kernels, `_scan_kernel`, `_sums_kernel` and
`_grad_kernel`, do both: a flag REVERSE swaps the roles of tokens that read and tokens that are read.

Inside a chunk, the product of queries and keys is taken once for all memories; keys expanded to R*K and
states per token exist nowhere. The normalizer is a vector beside each matrix, not one more column of it.
Saved for the backward pass are inputs, outputs, denominators and the initial state; states at boundaries are
work space of N R K V elements per head, twice that in the backward pass.

Products take bfloat16 operands for bfloat16 inputs, and else float32 ones: as TF32 where torch allows it or
the inputs are float16 (whose digits TF32 has, with float32's range), as three TF32 products where not.
Gates, decays, sums and the states that are handed on are float32.
"""

import re

import torch
from torch import Tensor

# The import is in a `try`, since transformers asks users of remote code to install all other imports.
try:
    import triton
    import triton.language as tl
except ImportError:  # memory_bank.py does not import this module then
    raise

from .library import check_layout
from .memory_bank_cpu import check_call

# With TRITON_INTERPRET=1 kernels run on the CPU, in NumPy.
INTERPRETED = triton.knobs.runtime.interpret
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_FEATURES = 128  # K and V: tiles of [64, K], [64, V] and [K, V] share one multiprocessor's memory
_MAX_MEMORIES = 64
_MAX_BLOCK = 64  # tokens per tile
_MAX_CHUNK = 256  # gates [C, R] are one tile of the cumulative sums
# As in memory_bank.py, for float32.
_NOTHING = tl.constexpr(-104.0)
_MAX_EXPONENT = tl.constexpr(80.0)


def obstacle(query: Tensor, key: Tensor, value: Tensor, read: Tensor) -> str | None:
    """Returns why the kernels cannot take these inputs of `banked_linear_attention`; `None` if they can."""
    if not (query.is_cuda or INTERPRETED):
        return f"tensors must be on a CUDA device, not on {query.device}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in _DTYPES:
            return f"`{name}` must be float32, bfloat16 or float16, not {tensor.dtype}"
    if max(query.shape[-1], value.shape[-1]) > _MAX_FEATURES:
        sizes = f"{query.shape[-1]} and {value.shape[-1]}"
        return f"key and value sizes must be at most {_MAX_FEATURES}, not {sizes}"
    if read.shape[-1] > _MAX_MEMORIES:
        return f"there must be at most {_MAX_MEMORIES} memories per head, not {read.shape[-1]}"
    return None


# Kernels. A row is a token of a head in a contiguous [B, T, H, ...], or a line of a state in [..., K, V]. A
# slot is one of B*H. A block is the tokens of a chunk that one tile holds. Tiles are padded to powers of two,
# with zeros that change no sum. Only the first dimension of a grid may be large.

# Machine code does not depend on these sizes: a new one is no reason to compile again.
_kernel = triton.jit(do_not_specialize=("time", "chunks", "slots", "parts", "tokens"))


@triton.jit
def _load(pointer, rows, valid, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Loads columns `first` to `first + BLOCK` of rows of WIDTH elements, with zeros past their end."""
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
def _load_row(pointer, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Loads one row [BLOCK]."""
    columns = tl.arange(0, BLOCK)
    return tl.load(pointer + row * WIDTH + columns, mask=columns < WIDTH, other=0.0)


@triton.jit
def _column(tile, index):
    """Returns column `index` [rows] of a tile [rows, columns] in registers."""
    columns = tl.arange(0, tile.shape[1])
    return tl.sum(tl.where(columns[None, :] == index, tile, 0.0), 1)


@_kernel
def _total_kernel(
    log_decay, total, time, chunks, H: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Computes G. Grid: B*H*N."""
    slot, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    batch, head = slot // H, slot % H
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    rows, valid = (batch * time + tokens) * H + head, tokens < time
    gates = _load_gates(log_decay, rows, valid, R, BLOCK_R)
    gates = tl.where(gates < _NOTHING, _NOTHING, gates)
    _store(total, rows, valid, 0, tl.cumsum(gates, 0), R, BLOCK_R)


@_kernel
def _scan_kernel(
    features, columns, extra, weight, total, state, vector, states, vectors, final_state, final_vector,
    other_states, other_vectors, inner, time, chunks, slots, H: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes states [K, V] and vectors [K] of one memory at all boundaries, from chunk to chunk.

    Forward, features and columns are keys and values, weighted with their writes as they are at the chunk's
    end. With REVERSE, they are queries and gradients of the sums, weighted with their reads of the chunk's
    beginning, `extra` are the gradients of the denominators, and `inner` [parts, B*H, N, R] becomes parts of
    the inner products with `other_states` and `other_vectors`.
    Grid: B*H*R, blocks of K, blocks of V.
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
            tl.store(inner + ((part * slots + slot) * chunks + chunk) * R + memory, product)
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
def _gates(
    weight, total, batch, head, tokens, valid, start, stop, time, H: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Loads the weights of a block of tokens, and computes their factors inside the chunk and beyond it.

    Returns three tiles [BLOCK, BLOCK_R]: the weights; exp(G - c) for reads, or exp(c - G) for writes, with c
    the chunk's midpoint of G; exp(G) for reads, or exp(G_last - G) for writes.
    """
    weights = _load(weight, (batch * time + tokens) * H + head, valid, 0, R, BLOCK_R).to(tl.float32)
    # After the chunk's last token G stays what it is there: the exponents of the padding are small, too.
    rows = (batch * time + tl.minimum(tokens, stop - 1)) * H + head
    gates = _load(total, rows, tokens >= 0, 0, R, BLOCK_R)
    first = _load_row(total, (batch * time + start) * H + head, R, BLOCK_R)
    last = _load_row(total, (batch * time + stop - 1) * H + head, R, BLOCK_R)
    # With a NaN in the chunk there is no midpoint. The other center bounds the exponents of the tokens before
    # the NaN, whatever they decay by.
    center = tl.where(last <= first, (first + last) / 2, first - _MAX_EXPONENT)
    centered = gates - center[None, :]
    if WRITES:
        return weights, tl.exp(-centered), tl.exp(last[None, :] - gates)
    return weights, tl.exp(centered), tl.exp(gates)


@triton.jit
def _inside(
    own, inside, tokens, other_features, other_columns, other_weight, total, batch, head, start, stop, block,
    first_v, eps, time, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    PER_CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, REVERSE: tl.constexpr, FINITE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes sums and denominators of a block of tokens over the tokens of its chunk.

    A plain product multiplies columns of later tokens by 0, which is NaN where a column is not FINITE. Such
    columns are left out of it, and the sums of their own tokens and of later ones are set to NaN.
    """
    dtype = own.dtype
    sums = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    lost_from = tl.zeros([BLOCK_V], tl.int32) + stop
    denominators = tl.zeros([BLOCK], tl.float32) + eps
    for other in range(block if REVERSE else 0, PER_CHUNK if REVERSE else block + 1):
        others = start + other * BLOCK + tl.arange(0, BLOCK)
        other_rows, other_valid = (batch * time + others) * H + head, others < stop
        theirs = _load(other_features, other_rows, other_valid, 0, K, BLOCK_K).to(dtype)
        columns = _load(other_columns, other_rows, other_valid, first_v, V, BLOCK_V).to(dtype)
        other_weights, from_center, _ = _gates(
            other_weight, total, batch, head, others, other_valid, start, stop, time, H, R, BLOCK_R,
            not REVERSE,
        )  # fmt: skip
        products = tl.dot(own, tl.trans(theirs), input_precision=PRECISION)
        products *= tl.dot(inside, tl.trans(other_weights * from_center), input_precision=PRECISION)
        if REVERSE:
            products = tl.where(others[None, :] >= tokens[:, None], products, 0.0)
        else:
            products = tl.where(tokens[:, None] >= others[None, :], products, 0.0)
            denominators += tl.sum(products, 1)
        if not FINITE:
            is_number = tl.abs(columns.to(tl.float32)) < float("inf")
            columns = tl.where(is_number, columns.to(tl.float32), 0.0).to(dtype)
            lost_from = tl.minimum(lost_from, tl.min(tl.where(is_number, stop, others[:, None]), 0))
        sums = tl.dot(products.to(dtype), columns, sums, input_precision=PRECISION)
    if not FINITE:
        sums = tl.where(tokens[:, None] >= lost_from[None, :], float("nan"), sums)
    return sums, denominators


@_kernel
def _sums_kernel(
    features, weight, other_features, other_columns, other_weight, total, states, vectors, output,
    denominator, eps, time, chunks, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes outputs and denominators of tokens that read; with REVERSE, gradients of the values.

    Forward, features and weight are query and read, the other ones key, value and write, and states are those
    at the chunk's beginning; with REVERSE, features and weight are key and write, the other ones query,
    gradients of the sums and read, and states are gradients at the chunk's end.
    Grid: B*H times blocks of tokens, blocks of V.
    """
    PER_CHUNK: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    dtype = states.dtype.element_ty
    place, block = tl.program_id(0) // PER_CHUNK, tl.program_id(0) % PER_CHUNK
    slot, chunk = place.to(tl.int64) // chunks, place % chunks
    first_v = tl.program_id(1) * BLOCK_V
    batch, head = slot // H, slot % H
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, time)
    tokens = start + block * BLOCK + tl.arange(0, BLOCK)
    rows, valid = (batch * time + tokens) * H + head, tokens < stop
    own = _load(features, rows, valid, 0, K, BLOCK_K).to(dtype)
    weights, to_center, to_edge = _gates(
        weight, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, REVERSE
    )
    inside, beyond = weights * to_center, weights * to_edge
    sums, denominators = _inside(
        own, inside, tokens, other_features, other_columns, other_weight, total, batch, head, start, stop,
        block, first_v, eps, time, H, R, K, V, PER_CHUNK, BLOCK, BLOCK_R, BLOCK_K, BLOCK_V, REVERSE, True,
        PRECISION,
    )  # fmt: skip
    if not REVERSE:
        # A row of the state after the chunk is finite only if all values of the chunk are.
        columns = first_v + tl.arange(0, BLOCK_V)
        after = states + (slot * (chunks + 1) + chunk + 1) * R * K * V + columns
        after = tl.load(after, mask=columns < V, other=0.0).to(tl.float32)
        if tl.sum(tl.where(tl.abs(after) < float("inf"), 0, 1), 0) > 0:
            sums, _ = _inside(
                own, inside, tokens, other_features, other_columns, other_weight, total, batch, head, start,
                stop, block, first_v, eps, time, H, R, K, V, PER_CHUNK, BLOCK, BLOCK_R, BLOCK_K, BLOCK_V,
                REVERSE, False, PRECISION,
            )  # fmt: skip
    keys = tl.arange(0, BLOCK_K)
    places = (slot * (chunks + 1) + chunk + (1 if REVERSE else 0)) * R * K + keys
    for memory in range(R):
        lines = places + memory * K
        tile = _load(states, lines, keys < K, first_v, V, BLOCK_V)
        weighted = own.to(tl.float32) * _column(beyond, memory)[:, None]
        sums = tl.dot(weighted.to(dtype), tile, sums, input_precision=PRECISION)
        if not REVERSE:
            line = tl.load(vectors + lines, mask=keys < K, other=0.0)
            denominators += tl.sum(weighted * line[None, :], 1)
    if not REVERSE:
        sums /= denominators[:, None]
        tl.store(denominator + rows, denominators, mask=tokens < tl.where(first_v == 0, stop, 0))
    _store(output, rows, valid, first_v, sums, V, BLOCK_V)


@_kernel
def _grad_kernel(
    features, columns, weight, other_features, other_columns, other_weight, extra, total, states, vectors,
    grad_features, grad_weight, time, chunks, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes gradients of query and read; with REVERSE, of key and write.

    Features, weight and states are those of `_sums_kernel`, columns the gradients of the sums (with REVERSE
    values), other columns values (gradients of the sums). `extra`, the gradients of the denominators, are the
    column to a column of ones beside the values. Grid: B*H times blocks of tokens.
    """
    PER_CHUNK: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK
    dtype = states.dtype.element_ty
    place, block = tl.program_id(0) // PER_CHUNK, tl.program_id(0) % PER_CHUNK
    slot, chunk = place.to(tl.int64) // chunks, place % chunks
    batch, head = slot // H, slot % H
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, time)
    tokens = start + block * BLOCK + tl.arange(0, BLOCK)
    rows, valid = (batch * time + tokens) * H + head, tokens < stop
    own = _load(features, rows, valid, 0, K, BLOCK_K).to(dtype)
    weights, to_center, to_edge = _gates(
        weight, total, batch, head, tokens, valid, start, stop, time, H, R, BLOCK_R, REVERSE
    )
    inside, beyond = weights * to_center, weights * to_edge
    grad = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    grad_inside = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    for other in range(block if REVERSE else 0, PER_CHUNK if REVERSE else block + 1):
        others = start + other * BLOCK + tl.arange(0, BLOCK)
        other_rows, other_valid = (batch * time + others) * H + head, others < stop
        theirs = _load(other_features, other_rows, other_valid, 0, K, BLOCK_K).to(dtype)
        other_weights, from_center, _ = _gates(
            other_weight, total, batch, head, others, other_valid, start, stop, time, H, R, BLOCK_R,
            not REVERSE,
        )  # fmt: skip
        other_inside = other_weights * from_center
        if REVERSE:
            causal = others[None, :] >= tokens[:, None]
            grad_products = tl.load(extra + other_rows, mask=other_valid, other=0.0)[None, :]
        else:
            causal = tokens[:, None] >= others[None, :]
            grad_products = tl.load(extra + rows, mask=valid, other=0.0)[:, None]
        grad_products = tl.broadcast_to(grad_products, BLOCK, BLOCK)
        for first_v in range(0, V, BLOCK_V):
            mine = _load(columns, rows, valid, first_v, V, BLOCK_V).to(dtype)
            values = _load(other_columns, other_rows, other_valid, first_v, V, BLOCK_V).to(dtype)
            grad_products = tl.dot(mine, tl.trans(values), grad_products, input_precision=PRECISION)
        gates = tl.dot(inside, tl.trans(other_inside), input_precision=PRECISION)
        scores = tl.where(causal, grad_products * gates, 0.0)
        grad = tl.dot(scores.to(dtype), theirs, grad, input_precision=PRECISION)
        gates = tl.dot(own, tl.trans(theirs), input_precision=PRECISION)
        gates = tl.where(causal, grad_products * gates, 0.0)
        grad_inside = tl.dot(gates, other_inside, grad_inside, input_precision=PRECISION)
    keys, memories = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    places = (slot * (chunks + 1) + chunk + (1 if REVERSE else 0)) * R * K + keys
    grad_beyond = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    for first_v in range(0, V, BLOCK_V):
        mine = _load(columns, rows, valid, first_v, V, BLOCK_V).to(dtype)
        ones = tokens < tl.where(first_v == 0, stop, 0)  # the vectors are taken once
        column = ones.to(tl.float32) if REVERSE else tl.load(extra + rows, mask=ones, other=0.0)
        for memory in range(R):
            lines = places + memory * K
            tile = _load(states, lines, keys < K, first_v, V, BLOCK_V)
            line = tl.load(vectors + lines, mask=keys < K, other=0.0)
            product = tl.dot(mine, tl.trans(tile), column[:, None] * line[None, :], input_precision=PRECISION)
            grad += product * _column(beyond, memory)[:, None]
            inner = tl.sum(product * own.to(tl.float32), 1)
            grad_beyond += tl.where(memories[None, :] == memory, inner[:, None], 0.0)
    _store(grad_features, rows, valid, 0, grad, K, BLOCK_K)
    _store(grad_weight, rows, valid, 0, grad_inside * to_center + grad_beyond * to_edge, R, BLOCK_R)


@_kernel
def _grad_sums_kernel(
    grad_output, output, denominator, grad_sums, grad_denominator, tokens, V: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes gradients of numerators and denominators. Grid: blocks of the B*T*H rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < tokens
    denominators = tl.load(denominator + rows, mask=valid, other=1.0)
    gradient = _load(grad_output, rows, valid, 0, V, BLOCK_V).to(tl.float32) / denominators[:, None]
    outputs = _load(output, rows, valid, 0, V, BLOCK_V).to(tl.float32)
    _store(grad_sums, rows, valid, 0, gradient, V, BLOCK_V)
    tl.store(grad_denominator + rows, -tl.sum(gradient * outputs, 1), mask=valid)


@_kernel
def _grad_decay_kernel(
    read, write, log_decay, grad_read, grad_write, inner, grad_decay, time, chunks, slots, parts,
    H: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Computes gradients of log_decay, as in the module's docstring. Grid: B*H*N."""
    slot, chunk = tl.program_id(0).to(tl.int64) // chunks, tl.program_id(0) % chunks
    batch, head = slot // H, slot % H
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    rows, valid = (batch * time + tokens) * H + head, tokens < time
    reads = _load_gates(read, rows, valid, R, BLOCK_R) * _load_gates(grad_read, rows, valid, R, BLOCK_R)
    writes = _load_gates(write, rows, valid, R, BLOCK_R) * _load_gates(grad_write, rows, valid, R, BLOCK_R)
    gradient = tl.cumsum(reads - writes, 0, reverse=True)
    for part in range(parts):
        gradient += _load_row(inner, (part * slots + slot) * chunks + chunk, R, BLOCK_R)[None, :]
    # No gradient passes a wiped memory; the sum has the rounding errors of terms that cancel.
    decays = _load_gates(log_decay, rows, valid, R, BLOCK_R)
    gradient = tl.where(decays <= _NOTHING, 0.0, gradient)
    _store(grad_decay, rows, valid, 0, gradient, R, BLOCK_R)


# Launches.


class _Plan:
    """Sizes, tiles and precisions of one call, and the launches that forward and backward share."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, read: Tensor, chunk_size: int):
        self.batch, self.time, self.heads, self.key_size = query.shape
        self.value_size, self.memories = value.shape[-1], read.shape[-1]
        self.slots = self.batch * self.heads
        chunk = chunk_length(min(chunk_size, triton.next_power_of_2(self.time)))
        self.chunks = triton.cdiv(self.time, chunk)
        dtypes = {tensor.dtype for tensor in (query, key, value)}
        self.dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
        exact = torch.float32 in dtypes and not torch.backends.cuda.matmul.allow_tf32
        precision = "tf32x3" if exact else "tf32"
        # Two sets of tiles [BLOCK, K], [BLOCK, V] and [BLOCK, R] have to fit, and few registers be spilled.
        wide = max(self.key_size, self.value_size) > 64 or self.memories > 32
        large = self.dtype == torch.float32 and wide
        block = min(chunk, _MAX_BLOCK // 2 if large else _MAX_BLOCK)
        self.gates = {"H": self.heads, "R": self.memories, "CHUNK": chunk, "BLOCK_R": _tile(self.memories)}
        self.sizes = {
            "H": self.heads,
            "R": self.memories,
            "K": self.key_size,
            "V": self.value_size,
            "CHUNK": chunk,
            "BLOCK": max(16, block),
            "BLOCK_V": min(_tile(self.value_size), _MAX_BLOCK),
            "PRECISION": precision,
        }
        self.token_sizes = {**self.sizes, "BLOCK_R": _tile(self.memories), "BLOCK_K": _tile(self.key_size)}
        self.per_chunk = (self.slots * self.chunks,)
        self.per_block = (self.slots * self.chunks * triton.cdiv(chunk, self.sizes["BLOCK"]),)
        # The fewest warps among which tiles can be shared out without spilling registers.
        small = self.dtype == torch.bfloat16 and max(self.key_size, self.value_size) <= 64
        self.token_sizes |= {"num_warps": 4 if small else 8, "num_stages": 2}

    def total(self, log_decay: Tensor) -> Tensor:
        """Returns G [B, T, H, R]."""
        total = torch.empty_like(log_decay, dtype=torch.float32)
        _total_kernel[self.per_chunk](log_decay, total, self.time, self.chunks, **self.gates)
        return total

    def scan(self, features, columns, extra, weight, total, state, others=None):
        """Returns states and vectors at all boundaries, the last ones in float32, and the inner products.

        With `others` the scan goes from the end to the beginning, and inner products are those with `others`.
        """
        block_k = min(_tile(self.key_size), _MAX_BLOCK)
        blocks = (triton.cdiv(self.key_size, block_k), triton.cdiv(self.value_size, self.sizes["BLOCK_V"]))
        shape = (self.slots, self.chunks + 1, self.memories, self.key_size)
        states = total.new_empty(*shape, self.value_size, dtype=self.dtype)
        vectors = total.new_empty(shape)
        final = tuple(torch.empty_like(x) for x in state)
        inner = total.new_empty(blocks[0] * blocks[1], self.slots, self.chunks, self.memories)
        _scan_kernel[(self.slots * self.memories, *blocks)](
            features, columns, extra, weight, total, *state, states, vectors, *final,
            *(others or (states, vectors)), inner, self.time, self.chunks, self.slots,
            **self.sizes, BLOCK_K=block_k, REVERSE=others is not None, num_stages=2,
        )  # fmt: skip
        return (states, vectors), final, inner

    def sums(self, *tensors, eps: float = 0.0, reverse: bool = False) -> None:
        """Computes outputs and denominators, or the gradients of the values, into the last two tensors."""
        grid = (*self.per_block, triton.cdiv(self.value_size, self.sizes["BLOCK_V"]))
        _sums_kernel[grid](*tensors, eps, self.time, self.chunks, **self.token_sizes, REVERSE=reverse)

    def gradients(self, *tensors, reverse: bool = False) -> None:
        """Computes the gradients of query and read, or of key and write, into the last two tensors."""
        _grad_kernel[self.per_block](*tensors, self.time, self.chunks, **self.token_sizes, REVERSE=reverse)


def chunk_length(chunk_size: int) -> int:
    """Returns the tokens per chunk for up to `chunk_size`: a power of two, at most 256."""
    return 1 << (min(chunk_size, _MAX_CHUNK).bit_length() - 1)


def _tile(size: int) -> int:
    """Returns the width of a tile for so many columns: a power of two that matrix units take."""
    return max(16, triton.next_power_of_2(size))


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors dense, and with the sign that is in memory: kernels see nothing else."""
    return tuple(tensor.contiguous().resolve_neg() for tensor in tensors)


def _check(query, key, value, read, write, log_decay, memory, normalizer, *others: Tensor) -> None:
    """Raises a ValueError unless the tensors of an operator go together: kernels follow any pointer.

    Args:
        others: of the backward pass: output, denominator, and gradients of the output and of the final state.
    """
    check_call((query, key, value, read, write, log_decay), (memory, normalizer))
    names = ("output", "denominator", "grad_output", "grad_memory", "grad_normalizer")
    shapes = (value.shape, query.shape[:-1], value.shape, memory.shape, normalizer.shape)
    check_layout(query.device, zip(names, others, shapes, strict=False))


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
    memory: Tensor,
    normalizer: Tensor,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output [B, T, H, V], final memory and normalizer, and denominators [B, T, H]."""
    _check(query, key, value, read, write, log_decay, memory, normalizer)
    query, key, value, read, write, log_decay, memory, normalizer = _dense(
        query, key, value, read, write, log_decay, memory, normalizer
    )
    plan = _Plan(query, key, value, read, chunk_size)
    output, denominator = torch.empty_like(value), query.new_empty(query.shape[:-1], dtype=torch.float32)
    with torch.cuda.device_of(query):
        total = plan.total(log_decay)
        states, final, _ = plan.scan(key, value, total, write, total, (memory, normalizer))
        plan.sums(query, read, key, value, write, total, *states, output, denominator, eps=eps)
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
    """Returns the gradients of the first eight arguments."""
    tensors = (query, key, value, read, write, log_decay, memory, normalizer)
    _check(*tensors, output, denominator, grad_output, grad_memory, grad_normalizer)
    query, key, value, read, write, log_decay, memory, normalizer = _dense(
        query, key, value, read, write, log_decay, memory, normalizer
    )
    output, denominator, grad_output, *grad_final = _dense(
        output, denominator, grad_output, grad_memory, grad_normalizer
    )
    plan = _Plan(query, key, value, read, chunk_size)
    grad_sums = torch.empty_like(value, dtype=plan.dtype)
    grad_denominator = torch.empty_like(denominator)
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    # These two are float32, whatever the gates are: the gradients of the decay are made of them.
    grad_read, grad_write = (torch.empty_like(x, dtype=torch.float32) for x in (read, write))
    grad_decay = torch.empty_like(log_decay)
    with torch.cuda.device_of(query):
        total = plan.total(log_decay)
        states, _, _ = plan.scan(key, value, total, write, total, (memory, normalizer))
        block = plan.sizes["BLOCK"]
        _grad_sums_kernel[triton.cdiv(denominator.numel(), block),](
            grad_output, output, denominator, grad_sums, grad_denominator, denominator.numel(),
            V=plan.value_size, BLOCK=block, BLOCK_V=_tile(plan.value_size),
        )  # fmt: skip
        grad_states, grad_initial, inner = plan.scan(
            query, grad_sums, grad_denominator, read, total, grad_final, others=states
        )
        plan.gradients(
            query, grad_sums, read, key, value, write, grad_denominator, total, *states, grad_query, grad_read
        )
        plan.gradients(
            key, value, write, query, grad_sums, read, grad_denominator, total, *grad_states, grad_key,
            grad_write, reverse=True,
        )  # fmt: skip
        plan.sums(
            key, write, query, grad_sums, read, total, *grad_states, grad_value, denominator, reverse=True
        )
        _grad_decay_kernel[plan.per_chunk](
            read, write, log_decay, grad_read, grad_write, inner, grad_decay, plan.time, plan.chunks,
            plan.slots, inner.shape[0], **plan.gates,
        )  # fmt: skip
    grad_gates = grad_read.to(read.dtype), grad_write.to(write.dtype), grad_decay
    return grad_query, grad_key, grad_value, *grad_gates, *grad_initial


@_forward.register_fake
def _(query, key, value, read, write, log_decay, memory, normalizer, chunk_size, eps):
    _check(query, key, value, read, write, log_decay, memory, normalizer)
    denominator = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (value, memory, normalizer)), denominator


@_backward.register_fake
def _(*arguments):
    _check(*arguments[:13])
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
    """Computes `banked_linear_attention` for inputs without an `obstacle`, in chunks of at most `chunk_size`.

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
