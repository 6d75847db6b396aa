# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Titans as token mixers: the memory is a small network that gradient descent trains as it reads tokens.

Behrouz et al. 2024, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663). Each head has a network M
of `memory_depth` layers, M(x) = W_L silu(W_(L-1) ... silu(W_1 x)), which learns to map keys to values
(equations 12 to 15). For each token, the memory is first written and then read:

    g_t = gradient of |M(k_t) - v_t|^2, bounded (`measure_surprise`)       surprise
    S_t = eta_t S_(t-1) - theta_t g_t                                      momentum
    W_t = (1 - alpha_t) W_(t-1) + S_t                                      forgetting
    y_t = M_t(q_t)

As in equations 16 to 18, gradients are taken at the weights at the start of a chunk, so that a chunk takes a
few matrix products. Here chunks are part of the definition: they are counted from the first token of a row,
and the state holds the position inside the chunk. So any split of a text into calls gives the same result.
The weights after single tokens are never formed. Within a chunk, W_t is a combination of the weights and the
momentum at the start of the chunk, and of the gradients, which are outer products.

The gradient has a size, so that what surprises more is written more. Two bounds keep training stable. A step
along the gradient changes the error of its token by no more than theta does in a linear memory with keys of
length 1, whose curvature is 1. And no gradient is longer than c = `memory_max_surprise`, which few are. So
the memory stays finite for any text: the norm of the momentum is at most c theta / (1 - eta), and the norm of
the weights at most that divided by alpha.

Letters: n active tokens, B' rows, T' tokens of a row, d core width, H heads, K head size, L layers of the
memory, C tokens of a chunk.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .configuration_stackformer import StackformerConfig
from .dtypes import at_least_float32
from .fused_ops import RMSNorm, swish_gate
from .implementation import can_look_at
from .layers_stackformer import (
    ResidualProjection,
    ShortConvolution,
    all_rows,
    apply_linear,
    convolve,
    past_spec,
)
from .mixer import Mixer
from .mixer_attention import Attention, AttentionState, attend_to_numbers, rotary_embedding, rotary_head_size
from .state import StateSpec, TensorSpec
from .token_layout import ChunkGrid, TokenLayout

# Logit of the initial alpha, 1 % per token. With an initial alpha of 50 %, nothing is ever learned.
_INITIAL_FORGETTING = -4.6
# exp(-30) is negligible in float32. With larger numbers, cumulated sums would lose digits of small ones.
_LEAST_LOGARITHM = -30.0
# Of a gradient. Below, it is 0 in effect, and the derivative of its inverse would overflow.
_LEAST_SQUARE = 1e-12


class Memory(NamedTuple):
    """The memory network, in tensors [B', L, H, K (output), K (input)]."""

    anchor: Tensor  # weights at the start of the chunk, at which gradients are taken
    weights: Tensor  # present weights
    momentum: Tensor


class NeuralMemoryState(NamedTuple):
    """The state of a [`NeuralMemory`], float32 at least. Zeros stand for the beginning of a row."""

    anchor: Tensor  # [B', L, H, K, K], minus the learned initial weights
    weights: Tensor  # [B', L, H, K, K], minus the learned initial weights
    momentum: Tensor  # [B', L, H, K, K]
    position: Tensor  # [B'], number of tokens in the unfinished chunk, int64
    past: Tensor  # [B', kernel - 1, 3 d], the last inputs of the convolution


class GatedState(NamedTuple):
    """The state of [`MemoryAsGate`]: `AttentionState`, then `NeuralMemoryState`."""

    key: Tensor
    value: Tensor
    seen: Tensor
    anchor: Tensor
    weights: Tensor
    momentum: Tensor
    position: Tensor
    past: Tensor


class ContextState(NamedTuple):
    """The state of [`MemoryAsContext`]: the last tokens, then `NeuralMemoryState`."""

    # [B', C - 1, 2 (key, value), 2 (answer, token), H, K]: for each of the last C - 1 tokens, rotated key and
    # value of the memory's answer and of the token. Rows with fewer tokens have zeros in front.
    context: Tensor
    anchor: Tensor
    weights: Tensor
    momentum: Tensor
    position: Tensor
    past: Tensor


