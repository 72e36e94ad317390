"""The twinquant format: its bytes, its components, and what the branch, feedback and shift buy."""

from __future__ import annotations

import pytest
import torch

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.dtypes import name_of
from fewbit.errors import NonFiniteWeights, UnsupportedShape, UsageError
from fewbit.formats import get_format
from fewbit.formats.base import HELD_TOKENS, InputStatistics, TensorSpec
from fewbit.math.hadamard import pack_signs, random_signs, rotate
from fewbit.math.inputs import quantized_inputs
from fewbit.math.rounding import inverse_factor
from fewbit.modules import FewbitLinear

FORMAT = get_format("twinquant")
SIGNS = random_signs(256, 0)


def _weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """A matrix of which a few directions carry half the energy, as in trained ones."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, 32, generator=generator), torch.randn(32, cols, generator=generator)
    spectrum = torch.logspace(0, -1, 32)
    strong = (left * spectrum) @ right / spectrum.norm()
    return 0.05 * (strong + torch.randn(rows, cols, generator=generator))


def _inputs(tokens: int, cols: int, seed: int = 1) -> torch.Tensor:
    """Correlated inputs with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) * 0.7 / cols**0.5 + torch.eye(cols)
    return torch.randn(tokens, cols, generator=generator) @ mixing + torch.randn(cols, generator=generator)


def _calibration(x: torch.Tensor, spec: TensorSpec) -> dict[str, torch.Tensor]:
    shift = x.mean(0).half().float()
    signs = pack_signs(SIGNS) if spec.block > 1 else None
    seen = quantized_inputs(x, signs, spec.block, spec.group, spec.act_bits, shift)
    return FORMAT.calibration(
        InputStatistics(seen.T @ seen / len(x), len(x), seen[-256:], shift, x.mean(0), seen.mean(0)), 0.01
    )


def _linear(parts: dict[str, torch.Tensor], spec: TensorSpec, bias: torch.Tensor | None = None) -> FewbitLinear:
    linear = FewbitLinear(QuantizedModule("layer", spec, "body"), bias is not None, torch.float32)
    signs = {"signs": pack_signs(SIGNS)} if spec.block > 1 else {}
    linear.load_state_dict({**parts, **signs, **({} if bias is None else {"bias": bias})})
    return linear


