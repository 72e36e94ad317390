"""A control for TwinQuant: a branch of 16 bits that reads inputs as they are, as in SVDQuant (arXiv 2411.05007).

`W ~ R + V U` for `W [N, K]`, R in int4 with quantized inputs, U and V in fp16 from the activation-whitened SVD. Only
for comparison: no fused kernel runs it.
"""

from __future__ import annotations

from dataclasses import replace

from fewbit.formats.base import InputStatistics, Layout, TensorSpec, get_format, group_format, register
from fewbit.formats.twinquant import Components, TwinQuant, residual_spec
from fewbit.math.lowrank import leading_directions
from fewbit.math.rounding import quantize_rotated
from fewbit.torch_later import torch


@register
class SvdQuant(TwinQuant):
    """`codes`, `scales` and `scale` of R as an int4 matrix, `down` fp16 `[r, K]` (U), `up` fp16 `[N, r]` (V), `shift`
    and `offset` as in twinquant."""

    name = "svdquant"

    def spec(self, rows: int, cols: int, bits: int, **choices: int) -> TensorSpec:
        """As for twinquant, with any rank up to a quarter of the narrower side."""
        rank = choices.get("rank", 0)
        plain = super().spec(rows, cols, bits, **choices)
        return replace(plain, rank=min(rank, min(rows, cols) // 4))

    def layout(self, spec: TensorSpec) -> Layout:
        return {
            **get_format("int4").layout(residual_spec(spec)),
            "down": ((spec.rank, spec.cols), "F16"),
            "up": ((spec.rows, spec.rank), "F16"),
            "shift": ((spec.cols,), "F16"),
            "offset": ((spec.rows,), "F32"),
        }

    def calibration(self, inputs: InputStatistics, damping: float) -> dict[str, torch.Tensor]:
        return {**super().calibration(inputs, damping), "damping": torch.tensor([damping])}

    def encode(
        self, matrix: torch.Tensor, spec: TensorSpec, calibration: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        hessian = calibration.get("hessian")
        damping = float(calibration.get("damping", torch.tensor(0.0)))
        moment = torch.eye(spec.cols) if hessian is None else hessian.clone()
        # Directions that calibration hardly saw must not get the branch's weights for nothing.
        moment.diagonal().add_(damping * moment.diagonal().mean())
        down, up = torch.zeros(0, spec.cols).half(), torch.zeros(spec.rows, 0).half()
        if spec.rank:
            down = leading_directions(matrix, spec.rank, moment, "whitened").half()
            across = down.float() @ moment
            gram = (across @ down.float().T).double()
            up = torch.linalg.solve(gram, (across @ matrix.T).double()).T.half()
        residual = matrix - up.float() @ down.float()
        parts = quantize_rotated(group_format("int4"), residual, residual_spec(spec), calibration.get("factor")).parts
        return {**parts, "down": down, "up": up}

    def components(self, parts: dict[str, torch.Tensor], spec: TensorSpec) -> Components:
        residual = get_format("int4").dequantize(parts, residual_spec(spec))
        return Components(residual, parts["up"].float(), parts["down"].float())

    def mean_outputs(self, found: Components, exact: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        return found.residual @ quantized + found.up @ (found.down @ exact)
