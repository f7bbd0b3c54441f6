"""What makes shards dependable: restarts, several processes, bad rows, a hub that misbehaves."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

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


@pytest.fixture
def many_files(tmp_path):
    """Four files of different kinds, 40 documents and one long one."""
    folder = tmp_path / "in"
    folder.mkdir()
    text = small_text(40_000)
    documents = [text[i:i + 1000] for i in range(0, len(text), 1000)]
    for name, part in (("a", documents[:15]), ("b", documents[15:30])):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": documents[30:]}), folder / "c.parquet")
    (folder / "d.txt").write_text(text, encoding="utf-8")
    return folder


def contents(folder):
    """{file name: bytes} of a finished folder, without the differing paths of its recipe."""
    meta = {k: v for k, v in shards.read_meta(folder).items() if k not in ("recipe", "inputs")}
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "meta.json"} | meta


def all_text(folder):
    """Everything in a folder, val first, documents joined by a mark."""
    tokenizer = shards.load_data_tokenizer(folder)
    paths = shards.find_shards(folder, "val") + shards.find_shards(folder, "train")
    tokens = np.concatenate([np.load(p) for p in paths])
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))[1:]
    return [tokenizer.decode(part[1:]) for part in parts]


# restarts


def test_ten_kills_change_nothing(many_files, tmp_path):
    command = ["--source", many_files, "--tokenizer", "bpe:300", "--shard_size", "150"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script(ROOT / "fineweb.py", *command, "--out", whole).returncode == 0
    total = len(list(whole.glob("*.npy")))
    assert total > 150
    finished = {}  # mtime of every shard that was on record when we killed
    chance = random.Random(0)
    kills = 0
    for n in range(1, 11):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "fineweb.py"), *map(str, command), "--out", str(killed)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(killed.glob("*.npy"))) < n * total // 12:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.01)
        kills += process.poll() is None
        process.kill()
        process.wait()
        state = json.loads((killed / "in_progress_0.json").read_text(encoding="utf-8"))
        for shard in state["shards"]:
            finished.setdefault(shard["name"], (killed / shard["name"]).stat().st_mtime_ns)
        assert not (killed / "meta.json").exists()
    assert kills == 10
    with pytest.raises(UserError, match="half done"):
        shards.read_meta(killed)
    assert run_script(ROOT / "fineweb.py", *command, "--out", killed).returncode == 0
    assert contents(killed) == contents(whole)
    assert len(finished) > total // 2
    for name, mtime in finished.items():  # nothing was done twice
        assert (killed / name).stat().st_mtime_ns == mtime


def test_any_number_of_threads_gives_the_same_bytes(many_files, tmp_path):
    for num_proc in (1, 2, 7):
        prepare([many_files], tmp_path / str(num_proc), "bpe:300", shard_size=999,
                num_proc=num_proc, max_tokens=7777)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "7")


def test_text_read_again_gives_the_bytes_of_text_kept_in_memory(many_files, tmp_path, monkeypatch):
    read_inputs, reads = sources.read_inputs, []
    monkeypatch.setattr(sources, "read_inputs",
                        lambda *args: reads.append(1) or read_inputs(*args))
    for kept_bytes in (10**8, 50_000, 0):  # the whole is 80,000
        monkeypatch.setattr(fineweb, "KEPT_BYTES", kept_bytes)
        prepare([many_files], tmp_path / str(kept_bytes), "bpe:300", shard_size=50_000)
    assert len(reads) == 1 + 3 + 3  # to measure, to train the tokenizer and to write
    assert contents(tmp_path / "100000000") == contents(tmp_path / "50000")
    assert contents(tmp_path / "100000000") == contents(tmp_path / "0")


def test_changed_sources_are_refused(many_files, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_shards", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare([many_files], out, "bpe:300", shard_size=1000)
    (many_files / "d.txt").write_text("something else")
    with pytest.raises(UserError, match=r"sources have changed.*d\.txt"):
        prepare([many_files], out, "bpe:300", shard_size=1000)


def test_max_tokens_is_exact(many_files, tmp_path, call):
    code, out, _ = call(fineweb, "--source", many_files, "--tokenizer", "bpe:300", "--max_tokens",
                        "5K", "--shard_size", "1.5K", "--out", tmp_path / "out")
    assert code == 0 and "val: 500 tokens" in out and "train: 4,500 tokens" in out
    lengths = [len(np.load(p)) for p in sorted((tmp_path / "out").glob("*.npy"))]
    assert sorted(lengths) == [500, 1500, 1500, 1500]
    meta = shards.read_meta(tmp_path / "out")
    text = "".join(all_text(tmp_path / "out"))
    assert sum(meta["splits"][s]["bytes"] for s in ("val", "train")) == len(text.encode())


# several processes


def test_ranks_share_the_files(many_files, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    options = dict(tokenizer="bpe:300", shard_size=700)
    prepare([many_files], one, **options)
    command = [sys.executable, str(ROOT / "fineweb.py"), "--source", str(many_files), "--tokenizer",
               "bpe:300", "--shard_size", "700", "--out", str(many)]
    ranks = [subprocess.Popen(command, env=os.environ | {"RANK": str(r), "WORLD_SIZE": "3"},
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                 for r in range(3)]
    for process in ranks:
        assert process.wait(60) == 0, process.stderr.read()
    assert sorted(all_text(many)) == sorted(all_text(one))
    assert not list(many.glob("part_*")) and not list(many.glob("in_progress*"))
    shards.verify(many)
    train_gpt2.DataLoaderLite(many, "train", 2, 32).batch(0)
    a, b = shards.read_meta(one)["splits"], shards.read_meta(many)["splits"]
    for key in ("documents", "bytes", "tokens"):
        assert sum(a[s][key] for s in a) == sum(b[s][key] for s in b)


def test_the_folder_is_complete_when_the_last_rank_is_done(many_files, tmp_path):
    options = dict(tokenizer="bpe:300", shard_size=700, world_size=2)
    assert prepare([many_files], tmp_path / "out", rank=1, **options) is None
    with pytest.raises(UserError, match="half done"):
        shards.read_meta(tmp_path / "out")
    assert prepare([many_files], tmp_path / "out", rank=1, **options) is None  # again: no harm
    assert prepare([many_files], tmp_path / "out", rank=0, **options)["shards"]
    with pytest.raises(UserError, match="world_size 2, not 1"):
        prepare([many_files], tmp_path / "out", tokenizer="bpe:300", shard_size=700)


# bad rows


@pytest.mark.parametrize("kept_bytes", [10**8, 0])
def test_bad_rows_are_named_counted_and_skipped(tmp_path, capsys, monkeypatch, kept_bytes):
    monkeypatch.setattr(fineweb, "KEPT_BYTES", kept_bytes)  # a small corpus is read once, or twice
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


def test_a_wrong_parquet_column_is_named(many_files, tmp_path):
    with pytest.raises(UserError, match=r"no column 'body'.*can be one of text"):
        prepare([many_files / "c.parquet"], tmp_path / "out", "bpe:300", text_column="body")


def test_standard_input(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "fineweb.py"), "--source", "-", "--tokenizer", "bpe:300",
         "--out", "out"], input=small_text(9000).encode(), cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    train, val = sorted(all_text(tmp_path / "out"), key=len, reverse=True)
    assert train + val == small_text(9000)
    assert not (tmp_path / "out" / "downloads").exists()


# a look at a folder


def test_verify_finds_every_damage(call, many_files, tmp_path, capsys):
    good = tmp_path / "good"
    prepare([many_files], good, "bpe:300", shard_size=1000)
    capsys.readouterr()
    code, out, err = call(fineweb, "--verify", good)
    assert (code, err) == (0, "") and out.count(" good") == len(list(good.glob("*.npy")))
    victim = "edufineweb_train_000003.npy"

    def flip(path):
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)

    def swap(path):
        shutil.copy(path.with_name("edufineweb_train_000004.npy"), path)

    def wrong_start(path):
        val = np.load(path.with_name("edufineweb_val_000000.npy"))
        np.save(path.with_name("edufineweb_val_000000.npy"), val[1:])

    for damage, message in ((flip, "differs from its checksum"), (lambda p: p.unlink(), "lacks"),
                            (lambda p: p.write_bytes(p.read_bytes()[:99]), "truncated"),
                            (swap, "differs from its checksum"),
                            (wrong_start, "does not open with end-of-text"),
                            (lambda p: np.save(p, np.full(1000, 999, np.uint16)), "token id 999")):
        folder = tmp_path / "bad"
        shutil.copytree(good, folder)
        damage(folder / victim)
        code, out, err = call(fineweb, "--verify", folder)
        assert code == 2 and err.count("\n") == 1 and message in out + err
        shutil.rmtree(folder)


def test_stats_describe_a_folder(call, data_dir):
    code, out, _ = call(fineweb, "--stats", data_dir)
    assert code == 0 and "bpe:300, 300 tokens" in out
    totals = shards.read_meta(data_dir)["splits"]["train"]
    assert f"train: 1 shards, {totals['tokens']:,} tokens, 1 documents" in out
    assert repr(small_text()[:50])[1:-1] in out


def test_training_refuses_mixed_and_missing_shards(many_files, tmp_path):
    prepare([many_files], tmp_path / "a", "bpe:300", shard_size=1000)
    prepare([many_files / "d.txt"], tmp_path / "b", "bpe:300", shard_size=1000)
    victim = tmp_path / "a" / "edufineweb_train_000002.npy"
    shutil.copy(tmp_path / "b" / victim.name, victim)
    with pytest.raises(UserError, match=r"train_000002\.npy is not the shard that meta\.json"):
        train_gpt2.DataLoaderLite(tmp_path / "a", "train", 1, 8)
    victim.unlink()
    with pytest.raises(UserError, match=r"lacks edufineweb_train_000002\.npy"):
        train_gpt2.DataLoaderLite(tmp_path / "a", "train", 1, 8)
    last = max((tmp_path / "b").glob("*train*"))
    last.unlink()
    with pytest.raises(UserError, match=f"lacks {last.name}"):
        train_gpt2.DataLoaderLite(tmp_path / "b", "train", 1, 8)


# the hub


def dataset_files(tmp_path, lines=20):
    """Three parquet files of 30 documents, {path: bytes}."""
    files = {}
    for i in range(3):
        rows = [f"document {n} of file {i}\n" * lines for n in range(30)]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "part.parquet")
        files[f"train-0000{i}-of-00003.parquet"] = (tmp_path / "part.parquet").read_bytes()
    return files


@pytest.fixture
def hub(tmp_path):
    server = FakeHub({"datasets/me/texts": dataset_files(tmp_path)})
    yield server
    server.shutdown()


EXPECTED = [f"document {n} of file {i}\n" * 20 for i in range(3) for n in range(30)]


def run_from_hub(hub, cwd, *flags, source="me/texts", patience=True):
    """Run fineweb.py on the fake hub; without patience, no waiting between attempts."""
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cwd / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [ROOT / "fineweb.py", "--source", source, "--tokenizer", "bpe:300", "--out", "out",
               "--shard_size", 2000, *flags]
    if not patience:
        code = ("import runpy, sys, time; time.sleep = lambda s: None; "
                "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
        command = ["-c", code, *command]
    return run_script(*command, cwd=cwd, env=env | {"PYTHONPATH": str(ROOT)})


def test_hub_dataset_is_read_file_by_file(hub, tmp_path):
    done = run_from_hub(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert all_text(tmp_path / "out") == EXPECTED
    assert len(hub.downloads) == 3  # the tokenizer's sample did not cost a second download
    left = [p for p in tmp_path.rglob("*.parquet") if p.parent != tmp_path]
    assert not left  # each file was dropped when it was done
    # complete: nothing is asked of the hub again
    hub.shutdown()
    assert "out is complete" in run_from_hub(hub, tmp_path).stdout


def test_a_misbehaving_hub_costs_time_but_no_data(hub, tmp_path):
    hub.faults = [429, 500, "cut", "short", 503, "cut"]
    done = run_from_hub(hub, tmp_path, "--keep_downloads", patience=False)
    assert done.returncode == 0, done.stderr
    assert not hub.faults and all_text(tmp_path / "out") == EXPECTED
    assert len(list((tmp_path / "out" / "downloads").glob("*.parquet"))) == 3


def test_retry_after_is_honoured():
    class Response:
        headers = {"Retry-After": "7"}  # noqa: RUF012

    error = OSError("busy")
    assert sources.retry_after(error) is None
    error.response = Response()
    assert sources.retry_after(error) == 7


def test_a_hub_that_stays_down_costs_one_line_and_what_is_done_stays(hub, tmp_path):
    last, files = "train-00002-of-00003.parquet", dataset_files(tmp_path, lines=2400)
    good, files[last] = files[last], b"PAR1 not parquet"
    hub.repositories["datasets/me/texts"] = files
    (tmp_path / "bpe.json").write_text(train_bpe([small_text()], 300).model, encoding="utf-8")
    # trained, so that no sample has to be read first; one thread, so that little is under way
    ready = ("--tokenizer", "bpe.json", "--num_proc", 1, "--shard_size", 20_000)
    done = run_from_hub(hub, tmp_path, *ready)
    assert done.returncode == 2 and "no readable parquet" in done.stderr.splitlines()[-1]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.npy")}
    assert before
    shutil.rmtree(tmp_path / "out" / "downloads")
    files[last] = good
    hub.faults = [503, "for ever"]
    done = run_from_hub(hub, tmp_path, *ready, patience=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert all(word in last for word in ("error: cannot download", "HF_ENDPOINT", "HF_TOKEN",
                                         "HF_HUB_OFFLINE"))
    hub.faults = []
    done = run_from_hub(hub, tmp_path, *ready)
    assert done.returncode == 0, done.stderr
    assert len(all_text(tmp_path / "out")) == 90
    assert all(p.stat().st_mtime_ns == mtime for p, mtime in before.items())


def test_unknown_hub_dataset_costs_one_line(hub, tmp_path):
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
    code = "import tokenizer; print(Tokenizer('gpt2').encode('Hello <|endoftext|>'))"
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


# other languages


def test_chinese_from_text_to_samples(tmp_path, call, capsys):
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
    assert len(text) > 15 and set(text) <= set("".join(poems) + "\n")  # no broken characters


def test_sentencepiece_tokenizer(tmp_path):
    pytest.importorskip("sentencepiece")
    text = "床前明月光，疑是地上霜。举头望明月，低头思故乡。\n" * 50 + small_text(20_000)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    meta = prepare([tmp_path / "a.txt"], tmp_path / "out", "spm:600")
    assert (meta["tokenizer"], meta["vocab_size"]) == ("spm:600", 600)
    tokenizer = shards.load_data_tokenizer(tmp_path / "out")
    for sample_text in ("明月 and 乡\n", "two  spaces\tand\n\nlines", "😀 rare", "<|endoftext|>"):
        ids = tokenizer.encode(sample_text)
        assert tokenizer.decode(ids) == sample_text and tokenizer.eot not in ids
    assert "".join(all_text(tmp_path / "out")[::-1]) == text
    model = tmp_path / "out" / "tokenizer.spm"
    assert Tokenizer(**tokenizer.state()).encode("明月") == tokenizer.encode("明月")
    assert model.is_file()


def test_a_tokenizer_file_is_used_as_it_is(tmp_path, many_files):
    trained = train_bpe([small_text()], 350)
    (tmp_path / "mine.json").write_text(trained.model, encoding="utf-8")
    meta = prepare([many_files], tmp_path / "out", tmp_path / "mine.json")
    assert meta["vocab_size"] == 350
    used = shards.load_data_tokenizer(tmp_path / "out")
    assert used.encode("a test") == trained.encode("a test")
    (tmp_path / "mine.json").write_text('{"not": "a tokenizer"}')
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        prepare([many_files], tmp_path / "out2", tmp_path / "mine.json")
