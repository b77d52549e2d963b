"""A convolutional teacher for the tower. Convolutions share weights between pixels, so they learn drawings and letters from
far fewer pictures than patches of 14 px do; the tower is then taught the teacher's features and answers cell by cell
(`train_tower.py --teacher`), which is much more to learn from than the labels alone. Not shipped.

usage: teacher.py WORK_DIR NAME [--minutes M] [--batch N] [--seed N] [--decay]"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from cells import SIZES, Run, arguments, loss_and_marks
from optimise import Parts

WIDTH = 256  # numbers per patch that the tower is taught


class Block(nn.Module):
    def __init__(self, a, b, stride=1):
        super().__init__()
        self.one, self.two = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.n1, self.n2 = nn.BatchNorm2d(b), nn.BatchNorm2d(b)
        self.skip = nn.Conv2d(a, b, 1, stride, bias=False) if stride > 1 or a != b else nn.Identity()
        nn.init.zeros_(self.n2.weight)

    def forward(self, x):
        return F.relu(self.skip(x) + self.n2(self.two(F.relu(self.n1(self.one(x))))))


class Teacher(nn.Module):
    """(batch, 3, h, w) normalised -> (batch, h / 28, w / 28, 4 * WIDTH), as the tower's merged features lie."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(32, 48, 3, 2, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
                                  Block(48, 96, 2), Block(96, WIDTH, 2), Block(WIDTH, WIDTH))

    def patches(self, pixels):
        """(batch, WIDTH, h / 14, w / 14)"""
        h, w = pixels.shape[2:]
        x = F.interpolate(pixels, (h * 8 // 7, w * 8 // 7), mode="bilinear", align_corners=False)   # 14 px become 16
        return self.body(self.stem(x.contiguous(memory_format=torch.channels_last)))

    def stages(self, pixels):
        """What lies inside each patch at two earlier depths, (batch, patches, 16 * 48) and (batch, patches, 4 * 96), and
        the end, (batch, WIDTH, h / 14, w / 14)."""
        h, w = pixels.shape[2:]
        x = F.interpolate(pixels, (h * 8 // 7, w * 8 // 7), mode="bilinear", align_corners=False)
        early = self.body[:3](self.stem(x.contiguous(memory_format=torch.channels_last)))
        middle = self.body[3](early)
        return inside_patches(early, 4), inside_patches(middle, 2), self.body[4:](middle)

    def forward(self, pixels, windows=None):
        x = self.patches(pixels).permute(0, 2, 3, 1)
        b, gh, gw, c = x.shape
        return x.reshape(b, gh // 2, 2, gw // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, gh // 2, gw // 2, 4 * c)


def inside_patches(x, side):
    """(batch, c, side gh, side gw) -> (batch, gh gw, side * side * c)"""
    b, c, h, w = x.shape
    x = x.view(b, c, h // side, side, w // side, side).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, (h // side) * (w // side), side * side * c)


class TeacherHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, sum(SIZES.values()))

    def forward(self, features):
        return dict(zip(SIZES, self.out(self.norm(features)).split(list(SIZES.values()), -1)))


def main():
    p = arguments(minutes=30)
    p.add_argument("--rate", type=float, default=2e-3)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    net, heads = Teacher().to(memory_format=torch.channels_last), TeacherHeads()
    optimiser = Parts(torch.optim.AdamW([*net.parameters(), *heads.parameters()], a.rate, (.9, .98), weight_decay=.02), clip=2.)
    Run(a, dict(net=net, heads=heads), optimiser).train(lambda pixels, _, taught, box: loss_and_marks(heads(net(pixels)), taught, box))


if __name__ == "__main__":
    main()
