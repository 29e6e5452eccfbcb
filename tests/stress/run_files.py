"""Runs the ONNX files of a folder in whatever onnxruntime this process finds; imports little on purpose.

python run_files.py FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def difference(path: Path) -> float:
    """Mean difference of a file's outputs from the network's, by their spread."""
    held = np.load(f"{str(path).rpartition('-')[0]}.npz")
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if path.stem.endswith("exact"):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    run = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (found,) = run.run(None, {run.get_inputs()[0].name: held["x"]})
    return float(np.abs(found - held["wanted"]).mean() / held["wanted"].std())


results: dict[str, float | str] = {}
for file in sorted(Path(sys.argv[1]).glob("*.onnx")):
    try:
        results[file.stem] = difference(file)
    except Exception as error:
        results[file.stem] = f"{type(error).__name__}: {str(error)[:300]}"
print(json.dumps(results))
