# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Train models on short sequences of generated tasks, and test them on longer ones, and at other depths.

    python -m benchmarks.tasks.run --task parity --config configs/stackformer-tiny.json \\
        --config_overrides '{"hidden_size": 64, "bottleneck_size": 48}' --depths 1 4 --test_depths 1 2 4 8 \\
        --seeds 0 1 2 --train_length 20 --test_lengths 20 40 80 160 --output_dir outputs/parity
    python -m benchmarks.tasks.run --grid benchmarks/tasks/depth.json --output_dir outputs/depth

Several values make a grid: tasks x systems x depths x learning rates x seeds, tested at lengths x depths. A
system is any causal language model that a preset describes, a Stackformer or another one of transformers;
depth is `max_ponder_steps`, for models that have it. The tables show each system at the learning rate that is
best for it. A grid file is JSON of these same options (the command line goes
first) and of `systems`, {name: {"preset": file, "overrides": {field: value}}}, beside those of --config.

Every run has a folder, output_dir/task/system/depth-rate-seed: run.json (what was asked for, and what
training took), the model, and results.jsonl, one line for each length and depth. What is there is not done
again: the same command goes on where it was stopped (inside a training, too, with --save_strategy steps), and
one with more lengths, depths, seeds or systems does what is missing. All are tested on the same sequences,
drawn apart from those of training. At the end the tables are printed, and heat_map.png drawn from all that is
in output_dir.

accuracy    of all answers, as in the papers; what guessing has is printed beside it
final       of the last answer in each sequence: where there are answers all along, the longest in distance
exact       sequences with no wrong answer
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.models import read
from benchmarks.models import state_bytes as bytes_of
from benchmarks.tasks import IGNORED, TASKS, Task, seeded
from benchmarks.tasks.heat_map import RESULTS, draw_heat_map, print_tables, read_rows
from experiments.command_line import (
    COUNT,
    NATURAL,
    POSITIVE,
    THRESHOLD,
    DataclassParser,
    check_input_file,
    run_main,
)
from experiments.engine import CountSteps, execute
from experiments.presets import read_json, read_preset
from experiments.report import commit, draw_or_warn, machine_line, write_json, write_text
from experiments.training import check_training, save
from stackformer import StackformerCache  # also registers the Auto classes
from stackformer.training.checkpoints import WholeCheckpoints, newest_checkpoint
from stackformer.versions import CACHE_NAME

TRAIN, TEST = range(2)  # the first number of the seeds, so that no test sequence is one of training
# The training arguments that a result depends on.
TRAINING_FIELDS = (
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "optim",
)  # fmt: skip


@dataclass
class TaskArguments:
    task: list[str] = field(
        default_factory=lambda: ["parity"], metadata={"help": f"One or more of {', '.join(TASKS)}."}
    )
    task_options: str | None = field(
        default=None, metadata={"help": 'Options of the task as JSON, such as {"num_kv_pairs": 8}.'}
    )
    config: list[str] = field(
        default_factory=list, metadata={"help": "JSON presets; a system is called as its file."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'Fields other than in the presets, as JSON or "name=value,...".'}
    )
    depths: list[int] | None = field(
        default=None, metadata={"help": "max_ponder_steps to train with; the config's if not given."}
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Learning rates to train with; --learning_rate if not given."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of weights and training."})
    train_length: int = field(default=20, metadata={"help": "Longest sequences of the training."})
    curriculum_steps: int = field(
        default=0,
        metadata={"help": "Steps until all lengths are drawn; up to then the longest grows steadily."},
    )
    test_lengths: list[int] = field(
        default_factory=lambda: [20, 40, 80, 160], metadata={"help": "Lengths to test."}
    )
    test_depths: list[int] | None = field(
        default=None,
        metadata={"help": "max_ponder_steps to test with; that of the training if not given, or if it is 1."},
    )
    test_halting_threshold: float | None = field(
        default=None, metadata={"help": "halting_threshold to test with; that of the config if not given."}
    )
    num_test: int = field(default=512, metadata={"help": "Test sequences of each length."})
    chunk_length: int | None = field(
        default=None,
        metadata={"help": "Test in chunks of so many tokens, the state carried over; 1 is token by token."},
    )
    jobs: int | None = field(
        default=None,
        metadata={"help": "Runs at the same time, a process each; one in this process if not given."},
    )
    threads: int = field(default=1, metadata={"help": "Threads of each process of --jobs."})
    grid: str | None = field(default=None, metadata={"help": "JSON file with these options, and systems."})

    def __post_init__(self) -> None:
        for name, expected in (
            ("depths", COUNT), ("learning_rates", POSITIVE), ("seeds", NATURAL),
            ("train_length", COUNT), ("curriculum_steps", NATURAL),
            ("test_lengths", COUNT), ("test_depths", COUNT), ("test_halting_threshold", THRESHOLD),
            ("num_test", COUNT), ("chunk_length", COUNT), ("jobs", COUNT), ("threads", COUNT),
        ):  # fmt: skip
            value = getattr(self, name)
            for one in value if isinstance(value, list) else [value]:
                expected.check(name, one)


