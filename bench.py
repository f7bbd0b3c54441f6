"""
Every speed this project claims, each beside a peer, measured in one run.

    python bench.py data            # text to shards, beside build-nanogpt's way and bare tiktoken

Machines drift, so contenders take turns and medians are compared: the ratios count, not the times.
The last line of the output is JSON.
"""

import argparse
import json
import statistics
import time

import fineweb


def take_turns(contenders, rounds=3):
    """Median seconds of each contender, a dict of functions, called in turn `rounds` times."""
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


BENCHES = {}  # name on the command line: function that prints a table and returns plain values


def main():
    parser = fineweb.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=tuple(BENCHES))
    args = parser.parse_args()
    print(json.dumps({args.which: BENCHES[args.which]()}))


if __name__ == "__main__":
    fineweb.run_main(main)
