"""Shards are right after restarts, by several processes, with bad rows, and from a failing hub."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, run_script, small_text, tiny_config
from fake_hub import FakeHub

import fineweb
import sample
import train_gpt2
from fineweb import prepare
from gpt2lab import shards, sources
from gpt2lab.cli import UserError
from gpt2lab.tokenizer import Tokenizer, train_bpe

FINEWEB = ROOT / "fineweb.py"


def write_jsonl(path, texts):
    """Write a .jsonl file with one text a row."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path, texts):
    """Write a parquet file with one text a row."""
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


@pytest.fixture
def many_files(tmp_path):
    """A folder of three files with 40 documents in all and a file with one long document."""
    folder = tmp_path / "in"
    folder.mkdir()
    text = small_text(40_000)
    documents = [text[i:i + 1000] for i in range(0, len(text), 1000)]
    write_jsonl(folder / "a.jsonl", documents[:15])
    write_jsonl(folder / "b.jsonl", documents[15:30])
    write_parquet(folder / "c.parquet", documents[30:])
    (folder / "d.txt").write_text(text, encoding="utf-8")
    return folder


def folder_contents(folder):
    """{file name: bytes} of a finished folder, and meta.json's items but for the sources."""
    meta = {k: v for k, v in shards.read_meta(folder).items() if k not in ("recipe", "inputs")}
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "meta.json"} | meta


def stored_documents(folder):
    """The texts of all documents in a folder, in the order of the shards, val first."""
    tokenizer = shards.load_data_tokenizer(folder)
    paths = shards.find_shards(folder, "val") + shards.find_shards(folder, "train")
    tokens = np.concatenate([np.load(p) for p in paths])
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))[1:]
    return [tokenizer.decode(part[1:]) for part in parts]


# -----------------------------------------------------------------------------
# restarts


def kill_after(process, folder, num_shards, delay):
    """Kill a process `delay` seconds after the folder has so many shards; whether it still ran."""
    while process.poll() is None and len(list(folder.glob("*.npy"))) < num_shards:
        time.sleep(0.001)
    time.sleep(delay)
    still_ran = process.poll() is None
    process.kill()
    process.wait()
    return still_ran


