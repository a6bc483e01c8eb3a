"""Figures: what must be on them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from matplotlib.patches import Circle
from matplotlib_scalebar.scalebar import ScaleBar

from helpers import plots, slides


@pytest.fixture
def adata(tiny):
    plots.style()
    yield slides.load(tiny.slide, root=tiny.root)
    plt.close("all")


def bars(ax):
    return [a for a in ax.get_children() if isinstance(a, ScaleBar)]


def test_tissue_has_one_scale_bar(adata):
    assert len(bars(plots.tissue(adata))) == 1


def test_close_up_has_a_scale_bar_of_a_fifth_of_its_side(adata):
    (bar,) = bars(plots.close_up(adata, (120, 130), 500))
    assert (bar.fixed_value, bar.fixed_units) == (100, "um")


def test_spots_are_drawn_at_their_true_size_and_place(adata):
    circles = [p for p in plots.spots(adata, "label").patches if isinstance(p, Circle)]
    assert {c.radius for c in circles} == {10.0}
    assert [c.center for c in circles] == [tuple(xy) for xy in adata.obsm["spatial"]]


def test_spots_take_a_gene_or_one_value_each(adata):
    values = adata.obs_vector("Ga")
    colours = [
        [p.get_facecolor() for p in plots.spots(adata, given).patches] for given in ("Ga", values)
    ]
    assert colours[0] == colours[1]


def test_spots_without_a_label_are_grey_and_named(adata):
    palette = plots.label_colours(adata.obs["label"])
    assert palette["no label"] == plots.UNLABELLED
    assert "no label" not in plots.label_colours(adata.obs["label"].dropna())


def test_jitter_is_the_same_after_each_call_of_style():
    def places():
        plots.style()
        ax = sns.stripplot(pd.DataFrame({"x": np.arange(9.0)}), x="x", ax=plt.subplots()[1])
        return ax.collections[0].get_offsets().tolist()

    first = places()
    assert places() == first
    plt.close("all")


def test_the_default_figure_is_at_most_seven_inches_wide():
    plots.style()
    assert plt.rcParams["figure.figsize"][0] <= 7
