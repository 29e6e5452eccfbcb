"""The packed file: predicted size, exact reload in another process, refusals of damaged and foreign files."""

import copy
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hawq_lightning import HawqError, Plan, PlanSite, SiteTable, sites
from hawq_lightning.export import load_packed, packed_overhead, read_packed, save_packed
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
        self.embed = nn.Embedding(7, 5, sparse=True)  # which stays float
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
                    s.bits, peak / max(2, 2 ** (s.bits - 1)) + 1e-4, -0.5 if s.code == "midrise" else 0.0
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
        enabled = enable(copy.deepcopy(net), plan)
        path = tmp_path / f"{seed}.safetensors"
        size = save_packed(enabled, plan, path)
        assert size == os.stat(path).st_size == predicted(net, table, plan)
        assert packed_overhead(enabled, plan.sites) == overhead  # twins or float: the same
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
    payload += sum(t.nbytes for s in file.weights for t in s.storage.tensors.values()) + sum(
        t.nbytes for t in file.rest.values()
    )
    assert path.stat().st_size < payload + 5 * 1024
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


def resealed(path: Path, target: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Path:
    """The file with other tensors or metadata, and a checksum that is right."""
    tensors, metadata = internal("export._safetensors").read(path)
    change(tensors, metadata)
    internal("export._safetensors").write(target, tensors, metadata)
    return target


@pytest.mark.parametrize(
    ("site", "key", "value"),
    [
        ("first.weight", "bits", 9), ("first.weight", "bits", 0), ("first.weight", "bits", "4"),
        ("first.weight", "code", "codebok"), ("first.weight", "code", None), ("first.weight", "shape", [8, 3, 3]),
        ("first.weight", "shape", [8, 3, 3, 1 << 50]), ("first.weight", "axis", 4), ("first.weight", "dtype", "F31"),
        ("first.weight", "layers", []), ("first.weight", "more", 1), ("first.weight", "shape", [1 << 39, 0]),
        ("first.input", "bits", 1), ("first.input", "scale", float("inf")), ("first.input", "scale", -1.0),
        ("first.input", "scale", 0.1), ("first.input", "zero_point", 0.5), ("first.input", "zero_point", 256),
        ("first.input", "zero_point", True), ("first.input", "code", "midrise"), ("first.input", "other", 1),
    ],
)  # fmt: skip
def test_facts_are_checked_behind_a_valid_checksum(
    packed: tuple[nn.Module, Plan, Path], tmp_path: Path, site: str, key: str, value: object
) -> None:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        entries = json.loads(metadata["sites"])
        entries[site][key] = value
        metadata["sites"] = json.dumps(entries)

    with pytest.raises(HawqError, match="corrupt"):
        read_packed(resealed(packed[2], tmp_path / "bad", change))


def test_tensors_are_checked_behind_a_valid_checksum(packed: tuple[nn.Module, Plan, Path], tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(HawqError, match=r"corrupt: of 'up.weight' scale is not"):
            read_packed(resealed(packed[2], tmp_path / "bad", lambda t, m, v=value: t["up.weight.scale"].fill_(v)))
    with pytest.raises(HawqError, match="corrupt: of 'up.weight' scale is missing"):
        read_packed(resealed(packed[2], tmp_path / "bad", lambda t, m: t.pop("up.weight.scale")))
    with pytest.raises(HawqError, match="corrupt: of 'up.weight' basis is nothing"):
        read_packed(resealed(packed[2], tmp_path / "bad", lambda t, m: t.update({"up.weight.basis": torch.ones(2)})))
    with pytest.raises(HawqError, match="bytes of codes where its bits need"):
        read_packed(resealed(packed[2], tmp_path / "bad", lambda t, m: t.update({"up.weight.codes": torch.ones(3)})))


def test_a_users_quantizer_that_was_not_imported_is_named(packed: tuple[nn.Module, Plan, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata["sites"] = metadata["sites"].replace('"bits"', '"quantizer":"lqs","bits"', 1)

    with pytest.raises(HawqError, match="no quantizer 'lqs'.*Did you mean 'lsq'.*known once imported"):
        read_packed(resealed(packed[2], tmp_path / "bad", change))


@pytest.mark.parametrize("header", ["[" * 130_000, "[" + "[]," * 40_000 + "[]]", '{"a":' * 20_000, "9" * 130_000])
def test_a_small_file_takes_little_memory(tmp_path: Path, header: str) -> None:
    """130 KB of nested or numerous JSON must not become gigabytes of objects."""
    for raw in (
        header,
        json.dumps({"__metadata__": {"format": "hawq_lightning.packed", "version": "4", "sites": header}}),
    ):
        (tmp_path / "bad").write_bytes(len(raw).to_bytes(8, "little") + raw.encode())
        tracemalloc.start()
        with pytest.raises(HawqError, match="corrupt"):
            read_packed(tmp_path / "bad")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50 << 20


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "bad").write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(HawqError, match="its header of"):
        read_packed(tmp_path / "bad")


def test_safe_open_shows_a_person_what_is_inside(packed: tuple[nn.Module, Plan, Path]) -> None:
    net, plan, path = packed
    with safe_open(path, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        assert torch.equal(file.get_tensor("bn.running_var"), net.bn.running_var)
        assert file.get_tensor("ramp").dtype == torch.bfloat16 and file.get_tensor("flags").dtype == torch.bool
        for site in plan.weights:
            codes = file.get_tensor(f"{site.name}.codes")
            assert codes.dtype == torch.uint8 and len(codes) == (site.numel * site.bits + 7) // 8
            assert torch.equal(
                file.get_tensor(f"{site.name}.scale"), net.get_submodule(site.layers[0]).weight_quantizer.scale
            )
    assert "embed.weight" in names and "first.weight" not in names  # a tied weight that is not quantized everywhere
    assert metadata["format"] == "hawq_lightning.packed" and metadata["version"] == "4" and metadata["description"]
    entries = json.loads(metadata["sites"])
    assert {n: e["bits"] for n, e in entries.items()} == plan.bits
    assert entries["first.input"]["scale"] == float(net.first.input_quantizer.scale)


def test_tied_parameters_are_stored_once(tmp_path: Path) -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Embedding(9, 4), "c": nn.Embedding(9, 4)})
    net["c"].weight = net["b"].weight
    plan = Plan((PlanSite("a.weight", "weight", ("a",), (4, 4), 16, 4, "affine"),))
    save_packed(enable(net, plan), plan, tmp_path / "tied")
    with safe_open(tmp_path / "tied", framework="pt") as file:
        assert set(file.keys()) == {"a.weight.codes", "a.weight.scale", "a.bias", "b.weight"}
        assert json.loads(file.metadata()["aliases"]) == {"b.weight": ["c.weight"]}
    other = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Embedding(9, 4), "c": nn.Embedding(9, 4)})
    with pytest.raises(HawqError, match="another model.*only in the file: b.weight"):
        load_packed(tmp_path / "tied", other)
    other["c"].weight = other["b"].weight
    assert torch.equal(load_packed(tmp_path / "tied", other)["c"].weight, net["b"].weight)


