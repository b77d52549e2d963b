"""Pictures with everything in them known: drawn scenes, and clothing photographs.

A `Scene` holds the picture (height, width, 3) u8 and its objects in drawing order. `labels` turns it into what the
vision tower is taught for each merged cell of 28 x 28 px (the cell that one image token sees).
All randomness comes from the generator that is handed in."""
import glob, os
from dataclasses import dataclass, field
import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sprites import HELD_OUT, STYLES, concepts

cv2.setNumThreads(0)
CELL = 28
SHAPES = ["circle", "square", "rectangle", "triangle", "star", "heart", "diamond", "cross",
          "arrow up", "arrow down", "arrow left", "arrow right"]
CLOTHES = ["dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"]
CONCEPTS = concepts()
NOUNS = [c[0] for c in CONCEPTS]
CLASSES = ["background", "text"] + SHAPES + CLOTHES + NOUNS
FIRST_SHAPE, FIRST_CLOTHING, FIRST_CONCEPT = 2, 2 + len(SHAPES), 2 + len(SHAPES) + len(CLOTHES)
CHARS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HELD_OUT_SEED = 2 ** 40                       # in front of every seed of an evaluation: no training has it
CHAR_PLACES = 8  # a character's place in its string, 0..7

# name: (exact colours people type, hue range in degrees, saturation range, value range)
COLOURS = {
    "red": ([(255, 0, 0), (220, 20, 60), (200, 0, 0)], (-7, 6), (.8, 1), (.75, 1)),
    "orange": ([(255, 165, 0), (255, 140, 0)], (23, 37), (.85, 1), (.95, 1)),
    "yellow": ([(255, 255, 0), (255, 215, 0)], (50, 60), (.75, 1), (.92, 1)),
    "green": ([(0, 128, 0), (0, 255, 0), (50, 205, 50)], (95, 145), (.6, 1), (.4, .95)),
    "blue": ([(0, 0, 255), (30, 144, 255), (65, 105, 225)], (208, 240), (.65, 1), (.55, 1)),
    "purple": ([(128, 0, 128), (138, 43, 226)], (268, 300), (.55, 1), (.45, .8)),
    "pink": ([(255, 192, 203), (255, 105, 180)], (322, 346), (.22, .58), (.95, 1)),
    "brown": ([(139, 69, 19), (150, 75, 0)], (16, 30), (.6, .9), (.3, .58)),
    "black": ([(0, 0, 0)], (0, 360), (0, .15), (0, .12)),
    "white": ([(255, 255, 255)], (0, 360), (0, .03), (.96, 1)),
    "gray": ([(128, 128, 128)], (0, 360), (0, .06), (.42, .66)),
}
COLOUR_NAMES = list(COLOURS)


def colour(rng, name):
    exact, hue, saturation, value = COLOURS[name]
    if rng.random() < .35:
        return np.array(exact[rng.integers(len(exact))], np.float32)
    h, s, v = rng.uniform(*hue) % 360 / 60, rng.uniform(*saturation), rng.uniform(*value)
    i, f = int(h) % 6, h - int(h)
    p, q, t = v * (1 - s), v * (1 - s * f), v * (1 - s * (1 - f))
    return np.array([(v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q)][i], np.float32) * 255


@dataclass
class Thing:
    """One object of a scene. `box` is x, y, width, height in px of the visible ink."""
    kind: str                    # concept, shape, text, clothing
    name: str                    # noun, shape, the string, or the kind of clothing
    box: tuple
    colour: str | None = None    # of shapes and text
    glyphs: list = field(default_factory=list)   # (character, x, y, width, height) of text

    @property
    def centre(self):
        x, y, w, h = self.box
        return x + w / 2, y + h / 2

    @property
    def class_index(self):
        return 1 if self.kind == "text" else CLASSES.index(self.name)


@dataclass
class Scene:
    picture: np.ndarray
    things: list
    owner: np.ndarray            # (height, width) u8: 1 + index of the thing that shows there
    background: str | None       # the colour's name where it is plain


