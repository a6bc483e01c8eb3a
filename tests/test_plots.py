"""Figures, maps that show the right tile under the pointer, and measured results."""

import base64
import html
import io
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from browser import Tab, tab
from bs4 import BeautifulSoup
from conftest import until
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle
from matplotlib_scalebar.scalebar import ScaleBar
from PIL import Image

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


def test_two_slides_in_one_are_not_drawn_as_one(adata):
    adata.uns["spatial"]["other"] = next(iter(adata.uns["spatial"].values()))
    with pytest.raises(DataError, match=r"holds 2 slides.*give one slide at a time"):
        plots.tissue(adata)


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


# --- maps that show tiles -----------------------------------------------------------------------

NASTY = '</script><img src=x onerror="alert(1)">&amp;<!-- @DATA@'


def tissue(n: int, size: int = 96, seed: int = 0) -> np.ndarray:
    """Tiles that JPEG finds hard to shrink."""
    rng = np.random.default_rng(seed)
    base = rng.integers(120, 240, (n, 1, 1, 3)) + rng.normal(0, 25, (n, size, size, 3))
    return base.clip(0, 255).astype(np.uint8)


def plain(colours: list[str], size: int = 96) -> np.ndarray:
    """Tiles of one colour each."""
    rgb = np.array([to_rgb(c) for c in colours]) * 255
    return np.broadcast_to(rgb[:, None, None].astype(np.uint8), (len(rgb), size, size, 3)).copy()


def made(n: int = 30, **options) -> str:
    given = {
        "xy": np.random.default_rng(1).normal(size=(n, 2)),
        "tiles": tissue(n),
        "text": [f"spot {i}" for i in range(n)],
        "colours": ["C0"] * n,
        "title": "a map",
    }
    return plots.hover_map(**given | options).data


def inner(outer: str) -> str:
    """The document inside the frame, as a browser unescapes it."""
    return BeautifulSoup(outer, "html.parser").find("iframe")["srcdoc"]


def data_of(outer: str) -> dict:
    return json.loads(re.search(r"^const data = (.*);$", inner(outer), re.M)[1])


def sheet_of(outer: str) -> Image.Image:
    encoded = re.search(r'"data:image/jpeg;base64,([^"]+)"', inner(outer))[1]
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_every_tile_lies_where_the_script_looks_for_it():
    tiles = tissue(30)
    page = made(30, tiles=tiles)
    sheet, across = np.asarray(sheet_of(page)).astype(float), data_of(page)["across"]
    assert sheet.shape == (5 * 48, 6 * 48, 3)
    assert across == 6
    for i in (0, 5, 6, 17, 29):
        y, x = i // across * 48, i % across * 48
        small = np.asarray(Image.fromarray(tiles[i]).resize((48, 48), Image.Resampling.LANCZOS))
        shown = sheet[y : y + 48, x : x + 48]
        assert abs(shown - small).mean() < 12
        others = [j for j in range(30) if j != i]
        means = tiles.mean(axis=(1, 2))
        apart = np.linalg.norm(means - shown.mean(axis=(0, 1)), axis=1)
        assert apart[i] < apart[others].min()


def test_places_keep_their_shape_and_start_at_zero():
    page = made(3, xy=np.array([[-5.0, 1.0], [15.0, 1.0], [5.0, 11.0]]))
    assert data_of(page)["xy"] == [[0, 0], [9999, 0], [5000, 5000]]
    assert data_of(page)["box"] == [9999, 5000]


def test_points_in_one_place_can_be_drawn():
    assert data_of(made(4, xy=np.zeros((4, 2))))["box"] == [0, 0]


def test_the_same_input_gives_the_same_bytes():
    assert made() == made()


