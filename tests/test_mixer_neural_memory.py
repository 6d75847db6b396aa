"""Titans' memory: the paper's recurrence, written naively, is the reference; nothing leaks or explodes."""

import pytest
import torch
from torch.nn.functional import normalize, silu

from stackformer import StackformerCache, StackformerConfig
from stackformer.mixer_neural_memory import Memory, MemoryAsLayer, Writes, advance_memory, measure_surprise
from stackformer.processing_stack import TokenLayout
from tests.models import SHAPES, random_ids, tiny_model
from tests.test_generation import generate
from tests.test_modeling import (
    CLOSE,
    assert_same_state,
    gradients_whole_and_through_the_cache,
    read_in_pieces,
)

SIZE, HEADS, LENGTH = 12, 2, 19
NAMES = ("neural memory", "memory as gate")


def layer(depth: int = 2, chunk_size: int = 4, **fields) -> MemoryAsLayer:
    """With weights so large that gradients are clipped and gates differ."""
    config = StackformerConfig(
        hidden_size=SIZE,
        bottleneck_size=None,
        num_attention_heads=HEADS,
        conv_kernel_size=3,
        memory_depth=depth,
        memory_chunk_size=chunk_size,
        memory_max_step_size=0.7,
        **fields,
    )
    torch.manual_seed(0)
    mixer = MemoryAsLayer(config).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape))
    return mixer


def hidden_tokens(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, SIZE, generator=generator, dtype=torch.float64)


def read(mixer, hidden, mask=None, state=None):
    """One call with `hidden` [B, T, d] under `mask` [B, T]: what comes out of real tokens, and the state."""
    batch, length = hidden.shape[:2]
    layout = TokenLayout.full(batch, length) if mask is None else TokenLayout.from_mask(mask.bool())
    pointer = hidden.new_ones(layout.num_tokens, 1)
    mixed, state, bank_weights = mixer(layout.gather(hidden), pointer, layout, state)
    assert bank_weights is None
    return layout.scatter(mixed, torch.zeros_like(hidden)), state


def network(weights, x):
    """M(x) of one head: `weights` [L, K, K]."""
    for weight in weights[:-1]:
        x = silu(weight @ x)
    return weights[-1] @ x


def naive(mixer, hidden):
    """Equations 11 to 18 for one row [T, d], token by token, gradients by autograd."""
    memory = mixer.memory
    window = torch.nn.functional.pad(memory.qkv_proj(hidden).T, (memory.conv.kernel_size[0] - 1, 0))
    qkv = silu(memory.conv._conv_forward(window, memory.conv.weight, None).T)
    gates = memory.write_proj(hidden).unflatten(-1, (3, HEADS))
    mixed = []
    for head in range(HEADS):
        weights = anchor = memory.initial_memory[:, head]
        momentum, outputs = torch.zeros_like(weights), []
        for t, token in enumerate(qkv.unflatten(-1, (3, HEADS, -1))[:, :, head]):
            query, key, value = normalize(token[0], dim=0), normalize(token[1], dim=0), token[2]
            if t % memory.chunk_size == 0:
                anchor = weights

            def loss(weights, key=key, value=value):
                return (network(weights, key) - value).square().sum()

            gradient = torch.func.grad(loss)(anchor)
            gradient = gradient / gradient.norm().clamp(min=1)
            alpha, eta = (gates[t, 0, head] - 4.6).sigmoid(), gates[t, 1, head].sigmoid()
            momentum = eta * momentum - memory.max_step_size * gates[t, 2, head].sigmoid() * gradient
            weights = (1 - alpha) * weights + momentum
            outputs.append(network(weights, query))
        mixed.append(torch.stack(outputs))
    mixed = memory.norm(torch.stack(mixed, dim=1)).flatten(1)
    return mixer.o_proj(silu(mixer.gate_proj(hidden)) * mixed)


@pytest.mark.parametrize("chunk_size", [1, 4, 32])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_it_is_the_recurrence_of_the_paper(depth, chunk_size):
    """In one call and token by token, in value and in gradient."""
    mixer, hidden = layer(depth, chunk_size), hidden_tokens(1).requires_grad_()

    def gradients(output):
        mixer.zero_grad()
        hidden.grad = None
        output.square().sum().backward()
        return [hidden.grad.clone(), *(parameter.grad.clone() for parameter in mixer.parameters())]

    expected = naive(mixer, hidden[0])
    whole = read(mixer, hidden)[0][0]
    torch.testing.assert_close(whole, expected, **CLOSE)
    state, steps = None, []
    for token in hidden.split(1, dim=1):
        step, state = read(mixer, token, state=state)
        steps.append(step)
    steps = torch.cat(steps, dim=1)[0]
    torch.testing.assert_close(steps, expected, **CLOSE)
    expected = gradients(expected)
    torch.testing.assert_close(gradients(whole), expected, **CLOSE)
    torch.testing.assert_close(gradients(steps), expected, **CLOSE)


