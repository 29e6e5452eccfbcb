"""Runs one ONNX file in a process of its own and prints its speed and peak memory as JSON; imports little on purpose.

python _speed_process.py FILE SHAPE THREADS BATCH SECONDS INTEGER_KERNELS RUNTIME
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def main() -> None:
    """Latency of one image, throughput of a batch, memory beyond what the bare process takes."""
    path, shape, threads, batch, seconds, integers, runtime = sys.argv[1:]
    load = with_openvino if runtime == "openvino" else with_onnxruntime
    before, run, fixed = load(path, int(threads), integers == "1")
    rng = np.random.default_rng(0)

    def images(count: int) -> Any:
        return rng.standard_normal((count, *json.loads(shape)), dtype=np.float32)

    count = fixed or int(batch)
    one, many = images(fixed or 1), images(count)
    latency = median_ms(lambda: run(one), float(seconds)) / (fixed or 1)
    whole = median_ms(lambda: run(many), float(seconds))
    peak = peak_bytes() - before
    print(json.dumps({"ms": latency, "images_per_second": 1000 * count / whole, "peak_bytes": peak}))


def with_onnxruntime(path: str, threads: int, integers: bool) -> tuple[int, Callable[[Any], object], int | None]:
    """Memory before loading, a function that runs the file, and how many images it takes; ``None``: any number."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    before = peak_bytes()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    takes = session.get_inputs()[0]
    fixed = takes.shape[0] if isinstance(takes.shape[0], int) else None
    return before, lambda images: session.run(None, {takes.name: images}), fixed


def with_openvino(path: str, threads: int, integers: bool) -> tuple[int, Callable[[Any], object], int | None]:
    """The same; what integer kernels leave is computed in float32, and which they take is OpenVINO's choice."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    before = peak_bytes()
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", hints)
    axis = compiled.inputs[0].partial_shape[0]
    return before, lambda images: compiled([images]), None if axis.is_dynamic else axis.get_length()


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
