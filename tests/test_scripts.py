# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Scripts: they measure what a hand-written reference does, and a run can be stopped, resumed and used."""

import contextlib
import io
import json
import math
import pydoc_data.topics
import statistics
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

import stackformer  # noqa: F401  (importing it registers the Auto classes)
from experiments import presets, training
from experiments.data import (
    Blocks,
    DataArguments,
    encode,
    load_splits,
    load_tokenizer,
    parse_range,
    read_bytes,
)
from experiments.report import bits_per_byte, write_json
from scripts import evaluate, generate, train, train_long
from stackformer.tokenization_stackformer import build_byte_tokenizer, train_bpe_tokenizer
from tests.models import spread_weights

torch.set_num_threads(1)

TEXT = "".join(pydoc_data.topics.topics.values()).encode("ascii", errors="ignore")[:30000]
# Weights are spread widely: with the usual initialisation a tiny model's logits hardly depend on its context.
PRESETS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    },
    "stackformer": {
        "model_type": "stackformer",
        "hidden_size": 24,
        "bottleneck_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_memory_banks": 2,
        "stack_depth": 2,
        "max_ponder_steps": 2,
        "chunk_size": 8,
        "initializer_range": 0.3,
    },
}


@pytest.fixture(scope="module", params=sorted(PRESETS))
def model(request):
    torch.manual_seed(0)
    fields = {**PRESETS[request.param], "vocab_size": 261}
    return spread_weights(AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))).eval()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def _preset(tmp_path, name="stackformer"):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(PRESETS[name]))
    return str(path)


def _ids(count, seed=0):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _reference_nll(model, ids, context_start):
    """Sum of -log p(ids[t] | ids[context_start(t):t]) over t >= 1, in a call without a cache for each t."""
    total = 0.0
    for t in range(1, len(ids)):
        logits = model(input_ids=ids[None, context_start(t) : t], use_cache=False).logits[0, -1]
        total -= logits.double().log_softmax(-1)[ids[t]].item()
    return total


# evaluate


@pytest.mark.parametrize("chunk_length", [1, 5, 8, 36, 37, 100])
def test_carried_equals_full_context(model, chunk_length):
    ids = _ids(38)
    expected = _reference_nll(model, ids, lambda t: 0)
    assert evaluate.carried_nll(model, ids, chunk_length) == pytest.approx(expected, rel=1e-5)
    # The measure can tell: without the carried state the sum is another one.
    assert abs(_reference_nll(model, ids, lambda t: max(0, t - 5)) - expected) > 1e-2


@pytest.mark.parametrize("window, stride", [(8, 8), (8, 3), (8, 1), (1, 1), (37, 5), (64, 32)])
def test_windowed_equals_reference(model, window, stride):
    ids = _ids(38)

    def context_start(t):
        # The window of a token is the first to reach it: windows end at window, window + stride, ..., 37.
        end = min(window, 37)
        while end < t:
            end = min(end + stride, 37)
        return max(0, end - window)

    expected = _reference_nll(model, ids, context_start)
    for batch_size in (1, 3):
        nll = evaluate.windowed_nll(model, ids, window, stride, batch_size)
        assert nll == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("window, stride, count", [(8, 3, 1), (8, 3, 8), (8, 3, 9), (8, 8, 64), (4, 1, 30)])
def test_window_spans_cover_everything_once(window, stride, count):
    spans = evaluate.window_spans(count, window, stride)
    assert [t for _, first, stop in spans for t in range(first, stop)] == list(range(count))
    assert {stop - start for start, _, stop in spans} == {min(window, count)}
    assert all(0 <= start <= first for start, first, _ in spans)


@pytest.mark.parametrize("window, stride", [(8, 0), (8, 9), (8, -1)])
def test_bad_stride(window, stride):
    with pytest.raises(ValueError, match=f"stride={stride}.*window={window}"):
        evaluate.window_spans(10, window, stride)


def test_bad_chunk_length(model):
    with pytest.raises(ValueError, match="chunk_length=0"):
        evaluate.carried_nll(model, _ids(4), 0)


