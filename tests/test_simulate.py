"""The simulated study: official layout, real-world trouble, and the lessons of real data."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import cdist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import LeaveOneGroupOut, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import catalog, simulate

SLIDES = [section.slide for section in catalog.STUDIES["demo"].sections]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The study, simulated once, in the cache that all tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIMAGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return simulate.demo_root()


@pytest.fixture(scope="session")
def known(root):
    return simulate.truth(root)


def read(root, slide, kind):
    return pd.read_csv(root / catalog.relative_path(slide, kind, "ST"), index_col=0)


@pytest.fixture(scope="session")
def coords(root):
    return {slide: read(root, slide, "coord") for slide in SLIDES}


@pytest.fixture(scope="session")
def counts(root):
    return {slide: read(root, slide, "gene_exp") for slide in SLIDES}


@pytest.fixture(scope="session")
def labels(root):
    return {slide: read(root, slide, "annotation")["V2"] for slide in SLIDES}


@pytest.fixture(scope="session")
def images(root):
    path = {slide: root / catalog.relative_path(slide, "image", "ST") for slide in SLIDES}
    return {slide: np.asarray(Image.open(file).convert("RGB")) for slide, file in path.items()}


# ------------------------------------------------------------------------------ files and trouble


@pytest.mark.parametrize("slide", SLIDES)
def test_one_or_two_spots_are_nearly_empty(counts, slide):
    """As on real slides; one may be among the spots that lost their counts on purpose."""
    assert 1 <= (counts[slide].sum(axis=1) < 60).sum() <= 2


@pytest.mark.parametrize("kind", ["image", "coord", "gene_exp", "annotation"])
def test_every_section_has_its_official_file(root, kind):
    assert all((root / catalog.relative_path(s, kind, "ST")).is_file() for s in SLIDES)


def test_metadata_reads_like_the_official_table(root, counts):
    table = catalog.metadata(root).set_index("slide")
    assert table["spot_num"].to_dict() == {s: len(c) for s, c in counts.items()}


def test_metadata_is_quoted(root):
    assert (root / catalog.METADATA).read_text().startswith('"slide","species","tissue","pmid"')


def test_coordinates_put_y_first(coords, known):
    coord = coords[SLIDES[0]]
    place = known["spots"].loc[coord.index]
    um = known["sections"].loc[SLIDES[0], "um_per_px"]
    assert list(coord.columns) == ["yaxis", "xaxis", "r"]
    np.testing.assert_allclose(coord["yaxis"] * um, place["y_um"], atol=0.01)


@pytest.mark.parametrize("slide", SLIDES)
def test_geometry_is_the_spatial_transcriptomics_array(coords, slide):
    coord = coords[slide]
    distance = cdist(coord[["xaxis", "yaxis"]], coord[["xaxis", "yaxis"]])
    np.fill_diagonal(distance, np.inf)
    pitch = np.median(distance.min(axis=1)) * 50 / coord["r"].iloc[0]
    assert pitch == pytest.approx(200, rel=0.08)


@pytest.mark.parametrize("slide", SLIDES)
def test_about_three_hundred_spots(coords, slide):
    assert 250 <= len(coords[slide]) <= 350


def test_pixel_sizes_differ_between_donors(coords):
    assert len({coord["r"].iloc[0] for coord in coords.values()}) == 3


def test_one_jpeg_calls_itself_png(root):
    kinds = [Image.open(root / catalog.relative_path(s, "image", "ST")).format for s in SLIDES]
    assert sorted(kinds) == ["JPEG"] + ["PNG"] * 5


def test_some_tiles_stick_out_of_the_picture(coords):
    assert all((c[["xaxis", "yaxis"]].min(axis=1) < c["r"]).any() for c in coords.values())


@pytest.mark.parametrize("slide", SLIDES)
def test_a_few_ids_do_not_match(coords, counts, slide):
    placed, counted = set(coords[slide].index), set(counts[slide].index)
    assert (len(placed - counted), len(counted - placed)) == (2, 2)


@pytest.mark.parametrize("slide", SLIDES)
def test_rows_of_counts_and_coordinates_are_in_another_order(coords, counts, slide):
    both = coords[slide].index.intersection(counts[slide].index, sort=False)
    assert list(both) != list(counts[slide].index.intersection(both, sort=False))


@pytest.mark.parametrize("slide", SLIDES)
def test_some_spots_have_no_label(coords, labels, slide):
    assert 5 <= len(coords[slide].index.difference(labels[slide].index)) <= 20


@pytest.mark.parametrize("slide", SLIDES)
def test_some_labels_are_undetermined(labels, slide):
    assert (labels[slide] == "undetermined").sum() == 5


@pytest.mark.parametrize("slide", SLIDES)
def test_every_layer_has_enough_spots(labels, slide):
    sizes = labels[slide].value_counts()
    assert sizes[list(catalog.STUDIES["demo"].labels)].min() >= 25


@pytest.mark.parametrize("slide", SLIDES)
def test_spots_lie_on_tissue(images, coords, slide):
    background = np.percentile(images[slide].mean(axis=2), 97)
    at = coords[slide][["yaxis", "xaxis"]].to_numpy().astype(int)
    blurred = ndimage.uniform_filter(images[slide].mean(axis=2), 25)
    assert (blurred[at[:, 0], at[:, 1]] < background - 25).mean() > 0.95


# ------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("slide", SLIDES)
def test_counts_are_whole_and_not_negative(counts, slide):
    assert (counts[slide].dtypes == np.int64).all()
    assert counts[slide].to_numpy().min() == 0


@pytest.mark.parametrize("slide", SLIDES)
def test_counts_are_as_sparse_as_real_ones(counts, slide):
    assert 0.55 < (counts[slide] == 0).to_numpy().mean() < 0.85


def test_sections_were_sequenced_to_different_depth(counts):
    medians = [c.sum(axis=1).median() for c in counts.values()]
    assert max(medians) > 1.5 * min(medians)


def test_gene_order_differs_between_slides(counts):
    genes = [c.columns for c in counts.values()]
    shared = [[list(a[a.isin(b)]), list(b[b.isin(a)])] for a, b in pairwise(genes)]
    assert all(a != b for a, b in shared)


def test_some_genes_are_in_some_slides_only(counts):
    genes = [set(c.columns) for c in counts.values()]
    assert 0.6 < len(set.intersection(*genes)) / len(set.union(*genes)) < 0.9


def test_variance_exceeds_the_mean(counts):
    one = counts[SLIDES[0]]
    often = one.loc[:, one.mean() > 2]
    assert (often.var() > often.mean()).mean() > 0.95


# ------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize("slide", SLIDES)
def test_labels_are_the_true_layers(labels, known, slide):
    told = labels[slide][labels[slide] != "undetermined"]
    assert (told == "Layer " + known["spots"].loc[told.index, "layer"].astype(str)).all()


def test_truth_knows_every_spot_and_gene(counts, known):
    assert all(c.index.isin(known["spots"].index).all() for c in counts.values())
    assert all(c.columns.isin(known["genes"].index).all() for c in counts.values())


@pytest.fixture(scope="session")
def table(counts, coords, labels, images, known):
    """Labelled spots of all slides: normalised genes, colour and texture of the 100 um tile."""
    parts = []
    for slide in SLIDES:
        label = labels[slide][labels[slide] != "undetermined"]
        keep = label.index.intersection(coords[slide].index).intersection(counts[slide].index)
        total = counts[slide].sum(axis=1)
        genes = np.log1p(counts[slide].div(total, axis=0) * 1e4).loc[keep]
        colour, texture = describe(images[slide], coords[slide].loc[keep])
        parts.append({"label": label[keep], "genes": genes, "colour": colour, "texture": texture})
    whole = {
        "genes": pd.concat([p["genes"] for p in parts], join="inner"),
        "colour": np.vstack([p["colour"] for p in parts]),
        "texture": np.vstack([p["texture"] for p in parts]),
        "label": pd.concat([p["label"] for p in parts]),
    }
    whole["truth"] = known["spots"].loc[whole["label"].index]
    whole["donor"] = whole["truth"]["slide"].map(known["sections"]["donor"]).to_numpy()
    return whole


def describe(image, coord):
    """Colour (mean and deviation of RGB) and texture (grain at three scales, blobs, direction)."""
    um = 50 / coord["r"].iloc[0]
    grey = -np.log((image.mean(axis=2) + 1) / 256)
    smooth = [ndimage.gaussian_filter(grey, s / um) for s in (1.5, 3, 6, 15)]
    down, across = np.gradient(smooth[0])
    colour, texture = [], []
    for y, x, r in coord[["yaxis", "xaxis", "r"]].to_numpy():
        tile = tuple(slice(max(0, int(v - r)), int(v + r) + 1) for v in (y, x))
        pixels = image[tile].reshape(-1, 3)
        colour.append([*pixels.mean(axis=0), *pixels.std(axis=0)])
        grain = [np.log((a[tile] - b[tile]).std()) for a, b in pairwise(smooth)]
        dark = smooth[0][tile] > smooth[0][tile].mean() + smooth[0][tile].std()
        blobs = ndimage.label(dark)[1]
        a, b, c = (
            (u[tile] * v[tile]).mean() for u, v in ((across, across), (down, down), (across, down))
        )
        direction = np.hypot(a - b, 2 * c) / (a + b)
        texture.append(
            [
                *grain,
                *-np.diff(grain),
                np.log(1 + blobs),
                dark.sum() * um**2 / max(blobs, 1),
                direction,
            ]
        )
    return np.array(colour), np.array(texture)


def score(features, target, cv, groups=None, c=1.0):
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=c, max_iter=500, class_weight="balanced")
    )
    guess = cross_val_predict(model, features, target, cv=cv, groups=groups)
    return f1_score(target, guess, average="macro")


@pytest.fixture(scope="session")
def probes(table):
    """Macro-F1 of the layer, from several inputs, with a donor left out or random spots."""
    label, donor = table["label"].to_numpy(), table["donor"]
    spots = StratifiedKFold(5, shuffle=True, random_state=0)
    top = table["genes"].var().nlargest(200).index
    inputs = {"colour": (table["colour"], 1.0), "texture": (table["texture"], 1.0)}
    inputs["genes"] = (table["genes"][top].to_numpy(), 0.01)
    out = {name: score(x, label, LeaveOneGroupOut(), donor, c) for name, (x, c) in inputs.items()}
    out["colour, random spots"] = score(table["colour"], label, spots)
    out["donor from colour"] = score(table["colour"], donor, spots)
    out["donor from genes"] = score(table["genes"][top].to_numpy(), donor, spots, c=0.01)
    return out


def test_colour_tells_some_layers_but_not_all(probes):
    assert 0.40 < probes["colour"] < 0.70  # the majority class alone scores about 0.08


def test_random_spots_flatter_the_colour_probe(probes):
    assert probes["colour, random spots"] > probes["colour"] + 0.01


def test_texture_knows_what_colour_does_not(probes):
    assert probes["texture"] > probes["colour"] + 0.1


def test_genes_tell_layers_best(probes):
    assert probes["genes"] > max(probes["texture"], 0.85)


@pytest.mark.parametrize("what", ["donor from colour", "donor from genes"])
def test_donors_differ(probes, what):
    assert probes[what] > 0.9


@pytest.fixture(scope="session")
def near_and_far(table):
    """Label agreement and expression correlation of pairs of spots of one section, near and far."""
    top = table["genes"].var().nlargest(300).index
    near, far = [], []
    for _, spots in table["truth"].groupby("slide"):
        genes = table["genes"].loc[spots.index, top]
        alike = np.corrcoef(genes - genes.mean())
        same = np.equal.outer(spots["layer"].to_numpy(), spots["layer"].to_numpy())
        distance = cdist(spots[["x_um", "y_um"]], spots[["x_um", "y_um"]])
        for pairs, out in (((distance > 1) & (distance < 260), near), (distance > 1500, far)):
            out.append((same[pairs].mean(), alike[pairs].mean()))
    return np.mean(near, axis=0), np.mean(far, axis=0)


def test_neighbours_share_their_layer(near_and_far):
    near, far = near_and_far
    assert near[0] > far[0] + 0.3


def test_neighbours_resemble_each_other_in_genes(near_and_far):
    near, far = near_and_far
    assert near[1] > far[1] + 0.08


@pytest.mark.parametrize("donor", "ABC")
def test_adjacent_sections_have_the_same_anatomy(known, donor):
    spots = known["spots"].assign(at=known["spots"].index.str.rsplit("_", n=1).str[1])
    layers = [
        spots[spots["slide"] == f"{SLIDES[0][:-2]}{donor}{k}"].set_index("at")["layer"]
        for k in (1, 2)
    ]
    first, second = layers[0].align(layers[1], join="inner")
    assert (first == second).mean() > 0.6


def test_adjacent_sections_have_their_own_nuclei(known):
    spots = known["spots"].assign(at=known["spots"].index.str.rsplit("_", n=1).str[1])
    one, two = (spots[spots["slide"] == s].set_index("at")["nuclei"] for s in SLIDES[:2])
    one, two = one.align(two, join="inner")
    assert (one != two).mean() > 0.8


@pytest.mark.parametrize("layer", range(1, 6))
def test_true_markers_are_found_again(table, known, layer):
    inside = (table["truth"]["layer"] == layer).to_numpy()
    genes = table["genes"]
    gain = (genes[inside].mean() - genes[~inside].mean()) / genes.std()
    programme = known["genes"]["programme"]
    specific = gain[programme[gain.index].str.startswith("layer").to_numpy()].nlargest(16).index
    assert (programme[specific] == f"layer {layer}").mean() > 0.7


def test_density_genes_follow_the_nuclei(table, known):
    genes = table["genes"].loc[:, table["genes"].std() > 0]
    programme = known["genes"]["programme"][genes.columns]
    nuclei = np.log(table["truth"]["nuclei_per_mm2"] + 300)
    follows = genes.corrwith(nuclei).groupby(programme).median()
    assert follows["nuclei"] > follows["background"] + 0.15


# --------------------------------------------------------------------------- repeatable, and whole


@pytest.fixture
def again(root, known, tmp_path):
    section = catalog.STUDIES["demo"].sections[0]
    genes = simulate._genes(np.random.default_rng([0, 0]))
    simulate._write_section(tmp_path, section, genes, seed=0)
    return tmp_path


def test_the_same_seed_writes_the_same_bytes(root, again):
    files = [f.relative_to(again) for f in again.rglob("*") if f.is_file()]
    assert len(files) == 4
    assert all((again / f).read_bytes() == (root / f).read_bytes() for f in files)


def test_the_study_is_the_one_that_the_folder_is_named_for(counts, images):
    """Rename `simulate.FOLDER` when this changes: caches are keyed to the files in it."""
    assert simulate.FOLDER == "demo-2bc198349dcff7ce"
    totals = [int(c.to_numpy().sum()) for c in counts.values()]
    assert totals == pytest.approx([2208590, 1707295, 1158987, 1362779, 1511815, 927870], rel=1e-4)
    assert [p.mean() for p in images.values()] == pytest.approx(
        [182.66, 181.42, 178.86, 177.03, 188.24, 184.88], rel=1e-4
    )


def test_another_seed_makes_other_genes():
    one, two = (simulate._genes(np.random.default_rng([seed, 0])) for seed in (0, 1))
    assert not one.equals(two)


def test_the_study_is_written_once(monkeypatch, tmp_path):
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(simulate, "write_study", lambda root, seed: (calls.append(1), root.mkdir()))
    assert simulate.demo_root() == simulate.demo_root()
    assert len(calls) == 1


def test_a_broken_off_study_is_never_read(monkeypatch, tmp_path):
    monkeypatch.setenv("STIMAGE_CACHE", str(tmp_path))

    def break_off(root, seed):
        root.mkdir()
        (root / "half.csv").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate, "write_study", break_off)
    with pytest.raises(KeyboardInterrupt):
        simulate.demo_root()
    assert not list(tmp_path.rglob("half.csv"))