class TaskTrainer(WholeCheckpoints, Trainer):
    """transformers' Trainer, which leaves no checkpoint half-written, and computes logits for answers only.

    In most tasks few tokens have an answer, and with a large vocabulary their logits take most of the time.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See transformers' Trainer. A model whose loss has further terms computes it itself."""
        asked = inputs["labels"] != IGNORED
        if return_outputs or model is not self.model or asked.all() or _has_added_losses(model.config):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hidden = model.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
        logits, labels = model.get_output_embeddings()(hidden[asked]), inputs["labels"][asked]
        divisor = len(labels) if num_items_in_batch is None else num_items_in_batch
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / divisor


def _has_added_losses(config: PreTrainedConfig) -> bool:
    """Whether a Stackformer's loss has more than the cross-entropy."""
    return any(getattr(config, name, 0) for name in ("ponder_loss_coef", "density_loss_coef"))


def make_parser() -> DataclassParser:
    """The command line: task, systems and transformers' TrainingArguments, with defaults for small models."""
    parser = DataclassParser((TaskArguments, TrainingArguments), description=__doc__.split("\n")[0])
    parser.set_defaults(
        output_dir="outputs/tasks",
        max_steps=2000,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=0.1,
        save_strategy="no",
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    return parser


@dataclass(frozen=True)
class Run:
    """One training: a task, a system at a depth, a learning rate and a seed; `folder` is where it lives."""

    task_name: str
    task: Task
    system: str
    config: PreTrainedConfig
    learning_rate: float
    seed: int
    folder: Path

    @property
    def depth(self) -> int | None:
        """The ponder steps that it is trained with."""
        return ponder_depth(self.config)

    def settings(self, args: TaskArguments, training: TrainingArguments) -> dict[str, Any]:
        """All that the trained weights depend on, as JSON has it."""
        config = self.config.to_diff_dict()
        config.pop("transformers_version")
        values = {
            "task": self.task_name,
            "options": vars(self.task),
            "system": self.system,
            "config": config,
            "seed": self.seed,
            "train_length": args.train_length,
            "curriculum_steps": args.curriculum_steps,
            "training": {name: training.to_dict()[name] for name in TRAINING_FIELDS}
            | {"learning_rate": self.learning_rate},
        }
        return json.loads(json.dumps(values))


class TaskCollator:
    """Makes a batch of the indices that it is given: of one length, and the same for the same indices.

    Args:
        lengths: to draw from, ascending.
        curriculum: the index from which on all lengths are drawn. Up to there, the longest one grows from the
            shortest by a constant factor.
    """

    def __init__(self, task: Task, lengths: Sequence[int], seed: int, curriculum: int = 0) -> None:
        self.task, self.lengths, self.seed, self.curriculum = task, lengths, seed, curriculum

    def __call__(self, indices: list[int]) -> dict[str, Tensor]:
        generator = seeded(TRAIN, self.seed, indices[0])
        lengths = self.lengths
        if indices[0] < self.curriculum:
            longest = lengths[0] * (lengths[-1] / lengths[0]) ** (indices[0] / self.curriculum)
            lengths = [length for length in lengths if length <= longest]
        length = lengths[torch.randint(len(lengths), (), generator=generator)]
        input_ids, labels = self.task.sample(len(indices), length, generator)
        return {"input_ids": input_ids, "labels": labels, "shift_labels": labels}  # already in their places


def build_task(name: str, options: dict[str, Any] | None = None) -> Task:
    """A task by its name, with `options` other than its defaults.

    Raises:
        ValueError: for an unknown task or option.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r}: expected one of {sorted(TASKS)}.")
    known = {option.name for option in fields(TASKS[name])}
    if unknown := sorted(set(options or {}) - known):
        raise ValueError(f"task_options: unknown {unknown} for {name}, expected some of {sorted(known)}.")
    return TASKS[name](**(options or {}))


def train(
    run: Run, args: TaskArguments, training: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
) -> None:
    """Train the run's model into its folder, unless that has been done, going on from a checkpoint.

    Args:
        callbacks: the Trainer's, beside its own.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    settings, record = run.settings(args, training), run.folder / "run.json"
    if record.exists():
        found = read_json("output_dir", record)
        if found["settings"] != settings:
            differ = [name for name in settings if found["settings"].get(name) != settings[name]]
            raise ValueError(
                f"output_dir: expected a new one, {run.folder} has a run with other settings of {differ}."
            )
        if "parameters" in found:
            return
    write_json(record, {"settings": settings})
    (run.folder / RESULTS).unlink(missing_ok=True)  # of weights that are no more

    arguments = copy.copy(training)
    arguments.output_dir, arguments.seed, arguments.remove_unused_columns = str(run.folder), run.seed, False
    arguments.learning_rate = run.learning_rate
    if args.curriculum_steps:
        arguments.train_sampling_strategy = "sequential"  # an index tells the step
    set_seed(run.seed)
    model = AutoModelForCausalLM.from_config(run.config)
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    lengths = run.task.train_lengths(args.train_length)
    trainer = TaskTrainer(
        model,
        arguments,
        # A sequence is made of its index, so that no run needs its data on disk and any can be resumed.
        train_dataset=range(arguments.max_steps * per_step),
        data_collator=TaskCollator(run.task, lengths, run.seed, args.curriculum_steps * per_step),
        callbacks=list(callbacks),
    )
    started = time.perf_counter()
    checkpoint = newest_checkpoint(run.folder, arguments.world_size, arguments.save_only_model)
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    save(trainer)
    measured = {
        "parameters": model.num_parameters(),
        "state_bytes": state_bytes(model, run.task, args.train_length),
        "seconds": round(seconds, 1),
        "commit": commit(),
        "machine": machine_line(),
    }
    if trainer.is_world_process_zero():
        write_json(record, {"settings": settings, **measured})


@torch.no_grad()
def state_bytes(model: PreTrainedModel, task: Task, length: int) -> int | None:
    """Size of the state, or of the keys and values, after one sequence.

    It is `None` for a model that cannot use its cache: Qwen3-Next without a layer of softmax attention.
    """
    input_ids, _ = task.sample(1, length, seeded(TEST, length))
    try:
        _, cache = read(model.eval(), input_ids.to(model.device))
    except ValueError:
        return None
    return cache.num_bytes if isinstance(cache, StackformerCache) else bytes_of(cache)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    task: Task,
    length: int,
    num_test: int,
    batch_size: int = 64,
    chunk_length: int | None = None,
) -> dict[str, float | None]:
    """Accuracies on the task's test sequences of one length, and the mean ponder steps if the model has any.

    The sequences depend on nothing but the task, the length and their number.
    """
    input_ids, labels = task.sample(num_test, length, seeded(TEST, length))
    batches = [_predict(model, batch, chunk_length) for batch in input_ids.to(model.device).split(batch_size)]
    predictions, steps = zip(*batches, strict=True)
    asked = labels != IGNORED
    correct = (torch.cat(predictions).cpu() == labels) & asked
    last = asked.shape[1] - 1 - asked.flip(1).int().argmax(1, keepdim=True)
    return {
        "accuracy": (correct.sum() / asked.sum()).item(),
        "final": correct.gather(1, last).float().mean().item(),
        "exact": (correct == asked).all(1).float().mean().item(),
        "ponder_steps": None if steps[0] is None else torch.cat(steps).mean().item(),
    }


