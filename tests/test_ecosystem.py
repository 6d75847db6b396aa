"""Tools around transformers that take any model: pipelines, an evaluation harness, a server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import pipeline

import stackformer
from stackformer import (
    StackformerForSequenceClassification,
    StackformerForTokenClassification,
    build_byte_tokenizer,
)
from tests.models import spread_weights, tiny_config, tiny_model
from tests.test_modeling import CLOSE

# Of several lengths, the shortest first: batches are padded.
TEXTS = ["Hi", "A longer text, with 28 bytes", "Nine bytes"]
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def tokenizer():
    return build_byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def classifier(model_class, **fields):
    torch.manual_seed(0)
    return spread_weights(model_class(tiny_config(num_labels=3, **fields))).double().eval()


def test_feature_extraction_pipeline(model, tokenizer):
    extract = pipeline("feature-extraction", model=model.model, tokenizer=tokenizer)
    batch = extract(TEXTS, batch_size=3, return_tensors=True)
    for text, padded in zip(TEXTS, batch, strict=True):
        with torch.no_grad():
            expected = model.model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]
        torch.testing.assert_close(extract(text, return_tensors=True)[0], expected, **CLOSE)
        torch.testing.assert_close(padded[0, -len(expected) :], expected, **CLOSE)


def test_text_classification_pipeline(tokenizer):
    model = classifier(StackformerForSequenceClassification)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    seen = set()
    for text, scores in zip(TEXTS, classify(TEXTS, batch_size=3), strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        actual = {score["label"]: score["score"] for score in scores}
        for label, probability in enumerate(expected.tolist()):
            assert actual[f"LABEL_{label}"] == pytest.approx(probability, abs=1e-6)
        alone = {score["label"]: score["score"] for score in classify([text])[0]}
        assert alone == pytest.approx(actual, abs=1e-6)
        seen.add(round(expected[0].item(), 4))
    assert len(seen) == 3, "all texts look the same to the model"


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_token_classification_pipeline(padding_side):
    """One entity per byte, with its place in the text."""
    tokenizer = build_byte_tokenizer()
    tokenizer.padding_side = padding_side
    model = classifier(StackformerForTokenClassification)
    tag = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    for text, entities in zip(TEXTS, tag(TEXTS, batch_size=3), strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        best = logits.softmax(-1).max(-1)
        assert [entity["start"] for entity in entities] == list(range(len(text)))
        assert [entity["entity"] for entity in entities] == [f"LABEL_{label}" for label in best.indices]
        scores = torch.tensor([float(entity["score"]) for entity in entities])
        torch.testing.assert_close(scores, best.values.float(), **TOLERANCE)


def test_a_pipeline_finds_the_classifier_by_its_folder(tmp_path, tokenizer):
    model = classifier(StackformerForSequenceClassification, id2label={0: "bad", 1: "good", 2: "neither"})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path))
    assert type(classify.model) is StackformerForSequenceClassification
    expected = pipeline("text-classification", model=model, tokenizer=tokenizer)(TEXTS)
    assert expected[0]["label"] in {"bad", "good", "neither"}
    for actual, reference in zip(classify(TEXTS, batch_size=2), expected, strict=True):
        assert actual["label"] == reference["label"]
        assert actual["score"] == pytest.approx(reference["score"], abs=1e-6)


CHOICES = [
    {"question": "The capital of France is", "choices": [" Paris", " Rome, the eternal city"], "label": 0},
    {"question": "Two and two are", "choices": [" five", " 4", " twenty-two"], "label": 1},
    {"question": "Hi", "choices": [" there", " and goodbye"], "label": 0},
]
TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
    "bits": """
task: bits
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{{metric: bits_per_byte}}]
""",
    "answers": """
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: question
generation_kwargs: {{max_gen_toks: 6, until: ["<|eos|>"], do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


@torch.no_grad()
def test_evaluation_harness(tmp_path, model, tokenizer, monkeypatch):
    """lm-evaluation-harness, in batches of several lengths, finds what the model says of each text alone."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, CHOICES)))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task.format(file=tmp_path / "data.json"))
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=128),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )

    def log_probs(prompt, text):
        ids = torch.tensor([tokenizer.encode(prompt) + tokenizer.encode(text)])
        return (
            model(ids, use_cache=False)
            .logits[0]
            .log_softmax(-1)[-len(text) - 1 : -1]
            .gather(-1, ids[0, -len(text) :, None])
        )

    by_question = {sample["doc"]["question"]: sample for sample in results["samples"]["choices"]}
    right = []
    for row in CHOICES:
        expected = [log_probs(row["question"], choice).sum().item() for choice in row["choices"]]
        actual = [response[0] for response in by_question[row["question"]]["filtered_resps"]]
        assert actual == pytest.approx(expected, rel=1e-5)
        right.append(max(range(len(expected)), key=expected.__getitem__) == row["label"])
    assert results["results"]["choices"]["acc,none"] == pytest.approx(sum(right) / 3)

    nats = sum(log_probs(tokenizer.bos_token, row["question"]).sum().item() for row in CHOICES)
    num_bytes = sum(len(row["question"]) for row in CHOICES)
    bits = -nats / num_bytes / torch.tensor(2.0).log().item()
    assert results["results"]["bits"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)

    for sample in results["samples"]["answers"]:
        prompt = tokenizer(sample["doc"]["question"], return_tensors="pt").input_ids
        expected = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(expected, skip_special_tokens=True)


# `transformers serve` looks for the model's class in its own name space.
SERVER = """
import stackformer
import transformers
transformers.StackformerForCausalLM = stackformer.StackformerForCausalLM
from transformers.cli.transformers import main
main()
"""


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.fixture
def server(tmp_path, tokenizer):
    """The address of `transformers serve` with a small model, and the model's folder."""
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason="transformers[serving] is not installed")
    folder = tmp_path / "model"
    letters = [token for token in range(261) if not 97 <= token <= 122]
    model = tiny_model(torch.float32)
    model.generation_config.update(suppress_tokens=letters, do_sample=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    package = Path(stackformer.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, "serve", str(folder), "--port", str(port), "--device", "cpu"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(package)},
        cwd=tmp_path,
    )
    url = f"http://localhost:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            try:
                ask(f"{url}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield url, folder
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_server(server, tokenizer):
    """Completions and chat, twice, so that nothing of one request is left for the next."""
    url, folder = server
    write = pipeline("text-generation", model=str(folder), tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "return_full_text": False}
    completion = write("Hello", **options)[0]["generated_text"]
    messages = [{"role": "user", "content": "Hi"}]
    answer = write(messages, **options)[0]["generated_text"]
    assert len(completion) == len(answer) == 8 and completion != answer
    common = {"model": str(folder), "max_tokens": 8, "temperature": 0}
    for _ in range(2):
        reply = ask(f"{url}/v1/completions", {"prompt": "Hello", **common})
        assert reply["choices"][0]["text"] == completion
        reply = ask(f"{url}/v1/chat/completions", {"messages": messages, **common})
        assert reply["choices"][0]["message"]["content"] == answer
