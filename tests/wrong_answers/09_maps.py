far = spatial.distance.pdist(space)
flat = spatial.distance.pdist(maps["after", "held-out donor"])
labels = truth.to_numpy()
near = metrics.nearest_neighbours(space[known], K)
strange = (labels[near] != labels[:, None]).mean(axis=1)
share, count = strange.max(), int((strange == strange.max()).sum())

WRONG = {
    1: [
        (1.75, "that is the entropy"),
        (np.exp(1.75), "not of e"),
        (4, "so it is less"),
        (3, "two to the power"),
        (np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8]), "one number"),
    ],
    2: [
        (np.corrcoef(far, flat)[0, 1], "not Pearson's"),
        (stats.spearmanr(far, flat), "its statistic"),
        (1.5, "lies between"),
        (-stats.spearmanr(far, flat).statistic, "held-out donor"),
    ],
    3: [
        (share, "a tuple"),
        ((1 - strange.min(), int((strange == strange.min()).sum())), "OTHER labels"),
        ((share, count + 1), "is not how many"),
        ((share / 2, count), "without the spot"),
    ],
}
