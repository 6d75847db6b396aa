"""Generated tasks: labels against independent definitions, and the harness that trains, resumes and draws."""

import json
import math
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.tasks import IGNORED, TASKS, densities, heat_map, naive_sorting, run, seeded
from benchmarks.tasks.word_problem import group_elements, multiplication_table
from experiments.presets import read_preset
from tests.models import SHAPES, random_ids, tiny_model

torch.set_num_threads(1)

OPTIONS = {"mqar": {"vocab_size": 64}, "distant_recall": {"num_kv_pairs": 2}}


def _task(name, **options):
    return run.build_task(name, OPTIONS.get(name, {}) | options)


def _sequences(name, length, count=50, **options):
    """Pairs (tokens, {position: answer}) as lists and dicts."""
    input_ids, labels = _task(name, **options).sample(count, length, seeded(0, length))
    for tokens, row in zip(input_ids.tolist(), labels.tolist(), strict=True):
        yield tokens, {t: answer for t, answer in enumerate(row) if answer != IGNORED}


def _run_stack(tokens):
    stack = []
    for token in tokens:
        stack = stack[:-1] if token == 2 else [*stack, {0: 0, 1: 1, 3: 0, 4: 1}[token]]
    return [*reversed(stack), 2]


def _walk(tokens):
    place = 0
    for token in tokens:
        place = {0: place - 1, 1: place, 2: place + 1}[token]
        place = {-1: 4, 5: 0}.get(place, place)
    return [place]


ANSWERS = {
    "parity": lambda tokens: [tokens.count(1) & 1],
    "cycle_navigation": _walk,
    "reverse_string": lambda tokens: tokens[::-1],
    "duplicate_string": lambda tokens: tokens + tokens,
    "stack_manipulation": _run_stack,
}
EMPTY = {
    "parity": 2,
    "cycle_navigation": 5,
    "reverse_string": 2,
    "duplicate_string": 2,
    "stack_manipulation": 5,
}


@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize("name", ANSWERS)
def test_chomsky_tasks_answer_what_they_say(name, length):
    for tokens, answers in _sequences(name, length):
        expected = ANSWERS[name](tokens[:length])
        assert list(answers) == list(range(length, length + len(expected)))
        assert list(answers.values()) == expected
        assert set(tokens[length:]) == {EMPTY[name]} and EMPTY[name] not in tokens[:length]


def test_stacks_begin_with_bits_and_go_on_with_actions():
    sizes = set()
    for tokens, _ in _sequences("stack_manipulation", 6, count=200):
        size = sum(token < 2 for token in tokens[:6])
        assert all(token < 2 for token in tokens[:size]) and all(
            token in (2, 3, 4) for token in tokens[size:6]
        )
        sizes.add(size)
    assert sizes == {1, 2, 3, 4, 5}


def test_examples_of_the_paper():
    # Those of stack_manipulation.py of deepmind's neural_networks_chomsky_hierarchy, by this reference.
    assert _run_stack([0, 1, 1, 0, 4, 2, 2]) == [1, 1, 0, 2]
    assert _run_stack([1, 1, 0, 2, 2, 2]) == [2]
    assert _walk([2, 0, 1, 0, 0]) == [3] and _walk([2, 2, 2, 0]) == [2]


@pytest.mark.parametrize("group", ["A5", "S3", "Z7"])
def test_word_problem_multiplies_permutation_matrices(group):
    elements = group_elements(group)
    assert len(elements) == {"A5": 60, "S3": 6, "Z7": 7}[group] and elements[0] == tuple(
        range(len(elements[0]))
    )
    matrices = torch.eye(len(elements[0]), dtype=torch.long)[torch.tensor(elements)].mT  # [g][g(i), i] = 1
    for tokens, answers in _sequences("word_problem", 9, count=20, group=group):
        assert list(answers) == list(range(9))
        for t, answer in answers.items():
            expected = matrices[tokens[0]]
            for token in tokens[1 : t + 1]:
                expected = expected @ matrices[token]
            assert torch.equal(matrices[answer], expected)


