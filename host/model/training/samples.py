"""Pictures as the decoder's training takes them, drawn in processes of their own, and what is asked about each."""
from collections import deque
import cv2
import numpy as np
import torch
import pictures as P
import questions as Q
import scenes as S
from cells import MEAN, STD

KINDS = dict(single=.07, several=.22, heap=.42, text=.19, shapes=.04, clothing=.06)       # counting is learnt last: more to count
FREQUENT = .5                                      # see questions.turns


class Pictures(torch.utils.data.IterableDataset):
    """Without end: ("single", n pictures as `single` draws them) or, as often as `detail_share` says, ("detail", two)."""

    def __init__(self, work, seed, n, detail_share, kinds=None):
        self.work, self.seed, self.n, self.detail_share, self.kinds = work, seed, n, detail_share, kinds or KINDS

    def __iter__(self):
        rng, library = np.random.default_rng(self.seed), S.Library(self.work)
        while True:
            if rng.random() < self.detail_share:
                yield "detail", [detail(rng, library, taught_kind(rng, self.kinds)) for _ in range(2)]
            else:
                yield "single", [single(rng, library, taught_kind(rng, self.kinds), labelled=True) for _ in range(self.n)]


class Source:
    """Pictures drawn by a process of their own, taken as they come or of one kind."""

    def __init__(self, work, seed, n, detail_share, kinds=None):
        # Labels stay arrays: as tensors, each would hold a file descriptor for as long as the pool holds it.
        self.loader = iter(torch.utils.data.DataLoader(Pictures(work, seed, n, detail_share, kinds), batch_size=None, collate_fn=as_drawn, num_workers=1, prefetch_factor=8))
        self.kept = {"single": deque(maxlen=8), "detail": deque(maxlen=32)}

    def take(self, kind=None):
        """(kind, pictures); what comes before the kind asked for is kept for later, the oldest of too many dropped."""
        if kind is None:
            return next(self.loader)
        while not self.kept[kind]:
            other, pictures = next(self.loader)
            self.kept[other].append(pictures)
        return kind, self.kept[kind].popleft()


def as_drawn(batch):
    return batch


def taught_kind(rng, kinds=KINDS):
    return str(rng.choice(list(kinds), p=list(kinds.values())))


def single(rng, library, kind=None, augment=True, worn=.5, labelled=False):
    """A picture of one crop (336, 336, 3) u8, its scene, its frame, and what `scenes.labels` says of its cells."""
    scene, frame = P.picture(rng, library, kind, augment=augment, worn=worn)
    picture = torch.from_numpy(np.ascontiguousarray(scene.picture))
    taught = S.labels(scene) if labelled else None
    scene.picture = scene.owner = None
    return picture, scene, frame, taught


def detail(rng, library, kind=None):
    """Crops and global view, 0..255 (1 + rows * columns, 3, 336, 336) f16; the scene; its frame, grid and small things."""
    if rng.random() < .42:
        scene, frame, rows, columns, smalls = P.detailed(rng, library)
    else:                                          # any picture as `num_crops` 4 enlarges it
        scene, frame = P.picture(rng, library, kind)
        scene.picture = cv2.resize(scene.picture, (672, 672), interpolation=cv2.INTER_LINEAR)
        frame, rows, columns, smalls = tuple(2 * n for n in frame), 2, 2, []
        for t in scene.things:
            t.box, t.glyphs = tuple(2 * n for n in t.box), [(c, *(2 * n for n in box)) for c, *box in t.glyphs]
    crops = scene.picture.reshape(rows, 336, columns, 336, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 336, 336, 3)
    pixels = torch.cat([P.global_view(scene.picture), torch.from_numpy(crops).permute(0, 3, 1, 2).float()])
    scene.picture = scene.owner = None
    return pixels.half(), scene, frame, (rows, columns), smalls


def from_255(pixels):
    """Channels-first pictures as the server normalises them."""
    return (pixels.float() / 255 - MEAN) / STD


def ask(rng, scene, frame, n, smalls=()):
    """At most n turns about a picture, each of its small things among them, and now and then one that it does not answer."""
    turns = Q.turns(rng, scene, frame, n, FREQUENT)
    about = [Q.small(rng, t, scene.things, frame, len(smalls)) for t in smalls]
    for turn in filter(None, about):
        turn.things = scene.things
    turns = ([Q.vary(rng, t) for t in about if t] + turns)[:n]
    for turn in turns:
        turn.then = Q.follow_up(rng, turn, frame)
    if rng.random() < .12:
        turns.append(Q.talk_beside(rng))
    return turns


def alone(entry):
    """Whether a pool's picture holds one thing only, with a name that fits "Which image shows a ...?"."""
    return len(entry[1].things) == 1 and entry[1].things[0].kind != "clothing"
