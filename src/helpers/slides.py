"""One slide, from its files on disk to one validated AnnData.

Whatever the files were (the dataset's official layout, a Space Ranger folder, an h5ad), the result
has the same shape, so that every later chapter takes a reader's own slide as it takes the book's:

``X`` raw counts (CSR, float32); ``obs`` with `slide`, `donor`, `group`, `study`, `label`;
``obsm["spatial"]`` x, y in px of the full image; ``uns["spatial"][slide]`` as squidpy expects it
(`images`, `scalefactors`, `metadata`), plus `um_per_px`.
"""

from __future__ import annotations

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
    from anndata import AnnData

    Spots = pd.DataFrame | AnnData | Mapping[str, AnnData]
    Scales = Mapping[str, float | AnnData] | None

logger = logging.getLogger(__name__)

SPOT_UM = {"ST": 100.0, "Visium": 55.0, "VisiumHD": 8.0}  # diameter of a spot, side of a bin
PITCH_UM = {"ST": 200.0, "Visium": 100.0, "VisiumHD": 8.0}  # centre to centre
MIN_SHARED = 0.8  # of the longer id list; below it a file is cut off or of another slide
HIRES_SIDE = 2000  # px, the longest side of the image kept for plotting
NO_LABEL = ("", "undetermined", "nan", "NA")


def load_study(
    name: str, *, root: Path | str | None = None, image: bool = True
) -> dict[str, ad.AnnData]:
    """Load every slide of a study of the book, in its order.

    Parameters
    ----------
    name
        ``"demo"`` (simulated on the spot when it is not in the cache), ``"mob"``, ``"her2st"`` or
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
        The book's study the slide belongs to; found by the slide's name when not given.

    Returns
    -------
    AnnData of shape (n_spots, n_genes), laid out as the module says. Spots are those with both
    coordinates and counts, in the order of the coordinate file.

    Raises
    ------
    DataError
        When a file is missing or damaged, the spot ids of two files do not match, a spot lies
        outside the image, or most spots lie off the tissue (as when x and y are swapped).
    """
    home = _study_of(slide, study)
    if home is not None and home.name == "demo" and root is None:
        from helpers import simulate

        root = simulate.demo_root()
    section = home.section(slide) if home else None
    tech = section.tech if section else catalog.technology(slide, root=root)

    coord = _read_coordinates(catalog.find(slide, "coord", tech=tech, root=root), slide)
    count_path = catalog.find(slide, "gene_exp", tech=tech, root=root)
    table = counts.load(count_path, slide=slide)
    shared = shared_ids(coord.index, table.spots, slide, count_path)
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
    adata.obs["label"] = _labels(slide, section, root, adata.obs_names)
    for key, value in {
        "slide": slide,
        "donor": section.donor if section else slide,
        "group": section.group if section else slide,
        "study": home.name if home else "own",
    }.items():
        adata.obs[key] = pd.Categorical([value] * adata.n_obs)
    if home is not None:
        order = [name for name in home.labels if name in set(adata.obs["label"].dropna())]
        rest = sorted(set(adata.obs["label"].dropna()) - set(order))
        adata.obs["label"] = pd.Categorical(adata.obs["label"], categories=order + rest)
    path = catalog.find(slide, "image", tech=tech, root=root)
    radius = float(coord["r"].median())
    return attach_image(adata, slide, path, tech, radius_px=radius, image=image)


def um_per_px(adata: ad.AnnData, slide: str | None = None) -> float:
    """Return how many microns one px of the full image spans."""
    return float(_spatial(adata, slide)["um_per_px"])


def image_path(adata: ad.AnnData, slide: str | None = None) -> Path:
    """Return the path of the full image."""
    return Path(_spatial(adata, slide)["metadata"]["image_path"])


def spot_side_px(adata: ad.AnnData, slide: str | None = None) -> float:
    """Return the diameter of a spot in px of the full image: the side of the paper's sub-tile."""
    return float(_spatial(adata, slide)["scalefactors"]["spot_diameter_fullres"])


def _spatial(adata: ad.AnnData, slide: str | None) -> dict:
    known = adata.uns["spatial"]
    if slide is None and len(known) > 1:
        raise DataError(f"this AnnData holds {len(known)} slides", fix=f"name one of {list(known)}")
    return known[slide or next(iter(known))]


# --------------------------------------------------------------------------- the official files


