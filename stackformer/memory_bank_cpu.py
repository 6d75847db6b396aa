# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The chunk form of `banked_linear_attention` for CPUs in C++: csrc/memory_bank.cpp, if it was built.

The library reads and writes wherever a pointer leads, so every tensor is checked before it becomes a pointer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import (
    INPUTS,
    address_of,
    check_layout,
    check_length,
    check_precision,
    check_problem,
    contiguous,
    dense,
    is_available,
    is_plain,
    problem_of,
    run_problem,
    taken_dtypes,
    tokens_of,
)


def check_call(inputs: Sequence[Tensor], state: Sequence[Tensor], prefix: str = "") -> None:
    """Raises a ValueError unless the tensors of an operator go together, and are all where the first one is.

    Args:
        inputs: query to log decay, as in `banked_linear_attention`.
        state: memory [B, H, R, K, V] and normalizer [B, H, R, K], or their gradients.
        prefix: of the names of these two.
    """
    check_problem(inputs, state, (*INPUTS, f"{prefix}memory", f"{prefix}normalizer"))


def _as_taken(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns the inputs as the library takes them, for states in the dtype."""
    return [dense(tensor, taken) for tensor, taken in zip(inputs, taken_dtypes(inputs, dtype), strict=True)]


def _forward(
    inputs: Sequence[Tensor], memory: Tensor, normalizer: Tensor, length: int, eps: float, keep_states: bool
) -> list[Tensor]:
    """Computes the forward pass on tensors that were checked.

    Returns:
        The output [B, T, H, V], in bfloat16 if the tokens are, else in the dtype of the state; the
        denominator [B, T, H, 1]; the final memory and normalizer; and those at the start of each chunk,
        [B, H, chunks, ...], which are empty without `keep_states`.
    """
    inputs = _as_taken(inputs, memory.dtype)
    memory, normalizer = (contiguous(tensor, memory.dtype) for tensor in (memory, normalizer))
    results = _empty_results(inputs, memory, normalizer, length, eps, keep_states)
    problem = problem_of(inputs, INPUTS, length, output=results[0], denominator=results[1])
    problem.eps = eps
    problem.memory, problem.normalizer = address_of(memory), address_of(normalizer)
    problem.final_memory, problem.final_normalizer = address_of(results[2]), address_of(results[3])
    if keep_states:
        problem.start_memory, problem.start_normalizer = address_of(results[4]), address_of(results[5])
    run_problem(problem, results[0].dtype, False)
    return results


def _checked_forward(
    inputs: Sequence[Tensor], memory: Tensor, normalizer: Tensor, length: int, eps: float, keep_states: bool
) -> list[Tensor]:
    """Checks the tensors and computes the forward pass, for anybody who calls the operator."""
    _check_forward(inputs, memory, normalizer, length)
    return _forward(inputs, memory, normalizer, length, eps, keep_states)


def _fake_forward(inputs, memory, normalizer, length, eps, keep_states) -> list[Tensor]:
    _check_forward(inputs, memory, normalizer, length)
    return _empty_results(inputs, memory, normalizer, length, eps, keep_states)


def _check_forward(inputs: Sequence[Tensor], memory: Tensor, normalizer: Tensor, length: int) -> None:
    check_call(inputs, (memory, normalizer))
    check_length(length)
    check_precision("memory", memory)
    if normalizer.dtype != memory.dtype:
        raise ValueError(f"`normalizer` must be {memory.dtype} as `memory` is, got {normalizer.dtype}")


def _empty_results(inputs, memory, normalizer, length, eps, keep_states) -> list[Tensor]:
    """Returns the results of `_forward`, not yet computed."""
    batch, time, heads, _ = inputs[0].shape
    chunks = -(-time // min(length, time)) if keep_states else 0
    return [
        memory.new_empty(batch, time, heads, memory.shape[-1], dtype=taken_dtypes(inputs, memory.dtype)[0]),
        memory.new_empty(batch, time, heads, 1),
        torch.empty_like(memory, memory_format=torch.contiguous_format),
        torch.empty_like(normalizer, memory_format=torch.contiguous_format),
        memory.new_empty(batch, heads, chunks, *memory.shape[2:]),
        memory.new_empty(batch, heads, chunks, *normalizer.shape[2:]),
    ]


def _backward(
    inputs: list[Tensor],
    output: Tensor,
    denominator: Tensor,
    start_memory: Tensor,
    start_normalizer: Tensor,
    grad_output: Tensor,
    grad_memory: Tensor,
    grad_normalizer: Tensor,
    length: int,
    eps: float,
) -> list[Tensor]:
    """Computes the gradients of the six inputs and of the initial state, on tensors that it checks."""
    tensors = (output, denominator, start_memory, start_normalizer)
    _check_backward(inputs, *tensors, grad_output, grad_memory, grad_normalizer, length)
    dtype = denominator.dtype
    inputs = _as_taken(inputs, dtype)
    output, grad_output = dense(output, inputs[0].dtype), dense(grad_output, inputs[0].dtype)
    start_memory, start_normalizer = (contiguous(x, dtype) for x in (start_memory, start_normalizer))
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
    # Copies: the gradients of the final state are overwritten with those of the initial one.
    states = [
        x.to(dtype).clone(memory_format=torch.contiguous_format).resolve_neg()
        for x in (grad_memory, grad_normalizer)
    ]
    problem = problem_of(inputs, INPUTS, length, output=output, denominator=denominator)
    problem.eps = eps
    problem.start_memory, problem.start_normalizer = address_of(start_memory), address_of(start_normalizer)
    problem.final_memory, problem.final_normalizer = address_of(states[0]), address_of(states[1])
    problem.grad_output = tokens_of(grad_output)
    for name, grad in zip(INPUTS, grads, strict=True):
        setattr(problem, f"grad_{name}", tokens_of(grad))
    run_problem(problem, output.dtype, True)
    return grads + states


def _check_backward(
    inputs, output, denominator, start_memory, start_normalizer, grad_output, grad_memory, grad_normalizer,
    length,
) -> None:  # fmt: skip
    check_call(inputs, (grad_memory, grad_normalizer), prefix="grad_")
    check_length(length)
    (batch, time, heads, _), value = inputs[0].shape, inputs[2]
    chunks, bank = -(-time // min(length, time)), grad_memory.shape[2:]
    check_layout(
        value.device,
        (
            ("output", output, value.shape),
            ("grad_output", grad_output, value.shape),
            ("denominator", denominator, (batch, time, heads, 1)),
            ("start_memory", start_memory, (batch, heads, chunks, *bank)),
            ("start_normalizer", start_normalizer, (batch, heads, chunks, *bank[:-1])),
        ),
    )
    check_precision("denominator", denominator)


def _fake_backward(
    inputs, output, denominator, memory, normalizer, grad_output, grad_memory, grad_normalizer, length, eps
) -> list[Tensor]:
    tensors = (output, denominator, memory, normalizer, grad_output, grad_memory, grad_normalizer)
    _check_backward(inputs, *tensors, length)
    dtypes = taken_dtypes(inputs, denominator.dtype) + [denominator.dtype] * 2
    shapes = [x.shape for x in (*inputs, grad_memory, grad_normalizer)]
    return [denominator.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


if is_available():
    # As operators of torch, so that torch.compile takes them as they are.
    _OPERATORS = torch.library.Library("stackformer", "FRAGMENT")
    _OPERATORS.define(
        "chunk_forward(Tensor[] inputs, Tensor memory, Tensor normalizer, int length, float eps, "
        "bool keep_states) -> Tensor[]"
    )
    _OPERATORS.define(
        "chunk_backward(Tensor[] inputs, Tensor output, Tensor denominator, Tensor start_memory, "
        "Tensor start_normalizer, Tensor grad_output, Tensor grad_memory, Tensor grad_normalizer, "
        "int length, float eps) -> Tensor[]"
    )
    _OPERATORS.impl("chunk_forward", _checked_forward, "CPU")
    _OPERATORS.impl("chunk_backward", _backward, "CPU")
    torch.library.register_fake("stackformer::chunk_forward", _fake_forward, lib=_OPERATORS)
    torch.library.register_fake("stackformer::chunk_backward", _fake_backward, lib=_OPERATORS)


class CompiledAttention(torch.autograd.Function):
    """Computes `banked_linear_attention` in C++, through the operators of torch.

    The arguments are the six inputs, the initial state, the chunk length, `eps`, and whether there will be a
    backward pass.
    """

    @staticmethod
    def forward(ctx, query, key, value, read, write, log_decay, memory, normalizer, length, eps, keep_states):
        inputs = (query, key, value, read, write, log_decay)
        output, denominator, *states = torch.ops.stackformer.chunk_forward(
            inputs, memory, normalizer, length, eps, keep_states
        )
        output = output.to(value.dtype)
        ctx.length, ctx.eps = length, eps
        ctx.save_for_backward(*inputs, output, denominator, *states[2:])
        return output, states[0], states[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_memory, grad_normalizer):
        *inputs, output, denominator, memory, normalizer = ctx.saved_tensors
        grads = torch.ops.stackformer.chunk_backward(
            inputs, output, denominator, memory, normalizer, grad_output, grad_memory, grad_normalizer,
            ctx.length, ctx.eps,
        )  # fmt: skip
        of_inputs = [grad.to(x.dtype) for grad, x in zip(grads[:6], inputs, strict=True)]
        return *of_inputs, *grads[6:], None, None, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    length: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `banked_linear_attention` in chunks of `length` tokens, on tensors that were checked.

    Returns:
        The output [B, T, H, V] in the dtype of `value`, and the final memory and normalizer.
    """
    tensors = (query, key, value, read, write, log_decay, memory, normalizer)
    keep_states = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if keep_states or torch.compiler.is_compiling() or not is_plain(*tensors):
        return CompiledAttention.apply(*tensors, length, eps, keep_states)
    # Call the library directly: the way through torch's operators takes longer than a token.
    results = _forward(tensors[:6], memory, normalizer, length, eps, False)
    return results[0].to(value.dtype), results[2], results[3]
