"""
What the scripts share. This package imports only itself, and importing it imports nothing else, so
that fineweb.py stays free of torch.

cli           errors in one line, flags from a dataclass, ranks and CPUs from the environment
streams       standard streams that print any text and may go away
files         writing whole files, JSON, checksums
shards        the shard format: names, meta.json, opening, finishing and verifying a folder
sources       where text comes from: files, Hugging Face datasets, the builtin corpus
token_files   token files of nanoGPT and llm.c
tokenizer     gpt2, bpe:N and spm:N behind one class
kernels       optimize(model): the same results, faster and in less memory
optim         Muon and 8-bit AdamW
generate      KV cache, drawing a token, the sampling loop
scoring       prefix trees and the losses of continuations
tasks         HellaSwag's examples, as text and as tokens
benchmarks    what evaluate.py and training score: CORE, LAMBADA, WikiText, a text
core          CORE's tasks, as text and as tokens
harness       the tasks of lm-eval
downloads     official files of benchmarks
checkpoints   saving, finding and resuming
pretrained    weights and tokenizers in Hugging Face's format
gguf_file     GGUF files, for llama.cpp, Ollama and LM Studio
foreign       checkpoints of nanoGPT, build-nanogpt and llm.c
runlog        log.txt and run.json, TensorBoard, wandb, trackio
report        the lines that a run prints, and updates that are not finite
device        device, dtype, autocast, prefetching, memory, seeds, MFU
distributed   the process group, sums over ranks, naming a rank that died
parallel      FSDP, compiling with a fallback, which options go together
signals       SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 during training
lock          one run at a time in a log folder
budget        --minutes
presets       the demo, values for known machines, batch sizes that fit
preflight     --check
"""
