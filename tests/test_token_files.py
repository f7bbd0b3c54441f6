"""
Token files of nanoGPT and llm.c, written here by the rules of their formats, become the shards that
fineweb.py makes of the same text.
"""

import json
import os
import pickle
import signal
import sys

import numpy as np
import pytest
from conftest import ROOT, MakesFolderWhenUnpickled, run_script, small_text

import fineweb
from gpt2lab import shards, token_files
from gpt2lab.cli import UserError
from gpt2lab.token_files import TokenFile, open_stream, read_pieces

SHARD_SIZE = 8000  # train fills five of them
EOT = 299  # of the tokenizer of `ours`


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Shards that fineweb.py makes of forty documents, with a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("ours")
    text = small_text()
    rows = [{"text": text[start:start + 1500]} for start in range(0, len(text), 1500)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fineweb.prepare([folder / "text.jsonl"], folder / "data", "bpe:300", shard_size=SHARD_SIZE)
    return folder / "data"


def tokens_of(folder, split):
    """All token ids of a split, 1-D."""
    return np.concatenate([np.load(path) for path in shards.find_shards(folder, split)])


def save_llmc(path, ids, **changes):
    """Save a token file as llm.c does. `changes` are numbers of the header, by their names."""
    header = np.zeros(256, "<i4")
    header[:3] = list(({"magic": 20240520, "version": 1, "count": len(ids)} | changes).values())
    path.write_bytes(header.tobytes() + np.asarray(ids, "<u2").tobytes())
    return path


def save_nanogpt(path, ids):
    """Save token ids as nanoGPT does."""
    np.asarray(ids, "<u2").tofile(path)
    return path


def write_nanogpt_files(folder, ours):
    """Files of nanoGPT with the documents of `ours`: end-of-text comes after each document."""
    return [save_nanogpt(folder / f"{split}.bin", [*tokens_of(ours, split)[1:], EOT])
            for split in ("train", "val")]


def write_llmc_files(folder, ours):
    """Files of llm.c with the documents of `ours`: those of train are cut in a document."""
    train, val = tokens_of(ours, "train"), tokens_of(ours, "val")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    return [save_llmc(folder / "a" / "fineweb_train_000002.bin", train[12_345:]),
            save_llmc(folder / "b" / "fineweb_train_000001.bin", train[:12_345]),
            save_llmc(folder / "fineweb_val_000000.bin", val)]


def import_files(files, ours, out):
    """import_tokens with the tokenizer and the shard size of `ours`."""
    return fineweb.import_tokens(files, out, ours / "tokenizer.json", shard_size=SHARD_SIZE)


def contents(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -----------------------------------------------------------------------------
# what is imported


@pytest.mark.parametrize("write", [write_nanogpt_files, write_llmc_files])
def test_imported_shards_are_those_of_the_same_text(ours, tmp_path, capsys, write):
    """Guards against lost tokens, moved end-of-texts, wrong totals, and another order of files."""
    out = tmp_path / "out"
    meta, expected = import_files(write(tmp_path, ours), ours, out), shards.read_meta(ours)
    for key in ("format_version", "vocab_size", "eot", "dtype", "splits", "shards",
                "tokenizer_file", "tokenizer_sha256"):
        assert meta[key] == expected[key], key
    assert meta == shards.read_meta(out)
    assert len(meta["shards"]) == 6 and meta["splits"]["train"]["documents"] > 30
    files = contents(out)
    assert set(files) == set(contents(ours))
    assert all(files[name] == data for name, data in contents(ours).items() if name != "meta.json")
    shards.verify(out)
    shards.print_stats(out)
    assert "out is whole: 6 shards" in capsys.readouterr().out


def test_a_file_that_is_named_twice_is_read_once(ours, tmp_path, monkeypatch):
    """Guards against doubled tokens, of a link or of another spelling of a path."""
    monkeypatch.chdir(tmp_path)
    files = write_nanogpt_files(tmp_path, ours)
    (tmp_path / "link_train.bin").symlink_to(files[0])
    meta = import_files([*files, "train.bin", "link_train.bin"], ours, tmp_path / "out")
    assert meta["splits"] == shards.read_meta(ours)["splits"]


def test_gpt2_tokens_without_documents_are_one_document(gpt2_tokenizer, tmp_path, call_main):
    """Guards against a nanoGPT folder without end-of-text, as its Shakespeare has, that fails."""
    text = "To be, or not to be: that is the question — 这是问题。😀\n" * 20
    ids = gpt2_tokenizer.encode(text)
    train_file, val_file = tmp_path / "train.bin", tmp_path / "val.bin"
    save_nanogpt(train_file, ids)
    save_nanogpt(val_file, ids[:50])
    code, out, err = call_main(fineweb, "--import", train_file, val_file, "--out", tmp_path / "out")
    assert code == 0 and "next: python train_gpt2.py --data_dir" in out, err
    meta = shards.read_meta(tmp_path / "out")
    assert meta["splits"]["train"] == {
        "tokens": len(ids) + 1, "documents": 1, "bytes": len(text.encode())}
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("gpt2", 50257, "uint16")
    assert tokens_of(tmp_path / "out", "train").tolist() == [50256, *ids]


@pytest.mark.parametrize("files, expected", [
    ([[1, 2, 9, 3, 9]], [9, 1, 2, 9, 3]), ([[9, 1, 9, 2]], [9, 1, 9, 2]),
    ([[9, 1], [2, 9]], [9, 1, 2, 9]), ([[1, 2], [3], [4, 5, 9]], [9, 1, 2, 3, 4, 5]),
    ([[1, 2, 3, 4]], [9, 1, 2, 3, 4]), ([[9]], [9]), ([[1], [9]], [9, 1]), ([[1]], [9, 1])])
def test_any_part_of_a_split_is_read(tmp_path, monkeypatch, files, expected):
    """Guards against a token that is lost or doubled where files, pieces or shards meet."""
    monkeypatch.setattr(token_files, "PIECE_TOKENS", 2)
    listed = [TokenFile(save_llmc(tmp_path / f"val{i}", ids), "val", 1024, len(ids))
              for i, ids in enumerate(files)]
    stream = open_stream(listed, "val", 9)
    assert stream.num_tokens == len(expected)
    for start in range(len(expected)):
        for end in range(start + 1, len(expected) + 1):
            pieces = [piece for _, piece in read_pieces(stream, start, end, 9)]
            assert max(map(len, pieces)) <= 2
            assert np.concatenate(pieces).tolist() == expected[start:end]


# runs fineweb.py, which is killed with half of the second shard of train in a temporary file
IMPORT_UNTIL_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import fineweb
from gpt2lab import token_files
original = token_files.write_atomically
def kill(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
def write(path, write_content):
    original(path, kill if path.name == "edufineweb_train_000002.npy" else write_content)
token_files.write_atomically = write
fineweb.main()
"""


def test_a_killed_import_is_finished_by_the_same_command(ours, tmp_path, call_main):
    """Guards against a half-done folder that looks finished, or that ends up as another one."""
    files = write_nanogpt_files(tmp_path, ours)
    out = tmp_path / "out"
    command = ["--import", *files, "--tokenizer", ours / "tokenizer.json",
               "--shard_size", SHARD_SIZE, "--out"]
    done = run_script("-c", IMPORT_UNTIL_KILLED, ROOT, *command, out)
    assert done.returncode == (-signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    assert (out / "edufineweb_train_000001.npy").exists() and not (out / "meta.json").exists()
    with pytest.raises(UserError, match="is half done"):
        shards.read_meta(out)
    for change in ("--max_tokens 99", "--shard_size 9000"):  # other commands do not touch it
        before = contents(out)
        assert call_main(fineweb, *command, out, *change.split())[0] == 2
        assert contents(out) == before
    finished = (out / "edufineweb_train_000001.npy").stat()
    assert call_main(fineweb, *command, out)[0] == 0
    assert (out / "edufineweb_train_000001.npy").stat().st_mtime_ns == finished.st_mtime_ns
    assert call_main(fineweb, *command, tmp_path / "at_once")[0] == 0
    assert contents(out) == contents(tmp_path / "at_once")
    assert "is complete" in call_main(fineweb, *command, out)[1]
    assert contents(out) == contents(tmp_path / "at_once")


def test_a_changed_file_is_not_mixed_with_what_was_imported_before(ours, tmp_path, monkeypatch):
    """Guards against shards of two versions of a file in one folder."""
    files = write_nanogpt_files(tmp_path, ours)
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_splits", lambda *args: sys.exit(1))
        with pytest.raises(SystemExit):
            import_files(files, ours, tmp_path / "out")
    files[0].write_bytes(files[0].read_bytes() + b"\0\0")
    with pytest.raises(UserError, match="token files have changed since"):
        import_files(files, ours, tmp_path / "out")


# -----------------------------------------------------------------------------
# what is refused


def write_nothing(path):
    path.write_bytes(b"")


def write_odd(path):
    path.write_bytes(b"\1\0\2\0\3")


def write_header_only(path):
    save_llmc(path, [])


def write_short(path):
    save_llmc(path, [1, 2, 3], count=4)


def write_long(path):
    save_llmc(path, [1, 2, 3], count=2)


def write_negative(path):
    save_llmc(path, [1, 2, 3], count=-3)


def write_version_2(path):
    save_llmc(path, [1, 2, 3], version=2)


def write_half_a_header(path):
    save_llmc(path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:100])


def write_llama(path):
    save_llmc(path, [1, 2, 3], magic=20240801, version=7)


def write_uint32(path):
    np.arange(200, dtype="<u4").tofile(path)


def write_large_id(path):
    save_nanogpt(path, [1, 2, 300])


def write_characters(path):
    save_nanogpt(path, [1, 2, 3])
    path.with_name("meta.pkl").write_bytes(pickle.dumps(MakesFolderWhenUnpickled()))


def write_folder(path):
    path.mkdir()


def write_loop(path):
    path.symlink_to(path.name)


def remove(path):
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("name, write, message", [
    ("train.bin", write_nothing, "train.bin is empty"),
    ("train.bin", write_odd, "train.bin has an odd number of bytes, 5"),
    ("train.bin", write_header_only, "train.bin is empty"),
    ("train.bin", write_short, "but llm.c's header of such a file is [20240520, 1, 3]"),
    ("train.bin", write_long, "[20240520, 1, 2]"), ("train.bin", write_negative, "[20240520, 1"),
    ("train.bin", write_version_2, "the header [20240520, 2, 3]"),
    ("train.bin", write_half_a_header, "train.bin is cut off in its header"),
    ("train.bin", write_uint32, "seems to hold uint32 numbers"),
    ("train.bin", write_llama, "Llama 3, whose tokenizer is not one of those here: make shards"),
    ("train.bin", write_large_id, "train.bin has token id 300, but"),
    ("train.bin", write_characters, "has ids of characters, because a meta.pkl"),
    ("train.bin", write_folder, "train.bin is a folder"), ("train.bin", remove, "does not exist"),
    ("train.bin", write_loop, "train.bin does not exist"),
    ("edufineweb_train_000001.npy", write_odd, "is a shard already"),
    ("second_val.bin", write_short, "second_val.bin has 1,030 bytes"),
    ("data.bin", write_odd, "says neither that it is of train"),
    ("train_and_val.bin", write_odd, "or says both: rename it"),
    ("val.bin", remove, "none is of train: add a file with train in its name")])
def test_bad_token_files_are_named_and_nothing_is_written(
        ours, tmp_path, call_main, monkeypatch, name, write, message):
    """Guards against a traceback, a folder of nonsense, and a pickle that is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    val_file, bad_file = tmp_path / "files" / "val.bin", tmp_path / "files" / name
    write(bad_file)
    save_nanogpt(val_file, [1, 2, EOT])
    code, _, err = call_main(fineweb, "--import", val_file, bad_file, "--out", "out",
                             "--tokenizer", ours / "tokenizer.json")
    assert code == 2 and message in err, err
    assert err.count("\n") == 1 and err.startswith("fineweb.py: error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_a_large_id_anywhere_is_found(ours, tmp_path, monkeypatch):
    """Guards against ids of another tokenizer behind the first tokens of a file."""
    monkeypatch.setattr(token_files, "PIECE_TOKENS", 100)
    files = write_nanogpt_files(tmp_path, ours)
    save_nanogpt(files[0], [*tokens_of(ours, "train"), 300, 1])
    with pytest.raises(UserError, match=r"train\.bin has token id 300, but .* has only 300 tokens"):
        import_files(files, ours, tmp_path / "out")
    with pytest.raises(UserError, match="is half done"):
        shards.read_meta(tmp_path / "out")


@pytest.mark.parametrize("flags, message", [
    ("--source builtin", "--source has no meaning"), ("--max_tokens 10", "--max_tokens has no"),
    ("--val_fraction 0.2", "--val_fraction has no"), ("--num_proc 2", "--num_proc has no"),
    ("--document_separator x", "--document_separator has no"),
    ("--text_column x", "--text_column has no"), ("--keep_downloads", "--keep_downloads has no"),
    ("--verify .", "--verify has no"), ("--rank 0 --world_size 2", "the work of one process"),
    ("--tokenizer bpe:300", "name gpt2 or its file"), ("--tokenizer gpt3", "unknown tokenizer"),
    ("--shard_size 1", "--shard_size 1 must be at least 2"), ("--out ", "--out must not be empty")])
def test_flags_that_contradict_import_are_named(tmp_path, call_main, flags, message, monkeypatch):
    """Guards against a flag that is silently ignored."""
    monkeypatch.chdir(tmp_path)
    code, _, err = call_main(fineweb, "--import", "train.bin", "val.bin", *flags.split(" "))
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["notes.txt", "edufineweb_val_000000.npy", "meta.json"])
def test_a_folder_that_holds_something_is_not_written_to(ours, tmp_path, name):
    """Guards against files of two origins in one folder."""
    files = write_nanogpt_files(tmp_path, ours)
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    with pytest.raises(UserError, match="choose another --out"):
        import_files(files, ours, out)
    assert contents(out) == {name: b"{}"}