class Writes(NamedTuple):
    """The gates of tokens [B', H, C]. An empty slot has zeros everywhere: it does not change the memory."""

    log_keep: Tensor  # log(1 - alpha)
    log_momentum: Tensor  # log eta
    step: Tensor  # theta
    real: Tensor  # 1 for a token, 0 for an empty slot


def measure_surprise(
    weights: Tensor, key: Tensor, value: Tensor, max_surprise: float | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Computes the gradient of |M(key) - value|^2 for each token, as an outer product for each layer.

    It is bounded twice. With e the gradient at the network's output and g that of all weights of a head, the
    network has the curvature r = |g|^2 / |e|^2 along g. The gradient is divided by r where r is above 1. This
    is the normalised step of Nagumo & Noda 1967 ("A learning method for system identification"): to first
    order, a step theta changes the token's error along itself by 2 theta of it or less. A linear memory with
    keys of length 1 has r = 1. Then the gradient is scaled to the norm `max_surprise` if it is longer.

    Args:
        weights: [B', L, H, K, K]; key, value: [B', H, C, K].
        max_surprise: a number above 0; `None` for no second bound.

    Returns:
        For each layer, its inputs and the gradients at its outputs, [B', H, C, K] each.
    """
    layers = weights.unbind(1)  # [B', H, K, K] each
    inputs, slopes = [key], []
    for weight in layers[:-1]:
        before = inputs[-1] @ weight.mT
        gate = before.sigmoid()
        slopes.append(gate * (1 + before * (1 - gate)))
        inputs.append(before * gate)
    error = 2 * (inputs[-1] @ layers[-1].mT - value)
    scale = error.detach().abs().amax(-1, keepdim=True).clamp(min=1)  # so that no square overflows
    errors = [error / scale]
    for weight, slope in zip(layers[:0:-1], slopes[::-1], strict=True):
        errors.insert(0, (errors[0] @ weight) * slope)
    squares = [x.square().sum(-1) * e.square().sum(-1) for x, e in zip(inputs, errors, strict=True)]
    total = torch.stack(squares).sum(0).unsqueeze(-1)  # |g|^2 / scale^2
    curvature = total / errors[-1].square().sum(-1, keepdim=True).clamp(min=_LEAST_SQUARE)
    factor = scale / curvature.clamp(min=1)
    if max_surprise is not None:
        factor = factor.minimum(max_surprise * total.clamp(min=_LEAST_SQUARE).rsqrt())
    return inputs, [error * factor for error in errors]


def ask_memory(weights: Tensor, query: Tensor) -> Tensor:
    """Returns M(query) [B', H, C, K] for the memory with `weights` [B', L, H, K, K]."""
    first, *others = weights.unbind(1)  # [B', H, K, K] each
    answer = query @ first.mT
    for weight in others:
        answer = nn.functional.silu(answer) @ weight.mT
    return answer


def advance_memory(
    memory: Memory, query: Tensor, key: Tensor, value: Tensor, writes: Writes, max_surprise: float | None
) -> tuple[Tensor, Memory]:
    """Writes C tokens of one chunk, and reads the memory after each.

    With cumulated products a of 1 - alpha and c of eta, W_t = a_t W + f_t S - sum_(j<=t) G_tj g_j, where
    f_t = sum_(i<=t) (a_t / a_i) c_i and G_tj = theta_j sum_(j<=i<=t) (a_t / a_i) (c_i / c_j).

    A token that is NaN does not change the answers before it, or, on a GPU and in compiled graphs, those
    before its chunk.

    Args:
        memory: before these tokens. Its anchor is not changed.
        query, key, value: [B', H, C, K].
        max_surprise: see `measure_surprise`.

    Returns:
        The answers [B', H, C, K], and the memory after the last token.
    """
    answer, after = _advance_at_once(memory, query, key, value, writes, max_surprise)
    if not can_look_at(after.weights) or math.isfinite(after.weights.detach().sum()):
        return answer, after
    # The products multiply later tokens, and the gates multiply empty slots, by 0, and 0 * NaN is NaN. So the
    # empty slots are filled with 0, and the tokens are written one by one.
    real = writes.real > 0
    query, key, value = (x.masked_fill(~real[..., None], 0.0) for x in (query, key, value))
    writes = Writes(*(gate.masked_fill(~real, 0.0) for gate in writes))
    answers = []
    for t in range(query.shape[2]):
        one = slice(t, t + 1)
        write = Writes(*(gate[..., one] for gate in writes))
        q, k, v = (x[:, :, one] for x in (query, key, value))
        answer, memory = _advance_at_once(memory, q, k, v, write, max_surprise)
        answers.append(answer)
    return torch.cat(answers, dim=2), memory


def _advance_at_once(
    memory: Memory, query: Tensor, key: Tensor, value: Tensor, writes: Writes, max_surprise: float | None
) -> tuple[Tensor, Memory]:
    """`advance_memory` for all tokens in parallel, in a few matrix products."""
    # [B', H, C, C] each: a_t / a_j and c_t / c_j
    keep, momentum = _cumulated(writes.log_keep), _cumulated(writes.log_momentum)
    step = writes.step.unsqueeze(-2)  # [B', H, 1, C]
    keep_start = writes.log_keep.cumsum(-1).exp().unsqueeze(-1)  # a, [B', H, C, 1]
    momentum_start = writes.log_momentum.cumsum(-1).exp().unsqueeze(-1)  # c, [B', H, C, 1]
    taken = keep * writes.real.unsqueeze(-2)
    from_momentum = taken @ momentum_start  # f, [B', H, C, 1]
    # G [B', H, C, C], and the factors of the gradients in the last momentum [B', H, 1, C]
    on_weights, on_momentum = (taken @ momentum) * step, momentum[..., -1:, :] * step

    inputs, errors = measure_surprise(memory.anchor, key, value, max_surprise)
    answer, weights, momenta = query, [], []
    layers = zip(memory.weights.unbind(1), memory.momentum.unbind(1), inputs, errors, strict=True)
    for number, (weight, velocity, x, error) in enumerate(layers):
        if number > 0:
            answer = nn.functional.silu(answer)
        answer = (
            keep_start * (answer @ weight.mT)
            + from_momentum * (answer @ velocity.mT)
            - ((answer @ x.mT) * on_weights) @ error
        )
        weights.append(
            keep_start[..., -1:, :] * weight
            + from_momentum[..., -1:, :] * velocity
            - (error * on_weights[..., -1, :].unsqueeze(-1)).mT @ x
        )
        momenta.append(
            momentum_start[..., -1:, :] * velocity - (error * on_momentum[..., -1, :].unsqueeze(-1)).mT @ x
        )
    # L times [B', H, K, K] -> [B', L, H, K, K]
    return answer, Memory(memory.anchor, torch.stack(weights, dim=1), torch.stack(momenta, dim=1))


def _cumulated(logarithms: Tensor) -> Tensor:
    """Returns exp(sum of logarithms [..., C] over j < k <= i) as [..., C (i), C (j)]; 0 for j > i."""
    total = logarithms.cumsum(-1)
    future = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()


class NeuralMemory(nn.Module):
    """The memory with its projections, which all mixers of this file share.

    Equations 11 to 15, with a short convolution, SiLU and normalised keys and queries (section 4.4). theta,
    eta and alpha are sigmoids; theta is multiplied by `memory_max_step_size`. The weights before the first
    token are learned. They replace the writes of persistent tokens in front of the text.
    """

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.num_heads = config.num_attention_heads
        self.head_dim = size // self.num_heads
        self.chunk_size = config.memory_chunk_size
        self.max_step_size = config.memory_max_step_size
        self.max_surprise = config.memory_max_surprise
        self.qkv_proj = nn.Linear(size, 3 * size, bias=False)
        self.kernel_size = config.conv_kernel_size
        self.conv = ShortConvolution.of(3 * size, self.kernel_size)
        self.past_spec = past_spec(self.kernel_size, 3 * size)
        self.write_proj = nn.Linear(size, 3 * self.num_heads)
        self.initial_memory = nn.Parameter(
            torch.empty(config.memory_depth, self.num_heads, self.head_dim, self.head_dim)
        )
        self.norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def state_spec(self) -> StateSpec:
        """Specifies the memory, the position in the chunk, and the last inputs of the convolution."""
        weights = tuple(self.initial_memory.shape)
        return (
            TensorSpec("anchor", weights),
            TensorSpec("weights", weights),
            TensorSpec("momentum", weights),
            TensorSpec("position", (), integer=True),
            self.past_spec,
        )

    def forward(
        self, hidden: Tensor, layout: TokenLayout, state: NeuralMemoryState | None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Writes the active tokens to the memory, and reads it after each.

        Args:
            hidden: [n, d], normalised; layout: of the n tokens; state: `None` at the beginning.

        Returns:
            The answers [n, d], normalised per head, and the new state.
        """
        memory, past, chunks = self.begin(hidden, layout, state)
        qkv, gates, past = self.project(hidden, layout, past)
        qkv, gates, answers = chunks.to_chunks(qkv), chunks.to_chunks(gates), []
        for number in range(chunks.num_chunks):
            answer, memory = self.advance(qkv[:, number], gates[:, number], memory, chunks, number)
            answers.append(answer)
        return self.collect(answers, hidden, layout, chunks), self.end(memory, past, chunks)

    def begin(
        self, hidden: Tensor, layout: TokenLayout, state: NeuralMemoryState | None
    ) -> tuple[Memory, Tensor, ChunkGrid]:
        """Prepares a call. Returns the memory, the convolution's past, and the chunks of its tokens."""
        initial = self.initial_memory.to(at_least_float32(hidden))
        if state is None:
            start = initial.expand(layout.num_rows, -1, -1, -1, -1)
            memory = Memory(start, start, torch.zeros_like(start))
            past = start.new_zeros(layout.num_rows, self.kernel_size - 1, 3 * hidden.shape[-1])
            position = torch.zeros(layout.num_rows, dtype=torch.long, device=hidden.device)
        else:
            anchor, weights, momentum, position, past = state
            memory = Memory(anchor + initial, weights + initial, momentum)
        return memory, past, ChunkGrid.of(position, layout, self.chunk_size, fresh=state is None)

    def end(self, memory: Memory, past: Tensor, chunks: ChunkGrid) -> NeuralMemoryState:
        """Returns the state after a call, from its memory and the convolution's past."""
        initial = self.initial_memory.to(memory.weights.dtype)
        position = chunks.ended % self.chunk_size
        anchor, weights = memory.anchor - initial, memory.weights - initial
        return NeuralMemoryState(anchor, weights, memory.momentum, position, past)

    def project(self, hidden: Tensor, layout: TokenLayout, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects the tokens [n, d].

        Returns:
            Queries, keys and values [B', T', 3, H, K]; log(1 - alpha), log eta and theta [B', T', 3, H], all
            float32 at least; and the new past of the convolution.
        """
        dtype = at_least_float32(hidden)
        rows = layout.to_rows(self.qkv_proj(hidden))
        rows, past = convolve(self.conv, self.kernel_size, rows, past, layout)
        # [B', T', 3 d] -> [B', T', 3, H, K] -> three times [B', T', H, K]
        rows = nn.functional.silu(rows.to(dtype)).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = rows.unbind(2)
        qkv = torch.stack([_unit(query), _unit(key), value], dim=2)

        gates = self.write_proj(hidden).to(dtype).unflatten(-1, (3, self.num_heads))  # [n, 3, H]
        forget, momentum, step = gates.unbind(1)
        log_keep = nn.functional.logsigmoid(-forget - _INITIAL_FORGETTING).clamp(min=_LEAST_LOGARITHM)
        log_momentum = nn.functional.logsigmoid(momentum).clamp(min=_LEAST_LOGARITHM)
        gates = torch.stack([log_keep, log_momentum, self.max_step_size * step.sigmoid()], dim=1)
        return qkv, layout.to_rows(gates), past

    def advance(
        self, qkv: Tensor, gates: Tensor, memory: Memory, chunks: ChunkGrid, number: int
    ) -> tuple[Tensor, Memory]:
        """Writes the tokens of chunk `number`, and reads the memory after each.

        Args:
            qkv: [B', C, 3, H, K]; gates: [B', C, 3, H], both from `project`.

        Returns:
            The answers [B', C, H, K], and the new memory.
        """
        query, key, value = qkv.movedim(1, 3).unbind(1)  # [B', H, C, K]
        real = chunks.real[:, number].unsqueeze(1).to(gates.dtype)  # [B', 1, C]
        # [B', C, 3, H] -> [B', 3, H, C] -> three times [B', H, C]
        log_keep, log_momentum, step = (gates.movedim(1, 3) * real.unsqueeze(1)).unbind(1)
        writes = Writes(log_keep, log_momentum, step, real)
        with torch.autocast(qkv.device.type, enabled=False):
            answer, memory = advance_memory(memory, query, key, value, writes, self.max_surprise)
        full = chunks.full[:, number].view(-1, 1, 1, 1, 1)
        anchor = torch.where(full, memory.weights, memory.anchor)
        return answer.transpose(1, 2), memory._replace(anchor=anchor)

    def collect(
        self, answers: list[Tensor], hidden: Tensor, layout: TokenLayout, chunks: ChunkGrid
    ) -> Tensor:
        """Normalises the answers of all chunks, [B', C, H, K] each, per head, and returns them as [n, d]."""
        # [B', chunks, C, H, K] -> [B', T', H, K] -> [n, H, K] -> [n, d]
        tokens = layout.to_tokens(chunks.to_rows(torch.stack(answers, dim=1)))
        return self.norm(tokens.to(hidden.dtype)).flatten(1)

    def recall(self, query: Tensor, memory: Memory) -> Tensor:
        """Reads the memory as it was at the start of the chunk, with queries [B', C, d].

        Returns:
            The answers [B', C, d], normalised per head.
        """
        # [B', C, d] -> [B', C, H, K] -> [B', H, C, K], and back
        heads = nn.functional.silu(query.to(memory.anchor.dtype)).unflatten(-1, (self.num_heads, -1))
        with torch.autocast(query.device.type, enabled=False):
            answer = ask_memory(memory.anchor, _unit(heads).transpose(1, 2)).transpose(1, 2)
        return self.norm(answer.to(query.dtype)).flatten(2)


def _unit(x: Tensor) -> Tensor:
    """Scales vectors [..., K] to length 1."""
    return nn.functional.normalize(x, dim=-1)


def _memory_state(state: GatedState | ContextState) -> NeuralMemoryState:
    """Returns the memory's part of a state."""
    return NeuralMemoryState(state.anchor, state.weights, state.momentum, state.position, state.past)


class MemoryAsLayer(Mixer):
    """The neural memory alone as a mixer.

    Layers of it that alternate with layers of softmax attention are the paper's "memory as a layer"
    (equations 29 to 31).
    """

    state_type = NeuralMemoryState

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.memory = NeuralMemory(config)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """Specifies the state of the memory."""
        return self.memory.state_spec()

    def forward(
        self,
        hidden: Tensor,
        pointer: Tensor,
        layout: TokenLayout,
        state: NeuralMemoryState | None = None,
        inputs: None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, NeuralMemoryState, None]:
        """See [`Mixer.forward`]. The pointer is not used."""
        mixed, state = self.memory(hidden, layout, state)
        return self.o_proj(swish_gate(self.gate_proj(hidden), mixed)), state, None


class MemoryAsGate(Mixer):
    """Softmax attention times the neural memory (equations 26 to 28).

    Both are normalised with learned weights. The paper does not say which of them the nonlinearity applies
    to. Here it applies to attention, which replaces the linear gate of `MemoryAsLayer`.
    """

    state_type = GatedState

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.attention = Attention(config)
        self.attention.o_proj = nn.Identity()  # type: ignore[assignment]  # `o_proj` projects the product
        self.attention_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.memory = NeuralMemory(config)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """Specifies the state of attention, then that of the memory."""
        return *self.attention.state_spec(), *self.memory.state_spec()

    def forward(
        self,
        hidden: Tensor,
        pointer: Tensor,
        layout: TokenLayout,
        state: GatedState | None = None,
        inputs: None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, GatedState, None]:
        """See [`Mixer.forward`]. The pointer is not used."""
        recent = remembered = None
        if state is not None:
            recent = AttentionState(state.key, state.value, state.seen)
            remembered = _memory_state(state)
        attended, recent, _ = self.attention(hidden, pointer, layout, recent)
        mixed, remembered = self.memory(hidden, layout, remembered)
        output = self.o_proj(swish_gate(self.attention_norm(attended), mixed))
        return output, GatedState(*recent, *remembered), None


class MemoryAsContext(Mixer):
    """Softmax attention inside of segments, with the memory of earlier segments as context.

    This is the paper's "memory as a context" (equations 21 to 25). A segment is a chunk of the memory. A
    token attends to the persistent tokens, to the tokens of its segment up to itself, and for each of these
    to the memory's answer to it. These answers come from the memory at the start of the segment. Let y be the
    normalised sum of the token and the result of attention. The memory is then written with y, and the output
    is y times the memory's answer to y.

    In the paper, a token attends to the answers for all tokens of its segment, and reads a memory that has
    been written with all of them. Both would reveal later tokens. Here a token depends on no later token.
    """

    state_type = ContextState

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.heads = (config.num_attention_heads, rotary_head_size(config))
        self.rope_theta = config.rope_parameters["rope_theta"]
        self.memory = NeuralMemory(config)
        self.q_proj = nn.Linear(size, 2 * size, bias=False)
        self.kv_proj = nn.Linear(size, 2 * size, bias=False)
        self.persistent, self.num_persistent = None, config.num_persistent_tokens
        if config.num_persistent_tokens > 0:
            self.persistent = nn.Embedding(config.num_persistent_tokens, size)
        self.attention_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """Specifies the context (see `ContextState`), then the state of the memory."""
        seen = TensorSpec("context", (self.memory.chunk_size - 1, 2, 2, *self.heads))
        return seen, *self.memory.state_spec()

    @force_accelerate_hooks("memory")  # this method uses weights of `memory` without calling the module
    def forward(
        self,
        hidden: Tensor,
        pointer: Tensor,
        layout: TokenLayout,
        state: ContextState | None = None,
        inputs: None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, ContextState, None]:
        """See [`Mixer.forward`]. The pointer is not used."""
        past, remembered = (None, None) if state is None else (state.context, _memory_state(state))
        memory, convolved, segments = self.memory.begin(hidden, layout, remembered)
        tokens = segments.to_chunks(layout.to_rows(hidden))
        queries = segments.to_chunks(layout.to_rows(self.q_proj(hidden)))
        contexts, attended, answers = [], [], []
        for number in range(segments.num_chunks):
            question, query = queries[:, number].chunk(2, dim=-1)
            context = torch.stack([self.memory.recall(question, memory), tokens[:, number]], dim=2)
            begun = segments.begun if number == 0 else torch.zeros_like(segments.begun)
            query, context = self._rotate(query, context, begun)
            mixed = self._attend(query, context, past if number == 0 else None, begun)
            mixed = self.attention_norm(tokens[:, number] + mixed)
            real = replace(TokenLayout.full(*mixed.shape[:2]), row_lengths=segments.real[:, number].sum(1))
            qkv, gates, convolved = self.memory.project(mixed.flatten(0, 1), real, convolved)
            answer, memory = self.memory.advance(qkv, gates, memory, segments, number)
            contexts.append(context)
            attended.append(mixed)
            answers.append(answer)

        # [B', segments, C, d] -> [B', T', d] -> [n, d]
        mixed = layout.to_tokens(segments.to_rows(torch.stack(attended, dim=1)))
        answer = self.memory.collect(answers, hidden, layout, segments)
        output = self.o_proj(swish_gate(mixed, answer))

        seen, kept = segments.to_rows(torch.stack(contexts, dim=1)), self.memory.chunk_size - 1
        if past is None:
            past = seen.new_zeros(len(seen), kept, *seen.shape[2:])
        seen = layout.last_of_rows(torch.cat([past.to(seen.dtype), seen], dim=1), kept)
        return output, ContextState(seen, *self.memory.end(memory, convolved, segments)), None

    def _rotate(self, query: Tensor, context: Tensor, begun: Tensor) -> tuple[Tensor, Tensor]:
        """Projects the contexts of a segment to keys and values, and rotates queries and keys.

        The memory's answer to a token has the position of the token.

        Args:
            query: [B', C, d]; context: [B', C, 2, d], the memory's answer and the token.
            begun: [B'], tokens of the segment before this call.

        Returns:
            Rotated queries [B', C, H, K], and rotated keys and values, stacked as in `ContextState`.
        """
        # [B', C, 2, 2 d] -> [B', C, 2, 2, H, K] -> two times [B', C, 2, H, K]
        key, value = apply_linear(self.kv_proj, context).unflatten(-1, (2, *self.heads)).unbind(3)
        positions = begun.unsqueeze(1) + torch.arange(query.shape[1], device=query.device)
        dtype = at_least_float32(query)
        cos, sin = rotary_embedding(positions, self.heads[1], self.rope_theta, dtype)
        query, key = apply_rotary_pos_emb(
            query.unflatten(-1, self.heads),
            key.flatten(2, 3),
            cos.to(query.dtype),
            sin.to(query.dtype),
            unsqueeze_dim=2,
        )
        return query, torch.stack([key.view(value.shape), value], dim=2)

    def _attend(self, query: Tensor, context: Tensor, past: Tensor | None, begun: Tensor) -> Tensor:
        """Attends inside of a segment.

        Args:
            query: [B', C, H, K]; context: [B', C, 2, 2, H, K], both from `_rotate`.
            past: [B', C - 1, 2, 2, H, K], the contexts before this call; `None` if there are none.
            begun: [B'], the number of these that belong to the segment, at the end of `past`.

        Returns:
            [B', C, d].
        """
        length = query.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if past is not None:
            context = torch.cat([past.to(context.dtype), context], dim=1)
            place = torch.arange(past.shape[1], device=query.device)
            earlier = (place >= past.shape[1] - begun.unsqueeze(1)).unsqueeze(1).expand(-1, length, -1)
            visible = torch.cat([earlier, visible.expand(len(earlier), -1, -1)], dim=2)
        # [B', T, 2 (key, value), 2 (answer, token), H, K] -> [B', 2 (key, value), 2 T, H, K]
        slots, visible = context.transpose(1, 2).flatten(2, 3), visible.repeat_interleave(2, dim=-1)
        if self.persistent is not None:
            tokens = all_rows(self.persistent, self.num_persistent, slots.device)
            always = self.kv_proj(tokens).unflatten(-1, (2, *self.heads)).transpose(0, 1)
            slots = torch.cat([always.to(slots.dtype).expand(len(slots), -1, -1, -1, -1), slots], dim=2)
            visible = nn.functional.pad(visible, (always.shape[1], 0), value=True)
        key, value = slots.unbind(1)  # [B', slots, H, K]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B', H, ., K]
            mask = visible.unsqueeze(-3)
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(
                1, 2
            )

        return attend_to_numbers(attend, query, key, value).flatten(2)


__all__ = ["MemoryAsContext", "MemoryAsGate", "MemoryAsLayer", "NeuralMemory"]
