"""A cache that does not fit the model and its input is a ValueError that says why, and changes nothing."""

import copy
import pickle

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Mamba2Config,
    MistralConfig,
    StaticCache,
    set_seed,
)

from stackformer import StackformerCache, StackformerForCausalLM, StackformerStaticCache
from tests.models import random_ids, spread_weights, tiny_config, tiny_model
from tests.test_compile import CONSTANT
from tests.test_generation import generate, greedy
from tests.test_modeling import CLOSE, assert_same_state, every_shape


def filled(model, rows=2, length=9):
    with torch.no_grad():
        return model(random_ids(rows, length), use_cache=True).cache


@torch.no_grad()
def other_weights(**shape):
    model = spread_weights(StackformerForCausalLM(tiny_config(**shape)), seed=5)
    return model.to(torch.float64).eval()


# By what differs from `tiny_model()`, the cache of another model.
FOREIGN = {
    "other weights": lambda: filled(other_weights()),
    "other weights, gone": lambda: pickle.loads(pickle.dumps(filled(other_weights()))),
    "fewer ponder steps": lambda: filled(tiny_model(max_ponder_steps=2)),
    "more ponder steps": lambda: filled(tiny_model(max_ponder_steps=6, halting_threshold=0.0)),
    "banks and levels swapped": lambda: filled(tiny_model(num_memory_banks=3, stack_depth=2)),
    "more banks": lambda: filled(tiny_model(num_memory_banks=3)),
    "more levels": lambda: filled(tiny_model(stack_depth=4)),
    "more heads": lambda: filled(tiny_model(num_attention_heads=4)),
    "a wider core": lambda: filled(tiny_model(bottleneck_size=20)),
    "a longer convolution": lambda: filled(tiny_model(conv_kernel_size=5)),
    "more layers": lambda: filled(tiny_model(num_hidden_layers=3)),
    "fewer layers": lambda: filled(tiny_model(num_hidden_layers=1)),
    "feedback": lambda: filled(tiny_model(feedback=True)),
    "another feature map": lambda: filled(tiny_model(feature_map="exp")),
    **{
        f"mixers: {name}": lambda mixer=name: filled(
            tiny_model(
                mixer_types=[mixer] * 2, sliding_window=7, memory_block=5, num_basis_functions=8
            )
        )
        for name in (
            "attention", "banked_delta_rule", "fast_weights", "fixed_size_attention", "coupled",
            "coupled_angles", "rwkv", "neural_memory", "memory_as_gate", "memory_as_context",
            "continuous_attention",
        )
    },
    "RWKV's feed-forward": lambda: filled(tiny_model(feed_forward_type="rwkv_channel_mix")),
    "without layers": lambda: DynamicCache(),
    "Mistral's": lambda: DynamicCache(config=MistralConfig(num_hidden_layers=2)),
    "Mistral's, static": lambda: StaticCache(config=MistralConfig(num_hidden_layers=2), max_cache_len=30),
    "Mamba's": lambda: DynamicCache(config=Mamba2Config(num_hidden_layers=2)),
    "two caches": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "a tuple": lambda: ((torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 8)),) * 2,
    "a list": lambda: [],
    "a tensor": lambda: torch.zeros(2, 3),
}  # fmt: skip
REFUSED = "`cache` (is the memory of another model|must be a StackformerCache|does not fit)"


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
@torch.no_grad()
def test_the_cache_of_another_model_is_refused(make):
    """By one token and by several, by the model, its head, compiled, and by `generate`; and is left alone."""
    model, cache = tiny_model(), make()
    before = None if not isinstance(cache, StackformerCache) else cache.clone()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (1, 4):
        for module in (model, model.model) if length > 1 else (model, model.model, compiled):
            with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=REFUSED + "|disable"):
                module(random_ids(2, length), cache=cache)
    with pytest.raises(ValueError, match=REFUSED):
        generate(model, random_ids(2, 12), 3, past_key_values=cache)
    torch._dynamo.reset()
    if before is not None:
        assert cache.get_seq_length() == 9
        assert_same_state(cache, before, rtol=0, atol=0)