def _study_of(slide: str, name: str | None) -> catalog.Study | None:
    """Return the study called `name`, else the first one that has the slide, else None."""
    if name is not None:
        return catalog.study(name)
    for study in catalog.STUDIES.values():
        if any(section.slide == slide for section in study.sections):
            return study
    return None


def _read_coordinates(path: Path, slide: str) -> pd.DataFrame:
    """Read spot centres: index = spot id, columns `xaxis`, `yaxis`, `r` in px."""
    coord = _read_table(path, slide, ["xaxis", "yaxis", "r"])
    if coord.empty:
        raise DataError("the slide is empty: no spot has coordinates", slide=slide, file=path)
    values = coord[["xaxis", "yaxis", "r"]].apply(pd.to_numeric, errors="coerce")
    if bad := int((~np.isfinite(values)).any(axis=1).sum()):
        raise DataError(f"{bad} spots have no number for x, y or r", slide=slide, file=path)
    if (values["r"] <= 0).any():
        raise DataError("the spot radius r must be above 0 px", slide=slide, file=path)
    return values


def _read_table(path: Path, slide: str, columns: list[str]) -> pd.DataFrame:
    """Read a table of text whose first column is the spot id."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:  # pandas' own errors and wrong encodings are ValueErrors
        raise DataError(
            f"not a table ({error})", slide=slide, file=path, fix="fetch the file again"
        ) from error
    if missing := sorted(set(columns) - set(table.columns)):
        raise DataError(
            f"the columns {missing} are missing; there are {list(table.columns[:5])}",
            slide=slide,
            file=path,
            fix="use the official file: comma separated, the spot id first",
        )
    table = table.set_index(table.columns[0])
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise DataError(f"the spot id {twice} stands twice", slide=slide, file=path)
    return table


def shared_ids(coord: pd.Index, spots: pd.Index, slide: str, path: Path) -> pd.Index:
    """Return the ids both files have, in the order of the coordinates; refuse too few."""
    if len(spots) == 0:
        raise DataError("the slide is empty: no spot has counts", slide=slide, file=path)
    shared = coord[coord.isin(spots)]
    share = len(shared) / max(len(coord), len(spots))
    if share < MIN_SHARED:
        raise DataError(
            f"only {len(shared)} spot ids are in both the {len(coord)} coordinates and the "
            f"{len(spots)} counts ({share:.0%}, at least {MIN_SHARED:.0%} is needed)",
            slide=slide,
            file=path,
            fix="fetch both files again if one may be cut off, else compare the ids: "
            f"{next(iter(coord), None)!r} against {spots[0]!r}",
        )
    if len(shared) < max(len(coord), len(spots)):
        logger.warning(
            "slide %s: %d spots with coordinates, %d with counts; the %d with both are kept",
            slide, len(coord), len(spots), len(shared),
        )  # fmt: skip
    return shared


def _labels(
    slide: str, section: catalog.Section | None, root: Path | str | None, spots: pd.Index
) -> pd.Series:
    """Return one label per spot, missing where there is none."""
    none = pd.Series(index=spots, dtype=object)
    if section is not None and not section.annotated:
        return none
    try:
        path = catalog.find(slide, "annotation", tech="ST", root=root)
    except DataError as error:
        if section is not None:  # the book says it is annotated
            raise
        logger.warning("slide %s: its spots carry no label (%s)", slide, error)
        return none
    labels = _read_table(path, slide, ["V2"])["V2"].str.strip()
    if len(labels) == 0 or labels.index.isin(spots).mean() < MIN_SHARED:
        raise DataError(
            f"only {labels.index.isin(spots).sum()} of {len(labels)} annotated spots are on the "
            "slide",
            slide=slide,
            file=path,
            fix="fetch the file again if it may be cut off, else compare its ids: "
            f"{next(iter(labels.index), None)!r} against {spots[0]!r}",
        )
    return labels.reindex(spots).replace(list(NO_LABEL), np.nan)


# --------------------------------------------------------------------------- geometry and image


def estimate_um_per_px(
    xy: np.ndarray, tech: str, radius_px: float | None = None, *, bin_um: float | None = None
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
        The dataset's authors computed r from the distance between columns, so the two agree on any
        square array, standard or not: only knowing the array gives the scale.
    bin_um
        Side of a Visium HD bin, 8 um when not given.

    Returns
    -------
    um per px.
    """
    from_radius = (bin_um or SPOT_UM[tech]) / (2 * radius_px) if radius_px else None
    pitch = _pitch_px(xy) if len(xy) > 4 else None
    from_pitch = (bin_um or PITCH_UM[tech]) / pitch if pitch else None
    scale = from_radius if tech == "ST" and from_radius else from_pitch or from_radius
    if scale is None:
        raise DataError("too few spots to derive um per px", fix="state um_per_px yourself")
    if from_radius and from_pitch and not 0.75 < from_radius / from_pitch < 1.33:
        logger.warning(
            "the radius says %.3f um/px, the distance of neighbours %.3f: not a standard %s array?",
            from_radius, from_pitch, tech,
        )  # fmt: skip
    return scale


