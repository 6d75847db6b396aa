"""The ways in which transformers and accelerate load, place, resize, copy and quantise a model."""

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    TorchAoConfig,
)

from stackformer import (
    StackformerCache,
    StackformerForSequenceClassification,
    StackformerForTokenClassification,
)
from tests.models import random_ids, spread_weights, tiny_config, tiny_model
from tests.test_generation import generate, greedy
from tests.test_modeling import CLOSE, every_shape

either_way = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model in many files."""
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def assert_same_tensors(actual: PreTrainedModel, expected: PreTrainedModel):
    """All parameters and buffers are there, none of them without memory, and equal."""
    expected_tensors = expected.state_dict() | dict(expected.named_buffers())
    actual_tensors = actual.state_dict() | dict(actual.named_buffers())
    assert actual_tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert actual_tensors[name].device.type == "cpu", name
        assert torch.equal(actual_tensors[name], tensor), name


@torch.no_grad()
def assert_same_answers(actual: PreTrainedModel, expected: PreTrainedModel):
    """The same logits, and the same text with drafts that are rolled back."""
    ids = random_ids(1, 6).repeat(1, 3)
    torch.testing.assert_close(actual(ids).logits, expected(ids).logits, **CLOSE)
    text = generate(actual, ids, 20, prompt_lookup_num_tokens=4)
    assert torch.equal(text, greedy(expected, ids, 20))


LOADING = {
    "plain": {},
    "auto": {"device_map": "auto"},
    "one device": {"device_map": "cpu"},
    "whole model": {"device_map": {"": "cpu"}},
    "low memory": {"low_cpu_mem_usage": True},
}


@pytest.mark.parametrize("options", LOADING.values(), ids=LOADING.keys())
def test_no_tensor_is_forgotten(model, folder, options):
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert_same_tensors(loaded, model)
    assert_same_answers(loaded, model)


SPLITS = {
    # No core layer fits beside the embeddings.
    "most on disk": {"device_map": "auto", "max_memory": {"cpu": "120KB"}},
    "one layer on disk": {
        "device_map": {
            "model.layers.1": "disk",
            "model.layers.0": "cpu",
            "model.embed_tokens": "cpu",
            "model.down_proj": "cpu",
            "model.bottleneck": "cpu",
            "model.step_gate": "cpu",
            "model.action_proj": "cpu",
            "model.return_norm": "cpu",
            "model.norm": "cpu",
            "lm_head": "cpu",
        }
    },
}


@pytest.mark.parametrize("options", SPLITS.values(), ids=SPLITS.keys())
def test_weights_on_disk(model, folder, tmp_path, options):
    """Weights come into memory layer by layer; so they do when a rollback computes a state again."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, offload_folder=tmp_path / "offload", **options)
    assert "disk" in loaded.hf_device_map.values()
    on_disk = [name for name, parameter in loaded.named_parameters() if parameter.device.type == "meta"]
    assert any(name.startswith("model.layers.1.mixer") for name in on_disk)
    assert_same_answers(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


@every_shape
def test_weights_of_any_mixer_on_disk(tmp_path, shape):
    """Also those that are read without calling the module that has them; and a memory knows its model."""
    model, ids = tiny_model(**shape), random_ids(1, 6).repeat(1, 3)
    model.save_pretrained(tmp_path / "model")
    whole = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu", **whole},
        offload_folder=tmp_path / "offload",
    )
    on_disk = [name for name, parameter in loaded.named_parameters() if parameter.device.type == "meta"]
    assert all(name in on_disk for name, _ in model.named_parameters() if name.startswith("model.layers.1."))
    assert_same_answers(loaded, model)
    with torch.no_grad():
        memory = loaded(ids, use_cache=True).cache
    memory.save_pretrained(tmp_path / "memory")
    for other in (loaded, model):
        assert StackformerCache.from_pretrained(tmp_path / "memory", other).get_seq_length() == 18


@either_way
def test_weights_on_disk_of_a_tied_model(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": "120KB"},
        offload_folder=tmp_path / "offload",
    )
    assert_same_answers(loaded, model)


