# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""Titans: a memory that is a small network, trained by gradient descent while it reads.

Behrouz et al. 2024, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663). Per head, a network M of
`memory_depth` layers, M(x) = W_L silu(W_(L-1) ... silu(W_1 x)), learns to map keys to values (equations 12 to
15), and is read after it was written to:

    g_t = gradient of |M(k_t) - v_t|^2, as a whole clipped to norm 1       surprise
    S_t = eta_t S_(t-1) - theta_t g_t                                      momentum
    W_t = (1 - alpha_t) W_(t-1) + S_t                                      forgetting
    y_t = M_t(q_t)

As in equations 16 to 18, gradients are taken at the weights at the start of a chunk, so that a chunk is a few
products of matrices. Here chunks are part of the definition: they are counted from the first token of a row,
the state knows the position inside the chunk, and any split of a text gives the same result. No weights of
single tokens are ever formed: within a chunk, W_t is a combination of the weights and the momentum at its
beginning and of the outer products that the gradients are.

The clipped gradient and the bounded step keep the memory finite whatever is read: the norm of the momentum is
at most theta / (1 - eta), and that of the weights at most this over alpha.

Letters: B' rows, T' tokens of a row, H heads, K head size, L layers of the memory, C tokens of a chunk.
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
from .layers_stackformer import (
    ResidualProjection,
    ShortConvolution,
    all_rows,
    apply_linear,
    convolve,
    past_spec,
)
from .memory_bank import can_look_at
from .mixer import Mixer
from .mixer_attention import Attention, AttentionState, attend_to_numbers, rotary_embedding, rotary_head_size
from .state import StateSpec, TensorSpec
from .token_layout import ChunkGrid, TokenLayout

# Logit of the share that is forgotten with every token at first, 1 %: at 50 % nothing is ever learned.
_INITIAL_FORGETTING = -4.6
# exp(-30) is nothing in float32, and sums of larger logarithms would lose the digits of smaller ones.
_LEAST_LOGARITHM = -30.0


class Memory(NamedTuple):
    """Weights of the memory network, [B', L, H, K, K] each (output, input)."""

    anchor: Tensor  # at the start of the chunk, where gradients are taken
    weights: Tensor  # now
    momentum: Tensor


class NeuralMemoryState(NamedTuple):
    """The state of a [`NeuralMemory`], float32 at least. Zeros stand for the beginning of a row."""

    anchor: Tensor  # [B', L, H, K, K], less the learned initial weights
    weights: Tensor  # [B', L, H, K, K], less the learned initial weights
    momentum: Tensor  # [B', L, H, K, K]
    position: Tensor  # [B'], in the chunk, int64
    past: Tensor  # [B', kernel - 1, 3 d], the last inputs of the convolution


class GatedState(NamedTuple):
    """The state of [`MemoryAsGate`]: that of attention, and that of the memory."""

    key: Tensor
    value: Tensor
    seen: Tensor
    anchor: Tensor
    weights: Tensor
    momentum: Tensor
    position: Tensor
    past: Tensor


class ContextState(NamedTuple):
    """The state of [`MemoryAsContext`]: the last tokens, and that of the memory."""

    # [B', C - 1, 2, 2, H, K]: for each of the last C - 1 tokens, rotated keys and values of the memory's
    # answer and of the token itself, zeros in front of fewer.
    context: Tensor
    anchor: Tensor
    weights: Tensor
    momentum: Tensor
    position: Tensor
    past: Tensor


class Writes(NamedTuple):
    """The gates of tokens [B', H, C]. An empty slot has `real` 0, logarithms 0 and step 0: it changes
    nothing."""

    log_keep: Tensor  # log(1 - alpha)
    log_momentum: Tensor  # log eta
    step: Tensor  # theta
    real: Tensor  # 1 for a token, 0 for an empty slot


