"""What Visor loads -> a training checkpoint that `train_language.py --start` takes: the way back of export.py, so that
training goes on from the shipped weights without the hours before them. What only training uses (probes, momenta) starts anew.

usage: restore.py FOLDER WORK_DIR NAME     writes WORK_DIR/NAME.pt, and WORK_DIR/tokenizer.json where there is none"""
import os, shutil, sys
import numpy as np
import torch
from safetensors.numpy import load_file
from config import CONFIG
from model import Phi3V
from quantise import unpacked


def main(folder, work, name):
    stored, state = load_file(f"{folder}/model.safetensors"), {}
    for key, tensor in stored.items():
        stem = key.removesuffix(".weight")
        if key.endswith((".scales", ".biases")):
            continue
        scales = stored.get(stem + ".scales")
        state[key] = torch.from_numpy(tensor.astype(np.float32)) if scales is None else unpacked(tensor, scales, stored[stem + ".biases"])
    model = Phi3V(CONFIG)
    model.load_state_dict(state)
    torch.save(dict(model=model.state_dict()), f"{work}/{name}.pt")
    if not os.path.exists(f"{work}/tokenizer.json"):
        shutil.copy(f"{folder}/tokenizer.json", work)


if __name__ == "__main__":
    main(*sys.argv[1:])