def _pitch_px(xy: np.ndarray) -> float | None:
    """Median distance to a next neighbour on the grid, in px; None when spots coincide."""
    distance, _ = cKDTree(xy).query(xy, k=5)
    distance = distance[:, 1:]
    # Spots at an edge have no four next neighbours: their others are diagonal, 1.4 times as far.
    near = distance[distance < 1.25 * np.median(distance[:, 0])]
    return float(np.median(near)) if len(near) and np.median(near) > 0 else None


def attach_image(
    adata: ad.AnnData,
    slide: str,
    path: Path,
    tech: str,
    *,
    radius_px: float | None,
    image: bool,
    scale: float | None = None,
    bin_um: float | None = None,
) -> ad.AnnData:
    """Add the image, its scale and where it lies; check that the spots fit it."""
    if tech not in SPOT_UM:
        raise DataError(f"unknown array {tech!r}", slide=slide, fix=f"one of {list(SPOT_UM)}")
    if scale is not None and not (np.isfinite(scale) and scale > 0):
        raise DataError(f"{scale} um per px is no scale", slide=slide, fix="a number above 0")
    xy = adata.obsm["spatial"]
    info = images.info(path, slide=slide)
    try:
        scale = scale or estimate_um_per_px(xy, tech, radius_px, bin_um=bin_um)
    except DataError as error:
        raise DataError(str(error).rstrip("."), slide=slide, file=path) from error
    pictures, factor = {}, 1.0
    if image:
        pictures["hires"] = images.read(path, max_side=HIRES_SIDE, slide=slide)
        factor = max(pictures["hires"].shape[:2]) / max(info.width, info.height)
    adata.uns["spatial"] = {
        slide: {
            "images": pictures,
            "scalefactors": {
                "tissue_hires_scalef": factor,
                "spot_diameter_fullres": 2 * radius_px
                if radius_px
                else (bin_um or SPOT_UM[tech]) / scale,
            },
            "metadata": {
                "image_path": str(path),
                "width_px": info.width,
                "height_px": info.height,
                "tech": tech,
            },
            "um_per_px": scale,
        }
    }
    check_spots(adata, slide)
    return adata


def check_spots(adata: ad.AnnData, slide: str | None = None) -> None:
    """Check that the spots of a slide lie on its image and, where that was read, on its tissue.

    Raises
    ------
    DataError
        When a spot lies outside the image, most lie off the tissue, or more would lie on it with
        x and y swapped.
    """
    slide = slide or next(iter(adata.uns["spatial"]))
    known, path = _spatial(adata, slide), image_path(adata, slide)
    size, xy = known["metadata"], adata.obsm["spatial"]
    _check_inside(xy, size["width_px"], size["height_px"], slide, path)
    if known["images"]:
        factor = known["scalefactors"]["tissue_hires_scalef"]
        _check_on_tissue(xy * factor, known["images"]["hires"], slide, path)


def _check_inside(xy: np.ndarray, width: int, height: int, slide: str, path: Path) -> None:
    """Refuse spot centres that are not on the image."""
    outside = ((xy < 0) | (xy >= (width, height))).any(axis=1)
    if not outside.any():
        return
    swapped = ((xy[:, ::-1] < 0) | (xy[:, ::-1] >= (width, height))).any()
    x, y = xy[outside][0]
    raise DataError(
        f"{outside.sum()} of {len(xy)} spots lie outside the image of {width} x {height} px, the "
        f"first at x = {x:.0f}, y = {y:.0f}",
        slide=slide,
        file=path,
        fix="x and y look swapped: the coordinate file has y first"
        if not swapped
        else "check that image and coordinates are of the same slide and the same size",
    )


