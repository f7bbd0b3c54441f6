"""
Checkpoints: exact resume, settings that must match, pruning, damaged files, full disks, SIGKILL,
and files made by others.
"""

import json
import os
import pickle
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import (
    ROOT,
    MakesFolderWhenUnpickled,
    read_log,
    run_jobs,
    run_script,
    tiny_config,
    tiny_flags,
)
from forked import Job

import fineweb
from gpt2lab.checkpoints import find_checkpoint, list_checkpoints, load_checkpoint, resume
from gpt2lab.cli import UserError
from gpt2lab.distributed import Ranks
from train_gpt2 import GPT, DataLoaderLite, GPTConfig, TrainConfig, load, train


def expect_same_state(path_a, path_b):
    """Two checkpoints have the same weights and the same optimizer state, bit for bit."""
    a, b = (torch.load(path, weights_only=True) for path in (path_a, path_b))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    states = a["optimizer"]["state"], b["optimizer"]["state"]
    assert len(states[0]) > 10 and states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][name][key])
               for name, state in states[0].items() for key, v in state.items())
    assert a["scaler"] == b["scaler"] and a["step"] == b["step"]


def delete_checkpoints_after(log_dir, step):
    """Leave a log folder as after a kill: log.txt goes on past `step`, the checkpoints do not."""
    for later, path in list_checkpoints(log_dir).items():
        if later > step:
            path.unlink()


def options_for_epochs_of_four_updates(data_dir):
    """Values of T, B and total_batch_size with which four updates see every sequence once."""
    for T in range(32, 8, -1):
        sequences = DataLoaderLite(data_dir, "train", 1, T).num_sequences
        if sequences % 4 == 0:
            return dict(T=T, B=sequences // 4, total_batch_size=sequences // 4 * T)
    raise AssertionError("no T splits the text into four updates")


@pytest.mark.parametrize("changes", [
    {}, {"dtype": "float16"}, {"dtype": "bfloat16", "B": 2}, {"compile": True, "n_layer": 1},
    "at the end of an epoch"], ids=str)
def test_resumed_run_equals_straight_run_bit_for_bit(data_dir, tmp_path, capsys, changes):
    if changes == "at the end of an epoch":
        changes = options_for_epochs_of_four_updates(data_dir)
    config = tiny_config(data_dir, tmp_path / "straight", max_steps=12, eval_every=4, save_every=4,
                         sample_every=0, **changes)
    train(config)
    broken = replace(config, log_dir=str(tmp_path / "broken"))
    shutil.copytree(tmp_path / "straight", tmp_path / "broken")
    for step in (8,) if config.compile else (4, 8):  # compiling takes seconds
        delete_checkpoints_after(tmp_path / "broken", step)
        train(replace(broken, resume="newest"))
        assert f"at step {step}" in capsys.readouterr().out
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("straight", "broken")]
    assert logs[0] == logs[1] and logs[0].count(" val ") == 4
    expect_same_state(*(tmp_path / name / "model_00012.pt" for name in ("straight", "broken")))
    if changes.get("dtype") == "float16":
        assert load_checkpoint(tmp_path / "broken" / "model_00012.pt")["scaler"]["scale"] > 1


def test_resume_with_another_B_sees_the_same_sequences(data_dir, tmp_path):
    straight = tiny_config(data_dir, tmp_path / "a", max_steps=10, B=8, save_every=5)
    train(straight)
    other = replace(straight, log_dir=str(tmp_path / "b"), B=2)
    train(replace(straight, log_dir=other.log_dir))
    delete_checkpoints_after(tmp_path / "b", 5)
    train(replace(other, resume="newest"))
    expected = read_log(tmp_path / "a", "train")
    assert read_log(tmp_path / "b", "train") == pytest.approx(expected, abs=2e-4)


