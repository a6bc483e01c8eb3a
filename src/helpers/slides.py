"""One slide, from its files on disk to one validated AnnData.

Three readers (`load` for the dataset's official files, `read_space_ranger`, `read_h5ad`) give the
same layout, so that every later chapter takes a reader's own slide as it takes the book's:

``X`` raw counts (CSR, float32); ``obs`` with `slide`, `donor`, `group`, `study`, `label`;
``obsm["spatial"]`` x, y in px of the full image; ``uns["spatial"][slide]`` as squidpy expects it
(`images`, `scalefactors`, `metadata`), plus `um_per_px`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial import cKDTree

from helpers import catalog, counts, images
from helpers.files import DataError, progress

if TYPE_CHECKING:
    Spots = pd.DataFrame | ad.AnnData | Mapping[str, ad.AnnData]
    Scales = Mapping[str, float | ad.AnnData] | None

logger = logging.getLogger(__name__)

SPOT_UM = {"ST": 100.0, "Visium": 55.0, "VisiumHD": 8.0}  # diameter of a spot, side of a bin
PITCH_UM = {"ST": 200.0, "Visium": 100.0, "VisiumHD": 8.0}  # centre to centre
MIN_SHARED = 0.8  # of the longer id list; below it a file is cut off or of a different slide
HIRES_SIDE = 2000  # px, the longest side of the image kept for plotting
NO_LABEL = ["", "undetermined", "nan", "NA"]
SAME_SLIDE = "check that image and coordinates are of the same slide and the same size"
ENSEMBL = r"ENS[A-Z]*G\d{11}(\.\d+)?"  # the id of a gene, as ENSG00000139618
POSITIONS = ["in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


# --------------------------------------------------------------------------- the dataset's slides


def load_study(
    name: str, *, root: Path | str | None = None, image: bool = True
) -> dict[str, ad.AnnData]:
    """Load every slide of a study of the book, in its order.

    Parameters
    ----------
    name
        ``"demo"``, which is simulated when it is not in the cache, ``"mob"``, ``"her2st"`` or
        ``"dlpfc"``.
    root
        A local copy of the dataset; ``STIMAGE_ROOT``, then the hub, when not given.
    image
        Also read each image, scaled down, for plots and for the check that spots lie on tissue.

    Returns
    -------
    dict from slide name to AnnData; see `load`.
    """
    study = catalog.study(name)
    bar = progress(study.sections, desc=f"{name}: slides", unit="slide")
    return {s.slide: load(s.slide, root=root, study=name, image=image) for s in bar}


def load(
    slide: str, *, root: Path | str | None = None, study: str | None = None, image: bool = True
) -> ad.AnnData:
    """Load one slide of the dataset and check it.

    Parameters
    ----------
    slide
        Official name.
    root, image
        As in `load_study`.
    study
        The book's study that the slide belongs to; found by the slide's name when not given.

    Returns
    -------
    AnnData of shape (n_spots, n_genes), laid out as the module says. Its spots have coordinates and
    counts, and are in the order of the coordinate file.

    Raises
    ------
    DataError
        When a file is missing or damaged, the spot ids of two files do not match, a spot lies
        outside the image, or most spots lie off the tissue (as when x and y are swapped).
    """
    home = catalog.study(study) if study else catalog.study_of(slide)
    if home is not None and home.name == "demo" and root is None:
        from helpers import simulate

        root = simulate.demo_root()
    section = home.section(slide) if home else None
    tech = section.tech if section else catalog.technology(slide, root=root)

    coord = _read_coordinates(catalog.find(slide, "coord", tech=tech, root=root), slide)
    count_path = catalog.find(slide, "gene_exp", tech=tech, root=root)
    table = counts.load(count_path, slide=slide)
    shared = _shared_ids(coord.index, table.spots, slide, count_path)
    coord = coord.loc[shared]

    adata = ad.AnnData(
        X=table.X[table.spots.get_indexer(shared)],
        obs=pd.DataFrame(index=shared.rename(None)),
        var=pd.DataFrame(index=table.genes.rename(None)),
        obsm={"spatial": coord[["xaxis", "yaxis"]].to_numpy(float)},
    )
    array = shared.str.extract(r"_(\d+)x(\d+)$").astype(float).to_numpy()
    if np.isfinite(array).all():
        adata.obs[["array_x", "array_y"]] = array.astype(int)
    label = _read_labels(slide, section, root, adata.obs_names)
    if home is not None:
        found = set(label.dropna())
        order = [name for name in home.labels if name in found]
        label = pd.Categorical(label, categories=order + sorted(found - set(order)))
    adata.obs["label"] = label
    facts = {"donor": slide, "group": slide, "study": "own"}
    if section is not None:
        facts = {"donor": section.donor, "group": section.group, "study": home.name}
    _same_for_all(adata, slide=slide, **facts)
    path, radius_px = catalog.find(slide, "image", tech=tech, root=root), float(coord["r"].median())
    return attach_image(adata, slide, path, tech, radius_px=radius_px, image=image)


def _same_for_all(adata: ad.AnnData, **facts: object) -> None:
    """Add columns to ``obs`` that have one value for all spots."""
    for column, value in facts.items():
        adata.obs[column] = pd.Categorical([value] * adata.n_obs)


def _read_coordinates(path: Path, slide: str) -> pd.DataFrame:
    """Read spot centres: index = spot id, columns `xaxis`, `yaxis`, `r` in px."""
    coord = _read_table(path, slide, ["xaxis", "yaxis", "r"])
    if coord.empty:
        raise DataError("the slide is empty: no spot has coordinates", slide=slide, file=path)
    values = coord.apply(pd.to_numeric, errors="coerce")
    bad = ~np.isfinite(values).all(axis=1) | (values["r"] <= 0)
    if bad.any():
        wrong = "x or y is not a number, or r not above 0,"
        what = f"{wrong} for {bad.sum()} spots ({bad.idxmax()} ...)"
        raise DataError(what, slide=slide, file=path, fix="correct or remove these rows")
    return values


def _read_table(path: Path, slide: str, columns: list[str]) -> pd.DataFrame:
    """Read these columns of a table, as text; the first column of the file is the spot id."""
    with _reading(path, slide, "a table", fix="fetch the file again"):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if missing := sorted(set(columns) - set(table.columns)):
        what = f"the columns {missing} are missing; there are {list(table.columns[:5])}"
        fix = "use the official file: comma separated, the spot id first"
        raise DataError(what, slide=slide, file=path, fix=fix)
    table = table.set_index(table.columns[0])[columns]
    _check_unique_ids(table.index, slide, path)
    return table


def _read_labels(
    slide: str, section: catalog.Section | None, root: Path | str | None, spots: pd.Index
) -> pd.Series:
    """Return one label per spot, NaN where there is none."""
    none = pd.Series(index=spots, dtype=object)
    if section is not None and not section.annotated:
        return none
    try:
        path = catalog.find(slide, "annotation", tech="ST", root=root)
    except DataError as error:
        if section is not None:  # the catalogue says that it is annotated
            raise
        logger.warning("slide %s: its spots carry no label (%s)", slide, error)
        return none
    labels = _read_table(path, slide, ["V2"])["V2"].str.strip()
    here = labels.index.isin(spots)
    if len(labels) == 0 or here.mean() < MIN_SHARED:
        what = f"only {here.sum()} of {len(labels)} annotated spots are on the slide"
        fix = f"fetch the file again if it may be cut off, else compare its ids with {spots[0]!r}"
        raise DataError(what, slide=slide, file=path, fix=fix)
    return labels.reindex(spots).replace(NO_LABEL, np.nan)


# --------------------------------------------------------------------------- your own slides


def read_space_ranger(
    folder: Path | str, *, image_file: Path | str | None = None, slide: str | None = None
) -> ad.AnnData:
    """Read the output of 10x Space Ranger (the folder ``outs``, or one binned output of Visium HD).

    Parameters
    ----------
    folder
        Holds ``filtered_feature_bc_matrix.h5`` and ``spatial/``.
    image_file
        The full-resolution image given to Space Ranger, which it does not copy. Without it the
        ``tissue_hires_image.png`` of at most 2,000 px serves, and coordinates are scaled to it.
    slide
        A name for the slide; the folder's when not given.

    Returns
    -------
    AnnData laid out as the module says.

    Raises
    ------
    DataError
        When a file is missing or damaged, or spots do not fit the image.
    """
    import scanpy as sc

    folder = Path(folder)
    slide = slide or folder.resolve().name
    matrix = folder / "filtered_feature_bc_matrix.h5"
    if image_file is not None and not Path(image_file).is_file():
        fix = "give the file that Space Ranger was given as --image, which it does not copy"
        raise DataError("the image is missing", slide=slide, file=Path(image_file), fix=fix)
    scales = folder / "spatial" / "scalefactors_json.json"
    with _reading(scales, slide, "Space Ranger's scale factors", fix="copy the file again"):
        factors = json.loads(scales.read_text())
        factor = float(factors["tissue_hires_scalef"])  # px of the small image per px of the full
    with _reading(matrix, slide, "a 10x count matrix"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")  # added up below
        adata = sc.read_10x_h5(matrix)
    adata = _unique_symbols(adata, slide, matrix)
    positions = _read_positions(folder / "spatial", slide)
    positions = positions[positions["in_tissue"] == 1]
    _check_unique_ids(adata.obs_names, slide, matrix)
    shared = _shared_ids(positions.index, adata.obs_names, slide, matrix)
    adata, positions = adata[shared].copy(), positions.loc[shared]

    if image_file is None:
        image_file = folder / "spatial" / "tissue_hires_image.png"
        logger.warning(
            "slide %s: no full image given; tiles will be as coarse as its thumbnail", slide
        )
    else:
        factor = 1.0  # coordinates count px of the full image
    places = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
    adata.obsm["spatial"] = factor * positions[places].to_numpy(float)
    adata.obs[["array_x", "array_y"]] = positions[["array_col", "array_row"]].to_numpy(int)
    if "bin_size_um" not in factors:
        return _own(adata, slide, matrix, image_file, "Visium")
    scale = factors["microns_per_pixel"] / factor
    radius_px = factors["bin_size_um"] / scale / 2
    return _own(adata, slide, matrix, image_file, "VisiumHD", um_per_px=scale, radius_px=radius_px)


def read_h5ad(
    path: Path | str,
    *,
    image_file: Path | str,
    tech: str = "Visium",
    um_per_px: float | None = None,
    symbols: str | None = None,
    slide: str | None = None,
) -> ad.AnnData:
    """Read a slide from h5ad: raw counts in ``X`` or ``layers["counts"]``, ``obsm["spatial"]``.

    Parameters
    ----------
    path
        The file.
    image_file
        The image in whose px ``obsm["spatial"]`` (x, y) is given.
    tech, um_per_px
        The array (``"ST"``, ``"Visium"``, ``"VisiumHD"`` with bins of 8 um), from whose geometry
        the scale is derived, or the scale itself.
    symbols
        The column of ``var`` with the gene symbols, where its index holds something else.
    slide
        A name for the slide; the file's when not given.

    Returns
    -------
    AnnData laid out as the module says.

    Raises
    ------
    DataError
        When counts or coordinates are missing, not raw, or do not fit the image.
    """
    path = Path(path)
    slide = slide or path.stem
    with _reading(path, slide, "an h5ad file"):
        adata = ad.read_h5ad(path)
    if symbols is not None:
        if symbols not in adata.var:
            fix = f"one of {list(adata.var)}"
            raise DataError(f"var has no column {symbols!r}", slide=slide, file=path, fix=fix)
        adata.var_names = adata.var[symbols].astype(str)
    if "spatial" not in adata.obsm:
        raise DataError('obsm["spatial"] (x, y in px) is missing', slide=slide, file=path)
    xy = np.asarray(adata.obsm["spatial"], dtype=float)
    if xy.ndim != 2 or xy.shape[1] < 2 or not np.isfinite(xy).all():
        what = 'obsm["spatial"] must hold two finite numbers per spot'
        raise DataError(what, slide=slide, file=path, fix="give x and y of every spot")
    adata.obsm["spatial"] = xy[:, :2]
    raw = adata.layers.get("counts", adata.X)
    if raw is None:
        raise DataError("there are no counts", slide=slide, file=path, fix="put them into X")
    adata.X = sparse.csr_matrix(raw, dtype=np.float32)
    adata.layers.pop("counts", None)  # they are in X now
    adata.uns.pop("log1p", None)
    values = adata.X.data
    if not (np.isfinite(values).all() and (values >= 0).all() and (values % 1 == 0).all()):
        what = "the counts are not whole numbers from 0 up: they were normalised, or are damaged"
        fix = 'put the raw counts into X or layers["counts"]'
        raise DataError(what, slide=slide, file=path, fix=fix)
    adata = _unique_symbols(adata, slide, path)
    return _own(adata, slide, path, image_file, tech, um_per_px=um_per_px)


def _own(
    adata: ad.AnnData, slide: str, file: Path, image_file: Path | str, tech: str, **scale: object
) -> ad.AnnData:
    """Give a reader's own slide the columns that the dataset's slides have, and its image."""
    if adata.n_obs == 0:
        raise DataError("the slide is empty: it has no spots", slide=slide, file=file)
    _check_unique_ids(adata.obs_names, slide, file)
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    if adata.var_names.str.fullmatch(ENSEMBL).mean() > 0.5:
        logger.warning(
            "slide %s: its genes are named by ids (%s), panels name symbols; read_h5ad takes them "
            "from the column of var that you give as symbols=", slide, adata.var_names[0],
        )  # fmt: skip
    adata.obs_names = slide + "_" + adata.obs_names.astype(str)
    facts = {"donor": slide, "group": slide, "study": "own", "label": np.nan}
    missing = {column: value for column, value in facts.items() if column not in adata.obs}
    _same_for_all(adata, slide=slide, **missing)
    return attach_image(adata, slide, Path(image_file), tech, **scale)


def _unique_symbols(adata: ad.AnnData, slide: str, file: Path) -> ad.AnnData:
    """Add up the counts of genes with the same symbol, as for the dataset's own slides."""
    if adata.var_names.is_unique:
        return adata
    symbols = adata.var_names.unique()
    X = counts.add_up(sparse.csr_matrix(adata.X), adata.var_names, symbols, slide, file)
    return ad.AnnData(X, obs=adata.obs, var=pd.DataFrame(index=symbols), obsm=dict(adata.obsm))


