# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Commands: what is wrong is one sentence and exit code 2; a mistake in a program keeps its traceback."""

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import loading
from experiments.command_line import COUNT, SHARE, Parser, Range, run_main
from scripts import generate
from stackformer import build_byte_tokenizer
from tests.hub_server import HubServer
from tests.models import tiny_model

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for folder in ("scripts", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """What commands are given, right and wrong, by name."""
    folder = tmp_path_factory.mktemp("files")
    paths = {
        name: folder / name for name in ("text", "empty", "model", "bare", "cut", "mute", "preset", "new")
    }
    paths["text"].write_bytes(b"It was a dark and stormy night. " * 40)
    paths["empty"].write_bytes(b"")
    model = tiny_model(torch.float32)
    model.save_pretrained(paths["mute"])  # without a tokenizer
    model.save_pretrained(paths["model"])
    build_byte_tokenizer().save_pretrained(paths["model"])
    shutil.copytree(paths["model"], paths["cut"])
    weights = paths["cut"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    paths["bare"].mkdir()
    fields = {"model_type": "stackformer", "hidden_size": 24, "bottleneck_size": 16, "num_attention_heads": 2}
    presets = {
        "preset": json.dumps(fields),
        "broken": "{",
        "list": "[1, 2]",
        "unknown": '{"hidden_sise": 8}',
        "bad": '{"hidden_size": "many"}',
        "type": '{"model_type": "no_such_type"}',
        "binary": "\x00\x01",
    }
    for name, content in presets.items():
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(content)
    paths["out"] = folder / "out"
    paths["under"] = paths["text"] / "out"  # a file is no folder
    return {name: str(path) for name, path in paths.items()}


def fail(module: str, argv: list[str], monkeypatch, capfd, stdin: bytes | None = None) -> str:
    """The sentence that a command leaves on stderr when it ends with code 2, called as from a shell."""
    main = importlib.import_module(module).main
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *argv])
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run_main(main)
    errors = capfd.readouterr().err
    assert end.value.code == 2, errors
    assert "Traceback" not in errors
    lines = errors.splitlines()
    assert len(lines) == 1 and errors.endswith("\n"), errors
    assert len(errors) < 1500, errors
    return lines[0]


def test_every_command_starts_the_same():
    assert len(COMMANDS) > 25
    for module in COMMANDS:
        text = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert text.endswith('if __name__ == "__main__":\n    run_main(main)\n'), module
        assert "argparse.ArgumentParser(" not in text.replace("argparse.ArgumentParser(add_help=False)", "")
        assert "HfArgumentParser(" not in text and "AutoModelForCausalLM.from_pretrained" not in text.replace(
            "model = AutoModelForCausalLM.from_pretrained(folder", ""
        ).replace("AutoModelForCausalLM.from_pretrained(run.folder)", ""), module


