"""Chromium, in which pages are looked at: scripts/browser.sh installs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def without_chromium() -> str | None:
    return None if executable() else "no Chromium; sh scripts/browser.sh installs it"


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser as playwright drives it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Chromium refuses to sandbox itself as root; pages are the caller's own.
        browser = driver.chromium.launch(executable_path=executable(), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
