# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Complete checkpoints of a Trainer: written so that none is incomplete, and checked before they are used.

A process may be killed at any time. [`WholeCheckpoints`], put before a Trainer class, ensures that every
folder called `checkpoint-N` is complete. `newest_checkpoint` finds the newest complete checkpoint of any
Trainer, and warns of the incomplete ones that it skips.
"""

import filecmp
import json
import os
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from ..files import sync

logger = logging.get_logger(__name__)

# Folders with these names are not taken for checkpoints, and are not uploaded to the Hub.
PARTIAL, REPLACED = "_partial-checkpoint", "_replaced-checkpoint"

CONFIG = "config.json"  # a folder without this file holds no model

# The files that may hold a checkpoint's weights, in the order in which the Trainer looks for them.
WEIGHTS = (
    "pytorch_model.bin",
    "model.safetensors",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_0",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0")
# The weights of a saved model, in one file or several, and the index of these.
_WEIGHT_FILE = re.compile(r"(?:model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")


class WholeCheckpoints:
    """Put before a Trainer class so that a checkpoint gets its name only when it is complete.

    A checkpoint is written to another folder, synchronised to the disk, and renamed. Older checkpoints are
    deleted after that. A checkpoint of the same name, from before the run resumed, stays until the renaming.
    """

    _saving = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)  # type: ignore[misc]
        return os.path.join(folder, PARTIAL) if self._saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # the upload in the background starts later, with the final name
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        trainer: Any = self
        args, state, wait = trainer.args, trainer.state, trainer.accelerator.wait_for_everyone
        run_folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        partial, final = run_folder / PARTIAL / name, run_folder / name
        if args.should_save or args.local_process_index == 0:
            shutil.rmtree(run_folder / PARTIAL, ignore_errors=True)  # left by a process that was killed
        wait()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._saving = False
        if state.best_model_checkpoint is not None and Path(state.best_model_checkpoint) == partial:
            state.best_model_checkpoint = str(final)
            if args.should_save:
                state.save_to_json(str(partial / "trainer_state.json"))
        # The process that saves publishes first. Then so does one process of every machine with a disk of its
        # own, where the other processes have written their parts.
        for mine in (args.should_save, args.local_process_index == 0):
            wait()
            if mine and partial.is_dir():
                _publish(partial, final)
        wait()
        if args.should_save:
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )
        if args.push_to_hub:
            self._push_from_checkpoint(str(final))


def _publish(partial: Path, final: Path) -> None:
    """Synchronise a folder to the disk and give it its final name."""
    for path in (*partial.rglob("*"), partial):
        sync(path)
    replaced = final.with_name(REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(partial.parent, ignore_errors=True)


def replace_model(new: str | Path, folder: str | Path) -> None:
    """Move a saved model to a folder that may have another model, and remove its old folder.

    Each file is replaced in one step. If only one file differs, such as the weights after more training, a
    reader finds the old or the new model at any time. Otherwise config.json is missing until all other files
    are in place: meanwhile a reader finds no model, rather than parts of two.
    """
    new, folder = Path(new), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in new.iterdir():
        sync(path)
    names = {path.name for path in new.iterdir()}
    changed = {name for name in names if not _same_content(new / name, folder / name)}
    other_weights = [path for path in folder.iterdir() if _WEIGHT_FILE.fullmatch(path.name)]
    stale = [path for path in other_weights if path.name not in names]
    if CONFIG in names and len(stale) + len(changed - {"training_args.bin"}) > 1:
        (folder / CONFIG).unlink(missing_ok=True)
        sync(folder)
        changed.add(CONFIG)
    for path in stale:
        path.unlink()
    for name in sorted(changed, key=lambda name: (name == CONFIG, name)):
        if name == CONFIG:
            sync(folder)
        (new / name).replace(folder / name)
    sync(folder)
    shutil.rmtree(new)


def _same_content(first: Path, second: Path) -> bool:
    return second.is_file() and filecmp.cmp(first, second, shallow=False)


def newest_checkpoint(
    folder: str | Path, num_processes: int = 1, model_only: bool = False, files: Sequence[str] = ()
) -> str | None:
    """Returns the newest complete checkpoint in a run's folder, or None. Warns of newer incomplete ones.

    The other arguments are those of `checkpoint_fault`.
    """
    checkpoints = _checkpoints(folder)
    for path in reversed(checkpoints):
        fault = checkpoint_fault(path, num_processes, model_only, files)
        if fault is None:
            return str(path)
        logger.warning(f"Skipped {path}, which is not complete: {fault}.")
    return None


def checkpoint_fault(
    checkpoint: str | Path, num_processes: int = 1, model_only: bool = False, files: Sequence[str] = ()
) -> str | None:
    """Returns the reason why a run cannot resume exactly from a checkpoint, or None if it can.

    The reason names a file that is missing or cut off.

    Args:
        num_processes: number of processes that will resume; each needs its random state.
        model_only: whether the checkpoint was saved without the optimiser (`save_only_model`).
        files: names of other files that the checkpoint must have.
    """
    checkpoint = Path(checkpoint)
    is_deepspeed = (checkpoint / "latest").is_file()
    # The first process writes the state last, but other processes may still be writing then.
    needed: list[tuple[str, ...]] = [("trainer_state.json",), WEIGHTS]
    if not model_only:
        if not is_deepspeed:
            needed += [OPTIMIZERS, ("scheduler.pt",)]
        needed += [("rng_state.pth", f"rng_state_{number}.pth") for number in range(num_processes)]
    needed += [(name,) for name in files]
    for names in needed:
        if not any((checkpoint / name).exists() for name in names) and not (
            names is WEIGHTS and _has_adapters(checkpoint)
        ):
            return f"it has no {_one_of(names)}"
    faults = (_fault_of(path) for path in sorted(checkpoint.rglob("*")))
    fault = next((fault for fault in faults if fault), None)
    if fault is None and is_deepspeed:
        fault = _deepspeed_fault(checkpoint, num_processes)
    return fault


def _checkpoints(folder: str | Path) -> list[Path]:
    """Returns the folders of checkpoints, oldest first."""
    if not Path(folder).is_dir():
        return []
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = {path: pattern.fullmatch(path.name) for path in Path(folder).iterdir() if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path])


def _one_of(names: Sequence[str]) -> str:
    if names is WEIGHTS:
        return "weights (model.safetensors, or the like)"
    return " or ".join(names)


def _has_adapters(checkpoint: Path) -> bool:
    """Whether the checkpoint has adapters in folders of their own, as it has if there are several."""
    return any(checkpoint.glob("*/adapter_model.*"))


def _fault_of(path: Path) -> str | None:
    """Returns the fault of a single file of a checkpoint; None if it has none, or is of another kind."""
    if path.is_dir():
        return _shards_fault(path) if path.name in ("pytorch_model_fsdp_0", "optimizer_0") else None
    if path.suffix == ".safetensors":
        return _safetensors_fault(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        try:  # torch's files are zip archives, which end with their list of contents
            zipfile.ZipFile(path).close()
        except zipfile.BadZipFile:
            return f"{path.name} is cut off"
        return None
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return f"{path.name} is cut off"
        if path.name.endswith(".index.json"):
            shards = sorted({path.with_name(name) for name in content["weight_map"].values()})
            return next((f"it has no {shard.name}" for shard in shards if not shard.is_file()), None)
    return None


def _safetensors_fault(path: Path) -> str | None:
    """Returns a fault unless the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if 0 < length < size else b"")
        except ValueError:
            return f"{path.name} is cut off"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"{path.name} is cut off, it has {size} of {expected} bytes"


def _shards_fault(folder: Path) -> str | None:
    """Returns a fault unless a sharded (FSDP) state has all parts of its list, which is written last."""
    if not (folder / ".metadata").is_file():
        return f"{folder.name} has no .metadata"
    metadata = FileSystemReader(folder).read_metadata()
    for part in (metadata.storage_data or {}).values():
        path = folder / part.relative_path
        if not path.is_file():
            return f"{folder.name} has no {path.name}"
        if path.stat().st_size < part.offset + part.length:
            return f"{path.name} of {folder.name} is cut off"
    return None


def _deepspeed_fault(checkpoint: Path, num_processes: int) -> str | None:
    """Returns a fault unless DeepSpeed's own folder has the files of each process."""
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    patterns = ["*model_states.pt", *(f"*zero_pp_rank_{i}_*optim_states.pt" for i in range(num_processes))]
    return next((f"{folder.name} has no {name}" for name in patterns if not any(folder.glob(name))), None)


__all__ = ["PARTIAL", "WholeCheckpoints", "checkpoint_fault", "newest_checkpoint", "replace_model"]