def _check_on_tissue(xy: np.ndarray, picture: np.ndarray, slide: str, path: Path) -> None:
    """Refuse coordinates that miss the tissue, or meet it better with x and y swapped."""
    mask = tissue_mask(picture)
    if not mask.any():
        logger.warning("slide %s: the image has no colour; nobody checked its spots", slide)
        return
    given, swapped = _share_on(mask, xy), _share_on(mask, xy[:, ::-1])
    if given >= 0.3 and swapped - given <= 0.1:
        return
    raise DataError(
        f"{given:.0%} of the spots lie on tissue, {swapped:.0%} would with x and y swapped",
        slide=slide,
        file=path,
        fix="swap x and y: the coordinate file has y first"
        if swapped > given
        else "check that image and coordinates are of the same slide and the same size",
    )


def tissue_mask(picture: np.ndarray) -> np.ndarray:
    """Return where an RGB image shows tissue: smoothed colour above Otsu's threshold.

    Parameters
    ----------
    picture
        uint8, shape (h, w, 3). Stained tissue is coloured; glass is grey, and so is a black border.

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


def _share_on(mask: np.ndarray, xy: np.ndarray) -> float:
    """Share of points (x, y in px of the mask) that lie on the mask."""
    x, y = xy.astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < mask.shape[1]) & (y < mask.shape[0])
    return float(mask[y[inside], x[inside]].sum() / len(xy))


# --------------------------------------------------------------------------- other formats


ENSEMBL = r"ENS[A-Z]*G\d{11}(\.\d+)?"  # the id of a gene, as ENSG00000139618


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
    matrix = _need(folder / "filtered_feature_bc_matrix.h5", slide)
    if image_file is not None and not Path(image_file).is_file():
        fix = "give the file that Space Ranger was given as --image, which it does not copy"
        raise DataError("the image is missing", slide=slide, file=Path(image_file), fix=fix)
    factors = _scale_factors(folder / "spatial" / "scalefactors_json.json", slide)
    try:
        with warnings.catch_warnings():  # repeated symbols are added up below
            warnings.filterwarnings("ignore", "Variable names are not unique")
            adata = sc.read_10x_h5(matrix)
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise DataError(f"not a 10x count matrix ({error})", slide=slide, file=matrix) from error
    if not adata.obs_names.is_unique:
        raise DataError("a barcode stands twice", slide=slide, file=matrix)
    adata = _unique_genes(adata, slide, matrix)
    positions = _positions(folder / "spatial", slide)
    positions = positions[positions["in_tissue"] == 1]
    shared = shared_ids(positions.index, adata.obs_names, slide, matrix)
    adata = adata[shared].copy()
    bin_um = factors.get("bin_size_um")
    scale, factor = factors.get("microns_per_pixel"), 1.0
    if image_file is None:
        image_file = folder / "spatial" / "tissue_hires_image.png"
        factor = factors["tissue_hires_scalef"]
        logger.warning(
            "slide %s: no full image given; tiles will be as coarse as its thumbnail", slide
        )
    positions = positions.loc[shared]
    adata.obsm["spatial"] = factor * positions[["x", "y"]].to_numpy(float)
    adata.obs[["array_x", "array_y"]] = positions[["array_col", "array_row"]].to_numpy(int)
    tech, scale = "VisiumHD" if bin_um else "Visium", scale / factor if scale else None
    return _own(adata, slide, Path(image_file), tech, scale, bin_um)


def read_h5ad(
    path: Path | str,
    *,
    image_file: Path | str,
    tech: str = "Visium",
    um_per_px: float | None = None,
    bin_um: float | None = None,
    symbols: str | None = None,
    slide: str | None = None,
) -> ad.AnnData:
    """Read a slide from h5ad: raw counts in ``X`` or ``layers["counts"]``, ``obsm["spatial"]``.

    Parameters
    ----------
    path
        The file.
    image_file
        The image whose px ``obsm["spatial"]`` (x, y) counts.
    tech, um_per_px, bin_um
        The array (``"ST"``, ``"Visium"``, ``"VisiumHD"``), from whose geometry the scale is
        derived, or the scale itself; for Visium HD the side of a bin in um, 8 when not given.
    symbols
        The column of ``var`` with the gene symbols, where its index has something else.
    slide
        A name for the slide; the file's when not given.

    Raises
    ------
    DataError
        When counts or coordinates are missing, not raw, or do not fit the image.
    """
    path = Path(path)
    slide = slide or path.stem
    try:
        adata = ad.read_h5ad(_need(path, slide))
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"not an h5ad file ({error})", slide=slide, file=path) from error
    if symbols is not None:
        if symbols not in adata.var:
            fix = f"one of {list(adata.var)}"
            raise DataError(f"var has no column {symbols!r}", slide=slide, file=path, fix=fix)
        adata.var_names = adata.var[symbols].astype(str)
    if "spatial" not in adata.obsm:
        raise DataError('obsm["spatial"] (x, y in px) is missing', slide=slide, file=path)
    xy = np.asarray(adata.obsm["spatial"], dtype=float)
    if xy.ndim != 2 or xy.shape[1] < 2 or not np.isfinite(xy).all():
        raise DataError('obsm["spatial"] needs two numbers a spot', slide=slide, file=path)
    adata.obsm["spatial"] = xy[:, :2]
    raw = adata.layers.get("counts", adata.X)
    if raw is None:
        raise DataError("there are no counts", slide=slide, file=path, fix="put them into X")
    adata.X = sparse.csr_matrix(raw, dtype=np.float32)
    adata.layers.pop("counts", None)  # X has them; what was normalised is left behind
    adata.uns.pop("log1p", None)
    values = adata.X.data
    if not (np.isfinite(values).all() and (values >= 0).all() and (values % 1 == 0).all()):
        raise DataError(
            "the counts are not whole numbers from 0 up: they were normalised, or are damaged",
            slide=slide,
            file=path,
            fix='put the raw counts into X or layers["counts"]',
        )
    return _own(_unique_genes(adata, slide, path), slide, Path(image_file), tech, um_per_px, bin_um)


def _own(
    adata: ad.AnnData,
    slide: str,
    image_file: Path,
    tech: str,
    scale: float | None,
    bin_um: float | None,
) -> ad.AnnData:
    """Give a reader's own slide the columns that the dataset's slides have."""
    if adata.n_obs == 0 or not adata.obs_names.is_unique:
        raise DataError("the slide is empty, or has a spot id twice", slide=slide)
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    adata.obs_names = slide + "_" + adata.obs_names.astype(str)
    adata.obs["slide"] = pd.Categorical([slide] * adata.n_obs)
    for key, value in {"donor": slide, "group": slide, "study": "own"}.items():
        if key not in adata.obs:
            adata.obs[key] = pd.Categorical([value] * adata.n_obs)
    if "label" not in adata.obs:
        adata.obs["label"] = pd.Categorical([np.nan] * adata.n_obs)
    image_file = _need(image_file, slide)
    if adata.var_names.str.fullmatch(ENSEMBL).mean() > 0.5:
        logger.warning(
            "slide %s: its genes are named by ids (%s), panels name symbols; read_h5ad takes them "
            "from the column of var that you give as symbols=", slide, adata.var_names[0],
        )  # fmt: skip
    return attach_image(
        adata, slide, image_file, tech, radius_px=None, image=True, scale=scale, bin_um=bin_um
    )


def _unique_genes(adata: ad.AnnData, slide: str, file: Path) -> ad.AnnData:
    """Add up the counts of genes with the same symbol, as for the dataset's own slides."""
    if adata.var_names.is_unique:
        return adata
    genes = adata.var_names.unique()
    X = counts.add_up(sparse.csr_matrix(adata.X), adata.var_names, genes, slide, file)
    return ad.AnnData(X, obs=adata.obs, var=pd.DataFrame(index=genes), obsm=dict(adata.obsm))


