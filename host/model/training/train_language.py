"""Teaches the decoder to answer questions about pictures, on the features of the trained tower; with --joint the tower goes
on learning with it.

usage: train_language.py WORK_DIR NAME --tower NAME [--minutes M] [--joint] [--mix global=..,single=..,detail=..,pair=..,talk=..]
Resumes WORK_DIR/NAME.pt. Every picture goes through the tower once and is asked about several times from a pool."""
import argparse, json, os, time
from contextlib import nullcontext
import cv2
import numpy as np
import torch
import torch.nn.functional as F
import looks
import pictures as P
import questions as Q
import scenes as S
from cells import MEAN, STD, Heads, Marks, cell_targets, loss_and_marks, normalise
from config import CONFIG
from model import Phi3V, matching_init
from optimise import agreed, join, muon_and_adam
from prompts import IGNORE, Prompts, collate
from quantise import Straight
from words import Words

TURNS = 9


class Pictures(torch.utils.data.IterableDataset):
    """Batches of scenes, drawn in a process of its own: ("single", ...) or ("detail", ...)."""

    def __init__(self, work, seed, detail_share, batch=8, labelled=False):
        self.work, self.seed, self.detail_share, self.batch, self.labelled = work, seed, detail_share, batch, labelled

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, info.id if info else 0])
        library = S.Library(self.work)
        while True:
            if rng.random() < self.detail_share:
                yield "detail", [detail_sample(rng, library) for _ in range(2)]
            else:
                yield "single", [single_sample(rng, library, labelled=self.labelled) for _ in range(self.batch)]


def as_drawn(batch):
    """Labels stay arrays: as tensors, each would hold a file descriptor for as long as the pool holds it."""
    return batch


def single_sample(rng, library, kind=None, augment=True, worn=.5, labelled=False):
    scene, frame = P.picture(rng, library, kind, augment=augment, worn=worn)
    picture = torch.from_numpy(np.ascontiguousarray(scene.picture))
    taught = S.labels(scene) if labelled else None
    scene.picture = scene.owner = None
    return picture, scene, frame, taught


def detail_sample(rng, library):
    """Crops and global view, normalised, (1 + rows * columns, 3, 336, 336) f16; the scene; its frame, grid and small things."""
    if rng.random() < .5:
        scene, frame, rows, columns, smalls = P.detailed(rng, library)
    else:                                          # any picture as `num_crops` 4 enlarges it
        scene, frame = P.picture(rng, library)
        scene.picture = cv2.resize(scene.picture, (672, 672), interpolation=cv2.INTER_LINEAR)
        frame, rows, columns, smalls = tuple(2 * n for n in frame), 2, 2, []
        for t in scene.things:
            t.box, t.glyphs = tuple(2 * n for n in t.box), [(c, *(2 * n for n in box)) for c, *box in t.glyphs]
    crops = scene.picture.reshape(rows, 336, columns, 336, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 336, 336, 3)
    pixels = torch.cat([P.global_view(scene.picture), torch.from_numpy(crops).permute(0, 3, 1, 2).float()])
    scene.picture = scene.owner = None
    return pixels.half(), scene, frame, (rows, columns), smalls


def from_255(pixels):
    return (pixels.float() / 255 - MEAN) / STD


def half():
    """Matrix products in bfloat16: twice as fast where the processor has them (AVX-512 BF16)."""
    return torch.autocast("cpu", torch.bfloat16)


def ask(rng, scene, frame, n, smalls=()):
    turns = Q.turns(rng, scene, frame, n)
    about = [Q.small(rng, t, scene.things, frame, len(smalls)) for t in smalls]       # they are asked about for sure
    for turn in filter(None, about):
        turn.things = scene.things
    turns = ([Q.vary(rng, t) for t in about if t] + turns)[:n]
    if rng.random() < .12:
        turns.append(Q.talk_beside(rng))
    return turns


