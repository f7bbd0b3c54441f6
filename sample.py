"""
Samples text from a trained model.

    python sample.py --style creative                    # newest checkpoint in log/, else gpt2
    python sample.py --model gpt2-xl --prompt "The meaning of life is" --max_new_tokens 100
    python sample.py --interactive                       # you write a line, the model continues it
"""

import argparse
import codecs
import contextlib
import json
import math
import os
import subprocess
import sys
import time

import torch

from gpt2lab import kernels
from gpt2lab.checkpoints import EMA_HELP, default_source, list_model_files
from gpt2lab.cli import UserError, make_parser, run_main
from gpt2lab.device import limit_threads, pick_device
from gpt2lab.files import check_output, write_output
from gpt2lab.generate import generate
from gpt2lab.tokenizer import Tokenizer
from train_gpt2 import GPT, load

# temperature flattens (above 1) or sharpens (below 1) the distribution. top_k keeps the k likeliest
# tokens (0: all). top_p then keeps the fewest of them that together have this probability
STYLES = {
    "focused": dict(temperature=0.7, top_k=40, top_p=0.90),
    "creative": dict(temperature=0.9, top_k=100, top_p=0.95),
    "wild": dict(temperature=1.2, top_k=0, top_p=0.98),
}
DEFAULT_PROMPT = "Hello, I'm a language model,"
MAX_PROMPT_BYTES = 10_000_000  # the model sees no more than the end of a long prompt
ROWS_AT_ONCE = 16  # further samples are drawn afterwards, because each row needs its own KV cache

# -----------------------------------------------------------------------------
# text


