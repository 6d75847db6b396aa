"""A memory is a file: it comes back as it was, to its own model only, and whole or not at all."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from stackformer import StackformerCache, StackformerForCausalLM
from stackformer.memory_file import MEMORY_FILE
from tests.models import random_ids, tiny_model
from tests.test_modeling import assert_same_state, every_shape


@pytest.fixture
def model():
    return tiny_model(torch.float32)


@torch.no_grad()
def memory_of(model, length=20, rows=2):
    return model(random_ids(rows, length), use_cache=True).cache


@every_shape
@torch.no_grad()
def test_a_memory_comes_back(tmp_path, shape):
    model, more = tiny_model(**shape), random_ids(2, 7, seed=1)
    memory = memory_of(model)
    memory.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {MEMORY_FILE}
    loaded = StackformerCache.from_pretrained(tmp_path, model)
    assert loaded.get_seq_length() == 20
    assert_same_state(loaded, memory, rtol=0, atol=0)
    expected = model(more, cache=memory).logits
    assert torch.equal(model(more, cache=loaded).logits, expected)


def test_an_answer_from_another_process(tmp_path, model):
    """Read here, generate there."""
    model.save_pretrained(tmp_path / "model")
    text = random_ids(1, 20)
    memory = memory_of(model, rows=1)
    memory.save_pretrained(tmp_path / "memory")
    script = """
import sys, torch
from stackformer import StackformerCache, StackformerForCausalLM
model = StackformerForCausalLM.from_pretrained(sys.argv[1] + "/model")
memory = StackformerCache.from_pretrained(sys.argv[1] + "/memory", model)
question = torch.tensor([[7, 8, 9]])
mask = torch.ones(1, memory.get_seq_length() + 3, dtype=torch.long)
options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
print(model.generate(question, cache=memory, attention_mask=mask, **options)[0, 3:].tolist())
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    whole = torch.cat([text, torch.tensor([[7, 8, 9]])], dim=1)
    expected = model.generate(whole, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 23:]
    assert result.stdout.strip() == str(expected.tolist())


def test_one_memory_serves_every_head(tmp_path, model):
    memory_of(model).save_pretrained(tmp_path)
    assert StackformerCache.from_pretrained(tmp_path, model.model).get_seq_length() == 20


def test_a_copy_remembers_its_model_and_an_empty_memory_is_refused(tmp_path, model):
    memory = memory_of(model)
    memory.clone().save_pretrained(tmp_path / "clone")
    memory.detach().save_pretrained(tmp_path / "detached")
    with pytest.raises(ValueError, match="empty"):
        StackformerCache(model.config).save_pretrained(tmp_path / "unknown", model=model)
    memory.layers[0].mark = None
    with pytest.raises(ValueError, match="`model` must be whose memory"):
        memory.save_pretrained(tmp_path / "unknown")
    assert not (tmp_path / "unknown").exists()


def test_moving_the_halting_threshold_keeps_the_memory(tmp_path, model):
    memory_of(model).save_pretrained(tmp_path)
    model.config.halting_threshold = 0.0
    StackformerCache.from_pretrained(tmp_path, model)


def test_another_model_is_refused(tmp_path, model):
    memory = memory_of(model)
    memory.save_pretrained(tmp_path)
    other = tiny_model(torch.float32, num_memory_banks=3)
    with pytest.raises(ValueError, match="another configuration: num_memory_banks=2 instead of 3"):
        StackformerCache.from_pretrained(tmp_path, other)
    with pytest.raises(ValueError, match="memory of another model: another configuration"):
        memory.save_pretrained(tmp_path / "as another's", model=other)
    with torch.no_grad():
        model.model.layers[0].mixer.o_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="other weights"):
        StackformerCache.from_pretrained(tmp_path, model)


def rewrite(path, change=lambda tensors: None, describe=lambda description: None, seal=True):
    """Write a memory anew with other tensors or another description, and with a digest that fits."""
    from stackformer.memory_file import _digest

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
    description = json.loads(metadata["description"])
    description.pop("sha256")
    change(tensors)
    describe(description)
    if seal:
        description["sha256"] = _digest(description, tensors)
    save_file(tensors, path, {**metadata, "description": json.dumps(description)})


NAME = "layer.0.slice.0.memory"


def without_a_layer(tensors):
    for name in [name for name in tensors if name.startswith("layer.1.")]:
        del tensors[name]


