constants = towers.card("clip")
pixels = resized(towers.as_pixels(test.tiles[:1]), constants.size_px)
mean, std = (torch.tensor(v).view(3, 1, 1) for v in (constants.mean, constants.std))
rows = torch.stack([read([t.format(label) for label in labels]) for t in templates])

WRONG = {
    1: [
        (pixels, "not normalised yet"),
        (pixels - mean, "divide by the standard deviation"),
        ((255 * pixels - mean) / std, "bring them to 0 to 1"),
        (((pixels - mean) / std)[0], "shape (1, 3, 224, 224)"),
        (((pixels - mean) / std).numpy(), "a torch tensor"),
    ],
    2: [
        (rows.mean(dim=0), "rescale it"),
        (rows, "average first"),
        (read(labels), "not all of them"),
        (ask(templates).flip(0), "in the order of `labels`"),
    ],
    3: [
        ({n: (v * reference).sum(dim=1).min().item() for n, v in loaded.items()}, "are cosines"),
        ({n: (v - reference).abs().mean().item() for n, v in loaded.items()}, "the mean hides"),
        ({n: (v - reference).min().item() for n, v in loaded.items()}, "take absolute values"),
        ({n: (v - reference).abs() for n, v in loaded.items()}, "one number"),
        ({"Ada": 0.1}, "each of the three names"),
    ],
}
