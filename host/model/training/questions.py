"""Questions about scenes with their answers, and the turns that need no picture.

Every answer has one plain form; questions have many. `accepted` is what an evaluation looks for in the answer, `rejected`
what makes it wrong all the same, `category` a row of its table."""
from dataclasses import dataclass, field
import scenes as S

NUMBERS = ["no", "one", "two", "three", "four", "five", "six"]
ZONES = [["at the top left", "at the top", "at the top right"], ["on the left", "in the center", "on the right"],
         ["at the bottom left", "at the bottom", "at the bottom right"]]
ARTICLE = {c[0]: c[1] for c in S.CONCEPTS}
PLURAL = {c[0]: c[2] for c in S.CONCEPTS}
GROUP = {c[0]: c[4] for c in S.CONCEPTS}
SHAPE_NOUN = {s: "arrow" if s.startswith("arrow") else s for s in S.SHAPES}
PLURAL |= {n: n + "es" if n == "cross" else n + "s" for n in set(SHAPE_NOUN.values())}
WORN = {"dress": "a dress", "hat": "a hat", "longsleeve": "a longsleeve", "outwear": "outwear", "pants": "pants", "shirt": "a shirt",
        "shoes": "shoes", "shorts": "shorts", "skirt": "a skirt", "t-shirt": "a t-shirt"}


@dataclass
class Turn:
    question: str
    answer: str
    category: str
    accepted: list
    match: str = "words"
    about: list | None = None      # the things that the answer is about, none of them or unknown, for `looks.py`
    beside: list | None = None     # what they are compared with
    things: list | None = None     # everything in the picture
    rejected: list = field(default_factory=list)
    then: "Turn | None" = None     # a question that is clear only after this one


def pick(rng, options):
    return options[rng.integers(len(options))]


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def noun(thing):
    return "text" if thing.kind == "text" else SHAPE_NOUN.get(thing.name, thing.name)


def phrase(thing, with_colour=True):
    """How an answer introduces a thing."""
    if thing.kind == "text":
        return f'the text "{thing.name}"'
    if thing.kind == "clothing":
        return WORN[thing.name]
    if thing.kind == "shape":
        return article(f"{thing.colour} {noun(thing)}" if thing.colour and with_colour else noun(thing))
    return f"{ARTICLE[thing.name]} {thing.name}"


