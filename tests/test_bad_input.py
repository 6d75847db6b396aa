"""Bad input to a model is a ValueError that names the argument, the value and what was expected."""

import pytest
import torch

from stackformer import StackformerConfig
from tests.models import SHAPES, random_ids, tiny_model

IDS = random_ids(2, 6)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def ones(*shape, **options):
    return torch.ones(*shape, **options)


WRONG = {
    # ids and embeddings
    "no batch dimension": ({"input_ids": IDS[0]}, r"`input_ids` must be integers .*shape \(6,\)"),
    "too many dimensions": ({"input_ids": IDS[None]}, r"`input_ids` must be integers .*\(1, 2, 6\)"),
    "float ids": ({"input_ids": IDS.float()}, "`input_ids` must be integers .*got torch.float32"),
    "boolean ids": ({"input_ids": IDS > 3}, "`input_ids` must be integers .*got torch.bool"),
    "ids beyond the vocabulary": (
        {"input_ids": IDS + 300},
        "`input_ids` must be from 0 to 260, got ids",
    ),
    "negative ids": ({"input_ids": IDS - 300}, "`input_ids` must be from 0 to 260, got ids from -"),
    "embeddings of another size": (
        {"input_ids": None, "inputs_embeds": ones(2, 6, 23, dtype=torch.float64)},
        r"`inputs_embeds` must be floating-point numbers \[batch, time, 24\]",
    ),
    "embeddings of two dimensions": (
        {"input_ids": None, "inputs_embeds": ones(6, 24, dtype=torch.float64)},
        r"`inputs_embeds` must be .*\(6, 24\)",
    ),
    "integer embeddings": (
        {"input_ids": None, "inputs_embeds": ones(2, 6, 24, dtype=torch.long)},
        "`inputs_embeds` must be .*torch.int64",
    ),
    # masks
    "a mask of another width": ({"attention_mask": ones(2, 7)}, "`attention_mask` must have 6 columns, or 6"),
    "a mask that is added": (
        {"attention_mask": torch.tensor([[0.0] * 5 + [-1e9], [0.0] * 6])},
        "`attention_mask` must be 1 for tokens and 0 for padding",
    ),
    "a mask of minus infinity": ({"attention_mask": ones(2, 6) * -INF}, "`attention_mask` must be 1 for tok"),
    "a mask of weights": ({"attention_mask": ones(2, 6) * 0.5}, "`attention_mask` must be 1 for tokens"),
    "a mask that is no number": ({"attention_mask": ones(2, 6) * NAN}, "`attention_mask` must be 1 for tok"),
    "a mask of counts": (
        {"attention_mask": torch.arange(12).view(2, 6)},
        "`attention_mask` must be 1 for",
    ),
    "a negative mask": ({"attention_mask": -ones(2, 6).long()}, "`attention_mask` must be 1 for tokens"),
    # packed documents
    "descending bounds": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 4, 2, 6])},
        "`cu_seq_lens_q` must ascend from 0 to the length 6",
    ),
    "negative bounds": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, -2, 6])},
        "`cu_seq_lens_q` must ascend",
    ),
    "no bounds": (
        {"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([], dtype=torch.int32)},
        "`cu_seq_lens_q` must ascend",
    ),
    "bounds of two rows": ({"cu_seq_lens_q": torch.tensor([0, 6])}, "`cu_seq_lens_q` must ascend .*2 rows"),
    "positions of another length": ({"position_ids": torch.zeros(2, 3).long()}, "`position_ids` must "),
    "positions of one dimension": ({"position_ids": torch.arange(6)}, "`position_ids` must have shape"),
    "documents that are no integers": ({"seq_idx": ones(2, 6)}, "`seq_idx` and `position_ids` must be integ"),
    # halting
    "depth 0": ({"ponder_depths": torch.zeros(2, 6)}, "`ponder_depths` must be at least 1 .* got 0"),
    "a negative depth": ({"ponder_depths": -ones(2, 6)}, "`ponder_depths` must be at least 1 .* got -1"),
    "a depth that is no number": ({"ponder_depths": ones(2, 6) * NAN}, "`ponder_depths` must be at least 1"),
    "depths of another shape": ({"ponder_depths": ones(6)}, r"`ponder_depths` must have shape \(2, 6\)"),
    "a negative threshold": ({"halting_threshold": -0.1}, "`halting_threshold` must be .* got -0.1"),
    "a threshold of 1": ({"halting_threshold": 1.0}, "`halting_threshold` must be .* got 1.0"),
    "a threshold that is no number": ({"halting_threshold": NAN}, "`halting_threshold` must be .* got nan"),
    # the head
    "a negative number of logits": ({"logits_to_keep": -1}, "`logits_to_keep` must be 0 .* got -1"),
    "labels of another shape": ({"labels": IDS[:, 1:]}, r"`labels` .*integers of shape \(2, 6\).*\(2, 5\)"),
    "labels of one row": ({"labels": IDS[:1]}, r"`labels` .*integers of shape \(2, 6\).*\(1, 6\)"),
    "float labels": ({"labels": IDS.double()}, "`labels` .*integers .*got torch.float64"),
    "labels beyond the vocabulary": ({"labels": IDS + 300}, "`labels` must be from 0 to 260, or -100"),
    "negative labels": ({"labels": IDS - 300}, "`labels` must be from 0 to 260, or -100"),
    "shifted labels of another shape": ({"shift_labels": IDS[:, 1:]}, "`shift_labels` must be integers"),
    "no items in the batch": ({"labels": IDS, "num_items_in_batch": 0}, "`num_items_in_batch` .* got 0"),
    "a tensor of no items": (
        {"labels": IDS, "num_items_in_batch": torch.tensor(0)},
        "`num_items_in_batch` must be at least 1, got 0",
    ),
    "labels for some logits": (
        {"labels": IDS, "logits_to_keep": 2},
        "`logits_to_keep` must be 0 with",
    ),
}


