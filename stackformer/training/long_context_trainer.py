# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer for documents of any length, with full gradients and a state that is carried on.

Each row of a batch is a stream, which reads documents one after the other. At every optimizer step, each
stream reads a segment of `context_length` tokens. Gradients flow through the whole segment. The state at its
end is carried to the next step until the document ends.
"""

import heapq
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, default_data_collator

from ..cache_stackformer import StackformerCache
from .checkpoints import WholeCheckpoints
from .long_context import METHODS, long_context_backward, long_context_loss
from .trainer import EvaluatedFirst, SelectiveDecay


@dataclass
class LongContextArguments(TrainingArguments):
    """The `TrainingArguments` of a [`LongContextTrainer`]."""

    context_length: int | None = field(
        default=65536,
        metadata={"help": "Tokens of each stream per step, with full gradients; None: a whole document."},
    )
    chunk_size: int = field(default=1024, metadata={"help": "Tokens that run at once."})
    backpropagation: str = field(
        default="reverse",
        metadata={"help": f"Method to find the state at the start of a chunk: one of {METHODS}."},
    )
    max_log_decay: float = field(
        default=6.0,
        metadata={"help": "With 'reverse': nats by which a memory may decay or grow before it is copied."},
    )
    max_drift: float = field(
        default=1e-2,
        metadata={"help": "Training stops if a reconstructed state has a larger relative error."},
    )
    state_storage: str = field(
        default="device", metadata={"help": "Place of copied states: device, cpu, or a folder."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: streams have columns the model does not take."}
    )
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Must be sequential: streams have an order."}
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Progress is counted in tokens."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, expected in (
            ("remove_unused_columns", False),
            ("train_sampling_strategy", "sequential"),
            ("auto_find_batch_size", False),
            ("label_smoothing_factor", 0.0),
        ):
            if getattr(self, name) != expected:
                raise ValueError(
                    f"`{name}` must be {expected!r} to train on streams, got {getattr(self, name)!r}"
                )
        if self.context_length is not None and self.context_length < 1:
            raise ValueError(f"`context_length` must be at least 1 or None, got {self.context_length}")
        if self.chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1, got {self.chunk_size}")
        if self.backpropagation not in METHODS:
            raise ValueError(f"`backpropagation` must be one of {METHODS}, got {self.backpropagation!r}")
        for name in ("max_log_decay", "max_drift"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}")
        if self.state_storage not in ("device", "cpu") and not Path(self.state_storage).is_dir():
            raise ValueError(
                f"`state_storage` must be 'device', 'cpu' or an existing folder, got {self.state_storage!r}"
            )


class DocumentStreams(torch.utils.data.Dataset):
    """Distributes documents over `num_streams` streams, and cuts them into segments.

    Item `step * num_streams + stream` is the segment that the stream reads at that step. It has `input_ids`,
    `attention_mask` and `shift_labels` (also called `labels`), padded to the longest segment of the step, and
    `continues`: whether it continues the document of the stream's segment before.

    Args:
        documents: a list, a `datasets.Dataset`, or anything else with a length and numbered items. A document
            is its token ids, at least two, or a dict with `input_ids` and, optionally, `labels` that are not
            shifted.
        num_streams: streams that are read side by side. Each document, in order, goes to the stream that has
            the fewest tokens.
        context_length: tokens of a segment; `None` for whole documents.
        vocab_size: upper limit of ids and labels; `None` for no limit.

    Raises:
        ValueError: for a document that is no sequence of token ids; the message has its number.
    """

    def __init__(
        self,
        documents: Sequence,
        num_streams: int,
        context_length: int | None = None,
        vocab_size: int | None = None,
    ):
        if isinstance(documents, str | bytes | dict) or not isinstance(documents, Sized):
            raise ValueError(f"`documents` must be a list of documents, got {type(documents).__name__}")
        if len(documents) == 0:
            raise ValueError("`documents` must be at least one, got none")
        if num_streams < 1:
            raise ValueError(f"`num_streams` must be at least 1, got {num_streams}")
        if context_length is not None and context_length < 1:
            raise ValueError(f"`context_length` must be at least 1 or None, got {context_length}")
        self.documents, self.num_streams = documents, num_streams
        # For each stream, (document, start, stop) of its segments. A document's last token predicts nothing.
        self.segments: list[list[tuple[int, int, int]]] = [[] for _ in range(num_streams)]
        shortest = [(0, stream) for stream in range(num_streams)]
        for number in range(len(documents)):
            length = _checked_length(documents[number], number, vocab_size) - 1
            if length < 1:
                raise ValueError(
                    f"`documents` must have at least two tokens each, got {length + 1}: {number}"
                )
            size = context_length or length
            tokens, stream = heapq.heappop(shortest)
            self.segments[stream] += [
                (number, start, min(start + size, length)) for start in range(0, length, size)
            ]
            heapq.heappush(shortest, (tokens + length, stream))
        self.num_steps = max(map(len, self.segments))

    def __len__(self) -> int:
        return self.num_steps * self.num_streams

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if not 0 <= item < len(self):
            raise IndexError(f"{item} is not among {len(self)} items")
        step, stream = divmod(item, self.num_streams)
        now = [segments[step] for segments in self.segments if step < len(segments)]
        length = max(stop - start for _, start, stop in now)
        input_ids = torch.zeros(length, dtype=torch.long)
        labels, mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
        start = 0
        if step < len(self.segments[stream]):
            number, start, stop = self.segments[stream][step]
            ids, targets = _token_ids(self.documents[number])
            size = stop - start
            input_ids[:size] = torch.from_numpy(np.asarray(ids[start:stop], dtype=np.int64))
            labels[:size] = torch.from_numpy(np.asarray(targets[start + 1 : stop + 1], dtype=np.int64))
            mask[:size] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            "shift_labels": labels,
            "continues": torch.tensor(start > 0),
        }


class LongContextTrainer(SelectiveDecay, WholeCheckpoints, EvaluatedFirst, Trainer):
    """A Trainer with [`LongContextArguments`], whose datasets are documents (see [`DocumentStreams`]).

    Checkpoints have the states of the streams, so a run resumes in the middle of its documents. The log also
    has `drift` and `kept_bytes_per_token` (see [`LongContextOutput`]). An evaluation computes the loss only,
    as the mean over steps.
    """

    args: LongContextArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: LongContextArguments | None = None,
        data_collator: Any = default_data_collator,
        train_dataset: Sequence | None = None,
        eval_dataset: Sequence | dict[str, Sequence] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, LongContextArguments):
            raise ValueError(f"`args` must be LongContextArguments, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(f"A process must have one GPU: use `accelerate launch`, got {args.n_gpu} GPUs")
        streams = None
        if train_dataset is not None:
            num_streams = args.train_batch_size * args.world_size
            size = None if model is None else cast(Any, model).config.vocab_size
            streams = DocumentStreams(train_dataset, num_streams, args.context_length, size)
        self._carried: StackformerCache | None = None
        self._carried_in_evaluation: StackformerCache | None = None
        # The drift of each step since the last log, and its kept bytes per token.
        self._drifts: list[float] = []
        self._kept: list[float] = []
        super().__init__(model, args, data_collator, streams, eval_dataset, **kwargs)
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed runs the backward pass itself: use DDP or FSDP2")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Returns the loader of the streams of `eval_dataset`, or of the dataset with that name."""
        documents = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(documents, str):
            documents = self.eval_dataset[documents]
        streams = self.args.eval_batch_size * self.args.world_size
        size = self.model.config.vocab_size
        return super().get_eval_dataloader(
            DocumentStreams(documents, streams, self.args.context_length, size)
        )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Read a segment of each stream, and add the gradients of the loss to those of the parameters."""
        model.train()
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        scaler = self.accelerator.scaler  # with float16

        def scale_loss(loss: Tensor) -> Tensor:
            return loss * scale if scaler is None else scaler.scale(loss * scale)

        inputs = self._prepare_inputs(inputs)
        output = long_context_backward(
            model,
            inputs["input_ids"],
            shift_labels=inputs["shift_labels"],
            attention_mask=inputs["attention_mask"],
            cache=_continued(self._carried, inputs["continues"]),
            num_items_in_batch=_at_least_one(num_items_in_batch),
            chunk_size=self.args.chunk_size,
            method=self.args.backpropagation,
            max_log_decay=self.args.max_log_decay,
            max_drift=self.args.max_drift,
            storage=self.args.state_storage,
            scale_loss=scale_loss,
        )
        self._carried = output.cache
        self._drifts.append(output.drift)
        self._kept.append(output.kept_bytes / inputs["input_ids"].numel())
        return output.loss * scale

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Read a segment of each stream. Returns the loss, and no predictions."""
        inputs = self._prepare_inputs(inputs)
        num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        output = long_context_loss(
            model,
            inputs["input_ids"],
            shift_labels=inputs["shift_labels"],
            attention_mask=inputs["attention_mask"],
            cache=_continued(self._carried_in_evaluation, inputs["continues"]),
            num_items_in_batch=_at_least_one(num_items_in_batch),
            chunk_size=self.args.chunk_size,
        )
        self._carried_in_evaluation = output.cache
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return output.loss * scale, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log. With the training loss, add drift and kept bytes of this process since the last log."""
        if "loss" in logs and self._drifts:
            logs["drift"] = max(self._drifts)
            logs["kept_bytes_per_token"] = round(sum(self._kept) / len(self._kept), 1)
            self._drifts, self._kept = [], []
        super().log(logs, start_time)

    # A process resumes with its random state and the states of its streams.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        streams = None
        if self._carried is not None:
            streams = [layer.slices for layer in self._carried.layers], self._carried.get_seq_length()
        torch.save(streams, Path(output_dir) / streams_files(self.args)[self.args.process_index])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / streams_files(self.args)[self.args.process_index]
        if not path.is_file():
            raise ValueError(
                f"`resume_from_checkpoint` must hold {path.name}, the states of this process' streams: a run "
                f"is resumed with as many processes and streams as it had, got {checkpoint!r}"
            )
        streams = torch.load(path, map_location=self.args.device, weights_only=True)
        if streams is not None:
            self._carried = StackformerCache(self.model.config)
            for layer, slices in zip(self._carried.layers, streams[0], strict=True):
                layer.load(slices, streams[1], self.args.device)


def streams_files(args: TrainingArguments) -> list[str]:
    """Returns the names of a checkpoint's files with the states of the streams, one for each process."""
    return [f"streams_{number}_of_{args.world_size}.pt" for number in range(args.world_size)]


