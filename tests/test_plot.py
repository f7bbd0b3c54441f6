"""Logs: log.txt, run.json, TensorBoard and wandb, and the picture that plot.py draws."""

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

PNG = b"\x89PNG"  # the first bytes of a PNG file


@pytest.fixture
def figures(monkeypatch):
    """A list to which each figure that plot.py saves is added; the file is still written."""
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    saved, savefig = [], matplotlib_figure.Figure.savefig

    def save_and_record(self, out, **kwargs):
        saved.append(self)
        savefig(self, out, **kwargs)

    monkeypatch.setattr(matplotlib_figure.Figure, "savefig", save_and_record)
    return saved


def write_run(folder, steps=40, total_batch_size=512, **run):
    """
    Make a log folder as a run of `steps` updates leaves it, and return it. run.json holds
    total_batch_size and `run`; there is none if total_batch_size is None.
    """
    folder.mkdir()
    with open(folder / "log.txt", "w", encoding="utf-8") as file:
        for step in range(steps):
            file.write(f"{step} train {10 - 6 * step / steps:.6g}\n{step} lr 0.001\n"
                       f"{step} norm 1.5\n")
        for step in range(0, steps + 1, 20):
            file.write(f"{step} val {9 - step / 10}\n{step} hella 0.25\n")
    if total_batch_size:
        run_json = dict(total_batch_size=total_batch_size) | run
        (folder / "run.json").write_text(json.dumps(run_json))
    return folder


FINEWEB_EDU = dict(vocab_size=50257, source=["HuggingFaceFW/fineweb-edu"],
                   data_dir="edu_fineweb10B")


def drawn_text(axes):
    """All annotations and legend entries of a panel as one string."""
    texts = list(axes.texts)
    if axes.get_legend():
        texts += axes.get_legend().get_texts()
    return " ".join(text.get_text() for text in texts)


def line_data(axes, label):
    """(x, y) of the one line in a panel whose label starts with `label`."""
    [line] = [line for line in axes.lines if line.get_label().startswith(label)]
    return line.get_xdata(), line.get_ydata()


def test_the_picture_shows_all_curves_of_a_run(figures, tmp_path, call_main):
    folder = write_run(tmp_path / "mine", source=["book.txt"], vocab_size=1536)
    code, out, _ = call_main(plot, folder)
    assert code == 0 and f"wrote {folder / 'loss.png'}" in out
    assert (folder / "loss.png").read_bytes().startswith(PNG)
    loss, hella, lr, norm = figures[0].axes
    assert line_data(loss, "mine: val, 5.0000")[1].tolist() == [9, 7, 5]
    steps, smoothed = line_data(loss, "mine: train, smoothed")
    assert steps.tolist() == list(range(40)) and smoothed[20] == pytest.approx(7, abs=0.2)
    assert line_data(hella, "mine")[1].tolist() == [0.25] * 3
    assert set(line_data(lr, "mine")[1]) == {0.001} and set(line_data(norm, "mine")[1]) == {1.5}
    [top_axis] = loss.child_axes  # shows tokens
    assert top_axis.get_xlabel() == "tokens" and top_axis._functions[0](40) == 40 * 512
    # losses of published models do not compare with a run on other data
    assert "GPT" not in drawn_text(loss) + drawn_text(hella)


@pytest.mark.parametrize("run, compares", [
    (FINEWEB_EDU, True), (FINEWEB_EDU | {"source": None}, True),  # None: made by build-nanogpt
    (FINEWEB_EDU | {"source": ["a.txt"]}, False), (FINEWEB_EDU | {"vocab_size": 8192}, False)])
def test_published_values_are_drawn_only_for_fineweb_edu(figures, tmp_path, run, compares):
    plot.plot([write_run(tmp_path / "log", **run)], tmp_path / "a.png")
    loss, hella, *_ = figures[0].axes
    assert ("OpenAI GPT-2 124M: 3.2924" in drawn_text(loss)) == compares
    assert ("GPT-3 124M: 0.337" in drawn_text(hella)) == compares
    assert ("OpenAI GPT-2 124M: 0.2955" in drawn_text(hella)) == compares


def test_runs_with_different_batch_sizes_are_drawn_over_tokens(figures, tmp_path):
    folders = [write_run(tmp_path / "small", 40, 512), write_run(tmp_path / "large", 20, 1024)]
    plot.plot(folders, tmp_path / "both.png")
    loss = figures[0].axes[0]
    assert loss.get_xlabel() == "tokens"
    for label in ("small: val", "large: val"):
        assert line_data(loss, label)[0].max() == 20_480
    folders.append(write_run(tmp_path / "unknown", total_batch_size=None))
    plot.plot(folders, tmp_path / "three.png")
    assert figures[1].axes[0].get_xlabel() == "step" and not figures[1].axes[0].child_axes


