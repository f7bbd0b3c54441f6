"""
What happens around a run: linked checkpoints, a second run in the folder, closed terminals, other
launchers' environment variables, odd clocks, numbers out of range, small memory, limited CPUs.
"""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, read_log, run_script, tiny_config, tiny_flags

import fineweb
import train_gpt2
from gpt2lab import cli, device, lock, presets, report
from gpt2lab.checkpoints import list_checkpoints
from gpt2lab.cli import EnvRanks, UserError, env_ranks
from gpt2lab.files import write_atomically
from train_gpt2 import train

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ENDLESS = dict(max_steps=1_000_000, save_every=0, keep_last=0, sample_every=0)


# -----------------------------------------------------------------------------
# checkpoints on another disk


def move_and_link_back(log_dir, elsewhere):
    """Move the checkpoints of a log folder to another folder, and leave relative links."""
    elsewhere.mkdir()
    for path in list_checkpoints(log_dir).values():
        path.rename(elsewhere / path.name)
        path.symlink_to(os.path.relpath(elsewhere / path.name, log_dir))


def test_linked_checkpoints_are_resumed_in_place(data_dir, tmp_path):
    """Guards against a resume that takes its own log folder for that of an earlier run."""
    log_dir = tmp_path / "log"
    config = tiny_config(data_dir, log_dir, save_every=2, keep_last=2, keep_every=0)
    train(config)
    straight = (log_dir / "log.txt").read_text()
    move_and_link_back(log_dir, tmp_path / "big")
    train(replace(config, resume="newest"))
    assert not (log_dir / "previous_1").exists()
    assert (log_dir / "log.txt").read_text() == straight

    (log_dir / "model_00006.pt").unlink()
    train(replace(config, resume="newest"))  # prunes the link to step 2, not what it leads to
    assert sorted(list_checkpoints(log_dir)) == [4, 6]
    assert (tmp_path / "big" / "model_00006.pt").is_file()
    assert (log_dir / "log.txt").read_text() == straight

    log_dir.rename(tmp_path / "big" / "log")
    log_dir.symlink_to(tmp_path / "big" / "log")
    train(replace(config, resume=str(tmp_path / "log" / "model_00006.pt")))
    assert not (log_dir / "previous_1").exists()


def test_links_that_are_set_aside_still_lead_to_their_files(data_dir, tmp_path):
    log_dir = tmp_path / "log"
    train(tiny_config(data_dir, log_dir))
    move_and_link_back(log_dir, tmp_path / "big")
    (log_dir / "log.txt").rename(tmp_path / "big" / "log.txt")
    (log_dir / "log.txt").symlink_to(tmp_path / "big" / "log.txt")
    train(tiny_config(data_dir, log_dir))
    for name in ("log.txt", "model_00006.pt"):
        assert (log_dir / "previous_1" / name).samefile(tmp_path / "big" / name)
    assert len(read_log(log_dir / "previous_1", "train")) == 6


def test_a_log_folder_that_is_a_file_or_on_a_missing_disk_is_refused(data_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="is a file, or a link that leads nowhere"):
            train(tiny_config(data_dir, tmp_path / name, resume="newest"))
    assert (tmp_path / "file").read_text() == "mine"


def test_only_half_written_checkpoints_are_deleted(data_dir, tmp_path):
    for name in ("model_00008.pt.0.tmp", "model_notes.tmp"):
        (tmp_path / name).write_text("mine")
    train(tiny_config(data_dir, tmp_path))
    assert not (tmp_path / "model_00008.pt.0.tmp").exists()
    assert (tmp_path / "model_notes.tmp").read_text() == "mine"


# -----------------------------------------------------------------------------
# processes


@pytest.fixture(autouse=True)
def heed_hangups():
    """Let processes that a test starts heed SIGHUP, also if pytest itself runs under nohup."""
    number = getattr(signal, "SIGHUP", None)  # Windows has none
    previous = number and signal.signal(number, signal.SIG_DFL)
    yield
    if number:
        signal.signal(number, previous)