def test_a_state_key_that_is_a_sites_is_refused(tmp_path: Path) -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4)})
    plan = Plan((PlanSite("a.weight", "weight", ("a",), (4, 4), 16, 4, "affine"),))
    enable(net, plan)
    net["a"].__dict__["_buffers"]["weight.scale"] = torch.ones(2)
    with pytest.raises(HawqError, match="'a.weight.scale', which is what a site's tensor is called"):
        save_packed(net, plan, tmp_path / "x")


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
    with pytest.raises(HawqError, match="never enabled"):
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
    save_file({"w": torch.zeros(3)}, tmp_path / "later", {"format": "hawq_lightning.packed", "version": "9"})
    with pytest.raises(HawqError, match="version '9'"):
        load_packed(tmp_path / "later", built())


def test_a_file_of_more_than_a_megabyte(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(1500, 1000), nn.Linear(1000, 300))
    plan = Plan((PlanSite("0.weight", "weight", ("0",), (1000, 1500), 1_500_000, 8, "affine"),))
    assert save_packed(enable(net, plan), plan, tmp_path / "x") > 2 << 20
    x = torch.randn(2, 1500)
    assert torch.equal(
        load_packed(tmp_path / "x", nn.Sequential(nn.Linear(1500, 1000), nn.Linear(1000, 300)))(x), net(x)
    )
