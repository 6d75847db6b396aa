# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Traces of the processing stack at every token of a text, as arrays, as an HTML page, and as a picture.

The page is one HTML file that needs no network. Its template is in stack_trace_page.py.

Letters: T tokens, P ponder steps, S stack levels, L core layers, H heads, N memory banks.
"""

import base64
import html
import json
import math
import os
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from .configuration_stackformer import StackformerConfig
from .files import replaced_file, write_file
from .mixer import BankWeights
from .stack_trace_page import PAGE
from .token_layout import TokenLayout

# The most tokens that one UTF-8 character can be split into.
_MAX_PIECES = 4
# Columns of a line of text in a picture.
_LINE = 100
# The most tokens whose text fits along the axis of a picture.
_LABELLED = 120
# Visible symbols for invisible characters.
_VISIBLE = {"\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}


@dataclass
class StackTrace(ModelOutput):
    """The actions and bank weights of every token at every ponder step. Zeros where it was not active.

    Args:
        active (`torch.BoolTensor` [B, T, P]): whether the token was computed.
        pointer (`torch.FloatTensor` [B, T, P, S]): probability mass on each stack level, before the step.
        actions (`torch.FloatTensor` [B, T, P, 3]): probabilities of push, no-op and pop. At the last step,
            and at the step at which a token halts, all mass is dropped, whatever the actions are.
        bank_reads, bank_writes (`torch.FloatTensor` [B, T, P, L, H, N]): weights of the memory banks.
            Zeros for core layers without banks. `None` if no layer has banks.
        bank_decays (`torch.FloatTensor` [B, T, P, L, H, N]): logarithm of the decay factor of each bank, at
            most 0, for a level that holds all mass. For other levels, it is multiplied by their mass.
        step_sizes (`torch.FloatTensor` [B, T, P, L, H]): the fraction of its error that a layer of the delta
            rule corrects; 1 for layers whose banks add. `None`, like the fields above, if no layer has banks.
    """

    active: Tensor | None = None
    pointer: Tensor | None = None
    actions: Tensor | None = None
    bank_reads: Tensor | None = None
    bank_writes: Tensor | None = None
    bank_decays: Tensor | None = None
    step_sizes: Tensor | None = None

    @staticmethod
    def of_step(
        layout: TokenLayout, pointer: Tensor, actions: Tensor, bank_weights: list[BankWeights | None]
    ) -> list[Tensor]:
        """Returns the fields at one ponder step for all tokens of the batch, [B, T, ...] each.

        Args:
            layout: of the n active tokens; pointer: [n, S]; actions: [n, 3].
            bank_weights: of each layer, or `None` for a layer without banks.
        """
        active = layout.thinking
        if active is None:
            active = torch.ones_like(pointer[:, 0], dtype=torch.bool)
        traced = [active, pointer, actions]
        some = next((weights for weights in bank_weights if weights is not None), None)
        if some is not None:
            none = tuple(map(torch.zeros_like, some))
            by_layer = [none if weights is None else weights for weights in bank_weights]
            # L times [n, H, ...] -> [n, L, H, ...]
            traced += [torch.stack(weights, dim=1) for weights in zip(*by_layer, strict=True)]
        return [
            layout.scatter(x, x.new_zeros(layout.batch_size, layout.length, *x.shape[1:])) for x in traced
        ]

    @classmethod
    def of_steps(cls, steps: list[list[Tensor]], num_steps: int) -> "StackTrace":
        """Joins the fields of each step to a trace of `num_steps` steps. Steps that did not run are zeros."""
        padded = steps + [[torch.zeros_like(x) for x in steps[0]]] * (num_steps - len(steps))
        # P times [B, T, ...] -> [B, T, P, ...]
        return cls(*(torch.stack(tensors, dim=2) for tensors in zip(*padded, strict=True)))


@dataclass(frozen=True)
class TextTrace:
    """The trace of one text, with its tokens, as `model.stack_trace(text, tokenizer)` returns it.

    Args:
        tokens (`list[str]`): the text of each token. Joined, they are the whole text. If a character is split
            into several tokens, its last token has the character, and the others have empty strings.
        ids (`np.ndarray` [T]): the tokens' ids.
        surprise (`np.ndarray` [T]): -log2 of each token's probability given the tokens before it, in bits;
            NaN for the first.
        ponder_steps (`np.ndarray` [T]): expected number of ponder steps.
        active (`np.ndarray` [T, P]): whether the token was computed at the step.
        pointer (`np.ndarray` [T, P, S]): probability mass on each stack level, before the step.
        actions (`np.ndarray` [T, P, 3]): probabilities of push, no-op and pop.
        bank_reads, bank_writes (`np.ndarray` [T, P, L, H, N]): weights of the memory banks. `None`, like
            `bank_decays` and `step_sizes`, for a model whose mixers have no banks.
        bank_decays (`np.ndarray` [T, P, L, H, N]): logarithm of the decay factor of each bank, at full mass.
        step_sizes (`np.ndarray` [T, P, L, H]): the fraction of its error that a layer of the delta rule
            corrects; 1 for layers whose banks add.
        delta_layers (`list[int]`): the core layers of the delta rule. Page and picture show the step sizes of
            these only.
        max_step_size (`float`): the largest step size that the model allows.
    """

    tokens: list[str]
    ids: np.ndarray
    surprise: np.ndarray
    ponder_steps: np.ndarray
    active: np.ndarray
    pointer: np.ndarray
    actions: np.ndarray
    bank_reads: np.ndarray | None
    bank_writes: np.ndarray | None
    bank_decays: np.ndarray | None
    step_sizes: np.ndarray | None
    delta_layers: list[int]
    max_step_size: float

    @classmethod
    def from_outputs(
        cls,
        ids: Tensor,
        outputs: ModelOutput,
        tokenizer: PreTrainedTokenizerBase,
        config: StackformerConfig,
    ) -> "TextTrace":
        """Makes the trace of ids [1, T] from a causal language model's outputs with `output_stack_trace`."""
        trace = outputs.stack_trace
        nats = torch.nn.functional.cross_entropy(
            outputs.logits[0, :-1].float(), ids[0, 1:].to(outputs.logits.device), reduction="none"
        )
        reads, writes, decays, step_sizes = (
            None if tensor is None else _to_numpy(tensor[0])
            for tensor in (trace.bank_reads, trace.bank_writes, trace.bank_decays, trace.step_sizes)
        )
        return cls(
            tokens=split_text(ids[0].tolist(), tokenizer),
            ids=_to_numpy(ids[0]),
            surprise=np.append(math.nan, _to_numpy(nats) / math.log(2)),
            ponder_steps=_to_numpy(outputs.ponder_steps[0]),
            active=_to_numpy(trace.active[0]),
            pointer=_to_numpy(trace.pointer[0]),
            actions=_to_numpy(trace.actions[0]),
            bank_reads=reads,
            bank_writes=writes,
            bank_decays=decays,
            step_sizes=step_sizes,
            delta_layers=[i for i, name in enumerate(config.mixer_types) if name == "banked_delta_rule"],
            max_step_size=config.max_step_size,
        )

    @property
    def mass(self) -> np.ndarray:
        """Probability mass on the stack before each step [T, P]."""
        return self.pointer.sum(-1)

    @property
    def finished(self) -> np.ndarray:
        """Probability mass that left the stack at each step [T, P]. It sums to 1 over the steps."""
        return -np.diff(self.mass, axis=-1, append=0)

    @property
    def banks(self) -> dict[str, np.ndarray]:
        """The read weights, write weights, and the fraction that each bank forgets at full mass, by name.

        [T, P, L, H, N] each, with zeros where a token was not active. Empty for a model without banks.
        """
        if self.bank_reads is None or self.bank_writes is None or self.bank_decays is None:
            return {}
        forgotten = -np.expm1(self.bank_decays)
        return {"read": self.bank_reads, "written": self.bank_writes, "forgotten": forgotten}

    @property
    def delta_step_sizes(self) -> np.ndarray | None:
        """The step sizes of the D layers of the delta rule [T, P, D, H]. `None` for a model without any."""
        if self.step_sizes is None or not self.delta_layers:
            return None
        return self.step_sizes[:, :, self.delta_layers]

    def over_steps(self, weights: np.ndarray) -> np.ndarray:
        """Returns the mean [T, L, N] of `weights` [T, P, L, H, N] over heads and steps, weighted by mass."""
        share = self.mass / self.mass.sum(-1, keepdims=True)
        return np.einsum("tp,tplhn->tln", share, weights) / weights.shape[3]

    def to_html(self, path: str | os.PathLike | None = None) -> str:
        """Returns the trace as an interactive HTML page, in one file that needs no network.

        The page stores 16 bits for each number: about 8 P (1 + S + L H N) bytes for each token, and 3 P H for
        each layer of the delta rule.

        Args:
            path: the file to write the page to, if any. It is replaced as a whole.

        Returns:
            The page.
        """
        # A "<" in the data could end the script element that holds it.
        data = json.dumps(self._page_data(), separators=(",", ":")).replace("<", "\\u003c")
        page = PAGE.replace("{{data}}", data)
        if path is not None:
            write_file(path, page.encode("utf-8"))
        return page

    def _page_data(self) -> dict[str, Any]:
        """Returns the data of the page, as values for JSON."""
        arrays = {"pointer": self.pointer, "actions": self.actions, "finished": self.finished, **self.banks}
        scales = dict.fromkeys(arrays, 1.0)
        step_sizes = self.delta_step_sizes
        if step_sizes is not None:  # as a bank of one number: [T, P, D, H, 1]
            arrays["step size"], scales["step size"] = step_sizes[..., None], self.max_step_size
        return {
            "tokens": self.tokens,
            "ids": self.ids.tolist(),
            "surprise": [None if math.isnan(bits) else round(bits, 4) for bits in self.surprise.tolist()],
            "depth": [round(steps, 4) for steps in self.ponder_steps.tolist()],
            "steps": self.active.sum(-1).tolist(),
            "delta_layers": self.delta_layers,
            "arrays": {
                name: {
                    "shape": array.shape,
                    "scale": scales[name],
                    "data": _fixed_point(array / scales[name]),
                }
                for name, array in arrays.items()
            },
        }

    def _repr_html_(self) -> str:
        """Returns the page in a frame, for notebooks."""
        page = html.escape(self.to_html())
        return f'<iframe srcdoc="{page}" style="width:100%;height:760px;border:0"></iframe>'

    def __repr__(self) -> str:
        return f"TextTrace of {len(self.tokens)} tokens, {self.ponder_steps.mean():.2f} ponder steps each"

    def to_png(self, path: str | os.PathLike) -> None:
        """Draws the trace to a PNG file.

        The picture has the text coloured by depth, and below it, for each token: surprise and depth, the mass
        that leaves the stack at each step, the stack pointer, the read weights, write weights and decay of
        each bank (mean over heads and steps, weighted by mass), and the step sizes of each head of the delta
        rule (mean over steps), from white for 0 to dark for the largest that the model allows.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("pictures are drawn with matplotlib: pip install matplotlib") from error
        count, levels = self.pointer.shape[1:]
        # Title, values [T, rows], names of the rows, and where the colours end if not at the largest value.
        panels: list[tuple[str, np.ndarray, list[str], float | None]] = [
            ("Finished", self.finished, [f"step {p + 1}" for p in range(count)], None),
            (
                "Stack pointer",
                self.pointer[..., ::-1].reshape(len(self.tokens), -1),  # [T, P S], level 0 in the lowest row
                [f"step {p + 1}, level {s + 1}" for p in range(count) for s in reversed(range(levels))],
                None,
            ),
        ]
        for name, weights in self.banks.items():
            layers, _, banks = weights.shape[2:]
            rows = [f"layer {i + 1}, bank {n + 1}" for i in range(layers) for n in range(banks)]
            values = self.over_steps(weights).reshape(len(self.tokens), -1)
            panels.append((f"Banks {name}", values, rows, None))
        step_sizes = self.delta_step_sizes
        if step_sizes is not None:
            heads = step_sizes.shape[3]
            rows = [f"layer {i + 1}, head {h + 1}" for i in self.delta_layers for h in range(heads)]
            each = step_sizes.reshape(*step_sizes.shape[:2], -1, 1, 1)  # [T, P, D H, 1, 1], each head alone
            title = "Step size of the delta rule: 1 replaces what is held for the key, more reflects it"
            panels.append((title, self.over_steps(each)[..., 0], rows, self.max_step_size))

        lines = self._lines()
        heights = [0.2 * len(lines), 1.1, *(0.14 * len(rows) for _, _, rows, _ in panels)]
        figure = Figure(figsize=(11, sum(heights) + 0.4 * len(heights)), layout="constrained")
        axes = figure.subplots(len(heights), 1, height_ratios=heights)
        for axis in axes[1:-1]:
            axis.sharex(axes[-1])
            axis.tick_params(bottom=False, labelbottom=False)
        self._draw_text(axes[0], lines)
        self._draw_depth(axes[1])
        for axis, (title, values, rows, high) in zip(axes[2:], panels, strict=True):
            image = axis.imshow(
                values.T, aspect="auto", cmap="Blues", vmin=0, vmax=high, interpolation="nearest"
            )
            axis.set_yticks(range(len(rows)), rows, fontsize=6)
            _style(axis, title)
            bar = figure.colorbar(image, ax=axis, pad=0.005, fraction=0.02, aspect=10)
            bar.ax.tick_params(labelsize=6, length=2)
            bar.outline.set_visible(False)
        axes[-1].set_xlabel("token", fontsize=8)
        if len(self.tokens) <= _LABELLED:
            labels = [
                "".join(_VISIBLE.get(character, character) for character in token) for token in self.tokens
            ]
            turned = 90 if any(len(label) > 1 for label in labels) else 0
            axes[-1].set_xticks(
                range(len(labels)), labels, family="monospace", rotation=turned, parse_math=False
            )
        with replaced_file(path) as file:
            figure.savefig(file, format="png", dpi=110)

    def _lines(self) -> list[list[tuple[str, int, int, int]]]:
        """Breaks the text into lines of (character, column, width, token). Wide characters have width 2."""
        lines: list[list[tuple[str, int, int, int]]] = [[]]
        column = 0
        for index, token in enumerate(self.tokens):
            for character in token:
                if column >= _LINE:
                    lines.append([])
                    column = 0
                width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
                lines[-1].append((character, column, width, index))
                column = _LINE if character == "\n" else column + width
        return lines

    def _draw_text(self, axis: Any, lines: list[list[tuple[str, int, int, int]]]) -> None:
        """Draws the characters on cells whose colour is the depth of their token."""
        cells = np.full((len(lines), _LINE + 1), np.nan)
        for row, line in enumerate(lines):
            for character, column, width, index in line:
                cells[row, column : column + width] = self.ponder_steps[index]
                shown = _VISIBLE.get(character, character)
                if shown.isspace():
                    continue
                axis.text(
                    column + (width - 1) / 2,
                    row,
                    shown,
                    family="monospace",
                    fontsize=9,
                    ha="center",
                    va="center",
                    color="0.1" if shown == character else "0.6",
                    parse_math=False,
                )
        low, high = self.ponder_steps.min(), self.ponder_steps.max()
        # Cells use only the lighter half of the colour map, so that the text on them can be read.
        axis.imshow(cells, aspect="auto", cmap="Blues", vmin=low, vmax=low + 2 * max(high - low, 1e-6))
        axis.set_yticks([])
        axis.set_xticks([])
        _style(axis, f"Expected ponder steps, from {low:.2f} (light) to {high:.2f} (dark)")

    def _draw_depth(self, axis: Any) -> None:
        """Draws surprise as bars and expected ponder steps as a line."""
        positions = np.arange(len(self.tokens))
        axis.bar(positions, np.nan_to_num(self.surprise), color="#c9c9c9", width=1)
        axis.set_ylabel("surprise, bits", fontsize=7, color="0.5")
        steps = axis.twinx()
        steps.step(positions, self.ponder_steps, where="mid", color="#2166ac", linewidth=1)
        steps.set_ylabel("ponder steps", fontsize=7, color="#2166ac")
        steps.tick_params(labelsize=6, length=2)
        steps.spines[:].set_visible(False)
        axis.set_xlim(-0.5, len(positions) - 0.5)
        _style(axis, "Surprise and expected ponder steps")


def split_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the part of the decoded text that each token adds.

    Tokens that end inside of a character add an empty string. The last token of the character adds all of it.
    """
    texts: list[str] = []
    # Tokens before `shown` have their text. Decoding begins earlier, at `start`, because some tokenizers
    # decode the first token of a text differently.
    start = shown = 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[start:shown], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end - shown < _MAX_PIECES and end < len(ids):
            texts.append("")
        else:
            texts.append(text[len(before) :])
            start, shown = shown, end
    return texts


def _style(axis: Any, title: str) -> None:
    """Gives a panel its title, small ticks and no frame."""
    axis.set_title(title, loc="left", fontsize=8, color="0.2")
    axis.tick_params(labelsize=6, length=2)
    axis.spines[:].set_visible(False)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """Converts a tensor to NumPy, floating-point numbers as float64, because NumPy has no bfloat16."""
    return (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()


def _fixed_point(array: np.ndarray) -> str:
    """Encodes numbers from 0 to 1 with 16 bits each, little-endian, as base64."""
    return base64.b64encode(np.rint(array.clip(0, 1) * 65535).astype("<u2").tobytes()).decode("ascii")


__all__ = ["TextTrace", "split_text"]
