"""Quantizing inputs, after a norm or a gated activation where asked: one result everywhere, and the right one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fewbit.math.hadamard import pack_signs, random_signs, rotate
from fewbit.ops import cpu, reference
from fewbit.ops.extension import load_native

native = load_native()
needs_native = pytest.mark.skipif(native is None, reason="the native extension is not built")
ops = torch.ops.fewbit

# Runs all operators through odd shapes and values and prints a digest of everything they return.
# argv: number of threads (0: leave), "missing" to hide the extension, which leaves the reference.
SCRIPT = """
import hashlib, sys, warnings
if "missing" in sys.argv: sys.modules["fewbit._native"] = None
import torch
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.ops import cpu
from fewbit.ops.extension import load_native
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    native = load_native()
if int(sys.argv[1]): native.set_num_threads(int(sys.argv[1]))
torch.set_num_threads(1)
ops, state = torch.ops.fewbit, hashlib.sha256()
CASES = [(64, 64, 64, (0, 1, 513)), (96, 32, 96, (1, 7)), (576, 64, 192, (2, 33)), (640, 128, 32, (513,)),
         (896, 128, 128, (3,)), (1536, 256, 128, (1, 9)), (2560, 32, 256, (5,)), (4096, 256, 256, (65,)),
         (8960, 256, 64, (4,)), (800, 1, 32, (7,)), (1216, 1, 64, (5,)), (192, 1, 192, (1, 12))]
STRANGE = [torch.nan, torch.inf, -torch.inf, 1e-40, -1e-40, 1e30, -1e30, 3e38, 0.0, -0.0, 86.1, -86, -88.7, -88.8, 90]

def inputs(tokens, cols, generator):
    sizes = torch.logspace(-3, 2, max(tokens, 1))[:tokens, None]
    x = torch.randn(tokens, cols, generator=generator) * sizes
    x[2::9] = 0
    for i, value in enumerate(STRANGE):
        x[i + 3 :: 41, (37 * i) % cols] = value
    return x

for cols, block, group, batches in CASES:
    generator = torch.Generator().manual_seed(cols)
    signs = pack_signs(random_signs(cols, cols)) if block > 1 else None
    weight = torch.rand(cols, generator=generator) + 0.5
    for tokens in batches:
        first, second = inputs(tokens, cols, generator), torch.randn(tokens, cols, generator=generator)
        for dtype, bits in ((torch.float32, 8), (torch.bfloat16, 8), (torch.float16, 8), (torch.float32, 4)):
            x, up, w = first.to(dtype), second.to(dtype), weight.to(dtype)
            for found in (ops.rotate_quantize(x, signs, block, group, bits),
                          ops.rms_norm_rotate_quantize(x, w, 1e-6, signs, block, group, bits),
                          ops.rms_norm_rotate_quantize(x, w, 1e-6, signs, block, group, bits, weight),
                          ops.gated_rotate_quantize(x, up, "silu", signs, block, group, bits),
                          ops.gated_rotate_quantize(x, up, "gelu_tanh", signs, block, group, bits)):
                for tensor in found:
                    state.update(tensor.numpy().tobytes())
