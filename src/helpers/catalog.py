"""Which slides exist, which studies the book uses, and where the files are.

A file is taken from a local copy of STimage-1K4M (the environment variable ``STIMAGE_ROOT``) if it
is there, and else from the Hugging Face hub, at one pinned revision.
"""

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import pandas as pd

from helpers.files import FIX, DataError, atomic, cache_dir, fetch, from_hub

DATASET = "jiawennnn/STimage-1K4M"
REVISION = "e570dbefb9baa66740adadc413254eac904b6bb0"
METADATA = "meta/meta_all_gene02122025.csv"
# The authors' GitHub repository has a newer table than the hub.
METADATA_URL = (
    "https://raw.githubusercontent.com/JiawenChenn/STimage-1K4M/"
    "2be600a7f34755404955aa8ab48c759a8b52b817/" + METADATA
)
METADATA_SHA256 = "5a548d26fbff161d962227c1cbe94645e20025f1ba4411da2e3d9f497cd7b5a0"
TECHNOLOGIES = ("ST", "Visium", "VisiumHD")
Kind = Literal["image", "coord", "gene_exp", "annotation"]
_FILE_NAMES = {
    "image": "{tech}/image/{slide}.png",
    "coord": "{tech}/coord/{slide}_coord.csv",
    "gene_exp": "{tech}/gene_exp/{slide}_count.csv",
    "annotation": "annotation/{slide}_anno.csv",
}


# --------------------------------------------------------------------------- studies


@dataclass(frozen=True)
class Section:
    """One slide of a study; sections with the same `group` were cut next to each other."""

    slide: str
    donor: str
    group: str
    tech: str
    annotated: bool = True


@dataclass(frozen=True)
class Study:
    """A few slides that belong together.

    Attributes
    ----------
    labels
        The labels that spots may have, in order.
    side_um
        Side of a tile, in um, that the chapters use by default.
    """

    name: str
    title: str
    species: str
    tissue: str
    sections: tuple[Section, ...]
    labels: tuple[str, ...]
    source: str
    licence: str
    side_um: float = 100.0

    def section(self, slide: str) -> Section:
        """Return the section with the name `slide`."""
        sections = {section.slide: section for section in self.sections}
        if slide not in sections:
            fix = f"choose one of {', '.join(sections)}"
            raise DataError(f"not in study {self.name!r}", slide=slide, fix=fix)
        return sections[slide]


def _sections(prefix: str, tech: str, rows: str, annotated: str | None = None) -> tuple:
    """Make sections from ``slide:donor:group`` triples; `annotated` lists those with labels."""
    return tuple(
        Section(prefix + slide, donor, group, tech, annotated is None or slide in annotated.split())
        for slide, donor, group in (row.split(":") for row in rows.split())
    )


