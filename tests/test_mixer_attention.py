"""Softmax attention: transformers' own is the reference; kernels agree; the state is what it should be."""

import copy
import math

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    flash_attention_mask,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from stackformer import StackformerCache, StackformerConfig, StackformerForCausalLM, StackformerStaticCache
from stackformer.mixer_attention import Attention, AttentionState, rotary_embedding
from stackformer.token_layout import TokenLayout
from tests.models import SHAPES, random_ids, tiny_model
from tests.test_generation import generate
from tests.test_modeling import CLOSE, gradients_whole_and_through_the_cache

SIZE, HEADS, LENGTH = 32, 4, 21
FAR = (10**6, 10**7, 2**24, 10**8, 2**31 + 13, 10**15)
WINDOWS = pytest.mark.parametrize("window", [None, 1, 2, 5, 30])


def attention(window: int | None = None, implementation: str = "sdpa", theta: float = 500.0) -> Attention:
    config = StackformerConfig(
        hidden_size=SIZE,
        bottleneck_size=None,
        num_attention_heads=HEADS,
        sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attn_implementation=implementation,
    )
    torch.manual_seed(0)
    return Attention(config)


def read(mixer, hidden, mask=None, state=None):
    """One call with `hidden` [B, T, d] under `mask` [B, T]: what comes out of real tokens, and the state."""
    batch, length = hidden.shape[:2]
    layout = TokenLayout.full(batch, length) if mask is None else TokenLayout.from_mask(mask.bool())
    pointer = torch.ones(layout.num_tokens, 1)
    mixed, state, bank_weights = mixer(layout.gather(hidden), pointer, layout, state)
    assert bank_weights is None
    return layout.scatter(mixed, torch.zeros_like(hidden)), state


def hidden_tokens(batch=2, length=LENGTH):
    return torch.randn(batch, length, SIZE, generator=torch.Generator().manual_seed(1))


@WINDOWS
@torch.no_grad()
def test_it_is_llama_attention(window):
    mixer, hidden = attention(window), hidden_tokens()
    config = LlamaConfig(
        hidden_size=SIZE,
        num_attention_heads=HEADS,
        rope_parameters=mixer.config.rope_parameters,
        sliding_window=window,
        attn_implementation="eager",
    )
    llama, rope = LlamaAttention(config, layer_idx=0), LlamaRotaryEmbedding(config)
    for projection, weight in zip("qkv", mixer.qkv_proj.weight.chunk(3), strict=True):
        getattr(llama, f"{projection}_proj").weight.copy_(weight)
    llama.o_proj.weight.copy_(mixer.o_proj.weight)
    positions = torch.arange(LENGTH).unsqueeze(0)
    make_mask = create_causal_mask if window is None else create_sliding_window_causal_mask
    mask = make_mask(config, hidden, attention_mask=None, past_key_values=None, position_ids=positions)
    expected = llama(hidden, rope(hidden, positions), mask)[0]
    torch.testing.assert_close(read(mixer, hidden)[0], expected, rtol=1e-5, atol=1e-5)