def listed(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def zone(thing, frame):
    x0, y0, w, h = frame
    cx, cy = thing.centre
    return ZONES[min(int((cy - y0) / h * 3), 2)][min(int((cx - x0) / w * 3), 2)]


def near_border(thing, frame, slack=.05):
    """Whether the centre lies so near the line between two zones that either name would do."""
    x0, y0, w, h = frame
    cx, cy = thing.centre
    return any(abs((c - o) / s - k / 3) < slack for c, o, s in ((cx, x0, w), (cy, y0, h)) for k in (1, 2))


DESCRIBE = ["What do you see in this image?", "What do you see?", "Describe the image.", "Describe this picture.", "What is in this image?",
            "What is in the picture?", "What's in the picture?", "What's in this image?", "What does this picture show?", "What is shown in this image?",
            "What is shown here?", "Tell me what you see.", "Describe what you see.", "What can you see in this picture?", "What does the image show?",
            "Please describe the image.", "Can you describe this image?", "What can be seen here?", "Describe this image in one sentence.",
            "What objects are in this image?", "List the objects in the picture."]
WHAT = ["What is this?", "What's this?", "What is that?", "What is it?", "What is this a picture of?", "What object is this?", "Name this object.",
        "Name the object.", "Which object is shown?", "What is the object in the image?", "What thing is in this picture?", "What am I looking at?",
        "Can you tell me what this is?", "Identify the object.", "What kind of object is this?"]
WEAR = ["What kind of clothing is this?", "What piece of clothing is this?", "What clothing is shown?", "Which garment is this?", "What garment is this?",
        "What type of clothes are these?", "What is this item of clothing?"]
READ = ["What does it say?", "Read the text.", "What text is in the image?", "What is written here?", "What does the text say?", "What is the text?",
        "What is written in the picture?", "Please read the text.", "Can you read this?", "What does the sign say?", "Read this.", "What text do you see?",
        "What letters or digits are shown?", "What is written?"]
READ_DIGITS = ["What number is this?", "What number is shown?", "Which number do you see?", "What is the number?", "Read the number.", "What digits are shown?"]
READ_LETTERS = ["What letters are shown?", "Which letters do you see?", "What word is this?", "What are the letters?", "Read the letters."]


def longer(names):
    """Nouns that hold one of these as a word: who says "palm tree" has not said "tree"."""
    every = [*S.NOUNS, *S.CLOTHES, *set(SHAPE_NOUN.values())]
    return sorted({m for m in every for n in names if m != n and n in m.replace("-", " ").split() and m not in names})


def describe(rng, things, frame):
    things = sorted(things, key=lambda t: t.centre[0])
    question = pick(rng, DESCRIBE if len(things) != 1 or rng.random() < .5 else WHAT)
    return Turn(question, shown(things), "describe", [noun(t) if t.kind != "text" else t.name for t in things], "all", things,
                rejected=longer([noun(t) for t in things if t.kind != "text"]))


def shown(things):
    if len(things) == 1:
        t = things[0]
        if t.kind == "text":
            return f"This is {phrase(t)}."
        return f"This is {'a photo of ' if t.kind == 'clothing' else ''}{phrase(t)}."
    return f"I see {listed([phrase(t) for t in things])}."


def name_single(rng, t, frame):
    if t.kind == "clothing":
        return Turn(pick(rng, WEAR + WHAT + DESCRIBE), shown([t]), "clothing", [t.name], about=[t], rejected=longer([t.name]))
    if t.kind == "text":
        return read(rng, t)
    if t.kind == "shape":
        q = pick(rng, ["What shape is this?", "Which shape is shown?", "What shape is it?", "What shape do you see?", "Name the shape.",
                       "What is the shape?", "What kind of shape is this?"])
        return Turn(q, f"It is {phrase(t, False)}.", "shape", [noun(t)], about=[t])
    return Turn(pick(rng, WHAT + DESCRIBE), shown([t]), "name", [t.name], about=[t], rejected=longer([t.name]))


def read(rng, t):
    pool = READ + (READ_DIGITS if t.name.isdigit() else READ_LETTERS if t.name.isalpha() else [])
    return Turn(pick(rng, pool), f'It says "{t.name}".', "read", [t.name], "text", [t])


def coloured(rng, t, things):
    n = noun(t)
    if rng.random() < .35:
        same = [o for o in things if o.colour == t.colour]
        if len(same) == 1 and t.kind == "shape":
            q = pick(rng, [f"What is {t.colour}?", f"Which object is {t.colour}?", f"What shape is {t.colour}?", f"Which shape is {t.colour}?"])
            return Turn(q, f"The {n} is {t.colour}.", "colour", [n], about=[t])
    if rng.random() < .3:
        asked = t.colour if rng.random() < .5 else pick(rng, [c for c in S.COLOUR_NAMES if c != t.colour])
        yes = asked == t.colour
        q = pick(rng, [f"Is the {n} {asked}?", f"Is this {n} {asked}?"])
        return Turn(q, f"Yes, the {n} is {asked}." if yes else f"No, the {n} is {t.colour}.", "yes-no", ["yes" if yes else "no"], "yes-no", [t])
    q = pick(rng, [f"What color is the {n}?", f"What colour is the {n}?", f"Which color is the {n}?", f"What is the color of the {n}?",
                   f"Tell me the color of the {n}.", f"Which colour does the {n} have?"])
    return Turn(q, f"The {n} is {t.colour}.", "colour", [t.colour], about=[t])


def backdrop(rng, name):
    q = pick(rng, ["What color is the background?", "What colour is the background?", "What is the background color?", "Which color is the background?",
                   "What is the color of the background?"])
    return Turn(q, f"The background is {name}.", "colour", [name])


def exists(rng, things, near=None):
    """Is there a ...? As often yes as no; what is missing is often something alike."""
    present = {noun(t) for t in things if t.kind in ("concept", "shape")}
    if present and rng.random() < .5:
        asked, yes = pick(rng, sorted(present)), True
    else:
        groups = {GROUP.get(p) for p in present}
        pool = [n for n in S.NOUNS if n not in present and (GROUP[n] in groups or rng.random() < .2)] or S.NOUNS
        shapes = sorted(set(SHAPE_NOUN.values()) - present)
        asked, yes = pick(rng, shapes if rng.random() < .25 else [n for n in pool if n not in present]), False
    a = article(asked)
    q = pick(rng, [f"Is there {a} in the image?", f"Is there {a}?", f"Do you see {a}?", f"Can you see {a} in this picture?", f"Does the image show {a}?",
                   f"Is {a} in the picture?", f"Is there {a} in this picture?", f"Does this picture contain {a}?"])
    return Turn(q, f"Yes, I see {a}." if yes else f"No, I do not see {a}.", "yes-no", ["yes" if yes else "no"], "yes-no",
                [t for t in things if noun(t) == asked])


def is_it(rng, t):
    """Is this a ...? about the only thing there."""
    n = noun(t) if t.kind != "clothing" else t.name
    pool = S.NOUNS if t.kind == "concept" else sorted(set(SHAPE_NOUN.values())) if t.kind == "shape" else S.CLOTHES
    alike = [m for m in pool if m != n and (t.kind != "concept" or GROUP[m] == GROUP[n] or rng.random() < .2)]
    yes = rng.random() < .5
    asked = n if yes else pick(rng, alike or [m for m in pool if m != n])
    a = WORN.get(asked) or article(asked)
    is_ = WORN.get(n) or article(n)
    return Turn(pick(rng, [f"Is this {a}?", f"Is it {a}?", f"Does this show {a}?", f"Is that {a}?"]),
                f"Yes, this is {a}." if yes else f"No, this is {is_}.", "yes-no", ["yes" if yes else "no"], "yes-no", [t])


def count(rng, things, frequent=0.):
    nouns = [noun(t) for t in things if t.kind in ("concept", "shape")]
    if not nouns:
        return None
    if rng.random() < .25 and all(t.kind in ("concept", "shape") for t in things):
        n = len(things)
        q = pick(rng, ["How many objects are there?", "How many things are in the picture?", "How many objects do you see?", "Count the objects."])
        return Turn(q, "There is one object." if n == 1 else f"There are {NUMBERS[n]} objects.", "count", [NUMBERS[n], str(n)], about=things)
    if rng.random() < .1:
        asked = pick(rng, [n for n in S.NOUNS if n not in nouns])
    else:
        asked = pick(rng, nouns if frequent and rng.random() < frequent else sorted(set(nouns)))
    n, many = nouns.count(asked), PLURAL[asked]
    q = pick(rng, [f"How many {many} are there?", f"How many {many} do you see?", f"How many {many} are in the picture?", f"Count the {many}.",
                   f"How many {many} can you see?", f"What is the number of {many}?"])
    said = f"There are no {many}." if n == 0 else f"There is one {asked}." if n == 1 else f"There are {NUMBERS[n]} {many}."
    return Turn(q, said, "count", [NUMBERS[n], str(n)], about=[t for t in things if noun(t) == asked])


def where(rng, t, frame):
    n = noun(t)
    z = zone(t, frame)
    q = pick(rng, [f"Where is the {n}?", f"Where is the {n} in the image?", f"Where do you see the {n}?", f"In which part of the picture is the {n}?",
                   f"Where can I find the {n}?", f"What is the position of the {n}?"])
    words = z.split()
    accepted = [" ".join(words[2:])] + (["middle", "centre"] if words[-1] == "center" else [])
    others = [w for w in ("top", "bottom", "left", "right", "center", "middle") if w not in words and w not in accepted]
    return Turn(q, f"The {n} is {z}.", "position", accepted, about=[t], rejected=others)


IT = ["Where is it?", "And where is it?", "Where is it in the picture?"]
ITS = ["What color is it?", "What colour is it?", "And its color?", "Which color does it have?"]


def follow_up(rng, turn, frame):
    """A question about the one thing that a turn's answer names, which does not name it again; None where there is none."""
    if len(turn.about or []) != 1 or turn.beside or (turn.match == "yes-no" and not turn.answer.startswith("Yes, I see")):
        return None
    t = turn.about[0]
    if t.kind == "clothing" or noun(t) not in turn.answer or sum(noun(o) == noun(t) for o in turn.things) != 1:
        return None
    if t.colour and t.kind == "shape" and rng.random() < .5:
        then = Turn(pick(rng, ITS), f"The {noun(t)} is {t.colour}.", "colour", [t.colour], about=[t])
    elif near_border(t, frame):
        return None
    else:
        then = where(rng, t, frame)
        then.question = pick(rng, IT)
    then.things = turn.things
    return then if then.answer != turn.answer else None


def not_there(rng, things):
    present = {noun(t) for t in things}
    n = pick(rng, [m for m in S.NOUNS if m not in present])
    q = pick(rng, [f"Where is the {n}?", f"What color is the {n}?"])
    return Turn(q, f"I do not see {article(n)}.", "describe", ["not"], about=[])


def relation(rng, a, b, frame):
    """Left, right, above, below of two things well apart on that axis; None where they are not. Who asks without naming the
    axis is told the one on which they lie further apart, and not asked about where both would do."""
    (ax, ay), (bx, by) = a.centre, b.centre
    gaps = abs(bx - ax), abs(by - ay)
    axes = [k for k in (0, 1) if gaps[k] >= .107 * max(frame[2:])]
    if not axes or noun(a) == noun(b):
        return None
    form, axis = rng.random(), pick(rng, axes)
    free = form > .85
    if free:
        axis = int(gaps[1] > gaps[0])
        if gaps[1 - axis] > .75 * gaps[axis]:
            return None
    first, second = (a, b) if a.centre[axis] < b.centre[axis] else (b, a)   # first is left of, or above, second
    near, far = ("left", "right") if axis == 0 else ("top", "bottom")
    one, other = noun(first), noun(second)
    things = {one: first, other: second}
    if form < .3:
        side, n = (near, one) if rng.random() < .5 else (far, other)
        at = f"on the {side}" if axis == 0 else f"at the {side}"
        q = pick(rng, [f"What is {at}?", f"Which object is {at}?", f"What do you see {at}?", f"What thing is {at}?"])
        return Turn(q, f"The {n} is {at}.", "position", [n], about=[things[n]])
    words = ("left of", "right of") if axis == 0 else ("above", "below")
    swap = rng.random() < .5
    x, y = (other, one) if swap else (one, other)
    true = words[1] if swap else words[0]
    if form < .55:
        asked = pick(rng, words)
        yes = asked == true
        q = pick(rng, [f"Is the {x} {asked} the {y}?", f"Is the {x} {'to the ' if axis == 0 else ''}{asked} the {y}?"])
        return Turn(q, f"Yes, the {x} is {true} the {y}." if yes else f"No, the {x} is {true} the {y}.", "yes-no", ["yes" if yes else "no"], "yes-no",
                    [things[x]], [things[y]])
    if form < .7:
        q = pick(rng, [f"What is {true} the {y}?", f"Which object is {true} the {y}?"])
        return Turn(q, f"The {x} is {true} the {y}.", "position", [x], about=[things[y]], beside=[things[x]])
    q = f"Where is the {x} relative to the {y}?" if free else f"Is the {x} {words[0]} or {words[1]} the {y}?"
    accepted = [true.split()[0]]
    if free and len(axes) == 2:                    # the other axis is true as well
        k, before = 1 - axis, things[x].centre[1 - axis] < things[y].centre[1 - axis]
        accepted.append((("left", "right"), ("above", "below"))[k][0 if before else 1])
    return Turn(q, f"The {x} is {true} the {y}.", "position", accepted, about=[things[x]], beside=[things[y]])


def bigger(rng, a, b):
    sizes = [t.box[2] * t.box[3] for t in (a, b)]
    if noun(a) == noun(b) or max(sizes) < 1.6 * min(sizes):
        return None
    largest, least = (a, b) if sizes[0] > sizes[1] else (b, a)
    big, small = noun(largest), noun(least)
    one, other = (big, small) if rng.random() < .5 else (small, big)
    if rng.random() < .5:
        q = pick(rng, ["Which object is bigger?", "Which is bigger?", f"Which is bigger, the {one} or the {other}?", "What is larger?"])
        return Turn(q, f"The {big} is bigger.", "size", [big], about=[largest], beside=[least])
    q = pick(rng, ["Which object is smaller?", "Which is smaller?", f"Which is smaller, the {one} or the {other}?"])
    return Turn(q, f"The {small} is smaller.", "size", [small], about=[least], beside=[largest])


def points(rng, t):
    way = t.name.split()[1]
    q = pick(rng, ["Which way does the arrow point?", "Where does the arrow point?", "In which direction does the arrow point?",
                   "What direction is the arrow pointing?", "Which direction does the arrow show?"])
    return Turn(q, f"The arrow points {way}.", "position", [way], about=[t])


def turns(rng, scene, frame, n, frequent=0.):
    """Up to n different turns about one picture. frame: x, y, w, h of the picture inside its padding; `frequent`: how often what is
    counted is a thing of the picture, of which the frequent come up more often, and not one of its names."""
    things = scene.things
    kinds = {noun(t): [o for o in things if noun(o) == noun(t)] for t in things}
    unique = [v[0] for v in kinds.values() if len(v) == 1]
    drawn = [t for t in things if t.kind in ("concept", "shape")]
    texts = [t for t in things if t.kind == "text"]
    makers = []
    if len({noun(t) for t in things}) == len(things) and 0 < len(things) <= 4:
        makers += [(3 if len(things) > 1 else 1.5, lambda: describe(rng, things, frame))]
    if len(things) == 1:
        makers += [(2, lambda: name_single(rng, things[0], frame))]
        if things[0].kind != "text":
            makers += [(3, lambda: is_it(rng, things[0]))]
    if len(texts) == 1:
        makers += [(6, lambda: read(rng, texts[0]))]
    if drawn or rng.random() < .2:
        makers += [(2.5, lambda: exists(rng, things))]
    if drawn:
        heaped = len(drawn) > len(kinds)
        makers += [(8 if heaped else .8, lambda: count(rng, things, frequent)), (.25, lambda: not_there(rng, things))]
    if not texts and drawn and rng.random() < .3:
        makers += [(.6, lambda: Turn(pick(rng, READ), "I see no text.", "read", ["no text"], about=[]))]
    inked = [t for t in unique if t.colour and (t.kind == "shape" or t.kind == "text")]
    if inked:
        makers += [(2.5, lambda: coloured(rng, pick(rng, inked), things))]
    if scene.background and drawn:
        makers += [(.5, lambda: backdrop(rng, scene.background))]
    placed = [t for t in unique if t.kind != "clothing" and not near_border(t, frame)]
    if placed:
        makers += [(3, lambda: where(rng, pick(rng, placed), frame))]
    arrows = [t for t in unique if t.kind == "shape" and t.name.startswith("arrow")]
    if arrows:
        makers += [(1, lambda: points(rng, arrows[0]))]
    pairs = [t for t in unique if t.kind != "clothing"]
    if len(pairs) >= 2:
        def two():
            i, j = rng.permutation(len(pairs))[:2]
            return pairs[i], pairs[j]
        if len(pairs) == len(things) == 2:
            makers += [(7, lambda: relation(rng, *two(), frame)), (.6, lambda: bigger(rng, *two()))]
        else:
            makers += [(6, lambda: named_relation(rng, *two(), frame))]
    out, asked = [], set()
    weights = [w for w, _ in makers]
    for _ in range(4 * n):
        if len(out) == n or not makers:
            break
        k = rng.choice(len(makers), p=[w / sum(weights) for w in weights])
        turn = makers[k][1]()
        if turn and turn.question not in asked:
            asked.add(turn.question)
            turn.things = things
            out.append(vary(rng, turn))
    return out


def named_relation(rng, a, b, frame):
    """A relation that names both, for pictures with more than two things."""
    for _ in range(6):
        turn = relation(rng, a, b, frame)
        if turn is None:
            return None
        if noun(a) in turn.question and noun(b) in turn.question:
            return turn
    return None


def vary(rng, turn):
    """Questions as people type them: without the mark, in small letters, with a please."""
    q, r = turn.question, rng.random()
    if r < .12:
        q = q.rstrip("?.")
    if .08 < r < .2:
        q = q[0].lower() + q[1:]
    if r > .96:
        q = f"Please answer: {q}" if r > .98 else f"Look at the image. {q}"
    turn.question = q
    return turn


def small(rng, t, things, frame, of):
    """About a small thing in a large picture: the only one, or one of several told apart by where they lie."""
    if of > 1:
        x0, y0, w, h = frame
        (cx, cy), square = t.centre, w == h
        side = ("left" if cx < x0 + w / 2 else "right") if w >= h else ""
        end = ("top" if cy < y0 + h / 2 else "bottom") if h >= w else ""
        at = (f"at the {end} {side}" if square else f"on the {side}" if side else f"at the {end}")
        if t.kind == "text":
            q = pick(rng, [f"What does it say {at}?", f"What is written {at}?", f"Read the text {at}.", f"What text is {at}?"])
            return Turn(q, f'It says "{t.name}".', "detail", [t.name], "text", [t])
        q = pick(rng, [f"What is {at}?", f"What do you see {at}?", f"Which object is {at}?", f"What thing is {at}?", f"What small object is {at}?"])
        return Turn(q, f"The {noun(t)} is {at}.", "detail", [noun(t)], about=[t])
    if t.kind == "text":
        turn = read(rng, t)
        turn.category = "detail"
        return turn
    if sum(noun(o) == noun(t) for o in things) != 1:
        return None
    if t.colour and rng.random() < .4:
        return coloured(rng, t, things)
    q = pick(rng, ["What is the small object?", "What is the smallest object?", "What small thing do you see?", "What is the tiny thing?", "Name the small object."])
    return Turn(q, f"The small object is {phrase(t, False)}.", "detail", [noun(t)], about=[t])


# ---- two pictures ---------------------------------------------------------------------------------------------

def compare(rng, a, b):
    """A turn about two pictures that hold one thing each."""
    x, y = phrase(a), phrase(b)
    nx, ny = noun(a), noun(b)
    form, first = rng.random(), rng.random() < .5
    nth, one, n = ("first", a, nx) if first else ("second", b, ny)
    if form < .3:
        q = pick(rng, ["What is different?", "What is the difference between the two images?", "What differs between the images?", "Compare the two images.",
                       "How do the images differ?", "What do the two images show?", "Describe both images."])
        answer = f"Both images show {x}." if x == y else f"The first image shows {x} and the second image shows {y}."
        turn = Turn(q, answer, "two-image", [nx, ny] if nx != ny else [nx], "all", [a], [b])
        if nx != ny:                               # both named, but the other way round
            turn.rejected = [f"first image shows {y}", f"second image shows {x}"]
    elif form < .7 and nx != ny:
        q = pick(rng, [f"Which image shows {article(n)}?", f"In which image is the {n}?", f"Which picture shows {article(n)}?",
                       f"Where is the {n}, in the first or the second image?"])
        turn = Turn(q, f"The {nth} image shows {article(n)}.", "two-image", [nth], about=[one])
    elif form < .85:
        q = pick(rng, ["Do both images show the same thing?", "Are the two images the same?", "Is it the same object in both images?"])
        answer = f"Yes, both images show {article(nx)}." if nx == ny else f"No, the first image shows {article(nx)} and the second image shows {article(ny)}."
        turn = Turn(q, answer, "two-image", ["yes" if nx == ny else "no"], "yes-no", [a], [b])
    else:
        q = pick(rng, [f"What is in the {nth} image?", f"What does the {nth} image show?", f"What is in image {1 if first else 2}?"])
        turn = Turn(q, f"The {nth} image shows {x if first else y}.", "two-image", [n], about=[one])
    turn.things = [a, b]
    return vary(rng, turn)


# ---- no picture -----------------------------------------------------------------------------------------------

I_AM = "I am a small demo model. I answer simple questions about pictures."
I_CAN = "I can name simple objects, shapes, colors, positions and short text in pictures."
CANNOT = "I cannot know that from the picture."
NO_PICTURE = "I do not see a picture. Please send one."
ONLY = "I cannot do that. I only answer simple questions about pictures."
TALK = [
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?", "Are you ChatGPT?", "Which model are you?", "Introduce yourself."],
     I_AM, ["demo model"]),
    (["What can you do?", "How can you help me?", "Help", "What can I ask you?", "What are you good at?", "What do you know?", "How do I use you?"], I_CAN, ["name simple objects"]),
    (["Hello", "Hi", "Hello!", "Hi there", "Hey", "Good morning", "Good evening", "Hello, how are you?", "How are you?"], "Hello! Send me a picture and ask about it.", ["hello"]),
    (["Thanks", "Thank you", "Thank you!", "Thanks a lot", "Great, thanks", "Thank you very much"], "You are welcome.", ["welcome"]),
    (["Bye", "Goodbye", "See you", "Bye bye", "Good night"], "Goodbye!", ["goodbye"]),
    (["Write a poem.", "Tell me a joke.", "Write a story about the sea.", "What is the capital of France?", "Who is the president?", "Translate this to German.",
      "Write a Python program.", "What is 2 plus 2?", "Summarize this text.", "Explain gravity.", "What is the weather today?", "Sing a song."], ONLY, ["cannot"]),
]
UNKNOWABLE = ["Who made this picture?", "When was this picture taken?", "Who is the owner?", "What is the name of the artist?", "How much does it cost?", "What time is it?",
              "Why is it here?", "Where was this picture taken?", "What will happen next?", "How old is it?", "What does it smell like?", "What is behind it?",
              "Which city is this?", "What is the price?", "What is it thinking?", "How heavy is it?"]


def talk(rng, topic=None):
    """A turn without a picture; `topic`: which of TALK, or what a picture would answer, the last."""
    if topic is None:
        topic = len(TALK) if rng.random() < .25 else rng.integers(len(TALK))
    if topic == len(TALK):
        return vary(rng, Turn(pick(rng, DESCRIBE + WHAT + READ), NO_PICTURE, "text-only", ["send one"]))
    questions, answer, accepted = TALK[topic]
    return vary(rng, Turn(pick(rng, questions), answer, "text-only", accepted))


def talk_beside(rng):
    """A turn that the picture does not answer."""
    if rng.random() < .6:
        return vary(rng, Turn(pick(rng, UNKNOWABLE), CANNOT, "cannot-know", ["cannot"]))
    questions, answer, accepted = TALK[rng.integers(len(TALK))]
    if answer.startswith("Hello"):
        questions, answer, accepted = TALK[0]
    return vary(rng, Turn(pick(rng, questions), answer, "text-only", accepted))
