"""Figures that the book draws more than once, maps that show tiles, and measured results."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib_scalebar.scalebar import ScaleBar
from PIL import Image

from helpers import images, slides
from helpers.files import DataError

WIDTH = 7.0  # inches: the widest figure of the book, so that it reads on a page and a phone
UNLABELLED = "#b0b0b0"


def style() -> None:
    """Set the look of every figure: colour-blind-safe palette, readable sizes, the same jitter."""
    np.random.seed(0)  # seaborn's jitter takes no generator
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.85)
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.6),
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "image.interpolation": "antialiased",
            "figure.constrained_layout.use": True,
        }
    )


def colours(names: Sequence[str]) -> dict[str, tuple]:
    """Return one colour-blind-safe colour per name, the same for the same list."""
    return dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))


def label_colours(labels: pd.Series) -> dict[str, tuple | str]:
    """Return a colour for each category of the labels, and grey for spots that have none."""
    palette = colours(list(labels.cat.categories))
    return palette | ({"no label": UNLABELLED} if labels.isna().any() else {})


def handles(palette: dict[str, tuple]) -> list:
    """Return legend handles, one disc per name."""
    return [
        plt.Line2D([], [], marker="o", linestyle="", color=colour, label=name)
        for name, colour in palette.items()
    ]


def scale_bar(ax: Axes, um_per_px: float, *, length_um: float | None = None) -> None:
    """Draw a scale bar, of a round length unless one is given.

    Parameters
    ----------
    ax
        Axes that show an image.
    um_per_px
        um per px of the image as shown.
    length_um
        Length of the bar in um; chosen to fit when not given.
    """
    ax.add_artist(
        ScaleBar(
            um_per_px,
            "um",
            length_fraction=None if length_um else 0.3,
            fixed_value=length_um,
            fixed_units="um" if length_um else None,
            location="lower right",
            color="black",
            box_alpha=0.6,
            font_properties={"size": "small"},
        )
    )


def tissue(adata: ad.AnnData, *, ax: Axes | None = None, alpha: float = 1.0) -> Axes:
    """Draw the image of a slide, with a scale bar; axes in px of the full image.

    Parameters
    ----------
    adata
        As `helpers.slides` loads it, with its image.
    ax
        Where to draw; new axes when not given.
    alpha
        Below 1 the image is pale, so that what is drawn over it stands out.
    """
    um_per_px = slides.um_per_px(adata)  # refuses several slides in one
    known = next(iter(adata.uns["spatial"].values()))
    ax = ax or plt.subplots(figsize=(4.5, 4.5))[1]
    width, height = known["metadata"]["width_px"], known["metadata"]["height_px"]
    ax.imshow(known["images"]["hires"], extent=(0, width, height, 0), alpha=alpha)
    scale_bar(ax, um_per_px)
    return _bare(ax)


def spots(
    adata: ad.AnnData,
    values: str | np.ndarray | pd.Series,
    *,
    ax: Axes | None = None,
    legend: bool = True,
    label: str | None = None,
    zoom: bool = False,
) -> Axes:
    """Draw the spots of one slide over its image, at their true size, coloured by their values.

    Parameters
    ----------
    adata
        One slide.
    values
        A column of ``obs``, a gene, or one value per spot. Categories get one colour each, in
        their order; spots without one are grey.
    ax
        Where to draw; new axes when not given.
    legend, label
        Name the categories, or draw a colour bar with this label.
    zoom
        Show only the part of the slide that has spots.
    """
    if isinstance(values, str):
        values = adata.obs[values] if values in adata.obs else adata.obs_vector(values)
    ax = tissue(adata, ax=ax, alpha=0.6)
    radius = slides.spot_side_px(adata) / 2
    if isinstance(getattr(values, "dtype", None), pd.CategoricalDtype):
        palette = label_colours(values)
        face = [palette.get(v, UNLABELLED) for v in values]
        if legend and palette:
            ax.legend(
                handles=handles(palette), loc="upper left", bbox_to_anchor=(1, 1), frameon=False
            )
    else:
        values = np.asarray(values, dtype=float)
        ends = plt.Normalize(np.nanmin(values), np.nanmax(values))
        scale = plt.cm.ScalarMappable(ends, "viridis")
        face = scale.to_rgba(values)
        if legend:
            ax.figure.colorbar(scale, ax=ax, shrink=0.7, label=label)
    look = {"edgecolor": "white", "linewidth": 0.4, "alpha": 1.0}  # the edge sets spots apart
    for (x, y), colour in zip(adata.obsm["spatial"], face, strict=True):
        ax.add_patch(Circle((x, y), radius, facecolor=colour, **look))
    if zoom:
        (left, top), (right, bottom) = adata.obsm["spatial"].min(0), adata.obsm["spatial"].max(0)
        ax.set(xlim=(left - 4 * radius, right + 4 * radius))
        ax.set(ylim=(bottom + 4 * radius, top - 4 * radius))
    return ax


def close_up(
    adata: ad.AnnData, centre: tuple[float, float], side_um: float, *, ax: Axes | None = None
) -> Axes:
    """Draw a square of the full image, with a scale bar.

    Parameters
    ----------
    adata
        One slide.
    centre
        x, y in px of the full image; moved inwards where the square would leave the image.
    side_um
        Side of the square in um.
    ax
        Where to draw; new axes when not given.
    """
    (known,) = adata.uns["spatial"].values()
    scale = slides.um_per_px(adata)
    side = round(side_um / scale)
    limits = known["metadata"]["width_px"] - side, known["metadata"]["height_px"] - side
    x, y = (
        int(np.clip(c - side / 2, 0, max(high, 0))) for c, high in zip(centre, limits, strict=True)
    )
    ax = ax or plt.subplots(figsize=(3, 3))[1]
    ax.imshow(images.read_region(slides.image_path(adata), (x, y, x + side, y + side)))
    scale_bar(ax, scale, length_um=round(side_um / 5))
    return _bare(ax)


def tile(array: np.ndarray, side_um: float, *, ax: Axes | None = None, bar: bool = True) -> Axes:
    """Draw one tile.

    Parameters
    ----------
    array
        uint8 ``(size, size, 3)``.
    side_um
        Its side in um.
    ax
        Where to draw; new axes when not given.
    bar
        Draw a scale bar; of a grid of tiles of one size, one is enough.
    """
    ax = ax or plt.subplots(figsize=(2, 2))[1]
    ax.imshow(array)
    if bar:
        scale_bar(ax, side_um / len(array))
    return _bare(ax)


def _bare(ax: Axes) -> Axes:
    """Remove ticks and frame."""
    ax.set(xticks=[], yticks=[])
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def curves(history: pd.DataFrame, title: str = "") -> Figure:
    """Draw how a training went: its loss and, where it was validated, its recall.

    Parameters
    ----------
    history
        As from `helpers.training.fit`.
    title
        Over the figure.

    Returns
    -------
    Figure
        Left the loss of each split; right the recall at the largest k, mean of both directions, in
        multiples of chance. Without validation, right is the temperature.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.8))
    for split, part in history[history["measure"] == "loss"].groupby("split"):
        left.plot(part["epoch"], part["value"], marker=".", label=split)
    found = history[history["measure"] == "recall"]
    if len(found):
        found = found[found["k"] == found["k"].max()]
        times = (found["value"] / found["chance"]).groupby(found["epoch"]).mean()
        right.axhline(1, color="black", linestyle="--", linewidth=0.8)
        name = f"recall@{found['k'].max():.0f}, times chance"
    else:
        found = history[history["measure"] == "temperature"]
        times, name = found.set_index("epoch")["value"], "temperature"
    right.plot(times.index, times, marker=".", color="C2")
    left.legend(frameon=False)
    for ax, label in ((left, "loss"), (right, name)):
        ax.set(xlabel="epoch", ylabel=label, xlim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=10)
    return figure


