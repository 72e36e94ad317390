"""Runs calibration text through a model one decoder layer at a time.

Only one layer holds real weights at any moment; between layers nothing but the hidden states is kept.
The layers' own code comes from transformers, so attention masks and rotary embeddings are whatever the
family uses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fewbit.checkpoint.source import Source
from fewbit.errors import NonFiniteWeights, UsageError
from fewbit.models import Family

WINDOWS_PER_BATCH = 8


def calibration_windows(source: Source, files: Sequence[Path], tokens: int, window: int) -> torch.Tensor:
    """Token windows int64 `[n, window]`, an equal share from the start of each file.

    Raises `UsageError` where a file is missing or all files together do not fill one window.
    """
    tokenizer = source.tokenizer()
    share = max(1, tokens // window // max(1, len(files)))
    chunks = []
    for file in files:
        if not Path(file).is_file():
            raise UsageError(f"calibration file {file} does not exist; give a UTF-8 text file")
        try:
            # 12 bytes a token is more than any language model's tokenizer needs on running text.
            text = Path(file).read_text(encoding="utf-8")[: 12 * share * window]
        except UnicodeDecodeError as error:
            raise UsageError(f"calibration file {file} is not UTF-8 text ({error.reason})") from error
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        usable = min(share, ids.numel() // window)
        chunks.append(ids[: usable * window].view(usable, window))
    windows = torch.cat(chunks) if chunks else torch.empty(0, window, dtype=torch.long)
    if windows.shape[0] == 0:
        raise UsageError(f"the calibration text is shorter than one window of {window} tokens; give a longer file")
    return windows


def tokens_hash(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, new parameters get no storage while buffers (rotary frequencies and the like) are real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextmanager
def bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 products take bfloat16 factors where `dtype` is that; sums stay float32.

    A linear under autocast rounds its input to bfloat16, so a Hessian of rounded inputs is the true one.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class LayerStream:
    """A model of which one part at a time is materialised from its source."""

    def __init__(self, source: Source, family: Family, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is that of the layers' matrix products; everything else is float32."""
        self.source = source
        self.dtype = dtype
        self.family = family
        with _parameters_on_meta():
            self.model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
        self.layers: nn.ModuleList = self.model.get_submodule(family.layers)
        self._kwargs: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.layers)

    def load(self, prefix: str) -> nn.Module:
        """Give the submodule `prefix` its weights, float32; raises `NonFiniteWeights` on NaN or infinity."""
        part = self.model.get_submodule(prefix)
        for name, _ in list(part.named_parameters()):
            tensor = self.source.tensor(f"{prefix}.{name}")
            if not torch.isfinite(tensor).all():
                raise NonFiniteWeights(f"{prefix}.{name} holds NaN or infinity; the source model is damaged")
            _set_parameter(part, name, tensor)
        return part

    def unload(self, prefix: str) -> None:
        """Free the weights of the submodule `prefix`."""
        part = self.model.get_submodule(prefix)
        for name, parameter in list(part.named_parameters()):
            _set_parameter(part, name, parameter.to("meta"))

    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """Hidden states in front of the first layer, float32 `[n, window, hidden]`."""
        self.load(self.family.embed)
        hidden = torch.cat([self._record(batch)[0] for batch in windows.split(WINDOWS_PER_BATCH)])
        self.unload(self.family.embed)
        return hidden

    def _record(self, batch: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Run everything but the layers, and note what each layer would have been called with."""
        first: list[torch.Tensor] = []
        kwargs: list[dict[str, Any]] = []

        def layer_forward(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            first.append(hidden_states)
            kwargs.append(arguments)
            return hidden_states

        norm = self.model.get_submodule(self.family.final_norm)
        patched = [*self.layers, norm]
        for layer in self.layers:
            layer.forward = layer_forward
        norm.forward = lambda hidden_states: hidden_states
        try:
            base = self.model.get_submodule(self.family.layers.rpartition(".")[0])
            base(input_ids=batch, use_cache=False)
        finally:
            for module in patched:
                del module.forward
        self._kwargs[batch.shape[0]] = kwargs
        return first[0], kwargs

    def prepare(self, windows: torch.Tensor) -> None:
        """Learn the layers' arguments when the hidden states come from a file and `embed` was not run."""
        sizes = {batch.shape[0]: batch for batch in windows.split(WINDOWS_PER_BATCH)}
        if all(size in self._kwargs for size in sizes):
            return
        self.load(self.family.embed)
        for batch in sizes.values():
            self._record(batch)
        self.unload(self.family.embed)

    @torch.inference_mode()
    def run_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        into: torch.Tensor | None = None,
        advance: Callable[[int], None] = lambda steps: None,
    ) -> None:
        """Run layer `index` (which must be loaded) on hidden states float32 `[n, window, hidden]`.

        What comes out goes `into` a tensor of the same shape, which may be `hidden` itself; without one the
        layer runs for its hooks alone.
        """
        layer = self.layers[index]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16), bfloat16_products(self.dtype):
            for start in range(0, hidden.shape[0], WINDOWS_PER_BATCH):
                batch = hidden[start : start + WINDOWS_PER_BATCH]
                result = layer(batch, **self._kwargs[batch.shape[0]][index])
                if into is not None:
                    into[start : start + WINDOWS_PER_BATCH] = result[0] if isinstance(result, tuple) else result
                advance(batch.shape[0])


def _set_parameter(part: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    part.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


class HessianCollector:
    """Sums `x x'` over the inputs of chosen linears while a layer runs; float32 `[K, K]` each."""

    def __init__(self, linears: Iterable[tuple[str, nn.Module]]) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._handles = [module.register_forward_pre_hook(self._hook(key)) for key, module in linears]

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def accumulate(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            if key not in self.sums:
                self.sums[key] = torch.zeros(x.shape[1], x.shape[1])
                self.tokens[key] = 0
            self.sums[key].addmm_(x.T, x)
            self.tokens[key] += x.shape[0]

        return accumulate

    def __enter__(self) -> HessianCollector:
        return self

    def __exit__(self, *unused: object) -> None:
        for handle in self._handles:
            handle.remove()

    def mean(self, key: str) -> torch.Tensor:
        """The second moment `E[x x']`, float32 `[K, K]`."""
        return self.sums[key] / max(1, self.tokens[key])
