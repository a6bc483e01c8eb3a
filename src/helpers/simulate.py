"""Simulate a small study with known truth, in the official layout of STimage-1K4M.

Six sections (three donors, two adjacent sections each) of an imaginary organ: five layers around a
cavity, cut off on one side.

1. The picture: nuclei, fibres and holes give amounts of hematoxylin and eosin, and the Beer-Lambert
   law turns amounts of stain into colour.
2. The counts: negative binomial draws whose means depend on the layer, the nuclei under the spot,
   the position, the donor and the section.
3. The truth behind both, which no real slide comes with, is written to ``truth/``.

**The gene symbols are invented**, so nothing biological can be read off this study. Its value is
that the right answers are known.
"""

import csv
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.stats import norm

from helpers import catalog
from helpers.files import atomic, cache_dir, progress

logger = logging.getLogger(__name__)

SPOT_UM, PITCH_UM = 100.0, 200.0  # the first Spatial Transcriptomics array
WIDTH_UM, HEIGHT_UM, RADIUS_UM = 4460.0, 4060.0, 2200.0  # of the picture, of the organ
FIRST_SPOT = (6, 4)  # array index (x, y) of the first spot inside the picture
GENES = 1400
FOLDER = "demo-2bc198349dcff7ce"
"""Folder of the study in the cache. Change it whenever `write_study` writes anything different:
tiles, counts and models in the cache are keyed to the files in this folder."""


@dataclass(frozen=True)
class Layer:
    """Appearance of a layer; lengths in um, densities in nuclei per mm2."""

    until: float  # depth where the layer ends: 0 = surface, 1 = centre
    density: float
    radius: float
    elongation: float
    pattern: str  # how the nuclei are arranged
    pale: float  # 0 = evenly dark nuclei, 1 = pale nuclei with a dark rim
    eosin: float
    fibres: float  # 0 = smooth, 1 = strands along the layer
    holes: float  # share of the area that is fat or lumen


# Density times area of the nuclei is similar in layers 1 and 3, and in 4 and 5. Mean colour hardly
# separates these pairs; size, shape and arrangement of the nuclei do.
LAYERS = (
    Layer(0.15, 2300, 2.9, 2.30, "even", 0.2, 0.66, 1.0, 0.05),
    Layer(0.31, 4300, 3.3, 1.15, "rings", 0.3, 0.50, 0.3, 0.00),
    Layer(0.47, 1250, 4.3, 1.20, "even", 0.5, 0.68, 0.5, 0.02),
    Layer(0.66, 2300, 5.4, 1.25, "clumps", 0.9, 0.60, 0.7, 0.03),
    Layer(9.99, 7600, 3.1, 1.10, "rows", 0.2, 0.52, 0.3, 0.00),
)


@dataclass(frozen=True)
class Donor:
    """How a donor's slides differ: scanner, stain, sequencing depth, and the side of the cut."""

    um_per_px: float
    hematoxylin: tuple[float, float, float]  # optical density of one unit in R, G, B
    eosin: tuple[float, float, float]
    strength: tuple[float, float]  # of the hematoxylin and the eosin stain
    background: tuple[int, int, int]  # colour of the empty slide
    umis: tuple[int, int]  # median per spot in the first and the second section
    cut: float  # direction in radians


# Stain vectors start from skimage.color.rgb_from_hed (Ruifrok and Johnston 2001) and are moved
# towards fresh-frozen sections: darker nuclei, greyer eosin.
# fmt: off
DONORS = {
    "A": Donor(2.0, (0.76, 0.70, 0.42), (0.19, 0.50, 0.22), (1.00, 1.00),
               (226, 218, 226), (6000, 4700), 0.4),
    "B": Donor(1.8, (0.79, 0.68, 0.38), (0.25, 0.46, 0.19), (1.15, 0.88),
               (217, 210, 224), (2900, 3500), 2.2),
    "C": Donor(2.2, (0.73, 0.71, 0.43), (0.15, 0.52, 0.24), (0.88, 1.12),
               (232, 221, 224), (4200, 2600), 4.0),
}
# fmt: on


# ------------------------------------------------------------------------------------- anatomy


