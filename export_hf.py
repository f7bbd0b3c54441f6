"""
Exports a model as a Hugging Face folder, which transformers, vLLM, lm-eval, mlx-lm and the hub
read, and as a GGUF file, which llama.cpp, Ollama and LM Studio read.

    python export_hf.py log my_gpt2                       # the newest checkpoint in log/
    python export_hf.py log/model_05000.pt half --dtype float16
    python export_hf.py log my_gpt2 --gguf my_gpt2.gguf --modelfile
    python export_hf.py log my_gpt2 --push_to_hub USER/my_gpt2 --private
"""

import base64
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from gpt2lab.checkpoints import EMA_HELP, choose_weights, load_checkpoint, resolve_checkpoint
from gpt2lab.cli import UserError, make_parser, run_main
from gpt2lab.files import read_json, write_atomically
from gpt2lab.gguf_file import (
    GGUF_TYPES,
    context_note,
    import_gguf,
    modelfile_text,
    read_vocabulary,
    write_gguf,
)
from gpt2lab.pretrained import TRANSPOSED, fetch
from gpt2lab.runlog import read_log
from gpt2lab.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    byte_spelling,
    import_sentencepiece,
    make_byte_level_bpe,
)
from train_gpt2 import load

# the options of a run that its model card lists. Paths of this machine are not published
MODEL_CARD_KEYS = ("total_batch_size", "T", "max_steps", "optimizer", "max_lr", "min_lr",
                   "warmup_steps", "schedule", "weight_decay", "beta2", "grad_clip", "ema",
                   "shuffle", "seed", "dtype")
# the text on which an exported tokenizer must agree with ours: long words, contractions, spaces,
# line breaks, digits, accents, many scripts, control characters, bytes
PROBE = ("An international dictionary of representative attributes, collections and assignments. "
         "I'll say we've it's they're I'd 'tis DON'T, Hello,  I'm\ta café—naïve!\n\n  x = [1234.5]"
         "\r\n\n\n    ﬁ Ａ e\u0301 ½²Ⅷ 3.14159 ٣٤ "
         "他說：「你好」。漢字かなカナ、日本語。 Привет, мир! 안녕하세요 Γειά ελληνικά שלום السَّلام "
         "नमस्ते हिन्दी ไทย\u00a0\u200b\u3000\ufeff 🙂👩‍👩‍👧🇪🇺\x00\x1b\x1c\x7f\x85 end ")

# -----------------------------------------------------------------------------
# the model


class Model(NamedTuple):
    """A model to export. `path` and `checkpoint` are None for a Hugging Face model."""

    source: str
    weights: dict  # GPT.state_dict(); the tensors of a checkpoint are memory-mapped
    config: dict  # the fields of GPTConfig
    tokenizer: Tokenizer
    path: Path | None = None
    checkpoint: dict | None = None
    license: str | None = None  # as the card of a Hugging Face model names it
    ema: bool = False  # whether `weights` are the average that --ema of train_gpt2.py keeps

    @property
    def run(self):
        """The options of the run that made the model, {} for a model from elsewhere."""
        return (self.checkpoint or {}).get("config") or {}


def read_model(source, ema=False):
    """The Model of a checkpoint, log folder, Hugging Face folder or hub name. Raises UserError."""
    path = resolve_checkpoint(source)
    if path is None:
        gpt, tokenizer = load(source, ema=ema)
        return Model(str(source), gpt.state_dict(), vars(gpt.config), tokenizer,
                     license=read_license(source))
    checkpoint = choose_weights(load_checkpoint(path), source, ema)
    if "note" in checkpoint:
        print(checkpoint["note"], file=sys.stderr)
    tokenizer = Tokenizer(**checkpoint["tokenizer"])
    return Model(str(source), checkpoint["model"], checkpoint["model_config"], tokenizer, path,
                 checkpoint, ema=ema)


def read_license(source):
    """The licence in the front matter of a Hugging Face model's card, None if it names none."""
    try:
        card = fetch(source, "README.md")
    except UserError:
        return None  # the hub cannot be reached, and its cache has the model but not the card
    text = card.read_text(encoding="utf-8", errors="replace") if card else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = front and re.search(r"^license: *['\"]?([\w.-]+)", front[1], re.MULTILINE)
    return found[1] if found else None


