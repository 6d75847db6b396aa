# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers: nothing is lost, ids are as documented, the files load where the package is not installed."""

import json
import pydoc_data.topics
import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from stackformer import StackformerConfig
from stackformer.tokenization_stackformer import build_byte_tokenizer, is_byte_tokenizer, train_bpe_tokenizer

TEXTS = list(pydoc_data.topics.topics.values())
SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
SAMPLES = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n a \r\n b \r c \t\v\f \x85\u2028",
    "\x00 NUL \x00",
    "".join(map(chr, range(128))),
    "emoji: \U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa",
    "e\u0301 is not \u00e9; \ufb01 is not fi; \u212b is not \u00c5",
    "\ufeffBOM, \ufffd replacement, \ufffe noncharacter, \u00a0no-break",
    "don't , won 't . A sentence !",
    "\u0120\u010a are how byte-level tokenizers spell a space and a newline",
    "<|eos|> text <|im_start|>user\n<|pad|><|eos <|bos|>",
]


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request):
    return build_byte_tokenizer() if request.param == "byte" else _bpe()


def _bpe():
    return train_bpe_tokenizer(TEXTS, 600, show_progress=False)


def _random_texts(count):
    """Texts with characters of every UTF-8 length and all 17 planes."""
    rng = random.Random(0)
    spans = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(count):
        yield "".join(chr(rng.randrange(*rng.choice(spans))) for _ in range(rng.randrange(1, 40)))


def test_round_trip_is_exact(tokenizer):
    for text in [*SAMPLES, *_random_texts(300)]:
        for split in (False, True):
            ids = tokenizer(text, split_special_tokens=split)["input_ids"]
            assert tokenizer.decode(ids) == text, (text, split)


def test_round_trip_of_every_character(tokenizer):
    """Every byte that can be in UTF-8 and every plane: all characters but the surrogates, which are none."""
    for start in range(0, 0x110000, 0x800):
        if not 0xD800 <= start < 0xE000:
            text = "".join(map(chr, range(start, start + 0x800)))
            assert tokenizer.decode(tokenizer.encode(text)) == text, hex(start)


def test_ids_are_the_bytes():
    tokenizer = build_byte_tokenizer()
    assert len(tokenizer) == 261
    text = "".join(map(chr, [*range(0x800), 0xFFFD, 0x1F600, 0x10FFFF]))
    assert tokenizer.encode(text) == list(text.encode("utf-8"))
    # Bytes that are in no UTF-8 text have their ids all the same.
    spelled = tokenizer.convert_ids_to_tokens(list(range(256)))
    assert len(set(spelled)) == 256
    assert tokenizer.convert_tokens_to_ids(spelled) == list(range(256))


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIALS) == [256, 257, 258, 259, 260]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert sorted(tokenizer.all_special_ids) == [256, 257, 258, 259, 260]
    assert tokenizer.decode([97, 258, 98], skip_special_tokens=True) == "ab"


def test_no_special_token_is_added(tokenizer):
    assert tokenizer("a", add_special_tokens=True)["input_ids"] == [97]
    assert tokenizer("a<|eos|>")["input_ids"] == [97, 258]
    as_text = tokenizer("a<|eos|>", split_special_tokens=True)["input_ids"]
    assert not set(as_text) & set(tokenizer.all_special_ids)


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["a", "a b\n\x00"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    length = batch["attention_mask"].shape[1]
    assert batch["attention_mask"].tolist() == [[0] * (length - 1) + [1], [1] * length]
    assert batch["input_ids"][0].tolist() == [256] * (length - 1) + [97]


def test_length_is_unlimited(tokenizer):
    assert tokenizer.model_max_length > 10**20


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi\n"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n hi\n<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == expected + "<|im_start|>assistant\n"
    assert (ids.count(259), ids.count(260)) == (3, 2)


def test_loads_without_the_package(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    StackformerConfig(vocab_size=600).save_pretrained(tmp_path)  # as beside a model, of a type unknown there
    texts = [*SAMPLES, *_random_texts(20)]
    program = """if True:
        import json
        import sys
        sys.modules["stackformer"] = None  # importing it is an ImportError from here on
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        padded = tokenizer(["a", "abc\\x00"], padding=True)
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
        ids = [tokenizer.encode(text) for text in json.loads(sys.argv[2])]
        decoded = [tokenizer.decode(row) for row in ids]
        result = [ids, decoded, dict(padded), chat["input_ids"], tokenizer.model_max_length]
        print("\\n" + json.dumps(result))  # on a line of its own, whatever transformers printed
    """
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), json.dumps(texts)],
        stdin=subprocess.DEVNULL,  # nobody is there to answer whether to run remote code
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    ids, decoded, padded, chat, max_length = json.loads(result.stdout.splitlines()[-1])
    assert ids == [tokenizer.encode(text) for text in texts]
    assert decoded == texts
    assert padded == dict(tokenizer(["a", "abc\x00"], padding=True))
    messages = [{"role": "user", "content": "hi"}]
    assert chat == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert max_length == tokenizer.model_max_length


def test_saved_again_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "first")
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()


def test_bpe_compresses():
    trained_on, held_out = "".join(TEXTS[::2]), "".join(TEXTS[1::2])
    tokenizer = train_bpe_tokenizer([trained_on], 1000, show_progress=False)
    assert len(tokenizer) == 1000
    ids = tokenizer.encode(held_out)
    assert len(ids) < 0.5 * len(held_out.encode("utf-8"))
    assert max(ids) > 260
    assert tokenizer.decode(ids) == held_out


def test_bpe_training_is_deterministic():
    first, second = _bpe(), _bpe()
    assert first.get_vocab() == second.get_vocab()
    assert first.encode(TEXTS[0]) == second.encode(TEXTS[0])


def test_bpe_of_the_smallest_vocabulary_is_the_byte_tokenizer():
    tokenizer = train_bpe_tokenizer(TEXTS[:1], 261, show_progress=False)
    assert tokenizer.get_vocab() == build_byte_tokenizer().get_vocab()
    assert is_byte_tokenizer(tokenizer)
    assert not is_byte_tokenizer(train_bpe_tokenizer(TEXTS[:1], 262, show_progress=False))


def test_bpe_reads_a_generator_once():
    tokenizer = train_bpe_tokenizer((text for text in TEXTS), 600, show_progress=False)
    assert tokenizer.get_vocab() == _bpe().get_vocab()


@pytest.mark.parametrize("size", [0, -1, 260])
def test_too_small_vocabulary(size):
    with pytest.raises(ValueError, match=rf"vocab_size={size}.*261"):
        train_bpe_tokenizer(TEXTS, size, show_progress=False)


@pytest.mark.parametrize("texts", [[], ["", ""], iter(())])
def test_empty_texts(texts):
    with pytest.raises(ValueError, match="texts is empty"):
        train_bpe_tokenizer(texts, 300, show_progress=False)


def test_one_string_is_not_texts():
    with pytest.raises(ValueError, match="texts='abc'.*iterable of strings"):
        train_bpe_tokenizer("abc", 300, show_progress=False)