@pytest.mark.parametrize("end", ["39 tr", "40 train 3.", "40 train", "\0\0", "40 val nan\n", "x\n"])
def test_a_log_with_a_damaged_last_line_is_drawn(figures, tmp_path, end):
    folder = write_run(tmp_path / "log")
    with open(folder / "log.txt", "a") as file:
        file.write(end)
    plot.plot([folder], tmp_path / "a.png")
    assert len(line_data(figures[0].axes[0], "log: train")[0]) == 40


def test_a_step_that_was_logged_twice_counts_once(tmp_path):
    (tmp_path / "log.txt").write_text("0 train 5\n1 train 4\n1 train 3\n2 train 2\n")
    assert runlog.read_log(tmp_path) == {"train": ([0, 1, 2], [5, 3, 2])}


def test_smoothing_keeps_length_and_mean():
    values = np.sin(np.arange(500.0))
    assert plot.smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    assert len(plot.smooth(values)) == 500 and plot.smooth(values)[100:400].std() < values.std() / 3
    assert plot.smooth([]).tolist() == [] and plot.smooth([3.0]).tolist() == [3]


@pytest.mark.parametrize("values", [["nan"], ["inf", "-inf"], ["nan", "3", "inf"]])
def test_values_that_are_not_finite_are_left_out(figures, tmp_path, values):
    (tmp_path / "log.txt").write_text("".join(
        f"{i} {stream} {values[i % len(values)]}\n" for i in range(300)
        for stream in ("train", "val", "norm", "lr", "hella")))
    plot.plot([tmp_path], tmp_path / "a.png")
    _, smoothed = line_data(figures[0].axes[0], f"{tmp_path.name}: train, smoothed")
    if "3" in values:  # a NaN does not spread over the window around it
        assert smoothed[10:-10].tolist() == [3] * 280
    else:
        assert np.isnan(smoothed).all()


def test_only_accuracies_are_drawn_as_accuracies(figures, tmp_path):
    """Guards against losses in the panel of accuracies, and against an empty panel with an axis."""
    losses = "0 train 3\n0 lr 1e-3\n0 norm 1\n0 val 3\n0 bits_per_byte 2\n0 val_ema 2.5\n"
    for name, more in (("without", ""), ("with", "0 piqa 0.5\n")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "log.txt").write_text(losses + more)
        plot.plot([folder], tmp_path / f"{name}.png")
    assert not figures[0].axes[1].get_visible() and figures[1].axes[1].get_visible()
    drawn = [value for line in figures[1].axes[1].lines for value in line.get_ydata()]
    assert drawn == [0.5]
    assert line_data(figures[0].axes[0], "without: val, averaged weights, 2.5000")[1] == [2.5]


def test_a_run_of_one_step_shows_dots(figures, tmp_path):
    (tmp_path / "log.txt").write_text("0 train 3\n0 lr 1e-3\n0 norm 1\n")
    plot.plot([tmp_path], tmp_path / "a.png")
    loss, _, lr, norm = figures[0].axes
    assert [axes.lines[-1].get_marker() for axes in (loss, lr, norm)] == [".", ".", "."]


@pytest.mark.parametrize("names, labels", [
    (("a/log", "b/log"), ["a/log", "b/log"]), (("a/log", "a/log"), ["log"]),
    (("_a", "b"), [" _a", "b"]), (("$x$", r"a$\b$"), [r"\$x\$", r"a\$\b\$"]),
    (("a\udce9",), ["a?"])])
def test_every_run_has_a_legible_name_of_its_own(figures, tmp_path, monkeypatch, call_main, names,
                                                 labels):
    monkeypatch.chdir(tmp_path)
    for name in set(names):
        Path(name).parent.mkdir(exist_ok=True)
        write_run(Path(name), steps=20)
    code, _, err = call_main(plot, *names, "--out", "x.png")
    assert code == 0, err
    legend = figures[0].axes[0].get_legend().get_texts()
    assert [text.get_text().partition(": train")[0] for text in legend[::2]] == labels


@pytest.mark.parametrize("out, message", [
    ("no/a.png", "make its folder"), ("folder.png", "is a folder"), ("a.xyz", "known format: end"),
    ("a", ".png"), (".png", "known format")])
def test_a_picture_that_cannot_be_written_is_refused(
        call_main, tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "log")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(plot, "read_log", lambda folder: pytest.fail("begins to work"))
    code, _, err = call_main(plot, folder, "--out", out)
    assert code == 2 and message in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png", "log"]


def test_the_backend_of_a_notebook_does_not_matter(tmp_path):
    """Guards against MPLBACKEND, which Colab sets to a backend that other Pythons lack."""
    write_run(tmp_path / "log")
    done = run_script(ROOT / "plot.py", cwd=tmp_path, env={"MPLBACKEND": "module://no_such_module"})
    assert done.returncode == 0, done.stderr