class Live:
    """`curves`, drawn again after every epoch: give it to `helpers.training.fit` as `on_epoch`.

    In a notebook the new figure replaces the old one, so a single figure is left in the end.
    """

    def __init__(self, title: str = "") -> None:
        self.title, self.handle = title, None

    def __call__(self, history: pd.DataFrame) -> None:
        """Show the history so far."""
        figure = curves(history, self.title)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)  # or it would be shown once more at the end of the cell


# --------------------------------------------------------------------------- maps that show tiles


PAGE = Path(__file__).with_name("hover_map.html")
LIMIT = 1_500_000
"""Bytes of one figure: some hundred thousand are read at once, ten million make a page slow."""
_TRIALS = ((48, 80), (48, 65), (32, 75), (32, 60), (16, 70))
"""Side in px and JPEG quality, the best first; JPEG's blocks of 16 px hold parts of one tile."""
_SCALE = 9999  # coordinates are stored as whole numbers up to this


def hover_map(
    xy: np.ndarray,
    tiles: np.ndarray,
    text: Sequence[str],
    colours: Sequence,
    *,
    title: str,
    legend: Mapping[str, object] | None = None,
    limit: int = LIMIT,
) -> HTML:
    """Return a map for a page: hover over a point, tap it or step to it, and its tile is shown.

    Parameters
    ----------
    xy
        Coordinates of the points, ``(n, 2)``; drawn with equal axes.
    tiles
        uint8 ``(n, size, size, 3)``; shrunk to 48 px, or further where the limit asks for it.
    text
        One text per point, shown as it is and never read as HTML.
    colours
        Of each point, as matplotlib knows them.
    title
        Shown over the map and read by a screen reader.
    legend
        Colours by name.
    limit
        Largest size of the whole, in bytes.

    Raises
    ------
    DataError
        When the numbers of points, tiles, texts and colours differ; a coordinate is NaN; a colour
        is unknown; or the tiles do not fit into `limit`.
    """
    xy, tiles = _check_points(xy, tiles, texts=text, colours=colours)
    low, high = xy.min(axis=0), xy.max(axis=0)
    unit = float(max(high - low)) or 1.0
    across = math.ceil(math.sqrt(len(xy)))  # tiles side by side in the sheet
    data = {
        "xy": np.rint((xy - low) / unit * _SCALE).astype(int).tolist(),
        "box": np.rint((high - low) / unit * _SCALE).astype(int).tolist(),
        "text": [str(t) for t in text],
        "colour": [_hex(c) for c in colours],
        "across": across,
    }
    script = json.dumps(data, separators=(",", ":"))
    for sign in "&<>":  # or a text could end the script it stands in
        script = script.replace(sign, f"\\u{ord(sign):04x}")
    keys = "".join(
        f'<span><i style="background:{_hex(c)}"></i>{html.escape(str(name))}</span>'
        for name, c in (legend or {}).items()
    )
    parts = {"TITLE": html.escape(title), "KEYS": keys, "DATA": script, "SPRITES": ""}
    room = limit - len(_framed(parts))
    for size, quality in _TRIALS:
        parts["SPRITES"] = _sprites(tiles, across, size, quality)
        if len(parts["SPRITES"]) <= room:
            return HTML(_framed(parts))
    what = f"{len(xy)} points and their tiles take more than the {limit:,} bytes of one figure"
    raise DataError(what, fix="show fewer points, such as a random sample")


