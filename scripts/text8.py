# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""text8 from a dump of Wikipedia: letters a to z and single spaces, by the rules of Mahoney's wikifil.pl.

    python -m scripts.text8 --data_path enwik9 --output text8

text8 is the first 100 million characters of what enwik9 becomes; enwik8 is its beginning and becomes about
two thirds of that. What a reader of a page would see is kept: captions of pictures and the texts of links,
but no tables, templates or references. Digits are spelled out, and everything else is a space.
Rules: http://mattmahoney.net/dc/textdata.html, appendix A.
"""

from experiments.command_line import COUNT, Parser, check_output_file, run_main
from experiments.text8 import SIZE, write_text8


def main(argv: list[str] | None = None) -> None:
    """Clean what `argv` says (default: the command line)."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", required=True, help="the dump: enwik9, enwik8, or the beginning of it")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--size", type=COUNT, default=SIZE, help="characters to write, at most")
    args = parser.parse_args(argv)
    check_output_file("output", args.output)
    write_text8(args.data_path, args.output, args.size)


if __name__ == "__main__":
    run_main(main)
