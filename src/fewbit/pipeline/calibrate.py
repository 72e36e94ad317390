"""Runs calibration text through a model one decoder layer at a time.

Only one layer holds real weights at any moment; between layers nothing but the hidden states is kept.
The layers' own code comes from transformers, so attention masks and rotary embeddings are whatever the
family uses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fewbit.checkpoint.equivalent import rotate_output
from fewbit.checkpoint.source import Source, SourceRows
from fewbit.errors import NonFiniteWeights
from fewbit.experts import separate_experts
from fewbit.formats.base import HELD_TOKENS, InputStatistics
from fewbit.math.hadamard import pack_signs, rotate, rotate_moment
from fewbit.math.inputs import quantized_inputs
from fewbit.models import Family
from fewbit.ops.extension import load_native

WINDOWS_PER_BATCH = 4
TABLE_ROWS = 8192  # rows of the embedding that are read at once
PANEL = 1024  # columns of a Hessian that one product updates


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


def _takes_autocast(dtype: torch.dtype) -> bool:
    """Whether float32 products cannot take bfloat16 factors by PyTorch's setting for that: it needs AMX."""
    return dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()


@contextmanager
def bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 products take bfloat16 factors, where `dtype` is that and there is AMX; sums stay float32.

    PyTorch's setting for that does nothing on other processors but choose a slower product.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if dtype == torch.bfloat16 and not _takes_autocast(dtype):
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _Enough(Exception):
    """Raised by a hook when the rest of a layer need not run."""