@dataclass(frozen=True)
class Anatomy:
    """The shape of one section, as a formula that holds for pixels and for spots."""

    donor: Donor
    phase: np.ndarray  # (11,) shape of the donor's organ, shared by adjacent sections
    shift: np.ndarray  # (5,) position and distortion of this section on its slide

    def __call__(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Turn positions (um) into depth (0..1), distance inside the edge (um) and angle."""
        p, s, cut = self.phase, self.shift, self.donor.cut
        x, y = x - WIDTH_UM / 2, y - HEIGHT_UM / 2 + 200
        x, y = (  # slightly rotated, shifted and stretched
            x + 0.03 * s[0] * y + 45 * s[1] + 35 * np.sin(y / 420 + s[2]),
            y - 0.03 * s[0] * x + 45 * s[3] + 35 * np.sin(x / 380 + s[4]),
        )
        x, y = x - 0.22 * RADIUS_UM * np.cos(cut), y - 0.22 * RADIUS_UM * np.sin(cut)
        angle = np.arctan2(y, x)
        outline = sum(a * np.cos(k * angle + p[k]) for k, a in ((2, 0.07), (3, 0.04), (5, 0.02)))
        radius = np.hypot(x, y) / (1 + outline)
        wave = np.sin(x / 170 + p[6]) * np.sin(y / 190 + p[7]) + np.sin((x + y) / 110 + p[8])
        depth = 1 - radius / RADIUS_UM + 0.015 * wave
        knife = 0.52 * RADIUS_UM - x * np.cos(cut) - y * np.sin(cut) + 30 * wave
        cavity = np.hypot(x - 80 * p[9], (y + 60 * p[10]) * 1.9) - 240 + 18 * wave
        return depth, np.minimum(np.minimum(RADIUS_UM - radius, knife), cavity), angle


def _layer(depth: np.ndarray) -> np.ndarray:
    """Return the index of the layer at each depth."""
    return np.searchsorted([layer.until for layer in LAYERS], depth)


def _each(name: str) -> np.ndarray:
    """Return one property of all layers, as an array."""
    return np.array([getattr(layer, name) for layer in LAYERS])


def _rotate(dx: np.ndarray, dy: np.ndarray, turn: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the components along and across the direction `turn` (radians)."""
    return dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)


# ------------------------------------------------------------------------------------- picture


