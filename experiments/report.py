# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Reports: the machine, the commit and the unit of a number, and files that are never half written."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.utils import logging

from stackformer.files import replaced_file, write_file

if TYPE_CHECKING:  # drawing is optional
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)


def bits_per_byte(mean_nll: float, num_tokens: int, num_bytes: int) -> float:
    """Bits per byte of a text, from its mean negative log likelihood per token in nats."""
    return mean_nll / math.log(2) * num_tokens / num_bytes


def commit() -> str | None:
    """The commit of this code, with "-dirty" if files differ from it; None without a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine_line() -> str:
    """One line that says where a number was measured: processor, accelerator, threads and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return (
        f"{os.cpu_count()} CPUs ({torch.get_num_threads()} threads), {device}, {platform.platform()}, python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, whose folder is created; a reader sees the old file or the new one, whole."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode("utf-8"))


def save_figure(path: str | Path, figure: "Figure", dpi: int = 150) -> None:
    """Write a picture to `path`, in the format of its ending; a reader sees the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=dpi)


def draw_or_warn(draw: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Draw a picture of results that are complete without it: if drawing fails, a warning says why."""
    try:
        draw(*args, **kwargs)
    except Exception as error:  # whatever it is, the results matter more
        logger.warning(f"A picture was not drawn: {type(error).__name__}: {error}")


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, as `write_text` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


__all__ = [
    "bits_per_byte",
    "commit",
    "draw_or_warn",
    "machine_line",
    "save_figure",
    "write_json",
    "write_text",
]
