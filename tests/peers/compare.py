"""Visor beside its peers, taking turns in one run: compare.py VISOR [--rounds N] [--folder DIR] [--busy].

Every round runs each of them once, in a process of its own, on the same weights' shapes and the same number of threads; the
table tells medians, their spread, and Visor's ratio to the best of the others. --busy adds a last round of Visor beside a process
that keeps one core busy. README.md beside this file says how to install what it needs.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(*command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def visor(binary):
    told = run(binary, "bench", "--shape", "phi-3.5-vision", "--json")
    measured = told["measured"]
    return {
        "warm_load_s": measured["warm_load_s"],
        "prefill_tokens_per_s": next(p["tokens_per_s"] for p in measured["prefill"] if p["tokens"] == 757),
        "decode_tokens_per_s": measured["decode"]["tokens_per_s"],
        "batch_tokens_per_s": measured["batches"][-1]["tokens_per_s"],
        "seconds_per_crop": measured["vision"][0]["tower_seconds_per_crop"],
        "first_token_s": measured["first_tokens"][0]["seconds"],
        "peak_bytes": told["peak_resident_mib"] * 2**20,
        "crops": measured["first_tokens"][0]["crops"],
        "prompt_tokens": measured["first_tokens"][0]["prompt_tokens"],
        "read_share": measured["decode"]["read_share"],
        "prefill_share": next(p["product_share"] for p in measured["prefill"] if p["tokens"] == 757),
    }


def spin():
    while True:
        pass


def beside_a_busy_core(binary):
    other = multiprocessing.Process(target=spin, daemon=True)
    other.start()
    try:
        return visor(binary)
    finally:
        other.kill()


def measure(arguments, folder):
    threads = os.cpu_count()
    runs = {
        "visor": lambda: visor(arguments.visor),
        "llama.cpp Q4_0": lambda: run(sys.executable, HERE / "llama.py", folder / "text-q4_0.gguf", threads),
        "llama.cpp Q4_K_M": lambda: run(sys.executable, HERE / "llama.py", folder / "text-q4_k_m.gguf", threads),
        "ONNX Runtime f32": lambda: run(sys.executable, HERE / "tower.py", folder / "vit-f32.onnx", threads),
        "ONNX Runtime int8": lambda: run(sys.executable, HERE / "tower.py", folder / "vit-int8.onnx", threads),
    }
    figures = {name: [] for name in runs}
    for turn in range(arguments.rounds):
        for name, measured in runs.items():
            print(f"round {turn + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
            figures[name].append(measured())
    if arguments.busy:
        print("visor beside a busy core", file=sys.stderr, flush=True)
        figures["visor, one core busy"] = [beside_a_busy_core(arguments.visor)]
    return figures


def add_first_token(figures):
    """The fastest of the peers put together, round by round: crops through the fastest tower, the prompt through the fastest text model."""
    rounds = []
    for turn, ours in enumerate(figures["visor"]):
        crop = min(told[turn]["seconds_per_crop"] for name, told in figures.items() if name.startswith("ONNX"))
        prefill = max(told[turn]["prefill_tokens_per_s"] for name, told in figures.items() if name.startswith("llama"))
        rounds.append({"first_token_s": ours["crops"] * crop + ours["prompt_tokens"] / prefill})
    figures["peers put together"] = rounds


def values(told, figure):
    return [one[figure] for one in told if figure in one]


def table(figures):
    ours = figures["visor"]
    rows = [
        ("prefill of 757 tokens, tokens/s", "prefill_tokens_per_s", True),
        ("decode after them, tokens/s", "decode_tokens_per_s", True),
        ("8 sequences decoding, tokens/s", "batch_tokens_per_s", True),
        ("vision tower, s a crop", "seconds_per_crop", False),
        (f"first token, {ours[0]['crops']} crops, {ours[0]['prompt_tokens']} tokens, s", "first_token_s", False),
        ("load, page cache warm, s", "warm_load_s", False),
        ("peak memory, bytes", "peak_bytes", False),
    ]
    for title, figure, more_is_better in rows:
        print(f"\n{title}")
        medians = {}
        for name, told in figures.items():
            got = values(told, figure)
            if got:
                medians[name] = statistics.median(got)
                print(f"  {name:22} {medians[name]:14.2f}   {min(got):.2f} to {max(got):.2f}")
        others = [median for name, median in medians.items() if not name.startswith("visor")]
        if others:
            ratio = medians["visor"] / max(others) if more_is_better else min(others) / medians["visor"]
            print(f"  visor is {ratio:.2f} times as good as the best of the others")
        if "visor, one core busy" in medians:
            ratio = medians["visor"] / medians["visor, one core busy"]
            print(f"  with one core busy {ratio if more_is_better else 1 / ratio:.2f} times as slow")
    shares = [statistics.median(values(ours, share)) for share in ("prefill_share", "read_share")]
    print(f"\nvisor's prefill takes {shares[0]:.0%} of the product rate, its decode {shares[1]:.0%} of the bandwidth of plain reading beside its steps")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("visor", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=HERE.parent.parent / "target/peers")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--json", type=Path, help="where to keep all figures")
    arguments = parser.parse_args()
    subprocess.run([sys.executable, HERE / "make.py", arguments.folder], check=True)
    figures = measure(arguments, arguments.folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    add_first_token(figures)
    table(figures)


if __name__ == "__main__":
    main()
