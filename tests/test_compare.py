"""The study of language models: equal sizes, runs that are not repeated, a report; and text8 from a dump."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments import study, text8
from experiments.data import DataArguments, load_splits
from experiments.rows import COMPARED
from experiments.study import Spread
from scripts import compare
from scripts import text8 as text8_command

PAGE = """<mediawiki version="0.3"><page><title>Not this</title><text xml:space="preserve">
#REDIRECT [[Not this either]]</text></page><page><text xml:space="preserve">
'''Naïve''' [[art|Art]], [[Image:A.jpg|thumb|200px|left|in 1907]] &amp;nbsp;&lt;!-- unseen
--&gt; [http://a.org/b the link]{{unseen|1}}
{| unseen |}&lt;ref name=&quot;x&quot;&gt;unseen&lt;/ref&gt; AT&amp;amp;T 5
[[Category:Painting|unseen]] [[de:Unseen]] end</text></page><page><id>7</id></page></mediawiki>
"""
CLEANED = b" na ve art in one nine zero seven the link at t five painting end"
FIRST_WORDS = (
    b" anarchism originated as a term of abuse first used against early working class radicals including the "
    b"diggers of the english revolution"
)
needs_fast_transformers = pytest.mark.skipif(
    compare.CausalLinearAttention is None, reason="needs pytorch-fast-transformers"
)


def test_models_have_equal_parameters():
    sizes = {}
    for name, row in COMPARED.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(compare.config_of(row))
        sizes[name] = model.num_parameters()
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes
    assert 0.98e6 < min(sizes.values()) < 1.02e6


def test_runs_once_and_reports(tmp_path, capsys):
    """On text8, made of a dump; with the operator of fast-transformers scores are the same."""
    dump, folder = tmp_path / "dump", tmp_path / "report"
    dump.write_text(PAGE + PAGE.replace("Art", "Music") * 40, encoding="utf-8")
    rows = [name for name in compare.DEFAULT_ROWS if name == "delta rule" or "linear" in name]
    command = f"--dataset text8 --data_path {dump} --output_dir {folder} --steps 2 --block_size 32".split()
    command += ["--batch_size", "2", "--rows", *rows]
    table = compare.main(command)
    assert list(table) == rows
    cleaned = (folder / "text8").read_bytes()
    assert cleaned.startswith(CLEANED) and b"music" in cleaned
    for name, row in table.items():
        assert 1 < row["bits_per_byte"].median < 9 and row["tokens_per_second"].median > 0, name
    linear = [table[name]["bits_per_byte"].median for name in rows if "linear" in name]
    assert max(linear) == pytest.approx(min(linear), abs=1e-3)
    assert table["delta rule"]["bits_per_byte"].median != pytest.approx(linear[0], abs=1e-3)

    lines = (folder / "runs.jsonl").read_text()
    assert [json.loads(line)["row"] for line in lines.splitlines()] == rows
    report = (folder / "report.md").read_text()
    assert f"of {len(cleaned) * 95 // 100}:{len(cleaned)}, in blocks" in report
    assert all(f"\n| {name} |" in report and f"\n- {name}: " in report for name in rows)
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report in capsys.readouterr().out
    assert compare.main(command) == table
    assert (folder / "runs.jsonl").read_text() == lines


def test_a_line_that_was_cut_off_is_removed(tmp_path):
    """By a kill: the run that it is of is done again."""
    path = tmp_path / "runs.jsonl"
    assert study.read_lines(path) == []
    path.write_text('{"row": "a"}\n{"row": "b"}\n{"row": "c", "bits_')
    assert study.read_lines(path) == [{"row": "a"}, {"row": "b"}]
    assert path.read_text() == '{"row": "a"}\n{"row": "b"}\n'
    path.write_text('{"row": "a"}\nno JSON\n')
    with pytest.raises(ValueError, match="expected the file of finished runs, a JSON object a line"):
        study.read_lines(path)
    assert [x.name for x in tmp_path.iterdir()] == ["runs.jsonl"]


def test_a_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--data_path", "nowhere"])
    assert "--data_path must be a file, got 'nowhere'" in capsys.readouterr().err


@needs_fast_transformers
def test_fast_transformers_is_compared(monkeypatch):
    """And its layers are heard in what is compared."""
    model, ids = compare.check_agreement(40), torch.arange(40).unsqueeze(0)
    before = model(ids).logits
    model.model.layers[0].mixer.gate_proj.weight.data.mul_(-1)
    assert (model(ids).logits - before).abs().max() > 100 * compare.TOLERANCE
    monkeypatch.setattr(compare, "TOLERANCE", 1e-9)
    with pytest.raises(ValueError, match="expected logits that differ by 1e-09, got"):
        compare.check_agreement(40)


def test_a_spread_shows_its_range_if_it_has_one():
    assert Spread(2.0, 2.0, 2.0).text(".1f") == "2.0"
    assert Spread(2.0, 1.0, 3.0).text(".1f") == "2.0 (1.0 to 3.0)"


def test_cleaning():
    assert text8.clean(PAGE.encode()) == CLEANED
    assert text8.clean(b"") == text8.clean(b"no page") == b""


def test_text8_is_made_of_a_dump_only(tmp_path):
    dump, other, output = tmp_path / "dump", tmp_path / "other", tmp_path / "new" / "text8"
    dump.write_text(PAGE, encoding="utf-8")
    text8_command.main(["--data_path", str(dump), "--output", str(output), "--size", "20"])
    assert output.read_bytes() == CLEANED[:20]
    other.write_bytes(CLEANED)
    with pytest.raises(ValueError, match="data_path='.*other': expected a dump"):
        text8.write_text8(other, output)
    assert output.read_bytes() == CLEANED[:20]
    with pytest.raises(ValueError, match="data_path='.*dump': expected text8"):
        load_splits(DataArguments(dataset="text8", data_path=str(dump)))


@pytest.mark.skipif("ENWIK8" not in os.environ, reason="needs enwik8, or its beginning, as $ENWIK8")
def test_the_first_words_of_text8():
    with Path(os.environ["ENWIK8"]).open("rb") as file:
        assert text8.clean(file.read(1 << 20)).startswith(FIRST_WORDS)
