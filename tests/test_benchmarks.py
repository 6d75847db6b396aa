"""Benchmarks: what they time takes turns, what they report follows from what they measured."""

import argparse
import importlib
import json
import statistics
import sys
import time

import pytest
import torch

from benchmarks import (
    decode,
    delta_bank,
    halting,
    harness,
    long_recall,
    memory_bank,
    models,
    prefill,
    profile_model,
    training,
)
from benchmarks.tasks.recall import DistantRecall
from experiments.rows import DELTA_BANKS, FAMILIES, PLAIN, STACK
from stackformer.training.long_context_trainer import DocumentStreams

SMALL = ["--parameters", "300000", "--layers", "2", "--threads", "1"]
BRIEF = ["--repeats", "2"]


def test_sides_take_turns():
    """Every side is warmed up once; then rounds alternate between forwards and backwards."""
    calls = []
    seconds = harness.take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_budget_ends_the_rounds_after_three():
    calls = []
    harness.take_turns({"a": lambda: calls.append(1)}, repeats=100, budget=0.0)
    assert len(calls) == 1 + 3


@pytest.mark.parametrize("clock", harness.CLOCKS)
def test_a_clock_counts_the_time_or_the_work(clock):
    """To sleep takes time, and no work."""
    [seconds] = harness.take_turns({"a": lambda: time.sleep(0.05)}, repeats=1, clock=clock)["a"]
    assert (seconds >= 0.05) == (clock == "wall")


def test_a_row_has_the_median_and_its_ratio_to_the_base(monkeypatch):
    samples = {"ours": [2.0, 9.0, 4.0], "peer": [1.0, 100.0, 3.0]}
    monkeypatch.setattr(harness, "take_turns", lambda *_: samples)
    args = argparse.Namespace(repeats=3, budget=1.0, device="cpu", clock="wall")
    ours, peer = harness.measure({"T": 5}, dict.fromkeys(samples), args, base="ours", flops={"peer": 7})
    assert ours == {"T": 5, "side": "ours", "seconds": 4.0, "samples": [2.0, 9.0, 4.0], "ratio": 1.0}
    assert (peer["seconds"], peer["ratio"], peer["flops"]) == (3.0, 0.75, 7)
    assert harness.milliseconds(peer) == "3,000 ms (0.75x)"
    assert harness.tokens_per_second({**peer, "tokens": 60}) == "20.0 (1.33x)"
    [alone] = harness.measure({}, {"peer": None}, args, base="absent")[1:]
    assert alone["ratio"] is None


@pytest.mark.parametrize("count", [1, 1 << 14, 1 << 22])
def test_peak_memory_sees_a_known_allocation(count):
    """Two tensors at once, of three that were made; what was there before and what stays do not matter."""
    before, kept = torch.ones(1 << 20), []

    def work():
        first = torch.ones(count)
        second = first + 1
        del first
        kept.append(second * 2)

    expected = 2 * 4 * count
    assert harness.peak_bytes(work) == pytest.approx(expected, rel=0.1, abs=64)
    assert harness.peak_bytes(lambda: before.add_(1)) < 100


def test_peak_memory_of_gradients():
    weight = torch.zeros(1 << 18, requires_grad=True)
    saved_and_gradient = harness.peak_bytes(lambda: torch.autograd.grad(weight.exp().sum(), weight))
    assert saved_and_gradient == pytest.approx(2 * 4 * (1 << 18), rel=0.1)


def test_a_table_has_a_line_for_each_case_and_a_column_for_each_side():
    rows = [
        {"T": 1024, "side": "a", "x": 1},
        {"T": 1024, "side": "b", "x": 2},
        {"T": 2048, "side": "b", "x": 3},
    ]
    text = harness.table(rows, "T", lambda row: str(row["x"]))
    assert text.splitlines() == ["| T | a | b |", "|---|---|---|", "| 1,024 | 1 | 2 |", "| 2,048 | - | 3 |"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.00 B"), (1500, "1.50 kB"), (25e6, "25.0 MB"), (3e12, "3,000 GB")]
)
def test_sizes(count, text):
    assert harness.size(count) == text


