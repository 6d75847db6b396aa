# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The recurrent core: its layers, the bottleneck around them, and the gates of a ponder step.

`think` applies the core once. It projects down to the core width, runs the layers, and projects up again:

    superposition [n, D] -> down_proj -> layers [n, d] -> bottleneck -> step_gate -> thought [n, D]

Letters: n active tokens, D hidden size, d core width, S stack levels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_stackformer import StackformerConfig
from .feed_forward import ChannelMix, GatedMLP
from .layers_stackformer import NORMS, SliceProjection
from .mixer import Mixer, Told
from .mixer_attention import Attention
from .mixer_banked_delta_rule import BankedDeltaRule
from .mixer_banked_linear_attention import BankedLinearAttention
from .mixer_continuous import ContinuousAttention
from .mixer_coupled import Coupled, CoupledAngles
from .mixer_fast_weights import FastWeights
from .mixer_fixed_size import FixedSizeAttention
from .mixer_neural_memory import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from .mixer_rwkv import TimeMix
from .processing_stack import POP, Stack, read_stack
from .state import Start, State, StateSpec
from .token_layout import TokenLayout

# The token mixers by their name in `config.mixer_types`.
MIXERS: dict[str, Callable[[StackformerConfig], Mixer]] = {
    "attention": Attention,
    "banked_delta_rule": BankedDeltaRule,
    "banked_linear_attention": BankedLinearAttention,
    "continuous_attention": ContinuousAttention,
    "coupled": Coupled,
    "coupled_angles": CoupledAngles,
    "fast_weights": FastWeights,
    "fixed_size_attention": FixedSizeAttention,
    "memory_as_context": MemoryAsContext,
    "memory_as_gate": MemoryAsGate,
    "neural_memory": MemoryAsLayer,
    "rwkv": TimeMix,
}


class StackformerCoreLayer(GradientCheckpointingLayer):
    """Pre-norm residual layer of the core: a mixer along time, a feed-forward along channels."""

    def __init__(self, config: StackformerConfig, layer_idx: int):
        super().__init__()
        size = config.core_size
        norm = NORMS[config.norm_type]
        self.input_layernorm = norm(size, eps=config.rms_norm_eps)
        mixer_type = config.mixer_types[layer_idx]
        if mixer_type not in MIXERS:
            raise ValueError(f"`mixer_types` must be names out of {list(MIXERS)}, got {mixer_type!r}")
        self.mixer = MIXERS[mixer_type](config)
        self.mixer_spec: StateSpec = self.mixer.state_spec()
        self.post_attention_layernorm = norm(size, eps=config.rms_norm_eps)
        # The layer's state is the tensors of the mixer, then the past of RWKV's feed-forward if it has one.
        self.mlp_has_past = config.feed_forward_type == "rwkv_channel_mix"
        self.state_spec: StateSpec = self.mixer_spec
        if self.mlp_has_past:
            channel_mix = ChannelMix(config)
            self.mlp: nn.Module = channel_mix
            self.state_spec += channel_mix.state_spec()
        else:
            self.mlp = GatedMLP(size, config.intermediate_size, size, config.hidden_act)

    def forward(
        self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, slot: Any = None
    ) -> tuple[Tensor, Told, State]:
        """Applies the layer to active tokens.

        Args:
            hidden: [n, d].
            pointer: [n, S], the mass on each level of the tokens' stacks.
            layout: of the n tokens.
            slot: gives the state before these tokens (`Slot` of cache_stackformer.py), the same again when a
                checkpoint runs the layer a second time. `None` at the beginning of the sequences.

        Returns:
            The tokens [n, d], what the mixer tells about them (`Told`), and the new state of the layer.
        """
        normed = self.input_layernorm(hidden)
        start = Start() if slot is None else slot.start(self.mixer, normed, pointer, layout)
        past, past_of_mlp = self._split(start.state)
        mixed, state, told = self.mixer(normed, pointer, layout, past, start.inputs, start.in_place)
        hidden = hidden + mixed
        normed = self.post_attention_layernorm(hidden)
        if self.mlp_has_past:
            fed, past_of_mlp = self.mlp(normed, layout, past_of_mlp)
        else:
            fed = self.mlp(normed)
        return hidden + fed, told, _join(state, past_of_mlp)

    def advance(self, hidden: Tensor, pointer: Tensor, layout: TokenLayout, state: State | None) -> State:
        """Returns only the new state of the layer. Rolling back uses it (rollback.py)."""
        if self.mlp_has_past:
            return self.forward(hidden, pointer, layout, _Given(state))[2]
        past, _ = self._split(state)
        return _join(self.mixer(self.input_layernorm(hidden), pointer, layout, past)[1], None)

    def _split(self, state: State | None) -> tuple[Any, Tensor | None]:
        """Splits a layer's state into the mixer's state and the feed-forward's past."""
        if state is None:
            return None, None
        count = len(self.mixer_spec)
        return self.mixer.state_type(*state[:count]), state[count] if self.mlp_has_past else None


