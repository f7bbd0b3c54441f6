"""Several processes, signals, faults and machines: what a run does when something happens to it."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    needs_compiler,
    parse_train_flags,
    read_log,
    run_jobs,
    run_script,
    tiny_config,
    tiny_flags,
)
from forked import Job

import train_gpt2
from gpt2lab import device, distributed, parallel, preflight, presets
from gpt2lab.checkpoints import RESUME_KEYS, find_checkpoint, list_checkpoints, load_checkpoint
from gpt2lab.cli import UserError
from gpt2lab.signals import Signals
from train_gpt2 import GPT, GPTConfig, TrainConfig, train

CPU = torch.device("cpu")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def job_config(data_dir, log_dir, **changes):
    """A tiny TrainConfig that keeps all checkpoints and draws samples at the end only."""
    return tiny_config(data_dir, log_dir, **(dict(sample_every=0, keep_last=0) | changes))


def weights_and_first_moments(log_dir, step=None):
    """
    [weights, first moments of AdamW], each {parameter name: tensor}, of the checkpoint at `step`,
    or of the newest one. After one update, the first moment is a tenth of the clipped gradient.
    """
    path = list_checkpoints(log_dir)[step] if step else find_checkpoint(log_dir)
    checkpoint = load_checkpoint(path)
    states = checkpoint["optimizer"]["state"]
    return [checkpoint["model"], {name: state["exp_avg"] for name, state in states.items()}]


def expect_close_checkpoints(log_a, log_b, step=None, atols=(1e-3, 1e-3)):
    """
    The checkpoints of two runs have nearly the same weights and the same first moments. `atols` are
    their absolute tolerances.
    """
    for a, b, atol in zip(weights_and_first_moments(log_a, step),
                          weights_and_first_moments(log_b, step), atols, strict=True):
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert torch.allclose(tensor, b[name], atol=atol, rtol=1e-4), name


# -----------------------------------------------------------------------------
# several processes


@needs_fork
def test_any_number_of_processes_computes_the_same_run(data_dir, tmp_path, hellaswag_examples):
    # 8 sequences an update: 8, 1, 4, 1 and 2 micro-steps
    shapes = [(1, 1), (1, 8), (2, 1), (2, 4), (4, 1)]  # (world_size, B)
    results = run_jobs(tmp_path, [
        Job(job_config(data_dir, tmp_path / f"{world_size}x{B}", B=B, save_every=1, eval_every=3,
                       hellaswag_every=3), world_size=world_size)
        for world_size, B in shapes])
    assert [result.exit_codes for result in results] == [[0] * size for size, _ in shapes]
    for other in ("1x8", "2x1", "2x4", "4x1"):
        # the first moments of step 1 are the gradient itself: a process or a micro-step too few
        # would show as a factor. The weights differ more, because Adam divides a gradient by its
        # own size, and rounding errors are as large as a gradient of 1e-10
        expect_close_checkpoints(tmp_path / "1x1", tmp_path / other, step=1, atols=(1e-5, 1e-7))
        expect_close_checkpoints(tmp_path / "1x1", tmp_path / other)
        for stream, tolerance in (("train", 2e-4), ("val", 2e-4), ("norm", 2e-3), ("hella", 0)):
            expected = read_log(tmp_path / "1x1", stream)
            assert len(expected) == (6 if stream in ("train", "norm") else 3)
            assert read_log(tmp_path / other, stream) == pytest.approx(expected, abs=tolerance)


@needs_fork
def test_fsdp_trains_like_ddp_and_each_resumes_the_other(data_dir, tmp_path, hellaswag_examples):
    ddp, fsdp, crossed = (tmp_path / name for name in ("ddp", "fsdp", "crossed"))

    def config(log_dir, **changes):
        return job_config(data_dir, log_dir, B=2, save_every=3, hellaswag_every=3, sample_every=3,
                          ema=0.8, **changes)

    ddp_checkpoint, fsdp_checkpoint = (str(path / "model_00003.pt") for path in (ddp, fsdp))
    results = run_jobs(tmp_path, [
        Job(config(ddp), world_size=2, late_writes=True),
        Job(config(fsdp, fsdp=True, grad_checkpoint=True), world_size=2, late_writes=True),
        Job(config(crossed, resume=fsdp_checkpoint), world_size=2),
        Job(config(crossed / "b", resume=ddp_checkpoint, fsdp=True), world_size=2),
        Job(job_config(data_dir, crossed / "c", resume=fsdp_checkpoint, hellaswag_every=3,
                       ema=0.8))])
    assert [result.exit_codes for result in results] == [[0, 0]] * 4 + [[0]]
    for path in (ddp_checkpoint, fsdp_checkpoint):  # they were written after a later update
        checkpoint = load_checkpoint(path)
        assert all(state["step"] == 3 for state in checkpoint["optimizer"]["state"].values())
        for name in ("model", "ema"):
            weights = checkpoint[name]
            tied = weights["lm_head.weight"], weights["transformer.wte.weight"]
            assert tied[0].data_ptr() == tied[1].data_ptr()  # stored once
    expect_close_checkpoints(ddp, fsdp, step=3, atols=(1e-3, 1e-5))
    averages = load_checkpoint(find_checkpoint(ddp))["ema"]
    for folder in (fsdp, crossed, crossed / "b", crossed / "c"):
        expect_close_checkpoints(ddp, folder)
        for name, average in load_checkpoint(find_checkpoint(folder))["ema"].items():
            assert torch.allclose(average, averages[name], atol=1e-3), name
        for stream in ("train", "val", "val_ema", "hella"):
            expected = read_log(ddp, stream)
            got = read_log(folder, stream)
            assert got
            assert got == pytest.approx({step: expected[step] for step in got}, abs=2e-4)
    model = GPT.from_pretrained(fsdp)  # an ordinary checkpoint
    assert model.lm_head.weight.shape == (384, 32)


@needs_fork
def test_ddp_and_fsdp_train_in_bfloat16_as_one_process_does(data_dir, tmp_path):
    """Guards against weights cast before the others' gradients, or an FSDP gather, changed them."""
    def config(name, **changes):
        return job_config(data_dir, tmp_path / name, dtype="bfloat16", B=2, max_lr=1e-2,
                          max_steps=3, save_every=0, val_tokens=256, **changes)

    results = run_jobs(tmp_path, [
        Job(config("one")), Job(config("ddp"), world_size=2),
        Job(config("fsdp", fsdp=True), world_size=2)])
    assert [result.exit_codes for result in results] == [[0], [0, 0], [0, 0]]
    for stream in ("train", "val"):
        expected = read_log(tmp_path / "one", stream)
        for name in ("ddp", "fsdp"):
            assert read_log(tmp_path / name, stream) == pytest.approx(expected, abs=5e-3)
    assert expected[0] - expected[3] > 0.1  # it learns


