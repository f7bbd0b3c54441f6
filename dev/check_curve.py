"""
Compare the first 20 losses of the demo with stored ones, so that no change of them goes unseen.

    python -m dev.check_curve            # exit code 1 if they differ from dev/demo_curve.txt
    python -m dev.check_curve --write    # store this tree's losses, after a change that is meant

The demo's own text consists of docstrings of the Python that runs the demo, so the text differs
between Python versions. This check trains on a made-up text, because that is the same everywhere.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
CURVE = ROOT / "dev" / "demo_curve.txt"
STEPS = 20
# nats a token. Machines round differently: without vector instructions a loss moved by 1e-5, and
# bfloat16 moved one by 3e-4
TOLERANCE = 2e-4


def make_text(n_words=60_000, vocabulary=1000):
    """Made-up English-looking sentences; the same for every Python version."""
    draw = Random(1337).random  # the one method whose sequence Python promises to keep
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]

    def pick(items):
        return items[int(draw() * len(items))]

    words = ["".join(pick(syllables) for _ in range(1 + i % 3)) for i in range(vocabulary)]
    # eight words can follow a word, so that a model can learn from context
    followers = [[int(vocabulary * draw() ** 2) for _ in range(8)] for _ in words]
    parts, index = [], 0
    for n in range(1, n_words + 1):
        parts.append(words[index] + (".\n" if n % 12 == 0 else " "))
        index = pick(followers[index])
    return "".join(parts)


def run_script(name, *args, cwd):
    """Run a script of this tree on one thread; print what it said and leave if it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *args], cwd=cwd, check=False, capture_output=True,
        encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}{name} failed with exit code {done.returncode}")


def train_demo(folder):
    """Train the demo for STEPS updates in `folder`; returns the training loss of each."""
    (folder / "text.txt").write_text(make_text(), encoding="utf-8", newline="\n")
    run_script("fineweb.py", "--source", "text.txt", "--tokenizer", "bpe:1536", "--out", "data",
               cwd=folder)
    run_script("train_gpt2.py", "--preset", "demo", "--data_dir", "data", "--log_dir", "log",
               "--max_steps", str(STEPS), cwd=folder)
    lines = (folder / "log" / "log.txt").read_text(encoding="utf-8").splitlines()
    losses = {int(step): float(value) for step, stream, value in map(str.split, lines)
              if stream == "train"}
    return [losses[step] for step in range(STEPS)]


def read_curve():
    """The stored losses, by step."""
    lines = CURVE.read_text(encoding="utf-8").splitlines()
    return [float(line.split()[1]) for line in lines if not line.startswith("#")]


def write_curve(losses):
    """Store losses as `step loss` lines."""
    lines = ["# training loss of the demo's first updates on the text of dev/check_curve.py",
             *(f"{step} {loss}" for step, loss in enumerate(losses))]
    CURVE.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store the losses of this tree")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        losses = train_demo(Path(folder))
    if write:
        write_curve(losses)
        return
    stored = read_curve()
    differences = [abs(a - b) for a, b in zip(losses, stored, strict=True)]
    largest = max(differences)
    step = differences.index(largest)
    print(f"largest difference from {CURVE.name}: {largest:.1e} at step {step} "
          f"({losses[step]} instead of {stored[step]}); {TOLERANCE:.0e} is allowed")
    if not all(d <= TOLERANCE for d in differences):  # a NaN fails too
        sys.exit("error: the losses have changed. If that is meant, run "
                 "python -m dev.check_curve --write and say why in the commit")


if __name__ == "__main__":
    main()