def alone(entry):
    """Whether a pool's picture holds one thing only, with a name that fits "Which image shows a ...?"."""
    return len(entry[1].things) == 1 and entry[1].things[0].kind != "clothing"


class Trainer:
    def __init__(self, a):
        self.a = a
        self.rng = np.random.default_rng(a.seed)
        self.prompts = Prompts(f"{a.work}/tokenizer.json")
        self.model = Phi3V(CONFIG)
        self.heads = Heads(CONFIG["img_processor"]["hidden_size"])
        self.words = Words(self.prompts, CONFIG["hidden_size"])
        self.crops, self.facts = looks.Crops(CONFIG["hidden_size"]), looks.Facts(CONFIG["hidden_size"])
        self.letters = looks.Letters(CONFIG["hidden_size"], self.prompts)
        self.model.lm_head.weight.data = self.model.model.embed_tokens.weight.data * .04   # begins as what embeds
        self.state = dict(step=0, seconds=0., sequences=0)
        self.path = f"{a.work}/{a.name}.pt"
        saved = torch.load(self.path if os.path.exists(self.path) else a.start) if os.path.exists(self.path) or a.start else None
        if saved:
            self.model.load_state_dict(saved["model"])
            self.heads.load_state_dict(saved["heads"])
            if "words" in saved and saved["words"]["scale"].shape == self.words.scale.shape:
                self.words.load_state_dict(saved["words"])
            for key in ("crops", "facts", "letters"):
                if key in saved:
                    getattr(self, key).load_state_dict(saved[key], strict=False)
        else:
            matching_init(self.model)
        if a.tower and (not saved or a.new_tower):
            tower = torch.load(f"{a.work}/{a.tower}.pt")
            self.model.vision.tower.load_state_dict(tower["tower"])
            self.heads.load_state_dict(tower["heads"])
        if not a.joint:
            for p in self.model.vision.tower.parameters():
                p.requires_grad = False
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        trained += [("aside", p) for p in [*self.words.parameters(), *self.crops.parameters(), *self.facts.parameters(), *self.letters.parameters()]]
        matrix = lambda n, p: p.dim() == 2 and ("layers." in n or "img_projection" in n)
        self.optimiser = muon_and_adam([p for n, p in trained if matrix(n, p)], [p for n, p in trained if not matrix(n, p)], a.muon, a.adam)
        if saved and os.path.exists(self.path):
            self.state = saved["state"]
            if saved.get("joint") == a.joint:
                self.optimiser.load_state_dict(saved["optimiser"])
        self.pools, self.looked, self.placed, self.known = {"single": [], "detail": []}, [], [], []

    def save(self, seconds):
        state = dict(self.state, seconds=seconds)
        torch.save(dict(model=self.model.state_dict(), heads=self.heads.state_dict(), words=self.words.state_dict(), crops=self.crops.state_dict(), facts=self.facts.state_dict(), letters=self.letters.state_dict(), optimiser=self.optimiser.state_dict(), state=state, joint=self.a.joint), self.path + ".tmp")
        os.replace(self.path + ".tmp", self.path)

    def encode(self, kind, samples):
        """Runs the tower over drawn pictures and adds them to the pool."""
        with torch.no_grad(), half():
            if kind == "single":
                features = self.model.vision.tower(normalise(torch.stack([s[0] for s in samples]))).half()
                self.pools[kind] += [(f, *s[1:]) for f, s in zip(features, samples)]
            else:
                for s in samples:
                    self.pools[kind].append((self.model.vision.tower(from_255(s[0])).half(), *s[1:]))
        limit = self.a.pool if kind == "single" else self.a.pool // 8
        if len(self.pools[kind]) > limit:
            del self.pools[kind][:len(self.pools[kind]) - limit]

    def joint_step(self, samples):
        """The whole model on fresh pictures: what their cells hold, and questions about them. Returns both losses and the
        share of answer tokens that were right."""
        with half():
            features = self.model.vision.tower(normalise(torch.stack([s[0] for s in samples]))).float()
        taught, box = cell_targets([s[3] for s in samples], np.zeros((len(samples), 2), int))
        cells, _ = loss_and_marks(self.heads(features), taught, box)
        self.pools["single"] += [(f, *s[1:]) for f, s in zip(features.detach().half(), samples)]
        del self.pools["single"][:-self.a.pool]
        turns = [ask(self.rng, s[1], s[2], TURNS) for s in samples]
        keep = [i for i, t in enumerate(turns) if t]
        close, _ = self.words.loss(self.model.vision.img_projection(features), self.model.model.embed_tokens.weight, samples)
        cells = cells + self.a.words / max(self.a.cells, 1e-3) * close
        tokens = self.model.vision.single(features[keep])
        kind = "global" if self.rng.random() < .5 else "single"
        tokens = tokens[:, 156:] if kind == "global" else tokens
        before = self.model.model.embed_tokens(torch.tensor(self.prompts.before(0))).expand(len(keep), -1, -1)
        words, aside, hit = self.loss(torch.cat([before, tokens], 1), self.rows([turns[i] for i in keep]), self.layout(kind))
        return self.a.cells * cells + aside, words, hit

    def align(self, n):
        """The loss of `Words` on n pictures of the pool, and the share of objects it names."""
        pool = self.pools["single"]
        chosen = [pool[i] for i in self.rng.integers(0, len(pool), n)]
        tokens = self.model.vision.img_projection(torch.stack([c[0] for c in chosen]).float())
        return self.words.loss(tokens, self.model.model.embed_tokens.weight, chosen)

    def sample(self, kind, n):
        pool = self.pools[kind]
        recent = list(range(max(0, len(pool) - n), len(pool)))
        return [pool[i] for i in ([*recent[-n // 2:], *self.rng.integers(0, len(pool), n - len(recent[-n // 2:]))])]

    def rows(self, turn_lists, images=1):
        out = []
        for turns in turn_lists:
            chain = self.rng.random() < .25
            out.append((self.prompts.conversation if chain else self.prompts.independent)(turns, images))
        return out

    def batch(self, kind):
        """(prefix embeddings (batch, positions, hidden) or None, rows, where the image tokens lie or None)"""
        v, emb = self.model.vision, self.model.model.embed_tokens
        before = emb(torch.tensor(self.prompts.before(0)))
        if kind in ("global", "single"):
            chosen = self.sample("single", self.a.batch)
            turns = [ask(self.rng, s, f, TURNS) for _, s, f, _ in chosen]
            keep = [i for i, t in enumerate(turns) if t]
            features = torch.stack([chosen[i][0] for i in keep]).float()
            tokens = v.single(features)
            tokens = tokens[:, 156:] if kind == "global" else tokens
            return torch.cat([before.expand(len(keep), -1, -1), tokens], 1), self.rows([turns[i] for i in keep]), self.layout(kind)
        if kind == "detail":
            grid = self.pools["detail"][self.rng.integers(len(self.pools["detail"]))][3]
            alike = [d for d in self.pools["detail"] if d[3] == grid]
            chosen = [alike[i] for i in self.rng.permutation(len(alike))[:max(2, self.a.batch // 2)]]
            turns = [ask(self.rng, s, f, TURNS + 4, smalls) for _, s, f, _, smalls in chosen]
            tokens = torch.stack([v.sequence(x[0].float(), x[1:].float(), *grid) for x, *_ in chosen])
            return torch.cat([before.expand(len(chosen), -1, -1), tokens], 1), self.rows(turns), self.layout(kind, grid)
        if kind == "pair":
            n = max(3, self.a.batch // 3)
            large = [p for p in self.pools["detail"] if alone(p) and p[3] == (2, 2)]
            grid = (2, 2) if len(large) > 2 * n and self.rng.random() < .6 else (1, 1)     # the server shows each in four crops
            pool = large if grid == (2, 2) else [p for p in self.pools["single"][-1500:] if alone(p)]
            picks = [(pool[i], pool[j]) for i, j in self.rng.integers(0, len(pool), (n, 2))]
            by_name = {}
            for p in pool:
                by_name.setdefault(p[1].things[0].name, []).append(p)
            for k in range(n):                     # now and then the same thing twice
                if self.rng.random() < .2:
                    same = by_name[picks[k][0][1].things[0].name]
                    picks[k] = picks[k][0], same[self.rng.integers(len(same))]
            turns = [[Q.compare(self.rng, a[1].things[0], looks.in_second(b[1].things[0])) for _ in range(4)] for a, b in picks]
            show = lambda f: v.single(f.float()[None])[0] if grid == (1, 1) else v.sequence(f[0].float(), f[1:].float(), *grid)
            one, two = (torch.stack([show(p[k][0]) for p in picks]) for k in (0, 1))
            between = emb(torch.tensor(self.prompts.before(1))).expand(n, -1, -1)
            return torch.cat([before.expand(n, -1, -1), one, between, two], 1), [self.prompts.independent(t, 1) for t in turns], self.layout(kind, grid)
        turns = [[Q.talk(self.rng)] for _ in range(2 * self.a.batch)]
        return None, [self.prompts.independent(t, 0) for t in turns], None

    def layout(self, kind, grid=(1, 1)):
        """Where image tokens lie in a prefix: of each picture the crops', and behind a separator the global view's."""
        at, rows, columns, out = 0, 12 * grid[0], 12 * grid[1], []
        for k in range(2 if kind == "pair" else 1):
            at += len(self.prompts.before(k))
            if kind != "global":
                out.append(looks.Grid(at, rows, columns, picture=k))
            at += 0 if kind == "global" else rows * (columns + 1)
            out.append(looks.Grid(at + 1, 12, 12, (looks.CELL * grid[1], looks.CELL * grid[0]), k))
            at += 157
        return looks.Layout(at, *out)

    def loss(self, prefix, rows, layout=None):
        """The loss of the answers, that of the looks, and the share of answer tokens that are right."""
        n = prefix.shape[1] if prefix is not None else 0
        ids, targets, at, mask = collate(rows, n)
        x = self.model.model.embed_tokens(ids)
        x = torch.cat([prefix, x], 1) if prefix is not None else x
        kept = dict.fromkeys(looks.INPUTS)
        with half():
            h = self.model.hidden(x, at, mask, kept).float()
        asked = targets != IGNORE
        logits = self.model.lm_head(h[asked])
        loss, aside = F.cross_entropy(logits, targets[asked]), 0.
        if layout and self.a.looks:
            close = looks.loss(self.model, kept, at, mask, rows, layout)
            self.looked.append([c.item() for c in close])
            if layout.grids[-1].picture == 0:
                close.append(self.facts.loss(kept, rows, layout))
                close.append(self.letters.loss(kept[looks.ANSWERS[0][0]], rows, layout))
                self.known.append([c.item() for c in close[-2:]])
            if layout.grids[0].rows > 12 or layout.grids[0].columns > 12:
                close += [self.crops.loss(kept, layout), *looks.seams(self.model, kept, at, layout)]
                self.placed.append([c.item() for c in close[-3:]])
            aside = self.a.looks * sum(close)
        return loss, aside, (logits.argmax(-1) == targets[asked]).float().mean().item()


@torch.no_grad()
def keep_soft(model, most=12.):
    """Keeps attention from hardening: no head's query or key matrix grows past this Frobenius norm. Muon's steps are as long
    for a matrix that has grown; without this, scores reached 180 and every head rested on one token, learning nothing more
    (MuonClip, Kimi K2, 2025, bounds the scores likewise). A fresh matrix has norm 8."""
    for layer in model.model.layers:
        a = layer.self_attn
        w = a.qkv_proj.weight.view(3, a.heads, -1, a.qkv_proj.in_features)[:2]
        w.mul_((most / w.flatten(2).norm(dim=-1)).clamp(max=1)[..., None, None])


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
    """Percent of answers that are exactly right, by category, on held-out pictures, fonts, photographs."""
    rng, marks = np.random.default_rng(seed), Marks()
    model.eval()
    v, before = model.vision, model.model.embed_tokens(torch.tensor(prompts.before(0)))
    for _ in range(n):
        if kind == "detail":
            pixels, scene, frame, grid, smalls = detail_sample(rng, library)
            f = model.vision.tower(from_255(pixels))
            tokens, turns = v.sequence(f[0], f[1:], *grid), ask(rng, scene, frame, 4, smalls)
        else:
            picture, scene, frame, _ = single_sample(rng, library, augment=False)
            tokens = v.single(model.vision.tower(normalise(picture[None])))[0]
            tokens, turns = tokens[156:] if kind == "global" else tokens, ask(rng, scene, frame, 4)
        if not turns:
            continue
        for t, right in zip(turns, exact(model, prompts, torch.cat([before, tokens]), turns)):
            marks.add({t.category: (right, 1)})
    model.train()
    return {k: (p, marks[k][1]) for k, p in sorted(marks.percent().items())}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("work"), p.add_argument("name"), p.add_argument("--tower"), p.add_argument("--start")
    p.add_argument("--new-tower", action="store_true", help="take --tower even where --start has one")
    p.add_argument("--minutes", type=float, default=60, help="of training in all, the resumed ones counted in")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--muon", type=float, default=.02)
    p.add_argument("--adam", type=float, default=2e-3)
    p.add_argument("--drawn", type=int, default=8, help="pictures drawn at a time")
    p.add_argument("--pool", type=int, default=12000)
    p.add_argument("--mix", default="global=.9,talk=.1")
    p.add_argument("--every", type=int, default=1, help="a new batch of pictures every so many steps")
    p.add_argument("--joint", action="store_true", help="the tower learns too, from the questions and from its cells")
    p.add_argument("--cells", type=float, default=.5, help="weight of the cells' loss when training jointly")
    p.add_argument("--words", type=float, default=.2, help="weight of holding image tokens to the words (see Words)")
    p.add_argument("--looks", type=float, default=.1, help="weight of one head looking where the answer is about (see looks)")
    p.add_argument("--align", type=float, default=4, help="minutes of nothing but that, before a first run")
    p.add_argument("--int4", action="store_true", help="answer with weights rounded to four bits while training")
    p.add_argument("--rates", type=float, nargs=2, default=(1., .02), help="share of the learning rates at the beginning and at the end")
    p.add_argument("--evaluate", type=float, default=10, help="minutes between evaluations")
    a = p.parse_args()
    rank, world = join(a)
    torch.manual_seed(a.seed)
    mix = {k: float(v) for k, v in (m.split("=") for m in a.mix.split(","))}
    t = Trainer(a)
    t.rng = np.random.default_rng([a.seed, rank, t.state["step"]])
    log = open(f"{a.work}/{a.name}.log" if rank == 0 else os.devnull, "a")
    share = min(.5, mix.get("detail", 0) * 1.2)
    loader = iter(torch.utils.data.DataLoader(Pictures(a.work, a.seed * 10 ** 6 + t.state["step"] * 10 + rank, share, a.drawn, True), batch_size=None, collate_fn=as_drawn, num_workers=1, prefetch_factor=8))
    quantising = Straight(t.model) if a.int4 else None
    test = S.Library(a.work, held_out=True)
    while len(t.pools["single"]) < 64 or ("detail" in mix and len(t.pools["detail"]) < 12):
        t.encode(*next(loader))
    saved_at = tested_at = time.time()
    begin = saved_at - t.state["seconds"]
    sums, marks = {}, Marks()
    first_step = t.state["step"]
    while (now := agreed(time.time() - begin)) < a.minutes * 60:
        drawn = next(loader) if t.state["step"] % a.every == 0 else None
        same = np.random.default_rng([a.seed, t.state["step"]])            # every process takes the same kind of step
        kind = str(same.choice(list(mix), p=np.array(list(mix.values())) / sum(mix.values())))
        with quantising if quantising else nullcontext():
            if drawn and not (a.joint and kind == drawn[0] == "single"):
                t.encode(*drawn)
            if a.words and not (a.joint and kind == "single"):
                close, found = t.align(8)
                (a.words * close).backward()
                marks.add(found)
            if now < a.align * 60 and not t.state["sequences"]:
                t.optimiser.step(min(1., (t.state["step"] + 1) / 60))
                keep_soft(t.model)
                t.state["step"] += 1
                if t.state["step"] % 100 == 0:
                    print(json.dumps(dict(step=t.state["step"], minutes=round(now / 60, 1), words=round(close.item(), 3), cells=marks.percent())), file=log, flush=True)
                    marks = Marks()
                continue
            if a.joint and kind == "single":
                while drawn is None or drawn[0] != "single":
                    drawn = next(loader)
                cells, loss, hit = t.joint_step(drawn[1])
                (cells + loss).backward()
                count = len(drawn[1])
            else:
                prefix, rows, layout = t.batch(kind)
                loss, aside, hit = t.loss(prefix, rows, layout)
                (loss + aside).backward()
                count = len(rows)
        rate = min(1., (t.state["step"] - first_step + 1) / 60)
        rate *= a.rates[0] + (a.rates[1] - a.rates[0]) * now / (a.minutes * 60)
        t.optimiser.step(rate)
        keep_soft(t.model)
        t.state["step"] += 1
        t.state["sequences"] += count * world
        s = sums.setdefault(kind, [[], []])
        s[0].append(loss.item()), s[1].append(hit)
        if t.state["step"] % 100 == 0:
            line = dict(step=t.state["step"], sequences=t.state["sequences"], minutes=round(now / 60, 1), pool={k: len(v) for k, v in t.pools.items()},
                        loss={k: round(float(np.mean(x)), 4) for k, (x, _) in sums.items()}, tokens={k: round(100 * float(np.mean(x)), 1) for k, (_, x) in sums.items()})
            line["cells"], line["looks"], line["crops"] = marks.percent(), np.mean(t.looked or [[0]], 0).round(3).tolist(), np.mean(t.placed or [[0]], 0).round(3).tolist()
            line["facts"] = np.mean(t.known or [[0]], 0).round(3).tolist()
            t.looked, t.placed, t.known = [], [], []
            sums, marks = {}, Marks()
            print(json.dumps(line), file=log, flush=True)
        if time.time() - tested_at > a.evaluate * 60 and rank == 0:
            report(log, t, test, mix, 60)
            tested_at = time.time()
        if time.time() - saved_at > 60 and rank == 0:
            t.save(now)
            saved_at = time.time()
    if rank:
        return
    t.save(time.time() - begin)
    report(log, t, test, mix, 200)


def report(log, t, test, mix, n):
    if t.a.int4:
        with Straight(t.model):
            return print(json.dumps(dict(step=t.state["step"], int4={k: evaluate(t.model, t.prompts, test, n if k != "detail" else n // 3, k) for k in ("single", "detail") if k in mix})), file=log, flush=True)
    kinds = [k for k in ("global", "single", "detail") if k in mix]
    print(json.dumps(dict(step=t.state["step"], held_out={k: evaluate(t.model, t.prompts, test, n if k != "detail" else n // 3, k) for k in kinds})), file=log, flush=True)


if __name__ == "__main__":
    main()