@either_way
def test_built_without_memory(tied):
    """On the meta device nothing is computed; weights are assigned afterwards."""
    config = tiny_config(tie_word_embeddings=tied)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    tensors = [*empty.parameters(), *empty.buffers()]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert sum(tensor.numel() for tensor in tensors) == empty.num_parameters()
    model = tiny_model(tie_word_embeddings=tied)
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    assert_same_tensors(empty, model)
    assert_same_answers(empty.eval(), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_automatic_dtype(tmp_path, dtype):
    model = tiny_model(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == loaded.config.dtype == dtype
    assert_same_tensors(loaded, model)
    built = AutoModelForCausalLM.from_config(loaded.config, dtype=dtype)
    assert {parameter.dtype for parameter in built.parameters()} == {dtype}


RESIZES = {
    "grow": ((300,), {}, 300),
    "shrink": ((259,), {}, 259),
    "to a multiple": ((None,), {"pad_to_multiple_of": 64}, 320),
    "grow to a multiple": ((321,), {"pad_to_multiple_of": 64}, 384),
}


@either_way
@pytest.mark.parametrize("sizes, options, expected", RESIZES.values(), ids=RESIZES.keys())
@torch.no_grad()
def test_resizing_the_vocabulary(tmp_path, tied, sizes, options, expected):
    """Tokens that stay are predicted as before, from the same states, also after saving and loading."""
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(*sizes, **options)
    assert model.config.vocab_size == model.vocab_size == expected
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.out_features == expected
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == tied
    kept = min(expected, 261)
    after = model(ids).logits
    assert after.shape[-1] == expected
    torch.testing.assert_close(after[..., :kept], before[..., :kept], rtol=0, atol=1e-12)
    assert model(ids, labels=ids).loss.isfinite()
    new = torch.full((1, 1), expected - 1)
    assert generate(model, torch.cat([ids[:1], new], dim=1), 5).shape == (1, 15)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.config.vocab_size == expected
    assert (loaded.get_input_embeddings().weight is loaded.lm_head.weight) == tied
    assert_same_tensors(loaded, model)
    assert_same_answers(loaded, model)


@either_way
@torch.no_grad()
def test_deep_copies_are_independent(tied):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 9)
    memory = model(ids, use_cache=True).past_key_values
    expected = model(ids).logits
    other = copy.deepcopy(model)
    assert_same_tensors(other, model)
    assert_same_answers(other, model)
    assert (other.get_input_embeddings().weight is other.lm_head.weight) == tied
    assert not {tensor.data_ptr() for tensor in other.parameters()} & {
        x.data_ptr() for x in model.parameters()
    }
    assert other.config is not model.config
    memory = copy.deepcopy(memory)
    more = random_ids(2, 3, seed=1)
    continued = other(more, past_key_values=memory).logits
    torch.testing.assert_close(continued, model(torch.cat([ids, more], dim=1)).logits[:, 9:])
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(model(ids).logits, expected)


CLASSIFIERS = {
    "sequence": (AutoModelForSequenceClassification, StackformerForSequenceClassification, {"score.weight"}),
    "token": (
        AutoModelForTokenClassification,
        StackformerForTokenClassification,
        {"score.weight", "score.bias"},
    ),
}
both_classifiers = pytest.mark.parametrize(
    "auto_class, expected_class, head", CLASSIFIERS.values(), ids=CLASSIFIERS.keys()
)


@both_classifiers
@torch.no_grad()
def test_a_classifier_from_a_language_model(model, folder, auto_class, expected_class, head):
    """All of the model but its head is taken over, and the new head is initialised."""
    classifier, info = auto_class.from_pretrained(folder, num_labels=7, output_loading_info=True)
    assert type(classifier) is expected_class and classifier.score.out_features == 7
    assert set(info["missing_keys"]) == head and set(info["unexpected_keys"]) == {"lm_head.weight"}
    assert_same_tensors(classifier.model, model.model)
    assert 0 < classifier.score.weight.std() < 1
    ids = random_ids(2, 9)
    hidden = model.model(ids).last_hidden_state
    logits = classifier.eval().score(hidden)
    expected = logits if auto_class is AutoModelForTokenClassification else logits[:, -1]
    torch.testing.assert_close(classifier(ids).logits, expected, **CLOSE)


@both_classifiers
@torch.no_grad()
def test_a_classifier_with_other_labels(tmp_path, auto_class, expected_class, head):
    """A head of another size is refused, unless asked for; then only the head is new."""
    classifier = spread_weights(expected_class(tiny_config(num_labels=3))).eval()
    classifier.save_pretrained(tmp_path)
    assert_same_tensors(auto_class.from_pretrained(tmp_path), classifier)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        auto_class.from_pretrained(tmp_path, num_labels=5)
    loaded, info = auto_class.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == head
    assert loaded.score.out_features == loaded.config.num_labels == 5
    assert_same_tensors(loaded.model, classifier.model)
    assert_same_tensors(AutoModel.from_pretrained(tmp_path), classifier.model)


@torch.no_grad()
def test_a_vocabulary_of_another_size(model, folder):
    """Only the matrices of the vocabulary are new; the model works."""
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder, vocab_size=300)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, vocab_size=300, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert_same_tensors(loaded.model.layers, model.model.layers)
    logits = loaded(random_ids(2, 9)).logits
    assert logits.shape[-1] == 300 and logits.isfinite().all()