@pytest.fixture
def start():
    """
    A function that starts train_gpt2.py, waits for its first update and returns its Popen. What is
    still running at the end of the test is killed.
    """
    processes = []

    def start_and_wait(*flags, launcher=(sys.executable,), **options):
        command = [*launcher, ROOT / "train_gpt2.py", *flags]
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", errors="replace", env={**os.environ, "PYTHONUTF8": "1"}, **options)
        processes.append(process)
        lines = []
        for line in process.stdout:
            if line.startswith("step "):
                return process
            lines.append(line)
        raise AssertionError("".join(lines))

    yield start_and_wait
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@posix_only
def test_a_second_run_in_a_log_folder_is_refused_until_the_first_has_ended(
        data_dir, tmp_path, start):
    log_dir = tmp_path / "log"
    flags = tiny_flags(data_dir=data_dir, log_dir=log_dir, **(ENDLESS | {"save_every": 10}))
    first = start(*flags)
    first.send_signal(signal.SIGSTOP)  # it keeps its lock, but takes no time from the others
    for more in ((), ("--resume",)):
        second = run_script(ROOT / "train_gpt2.py", *flags, *more)
        assert second.returncode == 2, second.stdout
        assert f"process {first.pid} on {socket.gethostname()} is training in" in second.stderr
        assert second.stderr.count("\n") == 1
    done = subprocess.run([*TORCHRUN, str(ROOT / "train_gpt2.py"), *map(str, flags), "--B", "2"],
                          capture_output=True, encoding="utf-8", timeout=600, check=False)
    assert done.returncode != 0
    assert done.stderr.count("is training in") == 1  # all ranks end, and one of them says why
    assert not (log_dir / "previous_1").exists()
    first.kill()  # SIGKILL, as a power cut: its lock must not be in the way
    first.communicate()
    resumed = start(*flags, "--resume")
    resumed.send_signal(signal.SIGTERM)
    assert resumed.wait(600) == 0
    assert not (log_dir / "run.lock").exists()
    steps = sorted(read_log(log_dir, "train"))
    assert steps == list(range(len(steps)))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
