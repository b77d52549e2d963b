"""Teaches the vision tower what lies in each cell of 28 x 28 px, before any language: object, colour, character and its
place, centres and boxes. Most pictures are windows of 168 px at a random place of the position grid, five times cheaper
than the whole 336 px.

usage: train_tower.py WORK_DIR NAME [--minutes M] [--side 168|336] [--teacher NAME] [--start FILE] ...
Resumes WORK_DIR/NAME.pt where it exists; a checkpoint every minute, a line of figures every 100 steps in NAME.log."""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import scenes as S
from cells import SIZES, Heads, Run, arguments, loss_and_marks, make_batch, normalise
from config import CONFIG
from model import VisionTower, local_init, whitening_init
from optimise import muon_and_adam
from teacher import WIDTH, Teacher, TeacherHeads


class Guide(nn.Module):
    """How far the tower is from the teacher: its normalised features patch by patch, and its answers cell by cell."""

    def __init__(self, work, name, d):
        super().__init__()
        saved = torch.load(f"{work}/{name}.pt")
        net, heads = Teacher(), TeacherHeads()
        net.load_state_dict(saved["net"]), heads.load_state_dict(saved["heads"])
        self.teacher = [net.eval().to(memory_format=torch.channels_last), heads.eval()]     # in a list: not a part of us
        self.norm, self.hint = nn.LayerNorm(d, elementwise_affine=False), nn.Linear(d, WIDTH)
        self.early, self.middle = nn.Linear(d, 768), nn.Linear(d, 384)
        self.depths = 1, 3                         # layers that are taught the teacher's earlier stages

    def forward(self, pixels, features, said, kept):
        net, heads = self.teacher
        with torch.no_grad():
            early, middle, last = net.stages(pixels)
            b, c, gh, gw = last.shape
            known = last.permute(0, 2, 3, 1).reshape(b, gh // 2, 2, gw // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, gh // 2, gw // 2, 4 * c)
            answers = heads(known)
            b, h, w, c = known.shape
            goal = F.layer_norm(known.view(b, h, w, 4, c // 4), (c // 4,))
        near = self.hint(self.norm(features.view(b, h, w, 4, -1)))
        loss = F.mse_loss(near, goal)
        for layer, goal, depth in ((self.early, early, self.depths[0]), (self.middle, middle, self.depths[1])):
            goal = F.batch_norm(goal.flatten(0, 1), None, None, training=True)
            loss = loss + F.mse_loss(layer(self.norm(kept[depth])).flatten(0, 1), goal)
        for key, size in SIZES.items():
            if key != "box":
                soft = F.softmax(answers[key], -1)
                each = F.kl_div(F.log_softmax(said[key], -1), soft, reduction="none").sum(-1)
                if key in ("object", "character"):
                    each = each * (.5 + 1.5 * (1 - soft[..., 0]))     # where the teacher sees something
                    loss = loss + each.mean()
                else:
                    loss = loss + .15 * each.mean()
        return loss


def optimiser_of(a, tower, *taught_beside):
    """Muon for the matrices of the layers that run (the last never does), AdamW for the rest."""
    unused = "post_layernorm", f"encoder.layers.{len(tower.encoder.layers) - 1}."
    run = [(n, p) for n, p in tower.named_parameters() if not n.startswith(unused)]
    matrix = lambda n, p: p.dim() == 2 and n.startswith("encoder.layers")
    others = [p for n, p in run if not matrix(n, p)] + [p for module in taught_beside for p in module.parameters()]
    return muon_and_adam([p for n, p in run if matrix(n, p)], others, a.muon, a.adam)


def main():
    p = arguments()
    p.add_argument("--muon", type=float, default=.02)
    p.add_argument("--adam", type=float, default=1e-3)
    p.add_argument("--teacher", help="run of teacher.py whose features and answers are taught too")
    a = p.parse_args()
    torch.manual_seed(a.seed)
    tower = VisionTower(CONFIG["img_processor"])
    local_init(tower, np.random.default_rng(a.seed))
    whitening_init(tower, normalise(make_batch(np.random.default_rng(a.seed), S.Library(a.work), 168, 300)[0]))
    parts = dict(tower=tower, heads=Heads(tower.d))
    if a.teacher:
        parts["guide"] = Guide(a.work, a.teacher, tower.d)

    def lose(pixels, windows, taught, box):
        guide = parts.get("guide")
        kept = dict.fromkeys(guide.depths) if guide else None
        features = tower(pixels, windows, kept)
        said = parts["heads"](features)
        loss, marks = loss_and_marks(said, taught, box)
        return (loss + guide(pixels, features, said, kept) if guide else loss), marks

    Run(a, parts, optimiser_of(a, *parts.values())).train(lose)


if __name__ == "__main__":
    main()
