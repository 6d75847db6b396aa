"""The recurrent state as an object: batch operations, copies, size, and the errors of a wrong use."""

import copy
import pickle

import pytest
import torch
from torch.utils._pytree import tree_leaves

from stackformer import StackformerCache
from tests.models import random_ids, tiny_config, tiny_model
from tests.test_modeling import CLOSE, assert_same_state, every_shape


def filled_cache(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


def continued(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_reorder(model):
    ids, more, order = random_ids(3, 9), random_ids(3, 4, seed=1), torch.tensor([2, 0, 2])
    cache = filled_cache(model, ids)
    cache.reorder_cache(order)
    expected = continued(model, more, filled_cache(model, ids[order]))
    torch.testing.assert_close(continued(model, more, cache), expected, **CLOSE)


def test_batch_repeat_interleave(model):
    ids, more = random_ids(2, 9), random_ids(6, 4, seed=1)
    cache = filled_cache(model, ids)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6
    expected = continued(model, more, filled_cache(model, ids.repeat_interleave(3, 0)))
    torch.testing.assert_close(continued(model, more, cache), expected, **CLOSE)


@pytest.mark.parametrize(
    "indices", [torch.tensor([2, 0]), torch.tensor([True, False, True])], ids=["ids", "mask"]
)
def test_batch_select_indices(model, indices):
    ids, more = random_ids(3, 9), random_ids(2, 4, seed=1)
    cache = filled_cache(model, ids)
    cache.batch_select_indices(indices)
    expected = continued(model, more, filled_cache(model, ids[indices]))
    torch.testing.assert_close(continued(model, more, cache), expected, **CLOSE)


def test_reset(model):
    ids = random_ids(2, 9)
    cache = filled_cache(model, random_ids(2, 5, seed=3))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.batch_size == -1 and not cache.layers[0].is_initialized
    torch.testing.assert_close(continued(model, ids, cache), model(ids).logits, **CLOSE)


@pytest.mark.parametrize(
    "copied",
    [
        StackformerCache.clone,
        StackformerCache.detach,
        copy.deepcopy,
        lambda cache: pickle.loads(pickle.dumps(cache)),
    ],
    ids=["clone", "detach", "deepcopy", "pickle"],
)
def test_a_copy_goes_its_own_way(model, copied):
    ids, more = random_ids(2, 9), random_ids(2, 4, seed=1)
    cache = filled_cache(model, ids)
    expected = continued(model, more, copied(cache))
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(continued(model, more, copied(cache)), expected, **CLOSE)
    assert_same_state(cache, filled_cache(model, ids))


def test_clone_keeps_the_graph_and_detach_cuts_it(model):
    cache = model(random_ids(2, 9), use_cache=True).past_key_values
    tensors = [
        [t for state in c.layers[0].slices.values() for t in state] for c in (cache.clone(), cache.detach())
    ]
    assert all(tensor.requires_grad for tensor in tensors[0])
    assert not any(tensor.requires_grad for tensor in tensors[1])


def test_a_tensor_of_the_state_is_never_written_in_place(model):
    cache = filled_cache(model, random_ids(2, 9))
    before = [tensor for layer in cache.layers for state in layer.slices.values() for tensor in state]
    values = [tensor.clone() for tensor in before]
    continued(model, random_ids(2, 4), cache)
    assert all(torch.equal(tensor, value) for tensor, value in zip(before, values, strict=True))


def test_size_does_not_depend_on_length():
    model = tiny_model(halting_threshold=0.0)  # a slice that no token has reached is not there yet
    sizes = {filled_cache(model, random_ids(2, length)).num_bytes for length in (30, 300)}
    config = model.config
    heads, size = config.num_attention_heads, config.core_size // config.num_attention_heads
    memories = config.num_memory_banks * config.stack_depth
    per_slice = heads * memories * size * (size + 1) + (config.conv_kernel_size - 1) * 3 * config.core_size
    slices = config.num_hidden_layers * config.max_ponder_steps
    assert sizes == {2 * slices * per_slice * 8}


def test_states_are_float32_in_a_bfloat16_model():
    model = tiny_model(torch.bfloat16)
    cache = filled_cache(model, random_ids(2, 9))
    assert {t.dtype for layer in cache.layers for state in layer.slices.values() for t in state} == {
        torch.float32
    }


def test_offload_and_prefetch(model):
    ids, more = random_ids(2, 9), random_ids(2, 4, seed=1)
    cache = filled_cache(model, ids)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    torch.testing.assert_close(
        continued(model, more, cache), continued(model, more, filled_cache(model, ids)), **CLOSE
    )


def test_it_refuses_to_serve_another_model():
    layer = StackformerCache(tiny_config()).layers[0]
    with pytest.raises(ValueError, match="holds no keys and values"):
        layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


def recording_cache(model, **kwargs):
    cache = StackformerCache(model.config, **kwargs)
    cache.activate_past_recording()
    return cache


@torch.no_grad()
def read_calls(model, ids, sizes, cache, mask=None):
    start = cache.get_seq_length()
    for size in sizes:
        part = None if mask is None else mask[:, : start + size]
        model(ids[:, start : start + size], attention_mask=part, past_key_values=cache)
        start += size
    return cache


@every_shape
@pytest.mark.parametrize("removed", [0, 1, 5, 9, 20])
@pytest.mark.parametrize("sizes", [[20], [11, 9], [7, 1, 1, 1, 10], [1] * 20], ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_crop_is_as_if_never_seen(shape, removed, sizes, padding):
    model, ids, mask = tiny_model(**shape), random_ids(3, 28), None
    if padding:
        mask = torch.ones_like(ids)
        mask[0, :6], mask[1, 12:17], mask[2, 3:20:2] = 0, 0, 0
    cache = read_calls(model, ids, sizes, recording_cache(model), mask)
    cache.crop(-removed)
    kept = 20 - removed
    assert cache.get_seq_length() == kept
    expected = StackformerCache(model.config)
    if kept:
        read_calls(model, ids, [kept], expected, mask)
    assert_same_state(cache, expected)
    more = None if mask is None else torch.cat([mask[:, :kept], mask[:, 20:]], dim=1)
    later = torch.cat([ids[:, :kept], ids[:, 20:]], dim=1)
    assert_same_state(
        read_calls(model, later, [8], cache, more), read_calls(model, later, [8], expected, more)
    )


def test_crop_in_float32():
    model, ids = tiny_model(torch.float32, noise=0.05), random_ids(1, 60)
    cache = read_calls(model, ids, [60], recording_cache(model))
    cache.crop(-17)
    expected = read_calls(model, ids, [43], StackformerCache(model.config))
    assert_same_state(cache, expected, rtol=1e-5, atol=1e-5)


def test_crop_again_and_again(model):
    """As assisted decoding does: draft, verify, take back, draft on."""
    ids, cache, start = random_ids(1, 60), recording_cache(model), 0
    for drafted, removed in [(10, 4), (5, 5), (1, 0), (7, 0), (9, 3)]:
        read_calls(model, ids, [drafted], cache)
        cache.crop(-removed)
        start += drafted - removed
        assert_same_state(cache, read_calls(model, ids, [start], StackformerCache(model.config)))


@pytest.mark.parametrize("sizes", [[100], [1] * 40, [30, 1, 1, 40, 3]], ids=["long", "single", "mixed"])
def test_what_is_recorded_is_bounded_and_the_window_is_kept(model, sizes):
    ids, window = random_ids(2, 100), 8
    cache = read_calls(model, ids, sizes, recording_cache(model, rollback_window=window))
    for layer in cache.layers:
        assert window <= layer.recording.num_tokens <= 2 * window
        for calls in layer.recording._calls.values():
            assert sum(len(call.hidden) for call in calls) <= 2 * 2 * window
    far_back = cache.clone()
    cache.crop(-window)
    assert_same_state(cache, read_calls(model, ids, [sum(sizes) - window], StackformerCache(model.config)))
    for mistaken in (cache, far_back):
        before = mistaken.clone()
        with pytest.raises(ValueError, match="`tokens_to_remove` must go back at most"):
            mistaken.crop(-2 * window - 1)
        assert_same_state(mistaken, before, rtol=0, atol=0)
        assert mistaken.get_seq_length() == before.get_seq_length()


def test_crop_without_recording_and_forwards(model):
    cache = filled_cache(model, random_ids(1, 9))
    assert not cache.layers[0].is_croppable
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="`tokens_to_remove` must be 0 or negative, got 3"):
        cache.crop(3)


def test_a_recording_cache_can_be_copied(model):
    """Without taking the model along."""
    cache = read_calls(model, random_ids(1, 9), [9], recording_cache(model))
    stored = pickle.dumps(cache)
    assert len(stored) < 2 * cache.num_bytes + 10_000
    assert_same_state(pickle.loads(stored), cache)
    assert_same_state(copy.deepcopy(cache), cache)


def test_nothing_but_the_state_is_kept_alive():
    """After a prefill, and after a copy was continued: no views of longer tensors, no older states."""
    model = tiny_model(torch.float32, halting_threshold=0.0)
    with torch.no_grad():
        memory = model(random_ids(2, 40), use_cache=True).past_key_values.clone()
        model(random_ids(2, 1), past_key_values=memory)
    held = [x for layer in memory.layers for value in vars(layer).values() for x in tree_leaves(value)]
    storages = {x.data_ptr(): x.untyped_storage().nbytes() for x in held if torch.is_tensor(x)}
    assert sum(storages.values()) == memory.num_bytes
