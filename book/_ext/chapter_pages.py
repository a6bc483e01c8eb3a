"""What a chapter's page has beyond its notebook, as an extension of Sphinx.

Figures are numbered by chapter (Fig. 3.1). Under its title a chapter says how long it takes to
read and how long its code ran in the very run that the page shows, with a link to Colab and one to
the notebook. Where a chapter first names a term of the glossary, the word leads there: notebooks
use plain Markdown and cannot say so themselves. And what Sphinx writes in a way that screen readers
stumble over is put right.
"""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes

WORDS_PER_MINUTE = 200
COLAB = "Open in Colab"
GLOSSARY = "book/glossary"
COMMON = {"section"}  # mostly meant in the sense of every day
EARLY_FONT = re.compile(r'<link rel="preload" as="font"[^>]*>\s*')
THEBE = re.compile(r"<script>const THEBE_JS_URL.*?</script>\s*")
TOGGLE = '><span class="toctree-toggle'
UNFOLD = f"<summary{TOGGLE}", f'<summary aria-label="Pages below"{TOGGLE}'
FORMULA = re.compile(r'<div (?=class="(?:amsmath )?math )')  # wider than a phone: its box scrolls


def chapter(docname: str) -> int | None:
    """Return the number of a chapter, None for any other page."""
    found = re.match(r"notebooks/(\d+)_", docname)
    return int(found[1]) if found else None


def number_figures(env: Any) -> None:
    """Count the figures of each chapter from 1, after the number of the chapter.

    Sphinx has numbered them from 1 to the last of the book.
    """
    for docname, kinds in env.toc_fignumbers.items():
        number = chapter(docname)
        for kind in kinds.values() if number else ():
            kind.update({name: (number, i) for i, name in enumerate(kind, start=1)})


def reading_minutes(doctree: nodes.document) -> int:
    """Return the minutes it takes to read the prose of a page; code and outputs are not counted."""
    words = 0
    for node in doctree.findall(nodes.TextElement):
        if isinstance(node, nodes.paragraph | nodes.title | nodes.caption):
            words += len(node.astext().split())
    return max(1, round(words / WORDS_PER_MINUTE))


def spoken(seconds: float) -> str:
    """Write a time as people say it: in seconds below two minutes, then in minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def facts(docname: str, minutes: int, seconds: float, colab: str) -> str:
    """Return the line under a chapter's title."""
    name = docname.rpartition("/")[2]
    return (
        '<div class="chapter-facts"><p>'
        f"About {minutes} min to read, code and exercises not counted. "
        f"The code of this page ran for {spoken(seconds)}.</p><p>"
        f'<a class="door" href="{escape(colab)}">{COLAB}</a> '
        f'<a class="door" href="../_sources/notebooks/{name}.ipynb" download="{name}.ipynb">'
        "Download notebook</a></p></div>"
    )


def finish(app: Any, doctree: nodes.document, docname: str) -> None:
    """Put the line under the title, in the place of the notebook's link to Colab; link terms."""
    if chapter(docname) is None or app.builder.format != "html":
        return
    record = json.loads((Path(app.srcdir) / "notebooks" / "run.json").read_text(encoding="utf-8"))
    seconds = record["chapters"][docname.rpartition("/")[2]]["seconds"]
    link = next(n for n in doctree.findall(nodes.reference) if n.astext() == COLAB)
    html = facts(docname, reading_minutes(doctree), seconds, link["refuri"])
    title = next(doctree.findall(nodes.title))
    title.parent.insert(title.parent.index(title) + 1, nodes.raw("", html, format="html"))
    link.parent.parent.remove(link.parent)
    link_terms(doctree, glossary(app.env), app.builder.get_relative_uri(docname, GLOSSARY))


def glossary(env: Any) -> dict[str, str]:
    """Return the anchor of every term of the glossary."""
    return {
        name: anchor
        for name, _, kind, page, anchor, _ in env.domains["std"].get_objects()
        if kind == "term" and page == GLOSSARY and name not in COMMON
    }


def link_terms(doctree: nodes.document, terms: dict[str, str], page: str) -> None:
    """Link the first mention of each term in prose to its anchor on the glossary's page."""
    words = "|".join(re.escape(t) for t in sorted(terms, key=len, reverse=True))
    mention = re.compile(rf"(?<![\w-])({words})s?(?![\w-])", re.I)
    left = dict(terms)
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.paragraph | nodes.emphasis) or is_link(text):
            continue
        parts: list[nodes.Node] = []
        end = 0
        for found in mention.finditer(text):
            name = found[1] if found[1] in terms else found[1].lower()
            if name in left:
                link = nodes.reference(
                    "", found[0], refuri=f"{page}#{left.pop(name)}", internal=True
                )
                link["classes"].append("glossary-term")
                parts += [nodes.Text(text[end : found.start()]), link]
                end = found.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(text[end:])])


def is_link(node: nodes.Node) -> bool:
    """Say whether a node lies in a link already, or in the list of references."""
    while node := node.parent:
        if isinstance(node, nodes.reference | nodes.title) or "references" in node.get("ids", ()):
            return True
    return False


def put_right(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Mend the body of a page: sources are items of their list, formulas can be scrolled by key."""
    body = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')
    context["body"] = FORMULA.sub('<div tabindex="0" ', body)


def clear_up(app: Any, error: Exception | None) -> None:
    """Take out of every page what fails when it is opened from a disk."""
    for path in Path(app.outdir).rglob("*.html") if error is None else ():
        text = path.read_text(encoding="utf-8")
        path.write_text(without_errors(text), encoding="utf-8")


def without_errors(html: str) -> str:
    """Return a page without the theme's faults.

    Fonts are asked for too early, a constant is set twice, and the button that unfolds a part of
    the list of pages has no name.
    """
    html = EARLY_FONT.sub("", html).replace(*UNFOLD)
    first = THEBE.search(html)
    return html[: first.end()] + THEBE.sub("", html[first.end() :]) if first else html


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("env-check-consistency", lambda app, env: number_figures(env))
    app.connect("doctree-resolved", finish)
    app.connect("html-page-context", put_right)
    app.connect("build-finished", clear_up)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