def _need(path: Path, slide: str) -> Path:
    """Return the path when it is a file."""
    if not path.is_file():
        raise DataError("the file is missing", slide=slide, file=path, fix="check the folder")
    return path


def _scale_factors(path: Path, slide: str) -> dict[str, float]:
    """Read Space Ranger's scale factors."""
    try:
        factors = json.loads(_need(path, slide).read_text())
        factors["tissue_hires_scalef"] = float(factors["tissue_hires_scalef"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"not Space Ranger's scale factors ({error})", slide=slide, file=path
        ) from error
    return factors


def _positions(folder: Path, slide: str) -> pd.DataFrame:
    """Read spot positions as any version of Space Ranger writes them; x, y in px."""
    names = ["barcode", "in_tissue", "array_row", "array_col", "y", "x"]
    official = [*names[:4], "pxl_row_in_fullres", "pxl_col_in_fullres"]
    known = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
    path = next((folder / name for name in known if (folder / name).is_file()), None)
    if path is None:
        raise DataError(
            "no tissue_positions file", slide=slide, file=folder, fix="copy the whole spatial/"
        )
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)[official]
        elif path.read_bytes().startswith(b"barcode"):
            table = pd.read_csv(path)[official]
        else:  # version 1 wrote no header
            table = pd.read_csv(path, header=None, names=official)
        table = table.set_axis(names, axis=1).set_index("barcode")
        if not np.isfinite(table.to_numpy(float)).all():
            raise ValueError("a position is missing")
    except (ValueError, KeyError, OSError) as error:  # pyarrow's and pandas' errors are ValueErrors
        raise DataError(f"not a table of positions ({error})", slide=slide, file=path) from error
    return table


