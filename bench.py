"""
Every speed this project claims, each beside a peer, measured in one run.

    python bench.py data            # text to shards, beside build-nanogpt's way and bare tiktoken
    python bench.py loader          # reading batches, beside a training step

Machines drift, so contenders take turns and medians are compared: the ratios count, not the times.
The last line of the output is JSON.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

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


# -----------------------------------------------------------------------------
# data


def real_texts():
    """English documents: FineWeb-EDU's where GPT2_TEST_DATA has some, else the builtin ones."""
    sample = Path(os.environ.get("GPT2_TEST_DATA", ".")) / "fineweb_edu_sample.jsonl"
    if sample.is_file():
        with open(sample, encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]
    return fineweb.sources.builtin_documents()


def start_worker():
    """Give a worker of the pool its tokenizer."""
    import tiktoken
    start_worker.gpt2 = tiktoken.get_encoding("gpt2")


def tokenize_document(text):
    """One document the way build-nanogpt's workers do it."""
    gpt2 = start_worker.gpt2
    tokens = np.array([gpt2.eot_token, *gpt2.encode_ordinary(text)])
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def pool_pass(path, out):
    """Read jsonl, tokenize in a pool of cpu // 2 processes a document a task, write one shard."""
    with open(path, encoding="utf-8") as file, multiprocessing.Pool(
            max(1, os.cpu_count() // 2), start_worker) as pool:
        texts = (json.loads(line)["text"] for line in file)
        tokens = np.concatenate(list(pool.imap(tokenize_document, texts, chunksize=16)))
    np.save(out / "pool.npy", tokens)


def bench_data():
    """Tokens a second from jsonl to shards, beside build-nanogpt's way and bare tiktoken."""
    import tiktoken
    texts = real_texts()
    texts *= 1 + 52_000_000 // sum(map(len, texts))
    gpt2 = tiktoken.get_encoding("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = folder / "texts.jsonl"
        with open(source, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        parquet = folder / "texts.parquet"
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), parquet)
        runs = iter(range(1000))
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        medians = take_turns({
            "build-nanogpt's way": lambda: pool_pass(source, folder),
            "bare tiktoken": lambda: gpt2.encode_ordinary_batch(texts, num_threads=os.cpu_count()),
            "fineweb.py, jsonl": lambda: fineweb.prepare([source], folder / str(next(runs))),
            "fineweb.py, parquet": lambda: fineweb.prepare([parquet], folder / str(next(runs))),
            "fineweb.py, bpe:8192": lambda: fineweb.prepare(
                [source], folder / str(next(runs)), "bpe:8192")})
        splits = fineweb.read_meta(folder / "0")["splits"]
    num_tokens = sum(split["tokens"] for split in splits.values())
    print(f"{megabytes:.0f} MB, {num_tokens / 1e6:.1f} M tokens, {os.cpu_count()} cores")
    pool, bare = medians["build-nanogpt's way"], medians["bare tiktoken"]
    for name, seconds in medians.items():
        print(f"{name:20} {seconds:6.2f} s {megabytes / seconds:6.1f} MB/s "
              f"{pool / seconds:5.2f} x build-nanogpt {bare / seconds:5.2f} x tiktoken")
    return {"mb": megabytes, "tokens": num_tokens, "seconds": medians}


# -----------------------------------------------------------------------------
# loader


def resident_mb():
    """Resident memory of this process now, in MB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**20


def bench_loader():
    """Opening a shard of 100M tokens, and a batch beside a training step of GPT-2 124M."""
    import torch

    from train_gpt2 import GPT, DataLoaderLite, GPTConfig
    B, T = 4, 128
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for split, index, size in (("val", 0, 10_000), ("train", 1, 100_000_000)):
            tokens = np.random.default_rng(0).integers(0, 50_256, size, dtype=np.uint16)
            np.save(folder / fineweb.shard_name(split, index), tokens)
        del tokens
        before = resident_mb()
        loader = None

        def open_and_read():
            nonlocal loader
            loader = DataLoaderLite(folder, "train", B, T)
            loader.batch(0)

        opening = take_turns({"open": open_and_read})["open"]
        grown = resident_mb() - before
        steps = iter(range(1, 1000))
        torch.manual_seed(0)
        model = GPT(GPTConfig())
        optimizer = model.configure_optimizers(0.1, 6e-4)

        def step():
            _, loss = model(*loader.batch(0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = take_turns({"batch": lambda: loader.batch(next(steps)), "step": step}, 5)
    share = seconds["batch"] / seconds["step"]
    print(f"open 100M tokens and read a batch: {1000 * opening:.1f} ms, +{grown:.1f} MB resident")
    print(f"a batch of {B} x {T}: {1000 * seconds['batch']:.2f} ms, {share:.3%} of a 124M step")
    return {"open_seconds": opening, "resident_mb": grown, "batch_share_of_step": share}


# name on the command line: function that prints a table and returns plain values
BENCHES = {"data": bench_data, "loader": bench_loader}


def main():
    parser = fineweb.OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=tuple(BENCHES))
    args = parser.parse_args()
    print(json.dumps({args.which: BENCHES[args.which]()}))


if __name__ == "__main__":
    fineweb.run_main(main)
