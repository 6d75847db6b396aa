"""Feedback: all ponder steps share one state, token by token. All promises: its row in tests/models.py."""

import pytest
import torch

from stackformer import StackformerCache, StackformerStaticCache
from stackformer.training.long_context import long_context_backward
from tests.models import SHAPES, random_ids, tiny_model
from tests.test_modeling import CLOSE, assert_same_state

SHAPE = SHAPES["feedback"]
LENGTH = 6


def one_step(**overrides):
    return {"max_ponder_steps": 1, "stack_depth": 1, **overrides}


@torch.no_grad()
def test_with_one_step_it_is_the_same_model():
    """There is nothing to feed back, whatever the schedule: padded, packed, cached."""
    plain, fed = tiny_model(**one_step()), tiny_model(**one_step(feedback=True))
    ids, mask = random_ids(3, 9), torch.ones(3, 9)
    mask[0, :4], mask[1, 3:5], mask[2, 7:] = 0, 0, 0
    mask[:, 3] = 0  # no row has a token there
    for options in (
        {},
        {"attention_mask": mask},
        {"seq_idx": torch.tensor([[0] * 3 + [1] * 6]).expand(3, -1)},
    ):
        packed = "seq_idx" in options
        expected, actual = plain(ids, **options), fed(ids, **options)
        real = mask.bool() if "attention_mask" in options else torch.ones(3, 9, dtype=torch.bool)
        torch.testing.assert_close(actual.logits[real], expected.logits[real], **CLOSE)
        if not packed:
            assert_same_state(actual.past_key_values, expected.past_key_values)


@torch.no_grad()
def test_one_slice_of_state():
    model = tiny_model(**SHAPE)
    for kind in (StackformerCache, StackformerStaticCache):
        cache = kind(model.config)
        model(random_ids(2, 3), past_key_values=cache)
        assert all(layer.slices.keys() == {0} for layer in cache.layers)
        assert cache.get_seq_length() == 3


@torch.no_grad()
def final_memory(model, ids, start):
    """The memory of the first layer's first step after `ids`, having begun with `start`."""
    cache = StackformerCache(model.config)
    model(ids[:, :1], past_key_values=cache)
    layer = cache.layers[0]
    layer.slices = {0: (start, *layer.slices[0][1:])}
    model(ids[:, 1:], past_key_values=cache)
    return layer.slices[0][0]


def test_transitions_depend_on_the_state():
    """In a recurrence that is parallel over time, the state is an affine function of any earlier one, with
    positive coefficients: it cannot flip what it holds. With feedback, and only with it, it is not."""
    for feedback in (False, True):
        model = tiny_model(
            **(SHAPE | {"feedback": feedback, "halting_threshold": 0.0, "num_hidden_layers": 1})
        )
        ids = random_ids(1, LENGTH)
        cache = model(ids[:, :1], use_cache=True).past_key_values
        start = torch.zeros_like(cache.layers[0].slices[0][0])
        generator = torch.Generator().manual_seed(2)
        one, two = (torch.randn(start.shape, generator=generator, dtype=start.dtype) for _ in range(2))
        ends = [final_memory(model, ids, state) for state in (one, (one + two) / 2, two)]
        curvature = (ends[0] + ends[2] - 2 * ends[1]).abs().max()
        assert (curvature > 1e-3) == feedback, f"{curvature} with feedback={feedback}"


def test_gradients_are_full_backpropagation_through_time():
    """Against finite differences, from the last token's output to the first embedding, through all states."""
    model = tiny_model(**(SHAPE | {"num_hidden_layers": 1, "hidden_size": 8, "bottleneck_size": 4}))
    embeds = model.get_input_embeddings()(random_ids(1, 4)).detach().requires_grad_()

    def last_logits(embeds):
        return model(inputs_embeds=embeds).logits[:, -1].square().mean()

    assert torch.autograd.gradcheck(last_logits, embeds, fast_mode=True)
    assert torch.autograd.grad(last_logits(embeds), embeds)[0][0, 0].abs().max() > 1e-8


def test_checkpoints_keep_the_gradients_of_states():
    ids = random_ids(2, LENGTH)

    def gradients(model):
        model.train()(ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    checkpointed = tiny_model(**SHAPE)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(checkpointed), gradients(tiny_model(**SHAPE)), **CLOSE)


@pytest.mark.parametrize("back", [1, 4])
@torch.no_grad()
def test_rolling_back(back):
    model, ids = tiny_model(**SHAPE), random_ids(2, LENGTH)
    mask = torch.ones(2, LENGTH)
    mask[0, 2] = mask[1, 4] = 0
    cache = StackformerCache(model.config, rollback_window=2)
    model(ids[:, :1], past_key_values=cache)
    cache.activate_past_recording()
    for start, stop in ((1, 3), (3, LENGTH)):
        model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
    if back > cache.layers[0].recording.num_tokens:
        with pytest.raises(ValueError, match="go back at most"):
            cache.crop(-back)
        return
    cache.crop(-back)
    stop = LENGTH - back
    expected = model(ids[:, :stop], attention_mask=mask[:, :stop], use_cache=True).past_key_values
    assert_same_state(cache, expected)


@torch.no_grad()
def test_depths_and_traces_of_packed_documents():
    """Everything that is told of a token is told at its place."""
    model, ids = tiny_model(**SHAPE), random_ids(1, LENGTH)
    idx, depths = torch.tensor([[0, 0, 0, 0, 1, 1]]), torch.tensor([[1, 2, 3, 2, 3, 1]])
    options = {"output_stack_trace": True, "output_hidden_states": True}
    packed = model(ids, seq_idx=idx, ponder_depths=depths, **options)
    assert packed.stack_trace.active.sum(-1).tolist() == depths.tolist()
    for span in (slice(0, 4), slice(4, 6)):
        alone = model(ids[:, span], ponder_depths=depths[:, span], **options)
        for name, tensor in alone.stack_trace.items():
            torch.testing.assert_close(packed.stack_trace[name][:, span], tensor, **CLOSE)
        for states, expected in zip(packed.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(states[:, span], expected, **CLOSE)
        torch.testing.assert_close(packed.logits[:, span], alone.logits, **CLOSE)


@pytest.mark.parametrize("method", ["reverse", "stored", "truncated"])
def test_long_contexts_have_stored_states(method):
    """Every method gives the gradients of one pass. The truncated one does so within a single chunk."""
    model, expected, ids = tiny_model(**SHAPE).train(), tiny_model(**SHAPE).train(), random_ids(2, 11)
    long_context_backward(
        model, ids, labels=ids, chunk_size=11 if method == "truncated" else 3, method=method
    )
    expected(ids, labels=ids).loss.backward()
    for parameter, reference in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, **CLOSE)
