"""Make what the pages of the studies show: facts from the catalogue, pictures from local slides.

Pictures are drawn while the book is built, and only of slides that are already here: a page about
a study fetches nothing.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from dataset_page import common_prefix, rows

LARGEST = 60_000  # bytes of a page's picture
SIDE = 400  # px of a slide in it


@dataclass(frozen=True)
class Thumbnail:
    """A slide, small: its pixels, and how many um one of them spans."""

    pixels: np.ndarray
    um_per_px: float
    full_um_per_px: float


def thumbnail(section: Any, root: Path | None) -> Thumbnail | None:
    """Return a slide's picture, or None where its files are not below `root`."""
    from helpers import catalog, images, slides

    if root is None:
        return None
    image, places = (
        root / catalog.relative_path(section.slide, kind, section.tech)
        for kind in ("image", "coord")
    )
    if not (image.exists() and places.exists()):
        return None
    table = pd.read_csv(places)
    xy = table[["xaxis", "yaxis"]].to_numpy(float)
    scale = slides.estimate_um_per_px(xy, section.tech, float(table["r"].median()))
    pixels = images.read(image, max_side=SIDE, slide=section.slide)
    stored = images.info(image)
    return Thumbnail(pixels, scale * stored.width / pixels.shape[1], scale)


def draw(study: Any, found: dict[str, Thumbnail], path: Path) -> None:
    """Draw the slides side by side, each with its own scale bar, as a small JPEG."""
    from matplotlib.figure import Figure

    from helpers import plots

    prefix, across = common_prefix(study), 4 if len(found) % 4 == 0 else 3
    down = -(-len(found) // across)
    figure = Figure(figsize=(7, 8 / across * down), layout="constrained", facecolor="white")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, (slide, made) in zip(axes, found.items(), strict=False):
        ax.imshow(made.pixels)
        ax.set_title(
            f"{slide.removeprefix(prefix)}, donor {study.section(slide).donor}", fontsize=10
        )
        plots.scale_bar(ax, made.um_per_px, length_um=1000)
    for quality in (85, 75, 65, 55, 45, 35):
        file = io.BytesIO()
        figure.savefig(file, format="jpeg", dpi=100, pil_kwargs={"quality": quality})
        if len(file.getvalue()) < LARGEST:
            break
    path.write_bytes(file.getvalue())


def slide_table(study: Any, found: dict[str, Thumbnail]) -> str:
    """Return one row per slide: its donor, its neighbours, its labels, its scale if it is here."""
    prefix = common_prefix(study)
    body = []
    for section in study.sections:
        beside = [
            f"`{other.slide.removeprefix(prefix)}`"
            for other in study.sections
            if other.group == section.group and other is not section
        ]
        made = found.get(section.slide)
        body.append(
            [
                f"`{section.slide.removeprefix(prefix)}`",
                section.donor,
                ", ".join(beside) or "none",
                "yes" if section.annotated else "no",
                f"{made.full_um_per_px:.2f}" if made else "not here",
            ]
        )
    return rows(["slide", "donor", "cut next to", "labelled", "µm/px"], body, "llllr")


def pictures(study: Any, found: dict[str, Thumbnail]) -> str:
    """Return the figure of the slides that are here, and a sentence about those that are not."""
    missing = len(study.sections) - len(found)
    if not found:
        return (
            "The machine that built these pages had no slide of this study, so there is no picture"
            f" here. `STUDY={study.name} make book` fetches the slides and draws them."
        )
    prefix = common_prefix(study)
    names = ", ".join(slide.removeprefix(prefix) for slide in found)
    rest = f" {missing} more were not on the machine that built this page." if missing else ""
    return (
        f"```{{figure}} figures/study-{study.name}.jpg\n:name: fig-study-{study.name}\n"
        f":alt: The stained sections {names} of the study {study.name}, side by side, each with a"
        f" scale bar of one millimetre.\n\n"
        f"The slides of `{study.name}`, drawn from the files these pages were built with;"
        f" the bars are 1 mm long.{rest}\n```"
    )


def facts_table(study: Any) -> str:
    """Return what the catalogue knows about a study, as a table."""
    donors = {section.donor for section in study.sections}
    techs = sorted({section.tech for section in study.sections})
    groups = {section.group for section in study.sections}
    kind = dict.fromkeys((study.species, study.tissue))  # said once where both are "simulated"
    labelled = sum(section.annotated for section in study.sections)
    return rows(
        ["study", f"`{study.name}`"],
        [
            ["species, tissue", ", ".join(kind)],
            ["technology", ", ".join(f"{{term}}`{t}{' array' * (t == 'ST')}`" for t in techs)],
            ["donors", str(len(donors))],
            ["slides", f"{len(study.sections)}, in {len(groups)} groups of neighbouring sections"],
            ["labels", f"{', '.join(study.labels)} (on {labelled} slides)"],
            ["source", study.source],
            ["licence", study.licence],
        ],
        "ll",
    )


def roots(built: str) -> dict[str, Path | None]:
    """Return where the slides of each study are looked for: nothing is fetched for a picture."""
    from helpers import catalog, simulate

    local = catalog.local_root()
    found = {name: local for name in catalog.STUDIES} | {"demo": simulate.demo_root()}
    if local is None and built != "demo":  # the chapters have fetched them: where did they land?
        first = catalog.study(built).sections[0]
        found[built] = catalog.find(first.slide, "coord", tech=first.tech).parents[2]
    return found


def stage(folder: Path, built: str) -> None:
    """Add the substitutions and pictures of all studies to a staged copy of the book.

    Parameters
    ----------
    folder
        Holds ``_config.yml`` and ``book/figures``.
    built
        The study that the chapters ran on.
    """
    from helpers import catalog

    values = {}
    for name, root in roots(built).items():
        study = catalog.study(name)
        made = {section.slide: thumbnail(section, root) for section in study.sections}
        found = {slide: small for slide, small in made.items() if small is not None}
        if found:
            draw(study, found, folder / "book" / "figures" / f"study-{name}.jpg")
        values |= {
            f"{name}_facts": facts_table(study),
            f"{name}_slides": slide_table(study, found),
            f"{name}_pictures": pictures(study, found),
        }
    path = folder / "_config.yml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["parse"].setdefault("myst_substitutions", {}).update(values)
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
