"""The paper's models: sizes at the paper's compression, weights from files, and what is refused."""

import sys
from urllib.error import URLError

import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, sites
from hawq_lightning.models import (
    inception_blocks,
    inception_v3,
    load_weights,
    mobilenet_cifar,
    resnet50,
    retinanet_resnet18,
    retinanet_resnet50,
    retinanet_torchvision,
    squeezenext,
    squeezenext_cifar,
)

MIB = 2**20


def on_meta(make, **settings):
    with torch.device("meta"):
        return make(**settings)


@pytest.mark.parametrize(
    ("make", "count", "compression", "ours", "paper", "within", "float_paper", "float_within"),
    [
        # size tables: Tables 1a-1c and 2; SqueezeNext's gap of 3.4% is in the paper's own ratio (10.1 / 9.40 = 1.074
        # counts more than the weights of convolutions and the classifier), the float sizes include BatchNorm
        (resnet50, 54, 12.24, 7.95, 7.99, 0.01, 97.8, 0.005),
        (inception_v3, 95, 12.04, 7.54, 7.57, 0.01, 91.2, 0.005),
        (squeezenext, 112, 9.40, 1.034, 1.07, 0.04, 10.1, 0.02),
        (retinanet_resnet50, 71, 8.10, 17.85, 17.90, 0.01, 145.0, 0.005),
    ],
)
def test_size_at_the_papers_compression(make, count, compression, ours, paper, within, float_paper, float_within):
    model = on_meta(make)
    table = sites(model, exclude=getattr(model, "quantization_exclude", None) or None)
    assert len(table.weights) == count
    size = sum(4 * s.numel for s in table.weights) / compression / MIB
    assert size == pytest.approx(ours, rel=1e-3)
    assert size == pytest.approx(paper, rel=within)
    deployed = [t for k, t in model.state_dict().items() if not k.startswith(getattr(model, "training_only", ()))]
    whole = sum(t.numel() * t.element_size() for t in deployed) / MIB
    assert whole == pytest.approx(float_paper, rel=float_within)


def test_the_stock_retinanet_has_a_smaller_p6():
    paper, stock = on_meta(retinanet_resnet50), on_meta(retinanet_torchvision)
    shape = "backbone.fpn.extra_blocks.p6.weight"
    assert paper.state_dict()[shape].shape == (256, 2048, 3, 3)
    assert stock.state_dict()[shape].shape == (256, 256, 3, 3)
    # the names are those of the file that torchvision publishes
    from torchvision.models.detection import retinanet_resnet50_fpn

    with torch.device("meta"):
        reference = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    counters = {k for k in reference.state_dict() if k.endswith("num_batches_tracked")}
    assert set(stock.state_dict()) == set(reference.state_dict()) - counters


def test_auxiliary_head_is_no_site_and_changes_nothing_in_eval():
    model = inception_v3(num_classes=5)
    assert model.quantization_exclude == ("AuxLogits.*",)
    table = sites(model, torch.rand(1, 3, 299, 299), exclude=model.quantization_exclude)
    assert not [s.name for s in table if "AuxLogits" in s.name]
    assert {f.name for f in table.floats if f.reason == "excluded"} == {
        "AuxLogits.conv0.conv",
        "AuxLogits.conv1.conv",
        "AuxLogits.fc",
    }
    bare = inception_v3(num_classes=5, auxiliary=False)
    assert bare.quantization_exclude == ()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("AuxLogits.")})
    x = torch.rand(1, 3, 96, 96)
    assert torch.equal(model.eval()(x), bare.eval()(x))


