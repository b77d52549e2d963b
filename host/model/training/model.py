"""Phi-3.5-vision in PyTorch, small: the architecture of `phi3_v` with the real checkpoint's parameter names.

CLIP tower (pre-LN, class token, quick GELU, features of layer -2) -> 2x2 merge -> sub_GN / glb_GN separators ->
two-layer GELU projector -> Phi-3 decoder (RMSNorm, fused qkv and gate_up, longrope). Source of the maths: the remote code
of microsoft/Phi-3.5-vision-instruct; the Rust port in host/model is held to it by golden tensors, and this file to the
Rust port by `check.py`."""
import math
import torch
import torch.nn as nn
import torch.nn.functional as F

GRID = 24  # patches a side


class VisionAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        b, t, d = x.shape
        w = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        q, k, v = F.linear(x, w, bias).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


class QuickGelu(torch.autograd.Function):
    """x * sigmoid(1.702 x), keeping only x for the way back."""
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x * 1.702).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x * 1.702)
        return g * (s * (1 + 1.702 * x * (1 - s)))


class VisionMlp(nn.Module):
    def __init__(self, d, m):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, m), nn.Linear(m, d)

    def forward(self, x):
        return self.fc2(QuickGelu.apply(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, d, heads, m):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attn, self.mlp = VisionAttention(d, heads), VisionMlp(d, m)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(d) * .02)
        self.patch_embedding = nn.Conv2d(3, d, 14, 14, bias=False)
        self.position_embedding = nn.Embedding(GRID * GRID + 1, d)


