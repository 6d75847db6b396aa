# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The chunk form of `banked_delta_rule` for CPUs in C++: csrc/memory_bank.cpp, if it was built.

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

_NAMES = (*INPUTS, "step_size")


def check_call(inputs: Sequence[Tensor], memory: Tensor, length: int, prefix: str = "") -> None:
    """Raises a ValueError unless the tensors of an operator go together, and are all where the first one is.

    Args:
        inputs: query to step size, as in `banked_delta_rule`.
        memory: [B, H, R, K, V], or its gradient.
        prefix: of the name of the memory.
    """
    check_problem(inputs, (memory,), (*_NAMES, f"{prefix}memory"))
    check_length(length)
    check_precision(f"{prefix}memory", memory)


def _as_taken(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns the inputs as the library takes them; the step sizes [B, T, H, 1] for a dense dimension."""
    *others, step_size = inputs
    return [
        dense(tensor, taken)
        for tensor, taken in zip((*others, step_size.unsqueeze(-1)), taken_dtypes(inputs, dtype), strict=True)
    ]


def _forward(inputs: Sequence[Tensor], memory: Tensor, length: int, keep_states: bool) -> list[Tensor]:
    """Computes the forward pass on tensors that were checked.

    Returns:
        The output [B, T, H, V], in bfloat16 if the tokens are, else in the dtype of the state; the final
        memory; the errors [B, T, H, V]; and the memory at the start of each chunk [B, H, chunks, ...]. The
        last two are empty without `keep_states`.
    """
    inputs = _as_taken(inputs, memory.dtype)
    memory = contiguous(memory, memory.dtype)
    results = _empty_results(inputs, memory, length, keep_states)
    output, final, errors, starts = results
    problem = problem_of(inputs, _NAMES, length, output=output, errors=errors)
    problem.memory, problem.final_memory = address_of(memory), address_of(final)
    if keep_states:
        problem.start_memory = address_of(starts)
    run_problem(problem, output.dtype, False)
    return results


def _checked_forward(
    inputs: Sequence[Tensor], memory: Tensor, length: int, keep_states: bool
) -> list[Tensor]:
    """Checks the tensors and computes the forward pass, for anybody who calls the operator."""
    check_call(inputs, memory, length)
    return _forward(inputs, memory, length, keep_states)


def _fake_forward(inputs, memory, length, keep_states) -> list[Tensor]:
    check_call(inputs, memory, length)
    return _empty_results(inputs, memory, length, keep_states)


def _empty_results(inputs, memory, length, keep_states) -> list[Tensor]:
    """Returns the results of `_forward`, not yet computed."""
    batch, time, heads, _ = inputs[0].shape
    values = (batch, time if keep_states else 0, heads, memory.shape[-1])
    chunks = -(-time // min(length, time)) if keep_states else 0
    return [
        memory.new_empty(batch, time, heads, memory.shape[-1], dtype=taken_dtypes(inputs, memory.dtype)[0]),
        torch.empty_like(memory, memory_format=torch.contiguous_format),
        memory.new_empty(values),
        memory.new_empty(batch, heads, chunks, *memory.shape[2:]),
    ]


def _backward(
    inputs: list[Tensor],
    errors: Tensor,
    start_memory: Tensor,
    grad_output: Tensor,
    grad_memory: Tensor,
    length: int,
) -> list[Tensor]:
    """Computes the gradients of the seven inputs and of the initial state, on tensors that it checks."""
    _check_backward(inputs, errors, start_memory, grad_output, grad_memory, length)
    dtype = errors.dtype
    inputs = _as_taken(inputs, dtype)
    grad_output = dense(grad_output, inputs[0].dtype)
    errors, start_memory = contiguous(errors, dtype), contiguous(start_memory, dtype)
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
    # A copy: the gradient of the final state is overwritten with that of the initial one.
    state = grad_memory.to(dtype).clone(memory_format=torch.contiguous_format).resolve_neg()
    problem = problem_of(inputs, _NAMES, length, grad_output=grad_output, errors=errors)
    problem.start_memory, problem.final_memory = address_of(start_memory), address_of(state)
    for name, grad in zip(_NAMES, grads, strict=True):
        setattr(problem, f"grad_{name}", tokens_of(grad))
    run_problem(problem, inputs[0].dtype, True)
    return [*grads[:-1], grads[-1].squeeze(-1), state]


def _check_backward(inputs, errors, start_memory, grad_output, grad_memory, length) -> None:
    check_call(inputs, grad_memory, length, prefix="grad_")
    (batch, time, heads, _), value = inputs[0].shape, inputs[2]
    chunks, bank = -(-time // min(length, time)), grad_memory.shape[2:]
    check_layout(
        value.device,
        (
            ("errors", errors, value.shape),
            ("grad_output", grad_output, value.shape),
            ("start_memory", start_memory, (batch, heads, chunks, *bank)),
        ),
    )
    check_precision("errors", errors)


def _fake_backward(inputs, errors, start_memory, grad_output, grad_memory, length) -> list[Tensor]:
    _check_backward(inputs, errors, start_memory, grad_output, grad_memory, length)
    dtypes = [*taken_dtypes(inputs, errors.dtype), errors.dtype]
    shapes = [x.shape for x in (*inputs, grad_memory)]
    return [errors.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


if is_available():
    # As operators of torch, so that torch.compile takes them as they are.
    _OPERATORS = torch.library.Library("stackformer", "FRAGMENT")
    _OPERATORS.define(
        "delta_forward(Tensor[] inputs, Tensor memory, int length, bool keep_states) -> Tensor[]"
    )
    _OPERATORS.define(
        "delta_backward(Tensor[] inputs, Tensor errors, Tensor start_memory, Tensor grad_output, "
        "Tensor grad_memory, int length) -> Tensor[]"
    )
    _OPERATORS.impl("delta_forward", _checked_forward, "CPU")
    _OPERATORS.impl("delta_backward", _backward, "CPU")
    torch.library.register_fake("stackformer::delta_forward", _fake_forward, lib=_OPERATORS)
    torch.library.register_fake("stackformer::delta_backward", _fake_backward, lib=_OPERATORS)


class _CompiledDeltaRule(torch.autograd.Function):
    """Computes `banked_delta_rule` in C++, through the operators of torch.

    The arguments are the seven inputs, the initial state, the chunk length, and whether there will be a
    backward pass.
    """

    @staticmethod
    def forward(ctx, query, key, value, read, write, log_decay, step_size, memory, length, keep_states):
        inputs = (query, key, value, read, write, log_decay, step_size)
        output, final, errors, starts = torch.ops.stackformer.delta_forward(
            inputs, memory, length, keep_states
        )
        ctx.length = length
        ctx.save_for_backward(*inputs, errors, starts)
        return output.to(value.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_memory):
        *inputs, errors, starts = ctx.saved_tensors
        grads = torch.ops.stackformer.delta_backward(
            inputs, errors, starts, grad_output, grad_memory, ctx.length
        )
        of_inputs = [grad.to(x.dtype) for grad, x in zip(grads[:-1], inputs, strict=True)]
        return *of_inputs, grads[-1], None, None


def correct(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor,
    write: Tensor,
    log_decay: Tensor,
    step_size: Tensor,
    memory: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Computes `banked_delta_rule` in chunks of `length` tokens, on tensors that were checked.

    Returns:
        The output [B, T, H, V] in the dtype of `value`, and the final memory.
    """
    tensors = (query, key, value, read, write, log_decay, step_size, memory)
    keep_states = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if keep_states or torch.compiler.is_compiling() or not is_plain(*tensors):
        return _CompiledDeltaRule.apply(*tensors, length, keep_states)
    # Call the library directly: the way through torch's operators takes longer than a token.
    output, final, _, _ = _forward(tensors[:7], memory, length, False)
    return output.to(value.dtype), final


__all__ = ["correct"]
