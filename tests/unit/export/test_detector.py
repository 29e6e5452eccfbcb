"""The exported detector finishes its boxes as torchvision does, on any size and batch."""

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torchvision")

from torchvision.ops import clip_boxes_to_image  # noqa: E402

from hawq_lightning import HawqError, sites  # noqa: E402
from hawq_lightning.cli import Images, mean_average_precision  # noqa: E402
from hawq_lightning.export import compare, network_of, to_onnx  # noqa: E402
from hawq_lightning.export.onnx import (  # noqa: E402
    OnnxDetector,
    detections,
    session,
)
from hawq_lightning.models import retinanet_resnet18  # noqa: E402
from tests.unit.export.test_packed import enable, random_plan  # noqa: E402


def small():
    torch.manual_seed(0)
    model = retinanet_resnet18(3, channels=16, min_size=64, max_size=96, anchor_size=16).eval()
    torch.nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.3)
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def net():
    model = small()
    model.score_thresh, model.topk_candidates, model.nms_thresh, model.detections_per_img = -1.0, 10**6, 2.0, 10**6
    return model


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_boxes_and_scores_are_torchvisions(net, size):
    images = torch.rand(2, 3, *size)
    transformed, _ = net.transform(list(images))
    assert transformed.tensors.shape[-2:] == size
    with torch.no_grad():
        whole, found = net(list(images)), network_of(net)(transformed.tensors)
        features = list(net.backbone(transformed.tensors).values())
        offsets = net.head(features)["bbox_regression"]
        anchors = net.anchor_generator(transformed, features)
    for i, result in enumerate(whole):
        # without threshold and suppression torchvision lists every class of every anchor, best first
        torch.testing.assert_close(result["scores"], found["scores"][i].flatten().sort(descending=True).values)
        wanted = clip_boxes_to_image(net.box_coder.decode_single(offsets[i], anchors[i]), size)
        torch.testing.assert_close(found["boxes"][i], wanted, atol=1e-3, rtol=1e-4)
        assert wanted.std() > 10, "boxes of all sizes"


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The network with thresholds that leave something to suppress, weights alone quantized, and its file."""
    model, path = small(), tmp_path_factory.mktemp("usual") / "a.onnx"
    torch.nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.002)
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.02)
    model.score_thresh, model.topk_candidates, model.nms_thresh, model.detections_per_img = 0.001, 50, 0.5, 40
    images = torch.rand(2, 3, 64, 96)
    inner = network_of(model)
    plan = random_plan(sites(inner, images), 1)
    plan = plan.replace(sites=plan.weights)
    enable(inner, plan)
    to_onnx(inner, plan, images, path)
    return model, path


def test_the_file_gives_the_same_boxes(usual):
    model, path = usual
    found = compare(network_of(model), path, [torch.rand(3, 3, 64, 96), torch.rand(1, 3, 64, 96)])
    assert set(found.outputs) == {"scores", "boxes"} and not found.classes
    assert found.outputs["scores"][0] < 1e-4 and found.outputs["boxes"][0] < 0.01
    record = found.to_dict()["outputs"]["boxes"]
    assert record["mean_difference"] <= record["largest_difference"] <= found.difference
    scores, boxes = session(path).run(None, {"input": torch.rand(1, 3, 64, 96).numpy()})
    anchors = 9 * (8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1 * 1)
    assert scores.shape == (1, anchors, 3) and boxes.shape == (1, anchors, 4)
    assert scores.min() >= 0 and boxes.min() >= 0 and boxes[..., 2].max() <= 96 and boxes[..., 3].max() <= 64
    stored = onnx.load(str(path)).graph.initializer
    largest = max(len(t.raw_data) for t in stored if "codes" not in t.name)
    assert largest < 16 * anchors, "no table of all anchors"


def test_the_file_makes_the_detections_of_torchvision(usual):
    model, path = usual
    images = [torch.rand(3, 128, 192), torch.rand(3, 100, 192)]  # twice the scaled size; the second is padded
    with torch.no_grad():
        wanted = model(images)
    found = OnnxDetector(model, path)(images)
    assert len(found) == 2 and all(len(w["scores"]) == 40 for w in wanted)
    for w, f in zip(wanted, found):
        torch.testing.assert_close(f["scores"], w["scores"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(f["boxes"], w["boxes"], atol=1e-2, rtol=1e-3)
        assert torch.equal(f["labels"], w["labels"]) and float(f["boxes"].max()) > 96


def test_another_size_is_one_sentence_and_is_left_out(usual):
    model, path = usual
    with pytest.raises(HawqError, match="64x96.*96x64"):
        OnnxDetector(model, path)([torch.rand(3, 96, 64)])
    tall, wide = [torch.rand(3, 96, 64)], [torch.rand(3, 64, 96)]
    real = Images(model, [(wide, [{}]), (tall, [{}]), (wide, [{}])])
    assert real.first().shape[-2:] == (64, 96)
    assert len(list(real)) == 2 and real.left_out == 1


def test_the_score_of_the_file_is_measured_beside_the_networks(usual):
    model, path = usual
    images = [torch.rand(3, 64, 96) for _ in range(3)]
    with torch.no_grad():
        own = [{"boxes": d["boxes"], "labels": d["labels"]} for d in model(images)]
    found = mean_average_precision(model, path, [(images, own)], 2)
    assert found["images"] == 2 and found["network"] > 0.99 and found["onnx"] > 0.98
    moved = [{"boxes": t["boxes"] + 20, "labels": t["labels"]} for t in own]
    assert mean_average_precision(model, path, [(images, moved)])["onnx"] < 0.5


def test_levels_must_sum_to_the_anchors():
    scores, boxes = torch.rand(6, 2), torch.rand(6, 4)
    with pytest.raises(HawqError, match="5 anchors, the scores 6"):
        detections(scores, boxes, [3, 2])
    assert len(detections(scores, boxes, least_score=1.1)["scores"]) == 0
