"""Decoders: what they offer, the one that runs native programs, and how a model's decoder is opened.

A decoder holds a model and a cache of keys and values in slots, one sequence each. Positions are the caller's: a token
at (slot, p) writes its key and value at p and sees positions 0 to p of its slot, so that writing again at a lower
position is all it takes to drop tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fewbit.checkpoint.damage import damage_named, is_size, read_object, shortened
from fewbit.errors import CannotLower, CorruptFile, EngineError, UsageError
from fewbit.ops.extension import load_native
from fewbit.runtime.batch import Batch

KV_TYPES = ("bf16", "int8", "float32")
USUAL_CONTEXT = 4096
REMEDY = "its configuration and its tensors do not make a model; copy it again"


class Decoder(Protocol):
    """A model with a cache of `slots` sequences of up to `context` positions.

    `block` is the most tokens of one forward, `vocabulary` the width of the logits and `eos` what ends a text.
    A token's result does not depend on what else is in its batch.
    """

    vocabulary: int
    context: int
    slots: int
    block: int
    eos: tuple[int, ...]

    def forward(self, batch: Batch) -> np.ndarray:
        """Logits float32 `[W, vocabulary]` of the wanted tokens, valid until the next forward."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot's cache to another's."""

    def close(self) -> None:
        """Free the weights and the cache."""


class NativeDecoder:
    """A decoder that runs a program of native steps."""

    def __init__(self, program: Any, *, vocabulary: int, context: int, slots: int, block: int, eos: tuple[int, ...]):
        self._program = program
        self.vocabulary = vocabulary
        self.context = context
        self.slots = slots
        self.block = block
        self.eos = eos
        self._logits = np.empty((1, vocabulary), np.float32)
        self._running = threading.Lock()

    def forward(self, batch: Batch) -> np.ndarray:
        """See `Decoder.forward`; `ValueError` for tokens, positions or slots that there are not, `EngineError` while
        another thread is in here."""
        with self._alone() as program:
            wanted = batch.wanted.size
            if wanted > self._logits.shape[0]:
                self._logits = np.empty((wanted, self.vocabulary), np.float32)
            logits = self._logits[:wanted]
            program.run(batch.tokens, batch.positions, batch.slots, batch.wanted, logits)
            return logits

    @contextmanager
    def _alone(self) -> Iterator[Any]:
        """The program, for one thread: its buffers are there once. Others are refused, not kept waiting, because the
        logits that they would wait for overwrite those that the first one still reads."""
        if not self._running.acquire(blocking=False):
            raise EngineError("a decoder serves one thread at a time; any number of threads may ask an Engine")
        try:
            yield self._open_program()
        finally:
            self._running.release()

    def _open_program(self) -> Any:
        if self._program is None:
            raise UsageError("the decoder is closed; open the model again")
        return self._program

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Decoder.copy`; `ValueError` for slots and lengths that there are not."""
        with self._alone() as program:
            program.copy(source, target, length)

    def close(self) -> None:
        """See `Decoder.close`."""
        self._program = None


def open_decoder(
    path: str | Path,
    *,
    slots: int = 1,
    context: int | None = None,
    block: int = 256,
    threads: int | None = None,
    kv: str = "bf16",
    fallback: bool = True,
) -> tuple[Decoder, Any]:
    """A model's decoder and its tokenizer (None where the model has none).

    `path` is a fewbit checkpoint, a Hugging Face directory, a `.gguf` file or a hub id. `context` is by default the
    model's own, at most 4096; `kv` how the cache is kept: bf16, int8 (rotated, with a scale per position and head) or
    float32 (for comparisons). A model that native steps do not cover runs in transformers, with a message on stderr, or
    raises `CannotLower` without `fallback`. Raises `UsageError` for arguments that do not fit.
    """
    from fewbit.runtime.program import Lowering, Sizes, check_sizes
    from fewbit.runtime.weights import open_weights

    if kv not in KV_TYPES:
        raise UsageError(f"the cache is kept as {', '.join(KV_TYPES)}, not {kv}")
    native = load_native()
    try:
        if native is None:
            raise CannotLower("the native extension is missing")
        weights = open_weights(native, path)
        with damage_named(Path(path), REMEDY):
            most = longest_context(weights.config)
        if most is None:
            raise CannotLower("the configuration does not say how many positions there are")
        sizes = Sizes(slots, min(most, USUAL_CONTEXT) if context is None else context, block, threads or 0, kv)
        check_sizes(sizes, most)
        with damage_named(Path(path), REMEDY):
            lowering = Lowering(native, weights, sizes)
        # Before the weights, because reading it takes memory that it gives back.
        tokenizer = weights.tokenizer()
        with damage_named(Path(path), REMEDY):
            program = lowering.build()
        decoder = NativeDecoder(
            program,
            vocabulary=lowering.shape.vocabulary,
            context=sizes.context,
            slots=slots,
            block=block,
            eos=ending_tokens(model_directory(path), weights.config),
        )
    except CannotLower as reason:
        if not fallback:
            raise
        from transformers.utils import logging

        from fewbit.console import stderr
        from fewbit.loading import load_any
        from fewbit.runtime.torch_decoder import TorchDecoder

        logging.disable_progress_bar()
        kept = "" if kv == "bf16" else f", with a cache in bf16 instead of {kv}"
        stderr.print(f"{reason}; running in transformers, which is much slower{kept}", markup=False, soft_wrap=True)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        model, tokenizer = load_any(path)
        eos = ending_tokens(model_directory(path), model.config.get_text_config())
        return TorchDecoder(model, slots, context, block, eos), tokenizer
    return decoder, tokenizer


def longest_context(config: Any) -> int | None:
    """The positions that a model was made for; None where its configuration does not say."""
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else None


def model_directory(path: str | Path) -> Path:
    """Where the files of a model are that `open_decoder` takes: for a hub id, its snapshot."""
    if Path(path).exists():
        return Path(path)
    from fewbit.checkpoint.source import open_source

    return open_source(path).path


def ending_tokens(path: str | Path, config: Any) -> tuple[int, ...]:
    """The tokens that end a text, of the generation configuration if there is one and else of the model's.

    Raises `CorruptFile` for a generation configuration that is none.
    """
    found = getattr(config, "eos_token_id", None)
    file = Path(path) / "generation_config.json"
    if file.is_file():
        found = read_object(file, "copy it from the model, or remove it").get("eos_token_id", found)
    if found is None:
        return ()
    ends = tuple(found) if isinstance(found, list | tuple) else (found,)
    if not all(is_size(end, 0) for end in ends):
        raise CorruptFile(f"{path}: eos_token_id is {shortened(found)}, no token; copy the configuration again")
    return ends
