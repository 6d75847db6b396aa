"""Every field is documented, validated, saved and loaded."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from stackformer import (
    StackformerConfig,
    StackformerForCausalLM,
    configuration_stackformer,
    layers_stackformer,
    mixer_banked_linear_attention,
)
from stackformer.mixer_banked_linear_attention import BankedLinearAttention

PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.json"))


@pytest.mark.parametrize(
    "name,value",
    [
        ("vocab_size", 0),
        ("hidden_size", -1),
        ("hidden_size", "large"),
        ("hidden_size", True),
        ("bottleneck_size", 0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", None),
        ("num_attention_heads", 0),
        ("num_attention_heads", 7),
        ("intermediate_size", 0),
        ("bottleneck_intermediate_size", 1.5),
        ("num_memory_banks", 0),
        ("num_banks_per_tok", 0),
        ("num_banks_per_tok", 5),
        ("num_banks_per_tok", True),
        ("stack_depth", 0),
        ("max_ponder_steps", 0),
        ("halting_threshold", 1.0),
        ("halting_threshold", -0.1),
        ("ponder_loss_coef", float("nan")),
        ("max_decay_rate", -1.0),
        ("max_decay_rate", float("inf")),
        ("feature_map", "cosine"),
        ("conv_kernel_size", 0),
        ("chunk_size", 0),
        ("mixer_types", ["banked_linear_attention"] * 2),
        ("mixer_types", [BankedLinearAttention] * 4),
        ("coupled_state_size", 0),
        ("fast_weights_steps", 0),
        ("fast_weights_decay", 0.0),
        ("fast_weights_decay", 1.01),
        ("fast_weights_rate", -0.5),
        ("feedback", 1),
        ("sliding_window", 0),
        ("num_persistent_tokens", -1),
        ("memory_depth", 0),
        ("memory_chunk_size", 0),
        ("memory_max_step_size", float("nan")),
        ("memory_max_surprise", 0),
        ("memory_max_surprise", float("inf")),
        ("memory_max_surprise", True),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_parameters", {"rope_theta": -1.0}),
        ("rope_parameters", [10000.0]),
        ("hidden_act", "sinus"),
        ("feed_forward_type", "dense"),
        ("norm_type", "batch_norm"),
        ("initializer_range", -0.02),
        ("rms_norm_eps", 0.0),
    ],
)
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*, got {re.escape(repr(value))}"):
        StackformerConfig(**{name: value})


def test_every_field_is_documented():
    own = [name for name in StackformerConfig.__annotations__ if name not in ("model_type",)]
    assert len(own) > 20
    for name in own:
        assert re.search(rf"\b{name}\b.*\(`", StackformerConfig.__doc__), f"{name} is not documented"


def test_defaults_in_the_docstring_are_the_defaults():
    config = StackformerConfig()
    documented = re.findall(
        r"^\s+(\w+) \(`[^)]*?defaults to `?\"?([^`\")]+)`?\"?\)", StackformerConfig.__doc__, re.M
    )
    assert len(documented) > 15
    for name, value in documented:
        actual = getattr(config, name)
        assert str(actual) == value or (isinstance(actual, float) and actual == float(value)), name


def test_names_are_those_of_what_they_name():
    assert set(configuration_stackformer.FEATURE_MAP_NAMES) == set(mixer_banked_linear_attention.FEATURE_MAPS)
    assert set(configuration_stackformer.NORM_TYPES) == set(layers_stackformer.NORMS)
    with pytest.raises(ValueError, match=r"`mixer_types` must be names out of \['attention', .*'full_att"):
        StackformerForCausalLM(StackformerConfig(mixer_types=["full_attention"] * 4))


def test_derived_sizes():
    config = StackformerConfig(hidden_size=96, bottleneck_size=32)
    assert (config.core_size, config.intermediate_size, config.bottleneck_intermediate_size) == (32, 96, 96)
    assert StackformerConfig(hidden_size=96, bottleneck_size=None).core_size == 96
    assert config.mixer_types == ["banked_linear_attention", "banked_delta_rule"] * 2
    assert StackformerConfig(num_hidden_layers=1).mixer_types == ["banked_linear_attention"]
    assert StackformerConfig(num_hidden_layers=3, mixer_types=["rwkv"]).mixer_types == ["rwkv"] * 3
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert StackformerConfig(rope_theta=500.0).rope_parameters["rope_theta"] == 500.0


def test_round_trips(tmp_path):
    config = StackformerConfig(num_memory_banks=7, bottleneck_size=None)
    config.save_pretrained(tmp_path)
    for other in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        StackformerConfig.from_dict(config.to_dict()),
        StackformerConfig(**json.loads(config.to_json_string(use_diff=False))),
    ):
        assert other.to_dict() == config.to_dict()
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is StackformerConfig
    assert loaded.num_memory_banks == 7 and loaded.bottleneck_size is None


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_build_models(path):
    given = json.loads(path.read_text())
    config = StackformerConfig.from_json_file(path)
    if len(given.get("mixer_types", ())) == 1:
        given["mixer_types"] *= config.num_hidden_layers
    for name, value in given.items():
        assert getattr(config, name) == value, f"{name} is not a field"
    assert StackformerForCausalLM(config).num_parameters() > 0


def test_there_are_presets():
    assert {path.stem for path in PRESETS} >= {
        "stackformer-tiny",
        "plain-tiny",
        "wrapper-tiny",
        "softmax-tiny",
        "linear-tiny",
        "titans-mal-tiny",
        "titans-mag-tiny",
        "titans-mac-tiny",
        "rwkv-tiny",
        "coupled-tiny",
        "coupled-angles-tiny",
    }


def test_presets_that_are_compared_have_the_same_size():
    names = (
        "stackformer-tiny", "wrapper-tiny", "softmax-tiny", "linear-tiny", "titans-mal-tiny",
        "titans-mag-tiny", "titans-mac-tiny", "rwkv-tiny", "coupled-tiny", "coupled-angles-tiny",
    )  # fmt: skip
    sizes = {
        path.stem: StackformerForCausalLM(StackformerConfig.from_json_file(path)).num_parameters()
        for path in PRESETS
        if path.stem in names
    }
    assert len(sizes) == len(names)
    assert max(sizes.values()) < 1.02 * min(sizes.values()), sizes
