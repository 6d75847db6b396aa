# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Stackformer: a causal language model for transformers whose state does not grow with the context."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache_stackformer import StackformerCache, StackformerStaticCache
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
from .stack_trace import TextTrace
from .tokenization_stackformer import build_byte_tokenizer, train_bpe_tokenizer

__version__ = "0.1.0"

AutoConfig.register("stackformer", StackformerConfig, exist_ok=True)
StackformerConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, StackformerModel),
    (AutoModelForCausalLM, StackformerForCausalLM),
    (AutoModelForSequenceClassification, StackformerForSequenceClassification),
    (AutoModelForTokenClassification, StackformerForTokenClassification),
):
    _auto_class.register(StackformerConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_auto_class.__name__)  # `save_pretrained` writes the code, too

__all__ = [
    "StackTrace",
    "StackformerCache",
    "StackformerConfig",
    "StackformerForCausalLM",
    "StackformerForSequenceClassification",
    "StackformerForTokenClassification",
    "StackformerModel",
    "StackformerPreTrainedModel",
    "StackformerStaticCache",
    "TextTrace",
    "banked_linear_attention",
    "build_byte_tokenizer",
    "train_bpe_tokenizer",
]
