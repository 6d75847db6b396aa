# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers: nothing is lost, ids are as documented, the files load where the package is not installed."""

import json
import pydoc_data.topics
import random
import subprocess
import sys

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer

from stackformer import StackformerConfig
from stackformer.tokenization_stackformer import build_byte_tokenizer, is_byte_tokenizer, train_bpe_tokenizer
from stackformer.training.trainer import PonderLogging
from tests.models import tiny_model

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


def add(first: int, second: int = 1) -> int:
    """
    Adds two numbers.

    Args:
        first: one of them.
        second: the other.
    """


CALL = {"type": "function", "function": {"name": "add", "arguments": {"first": 1, "text": "\u00e9<&"}}}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"first": 1, "text": "\u00e9<&"}}\n</tool_call>'
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, {"name": "no", "arguments": '{"x": 2}'}]},
    {"role": "tool", "name": "add", "content": "2"},
    {"role": "assistant", "content": "It is \u00e9 2."},
    {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": " 2 + 2?"}]},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "user", "content": ""},
]
RENDERED = [
    "<|im_start|>system\nBe brief.<|im_end|>\n",
    "<|im_start|>user\n1 + 1?<|im_end|>\n",
    f'<|im_start|>assistant\n{CALLED}\n<tool_call>\n{{"name": "no", "arguments": {{"x": 2}}}}\n</tool_call>'
    "<|im_end|>\n",
    "<|im_start|>tool\n2<|im_end|>\n",
    "<|im_start|>assistant\nIt is \u00e9 2.<|im_end|>\n",
    "<|im_start|>user\nAnd 2 + 2?<|im_end|>\n",
    f"<|im_start|>assistant\nLet me see.\n{CALLED}<|im_end|>\n",
    "<|im_start|>user\n<|im_end|>\n",
]


@pytest.mark.parametrize("tools", [None, [add]])
def test_a_conversation_so_far_is_a_prefix_of_what_it_becomes(tokenizer, tools):
    """With tools, calls and contents in parts; where an answer is to come, the answer goes on from there."""
    first = tokenizer.apply_chat_template(CONVERSATION[:1], tools=tools, tokenize=False)
    assert first.endswith(RENDERED[0])
    prefix = first.removesuffix(RENDERED[0])
    assert bool(prefix) == bool(tools)
    if tools:
        assert prefix.startswith("<|im_start|>system\n# Tools\n") and prefix.endswith("<|im_end|>\n")
        assert '"name": "add", "description": "Adds two numbers."' in prefix
    for count in range(1, len(CONVERSATION) + 1):
        expected = prefix + "".join(RENDERED[:count])
        some = CONVERSATION[:count]
        assert tokenizer.apply_chat_template(some, tools=tools, tokenize=False) == expected
        asked = tokenizer.apply_chat_template(some, tools=tools, tokenize=False, add_generation_prompt=True)
        assert asked == expected + "<|im_start|>assistant\n"
        answered = [*some, {"role": "assistant", "content": "Yes."}]
        assert (
            tokenizer.apply_chat_template(answered, tools=tools, tokenize=False) == asked + "Yes.<|im_end|>\n"
        )
        going_on = tokenizer.apply_chat_template(
            answered, tools=tools, tokenize=False, continue_final_message=True
        )
        assert going_on == asked + "Yes."


def test_plain_conversations_are_as_they_always_were(tokenizer):
    """Byte for byte, whatever is said, by whomever."""
    rng = random.Random(1)
    roles = ["system", "user", "assistant", "tool", "critic"]
    texts = [*SAMPLES, *_random_texts(50)]
    for _ in range(100):
        messages = [
            {"role": rng.choice(roles), "content": rng.choice(texts)} for _ in range(rng.randrange(1, 6))
        ]
        expected = "".join(f"<|im_start|>{x['role']}\n{x['content']}<|im_end|>\n" for x in messages)
        assert tokenizer.apply_chat_template(messages, tokenize=False) == expected


