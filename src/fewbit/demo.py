"""The tour behind `fewbit demo`: a real model, compressed to 3 bits and to two control codes, and measured.

Everything is left in one directory: the three checkpoints, `demo.json` with all figures, and `demo.html`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from fewbit.assets import fetch_model, fetch_text
from fewbit.checkpoint.artifact import Artifact, is_artifact
from fewbit.checkpoint.source import Source
from fewbit.checkpoint.store import disk_errors, write_json
from fewbit.console import human_bytes, human_seconds, plan_table, progress_bars, stderr, stdout, table
from fewbit.demo_page import render_page
from fewbit.drawing import printable
from fewbit.environment import environment
from fewbit.errors import UsageError
from fewbit.evaluate import EvalResult, evaluate_many
from fewbit.evaluate.tails import RotatedLayer, heaviest_tails, rounding_errors, tails
from fewbit.loading import load, load_any
from fewbit.math.hadamard import random_signs
from fewbit.ops.extension import load_native
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.plan import Plan
from fewbit.pipeline.run import Placement, prepare, quantize
from fewbit.report.record import errors_by_kind
from fewbit.runtime.engine import Engine
from fewbit.runtime.sampling import SamplingParams

PRODUCT = "trellis"
CONTROLS = ("iq3_s", "ternary")
_LABELS = {
    "full": "full (bf16)",
    "trellis": "trellis, 3 bits",
    "iq3_s": "iq3_s (control)",
    "ternary": "ternary (control)",
}
_STYLES = {"full": "c4", "trellis": "c2", "iq3_s": "c3", "ternary": "c1"}


@dataclass(frozen=True)
class DemoSettings:
    """What the tour works on; empty `model`, `calibration` and `text` mean the fetched ones.

    `prompts` are (text, whether it goes through the chat template).
    """

    model: str = ""
    model_name: str = "SmolLM2-135M-Instruct"
    calibration: tuple[str, ...] = ()
    text: str = ""
    calib_tokens: int = 16384
    calib_window: int = 512
    tune_steps: int = 32
    eval_tokens: int = 8192
    eval_window: int = 512
    gen_tokens: int = 40
    prompts: tuple[tuple[str, bool], ...] = (
        ("What is a lighthouse for?", True),
        ("The lighthouse stands at the edge of the sea, and", False),
    )

    def options(self, code: str) -> QuantizeOptions:
        """The product is tuned, in fewer steps than by default; its controls are not."""
        tuned = code == PRODUCT
        return QuantizeOptions(
            code=code,
            calib_tokens=self.calib_tokens,
            calib_window=self.calib_window,
            tune=tuned,
            tune_steps=self.tune_steps if tuned else 0,
        )


@dataclass
class _Stages:
    """Headings on stderr, and the seconds that every stage took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, sentence: str) -> Iterator[None]:
        stderr.print(f"\n[bold]{len(self.seconds) + 1}. {name.capitalize()}[/bold]  {sentence}", soft_wrap=True)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)


def run_demo(out: Path, fresh: bool, quiet: bool, settings: DemoSettings | None = None) -> dict[str, Any]:
    """Run the tour into the directory `out` and return all its figures.

    Finished checkpoints in `out` that were made from the same model with the same options are used again
    unless `fresh`. With `quiet` nothing goes to stdout. Raises `UsageError` where `out` holds something
    else under a checkpoint's name, and what fetching, quantizing and evaluating raise.
    """
    settings = settings or DemoSettings()
    stages = _Stages()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with stages.stage("fetch", "A model of 135 million weights and some text; kept in the cache for next time."):
        model, calibration, text = _fetch(settings)
    with stages.stage("plan", "What every tensor will be stored as, and what that weighs, before anything runs."):
        prepared = prepare(model, settings.options(PRODUCT), calibration)
        source, plan = prepared.source, prepared.plan
        stderr.print(plan_table(plan))
    paths = {code: out / code for code in (PRODUCT, *CONTROLS)}
    for code, path in paths.items():
        with stages.stage(f"quantize {code}", _QUANTIZE[code]):
            wanted = prepare(model, settings.options(code), calibration).plan
            _quantize(model, path, settings.options(code), calibration, fresh, wanted)
    with _no_loading_bars():
        full, tokenizer = load_any(model)
        models = {"full": full, **{code: load(path)[0] for code, path in paths.items()}}
    with stages.stage("evaluate", "All four read the same held-out text; the full model is the yardstick."):
        scores = _evaluate(models, tokenizer, text.read_text(encoding="utf-8"), settings)
    with stages.stage("generate", "The same prompts for the full model and for the 3-bit one."):
        texts = _generate({"full": model, PRODUCT: paths[PRODUCT]}, settings)
    with stages.stage("look inside", "The layer with the heaviest tails, before and after its rotation."):
        histogram = _heaviest(source, plan)
    records = {code: Artifact.open(path) for code, path in paths.items()}
    report = {
        "model": _model_facts(settings, source, plan, calibration),
        "settings": asdict(settings),
        "evaluation": {key: getattr(scores["full"], key) for key in _CONDITIONS},
        "rows": _rows(plan, records, scores, speeds(texts)),
        "texts": texts,
        "histogram": histogram,
        "errors": errors_by_kind(records[PRODUCT].record["tensors"]),
        "seconds": stages.seconds,
        "total_seconds": round(sum(stages.seconds.values()), 2),
        "environment": environment(),
        "output": {**{code: str(path) for code, path in paths.items()}, "page": str(out / "demo.html")},
    }
    with disk_errors(out):
        write_json(out / "demo.json", report)
        (out / "demo.html").write_text(render_page(report), encoding="utf-8")
    if not quiet:
        _conclude(report)
    return report


