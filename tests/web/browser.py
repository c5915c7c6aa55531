"""Drive the page in headless Chromium, as a reader would, and leave screenshots.

    python tests/web/browser.py URL FOLDER talk      # or look, fail

Needs `pip install playwright` and a Chromium (`apt install chromium fonts-wqy-zenhei`); its path can be given by
TERNLM_CHROMIUM. test_browser.py runs it against SmolLM2.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse


def find_chromium() -> str | None:
    """Return where Chromium is."""
    return os.environ.get("TERNLM_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def browsing(url: str, locale: str = "en-US") -> Iterator[tuple[Any, list[str]]]:
    """Open the page; give it, and a list of what it asks of other hosts or complains of."""
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []

    def note(request: Any) -> None:
        parsed = urlparse(request.url)
        if parsed.scheme in ("http", "https", "ws", "wss") and parsed.hostname not in ("127.0.0.1", "localhost"):
            wrong.append(f"asks for {request.url}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        context = browser.new_context(locale=locale, viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", note)
        page.on("pageerror", lambda error: wrong.append(f"fails: {error}"))
        page.goto(url)
        try:
            yield page, wrong
        finally:
            browser.close()


class Reader:
    """Somebody who reads the page and presses its buttons."""

    def __init__(self, page: Any, folder: Path) -> None:
        self.page, self._folder, self._count = page, folder, 0

    def shoot(self, name: str) -> None:
        """Leave a screenshot."""
        self._count += 1
        self.page.wait_for_timeout(400)
        self.page.screenshot(path=self._folder / f"{self._count:02}_{name}.png")

    def ask(self, text: str) -> None:
        """Type a question and send it."""
        field = self.page.get_by_test_id("stChatInputTextArea")
        field.fill(text)
        field.press("Enter")

    def answers(self) -> list[str]:
        """Return what the messages say."""
        return [each.inner_text() for each in self.page.get_by_test_id("stChatMessage").all()]

    def press(self, label: str) -> None:
        """Press a button."""
        self.page.get_by_role("button", name=re.compile(label)).first.click()

    def wait_for_answer(self, regenerate: str = "Regenerate") -> None:
        """Wait for an answer's end."""
        button = self.page.get_by_role("button", name=re.compile(regenerate)).first
        self.page.wait_for_function("() => !document.querySelector('.st-key-stop')")
        button.wait_for()


def talk(page: Any, folder: Path) -> None:
    """A conversation, stopped once, made anew, changed, in both languages."""
    reader = Reader(page, folder)
    page.get_by_test_id("stChatInputTextArea").wait_for()
    reader.shoot("empty")
    page.get_by_text("Sampling", exact=True).first.click()
    page.get_by_role("slider", name="Temperature").press("Home")  # always the likeliest: what is asked for is known
    page.wait_for_timeout(1000)
    reader.ask("What is the capital of France? Answer in one sentence.")
    page.locator(".st-key-stop").wait_for()
    reader.shoot("streaming")
    reader.wait_for_answer()
    assert "Paris" in reader.answers()[1]
    reader.shoot("answered")
    reader.ask("Write a long story about a tern that flies around the world.")
    page.locator(".st-key-stop").wait_for()
    time.sleep(3)
    reader.press("Stop")
    reader.wait_for_answer()
    assert "stopped" in reader.answers()[3]
    reader.shoot("stopped")
    before = reader.answers()[3]
    reader.press("Regenerate")
    page.locator(".st-key-stop").wait_for()
    time.sleep(2)
    reader.press("Stop")
    reader.wait_for_answer()
    assert reader.answers()[3] != before
    reader.press("Earlier version")
    page.wait_for_timeout(1000)
    assert reader.answers()[3] == before
    page.get_by_role("radio", name="中文").or_(page.get_by_role("button", name="中文")).first.click()
    page.get_by_role("button", name="重新生成").wait_for()
    reader.shoot("chinese")
    page.get_by_role("button", name="编辑").first.click()
    page.get_by_test_id("stChatMessage").locator("textarea").wait_for()
    reader.shoot("editing")
    page.get_by_test_id("stChatMessage").locator("textarea").fill("What is the capital of Japan? One sentence.")
    page.get_by_role("button", name="发送").first.click()
    page.locator(".st-key-stop").wait_for()
    reader.wait_for_answer("重新生成")
    assert len(reader.answers()) == 2
    assert "Tokyo" in reader.answers()[1]
    reader.shoot("edited")
    page.get_by_text("更多").first.click()
    reader.shoot("more")
    page.keyboard.press("Escape")


def look(page: Any, folder: Path) -> None:
    """An imported conversation with formulas, code, a picture's address and a tool; the model goes on by its result."""
    reader = Reader(page, folder)
    reader.press("New conversation")
    page.get_by_text("Import", exact=True).first.click()
    file = {"name": "talk.jsonl", "mimeType": "application/jsonl", "buffer": json.dumps(RICH).encode()}
    page.get_by_test_id("stFileUploaderDropzoneInput").first.set_input_files(files=[file])
    page.locator(".katex").nth(2).wait_for()
    assert page.locator(".katex").count() == 3
    assert "\\(x\\)" in page.get_by_test_id("stCode").first.inner_text()
    assert page.locator(".stChatMessage img").count() == 0
    assert page.get_by_test_id("stChatInputTextArea").is_disabled()
    page.get_by_test_id("stChatMessage").first.scroll_into_view_if_needed()
    reader.shoot("rich")
    page.get_by_role("textbox", name="Result of weather").scroll_into_view_if_needed()
    page.get_by_role("textbox", name="Result of weather").fill("17 degrees, sunny")
    reader.shoot("result")
    reader.press("Send results")
    page.get_by_text("▌").first.wait_for()
    reader.shoot("goes_on")
    reader.press("Stop")
    reader.wait_for_answer()
    page.get_by_text("Sampling", exact=True).first.click()
    reader.shoot("sampling")


def fail(page: Any, folder: Path) -> None:
    """A server that is gone is told of."""
    reader = Reader(page, folder)
    page.get_by_test_id("stAlert").first.wait_for()
    reader.shoot("no_server")
    assert "There is no server" in page.get_by_test_id("stAlert").first.inner_text()


FORMULAS = r"""Let \( x^2 = 2 \), then

\[ x = \pm\sqrt{2} \approx 1.41 \]

which costs $5, not $10, and $a_1$ stays. ![a picture](http://example.com/leak.png)

```python
print(r"\(x\)", "$5")
```

1. **bold**, `code \(y\)`
2. | a | b |"""
WEATHER = {"name": "weather", "description": "Tells the weather", "parameters": {"type": "object", "properties": {}}}
RICH = {
    "messages": [
        {"role": "system", "content": "You are a kind assistant."},
        {"role": "user", "content": "Show me formulas\nand code."},
        {"role": "assistant", "content": FORMULAS, "reasoning_content": "The reader wants formulas."},
        {"role": "user", "content": "And the weather in 北京?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}],
        },
    ],
    "tools": [{"type": "function", "function": WEATHER}],
}


if __name__ == "__main__":
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with browsing(sys.argv[1]) as (opened, complaints):
        try:
            {"talk": talk, "look": look, "fail": fail}[sys.argv[3]](opened, out)
        finally:
            opened.screenshot(path=out / "last.png")
    print("\n".join(complaints) or "nothing was asked of others, nothing failed")
