"""Shards are right after restarts, by several processes, with bad rows, and from a failing hub."""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, run_script, small_text, tiny_config
from fake_hub import FakeHub
from tqdm import tqdm

import fineweb
import sample
import train_gpt2
from fineweb import prepare
from gpt2lab import shards, sources
from gpt2lab.cli import UserError
from gpt2lab.tokenizer import Tokenizer, cut_long_line, read_tokenizer, train_bpe, train_spm

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


def test_changed_sources_are_refused_and_added_ones_are_left_out(
        many_files, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([many_files], out, "bpe:300", shard_size=1000)
    (many_files / "e.txt").write_text("added")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fineweb, "write_shards", interrupt)
        prepare([many_files], out, "bpe:300", shard_size=1000)
    assert f"left out what was not there when {out} was begun: " in capsys.readouterr().err
    (many_files / "d.txt").write_text("something else")
    with pytest.raises(UserError, match=r"sources have changed.*d\.txt"):
        prepare([many_files], out, "bpe:300", shard_size=1000)


def test_max_tokens_is_kept_exactly(many_files, tmp_path, call_main):
    code, out, _ = call_main(fineweb, "--source", many_files, "--tokenizer", "bpe:300",
                             "--max_tokens", "5K", "--shard_size", "1.5K", "--out",
                             tmp_path / "out")
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
        assert process.wait(600) == 0, process.stderr.read()
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
    own = tmp_path / "out" / "downloads" / "stdin.txt"  # a file of the user
    own.parent.mkdir(parents=True)
    own.write_text("precious")
    done = subprocess.run(
        [sys.executable, str(FINEWEB), "--source", "-", "-", "--tokenizer", "bpe:300", "--out",
         "out"], input=small_text(9000).encode(), cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    val, train = stored_documents(tmp_path / "out")
    assert train + val == small_text(9000)
    assert own.read_text() == "precious" and not (tmp_path / "out" / fineweb.DOWNLOADS).exists()


def test_half_done_folder_of_an_earlier_version_is_finished_from_standard_input(
        tmp_path, monkeypatch):
    """Earlier versions kept standard input in downloads/stdin.txt, and no document_separator."""
    text = small_text(60_000)
    complete, half_done = tmp_path / "complete", tmp_path / "half_done"

    def prepare_from_stdin(out):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        return prepare(["-"], out, "bpe:300", shard_size=1000)

    def interrupt(self, position):
        flush(self, position)
        if len(self.state["shards"]) == 5:
            raise KeyboardInterrupt

    flush = fineweb.ShardWriter.flush
    prepare_from_stdin(complete)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fineweb.ShardWriter, "flush", interrupt)
        prepare_from_stdin(half_done)
    (half_done / fineweb.DOWNLOADS).rename(half_done / "downloads")
    state_file = half_done / "in_progress_0.json"
    state = json.loads(state_file.read_text(encoding="utf-8"))
    del state["recipe"]["document_separator"]
    state["inputs"][0][0] = str(half_done / "downloads" / "stdin.txt")
    state_file.write_text(json.dumps(state), encoding="utf-8")
    first = half_done / "edufineweb_val_000000.npy"
    mtime = first.stat().st_mtime_ns
    assert prepare_from_stdin(half_done)["shards"] == shards.read_meta(complete)["shards"]
    assert first.stat().st_mtime_ns == mtime
    assert (half_done / "downloads" / "stdin.txt").is_file()  # who knows whose it is


@pytest.mark.parametrize("name, spec", [("tokenizer.json", "bpe:300"), ("tokenizer.json", "gpt2"),
                                        ("tokenizer.spm", "bpe:300"), ("meta.json", "bpe:300")])
def test_files_of_the_user_are_not_overwritten(many_files, tmp_path, monkeypatch, name, spec):
    bpe = train_bpe([small_text()], 300)
    monkeypatch.setattr(fineweb, "make_tokenizer", lambda spec, training_texts=None: bpe)
    (tmp_path / name).write_text("{}")
    refusal = pytest.raises(UserError, match=f"{name}|was made with")
    with contextlib.nullcontext() if spec == "gpt2" else refusal:
        bpe.model = None if spec == "gpt2" else bpe.model
        prepare([many_files], tmp_path, spec)
    assert (tmp_path / name).read_text() == "{}"


def test_output_folder_that_cannot_be_is_refused_before_the_work(many_files, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "open_corpus", None)
    (tmp_path / "file").write_text("precious")
    for out in ("file", "file/out"):
        with pytest.raises(UserError, match=r"cannot write to .*file is not a folder"):
            prepare([many_files], tmp_path / out, "bpe:300")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot write to"):
        prepare([many_files], tmp_path / "out", "bpe:300")