def train_and_measure(run: Run, args: TaskArguments, training: TrainingArguments) -> None:
    """Do what is missing of a run."""
    train(run, args, training, callbacks=[CountSteps()])
    measure(run, args, training)


def measure(run: Run, args: TaskArguments, training: TrainingArguments) -> None:
    """Add the results that are missing in the run's folder: lengths x depths."""
    results = run.folder / RESULTS
    rows = read_rows(results)
    # A model that was trained with one step has not learned when to stop.
    depths = [run.depth] if args.test_depths is None or run.depth in (None, 1) else args.test_depths
    cells = [
        {
            "length": length,
            "depth": depth,
            "halting_threshold": args.test_halting_threshold,
            "chunk_length": args.chunk_length,
            "num_test": args.num_test,
        }
        for depth, length in product(depths, args.test_lengths)
    ]
    missing = [cell for cell in cells if not any(cell.items() <= row.items() for row in rows)]
    if not missing:
        return
    about = {
        "task": run.task_name,
        "system": run.system,
        "train_depth": run.depth,
        "train_length": args.train_length,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "chance": 1 / run.task.num_answers,
    }
    model = AutoModelForCausalLM.from_pretrained(run.folder).to(training.device).eval()
    for cell in tqdm(missing, desc="test", leave=False, disable=training.disable_tqdm):
        if run.depth is not None:
            model.config.max_ponder_steps = cell["depth"]
            if args.test_halting_threshold is not None:
                model.config.halting_threshold = args.test_halting_threshold
        measured = evaluate(
            model, run.task, cell["length"], args.num_test, training.eval_batch_size, args.chunk_length
        )
        rows.append(about | cell | measured)
        write_text(results, "".join(json.dumps(row) + "\n" for row in rows))


