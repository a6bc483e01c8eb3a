import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

from helpers import genes
from helpers.files import DataError


def make(slide, seed, spots=60, symbols=None, layers=True):
    """A slide of 200 genes; the first 20 follow two layers, the next 5 follow the slide."""
    rng = np.random.default_rng(seed)
    symbols = [f"G{j}" for j in range(200)] if symbols is None else symbols
    mean = np.random.default_rng(0).gamma(1.0, 2.0, len(symbols)) + 0.2
    rates = np.tile(mean, (spots, 1))
    if layers:
        rates[: spots // 2, :20] *= 6
    rates[:, 20:25] *= 1 + 8 * (seed % 2)
    X = rng.poisson(rates * rng.gamma(5, 1 / 5, (spots, 1)))
    X[:, -1] = 0  # never seen: divides by zero where it is not left out
    obs = pd.DataFrame({"slide": slide}, index=[f"{slide}_{i}" for i in range(spots)])
    return ad.AnnData(
        sparse.csr_matrix(X.astype(np.float32)), obs=obs, var=pd.DataFrame(index=symbols)
    )


@pytest.fixture
def slides():
    return {name: make(name, seed) for seed, name in enumerate(["S_A1", "S_A2", "S_B1"])}


@pytest.fixture(scope="module")
def real_slides(real_root):
    from helpers import counts

    def load(path):
        read = counts.read_dense(path)
        obs = pd.DataFrame({"slide": path.stem.removesuffix("_count")}, index=read.spots)
        return ad.AnnData(read.X, obs=obs, var=pd.DataFrame(index=read.genes))

    paths = sorted((real_root / "ST" / "gene_exp").glob("Human_Breast_*_count.csv"))
    return {path.stem.removesuffix("_count"): load(path) for path in paths[:3]}


def dense(adata):
    """As the published snippets hold a slide: a dense AnnData."""
    return ad.AnnData(adata.to_df())


# Panels


def test_a_panel_cannot_be_changed():
    panel = genes.Panel("p", ("A", "B"), "by hand", ("S_A1",))
    with pytest.raises(AttributeError):
        panel.genes = ("C",)


def test_a_panel_names_each_gene_once():
    with pytest.raises(DataError, match="'p' has duplicate genes: A"):
        genes.Panel("p", ("A", "B", "A"), "by hand", ())


def test_a_panel_has_genes():
    with pytest.raises(DataError, match="no genes"):
        genes.Panel("p", (), "by hand", ())


def test_a_panel_chosen_with_a_held_out_slide_is_refused():
    panel = genes.Panel("p", ("A",), "by hand", ("S_A1", "S_A2"))
    genes.check_held_out(panel, ["S_B1"])
    with pytest.raises(DataError, match="'p' was chosen with held-out slides: S_A2") as refused:
        genes.check_held_out(panel, ["S_A2", "S_B1"])
    assert "S_A1" not in str(refused.value)


def test_one_name_is_no_list_of_held_out_slides():
    panel = genes.Panel("p", ("A",), "by hand", ("S_A1",))
    with pytest.raises(DataError, match=r"'S_A1' is one name.*Fix: give \['S_A1'\]"):
        genes.check_held_out(panel, "S_A1")


@pytest.mark.parametrize("bare", [{"genes": "ABC"}, {"slides": "S_A1"}], ids=str)
def test_a_panel_of_letters_is_refused(bare):
    with pytest.raises(DataError, match="'p' are one string"):
        genes.Panel(**{"name": "p", "genes": ("A",), "method": "", "slides": ("S_A1",), **bare})


@pytest.mark.parametrize("choose", [genes.overlap_hvg, genes.overlap_hvg_batch, genes.shared_hvg])
def test_overlap_panels_name_the_slides_of_the_spots_whatever_the_keys(slides, choose):
    renamed = {"train1": slides["S_A1"], "train2": slides["S_B1"]}
    assert choose(renamed, n=10).slides == ("S_A1", "S_B1")


def test_a_panel_from_slides_put_together_names_them_all(slides):
    assert genes.hvg(ad.concat([slides["S_A1"], slides["S_B1"]]), 10).slides == ("S_A1", "S_B1")


@pytest.mark.parametrize("choose", [genes.overlap_hvg, genes.overlap_hvg_batch, genes.shared_hvg])
def test_overlap_panels_name_their_slides(slides, choose):
    two = {name: slides[name] for name in ("S_A1", "S_B1")}
    assert choose(two, n=10).slides == ("S_A1", "S_B1")


def test_the_two_overlap_panels_are_named_apart(slides):
    assert genes.overlap_hvg(slides, 10).name != genes.overlap_hvg_batch(slides, 10).name


# Quality and normalisation


def test_qc_counts_what_is_there():
    X = sparse.csr_matrix(np.array([[3, 0, 1], [0, 0, 0]], np.float32))
    adata = ad.AnnData(X, var=pd.DataFrame(index=["mt-Co1", "B", "C"]))
    table = genes.qc(adata)
    assert table["total_counts"].tolist() == [4, 0]
    assert table["n_genes_by_counts"].tolist() == [2, 0]
    assert table["pct_counts_mt"].iloc[0] == 75


def test_qc_says_nothing_of_mitochondria_where_none_were_measured(slides):
    assert genes.qc(slides["S_A1"])["pct_counts_mt"].isna().all()


def test_qc_leaves_the_slide_as_it_was(slides):
    adata = slides["S_A1"]
    genes.qc(adata)
    assert list(adata.obs) == ["slide"]
    assert list(adata.var) == []


def test_spots_with_next_to_no_counts_are_left_out(slides):
    adata = slides["S_A1"]
    size = np.asarray(adata.X.sum(axis=1)).ravel()
    kept = genes.drop_empty(adata, min_counts=int(np.sort(size)[4]))
    assert kept.obs_names.tolist() == adata.obs_names[size >= np.sort(size)[4]].tolist()
    assert adata.n_obs == 60


def test_a_slide_of_empty_spots_is_refused(slides):
    with pytest.raises(DataError, match=r"S_A1.*no spot has 1000000 counts"):
        genes.drop_empty(slides["S_A1"], min_counts=10**6)


def test_prepare_drops_empty_spots_then_normalises_each_slide(slides):
    slides["S_A1"].X[0] = 0
    done = genes.prepare(slides)
    assert list(done) == ["S_A1", "S_A2", "S_B1"]
    assert [a.n_obs for a in done.values()] == [59, 60, 60]
    expected = genes.normalise(genes.drop_empty(slides["S_A1"]))
    assert (done["S_A1"].X != expected.X).nnz == 0


def test_prepare_loads_a_study_by_name(slides, monkeypatch):
    loaded = {}
    monkeypatch.setattr(
        "helpers.slides.load_study",
        lambda name, image: loaded.update(name=name, image=image) or slides,
    )
    assert list(genes.prepare("demo")) == list(slides)
    assert loaded == {"name": "demo", "image": False}


def test_every_spot_has_the_same_library_after_scaling(slides):
    sums = np.expm1(genes.normalise(slides["S_A1"], target_sum=500).X).sum(axis=1)
    np.testing.assert_allclose(sums, 500, rtol=1e-4)


def test_normalising_keeps_the_counts_and_the_slide(slides):
    before = slides["S_A1"].X.copy()
    result = genes.normalise(slides["S_A1"])
    assert (result.layers["counts"] != before).nnz == 0
    assert (before != slides["S_A1"].X).nnz == 0
    assert result.X.format == "csr"
    assert result.X.dtype == np.float32


@pytest.mark.parametrize("kind", [np.float64, np.int64])
def test_normalised_values_are_csr_float32_whatever_came_in(slides, kind):
    slides["S_A1"].X = slides["S_A1"].X.toarray().astype(kind)
    result = genes.normalise(slides["S_A1"])
    assert (result.X.format, result.X.dtype) == ("csr", np.float32)


def test_normalising_twice_is_refused(slides):
    with pytest.raises(DataError, match=r"S_A1.*normalised already"):
        genes.normalise(genes.normalise(slides["S_A1"]))


def test_normalising_uses_the_full_library_not_the_panel(slides):
    panel = genes.hvg(slides["S_A1"], 10)
    right = genes.select(genes.normalise(slides["S_A1"]), panel)
    wrong = genes.select(genes.normalise(slides["S_A1"][:, list(panel.genes)]), panel)
    assert (np.expm1(right).sum(axis=1) < 9_000).all()
    np.testing.assert_allclose(np.expm1(wrong).sum(axis=1), 10_000, rtol=1e-3)


def test_a_spot_without_counts_stays_at_zero(slides):
    adata = slides["S_A1"]
    adata.X = sparse.csr_matrix(adata.X.multiply(np.arange(adata.n_obs)[:, None] != 3))
    with pytest.warns(UserWarning, match="zero counts"):
        assert genes.normalise(adata).X[3].sum() == 0


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan, np.inf])
def test_values_that_are_no_counts_are_refused(slides, value):
    slides["S_A1"].X.data[7] = value
    with pytest.raises(DataError, match=r"S_A1.*not counts"):
        genes.normalise(slides["S_A1"])


