# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The table over all presets: cells are runs of their own, small models see no further than they should."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import presets
from experiments import engine
from experiments.presets import read_preset
from experiments.rows import PRESETS


def test_cells_are_filled_one_by_one(tmp_path, capsys, monkeypatch):
    def in_this_process(jobs, context, start, arguments):  # others would import everything again
        return ThreadPoolExecutor(jobs, initializer=start, initargs=arguments)

    monkeypatch.setattr(engine, "ProcessPoolExecutor", in_this_process)
    (tmp_path / "text").write_bytes(bytes(range(256)) * 8)
    command = f"--data_path {tmp_path / 'text'} --output_dir {tmp_path / 'new'} --num_test 4 --block_size 16"
    command += " --train_range 0:1500 --eval_range 1500:2000 --steps 1 --task_steps 1 --batch_size 2"
    names = ["plain-tiny", "titans-mac-tiny"]
    first = presets.main([*command.split(), "--rows", names[0], "--columns", "recall"])
    assert set(first) == {names[0]} and set(first[names[0]]) == {"recall"}
    lines = (tmp_path / "new" / "runs.jsonl").read_text()

    rows = presets.main([*command.split(), "--rows", *names, "--columns", "recall", "text"])
    assert (tmp_path / "new" / "runs.jsonl").read_text().startswith(lines)
    assert rows[names[0]]["recall"] == first[names[0]]["recall"]
    for row in rows.values():
        assert 0 <= row["recall"].median <= 1
        assert min(row[key].median for key in ("bits_per_byte", "training_speed", "decoding_speed")) > 0
    assert rows[names[0]]["state_bytes"] != rows[names[1]]["state_bytes"]
    report = (tmp_path / "new" / "report.md").read_text()
    for name, row in rows.items():
        assert (
            f"\n| {name} | {row['recall'].median:.2f} | - | - | {row['bits_per_byte'].median:.3f} |" in report
        )
    assert "Guessing has 0.06 at recall, 0.50 at state tracking, 0.20 at sorting." in report
    assert report in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_small_presets_are_as_wide_as_each_other(name):
    config, given = (read_preset(PRESETS[name], x) for x in (presets.small(PRESETS[name]), None))
    assert config.hidden_size == 64 and config.mixer_types == given.mixer_types
    assert (config.bottleneck_size is None) == (given.bottleneck_size is None)
    assert config.sliding_window == (None if given.sliding_window is None else 8)
    assert json.loads(presets.small(PRESETS[name])).keys() <= config.to_dict().keys()
