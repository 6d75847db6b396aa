# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Maps between a batch, its active tokens, the rows that mixers read, and chunks of these rows.

- `TokenLayout` maps between the batch [B, T, ...], the flat active tokens [n, ...] that the core computes,
  and the rows [B', T', ...] that mixers read. Padding, halting and packing all use this one mechanism.
- `ChunkGrid` maps between rows and chunks of a fixed number of tokens.
- `lay_out` makes the layout of a batch from its attention mask and its packed documents.

Letters: B batch, T time, n active tokens, B' rows with active tokens, T' the most active tokens of a row, C
tokens of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache


@dataclass(frozen=True)
class TokenLayout:
    """Index maps between the batch [B, T] and the tokens that are still computed, the active tokens.

    The core works on the n active tokens alone, flat: [n, ...]. Mixers, which work along time, read them as
    left-aligned rows [B', T', ...]. There are B' rows with active tokens, and the longest has T' of them.
    Empty slots hold zeros: a slot with zero write weight and zero decay does not change a memory. An index
    of `None` means "all, in order"; nothing is moved then.
    """

    batch_size: int  # B
    length: int  # T
    positions: Tensor | None = None  # [n], indices of the active tokens in the flattened [B, T]
    rows: Tensor | None = None  # [B'], batch indices of the rows
    slots: Tensor | None = None  # [n], indices of the active tokens in the flat [B', T'], if any is empty
    row_lengths: Tensor | None = None  # [B'], active tokens of each row, if they differ
    num_rows: int = 0  # B'
    row_length: int = 0  # T'
    documents: Tensor | None = None  # [B * T], the document of each token, if several are packed into a row
    # [n], marks the tokens that are neither padding nor halted, in compiled decoding (T = 1), where shapes
    # must not depend on them. The other tokens are computed, too, but have no mass. They could change only
    # the past of a convolution, which `row_lengths` prevents.
    thinking: Tensor | None = None

    @classmethod
    def full(cls, batch_size: int, length: int) -> "TokenLayout":
        """Returns the layout of a batch in which every token is active."""
        return cls(batch_size, length, num_rows=batch_size, row_length=length)

    @classmethod
    def from_mask(cls, active: Tensor, documents: Tensor | None = None) -> "TokenLayout":
        """Returns the layout of a boolean mask [B, T]. On a GPU, the call waits for the number of tokens.

        Args:
            documents: [B, T], a number for each token, which changes at the first token of each document.
                Every document becomes a row of its own.
        """
        positions = active.flatten().nonzero().squeeze(-1)
        documents = None if documents is None else documents.flatten()
        return cls._from_positions(positions, active.shape[0], active.shape[1], documents)

    @classmethod
    def _from_positions(
        cls, positions: Tensor, batch_size: int, length: int, documents: Tensor | None
    ) -> "TokenLayout":
        """Returns the layout of active tokens at `positions` [n]. `documents` [B * T] splits batch rows."""
        if documents is None and positions.numel() == batch_size * length:
            return cls.full(batch_size, length)
        if documents is None and length == 1:
            return cls(batch_size, 1, positions, positions, num_rows=len(positions), row_length=1)
        row = positions.div(length, rounding_mode="floor")  # [n], the row of each token
        if documents is not None:
            document = documents[positions]
            begins = (row[1:] != row[:-1]) | (document[1:] != document[:-1])
            row = torch.cat([torch.zeros_like(row[:1]), begins.cumsum(0)])
        counts = torch.bincount(row, minlength=batch_size if documents is None else 0)
        rows = counts.nonzero().squeeze(-1)  # [B']
        row_lengths = counts[rows]  # [B']
        row_length = int(row_lengths.max()) if len(rows) else 0
        batch_rows = None if documents is not None or len(rows) == batch_size else rows
        if len(rows) * row_length == len(positions):  # no empty slots
            return cls(
                batch_size, length, positions, batch_rows, None, None, len(rows), row_length, documents
            )
        rank = (counts > 0).cumsum(0) - 1  # number of each row among those with active tokens
        # [n], the place of each token in its row
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
        """Indices in the flattened [B, T] of the active tokens with the numbers `keep`."""
        return keep if self.positions is None else self.positions.index_select(0, keep)

    def select(self, keep: Tensor) -> "TokenLayout":
        """Returns the layout of the active tokens with the numbers `keep` (ascending, below n)."""
        return self._from_positions(self.places(keep), self.batch_size, self.length, self.documents)

    def as_batch(self) -> "TokenLayout":
        """Returns the layout of the same tokens in a batch [B', T'] that consists of their rows."""
        return replace(
            self,
            batch_size=self.num_rows,
            length=self.row_length,
            positions=self.slots,
            rows=None,
            documents=None,
        )

    def one_by_one(self) -> "list[tuple[slice, TokenLayout]]":
        """Splits [B, T] along time so that every row has at most one active token in a part.

        Returns:
            A slice of time and a layout for each part.
        """
        if self.positions is None:
            return [(slice(t, t + 1), TokenLayout.full(self.batch_size, 1)) for t in range(self.length)]
        active = torch.zeros(self.batch_size, self.length, dtype=torch.bool, device=self.positions.device)
        active.view(-1)[self.positions] = True  # view: [B, T] -> [B * T]
        # Each part ends with its only position that has active tokens. The last part ends with the sequence.
        stops = [*((active.any(0).nonzero().squeeze(-1) + 1).tolist()[:-1]), self.length]
        spans = [slice(*bounds) for bounds in zip([0, *stops], stops, strict=False)]
        return [(span, TokenLayout.from_mask(active[:, span])) for span in spans]

    def masked(self, thinking: Tensor) -> "TokenLayout":
        """Returns the layout of the same tokens, in which only those in `thinking` [n] count (for T = 1)."""
        return replace(self, thinking=thinking, row_lengths=thinking.long())

    def before(self, time: int, device: torch.device) -> Tensor:
        """Marks the active tokens [n] at positions of the batch row before `time`."""
        if self.positions is None:
            return (torch.arange(self.length, device=device) < time).repeat(self.batch_size)
        return self.positions % self.length < time

    def gather(self, batch: Tensor) -> Tensor:
        """Maps a batch [B, T, ...] to the active tokens [n, ...]."""
        flat = batch.flatten(0, 1)
        return flat if self.positions is None else flat.index_select(0, self.positions)

    def scatter(self, tokens: Tensor, base: Tensor) -> Tensor:
        """Returns `base` [B, T, ...] with the active tokens replaced by `tokens` [n, ...]."""
        if self.positions is None:
            return tokens.view(base.shape)
        return base.flatten(0, 1).index_copy(0, self.positions, tokens).view(base.shape)

    def spread(self, finished: list[tuple[Tensor, ...]], tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Maps active tokens, and tokens that halted before them, to [B, T, ...] with zeros for the rest.

        Args:
            finished: for each group of halted tokens its `places`, then tensors like those of `tokens`.
            tokens: several tensors of the active tokens, [n, ...] each.

        Returns:
            [B, T, ...] for each tensor of `tokens`.
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
        """Maps active tokens [n, ...] to rows [B', T', ...], with zeros in the empty slots.

        Several arguments give a list.
        """
        rows = []
        for x in tokens:
            shape = (self.num_rows, self.row_length, *x.shape[1:])
            if self.slots is not None:
                empty = x.new_zeros(self.num_rows * self.row_length, *x.shape[1:])
                x = empty.index_copy(0, self.slots, x)
            rows.append(x.view(shape))
        return rows if len(rows) > 1 else rows[0]

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Maps rows [B', T', ...] to active tokens [n, ...]."""
        flat = rows.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)

    def last_of_rows(self, window: Tensor, count: int) -> Tensor:
        """Returns the last `count` entries [B', count, ...] of each row of `window` [B', past + T', ...].

        The window holds entries of the past, right-aligned, followed by the rows themselves. Of a row that
        has fewer than `count` entries, the first are empty.
        """
        start = window.shape[1] - count
        if self.row_lengths is None:
            # The clone lets the window be freed, which a view would keep alive.
            return window[:, start:].clone() if start > 0 else window
        index = self.row_lengths.unsqueeze(1) + torch.arange(count, device=window.device)  # [B', count]
        index = (index + (start - self.row_length)) % window.shape[1]  # indices that wrap are empty slots
        return _take(window, index)


def lay_out(
    shape: Sequence[int],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cache: Cache | None = None,
) -> TokenLayout:
    """Returns the layout of a batch [B, T], without padding, and with a row for every packed document.

    Args:
        shape: (B, T).
        attention_mask: [B, T] or [B, past + T], 0 for padding.
        position_ids, seq_idx, cu_seq_lens_q: the beginnings of documents, see `packed_documents`.
        cache: holds the past of the rows.

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
    """Raises a ValueError unless `mask` is a padding mask of T, or of past + T, tokens.

    Args:
        shape: (B, T); mask: `None` if there is no padding; cache: holds the past of the rows.
    """
    if mask is None:
        return
    batch_size, length = shape
    if mask.dim() != 2 or mask.shape[0] != batch_size or mask.shape[1] < length:
        raise ValueError(
            f"`attention_mask` must be a padding mask of shape [{batch_size}, {length}], or longer by the "
            f"tokens in the cache, got shape {tuple(mask.shape)}"
        )
    if torch.compiler.is_compiling():  # the checks below read values
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
    """Returns a number [B, T] for each token that differs between neighbouring documents of a row.

    The boundaries are given by `seq_idx` [B, T], which is returned as it is, or by `cu_seq_lens_q`, the
    cumulated lengths of the documents of a single row, or by `position_ids`, which are 0 at the first token
    of each document. `None` if every row is one document.
    """
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
            # Padding begins no document, and neither does the first token of a row.
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


class ChunkGrid(NamedTuple):
    """Index maps between rows [B', T', ...] and chunks of C tokens.

    Chunks are counted from the beginning of a row's text. The past may have begun the first chunk of a call,
    so rows with different pasts are shifted by different amounts. At most `width` = min(C, T') tokens of a
    chunk are in the call.
    """

    num_chunks: int  # the most chunks in which a row can have tokens
    chunk_size: int  # C
    begun: Tensor  # [B'], tokens of the first chunk that are in the past
    ended: Tensor  # [B'], tokens after this call, counted from the beginning of the first chunk
    full: Tensor  # [B', num_chunks], whether the chunk is full after this call
    source: Tensor  # [B', num_chunks, width], index of each token in its row
    real: Tensor  # [B', num_chunks, width], whether there is a token
    places: Tensor  # [B', T'], index of each token of a row in the flattened [num_chunks, width]

    @classmethod
    def of(cls, seen: Tensor, layout: TokenLayout, chunk_size: int, fresh: bool) -> "ChunkGrid":
        """Returns the grid of rows that have `seen` [B'] tokens in the past. `fresh` says that all have 0."""
        length = layout.row_length
        begun = seen % chunk_size
        ended = begun + (length if layout.row_lengths is None else layout.row_lengths)
        count = -(-(length if fresh else length + chunk_size - 1) // chunk_size)
        number, width = torch.arange(count, device=seen.device), min(chunk_size, length)
        # [B', num_chunks] each: the chunk's first token in the row, and the token after its last
        first = (number * chunk_size - begun.unsqueeze(1)).clamp(min=0)
        stop = torch.minimum((number + 1) * chunk_size, ended.unsqueeze(1)) - begun.unsqueeze(1)
        index = first.unsqueeze(2) + torch.arange(width, device=seen.device)  # [B', num_chunks, width]
        token = torch.arange(length, device=seen.device)
        of_token = (begun.unsqueeze(1) + token).div(chunk_size, rounding_mode="floor")  # [B', T'], its chunk
        return cls(
            num_chunks=count,
            chunk_size=chunk_size,
            begun=begun,
            ended=ended,
            full=(number + 1) * chunk_size <= ended.unsqueeze(1),
            source=index.clamp(max=length - 1),
            real=index < stop.unsqueeze(2),
            places=of_token * width + token - first.gather(1, of_token),
        )

    def to_chunks(self, rows: Tensor) -> Tensor:
        """Maps rows [B', T', ...] to chunks [B', num_chunks, width, ...]. Empty slots hold any values."""
        return _take(rows, self.source.flatten(1)).unflatten(1, self.source.shape[1:])

    def to_rows(self, chunks: Tensor) -> Tensor:
        """Maps chunks [B', num_chunks, width, ...] to rows [B', T', ...]."""
        return _take(chunks.flatten(1, 2), self.places)

    def place(self, rows: Tensor, pending: Tensor | None) -> Tensor:
        """Puts rows [B', T', d] behind the `pending` tokens [B', C - 1, d] of an unfinished chunk.

        Returns:
            [B', (num_chunks + 1) C, d], with zeros behind the tokens.
        """
        offset = torch.arange(rows.shape[1], device=rows.device)
        real = offset < (self.ended - self.begun).unsqueeze(1)
        index = (self.begun.unsqueeze(1) + offset).unsqueeze(-1).expand_as(rows)
        total = (self.num_chunks + 1) * self.chunk_size
        if pending is None:
            placed = rows.new_zeros(len(rows), total, rows.shape[2])
        else:
            placed = nn.functional.pad(pending, (0, 0, 0, total - pending.shape[1]))
        return placed.scatter(1, index, rows * real.unsqueeze(-1))

    def pending(self, placed: Tensor) -> Tensor:
        """Returns the tokens [B', C - 1, d] of the chunk that is unfinished, from the result of `place`."""
        first = self.ended.div(self.chunk_size, rounding_mode="floor") * self.chunk_size
        return _take(placed, first.unsqueeze(1) + torch.arange(self.chunk_size - 1, device=placed.device))


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Returns the entries `index` [B', M] of each row of `rows` [B', T', ...], as [B', M, ...]."""
    # [B', M] -> [B', M, 1, ...] -> [B', M, ...]
    index = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return rows.gather(1, index)


__all__ = ["ChunkGrid", "TokenLayout", "lay_out", "packed_documents"]
