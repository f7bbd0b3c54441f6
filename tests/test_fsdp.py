"""What FSDP sends: weights in the dtype of the matmuls, gradients in float32 and once an update."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt2

ROOT = Path(__file__).resolve().parent.parent

# argument: keywords of TrainConfig as JSON. Prints [number of calls, loss] of the update, on rank 0
COUNT_COLLECTIVES = """
import json, sys
import torch
import torch.distributed as dist
import train_gpt2

calls = []

def record(name):
    original = getattr(dist, name)

    def call(*args, **options):
        sent = options["input"] if "input" in options else args[1]
        calls.append((name, str(sent.dtype).removeprefix("torch.")))
        return original(*args, **options)

    setattr(dist, name, call)

record("all_gather_single")
record("reduce_scatter_single")
original_step = train_gpt2.training_step

def training_step(*args):
    calls.clear()
    result = original_step(*args)
    counts = {" ".join(call): calls.count(call) for call in sorted(set(calls))}
    if dist.get_rank() == 0:
        print("COUNTS", json.dumps([counts, result[0]]))
    return result

train_gpt2.training_step = training_step
train_gpt2.train(train_gpt2.TrainConfig(**json.loads(sys.argv[1])))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("options, micro_steps_reduced", [
    (dict(dtype="bfloat16"), 1), (dict(dtype="bfloat16", grad_checkpoint=True), 2)])
def test_what_is_sent_in_an_update_of_two_micro_steps(
        data_dir, tmp_path, options, micro_steps_reduced):
    """Checkpointing says that memory is short, and whole gradients until the end would take some"""
    config = dict(
        data_dir=str(data_dir), n_layer=2, n_head=2, n_embd=32, block_size=32, T=32, B=2,
        total_batch_size=256, max_steps=1, warmup_steps=1, eval_every=0, sample_every=0,
        sample_prompt="", hellaswag_every=0, plot_every=0, save_every=0, val_tokens=64,
        device="cpu", **options)
    script = tmp_path / "count.py"
    script.write_text(COUNT_COLLECTIVES)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script),
         json.dumps(config | {"fsdp": True, "log_dir": str(tmp_path / "fsdp")})],
        capture_output=True, text=True, timeout=180, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("COUNTS"))
    counts, loss = json.loads(line.removeprefix("COUNTS "))
    alone = train_gpt2.train(train_gpt2.TrainConfig(**config, log_dir=str(tmp_path / "alone")))
    assert loss == pytest.approx(alone["train_loss"], rel=1e-3)
    # two blocks, and a group of the embeddings and LayerNorms, in two micro-steps. Blocks
    # are gathered again for backward
    assert counts == {"all_gather_single bfloat16": 2 * 2 * 2,
                      "all_gather_single float32": 2,
                      "reduce_scatter_single float32": 3 * micro_steps_reduced}
