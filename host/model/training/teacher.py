"""A convolutional teacher for the tower. Convolutions share weights between pixels, so they learn drawings and letters from
far fewer pictures than patches of 14 px do; the tower is then taught the teacher's features and answers cell by cell
(`train_tower.py --teacher`), which is much more to learn from than the labels alone. Not shipped.

usage: teacher.py WORK_DIR NAME [--minutes M] [--batch N] [--seed N] [--decay]"""
import argparse, json, os, time
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import scenes as S
from optimise import agreed, join, mean_
from train_tower import SIZES, Stream, evaluate, loss_and_marks, normalise

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
    p = argparse.ArgumentParser()
    p.add_argument("work"), p.add_argument("name")
    p.add_argument("--minutes", type=float, default=30, help="of training in all, the resumed ones counted in")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--side", type=int, default=168)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rate", type=float, default=2e-3)
    p.add_argument("--decay", action="store_true")
    a = p.parse_args()
    rank, world = join()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    torch.set_flush_denormal(True)
    net, heads = Teacher().to(memory_format=torch.channels_last), TeacherHeads()
    path, log = f"{a.work}/{a.name}.pt", open(f"{a.work}/{a.name}.log" if rank == 0 else os.devnull, "a")
    params = [*net.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(params, a.rate, (.9, .98), weight_decay=.02)
    state = dict(step=0, seen=0, seconds=0.)
    if os.path.exists(path):
        saved = torch.load(path)
        net.load_state_dict(saved["net"]), heads.load_state_dict(saved["heads"]), optimiser.load_state_dict(saved["optimiser"])
        state = {"seconds": 0.} | saved["state"]
    loader = iter(torch.utils.data.DataLoader(Stream(a.work, a.side, a.batch // world, a.seed * 10 ** 6 + state["step"] * 10 + rank), batch_size=None,
                                              num_workers=1, prefetch_factor=6))
    test, sums, losses = S.Library(a.work, held_out=True), {}, []
    for _ in range(2):
        next(loader)
    saved_at = time.time()
    begin = saved_at - state["seconds"]
    while (now := agreed(time.time() - begin)) < a.minutes * 60:
        pictures, _, taught, box = next(loader)
        loss, marks = loss_and_marks(heads(net(normalise(pictures))), taught, box)
        loss.backward()
        mean_([q.grad for q in params])
        torch.nn.utils.clip_grad_norm_(params, 2.)
        rate = min(1., (state["step"] + 1) / 100) * (max(.01, 1 - now / (a.minutes * 60)) if a.decay else 1.)
        for group in optimiser.param_groups:
            group["lr"] = a.rate * rate
        optimiser.step(), optimiser.zero_grad()
        state["step"] += 1
        state["seen"] += len(pictures) * world
        state["seconds"] = now
        losses.append(loss.item())
        for k, (r, n) in marks.items():
            s = sums.setdefault(k, [0, 0])
            s[0] += r
            s[1] += n
        if state["step"] % 100 == 0:
            line = dict(step=state["step"], seen=state["seen"], minutes=round(now / 60, 1), loss=round(float(np.mean(losses)), 4),
                        train={k: round(100 * r / max(n, 1), 1) for k, (r, n) in sums.items()})
            if state["step"] % 500 == 0 and rank == 0:
                line["held_out"] = evaluate(net, heads, test, a.side)
            print(json.dumps(line), file=log, flush=True)
            sums, losses = {}, []
        if time.time() - saved_at > 60 and rank == 0:
            save(path, net, heads, optimiser, state)
            saved_at = time.time()
    if rank == 0:
        save(path, net, heads, optimiser, state)
        print(json.dumps(dict(done=True, held_out=evaluate(net, heads, test, a.side, batches=20))), file=log, flush=True)


def save(path, net, heads, optimiser, state):
    torch.save(dict(net=net.state_dict(), heads=heads.state_dict(), optimiser=optimiser.state_dict(), state=state), path + ".tmp")
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    main()
