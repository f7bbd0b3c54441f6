"""
The scripts on a GPU that computes nothing (docs/null-gpu.md). These tests start processes with
dev/nullgpu/run, which need Linux and a folder made by dev/nullgpu/setup, and are skipped elsewhere.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, make_flags, tiny_flags

NULLGPU = os.environ.get("NULLGPU")
pytestmark = pytest.mark.skipif(
    not NULLGPU, reason="NULLGPU names no folder made by dev/nullgpu/setup")

# four updates of two micro-steps; before updates 0 and 2 and at the end, evaluation and samples
FLAGS = dict(n_embd=64, device="auto", max_steps=4, eval_every=2, sample_every=2, save_every=2,
             val_tokens=256)
GRADIENT_BYTES = 4 * 126_720  # of this model, in float32


@pytest.fixture(scope="session")
def inductor_cache(tmp_path_factory):
    """A folder for compiled kernels, shared by the processes of one run of the tests."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "inductor"


@pytest.fixture
def on_null_gpu(tmp_path, inductor_cache):
    """
    A function that runs a command on the null GPU, with stdout and stderr in the order in which
    they were written: on_null_gpu(*words, exit_code=0, **environment) returns this output.
    """

    def run(*words, exit_code=0, **environment):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1",
               "TORCHINDUCTOR_CACHE_DIR": str(inductor_cache), "NULL_STATS": "1", **environment}
        done = subprocess.run([ROOT / "dev" / "nullgpu" / "run", *map(str, words)], cwd=tmp_path,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                              encoding="utf-8", env=env, timeout=600)
        assert done.returncode == exit_code, done.stdout
        return done.stdout

    return run


def train_flags(data_dir, log_dir, *switches, **changes):
    """The flags of a tiny training run, FLAGS with `changes` and `switches`, as words."""
    return [*tiny_flags(data_dir=data_dir, log_dir=log_dir, **(FLAGS | changes)), *switches]


def counted_updates(output, rank=0):
    """{step: counters} of the updates that a rank of dev.nullgpu.train has counted."""
    found = re.findall(r"^counted (\d+) (\{.*\})$", output, re.MULTILINE)
    counters = [(int(step), json.loads(text)) for step, text in found]
    return {step: values for step, values in counters if values["rank"] == rank}


def all_counters(output):
    """The counters of the whole process."""
    return json.loads(re.findall(r"nullgpu statistics: (\{.*?\})", output)[-1])


def check_plain_update(updates):
    """Update 2, with no evaluation behind it, reads from the device once: a few numbers."""
    counters = updates[2]
    assert counters["copies_to_host"] == 1, counters
    assert counters["bytes_to_host"] <= 32
    assert counters["synchronizations"] <= 3  # this read, and one wait on either side of the clock
    assert counters["copies_to_device"] <= 2 * 2 + 1  # x and y of two micro-steps, the signals


# -----------------------------------------------------------------------------
# the null GPU itself

PROBE = """
import json, torch
from dev.nullgpu.train import read_counters
GIB = 2**30
x = torch.arange(5.0)
assert torch.equal(x.cuda().cpu(), x) and (x.cuda() + 1).sum().item() == 0
assert x.pin_memory().is_pinned() and not x.is_pinned()
torch.cuda.empty_cache()
free, total = torch.cuda.mem_get_info()
block = torch.empty(GIB, dtype=torch.uint8, device="cuda")
used = free - torch.cuda.mem_get_info()[0]
try:
    torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    failed = False
except torch.OutOfMemoryError:
    failed = True
del block
torch.cuda.empty_cache()
freed = free == torch.cuda.mem_get_info()[0]
a, graph = torch.zeros(64, 64, device="cuda"), torch.cuda.CUDAGraph()
before = read_counters()
with torch.cuda.graph(graph):
    b = (a @ a).relu()
graph.replay()
graph.replay()
after = read_counters()
refused = False
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.current_stream().synchronize()
except RuntimeError as error:
    refused = "captur" in str(error)
print("probe:", json.dumps([total / GIB, used / GIB, failed, freed, refused,
      *(after[n] - before[n] for n in ("captures", "captured", "replays", "replayed"))]))
"""




def test_the_library_is_up_to_date():
    """Guards against a library that was built before its sources were changed."""
    sources = [path.stat().st_mtime for path in (ROOT / "dev" / "nullgpu").glob("*.[ch]")]
    built = (Path(NULLGPU) / "lib" / "libcuda.so.1").stat().st_mtime
    assert max(sources) < built, "call dev/nullgpu/setup again"