def test_a5_is_not_solvable():
    table = multiplication_table("A5")
    inverse = (table == 0).int().argmax(1).tolist()
    table = table.tolist()
    commutators = {table[table[g][h]][table[inverse[g]][inverse[h]]] for g, h in product(range(60), repeat=2)}
    assert len(commutators) == 60  # the group is its own commutator: no tower of abelian groups


@pytest.mark.parametrize("length, pairs", [(64, None), (32, 8), (40, 3)])
def test_recall_is_answerable_from_its_context(length, pairs):
    for tokens, answers in _sequences("mqar", length, num_kv_pairs=pairs):
        count = length // 16 if pairs is None else pairs
        keys, values = tokens[0 : 2 * count : 2], tokens[1 : 2 * count : 2]
        assert len(set(keys)) == len(set(values)) == count
        assert all(0 < key < 32 for key in keys) and all(32 <= value < 64 for value in values)
        memory = dict(zip(keys, values, strict=True))
        assert all(t >= 2 * count and t % 2 == 0 for t in answers)
        assert sorted(tokens[t] for t in answers) == sorted(keys)
        assert all(memory[tokens[t]] == answer for t, answer in answers.items())
        assert not any(token for t, token in enumerate(tokens[2 * count :], 2 * count) if t not in answers)


@pytest.mark.parametrize("mark, length, pairs", [(1, 15, 3), (1, 31, 4), (2, 64, 2)])
def test_distant_recall_asks_for_marked_pairs_only(mark, length, pairs):
    options = {"num_kv_pairs": pairs, "num_keys": 5, "num_values": 6, "num_ignored_marks": 3}
    unlike, marks = 0, set()
    for tokens, answers in _sequences("distant_recall", length, **options, other_mark=mark == 2):
        kept, rest, asked = tokens[: 3 * pairs], tokens[3 * pairs : -2 * pairs], tokens[-2 * pairs :]
        assert kept[::3] == [mark] * pairs and asked[::2] == [0] * pairs
        marks |= set(rest[::3])
        memory = dict(zip(kept[1::3], kept[2::3], strict=True))
        assert len(memory) == pairs and sorted(memory) == sorted(asked[1::2])
        assert list(answers) == list(range(length - 2 * pairs + 1, length, 2))
        assert all(memory[tokens[t]] == answer for t, answer in answers.items())
        # Elsewhere the same keys have other values, or the marks would say nothing.
        others = zip(rest[1::3], rest[2::3], strict=False)  # the last may be cut off
        unlike += sum(memory.get(key, value) != value for key, value in others)
        for keys, values in ((kept[1::3], kept[2::3]), (rest[1::3], rest[2::3])):
            assert all(6 <= key < 11 for key in keys) and all(11 <= value < 17 for value in values)
    assert (unlike > 0 and marks == {3, 4, 5}) or length == 5 * pairs


@pytest.mark.parametrize("length", [3, 60])
def test_sorting_is_by_count_then_by_first_place(length):
    for tokens, answers in _sequences("sorting", length):
        symbols = tokens[:length]
        expected = [symbol for symbol, _ in Counter(symbols).most_common()]  # ties: the first one first
        expected += sorted(set(range(20)) - set(symbols))
        assert list(answers.values()) == expected and list(answers) == list(range(length, length + 20))
        assert tokens[length:] == [20, *expected[:-1]] and 20 not in symbols


def test_sorted_symbols_drift_from_one_distribution_to_another():
    tokens = _task("sorting", num_symbols=4).draw(2000, 40, seeded(0))
    ends = torch.randint(1, 10, (2, 2000, 4), generator=seeded(0)).double()
    for place, ratio in ((0, 1 / 40), (19, 0.5), (39, 1.0)):
        first, last = ends / ends.sum(-1, keepdim=True)
        expected = ((1 - ratio) * first + ratio * last).mean(0)
        observed = torch.bincount(tokens[:, place], minlength=4) / 2000
        assert torch.allclose(observed.double(), expected, atol=0.04)


def test_naive_sorting_is_as_good_as_what_it_sees():
    found = naive_sorting.naive_accuracies(_task("sorting"), 600, window=150, num_test=50)
    guess, last, some, decayed, exact = found.values()
    assert guess < 0.25 < last < some < exact and last < decayed < exact and exact > 0.8
    everything = naive_sorting.naive_accuracies(_task("sorting"), 100, window=100, num_test=50)
    assert len(set(list(everything.values())[1:])) == 1


