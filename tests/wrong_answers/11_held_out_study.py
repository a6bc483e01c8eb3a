share = spots["label"].value_counts(normalize=True)
moved = toy * share_of

WRONG = {
    1: [
        (share.mean(), "a tuple"),
        (((share**2).sum(), share.mean()), "the other way round"),
        ((share.mean(), share.mean()), "weigh by the shares"),
        ((share.max(), (share**2).sum()), "each label counts once"),
        ((share, share**2), "two numbers"),
    ],
    2: [
        (255 * (thin / 255) ** 2, "uint8, as tiles are"),
        (thin // 2, "glass would turn grey"),
        (thin * np.uint8(2), "double the density"),
        (thin[0], "shape"),
    ],
    3: [
        (moved, "normalise"),
        (toy, "multiply each column"),
        (toy / share_of / (toy / share_of).sum(axis=1, keepdims=True), "don't divide"),
        (moved[0] / moved[0].sum(), "one row per spot"),
    ],
}