def test_damaged_checkpoints_are_reported(model, tmp_path, caplog):
    """A tensor that is not in the file, and one too many, are named."""
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.7.extra"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.1.mlp.up_proj.weight"}
    assert set(info["unexpected_keys"]) == {"model.layers.7.extra"}


def torchao_int8():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_int8():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_nf4():
    """On a CPU, its kernels want widths that 32 divides: not those of the gates and of the actions."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", "read_proj", "write_proj", "decay_proj", "action_proj"],
    )


QUANTISATIONS = {  # and how far logits may be from those in full precision; 1.4 for an unrelated model
    "torchao int8": (torchao_int8, 0.05),
    "bitsandbytes int8": (bitsandbytes_int8, 0.05),
    "bitsandbytes nf4": (bitsandbytes_nf4, 0.4),
}


@pytest.mark.parametrize("make_config, tolerance", QUANTISATIONS.values(), ids=QUANTISATIONS.keys())
@torch.no_grad()
def test_quantised_loading(tmp_path, caplog, make_config, tolerance):
    """Near the model in full precision, with a cache as without, and the same again after saving."""
    quantization_config = make_config()
    caplog.set_level(logging.ERROR)  # bitsandbytes logs every cast
    # Tokens that halt a step sooner or later make a jump of any small error: a fixed depth.
    shape = {"hidden_size": 128, "bottleneck_size": 64, "halting_threshold": 0.0}
    model, ids = tiny_model(torch.float32, noise=0.02, **shape), random_ids(2, 12)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=quantization_config, device_map="cpu"
    )
    assert type(loaded.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    # Saved before use: on a CPU, bitsandbytes packs nf4 weights when used, and saving spoils them then.
    loaded.save_pretrained(tmp_path / "again")
    expected, actual = model(ids).logits, loaded(ids).logits.float()
    assert 0 < (actual - expected).norm() < tolerance * expected.norm()
    first = loaded(ids[:, :7], use_cache=True)
    second = loaded(ids[:, 7:], past_key_values=first.past_key_values)
    continued = torch.cat([first.logits, second.logits], dim=1).float()
    assert (continued - actual).norm() < tolerance * expected.norm()
    assert generate(loaded, ids, 5, num_beams=2).shape == (2, 17)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu")
    assert torch.equal(again(ids).logits.float(), actual)
    second.cache.save_pretrained(tmp_path / "memory")  # after a first use, which packs weights
    assert StackformerCache.from_pretrained(tmp_path / "memory", loaded).get_seq_length() == 12


@pytest.mark.parametrize("make_config", [torchao_int8, bitsandbytes_int8], ids=["torchao", "bitsandbytes"])
@every_shape
@torch.no_grad()
def test_quantised_mixers(tmp_path, caplog, make_config, shape):
    """Read at once and with a cache, and a memory that comes back."""
    quantization_config = make_config()
    caplog.set_level(logging.ERROR)
    bottleneck = {} if shape.get("bottleneck_size", 64) is None else {"bottleneck_size": 64}
    shape = shape | bottleneck | {"hidden_size": 128, "halting_threshold": 0.0}
    model, ids = tiny_model(torch.float32, noise=0.02, **shape), random_ids(2, 12)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=quantization_config, device_map="cpu"
    )
    expected, actual = model(ids).logits, loaded(ids).logits.float()
    assert 0 < (actual - expected).norm() < 0.1 * expected.norm()
    cache = loaded(ids[:, :7], use_cache=True).cache
    cache.save_pretrained(tmp_path / "memory")
    cache = StackformerCache.from_pretrained(tmp_path / "memory", loaded)
    rest = loaded(ids[:, 7:], cache=cache).logits.float()
    assert (rest - actual[:, 7:]).norm() < 1e-3 * expected.norm()
