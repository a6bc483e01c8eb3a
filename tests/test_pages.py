"""The built pages: complete, whole without a network, readable on a phone.

Which pages: the folders that the environment variable BOOK_HTML names (several with the path
separator of the system); without it, every study below ``_build`` whose pages are newer than all
they were made from; without any such, the pages of `demo`, built for this test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import page_checks
import pytest
import yaml
from browser import Browser, browser, executable

import build_book
import dataset_page
import repository

ROOT = Path(__file__).resolve().parent.parent
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
SEED_TERMS = (
    *("sub-tile", "spot", "HVG", "overlap-HVG"),
    *("contrastive learning", "linear probing", "batch effect"),
)
THEBE = "'THEBE_JS_URL' has already been declared"  # the theme's own, on every page; harmless


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


def fits(record: Path, study: str) -> bool:
    """True when a record of a run belongs to the present notebooks and helpers."""
    ran = json.loads(record.read_text(encoding="utf-8"))
    return not build_book.refusals(ran, TOC, ROOT, study)


def fresh_builds() -> list[Path]:
    """Pages below ``_build`` that are newer than all they were made from."""
    sources = [ROOT / "_config.yml", ROOT / "_toc.yml", Path(dataset_page.__file__)]
    sources += [path for path in (ROOT / "book").rglob("*") if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources)
    found = []
    for record in sorted((ROOT / "_build").glob("*/notebooks/run.json")):
        index = record.parent.parent / "html" / "index.html"
        if (
            index.exists()
            and index.stat().st_mtime > max(newest, record.stat().st_mtime)
            and fits(record, record.parent.parent.name)
        ):
            found.append(index.parent)
    return found


def demo_run(base: Path, out: Path) -> Path:
    """Return executed chapters of `demo`: those of ``test_notebooks.py``, else run into `out`."""
    for record in base.glob("*/notebooks/run.json"):
        if fits(record, "demo"):
            return record.parent
    command = [sys.executable, ROOT / "tools/run_notebooks.py", "--study", "demo", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of built pages that this run of the tests looks at."""
    if named := os.environ.get("BOOK_HTML"):
        return [Path(folder).resolve() for folder in named.split(os.pathsep)]
    if fresh := fresh_builds():
        return fresh
    out = tmp_path_factory.mktemp("book") / "demo"
    executed = demo_run(tmp_path_factory.getbasetemp(), out / "notebooks")
    build_book.stage(ROOT, executed, out / "source", "demo")
    assert build_book.build(out / "source", out / "html"), "the pages cannot be built: see above"
    return [out / "html"]


@pytest.fixture(scope="session")
def pages(books: list[Path]) -> list[Path]:
    """Every HTML page of the books, but not the theme's own parts."""
    found = [p for book in books for p in sorted(book.rglob("*.html")) if "_static" not in p.parts]
    assert found
    return found


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
    facts = json.loads(dataset_page.STORED.read_text(encoding="utf-8"))["facts"]
    typed = dataset_page.words(facts)
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
            page = page_checks.soup((book / f"{name}.html").read_text(encoding="utf-8"))
            links = {a["href"] for a in page.select('a[href*="colab.research"]')}
            assert links == {f"{start}{name}.ipynb"}


def test_the_dataset_page_shows_the_totals(books: list[Path]) -> None:
    facts = json.loads(dataset_page.STORED.read_text(encoding="utf-8"))["facts"]
    for book in books:
        text = page_checks.soup((book / "book/dataset.html").read_text("utf-8")).get_text(" ")
        assert f"{facts['slides']:,} slides" in text
        assert f"{facts['spots']:,} spots" in text
        assert "official table of slides" in text


# --------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    """One tab of a headless Chromium."""
    if executable() is None:
        pytest.skip("no Chromium on this machine: the pages were not looked at in a browser")
    with browser() as opened:
        yield opened


def visited(tab: Browser, books: list[Path], **how: object) -> Iterator[tuple[str, Browser]]:
    """Open every page of the table of contents in every book."""
    for book in books:
        for name in NAMES:
            tab.open(book / f"{name}.html", **how)
            yield f"{book.parent.name}/{name}", tab