class TextStream:
    """
    The text of one sample, built token by token. It shows whole characters only, and neither the
    text `stop`, which ends the sample, nor anything after it. `ended_by` is "end of text", "stop"
    or "length" when the sample has ended, and None before.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | None = None) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.tokens: list[int] = []
        self.text = ""  # what was shown so far
        self.held_back = ""  # decoded, but it may be the beginning of `stop`
        self.ended_by: str | None = None

    def feed(self, token: int | None) -> str:
        """Add a token id, or None for end-of-text; returns the text to show now."""
        if token is None:
            return self.end("end of text")
        self.tokens.append(token)
        self.held_back += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        stop = self.stop or ""
        if stop and stop in self.held_back:
            self.held_back = self.held_back[:self.held_back.index(stop)]
            return self.end("stop")
        # hold back the longest end that is a beginning of the stop text
        overlap = max((n for n in range(len(stop)) if self.held_back.endswith(stop[:n])), default=0)
        return self._show(len(self.held_back) - overlap)

    def end(self, reason: str) -> str:
        """End the sample; returns the text that was held back. An incomplete character is lost."""
        self.ended_by = reason
        return self._show(len(self.held_back))

    def _show(self, length: int) -> str:
        shown, self.held_back = self.held_back[:length], self.held_back[length:]
        self.text += shown
        return shown


def print_now(text: str) -> None:
    """Print without a line break and without waiting for the rest of the line."""
    print(text, end="", flush=True)


class LivePrinter:
    """
    Prints several samples that are made at the same time. The first sample that has not ended is
    printed token by token; the others wait until it has ended.
    """

    def __init__(self, streams: list[TextStream], prefixes: list[str]) -> None:
        self.streams, self.prefixes = streams, prefixes
        self.current = 0  # the sample that is being printed
        print_now(prefixes[0])

    def on_token(self, i: int, token: int | None) -> bool:
        """Add a token (None: end-of-text) to sample i; returns whether the sample has ended."""
        text = self.streams[i].feed(token)
        if i == self.current:
            print_now(text)
            self._finish_ended()
        return self.streams[i].ended_by is not None

    def _finish_ended(self) -> None:
        while self.current < len(self.streams) and self.streams[self.current].ended_by:
            self.current += 1
            print_now("\n")
            if self.current < len(self.streams):
                print_now(self.prefixes[self.current] + self.streams[self.current].text)

    def end(self) -> None:
        """End the samples that have reached their greatest length, and print what is left."""
        for i, stream in enumerate(self.streams):
            rest = "" if stream.ended_by else stream.end("length")
            if i == self.current:
                print_now(rest)
                self._finish_ended()


def print_samples(model: GPT, tokenizer: Tokenizer, prompt: str, args: argparse.Namespace,
                  sampling: dict) -> list[dict]:
    """Print args.num_samples continuations of a prompt; returns a dict of plain values for each."""
    results = []
    for first in range(0, args.num_samples, ROWS_AT_ONCE):
        numbers = range(first, min(first + ROWS_AT_ONCE, args.num_samples))
        streams = [TextStream(tokenizer, args.stop) for _ in numbers]
        printer = LivePrinter(streams, [f"[Sample {i + 1}] {prompt}" for i in numbers])
        generate(model, tokenizer.encode(prompt), tokenizer.eot, tokenizer.vocab_size,
                 num_samples=len(streams), max_new_tokens=args.max_new_tokens, seed=args.seed,
                 first_sample=first, ignore_eot=args.ignore_eot, on_token=printer.on_token,
                 **sampling)
        printer.end()
        results += [{"sample": i + 1, "seed": args.seed, "prompt": prompt, "text": stream.text,
                     "tokens": stream.tokens, "ended_by": stream.ended_by}
                    for i, stream in zip(numbers, streams, strict=True)]
    return results


# -----------------------------------------------------------------------------
# the interactive session

HELP = """\
Write a line, and the model continues it. An empty line lets the model write more. Ctrl-C stops an
answer, Ctrl-D leaves. Your lines and the answers are one text, which goes on until the model ends
it or you type /reset.
  /style wild             choose a style: focused, creative or wild
  /set temperature 0.7    set temperature, top_k, top_p, repetition_penalty or max_new_tokens
  /seed 3                 choose a seed; the same seed and lines give the same answers
  /reset                  forget the text so far
  /help                   show this help"""


class Session:
    """An interactive session: the text so far as token ids, and the settings of the commands."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, args: argparse.Namespace,
                 sampling: dict) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.settings = dict(sampling, max_new_tokens=args.max_new_tokens)
        self.seed = args.seed
        self.reset()

    def reset(self) -> None:
        """Forget the text, and start again with the first random numbers of the seed."""
        self.tokens: list[int] = []
        self.num_answers = 0

    def run_command(self, line: str) -> str:
        """Carry out a line such as "/seed 3"; returns the reply to print. Raises UserError."""
        name, *values = line.split()
        match name, values:
            case "/help", []:
                return HELP
            case "/reset", []:
                self.reset()
                return "the text so far is forgotten"
            case "/seed", [value]:
                self.seed, self.num_answers = parse_number("seed", value), 0
                return f"seed {self.seed}"
            case "/style", [style] if style in STYLES:
                self.settings.update(STYLES[style])
            case "/set", [setting, value] if setting in self.settings:
                self.settings[setting] = parse_number(setting, value)
            case _:
                raise UserError(f"unknown command {line.strip()}: /help lists the commands")
        return ", ".join(f"{key} {value}" for key, value in self.settings.items())

    def answer(self, line: str) -> None:
        """Print the model's continuation of the text so far and `line`, and add it to the text."""
        continues = self.tokens and self.tokens[-1] != self.tokenizer.eot
        self.tokens += self.tokenizer.encode("\n" + line if continues and line else line)
        stream = TextStream(self.tokenizer, self.args.stop)

        def on_token(i, token):
            print_now(stream.feed(token))
            self.tokens.append(self.tokenizer.eot if token is None else token)
            return stream.ended_by

        start = time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt):
            generate(self.model, self.tokens, self.tokenizer.eot, self.tokenizer.vocab_size,
                     seed=self.seed, first_sample=self.num_answers,
                     ignore_eot=self.args.ignore_eot, on_token=on_token, **self.settings)
        seconds = time.perf_counter() - start
        self.num_answers += 1
        count = len(stream.tokens)
        if not stream.ended_by:
            print_now(stream.end("length"))
        print_now(f"\n({count} tokens, {count / seconds:.1f} tokens/s)\n")


