"""Errors that a user can cause: one line on stderr, exit code 2, and nothing is written."""

import argparse
import shutil
from dataclasses import make_dataclass

import numpy as np
import pytest
from conftest import ROOT, run_script, tiny_flags

import fineweb
import hellaswag
import sample
import train_gpt2
from gpt2lab.cli import add_options, env_rank, option


def expect_one_line(call_main, tmp_path, message, *flags):
    """Run train_gpt2.py with flags that must fail with `message` and must not make a log folder."""
    log_dir = tmp_path / "log"
    code, _, err = call_main(train_gpt2, *tiny_flags(log_dir=log_dir), *flags)
    assert code == 2 and message in err
    assert err.count("\n") == 1 and err.startswith("train_gpt2.py: error: ")
    assert not log_dir.exists()


# shards


TRAIN_SHARD = "edufineweb_train_000001.npy"


def remove_folder(folder):
    shutil.rmtree(folder)


def remove_train_shard(folder):
    (folder / TRAIN_SHARD).unlink()


def truncate_train_shard(folder):
    content = (folder / TRAIN_SHARD).read_bytes()
    (folder / TRAIN_SHARD).write_bytes(content[:5000])


def write_another_array(folder):
    np.save(folder / TRAIN_SHARD, np.zeros((10, 10)))


def write_too_large_token_ids(folder):
    np.save(folder / TRAIN_SHARD, np.full(5000, 40_000, np.uint16))


def damage_meta_json(folder):
    (folder / "meta.json").write_text("{")


def remove_tokenizer_json(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("damage, message", [
    (remove_folder, "run python fineweb.py"), (remove_train_shard, "no train shard"),
    (truncate_train_shard, "000001.npy is truncated"), (write_another_array, "2-D float64"),
    (write_too_large_token_ids, "token id 40000"), (damage_meta_json, "meta.json is damaged"),
    (remove_tokenizer_json, "tokenizer.json is missing")])
def test_damaged_shards(call_main, data_dir, tmp_path, damage, message):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    damage(folder)
    expect_one_line(call_main, tmp_path, message, "--data_dir", folder)


# the command line


@pytest.mark.parametrize("flags, message", [
    # an update of 256 tokens is 8 sequences of 32 tokens
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
def test_bad_flags(call_main, data_dir, tmp_path, flags, message):
    expect_one_line(call_main, tmp_path, message, "--data_dir", data_dir, *flags)


@pytest.mark.parametrize("value, rank", [(None, 0), ("", 0), ("3", 3)])
def test_an_empty_RANK_counts_as_unset(monkeypatch, value, rank):
    monkeypatch.setenv("WORLD_SIZE", "4")
    if value is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert env_rank() == rank


def test_options_whose_types_are_strings_become_flags():
    """Guards against a dataclass in a file with `from __future__ import annotations`."""
    config_class = make_dataclass("Options", [
        ("size", "int | None", option(None, "a number")),
        ("fast", "bool", option(False, "a switch"))])
    parser = argparse.ArgumentParser()
    add_options(parser, config_class)
    assert vars(parser.parse_args(["--size", "3", "--fast"])) == {"size": 3, "fast": True}
    assert vars(parser.parse_args(["--fast", "--no_fast"])) == {"size": None, "fast": False}


# models


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_not_a_checkpoint(call_main, tmp_path, data_dir, content):
    path = tmp_path / "model_00001.pt"
    path.write_bytes(content)
    for module, flags in ((sample, ("--model", path)), (sample, ("--model", tmp_path)),
                          (hellaswag, ("--model", path, "--data", write_example(tmp_path)))):
        code, out, err = call_main(module, *flags, "--device", "cpu")
        assert code == 2 and "not a checkpoint of train_gpt2.py" in err and str(path) in err
        assert err.count("\n") == 1 and out == ""
    expect_one_line(call_main, tmp_path, "not a checkpoint", "--data_dir", data_dir,
                    "--init_from", path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [1, 100, 5000, 50_000, -100])
def test_a_checkpoint_that_is_still_being_written(call_main, log_dir, tmp_path, size):
    path = tmp_path / "model_00006.pt.0.tmp"
    path.write_bytes((log_dir / "model_00006.pt").read_bytes()[:size])
    code, out, err = call_main(sample, "--model", path, "--device", "cpu")
    assert code == 2 and "is damaged: name another" in err and str(path) in err
    assert err.count("\n") == 1 and out == ""


def write_example(folder):
    """Write a file with one HellaSwag example; returns its path."""
    path = folder / "examples.jsonl"
    path.write_text('{"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": 0}\n')
    return path


def test_a_model_that_does_not_exist(call_main, tmp_path):
    for model, message in ((tmp_path, "holds neither"), (tmp_path / "a" / "b", "no such file")):
        code, _, err = call_main(sample, "--model", model, "--device", "cpu")
        assert code == 2 and message in err and err.count("\n") == 1


def test_an_unreachable_hub(tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run_script(ROOT / "sample.py", "--model", "gpt2", cwd=tmp_path, env=env)
    assert done.returncode == 2 and "HF_ENDPOINT" in done.stderr
    assert done.stderr.count("\n") == 1


# texts, and a script as a process


@pytest.mark.parametrize("content, message", [
    (b"", "no text"), ("你好".encode("gbk"), "not UTF-8")])
def test_a_text_file_without_utf8_text(call_main, tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    code, _, err = call_main(fineweb, "--source", tmp_path / "a.txt", "--tokenizer", "bpe:300",
                             "--out", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_data_in_a_process_of_its_own(tmp_path):
    done = run_script(ROOT / "train_gpt2.py", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "edu_fineweb10B does not exist" in done.stderr
    assert not list(tmp_path.iterdir())