def _noise(rng: np.random.Generator, shape: tuple[int, ...], px: float) -> np.ndarray:
    """Smooth noise, mean 0 and standard deviation 1, with structures about `px` pixels wide."""
    step = max(1, int(px / 2))  # drawing it small and enlarging it is much faster
    small = rng.standard_normal([n // step + 3 for n in shape], dtype=np.float32)
    small = ndimage.gaussian_filter(small, px / step / 2, mode="wrap")
    return _enlarge(small / small.std(), step, shape)


def _enlarge(small: np.ndarray, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Interpolate a grid with one value every `step` pixels linearly, and crop it to `shape`."""
    size = small.shape[1] * step, small.shape[0] * step
    large = Image.fromarray(small.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(large)[: shape[0], : shape[1]]


def _vessels(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance (um) to the centre line of the nearest of 14 vessels, cut across or along."""
    distance = np.full(x.shape, 1e3, np.float32)
    reach = int(300 / x[0, 1])
    for _ in range(14):
        row, col = int(rng.integers(x.shape[0])), int(rng.integers(x.shape[1]))
        turn, long, wide = rng.uniform((0, 1, 0.5), (np.pi, 5, 1.3))
        near = tuple(slice(max(0, v - reach), v + reach) for v in (row, col))
        along, across = _rotate(x[near] - x[row, col], y[near] - y[row, col], turn)
        tube = np.hypot(along / long, across + 6 * np.sin(along / 40)) / wide
        distance[near] = np.minimum(distance[near], tube)
    return distance


def _fold(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mark a crease where the tissue is folded over itself: 0 outside it, 1 in its middle."""
    turn = rng.uniform(0, np.pi)
    dx, dy = x - rng.uniform(0.35, 0.65) * WIDTH_UM, y - rng.uniform(0.35, 0.65) * HEIGHT_UM
    along, across = _rotate(dx, dy, turn)
    along = along / 450
    across = across / 14 + 2 * np.sin(2.5 * along)
    return np.exp(-np.square(across**2) - np.square(along**2))


def _matrix(rng: np.random.Generator, anatomy: Anatomy, x: np.ndarray, y: np.ndarray) -> tuple:
    """Everything but the nuclei: the amount of tissue (0..2) and its uptake of eosin."""
    depth, edge, angle = anatomy(x, y)
    layer, um = _layer(depth), x[0, 1]
    rough = _noise(rng, x.shape, 14 / um)
    share = _each("holes")[layer] + 0.05 * np.exp(-np.abs(edge) / 90)  # looser near the edge
    walls = norm.isf(share + 1e-4) - 0.3 * rough - _noise(rng, x.shape, 30 / um)  # < 0: a hole
    vessels = _vessels(rng, x, y)
    solid = np.minimum(np.minimum((edge + 10 * rough) / 6, walls * 8), (vessels - 14) / 3)
    tissue = 1 / (1 + np.exp(-np.clip(solid, -20, 20)))

    # Strands: noise stretched along the layer.
    strands = ndimage.gaussian_filter(rng.standard_normal((512, 512)), (1.1, 13), mode="wrap")
    across = depth * RADIUS_UM / um + 6 * _noise(rng, x.shape, 200 / um)
    strand = strands[across.astype(int) % 512, (angle * 1536 / (2 * np.pi)).astype(int) % 512]
    fibres = 0.22 * _each("fibres")[layer] * strand / strands.std()
    eosin = _each("eosin")[layer] * np.exp(fibres + 0.1 * _noise(rng, x.shape, 300 / um))
    eosin += 0.35 * np.exp(-((vessels - 20) ** 2) / 60)  # walls of vessels
    # The edges of tissue and holes stain more.
    eosin *= 1 + 0.35 * np.exp(-((walls / 0.25) ** 2)) + 0.4 * np.exp(-((edge / 14) ** 2))
    return tissue * (1 + 0.8 * _fold(rng, x, y)), eosin


def _nuclei(
    rng: np.random.Generator, anatomy: Anatomy, um: float, tissue: np.ndarray
) -> pd.DataFrame:
    """Place nuclei on a jittered lattice, thinned to the density and pattern of each layer."""
    gap = 7.5
    x, y = np.meshgrid(np.arange(0, WIDTH_UM, gap), np.arange(0, HEIGHT_UM, gap))
    x, y = (v.ravel() + rng.uniform(-0.45, 0.45, v.size) * gap for v in (x, y))
    row, col = (y / um).astype(int), (x / um).astype(int)  # `tissue` is larger than the picture
    inside = tissue[row, col] > 0.55
    x, y, row, col = x[inside], y[inside], row[inside], col[inside]
    depth, _, angle = anatomy(x, y)
    layer = _layer(depth + rng.normal(0, 0.012, x.size))  # blurs the borders between layers
    fine, coarse, broad = (_noise(rng, tissue.shape, s / um)[row, col] for s in (50, 110, 400))
    rows = np.cos(2 * np.pi * depth * RADIUS_UM / 34 + 2.2 * fine)
    crowd = {
        "even": np.ones(x.size),
        "rings": 0.25 + 2.6 * np.exp(-((coarse / 0.28) ** 2)),  # contour lines of noise
        "rows": 1 + 1.1 * rows + 0.4 * coarse,
        "clumps": 1 + 1.1 * fine,
    }
    crowd = np.select([_each("pattern")[layer] == name for name in crowd], list(crowd.values()))
    wanted = _each("density")[layer] * crowd.clip(0.05) * np.exp(0.25 * broad)
    keep = rng.random(x.size) < wanted * (gap / 1000) ** 2
    n, layer = keep.sum(), layer[keep]
    radius = _each("radius")[layer] * rng.lognormal(0, 0.16, n)
    stretch = np.sqrt(_each("elongation")[layer] * rng.lognormal(0, 0.12, n))
    turn = angle[keep] + np.pi / 2 + rng.normal(0, 0.35, n)  # along the layer
    columns = {"x": x[keep], "y": y[keep], "long": radius * stretch, "short": radius / stretch}
    columns |= {"turn": turn, "dark": rng.lognormal(0, 0.2, n), "pale": _each("pale")[layer]}
    return pd.DataFrame(columns, dtype=np.float32)


def _stamp(nuclei: pd.DataFrame, shape: tuple[int, int], um: float) -> np.ndarray:
    """Add up the hematoxylin of all nuclei, one soft ellipse each, on the pixel grid."""
    image = np.zeros(shape[0] * shape[1])
    off = np.arange(-int(np.ceil(11 / um)), int(np.ceil(11 / um)) + 1)
    for start in range(0, len(nuclei), 4000):  # in batches, to limit memory
        part = nuclei.iloc[start : start + 4000]
        x, y, long, short, turn, dark, pale = (part[c].to_numpy()[:, None, None] for c in part)
        row, col = np.rint(y / um).astype(int) + off[:, None], np.rint(x / um).astype(int) + off
        along, across = _rotate(col * um - x, row * um - y, turn)
        q = np.hypot(along / long, across / short)
        body = dark * ((1 - q) * short / um + 0.5).clip(0, 1) * (1 - 0.55 * pale * (1 - q**2))
        ok = (row >= 0) & (row < shape[0]) & (col >= 0) & (col < shape[1]) & (body > 0)
        image += np.bincount((row * shape[1] + col)[ok], body[ok], minlength=image.size)
    return (1.25 * (1 - np.exp(-image / 1.25))).reshape(shape).astype(np.float32)  # saturates


def _draw(rng: np.random.Generator, anatomy: Anatomy) -> tuple[np.ndarray, pd.DataFrame]:
    """Draw one section: the picture, uint8 (height, width, 3), and its nuclei (lengths in um)."""
    donor, um = anatomy.donor, anatomy.donor.um_per_px
    shape = int(HEIGHT_UM / um), int(WIDTH_UM / um)
    half = shape[0] // 2 + 2, shape[1] // 2 + 2  # smooth structures need half the resolution
    y, x = np.indices(half, dtype=np.float32) * 2 * um
    tissue, eosin = _matrix(rng, anatomy, x, y)
    nuclei = _nuclei(rng, anatomy, 2 * um, tissue)
    nuclear = _stamp(nuclei, shape, um)
    haze = _enlarge(ndimage.gaussian_filter(nuclear[::2, ::2], 4.5 / um), 2, shape)
    tissue, eosin = _enlarge(tissue, 2, shape), _enlarge(eosin, 2, shape)
    grain, speck = _noise(rng, shape, 4.5 / um), _noise(rng, shape, 5 / um) > 1.1
    blue = tissue * (1.65 * nuclear * (1 + 0.2 * grain) + 0.1 + 0.3 * haze)
    pink = tissue * eosin * (1 + 0.3 * grain - 0.4 * speck) * (1 - 0.6 * nuclear.clip(0, 1))
    blue, pink = (ndimage.gaussian_filter(v, 0.5) for v in (blue, pink))  # the microscope's blur
    vectors = np.array([donor.hematoxylin, donor.eosin]) * np.array(donor.strength)[:, None]
    density = np.stack([blue, pink], axis=-1) @ vectors.astype(np.float32)
    light = np.float32(donor.background) * (1 + 0.012 * _noise(rng, shape, 1500 / um)[..., None])
    picture = light * np.exp(-density)  # Beer-Lambert
    picture += 2 * rng.standard_normal(shape, dtype=np.float32)[..., None]  # noise of the sensor
    return picture.clip(0, 255).astype(np.uint8), nuclei


# -------------------------------------------------------------------------------------- counts


def _genes(rng: np.random.Generator) -> pd.DataFrame:
    """Make the table of genes, as `truth` describes it."""
    plan = {f"layer {k + 1}": 16 for k in range(len(LAYERS))}  # markers of one layer
    plan |= {"depth": 60, "nuclei": 60, "region": 60}  # gradient, nuclear density, smooth patches
    plan |= {"donor": 60, "loud": 15, "housekeeping": 40}  # donors differ; pure noise; constant
    plan["background"] = GENES - sum(plan.values())
    first, last = "Bru Cal Dor Fen Gly Hol Jun Kel Lor Myr", "bax dra mir nox ria tup vek"
    stems = [a + b for a in first.split() for b in last.split()]
    names = rng.permutation([f"{a}{k + 1}" for a in stems for k in range(GENES // len(stems))])
    programme = np.repeat(list(plan), list(plan.values()))
    genes = pd.DataFrame({"gene": names, "programme": programme}).set_index("gene")
    quiet = programme == "background"
    level = np.select([quiet, programme == "housekeeping"], [-4.0, 2.0], 0.0)
    mean = np.exp(rng.normal(level, np.where(quiet, 2.0, 1.0)))
    genes["mean"] = mean / mean.sum()
    genes["fold"] = rng.uniform(1.8, 4.5, GENES)
    noise = [programme == "loud", programme == "housekeeping"]
    genes["dispersion"] = np.select(noise, [4.0, 0.04], rng.uniform(0.1, 0.5, GENES))
    for donor in DONORS:
        spread = np.where(programme == "donor", 0.9, 0.2)
        genes[f"donor_{donor}"] = np.exp(rng.normal(0, spread))
    return genes


def _counts(
    rng: np.random.Generator, genes: pd.DataFrame, spots: pd.DataFrame, donor: str, umis: int
) -> pd.DataFrame:
    """Draw negative binomial counts, spots x genes: Poisson around a gamma-distributed mean."""
    crowd = np.log((spots["nuclei_per_mm2"] + 300) / 2500)
    scores = spots.filter(like="share_").copy()
    scores.columns = scores.columns.str.replace("share_", "layer ")
    scores["depth"], scores["nuclei"] = 2 * spots["depth"] - 1, crowd / 2
    scores["region"] = 0.8 * spots["region"]
    score = scores.reindex(columns=genes["programme"].unique(), fill_value=0)[genes["programme"]]
    mean = genes["mean"] * genes[f"donor_{donor}"] * rng.lognormal(0, 0.1, GENES)  # section effect
    mean = mean.to_numpy() * genes["fold"].to_numpy() ** score.to_numpy()
    library = umis * rng.lognormal(0, 0.35, len(spots)) * np.exp(crowd / 4)
    few = rng.uniform(2, 20, 2)
    library.iloc[rng.choice(len(spots), 2, replace=False)] = few  # two spots are nearly empty
    shape = 1 / genes["dispersion"].to_numpy()
    counts = rng.poisson(rng.gamma(shape, mean / shape) * library.to_numpy()[:, None])
    return pd.DataFrame(counts, index=spots.index, columns=genes.index)


# --------------------------------------------------------------------------------------- files


def _spots(
    rng: np.random.Generator, anatomy: Anatomy, slide: str, nuclei: pd.DataFrame
) -> pd.DataFrame:
    """Return the spots under tissue: position (um) and the truth about each."""
    array = np.argwhere(np.ones((int(WIDTH_UM / PITCH_UM), int(HEIGHT_UM / PITCH_UM))))
    ids = [f"{slide}_{x}x{y}" for x, y in array + FIRST_SPOT]
    # The first row and column lie 30 um inside the picture, so their tiles reach beyond it.
    place = array * PITCH_UM + 30 + rng.normal(0, 6, array.shape)
    spots = pd.DataFrame(place, columns=["x_um", "y_um"], index=pd.Index(ids, name="spot"))
    depth, _, angle = anatomy(*place.T)
    spots["slide"], spots["depth"], spots["layer"] = slide, depth, _layer(depth) + 1
    # The same by depth in every donor, different around the organ: genes stay correlated.
    spots["region"] = np.sin(depth * 4 + 1) + np.cos(angle + anatomy.phase[10])
    ring = SPOT_UM / 3 * np.exp(1j * np.pi / 6 * np.arange(12))  # twelve points of the spot
    around, edge, _ = anatomy(place[:, :1] + ring.real, place[:, 1:] + ring.imag)
    for k in range(len(LAYERS)):
        spots[f"share_{k + 1}"] = (_layer(around) == k).mean(axis=1)
    tree = cKDTree(nuclei[["x", "y"]])
    spots["nuclei"] = tree.query_ball_point(place, SPOT_UM / 2, return_length=True)
    spots["nuclei_per_mm2"] = spots["nuclei"] / (np.pi * (SPOT_UM / 2000) ** 2)
    return spots[(edge > 0).mean(axis=1) > 0.6]


def _write_section(
    root: Path, section: catalog.Section, genes: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, dict]:
    """Write the four files of one section, with the flaws that real ones have.

    Returns the truth about its spots and the section's row in ``truth/sections.csv``.
    """
    donor, number = DONORS[section.donor], int(section.slide[-1])
    shared = np.random.default_rng([seed, ord(section.donor)])
    rng = np.random.default_rng([seed, ord(section.donor), number])
    anatomy = Anatomy(donor, shared.uniform(-2, 2, 11), rng.normal(size=5))
    umis = donor.umis[number - 1]
    picture, nuclei = _draw(rng, anatomy)
    spots = _spots(rng, anatomy, section.slide, nuclei)
    counts = _counts(rng, genes, spots, section.donor, umis)

    def path(kind: catalog.Kind) -> Path:
        file = root / catalog.relative_path(section.slide, kind, section.tech)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    image = Image.fromarray(picture)
    if section.slide.endswith("B1"):  # a JPEG called .png
        image.save(path("image"), format="JPEG", quality=92)
    else:
        image.save(path("image"), format="PNG", compress_level=1)
    odd = rng.permutation(spots.index)
    coord = spots[["y_um", "x_um"]].set_axis(["yaxis", "xaxis"], axis=1).assign(r=SPOT_UM / 2)
    coord = coord.drop(odd[:2]).rename_axis(None)  # two spots have counts but no position
    (coord / donor.um_per_px).round(4).to_csv(path("coord"))
    absent = (genes["programme"] == "background") & (rng.random(GENES) < 0.06)
    order = rng.permutation(genes.index[~absent])  # genes and their order differ between slides
    counts = counts.drop(odd[2:4]).rename_axis(None)  # two have a position but no counts
    counts.loc[rng.permutation(counts.index), order].to_csv(path("gene_exp"))
    labels = "Layer " + spots["layer"].astype(str)
    labels[odd[4:9]] = "undetermined"
    labels.drop(odd[9:18]).rename_axis(None).to_csv(path("annotation"), header=["V2"])
    row = {"slide": section.slide, "donor": section.donor, "seed": seed}
    row |= {"spot_num": len(counts), "gene_num": len(order)}
    return spots, row | {"umis": umis, "um_per_px": donor.um_per_px}


def write_study(root: Path, seed: int = 0) -> None:
    """Write the six sections of study ``demo`` into `root`, in the official layout.

    Parameters
    ----------
    root
        Folder to write into; created if missing.
    seed
        The same seed writes the same files.
    """
    genes = _genes(np.random.default_rng([seed, 0]))
    spots, rows = [], []
    for section in progress(catalog.study("demo").sections, desc="simulating demo", unit="slide"):
        true_spots, row = _write_section(root, section, genes, seed)
        spots.append(true_spots)
        rows.append(row)
    sections = pd.DataFrame(rows)
    for folder in ("truth", "meta"):
        (root / folder).mkdir(exist_ok=True)
    genes.to_csv(root / "truth" / "genes.csv")
    pd.concat(spots).to_csv(root / "truth" / "spots.csv")
    sections.to_csv(root / "truth" / "sections.csv", index=False)
    meta = sections[["slide"]].assign(species="simulated", tissue="simulated", pmid="")
    meta["title"] = "Simulated layered tissue"
    meta["abstract"] = "Written by helpers.simulate. The gene symbols are invented."
    meta = meta.assign(keywords="simulation", involve_cancer=False, tech="ST")
    meta[["spot_num", "gene_num"]] = sections[["spot_num", "gene_num"]]
    meta.to_csv(root / catalog.METADATA, index=False, quoting=csv.QUOTE_ALL)


def demo_root() -> Path:
    """Return the folder of study ``demo`` in the cache; the first call simulates the study.

    An interrupted simulation leaves nothing behind.
    """
    root = cache_dir() / FOLDER
    if not root.is_dir():
        logger.info("simulating study demo into %s", root)
        with atomic(root) as draft:
            write_study(draft, seed=0)
    return root


def truth(root: Path) -> dict[str, pd.DataFrame]:
    """Return what is known of a simulated study and of no real one.

    Parameters
    ----------
    root
        A folder written by `write_study`.

    Returns
    -------
    Three tables.
    ``spots``, indexed by spot id: `slide`, position (`x_um`, `y_um`), `depth` (0..1), `layer`
    (1..5), the share of each layer under the spot, `region`, `nuclei` and `nuclei_per_mm2`.
    ``genes``, indexed by symbol: `programme` ("layer 1", "nuclei", "donor", ...), `mean` share of
    the counts, `fold` change by the programme, `dispersion`, and one multiplier per donor.
    ``sections``, indexed by slide: `donor`, `seed`, numbers of spots and genes, `umis` (median per
    spot) and `um_per_px`.
    """
    tables = ("spots", "genes", "sections")
    return {name: pd.read_csv(root / "truth" / f"{name}.csv", index_col=0) for name in tables}