@pytest.mark.parametrize("name", FAMILIES)
def test_models_have_the_same_number_of_parameters(name):
    config = models.matched_config(FAMILIES[name], 10_000_000, 8)
    assert models.num_parameters(config) == pytest.approx(10_000_000, rel=models.TOLERANCE)
    with pytest.raises(ValueError, match="`parameters` must be possible with 8 layers"):
        models.matched_config(FAMILIES[name], 1000, 8)


def run(main, arguments, tmp_path, capsys) -> tuple[list[dict], str]:
    """The rows of a benchmark's JSON file, and what it printed."""
    content = main([*arguments, "--json", str(tmp_path / "out.json")])
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["machine"] and saved["arguments"]["json"]
    assert saved["rows"] == json.loads(json.dumps(content["rows"])) and saved["rows"]
    for row in saved["rows"]:
        if "samples" in row:
            assert row["seconds"] == statistics.median(row["samples"]) > 0
    return saved["rows"], capsys.readouterr().out


def assert_ratios(rows: list[dict], case: tuple[str, ...], base: str) -> None:
    for row in rows:
        [reference] = [
            r["seconds"] for r in rows if r["side"] == base and all(r[key] == row[key] for key in case)
        ]
        assert row["ratio"] == row["seconds"] / reference


def test_memory_bank(tmp_path, capsys):
    plot = tmp_path / "plot.png"
    arguments = ["--time", "64", "128", "--memories", "1", "2", "--head_dim", "8", "--threads", "1", *BRIEF]
    arguments += ["--modes", harness.BACKWARD, "--implementations", "chunk"]
    rows, text = run(memory_bank.main, [*arguments, "--plot", str(plot)], tmp_path, capsys)
    sides = {row["side"] for row in rows}
    assert {"bank torch, R=1", "bank torch, R=2", memory_bank.SOFTMAX, *harness.MACHINE} <= sides
    assert_ratios(rows, ("T",), "bank torch, R=1")
    for row in rows:
        assert row["gflops"] == row["flops"] / row["seconds"] / 1e9
        assert (row["side"] in harness.MACHINE) != (row.get("peak_bytes", 0) > 0)
    counted = {(row["T"], row["side"]): row["flops"] for row in rows}
    assert counted[64, "bank torch, R=2"] == 3 * 64 * 4 * 4 * 2 * 8 * 9
    assert counted[128, memory_bank.SOFTMAX] == 3 * 128 * 4 * 128 * 16
    row = next(row for row in rows if row["side"] == "bank torch, R=2")
    assert f"{harness.milliseconds(row)} |" in text
    assert plot.stat().st_size > 1000


def test_delta_bank(tmp_path, capsys):
    arguments = ["--time", "64", "128", "--memories", "1", "2", "--head_dim", "8", "--threads", "1", *BRIEF]
    arguments += ["--modes", harness.BACKWARD, "--implementations", "chunk"]
    rows, text = run(delta_bank.main, arguments, tmp_path, capsys)
    ours, reference = "delta bank torch", "bank torch"
    sides = {(row["R"], row["side"]) for row in rows}
    assert sides == {(1, reference), (1, ours), (1, delta_bank.QWEN3_NEXT), (2, reference), (2, ours)}
    assert_ratios(rows, ("T", "R"), reference)
    assert all(row["peak_bytes"] > 0 for row in rows)
    seconds = {(row["T"], row["R"], row["side"]): row["seconds"] for row in rows}
    quotients = {(row["T"], row["side"]): row["quotient"] for row in delta_bank.ratios(rows, ours, reference)}
    assert quotients == {
        (time, f"{upper} / {lower}, R={memories}"): seconds[time, memories, upper]
        / seconds[time, memories, lower]
        for upper, lower, memories in (
            (ours, reference, 1), (ours, reference, 2), (delta_bank.QWEN3_NEXT, ours, 1)
        )
        for time in (64, 128)
    }  # fmt: skip
    assert f"{harness.milliseconds(rows[1])} |" in text
    assert f"| {quotients[128, f'{ours} / {reference}, R=2']:.2f} |" in text