def test_a_message_says_what_differs():
    model = tiny_model()
    for name, message in {
        "other weights": "`cache` is the memory of another model: other weights",
        "other weights, gone": "`cache` is the memory of another model: other weights",
        "banks and levels swapped": "num_memory_banks=3 instead of 2, stack_depth=2 instead of 3",
        "Mistral's": "must be a StackformerCache of 2 layers .*, got DynamicCache of 2 layers",
        "a tuple": "got tuple",
    }.items():
        with pytest.raises(ValueError, match=message):
            model(random_ids(2, 3), cache=FOREIGN[name]())


@torch.no_grad()
def test_a_state_put_together_by_hand_is_checked():
    """Nobody knows whose it is; its tensors must be as specified."""
    model, state = tiny_model(), filled(tiny_model()).layers[0].slices[0]
    memory, normalizer, past = state
    for wrong, message in {
        (): r"0 tensors instead of the 3 tensors \['memory', 'normalizer', 'past'\]",
        (memory, normalizer): "2 tensors instead of the 3",
        (memory[:, :1], normalizer, past): r"instead of `memory` \[batch, 2, 6, 8, 8\]",
        (memory, normalizer, past.long()): "torch.int64 instead of `past`",
        (memory, normalizer[:1], past): r"different numbers of rows, \[1, 2\]",
    }.items():
        cache = StackformerCache(model.config)
        cache.layers[1].slices = {0: wrong}
        with pytest.raises(ValueError, match=f"layer 1 has .*{message}"):
            model(random_ids(2, 3), cache=cache)
    cache = StackformerCache(model.config)
    cache.layers[0].slices = {7: state}
    with pytest.raises(ValueError, match=r"states of ponder steps \[7\] .* whose states are \[0, 1, 2, 3\]"):
        model(random_ids(2, 3), cache=cache)


@torch.no_grad()
def test_the_same_model_elsewhere_takes_the_cache():
    """Copies, reloads, and a cache that was in another process: the weights are the same."""
    model, more = tiny_model(), random_ids(2, 4, seed=1)
    cache = filled(model)
    expected = model(more, cache=cache.clone()).logits
    twin = copy.deepcopy(model)
    for other, given in (
        (twin, cache.clone()),
        (tiny_model(), pickle.loads(pickle.dumps(cache))),
        (model.model, pickle.loads(pickle.dumps(cache))),
        (model, copy.deepcopy(cache)),
    ):
        outputs = other(more, cache=given)
        if other is not model.model:
            assert torch.equal(outputs.logits, expected)
        other(more, cache=given)  # and from then on it is its own
    twin.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        twin(more, cache=cache)


def test_a_model_that_learns_keeps_its_cache():
    """Truncated backpropagation goes on from what older weights have read."""
    model, ids = tiny_model().train(), random_ids(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cache = None
    for part in ids.split(4, dim=1):
        outputs = model(part, labels=part, cache=cache, use_cache=True)
        outputs.loss.backward()
        optimizer.step()
        cache = outputs.cache.detach()
    assert cache.get_seq_length() == 12


@every_shape
@pytest.mark.parametrize("length", [1, 4])
@torch.no_grad()
def test_another_number_of_rows_is_refused(shape, length):
    model = tiny_model(**shape)
    for rows, given in ((1, 3), (3, 1), (2, 3)):
        cache = filled(model, rows=rows)
        before = cache.clone()
        with pytest.raises(ValueError, match=rf"{rows} rows for an input of {given}.*batch_repeat_interl"):
            model(random_ids(given, length), cache=cache)
        assert_same_state(cache, before, rtol=0, atol=0)
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    model(random_ids(3, length), cache=cache)


@pytest.mark.parametrize("options", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}])
def test_generate_does_not_spread_a_memory_silently(options):
    model = tiny_model()
    cache, ids = filled(model, rows=1), random_ids(1, 12)
    with pytest.raises(ValueError, match="1 rows for an input of 3"):
        generate(model, ids, 3, past_key_values=cache, **options)
    cache.batch_repeat_interleave(3)
    set_seed(0)
    actual = generate(model, ids, 3, past_key_values=cache, **options)
    set_seed(0)
    assert torch.equal(actual, generate(model, ids, 3, **options))


