"""Saved models are the same models: in this process, sharded, and where the package is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import stackformer
from stackformer import StackformerForCausalLM, StackformerModel, build_byte_tokenizer
from tests.models import SHAPES, random_ids, tiny_model

SOURCES = {path.name for path in Path(stackformer.__file__).parent.glob("*.py")}


def run_without_the_package(script: str, folder: Path) -> str:
    """Run a script in a process that can import neither stackformer nor Triton, with caches of its own."""
    blocker = "import sys; sys.modules['stackformer'] = sys.modules['triton'] = None\n"
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", blocker + script], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@torch.no_grad()
def test_reload(tmp_path, tie_word_embeddings, max_shard_size):
    model, ids = tiny_model(torch.float32, tie_word_embeddings=tie_word_embeddings), random_ids(2, 9)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is StackformerForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # Not to the bit: tensors of a file are aligned in another way, and products are rounded in another.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is StackformerModel
    expected = model.model(ids).last_hidden_state
    torch.testing.assert_close(bare(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_missing_weights_are_initialised_as_in_a_new_model(tmp_path):
    """Loading goes through the meta device: what is not in the file must get its special initial value."""
    model = tiny_model(torch.float32, max_ponder_steps=1, stack_depth=1)
    model.save_pretrained(tmp_path)
    loaded = StackformerForCausalLM.from_pretrained(tmp_path, max_ponder_steps=3)
    assert loaded.model.action_proj.bias.tolist() == [0, 0, -3]
    bias = loaded.model.layers[0].mixer.decay_proj.bias
    assert torch.equal(bias, model.model.layers[0].mixer.decay_proj.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_loading(tmp_path, dtype):
    model, ids = tiny_model(torch.float32, noise=0.05, halting_threshold=0.0), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    logits = loaded(ids).logits
    assert logits.dtype == dtype
    reference = model(ids).logits
    assert (logits.float() - reference).abs().max() < 0.1 * reference.abs().max()


@torch.no_grad()
def test_remote_code_without_the_package(tmp_path):
    """Load, generate, save again and load that, all from the saved folder alone."""
    model, ids = tiny_model(torch.float32, **SHAPES["hybrid stack"]), random_ids(2, 9)
    model.save_pretrained(tmp_path / "model")
    build_byte_tokenizer().save_pretrained(tmp_path / "model")
    saved = {path.name for path in (tmp_path / "model").glob("*.py")}
    assert "memory_bank_triton.py" in saved and saved <= SOURCES
    torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    output = run_without_the_package(
        """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
expected = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
with torch.no_grad():
    assert torch.allclose(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
for auto_class in (AutoConfig, AutoModel, AutoModelForSequenceClassification):
    assert auto_class.from_pretrained("model", trust_remote_code=True) is not None
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
with torch.no_grad():
    assert torch.allclose(again(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
generator = pipeline("text-generation", model="again", tokenizer="model", trust_remote_code=True)
print(repr(generator("Hello", max_new_tokens=5, do_sample=False)[0]["generated_text"]))
trace = model.stack_trace("Hello", AutoTokenizer.from_pretrained("model"))
assert trace.tokens == ["H", "e", "l", "l", "o"]
assert trace.to_html().startswith("<!doctype html>")
""",
        tmp_path,
    )
    assert "Hello" in output


def test_the_code_that_is_saved_imports_only_what_transformers_needs(tmp_path):
    from transformers.dynamic_module_utils import get_imports

    tiny_model().save_pretrained(tmp_path)
    files = list(tmp_path.glob("*.py"))
    assert len(files) >= 5
    for path in files:
        needed = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}  # by transformers, too
        assert set(get_imports(path)) <= needed | set(sys.stdlib_module_names), path.name