def test_shard_that_does_not_fit_into_memory_is_refused(many_files, tmp_path):
    with pytest.raises(UserError, match=r"1,000,000,000,000,000 tokens does not fit.*shard_size"):
        prepare([many_files], tmp_path / "out", "bpe:300", shard_size=10**15)


def test_environment_of_other_programs_does_no_harm(monkeypatch):
    two = {"RANK": "1", "WORLD_SIZE": "2"}
    for environment, argv, expected in (
            ({"RANK": "", "WORLD_SIZE": ""}, [], (0, 1)), ({"RANK": "1"}, [], (0, 1)),
            (two, [], (1, 2)), (two, ["--rank", "3", "--world_size", "4"], (3, 4)),
            ({"WORLD_SIZE": "x"}, [], "WORLD_SIZE is 'x'"),
            (two | {"RANK": "x"}, [], "RANK is 'x'"), (two | {"RANK": "5"}, [], "RANK is 5"),
            ({}, ["--rank", "1"], "rank 1 must be")):
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *argv])
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if isinstance(expected, str):
            with pytest.raises(UserError, match=expected):
                fineweb.parse_args()
        else:
            args = fineweb.parse_args()
            assert (args.rank, args.world_size) == expected


def test_work_for_a_small_file_does_not_grow_with_the_number_of_files(tmp_path, monkeypatch):
    """Sizes are summed once, and the progress bar is not redrawn for each file."""
    num_additions = num_drawings = 0

    class CountedSize(int):
        def __radd__(self, other):
            nonlocal num_additions
            num_additions += 1
            return other + int(self)

    class CountedBar(tqdm):
        def display(self, *args, **options):
            nonlocal num_drawings
            num_drawings += 1

    monkeypatch.setattr(fineweb, "tqdm", functools.partial(CountedBar, mininterval=1e9))
    inputs = []
    for n in range(200):
        (tmp_path / f"{n:03d}.txt").write_text(f"file {n}\n" * 20)
        inputs.append(sources.Input(str(tmp_path / f"{n:03d}.txt"), CountedSize(160)))
    monkeypatch.setattr(sources, "list_inputs", lambda *args: inputs)
    prepare([tmp_path], tmp_path / "out", "bpe:300")
    assert num_additions <= 3 * len(inputs) and num_drawings < 10


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux pins processes")
def test_threads_are_as_many_as_the_cpus_that_the_process_is_pinned_to(many_files, tmp_path):
    code = ("import os, sys, runpy; os.environ.pop('RAYON_NUM_THREADS', None); "
            "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
            "print('threads', os.environ['RAYON_NUM_THREADS'])")
    done = run_script("-c", code, FINEWEB, "--source", many_files, "--tokenizer", "bpe:300",
                      "--out", tmp_path / "out", env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.endswith("threads 1\n"), done.stderr


def test_trained_tokenizer_sees_text_also_if_the_first_chunk_holds_all_of_it(tmp_path):
    (tmp_path / "a.txt").write_text(small_text(30_000), encoding="utf-8")
    meta = prepare([tmp_path / "a.txt"], tmp_path / "out", "bpe:300", shard_size=1000)
    assert meta["vocab_size"] == 300


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


def test_verify_finds_every_kind_of_damage(call_main, many_files, tmp_path, capsys):
    good = tmp_path / "good"
    prepare([many_files], good, "bpe:300", shard_size=1000)
    capsys.readouterr()
    code, out, err = call_main(fineweb, "--verify", good)
    assert (code, err) == (0, "") and out.count(" good") == len(list(good.glob("*.npy")))
    for damage, message in ((flip_a_bit, "differs from its checksum"), (os.remove, "lacks"),
                            (truncate, "truncated"),
                            (replace_by_next_shard, "differs from its checksum"),
                            (drop_first_token_of_val, "does not begin with end-of-text"),
                            (write_unknown_token_ids, "token id 999")):
        folder = tmp_path / "bad"
        shutil.copytree(good, folder)
        damage(folder / "edufineweb_train_000003.npy")
        code, out, err = call_main(fineweb, "--verify", folder)
        assert code == 2 and err.count("\n") == 1 and message in out + err
        shutil.rmtree(folder)


def test_damage_of_any_file_of_a_folder_ends_in_one_line(many_files, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    prepare([many_files / "a.jsonl"], good, "bpe:300")
    rng = random.Random(0)
    num_errors = 0
    for path in sorted(good.iterdir()) * 20:
        data = bytearray(path.read_bytes())
        start = rng.randrange(min(len(data), 200))  # the header of a shard is in front
        damages = [data[:start], data[:start] + rng.randbytes(5) + data[start + 5:],
                   data[:start] + data[start + 1:], b"{}", b""]
        shutil.copytree(good, bad)
        (bad / path.name).write_bytes(rng.choice(damages))
        for check in (shards.verify, shards.print_stats, shards.load_data_tokenizer):
            try:
                check(bad)
            except UserError:
                num_errors += 1
        shutil.rmtree(bad)
    assert num_errors > 80


def test_stats_tell_tokenizer_tokens_documents_and_first_words(call_main, data_dir):
    code, out, _ = call_main(fineweb, "--stats", data_dir)
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
    assert not (tmp_path / "out" / "in_progress_downloads").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_a_folder_downloads_of_the_user_is_not_touched(hub, tmp_path, keep):
    own = tmp_path / "out" / "downloads"
    own.mkdir(parents=True)
    for name in ("train-00000-of-00003.parquet", "mine.txt"):
        (own / name).write_text("precious")
    done = run_from_hub(hub, tmp_path, *["--keep_downloads"] * keep)
    assert done.returncode == 0, done.stderr
    assert [path.read_text() for path in own.iterdir()] == ["precious"] * 2
    assert len(list((tmp_path / "out").glob("downloads_2/*.parquet"))) == 3 * keep
    assert not (tmp_path / "out" / "in_progress_downloads").exists()


def test_hub_dataset_of_unknown_files_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args: SimpleNamespace(
        config=SimpleNamespace(data_files={"train": ["hf://datasets/me/texts@main/a.arrow"]})))
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: SimpleNamespace(
        info=lambda url: {"size": 1}))
    with pytest.raises(UserError, match=r"cannot read hf://.*a\.arrow: its name must end in"):
        sources.list_inputs(["me/texts"], None, "train")


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
    shutil.rmtree(tmp_path / "out" / "in_progress_downloads")
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


