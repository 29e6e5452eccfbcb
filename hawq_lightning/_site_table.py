"""What sites are, the layers that tie them, and the table of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._shares import percent
from hawq_lightning._types import JsonObject
from hawq_lightning.layers import is_result

RESULT_BITS = 8  # of what integer kernels give where no layer reads it


@dataclass(frozen=True)
class Site:
    """What gets a quantizer.

    Attributes:
        name: ``<layer>.weight``, ``<first reader>.input``, or a result such as ``layer1.0:add``.
        kind: ``weight`` or ``activation``.
        layers: the layers that use the weight, or that read the activation; and results that lie on its grid.
        shape: of the weight; of the first activation tensor without its batch axis.
        numel: weight elements; activation elements of one image, all tensors together.
        channels: number of weight scales (1 for activations).
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    numel: int
    channels: int = 1

    @property
    def float32_bytes(self) -> int:
        """Bytes as float32, which compressions and shares are against; of an activation, of one image."""
        return 4 * self.numel

    @property
    def fixed_bits(self) -> int | None:
        """The one width of grids that integer kernels want where no layer reads; ``None``: there is a choice."""
        return RESULT_BITS if all(map(is_result, self.layers)) else None


@dataclass(frozen=True)
class Layer:
    """A quantizable layer: its two sites and its multiply-accumulates for one image.

    ``norm`` names the BatchNorm that reads its outputs, all of them and nothing else, so that it can be folded.
    """

    name: str
    type: str
    weight: str
    activation: str | None
    macs: int
    norm: str | None = None

    @classmethod
    def from_dict(cls, raw: JsonObject) -> Layer:
        """Read back ``dataclasses.asdict``."""
        reads, norm = raw.get("activation"), raw.get("norm")
        return cls(
            str(raw["name"]),
            str(raw["type"]),
            str(raw["weight"]),
            None if reads is None else str(reads),
            int(raw["macs"]),
            None if norm is None else str(norm),
        )


@dataclass(frozen=True)
class ActivationProduct:
    """A product of two activations, which has no weight: attention's scores, or its weighted values.

    Attributes:
        name: ``<module>:scores`` or ``<module>:values``.
        left: activation site of its first factor; ``None``: it stays float.
        right: of its second.
        macs: multiply-accumulates of one image.
    """

    name: str
    left: str | None
    right: str | None
    macs: int

    @classmethod
    def from_dict(cls, raw: JsonObject) -> ActivationProduct:
        """Read back ``dataclasses.asdict``."""
        left, right = (None if (site := raw.get(side)) is None else str(site) for side in ("left", "right"))
        return cls(str(raw["name"]), left, right, int(raw["macs"]))


@dataclass(frozen=True)
class FloatPart:
    """A module, or an operation inside one, that stays float, and why.

    Attributes:
        name: of the module, or of the modules that the operations are in.
        type: of the module.
        reason: why it has no site.
        bytes: of its parameters, at their own types.
        macs: multiply-accumulates of one image.
        float32_bytes: of its parameters, with floats counted as float32.
        elements: of its parameters.
    """

    name: str
    type: str
    reason: str
    bytes: int
    macs: int
    float32_bytes: int = 0
    elements: int = 0


@dataclass(frozen=True)
class FloatTensor:
    """A parameter or persistent buffer that the packed file keeps as it is.

    Attributes:
        name: in the state dict; of several the first.
        bytes: at its own type.
        reason: why no plan changes it.
        small: one number a channel, such as biases and the scales of norms, which nobody quantizes.
        float32_bytes: the same with floats counted as float32; ``None``: as ``bytes``.
    """

    name: str
    bytes: int
    reason: str
    small: bool = False
    float32_bytes: int | None = None

    @property
    def as_float32(self) -> int:
        """Bytes with floats counted as float32."""
        return self.bytes if self.float32_bytes is None else self.float32_bytes