# Going on from a memory.

SECOND_TURNS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": None},
    "chunks": {"prefill_chunk_size": 2},
}


@every_shape
@pytest.mark.parametrize("options", SECOND_TURNS.values(), ids=SECOND_TURNS.keys())
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "new"])
def test_a_second_turn(shape, options, whole):
    """On a cache with the beginning of a text: all of it given, or what is new with a mask of full length."""
    model, rows = tiny_model(**shape), options.get("num_beams", 1)
    ids = random_ids(1, 6).repeat(1, 4)
    expected = generate(model, ids, 12, **({"num_beams": 2} if "num_beams" in options else {}))
    with torch.no_grad():
        cache = model(ids[:, :17].expand(rows, -1), use_cache=True).cache
    if "assistant_model" in options:
        assistant = tiny_model(hidden_size=16, bottleneck_size=None)
        assistant.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": assistant}
    given = {"past_key_values": cache, **options}
    if whole:
        assert torch.equal(generate(model, ids, 12, **given), expected)
    else:
        mask = torch.ones(1, 24, dtype=torch.long)
        actual = generate(model, ids[:, 17:], 12, attention_mask=mask, **given)
        assert torch.equal(actual[:, 7:], expected[:, 24:])
    assert cache.get_seq_length() in (24 + 11, 24 + 10)
    assert cache.unlisted_tokens is None


def test_a_second_turn_of_a_padded_batch():
    """Left padding in the first turn and in the second."""
    model = tiny_model()
    first, second = random_ids(2, 9), random_ids(2, 7, seed=1)
    masks = [torch.ones(2, 9, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)]
    masks[0][0, :4], masks[1][1, :3] = 0, 0
    mask = torch.cat(masks, dim=1)
    for chunk in (None, 3):
        with torch.no_grad():
            cache = model(first, attention_mask=masks[0], use_cache=True).cache
        more = {"past_key_values": cache, "attention_mask": mask, "prefill_chunk_size": chunk}
        actual = generate(model, second, 6, **more)[:, 7:]
        for row in range(2):
            text = torch.cat([first[row][masks[0][row].bool()], second[row][masks[1][row].bool()]])
            assert torch.equal(actual[row], greedy(model, text.unsqueeze(0), 6)[0, -6:])


def test_a_second_turn_from_embeddings():
    model, ids = tiny_model(), random_ids(1, 24)
    expected = generate(model, ids, 8)[:, 24:]
    embeds = model.get_input_embeddings()(ids).detach()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    for chunk in (None, 3):
        for extra in ({}, {"input_ids": ids}):
            with torch.no_grad():
                cache = model(ids[:, :17], use_cache=True).cache
            actual = model.generate(
                inputs_embeds=embeds, past_key_values=cache, prefill_chunk_size=chunk, **extra, **options
            )
            assert torch.equal(actual[:, -8:], expected)
        with torch.no_grad():
            cache = model(ids[:, :17], use_cache=True).cache
        more = {"past_key_values": cache, "attention_mask": torch.ones(1, 24), "prefill_chunk_size": chunk}
        actual = model.generate(inputs_embeds=embeds[:, 17:], **more, **options)
        assert torch.equal(actual[:, -8:], expected)


def test_a_prompt_that_leaves_nothing_to_read_is_refused():
    """And one that the mask does not place: the message says what to pass."""
    model, ids = tiny_model(), random_ids(1, 30)
    for options in ({}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}):
        for given, columns in ((9, None), (9, 9), (5, None), (5, 5), (5, 11), (12, 15), (12, 9)):
            cache = filled(model, rows=1)
            mask = None if columns is None else torch.ones(1, columns, dtype=torch.long)
            with pytest.raises(ValueError, match="must be the whole text, of which the cache holds 9 tokens"):
                generate(model, ids[:, :given], 3, past_key_values=cache, attention_mask=mask, **options)
            assert cache.get_seq_length() == 9
    embeds = torch.zeros(1, 9, model.config.hidden_size, dtype=torch.float64)
    with pytest.raises(ValueError, match="`inputs_embeds` must be the whole text"):
        model.generate(inputs_embeds=embeds, past_key_values=filled(model, rows=1), max_new_tokens=2)


