"""A memory is a file: it comes back as it was, to its own model only, and whole or not at all."""

import json
import subprocess
import sys

import pytest
import torch

from stackformer import StackformerCache, StackformerForCausalLM
from tests.models import random_ids, tiny_model
from tests.test_modeling import assert_same_state, every_shape


@pytest.fixture
def model():
    return tiny_model(torch.float32)


@torch.no_grad()
def memory_of(model, length=20):
    return model(random_ids(2, length), use_cache=True).past_key_values


@every_shape
@torch.no_grad()
def test_a_memory_comes_back(tmp_path, shape):
    model, more = tiny_model(**shape), random_ids(2, 7, seed=1)
    memory = memory_of(model)
    memory.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"memory.json", "memory.safetensors"}
    loaded = StackformerCache.from_pretrained(tmp_path, model)
    assert loaded.get_seq_length() == 20
    assert_same_state(loaded, memory, rtol=0, atol=0)
    expected = model(more, past_key_values=memory).logits
    assert torch.equal(model(more, past_key_values=loaded).logits, expected)


def test_an_answer_from_another_process(tmp_path, model):
    """Read here, generate there."""
    model.save_pretrained(tmp_path / "model")
    text = random_ids(1, 20)
    memory = model.generate(text, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    memory.save_pretrained(tmp_path / "memory")
    script = """
import sys, torch
from stackformer import StackformerCache, StackformerForCausalLM
model = StackformerForCausalLM.from_pretrained(sys.argv[1] + "/model")
memory = StackformerCache.from_pretrained(sys.argv[1] + "/memory", model)
question = torch.tensor([[7, 8, 9]])
mask = torch.ones(1, memory.get_seq_length() + 3, dtype=torch.long)
options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
print(model.generate(question, past_key_values=memory, attention_mask=mask, **options)[0, 3:].tolist())
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    whole = torch.cat([text, torch.tensor([[7, 8, 9]])], dim=1)
    expected = model.generate(whole, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 23:]
    assert result.stdout.strip() == str(expected.tolist())


def test_one_memory_serves_every_head(tmp_path, model):
    memory_of(model).save_pretrained(tmp_path)
    assert StackformerCache.from_pretrained(tmp_path, model.model).get_seq_length() == 20


def test_a_copy_remembers_its_model_and_a_pickle_is_told(tmp_path, model):
    memory = memory_of(model)
    memory.clone().save_pretrained(tmp_path / "clone")
    memory.detach().save_pretrained(tmp_path / "detached")
    own = StackformerCache(model.config)
    with pytest.raises(ValueError, match="`model` must be whose memory"):
        own.save_pretrained(tmp_path / "unknown")
    with pytest.raises(ValueError, match="empty"):
        own.save_pretrained(tmp_path / "unknown", model=model)
    assert not (tmp_path / "unknown").exists()


def test_moving_the_halting_threshold_keeps_the_memory(tmp_path, model):
    memory_of(model).save_pretrained(tmp_path)
    model.config.halting_threshold = 0.0
    StackformerCache.from_pretrained(tmp_path, model)


def test_another_model_is_refused(tmp_path, model):
    memory_of(model).save_pretrained(tmp_path)
    other = tiny_model(torch.float32, num_memory_banks=3)
    with pytest.raises(ValueError, match="another configuration: num_memory_banks=2 instead of 3"):
        StackformerCache.from_pretrained(tmp_path, other)
    with torch.no_grad():
        model.model.layers[0].mixer.o_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="other weights"):
        StackformerCache.from_pretrained(tmp_path, model)


def test_a_damaged_memory_is_refused(tmp_path, model):
    memory_of(model).save_pretrained(tmp_path)
    tensors, description = tmp_path / "memory.safetensors", tmp_path / "memory.json"
    whole, text = tensors.read_bytes(), description.read_text()

    tensors.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"expected {len(whole)} bytes.*got {len(whole) - 100} bytes"):
        StackformerCache.from_pretrained(tmp_path, model)
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        StackformerCache.from_pretrained(tmp_path, model)
    tensors.write_bytes(whole)

    for broken, message in [
        (text[:-20], "is damaged: expected the JSON"),
        (json.dumps({**json.loads(text), "format_version": 2}), "has format version 2, expected 1"),
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


def test_no_memory_is_an_os_error(tmp_path, model):
    with pytest.raises(OSError, match=r"memory\.json"):
        StackformerCache.from_pretrained(tmp_path, model)


def test_an_interrupted_write_leaves_the_old_memory(tmp_path, model, monkeypatch):
    memory = memory_of(model)
    memory.save_pretrained(tmp_path)
    later = memory_of(model, length=30)
    monkeypatch.setattr("pathlib.Path.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        later.save_pretrained(tmp_path)
    assert_same_state(StackformerCache.from_pretrained(tmp_path, model), memory, rtol=0, atol=0)


def test_size_of_the_files_does_not_depend_on_length(tmp_path):
    model, sizes = tiny_model(torch.float32, halting_threshold=0.0), set()
    for length in (10, 300):
        memory_of(model, length).save_pretrained(tmp_path)
        sizes.add((tmp_path / "memory.safetensors").stat().st_size)
    assert len(sizes) == 1


def test_the_fingerprint_survives_saving_the_model(tmp_path, model):
    memory_of(model).save_pretrained(tmp_path / "memory")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    loaded = StackformerForCausalLM.from_pretrained(tmp_path / "model")
    StackformerCache.from_pretrained(tmp_path / "memory", loaded)