def test_recall_gaps_follow_the_power_law():
    task = _task("mqar", num_kv_pairs=1, vocab_size=8)
    _, labels = task.sample(20000, 34, seeded(0))
    place = (labels != IGNORED).int().argmax(1)
    observed = torch.bincount((place - 2) // 2, minlength=16) / 20000
    weights = torch.arange(1, 17) ** (0.01 - 1.0)
    assert torch.allclose(observed, weights / weights.sum(), atol=0.015)


def test_recall_can_fill_what_is_no_query_at_random():
    plain, noisy = (_task("mqar", random_non_queries=random) for random in (False, True))
    (tokens, labels), (filled, same) = (task.sample(50, 64, seeded(0)) for task in (plain, noisy))
    assert torch.equal(labels, same) and torch.equal(filled[tokens != 0], tokens[tokens != 0])
    assert len(filled[tokens == 0].unique()) == 64


@pytest.mark.parametrize("name", TASKS)
def test_sequences_are_those_of_their_seed(name):
    task = _task(name)
    first, again, other = (task.sample(8, 16, seeded(*key)) for key in ((1, 2), (1, 2), (2, 1)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    tokens, labels = first
    assert tokens.shape == labels.shape and tokens.dtype == labels.dtype == torch.long
    assert set(tokens.flatten().tolist()) <= set(range(task.vocab_size))
    answers = labels[labels != IGNORED]
    assert set(answers.tolist()) <= set(range(task.vocab_size)) and len(answers.unique()) <= task.num_answers


def test_training_draws_all_lengths_and_other_sequences_than_the_test():
    task = _task("parity")
    collate = run.TaskCollator(task, task.train_lengths(6), seed=3)
    batches = [collate([i, i + 1, i + 2]) for i in range(0, 150, 3)]
    assert {batch["input_ids"].shape[1] - 1 for batch in batches} == {1, 2, 3, 4, 5, 6}
    assert all(len(batch["labels"]) == 3 for batch in batches)
    assert torch.equal(collate([0, 1, 2])["input_ids"], batches[0]["input_ids"])
    test = task.sample(3, 60, seeded(run.TEST, 60))[0]
    train = run.TaskCollator(task, [60], seed=60)([0, 1, 2])["input_ids"]
    assert not torch.equal(test, train)


def test_a_curriculum_begins_with_short_sequences():
    task = run.build_task("word_problem", {"group": "S3"})
    collate = run.TaskCollator(task, task.train_lengths(16), seed=0, curriculum=300)
    lengths = [collate([index])["input_ids"].shape[1] for index in range(600)]
    assert set(lengths[:50]) == {2} and max(lengths[:200]) == 7 and set(lengths[300:]) == set(range(2, 17))


@pytest.mark.parametrize(
    "name, options, length, message",
    [
        ("sorted", {}, 8, "task='sorted': expected one of .*parity"),
        ("parity", {"bits": 2}, 8, r"unknown \['bits'\] for parity"),
        ("word_problem", {"group": "B5"}, 8, "group='B5': expected S, A or Z"),
        ("mqar", {"num_kv_pairs": 4}, 15, "length=15"),
        ("mqar", {"num_kv_pairs": 4}, 14, "length=14"),
        ("mqar", {}, 14, "length=14"),
        ("mqar", {"num_kv_pairs": 8, "vocab_size": 16}, 64, "vocab_size=16: expected at least 18"),
        ("distant_recall", {"num_kv_pairs": 4}, 19, "length=19: expected at least 5 times num_kv_pairs=4"),
        ("distant_recall", {"num_kv_pairs": 9}, 64, "num_kv_pairs=9: expected at most num_keys=8"),
    ],
)
def test_bad_tasks(name, options, length, message):
    with pytest.raises(ValueError, match=message):
        run.build_task(name, options).sample(2, length, seeded(0))


# The harness

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
PRESETS = {
    "stack": {
        "model_type": "stackformer",
        "hidden_size": 24,
        "bottleneck_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_memory_banks": 2,
        "stack_depth": 2,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
}


@pytest.fixture
def grid(tmp_path):
    """A grid file of two systems, for few steps."""
    systems = {}
    for name, fields in PRESETS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fields))
        systems[name] = {"preset": str(tmp_path / f"{name}.json")}
    systems["stack"]["overrides"] = {"num_memory_banks": 1}
    options = {"depths": [1, 2], "test_depths": [1, 3], "train_length": 4, "test_lengths": [4, 6]}
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"systems": systems, **options}))
    return path


