"""Every experiment of the paper's models, end to end on drawn miniatures: traces, plan, fine-tuning, packed file."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import Trainer

from hawq_lightning import Plan, sites
from hawq_lightning.cli import run
from hawq_lightning.data import ImageFolderDataModule, write_coco, write_image_folder
from hawq_lightning.export import load_packed
from hawq_lightning.models import (
    inception_blocks,
    inception_v3,
    resnet50,
    retinanet_resnet18,
    retinanet_resnet50,
    retinanet_torchvision,
    squeezenext,
)

SMALL = [
    "callbacks=none",
    "logger=none",
    "trainer=cpu",
    "++trainer.check_val_every_n_epoch=1",
    "report=false",
    "float_epochs=0",
    "epochs=1",
    "++trainer.limit_train_batches=1",
    "measure.rtol=9",
    "measure.forecast=null",
    "measure.loss_per_site=false",
    "+hawq.progress=false",
    "data.num_workers=0",
]
CLASSIFIER = ["model.pretrained=false", "model.num_classes=3", "data.size=64",
              "data.resize=70", "data.batch_size=2", "measure.images=2"]  # fmt: skip
DETECTOR = ["model.pretrained_backbone=false", "model.num_classes=3", "model.min_size=64",
            "model.max_size=96", "data.batch_size=2", "measure.images=2", "measure.max_probes=8"]  # fmt: skip
# 25 million weights: their steps by least error take most of a run, which the smaller networks here have proven
LARGE = ["quantizer.options.ranges=minmax"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("miniatures")
    images = write_image_folder(base / "images", classes=3, train=2, val=1)
    return {"images": images, "coco": write_coco(base / "coco", train=6, val=2)}


def pictures(folders, size):
    data = ImageFolderDataModule(folders["images"], size=size, augment="none", batch_size=6)
    data.setup()
    return [next(iter(data.train_dataloader()))[0]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """State dicts of networks whose BatchNorm has seen a batch, so that random weights make sane activations."""
    base = tmp_path_factory.mktemp("weights")
    made: dict[str, Path] = {}

    def get(name, make, batch):
        if name not in made:
            torch.manual_seed(5)
            net = make()
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 1.0
            with torch.no_grad():
                net.train()(*batch)
            made[name] = base / f"{name}.pt"
            torch.save(net.state_dict(), made[name])
        return made[name]

    return get


def configure(experiment, folder, root, weights, *overrides):
    with initialize_config_module("hawq_lightning.conf", version_base="1.3"):
        paths = [f"paths.output_dir={folder}", f"data.root={root}", f"model.weights={weights}"]
        return compose("train", overrides=[f"experiment={experiment}", *overrides, *paths])


def check_run(cfg, folder, record, distinct=2):
    """What must hold of a finished run: the plan, trained weights, the file's size, and its scores after reloading."""
    plan = Plan.load(folder / "plan.json")
    assert len({s.bits for s in plan.weights}) >= distinct
    assert record["sizes"]["file_bytes"] == (folder / "model.safetensors").stat().st_size == plan.costs["file_bytes"]
    before = instantiate(cfg.model, _convert_="all")
    start = {k: v.clone() for k, v in before.state_dict().items()}
    after = load_packed(folder / "model.safetensors", before)
    moved = [k for k, v in after.named_parameters() if k in start and not torch.equal(v, start[k])]
    quantized = {s.name.removeprefix("net.") for s in plan.weights}
    assert {k for k in moved if k not in quantized}, "fine-tuning left biases and BatchNorm as they were"
    task = instantiate(cfg.task, net=after, _convert_="all")
    data = instantiate(cfg.data, _convert_="all")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    found = trainer.validate(task, data, verbose=False)[0]
    key, name = ("val/loss", "loss") if "loss" in record else ("val/map", "map")
    assert found[key] == pytest.approx(record[name]["fine_tuned"], rel=1e-6)
    return plan, after


def test_resnet50_imagenet(tmp_path, folders, weights):
    file = weights("resnet50", lambda: resnet50(3), pictures(folders, 64))
    cfg = configure("resnet50_imagenet", tmp_path, folders["images"], file, *SMALL, *CLASSIFIER, *LARGE)
    plan, _ = check_run(cfg, tmp_path, run(cfg))
    assert plan.costs["float_weight_bytes"] / plan.costs["weight_bytes"] >= 12.24
    assert plan.costs["float_act_bytes"] / plan.costs["act_bytes"] >= 7.6
    assert {s.bits for s in plan.activations} == {4, 8}


@pytest.mark.stress
def test_squeezenext_imagenet(tmp_path, folders, weights):
    file = weights("squeezenext", lambda: squeezenext(3), pictures(folders, 64))
    cfg = configure("squeezenext_imagenet", tmp_path, folders["images"], file, *SMALL, *CLASSIFIER)
    plan, _ = check_run(cfg, tmp_path, run(cfg))
    assert plan.costs["float_weight_bytes"] / plan.costs["weight_bytes"] >= 9.40
    assert {s.bits for s in plan.activations} == {8}


