"""Documents packed into one row are read as if each stood alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from tests.models import random_ids, tiny_model
from tests.test_modeling import CLOSE, every_shape

LENGTHS = [5, 1, 12, 1, 1, 7]


@pytest.fixture
def documents():
    return [random_ids(1, length, seed=length + i)[0] for i, length in enumerate(LENGTHS)]


def packed_inputs(documents):
    """What transformers' collator makes of the documents, by the ways it has to tell where they begin."""
    features = [{"input_ids": document.tolist(), "labels": document.tolist()} for document in documents]
    ways = {
        "position_ids": ({}, ["position_ids"]),
        "cu_seq_lens": ({"return_flash_attn_kwargs": True}, ["cu_seq_lens_q", "cu_seq_lens_k"]),
        "seq_idx": ({"return_seq_idx": True}, ["seq_idx"]),
    }
    for options, names in ways.values():
        batch = DataCollatorWithFlattening(**options)(features, return_tensors="pt")
        yield {name: batch[name] for name in ["input_ids", "labels", *names]}


@every_shape
@torch.no_grad()
def test_packed_is_separate(shape, documents):
    model = tiny_model(**shape)
    separate = [model(document[None]) for document in documents]
    expected = torch.cat([outputs.logits for outputs in separate], dim=1)
    for inputs in packed_inputs(documents):
        outputs = model(**inputs)
        torch.testing.assert_close(outputs.logits, expected, **CLOSE)
        steps = torch.cat([outputs.ponder_steps for outputs in separate], dim=1)
        torch.testing.assert_close(outputs.ponder_steps, steps, **CLOSE)
        assert outputs.past_key_values is None
    unpacked = model(torch.cat(documents)[None]).logits
    assert (unpacked - expected)[:, 6:].abs().max() > 0.1, "the documents do not matter to each other here"


@every_shape
def test_loss_and_gradients(shape, documents):
    def gradients(losses):
        model.zero_grad()
        sum(losses).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model = tiny_model(**shape, ponder_loss_coef=0.1).train()
    items = sum(LENGTHS) - len(LENGTHS)
    long = [document for document in documents if len(document) > 1]
    expected = gradients(
        [model(document[None], labels=document[None], num_items_in_batch=items).loss for document in long]
    )
    for inputs in packed_inputs(documents):
        actual = gradients([model(**inputs, num_items_in_batch=items).loss])
        torch.testing.assert_close(actual, expected, **CLOSE)


@torch.no_grad()
def test_packed_rows_with_padding(documents):
    """Two rows of different documents, one of them padded in between."""
    model = tiny_model()
    first, second, third = documents[2], documents[5], documents[0]
    ids, idx, mask = random_ids(2, 19), torch.zeros(2, 19, dtype=torch.long), torch.zeros(2, 19)
    ids[0, :12], ids[0, 12:] = first, second
    idx[0, 12:], mask[0] = 1, 1
    ids[1, 2:7], ids[1, 9:16] = third, second
    idx[1, 8:], mask[1, 2:7], mask[1, 9:16] = 1, 1, 1
    logits = model(ids, attention_mask=mask, seq_idx=idx).logits
    for row, start, document in [(0, 0, first), (0, 12, second), (1, 2, third), (1, 9, second)]:
        span = slice(start, start + len(document))
        torch.testing.assert_close(logits[row, span], model(document[None]).logits[0], **CLOSE)


@torch.no_grad()
def test_position_ids_that_do_not_start_again_change_nothing():
    model, ids = tiny_model(), random_ids(2, 9)
    expected = model(ids, use_cache=True)
    positions = torch.arange(9).expand(2, -1)
    torch.testing.assert_close(model(ids, position_ids=positions, use_cache=True).logits, expected.logits)
    cache = model(ids[:, :4], position_ids=positions[:, :4], use_cache=True).past_key_values
    later = model(ids[:, 4:], position_ids=positions[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(later, expected.logits[:, 4:], **CLOSE)


@torch.no_grad()
def test_position_ids_of_a_padded_batch_pack_nothing():
    """As `generate` and many collators make them: 0 at the first token, 0 or 1 at padding."""
    model, ids, mask = tiny_model(), random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = model(ids, attention_mask=mask, use_cache=True)
    for filler in (0, 1):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filler)
        outputs = model(ids, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(outputs.logits, expected.logits, **CLOSE)
        assert outputs.past_key_values is not None


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "`cu_seq_lens_q` must ascend from 0 to the length 6"),
        ({"seq_idx": torch.tensor([[0, 1]])}, "`seq_idx` and `position_ids` must be integers of shape"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": True}, "packed documents"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_ids(1, 6), **arguments)


def test_packed_documents_do_not_go_on_from_a_cache():
    model, ids = tiny_model(), random_ids(1, 6)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="packed documents"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), past_key_values=cache)
