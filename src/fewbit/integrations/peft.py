"""LoRA adapters of PEFT on packed linears, which keep their bits while the adapters learn.

PEFT takes other kinds of linears from a table in each `LoraConfig`. Importing this module, which `import fewbit` does
as soon as PEFT is there, has every configuration get fewbit's entry when it meets a model.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fewbit.errors import UsageError
from fewbit.modules import FewbitLinear

ALL_LINEAR = "all-linear"
READ_WEIGHTS = ("use_dora", "kasa_config", "velora_config", "use_bdlora")


class FewbitLoraLinear(Linear):
    """`y = W x + bias + scaling B A x` with `W` packed; inputs `[..., K]`, outputs `[..., N]` of the inputs' dtype.

    Raises `UsageError` for whatever needs to read `W` or to write to it: it has no plain weights.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        _check(config)
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # PEFT's own finds them, too, but warns of a kind of layer that it does not know.
        return module.in_features, module.out_features  # type: ignore[return-value]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add a further adapter to the layer."""
        _check(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises: the sum of packed weights and an adapter would have to be rounded again."""
        raise UsageError(
            "an adapter cannot be merged into packed weights; keep it beside them (save_pretrained writes it alone), "
            "or merge it into the full model and run: fewbit quantize"
        )


def _check(config: Any) -> None:
    """Refuse settings that start from the plain weight or change it."""
    for option in READ_WEIGHTS:
        if getattr(config, option, None):
            raise UsageError(f"{option} reads the plain weight, which a packed linear does not have; use plain LoRA")
    start = config.init_lora_weights
    if isinstance(start, str) and start not in ("gaussian", "eva"):
        raise UsageError(
            f"init_lora_weights={start!r} starts from the plain weight, which a packed linear does not have; "
            "use True, 'gaussian' or 'eva'"
        )


def _all_linears(model: Any) -> set[str]:
    """Names of all linears, packed or plain, but the output head; those with adapters by the names of what is around
    them, and without what is inside."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found, inside = set(), set()
    for name, module in model.named_modules():
        adapted = isinstance(module, BaseTunerLayer)
        if adapted or module is head:
            inside |= {f"{name}.{part}" for part, _ in module.named_modules() if part}
        base = module.get_base_layer() if adapted else module
        if isinstance(base, FewbitLinear | nn.Linear) and module is not head:
            found.add(name)
    return found - inside


def register() -> None:
    """Have PEFT put LoRA on packed linears; safe to call more than once."""
    prepare = LoraModel._prepare_model
    if getattr(prepare, "knows_fewbit", False):
        return

    @wraps(prepare)
    def prepare_model(self: Any, peft_config: Any, model: Any) -> None:
        if any(isinstance(module, FewbitLinear) for module in model.modules()):
            peft_config._register_custom_module({FewbitLinear: FewbitLoraLinear})
            if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == ALL_LINEAR:
                # PEFT would look for linears of PyTorch alone, and find none.
                peft_config.target_modules = _all_linears(model)
        prepare(self, peft_config, model)

    prepare_model.knows_fewbit = True  # type: ignore[attr-defined]
    LoraModel._prepare_model = prepare_model


register()
