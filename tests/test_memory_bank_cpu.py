"""The border to the C++ library: only tensors that it can read get there, and only the library that fits."""

import ctypes
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from stackformer import library as library_border
from stackformer.decoding_cpu import decode_token
from stackformer.library import is_available
from stackformer.memory_bank import banked_linear_attention
from tests.test_memory_bank import NAMES, WRONG, make_inputs, run

SOURCE = Path(library_border.__file__).parent / "csrc" / "memory_bank.cpp"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("cc")
built = pytest.mark.skipif(not is_available(), reason="the C++ library was not built")


def make_step(batch=3, heads=2, size=4, banks=3, levels=2, taps=4, dtype=torch.float64, rows=None):
    """Arguments of `decode_token`."""
    generator = torch.Generator().manual_seed(0)
    channels, count = 3 * heads * size, batch if rows is None else 5

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=dtype)

    return {
        "projected": rand(batch, channels) - 0.5,
        "conv_weight": rand(channels, 1, taps),
        "pointer": rand(batch, levels),
        "read": rand(batch, heads, banks),
        "write": rand(batch, heads, banks),
        "log_decay": -rand(batch, heads, banks),
        "norm_weight": rand(size),
        "gate": rand(batch, heads * size),
        "memory": rand(count, heads, levels * banks, size, size),
        "normalizer": rand(count, heads, levels * banks, size),
        "past": rand(count, taps - 1, channels),
        "rows": rows,
    }


def mix(arguments, **options):
    """`decode_token` of those."""
    arguments = dict(arguments)
    weights = tuple(arguments.pop(name) for name in ("read", "write", "log_decay"))
    state = tuple(arguments.pop(name) for name in ("memory", "normalizer", "past"))
    return decode_token(**arguments, bank_weights=weights, state=state, norm_eps=1e-6, **options)


STEP = [name for name in make_step() if name != "rows"]
SHOWN = {
    "read": "bank_weights[0]",
    "write": "bank_weights[1]",
    "log_decay": "bank_weights[2]",
    "memory": "state[0]",
    "normalizer": "state[1]",
    "past": "state[2]",
}


@built
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("name", STEP)
def test_a_wrong_tensor_of_a_mixed_token_is_named(name, wrong):
    arguments = make_step()
    arguments[name] = wrong(arguments[name])
    with pytest.raises(ValueError, match="must") as error:
        mix(arguments)
    sized = wrong in [WRONG[key] for key in ("too long", "too short", "without elements")]
    if not sized or name not in ("projected", "conv_weight", "pointer", "read"):  # the others are as wrong
        assert f"`{SHOWN.get(name, name)}`" in str(error.value)


@built
@pytest.mark.parametrize(
    "rows",
    [
        [0, 2, 5],
        [-1, 2, 4],
        [0, 2, 2**40],
        [0, 2, 2],
        [2, 1, 3],
        [0, 2],
        [[0, 1, 2]],
    ],
)
def test_rows_that_the_state_has_not(rows):
    with pytest.raises(ValueError, match="`rows` must be"):
        mix(make_step(rows=torch.tensor(rows)), in_place=True)


@built
@pytest.mark.parametrize(
    "change", [lambda x: x.int(), lambda x: x.double(), lambda x: x.to("meta"), lambda x: x > 1]
)
def test_rows_that_are_no_numbers_of_rows(change):
    with pytest.raises(ValueError, match="`rows` must be 3 integers of 64 bits on the CPU"):
        mix(make_step(rows=change(torch.tensor([0, 2, 4]))), in_place=True)


@built
def test_rows_from_anywhere_in_memory():
    rows = torch.tensor([0, 9, 2, 9, 4, 9])[::2]
    expected, part = mix({**make_step(rows=rows), "rows": None} | state_of(make_step(rows=rows), rows))
    arguments = make_step(rows=rows)
    actual, state = mix(arguments, in_place=True)
    assert torch.equal(actual, expected)
    assert all(torch.equal(x[rows], y) for x, y in zip(state, part, strict=True))


