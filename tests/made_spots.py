"""Spots of a small study without slides: who they are, where, and features that know it."""

import numpy as np
import pandas as pd

UM_PER_PX = 2.0
SLIDES = {  # slide: donor, group
    "A1": ("A", "A"),
    "A2": ("A", "A"),
    "B1": ("B", "B"),
    "B2": ("B", "B"),
    "C1": ("C", "C-left"),
    "C2": ("C", "C-right"),
}
SCALES = dict.fromkeys(SLIDES, UM_PER_PX)


def spots(side: int = 9, slides: dict = SLIDES, pitch_um: float = 200.0) -> pd.DataFrame:
    """Square slides of `side` x `side` spots; three layers from top to bottom are the labels."""
    tables = []
    for slide, (donor, group) in slides.items():
        x, y = (a.ravel() for a in np.meshgrid(np.arange(side), np.arange(side)))
        table = pd.DataFrame({"x_px": x, "y_px": y}) * (pitch_um / UM_PER_PX)
        table.index = [f"{slide}_{i}x{j}" for i, j in zip(x, y, strict=True)]
        table["label"] = np.array(["inner", "middle", "outer"])[y * 3 // side]
        tables.append(table.assign(slide=slide, donor=donor, group=group))
    return pd.concat(tables)


def telling(table: pd.DataFrame, noise: float = 1.0, d: int = 8, seed: int = 0) -> np.ndarray:
    """Features that tell the label, with noise; float32 ``(n, d)``."""
    rng = np.random.default_rng(seed)
    codes = pd.factorize(table["label"], sort=True)[0]
    x = rng.normal(0, noise, (len(table), d))
    x[:, :3] += np.eye(3)[codes]
    return x.astype(np.float32)


def shuffled(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The same spots, their labels dealt out at random."""
    return table.assign(label=np.random.default_rng(seed).permutation(table["label"]))