class Library:
    """Sprites, glyphs and photographs. `held_out` swaps training fonts, photographs and patterns of the ground for those kept
    back; `style` takes the drawings of one style alone."""

    def __init__(self, work, held_out=False, style=None):
        self.held_out, data = held_out, np.load(f"{work}/sprites.npz")
        styles = STYLES + HELD_OUT
        keep = data["style"] == styles.index(style) if style else data["style"] < len(STYLES)
        rgba, concept = data["rgba"][keep], data["concept"][keep]
        self.sprites = {c: [levels(premultiply(p)) for p in rgba[concept == c]] for c in range(len(CONCEPTS))}
        self.shapes = {s: [levels(premultiply(p)) for p in shape_pictures(s)] for s in SHAPES}
        self.fonts = [Font(p) for p in font_files(work, held_out)]
        self.photos = {}
        split = "validation" if held_out else "train"
        for c in CLOTHES:
            files = sorted(glob.glob(f"{work}/clothing/{split}/{c}/*.jpg"))
            self.photos[c] = [np.asarray(Image.open(f).convert("RGB")) for f in files]


def premultiply(rgba):
    out = rgba.astype(np.float32)
    out[..., :3] *= out[..., 3:] / 255
    return out


def levels(picture):
    """The picture at its side, half of it, a quarter, ...: to be scaled from the next larger one."""
    out = [picture]
    while out[-1].shape[0] > 32:
        side = out[-1].shape[0] // 2
        out.append(cv2.resize(out[-1], (side, side), interpolation=cv2.INTER_AREA))
    return out


