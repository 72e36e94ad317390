"""The command line: one verb per thing a user wants.

Verbs import what they need when they run, so that help and errors come at once. Exit codes: 0 fine,
1 failed, 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbit import __version__, cli_run
from fewbit import cli_options as o
from fewbit.cli_inputs import load_model, read_text
from fewbit.console import (
    bits_table,
    human_bytes,
    human_seconds,
    parse_size,
    plan_table,
    print_json,
    progress_bars,
    stderr,
    stdout,
    table,
)
from fewbit.errors import FewbitError, UsageError
from fewbit.report.command import report
from fewbit.serve.command import serve

if TYPE_CHECKING:
    from fewbit.pipeline.options import QuantizeOptions
    from fewbit.pipeline.run import Placement

app = typer.Typer(
    help="Compress a language model's weights to 2, 3 or 4 bits, measure what it cost, and run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Checkpoint = Annotated[Path, typer.Argument(metavar="PATH", help="A fewbit checkpoint directory.")]


@app.command()
def quantize(
    model: o.Model,
    out: o.Out,
    format_: o.Format = "itq3_s",
    code: o.Code = "",
    bits: o.Bits = 0,
    target_size: o.TargetSize = "",
    head: o.Head = "auto",
    rotate: o.Rotate = True,
    rounding: o.Rounding = "ldlq",
    rank: o.Rank = 128,
    branch_init: o.BranchInit = "svd",
    act_bits: o.ActBits = 8,
    smooth: o.Smooth = True,
    center: o.Center = True,
    learn: o.Learn = None,
    learn_steps: o.LearnSteps = 0,
    ablation: o.Ablation = "full",
    dry_run: o.DryRun = False,
    calib: o.Calib = None,
    calib_tokens: o.CalibTokens = 65536,
    calib_window: o.CalibWindow = 512,
    calib_dtype: o.CalibDtype = "auto",
    sequential: o.Sequential = True,
    damping: o.Damping = "auto",
    tune: o.Tune = None,
    tune_steps: o.TuneSteps = 0,
    executor: o.Executor = "auto",
    workers: o.Workers = None,
    ray_address: o.RayAddress = None,
    work_dir: o.WorkDir = None,
    fresh: o.Fresh = False,
    json_: o.Json = False,
) -> None:
    """Compress MODEL into the directory OUT. An interrupted run continues where it stopped."""
    from fewbit.pipeline.options import QuantizeOptions, ablated
    from fewbit.pipeline.run import Placement

    options = QuantizeOptions(
        format=format_,
        code=code,
        bits=bits,
        target_bytes=parse_size(target_size) if target_size else 0,
        head=head,
        rotate=rotate,
        rounding=rounding,
        calib_tokens=calib_tokens,
        calib_window=calib_window,
        calib_dtype=calib_dtype,
        sequential=sequential,
        damping=_damping(damping),
        tune=tune,
        tune_steps=tune_steps,
        rank=rank,
        init=branch_init,
        act_bits=act_bits,
        smooth=smooth,
        center=center,
        learn=learn,
        learn_steps=learn_steps,
    )
    options = ablated(options, ablation)
    placement = Placement(work_dir, executor, workers, fresh, ray_address)
    texts = calib or (_default_calibration() if options.rounding == "ldlq" else [])
    if dry_run:
        _show_plan(model, out, options, texts, placement, json_)
    else:
        _quantize(model, out, options, texts, placement, json_)


def _show_plan(
    model: str, out: Path, options: QuantizeOptions, texts: list[str], placement: Placement, json_: bool
) -> None:
    from fewbit.pipeline.predict import predict
    from fewbit.pipeline.run import preview

    with progress_bars() as bars:
        prepared = preview(model, out, options, texts, placement, bars)
    plan = prepared.plan
    prediction = predict(plan, prepared.windows)
    if json_:
        print_json({**plan.to_json(), "prediction": prediction})
        return
    stdout.print(plan_table(plan))
    if prepared.options.allocates:
        stdout.print(bits_table(plan))
    stdout.print(
        f"Predicted: {human_seconds(prediction['seconds'])} on this machine, "
        f"{human_bytes(prediction['peak_memory_bytes'])} of memory at the peak"
    )


def _quantize(
    model: str, out: Path, options: QuantizeOptions, texts: list[str], placement: Placement, json_: bool
) -> None:
    from fewbit.pipeline.run import quantize as run

    with progress_bars(lines=not json_) as bars:
        result = run(model, out, options, texts, placement, bars)
    if json_:
        print_json(result.to_json())
        return
    stdout.print(
        f"{result.output}: {human_bytes(result.bytes)}, {result.bits_per_weight['body']:.3f} bits per weight in the "
        f"layers, {result.bits_per_weight['total']:.3f} over everything, mean error {result.mean_relative_error:.4f}; "
        f"{human_seconds(result.seconds)}, peak memory {human_bytes(result.peak_memory_bytes)}"
        + (f", after an earlier run that left {result.resumed_tensors} tensors" if result.resumed else "")
    )
    if result.tuning_gain is not None:
        before, after = result.tuning_gain
        stdout.print(f"Tuning took the divergence on held-out calibration text from {before:.4g} to {after:.4g} nats")
    if result.unseen:
        stdout.print(
            f"{len(result.unseen)} tensors saw no calibration token and were rounded without error feedback, "
            f"{result.unseen[0]} first; more --calib-tokens reach more experts",
            soft_wrap=True,
        )
    stdout.print(f"Try it: fewbit generate {result.output} -p 'Once upon a time'")


def _damping(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise UsageError(f"--damping takes a number or auto, not '{text}'") from error


def _default_calibration() -> list[str]:
    from fewbit.assets import fetch_text

    with progress_bars() as bars:
        return [str(fetch_text(name, progress=bars.fetch)) for name in ("c4.calib", "wiki.calib")]


@app.command()
def inspect(path: Checkpoint, json_: o.Json = False) -> None:
    """Show what a checkpoint holds: every tensor with its bits and its error."""
    from fewbit.checkpoint.artifact import Artifact

    report = Artifact.open(path).inspect()
    if json_:
        print_json(report)
        return
    rows = []
    for entry in report["tensors"]:
        stored = f"{entry['format']}, {entry['bits']} bits" if entry["format"] else f"{entry['dtype']}"
        error = f"{entry['relative_error']:.4f}" if entry["format"] else ""
        shape = " x ".join(map(str, entry["shape"]))
        rows.append([entry["name"], stored, shape, f"{8 * entry['bytes'] / entry['weights']:.3f}", error])
    stdout.print(table(str(path), ["tensor", "stored as", "shape", "bits/weight", "error"], rows, 2))
    bits = report["bits_per_weight"]
    stdout.print(
        f"{human_bytes(report['bytes'])} for {report['weights'] / 1e6:.2f} M weights: "
        f"{bits['body']:.3f} bits per weight in the layers, {bits['total']:.3f} over everything",
        soft_wrap=True,
    )


@app.command()
def verify(
    path: Checkpoint,
    source: Annotated[
        str | None, typer.Option(help="The model it was made from: also compare every error with the recorded one.")
    ] = None,
    json_: o.Json = False,
) -> None:
    """Check every tensor of a checkpoint: present, of the right shape, unchanged, decodable."""
    from fewbit.checkpoint.artifact import Artifact
    from fewbit.checkpoint.source import open_source

    artifact = Artifact.open(path)
    original = open_source(source) if source else None
    problems = {}
    with progress_bars() as bars:
        bars.stage("checking", len(artifact.record["tensors"]))
        for name, problem in artifact.verify(original):
            if problem:
                problems[name] = problem
            bars.advance()
    checked = len(artifact.record["tensors"])
    if json_:
        print_json({"ok": not problems, "tensors": checked, "problems": problems})
    else:
        for name, problem in problems.items():
            stdout.print(f"{name}: {problem}")
        stdout.print(
            f"{checked} tensors checked, {len(problems)} damaged" if problems else f"{checked} tensors: all well"
        )
    if problems:
        raise typer.Exit(1)


@app.command()
def export(
    path: o.AnyModel,
    out: o.Out,
    dtype: o.ExportDtype = "bfloat16",
    shard_size: o.ShardSize = "5GB",
    json_: o.Json = False,
) -> None:
    """Write a checkpoint, a .gguf file or any other model as plain safetensors that need no fewbit."""
    from fewbit.checkpoint.export import export as run

    with progress_bars() as bars:
        result = run(path, out, dtype, parse_size(shard_size), bars)
    if json_:
        print_json(result.to_json())
        return
    stdout.print(
        f"{result.output}: {human_bytes(result.bytes)} in {result.dtype}, {result.tensors} tensors, "
        f"{result.weights / 1e6:.2f} M weights; {human_seconds(result.seconds)}, peak memory "
        f"{human_bytes(result.peak_memory_bytes)}",
        soft_wrap=True,
    )
    for note in result.notes:
        stdout.print(f"Note: {note}", soft_wrap=True)


@app.command("eval")
def eval_(
    path: o.AnyModel,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text. Default: held-out Wikipedia text, fetched.")] = None,
    reference: Annotated[str | None, typer.Option(help="The full model, for divergence and agreement.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate.")] = 20480,
    dtype: Annotated[str, typer.Option(help="Activations: bfloat16 or float32.")] = "bfloat16",
    tasks: o.Tasks = "",
    limit: o.Limit = None,
    include_path: o.IncludePath = None,
    json_: o.Json = False,
) -> None:
    """Perplexity of a model on a text, and its divergence from a reference model; or its accuracy on tasks."""
    if tasks:
        if text is not None:
            raise UsageError("--text and --tasks are two measurements; run one after the other")
        _eval_tasks(path, reference, dtype, [name.strip() for name in tasks.split(",")], limit, include_path, json_)
        return
    from fewbit.evaluate import evaluate

    content = read_text(text)
    model, tokenizer = load_model(path, dtype)
    full = load_model(reference, dtype)[0] if reference else None
    with progress_bars() as bars:
        result = evaluate(
            model, tokenizer, content, full, window=window, tokens=tokens, progress=bars.count("evaluating")
        )
    if json_:
        print_json(result.to_json())
        return
    rows = [["perplexity", _plus_minus(result.perplexity, result.perplexity_stderr)]]
    if reference:
        values = result.to_json()
        rows += [
            ["perplexity ratio", _plus_minus(values["perplexity_ratio"], values["perplexity_ratio_stderr"], 4)],
            ["KL divergence, mean (nats)", _plus_minus(values["kl_mean"], values["kl_stderr"], 4)],
            ["KL divergence, 99 %", f"{values['kl_p99']:.4f}"],
            ["same top token", f"{100 * values['top1_agreement']:.2f} %"],
        ]
    rows.append(["bits per character", f"{result.bits_per_char:.4f}"])
    stdout.print(table(str(path), ["", "value"], rows))
    bos = "with" if result.bos else "without"
    stdout.print(
        f"{result.tokens} tokens, window {result.window}, stride {result.stride}, {bos} BOS, {dtype}; "
        f"text sha256 {result.text_sha256[:16]}"
    )


def _eval_tasks(
    path: str,
    reference: str | None,
    dtype: str,
    names: list[str],
    limit: float | None,
    include_path: Path | None,
    json_: bool,
) -> None:
    from fewbit.evaluate.tasks import evaluate_tasks, find_tasks, harness_version

    manager = find_tasks(names, include_path)
    found = {}
    for role, model in (("tasks", path), ("reference", reference)):
        if model is not None:
            found[role] = evaluate_tasks(*load_model(model, dtype), names, manager, limit)
    if json_:
        print_json({**found, "limit": limit, "dtype": dtype, "lm_eval": harness_version()})
        return
    rows = [
        [task, metric, *(_score(scores[task]["metrics"][metric]) for scores in found.values()), str(result["samples"])]
        for task, result in found["tasks"].items()
        for metric in result["metrics"]
    ]
    columns = ["task", "metric", *([""] if reference is None else ["", "reference"]), "questions"]
    stdout.print(table(path, columns, rows, 2))
    stdout.print(f"{dtype}; lm-evaluation-harness {harness_version()}")


def _score(metric: dict[str, float | None]) -> str:
    value, stderr = metric["value"], metric["stderr"]
    return f"{value:.4f}" if stderr is None else f"{value:.4f} +- {stderr:.4f}"


def _plus_minus(value: float, error: float | None, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} +- {error:.{digits}f}"


app.command()(cli_run.generate)
app.command()(cli_run.chat)
app.command()(cli_run.bench)
app.command()(report)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the checkpoints and the page go.")] = Path("fewbit-demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Quantize again even if the checkpoints are there.")] = False,
    json_: o.Json = False,
) -> None:
    """A tour on a real 135M model: fetch, plan, compress to 3 bits, measure, generate, draw."""
    from fewbit.demo import run_demo

    report = run_demo(out, fresh, quiet=json_)
    if json_:
        print_json(report)


@app.command()
def info(json_: o.Json = False) -> None:
    """Show versions, the instruction sets in use and the known formats and families."""
    from fewbit.environment import environment

    facts = environment()
    if json_:
        print_json(facts)
        return
    for key, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        stdout.print(f"{key.replace('_', ' '):<22} {text}")


app.command()(serve)


def _version(value: bool) -> None:
    if value:
        print(f"fewbit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a verb; every expected failure is one line on stderr and an exit code."""
    # PyTorch's threads otherwise wait for each other by spinning, which costs much time on a busy machine. It
    # has to be said before PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # And it takes large tensors from the system in many small pages, each time anew.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except FewbitError as error:
        stderr.print(f"[red]error:[/red] {_one_line(error)}", soft_wrap=True)
        sys.exit(error.exit_code)


def _one_line(error: Exception) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))