# --------------------------------------------------------------------------- the table of spots


WHO = ("slide", "donor", "group")
"""Columns that say whose a spot is; sections of one `group` were cut next to each other."""


def spot_table(spots: Spots, um_per_px: Scales = None) -> pd.DataFrame:
    """Return who and where the spots are, in the order given.

    Parameters
    ----------
    spots
        `Pairs.spots`, an AnnData from this module, several of them by slide, or what this
        function returned.
    um_per_px
        Per slide, microns per px or an AnnData that knows it. AnnData in `spots` know their own.

    Returns
    -------
    DataFrame
        Named by spot: `slide`, `donor`, `group`, `study` where it is known, `label` (missing where
        there is none), `x_px`, `y_px` and, where the scale is known, `x_um`, `y_um`.

    Raises
    ------
    DataError
        When a column or a scale is missing; a spot has no slide, donor or group; a slide has two
        donors; or a spot is there twice.
    """
    if hasattr(spots, "obs"):
        spots = {"": spots}
    if isinstance(spots, Mapping):
        um_per_px = {s: a for adata in spots.values() for s, a in _own_scales(adata)} | dict(
            um_per_px or {}
        )
        spots = pd.concat([_observations(adata) for adata in spots.values()])
    if lacking := [c for c in (*WHO, "label", "x_px", "y_px") if c not in spots]:
        fix = "take helpers.contrast.Pairs.spots, or slides from helpers.slides"
        raise DataError(f"the table of spots lacks {lacking}", fix=fix)
    wanted = [*WHO, "study", "label", "x_px", "y_px", "x_um", "y_um"]
    table = spots[[column for column in wanted if column in spots]].copy()
    table["label"] = table["label"].astype(object).where(table["label"].notna(), None)
    for column in (c for c in (*WHO, "study") if c in table):
        if table[column].isna().any():
            spot = table.index[table[column].isna()][0]
            raise DataError(f"spot {spot} has no {column}", fix=f"say the {column} of every spot")
        table[column] = table[column].astype(str)
    _check_spot_table(table)
    if um_per_px is not None:
        per_spot = table["slide"].map({s: _one_scale(value, s) for s, value in um_per_px.items()})
        if per_spot.isna().any():
            slide = table["slide"][per_spot.isna().to_numpy()].iloc[0]
            raise DataError("no um per px is known", slide=slide, fix="add it to um_per_px")
        table["x_um"], table["y_um"] = table["x_px"] * per_spot, table["y_px"] * per_spot
    return table


def _own_scales(adata: AnnData) -> Iterator[tuple[str, float]]:
    for slide, known in adata.uns.get("spatial", {}).items():
        yield slide, known["um_per_px"]


def _one_scale(value: float | AnnData, slide: str) -> float:
    value = float(dict(_own_scales(value))[slide] if hasattr(value, "uns") else value)
    if not (np.isfinite(value) and value > 0):
        raise DataError(f"{value} um per px is no scale", slide=slide, fix="a number above 0")
    return value


def _observations(adata: AnnData) -> pd.DataFrame:
    table = adata.obs.copy()
    table[["x_px", "y_px"]] = adata.obsm["spatial"]
    label = table["label"].astype(object) if "label" in table else None  # a slide may have none
    return table.assign(label=label)


def _check_spot_table(table: pd.DataFrame) -> None:
    """Refuse a table that names nobody, one slide twice over, or no place."""
    if table.empty:
        raise DataError("there are no spots")
    for column in ("donor", "group"):
        owners = table.groupby("slide")[column].nunique()
        if (owners > 1).any():
            raise DataError(f"its spots have more than one {column}", slide=str(owners.idxmax()))
    twice = table.set_index("slide", append=True).index.duplicated()
    if twice.any():
        what = f"spot {table.index[twice][0]} is there twice"
        raise DataError(what, slide=table["slide"][twice].iloc[0], fix="name each spot once")
    lost = ~np.isfinite(table[["x_px", "y_px"]].to_numpy(float)).all(axis=1)
    if lost.any():
        slide = table["slide"].iloc[lost.argmax()]
        raise DataError(f"spot {table.index[lost.argmax()]} has no place", slide=slide)
