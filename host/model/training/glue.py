"""Puts the taught tower under the decoder that learned on its teacher's features: the projector's first layer becomes the
linear map from the tower's features that comes nearest to what that layer made of the teacher's.

usage: glue.py WORK_DIR TOWER LANGUAGE TEACHER OUT"""
import sys
import numpy as np
import torch
import scenes as S
from config import CONFIG
from model import Phi3V
from train_language import single_sample, teacher_eyes
from train_tower import Heads, normalise


@torch.no_grad()
def main(work, tower, language, teacher, out, pictures=160):
    taught = torch.load(f"{work}/{tower}.pt")
    spoken = torch.load(f"{work}/{language}.pt")["model"]
    model, heads = Phi3V(CONFIG), Heads(CONFIG["img_processor"]["hidden_size"])
    model.vision.tower.load_state_dict(taught["tower"])
    heads.load_state_dict(taught["heads"])
    own = model.state_dict()
    for name, tensor in spoken.items():
        if "img_processor" not in name and own[name].shape == tensor.shape:
            own[name] = tensor
    rng, library, see = np.random.default_rng(77), S.Library(work), teacher_eyes(f"{work}/{teacher}.pt")
    stem = "model.vision_embed_tokens."
    weight, bias = spoken[stem + "img_projection.0.weight"], spoken[stem + "img_projection.0.bias"]
    x, y = [], []
    for _ in range(pictures // 8):
        pixels = normalise(torch.stack([single_sample(rng, library)[0] for _ in range(8)]))
        x.append(model.vision.tower(pixels).reshape(-1, own[stem + "img_projection.0.weight"].shape[1]))
        y.append(see(pixels).reshape(-1, weight.shape[1]) @ weight.T + bias)
    x, y = torch.cat(x), torch.cat(y)
    ones = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    ridge = 1e-3 * ones.square().mean() * torch.eye(ones.shape[1], dtype=torch.double)
    fit = torch.linalg.solve(ones.T @ ones / len(ones) + ridge, ones.T @ y.double() / len(ones))
    own[stem + "img_projection.0.weight"], own[stem + "img_projection.0.bias"] = fit[:-1].T.float().contiguous(), fit[-1].float()
    left = (y - (ones @ fit).float()).var(0).mean() / y.var(0).mean()
    for separator in ("glb_GN", "sub_GN"):
        goal = weight @ spoken[stem + separator].reshape(-1) + bias - own[stem + "img_projection.0.bias"]
        own[stem + separator] = (torch.linalg.pinv(own[stem + "img_projection.0.weight"]) @ goal).view(own[stem + separator].shape)
    model.load_state_dict(own)
    torch.save(dict(model=model.state_dict(), heads=heads.state_dict()), f"{work}/{out}.pt")
    print(f"unexplained variance of the projector's input layer: {left:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
