# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Time that halting saves: training, prefill and decoding of a model some of whose tokens are done early.

    python -m benchmarks.halting --shares 0 0.25 0.5 0.75 1 --batch_size 1 8 64 --json outputs/halting.json

The sides are one model whose action projection is set by hand: a share of the tokens returns from the stack
with certainty at the first ponder step, the others stay, as their thoughts fall to one side or the other of a
plane. "full depth" is that model with `halting_threshold=0`, which computes every token at every step and
does not look who is done; "one step" is it with a single ponder step, the most that could be saved. All take
turns. Their difference says what P - 1 ponder steps of all tokens take, and so what share of the core's time
halting saves:
    (time at full depth - time) / (time at full depth - time of one step) * (P - 1) / P
It stands beside the share of token-steps that the core was not called for, as counted at the core's first
layer. Before anything is timed, that count must be the number of token-steps that the trace says were active.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import harness, models
from benchmarks.training import training_step
from experiments.command_line import COUNT, SHARE, run_main
from experiments.rows import STACK
from stackformer.processing_stack import POP

FULL, ONE = "full depth", "one step"
# Difference of the logits at which an action is as good as certain: e^-20 is far below any threshold.
CERTAIN = 20.0


@torch.no_grad()
def returning(model: PreTrainedModel, share: float, ids: Tensor) -> PreTrainedModel:
    """A copy of `model` in which `share` of the tokens `ids` returns at the first ponder step."""
    model = copy.deepcopy(model)
    action = model.model.action_proj
    thoughts = model(ids, output_hidden_states=True, use_cache=False).hidden_states[1].flatten(0, 1)
    normal = torch.randn(thoughts.shape[1], generator=torch.Generator().manual_seed(0)).to(thoughts)
    height = thoughts @ normal
    # Between the heights of two tokens, or where no normalised thought is, for a share of 0 or 1.
    levels, beyond = height.unique(), 2 * normal.norm() * thoughts.shape[1] ** 0.5
    levels = torch.cat([-beyond[None], (levels[1:] + levels[:-1]) / 2, beyond[None]])
    below = (height.unsqueeze(1) < levels).float().mean(0)
    level = levels[(below - share).abs().argmin()]
    slope = CERTAIN / (height - level).abs().min()
    action.weight.zero_()
    action.bias.zero_()
    action.weight[POP] = -slope * normal * thoughts.shape[1] ** 0.5
    action.bias[POP] = slope * level
    return model


def variant(model: PreTrainedModel, **fields) -> PreTrainedModel:
    """A copy of `model` with other values in its config."""
    model = copy.deepcopy(model)
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


def sides(model: PreTrainedModel, shares: list[float], ids: Tensor) -> dict[str, PreTrainedModel]:
    """Every side's model."""
    deepest = returning(model, 0.0, ids)
    result = {FULL: variant(deepest, halting_threshold=0.0), ONE: variant(deepest, max_ponder_steps=1)}
    return result | {f"{share:.0%} return at once": returning(model, share, ids) for share in shares}


@torch.no_grad()
def halted(model: PreTrainedModel, ids: Tensor) -> float:
    """Share of the token-steps that the core is not called for."""
    computed = 0

    def count(_, inputs):
        nonlocal computed
        computed += len(inputs[0])

    hook = model.model.layers[0].register_forward_pre_hook(count)
    active = model(ids, use_cache=False, output_stack_trace=True).stack_trace.active
    hook.remove()
    if computed != active.sum():
        raise RuntimeError(f"the core was called for {computed} token-steps, {active.sum()} were active")
    return 1 - computed / active.numel()


def prefill(model: PreTrainedModel, ids: Tensor) -> harness.Work:
    """Reading `ids` into a cache."""
    return torch.no_grad()(lambda: models.read(model.eval(), ids))


def training(model: PreTrainedModel, ids: Tensor) -> harness.Work:
    """A step whose learning rate of 0 leaves the actions as they are."""
    return training_step(model.train(), ids, learning_rate=0.0)


def decode(model: PreTrainedModel, ids: Tensor) -> harness.Work:
    """Reading `ids` [B, T] token by token."""
    cache = models.read(model.eval(), ids[:, :1])[1]

    @torch.no_grad()
    def work():
        nonlocal cache
        for t in range(ids.shape[1]):
            _, cache = models.read(model, ids[:, t : t + 1], cache)

    return work


def measure(
    what: str, make: Callable, model: PreTrainedModel, ids: Tensor, args: argparse.Namespace
) -> list[harness.Row]:
    """The rows of one use of the model."""
    every = sides(model, args.shares, ids)
    shares = {name: halted(side, ids) for name, side in every.items() if name != ONE}
    works = {name: make(side, ids) for name, side in every.items()}
    case = {"use": what, "batch": ids.shape[0], "T": ids.shape[1], "tokens": ids.numel()}
    rows = harness.measure(case, works, args, base=FULL, halted=shares)
    seconds = {row["side"]: row["seconds"] for row in rows}
    steps = model.config.max_ponder_steps
    core = (seconds[FULL] - seconds[ONE]) * steps / (steps - 1)
    for row in rows:
        row["core_time_saved"] = (seconds[FULL] - row["seconds"]) / core
    return rows


def main(argv: list[str] | None = None) -> dict:
    """Measure as `argv` says (default: the command line)."""
    parser = harness.parser(__doc__)
    harness.add_timing(parser, repeats=7)
    models.add_arguments(parser, (STACK,))
    parser.add_argument(
        "--shares", type=SHARE, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="shares of the tokens that return at the first ponder step",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size", type=COUNT, nargs="+", default=[1, 8, 64], help="rows decoded together"
    )
    parser.add_argument(
        "--time", type=COUNT, default=2048, help="tokens T of a training step and of a prompt"
    )
    parser.add_argument("--tokens", type=COUNT, default=16, help="tokens decoded in a timed call")
    args = parser.parse_args(argv)
    built = models.build_all(args)
    rows = []
    for model in built.values():
        ids = models.random_ids(1, args.time, args.device)
        rows += measure("training", training, model, ids.view(-1, min(512, args.time)), args)
        rows += measure("prefill", prefill, model, ids, args)
        for batch in args.batch_size:
            ids = models.random_ids(batch, args.tokens, args.device)
            rows += measure(f"decoding, batch {batch}", decode, model, ids, args)
    tables = {
        "Models": models.describe(built),
        f"Time (in brackets: times {FULL})": harness.table(rows, "use", harness.milliseconds),
        "Share of the core's time that is saved, of the share of its token-steps that halt": harness.table(
            [row for row in rows if row["side"] not in (FULL, ONE)],
            "use",
            lambda row: f"{row['core_time_saved']:.0%} of {row['halted']:.0%}",
        ),
    }
    return harness.report(args, rows, tables)


if __name__ == "__main__":
    run_main(main)
