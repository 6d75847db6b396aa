# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Stackformer: a causal language model for transformers whose state does not grow with the context."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_stackformer import StackformerCache
from .configuration_stackformer import StackformerConfig
from .memory_bank import banked_linear_attention
from .modeling_stackformer import (
    StackformerForCausalLM,
    StackformerForSequenceClassification,
    StackformerForTokenClassification,
    StackformerModel,
    StackformerPreTrainedModel,
    StackTrace,
)

__version__ = "0.1.0"

AutoConfig.register("stackformer", StackformerConfig, exist_ok=True)
AutoModel.register(StackformerConfig, StackformerModel, exist_ok=True)
AutoModelForCausalLM.register(StackformerConfig, StackformerForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    StackformerConfig, StackformerForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(StackformerConfig, StackformerForTokenClassification, exist_ok=True)

__all__ = [
    "StackTrace",
    "StackformerCache",
    "StackformerConfig",
    "StackformerForCausalLM",
    "StackformerForSequenceClassification",
    "StackformerForTokenClassification",
    "StackformerModel",
    "StackformerPreTrainedModel",
    "banked_linear_attention",
]
