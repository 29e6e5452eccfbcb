"""As torchvision's references, moved into a module: residual network, warm-up, smoothing, mixup, EMA, decay groups."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate


def conv3x3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, inputs, planes, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, planes, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class SmallResNet(nn.Module):
    """A stem and three blocks."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem = nn.Sequential(conv3x3(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Block(6, 6), Block(6, 8, 2), Block(8, 8))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.blocks(self.stem(x))), 1))


class Stripes(Dataset):
    """Pictures of stripes with a random crop and flip each time."""

    def __init__(self, train=True):
        g = torch.Generator().manual_seed(int(train))
        self.train, self.targets = train, torch.randint(0, 4, (48,), generator=g)
        grid = torch.arange(12).float()
        waves = torch.stack([torch.sin(grid * (k + 1) / 2) for k in range(4)])
        self.images = waves[self.targets][:, None, None, :] + 0.3 * torch.randn(48, 3, 12, 12, generator=g)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        image = self.images[i]
        if self.train:
            top, left = torch.randint(0, 5, (2,)).tolist()
            image = image[:, top : top + 8, left : left + 8]
            if torch.rand(1) < 0.5:
                image = image.flip(-1)
        else:
            image = image[:, 2:10, 2:10]
        return image, self.targets[i]


def mixup(batch):
    """Collate with mixed pictures and soft targets."""
    images, targets = default_collate(batch)
    soft = nn.functional.one_hot(targets, 4).float()
    share = torch.distributions.Beta(0.2, 0.2).sample().item()
    return share * images + (1 - share) * images.roll(1, 0), share * soft + (1 - share) * soft.roll(1, 0)


class ClassificationReference(LightningModule):
    """Arguments, parameter groups and schedules of the reference's ``train.py``."""

    def __init__(self, lr=0.05, momentum=0.9, weight_decay=1e-4, norm_weight_decay=0.0, label_smoothing=0.1,
                 lr_warmup_epochs=1, epochs=2):  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.model = SmallResNet()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def training_step(self, batch, batch_idx):
        image, target = batch
        output = self.model(image)
        loss = self.criterion(output, target)
        self.log_dict({"loss": loss.item(), "lr": self.optimizers().param_groups[0]["lr"]})
        return loss

    def validation_step(self, batch, batch_idx):
        image, target = batch
        output = self.model(image)
        _, pred = output.topk(2, 1)
        correct = pred.t().eq(target[None])
        self.log_dict({"acc1": correct[:1].float().sum() / len(target), "acc2": correct.float().sum() / len(target)})

    def configure_optimizers(self):
        norms = [p for m in self.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)]
        known = {id(p) for p in norms}
        others = [p for p in self.parameters() if id(p) not in known]
        hp = self.hparams
        groups = [{"params": others, "weight_decay": hp.weight_decay},
                  {"params": norms, "weight_decay": hp.norm_weight_decay}]  # fmt: skip
        optimizer = torch.optim.SGD(groups, lr=hp.lr, momentum=hp.momentum, nesterov=True)
        main = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=hp.epochs - hp.lr_warmup_epochs)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=hp.lr_warmup_epochs)
        return [optimizer], [torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, main], [hp.lr_warmup_epochs])]


def main(callbacks, **trainer):
    """The reference's ``main(args)``."""
    train, val = Stripes(), Stripes(train=False)
    data = DataLoader(train, batch_size=16, sampler=RandomSampler(train), collate_fn=mixup, drop_last=True)
    model = ClassificationReference()
    t = Trainer(
        max_epochs=2, gradient_clip_val=1.0, callbacks=[EMAWeightAveraging(decay=0.99), *callbacks], **trainer
    )  # fmt: skip
    t.fit(model, data, DataLoader(val, batch_size=24))
    return model
