"""The promises of the model: splits, padding, causality, gradients, halting that is real, and clear
errors."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from stackformer import (
    StackformerCache,
    StackformerForCausalLM,
    StackformerForSequenceClassification,
    StackformerForTokenClassification,
    StackformerModel,
)
from stackformer.state import find_mismatch
from tests.models import SHAPES, random_ids, spread_weights, tiny_config, tiny_model

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def assert_same_state(actual, expected, **tolerance):
    for layer, reference in zip(actual.layers, expected.layers, strict=True):
        assert layer.slices.keys() == reference.slices.keys()
        for index, state in reference.slices.items():
            torch.testing.assert_close(layer.slices[index], state, **(CLOSE | tolerance))


def gradients_whole_and_through_the_cache(model, ids, split=11):
    """All gradients of the loss on the tokens after `split`: read at once, and in a second call that goes on
    from the state of the first."""
    labels = ids.clone()
    labels[:, : split + 1] = -100

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    whole = gradients(model(ids, labels=labels).loss)
    cache = model(ids[:, :split], use_cache=True).past_key_values
    return whole, gradients(model(ids[:, split:], labels=labels[:, split:], past_key_values=cache).loss)


def read_in_pieces(model, input_ids, sizes, attention_mask=None):
    cache, logits, start = None, [], 0
    for size in sizes:
        stop = start + size
        mask = None if attention_mask is None else attention_mask[:, :stop]
        outputs = model(input_ids[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True)
        cache, start = outputs.past_key_values, stop
        logits.append(outputs.logits)
    assert start == input_ids.shape[1]
    return torch.cat(logits, dim=1), cache


@every_shape
@pytest.mark.parametrize("sizes", [[1] * 21, [20, 1], [1, 20], [3, 1, 8, 9]], ids=str)
@torch.no_grad()
def test_any_split_gives_the_same(shape, sizes):
    model, ids = tiny_model(**shape), random_ids(2, 21)
    expected = model(ids, use_cache=True)
    logits, cache = read_in_pieces(model, ids, sizes)
    torch.testing.assert_close(logits, expected.logits, **CLOSE)
    assert_same_state(cache, expected.past_key_values)
    assert cache.get_seq_length() == 21
    assert (model(ids, use_cache=False).logits - expected.logits).abs().max() == 0


@every_shape
@torch.no_grad()
def test_any_split_gives_the_same_in_float32(shape):
    """Within the promised 1e-4. (With the weights of the other tests, rounding errors grow from step to
    step.)"""
    model, ids = tiny_model(torch.float32, noise=0.05, chunk_size=64, **shape), random_ids(2, 150)
    expected = model(ids, use_cache=True)
    logits, cache = read_in_pieces(model, ids, [64, 1, 85])
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    # The running maximum that RWKV keeps is a difference of numbers of the size of T.
    # A cell with angles forgets no rounding error, and the layer above it sees all of them. A cell that
    # settles in its own past makes them larger from token to token.
    mixers = set(shape.get("mixer_types", ()))
    atol = 1e-3 if mixers & {"coupled_angles", "fast_weights"} else 2e-4 if "rwkv" in mixers else 1e-4
    assert_same_state(cache, expected.past_key_values, rtol=1e-4, atol=atol)


@torch.no_grad()
def test_splits_matter_to_a_model_that_loses_its_state():
    """The test above can fail: the state carries information."""
    model, ids = tiny_model(), random_ids(2, 21)
    expected = model(ids).logits
    assert (model(ids[:, 10:]).logits - expected[:, 10:]).abs().max() > 0.1


def padded(ids, mask):
    """`ids` [B, T] spread over the ones of `mask`, ordinary tokens in between."""
    result = random_ids(*mask.shape, seed=9)
    for row, tokens in enumerate(ids):
        result[row, mask[row].bool()] = tokens
    return result


PADDINGS = {
    "left": [[0] * 5 + [1] * 9, [0] * 5 + [1] * 9],
    "right": [[1] * 9 + [0] * 5, [1] * 9 + [0] * 5],
    "interior": [[1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1], [1] * 4 + [0] * 5 + [1] * 5],
    "mixed": [[0] * 5 + [1] * 9, [1] * 9 + [0] * 5],
}


@every_shape
@pytest.mark.parametrize("mask", PADDINGS.values(), ids=PADDINGS.keys())
@pytest.mark.parametrize("sizes", [[14], [1] * 14, [6, 1, 7]], ids=["whole", "one by one", "split"])
@torch.no_grad()
def test_padding_changes_nothing(shape, mask, sizes):
    """Neither logits of real tokens nor the state, in one call or in many."""
    model, ids, mask = tiny_model(**shape), random_ids(2, 9), torch.tensor(mask)
    expected = model(ids, use_cache=True)
    logits, cache = read_in_pieces(model, padded(ids, mask), sizes, mask)
    for row in range(2):
        torch.testing.assert_close(logits[row, mask[row].bool()], expected.logits[row], **CLOSE)
    assert_same_state(cache, expected.past_key_values)


@every_shape
@torch.no_grad()
def test_batch_mates_change_nothing(shape):
    model, ids = tiny_model(**shape), random_ids(4, 19)
    together = model(ids)
    for row in range(4):
        alone = model(ids[row : row + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[row], **CLOSE)
        torch.testing.assert_close(alone.ponder_steps[0], together.ponder_steps[row], **CLOSE)


@every_shape
@torch.no_grad()
def test_causality(shape):
    model, ids = tiny_model(**shape), random_ids(1, 23)
    expected = model(ids).logits
    for position in (0, 7, 8, 22):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % 256
        logits = model(changed).logits
        torch.testing.assert_close(logits[:, :position], expected[:, :position], rtol=0, atol=1e-12)
        assert (logits[:, position:] - expected[:, position:]).abs().amax(-1).min() > 1e-6


@torch.no_grad()
def test_halted_tokens_are_not_computed():
    """The core sees exactly the tokens that are still active, and the trace tells which those are."""
    model, ids = tiny_model(), random_ids(3, 40)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    outputs = model(ids, attention_mask=mask, output_stack_trace=True)
    active = outputs.stack_trace.active.sum((0, 1)).tolist()
    assert seen == active[: len(seen)] and not any(active[len(seen) :])
    assert seen[0] == 3 * 40 - 7
    assert 0 < seen[-1] < seen[0] / 2, "the test model does not halt"
    assert (outputs.ponder_steps[0, :7] == 0).all()
    assert (outputs.ponder_steps[1:] > 1 - 1e-9).all()


@torch.no_grad()
def test_a_model_made_for_one_step_takes_one():
    model, ids = tiny_model(max_ponder_steps=1), random_ids(2, 9)
    expected = model(ids).logits
    model.config.max_ponder_steps = 3
    outputs = model(ids)
    torch.testing.assert_close(outputs.logits, expected)
    assert (outputs.ponder_steps == 1).all()


@torch.no_grad()
def test_nobody_has_no_trace():
    ids = random_ids(2, 5)
    outputs = tiny_model()(ids, attention_mask=torch.zeros_like(ids), output_stack_trace=True)
    assert outputs.stack_trace is None and not outputs.ponder_steps.any()


@torch.no_grad()
def test_halting_is_by_the_threshold():
    model, ids = tiny_model(), random_ids(2, 30)
    outputs = model(ids, output_stack_trace=True)
    trace = outputs.stack_trace
    mass = trace.pointer.sum(-1)  # before each step
    assert (mass[..., 0] == 1).all()
    assert (mass[trace.active] >= model.config.halting_threshold).all()
    left = (mass[..., :-1] * (1 - trace.actions[..., :-1, 2])).where(trace.active[..., :-1], 1)
    bottom_only = (
        trace.pointer[..., :-1, 1:].sum(-1) == 0
    )  # then the remaining mass is known from the trace alone
    halted = trace.active[..., :-1] & ~trace.active[..., 1:]
    assert (left[halted & bottom_only] < model.config.halting_threshold).all()
    model.config.halting_threshold = 0.0
    assert model(ids, output_stack_trace=True).stack_trace.active.all()


@torch.no_grad()
def test_trace_and_hidden_states():
    model, ids = tiny_model(halting_threshold=0.0), random_ids(2, 6)
    outputs = model(ids, output_stack_trace=True, output_hidden_states=True)
    config, trace = model.config, outputs.stack_trace
    steps, levels, layers, heads, banks = 4, 3, 2, 2, 2
    assert trace.pointer.shape == (2, 6, steps, levels)
    assert trace.actions.shape == (2, 6, steps, 3)
    assert trace.bank_reads.shape == trace.bank_writes.shape == (2, 6, steps, layers, heads, banks)
    torch.testing.assert_close(trace.actions.sum(-1), torch.ones_like(trace.actions[..., 0]))
    torch.testing.assert_close(trace.bank_reads.sum(-1), torch.ones_like(trace.bank_reads[..., 0]))
    assert trace.bank_decays.shape == trace.bank_reads.shape
    assert (trace.bank_decays <= 0).all() and (trace.bank_decays >= -0.5 * trace.bank_writes).all()
    assert len(outputs.hidden_states) == steps + 1
    assert torch.equal(outputs.hidden_states[0], model.model.embed_tokens(ids))
    # The output is the thoughts weighted by the mass that was dropped while they were thought.
    dropped = trace.pointer[..., 0] * trace.actions[..., 2]
    dropped[..., -1] = trace.pointer[..., -1, :].sum(-1)
    thoughts = torch.stack(outputs.hidden_states[1:], dim=2)
    hidden = model.model.norm((dropped.unsqueeze(-1) * thoughts).sum(2))
    torch.testing.assert_close(model.lm_head(hidden), outputs.logits, rtol=1e-5, atol=1e-5)
    expected_steps = (dropped * torch.arange(1, steps + 1)).sum(-1)
    torch.testing.assert_close(outputs.ponder_steps, expected_steps, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert config.max_ponder_steps == steps


@torch.no_grad()
def test_trace_of_layers_without_banks():
    traces = {
        name: tiny_model(**SHAPES[name])(random_ids(2, 6), output_stack_trace=True).stack_trace
        for name in ("attention", "hybrid stack")
    }
    assert traces["attention"].bank_reads is None and traces["attention"].bank_writes is None
    for weights in (traces["hybrid stack"].bank_reads, traces["hybrid stack"].bank_writes):
        torch.testing.assert_close(weights[:, :, 0, 0].sum(-1), torch.ones(2, 6, 2, dtype=weights.dtype))
        assert not weights[:, :, :, 1].any()


@torch.no_grad()
def test_later_steps_move_by_the_gate():
    """None of the way: a token goes on thinking what the first step thought. All the way: the new thought."""
    model, ids = tiny_model(stack_depth=1, halting_threshold=0.0), random_ids(2, 9)
    model.model.action_proj.weight.zero_()
    model.model.action_proj.bias.copy_(torch.tensor([-1e4, 0, -1e4]))  # no-ops only
    thoughts = []
    model.model.bottleneck.register_forward_hook(lambda module, args, output: thoughts.append(output))

    def moves(gate):
        thoughts.clear()
        model.model.step_gate.weight.fill_(gate)
        steps = torch.stack(model(ids, output_hidden_states=True).hidden_states[1:])
        return steps.flatten(1, 2), torch.stack(thoughts)

    steps, new = moves(0.0)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), **CLOSE)
    assert not torch.allclose(new[1], new[0])
    steps, new = moves(1.0)
    torch.testing.assert_close(steps, new, **CLOSE)
    steps, new = moves(0.3)
    torch.testing.assert_close(steps[1:], 0.7 * steps[:-1] + 0.3 * new[1:], **CLOSE)


@every_shape
def test_every_parameter_learns(shape):
    model = tiny_model(**shape).train()
    model(random_ids(2, 40), labels=random_ids(2, 40)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradients_are_right():
    """Against finite differences, through the whole model and a cache, halting included."""
    model, ids = tiny_model(num_hidden_layers=1, hidden_size=8, bottleneck_size=4), random_ids(1, 7)
    parameters = dict(model.named_parameters())

    def loss(*tensors):
        values = dict(zip(parameters, tensors, strict=True))
        first = torch.func.functional_call(model, values, (ids[:, :3],), {"use_cache": True})
        second = torch.func.functional_call(
            model, values, (ids[:, 3:],), {"past_key_values": first.past_key_values}
        )
        return second.logits.square().mean() + first.ponder_steps.sum()

    assert torch.autograd.gradcheck(loss, tuple(parameters.values()), fast_mode=True)


def test_gradients_flow_through_the_cache():
    """Full backpropagation through time over two calls equals one call; a detached cache truncates it."""
    model, ids = tiny_model().train(), random_ids(2, 20)
    labels = ids.clone()
    labels[:, :12] = -100

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(model(ids, labels=labels).loss)
    first = model(ids[:, :11], use_cache=True).past_key_values
    truncated = gradients(model(ids[:, 11:], labels=labels[:, 11:], past_key_values=first.detach()).loss)
    actual = gradients(model(ids[:, 11:], labels=labels[:, 11:], past_key_values=first).loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **CLOSE, msg=name)
    assert any((truncated[name] - gradient).abs().max() > 1e-4 for name, gradient in expected.items())


@every_shape
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(shape, use_reentrant):
    ids = random_ids(2, 20)

    def gradients(model):
        model.train()(ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    checkpointed = tiny_model(**shape)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_gradient_checkpointing
    if use_reentrant and shape.get("feedback"):  # it would cut off the gradients of the states
        with pytest.raises(ValueError, match="must be {'use_reentrant': False} with feedback"):
            checkpointed.train()(ids, labels=ids)
        return
    torch.testing.assert_close(gradients(checkpointed), gradients(tiny_model(**shape)), **CLOSE)


def test_training_loss_adds_the_ponder_loss_and_evaluation_does_not():
    ids = random_ids(2, 20)
    labels = ids.clone()
    labels[0, :10] = -100
    model = tiny_model(ponder_loss_coef=0.1)
    outputs = model(ids, labels=labels)
    entropy = nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(outputs.loss, entropy, check_dtype=False)
    trained = model.train()(ids, labels=labels)
    counted = labels[:, 1:] != -100
    ponder = trained.ponder_steps[:, :-1][counted].mean()
    torch.testing.assert_close(trained.loss, entropy + 0.1 * ponder, rtol=1e-5, atol=1e-5, check_dtype=False)
    items = counted.sum() * 2
    scaled = model(ids, labels=labels, num_items_in_batch=items)
    torch.testing.assert_close(scaled.loss, trained.loss / 2)


def test_no_cache_in_training_unless_asked_for():
    model, ids = tiny_model(), random_ids(1, 5)
    assert model(ids).past_key_values is not None
    model.train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None


@torch.no_grad()
def test_logits_to_keep():
    model, ids = tiny_model(), random_ids(2, 9)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])


@torch.no_grad()
def test_inputs_embeds():
    model, ids = tiny_model(), random_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


@torch.no_grad()
def test_tuple_outputs():
    model, ids = tiny_model(), random_ids(2, 9)
    outputs = model(ids, return_dict=False)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], model(ids).logits)


@torch.no_grad()
def test_a_dynamic_cache_made_from_the_config_works():
    model, ids = tiny_model(), random_ids(2, 9)
    outputs = model(ids[:, :5], past_key_values=DynamicCache(config=model.config))
    logits = model(ids[:, 5:], past_key_values=outputs.past_key_values).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 5:], **CLOSE)


@pytest.mark.parametrize("tie", [False, True])
def test_initialisation(tie):
    """What the table in `_init_weights` says, on a fresh model."""
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.02, tie_word_embeddings=tie)
    model = StackformerForCausalLM(config)
    assert model.model.action_proj.bias.tolist() == [0, 0, -3]
    assert not model.model.action_proj.weight.any()
    assert torch.equal(model.model.step_gate.weight, torch.full((24,), 0.1))
    mixer = model.model.layers[0].mixer
    assert mixer.conv.weight.abs().max() <= 0.5
    assert mixer.conv.weight.abs().max() > 0.4
    assert abs(mixer.qkv_proj.weight.std() * 16**0.5 - 1) < 0.1
    assert abs(model.model.embed_tokens.weight.std() - 0.02) < 0.001
    assert not model.model.bottleneck.mlp.down_proj.weight.any()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    core = model.model.layers[0]
    assert not core.mixer.o_proj.weight.any() and not core.mlp.down_proj.weight.any()
    slices = model.model.down_proj.weight, model.model.bottleneck.up_proj.weight.T
    assert all(torch.equal(weight, torch.eye(16, 24)) for weight in slices)
    with torch.no_grad():
        assert model.eval()(random_ids(2, 30)).ponder_steps.mean() > 3.5, "does not start deep"


@pytest.mark.parametrize("head", [StackformerForSequenceClassification, StackformerForTokenClassification])
def test_classification_heads(head):
    torch.manual_seed(0)
    model = spread_weights(head(tiny_config(num_labels=3))).double().eval()
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, model.config.pad_token_id
    labels = torch.tensor([0, 2]) if "Sequence" in head.__name__ else torch.zeros_like(ids)
    outputs = model(ids, attention_mask=mask, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.shape == ((2, 3) if "Sequence" in head.__name__ else (2, 9, 3))
    alone = model(ids[:1, 4:])
    real = outputs.logits[:1] if "Sequence" in head.__name__ else outputs.logits[:1, 4:]
    torch.testing.assert_close(alone.logits, real, **CLOSE)


def test_bare_model_outputs():
    model = StackformerModel(tiny_config()).eval()
    outputs = model(random_ids(2, 9))
    assert outputs.last_hidden_state.shape == (2, 9, 24)
    assert isinstance(outputs.past_key_values, StackformerCache)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({}, "exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 24)}, "exactly one"),
        (
            {"input_ids": random_ids(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)},
            "`attention_mask` must be",
        ),
        ({"input_ids": random_ids(2, 3), "attention_mask": torch.ones(1, 3)}, "`attention_mask` must be"),
        ({"input_ids": random_ids(1, 3), "attention_mask": torch.ones(1, 2)}, "`attention_mask` must be"),
        ({"input_ids": random_ids(1, 3), "past_key_values": DynamicCache()}, "`cache` must be"),
        (
            {
                "input_ids": random_ids(1, 3),
                "past_key_values": StackformerCache(tiny_config(num_hidden_layers=3)),
            },
            "`cache` must be",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)


@every_shape
def test_a_state_has_the_names_of_its_specification(shape):
    """A mixer's NamedTuple and its specification are two views of one state."""
    model = tiny_model(**shape)
    cache = model(random_ids(2, 9), use_cache=True).cache
    for layer, cache_layer in zip(model.model.layers, cache.layers, strict=True):
        names = [spec.name for spec in layer.mixer_spec]
        assert names == list(layer.mixer.state_type._fields[: len(names)])
        assert len(set(names)) == len(names)
        for state in cache_layer.slices.values():
            assert find_mismatch(state, layer.state_spec) is None
