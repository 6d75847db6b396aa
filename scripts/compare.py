# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Compare language models of equal size on enwik8 or text8: bits per character, speed, size of the state.

    python -m scripts.compare --data_path enwik8 --steps 300
    python -m scripts.compare --dataset text8 --data_path text8 --rows "delta rule" RWKV --seeds 1 2 3
    python -m scripts.compare --dataset text8 --data_path enwik8   # made of its pages first: scripts/text8.py

All models have a million parameters, within 2%, and see the same batches under the same schedule. They train
on the first 90% of the file and are tested on its last 5%, block by block, each from its own start. The
output folder gets a table (report.md), a picture (report.png), and the runs that are finished (runs.jsonl),
which are not repeated: a command that was stopped goes on from there.

Where pytorch-fast-transformers is installed, linear attention is trained with its operator, too, once that
was seen to give the logits that ours gives: scores differ by rounding then, and the speed is to be looked at.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments import study
from experiments.command_line import Parser, check_output_folder, run_main
from experiments.presets import read_preset
from experiments.report import draw_or_warn, machine_line, write_text
from experiments.rows import COMPARED, FAST_TRANSFORMERS, Row
from experiments.text8 import is_dump, write_text8
from stackformer.configuration_stackformer import StackformerConfig
from stackformer.core_stackformer import MIXERS
from stackformer.layers_stackformer import convolve
from stackformer.mixer_banked_linear_attention import BankedLinearAttention
from stackformer.token_layout import TokenLayout

try:
    from fast_transformers.attention import CausalLinearAttention
    from fast_transformers.masking import LengthMask, TriangularCausalMask
except ImportError:
    CausalLinearAttention = None


DEFAULT_ROWS = [name for name in COMPARED if name != FAST_TRANSFORMERS or CausalLinearAttention is not None]
TOLERANCE = 1e-4


class FastTransformersAttention(BankedLinearAttention):
    """Banked linear attention with the operator of pytorch-fast-transformers: no decay, one bank, whole texts
    without padding."""

    def forward(
        self,
        hidden: Tensor,
        pointer: Tensor,
        layout: TokenLayout,
        state: None = None,
        inputs: None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], None]:
        """Mix the tokens along time. There is no state to go on from."""
        if state is not None or layout.row_lengths is not None:
            raise ValueError(f"`state` must be None and rows of equal length, got {state} and {layout}")
        rows = layout.to_rows(self.qkv_proj(hidden))
        rows, _ = convolve(self.conv, self.kernel_size, rows, None, layout)
        query, key, value = rows.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        lengths = LengthMask(torch.full((len(rows),), rows.shape[1], device=rows.device))
        attention = CausalLinearAttention(self.head_dim)
        mixed = attention(
            query, key, value, TriangularCausalMask(rows.shape[1], rows.device), lengths, lengths
        )
        mixed = self.norm(layout.to_tokens(mixed)).flatten(1)
        return self.o_proj(nn.functional.silu(self.gate_proj(hidden)) * mixed), (), None


MIXERS["fast_transformers"] = FastTransformersAttention


def config_of(row: Row, **given: Any) -> StackformerConfig:
    """The config of a row, with the fields that are `given`."""
    return read_preset(row.path, row.overrides, **given)


@torch.no_grad()
def check_agreement(length: int) -> PreTrainedModel:
    """Our model of the row that fast-transformers computes, after it was seen to have the same logits.

    Raises:
        ValueError: if they differ by more than 1e-4.
    """
    ours, theirs = (
        AutoModelForCausalLM.from_config(config_of(COMPARED[name]))
        for name in ("linear attention", FAST_TRANSFORMERS)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():  # a new model's mixers are not heard: their projections are zero
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 256, (2, length), generator=generator)
    difference = (ours(ids, use_cache=False).logits - theirs(ids, use_cache=False).logits).abs().max().item()
    if difference > TOLERANCE:
        raise ValueError(f"{FAST_TRANSFORMERS}: expected logits that differ by {TOLERANCE}, got {difference}")
    return ours


def measure(run: study.Run, args: argparse.Namespace) -> dict[str, Any]:
    """`study.measure`; what fast-transformers computes is compared first, and has the state of ours."""
    if run.row != FAST_TRANSFORMERS:
        return study.measure(run, args)
    ours = check_agreement(args.block_size)
    model, tokenizer, texts = study.build(run, args)
    model.config.use_cache = False
    measured, _ = study.train(model, tokenizer, texts, run.seed, args)
    return measured | {"state_bytes": study.state_bytes(ours, args.block_size)}


def report(rows: study.Rows, args: argparse.Namespace) -> str:
    """Markdown."""
    columns = {
        "parameters": lambda row: f"{row['parameters'].median / 1000:,.0f} k",
        "bits per character": lambda row: row["bits_per_byte"].text(".3f"),
        "training, tokens/s": lambda row: row["tokens_per_second"].text(",.0f"),
        f"state after {args.block_size} tokens": lambda row: f"{row['state_bytes'].median / 1000:,.0f} kB",
    }
    notes = "\n".join(f"- {name}: {COMPARED[name].note}" for name in rows)
    seeds = ", ".join(map(str, args.seeds))
    return f"""# Language models of equal size on {args.dataset}

Trained with {args.steps} steps of {args.batch_size} x {args.block_size} bytes out of {args.train_range},
learning rate {args.learning_rate:g}, seeds {seeds}. Negative log-likelihood of {args.eval_range}, in blocks
that are predicted from their own start.

{study.table(rows, columns)}

![The same as a picture](report.png)

{notes}

{machine_line()}
"""


def main(argv: list[str] | None = None) -> study.Rows:
    """Run what `argv` says (default: the command line); medians and ranges of each row."""
    parser = Parser(description=__doc__.split("\n")[0])
    study.add_arguments(parser)
    parser.set_defaults(steps=300, learning_rate=3e-3)
    parser.add_argument("--dataset", choices=["enwik8", "text8"], default="enwik8", help="what the file is")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=DEFAULT_ROWS,
        choices=DEFAULT_ROWS,
        metavar="ROW",
        help=", ".join(COMPARED),
    )
    parser.add_argument("--output_dir", default="outputs/compare", help="folder of the report")
    args = parser.parse_args(argv)
    if not Path(args.data_path).is_file():
        parser.error(f"--data_path must be a file, got {args.data_path!r}")
    check_output_folder("output_dir", args.output_dir)
    study.check(args)
    folder = Path(args.output_dir)
    if args.dataset == "text8" and is_dump(args.data_path):
        source, args.data_path = args.data_path, str(folder / "text8")
        write_text8(source, args.data_path)
    size = Path(args.data_path).stat().st_size
    args.train_range = args.train_range or f"0:{size * 90 // 100}"
    args.eval_range = args.eval_range or f"{size * 95 // 100}:{size}"

    runs = [
        study.Run(name, COMPARED[name].path, COMPARED[name].overrides, seed)
        for seed in args.seeds
        for name in args.rows
    ]
    lines = study.run_all(runs, measure, args, folder / "runs.jsonl")
    measured = ("bits_per_byte", "parameters", "tokens_per_second", "state_bytes")
    rows = study.summarize(lines, measured)
    text = report(rows, args)
    write_text(folder / "report.md", text)
    panels = {
        "bits_per_byte": "bits per character",
        "tokens_per_second": "training, tokens/s",
        "state_bytes": "bytes of state",
    }
    print(text)
    draw_or_warn(study.draw, rows, panels, folder / "report.png", logarithmic=["state_bytes"])
    return rows


if __name__ == "__main__":
    run_main(main)
