"""Tiles: this book's way against the published one, in paired runs on the same files.

The published way is written from its description: open the image with Pillow, convert it to RGB,
crop the square of two spot radii around each spot, and save it as a PNG of its own. It resamples
nothing. The book's way writes tiles of 224 px, which is more work, into one memory-mapped array,
with quality measures.

Each run has a process of its own, which measures the seconds of the work (imports and compilation
left out) and its peak memory. The ways take turns, so that a busy machine slows both; but this
book's way uses two cores, so on a machine with other work its advantage shrinks.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported

SIZE = 224
HER2 = "Human_Breast_Andersson_10142021_ST_C2"


def run(repeats: int = 5) -> list[dict]:
    """Compare both ways at the scale of Visium (synthetic) and of HER2 (real, or synthetic)."""
    with tempfile.TemporaryDirectory() as name:
        image, xy, radius = visium_slide(Path(name))
        data = f"synthetic JPEG, 20,000 x 20,000 px, {len(xy)} spots"
        rows = compare("Visium scale", data, image, xy, radius, repeats)
        root = Path(os.environ.get("STIMAGE_ROOT", "")) / "ST"
        if "STIMAGE_ROOT" in os.environ and (root / f"image/{HER2}.png").exists():
            import pandas as pd

            table = pd.read_csv(root / f"coord/{HER2}_coord.csv", index_col=0)
            image, radius = root / f"image/{HER2}.png", float(table["r"].median())
            xy, data = table[["xaxis", "yaxis"]].to_numpy(float), f"{HER2}, {len(table)} spots"
        else:
            image, xy, radius = her2_slide(Path(name))
            data = f"synthetic JPEG, 9,274 x 9,911 px, {len(xy)} spots"
        return rows + compare("HER2 scale", data, image, xy, radius, repeats)


def compare(
    case: str, data: str, image: Path, xy: np.ndarray, radius: float, repeats: int
) -> list[dict]:
    """Run both ways in turns; return one row per way."""
    results: dict[str, list[dict]] = {"published": [], "book": [], "book, from cache": []}
    with tempfile.TemporaryDirectory() as name:
        spots = Path(name) / "xy.npy"
        np.save(spots, xy)
        for repeat in range(repeats):
            for way in list(results)[:: 1 if repeat % 2 == 0 else -1]:
                command = [sys.executable, __file__, way, str(image), str(spots), str(radius)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results[way].append(json.loads(done.stdout.splitlines()[-1]))
        levels = grey_levels(image, xy[:: max(1, len(xy) // 100)], radius)
    published = [r["seconds"] for r in results["published"]]
    rows = []
    for way, measured in results.items():
        ratios = [p / r["seconds"] for p, r in zip(published, measured, strict=True)]
        row = {
            "what": "tiles",
            "case": case,
            "data": data,
            "way": way,
            "seconds": statistics.median(r["seconds"] for r in measured),
            "cpu_seconds": statistics.median(r["cpu_seconds"] for r in measured),
            "peak_mb": statistics.median(r["peak_mb"] for r in measured),
            "written_mb": statistics.median(r["written_mb"] for r in measured),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "runs": repeats,
        }
        if way != "published":
            row["grey_levels_from_pillow_at_most"] = levels
        rows.append(row)
    return rows


def published(image: Path, xy: np.ndarray, radius: float, out: Path) -> None:
    """Write one PNG per spot."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    picture = Image.open(image).convert("RGB")
    for i, (x, y) in enumerate(xy):
        picture.crop((x - radius, y - radius, x + radius, y + radius)).save(out / f"{i}.png")


def book(image: Path, xy: np.ndarray, radius: float, out: Path) -> np.ndarray:
    """Write one array of tiles of the same side, resampled to 224 px."""
    import anndata as ad
    import pandas as pd

    from helpers import tiles

    os.environ["STIMAGE_CACHE"] = str(out)
    names = [f"spot_{i}" for i in range(len(xy))]
    adata = ad.AnnData(np.zeros((len(xy), 1), np.float32), obs=pd.DataFrame(index=names))
    adata.obsm["spatial"] = xy
    place = {"metadata": {"image_path": str(image)}, "um_per_px": 1.0, "images": {}}
    adata.uns["spatial"] = {"slide": place}
    return tiles.cut(adata, side_um=2 * radius, size=SIZE).array