STUDIES: dict[str, Study] = {
    "demo": Study(
        name="demo",
        title="Simulated layered tissue",
        species="simulated",
        tissue="simulated",
        sections=_sections(
            "Demo_Layers_Simulated_ST_", "ST", "A1:A:A A2:A:A B1:B:B B2:B:B C1:C:C C2:C:C"
        ),
        labels=("Layer 1", "Layer 2", "Layer 3", "Layer 4", "Layer 5"),
        source="helpers.simulate",
        licence="MIT (simulated by this book)",
    ),
    "mob": Study(
        name="mob",
        title="Mouse olfactory bulb",
        species="mouse",
        tissue="olfactory bulb",
        # Animals from tare/Splotch, metadata.tsv. Rep11 and Rep12 come from one animal.
        sections=_sections(
            "Mouse_OlfactoryBulb_Stahl_07012016_ST_", "ST", "Rep4:A:A Rep8:D:D Rep11:E:E Rep12:E:E"
        ),
        labels=(
            "Olfactory nerve layer",
            "Glomerular layer",
            "Outer plexiform layer",
            "Mitral cell layer",
            "Granule cell layer",
        ),
        source="Stahl et al. 2016, https://doi.org/10.1126/science.aaf2403; "
        "layers from tare/Splotch",
        licence="as published by the authors; layers BSD-3-Clause",
        side_um=200.0,
    ),
    "her2st": Study(
        name="her2st",
        title="HER2-positive breast cancer",
        species="human",
        tissue="breast",
        sections=_sections(
            "Human_Breast_Andersson_10142021_ST_",
            "ST",
            "A1:A:A A2:A:A B4:B:B C2:C:C C3:C:C C4:C:C",
            annotated="A1",
        ),
        labels=(
            "invasive cancer",
            "cancer in situ",
            "connective tissue",
            "adipose tissue",
            "immune infiltrate",
            "breast glands",
        ),
        source="Andersson et al. 2021, https://doi.org/10.1038/s41467-021-26271-2",
        licence="CC BY 4.0",
    ),
    "dlpfc": Study(
        name="dlpfc",
        title="Human dorsolateral prefrontal cortex",
        species="human",
        tissue="brain",
        # Three donors, four sections each, in two pairs of neighbours 10 um apart (Maynard 2021).
        sections=_sections(
            "Human_Brain_Maynard_02082021_Visium_",
            "Visium",
            "151507:1:1a 151508:1:1a 151509:1:1b 151510:1:1b "
            "151669:2:2a 151670:2:2a 151671:2:2b 151672:2:2b "
            "151673:3:3a 151674:3:3a 151675:3:3b 151676:3:3b",
        ),
        labels=("L1", "L2", "L3", "L4", "L5", "L6", "WM"),
        source="Maynard et al. 2021, https://doi.org/10.1038/s41593-020-00787-0",
        licence="as published by the authors",
    ),
}


def study(name: str) -> Study:
    """Return the study called `name`."""
    if name not in STUDIES:
        raise DataError(f"there is no study {name!r}", fix=f"choose one of {', '.join(STUDIES)}")
    return STUDIES[name]


def study_of(slide: str) -> Study | None:
    """Return the first study that has the slide, or None."""
    has_it = (s for s in STUDIES.values() if slide in {section.slide for section in s.sections})
    return next(has_it, None)


# --------------------------------------------------------------------------- files


def relative_path(slide: str, kind: Kind, tech: str) -> PurePosixPath:
    """Return the path of one file of a slide, relative to the dataset's root.

    Raises
    ------
    DataError
        When the slide's name could point outside the root, or the technology is unknown.
    """
    if not re.fullmatch(r"[\w+\-.&,()\[\] ]+", slide) or slide.startswith("."):
        raise DataError(
            f"{slide!r} is not a slide name: it could point outside the dataset's root",
            slide=slide,
            fix="use a name from the `slide` column of the metadata table",
        )
    if tech not in TECHNOLOGIES:
        raise DataError(
            f"unknown technology {tech!r}", slide=slide, fix=f"use one of {TECHNOLOGIES}"
        )
    return PurePosixPath(_FILE_NAMES[kind].format(tech=tech, slide=slide))


def find(
    slide: str, kind: Kind, *, tech: str | None = None, root: Path | str | None = None
) -> Path:
    """Return the path of one file of a slide, fetched from the hub if necessary.

    Parameters
    ----------
    slide
        Its official name.
    kind
        ``"image"``, ``"coord"``, ``"gene_exp"`` or ``"annotation"``.
    tech
        ``"ST"``, ``"Visium"`` or ``"VisiumHD"``; looked up if not given.
    root
        A folder in the official layout; by default, the environment variable ``STIMAGE_ROOT``.

    Raises
    ------
    DataError
        When the file is not below `root` and cannot be fetched from the hub.
    """
    path = relative_path(slide, kind, tech or technology(slide, root=root))
    local = local_root(root)
    if local is not None and (local / path).exists():
        return local / path
    if kind == "annotation" and slide.startswith(_SPLOTCH_SLIDES):
        return _splotch_annotation(slide)
    tried = f"not in {local} either" if local else "STIMAGE_ROOT is not set"
    return from_hub(
        DATASET, REVISION, str(path), repo_type="dataset", context=tried, fix=FIX, slide=slide
    )


