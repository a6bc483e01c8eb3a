"""From an h5ad file and its image to tiles, embeddings and a figure of their first component."""

import argparse
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from helpers import plots, slides, tiles, towers

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", help='raw counts, and obsm["spatial"]: x, y in px of the image')
parser.add_argument("image", help="a PNG, JPEG or TIFF")
parser.add_argument("out", type=Path, help="a folder for the results")
parser.add_argument("--tower", default="colour", help="colour, mini, clip, plip or another")
parser.add_argument("--tech", default="Visium", help="the array: ST, Visium or VisiumHD")
given = parser.parse_args()

adata = slides.read_h5ad(given.file, image_file=given.image, tech=given.tech)
tower = towers.load(given.tower)
cut = tiles.cut(adata, side_um=100, size=tower.size_px)
adata.obsm["image"] = towers.embed(tower, cut.array)
scaled = StandardScaler().fit_transform(adata.obsm["image"])
adata.obs["component"] = PCA(1).fit_transform(scaled)[:, 0]

given.out.mkdir(parents=True, exist_ok=True)
np.save(given.out / "tiles.npy", cut.array)
cut.index.to_csv(given.out / "tiles.csv")
adata.write_h5ad(given.out / "slide.h5ad")
plots.style()
ax = plots.spots(adata, "component", label="first component", zoom=True)
ax.figure.savefig(given.out / "figure.png")
