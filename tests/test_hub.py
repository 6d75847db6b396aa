# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Models and memories survive the way over the Hub, with and without the package on the other side.

The client is the real one. It reads its endpoint when it is imported, so what a test does with it runs in
other processes: `author` has the package, `stranger` has not. The functions up to the fixtures run there,
and import what they need there.
"""

import contextlib
import hashlib
import multiprocessing
import os
import re
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.hub_server import TOKEN, HubServer

GUIDE = (Path(__file__).parent.parent / "docs" / "sharing.md").read_text(encoding="utf-8")


def start_client(url: str, folder: str, has_package: bool) -> None:
    """Make this new process a client of the server, with caches of its own."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_")):
            del os.environ[name]
    os.environ |= {
        "HF_ENDPOINT": url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": f"{folder}/hf_home",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ETAG_TIMEOUT": "60",
        "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
    }
    os.chdir(folder)
    if not has_package:
        sys.modules["stackformer"] = None


def _call(function, *args, **kwargs):
    """Call, and let errors pass between processes: those of the client cannot be pickled."""
    try:
        return function(*args, **kwargs)
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None


@contextlib.contextmanager
def client(server: HubServer, folder: Path, has_package: bool):
    """A process in `folder`; yields a function that calls another one there."""
    with ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_client,
        initargs=(server.url, str(folder), has_package),
    ) as process:
        yield lambda *args, **kwargs: process.submit(_call, *args, **kwargs).result()


def new_model(seed=0):
    import torch

    from tests.models import spread_weights, tiny_model

    return spread_weights(tiny_model(torch.float32), seed=seed)


def logits_of(model):
    """A digest of the logits after every token of the vocabulary, in float64 to 6 digits: code that was saved
    computes the memory bank in torch, where the package has C++."""
    import copy

    import torch

    with torch.no_grad():
        ids = torch.arange(model.config.vocab_size)[None]
        logits = copy.deepcopy(model).double()(ids, use_cache=False).logits
    return hashlib.sha256(logits.round(decimals=6).numpy().tobytes()).hexdigest()


def read(model, ids=tuple(range(70, 95))):
    """A memory of some text."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=True).past_key_values


def state_of(memory):
    """What a memory holds, in plain numbers."""
    slices = [
        {index: [part.tolist() for part in state] for index, state in layer.slices.items()}
        for layer in memory.layers
    ]
    return memory.get_seq_length(), slices


def load_model(repo_id, trust_remote_code=False, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=trust_remote_code, **kwargs)


def load_logits(repo_id, trust_remote_code=False, **kwargs):
    """Of a model from the server; and where its class is from."""
    model = load_model(repo_id, trust_remote_code, **kwargs)
    return logits_of(model), type(model).__module__.split(".")[0]


def push_model(repo_id, seed=0, **kwargs):
    """Push a model and a tokenizer; returns the model's logits and the commits."""
    from stackformer import build_byte_tokenizer

    model = new_model(seed)
    commits = [pushed.push_to_hub(repo_id, **kwargs).oid for pushed in (model, build_byte_tokenizer())]
    return logits_of(model), commits


def push_without_a_token(repo_id):
    from huggingface_hub.errors import HfHubHTTPError

    model = new_model()
    for pushed in (model, read(model)):
        try:
            pushed.push_to_hub(repo_id, token=False)
        except HfHubHTTPError as error:
            assert error.response.status_code == 401
        else:
            raise AssertionError("pushed without a token")


def push_with_tags(repo_id, other_repo_id):
    new_model().push_to_hub(repo_id, tags=["poetry"])
    model = new_model()
    model.add_model_tags("prose")
    model.push_to_hub(repo_id + "-2")
    new_model().push_to_hub(other_repo_id)


def generate_as_a_stranger(repo_id):
    from transformers import pipeline

    generator = pipeline("text-generation", model=repo_id, trust_remote_code=True)
    return generator("Hello", max_new_tokens=5, do_sample=False)[0]["generated_text"]


def hand_on(repo_id, new_repo_id, memory_repo_id):
    """Push a model that came as remote code, and a memory of it."""
    model = load_model(repo_id, trust_remote_code=True)
    model.push_to_hub(new_repo_id)
    memory = read(model)
    memory.push_to_hub(memory_repo_id)
    return logits_of(model), state_of(memory)


def push_memory(model_repo_id, memory_repo_id, **kwargs):
    model = load_model(model_repo_id)
    memory = read(model)
    return state_of(memory), memory.push_to_hub(memory_repo_id, **kwargs)


