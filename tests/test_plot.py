"""Logs: what a run writes, to whom, and the picture that plot.py makes of it."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_log, run_script, tiny_config

import plot
from gpt2lab import runlog
from gpt2lab.cli import UserError
from gpt2lab.runlog import open_logger

PNG = b"\x89PNG"


@pytest.fixture
def figures(monkeypatch):
    """The figures that plot.py draws; each is still written to its file."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn, savefig = [], figure.Figure.savefig

    def save(self, out, **kwargs):
        drawn.append(self)
        savefig(self, out, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", save)
    return drawn


def write_run(folder, steps=40, batch=512, **run):
    """A log folder as a run of `steps` updates leaves it; run.json only where `batch` is given."""
    folder.mkdir()
    with open(folder / "log.txt", "w", encoding="utf-8") as file:
        for step in range(steps):
            file.write(f"{step} train {10 - 6 * step / steps:.6g}\n{step} lr 0.001\n"
                       f"{step} norm 1.5\n")
        for step in range(0, steps + 1, 20):
            file.write(f"{step} val {9 - step / 10}\n{step} hella 0.25\n")
    if batch:
        (folder / "run.json").write_text(json.dumps(dict(total_batch_size=batch) | run))
    return folder


EDU = dict(vocab_size=50257, source=["HuggingFaceFW/fineweb-edu"], data_dir="edu_fineweb10B")


def texts(axes):
    return " ".join(text.get_text() for text in [*axes.texts, *axes.get_legend().get_texts()]
                    ) if axes.get_legend() else " ".join(text.get_text() for text in axes.texts)


def line(axes, label):
    [found] = [ln for ln in axes.lines if ln.get_label().startswith(label)]
    return found.get_xdata(), found.get_ydata()


def test_a_run_as_a_picture(figures, tmp_path, call):
    folder = write_run(tmp_path / "mine", source=["book.txt"], vocab_size=1536)
    code, out, _ = call(plot, folder)
    assert code == 0 and f"wrote {folder / 'loss.png'}" in out
    assert (folder / "loss.png").read_bytes().startswith(PNG)
    loss, hella, lr, norm = figures[0].axes
    assert line(loss, "mine: val, 5.0000")[1].tolist() == [9, 7, 5]
    steps, smoothed = line(loss, "mine: train, smoothed")
    assert steps.tolist() == list(range(40)) and smoothed[20] == pytest.approx(7, abs=0.2)
    assert line(hella, "mine")[1].tolist() == [0.25] * 3
    assert set(line(lr, "mine")[1]) == {0.001} and set(line(norm, "mine")[1]) == {1.5}
    [above] = loss.child_axes  # tokens
    assert above.get_xlabel() == "tokens" and above._functions[0](40) == 40 * 512
    assert "GPT" not in texts(loss) + texts(hella)  # figures of other data say nothing here


@pytest.mark.parametrize("run, drawn", [
    (EDU, True), (EDU | {"source": None}, True),  # made by build-nanogpt
    (EDU | {"source": ["a.txt"]}, False), (EDU | {"vocab_size": 8192}, False)])
def test_published_figures_beside_fineweb_edu_only(figures, tmp_path, run, drawn):
    plot.plot([write_run(tmp_path / "log", **run)], tmp_path / "a.png")
    loss, hella, *_ = figures[0].axes
    assert ("OpenAI GPT-2 124M: 3.2924" in texts(loss)) == drawn
    assert ("GPT-3 124M: 0.337" in texts(hella)) == drawn
    assert ("OpenAI GPT-2 124M: 0.2955" in texts(hella)) == drawn


def test_runs_of_different_batch_sizes_meet_on_tokens(figures, tmp_path):
    folders = [write_run(tmp_path / "small", 40, 512), write_run(tmp_path / "large", 20, 1024)]
    plot.plot(folders, tmp_path / "both.png")
    loss = figures[0].axes[0]
    assert loss.get_xlabel() == "tokens"
    assert line(loss, "small: val")[0].max() == line(loss, "large: val")[0].max() == 20_480
    folders.append(write_run(tmp_path / "unknown", batch=None))
    plot.plot(folders, tmp_path / "three.png")
    assert figures[1].axes[0].get_xlabel() == "step" and not figures[1].axes[0].child_axes


@pytest.mark.parametrize("end", ["39 tr", "40 train 3.", "40 train", "\0\0", "40 val nan\n", "x\n"])
def test_a_killed_run_is_drawn(figures, tmp_path, end):
    folder = write_run(tmp_path / "log")
    with open(folder / "log.txt", "a") as file:
        file.write(end)
    plot.plot([folder], tmp_path / "a.png")
    assert len(line(figures[0].axes[0], "log: train")[0]) == 40


def test_steps_done_twice_count_once(tmp_path):
    (tmp_path / "log.txt").write_text("0 train 5\n1 train 4\n1 train 3\n2 train 2\n")
    assert runlog.read_log(tmp_path) == {"train": ([0, 1, 2], [5, 3, 2])}


def test_smoothing_keeps_length_and_mean():
    values = np.sin(np.arange(500.0))
    assert plot.smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    assert len(plot.smooth(values)) == 500 and plot.smooth(values)[100:400].std() < values.std() / 3
    assert plot.smooth([]).tolist() == [] and plot.smooth([3.0]).tolist() == [3]


def test_nothing_to_draw_costs_one_line(call, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.txt").write_text("12 tra")
    for folder, message in ((tmp_path, "no log.txt"), (tmp_path / "empty", "holds no line")):
        code, _, err = call(plot, folder)
        assert code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))