def shape_pictures(name, side=224, over=4):
    """White drawings of a shape with alpha: filled, and drawn as a thick outline where that keeps its name."""
    s = side * over
    def canvas(draw_on):
        mask = Image.new("L", (s, s))
        draw_on(ImageDraw.Draw(mask))
        alpha = np.asarray(mask.resize((side, side), Image.BOX))
        return np.dstack([np.full((side, side, 3), 255, np.uint8), alpha])
    turn = np.linspace(0, 2 * np.pi, 100)
    arrow = [(.5, 0), (1, .5), (.68, .5), (.68, 1), (.32, 1), (.32, .5), (0, .5)]
    thin = [(.5, 0), (.95, .42), (.6, .42), (.6, 1), (.4, 1), (.4, .42), (.05, .42)]
    def turned(points, quarter):
        for _ in range(quarter):
            points = [(1 - y, x) for x, y in points]
        return points
    star = [(.5 + .5 * r * np.sin(a), .52 - .5 * r * np.cos(a)) for a, r in
            zip(np.arange(10) * np.pi / 5, [1, .42] * 5)]
    heart = [(.5 + 16 * np.sin(t) ** 3 / 33, .46 - (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 33)
             for t in turn]
    quarters = {"arrow up": 0, "arrow right": 1, "arrow down": 2, "arrow left": 3}
    outlines = {
        "circle": [[(.5 + .5 * np.cos(t), .5 + .5 * np.sin(t)) for t in turn]],
        "square": [[(0, 0), (1, 0), (1, 1), (0, 1)]],
        "rectangle": [[(0, .25), (1, .25), (1, .75), (0, .75)], [(.27, 0), (.73, 0), (.73, 1), (.27, 1)],
                      [(0, .3), (1, .3), (1, .7), (0, .7)]],
        "triangle": [[(.5, .06), (1, .94), (0, .94)], [(.5, 0), (.9, 1), (.1, 1)]],
        "star": [star], "heart": [heart],
        "diamond": [[(.5, 0), (.86, .5), (.5, 1), (.14, .5)], [(.5, 0), (1, .5), (.5, 1), (0, .5)]],
        "cross": [[(.34, 0), (.66, 0), (.66, .34), (1, .34), (1, .66), (.66, .66), (.66, 1), (.34, 1), (.34, .66),
                   (0, .66), (0, .34), (.34, .34)],
                  [(.4, 0), (.6, 0), (.6, .4), (1, .4), (1, .6), (.6, .6), (.6, 1), (.4, 1), (.4, .6), (0, .6), (0, .4), (.4, .4)]],
    }.get(name) or [turned(arrow, quarters[name]), turned(thin, quarters[name])]
    return [canvas(lambda d, o=o: d.polygon([(x * (s - 1), y * (s - 1)) for x, y in o], fill=255)) for o in outlines]


HELD_OUT_FONTS = ("comfortaa", "Comfortaa", "Carlito", "carlito")


def font_files(work, held_out):
    files = sorted(glob.glob(f"{work}/fonts/usr/share/fonts/*/*/*.[to]tf"))
    skip = ("Thin", "Hairline", "ExtraLight", "Condensed", "LightItalic", "Symbols")
    files = [f for f in files if not any(s in os.path.basename(f) for s in skip)]
    return [f for f in files if any(h in f for h in HELD_OUT_FONTS) == held_out]


class Font:
    """A font at one large size; a glyph is a coverage mask drawn once."""
    SIZE = 96

    def __init__(self, path):
        self.name = os.path.basename(path)
        self.face = ImageFont.truetype(path, self.SIZE)
        left, top, right, bottom = self.face.getbbox("H")
        self.top, self.capital_px = top, bottom - top
        self.cache = {}

    def line(self, text):
        """(mask (height, width) f32 0..255, [(character, x, width)]) with capitals `capital_px` high."""
        if text not in self.cache:
            pad = 12
            height = self.capital_px + 2 * pad + 24
            mask = Image.new("L", (int(self.face.getlength(text)) + 2 * pad, height))
            draw = ImageDraw.Draw(mask)
            draw.text((pad, pad - self.top), text, fill=255, font=self.face)
            spans = []
            for i, c in enumerate(text):
                x = pad + self.face.getlength(text[:i])
                spans.append((c, x, self.face.getlength(c)))
            if len(text) > 1:
                return np.asarray(mask, np.float32), spans
            self.cache[text] = np.asarray(mask, np.float32), spans
        return self.cache[text]


# ---- drawing -------------------------------------------------------------------------------------------------

def background(rng, w, h, held_out=False):
    """(picture (h, w, 3) f32, the colour's name where it is plain). The patterns of `held_out` are in no training picture."""
    kind = rng.random()
    if kind < .5:
        name = "white" if rng.random() < .35 else COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]
        return np.tile(colour(rng, name), (h, w, 1)), name
    a, b = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    if rng.random() < .5:
        a, b = 255 - (255 - a) * .4, 255 - (255 - b) * .4
    if kind < .7:
        angle = rng.uniform(0, 2 * np.pi)
        t = (np.linspace(-.5, .5, w)[None] * np.cos(angle) + np.linspace(-.5, .5, h)[:, None] * np.sin(angle)) + .5
    elif held_out:
        t, b = held_out_pattern(rng, w, h), a + (b - a) * rng.uniform(.1, .5)
    else:
        t, b = pattern(rng, w, h), a + (b - a) * rng.uniform(.1, .7)
    t = np.clip(t, 0, 1)[..., None].astype(np.float32)
    return a * (1 - t) + b * t, None


def rotated(rng, w, h):
    """A pattern's period in px, and its axes as shares of that: u and v, each (h, w)."""
    period, angle = rng.uniform(8, 60), rng.uniform(0, np.pi)
    x, y = np.arange(w)[None], np.arange(h)[:, None]
    return period, (x * np.cos(angle) + y * np.sin(angle)) / period, (y * np.cos(angle) - x * np.sin(angle)) / period


def held_out_pattern(rng, w, h):
    """Dots, or rings around some point; (h, w) f32 of 0 and 1."""
    period, u, v = rotated(rng, w, h)
    rng.random()                                   # the suite in the repository was drawn so
    x, y = np.arange(w)[None] - rng.uniform(0, w), np.arange(h)[:, None] - rng.uniform(0, h)
    dots, rings = (u % 1 - .5) ** 2 + (v % 1 - .5) ** 2 < .09, np.hypot(x, y) / period % 1 < .5
    return (dots if rng.random() < .5 else rings).astype(np.float32)