def test_inception_blocks_are_the_papers_seventeen():
    class Task(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

    net = on_meta(inception_v3)
    blocks = inception_blocks(net)
    assert len(blocks) == 17
    assert next(iter(blocks)) == "Conv2d_1a_3x3" and list(blocks)[-1] == "fc"
    names = [s.name for s in sites(net, exclude=net.quantization_exclude).weights]
    assert sorted(n for block in blocks.values() for n in block) == sorted(names)
    assert inception_blocks(Task(net))["fc"] == ["net.fc.weight"]


def test_weights_come_from_a_file(tmp_path):
    torch.manual_seed(0)
    first = squeezenext(num_classes=3)
    torch.save(first.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": {f"net.{k}": v for k, v in first.state_dict().items()}}, tmp_path / "lightning.ckpt")
    for name in ("plain.pt", "lightning.ckpt"):
        second = squeezenext(num_classes=3, weights=tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    with pytest.raises(HawqError, match=r"3 classes, the model 4"):
        squeezenext(num_classes=4, weights=tmp_path / "plain.pt")
    with pytest.raises(HawqError, match="do not fit ResNet: missing"):
        resnet50(num_classes=3, weights=tmp_path / "plain.pt")


def test_inception_weights_with_the_auxiliary_head_fit_the_network_without(tmp_path):
    first = inception_v3(num_classes=3)
    torch.save(first.state_dict(), tmp_path / "w.pt")
    second = inception_v3(num_classes=3, weights=tmp_path / "w.pt", auxiliary=False)
    assert torch.equal(first.fc.weight, second.fc.weight)


def test_older_detector_files_are_renamed(tmp_path):
    first = on_meta(retinanet_torchvision, num_classes=2).to_empty(device="cpu")
    old = {k.replace(".0.weight", ".weight") if "head.conv" in k else k: v for k, v in first.state_dict().items()}
    old = {k.replace(".0.bias", ".bias") if "head.conv" in k else k: v for k, v in old.items()}
    assert "head.regression_head.conv.0.weight" in old
    torch.save(old, tmp_path / "old.pt")
    second = retinanet_torchvision(num_classes=2, weights=tmp_path / "old.pt")
    for name in ("classification_head", "regression_head"):
        a, b = (getattr(m.head, name).conv[3][0].weight for m in (first, second))
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize(("make", "weights", "macs"), [(squeezenext_cifar, 112, 13.8e6), (mobilenet_cifar, 20, 9.4e6)])
def test_compact_networks_for_small_images(make, weights, macs, tmp_path):
    net = make(width=1.0).eval()
    table = sites(net, torch.zeros(1, 3, 32, 32))
    assert len(table.weights) == weights
    assert sum(x.macs for x in table.layers) == pytest.approx(macs, rel=0.01)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = make(weights=tmp_path / "net.pt").eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(net(x), again(x))
    with pytest.raises(HawqError, match="10 classes, the model 7"):
        make(num_classes=7, weights=tmp_path / "net.pt")
    for wrong, named in (({"width": 0.1}, r"width=0\.1"), ({"num_classes": 0}, "num_classes=0")):
        with pytest.raises(HawqError, match=named):
            make(**wrong)


class Evil:
    def __reduce__(self):
        return (sys.exit, (3,))


def test_a_file_that_runs_code_is_refused(tmp_path):
    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(HawqError, match=r"evil\.pt cannot be read"):
        load_weights(nn.Linear(2, 2), tmp_path / "evil.pt")


def test_refusals_name_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(HawqError, match=r"No weights at .*absent"):
        resnet50(weights=tmp_path / "absent.pt")
    with pytest.raises(HawqError, match="either pretrained=true or weights"):
        resnet50(pretrained=True, weights=tmp_path / "absent.pt")
    for make, settings in (
        (retinanet_resnet50, {}),
        (retinanet_resnet18, {"num_classes": 3}),
        (resnet50, {"num_classes": 7}),
    ):
        with pytest.raises(HawqError, match=r"nobody publishes weights .* weights=/path"):
            make(pretrained=True, **settings)
    with pytest.raises(HawqError, match=r"box_loss is 'l2'; use one of smooth_l1, l1"):
        retinanet_resnet18(3, box_loss="l2")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(HawqError, match=r"hawq-lightning\[vision\]"):
        resnet50()
    monkeypatch.setitem(sys.modules, "pytorchcv.models.squeezenext", None)
    with pytest.raises(HawqError, match=r"hawq-lightning\[vision\]"):
        squeezenext()


def test_a_failed_download_says_so(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(HawqError, match=r"resnet50: torchvision could not download .*no route.*weights=/path"):
        resnet50(pretrained=True)
    with pytest.raises(HawqError, match=r"retinanet_torchvision: torchvision could not download"):
        retinanet_torchvision(pretrained=True)


def test_squeezenext_at_any_size():
    net = squeezenext(num_classes=4).eval()
    assert net(torch.rand(2, 3, 64, 80)).shape == (2, 4)
    x = torch.rand(1, 3, 224, 224)
    from pytorchcv.models.squeezenext import sqnxt23_w2

    reference = sqnxt23_w2(num_classes=4).eval()
    reference.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), reference(x), rtol=1e-5, atol=1e-6)