def unpadded_attention(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
    """What flash attention makes of a padding mask [B, T], if any: each row without its padding, its queries
    the last of its keys. (As transformers' `_upad_input` has it; the kernel itself needs a GPU.)"""
    mixed = torch.zeros_like(query)
    for row in range(len(query)):
        real = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[row]
        assert real[-query.shape[2] :].all()
        keys, values = key[row][:, real], value[row][:, real]
        distance = torch.arange(keys.shape[1] - query.shape[2], keys.shape[1])[:, None]
        distance = distance - torch.arange(keys.shape[1])
        seen = (distance >= 0) & (distance < (sliding_window or keys.shape[1]))
        scores = (query[row] @ keys.mT * scaling).masked_fill(~seen, -torch.inf)
        mixed[row] = scores.softmax(-1) @ values
    return mixed.transpose(1, 2), None


@WINDOWS
@pytest.mark.parametrize("implementation", ["eager", "unpadded"])
@torch.no_grad()
def test_implementations_agree(window, implementation):
    AttentionInterface.register("unpadded", unpadded_attention)
    AttentionMaskInterface.register("unpadded", flash_attention_mask)
    hidden, mask = hidden_tokens(), torch.ones(2, LENGTH)
    mask[0, :4], mask[0, 9], mask[1, 12:14] = 0, 0, 0
    for split in (0, 8, LENGTH - 1):
        results = []
        for name in ("sdpa", implementation):
            mixer = attention(window, name)
            first, state = read(mixer, hidden[:, :split], mask[:, :split]) if split else (hidden[:, :0], None)
            second, state = read(mixer, hidden[:, split:], mask[:, split:], state)
            results.append([first, second, *state])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_full_rows_need_no_mask(monkeypatch):
    """Neither in one call nor in decoding: the fast kernels take none."""
    masks = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, is_causal=False, **kwargs):
        masks.append((attn_mask is None, is_causal))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for window in (None, LENGTH, 5):
        mixer, hidden = attention(window), hidden_tokens()
        state = read(mixer, hidden[:, :-1])[1]
        read(mixer, hidden[:, -1:], state=state)
    assert masks[:4] == [(True, True), (True, False)] * 2
    assert masks[4:] == [(False, False), (True, False)]


