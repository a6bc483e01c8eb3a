last = list(study_slides.values())[-1]
WRONG = {
    1: [
        (adata.obsm["spatial"] * slides.um_per_px(adata), "not its result"),
        (lambda one: one.obsm["spatial"], "still pixels"),
        (lambda one: one.obsm["spatial"] / slides.um_per_px(one), "do not divide"),
        (lambda one: one.obsm["spatial"][:, ::-1] * slides.um_per_px(one), "x comes first"),
        (lambda one: one.obsm["spatial"] * slides.um_per_px(adata), "scale of the slide given"),
    ],
    2: [
        (np.median(np.diff(adata.X.indptr)), "the first slide"),
        (np.median(np.asarray(last.X.sum(axis=1))), "genes with a count"),
        (np.median(np.diff(last.X.indptr)) / last.n_vars, "not a share"),
        (np.diff(last.X.indptr), "the median over spots"),
        (np.diff(last.X.indptr).max(), "is not the median"),
    ],
    3: [
        ("JPEG", "should be a function"),
        (lambda path: path.suffix.removeprefix(".").upper(), "its bytes say"),
        (lambda path: path.open("rb").read(4), "its bytes say"),
        (lambda path: images.info(path).format.lower(), "you say"),
    ],
}
