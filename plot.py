"""
Draws what log.txt holds: losses, HellaSwag accuracy, learning rate and gradient norm.

    python plot.py                           # log/ -> log/loss.png
    python plot.py log other_log --out both.png
"""

import gc
import math
from pathlib import Path

import numpy as np

from gpt2lab.cli import UserError, make_parser, run_main
from gpt2lab.runlog import read_log, read_run

# (value, name) of published models, for runs on FineWeb-EDU with the gpt2 tokenizer: OpenAI's GPT-2
# scored on its val shard (build-nanogpt), GPT-3 from its paper
REFERENCES = {"val": [(3.2924, "OpenAI GPT-2 124M")],
              "hella": [(0.2955, "OpenAI GPT-2 124M"), (0.337, "GPT-3 124M")]}


def is_fineweb_edu(run):
    """Whether losses of this run compare with those published for FineWeb-EDU."""
    sources = run.get("source") or [run.get("data_dir") or ""]  # build-nanogpt's folders tell none
    return run.get("vocab_size") == 50257 and all(
        "fineweb-edu" in s.lower() or "edu_fineweb" in s for s in sources)


def smooth(values):
    """Each value's mean with its neighbours: a window of a fiftieth of all, cut at both ends."""
    window = np.ones(max(len(values) // 50, 1))
    if len(values) < len(window) + 1:
        return np.array(values)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def plot(log_dirs, out):
    """
    Draw the runs of one or more log folders over each other into the picture `out`. Raises
    UserError for a folder without a log, or if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need the package matplotlib: pip install matplotlib") from None
    logs, runs = [read_log(d) for d in log_dirs], [read_run(d) for d in log_dirs]
    batches = {run.get("total_batch_size") for run in runs}  # tokens in an update
    # one axis of steps serves runs of one batch size only; others meet on the tokens they saw
    over_tokens = len(batches) > 1 and None not in batches
    figure = Figure(figsize=(12, 8), layout="constrained")  # no pyplot: no window, no state
    loss, hella, lr, norm = figure.subplots(2, 2, width_ratios=(3, 2)).flat
    panels = (hella, "hella"), (lr, "lr"), (norm, "norm")
    for i, (log_dir, log, run) in enumerate(zip(log_dirs, logs, runs, strict=True)):
        scale = run["total_batch_size"] if over_tokens else 1
        draw = dict(color=f"C{i}", label=Path(log_dir).resolve().name)
        draw_loss(loss, log, scale, draw)
        for axes, stream in panels:
            steps, values = log.get(stream, ((), ()))
            values = smooth(values) if stream == "norm" else values
            axes.plot(np.multiply(steps, scale), values, "." * (len(steps) == 1) or "-", **draw)
    for axes, title in ((loss, "loss (nats a token)"), (hella, "HellaSwag accuracy"),
                        (lr, "learning rate"), (norm, "gradient norm (smoothed)")):
        axes.set_title(title)
        axes.grid(alpha=0.3)
        label_x(axes, over_tokens, next(iter(batches)) if len(batches) == 1 else None)
    for axes, stream in panels:
        if not any(stream in log for log in logs):
            axes.set_axis_off()  # an empty grid would look like a failure
    if all(map(is_fineweb_edu, runs)):
        draw_references({"val": loss, "hella": hella})
    loss.legend()
    figure.savefig(out, dpi=100)


def draw_loss(axes, log, scale, draw):
    """Training loss, raw behind smoothed, and validation loss with its last value."""
    steps, values = log.get("train", ((), ()))
    x = np.multiply(steps, scale)
    axes.plot(x, values, color=draw["color"], alpha=0.15)
    axes.plot(x, smooth(values), **draw | {"label": f"{draw['label']}: train, smoothed"})
    steps, values = log.get("val", ((), ()))
    if steps:
        axes.plot(np.multiply(steps, scale), values, "o--", markersize=4, color=draw["color"],
                  label=f"{draw['label']}: val, {values[-1]:.4f} at the end")
    lowest = [v for _, vs in map(log.get, ("train", "val"), [((), ())] * 2) for v in vs]
    lowest = min((v for v in lowest if math.isfinite(v)), default=None)
    if lowest is not None:  # the first steps come from far above, and would flatten the rest
        axes.set_ylim(top=max(axes.get_ylim()[0], 2.2 * lowest))


def label_x(axes, over_tokens, batch):
    """Name the x axis; where an update is `batch` tokens, a second one above counts tokens."""
    from matplotlib.ticker import EngFormatter
    axes.set_xlabel("tokens" if over_tokens else "step")
    if over_tokens:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2M, 10G
    if batch and not over_tokens:
        above = axes.secondary_xaxis("top", functions=(lambda x: x * batch, lambda x: x / batch))
        above.set_xlabel("tokens")
        above.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_references(panels):
    """Dotted lines at the published figures."""
    for stream, axes in panels.items():
        for value, name in REFERENCES[stream]:
            axes.axhline(value, color="gray", linestyle=":")
            axes.annotate(f"{name}: {value:g}", (1, value), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8, color="gray")


def try_to_plot(log_dir, master_process=True):
    """
    Draw log_dir/loss.png, as training does, on the master: what goes wrong costs a warning, never
    the run.
    """
    if not master_process:
        return
    try:
        plot([log_dir], Path(log_dir) / "loss.png")
    except Exception as error:
        print(f"warning: no plot of {log_dir}: {error}")
    gc.collect()  # a figure is full of cycles, and training has the collector switched off


def parse_args():
    """The flags."""
    parser = make_parser(__doc__)
    parser.add_argument("log_dirs", nargs="*", default=["log"], metavar="LOGDIR",
                        help="log folders of runs, drawn over each other (log)")
    parser.add_argument("--out", help="the picture (loss.png in the first folder)")
    return parser.parse_args()


def main():
    """The command line: draw, and say where."""
    args = parse_args()
    out = Path(args.out or Path(args.log_dirs[0]) / "loss.png")
    plot(args.log_dirs, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_main(main)