def _read_positions(folder: Path, slide: str) -> pd.DataFrame:
    """Read spot positions, as any version of Space Ranger writes them, indexed by barcode."""
    names = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
    path = next((folder / name for name in names if (folder / name).is_file()), folder / names[1])
    with _reading(path, slide, "a table of positions"):
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        if "barcode" not in table:  # version 1 wrote no header
            table = pd.read_csv(path, header=None, names=["barcode", *POSITIONS])
        table = table.set_index("barcode")[POSITIONS].astype(float)
    if (bad := table.isna().any(axis=1)).any():
        what = f"a position is missing for barcode {bad.idxmax()}"
        raise DataError(what, slide=slide, file=path, fix="copy the file again")
    return table


# --------------------------------------------------------------------------- the table of spots


def spot_table(spots: Spots, um_per_px: Scales = None) -> pd.DataFrame:
    """Return one row per spot, in the order given: its slide, donor, label and position.

    Parameters
    ----------
    spots
        `Pairs.spots`, an AnnData from this module, several of them by slide, or a table that this
        function returned.
    um_per_px
        Microns per px of each slide, or an AnnData that knows it, where `spots` is a table.

    Returns
    -------
    DataFrame
        Named by spot: `slide`, `donor`, `group`, `study` where it is known, `label` (None where
        there is none), `x_px`, `y_px` and, where the scale is known, `x_um`, `y_um`. Sections of
        one `group` were cut next to each other.

    Raises
    ------
    DataError
        When a column or a scale is missing; a spot has no slide, donor, group or coordinates; a
        slide has two donors; or a spot id is repeated.
    """
    if isinstance(spots, ad.AnnData):
        spots = {"": spots}
    if isinstance(spots, Mapping):
        um_per_px = {
            slide: known["um_per_px"]
            for adata in spots.values()
            for slide, known in adata.uns.get("spatial", {}).items()
        } | dict(um_per_px or {})
        spots = pd.concat([_obs_with_places(adata) for adata in spots.values()])
    who = ["slide", "donor", "group"]
    if lacking := [c for c in (*who, "label", "x_px", "y_px") if c not in spots]:
        fix = "take helpers.contrast.Pairs.spots, or slides from helpers.slides"
        raise DataError(f"the table of spots lacks {lacking}", fix=fix)
    wanted = [*who, "study", "label", "x_px", "y_px", "x_um", "y_um"]
    table = spots[[column for column in wanted if column in spots]].copy()
    table["label"] = table["label"].astype(object).where(table["label"].notna(), None)
    _check_spot_table(table)
    for column in table.columns.intersection([*who, "study"]):
        table[column] = table[column].astype(str)
    if um_per_px is None:
        return table
    um_per_px = {
        slide: one.uns["spatial"][slide]["um_per_px"] if isinstance(one, ad.AnnData) else one
        for slide, one in um_per_px.items()
    }
    for slide in table["slide"].unique():
        if slide not in um_per_px:
            raise DataError("no um per px is known", slide=slide, fix="add it to um_per_px")
        _check_scale(um_per_px[slide], slide)
    scale = table["slide"].map(um_per_px).astype(float)
    table["x_um"], table["y_um"] = table["x_px"] * scale, table["y_px"] * scale
    return table


