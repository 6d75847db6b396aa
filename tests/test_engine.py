# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The engine of experiments: results come as runs finish, here or in processes; a failure ends the others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    assert (4, 16) in found  # and the last one, if it was finished before the failure was seen


def write_pid_and_sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_workers_end_with_a_main_process_that_was_killed(tmp_path):
    """Otherwise they train on unseen, and their results are lost."""
    path = tmp_path / "pid"
    lines = (
        "from experiments.engine import execute",
        "from tests.test_engine import write_pid_and_sleep",
        'if __name__ == "__main__":',
        f"    list(execute([{str(path)!r}], write_pid_and_sleep, steps=1, jobs=1, disable_tqdm=True))",
    )
    (tmp_path / "main.py").write_text("\n".join(lines))
    root = str(Path(__file__).parent.parent)
    main = subprocess.Popen([sys.executable, tmp_path / "main.py"], env=os.environ | {"PYTHONPATH": root})

    def wait_until(condition) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end and main.poll() in (None, -signal.SIGKILL)
            time.sleep(0.1)

    def is_alive(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        status = Path(f"/proc/{pid}/stat")  # one that nobody has waited for is still in the list
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"

    wait_until(lambda: path.exists() and path.read_text())
    pid = int(path.read_text())
    assert is_alive(pid)
    main.kill()
    main.wait()
    wait_until(lambda: not is_alive(pid))


def test_a_line_that_was_cut_off_is_removed(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert read_lines(path) == []
    path.write_text('{"row": "a"}\n{"row": "b", "sc')
    assert read_lines(path) == [{"row": "a"}] and path.read_text() == '{"row": "a"}\n'
    path.write_text("no JSON\n")
    with pytest.raises(ValueError, match="expected the file of finished runs"):
        read_lines(path)
    assert json.dumps(read_lines(tmp_path / "other.jsonl")) == "[]"