def local_root(root: Path | str | None = None) -> Path | None:
    """Return the local copy of the dataset: `root`, else ``STIMAGE_ROOT``, else None."""
    given = root or os.environ.get("STIMAGE_ROOT")
    if not given:
        return None
    folder = Path(os.path.expanduser(given)).absolute()
    if not folder.is_dir():
        raise DataError(
            "the dataset root does not exist or is not a folder",
            file=folder,
            fix="set STIMAGE_ROOT to the folder that holds ST/, Visium/, annotation/ and meta/",
        )
    return folder


def technology(slide: str, *, root: Path | str | None = None) -> str:
    """Return the technology of a slide, from the book's studies or the metadata table."""
    if (home := study_of(slide)) is not None:
        return home.section(slide).tech
    known = metadata(root).set_index("slide")["tech"]
    if slide not in known:
        raise DataError(
            "this slide is not in the metadata table",
            slide=slide,
            fix="look up its name in the `slide` column of catalog.metadata()",
        )
    return str(known[slide])


# The layers of the olfactory bulb are published with Splotch (BSD-3-Clause): one matrix of layers x
# spots per replicate, with array coordinates as columns.
_SPLOTCH_SLIDES = "Mouse_OlfactoryBulb_Stahl_07012016_ST_Rep"
SPLOTCH = (
    "https://raw.githubusercontent.com/tare/Splotch/5792958513c67742a7bbe60f80959bf8ddd23dc1/"
    "tutorials/olfactory_bulb_st/annotations/{replicate:02d}_01.tsv"
)
SPLOTCH_SHA256 = {
    1: "68c38c3409d9ae8a4c257ead191eac538a1295152446c94d89c55e0f788e0be9",
    2: "7ecf4da4893cd9b3a178e555e3df253d16fe27a8882549323dcf93567cc5643b",
    3: "d2b5df48ee81449a674f11233fe61193dd2ba6b516698e9ffa10c8860ad387b3",
    4: "29c2015c46c842fe3e91d039ebb72e709ea62901f8947b77c3e2586f6bf4802a",
    5: "bf0d562734e8355408503b18432d1abad9f9a2fd6a76e5c499e514abfa5d8385",
    6: "4652061fa8e19bcc2675c56a8a041cff986ca0ada44cd1bb9fd64a410623ba18",
    7: "8ef68defe35ac87952a6ec698f0a46b5473b1f20016d8a8498da9bc037480c90",
    8: "a337ed67b2ac6d43dd07b3505b994a3a63c589af41fd37d6914ddb0683ae72ff",
    9: "d4e7f2e1bf198f98d7709093d3efb445ac697c0b9bac330aa75d611420ad35b0",
    10: "a5e229c843e53f8560d9017b058981f99136c0e69751d0f5935832ffda0f8939",
    11: "2db0ecaf0485002929ee1a4fae50bf77ba2e31162dabd8b5c257d8f63464bce2",
    12: "8844df56992bf2a04102f3602372aef74a64f6d78463a54c1d14041a5717866f",
}


def _splotch_annotation(slide: str) -> Path:
    """Fetch the layers of one olfactory-bulb replicate and write them in the official layout."""
    number = slide.removeprefix(_SPLOTCH_SLIDES)
    if not (number.isdecimal() and int(number) in SPLOTCH_SHA256):
        raise DataError(
            "no layers are published for this replicate",
            slide=slide,
            fix=f"use one of the replicates {', '.join(map(str, SPLOTCH_SHA256))}",
        )
    replicate = int(number)
    target = cache_dir() / "splotch" / f"{slide}_anno.csv"
    if target.exists():
        return target
    data = fetch(SPLOTCH.format(replicate=replicate), SPLOTCH_SHA256[replicate], slide)
    labels = splotch_labels(data.decode(), slide)
    with atomic(target) as temporary:
        labels.to_csv(temporary)
    return target


