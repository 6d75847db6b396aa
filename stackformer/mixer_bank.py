# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The base of the mixers with a bank of memories: projections, and the routing of tokens to memories.

Letters: n active tokens, B' rows, T' tokens of a row, d core width, H heads, K = V head size, S stack levels,
N memory banks, R = S * N memories of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_stackformer import StackformerConfig
from .dtypes import at_least_float32
from .fused_ops import RMSNorm, swish_gate
from .implementation import can_decode_token
from .layers_stackformer import ResidualProjection, ShortConvolution, convolve, past_spec
from .mixer import BankWeights, Mixed, Mixer
from .state import State
from .token_layout import TokenLayout


class DecayProjection(nn.Linear):
    """Projects tokens [n, d] to logits of the decay of each head's banks [n, H N].

    At initialisation the banks have half-lives spread evenly on a logarithmic scale, as long as tokens write
    evenly to all banks: a text needs memories that forget within a word, and memories that keep a name for
    thousands of tokens. The router learns which to use (docs/experiments.md).
    """

    def __init__(self, config: StackformerConfig, half_life_factor: float = 1.0):
        super().__init__(config.core_size, config.num_attention_heads * config.num_memory_banks)
        self.config = config
        self.half_life_factor = half_life_factor

    def initial_bias(self) -> Tensor:
        """Returns biases [H N] with which bank n of head h has the (n H + h)-th of H N half-lives.

        They are those of `config.initial_half_lives`, times `half_life_factor`. A bank forgets at most
        `max_decay_rate / N` nats per token while tokens write evenly. Half-lives too short for that start at
        0.9 of this rate.
        """
        heads, banks = self.config.num_attention_heads, self.config.num_memory_banks
        shortest, longest = map(math.log, self.config.initial_half_lives)
        half_lives = torch.linspace(shortest, longest, heads * banks, dtype=torch.float64).exp()
        half_lives = self.half_life_factor * half_lives
        if self.config.max_decay_rate == 0:
            return torch.zeros(heads * banks)
        rates = math.log(2) * banks / (self.config.max_decay_rate * half_lives)
        biases = rates.clamp(max=0.9).logit().view(banks, heads)
        return biases.t().flatten().float()  # [N, H] -> [H N]


class ReadProjection(DecayProjection):
    """Projects tokens [n, d] to logits of the share of each head's banks in what is read [n, H N].

    A bank that forgets slowly holds more tokens, so it weighs more in a normalised read: with equal shares,
    the slowest bank drowns the others. The initial biases are the logarithms of the rates of decay, so that
    all banks start with about the same weight in what is read (docs/experiments.md).
    """

    def initial_bias(self) -> Tensor:
        """Returns the biases [H N]."""
        return nn.functional.logsigmoid(super().initial_bias())


