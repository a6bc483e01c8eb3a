"""From a Space Ranger folder to tiles, embeddings and a figure of clusters."""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.preprocessing import StandardScaler

from helpers import metrics, plots, slides, tiles, towers

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="what Space Ranger wrote: the folder outs")
parser.add_argument("out", type=Path, help="a folder for the results")
parser.add_argument("--image", help="the full-resolution image that Space Ranger was given")
parser.add_argument("--tower", default="colour", help="colour, mini, clip, plip or another")
parser.add_argument("--clusters", type=int, default=5, help="how many to find")
given = parser.parse_args()

adata = slides.read_space_ranger(given.folder, image_file=given.image)
tower = towers.load(given.tower)
cut = tiles.cut(adata, side_um=100, size=tower.size_px)
adata.obsm["image"] = towers.embed(tower, cut.array)
scaled = StandardScaler().fit_transform(adata.obsm["image"])
adata.obs["cluster"] = pd.Categorical(metrics.kmeans(scaled, given.clusters) + 1)

given.out.mkdir(parents=True, exist_ok=True)
np.save(given.out / "tiles.npy", cut.array)
cut.index.to_csv(given.out / "tiles.csv")
adata.write_h5ad(given.out / "slide.h5ad")
plots.style()
ax = plots.spots(adata, "cluster", zoom=True)
ax.figure.savefig(given.out / "figure.png")
