"""The training loop: schedule, options, losses, logs and checkpoints of a run, HellaSwag."""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import parse_train_flags, read_log, tiny_config
from torch.profiler import ProfilerActivity, profile

import train_gpt2
from gpt2lab import downloads, presets, shards
from gpt2lab.checkpoints import find_checkpoint, load_checkpoint
from gpt2lab.cli import UserError
from train_gpt2 import DataLoaderLite, TrainConfig, build_model, get_lr, train

# -----------------------------------------------------------------------------
# schedule and options


@pytest.mark.parametrize("step, lr", [
    (0, 6e-4 / 715), (714, 6e-4), (715, 6e-4), (19_072, 6e-5), (19_073, 6e-5), (99_999, 6e-5)])
def test_default_learning_rate_warms_up_and_decays_to_a_tenth(step, lr):
    assert get_lr(step, TrainConfig()) == pytest.approx(lr, rel=1e-6)


def test_learning_rate_without_warmup_and_without_decay():
    no_warmup = TrainConfig(warmup_steps=0, max_steps=10)
    assert get_lr(0, no_warmup) == 6e-4 and get_lr(10, no_warmup) == 6e-5
    all_warmup = TrainConfig(warmup_steps=10, max_steps=10)
    assert get_lr(9, all_warmup) == 6e-4 and get_lr(10, all_warmup) == 6e-5
    halfway = TrainConfig(warmup_steps=0, max_steps=10, max_lr=1.0, min_lr=0.0)
    assert get_lr(5, halfway) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule, rates", [
    ("cosine", [0.5, 1, 1, 0.9045, 0.6545, 0.3455, 0.0955, 0, 0]),
    ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0]),
    ("wsd", [0.5, 1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0])])
def test_schedules_fall_in_their_own_ways(schedule, rates):
    config = TrainConfig(schedule=schedule, warmup_steps=2, max_steps=7, max_lr=1.0, min_lr=0.0,
                         decay_fraction=0.4)
    assert [get_lr(step, config) for step in range(9)] == pytest.approx(rates, abs=1e-4)


@pytest.mark.parametrize("decay_fraction, start", [(0, 7), (1, 2), (0.9, 2), (0.5, 3)])
def test_the_decay_never_begins_before_the_warmup_ends(decay_fraction, start):
    config = TrainConfig(schedule="wsd", warmup_steps=2, max_steps=7, decay_fraction=decay_fraction)
    assert config.decay_start == start
    assert get_lr(start - 1, config) == config.max_lr and get_lr(7, config) == config.min_lr


def test_defaults_are_the_124m_recipe():
    preset, config = parse_train_flags()
    assert preset is None
    assert config == TrainConfig()
    assert (config.B, config.T, config.total_batch_size, config.max_steps) == (
        64, 1024, 524_288, 19_073)
    for world_size in (8, 1):  # an update has 1 or 8 micro-steps
        presets.check_batch_size(config.B, config.T, config.total_batch_size, world_size)


def test_explicit_flags_win_over_the_preset():
    preset, config = parse_train_flags("--max_steps", "7", "--preset", "demo", "--compile")
    assert preset == "demo"
    assert config.max_steps == 7 and config.compile is True
    demo = presets.RUN_PRESETS["demo"] | presets.OPTIMIZER_PRESETS["demo", "muon"]
    assert config == replace(TrainConfig(**demo), max_steps=7, compile=True)


def test_the_demo_with_another_optimizer_has_learning_rates_of_its_own():
    """Guards against AdamW that trains with Muon's learning rate, and a flag that is overruled."""
    _, muon = parse_train_flags("--preset", "demo")
    _, adamw = parse_train_flags("--preset", "demo", "--optimizer", "adamw")
    _, slow = parse_train_flags("--optimizer", "adamw", "--max_lr", "1e-3", "--preset", "demo")
    assert muon.optimizer == "muon" and adamw.optimizer == slow.optimizer == "adamw"
    assert muon.max_lr > adamw.max_lr > slow.max_lr == 1e-3
    assert adamw.beta2 == slow.beta2 == presets.OPTIMIZER_PRESETS["demo", "adamw"]["beta2"]


def test_a_learning_rate_that_would_rise_is_refused():
    """Guards against a lower --max_lr with the default --min_lr, which would be the larger one."""
    with pytest.raises(UserError, match="is larger than --max_lr 1e-05: give both"):
        TrainConfig(max_lr=1e-5)