def _obs_with_places(adata: ad.AnnData) -> pd.DataFrame:
    """Return ``obs`` with a label, as text, and the coordinates as columns."""
    obs = adata.obs.copy()
    # As text, because the categories may differ between slides.
    obs["label"] = obs["label"].astype(object) if "label" in obs else None
    obs["x_px"], obs["y_px"] = adata.obsm["spatial"][:, :2].T
    return obs


def _check_spot_table(table: pd.DataFrame) -> None:
    """Refuse a table that is empty, repeats a spot, or lacks a fact that every spot needs."""
    if table.empty:
        raise DataError("there are no spots", fix="check what was selected")
    for column in table.columns.intersection(["slide", "donor", "group", "study"]):
        if (missing := table[column].isna()).any():
            what = f"spot {missing.idxmax()} has no {column}"
            raise DataError(what, fix=f"fill in the {column} of every spot")
    for column in ("donor", "group"):
        n_values = table.groupby("slide", observed=True)[column].nunique()
        if (n_values > 1).any():
            what = f"its spots have more than one {column}"
            raise DataError(what, slide=n_values.idxmax(), fix=f"give each slide one {column}")
    lost = ~np.isfinite(table[["x_px", "y_px"]].to_numpy(float)).all(axis=1)
    twice = table.set_index("slide", append=True).index.duplicated()
    for bad, what in ((lost, "spot {} has no coordinates"), (twice, "duplicate spot id {}")):
        if bad.any():
            what, slide = what.format(table.index[bad][0]), table["slide"][bad].iloc[0]
            raise DataError(what, slide=slide, fix="give each spot one row, with x_px and y_px")


