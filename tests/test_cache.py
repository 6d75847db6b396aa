"""The recurrent state as an object: batch operations, copies, size, and the errors of a wrong use."""

import copy
import pickle

import pytest
import torch

from stackformer import StackformerCache
from tests.models import random_ids, tiny_config, tiny_model
from tests.test_modeling import CLOSE, assert_same_state


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


def test_size_does_not_depend_on_length(model):
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
