"""Generation through transformers: greedy, sampling, beams, continuing, padding, pipelines."""

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer, pipeline

from stackformer import StackformerCache, build_byte_tokenizer
from tests.models import random_ids, tiny_model
from tests.test_modeling import assert_same_state, every_shape


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def greedy(model, ids, new_tokens, mask=None):
    """Without a cache: the definition."""
    for _ in range(new_tokens):
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def generate(model, ids, new_tokens, **kwargs):
    kwargs = {"do_sample": False, "eos_token_id": None, "pad_token_id": 256, **kwargs}
    return model.generate(ids, max_new_tokens=new_tokens, **kwargs)


@every_shape
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy(shape, use_cache):
    model, ids = tiny_model(**shape), random_ids(2, 11)
    expected = greedy(model, ids, 12)
    assert torch.equal(generate(model, ids, 12, use_cache=use_cache), expected)
    assert len(set(expected[0, 11:].tolist())) > 2, "the test model repeats itself: the test says little"


def test_left_padded_batch(model):
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :6] = 0
    batch = generate(model, ids, 12, attention_mask=mask)
    assert torch.equal(batch[0, 6:], generate(model, ids[:1, 6:], 12)[0])
    assert torch.equal(batch[1], generate(model, ids[1:], 12)[0])


def test_generate_returns_a_constant_cache():
    model, sizes = tiny_model(halting_threshold=0.0), set()
    for new_tokens in (4, 40):
        outputs = generate(model, random_ids(1, 7), new_tokens, return_dict_in_generate=True)
        assert isinstance(outputs.past_key_values, StackformerCache)
        assert outputs.past_key_values.get_seq_length() == 7 + new_tokens - 1
        sizes.add(outputs.past_key_values.num_bytes)
    assert len(sizes) == 1


@pytest.mark.parametrize("new_text", [1, 5])
def test_continuing_from_a_returned_cache(model, new_text):
    """With several new tokens at once, and the whole text or only its end given."""
    ids = random_ids(2, 9)
    first = generate(model, ids, 6, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, random_ids(2, new_text, seed=5)], dim=1)
    expected = generate(model, whole, 8)
    cache = first.past_key_values
    assert torch.equal(generate(model, whole, 8, past_key_values=cache.clone()), expected)
    only_new = whole[:, cache.get_seq_length() :]
    mask = torch.ones_like(whole)
    continued = generate(model, only_new, 8, past_key_values=cache, attention_mask=mask)
    assert torch.equal(continued[:, only_new.shape[1] :], expected[:, whole.shape[1] :])


def test_sampling_is_the_same_with_and_without_cache(model):
    ids, results = random_ids(2, 9), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(model, ids, 12, do_sample=True, top_k=50, use_cache=use_cache))
    assert torch.equal(*results)
    assert not torch.equal(results[0], generate(model, ids, 12))


def test_num_return_sequences(model):
    torch.manual_seed(0)
    samples = generate(model, random_ids(2, 9), 5, do_sample=True, num_return_sequences=3)
    assert samples.shape == (6, 14) and len({tuple(row) for row in samples.tolist()}) == 6


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beams_are_the_same_with_and_without_cache(model, num_beams):
    ids = random_ids(2, 9)
    with_cache, without = (
        generate(model, ids, 8, num_beams=num_beams, num_return_sequences=2, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_a_dynamic_cache_is_taken_as_well(model):
    ids = random_ids(2, 9)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, 8, past_key_values=cache), generate(model, ids, 8))


def test_inputs_embeds(model):
    ids = random_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    new = model.generate(
        inputs_embeds=embeds, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=256
    )
    assert torch.equal(new, generate(model, ids, 8)[:, 9:])


def test_chunked_prefill(model):
    ids = random_ids(2, 23)
    assert torch.equal(generate(model, ids, 8, prefill_chunk_size=5), generate(model, ids, 8))


def test_text_generation_pipeline(model):
    tokenizer = build_byte_tokenizer()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    prompts = ["Hello", "A longer prompt"]
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    batched = [result[0]["generated_text"] for result in generator(prompts, batch_size=2, **options)]
    assert alone == batched
    expected = greedy(model, tokenizer("Hello", return_tensors="pt").input_ids, 5)[0, 5:]
    assert alone[0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_streaming(model):
    tokenizer = build_byte_tokenizer()
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    expected = generate(model, ids, 12, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(expected[0, 5:])


@every_shape
@pytest.mark.parametrize("prompt_lookup_num_tokens", [2, 7])
def test_prompt_lookup_decoding_is_greedy_decoding(shape, prompt_lookup_num_tokens):
    model = tiny_model(**shape)
    ids = random_ids(1, 6).repeat(1, 4)
    expected = generate(model, ids, 40)
    actual = generate(model, ids, 40, prompt_lookup_num_tokens=prompt_lookup_num_tokens)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("num_assistant_tokens", [1, 5, 12])
@pytest.mark.parametrize("agreeing", [True, False])
def test_assisted_decoding_is_greedy_decoding(model, num_assistant_tokens, agreeing):
    """With an assistant that is nearly the model, whose drafts are kept in part, and with a smaller one."""
    assistant = tiny_model() if agreeing else tiny_model(hidden_size=16, bottleneck_size=None)
    if agreeing:
        with torch.no_grad():
            assistant.lm_head.weight += 0.1 * torch.randn_like(assistant.lm_head.weight)
    assistant.generation_config.num_assistant_tokens = num_assistant_tokens
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ids = random_ids(1, 9)
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    actual = generate(model, ids, 30, assistant_model=assistant)
    hook.remove()
    assert torch.equal(actual, generate(model, ids, 30))
    assert not agreeing or len(lengths) < 30, "no draft was ever accepted"


def test_assisted_decoding_returns_a_cache_of_what_was_kept(model):
    ids = random_ids(1, 6).repeat(1, 4)
    outputs = generate(model, ids, 20, prompt_lookup_num_tokens=5, return_dict_in_generate=True)
    cache = outputs.past_key_values
    length = cache.get_seq_length()
    assert length == outputs.sequences.shape[1] - 1
    with torch.no_grad():
        expected = model(outputs.sequences[:, :length], use_cache=True).past_key_values
    assert_same_state(cache, expected)
