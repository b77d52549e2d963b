"""Seconds of one crop through a vision tower with ONNX Runtime, as one line of JSON: tower.py MODEL.onnx THREADS."""

import json
import statistics
import sys
import time

import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(sys.argv[2]), 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
pixels = np.random.default_rng(1).standard_normal((1, 3, 336, 336), dtype=np.float32)
session.run(None, {"pixels": pixels})
times = []
for _ in range(4):
    start = time.perf_counter()
    session.run(None, {"pixels": pixels})
    times.append(time.perf_counter() - start)
print(json.dumps({"seconds_per_crop": statistics.median(times)}))
