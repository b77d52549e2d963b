"""How many answers are exactly right on held-out pictures, fonts and photographs, while training goes on."""
import numpy as np
import torch
import samples
import scenes as S
from cells import Marks, normalise
from prompts import IGNORE, collate


@torch.no_grad()
def exact(model, prompts, prefix, turns, images=1):
    """For each turn whether every token of its answer is the most likely one: greedy decoding would give it exactly."""
    rows = [prompts.independent([t], images) for t in turns]
    n = prefix.shape[0] if prefix is not None else 0
    ids, targets, at, mask = collate(rows, n)
    x = model.model.embed_tokens(ids)
    if prefix is not None:
        x = torch.cat([prefix.expand(len(rows), -1, -1), x], 1)
    said = model.lm_head(model.hidden(x, at, mask)).argmax(-1)
    return [bool(((said[i] == targets[i]) | (targets[i] == IGNORE)).all()) for i in range(len(rows))]


@torch.no_grad()
def evaluate(model, prompts, library, n=150, kind="single", seed=10 ** 6):
    """{category: (percent, answers)} over n pictures shown as one crop ("single"), as its global view alone ("global"), or
    enlarged to several crops ("detail")."""
    rng, marks = np.random.default_rng([S.HELD_OUT_SEED, seed]), Marks()
    model.eval()
    v, before = model.vision, model.model.embed_tokens(torch.tensor(prompts.before(0)))
    for _ in range(n):
        if kind == "detail":
            pixels, scene, frame, grid, smalls = samples.detail(rng, library)
            f = model.vision.tower(samples.from_255(pixels))
            tokens, turns = v.sequence(f[0], f[1:], *grid), samples.ask(rng, scene, frame, 4, smalls)
        else:
            picture, scene, frame, _ = samples.single(rng, library, augment=False)
            tokens = v.single(model.vision.tower(normalise(picture[None])))[0]
            tokens, turns = tokens[156:] if kind == "global" else tokens, samples.ask(rng, scene, frame, 4)
        if not turns:
            continue
        for t, right in zip(turns, exact(model, prompts, torch.cat([before, tokens]), turns)):
            marks.add({t.category: (right, 1)})
    model.train()
    return {k: (p, marks[k][1]) for k, p in sorted(marks.percent().items())}
