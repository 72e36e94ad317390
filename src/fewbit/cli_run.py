"""The verbs that run a model: generate, chat and bench."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fewbit import cli_options as o
from fewbit.console import print_json, progress_bars, stderr, stdout, table
from fewbit.errors import UsageError

if TYPE_CHECKING:
    from fewbit.runtime.engine import Engine, Piece


@contextmanager
def _engine(path: str, context: int | None, threads: int | None, kv: str, draft: int) -> Iterator[Engine]:
    from fewbit.runtime.engine import Engine

    with Engine(path, slots=1, context=context, threads=threads, kv=kv, draft=draft) as engine:
        yield engine


def generate(
    path: o.AnyModel,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    max_tokens: o.MaxTokens = 128,
    temperature: o.Temperature = 0.0,
    top_k: o.TopK = 0,
    top_p: o.TopP = 1.0,
    min_p: o.MinP = 0.0,
    repetition_penalty: o.Penalty = 1.0,
    seed: o.Seed = None,
    stop: o.Stop = None,
    context: o.Context = None,
    threads: o.Threads = None,
    kv: o.Kv = "bf16",
    draft: o.Draft = 0,
    json_: o.Json = False,
) -> None:
    """Continue a prompt, streaming the text as it comes."""
    from fewbit.runtime.sampling import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()))
    if not prompt.strip():
        raise UsageError("the prompt is empty; give some text with -p")
    with _engine(path, context, threads, kv, draft) as engine:
        ids = engine.encode_chat([{"role": "user", "content": prompt}]) if chat else prompt
        request = engine.submit(ids, params)
        result = request.result(None if json_ else _show)
        if json_:
            print_json(result.to_json())
            return
        print(flush=True)  # before the line on stderr, where both go to one place
        drafts = engine.stats()
        checked = f"; {drafts['accepted_tokens_total']} of {drafts['drafted_tokens_total']} drafted tokens came true"
        stderr.print(request.summary() + (checked if draft else ""), soft_wrap=True)


def _show(piece: Piece) -> None:
    print(piece.text, end="", flush=True)


def chat(
    path: o.AnyModel,
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    max_tokens: o.MaxTokens = 1024,
    temperature: o.Temperature = 0.7,
    top_k: o.TopK = 0,
    top_p: o.TopP = 0.95,
    min_p: o.MinP = 0.0,
    repetition_penalty: o.Penalty = 1.0,
    seed: o.Seed = None,
    stop: o.Stop = None,
    context: o.Context = None,
    threads: o.Threads = None,
    kv: o.Kv = "bf16",
    draft: o.Draft = 0,
) -> None:
    """Talk with a model; /help lists the commands. Without a terminal, each line of the input is a message."""
    from fewbit.chat import Chat, typed_lines
    from fewbit.runtime.sampling import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()))
    with _engine(path, context, threads, kv, draft) as engine:
        terminal = sys.stdin.isatty()
        talk = Chat(engine, params, system, stdout, quiet=not terminal)
        if terminal:
            stdout.print(f"[bold]{escape(engine.name)}[/bold], context {engine.context}; /help lists the commands")
        talk.run(typed_lines(stdout.color_system is not None) if terminal else sys.stdin)


def bench(
    path: o.AnyModel,
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of the prompts.")] = "128,512",
    gen_tokens: Annotated[int, typer.Option(help="Tokens that every sequence decodes.")] = 64,
    batch: Annotated[str, typer.Option(help="Numbers of sequences that decode together.")] = "1",
    repeats: Annotated[int, typer.Option(help="Repetitions of every measurement.")] = 3,
    threads: o.Threads = None,
    kv: o.Kv = "bf16",
    json_: o.Json = False,
) -> None:
    """Measure the speed of prompts and of decoding, and what they reach of the processor's and the memory's limits."""
    from fewbit.runtime import bench as measure

    settings = measure.BenchSettings(
        _numbers("--prompt-tokens", prompt_tokens), _numbers("--batch", batch), gen_tokens, repeats
    )
    with progress_bars() as bars:
        report = measure.run_bench(path, settings, threads, kv, bars.count("measuring"))
    if json_:
        print_json(report)
        return
    rows = [[f"prompt of {entry['prompt_tokens']}", *_rate(entry)] for entry in report["prefill"]]
    rows += [[f"decoding, {entry['batch']} together", *_rate(entry)] for entry in report["decode"]]
    stdout.print(table(str(path), ["", "tokens/s", "+-"], rows))
    stdout.print("; ".join([f"{report['threads']} threads, {report['isa']}, cache in {kv}", *_shares(report)]),
                 soft_wrap=True)  # fmt: skip


def _shares(report: dict[str, Any]) -> Iterator[str]:
    """What a measurement reaches of the machine's limits, as far as that is known."""
    if report["bandwidth_share"] is not None:
        speed = f"{report['read_bytes_per_second'] / 1e9:.1f} GB/s"
        yield f"decoding reads weights at {100 * report['bandwidth_share']:.0f} % of the memory's {speed}"
    if report["arithmetic_share"] is not None:
        speed = f"{report['operations_per_second'] / 1e12:.3g} TOP/s"
        yield f"the longest prompt multiplies at {100 * report['arithmetic_share']:.0f} % of the processor's {speed}"


def _rate(entry: dict[str, float]) -> tuple[str, str]:
    return f"{entry['tokens_per_second']:.1f}", f"{entry['stdev']:.1f}"


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} takes whole numbers with commas between them, not '{text}'") from error
