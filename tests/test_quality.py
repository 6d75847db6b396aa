# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The table of what depth is worth: rows are models, runs are not repeated, baselines halt as they say."""

import itertools
import json

import pytest
import torch

from benchmarks import quality, text
from benchmarks.models import num_parameters
from experiments import study
from experiments.presets import build_config
from experiments.rows import QUALITY, TEXT
from stackformer import build_byte_tokenizer
from tests.models import SHAPES, tiny_config, tiny_model

PRESET = {
    "model_type": "stackformer",
    "hidden_size": 24,
    "bottleneck_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_memory_banks": 1,
    "stack_depth": 2,
    "max_ponder_steps": 2,
}


def test_runs_once_and_goes_on(tmp_path, capsys):
    (tmp_path / "preset.json").write_text(json.dumps(PRESET))
    (tmp_path / "text").write_bytes(bytes(range(256)) * 8)
    results, picture = tmp_path / "runs.jsonl", tmp_path / "new" / "table.png"
    command = ["--preset", tmp_path / "preset.json", "--data_path", tmp_path / "text", "--seeds", 1, 2]
    command += ["--train_range", "0:1500", "--eval_range", "1500:2000", "--steps", 2, "--block_size", 32]
    command += ["--json", results, "--plot", picture]
    # What the last one takes its depth from runs first, though it is not asked for.
    rows = ["stack, P = 1", "untied, 4 x the layers, P = 1", "random halting, P = 4"]

    table = quality.main([str(x) for x in [*command, "--rows", *rows[:2]]])
    assert list(table) == rows[:2]
    for row in table.values():
        score = row["bits_per_byte"]
        assert score.lowest <= score.median <= score.highest
        assert score.lowest != score.highest, "seeds make no difference"
        assert row["ponder_steps"] == (1, 1, 1)
    first = [json.loads(line) for line in results.read_text().splitlines()]
    runs = [(line["row"], line["seed"]) for line in first]
    assert sorted(runs) == list(itertools.product(rows[:2], (1, 2)))
    assert table[rows[1]]["parameters"].median > table[rows[0]]["parameters"].median

    table = quality.main([str(x) for x in [*command, "--rows", *rows]])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert lines[:4] == first and len(lines) == 8
    learned = [line["ponder_steps"] for line in lines if line["row"] == "stack, P = 4"]
    assert table[rows[2]]["ponder_steps"].median == pytest.approx(sum(learned) / 2, abs=0.3)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"| {row} |" in printed for row in rows)


@pytest.mark.parametrize("name", QUALITY)
def test_rows_are_models(name):
    """Every row's fields fit its preset."""
    tokenizer, overrides = build_byte_tokenizer(), QUALITY[name].overrides
    config = build_config("configs/stackformer-tiny.json", overrides, tokenizer)
    assert f"P = {config.max_ponder_steps}" in name or config.max_ponder_steps == 1


def test_text_at_the_best_learning_rate_of_each_model(tmp_path, monkeypatch, capsys):
    """All rates with the first seed, the best of them with the others, and nothing twice."""
    (tmp_path / "text").write_bytes(bytes(range(256)) * 8)
    command = ["--data_path", tmp_path / "text", "--train_range", "0:1500", "--eval_range", "1500:2000"]
    command += ["--steps", 3, "--block_size", 32, "--seeds", 0, 1, "--learning_rates", "1e-9", "1e-2", "1e-3"]
    command += ["--context_length", 128, "--long_range", "1500:1800", "--rows", "4 banks", "llama"]
    command += ["--json", tmp_path / "runs.jsonl", "--plot", tmp_path / "text.png"]
    command = [str(x) for x in command]
    rows = text.main(command)
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    for name, row in rows.items():
        of_row = [line for line in lines if line["row"] == name]
        rates = {line["learning_rate"]: line["bits_per_byte"] for line in of_row if line["seed"] == 0}
        assert set(rates) == {1e-9, 1e-2, 1e-3} and len(of_row) == 4
        best = min(rates, key=rates.get)
        assert best != 1e-9 and row["learning_rate"] == (best, best, best)
        scores = {line["bits_per_byte"] for line in of_row if line["learning_rate"] == best}
        assert len(scores) == 2 and (row["bits_per_byte"].lowest, row["bits_per_byte"].highest) == (
            min(scores),
            max(scores),
        )
        assert all(row[f"at {positions}"].median > 0 for positions in ("1-31", "32-63", "64-127"))
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(study, "train", lambda *args: pytest.fail("trained again"))
    assert text.main(command) == rows
    assert "| llama |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="context_length=500: expected a multiple of block_size=32"):
        text.main([*command, "--context_length", "500"])


@pytest.mark.parametrize("name", TEXT)
def test_models_of_text_have_equal_size(name):
    config = build_config(TEXT[name].path, TEXT[name].overrides, build_byte_tokenizer())
    assert num_parameters(config) == pytest.approx(300_000, rel=0.03)


@pytest.mark.parametrize("mean", [1.0, 1.7, 3.0, 4.0])
@torch.no_grad()
def test_random_halting_has_its_mean_depth(mean):
    model = tiny_model(**SHAPES["halting stack"])
    assert tiny_config().max_ponder_steps == 4
    torch.manual_seed(0)
    model.model.action_proj = quality.RandomActions(quality.return_probability(mean, 4))
    depths = model(torch.zeros(50, 40, dtype=torch.long)).ponder_steps
    assert depths.mean().item() == pytest.approx(mean, abs=0.1)
    assert set(depths.unique().tolist()) <= {1, 2, 3, 4}
