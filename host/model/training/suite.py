"""The evaluation suite of the repository: pictures from a held-out seed, held-out fonts and photographs, one question each.

usage: suite.py WORK_DIR OUT_DIR [--style STYLE] [--seed N] [--scale K]
`--style openmoji` draws every emoji in the style that no training picture had (not for the repository: CC-BY-SA);
`--scale 5` makes five times as many cases, for tighter figures. The format is that of tests/suite/README.md."""
import argparse, json, os
import numpy as np
from PIL import Image
import pictures as P
import questions as Q
import scenes as S

COUNTS = dict(name=24, colour=16, shape=14, position=20, count=18, read=20, detail=18, clothing=20, describe=8)
COUNTS |= {"yes-no": 28, "two-image": 16, "follow-up": 8, "text-only": 8, "cannot-know": 4, "formats": 12}


class Suite:
    def __init__(self, a):
        self.rng = np.random.default_rng([S.HELD_OUT_SEED, a.seed])
        self.library = S.Library(a.work, held_out=True, style=a.style)
        self.out, self.cases, self.pictures = a.out, [], 0
        os.makedirs(f"{a.out}/pictures", exist_ok=True)

    def save(self, picture, how=None):
        """Writes a picture; most as lossy WebP or JPEG, as pictures come."""
        rng, self.pictures = self.rng, self.pictures + 1
        how = how or ("webp", "webp", "jpg")[rng.integers(3)]
        path = f"pictures/{self.pictures:04}.{how}"
        options = {"webp": dict(quality=88, method=6), "jpg": dict(quality=88), "png": dict(optimize=True)}[how]
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(f"{self.out}/{path}", **options)
        return path

    def add(self, turn, images, category=None, history=(), **more):
        category = category or turn.category
        case = dict(id=f"{category}-{1 + sum(c['category'] == category for c in self.cases):03}", category=category, images=images,
                    question=turn.question, accept=turn.accepted)
        if turn.match != "words":
            case["match"] = turn.match
        if turn.rejected:
            case["reject"] = turn.rejected
        if history:
            case["history"] = [dict(question=h.question, answer=h.answer) for h in history]
        self.cases.append(case | more)

    def cropped(self, scene, frame):
        """The picture without the padding that the server will add itself."""
        x, y, w, h = frame
        return scene.picture[y:y + h, x:x + w]

    def draw(self, kind, wanted):
        """A picture of that kind and a turn for which `wanted` holds."""
        for _ in range(4000):
            scene, frame = P.picture(self.rng, self.library, kind, augment=False, worn=.3)
            for turn in Q.turns(self.rng, scene, frame, 6):
                if wanted(turn, scene):
                    return scene, frame, turn
        raise SystemExit(f"no picture of kind {kind} for this question")


def single(scene):
    return len(scene.things) == 1


RULES = {
    "name": ("single", lambda t, s: t.category == "name"),
    "shape": ("single", lambda t, s: t.category == "shape"),
    "colour": ("shapes", lambda t, s: t.category == "colour"),
    "position": ("several", lambda t, s: t.category == "position"),
    "count": ("heap", lambda t, s: t.category == "count"),
    "read": ("text", lambda t, s: t.category == "read" and t.match == "text" and len(t.accepted[0]) <= 3
             and all(g[4] >= 40 for th in s.things for g in th.glyphs)),
    "describe": ("several", lambda t, s: t.category == "describe" and len(s.things) in (2, 3) and t.match == "all"),
    "clothing": ("clothing", lambda t, s: t.category == "clothing"),
}


# What every k-th case of a category is about, so that a category is no two answers over and over.
SPREAD = {
    "shape": sorted(set(Q.SHAPE_NOUN.values())),
    "count": [Q.NUMBERS[n] for n in (1, 2, 3, 4, 5, 2, 3, 4, 5)],
    "read": [1, 2, 3],                             # characters
    "clothing": S.CLOTHES,
}


def is_next(category, turn, k):
    options = SPREAD.get(category)
    if not options:
        return True
    said = len(turn.accepted[0]) if category == "read" else turn.accepted[0]
    return said == options[k % len(options)]


def make(suite, scale):
    rng = suite.rng
    for category, (kind, wanted) in RULES.items():
        for k in range(COUNTS[category] * scale):
            scene, frame, turn = suite.draw(kind, lambda t, s: wanted(t, s) and is_next(category, t, k))
            suite.add(turn, [suite.save(suite.cropped(scene, frame))], category)
    wish = {"yes": 0, "no": 0}
    while sum(wish.values()) < COUNTS["yes-no"] * scale:       # as many yes as no
        scene, frame, turn = suite.draw(None, lambda t, s: t.category == "yes-no" and wish[t.accepted[0]] <= min(wish.values()))
        wish[turn.accepted[0]] += 1
        suite.add(turn, [suite.save(suite.cropped(scene, frame))])
    details(suite, COUNTS["detail"] * scale)
    pairs(suite, COUNTS["two-image"] * scale)
    follow_ups(suite, COUNTS["follow-up"] * scale)
    formats(suite, COUNTS["formats"] * scale)
    for k in range(COUNTS["text-only"] * scale):
        suite.add(Q.talk(rng, k % (len(Q.TALK) + 1)), [])
    for k in range(COUNTS["cannot-know"] * scale):
        scene, frame = P.picture(rng, suite.library, "several")
        turn = Q.Turn(Q.UNKNOWABLE[k % len(Q.UNKNOWABLE)], "", "cannot-know", ["cannot"])
        suite.add(turn, [suite.save(suite.cropped(scene, frame))])


