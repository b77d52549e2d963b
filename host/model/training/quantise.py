"""MLX's INT4: affine, groups of 64 along a row, scale and bias in f16; low nibble first.

`w = scale * q + bias`, q in 0..15. The range of a group is searched a little for the least squared error; the layout is
plain MLX, so any reader of it loads the result."""
import numpy as np
import torch

GROUP, BITS = 64, 4


def quantised(name, shape):
    """Which tensors are stored in four bits: every linear and the token embeddings, not the position table."""
    return name.endswith(".weight") and len(shape) == 2 and shape[1] % GROUP == 0 and "position_embedding" not in name


@torch.no_grad()
def groups(w, shrink=(1., .96, .92, .88, .84, .8)):
    """q (rows, groups, 64) 0..15, scale and bias (rows, groups, 1) as f16 values in f32."""
    g = w.detach().float().reshape(w.shape[0], -1, GROUP)
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    best = None
    for k in shrink:
        middle, half = (high + low) / 2, (high - low) / 2 * k
        scale = (2 * half / 15).clamp_min(1e-7).half().float().clamp_min(6e-8)
        bias = (middle - half).half().float()
        q = ((g - bias) / scale).round().clamp(0, 15)
        error = ((q * scale + bias - g) ** 2).sum(-1, keepdim=True)
        if best is None:
            best = [q, scale, bias, error]
        else:
            better = error < best[3]
            best = [torch.where(better, new, old) for new, old in zip((q, scale, bias, error), best)]
    return best[0], best[1], best[2]


def rounded(w, shrink=(1., .9)):
    """The weights as they come back from four bits."""
    q, scale, bias = groups(w, shrink)
    return (q * scale + bias).reshape(w.shape)


def packed(w):
    """(weight (rows, columns / 8) u32, scales, biases (rows, columns / 64) f16) as numpy arrays."""
    q, scale, bias = groups(w)
    q = q.reshape(w.shape[0], -1, 8).numpy().astype(np.uint32)
    words = np.bitwise_or.reduce(q << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    return words, scale.squeeze(-1).half().numpy(), bias.squeeze(-1).half().numpy()


def unpacked(words, scales, biases):
    """The way back of `packed`, f32."""
    q = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(*scales.shape, GROUP).astype(np.float32)
    w = q * scales.astype(np.float32)[..., None] + biases.astype(np.float32)[..., None]
    return torch.from_numpy(w.reshape(words.shape[0], -1))


class Straight:
    """Quantisation-aware steps: inside `with`, the weights are the rounded ones; the gradients reach the full ones."""

    def __init__(self, model):
        self.params = [p for n, p in model.named_parameters() if quantised(n, p.shape)]

    def __enter__(self):
        self.full = [p.data for p in self.params]
        for p in self.params:
            p.data = rounded(p.data)

    def __exit__(self, *_):
        for p, full in zip(self.params, self.full):
            p.data = full