_QUANTIZE = {
    "trellis": "3 bits per weight: rotate, search the best path through the code with error feedback, tune the scales.",
    "iq3_s": "Control: the 3.4-bit block of ggml's IQ3_S on the same rotated weights.",
    "ternary": "Control: the ITQ3_S paper's three values taken literally.",
}


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Inside, transformers draws no bars of its own into the tour."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _fetch(settings: DemoSettings) -> tuple[Path, list[Path], Path]:
    """Paths of the model, of the calibration texts and of the held-out text."""
    with progress_bars() as bars:
        model = Path(settings.model) if settings.model else fetch_model("smollm2-135m", progress=bars.fetch)
        calibration = [Path(path) for path in settings.calibration] or [
            fetch_text(name, progress=bars.fetch) for name in ("c4.calib", "wiki.calib")
        ]
        text = Path(settings.text) if settings.text else fetch_text("wiki.eval", progress=bars.fetch)
    return model, calibration, text


def _quantize(
    model: Path, path: Path, options: QuantizeOptions, calibration: list[Path], fresh: bool, plan: Plan
) -> None:
    """Make the checkpoint `path`, unless the one there is what `plan` would make."""
    if path.exists() and not is_artifact(path):
        raise UsageError(f"{path} exists and is not a fewbit checkpoint; choose another directory with --out")
    if path.exists() and not fresh:
        if not is_from_plan(Artifact.open(path), plan):
            raise UsageError(f"{path} was made from another model or with other options; replace it with --fresh")
        stderr.print(f"{path} is there already and matches; --fresh makes it again", soft_wrap=True, markup=False)
        return
    with progress_bars() as bars:
        result = quantize(model, path, options, calibration, Placement(fresh=fresh), bars)
    stderr.print(
        f"{human_bytes(result.bytes)}, {result.bits_per_weight['body']:.3f} bits per weight in the layers, mean error "
        f"{result.mean_relative_error:.4f}, {human_seconds(result.seconds)}",
        soft_wrap=True,
    )


def is_from_plan(artifact: Artifact, plan: Plan) -> bool:
    """Whether a finished checkpoint is what this plan would make: same source, options and calibration tokens."""
    record = artifact.record
    return record.get("source_fingerprint") == plan.fingerprint and record.get("options") == plan.options


def _evaluate(models: dict[str, Any], tokenizer: Any, text: str, settings: DemoSettings) -> dict[str, EvalResult]:
    with progress_bars() as bars:
        return evaluate_many(
            models,
            tokenizer,
            text,
            models["full"],
            window=settings.eval_window,
            tokens=settings.eval_tokens,
            progress=bars.count("windows"),
        )


def _generate(paths: dict[str, Path], settings: DemoSettings) -> list[dict[str, Any]]:
    """Every prompt continued by every model, greedily; a first token beforehand warms each model up."""
    texts: list[dict[str, Any]] = [{"prompt": prompt, "chat": chat, "answers": {}} for prompt, chat in settings.prompts]
    for name, path in paths.items():
        with Engine(path, slots=1) as engine:
            engine.submit(settings.prompts[0][0], SamplingParams(max_tokens=1)).result()
            for item in texts:
                prompt = item["prompt"]
                ids = engine.encode_chat([{"role": "user", "content": prompt}]) if item["chat"] else prompt
                answer = engine.submit(ids, SamplingParams(max_tokens=settings.gen_tokens)).result()
                item["answers"][name] = {key: answer.to_json()[key] for key in _ANSWER}
    for item in texts:
        for name, answer in item["answers"].items():
            shown = answer["text"] if item["chat"] else item["prompt"] + answer["text"]
            stderr.print(f"[bold]{name}[/bold]", end="  ")
            stderr.print(printable(shown), markup=False)
    return texts


