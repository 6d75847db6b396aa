# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Generated tasks that ask for generalisation in length and in depth.

`python -m benchmarks.tasks.run` trains any causal language model on short sequences of one and tests it on
long ones; `python -m benchmarks.tasks.heat_map` draws the results. A new task is one class in a file, and one
row here.
"""

from .chomsky import CycleNavigation, DuplicateString, Parity, ReverseString, StackManipulation
from .recall import DistantRecall, Recall
from .sorting import Sorting
from .task import IGNORED, Task, seeded
from .word_problem import WordProblem

TASKS = {
    "parity": Parity,
    "cycle_navigation": CycleNavigation,
    "reverse_string": ReverseString,
    "stack_manipulation": StackManipulation,
    "duplicate_string": DuplicateString,
    "word_problem": WordProblem,
    "mqar": Recall,
    "distant_recall": DistantRecall,
    "sorting": Sorting,
}

__all__ = ["IGNORED", "TASKS", "Task", "seeded"]
