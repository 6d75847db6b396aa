# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Byte-level tokenizers: plain bytes, and byte-pair encoding (BPE).

Both are plain tokenizer files, which load without this package and without remote code. Ids are the same in
both: byte b has id b, then come the special tokens, then the merged tokens of the BPE.

    0..255  bytes
    256     <|pad|>        257  <|bos|>        258  <|eos|>
    259     <|im_start|>   260  <|im_end|>
    261...  merged tokens of the BPE

Any text is encoded without loss. Nothing is normalised, and no special token is added, because a language
model trains on raw text. Text that spells a special token, such as "<|eos|>", becomes that token (the chat
template needs it) and decodes to the same text. For untrusted text, call the tokenizer with
`split_special_tokens=True`, which encodes it as its bytes. Lone surrogates, which Python strings can hold,
are not Unicode text and cannot be encoded.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL_TOKENS = {
    "pad_token": "<|pad|>",
    "bos_token": "<|bos|>",
    "eos_token": "<|eos|>",
    "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
}
# Each message is rendered independently of the others. So an earlier conversation is a prefix of the later
# one, and a memory of it can be continued. Tools are listed in a message in front of the others. Calls have
# the format of Hermes and Qwen, which servers can parse.
CHAT_TEMPLATE = "".join([
    # The text of a content: a string, or a list of strings and parts {"type": "text", "text": ...}.
    "{% macro text(content) %}",
    "{% if content is string %}{{ content }}",
    "{% elif content is defined and content is sequence and content is not mapping %}",
    "{% for part in content %}",
    "{% if part is string %}{{ part }}",
    "{% elif part is mapping and part['type'] == 'text' %}{{ part['text'] }}",
    "{% else %}{{ raise_exception('content: expected parts of type text, got ' + part | string) }}",
    "{% endif %}{% endfor %}",
    "{% else %}{{ raise_exception('content: expected a string or a list of parts, got ' + ",
    "('nothing' if content is undefined else content | string)) }}",
    "{% endif %}{% endmacro %}",
    # A call of a tool: {"function": {"name": ..., "arguments": ...}}, or without the "function" around it.
    "{% macro call(tool_call) %}",
    "{% set function = tool_call['function'] if tool_call['function'] is defined else tool_call %}",
    "{{ '<tool_call>\n{\"name\": ' + function['name'] | tojson + ', \"arguments\": ' }}",
    "{% if function['arguments'] is string %}{{ function['arguments'] }}",
    "{% elif function['arguments'] is mapping %}{{ function['arguments'] | tojson }}{% else %}{}{% endif %}",
    "{{ '}\n</tool_call>' }}{% endmacro %}",
    "{% if tools %}",
    "{{ '<|im_start|>system\n# Tools\n\n' }}",
    "{{ 'You may call one or more functions to assist with the user query.\n\n' }}",
    "{{ 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}",
    "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}",
    "{{ '\n</tools>\n\nFor each function call, return a json object with function name and ' }}",
    "{{ 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, ' }}",
    "{{ '\"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n' }}",
    "{% endif %}",
    "{% for message in messages %}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}",
    "{% if message['role'] == 'assistant' %}",
    # Training learns these tokens: the answer and its end.
    "{% generation %}",
    "{% set calls = message['tool_calls'] or [] %}",
    "{% if not calls or message['content'] is defined and message['content'] is not none %}",
    "{{ text(message['content']) }}{% endif %}",
    "{% for tool_call in calls %}",
    "{% if not loop.first or message['content'] %}{{ '\n' }}{% endif %}{{ call(tool_call) }}",
    "{% endfor %}",
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{% else %}{{ text(message['content']) + '<|im_end|>\n' }}{% endif %}",
    "{% endfor %}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
])  # fmt: skip


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose ids are UTF-8 bytes: 256 bytes and 5 special tokens, 261 ids in all."""
    return _build_tokenizer(merged_tokens=[], merges=[])


def train_bpe_tokenizer(
    texts: Iterable[str], vocab_size: int, show_progress: bool = True
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE (as GPT-2's: merges never cross words) that extends the byte tokenizer.

    Args:
        texts: training texts. They are read once, so a generator over a file of any size works.
        vocab_size: desired number of ids, at least 261 (bytes and special tokens). A small text may not have
            enough pairs to merge, so size the embedding of a model by `len(tokenizer)`.
        show_progress: whether to show the progress bars of the trainer.

    Raises:
        ValueError: if `vocab_size` is no integer or below 261, or if `texts` is no iterable of strings, or
            has no text.
    """
    check_vocab_size(vocab_size)
    if isinstance(texts, str):
        raise ValueError(f"texts={texts[:20]!r}...: expected an iterable of strings, got a single string.")
    if isinstance(texts, bytes | bytearray | Mapping) or not isinstance(texts, Iterable):
        raise ValueError(f"texts={_shown(texts)}: expected an iterable of strings, got {_kind(texts)}.")
    texts = _strings(texts)
    first = next(texts, None)
    if first is None:
        raise ValueError("texts is empty: expected at least one non-empty string to train on.")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_base_tokens()) + 256,
        initial_alphabet=sorted(bytes_to_unicode().values()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(chain([first], texts), trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    # The trainer orders the alphabet in its own way. So only the merged tokens are kept, in their order.
    learned = sorted(bpe["vocab"], key=bpe["vocab"].get)[256:]
    return _build_tokenizer(learned, [tuple(pair) for pair in bpe["merges"]])


def check_vocab_size(vocab_size: int) -> None:
    """Raises a ValueError unless `vocab_size` is an integer of at least 261."""
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise ValueError(f"vocab_size={vocab_size!r}: expected an integer, got {_kind(vocab_size)}.")
    base_size = len(_base_tokens())
    if vocab_size < base_size:
        raise ValueError(
            f"vocab_size={vocab_size}: expected at least {base_size}, for 256 bytes and the special tokens."
        )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a tokenizer encodes byte b as id b, so that bytes can be used as ids."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    first_tokens = tokenizer.convert_ids_to_tokens(list(range(min(256, len(tokenizer)))))
    return model["type"] == "BPE" and not model["merges"] and first_tokens == _base_tokens()[:256]


def _strings(texts: Iterable[Any]) -> Iterator[str]:
    """Yields the texts that are not empty. Raises a ValueError at the first that is no string."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{number}]={_shown(text)}: expected a string, got {_kind(text)}.")
        if text:
            yield text


def _shown(value: Any) -> str:
    """Returns a short representation of a value for messages."""
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _kind(value: Any) -> str:
    """Returns the name of a value's type for messages."""
    return type(value).__name__


def _base_tokens() -> list[str]:
    """Returns the tokens 0 to 260. Each byte has a printable character, as in all byte-level tokenizers."""
    spelling = bytes_to_unicode()
    *named, extra = SPECIAL_TOKENS.values()
    return [*(spelling[byte] for byte in range(256)), *named, *extra]


def _build_tokenizer(merged_tokens: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of bytes, special tokens and merged tokens."""
    vocab = {token: index for index, token in enumerate(_base_tokens() + merged_tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # Without merges, splitting into words would only take time.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
        **SPECIAL_TOKENS,
    )


__all__ = [
    "SPECIAL_TOKENS",
    "build_byte_tokenizer",
    "check_vocab_size",
    "is_byte_tokenizer",
    "train_bpe_tokenizer",
]
