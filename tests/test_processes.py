"""Several processes, signals, faults: what a run does when something happens to it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, forked, read_log, tiny_config

import train_gpt2
from gpt2lab import device, distributed, parallel, preflight, presets, tasks
from gpt2lab.checkpoints import RESUME_KEYS, find_checkpoint, list_checkpoints, load_checkpoint
from gpt2lab.cli import UserError
from train_gpt2 import train

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def job(data_dir, log_dir, world_size=1, **changes):
    """A job for tests/forked.py."""
    keys = ("nan_rank", "nan_steps", "signal_rank", "no_compiler_rank")
    extra = {key: changes.pop(key) for key in keys if key in changes}
    config = TINY | dict(data_dir=str(data_dir), log_dir=str(log_dir), sample_every=0, keep_last=0)
    return {"world_size": world_size, "config": config | changes, **extra}


def weights_and_gradients(log_dir, step=None):
    """Weights, and AdamW's first moment: after one update, a tenth of the clipped gradient."""
    path = list_checkpoints(log_dir)[step] if step else find_checkpoint(log_dir)
    checkpoint = load_checkpoint(path)
    return checkpoint["model"], {name: state["exp_avg"] for name, state
                                 in checkpoint["optimizer"]["state"].items()}


def expect_close(log_a, log_b, step=None, atol=1e-3):
    for a, b in zip(weights_and_gradients(log_a, step), weights_and_gradients(log_b, step),
                    strict=True):
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert torch.allclose(tensor, b[name], atol=atol, rtol=1e-4), name


@needs_fork
def test_any_number_of_processes_trains_alike(data_dir, tmp_path, monkeypatch):
    write_hellaswag(tmp_path, monkeypatch)
    # 8 sequences an update: accumulation 8, 1, 4, 1, 2
    shapes = [(1, 1), (1, 8), (2, 1), (2, 4), (4, 1)]
    jobs = [job(data_dir, tmp_path / f"{world_size}x{B}", world_size, B=B, save_every=1,
                eval_every=3, hellaswag_every=3) for world_size, B in shapes]
    assert all(result["codes"] == [0] * w for result, (w, _) in
               zip(forked(tmp_path, jobs), shapes, strict=True))
    for other in ("1x8", "2x1", "2x4", "4x1"):
        # the gradient itself: a process or micro-step too few would show as a factor
        expect_close(tmp_path / "1x1", tmp_path / other, step=1, atol=1e-6)
        expect_close(tmp_path / "1x1", tmp_path / other)
        for stream, tolerance in (("train", 2e-4), ("val", 2e-4), ("norm", 2e-3), ("hella", 0)):
            expected = read_log(tmp_path / "1x1", stream)
            assert len(expected) == (6 if stream in ("train", "norm") else 3)
            assert read_log(tmp_path / other, stream) == pytest.approx(expected, abs=tolerance)


def write_hellaswag(tmp_path, monkeypatch):
    """Eleven examples where training looks for them."""
    monkeypatch.chdir(tmp_path)
    tasks.DATA_FILE.parent.mkdir()
    words = ["red", "green", "blue", "black", "white", "grey", "brown", "pink"]
    examples = [{"ctx": f"A man is {words[i % 8]} and", "label": i % 4,
                 "endings": [f"sits {words[i % 5]}", "is", "the", words[i % 7]]} for i in range(11)]
    tasks.DATA_FILE.write_text("".join(json.dumps(e) + "\n" for e in examples))


@needs_fork
def test_fsdp_trains_like_ddp_and_each_resumes_the_other(data_dir, tmp_path, monkeypatch):
    write_hellaswag(tmp_path, monkeypatch)
    common = dict(world_size=2, B=2, save_every=3, hellaswag_every=3, sample_every=3)
    ddp, fsdp, crossed = (tmp_path / name for name in ("ddp", "fsdp", "crossed"))
    codes = [result["codes"] for result in forked(tmp_path, [
        job(data_dir, ddp, **common),
        job(data_dir, fsdp, fsdp=True, grad_checkpoint=True, **common),
        job(data_dir, crossed, resume=str(fsdp / "model_00003.pt"), **common),
        job(data_dir, crossed / "b", resume=str(ddp / "model_00003.pt"), fsdp=True, **common),
        job(data_dir, crossed / "c", resume=str(fsdp / "model_00003.pt"), B=4, hellaswag_every=3)])]
    assert codes == [[0, 0]] * 4 + [[0]]
    for folder in (fsdp, crossed, crossed / "b", crossed / "c"):
        expect_close(ddp, folder)
        for stream in ("train", "val", "hella"):
            expected = read_log(ddp, stream)
            got = read_log(folder, stream)
            assert got and got == pytest.approx({s: expected[s] for s in got}, abs=2e-4)
    model = train_gpt2.GPT.from_pretrained(fsdp)  # an ordinary checkpoint
    assert model.lm_head.weight.shape == (384, 32)