MISTAKES = {
    "a missing tensor": (lambda t: t.pop(NAME), None, "slice 0 of layer 0 has no .'memory'"),
    "a missing layer": (without_a_layer, None, "different ponder steps"),
    "slice 99": (lambda t: t.update({"layer.0.slice.99.memory": t[NAME].clone()}), None, "unknown tensors"),
    "an unknown name": (lambda t: t.update({"other": t[NAME].clone()}), None, "unknown tensors"),
    "other banks": (lambda t: t.update({NAME: t[NAME][:, :, 1:].clone()}), None, "expected `memory`"),
    "other rows": (lambda t: t.update({NAME: t[NAME][:1]}), None, "expected `memory`"),
    "no rows": (lambda t: t.update({n: x[:0] for n, x in t.items()}), None, "expected"),
    "integers": (lambda t: t.update({NAME: t[NAME].long()}), None, "I64, expected `memory`"),
    "not a number": (lambda t: t[NAME].view(-1)[3:4].fill_(torch.nan), None, "not finite"),
    "infinite": (lambda t: t[NAME].view(-1)[3:4].fill_(-torch.inf), None, "not finite"),
    "a negative length": (None, {"seen_tokens": -5}, "number of tokens, got -5"),
    "a length of 1e30": (None, {"seen_tokens": 10**30}, "number of tokens"),
    "a length that is text": (None, {"seen_tokens": "20"}, "number of tokens, got '20'"),
    "a length that is true": (None, {"seen_tokens": True}, "number of tokens, got True"),
    "another batch size": (None, {"batch_size": 7}, "expected"),
    "a model without weights": (None, {"model": {"config": {}}}, "`model` to have"),
    "a model that is none": (None, {"model": 3}, "`model` to have"),
    "another version": (None, {"format_version": 9}, "has format version 9, expected 2"),
}