@pytest.mark.parametrize("expandable", [False, True])
def test_the_null_gpu_keeps_account(on_null_gpu, expandable):
    """
    Guards against a null GPU whose memory never runs out or is never freed, which lets captured
    graphs wait for the device, or whose numbers come back as stale garbage.
    """
    output = on_null_gpu("python", "-c", PROBE, NULL_MEMORY="2.5",
                         PYTORCH_ALLOC_CONF=f"expandable_segments:{expandable}")
    total, used, *rest = json.loads(re.search("probe: (.*)", output)[1])
    assert total == 2.5
    assert used == pytest.approx(1, abs=0.1)
    # memory ran out, came back, a wait was refused; one graph of two kernels was replayed twice
    assert rest == [True, True, True, 1, 2, 2, 4]
    counters = all_counters(output)
    assert counters["failed_allocations"] >= 1
    assert counters["peak_allocated_bytes"] >= 2**30


@pytest.mark.parametrize("environment, fact", [
    ({}, "1 x NVIDIA H100 80GB HBM3, 79 GiB, sm_90"),
    ({"NULL_CC": "80", "NULL_DEVICES": "2"}, "2 x NVIDIA A100-SXM4-80GB, 79 GiB, sm_80"),
    ({"NULL_NAME": "Tesla T4"}, "1 x Tesla T4, 15 GiB, sm_75"),
], ids=["default", "by compute capability", "by name"])
def test_check_sees_the_card(on_null_gpu, data_dir, tmp_path, environment, fact):
    """Guards against a --check that fails where there is a GPU, or describes another one."""
    output = on_null_gpu("python", ROOT / "train_gpt2.py", "--check",
                         *train_flags(data_dir, tmp_path), **environment)
    assert fact in output
    assert ("bfloat16: yes" in output) == ("sm_75" not in fact)
    assert "the run can start" in output


def test_memory_that_runs_out_is_one_line(on_null_gpu, data_dir, tmp_path):
    """Guards against a traceback where a user's GPU is too small, and a --check that lets it go."""
    # the weights and AdamW's moments take 27 MB, the device has 10 MiB
    flags = train_flags(data_dir, tmp_path / "log", "--no_compile", n_embd=256)
    check, output = (on_null_gpu("python", ROOT / "train_gpt2.py", *words, NULL_MEMORY="0.01",
                                 exit_code=2) for words in (["--check", *flags], flags))
    assert "too little memory" in check
    assert "not enough memory" in output and "Traceback" not in output


# -----------------------------------------------------------------------------
# training


def test_eager_training_and_resume(on_null_gpu, data_dir, tmp_path):
    """
    Guards against a read from the device in every micro-step, and against evaluation, samples,
    checkpoints or resuming that do not work on CUDA.
    """
    train = ["python", "-m", "dev.nullgpu.train"]
    output = on_null_gpu(*train, *train_flags(data_dir, tmp_path / "log", "--no_compile", ema=0.9),
                         TORCH_LOGS="recompiles")
    assert "trained to step 4" in output
    assert "__recompiles" not in output.partition("counted 0 ")[2]
    assert output.count("[Sample 4]") == output.count("validation loss: ") == 3
    assert output.count("validation loss of the averaged weights: ") == 3
    updates = counted_updates(output)
    check_plain_update(updates)
    counters = all_counters(output)
    assert counters["captures"] == counters["failed_allocations"] == 0
    flags = ("--no_compile", "--resume", "--resume_anyway")
    output = on_null_gpu(*train, *train_flags(data_dir, tmp_path / "log", *flags, max_steps=6,
                                              ema=0.9))
    assert "trained to step 6" in output
    assert list(counted_updates(output)) == [4]  # 5 was the last one


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled_training(on_null_gpu, data_dir, tmp_path, mode):
    """
    Guards against compiling that fails, that starts again after the first update, and against CUDA
    graphs that are not used, or recorded anew after an evaluation.
    """
    # max-autotune would compile hundreds of matmuls in Triton, which takes minutes
    output = on_null_gpu("python", "-m", "dev.nullgpu.train", *train_flags(
        data_dir, tmp_path / "log", compile_mode=mode), TORCH_LOGS="recompiles",
        TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS="ATEN")
    assert "trained to step 4" in output and "compiled in" in output
    assert "warning" not in output
    assert "__recompiles" not in output.partition("counted 0 ")[2]
    updates = counted_updates(output)
    check_plain_update(updates)
    assert not any(counters["captures"] for counters in updates.values())
    assert updates[2]["peak_bytes"] == updates[1]["peak_bytes"]
    if mode == "default":
        assert all_counters(output)["captures"] == 0
    else:
        # a forward and a backward for each micro-step
        assert {counters["replays"] for counters in updates.values()} == {4}
        assert updates[2]["replayed"] > updates[2]["launches"]


