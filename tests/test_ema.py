"""--ema: the moving average of the weights in training, in checkpoints and in the scripts."""

import importlib
import os
import re
import shutil

import pytest
import torch
from conftest import plain_model, read_log, run_jobs, tiny_config
from forked import Job

import export_hf
from gpt2lab import preflight
from gpt2lab.checkpoints import find_checkpoint, list_checkpoints, load_checkpoint
from gpt2lab.cli import UserError
from train_gpt2 import GPT, GPTConfig, train

DECAY = 0.8


def ema_config(data_dir, log_dir, **changes):
    """A tiny TrainConfig that averages the weights and saves after each update."""
    return tiny_config(data_dir, log_dir, **(dict(
        ema=DECAY, max_lr=1e-2, save_every=1, keep_last=0, eval_every=3, sample_every=0) | changes))


@pytest.fixture(scope="module")
def averaged_run(data_dir, tmp_path_factory):
    """The log folder of a run with --ema."""
    folder = tmp_path_factory.mktemp("averaged")
    train(ema_config(data_dir, folder))
    return folder


def weights_of(path, part):
    return load_checkpoint(path)[part]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_average_is_that_of_the_weights_after_each_update(data_dir, tmp_path, optimizer):
    train(ema_config(data_dir, tmp_path, optimizer=optimizer, max_steps=12))
    paths = list_checkpoints(tmp_path)
    average = None  # the slow way, from the checkpoints
    for step in range(1, 13):
        weights = weights_of(paths[step], "model")
        if average is None:
            # the first update counts nine times as much as the random weights before it
            decay, average = 0.1, first_average(weights_of(paths[1], "ema"), weights)
        else:
            decay = min(DECAY, step / (9 + step))
            average = {name: decay * average[name] + (1 - decay) * w for name, w in weights.items()}
        for name, value in weights_of(paths[step], "ema").items():
            assert torch.allclose(value, average[name], atol=1e-6), (step, name)
    assert decay == 12 / 21  # DECAY itself is reached after 36 updates
    assert weights_of(paths[12], "ema").keys() == weights.keys()


def first_average(average, weights):
    """The average after one update, checked to lie near the weights."""
    distance = max((average[name] - w).abs().max() for name, w in weights.items())
    assert 0 < distance < 1e-2
    return average


def test_an_average_reaches_its_decay_after_some_updates():
    from gpt2lab.optim import update_average
    average, model = plain_model(0), plain_model(1)
    start = [p.detach().clone() for p in average.parameters()]
    update_average(average, model, DECAY, step=1_000)
    for p, before, target in zip(average.parameters(), start, model.parameters(), strict=True):
        assert torch.allclose(p, DECAY * before + (1 - DECAY) * target, atol=1e-7)


def test_training_is_the_same_with_an_average(data_dir, tmp_path, averaged_run):
    train(ema_config(data_dir, tmp_path, ema=0.0))
    for stream in ("train", "val", "norm"):
        assert read_log(tmp_path, stream) == read_log(averaged_run, stream)
    assert not read_log(tmp_path, "val_ema")
    assert "ema" not in load_checkpoint(find_checkpoint(tmp_path))
    losses = read_log(averaged_run, "val"), read_log(averaged_run, "val_ema")
    assert losses[0].keys() == losses[1].keys() == {0, 3, 6}
    assert losses[0][0] == losses[1][0] and losses[0][6] != losses[1][6]


def test_check_expects_the_memory_and_disk_that_an_average_takes(data_dir, tmp_path, averaged_run):
    train(ema_config(data_dir, tmp_path, ema=0.0, max_steps=1))
    with_average, without = find_checkpoint(averaged_run), find_checkpoint(tmp_path)
    model_config = GPTConfig(**load_checkpoint(without)["model_config"])
    expected = [preflight.estimate_memory(model_config, ema_config(data_dir, tmp_path, ema=ema),
                                          torch.device("cpu"), torch.float32, 1)
                for ema in (DECAY, 0.0)]
    memory, disk = (a - b for a, b in zip(*expected, strict=True))
    assert memory == disk == pytest.approx(
        with_average.stat().st_size - without.stat().st_size, rel=0.1)


