# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The feed-forward networks of core layers and of the bottleneck. They work along channels."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_stackformer import StackformerConfig
from .fused_ops import swish_gate
from .layers_stackformer import ResidualProjection, TokenShift
from .state import StateSpec, TensorSpec
from .token_layout import TokenLayout


class GatedMLP(nn.Module):
    """Gated feed-forward (Shazeer 2020, "GLU Variants Improve Transformer", equation 6)."""

    def __init__(self, input_size: int, intermediate_size: int, output_size: int, hidden_act: str):
        super().__init__()
        self.gate_proj = nn.Linear(input_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(input_size, intermediate_size, bias=False)
        self.down_proj = ResidualProjection(intermediate_size, output_size)
        self.act_fn = ACT2FN[hidden_act]
        self.is_swish = hidden_act in ("silu", "swish")

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        return self.down_proj(swish_gate(gate, up) if self.is_swish else self.act_fn(gate) * up)


class ChannelMix(nn.Module):
    """RWKV's gated feed-forward on a token and the one before it.

    Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", equations 16 to 18.
    """

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.shift = TokenShift(size, 2)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.receptance_proj = nn.Linear(size, size, bias=False)
        self.down_proj = ResidualProjection(config.intermediate_size, size)

    def state_spec(self) -> StateSpec:
        """Specifies the last token, the past of the next call."""
        return (TensorSpec("last_token_of_channel_mix", (1, self.shift.weight.shape[1])),)

    def forward(self, hidden: Tensor, layout: TokenLayout, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Maps active tokens [n, d], whose rows follow `past` [B', 1, d], to the output and the new past."""
        (key, receptance), past = self.shift(hidden, layout, past)
        output = self.down_proj(self.up_proj(key).relu().square())
        return self.receptance_proj(receptance).sigmoid() * output, past


__all__ = ["ChannelMix", "GatedMLP"]
