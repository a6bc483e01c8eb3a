share = spots["label"].value_counts(normalize=True)
moved = toy * share_of
mean_of = np.array([0.5, 0.9, 1.0])
called_g = stats.norm.cdf((mean_of - 1) / 0.25)

WRONG = {
    1: [
        (share.mean(), "a tuple"),
        (((share**2).sum(), share.mean()), "the other way round"),
        ((share.mean(), share.mean()), "weigh by the shares"),
        ((share.max(), (share**2).sum()), "each label counts once"),
        ((share, share**2), "two numbers"),
    ],
    2: [
        ((0.023, 0.023, 0.023), "moves with the slide's mean"),
        (tuple(1 - called_g), "the share called W"),
        (tuple(stats.norm.sf(mean_of / 0.25)), "errors on Layer G"),
        ((0.023, 0.1, 0.5), "At the mean"),
        (0.345, "a tuple"),
    ],
    3: [
        (moved, "normalise"),
        (toy, "multiply each column"),
        (toy / share_of / (toy / share_of).sum(axis=1, keepdims=True), "don't divide"),
        (moved[0] / moved[0].sum(), "one row per spot"),
    ],
}