_ANSWER = ("text", "prompt_tokens", "tokens", "seconds_to_first_token", "tokens_per_second")


def speeds(texts: list[dict[str, Any]]) -> dict[str, float]:
    """Decoded tokens per second of each model over all its texts (the first token of each not counted)."""
    rates = {}
    for name in texts[0]["answers"]:
        answers = [item["answers"][name] for item in texts]
        timed = [(answer["tokens"] - 1, answer["tokens_per_second"]) for answer in answers]
        spent = sum(tokens / rate for tokens, rate in timed if rate > 0)
        rates[name] = sum(tokens for tokens, rate in timed if rate > 0) / spent if spent else 0.0
    return rates


def _model_facts(settings: DemoSettings, source: Source, plan: Plan, calibration: list[Path]) -> dict[str, Any]:
    native = load_native()
    return {
        "name": settings.model_name,
        "type": plan.model_type,
        "source": source.path.name,
        "source_bytes": source.path.stat().st_size,
        "weights": plan.totals()["weights"],
        "calibration": [path.name for path in calibration],
        "threads": native.num_threads() if native else torch.get_num_threads(),
    }


def _rows(
    plan: Plan, records: dict[str, Artifact], scores: dict[str, EvalResult], rates: dict[str, float]
) -> list[dict[str, Any]]:
    """The result table: the full model first, then the product, then the controls."""
    rows = []
    for name, score in scores.items():
        if name == "full":
            bits, size = {"body": 16.0, "total": 16.0}, 2 * plan.totals()["weights"]
            error = 0.0
        else:
            inspected = records[name].inspect()
            bits = inspected["bits_per_weight"]
            size = sum((records[name].path / file).stat().st_size for file in set(records[name].files.values()))
            errors = [entry["relative_error"] for entry in inspected["tensors"] if entry["format"]]
            error = sum(errors) / max(1, len(errors))
        rows.append(
            {
                "name": name,
                "label": _LABELS[name],
                "style": _STYLES[name],
                "bytes": size,
                "bits_per_weight": bits,
                "mean_relative_error": error,
                "tokens_per_second": round(rates[name], 3) if name in rates else None,
                **{key: getattr(score, key) for key in _SCORES},
            }
        )
    return rows


_CONDITIONS = ("tokens", "window", "stride", "bos", "text_sha256")
_SCORES = ("perplexity", "perplexity_stderr", "kl_mean", "kl_p99", "top1_agreement", "bits_per_char")


def _heaviest(source: Source, plan: Plan) -> dict[str, Any]:
    """The layer of the highest kurtosis: densities before and after rotation, and its error in both domains."""
    layers = [
        RotatedLayer(tensor.name, tensor.spec, random_signs(tensor.spec.cols, tensor.signs_seed))
        for tensor in plan.quantized
        if tensor.kind == "body" and tensor.spec
    ]
    with progress_bars() as bars:
        layer = heaviest_tails(source, layers, bars.count("reading layers"))
    weight = source.tensor(layer.name)
    return {**tails(layer, weight), **rounding_errors(layer, weight)}


def _conclude(report: dict[str, Any]) -> None:
    rows = []
    for row in report["rows"]:
        digits = 2 if row["perplexity"] < 100 else 0
        spread = "" if row["perplexity_stderr"] is None else f" +- {row['perplexity_stderr']:.{min(1, digits)}f}"
        rows.append(
            [
                row["name"],
                human_bytes(row["bytes"]),
                f"{row['bits_per_weight']['total']:.3f}",
                f"{row['bits_per_weight']['body']:.3f}",
                f"{row['perplexity']:.{digits}f}{spread}",
                "" if row["name"] == "full" else f"{row['kl_mean']:.4f}",
                "" if row["name"] == "full" else f"{100 * row['top1_agreement']:.1f}%",
                "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}",
            ]
        )
    # Short headings: the table has to fit a terminal of 80 columns.
    columns = ["", "size", "bits,\nall", "bits,\nlayers", "perplexity", "KL\nmean", "same\ntop", "tok/s"]
    facts = report["evaluation"]
    stdout.print()
    stdout.print(table(f"{report['model']['name']}: what 3 bits cost", columns, rows))
    stdout.print(
        f"Bits are per weight, over all tensors and in the layers. {facts['tokens']} tokens of held-out text, window "
        f"{facts['window']}, the same for all; KL (nats) and top token against the full model in bf16; tokens/s "
        f"decoding with fewbit's engine, batch 1, threads: {report['model']['threads']}. "
        f"{human_seconds(report['total_seconds'])} in all."
    )
    for line in (
        f"The page: {report['output']['page']}",
        f"Go on:    fewbit generate {report['output'][PRODUCT]} -p 'Once upon a time'",
    ):
        stdout.print(line, soft_wrap=True, markup=False)
