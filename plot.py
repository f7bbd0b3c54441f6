"""
Draws the curves in log.txt: losses, accuracies, learning rate and gradient norm.

    python plot.py                           # log/ -> log/loss.png
    python plot.py log other_log --out both.png
"""

import gc
import io
import math
import os
from pathlib import Path

import numpy as np

from gpt2lab.cli import UserError, first_line, make_parser, run_main
from gpt2lab.files import check_output, write_output
from gpt2lab.runlog import read_log, read_run
from gpt2lab.tokenizer import GPT2_VOCAB_SIZE

# {stream: [(value, name)]} of published models, to compare with runs on FineWeb-EDU with the gpt2
# tokenizer. build-nanogpt measured the values of GPT-2, its loss on FineWeb-EDU's val shard. The
# accuracy of GPT-3 is from its paper
REFERENCES = {"val": [(3.2924, "OpenAI GPT-2 124M")],
              "hella": [(0.2955, "OpenAI GPT-2 124M"), (0.337, "GPT-3 124M")]}


# what else log.txt can hold is the accuracy of a task of --eval_tasks. bits_per_byte and wikitext
# are not drawn, because their scale is another one
STREAMS = {"train", "val", "val_ema", "bits_per_byte", "hella", "lr", "norm", "wikitext"}


def is_fineweb_edu(run):
    """Whether the losses of a run (its run.json) compare with those published for FineWeb-EDU."""
    # shards made by build-nanogpt do not name their source, but their folder is edu_fineweb10B
    sources = run.get("source") or [run.get("data_dir") or ""]
    return run.get("vocab_size") == GPT2_VOCAB_SIZE and all(
        "fineweb-edu" in s.lower() or "edu_fineweb" in s for s in sources)


def smooth(values):
    """
    Moving average over a window of a fiftieth of the values, as an array of the same length. At
    both ends, the window is cut off and the mean is over what is left of it. Values that are not
    finite are left out of the mean, which is NaN where no others are.
    """
    window = np.ones(max(len(values) // 50, 1))
    if len(values) < len(window) + 1:
        return np.array(values)
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0), window, "same")
    with np.errstate(invalid="ignore"):  # 0 / 0
        return sums / np.convolve(finite, window, "same")


def run_names(log_dirs):
    """A name for each run: its folder's, or its path if two folders have the same name."""
    names = [Path(log_dir).resolve().name for log_dir in log_dirs]
    if len(set(names)) < len(names):
        names = [str(log_dir) for log_dir in log_dirs]
    # matplotlib leaves out names that begin with "_", takes "$" for the beginning of a formula, and
    # cannot draw what is not UTF-8
    return [(" " if name.startswith("_") else "") + name.replace("$", r"\$").encode(
        "utf-8", "replace").decode("utf-8") for name in names]


def check_picture(figure, out):
    """(path, format) of the picture to write. Raises UserError if it cannot be written."""
    formats = sorted(figure.canvas.get_supported_filetypes())
    ending = Path(out).suffix[1:].lower()
    if ending not in formats:
        raise UserError(f"the name of the picture {out} does not end in a known format: end it in "
                        f"one of .{', .'.join(formats)}")
    return check_output(out), ending


def plot(log_dirs, out):
    """
    Draw the runs of one or more log folders over each other and save the picture as `out`. Raises
    UserError if matplotlib or a log is missing, or if `out` cannot be written.
    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook names a backend that may not be installed here
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need the package matplotlib: pip install matplotlib") from None
    # without pyplot, which would keep global state and might open a window
    figure = Figure(figsize=(12, 8), layout="constrained")
    out, picture_format = check_picture(figure, out)
    logs, runs = [read_log(d) for d in log_dirs], [read_run(d) for d in log_dirs]
    batch_sizes = {run.get("total_batch_size") for run in runs}  # tokens in an update
    # runs with different batch sizes are compared by tokens seen, because their steps differ
    over_tokens = len(batch_sizes) > 1 and None not in batch_sizes
    batch_size = next(iter(batch_sizes)) if len(batch_sizes) == 1 else None
    loss, hella, lr, norm = figure.subplots(2, 2, width_ratios=(3, 2)).flat
    panels = (hella, "hella"), (lr, "lr"), (norm, "norm")
    for i, (name, log, run) in enumerate(zip(run_names(log_dirs), logs, runs, strict=True)):
        scale = run["total_batch_size"] if over_tokens else 1
        style = dict(color=f"C{i}", label=name)
        draw_loss(loss, log, scale, style)
        for axes, stream in panels:
            steps, values = log.get(stream, ((), ()))
            values = smooth(values) if stream == "norm" else values
            axes.plot(np.multiply(steps, scale), values, line_or_dot(steps), **style)
        draw_tasks(hella, log, scale, style["color"])
    for axes, title in ((loss, "loss (nats a token)"), (hella, panel_title(logs)),
                        (lr, "learning rate"), (norm, "gradient norm (smoothed)")):
        axes.set_title(title)
        axes.grid(alpha=0.3)
        label_x_axis(axes, over_tokens, batch_size)
    for axes, _ in panels:
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.set_visible(False)  # an empty grid would look like a failure
    if all(is_fineweb_edu(run) for run in runs):
        draw_references({"val": loss, "hella": hella})
    loss.legend()
    write_picture(figure, out, picture_format)


def write_picture(figure, out, picture_format):
    """Write a figure. Raises UserError if a program is missing that the format needs."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=picture_format, dpi=100)
    except (RuntimeError, ImportError, ValueError) as error:
        raise UserError(f"{out} cannot be drawn ({first_line(error)}): choose .png") from error
    write_output(out, picture.getvalue())


