"""Figures that the book draws more than once."""

from collections.abc import Sequence

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from helpers import images, slides

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


def scale_bar(
    ax: Axes, um_per_px: float, *, length_um: float | None = None, colour: str = "black"
) -> None:
    """Draw a scale bar, of a round length unless one is given.

    Parameters
    ----------
    ax
        Axes that show an image.
    um_per_px
        um per px of the image as shown.
    length_um
        Length of the bar in um; chosen to fit when not given.
    colour
        Of the bar and its text.
    """
    from matplotlib_scalebar.scalebar import ScaleBar

    ax.add_artist(
        ScaleBar(
            um_per_px,
            "um",
            length_fraction=None if length_um else 0.3,
            fixed_value=length_um,
            fixed_units="um" if length_um else None,
            location="lower right",
            color=colour,
            box_alpha=0.6,
            font_properties={"size": "small"},
        )
    )


def tissue(
    adata: ad.AnnData, slide: str | None = None, *, ax: Axes | None = None, alpha: float = 1.0
) -> Axes:
    """Draw the image of a slide, with a scale bar; axes in px of the full image.

    Parameters
    ----------
    adata
        As `helpers.slides` loads it, with its image.
    slide
        Its name; may be left out when `adata` holds one slide.
    ax
        Where to draw; new axes when not given.
    alpha
        Below 1 the image is paled, so that what is drawn over it stands out.
    """
    slide = slide or next(iter(adata.uns["spatial"]))
    known = adata.uns["spatial"][slide]
    ax = ax or plt.subplots(figsize=(4.5, 4.5))[1]
    width, height = known["metadata"]["width_px"], known["metadata"]["height_px"]
    ax.imshow(known["images"]["hires"], extent=(0, width, height, 0), alpha=alpha)
    scale_bar(ax, slides.um_per_px(adata, slide))
    ax.set(xticks=[], yticks=[])
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def spots(
    adata: ad.AnnData,
    values: str | np.ndarray | pd.Series,
    *,
    ax: Axes | None = None,
    cmap: str = "viridis",
    alpha: float = 1.0,
    image: bool = True,
    legend: bool = True,
    label: str | None = None,
    zoom: bool = False,
) -> Axes:
    """Draw the spots of one slide at their true size, coloured by a label or a number.

    Parameters
    ----------
    adata
        One slide.
    values
        A column of ``obs``, a gene, or one value per spot. Categories get one colour each, in
        their order; spots without one are grey.
    ax, cmap, alpha
        Where and how to draw.
    image
        Draw the tissue below.
    legend, label
        Name the categories, or draw a colour bar with this label.
    zoom
        Show the part of the slide that has spots, not all the glass around it.
    """
    if isinstance(values, str):
        values = adata.obs[values] if values in adata.obs else adata.obs_vector(values)
    ax = tissue(adata, ax=ax, alpha=0.6) if image else ax or plt.subplots(figsize=(4.5, 4.5))[1]
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
        scale = plt.cm.ScalarMappable(plt.Normalize(np.nanmin(values), np.nanmax(values)), cmap)
        face = scale.to_rgba(values)
        if legend:
            ax.figure.colorbar(scale, ax=ax, shrink=0.7, label=label)
    look = {"edgecolor": "white", "linewidth": 0.4, "alpha": alpha}  # the edge parts it from tissue
    for (x, y), colour in zip(adata.obsm["spatial"], face, strict=True):
        ax.add_patch(Circle((x, y), radius, facecolor=colour, **look))
    if zoom:
        (left, top), (right, bottom) = adata.obsm["spatial"].min(0), adata.obsm["spatial"].max(0)
        ax.set(xlim=(left - 4 * radius, right + 4 * radius))
        ax.set(ylim=(bottom + 4 * radius, top - 4 * radius))
    if not image:
        ax.set_aspect("equal")
        ax.autoscale_view()
        ax.invert_yaxis()
        scale_bar(ax, slides.um_per_px(adata))
        ax.set(xticks=[], yticks=[])
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
    ax.set(xticks=[], yticks=[])
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


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
    ax.set(xticks=[], yticks=[])
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def curves(history: pd.DataFrame, title: str = "") -> Figure:
    """Draw how a training went: its loss and, where it was validated, its recall.

    Parameters
    ----------
    history
        As from `helpers.contrast.fit`.
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
    """`curves`, drawn anew after every epoch: give it to `helpers.contrast.fit` as `on_epoch`.

    In a notebook the new figure takes the place of the old one, so that one is left in the end.
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
