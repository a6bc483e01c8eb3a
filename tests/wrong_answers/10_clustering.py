alone, single = agree(np.arange(len(label))), agree(np.zeros(len(label), int))
nmi, by_chance = agree(found["after"])["nmi"], shuffled(found["after"])["nmi"]

WRONG = {
    1: [
        (alone["ari"], "a tuple"),
        ((alone["nmi"], alone["ari"]), "the other way round"),
        ((single["ari"], single["nmi"]), "each spot its own"),
        ((0.5, 0.5), "a number per spot, all different"),
    ],
    2: [
        (nmi, "take the chance level out"),
        (nmi - by_chance, "divide by what is left"),
        ((nmi - by_chance) / nmi, "(nmi - chance) / (1 - chance)"),
        ((nmi, by_chance), "a single number"),
    ],
    3: [
        (6, "a tuple"),
        ((5, 8), "all better"),
        ((6, 9), "fewer do"),
        ((8, 6), "fewer do"),
        ((np.log2(2 / 0.05), np.log2(2 / 0.01)), "whole numbers"),
    ],
}
