"""ggtool's own engine: GPT-2 and the Llama-like families without transformers' modules, one CUDA graph a token on a GPU,
one call of C++ a token on a CPU.

model.py         a decoder as the engine holds it
read_modules.py  made of a loaded checkpoint, float or packed
read_gguf.py     made of a GGUF file
shapes.py        how the product of each matrix is cut
prompt.py        a prompt's forward pass, in torch
step.py          one token's: the kernels, their buffers, their graphs
engine.py        prompts in, tokens out
split.py         a model cut for several GPUs
rank_steps.py    one token's on them
ranks.py         the engine over them
backend.py       a checkpoint by the engine
gguf_backend.py  a GGUF file by it

text_cache.py    on a CPU: the keys and values of one text
host_steps.py    one token's, in C++
host_backend.py  a packed checkpoint
"""