def pattern(rng, w, h):
    """Clouds, spots, stripes, waves, checks, tiles, crosses, bricks or confetti; (h, w) f32 of 0..1. Many kinds, so that the
    model learns that whatever repeats or has no name is ground, and does not count it. Never dots or rings."""
    _, u, v = rotated(rng, w, h)
    row, wave = np.floor(v), rng.uniform(.1, .5) * np.sin(2 * np.pi * v / rng.uniform(1, 4))
    noise = lambda n: cv2.resize(rng.random((n, n)).astype(np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
    makers = [
        lambda: noise(int(rng.integers(3, 24))), lambda: noise(int(rng.integers(3, 24))),
        lambda: noise(int(rng.integers(4, 30))) > .55,
        lambda: u % 1 < rng.uniform(.1, .7), lambda: (u + wave) % 1 < .5, lambda: (u + np.abs(v % 1 - .5)) % 1 < .5,
        lambda: (u % 1 < .5) ^ (v % 1 < .5), lambda: ((u % 1 < .35) * .5 + (v % 1 < .35) * .5),
        lambda: (u % 1 < .12) | (v % 1 < .12), lambda: ((u + row % 2 / 2) % 1 < .1) | (v % 1 < .15),
        lambda: (np.abs(u % 1 - .5) + np.abs(v % 1 - .5)) < rng.uniform(.2, .45),
        lambda: np.maximum(np.abs((u + row % 2 / 2) % 1 - .5), np.abs(v % 1 - .5)) < rng.uniform(.15, .35),
        lambda: (np.minimum(np.abs(u % 1 - .5), np.abs(v % 1 - .5)) < .1) & (np.maximum(np.abs(u % 1 - .5), np.abs(v % 1 - .5)) < .3),
        lambda: confetti(rng, w, h), lambda: confetti(rng, w, h),
    ]
    return np.broadcast_to(makers[rng.integers(len(makers))](), (h, w)).astype(np.float32)


def confetti(rng, w, h):
    """Small triangles and lines anywhere, too small to be counted as things."""
    out = np.zeros((h, w), np.float32)
    line = rng.random() < .4
    for _ in range(int(rng.integers(20, 160))):
        at, reach = rng.uniform(0, 1, 2) * (w, h), rng.uniform(3, 12)
        points = (at + rng.uniform(-reach, reach, (3, 2))).astype(np.int32)
        shade = float(rng.uniform(.3, 1))
        if line:
            cv2.line(out, points[0].tolist(), (points[0] + (points[1] - points[0]) * 4).tolist(), shade, int(rng.integers(1, 3)))
        else:
            cv2.fillPoly(out, [points], shade)
    return out


def stretch(source, width, height, rotate_deg=0., flip=False):
    """A premultiplied picture from its levels, scaled to about width x height and turned; (h, w, 4) f32."""
    side = max(width, height)
    level = next((p for p in reversed(source) if p.shape[0] >= side), source[0])
    s = level.shape[0]
    a = np.deg2rad(rotate_deg)
    out = int(np.ceil(side * (abs(np.cos(a)) + abs(np.sin(a)))))
    kx, ky = width / s * (-1 if flip else 1), height / s
    m = np.array([[np.cos(a) * kx, -np.sin(a) * ky, 0], [np.sin(a) * kx, np.cos(a) * ky, 0]], np.float64)
    m[:, 2] = out / 2 - .5 - m[:, :2] @ np.array([(s - 1) / 2, (s - 1) / 2])
    return cv2.warpAffine(level, m, (out, out), flags=cv2.INTER_LINEAR)


class Canvas:
    def __init__(self, rng, w, h, held_out=False):
        self.rng, self.w, self.h = rng, w, h
        self.picture, self.background = background(rng, w, h, held_out)
        self.owner = np.zeros((h, w), np.uint8)
        self.things = []

    def free_place(self, w, h, zone=None, tries=12, gap=4):
        """Top left corner for a box that touches no other, or None. zone: (x0, y0, x1, y1) for the centre."""
        x0, y0, x1, y1 = zone or (0, 0, self.w, self.h)
        lo_x, hi_x = max(x0 - w / 2, 0), min(x1 - w / 2, self.w - w)
        lo_y, hi_y = max(y0 - h / 2, 0), min(y1 - h / 2, self.h - h)
        if hi_x < lo_x or hi_y < lo_y:
            return None
        for _ in range(tries):
            x, y = int(self.rng.uniform(lo_x, hi_x)), int(self.rng.uniform(lo_y, hi_y))
            if not any(x < bx + bw + gap and bx < x + w + gap and y < by + bh + gap and by < y + h + gap
                       for bx, by, bw, bh in (t.box for t in self.things)):
                return x, y
        return None

    def blend(self, patch, x, y, opaque=1.):
        """Draws a premultiplied patch with its corner at x, y (may hang over the edge); the ink's box, or None."""
        h, w = patch.shape[:2]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, self.w), min(y + h, self.h)
        if x1 <= x0 or y1 <= y0:
            return None
        cut = patch[y0 - y:y1 - y, x0 - x:x1 - x]
        alpha = cut[..., 3:] * (opaque / 255)
        region = self.picture[y0:y1, x0:x1]
        region *= 1 - alpha
        region += cut[..., :3] * opaque
        ink = cut[..., 3] > 90
        if not ink.any():
            return None
        self.owner[y0:y1, x0:x1][ink] = len(self.things) + 1
        ys, xs = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        return x0 + int(xs[0]), y0 + int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)

    def ink_colour(self, x, y, w, h, name=None, away=110):
        """A colour's name and value well apart from what is drawn in that box."""
        under = self.picture[max(y, 0):y + h:4, max(x, 0):x + w:4].reshape(-1, 3)
        for _ in range(20):
            n = name or COLOUR_NAMES[self.rng.integers(len(COLOUR_NAMES))]
            value = colour(self.rng, n)
            distance = np.abs(under - value).sum(1)
            if len(distance) and np.percentile(distance, 10) > away:
                return n, value
        return None, None

    def add_concept(self, library, index, size, zone=None, place=None, flip=None):
        rng = self.rng
        views = library.sprites[index]
        source = views[rng.integers(len(views))]
        squeeze = np.exp(rng.normal(0, .06))
        flip = rng.random() < .5 if flip is None else flip
        angle = float(rng.normal(0, 9)) if rng.random() < .6 else 0.
        patch = stretch(source, size * squeeze, size / squeeze, angle, flip)
        if rng.random() < .5:
            patch = tint(rng, patch)
        return self.put(patch, "concept", NOUNS[index], None, zone, place)

    def add_shape(self, library, name, size, colour_name=None, zone=None, place=None):
        rng = self.rng
        source = library.shapes[name][rng.integers(len(library.shapes[name]))]
        angle = float(rng.uniform(-10, 10)) if rng.random() < .4 else 0.
        patch = stretch(source, size, size, angle)
        h, w = patch.shape[:2]
        at = place or self.free_place(w, h, zone)
        if at is None:
            return None
        n, value = self.ink_colour(*at, w, h, colour_name)
        if n is None:
            return None
        patch[..., :3] = value * (patch[..., 3:] / 255)
        if rng.random() < .25 and size > 40:      # a darker or lighter rim
            rim = cv2.morphologyEx(patch[..., 3], cv2.MORPH_GRADIENT, np.ones((3, 3)))[..., None] / 255
            patch[..., :3] = patch[..., :3] * (1 - rim) + (0 if rng.random() < .7 else 255) * rim * patch[..., 3:] / 255
        return self.put(patch, "shape", name, n, zone, at)

    def add_text(self, library, text, capital_px, colour_name=None, zone=None, sign=None, font=None, place=None):
        rng = self.rng
        font = font or library.fonts[rng.integers(len(library.fonts))]
        mask, spans = font.line(text)
        scale = capital_px / font.capital_px
        size = max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale))
        alpha = cv2.resize(mask, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        h, w = alpha.shape
        at = place or self.free_place(w, h, zone)
        if at is None:
            return None
        x, y = at
        sign = rng.random() < .45 if sign is None else sign
        if sign:                                   # a coloured board under the string
            cv2.rectangle(self.picture, (x, y), (x + w - 1, y + h - 1),
                          colour(rng, COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]).tolist(), -1)
        n, value = self.ink_colour(x, y, w, h, colour_name or ("black" if rng.random() < .3 else None), 200)
        if n is None:
            n, value = self.ink_colour(x, y, w, h, colour_name, 200)
        if n is None:
            return None
        patch = np.dstack([value * (alpha[..., None] / 255), alpha[..., None]]).astype(np.float32)
        thing = self.put(patch, "text", text, n, None, at)
        if thing:
            top, tall = y + 12 * scale, capital_px
            thing.glyphs = [(c, x + gx * scale, top, gw * scale, tall) for c, gx, gw in spans]
        return thing

    def put(self, patch, kind, name, colour_name, zone, place):
        h, w = patch.shape[:2]
        at = place or self.free_place(w, h, zone)
        if at is None:
            return None
        box = self.blend(patch, *at)
        if box is None:
            return None
        self.things.append(Thing(kind, name, box, colour_name))
        return self.things[-1]

    def scene(self, worn=.5):
        """The finished picture; `worn` is how often it goes through blur, noise, light and JPEG."""
        rng, picture, plain = self.rng, self.picture, self.background
        if rng.random() < worn:
            picture = wear(rng, picture)
        picture = np.clip(picture + .5, 0, 255).astype(np.uint8)
        if rng.random() < worn * .3:
            ok, code = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(45, 95))])
            picture = cv2.imdecode(code, cv2.IMREAD_COLOR)
        if rng.random() < worn * .04:
            picture = np.repeat(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
            plain = None
            for t in self.things:
                t.colour = None
        return Scene(picture, self.things, self.owner, plain)


def tint(rng, patch):
    """Another hue, light and contrast, slightly: a drawing keeps its name."""
    out = patch.copy()
    gain = rng.uniform(.82, 1.15, 3) if rng.random() < .5 else rng.uniform(.75, 1.2)
    out[..., :3] = np.minimum(out[..., :3] * gain, out[..., 3:])
    return out


NOISE = np.random.default_rng(0).normal(0, 1, (1500, 1500, 3)).astype(np.float32)


def wear(rng, picture):
    h, w = picture.shape[:2]
    if rng.random() < .4:                          # scaled down and up again, as thumbnails and the global view are
        k = rng.uniform(.45, .9)
        small = cv2.resize(picture, (max(1, int(w * k)), max(1, int(h * k))), interpolation=cv2.INTER_AREA)
        picture = cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC if rng.random() < .5 else cv2.INTER_LINEAR)
    if rng.random() < .4:
        picture = (picture - 128) * rng.uniform(.75, 1.15) + 128 + rng.uniform(-18, 18)
    if rng.random() < .3:
        y, x = rng.integers(NOISE.shape[0] - h + 1), rng.integers(NOISE.shape[1] - w + 1)
        picture = picture + NOISE[y:y + h, x:x + w] * np.float32(rng.uniform(1, 9))
    return picture


