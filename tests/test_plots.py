"""Figures: what must be on them, and where measured results come from."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from matplotlib.patches import Circle
from matplotlib_scalebar.scalebar import ScaleBar

from helpers import plots, slides
from helpers.files import DataError

REPORT = {
    "measured": "2026-01-02",
    "commit": "0123456789",
    "machine": {"processor": "a processor"},
    "rows": [
        {"study": "mob", "value": 1.0, "data": "local copy"},
        {"study": "demo", "value": 2.0, "data": "simulated"},
    ],
}


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


def history(epochs, validated):
    rows = [
        (epoch, split, measure, k, chance, value / (1 + epoch))
        for epoch in range(1, epochs + 1)
        for split, measure, k, chance, value in [
            ("train", "loss", None, None, 3.0),
            ("train", "temperature", None, None, 0.07),
            *[("validation", "loss", None, None, 3.5)] * validated,
            *[("validation", "recall", k, k / 100, k / 20) for k in (1, 10)] * validated,
        ]
    ]
    return pd.DataFrame(rows, columns=["epoch", "split", "measure", "k", "chance", "value"])


def test_curves_show_loss_and_recall_in_multiples_of_chance():
    left, right = plots.curves(history(3, True)).axes
    assert [line.get_label() for line in left.lines] == ["train", "validation"]
    assert right.get_ylabel() == "recall@10, times chance"
    assert right.lines[-1].get_ydata() == pytest.approx([5 / 2, 5 / 3, 5 / 4])
    plt.close("all")


def test_curves_without_validation_show_the_temperature():
    left, right = plots.curves(history(2, False)).axes
    assert [line.get_label() for line in left.lines] == ["train"]
    assert right.get_ylabel() == "temperature"
    assert right.lines[-1].get_ydata() == pytest.approx([0.07 / 2, 0.07 / 3])
    plt.close("all")


def test_a_live_curve_is_shown_once_and_then_redrawn_in_place(monkeypatch):
    shown, redrawn = [], []

    class Handle:
        update = redrawn.append

    def display(figure, display_id):
        shown.append(figure)
        return Handle() if display_id else None

    monkeypatch.setattr(plots, "display", display)
    live = plots.Live("a training")
    for epochs in (1, 2, 3):
        live(history(epochs, True))
    assert len(shown) == 1
    assert [len(f.axes[0].lines[0].get_xdata()) for f in redrawn] == [2, 3]
    assert redrawn[-1].get_suptitle() == "a training"
    assert not plt.get_fignums()  # nothing is left to be shown again


def test_rows_come_with_commit_machine_day_and_data(tmp_path):
    (tmp_path / "some.json").write_text(json.dumps(REPORT))
    rows, line = plots.measured("some.json", folder=tmp_path, study="mob")
    assert rows["value"].tolist() == [1.0]
    for said in ("NOT this run", "local copy", "a processor", "0123456", "2026-01-02"):
        assert said in line


def test_rows_may_be_of_other_commits_than_the_file(tmp_path):
    rows = [row | {"commit": "fedcba9876-changed"} for row in REPORT["rows"]]
    (tmp_path / "some.json").write_text(json.dumps(REPORT | {"rows": rows}))
    _, line = plots.measured("some.json", folder=tmp_path)
    assert "commit fedcba9 with changes" in line
    assert "0123456" not in line


@pytest.mark.parametrize("wanted", [{"study": "none"}, {"column": 1}])
def test_what_was_not_measured_is_said(tmp_path, wanted):
    (tmp_path / "some.json").write_text(json.dumps(REPORT))
    rows, line = plots.measured("some.json", folder=tmp_path, **wanted)
    assert rows.empty
    assert "not measured" in line


def test_a_missing_file_is_said(tmp_path):
    rows, line = plots.measured("some.json", folder=tmp_path)
    assert rows.empty
    assert "is not here" in line


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(DataError, match=r"some\.json"):
        plots.measured("some.json", folder=tmp_path)


@pytest.mark.parametrize("name", ["data.json", "finetune.json", "train.json"])
def test_the_reports_of_the_repository_can_be_read(name):
    rows, line = plots.measured(name)
    assert len(rows), line
