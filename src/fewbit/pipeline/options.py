"""What a user can choose about a quantization run.

The options are plain data: they are written into the plan, and a run is resumed only with the options it
was started with.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from fewbit.environment import multiplies_bfloat16
from fewbit.errors import UsageError
from fewbit.formats import get_format
from fewbit.math.lowrank import INITS

CODES = {
    "itq3_s": {"trellis": "trellis", "ternary": "ternary", "iq3_s": "iq3_s", "lloyd8": "lloyd8"},
    "twinquant": {"twin": "twinquant", "svdquant": "svdquant"},
}
"""The formats of single matrices behind the codes of a format, the product first, then controls."""
HEADS = {
    "auto": ("trellis", 4),
    "itq4": ("trellis", 4),
    "itq3": ("trellis", 3),
    "itq2": ("trellis", 2),
    "int8": ("int8", 8),
    "bf16": ("bf16", 16),
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "naive": {"rank": 0, "rotate": False, "rounding": "nearest"},
    "low-rank": {"rotate": False, "rounding": "nearest"},
    "hadamard": {"rounding": "nearest"},
    "full": {},
}
"""The steps of TwinQuant's ablation, as options of that format."""

ROUNDINGS = ("ldlq", "nearest")
CALIB_DTYPES = ("auto", "bfloat16", "float32")

TUNED_WEIGHTS = 2_000_000_000  # models up to here are tuned unless asked otherwise
TRIAL_TOKENS = 8192
LEAST_STEPS, MOST_STEPS = 24, 320
LEAST_LEARNED, MOST_LEARNED = 16, 160
LEARNED_WEIGHTS = 5.2e9  # steps times weights that learning takes by default: 32 steps for 163 M weights
STEP_WEIGHTS = 2.2e10  # steps times weights that tuning takes by default: 160 steps for 135 M weights


