# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Command lines: options are checked as soon as they are read, and a mistake of the user is one sentence.

`run_main(main)` is how a command starts. A ValueError or an OSError becomes one sentence on stderr and exit
code 2, as a wrong option does; $STACKFORMER_TRACEBACK=1 shows where it came from. Any other exception is a
mistake in a program and has its traceback. Called from Python, `main([...])` raises.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

TRACEBACK = "STACKFORMER_TRACEBACK"
# A repository of the Hub: an owner and a name.
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PICTURES = (".png", ".svg", ".pdf")


def run_main(main: Callable[[], Any]) -> None:
    """Run a command; see above."""
    try:
        main()
        sys.stdout.flush()  # here, where it is seen whether somebody reads it
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        _leave(2, f"error: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """Returns the message of an exception, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _leave(code: int, message: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


@dataclass(frozen=True)
class Range:
    """A range of numbers that an option may have, as the `type` of a `Parser`'s argument or for `check`.

    Args:
        number: int or float; floats are finite.
        least, above: the lowest value that is allowed, or the highest one that is just not.
        most, below: as much at the other end.
    """

    number: type = int
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __call__(self, text: str) -> Any:
        """The number that `text` spells; `Parser` checks whether it is in range."""
        try:
            return self.number(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected {self.describe()}, got {text!r}") from error

    def check(self, name: str, value: Any) -> None:
        """Raises:
        ValueError: unless `value`, called `name` in the message, is None or in range.
        """
        if value is None:
            return
        kinds = int if self.number is int else int | float
        fits = (
            isinstance(value, kinds)
            and math.isfinite(value)
            and (
                (self.least is None or value >= self.least)
                and (self.above is None or value > self.above)
                and (self.most is None or value <= self.most)
                and (self.below is None or value < self.below)
            )
        )
        if not fits:
            raise ValueError(f"{name}={value}: expected {self.describe()}.")

    def describe(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        texts = [f"{what} {limit:g}" for what, limit in limits.items() if limit is not None]
        kind = "a whole number" if self.number is int else "a number"
        return ", ".join([kind, " and ".join(texts)]) if texts else kind


COUNT = Range(int, least=1)
NATURAL = Range(int, least=0)
POSITIVE = Range(float, above=0)
NOT_NEGATIVE = Range(float, least=0)
SHARE = Range(float, least=0, most=1)
THRESHOLD = Range(float, least=0, below=1)  # of halting


class _OneLineErrors:
    """An error is one sentence: the usage of these commands fills several screens, and --help shows it."""

    prog: str

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # type: ignore[attr-defined]
        raise AssertionError("`exit` ends the program")


class Parser(_OneLineErrors, argparse.ArgumentParser):
    """argparse's, whose arguments may have a `Range` as their type."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse's.

        Raises:
            ValueError: for a value out of its range.
        """
        parsed = super().parse_args(args, namespace)
        for action in self._actions:
            if isinstance(action.type, Range):
                value = getattr(parsed, action.dest)
                for one in value if isinstance(value, list) else [value]:
                    action.type.check(action.dest, one)
        return parsed


class DataclassParser(_OneLineErrors, HfArgumentParser):
    """transformers' parser of dataclasses. These check their values themselves, in `__post_init__`."""


def check_input_file(name: str, path: str | Path) -> None:
    """Raises:
    ValueError: unless `path` is a file that can be read and has something in it.
    """
    path = Path(path)
    if not path.is_file():
        found = "found a folder" if path.is_dir() else "found none"
        raise ValueError(f"{name}={str(path)!r}: expected a file, {found}.")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{name}={str(path)!r}: expected a file that may be read.")
    if path.stat().st_size == 0:
        raise ValueError(f"{name}={str(path)!r}: expected a text, the file is empty.")


def check_output_file(name: str, path: str | Path | None) -> None:
    """Raises:
    ValueError: unless a file can be written to `path`, or it is None.
    """
    if path is None:
        return
    if Path(path).is_dir() or str(path) in ("", "."):
        raise ValueError(f"{name}={str(path)!r}: expected a file to write, found a folder.")
    _check_writable(name, path, Path(path).absolute().parent)


def check_picture_file(name: str, path: str | Path | None) -> None:
    """Raises:
    ValueError: unless a picture can be drawn to `path`, or it is None.
    """
    if path is None:
        return
    check_output_file(name, path)
    if Path(path).suffix not in PICTURES:
        raise ValueError(f"{name}={str(path)!r}: expected a file that ends in one of {PICTURES}.")
    if find_spec("matplotlib") is None:
        raise ValueError(f"{name}={str(path)!r}: expected matplotlib to draw with: pip install matplotlib.")


def check_output_folder(name: str, path: str | Path | None) -> None:
    """Raises:
    ValueError: unless files can be written to the folder `path`, which need not be there, or it is None.
    """
    if path is not None:
        _check_writable(name, path, Path(path).absolute())


def _check_writable(name: str, path: str | Path, folder: Path) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{name}={str(path)!r}: expected a place to write to, {existing} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={str(path)!r}: expected a place to write to, {existing} is read-only.")


def read_text(name: str, text: str | None) -> str:
    """`text`, or what standard input has if None.

    Raises:
        ValueError: if it is not UTF-8.
    """
    where = "an argument" if text is not None else "standard input"
    try:
        text = sys.stdin.read() if text is None else text
        text.encode("utf-8")  # what is not UTF-8 may be in a string as lone surrogates
    except UnicodeError as error:
        raise ValueError(f"{name}: expected UTF-8 from {where}, {one_line(error)}.") from error
    return text


__all__ = [
    "COUNT",
    "NATURAL",
    "NOT_NEGATIVE",
    "POSITIVE",
    "SHARE",
    "THRESHOLD",
    "DataclassParser",
    "Parser",
    "Range",
    "check_input_file",
    "check_output_file",
    "check_output_folder",
    "check_picture_file",
    "one_line",
    "read_text",
    "run_main",
]