def test_the_mask_of_what_the_assistant_says(tokenizer):
    """Its answers and calls, each with its end, which has to be learned, too."""
    encoded = tokenizer.apply_chat_template(
        CONVERSATION, tools=[add], return_dict=True, return_assistant_tokens_mask=True
    )
    said = [
        token for token, mine in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mine
    ]
    expected = [
        text.removeprefix("<|im_start|>assistant\n").removesuffix("\n")
        for text in RENDERED
        if text.startswith("<|im_start|>assistant\n")
    ]
    assert tokenizer.decode(said) == "".join(expected)
    assert said.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": None}, "a string or a list of parts, got (None|nothing)"),
        ({"role": "user"}, "a string or a list of parts, got nothing"),
        ({"role": "user", "content": 3}, "a string or a list of parts, got 3"),
        ({"role": "assistant", "content": None}, "a string or a list of parts, got (None|nothing)"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "a string or a list of parts, got"),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "a string or a list of parts, got {"),
        (
            {"role": "user", "content": [{"type": "image", "url": "a"}]},
            "parts of type text, got {'type': 'image'",
        ),
    ],
)
def test_bad_contents(tokenizer, message, error):
    with pytest.raises(TemplateError, match=f"content: expected {error}"):
        tokenizer.apply_chat_template([message], tokenize=False)


def test_trl_knows_what_the_template_can(tokenizer):
    pytest.importorskip("trl", reason="trl is optional")
    from trl import chat_template_utils as trl

    assert trl.has_generation_markers(tokenizer.chat_template)
    assert trl.supports_tool_calling(tokenizer)
    assert trl.is_chat_template_prefix_preserving(tokenizer)
    assert trl.is_chat_template_stop_token_trained(tokenizer)


def test_trl_learns_from_answers_only(tmp_path):
    """The loss, and what PonderLogging counts, are those of the model on labels that the mask makes."""
    trl = pytest.importorskip("trl", reason="trl is optional")
    import datasets

    class Mine(PonderLogging, trl.SFTTrainer):
        pass

    model, tokenizer = tiny_model(torch.float32), build_byte_tokenizer()
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
    ]
    args = trl.SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, learning_rate=0.0, disable_tqdm=True,
        assistant_only_loss=True, gradient_checkpointing=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"messages": messages}])
    trainer = Mine(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids = torch.tensor([encoded["input_ids"]])
    labels = ids.masked_fill(torch.tensor([encoded["assistant_masks"]]) == 0, -100)
    assert (labels != -100).sum() == len("2") + len("It is 4.") + 2
    with torch.no_grad():
        outputs = model.train()(ids, labels=labels)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)
    assert entry["ponder_steps"] == pytest.approx(outputs.ponder_steps.mean().item(), rel=1e-3)


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


@pytest.mark.parametrize("size", [300.0, "300", True, None])
def test_a_vocabulary_size_is_an_integer(size):
    kind = type(size).__name__
    with pytest.raises(ValueError, match=rf"vocab_size={size!r}: expected an integer, got {kind}"):
        train_bpe_tokenizer(TEXTS, size, show_progress=False)


@pytest.mark.parametrize("wrong", [{"text": "a"}, 3, 0, None, b"bytes", ["a"], 1.5])
@pytest.mark.parametrize("place", [0, 1, 2000])
def test_texts_are_strings(wrong, place):
    """Found where they are, also in the middle of a generator that the trainer reads."""
    texts = (wrong if number == place else "some text" for number in range(2001))
    with pytest.raises(ValueError) as error:
        train_bpe_tokenizer(texts, 300, show_progress=False)
    assert str(error.value) == f"texts[{place}]={wrong!r}: expected a string, got {type(wrong).__name__}."


@pytest.mark.parametrize("texts", [b"bytes", {"text": "a"}, None, 5])
def test_texts_are_an_iterable_of_strings(texts):
    with pytest.raises(
        ValueError, match=r"texts=.*: expected an iterable of strings, got " + type(texts).__name__
    ):
        train_bpe_tokenizer(texts, 300, show_progress=False)


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