def photo(rng, library, kind, w, h, augment=True):
    """A clothing photograph fitted as the server fits it (white beside it), cropped and lit at random when training."""
    source = library.photos[kind][rng.integers(len(library.photos[kind]))]
    sh, sw = source.shape[:2]
    if augment:
        if rng.random() < .5:
            source = source[:, ::-1]
        keep = rng.uniform(.65, 1) if rng.random() < .8 else 1.
        cw, ch = int(sw * keep * rng.uniform(.88, 1)), int(sh * keep * rng.uniform(.88, 1))
        x, y = rng.integers(sw - cw + 1), rng.integers(sh - ch + 1)
        source = source[y:y + ch, x:x + cw]
        sh, sw = source.shape[:2]
        if rng.random() < .3:
            angle = rng.normal(0, 12)
            m = cv2.getRotationMatrix2D((sw / 2, sh / 2), angle, 1 + abs(angle) / 60)
            source = cv2.warpAffine(np.ascontiguousarray(source), m, (sw, sh), borderMode=cv2.BORDER_REFLECT)
    k = min(w / sw, h / sh)
    nw, nh = max(1, round(sw * k)), max(1, round(sh * k))
    picture = np.full((h, w, 3), 255, np.float32)
    x, y = (w - nw) // 2, (h - nh) // 2
    picture[y:y + nh, x:x + nw] = cv2.resize(np.ascontiguousarray(source), (nw, nh), interpolation=cv2.INTER_AREA if k < 1 else cv2.INTER_LINEAR)
    if augment:
        if rng.random() < .6:
            picture[y:y + nh, x:x + nw] *= rng.uniform(.7, 1.25) * rng.uniform(.85, 1.15, 3).astype(np.float32)
        picture = wear(rng, picture) if rng.random() < .5 else picture
        if rng.random() < .08:
            picture = np.repeat(picture.mean(2, keepdims=True), 3, 2)
    owner = np.zeros((h, w), np.uint8)
    owner[y:y + nh, x:x + nw] = 1
    return Scene(np.clip(picture + .5, 0, 255).astype(np.uint8), [Thing("clothing", kind, (x, y, nw, nh))], owner, None)