class VisionTower(nn.Module):
    def __init__(self, c):
        """c: the configuration's `img_processor`."""
        super().__init__()
        d, heads = c["hidden_size"], c["num_attention_heads"]
        self.d, self.heads = d, heads
        self.embeddings = Embeddings(d)
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(d, heads, c["intermediate_size"]) for _ in range(c["num_hidden_layers"]))

    def forward(self, pixels, windows=None, keep=None):
        """pixels (batch, 3, 14 gh, 14 gw) normalised; windows (batch, 2) the row and column of the 24 x 24 position grid
        at which each picture lies, for pictures smaller than 336 px. Returns merged features (batch, gh/2, gw/2, 4 d). `keep`, a dictionary, receives the
        patches (batch, gh gw, d) after the layers that are its keys."""
        b, e = pixels.shape[0], self.embeddings
        gh, gw = pixels.shape[2] // 14, pixels.shape[3] // 14
        p = pixels.view(b, 3, gh, 14, gw, 14).permute(0, 2, 4, 1, 3, 5).reshape(b, gh * gw, 588)
        x = p @ e.patch_embedding.weight.view(self.d, 588).T
        table = e.position_embedding.weight
        if windows is None:
            x = x + table[1:]
        else:
            rows = windows[:, :1, None] + torch.arange(gh)[None, :, None]
            columns = windows[:, 1:, None] + torch.arange(gw)[None, None, :]
            x = x + table[1 + rows * GRID + columns].view(b, gh * gw, self.d)
        first = (e.class_embedding + table[0]).expand(b, 1, self.d)
        x = self.pre_layrnorm(torch.cat([first, x], 1))
        for depth, layer in enumerate(self.encoder.layers[:-1]):       # features of layer -2: the last layer is never run
            x = layer(x)
            if keep is not None and depth in keep:
                keep[depth] = x[:, 1:]
        x = x[:, 1:].view(b, gh // 2, 2, gw // 2, 2, self.d).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(b, gh // 2, gw // 2, 4 * self.d)


@torch.no_grad()
def local_init(tower, rng, amplitude=1.3, sharpness=8.):
    """Starts most attention heads as a look at one neighbouring patch, as a convolution does.

    The position table holds sines and cosines of both axes in its first `width` numbers, nothing else writes there at
    first, and a head's q is its own position turned by an offset: the score peaks where the neighbour lies. Only the
    starting weights: the architecture is unchanged and training may leave it."""
    d, heads = tower.d, tower.heads
    hd = d // heads
    width = min(hd, 32)
    f = width // 4
    omega = (math.pi / 2) * .66 ** torch.arange(f).float()
    axis = torch.arange(GRID).float()[:, None] * omega
    table = torch.zeros(GRID, GRID, d)
    table[..., :f], table[..., f:2 * f] = axis.sin()[:, None], axis.cos()[:, None]                   # rows
    table[..., 2 * f:3 * f], table[..., 3 * f:4 * f] = axis.sin()[None], axis.cos()[None]            # columns
    e = tower.embeddings
    e.position_embedding.weight.zero_()
    e.position_embedding.weight[1:] = table.view(-1, d) * amplitude
    nn.init.normal_(e.patch_embedding.weight, std=588 ** -.5)
    e.patch_embedding.weight[:width] = 0
    near = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    far = [(0, 2), (0, -2), (2, 0), (-2, 0), (2, 2), (-2, -2), (2, -2), (-2, 2)]
    n = len(tower.encoder.layers)
    for depth, layer in enumerate(tower.encoder.layers):
        a, m = layer.self_attn, layer.mlp
        for p in (a.q_proj, a.k_proj, a.v_proj, a.out_proj, m.fc1, m.fc2):
            nn.init.zeros_(p.bias)
            nn.init.normal_(p.weight, std=.03)
        for p in (a.v_proj, m.fc1):
            nn.init.normal_(p.weight, std=d ** -.5)
        nn.init.normal_(a.out_proj.weight, std=d ** -.5 / math.sqrt(n))
        nn.init.normal_(m.fc2.weight, std=m.fc2.weight.shape[1] ** -.5 / math.sqrt(n))
        a.out_proj.weight[:width], m.fc2.weight[:width] = 0, 0
        pool = near if depth % 2 == 0 else far + near
        local = heads - (1 if heads > 3 and depth < 4 else 0 if depth < 4 else heads // 2)
        chosen = rng.permutation(len(pool))[:local]
        for h, c in enumerate(chosen):
            dy, dx = pool[c]
            beta = math.sqrt(sharpness * math.sqrt(hd / 32))
            rows = slice(h * hd, h * hd + width)
            turn = torch.zeros(width, width)
            for i in range(f):
                for base, delta in ((0, dy), (2 * f, dx)):
                    s, c_ = math.sin(omega[i] * delta), math.cos(omega[i] * delta)
                    turn[base + i, base + i], turn[base + i, base + f + i] = c_, s          # sin(w(p + delta))
                    turn[base + f + i, base + i], turn[base + f + i, base + f + i] = -s, c_  # cos(w(p + delta))
            a.q_proj.weight[rows, :width] = turn * beta
            a.k_proj.weight[rows, :width] = torch.eye(width) * beta
    return tower


@torch.no_grad()
def whitening_init(tower, pixels):
    """Starts the patch embedding as the principal components of real patches, each scaled to about unit variance, so that
    fine detail arrives as loud as flat colour (K. Jordan's CIFAR recipe does this to its first convolution).
    pixels (batch, 3, 14 gh, 14 gw) normalised."""
    b, _, h, w = pixels.shape
    x = pixels.view(b, 3, h // 14, 14, w // 14, 14).permute(0, 2, 4, 1, 3, 5).reshape(-1, 588)
    mean = x.mean(0)
    variance, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    e = tower.embeddings
    used = e.patch_embedding.weight.view(tower.d, 588).abs().sum(1) == 0      # rows that hold positions
    n = int((~used).sum())
    rows = axes.T.flip(0)[:n] / (variance.flip(0)[:n, None] + .003).sqrt()
    e.patch_embedding.weight.view(tower.d, 588)[~used] = rows
    e.position_embedding.weight[1:, ~used] = -(rows @ mean)
    return variance.flip(0)


class RmsNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkv_proj, self.o_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, x, rope, mask, text_only=False):
        """The prefix in front of what `mask` covers is causal. With `text_only` just what it covers is returned."""
        b, t, d = x.shape
        q, k, v = self.qkv_proj(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rope), rotate(k, rope)
        n = t - (mask.shape[2] if mask is not None else 0)
        parts = [F.scaled_dot_product_attention(*(z[:, :, :n] for z in (q, k, v)), is_causal=True)] if n and not text_only else []
        if mask is not None:
            parts.append(F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=mask.to(q.dtype)))
        return self.o_proj(torch.cat(parts, 2).transpose(1, 2).reshape(b, -1, d))


def rotate(x, rope):
    cos, sin = rope[0].to(x.dtype), rope[1].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Mlp(nn.Module):
    def __init__(self, d, m):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(d, 2 * m, bias=False), nn.Linear(m, d, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, d, heads, m):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(d), RmsNorm(d)
        self.self_attn, self.mlp = Attention(d, heads), Mlp(d, m)

    def forward(self, x, rope, mask, text_only=False):
        seen = self.self_attn(self.input_layernorm(x), rope, mask, text_only)
        x = x[:, -seen.shape[1]:] + seen
        return x + self.mlp(self.post_attention_layernorm(x))


class ImageEmbedding(nn.Module):
    """Tower, separators and projector, under the names of the real checkpoint."""

    def __init__(self, c):
        super().__init__()
        v = c["img_processor"]
        d, out = v["hidden_size"], c["hidden_size"]
        self.img_processor = nn.Module()
        self.img_processor.vision_model = VisionTower(v)
        self.glb_GN = nn.Parameter(torch.randn(1, 1, 4 * d) * .5)
        self.sub_GN = nn.Parameter(torch.randn(1, 1, 1, 4 * d) * .5)
        self.img_projection = nn.Sequential(nn.Linear(4 * d, out), nn.GELU(), nn.Linear(out, out))

    @property
    def tower(self):
        return self.img_processor.vision_model

    def sequence(self, glob, crops, rows, columns):
        """Image tokens of one picture: glob (12, 12, 4d), crops (rows * columns, 12, 12, 4d), row by row."""
        sub = crops.view(rows, columns, 12, 12, -1).permute(0, 2, 1, 3, 4).reshape(12 * rows, 12 * columns, -1)
        parts = [self.lines(sub), self.glb_GN[0], self.lines(glob)]
        return self.img_projection(torch.cat(parts))

    def lines(self, grid):
        h, w, c = grid.shape
        return torch.cat([grid, self.sub_GN[0].expand(h, 1, c)], 1).reshape(h * (w + 1), c)

    def single(self, features):
        """Image tokens (batch, 313, hidden) of pictures of one crop, where the crop is the global view."""
        b, h, w, c = features.shape
        grid = torch.cat([features, self.sub_GN.expand(b, h, 1, c)], 2).reshape(b, h * (w + 1), c)
        grid, separator = self.img_projection(grid), self.img_projection(self.glb_GN)
        return torch.cat([grid, separator.expand(b, 1, -1), grid], 1)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c["hidden_size"]
        self.embed_tokens = nn.Embedding(c["vocab_size"], d)
        self.layers = nn.ModuleList(Layer(d, c["num_attention_heads"], c["intermediate_size"]) for _ in range(c["num_hidden_layers"]))
        self.norm = RmsNorm(d)
        self.vision_embed_tokens = ImageEmbedding(c)


class Phi3V(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        d, n = config["hidden_size"], config["num_hidden_layers"]
        nn.init.normal_(self.model.embed_tokens.weight, std=.5)
        for layer in self.model.layers:
            for p in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
                nn.init.normal_(p.weight, std=d ** -.5)
            nn.init.normal_(layer.self_attn.o_proj.weight, std=d ** -.5 / math.sqrt(2 * n))
            nn.init.normal_(layer.mlp.down_proj.weight, std=config["intermediate_size"] ** -.5 / math.sqrt(2 * n))
        nn.init.normal_(self.lm_head.weight, std=.02)
        rope = config["rope_scaling"]["short_factor"]
        half = d // config["num_attention_heads"] // 2
        self.inverse = 1 / (torch.tensor(rope) * config["rope_theta"] ** (torch.arange(half).float() / half))
        ratio = config["max_position_embeddings"] / config["original_max_position_embeddings"]
        self.scale = math.sqrt(1 + math.log(ratio) / math.log(config["original_max_position_embeddings"])) if ratio > 1 else 1.

    @property
    def vision(self):
        return self.model.vision_embed_tokens

    def rope(self, positions):
        angle = positions[..., None].float() * self.inverse
        return angle.cos() * self.scale, angle.sin() * self.scale

    def hidden(self, x, positions=None, mask=None, keep=None):
        """x (batch, positions, hidden) embeddings -> final hidden states. With a mask (batch, 1, t, positions), which is added
        to the scores of the last t positions, the hidden states of those. `keep`, a dictionary, receives what enters the
        layers that are its keys."""
        rope = self.rope(torch.arange(x.shape[1]) if positions is None else positions)
        if positions is not None and positions.dim() == 2:
            rope = rope[0][:, None], rope[1][:, None]
        for depth, layer in enumerate(self.model.layers):
            if keep is not None and depth in keep:
                keep[depth] = x
            x = layer(x, rope, mask, mask is not None and layer is self.model.layers[-1])
        return self.model.norm(x)


@torch.no_grad()
def matching_init(model, reach=300, norm=12.):
    """Starts the last head of the layers between the first and the last as a look at tokens that are alike: its query and
    its key are the same random projection, into the numbers that rope turns by less than a radian over `reach` positions.
    Image tokens lie near the words that name them, so such a head finds what a word names before it has learned anything."""
    for layer in model.model.layers[1:-1]:
        a = layer.self_attn
        w = a.qkv_proj.weight.view(3, a.heads, -1, a.qkv_proj.in_features)
        slow = (model.inverse * reach < 1).repeat(2)
        same = torch.randn(int(slow.sum()), w.shape[-1])
        w[:2, -1] = 0
        w[:2, -1, slow] = same * norm / same.norm()


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())