@posix_only
def test_a_file_system_without_locks_gets_a_warning(data_dir, tmp_path, capsys, monkeypatch, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    assert train(tiny_config(data_dir, tmp_path, max_steps=1))["step"] == 1
    assert capsys.readouterr().out.count(f"warning: {tmp_path} cannot be locked") == 1


def test_a_run_that_fails_leaves_no_lock(data_dir, log_dir, tmp_path):
    with pytest.raises(UserError, match="another run"):
        train(tiny_config(data_dir, log_dir, resume="newest", seed=7))
    assert not lock.path_of_lock(log_dir).exists()
    lock.lock_log_dir(log_dir)
    lock.unlock(lock.path_of_lock(log_dir))


@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU", "SIGUSR2"])
@posix_only
def test_a_closed_terminal_and_schedulers_end_a_run_as_sigterm_does(
        data_dir, tmp_path, start, name):
    run = start(*tiny_flags(data_dir=data_dir, log_dir=tmp_path, **ENDLESS))
    run.send_signal(getattr(signal, name))
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    assert "stopped by a signal" in out
    assert max(read_log(tmp_path, "train")) == max(list_checkpoints(tmp_path)) - 1


def ignore_hangups():
    """What nohup does before it starts a program."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


# torchrun catches SIGHUP even under nohup, unless its own flag says which signals it catches
@pytest.mark.parametrize("launcher", [
    (sys.executable,), (*TORCHRUN, "--signals_to_handle=SIGTERM,SIGINT")], ids=["one", "torchrun"])
@posix_only
def test_nohup_keeps_a_run_alive(data_dir, tmp_path, start, launcher):
    run = start(*tiny_flags(data_dir=data_dir, log_dir=tmp_path, B=2, **ENDLESS),
                launcher=launcher, preexec_fn=ignore_hangups, start_new_session=True)
    os.killpg(run.pid, signal.SIGHUP)  # as a closed terminal does
    for _ in range(3):
        assert run.stdout.readline().startswith("step ")
    time.sleep(0.5)
    assert run.poll() is None and not list_checkpoints(tmp_path)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=600)
    assert max(read_log(tmp_path, "train")) == max(list_checkpoints(tmp_path)) - 1


@posix_only
def test_torchrun_passes_a_hangup_on_and_the_run_is_saved(data_dir, tmp_path, start):
    run = start(*tiny_flags(data_dir=data_dir, log_dir=tmp_path, B=2, **ENDLESS),
                launcher=TORCHRUN)
    run.send_signal(signal.SIGHUP)
    run.communicate(timeout=600)
    assert max(read_log(tmp_path, "train")) == max(list_checkpoints(tmp_path)) - 1


@posix_only
def test_a_run_whose_terminal_was_closed_is_saved(data_dir, tmp_path):
    """Guards against a lost run because printing to a closed terminal is an error."""
    pty = pytest.importorskip("pty")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(ROOT / "train_gpt2.py"), *tiny_flags(
            data_dir=data_dir, log_dir=tmp_path, **ENDLESS)])
    seen = b""
    while b"\nstep     3 " not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)  # the system sends SIGHUP
    os.waitpid(pid, 0)
    assert max(read_log(tmp_path, "train")) == max(list_checkpoints(tmp_path)) - 1


# -----------------------------------------------------------------------------
# another machine


def test_a_resumed_run_says_what_keeps_it_from_being_equal_bit_for_bit(
        data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "cpu_bfloat16", lambda: (False, "it lacks them"))
    config = tiny_config(data_dir, tmp_path, save_every=3, dtype="auto")
    train(config)
    assert "computing in float32, not in bfloat16, because it lacks" in capsys.readouterr().out
    train(replace(config, resume="newest"))
    assert "the checkpoint was made with" not in capsys.readouterr().out
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(device, "cpu_bfloat16", lambda: (True, "it has them"))
    train(replace(config, resume="newest"))
    out = capsys.readouterr().out
    assert "computing in bfloat16, because it has them" in out
    assert "made with dtype float32, not bfloat16; threads 1, not 64: losses may differ" in out

    path = tmp_path / "model_00006.pt"
    old = torch.load(path, weights_only=True)
    del old["machine"]  # as in checkpoints of earlier versions
    torch.save(old, path)
    train(replace(config, resume="newest"))
    assert "the checkpoint was made with" not in capsys.readouterr().out


def test_threads_are_limited_to_the_cpus_of_a_container(monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(device, "available_cpus", lambda: 1)
    torch.set_num_threads(2)
    try:
        device.limit_threads()
        assert torch.get_num_threads() == 1
        assert capsys.readouterr().err.startswith("computing on 1 thread(s)")
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        device.limit_threads()
        assert torch.get_num_threads() == 2 and capsys.readouterr().err == ""
    finally:
        torch.set_num_threads(1)


GIB = 2**30


@pytest.mark.parametrize("files, free", [
    ({"memory.max": "max", "memory.current": GIB, "memory.stat": "anon 5"}, None),
    ({"memory.max": 4 * GIB, "memory.current": 3 * GIB,
      "memory.stat": f"anon 5\ninactive_file {GIB}"}, 2 * GIB),
    ({"memory.limit_in_bytes": 4 * GIB, "memory.usage_in_bytes": 3 * GIB,
      "memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}"}, 2 * GIB),
    ({"memory.max": GIB, "memory.current": 2 * GIB, "memory.stat": "anon 5"}, 0), ({}, None)])
def test_free_memory_is_what_a_container_may_use(tmp_path, monkeypatch, files, free):
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(device, "cgroup_folders", lambda controller: [tmp_path / "no", tmp_path])
    meminfo = device.free_memory(torch.device("cpu"))
    if meminfo is None:
        pytest.skip("this system does not report free memory")
    if free is None:
        assert meminfo > 0
    else:
        assert meminfo == min(free, meminfo)
        assert device.free_in_cgroup(tmp_path) == free


# -----------------------------------------------------------------------------
# environment variables of launchers


@pytest.fixture
def set_env(monkeypatch):
    """A function that sets the variables of launchers, and unsets those that are not given."""
    def set_variables(**values):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("values, expected", [
    ({}, EnvRanks(0, 0, 1)), (dict(RANK=""), EnvRanks(0, 0, 1)),
    (dict(RANK="0", WORLD_SIZE="1"), EnvRanks(0, 0, 1)), (dict(RANK="1"), EnvRanks(0, 0, 1)),
    (dict(RANK="", WORLD_SIZE="", LOCAL_RANK=""), EnvRanks(0, 0, 1)),
    (dict(RANK="3", WORLD_SIZE="4"), EnvRanks(3, 0, 4)),
    (dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1"), EnvRanks(3, 1, 4))])
def test_ranks_are_read_from_the_environment_of_any_launcher(set_env, values, expected):
    set_env(**values)
    assert env_ranks() == expected
    assert cli.env_rank() == expected.rank


@pytest.mark.parametrize("values, message", [
    (dict(WORLD_SIZE="2"), "WORLD_SIZE is 2, but RANK is not set"),
    (dict(WORLD_SIZE="x", RANK="0"), "WORLD_SIZE is 'x'"),
    (dict(WORLD_SIZE="2", RANK="-1"), "RANK is '-1'"),
    (dict(WORLD_SIZE="2", RANK="2"), "RANK is 2, but WORLD_SIZE is 2"),
    (dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="?"), "LOCAL_RANK is '?'"),
    (dict(WORLD_SIZE="2", RANK="0"), "MASTER_ADDR or MASTER_PORT is not set"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="99999"),
     "cannot join the other processes at localhost port 99999")])
def test_contradicting_variables_are_named(
        set_env, call_main, data_dir, tmp_path, values, message):
    set_env(**values)
    flags = tiny_flags(data_dir=data_dir, log_dir=tmp_path / "log")
    code, _, err = call_main(train_gpt2, *flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("values", [
    dict(RANK="0", WORLD_SIZE="1"), dict(RANK=""), dict(RANK="1")], ids=str)
def test_one_process_trains_whatever_variables_are_left_over(
        set_env, call_main, data_dir, tmp_path, values):
    set_env(**values)
    code, out, err = call_main(train_gpt2, *tiny_flags(data_dir=data_dir, log_dir=tmp_path))
    assert code == 0, err
    assert "trained to step 6" in out


@pytest.mark.parametrize("values, message", [
    (dict(RANK="1"), ""), (dict(WORLD_SIZE=""), ""), (dict(RANK="", WORLD_SIZE=""), ""),
    (dict(RANK="0", WORLD_SIZE="x"), "the environment variable WORLD_SIZE is 'x'"),
    (dict(RANK="2", WORLD_SIZE="2"), "the environment variable RANK is 2")], ids=str)
def test_fineweb_names_the_variable_and_no_flag_that_nobody_gave(
        set_env, call_main, text_file, tmp_path, values, message):
    set_env(**values)
    code, _, err = call_main(fineweb, "--source", text_file, "--tokenizer", "bpe:300",
                             "--out", tmp_path / "data")
    assert code == (2 if message else 0) and message in err
    assert (tmp_path / "data").exists() is not bool(message)


# -----------------------------------------------------------------------------
# clocks, numbers, memory


def test_a_clock_that_stands_still_or_jumps_back_does_no_harm(
        data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, "time", iter(range(10**9, 0, -3600)).__next__)
    train(tiny_config(data_dir, tmp_path))
    lines = re.findall(r"dt: (\S+)ms \| tok/sec: (\S+)", capsys.readouterr().out)
    assert len(lines) == 6
    assert all(float(number) > 0 for line in lines for number in line)
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    train(tiny_config(data_dir, tmp_path))
    assert capsys.readouterr().out.count("dt: 0.00ms") == 6


@pytest.mark.parametrize("flags", [
    ("--beta2", 1), ("--seed", 2**64), ("--seed", -1), ("--max_lr", "inf"), ("--min_lr", "inf"),
    ("--grad_clip", "inf"), ("--weight_decay", "1e400"), ("--keep_last", -1), ("--B", 10**9),
    ("--max_steps", 10**18), ("--val_tokens", -5), ("--total_batch_size", 10**400)])
def test_numbers_that_torch_or_numpy_cannot_use_are_refused(
        call_main, data_dir, tmp_path, flags):
    log_dir = tmp_path / "log"
    code, _, err = call_main(train_gpt2, *tiny_flags(data_dir=data_dir, log_dir=log_dir), *flags)
    assert code == 2 and f"error: {flags[0]} " in err and " must be at " in err
    assert err.count("\n") == 1 and not log_dir.exists()


def test_the_largest_seed_and_the_shortest_sequence_train(data_dir, tmp_path):
    assert train(tiny_config(data_dir, tmp_path, seed=2**64 - 1, T=1, total_batch_size=8,
                             val_tokens=50))["step"] == 6


def test_the_nearest_B_is_found_among_billions(monkeypatch):
    assert presets.nearest_divisors(7, 10**12) == (5, 8)


@pytest.mark.parametrize("error", [
    None, MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")], ids=repr)
def test_a_lack_of_memory_is_one_line_that_says_what_needs_less(
        call_main, data_dir, tmp_path, monkeypatch, error):
    flags = tiny_flags(data_dir=data_dir, log_dir=tmp_path)
    if error is None:
        flags += ["--n_embd", str(10**12)]  # torch refuses it: no address space is so large
    else:
        def training_step(*args):
            raise error

        monkeypatch.setattr(train_gpt2, "training_step", training_step)
    code, _, err = call_main(train_gpt2, *flags)
    assert code == 2 and "error: not enough memory (" in err and "--grad_checkpoint" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("save_every, remedy", [
    (0, "nothing is saved yet, start again with a lower --max_lr"), (1, "model_00003.pt with a")])
def test_a_run_that_diverges_says_what_is_saved(
        data_dir, tmp_path, monkeypatch, save_every, remedy):
    def training_step(run, step, batches, signals):
        return (1.0, 1.0, True, False, False) if step < 2 else (
            float("nan"), float("nan"), False, False, False)

    monkeypatch.setattr(train_gpt2, "training_step", training_step)
    with pytest.raises(UserError, match=remedy):
        train(tiny_config(data_dir, tmp_path, save_every=save_every, max_bad_steps=2))


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"), report.saying_what_saves_memory():
        raise RuntimeError("a bug")


def test_two_processes_never_write_shards_to_one_folder(text_file, tmp_path):
    """Guards against a folder whose meta.json describes the shards of another process."""
    out = tmp_path / "out"
    out.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from gpt2lab import lock; "
         "lock.lock_folder(Path(sys.argv[1]), 'is writing to', '--out'); print('locked', "
         "flush=True); sys.stdin.read()", str(out.resolve() / "in_progress_0.lock")], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    assert holder.stdout.readline() == "locked\n"
    holds = rf"(process {holder.pid} on .*|another process) is writing to .*--out"  # on Windows
    with pytest.raises(UserError, match=holds):
        fineweb.prepare([text_file], out, "bpe:300")
    assert sorted(path.name for path in out.iterdir()) == ["in_progress_0.lock"]
    holder.communicate("")  # ends, and with it the lock
    assert fineweb.prepare([text_file], out, "bpe:300")["splits"]["train"]["tokens"] > 0
    assert not (out / "in_progress_0.lock").exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """Guards against a full disk that is reported as "200000 requested and 155584 written"."""
    def full_disk(file):
        raise OSError("200000 requested and 155584 written")

    with pytest.raises(OSError, match=r"cannot write .*a\.npy .*make room"):
        write_atomically(tmp_path / "a.npy", full_disk)
    assert not list(tmp_path.iterdir())


def test_abbreviated_flags_are_refused(call_main):
    """Guards against a misspelled flag that silently counts as another one."""
    code, _, err = call_main(train_gpt2, "--max_step", 2)
    assert code == 2 and "unrecognized arguments: --max_step" in err


def test_check_looks_at_the_weights_and_the_checkpoint_to_start_from(
        call_main, data_dir, log_dir, tmp_path, monkeypatch):
    """Guards against a --check that promises a run which then ends at once."""
    flags = [*tiny_flags(), "--data_dir", data_dir, "--log_dir", tmp_path / "log", "--check"]
    for wrong in ("--init_from", "--resume"):
        code, out, err = call_main(train_gpt2, *flags, wrong, tmp_path / "nothing")
        assert code == 2 and "the run could not start" in out and "nothing" in err
    code, out, _ = call_main(train_gpt2, *flags, "--init_from", log_dir, "--resume")
    assert code == 0 and "the run can start" in out
    monkeypatch.chdir(tmp_path)  # the demo makes its own data
    code, out, _ = call_main(train_gpt2, "--preset", "demo", "--check")
    assert code == 0 and "the run can start" in out
