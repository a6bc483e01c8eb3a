"""Compute the page of results: every measured row of ``results/`` as a table, and one figure.

The table is plain HTML, complete without a script; ``book/_static/results.js`` lets it be sorted
and filtered. `stage` puts both into the staged copy of the book and returns the page's values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from math import isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from notebooks import ROOT

FOLDER = ROOT / "results"
MEASURES = {"macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy"}
RECALL = "recall@10 times chance"
DONOR = "left-out donor"
SPLITS = {  # colour (seaborn "colorblind") and marker of each
    "random spots": ("#de8f05", "o"),
    "spatial blocks": ("#029e73", "s"),
    "left-out section": ("#949494", "v"),
    DONOR: ("#0173b2", "D"),
}
ORDER = (
    *("majority", "coordinates", "neighbours", "mean RGB", "colour numbers", "texture numbers"),
    *("hand-made", "genes", "mini before", "mini after", "imagenet-random before"),
    *("imagenet before", "imagenet after", "imagenet before + hand-made"),
    "imagenet after + hand-made",
)
"""Features from top to bottom of the figure; others follow."""
COLUMNS = (
    *("study", "what", "features", "split", "seed", "measure", "value", "interval", "remarks"),
    "measured",
)
FILTERS = {"study": "", "what": "score", "split": "", "seed": "0", "measure": "macro-F1"}
"""Columns to choose from, and what is chosen first (an empty text: all)."""


class Row(NamedTuple):
    """A row of the page's table."""

    study: str
    what: str
    features: str
    split: str
    seed: int
    measure: str
    value: float
    low: float
    high: float
    remarks: str
    measured: str


# --- the files ----------------------------------------------------------------------------------


def report(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Read a file of results; without the file, a report without rows."""
    path = (folder or FOLDER) / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def run_of(row: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """Say on which day and from which commit a row was measured."""
    commit = row.get("commit", whole["commit"])
    changes = " with changes" * commit.endswith("-changed")
    return f"{row.get('measured', whole['measured'])}, {commit[:7]}{changes}"


def of_ladder(whole: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of ``ladder.json``."""
    for row in whole["rows"]:
        features, split = row["features"], row["split"]
        what = row.get("what") or (
            "difference" if " minus " in features else "gap" if split.startswith("gap") else "score"
        )
        remarks = [row.get("variant", ""), donors(row), row.get("note", "")]
        if "n_train" in row:
            remarks.append(f"probe trained on {row['n_train']} spots per fold")
        yield Row(
            named(row), what, features, split, row["seed"],
            MEASURES.get(row.get("measure"), ""), *numbers(row), joined(remarks),
            run_of(row, whole),
        )  # fmt: skip


def of_finetune(whole: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of ``finetune.json``: one for each measurement of a training."""
    for row in whole["rows"]:
        tower, variant = row.get("tower", "mini"), row.get("variant", "")
        what, run = row["question"], run_of(row, whole)
        if "value" in row:
            tested = row["judged_on"] == row["held_out"] or row["held_out"] == "each"
            role = "test" if tested else "validation"
            split = f"{role} donor {row['judged_on']}" + f", {row['held_out']} unseen" * (
                not tested
            )
            times = row.get(RECALL)
            remarks = ["chosen" * bool(row.get("chosen")), donors(row), row.get("note", "")]
            remarks.append("" if times is None else f"recall@10 {times:.1f} times chance")
            yield Row(
                named(row), what, f"{tower}, {variant}", split, row["seed"], "macro-F1",
                *numbers(row), joined(remarks), run,
            )  # fmt: skip
            continue
        split = f"test donor {row['held_out']}"
        facts = joined([variant, f"panel {row['panel']}", f"{row['epochs']} epochs"])
        fixed = (named(row), what)
        for key, value in row.items():
            if key.startswith("probe "):
                name = key.removeprefix("probe ")
                name = f"{tower} {name}" if name.startswith(("before", "after")) else name
                yield Row(*fixed, name, split, row["seed"], "macro-F1", value, nan, nan, facts, run)
        gain = {k: row.get(f"after minus before {k}") for k in ("value", "low", "high")}
        if gain["value"] is not None:
            name = f"{tower} after minus {tower} before"
            remarks = joined([row.get("after minus before note", ""), facts])
            yield Row(*fixed, name, split, row["seed"], "macro-F1", *numbers(gain), remarks, run)
        if RECALL in row:
            name, measure = f"{tower} after", "recall@10, times chance"
            yield Row(*fixed, name, split, row["seed"], measure, row[RECALL], nan, nan, facts, run)


def named(row: Mapping[str, Any]) -> str:
    """Name the study, and say so if it is simulated."""
    return row["study"] + " (simulated)" * (row.get("data") == "simulated")


def numbers(row: Mapping[str, Any]) -> list[float]:
    """Return value, low and high; NaN for what is not there."""
    return [nan if row.get(k) is None else float(row[k]) for k in ("value", "low", "high")]


def donors(row: Mapping[str, Any]) -> str:
    """Write the donors' own values."""
    each = row.get("donors", {}).items()
    return "by donor: " * bool(each) + ", ".join(f"{name} {value:.2f}" for name, value in each)


def joined(remarks: Iterable[str]) -> str:
    """Join remarks that are not empty."""
    return "; ".join(text for text in remarks if text)


def all_rows(folder: Path | None = None) -> list[Row]:
    """Return every row of the page's table."""
    found = list(of_ladder(report("ladder.json", folder)))
    return found + list(of_finetune(report("finetune.json", folder)))


# --- the table ----------------------------------------------------------------------------------


def cells(row: Row) -> list[str]:
    """Return the texts of a row, one per column."""
    value = "not measured" if isnan(row.value) else f"{row.value:.3f}"
    interval = "" if isnan(row.low) else f"[{row.low:.3f}, {row.high:.3f}]"
    texts = (row.study, row.what, row.features, row.split, str(row.seed), row.measure)
    return [*texts, value, interval, row.remarks, row.measured]


def table(found: Iterable[Row]) -> str:
    """Return the table as HTML, with what its script needs to know in attributes."""
    head = "".join(
        f'<th scope="col"{first_choice(name)}>{escape(name.capitalize())}</th>' for name in COLUMNS
    )
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in cells(row)) + "</tr>"
        for row in found
    )
    return (
        '<div class="results">\n<form class="results-filters" hidden></form>\n'
        '<p class="results-count" role="status"></p>\n'
        '<div class="results-box" role="region" aria-label="Table of results" tabindex="0">\n'
        f'<table aria-label="Every measured result">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>\n</div>\n"
        '<script src="../_static/results.js"></script>\n'
    )


