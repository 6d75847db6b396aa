"""Titans' memory: the paper's recurrence, written naively, is the reference; nothing leaks or explodes."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize, silu

from stackformer import StackformerCache, StackformerConfig, StackformerForCausalLM
from stackformer.mixer_attention import rotary_embedding
from stackformer.mixer_neural_memory import (
    Memory,
    MemoryAsContext,
    MemoryAsLayer,
    Writes,
    advance_memory,
    measure_surprise,
)
from stackformer.token_layout import TokenLayout
from tests.models import SHAPES, random_ids, spread_weights, tiny_model
from tests.test_generation import generate
from tests.test_modeling import (
    CLOSE,
    assert_same_state,
    gradients_whole_and_through_the_cache,
    read_in_pieces,
)

SIZE, HEADS, LENGTH = 12, 2, 19
NAMES = ("neural memory", "memory as gate", "memory as context")
PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("titans-*.json"))


def layer(depth: int = 2, chunk_size: int = 4, kind: type = MemoryAsLayer, **fields):
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
    mixer = kind(config).double()
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


def bounded(gradient, answer, value, max_surprise):
    """The gradient of one token, divided by the curvature along it if above 1, and then clipped."""
    curvature = (gradient.norm() / (2 * (answer - value)).norm()) ** 2
    gradient = gradient / curvature.clamp(min=1)
    return gradient / (gradient.norm() / (max_surprise or torch.inf)).clamp(min=1)


class NaiveMemory:
    """Equations 11 to 18 for one row, token by token, gradients by autograd."""

    def __init__(self, memory):
        self.memory = memory
        self.weights = self.anchor = memory.initial_memory  # [L, H, K, K]
        self.momentum = torch.zeros_like(self.weights)
        kernel = memory.conv.kernel_size[0]
        self.inputs = [torch.zeros(3 * SIZE, dtype=torch.float64)] * (kernel - 1)
        self.seen = 0

    def write_and_read(self, token):
        """A token [d] to what is read after it was written, [d]."""
        memory = self.memory
        self.inputs.append(memory.qkv_proj(token))
        window = torch.stack(self.inputs[-memory.conv.kernel_size[0] :], dim=1).unsqueeze(0)
        qkv = silu(memory.conv._conv_forward(window, memory.conv.weight, None).squeeze())
        gates = memory.write_proj(token).unflatten(-1, (3, HEADS))
        if self.seen % memory.chunk_size == 0:
            self.anchor = self.weights
        self.seen += 1
        changed, outputs = [], []
        for head in range(HEADS):
            query, key, value = qkv.unflatten(-1, (3, HEADS, -1))[:, head]
            query, key = normalize(query, dim=0), normalize(key, dim=0)

            def loss(weights, key=key, value=value):
                return (network(weights, key) - value).square().sum()

            gradient = torch.func.grad(loss)(self.anchor[:, head])
            gradient = bounded(gradient, network(self.anchor[:, head], key), value, memory.max_surprise)
            alpha, eta = (gates[0, head] - 4.6).sigmoid(), gates[1, head].sigmoid()
            step = memory.max_step_size * gates[2, head].sigmoid()
            momentum = eta * self.momentum[:, head] - step * gradient
            changed.append(((1 - alpha) * self.weights[:, head] + momentum, momentum))
            outputs.append(network(changed[-1][0], query))
        self.weights, self.momentum = (torch.stack(x, dim=1) for x in zip(*changed, strict=True))
        return memory.norm(torch.stack(outputs)).flatten()

    def recall(self, query):
        """What the segments before have for [d]; to be called before the token is written."""
        anchor = self.weights if self.seen % self.memory.chunk_size == 0 else self.anchor
        heads = silu(query).unflatten(-1, (HEADS, -1))
        outputs = [network(anchor[:, head], normalize(heads[head], dim=0)) for head in range(HEADS)]
        return self.memory.norm(torch.stack(outputs)).flatten()


def naive(mixer, hidden):
    """[T, d] to [T, d]."""
    memory = NaiveMemory(mixer.memory)
    mixed = torch.stack([memory.write_and_read(token) for token in hidden])
    return mixer.o_proj(silu(mixer.gate_proj(hidden)) * mixed)


def naive_context(mixer, hidden):
    """Equations 21 to 25 for one row [T, d]: every token attends to lists of keys and values."""
    memory, output = NaiveMemory(mixer.memory), []
    always = list(mixer.kv_proj(mixer.persistent.weight).unflatten(-1, (2, HEADS, -1)))
    for t, token in enumerate(hidden):
        position = t % mixer.memory.chunk_size
        if position == 0:
            segment = list(always)

        def rotate(x, position=position):
            """Equation 34 of RoFormer in complex numbers, halves as real and imaginary parts."""
            half = x.shape[-1] // 2
            cos, sin = rotary_embedding(torch.tensor(position), 2 * half, 10000.0, torch.float64)
            turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[:half], sin[:half])
            return torch.cat([turned.real, turned.imag], dim=-1)

        question, query = mixer.q_proj(token).chunk(2)
        for source in (memory.recall(question), token):
            key, value = mixer.kv_proj(source).unflatten(-1, (2, HEADS, -1))
            segment.append(torch.stack([rotate(key), value]))
        keys, values = torch.stack(segment).unbind(1)  # [slots, H, K]
        query = rotate(query.unflatten(-1, (HEADS, -1)))
        scores = torch.einsum("hk,shk->sh", query, keys) * keys.shape[-1] ** -0.5
        y = mixer.attention_norm(token + torch.einsum("sh,shk->hk", scores.softmax(0), values).flatten())
        output.append(mixer.o_proj(silu(y) * memory.write_and_read(y)))
    return torch.stack(output)


@pytest.mark.parametrize("chunk_size", [1, 4, 32])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_it_is_the_recurrence_of_the_paper(depth, chunk_size):
    mixer, hidden = layer(depth, chunk_size), hidden_tokens(1).requires_grad_()
    assert_whole_and_steps_are(naive, mixer, hidden)


@pytest.mark.parametrize("chunk_size", [1, 4, 32])
def test_memory_as_context_is_that_of_the_paper(chunk_size):
    mixer = layer(2, chunk_size, MemoryAsContext, num_persistent_tokens=3)
    assert_whole_and_steps_are(naive_context, mixer, hidden_tokens(1).requires_grad_())


def assert_whole_and_steps_are(reference, mixer, hidden):
    """In one call and token by token, in value and in gradient."""

    def gradients(output):
        mixer.zero_grad()
        hidden.grad = None
        output.square().sum().backward()
        return [hidden.grad.clone(), *(parameter.grad.clone() for parameter in mixer.parameters())]

    expected = reference(mixer, hidden[0])
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


@pytest.mark.parametrize("limit", [None, 1.0, 3.0])
def test_the_surprise_is_the_bounded_gradient(limit):
    """A bound is active in some cases and not in others: both bounds are tested in both."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 3, 1, 5, 5, generator=generator, dtype=torch.float64) * 0.6
    key, value = torch.randn(2, 1, 1, 16, 5, generator=generator, dtype=torch.float64).unbind()
    value = value * torch.logspace(-1.5, 0.5, 16, dtype=torch.float64).unsqueeze(-1)
    inputs, errors = measure_surprise(weights, key, value, limit)
    norms, curvatures = [], []
    for t in range(16):
        k, v = key[0, 0, t], value[0, 0, t]
        gradient = torch.func.grad(lambda w, k=k, v=v: (network(w, k) - v).square().sum())(weights[0, :, 0])
        answer = network(weights[0, :, 0], k)
        expected = bounded(gradient, answer, v, limit)
        pairs = zip(inputs, errors, strict=True)
        actual = torch.stack([torch.outer(e[0, 0, t], x[0, 0, t]) for x, e in pairs])
        torch.testing.assert_close(actual, expected, **CLOSE)
        norms.append(bounded(gradient, answer, v, None).norm().item())
        curvatures.append((gradient.norm() / (2 * (answer - v)).norm()).item())
    assert min(norms) < 0.9 and max(norms) > 3.1
    assert min(curvatures) < 0.9 and max(curvatures) > 1.1