def tile_map(
    xy: np.ndarray,
    tiles: np.ndarray,
    colours: Sequence | None = None,
    *,
    side_um: float | None = None,
    across: int = 16,
    ax: Axes | None = None,
) -> Axes:
    """Draw tiles along a map: in every square of a grid, the tile of the point nearest its middle.

    Parameters
    ----------
    xy, tiles, colours
        As for `hover_map`; with `colours`, every tile has a frame in the colour of its point.
    side_um
        Side of a tile in um, for a scale bar as long as a tile is wide.
    across
        Squares along the longer side of the map.
    ax
        Where to draw; new axes when not given.
    """
    xy, tiles = _check_points(xy, tiles, **({} if colours is None else {"colours": colours}))
    ax = ax or plt.subplots(figsize=(7, 6))[1]
    side = float(max(np.ptp(xy, axis=0))) / across or 1.0
    square = np.floor((xy - xy.min(axis=0)) / side).astype(int).clip(max=across - 1)
    middle = xy.min(axis=0) + (square + 0.5) * side
    order = np.argsort(np.linalg.norm(xy - middle, axis=1), kind="stable")
    _, first = np.unique(square[order], axis=0, return_index=True)
    for i in order[first]:
        (x, y), r = middle[i], 0.42 * side
        ax.imshow(tiles[i], extent=(x - r, x + r, y - r, y + r))
        if colours is not None:
            edge = {"fill": False, "edgecolor": colours[i], "linewidth": 2}
            ax.add_patch(Rectangle((x - r, y - r), 2 * r, 2 * r, **edge))
    (left, bottom), (right, top) = middle.min(axis=0) - 0.6 * side, middle.max(axis=0) + 0.6 * side
    ax.set(aspect="equal", xlim=(left, right), ylim=(bottom, top))
    _bare(ax)
    if side_um:
        whole = int(side_um) if float(side_um).is_integer() else side_um
        scale_bar(ax, side_um / (0.84 * side), length_um=whole)
    return ax