def state_of(arguments, rows):
    return {name: arguments[name][rows] for name in ("memory", "normalizer", "past")}


@built
def test_what_cannot_be_written_in_place():
    with pytest.raises(ValueError, match="`in_place` must be true where `rows` are given"):
        mix(make_step(rows=torch.tensor([0, 2, 4])))
    for name, change in [
        ("memory", lambda x: x.transpose(-1, -2)),
        ("normalizer", lambda x: x[:1].expand_as(x)),
        ("past", lambda x: x.float()),
    ]:
        arguments = make_step()
        arguments[name] = change(arguments[name])
        before = {key: x.clone() for key, x in arguments.items() if x is not None}
        with pytest.raises(ValueError, match="`state` must be dense and in torch.float64"):
            mix(arguments, in_place=True)
        assert all(torch.equal(arguments[key], x) for key, x in before.items())


@built
def test_a_mixed_token_has_no_gradients():
    arguments = make_step()
    arguments["conv_weight"].requires_grad_()
    with pytest.raises(ValueError, match="without gradients"):
        mix(arguments)
    with torch.no_grad():
        mix(arguments)


@built
@pytest.mark.parametrize("inference", [False, True])
def test_autograd_notices_what_is_written_in_place(inference):
    """A gradient that needs the old state raises; it would be one of the new state."""
    arguments = make_step()
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    product = (x * arguments["memory"]).sum()
    with torch.inference_mode() if inference else torch.no_grad():
        mix(arguments, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@built
def test_a_state_from_inference_mode_may_be_written_in_place():
    with torch.inference_mode():
        arguments = make_step()
        _, state = mix(arguments)
    arguments |= dict(zip(("memory", "normalizer", "past"), state, strict=True))
    expected, _ = mix(arguments)
    with torch.no_grad():
        actual, _ = mix(arguments, in_place=True)
    assert torch.equal(actual, expected)


# Tensors whose elements are not where, or not what, their strides say.
def as_strided(x):
    """Slices with an offset, of something twice as large in each dimension."""
    larger = x.new_full([2 * size + 1 for size in x.shape], torch.nan)
    part = larger[tuple(slice(1, None, 2) for _ in x.shape)]
    return part.copy_(x)


def as_negative(x):
    """With the sign in a flag; torch makes those of complex numbers that are conjugated."""
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    return negative


def as_dense_negative(x):
    negative = torch._neg_view(-x)
    assert negative.is_neg() and negative.is_contiguous()
    return negative


def as_transposed(x):
    return x.mT.contiguous().mT if x.dim() > 1 else as_strided(x)


VIEWS = [as_strided, as_negative, as_dense_negative, as_transposed]
IMPLEMENTATIONS = ["chunk", pytest.param("cpp", marks=built)]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("time", [1, 20])
@pytest.mark.parametrize("value_size", [1, 3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_views_are_read_as_what_they_are(implementation, value_size, time, view):
    inputs = {name: x.detach() for name, x in make_inputs(time=time, value_size=value_size).items()}
    expected = run(inputs, implementation)
    for name, tensor in inputs.items():
        actual = run(inputs | {name: view(tensor)}, implementation)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=name)
    viewed = {name: view(tensor).requires_grad_() for name, tensor in inputs.items()}
    exact = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    for one, other in zip(gradients(viewed, implementation), gradients(exact, implementation), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def gradients(inputs, implementation):
    """Under gradients of the results that are views themselves."""
    results = [x for y in run(inputs, implementation) for x in (y if isinstance(y, tuple) else (y,))]
    along = [torch.ones(1, dtype=x.dtype).expand_as(x) for x in results]
    along[0] = as_dense_negative(along[0].contiguous())
    return torch.autograd.grad(results, list(inputs.values()), along)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("time", [1, 20])
def test_expanded_tensors(implementation, time):
    """One element for all of a dimension, the batch of an initial state included."""
    inputs = {name: x.detach() for name, x in make_inputs(time=time).items()}
    for dimension in range(4):
        expanded = {
            name: x.narrow(min(dimension, x.dim() - 1), 0, 1).expand_as(x) for name, x in inputs.items()
        }
        dense = {name: x.contiguous() for name, x in expanded.items()}
        torch.testing.assert_close(run(expanded, implementation), run(dense, implementation))


@built
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_mixed_token(view):
    arguments = make_step()
    expected, expected_state = mix(arguments)
    for name in STEP:
        actual, state = mix(arguments | {name: view(arguments[name])})
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=name)
        torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)


@built
@pytest.mark.parametrize("time", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_whose_memory_was_freed(name, time):
    """As that of a parameter whose shards lie elsewhere."""
    inputs = {key: x.detach() for key, x in make_inputs(time=time).items()}
    inputs[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="must have their elements in memory"):
        run(inputs, "cpp", max_decay=1.0)


@built
@pytest.mark.parametrize("name", STEP)
def test_a_mixed_token_whose_memory_was_freed(name):
    arguments = make_step()
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="must have their elements in memory"):
        mix(arguments)


@pytest.mark.parametrize("time", [1, 4])
def test_fake_tensors(time):
    """They say to be on the CPU, and have no elements."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        inputs = {name: mode.from_tensor(x.detach()) for name, x in make_inputs(time=time).items()}
        output, state = run(inputs, None, max_decay=1.0)
    assert output.shape == inputs["value"].shape and state[0].shape == inputs["memory"].shape


class Wrapped(torch.Tensor):
    """A tensor that holds another one, and has no elements of its own."""

    @staticmethod
    def __new__(cls, inner):
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype
        )
        wrapped.inner = inner
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(x):
            return x.inner if isinstance(x, cls) else x

        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, function(*args, **kwargs))


@pytest.mark.parametrize("time", [1, 4])
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_wrapped_tensors(implementation, time):
    inputs = {name: x.detach() for name, x in make_inputs(time=time).items()}
    wrapped = {name: Wrapped(x) for name, x in inputs.items()}
    output, _ = run(wrapped, implementation, max_decay=1.0)
    torch.testing.assert_close(output.inner, run(inputs, implementation, max_decay=1.0)[0])


@pytest.mark.parametrize("time", [1, 4])
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_a_tangent_is_not_lost(implementation, time):
    """Forward-mode differentiation is not implemented: it raises, if no implementation was asked for, too."""
    from torch.autograd import forward_ad

    inputs = {name: x.detach() for name, x in make_inputs(time=time).items()}
    with forward_ad.dual_level():
        inputs["value"] = forward_ad.make_dual(inputs["value"], torch.ones_like(inputs["value"]))
        if implementation is None and not is_available() and time == 1:
            assert forward_ad.unpack_dual(run(inputs, None)[0]).tangent is not None
            return
        with pytest.raises(NotImplementedError):
            run(inputs, implementation)


@pytest.mark.parametrize("sizes", [(2**19, 1), (1, 2**19)], ids=["keys", "values"])
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_sizes_that_fit_no_stack(implementation, sizes):
    """One token whose working set is larger than a thread's stack."""
    inputs = make_inputs(1, 1, 1, *sizes, memories=1)
    inputs = {name: x.detach() for name, x in inputs.items()}
    torch.testing.assert_close(run(inputs, implementation), run(inputs, "recurrent"))


@built
@pytest.mark.parametrize(
    "sizes", [{"size": 600, "heads": 1}, {"banks": 400_000, "levels": 1, "heads": 1, "size": 1}]
)
def test_a_mixed_token_that_fits_no_stack(sizes):
    """The same in one piece as in halves of the batch, whatever its working set is."""
    arguments = make_step(batch=2, **sizes)
    whole, _ = mix(arguments)
    shared = ("conv_weight", "norm_weight", "rows")
    for row in range(2):
        part = {name: x if name in shared else x[row : row + 1] for name, x in arguments.items()}
        assert torch.equal(mix(part)[0], whole[row : row + 1])
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("chunk_size", [2**20, 2**31, 2**40, 2**63, 2**80])
@pytest.mark.parametrize("implementation", ["recurrent", *IMPLEMENTATIONS])
def test_chunks_of_any_size(implementation, chunk_size):
    """Whose squares no integer holds, and that no integer holds themselves."""
    inputs = make_inputs(time=20)
    output, _ = run(inputs, implementation, chunk_size=chunk_size)
    again, _ = run(inputs, implementation, chunk_size=chunk_size, max_decay=1.0)
    torch.testing.assert_close(again, output)
    torch.autograd.grad(output.sum(), list(inputs.values()))


@built
def test_no_work_space_for_so_long_a_chunk():
    """Of tokens that take no memory themselves; the operator is called as nobody else would."""
    tokens, state = torch.ones(1).expand(1, 2**21, 1, 1), torch.ones(1, 1, 1, 1, 1)
    with pytest.raises(MemoryError):
        torch.ops.stackformer.chunk_forward([tokens] * 6, state, state[..., 0], 2**21, 1e-6, False)


@built
def test_a_state_from_inference_mode_may_be_trained_on():
    inputs = make_inputs(time=4)
    with torch.inference_mode():
        _, state = run(inputs, "cpp")
    *tokens, _, _ = inputs.values()
    output, _ = banked_linear_attention(*tokens, initial_state=state, implementation="cpp")
    output.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in tokens)