@torch.no_grad()
def test_what_surprises_more_is_written_more():
    """A value of twice the length is written at twice the length, unless the surprise is at its limit."""
    generator = torch.Generator().manual_seed(0)
    key = normalize(torch.randn(1, 1, 1, 5, generator=generator, dtype=torch.float64), dim=-1)
    value = torch.randn(1, 1, 1, 5, generator=generator, dtype=torch.float64)
    empty, one = torch.zeros(1, 1, 1, 5, 5, dtype=torch.float64), key.new_ones(1, 1, 1)
    writes = Writes(0 * one, 0 * one, 0.2 * one, one)

    def answer(scale, limit):
        return advance_memory(Memory(empty, empty, empty), key, key, scale * value, writes, limit)[0]

    torch.testing.assert_close(answer(1, None), 0.4 * value, **CLOSE)  # theta times the gradient, 2 v
    for limit in (None, 1e5):
        torch.testing.assert_close(answer(1000, limit), 1000 * answer(1, limit), **CLOSE)
    torch.testing.assert_close(answer(1000, 0.1), answer(1, 0.1), **CLOSE)
    assert answer(1, 0.1).norm().item() == pytest.approx(0.02)


def scale_values(mixer, scale):
    """Values are silu of a convolution of projections: the kernel's last third makes them."""
    mixer.memory.conv.weight[2 * SIZE :] *= scale


