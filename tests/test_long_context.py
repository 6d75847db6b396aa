"""Backpropagation through chunks is backpropagation through all tokens, in memory that does not grow."""

import math

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from stackformer.mixer_banked_linear_attention import BankedLinearAttention
from stackformer.training.long_context import DriftError, _Storage, long_context_backward, long_context_loss
from tests.models import SHAPES, random_ids, tiny_model

torch.set_num_threads(1)
CLOSE = {"rtol": 1e-8, "atol": 1e-11}
LENGTH, CHUNK = 50, 8

CASES = {
    "plain core": {"bottleneck_size": None, "num_memory_banks": 1, "stack_depth": 1, "max_ponder_steps": 1},
    "fixed depth": {"stack_depth": 2, "max_ponder_steps": 3, "halting_threshold": 0.0},
    "halting stack": {},
    "no decay": {"max_decay_rate": 0.0},
    "strong decay": {"max_decay_rate": 8.0},
}


def batch(padding: bool = False, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Three rows; with padding on the left, in between, and in all of the last chunks."""
    ids = random_ids(3, length)
    inputs = {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)}
    if padding:
        mask = torch.ones_like(ids)
        mask[0, :21], mask[1, 13:17], mask[2, 25:], mask[:, 42:] = 0, 0, 0, 0
        inputs |= {"attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}
    return inputs


def model_for(case: str = "halting stack", dtype: torch.dtype = torch.float64, **overrides):
    return tiny_model(dtype, **({"ponder_loss_coef": 0.1} | CASES[case] | overrides)).train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(model: nn.Module, expected: nn.Module, tolerance: float = 1e-8) -> None:
    """Every parameter's gradient, relative to its norm; where that is next to nothing, to that of all."""
    references = gradients(expected)
    norm = torch.stack([reference.norm() for reference in references.values()]).norm()
    for name, grad in gradients(model).items():
        bound = tolerance * (references[name].norm() + 1e-3 * norm)
        assert (grad - references[name]).norm() <= bound, name


def assert_same_state(cache, expected) -> None:
    for layer, reference in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.slices, reference.slices, **CLOSE)


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_full_backpropagation(case, padding):
    inputs = batch(padding)
    expected = model_for(case)
    outputs = expected(**inputs, use_cache=True)
    outputs.loss.backward()
    for method in ("reverse", "stored"):
        model = model_for(case)
        result = long_context_backward(model, **inputs, chunk_size=CHUNK, method=method, max_log_decay=1.0)
        torch.testing.assert_close(result.loss, outputs.loss.detach(), rtol=1e-6, atol=0)  # float32 sums
        assert_same_gradients(model, expected)
        assert_same_state(result.cache, outputs.past_key_values)
        assert result.cache.get_seq_length() == LENGTH
        if method == "reverse":
            assert 0 < result.drift < 1e-10
            assert result.num_anchors > 0  # without decay, too: memories grow by more than a nat


@pytest.mark.parametrize("method", ["reverse", "stored"])
def test_it_goes_on_from_a_state(method):
    """That of some rows at a time when not every slice was written, too; and leaves that state alone."""
    inputs = batch()
    first = {"input_ids": inputs["input_ids"][:, :5], "labels": inputs["labels"][:, :5]}
    past = long_context_loss(model_for(), **first, chunk_size=2).cache
    kept = past.clone()
    expected = model_for()
    outputs = expected(**inputs, past_key_values=past.clone())
    outputs.loss.backward()
    model = model_for()
    result = long_context_backward(model, **inputs, cache=past, chunk_size=CHUNK, method=method)
    assert_same_gradients(model, expected)
    assert_same_state(result.cache, outputs.past_key_values)
    assert_same_state(past, kept)