def splotch_labels(text: str, slide: str) -> pd.Series:
    """Turn Splotch's layers x spots matrix into one label per spot.

    Parameters
    ----------
    text
        Tab-separated. The first column has the names of the layers. Every other column is a spot,
        named by its array coordinates ``x_y``, with 1 in the row of its layer and 0 elsewhere.
    slide
        Its name is the first part of every spot id.

    Returns
    -------
    Series named ``V2``, one row per labelled spot (``<slide>_<x>x<y>``, coordinates rounded to the
    array's grid). Spots without a layer are left out.
    """
    names = {layer.casefold(): layer for layer in STUDIES["mob"].labels}
    names["granular cell layer"] = "Granule cell layer"
    matrix = pd.read_csv(io.StringIO(text), sep="\t", index_col=0)
    matrix.index = [names[layer.casefold()] for layer in matrix.index]
    places = [column.split("_") for column in matrix.columns]
    matrix.columns = [f"{slide}_{round(float(x))}x{round(float(y))}" for x, y in places]
    return matrix.loc[:, matrix.sum() == 1].idxmax().rename("V2")


# --------------------------------------------------------------------------- the table of slides

_SPECIES = {"rattus norvegicus": "rat", "ambystoma mexicanum": "axolotl"}
_TISSUES = {
    "lymphnode": "lymph node",
    "colorectal": "colon",
    "largeintestine": "large intestine",
    "tissue specimen": "not stated",
}
_COLUMNS = {
    "slide": "string",
    "species": str,
    "tissue": str,
    "pmid": "string",
    "title": "string",
    "abstract": "string",
    "keywords": "string",
    "involve_cancer": bool,
    "tech": str,
    "spot_num": int,
    "gene_num": int,
}


def metadata(root: Path | str | None = None) -> pd.DataFrame:
    """Read the official table of slides, with cleaned names of species and tissues.

    Parameters
    ----------
    root
        A folder in the official layout; by default, ``STIMAGE_ROOT``, then the authors' repository.

    Returns
    -------
    DataFrame with one row per slide: `slide`, `species`, `tissue`, `pmid`, `title`, `abstract`,
    `keywords`, `involve_cancer` (bool), `tech` (category), `spot_num`, `gene_num` (int), and the
    original `species_raw` and `tissue_raw`.

    Raises
    ------
    DataError
        When the table cannot be fetched, lacks a column, has a value of the wrong type, or a slide
        name is missing or repeated.
    """
    path = metadata_path(root)
    fix = f"use the official table {METADATA}"
    try:
        table = pd.read_csv(path, usecols=list(_COLUMNS), dtype=_COLUMNS)
    except (ValueError, OSError) as error:
        raise DataError(f"not the table of slides ({error})", file=path, fix=fix) from error
    if (bad := table["slide"].isna() | table["slide"].duplicated()).any():
        what = f"row {bad.argmax() + 1} of the table has no slide name or a duplicate one"
        raise DataError(what, file=path, fix=fix)
    for column, names in (("species", _SPECIES), ("tissue", _TISSUES)):
        table[f"{column}_raw"] = table[column].astype("category")
        table[column] = table[column].str.strip().replace(names).astype("category")
    table["tech"] = pd.Categorical(table["tech"], categories=TECHNOLOGIES)
    return table


def metadata_path(root: Path | str | None = None) -> Path:
    """Return the path of the official table of slides, fetched from GitHub if necessary."""
    local = local_root(root)
    if local is not None and (local / METADATA).exists():
        return local / METADATA
    target = cache_dir() / Path(METADATA).name
    if not target.exists():
        data = fetch(METADATA_URL, METADATA_SHA256)
        with atomic(target) as temporary:
            temporary.write_bytes(data)
    return target


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Count slides and spots per technology.

    Returns
    -------
    DataFrame indexed by technology, then ``"all"``, with the columns `slides`, `spots`, `share`
    (of all spots) and `median` (spots per slide).
    """
    groups = table.groupby("tech", observed=True)["spot_num"]
    counts = groups.agg(slides="size", spots="sum", median="median")
    counts.index = counts.index.astype(str)
    spots = table["spot_num"]
    counts.loc["all"] = [len(table), spots.sum(), spots.median()]
    counts = counts.astype({"slides": int, "spots": int})
    counts.insert(2, "share", counts["spots"] / spots.sum())
    return counts