@dataclass(frozen=True)
class QuantizeOptions:
    """The choices of one run.

    `format`, `code` ("": the first one of the format) and `bits` (0: 3, or 4 for twinquant) say how the linears of the
    decoder layers are stored, `head` how the output head and the embeddings are.

    Of twinquant, `rank` is that of the low-rank branch, which begins on the directions that `init` names ("svd": those
    of the weight's own energy, "whitened": those of the outputs'), and `act_bits` the width of inputs. With `smooth`,
    scales that make inputs cheaper to quantize are folded into norms, up and value projections; with `center`, the mean
    of inputs is taken off before they are quantized; with `learn` (None: for models of up to 2 billion weights) axes
    are learned before rounding, in at most `learn_steps` steps (0: fewer for larger models).

    A fractional number of `bits` is a mean, everything stored counted, that tensors of 2, 3 and 4 bits come to, chosen
    by measured sensitivity; `target_bytes` gives the size of all the model's tensors in its place. Head "auto" joins
    that choice, and is "itq4" where nothing is chosen.

    Without `rotate` weights are rounded on their own axes, as a control. `rounding` is "ldlq" (error feedback with
    the Hessian of the calibration text) or "nearest". With `sequential` the Hessians are those of a model whose
    earlier linears are rounded already, otherwise the full model's. `calib_tokens` is the budget over all
    calibration files, cut into windows of `calib_window` tokens. The layers' products run in `calib_dtype` ("auto":
    bfloat16 where the processor is faster with it); hidden states and Hessians stay float32. `damping` is relative
    to the mean of the Hessian's diagonal ("auto": chosen per input on held-out tokens).

    With `tune` (None: for models of up to 2 billion weights) scales, norms and biases follow the full model's
    predictions after rounding, for at most `tune_steps` steps (0: fewer for larger models) at the rate `tune_rate`.
    """

    format: str = "itq3_s"
    code: str = ""
    bits: float = 0
    target_bytes: int = 0
    head: str = "auto"
    rotate: bool = True
    rounding: str = "ldlq"
    calib_tokens: int = 65536
    calib_window: int = 512
    calib_dtype: str = "auto"
    damping: float | str = "auto"
    sequential: bool = True
    tune: bool | None = None
    tune_steps: int = 0
    tune_rate: float = 1e-3
    rank: int = 128
    init: str = INITS[0]
    act_bits: int = 8
    smooth: bool = True
    center: bool = True
    learn: bool | None = None
    learn_steps: int = 0

    def __post_init__(self) -> None:
        if self.format not in CODES:
            raise UsageError(f"unknown format '{self.format}': choose {' or '.join(CODES)}")
        codes = CODES[self.format]
        object.__setattr__(self, "code", self.code or next(iter(codes)))
        if not self.bits:
            object.__setattr__(self, "bits", 4 if self.format == "twinquant" else 3)
        if not math.isfinite(self.bits):
            raise UsageError(f"{self.bits} is no number of bits; give 2, 3 or 4, or a mean such as 3.25")
        # The plan's identity must not tell 3 from 3.0.
        object.__setattr__(self, "bits", int(self.bits) if self.bits == int(self.bits) else float(self.bits))
        if self.code not in codes:
            raise UsageError(f"unknown code '{self.code}' of {self.format}: choose one of {', '.join(codes)}")
        if self.format == "twinquant":
            self._check_twinquant()
        elif self.learn or self.learn_steps:
            raise UsageError("axes are learned for --format twinquant alone")
        if self.head not in HEADS:
            raise UsageError(f"unknown head format '{self.head}': choose one of {', '.join(HEADS)}")
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"unknown rounding '{self.rounding}': choose one of {', '.join(ROUNDINGS)}")
        if self.calib_dtype not in CALIB_DTYPES:
            raise UsageError(f"unknown calibration dtype '{self.calib_dtype}': choose {', '.join(CALIB_DTYPES)}")
        if self.tune and self.rounding == "nearest":
            raise UsageError("tuning learns from calibration text, which --rounding nearest does without: use ldlq")
        if self.tune_steps < 0 or not 0 < self.tune_rate < 1:
            raise UsageError("tuning takes a positive number of steps and a rate between 0 and 1")
        allowed = self.offered_bits
        if self.target_bytes and self.bits != int(self.bits):
            raise UsageError("a mean number of bits and a target size are two budgets; give one of them")
        if self.allocates and len(allowed) < 2:
            raise UsageError(f"{self._stored_as} stores {allowed[0]} bits only; bits are chosen for --code trellis")
        if self.allocates and self.rounding == "nearest":
            raise UsageError("bits are chosen by sensitivities, which take calibration text: use --rounding ldlq")
        if self.bits != int(self.bits) and not min(allowed) < self.bits < max(allowed) + 0.25:
            raise UsageError(f"{self._stored_as} stores {min(allowed)} to {max(allowed)} bits, not {self.bits}")
        if self.bits == int(self.bits) and self.bits not in allowed:
            raise UsageError(f"{self._stored_as} stores {' or '.join(map(str, allowed))} bits, not {self.bits}")
        if self.calib_window < 2 or self.calib_tokens < self.calib_window:
            raise UsageError(
                f"{self.calib_tokens} calibration tokens do not fill one window of {self.calib_window}; "
                "raise --calib-tokens"
            )
        if self.damping != "auto" and not (isinstance(self.damping, float) and 0 < self.damping < 1):
            raise UsageError(f"damping must be auto or lie between 0 and 1, not {self.damping}")

    def _check_twinquant(self) -> None:
        if self.code == "svdquant" and (self.tune or self.learn):
            raise UsageError("svdquant is a control that is neither learned nor tuned")
        if self.learn and not self.smooths:
            raise UsageError("axes are learned from calibration text and measured scales: use ldlq and smoothing")
        if self.init not in INITS:
            raise UsageError(f"unknown beginning '{self.init}' of a branch: choose {' or '.join(INITS)}")
        if self.init != INITS[0] and self.rounding == "nearest":
            raise UsageError(
                "a whitened branch needs calibration text, which --rounding nearest does without: use ldlq"
            )
        if self.learn_steps < 0:
            raise UsageError("learning takes a positive number of steps")
        # The format knows what ranks and widths there are.
        get_format(self.format_name).spec(128, 128, 4, **self.spec_choices)

    @property
    def format_name(self) -> str:
        """The format of the decoder layers' weights."""
        return CODES[self.format][self.code]

    @property
    def spec_choices(self) -> dict[str, int]:
        """What the format of the layers' weights wants to know beside bits and shape."""
        return {"rank": self.rank, "act_bits": self.act_bits} if self.format == "twinquant" else {}

    @property
    def offered_bits(self) -> tuple[int, ...]:
        return get_format(self.format_name).bits

    @property
    def _stored_as(self) -> str:
        return f"code {self.code}"

    @property
    def smooths(self) -> bool:
        """Whether scales are measured before anything is rounded."""
        return self.format == "twinquant" and self.smooth and self.rounding == "ldlq"

    @property
    def allocates(self) -> bool:
        """Whether the bits of each tensor are still to be chosen by measurement."""
        return bool(self.target_bytes) or self.bits != int(self.bits)

    @property
    def whole_bits(self) -> int:
        return int(self.bits)

    def trial(self, bits: int = 3) -> QuantizeOptions:
        """The quick uniform run that sensitivities are measured on."""
        head = self.head if self.head != "auto" else f"itq{bits}"
        tokens = max(self.calib_window, min(self.calib_tokens, TRIAL_TOKENS))
        return replace(
            self, bits=bits, target_bytes=0, head=head, calib_tokens=tokens, sequential=False, tune=False, tune_steps=0
        )

    def resolved(self, weights: int, earlier: dict[str, Any] | None = None) -> QuantizeOptions:
        """The same options with nothing left open, for a model of so many `weights`.

        "auto" becomes what suits this machine, or what an `earlier` run chose.
        """
        dtype = self.calib_dtype
        if dtype == "auto" and earlier is not None:
            dtype = earlier["calib_dtype"]
        elif dtype == "auto":
            dtype = "bfloat16" if multiplies_bfloat16() else "float32"
        fits = self.rounding == "ldlq" and self.code != "svdquant" and weights <= TUNED_WEIGHTS
        tune = self.tune if self.tune is not None else fits
        steps = self.tune_steps or max(LEAST_STEPS, min(MOST_STEPS, int(STEP_WEIGHTS / max(1, weights))))
        learn = self.smooths and (self.learn if self.learn is not None else fits)
        learn_steps = self.learn_steps or max(LEAST_LEARNED, min(MOST_LEARNED, int(LEARNED_WEIGHTS / max(1, weights))))
        return replace(
            self,
            calib_dtype=dtype,
            tune=tune,
            tune_steps=steps if tune else 0,
            learn=learn,
            learn_steps=learn_steps if learn else 0,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ablated(options: QuantizeOptions, step: str) -> QuantizeOptions:
    """The options of one step of TwinQuant's ablation; raises `UsageError` for an unknown one."""
    if step not in ABLATIONS:
        raise UsageError(f"unknown ablation '{step}': choose one of {', '.join(ABLATIONS)}")
    if step != "full" and options.format != "twinquant":
        raise UsageError("--ablation belongs to --format twinquant")
    return replace(options, **ABLATIONS[step])
