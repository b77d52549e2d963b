"""Holds this training code to the server: answers a suite's one-picture, one-crop questions with the PyTorch model and
compares them with what `visor eval --json` answered from the exported checkpoint.

    suite.py WORK SUITE
    export.py WORK NAME OUT
    visor eval --suite SUITE --config one-crop.toml --checkpoint OUT/f16 --json > answers.json
    check.py WORK NAME SUITE answers.json

Pictures of 336 x 336 px reach both sides without resampling; the rest are left out. Fails under 97 % of equal answers (f16
weights here and f32 sums there may part at a near tie)."""
import json, sys
import numpy as np
import torch
from PIL import Image
from cells import normalise
from config import CONFIG
from model import Phi3V
from prompts import Prompts
from questions import Turn


@torch.no_grad()
def answer(model, prompts, picture, question, longest=64):
    v, emb = model.vision, model.model.embed_tokens
    tokens = v.single(v.tower(normalise(torch.from_numpy(picture)[None])))
    begin = torch.cat([emb(torch.tensor(prompts.before(0)))[None], tokens], 1)
    ids, said = prompts.opening(Turn(question, "", "", []), 1)[0], []
    while len(said) < longest:
        x = torch.cat([begin, emb(torch.tensor(ids + said))[None]], 1)
        token = int(model.lm_head(model.hidden(x)[0, -1]).argmax())
        if token == prompts.end:
            break
        said.append(token)
    return prompts.tokenizer.decode(said).strip()


def main(work, name, suite, answers):
    model = Phi3V(CONFIG)
    model.load_state_dict({k: t.half().float() for k, t in torch.load(f"{work}/{name}.pt")["model"].items()})
    model.eval()
    prompts, theirs = Prompts(f"{work}/tokenizer.json"), {o["id"]: o["answer"] for o in json.load(open(answers))["runs"][0]["cases"]}
    equal = asked = 0
    for line in open(f"{suite}/cases.jsonl"):
        case = json.loads(line)
        if len(case["images"]) != 1 or case.get("history"):
            continue
        picture = Image.open(f"{suite}/{case['images'][0]}")
        if picture.size != (336, 336) or picture.mode != "RGB" or picture.getexif():
            continue
        ours = answer(model, prompts, np.array(picture), case["question"])
        asked += 1
        equal += ours == theirs[case["id"]].strip()
        if ours != theirs[case["id"]].strip():
            print(f"{case['id']}: {case['question']} | here: {ours} | server: {theirs[case['id']]}")
    print(f"{equal} of {asked} answers are equal")
    sys.exit(asked == 0 or equal < .97 * asked)


if __name__ == "__main__":
    main(*sys.argv[1:])