@pytest.mark.parametrize("change, described, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_what_does_not_fit_the_model_is_refused(tmp_path, model, change, described, message):
    """Although nothing is damaged."""
    memory_of(model).save_pretrained(tmp_path)
    rewrite(
        tmp_path / MEMORY_FILE,
        change or (lambda tensors: None),
        lambda description: description.update(described or {}),
    )
    with pytest.raises(ValueError, match=message):
        StackformerCache.from_pretrained(tmp_path, model)


def test_a_growing_state_is_no_longer_than_what_was_read(tmp_path):
    model = tiny_model(mixer_types=["attention", "banked_linear_attention"])
    memory_of(model).save_pretrained(tmp_path)
    name = "layer.0.slice.0.key"
    rewrite(tmp_path / MEMORY_FILE, lambda t: t.update({name: t[name].repeat(1, 2, 1, 1)}))
    with pytest.raises(ValueError, match="expected `key` .batch, any, 2, 8."):
        StackformerCache.from_pretrained(tmp_path, model)


def test_a_damaged_memory_is_refused(tmp_path, model):
    memory_of(model).save_pretrained(tmp_path)
    path = tmp_path / MEMORY_FILE
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[:4], b"", b"{}", os.urandom(1000), whole + b"more"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged or no memory: expected a safetensors file"):
            StackformerCache.from_pretrained(tmp_path, model)
    for place in (len(whole) - 1, len(whole) - 5000, whole.index(b"seen_tokens") + 15):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged|does not fit"):
            StackformerCache.from_pretrained(tmp_path, model)
    path.write_bytes(save({"x": torch.ones(1)}, {"description": "nothing"}))
    with pytest.raises(ValueError, match="expected the JSON of a Stackformer memory"):
        StackformerCache.from_pretrained(tmp_path, model)
    path.write_bytes(save({"x": torch.ones(1)}, {"description": "[" * 100_000}))
    with pytest.raises(ValueError, match="expected the JSON of a Stackformer memory"):
        StackformerCache.from_pretrained(tmp_path, model)
    path.write_bytes(save({"x": torch.ones(1)}, {"description": "[]"}))
    with pytest.raises(ValueError, match="is not a Stackformer memory"):
        StackformerCache.from_pretrained(tmp_path, model)
    path.write_bytes(save({"x": torch.ones(1)}, {"description": '{"format_version": 2}'}))
    with pytest.raises(ValueError, match=r"\['batch_size', 'model', 'seen_tokens', 'sha256'\]"):
        StackformerCache.from_pretrained(tmp_path, model)


def test_sizes_are_checked_before_anything_is_read(tmp_path, model):
    """A file of 50 GB that is all holes."""
    memory_of(model).save_pretrained(tmp_path)
    with open(tmp_path / MEMORY_FILE, "r+b") as file:
        file.truncate(50 * 2**30)
    with pytest.raises(ValueError, match="is damaged or no memory"):
        StackformerCache.from_pretrained(tmp_path, model)


def test_no_memory_is_an_os_error(tmp_path, model):
    with pytest.raises(OSError, match=r"memory\.safetensors"):
        StackformerCache.from_pretrained(tmp_path, model)


def test_size_of_the_file_does_not_depend_on_length(tmp_path):
    model, sizes = tiny_model(torch.float32, halting_threshold=0.0), set()
    for length in (10, 99):
        memory_of(model, length).save_pretrained(tmp_path)
        sizes.add((tmp_path / MEMORY_FILE).stat().st_size)
    assert len(sizes) == 1


def test_the_fingerprint_survives_saving_the_model(tmp_path, model):
    memory_of(model).save_pretrained(tmp_path / "memory")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    loaded = StackformerForCausalLM.from_pretrained(tmp_path / "model")
    StackformerCache.from_pretrained(tmp_path / "memory", loaded)


# Memories of version 1.


def write_version_1(folder, model, memory):
    """As the first version of the package wrote it."""
    tensors = {
        f"layer.{layer}.slice.{index}.{part}": tensor.contiguous()
        for layer, cache_layer in enumerate(memory.layers)
        for index, state in cache_layer.slices.items()
        for part, tensor in enumerate(state)
    }
    digest = hashlib.sha256()
    for name, tensor in sorted(model.base_model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    free = {
        "chunk_size", "halting_threshold", "initializer_range", "ponder_loss_coef", "tie_word_embeddings",
        "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "model_type",
    }  # fmt: skip
    fields = sorted(set(type(model.config).__annotations__) - free)
    data = save(tensors)
    description = {
        "format": "stackformer-memory",
        "format_version": 1,
        "seen_tokens": memory.get_seq_length(),
        "batch_size": memory.batch_size,
        "tensors": {
            "file": "memory.safetensors",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        },
        "model": {
            "config": {name: getattr(model.config, name) for name in fields},
            "fingerprint": digest.hexdigest(),
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "memory.safetensors").write_bytes(data)
    (folder / "memory.json").write_text(json.dumps(description, indent=2) + "\n")


@every_shape
def test_a_memory_of_version_1_is_read(tmp_path, shape):
    model = tiny_model(**shape)
    memory = memory_of(model)
    write_version_1(tmp_path, model, memory)
    loaded = StackformerCache.from_pretrained(tmp_path, model)
    assert loaded.get_seq_length() == 20
    assert_same_state(loaded, memory, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path)  # and written in the new version, in its place
    assert {path.name for path in tmp_path.iterdir()} == {MEMORY_FILE}
    assert_same_state(StackformerCache.from_pretrained(tmp_path, model), memory, rtol=0, atol=0)


def test_a_damaged_memory_of_version_1_is_refused(tmp_path, model):
    write_version_1(tmp_path, model, memory_of(model))
    tensors, description = tmp_path / "memory.safetensors", tmp_path / "memory.json"
    whole, text = tensors.read_bytes(), description.read_text()

    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged or not the file that was described"):
        StackformerCache.from_pretrained(tmp_path, model)
    tensors.write_bytes(whole)

    def altered(**fields):
        return json.dumps({**json.loads(text), **fields})

    for broken, message in [
        (text[:-20], "is damaged: expected the JSON"),
        ("[" * 100_000, "is damaged: expected the JSON"),
        (" " * 2**21 + text, "is damaged: expected the JSON"),
        (altered(format_version=2), "has format version 2, expected 1"),
        (altered(seen_tokens=-5), "number of tokens, got -5"),
        (altered(tensors=[]), "`bytes` and `sha256`"),
        (altered(tensors={"bytes": 50 * 2**30, "sha256": 1}), "damaged or not the file"),
        (json.dumps({"format": "other"}), "is not a Stackformer memory"),
        ("[]", "is not a Stackformer memory"),
        (
            json.dumps({"format": "stackformer-memory", "format_version": 1}),
            r"\['model', 'seen_tokens', 'tensors'\]",
        ),
    ]:
        description.write_text(broken)
        with pytest.raises(ValueError, match=message):
            StackformerCache.from_pretrained(tmp_path, model)
    description.unlink()
    with pytest.raises(OSError, match=r"memory\.json"):
        StackformerCache.from_pretrained(tmp_path, model)
    assert len(load(whole)) > 0


# Writing: whole or not at all.

WRITER = """
import os, sys
import torch
from stackformer import StackformerForCausalLM

folder, step = sys.argv[1], int(sys.argv[2])
model = StackformerForCausalLM.from_pretrained(folder + "/model")
with torch.no_grad():
    memory = model(torch.arange(30).unsqueeze(0), use_cache=True).cache
done = 0

def dying(function):
    def call(*args, **kwargs):
        global done
        done += 1
        if done == step:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return call

for name in ("open", "write", "fsync", "replace", "unlink", "close", "mkdir"):
    setattr(os, name, dying(getattr(os, name)))
memory.save_pretrained(folder + "/memory")
"""


def test_a_kill_leaves_the_old_memory_or_the_new_one(tmp_path, model):
    """At every call of the operating system that a save makes."""
    model.save_pretrained(tmp_path / "model")
    old = memory_of(model, 20, rows=1)
    kills, lengths = 0, []
    while True:
        old.save_pretrained(tmp_path / "memory")
        result = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), str(kills + 1)])
        lengths.append(StackformerCache.from_pretrained(tmp_path / "memory", model).get_seq_length())
        if result.returncode == 0:
            break
        assert result.returncode == -9
        kills += 1
    assert kills >= 3 and lengths[0] == 20 and lengths[-1] == 30
    assert lengths == sorted(lengths), "a kill that came later left the older memory"