@built
@pytest.mark.parametrize("time", [1, 40])
def test_any_number_of_threads(time):
    inputs = {name: x.detach() for name, x in make_inputs(batch=3, heads=7, time=time).items()}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3, 50):
            torch.set_num_threads(count)
            results.append(run(inputs, "cpp")[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# The operators as anybody may call them.


def operator_arguments(time=4):
    *inputs, memory, normalizer = (x.detach() for x in make_inputs(time=time).values())
    return inputs, memory, normalizer


@built
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("place", range(8), ids=NAMES)
def test_the_forward_operator_called_with_a_wrong_tensor(place, wrong):
    inputs, *state = operator_arguments()
    tensors = [*inputs, *state]
    tensors[place] = wrong(tensors[place])
    with pytest.raises(ValueError, match="must"):
        torch.ops.stackformer.chunk_forward(tensors[:6], *tensors[6:], 2, 1e-6, True)


@built
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("place", range(13))
def test_the_backward_operator_called_with_a_wrong_tensor(place, wrong):
    inputs, *state = operator_arguments()
    output, denominator, memory, normalizer, *starts = torch.ops.stackformer.chunk_forward(
        inputs, *state, 2, 1e-6, True
    )
    tensors = [*inputs, output, denominator, *starts, output, memory, normalizer]
    torch.ops.stackformer.chunk_backward(tensors[:6], *tensors[6:], 2, 1e-6)
    tensors[place] = wrong(tensors[place])
    with pytest.raises(ValueError, match="must"):
        torch.ops.stackformer.chunk_backward(tensors[:6], *tensors[6:], 2, 1e-6)


@built
def test_operators_called_with_wrong_numbers():
    inputs, *state = operator_arguments()
    for length in (0, -1):
        with pytest.raises(ValueError, match="`length` must be at least 1"):
            torch.ops.stackformer.chunk_forward(inputs, *state, length, 1e-6, True)
    with pytest.raises(ValueError, match="`inputs` must be the 6 tensors"):
        torch.ops.stackformer.chunk_forward(inputs[:5], *state, 2, 1e-6, True)
    with pytest.raises(ValueError, match="`memory` must be torch.float32 or torch.float64"):
        torch.ops.stackformer.chunk_forward(inputs, state[0].half(), state[1], 2, 1e-6, True)
    with pytest.raises(ValueError, match="`normalizer` must be torch.float64"):
        torch.ops.stackformer.chunk_forward(inputs, state[0], state[1].float(), 2, 1e-6, True)


@built
def test_the_backward_operator_takes_states_that_are_not_dense():
    inputs, *state = operator_arguments()
    output, denominator, memory, normalizer, *starts = torch.ops.stackformer.chunk_forward(
        inputs, *state, 2, 1e-6, True
    )
    tensors = [output, denominator, *starts, output, memory, normalizer]
    expected = torch.ops.stackformer.chunk_backward(inputs, *tensors, 2, 1e-6)
    actual = torch.ops.stackformer.chunk_backward(inputs, *map(as_transposed, tensors), 2, 1e-6)
    torch.testing.assert_close(actual, expected)


# Which library is taken.


def compile_library(path, source):
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=source, check=True, text=True
    )


FUNCTIONS = "int stackformer_memory_bank(void) { return 0; } int stackformer_step(void) { return 0; }\n"
OTHER = FUNCTIONS + "long long stackformer_abi(void) { return 10001; }\n"
RIGHT = FUNCTIONS + f"long long stackformer_abi(void) {{ return {library_border.ABI}; }}\n"

compiles = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="needs a C compiler"
)


