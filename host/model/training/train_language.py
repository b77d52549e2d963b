"""Teaches the decoder to answer questions about pictures, on the features of the trained tower; with --joint the last
layers of the tower go on learning with it.

usage: train_language.py WORK_DIR NAME --tower NAME [--minutes M] [--joint LAYERS] [--mix global=..,single=..,detail=..,pair=..,talk=..]
Resumes WORK_DIR/NAME.pt. Every picture goes through the tower once and is asked about several times from a pool."""
import argparse, json, os, time
from contextlib import nullcontext
import numpy as np
import torch
import torch.nn.functional as F
import looks
import questions as Q
import scenes as S
from cells import Marks, normalise
from config import CONFIG
from examine import evaluate
from model import Phi3V, matching_init
from optimise import agreed, join, muon_and_adam
from prompts import IGNORE, Prompts, collate
from quantise import Straight
from samples import Source, alone, ask, from_255
from words import Words

TURNS = 9
HEAVY = {4.: Q.NUMBERS, 2.: ("top", "bottom", "left", "right", "center", "above", "below")}    # words that decide an answer


def half():
    """Matrix products in bfloat16 where the processor has them (AVX-512 BF16): twice as fast there, a tenth elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


class Trainer:
    """The model, what only training uses, their optimiser, and pools of encoded pictures."""

    def __init__(self, a):
        self.a, hidden = a, CONFIG["hidden_size"]
        self.rng = np.random.default_rng(a.seed)
        self.prompts = Prompts(f"{a.work}/tokenizer.json")
        self.model = Phi3V(CONFIG)
        self.words, self.crops, self.facts = Words(self.prompts, hidden), looks.Crops(hidden), looks.Facts(hidden)
        self.letters, self.things = looks.Letters(hidden, self.prompts), looks.Things(hidden)
        self.aside = dict(words=self.words, crops=self.crops, facts=self.facts, letters=self.letters, things=self.things)
        self.weights = self.token_weights()
        self.state = dict(step=0, seconds=0., sequences=0)
        self.path = f"{a.work}/{a.name}.pt"
        resumed = os.path.exists(self.path)
        saved = torch.load(self.path if resumed else a.start) if resumed or a.start else None
        self.begin(saved)
        self.learning = self.choose_what_learns()
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        trained += [("aside", p) for part in self.aside.values() for p in part.parameters()]
        matrix = lambda n, p: p.dim() == 2 and ("layers." in n or "img_projection" in n)
        self.optimiser = muon_and_adam([p for n, p in trained if matrix(n, p)], [p for n, p in trained if not matrix(n, p)], a.muon, a.adam)
        if resumed:
            self.state = saved["state"]
            if saved["joint"] == a.joint:
                self.optimiser.load_state_dict(saved["optimiser"])
        self.pools, self.figures = {"single": [], "detail": []}, Figures()

    def begin(self, saved):
        """Weights of a checkpoint of this training or of restore.py, or new ones on the trained tower."""
        if saved:
            self.model.load_state_dict(saved["model"])
            for key, part in self.aside.items():
                if key in saved:
                    part.load_state_dict(saved[key])
            return
        self.model.lm_head.weight.data = self.model.model.embed_tokens.weight.data * .04   # begins as what embeds
        matching_init(self.model)
        self.model.vision.tower.load_state_dict(torch.load(f"{self.a.work}/{self.a.tower}.pt")["tower"])

    def choose_what_learns(self):
        """Of the tower just its last `joint` layers that run. Returns the model's parameters that learn."""
        run = self.model.vision.tower.encoder.layers[:-1]
        for p in self.model.vision.tower.parameters():
            p.requires_grad = False
        for layer in run[len(run) - self.a.joint:]:
            for p in layer.parameters():
                p.requires_grad = True
        return [p for p in self.model.parameters() if p.requires_grad]

    def token_weights(self):
        """How much each token of an answer counts: numbers and places are one word of an answer and decide it."""
        weights = torch.ones(CONFIG["vocab_size"])
        for weight, words in HEAVY.items():
            weights[[self.prompts.encode("a " + word)[-1] for word in words]] = weight
        return weights

    def save(self, seconds):
        content = {key: part.state_dict() for key, part in self.aside.items()}
        content |= dict(model=self.model.state_dict(), optimiser=self.optimiser.state_dict(), joint=self.a.joint)
        torch.save(content | dict(state=dict(self.state, seconds=seconds)), self.path + ".tmp")
        os.replace(self.path + ".tmp", self.path)

    def encode(self, kind, samples):
        """Runs the tower over drawn pictures and adds them to the pool."""
        with torch.no_grad(), half():
            if kind == "single":
                features = self.model.vision.tower(normalise(torch.stack([s[0] for s in samples]))).half()
                self.pool(kind, [(f, *s[1:]) for f, s in zip(features, samples)])
            else:
                self.pool(kind, [(self.model.vision.tower(from_255(s[0])).half(), *s[1:]) for s in samples])

    def pool(self, kind, entries):
        pool = self.pools[kind]
        pool += entries
        del pool[:max(0, len(pool) - (self.a.pool if kind == "single" else self.a.pool // 8))]

    def settle(self, settling):
        """While settling, only what training alone uses learns."""
        for p in self.learning:
            p.requires_grad = not settling

    def step(self, kind, source):
        """One step's losses, with their gradients: of the answers, the share of their tokens that is right, and the sequences.
        With --joint, single pictures are fresh ones and teach the tower too."""
        if self.a.joint and kind == "single":
            drawn = source.take("single")[1]
            loss, aside, hit = self.joint_step(drawn)
            count = len(drawn)
        else:
            if self.state["step"] % self.a.every == 0:
                self.encode(*source.take("detail" if self.a.joint else None))
            if self.a.words:
                (self.a.words * self.align(8)).backward()
            prefix, rows, layout, things = self.batch(kind)
            loss, aside, hit = self.loss(prefix, rows, layout, things)
            count = len(rows)
        if (loss + aside).requires_grad:
            (loss + aside).backward()
        return loss.item(), hit, count

    def joint_step(self, samples):
        """The whole model on fresh pictures. Returns the loss of the answers, the others' sum, and the share of answer tokens
        that were right."""
        with half():
            features = self.model.vision.tower(normalise(torch.stack([s[0] for s in samples]))).float()
        self.pool("single", [(f, *s[1:]) for f, s in zip(features.detach().half(), samples)])
        turns = [ask(self.rng, s[1], s[2], TURNS) for s in samples]
        keep = [i for i, t in enumerate(turns) if t]
        close, found = self.words.loss(self.model.vision.img_projection(features), self.model.model.embed_tokens.weight, samples)
        self.figures.cells.add(found)
        tokens = self.model.vision.single(features[keep])
        kind = "global" if self.rng.random() < .75 else "single"
        tokens = tokens[:, 156:] if kind == "global" else tokens
        before = self.model.model.embed_tokens(torch.tensor(self.prompts.before(0))).expand(len(keep), -1, -1)
        things = [samples[i][1].things for i in keep]
        loss, aside, hit = self.loss(torch.cat([before, tokens], 1), self.rows([turns[i] for i in keep]), self.layout(kind), things)
        return loss, self.a.words * close + aside, hit

    def align(self, n):
        """The loss of `Words` on n pictures of the pool."""
        pool = self.pools["single"]
        chosen = [pool[i] for i in self.rng.integers(0, len(pool), n)]
        tokens = self.model.vision.img_projection(torch.stack([c[0] for c in chosen]).float())
        close, found = self.words.loss(tokens, self.model.model.embed_tokens.weight, chosen)
        self.figures.cells.add(found)
        return close

    def sample(self, kind, n):
        pool = self.pools[kind]
        recent = list(range(max(0, len(pool) - n), len(pool)))
        return [pool[i] for i in ([*recent[-n // 2:], *self.rng.integers(0, len(pool), n - len(recent[-n // 2:]))])]

    def rows(self, turn_lists, images=1):
        out = []
        for turns in turn_lists:
            chain = self.rng.random() < .25
            if chain:                              # what is asked next may say "it"
                turns = [t for turn in turns for t in (turn, turn.then if self.rng.random() < .5 else None) if t]
            out.append((self.prompts.conversation if chain else self.prompts.independent)(turns, images))
        return out

    def batch(self, kind):
        """(prefix embeddings (batch, positions, hidden) or None, rows, where the image tokens lie or None, each picture's things)"""
        v, emb = self.model.vision, self.model.model.embed_tokens
        before = emb(torch.tensor(self.prompts.before(0)))
        if kind in ("global", "single"):
            chosen = self.sample("single", self.a.batch)
            turns = [ask(self.rng, s, f, TURNS) for _, s, f, _ in chosen]
            keep = [i for i, t in enumerate(turns) if t]
            features = torch.stack([chosen[i][0] for i in keep]).float()
            tokens = v.single(features)
            tokens = tokens[:, 156:] if kind == "global" else tokens
            return torch.cat([before.expand(len(keep), -1, -1), tokens], 1), self.rows([turns[i] for i in keep]), self.layout(kind), [chosen[i][1].things for i in keep]
        if kind == "detail":
            grid = self.pools["detail"][self.rng.integers(len(self.pools["detail"]))][3]
            alike = [d for d in self.pools["detail"] if d[3] == grid]
            chosen = [alike[i] for i in self.rng.permutation(len(alike))[:max(2, self.a.batch // 2)]]
            turns = [ask(self.rng, s, f, TURNS + 4, smalls) for _, s, f, _, smalls in chosen]
            tokens = torch.stack([v.sequence(x[0].float(), x[1:].float(), *grid) for x, *_ in chosen])
            return torch.cat([before.expand(len(chosen), -1, -1), tokens], 1), self.rows(turns), self.layout(kind, grid), [c[1].things for c in chosen]
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
            return torch.cat([before.expand(n, -1, -1), one, between, two], 1), [self.prompts.independent(t, 1) for t in turns], self.layout(kind, grid), None
        turns = [[Q.talk(self.rng)] for _ in range(2 * self.a.batch)]
        return None, [self.prompts.independent(t, 0) for t in turns], None, None

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

    def loss(self, prefix, rows, layout=None, things=None):
        """things: those of each row's picture. The loss of the answers, that of the looks, and the share of answer tokens that are right."""
        n = prefix.shape[1] if prefix is not None else 0
        ids, targets, at, mask = collate(rows, n)
        x = self.model.model.embed_tokens(ids)
        x = torch.cat([prefix, x], 1) if prefix is not None else x
        kept = dict.fromkeys(looks.INPUTS)
        with half():
            h = self.model.hidden(x, at, mask, kept).float()
        asked = targets != IGNORE
        logits = self.model.lm_head(h[asked])
        loss, aside = F.cross_entropy(logits, targets[asked], self.weights), 0.
        if layout and self.a.looks:
            close = looks.loss(self.model, kept, at, mask, rows, layout)
            self.figures.add("looks", close)
            if layout.grids[-1].picture == 0:
                close.append(self.facts.loss(kept, rows, layout))
                close.append(self.letters.loss(kept[looks.ANSWERS[0][0]], rows, layout))
                self.figures.add("facts", close[-2:])
                if things:
                    dense, right = self.things.loss(kept, things, layout)
                    close.append(self.a.dense * dense)
                    self.figures.add("things", right)
            if layout.grids[0].rows > 12 or layout.grids[0].columns > 12:
                close += [self.crops.loss(kept, layout), *looks.seams(self.model, kept, at, layout)]
                self.figures.add("crops", close[-3:])
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


class Figures:
    """What a hundred steps had, for the log."""

    def __init__(self):
        self.cells, self.sums = Marks(), {}

    def add(self, name, values):
        if len(values):
            self.sums.setdefault(name, []).append([v.item() if torch.is_tensor(v) else v for v in values])

    def line(self):
        means = {name: np.mean(rows, 0).round(4).tolist() for name, rows in sorted(self.sums.items())}
        line = means | dict(cells=self.cells.percent())
        self.__init__()
        return line


def arguments():
    p = argparse.ArgumentParser()
    p.add_argument("work"), p.add_argument("name"), p.add_argument("--tower"), p.add_argument("--start")
    p.add_argument("--minutes", type=float, default=60, help="of training in all, the resumed ones counted in")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--muon", type=float, default=.02)
    p.add_argument("--adam", type=float, default=2e-3)
    p.add_argument("--drawn", type=int, default=8, help="pictures drawn at a time")
    p.add_argument("--pool", type=int, default=4000, help="encoded pictures kept to be asked about again, 220 kB each")
    p.add_argument("--mix", default="global=.9,talk=.1")
    p.add_argument("--kinds", help="shares of the kinds of pictures, as --mix; those of samples.KINDS if not said")
    p.add_argument("--every", type=int, default=1, help="a new batch of pictures every so many steps")
    p.add_argument("--joint", type=int, default=0, metavar="LAYERS", help="so many of the tower's last layers learn too")
    p.add_argument("--settle", type=float, default=0, help="minutes in which only what training alone uses learns (after restore.py)")
    p.add_argument("--words", type=float, default=.2, help="weight of holding image tokens to the words (see Words)")
    p.add_argument("--looks", type=float, default=.1, help="weight of one head looking where the answer is about (see looks)")
    p.add_argument("--dense", type=float, default=3, help="weight, among the looks, of the density that counts (see looks.Things)")
    p.add_argument("--align", type=float, default=4, help="minutes of nothing but Words, before a first run")
    p.add_argument("--int4", action="store_true", help="answer with weights rounded to four bits while training")
    p.add_argument("--rates", type=float, nargs=2, default=(1., .02), help="share of the learning rates at the beginning and at the end")
    p.add_argument("--evaluate", type=float, default=10, help="minutes between evaluations")
    a = p.parse_args()
    shares = lambda text: {k: float(v) for k, v in (m.split("=") for m in text.split(","))}
    a.mix, a.kinds = shares(a.mix), shares(a.kinds) if a.kinds else None
    single, detail = a.mix.get("single", 0), a.mix.get("detail", 0)
    a.detail_share = min(.5, detail * 1.2)
    if a.joint:
        if not single or not detail:
            p.error("--joint takes its fresh pictures from the mix: it needs single and detail")
        if a.joint >= CONFIG["img_processor"]["num_hidden_layers"]:
            p.error("--joint: the tower runs fewer layers than that")
        a.detail_share = (1 - single) / a.every / (single + (1 - single) / a.every)
    return a


def main():
    a = arguments()
    rank, world = join(a)
    torch.manual_seed(a.seed)
    t, log = Trainer(a), open(f"{a.work}/{a.name}.log" if rank == 0 else os.devnull, "a")
    tell = lambda **line: print(json.dumps(line), file=log, flush=True)
    first_step, state = t.state["step"], t.state
    t.rng = np.random.default_rng([a.seed, rank, first_step])
    source = Source(a.work, [a.seed, first_step, rank], a.drawn, a.detail_share, a.kinds)
    rounding = Straight(t.model) if a.int4 else nullcontext()
    for kind, least in (("single", 64), ("detail", 12 if "detail" in a.mix else 0)):
        while len(t.pools[kind]) < least:
            t.encode(*source.take(kind))
    saved_at = tested_at = time.time()
    begin = saved_at - state["seconds"]
    while (now := agreed(time.time() - begin)) < a.minutes * 60:
        same = np.random.default_rng([a.seed, state["step"]])              # every process takes the same kind of step
        kind = str(same.choice(list(a.mix), p=np.array(list(a.mix.values())) / sum(a.mix.values())))
        settling, aligning = now < a.settle * 60, now < a.align * 60 and not state["sequences"]
        t.settle(settling)
        with rounding:
            if aligning:
                if state["step"] % a.every == 0:
                    t.encode(*source.take("single"))
                (a.words * t.align(8)).backward()
            else:
                loss, hit, count = t.step(kind, source)
                state["sequences"] += count * world
                t.figures.add(kind, (loss, hit))
        rate = a.rates[0] + (a.rates[1] - a.rates[0]) * now / (a.minutes * 60)
        t.optimiser.step(2. if settling else min(1., (state["step"] - first_step + 1) / 60) * (1. if aligning else rate))
        keep_soft(t.model)
        state["step"] += 1
        if state["step"] % 100 == 0:
            tell(step=state["step"], sequences=state["sequences"], minutes=round(now / 60, 1), **t.figures.line())
        if rank == 0 and time.time() - tested_at > a.evaluate * 60:
            tell(step=state["step"], **examined(t, 60))
            tested_at = time.time()
        if rank == 0 and time.time() - saved_at > 60:
            t.save(now)
            saved_at = time.time()
    if rank == 0:
        t.save(time.time() - begin)
        tell(step=state["step"], **examined(t, 120))


def examined(t, n):
    """Answers that are exactly right on n held-out pictures of each kind that is taught, a third of them in several crops."""
    kinds = [k for k in ("global", "single", "detail") if k in t.a.mix]
    test = S.Library(t.a.work, held_out=True)
    with Straight(t.model) if t.a.int4 else nullcontext():
        return {"int4" if t.a.int4 else "held_out": {k: evaluate(t.model, t.prompts, test, n if k != "detail" else n // 3, k) for k in kinds}}


if __name__ == "__main__":
    main()
