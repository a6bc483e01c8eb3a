"""Compute the numbers, tables and pictures of the dataset page, the study pages and the results.

``stage`` adds them to a staged copy of the book: numbers and tables as MyST substitutions in its
``_config.yml``, figures in its ``book/figures``. The totals come from the official table of slides
if it can be read, otherwise from ``results/catalogue.json``; the page names its source. Slides are
drawn only if they are already on this machine. As a script, this file renews
``results/catalogue.json``.
"""

from __future__ import annotations

import datetime
import io
import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import results_page
from helpers import catalog, files, images, plots, simulate, slides
from notebooks import ROOT

STORED = ROOT / "results" / "catalogue.json"
NAMES = {"ST": "Spatial Transcriptomics", "Visium": "Visium", "VisiumHD": "Visium HD"}
COLOURS = {"ST": "#0173b2", "Visium": "#de8f05", "VisiumHD": "#029e73"}  # seaborn "colorblind"
INK = {"ST": "white", "Visium": "black", "VisiumHD": "black"}  # readable on these colours
GENE_BINS = tuple(range(0, 105_000, 5_000))
TISSUES_SHOWN = 12
MAX_BYTES = 60_000  # of the picture on a study's page
SIDE = 400  # px, longer side of a slide in it

logger = logging.getLogger(__name__)


# --- the totals of the dataset ------------------------------------------------------------------