def test_resume_from_a_path_moves_newer_checkpoints_aside(data_dir, tmp_path, capsys):
    config = tiny_config(data_dir, tmp_path, save_every=2)
    train(config)
    before = (tmp_path / "model_00006.pt").read_bytes()
    train(replace(config, resume=str(tmp_path / "model_00002.pt")))
    assert "past step 2 is now in" in capsys.readouterr().out
    assert (tmp_path / "previous_1" / "model_00006.pt").read_bytes() == before
    assert list(read_log(tmp_path, "train")) == list(range(6))
    elsewhere = replace(config, log_dir=str(tmp_path / "b"), resume=str(tmp_path))
    assert train(elsewhere)["step"] == 6  # the folder's newest checkpoint is at the last step
    with pytest.raises(UserError, match=r"nowhere\.pt is not a checkpoint: name a model_"):
        train(replace(config, resume="nowhere.pt"))


def test_resume_without_a_checkpoint_starts_from_scratch(data_dir, tmp_path, capsys):
    result = train(tiny_config(data_dir, tmp_path, resume="newest"))
    assert result["step"] == 6
    assert "to resume: starting from scratch" in capsys.readouterr().out


def test_resume_with_other_settings_is_refused(data_dir, log_dir, tmp_path, text_file):
    other_data = tmp_path / "data"
    half = tmp_path / "half.txt"
    half.write_text(text_file.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    fineweb.prepare([str(half)], other_data, "bpe:300")
    other = tiny_config(data_dir, log_dir, resume="newest", seed=7, max_lr=2e-3, B=2)
    with pytest.raises(UserError) as caught:
        train(other)
    assert "seed 1337, not 7; max_lr 0.001, not 0.002" in str(caught.value)
    assert "--resume_anyway" in str(caught.value)
    with pytest.raises(UserError, match=r"another run \(data "):
        train(tiny_config(other_data, log_dir, resume="newest"))
    with pytest.raises(UserError, match=r"another model \(n_layer 2, not 3"):
        train(tiny_config(data_dir, log_dir, resume="newest", n_layer=3, resume_anyway=True))
    with pytest.raises(UserError, match="at step 6 already"):
        train(tiny_config(data_dir, log_dir, resume="newest", max_steps=5, resume_anyway=True))
    assert sorted(os.listdir(log_dir)) == ["log.txt", "model_00006.pt", "run.json"]
    longer = replace(other, log_dir=str(tmp_path / "b"), resume=str(log_dir), max_steps=8)
    assert train(replace(longer, resume_anyway=True))["step"] == 8


def test_a_wsd_run_can_be_prolonged_until_its_decay(data_dir, tmp_path):
    """Guards against a longer run whose updates differ from those of one planned so at first."""
    short = tiny_config(data_dir, tmp_path / "short", schedule="wsd", decay_fraction=0.5,
                        max_steps=8, save_every=2, keep_last=0)
    train(short)
    planned = replace(short, log_dir=str(tmp_path / "planned"), max_steps=12, decay_fraction=0.25)
    train(planned)
    at_decay, in_decay = (str(tmp_path / f"short/model_{step:05d}.pt") for step in (4, 6))
    longer = replace(planned, log_dir=str(tmp_path / "longer"), resume=at_decay)
    train(longer)
    expect_same_state(find_checkpoint(planned.log_dir), find_checkpoint(longer.log_dir))
    losses = read_log(planned.log_dir, "train"), read_log(longer.log_dir, "train")
    assert {step: losses[0][step] for step in range(4, 12)} == losses[1]
    with pytest.raises(UserError, match="max_steps 8, not 12; decay_start 4, not 9"):
        train(replace(longer, log_dir=str(tmp_path / "late"), resume=in_decay))
    with pytest.raises(UserError, match="schedule wsd, not linear"):
        train(replace(longer, log_dir=str(tmp_path / "late"), schedule="linear"))


def test_checkpoints_of_earlier_versions_have_a_cosine_schedule(data_dir, log_dir, tmp_path):
    path = find_checkpoint(log_dir)
    checkpoint = torch.load(path, weights_only=True)
    for name in ("schedule", "decay_start"):
        del checkpoint["recipe"][name]
    torch.save(checkpoint, path)
    assert train(tiny_config(data_dir, log_dir, resume="newest"))["step"] == 6
    with pytest.raises(UserError, match="schedule cosine, not linear"):
        train(tiny_config(data_dir, log_dir, resume="newest", schedule="linear"))


def test_resume_accepts_data_that_was_moved(data_dir, log_dir, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(data_dir)
    assert train(tiny_config(moved, tmp_path / "b", resume=str(log_dir)))["step"] == 6


def test_pruning_keeps_the_newest_and_every_fifth_checkpoint(data_dir, tmp_path):
    train(tiny_config(data_dir, tmp_path, max_steps=12, save_every=1, keep_last=2, keep_every=5))
    assert list(sorted(list_checkpoints(tmp_path))) == [5, 10, 11, 12]
    train(tiny_config(data_dir, tmp_path / "all", save_every=1, keep_last=0))
    assert list(sorted(list_checkpoints(tmp_path / "all"))) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_resume_skips_a_damaged_checkpoint(data_dir, tmp_path, capsys, damage):
    config = tiny_config(data_dir, tmp_path, save_every=2)
    train(config)
    straight = (tmp_path / "log.txt").read_text()
    path = find_checkpoint(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of a tensor
    path.write_bytes({"cut": content[:-999], "flipped": content, "empty": b""}[damage])
    capsys.readouterr()
    train(replace(config, resume="newest"))
    out = capsys.readouterr().out
    assert f"warning: {path} is" in out and "trying the checkpoint before it" in out
    assert "at step 4" in out
    assert (tmp_path / "log.txt").read_text() == straight
    assert (tmp_path / "previous_1" / path.name).is_file()


def test_resume_fails_if_all_checkpoints_are_damaged(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path, save_every=3)
    train(config)
    for path in list_checkpoints(tmp_path).values():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="can be read"):
        train(replace(config, resume="newest"))
    assert sorted(list_checkpoints(tmp_path)) == [3, 6]


def test_flags_win_over_the_optimizer_state_with_resume_anyway(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path, max_steps=3)
    train(config)
    train(replace(config, max_steps=4, weight_decay=0.7, beta2=0.5, resume_anyway=True))
    groups = load_checkpoint(tmp_path / "model_00004.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0]
    assert all(tuple(group["betas"]) == (0.9, 0.5) for group in groups)


def test_resume_removes_unfinished_files_of_a_killed_run(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path, save_every=2)
    train(config)
    (tmp_path / "model_00008.pt.0.tmp").write_bytes(b"half")
    with open(tmp_path / "log.txt", "a") as file:
        file.write("6 tr")
    train(replace(config, max_steps=8, resume="newest", resume_anyway=True))
    assert not list(tmp_path.glob("*.tmp"))
    assert list(read_log(tmp_path, "train")) == list(range(8))


TRAIN_WITH_SMALL_FILES_ONLY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a tiny checkpoint has 0.5 MB
sys.path.insert(0, sys.argv.pop(1))
from gpt2lab import cli
import train_gpt2
cli.run_main(train_gpt2.main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file-size limit")
def test_training_continues_if_a_checkpoint_cannot_be_written(data_dir, tmp_path):
    flags = tiny_flags(save_every=2, max_steps=8, keep_last=0, data_dir=data_dir, log_dir=tmp_path)
    train(tiny_config(data_dir, tmp_path, save_every=2, max_steps=8, keep_last=0))
    straight = (tmp_path / "log.txt").read_text()
    expected = torch.load(tmp_path / "model_00008.pt", weights_only=True)["model"]
    delete_checkpoints_after(tmp_path, 2)
    done = run_script("-c", TRAIN_WITH_SMALL_FILES_ONLY, ROOT, *flags, "--resume")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("is not saved, training goes on") == 3
    assert "File too large" in done.stdout and "the last checkpoint could not" in done.stderr
    assert list(list_checkpoints(tmp_path)) == [2] and not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "log.txt").read_text() == straight
    train(tiny_config(data_dir, tmp_path, save_every=2, max_steps=8, resume="newest"))
    resumed = torch.load(tmp_path / "model_00008.pt", weights_only=True)["model"]
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_was_killed_21_times_ends_with_the_same_weights(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path / "broken", max_steps=120, save_every=1, keep_last=2,
                         keep_every=0, eval_every=50, sample_every=0)
    straight, broken = run_jobs(tmp_path, [
        Job(replace(config, log_dir=str(tmp_path / "straight"), save_every=0)),
        Job(config, kills=21, killed_in_write=3)])
    assert straight.exit_codes == broken.exit_codes == [0]
    assert not list((tmp_path / "broken").glob("*.tmp"))
    expect_same_state(*(tmp_path / name / "model_00120.pt" for name in ("straight", "broken")))
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("straight", "broken")]
    assert logs[0] == logs[1]


# checkpoints made by others

# saves a checkpoint as build-nanogpt does; arguments: path, prefix of the names, file of weights
SAVE_LIKE_BUILD_NANOGPT = """
import sys, torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
path, prefix, weights = sys.argv[1:]
model = {prefix + name: tensor for name, tensor in torch.load(weights).items()}
model[prefix + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
config = GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=2, n_embd=8)
torch.save({"model": model, "config": config, "step": 19072, "val_loss": 3.05}, path)
"""


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_checkpoints_of_build_nanogpt_load(tmp_path, prefix):
    ours = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=8))
    torch.save(ours.state_dict(), tmp_path / "weights.pt")
    path = tmp_path / "model_19072.pt"
    done = run_script("-c", SAVE_LIKE_BUILD_NANOGPT, path, prefix, tmp_path / "weights.pt")
    assert done.returncode == 0, done.stderr
    model = GPT.from_pretrained(path)
    idx = torch.randint(50257, (2, 16))
    assert torch.equal(model(idx)[0], ours(idx)[0])
    assert (model.config.vocab_size, model.config.padded_vocab_size) == (50257, 50304)
    assert load_checkpoint(path)["step"] == 19072
    with pytest.raises(UserError, match="--init_from"):
        config = TrainConfig(resume=str(path), log_dir=str(tmp_path))
        resume(config, Ranks(torch.device("cpu")), model, None, None, "")