def push_two_memories(model_repo_id, memory_repo_id):
    """One on the main branch, privately, and another on a branch that is not there yet."""
    model = load_model(model_repo_id)
    first, second = read(model), read(model, range(10))
    first.push_to_hub(memory_repo_id, private=True)
    url = second.push_to_hub(memory_repo_id, revision="second", commit_message="Another book")
    return state_of(first), state_of(second), url


def save_memory_and_push(model_repo_id, memory_repo_id):
    model = load_model(model_repo_id)
    memory = read(model)
    memory.save_pretrained("saved-memory", push_to_hub=True, repo_id=memory_repo_id)
    return state_of(memory)


def load_memory(model_repo_id, memory_repo_id, **kwargs):
    from stackformer import StackformerCache

    return state_of(StackformerCache.from_pretrained(memory_repo_id, load_model(model_repo_id), **kwargs))


def load_memory_as_a_stranger(repo_id, subfolder):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model = load_model(repo_id, trust_remote_code=True)
    cache_class = get_class_from_dynamic_module("cache_stackformer.StackformerCache", repo_id)
    return state_of(cache_class.from_pretrained(repo_id, model, subfolder=subfolder))


def train_and_push(repo_id):
    """One step with `Trainer`, which writes a card of its own."""
    import torch
    from transformers import Trainer, TrainingArguments

    from stackformer import build_byte_tokenizer

    model = new_model()
    trainer = Trainer(
        model,
        TrainingArguments("trained", max_steps=1, report_to="none", use_cpu=True, hub_model_id=repo_id),
        train_dataset=[{"input_ids": torch.arange(16), "labels": torch.arange(16)}],
        processing_class=build_byte_tokenizer(),
    )
    trainer.train()
    trainer.create_model_card(language="en", tasks="text-generation")
    drafted = Path("trained/README.md").read_text(encoding="utf-8")
    trainer.push_to_hub(license="apache-2.0", dataset="counting")
    return logits_of(model.eval()), drafted


