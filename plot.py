"""
Draws the curves in log.txt: losses, HellaSwag accuracy, learning rate and gradient norm.

    python plot.py                           # log/ -> log/loss.png
    python plot.py log other_log --out both.png
"""

import gc
import math
from pathlib import Path

import numpy as np

from gpt2lab.cli import UserError, make_parser, run_main
from gpt2lab.runlog import read_log, read_run

# {stream: [(value, name)]} of published models, to compare with runs on FineWeb-EDU with the gpt2
# tokenizer. build-nanogpt measured the values of GPT-2, its loss on FineWeb-EDU's val shard. The
# accuracy of GPT-3 is from its paper
REFERENCES = {"val": [(3.2924, "OpenAI GPT-2 124M")],
              "hella": [(0.2955, "OpenAI GPT-2 124M"), (0.337, "GPT-3 124M")]}


def is_fineweb_edu(run):
    """Whether the losses of a run (its run.json) compare with those published for FineWeb-EDU."""
    # shards made by build-nanogpt do not name their source, but their folder is edu_fineweb10B
    sources = run.get("source") or [run.get("data_dir") or ""]
    return run.get("vocab_size") == 50257 and all(
        "fineweb-edu" in s.lower() or "edu_fineweb" in s for s in sources)


def smooth(values):
    """
    Moving average over a window of a fiftieth of the values, as an array of the same length. At
    both ends, the window is cut off and the mean is over what is left of it.
    """
    window = np.ones(max(len(values) // 50, 1))
    if len(values) < len(window) + 1:
        return np.array(values)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def plot(log_dirs, out):
    """
    Draw the runs of one or more log folders over each other and save the picture as `out`. Raises
    UserError for a folder without a log, or if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need the package matplotlib: pip install matplotlib") from None
    logs, runs = [read_log(d) for d in log_dirs], [read_run(d) for d in log_dirs]
    batch_sizes = {run.get("total_batch_size") for run in runs}  # tokens in an update
    # runs with different batch sizes are compared by tokens seen, because their steps differ
    over_tokens = len(batch_sizes) > 1 and None not in batch_sizes
    batch_size = next(iter(batch_sizes)) if len(batch_sizes) == 1 else None
    # without pyplot, which would keep global state and might open a window
    figure = Figure(figsize=(12, 8), layout="constrained")
    loss, hella, lr, norm = figure.subplots(2, 2, width_ratios=(3, 2)).flat
    panels = (hella, "hella"), (lr, "lr"), (norm, "norm")
    for i, (log_dir, log, run) in enumerate(zip(log_dirs, logs, runs, strict=True)):
        scale = run["total_batch_size"] if over_tokens else 1
        style = dict(color=f"C{i}", label=Path(log_dir).resolve().name)
        draw_loss(loss, log, scale, style)
        for axes, stream in panels:
            steps, values = log.get(stream, ((), ()))
            values = smooth(values) if stream == "norm" else values
            line_or_dot = "." if len(steps) == 1 else "-"  # a line of one point would be invisible
            axes.plot(np.multiply(steps, scale), values, line_or_dot, **style)
    for axes, title in ((loss, "loss (nats a token)"), (hella, "HellaSwag accuracy"),
                        (lr, "learning rate"), (norm, "gradient norm (smoothed)")):
        axes.set_title(title)
        axes.grid(alpha=0.3)
        label_x_axis(axes, over_tokens, batch_size)
    for axes, stream in panels:
        if not any(stream in log for log in logs):
            axes.set_axis_off()  # an empty grid would look like a failure
    if all(is_fineweb_edu(run) for run in runs):
        draw_references({"val": loss, "hella": hella})
    loss.legend()
    figure.savefig(out, dpi=100)


def draw_loss(axes, log, scale, style):
    """Draw the training loss, raw and smoothed, and the validation loss over step * scale."""
    steps, values = log.get("train", ((), ()))
    x = np.multiply(steps, scale)
    axes.plot(x, values, color=style["color"], alpha=0.15)
    axes.plot(x, smooth(values), **style | {"label": f"{style['label']}: train, smoothed"})
    val_steps, val_values = log.get("val", ((), ()))
    if val_steps:
        axes.plot(np.multiply(val_steps, scale), val_values, "o--", markersize=4,
                  color=style["color"],
                  label=f"{style['label']}: val, {val_values[-1]:.4f} at the end")
    losses = [value for value in (*values, *val_values) if math.isfinite(value)]
    if losses:  # the first steps have such high losses that they would flatten the rest: cut them
        axes.set_ylim(top=max(axes.get_ylim()[0], 2.2 * min(losses)))


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
    out = Path(args.out or Path(args.log_dirs[0]) / "loss.png")
    plot(args.log_dirs, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main(main)
