"""Makes the pictures of docs/report.md: quick checkpoints of a small model, `fewbit report` on them, Chromium.

Checkpoints are kept in the cache, so that a run that was cut off goes on and a later one measures and draws alone.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browser import chromium, without_chromium
from checkpoints import made
from end_to_end import fewbit
from PIL import Image
from references import reference_dir
from transformers.utils import logging

from fewbit.assets import default_cache_dir
from fewbit.pipeline.options import QuantizeOptions, ablated

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "build" / "report.html"
IMAGES = ROOT / "docs" / "images"
MODEL, SEED = "smollm2-135m", 0
QUICK: dict[str, Any] = {"calib_tokens": 4096, "tune": False}
CHECKPOINTS = {
    "trellis-2": QuantizeOptions(bits=2, **QUICK),
    "trellis-3": QuantizeOptions(bits=3, **QUICK),
    "trellis-4": QuantizeOptions(bits=4, **QUICK),
    "trellis-64MB": QuantizeOptions(target_bytes=64_000_000, **QUICK),
    "twinquant-hadamard": ablated(QuantizeOptions(format="twinquant"), "hadamard"),
}
WIDTH, SCALE = 1000, 1.25  # of the page, in its own pixels, and a picture's pixels for one of them
MARGIN = 16


@dataclass(frozen=True)
class Part:
    """What a picture shows of the page: one element down to another (CSS selectors), on a `light` or `dark` screen."""

    scheme: str
    first: str
    last: str


PARTS = {
    "quality": Part("light", "h1", "#results ~ .soft"),
    "errors": Part("dark", "#errors", "#errors ~ .pair > :nth-child(2)"),
    "bits": Part("light", "#bits", "#bits ~ dl"),
    "rotation": Part("dark", "#rotation", "#rotation ~ .pair"),
    "speed": Part("light", "#speed", "#speed ~ .soft"),
}


def checkpoints(reference: Path) -> list[Path]:
    """The checkpoints that the pictures show, made once."""
    place = default_cache_dir() / "report-pictures" / reference.name
    for name, options in CHECKPOINTS.items():
        made(reference, options, place / name, any_commit=True)
    return [place / name for name in CHECKPOINTS]


def take(browser: Any, page: Path, target: Path) -> None:
    """A picture of every part of a report's page, as `target`/report-NAME.png."""
    for name, part in PARTS.items():
        viewport = {"width": WIDTH, "height": 900}
        opened = browser.new_page(viewport=viewport, device_scale_factor=SCALE, color_scheme=part.scheme)
        opened.goto(page.resolve().as_uri())
        first, last = (opened.locator(selector).first.bounding_box() for selector in (part.first, part.last))
        top = first["y"] - MARGIN
        clip = {"x": 0, "y": top, "width": WIDTH, "height": last["y"] + last["height"] + MARGIN - top}
        screenshot = Image.open(io.BytesIO(opened.screenshot(full_page=True, clip=clip))).convert("RGB")
        opened.close()
        # In 256 colours it takes a third and looks the same: this way of choosing them keeps rare ones.
        few = screenshot.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        few.save(target / f"report-{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens that every model is evaluated on")
    parser.add_argument("--page", type=Path, help="take the pictures of this page, and measure nothing")
    arguments = parser.parse_args()
    if reason := without_chromium():
        raise SystemExit(f"report_pictures: {reason}")
    page = arguments.page
    if page is None:
        logging.disable_progress_bar()
        reference, page = reference_dir(MODEL, SEED), PAGE
        models = map(str, checkpoints(reference))
        page.parent.mkdir(exist_ok=True)
        fewbit("report", *models, "--reference", str(reference), "--tokens", str(arguments.tokens), "-o", str(page))
    with chromium() as browser:
        take(browser, page, IMAGES)


if __name__ == "__main__":
    main()
