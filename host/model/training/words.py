"""Where image tokens and words meet: the auxiliary loss that holds the projector's output to the embeddings of words."""
import numpy as np
import torch
import torch.nn.functional as F
import questions as Q
import scenes as S
from cells import cell_targets, loss_and_marks


class Words(torch.nn.Module):
    """Holds image tokens to the space of the words. A cell's token must be nearest, among the embeddings of the words that
    name objects, colours, characters and parts of a picture, to its own; what else it is are plain linear questions. An
    image of a cat then arrives at the decoder looking like the word "cat", and one way of copying serves every noun."""

    def __init__(self, prompts, hidden):
        super().__init__()
        whole = lambda word: prompts.encode("a " + word)[len(prompts.encode("a")):]
        inside = lambda character: prompts.encode('"' + character)[-1:]
        objects = [[], whole("text")] + [whole(n) for n in S.SHAPES + S.CLOTHES + S.NOUNS]
        self.names = {"object": objects, "colour": [whole(c) for c in S.COLOUR_NAMES], "character": [[]] + [inside(c) for c in S.CHARS],
                      "zone": [whole(" ".join(z.split()[2:])) for row in Q.ZONES for z in row]}
        self.nothing = torch.nn.Parameter(torch.randn(2, hidden) * .5)             # no object, no character
        self.scale = torch.nn.Parameter(torch.full((4,), 2.))
        self.rest = torch.nn.Linear(hidden, S.CHAR_PLACES + 2 + 4)

    def forward(self, tokens, embedding):
        x = F.rms_norm(tokens, tokens.shape[-1:])
        said = {}
        for k, (key, lists) in enumerate(self.names.items()):
            missing = self.nothing[0 if key == "object" else 1]
            vectors = torch.stack([embedding[ids].sum(0) * len(ids) ** -.5 if ids else missing for ids in lists])
            said[key] = x @ vectors.T * (self.scale[k] / x.shape[-1] ** .5)
        return said | dict(zip(("place", "centre", "box"), self.rest(x).split([S.CHAR_PLACES, 2, 4], -1)))

    def loss(self, tokens, embedding, samples):
        """tokens (batch, 12, 12, hidden) of samples (.., frame, labels): the loss, and for each question (right, asked)."""
        taught, box = cell_targets([s[3] for s in samples], np.zeros((len(samples), 2), int))
        said = self(tokens, embedding)
        loss, marks = loss_and_marks(said, taught, box)
        zone = zones(box, torch.tensor([s[2] for s in samples]))
        held = zone >= 0
        if held.any():
            loss = loss + .6 * F.cross_entropy(said["zone"][held], zone[held], reduction="sum") / zone.numel()
            marks["zone"] = (said["zone"].argmax(-1) == zone)[held].sum().item(), held.sum().item()
        return loss, marks


def zones(box, frame):
    """box (batch, rows, columns, 4) of `cell_targets`, frame (batch, 4) px: in which ninth of its picture the middle of each
    cell's object lies, row by row; -1 where there is none."""
    inside = [((box[..., k] + 1) * 168 - frame[:, k, None, None]) / frame[:, 2 + k, None, None] for k in (0, 1)]
    x, y = ((c * 3).clamp(0, 2.999).nan_to_num(0).long() for c in inside)
    return torch.where(box.isnan().any(-1), -1, 3 * y + x)
