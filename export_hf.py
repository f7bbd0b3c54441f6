"""
Makes a Hugging Face folder of a checkpoint: what transformers, lm-eval and the hub read.

    python export_hf.py log my_gpt2                       # the newest checkpoint in log/
    python export_hf.py log/model_05000.pt half --dtype float16
    python export_hf.py log my_gpt2 --push_to_hub USER/my_gpt2 --private
"""

import base64
import contextlib
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import torch

from gpt2lab.checkpoints import load_checkpoint, resolve_checkpoint
from gpt2lab.cli import UserError, make_parser, run_main
from gpt2lab.files import read_json
from gpt2lab.pretrained import TRANSPOSED
from gpt2lab.runlog import read_log
from gpt2lab.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    byte_level,
    byte_spelling,
    import_sentencepiece,
)

# the knobs of a run that say what came out of it; paths stay out of what others will read
RECIPE = ("total_batch_size", "T", "max_steps", "optimizer", "max_lr", "min_lr", "warmup_steps",
          "weight_decay", "beta2", "grad_clip", "shuffle", "seed", "dtype")
# what a tokenizer's export is tried on: spaces, line breaks, digits, accents, other scripts, bytes
PROBE = ("Hello,  I'm\ta café—naïve!\n\n  x = [1234.5] ﬁ Ａ e\u0301 "
         "他說：「你好」。 Привет 안녕 🙂\x00 end ")

# -----------------------------------------------------------------------------
# the model


def hf_config(shape, eot, dtype):
    """config.json as a dict, for a `shape` with the fields of GPTConfig."""
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        "vocab_size": shape["vocab_size"], "n_positions": shape["block_size"],
        "n_embd": shape["n_embd"], "n_layer": shape["n_layer"], "n_head": shape["n_head"],
        "n_inner": None, "activation_function": "gelu_new",  # the tanh form
        "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "scale_attn_weights": True,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True,
        "bos_token_id": eot, "eos_token_id": eot, "use_cache": True, "dtype": dtype}


def hf_weights(state, vocab_size, dtype):
    """
    The tensors of model.safetensors, {name: tensor}, from GPT.state_dict(). Raises UserError if
    `dtype`, a torch dtype, does not hold them.
    """
    weights = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue  # the same matrix as wte
        if name == "transformer.wte.weight":
            tensor = tensor[:vocab_size]  # the other rows only fill the matrix up
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        weights[name] = tensor.to(dtype).contiguous()
        if not weights[name].isfinite().all():
            raise UserError(f"{name} is not finite in {dtype}: use --dtype float32, or another "
                            "checkpoint if that fails too")
    return weights


# -----------------------------------------------------------------------------
# the tokenizer


def tokenizer_files(tokenizer, block_size):
    """
    {file name: bytes} from which AutoTokenizer makes the same tokenizer; without tokenizer.json
    where Hugging Face's format cannot express it.
    """
    import tokenizers
    files = {}
    if tokenizer.model is None:
        text = gpt2_json(tokenizer)
    elif tokenizer.model.startswith("{"):
        text = tokenizer.model
    else:
        text = spm_json(tokenizer)
        files["tokenizer.model"] = base64.b64decode(tokenizer.model)
    if tokenizers.Tokenizer.from_str(text).encode(PROBE).ids != tokenizer.encode(PROBE):
        print(f"warning: Hugging Face's tokenizers cannot do what the tokenizer {tokenizer.spec} "
              "does: AutoTokenizer will not load this folder")
        return files
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
              "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
              "clean_up_tokenization_spaces": False}  # "a ." stays as it is
    files["tokenizer.json"] = text.encode("utf-8")
    files["tokenizer_config.json"] = json_bytes(config)
    return files


def gpt2_json(tokenizer):
    """tokenizer.json of the gpt2 tokenizer. Its merges follow from the order of its tokens."""
    from tokenizers import models
    ids = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.eot)}
    spelling = byte_spelling()
    spell = {token: "".join(spelling[byte] for byte in token) for token in ids}
    merges = []
    for token in ids:  # in the order in which they were learned
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            place = min(range(len(parts) - 1),
                        key=lambda i: ids.get(parts[i] + parts[i + 1], len(ids)))
            parts[place:place + 2] = [parts[place] + parts[place + 1]]
        merges += [(spell[a], spell[b]) for a, b in pairwise(parts)]
    bpe = byte_level(models.BPE({spell[token]: i for token, i in ids.items()}, merges))
    bpe.add_special_tokens([END_OF_TEXT])
    return bpe.to_str()


def spm_json(tokenizer):
    """
    tokenizer.json of a SentencePiece model as spm:N trains it: unigram, with byte pieces. Where
    two segmentations are equally likely, as in a row of asterisks, it may choose the other one.
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


def last_part(name):
    """A path without its folders, which are nobody's business; hub names stay whole."""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return name if on_hub else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def describe_data(config):
    """(lines of the card, hub data sets) for the data that a run was trained on, if still there."""
    data_dir = config.get("data_dir", "")
    meta = read_json(path) if (path := Path(data_dir) / "meta.json").is_file() else {}
    sources = [last_part(source) for source in meta.get("recipe", {}).get("source", ())]
    lines = [f"Trained on `{', '.join(sources) or last_part(data_dir)}`."]
    if "splits" in meta:
        train, val = meta["splits"]["train"], meta["splits"]["val"]
        lines.append(f"{train['tokens']:,} tokens of {train['documents']:,} documents to train on, "
                     f"{val['tokens']:,} tokens held out.")
    on_hub = any(name.startswith("hf://") for name, _ in meta.get("inputs", ()))
    return lines, sources if on_hub else []