def totals_of(table: pd.DataFrame) -> dict[str, Any]:
    """Reduce the table of slides, as ``catalog.metadata`` returns it, to numbers ready for JSON.

    `dense_gb` is the size of all counts as dense float32 matrices, in 1e9 bytes.
    """

    def slides_per(column: str) -> dict[str, int]:
        counts = table.groupby(column, observed=True).size()
        return counts.sort_values(ascending=False, kind="stable").to_dict()

    per_technology = catalog.summary(table).loc[list(NAMES), ["slides", "spots", "median"]]
    genes = table["gene_num"]
    return {
        "slides": len(table),
        "spots": int(table["spot_num"].sum()),
        "technologies": per_technology.to_dict("index"),
        "species": slides_per("species"),
        "tissues": slides_per("tissue"),
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


def official_totals() -> tuple[dict[str, Any], str]:
    """Return the totals of the official table of slides, and its SHA-256.

    Raises
    ------
    DataError
        The table cannot be read, or a different file has its name.
    """
    path = catalog.metadata_path()
    sha256 = files.sha256(path)
    if sha256 != catalog.METADATA_SHA256:
        fix = f"replace it with {catalog.METADATA_URL}"
        raise files.DataError(f"not the official table ({sha256=})", file=path, fix=fix)
    return totals_of(catalog.metadata()), sha256


def totals_and_source() -> tuple[dict[str, Any], str]:
    """Return the totals, and a sentence that says where they come from."""
    try:
        totals, sha256 = official_totals()
    except files.DataError as error:
        logger.warning("%s Until then, the dataset page shows %s.", error, STORED.relative_to(ROOT))
        stored = json.loads(STORED.read_text(encoding="utf-8"))
        return stored["facts"], (
            "The official table of slides was not available when this page was built."
            " The totals come from `results/catalogue.json`, computed from that table on"
            f" {stored['computed']} (SHA-256 beginning with `{stored['table_sha256'][:12]}`)."
        )
    return totals, (
        "These totals were computed from the official table of slides while this page was built"
        f" (SHA-256 beginning with `{sha256[:12]}`)."
    )


def rows(head: list[str], body: list[list[Any]], align: str) -> str:
    """Return a Markdown table; `align` holds ``l`` or ``r`` per column."""
    rule = ["---:" if side == "r" else ":---" for side in align]
    lines = ([f"{cell:,}" if isinstance(cell, int) else cell for cell in line] for line in body)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def dataset_values(totals: dict[str, Any]) -> dict[str, str]:
    """Return the substitutions of the totals, by name."""
    technologies, genes = totals["technologies"], totals["genes"]
    share = {tech: f"{row['spots'] / totals['spots']:.0%}" for tech, row in technologies.items()}
    body = [
        [NAMES[tech], row["slides"], row["spots"], share[tech], f"{row['median']:,.0f}"]
        for tech, row in technologies.items()
    ]
    body.append(["all", totals["slides"], totals["spots"], "100%", ""])
    head = ["technology", "slides", "spots", "share of spots", "median spots per slide"]
    tissues = [f"{name} {count}" for name, count in totals["tissues"].items()]
    return {
        "n_slides": f"{totals['slides']:,}",
        "n_spots": f"{totals['spots']:,}",
        "hd_slides": f"{technologies['VisiumHD']['slides']:,}",
        "hd_share": share["VisiumHD"],
        "genes_min": f"{genes['min']:,}",
        "genes_median": f"{genes['median']:,.0f}",
        "genes_max": f"{genes['max']:,}",
        "genes_typical": f"{genes['between_15000_and_30000'] / totals['slides']:.0%}",
        "dense_gb": f"{totals['dense_gb']:,.0f}",
        "cancer_slides": f"{totals['cancer_slides']:,}",
        "tissues_raw": f"{totals['tissue_labels_raw']:,}",
        "tissues_clean": f"{len(totals['tissues']):,}",
        "tissues_top": ", ".join(tissues[:3]),
        "species_count": f"{len(totals['species']):,}",
        "species_list": ", ".join(f"{k} {v}" for k, v in totals["species"].items()),
        "technology_table": rows(head, body, "lrrrr"),
    }


# --- the figures of the dataset page ------------------------------------------------------------


def draw_dataset(totals: dict[str, Any], folder: Path) -> None:
    """Draw the three figures of the dataset page as SVG files, on a light background."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style | {"svg.hashsalt": "stimage-book"}):  # equal numbers, equal files
        for name, size, draw in (
            ("technologies", (3.7, 2.2), draw_technologies),
            ("tissues", (4.6, 3.2), draw_tissues),
            ("genes", (3.7, 2.2), draw_genes),
        ):
            figure = Figure(figsize=size, layout="constrained", facecolor="white")
            draw(figure.subplots(), totals)
            figure.savefig(folder / f"dataset-{name}.svg", metadata={"Date": None})


def draw_technologies(axes: Axes, totals: dict[str, Any]) -> None:
    """Draw two full bars: how the technologies share the slides, and how they share the spots."""
    for y, what in ((1, "slides"), (0, "spots")):
        left = 0.0
        for tech, row in totals["technologies"].items():
            share = 100 * row[what] / totals[what]
            axes.barh(y, share, left=left, color=COLOURS[tech], label=NAMES[tech] if y else None)
            if share > 8:
                middle = left + share / 2
                axes.text(middle, y, f"{share:.0f}%", ha="center", va="center", color=INK[tech])
            left += share
    axes.set(yticks=[1, 0], yticklabels=["slides", "spots"], xlabel="share (%)", xlim=(0, 100))
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.42, 1), ncols=3, frameon=False, fontsize=8,
        columnspacing=0.8, handlelength=0.8, handletextpad=0.4,
    )  # fmt: skip


def draw_tissues(axes: Axes, totals: dict[str, Any]) -> None:
    """Draw one bar per frequent tissue, and one for all the others."""
    tissues = list(totals["tissues"].items())
    rest = tissues[TISSUES_SHOWN:]
    shown = dict(tissues[:TISSUES_SHOWN]) | {f"{len(rest)} others": sum(n for _, n in rest)}
    bars = axes.barh(list(shown), list(shown.values()), color=COLOURS["ST"])
    bars[-1].set_color("#949494")
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="slides")
    axes.margins(x=0.12)


def draw_genes(axes: Axes, totals: dict[str, Any]) -> None:
    """Draw the histogram of slides by the number of genes in their table."""
    genes = totals["genes"]
    edges = np.array(genes["bins"]) / 1000
    axes.stairs(genes["slides"], edges, fill=True, color=COLOURS["ST"])
    for value, side in ((genes["min"], "left"), (genes["max"], "right")):
        at, text_at = (value / 1000, 0), (value / 1000, 0.35 * max(genes["slides"]))
        axes.annotate(f"{value:,}", at, text_at, ha=side, arrowprops={"arrowstyle": "->"})
    axes.set(xlabel="genes per slide (thousands)", ylabel="slides", xlim=(0, edges[-1]))


# --- the study that the chapters ran on ---------------------------------------------------------


def common_prefix(study: catalog.Study) -> str:
    """Return what the names of a study's slides begin with, up to an underscore."""
    same = os.path.commonprefix([s.slide for s in study.sections])  # noqa: RUF071 - not paths
    return same[: same.rfind("_") + 1]


def built_values(study: catalog.Study) -> dict[str, str]:
    """Load and count the slides of the study that the chapters ran on; return its substitutions."""
    logging.disable(logging.WARNING)  # chapter 1 shows the remarks of the loader
    try:
        loaded = [slides.load(s.slide, study=study.name, image=False) for s in study.sections]
    finally:
        logging.disable(logging.NOTSET)
    body = [
        [
            f"`{section.slide.removeprefix(common_prefix(study))}`",
            section.donor,
            adata.n_obs,
            adata.n_vars,
            int(adata.obs["label"].notna().sum()) if section.annotated else "none",
            f"{slides.um_per_px(adata):.2f}",
        ]
        for section, adata in zip(study.sections, loaded, strict=True)
    ]
    head = ["slide", "donor", "spots", "genes", "labelled spots", "µm/px"]
    return {
        "study_name": f"`{study.name}`",
        "study_prefix": f"`{common_prefix(study)}`",
        "study_title": study.title,
        "study_slides": f"{len(loaded):,}",
        "study_donors": f"{len({section.donor for section in study.sections}):,}",
        "study_spots": f"{sum(adata.n_obs for adata in loaded):,}",
        "study_labels": ", ".join(study.labels),
        "study_source": study.source,
        "study_licence": study.licence,
        "study_table": rows(head, body, "llrrrr"),
    }


# --- the page of each study ---------------------------------------------------------------------


class Thumbnail(NamedTuple):
    """A small picture of a slide, its scale, and the scale of the full picture."""

    pixels: np.ndarray
    um_per_px: float
    full_um_per_px: float


def thumbnail(section: catalog.Section, root: Path | None) -> Thumbnail | None:
    """Return the picture of a slide, or None if its files are not below `root`."""
    if root is None:
        return None
    image, coord = (
        root / catalog.relative_path(section.slide, kind, section.tech)
        for kind in ("image", "coord")
    )
    if not (image.exists() and coord.exists()):
        return None
    table = pd.read_csv(coord)
    xy = table[["xaxis", "yaxis"]].to_numpy(float)
    scale = slides.estimate_um_per_px(xy, section.tech, float(table["r"].median()))
    pixels = images.read(image, max_side=SIDE, slide=section.slide)
    return Thumbnail(pixels, scale * images.info(image).width / pixels.shape[1], scale)


def draw_study(study: catalog.Study, found: dict[str, Thumbnail], path: Path) -> None:
    """Draw the slides side by side, each with its own scale bar, as a small JPEG."""
    across = 4 if len(found) % 4 == 0 else 3
    down = -(-len(found) // across)
    figure = Figure(figsize=(7, 8 / across * down), layout="constrained", facecolor="white")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, (slide, made) in zip(axes, found.items(), strict=False):
        name = slide.removeprefix(common_prefix(study))
        ax.imshow(made.pixels)
        ax.set_title(f"{name}, donor {study.section(slide).donor}", fontsize=10)
        plots.scale_bar(ax, made.um_per_px, length_um=1000)
    for quality in (85, 75, 65, 55, 45, 35):
        file = io.BytesIO()
        figure.savefig(file, format="jpeg", dpi=100, pil_kwargs={"quality": quality})
        if len(file.getvalue()) < MAX_BYTES:
            break
    path.write_bytes(file.getvalue())


def facts_table(study: catalog.Study) -> str:
    """Return what the catalogue knows about a study, as a table."""
    techs = sorted({section.tech for section in study.sections})
    groups = {section.group for section in study.sections}
    kind = dict.fromkeys((study.species, study.tissue))  # said once where both are "simulated"
    labelled = sum(section.annotated for section in study.sections)
    body = [
        ["species, tissue", ", ".join(kind)],
        ["technology", ", ".join(f"{{term}}`{t}{' array' * (t == 'ST')}`" for t in techs)],
        ["donors", len({section.donor for section in study.sections})],
        ["slides", f"{len(study.sections)}, in {len(groups)} groups of neighbouring sections"],
        ["labels", f"{', '.join(study.labels)} (on {labelled} slides)"],
        ["source", study.source],
        ["licence", study.licence],
    ]
    return rows(["study", f"`{study.name}`"], body, "ll")


def slides_table(study: catalog.Study, found: dict[str, Thumbnail]) -> str:
    """Return a table of the slides: donor, neighbouring sections, labels, and scale if drawn."""
    names = {s.slide: f"`{s.slide.removeprefix(common_prefix(study))}`" for s in study.sections}
    body = []
    for section in study.sections:
        same = [s for s in study.sections if s.group == section.group and s != section]
        beside = ", ".join(names[s.slide] for s in same) or "none"
        labelled = "yes" if section.annotated else "no"
        here = found.get(section.slide)
        scale = f"{here.full_um_per_px:.2f}" if here else "not here"
        body.append([names[section.slide], section.donor, beside, labelled, scale])
    return rows(["slide", "donor", "cut next to", "labelled", "µm/px"], body, "llllr")


def figure_of(study: catalog.Study, found: dict[str, Thumbnail]) -> str:
    """Return the figure of the slides that are here, and a sentence about the others."""
    if not found:
        return (
            "The machine that built these pages had no slide of this study, so there is no picture"
            f" here. `STUDY={study.name} make book` fetches the slides and draws them."
        )
    missing = len(study.sections) - len(found)
    names = ", ".join(slide.removeprefix(common_prefix(study)) for slide in found)
    rest = f" {missing} more were not on the machine that built this page." if missing else ""
    return (
        f"```{{figure}} figures/study-{study.name}.jpg\n:name: fig-study-{study.name}\n"
        f":alt: The stained sections {names} of the study {study.name}, side by side, each with a"
        f" scale bar of one millimetre.\n\n"
        f"The slides of `{study.name}`, drawn from the files these pages were built with;"
        f" the bars are 1 mm long.{rest}\n```"
    )


def roots(built: str) -> dict[str, Path | None]:
    """Return the folder of each study's slides, or None if they are not on this machine."""
    local = catalog.local_root()
    found = {name: local for name in catalog.STUDIES} | {"demo": simulate.demo_root()}
    if local is None and built != "demo":  # the chapters have fetched them into the cache
        first = catalog.study(built).sections[0]
        found[built] = catalog.find(first.slide, "coord", tech=first.tech).parents[2]
    return found


# --- the staged book ----------------------------------------------------------------------------


def stage(folder: Path, built: str) -> None:
    """Add all numbers, tables and figures to a staged copy of the book.

    Parameters
    ----------
    folder
        Holds ``_config.yml`` and ``book/figures``.
    built
        The study that the chapters ran on.
    """
    figures = folder / "book" / "figures"
    totals, source = totals_and_source()
    draw_dataset(totals, figures)
    values = dataset_values(totals) | built_values(catalog.study(built))
    values |= {
        "source": source,
        "hub_revision": f"`{catalog.REVISION[:12]}`",
        "table_file": f"`{catalog.METADATA}`",
    }
    for name, root in roots(built).items():
        study = catalog.study(name)
        made = {section.slide: thumbnail(section, root) for section in study.sections}
        found = {slide: small for slide, small in made.items() if small is not None}
        if found:
            draw_study(study, found, figures / f"study-{name}.jpg")
        values |= {
            f"{name}_facts": facts_table(study),
            f"{name}_slides": slides_table(study, found),
            f"{name}_pictures": figure_of(study, found),
        }
    values |= results_page.stage(figures)
    values["results_files"] = rows(results_page.FILES_HEAD, results_page.files_table(), "llrlll")
    path = folder / "_config.yml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["parse"]["myst_substitutions"] = values
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def main() -> None:
    """Compute ``results/catalogue.json`` from the official table: totals, never a row of it."""
    try:
        totals, sha256 = official_totals()
    except files.DataError as error:
        raise SystemExit(str(error)) from None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    stored = {
        "what": "totals of STimage-1K4M's table of slides, by tools/computed_pages.py",
        "table_sha256": sha256,
        "computed": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": subprocess.run(command, capture_output=True, text=True).stdout.strip(),
        "facts": totals,
    }
    STORED.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
