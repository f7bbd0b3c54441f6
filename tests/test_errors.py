"""What a user can get wrong costs one line on stderr and exit code 2, and touches nothing."""

import shutil

import numpy as np
import pytest
from conftest import ROOT, TINY, run_script

import fineweb
import hellaswag
import sample
import train_gpt2


@pytest.fixture
def broken_data(data_dir, tmp_path):
    """A copy of the shards, and one function for each way to damage it."""
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    train_shard = folder / "edufineweb_train_000001.npy"

    def no_shards():
        shutil.rmtree(folder)

    def val_only():
        train_shard.unlink()

    def truncated():
        train_shard.write_bytes(train_shard.read_bytes()[:5000])

    def foreign():
        np.save(train_shard, np.zeros((10, 10)))

    def other_tokenizer():
        np.save(train_shard, np.full(5000, 40_000, np.uint16))

    def damaged_meta():
        (folder / "meta.json").write_text("{")

    def no_tokenizer():
        (folder / "tokenizer.json").unlink()

    return folder, locals()


@pytest.mark.parametrize("damage, message", [
    ("no_shards", "run python fineweb.py"), ("val_only", "no train shard"),
    ("truncated", "000001.npy is truncated"), ("foreign", "2-D float64"),
    ("other_tokenizer", "token id 40000"), ("damaged_meta", "meta.json is damaged"),
    ("no_tokenizer", "tokenizer.json is missing")])
def test_bad_shards(call, broken_data, tmp_path, damage, message):
    folder, damages = broken_data
    damages[damage]()
    expect_one_line(call, tmp_path, message, "--data_dir", folder)


@pytest.mark.parametrize("flags, message", [
    # 256 tokens = 8 sequences of 32
    (("--B", 3), "nearest --B that do: 2, 4"), (("--B", 16), "nearest --B that do: 8"),
    (("--total_batch_size", 100), "nearest that are: 96, 128"),
    (("--total_batch_size", 10), "nearest that are: 32"),
    (("--T", 64), "longer than block_size 32"), (("--n_head", 3), "not divisible by n_head 3"),
    (("--device", "tpu9"), "unknown device 'tpu9'"), (("--device", "cuda:99"), "no device cuda:99"),
    (("--preset", "huge"), "invalid choice: 'huge'"), (("--model", "gpt5"), "invalid choice"),
    (("--dtype", "int3"), "invalid choice"), (("--B", "many"), "invalid int value"),
    (("--no_such_flag", 1), "unrecognized arguments"), (("--B", 0), "--B 0 must be"),
    (("--max_lr", "nan"), "--max_lr nan must be"), (("--n_layer", 0), "must be"),
    (("--init_from", "no/such/thing"), "no such file or folder: no/such/thing")])
def test_bad_flags(call, data_dir, tmp_path, flags, message):
    expect_one_line(call, tmp_path, message, "--data_dir", data_dir, *flags)


def expect_one_line(call, tmp_path, message, *flags):
    """Run train_gpt2.py with flags that must fail with `message`."""
    common = [x for name, value in TINY.items() for x in (f"--{name}", value)]
    log_dir = tmp_path / "log"
    code, _, err = call(train_gpt2, *common, "--log_dir", log_dir, *flags)
    assert code == 2 and message in err
    assert err.count("\n") == 1 and err.startswith("train_gpt2.py: error: ")
    assert not log_dir.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_no_checkpoint(call, tmp_path, data_dir, content):
    path = tmp_path / "model_00001.pt"
    path.write_bytes(content)
    for module, flags in ((sample, ("--model", path)), (sample, ("--model", tmp_path)),
                          (hellaswag, ("--model", path, "--data", write_example(tmp_path)))):
        code, out, err = call(module, *flags, "--device", "cpu")
        assert code == 2 and "no checkpoint of train_gpt2.py" in err and str(path) in err
        assert err.count("\n") == 1 and out == ""
    expect_one_line(call, tmp_path, "no checkpoint", "--data_dir", data_dir, "--init_from", path)
    assert path.read_bytes() == content


def write_example(folder):
    path = folder / "examples.jsonl"
    path.write_text('{"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": 0}\n')
    return path


def test_models_that_are_not_there(call, tmp_path):
    for model, message in ((tmp_path, "holds neither"), (tmp_path / "a" / "b", "no such file")):
        code, _, err = call(sample, "--model", model, "--device", "cpu")
        assert code == 2 and message in err and err.count("\n") == 1


def test_hub_out_of_reach(tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run_script(ROOT / "sample.py", "--model", "gpt2", cwd=tmp_path, env=env)
    assert done.returncode == 2 and "HF_ENDPOINT" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("content, message", [
    (b"", "no text"), ("你好".encode("gbk"), "not UTF-8")])
def test_bad_text(call, tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    code, _, err = call(fineweb, "--source", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_as_a_process_too(tmp_path):
    done = run_script(ROOT / "train_gpt2.py", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "edu_fineweb10B does not exist" in done.stderr
    assert not list(tmp_path.iterdir())
