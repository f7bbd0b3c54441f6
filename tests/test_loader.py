"""The data loader: a batch is a pure function of the step, for every number of processes."""

import itertools
import json

import numpy as np
import pytest
import torch

from gpt2lab import shards
from gpt2lab.cli import UserError
from gpt2lab.tokenizer import GPT2_VOCAB_SIZE
from train_gpt2 import DataLoaderLite

T = 8
LENGTHS = {"val_000000": 100, "train_000001": 83, "train_000002": 7, "train_000003": 58,
           "train_000004": 161}  # 10 + 0 + 7 + 20 train sequences; shard 2 is too short for one


@pytest.fixture
def shard_dir(tmp_path):
    """A folder of shards in which each token id is 1000 * index of the shard + position in it."""
    for name, length in LENGTHS.items():
        tokens = np.arange(length) + 1000 * int(name[-1])
        np.save(tmp_path / f"edufineweb_{name}.npy", tokens.astype(np.uint16))
    np.save(tmp_path / "edufineweb_train_000009.npy.tmp.npy", np.zeros(3))  # not a shard
    (tmp_path / "meta.json").write_text(json.dumps(
        {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB_SIZE}))
    return tmp_path


def first_tokens_of_step(folder, step, B, world_size, grad_accum_steps, **options):
    """The first token of each sequence that the ranks together see in a step."""
    starts = []
    for rank in range(world_size):
        loader = DataLoaderLite(folder, "train", B, T, rank, world_size,
                                grad_accum_steps=grad_accum_steps, **options)
        for micro_step in range(grad_accum_steps):
            x, y = loader.batch(step, micro_step)
            assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
            assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y, x + 1)
            starts += x[:, 0].tolist()
    return starts


def test_without_shuffle_sequences_come_in_the_order_of_the_file(shard_dir):
    expected = [1000 * shard + T * i for shard, n in ((1, 10), (3, 7), (4, 20)) for i in range(n)]
    seen = [start for step in range(37)
            for start in first_tokens_of_step(shard_dir, step, 1, 1, 1, shuffle=False)]
    assert seen == expected


def test_every_epoch_sees_every_sequence_once_in_its_own_order(shard_dir):
    loader = DataLoaderLite(shard_dir, "train", 37, T)
    assert loader.num_sequences == 37
    orders, cuts = [], []  # of each epoch: the sequences' numbers in their order, the first cut
    for epoch in range(5):
        starts = loader.batch(epoch)[0][:, 0].tolist()
        cut = shards.first_cut(1337, epoch, T)
        # which sequence it is: the last of a shard may begin before its place in the row of cuts
        last = {1: 83 - T - 1, 3: 58 - T - 1, 4: 161 - T - 1}
        order = []
        for start in starts:
            shard, position = divmod(start, 1000)
            order.append((shard, -(-(position - cut) // T)))
            assert position in (cut + T * order[-1][1], last[shard])
        assert sorted(order) == [(shard, i) for shard, n in ((1, 10), (3, 7), (4, 20))
                                 for i in range(n)]
        orders.append(order)
        cuts.append(cut)
    assert cuts[0] == 0 and len(set(cuts)) > 2
    assert all(a != b for a, b in itertools.pairwise(orders))
    other = DataLoaderLite(shard_dir, "train", 37, T, seed=1)
    assert other.batch(0)[0][:, 0].tolist() != loader.batch(0)[0][:, 0].tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("B, world_size, grad_accum_steps",
                         [(6, 2, 1), (4, 3, 1), (1, 12, 1), (3, 2, 2), (2, 1, 6), (1, 1, 12)])
def test_step_sees_the_same_sequences_for_every_B_and_number_of_processes(
        shard_dir, B, world_size, grad_accum_steps, shuffle):
    # with 12 sequences a step and 37 an epoch, the epoch changes within steps 3 and 6
    for step in range(8):
        one_batch = first_tokens_of_step(shard_dir, step, 12, 1, 1, shuffle=shuffle)
        many_batches = first_tokens_of_step(shard_dir, step, B, world_size, grad_accum_steps,
                                            shuffle=shuffle)
        assert sorted(many_batches) == sorted(one_batch)


def test_batch_does_not_depend_on_what_was_read_before(shard_dir):
    used = DataLoaderLite(shard_dir, "train", 3, T)
    for step in range(40):
        used.batch(step)
    fresh = DataLoaderLite(shard_dir, "train", 3, T)
    assert torch.equal(used.batch(5)[0], fresh.batch(5)[0])


def test_token_ids_beyond_the_vocabulary_are_refused_and_the_shard_is_named(shard_dir):
    (shard_dir / "meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 4100}))
    with pytest.raises(UserError, match=r"train_000004\.npy has token id 4160.*4100"):
        DataLoaderLite(shard_dir, "train", 1, T)


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:-10]), "truncated"),
    (lambda path: path.write_bytes(b"not numpy at all"), "truncated or not a .npy"),
    (lambda path: path.write_bytes(b""), "truncated or not a .npy"),
    (lambda path: np.save(path, np.zeros((3, 4))), "2-D float64")])
def test_files_that_are_not_whole_shards_are_named(shard_dir, damage, message):
    damage(shard_dir / "edufineweb_train_000003.npy")
    with pytest.raises(UserError, match="edufineweb_train_000003.npy.*" + message):
        DataLoaderLite(shard_dir, "train", 1, T)


def test_error_for_missing_data_names_the_command_to_run(shard_dir, tmp_path):
    with pytest.raises(UserError, match=r"does not exist.*run python fineweb\.py"):
        DataLoaderLite(tmp_path / "nowhere", "train", 1, T)
    for path in shard_dir.glob("edufineweb_train*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no train shard.*run python fineweb\.py"):
        DataLoaderLite(shard_dir, "train", 1, T)
    with pytest.raises(UserError, match="smaller --T"):
        DataLoaderLite(shard_dir, "val", 1, 100)
