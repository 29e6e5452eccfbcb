"""BatchNorm folding: codes never move, outputs stay, and what cannot be folded is left with a reason."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, load_packed, save_packed, sites
from hawq_lightning.export import deploy, portable, stored_layers
from tests.unit.export.test_packed import enable, random_plan


class Norms(nn.Module):
    """Every way in which a BatchNorm can follow, or not follow, a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.bn_plain = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.bn_grouped = nn.Conv2d(8, 12, 3, groups=4, padding="same"), nn.BatchNorm2d(12, affine=False)
        self.up, self.bn_up = nn.ConvTranspose2d(12, 5, 2, stride=2), nn.BatchNorm2d(5)
        self.up_grouped, self.bn_up_grouped = nn.ConvTranspose2d(5, 10, 2, groups=5), nn.BatchNorm2d(10)
        self.twice, self.bn_twice = nn.Conv2d(10, 10, 1), nn.BatchNorm2d(10)
        self.branch, self.bn_branch = nn.Conv2d(10, 6, 1), nn.BatchNorm2d(6)
        self.bn_sum, self.bn_first = nn.BatchNorm2d(6), nn.BatchNorm2d(3)
        self.line, self.bn_line = nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4)
        self.rows, self.bn_rows = nn.Linear(7, 4), nn.BatchNorm1d(4)
        self.fc, self.bn_fc = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.one, self.other, self.bn_both = nn.Linear(6, 5), nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.batch = nn.BatchNorm1d(5, track_running_stats=False)
        self.unused = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn_plain(self.plain(self.bn_first(x))))
        x = F.relu_(self.bn_grouped(self.grouped(x)))
        x = F.relu(self.bn_up(self.up(x)))
        x = F.relu(self.bn_up_grouped(self.up_grouped(x)))
        x = F.relu(self.bn_twice(self.twice(x)))
        x = self.bn_twice(self.twice(x))
        y = self.branch(x)
        x = self.bn_branch(y) + y.view_as(y)
        x = self.bn_sum(x).mean(3)[:, :, :9]
        x = F.relu(self.bn_line(self.line(x)))
        x = self.bn_rows(self.rows(x)).mean(2)
        x = self.bn_fc(self.fc(x))
        return self.bn_both(self.one(x)) + self.bn_both(self.other(x))


FOLDED = {
    "bn_plain": ("plain",),
    "bn_grouped": ("grouped",),
    "bn_up": ("up",),
    "bn_twice": ("twice",),
    "bn_line": ("line",),
    "bn_fc": ("fc",),
    "bn_both": ("one", "other"),
}
KEPT = {
    "bn_up_grouped": "share their scales",
    "bn_branch": "something else reads",
    "bn_sum": "not the output of a convolution",
    "bn_first": "not the output of a convolution",
    "bn_rows": "not the output of a convolution",  # it normalises the rows, not the features
    "batch": "statistics of the batch",
    "unused": "does not call it",
}


def enabled(seed: int = 0, signs: bool = True) -> tuple[nn.Module, torch.Tensor, object]:
    torch.manual_seed(seed)
    net = Norms()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.bias)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                if signs:
                    module.weight.data[0] = 0.0
                    module.weight.data[1] *= -1
    net.eval()
    x = torch.randn(4, 3, 7, 7)
    plan = random_plan(sites(net, x), seed)
    return enable(net, plan).eval(), x, plan


@pytest.mark.parametrize("seed", range(4))
def test_what_folds_and_what_stays(seed):
    net, x, plan = enabled(seed)
    folding = deploy(net, plan, x).folding
    assert dict(folding.folded) == FOLDED
    assert set(folding.kept) == set(KEPT)
    for name, words in KEPT.items():
        assert words in folding.kept[name]