def test_delta_bank_finds_a_wrong_side(monkeypatch):
    """Before anything is timed: an implementation of ours, or the peer, that is off."""
    delta_bank.check(8, [1, 3])
    with monkeypatch.context() as patch:
        patch.setattr(delta_bank, "qwen3_next", lambda *inputs: 1.01 * torch.ones_like(inputs[2]))
        with pytest.raises((AssertionError, RuntimeError)):
            delta_bank.check(8, [1])
    operator = delta_bank.banked_delta_rule

    def wrong(*inputs, implementation, **options):
        output, state = operator(*inputs, implementation=implementation, **options)
        return (output if implementation == "recurrent" else 1.01 * output), state

    monkeypatch.setattr(delta_bank, "banked_delta_rule", wrong)
    with pytest.raises(AssertionError):
        delta_bank.check(8, [3])


def test_training(tmp_path, capsys):
    chosen = ["--models", PLAIN, DELTA_BANKS, "llama"]
    sizes = ["--time", "32", "64", "--tokens_per_step", "64"]
    rows, text = run(training.main, [*SMALL, *BRIEF, *chosen, *sizes], tmp_path, capsys)
    assert [(row["T"], row["side"]) for row in rows] == [(t, side) for t in (32, 64) for side in chosen[1:]]
    assert all(row["tokens"] == 64 and row["peak_bytes"] > 4 * 300_000 for row in rows)  # the gradients
    assert_ratios(rows, ("T",), PLAIN)
    assert harness.tokens_per_second(rows[1]) in text


def test_prefill(tmp_path, capsys):
    chosen = ["--models", STACK, "llama", "qwen3_next", "rwkv"]
    rows, text = run(
        prefill.main, [*SMALL, *BRIEF, *chosen, "--time", "16", "32", "--max_rwkv", "16"], tmp_path, capsys
    )
    assert [row["side"] for row in rows if row["T"] == 32] == [STACK, "llama", "qwen3_next"]
    assert_ratios(rows, ("T",), STACK)
    assert harness.tokens_per_second(rows[1]) in text


def test_decode(tmp_path, capsys):
    chosen = ["--models", STACK, DELTA_BANKS, "llama", "mamba2", "rwkv", "--no-compile"]
    sizes = ["--contexts", "32", "96", "--batch_size", "1", "2", "--tokens", "2", "--chunk_size", "40"]
    sizes += ["--max_cache_bytes", "300000"]
    rows, text = run(decode.main, [*SMALL, *BRIEF, *chosen, *sizes], tmp_path, capsys)
    size = {(row["context"], row["batch"], row["side"]): row.get("state_bytes") for row in rows}
    for side in (STACK, DELTA_BANKS, "mamba2"):
        assert size[32, 1, side] == size[96, 1, side] == size[96, 2, side] / 2 > 0
    assert size[96, 1, "llama"] > 2 * size[32, 1, "llama"]
    assert (96, 2, "llama") not in size and (32, 2, "rwkv") not in size
    assert ("via generate", 1, "llama") in size
    in_turn = [row for row in rows if str(row["context"]).endswith("in turn")]
    assert [row["side"] for row in in_turn] == ["32", "96"] * 2
    assert_ratios(in_turn, ("context",), "32")
    assert_ratios([row for row in rows if row not in in_turn], ("context", "batch"), STACK)
    assert harness.tokens_per_second(rows[1]) in text


def test_a_context_is_really_read():
    model = models.build(models.matched_config(FAMILIES[PLAIN], 300_000, 1))
    caches = decode.contexts(model, [50, 20], chunk=16)
    for length in (20, 50):
        cache = next(caches)
        assert cache.get_seq_length() == length
    ids = torch.cat([models.random_ids(1, n) for n in (16, 4, 16, 14)], dim=1)
    expected = models.read(model, ids)[1]
    torch.testing.assert_close(
        cache.layers[-1].slices[0][0], expected.layers[-1].slices[0][0], rtol=1e-4, atol=1e-5
    )


