share = spots["label"][known].value_counts(normalize=True)
p = share.iloc[0]
place = ["x_um", "y_um"]


def near_anywhere(fold):
    train, test = spots.iloc[fold.train], spots.iloc[fold.test]
    return (cKDTree(train[place]).query(test[place])[0] <= BUFFER_UM).mean()


def near_on_the_slide(fold):
    train, test, count = spots.iloc[fold.train], spots.iloc[fold.test], 0
    for slide, asked in test.groupby("slide"):
        here = train[train["slide"] == slide]
        if len(here):
            count += (cKDTree(here[place]).query(asked[place])[0] <= BUFFER_UM).sum()
    return count / len(test)


WRONG = {
    1: [
        (p, "this is the accuracy"),
        (2 * p / (1 + p), "the F1 of one class"),
        (p / len(share), "divided by K"),
        (2 * share / (1 + share) / len(share), "one number"),
    ],
    2: [
        (
            splits.spatial_blocks(spots, N_BLOCKS, buffer_um=0, together=True, seed=SEED),
            "probing.predict",
        ),
        (said["neighbours"]["spatial blocks"], "with the strip"),
        (said["neighbours"]["random spots"], "blocks with N_BLOCKS"),
        (said["majority"]["spatial blocks"], "let the neighbours vote"),
    ],
    3: [
        (0.97, "a function"),
        (lambda fold: 0.0, "nearly all have a neighbour"),
        (near_on_the_slide, "all of these are shared"),
        (near_anywhere, "nothing is shared here"),
    ],
}