@needs_fork
def test_a_signal_to_one_process_ends_all_at_the_same_step(data_dir, tmp_path):
    config = dict(world_size=2, B=1, max_steps=100_000, save_every=5, signal_rank=1, keep_every=0)
    result, = forked(tmp_path, [job(data_dir, tmp_path / "log", **config)])
    assert result["codes"] == [0, 0]
    last = max(list_checkpoints(tmp_path / "log"))
    assert 5 <= last < 5000 and max(read_log(tmp_path / "log", "train")) == last - 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
def test_signals_of_a_run(data_dir, tmp_path):
    flags = [x for name, value in (TINY | dict(max_steps=1_000_000, print_every=1, save_every=0,
                                               keep_last=0)).items() for x in (f"--{name}", value)]
    command = [sys.executable, ROOT / "train_gpt2.py", *flags, "--data_dir", data_dir, "--log_dir"]

    def start(log_dir, *more):
        run = subprocess.Popen([*map(str, command), str(log_dir), *more], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
                               env={**os.environ, "PYTHONUTF8": "1"})
        wait_for_line(run, "step ")
        return run

    run = start(tmp_path / "a")
    run.send_signal(signal.SIGUSR1)
    first = int(re.search(r"model_(\d+).pt", wait_for_line(run, "saved ")).group(1))
    wait_for_line(run, "step ")  # and it goes on
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    steps = list_checkpoints(tmp_path / "a")
    assert list(sorted(steps)) == [first, max(steps)] and max(steps) > first
    assert max(read_log(tmp_path / "a", "train")) == max(steps) - 1
    assert f"stopped by a signal at step {max(steps)}" in out and "next: the same" in out

    run = start(tmp_path / "a", "--resume")
    run.send_signal(signal.SIGINT)
    time.sleep(0.02)
    run.send_signal(signal.SIGINT)  # torchrun passes on what the terminal has sent already
    assert run.communicate(timeout=60) and run.returncode == 0
    assert max(list_checkpoints(tmp_path / "a")) > max(steps)


def wait_for_line(run, start):
    """Read a process's output up to a line that starts so."""
    for line in run.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(f"no {start!r} line: {run.stderr.read()}")


def test_a_signal_ends_evaluation_too(data_dir, tmp_path, monkeypatch):
    """It takes minutes with 10,042 examples, and a machine that is taken away does not wait."""
    config = tiny_config(data_dir, tmp_path / "straight", eval_every=3, sample_every=0)
    train(config)
    original, calls = train_gpt2.evaluate_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train_gpt2, "evaluate_loss", interrupted)
    config = replace(config, log_dir=str(tmp_path / "broken"))
    result = train(config)
    assert result["stopped"] and result["step"] == 3
    assert list(list_checkpoints(tmp_path / "broken")) == [3]
    assert list(read_log(tmp_path / "broken", "val")) == [0]
    train(replace(config, resume="newest"))
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("straight", "broken")]
    assert logs[0] == logs[1]