class _Given:
    """A slot that gives a known state, without a cache."""

    def __init__(self, state: State | None):
        self._state = state

    def start(self, mixer: Mixer, hidden: Tensor, pointer: Tensor, layout: TokenLayout) -> Start:
        return Start(self._state)


def _join(state: State, past_of_mlp: Tensor | None) -> State:
    """Joins the mixer's state and the feed-forward's past, if any, to a layer's state."""
    return tuple(tensor for tensor in (*state, past_of_mlp) if tensor is not None)


class StackformerBottleneck(nn.Module):
    """Joins the core's result [n, d] with its input, the superposition [n, D], to thoughts [n, D]."""

    def __init__(self, config: StackformerConfig):
        super().__init__()
        joint_size = config.core_size + config.hidden_size
        self.up_proj = SliceProjection(config.core_size, config.hidden_size)
        self.mlp_norm = NORMS[config.norm_type](joint_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(
            joint_size, config.bottleneck_intermediate_size, config.hidden_size, config.hidden_act
        )
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, core: Tensor, superposition: Tensor) -> Tensor:
        joint = self.mlp_norm(torch.cat([core, superposition], dim=-1))  # [n, d + D]
        return self.norm(superposition + self.up_proj(core) + self.mlp(joint))


class StepGate(nn.Module):
    """Interpolates from the superposition to the new thought [n, D] at ponder steps after the first.

    Each channel has a learned weight, at first `INITIAL`, which all these steps share. Because later steps
    start small, a deep model first learns what a single step learns, and then uses depth where it helps
    (docs/experiments.md).
    """

    INITIAL = 0.1

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, old: Tensor, new: Tensor) -> Tensor:
        return old + self.weight * (new - old)


class ActionProjection(nn.Linear):
    """Projects thoughts [n, D] to logits of push, no-op and pop [n, 3].

    At initialisation all tokens have the same actions, and a pop is unlikely, so that tokens ponder deeply.
    `think` scales its input so that it learns slowly. Otherwise every token learns within a hundred training
    steps to pop at once, before depth can help (docs/experiments.md).
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 3)

    def initial_bias(self) -> Tensor:
        """Returns the initial bias [3], which makes a pop unlikely."""
        bias = torch.zeros(3)
        bias[POP] = -3
        return bias


def think(
    model: Any, stack: Stack, layout: TokenLayout, step: int, cache: Cache | None
) -> tuple[Tensor, Tensor, list[Told]]:
    """Applies the core of a `StackformerModel` once to the active tokens.

    Args:
        stack: the stacks of the n active tokens.
        layout: of the n tokens.
        step: the number of the ponder step, from 1.
        cache: holds one slice of each layer's state per ponder step, or a single one with feedback. The core
            reads the slice of this step and writes it.

    Returns:
        Thoughts [n, D], probabilities of push, no-op and pop [n, 3], and what each layer's mixer tells.
    """
    index = 0 if model.config.feedback else step - 1
    superposition = read_stack(stack)
    hidden = model.down_proj(superposition)
    told = []
    for number, layer in enumerate(model.layers):
        slot = None
        if cache is not None:
            slot = cache.layers[number].open(index, layer, hidden, stack.pointer, layout)
        hidden, of_layer, state = layer(hidden, stack.pointer, layout, slot)
        told.append(of_layer)
        if slot is not None:
            slot.write(state)
    thought = hidden if model.bottleneck is None else model.bottleneck(hidden, superposition)
    if model.step_gate is not None and step > 1:
        thought = model.step_gate(superposition, thought)
    return thought, _actions(model, thought, stack.pointer.dtype), told


def _actions(model: Any, thought: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns for thoughts [n, D] the probabilities of push, no-op and pop [n, 3]. One step always pops."""
    if model.action_proj is None:
        pop = torch.arange(3, device=thought.device) == POP
        return pop.to(dtype).expand(len(thought), 3)
    # Small changes of the weights add up over the D normalised channels. So the scale slows learning.
    logits = model.action_proj(thought * thought.shape[-1] ** -0.5)
    return logits.to(dtype).softmax(-1)


__all__ = [
    "MIXERS",
    "ActionProjection",
    "StackformerBottleneck",
    "StackformerCoreLayer",
    "StepGate",
    "think",
]
