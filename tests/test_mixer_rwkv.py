"""RWKV-4: transformers' own is the reference; all at once and step by step agree; weights convert."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, RwkvConfig, RwkvForCausalLM
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from scripts import convert_rwkv
from stackformer import StackformerForCausalLM
from stackformer.mixer_rwkv import wkv
from tests.models import SHAPES, random_ids, spread_weights, tiny_config, tiny_model
from tests.test_generation import generate
from tests.test_modeling import CLOSE

SIZE = 6
RWKV_SHAPES = pytest.mark.parametrize("name", ["rwkv", "rwkv stack"])


def wkv_inputs(length, batch=2, spread=2.0, seed=0):
    """Log decay, bonus, key and value in float64."""
    generator = torch.Generator().manual_seed(seed)
    bonus, key, value = (
        torch.randn(*shape, SIZE, dtype=torch.float64, generator=generator)
        for shape in ((), (batch, length), (batch, length))
    )
    return -torch.linspace(-5, 1, SIZE, dtype=torch.float64).exp(), bonus, spread * key, value


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17])
def test_it_is_the_recurrence(length):
    """As transformers has it, gradients included; from the beginning, and from a state."""
    inputs = [x.requires_grad_() for x in wkv_inputs(length + 7)]
    decay, bonus, key, value = inputs
    output, states = wkv(decay, bonus, key, value)
    first, middle = wkv(decay, bonus, key[:, :7], value[:, :7])
    second, last = wkv(decay, bonus, key[:, 7:], value[:, 7:], middle[:, -1])
    # What transformers adds to keys it casts to float32 first.
    expected = rwkv_linear_attention_cpu((-decay).log(), bonus, key, value)[0]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([first, second], dim=1), output, **CLOSE)
    torch.testing.assert_close(last[:, -1], states[:, -1], **CLOSE)
    weight = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((x * weight).sum(), inputs)
        for x in (output, torch.cat([first, second], dim=1), expected)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-3, atol=1e-4)


def test_gradients():
    decay, bonus, key, value = (x.requires_grad_() for x in wkv_inputs(5))
    state = torch.rand(2, 2, SIZE, dtype=torch.float64).requires_grad_()  # a and b; p is a constant

    def function(decay, bonus, key, value, state):
        state = torch.cat([state, torch.zeros_like(state[:, :1])], dim=1)
        return wkv(decay, bonus, key, value, state)[0]

    assert torch.autograd.gradcheck(function, (decay, bonus, key, value, state))


@torch.no_grad()
def test_extreme_keys():
    """Weights that overflow or vanish; and a row of zeros is a beginning, whatever the keys are."""
    decay, bonus, key, value = wkv_inputs(17, spread=300.0)
    expected = wkv(decay, bonus, key, value)[0]
    actual, states = wkv(*(x.float() for x in (decay, bonus, key, value)))
    assert torch.isfinite(states[:, 1:]).all()
    torch.testing.assert_close(actual, expected.float(), rtol=1e-3, atol=1e-3)
    beginning = torch.zeros(2, 3, SIZE)
    for offset in (-1000.0, 0.0, 1000.0):
        inputs = [x.float() for x in (decay, bonus, key + offset, value)]
        torch.testing.assert_close(wkv(*inputs, beginning)[0], wkv(*inputs)[0], rtol=0, atol=0)


def average_and_log_weight(state):
    """What a state [B, 3, d] means, whatever its scale is."""
    a, b, p = state.unbind(1)
    return torch.stack([a / b, b.log() + p], dim=1)


def rwkv_model(**overrides):
    fields = {"vocab_size": 261, "hidden_size": 16, "num_hidden_layers": 4, "rescale_every": 2} | overrides
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(**fields))
    model.rwkv.embeddings.weight.data.normal_()
    return spread_weights(model).eval()


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"intermediate_size": 24}], ids=str)
@torch.no_grad()
def test_conversion(tmp_path, options):
    source, ids = rwkv_model(**options), random_ids(3, 21)
    source.save_pretrained(tmp_path / "rwkv")
    command = ["--model_name_or_path", str(tmp_path / "rwkv"), "--output_dir", str(tmp_path / "ours")]
    convert_rwkv.main([*command, "--tokenizer", "false"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(model) is StackformerForCausalLM
    expected = source(ids, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    rest = model(ids[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected[:, 9:], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_converted(tmp_path):
    with pytest.raises(ValueError, match="`attention_hidden_size` must be the hidden size 16, got 8"):
        convert_rwkv.convert_config(RwkvConfig(hidden_size=16, attention_hidden_size=8))
    with pytest.raises(ValueError, match="`layer_norm_epsilon` must be 1e-05, got 0.001"):
        convert_rwkv.convert_config(RwkvConfig(hidden_size=16, layer_norm_epsilon=1e-3))
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected an RWKV-4, got llama\."):
        convert_rwkv.main(["--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "out")])


@RWKV_SHAPES
@torch.no_grad()
def test_splits_padding_and_documents(name):
    model, ids = tiny_model(**SHAPES[name]), random_ids(2, 14)
    expected = model(ids).logits
    for split in (1, 5, 13):
        cache = model(ids[:, :split], use_cache=True).past_key_values
        rest = model(ids[:, split:], past_key_values=cache).logits
        torch.testing.assert_close(rest, expected[:, split:], **CLOSE)
    padded, mask = random_ids(2, 20, seed=3), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4], mask[0, 9:11], mask[1, 1], mask[1, 15:] = 0, 0, 0, 0
    padded[mask.bool()] = ids.flatten()
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected.flatten(0, 1), **CLOSE)
    packed = model(ids.view(1, -1), position_ids=torch.arange(14).repeat(2).unsqueeze(0)).logits
    torch.testing.assert_close(packed[0], expected.flatten(0, 1), **CLOSE)


@RWKV_SHAPES
def test_rolling_back_and_beams(name):
    model, ids = tiny_model(**SHAPES[name]), random_ids(1, 9)
    expected = generate(model, ids, 6, use_cache=False)
    assert torch.equal(generate(model, ids, 6, prompt_lookup_num_tokens=3), expected)
    beams = [generate(model, ids, 5, num_beams=3, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*beams)


@RWKV_SHAPES
def test_gradients_flow_through_the_cache(name):
    model, ids = tiny_model(**SHAPES[name]).train(), random_ids(2, 16)
    labels = ids.clone()
    labels[:, :10] = -100

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(model(ids, labels=labels).loss)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    actual = gradients(model(ids[:, 9:], labels=labels[:, 9:], past_key_values=cache).loss)
    torch.testing.assert_close(actual, expected, **CLOSE)


@RWKV_SHAPES
@torch.no_grad()
def test_precision(tmp_path, name):
    """States are float32 under autocast, and decays in a model of bfloat16."""
    model, ids = (
        tiny_model(torch.float32, noise=0.05, **SHAPES[name] | {"halting_threshold": 0.0}),
        random_ids(2, 12),
    )
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, use_cache=True)
    model.save_pretrained(tmp_path)
    low = StackformerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert low.model.layers[0].mixer.time_decay.dtype == torch.float32
    for result in (outputs, low(ids, use_cache=True)):
        assert result.logits.dtype == torch.bfloat16
        assert (result.logits.float() - expected).abs().mean() < 0.1 * expected.std()
        layers = result.past_key_values.layers
        states = [tensor for layer in layers for state in layer.slices.values() for tensor in state]
        assert {tensor.dtype for tensor in states} == {torch.float32}


@torch.no_grad()
def test_initial_values():
    mixer = StackformerForCausalLM(tiny_config(**SHAPES["rwkv"])).model.layers[0].mixer
    assert mixer.time_decay[0] == -5 and mixer.time_decay[-1] == 3 and (mixer.time_decay.diff() > 0).all()
    assert mixer.time_first.std() > 0.3
    assert mixer.shift.weight.shape == (3, 24) and (mixer.shift.weight.diff() > 0).all()
