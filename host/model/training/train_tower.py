"""Teaches the vision tower what lies in each cell of 28 x 28 px, before any language: object, colour, character and its
place, centres and boxes. Most pictures are windows of 168 px at a random place of the position grid, five times cheaper
than the whole 336 px.

usage: train_tower.py WORK_DIR NAME [--minutes M] [--side 168|336] [--batch N] [--threads N] [--seed N] ...
Resumes WORK_DIR/NAME.pt where it exists; a checkpoint every minute, a line of figures every 100 steps in NAME.log."""
import argparse, json, os, sys, time
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import pictures as P
import scenes as S
from model import VisionTower, local_init, whitening_init
from optimise import Both, agreed, join

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
SIZES = dict(object=len(S.CLASSES), colour=len(S.COLOUR_NAMES), character=len(S.CHARS) + 1, place=S.CHAR_PLACES, centre=2, box=4)


class Heads(nn.Module):
    """What a merged cell (4 d numbers) is asked; dropped after training."""

    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(4 * d, elementwise_affine=False)
        self.out = nn.Linear(4 * d, sum(SIZES.values()))
        nn.init.normal_(self.out.weight, std=.02)

    def forward(self, features):
        return dict(zip(SIZES, self.out(self.norm(features)).split(list(SIZES.values()), -1)))