@pytest.mark.parametrize("changes, world_size, message", [
    (dict(fsdp=True), 1, "start with torchrun"), (dict(fsdp=True, compile=True), 2, "leave out"),
    (dict(fsdp=True, dtype="float16"), 2, "--dtype bfloat16"),
    (dict(fsdp=True, optimizer="muon"), 2, "use --optimizer adamw"),
    (dict(optimizer="muon", compile=True, compile_mode="max-autotune"), 1,
     "--compile_mode default")])
def test_options_that_do_not_go_together_are_refused(
        data_dir, tmp_path, monkeypatch, changes, world_size, message):
    monkeypatch.setattr(parallel, "sum_over_ranks", lambda values, device: [
        world_size * value for value in values])
    config = tiny_config(data_dir, tmp_path, **changes)
    ranks = distributed.Ranks(CPU, 0, world_size)
    with pytest.raises(UserError, match=message):
        parallel.resolve_compile(config, ranks, getattr(torch, config.dtype, torch.float32))


def test_ranks_without_a_gpu_of_their_own_or_without_nccl_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "pick_device", lambda name, *_: torch.device(name))
    with pytest.raises(UserError, match="a Mac has one GPU"):
        distributed.init_distributed("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="process 1 of this node has no GPU"):
        distributed.init_distributed("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="lacks NCCL"):
        distributed.init_distributed("cuda")


# -----------------------------------------------------------------------------
# signals


def start_process(*command, **options):
    """Start a command whose output, stdout and stderr together, can be read line by line."""
    env = {**os.environ, "PYTHONUTF8": "1", **options.pop("env", {})}
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", env=env,
                            **options)


def wait_for_line(process, start):
    """Read the output of a process up to a line that begins with `start`; returns this line."""
    lines = []
    for line in process.stdout:
        if line.startswith(start):
            return line
        lines.append(line)
    raise AssertionError(f"no line begins with {start!r}:\n{''.join(lines)}")


@needs_fork
def test_a_signal_to_one_process_ends_all_at_the_same_step(data_dir, tmp_path):
    config = job_config(data_dir, tmp_path / "log", B=1, max_steps=100_000, save_every=5,
                        keep_every=0)
    result, = run_jobs(tmp_path, [Job(config, world_size=2, sigterm_rank=1)])
    assert result.exit_codes == [0, 0]
    last = max(list_checkpoints(tmp_path / "log"))
    assert 5 <= last < 5000
    assert max(read_log(tmp_path / "log", "train")) == last - 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
def test_sigusr1_saves_and_sigterm_and_ctrl_c_save_and_end(data_dir, tmp_path):
    log_dir = tmp_path / "log"
    command = [sys.executable, ROOT / "train_gpt2.py", *tiny_flags(
        data_dir=data_dir, log_dir=log_dir, max_steps=1_000_000, print_every=1, save_every=0,
        keep_last=0)]
    run = start_process(*command)
    wait_for_line(run, "step ")
    run.send_signal(signal.SIGUSR1)
    first = int(re.search(r"model_(\d+).pt", wait_for_line(run, "saved ")).group(1))
    wait_for_line(run, "step ")  # training goes on
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    steps = list_checkpoints(log_dir)
    assert sorted(steps) == [first, max(steps)]
    assert max(steps) > first
    assert max(read_log(log_dir, "train")) == max(steps) - 1
    assert f"stopped by a signal at step {max(steps)}" in out
    assert "next: the same" in out

    run = start_process(*command, "--resume")
    wait_for_line(run, "step ")
    run.send_signal(signal.SIGINT)
    time.sleep(0.02)
    run.send_signal(signal.SIGINT)  # torchrun sends Ctrl-C on, which the terminal has sent already
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    assert max(list_checkpoints(log_dir)) > max(steps)


def test_a_signal_ends_an_evaluation_and_the_resumed_run_repeats_it(
        data_dir, tmp_path, monkeypatch):
    """Guards against a run that finishes minutes of HellaSwag while its machine is taken away."""
    config = tiny_config(data_dir, tmp_path / "straight", eval_every=3, sample_every=0)
    train(config)
    original, calls = train_gpt2.evaluate_loss, []

    def evaluate_loss(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train_gpt2, "evaluate_loss", evaluate_loss)
    config = replace(config, log_dir=str(tmp_path / "broken"))
    result = train(config)
    assert result["stopped"] and result["step"] == 3
    assert list(list_checkpoints(tmp_path / "broken")) == [3]
    assert list(read_log(tmp_path / "broken", "val")) == [0]
    train(replace(config, resume="newest"))
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("straight", "broken")]
    assert logs[0] == logs[1]


