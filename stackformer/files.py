# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Files that appear whole: written under another name, then put in their place in one step."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` when the block ends.

    Until then, and if the block fails or the process dies, `path` is what it was. Readers find the old file
    or the new one. Writers do not disturb each other: the last to finish wins. A link is replaced, not
    followed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # not every file system can do that for a folder
        sync(path.parent)


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file that appears whole; see `replaced_file`."""
    with replaced_file(path) as file:
        file.write(data)


def sync(path: str | os.PathLike) -> None:
    """Have a file, or the names in a folder, on the disk, and not only in the memory of the system."""
    posix = os.name == "posix"  # other systems do not open folders, and write what is open for writing
    if os.path.isdir(path) and not posix:
        return
    descriptor = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