def _token_ids(document: Any) -> tuple[Any, Any]:
    """Returns the token ids and the labels of a document."""
    if isinstance(document, dict):
        return document["input_ids"], document.get("labels", document["input_ids"])
    return document, document


def _checked_length(document: Any, number: int, vocab_size: int | None) -> int:
    """Returns the number of tokens of a document. Raises a ValueError if a token or label is no id."""
    if isinstance(document, str | bytes) or (isinstance(document, dict) and "input_ids" not in document):
        kind = f"a {type(document).__name__}" if not isinstance(document, dict) else f"{sorted(document)}"
        raise ValueError(
            f"`documents` must be token ids, or dicts with `input_ids`, got {kind} as document {number}"
        )
    ids, labels = _token_ids(document)
    for name, values, lowest in (("input_ids", ids, 0), ("labels", labels, -100)):
        array = np.asarray(values)
        if array.ndim != 1 or (array.size > 0 and not np.issubdtype(array.dtype, np.integer)):
            raise ValueError(
                f"`documents` must have a row of integers as `{name}`, got shape {array.shape} of "
                f"{array.dtype} in document {number}"
            )
        if len(array) != len(ids):
            raise ValueError(
                f"`documents` must have as many `labels` as `input_ids`, got {len(array)} and {len(ids)} in "
                f"document {number}"
            )
        wrong = (array < 0) & (array != lowest) | (array >= (vocab_size or np.inf))
        if wrong.any():
            limit = "" if vocab_size is None else f" below {vocab_size}"
            others = "" if lowest == 0 else ", or -100"
            raise ValueError(
                f"`documents` must have ids{limit}, not negative{others}, as `{name}`, got "
                f"{array[wrong][0]} in document {number}"
            )
        if labels is ids:
            break
    return len(ids)


def _at_least_one(num_items_in_batch: Tensor | int | None) -> Tensor | int | None:
    """Returns the divisor of the loss, at least 1: the loss of a step without labels is 0, not 0 / 0."""
    if isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch.clamp(min=1)
    return num_items_in_batch if num_items_in_batch is None else max(num_items_in_batch, 1)


def _continued(cache: StackformerCache | None, continues: Tensor) -> StackformerCache | None:
    """Returns the state for a step: zeros in the rows that start a new document; `None` if all rows do."""
    if not continues.any():
        return None
    if cache is None or cache.batch_size != len(continues):
        size = 0 if cache is None else cache.batch_size
        raise ValueError(f"There must be the states of {len(continues)} streams to go on from, got {size}")
    cache = cache.clone()
    for layer in cache.layers:
        layer.map_(lambda tensor: tensor * continues.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.dtype))
    return cache


__all__ = ["DocumentStreams", "LongContextArguments", "LongContextTrainer", "streams_files"]
