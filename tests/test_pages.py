"""The built pages: complete, working without a network, readable on a phone.

Without more, these are pages of `demo` that are built for this test. The environment variable
BOOK_HTML names folders of other pages (several with the path separator of the system).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import page_checks
import pytest
import yaml
from browser import LANDMARKS, ONE_OF_EACH, WCAG, Browser, Tab, browser, executable, tab
from bs4 import BeautifulSoup
from conftest import missing

import build_book
import chapter_pages
import computed_pages
import repository
from helpers import catalog

ROOT = Path(__file__).resolve().parent.parent
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
SEED_TERMS = (
    *("sub-tile", "spot", "HVG", "overlap-HVG"),
    *("contrastive learning", "linear probing", "batch effect"),
)


def pages_in_toc(entry: object) -> Iterator[str]:
    """Every page that a table of contents names, without suffix."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            if key in ("root", "file"):
                yield value
            else:
                yield from pages_in_toc(value)
    elif isinstance(entry, list):
        for part in entry:
            yield from pages_in_toc(part)


NAMES = list(pages_in_toc(TOC))
CHAPTERS = [name for name in NAMES if name.startswith("notebooks/")]


@pytest.fixture(scope="session")
def books(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of built pages that this run of the tests looks at."""
    if named := os.environ.get("BOOK_HTML"):
        return [Path(folder).resolve() for folder in named.split(os.pathsep)]
    out = tmp_path_factory.mktemp("book") / "demo"
    executed = request.getfixturevalue("run_of_demo")  # minutes, so only where it is needed
    build_book.stage(ROOT, executed, out / "source", "demo")
    assert build_book.build(out / "source", out / "html"), "the pages cannot be built: see above"
    return [out / "html"]


@pytest.fixture(scope="session")
def pages(books: list[Path]) -> list[Path]:
    """Every HTML page of the books, but not the theme's own parts."""
    found = [p for book in books for p in sorted(book.rglob("*.html")) if "_static" not in p.parts]
    assert found
    return found


@functools.cache
def parsed(path: Path) -> BeautifulSoup:
    """Parse a page once for all tests that only look at it."""
    return page_checks.soup(path.read_text(encoding="utf-8"))


def problems(pages: list[Path], check: Callable[[str, Path], list[str]]) -> list[str]:
    """Apply a check to pages and name each finding by study and page."""
    return [
        f"{page.parent.name}/{page.name}: {finding}"
        for page in pages
        for finding in check(page.read_text(encoding="utf-8"), page)
    ]


# --------------------------------------------------------------------------- the checks notice


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<script src="//cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example/css">',
        '<link rel="preconnect" href="https://fonts.example">',
        '<img src="http://badge.example/x.svg" alt="badge">',
        '<img src="x.png" srcset="x.png 1x, https://img.example/x.png 2x" alt="x">',
        '<iframe src="https://video.example/1"></iframe>',
        '<style>@import "https://fonts.example/css";</style>',
        "<style>@font-face {src: url('//fonts.example/a.woff')}</style>",
        '<p style="background: url(https://img.example/a.png)">x</p>',
        '<svg><image href="https://img.example/a.png"/></svg>',
        '<meta http-equiv="refresh" content="0; url=https://elsewhere.example/">',
    ],
)
def test_a_foreign_host_is_noticed(html: str) -> None:
    assert len(page_checks.foreign(html)) == 1


def test_naming_another_host_is_not_loading_from_it() -> None:
    html = (
        '<a href="https://doi.org/10.1000/182">x</a><link rel="canonical" href="https://x.example">'
        '<script>const LATER = "https://cdn.example/x.js";</script><img src="data:,x" alt="x">'
    )
    assert page_checks.foreign(html) == []


