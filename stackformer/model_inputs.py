# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""What a model is called with: padding masks, packed documents and labels, checked and brought into one form.

Letters: B batch, T time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .token_layout import TokenLayout


def check_padding_mask(embeds: Tensor, mask: Tensor | None, cache: Cache | None) -> None:
    """Raises a ValueError for an attention mask that is no padding mask of T, or of past + T, tokens."""
    if mask is None:
        return
    batch_size, length = embeds.shape[:2]
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


def check_depths(depths: Tensor | None, layout: TokenLayout) -> None:
    """Raises a ValueError for depths of another shape, or of less than one step for a token that is read."""
    if depths is None:
        return
    shape = (layout.batch_size, layout.length)
    if tuple(depths.shape) != shape:
        raise ValueError(f"`ponder_depths` must have shape {shape}, got {tuple(depths.shape)}")
    asked = layout.gather(depths)
    if asked.numel() and not torch.compiler.is_compiling() and not (asked >= 1).all():
        raise ValueError(f"`ponder_depths` must be at least 1 for every token, got {float(asked.min())}")


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


def label_each_token(
    shape: Sequence[int],
    labels: Tensor | None,
    shift_labels: Tensor | None,
    attention_mask: Tensor | None = None,
    documents: Tensor | None = None,
    ignored: int = -100,
) -> Tensor:
    """The label of each token [B, T], which is the token after it, as losses take it.

    Args:
        shape: (B, T); labels: [B, T], or `shift_labels`: [B, T], which are taken as they are.
        attention_mask: [B, T] or longer, 0 for padding, which predicts nothing.
        documents: [B, T], changes where a document begins, whose first token nothing predicts.
        ignored: stands for no label.

    Raises:
        ValueError: for labels of another shape, or that are no integers.
    """
    given = labels if shift_labels is None else shift_labels
    if given is None or tuple(given.shape) != tuple(shape) or given.is_floating_point():
        found = "None" if given is None else f"{given.dtype} of shape {tuple(given.shape)}"
        raise ValueError(f"`labels` or `shift_labels` must be integers of shape {tuple(shape)}, got {found}")
    if shift_labels is not None:
        return shift_labels
    shifted = nn.functional.pad(given, (0, 1), value=ignored)[:, 1:]
    if attention_mask is not None:
        tokens = attention_mask[:, attention_mask.shape[1] - shape[1] :].bool()
        shifted = shifted.masked_fill(~tokens, ignored)
    if documents is not None:
        ends = documents.diff(dim=1) != 0
        shifted = shifted.masked_fill(nn.functional.pad(ends, (0, 1), value=False), ignored)
    return shifted.contiguous()


def check_num_items(num_items_in_batch: Tensor | int | None) -> None:
    """Raises a ValueError for a number of labels that nothing can be divided by. One on a GPU is not looked
    at: it would be waited for."""
    on_gpu = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.device.type != "cpu"
    if num_items_in_batch is not None and not on_gpu and not num_items_in_batch > 0:
        raise ValueError(f"`num_items_in_batch` must be at least 1, got {num_items_in_batch}")
