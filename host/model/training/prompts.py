"""Token ids of prompts as the server assembles them, and training sequences of several turns about one picture.

`<|user|>\\n<|image_1|>\\nQUESTION<|end|>\\n<|assistant|>\\n`: the text is cut at the image tags and every piece is encoded on
its own with BOS in front (spec of the real processor)."""
import torch
from looks import STRIPS, named, spans
from tokenizers import Tokenizer

IGNORE = -100


class Prompts:
    def __init__(self, path):
        self.tokenizer = Tokenizer.from_file(str(path))
        self.end = self.tokenizer.token_to_id("<|end|>")

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def before(self, image):
        """Ids in front of image `image` (0, 1, ...)."""
        return [1] + self.encode("<|user|>\n" if image == 0 else "\n")

    def opening(self, turn, images):
        """Ids from the last image (or the beginning) to where the answer starts, and looks: (index, boxes for each head)."""
        ids, looks = self.question("\n" if images else "<|user|>\n", turn)
        return [1] + ids, [(k + 1, boxes) for k, boxes in looks]

    def next(self, turn):
        """The same between one answer's <|end|> and the next answer."""
        return self.question("\n<|user|>\n", turn)

    def question(self, before, turn):
        coded = self.tokenizer.encode(before + turn.question + "<|end|>\n<|assistant|>\n", add_special_tokens=False)
        about, n = named(turn), len(before)
        return coded.ids, [(k, boxes) for k, (start, end) in enumerate(coded.offsets) for a, b, boxes in about if start < b + n and end > a + n]

    def answer(self, turn):
        """Ids of a turn's answer, and which of them should look where: (index, boxes for each head)."""
        coded, about = self.tokenizer.encode(turn.answer, add_special_tokens=False), spans(turn)
        looks = []
        for k, (start, end) in enumerate(coded.offsets):
            found = next((boxes for a, b, boxes in about if a < end and start < b and (b - a > 1 or end - start == 1)), None)
            if found is not None:
                looks.append((k, found))
        return coded.ids + [self.end], looks

    def independent(self, turns, images=1):
        """Every turn as if it were the first: ids, targets, segment numbers, positions after the prefix, two lists of looks
        (position of the text, boxes for each head): where answers look and where questions do; and what is counted in strips of
        the picture (position of the text, strip, boxes)."""
        ids, targets, segments, positions, looks, names, counted = [], [], [], [], [], [], []
        for s, t in enumerate(turns):
            (q, known), (a, found) = self.opening(t, images), self.answer(t)
            names += [(len(ids) + k, boxes) for k, boxes in known]
            looks += [(len(ids) + len(q) - 1 + k, boxes) for k, boxes in found]
            counted += to_count(t, len(ids) + len(q) - 1)
            ids += q + a
            targets += [IGNORE] * (len(q) - 1) + a + [IGNORE]
            segments += [s] * (len(q) + len(a))
            positions += range(len(q) + len(a))
        return ids, targets, segments, positions, looks, names, counted

    def conversation(self, turns, images=1):
        """The turns one after the other, as a client sends them."""
        ids, targets, looks, names, counted = [], [], [], [], []
        for s, t in enumerate(turns):
            q, known = self.opening(t, images) if s == 0 else self.next(t)
            a, found = self.answer(t)
            names += [(len(ids) + k, boxes) for k, boxes in known]
            looks += [(len(ids) + len(q) - 1 + k, boxes) for k, boxes in found]
            counted += to_count(t, len(ids) + len(q) - 1)
            ids += q + a
            targets += [IGNORE] * (len(q) - 1) + a + [IGNORE]
        return ids, targets, [0] * len(ids), list(range(len(ids))), looks, names, counted


def to_count(turn, end):
    """(position, strip, boxes) of what a question has counted, in the tokens before position `end`, where the answer begins."""
    boxes = [t.box for t in turn.about or []]
    return [(end - STRIPS + k, k, boxes) for k in range(STRIPS)] if turn.category == "count" else []


def collate(rows, prefix):
    """Stacks sequences behind a prefix of `prefix` positions: ids and targets (batch, n), positions of the whole and the
    additive mask (batch, 1, n, prefix + n) of the sequences."""
    n = max(len(r[0]) for r in rows)
    b = len(rows)
    ids, targets = torch.zeros(b, n, dtype=torch.long), torch.full((b, n), IGNORE)
    segments, positions = torch.full((b, n), -1), torch.zeros(b, n, dtype=torch.long)
    for i, (a, t, s, p, *_) in enumerate(rows):
        ids[i, :len(a)], targets[i, :len(a)], segments[i, :len(a)], positions[i, :len(a)] = map(torch.tensor, (a, t, s, p))
    whole = torch.cat([torch.full((b, prefix), -2), segments], 1)
    see = (whole[:, None, :] == segments[:, :, None]) | (whole[:, None, :] == -2)
    see &= torch.ones(n, prefix + n).tril(prefix).bool()
    mask = torch.zeros(b, 1, n, prefix + n).masked_fill_(~see[:, None], float("-inf"))
    at = torch.cat([torch.arange(prefix).expand(b, -1), positions + prefix], 1)
    return ids, targets, at, mask