class LayerStream:
    """A model of which one part at a time is materialised from its source."""

    def __init__(
        self,
        source: Source,
        family: Family,
        windows: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        windows_per_batch: int = WINDOWS_PER_BATCH,
    ) -> None:
        """`windows` are token ids int64 `[n, window]`; `dtype` is that of the layers' matrix products, everything
        else is float32."""
        self.source = source
        self.dtype = dtype
        self.family = family
        self.batches = windows.split(windows_per_batch)
        with _parameters_on_meta():
            # transformers writes dtype and attention into the configuration it is given.
            config = copy.deepcopy(source.config)
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            separate_experts(self.model, family)
            if source.rotated_tie:
                rotate_output(self.model.get_submodule(family.final_norm))
        self.layers: nn.ModuleList = self.model.get_submodule(family.layers)
        self._kwargs: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.layers)

    def load(self, prefix: str) -> nn.Module:
        """Give the submodule `prefix` the weights that it lacks, float32; raises `NonFiniteWeights` on NaN or
        infinity."""
        part = self.model.get_submodule(prefix)
        for name in [name for name, parameter in part.named_parameters() if parameter.is_meta]:
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

    @torch.no_grad()
    def embed(self) -> Iterator[torch.Tensor]:
        """Hidden states in front of the first layer, float32 `[windows, window, hidden]`, batch by batch.

        Only the rows of the embedding that the windows use are read.
        """
        name = f"{self.family.embed}.weight"
        used, compact = torch.unique(torch.cat(self.batches), return_inverse=True)
        rows = SourceRows(self.source, name)
        taken = []
        for start in range(0, rows.shape[0], TABLE_ROWS):
            inside = used[(used >= start) & (used < start + TABLE_ROWS)] - start
            if inside.numel():
                taken.append(rows[start : min(start + TABLE_ROWS, rows.shape[0])][inside])
        values = torch.cat(taken)
        if not torch.isfinite(values).all():
            raise NonFiniteWeights(f"{name} holds NaN or infinity; the source model is damaged")
        table = self.set_rows(values)
        for batch in compact.split(self.batches[0].shape[0]):
            yield self._record(batch)
        _set_parameter(table, "weight", values.to("meta"))

    def set_rows(self, values: torch.Tensor) -> nn.Module:
        """Give the embedding some rows only, float32 `[n, hidden]`, and return it: its ids are now theirs."""
        table: Any = self.model.get_submodule(self.family.embed)
        # The number of the padding token means another row now; nothing here pads.
        table.padding_idx = None
        _set_parameter(table, "weight", values)
        return table

    def _record(self, batch: torch.Tensor) -> torch.Tensor:
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
        return first[0]

    def prepare(self) -> None:
        """Learn the layers' arguments when the hidden states come from files and `embed` was not run."""
        if not all(batch.shape[0] in self._kwargs for batch in self.batches):
            for _ in self.embed():
                pass

    @torch.no_grad()
    def run_layer(self, index: int, hidden: torch.Tensor, stop_at: nn.Module | None = None) -> torch.Tensor:
        """What layer `index` (which must be loaded) makes of a batch of hidden states float32
        `[windows, window, hidden]`; with `stop_at` the layer runs only up to that linear's input."""
        handle = None if stop_at is None else stop_at.register_forward_pre_hook(_stop)
        try:
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16),
                bfloat16_products(self.dtype),
            ):
                return self.call_layer(index, hidden)
        except _Enough:
            return hidden
        finally:
            if handle is not None:
                handle.remove()

    def call_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The layer as it stands, differentiable where its weights are.

        In bfloat16 it runs under autocast where `bfloat16_products` does not make it faster.
        """
        with torch.autocast("cpu", torch.bfloat16) if _takes_autocast(self.dtype) else nullcontext():
            result = self.layers[index](hidden, **self._kwargs[hidden.shape[0]][index])
        return result[0] if isinstance(result, tuple) else result


def _stop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    raise _Enough


def _set_parameter(part: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    part.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


@dataclass(frozen=True)
class InputAxes:
    """How a format sees an input: `signs` float32 `[K]` and `block` of its rotation (None and 1: none), and where it
    quantizes inputs, to `act_bits` in groups of `group`, with `center` after their mean is taken off."""

    signs: torch.Tensor | None
    block: int
    group: int = 0
    act_bits: int = 0
    center: bool = True

    def seen(self, x: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """Inputs float32 `[n, K]`, less `shift [K]`, on those axes and rounded as the format does."""
        if self.act_bits:
            signs = None if self.signs is None else pack_signs(self.signs)
            return quantized_inputs(x, signs, self.block, self.group, self.act_bits, shift)
        return x if self.signs is None else rotate(x, self.signs, self.block)


def full_precision() -> torch.autocast:
    """Inside, products are float32 whatever the layers around them compute in."""
    return torch.autocast("cpu", enabled=False)


def add_products(x: torch.Tensor, sums: torch.Tensor, dtype: torch.dtype) -> None:
    """Add X'X of `x` float32 `[T, K]` to `sums` float32 `[K, K]`, at least on and above the diagonal.

    With `dtype` bfloat16 the factors are rounded to that where it is faster: a linear under autocast rounds its input
    too, so a Hessian of rounded inputs is the true one.
    """
    native = load_native()
    if _takes_autocast(dtype) and native is not None and native.has_gram():
        native.add_gram(x.contiguous(), sums)
        return
    with bfloat16_products(dtype):
        for start in range(0, x.shape[1], PANEL):
            # The sum is symmetric, so only what lies on and right of the diagonal is computed.
            sums[start : start + PANEL, start:].addmm_(x[:, start : start + PANEL].T, x[:, start:])


class _Sums:
    """Running sums over one input."""

    def __init__(self, x: torch.Tensor, axes: InputAxes, dtype: torch.dtype, memory: torch.Tensor | None) -> None:
        size = x.shape[1]
        self.axes = axes
        self.dtype = dtype
        self.tokens = 0
        self.products = torch.zeros(size, size) if memory is None else memory.zero_()
        self.held = torch.empty(0, size)
        self.shift: torch.Tensor | None = None
        if axes.act_bits:
            # The mean of the first batch will do: whatever it is, the outputs' offset makes up for it.
            most = torch.finfo(torch.float16).max
            mean = x.mean(0) if axes.center else torch.zeros(size)
            self.shift = mean.clamp(-most, most).half().float()
            self.plain, self.quantized = torch.zeros(size), torch.zeros(size)

    def add(self, x: torch.Tensor) -> None:
        if self.shift is None:
            # Turning the sums is less work than turning the inputs.
            add_products(x, self.products, self.dtype)
            self.held = self.axes.seen(x[-HELD_TOKENS:], None).clone()
        else:
            seen = self.axes.seen(x, self.shift)
            self.plain += x.sum(0)
            self.quantized += seen.sum(0)
            add_products(seen, self.products, self.dtype)
            self.held = seen[-HELD_TOKENS:].clone()
        self.tokens += x.shape[0]

    def moment(self) -> torch.Tensor:
        """The second moment on the axes that the format sees, in the place of the sums."""
        total, size = self.products, self.products.shape[0]
        for start in range(0, size, PANEL):
            stop = min(start + PANEL, size)
            total[stop:, start:stop] = total[start:stop, stop:].T
            # One product gave both halves of a block on the diagonal, not always rounded the same.
            block = total[start:stop, start:stop]
            total[start:stop, start:stop] = block.triu() + block.triu(1).T
        total.div_(self.tokens)
        if self.shift is None and self.axes.signs is not None:
            rotate_moment(total, self.axes.signs, self.axes.block)
        return total


class InputCollector:
    """Sums what rounding wants to know over the inputs of chosen linears while a layer runs.

    The last inputs seen are kept as well, at most `HELD_TOKENS`.
    """

    def __init__(
        self,
        linears: Iterable[tuple[str, nn.Module]],
        axes: dict[str, InputAxes],
        dtype: torch.dtype = torch.float32,
        memory: dict[int, torch.Tensor] | None = None,
    ) -> None:
        """`axes` holds an entry for every key of `linears`; `dtype` is that of products (see `add_products`).

        Sums are made in `memory`, matrices `[K, K]` of earlier ones by K, where there is one; it is taken out.
        """
        self._dtype = dtype
        self._memory = {} if memory is None else memory
        self._axes = axes
        self._sums: dict[str, _Sums] = {}
        self._handles = [module.register_forward_pre_hook(self._hook(key)) for key, module in linears]

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def accumulate(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            if not x.shape[0]:
                return
            # Autocast, under which the layer runs, would rotate in bfloat16 and return that.
            with full_precision():
                if key not in self._sums:
                    memory = self._memory.pop(x.shape[1], None)
                    self._sums[key] = _Sums(x, self._axes[key], self._dtype, memory)
                self._sums[key].add(x)

        return accumulate

    def __enter__(self) -> InputCollector:
        return self

    def __exit__(self, *unused: object) -> None:
        for handle in self._handles:
            handle.remove()

    def tokens(self, key: str) -> int:
        return self._sums[key].tokens if key in self._sums else 0

    def take(self, key: str, size: int) -> InputStatistics:
        """The statistics of an input of `size` channels; may be called once.

        Inputs that no token reached (an expert that was never chosen) have the identity as second moment: a neutral
        prior, under which every weight counts the same.
        """
        sums = self._sums.pop(key, None)
        if sums is None:
            neutral = InputStatistics(torch.eye(size), 0, torch.empty(0, size))
            if not self._axes[key].act_bits:
                return neutral
            return replace(neutral, shift=torch.zeros(size), mean=torch.zeros(size), mean_quantized=torch.zeros(size))
        if sums.shift is None:
            return InputStatistics(sums.moment(), sums.tokens, sums.held)
        means = sums.plain / sums.tokens, sums.quantized / sums.tokens
        return InputStatistics(sums.moment(), sums.tokens, sums.held, sums.shift, *means)
