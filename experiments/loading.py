# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Saved models and tokenizers for the commands: what is wrong with one is said in a sentence.

A folder is looked for before the Hub is asked, and only OWNER/NAME can be on the Hub.
"""

import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import stackformer  # noqa: F401  (importing it registers the Auto classes)
from experiments.command_line import HUB_NAME, one_line

# Of any kind of tokenizer, one of these is there.
TOKENIZER_FILES = ("*token*.json", "vocab*", "merges*", "*.model")


def check_source(name: str, source: str, what: str = "model") -> None:
    """Raises:
    ValueError: unless `source`, the option `name`, is a folder with a saved `what`, or can be on the Hub.
    """
    path = Path(source)
    if path.is_dir():
        names = ("config.json", "adapter_config.json")  # an adapter names the model that it is for
        if what == "model" and not any((path / x).is_file() for x in names):
            raise ValueError(f"{name}={source!r}: expected a saved model, the folder has no config.json.")
        return
    if path.exists():
        raise ValueError(f"{name}={source!r}: expected the folder of a saved {what}, found a file.")
    if not is_hub_name(source):
        raise ValueError(f"{name}={source!r}: expected the folder of a saved {what}, found none.")


def is_hub_name(source: str) -> bool:
    """Whether `source` may be a repository of the Hub: OWNER/NAME, and no path, which is what begins with a
    folder that is there."""
    return HUB_NAME.fullmatch(source) is not None and not Path(source).parent.exists()


def load_model(name: str, source: str, device: str = "cpu") -> PreTrainedModel:
    """The causal language model that `source` has, the option `name`, in evaluation mode.

    Raises:
        ValueError: if it cannot be loaded.
    """
    model = load_saved(AutoModelForCausalLM.from_pretrained, name, source, "model")
    return model.to(device).eval()


def load_saved_tokenizer(name: str, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer that `source` has, the option `name`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if Path(source).is_dir() and not has_tokenizer(source):
        raise ValueError(f"{name}={source!r}: expected a tokenizer beside the model, the folder has none.")
    return load_saved(AutoTokenizer.from_pretrained, name, source, "tokenizer")


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has files of some kind of tokenizer."""
    return any(any(Path(folder).glob(name)) for name in TOKENIZER_FILES)


def check_device(name: str, device: str) -> None:
    """Raises:
    ValueError: unless torch can use the device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).split(". ")[0].rstrip(".")
        raise ValueError(f"{name}={device!r}: expected a device that torch can use, {reason}.") from error


def load_saved(load: Callable[..., Any], name: str, source: str, what: str) -> Any:
    """Loads a saved `what`, the option `name`, by `load`, a `from_pretrained`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    check_source(name, source, what)
    is_folder = Path(source).is_dir()
    place = source
    if not is_folder and not hub_answers():  # asked in vain, the Hub is asked again and again for minutes
        names = ("config.json", "tokenizer_config.json")
        cached = [path for x in names if isinstance(path := try_to_load_from_cache(source, x), str)]
        if not cached:
            raise ValueError(
                f"{name}={source!r}: expected a saved {what} in a folder or on the Hub: there is no such "
                "folder, the Hub cannot be reached, and the cache does not have it."
            )
        place = str(Path(cached[0]).parent)
    try:
        return load(place, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SafetensorError):
            reason = f"its weights are cut off or damaged ({one_line(error)})"
        elif isinstance(error, RuntimeError):
            reason = "its weights do not fit its config.json"
        else:
            reason = one_line(error).split(". ")[0].rstrip(".")
        where = "in the folder" if is_folder else "in a folder or on the Hub"
        raise ValueError(f"{name}={source!r}: expected a saved {what} {where}: {reason}.") from error


def hub_answers() -> bool:
    """Whether the Hub can be reached, as far as a connection tells; with a proxy, only a request could."""
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


__all__ = [
    "check_device",
    "check_source",
    "has_tokenizer",
    "hub_answers",
    "is_hub_name",
    "load_model",
    "load_saved",
    "load_saved_tokenizer",
]