def grey_levels(image: Path, xy: np.ndarray, radius: float) -> int:
    """Return the largest difference from Pillow's bicubic resampling of the same boxes."""
    from PIL import Image

    from helpers import images

    pixels, most, reach = images.read(image), 0, int(3 * radius) + 4
    with tempfile.TemporaryDirectory() as name:
        ours = book(image, xy, radius, Path(name))
        for tile, (x, y) in zip(ours, xy, strict=True):
            left, top = int(x) - reach, int(y) - reach
            part = pixels[top : top + 2 * reach, left : left + 2 * reach]
            box = (x - radius - left, y - radius - top, x + radius - left, y + radius - top)
            size = (SIZE, SIZE)
            right = Image.fromarray(part).resize(size, Image.Resampling.BICUBIC, box=box)
            most = max(most, int(np.abs(tile.astype(int) - np.asarray(right)).max()))
    return most


def visium_slide(folder: Path) -> tuple[Path, np.ndarray, float]:
    """Write a synthetic slide of the size of a Visium scan: 20,000 x 20,000 px at 0.5 um per px.

    Stained texture in the middle, glass around it, and 5,000 spots in the geometry of the array:
    55 um wide, 100 um apart, every second row shifted.
    """
    grid = np.stack(np.meshgrid(np.arange(64), np.arange(79)), -1).reshape(-1, 2)[:5000]
    xy = grid * (200.0, 173.2) + (3400.3, 3200.7)
    xy[:, 0] += grid[:, 1] % 2 * 100
    return _slide(folder / "visium.png", (20_000, 20_000), xy), xy, 55.0


def her2_slide(folder: Path) -> tuple[Path, np.ndarray, float]:
    """Write a synthetic slide like the HER2 ones, for machines without them."""
    grid = np.stack(np.meshgrid(np.arange(11), np.arange(17)), -1).reshape(-1, 2)
    xy = grid * 290.0 + (2700.3, 2300.7)
    return _slide(folder / "her2.png", (9274, 9911), xy), xy, 72.7


def _slide(path: Path, size: tuple[int, int], xy: np.ndarray) -> Path:
    """Write a JPEG: smoothed noise mixed by Beer-Lambert under the spots, glass elsewhere."""
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    n = 1000
    stain = [np.abs(gaussian_filter(rng.normal(size=(n, n)), s, mode="wrap")) for s in (4, 16)]
    hematoxylin, eosin = (s / s.std() * 0.2 for s in stain)
    density = hematoxylin[..., None] * [0.65, 0.70, 0.29] + eosin[..., None] * [0.07, 0.99, 0.11]
    grain = gaussian_filter(rng.normal(0, 6, (n, n, 3)), (1, 1, 0), mode="wrap")
    patch = np.clip(240 * 10**-density + grain, 0, 255).astype(np.uint8)
    glass = np.clip(240 + grain / 2, 0, 255).astype(np.uint8)
    width, height = size
    across = (-(-height // n), -(-width // n), 1)
    picture = np.tile(glass, across)[:height, :width].copy()
    (x0, y0), (x1, y1) = xy.min(axis=0).astype(int) - 200, xy.max(axis=0).astype(int) + 200
    picture[y0:y1, x0:x1] = np.tile(patch, across)[: y1 - y0, : x1 - x0]
    Image.fromarray(picture).save(path, "JPEG", quality=80)
    return path


def _warm_up(folder: Path) -> None:
    """Import and compile what the book's way needs, on a tiny image."""
    from PIL import Image

    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(folder / "tiny.png", "JPEG")
    book(folder / "tiny.png", np.array([[30.0, 30.0], [5.0, 30.0]]), 10.0, folder)


def peak_mb() -> float:
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: the other figure starts from the parent's peak there
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _child(way: str, image: str, spots: str, radius: str) -> None:
    """Run one way once; print seconds, peak memory and bytes written."""
    work = published if way == "published" else book
    arguments = Path(image), np.load(spots), float(radius)
    with tempfile.TemporaryDirectory() as name:
        out, warm = Path(name) / "out", Path(name) / "warm"
        out.mkdir()
        warm.mkdir()
        if work is book:
            _warm_up(warm)
        if way == "book, from cache":
            work(*arguments, out)
        start, cpu = time.perf_counter(), time.process_time()
        work(*arguments, out)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        written = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    facts = {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak_mb()}
    print(json.dumps(facts | {"written_mb": written / 1e6}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
