"""The page in a real browser: it answers, shows pictures, stops, and stays inside its content security policy."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support import clips

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, real_url: str) -> Iterator[Any]:
    """The page, and whatever it complains about fails the test."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    page, complaints = context.new_page(), list[str]()
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(real_url)
    page.get_by_text("calf · ").wait_for()
    yield page
    refused = "Failed to load resource"  # a request that the server refuses, which is no fault of the page
    assert [text for text in complaints if not text.startswith(refused)] == []
    context.close()


def _ask(page: Any, text: str, tokens: int = 8) -> None:
    page.locator("summary").click()
    page.fill("#max_tokens", str(tokens))
    page.fill("#temperature", "0")
    page.locator("summary").click()
    page.fill("#text", text)
    page.keyboard.press("Enter")


def test_a_question_is_answered_by_keyboard_alone(page: Any) -> None:
    assert page.evaluate("() => document.activeElement.id") == "text"
    _ask(page, "Hello <b>you</b>")
    page.get_by_text("Try again").wait_for()
    assert page.locator(".turn.user .said").inner_text() == "Hello <b>you</b>", "nothing typed becomes markup"
    assert page.locator(".turn.assistant .said").first.inner_text()
    assert "tokens read" in page.locator(".note").inner_text()
    assert page.evaluate("() => document.activeElement.id") == "text"
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0


def test_a_picture_goes_with_a_question(page: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.locator("#pictures img").wait_for()
    _ask(page, "What is this?")
    page.get_by_text("Try again").wait_for()
    assert page.locator(".turn.user img").count() == 1
    assert page.locator(".failed").count() == 0


@pytest.mark.parametrize(("name", "kind", "shown"), [
    ("a.mp4", "video/mp4", "video"), ("a.webm", "video/webm", "video"), ("a.gif", "image/gif", "img"),
    ("a.webp", "image/webp", "img")])
def test_a_clip_goes_with_a_question(name: str, kind: str, shown: str, page: Any) -> None:
    pictures = clips.frames(side=64)
    data = clips.film(pictures, kind=name[2:]) if shown == "video" else clips.animation(pictures, kind=name[2:])
    with page.expect_request("**/v1/chat/completions") as asked:
        page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})
        page.locator(f"#pictures {shown}").wait_for()
        assert page.locator("#pictures button").get_attribute("aria-label") == "Remove clip 1"
        _ask(page, "What happens?")
    page.get_by_text("Try again").wait_for()
    first, second = asked.value.post_data_json["messages"][0]["content"]
    assert first["video_url"]["url"].startswith(f"data:{kind};base64,")
    assert second["type"] == "text"
    assert page.locator(f".turn.user {shown}").count() == 1
    assert page.locator(".failed").count() == 0


def test_dropped_files_of_all_kinds(page: Any) -> None:
    """A still WebP stays a picture, and what is neither is left alone."""
    still, moving = clips.animation(clips.frames(("red",))), clips.animation(clips.frames())
    files = [("a.webp", "image/webp", still), ("b.webp", "image/webp", moving), ("c.txt", "text/plain", b"text")]
    page.evaluate("""files => {
      const transfer = new DataTransfer();
      for (const [name, type, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
      document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
    }""", [[name, kind, list(data)] for name, kind, data in files])
    page.locator("#pictures img").nth(1).wait_for()
    labels = page.locator("#pictures button").evaluate_all("buttons => buttons.map(button => button.ariaLabel)")
    assert labels == ["Remove picture 1", "Remove clip 2"]


def test_an_answer_is_stopped_by_escape(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that takes for ever
    _ask(page, "Hello")
    page.get_by_role("button", name="Stop").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    assert page.get_by_role("button", name="Send").is_enabled()


def test_errors_are_shown_and_the_page_goes_on(page: Any) -> None:
    _ask(page, "x" * 6000)
    page.locator(".failed").wait_for()
    assert "4096" in page.locator(".failed").inner_text()
    page.get_by_role("button", name="New chat").click()
    _ask(page, "Hello")
    page.get_by_text("tokens read").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_narrow_screen(scheme: str, browser: Any, real_url: str) -> None:
    context = browser.new_context(viewport={"width": 320, "height": 640}, color_scheme=scheme)
    page = context.new_page()
    page.goto(real_url)
    page.locator("summary").click()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 320
    context.close()
