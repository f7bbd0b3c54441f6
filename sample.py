"""
Samples text from a trained model.

    python sample.py --style creative                    # newest checkpoint in log/, else gpt2
    python sample.py --model gpt2-xl --prompt "The meaning of life is" --max_new_tokens 100
    python sample.py --interactive                       # you write a line, the model goes on
"""

import codecs
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from gpt2lab.checkpoints import default_source
from gpt2lab.cli import UserError, make_parser, run_main
from gpt2lab.device import pick_device, tune_malloc
from gpt2lab.files import write_atomically
from gpt2lab.generate import generate
from gpt2lab.kernels import prepack
from train_gpt2 import load

# temperature flattens (> 1) or sharpens (< 1) the distribution; top_k keeps the k likeliest tokens
# (0: all); top_p then keeps the fewest of them that together have this share of the probability
STYLES = {
    "focused": dict(temperature=0.7, top_k=40, top_p=0.90),
    "creative": dict(temperature=0.9, top_k=100, top_p=0.95),
    "wild": dict(temperature=1.2, top_k=0, top_p=0.98),
}
DEFAULT_PROMPT = "Hello, I'm a language model,"
ROWS_AT_ONCE = 16  # more samples than these are drawn in turn: each row has a cache of its own

# -----------------------------------------------------------------------------
# the model, one token at a time


# -----------------------------------------------------------------------------
# text


class TextStream:
    """
    The text of one sample as its tokens come: whole characters only, and nothing of `stop`, the
    text that ends it. `ended` says why it ended, None while it goes on.
    """

    def __init__(self, tokenizer, stop=None):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.tokens, self.text, self.held, self.ended = [], "", "", None

    def feed(self, token):
        """Take a token id, or None for end-of-text; returns the text that it makes certain."""
        if token is None:
            return self.end("end of text")
        self.tokens.append(token)
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        if self.stop and self.stop in self.held:
            self.held = self.held[:self.held.index(self.stop)]
            return self.end("stop")
        # the end of what we hold may be the beginning of the stop text
        stop = self.stop or ""
        sure = len(self.held) - max(
            (n for n in range(len(stop)) if self.held.endswith(stop[:n])), default=0)
        return self._show(sure)

    def end(self, why):
        """No token follows; returns what was held back. Half a character is dropped."""
        self.ended = why
        return self._show(len(self.held))

    def _show(self, count):
        shown, self.held = self.held[:count], self.held[count:]
        self.text += shown
        return shown


def write(text):
    """Print a piece of text right away."""
    print(text, end="", flush=True)


class Printer:
    """Prints samples as their tokens come: the first unfinished one live, the others after it."""

    def __init__(self, streams, heads):
        self.streams, self.heads = streams, heads
        self.live = 0
        write(heads[0])

    def on_token(self, i, token):
        """Take a token of stream i (None: end-of-text); returns whether it ended the stream."""
        text = self.streams[i].feed(token)
        if i == self.live:
            write(text)
            self._next()
        return self.streams[i].ended

    def _next(self):
        while self.live < len(self.streams) and self.streams[self.live].ended:
            self.live += 1
            write("\n")
            if self.live < len(self.streams):
                write(self.heads[self.live] + self.streams[self.live].text)

    def end(self):
        """All rows have come to their length."""
        for i, stream in enumerate(self.streams):
            rest = "" if stream.ended else stream.end("length")
            if i == self.live:
                write(rest)
                self._next()


def print_samples(model, tokenizer, prompt, args, choice):
    """Print args.num_samples continuations of a text; returns a plain dict for each."""
    results = []
    for first in range(0, args.num_samples, ROWS_AT_ONCE):
        numbers = range(first, min(first + ROWS_AT_ONCE, args.num_samples))
        streams = [TextStream(tokenizer, args.stop) for _ in numbers]
        printer = Printer(streams, [f"[Sample {i + 1}] {prompt}" for i in numbers])
        generate(model, tokenizer.encode(prompt), tokenizer.eot, tokenizer.vocab_size,
                 len(streams), args.max_new_tokens, args.seed, first, args.ignore_eot,
                 printer.on_token, **choice)
        printer.end()
        results += [{"sample": i + 1, "seed": args.seed, "prompt": prompt, "text": stream.text,
                     "tokens": stream.tokens, "ended_by": stream.ended}
                    for i, stream in zip(numbers, streams, strict=True)]
    return results


