# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Text for the scripts: bytes of a corpus, split by position, as token ids in blocks.

A corpus is bytes before it is anything else, so positions, splits and bits per byte mean the same for every
tokenizer.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from experiments.command_line import check_input_file, one_line
from experiments.loading import check_source, hub_answers, is_hub_name, load_saved_tokenizer
from experiments.text8 import is_dump
from stackformer.tokenization_stackformer import (
    build_byte_tokenizer,
    check_vocab_size,
    is_byte_tokenizer,
    train_bpe_tokenizer,
)

# Corpora that are one file, to be downloaded by hand.
CORPUS_URLS = {
    "enwik8": "http://mattmahoney.net/dc/enwik8.zip",
    "text8": "http://mattmahoney.net/dc/text8.zip",
}
PIECE_LENGTH = 1 << 16


@dataclass
class DataArguments:
    dataset: str = field(
        metadata={
            "help": "A text file, a folder or OWNER/NAME for `datasets`, or enwik8 / text8 with --data_path."
        }
    )
    data_path: str | None = field(default=None, metadata={"help": "The local file of enwik8 or text8."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the `datasets` name."}
    )
    text_column: str = field(
        default="text", metadata={"help": "Column of the `datasets` rows that has the text."}
    )
    row_separator: str = field(default="\n", metadata={"help": "What stands between two `datasets` rows."})
    train_range: str | None = field(
        default=None, metadata={"help": "START:STOP in bytes; the first 90%% of a file if not given."}
    )
    eval_range: str | None = field(
        default=None, metadata={"help": "START:STOP in bytes; from 90%% to 95%% of a file if not given."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in a training example."})

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(
                f"block_size={self.block_size}: expected at least 2, a token and one to predict."
            )
        for name in ("train_range", "eval_range"):
            if (text := getattr(self, name)) is not None:
                parse_range(text, None, name)
        if self.dataset in CORPUS_URLS and self.data_path is None:
            url = CORPUS_URLS[self.dataset]
            raise ValueError(
                f"data_path=None: expected the local file of {self.dataset} (unpacked from {url})."
            )
        if self.data_path is not None:
            check_input_file("data_path", self.data_path)
        elif Path(self.dataset).is_file():
            check_input_file("dataset", self.dataset)
        elif not Path(self.dataset).is_dir() and not is_hub_name(self.dataset):
            raise ValueError(
                f"dataset={self.dataset!r}: expected a text file, or a folder or OWNER/NAME for `datasets`, "
                "found no such file or folder."
            )


def parse_range(text: str, size: int | None, name: str) -> tuple[int, int]:
    """The ends of "START:STOP" in a text of `size` bytes, where not given its own; errors call it `name`.

    If `size` is None, it is any.
    """
    largest = sys.maxsize if size is None else size
    try:
        first, last = text.split(":")
        start, stop = int(first or 0), int(last or largest)
    except ValueError:
        start, stop = -1, -1
    if not 0 <= start < stop <= largest:
        limit = "" if size is None else f" <= {size} bytes"
        raise ValueError(f"{name}={text!r}: expected START:STOP with 0 <= START < STOP{limit}.")
    return start, stop


def read_bytes(path: str | Path, byte_range: str | None = None, name: str = "range") -> bytes:
    """Read START:STOP of a file (all of it by default); the rest of the file is not read."""
    start, stop = parse_range(byte_range or ":", _file_size(path), name)
    with Path(path).open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def load_splits(args: DataArguments) -> tuple[bytes, bytes]:
    """The training and the evaluation text.

    A file is split by position. So is a dataset without a validation or test split; with one, that is the
    evaluation text, and the ranges select inside each of the two.
    """
    path = args.data_path or args.dataset
    if args.data_path or Path(path).is_file():
        train_range, eval_range = _ranges_by_position(args, _file_size(path))
        if args.dataset == "text8" and is_dump(path):
            raise ValueError(f"data_path={path!r}: expected text8, as `python -m scripts.text8` makes it.")
        return read_bytes(path, train_range, "train_range"), read_bytes(path, eval_range, "eval_range")
    return _load_dataset_splits(args)


def load_tokenizer(spec: str, train_text: bytes, name: str = "tokenizer") -> PreTrainedTokenizerFast:
    """A tokenizer from "byte", "bpe:VOCAB" (trained on `train_text`), or the path or name of a saved one, the
    option `name`."""
    if spec == "byte":
        return build_byte_tokenizer()
    kind, _, size = spec.partition(":")
    if kind != "bpe":
        return load_saved_tokenizer(name, spec)
    check_tokenizer(spec)
    return train_bpe_tokenizer(_chunks(train_text), int(size))


def check_tokenizer(spec: str) -> None:
    """Raises:
    ValueError: unless `load_tokenizer` may know what to do with `spec`.
    """
    kind, _, size = spec.partition(":")
    if kind == "bpe":
        if not size.isdecimal():
            raise ValueError(
                f"tokenizer={spec!r}: expected bpe:VOCAB with a vocabulary size, such as bpe:4096."
            )
        check_vocab_size(int(size))
    elif spec != "byte":
        check_source("tokenizer", spec, "tokenizer")


def encode(data: bytes, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Token ids [tokens] of a raw text.

    With the byte tokenizer the ids are the bytes themselves, exactly. Any other tokenizer gets text: the
    bytes decoded as UTF-8, with the replacement character for what is not UTF-8 (a range may cut a
    character). What looks like a special token in the text is text.
    """
    if is_byte_tokenizer(tokenizer):
        return np.frombuffer(data, dtype=np.uint8)
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    chunks = tqdm(list(_chunks(data)), desc="tokenize", unit="chunk", leave=False)
    return np.concatenate(
        [np.asarray(tokenizer(chunk, **options)["input_ids"], np.int32) for chunk in chunks]
    )


class Blocks(torch.utils.data.Dataset):
    """Consecutive blocks of `block_size` tokens that do not overlap; what is left over at the end is dropped.

    Labels are the inputs: causal language models of transformers shift them inside.
    """

    def __init__(self, ids: np.ndarray, block_size: int, name: str) -> None:
        if block_size < 2:
            raise ValueError(f"block_size={block_size}: expected at least 2, a token and one to predict.")
        if len(ids) < block_size:
            raise ValueError(
                f"block_size={block_size}: expected at most the {len(ids)} tokens of the {name} text; give a "
                "smaller --block_size, a longer text, or other --train_range and --eval_range."
            )
        self.blocks = ids[: len(ids) // block_size * block_size].reshape(-1, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": block, "labels": block}


def _file_size(path: str | Path) -> int:
    check_input_file("text", path)
    return Path(path).stat().st_size


def _ranges_by_position(args: DataArguments, size: int) -> tuple[str, str]:
    """The ranges asked for, or 90/5/5 by position, of which the last part is left for a final test."""
    train_range = args.train_range or f"0:{size * 90 // 100}"
    eval_range = args.eval_range or f"{size * 90 // 100}:{size * 95 // 100}"
    train_start, train_stop = parse_range(train_range, size, "train_range")
    eval_start, eval_stop = parse_range(eval_range, size, "eval_range")
    if max(train_start, eval_start) < min(train_stop, eval_stop):
        raise ValueError(f"eval_range={eval_range!r}: expected no overlap with train_range={train_range!r}.")
    return train_range, eval_range


def _load_dataset_splits(args: DataArguments) -> tuple[bytes, bytes]:
    import datasets  # an optional dependency: a text file needs none

    if not Path(args.dataset).is_dir() and not hub_answers():
        datasets.config.HF_HUB_OFFLINE = True  # what is in the cache will do; else, this says at once
    try:
        splits = datasets.load_dataset(args.dataset, args.dataset_config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset={args.dataset!r}: expected a text file or a dataset that `datasets` can load: "
            f"{one_line(error)}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"dataset={args.dataset!r}: expected a train split, found {sorted(splits)}.")
    train = _join_rows(splits["train"], args)
    held_out = [splits[name] for name in ("validation", "test") if name in splits]
    if not held_out:
        train_range, eval_range = _ranges_by_position(args, len(train))
        return _cut(train, train_range, "train_range"), _cut(train, eval_range, "eval_range")
    evaluation = _join_rows(held_out[0], args)
    return _cut(train, args.train_range, "train_range"), _cut(evaluation, args.eval_range, "eval_range")


def _join_rows(rows, args: DataArguments) -> bytes:
    if args.text_column not in rows.column_names:
        raise ValueError(f"text_column={args.text_column!r}: expected one of {rows.column_names}.")
    return args.row_separator.join(rows[args.text_column]).encode("utf-8")


def _cut(data: bytes, byte_range: str | None, name: str) -> bytes:
    start, stop = parse_range(byte_range or ":", len(data), name)
    return data[start:stop]


def _chunks(data: bytes) -> Iterator[str]:
    """The text in chunks, so that no tokenizer has to hold a whole corpus at once."""
    text = data.decode("utf-8", errors="replace")
    return (text[start : start + PIECE_LENGTH] for start in range(0, len(text), PIECE_LENGTH))


__all__ = [
    "Blocks",
    "DataArguments",
    "check_tokenizer",
    "encode",
    "load_splits",
    "load_tokenizer",
    "parse_range",
    "read_bytes",
]
