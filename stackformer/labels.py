# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The labels of a language model's loss: the token that each token predicts.

Letters: B batch, T time.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from .token_layout import packed_documents


def label_each_token(
    shape: Sequence[int],
    labels: Tensor | None,
    shift_labels: Tensor | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    ignored: int = -100,
) -> Tensor:
    """Returns the label of each token [B, T], which is the label of the token after it.

    Args:
        shape: (B, T); labels: [B, T]; shift_labels: [B, T], returned unchanged if given.
        attention_mask: [B, T] or longer, 0 for padding, which predicts no label.
        position_ids, seq_idx, cu_seq_lens_q: the beginnings of packed documents, see `packed_documents`. The
            last token of a document predicts no label.
        ignored: the value that stands for no label.

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
    documents = packed_documents(shape, attention_mask, position_ids, seq_idx, cu_seq_lens_q)
    if documents is not None:
        ends = documents.diff(dim=1) != 0
        shifted = shifted.masked_fill(nn.functional.pad(ends, (0, 1), value=False), ignored)
    return shifted.contiguous()


def check_num_items(num_items_in_batch: Tensor | int | None) -> None:
    """Raises a ValueError for a number below 1. A number on a GPU is not checked, to avoid a wait."""
    on_gpu = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.device.type != "cpu"
    if num_items_in_batch is not None and not on_gpu and not num_items_in_batch > 0:
        raise ValueError(f"`num_items_in_batch` must be at least 1, got {num_items_in_batch}")


__all__ = ["check_num_items", "label_each_token"]