def test_folder_is_the_same_after_ten_kills(many_files, tmp_path):
    flags = ["--source", many_files, "--tokenizer", "bpe:300", "--shard_size", "150"]
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    assert run_script(FINEWEB, *flags, "--out", complete).returncode == 0
    total = len(list(complete.glob("*.npy")))
    assert total > 150
    finished = {}  # time of the last change of every shard that the state listed after a kill
    rng = random.Random(0)
    for n in range(1, 11):
        process = subprocess.Popen(
            [sys.executable, str(FINEWEB), *map(str, flags), "--out", str(killed)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert kill_after(process, killed, n * total // 12, delay=rng.random() * 0.01)
        state = json.loads((killed / "in_progress_0.json").read_text(encoding="utf-8"))
        for shard in state["shards"]:
            finished.setdefault(shard["name"], (killed / shard["name"]).stat().st_mtime_ns)
        assert not (killed / "meta.json").exists()
    # folders begun by earlier versions are finished by this one, so these keys must not change
    assert list(state) == ["recipe", "inputs", "done", "next", "rows", "totals", "shards"]
    with pytest.raises(UserError, match="half done"):
        shards.read_meta(killed)
    assert run_script(FINEWEB, *flags, "--out", killed).returncode == 0
    assert folder_contents(killed) == folder_contents(complete)
    assert len(finished) > total // 2
    for name, mtime in finished.items():  # no shard was written twice
        assert (killed / name).stat().st_mtime_ns == mtime


def test_number_of_threads_does_not_change_the_bytes(many_files, tmp_path):
    for num_proc in (1, 2, 7):
        prepare([many_files], tmp_path / str(num_proc), "bpe:300", shard_size=999,
                num_proc=num_proc, max_tokens=7777)
    one, two, seven = (folder_contents(tmp_path / name) for name in "127")
    assert one == two == seven


def test_text_kept_in_memory_gives_the_same_bytes_as_text_read_again(
        many_files, tmp_path, monkeypatch):
    read_inputs, num_reads = sources.read_inputs, 0

    def counted_read(*args, **options):
        nonlocal num_reads
        num_reads += 1
        return read_inputs(*args, **options)

    monkeypatch.setattr(sources, "read_inputs", counted_read)
    for kept_bytes in (10**8, 50_000, 0):  # the corpus has 80,000 bytes
        monkeypatch.setattr(fineweb, "KEPT_BYTES", kept_bytes)
        prepare([many_files], tmp_path / str(kept_bytes), "bpe:300", shard_size=50_000)
    assert num_reads == 1 + 3 + 3  # if read again: to measure, to train the tokenizer and to write
    assert folder_contents(tmp_path / "100000000") == folder_contents(tmp_path / "50000")
    assert folder_contents(tmp_path / "100000000") == folder_contents(tmp_path / "0")


def test_changed_sources_are_refused(many_files, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([many_files], out, "bpe:300", shard_size=1000)
    (many_files / "d.txt").write_text("something else")
    with pytest.raises(UserError, match=r"sources have changed.*d\.txt"):
        prepare([many_files], out, "bpe:300", shard_size=1000)


def test_max_tokens_is_kept_exactly(many_files, tmp_path, call):
    code, out, _ = call(fineweb, "--source", many_files, "--tokenizer", "bpe:300", "--max_tokens",
                        "5K", "--shard_size", "1.5K", "--out", tmp_path / "out")
    assert code == 0 and "val: 500 tokens" in out and "train: 4,500 tokens" in out
    lengths = [len(np.load(p)) for p in sorted((tmp_path / "out").glob("*.npy"))]
    assert sorted(lengths) == [500, 1500, 1500, 1500]
    meta = shards.read_meta(tmp_path / "out")
    text = "".join(stored_documents(tmp_path / "out"))
    assert sum(meta["splits"][s]["bytes"] for s in ("val", "train")) == len(text.encode())


# -----------------------------------------------------------------------------
# several processes


def test_three_ranks_store_the_same_documents_as_one(many_files, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    prepare([many_files], one, "bpe:300", shard_size=700)
    command = [sys.executable, str(FINEWEB), "--source", str(many_files), "--tokenizer", "bpe:300",
               "--shard_size", "700", "--out", str(many)]
    ranks = [subprocess.Popen(command, env=os.environ | {"RANK": str(r), "WORLD_SIZE": "3"},
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
             for r in range(3)]
    for process in ranks:
        assert process.wait(60) == 0, process.stderr.read()
    assert sorted(stored_documents(many)) == sorted(stored_documents(one))
    assert not list(many.glob("part_*")) and not list(many.glob("in_progress*"))
    shards.verify(many)
    train_gpt2.DataLoaderLite(many, "train", 2, 32).batch(0)
    totals_of_one, totals_of_many = (shards.read_meta(folder)["splits"] for folder in (one, many))
    for key in ("documents", "bytes", "tokens"):
        assert (sum(totals[key] for totals in totals_of_one.values())
                == sum(totals[key] for totals in totals_of_many.values()))


def test_folder_is_complete_when_the_last_rank_is_done(many_files, tmp_path):
    options = dict(tokenizer="bpe:300", shard_size=700, world_size=2)
    assert prepare([many_files], tmp_path / "out", rank=1, **options) is None
    with pytest.raises(UserError, match="half done"):
        shards.read_meta(tmp_path / "out")
    assert prepare([many_files], tmp_path / "out", rank=1, **options) is None  # repeated
    assert prepare([many_files], tmp_path / "out", rank=0, **options)["shards"]
    with pytest.raises(UserError, match="world_size 2, not 1"):
        prepare([many_files], tmp_path / "out", tokenizer="bpe:300", shard_size=700)


# -----------------------------------------------------------------------------
# bad rows


@pytest.mark.parametrize("kept_bytes", [10**8, 0])  # a small corpus is read once, or twice
def test_bad_rows_are_named_counted_and_skipped(tmp_path, capsys, monkeypatch, kept_bytes):
    monkeypatch.setattr(fineweb, "KEPT_BYTES", kept_bytes)
    lines = [json.dumps({"text": f"row {i}"}) for i in range(400)]
    lines[7], lines[99], lines[300] = "{broken", '{"txt": "x"}', '{"text": null}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", "bpe:300")
    err = capsys.readouterr().err
    for number in (8, 100, 301):
        assert err.count(f"a.jsonl, line {number}: ") == 1
    assert (meta["rows_read"], meta["rows_skipped"]) == (400, 3)
    assert sum(s["documents"] for s in meta["splits"].values()) in (397, 398)
    lines[200:203] = ["null"] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"6 of 400 rows hold no text, the first is .*line 8: "):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out2", "bpe:300")
    assert not (tmp_path / "out2").exists()


def test_error_of_too_many_bad_rows_names_the_first_of_that_file(tmp_path):
    good = [json.dumps({"text": f"row {i}"}) for i in range(400)]
    for name, num_bad in (("a.jsonl", 1), ("b.jsonl", 20)):
        (tmp_path / name).write_text("\n".join(["null"] * num_bad + good), encoding="utf-8")
    with pytest.raises(UserError, match=r"20 of 420 rows hold no text, the first is .*b\.jsonl"):
        prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", "bpe:300")


def test_a_wrong_parquet_column_is_named(many_files, tmp_path):
    with pytest.raises(UserError, match=r"no column 'body'.*can be one of text"):
        prepare([many_files / "c.parquet"], tmp_path / "out", "bpe:300", text_column="body")


def test_standard_input_is_stored_as_one_document_a_split(tmp_path):
    done = subprocess.run(
        [sys.executable, str(FINEWEB), "--source", "-", "--tokenizer", "bpe:300", "--out", "out"],
        input=small_text(9000).encode(), cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    val, train = stored_documents(tmp_path / "out")
    assert train + val == small_text(9000)
    assert not (tmp_path / "out" / "downloads").exists()


# -----------------------------------------------------------------------------
# verifying and describing a folder


def flip_a_bit(path):
    """Change one bit of a token."""
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def truncate(path):
    """Keep only the first 99 bytes of a file."""
    path.write_bytes(path.read_bytes()[:99])


def replace_by_next_shard(path):
    """Overwrite the third train shard with the fourth."""
    shutil.copy(path.with_name("edufineweb_train_000004.npy"), path)


def drop_first_token_of_val(path):
    """Remove the end-of-text token with which val begins."""
    val_path = path.with_name("edufineweb_val_000000.npy")
    np.save(val_path, np.load(val_path)[1:])


def write_unknown_token_ids(path):
    """Overwrite a shard with token ids that the tokenizer does not have."""
    np.save(path, np.full(1000, 999, np.uint16))


def test_verify_finds_every_kind_of_damage(call, many_files, tmp_path, capsys):
    good = tmp_path / "good"
    prepare([many_files], good, "bpe:300", shard_size=1000)
    capsys.readouterr()
    code, out, err = call(fineweb, "--verify", good)
    assert (code, err) == (0, "") and out.count(" good") == len(list(good.glob("*.npy")))
    for damage, message in ((flip_a_bit, "differs from its checksum"), (os.remove, "lacks"),
                            (truncate, "truncated"),
                            (replace_by_next_shard, "differs from its checksum"),
                            (drop_first_token_of_val, "does not begin with end-of-text"),
                            (write_unknown_token_ids, "token id 999")):
        folder = tmp_path / "bad"
        shutil.copytree(good, folder)
        damage(folder / "edufineweb_train_000003.npy")
        code, out, err = call(fineweb, "--verify", folder)
        assert code == 2 and err.count("\n") == 1 and message in out + err
        shutil.rmtree(folder)


def test_stats_tell_tokenizer_tokens_documents_and_first_words(call, data_dir):
    code, out, _ = call(fineweb, "--stats", data_dir)
    assert code == 0 and "bpe:300, 300 tokens" in out
    totals = shards.read_meta(data_dir)["splits"]["train"]
    assert f"train: 1 shards, {totals['tokens']:,} tokens, 1 documents" in out
    assert repr(small_text()[:50])[1:-1] in out


def test_training_refuses_mixed_and_missing_shards(many_files, tmp_path):
    prepare([many_files], tmp_path / "a", "bpe:300", shard_size=1000)
    prepare([many_files / "d.txt"], tmp_path / "b", "bpe:300", shard_size=1000)
    second = tmp_path / "a" / "edufineweb_train_000002.npy"
    shutil.copy(tmp_path / "b" / second.name, second)
    with pytest.raises(UserError, match=r"train_000002\.npy is not the shard that meta\.json"):
        train_gpt2.DataLoaderLite(tmp_path / "a", "train", 1, 8)
    second.unlink()
    with pytest.raises(UserError, match=r"lacks edufineweb_train_000002\.npy"):
        train_gpt2.DataLoaderLite(tmp_path / "a", "train", 1, 8)
    last = max((tmp_path / "b").glob("*train*"))
    last.unlink()
    with pytest.raises(UserError, match=f"lacks {last.name}"):
        train_gpt2.DataLoaderLite(tmp_path / "b", "train", 1, 8)


# -----------------------------------------------------------------------------
# the hub


def hub_documents(file, lines):
    """The 30 documents of one file of the dataset on the fake hub."""
    return [f"document {n} of file {file}\n" * lines for n in range(30)]


ALL_HUB_DOCUMENTS = [text for file in range(3) for text in hub_documents(file, lines=20)]


def dataset_files(tmp_path, lines=20):
    """The three parquet files of the dataset, {path: bytes}."""
    files = {}
    for i in range(3):
        write_parquet(tmp_path / "part.parquet", hub_documents(i, lines))
        files[f"train-0000{i}-of-00003.parquet"] = (tmp_path / "part.parquet").read_bytes()
    return files


@pytest.fixture
def hub(tmp_path):
    """A FakeHub with the dataset me/texts."""
    server = FakeHub({"datasets/me/texts": dataset_files(tmp_path)})
    yield server
    server.shutdown()


def run_from_hub(hub, cwd, *flags, source="me/texts", wait=True):
    """Run fineweb.py on the fake hub. With wait=False it does not sleep between attempts."""
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cwd / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [FINEWEB, "--source", source, "--tokenizer", "bpe:300", "--out", "out",
               "--shard_size", 2000, *flags]
    if not wait:
        code = ("import runpy, sys, time; time.sleep = lambda s: None; "
                "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
        command = ["-c", code, *command]
    return run_script(*command, cwd=cwd, env=env | {"PYTHONPATH": str(ROOT)})


def test_hub_dataset_is_read_file_by_file(hub, tmp_path):
    done = run_from_hub(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert stored_documents(tmp_path / "out") == ALL_HUB_DOCUMENTS
    assert len(hub.downloads) == 3  # the tokenizer's sample did not need a second download
    left = [p for p in tmp_path.rglob("*.parquet") if p.parent != tmp_path]
    assert not left  # each file was deleted after it was read
    # a complete folder needs no hub
    hub.shutdown()
    assert "out is complete" in run_from_hub(hub, tmp_path).stdout


def test_failing_downloads_are_repeated_and_no_data_is_lost(hub, tmp_path):
    hub.faults = [429, 500, "cut", "short", 503, "cut"]
    done = run_from_hub(hub, tmp_path, "--keep_downloads", wait=False)
    assert done.returncode == 0, done.stderr
    assert not hub.faults and stored_documents(tmp_path / "out") == ALL_HUB_DOCUMENTS
    assert len(list((tmp_path / "out" / "downloads").glob("*.parquet"))) == 3


def test_retry_after_is_read_from_the_response():
    error = OSError("busy")
    assert sources.retry_after(error) is None
    error.response = SimpleNamespace(headers={"Retry-After": "7"})
    assert sources.retry_after(error) == 7


def test_hub_that_stays_down_gives_one_line_and_finished_shards_stay(hub, tmp_path):
    last, files = "train-00002-of-00003.parquet", dataset_files(tmp_path, lines=2400)
    good, files[last] = files[last], b"PAR1 not parquet"
    hub.repositories["datasets/me/texts"] = files
    (tmp_path / "bpe.json").write_text(train_bpe([small_text()], 300).model, encoding="utf-8")
    # the tokenizer is trained already, so that no sample is read first; with one thread, few chunks
    # are waiting to be written when the error comes
    flags = ("--tokenizer", "bpe.json", "--num_proc", 1, "--shard_size", 20_000)
    done = run_from_hub(hub, tmp_path, *flags)
    assert done.returncode == 2 and "not a readable parquet" in done.stderr.splitlines()[-1]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.npy")}
    assert before
    shutil.rmtree(tmp_path / "out" / "downloads")
    files[last] = good
    hub.faults = [503, "for ever"]
    done = run_from_hub(hub, tmp_path, *flags, wait=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    for words in ("error: cannot download", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        assert words in error
    hub.faults = []
    done = run_from_hub(hub, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert len(stored_documents(tmp_path / "out")) == 90
    assert all(p.stat().st_mtime_ns == mtime for p, mtime in before.items())


def test_unknown_hub_dataset_gives_one_line(hub, tmp_path):
    done = run_from_hub(hub, tmp_path, source="me/others")
    assert done.returncode == 2
    assert "error: cannot list the files of dataset me/others" in done.stderr.splitlines()[-1]
    assert "HF_ENDPOINT" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpt2_tokenizer_comes_from_the_hub_where_openai_is_blocked(real_data, tmp_path):
    cache = {p.stat().st_size: p.read_bytes() for p in (real_data / "tiktoken-cache").iterdir()}
    files = {"merges.txt": cache[456_318], "vocab.json": cache[1_042_301]}
    env = {"HF_HOME": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"),
           "HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
           "PYTHONPATH": str(ROOT)}
    code = ("from gpt2lab.tokenizer import Tokenizer; "
            "print(Tokenizer('gpt2').encode('Hello <|endoftext|>'))")
    hub = FakeHub({"openai-community/gpt2": files})
    done = run_script("-c", code, env=env | {"HF_ENDPOINT": hub.url}, cwd=tmp_path)
    assert done.stdout.strip() == "[15496, 1279, 91, 437, 1659, 5239, 91, 29]", done.stderr
    files["merges.txt"] += b"x y\n"
    shutil.rmtree(tmp_path / "hub")
    shutil.rmtree(tmp_path / "empty")
    code = "from gpt2lab import cli, tokenizer; cli.run_main(lambda: tokenizer.Tokenizer('gpt2'))"
    done = run_script("-c", code, env=env | {"HF_ENDPOINT": hub.url}, cwd=tmp_path)
    assert done.returncode == 2 and "TIKTOKEN_CACHE_DIR" in done.stderr
    hub.shutdown()


# -----------------------------------------------------------------------------
# other languages and tokenizers


def test_model_of_chinese_poems_writes_only_whole_characters_of_them(tmp_path, call, capsys):
    poems = ["床前明月光，疑是地上霜。举头望明月，低头思故乡。",
             "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"]
    (tmp_path / "zh.txt").write_text("\n".join(poems * 100), encoding="utf-8")
    prepare([tmp_path / "zh.txt"], tmp_path / "zh", "bpe:400")
    train_gpt2.train(tiny_config(tmp_path / "zh", tmp_path / "log", max_steps=80, max_lr=1e-2,
                                 min_lr=1e-3, n_embd=64))
    capsys.readouterr()
    code, out, _ = call(sample, "--model", tmp_path / "log", "--prompt", "春眠", "--temperature", 0,
                        "--num_samples", 1, "--max_new_tokens", 30, "--device", "cpu")
    assert code == 0 and out.startswith("[Sample 1] 春眠")
    text = out.removeprefix("[Sample 1] ")
    assert len(text) > 15 and set(text) <= set("".join(poems) + "\n")

def test_sentencepiece_decodes_every_text_that_it_encoded(tmp_path):
    pytest.importorskip("sentencepiece")
    text = "床前明月光，疑是地上霜。举头望明月，低头思故乡。\n" * 50 + small_text(20_000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    meta = prepare([tmp_path / "a.txt"], tmp_path / "out", "spm:600")
    assert (meta["tokenizer"], meta["vocab_size"]) == ("spm:600", 600)
    tokenizer = shards.load_data_tokenizer(tmp_path / "out")
    for sample_text in ("明月 and 乡\n", "two  spaces\tand\n\nlines", "😀 rare", "<|endoftext|>"):
        ids = tokenizer.encode(sample_text)
        assert tokenizer.decode(ids) == sample_text and tokenizer.eot not in ids
    assert "".join(stored_documents(tmp_path / "out")[::-1]) == text
    assert Tokenizer(**tokenizer.state()).encode("明月") == tokenizer.encode("明月")
    assert (tmp_path / "out" / "tokenizer.spm").is_file()


@pytest.mark.parametrize("before", ["", "\n "])  # JSON may begin with white space
def test_tokenizer_file_is_used_without_training(tmp_path, many_files, before):
    trained = train_bpe([small_text()], 350)
    (tmp_path / "mine.json").write_text(before + trained.model, encoding="utf-8")
    meta = prepare([many_files], tmp_path / "out", tmp_path / "mine.json")
    assert meta["vocab_size"] == 350
    used = shards.load_data_tokenizer(tmp_path / "out")
    assert used.encode("a test") == trained.encode("a test")
    (tmp_path / "mine.json").write_text('{"not": "a tokenizer"}')
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        prepare([many_files], tmp_path / "out2", tmp_path / "mine.json")