def test_a_resumed_run_averages_as_a_straight_one(data_dir, tmp_path, averaged_run):
    shutil.copytree(averaged_run, tmp_path, dirs_exist_ok=True)
    for step in (4, 5, 6):
        (tmp_path / f"model_{step:05d}.pt").unlink()
    train(ema_config(data_dir, tmp_path, resume="newest"))
    assert (tmp_path / "log.txt").read_text() == (averaged_run / "log.txt").read_text()
    a, b = (weights_of(find_checkpoint(folder), "ema") for folder in (tmp_path, averaged_run))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_another_decay_is_refused_on_resume_and_a_new_average_begins_with_the_weights(
        data_dir, tmp_path, averaged_run):
    path = averaged_run / "model_00003.pt"
    with pytest.raises(UserError, match="ema"):
        train(ema_config(data_dir, tmp_path, ema=0.5, resume=str(path)))
    train(ema_config(data_dir, tmp_path / "without", ema=0.0, resume=str(path), resume_anyway=True))
    middle = tmp_path / "without" / "model_00005.pt"
    assert "ema" not in load_checkpoint(middle)
    config = ema_config(data_dir, tmp_path / "again", resume=str(middle), resume_anyway=True)
    train(config)
    before, last = weights_of(middle, "model"), load_checkpoint(tmp_path / "again/model_00006.pt")
    decay = 6 / 15
    for name, w in last["model"].items():
        assert torch.allclose(last["ema"][name], decay * before[name] + (1 - decay) * w, atol=1e-7)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_with_fsdp_a_new_average_begins_with_the_weights(data_dir, tmp_path):
    """Guards against ranks that have no weights to begin with: only the master reads the file."""
    train(ema_config(data_dir, tmp_path / "without", ema=0.0, max_steps=5, warmup_steps=6))
    before = tmp_path / "without" / "model_00005.pt"
    [result] = run_jobs(tmp_path, [Job(ema_config(
        data_dir, tmp_path, B=2, warmup_steps=6, fsdp=True, resume=str(before),
        resume_anyway=True), world_size=2)])
    assert result.exit_codes == [0, 0]
    after = load_checkpoint(tmp_path / "model_00006.pt")
    for name, weights in weights_of(before, "model").items():
        expected = 6 / 15 * weights + 9 / 15 * after["model"][name]
        assert torch.allclose(after["ema"][name], expected, atol=1e-6), name


def test_the_scripts_take_the_average_if_asked(
        averaged_run, tmp_path, hellaswag_examples, call_main):
    checkpoint = load_checkpoint(find_checkpoint(averaged_run))
    for ema, part in ((False, "model"), (True, "ema")):
        weights = GPT.from_pretrained(averaged_run, ema).state_dict()
        assert all(torch.equal(weights[name], value) for name, value in checkpoint[part].items())
    folder = export_hf.export(averaged_run, tmp_path / "exported", ema=True)
    exported = GPT.from_pretrained(folder).state_dict()
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(exported[name], checkpoint["ema"][name])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "moving average" in card and f"{read_log(averaged_run, 'val_ema')[6]:.4f}" in card
    # the other scripts compute the same as with the exported average, and not as without it
    data, commands = tmp_path / "text.txt", {
        "sample": ["--prompt", "The", "--max_new_tokens", "20", "--num_samples", "3"],
        "hellaswag": [], "evaluate": ["--data", str(tmp_path / "text.txt")]}
    data.write_text("The statement is executed when the expression is true.\n" * 20)
    for script, flags in commands.items():
        results = []
        for model, ema in ((averaged_run, ["--ema"]), (folder, []), (averaged_run, [])):
            out = tmp_path / f"{script}_{len(results)}.json"
            assert call_main(importlib.import_module(script), "--model", str(model),
                             "--device", "cpu", "--out", str(out), *flags, *ema)[0] == 0
            results.append(re.sub(r'"(model|parameters|seconds)": [^,]*,', "", out.read_text()))
        assert results[0] == results[1] != results[2], script


@pytest.mark.parametrize("damage", ["other shape", "a name missing", "not a dict", "none at all"])
def test_a_damaged_average_is_refused_and_resume_takes_the_checkpoint_before(
        data_dir, tmp_path, averaged_run, capsys, damage):
    shutil.copytree(averaged_run, tmp_path, dirs_exist_ok=True)
    path, name = tmp_path / "model_00006.pt", "transformer.ln_f.bias"
    checkpoint = torch.load(path, weights_only=True)
    if damage == "other shape":
        checkpoint["ema"][name] = torch.zeros(3)
    elif damage == "a name missing":
        del checkpoint["ema"][name]
    elif damage == "not a dict":
        checkpoint["ema"] = [1.0]
    else:
        del checkpoint["ema"]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"ema|average"):
        export_hf.export(path, tmp_path / "exported", ema=True)
    assert not (tmp_path / "exported").exists()
    train(ema_config(data_dir, tmp_path, resume="newest"))
    assert "trying the checkpoint before it" in capsys.readouterr().out
    a, b = (weights_of(folder / "model_00006.pt", "ema") for folder in (tmp_path, averaged_run))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_source_without_an_average_is_refused(call_main, tmp_path, data_dir):
    train(ema_config(data_dir, tmp_path / "run", ema=0.0, max_steps=1))
    plain = export_hf.export(tmp_path / "run", tmp_path / "exported")
    (tmp_path / "text.txt").write_text("Some words.")
    for source in (tmp_path / "run", plain):
        for script, flags in (("sample", []), ("evaluate", ["--data", str(tmp_path / "text.txt")]),
                              ("export_hf", None)):
            arguments = ([str(source), str(tmp_path / "other"), "--ema"] if flags is None else
                         ["--model", str(source), "--ema", "--device", "cpu", *flags])
            code, _, error = call_main(importlib.import_module(script), *arguments)
            assert code == 2 and error.count("\n") == 1
            assert "holds no average of the weights: leave out --ema" in error
        assert not (tmp_path / "other").exists()
