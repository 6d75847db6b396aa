# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The differences between the supported versions of transformers.

transformers 5.24 renamed `past_key_values` to `cache` in `generate`, in every `forward` and in all outputs.
The package uses the new name, and accepts the old one, with every version.
"""

from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import TransformersKwargs

OLD_CACHE_NAME, NEW_CACHE_NAME = "past_key_values", "cache"
_OUTPUT_FIELDS = {field.name for field in fields(BaseModelOutputWithPast)}
# The name of the cache in the installed version, in outputs and in the arguments that `generate` passes on.
CACHE_NAME = NEW_CACHE_NAME if NEW_CACHE_NAME in _OUTPUT_FIELDS else OLD_CACHE_NAME

# The arguments of transformers' loss function for causal language models.
LOSS_ARGUMENTS = {"ignore_index", "num_items_in_batch", "shift_labels"}
# The arguments that transformers passes to all of its models. A decorator may remove `return_dict` before.
COMMON_ARGUMENTS = {*TransformersKwargs.__annotations__, "return_dict"}


class CacheNames:
    """Base class that gives a model's outputs both names of the cache. Put it before transformers' class."""

    if CACHE_NAME == OLD_CACHE_NAME:  # in newer versions, all outputs have the old name as a property

        @property
        def cache(self) -> Cache | None:
            """The cache, by its newer name."""
            return self.past_key_values  # type: ignore[attr-defined]


def either_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Returns the cache that was given under either name, or `None`.

    Raises:
        ValueError: if both are given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("You must specify at most one of `cache` and `past_key_values`, its older name")
    return past_key_values if cache is None else cache


def rename_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns `kwargs` with the cache, if there is one, under the name that the installed version uses."""
    if kwargs.keys().isdisjoint((OLD_CACHE_NAME, NEW_CACHE_NAME)):
        return kwargs
    cache = either_cache(kwargs.get(NEW_CACHE_NAME), kwargs.get(OLD_CACHE_NAME))
    others = {key: x for key, x in kwargs.items() if key not in (OLD_CACHE_NAME, NEW_CACHE_NAME)}
    return {**others, CACHE_NAME: cache}


def check_arguments(
    kwargs: dict[str, Any], owner: str, cache: Cache | None, past_key_values: Cache | None
) -> Cache | None:
    """Returns the cache that `forward` was given under either name.

    Args:
        kwargs: the arguments that are not in the signature of `forward`.
        owner: the name of the class, for the message.

    Raises:
        TypeError: for an argument that neither this package nor transformers has. transformers' own models
            ignore such arguments, so that a misspelt one silently changes the results.
        ValueError: for a cache under both names.
    """
    unknown = kwargs.keys() - COMMON_ARGUMENTS - LOSS_ARGUMENTS
    if unknown:
        names = ", ".join(f"'{name}'" for name in sorted(unknown))
        raise TypeError(f"{owner}.forward() got an unexpected keyword argument {names}")
    return either_cache(cache, past_key_values)
