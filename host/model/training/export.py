"""A training checkpoint -> what Visor loads: OUT/f16 (Hugging Face names, f16) and OUT/int4 (MLX INT4, the rest f16).

usage: export.py WORK_DIR NAME OUT_DIR"""
import json, os, shutil, sys
import torch
from safetensors.numpy import save_file
from config import CONFIG
from model import Phi3V, parameter_count
from quantise import BITS, GROUP, packed, quantised

PROCESSOR = {"num_crops": 4, "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
             "num_img_tokens": 144, "image_processor_type": "Phi3VImageProcessor", "processor_class": "Phi3VProcessor"}


def main(work, name, out):
    model = Phi3V(CONFIG)
    model.load_state_dict(torch.load(f"{work}/{name}.pt")["model"])
    tensors = {n: t for n, t in model.state_dict().items()}
    int4 = {}
    for n, t in tensors.items():
        if quantised(n, t.shape):
            stem = n.removesuffix(".weight")
            int4[n], int4[stem + ".scales"], int4[stem + ".biases"] = packed(t)
        else:
            int4[n] = t.half().numpy()
    plain = {n: t.half().numpy() for n, t in tensors.items()}
    added = json.load(open(f"{work}/tokenizer.json"))["added_tokens"]
    config = dict(CONFIG, pad_token_id=next(t["id"] for t in added if t["content"] == "<|endoftext|>"))
    for kind, content, extra in (("f16", plain, {}), ("int4", int4, {"quantization": {"group_size": GROUP, "bits": BITS}})):
        folder = f"{out}/{kind}"
        os.makedirs(folder, exist_ok=True)
        save_file(content, f"{folder}/model.safetensors", {"format": "mlx" if extra else "pt"})
        json.dump(config | extra, open(f"{folder}/config.json", "w"), indent=1)
        json.dump(PROCESSOR, open(f"{folder}/preprocessor_config.json", "w"), indent=1)
        json.dump({"bos_token_id": 1, "eos_token_id": [2]}, open(f"{folder}/generation_config.json", "w"), indent=1)
        shutil.copy(f"{work}/tokenizer.json", folder)
        print(kind, os.path.getsize(f"{folder}/model.safetensors"), "bytes,", parameter_count(model), "parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