# --------------------------------------------------------------------------- scale and image


def um_per_px(adata: ad.AnnData) -> float:
    """Return how many microns one px of the full image spans."""
    return float(_spatial(adata)["um_per_px"])


def image_path(adata: ad.AnnData) -> Path:
    """Return the path of the full image."""
    return Path(_spatial(adata)["metadata"]["image_path"])


def spot_side_px(adata: ad.AnnData) -> float:
    """Return the diameter of a spot in px of the full image: the side of the paper's sub-tile."""
    return float(_spatial(adata)["scalefactors"]["spot_diameter_fullres"])


def _spatial(adata: ad.AnnData) -> dict:
    known = adata.uns["spatial"]
    if len(known) > 1:
        what = f"this AnnData holds {len(known)} slides"
        raise DataError(what, fix=f"give one slide at a time, of {list(known)}")
    return next(iter(known.values()))


def estimate_um_per_px(
    xy: np.ndarray, tech: str, radius_px: float | None = None, *, slide: str | None = None
) -> float:
    """Derive the scale of an image from the geometry of the array on it.

    The files state no scale, but the array's is known: the original Spatial Transcriptomics array
    has spots of 100 um every 200 um (Stahl et al. 2016), Visium spots of 55 um every 100 um.

    Parameters
    ----------
    xy
        Spot centres in px, shape (n_spots, 2).
    tech
        ``"ST"``, ``"Visium"`` or ``"VisiumHD"``.
    radius_px
        Radius of a spot in px. For ST it gives the scale, since those spots were located one by
        one and their distances may scatter; the printed Visium grids give it through the pitch.
    slide
        Its name, for the error.

    Returns
    -------
    um per px.
    """
    pitch = _pitch_px(xy) if len(xy) > 4 else None
    from_radius = SPOT_UM[tech] / (2 * radius_px) if radius_px else None
    from_pitch = PITCH_UM[tech] / pitch if pitch else None
    scale = from_radius if tech == "ST" and from_radius else from_pitch or from_radius
    if scale is None:
        fix = "state um_per_px yourself"
        raise DataError("too few spots to derive um per px", slide=slide, fix=fix)
    if from_radius and from_pitch and not 0.75 < from_radius / from_pitch < 1.33:
        logger.warning(
            "the radius says %.3f um/px, the distance of neighbours %.3f: not a standard %s array?",
            from_radius, from_pitch, tech,
        )  # fmt: skip
    return scale