def details(suite, n):
    """Half with one small thing, half with one in each of four crops; text of at most two characters."""
    done = 0
    while done < n:
        scene, frame, rows, columns, smalls = P.detailed(suite.rng, suite.library, spread=done % 2 == 1)
        if rows * columns != 4 or len(smalls) != (4 if done % 2 else 1):
            continue
        small = smalls[suite.rng.integers(len(smalls))]
        turn = Q.small(suite.rng, small, scene.things, frame, len(smalls))
        if turn is None or turn.category != "detail" or (small.kind == "text" and len(small.name) > 2):
            continue
        if small.kind == "text" and sum(t.name == small.name for t in scene.things) > 1:
            continue
        suite.add(turn, [suite.save(scene.picture)], "detail")
        done += 1


def alone(suite):
    while True:
        scene, frame = P.picture(suite.rng, suite.library, "single")
        if single(scene):
            return scene, frame


def pairs(suite, n):
    for _ in range(n):
        (a, fa), (b, fb) = alone(suite), alone(suite)
        turn = Q.compare(suite.rng, a.things[0], b.things[0])
        suite.add(turn, [suite.save(suite.cropped(a, fa)), suite.save(suite.cropped(b, fb))])


def follow_ups(suite, n):
    """Every other one asks about what the answer before it named, without naming it again."""
    for k in range(n):
        while True:
            scene, frame = P.picture(suite.rng, suite.library, "several", worn=.3)
            turns = Q.turns(suite.rng, scene, frame, 4)
            if len(turns) < 2 or turns[-1].category == "describe":
                continue
            before, last = turns[:-1][:2], turns[-1]
            if k % 2:
                before, last = turns[:1], Q.follow_up(suite.rng, turns[0], frame)
            if last:
                break
        suite.add(last, [suite.save(suite.cropped(scene, frame))], "follow-up", before)


def formats(suite, n):
    """Grey, alpha, palette, turned by EXIF, tiny, large, very wide and very tall: the thing must still be named."""
    kinds = ["grey", "alpha", "palette", "exif", "tiny", "large", "wide", "tall"]
    for k in range(n):
        kind = kinds[k % len(kinds)]
        index = int(suite.rng.integers(len(S.CONCEPTS)))
        w, h = {"wide": (336, 120), "tall": (120, 336), "large": (1200, 1200)}.get(kind, (336, 336))
        canvas = S.Canvas(suite.rng, w, h, held_out=True)
        canvas.picture, canvas.background = np.full((h, w, 3), 255, np.float32), "white"
        while not canvas.things:                   # turned too far it finds no place
            canvas.add_concept(suite.library, index, min(w, h) * .8)
        image = Image.fromarray(canvas.scene(0).picture)
        turn = Q.Turn("What is this?", "", "formats", [S.NOUNS[index]])
        if kind == "grey":
            path = suite.save(image.convert("L"), "png")
        elif kind == "alpha":
            # Clear wherever it is white: who lays it on black sees another picture than the one beneath.
            image.putalpha(image.convert("L").point(lambda v: 0 if v > 250 else 255))
            path = suite.save(image, "png")
        elif kind == "palette":
            path = suite.save(image.quantize(64), "png")
        elif kind == "exif":
            exif = Image.Exif()
            exif[0x0112] = 6
            path = f"pictures/exif{k:02}.jpg"
            image.transpose(Image.ROTATE_90).save(f"{suite.out}/{path}", quality=90, exif=exif)
        elif kind == "tiny":
            path = suite.save(image.resize((64, 64), Image.LANCZOS), "png")
        else:
            path = suite.save(image)
        suite.add(turn, [path])


def main():
    p = argparse.ArgumentParser()
    p.add_argument("work"), p.add_argument("out"), p.add_argument("--style")
    p.add_argument("--seed", type=int, default=20261123)
    p.add_argument("--scale", type=int, default=1)
    a = p.parse_args()
    suite = Suite(a)
    make(suite, a.scale)
    with open(f"{a.out}/cases.jsonl", "w") as f:
        for c in suite.cases:
            print(json.dumps(c, ensure_ascii=False), file=f)
    size = sum(os.path.getsize(f"{a.out}/pictures/{x}") for x in os.listdir(f"{a.out}/pictures"))
    print(len(suite.cases), "cases,", size, "bytes of pictures")


if __name__ == "__main__":
    main()
