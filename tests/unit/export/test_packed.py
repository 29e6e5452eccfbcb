"""The packed file: predicted size, exact reload in another process, refusals of damaged and foreign files."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, Plan, PlanSite, SiteTable, sites
from hawq_lightning.export import Index, load_packed, packed_overhead, read_packed, save_packed
from hawq_lightning.layers import FakeQuantLayer
from hawq_lightning.quantization import to_fake_quantized
from tests.internals import internal


class Net(nn.Module):
    """Convolutions of all sorts, one layer used twice, a tied embedding, buffers of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.up = nn.ConvTranspose2d(12, 5, 2, stride=2)
        self.shared = nn.Conv2d(5, 5, 3, padding=1)
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("ramp", torch.linspace(0, 1, 5, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.bn(self.first(x)))
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        x = torch.relu(self.shared(torch.relu(self.shared(x)))).mean((2, 3))
        return self.head(x + self.embed(torch.tensor([3])))


def built() -> Net:
    net = Net()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    return net.eval()


def random_plan(table: SiteTable, seed: int) -> Plan:
    g = torch.Generator().manual_seed(seed)
    chosen = []
    for s in table:
        if s.kind == "weight":
            bits = int(torch.randint(1, 9, (), generator=g))
            code = "midrise" if bits == 1 or torch.rand((), generator=g) < 0.3 else "affine"
            chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, code))
        else:
            bits = int(torch.randint(2, 9, (), generator=g))
            zero = int(torch.randint(0, 1 << bits, (), generator=g))
            scale = 4 / 2**bits * (0.5 + torch.rand((), generator=g).item())
            chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, "affine", scale, zero))
    return Plan(tuple(chosen), table.layers)


def enable(model: nn.Module, plan: Plan) -> nn.Module:
    for s in plan.sites:
        for name in s.layers:
            twin = to_fake_quantized(model.get_submodule(name))
            if s.kind == "activation":
                twin.input_quantizer.enable(s.bits, s.scale, s.zero_point)
            else:
                peak = (
                    twin.weight.detach()
                    .abs()
                    .amax([d for d in range(twin.weight.ndim) if d != twin.weight_quantizer.axis])
                )
                twin.weight_quantizer.enable(
                    s.bits, peak / 2 ** (s.bits - 1) + 1e-4, -0.5 if s.code == "midrise" else 0.0
                )
    return model


def predicted(model: nn.Module, table: SiteTable, plan: Plan) -> int:
    variable = sum((s.numel * plan.bits[s.name] + 7) // 8 + 4 * s.channels for s in table.weights)
    return packed_overhead(model, table) + variable


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Plan, Path]:
    torch.manual_seed(0)
    net = built()
    plan = random_plan(sites(net, torch.randn(2, 3, 8, 8)), 1)
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    save_packed(enable(net, plan), plan, path)
    return net, plan, path


def test_size_is_predicted_for_every_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = built()
    table = sites(net, torch.randn(2, 3, 8, 8))
    overhead = packed_overhead(net, table)
    sizes = set()
    for seed in range(25):
        plan = random_plan(table, seed)
        armed = enable(copy.deepcopy(net), plan)
        path = tmp_path / f"{seed}.safetensors"
        size = save_packed(armed, plan, path)
        assert size == os.stat(path).st_size == predicted(net, table, plan)
        assert packed_overhead(armed, plan.sites) == overhead  # twins or float: the same
        sizes.add(size)
    assert len(sizes) > 10


def test_digits_of_the_offsets_do_not_show(tmp_path: Path) -> None:
    # 1 bit: 150 bytes of codes, 8 bits: 1,200: the offsets gain a digit
    net = nn.Sequential(nn.Linear(30, 40, bias=False))
    table = sites(net, torch.randn(1, 30))
    for bits in range(1, 9):
        s = table.weights[0]
        plan = Plan((PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, "midrise"),))
        size = save_packed(enable(copy.deepcopy(net), plan), plan, tmp_path / "x")
        assert size == packed_overhead(net, plan.sites) + 150 * bits + 160 == os.stat(tmp_path / "x").st_size


def test_same_logits_and_codes_in_a_new_process(packed: tuple[nn.Module, Plan, Path], tmp_path: Path) -> None:
    net, plan, path = packed
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    codes = {s.name: (m := net.get_submodule(s.layers[0])).weight_quantizer.codes(m.weight) for s in plan.weights}
    torch.save({"x": x, "y": net(x), "codes": codes}, tmp_path / "expected.pt")
    script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.unit.export.test_packed import Net
