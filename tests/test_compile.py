"""One graph, no recompilation: the training forward, the decode step, a static cache, and torch.export."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from stackformer import StackformerCache, StackformerStaticCache
from tests.models import SHAPES, random_ids, tiny_model
from tests.test_generation import generate
from tests.test_modeling import CLOSE, assert_same_state

# Tracing is what may break; with this backend nothing has to be compiled to machine code.
BACKEND = "aot_eager"
FIXED = {name: shape | {"halting_threshold": 0.0} for name, shape in SHAPES.items()}
# These take long to trace, and have nothing in training that the other shapes have not.
SLOW = (
    "hybrid stack", "sliding window", "feedback", "neural memory", "memory as context",
    "infinity-former", "sticky memories on a stack", "rwkv stack",
)  # fmt: skip
FIXED = {name: shape for name, shape in FIXED.items() if name not in SLOW}
GROWING = ("attention", "hybrid stack")
CONSTANT = {name: shape for name, shape in SHAPES.items() if name not in GROWING}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", FIXED.values(), ids=FIXED.keys())
def test_training_forward_and_backward(shape):
    ids = random_ids(2, 21)

    def loss_and_gradients(model, forward):
        outputs = forward(ids, labels=ids)
        outputs.loss.backward()
        return [outputs.loss.detach(), *(parameter.grad for parameter in model.parameters())]

    eager, model = tiny_model(**shape).train(), tiny_model(**shape).train()
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(loss_and_gradients(model, compiled), loss_and_gradients(eager, eager), **CLOSE)


@pytest.mark.parametrize("shape", CONSTANT.values(), ids=CONSTANT.keys())
@torch.no_grad()
def test_decode_step(shape):
    """Halting included: the compiled step masks what the eager one leaves out. One graph serves every
    step."""
    model, ids = tiny_model(**shape), random_ids(3, 30)
    counter = CompileCounterWithBackend(BACKEND)
    step = torch.compile(model, fullgraph=True, backend=counter)
    static, dynamic = StackformerStaticCache(model.config), StackformerCache(model.config)
    for cache in (static, dynamic):
        model(ids[:, :20], past_key_values=cache)
    addresses = [tensor.data_ptr() for state in static.layers[0].slices.values() for tensor in state]
    for t in range(20, 30):
        expected = model(ids[:, t : t + 1], past_key_values=dynamic)
        actual = step(ids[:, t : t + 1], past_key_values=static)
        torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
        torch.testing.assert_close(actual.ponder_steps, expected.ponder_steps, **CLOSE)
    assert counter.frame_count == 1
    assert addresses == [t.data_ptr() for state in static.layers[0].slices.values() for t in state]
    assert static.get_seq_length() == 30
    for layer, eager in zip(static.layers, dynamic.layers, strict=True):
        # A slice that no token has reached is as empty as one that is not there.
        for index in layer.slices.keys() - eager.slices.keys():
            assert not any(tensor.any() for tensor in layer.slices.pop(index))
    assert_same_state(static, dynamic)


@torch.no_grad()
def test_a_new_cache_in_a_compiled_call():
    """The compiled call is the first one that the cache sees, and marks it as the model's."""
    shape = SHAPES["plain core"]
    model, ids = tiny_model(**shape), random_ids(2, 3)
    step = torch.compile(model, fullgraph=True, backend=BACKEND)
    cache = StackformerStaticCache(model.config)
    for token in ids.split(1, dim=1):
        logits = step(token, past_key_values=cache).logits
    torch.testing.assert_close(logits[:, -1], model(ids).logits[:, -1], **CLOSE)
    with pytest.raises(ValueError, match="the memory of another model"):
        tiny_model(**shape, max_decay_rate=0.25)(ids, past_key_values=cache)


def test_static_cache_generation():
    model, ids, mask = tiny_model(), random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    for options in (
        {},
        {"num_beams": 3},
        {"prefill_chunk_size": 4},
        {"num_return_sequences": 2, "num_beams": 2},
    ):
        expected = generate(model, ids, 8, attention_mask=mask, **options)
        actual = generate(model, ids, 8, attention_mask=mask, cache_implementation="static", **options)
        assert torch.equal(actual, expected), options
    outputs = generate(model, ids, 8, cache_implementation="static", return_dict_in_generate=True)
    assert outputs.past_key_values.is_compileable
    assert outputs.past_key_values.get_seq_length() == 18


@pytest.mark.parametrize("name", GROWING)
def test_a_static_cache_refuses_a_state_that_grows(name):
    with pytest.raises(ValueError, match="a state that grows, .*, which no static cache can hold"):
        generate(tiny_model(**SHAPES[name]), random_ids(2, 11), 8, cache_implementation="static")


@torch.no_grad()
def test_a_static_cache_is_a_cache():
    model, ids, more = tiny_model(halting_threshold=0.0), random_ids(3, 9), random_ids(3, 4, seed=1)
    cache = StackformerStaticCache(model.config)
    expected = model(ids, use_cache=True).past_key_values
    model(ids, past_key_values=cache)
    branch = cache.clone()
    assert_same_state(branch, expected)
    model(more, past_key_values=branch)
    assert_same_state(cache, expected)
    assert cache.get_seq_length() == 9 and branch.get_seq_length() == 13
    cache.reset()
    assert cache.get_seq_length() == 0
    model(ids, past_key_values=cache)
    assert_same_state(cache, expected)
    with pytest.raises(ValueError, match="A static cache records no past"):
        cache.activate_past_recording()


@torch.no_grad()
def test_export_of_the_decode_step():
    """With the state as plain inputs and outputs, which is what a runtime without Python can hold."""
    model, ids = tiny_model(), random_ids(2, 12)
    cache = model(ids[:, :11], use_cache=True).past_key_values

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, token, state):
            cache = StackformerCache(model.config)
            for layer, slices in zip(cache.layers, state, strict=True):
                layer.slices = dict(enumerate(slices))
            logits = self.model(token, past_key_values=cache).logits
            return logits, [[layer.slices[i] for i in sorted(layer.slices)] for layer in cache.layers]

    state = [[layer.slices[i] for i in sorted(layer.slices)] for layer in cache.layers]
    program = torch.export.export(Step(), (ids[:, 11:], state), strict=False)
    logits, _ = program.module()(ids[:, 11:], state)
    torch.testing.assert_close(logits, model(ids[:, 11:], past_key_values=cache).logits, **CLOSE)
