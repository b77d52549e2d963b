"""curve.py WORK_DIR OUT.svg TOWER_NAMES LANGUAGE_NAMES: the learning curves of the logs, as one drawing.

Names are separated by commas, in the order in which the runs followed each other; "-" for none. Of the tower the cells of
training pictures that it names rightly, against pictures seen; of the decoder its loss, and the answers that are exactly
right on held-out pictures shown as one crop (details: as several), against minutes."""
import json, sys

WIDTH, HEIGHT, LEFT, TOP, LEGEND = 330, 230, 44, 34, 96
INK = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f"]
STEPS = ("single", "global", "detail", "pair")                             # kinds of steps with a loss of their own
ASKED = ("name", "colour", "position", "count", "read", "yes-no", "clothing")


def lines(work, name):
    for line in open(f"{work}/{name}.log"):
        yield json.loads(line)


def tower(work, names):
    series, before = {}, 0
    for name in names:
        last = 0
        for row in lines(work, name):
            if "train" in row:
                last = row["seen"]
                for key, label in (("emoji", "objects"), ("cloth", "clothing"), ("colour", "colors"), ("character", "characters")):
                    series.setdefault(label, []).append(((before + last) / 1000, row["train"][key]))
        before += last
    return series


def language(work, names):
    """(losses, percent of answers right), each {what: [(minutes, value)]}"""
    losses, right, before = {}, {}, 0.
    for name in names:
        now = 0.
        for row in lines(work, name):
            now = row.get("minutes", now)
            for kind in STEPS:
                if kind in row:
                    losses.setdefault(kind, []).append((before + now, row[kind][0]))
            for kind, marks in row.get("held_out", row.get("int4", {})).items():
                for key in ASKED if kind == "single" else ("detail",) if kind == "detail" else ():
                    if key in marks:
                        right.setdefault(key, []).append((before + now, marks[key][0]))
        before += now
    return losses, right


def chart(title, across, series, x0, top=100., unit=" %"):
    right = max(x for points in series.values() for x, _ in points) or 1
    at = lambda x, y: (x0 + LEFT + x / right * WIDTH, TOP + HEIGHT * (1 - min(y, top) / top))
    yield f'<text x="{x0 + LEFT}" y="18" font-weight="bold">{title}</text>'
    for k in range(6):
        y = top * k / 5
        yield f'<path d="M{x0 + LEFT} {at(0, y)[1]:.0f}h{WIDTH}" stroke="#ddd"/><text x="{x0 + LEFT - 6}" y="{at(0, y)[1] + 4:.0f}" text-anchor="end">{y:.3g}{unit}</text>'
    for k in range(5):
        x = right * k / 4
        yield f'<text x="{at(x, 0)[0]:.0f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{x:.0f}</text>'
    yield f'<text x="{x0 + LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">{across}</text>'
    for k, (name, points) in enumerate(series.items()):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*p) for p in points))
        yield f'<path d="M{path}" fill="none" stroke="{INK[k % len(INK)]}" stroke-width="1.6"/>'
        yield f'<text x="{x0 + LEFT + WIDTH + 8}" y="{TOP + 12 + 16 * k}" fill="{INK[k % len(INK)]}">{name}</text>'


def main(work, out, towers, languages):
    charts = []
    if towers != "-":
        charts.append(("Vision tower: cells named rightly (training)", "thousand pictures", tower(work, towers.split(","))))
    if languages != "-":
        losses, right = language(work, languages.split(","))
        charts.append(("Loss of the answers, by kind of step", "minutes", losses, .5, ""))
        charts.append(("Answers exactly right, held-out pictures", "minutes", right))
    wide = LEFT + WIDTH + LEGEND
    parts = [part for k, (title, across, series, *scale) in enumerate(charts) for part in chart(title, across, series, k * wide, *scale)]
    with open(out, "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(charts) * wide}" height="{TOP + HEIGHT + 46}" font-family="sans-serif" font-size="12">'
                f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
