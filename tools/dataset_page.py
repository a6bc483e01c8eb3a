"""Compute the numbers and figures of the page "The dataset", so that nobody types them.

``stage`` adds them to a staged copy of the book: as MyST substitutions in its ``_config.yml`` and
as SVG files in its ``book/figures``. The official table of slides is the source wherever it can be
had; without it the page is made from ``results/catalogue.json``, and says so. Run as a script, this
file writes ``results/catalogue.json`` anew: totals only, never a row of the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "results" / "catalogue.json"
NAMES = {"ST": "Spatial Transcriptomics", "Visium": "Visium", "VisiumHD": "Visium HD"}
COLOURS = {"ST": "#0173b2", "Visium": "#de8f05", "VisiumHD": "#029e73"}  # seaborn "colorblind"
INK = {"ST": "white", "Visium": "black", "VisiumHD": "black"}  # readable on each of them
GENE_BINS = tuple(range(0, 105_000, 5_000))
TISSUES_SHOWN = 12

logger = logging.getLogger(__name__)
Facts = dict[str, Any]


# --------------------------------------------------------------------------- the numbers


def facts(table: pd.DataFrame) -> Facts:
    """Reduce the table of slides to the totals that the page shows.

    Parameters
    ----------
    table
        As ``helpers.catalog.metadata`` returns it.

    Returns
    -------
    dict of plain numbers, ready for JSON. `dense_gb` is the size of all counts as dense float32
    matrices, one per slide, in 1e9 bytes.
    """
    from helpers import catalog

    per_tech = catalog.summary(table)
    genes = table["gene_num"]
    return {
        "slides": len(table),
        "spots": int(table["spot_num"].sum()),
        "technologies": {
            tech: {
                "slides": int(per_tech.loc[tech, "slides"]),
                "spots": int(per_tech.loc[tech, "spots"]),
                "median": float(per_tech.loc[tech, "median"]),
            }
            for tech in NAMES
        },
        "species": _count(table["species"]),
        "tissues": _count(table["tissue"]),
        "tissue_labels_raw": int(table["tissue_raw"].nunique()),
        "cancer_slides": int(table["involve_cancer"].sum()),
        "genes": {
            "min": int(genes.min()),
            "median": float(genes.median()),
            "max": int(genes.max()),
            "between_15000_and_30000": int(genes.between(15_000, 30_000).sum()),
            "bins": list(GENE_BINS),
            "slides": np.histogram(genes, bins=GENE_BINS)[0].tolist(),
        },
        "dense_gb": round(float((table["spot_num"] * genes).sum() * 4 / 1e9), 1),
    }


def _count(labels: pd.Series) -> dict[str, int]:
    """Slides per label, the most frequent first, ties by name."""
    counts = labels.value_counts()
    return {str(k): int(counts[k]) for k in sorted(counts.index, key=lambda k: (-counts[k], k))}


def official() -> tuple[Facts, str] | None:
    """Return the facts of the official table and its SHA-256, or None when it cannot be had.

    A table of another content (such as that of a simulated study) is not the official one.
    """
    from helpers import catalog, files

    try:
        path = catalog.metadata_path()
        sha256 = files.sha256(path)
        if sha256 != catalog.METADATA_SHA256:
            logger.warning("%s is not the official table of slides: %s", path, sha256)
            return None
        return facts(catalog.metadata()), sha256
    except catalog.DataError as error:
        logger.info("%s", error)
        logger.warning(
            "The official table of slides cannot be had here: the dataset page takes its totals"
            " from results/catalogue.json, and says so."
        )
        return None


def write_stored(path: Path = STORED) -> None:
    """Compute the facts from the official table and store them, with what they came from."""
    found = official()
    if found is None:
        raise SystemExit("The official table cannot be had: set STIMAGE_ROOT, or connect.")
    numbers, sha256 = found
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    stored = {
        "what": "totals of STimage-1K4M's table of slides, by tools/dataset_page.py",
        "table_sha256": sha256,
        "computed": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or "before the first commit",
        "facts": numbers,
    }
    path.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- words and tables


def whole(number: float) -> str:
    """Write a number without decimals and with commas."""
    return f"{number:,.0f}"


def rows(head: list[str], body: list[list[str]], align: str) -> str:
    """Return a Markdown table; `align` holds ``l`` or ``r`` per column."""
    rule = ["---:" if side == "r" else ":---" for side in align]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def technology_table(numbers: Facts) -> str:
    """Return slides, spots, share of spots and median spots per slide of each technology."""
    body = [
        [
            NAMES[tech],
            whole(row["slides"]),
            whole(row["spots"]),
            f"{row['spots'] / numbers['spots']:.0%}",
            whole(row["median"]),
        ]
        for tech, row in numbers["technologies"].items()
    ]
    body.append(["all", whole(numbers["slides"]), whole(numbers["spots"]), "100%", ""])
    head = ["technology", "slides", "spots", "share of spots", "median spots per slide"]
    return rows(head, body, "lrrrr")


def study_table(study: Any, loaded: dict[str, Any]) -> str:
    """Return one row per slide of a study, as `load` returns them."""
    from helpers import slides

    prefix, body = common_prefix(study), []
    for section in study.sections:
        adata = loaded[section.slide]
        body.append(
            [
                f"`{section.slide.removeprefix(prefix)}`",
                section.donor,
                whole(adata.n_obs),
                whole(adata.n_vars),
                whole(adata.obs["label"].notna().sum()) if section.annotated else "none",
                f"{slides.um_per_px(adata):.2f}",
            ]
        )
    return rows(["slide", "donor", "spots", "genes", "labelled spots", "µm/px"], body, "llrrrr")


def common_prefix(study: Any) -> str:
    """Return what the names of a study's slides begin with, up to an underscore."""
    names = [section.slide for section in study.sections]
    low, high = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: low.rfind("_", 0, same) + 1]