# Compiled decoding.


@pytest.mark.parametrize("shape", CONSTANT.values(), ids=CONSTANT.keys())
@torch.no_grad()
def test_a_compiled_step_does_not_read_padding(shape):
    """Whatever shape its mask has, and in the same graph for every pattern of padding."""
    torch._dynamo.reset()
    model, ids = tiny_model(**shape), random_ids(3, 12)
    step = torch.compile(model, fullgraph=True, backend="eager")
    static, dynamic = StackformerStaticCache(model.config), StackformerCache(model.config)
    for cache in (static, dynamic):
        model(ids[:, :8], cache=cache)
    for t, column in zip(range(8, 12), ([0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]), strict=True):
        mask = torch.tensor(column).unsqueeze(1)
        actual = step(ids[:, t : t + 1], attention_mask=mask, cache=static)
        expected = model(ids[:, t : t + 1], attention_mask=mask, cache=dynamic)
        real = mask.bool()
        torch.testing.assert_close(actual.logits[real], expected.logits[real], **CLOSE)
        torch.testing.assert_close(actual.ponder_steps, expected.ponder_steps, **CLOSE)
        for layer, reference in zip(static.layers, dynamic.layers, strict=True):
            for index, state in reference.slices.items():
                torch.testing.assert_close(layer.slices[index], state, **CLOSE)
    torch._dynamo.reset()


def test_a_first_token_that_is_padding_is_not_read_by_a_static_cache():
    """A batch in which one row gets one new token and another none."""
    model, ids = tiny_model(), random_ids(2, 9)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 9] = 0
    results = []
    for kind in (StackformerCache, StackformerStaticCache):
        cache = kind(model.config)
        with torch.no_grad():
            model(ids, cache=cache)
        more = {"attention_mask": mask, "past_key_values": cache}
        results.append(generate(model, random_ids(2, 1, seed=1), 5, **more))
    assert torch.equal(*results)


# Calls that fail.


class Failure(Exception):
    pass


def fail_in(module, after=0):
    """A hook that lets a call of the module fail, after so many that do not."""
    calls = iter(range(1000))

    def hook(*args):
        if next(calls) >= after:
            raise Failure

    return module.register_forward_hook(hook)


@every_shape
@pytest.mark.parametrize("recording", [False, True])
@torch.no_grad()
def test_a_call_that_fails_leaves_the_cache_as_it_was(shape, recording):
    """At the last layer of any ponder step; with a graph or without, recording or not."""
    model, more = tiny_model(**shape), random_ids(2, 4, seed=1)
    steps = 1 if model.config.feedback else model.config.max_ponder_steps
    for step in range(steps):
        cache = StackformerCache(model.config)
        if recording:
            cache.activate_past_recording()
        model(random_ids(2, 9), cache=cache)
        before, expected = cache.clone(), model(more, cache=cache.clone()).logits
        hook = fail_in(model.model.layers[-1], after=step)
        try:
            model(more, cache=cache)
        except Failure:
            pass
        else:  # no token thought that long
            assert step > 0
            break
        finally:
            hook.remove()
        assert cache.get_seq_length() == 9
        assert_same_state(cache, before, rtol=0, atol=0)
        if recording:
            cache.crop(-3)
            assert_same_state(cache, model(random_ids(2, 9)[:, :6], use_cache=True).cache)
        else:
            assert torch.equal(model(more, cache=cache).logits, expected)


