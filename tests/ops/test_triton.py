"""Triton's kernels, run by its interpreter on the CPU, compute what the reference says.

Integers are exact. The interpreter rounds sums in its own order, so that rotated inputs and what is added over scale
groups may differ in the last bits; the bounds below say by how much.
"""

import dataclasses

import pytest
import torch

from fewbit.formats import get_format
from fewbit.formats.iq3_s import block_bytes
from fewbit.formats.trellis import load_tables
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.ops import cpu, reference, schemas
from fewbit.ops.gpu_layouts import GpuMatrix, gpu_matrix
from fewbit.ops.layouts import to_lanes

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fewbit[gpu]'")
import triton.language as tl
from triton.runtime import interpreter

from fewbit.ops import cuda, triton_configs, triton_launch
from fewbit.ops.triton_launch import Rotation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
assert cpu.KERNEL_DEVICES  # the operators are registered


@pytest.fixture(autouse=True)
def _interpreter_of_bfloat16(monkeypatch):
    """Triton 3.7's interpreter multiplies the bits of bfloat16 as if they were integers, and forgets to carry into the
    exponent when it rounds to it."""
    convert, multiply = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(seed: int, *shape: int, most: int = 255) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, most + 1, shape, dtype=torch.uint8, generator=generator)


def stored(name: str, bits: int, rows: int, cols: int, group: int = 0) -> tuple[GpuMatrix, int]:
    """A random matrix in its kernel layout, and its scale group."""
    spec = get_format(name).spec(rows, cols, bits)
    group = group or spec.group
    spec = spec if spec.group == group else type(spec)(name, bits, rows, cols, spec.block, group)
    parts = {"scales": (random(1, rows, spec.groups).abs() + 0.1).half(), "scale": torch.tensor([0.01])}
    if name in ("trellis", "int4"):
        parts["codes"] = random_bytes(2, -(-rows // 16), 2 * bits * cols)
        parts["tables"] = load_tables(bits)[0]
    elif name == "ternary":
        fields = random_bytes(3, rows, cols, most=2)
        from fewbit.formats.bits import pack_bits

        parts["codes"] = pack_bits(fields, 3)
        parts["zeros"] = random_bytes(4, rows, spec.groups, most=9).half() - 4
    else:
        blocks = random_bytes(5, rows, spec.groups, block_bytes(group))
        blocks[..., :2] = parts["scales"].contiguous()[..., None].view(torch.uint8)
        parts = {"blocks": blocks}
    return gpu_matrix(parts, spec), group


def quantized(tokens: int, cols: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return reference.rotate_quantize(random(tokens, tokens, cols), None, 1, group)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


SHAPES = [(512, 256, 256), (512, 256, 128), (576, 64, 192), (896, 128, 128), (192, 64, 64), (96, 32, 96), (192, 1, 192)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("cols", "block", "group"), SHAPES)
def test_inputs_whose_sums_are_exact_are_rotated_and_quantized_bit_for_bit(cols, block, group, bits):
    x = (random(cols, 5, cols) * 60).round()
    signs = pack_signs(random_signs(cols, 1)) if block > 1 else None
    for dtype in DTYPES:
        shift = torch.arange(cols).remainder(7).to(dtype) if dtype == torch.float32 else None
        arguments = (x.to(dtype), signs, block, group, bits, shift)
        for found, expected in zip(
            cuda.rotate_quantize(*arguments), reference.rotate_quantize(*arguments), strict=True
        ):
            assert torch.equal(found, expected)


def close_integers(found, expected, values: torch.Tensor, group: int) -> None:
    """Scales within 2^-20, and integers equal but where the value lies within 2^-12 of a step of a middle."""
    torch.testing.assert_close(found[1], expected[1], rtol=2.0**-20, atol=0)
    steps = values.view(*found[1].shape, group) / expected[1][..., None]
    middle = ((steps - steps.floor() - 0.5).abs() < 2.0**-12).view(found[0].shape)
    assert torch.equal(torch.where(middle, expected[0], found[0]), expected[0])
    assert ((found[0].int() - expected[0].int()).abs() <= 1).all()
    assert torch.equal(found[2], found[0].view(*found[2].shape, group).sum(2, dtype=torch.int32))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("cols", "block", "group"), [(256, 256, 128), (192, 64, 192), (64, 64, 64), (96, 32, 96)])
def test_any_inputs_are_rotated_and_quantized_as_specified_but_at_ties(cols, block, group, bits):
    signs, gain = pack_signs(random_signs(cols, 1)), random(2, cols).abs()
    for dtype in (torch.float32, torch.bfloat16):
        x, up = random(cols, 5, cols).to(dtype), random(3, 5, cols).to(dtype)
        rest = (signs, block, group, bits)
        plain = reference.rotated(x.float(), signs, block, None)
        close_integers(cuda.rotate_quantize(x, *rest), reference.rotate_quantize(x, *rest), plain, group)
        normed = reference.rotated(reference.rms_norm(x, gain, 1e-5), signs, block, None)
        expected = reference.rms_norm_rotate_quantize(x, gain, 1e-5, *rest)
        close_integers(cuda.rms_norm_rotate_quantize(x, gain, 1e-5, *rest), expected, normed, group)
        for activation in ("silu", "gelu_tanh"):
            opened = reference.rotated(reference.gated(x, up, activation), signs, block, None)
            expected = reference.gated_rotate_quantize(x, up, activation, *rest)
            close_integers(cuda.gated_rotate_quantize(x, up, activation, *rest), expected, opened, group)


def test_a_norm_over_more_columns_than_a_tile_and_no_tokens():
    x, gain = random(0, 3, 2304), random(1, 2304)
    found = cuda.rms_norm_rotate_quantize(x, gain, 1e-5, None, 256, 256)
    expected = reference.rms_norm_rotate_quantize(x, gain, 1e-5, None, 256, 256)
    torch.testing.assert_close(found[1], expected[1], rtol=2.0**-20, atol=0)
    assert [tensor.shape[0] for tensor in cuda.rotate_quantize(x[:0], None, 256, 256)] == [0, 0, 0]


@pytest.mark.parametrize(("cols", "block", "group"), [(512, 256, 128), (576, 64, 192), (256, 64, 64)])
def test_zeros_give_scale_zero_and_spoilt_inputs_spoil_only_their_own_groups(cols, block, group):
    x = random(0, 6, cols)
    x[0] = 0
    x[1, 3] = torch.nan
    x[2, 70] = torch.inf
    x[3, 0], x[4, 0] = 1e-38, -torch.inf
    for bits in (8, 4):
        found = cuda.rotate_quantize(x, None, block, group, bits)
        expected = reference.rotate_quantize(x, None, block, group, bits)
        assert torch.equal(found[1].isnan(), expected[1].isnan())
        spoilt = expected[1].isnan()
        torch.testing.assert_close(found[1][~spoilt], expected[1][~spoilt], rtol=2.0**-20, atol=0)
        assert not found[0].view(6, -1, group)[spoilt].any()


MATRICES = [
    ("trellis", 2, 17, 192), ("trellis", 3, 40, 512), ("trellis", 4, 1, 96), ("trellis", 3, 130, 64),
    ("int4", 4, 33, 256), ("int4", 4, 17, 96), ("ternary", 3, 33, 192), ("ternary", 3, 40, 256),
    ("iq3_s", 3, 33, 96), ("iq3_s", 3, 17, 256),
]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 5, 19, 131])
@pytest.mark.parametrize(("name", "bits", "rows", "cols"), MATRICES)
def test_products_are_the_references_bit_for_bit_where_groups_are_added_in_order(name, bits, rows, cols, tokens):
    matrix, group = stored(name, bits, rows, cols)
    parts = (matrix.codes, matrix.scales, matrix.tensor_scale, matrix.tables)
    inputs = quantized(tokens, cols, group)
    for dtype, bias in ((torch.float32, None), (torch.bfloat16, random(7, rows))):
        expected = reference.packed_linear(*inputs, *parts, bias, bits, matrix.code, dtype)
        assert torch.equal(cuda.packed_linear(*inputs, *parts, bias, bits, matrix.code, dtype), expected)