@pytest.mark.parametrize("stride, batch_size", [(12, 1), (12, 4), (4, 1), (6, 2)])
@torch.no_grad()
def test_bits_by_position_are_of_the_same_tokens_at_every_position(model, stride, batch_size):
    """Every token that counts is once in each stride of positions; only the first position has no loss."""
    ids, length = _ids(41), 12
    found = {}
    for start in range(0, 41 - length + 1, stride):
        context = ids[None, start : start + length]
        logits = model(input_ids=context[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits[0], context[0, 1:], reduction="none")
        found |= {(start + p, p): losses[p - 1].item() for p in range(1, length)}
    starts = range(0, 41 - length + 1, stride)
    tokens = {t for t, _ in found if t >= length - stride and t - t % stride in starts}
    assert all((t, p) in found for t in tokens for p in range(t % stride, length, stride) if p > 0)
    expected = [
        statistics.fmean(loss for (t, p), loss in found.items() if p == place and t in tokens)
        for place in range(1, length)
    ]
    actual = evaluate.nll_by_position(model, ids, length, stride, batch_size)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_position_bins_cover_all_positions_once():
    assert evaluate.position_bins(300, 64) == [(1, 64), (64, 128), (128, 256), (256, 300)]
    assert evaluate.position_bins(64, 64) == [(1, 64)] and evaluate.position_bins(2, 2) == [(1, 2)]
    bits = evaluate.mean_bits(torch.arange(1.0, 200.0) * math.log(2), 64)
    assert bits == pytest.approx({"1-63": 32, "64-127": 95.5, "128-199": 163.5})


@pytest.mark.parametrize(
    "length, stride, error",
    [
        (1, 1, "context_stride=1: expected a divisor of context_length=1, which"),
        (12, 5, "context_stride=5: expected a divisor of context_length=12"),
        (21, 21, None),
        (21, 1, "context_length=21: expected a text of at least 41 tokens, got 40"),
        (41, 41, "context_length=41: expected a text of at least 41 tokens, got 40"),
    ],
)
def test_contexts_that_do_not_fit(model, length, stride, error):
    expected = contextlib.nullcontext() if error is None else pytest.raises(ValueError, match=error)
    with expected:
        evaluate.nll_by_position(model, _ids(40), length, stride)


def test_evaluate_script(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    raw = bytes(range(256))  # no UTF-8: bytes are evaluated as they are
    (tmp_path / "raw").write_bytes(raw)
    argv = ["--model_name_or_path", str(tmp_path), "--text", str(tmp_path / "raw"), "--range", "100:140"]
    output = tmp_path / "results" / "out.json"
    report = evaluate.main([*argv, "--window", "16", "--chunk_length", "7", "--json", str(output)])

    ids = torch.tensor(list(raw[100:140]))
    carried = _reference_nll(model, ids, lambda t: 0) / 39
    row = report["results"]["carried"]
    assert row["bits_per_byte"] == pytest.approx(carried / math.log(2), rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(carried), rel=1e-4)
    windowed = evaluate.windowed_nll(model, ids, 16, 8) / 39
    assert report["results"]["windowed"]["bits_per_byte"] == pytest.approx(windowed / math.log(2), rel=1e-6)
    assert json.loads(output.read_text()) == report
    printed = capsys.readouterr().out
    assert all(f"{row['bits_per_byte']:.4f}" in printed for row in report["results"].values())
    assert sorted(evaluate.main([*argv, "--no_windowed"])["results"]) == ["carried"]
    assert sorted(evaluate.main([*argv, "--no_carry_state"])["results"]) == ["windowed"]
    neither = [*argv, "--no_windowed", "--no_carry_state"]
    report = evaluate.main([*neither, "--context_length", "16", "--context_stride", "8"])
    bits = evaluate.mean_bits(evaluate.nll_by_position(model, ids, 16, 8), 8)
    assert report["results"] == {} and report["by_position"] == pytest.approx(bits)
    assert "8-15" in capsys.readouterr().out
    with pytest.raises(ValueError, match="context_length=None: expected one"):
        evaluate.main(neither)


def test_bits_per_byte_of_a_bpe(tmp_path):
    """A model that gives every token the same probability takes log2(vocabulary) bits for each token."""
    tokenizer = train_bpe_tokenizer([TEXT.decode()], 400, show_progress=False)
    model = LlamaForCausalLM(LlamaConfig(**PRESETS["llama"] | {"vocab_size": 400}))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text").write_bytes(TEXT[:2000])
    report = evaluate.main(["--model_name_or_path", str(tmp_path), "--text", str(tmp_path / "text")])
    num_tokens = len(tokenizer.encode(TEXT[:2000].decode()))
    assert num_tokens < 1500
    for row in report["results"].values():
        assert row["perplexity"] == pytest.approx(400, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(math.log2(400) * num_tokens / 2000, rel=1e-5)


# data


def test_read_bytes_and_ranges(text_file):
    assert read_bytes(text_file) == TEXT
    assert read_bytes(text_file, "10:20") == TEXT[10:20]
    assert read_bytes(text_file, "29990:") == TEXT[29990:]
    assert read_bytes(text_file, ":5") == TEXT[:5]
    with pytest.raises(ValueError, match="found none"):
        read_bytes(text_file.with_name("missing"))


@pytest.mark.parametrize("text", ["5:5", "7:3", "0:101", "-3:5", "a:b", "5", "1:2:3", "1.5:3"])
def test_bad_range(text):
    with pytest.raises(ValueError, match=r"eval_range='.*START:STOP.*100 bytes"):
        parse_range(text, 100, "eval_range")


def test_splits_of_a_file(text_file):
    train_text, eval_text = load_splits(DataArguments(dataset=str(text_file)))
    assert train_text == TEXT[:27000]
    assert eval_text == TEXT[27000:28500]
    named = DataArguments(
        dataset="enwik8", data_path=str(text_file), train_range="100:200", eval_range="200:250"
    )
    assert load_splits(named) == (TEXT[100:200], TEXT[200:250])


def test_bad_splits(text_file):
    with pytest.raises(ValueError, match="eval_range='50:150'.*overlap.*train_range='0:100'"):
        load_splits(DataArguments(dataset=str(text_file), train_range="0:100", eval_range="50:150"))
    with pytest.raises(ValueError, match="data_path=None.*enwik8"):
        load_splits(DataArguments(dataset="enwik8"))


def test_splits_of_a_dataset(tmp_path):
    pytest.importorskip("datasets")
    for name, text in {"train": "one\ntwo\nthree", "validation": "four\nfive"}.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.txt").write_text(text)
    folder = str(tmp_path / "data")
    assert load_splits(DataArguments(dataset=folder)) == (b"one\ntwo\nthree", b"four\nfive")
    ranges = DataArguments(dataset=folder, train_range="4:7", eval_range="0:4", row_separator=" ")
    assert load_splits(ranges) == (b"two", b"four")
    with pytest.raises(ValueError, match="text_column='body'.*text"):
        load_splits(DataArguments(dataset=folder, text_column="body"))


def test_encode_keeps_bytes_and_loses_no_text():
    raw = bytes(range(256)) + b"<|eos|>"
    assert encode(raw, build_byte_tokenizer()).tolist() == list(raw)
    tokenizer = load_tokenizer("bpe:300", TEXT)
    assert len(tokenizer) == 300
    long_text = TEXT * 5 + "<|eos|> \u20ac".encode()  # several pieces
    ids = encode(long_text, tokenizer)
    assert not np.isin(ids, tokenizer.all_special_ids).any()
    assert tokenizer.decode(ids) == long_text.decode()
    assert tokenizer.decode(encode(b"a\xffb", tokenizer)) == "a\ufffdb"
    with pytest.raises(ValueError, match="tokenizer='bpe:many'"):
        load_tokenizer("bpe:many", TEXT)


def test_blocks():
    blocks = Blocks(np.arange(11, dtype=np.uint8), 4, "training")
    assert [blocks[index]["input_ids"].tolist() for index in range(len(blocks))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert torch.equal(blocks[1]["input_ids"], blocks[1]["labels"])
    assert blocks[0]["labels"].dtype == torch.long
    with pytest.raises(ValueError, match="block_size=12.*11 tokens.*training"):
        Blocks(np.arange(11), 12, "training")
    with pytest.raises(ValueError, match="block_size=1:"):
        Blocks(np.arange(11), 1, "training")


def test_write_json_leaves_nothing_behind(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a" / "b.json", {"x": object()})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 1}


# train


DEFAULTS = {"banks": 4, "rate": 1.0, "feedback": False, "kind": "elu", "types": None}


def test_overrides():
    text = 'banks=8, rate=2,feedback=TRUE,kind=relu,types=["a", "b"]'
    expected = {"banks": 8, "rate": 2.0, "feedback": True, "kind": "relu", "types": ["a", "b"]}
    assert presets.parse_overrides(text, DEFAULTS) == expected
    assert presets.parse_overrides("banks=none", DEFAULTS) == {"banks": None}
    assert presets.parse_overrides(json.dumps(expected), DEFAULTS) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("bonks=8", "unknown field 'bonks'.*banks"),
        ("banks", "expected name=value, got 'banks'"),
        ("banks=8,", "expected name=value, got ''"),
        ("banks=many", "banks='many', expected int"),
        ("banks=4.5", "banks='4.5', expected int"),
        ("rate=x", "rate='x', expected float"),
        ("feedback=maybe", "feedback='maybe', expected true or false"),
        ('{"banks": 1, "bonks": 8}', r"unknown fields \['bonks'\].*banks"),
        ('{"banks": 1', "config_overrides=.*expected JSON"),
    ],
)
def test_bad_overrides(text, message):
    with pytest.raises(ValueError, match=message):
        presets.parse_overrides(text, DEFAULTS)


def test_build_config(tmp_path):
    tokenizer = train_bpe_tokenizer([TEXT.decode()], 300, show_progress=False)
    preset = _preset(tmp_path)
    config = presets.build_config(preset, "num_memory_banks=5,halting_threshold=0", tokenizer)
    assert (config.num_memory_banks, config.halting_threshold) == (5, 0.0)
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (300, 256, 258)
    assert config.hidden_size == PRESETS["stackformer"]["hidden_size"]
    assert presets.build_config(preset, "vocab_size=512", tokenizer).vocab_size == 512

    (tmp_path / "typo.json").write_text('{"hidden_sise": 8}')
    with pytest.raises(ValueError, match="unknown fields.*hidden_sise"):
        presets.build_config(str(tmp_path / "typo.json"), None, tokenizer)
    with pytest.raises(ValueError, match="config='missing.json'"):
        presets.build_config("missing.json", None, tokenizer)


def test_build_model_checks_its_arguments(tmp_path):
    tokenizer = build_byte_tokenizer()
    with pytest.raises(ValueError, match="exactly one"):
        training.build_model(training.ModelArguments(), tokenizer)
    with pytest.raises(ValueError, match="exactly one"):
        training.build_model(training.ModelArguments(config="a", model_name_or_path="b"), tokenizer)
    with pytest.raises(ValueError, match="config_overrides='a=1'"):
        training.build_model(
            training.ModelArguments(model_name_or_path="b", config_overrides="a=1"), tokenizer
        )
    small = training.ModelArguments(
        config=_preset(tmp_path), config_overrides="vocab_size=259,eos_token_id=none"
    )
    with pytest.raises(ValueError, match="vocab_size=259.*261"):
        training.build_model(small, train_bpe_tokenizer(["a"], 261, show_progress=False))


def test_block_nll_is_of_the_next_token():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10).view(2, 5) % 7
    expected = [
        -sum(logits[b, t].log_softmax(-1)[labels[b, t + 1]] for t in range(4)).item() / 4 for b in range(2)
    ]
    assert training.block_nll(logits, labels).tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(training.block_nll((logits, None), labels), training.block_nll(logits, labels))


def _train_argv(tmp_path, text_file, output, *more):
    return [
        *("--dataset", str(text_file), "--train_range", "0:6000", "--eval_range", "6000:7000"),
        *("--block_size", "32", "--per_device_train_batch_size", "8", "--learning_rate", "3e-3"),
        *("--save_steps", "2", "--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1"),
        *("--output_dir", str(tmp_path / output)),
        *more,
    ]


def _other_weights(build_model):
    def build(*args):
        model = build_model(*args)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        return model

    return build


def test_train_resume_and_continue(tmp_path, text_file, capsys, monkeypatch):
    new = ["--config", _preset(tmp_path), "--config_overrides", "initializer_range=0.02"]
    argv = _train_argv(tmp_path, text_file, "run", *new, "--max_steps", "4")
    metrics = train.main(argv)
    run = tmp_path / "run"
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert (run / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert (metrics["steps"], metrics["tokens"], metrics["seed"]) == (4, 4 * 8 * 32, 42)
    assert (metrics["train_bytes"], metrics["eval_bytes"]) == (6000, 1000)
    assert metrics["parameters"] > 0 and "torch" in metrics["machine"] and metrics["wall_time_seconds"] > 0
    assert metrics["bits_per_byte"] < metrics["bits_per_byte_before"] - 0.05
    assert not (run / "partial").exists()
    assert f"{metrics['bits_per_byte']:.4f}" in capsys.readouterr().out

    # The saved model is what was measured: the same blocks, one by one, by hand.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert model.config.use_cache
    assert tokenizer.encode("ab") == [97, 98]
    blocks = torch.tensor(list(TEXT[6000:7000]))[: 31 * 32].view(31, 1, 32)
    nll = sum(_reference_nll(model.eval(), block[0], lambda t: 0) for block in blocks) / (31 * 31)
    assert metrics["bits_per_byte"] == pytest.approx(bits_per_byte(nll, 1000, 1000), rel=1e-4)

    # Stopped after two steps and resumed, from whatever new weights, the run ends where it ended.
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_model", _other_weights(training.build_model))
        again = train.main([*argv, "--resume_from_checkpoint", str(run / "checkpoint-2")])
    assert again["bits_per_byte"] == pytest.approx(metrics["bits_per_byte"], rel=1e-6)
    assert again["bits_per_byte_before"] is None and again["tokens"] == metrics["tokens"]
    longer = train.main([*argv[:-1], "6", "--resume_from_checkpoint", "last"])
    assert longer["steps"] == 6

    # A new run from the saved weights starts where that one ended.
    start = ["--model_name_or_path", str(run), "--max_steps", "1"]
    continued = train.main(_train_argv(tmp_path, text_file, "other", *start))
    assert continued["bits_per_byte_before"] == pytest.approx(longer["bits_per_byte"], rel=1e-6)
    assert continued["steps"] == 1


def _logged_steps(folder, name="loss"):
    """The steps at which something was logged, as the last checkpoint has them."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in history if name in entry]


def _short_run(tmp_path, text_file, *more):
    return [
        *("--config", _preset(tmp_path), "--dataset", str(text_file), "--output_dir", str(tmp_path / "run")),
        *("--use_cpu", "--disable_tqdm", "True", "--block_size", "32", "--per_device_train_batch_size", "4"),
        *more,
    ]


def test_a_short_run_logs_draws_and_saves(tmp_path, text_file):
    """With nothing said about logging, in fewer steps than a long run has between two entries."""
    train.main(_short_run(tmp_path, text_file, "--max_steps", "7", "--save_steps", "7"))
    assert _logged_steps(tmp_path / "run" / "checkpoint-7") == [1, 2, 3, 4, 5, 6, 7]
    assert (tmp_path / "run" / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 261


def test_how_often_is_logged(tmp_path, text_file):
    run = tmp_path / "run" / "checkpoint-30"
    command = ["--max_steps", "30", "--save_steps", "30", "--per_device_eval_batch_size", "64"]
    train.main(_short_run(tmp_path, text_file, *command))
    assert _logged_steps(run) == list(range(2, 31, 2))
    train.main(_short_run(tmp_path, text_file, *command, "--logging_steps", "13", "--eval_strategy", "steps"))
    assert _logged_steps(run) == [13, 26]
    assert _logged_steps(run, "eval_loss")[:2] == [13, 26]


@pytest.mark.parametrize(
    "steps, every", [(1, 1), (20, 1), (21, 2), (600, 30), (1000, 50), (1001, 50), (100_000, 50)]
)
def test_steps_between_log_entries(tmp_path, steps, every):
    args = TrainingArguments(str(tmp_path), logging_steps=training.LOGGED_SHARE)
    state = TrainerState(max_steps=steps)
    state.compute_steps(args, steps)
    training.LogEvenly().on_train_begin(args, state, TrainerControl())
    assert state.logging_steps == every
    args.logging_steps = 0.5
    state.compute_steps(args, steps)
    training.LogEvenly().on_train_begin(args, state, TrainerControl())
    assert state.logging_steps == math.ceil(steps / 2)


@pytest.mark.parametrize("fault", ["draw", "import"])
def test_a_picture_never_ends_a_run(tmp_path, text_file, monkeypatch, fault):
    """Nor keeps it from saving: the model is saved by the time that the picture fails."""
    warnings, found = [], []

    def draw(*unused):
        found.append((tmp_path / "run" / "model.safetensors").is_file())
        raise RuntimeError("no fonts")

    if fault == "draw":
        monkeypatch.setattr("experiments.plot.draw_training", draw)
        monkeypatch.setattr(logging.get_logger("experiments.report"), "warning", warnings.append)
    else:
        monkeypatch.setitem(sys.modules, "experiments.plot", None)
        monkeypatch.setattr(logging.get_logger("experiments.training"), "warning", warnings.append)
    metrics = train.main(_short_run(tmp_path, text_file, "--max_steps", "2"))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert not (tmp_path / "run" / "training.png").exists()
    message = {"draw": "RuntimeError: no fonts", "import": "matplotlib cannot be imported"}[fault]
    assert any(message in warning for warning in warnings), warnings
    assert found == ([True] if fault == "draw" else [])


def test_the_model_is_saved_before_it_is_measured(tmp_path, text_file, monkeypatch):
    calls = []

    def evaluate_once(trainer):
        calls.append(trainer)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return {"eval_bits_per_byte": 8.0}

    monkeypatch.setattr(training.StackformerTrainer, "evaluate", evaluate_once)
    with pytest.raises(RuntimeError, match="no memory"):
        train.main(_short_run(tmp_path, text_file, "--max_steps", "1"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.use_cache


@pytest.mark.parametrize(
    "size, batch, message",
    [
        (30000, 1000, "has 843 blocks, less than a batch of 1000: give a longer text"),
        (30000, 4, "has 27,000 bytes: less than 100,000 teach a language model little"),
        (120000, 4, None),
    ],
)
def test_a_text_that_is_too_small_to_teach_is_told(tmp_path, monkeypatch, size, batch, message):
    warnings = []
    monkeypatch.setattr(logging.get_logger("experiments.training"), "warning", warnings.append)
    text = tmp_path / "text"
    text.write_bytes((TEXT * 4)[:size])
    argv = ["--max_steps", "1", "--eval_range", "108000:109000" if size > 110000 else "27000:28000"]
    argv += ["--per_device_train_batch_size", str(batch)] if batch == 4 else []
    argv += ["--gradient_accumulation_steps", "250"] if batch == 1000 else []
    train.main(_short_run(tmp_path, text, *argv))
    assert len(warnings) == (message is not None)
    assert message is None or message in warnings[0]


def test_the_default_split_of_a_small_file(tmp_path):
    """35 kB are enough for blocks of 256; 2 kB are not, and what to do is said."""
    preset = _preset(tmp_path)
    for size, fits in ((35000, True), (2000, False)):
        text = tmp_path / "text"
        text.write_bytes((TEXT * 2)[:size])
        argv = [
            "--config",
            preset,
            "--dataset",
            str(text),
            "--output_dir",
            str(tmp_path / "run"),
            "--use_cpu",
        ]
        argv += ["--max_steps", "1", "--per_device_train_batch_size", "2", "--disable_tqdm", "True"]
        if fits:
            assert train.main(argv)["eval_bytes"] == 1750
        else:
            with pytest.raises(ValueError, match="at most the 100 tokens of the evaluation .*--block_size"):
                train.main(argv)
            assert train.main([*argv, "--block_size", "50"])["eval_bytes"] == 100


def test_train_with_a_bpe(tmp_path, text_file):
    new = ["--config", _preset(tmp_path, "llama"), "--tokenizer", "bpe:300", "--max_steps", "3"]
    metrics = train.main(_train_argv(tmp_path, text_file, "bpe", *new))
    assert metrics["config"]["vocab_size"] == 300
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bpe")
    assert len(tokenizer) == 300
    num_tokens = len(tokenizer.encode(TEXT[6000:7000].decode()))
    # Bits are per byte and not per token: a hardly trained model takes about log2(300) for a token.
    assert num_tokens < 900
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(300) * num_tokens / 1000, rel=0.3)


def test_train_long(tmp_path, text_file):
    """The bits per byte are those of the evaluation text read in one go."""
    config = ["--config", _preset(tmp_path), "--config_overrides", "initializer_range=0.02"]
    argv = _train_argv(tmp_path, text_file, "long", *config, "--max_steps", "3")
    options = ["--context_length", "50", "--chunk_size", "20", "--num_documents", "9"]
    metrics = train_long.main([*argv, *options])
    assert (metrics["steps"], metrics["tokens"]) == (3, 3 * 8 * 50)
    assert metrics["bits_per_byte"] < metrics["bits_per_byte_before"] - 0.05
    ids = torch.tensor([list(TEXT[6000:7000])])
    with torch.no_grad():
        nll = AutoModelForCausalLM.from_pretrained(tmp_path / "long").eval()(ids, labels=ids).loss.item()
    assert metrics["bits_per_byte"] == pytest.approx(bits_per_byte(nll, 1000, 1000), rel=1e-3)


def test_nothing_to_resume(tmp_path, text_file):
    new = ["--config", _preset(tmp_path), "--max_steps", "1"]
    with pytest.raises(ValueError, match="resume_from_checkpoint='last'.*checkpoint"):
        train.main(_train_argv(tmp_path, text_file, "none", *new, "--resume_from_checkpoint", "last"))
    with pytest.raises(ValueError, match="resume_from_checkpoint='nowhere'"):
        train.main(_train_argv(tmp_path, text_file, "none", *new, "--resume_from_checkpoint", "nowhere"))


# generate


@pytest.fixture
def saved_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    build_byte_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_generate_greedy(model, saved_model, capsys):
    argv = [
        "--model_name_or_path",
        saved_model,
        "--prompt",
        "ab c",
        "--max_new_tokens",
        "6",
        "--temperature",
        "0",
    ]
    text = generate.main(argv)
    ids = [97, 98, 32, 99]
    for _ in range(6):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    assert 258 not in ids  # nothing ended the generation early
    tokenizer = build_byte_tokenizer()
    assert text == tokenizer.decode(ids[4:], skip_special_tokens=True)
    assert capsys.readouterr().out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_generate_samples_by_seed(saved_model, monkeypatch):
    argv = [
        "--model_name_or_path",
        saved_model,
        "--max_new_tokens",
        "12",
        "--temperature",
        "2",
        "--top_p",
        "1",
    ]

    def run(seed):
        monkeypatch.setattr("sys.stdin", io.StringIO("from standard input"))
        return generate.main([*argv, "--seed", str(seed)])

    assert run(1) == run(1)
    assert len({run(seed) for seed in range(3)}) == 3


def test_generate_chat_prints_the_answer_only(saved_model, capsys):
    argv = ["--model_name_or_path", saved_model, "--prompt", "question", "--max_new_tokens", "5", "--chat"]
    text = generate.main(argv)
    assert capsys.readouterr().out == text + "\n"


def test_prompts_and_stops():
    tokenizer = build_byte_tokenizer()
    assert generate.encode_prompt(tokenizer, "", chat=False)["input_ids"].tolist() == [[257]]
    chat = generate.encode_prompt(tokenizer, "hi", chat=True)["input_ids"][0]
    assert tokenizer.decode(chat) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert generate.stop_ids(tokenizer, chat=False) == [258]
    assert generate.stop_ids(tokenizer, chat=True) == [258, 260]


@pytest.mark.parametrize(
    "name, value", [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("max_new_tokens", 0)]
)
def test_bad_generation_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        generate.GenerationArguments(model_name_or_path="x", **{name: value})