def test_code_in_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "config": MakesFolderWhenUnpickled()}, "model_00001.pt")
    (tmp_path / "model_00002.pt").write_bytes(pickle.dumps(MakesFolderWhenUnpickled()))
    for name in ("model_00001.pt", "model_00002.pt"):
        with pytest.raises(UserError, match="is not a checkpoint of"):
            load_checkpoint(name)
    assert not (tmp_path / "hacked").exists()


def test_a_checkpoint_holds_only_tensors_and_plain_values(log_dir):
    path = find_checkpoint(log_dir)
    checkpoint = torch.load(path, weights_only=True)  # refuses everything else
    assert checkpoint["step"] == 6
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in checkpoint["model"])
    model = GPT.from_pretrained(path)
    assert model.transformer.wte.weight is model.lm_head.weight
    assert all(torch.equal(p, checkpoint["model"][name]) for name, p in model.named_parameters())
    assert load(log_dir)[1].vocab_size == 300
    # weights and two moments are 12 bytes a parameter, if tied weights are stored once
    assert path.stat().st_size < 12 * sum(p.numel() for p in model.parameters()) + 60_000
    assert json.dumps(checkpoint["recipe"])


def test_the_newest_checkpoint_is_the_one_with_the_largest_number(tmp_path):
    for name in ("model_00900.pt", "model_100000.pt", "model_99999.pt", "model_200000.pt.tmp"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path).name == "model_100000.pt"
    assert find_checkpoint(tmp_path / "nowhere") is None
