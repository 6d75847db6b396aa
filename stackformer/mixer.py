# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""What a token mixer is.

A mixer is a module with one contract: `forward(hidden, pointer, layout, state)` takes the active tokens [n,
d], their stack pointer [n, S], the `TokenLayout` and the state of its slice of the recurrence (`None` at the
beginning), and returns the mixed tokens [n, d], the new state (a tuple of tensors, rows first), and what it
wants the stack trace to show, or `None`.

A mixer can be run backwards (long_context.py) if it also has

- `num_reversible`: so many tensors of the state, the first ones, can be computed from what they became; the
  others are small, and kept,
- `inputs(hidden, pointer, layout, kept)`: what the recurrence is fed with, from the tokens and from those
  tensors of the state that are kept; `forward` takes it as a last argument, so that it is computed once,
- `total_decay(inputs)`: the nats by which each memory decays over the tokens [B', ...], which are the leading
  dimensions of the reversible tensors,
- `reverse(inputs, state)`: the reversible tensors before the tokens, from what they are after them,
- `reverses_exactly`: whether that is so to the last bit. Else what decays by a nats comes back with its
  rounding errors amplified by exp(a).

Decoding writes its states where they are, without new memory and copies of rows, if it also has

- `writes_in_place(hidden, layout, state)`: whether `forward`, called with these tokens without gradients,
  takes a `StateOfAllRows` [B, ...] and returns the same tensors with the rows of `layout` written.

Its tokens can be split over processes (sequence_parallel.py) if it also has

- `state_before(hidden, pointer, layout, gather)`: the state before the tokens, for all B rows of the batch,
  and what `forward` takes as its last argument. `gather` takes tensors [B', ...] and returns what each of the
  N processes gave it [N, B, ...], in the order of their tokens, zeros for rows without active tokens, for
  this process and for those after it. All processes call it equally often.
"""

from torch import nn

from .state import StateSpec


class Mixer(nn.Module):
    """Looks along time. See above for what its `forward` takes and returns."""

    def state_spec(self) -> StateSpec:
        """The tensors of the state that `forward` returns, in their order."""
        raise NotImplementedError(f"{type(self).__name__} must say what its state is: `state_spec`")


__all__ = ["Mixer"]
