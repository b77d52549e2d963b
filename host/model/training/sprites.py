"""Emoji drawings -> one sprite atlas: every concept of concepts.tsv in every style that has it.

Reads the npm packages @iconify-json/* that fetch.sh unpacked; writes sprites.npz with
  rgba    (sprites, 224, 224, 4) u8, the drawing fitted to the square and centred, straight alpha
  concept (sprites,) index into concepts.tsv      style (sprites,) index into STYLES + HELD_OUT
usage: sprites.py WORK_DIR"""
import glob, io, json, sys
from pathlib import Path
import numpy as np
import resvg_py
from PIL import Image

STYLES = ["noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "twemoji", "emojione"]
HELD_OUT = ["openmoji"]  # CC-BY-SA: drawn for evaluation only, never trained on, never shipped
SIDE = 224


def concepts():
    """[(noun, article, plural, code points, group)], in the order of the class indices."""
    rows = (Path(__file__).parent / "concepts.tsv").read_text().splitlines()
    return [(n, a, p, c.split(), g) for n, a, p, c, g in (r.split("\t") for r in rows if not r.startswith("#"))]


def icon_set(work, style):
    folder = glob.glob(f"{work}/npm/iconify-json-{style}-[0-9]*/")[0]
    chars = Path(folder, "chars.json")
    return json.load(open(folder + "icons.json")), json.load(open(chars)) if chars.exists() else {}


def svg(icons, chars, noto_chars, point):
    keys = [point.lower(), point.lower() + "-fe0f"]
    name = next((t[k] for t in (chars, noto_chars) for k in keys if k in t), None)
    for _ in range(3):
        if name in icons.get("aliases", {}):
            name = icons["aliases"][name]["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    w, h = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    box = f'{icon.get("left", 0)} {icon.get("top", 0)} {w} {h}'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="320" height="320">{icon["body"]}</svg>')


def draw(source):
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=source)))).convert("RGBA")
    bounds = image.getchannel("A").getbbox()
    if not bounds:
        return None
    image = image.crop(bounds)
    scale = SIDE / max(image.size)
    image = image.resize([max(1, round(s * scale)) for s in image.size], Image.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(square)


def main(work):
    sets = {s: icon_set(work, s) for s in STYLES + HELD_OUT}
    noto_chars = sets["noto"][1]
    rgba, concept, style = [], [], []
    for c, (noun, _, _, points, _) in enumerate(concepts()):
        for point in points:
            missing = []
            for s, (icons, chars) in enumerate(sets.values()):
                source = svg(icons, chars, noto_chars, point)
                picture = draw(source) if source else None
                if picture is None:
                    missing.append((STYLES + HELD_OUT)[s])
                    continue
                rgba.append(picture), concept.append(c), style.append(s)
            if missing:
                print(noun, point, "is not in", *missing)
    np.savez(f"{work}/sprites.npz", rgba=np.array(rgba), concept=np.array(concept), style=np.array(style))
    print(len(rgba), "sprites of", len(concepts()), "concepts")


if __name__ == "__main__":
    main(sys.argv[1])
