"""Runs one ONNX file in a process of its own and prints its speed and peak memory as JSON; imports little on purpose.

python _speed_process.py FILE SHAPE THREADS BATCH SECONDS INTEGER_KERNELS
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort


def main() -> None:
    """Latency of one image, throughput of a batch, memory beyond what the bare process takes."""
    path, shape, threads, batch, seconds, integers = sys.argv[1:]
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.log_severity_level = 3
    if integers == "0":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    before = peak_bytes()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rng = np.random.default_rng(0)

    def images(count: int) -> Any:
        return rng.standard_normal((count, *json.loads(shape)), dtype=np.float32)

    one, many = images(1), images(int(batch))
    latency = median_ms(lambda: session.run(None, {name: one}), float(seconds))
    whole = median_ms(lambda: session.run(None, {name: many}), float(seconds))
    peak = peak_bytes() - before
    print(json.dumps({"ms": latency, "images_per_second": 1000 * int(batch) / whole, "peak_bytes": peak}))


def peak_bytes() -> int:
    """Most memory that this process has held."""
    try:  # on Linux getrusage remembers the parent's
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def median_ms(run: Callable[[], Any], seconds: float) -> float:
    """Median of at least five runs after two to warm up, for about ``seconds``."""
    run(), run()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < seconds and len(times) < 1000):
        begin = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


if __name__ == "__main__":
    main()