def test_a_folder_without_a_log_is_an_error_of_one_line(call_main, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.txt").write_text("12 tra")
    for folder, message in ((tmp_path, "no log.txt"), (tmp_path / "empty", "holds no line")):
        code, _, err = call_main(plot, folder)
        assert code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))


def test_missing_matplotlib_is_an_error_of_plot_py_but_a_warning_of_training(
        call_main, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write_run(tmp_path / "log")
    code, _, err = call_main(plot, folder)
    assert code == 2 and "pip install matplotlib" in err and err.count("\n") == 1
    plot.try_to_plot(folder)  # what training calls
    assert capsys.readouterr().out.startswith("warning: ")


def test_plotting_imports_neither_torch_nor_pyplot(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "log")
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['plot.py']; import plot; "
            "plot.main(); "
            "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules")
    done = run_script("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log" / "loss.png").read_bytes().startswith(PNG)


# the logger


def log_three_steps(config, start_step=0, **flags):
    """Log steps as a run does that starts from scratch, or resumes at `start_step`."""
    resumed_from = Path(config.log_dir) / "model_00002.pt" if start_step else None
    if resumed_from:
        resumed_from.touch()
    log = open_logger(replace(config, **flags), start_step, resumed_from)
    for step in range(start_step, start_step + 3):
        log(step, val=3.0 + step)
        log(step, train=2.5, lr=1e-4)


def test_log_txt_and_run_json_of_a_run_and_its_resume(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path / "log")
    log_three_steps(config)
    assert (tmp_path / "log" / "log.txt").read_text().splitlines()[:3] == [
        "0 val 3", "0 train 2.5", "0 lr 0.0001"]
    run = runlog.read_run(tmp_path / "log")
    assert run["total_batch_size"] == 256 and run["vocab_size"] == 300
    assert [name.endswith("corpus.txt") for name in run["source"]] == [True]
    log_three_steps(config, start_step=2)  # replaces the lines of step 2
    assert read_log(tmp_path / "log", "val") == {0: 3, 1: 4, 2: 5, 3: 6, 4: 7}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file-size limit")
def test_lines_that_a_full_disk_has_no_room_for_are_written_later(data_dir, tmp_path, capsys):
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


def test_all_files_of_an_earlier_run_are_moved_to_previous_1(data_dir, tmp_path):
    config = tiny_config(data_dir, tmp_path)
    log_three_steps(config)
    (tmp_path / "loss.png").write_bytes(PNG)
    (tmp_path / "tensorboard").mkdir()
    log_three_steps(config)
    names = ["log.txt", "loss.png", "run.json", "tensorboard"]
    assert sorted(p.name for p in (tmp_path / "previous_1").iterdir()) == names
    left = {p.name for p in tmp_path.iterdir()} - {"run.lock"}
    assert left == {"log.txt", "previous_1", "run.json"}


def install_fake_wandb(monkeypatch, init):
    """Make `import wandb` give a module with the function `init` alone."""
    wandb = types.ModuleType("wandb")
    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)


def test_wandb_gets_the_values_of_log_txt(data_dir, tmp_path, monkeypatch):
    init_arguments, logged = {}, []

    def init(**arguments):
        init_arguments.update(arguments)
        return types.SimpleNamespace(log=lambda values, step: logged.append((step, values)))

    install_fake_wandb(monkeypatch, init)
    log_three_steps(tiny_config(data_dir, tmp_path / "mine"), wandb="gpt2")
    assert (init_arguments["project"], init_arguments["name"]) == ("gpt2", "mine")
    assert init_arguments["config"]["total_batch_size"] == 256
    assert logged[:2] == [(0, {"val": 3.0}), (0, {"train": 2.5, "lr": 1e-4})]
    assert len(logged) == 6


def test_wandb_fails_before_anything_is_written(data_dir, tmp_path, monkeypatch):
    config = tiny_config(data_dir, tmp_path / "log")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        open_logger(replace(config, wandb="gpt2"))
    install_fake_wandb(monkeypatch, lambda **arguments: 1 / 0)
    with pytest.raises(UserError, match="wandb login"):
        open_logger(replace(config, wandb="gpt2"))
    assert not (tmp_path / "log").exists()


def test_a_missing_tensorboard_is_noticed_before_anything_is_written(
        data_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        open_logger(tiny_config(data_dir, tmp_path / "log", tensorboard=True))
    assert not (tmp_path / "log").exists()


def test_tensorboard_gets_the_values_of_log_txt(data_dir, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_three_steps(tiny_config(data_dir, tmp_path / "log"), tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "log" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("val")] == [(0, 3), (1, 4), (2, 5)]
    assert sorted(events.Tags()["scalars"]) == ["lr", "train", "val"]