def words(numbers: Facts) -> dict[str, str]:
    """Return the substitutions that every page may use, by name."""
    tech, genes = numbers["technologies"], numbers["genes"]
    ranked = [f"{name} {count}" for name, count in numbers["tissues"].items()]
    return {
        "n_slides": whole(numbers["slides"]),
        "n_spots": whole(numbers["spots"]),
        "hd_slides": whole(tech["VisiumHD"]["slides"]),
        "hd_share": f"{tech['VisiumHD']['spots'] / numbers['spots']:.0%}",
        "genes_min": whole(genes["min"]),
        "genes_median": whole(genes["median"]),
        "genes_max": whole(genes["max"]),
        "genes_typical": f"{genes['between_15000_and_30000'] / numbers['slides']:.0%}",
        "dense_gb": whole(numbers["dense_gb"]),
        "cancer_slides": whole(numbers["cancer_slides"]),
        "tissues_raw": whole(numbers["tissue_labels_raw"]),
        "tissues_clean": whole(len(numbers["tissues"])),
        "tissues_top": ", ".join(ranked[:3]),
        "species_count": whole(len(numbers["species"])),
        "species_list": ", ".join(f"{k} {v}" for k, v in numbers["species"].items()),
        "technology_table": technology_table(numbers),
    }


# --------------------------------------------------------------------------- figures


