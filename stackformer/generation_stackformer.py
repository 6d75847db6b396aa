# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""transformers' `generate`, which can continue from a cache that holds a part of the text, in every mode."""

from typing import Any, NamedTuple

from torch import Tensor
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from .cache_stackformer import StackformerCache, StackformerStaticCache, check_kind
from .versions import CACHE_NAME, rename_cache

# Arguments that `generate` passes on although the model does not accept them.
_OF_GENERATE = ("tokenizer", "assistant_tokenizer", "assistant_model", "streamer", "synced_gpus")


class Unlisted(NamedTuple):
    """The number of tokens that a cache holds and that `generate` was not given."""

    by_ids: int  # not in its `input_ids`
    by_embeds: int  # not in its `inputs_embeds`


class StackformerGenerationMixin(GenerationMixin):
    """transformers' `generate`, for a model whose cache may hold a part of the text already."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generates text. The arguments are those of transformers' `generate`.

        Args:
            cache: a [`StackformerCache`] to continue from, also as `past_key_values`. `input_ids` are either
                the whole text, including the tokens in the cache, or only the new tokens. In the second case,
                `attention_mask` must have columns for the tokens in the cache, too: this distinguishes the
                two cases.

        Raises:
            ValueError: if the cache already holds all of `input_ids`, or belongs to another model or batch.
        """
        kwargs = rename_cache(kwargs)
        cache = kwargs.get(CACHE_NAME)
        if cache is not None:
            check_kind(cache, self.model)
        if cache is None or cache.get_seq_length() == 0:
            return super().generate(inputs, *args, **kwargs)
        unlisted, kwargs["attention_mask"] = _place_prompt(
            kwargs.get("input_ids") if inputs is None else inputs,
            kwargs.get("inputs_embeds"),
            kwargs.get("attention_mask"),
            past=cache.get_seq_length(),
        )
        cache.unlisted_tokens = unlisted
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            cache.unlisted_tokens = None

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepares inputs as transformers does, without the tokens that the cache already holds."""
        kwargs = {name: x for name, x in rename_cache(kwargs).items() if name not in _OF_GENERATE}
        cache = kwargs.get(CACHE_NAME)
        unlisted = getattr(cache, "unlisted_tokens", None)
        if cache is not None and unlisted is not None:
            total = input_ids.shape[1] + unlisted.by_ids
            if inputs_embeds is not None and is_first_iteration:
                total = inputs_embeds.shape[1] + unlisted.by_embeds
            next_sequence_length = total - cache.get_seq_length()
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # The model uses neither positions nor the mask of the past.
        model_inputs.pop("position_ids", None)
        mask = model_inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            given = model_inputs.get("inputs_embeds")
            length = (model_inputs["input_ids"] if given is None else given).shape[1]
            model_inputs["attention_mask"] = mask[:, mask.shape[1] - length :]
        return model_inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """Prefills as transformers does. With `prefill_chunk_size`, it can also continue from a cache."""
        size, cache = generation_config.prefill_chunk_size, model_kwargs.get(CACHE_NAME)
        if size is None or cache is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        unlisted = getattr(cache, "unlisted_tokens", None) or Unlisted(0, 0)
        if embeds is not None and is_first_iteration:
            whole, start = embeds, cache.get_seq_length() - unlisted.by_embeds
        else:
            whole, start = input_ids, cache.get_seq_length() - unlisted.by_ids
        for first in range(start, whole.shape[1], size):
            stop = min(first + size, whole.shape[1])
            part = {**model_kwargs, "attention_mask": None if mask is None else mask[:, :stop]}
            if whole is embeds:
                part["inputs_embeds"] = embeds[:, :stop]
            inputs = self.prepare_inputs_for_generation(
                input_ids[:, :stop],
                next_sequence_length=stop - first,
                is_first_iteration=is_first_iteration,
                **part,
            )
            outputs = self(**inputs, return_dict=True)
        return outputs

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs):
        """Returns the padding mask of the new tokens."""
        if attention_mask is None:
            return None
        return attention_mask[:, attention_mask.shape[1] - inputs_embeds.shape[1] :]

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """Makes a [`StackformerCache`], or a static one, in place of transformers' caches.

        An offloaded cache is an ordinary [`StackformerCache`]: offloading a small state gains nothing.
        """
        implementation = generation_config.cache_implementation
        static = implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS
        if (
            model_kwargs.get(CACHE_NAME) is not None
            or generation_config.use_cache is False
            or not (static or implementation in (None, "dynamic", "offloaded"))
        ):
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        cache = (StackformerStaticCache if static else StackformerCache)(self.config)
        cache.bind(self.model.mark())
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache


def _place_prompt(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None, past: int
) -> tuple["Unlisted", Tensor | None]:
    """Decides whether a prompt is the whole text or only the part after the `past` tokens in the cache.

    Returns:
        The numbers of tokens in the cache that are not in the prompt, and the attention mask of the prompt.

    Raises:
        ValueError: if no token is new, or if the mask fits neither case.
    """
    prompt = input_ids if inputs_embeds is None else inputs_embeds
    if prompt is None:
        raise ValueError("`input_ids` must be the text to go on from, or its new tokens, got None")
    listed = prompt.shape[1]
    width = listed if attention_mask is None else attention_mask.shape[1]
    if width == listed and listed > past:  # the whole text
        unlisted = 0
    elif width == past + listed and listed > 0:  # its new tokens
        unlisted = past
    else:
        name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        raise ValueError(
            f"`{name}` must be the whole text, of which the cache holds {past} tokens and at least one must "
            f"be new, or only the new tokens with an `attention_mask` of {past} columns more, got {listed} "
            f"tokens and {'no mask' if attention_mask is None else f'a mask of {width} columns'}"
        )
    if attention_mask is not None:
        attention_mask = attention_mask[:, width - listed :]
    # With embeddings and without ids, the ids of `generate` are only those that it generates.
    by_ids = unlisted if input_ids is not None else unlisted + listed
    return Unlisted(by_ids, unlisted), attention_mask


__all__ = ["StackformerGenerationMixin"]