@pytest.mark.stress
def test_inceptionv3_imagenet_by_the_papers_blocks(tmp_path, folders, weights):
    file = weights("inception", lambda: inception_v3(3), pictures(folders, 299))
    cfg = configure(
        "inceptionv3_imagenet", tmp_path, folders["images"], file, "select=inception_blocks", *SMALL, *CLASSIFIER,
        *LARGE, "data.size=299", "data.resize=299", "measure.estimator=exact",
    )  # fmt: skip
    assert cfg.select.budget.weights == "12.04x"
    plan, after = check_run(cfg, tmp_path, run(cfg))
    blocks = inception_blocks(after)
    assert {f"net.{n}" for names in blocks.values() for n in names} == {s.name for s in plan.weights}
    assert all(len({plan[f"net.{n}"].bits for n in names}) == 1 for names in blocks.values())
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(k).nbytes for k in file.keys())  # noqa: SIM118
    auxiliary = sum(p.numel() * 4 for p in after.AuxLogits.parameters())
    assert stored < plan.costs["weight_bytes"] + 1.2e6 < plan.costs["weight_bytes"] + auxiliary


@pytest.fixture(scope="module")
def batch():
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    return [torch.rand(3, 64, 80), torch.rand(3, 80, 64)], [target, target]


@pytest.mark.stress
def test_retinanet_coco(tmp_path, folders, weights, batch):
    make = lambda: retinanet_resnet50(3, min_size=64, max_size=96, frozen_norm=False)  # noqa: E731
    file = weights("retinanet_resnet50", make, batch)
    cfg = configure("retinanet_coco", tmp_path, folders["coco"], file, *SMALL, *DETECTOR, *LARGE)
    plan, after = check_run(cfg, tmp_path, run(cfg))
    assert plan.costs["float_weight_bytes"] / plan.costs["weight_bytes"] >= 8.10
    with torch.no_grad():
        assert all(d["boxes"].isfinite().all() for d in after.eval()(batch[0]))


@pytest.mark.stress
@pytest.mark.parametrize(
    ("experiment", "widths", "activations"),
    [
        ("retinanet_coco_act_mixed", {3, 4, 8}, {4, 6, 8}),
        ("retinanet_coco_direct", {4}, {4, 8}),
        ("retinanet_coco_act6", {3, 4, 8}, {6, 8}),
        ("bccd_retinanet", {2, 3, 4, 5, 6, 8}, {8}),
    ],
)
def test_other_detection_rows_on_a_small_backbone(experiment, widths, activations, tmp_path, folders, weights, batch):
    make = lambda: retinanet_resnet18(3, channels=32, min_size=64, max_size=96)  # noqa: E731
    file = weights("retinanet_resnet18", make, batch)
    cfg = configure(
        experiment, tmp_path, folders["coco"], file, *SMALL, "model=retinanet_resnet18", *DETECTOR, "model.channels=32"
    )
    if experiment == "retinanet_coco_act_mixed":
        assert cfg.select.budget.act == "7.62x"
        cfg.select.budget.act = "7.3x"  # the 8-bit input is a larger share of this small network's activations
    plan, _ = check_run(cfg, tmp_path, run(cfg), distinct=min(2, len(widths)))
    assert {s.bits for s in plan.weights} <= widths
    assert {s.bits for s in plan.activations} <= activations
    if experiment == "retinanet_coco_act_mixed":
        assert plan.costs["float_act_bytes"] / plan.costs["act_bytes"] >= 7.3


def test_the_stock_detectors_levels_are_one_site(batch):
    net = retinanet_torchvision(4, min_size=64, max_size=96).eval()
    table = sites(net, batch)
    # P3 to P7, read by both heads, P5 by P6's convolution too: one site
    readers = ("backbone.fpn.extra_blocks.p6", "head.classification_head.conv.0.0", "head.regression_head.conv.0.0")
    assert readers in [s.layers for s in table.activations]


@pytest.mark.parametrize(
    ("group", "model"), [("tiny_coco", "retinanet_resnet18"), ("tiny_imagenet_folder", "resnet50")]
)
def test_miniature_groups_write_themselves(group, model, tmp_path):
    task = "detection" if "coco" in group else "classification"
    with initialize_config_module("hawq_lightning.conf", version_base="1.3"):
        overrides = [f"data={group}", f"model={model}", f"task={task}", "model.num_classes=3", f"paths.runs={tmp_path}"]
        cfg = compose("train", overrides=overrides)
    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert len(images) == len(targets) == cfg.data.batch_size
    assert list(tmp_path.glob("miniatures/*/miniature.txt"))
