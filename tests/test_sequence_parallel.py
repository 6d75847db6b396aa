# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Processes that share the tokens of a sequence have the logits, losses, gradients and state of one alone."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from stackformer import StackformerCache
from stackformer.memory_bank import banked_linear_attention, combine_chunks
from tests.models import random_ids
from tests.sequence_parallel_worker import CASES, make_batch, make_model, read, train

ROOT = Path(__file__).parents[1]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def launch(folder: Path, size: int, *arguments: str) -> list[dict[Any, Any]]:
    """What each of `size` processes had."""
    command = [sys.executable, "-m", "tests.sequence_parallel_worker", str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors)[-8000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of three processes had of each case."""
    return launch(tmp_path_factory.mktemp("shared"), 3)


@pytest.mark.parametrize("name", CASES)
def test_processes_that_share_sequences_compute_what_one_does(results, name):
    case = dict(CASES[name])
    size, fields, checkpointing = case.pop("size"), case.pop("fields"), case.pop("checkpointing", False)
    model, batch = make_model(fields, checkpointing), make_batch(**case)
    cache = StackformerCache(model.config)
    expected = read(model, cache, **batch)
    parts = [result[name] for result in results[:size]]

    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for key in ("logits", "steps"):
        actual = torch.cat([part[key] for part in parts], dim=1)
        torch.testing.assert_close(actual[mask], expected[key][mask], **CLOSE)
    loss = sum(part["loss"] for part in parts)
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-6, atol=1e-6)  # transformers' are in float32
    for key, grad in expected["grads"].items():
        torch.testing.assert_close(sum(part["grads"][key] for part in parts), grad, **CLOSE, msg=key)

    with torch.no_grad():
        following = model(random_ids(3, 2, seed=1), past_key_values=cache.detach()).logits
    for part in parts:
        assert part["seen"] == batch["input_ids"].shape[1]
        torch.testing.assert_close(part["next"], following, **CLOSE)
        for state, layer in zip(part["state"], cache.layers, strict=True):
            assert len(state) == model.config.max_ponder_steps
            for index, tensors in state.items():
                wanted = layer.slices.get(index, [torch.zeros_like(tensor) for tensor in tensors])
                torch.testing.assert_close(list(tensors), [*wanted], **CLOSE)


@pytest.mark.slow
def test_half_of_the_rows_split_over_half_of_the_processes(tmp_path):
    """Data and sequence parallelism at once: DDP over four processes, two for the tokens of each row."""
    model = make_model({"ponder_loss_coef": 0.1})
    expected = train(model, lambda batch, count: model(**batch, num_items_in_batch=count).loss)
    results = launch(tmp_path, 4, "ddp")
    for checkpointing in (False, True):
        parts = [result[checkpointing] for result in results]
        losses = torch.stack([torch.stack(part["losses"]) for part in parts]).mean(0)
        torch.testing.assert_close(losses, torch.stack(expected["losses"]), rtol=1e-6, atol=1e-6)
        for part, key in product(parts, ("grads", "weights")):
            torch.testing.assert_close(part[key], expected[key], **CLOSE)


def test_combine_chunks_is_reading_them_one_after_another():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(2, 12, 3, n, generator=generator).double() for n in (4, 4, 5, 2, 2, 2)]
    inputs[-1] = -inputs[-1]
    _, expected = banked_linear_attention(*inputs)
    spans = [[tensor[:, start : start + 4] for tensor in inputs] for start in (0, 4, 8)]
    memories, normalizers = zip(*(banked_linear_attention(*span)[1] for span in spans), strict=True)
    decays = torch.stack([span[-1].sum(1) for span in spans])
    actual = combine_chunks(decays, torch.stack(memories), torch.stack(normalizers))
    torch.testing.assert_close(actual, expected, **CLOSE)
