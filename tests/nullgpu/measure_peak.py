"""
Train two updates, without evaluation and without a checkpoint, and print the peak of the device's
memory beside what --check expects. Each argument has the flags of one run of train_gpt2.py.

    dev/nullgpu/run python -m tests.nullgpu.measure_peak "--data_dir my_data --B 64 --no_compile"

The vocabulary is GPT-2's, whatever the tokenizer of the shards is, because the logits are a large
part of the memory.
"""

import gc
import sys
from types import SimpleNamespace

import torch

import train_gpt2
from dev.nullgpu.train import imitate_the_rest
from gpt2lab import parallel, preflight, presets
from gpt2lab.tokenizer import GPT2_VOCAB_SIZE
from train_gpt2 import GPT, GPTConfig, TrainConfig


def build_model(config, vocab_size):
    """The GPT to train, with weights that nobody has drawn, because drawing them takes seconds."""
    return GPT.empty(GPTConfig(**presets.model_sizes(config, vocab_size)))


def leave_out_what_takes_no_memory():
    """Make train_gpt2.py train models with GPT-2's vocabulary, and do nothing else."""
    preflight.read_meta = lambda data_dir: {"vocab_size": GPT2_VOCAB_SIZE}
    train_gpt2.shards.load_data_tokenizer = lambda data_dir: SimpleNamespace(
        vocab_size=GPT2_VOCAB_SIZE)
    train_gpt2.build_model = build_model
    train_gpt2.evaluate = lambda *args: False
    train_gpt2.checkpoints.Saver.save = lambda *args, **options: None


def main():
    """For each run, print the memory line of --check and "peak: N bytes"."""
    imitate_the_rest()
    leave_out_what_takes_no_memory()
    for flags in sys.argv[1:]:
        argv = [*flags.split(), "--max_steps", "2", "--hellaswag_every", "0", "--plot_every", "0"]
        _, config = presets.parse_command_line(TrainConfig, __doc__, argv)
        preflight.report_preflight(config, GPTConfig)
        train_gpt2.train(config)
        # torch does not count what a replayed graph uses, but the graph's memory stays reserved
        graphs = parallel.uses_cuda_graphs(config, torch.device("cuda"))
        measure = torch.cuda.max_memory_reserved if graphs else torch.cuda.max_memory_allocated
        print(f"peak: {measure()} bytes", flush=True)
        # forget this run, so that the next one is alone
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