@pytest.mark.parametrize("arguments, message", WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": IDS} | arguments))


@pytest.mark.parametrize("shape", [SHAPES["feedback"], SHAPES["rwkv"], SHAPES["attention"]])
def test_a_mask_of_the_past(shape):
    """It has columns for the tokens in the cache, or none of them."""
    model = tiny_model(**shape)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).cache
        for columns in (1, 7):
            model(IDS[:, :1], attention_mask=torch.ones(2, columns), cache=cache.clone())
        for columns in (6, 8, 2):
            with pytest.raises(ValueError, match="must have 1 columns, or 7 with those of the 6 tokens"):
                model(IDS[:, :1], attention_mask=torch.ones(2, columns), cache=cache)
    assert cache.get_seq_length() == 6


def test_masks_of_every_kind_of_number(model):
    mask = torch.ones(2, 6)
    mask[0, :2] = 0
    expected = model(IDS, attention_mask=mask.bool()).logits
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.long, torch.int32, torch.uint8):
        assert torch.equal(model(IDS, attention_mask=mask.to(dtype)).logits, expected)


def test_what_padding_predicts_is_no_target():
    """The last padding token of a left-padded row does not predict its first token; nor does a document the
    next one's."""
    model, ids, mask = tiny_model(), random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    alone = [
        model(row[mask[i].bool()][None], labels=row[mask[i].bool()][None]).loss for i, row in enumerate(ids)
    ]
    torch.testing.assert_close(loss, (4 * alone[0] + 8 * alone[1]) / 12)
    packed = torch.cat([ids[:1, 4:], ids[1:]], dim=1)
    for packing in (
        {"position_ids": torch.cat([torch.arange(5), torch.arange(9)])[None]},
        {"seq_idx": torch.tensor([[0] * 5 + [1] * 9])},
        {"cu_seq_lens_q": torch.tensor([0, 5, 14])},
    ):
        torch.testing.assert_close(model(packed, labels=packed, **packing).loss, loss)


FIELDS = {
    "rope_theta of 0": {"rope_parameters": {"rope_theta": 0}},
    "rope_theta that is no number": {"rope_parameters": {"rope_theta": NAN}},
    "a vocabulary of 0": {"vocab_size": 0},
    "a padding token that is not there": {"pad_token_id": 300},
    "an end that is not there": {"eos_token_id": [1, 300]},
    "a beginning that is not there": {"bos_token_id": -1},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_fields_that_cannot_be(fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}` must be .* got"):
        StackformerConfig(**fields)


@pytest.mark.parametrize("vocab_size", [1, 200, 256, 258, 260])
def test_a_vocabulary_without_room_for_the_default_tokens(vocab_size):
    config = StackformerConfig(vocab_size=vocab_size)
    for name, default in (("pad_token_id", 256), ("bos_token_id", 257), ("eos_token_id", 258)):
        assert getattr(config, name) == (default if default < vocab_size else None)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_loses_its_special_tokens_can_be_saved(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for config in (loaded.config, loaded.generation_config):
        assert config.pad_token_id is config.bos_token_id is config.eos_token_id is None
    assert loaded(random_ids(1, 5) % 200).logits.shape == (1, 5, 200)