@pytest.mark.parametrize(("name", "bits"), [("trellis", 3), ("int4", 4), ("ternary", 3)])
@pytest.mark.parametrize("programs", [4, 8])
def test_a_split_sum_is_within_rounding_of_the_whole_one_and_always_the_same(name, bits, programs, monkeypatch):
    monkeypatch.setattr(triton_configs, "PROGRAMS", programs)
    rows, cols = 20, 1408
    matrix, group = stored(name, bits, rows, cols)
    parts = (matrix.codes, matrix.scales, matrix.tensor_scale, matrix.tables, random(7, rows), bits, matrix.code)
    inputs = quantized(3, cols, group)
    launches = triton_launch.packed_linear(inputs, matrix, bits, None, torch.empty(3, rows))
    assert launches[0].constants["SPLIT"] > 1
    assert launches[0].constants["SPLIT"] * launches[0].arguments["per_split"] >= cols // group
    found = cuda.packed_linear(*inputs, *parts, torch.float32)
    expected = reference.packed_linear(*inputs, *parts, torch.float32)
    assert relative(found, expected) < 1e-6
    assert torch.equal(cuda.packed_linear(*inputs, *parts, torch.float32), found)


@pytest.mark.parametrize("tokens", [2, 18])
def test_stored_codes_and_those_of_other_layouts_give_the_same_product(tokens):
    rows, cols = 40, 192
    codes, tables = random_bytes(0, 3, 6 * cols), load_tables(3)[0]
    arguments = {"scales": random(1, rows, 1).half(), "tensor_scale": torch.tensor([0.01]), "tables": tables, "bits": 3,
                 "bias": None, "signs": pack_signs(random_signs(cols, 0)), "block": 64}  # fmt: skip
    x = (random(2, tokens, cols) * 60).round()
    expected = reference.linear(x, codes, **arguments)
    assert torch.equal(cuda.linear(x, codes, **arguments), expected)
    assert torch.equal(cuda.linear(x, to_lanes(codes, 3, 2), **arguments, code="lanes"), expected)


