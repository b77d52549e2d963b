"""Where the decoder should look. One attention head is taught to rest, at every noun and colour of a question, on the cells
of such things; two heads of the next layer, while answering, on the cells that the next word is about, the second on what
that is compared with; all on the first token where there is no such thing. Where things are counted, that layer's third head
and one of the next spread evenly over the things in the global view and the first token, whose share then tells the number.
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
INPUTS = range(1, 4)
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
    """The grids of a prefix of `length` tokens; the last one shows the whole picture."""

    def __init__(self, length, *grids):
        self.length, self.grids, self.marked = length, grids, {}

    def mark(self, boxes, whole=False):
        """(length,) bool: the image tokens that show one of the boxes, in the last grid only if `whole`; the first token of
        all where there are none."""
        key = whole, *boxes
        if key not in self.marked:
            out = torch.zeros(self.length, dtype=torch.bool)
            out[0] = not boxes
            for g in self.grids[-1:] if whole else self.grids:
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
    tower cannot know that, only the order of tokens and separators tells."""

    def __init__(self, hidden):
        super().__init__()
        self.out = torch.nn.Linear(hidden, 8)

    def loss(self, inputs, layout):
        first, rows, columns = layout.grids[0].first, layout.grids[0].rows, layout.grids[0].columns
        x = F.rms_norm(inputs[:, first:first + rows * (columns + 1)], inputs.shape[-1:]).unflatten(1, (rows, columns + 1))[:, :, :columns]
        down, across = self.out(x).movedim(-1, 1).split(4, 1)
        row, column = torch.arange(rows) // 12, torch.arange(columns) // 12
        grid = (len(x), rows, columns)
        return F.cross_entropy(down, row[None, :, None].expand(grid)) + F.cross_entropy(across, column[None, None].expand(grid))


class Facts(torch.nn.Module):
    """Asks the answers' positions, one layer after the heads that look, what they saw: where the thing lies, how far the two
    things that are compared lie apart, how many are counted. What a linear map can read there, later layers can say."""

    def __init__(self, hidden):
        super().__init__()
        self.out = torch.nn.Linear(hidden, 4 + 7)

    def loss(self, inputs, rows, layout):
        asked = [(i, position, boxes) for i, row in enumerate(rows) for position, boxes in row[4]]
        if not asked:
            return inputs.new_zeros(())
        x = inputs[torch.tensor([a[0] for a in asked]), layout.length + torch.tensor([a[1] for a in asked])]
        place, apart, number = self.out(F.rms_norm(x, x.shape[-1:])).split([2, 2, 7], -1)
        g = layout.grids[-1]
        size = g.cell[0] * g.columns, g.cell[1] * g.rows
        goals = zip(*(facts(boxes, size) for _, _, boxes in asked))
        where, between, counted = (torch.tensor(goal, dtype=kind) for goal, kind in zip(goals, (torch.float, torch.float, torch.long)))
        total = inputs.new_zeros(())
        for said, goal in ((place, where), (apart, between)):
            known = ~goal[:, 0].isnan()
            if known.any():
                total = total + F.smooth_l1_loss(said[known], goal[known], beta=.1)
        return total + F.cross_entropy(number, counted, ignore_index=-1) if (counted >= 0).any() else total


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
    """What the heads miss of where they should look, as means: for questions, answers and counts. inputs {layer: (batch,
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
    return out


def attention(model, depth, head, inputs, where):
    """Logarithms of what a head gives to the prefix, (asked, prefix). `where`: positions, mask, what is asked [(row, position
    of the text, boxes)], length of the prefix."""
    at, mask, asked, n = where
    layer, rope = model.model.layers[depth], model.rope(at)
    weight = layer.self_attn.qkv_proj.weight.view(3, layer.self_attn.heads, -1, inputs.shape[-1])
    x = layer.input_layernorm(inputs)
    query, key = (rotate(F.linear(x, weight[j, head]), rope) for j in (0, 1))
    scores = query[:, n:] @ key.mT * query.shape[-1] ** -.5 + mask[:, 0]
    return scores[[a[0] for a in asked], [a[1] for a in asked]].log_softmax(-1)[:, :n]


def away(seen, boxes, layout):
    """Minus the logarithm of the share that the marked tokens have."""
    wanted = torch.stack([layout.mark(b) for b in boxes])
    return -seen.masked_fill(~wanted, float("-inf")).logsumexp(-1).mean()


def uneven(seen, boxes, layout):
    """The divergence of the shares of each thing in the global view and of the first token from even ones; 0 where they are."""
    most = max(map(len, boxes))
    first, none = layout.mark([]), torch.zeros(layout.length, dtype=torch.bool)
    wanted = torch.stack([torch.stack([first] + [layout.mark([b], True) for b in things] + [none] * (most - len(things))) for things in boxes])
    number = torch.tensor([1. + len(things) for things in boxes])
    share = seen[:, None].masked_fill(~wanted, float("-inf")).logsumexp(-1).masked_fill(~wanted.any(-1), 0)
    return -(share.sum(-1) / number + number.log()).mean()