@pytest.mark.parametrize(
    ("html", "message"),
    [
        ('<a href="nowhere.html">x</a>', "nowhere.html: no such file"),
        ('<a href="#nowhere">x</a>', "#nowhere: no such anchor"),
        ('<a href="other.html#nowhere">x</a>', "other.html#nowhere: no such anchor"),
        ('<svg><a href="nowhere.html"><text>x</text></a></svg>', "nowhere.html: no such file"),
    ],
)
def test_a_broken_link_is_noticed(html: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text('<p id="here">x</p>')
    whole = '<p id="there"><a href="other.html#here">a</a><a href="#there">b</a></p>' + html
    assert page_checks.broken_links(whole, tmp_path / "page.html") == [message]


@pytest.mark.parametrize(
    ("html", "message"),
    [
        ('<img src="a.png">', "a.png: no alt text"),
        ('<img src="a.png" alt=" ">', "a.png: no alt text"),
        ('<img src="a.png" alt="a.png">', "a.png: no alt text"),
        ('<img src="gone.png" alt="Tissue">', "gone.png: no such file"),
    ],
)
def test_a_bad_image_is_noticed(html: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    whole = '<img src="a.png" alt="Tissue">' + html
    assert page_checks.bad_images(whole, tmp_path / "page.html") == [message]


@pytest.mark.parametrize(
    "html",
    [
        "<p>There are {{ n_slides }} slides.</p>",
        "<p>A {term}`spot` is</p>",
        "<p>See <code>{{ study }}</code></p>",
        '<p><span class="xref std std-term">spot</span></p>',
        '<p><span class="problematic">x</span></p>',
        "<p>As shown [?]</p>",
    ],
)
def test_an_unresolved_reference_is_noticed(html: str) -> None:
    good = '<a href="#t"><span class="xref">x</span></a><pre>f"{{x}}"</pre><code>{"a": 1}</code>'
    assert len(page_checks.unresolved(good + html)) == 1


# --------------------------------------------------------------------------- the sources


def test_the_config_keeps_the_colab_link_right() -> None:
    assert "path_to_book" not in CONFIG["repository"]
    assert CONFIG["execute"]["execute_notebooks"] == "off"


def test_the_pipeline_files_are_what_their_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("pipeline", ROOT / "book/figures/pipeline.py")
    pipeline = importlib.util.module_from_spec(spec)
    sys.modules["pipeline"] = pipeline
    spec.loader.exec_module(pipeline)
    for name, drawn in (("pipeline", pipeline.wide()), ("pipeline-tall", pipeline.tall())):
        assert (ROOT / f"book/figures/{name}.svg").read_text(encoding="utf-8") == drawn
        assert "\n\n" not in drawn  # a blank line would end the block of HTML on the page


def test_every_reference_can_be_followed() -> None:
    entries = re.split(r"^@", (ROOT / "book/references.bib").read_text("utf-8"), flags=re.M)[1:]
    keys = [re.match(r"\w+\{(\w+),", entry).group(1) for entry in entries]
    assert len(keys) == len(set(keys)) > 10
    assert [
        k for k, e in zip(keys, entries, strict=True) if not re.search(r"\n  (doi|url) ", e)
    ] == []


def test_no_total_is_typed_into_a_page() -> None:
    facts = json.loads(computed_pages.STORED.read_text(encoding="utf-8"))["facts"]
    typed = computed_pages.dataset_values(facts)
    numbers = [typed[k] for k in ("n_slides", "n_spots", "genes_min", "genes_max", "hd_share")]
    for path in sorted((ROOT / "book").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert [n for n in numbers if n in text] == [], path.name


# --------------------------------------------------------------------------- the pages


def test_every_page_of_the_table_of_contents_is_there(books: list[Path]) -> None:
    assert [f for b in books for n in NAMES if not (f := b / f"{n}.html").exists()] == []


def test_the_front_door_leads_to_the_first_page(books: list[Path]) -> None:
    for book in books:
        assert f"{TOC['root']}.html" in (book / "index.html").read_text(encoding="utf-8")


def test_no_page_loads_from_another_host(pages: list[Path]) -> None:
    assert problems(pages, lambda html, _: page_checks.foreign(html)) == []


def test_no_style_sheet_loads_from_another_host(books: list[Path]) -> None:
    sheets = [path for book in books for path in book.rglob("*.css")]
    assert sheets
    found = {p.name: page_checks.foreign_in_css(p.read_text("utf-8", "replace")) for p in sheets}
    assert {name: hosts for name, hosts in found.items() if hosts} == {}


def test_every_internal_link_leads_somewhere(pages: list[Path]) -> None:
    assert problems(pages, page_checks.broken_links) == []


def test_every_image_exists_and_is_described(pages: list[Path]) -> None:
    assert problems(pages, page_checks.bad_images) == []


def test_nothing_is_left_unresolved(pages: list[Path]) -> None:
    assert problems(pages, lambda html, _: page_checks.unresolved(html)) == []


def test_the_mathematics_engine_is_in_the_book(books: list[Path]) -> None:
    for book in books:
        assert (book / "mathjax/tex-chtml-full.js").stat().st_size > 1_000_000
        assert len(list((book / "mathjax/output/chtml/fonts/woff-v2").glob("*.woff"))) == 23
        assert "Apache License" in (book / "mathjax/LICENSE").read_text(encoding="utf-8")


def test_the_glossary_defines_every_seed_term(books: list[Path]) -> None:
    for book in books:
        page = page_checks.soup((book / "book/glossary.html").read_text(encoding="utf-8"))
        terms = {
            re.sub(r"\W+$", "", term.get_text()): term for term in page.select("dl.glossary dt")
        }
        assert [name for name in SEED_TERMS if name not in terms] == []
        for name in SEED_TERMS:
            assert len(terms[name].find_next_sibling("dd").get_text()) > 80, name


def test_every_chapter_opens_in_colab_from_the_repository(books: list[Path]) -> None:
    path = repository.owner_and_name(CONFIG["repository"]["url"])
    start = f"https://colab.research.google.com/github/{path}/blob/main/"
    for book in books:
        for name in (n for n in NAMES if n.startswith("notebooks/")):
            page = parsed(book / f"{name}.html")
            links = {a["href"] for a in page.select('a[href*="colab.research"]')}
            assert links == {f"{start}{name}.ipynb"}


def test_one_page_leads_to_the_next(books: list[Path]) -> None:
    ends = ["", *NAMES, ""]
    for book in books:
        for before, name, after in zip(ends, ends[1:], ends[2:], strict=False):
            page = parsed(book / f"{name}.html")
            for side, wanted in (("left-prev", before), ("right-next", after)):
                links = [a["href"].rpartition("/")[2] for a in page.select(f"a.{side}")]
                assert links == [f"{Path(wanted).name}.html"] * bool(wanted), (name, side)


def test_every_chapter_says_how_long_it_takes_and_where_to_get_it(books: list[Path]) -> None:
    for book in books:
        record = json.loads((book.parent / "source/notebooks/run.json").read_text(encoding="utf-8"))
        for name, ran in record["chapters"].items():
            path = book / f"notebooks/{name}.html"
            line = parsed(path).select_one(".chapter-facts")
            assert re.search(r"About [1-9]\d* min to read", line.get_text())
            assert f"ran for {chapter_pages.spoken(ran['seconds'])}." in line.get_text()
            colab, notebook = line.select("a")
            assert colab.get_text() == "Open in Colab"
            assert json.loads((path.parent / notebook["href"]).read_text("utf-8"))["cells"]
            assert notebook["download"] == f"{name}.ipynb"


def test_the_landing_page_has_three_doors(books: list[Path]) -> None:
    wanted = {"Read": "../notebooks/01_loading.html", "Run": "setup.html", "Teach": "teaching.html"}
    for book in books:
        path = book / f"{TOC['root']}.html"
        doors = {
            card.select_one(".sd-card-title").get_text(strip=True): card.a["href"]
            for card in parsed(path).select(".doors .sd-card")
        }
        assert doors == wanted
        assert all((path.parent / link).is_file() for link in wanted.values())


def test_every_chapter_explains_its_words_and_names_its_sources(books: list[Path]) -> None:
    for book in books:
        for name in CHAPTERS:
            page = parsed(book / f"{name}.html")
            assert len(page.select("a.glossary-term[href*='book/glossary.html#term-']")) > 3, name
            assert page.select("section#references a[href^='https://doi.org/10.']"), name


def test_figures_are_numbered_by_chapter(books: list[Path]) -> None:
    for book in books:
        for name in CHAPTERS:
            page = parsed(book / f"{name}.html")
            shown = [e.get_text().strip() for e in page.select("figcaption .caption-number")]
            number = int(Path(name).name[:2])
            assert shown == [f"Fig. {number}.{i + 1}" for i in range(len(shown))], name
            assert len(shown) == len(page.select("figure")) > 0, name


def test_every_study_has_its_page(books: list[Path]) -> None:
    for book in books:
        ran = json.loads((book.parent / "source/notebooks/run.json").read_text(encoding="utf-8"))
        for name, study in catalog.STUDIES.items():
            path = book / f"book/study_{name}.html"
            page = page_checks.soup(path.read_text(encoding="utf-8"))
            text = page.find("article").get_text(" ")
            assert all(label in text for label in study.labels)
            assert study.licence in text
            pictures = page.select("article img")
            wanted = [f"../_images/study-{name}.jpg"]
            if name in ("demo", ran["study"]):  # their slides were there: the chapters read them
                assert [image["src"] for image in pictures] == wanted
            assert len(pictures) == 1 or "there is no picture here" in text
            sizes = [(path.parent / image["src"]).stat().st_size for image in pictures]
            assert all(size < computed_pages.MAX_BYTES for size in sizes)


def test_the_zip_is_the_book(books: list[Path], tmp_path: Path) -> None:
    for book in books:
        packed, line = book / build_book.ZIP, (book / f"{build_book.ZIP}.sha256").read_text()
        assert line == f"{hashlib.sha256(packed.read_bytes()).hexdigest()}  {build_book.ZIP}\n"
        with zipfile.ZipFile(packed) as archive:
            names = {name.removeprefix("stimage-book/") for name in archive.namelist()}
            setup = archive.read("stimage-book/book/setup.html").decode()
        files = {p.relative_to(book).as_posix() for p in book.rglob("*") if p.is_file()}
        assert names == files - {packed.name, f"{packed.name}.sha256"}
        assert build_book.ZIP in setup
        assert f"../{build_book.ZIP}" not in setup, "a link to itself, where it is not"


BREAKAGES = {
    "figure gone": (r'(<img alt="[^"]+"[^>]*src="\.\./_images/)', r"\1gone-", "no such file"),
    "link broken": (r'(<a [^>]*href=")02_tiles\.html', r"\1nowhere.html", "no such file"),
    "anchor broken": (r'id="objectives"', 'id="elsewhere"', "no such anchor"),
    "alt text empty": (r'<img alt="[^"]+"([^>]*_images)', r'<img alt=""\1', "no alt text"),
}


def broken(path: Path, what: str) -> str:
    """Return a page with one thing broken in it."""
    pattern, put, _ = BREAKAGES[what]
    html, times = re.subn(pattern, put, path.read_text(encoding="utf-8"), count=1)
    assert times == 1
    return html


@pytest.mark.parametrize("what", BREAKAGES)
def test_a_chapter_that_is_broken_is_noticed(books: list[Path], what: str) -> None:
    """By the checks that parse a page. Links and empty alt texts are theirs alone.

    A browser asks for figures (see below), but follows no link, and to axe-core an image with an
    empty alt text is a decoration.
    """
    path = books[0] / "notebooks/01_loading.html"
    good, bad = path.read_text(encoding="utf-8"), broken(path, what)
    for html, wanted in ((good, []), (bad, [BREAKAGES[what][2]])):
        found = page_checks.bad_images(html, path) + page_checks.broken_links(html, path)
        assert sorted({line.rpartition(": ")[2] for line in found}) == wanted


def test_the_dataset_page_shows_the_totals(books: list[Path]) -> None:
    facts = json.loads(computed_pages.STORED.read_text(encoding="utf-8"))["facts"]
    for book in books:
        text = page_checks.soup((book / "book/dataset.html").read_text("utf-8")).get_text(" ")
        assert f"{facts['slides']:,} slides" in text
        assert f"{facts['spots']:,} spots" in text
        assert "official table of slides" in text


# --------------------------------------------------------------------------- in a browser

PHONE = 390  # px
# Against the phone itself: a mobile browser widens its own viewport when a page is too wide.
WIDER = f"document.documentElement.scrollWidth - {PHONE}"
FORMULAS = (
    "(() => { const all = [...document.querySelectorAll('.math')];"
    " return [all.length, all.filter(e => !e.querySelector('mjx-container')).length,"
    " document.querySelectorAll('mjx-merror, [data-mjx-error]').length]; })()"
)
THEME = "document.documentElement.dataset.theme"
# What scrolls can be reached with the Tab key, and nothing else among what may scroll.
SCROLLING_IS_KNOWN = """() => [...document.querySelectorAll(
    'pre, .nboutput > .output_area, .cell_output > .output, .jp-RenderedHTMLCommon'
  )].every(e => (e.tabIndex === 0)
    === (e.scrollWidth > e.clientWidth || e.scrollHeight > e.clientHeight))"""


@dataclass
class Visit:
    """What one look at a page brought: all that the tests below ask about."""

    outside: list[str]
    failed: list[str]
    errors: list[str]
    formulas: list[int]
    too_wide: int
    axe: dict[str, list[str]]


def visit(one: Tab, page: Path) -> Visit:
    """Look at a page once: wide and light, wide and dark, then as narrow as a phone."""
    one.page.emulate_media(color_scheme="light")
    one.page.set_viewport_size({"width": 1300, "height": 900})
    one.open(page)
    formulas = one.page.evaluate(FORMULAS)
    one.page.evaluate(ONE_OF_EACH)
    one.page.add_style_tag(content="* {transition: none !important}")  # colours change at once
    found = {"light": one.axe(WCAG, also=LANDMARKS)}
    one.page.emulate_media(color_scheme="dark")
    one.page.wait_for_function(f"{THEME} === 'dark'")
    found["dark"] = one.axe(["color-contrast"])
    one.page.set_viewport_size({"width": PHONE, "height": 844})
    one.page.wait_for_function(SCROLLING_IS_KNOWN)  # the theme looks again after 300 ms
    found["phone"] = one.axe(WCAG, without=["color-contrast"])
    wide = one.page.evaluate(WIDER)
    return Visit(list(one.outside), list(one.failed), list(one.errors), formulas, wide, found)


@pytest.fixture(scope="module")
def visits(chromium: Browser, books: list[Path]) -> dict[str, Visit]:
    """Every page of every book, looked at once for all tests."""
    one = tab(chromium)
    return {
        f"{book.parent.name}/{name}": visit(one, book / f"{name}.html")
        for book in books
        for name in [*NAMES, "search", "genindex"]
    }


def test_the_browser_notices_a_bad_page(chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><div style="width: 600px">x</div>'
        '<span class="math">x^2</span><img src="http://127.0.0.1:9/badge.svg">'
        '<img src="gone.png"><p style="color: #999; background: #fff">pale</p>'
        "<script>document.documentElement.dataset.theme = 'dark'; throw new Error('broken')"
        "</script>"
    )
    found = visit(tab(chromium), page)
    assert found.too_wide > 0
    assert found.formulas == [1, 1, 0]
    assert found.outside == ["http://127.0.0.1:9/badge.svg"]
    assert {url.rpartition("/")[2] for url in found.failed} == {"badge.svg", "gone.png"}
    assert "broken" in found.errors
    for rule in ("image-alt", "html-has-lang", "color-contrast", "landmark-one-main", "region"):
        assert any(line.startswith(rule) for line in found.axe["light"]), rule


@pytest.mark.slow
def test_the_browser_notices_a_chapter_whose_figure_is_gone(
    chromium: Browser, books: list[Path]
) -> None:
    path, one = books[0] / "notebooks/01_loading.html", tab(chromium)
    html = broken(path, "figure gone")
    one.page.route(path.as_uri(), lambda route: route.fulfill(body=html, content_type="text/html"))
    one.open(path)
    assert [Path(url).name.partition("-")[0] for url in one.failed] == ["gone"]


@pytest.mark.slow
def test_nothing_fails_and_no_other_host_is_asked(visits: dict[str, Visit]) -> None:
    for name, seen in visits.items():
        assert seen.outside == [], name
        assert seen.failed == [], name
        assert seen.errors == [], name


@pytest.mark.slow
def test_mathematics_is_typeset(visits: dict[str, Visit]) -> None:
    assert [n for n, seen in visits.items() if seen.formulas[1:] != [0, 0]] == []
    assert sum(seen.formulas[0] for seen in visits.values()) > 0, "no page has a formula"


@pytest.mark.slow
def test_no_page_scrolls_sideways_on_a_phone(visits: dict[str, Visit]) -> None:
    assert {n: seen.too_wide for n, seen in visits.items() if seen.too_wide > 0} == {}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["light", "dark", "phone"])
def test_everybody_can_use_every_page(visits: dict[str, Visit], how: str) -> None:
    """The rules of axe-core for WCAG 2 A and AA, and those about landmarks; none is left out."""
    assert {name: seen.axe[how] for name, seen in visits.items() if seen.axe[how]} == {}


@pytest.mark.slow
def test_search_finds_a_term(chromium: Browser, books: list[Path]) -> None:
    for book in books:
        one = tab(chromium)
        one.open(book / "search.html", "?q=overlap-HVG")
        # Results come one by one; this line comes after the last.
        one.page.locator(".search-summary", has_text="Search finished").wait_for()
        results = one.page.locator("#search-results ul.search li a")
        found = {link.split("#")[0].rpartition("/")[2] for link in results.evaluate_all(
            "links => links.map(a => a.href)"
        )}  # fmt: skip
        assert {"glossary.html", "03_panels.html"} <= {name.split("?")[0] for name in found}
        one.page.close()


@pytest.mark.slow
def test_the_map_of_chapter_9_shows_the_tile_under_the_pointer(
    chromium: Browser, books: list[Path]
) -> None:
    for book in books:
        one = tab(chromium)
        one.open(book / "notebooks/09_maps.html")
        frame = one.page.frame_locator("iframe[srcdoc]").first
        tile, canvas = frame.locator("#tile"), frame.locator("canvas")
        # A frame out of sight draws nothing, so it cannot be waited for: bring it into view first.
        one.page.locator("iframe[srcdoc]").first.evaluate(
            "e => e.scrollIntoView({block: 'center', behavior: 'instant'})"
        )
        before = frame.locator("#text").inner_text()
        assert not tile.is_visible()
        x, y = canvas.evaluate("() => place[0]")
        canvas.hover(position={"x": x, "y": y})
        assert tile.is_visible()
        assert tile.evaluate("e => e.style.backgroundImage").startswith('url("data:image/jpeg')
        assert frame.locator("#text").inner_text() not in ("", before)
        one.page.close()


@pytest.mark.slow
def test_a_chapter_can_be_downloaded(chromium: Browser, books: list[Path]) -> None:
    """From a server: opened from a disk, a browser shows the notebook's text instead."""
    for book in books:
        serve = functools.partial(SimpleHTTPRequestHandler, directory=book)
        with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            page = chromium.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/notebooks/01_loading.html")
            with page.expect_download() as waiting:
                page.get_by_text("Download notebook").click()
            server.shutdown()
        assert waiting.value.suggested_filename == "01_loading.ipynb"
        saved = Path(waiting.value.path()).read_text(encoding="utf-8")
        assert json.loads(saved)["nbformat"] == 4
        page.close()


STAGES = """() => [...document.querySelectorAll('.pipeline a')]
.filter(a => a.getClientRects().length).map(a => {
  a.scrollIntoView({block: 'center', behavior: 'instant'});
  const r = a.getBoundingClientRect();
  const x = r.x + r.width / 2, y = r.y + r.height / 2, hit = document.elementFromPoint(x, y);
  const fill = name => getComputedStyle(a.querySelector('.' + name)).fill;
  return {href: new URL(a.getAttribute('href'), location).href,
    hit: !!hit && a.contains(hit), card: fill('pl-card'),
    texts: ['pl-name', 'pl-what', 'pl-where'].map(fill),
    size: parseFloat(getComputedStyle(a.querySelector('.pl-what')).fontSize)
      * a.ownerSVGElement.getBoundingClientRect().width / a.ownerSVGElement.viewBox.baseVal.width};
})"""


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours ``rgb(r, g, b)``, as the WCAG 2 define it."""

    def luminance(colour: str) -> float:
        parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, 1300])
def test_the_pipeline_can_be_read_and_clicked(
    chromium: Browser, books: list[Path], width: int, theme: str
) -> None:
    """Colours inside a drawing are not looked at by axe-core."""
    for book in books:
        one = tab(chromium, width=width, theme=theme)
        one.open(book / f"{TOC['root']}.html")
        stages = one.page.evaluate(STAGES)
        assert len(stages) == 7
        for stage in stages:
            assert stage["hit"], f"{stage['href']}: covered by something else"
            assert stage["size"] >= 10.5, "too small to read"
            assert min(contrast(stage["card"], text) for text in stage["texts"]) >= 4.5
        one.page.locator(".pipeline a[href*='03_panels']:visible").first.click()
        one.page.wait_for_url("**/notebooks/03_panels.html")
        one.page.close()


def test_chromium_is_found_by_its_path_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert executable() is None
    with pytest.raises(FileNotFoundError, match="no Chromium"), browser():
        raise AssertionError("not reached")


def test_only_ci_must_have_all_that_tests_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STIMAGE_CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no x"):
        missing("no x")
    monkeypatch.setenv("STIMAGE_CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no x"):
        missing("no x")
