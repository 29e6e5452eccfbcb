"""ResNet20 on CIFAR-10: estimated traces against all columns of the softmax factor, on three sets of images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from hawq_lightning import measure
from hawq_lightning.models import resnet20

pytestmark = pytest.mark.stress
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
IMAGES = 64


@pytest.fixture(scope="module")
def pools():
    """Three sets of training images: the first of every class that the archive gives."""
    if not (SHARED / "cifar10.tar.xz").is_file():
        pytest.skip(f"no CIFAR-10 at {SHARED}")
    wanted = 3 * IMAGES // 10 + 1
    found: dict[str, list[np.ndarray]] = {}
    with tarfile.open(SHARED / "cifar10.tar.xz") as archive:
        for member in archive:
            parts = Path(member.name).parts
            if not member.isfile() or "train" not in parts or len(found.setdefault(parts[-2], [])) >= wanted:
                continue
            file = archive.extractfile(member)
            assert file is not None
            found[parts[-2]].append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
            if len(found) == 10 and all(len(v) >= wanted for v in found.values()):
                break
    pairs = [
        (image, label) for i in range(wanted) for label, (_, v) in enumerate(sorted(found.items())) for image in [v[i]]
    ]
    x = torch.from_numpy(np.stack([p[0] for p in pairs])).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean[:, None, None]) / std[:, None, None]
    y = torch.tensor([p[1] for p in pairs])
    return [(x[i : i + IMAGES], y[i : i + IMAGES]) for i in (0, IMAGES, 2 * IMAGES)]


@pytest.mark.parametrize("subset", [0, 1, 2])
def test_estimates_agree_with_exact_traces(pools, subset):
    batch = pools[subset]
    net = resnet20(weights=SHARED / "resnet20_cifar10.pt").eval()
    with torch.no_grad():
        assert float((net(batch[0]).argmax(1) == batch[1]).float().mean()) > 0.7  # images and labels belong together

    def loss(model, images_and_labels):
        return F.cross_entropy(model(images_and_labels[0]), images_and_labels[1])

    exact = measure(net, [batch], loss, estimator="exact", progress=False)
    for draw in ("all", "curvature"):
        found = measure(net, [batch], loss, sampling=draw, seed=subset, progress=False)
        off = [(r.trace - exact[r.name].trace) / max(r.stderr, 1e-6 * r.trace) for r in found]
        assert max(map(abs, off)) <= 3.0, (draw, max(map(abs, off)))
