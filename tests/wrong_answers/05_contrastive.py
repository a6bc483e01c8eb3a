def masked(image, text, temperature, group, fill=float("-inf"), diagonal=False):
    logits = image @ text.T / temperature
    false = group[:, None] == group[None, :]
    if not diagonal:
        false = false & ~torch.eye(len(group), dtype=torch.bool)
    logits = logits.masked_fill(false, fill)
    right = logits.diagonal()
    return -((right - logits.logsumexp(1)).mean() + (right - logits.logsumexp(0)).mean()) / 2


tokens = towers.load_clip("mini")[1]([SENTENCE]).to(clip.log_scale.device)
with torch.no_grad():
    near = image @ clip.embed_other(tokens)[0].cpu().numpy()

WRONG = {
    1: [
        (np.exp(-5), "this is the share"),
        (np.log(256) / 5, "compare the shares"),
        (np.log(256) - 5, "take its exponential"),
        ([1.72], "one number"),
    ],
    2: [
        (1.2, "the function itself"),
        (lambda *pairs: info_nce(*pairs[:3]), "nobody to compete with"),
        (lambda *pairs: masked(*pairs, fill=0.0), "nobody to compete with"),
        (lambda *pairs: masked(*pairs, diagonal=True), "is the diagonal still in"),
        (lambda *pairs: masked(*pairs).item(), "a tensor"),
    ],
    3: [
        (np.argsort(near)[:5], "sort from high to low"),
        (np.argsort(-near)[:10], "five row numbers"),
        (np.argsort(-near)[5:10], "not the nearest five"),
        (np.sort(-near)[:5], "whole numbers"),
    ],
}
