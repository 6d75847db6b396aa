# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""One process of those that share sequences, which tests/test_sequence_parallel.py compares with one alone.

    RANK=0 WORLD_SIZE=3 python -m tests.sequence_parallel_worker FOLDER
    RANK=0 WORLD_SIZE=4 python -m tests.sequence_parallel_worker FOLDER ddp

The folder gets what each process had of each case: RANK.pt. With "ddp", what it had of a training in which
each half of the processes shares sequences of its own.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stackformer.labels import label_each_token
from stackformer.training.sequence_parallel import SequenceParallelCache, shard_sequence
from tests.models import SHAPES, random_ids, tiny_model

# By name: number of processes, fields of the model; number of tokens, where those of each row start and stop,
# after how many ponder steps those of each process are done.
CASES: dict[str, dict[str, Any]] = {
    **{f"{name}, 2": {"size": 2, "fields": SHAPES[name]} for name in list(SHAPES)[:4]},
    "halting stack, 3": {"size": 3, "fields": {"ponder_loss_coef": 0.1}, "length": 20},
    "chunks shorter than the kernel": {"size": 3, "fields": {}, "length": 5},
    "kernel of one": {"size": 2, "fields": {"conv_kernel_size": 1}},
    "left padding": {"size": 3, "fields": {}, "length": 12, "padding": [(7, 12), (0, 12), (5, 12)]},
    "ragged": {"size": 3, "fields": {}, "length": 12, "padding": [(0, 3), (2, 10), (0, 12)]},
    "nothing for the first": {"size": 3, "fields": {}, "length": 12, "padding": [(5, 12)] * 3},
    "nothing for the last two": {"size": 3, "fields": {}, "length": 12, "padding": [(0, 4)] * 3},
    # At some steps only some processes have active tokens.
    "done at different depths": {"size": 3, "fields": {}, "length": 12, "depths": [1, 4, 2]},
    "checkpointing": {"size": 2, "fields": {}, "checkpointing": True},
}


def make_batch(
    length: int = 13, padding: list[tuple[int, int]] | None = None, depths: list[int] | None = None
) -> dict[str, Tensor]:
    """Three rows, with labels for all but some tokens."""
    ids = random_ids(3, length)
    mask = torch.ones_like(ids)
    for row, (start, stop) in enumerate(padding or []):
        mask[row] = 0
        mask[row, start:stop] = 1
    labels = ids.masked_fill((mask == 0) | (torch.arange(length) % 5 == 3), -100)
    batch = {"input_ids": ids, "labels": labels}
    if padding is not None:
        batch["attention_mask"] = mask
    if depths is not None:
        batch["ponder_depths"] = torch.tensor(depths).repeat_interleave(length // len(depths)).expand(3, -1)
    return batch


def make_model(fields: dict[str, Any], checkpointing: bool = False) -> torch.nn.Module:
    """In training, for its loss and its checkpointing."""
    model = tiny_model(**fields)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def read(model: torch.nn.Module, cache: Any, **inputs: Any) -> dict[str, Any]:
    """One forward and backward pass: what came of it."""
    outputs = model(**inputs, past_key_values=cache, use_cache=True)
    outputs.loss.backward()
    return {
        "logits": outputs.logits.detach(),
        "loss": outputs.loss.detach(),
        "steps": outputs.ponder_steps.detach(),
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


def run(name: str, group: dist.ProcessGroup) -> dict[str, Any]:
    case = dict(CASES[name])
    case.pop("size")
    fields, checkpointing = case.pop("fields"), case.pop("checkpointing", False)
    batch = make_batch(**case)
    depths = batch.pop("ponder_depths", None)
    shard = shard_sequence(**batch, group=group)
    if depths is not None:
        shard["ponder_depths"] = depths.tensor_split(group.size(), dim=1)[group.rank()]
    model = make_model(fields, checkpointing)
    cache = SequenceParallelCache(model.config, group)
    result = read(model, cache, **shard)
    whole = cache.whole()
    result["state"] = [dict(layer.slices) for layer in whole.layers]
    result["seen"] = whole.get_seq_length()
    with torch.no_grad():
        ids = random_ids(3, 2, seed=1)
        result["next"] = model(ids, past_key_values=whole).logits
    return result


def refuse(group: dist.ProcessGroup) -> None:
    """What cannot be split over processes is refused on each of them."""
    shard = shard_sequence(**make_batch(), group=group)
    model = make_model(SHAPES["hybrid stack"])
    with pytest.raises(ValueError, match="`mixer_types` must be mixers .* got Attention, which has no"):
        model(**shard, past_key_values=SequenceParallelCache(model.config, group))
    model = make_model({})
    cache = SequenceParallelCache(model.config, group)
    model(**shard, past_key_values=cache)
    with pytest.raises(ValueError, match="must be new for each call"):
        model(**shard, past_key_values=cache)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="must be {'use_reentrant': False} with feedback, or with a cache"):
        model(**shard, past_key_values=SequenceParallelCache(model.config, group))
    with pytest.raises(ValueError, match="at least as many tokens as there are processes"):
        shard_sequence(random_ids(1, 1), group=group)


def train(model: torch.nn.Module, step: Callable[[dict[str, Any], Tensor], Tensor]) -> dict[str, Any]:
    """Two steps of SGD, each on the ragged rows of another batch.

    Args:
        step: from a batch, and its number of labels, to the loss that is to be propagated back.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for length in (12, 15):
        batch = make_batch(length=length, padding=[(0, 3), (2, 10), (0, length)])
        labels = label_each_token(batch["input_ids"].shape, batch["labels"], None, batch["attention_mask"])
        count = labels.ne(-100).sum()
        optimizer.zero_grad()
        loss = step(batch, count)
        loss.backward()
        losses.append(loss.detach())
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        optimizer.step()
    return {"losses": losses, "grads": grads, "weights": model.state_dict()}


def train_in_parallel(checkpointing: bool) -> dict[str, Any]:
    """The first half of the processes shares two rows, the second half the third one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    halves = [list(range(size // 2)), list(range(size // 2, size))]
    groups = [dist.new_group(half) for half in halves]
    half = int(rank in halves[1])
    rows = (slice(0, 2), slice(2, 3))[half]
    model = make_model({"ponder_loss_coef": 0.1}, checkpointing)
    wrapped = DistributedDataParallel(model)

    def step(batch: dict[str, Any], count: Tensor) -> Tensor:
        batch = {name: tensor[rows] for name, tensor in batch.items()}
        shard = shard_sequence(**batch, num_items_in_batch=count, group=groups[half])
        cache = SequenceParallelCache(model.config, groups[half])
        return size * wrapped(**shard, past_key_values=cache).loss

    return train(model, step)


def main() -> None:
    torch.set_num_threads(1)
    folder, rank, size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    if sys.argv[2:] == ["ddp"]:
        results = {checkpointing: train_in_parallel(checkpointing) for checkpointing in (False, True)}
    else:
        groups = {number: dist.new_group(range(number)) for number in (2, 3)}
        results = {name: run(name, groups[c["size"]]) for name, c in CASES.items() if rank < c["size"]}
        refuse(groups[3])
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()  # a process that leaves while the other still talks to it may abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
