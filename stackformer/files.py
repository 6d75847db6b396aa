# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Atomic writes of files: a file is written under another name, then moved to its place in one step."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Opens a file to write to, which replaces `path` when the block ends.

    Until then, and if the block fails or the process dies, `path` is not changed. Readers find either the old
    file or the new one. Several writers do not disturb each other: the last to finish replaces the file. A
    link is replaced, not followed.
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
    with suppress(OSError):  # not every file system can sync a folder
        sync(path.parent)


def write_file(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file as a whole; see `replaced_file`."""
    with replaced_file(path) as file:
        file.write(data)


def sync(path: str | os.PathLike) -> None:
    """Flushes a file, or the names in a folder, from the memory of the system to the disk."""
    posix = os.name == "posix"  # other systems cannot open folders, and sync only files open for writing
    if os.path.isdir(path) and not posix:
        return
    descriptor = os.open(path, os.O_RDONLY if posix else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