from hawq_lightning.export import load_packed
torch.manual_seed(99)
want = torch.load({str(tmp_path / "expected.pt")!r})
net = load_packed({str(path)!r}, Net().eval())
assert torch.equal(net(want["x"]), want["y"]), "logits differ"
for name, codes in want["codes"].items():
    layer = net.get_submodule(name.removesuffix(".weight"))
    assert torch.equal(layer.weight_quantizer.codes(layer.weight), codes), name
print("same", len(want["codes"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"same {len(plan.weights)}", done.stderr[-2000:]


def test_everything_else_is_exact(packed: tuple[nn.Module, Plan, Path]) -> None:
    net, _, path = packed
    other = load_packed(path, Net())
    assert other.training  # the mode stays as given
    mine, theirs = net.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    owned = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, FakeQuantLayer)} - {"head.weight"}
    assert len(owned) == 4
    for key in mine.keys() - owned:
        assert torch.equal(mine[key], theirs[key]), key
    assert other.head.weight is other.embed.weight


def test_twinned_model_and_wrappers_load_too(packed: tuple[nn.Module, Plan, Path], tmp_path: Path) -> None:
    net, plan, path = packed
    x = torch.randn(4, 3, 8, 8)
    armed_otherwise = enable(built(), random_plan(sites(net, x), 7))
    assert torch.equal(load_packed(path, armed_otherwise)(x), net(x))
    wrapper = nn.Module()
    wrapper.net = built()
    load_packed(path, wrapper)
    assert torch.equal(wrapper.net(x), net(x))
    task = nn.Module()
    task.net = net
    task.class_weights = nn.Parameter(torch.ones(7))  # the wrapper's own; the network does without
    renamed = tuple(
        PlanSite(f"net.{s.name}", s.kind, tuple(f"net.{n}" for n in s.layers), *list(vars(s).values())[3:])
        for s in plan.sites
    )
    save_packed(task, Plan(renamed), tmp_path / "task.safetensors")
    assert torch.equal(load_packed(tmp_path / "task.safetensors", built())(x), net(x))
    wrapper.own = nn.Linear(2, 2)
    load_packed(path, wrapper)
    assert torch.equal(wrapper.net(x), net(x))


def test_file_is_small_and_reproducible(packed: tuple[nn.Module, Plan, Path], tmp_path: Path) -> None:
    net, plan, path = packed
    save_packed(net, plan, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    file = read_packed(path)
    payload = sum((s.numel * s.bits + 7) // 8 for s in plan.weights)
    payload += sum(4 * t.numel() for t in file.scales.values()) + sum(t.nbytes for t in file.rest.values())
    assert path.stat().st_size < payload + 2048
    assert file.plan.bits == plan.bits
    assert {s.name: (s.code, s.zero_point) for s in file.plan.sites} == {
        s.name: (s.code, s.zero_point) for s in plan.sites
    }


def test_a_weights_only_plan(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    full = random_plan(sites(net, torch.randn(1, 6)), 3)
    plan = Plan(full.weights)
    enable(net, plan)
    save_packed(net, plan, tmp_path / "w")
    other = load_packed(tmp_path / "w", nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    x = torch.randn(9, 6)
    assert torch.equal(other(x), net(x))
    assert other[0].input_quantizer.bits == 0


def test_damage_is_always_noticed(packed: tuple[nn.Module, Plan, Path], tmp_path: Path) -> None:
    good = packed[2].read_bytes()
    bad = tmp_path / "bad"
    g = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(good), (250,), generator=g).tolist() + list(range(0, 8)) + [len(good) - 1]
    for place in places:
        mutated = bytearray(good)
        mutated[place] ^= 1 << int(torch.randint(0, 8, (), generator=g))
        bad.write_bytes(mutated)
        with pytest.raises(HawqError):
            read_packed(bad)
    for length in [0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1]:
        bad.write_bytes(good[:length])
        with pytest.raises(HawqError, match="corrupt"):
            read_packed(bad)
    bad.write_bytes(good + b"\0")
    with pytest.raises(HawqError):
        read_packed(bad)


def test_values_are_checked_behind_a_valid_checksum(packed: tuple[nn.Module, Plan, Path], tmp_path: Path) -> None:
    index, blobs = internal("export._container").read(packed[2])
    most = sum(w.numel for w in index.weights)
    wrong = [("scales", float("nan")), ("scales", -1.0), ("bits", 9), ("bits", 0), ("kinds", 7)]
    wrong += [("act_bits", 1), ("act_scales", float("inf")), ("act_zeros", 0.5), ("act_zeros", 256.0)]
    for name, value in wrong:
        changed = {k: v.clone() for k, v in blobs.items()}
        changed[name][0] = value
        internal("export._container").write(tmp_path / "bad", index, changed, most)
        with pytest.raises(HawqError, match="corrupt"):
            read_packed(tmp_path / "bad")


def test_an_index_that_lies_about_sizes_allocates_nothing(packed: tuple[nn.Module, Plan, Path], tmp_path: Path) -> None:
    index, blobs = internal("export._container").read(packed[2])
    first = index.weights[0]
    huge = dataclasses.replace(first, shape=(first.shape[0], 1 << 20, 1 << 14))
    internal("export._container").write(
        tmp_path / "bad", dataclasses.replace(index, weights=(huge, *index.weights[1:])), blobs, blobs["codes"].numel()
    )
    with pytest.raises(HawqError, match="corrupt: .* bytes of codes where its bits need"):
        read_packed(tmp_path / "bad")


@pytest.mark.parametrize("text", ["", "AAAA", "!!", "eJyLjgUAARUAuQ=="])
def test_a_damaged_index(text: str) -> None:
    with pytest.raises(HawqError, match="index"):
        Index.decode(text)


def test_an_inflating_index_is_bounded() -> None:
    import base64
    import zlib

    bomb = base64.b64encode(zlib.compress(b"[" * (1 << 27), 9)).decode()
    with pytest.raises(HawqError, match="too long"):
        Index.decode(bomb)


def test_another_model_is_named_and_left_alone(packed: tuple[nn.Module, Plan, Path]) -> None:
    other = built()
    other.grouped = nn.Conv2d(8, 12, 3, groups=2)
    other.extra = nn.Linear(2, 2)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(HawqError, match=r"another model.*extra\.weight.*grouped\.weight"):
        load_packed(packed[2], other)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    assert not any(isinstance(m, FakeQuantLayer) for m in other.modules())
    with pytest.raises(HawqError, match=r"only in the file: first\.weight"):
        load_packed(packed[2], nn.Sequential(nn.Linear(2, 2)))
    untied = built()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    load_packed(packed[2], untied)  # the embedding is a tensor of its own in both


def test_refusals_before_anything_is_written(packed: tuple[nn.Module, Plan, Path], tmp_path: Path) -> None:
    net, plan, _ = packed
    with pytest.raises(HawqError, match="not quantized"):
        save_packed(built(), plan, tmp_path / "a")
    twins = built()
    for s in plan.weights:
        to_fake_quantized(twins.get_submodule(s.layers[0]))
    with pytest.raises(HawqError, match="never armed"):
        save_packed(twins, plan, tmp_path / "a")
    with pytest.raises(HawqError, match="another plan"):
        save_packed(net, random_plan(sites(built(), torch.randn(1, 3, 8, 8)), 12), tmp_path / "a")
    with pytest.raises(HawqError, match="that the plan has not"):
        save_packed(net, Plan(plan.weights), tmp_path / "a")
    poisoned = copy.deepcopy(net)
    poisoned.up.weight.data[0] = float("nan")
    with pytest.raises(HawqError, match="'up' holds NaN"):
        save_packed(poisoned, plan, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_unwritable_and_missing_paths(packed: tuple[nn.Module, Plan, Path], tmp_path: Path) -> None:
    net, plan, _ = packed
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "model.safetensors", tmp_path / "folder", Path("/proc/nowhere/model.safetensors")):
        with pytest.raises(HawqError, match="Cannot write"):
            save_packed(net, plan, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    with pytest.raises(HawqError, match="No packed file"):
        load_packed(tmp_path / "none", built())


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, tmp_path / "plain")
    with pytest.raises(HawqError, match="not a packed file"):
        load_packed(tmp_path / "plain", built())
    save_file(
        {"w": torch.zeros(3)}, tmp_path / "later", {"format": internal("export._container").FORMAT, "version": "9"}
    )
    with pytest.raises(HawqError, match="version '9'"):
        load_packed(tmp_path / "later", built())
