"""Measures a decoder: prompts of some lengths, then single tokens of one or several sequences together.

What is timed is what an answer takes: forwards, and for decoding the choice of the likeliest token, too. Tokenizing and
the scheduler are left out.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fewbit.checkpoint.artifact import Artifact, is_artifact
from fewbit.environment import cpu_name
from fewbit.errors import UsageError
from fewbit.ops.extension import load_native
from fewbit.runtime.batch import Batch
from fewbit.runtime.decoder import Decoder, NativeDecoder, open_decoder
from fewbit.runtime.engine import check_threads
from fewbit.runtime.sampling import SamplingParams, sample_rows

_LEAD = 16  # tokens of the prompt that decoding is measured behind
_READ_BYTES = 256_000_000
_PASS_SECONDS = 0.05  # of a pass over registers, at least: beside that, waking threads takes no time
_PASSES = 8
_GREEDY = SamplingParams()
USUAL_BLOCK = 256


@dataclass(frozen=True)
class BenchSettings:
    """Prompt lengths, numbers of sequences that decode together, tokens each of them decodes, and repetitions."""

    prompt_tokens: tuple[int, ...] = (128, 512)
    batches: tuple[int, ...] = (1,)
    gen_tokens: int = 64
    repeats: int = 3

    def __post_init__(self) -> None:
        for name, values, high in (
            ("--prompt-tokens", self.prompt_tokens, 1_000_000),
            ("--batch", self.batches, 256),
            ("--gen-tokens", (self.gen_tokens,), 1_000_000),
            ("--repeats", (self.repeats,), 100),
        ):
            for value in values:
                if not 1 <= value <= high:
                    raise UsageError(f"{name} must be between 1 and {high}, not {value}")

    @property
    def context(self) -> int:
        """Positions that the longest measurement needs."""
        return max(*self.prompt_tokens, _LEAD + self.gen_tokens, 1)


def run_bench(
    path: str | Path, settings: BenchSettings, threads: int | None, kv: str, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """What `fewbit bench --json` prints about the model at `path`.

    `bandwidth_share` is the part of the memory's speed that decoding reads weights at, and `arithmetic_share` the part
    of the processor's speed at products of 8-bit integers that the longest prompt multiplies packed weights at. Both
    speeds are measured in the same run with the same threads. What cannot be known is None: speeds without native code,
    and operations where packed weights do not meet native steps. `progress` takes (done, total) measurements.
    """
    check_threads(threads)
    weight_bytes = bytes_per_token(path)
    slots = max(settings.batches)
    decoder, _ = open_decoder(
        path, slots=slots, context=settings.context, block=max(USUAL_BLOCK, slots), threads=threads, kv=kv
    )
    with _threads(threads) as used:
        try:
            report = bench(decoder, settings, progress)
        finally:
            decoder.close()
        bandwidth, arithmetic = read_bandwidth(), product_speed()
    native = load_native() if isinstance(decoder, NativeDecoder) else None
    operations = packed_operations(path) if native else None
    return {
        "model": str(path),
        **report,
        "threads": used,
        "isa": native.isa() if native else "torch",
        "kv": kv if native else "bf16",
        "cpu": cpu_name(),
        "weight_bytes_per_token": weight_bytes,
        "read_bytes_per_second": round(bandwidth),
        "bandwidth_share": bandwidth_share(report["decode"], weight_bytes, bandwidth),
        "operations_per_token": operations.token if operations else None,
        "operations_per_logits": operations.logits if operations else None,
        "operations_per_second": round(arithmetic) if arithmetic else None,
        "arithmetic_share": arithmetic_share(report["prefill"], operations, arithmetic),
    }


def bench(decoder: Decoder, settings: BenchSettings, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """`prefill` and `decode`: tokens per second, of all sequences together, with their standard deviation over the
    repetitions, and the `settings`."""
    total = len(settings.prompt_tokens) + len(settings.batches)
    progress(0, total)
    _prompt(decoder, 0, min(8, decoder.context))
    prefill, decode = [], []
    for length in settings.prompt_tokens:
        rates = [length / _timed(partial(_prompt, decoder, 0, length)) for _ in range(settings.repeats)]
        prefill.append({"prompt_tokens": length, **_mean(rates)})
        progress(len(prefill), total)
    for batch in settings.batches:
        rates = [_decoding_rate(decoder, batch, settings.gen_tokens) for _ in range(settings.repeats)]
        decode.append({"batch": batch, **_mean(rates)})
        progress(len(prefill) + len(decode), total)
    return {"prefill": prefill, "decode": decode, "settings": asdict(settings)}


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _mean(rates: list[float]) -> dict[str, float]:
    spread = statistics.stdev(rates) if len(rates) > 1 else 0.0
    return {"tokens_per_second": round(statistics.mean(rates), 3), "stdev": round(spread, 3)}


def _ints(values: Any) -> np.ndarray:
    return np.array(list(values), dtype=np.int32)


def _prompt(decoder: Decoder, slot: int, length: int) -> int:
    """Run a prompt of arbitrary tokens; the likeliest next token."""
    tokens = np.random.default_rng(0).integers(decoder.vocabulary, size=length, dtype=np.int32)
    token = 0
    for start in range(0, length, decoder.block):
        stop = min(length, start + decoder.block)
        wanted = [stop - start - 1] if stop == length else []
        batch = Batch(tokens[start:stop], _ints(range(start, stop)), _ints([slot] * (stop - start)), _ints(wanted))
        logits = decoder.forward(batch)
        if wanted:
            (token,) = sample_rows(logits, [_GREEDY], [()], [0.0])
    return token


def _decoding_rate(decoder: Decoder, batch: int, count: int) -> float:
    """Tokens per second over all of `batch` sequences, `count` tokens each."""
    tokens = [_prompt(decoder, slot, _LEAD) for slot in range(batch)]
    slots = _ints(range(batch))

    def decode() -> None:
        nonlocal tokens
        for step in range(count):
            logits = decoder.forward(Batch(_ints(tokens), _ints([_LEAD + step] * batch), slots, slots))
            tokens = sample_rows(logits, [_GREEDY] * batch, [()] * batch, [0.0] * batch)

    return batch * count / _timed(decode)


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Inside, native code outside of programs uses `count` threads, too; gives their number."""
    native = load_native()
    if native is None:
        import torch

        yield torch.get_num_threads()
        return
    before = native.num_threads()
    native.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        native.set_num_threads(before)