def run_code(code):
    exec(compile(code, "docs/sharing.md", "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture(scope="module")
def author(server, tmp_path_factory):
    with client(server, tmp_path_factory.mktemp("author"), has_package=True) as call:
        yield call


@pytest.fixture(scope="module")
def stranger(server, tmp_path_factory):
    with client(server, tmp_path_factory.mktemp("stranger"), has_package=False) as call:
        yield call


@pytest.fixture(scope="module")
def logits(author):
    """Of the model that is on the server as user/model."""
    return author(push_model, "user/model")[0]


def test_a_model_comes_back_with_the_package_and_without(author, stranger, logits):
    assert author(load_logits, "user/model") == (logits, "stackformer")
    assert stranger(load_logits, "user/model", True) == (logits, "transformers_modules")
    assert stranger(generate_as_a_stranger, "user/model").startswith("Hello")


def test_weights_are_large_files_and_code_is_not(server, logits):
    files = server.repos["user/model"].files()
    assert {path for path, blob in files.items() if blob.lfs} == {"model.safetensors"}
    assert {"config.json", "tokenizer.json", "README.md", "modeling_stackformer.py"} <= files.keys()
    assert b"class StackformerForCausalLM" in files["modeling_stackformer.py"].content


def test_shards(server, author, stranger):
    logits, _ = author(push_model, "user/sharded", max_shard_size="20KB")
    shards = [path for path in server.repos["user/sharded"].files() if path.endswith(".safetensors")]
    assert len(shards) > 1
    assert "model.safetensors.index.json" in server.repos["user/sharded"].files()
    assert author(load_logits, "user/sharded")[0] == logits
    assert stranger(load_logits, "user/sharded", True)[0] == logits


def test_a_private_model_is_for_those_with_a_token(server, author):
    logits, _ = author(push_model, "user/private", private=True)
    assert server.repos["user/private"].private
    # In this order: what has been loaded once stays in the client's cache.
    with pytest.raises(RuntimeError, match="OSError: user/private is not a local folder"):
        author(load_logits, "user/private", token=False)
    assert author(load_logits, "user/private")[0] == logits


def test_nothing_is_pushed_without_a_token(server, author):
    author(push_without_a_token, "user/unsigned")
    assert "user/unsigned" not in server.repos


def test_revisions(author, stranger):
    main, (commit, _) = author(push_model, "user/revised")
    half, _ = author(push_model, "user/revised", seed=1, revision="half")
    assert main != half
    assert author(load_logits, "user/revised")[0] == main
    for revision, expected in (("half", half), (commit, main)):
        assert author(load_logits, "user/revised", revision=revision)[0] == expected
        assert stranger(load_logits, "user/revised", True, revision=revision)[0] == expected
    with pytest.raises(RuntimeError, match="OSError: quarter is not a valid git identifier"):
        author(load_logits, "user/revised", revision="quarter")


def test_who_got_a_model_as_code_can_hand_it_on(server, author, stranger, logits):
    again, state = stranger(hand_on, "user/model", "user/again", "user/strangers-memory")
    assert again == logits
    assert author(load_logits, "user/again") == (logits, "stackformer")
    assert stranger(load_logits, "user/again", True) == (logits, "transformers_modules")
    assert author(load_memory, "user/model", "user/strangers-memory") == state
    # The code is to be taken from the new repository: the old one may vanish.
    assert b"user/model" not in server.repos["user/again"].files()["config.json"].content


def test_a_memory_comes_back(server, author, logits):
    state, url = author(push_memory, "user/model", "user/memory")
    files = server.repos["user/memory"].files()
    assert {path: blob.lfs for path, blob in files.items() if path.startswith("memory.")} == {
        "memory.safetensors": True,
    }
    assert url == f"{server.url}/user/memory/commit/{server.repos['user/memory'].branches['main']}"
    assert author(load_memory, "user/model", "user/memory") == state
    assert author(save_memory_and_push, "user/model", "user/saved-memory") == state
    assert author(load_memory, "user/model", "user/saved-memory") == state


def test_a_memory_beside_its_model(server, author, stranger):
    logits, _ = author(push_model, "user/reader")
    before = set(server.repos["user/reader"].files())
    state = author(push_memory, "user/reader", "user/reader", path_in_repo="memories/book")[0]
    added = set(server.repos["user/reader"].files()) - before
    assert added == {"memories/book/memory.safetensors"}
    assert author(load_memory, "user/reader", "user/reader", subfolder="memories/book") == state
    assert stranger(load_memory_as_a_stranger, "user/reader", "memories/book") == state
    assert author(load_logits, "user/reader")[0] == logits


def test_a_private_memory_and_its_branches(server, author, logits):
    first, second, url = author(push_two_memories, "user/model", "user/diary")
    repo = server.repos["user/diary"]
    assert repo.private
    assert repo.commits[repo.branches["second"]].message == "Another book"
    assert url.endswith(repo.branches["second"])
    assert author(load_memory, "user/model", "user/diary") == first
    assert author(load_memory, "user/model", "user/diary", revision="second") == second


def test_the_card_says_what_it_is(server, author):
    author(push_with_tags, "user/tagged", "user/plain")
    assert server.repos["user/tagged"].card() == {
        "library_name": "transformers",
        "tags": ["stackformer", "poetry"],
    }
    assert server.repos["user/tagged-2"].card()["tags"] == ["stackformer", "prose"]
    # Tags belong to a model, not to all models of the process.
    assert server.repos["user/plain"].card()["tags"] == ["stackformer"]


def test_trainer_pushes_a_model_with_its_card(server, author, stranger):
    logits, drafted = author(train_and_push, "user/trained")
    assert "language:\n- en" in drafted and "This model" in drafted
    card = server.repos["user/trained"].card()
    assert card["library_name"] == "transformers"
    assert card["license"] == "apache-2.0"
    assert {"stackformer", "generated_from_trainer"} <= set(card["tags"])
    assert b"counting" in server.repos["user/trained"].files()["README.md"].content
    assert author(load_logits, "user/trained")[0] == logits
    assert stranger(load_logits, "user/trained", True)[0] == logits
    assert stranger(generate_as_a_stranger, "user/trained").startswith("Hello")


def test_what_is_not_there_is_an_error_that_says_so(author, logits):
    with pytest.raises(RuntimeError, match="OSError: user/nothing is not a local folder"):
        author(load_logits, "user/nothing")
    with pytest.raises(RuntimeError, match="OSError: user/nothing is not a local folder"):
        author(load_memory, "user/model", "user/nothing")
    with pytest.raises(
        RuntimeError, match=r"OSError: user/model does not appear to have .*memory\.safetensors"
    ):
        author(load_memory, "user/model", "user/model", subfolder="memories/nothing")


def test_a_memory_of_another_model_is_refused(author, logits):
    author(push_model, "user/other", seed=1)
    author(push_memory, "user/other", "user/memory-of-another")
    with pytest.raises(RuntimeError, match=r"ValueError: .*memory\.safetensors is .* with other weights"):
        author(load_memory, "user/model", "user/memory-of-another")


def test_the_guide_is_true(server, author, stranger):
    """Blocks that say `trust_remote_code` run where the package is not installed."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        (stranger if "trust_remote_code" in block else author)(run_code, block)
    assert "memories/book/memory.safetensors" in server.repos["user/my-model"].files()
    assert server.repos["user/my-memory"].private