@compiles
@pytest.mark.parametrize("source", [FUNCTIONS, OTHER], ids=["without a number", "with another number"])
def test_a_library_of_another_version_is_passed_over(tmp_path, source):
    compile_library(tmp_path / "_memory_bank.cpython-old.so", source)
    with pytest.warns(UserWarning, match="_memory_bank.cpython-old.so.*another version.*Install stackformer"):
        assert library_border.load_library(tmp_path) is None


@compiles
def test_of_several_libraries_the_right_one_is_taken(tmp_path):
    """Whatever their names are, and without a word: there is nothing to do."""
    compile_library(tmp_path / "_memory_bank.a.so", OTHER)
    compile_library(tmp_path / "_memory_bank.b.so", FUNCTIONS)
    compile_library(tmp_path / "_memory_bank.c.so", RIGHT)
    compile_library(tmp_path / "_memory_bank.d.so", OTHER)
    (tmp_path / "_memory_bank.0.so").write_bytes(b"of another platform")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = library_border.load_library(tmp_path)
    assert Path(library._name).name == "_memory_bank.c.so"


def test_without_a_library_nothing_is_said(tmp_path):
    (tmp_path / "_memory_bank.other.so").write_bytes(b"of another platform")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library_border.load_library(tmp_path) is None


@compiles
def test_without_the_right_library_all_works(tmp_path):
    """The package beside an old library warns once, and computes in torch."""
    package = tmp_path / "stackformer"
    shutil.copytree(
        SOURCE.parent.parent, package, ignore=shutil.ignore_patterns("_memory_bank.*", "__pycache__")
    )
    compile_library(package / "_memory_bank.cpython-old.so", OTHER)
    script = (
        "import torch; from stackformer.memory_bank import banked_linear_attention as attend\n"
        "x = torch.rand(1, 9, 1, 4); print(attend(x, x, x, x, x, -x)[0].shape)\n"
        "from stackformer import library; assert not library.is_available()"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "torch.Size([1, 9, 1, 4])\n"
    assert result.stderr.count("was built for another version of stackformer") == 1


@built
def test_the_library_here_has_the_number():
    assert library_border.abi_of(library_border.LIBRARY) == library_border.ABI


@pytest.mark.skipif(not SOURCE.exists(), reason="needs the source")
@pytest.mark.parametrize("structure", [library_border.Tokens, library_border.Problem, library_border.Step])
def test_structs_have_the_same_fields_on_both_sides(structure):
    """In the same order, and of the same kinds: sizes alone do not tell."""
    text = re.sub(r"//[^\n]*", "", SOURCE.read_text())
    (body,) = re.findall(rf"struct {structure.__name__.strip('_')} {{(.*?)\n}};", text, re.DOTALL)
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+)(.*)", declaration, re.DOTALL).groups()
        for name in names.split(","):
            pointer = "*" in name
            fields.append((name.strip(" *\n"), "pointer" if pointer else kind))
    kinds = {ctypes.c_int64: "int64_t", ctypes.c_double: "double", ctypes.c_void_p: "pointer"}
    assert fields == [(name, kinds.get(kind, "Tokens")) for name, kind in structure._fields_]