@pytest.mark.parametrize("window", [None, 5, 40])
@torch.no_grad()
def test_the_state_is_as_long_as_the_longest_row_or_the_window(window):
    mixer, hidden, mask = attention(window), hidden_tokens(3), torch.ones(3, LENGTH)
    mask[0, :4], mask[1, 9:] = 0, 0
    mask[2] = 0
    mask[2, 3] = 1
    state = read(mixer, hidden, mask)[1]
    kept = LENGTH - 4 if window is None else window - 1
    assert [tuple(tensor.shape) for tensor in state] == [(3, kept, HEADS, SIZE // HEADS)] * 2 + [(3,)]
    assert state[2].tolist() == [LENGTH - 4, 9, 1]
    for row, seen in enumerate(state[2].tolist()):
        for tensor in state[:2]:
            empty = max(kept - seen, 0)
            assert not tensor[row, :empty].any() and tensor[row, empty:].abs().amax((-1, -2)).min() > 0
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "it keeps alive what nobody sees"


@torch.no_grad()
def test_a_window_forgets():
    """Two layers of it reach back 2 (window - 1) tokens, and no further."""
    model, ids = tiny_model(**SHAPES["attention"], sliding_window=4), random_ids(1, 20)
    changed = ids.clone()
    changed[0, 5] += 1
    difference = (model(changed).logits - model(ids).logits).abs().amax(-1)[0]
    assert (difference > 1e-6).nonzero().flatten().tolist() == list(range(5, 5 + 2 * 3 + 1))


@torch.no_grad()
def test_size_of_the_state():
    """It grows by the same for every token, unless there is a window."""
    fields = SHAPES["attention"]
    per_token = 2 * 2 * 24 * 8  # keys and values in two layers of width 24, float64
    sizes = {
        length: tiny_model(**fields)(random_ids(1, length), use_cache=True).past_key_values.num_bytes
        for length in (10, 11)
    }
    assert sizes[11] - sizes[10] == per_token
    windowed = tiny_model(**fields, sliding_window=6)
    sizes = {windowed(random_ids(1, n), use_cache=True).past_key_values.num_bytes for n in (2, 10, 300)}
    assert sizes == {5 * per_token + 2 * 8}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_the_implementation_is_chosen_as_for_any_model(tmp_path, implementation):
    model, ids = tiny_model(torch.float32, noise=0.05, **SHAPES["attention"]), random_ids(2, 12)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    loaded = StackformerForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert loaded.config._attn_implementation == implementation
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    loaded.set_attn_implementation("eager")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_its_positions(dtype):
    """Rounding weights must not round positions: there is no buffer of frequencies to be cast."""
    hidden, mixer = hidden_tokens(1, 400) * 0.3, attention(theta=10_000.0)
    expected = read(mixer, hidden)[0]
    actual = read(mixer.to(dtype), hidden.to(dtype))[0]
    assert (actual.float() - expected).norm() / expected.norm() < (0.03 if dtype is torch.bfloat16 else 0.004)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["attention", "hybrid stack", "sliding window"])
def test_beams_of_a_padded_batch_are_the_same_with_and_without_cache(name, options):
    model, ids, mask = tiny_model(**SHAPES[name]), random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    results = [
        generate(model, ids, 6, attention_mask=mask, use_cache=use_cache, **options)
        for use_cache in (True, False)
    ]
    assert torch.equal(*results)


def test_gradients_flow_through_the_cache():
    model, ids = tiny_model(**SHAPES["hybrid stack"], sliding_window=6).train(), random_ids(2, 20)
    expected, actual = gradients_whole_and_through_the_cache(model, ids)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_odd_heads_are_refused():
    config = StackformerConfig(hidden_size=6, bottleneck_size=None, num_attention_heads=2)
    with pytest.raises(ValueError, match="`num_attention_heads` must leave the heads of attention an even"):
        Attention(config)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("position", FAR)
def test_angles_depend_on_distances_only(position, dtype, tolerance):
    distance = torch.arange(100)
    cos, sin = rotary_embedding(distance, 64, 10_000.0, dtype)
    far_cos, far_sin = rotary_embedding(position + distance, 64, 10_000.0, dtype)
    # the difference of two angles, from their cosines and sines
    between = (far_cos * far_cos[:1] + far_sin * far_sin[:1], far_sin * far_cos[:1] - far_cos * far_sin[:1])
    torch.testing.assert_close(between, (cos, sin), rtol=0, atol=tolerance)
    assert (far_cos[1:] - far_cos[:-1]).abs().amax(1).min() > 0.01, "neighbours have the same angle"


@pytest.mark.parametrize("theta", [500.0, 10_000.0, 5e6])
def test_angles_are_those_of_rotary_positions(theta):
    """Su et al. 2021, equation 15."""
    positions = torch.tensor([0, 1, 2, 77, 4096, 10**6])
    frequencies = theta ** -(torch.arange(0, 64, 2).double() / 64)
    angles = (positions[:, None] * frequencies).repeat(1, 2)
    expected = angles.cos(), angles.sin()
    actual = rotary_embedding(positions, 64, theta, torch.float64)
    # frequencies are rounded to 2 ** -42 turns, so a million tokens move by at most 7e-7 radians
    torch.testing.assert_close(actual, expected, rtol=0, atol=10**6 * 2 * math.pi * 2.0**-43)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("position", FAR)
@torch.no_grad()
def test_a_window_is_the_same_at_any_position(position, dtype, tolerance):
    """Once the window holds the same tokens, the tokens after it cannot tell how many there were before."""
    window, hidden = 6, hidden_tokens().to(dtype)
    mixer = attention(window, theta=10_000.0).to(dtype)
    empty = hidden.new_zeros(2, window - 1, HEADS, SIZE // HEADS)
    far = AttentionState(empty, empty, torch.full((2,), position))
    expected, actual = read(mixer, hidden)[0], read(mixer, hidden, state=far)[0]
    torch.testing.assert_close(actual[:, window:], expected[:, window:], rtol=tolerance, atol=tolerance)


def move(cache, model, tokens: int):
    """A copy of a cache as if each row had read `tokens` more tokens before those that it holds."""
    cache = copy.deepcopy(cache)
    for layer, module in zip(cache.layers, model.model.layers, strict=True):
        names = [spec.name for spec in module.state_spec]
        if "seen" not in names:
            continue
        for state in layer.slices.values():
            key, seen = state[names.index("key")], state[names.index("seen")]
            theta = model.config.rope_parameters["rope_theta"]
            turn = rotary_embedding(torch.tensor([[tokens]]), key.shape[-1], theta, torch.float64)
            key.copy_(apply_rotary_pos_emb(key.double(), key.double(), *turn, unsqueeze_dim=2)[0])
            seen += tokens
    return cache


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize(
    "name",
    ["sliding window", "neural memory", "memory as gate", "infinity-former", "sticky memories on a stack"],
)
@torch.no_grad()
def test_models_with_a_window_run_for_ever(tmp_path, name, dtype, tolerance):
    """In padded batches with halting tokens, from files, after rolling back, and in static caches."""
    model, ids = tiny_model(dtype, noise=0.1, **SHAPES[name]), random_ids(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    cache = StackformerCache(model.config)
    model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
    expected = model(ids[:, 30:], past_key_values=copy.deepcopy(cache)).logits
    close = {"rtol": tolerance, "atol": tolerance}
    for tokens in (15 * 10**6, 15 * 2**31):  # whole blocks of continuous attention
        far = move(cache, model, tokens)
        actual = model(ids[:, 30:], past_key_values=copy.deepcopy(far)).logits
        torch.testing.assert_close(actual, expected, **close)

        far.save_pretrained(tmp_path / "memory")
        loaded = StackformerCache.from_pretrained(tmp_path / "memory", model)
        loaded.activate_past_recording()
        model(random_ids(2, 3, seed=1), past_key_values=loaded)
        loaded.crop(-3)
        steps = [model(ids[:, t : t + 1], past_key_values=loaded).logits for t in range(30, 40)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, **close)


@pytest.mark.parametrize("name", ["sliding window", "memory as gate"])
@torch.no_grad()
def test_compiled_steps_with_a_window_run_for_ever(name):
    torch._dynamo.reset()
    model, ids = tiny_model(torch.float32, noise=0.1, **SHAPES[name]), random_ids(2, 40)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StackformerStaticCache(model.config)
    model(ids[:, :30], past_key_values=cache)
    expected = model(ids[:, 30:], past_key_values=copy.deepcopy(cache)).logits
    far = move(cache, model, 15 * 2**31)
    steps = [step(ids[:, t : t + 1], past_key_values=far).logits for t in range(30, 40)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [1, 4, 30])
@pytest.mark.parametrize("seen", [0, 2, 2**31 + 13])
@torch.no_grad()
def test_persistent_tokens_are_no_further_than_the_window(window, seen):
    """Against loops over tokens, whose angles are those of small numbers."""
    torch.manual_seed(0)
    config = StackformerConfig(
        hidden_size=SIZE,
        bottleneck_size=None,
        num_attention_heads=HEADS,
        sliding_window=window,
        num_persistent_tokens=3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="sdpa",
    )
    mixer, hidden = Attention(config).double(), hidden_tokens(1).double()
    past = hidden.new_zeros(1, window - 1, HEADS, SIZE // HEADS)
    state = AttentionState(past, past, torch.tensor([seen])) if seen else None
    actual = read(mixer, hidden[:, :9], state=state)[0]

    def parts(tokens):
        return mixer.qkv_proj(tokens).unflatten(-1, (3, HEADS, -1)).unbind(-3)  # [T, H, K] each

    def turned(x, distance):
        cos, sin = rotary_embedding(torch.tensor([[distance]]), SIZE // HEADS, 500.0, torch.float64)
        return apply_rotary_pos_emb(x[None, None], x[None, None], cos, sin, unsqueeze_dim=2)[0][0, 0]

    queries, keys, values = parts(hidden[0])
    _, always, always_values = parts(mixer.persistent.weight)
    for t in range(9):
        if seen and t < window - 1:
            continue  # sees the zeros that stand for the past
        visible = range(max(0, t - window + 1), t + 1)
        near = turned(queries[t], min(seen + t, window))
        scores = [(near * key).sum(-1) for key in always]
        scores += [(turned(queries[t], t - j) * keys[j]).sum(-1) for j in visible]
        weights = (torch.stack(scores) * (SIZE // HEADS) ** -0.5).softmax(0)  # [slots, H]
        seen_values = torch.cat([always_values, values[visible.start : visible.stop]])
        expected = mixer.o_proj((weights[..., None] * seen_values).sum(0).flatten())
        torch.testing.assert_close(actual[0, t], expected, rtol=1e-10, atol=1e-10)
