"""Screenshots of the page of a server, with a conversation that a model has with a picture: light, dark and narrow.

    python -m benchmarks.page_pictures BUNDLE PICTURE [--question "What is this?"] [-o docs/pictures]

Needs Playwright and the chromium of the system.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, Literal

from playwright.sync_api import Page, sync_playwright

from herdgraph.console import run_cli

from .serving import ours, served

SHOTS: tuple[tuple[str, int, int, Literal["light", "dark"]], ...] = (
    ("page-light", 900, 620, "light"), ("page-dark", 900, 620, "dark"), ("page-narrow", 390, 700, "dark"))
"""Name, width, height, colors."""


def shot(page: Page, url: str, options: argparse.Namespace, file: Path) -> None:
    """Ask, and take a picture of the page once all is said."""
    page.goto(url)
    page.get_by_text(f"{options.bundle.name} · ").wait_for()
    page.locator("#file").set_input_files(options.picture)
    page.locator("#pictures img").wait_for()
    for question in options.question:
        page.locator("summary").click()
        page.fill("#temperature", "0")
        page.locator("summary").click()
        page.fill("#text", question)
        page.keyboard.press("Enter")
        page.get_by_text("Try again").last.wait_for()
        page.wait_for_function("() => document.querySelector('#send').textContent === 'Send'")
    page.screenshot(path=file)


def main() -> None:
    """Parse, serve, ask in three windows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--question", nargs="+", default=["What is this?", "What kind of thing is this?"])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    with served(ours(options.bundle, 1), 1, 0) as url, sync_playwright() as playwright:
        browser: Any = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width, height, colors in SHOTS:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colors)
            shot(page, url, options, options.output / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    run_cli(main)