def _pitch_px(xy: np.ndarray) -> float | None:
    """Median distance between neighbours on the grid, in px; None when spots coincide."""
    distance, _ = cKDTree(xy).query(xy, k=5)
    distance = distance[:, 1:]
    # A spot at the edge has fewer than four neighbours: the others are diagonal, 1.4 times as far.
    near = distance[distance < 1.25 * np.median(distance[:, 0])]
    return float(np.median(near)) if len(near) and np.median(near) > 0 else None


def attach_image(
    adata: ad.AnnData,
    slide: str,
    path: Path,
    tech: str,
    *,
    radius_px: float | None = None,
    um_per_px: float | None = None,
    image: bool = True,
) -> ad.AnnData:
    """Fill in ``uns["spatial"]``: the image, its size and its scale; check that the spots fit it.

    The scale is `um_per_px`, or else derived from the array; see `estimate_um_per_px`.
    """
    if tech not in SPOT_UM:
        raise DataError(f"unknown array {tech!r}", slide=slide, fix=f"one of {list(SPOT_UM)}")
    info = images.info(path, slide=slide)
    if um_per_px is None:
        um_per_px = estimate_um_per_px(adata.obsm["spatial"], tech, radius_px, slide=slide)
    _check_scale(um_per_px, slide)
    pictures, factor = {}, 1.0
    if image:
        pictures["hires"] = images.read(path, max_side=HIRES_SIDE, slide=slide)
        factor = max(pictures["hires"].shape[:2]) / max(info.width, info.height)
    diameter = 2 * radius_px if radius_px else SPOT_UM[tech] / um_per_px
    adata.uns["spatial"] = {
        slide: {
            "images": pictures,
            "scalefactors": {"tissue_hires_scalef": factor, "spot_diameter_fullres": diameter},
            "metadata": {"image_path": str(path), "width_px": info.width, "height_px": info.height}
            | {"tech": tech},
            "um_per_px": um_per_px,
        }
    }
    check_spots(adata, slide)
    return adata