def _argv(tmp_path, grid, *more):
    return [
        *("--grid", str(grid), "--output_dir", str(tmp_path / "out"), "--num_test", "16"),
        *("--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "True"),
        *more,
    ]


def test_a_grid_runs_resumes_and_grows(tmp_path, grid, capsys, monkeypatch):
    rows = run.main(_argv(tmp_path, grid))
    # llama has no depth: one run; trained with one step: tested with one; else with each of test_depths
    done = {(row["system"], row["train_depth"], row["depth"], row["length"]) for row in rows}
    depths = [("llama", None, None), ("stack", 1, 1), ("stack", 2, 1), ("stack", 2, 3)]
    assert done == {(*depth, length) for depth, length in product(depths, (4, 6))} and len(rows) == 8
    assert all(0 <= row["exact"] <= row["accuracy"] <= 1 and row["chance"] == 0.5 for row in rows)
    assert {row["ponder_steps"] for row in rows if row["system"] == "llama"} == {None}
    assert all(row["ponder_steps"] == 1 for row in rows if row["depth"] == 1)
    assert "guessing has 0.500" in capsys.readouterr().out
    picture = tmp_path / "out" / "heat_map.png"
    assert picture.read_bytes()[:4] == b"\x89PNG" and not list((tmp_path / "out").rglob("*.partial"))
    record = json.loads((tmp_path / "out" / "parity" / "stack" / "depth2-seed0" / "run.json").read_text())
    assert record["settings"]["config"]["num_memory_banks"] == 1 and record["state_bytes"] > 0

    # Nothing is trained twice, and a longer list of lengths is only what is new.
    monkeypatch.setattr(run.Trainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    measured = []
    evaluate = run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda *args: measured.append(args[2]) or evaluate(*args))
    assert run.main(_argv(tmp_path, grid)) == rows and not measured
    more = run.main(_argv(tmp_path, grid, "--test_lengths", "4", "9"))
    assert measured == [9] * 4 and len(more) == 12
    with pytest.raises(ValueError, match=r"other settings of \['training'\]"):
        run.main(_argv(tmp_path, grid, "--learning_rate", "1"))


def test_a_training_that_was_stopped_goes_on(tmp_path, grid, monkeypatch):
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2")
    argv = _argv(tmp_path, grid, "--depths", "2", "--max_steps", "4", *saving)
    whole = run.main(argv)
    folder = tmp_path / "out" / "parity" / "stack" / "depth2-seed0"
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()

    # As if the process had ended after its first checkpoint.
    shutil.rmtree(folder / "checkpoint-4")
    record = json.loads((folder / "run.json").read_text())
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    (folder / "run.json").write_text(json.dumps({"settings": record["settings"]}))
    batches = []
    make_batch = run.TaskCollator.__call__
    monkeypatch.setattr(run.TaskCollator, "__call__", lambda *args: batches.append(args) or make_batch(*args))
    assert run.main(argv) == whole and len(batches) == 2
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("shape", PRESETS)
def test_training_asks_for_the_labels_where_they_stand(shape, grid):
    task = _task("word_problem", group="S3")
    config = read_preset(str(grid.with_name(f"{shape}.json")), vocab_size=6, **dict.fromkeys(TOKEN_IDS))
    model = AutoModelForCausalLM.from_config(config)
    batch = run.TaskCollator(task, [5], seed=0)([0, 1])
    logits = model(input_ids=batch["input_ids"]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert model(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_task_is_learned(tmp_path, grid):
    argv = _argv(
        tmp_path, grid, "--depths", "1", "--train_length", "1", "--test_lengths", "1", "--max_steps", "60"
    )
    rows = run.main([*argv, "--learning_rate", "1e-2", "--per_device_train_batch_size", "16"])
    assert {row["system"]: row["accuracy"] for row in rows} == {"stack": 1.0, "llama": 1.0}


def test_token_by_token_is_all_at_once():
    model = tiny_model(vocab_size=6, **dict.fromkeys(TOKEN_IDS))
    task = _task("stack_manipulation")
    whole = run.evaluate(model, task, 10, num_test=20, batch_size=8)
    for chunk_length in (1, 4):
        assert run.evaluate(model, task, 10, 20, 20, chunk_length) == pytest.approx(whole, abs=1e-9)


def test_accuracies_are_of_the_answers_asked_for():
    class Oracle(torch.nn.Module):
        """Right but for the last answer of the first sequence."""

        device = torch.device("cpu")

        def forward(self, input_ids, use_cache):
            logits = torch.nn.functional.one_hot(input_ids, 4).float()
            logits[0, -1] = 1 - logits[0, -1]
            return CausalLMOutput(logits=logits)

    class Copy(run.Task):
        def sample(self, batch_size, length, generator):
            tokens = torch.randint(4, (batch_size, length), generator=generator)
            labels = tokens.clone()
            labels[:, 0] = IGNORED
            return tokens, labels

    measured = run.evaluate(Oracle(), Copy(), 6, num_test=10)
    assert measured == pytest.approx({"accuracy": 49 / 50, "final": 0.9, "exact": 0.9, "ponder_steps": None})


def test_a_grid_with_typos(tmp_path, grid):
    with pytest.raises(ValueError, match=r"config=\[\]: expected at least one preset"):
        run.main(["--task", "parity"])
    with pytest.raises(ValueError, match="unknown fields.*bonks"):
        preset = str(tmp_path / "stack.json")
        run.main(
            ["--config", preset, "--config_overrides", '{"bonks": 1}', "--output_dir", str(tmp_path / "out")]
        )
    (tmp_path / "typo.json").write_text('{"test_length": [4]}')
    with pytest.raises(ValueError, match=r"unknown options \['test_length'\]"):
        run.main(["--grid", str(tmp_path / "typo.json")])


@pytest.mark.parametrize("path", sorted(Path(run.__file__).parent.glob("*.json")), ids=lambda path: path.stem)
def test_grids_that_come_along(path, tmp_path):
    args, systems, training = run.parse(["--grid", str(path)])
    training.output_dir = str(tmp_path)
    runs = run.plan(args, systems, training)
    several = (args.task, systems, args.depths or [1], args.learning_rates or [1], args.seeds)
    assert len(runs) == math.prod(map(len, several))
    assert {one.system for one in runs} == set(systems) and len({one.folder for one in runs}) == len(runs)


def test_each_system_at_its_best_learning_rate(tmp_path, grid, capsys):
    """Its runs differ in nothing but the rate and the seed."""
    rates = (1e-9, 1e-2)
    options = ("--depths", "1", "--learning_rates", *map(str, rates), "--seeds", "0", "1")
    rows = run.main(_argv(tmp_path, grid, *options))
    found = {(row["system"], row["learning_rate"], row["seed"]) for row in rows}
    assert found == set(product(("llama", "stack"), rates, (0, 1))) and len(rows) == 16
    record = tmp_path / "out" / "parity" / "stack" / "depth1-rate0.01-seed1" / "run.json"
    assert json.loads(record.read_text())["settings"]["training"]["learning_rate"] == 1e-2
    best = heat_map.best_rates(rows)
    assert set(best) == {("parity", "llama"), ("parity", "stack")}
    for (task, system), rate in best.items():
        of_rate = {
            one: [row for row in rows if (row["system"], row["learning_rate"]) == (system, one)]
            for one in rates
        }
        sums = {one: sum(row["accuracy"] for row in found) for one, found in of_rate.items()}
        assert sums[rate] == max(sums.values())
        of_seeds = [row["accuracy"] for row in of_rate[rate] if row["length"] == 4]
        assert next(iter(heat_map.panels(rows)[task, system].values()))[4] == sum(of_seeds) / 2
    assert f"stack, {best['parity', 'stack']:g}, P = 1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="learning_rates=0"):
        run.main(_argv(tmp_path, grid, "--learning_rates", "0"))


@pytest.mark.parametrize("shape", ["llama", "stack"])
def test_logits_of_answers_alone_give_the_loss_and_gradients_of_all(shape, tmp_path, grid):
    args, systems, training = run.parse(_argv(tmp_path, grid, "--task", "mqar"))
    args.task_options = '{"vocab_size": 32, "num_kv_pairs": 2}'
    config = next(one.config for one in run.plan(args, systems, training) if one.system == shape)
    model = AutoModelForCausalLM.from_config(config).train()
    batch = run.TaskCollator(run.build_task("mqar", json.loads(args.task_options)), [16], 0)([0, 1, 2])
    trainer = run.TaskTrainer(model, training)
    model(**batch).loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss, model(**batch).loss)
    loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected.get(name), rtol=1e-4, atol=1e-6)


def test_heat_map_is_of_medians_and_says_which_depth(tmp_path, capsys):
    row = {"task": "parity", "system": "a", "chance": 0.5, "train_length": 4, "final": 1.0, "exact": 0.0}
    row["halting_threshold"] = None
    rows = [
        row | {"train_depth": trained, "depth": tested, "length": length, "seed": seed, "accuracy": value}
        for trained, tested in ((2, 2), (2, 4), (None, None))
        for length in (4, 8)
        for seed, value in enumerate((0.5, 0.6, 1.0))
    ]
    table = heat_map.panels(rows)["parity", "a"]
    assert list(heat_map.panels([rows[0] | {"halting_threshold": 0.5}])["parity", "a"]) == [
        "P = 2, threshold 0.5"
    ]
    assert table["P = 2"] == table["P = 2, tested with 4"] == table["one pass"] == {4: 0.6, 8: 0.6}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = tmp_path / "final.png"
    heat_map.main(["--results", str(tmp_path), "--measure", "final", "--output", str(picture)])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "0.600 (0.500-1.000)" not in (out := capsys.readouterr().out) and "parity: final by length" in out
    heat_map.main(["--results", str(tmp_path), "--output", str(picture)])
    assert "0.600 (0.500-1.000)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="measure='loss'"):
        heat_map.panels(rows, "loss")
    with pytest.raises(ValueError, match="at least one result"):
        heat_map.draw_heat_map([], picture)


@torch.no_grad()
def test_densities_are_those_of_the_tokens():
    """Of every token as if it were the last one, and none is left out."""
    model, ids = tiny_model(**SHAPES["infinity-former"]), random_ids(2, 17)
    layers = densities.looks(model, ids)
    assert [tuple(x.shape) for x in layers[0]] == [(2, 2, 17)] * 2 and len(layers) == 2
    for length in (3, 5, 11):
        for layer, shorter in zip(layers, densities.looks(model, ids[:, :length]), strict=True):
            torch.testing.assert_close(tuple(x[..., :length] for x in layer), shorter)
    assert len({round(x, 6) for x in layers[0][0].flatten().tolist()}) > 17


def test_densities_are_drawn(tmp_path):
    command = (
        "--task sorting --config configs/infinity-tiny.json --train_length 16 --test_lengths 16 --max_steps 1"
    )
    overrides = {"hidden_size": 16, "intermediate_size": 8, "sliding_window": 8, "memory_block": 8}
    command += (
        f" --num_test 2 --per_device_train_batch_size 2 --output_dir {tmp_path / 'runs'} --disable_tqdm true"
    )
    run.main([*command.split(), "--config_overrides", json.dumps(overrides)])
    picture = tmp_path / "new" / "densities.png"
    folder = tmp_path / "runs" / "sorting" / "infinity-tiny" / "depth1-seed0"
    density = densities.main(f"--run {folder} --length 16 --num_test 3 --output {picture}".split())
    assert density.shape == (2, 4, 20, 100)
    assert density.mean(-1).max() <= 1.05, "more than all is in [0, 1]"
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="run='.*': expected a model with continuous attention"):
        (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace("continuous_attention", "attention")
        )
        densities.main(["--run", str(folder), "--length", "16"])
