# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The contract of token mixers: the part of a core layer that looks along time.

A mixer has a state of constant or growing size, a tuple of named tensors. It reads active tokens [n, d],
whose `TokenLayout` says which rows they belong to. docs/adding_a_mixer.md shows how to add one.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from .state import State, StateSpec
from .token_layout import TokenLayout

# What a mixer returns: the mixed tokens [n, d], its new state, and what it read, wrote and decayed its banks
# by (read, write and log decay, [n, H, N] each), or None if it has no banks.
Mixed = tuple[Tensor, State, tuple[Tensor, Tensor, Tensor] | None]


class Mixer(nn.Module):
    """Mixes tokens along time.

    A subclass names its state (`state_type`, a NamedTuple whose fields are the names of `state_spec`) and
    implements `state_spec`, `project` and `mix`. All other methods are abilities, which it may have:

    - Run backwards (`num_reversible` above 0, `total_decay`, `reverse`): training on long contexts computes
      states instead of storing them.
    - Write in place (`writes_in_place`, and `forward` with `in_place`): decoding needs no new memory.
    - Be split over processes (`is_splittable`, `carry`): each process reads a part of a sequence.

    Letters: n active tokens, d core width, S stack levels, B batch rows, B' rows that have active tokens, H
    heads, N memory banks.
    """

    state_type: ClassVar[Callable[..., Any]]

    # The first `num_reversible` tensors of the state can be computed from what they became; the others are
    # small, and are stored. 0: the mixer cannot be run backwards.
    num_reversible: int = 0
    # Whether `reverse` returns the state to the last bit. Otherwise the rounding errors of a state that
    # decayed by a nats come back amplified by exp(a).
    reverses_exactly: bool = False
    is_splittable: bool = False

    def state_spec(self) -> StateSpec:
        """The tensors of the state, in their order."""
        raise NotImplementedError(f"{type(self).__name__} must specify its state: `state_spec`")

    def forward(
        self,
        hidden: Tensor,
        pointer: Tensor,
        layout: TokenLayout,
        state: Any = None,
        inputs: Any = None,
        in_place: bool = False,
    ) -> Mixed:
        """Mix the active tokens along time.

        Args:
            hidden: [n, d], normalised; pointer: [n, S], the mass on each level of the tokens' stacks.
            layout: of the n tokens.
            state: of the rows of `layout`; `None` at the beginning of the sequences.
            inputs: what `project` returns for these tokens, if it is known already.
            in_place: whether to write the new state into `state`, which is that of all batch rows then; only
                where `writes_in_place` says so.

        Returns:
            The mixed tokens [n, d], the new state, and the bank weights or `None`.
        """
        if in_place:
            raise NotImplementedError(f"{type(self).__name__} does not write in place")
        if inputs is None:
            inputs = self.project(hidden, pointer, layout, state)
        return self.mix(hidden, inputs, layout, state)

    def project(self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: Any) -> Any:
        """The inputs of the recurrence for some tokens. Of `state`, it reads the tensors that are not
        reversible; the others may be `None`."""
        raise NotImplementedError(f"{type(self).__name__} must feed its recurrence: `project`")

    def mix(self, hidden: Tensor, inputs: Any, layout: TokenLayout, state: Any) -> Mixed:
        """The recurrence itself, from `inputs` of `project`. Arguments and results are those of `forward`."""
        raise NotImplementedError(f"{type(self).__name__} must have a recurrence: `mix`")

    def total_decay(self, inputs: Any) -> Tensor:
        """The nats by which each memory decays over the tokens: [B', ...], the leading dimensions of the
        reversible tensors."""
        raise NotImplementedError(f"{type(self).__name__} cannot be run backwards: it has no `total_decay`")

    def reverse(self, inputs: Any, state: State) -> State:
        """The reversible tensors before the tokens, from what they are after them."""
        raise NotImplementedError(f"{type(self).__name__} cannot be run backwards: it has no `reverse`")

    def writes_in_place(self, hidden: Tensor, layout: TokenLayout, state: State) -> bool:
        """Whether `forward` can read these tokens with `in_place`, given the state of all batch rows
        [B, ...]. It is called without gradients."""
        return False

    def carry(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, gather: Callable[..., list[Tensor]]
    ) -> tuple[State, Any]:
        """The state [B, ...] before these tokens, where the tokens before them are with other processes, and
        what `project` returns for them.

        Args:
            gather: takes tensors [B', ...] and returns, for each, what every process gave [P, B, ...], in the
                order of their tokens: zeros for rows without active tokens, for this process and for those
                after it. All P processes call it equally often.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be split over processes: it has no `carry`")


__all__ = ["Mixed", "Mixer"]