def first_choice(name: str) -> str:
    """Return the attribute of a column that can be chosen from."""
    return f' data-filter="{escape(FILTERS[name])}"' if name in FILTERS else ""


# --- the figure ---------------------------------------------------------------------------------


def scores(whole: Mapping[str, Any]) -> dict[str, dict[str, dict[str, list[dict]]]]:
    """Return macro-F1 by study, features and split, one row per seed, in the figure's order."""
    found: dict = {}
    for row in whole["rows"]:
        wanted = {"what": "score", "measure": "macro_f1", "variant": ""}
        if "value" in row and all(row.get(k) == v for k, v in wanted.items()):
            of = found.setdefault(named(row), {}).setdefault(row["features"], {})
            of.setdefault(row["split"], []).append(row)
    place = {name: i for i, name in enumerate(ORDER)}
    return {
        study: dict(sorted(kinds.items(), key=lambda item: place.get(item[0], len(ORDER))))
        for study, kinds in found.items()
    }


def draw(found: Mapping[str, Mapping], path: Path) -> None:
    """Draw macro-F1 by features and split, a panel per study, as an SVG on a light background."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    sizes = [len(kinds) + 2 for kinds in found.values()]
    with mpl.rc_context(style | {"svg.hashsalt": "stimage-book"}):  # equal numbers, equal files
        figure = Figure((5.6, 0.27 * sum(sizes) + 0.5), layout="constrained", facecolor="white")
        ratios = {"height_ratios": sizes}
        panels = figure.subplots(len(found), sharex=True, squeeze=False, gridspec_kw=ratios)
        for axes, (study, kinds) in zip(panels[:, 0], found.items(), strict=True):
            draw_study(axes, kinds)
            axes.set_title(study, loc="left", fontsize=9, fontweight="bold")
        panels[-1, 0].set_xlabel("macro-F1")
        there = {split for kinds in found.values() for of in kinds.values() for split in of}
        keys = [
            Line2D([], [], color=colour, marker=marker, lw=1.2, ms=4, label=split)
            for split, (colour, marker) in SPLITS.items()
            if split in there
        ]
        figure.legend(handles=keys, loc="outside upper left", ncols=2, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def draw_study(axes: Axes, kinds: Mapping[str, Mapping[str, list[dict]]]) -> None:
    """Draw one line per kind of features, a marker with its interval per split."""
    names = [split for split in SPLITS if any(split in of for of in kinds.values())]
    for y, of in enumerate(kinds.values()):
        for i, split in enumerate(names):
            at = y + 0.22 * (i - (len(names) - 1) / 2)
            colour, marker = SPLITS[split]
            for row in of.get(split, ()):
                value, low, high = numbers(row)
                if row["seed"] == 0:
                    axes.plot([low, high], [at, at], color=colour, lw=1.2, solid_capstyle="butt")
                axes.plot(
                    value, at, marker, color=colour, ms=4 if row["seed"] == 0 else 3,
                    mfc=colour if row["seed"] == 0 else "none", mew=0.8,
                )  # fmt: skip
    axes.set(yticks=range(len(kinds)), yticklabels=list(kinds), ylim=(len(kinds) - 0.4, -0.6))
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)


def alt_text(found: Mapping[str, Mapping]) -> str:
    """Say in words what the figure shows: the best and the worst features of each study."""
    texts = ["Dots by features, one panel per study, a colour for each split, with intervals."]
    for study, kinds in found.items():
        strict = [s for s in SPLITS if any(s in of for of in kinds.values())][-1]
        values = {
            name: next((r["value"] for r in of.get(strict, ()) if r["seed"] == 0), None)
            for name, of in kinds.items()
        }
        ranked = sorted((v, name) for name, v in values.items() if v is not None)
        if ranked:
            (low, last), (high, first) = ranked[0], ranked[-1]
            texts.append(
                f"On {strict} of {study}, from {high:.2f} ({first}) down to {low:.2f} ({last})."
            )
    return " ".join(texts)


def figure_block(found: Mapping[str, Mapping]) -> str:
    """Return the figure of the page, or a sentence in its place."""
    if not found:
        return "There is no score to draw: `make results` measures them."
    return (
        "```{figure} figures/results.svg\n:name: fig-results\n:class: chart\n"
        f":alt: {alt_text(found)}\n\n"
        "Macro-F1 by features and split: seed 0 with its 95 % interval where there is one,"
        " other seeds as open markers.\n```"
    )


# --- the page -----------------------------------------------------------------------------------


def files_table(folder: Path | None = None) -> list[list[str]]:
    """Return what each file of results holds, and its day, commit and machine."""
    body = []
    for path in sorted((folder or FOLDER).glob("*.json")):
        whole = report(path.name, folder)
        if "rows" not in whole:  # totals of the dataset, which have a page of their own
            continue
        machine = whole["machine"]
        device = f"{machine['processor']}, {machine['cores']} cores"
        commit = run_of({}, whole).rpartition(", ")[2]
        what = whole["what"].partition("benchmarks/")[0].rstrip(";, ").removesuffix(", by")
        data = sorted({str(row["data"]) for row in whole["rows"] if "data" in row})
        rows = str(len(whole["rows"]))
        body.append(
            [f"`{path.name}`", what, rows, "; ".join(data) or "made up", device,
             f"{whole['measured']}, {commit}"]
        )  # fmt: skip
    return body


FILES_HEAD = ["file", "what", "rows", "data", "machine", "last measured"]


def stage(figures: Path, folder: Path | None = None) -> dict[str, str]:
    """Write table and figure into the folder of figures; return the substitutions of the page."""
    found, kinds = all_rows(folder), scores(report("ladder.json", folder))
    (figures / "results-table.html").write_text(table(found), encoding="utf-8")
    if kinds:
        draw(kinds, figures / "results.svg")
    compared = sum(" minus " in row.features and not isnan(row.low) for row in found)
    return {
        "results_count": f"{len(found):,}",
        "results_compared": f"{compared:,}",
        "results_by_chance": f"{compared / 20:.0f}",
        "results_figure": figure_block(kinds),
    }