@pytest.mark.parametrize(
    ("name", "bits", "rows", "cols"),
    [
        ("trellis", 3, 40, 512),
        ("trellis", 2, 17, 192),
        ("trellis", 4, 17, 96),
        ("ternary", 3, 33, 192),
        ("iq3_s", 3, 33, 256),
    ],
)
def test_the_transform_on_the_weights_side_gives_the_same_product(name, bits, rows, cols):
    matrix, _ = stored(name, bits, rows, cols)
    parts = (matrix.codes, matrix.scales, matrix.tensor_scale, matrix.tables)
    block, signs = min(256, cols & -cols), pack_signs(random_signs(cols, 1))
    for tokens, dtype in ((3, torch.bfloat16), (19, torch.float16)):
        x, bias = random(tokens, tokens, cols).to(dtype), random(9, rows)
        arguments = (x, *parts, signs, bias, bits, block, matrix.code)
        found = cuda.linear_inverse(*arguments)
        # Weights and outputs are rounded to the inputs' dtype.
        assert relative(found, reference.linear_inverse(x.float(), *arguments[1:])) < (
            0.004 if dtype == torch.bfloat16 else 5e-4
        )
        # And against inputs of 8 bits on the other side.
        assert relative(found, cuda.linear(*arguments)) < 0.02


