"""--minutes: which run is planned for a machine, a text and a time."""

import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import parse_train_flags, read_log, tiny_config

import train_gpt2
from gpt2lab import budget, lock
from gpt2lab.budget import GPT2_124M, SHAPES, Timing
from gpt2lab.checkpoints import load_checkpoint
from gpt2lab.cli import UserError
from gpt2lab.distributed import Ranks
from gpt2lab.runlog import read_run
from train_gpt2 import TrainConfig

CPU = Ranks(torch.device("cpu"))


@pytest.fixture
def plan_on(monkeypatch):
    """
    plan_on(flops, *flags, **text) is the TrainConfig that --minutes plans for these flags on an
    imagined machine, which does `flops` operations a second, with a text of so many tokens.
    """
    def plan(flops, *flags, train_tokens=10**6, val_tokens=10**5, fits=math.inf, ranks=CPU):
        def measure(config, trainer, seconds):
            weights = budget.layer_weights(config)
            if weights > fits:
                raise MemoryError
            return Timing(6 * weights * config.total_batch_size / flops, 0.1, weights,
                          train_tokens, val_tokens)

        monkeypatch.setattr(budget, "measure", measure)
        monkeypatch.setattr(budget, "init_distributed", lambda device: ranks)
        monkeypatch.setattr("time.process_time", lambda: 3.0)  # pytest's own is not the script's
        monkeypatch.setattr("sys.argv", ["train_gpt2.py", *flags])
        return budget.plan(parse_train_flags(*flags)[1], None, None)

    return plan


def shape_of(config):
    return config.n_layer, config.n_head, config.n_embd, config.T


def test_more_time_or_a_faster_machine_makes_a_larger_model_up_to_the_124M_run(plan_on):
    """Guards against a rule with jumps: seconds on a CPU, and hours on GPUs, are both planned."""
    machines = [(3e10, 0.5), (3e10, 2), (3e10, 10), (3e10, 60), (1e14, 60)]
    planned = [plan_on(flops, "--minutes", str(minutes), train_tokens=10**8)
               for flops, minutes in machines]
    weights = [budget.layer_weights(config) for config in planned]
    assert weights == sorted(weights) and len(set(weights)) == 5
    assert shape_of(planned[0]) == SHAPES[0][:4] and shape_of(planned[-1]) == GPT2_124M[:4]
    for config, (flops, minutes) in zip(planned, machines, strict=True):
        seconds = config.max_steps * config.total_batch_size * 6 * budget.layer_weights(config)
        assert 0.7 * 60 * minutes < seconds / flops < 60 * minutes
        tokens = config.max_steps * config.total_batch_size
        assert tokens > 0.7 * budget.TOKENS_PER_WEIGHT * budget.layer_weights(config)


def test_hours_on_a_gpu_are_the_124M_recipe(plan_on, capsys):
    """Guards against a recipe of its own where a known one exists."""
    config = plan_on(1e14, "--minutes", "400", train_tokens=10**10, val_tokens=10**8)
    recipe, sizes = TrainConfig(), ("total_batch_size", "T", "block_size", "max_lr", "min_lr",
                                    "warmup_steps", "schedule", "optimizer", "beta2",
                                    "weight_decay", "ema", "num_val_tokens", "sample_prompt")
    assert {name: getattr(config, name) for name in sizes} == {
        name: getattr(recipe, name) for name in sizes}
    assert train_gpt2.presets.model_sizes(config) == train_gpt2.presets.model_sizes(recipe)
    share = config.max_steps * config.total_batch_size / 1e10
    assert f"the time is enough for {share:.2g} of the 10B tokens" in capsys.readouterr().out


def test_a_small_text_is_read_twenty_times_at_most(plan_on, capsys):
    """Guards against hours in which a model learns a short text by heart."""
    config = plan_on(1e12, "--minutes", "60", train_tokens=400_000)
    assert budget.layer_weights(config) < 20 * 400_000 and config.weight_decay == 0.8
    assert 19.9 < config.max_steps * config.total_batch_size / 400_000 < 20.1
    out = capsys.readouterr().out
    [minutes] = re.findall("the run takes (.*) minutes, because", out)
    assert float(minutes) < 50


def test_flags_win_over_the_plan(plan_on):
    """Guards against a plan that overwrites what the user has asked for."""
    flags = dict(n_layer=3, T=32, B=2, optimizer="adamw", warmup_steps=7, eval_every=11,
                 val_tokens=500, save_every=5, seed=9, ema=0.5, print_every=2, min_lr=1e-4)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    config = plan_on(3e10, "--minutes", "1", *words)
    assert {name: getattr(config, name) for name in flags} == flags
    assert config.max_lr == SHAPES[0].max_lr / 3  # AdamW's
    assert config.total_batch_size % (2 * 32) == 0
    config = plan_on(3e10, "--minutes=1", "--max_steps=123", "--no_shuffle",
                     "--model", "gpt2")
    assert config.max_steps == 123 and not config.shuffle
    assert budget.layer_weights(config) == budget.layer_weights(TrainConfig())
    assert config.optimizer == "adamw"  # the recipe of the model that was asked for