@torch.no_grad()
def test_a_mixer_sees_the_size_of_values():
    """By default, but not with a limit of 1, which all gradients reach."""
    differences = []
    for limit in (StackformerConfig().memory_max_surprise, 1.0):
        outputs = []
        for scale in (4.0, 8.0):
            mixer = layer(memory_max_surprise=limit)
            mixer.memory.norm = torch.nn.Identity()
            scale_values(mixer, scale)
            outputs.append(read(mixer, hidden_tokens())[0])
        differences.append(((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item())
    assert differences[0] > 1 > 0.3 > differences[1], differences


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e15, 1e30])
@torch.no_grad()
def test_large_inputs_do_not_overflow(depth, scale):
    """In thousands of tokens, with the largest steps, one step of forgetting in a hundred, and any values."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 4000, 8, generator=generator).unbind()
    query, key, value = normalize(query, dim=-1), normalize(key + 1, dim=-1), scale * value
    weights = torch.randn(1, depth, 2, 8, 8, generator=generator)
    memory, one = Memory(weights, weights, torch.zeros_like(weights)), torch.ones(1, 2, 16)
    writes = Writes(-0.01 * one, -0.7 * one, 0.2 * one, one)
    limit = StackformerConfig().memory_max_surprise
    for chunk in range(250):
        part = slice(16 * chunk, 16 * chunk + 16)
        tokens = (x[:, :, part] for x in (query, key, value))
        answer, memory = advance_memory(memory, *tokens, writes, limit)
        memory = memory._replace(anchor=memory.weights)
        assert torch.isfinite(answer).all()
    # c theta / (1 - eta) / alpha
    assert memory.weights.norm() < 2**0.5 * 10 * 0.2 / (1 - math.exp(-0.7)) / (1 - math.exp(-0.01))


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    real = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    places = real.view(1, 1, 4)

    def advance(anchor, weights, momentum, query, key, value, keep, eta, step):
        log_keep, log_momentum = (torch.nn.functional.logsigmoid(x) * places for x in (keep, eta))
        writes = Writes(log_keep, log_momentum, step.sigmoid() * places, places)
        read, memory = advance_memory(Memory(anchor, weights, momentum), query, key, value, writes, 2.0)
        return read, memory.weights, memory.momentum

    memory = [normal(1, 2, 1, 3, 3) for _ in range(3)]
    tokens = [normal(1, 1, 4, 3) for _ in range(3)]
    gates = [normal(1, 1, 4) for _ in range(3)]
    assert torch.autograd.gradcheck(advance, (*memory, *tokens, *gates))


@pytest.mark.parametrize("kind", [MemoryAsLayer, MemoryAsContext])
@pytest.mark.parametrize("first", [3, 5, 8])
@torch.no_grad()
def test_rows_need_not_be_at_the_same_place_of_a_chunk(first, kind):
    """Every row as if it were alone and whole, wherever calls and paddings split it."""
    mixer, hidden = layer(kind=kind), hidden_tokens(3)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, :2], mask[1, 1:3], mask[2, first + 2 :] = False, False, False
    left, state = read(mixer, hidden[:, :first], mask[:, :first])
    right, state = read(mixer, hidden[:, first:], mask[:, first:], state)
    assert state[-2].tolist() == [(count % 4) for count in mask.sum(1).tolist()]
    for row in range(3):
        expected, alone = read(mixer, hidden[row : row + 1, mask[row]])
        actual = torch.cat([left[row], right[row]])[mask[row]]
        torch.testing.assert_close(actual, expected[0], **CLOSE)
        torch.testing.assert_close(tuple(x[row : row + 1] for x in state), alone, **CLOSE)


@pytest.mark.parametrize("kind", [MemoryAsLayer, MemoryAsContext])
@torch.no_grad()
def test_a_state_of_zeros_is_the_beginning(kind):
    """What a cache holds for rows that have not begun, and what a static cache begins with."""
    mixer, hidden = layer(kind=kind), hidden_tokens()
    expected, state = read(mixer, hidden)
    zeros = type(state)(*(torch.zeros_like(tensor) for tensor in state))
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


@pytest.mark.parametrize("name", ["memory as gate", "memory as context"])
@torch.no_grad()
def test_the_memory_reaches_further_than_the_window(name):
    """With attention to 4 or 5 tokens, a change 40 tokens ago is still seen: by what was written of it."""
    model, ids = tiny_model(**SHAPES[name]), random_ids(1, 48)
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


@pytest.mark.parametrize("name,attended", [("memory as gate", 3), ("memory as context", 1)])
@torch.no_grad()
def test_states_are_float32_under_autocast(name, attended):
    model, ids = tiny_model(torch.float32, noise=0.05, **SHAPES[name]), random_ids(2, 40)
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, use_cache=True)
        model(ids, past_key_values=outputs.past_key_values)
    memory = outputs.past_key_values.layers[0].slices[0][attended:]
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


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=[path.stem for path in PRESETS])
@torch.no_grad()
def test_presets_read_a_hundred_thousand_tokens(preset):
    """Small ones, with weights that are far from initial: states stay finite, and stop growing."""
    config = StackformerConfig.from_json_file(preset)
    config.update({"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16})
    torch.manual_seed(0)
    model = spread_weights(StackformerForCausalLM(config).eval())
    cache, norms, generator = StackformerCache(config), [], torch.Generator().manual_seed(0)
    for _ in range(400):
        ids = torch.randint(0, 256, (1, 250), generator=generator)
        assert torch.isfinite(model(ids, past_key_values=cache).logits).all()
        # Tokens and positions are counted; all else is a state.
        states = [x for layer in cache.layers for x in layer.slices[0] if x.is_floating_point()]
        assert all(torch.isfinite(state).all() for state in states)
        norms.append(torch.stack([state.norm() for state in states]))
    assert cache.get_seq_length() == 100_000
    early, late = torch.stack(norms).chunk(2)
    # A tensor that grows with the tokens doubles. (A momentum is small, and as large as its last surprise.)
    assert (late.amax(0) < 1.3 * early.amax(0) + 0.5).all()


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