def read_bandwidth() -> float:
    """Bytes per second that so many threads read from memory, the best of several passes; 0 without native code."""
    native = load_native()
    if native is None:
        return 0.0
    buffer = native.huge_bytes(_READ_BYTES)
    buffer.fill(1)
    return _READ_BYTES / min(_timed(lambda: native.read_bytes(buffer)) for _ in range(_PASSES))


def product_speed() -> float:
    """Operations per second of so many threads with the instructions that native products multiply 8-bit integers by,
    on registers, the best of several passes; a multiplication and its addition are two. 0 without native code."""
    native = load_native()
    if native is None:
        return 0.0
    wanted = 1 << 24
    while _timed(partial(native.multiply_registers, wanted)) < _PASS_SECONDS:
        wanted *= 2

    def speed() -> float:
        started = time.perf_counter()
        done: int = native.multiply_registers(wanted)
        return done / (time.perf_counter() - started)

    return max(speed() for _ in range(_PASSES))


def bytes_per_token(path: str | Path) -> int:
    """Bytes of weights that one forward reads for a single token: all but a table that only looks a row up, and of a
    mixture's experts as many as a token is sent to."""
    if is_artifact(Path(path)):
        artifact = Artifact.open(path)
        config = artifact.config
        sizes = {entry["name"]: entry["bytes"] for entry in artifact.record["tensors"]}
        tied = any(name.startswith("lm_head") for name in sizes) is False
    else:
        from fewbit.checkpoint.source import open_source

        source = open_source(path)
        config = source.config.to_dict()
        sizes = {name: 2 * math.prod(source.shape(name)) for name in source.names()}
        tied = source.tied_embeddings
    total = 0.0
    for name, size in sizes.items():
        if tied or not name.endswith("embed_tokens.weight"):
            total += size * _use(name, config)
    return round(total)


def _use(name: str, config: dict[str, Any]) -> float:
    """The part of the tokens that a tensor serves: of a mixture's experts, those that are sent to one."""
    experts = config.get("num_experts") or config.get("num_local_experts") or 1
    return min(1.0, (config.get("num_experts_per_tok") or 1) / experts) if ".experts." in name else 1.0


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions of 8-bit integers that the packed weights of a model take: for every `token` in its
    layers, and for every token's `logits`, of which a prompt wants its last one's."""

    token: int
    logits: int


def packed_operations(path: str | Path) -> Operations | None:
    """Two operations for each weight of the packed matrices, low-rank branches included, and of a mixture's experts as
    many as a token is sent to. What is kept in 16 bits and attention itself are products of floats and do not count.

    None for a model that is not packed.
    """
    if not is_artifact(Path(path)):
        return None
    artifact = Artifact.open(path)
    tied = all(entry["kind"] != "head" for entry in artifact.record["tensors"])
    head = "embed" if tied else "head"
    token = logits = 0.0
    for name, module in artifact.modules.items():
        spec = module.spec
        count = 2 * (spec.rows * spec.cols + spec.rank * (spec.rows + spec.cols)) * _use(name, artifact.config)
        token += count if module.kind == "body" else 0
        logits += count if module.kind == head else 0
    return Operations(round(token), round(logits))


def bandwidth_share(decode: list[dict[str, Any]], weight_bytes: int, bandwidth: float) -> float | None:
    """Part of the memory's speed that decoding reads weights at: of the smallest batch, whose steps read them once."""
    if not bandwidth or not decode:
        return None
    least = min(decode, key=lambda entry: entry["batch"])
    return round(least["tokens_per_second"] / least["batch"] * weight_bytes / bandwidth, 4)


def arithmetic_share(prefill: list[dict[str, Any]], operations: Operations | None, speed: float) -> float | None:
    """Part of the processor's `speed` at products, in operations per second, that the longest prompt multiplies at."""
    if not speed or not operations or not prefill:
        return None
    longest = max(prefill, key=lambda entry: entry["prompt_tokens"])
    per_token = operations.token + operations.logits / longest["prompt_tokens"]
    return round(longest["tokens_per_second"] * per_token / speed, 4)