@dataclass(frozen=True)
class SiteTable:
    """All sites, the layers that tie them, and what stays float. Iterating gives the sites.

    ``layers`` are in the order in which the forward pass first calls them; ``last`` names the one with most layers in a
    row before it, where a pass has shown that. ``floats`` are modules, ``float_tensors`` the tensors of the state dict
    that are no site's weight; ``None``: not known. ``products`` are those of attention whose factors are sites.
    ``biases`` has the layers whose biases are INT32 -> the BatchNorm that they take in, or nothing.
    """

    sites: tuple[Site, ...]
    layers: tuple[Layer, ...]
    floats: tuple[FloatPart, ...] = ()
    traced: bool = True
    last: str = ""
    float_tensors: tuple[FloatTensor, ...] | None = None
    products: tuple[ActivationProduct, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)
    _index: dict[str, Site] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._index.update({s.name: s for s in self.sites})

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        """The site called ``name``."""
        if name not in self._index:
            raise HawqError(f"No site is called {name!r}.{nearest(name, self._index)}")
        return self._index[name]

    @property
    def first_to_last(self) -> tuple[Layer, ...]:
        """The layers, the network's last one at the end, though auxiliary heads may be called after it."""
        return tuple(sorted(self.layers, key=lambda x: x.name == self.last))

    @property
    def reads(self) -> dict[str, str]:
        """Layer, or operand of attention -> the activation site that it reads."""
        of_layers = {x.name: x.activation for x in self.layers if x.activation is not None}
        return of_layers | {n: s.name for s in self.activations for n in s.layers if n not in of_layers}

    @property
    def weights(self) -> tuple[Site, ...]:
        """The weight sites."""
        return tuple(s for s in self.sites if s.kind == "weight")

    @property
    def activations(self) -> tuple[Site, ...]:
        """The activation sites."""
        return tuple(s for s in self.sites if s.kind == "activation")

    @property
    def float_bytes(self) -> int | None:
        """Bytes of the model that are no site's weight, at their own type; ``None``: not known."""
        return None if self.float_tensors is None else sum(t.bytes for t in self.float_tensors)

    @property
    def float_rest(self) -> int | None:
        """:attr:`float_bytes` with floats counted as float32, which compressions are against; ``None``: not known."""
        return None if self.float_tensors is None else sum(t.as_float32 for t in self.float_tensors)

    @property
    def quantized_share(self) -> float | None:
        """Share of the bytes of the model as float32 that the weight sites have; ``None``: not known."""
        if self.float_rest is None:
            return None
        size = sum(s.float32_bytes for s in self.weights)
        return size / (size + self.float_rest)

    @property
    def macs_share(self) -> float | None:
        """Share of the multiply-accumulates that read a weight site, or two activation sites; ``None``: not known."""
        quantized = sum(x.macs for x in self.layers) + sum(x.macs for x in self.products)
        total = quantized + sum(f.macs for f in self.floats)
        return quantized / total if self.traced and total else None

    def rows(self) -> list[JsonObject]:
        """One dict a line, sites first, then what stays float; shares are of the listed float32 bytes and MACs."""
        total_bytes = sum(s.float32_bytes for s in self.weights) + sum(f.float32_bytes for f in self.floats) or 1
        total_macs = sum(p.macs for p in self.products) + sum(f.macs for f in self.floats)
        total_macs = total_macs + sum(layer.macs for layer in self.layers) or 1
        macs_of = {s.name: sum(x.macs for x in self.layers if x.weight == s.name) for s in self.weights}
        out: list[JsonObject] = []
        for s in self.sites:
            weight = s.kind == "weight"
            out.append(
                asdict(s)
                | {
                    "quantized": True,
                    "bytes_share": s.float32_bytes / total_bytes if weight else 0.0,
                    "macs_share": macs_of[s.name] / total_macs if weight else 0.0,
                }
            )
        for f in self.floats:
            out.append(
                asdict(f)
                | {
                    "quantized": False,
                    "bytes_share": f.float32_bytes / total_bytes,
                    "macs_share": f.macs / total_macs,
                }
            )
        return out

    def __str__(self) -> str:
        cells = [("site", "kind", "shape", "elements", "bytes", "MACs", "")]
        for r in self.rows():
            what = r["kind"] if r["quantized"] else "float"
            shape = "x".join(map(str, r["shape"])) if r["quantized"] else r["type"]
            count = r["numel" if r["quantized"] else "elements"]
            why = "" if r["quantized"] else f"  {r['reason']}"
            shares = f"{r['bytes_share']:.1%}", f"{r['macs_share']:.1%}"
            cells.append((r["name"], what, shape, f"{count:,}", *shares, why))
        quantized = sum(s.numel for s in self.weights)
        if (share := self.quantized_share) is not None:
            macs = "" if self.macs_share is None else percent(self.macs_share)
            whole = "  of the whole model, biases and buffers included"
            cells.append(("(all quantized)", "weight", "", f"{quantized:,}", percent(share), macs, whole))
        name, form, count = (max(least, *(len(c[i]) for c in cells)) for i, least in ((0, 40), (2, 18), (3, 10)))
        lines = [f"{c[0]:{name}} {c[1]:10} {c[2]:>{form}} {c[3]:>{count}} {c[4]:>7} {c[5]:>7}{c[6]}" for c in cells]
        if not self.traced:
            lines.append("No example batch was given: activations, MACs and call order are unknown.")
        return "\n".join(lines)