def test_gene_symbols_that_come_twice_are_refused(slides):
    adata = slides["S_A1"]
    adata.var_names = ["G0", "G0", *adata.var_names[2:]]
    with pytest.raises(DataError, match=r"S_A1.*duplicate gene symbols: G0"):
        genes.hvg(adata, 5)


def test_a_slide_without_spots_is_refused(slides):
    with pytest.raises(DataError, match="0 spots"):
        genes.raw_counts(slides["S_A1"][:0])


# Selection against the published, dense way


def published_hvg(adata, n):
    adata = dense(adata)
    sc.pp.filter_cells(adata, min_genes=1)
    sc.experimental.pp.highly_variable_genes(adata, n_top_genes=n)
    return tuple(adata.var["highly_variable_rank"].dropna().sort_values().index)


def published_overlap(slides, n, batch_key=None):
    together = ad.concat([dense(a) for a in slides.values()], keys=list(slides), label="slide")
    sc.pp.filter_cells(together, min_genes=1)
    sc.pp.filter_genes(together, min_cells=1)
    sc.pp.normalize_total(together)
    sc.pp.log1p(together)
    sc.pp.highly_variable_genes(together, n_top_genes=n, batch_key=batch_key)
    return set(together.var_names[together.var["highly_variable"]])


def test_per_slide_hvg_are_those_of_the_published_way(slides):
    assert genes.hvg(slides["S_A1"], 30).genes == published_hvg(slides["S_A1"], 30)


