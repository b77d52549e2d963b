"""Muon for the hidden matrices, AdamW for the rest; both with a constant rate that the caller scales per step.

Muon (K. Jordan, 2024): the momentum of a matrix is replaced by the nearest orthogonal one (five Newton-Schulz steps), so
every direction of the weight moves alike. On these sizes it costs about a tenth of a step.

`join` makes two processes of one thread each into one training: on two shared cores that is a third faster than one
process of two threads, which wait for each other at every operation."""
import os
import torch
import torch.distributed as dist


def join(a):
    """(rank, processes): as `launch.sh` started us, or alone. `a`: the command's options."""
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def together():
    return dist.is_initialized()


def mean_(tensors):
    """Replaces each tensor by its mean over the processes."""
    if together():
        sum_(tensors)
        for t in tensors:
            t.div_(dist.get_world_size())


def sum_(tensors):
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))


def share_presence(params):
    """What has a gradient in one process has one in all: zeros, where this one's batch did not ask for it."""
    if together():
        present = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8)
        dist.all_reduce(present, dist.ReduceOp.MAX)
        for p, there in zip(params, present.tolist()):
            if there and p.grad is None:
                p.grad = torch.zeros_like(p)


def agreed(value):
    """The largest of every process's value: what all act on."""
    if not together():
        return value
    t = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return t.item()


def orthogonal(g, steps=5):
    """Nearest orthogonal matrices of a stack (n, rows, columns)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr=.02, momentum=.95, decay=.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self):
        rank, world = (dist.get_rank(), dist.get_world_size()) if together() else (0, 1)
        for group in self.param_groups:
            by_shape, number = {}, 0
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"]
                m.mul_(group["momentum"]).add_(p.grad)
                number += 1
                if number % world == rank:         # each process makes its share of the updates
                    by_shape.setdefault(p.shape, []).append((p, p.grad + group["momentum"] * m))
                else:
                    p.grad.zero_()
            for items in by_shape.values():
                updates = orthogonal(torch.stack([u for _, u in items]))
                for (p, _), u in zip(items, updates):
                    p.grad.copy_(u)
            moved = [p for p in group["params"] if p.grad is not None]
            if together() and moved:
                sum_([p.grad for p in moved])
            for p in moved:
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(p.grad, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** .5)


class Parts:
    """Optimisers as one. `rate` scales their base rates; gradients are the mean of every process's and clipped together."""

    def __init__(self, *parts, clip=1.):
        self.parts, self.clip = parts, clip
        self.base = [part.param_groups[0]["lr"] for part in parts]
        self.params = [p for part in parts for g in part.param_groups for p in g["params"]]

    def step(self, rate):
        share_presence(self.params)
        mean_([p.grad for p in self.params if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        for part, base in zip(self.parts, self.base):
            for group in part.param_groups:
                group["lr"] = base * rate
            part.step()
        for p in self.params:
            p.grad = None

    def state_dict(self):
        return [p.state_dict() for p in self.parts]

    def load_state_dict(self, states):
        for p, s in zip(self.parts, states):
            p.load_state_dict(s)


def muon_and_adam(matrices, others, muon_lr, adam_lr, decay=.01):
    return Parts(Muon(matrices, muon_lr, decay=decay), torch.optim.AdamW(others, adam_lr, (.9, .98), weight_decay=decay))