@pytest.mark.parametrize(("name", "bits"), [("trellis", 3), ("int4", 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_sixteen_bits_are_not_quantized(name, bits, dtype):
    rows, cols = 33, 512
    matrix, _ = stored(name, bits, rows, cols)
    parts = (matrix.codes, matrix.scales, matrix.tensor_scale, matrix.tables)
    x, shift = random(0, 5, cols).to(dtype), random(3, cols) * 0.1
    arguments = (x, *parts, pack_signs(random_signs(cols, 1)), random(2, rows), bits, 256, matrix.code, 16, shift)
    assert relative(cuda.linear(*arguments), reference.linear(x.float(), *arguments[1:])) < 0.005


TWINS = [(40, 256, 128, 0), (33, 192, 64, 0), (17, 96, 32, 0), (40, 256, 256, 128), (20, 128, 96, 32)]


def twin(rows: int, cols: int, rank: int, group: int) -> tuple[GpuMatrix, GpuMatrix, int]:
    group = group or min(128, cols & -cols, rank & -rank)
    return stored("int4", 4, rank, cols, group)[0], stored("int4", 4, rows, cols + rank, group)[0], group


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(("rows", "cols", "rank", "group"), TWINS)
def test_both_ways_of_the_dual_component_product_give_the_reference(rows, cols, rank, group, act_bits, fold):
    down, both, group = twin(rows, cols, rank, group)
    signs, bias, block = pack_signs(random_signs(cols, 1)), random(2, rows), min(256, cols & -cols)
    matrices = [(matrix.codes, matrix.scales, matrix.tensor_scale) for matrix in (down, both)]
    for tokens in (1, 5):
        x = (random(tokens, tokens, cols) * 60).round().bfloat16()
        rotation = Rotation(signs, block, group, act_bits, None)
        found = cuda.twin_product(x, (down, both), rotation, bias, torch.float32, fold)
        expected = reference.twin_linear(x.float(), *matrices[0], *matrices[1], signs, bias, block, act_bits)
        assert relative(found, expected) < 1e-6


@pytest.mark.parametrize(("rows", "cols", "rank", "group"), TWINS)
def test_the_dual_component_product_of_inputs_of_sixteen_bits(rows, cols, rank, group):
    down, both, _ = twin(rows, cols, rank, group)
    matrices = [part for matrix in (down, both) for part in (matrix.codes, matrix.scales, matrix.tensor_scale)]
    rest = (pack_signs(random_signs(cols, 1)), random(2, rows), min(256, cols & -cols), 16, random(3, cols) * 0.1)
    x = random(4, 5, cols).half()
    assert relative(cuda.twin_linear(x, *matrices, *rest), reference.twin_linear(x.float(), *matrices, *rest)) < 0.002


def test_small_products_of_wide_layers_fold_and_narrow_ones_do_not():
    assert triton_configs.folds(1, 14336, 4096, 128, 8)
    assert triton_configs.folds(512, 4096, 4096, 128, 4)
    assert not triton_configs.folds(1, 1024, 4096, 128, 8)
    assert not triton_configs.folds(512, 4096, 4096, 128, 16)


def test_what_the_kernels_cannot_do_is_said():
    matrix, _ = stored("ternary", 3, 16, 96)
    parts = (matrix.codes, matrix.scales, matrix.tensor_scale, matrix.tables)
    x = random(0, 2, 96)
    with pytest.raises(ValueError, match="ternary takes inputs of 8 or 4 bits"):
        cuda.linear(x, *parts, None, None, 3, 32, "ternary", 16)
    narrow, _ = stored("int4", 4, 16, 192, 32)
    fields = (narrow.codes, narrow.scales, narrow.tensor_scale, narrow.tables)
    with pytest.raises(ValueError, match="whole blocks of 64 in a scale group of 32"):
        cuda.linear_inverse(random(0, 2, 192), *fields, None, None, 4, 64, "nibbles")
    down, both, _ = twin(16, 192, 96, 96)
    fields = [part for matrix in (down, both) for part in (matrix.codes, matrix.scales, matrix.tensor_scale)]
    with pytest.raises(ValueError, match="scale groups of a power of two, not 96"):
        cuda.twin_linear(random(0, 2, 192), *fields, None, None, 32)
    with pytest.raises(ValueError, match="codes must be"):
        cuda.linear(x, parts[0][:1], *parts[1:], None, None, 3, 32, "ternary")


@pytest.fixture(scope="module")
def registered():
    """The operators under another name whose kernels for the CPU are Triton's, so that torch can check them here."""
    library = torch.library.Library("fewbit_triton", "DEF")
    for name, kernel in cuda.KERNELS.items():
        schema = str(getattr(torch.ops.fewbit, name).default._schema).removeprefix("fewbit::")
        library.define(schema)
        library.impl(name, kernel, "CPU")
        torch.library.register_fake(f"fewbit_triton::{name}", getattr(schemas, f"_{name}"), lib=library)
    yield torch.ops.fewbit_triton
    library._destroy()


def test_operators_pass_opcheck_and_a_compiled_graph_gives_the_eager_result(registered):
    rows, cols = 20, 192
    matrix, group = stored("trellis", 3, rows, cols)
    parts = (matrix.codes, matrix.scales, matrix.tensor_scale, matrix.tables)
    signs, x, bias = pack_signs(random_signs(cols, 0)), random(0, 3, cols), random(1, rows)
    torch.library.opcheck(registered.rotate_quantize, (x, signs, 64, group))
    torch.library.opcheck(registered.rms_norm_rotate_quantize, (x, x[0].contiguous(), 1e-5, signs, 64, group))
    torch.library.opcheck(registered.gated_rotate_quantize, (x, x.clone(), "silu", signs, 64, group))
    arguments = (*parts, signs, bias, 3, 64, "tiles")
    torch.library.opcheck(registered.linear, (x, *arguments))
    torch.library.opcheck(registered.linear_inverse, (x, *arguments))
    torch.library.opcheck(
        registered.packed_linear, (*quantized(3, cols, group), *parts, bias, 3, "tiles", torch.bfloat16)
    )
    lists = [[part, part] for part in parts]
    torch.library.opcheck(registered.linears, (x, *lists, signs, [bias, None], [3, 3], 64, "tiles"))
    down, both, _ = twin(rows, cols, 64, 0)
    fields = [part for each in (down, both) for part in (each.codes, each.scales, each.tensor_scale)]
    torch.library.opcheck(registered.twin_linear, (x, *fields, signs, bias, 64))
    compiled = torch.compile(lambda x: registered.linear(x, *arguments) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), registered.linear(x, *arguments) * 2)


def test_starting_kernels_reads_no_tensor_and_so_never_waits_for_the_device(monkeypatch):
    """On the meta device there is nothing to read; what runs there can be captured in a CUDA graph."""
    started = []
    monkeypatch.setattr(triton_launch.Launch, "run", lambda launch: started.append(launch.kernel))
    matrix, _ = stored("trellis", 3, 20, 1536)
    on_meta = [part.to("meta") for part in (matrix.codes, matrix.scales, matrix.tensor_scale, matrix.tables)]
    x, signs = torch.empty(3, 1536, device="meta"), torch.empty(192, dtype=torch.uint8, device="meta")
    assert cuda.linear(x, *on_meta, signs, None, 3, 256, "tiles").shape == (3, 20)
    assert cuda.linear_inverse(x, *on_meta, signs, None, 3, 256, "tiles").shape == (3, 20)
    down, both, _ = twin(16, 1536, 128, 0)
    fields = [part.to("meta") for each in (down, both) for part in (each.codes, each.scales, each.tensor_scale)]
    for act_bits in (4, 8, 16):
        assert cuda.twin_linear(x, *fields, signs, None, 256, act_bits).shape == (3, 16)
    assert len(started) >= 9


def test_every_operator_has_a_kernel_for_cuda():
    names = {
        name.removeprefix("fewbit::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("fewbit::")
    }
    assert set(cuda.KERNELS) == {name.partition(".")[0] for name in names}


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    entered = []

    class Noted:
        def __init__(self, tensor):
            entered.append(tensor)

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(torch.cuda, "device_of", Noted)

    class Kernel:
        def __getitem__(self, grid):
            return lambda **_: entered.append(grid)

    tensor = random(3, 2, 128)
    config = triton_configs.Config(*[1] * len(dataclasses.fields(triton_configs.Config)))
    triton_launch.Launch(Kernel(), (4,), {"n": 1, "x": tensor}, {}, config).run()
    assert entered == [tensor, (4,)]
