"""Compiles what the operators launch for compute capability 9.0, without a GPU; prints a line per kernel.

A process of its own: kernels that are compiled cannot be interpreted, and the other way round.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from stackformer import delta_bank_triton, memory_bank_triton

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def launch(kernel, *args, grid, warmup, **kwargs):
    """In place of `JITFunction.run`: compile for these arguments, as a launch would."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        argument = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[index,] = "constexpr", argument
        elif isinstance(argument, torch.Tensor):
            signature[parameter.name], attributes[index,] = TYPES[argument.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(argument, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    sizes = {name: constants[kernel.arg_names.index(name),] for name in ("K", "V", "R") if name in arguments}
    line = {
        "name": kernel.__name__,
        **sizes,
        "reverse": arguments.get("REVERSE", False),
        "precision": arguments.get("PRECISION"),
        "dtype": str(arguments["states"].dtype).removeprefix("torch.") if "states" in arguments else None,
        "shared_bytes": compiled.metadata.shared,
        "registers": int(registers),
        "stack_bytes": int(stack),
        **options,
    }
    print(json.dumps(line), flush=True)


def compile_all(key_size, value_size, memories, dtype, chunk_size, allow_tf32=False):
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    query, key, value = (
        torch.zeros(1, 512, 1, size, dtype=dtype) for size in (key_size, key_size, value_size)
    )
    read, write, log_decay = torch.zeros(3, 1, 512, 1, memories)
    memory = torch.zeros(1, 1, memories, key_size, value_size)
    gates = (read, write, log_decay)
    inputs = (query, key, value, *gates, memory, memory[..., 0])
    output, *final, denominator = memory_bank_triton._forward(*inputs, chunk_size, 1e-6)
    memory_bank_triton._backward(*inputs, output, denominator, output, *final, chunk_size)
    inputs = (query, key, value, *gates, read[..., 0])
    output, errors, final, states = delta_bank_triton._forward(*inputs, memory, chunk_size)
    delta_bank_triton._backward(*inputs, errors, states, output, final, chunk_size)


if __name__ == "__main__":
    JITFunction.run = launch
    compile_all(64, 64, 4, torch.bfloat16, 64)
    compile_all(128, 128, 16, torch.bfloat16, 256)
    compile_all(128, 128, 4, torch.float16, 64)
    compile_all(64, 64, 4, torch.float32, 64, allow_tf32=True)
    compile_all(64, 64, 4, torch.float32, 64)
    compile_all(128, 128, 64, torch.float32, 256)
