"""photos.py SOURCE OUT: the clothing photographs, at most 150 a kind for training and 30 for validation, scaled to 224 px."""
import sys
from pathlib import Path
from PIL import Image

source, out = map(Path, sys.argv[1:])
for split, most in (("train", 150), ("validation", 30)):
    for kind in sorted(p for p in (source / split).iterdir() if p.is_dir()):
        folder = out / split / kind.name
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(kind.glob("*.jpg"))[:most]:
            image = Image.open(file).convert("RGB")
            image.thumbnail((224, 224), Image.LANCZOS)
            image.save(folder / file.name, quality=90)
