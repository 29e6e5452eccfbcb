"""The exported detector finishes its boxes as torchvision does, on any size and batch."""

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torchvision")

from torchvision.ops import clip_boxes_to_image  # noqa: E402

from hawq_lightning import sites  # noqa: E402
from hawq_lightning.export import compare, network_of, to_onnx  # noqa: E402
from hawq_lightning.export.agreement import session  # noqa: E402
from hawq_lightning.models.retinanet import retinanet_resnet18  # noqa: E402
from tests.test_packed import arm, random_plan  # noqa: E402


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = retinanet_resnet18(3, channels=16, min_size=64, max_size=96, anchor_size=16).eval()
    torch.nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.3)
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.1)
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


def test_the_file_gives_the_same_boxes(net, tmp_path):
    images = torch.rand(2, 3, 64, 96)
    inner = network_of(net)
    plan = random_plan(sites(inner, images), 1)
    arm(inner, plan)
    to_onnx(inner, plan, images, tmp_path / "a.onnx")
    found = compare(inner, tmp_path / "a.onnx", [torch.rand(3, 3, 64, 96)])
    assert set(found.outputs) == {"scores", "boxes"} and not found.classes
    assert found.outputs["scores"][1] < 0.01 and found.outputs["boxes"][1] < 1
    record = found.to_dict()["outputs"]["boxes"]
    assert record["mean_difference"] <= record["largest_difference"] <= found.difference
    scores, boxes = session(tmp_path / "a.onnx").run(None, {"input": images[:1].numpy()})
    anchors = 9 * (8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1 * 1)
    assert scores.shape == (1, anchors, 3) and boxes.shape == (1, anchors, 4)
    assert scores.min() >= 0 and boxes.min() >= 0 and boxes[..., 2].max() <= 96 and boxes[..., 3].max() <= 64
    stored = onnx.load(str(tmp_path / "a.onnx")).graph.initializer
    largest = max(len(t.raw_data) for t in stored if "codes" not in t.name)
    assert largest < 16 * anchors, "no table of all anchors"
