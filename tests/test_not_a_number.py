"""A token that is no number, through the whole model: nothing before it, beside it or around it changes."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.models import SHAPES, random_ids, tiny_model

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
every_value = pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
# A log decay that is NaN changes roundings before it, in its chunk.
CLOSE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.05},
}


def embeddings(model, batch=2, length=21):
    with torch.no_grad():
        return model.get_input_embeddings()(random_ids(batch, length))


@every_shape
@every_value
@pytest.mark.parametrize("dtype", CLOSE)
@torch.no_grad()
def test_tokens_before_it_and_other_rows(shape, value, dtype):
    model = tiny_model(dtype, **shape)
    embeds = embeddings(model)
    expected = model(inputs_embeds=embeds).logits
    for time in (1, 5, 12, 20):
        changed = embeds.clone()
        changed[0, time] = value
        logits = model(inputs_embeds=changed).logits
        torch.testing.assert_close(logits[0, :time], expected[0, :time], **CLOSE[dtype])
        torch.testing.assert_close(logits[1], expected[1], **CLOSE[dtype])
        assert not torch.isfinite(logits[0, time]).any()


@torch.no_grad()
def test_tokens_before_it_with_persistent_tokens_and_a_window():
    """There, queries and keys are wider than values."""
    model = tiny_model(**SHAPES["attention"], sliding_window=4, num_persistent_tokens=2)
    embeds = embeddings(model)
    expected = model(inputs_embeds=embeds).logits
    embeds[0, 12] = torch.nan
    logits = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits[0, :12], expected[0, :12], **CLOSE[torch.float64])
    torch.testing.assert_close(logits[1], expected[1], **CLOSE[torch.float64])


@every_shape
@torch.no_grad()
def test_tokens_before_it_in_calls_that_go_on(shape):
    """Where a chunk, a window or a block has begun in the call before."""
    model = tiny_model(**shape)
    embeds = embeddings(model)
    expected = model(inputs_embeds=embeds).logits
    for time in (8, 11, 20):
        changed = embeds.clone()
        changed[0, time] = torch.nan
        first = model(inputs_embeds=changed[:, :7], use_cache=True)
        rest = model(inputs_embeds=changed[:, 7:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest[0, : time - 7], expected[0, 7:time], **CLOSE[torch.float64])
        torch.testing.assert_close(rest[1], expected[1, 7:], **CLOSE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", ["plain core", "attention", "delta rule", "memory as gate", "infinity-former"]
)
@torch.no_grad()
def test_tokens_before_it_at_sizes_of_use(name, dtype):
    """Where kernels work in blocks: of tokens, of channels, of rows."""
    sizes = {"num_attention_heads": 2, "hidden_size": 128, "chunk_size": None}
    shape = SHAPES[name] | ({"sliding_window": 64} if "sliding_window" in SHAPES[name] else {})
    model = tiny_model(dtype, noise=0.02, **(shape | sizes))
    embeds = embeddings(model, length=300)
    expected = model(inputs_embeds=embeds).logits
    for time in (31, 160, 290):
        changed = embeds.clone()
        changed[0, time] = torch.nan
        logits = model(inputs_embeds=changed).logits
        torch.testing.assert_close(logits[0, :time], expected[0, :time], **CLOSE[dtype])


PADDED = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 12],
    "right": [[1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1] * 12],
    "in between": [[1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]],
    "a whole row": [[0] * 12, [1] * 12],
}


@every_shape
@pytest.mark.parametrize("padded", PADDED.values(), ids=PADDED.keys())
def test_padding(shape, padded):
    """To the last bit: logits, state and gradients, at padding, too."""
    mask = torch.tensor(padded)
    results = []
    for value in (0.0, torch.nan, torch.inf):
        model = tiny_model(torch.float32, **shape)
        embeds = embeddings(model, length=12)
        embeds[mask == 0] = value
        outputs = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
        outputs.logits.square().sum().backward()
        states = [x for layer in outputs.past_key_values.layers for y in layer.slices.values() for x in y]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append([outputs.logits, outputs.ponder_steps, *states, *gradients])
    for other in results[1:]:
        assert len(other) == len(results[0])
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize(
    "name", ["one step", "halting stack", "attention", "delta rule", "neural memory", "rwkv"]
)
@torch.no_grad()
def test_packed_documents(name):
    model = tiny_model(**SHAPES[name])
    embeds = embeddings(model, batch=1)
    positions = torch.cat([torch.arange(9), torch.arange(12)]).unsqueeze(0)
    expected = model(inputs_embeds=embeds, position_ids=positions).logits
    for time, others in ((3, slice(9, None)), (12, slice(0, 12))):
        changed = embeds.clone()
        changed[:, time] = torch.nan
        logits = model(inputs_embeds=changed, position_ids=positions).logits
        torch.testing.assert_close(logits[:, others], expected[:, others], **CLOSE[torch.float64])


@pytest.mark.parametrize("name", ["attention", "sliding window", "memory as context"])
@torch.no_grad()
def test_nobody_looks_where_operators_are_recorded_or_run_for_many(name):
    """To find such tokens is no reason to break `vmap`, or a tracer."""
    model = tiny_model(**(SHAPES[name] | {"mixer_types": SHAPES[name]["mixer_types"][:1] * 2}))
    embeds = embeddings(model, batch=4, length=9).unflatten(0, (2, 2))

    def logits(embeds):
        return model(inputs_embeds=embeds, use_cache=False, halting_threshold=0.0).logits

    expected = torch.stack([logits(part) for part in embeds])
    torch.testing.assert_close(torch.func.vmap(logits)(embeds), expected)
    torch.testing.assert_close(make_fx(logits)(embeds[0])(embeds[1]), expected[1])
