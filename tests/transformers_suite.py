"""transformers' own tests of causal language models, run on this one: for a checkout of transformers.

    make test-transformers TRANSFORMERS=path/to/transformers

copies this file into the checkout, beside the tests of the models that are there, and runs it.
"""

import unittest

import torch
from transformers.models.auto import modeling_auto
from transformers.testing_utils import require_torch

from stackformer import (
    StackformerConfig,
    StackformerForCausalLM,
    StackformerForSequenceClassification,
    StackformerForTokenClassification,
    StackformerModel,
)

from ...causal_lm_tester import CausalLMModelTest, CausalLMModelTester

# The tests look here for what a class is for.
modeling_auto.MODEL_MAPPING_NAMES["stackformer"] = "StackformerModel"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["stackformer"] = (
    "StackformerForSequenceClassification"
)
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["stackformer"] = (
    "StackformerForTokenClassification"
)


class StackformerModelTester(CausalLMModelTester):
    config_class = StackformerConfig
    base_model_class = StackformerModel
    causal_lm_class = StackformerForCausalLM
    sequence_classification_class = StackformerForSequenceClassification
    token_classification_class = StackformerForTokenClassification

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bottleneck_size = 16
        self.expected_num_hidden_layers = StackformerConfig().max_ponder_steps + 1  # hidden states


def states(cache):
    return [x for layer in cache.layers for index in sorted(layer.slices) for x in layer.slices[index]]


@require_torch
class StackformerModelTest(CausalLMModelTest, unittest.TestCase):
    model_tester_class = StackformerModelTester
    has_attentions = False
    pipeline_model_mapping = {
        "feature-extraction": StackformerModel,
        "text-generation": StackformerForCausalLM,
    }

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        self.assertEqual(len(past_key_values.layers), config.num_hidden_layers)
        for tensor in states(past_key_values):
            self.assertEqual(len(tensor), batch_size)

    def _check_caches_are_equal(self, cache1, cache2):
        for actual, expected in zip(states(cache1), states(cache2), strict=True):
            torch.testing.assert_close(actual, expected)

    @unittest.skip("there are no keys and values")
    def test_past_key_values_format(self):
        pass

    def test_model_rope_scaling_frequencies(self):
        """Rotary positions are for softmax attention, and not scaled: any other type is refused."""
        for rope_type in ("linear", "dynamic", "yarn"):
            with self.assertRaisesRegex(ValueError, "`rope_parameters` must be"):
                StackformerConfig(rope_parameters={"rope_type": rope_type, "rope_theta": 10_000.0})

    test_model_rope_scaling_from_config_0_linear = test_model_rope_scaling_frequencies
    test_model_rope_scaling_from_config_1_dynamic = test_model_rope_scaling_frequencies
    test_model_rope_scaling_from_config_2_yarn = test_model_rope_scaling_frequencies