def draw(numbers: Facts, folder: Path) -> None:
    """Draw the page's three figures as SVG files into a folder, on a light ground."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "stimage-book",  # the same file from the same numbers
    }
    with mpl.rc_context(settings):
        for name, size, drawing in (
            ("technologies", (3.7, 2.2), _draw_technologies),
            ("tissues", (4.6, 3.2), _draw_tissues),
            ("genes", (3.7, 2.2), _draw_genes),
        ):
            figure = Figure(figsize=size, layout="constrained", facecolor="white")
            drawing(figure.subplots(), numbers)
            figure.savefig(folder / f"dataset-{name}.svg", metadata={"Date": None})


def _draw_technologies(axes: Any, numbers: Facts) -> None:
    """Two full bars: how the technologies share the slides, and how they share the spots."""
    for y, what in ((1, "slides"), (0, "spots")):
        left = 0.0
        for tech, row in numbers["technologies"].items():
            share = 100 * row[what] / numbers[what]
            axes.barh(y, share, left=left, color=COLOURS[tech], label=NAMES[tech] if y else None)
            if share > 8:
                axes.text(
                    left + share / 2, y, f"{share:.0f}%", ha="center", va="center", color=INK[tech]
                )
            left += share
    axes.set(yticks=[1, 0], yticklabels=["slides", "spots"], xlabel="share (%)", xlim=(0, 100))
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.42, 1),
        ncols=3,
        frameon=False,
        fontsize=8,
        columnspacing=0.8,
        handlelength=0.8,
        handletextpad=0.4,
    )


def _draw_tissues(axes: Any, numbers: Facts) -> None:
    """One bar per frequent tissue, and one for all the others."""
    names = list(numbers["tissues"])
    shown = {name: numbers["tissues"][name] for name in names[:TISSUES_SHOWN]}
    rest = names[TISSUES_SHOWN:]
    shown[f"{len(rest)} others"] = sum(numbers["tissues"][name] for name in rest)
    bars = axes.barh(list(shown), list(shown.values()), color=COLOURS["ST"])
    bars[-1].set_color("#949494")
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="slides")
    axes.margins(x=0.12)


def _draw_genes(axes: Any, numbers: Facts) -> None:
    """Histogram of slides by the number of genes in their table."""
    genes = numbers["genes"]
    edges = np.array(genes["bins"]) / 1000
    axes.stairs(genes["slides"], edges, fill=True, color=COLOURS["ST"])
    for value, side in ((genes["min"], "left"), (genes["max"], "right")):
        axes.annotate(
            whole(value),
            (value / 1000, 0),
            (value / 1000, 0.35 * max(genes["slides"])),
            ha=side,
            arrowprops={"arrowstyle": "->"},
        )
    axes.set(xlabel="genes per slide (thousands)", ylabel="slides", xlim=(0, edges[-1]))


# --------------------------------------------------------------------------- the staged book


def load(study: Any) -> dict[str, Any]:
    """Load a study's slides without images, and without the remarks that chapter 1 has shown."""
    from helpers import slides

    remarks = logging.getLogger(slides.__name__)
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        return {
            s.slide: slides.load(s.slide, study=study.name, image=False) for s in study.sections
        }
    finally:
        remarks.setLevel(level)


def stage(folder: Path, study: str) -> None:
    """Add the computed numbers and figures to a staged copy of the book.

    Parameters
    ----------
    folder
        Holds ``_config.yml`` and ``book/``, both already copied there.
    study
        The study that the chapters ran on; its slides are loaded and counted.
    """
    from helpers import catalog

    found = official()
    if found is not None:
        numbers, sha256 = found
        source = (
            "These totals were computed from the official table of slides while this page was built"
            f" (SHA-256 beginning with `{sha256[:12]}`)."
        )
    else:
        stored = json.loads(STORED.read_text(encoding="utf-8"))
        numbers = stored["facts"]
        source = (
            "The official table of slides was not available when this page was built."
            " The totals come from `results/catalogue.json`, computed from that table on"
            f" {stored['computed']} (SHA-256 beginning with `{stored['table_sha256'][:12]}`)."
        )
    known = catalog.study(study)
    loaded = load(known)
    values = words(numbers) | {
        "source": source,
        "hub_revision": f"`{catalog.REVISION[:12]}`",
        "table_file": f"`{catalog.METADATA}`",
        "study_name": f"`{known.name}`",
        "study_prefix": f"`{common_prefix(known)}`",
        "study_title": known.title,
        "study_slides": whole(len(loaded)),
        "study_donors": whole(len({section.donor for section in known.sections})),
        "study_spots": whole(sum(adata.n_obs for adata in loaded.values())),
        "study_labels": ", ".join(known.labels),
        "study_source": known.source,
        "study_licence": known.licence,
        "study_table": study_table(known, loaded),
    }
    draw(numbers, folder / "book" / "figures")
    path = folder / "_config.yml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["parse"]["myst_substitutions"] = values
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Write ``results/catalogue.json``; return the exit status."""
    parser = argparse.ArgumentParser(description="Compute results/catalogue.json.")
    parser.add_argument("--out", type=Path, default=STORED)
    write_stored(parser.parse_args(argv).out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
