"""Draw the pipeline of the book: ``python book/figures/pipeline.py`` rewrites both SVG files.

``pipeline.svg`` is wide (README, large screens) and ``pipeline-tall.svg`` is for phones. The
welcome page shows one of them inline, so that its links work and its colours follow the page's
theme. When a chapter arrives, change its row in `STAGES`, run this file and commit the result.
"""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Stage:
    """One card: its modules, what they hand on, and where the book explains it."""

    modules: tuple[str, ...]
    what: tuple[str, str]
    where: str
    link: str  # relative to the folder book/


STAGES = (
    Stage(
        ("files", "catalog", "simulate"), ("which slides", "there are"), "dataset", "dataset.html"
    ),
    Stage(
        ("images", "counts", "slides"),
        ("one slide,", "checked"),
        "chapter 1",
        "../notebooks/01_loading.html",
    ),
    Stage(("tiles",), ("a picture", "per spot"), "chapter 2", "../notebooks/02_tiles.html"),
    Stage(("genes",), ("a panel", "with names"), "chapter 3", "../notebooks/03_panels.html"),
    Stage(
        ("towers",), ("each input", "to a vector"), "chapter 6", "../notebooks/06_clip_plip.html"
    ),
    Stage(
        ("contrast", "training"),
        ("pairs pulled", "together"),
        "chapters 5, 7",
        "../notebooks/05_contrastive.html",
    ),
    Stage(
        ("splits", "probing", "metrics", "plots"),
        ("what it", "is worth"),
        "chapters 8-11",
        "../notebooks/08_probing.html",
    ),
)

# A page may set the variables (custom.css does, for dark and light); alone, the file is light.
STYLE = """
.pl-card{fill:var(--pl-card,#fff);stroke:var(--pl-line,#8579b8);stroke-width:1.4}
.pl-name{font:600 14px system-ui,sans-serif;fill:var(--pl-text,#1d2130)}
.pl-what{font:12px system-ui,sans-serif;fill:var(--pl-text,#1d2130)}
.pl-where{font:600 10.5px system-ui,sans-serif;fill:var(--pl-a,#4b3f8f)}
.pl-a{fill:var(--pl-a,#4b3f8f)}.pl-b{fill:var(--pl-b,#c2527f)}.pl-c{fill:var(--pl-c,#1b7f79)}
.pl-d{fill:var(--pl-d,#e7e2f3)}
.pl-arrow{fill:none;stroke:var(--pl-muted,#5f6472);stroke-width:1.6}
.pl-stage:hover .pl-card,.pl-stage:focus .pl-card{stroke-width:3;fill:var(--pl-hover,#f4f1fb)}
.pl-stage{outline:none}
"""


def box(x: float, y: float, width: float, height: float, kind: str, radius: float = 0) -> str:
    """Return one filled rectangle."""
    corner = f' rx="{radius}"' if radius else ""
    return (
        f'<rect class="pl-{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        f"{corner}/>"
    )


def dot(x: float, y: float, radius: float, kind: str) -> str:
    """Return one filled circle."""
    return f'<circle class="pl-{kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>'


def icon(modules: tuple[str, ...]) -> str:
    """Return the drawing of a stage inside a square of 40 x 40."""
    if "catalog" in modules:  # a table of slides
        rows = [
            box(4, y, 7, 6, "b") + box(14, y, w, 6, "d")
            for y, w in ((6, 22), (15, 17), (24, 20), (33, 12))
        ]
        return "".join(rows)
    if "slides" in modules:  # tissue with spots
        tissue = '<path class="pl-d" d="M6 22C3 10 14 2 24 4s15 11 12 20-12 14-20 12S8 29 6 22z"/>'
        spots = [(14, 12), (22, 11), (30, 15), (11, 20), (19, 20), (27, 22), (16, 29), (25, 30)]
        kinds = "bbabaacc"
        return tissue + "".join(dot(*p, 2.8, k) for p, k in zip(spots, kinds, strict=True))
    if "tiles" in modules:  # little pictures in a grid
        grid = [(x, y) for y in (3, 15, 27) for x in (3, 15, 27)]
        return "".join(
            box(x, y, 10, 10, "d", 1.5) + dot(x + 3 + i % 4, y + 4 + i % 3, 1.9, "ab"[i % 2])
            for i, (x, y) in enumerate(grid)
        )
    if "genes" in modules:  # a heat map, one column named by the row of ticks above it
        kinds = ("abdda", "dbbda", "adbcd", "ddacc")
        return "".join(
            box(3 + 7 * x, 10 + 7 * y, 6, 6, kind)
            for y, row in enumerate(kinds)
            for x, kind in enumerate(row)
        ) + "".join(box(5 + 7 * x, 3, 2, 5, "c") for x in range(5))
    if "towers" in modules:  # two encoders side by side
        return (
            '<path class="pl-b" d="M3 36V6l14 9v12z"/><path class="pl-c" d="M37 36V6l-14 9v12z"/>'
            + box(18, 15, 4, 12, "d")
        )
    if "contrast" in modules:  # similarities of pairs: the diagonal shall win
        return "".join(
            box(3 + 9 * x, 3 + 9 * y, 7.5, 7.5, "a" if x == y else "d")
            for x in range(4)
            for y in range(4)
        )
    bars = ((5, 14, "d"), (14, 20, "c"), (23, 28, "a"), (32, 11, "b"))  # scores
    return "".join(box(x, 36 - h, 6, h, kind) for x, h, kind in bars) + box(3, 36, 36, 1.6, "a")