def hf_config(model_config, eot, dtype):
    """
    The content of config.json. model_config is a dict with the fields of GPTConfig, eot the id of
    end-of-text, dtype a name such as "float32".
    """
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        "vocab_size": model_config["vocab_size"], "n_positions": model_config["block_size"],
        "n_ctx": model_config["block_size"],  # mlx-lm and llama.cpp's converter read this one
        "n_embd": model_config["n_embd"], "n_layer": model_config["n_layer"],
        "n_head": model_config["n_head"], "n_inner": None,
        "activation_function": "gelu_new",  # the tanh form
        "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "scale_attn_weights": True,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True,
        "bos_token_id": eot, "eos_token_id": eot, "use_cache": True, "dtype": dtype}


def hf_weights(state, vocab_size, dtype):
    """
    The tensors of model.safetensors, {name: tensor} in `dtype`, from GPT.state_dict(). Their names
    have no "transformer." before them, as in OpenAI's own upload: mlx-lm reads no other names.
    Raises UserError for a value that is not finite, for example because it is too large for
    float16.
    """
    weights = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue  # the same matrix as wte
        if name == "transformer.wte.weight":
            tensor = tensor[:vocab_size]  # the other rows are padding
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        tensor = tensor.to(dtype).contiguous()
        if not tensor.isfinite().all():
            raise UserError(f"{name} is not finite in {dtype}: use --dtype float32, or another "
                            "checkpoint if that fails too")
        weights[name.removeprefix("transformer.")] = tensor
    return weights


# -----------------------------------------------------------------------------
# the tokenizer


def tokenizer_files(tokenizer, block_size):
    """
    {file name: bytes} from which AutoTokenizer builds the same tokenizer. If Hugging Face's format
    cannot express the tokenizer, prints a warning and leaves out tokenizer.json.
    """
    import tokenizers
    files, text = {}, tokenizer_json(tokenizer)
    if is_sentencepiece(tokenizer):
        files["tokenizer.model"] = base64.b64decode(tokenizer.model)
    if tokenizers.Tokenizer.from_str(text).encode(PROBE).ids != tokenizer.encode(PROBE):
        print(f"warning: Hugging Face's tokenizers cannot do what the tokenizer {tokenizer.spec} "
              "does: AutoTokenizer will not load this folder")
        return files
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
              "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
              "clean_up_tokenization_spaces": False}  # would decode "a ." as "a."
    files["tokenizer.json"] = text.encode("utf-8")
    files["tokenizer_config.json"] = json_bytes(config)
    return files


def is_sentencepiece(tokenizer):
    """Whether a Tokenizer is a SentencePiece model."""
    return tokenizer.model is not None and not tokenizer.model.startswith("{")


@functools.cache  # the folder and the GGUF file need it, and gpt2's takes a second
def tokenizer_json(tokenizer):
    """The text of tokenizer.json for a Tokenizer of any kind."""
    if tokenizer.model is None:
        return gpt2_tokenizer_json(tokenizer)
    return spm_tokenizer_json(tokenizer) if is_sentencepiece(tokenizer) else tokenizer.model


def gpt2_tokenizer_json(tokenizer):
    """
    The text of tokenizer.json for the gpt2 tokenizer. The ids of tokens are in the order of the
    merges that made them. To find the merge of a token, merge its bytes as the tokenizer does,
    lowest id first, until two parts are left.
    """
    from tokenizers import models
    ids = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.eot)}
    spelling = byte_spelling()
    spelled = {token: "".join(spelling[byte] for byte in token) for token in ids}
    merges = []
    for token in ids:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pair_ids = [ids.get(a + b, len(ids)) for a, b in pairwise(parts)]
            first = pair_ids.index(min(pair_ids))
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:  # one part is a single byte, which no merge has made
            merges.append((spelled[parts[0]], spelled[parts[1]]))
    bpe = make_byte_level_bpe(models.BPE({spelled[token]: i for token, i in ids.items()}, merges))
    bpe.add_special_tokens([END_OF_TEXT])
    return bpe.to_str()