def describe_losses(log_dir, step):
    """Rows of a table: the last values that log.txt in `log_dir` has for a model of `step`."""
    with contextlib.suppress(UserError):  # a checkpoint that left its log behind
        rows = []
        for stream, name in (("train", "training loss (nats a token)"),
                             ("val", "validation loss (nats a token)"),
                             ("bits_per_byte", "validation loss (bits per byte)"),
                             ("hella", "HellaSwag accuracy (length-normalised)")):
            steps, values = read_log(log_dir).get(stream, ((), ()))
            known = [(s, value) for s, value in zip(steps, values, strict=True) if s <= step]
            if known:
                rows.append(f"| {name} | {known[-1][1]:.4f} | {known[-1][0]:,} |")
        return rows
    return []


def model_card(checkpoint, path, name):
    """README.md of an export: what the model is, its losses, data and recipe."""
    shape, step = checkpoint["model_config"], checkpoint["step"]
    config = checkpoint.get("config", {})
    data, datasets = describe_data(config)
    losses = describe_losses(path.parent, step)
    tokens = step * config.get("total_batch_size", 0)
    start = config.get("init_from")
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2"]
    front += ["datasets:", *(f"- {d}" for d in datasets)] if datasets else []
    front += ["base_model: " + last_part(start)] if start and "/" in last_part(start) else []
    lines = [
        "---", *front, "---", "", f"# {name}", "",
        f"A GPT-2 of {shape['n_layer']} layers, {shape['n_head']} heads and width "
        f"{shape['n_embd']}, with a context of {shape['block_size']:,} tokens and a vocabulary of "
        f"{shape['vocab_size']:,} (tokenizer `{last_part(checkpoint['tokenizer']['spec'])}`), "
        f"trained {f'from `{last_part(start)}`' if start else 'from scratch'} by gpt2-lab: "
        f"{step:,} updates, {tokens:,} tokens.", "",
        "```python", "from transformers import pipeline", "",
        f'pipeline("text-generation", "{name}")("Hello")', "```", "", "## Data", "", *data]
    if losses:
        lines += ["", "## Losses", "", "| measure | value | at step |", "|---|---|---|", *losses]
    lines += ["", "## Recipe", "", "| knob | value |", "|---|---|",
              *(f"| {key} | {config[key]} |" for key in RECIPE if key in config), ""]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# the folder, and the hub


def json_bytes(value):
    """A JSON file's content."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def new_folder(out):
    """The absolute path of a folder to be made. Raises UserError if something is there."""
    out = Path(out).resolve()
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name another folder, or remove it")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name another folder")
    return out


def export(source, out, dtype="float32", name=None):
    """
    Write the folder `out` from a checkpoint or log folder, whole or not at all; returns its path.
    `name` is what the model card calls the model. Raises UserError for what the user can mend.
    """
    from safetensors.torch import save_file
    out, path = new_folder(out), resolve_checkpoint(source)
    if path is None:
        raise UserError(f"{source} is neither a checkpoint nor a log folder: name one")
    checkpoint = load_checkpoint(path)
    shape, tokenizer = checkpoint["model_config"], Tokenizer(**checkpoint["tokenizer"])
    weights = hf_weights(checkpoint["model"], shape["vocab_size"], getattr(torch, dtype))
    eot = tokenizer.eot
    files = tokenizer_files(tokenizer, shape["block_size"])
    files["config.json"] = json_bytes(hf_config(shape, eot, dtype))
    files["generation_config.json"] = json_bytes(
        {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot})
    files["README.md"] = model_card(checkpoint, path, name or out.name).encode("utf-8")
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        for file_name, content in files.items():
            (temporary / file_name).write_bytes(content)
        # safetensors lets nobody else read what it writes
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        if out.is_dir():
            out.rmdir()  # empty, but Windows renames onto nothing
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only if something failed
    return out


def check_repo(name):
    """Raise UserError unless `name` is a repository as the hub names them."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--push_to_hub {name} is no name of a repository: give USER/NAME")


def push(folder, name, private):
    """Upload a folder to the hub repository `name`, made if missing; returns its address."""
    from huggingface_hub import create_repo, upload_folder
    try:
        url = create_repo(name, private=private or None, exist_ok=True)
        upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by gpt2-lab")
        return str(url)
    except Exception as error:  # the library's own, its HTTP client's and the system's
        raise UserError(
            f"{folder} is complete, but {name} could not be uploaded ({error}): log in with "
            f"hf auth login or set HF_TOKEN, check the network, and give: hf upload "
            f"{'--private ' if private else ''}{name} {folder}") from error


def parse_args():
    """The flags. Raises UserError for those that do not go together."""
    parser = make_parser(__doc__)
    parser.add_argument("source", help="a checkpoint, or a log folder: its newest one")
    parser.add_argument("out", help="the folder to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="of the weights (%(default)s)")
    parser.add_argument("--push_to_hub", metavar="USER/NAME",
                        help="upload the folder to this repository, made if missing")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    args = parser.parse_args()
    if args.push_to_hub:
        check_repo(args.push_to_hub)
    elif args.private:
        raise UserError("--private is about the repository of --push_to_hub: give that, too")
    return args


def main():
    """The command line: export, then upload if it is asked for."""
    args = parse_args()
    out = export(args.source, args.out, args.dtype, args.push_to_hub)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {len(list(out.iterdir()))} files, {size / 1e6:.1f} MB")
    if args.push_to_hub:
        print(f"uploaded to {push(out, args.push_to_hub, args.private)}")


if __name__ == "__main__":
    run_main(main)
