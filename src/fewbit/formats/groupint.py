"""Eight-bit integers with one scale per row and small group of inputs, for tensors that should lose nothing visible.

Not rotated: eight bits carry outliers well enough, and an embedding row can be decoded by itself.
"""

from __future__ import annotations

from fewbit.errors import UnsupportedShape, UsageError
from fewbit.formats.base import EncodedGroup, Layout, TensorSpec, register
from fewbit.formats.rowwise import RowwiseFormat
from fewbit.math.hadamard import scale_group
from fewbit.math.rounding import round_integers
from fewbit.torch_later import torch

UNIT = 32
MAX_CODE = 127


@register
class GroupInt8(RowwiseFormat):
    """`codes` int8 `[N, K]` within +-127, `scales` fp16 `[N, K / G]` and one shared fp32 `scale [1]`:
    weight = codes * (scales * scale). G is the largest multiple of 32 that divides K, at most 128."""

    name = "int8"
    bits = (8,)
    rotated = False
    group_limit = 128
    shared = ("scale",)

    def spec(self, rows: int, cols: int, bits: int, **choices: int) -> TensorSpec:
        if bits not in self.bits:
            raise UsageError(f"format {self.name} stores {self.bits} bits, not {bits}")
        if rows < 1 or cols < 1:
            raise UsageError(f"a matrix of {rows} x {cols} cannot be stored")
        if cols % UNIT:
            raise UnsupportedShape(f"{cols} inputs are not a multiple of {UNIT}, the smallest group; kept in 16 bits")
        return TensorSpec(self.name, bits, rows, cols, 1, scale_group(cols, UNIT, self.group_limit))

    def layout(self, spec: TensorSpec) -> Layout:
        return {
            "codes": ((spec.rows, spec.cols), "I8"),
            "scales": ((spec.rows, spec.groups), "F16"),
            "scale": ((1,), "F32"),
        }

    def tensor_scale(self, weight: torch.Tensor, spec: TensorSpec) -> float:
        """The largest group scale, so that the fp16 scales lie in (0, 1]; 1 for a tensor of zeros."""
        largest = float(weight.abs().max()) / MAX_CODE
        return float(torch.tensor(largest, dtype=torch.float32)) or 1.0

    def encode_group(
        self, weight: torch.Tensor, spec: TensorSpec, tensor_scale: float, factor: torch.Tensor | None
    ) -> EncodedGroup:
        relative = weight.abs().amax(1) / MAX_CODE / tensor_scale
        scales = relative.clamp(max=torch.finfo(torch.float16).max).half()
        step = (scales.float() * tensor_scale)[:, None]
        codes, values, error = round_integers(weight, step, -MAX_CODE, MAX_CODE, factor)
        return EncodedGroup({"codes": codes, "scales": scales[:, None]}, values, error)

    def assemble(self, groups: list[EncodedGroup], spec: TensorSpec, tensor_scale: float) -> dict[str, torch.Tensor]:
        scale = torch.tensor([tensor_scale], dtype=torch.float32)
        return {**super().assemble(groups, spec, tensor_scale), "scale": scale}

    def dequantize(self, parts: dict[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        step = (parts["scales"].float() * parts["scale"])[:, :, None]
        return (parts["codes"].float().view(-1, spec.groups, spec.group) * step).view(-1, spec.cols)