def test_the_surprise_is_the_clipped_gradient():
    """Both where it is clipped and where it is not."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 3, 1, 5, 5, generator=generator, dtype=torch.float64) * 0.4
    key, value = torch.randn(2, 1, 1, 8, 5, generator=generator, dtype=torch.float64).unbind()
    value = value * torch.logspace(-1.5, 0.5, 8, dtype=torch.float64).unsqueeze(-1)
    inputs, errors = measure_surprise(weights, key, value)
    norms = []
    for t in range(8):
        gradient = torch.func.grad(lambda w, t=t: (network(w, key[0, 0, t]) - value[0, 0, t]).square().sum())
        expected = gradient(weights[0, :, 0])
        norms.append(expected.norm().item())
        expected = expected / expected.norm().clamp(min=1)
        pairs = zip(inputs, errors, strict=True)
        actual = torch.stack([torch.outer(e[0, 0, t], x[0, 0, t]) for x, e in pairs])
        torch.testing.assert_close(actual, expected, **CLOSE)
    assert min(norms) < 0.9 and max(norms) > 1.1


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    real = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    places = real.view(1, 1, 4)

    def advance(anchor, weights, momentum, query, key, value, keep, eta, step):
        log_keep, log_momentum = (torch.nn.functional.logsigmoid(x) * places for x in (keep, eta))
        writes = Writes(log_keep, log_momentum, step.sigmoid() * places, places)
        read, memory = advance_memory(Memory(anchor, weights, momentum), query, key, value, writes)
        return read, memory.weights, memory.momentum

    memory = [normal(1, 2, 1, 3, 3) for _ in range(3)]
    tokens = [normal(1, 1, 4, 3) for _ in range(3)]
    gates = [normal(1, 1, 4) for _ in range(3)]
    assert torch.autograd.gradcheck(advance, (*memory, *tokens, *gates))


@pytest.mark.parametrize("first", [3, 5, 8])
@torch.no_grad()
def test_rows_need_not_be_at_the_same_place_of_a_chunk(first):
    """Every row as if it were alone and whole, wherever calls and paddings split it."""
    mixer, hidden = layer(), hidden_tokens(3)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, :2], mask[1, 1:3], mask[2, first + 2 :] = False, False, False
    left, state = read(mixer, hidden[:, :first], mask[:, :first])
    right, state = read(mixer, hidden[:, first:], mask[:, first:], state)
    assert state[3].tolist() == [(count % 4) for count in mask.sum(1).tolist()]
    for row in range(3):
        expected, alone = read(mixer, hidden[row : row + 1, mask[row]])
        actual = torch.cat([left[row], right[row]])[mask[row]]
        torch.testing.assert_close(actual, expected[0], **CLOSE)
        torch.testing.assert_close(tuple(x[row : row + 1] for x in state), alone, **CLOSE)


@torch.no_grad()
def test_a_state_of_zeros_is_the_beginning():
    """What a cache holds for rows that have not begun, and what a static cache begins with."""
    mixer, hidden = layer(), hidden_tokens()
    expected, state = read(mixer, hidden)
    zeros = tuple(torch.zeros_like(tensor) for tensor in state)
    actual, again = read(mixer, hidden, state=zeros)
    torch.testing.assert_close((actual, again), (expected, state), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_no_token_sees_a_later_one(name):
    """Not even inside a chunk: a changed suffix changes nothing before it, and all after it."""
    model, ids = tiny_model(**SHAPES[name]), random_ids(1, 23)
    expected = model(ids).logits
    for position in (1, 7, 8, 10, 22):
        changed = ids.clone()
        changed[0, position:] = random_ids(1, 23 - position, seed=5)[0]
        difference = (model(changed).logits - expected).abs().amax(-1)[0]
        assert difference[:position].max() < 1e-9, f"{name} leaks from {position}"
        assert difference[position:].min() > 1e-9


@torch.no_grad()
def test_the_memory_reaches_further_than_the_window():
    """With attention to 4 tokens, a change 40 tokens ago is still seen: by what was written of it."""
    model, ids = tiny_model(**SHAPES["memory as gate"]), random_ids(1, 48)
    changed = ids.clone()
    changed[0, 2] += 1
    assert (model(changed).logits - model(ids).logits)[0, -1].abs().max() > 1e-9


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_chunk_is_part_of_the_model_and_the_split_is_not(name):
    ids = random_ids(2, 21)
    models = [tiny_model(**(SHAPES[name] | {"memory_chunk_size": size})) for size in (1, 3, 50)]
    logits = [model(ids, use_cache=True) for model in models]
    assert (logits[0].logits - logits[1].logits).abs().max() > 1e-6
    for model, expected in zip(models, logits, strict=True):
        pieces, cache = read_in_pieces(model, ids, [2, 1, 9, 1, 8])
        torch.testing.assert_close(pieces, expected.logits, **CLOSE)
        assert_same_state(cache, expected.past_key_values)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_state_does_not_grow(name):
    model = tiny_model(**(SHAPES[name] | {"halting_threshold": 0.0}))
    sizes = {model(random_ids(1, n), use_cache=True).past_key_values.num_bytes for n in (1, 10, 60)}
    assert len(sizes) == 1


@pytest.mark.parametrize("name", NAMES)
def test_beams_and_drafts_of_a_padded_batch(name):
    model, ids, mask = tiny_model(**SHAPES[name]), random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    beams = [
        generate(model, ids, 6, attention_mask=mask, num_beams=3, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)
    greedy = generate(model, ids[:1], 8)
    assert torch.equal(greedy, generate(model, ids[:1], 8, prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_the_cache(name):
    model, ids = tiny_model(**SHAPES[name]).train(), random_ids(2, 20)
    expected, actual = gradients_whole_and_through_the_cache(model, ids)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert all(gradient.abs().max() > 0 for gradient in actual)


@torch.no_grad()
def test_states_are_float32_under_autocast():
    model, ids = tiny_model(torch.float32, noise=0.05, **SHAPES["memory as gate"]), random_ids(2, 40)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, use_cache=True)
    memory = outputs.past_key_values.layers[0].slices[0][3:]
    assert {tensor.dtype for tensor in memory} == {torch.float32, torch.int64}
    assert (outputs.logits.float() - expected).abs().mean() < 0.05 * expected.std()


def read_for_long(tokens):
    """With steps as large as they can be and no forgetting, in a linear memory and in a deep one."""
    for depth in (1, 4):
        model = tiny_model(
            torch.float32, hidden_size=8, bottleneck_size=None, num_hidden_layers=1, max_ponder_steps=1,
            stack_depth=1, mixer_types=["neural_memory"], memory_depth=depth, memory_chunk_size=64, noise=0.5,
            num_attention_heads=1,
        )  # fmt: skip
        gates = model.model.layers[0].mixer.memory.write_proj
        gates.bias.copy_(torch.tensor([-100.0, 3.0, 100.0]))
        cache, ids = StackformerCache(model.config), random_ids(1, 1000)
        for _ in range(tokens // 1000):
            assert torch.isfinite(model.model(ids, past_key_values=cache).last_hidden_state).all()
        assert cache.get_seq_length() == tokens
        for state in cache.layers[0].slices.values():
            assert all(torch.isfinite(tensor).all() for tensor in state)


@torch.no_grad()
def test_nothing_explodes():
    read_for_long(2000)


@pytest.mark.slow
@torch.no_grad()
def test_nothing_explodes_in_a_hundred_thousand_tokens():
    read_for_long(100_000)


@torch.no_grad()
def test_persistent_tokens_stay_in_sight():
    """However far behind a window they are, and however the text is split."""
    fields = SHAPES["attention"] | {"sliding_window": 2, "num_persistent_tokens": 3}
    model, ids = tiny_model(**fields), random_ids(2, 15)
    expected = model(ids, use_cache=True)
    logits, cache = read_in_pieces(model, ids, [4, 1, 9, 1])
    torch.testing.assert_close(logits, expected.logits, **CLOSE)
    assert_same_state(cache, expected.past_key_values)
    model.model.layers[0].mixer.persistent.weight.mul_(-1)
    assert (model(ids).logits - expected.logits).abs().amax(-1).min() > 1e-6
    model.set_attn_implementation("eager")
    eager = model(ids).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, eager, rtol=1e-4, atol=1e-5)  # its softmax is float32
