"""A headless Chromium for tests, driven by Playwright: what a page did, asked for and looks like.

Nothing outside this machine can be reached: such requests are stopped, and written down.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axe_playwright_python.base import AXE_FILE_PATH
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OUTSIDE = re.compile(r"^(?!file:|data:|blob:|about:|chrome)")
READY = """async () => { await document.fonts.ready;
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise; }"""
# Contrast is measured element by element: of the thousands of coloured words of code, one of each
# kind is enough, and the others become plain text of their line: one text, not one per word.
ONE_OF_EACH = """() => { const seen = new Set();
  for (const e of document.querySelectorAll('.highlight pre span')) {
    if (e.children.length) continue;
    if (seen.has(e.className)) e.replaceWith(e.textContent); else seen.add(e.className); }
  document.querySelectorAll('.highlight pre').forEach(e => e.normalize()); }"""
AXE = """async options => (await axe.run(document, {resultTypes: ['violations'], iframes: false,
    preload: false, ...options})).violations.flatMap(v => v.nodes.map(n =>
  `${v.id}: ${n.target} ${n.failureSummary.split('\\n')[1].trim()}`))"""
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
LANDMARKS = [
    *("region", "landmark-one-main", "landmark-no-duplicate-main", "landmark-main-is-top-level"),
    *("landmark-unique", "landmark-no-duplicate-banner", "landmark-no-duplicate-contentinfo"),
    *("bypass", "skip-link", "page-has-heading-one"),
]


def executable() -> str | None:
    """Return the path of the first Chromium or Chrome on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page of a browser that writes down what goes wrong on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.outside: list[str] = []  # asked for, and not let through
        self.failed: list[str] = []
        self.errors: list[str] = []
        page.set_default_timeout(120_000)  # ms; a busy machine is slow, and no error
        page.route(OUTSIDE, self._stop)
        page.on("requestfailed", lambda request: self.failed.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._heard)

    def _stop(self, route: Any) -> None:
        self.outside.append(route.request.url)
        route.abort()

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def open(self, page: Path, query: str = "") -> None:
        """Open a local page and wait until it is drawn, mathematics and all."""
        for notes in (self.outside, self.failed, self.errors):
            notes.clear()
        self.page.goto(page.resolve().as_uri() + query)
        self.page.evaluate(READY)

    def axe(self, only: list[str], also: list[str] = (), without: list[str] = ()) -> list[str]:
        """Return what axe-core finds wrong, in the page and in every frame of it.

        `only` are rules or sets of rules; the rules `also` are about the page and not its frames.
        """
        found = []
        for frame in self.page.frames:
            whole = frame is self.page.main_frame
            rules = {name: {"enabled": True} for name in also if whole}
            rules |= {name: {"enabled": False} for name in without}
            if not frame.evaluate("() => 'axe' in window"):
                frame.evaluate(Path(AXE_FILE_PATH).read_text(encoding="utf-8"))
            found += frame.evaluate(AXE, {"runOnly": only, "rules": rules})
        return found


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium; stop it at the end."""
    path = executable()
    if path is None:
        raise FileNotFoundError("no Chromium on this machine")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


def tab(opened: Browser, *, width: int = 1300, theme: str = "light", **more: Any) -> Tab:
    """Open a tab `width` px wide, light or dark; a narrow one is a phone."""
    phone = {"is_mobile": True, "has_touch": True} if width < 600 else {}
    size = {"width": width, "height": 900}
    return Tab(opened.new_page(viewport=size, color_scheme=theme, **phone, **more))
