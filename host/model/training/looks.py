"""Where the decoder should look. One attention head is taught to rest, at every noun and colour of a question, on the cells
of such things; two heads of the next layer, while answering, on the cells that the next word is about, the second on what
that is compared with; all on the separator before the global view where there is no such thing. Where things are counted,
that layer's third head and one of the next spread evenly over the things, in crops or the global view, and that separator, whose share
then tells the number; before that the last tokens of the question count a third of the picture each, for small numbers are
told apart more easily. And among the image tokens themselves, one head of every token of a crop on the first of its row, one
layer before it that one's on what precedes it, a separator or another crop: so they learn which crop they lie in.
Finding what a question names is what a small decoder learns last from answers alone; shown where it lies, it learns that
first. The shipped model keeps no trace of this but its weights."""
import re
from dataclasses import dataclass, replace
import torch
import torch.nn.functional as F
import questions as Q
import scenes as S
from model import rotate

QUESTIONS, ANSWERS, COUNTS = [(1, 2)], [(2, 0), (2, 1)], [(2, 2), (3, 2)]     # layer, head
STARTS, ROWS = (0, 0), (1, 0)
STRIPS, STRIP_HEAD = 3, COUNTS[0]                                           # of the picture, left to right
INPUTS = range(5)
CELL, APART = 28, 10 ** 5  # px
WORDS = {Q.PLURAL[n]: n for n in Q.PLURAL} | {n: n for n in [*Q.PLURAL, *S.CLOTHES, *S.COLOUR_NAMES, "text"]}
WORD = re.compile(r"\b(" + "|".join(sorted(map(re.escape, WORDS), key=len, reverse=True)) + r")\b")


def named(turn):
    """Nouns and colours of a question: (start, end, boxes of the things that they name)."""
    if turn.things is None:
        return []
    fits = lambda thing, word: word in (Q.noun(thing), thing.colour)
    return [(m.start(), m.end(), [[t.box for t in turn.things if fits(t, WORDS[m[0]])]]) for m in WORD.finditer(turn.question.lower())]


def spans(turn):
    """What the characters of an answer are about: (start, end, boxes for each head), the first that fits counts."""
    if turn.about is None:
        return []
    out, both = [], [*turn.about, *(turn.beside or [])]
    names = [Q.noun(t) for t in both]
    if turn.match == "yes-no" and turn.answer.startswith("No") and turn.beside is None:
        out.append((0, 3, [[], []]))               # "No, ...": what was asked for is not there
    for thing, name in zip(both, names):
        quoted = turn.answer.find(f'"{thing.name}"') if thing.kind == "text" else -1
        if quoted >= 0:
            out += [(quoted + 1 + k, quoted + 2 + k, [[glyph[1:]]] * 2) for k, glyph in enumerate(thing.glyphs)]
        if len(set(names)) == len(names):
            for words in (Q.phrase(thing), Q.phrase(thing, False), name):
                start = turn.answer.find(words)
                if start >= 0:
                    out.append((start, start + len(words), [[thing.box]] * 2))
                    break
    boxes = [[t.box for t in things] for things in (turn.about, turn.beside or turn.about)]
    if turn.category == "count":
        boxes.append(boxes[0])
    return out + [(0, len(turn.answer), boxes)]


@dataclass
class Grid:
    """Image tokens of one picture in a prefix, each row followed by one separator. A cell is as many px of the drawn picture
    wide and high as `cell` says; the pictures of one prompt lie side by side, `APART` px from one another."""
    first: int
    rows: int
    columns: int
    cell: tuple = (CELL, CELL)
    picture: int = 0

    def cells(self, box):
        """First and last row and column (excluded) of the cells whose middle lies in a box, at least one; None where it is
        of another picture."""
        x, y, w, h = box
        x -= self.picture * APART
        if not -APART / 2 < x < APART / 2:
            return None
        out = []
        for start, side, cell, n in ((y, h, self.cell[1], self.rows), (x, w, self.cell[0], self.columns)):
            low, high = (min(max(round(at / cell), 0), n) for at in (start, start + side))
            if low == high:
                low = min(max(int((start + side / 2) / cell), 0), n - 1)
            out += [low, max(high, low + 1)]
        return out


