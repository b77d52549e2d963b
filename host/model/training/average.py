"""The mean of the weights of trainings that went on from one another: better than each of them, INT4 included, for what differs
between their ends is mostly chance ("model soups", Wortsman et al., 2022).

usage: average.py WORK_DIR NAME OF=SHARE ..."""
import sys
import torch


def add(total, part, share):
    """total + share * part, of nested dictionaries of tensors; what is no number is the last one's."""
    if isinstance(part, dict):
        return {k: add((total or {}).get(k), v, share) for k, v in part.items()}
    if not torch.is_tensor(part) or not part.is_floating_point():
        return part
    return part * share if total is None else total + part * share


def main():
    work, name, *parts = sys.argv[1:]
    shares = [(of, float(share)) for of, share in (part.split("=") for part in parts)]
    whole, total = sum(share for _, share in shares), None
    for of, share in shares:
        saved = torch.load(f"{work}/{of}.pt", map_location="cpu")
        total = add(total, {k: v for k, v in saved.items() if k != "optimiser"}, share / whole)
    torch.save(total, f"{work}/{name}.pt")


if __name__ == "__main__":
    main()
