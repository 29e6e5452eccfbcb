"""What becomes of architectures that people train: found whole, planned, trained, packed and exported, or one sentence.

    python -m tests.stress.zoo [NAME ...] [--out FOLDER]

Every member of the zoo has random weights, goes through a Trainer with the callback (traces of few probes, 6x), one
step of fine-tuning, a packed file that a fresh network loads, and an ONNX file compared in onnxruntime. Finished
members are not repeated. Written to FOLDER (tests/stress): zoo.json, zoo.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from hawq_lightning import HAWQ, HawqError, MeasureConfig, load_packed, save_packed
from hawq_lightning.export import to_onnx
from tests.stress.zoo_networks import DETECTION, SEGMENTATION, TIMM, TRANSFORMERS, Member
from tests.stress.zoo_own import OWN

ZOO = TIMM | TRANSFORMERS | SEGMENTATION | DETECTION | OWN
# what is refused as a whole, and why
REFUSED = {"tied autoencoder": "a function reads the weight"}
# less than 95% of the bytes of the matrices: zoo.md names the largest that stay float
PARTLY = {
    "DeBERTa-v2": "a table that every layer reads by functions", "GAT": "vectors of attention, kept as matrices",
    "PSPNet (resnet18)": "stages of the encoder that it holds and never calls",
}  # fmt: skip


class Task(LightningModule):
    """Plain training of a member."""

    def __init__(self, member: Member) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.member = member.make(), member

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.member.loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def one(member: Member) -> dict[str, Any]:
    """All that is told of a member.

    Returns:
        ``matrices``, ``bytes`` and ``macs``, the shares that are quantized; ``widths`` of the weights; whether training
        ``moved`` them; whether the file is ``packed`` bit for bit; ``onnx``: the largest difference, or a sentence.
    """
    torch.manual_seed(1)
    batch, task = member.batch(), Task(member)
    loader: DataLoader[Any] = DataLoader([batch], batch_size=None)
    before = {n: p.detach().clone() for n, p in task.named_parameters()}
    trained = {n: p.requires_grad for n, p in task.named_parameters()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hawq = HAWQ(budget="6x", measure=MeasureConfig(rtol=9, max_probes=4), dirpath=folder, progress=False)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[hawq],
        )  # fmt: skip
        trainer.fit(task, loader)
        plan = hawq.plan
        found = shares(task, hawq)
        found["widths"] = sorted({s.bits for s in plan.weights})
        now = dict(task.named_parameters())
        found["still"] = [n for n in now if n in before and trained[n] and torch.equal(now[n], before[n])]
        found["moved"] = not set(found["still"]) & {s.name for s in plan.weights}
        file = Path(folder) / "net.safetensors"
        save_packed(task.eval(), plan, file)
        again = load_packed(file, Task(member).eval())
        found["packed"] = torch.equal(value(task, batch), value(again, batch))
        found["onnx"] = exported(task, member, batch, Path(folder) / "net.onnx")
    return found


def shares(task: Task, hawq: HAWQ) -> dict[str, Any]:
    """Shares of the matrices' bytes, of all parameters' bytes, and of the MACs that are quantized."""
    names = {id(p): n for n, p in task.named_parameters()}
    aliases = {n: names[id(p)] for n, p in task.named_parameters(remove_duplicate=False)}
    quantized = {aliases.get(s.name, s.name) for s in hawq.plan.weights}
    sizes = {n: p.numel() for n, p in task.named_parameters()}
    # a weight that is computed from others counts as those: "weight" of "parametrizations.weight.original0"
    for name in sizes:
        if ".parametrizations." in name and name.replace("parametrizations.", "").rpartition(".")[0] in quantized:
            quantized.add(name)
    matrices = {n: sizes[n] for n, p in task.named_parameters() if p.ndim > 1}
    macs = sum(r["macs_share"] for r in hawq.sites.rows() if r["quantized"])
    return {
        "parameters": sum(sizes.values()),
        "matrices": sum(k for n, k in matrices.items() if n in quantized) / sum(matrices.values()),
        "bytes": sum(k for n, k in sizes.items() if n in quantized) / sum(sizes.values()),
        "macs": macs,
        "float": sorted((n for n in matrices if n not in quantized), key=lambda n: -sizes[n])[:3],
    }


def value(task: Task, batch: Any) -> Tensor:
    """The loss, the same draws every time; detectors have one in training mode alone."""
    torch.manual_seed(2)
    task.train(task.member.inputs is None)
    with torch.no_grad():
        loss = task.training_step(batch, 0)
    task.eval()
    return loss


def exported(task: Task, member: Member, batch: Any, file: Path) -> float | str:
    """The largest difference of an exported file's outputs to the network's, as a share of the largest; or why none."""
    if member.inputs is None:
        return "forward takes no positional tensors"
    inputs = member.inputs(batch)
    try:
        to_onnx(task.net, None, inputs if len(inputs) > 1 else inputs[0], file, free_batch=member.free_batch)
    except HawqError as error:
        return str(error).split("\n")[0]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # the graph as it stands, no integer kernels
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    fed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)}
    (got, *_) = session.run(None, fed)
    with torch.no_grad():
        expected = task.net(*inputs)
    expected = first_tensor(expected)
    return float((torch.from_numpy(got) - expected).abs().max() / expected.abs().max())


def first_tensor(value: Any) -> Tensor:
    """The first tensor of an output of any form."""
    if isinstance(value, Tensor):
        return value
    return first_tensor(next(iter(value.values() if isinstance(value, dict) else value)))


def page(found: dict[str, dict[str, Any]]) -> str:
    """All members as a Markdown table."""
    done = [r for r in found.values() if "failed" not in r]
    lines = [
        "# The zoo", "",
        "Written by `python -m tests.stress.zoo` (part of `make stress`): architectures with random weights at small "
        "sizes, through a Trainer with `HAWQ(budget=\"6x\")`, one step of fine-tuning, a packed file and an ONNX file. "
        "*Matrices* is the share of the bytes of all parameters of two and more dimensions that is quantized; *ONNX* "
        "the largest difference in onnxruntime, as a share of the largest output, or the sentence that refuses it.", "",
        f"{len(done)} of {len(found)} went through; {sum(r['matrices'] >= 0.95 for r in done)} have at least 95% of "
        f"their matrices quantized; {sum(r['packed'] for r in done)} packed files are bit-exact; "
        f"{sum(isinstance(r['onnx'], float) for r in done)} were exported.", "",
        "| network | parameters | matrices | all bytes | MACs | bits | trained | packed | ONNX | largest float |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, r in found.items():
        if "failed" in r:
            lines.append(f"| {name} | {' | '.join([''] * 7)} | {r['failed']} | |")
            continue
        onnx = f"{r['onnx']:.1e}" if isinstance(r["onnx"], float) else r["onnx"].replace("|", "/")
        lines.append(
            f"| {name} | {r['parameters']:,} | {r['matrices']:.1%} | {r['bytes']:.1%} | {r['macs']:.1%} | "
            f"{', '.join(map(str, r['widths']))} | {'all' if r['moved'] else 'not all'} | "
            f"{'bit-exact' if r['packed'] else 'differs'} | {onnx} | {', '.join(f'`{n}`' for n in r['float'])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="members to run again; all that have no result when not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of results")
    args = parser.parse_args()
    file = args.out / "zoo.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in args.names or [n for n in ZOO if n not in found or "failed" in found[n]]:
        began = time.perf_counter()
        try:
            found[name] = one(ZOO[name])
        except Exception as error:  # the table tells it
            found[name] = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}".replace("\n", " ")}
        found = {n: found[n] for n in ZOO if n in found}
        print(f"{name} ({time.perf_counter() - began:.0f} s): {found[name]}", flush=True)
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        (args.out / "zoo.md").write_text(page(found), encoding="utf-8")
        gc.collect()


if __name__ == "__main__":
    main()