PRESET = "--config {preset} --dataset {text}"
NEW = PRESET + " --output_dir {out} --use_cpu"
EVALUATE = "--model_name_or_path {model} --text {text}"
GENERATE = "--model_name_or_path {model} --prompt a"
SHOW = "--model {model} --text a"
TRAIN = [
    ("--config {preset} --dataset missing.txt", "dataset='missing.txt': expected a text file, or a folder"),
    ("--config {preset} --dataset no/such/file.txt", "dataset='no/such/file.txt': expected a text file"),
    ("--config {preset} --dataset {empty}", "dataset='{empty}': expected a text, the file is empty"),
    ("--config {preset} --dataset enwik8", "data_path=None: expected the local file of enwik8"),
    ("--config {preset} --dataset enwik8 --data_path no", "data_path='no': expected a file, found none"),
    (
        "--config {preset} --dataset enwik8 --data_path {bare}",
        "data_path='{bare}': expected a file, found a folder",
    ),
    ("--config no.json --dataset {text}", "config='no.json': expected a JSON file"),
    (
        "--config {broken} --dataset {text}",
        "config='{broken}': expected a JSON file, Expecting property name",
    ),
    ("--config {binary} --dataset {text}", "config='{binary}': expected a JSON file"),
    ("--config {list} --dataset {text}", "config='{list}': expected a JSON object with fields, got a list"),
    ("--config {unknown} --dataset {text}", "config='{unknown}': unknown fields ['hidden_sise'], expected"),
    ("--config {bad} --dataset {text}", "config='{bad}': `hidden_size` must be an integer"),
    (
        "--config {type} --dataset {text}",
        "config='{type}': expected a model_type of transformers, got 'no_such_type'",
    ),
    (NEW + " --config_overrides hidden_size=0", "config='{preset}': `hidden_size` must be an integer"),
    (NEW + " --config_overrides hidden_sise=3", "config_overrides: unknown field 'hidden_sise'"),
    (NEW + " --model_name_or_path {model}", "expected exactly one"),
    ("--dataset {text}", "config=None, model_name_or_path=None: expected exactly one"),
    (
        "--model_name_or_path {bare}/no --dataset {text}",
        "model_name_or_path='{bare}/no': expected the folder of",
    ),
    (
        "--model_name_or_path no --dataset {text}",
        "model_name_or_path='no': expected the folder of a saved model",
    ),
    (
        "--model_name_or_path {text} --dataset {text}",
        "model_name_or_path='{text}': expected the folder of a saved",
    ),
    ("--model_name_or_path {bare} --dataset {text}", "expected a saved model, the folder has no config.json"),
    (
        "--model_name_or_path {mute} --dataset {text}",
        "model_name_or_path='{mute}': expected a tokenizer beside",
    ),
    (NEW + " --tokenizer bpe:many", "tokenizer='bpe:many': expected bpe:VOCAB"),
    (NEW + " --tokenizer bpe:10", "vocab_size=10: expected at least 261"),
    (NEW + " --tokenizer no", "tokenizer='no': expected the folder of a saved tokenizer, found none"),
    (NEW + " --block_size 0", "block_size=0: expected at least 2"),
    (NEW + " --train_range 9:3", "train_range='9:3': expected START:STOP with 0 <= START < STOP"),
    (NEW + " --eval_range=-5:3", "eval_range='-5:3': expected START:STOP"),
    (
        NEW + " --train_range 0:99999",
        "train_range='0:99999': expected START:STOP with 0 <= START < STOP <= 1280",
    ),
    (
        NEW + " --per_device_train_batch_size 0",
        "per_device_train_batch_size=0: expected a whole number, at least 1",
    ),
    (NEW + " --gradient_accumulation_steps -1", "gradient_accumulation_steps=-1: expected"),
    (NEW + " --learning_rate nan", "learning_rate=nan: expected a number, at least 0"),
    (NEW + " --learning_rate=-1", "learning_rate=-1.0: expected a number, at least 0"),
    (NEW + " --weight_decay inf", "weight_decay=inf: expected"),
    (NEW + " --max_steps 0", "max_steps=0: expected a whole number, at least 1"),
    (NEW + " --num_train_epochs 0", "num_train_epochs=0.0: expected more than 0"),
    (NEW + " --max_steps many", "argument --max_steps/--max-steps: invalid int value: 'many'"),
    (NEW + " --resume_from_checkpoint last", "resume_from_checkpoint='last': expected a complete checkpoint"),
    (
        NEW + " --resume_from_checkpoint no",
        "resume_from_checkpoint='no': expected a checkpoint folder or 'last'",
    ),
    (NEW + " --no_such_option 3", "['--no_such_option', '3']"),
    (NEW + " --logging_steps 0", "non-zero --logging_steps"),
    (
        "--config {preset} --dataset {text} --output_dir {under}",
        "output_dir='{under}': expected a place to write",
    ),
]
CASES = {
    "scripts.train": [
        *TRAIN,
        (
            NEW + " --block_size 65",
            "block_size=65: expected at most the 64 tokens of the evaluation text; give a",
        ),
    ],
    "scripts.train_long": [
        *TRAIN,
        (NEW + " --num_documents 0", "num_documents=0: expected a whole number, at least 1"),
        (NEW + " --num_documents 9999", "num_documents=9999: expected 1 to 576"),
        (NEW + " --context_length 0", "`context_length` must be at least 1 or None, got 0"),
        (NEW + " --chunk_size 0", "`chunk_size` must be at least 1, got 0"),
        (NEW + " --backpropagation sideways", "`backpropagation` must be one of"),
        (NEW + " --eval_range 1279:1280", "eval_range: expected at least 2 tokens to evaluate, got 1"),
    ],
    "scripts.evaluate": [
        (
            "--model_name_or_path no --text {text}",
            "model_name_or_path='no': expected the folder of a saved model",
        ),
        (
            "--model_name_or_path {text} --text {text}",
            "model_name_or_path='{text}': expected the folder of a",
        ),
        ("--model_name_or_path {mute} --text {text}", "expected a tokenizer beside the model"),
        ("--model_name_or_path {cut} --text {text}", "its weights are cut off or damaged"),
        ("--model_name_or_path {model} --text no.txt", "text='no.txt': expected a file, found none"),
        ("--model_name_or_path {model} --text {empty}", "text='{empty}': expected a text, the file is empty"),
        ("--model_name_or_path {model} --text {bare}", "text='{bare}': expected a file, found a folder"),
        (
            "--model_name_or_path {model} --text {text} --batch_size -1",
            "batch_size=-1: expected a whole number",
        ),
        (
            "--model_name_or_path {model} --text {text} --window 0",
            "window=0: expected a whole number, at least 1",
        ),
        (EVALUATE + " --stride 0", "stride=0: expected a whole number"),
        (
            "--model_name_or_path {model} --text {text} --stride 999",
            "stride=999: expected 1 <= stride <= window=256",
        ),
        (EVALUATE + " --chunk_length 0", "chunk_length=0: expected"),
        (EVALUATE + " --range 9:1", "range='9:1': expected START:STOP"),
        (EVALUATE + " --range 0:1", "expected at least two tokens, got 1"),
        (
            "--model_name_or_path {model} --text {text} --device nothing",
            "device='nothing': expected a device",
        ),
        (
            "--model_name_or_path {model} --text {text} --json {bare}",
            "json='{bare}': expected a file to write",
        ),
        (
            "--model_name_or_path {model} --text {text} --json {under}",
            "json='{under}': expected a place to write",
        ),
        (EVALUATE + " --no_windowed --no_carry_state", "expected one of them"),
        ("--text {text}", "the following arguments are required: --model_name_or_path"),
    ],
    "scripts.generate": [
        (
            "--model_name_or_path no --prompt a",
            "model_name_or_path='no': expected the folder of a saved model",
        ),
        ("--model_name_or_path {mute} --prompt a", "expected a tokenizer beside the model"),
        (GENERATE + " --temperature nan", "temperature=nan: expected a number"),
        (
            "--model_name_or_path {model} --prompt a --top_p nan",
            "top_p=nan: expected a number, above 0 and at most 1",
        ),
        (GENERATE + " --max_new_tokens 0", "max_new_tokens=0: expected"),
        (GENERATE + " --max_new_tokens some", "invalid int value: 'some'"),
        (GENERATE + " --seed -1", "seed=-1: expected a whole number, at least 0"),
        ("--model_name_or_path {model} --prompt \udcff", "prompt: expected UTF-8 from an argument"),
        ("--model_name_or_path {model} --chat --prompt=", "prompt='': expected a message for the chat"),
    ],
    "scripts.visualize": [
        ("--model no --text a", "model='no': expected the folder of a saved model, found none"),
        ("--model {mute} --text a", "expected a tokenizer beside the model"),
        (SHOW + " --max_tokens 0", "max_tokens=0: expected a whole number, at least 1"),
        ("--model {model} --text=", "text='': expected a text"),
        (
            "--model {model} --text a --output a.pdf",
            "output='a.pdf': expected a file that ends in .html or .png",
        ),
        (SHOW + " --output {under}.html", "expected a place to write to"),
    ],
    "scripts.convert_rwkv": [
        (
            "--model_name_or_path no --output_dir {out}",
            "model_name_or_path='no': expected the folder of a saved",
        ),
        ("--model_name_or_path {model} --output_dir {out}", "expected an RWKV-4, got stackformer"),
        ("--model_name_or_path {model} --output_dir {under}", "expected a place to write to"),
    ],
    "scripts.text8": [
        ("--data_path no --output {out}.txt", "data_path='no': expected a file, found none"),
        ("--data_path {empty} --output {out}.txt", "data_path='{empty}': expected a text, the file is empty"),
        ("--data_path {text} --output {out}.txt", "data_path='{text}': expected a dump of Wikipedia"),
        ("--data_path {text} --output {bare}", "output='{bare}': expected a file to write, found a folder"),
        ("--data_path {text} --output {out}.txt --size 0", "size=0: expected a whole number, at least 1"),
    ],
    "scripts.demo": [
        ("--max_steps 0", "max_steps=0: expected a whole number, at least 1"),
        ("--output_dir {text}", "output_dir='{text}': expected a place to write to"),
    ],
    "scripts.compare": [
        ("--data_path no", "--data_path must be a file, got 'no'"),
        ("--data_path {empty}", "data_path='{empty}': expected a text"),
        ("--data_path {text} --steps 0", "steps=0: expected a whole number, at least 1"),
        ("--data_path {text} --learning_rate nan", "learning_rate=nan: expected a number"),
        ("--data_path {text} --train_range 0:9999", "train_range='0:9999': expected START:STOP"),
        ("--data_path {text} --rows none", "argument --rows: invalid choice: 'none'"),
        ("--data_path {text} --output_dir {under}", "output_dir='{under}': expected a place to write"),
    ],
    "benchmarks.quality": [
        ("--data_path no", "data_path='no': expected a file, found none"),
        ("--data_path {text}", "train_range='0:3600000': expected START:STOP with 0 <= START < STOP <= 1280"),
        ("--data_path {text} --preset no", "config='no': expected a JSON file"),
        ("--data_path {text} --plot a.gif", "plot='a.gif': expected a file that ends in one of"),
        ("--data_path {text} --seeds -1", "seeds=-1: expected a whole number, at least 0"),
    ],
    "benchmarks.text": [
        ("--data_path no", "data_path='no': expected a file, found none"),
        ("--data_path {text}", "train_range='0:3600000': expected START:STOP with 0 <= START < STOP <= 1280"),
        ("--data_path {text} --learning_rates 1e-3 0", "learning_rates=0.0: expected a number, above 0"),
        (
            "--data_path {text} --train_range 0:600 --eval_range 600:900 --long_range 600:900",
            "context_length=8192: expected a multiple of block_size=1024, and 15360 bytes of long_range",
        ),
        ("--data_path {text} --plot a.gif", "plot='a.gif': expected a file that ends in one of"),
    ],
    "benchmarks.presets": [
        ("--data_path no", "data_path='no': expected a file, found none"),
        ("--data_path {text} --num_test 0", "num_test=0: expected"),
        ("--data_path {text} --output_dir {under}", "output_dir='{under}': expected a place to write"),
    ],
    "benchmarks.tasks.run": [
        ("--config no.json", "config='no.json': expected a JSON file"),
        ("--config {list}", "config='{list}': expected a JSON object"),
        ("--config {preset} --task nothing", "task='nothing': expected one of"),
        ("--config {preset} --task_options [", "task_options='[': expected JSON"),
        ("--config {preset} --task_options [1]", "task_options='[1]': expected a JSON object"),
        ("--config {preset} --seeds -1", "seeds=-1: expected a whole number, at least 0"),
        ("--config {preset} --test_lengths 0", "test_lengths=0: expected a whole number, at least 1"),
        (
            "--config {preset} --test_halting_threshold 1",
            "test_halting_threshold=1.0: expected a number, at least",
        ),
        ("--config {preset} --depths 0", "depths=0: expected a whole number, at least 1"),
        ("--config {preset} --output_dir {under}", "output_dir='{under}': expected a place to write"),
        ("--grid no.json", "grid='no.json': expected a file, found none"),
        ("--grid {list}", "grid='{list}': expected a JSON object with fields, got a list"),
        ("--grid {unknown}", "grid='{unknown}': unknown options ['hidden_sise']"),
        ("--output_dir {out}", "config=[]: expected at least one preset"),
    ],
    "benchmarks.tasks.heat_map": [
        ("--results no", "results='no': expected a folder of benchmarks.tasks.run, found none"),
        ("--results {bare}", "results='{bare}': expected a folder with results"),
        ("--results {bare} --output {bare}", "output='{bare}': expected a file to write"),
    ],
    "benchmarks.tasks.densities": [
        ("--run {bare} --length 8", "run='{bare}': expected the folder of a run"),
        ("--run {bare} --length 0", "length=0: expected a whole number, at least 1"),
    ],
    "benchmarks.tasks.naive_sorting": [("--window 0", "window=0: expected a whole number, at least 1")],
    "benchmarks.frontier": [
        ("--model no --text {text}", "model='no': expected the folder of a saved model"),
        ("--model {model} --text no", "text='no': expected a file, found none"),
        ("--model {model} --text {text} --range 9 3", "range='9:3': expected START:STOP"),
        ("--model {model} --text {text} --range -1 3", "range=-1: expected a whole number, at least 0"),
        (
            "--model {model} --text {text} --thresholds 1",
            "thresholds=1.0: expected a number, at least 0 and below 1",
        ),
        ("--model {model} --text {text} --block_size 9999", "must have at least 9999 tokens"),
    ],
    "benchmarks.prompt_lookup": [
        ("--model no", "model='no': expected the folder of a saved model"),
        ("--model {model} --prompt=", "prompt='': expected a text to go on from"),
        ("--model {model} --new_tokens 0", "new_tokens=0: expected"),
    ],
    "benchmarks.long_context": [
        ("--config no", "config='no': expected a JSON file"),
        ("--storage nowhere", "storage='nowhere': expected device, cpu or a folder"),
        ("--plot a.gif", "plot='a.gif': expected a file that ends in one of"),
        ("--max_gib 0", "max_gib=0.0: expected a number, above 0"),
    ],
    "benchmarks.long_recall": [
        ("--config no", "config='no': expected a JSON file"),
        ("--steps 0", "steps=0: expected a whole number, at least 1"),
    ],
    "benchmarks.memory_bank": [
        ("--time 0", "time=0: expected"),
        ("--device nothing", "device='nothing': expected"),
    ],
    "benchmarks.delta_bank": [
        ("--memories 0", "memories=0: expected"),
        ("--json {bare}", "json='{bare}': expected"),
    ],
    "benchmarks.memory_bank_gpu": [
        ("--time 0", "time=0: expected"),
        ("--json {bare}", "json='{bare}': expected"),
    ],
    "benchmarks.decode": [
        ("--contexts 0", "contexts=0: expected"),
        ("--json {bare}", "json='{bare}': expected"),
    ],
    "benchmarks.training": [
        ("--time 0", "time=0: expected"),
        ("--plot {bare}", "plot='{bare}': expected"),
    ],
    "benchmarks.prefill": [
        ("--batch_size 0", "batch_size=0: expected"),
        ("--plot a", "plot='a': expected"),
    ],
    "benchmarks.halting": [("--shares 2", "shares=2.0: expected a number, at least 0 and at most 1")],
    "benchmarks.profile_model": [
        ("--rows 0", "rows=0: expected"),
        ("--parameters 9", "`parameters` must be"),
    ],
    "benchmarks.walk": [("--json {preset}/walk.json", "json=")],
}