def test_overlap_hvg_are_those_of_the_published_way(slides):
    assert set(genes.overlap_hvg(slides, 30).genes) == published_overlap(slides, 30)


def test_batch_aware_hvg_are_those_of_scanpy_on_dense_data(slides):
    assert set(genes.overlap_hvg_batch(slides, 30).genes) == published_overlap(slides, 30, "slide")


@pytest.mark.real
def test_real_per_slide_hvg_are_those_of_the_published_way(real_slides):
    adata = next(iter(real_slides.values()))
    assert set(genes.hvg(adata, 128).genes) == set(published_hvg(adata, 128))


@pytest.mark.real
@pytest.mark.parametrize(
    ("choose", "key"), [(genes.overlap_hvg, None), (genes.overlap_hvg_batch, "slide")]
)
def test_real_overlap_hvg_are_those_of_the_published_way(real_slides, choose, key):
    assert set(choose(real_slides, 100).genes) == published_overlap(real_slides, 100, key)


def test_hvg_finds_the_genes_that_follow_the_layers(slides):
    assert set(genes.hvg(slides["S_A1"], 10).genes) <= {f"G{j}" for j in range(20)}


def test_a_panel_is_the_same_before_and_after_normalising(slides):
    done = {name: genes.normalise(adata) for name, adata in slides.items()}
    assert genes.overlap_hvg(done, 20) == genes.overlap_hvg(slides, 20)
    assert genes.hvg(done["S_A1"], 20) == genes.hvg(slides["S_A1"], 20)


def test_choosing_leaves_the_slides_as_they_were(slides):
    before = {name: adata.X.copy() for name, adata in slides.items()}
    genes.overlap_hvg(slides, 20)
    genes.hvg(slides["S_A1"], 20)
    assert all((before[name] != adata.X).nnz == 0 for name, adata in slides.items())


