"""Networks: ResNet20 and two compact ones for small images, and the paper's four."""

from hawq_lightning.models._compact import mobilenet_cifar, squeezenext_cifar
from hawq_lightning.models._inception_v3 import inception_blocks, inception_v3
from hawq_lightning.models._resnet20 import resnet20
from hawq_lightning.models._resnet50 import resnet50
from hawq_lightning.models._retinanet import (
    BETA,
    BoxLoss,
    retinanet_resnet18,
    retinanet_resnet50,
    retinanet_torchvision,
)
from hawq_lightning.models._squeezenext import squeezenext
from hawq_lightning.models._weights import load_weights

__all__ = [
    "BETA",
    "BoxLoss",
    "inception_blocks",
    "inception_v3",
    "load_weights",
    "mobilenet_cifar",
    "resnet20",
    "resnet50",
    "retinanet_resnet18",
    "retinanet_resnet50",
    "retinanet_torchvision",
    "squeezenext",
    "squeezenext_cifar",
]
