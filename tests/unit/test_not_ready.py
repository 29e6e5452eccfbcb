"""Networks and places that nothing can be measured in: the message says what is the matter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning import HawqError
from tests.trainers import CLASSES, FEATURES, Classifier, hawq, loader, trainer

BATCH = torch.randn(8, FEATURES), torch.arange(8) % CLASSES
LAZY = {
    "all": lambda: [nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(CLASSES)],
    "first": lambda: [nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, CLASSES)],
    "last": lambda: [nn.Linear(FEATURES, 16), nn.ReLU(), nn.LazyLinear(CLASSES)],
    "convolution": lambda: [
        nn.Unflatten(1, (1, FEATURES)), nn.LazyConv1d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)
    ],
}  # fmt: skip


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


class Task(Classifier):
    def __init__(self, layers):
        super().__init__()
        self.net = nn.Sequential(*layers)


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:A layer with UninitializedParameter")
def test_lazy_layers_are_told_to_run_once(kind, tmp_path):
    says = r"has lazy layers that have no weights yet \([\w., ]*\d[\w., ]*\): run it once, such as by model\(batch\)"
    net = nn.Sequential(*LAZY[kind]())
    for call in (lambda: hl.sites(net, BATCH), lambda: hl.measure(net, [BATCH], loss, progress=False)):
        with pytest.raises(HawqError, match=says):
            call()
    with pytest.raises(HawqError, match=f"Task {says}"):
        trainer(tmp_path, hawq()).fit(Task(LAZY[kind]()), loader())
    net(BATCH[0])
    assert len(hl.sites(net, BATCH).weights) == 2


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_layer_that_is_left_out_is_no_matter():
    net = nn.Sequential(*LAZY["last"]())
    assert [s.name for s in hl.sites(net, BATCH, exclude="2").weights] == ["0.weight"]


@pytest.mark.parametrize("patterns", [{"exclude": "*"}, {"include": ["0"], "exclude": nn.Linear}])
def test_patterns_that_leave_nothing_are_told(patterns, tmp_path):
    net = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    with pytest.raises(HawqError, match="include and exclude leave Sequential no quantizable layer; left out are 0, 2"):
        hl.sites(net, BATCH, **patterns)
    task = Task([*net])
    task.quantization_exclude = "*"
    with pytest.raises(HawqError, match=r"include and exclude leave Task no quantizable layer; left out are net.0"):
        trainer(tmp_path, hawq()).fit(task, loader())


def test_measuring_in_inference_mode_says_so():
    net = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    says = r"computed under torch.inference_mode\(\), where there are no gradients"
    for estimator in ("auto", "ggn", "hutchinson", "exact"):
        with pytest.raises(HawqError, match=says), torch.inference_mode():
            hl.measure(net, [BATCH], loss, estimator=estimator, progress=False)
        with pytest.raises(HawqError, match=says):
            hl.measure(net, [BATCH], torch.inference_mode()(loss), estimator=estimator, progress=False)
        with torch.inference_mode(), torch.inference_mode(False):
            assert hl.measure(net, [BATCH], loss, estimator=estimator, rtol=0.9, progress=False)
    with pytest.raises(HawqError, match=r"or torch.no_grad\(\) is in it"):
        hl.measure(net, [BATCH], torch.no_grad()(loss), progress=False)


def test_weights_made_in_inference_mode_are_named(tmp_path):
    with torch.inference_mode():
        made = nn.Linear(16, CLASSES)
    net = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), made)
    says = r"parameter '(net\.)?2.weight' was made under torch.inference_mode\(\)"
    with pytest.raises(HawqError, match=says):
        hl.measure(net, [BATCH], loss, progress=False)
    with pytest.raises(HawqError, match=says):
        trainer(tmp_path, hawq()).fit(Task([*net]), loader())
