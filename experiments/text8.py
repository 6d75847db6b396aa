# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The rules by which a dump of Wikipedia becomes text8; `scripts.text8` is the command.

Rules: http://mattmahoney.net/dc/textdata.html, appendix A.
"""

import re
from pathlib import Path

from tqdm import tqdm

from experiments.command_line import check_input_file
from stackformer.files import write_file

SIZE = 100_000_000
DIGITS = (b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine")

# A pattern, its replacement, and how many matches are replaced (0: all). The rules apply one after the other.
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
    """Returns the text of the pages of a dump (XML), in which every word has a space before it.

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
    """Returns the words of a part of a page, with a space before each; nothing if there are none."""
    for pattern, replacement, count in RULES:
        record = pattern.sub(replacement, record, count=count)
    record = record.lower()
    for digit, name in enumerate(DIGITS):
        record = record.replace(b"%d" % digit, b" " + name + b" ")
    return OTHERS.sub(b" ", b" " + record + b" ")[:-1]


def write_text8(source: str | Path, output: str | Path, size: int = SIZE) -> None:
    """Write the first `size` characters of the cleaned dump `source` to `output`.

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
    """Returns whether a file begins as enwik8 and enwik9 do."""
    with Path(path).open("rb") as file:
        return file.read(10) == b"<mediawiki"


__all__ = ["SIZE", "clean", "is_dump", "write_text8"]