def spm_tokenizer_json(tokenizer):
    """
    The text of tokenizer.json for a SentencePiece model as spm:N trains it: unigram, with byte
    pieces. If two segmentations are equally likely, as in a row of asterisks, Hugging Face's
    tokenizer may choose another one than SentencePiece does.
    """
    from tokenizers import Regex, decoders, models, normalizers
    from tokenizers import Tokenizer as HFTokenizer
    spm = import_sentencepiece().SentencePieceProcessor(
        model_proto=base64.b64decode(tokenizer.model))
    pieces = [(spm.id_to_piece(i), spm.get_score(i)) for i in range(len(spm))]
    unigram = HFTokenizer(models.Unigram(pieces, spm.unk_id(), byte_fallback=True))
    unigram.normalizer = normalizers.Replace(Regex(" "), "\u2581")
    unigram.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    unigram.add_special_tokens([END_OF_TEXT])
    return unigram.to_str()


# -----------------------------------------------------------------------------
# the model card


def public_name(name):
    """The name of a file or folder without its path, which is private. Hub names stay complete."""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return name if on_hub else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def data_lines(meta, data_dir):
    """Lines of the card that describe the data in `data_dir`; meta is its meta.json, or {}."""
    sources = ", ".join(source_names(meta)) or public_name(data_dir)
    lines = [f"Trained on `{sources}`."]
    if "splits" in meta:
        train, val = meta["splits"]["train"], meta["splits"]["val"]
        lines.append(f"{train['tokens']:,} tokens of {train['documents']:,} documents to train on, "
                     f"{val['tokens']:,} tokens held out.")
    return lines


def source_names(meta):
    """The public names of the sources from which a folder of shards was made."""
    return [public_name(source) for source in meta.get("recipe", {}).get("source", ())]


def hub_datasets(meta):
    """The hub data sets from which a folder of shards was made; [] if it was made from files."""
    on_hub = any(name.startswith("hf://") for name, _ in meta.get("inputs", ()))
    return source_names(meta) if on_hub else []


def loss_rows(model):
    """
    Rows of the card's table of losses: the last value of each measure that log.txt has up to the
    step of a Model. [] if the checkpoint's folder has no log.
    """
    try:
        log, step = read_log(model.path.parent), model.checkpoint["step"]
    except UserError:
        return []  # the checkpoint was moved away from its log
    rows, streams = [], {"val": "validation loss (nats a token)",
                         "bits_per_byte": "validation loss (bits per byte)",
                         "hella": "HellaSwag accuracy (length-normalised)"}
    if model.ema:  # the other measures of val are those of the weights themselves
        streams = {"val_ema": "validation loss (nats a token)"}
    for stream, measure in {"train": "training loss (nats a token)", **streams}.items():
        steps, values = log.get(stream, ((), ()))
        known = [(at, value) for at, value in zip(steps, values, strict=True) if at <= step]
        if known:
            at, value = known[-1]
            rows.append(f"| {measure} | {value:.4f} | {at:,} |")
    return rows


def model_card(model, name):
    """README.md of an export: what the Model is and, if a run made it, its losses, data, recipe."""
    run = model.run
    lines = [
        "---", *front_matter(model), "---", "", f"# {name}", "",
        f"A GPT-2 of {model.config['n_layer']} layers, {model.config['n_head']} heads and width "
        f"{model.config['n_embd']}, with a context of {model.config['block_size']:,} tokens and a "
        f"vocabulary of {model.config['vocab_size']:,} (tokenizer "
        f"`{public_name(model.tokenizer.spec)}`), {origin(model)}.", "",
        "```python", "from transformers import pipeline", "",
        f'pipeline("text-generation", "{name}")("Hello")', "```", ""]
    if not run:
        return "\n".join(lines)
    lines += ["## Data", "", *data_lines(read_meta(run), run["data_dir"])]
    if losses := loss_rows(model):
        lines += ["", "## Losses", "", "| measure | value | at step |", "|---|---|---|", *losses]
    lines += ["", "## Recipe", "", "| knob | value |", "|---|---|",
              *(f"| {key} | {run[key]} |" for key in MODEL_CARD_KEYS if key in run), ""]
    return "\n".join(lines)