print(state.hexdigest(), native.isa() if native else "torch")
"""

GEOMETRIES = [(32, 96), (64, 64), (64, 192), (128, 32), (256, 128), (256, 256), (32, 256), (1, 32), (1, 192)]


@pytest.fixture(scope="module")
def specified(run_script) -> str:
    """The digest of the reference."""
    digest, backend = run_script(SCRIPT, None, 0, "missing")
    assert backend == "torch"
    return digest


def _inputs(tokens: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))


def _signs(cols: int, block: int) -> torch.Tensor | None:
    return pack_signs(random_signs(cols, 1)) if block > 1 else None


def _same(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_native
@pytest.mark.parametrize("isa", native.available_isas() if native else [])
def test_every_instruction_set_gives_the_reference_bit_for_bit(isa, specified, run_script):
    assert run_script(SCRIPT, isa) == [specified, isa]


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(threads, specified, run_script):
    assert run_script(SCRIPT, None, threads)[0] == specified


def test_the_exponential_is_within_one_ulp():
    x = torch.cat([torch.linspace(-88.72, 86, 1_000_001), torch.linspace(-0.5, 0.5, 200_001)])
    exact = torch.exp(-x.double())
    ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    assert ((reference.exp_minus(x).double() - exact).abs() <= ulp).all()


def test_the_exponential_keeps_nan_and_leaves_no_other_surprise_at_the_ends():
    found = reference.exp_minus(torch.tensor([torch.nan, -torch.inf, -1e30, -88.73, 0.0, 90.0, 1e30, torch.inf]))
    assert found[0].isnan()
    assert found[1:4].tolist() == [torch.inf] * 3
    assert found[4] == 1
    assert ((found[5:] > 0) & (found[5:] < 1e-37)).all()


def test_silu_is_within_3e_7_of_the_exact_value():
    x = torch.cat([torch.linspace(-88, 88, 1_000_001), torch.linspace(-2, 2, 400_001)])
    exact = functional.silu(x.double())
    error = (reference.gated(x, torch.ones_like(x), "silu").double() - exact).abs()
    assert (error <= 3e-7 * exact.abs()).all()


def test_gelu_is_within_1e_6_of_the_exact_value_and_within_1e_9_where_it_vanishes():
    x = torch.cat([torch.linspace(-88, 88, 1_000_001), torch.linspace(-4, 4, 400_001)])
    exact = x.double() * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3))
    error = (reference.gated(x, torch.ones_like(x), "gelu_tanh").double() - exact).abs()
    assert (error <= 1e-6 * exact.abs() + 1e-9).all()


def test_the_norm_is_within_5e_7_of_the_exact_value():
    x, weight = _inputs(40, 1536) * torch.logspace(-4, 4, 40)[:, None], torch.rand(1536) + 0.5
    exact = functional.rms_norm(x.double(), (1536,), weight.double(), 1e-6)
    assert ((reference.rms_norm(x, weight, 1e-6).double() - exact).abs() <= 5e-7 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_fused_prologues_agree_with_torchs_own_up_to_steps_at_ties(bits, dtype):
    x, up, weight = _inputs(33, 1536).to(dtype), _inputs(33, 1536, 1).to(dtype), torch.rand(1536) + 0.5
    signs, rest = _signs(1536, 256), (256, 256, bits)
    gate, other = x.float() * 3, up.float()
    for fused, plain in (
        (
            ops.rms_norm_rotate_quantize(x, weight, 1e-6, signs, *rest),
            functional.rms_norm(x.float(), (1536,), weight, 1e-6),
        ),
        (ops.gated_rotate_quantize(gate, other, "silu", signs, *rest), functional.silu(gate) * other),
        (
            ops.gated_rotate_quantize(gate, other, "gelu_tanh", signs, *rest),
            functional.gelu(gate, approximate="tanh") * other,
        ),
    ):
        q, scale, _ = ops.rotate_quantize(plain, signs, *rest)
        assert torch.allclose(fused[1], scale, rtol=2e-6, atol=0)
        steps = (fused[0].int() - q.int()).abs()
        assert steps.max() <= 1
        assert steps.float().mean() < 1e-3


@pytest.mark.parametrize(("block", "group"), GEOMETRIES)
@pytest.mark.parametrize(("bits", "least", "most"), [(8, -127, 127), (4, -8, 7)])
def test_every_geometry_and_width_restores_the_rotated_inputs_within_half_a_step(block, group, bits, least, most):
    cols, signs = 768, random_signs(768, 1)
    x = _inputs(5, cols) * 3
    q, scale, sums = ops.rotate_quantize(x, _signs(cols, block), block, group, bits)
    rotated = rotate(x, signs, block) if block > 1 else x
    q, rotated = q.view(5, -1, group), rotated.view(5, -1, group)
    # With four bits, what lies beyond the last level on the side opposite to the largest magnitude is cut off.
    bound = rotated / scale[..., None]
    assert ((q - bound.clamp(max=most)).abs() <= 0.5001).all()
    assert (bound <= -least + 0.001).all()
    assert q.abs().amax(2).eq(-least).all()
    assert (q <= most).all()
    assert torch.equal(sums, q.sum(2, dtype=torch.int32))


def test_four_bits_turn_the_largest_magnitude_into_the_level_that_has_no_opposite():
    x = torch.zeros(3, 32)
    x[0, 3], x[0, 4] = 4.0, -3.9
    x[1, 3], x[1, 4] = 3.9, -4.0
    x[2, 3], x[2, 4] = 4.0, -4.0
    q, scale, _ = ops.rotate_quantize(x, None, 1, 32, 4)
    assert scale.view(-1).tolist() == [-0.5, 0.5, 0.5]
    assert q[:, 3:5].tolist() == [[-8, 7], [7, -8], [7, -8]]


def test_a_shift_is_subtracted_after_the_prologue_and_before_the_rotation():
    x, weight, shift, signs = _inputs(3, 256), torch.rand(256) + 0.5, _inputs(1, 256)[0], _signs(256, 256)
    expected = ops.rotate_quantize(x - shift, signs, 256, 256)
    assert _same(ops.rotate_quantize(x, signs, 256, 256, shift=shift), expected)
    normed = reference.rms_norm(x, weight, 1e-6)
    expected = ops.rotate_quantize(normed - shift, signs, 256, 256)
    assert _same(ops.rms_norm_rotate_quantize(x, weight, 1e-6, signs, 256, 256, shift=shift), expected)


def test_callers_that_name_no_width_get_eight_bits():
    x, up, weight, signs = _inputs(3, 256), _inputs(3, 256, 1), torch.rand(256), _signs(256, 256)
    assert _same(ops.rotate_quantize(x, signs, 256, 256), ops.rotate_quantize(x, signs, 256, 256, 8))
    norm, gated = ops.rms_norm_rotate_quantize, ops.gated_rotate_quantize
    assert _same(norm(x, weight, 1e-5, signs, 256, 256), norm(x, weight, 1e-5, signs, 256, 256, bits=8))
    assert _same(gated(x, up, "silu", signs, 256, 256), gated(x, up, "silu", signs, 256, 256, bits=8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_the_groups_of_its_block(value):
    x, up, signs = _inputs(4, 512), _inputs(4, 512, 1), _signs(512, 128)
    x[1, 300] = value
    for q, scale, sums in (
        ops.rotate_quantize(x, signs, 128, 64),
        ops.gated_rotate_quantize(x, up, "silu", signs, 128, 64),
        ops.gated_rotate_quantize(x, up, "gelu_tanh", signs, 128, 64),
        ops.gated_rotate_quantize(up, x, "silu", signs, 128, 64),
    ):
        assert scale.isnan().nonzero().tolist() == [[1, 4], [1, 5]]
        assert not q[1, 256:384].any()
        assert not sums[1, 4:6].any()


def test_the_norm_of_what_is_not_finite_is_that_of_torch():
    x, weight = _inputs(3, 512), torch.rand(512) + 0.5
    x[0, 300], x[1, 300] = torch.inf, torch.nan
    scale = ops.rms_norm_rotate_quantize(x, weight, 1e-6, None, 1, 128)[1]
    assert scale.isnan().tolist() == [[False, False, True, False], [True] * 4, [False] * 4]
    assert scale[0, [0, 1, 3]].tolist() == [0, 0, 0]
    plain = functional.rms_norm(x, (512,), weight, 1e-6).view(3, 4, 128)
    assert torch.equal(plain.isnan().any(2), scale.isnan())


def test_large_negative_gates_close():
    gate = torch.tensor([-1e30, -1e4, -100.0, -89.0]).repeat(64)[None]
    for activation in ("silu", "gelu_tanh"):
        q, scale, _ = ops.gated_rotate_quantize(gate, torch.ones(1, 256), activation, None, 1, 256)
        assert scale.item() == 0
        assert not q.any()


def test_strides_and_half_precision_are_accepted():
    x, weight = _inputs(6, 512)[:, ::2], (torch.rand(512) + 0.5)[::2]
    signs = torch.stack([_signs(256, 256)] * 2, 1)[:, 0]
    expected = ops.rms_norm_rotate_quantize(x.contiguous(), weight.contiguous(), 1e-5, signs.contiguous(), 256, 256)
    assert _same(ops.rms_norm_rotate_quantize(x, weight, 1e-5, signs, 256, 256), expected)
    half = ops.gated_rotate_quantize(x.half(), x.half(), "silu", signs, 256, 256)
    assert _same(half, ops.gated_rotate_quantize(x.half().float(), x.half().float(), "silu", signs, 256, 256))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(GEOMETRIES), st.integers(1, 5), st.integers(-20, 20), st.sampled_from([8, 4]), st.integers(0, 2**32)
)
def test_powers_of_two_change_scales_only_and_tokens_do_not_see_each_other(geometry, tokens, power, bits, seed):
    block, group = geometry
    x, weight, signs = _inputs(tokens, 768, seed), torch.rand(768) + 0.5, _signs(768, block)
    q, scale, sums = ops.rotate_quantize(x, signs, block, group, bits)
    assert _same(ops.rotate_quantize(x * 2.0**power, signs, block, group, bits), (q, scale * 2.0**power, sums))
    normed = ops.rms_norm_rotate_quantize(x, weight, 0.0, signs, block, group, bits)
    assert _same(ops.rms_norm_rotate_quantize(x * 2.0**power, weight, 0.0, signs, block, group, bits), normed)
    last = ops.rms_norm_rotate_quantize(x[-1:], weight, 0.0, signs, block, group, bits)
    assert _same(last, [tensor[-1:] for tensor in normed])


@pytest.mark.parametrize("tokens", [0, 3, 20])
def test_operators_pass_opcheck(tokens):
    x, up, signs = _inputs(tokens, 256), _inputs(tokens, 256, 1), _signs(256, 128)
    torch.library.opcheck(ops.rotate_quantize, (x, signs, 128, 64, 4))
    torch.library.opcheck(ops.rms_norm_rotate_quantize, (x.bfloat16(), torch.rand(256), 1e-5, signs, 128, 256))
    torch.library.opcheck(ops.gated_rotate_quantize, (x, up, "gelu_tanh", None, 1, 64), {"bits": 4})


def test_a_compiled_graph_gives_the_eager_result():
    x, up, weight, signs = _inputs(5, 256), _inputs(5, 256, 1), torch.rand(256), _signs(256, 256)

    def work(x, up):
        q, scale, _ = ops.rms_norm_rotate_quantize(x + 1, weight, 1e-5, signs, 256, 128, 4)
        return q, scale, *ops.gated_rotate_quantize(x, up * 2, "silu", signs, 256, 256)

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    assert _same(compiled(x, up), work(x, up))


X = torch.zeros(2, 256)
SIGNS = torch.zeros(32, dtype=torch.uint8)
ROTATION_FAULTS = [
    ({"block": 2}, "block must be 32, 64, 128 or 256, not 2; 1 stands for no rotation"),
    ({"block": 512}, "block must be .* not 512"),
    ({"block": -1}, "block must be .* not -1"),
    ({"group": 16}, "scale group must be a multiple of 32 up to 256, not 16"),
    ({"group": 512}, "scale group must be a multiple of 32 up to 256, not 512"),
    ({"group": 0}, "scale group must be .* not 0"),
    ({"group": 96}, "multiple of the block 64 or divide it, not 96"),
    ({"group": 192}, "256 inputs are not a multiple of the scale group 192"),
    ({"bits": 5}, "8 or 4 bits, not 5"),
    ({"block": 1}, "signs must be None for block 1"),
    ({"signs": torch.zeros(31, dtype=torch.uint8)}, r"signs must be torch.uint8 \[32\]"),
    ({"signs": torch.zeros(32)}, "signs must be torch.uint8"),
    ({"shift": torch.zeros(255)}, r"shift must be float \[256\], not torch.float32 \[255\]"),
    ({"shift": torch.zeros(256).int()}, r"shift must be float \[256\], not torch.int32"),
]
FAULTS = {
    "rotate_quantize": [
        *ROTATION_FAULTS,
        ({"x": torch.zeros(256)}, r"x must be \[T, K\], not \[256\]"),
        ({"x": X.int()}, "x must be float32, bfloat16 or float16, not torch.int32"),
        ({"x": torch.zeros(2, 96), "group": 32, "signs": None}, "96 inputs are not a multiple of the block 64"),
    ],
    "rms_norm_rotate_quantize": [
        *ROTATION_FAULTS,
        ({"x": torch.zeros(1, 2, 256)}, r"x must be \[T, K\], not \[1, 2, 256\]"),
        ({"weight": torch.zeros(255)}, r"weight must be float \[256\], not torch.float32 \[255\]"),
        ({"weight": torch.zeros(256).int()}, r"weight must be float \[256\], not torch.int32"),
        ({"eps": -1e-5}, "eps must be from 0 to 1"),
        ({"eps": float("nan")}, "eps must be from 0 to 1"),
    ],
    "gated_rotate_quantize": [
        *ROTATION_FAULTS,
        ({"gate": torch.zeros(256)}, r"gate must be \[T, K\], not \[256\]"),
        ({"gate": X.int(), "up": X.int()}, "gate must be float32, bfloat16 or float16"),
        ({"up": torch.zeros(3, 256)}, r"up must be torch.float32 \[2, 256\] like gate, not torch.float32 \[3, 256\]"),
        ({"up": X.bfloat16()}, "up must be torch.float32"),
        ({"activation": "relu"}, "activation must be silu or gelu_tanh, not 'relu'"),
    ],
}
ARGUMENTS = {
    "rotate_quantize": {"x": X},
    "rms_norm_rotate_quantize": {"x": X, "weight": torch.ones(256), "eps": 1e-5},
    "gated_rotate_quantize": {"gate": X, "up": X, "activation": "silu"},
}


@pytest.mark.parametrize(
    ("name", "change", "message"), [(name, *fault) for name, faults in FAULTS.items() for fault in faults]
)
def test_malformed_arguments_raise_value_errors_that_name_them(name, change, message):
    arguments = {**ARGUMENTS[name], "signs": SIGNS, "block": 64, "group": 128, "bits": 8, **change}
    with pytest.raises(ValueError, match=message):
        getattr(cpu, name)(**arguments)
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(**arguments)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 48}, "block must be 32, 64, 128 or 256, or 1"),
        ({"group": 16}, "multiple of 32 up to 256 columns, not 16"),
        ({"group": 96}, "a multiple of the block or divide it"),
        ({"group": 192}, "must divide the inputs"),
        ({"block": 1}, "signs must be None"),
        ({"signs": SIGNS[:31]}, "signs must have 32 entries"),
        ({"bits": 3}, "8 or 4 bits, not 3"),
        ({"q": torch.zeros(2, 255, dtype=torch.int8)}, r"q must be \[2, 256\]"),
        ({"scale": torch.zeros(2, 1)}, r"scale must be \[2, 2\]"),
        ({"sums": torch.zeros(1, 2, dtype=torch.int32)}, r"sums must be \[2, 2\]"),
        ({"shift": torch.zeros(255)}, "shift must have 256 entries"),
        ({"up": X[:1]}, "up must have the shape and the type of gate"),
        ({"activation": "relu"}, "silu or gelu_tanh, not 'relu'"),
        ({"gate": X.double()}, "gate must be float32 or 16 bits"),
    ],
)
def test_native_code_checks_for_itself(change, message):
    outputs = {
        "q": torch.zeros(2, 256, dtype=torch.int8),
        "scale": torch.zeros(2, 2),
        "sums": torch.zeros(2, 2, dtype=torch.int32),
    }
    rotation = {"signs": SIGNS, "block": 64, "group": 128, "bits": 8}
    arguments = {"gate": X, "up": X, "activation": "silu", **rotation, **outputs, **change}
    with pytest.raises(ValueError, match=message):
        native.gated_rotate_quantize(**arguments)