@every_shape
@pytest.mark.parametrize("kind", [StackformerCache, StackformerStaticCache])
@torch.inference_mode()
def test_a_state_that_was_overwritten_by_a_call_that_failed_is_not_read(shape, kind):
    """Decoding writes in place: what is lost must not be taken for what it was."""
    if kind is StackformerStaticCache and shape not in CONSTANT.values():
        pytest.skip("a static cache is for states that do not grow")
    model, token = tiny_model(torch.float32, **shape), random_ids(2, 1)
    cache = kind(model.config)
    model(random_ids(2, 9), cache=cache)
    model(token, cache=cache)
    expected = model(token, cache=cache.clone()).logits
    hook = fail_in(model.model.layers[-1])
    with pytest.raises(Failure):
        model(token, cache=cache)
    hook.remove()
    try:
        logits = model(token, cache=cache).logits
    except ValueError as error:
        assert "a state that a failed call left incomplete" in str(error)
        cache.reset()
        model(token, cache=cache)
    else:
        assert torch.equal(logits, expected)


def test_an_interrupt_of_generate_leaves_a_memory_usable_or_refused():
    model, ids = tiny_model(), random_ids(1, 12)
    cache = filled(model, rows=1)
    hook = fail_in(model.model.layers[0], after=1)
    with pytest.raises(Failure):
        generate(model, ids, 5, past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 9 and cache.unlisted_tokens is None
    assert torch.equal(generate(model, ids, 5, past_key_values=cache), generate(model, ids, 5))


# The caches of transformers.


@pytest.mark.parametrize("shape", CONSTANT.values(), ids=CONSTANT.keys())
def test_caches_that_transformers_builds(shape):
    model, ids = tiny_model(**shape), random_ids(2, 11)
    expected = generate(model, ids, 6)
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=30),
        StackformerStaticCache(model.config),
    ):
        assert torch.equal(generate(model, ids, 6, past_key_values=cache), expected)
        assert cache.get_seq_length() == 16


@pytest.mark.parametrize(
    "implementation", ["static", "offloaded", "offloaded_static", "sliding_window", "hybrid"]
)
def test_every_implementation_of_a_cache(implementation):
    model, ids = tiny_model(), random_ids(2, 11)
    actual = generate(model, ids, 6, cache_implementation=implementation)
    assert torch.equal(actual, generate(model, ids, 6))


def test_types_of_caches():
    model, ids = tiny_model(), random_ids(2, 11)
    for implementation, kind in ((None, DynamicCache), ("static", StaticCache)):
        outputs = generate(model, ids, 3, cache_implementation=implementation, return_dict_in_generate=True)
        assert isinstance(outputs.past_key_values, kind)


# Empty calls, and rows that are not there.


@every_shape
@torch.no_grad()
def test_an_empty_call_changes_nothing(shape):
    model, empty = tiny_model(**shape), torch.zeros(2, 0, dtype=torch.long)
    outputs = model(empty, use_cache=True)
    assert outputs.logits.shape == (2, 0, 261) and outputs.cache.get_seq_length() == 0
    cache = filled(model)
    before = cache.clone()
    assert model(empty, cache=cache).logits.shape == (2, 0, 261)
    assert cache.get_seq_length() == 9
    assert_same_state(cache, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [StackformerCache, StackformerStaticCache])
@torch.no_grad()
def test_rows_that_are_not_there(kind):
    model, cache = tiny_model(), None
    cache = kind(model.config)
    model(random_ids(2, 5), cache=cache)
    before = cache.clone()
    for method, indices in (
        ("reorder_cache", torch.tensor([0, 2])),
        ("reorder_cache", torch.tensor([-1, 0])),
        ("reorder_cache", torch.tensor([[0, 1]])),
        ("batch_select_indices", torch.tensor([5])),
        ("batch_select_indices", torch.tensor([0.0])),
        ("batch_select_indices", torch.tensor([True])),
    ):
        with pytest.raises(ValueError, match="must be rows of the 2 in the cache"):
            getattr(cache, method)(indices)
    with pytest.raises(ValueError, match="`repeats` must be at least 1, got 0"):
        cache.batch_repeat_interleave(0)
    assert_same_state(cache, before, rtol=0, atol=0)
