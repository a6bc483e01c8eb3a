"""From raw counts to named gene panels.

A panel is a list of gene *names*, with the slides it was chosen on; a matrix of expression always
travels with its names, as a DataFrame. Counts are normalised on the full library, before any gene
is left out. Everything stays sparse until `select` has cut a slide down to one panel.

`prepare` does what most chapters begin with; `hvg` and its relatives choose a panel; `select` takes
its genes from a slide, by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from helpers.files import DataError, listed

if TYPE_CHECKING:
    from anndata import AnnData

    Slides = Mapping[str, AnnData] | Iterable[AnnData]

logger = logging.getLogger(__name__)

TARGET_SUM = 1e4  # counts per spot after scaling


# --------------------------------------------------------------------------- counts


def prepare(study: str | Mapping[str, AnnData]) -> dict[str, AnnData]:
    """Load a study, drop the spots with next to no counts, and normalise the others.

    Parameters
    ----------
    study
        A name that `helpers.slides.load_study` knows, or slides loaded already, by name.

    Returns
    -------
    dict
        By slide, in the study's order: what `drop_empty` and then `normalise` return. The images
        are not read; their paths and scales are known.
    """
    if isinstance(study, str):
        from helpers import slides

        study = slides.load_study(study, image=False)
    return {slide: normalise(drop_empty(adata)) for slide, adata in study.items()}


def qc(adata: AnnData) -> pd.DataFrame:
    """Quality measures per spot, as scanpy's ``calculate_qc_metrics`` defines them.

    Parameters
    ----------
    adata
        A slide with raw counts.

    Returns
    -------
    DataFrame
        Rows are spots: `total_counts` (library size), `n_genes_by_counts` (genes with a count) and
        `pct_counts_mt` (per cent of counts from mitochondrial genes, symbols ``MT-`` or ``mt-``;
        NaN when the slide has none of them).
    """
    import scanpy as sc
    from anndata import AnnData

    var = pd.DataFrame({"mt": adata.var_names.str.upper().str.startswith("MT-")}, adata.var_names)
    bare = AnnData(raw_counts(adata), obs=pd.DataFrame(index=adata.obs_names), var=var)
    spots, _ = sc.pp.calculate_qc_metrics(bare, qc_vars=["mt"], percent_top=None, log1p=False)
    if not var["mt"].any():
        spots["pct_counts_mt"] = np.nan
    return spots[["total_counts", "n_genes_by_counts", "pct_counts_mt"]]


def drop_empty(adata: AnnData, min_counts: int = 100) -> AnnData:
    """Drop spots with next to no counts.

    A spot beside the tissue, or one whose reaction failed, may hold a single molecule. Scaled to a
    full library, that molecule becomes thousands and outweighs every other spot.

    Parameters
    ----------
    adata
        A slide with raw counts.
    min_counts
        The smallest library to keep.

    Returns
    -------
    AnnData
        A copy of the spots kept.

    Raises
    ------
    DataError
        When no spot is left.
    """
    size = np.asarray(raw_counts(adata).sum(axis=1)).ravel()
    keep = size >= min_counts
    if not keep.any():
        what = f"no spot has {min_counts} counts; the fullest has {size.max():.0f}"
        raise DataError(what, slide=_name(adata), fix="lower min_counts")
    logger.info("slide %s: %d of %d spots left out", _name(adata), (~keep).sum(), len(keep))
    return adata[keep].copy()


def normalise(adata: AnnData, target_sum: float = TARGET_SUM) -> AnnData:
    """Scale every spot to the same library size and take log(1 + x).

    Done on all genes of the slide, before any are left out: the library size is a property of the
    spot, not of a panel.

    Parameters
    ----------
    adata
        A slide with raw counts in ``X``.
    target_sum
        Counts per spot after scaling. Fixed, so that slides share one scale.

    Returns
    -------
    AnnData
        A copy: ``X`` log-normalised (CSR float32), ``layers["counts"]`` the raw counts.

    Raises
    ------
    DataError
        When the slide is normalised already, or its ``X`` holds no counts.
    """
    import scanpy as sc

    if "counts" in adata.layers or "log1p" in adata.uns:
        fix = "normalise the slide as it was loaded"
        raise DataError("the slide is normalised already", slide=_name(adata), fix=fix)
    counts = raw_counts(adata)
    result = adata.copy()
    result.X, result.layers["counts"] = counts.astype(np.float32), counts.copy()
    sc.pp.normalize_total(result, target_sum=target_sum)
    sc.pp.log1p(result)
    return result


def raw_counts(adata: AnnData) -> sparse.csr_matrix:
    """Raw counts of a slide, normalised or not, as CSR (n_spots, n_genes); not a copy.

    Raises
    ------
    DataError
        When the slide is empty, its values are not counts, or a gene symbol is repeated.
    """
    slide = _name(adata)
    X = sparse.csr_matrix(adata.layers.get("counts", adata.X))
    if 0 in X.shape:
        what = f"the slide is empty: it has {X.shape[0]} spots and {X.shape[1]} genes"
        raise DataError(what, slide=slide, fix="check how it was loaded or subset")
    if not (np.isfinite(X.data) & (X.data >= 0) & (X.data == np.floor(X.data))).all():
        what = "X holds negative, fractional or infinite values or NaN, not counts"
        fix = "load the raw counts, or keep them in layers['counts'] as `normalise` does"
        raise DataError(what, slide=slide, fix=fix)
    _unique_symbols(adata)
    return X


# --------------------------------------------------------------------------- panels


@dataclass(frozen=True)
class Panel:
    """A named list of genes.

    Attributes
    ----------
    name
        Short name for tables and figures.
    genes
        Gene symbols, unique, the best first where the method ranks them.
    method
        How they were chosen, in words.
    slides
        The slides they were chosen on. Test the panel on other slides only.
    """

    name: str
    genes: tuple[str, ...]
    method: str
    slides: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.genes, str) or isinstance(self.slides, str):
            what = f"genes or slides of panel {self.name!r} are one string, not names"
            raise DataError(what, fix="give tuples of names")
        if not self.genes:
            raise DataError(f"panel {self.name!r} has no genes", fix="name at least one gene")
        genes = pd.Index(self.genes)
        if genes.has_duplicates:
            twice = listed(genes[genes.duplicated()].unique())
            what = f"panel {self.name!r} has duplicate genes: {twice}"
            raise DataError(what, fix="name each gene once")


def check_held_out(panel: Panel, slides: Iterable[str]) -> None:
    """Refuse a panel that was chosen with a slide that is held out for testing.

    Parameters
    ----------
    panel
        The panel.
    slides
        Held-out slides; with a held-out donor, all slides of that donor.

    Raises
    ------
    DataError
        When the panel has seen one of them, or `slides` is one string instead of a list.
    """
    if isinstance(slides, str):
        raise DataError(f"{slides!r} is one name, not a list of slides", fix=f"give [{slides!r}]")
    seen = sorted(set(panel.slides) & set(slides))
    if seen:
        raise DataError(
            f"panel {panel.name!r} was chosen with held-out slides: {listed(seen)}",
            fix="choose the panel on the training slides alone",
        )


def hvg(adata: AnnData, n: int = 128) -> Panel:
    """Highly variable genes of one slide: the paper's per-slide panel.

    Genes are ranked by the variance of their analytic Pearson residuals (Lause et al. 2021,
    doi:10.1186/s13059-021-02451-7), computed by scanpy on raw counts. Spots and genes without a
    count are left out first.

    Parameters
    ----------
    adata
        One slide.
    n
        Number of genes.

    Returns
    -------
    Panel
        Best gene first.
    """
    slide = _name(adata)
    found = shared_hvg({slide: adata}, n)
    return replace(found, name=f"hvg-{n} {slide}", method="Pearson residuals, one slide")


def overlap_hvg(adatas: Slides, n: int = 100) -> Panel:
    """Highly variable genes shared by several slides, the paper's way.

    Keep the genes that every slide measured, put all spots together, scale every spot to the same
    sum over these genes (the median over all spots), log1p, and take the `n` genes of highest
    normalised dispersion (flavour ``seurat``, Satija et al. 2015, doi:10.1038/nbt.3192).
    All spots are pooled, whichever slide they come from; compare `overlap_hvg_batch`.

    Parameters
    ----------
    adatas
        At least two slides with raw counts.
    n
        Number of genes.

    Returns
    -------
    Panel
        Highest normalised dispersion first.

    Raises
    ------
    DataError
        When the slides share no gene, or fewer than `n` genes with counts.
    """
    return _overlap(adatas, n, batch=False)


def overlap_hvg_batch(adatas: Slides, n: int = 100) -> Panel:
    """Highly variable genes shared by several slides, chosen within each slide.

    As `overlap_hvg`, but dispersions are computed slide by slide, and genes are ranked by the
    number of slides in which they are among the `n` best, then by their mean dispersion
    (scanpy's ``batch_key``). Differences between slides no longer count as variation, so its genes
    differ from those of the paper's way.
    """
    return _overlap(adatas, n, batch=True)


def shared_hvg(adatas: Slides, n: int = 256) -> Panel:
    """Highly variable genes shared by several slides, by Pearson residuals within each slide.

    The genes that every slide measured are ranked slide by slide as `hvg` ranks them. The `n` that
    are among the best in most slides are taken, those with the best median rank first where that
    number is equal (scanpy's ``batch_key``). With one slide it is `hvg`.

    Parameters
    ----------
    adatas
        Slides with raw counts, one or more.
    n
        Number of genes.

    Returns
    -------
    Panel
        Best gene first.

    Raises
    ------
    DataError
        When slides share no gene, or fewer than `n` genes with counts.
    """
    import scanpy as sc

    slides = _named(adatas, least=1)
    pooled = _pooled(slides, n)
    table = sc.experimental.pp.highly_variable_genes(
        pooled, n_top_genes=n, batch_key="slide", inplace=False
    )
    table = table[table["highly_variable"]].sort_values(
        ["highly_variable_nbatches", "highly_variable_rank"], ascending=[False, True], kind="stable"
    )
    method = "Pearson residuals within slides"
    return Panel(f"shared-hvg-{n}", tuple(table.index), method, _seen(slides))


def _overlap(adatas: Slides, n: int, batch: bool) -> Panel:
    import scanpy as sc

    slides = _named(adatas)
    pooled = _pooled(slides, n)
    sc.pp.normalize_total(pooled)
    sc.pp.log1p(pooled)
    table = sc.pp.highly_variable_genes(
        pooled, n_top_genes=n, batch_key="slide" if batch else None, inplace=False
    )
    rank = ["highly_variable_nbatches"] * batch + ["dispersions_norm"]
    table = table[table["highly_variable"]].sort_values(rank, ascending=False, kind="stable")
    # A tie at the last place lets scanpy return more than n; the first n are kept.
    chosen, seen = tuple(table.index[:n]), _seen(slides)
    if batch:
        return Panel(f"overlap-hvg-batch-{n}", chosen, "dispersion within slides", seen)
    return Panel(f"overlap-hvg-{n}", chosen, "dispersion over all spots pooled", seen)


def _pooled(slides: Mapping[str, AnnData], n: int) -> AnnData:
    """Raw counts of all spots and shared genes that have any; refuse fewer than `n` genes."""
    from anndata import AnnData

    genes = shared_genes(slides)
    X = sparse.vstack(
        [raw_counts(a)[:, a.var_names.get_indexer(genes)] for a in slides.values()], "csr"
    )
    rows = np.flatnonzero(np.asarray(X.sum(axis=1)).ravel())
    columns = np.flatnonzero(np.asarray(X.sum(axis=0)).ravel())
    if not 0 < n <= len(columns):
        what = f"{n} genes asked for, {len(columns)} with counts on slides: {listed(slides)}"
        raise DataError(what, fix=f"ask for 1 to {len(columns)} genes")
    origin = np.repeat(list(slides), [a.n_obs for a in slides.values()])[rows]
    obs = pd.DataFrame({"slide": pd.Categorical(origin)}, rows.astype(str))
    return AnnData(X[rows][:, columns], obs=obs, var=pd.DataFrame(index=genes[columns]))


def shared_genes(adatas: Slides) -> pd.Index:
    """Genes that all slides measured, in the order of the first slide.

    Raises
    ------
    DataError
        When there is none.
    """
    slides = _named(adatas, least=1)
    first, *others = slides.values()
    genes = first.var_names
    for other in others:
        genes = genes[genes.isin(other.var_names)]
        if not len(genes):
            what = f"it shares no gene with the slides before it ({listed(slides)})"
            fix = "compare slides of one species, with genes named the same way"
            raise DataError(what, slide=_name(other), fix=fix)
    return genes


def select(adata: AnnData, panel: Panel) -> pd.DataFrame:
    """Expression of a panel: rows are spots, columns are genes in the panel's order, by name.

    Parameters
    ----------
    adata
        One slide, as a rule from `normalise`.
    panel
        The genes.

    Returns
    -------
    DataFrame
        ``X`` of these genes, dense float32, index spot ids, columns gene symbols.

    Raises
    ------
    DataError
        When the slide lacks genes of the panel (zeros would say "not expressed" where the truth is
        "not measured"), or repeats a gene symbol.
    """
    _unique_symbols(adata)
    column = adata.var_names.get_indexer(panel.genes)
    missing = [gene for gene, at in zip(panel.genes, column, strict=True) if at < 0]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(panel.genes)} genes of panel {panel.name!r} were not measured:"
            f" {listed(missing)}",
            slide=_name(adata),
            fix="choose the panel among genes that all slides share",
        )
    values = sparse.csr_matrix(adata.X)[:, column].toarray().astype(np.float32, copy=False)
    return pd.DataFrame(values, index=adata.obs_names, columns=list(panel.genes))


def _name(adata: AnnData) -> str:
    """Slide name of an AnnData, from its spots."""
    names = adata.obs["slide"].unique() if "slide" in adata.obs else []
    return str(names[0]) if len(names) == 1 else "unnamed"


def _seen(slides: Mapping[str, AnnData]) -> tuple[str, ...]:
    """Name the slides in ``obs["slide"]``, or the key where that column is missing."""
    names = [a.obs["slide"].unique() if "slide" in a.obs else [key] for key, a in slides.items()]
    return tuple(dict.fromkeys(str(name) for some in names for name in some))


def _unique_symbols(adata: AnnData) -> None:
    if not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()].unique()
        what = f"duplicate gene symbols: {listed(twice)}"
        raise DataError(what, slide=_name(adata), fix="add up the columns of one symbol")


def _named(adatas: Slides, least: int = 2) -> dict[str, AnnData]:
    """Slides by name, not fewer than `least`."""
    if isinstance(adatas, Mapping):
        slides = dict(adatas)
    else:
        given = list(adatas)
        slides = {_name(adata): adata for adata in given}
        if len(slides) < len(given) or "unnamed" in slides:
            fix = "fill obs['slide'], or pass a dict of slides by name"
            raise DataError("two slides have the same name, or one has none", fix=fix)
    if len(slides) < least:
        what = f"{len(slides)} slides given, at least {least} needed"
        raise DataError(what, fix="give all slides to be compared")
    return slides