def test_flags_that_leave_few_possibilities(plan_on):
    """Guards against plans that contradict a flag: the batch, the width, the heads, the context."""
    config = plan_on(3e10, "--minutes", "5", "--total_batch_size", "960")
    assert config.total_batch_size == 960 and 960 % (config.B * config.T) == 0
    config = plan_on(1e11, "--minutes", "60", "--n_embd", "48")
    assert config.n_embd % config.n_head == 0
    assert config.max_steps >= budget.MIN_UPDATES
    config = plan_on(3e10, "--minutes", "5", "--n_head", "3")
    assert config.n_head == 3 and config.n_embd == 192
    config = plan_on(3e10, "--minutes", "1", "--block_size", "32")
    assert config.block_size == config.T == 32
    config = plan_on(1e14, "--minutes", "60", "--model", "gpt2", "--optimizer", "muon")
    assert (config.max_lr, config.min_lr) == pytest.approx((1.8e-3, 1.8e-4))


def test_processes_divide_the_update(plan_on):
    """Guards against sizes that check_batch_size refuses."""
    for world_size in (2, 3, 8):
        config = plan_on(1e11, "--minutes", "5", ranks=CPU._replace(ddp_world_size=world_size))
        train_gpt2.presets.check_batch_size(
            config.B, config.T, config.total_batch_size, world_size)


def test_all_processes_plan_with_the_same_times(data_dir, tmp_path, monkeypatch):
    """Guards against ranks that plan different numbers of updates, and then wait for each other."""
    monkeypatch.setattr(budget, "sum_over_ranks", lambda values, device: [2.0])
    trainer = budget.Trainer(train_gpt2.setup, train_gpt2.training_step, CPU)
    locks = dict(lock._locks)
    timing = budget.time_updates(tiny_config(data_dir, tmp_path / "log"), trainer, seconds=0.5)
    assert lock._locks == locks  # Windows deletes no folder in which a file is locked
    assert timing.seconds == timing.setup_seconds == 2.0
    assert not (tmp_path / "log").exists()


def test_a_model_that_does_not_fit_into_memory_is_not_chosen(plan_on):
    """Guards against a plan that ends before the run begins."""
    fits = budget.layer_weights(SimpleNamespace(model="gpt2", block_size=64, **dict(
        zip(("n_layer", "n_head", "n_embd"), SHAPES[1][:3], strict=True))))
    assert shape_of(plan_on(1e14, "--minutes", "60", fits=fits)) == SHAPES[1][:4]
    with pytest.raises(MemoryError):
        plan_on(1e14, "--minutes", "60", fits=1)


@pytest.mark.parametrize("flags, text, message", [
    (["--minutes", "0.05"], {}, "too little for this machine, where 200 updates"),
    (["--minutes", "5"], dict(train_tokens=19_000), "has 19,000 tokens to train on, and --minutes"),
    (["--minutes", "5", "--n_head", "7"], {}, "--n_head 7 divides no width"),
    (["--minutes", "5", "--B", "3", "--total_batch_size", "64"], {}, "does not divide total_batch"),
    (["--minutes", "0"], {}, "--minutes 0.0 must be at least 0.01"),
    (["--minutes", "nan"], {}, "--minutes nan must be at least 0.01"),
    (["--minutes", "5", "--check"], {}, "leave out --minutes, or --check"),
    (["--minutes", "5", "--init_from", "gpt2"], {}, "leave out --minutes, or --init_from"),
])
def test_what_cannot_be_planned_is_refused(plan_on, flags, text, message):
    with pytest.raises(UserError, match=message):
        plan_on(1e9, *flags, **text)


@pytest.mark.parametrize("changes", [
    {}, dict(optimizer="muon", max_lr=6e-4, min_lr=6e-5, sample_prompt="-", log_dir="-x"),
    dict(compile=False, fsdp=True, shuffle=False, keep_last=0, wandb="a project", max_lr=1e-3,
             sample_prompt="it's", min_lr=0.0, n_embd=48, device="cpu"), dict(compile=True)])
def test_the_printed_command_makes_the_same_config(changes):
    """Guards against a command that trains something else than the run that printed it."""
    config = TrainConfig(**changes)
    words = shlex.split(budget.explicit_command(config))
    assert words[:2] == ["python", "train_gpt2.py"] and parse_train_flags(*words[2:])[1] == config


def test_a_timed_run_trains_and_resumes_without_timing(data_dir, tmp_path, monkeypatch, call_main):
    """The whole of it, with real timing of one small shape."""
    monkeypatch.chdir(tmp_path)
    Path("temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(budget, "SHAPES", (budget.Shape(1, 2, 16, 16, 64, 1e-2),))
    monkeypatch.setattr(budget, "MIN_UPDATES", 5)
    monkeypatch.setattr(budget, "MIN_TOKENS", 5)
    monkeypatch.setattr("time.process_time", lambda: 0.0)
    flags = ["--minutes", "0.1", "--data_dir", data_dir, "--device", "cpu", "--plot_every", 0]
    code, out, _ = call_main(train_gpt2, *flags, "--max_steps", 12, "--save_every", 6)
    assert code == 0 and "validation loss" in out
    run, checkpoint = read_run("log"), load_checkpoint("log/model_00012.pt")
    assert run["minutes"] is checkpoint["config"]["minutes"] is None
    assert run["n_embd"] == 16 and run["max_steps"] == 12
    assert not list((tmp_path / "temporary").glob("tmp*"))
    # the same command with --resume goes on with what was planned, although the machine is slower.
    # A damaged checkpoint does not matter
    Path("log/model_00099.pt").write_text("damaged")
    losses = read_log("log", "train")
    Path("log/model_00012.pt").unlink()
    monkeypatch.setattr(budget, "measure", None)
    monkeypatch.setattr(budget, "SHAPES", ())
    code, out, _ = call_main(train_gpt2, *flags, "--resume")
    assert code == 0 and "the run goes on as it was planned" in out and "at step 6" in out
    assert read_log("log", "train") == losses
