"""The names of whatever version of transformers is installed, and those of all others that are supported."""

import inspect
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaModel
from transformers.utils import TransformersKwargs

from stackformer import (
    StackformerForSequenceClassification,
    StackformerForTokenClassification,
    StackformerModel,
)
from stackformer.versions import CACHE_NAME, NEW_CACHE_NAME, OLD_CACHE_NAME, rename_cache
from tests.models import random_ids, tiny_config, tiny_model
from tests.test_generation import generate
from tests.test_modeling import every_shape

NAMES = pytest.mark.parametrize("name", [OLD_CACHE_NAME, NEW_CACHE_NAME])


@every_shape
@NAMES
@torch.no_grad()
def test_both_names_of_the_cache(shape, name):
    """In `forward` of model and head, in outputs, for many tokens and for one."""
    model, ids = tiny_model(**shape), random_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    for module in (model, model.model):
        outputs = module(ids[:, :7], use_cache=True)
        assert outputs.cache is outputs.past_key_values is not None
        for part in (ids[:, 7:11], ids[:, 11:]):
            outputs = module(part, **{name: outputs.cache})
        hidden = model.lm_head(outputs.last_hidden_state) if module is model.model else outputs.logits
        torch.testing.assert_close(hidden[:, -1], expected[:, -1], rtol=1e-8, atol=1e-9)


@NAMES
def test_both_names_in_generate(name):
    model, ids = tiny_model(), random_ids(2, 12)
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True).cache
    assert torch.equal(generate(model, ids, 6, **{name: cache}), generate(model, ids, 6, use_cache=False))


@torch.no_grad()
def test_one_cache_under_two_names_is_refused():
    model, ids = tiny_model(), random_ids(1, 3)
    cache = model(ids, use_cache=True).cache
    for call in (model, model.model, lambda ids, **kwargs: generate(model, ids, 2, **kwargs)):
        with pytest.raises(ValueError, match="`past_key_values`"):
            call(ids, cache=cache, past_key_values=cache)


def test_the_installed_version_names_the_cache():
    """`CACHE_NAME` is what transformers' own models call it, and what `generate` passes."""
    assert CACHE_NAME in inspect.signature(LlamaModel.forward).parameters
    assert rename_cache({"past_key_values": 1, "x": 2}) == {CACHE_NAME: 1, "x": 2}
    assert rename_cache({"cache": 1}) == {CACHE_NAME: 1}


@pytest.mark.parametrize("head", [False, True])
def test_arguments_in_the_order_of_transformers(head):
    """As far as they are the same, by position, too."""
    ours, theirs = (tiny_model(), LlamaForCausalLM) if head else (StackformerModel, LlamaModel)
    names = [
        name
        for name in inspect.signature(theirs.forward).parameters
        if name not in ("self", "kwargs", "logits_to_keep")
    ]
    names[names.index(CACHE_NAME)] = "cache"
    forward = inspect.signature(ours.forward).parameters
    assert [name for name in forward if name != "self"][: len(names)] == names


CLASSES = {
    "base": StackformerModel,
    "causal": lambda config: tiny_model(),
    "sequence": StackformerForSequenceClassification,
    "token": StackformerForTokenClassification,
}


@pytest.mark.parametrize("build", CLASSES.values(), ids=CLASSES.keys())
@torch.no_grad()
def test_an_unknown_keyword_is_named(build):
    """A cache that a later version calls otherwise must not be ignored."""
    model, ids = build(tiny_config()).eval(), random_ids(1, 3)
    for name in ("past_key_value", "cache_params", "memory", "lables", "halting_treshold"):
        with pytest.raises(TypeError, match=rf"got an unexpected keyword argument '{name}'"):
            model(ids, **{name: None})


@pytest.mark.parametrize("build", CLASSES.values(), ids=CLASSES.keys())
@torch.no_grad()
def test_what_transformers_passes_to_any_model(build):
    model, ids = build(tiny_config()).eval(), random_ids(1, 4)
    given = {
        **dict.fromkeys(TransformersKwargs.__annotations__),
        "return_dict": True,
        "cu_seq_lens_q": torch.tensor([0, 4]),
        "cu_seq_lens_k": torch.tensor([0, 4]),
        "max_length_q": 4,
        "max_length_k": 4,
    }
    outputs = model(ids, **given)
    expected = model(ids)
    assert torch.equal(outputs[0], expected[0])
    assert isinstance(model(ids, return_dict=False), tuple)
    with pytest.raises(ValueError, match="`is_causal` must be True"):
        model(ids, is_causal=False)


def test_code_in_a_checkpoint_fails_loudly(tmp_path):
    """Where the package is not installed, the code that was saved meets whatever transformers is there."""
    tiny_model().save_pretrained(tmp_path)
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
ids = torch.tensor([[1, 2, 3]])
memory = model(ids, use_cache=True).cache
try:
    model(ids, the_next_name_of_the_cache=memory)
except TypeError as error:
    print(error)
whole = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False)
print(torch.equal(whole, model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    message, same = result.stdout.strip().splitlines()
    assert "unexpected keyword argument 'the_next_name_of_the_cache'" in message and same == "True"