def front_matter(model):
    """The lines of a card that the hub reads: only what is known about the Model."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2"]
    if model.license:
        lines.append(f"license: {model.license}")
    if datasets := hub_datasets(read_meta(model.run)):
        lines += ["datasets:", *(f"- {dataset}" for dataset in datasets)]
    base = model.run.get("init_from") if model.path else model.source
    if base and "/" in public_name(base):  # a hub name
        lines.append("base_model: " + public_name(base))
    return lines


def origin(model):
    """Where a Model comes from, as the end of a sentence of its card."""
    run = model.run
    if not run:
        return f"written by gpt2-lab from `{public_name(model.source)}`"
    init_from, step = run.get("init_from"), model.checkpoint["step"]
    start = f"from `{public_name(init_from)}`" if init_from else "from scratch"
    average = ", with the moving average of its weights" if model.ema else ""
    return (f"trained {start} by gpt2-lab: {step:,} updates, "
            f"{step * run['total_batch_size']:,} tokens{average}")


def read_meta(run):
    """meta.json of the data that a run was trained on, {} if it is not there any more."""
    path = Path(run.get("data_dir", ""), "meta.json")
    return read_json(path) if run and path.is_file() else {}


# -----------------------------------------------------------------------------
# writing the folder and uploading it


def json_bytes(value):
    """The content of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


