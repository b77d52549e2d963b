"""The pictures that questions are asked about: as people send them, of any shape and size, fitted to 336 px crops as the
server fits them (host/model/src/image.rs)."""
import numpy as np
import scenes as S

KINDS = dict(single=.08, several=.27, heap=.25, text=.27, shapes=.05, clothing=.08)


def size(rng, side=336):
    """Width and height, the longer one `side`; often square."""
    if rng.random() < .55:
        return side, side
    short = int(side * rng.uniform(.5, .97))
    return (side, short) if rng.random() < .5 else (short, side)


def any_thing(rng, canvas, library, px, used, text=.12, shape=.3):
    kind = rng.random()
    if kind < text:
        s = S.random_string(rng, 3)
        return None if "text" in used else canvas.add_text(library, s, np.clip(px * .45, 30, 80)) and "text"
    if kind < text + shape:
        s = S.SHAPES[rng.integers(len(S.SHAPES))]
        noun = s.split()[0]
        return None if noun in used else canvas.add_shape(library, s, px) and noun
    c = int(rng.integers(len(S.CONCEPTS)))
    return None if c in used else canvas.add_concept(library, c, px) and c


def picture(rng, library, kind=None, side=336, augment=True, worn=.5):
    """A scene of side x side px and its frame (x, y, width, height) inside white padding."""
    kind = kind or str(rng.choice(list(KINDS), p=list(KINDS.values())))
    if kind == "clothing":
        scene = S.photo(rng, library, S.CLOTHES[rng.integers(len(S.CLOTHES))], side, side, augment)
        return scene, scene.things[0].box
    w, h = size(rng, side)
    canvas = S.Canvas(rng, w, h, library.held_out)
    least = min(w, h)
    if kind == "single":
        px = least * rng.uniform(.2, .97)
        if rng.random() < .7:
            canvas.add_concept(library, rng.integers(len(S.CONCEPTS)), px)
        else:
            canvas.add_shape(library, S.SHAPES[rng.integers(len(S.SHAPES))], px * .9)
    elif kind == "several":
        used = set()
        for _ in range(int(rng.integers(2, 5))):
            noun = any_thing(rng, canvas, library, least * rng.uniform(.15, .45), used)
            if noun is not None:
                used.add(noun)
    elif kind == "heap":
        heap(rng, canvas, library, least)
    elif kind == "crowd":
        crowd(rng, canvas, library, least)
    elif kind == "text":
        n = int(rng.integers(1, 5))
        px = min(np.exp(rng.uniform(np.log(34), np.log(130))), w * 1.1 / n, h * .6)
        canvas.add_text(library, S.random_string(rng, n), px)
        if rng.random() < .3:
            any_thing(rng, canvas, library, least * rng.uniform(.15, .4), {"text"}, 0)
    elif kind == "shapes":
        used = set()
        for _ in range(int(rng.integers(1, 5))):
            noun = any_thing(rng, canvas, library, least * rng.uniform(.14, .4), used, 0, 1)
            if noun is not None:
                used.add(noun)
    if not canvas.things:                          # everything was refused a place: one thing always fits
        canvas.add_concept(library, int(rng.integers(len(S.CONCEPTS))), least * .5)
    return padded(canvas.scene(worn), side)


def heap(rng, canvas, library, least):
    # Five are learnt last, and not always find a place.
    n = int(rng.integers(1, 6)) if library.held_out else 1 + int(rng.choice(5, p=[.12, .18, .2, .24, .26]))
    px = max(least * rng.uniform(.13, .3), 40)
    same_size = rng.random() < .6
    shape = S.SHAPES[rng.integers(len(S.SHAPES))] if rng.random() < .4 else None
    concept, name = int(rng.integers(len(S.CONCEPTS))), None
    for _ in range(n):
        s = px if same_size else px * rng.uniform(.7, 1.4)
        if shape:
            name = name if name and rng.random() < .5 else S.COLOUR_NAMES[rng.integers(len(S.COLOUR_NAMES))]
            canvas.add_shape(library, shape, s, name)
        else:
            canvas.add_concept(library, concept, s)
    others = int(rng.integers(0, 3)) if rng.random() < .45 else 0
    used = {shape.split()[0] if shape else concept}
    for _ in range(min(others, 6 - len(canvas.things))):
        any_thing(rng, canvas, library, px * rng.uniform(.8, 1.3), used, 0, .3)