def test_muon_has_a_learning_rate_of_its_own_in_every_run():
    """Guards against Muon with AdamW's learning rate, which a preset might bring back."""
    default = TrainConfig()
    for flags in ([], ["--preset", "cpu"]):
        _, muon = parse_train_flags(*flags, "--optimizer", "muon")
        assert [muon.max_lr, muon.min_lr] == [
            pytest.approx(3 * lr) for lr in (default.max_lr, default.min_lr)]
        _, given = parse_train_flags(*flags, "--optimizer", "muon", "--max_lr", "1e-3")
        assert given.max_lr == 1e-3
        _, adamw = parse_train_flags(*flags)
        assert adamw.max_lr == default.max_lr


def test_switches_have_opposites():
    _, config = parse_train_flags("--no_compile", "--no_shuffle")
    assert config == TrainConfig(compile=False, shuffle=False)


# -----------------------------------------------------------------------------
# a run


def test_a_run_prints_learns_logs_and_saves(data_dir, tmp_path, capsys):
    config = tiny_config(data_dir, tmp_path, max_steps=40, eval_every=20, save_every=20,
                         print_every=10, max_lr=3e-3)
    result = train(config)
    out = capsys.readouterr().out
    for line in ("using device: cpu", "total desired batch size: 256",
                 "=> calculated gradient accumulation steps: 2",
                 "found 1 shards for split train", "the val split is small: all",
                 "using fused AdamW: True", "num decayed parameter tensors: 10,",
                 "[Sample 4] "):
        assert line in out
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split("|")[0].split()[1] for line in steps] == ["0", "10", "20", "30", "39"]
    assert all(" | eta " in line and "tok/sec: " in line for line in steps)

    train_loss, val = read_log(tmp_path, "train"), read_log(tmp_path, "val")
    assert list(train_loss) == list(range(40)) and list(val) == [0, 20, 40]
    rows = 384  # of the embedding: 300 tokens rounded up to a multiple of 128
    assert train_loss[0] == pytest.approx(math.log(rows), abs=0.1)
    assert val[40] < val[20] < val[0]
    assert val[40] == pytest.approx(result["val_loss"], rel=1e-5)
    assert result["train_loss"] == pytest.approx(train_loss[39], rel=1e-5)
    assert read_log(tmp_path, "lr")[39] == pytest.approx(get_lr(39, config), rel=1e-5)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["model_00020.pt", "model_00040.pt"]
    assert result["checkpoint"] == str(tmp_path / "model_00040.pt")