def _output_error(spec: TensorSpec, calibrated: bool = True) -> float:
    """Relative squared error of the outputs on inputs that were not calibrated on."""
    weight, (x, other) = _weight(spec.rows, spec.cols), _inputs(2560, spec.cols).split([2048, 512])
    signs = SIGNS if spec.block > 1 else None
    done = FORMAT.quantize(weight, spec, signs, _calibration(x, spec) if calibrated else {})
    exact = other @ weight.T
    return float((_linear(done.parts, spec)(other) - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize(
    ("rows", "cols", "rank", "group", "expected"),
    [
        (576, 576, 128, 64, 128),
        (192, 576, 128, 64, 0),
        (1536, 8960, 128, 128, 128),
        (4096, 4096, 200, 128, 128),
        (4096, 4096, 0, 128, 0),
        (256, 4096, 128, 128, 0),
    ],
)
def test_branches_have_whole_groups_and_narrow_matrices_none(rows, cols, rank, group, expected):
    spec = FORMAT.spec(rows, cols, 4, rank=rank, act_bits=4)
    assert (spec.group, spec.rank, spec.act_bits) == (group, expected, 4)
    assert FORMAT.accepts(spec)
    assert not FORMAT.accepts(TensorSpec("twinquant", 4, rows, cols, spec.block, group, 96, 4))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="4, 8 or 16 bits, not 5"):
        FORMAT.spec(64, 64, 4, act_bits=5)
    with pytest.raises(UsageError, match="rank of a branch cannot be -1"):
        FORMAT.spec(64, 64, 4, rank=-1)
    with pytest.raises(UnsupportedShape, match="48 inputs"):
        FORMAT.spec(64, 48, 4)
    weight = _weight(16, 256)
    weight[3, 5] = torch.inf
    with pytest.raises(NonFiniteWeights):
        FORMAT.quantize(weight, FORMAT.spec(16, 256, 4), SIGNS, {})


@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("calibrated", [True, False])
def test_parts_match_the_layout_and_decode_to_the_values(rank, calibrated):
    weight = _weight(270, 256)
    spec = TensorSpec("twinquant", 4, 270, 256, 256, 64, rank, 4)
    done = FORMAT.quantize(weight, spec, SIGNS, _calibration(_inputs(600, 256), spec) if calibrated else {})
    assert {name: (tuple(part.shape), name_of(part.dtype)) for name, part in done.parts.items()} == FORMAT.layout(spec)
    assert sum(part.numel() * part.element_size() for part in done.parts.values()) == FORMAT.storage_bytes(spec)
    assert torch.equal(FORMAT.dequantize(done.parts, spec), done.values)
    rotated = rotate(weight, SIGNS, 256)
    error = float((done.values - rotated).square().sum() / rotated.square().sum())
    assert done.relative_error == pytest.approx(error, rel=1e-4)
    cut, part_spec = FORMAT.slice_rows(done.parts, spec, 16, 40)
    assert torch.allclose(FORMAT.dequantize(cut, part_spec), done.values[16:40], atol=1e-7)


def test_the_branch_leaves_less_to_round():
    plain = FORMAT.quantize(_weight(512, 512), TensorSpec("twinquant", 4, 512, 512, 1, 128, 0, 16), None, {})
    branch = FORMAT.quantize(_weight(512, 512), TensorSpec("twinquant", 4, 512, 512, 1, 128, 128, 16), None, {})
    assert branch.relative_error < 0.6 * plain.relative_error


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("rank", [0, 64])
def test_feedback_loses_less_of_the_outputs_than_plain_rounding(rank, act_bits):
    spec = TensorSpec("twinquant", 4, 272, 256, 256, 64, rank, act_bits)
    assert _output_error(spec) < 0.8 * _output_error(spec, calibrated=False)


def test_what_a_rounded_v_leaves_to_r_is_its_error_feedback():
    """The factor of `[U x + noise, x]` is `[[D, -D U], [0, C]]`, so that rounding V changes R by `-dV U` and V not."""
    cols, rank = 96, 16
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4 * cols, cols, generator=generator).double()
    down = torch.randn(rank, cols, generator=generator).double()
    noise = 0.5 + torch.rand(rank, generator=generator).double()
    hessian = inputs.T @ inputs / inputs.shape[0]
    across = down @ hessian
    corner = across @ down.T + noise.diag()
    joint = torch.cat([torch.cat([corner, across], 1), torch.cat([across.T, hessian], 1)])
    found = inverse_factor(joint, 1e-9).double()
    own = noise.rsqrt().diag()
    expected = torch.cat([own, -own @ down], 1)
    torch.testing.assert_close(found[:rank], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[rank:, rank:], inverse_factor(hessian, 1e-9).double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("act_bits", [8, 16])
def test_where_inputs_lose_little_the_branch_gains_and_where_they_do_not_it_costs_nothing(act_bits):
    def spec(rank, bits):
        return TensorSpec("twinquant", 4, 272, 256, 256, 64, rank, bits)

    assert _output_error(spec(64, act_bits)) < 0.8 * _output_error(spec(0, act_bits))
    assert _output_error(spec(64, 4)) < 1.02 * _output_error(spec(0, 4))


def test_without_calibration_the_branch_knows_what_rounding_h_costs():
    plain, branch = (TensorSpec("twinquant", 4, 272, 256, 256, 64, rank, 4) for rank in (0, 64))
    assert _output_error(branch, calibrated=False) < _output_error(plain, calibrated=False)


@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("block", [1, 256])
@pytest.mark.parametrize("act_bits", [4, 8, 16])
def test_the_module_computes_what_its_components_say(act_bits, block, rank):
    spec = TensorSpec("twinquant", 4, 272, 256, block, 64, rank, act_bits)
    x, bias = _inputs(600, 256), torch.randn(272, generator=torch.Generator().manual_seed(4))
    calibration = _calibration(x, spec)
    done = FORMAT.quantize(_weight(272, 256), spec, SIGNS if block > 1 else None, calibration)
    found = FORMAT.components(done.parts, spec)
    signs = pack_signs(SIGNS) if block > 1 else None
    seen = quantized_inputs(x, signs, block, 64, act_bits, calibration["shift"])
    expected = seen @ found.residual.T + done.parts["offset"] + bias
    if rank:
        expected = expected + quantized_inputs(seen @ found.down.T, None, 1, 64, act_bits) @ found.up.T
    y = _linear(done.parts, spec, bias)(x)
    # Sums in another order turn a few ties of h.
    assert (y - expected).square().mean() < 1e-4 * expected.square().mean()


@pytest.mark.parametrize("act_bits", [4, 8, 16])
def test_the_mean_of_the_outputs_is_exact(act_bits):
    spec = TensorSpec("twinquant", 4, 272, 256, 256, 64, 0, act_bits)
    weight, x = _weight(272, 256), _inputs(600, 256)
    done = FORMAT.quantize(weight, spec, SIGNS, _calibration(x, spec))
    exact = x @ weight.T
    found = _linear(done.parts, spec)(x)
    assert (found.mean(0) - exact.mean(0)).abs().max() < 1e-4 * exact.square().mean().sqrt()


@pytest.mark.parametrize("name", ["trellis", "twinquant", "svdquant"])
def test_files_of_calibration_take_no_more_than_the_disk_is_asked_for(name):
    fmt = get_format(name)
    spec = fmt.spec(64, 256, 4, **({} if name == "trellis" else {"rank": 16, "act_bits": 8}))
    x = _inputs(HELD_TOKENS, 256)
    statistics = InputStatistics(x.T @ x / len(x), len(x), x, x.mean(0), x.mean(0), x.mean(0))
    taken = sum(tensor.numel() * tensor.element_size() for tensor in fmt.calibration(statistics, 0.01).values())
    assert 0.9 * fmt.calibration_bytes(spec) < taken <= fmt.calibration_bytes(spec) + 8
