"""The operators of inference: every instruction set, thread count and batch size computes what the reference says."""

import pytest
import torch

from fewbit.formats import get_format
from fewbit.formats.trellis import load_tables
from fewbit.math.hadamard import pack_signs, random_signs, rotate
from fewbit.ops import cpu, decode, layouts, reference
from fewbit.ops.extension import load_native

native = load_native()
needs_native = pytest.mark.skipif(native is None, reason="the native extension is not built")
ops = torch.ops.fewbit
ISAS = [*native.available_isas(), *native.emulated_isas()] if native else []

# Runs odd shapes through the operators in a fresh interpreter and prints a digest of everything they return.
# argv: number of threads (0: leave), "missing" to hide the extension, which leaves the reference.
SCRIPT = """
import hashlib, sys, warnings
if "missing" in sys.argv: sys.modules["fewbit._native"] = None
import torch
from fewbit.formats import get_format
from fewbit.formats.trellis import load_tables
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.ops import cpu
from fewbit.ops.extension import load_native
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    native = load_native()
if int(sys.argv[1]): native.set_num_threads(int(sys.argv[1]))
torch.set_num_threads(1)
state = hashlib.sha256()
CASES = [(1, 64, (0, 1, 2, 513)), (15, 576, (1, 7, 33)), (17, 1536, (2, 8, 9)), (40, 8960, (1, 33)), (33, 96, (3, 9)),
         (65, 640, (4, 5, 6, 13, 400)), (65, 192, (16, 31, 600)), (40, 2304, (16, 31, 130, 513))]
for rows, cols, batches in CASES:
    for bits in (2, 3, 4):
        generator = torch.Generator().manual_seed(rows + bits)
        spec = get_format("trellis").spec(rows, cols, bits)
        codes = torch.randint(0, 256, (-(-rows // 16), 2 * bits * cols), dtype=torch.uint8, generator=generator)
        scales = (torch.rand(rows, spec.groups, generator=generator) - 0.2).half()
        signs = pack_signs(random_signs(cols, rows))
        for tokens in batches:
            x = torch.randn(tokens, cols, generator=generator)
            for dtype in (torch.float32, torch.bfloat16):
                found = torch.ops.fewbit.rotate_quantize(x.to(dtype), signs, spec.block, spec.group)
                bias = torch.randn(rows, generator=generator) if bits == 3 else None
                y = torch.ops.fewbit.packed_linear(
                    *found, codes, scales, torch.tensor([0.003]), load_tables(bits)[0], bias, bits, "trellis", dtype)
                for tensor in (*found, y.float()):
                    state.update(tensor.contiguous().numpy().tobytes())
    spec = get_format("int4").spec(rows, cols, 4)
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, (-(-rows // 16), 8 * cols), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, spec.groups, generator=generator) - 0.2).half()
    for tokens in batches:
        x = torch.randn(tokens, cols, generator=generator)
        found = torch.ops.fewbit.rotate_quantize(x, None, spec.group, spec.group)
        for dtype in (torch.float32, torch.bfloat16):
            y = torch.ops.fewbit.packed_linear(
                *found, codes, scales, torch.tensor([0.003]), None, None, 4, "nibbles", dtype)
            state.update(y.float().contiguous().numpy().tobytes())
print(state.hexdigest(), native.isa() if native else "torch")
"""


@pytest.fixture(params=ISAS or ["torch"])
def isa(request):
    """Every instruction set in turn, emulated ones included."""
    if native is None:
        yield request.param
        return
    before = native.isa()
    native.select_isa(request.param)
    yield request.param
    native.select_isa(before)


@pytest.fixture(scope="module")
def specified(run_script) -> str:
    """The digest of the reference."""
    digest, backend = run_script(SCRIPT, None, 0, "missing")
    assert backend == "torch"
    return digest


