"""
The recipes for clusters in examples/: their commands exist, and their shell scripts, run with
imitations of Slurm's and torch's commands, handle signals and failures. dev/slurm/trial runs the
one for Slurm on a real cluster. And trackio, the tracker for machines without a network.
"""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT, read_log, tiny_config, tiny_flags
from test_readme import flags_of, options

from gpt2lab.checkpoints import list_checkpoints
from gpt2lab.cli import UserError
from gpt2lab.runlog import open_logger
from train_gpt2 import TrainConfig

EXAMPLES = sorted((ROOT / "examples").iterdir())
SBATCH = ROOT / "examples" / "slurm.sbatch"
KUBERNETES = yaml.safe_load((ROOT / "examples" / "kubernetes.yaml").read_text(encoding="utf-8"))
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no bash and other signals")


# -----------------------------------------------------------------------------
# what is named exists


def commands(path):
    """[(script, [its arguments])] of the Python commands in an example."""
    text = re.sub(r"\\\n[# ]*", "", path.read_text(encoding="utf-8"))
    text = text.replace("examples/slurm.sbatch", "train_gpt2.py")  # to which its flags go
    found = re.findall(r"(\w+\.py)((?: +[^\s|&')`]+)*)", text)
    return [(script, arguments.split()) for script, arguments in found]


def value_of(flag, default, found, script):
    """The value that an example gives a flag of a script, or `default`."""
    words = [word for name, arguments in found if name == script for word in arguments]
    return words[words.index(flag) + 1] if flag in words else default


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_commands_of_the_examples_exist(path, call_main):
    """Guards against a flag or script that was renamed, and training on another folder of data."""
    found = commands(path)
    assert {"fineweb.py", "train_gpt2.py"} <= {script for script, _ in found}
    for script, arguments in found:
        unknown = flags_of(arguments) - options(script, call_main)
        assert not unknown, f"{script} has no {unknown}"
    assert "--resume" in [word for _, arguments in found for word in arguments]
    assert value_of("--out", TrainConfig.data_dir, found, "fineweb.py") == value_of(
        "--data_dir", TrainConfig.data_dir, found, "train_gpt2.py")
    for name in re.findall(r"examples/[\w.]+", path.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


def shell_scripts():
    """{name: text} of all shell scripts for clusters."""
    paths = [SBATCH, *(ROOT / "dev" / "slurm").iterdir()]
    skypilot = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text(encoding="utf-8"))
    return {path.name: path.read_text(encoding="utf-8") for path in paths} | {
        "skypilot": skypilot["run"], "kubernetes": kubernetes_script()}


