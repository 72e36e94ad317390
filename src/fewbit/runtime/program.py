"""Lowers a model to a list of native steps over buffers that exist before the first token.

Python runs once per model here and never per layer again: native code executes all steps of a forward. The names of
weights are the family's; which steps a layer gets depends on which weights there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from fewbit.dtypes import to_bfloat16
from fewbit.errors import CannotLower, CorruptFile, UsageError
from fewbit.models import OUTPUT_ROTATION, Family, get_family
from fewbit.runtime.architecture import Architecture, describe
from fewbit.runtime.rotary import rotary_tables
from fewbit.runtime.weights import Dense, Linear, Packed, Weights

LOGITS = -1  # the buffer that a forward's caller owns


@dataclass(frozen=True)
class Sizes:
    """What a program's buffers and cache are made for; `threads` 0 is as many as there are cores."""

    slots: int
    context: int
    block: int
    threads: int
    kv: str


@dataclass(frozen=True)
class _Norm:
    """An RMSNorm in front of linears."""

    weight: np.ndarray
    eps: float


@dataclass(frozen=True)
class _Gate:
    """A gated activation in front of linears: the buffer of the other factor."""

    up: int
    activation: str


class Lowering:
    """Builds the program of one model."""

    def __init__(self, native: ModuleType, weights: Weights, sizes: Sizes) -> None:
        """Raises `CannotLower` for a model that has no native steps."""
        self.weights = weights
        self.shape: Architecture = describe(weights.config)
        self.family: Family = get_family(weights.config.model_type)
        self.sizes = sizes
        shape = self.shape
        self._check_shapes()
        self.program: Any = native.Program(
            block=sizes.block,
            slots=sizes.slots,
            context=sizes.context,
            layers=shape.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            dim=shape.head_dim,
            cache=sizes.kv,
            vocabulary=shape.vocabulary,
            threads=sizes.threads,
        )
        self._buffers: dict[str, int] = {}
        self._rotary = {
            kind: rotary_tables(weights.config, kind, shape.head_dim, sizes.context) for kind, _ in set(shape.kinds)
        }

    def _check_shapes(self) -> None:
        """Raises `CorruptFile` where the sizes that buffers and cache are made for are not those of the weights."""
        shape, embed, attention = self.shape, self.family.embed, f"{self.family.layers}.0.self_attn"
        for module, wanted in (
            # A table may have more rows than there are tokens.
            (embed, (max(shape.vocabulary, self.weights.shape(embed)[0]), shape.hidden)),
            (f"{attention}.k_proj", (shape.kv_heads * shape.head_dim, shape.hidden)),
            (f"{attention}.o_proj", (shape.hidden, shape.heads * shape.head_dim)),
        ):
            found = self.weights.shape(module)
            if found != wanted:
                raise CorruptFile(
                    f"{module} is {list(found)}, the configuration says {list(wanted)}; copy config.json from the model"
                )

    def build(self) -> Any:
        """The finished program."""
        x = self._buffer("x", self.shape.hidden)
        self._embed(x)
        for layer in range(self.shape.layers):
            self._attention(layer, x)
            self._feed_forward(layer, x)
        self._head(x)
        return self.program

    def _buffer(self, name: str, cols: int) -> int:
        """A buffer of that name and width, the same one every time."""
        key = f"{name} {cols}"
        if key not in self._buffers:
            self._buffers[key] = self.program.buffer(cols)
        return self._buffers[key]

    def _embed(self, x: int) -> None:
        table = self.weights.linear(self.family.embed)
        scale = self.shape.embedding_scale
        if isinstance(table, Dense):
            self.program.embed_dense(table.panels, table.rows, scale, x)
            return
        if table.inputs.shift is not None:
            raise CannotLower("an embedding in twinquant has no native step")
        self.program.embed_packed(table.matrix, table.inputs.signs, table.inputs.block, scale, x)

    def _gain(self, name: str) -> np.ndarray:
        return self.weights.vector(f"{name}.weight") + np.float32(self.shape.norm_offset)

    def _maybe_gain(self, name: str) -> np.ndarray | None:
        return self._gain(name) if self.weights.has(f"{name}.weight") else None

    def _attention(self, layer: int, x: int) -> None:
        prefix = f"{self.family.layers}.{layer}"
        shape, attention = self.shape, f"{prefix}.self_attn"
        widths = (shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2)
        q, k, v = (self._buffer(name, width) for name, width in zip("qkv", widths, strict=True))
        norm = _Norm(self._gain(f"{prefix}.input_layernorm"), shape.eps)
        self._linears(x, norm, [f"{attention}.{name}_proj" for name in "qkv"], [q, k, v])
        kind, window = shape.kinds[layer]
        cosines, sines = self._rotary[kind]
        q_norm, k_norm = self._maybe_gain(f"{attention}.q_norm"), self._maybe_gain(f"{attention}.k_norm")
        self.program.rope(layer, q, k, v, q_norm, k_norm, shape.eps, shape.query_scale, cosines, sines)
        heads = self._buffer("heads", widths[0])
        self.program.attention(layer, q, heads, window)
        y = self._buffer("y", shape.hidden)
        self._linears(heads, None, [f"{attention}.o_proj"], [y])
        behind = f"{prefix}.post_attention_layernorm"
        self._add(x, y, behind if self._sandwiched(prefix) else None)

    def _sandwiched(self, prefix: str) -> bool:
        """Whether a layer has norms behind its blocks as well as before them."""
        return self.weights.has(f"{prefix}.pre_feedforward_layernorm.weight")

    def _feed_forward(self, layer: int, x: int) -> None:
        prefix = f"{self.family.layers}.{layer}"
        sandwiched = self._sandwiched(prefix)
        before = "pre_feedforward_layernorm" if sandwiched else "post_attention_layernorm"
        norm = _Norm(self._gain(f"{prefix}.{before}"), self.shape.eps)
        y = self._buffer("y", self.shape.hidden)
        if self.weights.has(f"{prefix}.mlp.gate.weight"):
            self._experts(f"{prefix}.mlp", x, norm, y)
        else:
            self._gated(f"{prefix}.mlp", x, norm, y)
        self._add(x, y, f"{prefix}.post_feedforward_layernorm" if sandwiched else None)

    def _gated(self, module: str, x: int, norm: _Norm | None, out: int) -> None:
        """A gated feed-forward network."""
        names = [f"{module}.{name}_proj" for name in ("gate", "up")]
        width = self.weights.linear(names[0]).rows
        gate, up = self._buffer("gate", width), self._buffer("up", width)
        self._linears(x, norm, names, [gate, up])
        self._linears(gate, _Gate(up, self.shape.activation), [f"{module}.down_proj"], [out])

    def _experts(self, module: str, x: int, norm: _Norm, y: int) -> None:
        """A router and its experts."""
        hidden = self.shape.hidden
        router = self.weights.linear(f"{module}.gate")
        if not isinstance(router, Dense):
            raise CannotLower(f"{module}.gate: a packed router has no native step")
        normed, logits = self._buffer("normed", hidden), self._buffer("router", router.rows)
        gathered, result = self._buffer("gathered", hidden), self._buffer("result", hidden)
        self.program.norm(x, norm.weight, norm.eps, normed, False)
        self._dense_step(normed, [(router, logits)])
        shape = self.shape
        self.program.experts(normed, logits, gathered, result, y, shape.experts_per_token, shape.normalized_experts)
        for expert in range(router.rows):
            self.program.expert(expert)
            self._gated(f"{module}.experts.{expert}", gathered, None, result)
        self.program.expert(None)

    def _add(self, x: int, y: int, norm: str | None) -> None:
        if norm is None:
            self.program.add(x, y)
        else:
            self.program.norm(y, self._gain(norm), self.shape.eps, x, True)

    def _head(self, x: int) -> None:
        shape, final = self.shape, self.family.final_norm
        wanted = self._buffer("wanted", shape.hidden)
        self.program.select(x, wanted)
        norm = _Norm(self._gain(final), shape.eps)
        tied = bool(self.weights.config.tie_word_embeddings) and not self.weights.has_linear(self.family.head)
        head = self.family.embed if tied else self.family.head
        rotation = f"{final}.{OUTPUT_ROTATION}"
        if not self.weights.has(rotation):
            self._linears(wanted, norm, [head], [LOGITS])
            return
        normed, turned = self._buffer("normed", shape.hidden), self._buffer("turned", shape.hidden)
        self.program.norm(wanted, norm.weight, norm.eps, normed, False)
        matrix = self.weights.dense(to_bfloat16(self.weights.vector(rotation), "F32").T, None)
        self._dense_step(normed, [(matrix, turned)])
        self._linears(turned, None, [head], [LOGITS])

    def _linears(self, x: int, before: _Norm | _Gate | None, names: list[str], outs: list[int]) -> None:
        """Steps for linears that read the same inputs, those that are quantized alike together."""
        groups: list[list[tuple[Linear, int]]] = []
        for name, out in zip(names, outs, strict=True):
            linear = self.weights.linear(name)
            for group in groups:
                if _alike(group[0][0], linear):
                    group.append((linear, out))
                    break
            else:
                groups.append([(linear, out)])
        # Dense products come last: a gate is computed in place for them.
        for group in sorted(groups, key=lambda group: isinstance(group[0][0], Dense)):
            if isinstance(group[0][0], Dense):
                self._dense(x, before, group)
            else:
                self._packed(x, before, group)

    def _dense(self, x: int, before: _Norm | _Gate | None, group: list[tuple[Linear, int]]) -> None:
        if isinstance(before, _Norm):
            normed = self._buffer("normed", before.weight.shape[0])
            self.program.norm(x, before.weight, before.eps, normed, False)
            x = normed
        elif before is not None:
            self.program.gate(x, before.up, before.activation, x)
        self._dense_step(x, [(linear, out) for linear, out in group if isinstance(linear, Dense)])

    def _dense_step(self, x: int, group: list[tuple[Dense, int]]) -> None:
        matrices = [matrix for matrix, _ in group]
        panels, rows = [matrix.panels for matrix in matrices], [matrix.rows for matrix in matrices]
        self.program.dense_linears(x, panels, rows, [matrix.bias for matrix in matrices], [out for _, out in group])

    def _packed(self, x: int, before: _Norm | _Gate | None, group: list[tuple[Linear, int]]) -> None:
        packed = [linear for linear, _ in group if isinstance(linear, Packed)]
        outs = [out for _, out in group]
        inputs = packed[0].inputs
        self.program.set_inputs(x, inputs.block, inputs.group, inputs.act_bits, inputs.signs, inputs.shift)
        if isinstance(before, _Norm):
            self.program.after_norm(before.weight, before.eps)
        elif before is not None:
            self.program.after_gate(before.up, before.activation)
        if packed[0].down is None:
            self.program.linears([linear.matrix for linear in packed], outs)
        else:
            self.program.twin_linears([linear.down for linear in packed], [linear.matrix for linear in packed], outs)


def _alike(a: Linear, b: Linear) -> bool:
    """Whether one step serves both matrices."""
    if isinstance(a, Packed) and isinstance(b, Packed):
        return (a.down is None) == (b.down is None) and a.inputs.same(b.inputs)
    return isinstance(a, Dense) and isinstance(b, Dense)


def check_sizes(sizes: Sizes, max_positions: int) -> None:
    """Raises `UsageError` for a context that the model does not have, and for sizes that are not positive."""
    if min(sizes.slots, sizes.context, sizes.block) < 1:
        raise UsageError("slots, context and block must be at least 1")
    if sizes.context > max_positions:
        raise UsageError(f"a context of {sizes.context} exceeds the model's {max_positions} positions")
