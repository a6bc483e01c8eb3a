"""What a finished page must keep, as functions from HTML to a list of what is wrong with it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from bs4 import BeautifulSoup

# <link> elements with these relations only name something; the others make the browser fetch it.
NAMING_RELATIONS = {
    *("alternate", "author", "canonical", "help", "index", "license", "next", "prev", "search"),
}
LOADING = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "input": ("src",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
CSS_LOADING = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s;]+)""", re.I)
LEFTOVER = re.compile(r"\{\{|\{[a-z][a-z:]+\}`|:::|\[\?\]|\?\?\?")


def soup(html: str) -> BeautifulSoup:
    """Parse a page."""
    return BeautifulSoup(html, "html.parser")


def is_foreign(address: str) -> bool:
    """True for an address on another host (``http://``, ``https://``, ``//``)."""
    return bool(re.match(r"\s*(?:https?:)?//", address, re.I))


def foreign_in_css(css: str) -> list[str]:
    """Return the addresses on other hosts that a style sheet would fetch."""
    return [match.group(1) for match in CSS_LOADING.finditer(css)]


def foreign(html: str) -> list[str]:
    """Return the addresses on other hosts that a page would fetch by itself."""
    page, found = soup(html), []
    for name, attributes in LOADING.items():
        for element in page.find_all(name):
            if name == "link" and set(element.get("rel", [])) <= NAMING_RELATIONS:
                continue
            for attribute in attributes:
                value = element.get(attribute, "")
                parts = value.split(",") if attribute == "srcset" else [value]
                found += [part.strip() for part in parts if is_foreign(part)]
    for element in page.find_all("style"):
        found += foreign_in_css(element.get_text())
    for element in page.find_all(style=True):
        found += foreign_in_css(element["style"])
    for element in page.find_all("meta", attrs={"http-equiv": re.compile("refresh", re.I)}):
        found += re.findall(r"url=\s*((?:https?:)?//\S+)", element.get("content", ""), re.I)
    return found


def anchors(page: BeautifulSoup) -> frozenset[str]:
    """Return every anchor of a page."""
    named = [element["name"] for element in page.find_all("a", attrs={"name": True})]
    return frozenset([element["id"] for element in page.find_all(id=True)] + named)


@cache
def anchors_of_file(path: Path) -> frozenset[str]:
    """Return every anchor of a page on the disk."""
    return anchors(soup(path.read_text(encoding="utf-8")))


def broken_links(html: str, path: Path) -> list[str]:
    """Return the internal links of a page at `path` whose file or anchor does not exist."""
    page, found = soup(html), []
    own = anchors(page)
    for element in page.find_all("a", href=True):
        href = element["href"]
        if urlsplit(href).scheme or is_foreign(href):
            continue
        target, anchor = urldefrag(href)
        file = path.parent / unquote(urlsplit(target).path)
        if target and not file.is_file():
            found.append(f"{href}: no such file")
        elif anchor and (not target or file.suffix == ".html"):
            known = anchors_of_file(file.resolve()) if target else own
            if unquote(anchor) not in known:
                found.append(f"{href}: no such anchor")
    return found


def bad_images(html: str, path: Path) -> list[str]:
    """Return the images of a page at `path` that do not exist or say nothing in their alt text."""
    found = []
    for element in soup(html).find_all("img"):
        source = element.get("src", "")
        shown = source[:60]
        if not element.get("alt", "").strip() or element["alt"].strip() == source:
            found.append(f"{shown}: no alt text")
        if not source.startswith("data:") and not is_foreign(source):
            file = path.parent / unquote(urlsplit(source).path)
            if not file.is_file():
                found.append(f"{shown}: no such file")
    return found


def unresolved(html: str) -> list[str]:
    """Return what the build left unresolved: references, roles, substitutions, citations."""
    page = soup(html)
    main = page.find("article") or page
    found = [f"message: {e.get_text()[:80]}" for e in main.select(".problematic, .system-message")]
    found += [
        f"reference without a target: {e.get_text()}"
        for e in main.select(".xref")
        if e.find_parent("a") is None
    ]
    for element in main.select("pre, script, style, .math"):
        element.decompose()
    found += [
        f"left over: {main.get_text()[max(0, m.start() - 30) : m.end() + 30]!r}"
        for m in LEFTOVER.finditer(main.get_text())
    ]
    return found
