"""What the benchmarks share: contenders that take turns, memory, a matmul's speed, and texts."""

import json
import mmap
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from gpt2lab import sources


def median_seconds(contenders, rounds=3):
    """{name: median seconds} of a dict of functions, which are called in turn `rounds` times."""
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class RemoteObject:
    """
    An object that lives in a process of its own, because threads and the C library's memory belong
    to a whole process. `call` calls a method of the object.
    """

    instance = None  # the object, in its process

    def __init__(self, cls, *args):
        """The process makes `cls(*args)` before the first call."""
        self.pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), RemoteObject.create, (cls, args))

    @staticmethod
    def create(cls, args):
        """Make the object. This runs in its process."""
        RemoteObject.instance = cls(*args)

    @staticmethod
    def call_method(method, args):
        """Call a method of the object. This runs in its process."""
        return getattr(RemoteObject.instance, method)(*args)

    def call(self, method, *args):
        """Call a method of the object, wait for it and return its result."""
        return self.pool.submit(RemoteObject.call_method, method, args).result()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown()


def sgemm_gflops(size=2048):
    """Billions of float32 operations a second in a matmul of two square matrices."""
    a, b = torch.randn(2, size, size)
    a @ b  # warms up
    return 2 * size**3 / median_seconds({"a @ b": lambda: a @ b}, 9)["a @ b"] / 1e9


def resident_mb():
    """The resident memory of this process now, in MB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**20


def peak_mb():
    """The most memory that was ever resident in this process, in MB (Linux)."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def english_texts():
    """English documents: FineWeb-EDU's where GPT2_TEST_DATA has some, else the builtin ones."""
    path = Path(os.environ.get("GPT2_TEST_DATA", ".")) / "fineweb_edu_sample.jsonl"
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]
    return sources.builtin_documents()
