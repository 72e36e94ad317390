"""The torch modules that stand in for linears and embeddings of a compressed model.

They hold the packed parts as buffers, exactly as stored, and never a full-precision weight between two
calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.dtypes import torch_dtype
from fewbit.formats import get_format
from fewbit.formats.svdquant import SvdQuant
from fewbit.math.hadamard import rotate, unpack_signs, unrotate
from fewbit.math.inputs import quantized_inputs
from fewbit.ops.cpu import FLOATS, KERNEL_DEVICES
from fewbit.ops.decode import spec_text
from fewbit.ops.gpu_layouts import GpuMatrix, gpu_matrices
from fewbit.ops.layouts import from_lanes, place
from fewbit.ops.schemas import PLAIN, ROW_GROUP

GPU_FORMATS = ("trellis", "ternary", "iq3_s", "twinquant")


class PackedTensor(nn.Module):
    """The stored parts of one weight matrix `[N, K]` as buffers.

    `place` may rearrange the codes for this machine; `parts`, the state dict and what is saved from it always show
    them as stored.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scale: torch.Tensor
    tables: torch.Tensor
    signs: torch.Tensor
    down_codes: torch.Tensor
    down_scales: torch.Tensor
    down_scale: torch.Tensor
    shift: torch.Tensor
    offset: torch.Tensor

    def __init__(self, description: QuantizedModule) -> None:
        super().__init__()
        self.description = description
        self.spec = description.spec
        self.code = self.spec.format
        self._gpu: tuple[GpuMatrix, ...] = ()
        self._spec_text = spec_text(self.spec)
        self._part_names = tuple(description.layout())
        self._stored_names = tuple(get_format(self.spec.format).layout(self.spec))  # without the signs
        for name, (shape, dtype) in description.layout().items():
            self.register_buffer(name, torch.empty(shape, dtype=torch_dtype(dtype)))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Let `.to()` and `.half()` move the parts, but never change their dtypes: they are bits, not numbers."""
        dtypes = {name: self._buffers[name].dtype for name in self._part_names}  # type: ignore[union-attr]
        before = {name: self._buffers[name] for name in self._part_names}
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != dtype:
                self._buffers[name] = before[name].to(moved.device)  # type: ignore[union-attr]
        if self.code == "lanes" and self.codes.device.type != "cpu":
            self.codes, self.code = self.parts()["codes"], self.spec.format
        self._gpu = ()
        return self

    @property
    def qweight(self) -> torch.Tensor:
        """The first stored part, under the name by which PEFT asks a quantized layer for its device."""
        return self._buffers[self._part_names[0]]  # type: ignore[return-value]

    def place(self) -> None:
        """Move the codes to where and how this machine multiplies them fastest; a second call changes nothing."""
        if self._on_gpu():
            self.gpu_matrices()
        elif self.code == "trellis":
            self.codes, self.code = place(self.codes, self.spec.bits, self.spec.group, self.code)

    def _on_gpu(self) -> bool:
        """Whether a graphics processor that has kernels for this format holds the parts."""
        device = self.qweight.device.type
        return device != "cpu" and device in KERNEL_DEVICES and self.spec.format in GPU_FORMATS

    def gpu_matrices(self) -> tuple[GpuMatrix, ...]:
        """The matrix (and TwinQuant's U behind it) as kernels of graphics processors take it, made once per device.

        Codes of the trellis and of int4 are the stored ones themselves; the controls have copies.
        """
        if getattr(getattr(self, "_hf_hook", None), "offload", False):
            # accelerate takes the parts away after every pass; a copy that is kept would hold their memory.
            return gpu_matrices(self.parts(), self.spec)
        if not self._gpu:
            self._gpu = gpu_matrices(self.parts(), self.spec)
        return self._gpu

    def parts(self) -> dict[str, torch.Tensor]:
        parts = {name: getattr(self, name) for name in self._part_names}
        if self.code == "lanes":
            parts["codes"] = from_lanes(self.codes, -(-self.spec.rows // ROW_GROUP), self.spec.cols, self.spec.bits)
        return parts

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.code == "lanes":
            destination[f"{prefix}codes"] = self.parts()["codes"]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.code == "lanes":
            self.codes, self.code = self.parts()["codes"], self.spec.format
        self._gpu = ()
        super()._load_from_state_dict(*args, **kwargs)

    def rotated_weight(self) -> torch.Tensor:
        """`W'`, float32 `[N, K]`, on the inputs' rotated axes."""
        parts = self.parts()
        if torch.compiler.is_compiling():
            return torch.ops.fewbit.decode([parts[name] for name in self._stored_names], self._spec_text)
        return get_format(self.spec.format).dequantize(parts, self.spec)

    def rotate_input(self, x: torch.Tensor) -> torch.Tensor:
        """`x'` for inputs `[..., K]`, same dtype; the transform itself runs in float32."""
        if self.spec.block == 1:
            return x
        return rotate(x.float(), unpack_signs(self.signs, self.spec.cols), self.spec.block).to(x.dtype)

    def has_kernel(self) -> bool:
        """Whether the operators multiply with the packed parts where they are; otherwise weights are decoded."""
        if self.spec.block == 1 and self.spec.format != "twinquant":
            return False
        if self.qweight.device.type != "cpu":
            return self._on_gpu()
        return self.spec.format == "trellis" or (self.spec.format == "twinquant" and self.spec.act_bits != PLAIN)

    def kernel_matrix(self) -> GpuMatrix:
        """The matrix as the operators of its device take it, where there is a kernel for it."""
        if self._on_gpu():
            return self.gpu_matrices()[0]
        return GpuMatrix(self.codes, self.scales, self.scale, self._buffers.get("tables"), self.code)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`W x + bias` for inputs `[..., K]`, in their dtype.

        Rotated trellis weights on the CPU go through `fewbit::linear`, which quantizes the inputs to 8 bits, and
        TwinQuant's through `fewbit::twin_linear`, with the inputs' bits; so do all codes that have kernels there on an
        NVIDIA device. Everything else, and everything that needs gradients, multiplies with the decoded weight.
        """
        training = torch.is_grad_enabled() and x.requires_grad
        rotated = self.spec.block > 1 or self.spec.format == "twinquant"
        if self._on_gpu() and rotated and x.dtype in FLOATS and not training:
            return self.gpu_product(x, bias)
        if self.spec.format == "twinquant":
            return self._twin_product(x, bias, training)
        if self.spec.format == "svdquant":
            return self._svd_product(x, bias)
        native = self.spec.format == "trellis" and self.spec.block > 1
        if native and x.device.type == "cpu" and x.dtype in FLOATS and not training:
            return torch.ops.fewbit.linear(
                x,
                self.codes,
                self.scales,
                self.scale,
                self.tables,
                self.signs,
                bias,
                self.spec.bits,
                self.spec.block,
                self.code,
            )
        return nn.functional.linear(self.rotate_input(x), self.rotated_weight().to(x.dtype), bias)

    def gpu_product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`product` by the operators, with the layouts of graphics processors."""
        spec, (matrix, *branch) = self.spec, self.gpu_matrices()
        parts = (matrix.codes, matrix.scales, matrix.tensor_scale)
        signs = self.signs if spec.block > 1 else None
        act_bits, shift = spec.act_bits or 8, None
        if spec.format == "twinquant":
            bias, shift = self.offset if bias is None else self.offset + bias.float(), self.shift
        if branch:
            down = (branch[0].codes, branch[0].scales, branch[0].tensor_scale)
            return torch.ops.fewbit.twin_linear(x, *down, *parts, signs, bias, spec.block, act_bits, shift)
        return torch.ops.fewbit.linear(
            x, *parts, matrix.tables, signs, bias, spec.bits, spec.block, matrix.code, act_bits, shift
        )

    def _twin_product(self, x: torch.Tensor, bias: torch.Tensor | None, training: bool) -> torch.Tensor:
        spec = self.spec
        offset = self.offset if bias is None else self.offset + bias.float()
        if spec.act_bits == 16 or training or x.dtype not in FLOATS:
            # Shifted in float32: what is left after the shift is much smaller than the inputs.
            shifted = self.rotate_input(x.float() - self.shift.float()).to(x.dtype)
            return nn.functional.linear(shifted, self.rotated_weight().to(x.dtype), offset.to(x.dtype))
        signs = self.signs if spec.block > 1 else None
        both = (self.codes, self.scales, self.scale)
        if spec.rank:
            down = (self.down_codes, self.down_scales, self.down_scale)
            return torch.ops.fewbit.twin_linear(x, *down, *both, signs, offset, spec.block, spec.act_bits, self.shift)
        return torch.ops.fewbit.linear(
            x, *both, None, signs, offset, spec.bits, spec.block, "nibbles", spec.act_bits, self.shift
        )

    def _svd_product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        spec, rows = self.spec, x.reshape(-1, self.spec.cols)
        offset = self.offset if bias is None else self.offset + bias.float()
        signs = self.signs if spec.block > 1 else None
        found = SvdQuant().components(self.parts(), spec)
        exact, seen = (
            quantized_inputs(rows, signs, spec.block, spec.group, bits, self.shift) for bits in (16, spec.act_bits)
        )
        y = seen @ found.residual.T + exact @ found.down.T @ found.up.T + offset
        return y.to(x.dtype).view(*x.shape[:-1], spec.rows)

    def plain_weight(self) -> torch.Tensor:
        """`W`, float32 `[N, K]`: the weight-side placement of the rotation."""
        weight = self.rotated_weight()
        if self.spec.block == 1:
            return weight
        return unrotate(weight, unpack_signs(self.signs, self.spec.cols), self.spec.block)


class FewbitLinear(PackedTensor):
    """`y = W x + bias` with `W` packed; inputs `[..., K]`, outputs `[..., N]` of the inputs' dtype."""

    def __init__(self, description: QuantizedModule, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(description)
        self.in_features = self.spec.cols
        self.out_features = self.spec.rows
        self.bias = nn.Parameter(torch.zeros(self.spec.rows, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.bias)

    def extra_repr(self) -> str:
        return f"{self.spec}, bias={self.bias is not None}"


class FewbitEmbedding(PackedTensor):
    """Looks rows up in a packed table `[N, K]`; ids `[...]` give `[..., K]` in `dtype`.

    Called with `as_head` it is a tied output head instead: hidden states `[..., K]` give logits `[..., N]`.
    """

    def __init__(self, description: QuantizedModule, dtype: torch.dtype, multiplier: float = 1.0) -> None:
        super().__init__(description)
        self.dtype = dtype
        self.multiplier = multiplier

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Follow `.to(dtype)` although the parts do not: what is looked up has the dtype of the rest of the model."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: torch.Tensor, as_head: bool = False) -> torch.Tensor:
        if as_head:
            return self.product(ids, None)
        stored = [getattr(self, name) for name in self._stored_names]
        signs = self.signs if self.spec.block > 1 else None
        return torch.ops.fewbit.lookup(ids, stored, signs, self._spec_text, self.code, self.multiplier, self.dtype)


class TiedHead(nn.Module):
    """An output head that reads the embedding's packed table; it owns no tensors of its own."""

    def __init__(self, table: FewbitEmbedding) -> None:
        super().__init__()
        # Kept out of the module tree, so that the state dict names the table once.
        object.__setattr__(self, "table", table)
        self.in_features = table.spec.cols
        self.out_features = table.spec.rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # By a call, since accelerate may have to fetch the table first.
        return self.table(x, as_head=True)  # type: ignore[operator]