def tissue_mask(picture: np.ndarray) -> np.ndarray:
    """Return where an RGB image shows tissue: smoothed colour above Otsu's threshold.

    Parameters
    ----------
    picture
        uint8, shape (h, w, 3). Stained tissue is coloured; background and a black border are grey.

    Returns
    -------
    bool, shape (h, w); False everywhere when the image has no colour.
    """
    from scipy.ndimage import uniform_filter
    from skimage.filters import threshold_otsu

    colour = np.ptp(picture, axis=2).astype(np.float32)
    # Smooth over the pale gaps between nuclei: tissue is a region, not a set of pixels.
    colour = uniform_filter(colour, size=1 + max(colour.shape) // 200)
    colour = np.minimum(colour, np.percentile(colour, 90))  # ink is brighter than any stain
    if np.ptp(colour) < 4:
        return np.zeros(colour.shape, bool)
    return colour > threshold_otsu(colour)


# --------------------------------------------------------------------------- checks


def check_spots(adata: ad.AnnData, slide: str | None = None) -> None:
    """Check that the spots of a slide lie on its image and, where that was read, on its tissue.

    Raises
    ------
    DataError
        When a spot lies outside the image, most lie off the tissue, or more would lie on it with
        x and y swapped.
    """
    slide = slide or next(iter(adata.uns["spatial"]))
    known, xy = adata.uns["spatial"][slide], adata.obsm["spatial"]
    where = {"slide": slide, "file": Path(known["metadata"]["image_path"])}
    size = known["metadata"]["width_px"], known["metadata"]["height_px"]
    outside = ((xy < 0) | (xy >= size)).any(axis=1)
    if outside.any():
        swapped_fit = ((xy[:, ::-1] >= 0) & (xy[:, ::-1] < size)).all()
        x, y = xy[outside][0]
        many = f"{outside.sum()} of {len(xy)} spots lie outside the image"
        what = f"{many} of {size[0]} x {size[1]} px, the first at x = {x:.0f}, y = {y:.0f}"
        fix = "x and y look swapped: the coordinate file has y first" if swapped_fit else SAME_SLIDE
        raise DataError(what, **where, fix=fix)
    if known["images"]:
        factor = known["scalefactors"]["tissue_hires_scalef"]
        _check_on_tissue(xy * factor, known["images"]["hires"], where)


def _check_on_tissue(xy: np.ndarray, picture: np.ndarray, where: dict) -> None:
    """Refuse coordinates that miss the tissue, or meet it better with x and y swapped."""
    mask = tissue_mask(picture)
    if not mask.any():
        what = "slide %s: the image has no colour; spot positions were not checked"
        logger.warning(what, where["slide"])
        return
    given, swapped = _share_on(mask, xy), _share_on(mask, xy[:, ::-1])
    if given < 0.3 or swapped - given > 0.1:
        what = f"{given:.0%} of the spots lie on tissue, {swapped:.0%} would with x and y swapped"
        fix = "swap x and y: the coordinate file has y first" if swapped > given else SAME_SLIDE
        raise DataError(what, **where, fix=fix)


def _share_on(mask: np.ndarray, xy: np.ndarray) -> float:
    """Share of points (x, y in px of the mask) that lie on the mask."""
    x, y = xy.astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < mask.shape[1]) & (y < mask.shape[0])
    return float(mask[y[inside], x[inside]].sum() / len(xy))


