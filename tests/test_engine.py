# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The engine of experiments: results come as runs finish, here or in processes; a failure ends the others."""

import json

import pytest

from experiments.engine import execute, read_lines


def square(number: int) -> int:
    if number < 0:
        raise ArithmeticError("no root")
    return number**2


@pytest.mark.parametrize("jobs", [None, 2])
def test_results_come_with_their_runs(jobs):
    results = execute([1, 2, 3], square, steps=1, jobs=jobs, disable_tqdm=True)
    assert sorted(results) == [(1, 1), (2, 4), (3, 9)]
    assert list(execute([], square, steps=1, jobs=jobs)) == []


@pytest.mark.parametrize("jobs", [None, 1])
def test_a_failure_keeps_earlier_results(jobs):
    found = []
    with pytest.raises(ArithmeticError, match="no root"):
        for result in execute([4, -1, 5], square, steps=1, jobs=jobs, disable_tqdm=True):
            found.append(result)
    assert found == [(4, 16)]


def test_a_line_that_was_cut_off_is_removed(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert read_lines(path) == []
    path.write_text('{"row": "a"}\n{"row": "b", "sc')
    assert read_lines(path) == [{"row": "a"}] and path.read_text() == '{"row": "a"}\n'
    path.write_text("no JSON\n")
    with pytest.raises(ValueError, match="expected the file of finished runs"):
        read_lines(path)
    assert json.dumps(read_lines(tmp_path / "other.jsonl")) == "[]"