def test_bits_per_byte_count_the_bytes_of_the_text(data_dir, tmp_path):
    result = train(tiny_config(data_dir, tmp_path))
    totals = shards.read_meta(data_dir)["splits"]["val"]
    nats = result["val_loss"] * totals["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / totals["bytes"])
    # a model that knows little pays about log2(V) bits a token
    ignorance = math.log2(384) * totals["tokens"] / totals["bytes"]
    assert result["bits_per_byte"] == pytest.approx(ignorance, rel=0.1)


def test_val_loss_is_the_mean_over_val_tokens_for_every_B(data_dir, tmp_path):
    options = dict(max_steps=0, val_tokens=1000, block_size=64)
    losses = [train(tiny_config(data_dir, tmp_path / str(B), B=B, **options))["val_loss"]
              for B in (1, 4, 8)]
    torch.manual_seed(1337)
    model = build_model(tiny_config(data_dir, tmp_path, **options), 300)
    loader = DataLoaderLite(data_dir, "val", 31, 32, shuffle=False)  # 1000 // 32 = 31 sequences
    expected = model(*loader.batch(0))[1].item()
    assert losses == pytest.approx([expected] * 3, abs=1e-5)


def test_gradient_accumulation_equals_one_large_batch(data_dir, tmp_path):
    for B in (8, 4, 1):
        train(tiny_config(data_dir, tmp_path / str(B), B=B, max_steps=10))
    whole, whole_norm = read_log(tmp_path / "8", "train"), read_log(tmp_path / "8", "norm")
    for B in ("4", "1"):
        assert read_log(tmp_path / B, "train") == pytest.approx(whole, abs=2e-4)
        assert read_log(tmp_path / B, "norm") == pytest.approx(whole_norm, rel=2e-3)


def test_gradients_are_clipped(data_dir, tmp_path):
    free = train(tiny_config(data_dir, tmp_path / "a", grad_clip=0))
    clipped = train(tiny_config(data_dir, tmp_path / "b", grad_clip=1e-9))
    assert read_log(tmp_path / "a", "norm")[0] == read_log(tmp_path / "b", "norm")[0] > 0.1
    assert clipped["train_loss"] > free["train_loss"]


def test_bfloat16_learns_what_float32_learns(data_dir, tmp_path):
    """
    Guards against updates, and evaluations of weights and of their average, that use a copy in 16
    bits of what the weights were before. The learning rate is so high that this would show.
    """
    losses = {}
    for dtype in ("float32", "bfloat16"):
        train(tiny_config(data_dir, tmp_path / dtype, dtype=dtype, max_steps=20, max_lr=1e-2,
                          eval_every=10, val_tokens=256, sample_every=0, ema=0.5))
        losses[dtype] = [read_log(tmp_path / dtype, stream)
                         for stream in ("train", "val", "val_ema")]
    for exact, rounded in zip(*losses.values(), strict=True):
        assert exact != rounded
        assert rounded == pytest.approx(exact, abs=0.02)
    assert losses["float32"][0][0] - losses["float32"][0][19] > 0.5


BFLOAT16_CODE = 15  # of torch.bfloat16 in a profile


def test_a_weight_is_cast_once_an_update(data_dir, tmp_path, monkeypatch):
    """Guards against a cast in each of the four micro-steps, in the loss and in LeanMLP, too."""
    original = train_gpt2.training_step
    casts, weights = Counter(), Counter()  # {shape: how many}

    def training_step(run, *args):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            result = original(run, *args)
        casts.update(tuple(event.input_shapes[0]) for event in profiler.events()
                     if event.name == "aten::_to_copy"
                     and event.concrete_inputs[1:2] == [BFLOAT16_CODE])
        weights.update(tuple(p.shape) for name, p in run.raw_model.named_parameters()
                       if re.search("attn|mlp|wte", name))
        return result

    monkeypatch.setattr(train_gpt2, "training_step", training_step)
    train(tiny_config(data_dir, tmp_path, dtype="bfloat16", B=2, max_steps=1, eval_every=0,
                      sample_every=0))
    activations = {(2, 32, 32), (64, 32)}  # (B, T, C) and (B * T, C)
    assert {shape: n for shape, n in casts.items() if shape not in activations} == weights


def test_evaluation_does_not_change_training(data_dir, tmp_path, hellaswag_examples):
    """Guards against an evaluation, sample, checkpoint or plot that draws from a shared RNG."""
    train(tiny_config(data_dir, tmp_path / "a", eval_every=0, sample_every=0, save_every=0))
    train(tiny_config(data_dir, tmp_path / "b", eval_every=1, sample_every=1, save_every=1,
                      hellaswag_every=1, plot_every=3))
    assert len(read_log(tmp_path / "b", "hella")) == len(read_log(tmp_path / "b", "val")) == 7
    for stream in ("train", "norm"):
        assert read_log(tmp_path / "a", stream) == read_log(tmp_path / "b", stream)
    a, b = (load_checkpoint(find_checkpoint(tmp_path / name))["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_new_run_sets_the_earlier_one_aside(data_dir, tmp_path):
    for _ in range(3):
        train(tiny_config(data_dir, tmp_path))
    for folder in ("", "previous_1", "previous_2"):
        assert (tmp_path / folder / "model_00006.pt").is_file()
        assert len(read_log(tmp_path / folder, "train")) == 6


def test_init_from_a_checkpoint(data_dir, log_dir, tmp_path):
    before = train(tiny_config(data_dir, tmp_path / "a", max_steps=0))["val_loss"]
    after = train(tiny_config(data_dir, tmp_path / "b", max_steps=0, init_from=str(log_dir)))
    assert after["val_loss"] < before - 0.05
    with pytest.raises(UserError, match="lower --T"):
        train(tiny_config(data_dir, tmp_path / "c", init_from=str(log_dir), T=64, block_size=64))


# -----------------------------------------------------------------------------
# HellaSwag during training


def test_training_goes_on_if_hellaswag_cannot_be_downloaded(
        data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELLASWAG_URL", "http://127.0.0.1:9/none")
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    assert train(tiny_config(data_dir, tmp_path, hellaswag_every=2))["step"] == 6
    assert capsys.readouterr().out.count("warning: training goes on without HellaSwag") == 1


def test_hellaswag_accuracy_is_printed_and_logged(
        data_dir, tmp_path, capsys, hellaswag_examples):
    train(tiny_config(data_dir, tmp_path, hellaswag_every=3, hellaswag_limit=4))
    assert list(read_log(tmp_path, "hella")) == [0, 3, 6]
    assert re.search(r"HellaSwag accuracy: \d/4=", capsys.readouterr().out)
