"""`fewbit report`: measures models and writes one page about them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit import cli_options as o
from fewbit.console import human_bytes, print_json, progress_bars, stdout, table
from fewbit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


def report(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="fewbit checkpoints, and any models quantize takes.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write, one HTML file.")] = Path("report.html"),
    reference: Annotated[
        str | None,
        typer.Option(
            help="The full model, for divergences and for weights before their rotation. Default: the full model among "
            "PATH, if there is one."
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text. Default: held-out Wikipedia text, fetched.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate.")] = 20480,
    window: Annotated[int, typer.Option(help="Tokens per window; windows do not overlap.")] = 512,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure how fast every model runs.")] = True,
    json_: o.Json = False,
) -> None:
    """Compare models on one page: size, quality, errors, bits, weights before and after rotation, speed."""
    _check_out(out)
    from fewbit.cli_inputs import read_text
    from fewbit.report.collect import ReportSettings, collect
    from fewbit.report.page import render_report

    settings = ReportSettings(read_text(text), tokens, window, speed)
    with progress_bars() as bars:
        found = collect(paths, reference, settings, bars)
    _write(out, render_report(found))
    if json_:
        print_json({**found, "output": str(out)})
    else:
        _conclude(found["models"], out)


def _check_out(out: Path) -> None:
    """Refuse, before anything takes time, a page that cannot be written or that would take the place of a model."""
    if out.is_dir():
        raise UsageError(f"{out} is a directory; name the page to write, for example: -o {out / 'report.html'}")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no directory to write {out.name} in; make it first, or choose another -o")
    if out.exists() and out.suffix not in (".html", ".htm") and _first_byte(out) not in (b"", b"<"):
        raise UsageError(f"{out} exists and is no page; choose another -o, or remove it first")


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1)


def _write(out: Path, page: str) -> None:
    """The whole page or none."""
    from fewbit.checkpoint.store import disk_errors

    partial = out.with_name(f".{out.name}.partial")
    with disk_errors(out):
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, out)


def _conclude(rows: Sequence[dict[str, Any]], out: Path) -> None:
    lines = []
    for row in rows:
        spread = "" if row["perplexity_stderr"] is None else f" +- {row['perplexity_stderr']:.2f}"
        divergence = "reference" if row["reference"] else "" if row["kl_mean"] is None else f"{row['kl_mean']:.4f}"
        rates = (row["speed"] or {}).get("decode")
        lines.append(
            [
                row["name"],
                human_bytes(row["bytes"]),
                f"{row['bits_per_weight']['body']:.3f}",
                f"{row['perplexity']:.2f}{spread}",
                divergence,
                f"{rates[0]['tokens_per_second']:.1f}" if rates else "",
            ]
        )
    stdout.print(table("", ["", "size", "bits,\nlayers", "perplexity", "KL\nmean", "tok/s"], lines))
    stdout.print(f"The page: {out}", soft_wrap=True, markup=False)