def link(stage: Stage, body: str) -> str:
    """Wrap the drawing of a stage in its link."""
    label = f"{', '.join(stage.modules)}: {' '.join(stage.what)} ({stage.where})"
    return f'<a class="pl-stage" href="{stage.link}" aria-label="{label}">{body}</a>'


def text(x: float, y: float, kind: str, words: str, anchor: str = "middle") -> str:
    """Return one line of text."""
    return f'<text class="pl-{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def document(width: int, height: int, name: str, parts: list[str]) -> str:
    """Return a whole SVG file, without blank lines, so that a page can hold it inline."""
    words = "The pipeline of the book, from the catalogue of slides to the evaluation of a model."
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pl-{name}" viewBox="0 0 {width} {height}"'
        f' role="group" aria-label="{words}">\n<style>{STYLE}</style>'
    )
    back = f'<rect width="{width}" height="{height}" rx="10" fill="var(--pl-back,#fbfaff)"/>'
    return "\n".join([head, back, *parts, "</svg>"]) + "\n"


def wide() -> str:
    """Return the drawing with the stages side by side."""
    step, width = 104, 92
    parts = []
    for i, stage in enumerate(STAGES):
        x = 10 + step * i
        middle = x + width / 2
        first = 104 - 8 * (len(stage.modules) - 1)  # names are centred, up to four lines
        names = [text(middle, first + 16 * k, "name", m) for k, m in enumerate(stage.modules)]
        body = (
            box(x, 12, width, 184, "card", 9)
            + f'<g transform="translate({middle - 20:g} 22)">{icon(stage.modules)}</g>'
            + "".join(names)
            + text(middle, 149, "what", stage.what[0])
            + text(middle, 164, "what", stage.what[1])
            + text(middle, 185, "where", stage.where)
        )
        parts.append(link(stage, body))
        if i:
            parts.append(f'<path class="pl-arrow" d="M{x - 11:g} 104h8m-3.5-3.5l3.5 3.5-3.5 3.5"/>')
    return document(20 + step * len(STAGES) - (step - width), 208, "wide", parts)


def tall() -> str:
    """Return the drawing with the stages below each other."""
    step, height, width = 72, 58, 330
    parts = []
    for i, stage in enumerate(STAGES):
        y = 8 + step * i
        body = (
            box(8, y, width, height, "card", 9)
            + f'<g transform="translate(18 {y + 9:g})">{icon(stage.modules)}</g>'
            + text(72, y + 25, "name", ", ".join(stage.modules), "start")
            + text(72, y + 44, "what", " ".join(stage.what), "start")
            + text(326, y + 44, "where", stage.where, "end")
        )
        parts.append(link(stage, body))
        if i:
            parts.append(f'<path class="pl-arrow" d="M173 {y - 12:g}v8m-3.5-3.5l3.5 3.5 3.5-3.5"/>')
    return document(width + 16, 16 + step * len(STAGES) - (step - height), "tall", parts)


if __name__ == "__main__":
    (HERE / "pipeline.svg").write_text(wide(), encoding="utf-8", newline="\n")
    (HERE / "pipeline-tall.svg").write_text(tall(), encoding="utf-8", newline="\n")
