# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""One token of a mixer with banks of memories for CPUs in C++: `Step` of csrc/memory_bank.cpp."""

import torch
from torch import Tensor

from .library import CPU, LIBRARY, PRECISIONS, Step, address_of, check_layout, contiguous

# The feature maps that the library knows, in its order.
FEATURE_MAPS = ("elu_plus_one", "exp")


def _check_step(
    projected: Tensor,
    conv_weight: Tensor,
    pointer: Tensor,
    bank_weights: tuple[Tensor, Tensor, Tensor],
    norm_weight: Tensor,
    gate: Tensor,
    state: tuple[Tensor, ...],
    rows: Tensor | None,
    step_size: Tensor | None,
) -> tuple[int, int, int, int, int, int, int]:
    """Checks the arguments of `decode_token`, and returns the sizes that `Step` begins with."""
    dimensions = (projected.dim(), conv_weight.dim(), pointer.dim(), bank_weights[0].dim())
    tensors = 3 if step_size is None else 2
    if dimensions != (2, 3, 2, 3) or len(bank_weights) != 3 or len(state) != tensors:
        raise ValueError(
            "`projected`, `conv_weight`, `pointer` and `bank_weights[0]` must have 2, 3, 2 and 3 dimensions, "
            f"`bank_weights` 3 tensors and `state` {tensors}, got {dimensions} dimensions, and "
            f"{len(bank_weights)} and {len(state)} tensors"
        )
    (batch, channels), (_, heads, banks) = projected.shape, bank_weights[0].shape
    levels, taps, size = pointer.shape[1], conv_weight.shape[2], channels // max(3 * heads, 1)
    if not (size and heads and banks and levels and taps):
        raise ValueError(
            "tokens must have at least one channel for each part of each head, bank, level and tap, got "
            f"{channels} channels, {heads} heads, {banks} banks, {levels} levels and {taps} taps"
        )
    memory, past = state[0], state[-1]
    if rows is None:
        count = batch
    else:
        count = memory.shape[0] if memory.dim() > 0 else 0
        if rows.shape != (batch,) or rows.dtype != torch.int64 or not rows.is_cpu:
            raise ValueError(
                f"`rows` must be {batch} integers of 64 bits on the CPU, got a tensor of shape "
                f"{tuple(rows.shape)}, {rows.dtype}, on {rows.device}"
            )
    gates, width = (batch, heads, banks), heads * size
    bank = (count, heads, levels * banks, size)
    expected = [
        ("projected", projected, (batch, 3 * width)),
        ("conv_weight", conv_weight, (channels, 1, taps)),
        ("pointer", pointer, (batch, levels)),
        ("bank_weights[0]", bank_weights[0], gates),
        ("bank_weights[1]", bank_weights[1], gates),
        ("bank_weights[2]", bank_weights[2], gates),
        ("norm_weight", norm_weight, (size,)),
        ("gate", gate, (batch, width)),
        ("state[0]", memory, (*bank, size)),
        (f"state[{tensors - 1}]", past, (count, taps - 1, channels)),
    ]
    if step_size is None:
        expected.append(("state[1]", state[1], bank))
    else:
        expected.append(("step_size", step_size, gates[:2]))
    check_layout(CPU, expected)
    return batch, count, heads, size, banks, levels, taps


def decode_token(
    projected: Tensor,
    conv_weight: Tensor,
    pointer: Tensor,
    bank_weights: tuple[Tensor, Tensor, Tensor],
    norm_weight: Tensor,
    gate: Tensor,
    state: tuple[Tensor, ...],
    norm_eps: float,
    step_size: Tensor | None = None,
    feature_map: str = "elu_plus_one",
    rows: Tensor | None = None,
    in_place: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Computes one token of a mixer with banks between its projections, in one call, without gradients.

    It takes the convolution, the feature map, the gates, one or two passes over the state, the norm and the
    output gate. The mixer is `BankedLinearAttention`, or with step sizes `BankedDeltaRule`, whose feature map
    is SiLU and then length 1.

    Args:
        projected: [B, 3 H F], queries, keys and values before the convolution; conv_weight: [3 H F, 1, taps].
        pointer: [B, S]; bank_weights: the weights of reads and writes and the log decay, [B, H, N] each.
        norm_weight: [F]; gate: [B, H F].
        state: memory [B, H, S N, F, F], normalizer [B, H, S N, F] (not with step sizes), past of the
            convolution [B, taps - 1, 3 H F].
        norm_eps: added to the mean square in the norm.
        step_size: [B, H], of the delta rule.
        feature_map: of queries and keys, one of `FEATURE_MAPS`; not used with step sizes.
        rows: [B], ascending, the rows of the state that the tokens belong to, if the state has more rows. The
            state is written in place then.
        in_place: whether to write the new state in place of the old one, which must be dense and in float32
            (float64 for float64 tokens) then.
        eps: added to the denominator.

    Returns:
        The input of the output projection [B, H F], in the dtype of `projected`, and the new state.

    Raises:
        ValueError: if shapes, dtypes or devices do not go together, for rows that the state does not have,
            for a state that cannot be written in place, and for tensors that require gradients with these on.
    """
    assert LIBRARY is not None
    sizes = _check_step(
        projected, conv_weight, pointer, bank_weights, norm_weight, gate, state, rows, step_size
    )
    if rows is not None and not in_place:
        raise ValueError("`in_place` must be true where `rows` are given, got False")
    tokens = (projected, conv_weight, norm_weight, gate)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*tokens, pointer, *bank_weights, *state)):
        raise ValueError("`decode_token` must be called without gradients, got tensors that require them")
    if rows is not None:
        rows = rows.contiguous()
    dtype = projected.dtype
    low = dtype if dtype in PRECISIONS else torch.float32
    high = torch.float64 if low == torch.float64 else torch.float32
    projected, conv_weight, norm_weight, gate = (contiguous(tensor, low) for tensor in tokens)
    pointer, read, write, log_decay = (contiguous(tensor, high) for tensor in (pointer, *bank_weights))
    if step_size is not None:
        step_size = contiguous(step_size, high)
    old_state = tuple(contiguous(tensor, high) for tensor in state)
    if not in_place:
        state = tuple(torch.empty_like(tensor) for tensor in old_state)
    elif any(new is not old for new, old in zip(state, old_state, strict=True)):
        raise ValueError(
            f"`state` must be dense and in {high} to be written in place, got "
            f"{[(tensor.dtype, tensor.stride()) for tensor in state]}"
        )
    else:  # autograd does not see what the library writes
        torch.autograd.graph.increment_version([tensor for tensor in state if not tensor.is_inference()])
    output = torch.empty_like(gate)
    old_normalizer, new_normalizer = (None, None) if step_size is not None else (old_state[1], state[1])
    tensors = (
        *(projected, conv_weight, pointer, read, write, log_decay, step_size, norm_weight, gate),
        *(old_state[-1], old_state[0], old_normalizer, state[-1], state[0], new_normalizer, output, rows),
    )
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if 0 in addresses:  # raises, unless a tensor without elements is the reason
        addresses = [None if tensor is None else address_of(tensor) for tensor in tensors]
    step = Step(*sizes, FEATURE_MAPS.index(feature_map), eps, norm_eps, *addresses)
    failure = LIBRARY.stackformer_step(step, PRECISIONS[low], torch.get_num_threads())
    if failure == 1:
        raise MemoryError("no memory for the work space of a token")
    if failure == 2:
        raise ValueError(f"`rows` must be ascending and less than the state's {sizes[1]}, got {rows}")
    return output if low == dtype else output.to(dtype), state
