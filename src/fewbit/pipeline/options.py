"""What a user can choose about a quantization run.

The options are plain data: they are written into the plan, and a run is resumed only with the options it
was started with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fewbit.errors import UsageError
from fewbit.formats import get_format

CODES = {"trellis": "trellis", "ternary": "ternary", "iq3_s": "iq3_s", "lloyd8": "lloyd8"}
HEADS = {"itq4": ("trellis", 4), "itq3": ("trellis", 3), "int8": ("int8", 8), "bf16": ("bf16", 16)}
ROUNDINGS = ("ldlq", "nearest")
CALIB_DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class QuantizeOptions:
    """The choices of one run.

    `code` and `bits` say how the linears of the decoder layers are stored, `head` how the output head
    and the embeddings are. `rounding` is "ldlq" (error feedback with the Hessian of the calibration
    text) or "nearest". With `sequential` the Hessians are those of a model whose earlier linears are rounded
    already, otherwise the full model's. `calib_tokens` is the budget over all calibration files, cut into windows of
    `calib_window` tokens. The layers' products run in `calib_dtype` ("auto": bfloat16 where the
    processor has AMX tiles for it); hidden states and Hessians stay float32. `damping` is relative to
    the mean of the Hessian's diagonal ("auto": chosen per input on held-out tokens).
    """

    code: str = "trellis"
    bits: int = 3
    head: str = "itq4"
    rounding: str = "ldlq"
    calib_tokens: int = 65536
    calib_window: int = 512
    calib_dtype: str = "auto"
    damping: float | str = "auto"
    sequential: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise UsageError(f"unknown code '{self.code}': choose one of {', '.join(CODES)}")
        if self.head not in HEADS:
            raise UsageError(f"unknown head format '{self.head}': choose one of {', '.join(HEADS)}")
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"unknown rounding '{self.rounding}': choose one of {', '.join(ROUNDINGS)}")
        if self.calib_dtype not in CALIB_DTYPES:
            raise UsageError(f"unknown calibration dtype '{self.calib_dtype}': choose {', '.join(CALIB_DTYPES)}")
        allowed = get_format(CODES[self.code]).bits
        if self.bits not in allowed:
            raise UsageError(f"code {self.code} stores {' or '.join(map(str, allowed))} bits, not {self.bits}")
        if self.calib_window < 2 or self.calib_tokens < self.calib_window:
            raise UsageError(
                f"{self.calib_tokens} calibration tokens do not fill one window of {self.calib_window}; "
                "raise --calib-tokens"
            )
        if self.damping != "auto" and not (isinstance(self.damping, float) and 0 < self.damping < 1):
            raise UsageError(f"damping must be auto or lie between 0 and 1, not {self.damping}")

    def resolved(self, earlier: dict[str, Any] | None = None) -> QuantizeOptions:
        """The same options with "auto" replaced by what suits this machine, or by what an `earlier` run chose."""
        if self.calib_dtype != "auto":
            return self
        if earlier is not None:
            return replace(self, calib_dtype=earlier["calib_dtype"])
        # Where AVX-512 alone multiplies bfloat16, PyTorch runs at half the speed of its float32.
        return replace(self, calib_dtype="bfloat16" if torch.cpu._is_amx_tile_supported() else "float32")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