def _check_points(
    xy: np.ndarray, tiles: np.ndarray, **per_point: Sequence
) -> tuple[np.ndarray, np.ndarray]:
    xy, tiles = np.asarray(xy), np.asarray(tiles)
    if xy.ndim != 2 or xy.shape[1] != 2 or not len(xy) or xy.dtype.kind not in "fiu":
        what = f"the coordinates are {xy.dtype} {xy.shape}"
        raise DataError(what, fix="give numbers of shape (n, 2), with n at least 1")
    if not np.isfinite(xy).all():
        bad = int((~np.isfinite(xy).all(axis=1)).argmax())
        raise DataError(f"the coordinates of point {bad} are NaN", fix="leave such points out")
    square = tiles.ndim == 4 and tiles.shape[1] == tiles.shape[2] and tiles.shape[3] == 3
    if not square or tiles.dtype != np.uint8:
        what = f"the tiles are {tiles.dtype} {tiles.shape}"
        raise DataError(what, fix="give uint8 (n, size, size, 3), as helpers.tiles cuts them")
    for name, values in {"tiles": tiles, **per_point}.items():
        if isinstance(values, str) or len(values) != len(xy):
            many = (
                f"a single string as {name}" if isinstance(values, str) else f"{len(values)} {name}"
            )
            raise DataError(f"{many} for {len(xy)} points", fix=f"give {len(xy)}, row by row")
    return xy.astype(float), tiles


def _hex(colour: object) -> str:
    """Return a colour as #rrggbb, which can be nothing but a colour."""
    try:
        return to_hex(colour)
    except ValueError as error:
        fix = "use a name or a value that matplotlib knows"
        raise DataError(f"{colour!r} is not a valid colour", fix=fix) from error


def _sprites(tiles: np.ndarray, across: int, size: int, quality: int) -> str:
    """Return all tiles in one JPEG, row by row, as an address that holds the picture itself."""
    sheet = Image.new("RGB", (across * size, math.ceil(len(tiles) / across) * size), "white")
    for i, tile in enumerate(tiles):
        small = Image.fromarray(tile).resize((size, size), Image.Resampling.LANCZOS)
        sheet.paste(small, (i % across * size, i // across * size))
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _framed(parts: Mapping[str, str]) -> str:
    """Fill in the page, and put it into a frame that runs its script and cannot reach outside."""
    inner = html.escape(
        re.sub(r"@([A-Z]+)@", lambda found: parts[found[1]], PAGE.read_text(encoding="utf-8"))
    )
    return (
        f'<div><iframe sandbox="allow-scripts" title="{parts["TITLE"]}" srcdoc="{inner}" '
        'style="width:100%;height:500px;border:0;display:block;background:#fff"></iframe></div>'
    )


# --------------------------------------------------------------------------- measured before


FOLDER = Path(__file__).resolve().parents[2] / "results"
"""In a clone of the repository; missing where only the package is installed, as in Colab."""


def measured(
    name: str, *, folder: Path | None = None, **wanted: object
) -> tuple[pd.DataFrame, str]:
    """Return rows of a file of ``results/``, and a line that says where they come from.

    Parameters
    ----------
    name
        The file, such as ``"ladder.json"``, with `measured`, `commit`, `machine` and `rows`.
    folder
        Where to look; `FOLDER` when None.
    wanted
        Columns and the value that a row must have to be returned.

    Returns
    -------
    DataFrame
        Empty where the file is missing or has no such rows.
    str
        To show beside it: commit, machine and day of the run that these figures come from.

    Raises
    ------
    DataError
        When the file is damaged.
    """
    path = (folder or FOLDER) / name
    if not path.exists():
        return pd.DataFrame(), f"results/{name} is not here: only this run is shown"
    try:
        report = json.loads(path.read_text())
        machine, rows = report["machine"], pd.DataFrame(report["rows"])
        device, whole = machine.get("gpu") or machine["processor"], _short(report["commit"])
        when = report["measured"]
    except (ValueError, KeyError, TypeError) as error:
        fix = "fetch it again from the repository"
        raise DataError(f"the report is damaged ({error!r})", file=path, fix=fix) from error
    for column, value in wanted.items():
        rows = rows[rows[column] == value] if column in rows else rows.iloc[:0]
    if rows.empty:
        return rows, f"results/{name}: not measured for {wanted}"
    data = sorted(set(rows["data"].dropna().astype(str))) if "data" in rows else []
    commits = sorted(set(rows["commit"].dropna().map(_short))) if "commit" in rows else []
    source = ", ".join([*data, device, f"commit {' and '.join(commits) or whole}", when])
    line = f"NOT this run, results/{name}: {len(rows)} rows, {source}"
    return rows.reset_index(drop=True), line


def _short(commit: str) -> str:
    return commit[:7] + (" with changes" if commit.endswith("-changed") else "")