PHONE = 390  # px
# Against the phone itself: a mobile browser widens its own viewport when a page is too wide.
WIDER = f"document.documentElement.scrollWidth - {PHONE}"
FORMULAS = (
    "(() => { const all = [...document.querySelectorAll('.math')];"
    " return [all.length, all.filter(e => !e.querySelector('mjx-container')).length,"
    " document.querySelectorAll('mjx-merror, [data-mjx-error]').length]; })()"
)


def outside(requests: list[str]) -> list[str]:
    """Return the requests that left this machine's disk."""
    return [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]


def test_the_browser_notices_a_bad_page(tab: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><div style="width: 600px">x</div>'
        '<span class="math">x^2</span><img src="http://127.0.0.1:9/badge.svg">'
        "<script>throw new Error('broken')</script>"
    )
    tab.open(page, width=PHONE)
    assert tab.run(WIDER) > 0
    assert tab.run(FORMULAS) == [1, 1, 0]
    assert outside(tab.requests) == ["http://127.0.0.1:9/badge.svg"]
    assert "broken" in tab.errors[0]


@pytest.mark.slow
def test_the_browser_asks_no_other_host_and_meets_no_error(tab: Browser, books: list[Path]) -> None:
    for name, page in visited(tab, books):
        assert outside(page.requests) == [], name
        assert [error for error in page.errors if THEBE not in error] == [], name


@pytest.mark.slow
def test_mathematics_is_typeset(tab: Browser, books: list[Path]) -> None:
    total = 0
    for name, page in visited(tab, books):
        formulas, raw, wrong = page.run(FORMULAS)
        assert (raw, wrong) == (0, 0), name
        total += formulas
    assert total > 0, "no page has a formula"


@pytest.mark.slow
def test_no_page_scrolls_sideways_on_a_phone(tab: Browser, books: list[Path]) -> None:
    assert {
        n: w for n, page in visited(tab, books, width=PHONE) if (w := page.run(WIDER)) > 0
    } == {}


STAGES = """[...document.querySelectorAll('.pipeline a')].filter(a => a.getClientRects().length)
.map(a => { a.scrollIntoView({block: 'center', behavior: 'instant'});
  const r = a.getBoundingClientRect();
  const x = r.x + r.width / 2, y = r.y + r.height / 2, hit = document.elementFromPoint(x, y);
  const fill = name => getComputedStyle(a.querySelector('.' + name)).fill;
  return {href: new URL(a.getAttribute('href'), location).href, x, y, width: r.width,
    hit: !!hit && a.contains(hit), card: fill('pl-card'),
    texts: ['pl-name', 'pl-what', 'pl-where'].map(fill),
    size: parseFloat(getComputedStyle(a.querySelector('.pl-what')).fontSize)
      * a.ownerSVGElement.getBoundingClientRect().width / a.ownerSVGElement.viewBox.baseVal.width};
})"""


# The genes stage of the drawing that is shown: the last one with a chapter of its own.
GENES = (
    "[...document.querySelectorAll('.pipeline a')]"
    ".filter(a => a.getClientRects().length && a.getAttribute('href').includes('03_panels'))[0]"
)


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
    tab: Browser, books: list[Path], width: int, theme: str
) -> None:
    for book in books:
        tab.open(book / f"{TOC['root']}.html", width=width, theme=theme)
        stages = tab.run(STAGES)
        assert len(stages) == 7
        for stage in stages:
            assert stage["hit"], f"{stage['href']}: covered by something else"
            assert stage["size"] >= 10.5, "too small to read"
            assert min(contrast(stage["card"], text) for text in stage["texts"]) >= 4.5
        tab.run(f"{GENES}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        place = tab.run(f"{GENES}.getBoundingClientRect().toJSON()")
        tab.click(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
        assert tab.run("location.pathname").endswith("/notebooks/03_panels.html")


def test_chromium_is_found_by_its_path_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert executable() is None
    with pytest.raises(FileNotFoundError, match="no Chromium"), browser():
        raise AssertionError("not reached")
