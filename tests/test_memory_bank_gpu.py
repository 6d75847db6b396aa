"""The GPU benchmark: its peers' adapters, its checks in Triton's interpreter, its counts and its table."""

import argparse
import json

import pytest
import torch

from benchmarks import memory_bank_gpu as benchmark
from benchmarks.memory_bank_gpu import BANK, DELTA, OPERATORS, Sizes
from tests.test_memory_bank import DEVICES, WITHOUT_TRITON, multiply_bfloat16_in_the_interpreter

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def gated_linear_attention(query, key, value, g, scale):
    """What flash-linear-attention's `chunk_gla` and, with g [B, T, H], `chunk_simple_gla` are defined as."""
    if g.dim() == 3:
        g = g.unsqueeze(-1)
    state, outputs = 0.0, []
    for t in range(query.shape[1]):
        state = g[:, t].exp().unsqueeze(-1) * state + key[:, t].unsqueeze(-1) * value[:, t].unsqueeze(-2)
        outputs.append(scale * (query[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1), None


def gated_delta_rule(query, key, value, g, beta, scale):
    """Computes flash-linear-attention's `chunk_gated_delta_rule` from its definition."""
    state, outputs = torch.zeros(1), []
    for t in range(query.shape[1]):
        state = g[:, t].exp()[..., None, None] * state
        missing = value[:, t] - (key[:, t].unsqueeze(-1) * state).sum(-2)
        change = beta[:, t].unsqueeze(-1) * missing
        state = state + key[:, t].unsqueeze(-1) * change.unsqueeze(-2)
        outputs.append(scale * (query[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1), None


@pytest.mark.parametrize("memories", [1, 3])
@pytest.mark.parametrize("operator", OPERATORS)
def test_peers_compute_the_same(monkeypatch, operator, memories):
    monkeypatch.setattr(benchmark, "chunk_gla", gated_linear_attention)
    monkeypatch.setattr(benchmark, "chunk_simple_gla", gated_linear_attention)
    monkeypatch.setattr(benchmark, "chunk_gated_delta_rule", gated_delta_rule)
    sizes = Sizes(batch=2, time=9, heads=2, head_dim=4, memories=memories)
    inputs = benchmark.make_inputs(operator, sizes, torch.float32, device="cpu")
    sides = benchmark.sides_for(operator, sizes, [32, 128], torch.bfloat16)
    assert (
        list(sides)
        == {
            (BANK, 1): ["bank, C=32", "bank, C=128", "torch chunks", "fla simple_gla"],
            (BANK, 3): ["bank, C=32", "bank, C=128", "torch chunks", "fla gla, R*K keys"],
            (DELTA, 1): ["delta bank, C=32", "delta bank, C=64", "torch chunks", "fla gated_delta_rule"],
            (DELTA, 3): ["delta bank, C=32", "delta bank, C=64", "torch chunks"],
        }[operator, memories]
    )
    if (operator, memories) == (DELTA, 3):
        return
    peer = benchmark.fla_quotient if operator == BANK else benchmark.fla_delta
    errors = benchmark.errors(peer, inputs, sides["torch chunks"])
    if operator == BANK and memories == 1:
        del errors["read"]  # rounding errors
    assert max(errors.values()) < 1e-4, errors


@WITHOUT_TRITON
@pytest.mark.parametrize("memories", [1, 3])
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_are_checked_before_they_are_timed(monkeypatch, operator, memories):
    """On a GPU or in Triton's interpreter, in bfloat16; and a side that is wrong is an error."""
    multiply_bfloat16_in_the_interpreter(monkeypatch)
    sizes = Sizes(batch=1, time=24, heads=1, head_dim=16, memories=memories)
    arguments = (operator, sizes, [16, 32], torch.bfloat16, 0.03, DEVICES["triton"])
    errors = benchmark.check(*arguments)
    assert list(errors)[:3] == [f"{operator}, C=16", f"{operator}, C=32", "torch chunks"]
    assert all(0 < error < 0.03 for error in errors.values()), errors
    run = OPERATORS[operator]

    def wrong(*inputs, chunk_size=64, **options):
        output = run(*inputs, chunk_size=chunk_size, **options)
        return 1.1 * output if chunk_size == 32 else output

    monkeypatch.setitem(OPERATORS, operator, wrong)
    with pytest.raises(RuntimeError, match=f"{operator}, C=32 at .* is wrong: relative errors"):
        benchmark.check(*arguments)


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows(monkeypatch, operator):
    """With a clock that always says 2 ms, and chunks of torch in place of kernels."""

    def milliseconds(call):
        call()
        return 2.0

    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 5)
    monkeypatch.setattr(benchmark, "milliseconds", milliseconds)
    make_inputs, run = benchmark.make_inputs, OPERATORS[operator]
    monkeypatch.setattr(benchmark, "make_inputs", lambda *args: make_inputs(*args, device="cpu"))
    monkeypatch.setitem(OPERATORS, operator, lambda *x, **options: run(*x, implementation="chunk"))
    sizes = Sizes(batch=1, time=9, heads=1, head_dim=4, memories=2)
    args = argparse.Namespace(dtype="bfloat16", chunk_sizes=[32], repeats=2)
    rows = benchmark.measure(operator, sizes, args, rates=(1e9, 1e12))
    sides = [f"{operator}, C=32", "torch chunks"]
    expected = [(side, name) for side in sides for name in ("forward", "forward + backward")]
    assert [(row["side"], row["pass"]) for row in rows] == expected
    assert all(row["operator"] == operator and row["milliseconds"] == 2.0 for row in rows)
    moved, products = benchmark.WORK[operator](sizes, 32, 2, True)
    assert rows[1]["bandwidth"] == pytest.approx(moved / 2e-3 / 1e9)
    assert rows[1]["matrix_rate"] == pytest.approx(products / 2e-3 / 1e12)
    assert "matrix_rate" not in rows[2]


def test_work_is_counted_per_token():
    """By hand, for 10 tokens of one head with K = V = 4, two memories, chunks of 8, bfloat16."""
    sizes = Sizes(batch=1, time=10, heads=1, head_dim=4, memories=2)
    moved, products = benchmark.work(sizes, chunk_size=8, element_size=2, backward=False)
    assert moved == 10 * (2 * 4 * 4 + 4 * 3 * 2 + 2 * 2 * 32 / 8)
    assert products == 10 * (8 * (4 + 4 + 2) + 4 * 32)
    twice = benchmark.work(sizes._replace(batch=2), chunk_size=8, element_size=2, backward=True)
    once = benchmark.work(sizes, chunk_size=8, element_size=2, backward=True)
    assert twice == tuple(2 * x for x in once) and once[0] > 2 * moved and once[1] > 3 * products


def test_work_of_the_delta_bank_is_counted_per_token():
    """As above. States and errors are float32, and a token has a step size."""
    sizes = Sizes(batch=1, time=10, heads=1, head_dim=4, memories=2)
    moved, products = benchmark.delta_work(sizes, chunk_size=8, element_size=2, backward=False)
    assert moved == 10 * (2 * 4 * 4 + (4 * 3 * 2 + 4) + 4 * 4 + 4 * 2 * 32 / 8)
    assert products == 10 * (8 * (4 + 4 + 4 + 4 + 2 + 2) + 6 * 32)
    twice = benchmark.delta_work(sizes._replace(batch=2), chunk_size=8, element_size=2, backward=True)
    once = benchmark.delta_work(sizes, chunk_size=8, element_size=2, backward=True)
    assert twice == tuple(2 * x for x in once)
    assert once == (10 * (108 + 6 * 8 + 2 * 28 + 16 + 1.5 * 32), 10 * (352 + 8 * (8 * 4 + 4 * 2) + 12 * 32))


def test_table():
    row = {"operator": BANK, "time": 2048, "memories": 4, "pass": "forward", "work_space_bytes": 2**29}
    rows = [
        {**row, "side": "bank, C=64", "milliseconds": 2.0, "matrix_rate": 0.25, "bandwidth": 0.5},
        {**row, "side": "bank, C=128", "milliseconds": 1.0, "matrix_rate": 0.5, "bandwidth": 0.5},
        {**row, "side": "fla gla, R*K keys", "milliseconds": 3.0},
        {**row, "operator": DELTA, "side": "delta bank, C=64", "milliseconds": 4.0},
        {**row, "operator": DELTA, "side": "torch chunks", "milliseconds": 6.0},
    ]
    lines = benchmark.table(rows).splitlines()
    assert lines[2] == "| bank | 2,048 | 4 | forward | bank, C=64 | 2.000 | 2.00x | 0.50 | 25% | 50% |"
    assert lines[4] == "| bank | 2,048 | 4 | forward | fla gla, R*K keys | 3.000 | 3.00x | 0.50 | - | - |"
    assert lines[6] == "| delta bank | 2,048 | 4 | forward | torch chunks | 6.000 | 1.50x | 0.50 | - | - |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--time", "64"])
    assert "needs a CUDA GPU" in capsys.readouterr().err


@NEEDS_GPU
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(tmp_path, operator, dtype):
    """The kernels agree with torch's chunks there, and are timed."""
    path = tmp_path / "out.json"
    sizes = ["--time", "256", "--memories", "1", "4", "--heads", "2", "--chunk_sizes", "64", "--repeats", "2"]
    benchmark.main([*sizes, "--operators", operator, "--dtype", dtype, "--json", str(path)])
    saved = json.loads(path.read_text())
    assert list(saved["relative_errors"]) == [operator]
    ours = [row for row in saved["rows"] if row["side"] == f"{operator}, C=64"]
    cases = [(row["memories"], row["pass"]) for row in ours]
    assert cases == [(m, name) for m in (1, 4) for name in ("forward", "forward + backward")]
    assert all(row["milliseconds"] > 0 and row["matrix_rate"] > 0 for row in ours)
    assert {row["side"] for row in saved["rows"]} >= {"torch chunks"}