class Guide(nn.Module):
    """How far the tower is from the teacher: its normalised features patch by patch, and its answers cell by cell."""

    def __init__(self, work, name, d):
        super().__init__()
        from teacher import WIDTH, Teacher, TeacherHeads
        saved = torch.load(f"{work}/{name}.pt")
        net, heads = Teacher(), TeacherHeads()
        net.load_state_dict(saved["net"]), heads.load_state_dict(saved["heads"])
        self.teacher = [net.eval().to(memory_format=torch.channels_last), heads.eval()]     # in a list: not a part of us
        self.norm, self.hint = nn.LayerNorm(d, elementwise_affine=False), nn.Linear(d, WIDTH)
        self.early, self.middle = nn.Linear(d, 768), nn.Linear(d, 384)
        self.depths = 1, 3                         # layers that are taught the teacher's earlier stages

    def forward(self, pixels, features, said, kept):
        net, heads = self.teacher
        with torch.no_grad():
            early, middle, last = net.stages(pixels)
            b, c, gh, gw = last.shape
            known = last.permute(0, 2, 3, 1).reshape(b, gh // 2, 2, gw // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, gh // 2, gw // 2, 4 * c)
            answers = heads(known)
            b, h, w, c = known.shape
            goal = F.layer_norm(known.view(b, h, w, 4, c // 4), (c // 4,))
        near = self.hint(self.norm(features.view(b, h, w, 4, -1)))
        loss = F.mse_loss(near, goal)
        for layer, goal, depth in ((self.early, early, self.depths[0]), (self.middle, middle, self.depths[1])):
            goal = F.batch_norm(goal.flatten(0, 1), None, None, training=True)
            loss = loss + F.mse_loss(layer(self.norm(kept[depth])).flatten(0, 1), goal)
        for key, size in SIZES.items():
            if key != "box":
                soft = F.softmax(answers[key], -1)
                each = F.kl_div(F.log_softmax(said[key], -1), soft, reduction="none").sum(-1)
                if key in ("object", "character"):
                    each = each * (.5 + 1.5 * (1 - soft[..., 0]))     # where the teacher sees something
                    loss = loss + each.mean()
                else:
                    loss = loss + .15 * each.mean()
        return loss


def normalise(pictures):
    """(batch, h, w, 3) u8 -> (batch, 3, h, w) f32 as the server normalises them."""
    return (pictures.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, work, side, batch, seed, text=.26):
        self.work, self.side, self.batch, self.seed, self.text = work, side, batch, seed, text

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, info.id if info else 0])
        library = S.Library(self.work)
        while True:
            yield make_batch(rng, library, self.side, self.batch, self.text)


def make_batch(rng, library, side, batch, text=.26):
    whole = lambda: side == 336 and rng.random() < .5              # at full size, half are as people send them
    made = [P.picture(rng, library)[0] if whole() else S.collage(rng, library, side, text) for _ in range(batch)]
    taught = [S.labels(s) for s in made]
    span = (336 - side) // S.CELL + 1
    windows = rng.integers(0, span, (batch, 2)) * 2
    return torch.from_numpy(np.stack([s.picture for s in made])), torch.from_numpy(windows), *cell_targets(taught, windows)


def cell_targets(taught, windows):
    """Stacks what `scenes.labels` says of each picture; boxes as the centre on the whole picture and log sides."""
    stacks = [torch.from_numpy(np.stack(x)) for x in zip(*taught)]
    x, y, w, h = stacks[5].unbind(-1)
    box = torch.stack([(x + w / 2 + torch.from_numpy(windows)[:, 1, None, None] * 14) / 168 - 1,
                       (y + h / 2 + torch.from_numpy(windows)[:, 0, None, None] * 14) / 168 - 1,
                       torch.log(w / 60), torch.log(h / 60)], -1)
    return stacks[:5], box.float()


def loss_and_marks(said, taught, box):
    """The summed loss, and for each question (right, asked) over the cells where it is not trivial."""
    names, ink, character, place, centre = taught
    weights = {"object": torch.where(names > 0, 1., .15), "colour": torch.where(names > 0, .6, .06),
               "character": torch.where(character > 0, 2.5, .05), "place": torch.full(place.shape, .4), "centre": torch.where(centre > 0, .6, .06)}
    total, marks = 0., {}
    for (key, weight), target in zip(weights.items(), (names, ink, character, place, centre)):
        weight = weight * (target >= 0)
        each = F.cross_entropy(said[key].flatten(0, 2), target.flatten(), ignore_index=-1, reduction="none", label_smoothing=.02)
        total = total + (each * weight.flatten()).sum() / names.numel()
        asked = target > 0 if key in ("object", "character", "centre") else (target >= 0) & (names > 0) if key == "colour" else target >= 0
        marks[key] = ((said[key].argmax(-1) == target) & asked).sum().item(), asked.sum().item()
        if key == "object":
            emoji = names >= S.FIRST_CONCEPT
            cloth = (names >= S.FIRST_CLOTHING) & ~emoji
            hit = said[key].argmax(-1) == names
            marks["emoji"] = (hit & emoji).sum().item(), emoji.sum().item()
            marks["cloth"] = (hit & cloth).sum().item(), cloth.sum().item()
    held = ~box.isnan().any(-1)
    if held.any():
        total = total + .3 * F.smooth_l1_loss(said["box"][held], box[held], beta=.1, reduction="sum") / names.numel()
    return total, marks


def evaluate(tower, heads, library, side, seed=10 ** 6, batches=8):
    rng, sums = np.random.default_rng(seed), {}
    tower.eval()
    with torch.no_grad():
        for _ in range(batches):
            pictures, windows, taught, box = make_batch(rng, library, side, 16)
            _, marks = loss_and_marks(heads(tower(normalise(pictures), windows)), taught, box)
            for k, (r, n) in marks.items():
                a = sums.setdefault(k, [0, 0])
                a[0] += r
                a[1] += n
    tower.train()
    return {k: round(100 * r / max(n, 1), 1) for k, (r, n) in sums.items()}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("work"), p.add_argument("name")
    p.add_argument("--minutes", type=float, default=60, help="of training in all, the resumed ones counted in")
    p.add_argument("--side", type=int, default=168)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--heads", type=int, default=6)
    p.add_argument("--muon", type=float, default=.02)
    p.add_argument("--adam", type=float, default=1e-3)
    p.add_argument("--init", default="local")
    p.add_argument("--text", type=float, default=.26, help="share of the places in a picture that hold writing")
    p.add_argument("--start", help="checkpoint to begin from")
    p.add_argument("--decay", action="store_true", help="fall to nothing over these minutes")
    p.add_argument("--teacher", help="checkpoint of teacher.py whose features and answers are taught too")
    a = p.parse_args()
    rank, world = join()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    torch.set_flush_denormal(True)
    path, log = f"{a.work}/{a.name}.pt", open(f"{a.work}/{a.name}.log" if rank == 0 else os.devnull, "a")
    tower = VisionTower(heads=a.heads)
    if a.init == "local":
        local_init(tower, np.random.default_rng(a.seed))
        examples = make_batch(np.random.default_rng(a.seed), S.Library(a.work), 168, 300)[0]
        whitening_init(tower, normalise(examples))
    heads = Heads(tower.d)
    guide = Guide(a.work, a.teacher, tower.d) if a.teacher else None
    run = [p for n, p in tower.named_parameters() if not n.startswith(("post_layernorm", f"encoder.layers.{len(tower.encoder.layers) - 1}."))]
    matrices = [p for n, p in tower.named_parameters() if p.dim() == 2 and n.startswith("encoder.layers") and any(p is q for q in run)]
    others = [p for p in run if not any(p is m for m in matrices)] + list(heads.parameters())
    others += list(guide.parameters()) if guide else []
    optimiser = Both(matrices, others, a.muon, a.adam)
    state = dict(step=0, seen=0, seconds=0.)
    source = path if os.path.exists(path) else a.start
    if source:
        saved = torch.load(source)
        tower.load_state_dict(saved["tower"]), heads.load_state_dict(saved["heads"])
        if guide and "guide" in saved:
            guide.load_state_dict(saved["guide"])
        if source == path:
            state = saved["state"]
            if (guide is None) == ("guide" not in saved):
                optimiser.load_state_dict(saved["optimiser"])
    loader = iter(torch.utils.data.DataLoader(Stream(a.work, a.side, a.batch // world, a.seed * 10 ** 6 + state["step"] * 10 + rank, a.text), batch_size=None,
                                              num_workers=1, prefetch_factor=6))
    test = S.Library(a.work, held_out=True)
    for _ in range(2):
        next(loader)
    begin, saved_at, sums, losses, hints = time.time() - state["seconds"], time.time(), {}, [], []
    while (now := agreed(time.time() - begin)) < a.minutes * 60:
        pictures, windows, taught, box = next(loader)
        pixels = normalise(pictures)
        kept = dict.fromkeys(guide.depths) if guide else None
        features = tower(pixels, windows, kept)
        said = heads(features)
        loss, marks = loss_and_marks(said, taught, box)
        if guide:
            near = guide(pixels, features, said, kept)
            hints.append(near.item())
            loss = loss + near
        loss.backward()
        rate = min(1., (state["step"] + 1) / 60)
        if a.decay:
            rate *= max(.02, 1 - now / (a.minutes * 60))
        optimiser.step(rate)
        state["step"] += 1
        state["seen"] += len(pictures) * world
        losses.append(loss.item())
        for k, (r, n) in marks.items():
            s = sums.setdefault(k, [0, 0])
            s[0] += r
            s[1] += n
        if state["step"] % 100 == 0:
            line = dict(step=state["step"], seen=state["seen"], minutes=round(now / 60, 1), loss=round(float(np.mean(losses)), 4),
                        train={k: round(100 * r / max(n, 1), 1) for k, (r, n) in sums.items()}, rate=round(rate, 3))
            if hints:
                line["hint"], hints = round(float(np.mean(hints)), 4), []
            if state["step"] % 500 == 0 and rank == 0:
                line["held_out"] = evaluate(tower, heads, test, a.side)
            print(json.dumps(line), file=log, flush=True)
            sums, losses = {}, []
        if time.time() - saved_at > 60 and rank == 0:
            save(path, tower, heads, guide, optimiser, state, now)
            saved_at = time.time()
    if rank:
        return
    save(path, tower, heads, guide, optimiser, state, time.time() - begin)
    print(json.dumps(dict(done=True, held_out=evaluate(tower, heads, test, a.side, batches=20))), file=log, flush=True)


def save(path, tower, heads, guide, optimiser, state, seconds):
    kept = dict(state, seconds=seconds)
    content = dict(tower=tower.state_dict(), heads=heads.state_dict(), optimiser=optimiser.state_dict(), state=kept)
    if guide:
        content["guide"] = guide.state_dict()
    torch.save(content, path + ".tmp")
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    main()