def interact(session: Session) -> None:
    """Read lines from standard input until it ends; carry out commands, answer all other lines."""
    with contextlib.suppress(ImportError):  # Windows lacks readline; its console edits lines itself
        import readline  # noqa: F401, importing it gives input() line editing and a history
    print("Write a line, and the model continues it. /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = input("> ")
            line.encode("utf-8")  # raises UnicodeError if a byte of the line is not text
            if line.startswith("/"):
                print(session.run_command(line))
            else:
                session.answer(line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # discards the line that is being typed
            print()
        except UnicodeError:
            print("the line was ignored, because it is not UTF-8")
        except UserError as error:
            print(error)


# -----------------------------------------------------------------------------
# the command line

LIMITS = {  # the type of each number that a user can set, its lowest and its highest value
    "temperature": (float, 0, math.inf), "top_k": (int, 0, math.inf), "top_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, math.inf), "max_new_tokens": (int, 1, math.inf),
    "num_samples": (int, 1, math.inf), "seed": (int, 0, math.inf)}


def parse_number(name: str, text: str) -> int | float:
    """The number that `text` gives for a setting. Raises UserError if it breaks its LIMITS."""
    kind, lowest, highest = LIMITS[name]
    with contextlib.suppress(ValueError):
        value = kind(text)
        if lowest <= value <= highest and value != math.inf:  # false for a NaN
            return value
    span = f"of at least {lowest}" if highest == math.inf else f"from {lowest} to {highest}"
    raise UserError(f"{name} {text}: it must be a {'whole ' if kind is int else ''}number {span}")


def parse_args() -> argparse.Namespace:
    """The parsed command line, with its numbers checked. Raises UserError."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", help="checkpoint, log folder, Hugging Face folder or hub name (default: "
        "GPT2_MODEL in the environment, else the newest checkpoint in log/, else gpt2)")
    add("--ema", action="store_true", help=EMA_HELP)
    add("--prompt", help="text to continue; - reads it from standard input; an empty text starts "
        f"from end-of-text (default: {DEFAULT_PROMPT})")
    add("--prompt_file", help="UTF-8 file with the text to continue")
    add("--interactive", action="store_true", help="write in turn with the model")
    add("--style", choices=tuple(STYLES), default="creative",
        help=f"values of the next three flags (%(default)s): {STYLES}")
    add("--temperature", help="below 1: likely tokens become likelier; above 1: less likely; "
        "0: always take the likeliest")
    add("--top_k", help="draw from the k likeliest tokens; 0: from all")
    add("--top_p", help="draw from the likeliest tokens, the fewest that together have this "
        "probability")
    add("--greedy", action="store_true", help="the same as --temperature 0")
    add("--repetition_penalty", default=1.0,
        help="above 1: tokens that are in the text already become less likely (%(default)s)")
    add("--max_new_tokens", default=100, help="longest sample, in tokens (%(default)s)")
    add("--num_samples", default=4, help="how many samples to print (%(default)s)")
    add("--seed", default=42, help="seed of the random numbers (%(default)s)")
    add("--stop", help="text that ends a sample and is not printed")
    add("--ignore_eot", action="store_true", help="continue after end-of-text")
    add("--out", help="write a line of JSON for each sample to this file")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="number type of weights and KV cache (%(default)s)")
    add("--matmul_precision", choices=("highest", "high", "medium"), default="highest",
        help="precision of float32 matmuls; high is TF32 on CUDA (%(default)s)")
    add("--compile", action="store_true", help="compile the model (CUDA only)")
    add("--safe", action="store_true", help="for machines that crash: sample on one CPU thread, "
        "and compile or generate no code at run time")
    args = parser.parse_args()
    for name in LIMITS:
        if getattr(args, name) is not None:
            setattr(args, name, parse_number(name, getattr(args, name)))
    for name in ("prompt", "prompt_file", "out"):
        if args.interactive and getattr(args, name) is not None:
            raise UserError(f"--interactive does not use --{name}: leave one of them out")
    if args.prompt is not None and args.prompt_file is not None:
        raise UserError("--prompt and --prompt_file both give a prompt: leave one of them out")
    if args.stop is not None:
        args.stop = decode_argument("--stop", args.stop)
        if not args.stop:
            raise UserError("--stop is empty: give the text that ends a sample, or leave it out")
    return args


def decode_argument(flag: str, text: str) -> str:
    """
    The text of a flag. Bytes that are not of the system's encoding, which Python passes as lone
    surrogates, must be UTF-8, or UserError is raised.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"{flag} is not UTF-8 ({error}): give it in UTF-8") from error


def sampling_options(args: argparse.Namespace) -> dict:
    """The keywords of sample_token: those of the style, and the flags that replace them."""
    options = dict(STYLES[args.style], repetition_penalty=args.repetition_penalty)
    for name in STYLES[args.style]:
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.greedy:
        options["temperature"] = 0
    return options


def read_prompt(args: argparse.Namespace) -> str:
    """The text to continue. Raises UserError if it is not UTF-8, or far too long."""
    if args.prompt_file is not None:
        with open(args.prompt_file, "rb") as file:
            data = file.read(MAX_PROMPT_BYTES + 1)
    elif args.prompt == "-":
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    else:
        return decode_argument("--prompt", DEFAULT_PROMPT if args.prompt is None else args.prompt)
    if len(data) > MAX_PROMPT_BYTES:
        raise UserError(f"the prompt has more than {MAX_PROMPT_BYTES:,} bytes, and the model sees "
                        "only its end: cut it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeError as error:
        raise UserError(f"the prompt is not UTF-8 ({error}): save it as UTF-8") from error
    return text.removesuffix("\n").removesuffix("\r")  # a file ends in a line break


# one thread, and nothing compiled. torch reads these variables when it is loaded
SAFE_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTORCH_JIT": "0"}


def restart_safely() -> None:
    """Start this script again with SAFE_ENVIRONMENT, unless it has that environment already."""
    if all(os.environ.get(name) == value for name, value in SAFE_ENVIRONMENT.items()):
        return
    os.environ.update(SAFE_ENVIRONMENT)
    command = [sys.executable, *sys.orig_argv[1:]]
    if os.name == "nt":  # on Windows, the shell would not wait for a program started by exec
        sys.exit(subprocess.run(command, check=False).returncode)
    os.execv(command[0], command)


def choose_model(args: argparse.Namespace) -> str:
    """The model that the command line names, or the default."""
    return default_source() if args.model is None else args.model


def load_for_sampling(args: argparse.Namespace) -> tuple[GPT, Tokenizer]:
    """(model, tokenizer) as the command line asks for them, ready to sample. Raises UserError."""
    limit_threads()
    device = torch.device("cpu") if args.safe else pick_device(args.device)
    if args.compile and (args.safe or device.type != "cuda"):
        raise UserError("--compile needs CUDA and does not go with --safe: leave --compile out")
    torch.backends.mkldnn.enabled = not args.safe  # because oneDNN generates code at run time
    torch.set_float32_matmul_precision(args.matmul_precision)
    model, tokenizer = load(choose_model(args), ema=args.ema)
    # from the CPU, so that float32 weights need no room on the device
    model = model.to(device=device, dtype=getattr(torch, args.dtype))
    kernels.optimize(model)
    if args.num_samples > 1 and not args.interactive:  # packing does not help with a single row
        kernels.prepack(model)
    if args.compile:
        model.forward = torch.compile(model.forward, dynamic=True)  # because every length differs
    return model, tokenizer


def main() -> None:
    """Print samples, or hold an interactive session."""
    kernels.tune_malloc()
    args = parse_args()
    if args.safe:
        restart_safely()
    sampling = sampling_options(args)
    prompt = "" if args.interactive else read_prompt(args)
    if args.out is not None:
        inputs = [*list_model_files(choose_model(args)), args.prompt_file or ""]
        out = check_output(args.out, inputs)
    model, tokenizer = load_for_sampling(args)
    if args.interactive:
        interact(Session(model, tokenizer, args, sampling))
        return
    results = print_samples(model, tokenizer, prompt, args, sampling)
    if args.out is not None:
        lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        write_output(out, lines.encode("utf-8"))


if __name__ == "__main__":
    # with --out, the file gets all samples though nobody reads on
    run_main(main, output_may_be_lost=any(arg.startswith("--out") for arg in sys.argv))