def test_the_state_is_kept_anywhere(tmp_path):
    """Files are gone afterwards, also if something goes wrong."""
    inputs, expected = batch(), model_for("strong decay")
    reference = long_context_backward(expected, **inputs, chunk_size=CHUNK)
    for storage in ("cpu", str(tmp_path)):
        for method in ("reverse", "stored"):
            model = model_for("strong decay")
            result = long_context_backward(model, **inputs, chunk_size=CHUNK, storage=storage, method=method)
            assert_same_gradients(model, expected)
            assert method == "stored" or result.kept_bytes == reference.kept_bytes
    with pytest.raises(DriftError):
        long_context_backward(
            model_for("strong decay"), **inputs, chunk_size=CHUNK, storage=str(tmp_path), max_drift=0
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("feedback", [False, True], ids=["parallel", "feedback"])
def test_checkpointed_chunks(feedback):
    inputs, expected, model = batch(), model_for(feedback=feedback), model_for(feedback=feedback)
    long_context_backward(expected, **inputs, chunk_size=CHUNK)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    long_context_backward(model, **inputs, chunk_size=CHUNK)
    assert_same_gradients(model, expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="must be {'use_reentrant': False} with feedback, or with a cache"):
        long_context_backward(model, **inputs, chunk_size=CHUNK, method="truncated")


def test_truncated_is_a_loop_with_a_detached_state():
    inputs, expected, model = batch(), model_for(), model_for()
    result = long_context_backward(model, **inputs, chunk_size=CHUNK, method="truncated")
    labels = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    cache = None
    for start in range(0, LENGTH, CHUNK):
        ids, targets = (x[:, start : start + CHUNK].contiguous() for x in (inputs["input_ids"], labels))
        outputs = expected(ids, labels=targets, shift_labels=targets, past_key_values=cache, use_cache=True,
                           num_items_in_batch=labels.ne(-100).sum())  # fmt: skip
        outputs.loss.backward()
        cache = outputs.past_key_values.detach()
    assert_same_gradients(model, expected)
    assert_same_state(result.cache, cache)
    whole = model_for()
    long_context_backward(whole, **inputs, chunk_size=CHUNK)
    with pytest.raises(AssertionError):
        assert_same_gradients(whole, expected)


def test_a_chunk_draws_the_same_random_numbers_twice():
    """Dropout in a projection that decides what is written: otherwise what is undone is not what was done."""
    peft = pytest.importorskip("peft")

    def run(method):
        config = peft.LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(1)
        model = peft.get_peft_model(model_for(), config).train()
        torch.manual_seed(2)
        result = long_context_backward(model, **batch(), chunk_size=CHUNK, method=method)
        return result, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    reversed_, grads = run("reverse")
    stored, expected = run("stored")
    assert reversed_.drift < 1e-10
    torch.testing.assert_close(reversed_.loss, stored.loss)
    torch.testing.assert_close(grads, expected, rtol=1e-7, atol=1e-10)


class SavedBytes:
    """Largest number of bytes that autograd holds at a time."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        size = tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        return _Held(tensor, size, self)

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)


class _Held:
    def __init__(self, tensor, size, counter):
        self.tensor, self.size, self.counter = tensor, size, counter

    def __del__(self):
        self.counter.now -= self.size


def test_memory_does_not_grow_with_length():
    """Activations: none more. What is kept: a few numbers per chunk, unless something was forgotten."""
    model = model_for("no decay", torch.float32)
    peaks, kept, stored = [], [], []
    for length in (64, 256):
        inputs = batch(length=length)
        with SavedBytes() as saved:
            result = long_context_backward(model, **inputs, chunk_size=16)
        peaks.append(saved.peak)
        kept.append(result.kept_bytes / length)
        stored.append(
            long_context_backward(model, **inputs, chunk_size=16, method="stored").kept_bytes / length
        )
        assert result.num_anchors == 0
    assert peaks[1] < 1.1 * peaks[0], peaks
    assert kept[1] < 0.3 * stored[1], (kept, stored)  # here, convolutions have a large part in small states
    with SavedBytes() as saved:
        model(**inputs).loss.backward()
    assert saved.peak > 5 * peaks[1]


def test_inputs_of_the_recurrence_are_computed_once(monkeypatch):
    """For each layer and chunk in either pass, not again to find its state."""
    counts = {"project": 0, "forward": 0}

    def count(name, method):
        def counted(*args):
            counts[name] += 1
            return method(*args)

        monkeypatch.setattr(BankedLinearAttention, name, counted)

    count("project", BankedLinearAttention.project)
    count("forward", BankedLinearAttention.forward)
    output = long_context_backward(model_for("no decay"), **batch(), chunk_size=CHUNK)
    assert output.num_anchors == 0
    assert counts["project"] == counts["forward"] > 2 * LENGTH // CHUNK


def test_what_is_kept_lies_in_slabs():
    """Not in as many places as there are tensors, and it comes back as it was."""
    chunks = [
        ({"mask": torch.rand(3, n) > 0.5, "empty": torch.randn(0, 2)}, [torch.randn(n, dtype=torch.float64)])
        for n in range(1, 40)
    ]
    chunks.append(({"large": torch.randn(_Storage.SLAB_BYTES)}, []))
    with _Storage("device", torch.device("cpu")) as storage:
        for chunk in chunks:
            storage.push(chunk)
        places = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(storage._entries)}
        assert len(places) == 2
        for chunk in reversed(chunks):
            torch.testing.assert_close(storage.pop(), chunk, rtol=0, atol=0)


def test_anchors_grow_with_what_is_forgotten():
    def anchors(rate: float, bound: float, length: int) -> int:
        inputs = batch(length=length)
        model = model_for("plain core", max_decay_rate=rate)
        return long_context_backward(model, **inputs, chunk_size=CHUNK, max_log_decay=bound).num_anchors

    few, many, twice = anchors(0.05, 2.0, 96), anchors(0.2, 2.0, 96), anchors(0.2, 2.0, 192)
    memories = 2 * 2 * 3  # layers, heads, rows
    assert 0 < few < many < 96 / CHUNK * memories
    assert many == pytest.approx(twice / 2, rel=0.2)
    assert anchors(0.2, 0.0, 96) == (96 // CHUNK - 1) * memories


def test_anchors_bound_growth_too():
    """Without any decay errors grow with the memory, so that a bound on decay alone would bound nothing."""
    inputs, drifts = batch(length=400), []
    for bound in (math.log(4), 100.0):
        model = model_for("no decay", torch.float32)
        result = long_context_backward(model, **inputs, chunk_size=4, max_log_decay=bound)
        drifts.append(result.drift)
        memories = result.cache.layers[0].slices[0][0][..., 0, 0].numel() * 2  # layers
        assert (0 < result.num_anchors <= math.log(100, 4) * memories) == (bound < 10)
    assert 2 * drifts[0] < drifts[1]


def test_drift_in_float32_is_told_as_it_is():
    """It grows with the decay that is undone, and the gradients are off by as much."""
    inputs = batch(length=200)
    expected = model_for("plain core", torch.float32, max_decay_rate=0.1)
    long_context_backward(expected, **inputs, chunk_size=CHUNK, method="stored")
    drifts = []
    for bound in (1.0, 4.0):
        model = model_for("plain core", torch.float32, max_decay_rate=0.1)
        drifts.append(long_context_backward(model, **inputs, chunk_size=CHUNK, max_log_decay=bound).drift)
        assert_same_gradients(model, expected, tolerance=10 * drifts[-1])
    assert 1e-7 < drifts[0] < 0.1 * drifts[1] < 1e-4


def test_too_much_drift_is_an_error():
    inputs = batch(length=400)
    with pytest.raises(
        DriftError, match=r"off by .* of its size at the end of chunk \d+ of 50.*max_log_decay"
    ):
        long_context_backward(
            model_for("plain core", torch.float32), **inputs, chunk_size=CHUNK, max_log_decay=1e9
        )


def test_a_mixer_that_cannot_be_reversed_is_stored(monkeypatch):
    from stackformer.mixer_banked_linear_attention import BankedLinearAttention

    inputs, expected, model = batch(), model_for(), model_for()
    stored = long_context_backward(expected, **inputs, chunk_size=CHUNK, method="stored")
    monkeypatch.setattr(BankedLinearAttention, "num_reversible", 0)
    result = long_context_backward(model, **inputs, chunk_size=CHUNK)
    assert_same_gradients(model, expected)
    assert result.kept_bytes == stored.kept_bytes


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape(shape):
    """Also those with counters in their state, with states that grow, or with one that is read many times."""
    model, expected, inputs = tiny_model(**SHAPES[shape]), tiny_model(**SHAPES[shape]), batch(True, length=30)
    expected.train()(**inputs).loss.backward()
    long_context_backward(model.train(), **inputs, chunk_size=CHUNK)
    assert_same_gradients(model, expected)


def test_known_depths_are_depths_found():
    """A model told when its tokens halt is the model that finds out."""
    model, ids = model_for().eval(), random_ids(2, 20)
    with torch.no_grad():
        outputs = model(ids, output_stack_trace=True)
        depths = outputs.stack_trace.active.sum(-1)
        assert depths.min() < depths.max()
        torch.testing.assert_close(model(ids, ponder_depths=depths).logits, outputs.logits, rtol=0, atol=0)
        deeper = model(ids, ponder_depths=depths.clamp(min=2), output_stack_trace=True).stack_trace
    assert torch.equal(deeper.active.sum(-1), depths.clamp(min=2))
    with pytest.raises(ValueError, match=r"`ponder_depths` must have shape \(2, 20\), got \(20,\)"):
        model(ids, ponder_depths=depths[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "magic"}, "`method` must be one of .*'magic'"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        ({"max_drift": -1.0}, "`max_drift` must be at least 0, got -1.0"),
        ({"max_log_decay": math.nan}, "`max_log_decay` must be at least 0, got nan"),
        ({"storage": "nowhere"}, "`storage` must be .*'nowhere'"),
        ({"labels": None}, "exactly one of `labels` and `shift_labels`"),
        ({"labels": random_ids(1, 3)}, r"must be integers of shape \(3, 50\).*\(1, 3\)"),
        ({"labels": random_ids(1, 50)}, r"must be integers of shape \(3, 50\).*\(1, 50\)"),
        (
            {"labels": random_ids(3, 50).float()},
            r"`labels` or `shift_labels` must be integers of shape \(3, 50\), got torch.float32",
        ),
        ({"labels": random_ids(3, 50) - 200}, "must be ids of the 261 tokens .*, or -100, got -"),
        ({"labels": random_ids(3, 50) + 200}, "must be ids of the 261 tokens .*, or -100, got 4"),
        ({"labels": torch.full((3, 50), -1)}, "must be ids of the 261 tokens .*, or -100, got -1"),
        ({"input_ids": random_ids(3, 50).float()}, r"must be integers \(int64 or int32\), got torch.float32"),
        ({"input_ids": random_ids(3, 50) - 300}, "`input_ids` must be ids of the 261 tokens .*, got -"),
        ({"input_ids": torch.full((3, 50), 261)}, "`input_ids` must be ids of the 261 tokens .*, got 261"),
        ({"input_ids": random_ids(1, 50)[0], "labels": random_ids(1, 50)[0]}, r"shape \[B, T\].*\(50,\)"),
        ({"input_ids": random_ids(3, 0), "labels": random_ids(3, 0)}, r"shape \[B, T\].*\(3, 0\)"),
        ({"attention_mask": torch.ones(1, 50)}, r"`attention_mask` must have the shape \(3, 50\).*\(1, 50\)"),
        ({"num_items_in_batch": 0}, "`num_items_in_batch` must be at least 1, got 0"),
        ({"num_items_in_batch": torch.tensor(0)}, "`num_items_in_batch` must be at least 1, got 0"),
        ({"num_items_in_batch": -3}, "`num_items_in_batch` must be at least 1, got -3"),
    ],
)
def test_bad_arguments(arguments, message):
    model, given = model_for(), batch() | arguments
    with pytest.raises(ValueError, match=message):
        long_context_backward(model, **given)
    assert all(parameter.grad is None for parameter in model.parameters()), "it has begun"
    if not {"method", "max_drift", "max_log_decay", "storage"} & set(arguments):
        with pytest.raises(ValueError, match=message):
            long_context_loss(model, **given)