class BankMixer(Mixer):
    """A mixer whose heads have a bank of S*N memories.

    The stack pointer and a softmax over banks weight the memories. The queries, keys and values of the tokens
    pass a short convolution. What is read is normalised and gated.
    """

    half_life_factor = 1.0  # of the initial half-lives

    def __init__(self, config: StackformerConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_banks = config.num_memory_banks
        self.num_banks_per_token = config.num_banks_per_tok or config.num_memory_banks
        self.num_memories = config.num_memory_banks * config.stack_depth
        self.head_dim = config.core_size // config.num_attention_heads
        self.max_decay_rate = config.max_decay_rate
        self.chunk_size = config.chunk_size

        size = config.core_size
        self.qkv_proj = nn.Linear(size, 3 * size, bias=False)
        self.kernel_size = config.conv_kernel_size
        self.conv = ShortConvolution.of(3 * size, self.kernel_size)
        self.past_spec = past_spec(self.kernel_size, 3 * size)
        self.decay_proj = DecayProjection(config, self.half_life_factor)
        if self.num_banks > 1:
            self.read_proj = nn.Linear(size, self.num_heads * self.num_banks)
            self.write_proj = nn.Linear(size, self.num_heads * self.num_banks)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_proj = ResidualProjection(size, size)

        self.num_state_tensors = len(self.state_spec())

    def forward(
        self,
        hidden: Tensor,
        pointer: Tensor,
        layout: TokenLayout,
        state: Any = None,
        inputs: Any = None,
        in_place: bool = False,
    ) -> Mixed:
        """See [`Mixer.forward`]. A single token of each row is mixed by `decode_token` where possible."""
        if in_place:
            return self.decode_token(hidden, pointer, layout, state)
        if state is not None and inputs is None and self.can_decode_token(hidden, layout):
            return self.decode_token(hidden, pointer, None, state)
        return super().forward(hidden, pointer, layout, state, inputs)

    def decode_token(self, hidden: Tensor, pointer: Tensor, layout: TokenLayout | None, state: Any) -> Mixed:
        """Mixes one token of each row in one call of the C++ library. With a `layout`, it writes in place."""
        raise NotImplementedError

    def read_out(self, hidden: Tensor, mixed: Tensor, layout: TokenLayout) -> Tensor:
        """Normalises, gates and projects what rows [B', T', H, V] have read, to tokens [n, d]."""
        mixed = self.norm(layout.to_tokens(mixed)).flatten(1)  # [n, H, V] -> [n, d]
        return self.o_proj(swish_gate(self.gate_proj(hidden), mixed))

    def convolve_heads(self, rows: Tensor, past: Tensor | None, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Convolves projected rows [B', T', 3 d] that follow `past`.

        Returns:
            The rows [B', T', 3, H, K], queries, keys and values, and the past for the next call.
        """
        rows, past = convolve(self.conv, self.kernel_size, rows, past, layout)
        return rows.unflatten(-1, (3, self.num_heads, self.head_dim)), past

    def route(self, hidden: Tensor, dtype: torch.dtype) -> BankWeights:
        """Returns the share of each bank in the token's reads and writes, and its decay, in `dtype`.

        Reads and writes choose their banks separately. A bank decays by its share of the write: what is not
        written to is kept.
        """

        def logits(projection: nn.Linear) -> Tensor:
            return projection(hidden).to(dtype).unflatten(-1, (self.num_heads, self.num_banks))

        log_decay = -self.max_decay_rate * logits(self.decay_proj).sigmoid()  # [n, H, N]
        step_size = torch.ones_like(log_decay[..., 0])
        if self.num_banks == 1:
            one = torch.ones_like(log_decay)
            return BankWeights(one, one, log_decay, step_size)
        write = bank_shares(logits(self.write_proj), self.num_banks_per_token)
        read = bank_shares(logits(self.read_proj), self.num_banks_per_token)
        return BankWeights(read, write, write * log_decay, step_size)

    def can_decode_token(self, hidden: Tensor, layout: TokenLayout) -> bool:
        """Whether the C++ library can mix these tokens between the projections.

        This holds for one token of each row, on a CPU, without gradients, and with modules that no adapter or
        hook has changed.
        """
        if layout.row_length != 1 or layout.thinking is not None or not can_decode_token(hidden):
            return False
        return _is_untouched(self.conv, ShortConvolution) and _is_untouched(self.norm, RMSNorm)

    def writes_in_place(self, hidden: Tensor, layout: TokenLayout, state: State) -> bool:
        """See [`Mixer.writes_in_place`]."""
        if (
            len(state) != self.num_state_tensors
            or len(state[0]) != layout.batch_size
            or not self.can_decode_token(hidden, layout)
        ):
            return False
        dtype = at_least_float32(hidden)
        return all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in state)


def bank_shares(logits: Tensor, count: int) -> Tensor:
    """Computes the share of each bank: a softmax over all banks, with 0 for all but the `count` largest.

    The chosen shares are not scaled to a sum of 1, as in Switch Transformer (Fedus et al. 2021, arXiv
    2101.03961). So even the share of a single chosen bank depends on the router, and the router learns from
    it. docs/experiments.md compares this with a softmax over the chosen banks, and with gradients for the
    other banks (straight-through), which are huge for a token that reads a bank that is still empty.

    Args:
        logits: [..., N]. Of equal ones, the first are chosen.

    Returns:
        [..., N].
    """
    shares = logits.softmax(-1)
    if count == logits.shape[-1]:
        return shares
    others = logits.argsort(dim=-1, descending=True, stable=True)[..., count:]
    return shares.scatter(-1, others, 0.0)


def address_memories(pointer: Tensor, bank_weights: Tensor) -> Tensor:
    """Computes the weights of each head's S*N memories: pointer times bank weights, for each level and bank.

    Writes are weighted by the mass that is still on the stack. So the final memory is the sum of the memories
    after each step, weighted by the mass dropped at that step. This is exact without decay. With decay, the
    two differ: decayed to the power p, a memory is not p times the decayed one. At a decay of 1 nat per full
    write, 6 steps and 3 levels, they differ by 19% for one bank and by 2% for four (docs/design.md).

    Args:
        pointer: [n, S]; bank_weights: [n, H, N].

    Returns:
        [n, H, S*N], level by level.
    """
    # [n, 1, S, 1] * [n, H, 1, N] -> [n, H, S, N] -> [n, H, S*N]
    return (pointer[:, None, :, None] * bank_weights.unsqueeze(-2)).flatten(-2)


def _is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of type `kind`, with a plain weight, its own `forward`, and no hooks.

    Adapters replace modules, accelerate replaces the `forward` of modules whose weights it moves, and
    quantised weights have types of their own.
    """
    if type(module) is not kind or type(module.weight) not in (Tensor, nn.Parameter):
        return False
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks
