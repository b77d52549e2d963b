"""The demo model's tokenizer: Phi-3's kind (BPE with byte fallback, "▁" for spaces) with a small vocabulary, as a Hugging
Face tokenizer.json. Merges come from what the questions and answers say; strings to be read stay one token a character.

usage: tokenizer.py OUT_FILE"""
import json, sys
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
import questions as Q
import scenes as S

VOCABULARY = 1536
SPECIAL = ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>",
           "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>", "<|image|>"]
STRIPS_RIGHT = ("<|assistant|>", "<|placeholder", "<|image|>")


def lines(rng, n):
    """Questions and answers over made-up things: no picture is drawn for it."""
    for _ in range(n):
        things = []
        for k in range(int(rng.integers(1, 5))):
            box = (float(rng.uniform(0, 280)), float(rng.uniform(0, 280)), float(rng.uniform(20, 80)), float(rng.uniform(20, 80)))
            if rng.random() < .6:
                things.append(S.Thing("concept", Q.pick(rng, S.NOUNS), box))
            else:
                things.append(S.Thing("shape", Q.pick(rng, S.SHAPES), box, Q.pick(rng, S.COLOUR_NAMES)))
        if rng.random() < .1:
            things = [S.Thing("clothing", Q.pick(rng, S.CLOTHES), (0, 0, 336, 336))]
        scene = S.Scene(None, things, None, Q.pick(rng, S.COLOUR_NAMES))
        turns = Q.turns(rng, scene, (0, 0, 336, 336), 4) + [Q.talk(rng), Q.talk_beside(rng)]
        if len(things) == 2 and things[0].kind == "concept":
            turns.append(Q.compare(rng, *things))
        for t in turns:
            yield t.question
            yield t.answer


def build():
    rng = np.random.default_rng(0)
    text = list(lines(rng, 6000)) + [f"{Q.article(n)} {n} {Q.PLURAL[n]}" for n in S.NOUNS for _ in range(40)]
    text += [f"There are {n} objects." for n in Q.NUMBERS for _ in range(40)]
    base = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True),
                                               pre_tokenizers.Punctuation()])
    alphabet = [chr(c) for c in range(33, 127)] + ["▁"]
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=VOCABULARY - len(SPECIAL), special_tokens=base, initial_alphabet=alphabet,
                                                    limit_alphabet=len(alphabet), show_progress=False))
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    j = json.loads(t.to_str())
    j["pre_tokenizer"] = None                      # as Phi-3's: the merges alone decide
    # "</s>" is not special in Phi-3's file either.
    token = lambda i, c, rstrip=False: dict(id=i, content=c, single_word=False, lstrip=False, rstrip=rstrip, normalized=False, special=c != "</s>")
    first = max(j["model"]["vocab"].values()) + 1
    j["added_tokens"] = [token(0, "<unk>"), token(1, "<s>"), token(2, "</s>", True)] + [
        token(first + k, c, c.startswith(STRIPS_RIGHT)) for k, c in enumerate(SPECIAL)]
    j["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                                    {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    return j, text


def main(path):
    j, text = build()
    json.dump(j, open(path, "w"), ensure_ascii=False, indent=0)
    t = Tokenizer.from_file(path)
    words = sum(len(x.split()) for x in text[:4000])
    tokens = sum(len(t.encode(x, add_special_tokens=False).ids) for x in text[:4000])
    whole = [n for n in S.NOUNS if len(t.encode(n, add_special_tokens=False).ids) > len(n.split())]
    print(t.get_vocab_size(), "tokens;", round(tokens / words, 2), "a word; nouns in pieces:", whole)
    for s in ["Hello, world!", "naïve café - 日本語 🍎 ok", "  two  spaces\n\tnewline", 'It says "EXIT 42%".', "\u0000\x07", ""]:
        back = t.decode(t.encode(s, add_special_tokens=False).ids)
        assert back == s, (s, back)
    print(t.encode('<|user|>\n<|image|>\nWhat is it?<|end|>\n<|assistant|>\nIt says "A7K 12".<|end|>').tokens)


if __name__ == "__main__":
    main(sys.argv[1])
