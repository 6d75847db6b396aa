# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The whole path in a few minutes: train on Python's own help texts, save, reload, generate, draw.

    python -m scripts.demo

Everything it makes is in outputs/demo: the model, its tokenizer, what it generated, and what it did at each
byte of a text that it had not seen (trace.html to explore, trace.png to show).
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments, set_seed

from experiments.command_line import COUNT, Parser, check_output_folder, run_main
from experiments.report import draw_or_warn, machine_line, write_text
from experiments.training import LOGGED_SHARE, build_trainer, save
from stackformer import build_byte_tokenizer

PRESET = Path(__file__).parent.parent / "configs" / "stackformer-tiny.json"
PROMPT = "The function "

# Run in a process of its own, which knows nothing but the folder: the model's code is in there, too.
GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generator(prompt, max_new_tokens=200, do_sample=True, temperature=0.7)[0]["generated_text"])
"""


def main(argv: list[str] | None = None) -> None:
    """Run the demo as `argv` says (default: the command line)."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/demo", help="where everything goes")
    parser.add_argument("--max_steps", type=COUNT, default=250, help="training steps")
    parser.add_argument("--batch_size", type=COUNT, default=8, help="blocks of 256 bytes per step")
    args = parser.parse_args(argv)
    check_output_folder("output_dir", args.output_dir)
    started = time.perf_counter()
    print(machine_line())

    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    split = len(text) * 95 // 100
    tokenizer = build_byte_tokenizer()
    set_seed(0)
    config = AutoConfig.from_pretrained(
        PRESET, num_memory_banks=2
    )  # so that there is something to choose from
    model = AutoModelForCausalLM.from_config(config)
    print(f"{model.num_parameters():,} parameters, {split:,} bytes of Python's help texts to train on")
    arguments = TrainingArguments(
        args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=LOGGED_SHARE,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = build_trainer(model, tokenizer, (text[:split], text[split:]), 256, arguments)
    before = trainer.evaluate()["eval_bits_per_byte"]
    trainer.train()
    save(trainer)
    after = trainer.evaluate()["eval_bits_per_byte"]
    print(f"bits per byte of held-out text: {before:.3f} before, {after:.3f} after training")
    print(f"saved to {args.output_dir}; a new process reloads it and goes on from {PROMPT!r}:\n")
    generated = generate_in_a_new_process(args.output_dir, PROMPT)
    print(generated)
    write_text(Path(args.output_dir, "generated.txt"), generated)

    trace = model.eval().stack_trace(text[split : split + 1000].decode(errors="replace"), tokenizer)
    page, picture = Path(args.output_dir, "trace.html"), Path(args.output_dir, "trace.png")
    trace.to_html(page)
    draw_or_warn(trace.to_png, picture)
    print(f"what the model did at each byte of a held-out text: {page}, {picture}")
    print(f"done in {time.perf_counter() - started:.0f} s")


def generate_in_a_new_process(folder: str, prompt: str) -> str:
    """Returns the continuation of `prompt` by a `pipeline("text-generation")` of the model in `folder`."""
    command = [sys.executable, "-c", GENERATE, str(Path(folder).resolve()), prompt]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"the saved model does not generate:\n{result.stderr}")
    return result.stdout.rstrip("\n")


if __name__ == "__main__":
    run_main(main)
