"""Low precision where it is cheap; gates and states in float32; finite for as long as anyone reads."""

import pytest
import torch

from stackformer import StackformerCache, mixer_banked_linear_attention
from tests.models import random_ids, tiny_model

LOW = [torch.bfloat16, torch.float16]


def states_of(cache):
    return [tensor for layer in cache.layers for state in layer.slices.values() for tensor in state]


@pytest.fixture
def gate_dtypes(monkeypatch):
    """The dtypes of the gates that the operator was given."""
    seen = set()
    operator = mixer_banked_linear_attention.banked_linear_attention

    def watch(query, key, value, read, write, log_decay, **kwargs):
        seen.update({read.dtype, write.dtype, log_decay.dtype})
        return operator(query, key, value, read, write, log_decay, **kwargs)

    monkeypatch.setattr(mixer_banked_linear_attention, "banked_linear_attention", watch)
    return seen


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("how", ["autocast", "weights"])
@torch.no_grad()
def test_close_to_float32(dtype, how, gate_dtypes):
    reference = tiny_model(torch.float32, noise=0.05, halting_threshold=0.0)
    ids = random_ids(2, 70)
    expected = reference(ids).logits
    gate_dtypes.clear()
    if how == "autocast":
        with torch.autocast("cpu", dtype=dtype):
            outputs = reference(ids)
            step = reference(ids[:, :1], past_key_values=outputs.past_key_values)
    else:
        model = tiny_model(torch.float32, noise=0.05, halting_threshold=0.0).to(dtype)
        outputs = model(ids)
        step = model(ids[:, :1], past_key_values=outputs.past_key_values)
    assert outputs.logits.dtype == dtype
    error = (outputs.logits.float() - expected).abs()
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert error.mean() < tolerance * expected.std()
    assert gate_dtypes == {torch.float32}
    assert outputs.ponder_steps.dtype == torch.float32
    assert {tensor.dtype for tensor in states_of(step.past_key_values)} == {torch.float32}


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradients_under_autocast(dtype):
    ids = random_ids(2, 40)

    def gradients(context):
        model = tiny_model(torch.float32, noise=0.05, halting_threshold=0.0).train()
        with context:
            loss = model(ids, labels=ids).loss
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expected = gradients(torch.autocast("cpu", enabled=False))
    actual = gradients(torch.autocast("cpu", dtype=dtype))
    assert torch.isfinite(actual).all()
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=0) > 0.99


@pytest.mark.parametrize("decay_bias", [-100.0, 100.0], ids=["never forgets", "forgets at once"])
@torch.no_grad()
def test_a_million_tokens_with_extreme_gates(decay_bias):
    """One bank takes it all, another is never touched: nothing overflows or vanishes to 0 / 0."""
    model = tiny_model(
        torch.float32, hidden_size=8, bottleneck_size=4, num_hidden_layers=1, max_ponder_steps=2,
        chunk_size=64, max_decay_rate=4.0, noise=0.5,
    )  # fmt: skip
    mixer = model.model.layers[0].mixer
    mixer.decay_proj.bias.fill_(decay_bias)
    mixer.write_proj.bias.copy_(torch.tensor([100.0, -100.0]).repeat(mixer.num_heads))
    mixer.read_proj.bias.copy_(torch.tensor([-100.0, 100.0]).repeat(mixer.num_heads))
    cache, ids = StackformerCache(model.config), random_ids(1, 2**16)
    for _ in range(16):
        hidden = model.model(ids, past_key_values=cache).last_hidden_state
        assert torch.isfinite(hidden).all()
    assert cache.get_seq_length() == 2**20
    for _ in range(3):
        assert torch.isfinite(model(ids[:, :1], past_key_values=cache).logits).all()
    assert all(torch.isfinite(tensor).all() for tensor in states_of(cache))
