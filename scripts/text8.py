# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""text8 from a dump of Wikipedia: letters a to z and single spaces, by the rules of Mahoney's wikifil.pl.

    python -m scripts.text8 --data_path enwik9 --output text8

text8 is the first 100 million characters of what enwik9 becomes; enwik8 is its beginning and becomes about
two thirds of that. What a reader of a page would see is kept: captions of pictures and the texts of links,
but no tables, templates or references. Digits are spelled out, and everything else is a space.
Rules: http://mattmahoney.net/dc/textdata.html, appendix A.
"""

import re
from pathlib import Path

from tqdm import tqdm

from experiments.command_line import COUNT, Parser, check_input_file, check_output_file, run_main
from stackformer.files import write_file

SIZE = 100_000_000
DIGITS = (b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine")

# In this order, each on what the one before left: a pattern, what takes its place, and whether only its first
# occurrence counts (0: all do).
RULES = [
    (re.compile(pattern), replacement, count)
    for pattern, replacement, count in (
        (rb"<.*>", b"", 1),  # the tag that ends the record
        (rb"&amp;", b"&", 0),
        (rb"&lt;", b"<", 0),
        (rb"&gt;", b">", 0),
        (rb"<ref[^<]*</ref>", b"", 0),  # references
        (rb"<[^>]*>", b"", 0),  # tags within the page
        (rb"\[http:[^\] ]*", b"[", 0),  # addresses, not their texts
        (rb"(?i)\|thumb", b"", 0),  # pictures, not their captions
        (rb"(?i)\|left", b"", 0),
        (rb"(?i)\|right", b"", 0),
        (rb"(?i)\|\d+px", b"", 0),
        (rb"(?i)\[\[image:[^\[\]]*\|", b"", 0),
        (rb"(?i)\[\[category:([^|\]]*)[^\]]*\]\]", rb"[[\1]]", 0),  # categories by their names
        (rb"\[\[[a-z\-]*:[^\]]*\]\]", b"", 0),  # the same page in other languages
        (rb"\[\[[^\|\]]*\|", b"[[", 0),  # targets of links, not their texts
        (rb"\{\{[^\}]*\}\}", b"", 0),  # templates
        (rb"\{[^\}]*\}", b"", 0),  # tables
        (rb"\[", b"", 0),
        (rb"\]", b"", 0),
        (rb"&[^;]*;", b" ", 0),  # characters by their names
    )
]
REDIRECT = re.compile(rb"(?i)#redirect")
OTHERS = re.compile(rb"[^a-z]+")


def clean(dump: bytes) -> bytes:
    """The text of the pages of a dump (XML), in which every word has a space before it.

    A dump is read in records that end with ">", which pages are free of, since it is `&gt;` there.
    """
    cleaned, in_page, start = [], False, 0
    with tqdm(total=len(dump), desc="clean", unit="B", unit_scale=True, leave=False) as bar:
        while start < len(dump):
            stop = dump.find(b">", start) + 1 or len(dump)
            record = dump[start:stop]
            if b"<text " in record:
                in_page = True
            if REDIRECT.search(record):
                in_page = False
            if in_page:
                cleaned.append(clean_record(record))
            if b"</text>" in record:
                in_page = False
            bar.update(stop - start)
            start = stop
    return b"".join(cleaned)


def clean_record(record: bytes) -> bytes:
    """The words of a part of a page, with a space before each; nothing if there are none."""
    for pattern, replacement, count in RULES:
        record = pattern.sub(replacement, record, count=count)
    record = record.lower()
    for digit, name in enumerate(DIGITS):
        record = record.replace(b"%d" % digit, b" " + name + b" ")
    return OTHERS.sub(b" ", b" " + record + b" ")[:-1]


def write_text8(source: str | Path, output: str | Path, size: int = SIZE) -> None:
    """Write the first `size` characters of what the dump `source` becomes to `output`.

    Raises:
        ValueError: if `source` is no dump.
    """
    check_input_file("data_path", source)
    if not is_dump(source):
        raise ValueError(f"data_path={str(source)!r}: expected a dump of Wikipedia, which begins as XML.")
    text = clean(Path(source).read_bytes())[:size]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_file(output, text)


def is_dump(path: str | Path) -> bool:
    """Whether a file begins as enwik8 and enwik9 do."""
    with Path(path).open("rb") as file:
        return file.read(10) == b"<mediawiki"


def main(argv: list[str] | None = None) -> None:
    """Clean what `argv` says (default: the command line)."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", required=True, help="the dump: enwik9, enwik8, or the beginning of it")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--size", type=COUNT, default=SIZE, help="characters to write, at most")
    args = parser.parse_args(argv)
    check_output_file("output", args.output)
    write_text8(args.data_path, args.output, args.size)


__all__ = ["clean", "is_dump", "main", "write_text8"]


if __name__ == "__main__":
    run_main(main)
