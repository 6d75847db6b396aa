"""docs/adding_a_mixer.md is true: its code runs, and a mixer made so keeps the promises of the others."""

import re
from pathlib import Path

import pytest
import torch

from stackformer import StackformerConfig, StackformerForCausalLM, core_stackformer
from tests.models import random_ids, tiny_model
from tests.test_cache import read_calls, recording_cache
from tests.test_modeling import (
    CLOSE,
    PADDINGS,
    assert_same_state,
    padded,
    read_in_pieces,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "adding_a_mixer.md"
FIELDS = {"mixer_types": ["gated_average", "attention"]}


@pytest.fixture(scope="module", autouse=True)
def run_the_document():
    """All blocks, in one namespace; the row is gone afterwards."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    before, namespace = dict(core_stackformer.MIXERS), {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), namespace)
    yield namespace
    core_stackformer.MIXERS.clear()
    core_stackformer.MIXERS.update(before)


@pytest.mark.parametrize("mask", PADDINGS.values(), ids=PADDINGS.keys())
@torch.no_grad()
def test_padding_and_splits(mask):
    model, ids, mask = tiny_model(**FIELDS), random_ids(2, 9), torch.tensor(mask)
    expected = model(ids, use_cache=True)
    logits, cache = read_in_pieces(model, padded(ids, mask), [6, 1, 7], mask)
    for row in range(2):
        torch.testing.assert_close(logits[row, mask[row].bool()], expected.logits[row], **CLOSE)
    assert_same_state(cache, expected.past_key_values)


def test_crop():
    model, ids = tiny_model(**FIELDS), random_ids(3, 20)
    cache = read_calls(model, ids, [15, 1, 4], recording_cache(model))
    cache.crop(-7)
    assert_same_state(cache, read_calls(model, ids, [13], recording_cache(model)))


def test_a_mixer_that_is_not_there_is_named(tmp_path):
    StackformerForCausalLM(StackformerConfig(num_hidden_layers=2, **FIELDS)).save_pretrained(tmp_path)
    row = core_stackformer.MIXERS.pop("gated_average")
    try:
        with pytest.raises(ValueError, match="`mixer_types` must be names out of .*, got 'gated_average'"):
            StackformerForCausalLM.from_pretrained(tmp_path)
    finally:
        core_stackformer.MIXERS["gated_average"] = row