def line_or_dot(steps):
    """The style of a curve: a line, or a dot for a single step, which a line would not show."""
    return "." if len(steps) == 1 else "-"


def draw_loss(axes, log, scale, style):
    """Draw the training loss, raw and smoothed, and the validation loss over step * scale."""
    steps, values = log.get("train", ((), ()))
    x = np.multiply(steps, scale)
    axes.plot(x, values, color=style["color"], alpha=0.15)
    axes.plot(x, smooth(values), line_or_dot(steps),
              **style | {"label": f"{style['label']}: train, smoothed"})
    losses = [value for value in values if math.isfinite(value)]
    for stream, marker, name in (("val", "o--", "val"), ("val_ema", "x:", "val, averaged weights")):
        val_steps, val_values = log.get(stream, ((), ()))
        if val_steps:
            axes.plot(np.multiply(val_steps, scale), val_values, marker, markersize=4,
                      color=style["color"],
                      label=f"{style['label']}: {name}, {val_values[-1]:.4f} at the end")
        losses += [value for value in val_values if math.isfinite(value)]
    if losses:  # the first steps have such high losses that they would flatten the rest: cut them
        axes.set_ylim(top=max(axes.get_ylim()[0], 2.2 * min(losses)))


def panel_title(logs):
    """The title of the panel of HellaSwag, which also shows the tasks of --eval_tasks."""
    if any(set(log) - STREAMS for log in logs):
        return "accuracy (HellaSwag, dashed: other tasks)"
    return "HellaSwag accuracy"


def draw_tasks(axes, log, scale, color):
    """Draw the accuracies of --eval_tasks as dashed lines with the names of the tasks."""
    for stream in sorted(set(log) - STREAMS):
        steps, values = log[stream]
        axes.plot(np.multiply(steps, scale), values, "--." if len(steps) == 1 else "--",
                  color=color)
        axes.annotate(stream, (steps[-1] * scale, values[-1]), ha="right", va="bottom", fontsize=8)


def label_x_axis(axes, over_tokens, batch_size):
    """
    Name the x axis, tokens or steps. If it shows the steps of runs with the same batch_size (tokens
    in an update), add a second axis at the top that shows tokens.
    """
    from matplotlib.ticker import EngFormatter
    axes.set_xlabel("tokens" if over_tokens else "step")
    if over_tokens:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2M, 10G
    if batch_size and not over_tokens:
        top = axes.secondary_xaxis(
            "top", functions=(lambda x: x * batch_size, lambda x: x / batch_size))
        top.set_xlabel("tokens")
        top.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_references(panels):
    """Draw dotted lines at the values of published models. panels: {stream: axes}."""
    for stream, axes in panels.items():
        for value, name in REFERENCES[stream]:
            axes.axhline(value, color="gray", linestyle=":")
            axes.annotate(f"{name}: {value:g}", (1, value), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8, color="gray")


def try_to_plot(log_dir, master_process=True):
    """
    Draw log_dir/loss.png during training, on the master only. An error becomes a warning, so that a
    plot never ends a run.
    """
    if not master_process:
        return
    try:
        plot([log_dir], Path(log_dir) / "loss.png")
    except Exception as error:
        print(f"warning: no plot of {log_dir}: {error}")
    # a figure contains reference cycles, and automatic collection is off during training
    gc.collect()


def parse_args():
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("log_dirs", nargs="*", default=["log"], metavar="LOGDIR",
                        help="log folders of the runs to draw (log)")
    parser.add_argument("--out", help="file of the picture (loss.png in the first folder)")
    return parser.parse_args()


def main():
    """Draw what the command line says, and print where the picture is."""
    args = parse_args()
    out = Path(args.log_dirs[0]) / "loss.png" if args.out is None else Path(args.out)
    plot(list(dict.fromkeys(args.log_dirs)), out)  # each folder once
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main(main, output_may_be_lost=True)
