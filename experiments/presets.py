# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Configurations from JSON presets, with other fields from the command line."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

import stackformer  # noqa: F401  (importing it registers the Auto classes)
from experiments.command_line import one_line


def parse_overrides(text: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Parse "name=value,name=value" with the types of `defaults` (all fields of a config and their values).

    "none" is None. A field whose default is a list or None takes JSON, such as names=["a","b"]. All of it may
    be a JSON object, too.

    Raises:
        ValueError: if an entry is not name=value, the name no field, or the value not of the field's type.
    """
    if text.lstrip().startswith("{"):
        overrides = _parse_object(text)
        if unknown := sorted(set(overrides) - set(defaults)):
            raise ValueError(
                f"config_overrides: unknown fields {unknown}, expected some of {sorted(defaults)}."
            )
        return overrides
    overrides = {}
    for entry in re.split(r",(?![^\[]*\])", text):  # the commas that are not inside a list
        name, separator, value = (part.strip() for part in entry.partition("="))
        if not separator:
            raise ValueError(f"config_overrides={text!r}: expected name=value, got {entry!r}.")
        if name not in defaults:
            raise ValueError(f"config_overrides: unknown field {name!r}, expected one of {sorted(defaults)}.")
        overrides[name] = _parse_value(name, value, defaults[name])
    return overrides


def build_config(preset: str, overrides: str | None, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """A config from a JSON preset, the tokenizer's vocabulary size and token ids, and then `overrides`."""
    token_ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return read_preset(preset, overrides, vocab_size=len(tokenizer), **token_ids)


def read_preset(preset: str, overrides: str | None = None, **given: Any) -> PreTrainedConfig:
    """A config from a JSON preset, with the fields that are `given`, and then `overrides`.

    Given fields that the model does not have, as RWKV has no padding token, are left out. The fields are
    merged before the config is built, so what it derives and checks is what is asked for.
    """
    if not Path(preset).is_file():
        raise ValueError(f"config={preset!r}: expected a JSON file with the fields of a config.")
    fields = read_json("config", preset)
    model_type = fields.pop("model_type", "stackformer")
    try:
        defaults = AutoConfig.for_model(model_type).to_dict()
    except ValueError as error:
        raise ValueError(
            f"config={preset!r}: expected a model_type of transformers, got {model_type!r}."
        ) from error
    fields |= {name: value for name, value in given.items() if name in defaults}
    if unknown := sorted(set(fields) - set(defaults)):
        raise ValueError(f"config={preset!r}: unknown fields {unknown}, expected some of {sorted(defaults)}.")
    if overrides:
        fields |= parse_overrides(overrides, defaults)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config={preset!r}: {one_line(error)}") from error


def read_json(name: str, path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, the option `name`.

    Raises:
        ValueError: if it is no JSON, or something else than an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}={str(path)!r}: expected a JSON file, {one_line(error)}.") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{name}={str(path)!r}: expected a JSON object with fields, got a {kind}.")
    return content


def _parse_object(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config_overrides={text!r}: expected JSON or name=value, {error}.") from error


def _parse_value(name: str, value: str, default: Any) -> Any:
    """`value` as the type of `default`; JSON or a plain string where the default does not say."""
    if value.lower() == "none":
        return None
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, int | float | str):
            return type(default)(value)
    except (KeyError, ValueError) as error:
        expected = "true or false" if isinstance(default, bool) else type(default).__name__
        raise ValueError(f"config_overrides: {name}={value!r}, expected {expected}.") from error
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


__all__ = ["build_config", "parse_overrides", "read_json", "read_preset"]