def crowd(rng, canvas, library, least):
    """Two or three kinds of things, several of each, six in all at most: to count one kind the others must be left out."""
    px, same_size, used = max(least * rng.uniform(.13, .28), 40), rng.random() < .6, set()
    sizes = [int(rng.integers(1, 6)), int(rng.integers(1, 4)), int(rng.integers(0, 3))]
    for n in sizes:
        noun, again = None, None
        for _ in range(n):
            if len(canvas.things) == 6:
                return
            s = px if same_size else px * rng.uniform(.7, 1.4)
            if noun is None:
                noun = any_thing(rng, canvas, library, s, used, 0, .35)
                if noun is None:
                    break
                used.add(noun)
                first = canvas.things[-1]
                again = first.name if first.kind == "shape" else None
            elif again:
                canvas.add_shape(library, again, s, first.colour if rng.random() < .5 else S.COLOUR_NAMES[rng.integers(len(S.COLOUR_NAMES))])
            else:
                canvas.add_concept(library, noun, s)


def padded(scene, side):
    """White at both ends of the shorter axis, as the server pads."""
    h, w = scene.picture.shape[:2]
    x, y = (side - w) // 2, (side - h) // 2
    if (w, h) == (side, side):
        return scene, (0, 0, side, side)
    picture, owner = np.full((side, side, 3), 255, np.uint8), np.zeros((side, side), np.uint8)
    picture[y:y + h, x:x + w], owner[y:y + h, x:x + w] = scene.picture, scene.owner
    for t in scene.things:
        t.box = (t.box[0] + x, t.box[1] + y, *t.box[2:])
        t.glyphs = [(c, gx + x, gy + y, gw, gh) for c, gx, gy, gw, gh in t.glyphs]
    return S.Scene(picture, scene.things, owner, scene.background), (x, y, w, h)


GRIDS = [(2, 2), (2, 2), (2, 2), (2, 2), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1)]


def small_thing(rng, canvas, library, zone, kind, used):
    for _ in range(4):
        if kind == "text":
            thing = canvas.add_text(library, S.random_string(rng, 3), rng.uniform(28, 44), zone=zone)
        elif kind == "concept":
            thing = canvas.add_concept(library, int(rng.integers(len(S.CONCEPTS))), rng.uniform(36, 60), zone=zone)
        else:
            thing = canvas.add_shape(library, S.SHAPES[rng.integers(len(S.SHAPES))], rng.uniform(28, 48), zone=zone)
        if thing:
            used.add(thing.name.split()[0] if kind == "shape" else S.NOUNS.index(thing.name) if kind == "concept" else "text")
            return thing
    return None


def detailed(rng, library, spread=None):
    """A large picture whose small things only the crops show: rows x columns crops of 336 px, a scene of that size, its
    frame, and the small things. With `spread` every crop holds one, all of a kind: which of them lies where is known only
    to who puts the crops in their order."""
    rows, columns = GRIDS[rng.integers(len(GRIDS))]
    spread = rng.random() < .5 and rows * columns in (2, 4) if spread is None else spread
    if spread and max(rows, columns) > 2:
        rows = columns = 2
    w, h = columns * 336, rows * 336
    canvas, used = S.Canvas(rng, w, h, library.held_out), {"text"}
    kind = str(rng.choice(["text", "concept", "shape"], p=[.55, .25, .2]))
    cells = [(c, r) for r in range(rows) for c in range(columns)]
    chosen = cells if spread else [cells[rng.integers(len(cells))]]
    zones = [(c * 336 + 30, r * 336 + 30, c * 336 + 306, r * 336 + 306) for c, r in chosen]
    smalls = [t for t in (small_thing(rng, canvas, library, z, kind, used) for z in zones) if t]
    if not spread:
        for _ in range(int(rng.integers(0, 3))):
            noun = any_thing(rng, canvas, library, min(w, h) * rng.uniform(.2, .45), used, 0)
            if noun is not None:
                used.add(noun)
    return canvas.scene(.25), (0, 0, w, h), rows, columns, smalls


def global_view(picture):
    """The server's global view of a padded picture whose sides are multiples of 336 px: bicubic without antialiasing."""
    import torch
    import torch.nn.functional as F
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    return F.interpolate(x, (336, 336), mode="bicubic", align_corners=False)   # f32 of 0..255, may overshoot
