# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Show what a model did at every token of a text: how long it pondered, where on its stack, in what memories.

    python -m scripts.visualize --model outputs/demo --text "The quick brown fox" --output trace.html
    python -m scripts.visualize --model outputs/demo --output trace.png < text.txt

The page is to explore: every number of every token is in it, and it needs no network. The picture shows the
text coloured by depth, and under it the aggregates. From Python: `model.stack_trace(text, tokenizer)`.
"""

from pathlib import Path

from experiments.command_line import COUNT, Parser, check_output_file, read_text, run_main
from experiments.loading import check_source, load_model, load_saved_tokenizer


def main(argv: list[str] | None = None) -> None:
    """Write what `argv` says (default: the command line)."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="saved model, with its tokenizer")
    parser.add_argument("--text", help="what the model reads; standard input if not given")
    parser.add_argument("--output", default="trace.html", help="file to write: .html or .png")
    parser.add_argument("--max_tokens", type=COUNT, default=2000, help="tokens to show at most")
    args = parser.parse_args(argv)
    suffix = Path(args.output).suffix
    if suffix not in (".html", ".png"):
        raise ValueError(f"output={args.output!r}: expected a file that ends in .html or .png.")
    check_source("model", args.model)
    check_output_file("output", args.output)
    text = read_text("text", args.text)
    if not text:
        raise ValueError("text='': expected a text for the model to read.")
    tokenizer = load_saved_tokenizer("model", args.model)
    model = load_model("model", args.model)
    trace = model.stack_trace(tokenizer(text, return_tensors="pt").input_ids[:, : args.max_tokens], tokenizer)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".html":
        trace.to_html(args.output)
    else:
        trace.to_png(args.output)
    print(f"wrote {args.output}: {trace}")


if __name__ == "__main__":
    run_main(main)