def test_batch_aware_selection_is_not_drawn_by_differences_between_slides(slides):
    between = {f"G{j}" for j in range(20, 25)}
    pooled = between & set(genes.overlap_hvg(slides, 25).genes)
    within = between & set(genes.overlap_hvg_batch(slides, 25).genes)
    assert len(within) < len(pooled)


def test_shared_hvg_follow_the_layers_and_not_the_slide(slides):
    found = genes.shared_hvg(slides, 20)
    layers, slide = {f"G{j}" for j in range(20)}, {f"G{j}" for j in range(20, 25)}
    assert len(layers & set(found.genes)) >= 14  # 2 would be chance
    assert not slide & set(found.genes)


def test_shared_hvg_are_those_of_most_slides(slides):
    each = [set(genes.hvg(adata, 30).genes) for adata in slides.values()]
    times = [sum(gene in some for some in each) for gene in genes.shared_hvg(slides, 30).genes]
    assert times == sorted(times, reverse=True)
    assert set.intersection(*each) <= set(genes.shared_hvg(slides, 30).genes)


def test_shared_hvg_of_one_slide_are_its_own(slides):
    one = slides["S_A1"]
    assert genes.shared_hvg([one], 30).genes == genes.hvg(one, 30).genes


def test_overlap_takes_only_genes_that_every_slide_measured(slides):
    slides["S_B1"] = slides["S_B1"][:, 10:].copy()
    panel = genes.overlap_hvg(slides, 50)
    assert not {f"G{j}" for j in range(10)} & set(panel.genes)


def test_the_order_of_genes_in_a_slide_does_not_matter(slides):
    shuffled = dict(slides)
    order = np.random.default_rng(1).permutation(200)
    shuffled["S_A2"] = slides["S_A2"][:, order].copy()
    assert genes.overlap_hvg(shuffled, 30) == genes.overlap_hvg(slides, 30)


def test_slides_of_two_species_share_no_gene(slides):
    slides["S_B1"].var_names = slides["S_B1"].var_names.str.lower()
    with pytest.raises(DataError, match=r"S_B1.*shares no gene"):
        genes.overlap_hvg(slides, 10)


@pytest.mark.parametrize("n", [0, 10_000])
def test_too_many_or_no_genes_are_refused(slides, n):
    with pytest.raises(DataError, match=f"{n} genes asked for"):
        genes.overlap_hvg(slides, n)
    with pytest.raises(DataError, match=f"{n} genes asked for"):
        genes.hvg(slides["S_A1"], n)


def test_one_slide_is_no_overlap(slides):
    with pytest.raises(DataError, match="1 slides given, at least 2 needed"):
        genes.overlap_hvg([slides["S_A1"]], 10)


def test_slides_in_a_list_need_names_of_their_own(slides):
    with pytest.raises(DataError, match="the same name"):
        genes.overlap_hvg([slides["S_A1"], slides["S_A1"]], 10)


def test_a_list_is_as_good_as_a_dict(slides):
    assert genes.overlap_hvg(list(slides.values()), 10) == genes.overlap_hvg(slides, 10)


# A matrix travels with its names


def test_select_gives_spots_by_genes_in_the_order_of_the_panel(slides):
    panel = genes.Panel("p", ("G7", "G2"), "by hand", ())
    table = genes.select(slides["S_A1"], panel)
    assert list(table.columns) == ["G7", "G2"]
    assert table.index.equals(slides["S_A1"].obs_names)
    np.testing.assert_array_equal(table, slides["S_A1"][:, ["G7", "G2"]].X.toarray())


def test_missing_genes_are_named_with_the_slide(slides):
    panel = genes.Panel("p", ("G7", "TP53", "ERBB2"), "by hand", ())
    with pytest.raises(DataError, match=r"S_A1.*2 of 3 genes of panel 'p'.*TP53, ERBB2"):
        genes.select(slides["S_A1"], panel)


def test_selecting_from_a_slide_that_repeats_a_symbol_is_refused(slides):
    slides["S_A1"].var_names = ["G0", "G0", *slides["S_A1"].var_names[2:]]
    with pytest.raises(DataError, match=r"S_A1.*duplicate gene symbols: G0"):
        genes.select(slides["S_A1"], genes.Panel("p", ("G7",), "by hand", ()))