def print_four(model, tokenizer, prompt):
    """Print four short samples, as training does: private generators, so it does not notice."""
    rows = generate(model, tokenizer.encode(prompt), tokenizer.eot, tokenizer.vocab_size,
                    num_samples=4, max_new_tokens=64, top_k=50)
    for i, tokens in enumerate(rows):
        print(f"[Sample {i + 1}] {prompt}{tokenizer.decode(tokens)}")


# -----------------------------------------------------------------------------
# interactive

HELP = """\
Write a line and the model goes on from it; an empty line lets it write more. Ctrl-C stops it,
Ctrl-D leaves. The text grows from line to line, until the model ends it or you say /reset.
  /style wild             focused, creative or wild
  /set temperature 0.7    or top_k, top_p, repetition_penalty, max_new_tokens
  /seed 3                 the same seed and lines give the same answers
  /reset                  forget the text so far
  /help                   this"""


class Session:
    """An interactive session: the text so far as token ids, and the settings commands change."""

    def __init__(self, model, tokenizer, args, choice):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.settings = dict(choice, max_new_tokens=args.max_new_tokens)
        self.seed = args.seed
        self.reset()

    def reset(self):
        """Forget the text and start the seed over."""
        self.tokens, self.answers = [], 0

    def command(self, line):
        """Carry out a line like "/seed 3"; returns what to tell. Raises UserError."""
        name, *values = line.split()
        match name, values:
            case "/help", []:
                return HELP
            case "/reset", []:
                self.reset()
                return "the text starts anew"
            case "/seed", [value]:
                self.seed, self.answers = parse("seed", value), 0
                return f"seed {self.seed}"
            case "/style", [style] if style in STYLES:
                self.settings.update(STYLES[style])
            case "/set", [setting, value] if setting in self.settings:
                self.settings[setting] = parse(setting, value)
            case _:
                raise UserError(f"I do not understand {line.strip()}: /help lists the commands")
        return ", ".join(f"{key} {value}" for key, value in self.settings.items())

    def answer(self, line):
        """Print how the model goes on from the text so far and `line`."""
        goes_on = self.tokens and self.tokens[-1] != self.tokenizer.eot
        self.tokens += self.tokenizer.encode("\n" + line if goes_on and line else line)
        stream = TextStream(self.tokenizer, self.args.stop)

        def on_token(i, token):
            write(stream.feed(token))
            self.tokens.append(self.tokenizer.eot if token is None else token)
            return stream.ended

        start = time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt):
            generate(self.model, self.tokens, self.tokenizer.eot, self.tokenizer.vocab_size,
                     seed=self.seed, first_sample=self.answers, ignore_eot=self.args.ignore_eot,
                     on_token=on_token, **self.settings)
        seconds = time.perf_counter() - start
        self.answers += 1
        count = len(stream.tokens)
        write("" if stream.ended else stream.end("length"))
        write(f"\n({count} tokens, {count / seconds:.1f} tokens/s)\n")


