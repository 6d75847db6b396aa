# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The engine of experiments: it runs what is not finished, in processes, and shows how far it is.

A study (study.py) records a run as a line of a file; the tasks (benchmarks/tasks/run.py) as a folder. Both
say which runs are missing, and get each result from `execute` as soon as it is there.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from stackformer.files import write_file

AnyRun = TypeVar("AnyRun")

_steps_done: Any = None  # of all processes; None in a process that counts none


def execute(
    runs: Sequence[AnyRun],
    work: Callable[[AnyRun], Any],
    steps: int,
    jobs: int | None = None,
    threads: int = 1,
    disable_tqdm: bool = False,
) -> Generator[tuple[AnyRun, Any], None, None]:
    """Call `work` on each run. Yields a run and its result as soon as the run is finished.

    Args:
        work: takes a run; to be called in another process, it must be a function of a module, or a `partial`.
        steps: training steps of each run, for the progress bar. A run counts them by [`CountSteps`].
        jobs: runs at the same time, in a process each; `None` runs one after the other in this process.
        threads: of each process.
        disable_tqdm: whether to show no progress.
    """
    if jobs is None:
        for run in tqdm(runs, desc="runs", disable=disable_tqdm):
            yield run, work(run)
        return
    context = multiprocessing.get_context("spawn")
    steps_done = context.Value("q", 0)
    with (
        tqdm(total=len(runs) * steps, unit="step", disable=disable_tqdm or not runs) as bar,
        ProcessPoolExecutor(jobs, context, _start_worker, (steps_done, threads)) as pool,
    ):
        running = {pool.submit(work, run): run for run in runs}
        try:
            while running:
                done = wait(running, timeout=1, return_when=FIRST_COMPLETED).done
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    yield running.pop(future), future.result()
                bar.update(steps_done.value - bar.n)
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()  # otherwise the pool waits for its runs to end
            raise


class CountSteps(TrainerCallback):
    """Adds the steps of a Trainer to those of the other processes, for the progress bar."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if _steps_done is not None:
            with _steps_done.get_lock():
                _steps_done.value += 1


def _start_worker(steps_done: Any, threads: int) -> None:
    """Prepare a process for its runs. Interrupted, it ends silently: the main process reports it.

    It also ends when the main process was killed, which could not tell it to.
    """
    global _steps_done
    if (parent := multiprocessing.parent_process()) is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _steps_done = steps_done
    torch.set_num_threads(threads)


def _end_with(parent: Any) -> None:
    """Wait until the process `parent` is no more, and end this one, whatever it does."""
    parent.join()
    os._exit(1)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records in a file, a JSON object a line. A line that a killed process was writing is removed.

    Raises:
        ValueError: for a line that is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_file(path, whole)
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise ValueError(
            f"{path}: expected the file of finished runs, a JSON object a line: {error}."
        ) from error


__all__ = ["CountSteps", "execute", "read_lines"]
