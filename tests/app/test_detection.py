"""COCO folders, the drawn miniature, and the detection task."""

import json
import warnings

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image

from hawq_lightning import HawqError
from hawq_lightning.data import (
    CocoData,
    CocoDataset,
    TinyCoco,
    TinyImageFolder,
    load_image,
    random_flips,
    read_coco,
    write_coco,
    write_image_folder,
)
from hawq_lightning.models import BETA, BoxLoss, retinanet_resnet18
from hawq_lightning.tasks import DetectionTask


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco") / "tiny", train=6, val=4)


@pytest.fixture
def broken(tmp_path):
    """A copy whose validation JSON the test may damage: (folder, body, write it back and read)."""
    root = write_coco(tmp_path / "coco", train=4, val=4)
    path = root / "annotations" / "instances_val2017.json"
    body = json.loads(path.read_text())

    def read(new=None, **settings):
        path.write_text(json.dumps(body if new is None else new))
        return read_coco(path, root / "val2017", **settings)

    return root, body, read


def test_boxes_labels_and_pixels_are_as_written(tiny):
    body = json.loads((tiny / "annotations" / "instances_train2017.json").read_text())
    found = read_coco(tiny / "annotations" / "instances_train2017.json", tiny / "train2017")
    assert found.classes == {0: "disc", 1: "square", 2: "triangle"}
    by_id = {p.id: p for p in found.pictures}
    for image in body["images"]:
        picture = by_id[image["id"]]
        mine = [a for a in body["annotations"] if a["image_id"] == image["id"]]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        assert picture.boxes.tolist() == corners
        assert picture.labels.tolist() == [[1, 3, 17].index(a["category_id"]) for a in mine]
        assert picture.crowd.tolist() == [bool(a["iscrowd"]) for a in mine]
        pixels, _ = load_image(picture)
        assert pixels.shape == (3, image["height"], image["width"])
    kept = read_coco(tiny / "annotations" / "instances_train2017.json", tiny / "train2017", labels="category_id")
    assert set(kept.classes) == {1, 3, 17}
    assert any(p.crowd.any() for p in found.pictures) and any(len(p.boxes) == 0 for p in found.pictures)


def test_shrinking_scales_boxes_with_the_image(tiny):
    picture = next(p for p in CocoData_pictures(tiny) if len(p.boxes))
    whole, _ = CocoDataset([picture])[0]
    small, target = CocoDataset([picture], longest=48)[0]
    assert max(small.shape[1:]) == 48
    factors = torch.tensor([small.shape[2] / whole.shape[2], small.shape[1] / whole.shape[1]] * 2)
    torch.testing.assert_close(target["boxes"], picture.boxes * factors)
    assert target["area"].tolist() == pytest.approx(
        ((target["boxes"][:, 2] - target["boxes"][:, 0]) * (target["boxes"][:, 3] - target["boxes"][:, 1])).tolist()
    )


def CocoData_pictures(root):
    return read_coco(root / "annotations" / "instances_train2017.json", root / "train2017").pictures


def test_flips_carry_the_boxes():
    image = torch.zeros(3, 8, 12)
    image[:, 1:3, 2:7] = 1
    box = torch.tensor([[2.0, 1.0, 7.0, 3.0]])
    seen = set()
    torch.manual_seed(0)
    for _ in range(40):
        turned, moved = random_flips(True, True)(image, box)
        x0, y0, x1, y1 = (int(v) for v in moved[0])
        assert turned[:, y0:y1, x0:x1].min() == 1 and turned.sum() == image.sum()
        seen.add((x0, y0))
    assert seen == {(2, 1), (5, 1), (2, 5), (5, 5)}
    assert box.tolist() == [[2.0, 1.0, 7.0, 3.0]]