def plan(args: TaskArguments, systems: dict[str, dict[str, Any]], training: TrainingArguments) -> list[Run]:
    """All runs of the grid, so that every task and config is checked before the first one starts.

    Args:
        systems: by name, each with its "preset" and, if any, its "overrides" as text.
    """
    runs: dict[Path, Run] = {}  # by folder: a system without depth has one run for all depths
    options = parse_task_options(args.task_options)
    rates = args.learning_rates or [None]
    for task_name, system, depth, rate, seed in product(
        args.task, systems, args.depths or [None], rates, args.seeds
    ):
        task = build_task(task_name, options)
        config = read_preset(
            **systems[system],
            vocab_size=task.vocab_size,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        if depth is not None and ponder_depth(config) is not None:
            config.max_ponder_steps = depth
            config.validate()
        name = f"depth{ponder_depth(config)}-{'' if rate is None else f'rate{rate:g}-'}seed{seed}"
        folder = Path(training.output_dir) / task_name / system / name
        rate = training.learning_rate if rate is None else rate
        runs[folder] = Run(task_name, task, system, config, rate, seed, folder)
    return list(runs.values())


def ponder_depth(config: PreTrainedConfig) -> int | None:
    """`max_ponder_steps`, or `None` for a model that has no such thing."""
    return config.to_dict().get("max_ponder_steps")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Do what is missing of the grid that `argv` asks for; return the rows of all results in its folder."""
    args, systems, training = parse(argv)
    check_training(training)
    output_dir = Path(training.output_dir)
    work = partial(train_and_measure, args=args, training=training)
    runs = plan(args, systems, training)
    for _ in execute(runs, work, training.max_steps, args.jobs, args.threads, training.disable_tqdm):
        pass  # each run records itself, in its folder
    rows = read_rows(output_dir)
    print(machine_line())
    print_tables(rows)
    draw_or_warn(draw_heat_map, rows, output_dir / "heat_map.png")
    return rows


def parse(argv: list[str] | None) -> tuple[TaskArguments, dict[str, dict[str, Any]], TrainingArguments]:
    """Options of the command line over those of the grid file, and the systems of both.

    Raises:
        ValueError: for an unknown option in the grid file, or without any system.
    """
    parser = make_parser()
    before = argparse.ArgumentParser(add_help=False)
    before.add_argument("--grid")
    systems = {}
    if path := before.parse_known_args(argv)[0].grid:
        check_input_file("grid", path)
        grid = read_json("grid", path)
        systems = _grid_systems(path, grid.pop("systems", {}))
        known = {option.name for option in (*fields(TaskArguments), *fields(TrainingArguments))}
        if unknown := sorted(set(grid) - known):
            raise ValueError(
                f"grid={path!r}: unknown options {unknown}, expected systems and those of --help."
            )
        for option in fields(TaskArguments):
            if "list" in str(option.type) and not isinstance(grid.get(option.name, []), list):
                value = grid[option.name]
                raise ValueError(f"grid={path!r}: expected a list as {option.name}, got {value!r}.")
        parser.set_defaults(**_with_text(grid))
    args, training = parser.parse_args_into_dataclasses(argv)
    systems |= {
        Path(preset).stem: {"preset": preset, "overrides": args.config_overrides} for preset in args.config
    }
    if not systems:
        raise ValueError("config=[]: expected at least one preset, or systems in a grid file.")
    return args, systems, training


def parse_task_options(text: str | None) -> dict[str, Any]:
    """The options of a task from JSON.

    Raises:
        ValueError: if it is no JSON object.
    """
    if not text:
        return {}
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"task_options={text!r}: expected JSON, {error}.") from error
    if not isinstance(options, dict):
        raise ValueError(f'task_options={text!r}: expected a JSON object, such as {{"num_kv_pairs": 8}}.')
    return options


def _grid_systems(path: str, systems: Any) -> dict[str, dict[str, Any]]:
    """The systems of a grid file, each a "preset" and, if any, its "overrides" as text."""
    fits = isinstance(systems, dict) and all(
        isinstance(x, dict) and "preset" in x and set(x) <= {"preset", "overrides"} for x in systems.values()
    )
    if not fits:
        raise ValueError(
            f'grid={path!r}: expected systems as {{name: {{"preset": file, "overrides": fields}}}}, got '
            f"{systems}."
        )
    return {name: _with_text(system) for name, system in systems.items()}


def _with_text(options: dict[str, Any]) -> dict[str, Any]:
    """JSON objects in a grid file become text, as they are on the command line."""
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in options.items()}


def _predict(
    model: PreTrainedModel, input_ids: Tensor, chunk_length: int | None
) -> tuple[Tensor, Tensor | None]:
    """The likeliest token and the ponder steps, if the model has any, at each position [B, T]."""
    if chunk_length is None:
        chunks = [model(input_ids=input_ids, use_cache=False)]
    else:
        cache, chunks = None, []
        for chunk in input_ids.split(chunk_length, dim=1):
            chunks.append(model(input_ids=chunk, use_cache=True, **{CACHE_NAME: cache}))
            cache = chunks[-1][CACHE_NAME]
    predictions = torch.cat([outputs.logits.argmax(-1) for outputs in chunks], dim=1)
    steps = [outputs.get("ponder_steps") for outputs in chunks]
    return predictions, None if steps[0] is None else torch.cat(steps, dim=1)


__all__ = [
    "Run",
    "TaskArguments",
    "TaskCollator",
    "build_task",
    "evaluate",
    "main",
    "measure",
    "plan",
    "train",
]


if __name__ == "__main__":
    run_main(main)
