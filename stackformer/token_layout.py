# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Which tokens of a batch are computed, and where they stand: as tokens, as rows, and in blocks.

The core computes active tokens only, flat: [n, ...]. `TokenLayout` maps between the batch [B, T] and these,
and between these and the rows [B', T', ...] that mixers see. Padding, halting and packing are all this one
mechanism. `BlockGrid` maps between rows and blocks of a fixed number of tokens.

Letters: B batch, T time, n active tokens; B' rows that have any, T' the longest of them; C tokens of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens of a batch [B, T] are active, and where they go when only they are computed.

    The core works on the n active tokens alone, flat: [n, ...]. Mixers, which look along time, see them as
    rows [B', T', ...] of only active tokens, left-aligned: B' rows that have any, T' as long as the longest.
    Empty slots are zeros, and a token with zero write weight and zero decay is none. Padding, halting and
    packing are all this one mechanism. `None` stands for "all, in order": nothing is moved then.
    """

    batch_size: int
    length: int
    positions: Tensor | None = None  # [n], places of the active tokens in the flattened [B, T]
    rows: Tensor | None = None  # [B'], batch indices of the rows
    slots: Tensor | None = None  # [n], places of the active tokens in the flattened [B', T'], if any is empty
    row_lengths: Tensor | None = None  # [B'], active tokens of each row, if they differ
    num_rows: int = 0  # B'
    row_length: int = 0  # T'
    documents: Tensor | None = None  # [B * T], the document of each token, if several are packed into a row
    # [n], which tokens still think, where shapes must not depend on it (compiled decoding, T = 1): the others
    # are computed but have no mass, so that all they could change is the past of a convolution.
    thinking: Tensor | None = None

    @classmethod
    def full(cls, batch_size: int, length: int) -> "TokenLayout":
        """Every token is active."""
        return cls(batch_size, length, num_rows=batch_size, row_length=length)

    @classmethod
    def from_mask(cls, active: Tensor, documents: Tensor | None = None) -> "TokenLayout":
        """Layout of a boolean mask [B, T]. The number of active tokens is read: a sync on a GPU.

        Args:
            documents: [B, T], a number for each token that changes where a new document begins: every
                document is a row of its own then.
        """
        positions = active.flatten().nonzero().squeeze(-1)
        documents = None if documents is None else documents.flatten()
        return cls._from_positions(positions, active.shape[0], active.shape[1], documents)

    @classmethod
    def _from_positions(
        cls, positions: Tensor, batch_size: int, length: int, documents: Tensor | None
    ) -> "TokenLayout":
        if documents is None and positions.numel() == batch_size * length:
            return cls.full(batch_size, length)
        if documents is None and length == 1:
            return cls(batch_size, 1, positions, positions, num_rows=len(positions), row_length=1)
        row = positions.div(length, rounding_mode="floor")
        if documents is not None:
            document = documents[positions]
            begins = (row[1:] != row[:-1]) | (document[1:] != document[:-1])
            row = torch.cat([torch.zeros_like(row[:1]), begins.cumsum(0)])
        counts = torch.bincount(row, minlength=batch_size if documents is None else 0)
        rows = counts.nonzero().squeeze(-1)
        row_lengths = counts[rows]
        row_length = int(row_lengths.max()) if len(rows) else 0
        batch_rows = None if documents is not None or len(rows) == batch_size else rows
        if len(rows) * row_length == len(positions):  # no empty slots
            return cls(
                batch_size, length, positions, batch_rows, None, None, len(rows), row_length, documents
            )
        rank = (counts > 0).cumsum(0) - 1
        offset = torch.arange(len(positions), device=positions.device) - (counts.cumsum(0) - counts)[row]
        slots = rank[row] * row_length + offset
        return cls(
            batch_size, length, positions, batch_rows, slots, row_lengths, len(rows), row_length, documents
        )

    @property
    def num_tokens(self) -> int:
        """n, the number of active tokens."""
        return self.batch_size * self.length if self.positions is None else len(self.positions)

    def row_of_tokens(self) -> Tensor:
        """The batch row [n] of each active token."""
        places = torch.arange(self.num_tokens) if self.positions is None else self.positions
        return places.div(max(self.length, 1), rounding_mode="floor")

    def places(self, keep: Tensor) -> Tensor:
        """Places in the flattened [B, T] of those active tokens that `keep` tells, in order."""
        return keep if self.positions is None else self.positions.index_select(0, keep)

    def select(self, keep: Tensor) -> "TokenLayout":
        """The layout of those active tokens, by their numbers `keep` (ascending, below n)."""
        return self._from_positions(self.places(keep), self.batch_size, self.length, self.documents)

    def as_batch(self) -> "TokenLayout":
        """The layout of the same tokens in the batch [B', T'] that their rows are."""
        return replace(
            self,
            batch_size=self.num_rows,
            length=self.row_length,
            positions=self.slots,
            rows=None,
            documents=None,
        )

    def one_by_one(self) -> "list[tuple[slice, TokenLayout]]":
        """Stretches of [B, T], and their layouts, in which every row has at most one active token."""
        if self.positions is None:
            return [(slice(t, t + 1), TokenLayout.full(self.batch_size, 1)) for t in range(self.length)]
        active = torch.zeros(self.batch_size, self.length, dtype=torch.bool, device=self.positions.device)
        active.view(-1)[self.positions] = True
        # Each stretch ends with the one position that has active tokens, and the last with the sequence.
        stops = [*((active.any(0).nonzero().squeeze(-1) + 1).tolist()[:-1]), self.length]
        spans = [slice(*bounds) for bounds in zip([0, *stops], stops, strict=False)]
        return [(span, TokenLayout.from_mask(active[:, span])) for span in spans]

    def masked(self, thinking: Tensor) -> "TokenLayout":
        """The same tokens, of which only those that `thinking` [n] marks still think (for T = 1)."""
        return replace(self, thinking=thinking, row_lengths=thinking.long())

    def before(self, time: int, device: torch.device) -> Tensor:
        """Which active tokens [n] stand before position `time` of their row."""
        if self.positions is None:
            return (torch.arange(self.length, device=device) < time).repeat(self.batch_size)
        return self.positions % self.length < time

    def gather(self, batch: Tensor) -> Tensor:
        """[B, T, ...] to the active tokens [n, ...]."""
        flat = batch.flatten(0, 1)
        return flat if self.positions is None else flat.index_select(0, self.positions)

    def scatter(self, tokens: Tensor, base: Tensor) -> Tensor:
        """`base` [B, T, ...] with the active tokens replaced by `tokens` [n, ...]."""
        if self.positions is None:
            return tokens.view(base.shape)
        return base.flatten(0, 1).index_copy(0, self.positions, tokens).view(base.shape)

    def spread(self, finished: list[tuple[Tensor, ...]], tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`tokens` ([n, ...] each) and those that finished before them to [B, T, ...], zeros for the rest.

        Args:
            finished: for each group of tokens its `places`, and then what `tokens` holds.
        """
        if self.positions is None:
            return tuple(x.view(self.batch_size, self.length, *x.shape[1:]) for x in tokens)
        groups = [*finished, (self.positions, *tokens)]
        places, *merged = (torch.cat(parts) for parts in zip(*groups, strict=True))
        shape = (self.batch_size, self.length)
        empty = (x.new_zeros(self.batch_size * self.length, *x.shape[1:]) for x in merged)
        return tuple(
            base.index_copy(0, places, x).view(*shape, *x.shape[1:])
            for base, x in zip(empty, merged, strict=True)
        )

    @overload
    def to_rows(self, tokens: Tensor, /) -> Tensor: ...

    @overload
    def to_rows(self, tokens: Tensor, /, *more: Tensor) -> list[Tensor]: ...

    def to_rows(self, *tokens):
        """Active tokens [n, ...] to rows [B', T', ...], zeros in the empty slots; several give a list."""
        rows = []
        for x in tokens:
            shape = (self.num_rows, self.row_length, *x.shape[1:])
            if self.slots is not None:
                empty = x.new_zeros(self.num_rows * self.row_length, *x.shape[1:])
                x = empty.index_copy(0, self.slots, x)
            rows.append(x.view(shape))
        return rows if len(rows) > 1 else rows[0]

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Rows [B', T', ...] to active tokens [n, ...]."""
        flat = rows.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)

    def last_of_rows(self, window: Tensor, count: int) -> Tensor:
        """The last `count` entries [B', count, ...] of each row of `window` [B', past + T', ...].

        The window is entries of the past, right-aligned, followed by the rows themselves. Where there are
        fewer than `count`, those in front are empty.
        """
        start = window.shape[1] - count
        if self.row_lengths is None:
            # A view would keep alive all that it is a view of.
            return window[:, start:].clone() if start > 0 else window
        index = self.row_lengths.unsqueeze(1) + torch.arange(count, device=window.device)
        index = (index + (start - self.row_length)) % window.shape[1]  # what wraps around are empty slots
        return _take(window, index)


def lay_out(
    shape: Sequence[int],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cache: Cache | None = None,
) -> TokenLayout:
    """The layout of a batch of shape [B, T]: padding is left out, and every packed document is a row.

    Args:
        attention_mask: [B, T] or [B, past + T], 0 for padding.
        position_ids, seq_idx, cu_seq_lens_q: where documents begin, see `packed_documents`.
        cache: with the past.

    Raises:
        ValueError: for a mask, or a packing, of another shape or kind.
    """
    check_padding_mask(shape, attention_mask, cache)
    documents = packed_documents(shape, attention_mask, position_ids, seq_idx, cu_seq_lens_q)
    batch_size, length = shape
    if attention_mask is None:
        if documents is None:
            return TokenLayout.full(batch_size, length)
        attention_mask = torch.ones_like(documents)
    active = attention_mask[:, attention_mask.shape[1] - length :].bool()
    if torch.compiler.is_compiling() and length == 1:
        return TokenLayout.full(batch_size, 1).masked(active.squeeze(1))
    return TokenLayout.from_mask(active, documents)


def check_padding_mask(shape: Sequence[int], mask: Tensor | None, cache: Cache | None) -> None:
    """Raises a ValueError for an attention mask that is no padding mask of T, or of past + T, tokens.

    Args:
        shape: (B, T); cache: with the past.
    """
    if mask is None:
        return
    batch_size, length = shape
    if mask.dim() != 2 or mask.shape[0] != batch_size or mask.shape[1] < length:
        raise ValueError(
            f"`attention_mask` must be a padding mask of shape [{batch_size}, {length}], or longer by the "
            f"tokens in the cache, got shape {tuple(mask.shape)}"
        )
    if torch.compiler.is_compiling():  # what follows reads values
        return
    if mask.shape[1] != length:
        past = 0 if cache is None else cache.get_seq_length()
        if mask.shape[1] != past + length:
            raise ValueError(
                f"`attention_mask` must have {length} columns, or {past + length} with those of the {past} "
                f"tokens in the cache, got {mask.shape[1]}"
            )
    if mask.dtype != torch.bool:
        used = mask[:, mask.shape[1] - length :]
        if not ((used == 0) | (used == 1)).all():
            raise ValueError(
                "`attention_mask` must be 1 for tokens and 0 for padding (not a mask that is added), got "
                f"{used.flatten().unique()[:5].tolist()}"
            )


def packed_documents(
    shape: Sequence[int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
) -> Tensor | None:
    """The document of each token of a batch of a shape [B, T]; `None` if every row is one document."""
    batch_size, length = shape
    if seq_idx is not None:
        documents = seq_idx
    elif cu_seq_lens_q is not None:
        bounds = cu_seq_lens_q.flatten()
        ascending = len(bounds) > 1 and bool((bounds.diff() >= 0).all())  # a document may be empty
        if batch_size != 1 or not ascending or bounds[0] != 0 or bounds[-1] != length:
            raise ValueError(
                f"`cu_seq_lens_q` must ascend from 0 to the length {length} of a batch of 1 row, got "
                f"{cu_seq_lens_q.tolist()} for {batch_size} rows"
            )
        starts = torch.zeros(length + 1, dtype=torch.long, device=bounds.device)
        documents = starts.index_fill_(0, bounds.long(), 1)[:length].cumsum(0).unsqueeze(0)
    elif position_ids is not None and length > 1:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size):
            raise ValueError(
                f"`position_ids` must have shape {(batch_size, length)}, got {tuple(position_ids.shape)}"
            )
        begins = (position_ids == 0).expand(batch_size, -1)
        if attention_mask is not None:
            # Positions of padding mean nothing, and a row's first token ends no document.
            tokens = attention_mask[:, -length:].bool()
            begins = begins & tokens & (tokens.cumsum(-1) > 1)
        documents = begins.cumsum(-1)
    else:
        return None
    if documents.shape != (batch_size, length) or documents.is_floating_point():
        raise ValueError(
            f"`seq_idx` and `position_ids` must be integers of shape {(batch_size, length)}, got "
            f"{documents.dtype} of shape {tuple(documents.shape)}"
        )
    return documents if (documents[:, 1:] != documents[:, :-1]).any() else None


class BlockGrid(NamedTuple):
    """Where the tokens of rows [B', T', ...] are in blocks of C, the first of which the past has begun.

    A row's blocks are counted from its beginning, so rows with different pasts are shifted by different
    amounts. Of a block no more than `width` = min(C, T') tokens are in the call.
    """

    num_blocks: int  # blocks that any row may have tokens in
    block: int  # C
    begun: Tensor  # [B'], tokens of the first block that the past has
    ended: Tensor  # [B'], tokens after this call, counted from the first block's beginning
    full: Tensor  # [B', num_blocks], which blocks are full after this call
    source: Tensor  # [B', num_blocks, width], which token of the row each one of a block is
    real: Tensor  # [B', num_blocks, width], where there is one
    places: Tensor  # [B', T'], where in [num_blocks * width] the tokens of the row are

    @classmethod
    def of(cls, seen: Tensor, layout: TokenLayout, block: int, fresh: bool) -> "BlockGrid":
        """The grid of rows that have `seen` [B'] tokens in the past; none have if `fresh`."""
        length = layout.row_length
        begun = seen % block
        ended = begun + (length if layout.row_lengths is None else layout.row_lengths)
        count = -(-(length if fresh else length + block - 1) // block)
        number, width = torch.arange(count, device=seen.device), min(block, length)
        first = (number * block - begun.unsqueeze(1)).clamp(min=0)  # [B', num_blocks]
        last = torch.minimum((number + 1) * block, ended.unsqueeze(1)) - begun.unsqueeze(1)
        index = first.unsqueeze(2) + torch.arange(width, device=seen.device)
        token = torch.arange(length, device=seen.device)
        of_token = (begun.unsqueeze(1) + token).div(block, rounding_mode="floor")
        return cls(
            num_blocks=count,
            block=block,
            begun=begun,
            ended=ended,
            full=(number + 1) * block <= ended.unsqueeze(1),
            source=index.clamp(max=length - 1),
            real=index < last.unsqueeze(2),
            places=of_token * width + token - first.gather(1, of_token),
        )

    def to_blocks(self, rows: Tensor) -> Tensor:
        """Rows [B', T', ...] to blocks [B', num_blocks, width, ...], anything where there is no token."""
        return _take(rows, self.source.flatten(1)).unflatten(1, self.source.shape[1:])

    def to_rows(self, blocks: Tensor) -> Tensor:
        """Blocks [B', num_blocks, width, ...] to rows [B', T', ...]."""
        return _take(blocks.flatten(1, 2), self.places)

    def place(self, rows: Tensor, pending: Tensor | None) -> Tensor:
        """Rows [B', T', d] behind the `pending` [B', C - 1, d]: [B', (num_blocks + 1) C, d], zeros
        elsewhere."""
        offset = torch.arange(rows.shape[1], device=rows.device)
        real = offset < (self.ended - self.begun).unsqueeze(1)
        index = (self.begun.unsqueeze(1) + offset).unsqueeze(-1).expand_as(rows)
        total = (self.num_blocks + 1) * self.block
        if pending is None:
            placed = rows.new_zeros(len(rows), total, rows.shape[2])
        else:
            placed = nn.functional.pad(pending, (0, 0, 0, total - pending.shape[1]))
        return placed.scatter(1, index, rows * real.unsqueeze(-1))

    def pending(self, placed: Tensor) -> Tensor:
        """The tokens [B', C - 1, d] of the last block, if it is not full, of what `place` returned."""
        first = self.ended.div(self.block, rounding_mode="floor") * self.block
        return _take(placed, first.unsqueeze(1) + torch.arange(self.block - 1, device=placed.device))


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Entries `index` [B', M] of each row of `rows` [B', T', ...]: [B', M, ...]."""
    index = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return rows.gather(1, index)


__all__ = ["BlockGrid", "TokenLayout", "lay_out", "packed_documents"]
