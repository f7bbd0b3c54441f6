"""
Exports a checkpoint as a Hugging Face folder, which transformers, lm-eval and the hub read.

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
    byte_spelling,
    import_sentencepiece,
    make_byte_level_bpe,
)

# the options of a run that its model card lists. Paths of this machine are not published
MODEL_CARD_KEYS = ("total_batch_size", "T", "max_steps", "optimizer", "max_lr", "min_lr",
                   "warmup_steps", "weight_decay", "beta2", "grad_clip", "shuffle", "seed", "dtype")
# the text on which an exported tokenizer must agree with ours: long words, spaces, line breaks,
# digits, accents, other scripts, bytes
PROBE = ("An international dictionary of representative attributes, collections and assignments. "
         "Hello,  I'm\ta café—naïve!\n\n  x = [1234.5] ﬁ Ａ e\u0301 "
         "他說：「你好」。 Привет 안녕 🙂\x00 end ")

# -----------------------------------------------------------------------------
# the model


def hf_config(model_config, eot, dtype):
    """
    The content of config.json. model_config is a dict with the fields of GPTConfig, eot the id of
    end-of-text, dtype a name such as "float32".
    """
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        "vocab_size": model_config["vocab_size"], "n_positions": model_config["block_size"],
        "n_embd": model_config["n_embd"], "n_layer": model_config["n_layer"],
        "n_head": model_config["n_head"], "n_inner": None,
        "activation_function": "gelu_new",  # the tanh form
        "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "scale_attn_weights": True,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True,
        "bos_token_id": eot, "eos_token_id": eot, "use_cache": True, "dtype": dtype}


def hf_weights(state, vocab_size, dtype):
    """
    The tensors of model.safetensors, {name: tensor} in `dtype`, from GPT.state_dict(). Raises
    UserError for a value that is not finite, for example because it is too large for float16.
    """
    weights = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue  # the same matrix as wte
        if name == "transformer.wte.weight":
            tensor = tensor[:vocab_size]  # the other rows are padding
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
    {file name: bytes} from which AutoTokenizer builds the same tokenizer. If Hugging Face's format
    cannot express the tokenizer, prints a warning and leaves out tokenizer.json.
    """
    import tokenizers
    files = {}
    if tokenizer.model is None:
        text = gpt2_tokenizer_json(tokenizer)
    elif tokenizer.model.startswith("{"):
        text = tokenizer.model
    else:
        text = spm_tokenizer_json(tokenizer)
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


def loss_rows(log_dir, step):
    """
    Rows of the card's table of losses: the last value of each measure that log.txt has up to a
    step. [] if the folder has no log.
    """
    try:
        log = read_log(log_dir)
    except UserError:
        return []  # the checkpoint was moved away from its log
    rows = []
    for stream, measure in (("train", "training loss (nats a token)"),
                            ("val", "validation loss (nats a token)"),
                            ("bits_per_byte", "validation loss (bits per byte)"),
                            ("hella", "HellaSwag accuracy (length-normalised)")):
        steps, values = log.get(stream, ((), ()))
        known = [(at, value) for at, value in zip(steps, values, strict=True) if at <= step]
        if known:
            at, value = known[-1]
            rows.append(f"| {measure} | {value:.4f} | {at:,} |")
    return rows