@contextlib.contextmanager
def new_file(path):
    """
    A context that makes an empty file at `path`, so that no other export takes the same name. If
    the context fails, nothing is left. Raises UserError if `path` exists or cannot be made.
    """
    try:
        path.open("xb").close()
    except FileExistsError:
        raise UserError(f"{path} is there already: name another file, or remove it") from None
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): make its folder, or name another "
                        "file") from error
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(out):
    """
    A context that makes the folder `out`. Its files are written to the temporary folder that it
    yields. If that fails, nothing is left. Raises UserError, before anything is written, unless
    `out` is empty or absent and can be made.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name another folder, or remove it")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name another folder")
    stays = out.is_dir()  # as it may be mounted, or the current folder
    temporary = (out if stays else out.parent) / f"{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make {out} ({error.strerror}): name another folder") from error
    try:
        yield temporary
        if stays:
            for path in temporary.iterdir():
                path.rename(out / path.name)
        else:
            rename_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # is not there any more, or is in the way


def rename_folder(folder, out):
    """Give a folder the name `out`. Raises UserError if another program has used it meanwhile."""
    try:
        folder.rename(out)
    except OSError as error:
        raise UserError(f"cannot make {out} ({error.strerror}): name another folder") from error


def export(source, out, dtype="float32", name=None, gguf=None, gguf_type="f16", modelfile=False,
           ema=False):
    """
    Write the folder `out` from a source of train_gpt2.load, and return its absolute path.

    dtype: the number format of the folder's weights.
    name: the model's name in the model card and the GGUF file, by default the folder's.
    gguf, gguf_type: also write this GGUF file, in this format of gguf_file.GGUF_TYPES.
    modelfile: also write an Ollama Modelfile beside the GGUF file.
    ema: take the moving average of the weights that a checkpoint may hold.

    If anything fails, nothing is left. Raises UserError.
    """
    # realpath, because Path.resolve raises RuntimeError for a link that leads to itself
    out, beside = Path(os.path.realpath(out)), [Path(os.path.realpath(gguf))] if gguf else []
    name = name or out.name
    if modelfile:
        beside.append(beside[0].with_name("Modelfile"))
    if gguf:
        import_gguf()
    with contextlib.ExitStack() as files:
        for path in beside:
            if path.parent != out:  # a file in `out` is moved with the folder
                files.enter_context(new_file(path))
        folder = files.enter_context(new_folder(out))
        model = read_model(source, ema)
        vocabulary = gguf and read_vocabulary(
            model.tokenizer, tokenizer_json(model.tokenizer), PROBE)
        write_folder(folder, out, model, dtype, name)
        written = [folder / path.name if path.parent == out else path for path in beside]
        if gguf:
            write_gguf(written[0], model.weights, model.config, vocabulary, gguf_type, name,
                       model.license)
        if modelfile:
            text = modelfile_text(written[0].name, model.config["block_size"])
            write_atomically(written[1], lambda file: file.write(text.encode("utf-8")))
    if gguf and (note := context_note(model.config["block_size"])):
        print(note, file=sys.stderr)
    return out


def write_folder(folder, out, model, dtype, name):
    """Write the files of a Model into `folder`, which becomes `out`. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    eot, block_size = model.tokenizer.eot, model.config["block_size"]
    weights = hf_weights(model.weights, model.config["vocab_size"], getattr(torch, dtype))
    files = tokenizer_files(model.tokenizer, block_size)
    files["config.json"] = json_bytes(hf_config(model.config, eot, dtype))
    files["generation_config.json"] = json_bytes(
        {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot})
    files["README.md"] = model_card(model, name).encode("utf-8")
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise UserError(f"cannot write {out} ({error}): make room, or name another") from error
    for file_name, content in files.items():
        (folder / file_name).write_bytes(content)
    # safetensors makes its file readable by its owner only
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def check_repo_name(name):
    """Raise UserError unless `name` has the form USER/NAME of a hub repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--push_to_hub {name} is not the name of a repository: give USER/NAME")


def push_to_hub(folder, name, private):
    """
    Upload a folder to the hub repository `name`, which is created if it does not exist. Returns the
    repository's URL. Raises UserError if the upload fails; the folder stays.
    """
    from huggingface_hub import create_repo, upload_folder
    try:
        url = create_repo(name, private=private or None, exist_ok=True)
        upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by gpt2-lab")
        return str(url)
    except Exception as error:  # of the library, of its HTTP client or of the system
        raise UserError(
            f"{folder} is complete, but {name} could not be uploaded ({error}): log in with "
            f"hf auth login or set HF_TOKEN, check the network, and run: hf upload "
            f"{'--private ' if private else ''}{name} {folder}") from error


def parse_args():
    """Parse the command line. Raises UserError for flags that are wrong, or lack their partner."""
    parser = make_parser(__doc__)
    parser.add_argument("source", help="a checkpoint, a log folder for its newest checkpoint, a "
                                       "Hugging Face folder or a hub name")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--ema", action="store_true", help=EMA_HELP)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="number format of the folder's weights (%(default)s)")
    parser.add_argument("--gguf", metavar="FILE.gguf",
                        help="also write this GGUF file (needs pip install gguf)")
    # f16 halves the file, and every backend of llama.cpp computes with it. It is what llama.cpp's
    # converter takes for weights in float32, too
    parser.add_argument("--gguf_type", choices=tuple(GGUF_TYPES),
                        help="number format of its matrices (f16)")
    parser.add_argument("--modelfile", action="store_true",
                        help="also write an Ollama Modelfile beside the GGUF file")
    parser.add_argument("--push_to_hub", metavar="USER/NAME",
                        help="upload the folder to this hub repository, and create it if needed")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    args = parser.parse_args()
    if args.push_to_hub:
        check_repo_name(args.push_to_hub)
    elif args.private:
        raise UserError("--private is about the repository of --push_to_hub: give both flags")
    if args.gguf and not args.gguf.endswith(".gguf"):
        raise UserError(f"--gguf {args.gguf} must end in .gguf, because programs find these files "
                        "by their ending")
    if not args.gguf and (args.gguf_type or args.modelfile):
        flag = "--modelfile" if args.modelfile else "--gguf_type"
        raise UserError(f"{flag} is about the file of --gguf: give both flags")
    return args


def main():
    """Export as the command line says, and upload the folder if --push_to_hub is given."""
    args = parse_args()
    # ends the script by an exception, as Ctrl-C does, so that nothing is left
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    gguf_type = args.gguf_type or "f16"
    out = export(args.source, args.out, args.dtype, args.push_to_hub, args.gguf, gguf_type,
                 args.modelfile, args.ema)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {len(list(out.iterdir()))} files, {size / 1e6:.1f} MB")
    if args.gguf:
        path = Path(args.gguf).resolve()
        print(f"{path}: {gguf_type}, {path.stat().st_size / 1e6:.1f} MB")
        if args.modelfile:
            print(f"{path.with_name('Modelfile')}: ollama create NAME -f Modelfile")
    if args.push_to_hub:
        print(f"uploaded to {push_to_hub(out, args.push_to_hub, args.private)}")


if __name__ == "__main__":
    run_main(main, output_may_be_lost=True)
