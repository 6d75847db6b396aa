# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Continue a text, or answer a message, with a saved model: prints the words as they come.

python -m scripts.generate --model_name_or_path runs/tiny --prompt "The history of" --max_new_tokens 200
python -m scripts.generate --model_name_or_path runs/tiny --temperature 0 < prompt.txt
python -m scripts.generate --model_name_or_path runs/chat --chat --prompt "What is a stack?"
"""

from dataclasses import dataclass, field

import torch
from transformers import BatchEncoding, PreTrainedTokenizerFast, TextStreamer, set_seed

from experiments.command_line import COUNT, NATURAL, NOT_NEGATIVE, DataclassParser, Range, read_text, run_main
from experiments.loading import check_device, check_source, load_model, load_saved_tokenizer


@dataclass
class GenerationArguments:
    model_name_or_path: str = field(metadata={"help": "Folder of a saved model and its tokenizer."})
    prompt: str | None = field(
        default=None, metadata={"help": "Text to continue; standard input if not given."}
    )
    max_new_tokens: int = field(default=200, metadata={"help": "Tokens to generate at most."})
    temperature: float = field(
        default=0.8, metadata={"help": "Sampling temperature; 0 takes the likeliest token."}
    )
    top_p: float = field(
        default=0.95, metadata={"help": "Sample from the likeliest tokens of this total probability."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    chat: bool = field(
        default=False, metadata={"help": "The prompt is a user's message, put in the chat template."}
    )
    device: str = field(default="cpu", metadata={"help": "Device of the model, such as cuda."})

    def __post_init__(self) -> None:
        COUNT.check("max_new_tokens", self.max_new_tokens)
        NOT_NEGATIVE.check("temperature", self.temperature)
        Range(float, above=0, most=1).check("top_p", self.top_p)
        NATURAL.check("seed", self.seed)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str, chat: bool) -> BatchEncoding:
    """Ids and mask [1, tokens] of a prompt; an empty one is the beginning-of-sequence token."""
    if chat:
        if not prompt:
            raise ValueError("prompt='': expected a message for the chat.")
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    if not prompt and tokenizer.bos_token is None:
        raise ValueError("prompt='': expected a text, this tokenizer has no token to begin with.")
    return tokenizer(prompt or tokenizer.bos_token, return_tensors="pt")


def stop_ids(tokenizer: PreTrainedTokenizerFast, chat: bool) -> list[int]:
    """The tokens that end a generation: end of sequence and, in a chat, the end of the message."""
    vocab = tokenizer.get_vocab()
    names = [tokenizer.eos_token, "<|im_end|>"] if chat else [tokenizer.eos_token]
    return [vocab[name] for name in names if name in vocab]


@torch.no_grad()
def main(argv: list[str] | None = None) -> str:
    """Generate as `argv` says (default: the command line), printing, and return the new text."""
    (args,) = DataclassParser(
        GenerationArguments, description=__doc__.split("\n")[0]
    ).parse_args_into_dataclasses(argv)
    check_source("model_name_or_path", args.model_name_or_path)
    check_device("device", args.device)
    prompt = read_text("prompt", args.prompt)
    tokenizer = load_saved_tokenizer("model_name_or_path", args.model_name_or_path)
    inputs = encode_prompt(tokenizer, prompt, args.chat).to(args.device)
    model = load_model("model_name_or_path", args.model_name_or_path, args.device)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}

    set_seed(args.seed)
    output = model.generate(
        **inputs,
        **(sampling if args.temperature > 0 else {"do_sample": False}),
        max_new_tokens=args.max_new_tokens,
        eos_token_id=stop_ids(tokenizer, args.chat),
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=args.chat, skip_special_tokens=True),
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


__all__ = ["GenerationArguments", "encode_prompt", "main", "stop_ids"]


if __name__ == "__main__":
    run_main(main)