def model_card(checkpoint, path, name):
    """README.md of an export: what the model is, its losses, data and recipe."""
    model_config, step = checkpoint["model_config"], checkpoint["step"]
    config = checkpoint.get("config", {})  # a checkpoint of build-nanogpt has none
    data_dir = config.get("data_dir", "")
    meta_path = Path(data_dir) / "meta.json"
    meta = read_json(meta_path) if meta_path.is_file() else {}  # the data may be gone by now
    datasets, losses = hub_datasets(meta), loss_rows(path.parent, step)
    tokens = step * config.get("total_batch_size", 0)
    init_from = config.get("init_from")
    origin = f"from `{public_name(init_from)}`" if init_from else "from scratch"
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2"]
    if datasets:
        front += ["datasets:", *(f"- {dataset}" for dataset in datasets)]
    if init_from and "/" in public_name(init_from):  # a hub name
        front.append("base_model: " + public_name(init_from))
    lines = [
        "---", *front, "---", "", f"# {name}", "",
        f"A GPT-2 of {model_config['n_layer']} layers, {model_config['n_head']} heads and width "
        f"{model_config['n_embd']}, with a context of {model_config['block_size']:,} tokens and a "
        f"vocabulary of {model_config['vocab_size']:,} (tokenizer "
        f"`{public_name(checkpoint['tokenizer']['spec'])}`), trained {origin} by gpt2-lab: "
        f"{step:,} updates, {tokens:,} tokens.", "",
        "```python", "from transformers import pipeline", "",
        f'pipeline("text-generation", "{name}")("Hello")', "```", "",
        "## Data", "", *data_lines(meta, data_dir)]
    if losses:
        lines += ["", "## Losses", "", "| measure | value | at step |", "|---|---|---|", *losses]
    lines += ["", "## Recipe", "", "| knob | value |", "|---|---|",
              *(f"| {key} | {config[key]} |" for key in MODEL_CARD_KEYS if key in config), ""]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# writing the folder and uploading it


def json_bytes(value):
    """The content of a JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


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
    # a folder that is there already, for example a mounted one or the current one, stays
    temporary = (out if out.is_dir() else out.parent) / f"{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make {out} ({error.strerror}): name another folder") from error
    try:
        yield temporary
        if out.is_dir():
            for path in temporary.iterdir():
                path.rename(out / path.name)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # is not there any more, or is in the way


def export(source, out, dtype="float32", name=None):
    """
    Write the folder `out` from a checkpoint or log folder, and return its absolute path. If
    anything fails, no folder is left. `name` is the model's name in the model card, by default the
    folder's. Raises UserError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    out, path = Path(out).resolve(), resolve_checkpoint(source)
    if path is None:
        raise UserError(f"{source} is neither a checkpoint nor a log folder: name one")
    with new_folder(out) as folder:
        checkpoint = load_checkpoint(path)
        model_config, tokenizer = checkpoint["model_config"], Tokenizer(**checkpoint["tokenizer"])
        weights = hf_weights(checkpoint["model"], model_config["vocab_size"], getattr(torch, dtype))
        eot = tokenizer.eot
        files = tokenizer_files(tokenizer, model_config["block_size"])
        files["config.json"] = json_bytes(hf_config(model_config, eot, dtype))
        files["generation_config.json"] = json_bytes(
            {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot})
        files["README.md"] = model_card(checkpoint, path, name or out.name).encode("utf-8")
        try:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise UserError(f"cannot write {out} ({error}): make room, or name another") from error
        for file_name, content in files.items():
            (folder / file_name).write_bytes(content)
        # safetensors makes its file readable by its owner only
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
    return out


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
    """Parse the command line. Raises UserError for a bad repository name or a lone --private."""
    parser = make_parser(__doc__)
    parser.add_argument("source", help="a checkpoint, or a log folder for its newest checkpoint")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="number format of the weights (%(default)s)")
    parser.add_argument("--push_to_hub", metavar="USER/NAME",
                        help="upload the folder to this hub repository, and create it if needed")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    args = parser.parse_args()
    if args.push_to_hub:
        check_repo_name(args.push_to_hub)
    elif args.private:
        raise UserError("--private is about the repository of --push_to_hub: give both flags")
    return args


def main():
    """Export as the command line says, and upload the folder if --push_to_hub is given."""
    args = parse_args()
    out = export(args.source, args.out, args.dtype, args.push_to_hub)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {len(list(out.iterdir()))} files, {size / 1e6:.1f} MB")
    if args.push_to_hub:
        print(f"uploaded to {push_to_hub(out, args.push_to_hub, args.private)}")


if __name__ == "__main__":
    run_main(main, output_may_be_lost=True)