def test_an_interrupted_write_leaves_no_trace(tmp_path, model, monkeypatch):
    memory = memory_of(model)
    memory.save_pretrained(tmp_path)
    later = memory_of(model, length=30)
    for name, error in (("replace", KeyboardInterrupt), ("fsync", OSError(28, "No space left on device"))):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *args, error=error: (_ for _ in ()).throw(error))
            with pytest.raises((KeyboardInterrupt, OSError)):
                later.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {MEMORY_FILE}
        assert_same_state(StackformerCache.from_pretrained(tmp_path, model), memory, rtol=0, atol=0)


def test_nothing_is_written_through_a_link(tmp_path, model):
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("precious")
    folder = tmp_path / "memory"
    folder.mkdir()
    for name in (MEMORY_FILE, f"{MEMORY_FILE}.partial"):
        (folder / name).symlink_to(elsewhere)
    memory_of(model).save_pretrained(folder)
    assert elsewhere.read_text() == "precious"
    assert not (folder / MEMORY_FILE).is_symlink()
    StackformerCache.from_pretrained(folder, model)


READERS_AND_WRITERS = """
import sys
from pathlib import Path
import torch
from stackformer import StackformerCache, StackformerForCausalLM

folder, role = sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
model = StackformerForCausalLM.from_pretrained(folder + "/model")
with torch.no_grad():
    memory = model(torch.arange(int(role)).unsqueeze(0), use_cache=True).cache
Path(folder, role).touch()
for _ in range(40):
    memory.save_pretrained(folder + "/memory")
"""


def test_readers_beside_writers(tmp_path, model):
    """Two processes write; whatever a third one reads is one memory or the other."""
    model.save_pretrained(tmp_path / "model")
    memory_of(model, 20, rows=1).save_pretrained(tmp_path / "memory")
    command = [sys.executable, "-c", READERS_AND_WRITERS, str(tmp_path)]
    writers = [subprocess.Popen([*command, role]) for role in ("30", "40")]
    while not all(Path(tmp_path, role).exists() for role in ("30", "40")):
        assert all(writer.poll() in (None, 0) for writer in writers)
    lengths = set()
    while any(writer.poll() is None for writer in writers):
        lengths.add(StackformerCache.from_pretrained(tmp_path / "memory", model).get_seq_length())
    assert all(writer.returncode == 0 for writer in writers)
    assert lengths <= {20, 30, 40} and len(lengths) > 1
    assert {path.name for path in (tmp_path / "memory").iterdir()} == {MEMORY_FILE}