def test_without_matplotlib(call, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write_run(tmp_path / "log")
    code, _, err = call(plot, folder)
    assert code == 2 and "pip install matplotlib" in err and err.count("\n") == 1
    plot.try_to_plot(folder)  # as a run does: it goes on
    assert capsys.readouterr().out.startswith("warning: ")


def test_as_a_process_without_torch(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "log")
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['plot.py']; import plot; "
            "plot.main(); "
            "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules")
    done = run_script("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log" / "loss.png").read_bytes().startswith(PNG)


# the logger


def log_some(config, start_step=0, **flags):
    resumed_from = Path(config.log_dir) / "model_00002.pt" if start_step else None
    log = open_logger(replace(config, **flags), start_step, resumed_from)
    for step in range(start_step, start_step + 3):
        log(step, val=3.0 + step)
        log(step, train=2.5, lr=1e-4)


def test_log_txt_and_run_json(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path / "log")
    log_some(config)
    assert (tmp_path / "log" / "log.txt").read_text().splitlines()[:3] == [
        "0 val 3", "0 train 2.5", "0 lr 0.0001"]
    run = runlog.read_run(tmp_path / "log")
    assert run["total_batch_size"] == 256 and run["vocab_size"] == 300
    assert [name.endswith("corpus.txt") for name in run["source"]] == [True]
    log_some(config, start_step=2)  # resumed: the lines from there on are written anew
    assert read_log(tmp_path / "log", "val") == {0: 3, 1: 4, 2: 5, 3: 6, 4: 7}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file-size limit")
def test_log_txt_waits_for_room_on_a_full_disk(data_dir, tmp_path, capsys):
    import resource
    log = open_logger(tiny_config(data_dir, tmp_path))
    log(0, train=2.5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        for step in (1, 2, 3):
            log(step, train=2.5, lr=1e-4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().out.count("waits until there is room") == 1
    assert (tmp_path / "log.txt").read_text() == "0 train 2.5\n"
    log(4, train=2.5)
    assert list(read_log(tmp_path, "train")) == [0, 1, 2, 3, 4]
    assert list(read_log(tmp_path, "lr")) == [1, 2, 3]


def test_an_earlier_run_is_set_aside_whole(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path)
    log_some(config)
    (tmp_path / "loss.png").write_bytes(PNG)
    (tmp_path / "tensorboard").mkdir()
    log_some(config)
    names = ["log.txt", "loss.png", "run.json", "tensorboard"]
    assert sorted(p.name for p in (tmp_path / "previous_1").iterdir()) == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "previous_1", "run.json"]


def test_wandb_gets_the_same_scalars(data_dir, tmp_path, monkeypatch):
    got = []
    run = types.SimpleNamespace(log=lambda values, step: got.append((step, values)))
    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: got.append(kwargs) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log_some(tiny_config(data_dir, tmp_path / "mine"), wandb="gpt2")
    start, *values = got
    assert (start["project"], start["name"]) == ("gpt2", "mine")
    assert start["config"]["total_batch_size"] == 256
    assert values[:2] == [(0, {"val": 3.0}), (0, {"train": 2.5, "lr": 1e-4})] and len(values) == 6


def test_wandb_refuses_before_anything_is_written(data_dir, tmp_path, monkeypatch):
    config = tiny_config(data_dir, tmp_path / "log")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        open_logger(replace(config, wandb="gpt2"))
    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match="wandb login"):
        open_logger(replace(config, wandb="gpt2"))
    assert not (tmp_path / "log").exists()


def test_tensorboard_is_missing(data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        open_logger(tiny_config(data_dir, tmp_path / "log", tensorboard=True))
    assert not (tmp_path / "log").exists()


def test_tensorboard_gets_the_same_scalars(data_dir, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_some(tiny_config(data_dir, tmp_path / "log"), tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "log" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("val")] == [(0, 3), (1, 4), (2, 5)]
    assert sorted(events.Tags()["scalars"]) == ["lr", "train", "val"]
