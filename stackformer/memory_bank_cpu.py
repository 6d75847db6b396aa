# Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
"""The chunk form of `banked_linear_attention` for CPUs in C++: csrc/memory_bank.cpp, if it was built.

setup.py builds it where it finds a compiler. It is loaded with ctypes and knows nothing of torch, so that one
build does for every version. Nothing depends on it: without it, memory_bank.py does the same in torch.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_INPUTS = ("query", "key", "value", "read", "write", "log_decay")
# `Precision` of csrc/memory_bank.cpp, by the dtype of queries, keys, values and output.
_PRECISIONS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


class _Tokens(ctypes.Structure):
    """Pointer and strides of a tensor [B, T, H, ...] whose last dimension is dense."""

    _fields_ = [("data", ctypes.c_void_p)] + [(name, ctypes.c_int64) for name in ("batch", "time", "head")]


class _Problem(ctypes.Structure):
    """`Problem` of csrc/memory_bank.cpp, field by field."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("batch", "time", "heads", "key_size", "value_size")]
        + [(n, ctypes.c_int64) for n in ("memories", "chunk")]
        + [("eps", ctypes.c_double)]
        + [(n, _Tokens) for n in _INPUTS]
        + [(n, ctypes.c_void_p) for n in ["memory", "normalizer", "start_memory", "start_normalizer"]]
        + [(n, _Tokens) for n in ["output", "denominator"]]
        + [(n, ctypes.c_void_p) for n in ["final_memory", "final_normalizer"]]
        + [(f"grad_{n}", _Tokens) for n in ("output", *_INPUTS)]
    )


