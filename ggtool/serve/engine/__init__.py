"""A model in a child process: continuous batching over the sequences of one loaded model.

`requests` crosses the process boundary; `child` is the process, `scheduler` its loop, `llama_sequences` and
`torch_sequences` the two runtimes under it; `process` is the parent's side.
"""