def test_text_and_names_are_never_markup():
    page = made(30, text=[NASTY] * 30, title=NASTY, legend={NASTY: "C1"})
    outer = BeautifulSoup(page, "html.parser")
    assert [e.name for e in outer.find_all()] == ["div", "iframe"]
    assert outer.iframe["title"] == NASTY
    whole = BeautifulSoup(inner(page), "html.parser")
    assert whole.find("img") is None
    assert len(whole.find_all("script")) == 1
    assert whole.h1.get_text() == NASTY
    assert whole.footer.get_text() == NASTY
    assert data_of(page)["text"] == [NASTY] * 30  # whole, and nothing cut the script short
    script = re.search(r"<script>(.*?)</script>", inner(page), re.S)[1]
    assert script.rstrip().endswith("after this script */")
    assert not re.search(r"innerHTML|document\.write|insertAdjacent|eval\(", script)


def test_the_frame_is_shut_in_and_asks_nothing_of_the_network():
    page = made()
    assert BeautifulSoup(page, "html.parser").iframe["sandbox"] == ["allow-scripts"]
    code = re.sub(r'"data:image/jpeg;base64,[^"]+"', "", inner(page))
    assert not re.search(r"https?:|//|src=|href=|@import|fetch|XMLHttp", code)


def test_a_figure_that_cannot_be_seen_is_named():
    whole = BeautifulSoup(inner(made(title="Layers of A")), "html.parser")
    assert BeautifulSoup(made(title="Layers of A"), "html.parser").iframe["title"] == "Layers of A"
    assert "needs JavaScript" in whole.noscript.get_text()
    assert whole.find(id="text")["aria-live"] == "polite"
    assert whole.canvas["tabindex"] == "0"


def test_a_large_map_stays_within_the_limit_by_smaller_tiles():
    n = 1500
    page = made(n, tiles=tissue(n, 48))
    assert len(page) <= plots.LIMIT
    assert sheet_of(page).size == (39 * 48, 39 * 48)
    assert len(data_of(page)["xy"]) == n
    tight = made(n, tiles=tissue(n, 48), limit=500_000)
    assert len(tight) <= 500_000
    assert sheet_of(tight).size == (39 * 32, 39 * 32)


