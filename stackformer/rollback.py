# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Rolls a recurrent state back: keeps an old state, the anchor, and replays recorded tokens from there.

In general, a recurrence cannot be reversed, and storing a state per token would take too much memory. So
this file records the inputs of the last tokens, which are small, and computes the states in between again.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .state import State, put_rows, take_rows
from .token_layout import TokenLayout

# Computes a layer's new state from its input [n, d], the stack pointer [n, S], the layout of the n tokens,
# and the old state of their rows.
Advance = Callable[[Tensor, Tensor, TokenLayout, State | None], State]


class _Call(NamedTuple):
    """The inputs of one core layer in one call, for one slice of its state."""

    start: int  # tokens since the anchor
    advance: Advance
    hidden: Tensor  # [n, d]
    pointer: Tensor  # [n, S]
    layout: TokenLayout

    def replay(self, state: State | None, stop: int) -> State | None:
        """Returns the state [B, ...] after the tokens of this call that precede token `stop`.

        Args:
            state: of the slice before this call [B, ...]; stop: counted from the anchor.
        """
        keep = self.layout.before(stop - self.start, self.hidden.device).nonzero().squeeze(-1)
        layout = self.layout.select(keep)
        if layout.num_tokens == 0:
            return state
        new = self.advance(self.hidden[keep], self.pointer[keep], layout, take_rows(state, layout.rows))
        return put_rows(state, new, layout)

    def after(self, stop: int) -> "_Call":
        """Returns the part of this call from token `stop` on. Its tokens are counted from `stop`."""
        keep = (~self.layout.before(stop - self.start, self.hidden.device)).nonzero().squeeze(-1)
        layout = self.layout.select(keep)
        return _Call(self.start - stop, self.advance, self.hidden[keep], self.pointer[keep], layout)


class Recording:
    """Records the tokens that a layer reads after the anchor, the state from which they can be replayed.

    Args:
        slices: the present state of each slice, which becomes the anchor.
        window: number of tokens that can be rolled back. At most twice as many are recorded.
    """

    def __init__(self, slices: dict[int, State], window: int):
        self.window = window
        self.restart(slices)

    def restart(self, slices: dict[int, State]) -> None:
        """Makes `slices` the anchor, and forgets all recorded tokens."""
        self._anchor = dict(slices)
        self._calls: dict[int, list[_Call]] = {}
        self.num_tokens = 0

    def copy(self) -> "Recording":
        """Returns an independent copy."""
        other = Recording(self._anchor, self.window)
        other._calls = {index: list(calls) for index, calls in self._calls.items()}
        other.num_tokens = self.num_tokens
        return other

    def add(self, index: int, advance: Advance, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> None:
        """Records the inputs of slice `index` in a call."""
        call = _Call(self.num_tokens, advance, hidden, pointer, layout)
        self._calls.setdefault(index, []).append(call)

    def count(self, tokens: int) -> None:
        """Counts the tokens of a call. The anchor moves over tokens before the window."""
        self.num_tokens += tokens
        if self.num_tokens > 2 * self.window:
            stop = self.num_tokens - self.window
            self._anchor = self._replay(stop)
            self._calls = {
                index: [call.after(stop) for call in calls if call.start + call.layout.length > stop]
                for index, calls in self._calls.items()
            }
            self.num_tokens -= stop

    def without_last(self, tokens: int) -> dict[int, State]:
        """Returns the state of each slice before the last `tokens` tokens, at most `num_tokens`."""
        return self._replay(self.num_tokens - tokens)

    def _replay(self, stop: int) -> dict[int, State]:
        """Returns the state of each slice after `stop` tokens since the anchor."""
        slices = {}
        for index in self._anchor.keys() | self._calls.keys():
            state = self._anchor.get(index)
            for call in self._calls.get(index, []):
                if call.start < stop:
                    state = call.replay(state, stop)
            if state is not None:
                slices[index] = state
        return slices


__all__ = ["Recording"]
