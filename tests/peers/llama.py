"""llama.cpp on one GGUF, as one line of JSON: llama.py MODEL.gguf THREADS.

The library's own calls, as llama-bench and llama-batched-bench make them; flash attention on, its default batch sizes.
"""

import ctypes
import json
import resource
import statistics
import sys
import time

import llama_cpp as llama

PROMPT, STEPS, SEQUENCES, SHORT_PROMPT = 757, 24, 8, 16


class Model:
    def __init__(self, path, threads, sequences):
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = 2048, sequences
        parameters.n_batch = 2048
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.kv_unified = True
        self.context = llama.llama_init_from_model(self.model, parameters)
        if not self.context:
            sys.exit(f"llama.cpp does not load {path}")
        self.batch = llama.llama_batch_init(2048, 0, 1)

    def run(self, tokens):
        """Runs (token, position, sequence), with logits for the last of each sequence, and says how long that took."""
        last = {sequence: index for index, (_, _, sequence) in enumerate(tokens)}
        self.batch.n_tokens = len(tokens)
        for index, (token, position, sequence) in enumerate(tokens):
            self.batch.token[index], self.batch.pos[index] = token, position
            self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, sequence
            self.batch.logits[index] = last[sequence] == index
        start = time.perf_counter()
        if llama.llama_decode(self.context, self.batch) != 0:
            sys.exit("llama.cpp does not run the batch")
        llama.llama_synchronize(self.context)
        return time.perf_counter() - start

    def clear(self):
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)


def token(index):
    return 300 + index * 7919 % 31000


def warm(path):
    """Reads the file once, so that the page cache has it."""
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def main():
    path, threads = sys.argv[1], int(sys.argv[2])
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p())
    llama.llama_backend_init()
    warm(path)
    start = time.perf_counter()
    model = Model(path, threads, SEQUENCES)
    load_s = time.perf_counter() - start
    model.run([(token(0), 0, 0)])
    model.clear()
    prefill_s = model.run([(token(index), index, 0) for index in range(PROMPT)])
    steps = [model.run([(token(index), PROMPT + index, 0)]) for index in range(STEPS)]
    model.clear()
    model.run([(token(index), index, sequence) for sequence in range(SEQUENCES) for index in range(SHORT_PROMPT)])
    together = [
        model.run([(token(sequence), SHORT_PROMPT + step, sequence) for sequence in range(SEQUENCES)]) for step in range(STEPS)
    ]
    print(json.dumps({
        "warm_load_s": load_s,
        "prefill_tokens_per_s": PROMPT / prefill_s,
        "decode_tokens_per_s": 1 / statistics.median(steps),
        "batch_tokens_per_s": SEQUENCES / statistics.median(together),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }))


main()
