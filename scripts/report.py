# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""What every reported number needs: a unit, the machine it is from, a file that is never half written."""

import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers


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
    """Write `text` to `path`, creating its folder; a reader sees the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, as `write_text` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


__all__ = ["bits_per_byte", "commit", "machine_line", "write_json", "write_text"]
