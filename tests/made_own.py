"""A reader's own slide of 36 spots, as Space Ranger 2 writes it and as h5ad."""

import json
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse

from helpers import slides

N_SPOTS = 36


def space_ranger(folder: Path) -> Path:
    """Write the folder: five features with four symbols, spots of 65 px every 100 px."""
    rng = np.random.default_rng(0)
    (folder / "spatial").mkdir(parents=True)
    barcodes = [f"ACGT{i:04d}-1" for i in range(N_SPOTS)]
    matrix = sparse.csc_matrix(rng.poisson(1, (5, N_SPOTS)).astype(np.int32))  # genes x spots
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = (
            matrix.data,
            matrix.indices,
            matrix.indptr,
        )
        group["shape"] = matrix.shape
        group["barcodes"] = np.array(barcodes, dtype="S")
        features = group.create_group("features")
        names = ["Ga", "Gb", "Gc", "Gd", "Gd"]
        features["id"] = np.array([f"ENS{i}" for i in range(5)], dtype="S")
        features["name"] = np.array(names, dtype="S")
        features["feature_type"] = np.array(["Gene Expression"] * 5, dtype="S")
        features["genome"] = np.array(["X"] * 5, dtype="S")
    row, col = np.divmod(np.arange(N_SPOTS), 6)
    pd.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": 1,
            "array_row": row,
            "array_col": col,
            "pxl_row_in_fullres": 100 + 100 * row,
            "pxl_col_in_fullres": 60 + 100 * col,
        }
    ).to_csv(folder / "spatial/tissue_positions.csv", index=False)
    (folder / "spatial/scalefactors_json.json").write_text(
        json.dumps({"spot_diameter_fullres": 65.0, "tissue_hires_scalef": 0.5})
    )
    picture = np.full((360, 400, 3), 245, np.uint8)
    picture[20:330, 10:310] = (200, 120, 170) + rng.integers(-20, 20, (310, 300, 3))
    picture[20:170, 10:310] -= np.array([60, 40, 20], np.uint8)  # the upper half is darker
    Image.fromarray(picture).save(folder / "spatial/tissue_hires_image.png")
    return folder


def full_image(folder: Path, path: Path) -> Path:
    """Write the image that Space Ranger was given, twice as wide as the one it wrote."""
    Image.open(folder / "spatial/tissue_hires_image.png").resize((800, 720)).save(path)
    return path


def h5ad(folder: Path, path: Path) -> tuple[Path, Path]:
    """Write the slide of a Space Ranger folder as h5ad; return its path and that of its image."""
    adata = slides.read_space_ranger(folder)
    bare = ad.AnnData(adata.X, obs=adata.obs[[]], var=adata.var[[]], obsm=dict(adata.obsm))
    bare.write_h5ad(path)
    return path, slides.image_path(adata)
