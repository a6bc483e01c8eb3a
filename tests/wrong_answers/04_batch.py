share = spots["donor"].value_counts(normalize=True)
centred = source - source.mean(axis=0)

WRONG = {
    1: [
        (len(share), "less than the number of donors"),
        ((share**2).sum(), "turn it over"),
        (1 / share.max(), "square each share"),
        (1 / share, "not a table"),
    ],
    2: [
        (before, "the uncorrected space"),
        (combat(part, pretend(0.9), half=upper.astype(float)), "one row per spot"),
        (components(combat(part, pretend(0.9))), "was not told"),
    ],
    3: [
        (centred + goal.mean(axis=0), "standard deviation is off"),
        ((source - source.mean()) / source.std() * goal.std() + goal.mean(), "channel by channel"),
        (centred / source.std(axis=0), "mean is off"),
        (source.mean(axis=0), "the pixels of source"),
    ],
}
