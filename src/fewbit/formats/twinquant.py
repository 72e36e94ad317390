"""TwinQuant (arXiv 2606.01556): a low-rank branch and a residual, both in four bits, with quantized inputs.

`W ~ R + V U` for `W [N, K]`: `U [r, K]` gives r more inputs `h = U x`, and `[R, V]`, side by side, is one matrix of
K + r inputs. Inputs are shifted, rotated where the block says so, and quantized to `act_bits`, and so is h.

Stored: `codes`, `scales` and `scale` of `[R, V]` as the int4 format has them for K + r inputs; with a branch
`down_codes`, `down_scales` and `down_scale` of U; `shift` fp16 `[K]`, which is subtracted from the inputs on their own
axes; and `offset` fp32 `[N]`, which is added to the outputs and gives back what the shift took away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewbit.errors import NonFiniteWeights, UsageError
from fewbit.formats.base import (
    HELD_TOKENS,
    Format,
    InputStatistics,
    Layout,
    TensorSpec,
    get_format,
    group_format,
    register,
)
from fewbit.math.hadamard import rotate
from fewbit.math.inputs import quantized_inputs
from fewbit.math.lowrank import balanced, fitted_up, leading_directions
from fewbit.math.rounding import Quantized, Rows, energy, inverse_factor, one_thread, quantize_rotated
from fewbit.torch_later import torch

ACT_BITS = (4, 8, 16)
DOWN = "down_"
GAUSSIAN_ERROR = 0.0093  # of int4 in groups of 128, relative to the energy
GAUSSIAN_INPUT_ERROR = {4: 0.0106, 8: 4e-5, 16: 0.0}  # the same of inputs, by their bits


@dataclass(frozen=True)
class Components:
    """The three matrices, float32: `down [r, K]` (U), `up [N, r]` (V) and `residual [N, K]` (R)."""

    residual: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@register
class TwinQuant(Format):
    """4.125 bits per weight of `[R, V]` and U in groups of 128; see the module for the parts."""

    name = "twinquant"
    bits = (4,)
    group_limit = 128
    single_threaded = True

    def spec(self, rows: int, cols: int, bits: int, **choices: int) -> TensorSpec:
        """As for int4, with a branch of at most `rank` (0): a multiple of the group, at most a quarter of the narrower
        side, so that narrow matrices go without; and inputs of `act_bits` (8)."""
        rank, act_bits = choices.pop("rank", 0), choices.pop("act_bits", 8)
        if act_bits not in ACT_BITS:
            raise UsageError(f"inputs are quantized to 4, 8 or 16 bits, not {act_bits}")
        if rank < 0:
            raise UsageError(f"the rank of a branch cannot be {rank}")
        plain = get_format("int4").spec(rows, cols, bits, **choices)
        fitting = min(rank, min(rows, cols) // 4) // plain.group * plain.group
        return replace(plain, format=self.name, rank=fitting, act_bits=act_bits)

    def accepts(self, spec: TensorSpec) -> bool:
        expected = self.spec(spec.rows, spec.cols, spec.bits, rank=spec.rank, act_bits=spec.act_bits)
        return spec in (expected, replace(expected, block=1))

    def layout(self, spec: TensorSpec) -> Layout:
        both = get_format("int4").layout(both_spec(spec))
        down = get_format("int4").layout(down_spec(spec)) if spec.rank else {}
        return {
            **both,
            **{DOWN + name: part for name, part in down.items()},
            "shift": ((spec.cols,), "F16"),
            "offset": ((spec.rows,), "F32"),
        }

    def calibration(self, inputs: InputStatistics, damping: float) -> dict[str, torch.Tensor]:
        assert inputs.shift is not None
        assert inputs.mean is not None
        assert inputs.mean_quantized is not None
        return {
            "hessian": inputs.hessian,
            "factor": inverse_factor(inputs.hessian, damping),
            "held": inputs.held,
            "shift": inputs.shift.half(),
            "mean": inputs.mean,
            "mean_quantized": inputs.mean_quantized,
        }

    def calibration_bytes(self, spec: TensorSpec) -> int:
        vectors = HELD_TOKENS + 3
        return 4 * (2 * spec.cols**2 + vectors * spec.cols)

    def quantize(
        self, weight: Rows, spec: TensorSpec, signs: torch.Tensor | None, calibration: dict[str, torch.Tensor]
    ) -> Quantized:
        """See `Format.quantize`. R is what the rounded U and V leave of the weight, rounded with error feedback, so it
        repays what their rounding lost. Runs on one thread, because its sums decide codes
        and the bytes must not depend on the number of threads; processes share the work among them."""
        with one_thread():
            return self._quantize(weight, spec, signs, calibration)

    def _quantize(
        self, weight: Rows, spec: TensorSpec, signs: torch.Tensor | None, calibration: dict[str, torch.Tensor]
    ) -> Quantized:
        plain = weight[0 : spec.rows].float()
        if not bool(torch.isfinite(plain).all()):
            raise NonFiniteWeights("the weight holds NaN or infinity; mend the source checkpoint, or leave it out")
        matrix = plain if signs is None else rotate(plain, signs, spec.block)
        parts = self.encode(matrix, spec, calibration)
        found = self.components(parts, spec)
        shift = calibration.get("shift", torch.zeros(spec.cols).half())
        parts["shift"], parts["offset"] = shift, torch.zeros(spec.rows)
        if calibration:
            # The mean of the outputs becomes the exact one, rounded inputs and weights notwithstanding.
            mean = calibration["mean"]
            seen = mean - shift.float()
            seen = seen if signs is None else rotate(seen[None], signs, spec.block)[0]
            parts["offset"] = plain @ mean - self.mean_outputs(found, seen, calibration["mean_quantized"])
        values = found.residual + found.up @ found.down
        total = energy(matrix)
        lost = energy(values - matrix)
        return Quantized(parts, values, lost / total if total > 0.0 else 0.0)

    def encode(
        self, matrix: torch.Tensor, spec: TensorSpec, calibration: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The integer parts of a rotated matrix float32 `[N, K]`."""
        int4 = group_format("int4")
        hessian, factor = calibration.get("hessian"), calibration.get("factor")
        if not spec.rank:
            return quantize_rotated(int4, matrix, both_spec(spec), factor).parts
        if hessian is None:
            # Inputs of which nothing is known are as good as white.
            hessian = torch.eye(spec.cols)
        directions = calibration.get("directions")
        if directions is None:
            directions = branch_axes(matrix, spec.rank, hessian, "svd")
        rounded = quantize_rotated(int4, directions, down_spec(spec), factor)
        down, parts = rounded.values, {DOWN + name: part for name, part in rounded.parts.items()}
        noise = self._branch_noise(calibration.get("held"), hessian, down, spec)
        price = 1.0 if factor is None else float((1.0 / factor.diagonal().double().square()).mean())
        up = fitted_up(matrix, down, noise, GAUSSIAN_ERROR * price)
        # R is what the rounded V leaves. That is V's error feedback: h is `U x` and noise that x knows nothing of, so
        # in the factor of `[h, x]` the columns of V meet each other nowhere, and those of R by U.
        scale = int4.tensor_scale(torch.cat([up, matrix - up @ down], 1), both_spec(spec))
        branch = quantize_rotated(int4, up, up_spec(spec), None, scale)
        rest = quantize_rotated(int4, matrix - branch.values @ down, residual_spec(spec), factor, scale)
        both = {name: torch.cat([rest.parts[name], branch.parts[name]], 1) for name in ("codes", "scales")}
        return {**both, "scale": rest.parts["scale"], **parts}

    def _branch_noise(
        self, held: torch.Tensor | None, hessian: torch.Tensor, down: torch.Tensor, spec: TensorSpec
    ) -> torch.Tensor:
        """The mean squared error of each entry of h when it is quantized, float32 `[r]`: from `held` inputs `[n, K]`,
        or as if h were Gaussian."""
        if spec.act_bits == 16 or held is None or not held.shape[0]:
            return GAUSSIAN_INPUT_ERROR[spec.act_bits] * ((down @ hessian) * down).sum(1)
        h = held @ down.T
        return (quantized_inputs(h, None, 1, spec.group, spec.act_bits) - h).square().mean(0)

    def mean_outputs(self, found: Components, exact: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """What the components make of the mean input, float32 `[N]`: the `exact` one `[K]` or the one that is left when
        inputs are quantized, both shifted and rotated."""
        return found.residual @ quantized + found.up @ (found.down @ quantized)

    def components(self, parts: dict[str, torch.Tensor], spec: TensorSpec) -> Components:
        """The decoded matrices, on the inputs' rotated axes."""
        fmt = get_format("int4")
        both = fmt.dequantize(parts, both_spec(spec))
        down = torch.zeros(0, spec.cols)
        if spec.rank:
            named = {name.removeprefix(DOWN): part for name, part in parts.items() if name.startswith(DOWN)}
            down = fmt.dequantize(named, down_spec(spec))
        return Components(both[:, : spec.cols], both[:, spec.cols :], down)

    def dequantize(self, parts: dict[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        found = self.components(parts, spec)
        return found.residual + found.up @ found.down if spec.rank else found.residual


def branch_axes(matrix: torch.Tensor, rank: int, hessian: torch.Tensor, init: str) -> torch.Tensor:
    """U before it is rounded, float32 `[r, K]`: the leading directions of a rotated weight `[N, K]` as `init` says (see
    `leading_directions`), on axes where rounding h costs least for inputs of second moment `hessian [K, K]`."""
    leading = leading_directions(matrix, rank, hessian, init)
    moment = leading.double() @ hessian.double() @ leading.double().T
    return balanced(leading, moment, float(hessian.diagonal().double().mean()))


def both_spec(spec: TensorSpec) -> TensorSpec:
    """The storage of `[R, V]` as an int4 matrix."""
    return TensorSpec("int4", spec.bits, spec.rows, spec.cols + spec.rank, 1, spec.group)


def residual_spec(spec: TensorSpec) -> TensorSpec:
    """The storage of R alone as an int4 matrix."""
    return TensorSpec("int4", spec.bits, spec.rows, spec.cols, 1, spec.group)


def up_spec(spec: TensorSpec) -> TensorSpec:
    """The storage of V alone as an int4 matrix."""
    return TensorSpec("int4", spec.bits, spec.rows, spec.rank, 1, spec.group)


def down_spec(spec: TensorSpec) -> TensorSpec:
    """The storage of U as an int4 matrix."""
    return TensorSpec("int4", spec.bits, spec.rank, spec.cols, 1, spec.group)
