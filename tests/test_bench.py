"""The benchmark of a GPU runs to its end, here on a CPU with a tiny model."""

import pytest
import torch

import train_gpt2
from dev import bench, bench_gpu
from gpt2lab import kernels
from train_gpt2 import GPTConfig

TINY = GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=32)
WORKLOAD = bench_gpu.Workload("cpu", TINY, B=2, T=32, micro_steps=2, updates=1)
CONTENDERS = {contender.name: contender for contender in bench_gpu.list_contenders("max-autotune")}


@pytest.fixture
def compile_modes(monkeypatch):
    """The modes that torch.compile is called with. It compiles nothing here, to be quick."""
    modes = []

    def record_mode(model, mode=None):
        modes.append(mode)
        return Wrapper(model)

    monkeypatch.setattr(torch, "compile", record_mode)
    return modes


class Wrapper(torch.nn.Module):
    """What torch.compile returns: another module, which calls the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model(*args)


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_contender_is_what_its_name_says(name, compile_modes, monkeypatch):
    """Guards against a peer that has our layers, and against a contender that is not compiled."""
    optimized = []
    monkeypatch.setattr(kernels, "optimize", optimized.append)
    result = bench_gpu.measure(CONTENDERS[name], WORKLOAD)
    assert result["tokens_per_sec"] > 0 and result["B"] == 2
    assert len(optimized) == name.startswith("ours")
    assert result["compiled"] == ("eager" not in name)
    mode = name.split(", ")[1]
    assert compile_modes == {"eager": [], "compiled": [None]}.get(mode, [mode])


def test_all_contenders_train_on_the_same_loss():
    """Guards against a comparison of contenders that do different work."""
    losses = []
    for name in ("plain, eager", "ours, eager"):
        run, _, batches = bench_gpu.make_run(CONTENDERS[name], WORKLOAD)
        losses.append(run.model(*next(batches))[1].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_contender_without_enough_memory_tries_half_the_batch(monkeypatch):
    """Guards against a benchmark that ends because the peer needs more memory than we do."""
    tried = []

    def measure(contender, workload):
        tried.append((workload.B, workload.micro_steps))
        return None if workload.B > 2 else {"B": workload.B}

    class PoolHere:
        """A process pool that computes in this process."""

        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, *args):
            value = function(*args)
            return type("Future", (), {"result": lambda self: value})()

    monkeypatch.setattr(bench_gpu, "ProcessPoolExecutor", PoolHere)
    monkeypatch.setattr(bench_gpu, "measure", measure)
    workload = WORKLOAD._replace(B=8)
    assert bench_gpu.measure_alone(CONTENDERS["plain, eager"], workload) == {"B": 2}
    assert tried == [(8, 2), (4, 4), (2, 8)]


def test_out_of_memory_is_not_an_error(monkeypatch):
    def run_out(*args):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(train_gpt2, "training_step", run_out)
    assert bench_gpu.measure(CONTENDERS["plain, eager"], WORKLOAD) is None
    assert bench_gpu.format_result("plain, eager", None, None).endswith("out of memory")


def test_a_row_of_the_table_has_all_figures():
    peer = {"B": 64, "tokens_per_sec": 200_000, "compiled": True, "compile_seconds": 20.4,
            "mfu": 0.3456, "allocated_gb": 30.12, "reserved_gb": 33.0}
    assert bench_gpu.format_result("ours, compiled", peer | {"tokens_per_sec": 250_000}, peer) == (
        "ours, compiled         B  64   250,000 tokens/s  1.25 x plain, compiled | mfu 34.6% | "
        "30.1 GB, 33.0 GB reserved | compiled in 20 s")


def test_losses_come_from_a_run_of_the_training_script():
    """Guards against flags of the script that the benchmark no longer knows."""
    losses = bench_gpu.bench_losses("cpu", num_words=20_000, n_layer=1, n_head=1, n_embd=32,
                                    B=4, T=32, block_size=32, total_batch_size=256, max_steps=3,
                                    val_tokens=256)
    assert len(losses) == 3 and losses[0] == pytest.approx(7.34, abs=0.1)


def test_the_gpu_benchmark_without_a_gpu_is_an_error_in_one_line(call_main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = call_main(bench, "gpu")
    assert code == 2 and "torch sees none" in err and err.count("\n") == 1
