# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Titans' neural memory, ours beside titans-pytorch's: speed, memory, and recall.

    pip install "stackformer[titans]"
    python -m benchmarks.titans --time 256 1024 4096 --json outputs/titans.json
    python -m benchmarks.titans --time --recall outputs/titans

Both are mixers of the same width, with as many heads, each with a network of two square layers as its
memory, and gradients at the weights at the start of a chunk, which titans-pytorch calls `batch_size`. Its
`chunk_size` is that of its gates, and of the weights that it reads with. Ours has both for every token, as
the paper has: that is a `chunk_size` of 1, which forms the weights after every token. A larger one is what
its README has, and less work than ours. What is timed is forward and backward of the mixer alone. Ours has a
short convolution and clips gradients, theirs normalises its inputs and the memory's output. Before anything
is timed, changing later tokens must change nothing that was read before.

Recall is `benchmarks.tasks.run` with the grid `benchmarks/tasks/titans.json`: the same model around both. In
it, theirs has a convolution in front, without which nothing tells a token what stands before it, and forgets
as little as ours at first; by default it is half of everything in every chunk.
"""

import argparse
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.models import build
from benchmarks.tasks import run
from experiments.command_line import COUNT, NATURAL, check_output_folder, run_main
from stackformer import StackformerConfig
from stackformer.core_stackformer import MIXERS
from stackformer.layers_stackformer import ShortConvolution, convolve
from stackformer.mixer import Mixer
from stackformer.state import StateSpec
from stackformer.token_layout import TokenLayout

try:
    from titans_pytorch import NeuralMemory
except ImportError as error:
    raise ImportError('titans-pytorch is missing: pip install "stackformer[titans]"') from error

OURS, PER_TOKEN, PER_CHUNK = "ours", "titans-pytorch, gates per token", "titans-pytorch, gates per chunk"
GRID = "benchmarks/tasks/titans.json"


class TitansPytorch(Mixer):
    """titans-pytorch's memory as a mixer, for whole texts: it keeps no state."""

    def __init__(self, config: StackformerConfig, gates_per_token: bool):
        super().__init__()
        size = config.core_size
        self.kernel_size = config.conv_kernel_size
        self.conv = ShortConvolution.of(size, self.kernel_size)
        self.memory = NeuralMemory(
            size,
            chunk_size=1 if gates_per_token else config.memory_chunk_size,
            batch_size=config.memory_chunk_size,
            dim_head=size // config.num_attention_heads,
            heads=config.num_attention_heads,
            init_decay_bias=-4.6,
            default_model_kwargs={"depth": config.memory_depth, "expansion_factor": 1.0},
        )
        for parameter in self.memory.parameters():  # heads share one, expanded: no optimizer takes that
            parameter.data = parameter.data.contiguous()
        for module in self.memory.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # the initial values are its own

    def state_spec(self) -> StateSpec:
        """Nothing."""
        return ()

    def forward(
        self,
        hidden: Tensor,
        pointer: Tensor,
        layout: TokenLayout,
        state: None = None,
        inputs: None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, tuple[()], None]:
        rows, _ = convolve(self.conv, self.kernel_size, layout.to_rows(hidden), None, layout)
        return layout.to_tokens(self.memory(rows)[0]), (), None


MIXERS["titans_pytorch"] = partial(TitansPytorch, gates_per_token=True)
MIXERS["titans_pytorch_chunks"] = partial(TitansPytorch, gates_per_token=False)
SIDES = {OURS: "neural_memory", PER_TOKEN: "titans_pytorch", PER_CHUNK: "titans_pytorch_chunks"}