def test_halting(tmp_path, capsys):
    sizes = ["--shares", "0", "0.5", "1", "--time", "64", "--batch_size", "2", "--tokens", "2"]
    rows, text = run(halting.main, [*SMALL, *BRIEF, *sizes], tmp_path, capsys)
    assert_ratios(rows, ("use",), halting.FULL)
    halted = {(row["use"], row["side"]): row.get("halted") for row in rows}
    for use in ("training", "prefill", "decoding, batch 2"):
        assert halted[use, halting.FULL] == halted[use, "0% return at once"] == 0
        assert halted[use, "100% return at once"] == 0.75  # three of four ponder steps
        assert 0.3 < halted[use, "50% return at once"] < 0.75
    seconds = {row["side"]: row["seconds"] for row in rows if row["use"] == "prefill"}
    [row] = [r for r in rows if r["use"] == "prefill" and r["side"] == "50% return at once"]
    core = (seconds[halting.FULL] - seconds[halting.ONE]) * 4 / 3
    assert row["core_time_saved"] == pytest.approx((seconds[halting.FULL] - row["seconds"]) / core)
    assert f"{row['core_time_saved']:.0%} of {row['halted']:.0%}" in text


def test_profile(tmp_path, capsys):
    arguments = [*SMALL, "--models", STACK, "--time", "32", "--repeats", "1", "--rows", "3"]
    rows, text = run(profile_model.main, arguments, tmp_path, capsys)
    for use in ("decode step", "prefill", "training step"):
        shares = [row["share"] for row in rows if row["use"] == use]
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert "`aten::mm`" in text


def test_titans(tmp_path, capsys):
    pytest.importorskip("titans_pytorch")
    from benchmarks import titans

    sizes = ["--time", "16", "32", "--head_dim", "4", "--chunk_size", "8", "--max_per_token", "16"]
    recall = ["--recall", str(tmp_path / "recall"), "--recall_steps", "2"]
    rows, text = run(titans.main, [*sizes, *recall, *BRIEF], tmp_path, capsys)
    assert [row["side"] for row in rows] == [*titans.SIDES, titans.OURS, titans.PER_CHUNK]
    assert all(row["peak_bytes"] > 0 for row in rows)
    assert_ratios(rows, ("T",), titans.OURS)
    assert "mqar: accuracy by length" in text and harness.milliseconds(rows[1]) in text


def test_titans_needs_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    monkeypatch.delitem(sys.modules, "benchmarks.titans", raising=False)
    with pytest.raises(ImportError, match=r'pip install "stackformer\[titans\]"'):
        importlib.import_module("benchmarks.titans")


def test_long_recall(tmp_path, capsys):
    """Both methods go on from the same model; where a chunk is a context, they are the same."""
    path = tmp_path / "result.json"
    argv = ["--length", "40", "--short_length", "24", "--steps", "4", "--short_steps", "2", "--num_test", "4"]
    rows = long_recall.main([*argv, "--chunk_size", "8", "--json", str(path)])["rows"]
    assert [row["method"] for row in rows] == [None, "reverse", "truncated"]
    assert rows[1]["loss"] != pytest.approx(rows[2]["loss"], rel=1e-4)
    assert json.loads(path.read_text())["rows"] == rows
    printed = capsys.readouterr().out
    assert "| 24 tokens | 40 tokens |" in printed and "| 40 tokens, new mark, truncated |" in printed
    again = long_recall.main([*argv, "--chunk_size", "40"])["rows"]
    assert again[0]["loss"] == rows[0]["loss"]
    assert again[1]["loss"] == pytest.approx(again[2]["loss"], rel=1e-6)


def test_documents_are_the_sequences_of_a_task():
    documents = long_recall.Documents(DistantRecall(num_kv_pairs=2), size=3, length=30, seed=1)
    streams = DocumentStreams(documents, 1)
    for number, item in enumerate(documents):
        ids, labels = streams[number]["input_ids"], streams[number]["shift_labels"]
        assert len(ids) == 30 and ids.equal(item["input_ids"][:-1]) and labels.equal(item["labels"][1:])
        asked = (labels != -100).nonzero().flatten().tolist()
        assert asked == [27, 29]
        memory = dict(zip(ids[1:6:3].tolist(), ids[2:6:3].tolist(), strict=True))
        assert [memory[ids[t].item()] for t in asked] == labels[asked].tolist()
    assert number == 2
