"""What the GPU benchmark computes without a GPU: its peers' adapters, its counts, its table."""

import pytest
import torch

from benchmarks import memory_bank_gpu as benchmark
from benchmarks.memory_bank_gpu import Sizes


def gated_linear_attention(query, key, value, g, scale):
    """What flash-linear-attention's `chunk_gla` and, with g [B, T, H], `chunk_simple_gla` are defined as."""
    if g.dim() == 3:
        g = g.unsqueeze(-1)
    state, outputs = 0.0, []
    for t in range(query.shape[1]):
        state = g[:, t].exp().unsqueeze(-1) * state + key[:, t].unsqueeze(-1) * value[:, t].unsqueeze(-2)
        outputs.append(scale * (query[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1), None


@pytest.mark.parametrize("memories", [1, 3])
def test_peers_compute_the_same(monkeypatch, memories):
    monkeypatch.setattr(benchmark, "chunk_gla", gated_linear_attention)
    monkeypatch.setattr(benchmark, "chunk_simple_gla", gated_linear_attention)
    sizes = Sizes(batch=2, time=9, heads=2, head_dim=4, memories=memories)
    inputs = benchmark.make_inputs(sizes, torch.float32, device="cpu")

    def ours(*inputs):
        return benchmark.ours(*inputs, implementation="chunk")

    errors = benchmark.errors(benchmark.fla_quotient, inputs, ours)
    if memories == 1:
        del errors["read"]  # rounding errors
    assert max(errors.values()) < 1e-4, errors


def test_work_is_counted_per_token():
    """By hand, for 10 tokens of one head with K = V = 4, two memories, chunks of 8, bfloat16."""
    sizes = Sizes(batch=1, time=10, heads=1, head_dim=4, memories=2)
    moved, products = benchmark.work(sizes, chunk_size=8, element_size=2, backward=False)
    assert moved == 10 * (2 * 4 * 4 + 4 * 3 * 2 + 2 * 2 * 32 / 8)
    assert products == 10 * (8 * (4 + 4 + 2) + 4 * 32)
    twice = benchmark.work(sizes._replace(batch=2), chunk_size=8, element_size=2, backward=True)
    once = benchmark.work(sizes, chunk_size=8, element_size=2, backward=True)
    assert twice == tuple(2 * x for x in once) and once[0] > 2 * moved and once[1] > 3 * products


def test_table():
    row = {"time": 2048, "memories": 4, "pass": "forward", "work_space_bytes": 2**29}
    rows = [
        {**row, "side": "bank, C=64", "milliseconds": 2.0, "matrix_rate": 0.25, "bandwidth": 0.5},
        {**row, "side": "bank, C=128", "milliseconds": 1.0, "matrix_rate": 0.5, "bandwidth": 0.5},
        {**row, "side": "fla gla, R*K keys", "milliseconds": 3.0},
    ]
    lines = benchmark.table(rows).splitlines()
    assert lines[2] == "| 2,048 | 4 | forward | bank, C=64 | 2.000 | 2.00x | 0.50 | 25% | 50% |"
    assert lines[4] == "| 2,048 | 4 | forward | fla gla, R*K keys | 3.000 | 3.00x | 0.50 | - | - |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--time", "64"])
    assert "needs a CUDA GPU" in capsys.readouterr().err
