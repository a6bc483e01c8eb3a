in_all = sorted(set.intersection(*(set(p.genes) for p in panels.values())))
by_name = [
    genes.select(a, genes.Panel("all", tuple(in_all), "", tuple(panels))) for a in done.values()
]
last_donor = list(donor.values())[-1]
without_last = {s: a for s, a in kept.items() if donor[s] != last_donor}
without_first = {s: a for s, a in kept.items() if donor[s] != next(iter(donor.values()))}

WRONG = {
    1: [
        (250, "not an index"),
        (0.5, "not by the size of one panel"),
        (0.25, "count once"),
        ([0.33, 0.34], "the mean of your 200 draws"),
    ],
    2: [
        (np.vstack(by_name), "has no names"),
        (pd.concat(by_name, ignore_index=True), "keep their spot names"),
        (by_name[0], "spots in all slides"),
        (pd.concat(by_name) * 2, "values differ"),
        (pd.concat(by_name).iloc[:, 1:], "in every panel"),
    ],
    3: [
        (shared["batch-aware"], "is held out"),
        (genes.overlap_hvg_batch(without_last, N_OVERLAP), "is held out"),
        (genes.overlap_hvg_batch(without_first, N_OVERLAP).genes, "keep all of it"),
        (genes.overlap_hvg_batch(without_first, N_OVERLAP // 2), "genes, not"),
        (genes.overlap_hvg(without_first, N_OVERLAP), "use overlap_hvg_batch"),
    ],
}