def kubernetes_script():
    """What the pods of kubernetes.yaml run."""
    replicas = KUBERNETES["spec"]["pytorchReplicaSpecs"]
    container, = replicas["Master"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"]
    script, = container["args"]
    return script


@posix_only
def test_shell_scripts_are_correct_bash():
    for name, text in shell_scripts().items():
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_a_pod_has_a_process_for_each_gpu_and_trains_to_the_end():
    """Guards against a pod that waits for a checkpoint that the run never writes."""
    replicas = KUBERNETES["spec"]["pytorchReplicaSpecs"]
    limits = replicas["Worker"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert KUBERNETES["spec"]["nprocPerNode"] == str(limits["nvidia.com/gpu"])
    assert f"steps={TrainConfig.max_steps}\n" in kubernetes_script()


# -----------------------------------------------------------------------------
# Slurm

# starts two tasks as srun does, says their process ids, and ends with the highest exit code
SRUN = """#!/bin/bash
while [[ $1 = --* ]]; do shift; done
highest=0
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    pids+=($!)
done
echo "tasks ${pids[*]}"
for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    ((code > highest)) && highest=$code
done
exit "$highest"
"""
JOB_ID = os.getpid()  # its own in each process of pytest, because the port follows from it
SCONTROL = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && echo localhost
[ "$1" = requeue ] && echo "requeued $2"
"""


def make_commands(folder, **scripts):
    """Write programs into a folder; returns the environment in which they are found first."""
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def start_sbatch(tmp_path, python, flags=()):
    """Start slurm.sbatch as Slurm would, with `python` as its python; returns the process."""
    env = make_commands(tmp_path, srun=SRUN, scontrol=SCONTROL, python=python)
    env |= {"SLURM_JOB_ID": str(JOB_ID), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2",
            "SLURM_CPUS_PER_TASK": "1", "TMPDIR": str(tmp_path)}
    return subprocess.Popen(["bash", SBATCH, *flags], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@posix_only
def test_slurm_requeues_a_run_that_sigterm_has_stopped(data_dir, tmp_path):
    """
    Guards against a run that is not continued after a preemption. And against processes that do not
    find each other without a LOCAL_RANK, which launchers of one process in each pod do not set.
    """
    flags = tiny_flags(data_dir=data_dir, log_dir=tmp_path / "log", max_steps=10**6, B=1,
                       eval_every=0, sample_every=0)
    process = start_sbatch(
        tmp_path, f'#!/bin/sh\nunset LOCAL_RANK\nexec {sys.executable} "$@"\n', flags)
    pids, lines = [], []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("tasks "):
            pids = [int(pid) for pid in line.split()[1:]]
        if line.startswith("step "):
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            pids = []
    assert process.wait() == 0, "".join(lines)
    assert lines[-1] == f"requeued {JOB_ID}\n"
    step, = list_checkpoints(tmp_path / "log")
    assert list(read_log(tmp_path / "log", "train")) == list(range(step))


@posix_only
@pytest.mark.parametrize("line, code", [
    ("trained to step 6", 0), ("error: unrecognized arguments", 2),
    ("stopped by a signal at step 3", 1)])  # the last checkpoint could not be written
def test_slurm_does_not_requeue_a_run_that_is_finished_or_has_failed(tmp_path, line, code):
    """Guards against a job that comes back for ever, and one that SIGTERM ends while it starts."""
    python = ("#!/bin/sh\nkill -TERM $$\n"
              f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $*"\necho "{line}"\nexit {code}\n')
    process = start_sbatch(tmp_path, python, ["--sample_prompt", "a flag with spaces"])
    output, _ = process.communicate()
    assert process.returncode == code
    assert line in output and "requeued" not in output
    for rank in range(2):
        assert f"{rank} {rank} 2 train_gpt2.py --resume --sample_prompt a flag with" in output
    assert {path.name for path in tmp_path.iterdir()} == {"python", "scontrol", "srun"}


# -----------------------------------------------------------------------------
# Kubernetes

# a torchrun that trains until SIGTERM comes, then saves and ends, or that exits at once
TORCHRUN = """#!/bin/bash
trap 'echo saved; kill $!; exit 1' TERM
echo started
[ -n "$ENDLESS" ] && { sleep 60 & wait $!; }
exit "${CODE:-0}"
"""


def start_pod(tmp_path, finished=False, steps=TrainConfig.max_steps, **variables):
    """Start what a pod runs, with tmp_path as its volume; returns the process."""
    (tmp_path / "log").mkdir()
    if finished:
        (tmp_path / "log" / f"model_{steps:05d}.pt").touch()  # as Saver names it
    env = make_commands(tmp_path, torchrun=TORCHRUN) | variables
    script = kubernetes_script().replace("/gpt2/", f"{tmp_path}/").replace(
        f"steps={TrainConfig.max_steps}", f"steps={steps}")
    return subprocess.Popen(["bash", "-c", script], env=env, text=True, stdout=subprocess.PIPE)


@posix_only
def test_a_pod_passes_sigterm_on_and_waits_for_the_checkpoint(tmp_path):
    """Guards against a pod that is killed after its grace period without having saved."""
    process = start_pod(tmp_path, ENDLESS="1")
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == 1


@posix_only
@pytest.mark.parametrize("finished, code, expected, steps", [
    (False, 0, 1, 19073), (True, 0, 0, 19073), (True, 2, 2, 19073), (True, 0, 0, 600)])
def test_a_pod_succeeds_only_if_its_run_is_finished(tmp_path, finished, code, expected, steps):
    """Guards against pods that are not started again after another pod was evicted, or always."""
    process = start_pod(tmp_path, finished, steps, CODE=str(code))
    process.communicate()
    assert process.returncode == expected


# -----------------------------------------------------------------------------
# trackio


def log_two_steps(config, first, resumed_from=None):
    """Log two steps through open_logger, and wait until trackio has written them."""
    log = open_logger(config, first, resumed_from)
    for step in (first, first + 1):
        log(step, train=2.5 + step, lr=1e-4)
    sys.modules["trackio"].finish()


def test_trackio_gets_the_values_of_log_txt(data_dir, tmp_path, monkeypatch):
    """Guards against a resumed run that begins a second run of trackio, or lacks its steps."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")  # reads the variable when it is imported
    from trackio.sqlite_storage import SQLiteStorage
    config = tiny_config(data_dir, tmp_path / "mine", wandb="trackio:gpt2")
    log_two_steps(config, 0)
    (tmp_path / "mine" / "model_00002.pt").touch()
    log_two_steps(config, 2, tmp_path / "mine" / "model_00002.pt")
    run, = trackio.Api().runs("gpt2")
    assert (run.name, run.config["total_batch_size"]) == ("mine", 256)
    logs = SQLiteStorage.get_logs("gpt2", "mine")
    assert [(log["step"], log["train"], log["lr"]) for log in logs] == [
        (step, 2.5 + step, 1e-4) for step in range(4)]
    log_two_steps(config, 0)  # from scratch, in the same folder
    assert [run.name for run in trackio.Api().runs("gpt2")] == ["mine", "mine"]


def test_trackio_fails_before_anything_is_written(data_dir, tmp_path, monkeypatch):
    config = tiny_config(data_dir, tmp_path / "log", wandb="trackio:gpt2")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install trackio"):
        open_logger(config)
    for wandb in ("trackio:", "trackio: "):
        with pytest.raises(UserError, match="give trackio:PROJECT"):
            open_logger(replace(config, wandb=wandb))
    assert not (tmp_path / "log").exists()