class _Step(ctypes.Structure):
    """`Step` of csrc/memory_bank.cpp, field by field."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("batch", "heads", "size", "banks", "levels", "taps")]
        + [(n, ctypes.c_double) for n in ("eps", "norm_eps")]
        + [(n, ctypes.c_void_p) for n in ("projected", "conv_weight")]
        + [(n, ctypes.c_void_p) for n in ("pointer", "read", "write", "log_decay")]
        + [(n, ctypes.c_void_p) for n in ("norm_weight", "gate", "past", "memory", "normalizer")]
        + [(n, ctypes.c_void_p) for n in ("new_past", "new_memory", "new_normalizer", "output", "rows")]
    )


def _load_library() -> ctypes.CDLL | None:
    for path in Path(__file__).parent.glob("_memory_bank.*"):
        try:
            library = ctypes.CDLL(str(path))
            library.stackformer_memory_bank.argtypes = [ctypes.POINTER(_Problem)] + [ctypes.c_int] * 3
            library.stackformer_step.argtypes = [ctypes.POINTER(_Step)] + [ctypes.c_int] * 2
            library.stackformer_step.restype = None
            return library
        except (OSError, AttributeError):  # built for another platform
            continue
    return None


_LIBRARY = _load_library()


def is_available() -> bool:
    """Whether the library was built for this platform."""
    return _LIBRARY is not None


def _tokens(tensor: Tensor) -> _Tokens:
    return _Tokens(tensor.data_ptr(), *tensor.stride()[:3])


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype, and with a last dimension that is dense."""
    if tensor.dtype != dtype:  # to ask takes a tenth of `to`, of which a token of decoding has many
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _dtypes(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[torch.dtype]:
    """What the library takes the inputs in: the dtype of the state; bfloat16 for query, key and value if all
    of them are."""
    low = dtype == torch.float32 and all(tensor.dtype == torch.bfloat16 for tensor in inputs[:3])
    return [torch.bfloat16 if low else dtype] * 3 + [dtype] * 3


def _as_taken(inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [_dense(tensor, taken) for tensor, taken in zip(inputs, _dtypes(inputs, dtype), strict=True)]


def _run(problem: _Problem, dtype: torch.dtype, backwards: bool) -> None:
    assert _LIBRARY is not None
    if _LIBRARY.stackformer_memory_bank(problem, _PRECISIONS[dtype], backwards, torch.get_num_threads()):
        raise MemoryError("no memory for the work space of banked linear attention")


def _problem(inputs: list[Tensor], output: Tensor, denominator: Tensor, length: int, eps: float) -> _Problem:
    query, _, value, read, _, _ = inputs
    batch, time, heads, key_size = query.shape
    return _Problem(
        batch=batch,
        time=time,
        heads=heads,
        key_size=key_size,
        value_size=value.shape[-1],
        memories=read.shape[-1],
        chunk=min(length, time),
        eps=eps,
        output=_tokens(output),
        denominator=_tokens(denominator),
        **{name: _tokens(tensor) for name, tensor in zip(_INPUTS, inputs, strict=True)},
    )


def _forward(
    inputs: list[Tensor], memory: Tensor, normalizer: Tensor, length: int, eps: float, keep_states: bool
) -> list[Tensor]:
    """Output [B, T, H, V], in bfloat16 if the tokens are, else the dtype of the state; denominator
    [B, T, H, 1], the final state, and the states at the start of each chunk [B, H, chunks, ...], empty if not
    `keep_states`."""
    inputs = _as_taken(inputs, memory.dtype)
    memory, normalizer = memory.contiguous(), normalizer.contiguous()
    results = _empty_results(inputs, memory, normalizer, length, eps, keep_states)
    problem = _problem(inputs, results[0], results[1], length, eps)
    problem.memory, problem.normalizer = memory.data_ptr(), normalizer.data_ptr()
    problem.final_memory, problem.final_normalizer = results[2].data_ptr(), results[3].data_ptr()
    if keep_states:
        problem.start_memory, problem.start_normalizer = results[4].data_ptr(), results[5].data_ptr()
    _run(problem, results[0].dtype, False)
    return results


def _empty_results(inputs, memory, normalizer, length, eps, keep_states) -> list[Tensor]:
    batch, time, heads, _ = inputs[0].shape
    chunks = -(-time // min(length, time)) if keep_states else 0
    return [
        memory.new_empty(batch, time, heads, memory.shape[-1], dtype=_dtypes(inputs, memory.dtype)[0]),
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
    """Gradients of the six inputs and of the initial state, from those of output and final state."""
    dtype = denominator.dtype
    inputs = _as_taken(inputs, dtype)
    output, grad_output = _dense(output, inputs[0].dtype), _dense(grad_output, inputs[0].dtype)
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
    # Copies: the gradients of the final state are overwritten with those of the initial one.
    states = [
        x.to(dtype).clone(memory_format=torch.contiguous_format) for x in (grad_memory, grad_normalizer)
    ]
    problem = _problem(inputs, output, denominator, length, eps)
    problem.start_memory, problem.start_normalizer = start_memory.data_ptr(), start_normalizer.data_ptr()
    problem.final_memory, problem.final_normalizer = states[0].data_ptr(), states[1].data_ptr()
    problem.grad_output = _tokens(grad_output)
    for name, grad in zip(_INPUTS, grads, strict=True):
        setattr(problem, f"grad_{name}", _tokens(grad))
    _run(problem, output.dtype, True)
    return grads + states


def _empty_gradients(
    inputs, output, denominator, memory, normalizer, grad_output, grad_memory, grad_normalizer, *_
):
    dtypes = _dtypes(inputs, denominator.dtype) + [denominator.dtype] * 2
    shapes = [x.shape for x in (*inputs, grad_memory, grad_normalizer)]
    return [denominator.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


if is_available():
    # As operators of torch, so that torch.compile takes them as they are.
    _OPERATORS = torch.library.Library("stackformer", "DEF")
    _OPERATORS.define(
        "chunk_forward(Tensor[] inputs, Tensor memory, Tensor normalizer, int length, float eps, "
        "bool keep_states) -> Tensor[]"
    )
    _OPERATORS.define(
        "chunk_backward(Tensor[] inputs, Tensor output, Tensor denominator, Tensor start_memory, "
        "Tensor start_normalizer, Tensor grad_output, Tensor grad_memory, Tensor grad_normalizer, "
        "int length, float eps) -> Tensor[]"
    )
    _OPERATORS.impl("chunk_forward", _forward, "CPU")
    _OPERATORS.impl("chunk_backward", _backward, "CPU")
    torch.library.register_fake("stackformer::chunk_forward", _empty_results, lib=_OPERATORS)
    torch.library.register_fake("stackformer::chunk_backward", _empty_gradients, lib=_OPERATORS)


def attend_once(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """`CompiledAttention` without a graph and without the ways through torch, which take longer than a token:
    output and final state."""
    *inputs, memory, normalizer, length, eps, keep_states = arguments
    output, _, memory, normalizer, *_ = _forward(inputs, memory, normalizer, length, eps, keep_states)
    return output.to(inputs[2].dtype), memory, normalizer


class CompiledAttention(torch.autograd.Function):
    """`banked_linear_attention` in C++; inputs as there, then the initial state, chunk length and `eps`."""

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


def mix_once(
    projected: Tensor,
    conv_weight: Tensor,
    pointer: Tensor,
    bank_weights: tuple[Tensor, Tensor, Tensor],
    norm_weight: Tensor,
    gate: Tensor,
    state: tuple[Tensor, ...],
    norm_eps: float,
    rows: Tensor | None = None,
    in_place: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One token of `BankedLinearAttention` in one call, without gradients: what lies between its projections.

    Args:
        projected: [B, 3 H F], queries, keys and values before the convolution; conv_weight: [3 H F, 1, taps].
        pointer: [B, S]; bank_weights: read, write and log decay, [B, H, N] each.
        norm_weight: [F]; gate: [B, H F].
        state: memory [B, H, S N, F, F], normalizer [B, H, S N, F], past of the convolution
            [B, taps - 1, 3 H F].
        rows: [B], whose states these are, if the state has more; written in place then.
        in_place: whether to write the new state in place of the old one, which is dense and in float32
            (float64 for float64 tokens) then.

    Returns:
        What the output is projected from [B, H F], in the dtype of `projected`, and the new state.

    Raises:
        ValueError: if the state is of other shapes than go with the tokens.
    """
    assert _LIBRARY is not None
    batch, heads, banks = bank_weights[0].shape
    levels, taps, channels = pointer.shape[-1], conv_weight.shape[-1], projected.shape[-1]
    count, size = (batch if rows is None else len(state[0])), channels // (3 * heads)
    memory_shape = (count, heads, levels * banks, size, size)
    shapes = [memory_shape, memory_shape[:-1], (count, taps - 1, channels)]
    if [tuple(tensor.shape) for tensor in state] != shapes:
        got = [tuple(tensor.shape) for tensor in state]
        raise ValueError(f"`state` must have shapes {shapes} to go with {batch} tokens, got {got}")
    low = projected.dtype if projected.dtype in _PRECISIONS else torch.float32
    high = torch.promote_types(low, torch.float32)
    tokens = {"projected": projected, "conv_weight": conv_weight, "norm_weight": norm_weight, "gate": gate}
    gates = {"pointer": pointer, **dict(zip(("read", "write", "log_decay"), bank_weights, strict=True))}
    past = dict(zip(("memory", "normalizer", "past"), state, strict=True))
    arguments = {name: _dense(tensor, low).contiguous() for name, tensor in tokens.items()}
    arguments |= {name: _dense(tensor, high).contiguous() for name, tensor in (gates | past).items()}
    output = torch.empty_like(arguments["gate"])
    new_state = state
    if not in_place:
        new_state = tuple(torch.empty_like(arguments[name]) for name in past)
    arguments |= {"output": output, **{f"new_{name}": x for name, x in zip(past, new_state, strict=True)}}
    step = _Step(
        batch=batch,
        heads=heads,
        size=size,
        banks=banks,
        levels=levels,
        taps=taps,
        eps=eps,
        norm_eps=norm_eps,
        rows=None if rows is None else rows.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in arguments.items()},
    )
    _LIBRARY.stackformer_step(step, _PRECISIONS[low], torch.get_num_threads())
    return output if low == projected.dtype else output.to(projected.dtype), new_state