def test_float16_training(on_null_gpu, data_dir, tmp_path):
    """Guards against loss scaling or compiling that fails on a GPU without bfloat16."""
    run = ["python", "-m", "dev.nullgpu.train", *train_flags(
        data_dir, tmp_path / "log", "--compile", dtype="float16")]
    output = on_null_gpu(*run, NULL_CC="75")
    assert "trained to step 4" in output and "compiled in" in output
    output = on_null_gpu(*run, "--resume", "--resume_anyway", "--max_steps", 6, NULL_CC="75")
    assert list(counted_updates(output)) == [4]


@pytest.mark.parametrize("switches", [["--no_compile"], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_ranks(on_null_gpu, data_dir, tmp_path, switches):
    """
    Guards against DDP or FSDP that fails on CUDA, and gradients that are sent in every micro-step.
    """
    flags = train_flags(data_dir, tmp_path / "log", *switches, B=2)  # two micro-steps
    output = on_null_gpu("torchrun", "--nproc_per_node=2", "-m", "dev.nullgpu.train", *flags,
                         NULL_DEVICES="2")
    assert "trained to step 4" in output
    for rank in range(2):
        updates = counted_updates(output, rank)
        assert list(updates) == [0, 1, 2]
        if switches == ["--no_compile"]:
            # gloo sends gradients by way of the host
            assert GRADIENT_BYTES < updates[2]["bytes_to_host"] < 1.1 * GRADIENT_BYTES


# -----------------------------------------------------------------------------
# a trained model


def launched_kernels(output):
    """The names of the kernels that NULL_TRACE=1 has printed, as a compiler mangles them."""
    return re.findall("^nullgpu: launch (.*)$", output, re.MULTILINE)


def test_sampling_takes_flash_attention(on_null_gpu, log_dir):
    """
    Guards against sampling with cuDNN's attention, which makes a plan for every new length. The
    null GPU has no cuDNN, so that sampling fails if torch is free to choose it and does.
    """
    output = on_null_gpu("python", ROOT / "sample.py", "--model", log_dir, "--dtype", "bfloat16",
                         *make_flags(num_samples=2, max_new_tokens=4, prompt="The"),
                         NULL_TRACE="1", TORCH_CUDNN_SDPA_DEPRIORITIZED="0")
    kernels = launched_kernels(output)
    assert kernels
    # one for each of two layers and four tokens
    assert sum("flash_fwd" in kernel for kernel in kernels) == 2 * 4, kernels


def test_hellaswag(on_null_gpu, log_dir, hellaswag_examples):
    """Guards against scoring that fails on CUDA."""
    output = on_null_gpu("python", ROOT / "hellaswag.py", "--model", log_dir)
    assert "/11" in output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluate(on_null_gpu, log_dir, tmp_path, dtype):
    """Guards against prefix trees and single rows that fail on CUDA."""
    item = {"query": "What is a name?", "choices": ["A name.", "A value."], "gold": 0}
    passage = {"text": "A name is a name and a value is a value"}
    for name, line in (("piqa", item), ("lambada_test", passage)):
        (tmp_path / f"{name}.jsonl").write_text(12 * (json.dumps(line) + "\n"))
    output = on_null_gpu("python", ROOT / "evaluate.py", "--model", log_dir, "--data", tmp_path,
                         "--dtype", dtype)
    assert [line.split()[6] for line in output.splitlines() if line.startswith("piqa ")] == ["12"]


# -----------------------------------------------------------------------------
# memory


RUNS = ["--B 8 --no_compile", "--B 64 --no_compile", "--B 16 --no_compile --grad_checkpoint",
        "--B 8 --no_compile --dtype float16", "--B 16 --n_layer 4 --compile",
        "--B 16 --n_layer 4 --compile --dtype float16",
        "--B 8 --n_layer 4 --compile --compile_mode reduce-overhead"]


def test_check_expects_the_memory_that_training_takes(on_null_gpu, data_dir, tmp_path):
    """Guards against a --check that starts runs which do not fit, or refuses those that do."""
    cases = [f"{flags} --data_dir {data_dir} --log_dir {tmp_path / 'log'} --total_batch_size "
             f"{2 * 1024 * int(flags.split()[1])}" for flags in RUNS]
    output = on_null_gpu("python", ROOT / "tests" / "nullgpu" / "measure_peak.py", *cases)
    expected = [float(gib) for gib in re.findall(r"memory: about ([\d.]+) GiB", output)]
    peaks = [int(size) / 2**30 for size in re.findall(r"peak: (\d+) bytes", output)]
    far_off = [f"{flags}: {guess:.1f} GiB expected, {peak:.2f} taken"
               for flags, guess, peak in zip(RUNS, expected, peaks, strict=True)
               if guess != pytest.approx(peak, rel=0.15)]
    assert not far_off
