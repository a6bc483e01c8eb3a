"""A reader's own slide, from Space Ranger or h5ad to the AnnData that every chapter takes."""

import json
import logging
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from helpers import counts
from helpers.files import DataError
from helpers.slides import attach_image, shared_ids

logger = logging.getLogger(__name__)

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