def test_model_of_chinese_poems_writes_only_whole_characters_of_them(tmp_path, call_main, capsys):
    poems = ["床前明月光，疑是地上霜。举头望明月，低头思故乡。",
             "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"]
    (tmp_path / "zh.txt").write_text("\n".join(poems * 100), encoding="utf-8")
    prepare([tmp_path / "zh.txt"], tmp_path / "zh", "bpe:400")
    train_gpt2.train(tiny_config(tmp_path / "zh", tmp_path / "log", max_steps=80, max_lr=1e-2,
                                 min_lr=1e-3, n_embd=64))
    capsys.readouterr()
    code, out, _ = call_main(sample, "--model", tmp_path / "log", "--prompt", "春眠",
                             "--temperature", 0, "--num_samples", 1, "--max_new_tokens", 30,
                             "--device", "cpu")
    assert code == 0 and out.startswith("[Sample 1] 春眠")
    text = out.removeprefix("[Sample 1] ")
    assert len(text) > 15 and set(text) <= set("".join(poems) + "\n")


def test_sentencepiece_learns_from_long_lines(tmp_path):
    pytest.importorskip("sentencepiece")
    long_line = " ".join(small_text(40_000).split())
    assert train_spm([long_line], 400).vocab_size == 400
    # in a mixed text, what only the long line says is learnt, too
    word = "floccinaucinihilipilification"
    mixed = train_spm([small_text(20_000), f"{word} " * 1000], 400)
    assert len(mixed.encode(word)) < len(word) // 2
    for line in (long_line, "梦" * 5000, "a" * 9000, " " * 5000, "short"):
        parts = cut_long_line(line)
        assert "".join(parts) == line and max(len(part.encode()) for part in parts) <= 4192
    assert all(part.startswith(" ") for part in cut_long_line(long_line)[1:])


def test_sentencepiece_model_of_text_without_spaces_keeps_spaces():
    pytest.importorskip("sentencepiece")
    tokenizer = train_spm(["床前明月光疑是地上霜\n" * 500], 269)
    assert tokenizer.decode(tokenizer.encode("a  b 明月")) == "a  b 明月"


@pytest.mark.parametrize("changes", [
    {}, {"byte_fallback": False}, {"normalization_rule_name": "nmt_nfkc"},
    {"add_dummy_prefix": True}, {"remove_extra_whitespaces": True}, {"eos_id": -1,
     "user_defined_symbols": "<|endoftext|>"}])
def test_sentencepiece_model_that_changes_text_is_refused(tmp_path, changes):
    sentencepiece = pytest.importorskip("sentencepiece")
    options = dict(
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, bos_id=-1, eos_id=1, pad_id=-1, unk_id=0, minloglevel=2)
    options |= changes
    if options["eos_id"] == 1:
        options["eos_piece"] = "<|endoftext|>"
    with open(tmp_path / "my.spm", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(small_text().splitlines()), model_writer=file, vocab_size=400,
            **options)
    if not changes:
        assert read_tokenizer(tmp_path / "my.spm").vocab_size == 400
        return
    with pytest.raises(UserError, match=r"my\.spm (changes text|makes end-of-text).*byte_fallback"):
        read_tokenizer(tmp_path / "my.spm")


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