def interact(session):
    """Read lines from standard input until it ends; answer them or do as they say."""
    with contextlib.suppress(ImportError):  # Windows has none, but edits lines all the same
        import readline  # noqa: F401, line editing and history for input()
    print("Write a line; /help explains, Ctrl-D leaves.")
    while True:
        try:
            line = input("> ")
            if line.startswith("/"):
                print(session.command(line))
            else:
                session.answer(line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # drops the line being written
            print()
        except UnicodeError:
            print("that was no UTF-8: nothing done")
        except UserError as error:
            print(error)


# -----------------------------------------------------------------------------
# the script

# what the number of each setting is, and its lowest and highest value
LIMITS = {
    "temperature": (float, 0, math.inf), "top_k": (int, 0, math.inf), "top_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, math.inf), "max_new_tokens": (int, 1, math.inf),
    "num_samples": (int, 1, math.inf), "seed": (int, 0, math.inf)}


def parse(name, text):
    """The number that a setting is given as text. Raises UserError unless it makes sense."""
    kind, lowest, highest = LIMITS[name]
    with contextlib.suppress(ValueError):
        if lowest <= (value := kind(text)) <= highest:  # false for a NaN
            return value
    span = f"of at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
    raise UserError(f"{name} {text}: it must be a {'whole ' if kind is int else ''}number {span}")


def parse_args():
    """The command line, its numbers checked. Raises UserError."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", help="checkpoint, log folder, Hugging Face folder or hub name (default: "
        "GPT2_MODEL in the environment, else the newest checkpoint in log/, else gpt2)")
    add("--prompt", help="text to continue; - reads it from standard input; empty: start from "
        f"end-of-text ({DEFAULT_PROMPT})")
    add("--prompt_file", help="file with the text to continue, UTF-8")
    add("--interactive", action="store_true", help="write in turn with the model")
    add("--style", choices=tuple(STYLES), default="creative",
        help=f"values of the next three flags (%(default)s): {STYLES}")
    add("--temperature", help="0 always takes the likeliest token")
    add("--top_k", help="draw from the k likeliest tokens; 0: all")
    add("--top_p", help="draw from the likeliest tokens of this share")
    add("--greedy", action="store_true", help="the same as --temperature 0")
    add("--repetition_penalty", default=1.0, help="above 1: tokens seen become less likely")
    add("--max_new_tokens", default=100, help="(%(default)s)")
    add("--num_samples", default=4, help="(%(default)s)")
    add("--seed", default=42, help="(%(default)s)")
    add("--stop", help="text that ends a sample, and is not printed")
    add("--ignore_eot", action="store_true", help="go on after end-of-text")
    add("--out", help="write a line of JSON for each sample to this file")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of weights and cache (%(default)s)")
    add("--matmul_precision", choices=("highest", "high", "medium"), default="highest",
        help="of float32 products; high is TF32 on CUDA (%(default)s)")
    add("--compile", action="store_true", help="compile the model (CUDA only)")
    add("--safe", action="store_true",
        help="for machines that crash: CPU, one thread, nothing compiled or generated at run time")
    args = parser.parse_args()
    for name in LIMITS:
        if (value := getattr(args, name)) is not None:
            setattr(args, name, parse(name, value))
    for name in ("prompt", "prompt_file", "out"):
        if args.interactive and getattr(args, name) is not None:
            raise UserError(f"--interactive does without --{name}: leave one of them out")
    if args.prompt is not None and args.prompt_file is not None:
        raise UserError("--prompt and --prompt_file are two prompts: leave one of them out")
    return args


def read_prompt(args):
    """The text to continue. Raises UserError if it is not UTF-8."""
    try:
        if args.prompt_file is not None:
            text = Path(args.prompt_file).read_bytes().decode("utf-8-sig")
        elif args.prompt == "-":
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        else:
            text = DEFAULT_PROMPT if args.prompt is None else args.prompt
            return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"the prompt is not UTF-8 ({error}): save it as UTF-8") from error
    return text.removesuffix("\n").removesuffix("\r")  # the line break that ends a file


# one thread, nothing compiled: read when torch loads
SAFE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTORCH_JIT": "0"}


def restart_safely():
    """Start this script anew with the environment of SAFE, unless it has it."""
    if all(os.environ.get(name) == value for name, value in SAFE.items()):
        return
    os.environ.update(SAFE)
    command = [sys.executable, *sys.orig_argv[1:]]
    if os.name == "nt":  # has no exec that the shell would wait for
        sys.exit(subprocess.run(command, check=False).returncode)
    os.execv(command[0], command)


def load_for_sampling(args):
    """(model, tokenizer) as the command line wants them, ready to sample. Raises UserError."""
    device = torch.device("cpu") if args.safe else pick_device(args.device)
    if args.compile and (args.safe or device.type != "cuda"):
        raise UserError("--compile is for CUDA, and not for --safe: leave it out")
    torch.backends.mkldnn.enabled = not args.safe  # oneDNN generates its code at run time
    torch.set_float32_matmul_precision(args.matmul_precision)
    source = args.model or default_source()
    model, tokenizer = load(source)
    model = model.to(device=device, dtype=getattr(torch, args.dtype))
    if args.num_samples > 1 and not args.interactive:  # one row alone is as fast without
        prepack(model)
    if args.compile:
        model.forward = torch.compile(model.forward, dynamic=True)  # lengths change all the time
    return model, tokenizer


def main():
    """The command line: samples, or a conversation."""
    tune_malloc()
    args = parse_args()
    if args.safe:
        restart_safely()
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")  # Windows' pipes have others
    choice = dict(STYLES[args.style], repetition_penalty=args.repetition_penalty)
    choice |= {name: value for name in choice if (value := getattr(args, name)) is not None}
    if args.greedy:
        choice["temperature"] = 0
    prompt = None if args.interactive else read_prompt(args)
    model, tokenizer = load_for_sampling(args)
    if args.interactive:
        interact(Session(model, tokenizer, args, choice))
        return
    results = print_samples(model, tokenizer, prompt, args, choice)
    if args.out:
        lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        write_atomically(Path(args.out), lambda file: file.write(lines.encode("utf-8")))


if __name__ == "__main__":
    run_main(main)