def measure_surprise(weights: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of |M(key) - value|^2 for every token alone, as outer products of two vectors for each layer.

    Args:
        weights: [B', L, H, K, K]; key, value: [B', H, C, K].

    Returns:
        For each layer what it read and the gradient at its output, [B', H, C, K] each. The latter is scaled
        so that the norm of a token's whole gradient, over all layers of a head, is at most 1.
    """
    layers = weights.unbind(1)
    inputs, slopes = [key], []
    for weight in layers[:-1]:
        before = inputs[-1] @ weight.mT
        gate = before.sigmoid()
        slopes.append(gate * (1 + before * (1 - gate)))
        inputs.append(before * gate)
    errors = [2 * (inputs[-1] @ layers[-1].mT - value)]
    for weight, slope in zip(layers[:0:-1], slopes[::-1], strict=True):
        errors.insert(0, (errors[0] @ weight) * slope)
    squares = [x.square().sum(-1) * e.square().sum(-1) for x, e in zip(inputs, errors, strict=True)]
    clip = torch.stack(squares).sum(0).clamp(min=1).rsqrt().unsqueeze(-1)
    return inputs, [error * clip for error in errors]


def ask_memory(weights: Tensor, query: Tensor) -> Tensor:
    """M(query), [B', H, C, K], under `weights` [B', L, H, K, K]."""
    first, *others = weights.unbind(1)
    read = query @ first.mT
    for weight in others:
        read = nn.functional.silu(read) @ weight.mT
    return read


def advance_memory(
    memory: Memory, query: Tensor, key: Tensor, value: Tensor, writes: Writes
) -> tuple[Tensor, Memory]:
    """Write C tokens of one chunk and read after each: [B', H, C, K] and the memory after the last.

    With cumulated products a of 1 - alpha and c of eta, W_t = a_t W + f_t S - sum_(j<=t) G_tj g_j, where
    f_t = sum_(i<=t) (a_t / a_i) c_i and G_tj = theta_j sum_(j<=i<=t) (a_t / a_i) (c_i / c_j).

    A token that is no number changes nothing before it, or, on a GPU and in compiled graphs,
    before its chunk.

    Args:
        memory: before these tokens; its anchor is left as it is.
        query, key, value: [B', H, C, K].
    """
    read, after = _advance_at_once(memory, query, key, value, writes)
    if not can_look_at(after.weights) or math.isfinite(after.weights.detach().sum()):
        return read, after
    # Triangular products multiply later tokens with 0, which is NaN, as do the gates those that are none.
    real = writes.real > 0
    query, key, value = (x.masked_fill(~real[..., None], 0.0) for x in (query, key, value))
    writes = Writes(*(gate.masked_fill(~real, 0.0) for gate in writes))
    answers = []
    for t in range(query.shape[2]):
        one = slice(t, t + 1)
        write = Writes(*(gate[..., one] for gate in writes))
        answer, memory = _advance_at_once(memory, query[:, :, one], key[:, :, one], value[:, :, one], write)
        answers.append(answer)
    return torch.cat(answers, dim=2), memory


def _advance_at_once(
    memory: Memory, query: Tensor, key: Tensor, value: Tensor, writes: Writes
) -> tuple[Tensor, Memory]:
    """`advance_memory` in a few products of matrices."""
    keep, momentum = _cumulated(writes.log_keep), _cumulated(writes.log_momentum)
    step = writes.step.unsqueeze(-2)
    keep_start = writes.log_keep.cumsum(-1).exp().unsqueeze(-1)
    momentum_start = writes.log_momentum.cumsum(-1).exp().unsqueeze(-1)
    taken = keep * writes.real.unsqueeze(-2)
    from_momentum = taken @ momentum_start
    on_weights, on_momentum = (taken @ momentum) * step, momentum[..., -1:, :] * step

    inputs, errors = measure_surprise(memory.anchor, key, value)
    read, weights, momenta = query, [], []
    layers = zip(memory.weights.unbind(1), memory.momentum.unbind(1), inputs, errors, strict=True)
    for number, (weight, velocity, x, error) in enumerate(layers):
        if number > 0:
            read = nn.functional.silu(read)
        read = (
            keep_start * (read @ weight.mT)
            + from_momentum * (read @ velocity.mT)
            - ((read @ x.mT) * on_weights) @ error
        )
        weights.append(
            keep_start[..., -1:, :] * weight
            + from_momentum[..., -1:, :] * velocity
            - (error * on_weights[..., -1, :].unsqueeze(-1)).mT @ x
        )
        momenta.append(
            momentum_start[..., -1:, :] * velocity - (error * on_momentum[..., -1, :].unsqueeze(-1)).mT @ x
        )
    return read, Memory(memory.anchor, torch.stack(weights, dim=1), torch.stack(momenta, dim=1))


def _cumulated(logarithms: Tensor) -> Tensor:
    """Of logarithms [..., C] the products over j < k <= i [..., C (i), C (j)], 0 for j > i."""
    total = logarithms.cumsum(-1)
    future = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()


class NeuralMemory(nn.Module):
    """The memory with its projections: what all ways to use it have in common.

    Equations 11 to 15, with a short convolution, SiLU and keys and queries of length 1 (section 4.4). theta,
    eta and alpha are sigmoids, theta times `memory_max_step_size`. The weights before the first token are
    learned, and stand for what persistent tokens in front of the memory would write.
    """

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.num_heads = config.num_attention_heads
        self.head_dim = size // self.num_heads
        self.chunk_size = config.memory_chunk_size
        self.max_step_size = config.memory_max_step_size
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
        """The memory, the position in the chunk, and the last inputs of the convolution."""
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
        """Write and read the active tokens along time.

        Args:
            hidden: [n, d], normalised; layout: of the n tokens; state: `None` at the beginning.

        Returns:
            What was read, normalised per head, [n, d], and the new state.
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
        """What a call finds: the memory, the convolution's past, and the chunks that its tokens are in."""
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
        """The state after a call."""
        initial = self.initial_memory.to(memory.weights.dtype)
        position = chunks.ended % self.chunk_size
        anchor, weights = memory.anchor - initial, memory.weights - initial
        return NeuralMemoryState(anchor, weights, memory.momentum, position, past)

    def project(self, hidden: Tensor, layout: TokenLayout, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B', T', 3, H, K] of the tokens [n, d], log(1 - alpha), log eta and theta
        [B', T', 3, H], float32 at least, and the new past of the convolution."""
        dtype = at_least_float32(hidden)
        rows = layout.to_rows(self.qkv_proj(hidden))
        rows, past = convolve(self.conv, self.kernel_size, rows, past, layout)
        rows = nn.functional.silu(rows.to(dtype)).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = rows.unbind(2)
        qkv = torch.stack([_unit(query), _unit(key), value], dim=2)

        gates = self.write_proj(hidden).to(dtype).unflatten(-1, (3, self.num_heads))
        forget, momentum, step = gates.unbind(1)
        log_keep = nn.functional.logsigmoid(-forget - _INITIAL_FORGETTING).clamp(min=_LEAST_LOGARITHM)
        log_momentum = nn.functional.logsigmoid(momentum).clamp(min=_LEAST_LOGARITHM)
        gates = torch.stack([log_keep, log_momentum, self.max_step_size * step.sigmoid()], dim=1)
        return qkv, layout.to_rows(gates), past

    def advance(
        self, qkv: Tensor, gates: Tensor, memory: Memory, chunks: ChunkGrid, number: int
    ) -> tuple[Tensor, Memory]:
        """Write the tokens of a chunk, [B', C, ...] of `project`'s, and read after each: [B', C, H, K]."""
        query, key, value = qkv.movedim(1, 3).unbind(1)  # [B', H, C, K]
        real = chunks.real[:, number].unsqueeze(1).to(gates.dtype)
        log_keep, log_momentum, step = (gates.movedim(1, 3) * real.unsqueeze(1)).unbind(1)
        writes = Writes(log_keep, log_momentum, step, real)
        with torch.autocast(qkv.device.type, enabled=False):
            read, memory = advance_memory(memory, query, key, value, writes)
        complete = chunks.full[:, number].view(-1, 1, 1, 1, 1)
        anchor = torch.where(complete, memory.weights, memory.anchor)
        return read.transpose(1, 2), memory._replace(anchor=anchor)

    def collect(
        self, answers: list[Tensor], hidden: Tensor, layout: TokenLayout, chunks: ChunkGrid
    ) -> Tensor:
        """What was read in all chunks [B', C, H, K], normalised per head, as tokens [n, d]."""
        read = layout.to_tokens(chunks.to_rows(torch.stack(answers, dim=1)))
        return self.norm(read.to(hidden.dtype)).flatten(1)

    def recall(self, query: Tensor, memory: Memory) -> Tensor:
        """What the memory at the start of the chunk has for queries [B', C, d], normalised: [B', C, d]."""
        heads = nn.functional.silu(query.to(memory.anchor.dtype)).unflatten(-1, (self.num_heads, -1))
        with torch.autocast(query.device.type, enabled=False):
            read = ask_memory(memory.anchor, _unit(heads).transpose(1, 2)).transpose(1, 2)
        return self.norm(read.to(query.dtype)).flatten(2)


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def _memory_state(state: GatedState | ContextState) -> NeuralMemoryState:
    """The memory's part of a state."""
    return NeuralMemoryState(state.anchor, state.weights, state.momentum, state.position, state.past)


class MemoryAsLayer(Mixer):
    """The neural memory as a mixer. Layers of it and of softmax attention are the paper's memory as a layer
    (equations 29 to 31)."""

    state_type = NeuralMemoryState

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.memory = NeuralMemory(config)
        self.gate_proj = nn.Linear(size, size, bias=False)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """That of the memory."""
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
        """See [`Mixer.forward`]; the pointer is not used."""
        mixed, state = self.memory(hidden, layout, state)
        return self.o_proj(swish_gate(self.gate_proj(hidden), mixed)), state, None


class MemoryAsGate(Mixer):
    """Softmax attention, and the neural memory times it (equations 26 to 28).

    Both are normalised with learned weights; which passes through the nonlinearity, the paper does not say.
    Here attention does, in the place of the linear gate of `MemoryAsLayer`.
    """

    state_type = GatedState

    def __init__(self, config: StackformerConfig):
        super().__init__()
        size = config.core_size
        self.attention = Attention(config)
        self.attention.o_proj = nn.Identity()  # type: ignore[assignment]  # projected after the product
        self.attention_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.memory = NeuralMemory(config)
        self.o_proj = ResidualProjection(size, size)

    def state_spec(self) -> StateSpec:
        """That of attention, and that of the memory."""
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
        """See [`Mixer.forward`]; the pointer is not used."""
        recent = remembered = None
        if state is not None:
            recent = AttentionState(state.key, state.value, state.seen)
            remembered = _memory_state(state)
        attended, recent, _ = self.attention(hidden, pointer, layout, recent)
        mixed, remembered = self.memory(hidden, layout, remembered)
        output = self.o_proj(swish_gate(self.attention_norm(attended), mixed))
        return output, GatedState(*recent, *remembered), None


class MemoryAsContext(Mixer):
    """Softmax attention inside of segments, to which the memory is a context (equations 21 to 25).

    A segment is a chunk of the memory: while it is read, the memory at its start is what is known of the
    segments before. A token sees the persistent tokens, the tokens of its segment up to itself, and for each
    of these what the memory returned when asked with it. The memory then takes in y, the token plus what
    attention made of it, normalised, and the output is y times what the memory returns for y.

    In the paper a token sees what was returned for all tokens of its segment, and reads a memory that has
    taken in all of them: both tell of later tokens. Here everything ends at the token itself.
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
        """Rotated keys and values of the last tokens and of what the memory returned for them; the memory."""
        seen = TensorSpec("context", (self.memory.chunk_size - 1, 2, 2, *self.heads))
        return seen, *self.memory.state_spec()

    @force_accelerate_hooks("memory")  # it reads weights of `memory` without calling it
    def forward(
        self,
        hidden: Tensor,
        pointer: Tensor,
        layout: TokenLayout,
        state: ContextState | None = None,
        inputs: None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, ContextState, None]:
        """See [`Mixer.forward`]; the pointer is not used."""
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

        mixed = layout.to_tokens(segments.to_rows(torch.stack(attended, dim=1)))
        read = self.memory.collect(answers, hidden, layout, segments)
        output = self.o_proj(swish_gate(mixed, read))

        seen, kept = segments.to_rows(torch.stack(contexts, dim=1)), self.memory.chunk_size - 1
        if past is None:
            past = seen.new_zeros(len(seen), kept, *seen.shape[2:])
        seen = layout.last_of_rows(torch.cat([past.to(seen.dtype), seen], dim=1), kept)
        return output, ContextState(seen, *self.memory.end(memory, convolved, segments)), None

    def _rotate(self, query: Tensor, context: Tensor, begun: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B', C, d] and contexts [B', C, 2, d] of a segment of which `begun` [B'] tokens were before
        to rotated queries [B', C, H, K], and rotated keys and values [B', C, 2, 2, H, K].

        What the memory returned for a token stands where the token does.
        """
        key, value = apply_linear(self.kv_proj, context).unflatten(-1, (2, *self.heads)).unbind(3)
        positions = begun.unsqueeze(1) + torch.arange(query.shape[1], device=query.device)
        cos, sin = (x.to(query.dtype) for x in rotary_embedding(positions, self.heads[1], self.rope_theta))
        query, key = apply_rotary_pos_emb(
            query.unflatten(-1, self.heads), key.flatten(2, 3), cos, sin, unsqueeze_dim=2
        )
        return query, torch.stack([key.view(value.shape), value], dim=2)

    def _attend(self, query: Tensor, context: Tensor, past: Tensor | None, begun: Tensor) -> Tensor:
        """Queries and contexts of `_rotate`, and what was before the call, `past` [B', C - 1, 2, 2, H, K], of
        which `begun` [B'] tokens are of the same segment, to the mixed tokens [B', C, d]."""
        length = query.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if past is not None:
            context = torch.cat([past.to(context.dtype), context], dim=1)
            place = torch.arange(past.shape[1], device=query.device)
            earlier = (place >= past.shape[1] - begun.unsqueeze(1)).unsqueeze(1).expand(-1, length, -1)
            visible = torch.cat([earlier, visible.expand(len(earlier), -1, -1)], dim=2)
        slots, visible = context.transpose(1, 2).flatten(2, 3), visible.repeat_interleave(2, dim=-1)
        if self.persistent is not None:
            tokens = all_rows(self.persistent, self.num_persistent, slots.device)
            always = self.kv_proj(tokens).unflatten(-1, (2, *self.heads)).transpose(0, 1)
            slots = torch.cat([always.to(slots.dtype).expand(len(slots), -1, -1, -1, -1), slots], dim=2)
            visible = nn.functional.pad(visible, (always.shape[1], 0), value=True)
        key, value = slots.unbind(1)  # [B', slots, H, K]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            mask = visible.unsqueeze(-3)
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(
                1, 2
            )

        return attend_to_numbers(attend, query, key, value).flatten(2)


__all__ = ["MemoryAsContext", "MemoryAsGate", "MemoryAsLayer", "NeuralMemory"]