class Mixer(nn.Module):
    """The mixer of a new model of one layer, on rows [B, T, d]."""

    def __init__(self, args: argparse.Namespace, name: str):
        super().__init__()
        config = StackformerConfig(
            hidden_size=args.heads * args.head_dim, bottleneck_size=None, num_hidden_layers=1,
            num_attention_heads=args.heads, stack_depth=1, max_ponder_steps=1, mixer_types=[name],
            memory_chunk_size=args.chunk_size,
        )  # fmt: skip
        self.mixer = build(config).model.layers[0].mixer
        if not isinstance(self.mixer, TitansPytorch):  # else its output and all gradients are zero
            nn.init.normal_(self.mixer.o_proj.weight, std=config.core_size**-0.5)

    def forward(self, rows: Tensor) -> Tensor:
        if isinstance(self.mixer, TitansPytorch):
            return self.mixer.memory(rows)[0]
        layout = TokenLayout.full(*rows.shape[:2])
        return layout.to_rows(self.mixer(layout.gather(rows), None, layout, None)[0])


@torch.no_grad()
def check(mixers: dict[str, Mixer], args: argparse.Namespace) -> None:
    """Raise an error unless what is read in a first half is the same whatever the second half is."""
    half = 2 * args.chunk_size
    rows = torch.randn(1, 2 * half, args.heads * args.head_dim, device=args.device)
    changed = torch.cat([rows[:, :half], torch.randn_like(rows[:, half:])], dim=1)
    for name, mixer in mixers.items():
        expected, actual = mixer(rows), mixer(changed)
        torch.testing.assert_close(actual[:, :half], expected[:, :half], rtol=1e-4, atol=1e-5)
        if torch.allclose(actual[:, half:], expected[:, half:]):
            raise RuntimeError(f"{name} does not read what it is given")


def measure(length: int, mixers: dict[str, Mixer], args: argparse.Namespace) -> list[harness.Row]:
    """The rows of one length."""
    inputs = torch.randn(args.batch_size, length, args.heads * args.head_dim, device=args.device)

    def work(mixer: Mixer) -> harness.Work:
        def call() -> None:
            mixer.zero_grad()
            mixer(inputs.requires_grad_()).square().mean().backward()

        return call

    sides = {
        name: work(mixer)
        for name, mixer in mixers.items()
        if name != PER_TOKEN or length <= args.max_per_token
    }
    return harness.measure({"T": length}, sides, args, base=OURS, memory=True)


def main(argv: list[str] | None = None) -> dict:
    """Measure as `argv` says (default: the command line)."""
    parser = harness.parser(__doc__)
    harness.add_timing(parser, repeats=7)
    parser.add_argument(
        "--time", type=COUNT, nargs="*", default=[256, 1024, 4096], help="lengths T; may be none"
    )
    parser.add_argument("--batch_size", type=COUNT, default=1, help="batch size")
    parser.add_argument("--heads", type=COUNT, default=4, help="heads")
    parser.add_argument(
        "--head_dim", type=COUNT, default=32, help="size of a head, and of its memory's layers"
    )
    parser.add_argument("--chunk_size", type=COUNT, default=16, help="tokens of a chunk")
    parser.add_argument("--max_per_token", type=NATURAL, default=4096, help=f"longest T of {PER_TOKEN}")
    parser.add_argument("--recall", default=None, help="folder for the runs of recall; none if not given")
    parser.add_argument(
        "--recall_steps", type=COUNT, default=None, help="training steps; the grid's if not given"
    )
    args = parser.parse_args(argv)
    check_output_folder("recall", args.recall)
    mixers = {name: Mixer(args, mixer).to(args.device) for name, mixer in SIDES.items()}
    check(mixers, args)
    rows = [row for length in args.time for row in measure(length, mixers, args)]
    if args.recall is not None:
        steps = [] if args.recall_steps is None else ["--max_steps", str(args.recall_steps)]
        run.main(["--grid", GRID, "--output_dir", args.recall, *steps])
    tables = {
        "Forward and backward": harness.table(rows, "T", harness.milliseconds),
        "Peak memory": harness.table(rows, "T", lambda row: harness.size(row["peak_bytes"])),
    }
    return harness.report(args, rows, tables if rows else {})


if __name__ == "__main__":
    run_main(main)