@pytest.mark.parametrize(
    ("module", "argv", "expected"),
    [(module, *case) for module, cases in CASES.items() for case in cases],
    ids=[f"{module}-{number}" for module, cases in CASES.items() for number in range(len(cases))],
)
def test_what_is_wrong_is_one_sentence(files, monkeypatch, capfd, module, argv, expected):
    sentence = fail(module, [part.format(**files) for part in argv.split(" ")], monkeypatch, capfd)
    assert sentence.startswith(f"{module}.py: error: ")
    assert expected.format(**files) in sentence


def test_all_commands_are_tried():
    assert set(COMMANDS) - set(CASES) == {"benchmarks.titans"}, "which needs another package to be imported"


@pytest.mark.parametrize("module", ["scripts.generate", "scripts.visualize"])
def test_standard_input_is_utf8(files, monkeypatch, capfd, module):
    name = {"scripts.generate": "--model_name_or_path", "scripts.visualize": "--model"}[module]
    sentence = fail(module, [name, files["model"]], monkeypatch, capfd, stdin=b"a\xff")
    assert "expected UTF-8 from standard input" in sentence


# Models and the Hub


def test_what_looks_like_a_path_is_no_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert loading.is_hub_name("owner/name-2.5_b")
    for path in (
        "name",
        "runs/tiny",
        "./owner/name",
        "/owner/name",
        "a/b/c",
        "owner/",
        "../a",
        "a\\b/c",
        "~/a",
    ):
        assert not loading.is_hub_name(path), path


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("scripts.evaluate", "--model_name_or_path nobody/nothing --text {text}"),
        ("scripts.generate", "--model_name_or_path nobody/nothing --prompt a"),
        ("scripts.visualize", "--model nobody/nothing --text a"),
        ("scripts.convert_rwkv", "--model_name_or_path nobody/nothing --output_dir {out}"),
        (
            "scripts.train",
            "--model_name_or_path nobody/nothing --dataset {text} --output_dir {out} --use_cpu",
        ),
        ("scripts.train", "--config {preset} --dataset nobody/nothing --output_dir {out}"),
        ("benchmarks.frontier", "--model nobody/nothing --text {text}"),
    ],
)
def test_a_hub_that_does_not_answer(files, monkeypatch, capfd, module, argv):
    """Is asked once, and not again and again."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    started = time.perf_counter()
    sentence = fail(module, [part.format(**files) for part in argv.split(" ")], monkeypatch, capfd)
    assert "'nobody/nothing': expected a" in sentence and "reach" in sentence
    assert time.perf_counter() - started < 10


def test_a_hub_that_does_not_know_the_name(files, tmp_path):
    """In a process that knows no other Hub; nothing about it but the sentence is said."""
    with HubServer() as hub:
        result = subprocess.run(
            [
                sys.executable,
                "-m",
                "scripts.generate",
                "--model_name_or_path",
                "nobody/nothing",
                "--prompt",
                "a",
            ],
            cwd=ROOT,
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 2
    assert "generate.py: error: model_name_or_path='nobody/nothing': expected a saved" in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


# The mechanism


def end_of(main, monkeypatch, capsys) -> tuple[object, str]:
    monkeypatch.setattr(sys, "argv", ["command.py"])
    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


def test_errors_of_the_user(monkeypatch, capsys):
    lines = ValueError("one\n  two\n\nthree")
    assert end_of(raising(lines), monkeypatch, capsys) == (2, "command.py: error: one two three\n")
    missing = FileNotFoundError(2, "No such file or directory", "a.txt")
    assert "No such file or directory: 'a.txt'" in end_of(raising(missing), monkeypatch, capsys)[1]
    assert end_of(raising(ValueError()), monkeypatch, capsys)[1] == "command.py: error: ValueError\n"
    monkeypatch.setenv("STACKFORMER_TRACEBACK", "1")
    with pytest.raises(ValueError, match="one"):
        run_main(raising(lines))


@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, AssertionError, IndexError])
def test_mistakes_in_programs_are_raised(error):
    with pytest.raises(error):
        run_main(raising(error("a mistake")))


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    assert end_of(raising(KeyboardInterrupt()), monkeypatch, capsys) == (130, "command.py: interrupted\n")


def test_called_from_python_it_raises(files):
    with pytest.raises(ValueError, match="temperature=nan: expected"):
        generate.main(["--model_name_or_path", files["model"], "--temperature", "nan"])


def test_ranges():
    for value in (1, 5, None):
        COUNT.check("n", value)
    for value in (0, -1, 1.5, float("nan"), "3"):
        with pytest.raises(ValueError, match="expected a whole number, at least 1"):
            COUNT.check("n", value)
    for value in (0, 1, 0.5):
        SHARE.check("n", value)
    for value in (-0.1, 1.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="n=.*: expected a number, at least 0 and at most 1"):
            SHARE.check("n", value)
    Range(float, above=0, below=1).check("n", 0.5)
    with pytest.raises(ValueError, match="above 0 and below 1"):
        Range(float, above=0, below=1).check("n", 1)


def test_arguments_are_checked_where_they_are_read(capsys):
    parser = Parser(prog="command")
    parser.add_argument("--counts", type=COUNT, nargs="+", default=[1])
    assert parser.parse_args([]).counts == [1]
    assert parser.parse_args(["--counts", "2", "3"]).counts == [2, 3]
    with pytest.raises(ValueError, match="counts=0: expected a whole number, at least 1"):
        parser.parse_args(["--counts", "2", "0"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--counts", "few"])
    error = "command: error: argument --counts: expected a whole number, at least 1, got 'few'\n"
    assert capsys.readouterr().err == error


@pytest.mark.slow
def test_an_interrupted_study_ends_at_once(tmp_path, files):
    """So do the processes that it has started."""
    text = tmp_path / "text"
    text.write_bytes(Path(files["text"]).read_bytes() * 100)
    command = [sys.executable, "-m", "scripts.compare", "--data_path", str(text), "--steps", "100000"]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "out"), "--rows", "RWKV"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    time.sleep(40)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert errors.endswith("compare.py: interrupted\n") and "Traceback" not in errors