# ---- what the tower is taught ----------------------------------------------------------------------------------

SAMPLE = 7  # px between the points at which a cell looks at who owns it


def labels(scene):
    """Per cell, row by row: object class, colour, character, its place, holds a centre (all i64, -1: not asked), and
    the box of its object as x, y, w, h in px (f32, NaN: none)."""
    h, w = scene.picture.shape[:2]
    rows, columns = h // CELL, w // CELL
    n = CELL // SAMPLE
    seen = scene.owner[SAMPLE // 2::SAMPLE, SAMPLE // 2::SAMPLE].reshape(rows, n, columns, n).transpose(0, 2, 1, 3)
    seen = seen.reshape(rows, columns, n * n)
    cover = np.stack([(seen == i).sum(2) for i in range(len(scene.things) + 1)])
    best = cover[1:].argmax(0) if scene.things else np.zeros((rows, columns), int)
    amount = cover[1:].max(0) if scene.things else np.zeros((rows, columns), int)
    names = np.zeros((rows, columns), np.int64)
    ink = np.full((rows, columns), COLOUR_NAMES.index(scene.background) if scene.background else -1, np.int64)
    character, place = np.zeros((2, rows, columns), np.int64)
    place -= 1
    centre = np.zeros((rows, columns), np.int64)
    box = np.full((rows, columns, 4), np.nan, np.float32)
    names[(amount > 0) & (amount < 5)] = -1
    ink[amount > 0] = -1
    for i, t in enumerate(scene.things):
        cx, cy = t.centre
        at = min(int(cy / CELL), rows - 1), min(int(cx / CELL), columns - 1)
        mine = (best == i) & (amount >= 5)
        mine[at] |= cover[1 + i][at] > 0 and best[at] == i
        names[mine] = t.class_index
        ink[mine] = COLOUR_NAMES.index(t.colour) if t.colour else -1
        box[mine] = t.box
        if t.kind != "clothing":
            centre[at] = 1
        if t.kind == "text":
            glyph_labels(t, character, place, names, rows, columns)
        elif t.kind == "clothing":
            centre[mine] = -1
    return names, ink, character, place, centre, box


def glyph_labels(text, character, place, names, rows, columns):
    """A cell is taught the character that covers most of it, and not asked where two share it evenly."""
    share = np.zeros((len(text.glyphs), rows, columns), np.float32)
    for k, (_, x, y, w, h) in enumerate(text.glyphs):
        overlap_x = np.clip(np.minimum(np.arange(columns) * CELL + CELL, x + w) - np.maximum(np.arange(columns) * CELL, x), 0, CELL)
        overlap_y = np.clip(np.minimum(np.arange(rows) * CELL + CELL, y + h) - np.maximum(np.arange(rows) * CELL, y), 0, CELL)
        share[k] = overlap_y[:, None] * overlap_x[None] / (min(CELL, w) * min(CELL, h))
    most, who = share.max(0), share.argmax(0)
    second = np.sort(share, 0)[-2] if len(share) > 1 else np.zeros_like(most)
    sure = (most > .45) & (most > second * 1.25)
    unsure = (most > .15) & ~sure
    index = np.array([CHARS.find(g[0].upper()) + 1 for g in text.glyphs])
    character[sure], place[sure] = index[who[sure]], np.minimum(who[sure], CHAR_PLACES - 1)
    character[unsure] = -1
    names[sure & (names <= 0)] = 1


def collage(rng, library, side, text=.26):
    """Many things of all kinds, close together: what the tower sees most. side: a multiple of 28 px; text: the share of
    places that hold writing."""
    if rng.random() < .16:
        return photo(rng, library, CLOTHES[rng.integers(len(CLOTHES))], side, side)
    canvas = Canvas(rng, side, side)
    if rng.random() < .6:
        return packed(rng, library, canvas, side, text)
    if rng.random() < .45:                         # one large thing, perhaps hanging over the edge
        size = rng.uniform(.55, 1.1) * side
        at = tuple(int(rng.uniform(-.15, .15) * side + (side - size) / 2) for _ in range(2))
        kind = rng.random()
        if kind < text:
            string = random_string(rng)
            canvas.add_text(library, string, min(size * .7, size / (.85 * len(string) + .25)), place=(max(0, at[0]), max(0, at[1])))
        elif kind < text + .8 * (1 - text):
            canvas.add_concept(library, rng.integers(len(CONCEPTS)), size, place=at)
        else:
            canvas.add_shape(library, SHAPES[rng.integers(len(SHAPES))], size, place=at)
        return canvas.scene()
    largest = rng.uniform(.3, .65) * side
    for _ in range(int(rng.integers(3, 3 + side // 10))):
        size = np.exp(rng.uniform(np.log(44), np.log(max(largest, 56))))
        kind = rng.random()
        if kind < .78 * (1 - text):
            canvas.add_concept(library, rng.integers(len(CONCEPTS)), size)
        elif kind < 1 - text:
            canvas.add_shape(library, SHAPES[rng.integers(len(SHAPES))], size * .8)
        else:
            capital = np.exp(rng.uniform(np.log(26), np.log(80)))
            canvas.add_text(library, random_string(rng), capital)
    return canvas.scene()


def packed(rng, library, canvas, side, text):
    """Things in every slot of a loose grid: the most labels for one pass through the tower."""
    n = max(1, round(side / 168 * (1, 2, 2, 3, 3)[rng.integers(5)]))
    slot = side / n
    for row in range(n):
        for column in range(n):
            kind, size = rng.random(), slot * rng.uniform(.72, 1.02)
            x, y = (int(k * slot + (slot - size) / 2 + rng.normal(0, slot * .06)) for k in (column, row))
            if kind < .8 * (.96 - text):
                canvas.add_concept(library, rng.integers(len(CONCEPTS)), size, place=(x, y))
            elif kind < .96 - text:
                canvas.add_shape(library, SHAPES[rng.integers(len(SHAPES))], size * .9, place=(x, y))
            elif kind < .96:
                string = random_string(rng, 2)
                capital = min(size * .7, size / (.85 * len(string) + .25))
                canvas.add_text(library, string, capital, place=(x, y))
    return canvas.scene()


def random_string(rng, longest=4):
    n = int(rng.integers(1, longest + 1))
    kind = rng.random()
    pool = CHARS[:10] if kind < .42 else CHARS[10:] if kind < .9 else CHARS
    return "".join(pool[rng.integers(len(pool))] for _ in range(n))