def _matrix(rows: int, cols: int, bits: int = 3, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    spec = get_format("trellis").spec(rows, cols, bits)
    return {
        "codes": torch.randint(0, 256, (-(-rows // 16), 2 * bits * cols), dtype=torch.uint8, generator=generator),
        "scales": (torch.rand(rows, spec.groups, generator=generator) + 0.5).half(),
        "tensor_scale": torch.tensor([0.01]),
        "tables": load_tables(bits)[0],
        "signs": pack_signs(random_signs(cols, seed)),
        "bias": torch.randn(rows, generator=generator),
        "bits": bits,
        "block": spec.block,
    }


def _nibbles(rows: int, cols: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    spec = get_format("int4").spec(rows, cols, 4)
    return {
        "codes": torch.randint(0, 256, (-(-rows // 16), 8 * cols), dtype=torch.uint8, generator=generator),
        "scales": (torch.rand(rows, spec.groups, generator=generator) + 0.5).half(),
        "tensor_scale": torch.tensor([0.01]),
        "tables": None,
        "signs": pack_signs(random_signs(cols, seed)),
        "bias": torch.randn(rows, generator=generator),
        "bits": 4,
        "block": spec.group,
        "code": "nibbles",
    }


def _inputs(tokens: int, cols: int) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_reference_bit_for_bit(isa, specified, run_script):
    assert run_script(SCRIPT, isa) == [specified, isa]


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads, specified, run_script):
    assert run_script(SCRIPT, None, threads)[0] == specified


@pytest.mark.parametrize("make", [_matrix, _nibbles])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(40, 1536), (17, 192), (100, 64)])
def test_a_token_gets_the_same_result_in_every_batch(rows, cols, dtype, make, isa):
    weights = make(rows, cols)
    x = _inputs(61, cols).to(dtype)
    together = ops.linear(x, **weights)
    for size in (1, 2, 3, 7, 8, 9, 12, 13, 33):
        for first in (0, 61 - size):
            assert torch.equal(ops.linear(x[first : first + size], **weights), together[first : first + size])


def test_the_product_is_that_of_the_plain_weights_up_to_eight_bit_inputs():
    rows, cols = 48, 576
    weights = _matrix(rows, cols)
    spec = get_format("trellis").spec(rows, cols, 3)
    parts = {"codes": weights["codes"], "scales": weights["scales"], "scale": weights["tensor_scale"]}
    rotated = get_format("trellis").dequantize({**parts, "tables": weights["tables"]}, spec)
    x = _inputs(9, cols)
    exact = rotate(x, random_signs(cols, 0), spec.block) @ rotated.T + weights["bias"]
    error = (ops.linear(x, **weights) - exact).norm() / exact.norm()
    assert error < 0.01


def test_nibbles_multiply_like_the_weights_that_they_stand_for():
    rows, cols = 40, 384
    weights = _nibbles(rows, cols)
    parts = {"codes": weights["codes"], "scales": weights["scales"], "scale": weights["tensor_scale"]}
    rotated = get_format("int4").dequantize(parts, get_format("int4").spec(rows, cols, 4))
    x = _inputs(9, cols)
    exact = rotate(x, random_signs(cols, 0), weights["block"]) @ rotated.T + weights["bias"]
    error = (ops.linear(x, **weights) - exact).norm() / exact.norm()
    assert error < 0.01


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("sizes", [(40, 7, 7), (300, 300), (16,)])
def test_several_matrices_in_one_call_give_what_each_gives_alone(sizes, tokens, isa):
    x = _inputs(tokens, 512)
    matrices = [_matrix(rows, 512, bits, rows) for rows, bits in zip(sizes, (3, 2, 4), strict=False)]
    matrices = [{**matrix, "signs": matrices[0]["signs"]} for matrix in matrices]
    names = ("codes", "scales", "tensor_scale", "tables", "bias", "bits")
    lists = {name: [matrix[name] for matrix in matrices] for name in names}
    together = ops.linears(x, **lists, signs=matrices[0]["signs"], block=256)
    assert len(together) == len(matrices)
    for y, matrix in zip(together, matrices, strict=True):
        assert torch.equal(y, ops.linear(x, **matrix))


@pytest.mark.parametrize("beside", [2, 4])
@pytest.mark.parametrize(("rows", "cols", "bits"), [(1, 64, 3), (17, 192, 2), (100, 576, 4), (65, 1536, 3)])
def test_lanes_multiply_like_the_stored_layout(isa, rows, cols, bits, beside):
    weights = _matrix(rows, cols, bits)
    lanes = {**weights, "codes": layouts.to_lanes(weights["codes"], bits, beside), "code": "lanes"}
    for tokens in (0, 1, 3, 5, 8, 13):
        x = _inputs(tokens, cols)
        assert torch.equal(ops.linear(x, **lanes), ops.linear(x, **weights))


@needs_native
@pytest.mark.parametrize("beside", [2, 4])
@pytest.mark.parametrize("rows", [1, 16, 40, 100])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_native_lanes_are_the_specified_ones_and_turn_back(rows, bits, beside):
    codes = _matrix(rows, 1536, bits)["codes"]
    lanes = layouts.to_lanes(codes, bits, beside)
    found = torch.from_numpy(native.huge_bytes(lanes.numel())).view(lanes.shape)
    native.place(codes, found, bits, beside)
    assert torch.equal(found, lanes)
    assert torch.equal(layouts.from_lanes(lanes, codes.shape[0], 1536, bits), codes)
    copy = torch.empty_like(codes)
    native.place(codes, copy, bits, 1)
    assert torch.equal(copy, codes)


@needs_native
@pytest.mark.parametrize("rows", [1, 16, 90, 220])
@pytest.mark.parametrize("cols", [1536, 48])
def test_codes_read_in_pieces_are_placed_like_those_in_memory(monkeypatch, rows, cols):
    codes = _matrix(rows, cols, 3)["codes"] if cols == 1536 else torch.arange(rows * cols).view(rows, cols).byte()
    group = 256 if cols == 1536 else 16
    stored = codes.numpy().reshape(-1)
    monkeypatch.setattr(layouts, "PIECE_BYTES", 50_000)

    def read(piece, first):
        piece.reshape(-1)[:] = stored[first : first + piece.size]

    found, code = layouts.read_placed(native, read, tuple(codes.shape), 3, group)
    wanted, same = layouts.place(codes, 3, group, "trellis")
    assert code == same
    assert torch.equal(torch.from_numpy(found), wanted)


def test_lists_of_different_lengths_are_refused():
    weights = _matrix(20, 192)
    lists = {name: [weights[name]] * 2 for name in ("codes", "scales", "tensor_scale", "tables", "bias", "bits")}
    with pytest.raises(ValueError, match="2 matrices, but a list has 1 entries"):
        ops.linears(torch.zeros(2, 192), **{**lists, "bits": [3]}, signs=None, block=64)
    with pytest.raises(ValueError, match="at least one matrix"):
        ops.linears(torch.zeros(2, 192), [], [], [], [], None, [], [], 64)


def test_quantized_inputs_are_the_rotated_ones_within_half_a_step():
    x, signs = _inputs(5, 512) * 3, random_signs(512, 1)
    q, scale, sums = ops.rotate_quantize(x, pack_signs(signs), 256, 256)
    rotated = rotate(x, signs, 256)
    restored = (q.view(5, 2, 256) * scale[..., None]).view(5, 512)
    assert ((restored - rotated).abs().view(5, 2, 256) <= scale[..., None] * 0.50001).all()
    assert torch.equal(sums, q.view(5, 2, 256).sum(2, dtype=torch.int32))
    assert q.view(5, 2, 256).abs().amax(2).eq(127).all()


def test_a_zero_group_quantizes_to_zero_and_a_spoilt_one_says_nan():
    x = torch.randn(3, 512)
    x[0, :256] = 0
    x[1, 300] = torch.nan
    x[2, 7] = torch.inf
    for found in (ops.rotate_quantize(x, None, 256, 256), reference.rotate_quantize(x, None, 256, 256)):
        q, scale, sums = found
        assert scale[0, 0] == 0
        assert scale.isnan().tolist() == [[False, False], [False, True], [True, False]]
        for token, group in ((0, 0), (1, 1), (2, 0)):
            assert not q[token, 256 * group : 256 * (group + 1)].any()
            assert sums[token, group] == 0


def test_leading_dimensions_strides_and_half_precision_are_accepted():
    weights = _matrix(20, 128)
    x = _inputs(12, 256).view(3, 4, 256)[..., ::2]
    y = ops.linear(x, **weights)
    assert y.shape == (3, 4, 20)
    assert torch.equal(y.view(12, 20), ops.linear(x.reshape(12, 128).contiguous(), **weights))
    half = ops.linear(x.half(), **weights)
    assert half.dtype == torch.float16
    assert torch.equal(half, ops.linear(x.half().float(), **weights).half())


@pytest.mark.parametrize("tokens", [0, 3, 20])
def test_operators_pass_opcheck(tokens):
    weights = _matrix(20, 192)
    x = _inputs(tokens, 192)
    torch.library.opcheck(ops.linear, (x,), weights)
    torch.library.opcheck(ops.rotate_quantize, (x, weights["signs"], 64, 192))
    found = ops.rotate_quantize(x, weights["signs"], 64, 192)
    parts = [weights[name] for name in ("codes", "scales", "tensor_scale", "tables", "bias")]
    torch.library.opcheck(ops.packed_linear, (*found, *parts, 3, "trellis", torch.bfloat16))
    torch.library.opcheck(ops.linear, (x,), _nibbles(20, 192))
    lists = [[part, part] for part in parts]
    torch.library.opcheck(ops.linears, (x, *lists[:4], weights["signs"], lists[4], [3, 3], 64))


def test_a_compiled_graph_gives_the_eager_result():
    weights = _matrix(20, 192)
    compiled = torch.compile(lambda x: ops.linear(x, **weights) * 2, fullgraph=True, backend="aot_eager")
    x = _inputs(5, 192)
    assert torch.equal(compiled(x), ops.linear(x, **weights) * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "2, 3 or 4 bits, not 5"),
        ({"code": "nibbles"}, "nibbles have 4 bits, not 3"),
        ({"code": "huffman"}, "the code must be one of trellis, lanes, nibbles, tiles, ternary, iq3_s, not 'huffman'"),
        ({"tables": None}, "the trellis needs its tables"),
        ({"block": 48}, "block must be 32, 64, 128 or 256, not 48"),
        ({"block": 256}, "multiple of the block 256"),
        (
            {"codes": torch.zeros(2, 6 * 192, dtype=torch.int8)},
            r"codes must be torch.uint8 \[2, 1152\], not torch.int8",
        ),
        ({"codes": torch.zeros(1, 6 * 192, dtype=torch.uint8)}, r"codes must be .* not torch.uint8 \[1, 1152\]"),
        ({"scales": torch.ones(20, 1)}, r"scales must be float16 \[N, K / group\], not torch.float32"),
        ({"scales": torch.ones(20, 5).half()}, "192 inputs in 5 scale groups"),
        ({"scales": torch.ones(20, 0).half()}, "scales must be float16"),
        ({"tensor_scale": torch.ones(2)}, r"tensor_scale must be torch.float32 \[1\]"),
        ({"tables": torch.zeros(41, dtype=torch.int8)}, r"tables must be torch.int8 \[40\]"),
        ({"signs": torch.zeros(23, dtype=torch.uint8)}, r"signs must be torch.uint8 \[24\]"),
        ({"bias": torch.zeros(21)}, r"bias must be float \[20\]"),
        ({"x": torch.zeros(2, 191)}, "191 inputs in 1 scale groups"),
        ({"x": torch.zeros(2, 192, dtype=torch.int32)}, "x must be float32, bfloat16 or float16"),
    ],
)
def test_malformed_arguments_raise_value_errors_that_name_them(change, message):
    arguments = {"x": torch.zeros(2, 192), **_matrix(20, 192), **change}
    with pytest.raises(ValueError, match=message):
        cpu.linear(**arguments)
    with pytest.raises(ValueError, match=message):
        ops.linear(**arguments)


@needs_native
def test_tables_that_leave_a_byte_are_refused():
    weights = {**_matrix(20, 192), "tables": torch.full((40,), 60, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"within \+-127"):
        ops.linear(torch.zeros(2, 192), **weights)


def test_quantized_inputs_that_disagree_are_refused():
    weights = _matrix(20, 192)
    q, scale, sums = ops.rotate_quantize(torch.randn(2, 192), None, 64, 192)
    parts = [weights[name] for name in ("codes", "scales", "tensor_scale", "tables", "bias")]
    for broken, message in (
        ((q.int(), scale, sums), "q must be int8"),
        ((q, scale[:1], sums), r"scale must be torch.float32 \[2, 1\]"),
        ((q, scale, sums.float()), r"sums must be torch.int32 \[2, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.packed_linear(*broken, *parts, 3, "trellis", torch.float32)


@pytest.mark.parametrize("name", ["trellis", "int8"])
def test_lookup_gives_the_rows_of_the_plain_weight_and_compiles(name):
    fmt = get_format(name)
    spec = fmt.spec(40, 192, fmt.bits[-1])
    weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(0))
    signs = random_signs(192, 1) if spec.block > 1 else None
    parts = fmt.quantize(weight, spec, signs, {}).parts
    plain = fmt.dequantize(parts, spec)
    plain = plain if signs is None else rotate(plain, torch.ones(192), spec.block) * signs
    codes, code = parts["codes"], name
    if name == "trellis":
        codes, code = layouts.to_lanes(codes, 4, 2), "lanes"
    packed = None if signs is None else pack_signs(signs)
    table = [codes if part == "codes" else parts[part] for part in fmt.layout(spec)]
    rest = (table, packed, decode.spec_text(spec), code, 2.0, torch.float32)
    ids = torch.tensor([[3, 39, 3], [0, 17, 16]])
    torch.testing.assert_close(ops.lookup(ids, *rest), 2 * plain[ids])
    many = ids.repeat(50, 3).flatten()
    torch.testing.assert_close(decode.rows_of_all(many, parts, packed, spec), plain[many])
    torch.library.opcheck(ops.lookup, (ids, *rest))
    compiled = torch.compile(lambda ids: ops.lookup(ids, *rest) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), ops.lookup(ids, *rest) + 1)