def test_what_cannot_be_made_small_enough_is_refused():
    with pytest.raises(DataError, match=r"30 points .* fewer points"):
        made(30, limit=7_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": tissue(3)}, "3 tiles for 30 points"),
        ({"text": ["a"]}, "1 texts for 30 points"),
        ({"text": "a" * 30}, "a single string as texts"),
        ({"colours": ["C0"] * 31}, "31 colours for 30 points"),
        ({"colours": "red"}, "a single string as colours"),
        ({"colours": ["url(x)"] * 30}, "is not a valid colour"),
        ({"legend": {"a": '"><b>'}}, "is not a valid colour"),
        ({"xy": np.full((30, 2), np.nan)}, "the coordinates of point 0 are NaN"),
        ({"xy": np.zeros((30, 3))}, "give numbers"),
        ({"xy": np.zeros((0, 2))}, "give numbers"),
        ({"tiles": tissue(30).astype(float)}, "uint8"),
        ({"tiles": tissue(30)[:, :50]}, "uint8"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(DataError, match=message):
        made(30, **options)


# --- the figure for print -----------------------------------------------------------------------


def test_along_draws_the_tile_nearest_the_middle_of_each_square():
    xy = np.array([[0.0, 0.0], [2.4, 2.6], [10.0, 10.0], [9.9, 0.1]])
    tiles = plain(["red", "lime", "blue", "yellow"], 8)
    ax = plots.tile_map(xy, tiles, ["C0", "C1", "C2", "C3"], side_um=50, across=2)
    drawn = {tuple(im.get_extent()): im.get_array()[0, 0].tolist() for im in ax.images}
    assert len(drawn) == len(ax.patches) == 3  # the first two points share a square
    first = next(v for (x0, _, y0, _), v in drawn.items() if x0 < 5 and y0 < 5)
    assert first == [0, 255, 0]  # the one nearer to (2.5, 2.5)
    (bar,) = [a for a in ax.get_children() if isinstance(a, ScaleBar)]
    left, right, *_ = ax.images[0].get_extent()
    assert bar.dx * (right - left) == pytest.approx(bar.fixed_value) == 50  # a tile is 50 um wide
    assert ax.get_xlim()[0] < 0 < 10 < ax.get_xlim()[1]
    plt.close("all")


def test_along_needs_one_tile_per_point():
    with pytest.raises(DataError, match="3 tiles for 2 points"):
        plots.tile_map(np.eye(2), tissue(3))


# --- maps in a browser --------------------------------------------------------------------------

POINTS = ["#ff0000", "#00ff00", "#0000ff"]
TILES = ["#ff00ff", "#00ffff", "#ffff00"]


def picture(one: Tab) -> np.ndarray:
    shot = one.page.screenshot(full_page=True)
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(int)


def close_to(image: np.ndarray, colour: str) -> np.ndarray:
    return abs(image - np.array(to_rgb(colour)) * 255).max(axis=2) < 30


def drawn(one: Tab) -> np.ndarray:
    """The page once the frame in it is drawn, which the page itself does not wait for."""

    def complete() -> list[np.ndarray]:
        image = picture(one)
        return [image] if all(close_to(image[:545], c).any() for c in POINTS) else []

    return until(complete, "points in the frame")[0]


def large_tiles(one: Tab) -> list[int]:
    """The numbers of the tiles that are shown large; a tile shown small counts as -1."""
    sizes = [int(close_to(picture(one), colour).sum()) for colour in TILES]
    return [i if size > 80 * 80 else -1 for i, size in enumerate(sizes) if size]


@pytest.fixture
def page(tmp_path):
    """A page with scripts of its own that would break what is not in a frame."""
    n = len(POINTS)
    figure = plots.hover_map(
        np.array([[0.0, 0.0], [4.0, 3.0], [8.0, 0.5]]), plain(TILES), [NASTY] * n, POINTS,
        title="three points", legend=dict(zip("abc", POINTS, strict=True)),
    )  # fmt: skip
    file = tmp_path / "page.html"
    file.write_text(
        "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        "<style>canvas, aside {display: none}</style><script>window.require = window.define = "
        f"() => {{ throw Error('mine') }}; const data = 1;</script><h1>Before</h1>{figure.data}"
    )
    return file


@pytest.mark.parametrize(
    ("width", "theme"), [(1300, "light"), (760, "dark"), (390, "light"), (320, "dark")]
)
def test_the_right_tile_appears_under_the_pointer(chromium, page, width, theme):
    one = tab(chromium, width=width, theme=theme)
    one.open(page)
    assert one.page.evaluate("document.documentElement.scrollWidth") <= width
    before = drawn(one)
    assert [int(close_to(before, c).sum()) for c in TILES] == [0, 0, 0]
    point_at = one.page.touchscreen.tap if width < 600 else one.page.mouse.move
    for i in (1, 0, 2):
        y, x = np.argwhere(close_to(before[:545], POINTS[i]))[0] + [2, 0]  # below: the legend
        point_at(float(x), float(y))
        until(lambda i=i: large_tiles(one) == [i], f"tile {i} and no other")
    assert one.errors == one.outside == []
    one.page.close()


def test_a_keyboard_is_enough(chromium, page):
    one = tab(chromium)
    one.open(page)
    drawn(one)
    for key in ("Tab", "ArrowRight", "Tab", "ArrowRight"):
        one.page.keyboard.press(key)
    until(lambda: len(shown := large_tiles(one)) == 1 and shown != [-1], "one large tile")
    one.page.close()


def test_text_stays_text_in_a_browser(chromium, page, tmp_path):
    alone = tmp_path / "alone.html"  # what is in the frame, to be looked into
    alone.write_text(inner(page.read_text()))
    one = tab(chromium)
    one.open(alone)
    one.page.focus("canvas")
    one.page.keyboard.press("ArrowUp")
    assert one.page.text_content("#text") == NASTY
    assert one.page.evaluate("document.images.length") == 0
    assert html.escape(NASTY) not in one.page.text_content("body")
    one.page.close()