def test_a_second_ctrl_c_seconds_later_ends_the_process_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # a shell ignores it for commands with "&"
    now = [100.0]
    monkeypatch.setattr("gpt2lab.signals.time.monotonic", lambda: now[0])
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.stop
        now[0] += 0.5
        signal.raise_signal(signal.SIGINT)  # so soon, it counts as the same Ctrl-C
        now[0] += 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signals.stop = False
    with Signals():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


# -----------------------------------------------------------------------------
# processes that die, and nodes


@pytest.mark.skipif(not shutil.which("pgrep"), reason="finds the process with pgrep")
def test_torchrun_resumes_after_a_process_was_killed(data_dir, tmp_path):
    flags = tiny_flags(data_dir=data_dir, log_dir=tmp_path / "log", max_steps=100, save_every=5,
                       keep_last=0, B=1, sample_every=0)
    run = start_process(sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc_per_node=2", "--max_restarts=3", ROOT / "train_gpt2.py", *flags)
    wait_for_line(run, "saved ")
    os.kill(find_pid_of_rank(run.pid, 1), signal.SIGKILL)
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    assert "rank 0: error: lost rank 1 (" in out and "--max_restarts=3" in out
    resumed = int(re.search(r"resuming \S+ at step (\d+)", out).group(1))
    assert resumed >= 5
    assert out.count("using device") == 1  # of the second attempt: wait_for_line read the first
    assert list(read_log(tmp_path / "log", "train")) == list(range(100))


def find_pid_of_rank(torchrun_pid, rank):
    """The pid of the process that torchrun started as this rank."""
    children = subprocess.run(["pgrep", "-P", str(torchrun_pid)], check=True, capture_output=True,
                              encoding="utf-8").stdout.split()
    if os.path.isdir("/proc"):
        children = [pid for pid in children if f"\0RANK={rank}\0" in
                    Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")]
        return int(children[0])
    return int(sorted(children, key=int)[rank])


# makes two network namespaces that are connected by a virtual cable
CONNECT_NAMESPACES = """
set -e
ip netns add {a}; ip netns add {b}
ip link add v{a} type veth peer name v{b}
ip link set v{a} netns {a}; ip link set v{b} netns {b}
ip -n {a} addr add 10.213.0.1/24 dev v{a}; ip -n {a} link set v{a} up; ip -n {a} link set lo up
ip -n {b} addr add 10.213.0.2/24 dev v{b}; ip -n {b} link set v{b} up; ip -n {b} link set lo up
"""


@pytest.fixture
def two_nodes():
    """The names of two network namespaces with the addresses 10.213.0.1 and 10.213.0.2."""
    names = [f"n{os.getpid() % 10**6}a", f"n{os.getpid() % 10**6}b"]
    if shutil.which("ip") is None:
        pytest.skip("no ip command")
    script = CONNECT_NAMESPACES.format(a=names[0], b=names[1])
    made = subprocess.run(["sh", "-c", script], check=False, capture_output=True, encoding="utf-8")
    try:
        if made.returncode:
            pytest.skip(f"no network namespaces: {made.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_nodes_without_a_shared_folder_train_one_run(two_nodes, data_dir, tmp_path):
    nodes = []
    for number, name in enumerate(two_nodes):
        shutil.copytree(data_dir, tmp_path / name / "data")
        nodes.append(start_process(
            "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
            "--nnodes=2", "--nproc_per_node=1", f"--node_rank={number}", "--master_addr=10.213.0.1",
            "--master_port=29517", ROOT / "train_gpt2.py", "--data_dir", "data",
            *tiny_flags(B=1, save_every=2), cwd=tmp_path / name,
            env={"GLOO_SOCKET_IFNAME": f"v{name}"}))
    outs = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outs)
    assert "trained to step 6" in outs[0]
    assert "trained to" not in outs[1]
    assert sorted(os.listdir(tmp_path / two_nodes[1])) == ["data"]  # the first node keeps the log
    train(tiny_config(data_dir, tmp_path / "one"))
    assert read_log(tmp_path / two_nodes[0] / "log", "train") == pytest.approx(
        read_log(tmp_path / "one", "train"), abs=2e-4)


# -----------------------------------------------------------------------------
# updates that are not finite


@needs_fork
def test_an_update_with_nan_on_one_rank_is_skipped_on_all_ranks(data_dir, tmp_path):
    once, forever = tmp_path / "once", tmp_path / "forever"
    options = dict(B=2, save_every=1, eval_every=0)
    skipping, failing = run_jobs(tmp_path, [
        Job(job_config(data_dir, once, **options), world_size=2, nan_rank=1, nan_steps=[3]),
        Job(job_config(data_dir, forever, max_steps=50, **options), world_size=2, nan_rank=1,
            nan_steps=list(range(3, 99)))])
    assert skipping.exit_codes == [0, 0]
    assert "update skipped, it is not finite; sequences 24 to 31" in skipping.output
    assert read_log(once, "skipped") == {3: 1}
    before, after = (weights_and_first_moments(once, step) for step in (3, 4))
    for tensors, later in zip(before, after, strict=True):
        assert all(torch.equal(tensor, later[name]) for name, tensor in tensors.items())
    weights, _ = weights_and_first_moments(once)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    # five bad updates in a row, steps 3 to 7, end the run
    assert failing.exit_codes == [2, 2]
    assert "step 7: 5 updates in a row were not finite" in failing.output
    assert max(list_checkpoints(forever)) <= 7
    expect_close_checkpoints(once, forever, step=3, atols=(0, 0))


def test_float16_overflow_lowers_the_loss_scale_and_training_goes_on(
        data_dir, tmp_path, capsys, monkeypatch):
    GradScaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda *args, **kwargs: GradScaler(*args, init_scale=2.0**60, **kwargs))
    train(tiny_config(data_dir, tmp_path, max_steps=50, dtype="float16", max_lr=3e-3))
    out = capsys.readouterr().out
    skipped = read_log(tmp_path, "skipped")
    assert 5 < len(skipped) < 50
    assert out.count("update skipped") == len(skipped)
    assert load_checkpoint(find_checkpoint(tmp_path))["scaler"]["scale"] < 2.0**60
    assert read_log(tmp_path, "train")[49] < read_log(tmp_path, "train")[0]


# -----------------------------------------------------------------------------
# compiling, gradient checkpointing


def test_gradient_checkpointing_recomputes_blocks_and_changes_no_number(
        data_dir, tmp_path, monkeypatch):
    train(tiny_config(data_dir, tmp_path / "a"))
    calls = []
    original = train_gpt2.recompute
    monkeypatch.setattr(train_gpt2, "recompute",
                        lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    train(tiny_config(data_dir, tmp_path / "b", grad_checkpoint=True))
    assert len(calls) == 6 * 2 * 2  # updates, micro-steps, blocks; evaluation does not recompute
    assert (tmp_path / "a" / "log.txt").read_text() == (tmp_path / "b" / "log.txt").read_text()


@needs_fork
@needs_compiler
def test_ddp_trains_a_compiled_model_with_gradient_checkpointing(data_dir, tmp_path):
    options = dict(B=2, n_layer=1, max_steps=3)
    eager, compiled = run_jobs(tmp_path, [
        Job(job_config(data_dir, tmp_path / "eager", **options), world_size=2),
        Job(job_config(data_dir, tmp_path / "compiled", compile=True, grad_checkpoint=True,
                       **options), world_size=2)])
    assert eager.exit_codes == compiled.exit_codes == [0, 0]
    assert "compiled in " in compiled.output
    assert read_log(tmp_path / "compiled", "train") == pytest.approx(
        read_log(tmp_path / "eager", "train"), abs=1e-3)


def test_training_goes_on_uncompiled_if_compiling_fails(data_dir, tmp_path, capsys, monkeypatch):
    def broken_model(x, y):
        raise RuntimeError("no working C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda model, mode: broken_model)
    train(tiny_config(data_dir, tmp_path / "a", compile=True))
    out = capsys.readouterr().out
    assert out.count("warning: training goes on uncompiled") == 1
    assert "no working C++ compiler" in out and "long story" not in out
    train(tiny_config(data_dir, tmp_path / "b"))
    assert (tmp_path / "a" / "log.txt").read_text() == (tmp_path / "b" / "log.txt").read_text()


@needs_fork
def test_all_ranks_train_uncompiled_if_one_rank_cannot_compile(data_dir, tmp_path):
    eager, fallen_back = run_jobs(tmp_path, [
        Job(job_config(data_dir, tmp_path / "a", B=2), world_size=2),
        Job(job_config(data_dir, tmp_path / "b", B=2, compile=True), world_size=2,
            no_compiler_rank=1)])
    assert eager.exit_codes == fallen_back.exit_codes == [0, 0]
    assert "uncompiled, since compiling failed on 1 process" in fallen_back.output
    expect_close_checkpoints(tmp_path / "a", tmp_path / "b", atols=(0, 0))


def test_evaluation_does_not_call_the_compiled_model(data_dir, tmp_path, monkeypatch):
    """Guards against compiling for every shape of evaluation, since its shapes vary."""
    shapes = []

    def compile_and_record(model, mode):
        return lambda x, y: shapes.append(x.shape) or model(x, y)

    monkeypatch.setattr(torch, "compile", compile_and_record)
    train(tiny_config(data_dir, tmp_path, compile=True, eval_every=1, sample_every=2))
    assert len(shapes) == 1 + 6 * 2  # a first batch to compile with, then updates x micro-steps
    assert set(shapes) == {(4, 32)}


# -----------------------------------------------------------------------------
# machines


@pytest.mark.parametrize("name, memory, key", [
    ("NVIDIA A100-SXM4-40GB", 40, "a100-40g"), ("NVIDIA A100 80GB PCIe", 79, "a100-80g"),
    ("NVIDIA H100 80GB HBM3", 79, "h100"), ("NVIDIA GeForce RTX 4090", 24, "4090"),
    ("NVIDIA GeForce RTX 5090", 32, "5090"), ("Tesla T4", 15, "t4"),
    ("NVIDIA T400 4GB", 4, None), ("AMD Instinct MI300X", 192, None)])
def test_gpus_are_known_by_name(name, memory, key):
    assert presets.name_gpu(name, memory * 2**30) == key


def test_machine_presets_leave_what_losses_depend_on():
    plain = TrainConfig()
    for preset, values in presets.MACHINE_PRESETS.items():
        _, config = parse_train_flags("--preset", preset)
        assert all(getattr(config, key) == getattr(plain, key) for key in RESUME_KEYS)
        presets.check_batch_size(config.B, config.T, config.total_batch_size, world_size=1)
        assert config.dtype == values["dtype"]


def test_machine_presets_lower_B_to_one_that_fits(capsys, monkeypatch):
    assert parse_train_flags("--preset", "a100-40g")[1].B == 64
    assert parse_train_flags("--preset", "h100", "--total_batch_size", "98304")[1].B == 96
    assert "B 128 does not divide the 96 sequences" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parse_train_flags("--preset", "h100", "--compile_mode", "default")[1].B == 64
    assert parse_train_flags("--preset", "t4", "--B", "16")[1].B == 16
    assert parse_train_flags("--preset", "auto", "--max_steps", "5")[1].max_steps == 5


def test_check_lists_the_machine_and_all_problems_and_writes_nothing(
        call_main, data_dir, tmp_path):
    def check(*flags):
        common = tiny_flags(data_dir=data_dir, log_dir=tmp_path / "log")
        return call_main(train_gpt2, *common, "--check", *flags)

    code, out, err = check()
    assert code == 0 and "the run can start" in out and err == ""
    for line in ("torch: ", "device: cpu", "--preset auto: B ", "compiler for --compile: ",
                 "memory: about ", "saving: ", "disk: a checkpoint is about "):
        assert line in out
    # torch with CUDA has nccl, too
    assert re.search("^distributed backends: (nccl, )?gloo$", out, re.M)
    code, out, err = check("--data_dir", tmp_path, "--B", 3)
    assert code == 2 and "the run could not start" in out
    assert err.count("\n") == 3 and "no val shard" in err and "does not divide" in err
    code, out, err = check("--fsdp")
    assert code == 2 and "start with torchrun" in err and "the run could not start" in out
    for flags, message in (("--B", 0), "must be at"), (("--T", 64), "longer than block_size"):
        code, _, err = check(*flags)
        assert code == 2 and message in err and err.count("\n") == 1
    code, _, err = check("--n_embd", 2**16)
    assert code == 2 and "too little memory" in err
    assert not (tmp_path / "log").exists()


def test_memory_estimates_of_124m_are_near_what_was_measured():
    def estimate(**changes):
        config = TrainConfig(**changes)
        model_config = GPTConfig(**presets.model_sizes(config))
        return preflight.estimate_memory(model_config, config, CPU, torch.float32, world_size=1)

    memory, checkpoint = estimate(B=4, T=128)
    assert checkpoint == 12 * 124_475_904
    assert 2.0 < memory / 2**30 < 3.5  # 3.1 GB were measured for such a step
    memory, _ = estimate(B=8, T=1024)
    assert 5.8 < memory / 1e9 < 7.2  # 6.5 GB were measured


@pytest.fixture
def no_allocator_settings(monkeypatch):
    """The environment says nothing about torch's allocator."""
    for name in device.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("settings, expected", [
    ({}, "expandable_segments:True"),
    ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "max_split_size_mb:128")])
@pytest.mark.skipif(sys.platform != "linux", reason="segments are expandable on Linux only")
def test_cuda_segments_are_expandable_unless_the_user_decides(
        no_allocator_settings, settings, expected):
    """Guards against settings of the user that torch does not get, because another name wins."""
    code = ("import torch, train_gpt2\n"
            "def stop(*args):\n    print(torch._C._accelerator_getAllocatorSettings())\n"
            "    raise SystemExit\n"
            "train_gpt2.presets.parse_command_line = stop; train_gpt2.main()")
    done = run_script("-c", code, cwd=ROOT, env=settings)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("system, settings", [
    ("darwin", {}), ("win32", {}), ("linux", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"})])
def test_the_allocator_stays_as_it_is(no_allocator_settings, monkeypatch, system, settings):
    """Guards against a warning of torch in every run on Windows, and against the older name."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device.sys, "platform", system)
    device.set_allocator_defaults()
    assert set(device.ALLOCATOR_VARIABLES) & os.environ.keys() == settings.keys()


def test_set_seed_seeds_python_numpy_and_torch():
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
