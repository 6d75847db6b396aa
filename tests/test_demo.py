"""The demo and the picture, at a size for a test."""

import io
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
    assert (output_dir / "trace.png").read_bytes()[:4] == b"\x89PNG"
    assert (output_dir / "trace.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(output_dir.glob("*.partial"))
    assert json.loads((output_dir / "config.json").read_text())["use_cache"] is True


def test_visualize(tmp_path, capsys, monkeypatch):
    tiny_model(torch.float32).save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    command = ["--model", str(tmp_path), "--max_tokens", "4"]
    visualize.main([*command, "--text", "a $ b\n", "--output", str(tmp_path / "trace.png")])
    assert (tmp_path / "trace.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr("sys.stdin", io.StringIO("$ from a pipe"))
    visualize.main([*command, "--output", str(tmp_path / "trace.html")])
    assert '"tokens":["$"," ","f","r"]' in (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out.count("TextTrace of 4 tokens") == 2


@pytest.mark.parametrize(
    ("option", "value", "expected"), [("--output", "a.pdf", ".html or .png"), ("--max_tokens", "0", "1")]
)
def test_visualize_checks_its_options(option, value, expected):
    with pytest.raises(ValueError, match=f"{value}.*expected.*{expected}"):
        visualize.main(["--model", "nowhere", "--text", "a", option, value])
