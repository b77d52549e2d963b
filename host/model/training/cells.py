"""What lies in each cell of 28 x 28 px, as the tower and its teacher are taught it: the questions and their losses, the
stream of labelled pictures, the figures, and the one loop that both trainings share."""
import argparse, json, os, time
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import pictures as P
import scenes as S
from optimise import agreed, join

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


class Marks(dict):
    """For each question (right, asked)."""

    def add(self, found):
        for key, (right, asked) in found.items():
            r, n = self.get(key, (0, 0))
            self[key] = r + right, n + asked

    def percent(self):
        return {key: round(100 * r / max(n, 1), 1) for key, (r, n) in self.items()}


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


@torch.no_grad()
def evaluate(net, heads, library, side, seed=10 ** 6, batches=8):
    """Percent of cells named rightly on held-out pictures."""
    rng, marks = np.random.default_rng([S.HELD_OUT_SEED, seed]), Marks()
    net.eval()
    for _ in range(batches):
        pictures, windows, taught, box = make_batch(rng, library, side, 16)
        marks.add(loss_and_marks(heads(net(normalise(pictures), windows)), taught, box)[1])
    net.train()
    return marks.percent()


def arguments(**defaults):
    """The options that both trainings have."""
    p = argparse.ArgumentParser()
    p.add_argument("work"), p.add_argument("name")
    p.add_argument("--minutes", type=float, default=60, help="of training in all, the resumed ones counted in")
    p.add_argument("--side", type=int, default=168, help="px of a window: 168 or 336")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--text", type=float, default=.26, help="share of the places in a picture that hold writing")
    p.add_argument("--start", help="checkpoint to begin from")
    p.add_argument("--decay", action="store_true", help="fall to nothing over these minutes")
    p.set_defaults(**defaults)
    return p


class Run:
    """A training that resumes WORK_DIR/NAME.pt, keeps a checkpoint every minute and writes figures every 100 steps to
    NAME.log. `parts`: what the checkpoint holds beside the optimiser, the first of them the net, "heads" among them."""

    def __init__(self, a, parts, optimiser):
        self.a, self.parts, self.optimiser = a, parts, optimiser
        self.rank, self.world = join(a)
        self.path, self.state = f"{a.work}/{a.name}.pt", dict(step=0, seen=0, seconds=0.)
        self.log = open(f"{a.work}/{a.name}.log" if self.rank == 0 else os.devnull, "a")
        resumed = os.path.exists(self.path)
        if not resumed and not a.start:
            return
        saved = torch.load(self.path if resumed else a.start)
        for key, part in parts.items():
            if key in saved:
                part.load_state_dict(saved[key])
        if resumed:
            self.state = saved["state"]
            self.optimiser.load_state_dict(saved["optimiser"])

    def save(self, seconds):
        content = {key: part.state_dict() for key, part in self.parts.items()}
        content |= dict(optimiser=self.optimiser.state_dict(), state=dict(self.state, seconds=seconds))
        torch.save(content, self.path + ".tmp")
        os.replace(self.path + ".tmp", self.path)

    def tell(self, **line):
        print(json.dumps(line), file=self.log, flush=True)

    def train(self, lose):
        """lose(pixels, windows, taught, box) -> (loss, marks)"""
        a, state, test = self.a, self.state, S.Library(self.a.work, held_out=True)
        net, heads = next(iter(self.parts.values())), self.parts["heads"]
        stream = Stream(a.work, a.side, a.batch // self.world, a.seed * 10 ** 6 + state["step"] * 10 + self.rank, a.text)
        loader = iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=6))
        next(loader)                               # the clock starts when pictures come
        saved_at, marks, losses = time.time(), Marks(), []
        begin = saved_at - state["seconds"]
        while (now := agreed(time.time() - begin)) < a.minutes * 60:
            pictures, windows, taught, box = next(loader)
            loss, found = lose(normalise(pictures), windows, taught, box)
            loss.backward()
            self.optimiser.step(min(1., (state["step"] + 1) / 60) * (max(.02, 1 - now / (a.minutes * 60)) if a.decay else 1.))
            state["step"] += 1
            state["seen"] += len(pictures) * self.world
            marks.add(found), losses.append(loss.item())
            if state["step"] % 100 == 0:
                held_out = dict(held_out=evaluate(net, heads, test, a.side)) if state["step"] % 500 == 0 and self.rank == 0 else {}
                self.tell(step=state["step"], seen=state["seen"], minutes=round(now / 60, 1), loss=round(float(np.mean(losses)), 4), train=marks.percent(), **held_out)
                marks, losses = Marks(), []
            if time.time() - saved_at > 60 and self.rank == 0:
                self.save(now)
                saved_at = time.time()
        if self.rank == 0:
            self.save(time.time() - begin)
            self.tell(done=True, held_out=evaluate(net, heads, test, a.side, batches=20))