def test_training_leaves_crowds_and_empty_images_out(tiny):
    data = CocoData(tiny, num_classes=3, batch_size=2)
    data.setup()
    assert all(len(data.train_set[i][1]["boxes"]) for i in range(len(data.train_set)))
    assert not any(data.train_set[i][1]["iscrowd"].any() for i in range(len(data.train_set)))
    images, targets = next(iter(data.val_dataloader()))
    assert isinstance(images, list) and len(images) == len(targets) == 2
    assert len({tuple(i.shape) for i in images}) == 2  # each keeps its own size
    assert any(bool(t["iscrowd"].any()) for _, batch in data.val_dataloader() for t in batch)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: [1, 2], "is not COCO's format: expected an object"),
        (lambda b: b | {"annotations": None}, "it has no list 'annotations'"),
        (lambda b: b | {"images": [3]}, "an entry of 'images' is no object"),
        (lambda b: b | {"categories": []}, "the list 'categories' is empty"),
        (lambda b: b | {"images": b["images"] * 2}, "image id 1 is there twice"),
        (lambda b: b | {"images": [b["images"][0] | {"height": 0}]}, "image 1 has height=0"),
        (lambda b: b | {"images": [b["images"][0] | {"file_name": "../../etc/passwd"}]}, "expected a path inside"),
        (lambda b: b | {"annotations": [b["annotations"][0] | {"image_id": 99}]}, "is of image 99"),
        (lambda b: b | {"annotations": [b["annotations"][0] | {"image_id": [1]}]}, r"annotation 1 has image_id=\[1\]"),
        (lambda b: b | {"annotations": [b["annotations"][0] | {"category_id": 2}]}, "category 2, which is not listed"),
        (lambda b: b | {"annotations": [b["annotations"][0] | {"bbox": [1, 2, 3]}]}, r"bbox=\[1, 2, 3\]; expected"),
        (lambda b: b | {"annotations": [b["annotations"][0] | {"bbox": [1, 2, 3, None]}]}, "expected .x, y, width"),
        (lambda b: b | {"annotations": [b["annotations"][0] | {"bbox": [1, 2, 0, 5]}]}, "without area"),
        (lambda b: b | {"annotations": [b["annotations"][0] | {"bbox": [900, 2, 5, 5]}]}, "without area inside"),
        (lambda b: b | {"annotations": [b["annotations"][0] | {"bbox": [-9, 2, 50, 50]}]}, "leaves the image"),
    ],
)
def test_wrong_json_is_named(broken, damage, message):
    _, body, read = broken
    with pytest.raises(HawqError, match=message):
        read(damage(body))


def test_bad_boxes_can_be_fixed(broken):
    _, body, read = broken
    first = body["annotations"][0]
    body["annotations"] = [first | {"bbox": [-9, 2, 50, 50]}, first | {"id": 2, "bbox": [5, 5, 0, 4]}]
    with pytest.warns(UserWarning, match=r"2 boxes were clipped or dropped; the first: .*annotation 1"):
        found = read(bad_boxes="fix")
    assert [p.boxes.tolist() for p in found.pictures if len(p.boxes)] == [[[0.0, 2.0, 41.0, 52.0]]]
    body["annotations"] = [first | {"bbox": [-0.5, 0, 20, 20]}]  # rounding is no fault
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read().pictures[first["image_id"] - 1].boxes.tolist() == [[0.0, 0.0, 19.5, 20.0]]


def test_missing_and_corrupt_files_are_named(broken):
    root, body, read = broken
    found = read()
    name = body["images"][3]["file_name"]
    path = root / "val2017" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(HawqError, match=f"{name} cannot be read"):
        CocoDataset(found.pictures)[3]
    Image.new("RGB", (40, 30)).save(path)
    with pytest.raises(HawqError, match=f"{name} is 40x30 pixels; its annotations say"):
        CocoDataset(found.pictures)[3]
    path.unlink()
    with pytest.raises(HawqError, match=f"1 of 4 images are missing in .*val2017; the first is {name}"):
        read()
    (root / "annotations" / "instances_val2017.json").write_text('{"images": [')
    with pytest.raises(HawqError, match="corrupt or cut short"):
        CocoData(root).setup("validate")
    with pytest.raises(HawqError, match=r"No COCO folder at .*nowhere"):
        CocoData(root / "nowhere").setup()
    with pytest.raises(HawqError, match=r"No COCO annotation file at .*instances_val2014.json|No image folder"):
        CocoData(root, val="val2014").setup("validate")


def test_labels_must_fit_the_head(tiny):
    with pytest.raises(HawqError, match=r"needs 3 outputs: label 2 is 'triangle' .* the model's head has 2"):
        CocoData(tiny, num_classes=2).setup()
    with pytest.raises(HawqError, match="labels is 'ids'; use one of contiguous, category_id"):
        CocoData(tiny, labels="ids").setup()


