def unclipped(x, y, side, width, height):
    along_x = min(x + side / 2, width) - max(x - side / 2, 0)
    along_y = min(y + side / 2, height) - max(y - side / 2, 0)
    return along_x * along_y / side**2


def ranked(index):
    return index.groupby("slide")["focus"].rank(pct=True)


WRONG = {
    1: [
        (0.5, "should be a function"),
        (lambda side, pitch: 1 - pitch / side, "not less than nothing"),
        (lambda side, pitch: max(0, 1 - pitch / side) ** 2, "do not square"),
        (lambda side, pitch: 0 if pitch > side else pitch / side, "NOT shared"),
        (lambda side, pitch: max(0, 1 - pitch / side) / (1 + pitch / side), "half of the tile"),
    ],
    2: [
        (lambda *place: unclipped(*place) * place[2] ** 2, "has share 1"),
        (lambda x, y, side, width, height: 1.0, "half is inside"),
        (lambda x, y, side, width, height: unclipped(x, y, side, height, width), "200 px wide"),
        (unclipped, "nothing is inside"),
    ],
    3: [
        (lambda index: index["focus"] > index["focus"].quantile(0.1), "rank within each slide"),
        (lambda index: ranked(index) <= 0.1, "True means keep"),
        (lambda index: ranked(index) < 0.9, "keep the sharper ones"),
        (lambda index: index[ranked(index) > 0.1], "for each row"),
        (ranked, "True or False, nothing else"),
    ],
}
