"""The options of `generate`, each against a decoder written out here that reads every text from its start."""

import itertools

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from stackformer import build_byte_tokenizer
from tests.models import random_ids, spread_weights, tiny_model
from tests.test_generation import generate, greedy
from tests.test_modeling import CLOSE

PAD = 256
# Not 0 for padding: beam search (transformers 5.23) takes that for "no padding token" and pads with the eos.
SMALL_VOCABULARY = {"vocab_size": 6, "pad_token_id": 5, "bos_token_id": None, "eos_token_id": None}

PROMPTS = [[2, 5, 1, 1, 4, 2, 5], [4, 1], [1, 4, 2, 2]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def small():
    """So few tokens that every text of four can be scored; weights far from those that repeat one token."""
    return spread_weights(tiny_model(noise=0.4, **SMALL_VOCABULARY), seed=1)


@torch.no_grad()
def next_log_probs(model, texts):
    """Log-probabilities of the token after each text [texts, tokens], without a cache."""
    return model(texts, use_cache=False).logits[:, -1].log_softmax(-1)


@torch.no_grad()
def greedy_with(model, ids, new_tokens, processors):
    """Greedy decoding without a cache, the logits changed by transformers' processors."""
    for _ in range(new_tokens):
        scores = processors(ids, model(ids, use_cache=False).logits[:, -1].float())
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids


def left_padded(rows, pad=PAD):
    """Token lists of any lengths as a batch, and its mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def beam_search(model, prompt, num_beams, new_tokens, eos=None, length_penalty=1.0):
    """The `num_beams` best ends of `prompt`, as (score, tokens), best first.

    Per step, the best 2 * num_beams continuations are looked at. Of those that end there, the ones among the
    first num_beams are results, their score divided by length ** length_penalty; the best num_beams of the
    others are the next beams.
    """
    running, results = [(0.0, [])], []
    for length in range(1, new_tokens + 1):
        texts = torch.tensor([prompt + tokens for _, tokens in running])
        continuations = [
            (score + log_prob, tokens + [token])
            for (score, tokens), row in zip(running, next_log_probs(model, texts).tolist(), strict=True)
            for token, log_prob in enumerate(row)
        ]
        best = sorted(continuations, reverse=True)[: 2 * num_beams]
        ended = [length == new_tokens or tokens[-1] == eos for _, tokens in best]
        results += [
            (score / length**length_penalty, tokens)
            for (score, tokens), end in zip(best[:num_beams], ended[:num_beams], strict=True)
            if end
        ]
        running = [beam for beam, end in zip(best, ended, strict=True) if not end][:num_beams]
    return sorted(results, reverse=True)[:num_beams]


@torch.no_grad()
def test_enough_beams_find_the_best_of_all_texts(small):
    """As many beams as there are prefixes: beam search is exhaustive search, down to the tenth best."""
    prompt = [1, 4, 2]
    endings = torch.tensor(list(itertools.product(range(6), repeat=4)))
    texts = torch.cat([torch.tensor(prompt).expand(len(endings), -1), endings], dim=1)
    log_probs = small(texts, use_cache=False).logits.log_softmax(-1)[:, 2:-1]
    scores, order = log_probs.gather(-1, endings[..., None]).sum((1, 2)).sort(descending=True)
    assert (scores[:10] - scores[1:11]).min() > 1e-5, "near ties: the order says little"
    found = small.generate(
        torch.tensor([prompt]),
        max_new_tokens=4,
        num_beams=6**3,
        num_return_sequences=10,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(found.sequences[:, 3:], endings[order[:10]])
    torch.testing.assert_close(found.sequences_scores.double(), scores[:10] / 4, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("eos", [None, 4])
def test_beam_search_in_a_left_padded_batch(small, num_beams, length_penalty, eos):
    """Narrow beams, where it matters which state goes on with which beam."""
    ids, mask = left_padded(PROMPTS, pad=5)
    found = small.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=7,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
        early_stopping="never",
        do_sample=False,
        eos_token_id=eos,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ends = found.sequences[:, ids.shape[1] :].unflatten(0, (3, num_beams))
    scores = found.sequences_scores.unflatten(0, (3, num_beams))
    for row, prompt in enumerate(PROMPTS):
        expected = beam_search(small, prompt, num_beams, 7, eos, length_penalty)
        padded = [tokens + [5] * (ends.shape[-1] - len(tokens)) for _, tokens in expected]
        assert ends[row].tolist() == padded
        torch.testing.assert_close(scores[row], torch.tensor([score for score, _ in expected]))


def test_beams_are_worth_testing(small):
    """Wider beams find something else than greedy decoding, and some of it ends early."""
    wide, greedy_texts = ([beam_search(small, prompt, n, 7)[0][1] for prompt in PROMPTS] for n in (5, 1))
    assert wide != greedy_texts
    lengths = {len(tokens) for prompt in PROMPTS for _, tokens in beam_search(small, prompt, 5, 7, eos=4)}
    assert len(lengths) > 2


@torch.no_grad()
def test_sampled_beams(model):
    """The same with and without a cache, and their scores are those of the texts."""
    ids, mask = left_padded([random_ids(1, 9).tolist()[0], random_ids(1, 4, seed=1).tolist()[0]])
    options = {"do_sample": True, "num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found = generate(
            model,
            ids,
            6,
            attention_mask=mask,
            use_cache=use_cache,
            temperature=1.0,
            top_k=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        results.append(found.sequences)
    assert torch.equal(*results)
    assert not torch.equal(results[0], generate(model, ids, 6, attention_mask=mask, num_beams=3)[:1])
    texts, mask = results[0], torch.cat([mask.repeat_interleave(3, 0), mask.new_ones(6, 6)], dim=1)
    log_probs = model(texts, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    scores = log_probs[:, 8:-1].gather(-1, texts[:, 9:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores.double(), scores, rtol=1e-5, atol=1e-5)


PROCESSORS = {
    "repetition_penalty": ({"repetition_penalty": 3.0}, RepetitionPenaltyLogitsProcessor(3.0)),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 1}, NoRepeatNGramLogitsProcessor(1)),
    # The first words are what the model would say.
    "bad_words_ids": None,
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_logits_processors(model, name):
    ids = random_ids(2, 9)
    plain = greedy(model, ids, 14)
    if name == "bad_words_ids":
        bad_words = [[plain[0, 9].item()], plain[1, 10:12].tolist()]
        options, processor = {"bad_words_ids": bad_words}, NoBadWordsLogitsProcessor(bad_words)
    else:
        options, processor = PROCESSORS[name]
    expected = greedy_with(model, ids, 14, LogitsProcessorList([processor]))
    assert torch.equal(generate(model, ids, 14, **options), expected)
    assert not torch.equal(expected, plain), "the processor changes nothing: the test says nothing"


def test_a_processor_of_ones_own(model):
    """It sees the text so far, whatever the model keeps of it."""
    seen = []

    def nothing_twice(ids, scores):
        seen.append(ids.clone())
        return scores.scatter(1, ids, -torch.inf)

    ids = random_ids(2, 9)
    processors = LogitsProcessorList([nothing_twice])
    expected = greedy_with(model, ids, 10, processors)
    seen.clear()
    assert torch.equal(generate(model, ids, 10, logits_processor=processors), expected)
    assert [text.shape[1] for text in seen] == list(range(9, 19))


def first_said_in_one_row(model, ids, new_tokens, row, least):
    """A token that greedy decoding says in `row` only, and its place there, from `least` on."""
    new = greedy(model, ids, new_tokens)[:, ids.shape[1] :].tolist()
    others = {token for other, tokens in enumerate(new) if other != row for token in tokens}
    return next(
        (token, place)
        for place, token in enumerate(new[row])
        if place >= least and token not in others and token not in new[row][:place]
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_that_ends_early(model, use_cache):
    """It goes on as padding, and the others as if nothing had happened."""
    ids = random_ids(3, 9)
    eos, place = first_said_in_one_row(model, ids, 14, row=1, least=2)
    expected = greedy(model, ids, 14)
    expected[1, 9 + place + 1 :] = PAD
    assert torch.equal(generate(model, ids, 14, eos_token_id=eos, use_cache=use_cache), expected)
    alone = generate(model, ids[1:2], 14, eos_token_id=[eos, 999], use_cache=use_cache)
    assert torch.equal(alone[0], expected[1, : 9 + place + 1])


def test_min_new_tokens(model):
    ids = random_ids(1, 9)
    eos, place = first_said_in_one_row(model, ids, 14, row=0, least=1)
    processor = MinNewTokensLengthLogitsProcessor(9, place + 3, eos)
    expected = greedy_with(model, ids, 14, LogitsProcessorList([processor]))
    actual = generate(model, ids, 14, eos_token_id=eos, min_new_tokens=place + 3)
    assert actual.shape[1] >= 9 + place + 3 > generate(model, ids, 14, eos_token_id=eos).shape[1]
    assert torch.equal(actual, expected[:, : actual.shape[1]])


class EnoughTokens(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


def test_a_stopping_criterion_of_ones_own(model):
    """With a token that ends a text, rows that a criterion ended are padded too."""
    ids = random_ids(3, 9)
    expected = greedy(model, ids, 8)
    expected[0, 12:], expected[2, 14:] = PAD, PAD
    criteria = StoppingCriteriaList([EnoughTokens([12, 17, 14])])
    never_said = next(token for token in range(256) if not (expected[:, 9:] == token).any())
    actual = generate(model, ids, 30, stopping_criteria=criteria, eos_token_id=never_said)
    assert torch.equal(actual, expected)


def test_max_time(model):
    """Time is looked at after each token: there is always one."""
    ids = random_ids(2, 9)
    assert torch.equal(generate(model, ids, 30, max_time=0.0), greedy(model, ids, 1))
    assert torch.equal(generate(model, ids, 5, max_time=1000.0), greedy(model, ids, 5))


def test_stop_strings(model):
    """Of two bytes, where the first alone does not stop."""
    tokenizer = build_byte_tokenizer()
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    letters = {"suppress_tokens": [*range(97), *range(123, 261)]}
    text = tokenizer.decode(generate(model, ids, 20, **letters)[0, 5:])
    stop = text[4:6]
    expected = text[: text.index(stop) + 2]
    actual = generate(model, ids, 20, stop_strings=[stop, "Hello"], tokenizer=tokenizer, **letters)
    assert tokenizer.decode(actual[0, 5:]) == expected
    assert len(expected) < 20


@torch.no_grad()
def test_everything_that_generate_returns(model):
    """Scores, logits and hidden states of every step are those of the whole text, read at once."""
    ids, mask = left_padded([random_ids(1, 9).tolist()[0], random_ids(1, 4, seed=1).tolist()[0]])
    found = generate(
        model,
        ids,
        6,
        attention_mask=mask,
        repetition_penalty=1.3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    mask = torch.cat([mask, mask.new_ones(2, 6)], dim=1)
    whole = model(found.sequences, attention_mask=mask, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(
        torch.stack(found.logits, 1).double(), whole.logits[:, 8:-1], rtol=1e-5, atol=1e-5
    )
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    for step, scores in enumerate(found.scores):
        for row, start in enumerate((0, 5)):
            text = found.sequences[row : row + 1, start : 9 + step]
            expected = processor(text, whole.logits[row : row + 1, 8 + step].float())
            # Older versions of transformers penalise the padding token, too.
            others = torch.arange(261) != model.config.pad_token_id
            torch.testing.assert_close(scores[row, others], expected[0, others], rtol=1e-5, atol=1e-5)
    assert len(found.hidden_states) == 6
    assert all(len(states) == model.config.max_ponder_steps + 1 for states in found.hidden_states)
    for depth, expected in enumerate(whole.hidden_states):
        actual = torch.cat([states[depth] for states in found.hidden_states], dim=1)
        kept = mask[:, :-1].bool()
        torch.testing.assert_close(actual[kept], expected[:, :-1][kept], **CLOSE)
    transitions = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    chosen = torch.stack(found.scores, 1).log_softmax(-1).gather(-1, found.sequences[:, 9:, None])
    torch.testing.assert_close(transitions, chosen.squeeze(-1))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", ["last token", "prompt", "padded prompts"])
@torch.no_grad()
def test_classifier_free_guidance(model, use_cache, negative):
    """A second text with a cache of its own, which transformers hands back to the model."""
    ids = random_ids(2, 9)
    prompts = {
        "last token": ids[:, -1:].tolist(),
        "prompt": random_ids(2, 5, seed=7).tolist(),
        "padded prompts": [random_ids(1, 5, seed=7).tolist()[0], random_ids(1, 2, seed=8).tolist()[0]],
    }[negative]
    options = {}
    if negative != "last token":
        negative_ids, negative_mask = left_padded(prompts)
        options = {"negative_prompt_ids": negative_ids, "negative_prompt_attention_mask": negative_mask}
    expected = []
    for row, prompt in enumerate(prompts):
        new = []
        for _ in range(8):
            conditional, unconditional = (
                next_log_probs(model, torch.tensor([start + new]))[0] for start in (ids[row].tolist(), prompt)
            )
            new.append((unconditional + 2.5 * (conditional - unconditional)).argmax().item())
        expected.append(new)
    actual = generate(model, ids, 8, guidance_scale=2.5, use_cache=use_cache, **options)
    assert actual[:, 9:].tolist() == expected
    assert not torch.equal(actual, greedy(model, ids, 8)), "the guidance changes nothing"


@pytest.mark.parametrize("new_texts", [[5, 5], [5, 2]], ids=["as long", "padded"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}], ids=["whole", "chunks"])
def test_a_second_turn_after_left_padding(model, new_texts, options):
    """Prompts of several lengths, an answer, and more text of several lengths: as each row alone, at once."""
    first = [random_ids(1, 9).tolist()[0], random_ids(1, 4, seed=1).tolist()[0]]
    second = [random_ids(1, size, seed=2 + row).tolist()[0] for row, size in enumerate(new_texts)]
    ids, mask = left_padded(first)
    answer = generate(model, ids, 6, attention_mask=mask, return_dict_in_generate=True)
    more_ids, more_mask = left_padded(second)
    # What was read ends before the last token of the answer.
    ids = torch.cat([answer.sequences[:, -1:], more_ids], dim=1)
    mask = torch.cat([mask, mask.new_ones(2, 6), more_mask], dim=1)
    actual = generate(model, ids, 8, attention_mask=mask, past_key_values=answer.past_key_values, **options)
    for row in range(2):
        text = first[row] + answer.sequences[row, 9:].tolist() + second[row]
        expected = greedy(model, torch.tensor([text]), 8)[0, -8:]
        assert torch.equal(actual[row, -8:], expected)


@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
def test_chunked_prefill_of_a_left_padded_batch(model, chunk_size):
    """Some chunks are padding in one row, and the first one in both."""
    prompts = [random_ids(1, 15).tolist()[0], random_ids(1, 3, seed=1).tolist()[0]]
    ids, mask = left_padded(prompts)
    ids, mask = (torch.nn.functional.pad(x, (5, 0), value=value) for x, value in ((ids, PAD), (mask, 0)))
    actual = generate(model, ids, 8, attention_mask=mask, prefill_chunk_size=chunk_size)
    for row, prompt in enumerate(prompts):
        assert torch.equal(actual[row, -8:], greedy(model, torch.tensor([prompt]), 8)[0, -8:])


@pytest.mark.parametrize("draft", ["assistant", "prompt lookup"])
def test_drafts_after_left_padding(model, draft):
    """Drafts are rolled back over a text whose beginning is padding."""
    text = random_ids(1, 6).repeat(1, 3)
    ids, mask = left_padded(text.tolist())
    ids, mask = (torch.nn.functional.pad(x, (7, 0), value=value) for x, value in ((ids, 17), (mask, 0)))
    if draft == "assistant":
        assistant = tiny_model()
        with torch.no_grad():
            noise = torch.randn(assistant.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
            assistant.lm_head.weight += 0.1 * noise
        assistant.generation_config.num_assistant_tokens = 5
        assistant.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": assistant}
    else:
        options = {"prompt_lookup_num_tokens": 5}
    calls = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    actual = generate(model, ids, 30, attention_mask=mask, **options)
    hook.remove()
    assert torch.equal(actual[:, 25:], greedy(model, text, 30)[:, 18:])
    assert max(calls[1:]) > 1, "nothing was ever drafted"
    assert draft != "assistant" or len(calls) < 30, "no draft was ever accepted"


@pytest.mark.parametrize("num_beams", [1, 3])
def test_return_of_a_cache_after_rows_were_multiplied(model, num_beams):
    """`num_return_sequences` and beams multiply the rows of the batch; the cache that comes back has all."""
    ids = random_ids(2, 9)
    torch.manual_seed(0)
    found = generate(
        model,
        ids,
        5,
        do_sample=True,
        num_return_sequences=3,
        num_beams=num_beams,
        return_dict_in_generate=True,
    )
    assert found.sequences.shape == (6, 14) and found.past_key_values.batch_size == 6
    if num_beams == 1:
        following = random_ids(6, 4, seed=3)
        text = torch.cat([found.sequences, following], dim=1)
        actual = generate(model, text, 6, past_key_values=found.past_key_values)
        assert torch.equal(actual, greedy(model, text, 6))