def test_miniatures_are_whole_repeatable_and_refuse_other_folders(tmp_path):
    first = write_image_folder(tmp_path / "a", classes=2, train=6, val=2)
    again = write_image_folder(tmp_path / "b", classes=2, train=6, val=2)
    files = sorted(p.relative_to(first) for p in first.rglob("*.JPEG"))
    assert len(files) == 2 * (6 + 2)
    assert all((first / f).read_bytes() == (again / f).read_bytes() for f in files)
    modes = set()
    for f in files:
        with Image.open(first / f) as image:
            modes.add(image.mode)
    assert modes == {"RGB", "L", "CMYK"}
    stamp = (first / files[0]).stat().st_mtime_ns
    write_image_folder(first, classes=2, train=6, val=2)
    assert (first / files[0]).stat().st_mtime_ns == stamp
    with pytest.raises(HawqError, match="holds something else than this miniature"):
        write_image_folder(first, classes=3)
    with pytest.raises(HawqError, match=r"classes=9 is out of range \(2 to 8\)"):
        write_coco(tmp_path / "c", classes=9)
    (tmp_path / "file").write_text("x")
    with pytest.raises(HawqError, match=r"cannot be written|something else"):
        write_coco(tmp_path / "file" / "c")


def test_box_loss_is_smooth_l1_per_image():
    net = retinanet_resnet18(3, box_loss="l1")
    head = net.head.regression_head
    coder = head.box_coder
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 20], [5, 5, 9, 9]])
    target = {"boxes": torch.tensor([[1.0, 0, 11, 10]])}
    offsets = torch.randn(2, 3, 4)
    matched = [torch.tensor([0, -1, 0]), torch.tensor([-1, -2, -1])]
    outputs = {"bbox_regression": offsets}
    arguments = ([target, target], outputs, [anchors, anchors], matched)
    # torchvision's own L1 is the reference; the second image has no match and adds nothing
    reference = type(head).compute_loss(head, *arguments)
    torch.testing.assert_close(head.compute_loss(*arguments), reference)
    smooth = BoxLoss(coder, BETA)(*arguments)
    wanted = coder.encode_single(target["boxes"][[0, 0]], anchors[[0, 2]])
    distance = (offsets[0, [0, 2]] - wanted).abs()
    by_hand = torch.where(distance < BETA, distance**2 / (2 * BETA), distance - BETA / 2).sum() / 2 / 2
    torch.testing.assert_close(smooth, by_hand)


@pytest.mark.stress
def test_a_detector_learns_one_image_and_map_sees_it(tmp_path):
    seed_everything(3)
    data = TinyCoco(
        tmp_path / "one", classes=2, images=4, val_images=2, pixels=64, num_classes=2, batch_size=4, hflip=False
    )
    net = retinanet_resnet18(2, channels=64, min_size=64, max_size=96, anchor_size=16)
    task = DetectionTask(net, lr=1e-3)
    trainer = Trainer(
        max_epochs=40,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, data)
    data.val_set = CocoDataset(data.train_set.pictures)
    found = trainer.test(task, data, verbose=False)[0]
    assert found["test/map_50"] > 0.8
    assert 0.5 < found["test/map"] <= found["test/map_50"]


def test_frozen_batchnorm_stays():
    net = retinanet_resnet18(2, channels=16, min_size=64, max_size=96, anchor_size=16)
    task = DetectionTask(net, freeze_batchnorm=True).train()
    assert task.net.training and not any(m.training for m in task._batchnorms())
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    batch = (
        [torch.rand(3, 64, 80), torch.rand(3, 70, 64)],
        [{"boxes": torch.tensor([[4.0, 4, 30, 40]]), "labels": torch.tensor([1])}] * 2,
    )
    loss = task.training_step(batch)
    loss.backward()
    assert loss.isfinite()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    norms = {id(p) for m in task._batchnorms() for p in m.parameters()}
    assert all((p.grad is None) == (id(p) in norms) for p in net.parameters())


def test_settings_are_checked():
    net = retinanet_resnet18(2, channels=16)
    with pytest.raises(HawqError, match=r"optimizer='adam' is unknown.*Did you mean 'adamw'"):
        DetectionTask(net, optimizer="adam")
    with pytest.raises(HawqError, match="schedule='step' is unknown"):
        DetectionTask(net, schedule="step")


def test_missing_extra_is_named(monkeypatch):
    import sys

    net = retinanet_resnet18(2, channels=16)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(HawqError, match=r"faster_coco_eval .*hawq-lightning\[detection\]"):
        DetectionTask(net)


def test_the_image_folder_miniature_feeds_batches(tmp_path):
    data = TinyImageFolder(
        tmp_path / "folder",
        classes=3,
        images=6,
        num_classes=3,
        size=48,
        resize=56,
        batch_size=8,
        augment="resized_crop",
    )
    data.prepare_data()
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 48, 48) and images.isfinite().all()
    assert data.classes == ["n00000001", "n00000002", "n00000003"] and labels.max() <= 2
