"""The demo and the picture, at a size for a test."""

import json

import pytest
import torch

from scripts import demo, visualize
from stackformer import build_byte_tokenizer
from tests.models import tiny_model


def test_demo_trains_reloads_generates_and_draws(tmp_path, capsys, monkeypatch):
    preset = tmp_path / "preset.json"
    fields = {"hidden_size": 16, "bottleneck_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    preset.write_text(
        json.dumps({"model_type": "stackformer", "max_ponder_steps": 2, "stack_depth": 2, **fields})
    )
    monkeypatch.setattr(demo, "PRESET", preset)
    output_dir = tmp_path / "demo"
    demo.main(["--output_dir", str(output_dir), "--max_steps", "2", "--batch_size", "2"])
    printed = capsys.readouterr().out
    assert "bits per byte of held-out text: 8." in printed
    assert (output_dir / "generated.txt").read_text(encoding="utf-8").startswith(demo.PROMPT)
    assert (output_dir / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(output_dir.glob("*.partial"))
    assert json.loads((output_dir / "config.json").read_text())["use_cache"] is True


def test_visualize(tmp_path, capsys):
    tiny_model(torch.float32).save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    picture = tmp_path / "picture.png"
    visualize.main(["--model", str(tmp_path), "--text", "a $ b\n", "--output", str(picture)])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="expected at least two tokens, got 1"):
        visualize.main(["--model", str(tmp_path), "--text", "a", "--output", str(picture)])
