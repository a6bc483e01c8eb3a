n = len(fold.test)
order = np.random.default_rng(SEED).permutation(n)
tables, untrained = {}, {}
for s in held_out:
    rows = (fold.test.spots["slide"] == s).to_numpy()
    untrained[s] = found(*(view[rows] for view in views["before"]))[10].mean()
    tables[s] = found(*(view[rows] for view in views["after"]))

WRONG = {
    1: [
        (1.0, "a tuple"),
        ((1.0, order), "the order first"),
        ((order[:-1], 1.0), "exactly once"),
        ((np.arange(n), 9.0), "the true partners"),
        ((order, -1.0), "both directions"),
    ],
    2: [
        (recalls["after"][10].mean(), "a dict"),
        ({"A": 2.0}, "the slides of donor"),
        ({s: table[1].mean() for s, table in tables.items()}, "k is 10, not 1"),
        (untrained, "the model before training"),
        ({s: table[10] for s, table in tables.items()}, "one number"),
    ],
    3: [
        (512 * 32 + 128 * 32, "one bias per output"),
        (512 * 32 + 128 * 32 + 32, "both layers have biases"),
        (512 * 128 + 128, "weights and biases of both"),
    ],
}