@contextlib.contextmanager
def _reading(path: Path, slide: str, kind: str, fix: str | None = None) -> Iterator[None]:
    """Refuse a file that is missing, or whose content is not of the kind that it should be."""
    if not path.is_file():
        raise DataError("the file is missing", slide=slide, file=path, fix="check the folder")
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError) as error:  # as pandas', pyarrow's, h5py's
        raise DataError(f"not {kind} ({error})", slide=slide, file=path, fix=fix) from error


def _check_unique_ids(ids: pd.Index, slide: str, file: Path) -> None:
    if ids.has_duplicates:
        what = f"duplicate spot id {ids[ids.duplicated()][0]}"
        raise DataError(what, slide=slide, file=file, fix="keep one row per spot")


def _check_scale(value: float, slide: str) -> None:
    if not (np.isfinite(value) and value > 0):
        what = f"{value} um per px is not a valid scale"
        raise DataError(what, slide=slide, fix="give a number above 0")


def _shared_ids(coord: pd.Index, spots: pd.Index, slide: str, path: Path) -> pd.Index:
    """Return the ids both files have, in the order of the coordinates; refuse too few."""
    if len(spots) == 0:
        raise DataError("the slide is empty: no spot has counts", slide=slide, file=path)
    shared = coord[coord.isin(spots)]
    most = max(len(coord), len(spots))
    if len(shared) < MIN_SHARED * most:
        both = f"both the {len(coord)} coordinates and the {len(spots)} counts"
        what = f"only {len(shared)} spot ids are in {both} (at least {MIN_SHARED:.0%} are needed)"
        ids = f"{next(iter(coord), None)!r} against {spots[0]!r}"
        fix = f"fetch both files again if one may be cut off, else compare the ids: {ids}"
        raise DataError(what, slide=slide, file=path, fix=fix)
    if len(shared) < most:
        logger.warning(
            "slide %s: %d spots with coordinates, %d with counts; the %d with both are kept",
            slide, len(coord), len(spots), len(shared),
        )  # fmt: skip
    return shared