@pytest.mark.parametrize("seed", range(4))
def test_codes_stay_and_zero_and_negative_gammas_are_exact(seed):
    net, x, plan = enabled(seed)
    before = copy.deepcopy(net.state_dict())
    folded, unfolded = deploy(net, plan, x), deploy(net, plan, x, fold=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the trained model was touched"
    twins = dict(stored_layers(net))
    signs = set()
    for name, layer in stored_layers(folded.model):
        stored, plain = layer.weight_quantizer, dict(stored_layers(unfolded.model))[name].weight_quantizer
        codes = twins[name].weight_quantizer.codes(twins[name].weight)
        midrise = twins[name].weight_quantizer.code == "midrise"
        assert torch.equal(stored.codes.int(), 2 * codes + 1 if midrise else codes)
        assert torch.equal(stored.codes, plain.codes)
        norm = next((n for n, layers in FOLDED.items() if name in layers), None)
        if norm is None:
            assert torch.equal(stored.scale, plain.scale)
            continue
        # channel by channel: BatchNorm after the float64 layer, against the folded layer
        module = net.get_submodule(norm)
        gamma = module.weight.double() if module.affine else torch.ones(module.num_features).double()
        beta = module.bias.double() if module.affine else torch.zeros(module.num_features).double()
        g = gamma / (module.running_var.double() + module.eps).sqrt()
        bias = twins[name].bias.double() if twins[name].bias is not None else 0.0
        torch.testing.assert_close(stored.scale.double(), plain.scale.double() * g, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.bias.double(), (bias - module.running_mean.double()) * g + beta)
        signs |= set(stored.scale.sign().tolist())
    assert signs == {-1.0, 0.0, 1.0}


def test_folding_changes_nothing_but_rounding():
    """With activations float no code can flip, so folded and unfolded outputs differ by float rounding only."""
    net, x, plan = enabled(3)
    for module in net.modules():
        if hasattr(module, "input_quantizer"):
            module.input_quantizer.disable()
    plan = plan.replace(sites=plan.weights)
    with torch.no_grad():
        assert torch.equal(deploy(net, plan, x, fold=False).model(x), net(x))
        wanted = net.double()(x.double()).float()
        folded = deploy(net.float(), plan, x)
        torch.testing.assert_close(folded.model(x), wanted, rtol=1e-4, atol=1e-4)


def test_unfolded_is_the_trained_model_bit_for_bit_also_with_plain_torch_operators():
    net, x, plan = enabled(1)
    with torch.no_grad():
        deployed = deploy(net, plan, x, fold=False).model
        assert torch.equal(deployed(x), net(x))
        assert torch.equal(portable(deployed)(x), net(x))


def test_float_layers_fold_into_their_weights():
    net, x, _ = enabled(2)
    for module in net.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer.disable()
            module.input_quantizer.disable()
    net.fc.weight_quantizer.enable(8, 0.01)
    with torch.no_grad():
        deployed = deploy(net, None, x)
        assert dict(deployed.folding.folded) == FOLDED
        torch.testing.assert_close(deployed.model(x), net(x), rtol=1e-4, atol=1e-4)


def test_frozen_batch_norm_of_torchvision_folds():
    ops = pytest.importorskip("torchvision.ops")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), ops.FrozenBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    net[1].running_var.uniform_(0.5, 2)
    net[1].weight.uniform_(-1, 1)
    x = torch.randn(3, 3, 6, 6)
    plan = random_plan(sites(net, x), 0)
    assert dict(deploy(enable(net, plan), plan, x).folding.folded) == {"1": ("0",)}


def test_layers_sharing_a_weight_fold_into_scales_of_their_own():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
            self.b.weight = self.a.weight
            self.na, self.nb = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.na.weight.data.fill_(2.0)
            self.nb.weight.data.fill_(-3.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.nb(self.b(F.relu(self.na(self.a(x)))))

    net, x = Shared().eval(), torch.randn(2, 3, 4, 4)
    plan = random_plan(sites(net, x), 0)
    deployed = deploy(enable(net, plan), plan, x)
    a, b = deployed.model.a.weight_quantizer, deployed.model.b.weight_quantizer
    assert torch.equal(a.codes, b.codes)
    torch.testing.assert_close(b.scale, -1.5 * a.scale)


def test_a_plan_of_the_wrapper_fits_what_it_wraps(tmp_path):
    net, x, plan = enabled(0)
    save_packed(net, plan, tmp_path / "m.safetensors")
    task = nn.ModuleDict({"net": Norms()}).eval()
    load_packed(tmp_path / "m.safetensors", task)
    renamed = plan.replace(
        sites=tuple(
            type(s)(**{**vars(s), "name": f"net.{s.name}", "layers": tuple(f"net.{n}" for n in s.layers)})
            for s in plan.sites
        )
    )
    deployed = deploy(task["net"], renamed, x)
    assert deployed.plan.bits == plan.bits


def test_models_that_cannot_be_deployed():
    x = torch.randn(4, 3, 7, 7)
    with pytest.raises(HawqError, match="float; call quantize"):
        deploy(Norms(), None, x)
    net, x, plan = enabled(0)
    with pytest.raises(HawqError, match="does not run on the example input"):
        deploy(net, plan, torch.randn(2, 5, 7, 7))
    with pytest.raises(HawqError, match="must be a tensor"):
        deploy(net, plan, [x])
    other = plan.replace(sites=tuple(type(s)(**{**vars(s), "bits": s.bits % 8 + 1}) for s in plan.sites))
    with pytest.raises(HawqError, match="carries another plan"):
        deploy(net, other, x)
    for module in net.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer.disable()
            module.input_quantizer.disable()
    with pytest.raises(HawqError, match="never enabled"):
        deploy(net, plan, x)
