"""The trellis format: 2, 3 or 4 bits per weight, each weight decided by a sliding window of 12 bits.

Layout, encoder and decoder in pure torch; where the native extension is there it does the same work, bit for
bit and many times faster. Weights come in already rotated; files and models are somebody else's business.

Layout of `W [N, K]` with k bits and scale groups of G columns: rows go in groups of 16, the last one padded
with zero rows. Inside (row group, scale group) weight (r, c) is number `t = (c // 4) * 64 + r * 4 + c % 4` of
a little-endian bit stream of `2 k G` bytes; its own k bits stand at bit `k t`, its window is the 12 bits
`[k t + k - 12, k t + k)`, bits before the stream being 0. Counting from the oldest bit its value is
`(A[w0..3] + B[w4,5] + C[w6,7] + D[w8..11]) * scales[row, group] * scale`.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from importlib import resources

from fewbit.dtypes import name_of
from fewbit.errors import CorruptFile, NonFiniteWeights, UsageError
from fewbit.formats.base import EncodedGroup, GroupFormat, Layout, TensorSpec, register
from fewbit.formats.bits import pack_bits, unpack_bits
from fewbit.ops.extension import load_native
from fewbit.torch_later import torch

WINDOW = 12
TILE = 16  # rows of a row group, and columns between two steps of error feedback
STEPS = TILE * TILE
CHUNK = 64  # weights of 16 rows x 4 columns
LOOK = 32  # weights of the next tile that a search looks at
LEVELS_PER_UNIT = 256
UNREACHABLE = 65535
HEADROOM = 2.0**12  # the largest stored scale, so that error feedback may make groups 16 times larger
FP16_MAX = 65504.0
TINY = 1e-30  # scales and energies below this count as zero
TORCH_ROWS = 1024  # rows that the torch encoder takes at once; bounds its memory
MOST = 127
FIELDS = ((0, 4), (4, 2), (6, 2), (8, 4))  # first bit and number of bits of A, B, C, D


@functools.cache
def load_tables(bits: int) -> tuple[torch.Tensor, float]:
    """The shipped tables, int8 `[40]` (A 16, B 4, C 4, D 16), and the table units that make one sigma."""
    text = resources.files("fewbit.formats").joinpath("trellis_tables.json").read_text(encoding="utf-8")
    entry = json.loads(text)["bits"][str(bits)]
    return torch.tensor([*entry["A"], *entry["B"], *entry["C"], *entry["D"]], dtype=torch.int8), entry["unit"]


def check_tables(tables: torch.Tensor) -> None:
    """Raises `CorruptFile` for stored tables with a sum beyond the 8 bits that kernels multiply with."""
    parts = tables.int().split([1 << width for _, width in FIELDS])
    if sum(int(part.max()) for part in parts) > MOST or sum(int(part.min()) for part in parts) < -MOST:
        raise CorruptFile(f"trellis: sums of the tables exceed {MOST}; the file is damaged, fetch or quantize it again")


def window_values(tables: torch.Tensor) -> torch.Tensor:
    """The value of every window in table units, int32 `[4096]`, from `tables` int8 `[40]`."""
    window = torch.arange(1 << WINDOW, device=tables.device)
    total = torch.zeros(1 << WINDOW, dtype=torch.int32, device=tables.device)
    offset = 0
    for first, width in FIELDS:
        total += tables.int()[offset + ((window >> first) & ((1 << width) - 1))]
        offset += 1 << width
    return total


def state_levels(tables: torch.Tensor, bits: int) -> torch.Tensor:
    """Values by encoder state, int32 `[4096]`: a state holds the window's symbols with the newest lowest."""
    window = torch.arange(1 << WINDOW, device=tables.device)
    state = torch.zeros_like(window)
    for shift in range(0, WINDOW, bits):
        state = (state << bits) | ((window >> shift) & ((1 << bits) - 1))
    levels = torch.empty(1 << WINDOW, dtype=torch.int32, device=tables.device)
    levels[state] = window_values(tables)
    return levels


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """`[N, ...]` with zero rows up to a multiple of 16."""
    missing = -x.shape[0] % TILE
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def to_stream(x: torch.Tensor) -> torch.Tensor:
    """Weights `[16 T, C]` (C a multiple of 4) in the order of the bit stream, `[T, 16 C]`."""
    rows, cols = x.shape
    return x.reshape(rows // TILE, TILE, cols // 4, 4).transpose(1, 2).reshape(rows // TILE, TILE * cols)


def from_stream(stream: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_stream`: `[T, 16 C]` to `[16 T, C]`."""
    groups, steps = stream.shape
    return stream.reshape(groups, steps // CHUNK, TILE, 4).transpose(1, 2).reshape(groups * TILE, steps // TILE)


def unpack_windows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bit streams uint8 `[T, B]` to the windows of their weights, int64 `[T, 8 B / bits]`."""
    symbols = unpack_bits(codes, bits).long()
    windows = symbols << (WINDOW - bits)
    for back in range(1, WINDOW // bits):
        windows[:, back:] |= symbols[:, : symbols.shape[1] - back] << (WINDOW - bits * (back + 1))
    return windows


class Search:
    """The Viterbi search of many tiles at once: the specification that native code follows bit for bit.

    Costs are integers below 65536 with saturating addition, `d = (diff^2 + 2^14) >> 15` for a difference
    clamped to 16 bits; ties go to the older symbol's lowest value and, where a path ends, to the lowest
    context; after every fourth step the minimum is subtracted, 65535 (unreachable) staying as it is.
    """

    def __init__(self, levels: torch.Tensor, bits: int, states: torch.Tensor) -> None:
        """`levels` int32 `[4096]` by state in table units; `states` int64 `[T]` that the last tile left."""
        self.levels = levels * LEVELS_PER_UNIT
        self.bits = bits
        self.contexts = (1 << WINDOW) >> bits
        self.sources = torch.arange(1 << WINDOW, device=levels.device) >> bits
        first = torch.full((states.shape[0], self.contexts), UNREACHABLE, dtype=torch.int32, device=levels.device)
        first[torch.arange(states.shape[0], device=levels.device), states & (self.contexts - 1)] = 0
        self.costs = first
        self.choices: list[torch.Tensor] = []

    def advance(self, x: torch.Tensor) -> None:
        """Go on by the targets `x` int32 `[T, S]`, 256 to a table unit."""
        for target in x.unbind(1):
            diff = (target[:, None] - self.levels).clamp_(-32768, 32767)
            cost = self.costs[:, self.sources] + ((diff * diff + (1 << 14)) >> 15)
            cost = cost.clamp_(max=UNREACHABLE).view(x.shape[0], 1 << self.bits, self.contexts)
            choice = torch.zeros(x.shape[0], self.contexts, dtype=torch.uint8, device=x.device)
            best = cost[:, 0]
            for older in range(1, 1 << self.bits):
                better = cost[:, older] < best
                choice = torch.where(better, older, choice)
                best = torch.where(better, cost[:, older], best)
            self.choices.append(choice)
            if len(self.choices) % 4 == 0:
                best = torch.where(best == UNREACHABLE, best, best - best.min(1, keepdim=True).values)
            self.costs = best

    def trace(self) -> torch.Tensor:
        """Symbols int64 `[T, steps so far]` of the cheapest path."""
        context = _first_minimum(self.costs)
        symbols = []
        for choice in reversed(self.choices):
            symbols.append(context & ((1 << self.bits) - 1))
            older = choice.gather(1, context[:, None])[:, 0].long()
            context = older * (self.contexts >> self.bits) + (context >> self.bits)
        return torch.stack(symbols[::-1], 1)


def _first_minimum(costs: torch.Tensor) -> torch.Tensor:
    """Index of the first minimum of every row; `argmin` promises no order among ties."""
    position = torch.arange(costs.shape[1], device=costs.device)
    return torch.where(costs == costs.min(1, keepdim=True).values, position, costs.shape[1]).min(1).values


def follow(symbols: torch.Tensor, states: torch.Tensor, bits: int) -> torch.Tensor:
    """States int64 `[T, S]` that `symbols [T, S]` lead to from `states [T]`."""
    visited = []
    for symbol in symbols.unbind(1):
        states = ((states << bits) | symbol) & ((1 << WINDOW) - 1)
        visited.append(states)
    return torch.stack(visited, 1)


def solve_tile(difference: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`E [N, 16]` with `E factor = difference`, rounded operation by operation in the native order."""
    error = difference.clone()
    for j in range(error.shape[1]):
        for i in range(j):
            error[:, j] -= error[:, i] * factor[i, j]
        error[:, j] /= factor[j, j]
    return error


def feed_back(rest: torch.Tensor, error: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`rest - error @ factor`, rounded operation by operation in the native order."""
    for i in range(error.shape[1]):
        rest = rest - error[:, i : i + 1] * factor[i]
    return rest


def to_fixed(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Targets of the search, int32, from weights `[N, C]` and `inverse [N]` = 256 / scale."""
    return (x * inverse[:, None]).clamp(-32767.0, 32767.0).round().int()


@dataclass(frozen=True)
class GroupJob:
    """One padded scale group: `weight [16 T, G]`, `scale` and `inverse` `[16 T]`, `factor [G, G]` or None."""

    weight: torch.Tensor
    scale: torch.Tensor
    inverse: torch.Tensor
    factor: torch.Tensor | None
    levels: torch.Tensor
    bits: int


def _tile_values(job: GroupJob, symbols: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[16 T, 16]` of a tile's symbols and the states that they end in."""
    visited = follow(symbols[:, :STEPS], states, job.bits)
    return from_stream(job.levels[visited].float()) * job.scale[:, None], visited[:, -1]


def encode_torch(job: GroupJob) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 `[T, 2 k G]`, values and errors float32 `[16 T, G]` (errors 0 without a factor)."""
    rest = job.weight.clone()
    values, errors = torch.zeros_like(rest), torch.zeros_like(rest)
    group = rest.shape[1]
    states = torch.zeros(rest.shape[0] // TILE, dtype=torch.int64, device=rest.device)
    codes = []
    for first in range(0, group, TILE):
        end = first + TILE
        search = Search(job.levels, job.bits, states)
        search.advance(to_stream(to_fixed(rest[:, first:end], job.inverse)))
        if end < group:
            ahead = rest[:, end : end + 4]
            if job.factor is not None:
                found, _ = _tile_values(job, search.trace(), states)
                error = solve_tile(rest[:, first:end] - found, job.factor[first:end, first:end])
                ahead = feed_back(ahead, error, job.factor[first:end, end : end + 4])
            search.advance(to_stream(to_fixed(ahead, job.inverse))[:, :LOOK])
        symbols = search.trace()[:, :STEPS]
        codes.append(pack_bits(symbols, job.bits))
        values[:, first:end], states = _tile_values(job, symbols, states)
        if job.factor is not None:
            difference = rest[:, first:end] - values[:, first:end]
            errors[:, first:end] = eliminate_tile(rest, difference, first, job.factor)
    return torch.cat(codes, 1), values, errors


def eliminate_tile(rest: torch.Tensor, difference: torch.Tensor, first: int, factor: torch.Tensor) -> torch.Tensor:
    """Solve one tile and take it from the columns of `rest [N, G]` still to come, in place."""
    end = first + TILE
    error = solve_tile(difference, factor[first:end, first:end])
    rest[:, end:] = feed_back(rest[:, end:], error, factor[first:end, end:])
    return error


def weigh_torch(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`F [N, G]` with `F factor = values`."""
    rest = values.clone()
    columns = range(0, rest.shape[1], TILE)
    return torch.cat([eliminate_tile(rest, rest[:, first : first + TILE], first, factor) for first in columns], 1)


def dequantize_torch(
    codes: torch.Tensor, scales: torch.Tensor, tables: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    """Codes `[T, 2 k K]` and full scales float32 `[N, K / G]` to weights float32 `[N, K]`, on any device."""
    groups = scales.shape[1]
    streams = codes.reshape(codes.shape[0] * groups, 2 * bits * group)
    levels = window_values(tables).float()[unpack_windows(streams, bits)]
    levels = levels.view(codes.shape[0], groups, group // 4, TILE, 4).permute(0, 3, 1, 2, 4)
    levels = levels.reshape(codes.shape[0] * TILE, groups, group)[: scales.shape[0]]
    return (levels * scales[..., None]).reshape(scales.shape[0], groups * group)


@register
class TrellisFormat(GroupFormat):
    """Trellis-coded weights; parts are `codes`, `scales`, `scale` and `tables`.

    A group's scale is first its RMS over the table units per sigma, measured when the group is encoded (so
    what error feedback has added is in it) and rounded to fp16: the search works against what is stored.
    With the codes fixed the scale is then refitted: of all scales it is the one with the least squared error,
    with a factor the least `|E|^2`, which is the output error that remains once later columns compensate.
    On random weights with and without correlated inputs that lowers the output error by 0.4 to 0.8 % at
    every bit width and costs no bits.
    """

    name = "trellis"
    bits = (2, 3, 4)

    def layout(self, spec: TensorSpec) -> Layout:
        return {
            "codes": ((-(-spec.rows // TILE), 2 * spec.bits * spec.cols), "U8"),
            "scales": ((spec.rows, spec.groups), "F16"),
            "scale": ((1,), "F32"),
            "tables": ((40,), "I8"),
        }

    def tensor_scale(self, weight: torch.Tensor, spec: TensorSpec) -> float:
        """The fp32 factor that puts the largest group scale at 2^12 in fp16 (1 for an all-zero matrix)."""
        _, unit = load_tables(spec.bits)
        rms = weight.float().view(spec.rows, spec.groups, spec.group).square().mean(-1).sqrt()
        largest = rms.max().item() / unit
        if not math.isfinite(largest):
            raise NonFiniteWeights(
                "trellis: the weights hold NaN, infinity or what is too large to be squared; check the model"
            )
        return torch.tensor(largest / HEADROOM, dtype=torch.float32).item() or 1.0

    def encode_group(
        self, weight: torch.Tensor, spec: TensorSpec, tensor_scale: float, factor: torch.Tensor | None
    ) -> EncodedGroup:
        if weight.shape != (spec.rows, spec.group):
            raise UsageError(f"trellis: a group must be [{spec.rows}, {spec.group}], not {list(weight.shape)}")
        if not torch.isfinite(weight).all():
            raise NonFiniteWeights("trellis: the weights hold NaN or infinity; check the model or skip this tensor")
        tables, unit = load_tables(spec.bits)
        weight = weight.detach().float().contiguous()
        if factor is not None:
            factor = factor.detach().float().contiguous()
            if factor.shape != (spec.group, spec.group) or not (factor.diagonal() > 0).all():
                raise UsageError(f"trellis: the factor must be [{spec.group}, {spec.group}] with a positive diagonal")
        shared = torch.tensor(tensor_scale, dtype=torch.float32)
        scales = (weight.square().mean(1).sqrt() / (unit * shared)).clamp(max=FP16_MAX).half()
        full = scales.float() * shared
        codes, values, error, weighted = _encode(weight, full, factor, tables, spec.bits)
        # E + (1 - a) F is the error with a times the scale; without a factor E = W - V and F = V.
        refit = 1 + (error * weighted).sum(1) / weighted.square().sum(1).clamp_min(TINY)
        scales = (scales.float() * refit).clamp(max=FP16_MAX).half()
        refitted = scales.float() * shared
        levels = (values / full.clamp_min(TINY)[:, None]).round()
        values = levels * refitted[:, None]
        if factor is None:
            return EncodedGroup({"codes": codes, "scales": scales[:, None]}, values, None)
        error = error + (1 - refitted / full.clamp_min(TINY))[:, None] * weighted
        return EncodedGroup({"codes": codes, "scales": scales[:, None]}, values, error)

    def assemble(self, groups: list[EncodedGroup], spec: TensorSpec, tensor_scale: float) -> dict[str, torch.Tensor]:
        return {
            "codes": torch.cat([group.parts["codes"] for group in groups], 1),
            "scales": torch.cat([group.parts["scales"] for group in groups], 1),
            "scale": torch.tensor([tensor_scale], dtype=torch.float32),
            "tables": load_tables(spec.bits)[0].clone(),
        }

    def dequantize(self, parts: dict[str, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
        for part, (shape, dtype) in self.layout(spec).items():
            found = parts[part]
            if tuple(found.shape) != shape or name_of(found.dtype) != dtype:
                raise CorruptFile(
                    f"trellis: {part} must be {dtype} {list(shape)}, not {name_of(found.dtype)} {list(found.shape)}; "
                    "the file does not match its plan, fetch or quantize it again"
                )
        # Elsewhere a look at the values would wait for the device, which no graph may record.
        if parts["tables"].device.type == "cpu":
            check_tables(parts["tables"])
        codes, tables = parts["codes"].contiguous(), parts["tables"].contiguous()
        scales = (parts["scales"].float() * parts["scale"]).contiguous()
        native = load_native() if codes.device.type == "cpu" else None
        if native is None:
            return dequantize_torch(codes, scales, tables, spec.bits, spec.group)
        out = torch.empty(spec.rows, spec.cols)
        native.trellis_dequantize(codes, scales, tables, spec.bits, spec.group, out)
        return out

    def dequantize_rows(self, parts: dict[str, torch.Tensor], spec: TensorSpec, rows: torch.Tensor) -> torch.Tensor:
        # Rows are decoded with their row groups, each as if it were a matrix of 16 rows.
        if not 0 < TILE * rows.numel() < spec.rows:
            return super().dequantize_rows(parts, spec, rows)
        scales = parts["scales"][rows].repeat_interleave(TILE, 0)
        taken = {**parts, "codes": parts["codes"][rows // TILE], "scales": scales}
        values = self.dequantize(taken, replace(spec, rows=TILE * rows.numel())).view(rows.numel(), TILE, spec.cols)
        return values[torch.arange(rows.numel(), device=rows.device), rows % TILE]


def _encode(
    weight: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor | None, tables: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, values, E and F of one scale group against `scale [N]`, by native code where it is there."""
    rows, group = weight.shape
    inverse = torch.where(scale > TINY, LEVELS_PER_UNIT / scale, torch.zeros_like(scale))
    native = load_native() if weight.device.type == "cpu" else None
    if native is None:
        levels = state_levels(tables.to(weight.device), bits)
        blocks = zip(*(pad_rows(x).split(TORCH_ROWS) for x in (weight, scale, inverse)), strict=True)
        found = [encode_torch(GroupJob(w, s, i, factor, levels, bits)) for w, s, i in blocks]
        codes, values, error = (torch.cat(parts) for parts in zip(*found, strict=True))
        values, error = values[:rows], error[:rows]
        if factor is None:
            return codes, values, weight - values, values
        return codes, values, error, weigh_torch(values, factor)
    codes = torch.empty(-(-rows // TILE), 2 * bits * group, dtype=torch.uint8)
    values = torch.empty_like(weight)
    if factor is None:
        native.trellis_encode_group(weight, scale, inverse, tables, bits, None, codes, values, None, None)
        return codes, values, weight - values, values
    error, weighted = torch.empty_like(weight), torch.empty_like(weight)
    native.trellis_encode_group(weight, scale, inverse, tables, bits, factor, codes, values, error, weighted)
    return codes, values, error, weighted