class Layout:
    """The grids of a prefix of `length` tokens; the last one of a picture shows the whole, behind a separator."""

    def __init__(self, length, *grids):
        self.length, self.grids, self.marked = length, grids, {}
        self.separators = [g.first - 1 for g in {g.picture: g for g in grids}.values()]

    def mark(self, boxes):
        """(length,) bool: the image tokens that show one of the boxes, in crops and global views; the separators before the
        global views where there are none."""
        key = tuple(boxes)
        if key not in self.marked:
            out = torch.zeros(self.length, dtype=torch.bool)
            out[self.separators] = not boxes
            for g in self.grids:
                grid = out[g.first:g.first + g.rows * (g.columns + 1)].view(g.rows, g.columns + 1)
                for top, bottom, left, right in filter(None, map(g.cells, boxes)):
                    grid[top:bottom, left:right] = True
            self.marked[key] = out
        return self.marked[key]


def in_second(thing):
    """A thing of the first picture as it would lie in the second."""
    return replace(thing, box=(thing.box[0] + APART, *thing.box[1:]), glyphs=[(c, x + APART, *rest) for c, x, *rest in thing.glyphs])


class Crops(torch.nn.Module):
    """Asks every image token of the crops, at the layer that answers look from, in which row and column of crops it lies: the
    tower cannot know that, only the order of tokens and separators tells. And the first ones of their rows, after one layer,
    whether their crop is the leftmost."""

    def __init__(self, hidden):
        super().__init__()
        self.out, self.leftmost = torch.nn.Linear(hidden, 8), torch.nn.Linear(hidden, 2)

    def loss(self, inputs, layout):
        """inputs {layer: (batch, positions, hidden)}"""
        first, rows, columns = layout.grids[0].first, layout.grids[0].rows, layout.grids[0].columns
        early, x = (F.rms_norm(inputs[k][:, first:first + rows * (columns + 1)], inputs[k].shape[-1:]).unflatten(1, (rows, columns + 1))[:, :, :columns]
                    for k in (STARTS[0] + 1, ANSWERS[0][0]))
        early = self.leftmost(early[:, :, ::12]).movedim(-1, 1)
        missed = F.cross_entropy(early, (torch.arange(columns // 12) == 0).long().expand(early[:, 0].shape))
        down, across = self.out(x).movedim(-1, 1).split(4, 1)
        row, column = torch.arange(rows) // 12, torch.arange(columns) // 12
        grid = (len(x), rows, columns)
        return missed + F.cross_entropy(down, row[None, :, None].expand(grid)) + F.cross_entropy(across, column[None, None].expand(grid))


class Letters(torch.nn.Module):
    """Asks the answers' positions inside quotation marks, at the layer that answers look from, the place in the string of the
    character that comes next: whoever does not know it cannot look for that character."""

    def __init__(self, hidden, prompts):
        super().__init__()
        self.out, self.quote = torch.nn.Linear(hidden, 8), prompts.encode('"')[-1]

    def loss(self, inputs, rows, layout):
        asked = [(i, position, k) for i, row in enumerate(rows) for position, k in self.places(row[1])]
        if not asked:
            return inputs.new_zeros(())
        i, position, place = torch.tensor(asked).T
        x = inputs[i, layout.length + position]
        return F.cross_entropy(self.out(F.rms_norm(x, x.shape[-1:])), place)

    def places(self, targets):
        """(position, place in its string) of what is said inside quotation marks, and of the closing mark."""
        out, place = [], None
        for position, target in enumerate(targets):
            if place is not None and target >= 0:
                out.append((position, min(place, 7)))
                place += 1
            if target == self.quote or target < 0:
                place = 0 if place is None and target >= 0 else None
        return out


class Facts(torch.nn.Module):
    """Asks the answers' positions, one layer after the heads that look, what they saw: where the thing lies, how far the two
    things that are compared lie apart, how many are counted, in the strips too; and one layer later once more, how many in all.
    What a linear map can read there, later layers can say."""

    def __init__(self, hidden):
        super().__init__()
        self.out, self.all = torch.nn.Linear(hidden, 4 + 7), torch.nn.Linear(hidden, 7)

    def loss(self, inputs, rows, layout):
        """inputs {layer: (batch, positions, hidden)}"""
        depth = ANSWERS[0][0] + 1
        asked = [(i, position, boxes) for i, row in enumerate(rows) for position, boxes in row[4]]
        if not asked:
            return inputs[depth].new_zeros(())
        total = self.number(inputs[depth + 1], [(i, position, boxes) for i, position, boxes in asked if len(boxes) == 3], layout)
        asked += [(i, position, [[], [], boxes]) for i, position, boxes in strips(rows, layout)]
        x = inputs[depth][torch.tensor([a[0] for a in asked]), layout.length + torch.tensor([a[1] for a in asked])]
        place, apart, number = self.out(F.rms_norm(x, x.shape[-1:])).split([2, 2, 7], -1)
        g = layout.grids[-1]
        size = g.cell[0] * g.columns, g.cell[1] * g.rows
        goals = zip(*(facts(boxes, size) for _, _, boxes in asked))
        where, between, counted = (torch.tensor(goal, dtype=kind) for goal, kind in zip(goals, (torch.float, torch.float, torch.long)))
        for said, goal in ((place, where), (apart, between)):
            known = ~goal[:, 0].isnan()
            if known.any():
                total = total + F.smooth_l1_loss(said[known], goal[known], beta=.1)
        return total + F.cross_entropy(number, counted, ignore_index=-1) if (counted >= 0).any() else total

    def number(self, inputs, asked, layout):
        if not asked:
            return inputs.new_zeros(())
        x = inputs[torch.tensor([a[0] for a in asked]), layout.length + torch.tensor([a[1] for a in asked])]
        return F.cross_entropy(self.all(F.rms_norm(x, x.shape[-1:])), torch.tensor([min(len(a[2][2]), 6) for a in asked]))


class Things(torch.nn.Module):
    """Asks the image tokens, where the heads that count look from, for a density: the exponential of one linear map, as an
    attention score is, that sums to one over the cells of every thing, in crops and the global view together, and to nothing
    elsewhere. A head whose score is this density shares itself evenly among things of any size."""
    LEAST = 20  # px of the global view: what is smaller is not asked for

    def __init__(self, hidden):
        super().__init__()
        self.out = torch.nn.ModuleList(torch.nn.Linear(hidden, 1) for _ in COUNTS)
        for out in self.out:
            torch.nn.init.zeros_(out.weight), torch.nn.init.constant_(out.bias, -3.)

    def loss(self, inputs, pictures, layout):
        """inputs {layer: (batch, positions, hidden)}, pictures: the things of each. The loss, and the share of pictures whose
        density sums to the number of their things."""
        g, total, right = layout.grids[-1], 0., []
        large = lambda t: min(t.box[2] / g.cell[0], t.box[3] / g.cell[1]) * CELL >= self.LEAST
        asked = [i for i, things in enumerate(pictures) if things and all(t.kind != "clothing" and large(t) for t in things)]
        if not asked:
            return inputs[0].new_zeros(()), right
        cells = torch.cat([torch.arange(g.first, g.first + g.rows * (g.columns + 1)) for g in layout.grids])
        most = max(len(pictures[i]) for i in asked)
        nowhere = torch.zeros(layout.length, dtype=torch.bool)
        wanted = torch.stack([torch.stack([layout.mark([t.box]) for t in pictures[i]] + [nowhere] * (most - len(pictures[i]))) for i in asked])
        wanted, number = wanted[..., cells].float(), torch.tensor([float(len(pictures[i])) for i in asked])
        for out, (depth, _) in zip(self.out, COUNTS):
            x = inputs[depth][asked][:, cells]
            density = out(F.rms_norm(x, x.shape[-1:])).clamp(max=2.).exp()
            each, there = (wanted @ density).squeeze(-1), wanted.any(-1)
            total = total + F.smooth_l1_loss(each[there], torch.ones(()).expand_as(each[there]), beta=.2)
            total = total + F.smooth_l1_loss(density.sum((1, 2)), number, beta=.3) / 2
            right.append((density.sum((1, 2)).round() == number).float().mean().item())
        return total / len(COUNTS), right


def strips(rows, layout):
    """What is counted in a strip: (row, position of the text, boxes)."""
    g = layout.grids[-1]
    strip = lambda box: min(max(int((box[0] + box[2] / 2) * STRIPS / (g.cell[0] * g.columns)), 0), STRIPS - 1)
    return [(i, position, [box for box in boxes if strip(box) == k]) for i, row in enumerate(rows) for position, k, boxes in row[6]]


def facts(boxes, size):
    """The middle of the one thing and the way from the second to the first, as shares of half a picture of that size, and
    the number counted; nan or -1 where that is not asked."""
    unknown, middle = (float("nan"), float("nan")), lambda box: [(2 * box[k] + box[2 + k]) / size[k] - 1 for k in (0, 1)]
    if len(boxes) == 3:
        return unknown, unknown, min(len(boxes[2]), 6)
    if len(boxes[0]) != 1 or len(boxes[1]) != 1:
        return unknown, unknown, -1
    one, other = middle(boxes[0][0]), middle(boxes[1][0])
    return (one, unknown, -1) if boxes[0] == boxes[1] else (unknown, (one[0] - other[0], one[1] - other[1]), -1)


def loss(model, inputs, at, mask, rows, layout):
    """What the heads miss of where they should look, as means: for questions, answers, counts and strips. inputs {layer: (batch,
    positions, hidden)}: what enters the layers; rows: of `Prompts`."""
    out = []
    for heads, part, columns, missed in ((QUESTIONS, 5, (0,), away), (ANSWERS, 4, (0, 1), away), (COUNTS, 4, (2, 2), uneven)):
        asked = [(i, position, boxes) for i, row in enumerate(rows) for position, boxes in row[part] if len(boxes) > columns[-1]]
        total = at.new_zeros((), dtype=torch.float)
        for (depth, head), column in zip(heads, columns):
            if asked:
                seen = attention(model, depth, head, inputs[depth], (at, mask, asked, layout.length))
                total = total + missed(seen, [boxes[column] for _, _, boxes in asked], layout) / len(heads)
        out.append(total)
    asked, (depth, head) = strips(rows, layout), STRIP_HEAD
    seen = attention(model, depth, head, inputs[depth], (at, mask, asked, layout.length)) if asked else None
    return [*out, uneven(seen, [boxes for _, _, boxes in asked], layout) if asked else at.new_zeros((), dtype=torch.float)]


def attention(model, depth, head, inputs, where):
    """Logarithms of what a head gives to the prefix, (asked, prefix). `where`: positions, mask, what is asked [(row, position
    of the text, boxes)], length of the prefix."""
    at, mask, asked, n = where
    query, key = query_and_key(model, depth, head, inputs, at)
    scores = query[:, n:] @ key.mT + mask[:, 0]
    return scores[[a[0] for a in asked], [a[1] for a in asked]].log_softmax(-1)[:, :n]


def query_and_key(model, depth, head, inputs, at):
    layer, rope = model.model.layers[depth], model.rope(at)
    weight = layer.self_attn.qkv_proj.weight.view(3, layer.self_attn.heads, -1, inputs.shape[-1])
    x = layer.input_layernorm(inputs)
    query, key = (rotate(F.linear(x, weight[j, head]), rope) for j in (0, 1))
    return query * query.shape[-1] ** -.5, key


def seams(model, inputs, at, layout):
    """What the tokens of the crops miss of looking at the first of their row in their crop, and those of looking at what
    comes before."""
    g, n = layout.grids[0], layout.length
    token = g.first + torch.arange(g.rows)[:, None] * (g.columns + 1) + torch.arange(g.columns)
    start = token[:, ::12].repeat_interleave(12, 1)
    out = []
    for (depth, head), asked, goal in ((STARTS, token[:, ::12], token[:, ::12] - 1), (ROWS, token, start)):
        asked, goal = asked.flatten(), goal.flatten()
        query, key = query_and_key(model, depth, head, inputs[depth][:, :n], at[:, :n])
        later = torch.arange(n) > asked[:, None]
        seen = (query[:, asked] @ key.mT).masked_fill(later, float("-inf")).log_softmax(-1)
        out.append(-seen.gather(-1, goal[None, :, None].expand(len(seen), -1, 1)).mean())
    return out


def away(seen, boxes, layout):
    """Minus the logarithm of the share that the marked tokens have."""
    wanted = torch.stack([layout.mark(b) for b in boxes])
    return -seen.masked_fill(~wanted, float("-inf")).logsumexp(-1).mean()


def uneven(seen, boxes, layout):
    """The divergence of the shares of each thing, wherever it shows, and of the separator from even ones; 0 where they are."""
    most = max(map(len, boxes))
    separator, none = layout.mark([]), torch.zeros(layout.length, dtype=torch.bool)
    wanted = torch.stack([torch.stack([separator] + [layout.mark([b]) for b in things] + [none] * (most - len(things))) for things in boxes])
    number = torch.tensor([1. + len(things) for things in boxes])
    share = seen[:, None].masked_fill(~wanted, float("-inf")).logsumexp(-1).masked_fill(~wanted.any(-1), 0)
    return -(share.sum(-1) / number + number.log()).mean()
