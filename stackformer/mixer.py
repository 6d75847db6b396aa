# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The interface of token mixers. A mixer is the part of a core layer that works along time.

A mixer has a state of constant or growing size, which is a tuple of named tensors. It mixes active tokens
[n, d]. Their `TokenLayout` says which rows they belong to. docs/adding_a_mixer.md shows how to add a mixer.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .state import State, StateSpec
from .token_layout import TokenLayout


class BankWeights(NamedTuple):
    """How the tokens of a mixer use its banks."""

    read: Tensor  # [n, H, N], the share of each bank in what is read
    write: Tensor  # [n, H, N], and in what is written
    log_decay: Tensor  # [n, H, N], at full mass
    step_size: Tensor  # [n, H], of the delta rule; 1 for a mixer that adds


# A mixer may tell how its tokens use its banks, or in training a term of the loss for each token [n].
Told = BankWeights | Tensor | None

# The result of a mixer: the mixed tokens [n, d], the new state, and what it tells about its tokens.
Mixed = tuple[Tensor, State, Told]


class Mixer(nn.Module):
    """Mixes tokens along time.

    A subclass names its state (`state_type`, a NamedTuple whose fields are the names of `state_spec`) and
    implements `state_spec`, and either `project` and `mix` or `forward`. The other methods are optional:

    - Reversing (`num_reversible` above 0, `total_decay`, `reverse`): training on long contexts reconstructs
      states instead of storing them.
    - Writing in place (`writes_in_place`, and `forward` with `in_place`): decoding allocates no new state.
    - Splitting over processes (`is_splittable`, `carry`): each process reads one part of a sequence.

    Letters: n active tokens, d core width, S stack levels, B batch rows, B' rows that have active tokens, H
    heads, N memory banks.
    """

    # Makes a state of its tensors; a plain tuple if a mixer does not name them.
    state_type: ClassVar[Callable[..., Any]] = staticmethod(lambda *tensors: tensors)

    # `reverse` computes the first `num_reversible` tensors of an earlier state from those of a later one. The
    # other tensors are small, and are stored. 0: the mixer cannot be reversed.
    num_reversible: int = 0
    # Whether `reverse` is exact to the last bit. Otherwise it amplifies the rounding errors of a state that
    # decayed by `a` nats by exp(a).
    reverses_exactly: bool = False
    # Whether `carry` is implemented.
    is_splittable: bool = False

    def state_spec(self) -> StateSpec:
        """Specifies the tensors of the state, in their order."""
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
        """Mixes the active tokens along time.

        Args:
            hidden: [n, d], normalised; pointer: [n, S], the mass on each level of the tokens' stacks.
            layout: of the n tokens.
            state: of the rows of `layout`; `None` at the beginning of the sequences.
            inputs: the result of `project` for these tokens, if it is known already.
            in_place: whether to write the new state into `state`, which then has all batch rows [B, ...].
                Allowed only if `writes_in_place` returns True.

        Returns:
            The mixed tokens [n, d], the new state, and the bank weights, losses [n] or `None`.
        """
        if in_place:
            raise NotImplementedError(f"{type(self).__name__} does not write in place")
        if inputs is None:
            inputs = self.project(hidden, pointer, layout, state)
        return self.mix(hidden, inputs, layout, state)

    def project(self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: Any) -> Any:
        """Computes the inputs of the recurrence from the tokens.

        Of `state`, it reads only the tensors that are not reversible. The others may be `None`. Arguments are
        those of `forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} must feed its recurrence: `project`")

    def mix(self, hidden: Tensor, inputs: Any, layout: TokenLayout, state: Any) -> Mixed:
        """Runs the recurrence on `inputs` from `project`. Arguments and results are those of `forward`."""
        raise NotImplementedError(f"{type(self).__name__} must have a recurrence: `mix`")

    def total_decay(self, inputs: Any) -> Tensor:
        """Returns the decay of each memory over all tokens, in nats.

        Its shape [B', ...] is the leading dimensions of the reversible tensors.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be run backwards: it has no `total_decay`")

    def reverse(self, inputs: Any, state: State) -> State:
        """Computes the reversible tensors before the tokens from those after them.

        Args:
            inputs: the result of `project` for the tokens.
            state: after the tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be run backwards: it has no `reverse`")

    def writes_in_place(self, hidden: Tensor, layout: TokenLayout, state: State) -> bool:
        """Whether `forward` can mix these tokens with `in_place`. It is called without gradients.

        Args:
            state: of all batch rows [B, ...].
        """
        return False

    def carry(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, gather: Callable[..., list[Tensor]]
    ) -> tuple[State, Any]:
        """Computes the state before these tokens if other processes hold the earlier tokens of the rows.

        Args:
            gather: takes tensors [B', ...] of this process. Returns for each the tensors of all P processes
                [P, B, ...] in the order of their tokens, with zeros for this process, for later processes,
                and for rows without active tokens. All processes must call it equally often.

        Returns:
            The state [B, ...], and the result of `project` for the tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be split over processes: it has no `carry`")


__all__ = ["BankWeights", "Mixed", "Mixer", "Told"]
