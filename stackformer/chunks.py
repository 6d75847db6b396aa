# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Chunks of tokens: how the operators on banks of memories cut a sequence and hand the states on.

Letters: B batch, T time, H heads, K key size, V value size, R memories per head, N chunks of C tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# The centred exponents of a chunk stay within +-MAX_EXPONENT: exp(80) times exp(80) is no float32 infinity
# in the products that are kept, whose exponents add up to at most 0, and exp(-80) is no denormal.
MAX_EXPONENT = {torch.float32: 80.0, torch.float64: 400.0}
# The exp of NOTHING is 0: a memory that decays by that much, or more, is wiped. In chunks NOTHING stands
# for all logarithms below it, -inf included, since the difference of two infinite sums is no number.
NOTHING = {torch.float32: -104.0, torch.float64: -746.0}
# Longer chunks are cut: no machine has the work space for them.
MAX_CHUNK = 2**20
# Elements of work space for one group of chunks: enough for large products, and few enough for a cache.
WORKSPACE = 2**19


def check_chunk_size(chunk_size: int) -> None:
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"`chunk_size` must be an integer of at least 1, got {chunk_size!r}")


def safe_chunk_length(chunk_size: int, max_decay: float | None, log_decay: Tensor, dtype: torch.dtype) -> int:
    """Returns the longest chunk, halving from `chunk_size`, whose centred exponents stay inside the dtype.

    Args:
        max_decay: the bound on all decays; `None` if there is none but the log decay itself.
        log_decay: [B, T, H, R]; dtype: of the states.
    """
    nothing, most = -NOTHING[dtype], 2 * MAX_EXPONENT[dtype]
    if max_decay is not None:
        decay = min(max_decay, nothing)
        while chunk_size > 1 and (chunk_size - 1) * decay > most:
            chunk_size //= 2
        return chunk_size
    while chunk_size // 2 >= log_decay.shape[1]:
        chunk_size //= 2
    if chunk_size == 1 or log_decay.is_meta or log_decay.numel() == 0:
        return chunk_size
    largest = float(log_decay.detach().abs().amax())
    if (chunk_size - 1) * largest <= most:
        return chunk_size
    # Measure the decay of each whole chunk: a few tokens that forget much, or all, need not shorten them all.
    # NaN shortens no chunk, so that it does not change the roundings of tokens before it.
    decays = log_decay.detach().to(dtype).abs().nan_to_num(nan=0.0).clamp(max=nothing)
    while chunk_size > 1:
        padding = (0, 0, 0, 0, 0, -decays.shape[1] % chunk_size)
        chunks = torch.nn.functional.pad(decays, padding).unflatten(1, (-1, chunk_size))  # [B, N, C, H, R]
        if float(chunks[:, :, 1:].sum(2).amax()) <= most:
            break
        chunk_size //= 2
    return chunk_size


class ChunkGroup(NamedTuple):
    """`chunks` of `length` tokens from token `start` on, which are computed at once."""

    start: int
    chunks: int
    length: int


def in_chunks(tensor: Tensor, group: ChunkGroup, dtype: torch.dtype) -> Tensor:
    """Returns the tokens of a group in [B, T, H, F] as [B*H, N, C, F], for N chunks of C tokens."""
    batch, _, heads, features = tensor.shape
    start, chunks, length = group
    tensor = tensor[:, start : start + chunks * length].unflatten(1, (chunks, length))  # [B, N, C, H, F]
    return tensor.permute(0, 3, 1, 2, 4).to(dtype).reshape(batch * heads, chunks, length, features)


def from_chunks(tensor: Tensor, heads: int) -> Tensor:
    """Returns [B*H, N, C, F] as [B, N*C, H, F]."""
    return tensor.unflatten(0, (-1, heads)).permute(0, 2, 3, 1, 4).flatten(1, 2)


def chunk_groups(time: int, length: int, elements_per_chunk: int) -> list[ChunkGroup]:
    """Returns groups that fit the work space; the last one may be a single shorter chunk."""
    length = min(length, time)
    whole = time // length
    per_group = max(1, WORKSPACE // max(1, elements_per_chunk))
    groups = [ChunkGroup(i * length, min(per_group, whole - i), length) for i in range(0, whole, per_group)]
    if whole * length < time:
        groups.append(ChunkGroup(whole * length, 1, time - whole * length))
    return groups


class Gates:
    """The exponentials of a group of chunks, each [B*H, N, C, R]; `decay` is [B*H, N, R]."""

    def __init__(self, read: Tensor, write: Tensor, log_decay: Tensor):
        total = log_decay.cumsum(-2)
        first, last = total[..., :1, :], total[..., -1:, :]
        # With a NaN in the chunk there is no midpoint. The other center bounds the exponents of the tokens
        # before the NaN, whatever they decay by.
        middle = torch.lerp(first, last, 0.5)
        center = torch.where(last <= first, middle, first - MAX_EXPONENT[total.dtype])
        self.from_center, self.to_center = (total - center).exp_(), (center - total).exp_()
        self.from_start, self.to_end = total.exp(), (last - total).exp_()
        self.decay = last.squeeze(-2).exp()
        self.read_inside, self.write_inside = read * self.from_center, write * self.to_center
        self.read_state, self.write_state = read * self.from_start, write * self.to_end


def expand(weights: Tensor, features: Tensor) -> Tensor:
    """Returns the products of weights [..., C, R] and features [..., C, K] as [..., C, R*K]."""
    return (weights.unsqueeze(-1) * features.unsqueeze(-2)).flatten(-2)


def scan(state: Tensor, decay: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Hands a state on from chunk to chunk.

    Args:
        state: [B*H, R*K, F]; decay: [B*H, N, R]; update: [B*H, N, R*K, F].

    Returns:
        The states at the start of each chunk [B*H, N, R*K, F], and the state after the last one.
    """
    key_size = update.shape[-2] // decay.shape[-1]
    decay = decay.repeat_interleave(key_size, dim=-1).unsqueeze(-1)  # [B*H, N, R*K, 1]
    starts = []
    for chunk in range(update.shape[1]):
        starts.append(state)
        state = torch.addcmul(update[:, chunk], decay[:, chunk], state)
    return torch.stack(starts, dim=1), state


def bounded(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the log decay with NOTHING in place of everything below it."""
    return log_decay.to(dtype).clamp(min=NOTHING[dtype])


def causal_product(weights: Tensor, value: Tensor) -> Tensor:
    """Returns lower triangular `weights` [B*H, N, C, C] times `value` [B*H, N, C, V].

    A plain product multiplies later values by 0, which is NaN for values that are not finite. This one leaves
    such values out, and sets their column to NaN from their token on.
    """
    return weights @ value.nan_to_num(0.0, 0.0, 0.0) + (value - value).cumsum(-2)