def test_a_second_interrupt_leaves_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("gpt2lab.signals.time.monotonic", lambda: now[0])
    with train_gpt2.Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.stop
        now[0] += 0.5
        signal.raise_signal(signal.SIGINT)
        now[0] += 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signals.stop = False
    with train_gpt2.Signals():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_torchrun_restarts_after_a_process_died(data_dir, tmp_path):
    flags = [x for name, value in (TINY | dict(
        data_dir=data_dir, log_dir=tmp_path / "log", max_steps=100, save_every=5, keep_last=0,
        B=1, sample_every=0)).items() for x in (f"--{name}", value)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", "--max_restarts=3"]
    run = subprocess.Popen([*map(str, torchrun), str(ROOT / "train_gpt2.py"), *map(str, flags)],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                           errors="replace", env={**os.environ, "PYTHONUTF8": "1"})
    wait_for_line(run, "saved ")
    os.kill(find_rank(run.pid, 1), signal.SIGKILL)
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0, out
    assert "rank 0: error: lost rank 1 (" in out and "--max_restarts=3" in out
    resumed = int(re.search(r"resuming \S+ at step (\d+)", out).group(1))
    assert resumed >= 5 and out.count("using device") == 1  # the first is read already
    assert list(read_log(tmp_path / "log", "train")) == list(range(100))


def find_rank(torchrun_pid, rank):
    """The pid of a process that torchrun started."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun_pid)], check=True,
                              capture_output=True, encoding="utf-8").stdout.split()
    if os.path.isdir("/proc"):
        children = [pid for pid in children if f"\0RANK={rank}\0" in
                    Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")]
        return int(children[0])
    return int(sorted(children, key=int)[rank])


# two nodes

NODES = """
set -e
ip netns add {a}; ip netns add {b}
ip link add v{a} type veth peer name v{b}
ip link set v{a} netns {a}; ip link set v{b} netns {b}
ip -n {a} addr add 10.213.0.1/24 dev v{a}; ip -n {a} link set v{a} up; ip -n {a} link set lo up
ip -n {b} addr add 10.213.0.2/24 dev v{b}; ip -n {b} link set v{b} up; ip -n {b} link set lo up
"""


@pytest.fixture
def two_nodes():
    """Names of two network namespaces with addresses 10.213.0.1 and .2."""
    names = [f"n{os.getpid() % 10**6}a", f"n{os.getpid() % 10**6}b"]
    if shutil.which("ip") is None:
        pytest.skip("no ip command")
    made = subprocess.run(["sh", "-c", NODES.format(a=names[0], b=names[1])], check=False,
                          capture_output=True, encoding="utf-8")
    try:
        if made.returncode:
            pytest.skip(f"no network namespaces: {made.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_nodes_with_folders_of_their_own(two_nodes, data_dir, tmp_path):
    flags = [x for name, value in (TINY | dict(B=1, save_every=2)).items()
             for x in (f"--{name}", value)]
    nodes = []
    for number, name in enumerate(two_nodes):
        shutil.copytree(data_dir, tmp_path / name / "data")
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
                   "--nnodes=2", "--nproc_per_node=1", f"--node_rank={number}",
                   "--master_addr=10.213.0.1", "--master_port=29517", ROOT / "train_gpt2.py",
                   "--data_dir", "data", *flags]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": f"v{name}", "PYTHONUTF8": "1"}
        nodes.append(subprocess.Popen(list(map(str, command)), cwd=tmp_path / name, env=env,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outs = [node.communicate(timeout=120)[0].decode(errors="replace") for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outs)
    assert "trained to step 6" in outs[0] and "trained to" not in outs[1]
    assert sorted(os.listdir(tmp_path / two_nodes[1])) == ["data"]  # the first node keeps the log
    train(tiny_config(data_dir, tmp_path / "one"))
    assert read_log(tmp_path / two_nodes[0] / "log", "train") == pytest.approx(
        read_log(tmp_path / "one", "train"), abs=2e-4)


# updates that are not finite


@needs_fork
def test_a_bad_update_is_skipped_by_all(data_dir, tmp_path):
    config = dict(world_size=2, B=2, save_every=1, eval_every=0, nan_rank=1)
    results = forked(tmp_path, [
        job(data_dir, tmp_path / "once", nan_steps=[3], **config),
        job(data_dir, tmp_path / "on", nan_steps=list(range(3, 99)), max_steps=50, **config)])
    assert results[0]["codes"] == [0, 0] and results[1]["codes"] == [2, 2]
    out = (tmp_path / "job_0.out").read_text(encoding="utf-8")
    assert "update skipped, it is not finite; sequences 24 to 31" in out
    assert read_log(tmp_path / "once", "skipped") == {3: 1}
    before, after = (weights_and_gradients(tmp_path / "once", step) for step in (3, 4))
    assert all(torch.equal(t, after[i][name]) for i in (0, 1) for name, t in before[i].items())
    weights, _ = weights_and_gradients(tmp_path / "once")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    # five in a row: steps 3 to 7
    assert "step 7: 5 updates in a row were not finite" in results[1]["stderr"]
    assert max(list_checkpoints(tmp_path / "on")) <= 7
    expect_close(tmp_path / "once", tmp_path / "on", step=3, atol=0)


def test_float16_overflow_lowers_the_scale_and_goes_on(data_dir, tmp_path, capsys, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda *args, **kwargs: real(*args, init_scale=2.0**60, **kwargs))
    train(tiny_config(data_dir, tmp_path, max_steps=50, dtype="float16", max_lr=3e-3))
    out = capsys.readouterr().out
    skipped = read_log(tmp_path, "skipped")
    assert 5 < len(skipped) < 50 and out.count("update skipped") == len(skipped)
    assert load_checkpoint(find_checkpoint(tmp_path))["scaler"]["scale"] < 2.0**60
    assert read_log(tmp_path, "train")[49] < read_log(tmp_path, "train")[0]


# compile, gradient checkpointing


def test_gradient_checkpointing_changes_nothing_but_memory(data_dir, tmp_path):
    train(tiny_config(data_dir, tmp_path / "a"))
    calls = []
    original = train_gpt2.recompute
    try:
        train_gpt2.recompute = lambda *args, **kw: calls.append(1) or original(*args, **kw)
        train(tiny_config(data_dir, tmp_path / "b", grad_checkpoint=True))
    finally:
        train_gpt2.recompute = original
    assert len(calls) == 6 * 2 * 2  # updates, micro-steps, blocks: none in evaluation
    assert (tmp_path / "a" / "log.txt").read_text() == (tmp_path / "b" / "log.txt").read_text()


@needs_fork
def test_compile_with_ddp_and_gradient_checkpointing(data_dir, tmp_path):
    config = dict(world_size=2, B=2, n_layer=1, max_steps=3)
    assert [result["codes"] for result in forked(tmp_path, [
        job(data_dir, tmp_path / "a", **config),
        job(data_dir, tmp_path / "b", compile=True, grad_checkpoint=True, **config),
    ])] == [[0, 0], [0, 0]]
    assert "compiled in " in (tmp_path / "job_1.out").read_text(encoding="utf-8")
    assert read_log(tmp_path / "b", "train") == pytest.approx(
        read_log(tmp_path / "a", "train"), abs=1e-3)


def test_compile_falls_back_to_eager(data_dir, tmp_path, capsys, monkeypatch):
    def broken(x, y):
        raise RuntimeError("no working C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda model, mode: broken)
    train(tiny_config(data_dir, tmp_path / "a", compile=True))
    out = capsys.readouterr().out
    assert out.count("warning: training goes on uncompiled") == 1
    assert "no working C++ compiler" in out and "long story" not in out
    train(tiny_config(data_dir, tmp_path / "b"))
    assert (tmp_path / "a" / "log.txt").read_text() == (tmp_path / "b" / "log.txt").read_text()


@needs_fork
def test_all_fall_back_where_one_process_cannot_compile(data_dir, tmp_path):
    config = dict(world_size=2, B=2)
    assert [result["codes"] for result in forked(tmp_path, [
        job(data_dir, tmp_path / "a", **config),
        job(data_dir, tmp_path / "b", compile=True, no_compiler_rank=1, **config),
    ])] == [[0, 0], [0, 0]]
    assert "uncompiled, since compiling failed on 1 process" in (tmp_path / "job_1.out").read_text()
    expect_close(tmp_path / "a", tmp_path / "b", atol=0)


def test_evaluation_never_compiles(data_dir, tmp_path, monkeypatch):
    """Its shapes vary: through the compiled model, each would be compiled anew."""
    seen = []

    def counting(model, mode):
        return lambda x, y: seen.append(x.shape) or model(x, y)

    monkeypatch.setattr(torch, "compile", counting)
    train(tiny_config(data_dir, tmp_path, compile=True, eval_every=1, sample_every=2))
    assert len(seen) == 1 + 6 * 2 and set(seen) == {(4, 32)}


# machines


@pytest.mark.parametrize("name, memory, key", [
    ("NVIDIA A100-SXM4-40GB", 40, "a100-40g"), ("NVIDIA A100 80GB PCIe", 79, "a100-80g"),
    ("NVIDIA H100 80GB HBM3", 79, "h100"), ("NVIDIA GeForce RTX 4090", 24, "4090"),
    ("NVIDIA GeForce RTX 5090", 32, "5090"), ("Tesla T4", 15, "t4"),
    ("NVIDIA T400 4GB", 4, None), ("AMD Instinct MI300X", 192, None)])
def test_gpus_are_known_by_name(name, memory, key):
    assert presets.name_gpu(name, memory * 2**30) == key


def parse(argv):
    """(preset, TrainConfig) from the arguments of train_gpt2.py."""
    return presets.parse_command_line(train_gpt2.TrainConfig, "", argv)


def test_machine_presets_change_nothing_of_the_recipe(capsys, monkeypatch):
    recipe = RESUME_KEYS
    plain = train_gpt2.TrainConfig()
    for preset, values in presets.MACHINE_PRESETS.items():
        _, config = parse(["--preset", preset])
        assert all(getattr(config, name) == getattr(plain, name) for name in recipe)
        presets.check_batch_size(config.B, config.T, config.total_batch_size, world_size=1)
        assert config.dtype == values["dtype"]
    assert "B 48 does not divide the 512 sequences" in capsys.readouterr().out
    assert parse(["--preset", "a100-40g"])[1].B == 32
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse(["--preset", "5090", "--compile_mode", "default"])[1].B == 32
    assert parse(["--preset", "t4", "--B", "16"])[1].B == 16
    assert parse(["--preset", "auto", "--max_steps", "5"])[1].max_steps == 5


def test_check_tells_what_there_is(call, data_dir, tmp_path):
    flags = [x for name, value in TINY.items() for x in (f"--{name}", value)]
    flags += ["--check", "--log_dir", tmp_path / "log"]
    code, out, err = call(train_gpt2, *flags, "--data_dir", data_dir)
    assert code == 0 and "the run can start" in out and err == ""
    for line in ("torch: ", "device: cpu", "distributed backends: gloo", "--preset auto: B 4",
                 "compiler for --compile: ", "memory: about ", "disk: a checkpoint is about "):
        assert line in out
    code, out, err = call(train_gpt2, *flags, "--data_dir", tmp_path, "--B", 3)
    assert code == 2 and "the run could not start" in out
    assert err.count("\n") == 3 and "no val shard" in err and "does not divide" in err
    code, out, err = call(train_gpt2, *flags, "--data_dir", data_dir, "--fsdp")
    assert code == 2 and "start with torchrun" in err and "the run could not start" in out
    for flags_too, message in (("--B", 0), "must be at"), (("--T", 64), "longer than block_size"):
        code, out, err = call(train_gpt2, *flags, "--data_dir", data_dir, *flags_too)
        assert code == 2 and message in err and err.count("\n") == 1
    code, out, err = call(train_gpt2, *flags, "--data_dir", data_dir, "--n_embd", 2**16)
    assert code == 2 and "too little memory" in err
    assert not (tmp_path / "log").exists()


def test_expected_sizes_of_the_124m_run():
    config = train_gpt2.TrainConfig(B=4, T=128)
    shape = train_gpt2.GPTConfig(**presets.model_sizes(config))
    memory, checkpoint = preflight.estimate_memory(shape, config, torch.device("cpu"), torch.float32, 1)
    assert checkpoint == 12 * 124_475_904
    assert 2.0 < memory / 2**30 < 3.5  # 3.1 GB were measured for such a step
    config = train_gpt2.TrainConfig(B=8, T=1024)
    memory, _ = preflight.estimate_memory(shape, config, torch.device("cpu"), torch.float32, 1)
    assert 5.8 < memory / 1e9 < 7.2  # 6.5 GB were measured


def test_main_lets_cuda_blocks_grow_unless_told_otherwise(call, tmp_path, monkeypatch):
    for value, expected in ((None, "expandable_segments:True"), ("backend:native",) * 2):
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        if value:
            monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", value)
        call(train_gpt2, "--data_dir", tmp_path / "none", "--device", "cpu")
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == expected


def test_set_seed_covers_every_generator():
    import random

    import numpy as np
    draws = []
    for _ in range(2):
        device.set_seed(5)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    device.set_seed(5, deterministic=True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("changes, world_size, message", [
    (dict(fsdp=True), 1, "start with torchrun"), (dict(fsdp=True, compile=True), 2, "leave out"),
    (dict(fsdp=True, dtype="float16"), 2, "--dtype bfloat16"),
    (dict(fsdp=True, optimizer="muon"), 2, "use --optimizer adamw"),
    (dict(optimizer="muon", compile=True, compile_mode="max-autotune"), 1,
     "--compile_mode default")])
def test_combinations_that_do_not_work(data_dir, tmp_path, monkeypatch, changes, world_size,
                                       message):
    monkeypatch.setattr(parallel, "sum_over_ranks", lambda values, device: [
        world_size * value for value in values])
    config = tiny_config(data_dir, tmp_path, **changes)
    ranks = distributed.Ranks(torch.device("cpu"), 0, world_size)
    with pytest.raises(UserError, match=message):
        parallel.resolve_compile(config, ranks, getattr(torch, config.dtype, torch.float32))


def test_processes_that_cannot_work(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "pick_device", torch.device)
    with pytest.raises(UserError, match="a Mac has one GPU"):
        distributed.init_distributed("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 of this node has no GPU"):
        distributed.init_distributed("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="no NCCL"):
        distributed.init_distributed("cuda")
