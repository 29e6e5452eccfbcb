"""What there is to choose from at every site: plain data between measuring and choosing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hawq_lightning._code_formats import code_bytes
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._fields import CHECKSUM, check_names, sealed, sequence, shown, table, text, whole
from hawq_lightning._io import json_text, without_infinity, write_text
from hawq_lightning._plan_site import Candidate, read_candidate
from hawq_lightning._sealed import load_sealed
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import JsonObject, Options

FORMAT = "hawq_lightning.candidates"
VERSION = 1


@dataclass(frozen=True)
class Candidates(Mapping[str, tuple[Candidate, ...]]):
    """Site name -> its candidates, ascending in bits, with the cost of each. A mapping; printed, it is a table.

    Attributes:
        by_site: the candidates.
        numel: site name -> elements; of an activation, those of one sample.
        kinds: site name -> ``weight`` or ``activation``.
        quantizer: registered name of the quantizer whose errors were weighed.
        quantizer_options: its options.
    """

    by_site: Mapping[str, tuple[Candidate, ...]]
    numel: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    quantizer: str = "uniform"
    quantizer_options: Options = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        by_site: Mapping[str, tuple[Candidate, ...]],
        sites: SiteTable,
        quantizer: str = "uniform",
        quantizer_options: Options | None = None,
    ) -> Candidates:
        """With kinds and sizes of the sites.

        Args:
            by_site: site name -> candidates.
            sites: table of the model.
            quantizer: registered name.
            quantizer_options: its options.
        """
        weighed = [s for s in sites if s.name in by_site]
        sizes, kinds = {s.name: s.numel for s in weighed}, {s.name: s.kind for s in weighed}
        return cls(dict(by_site), sizes, kinds, quantizer, dict(quantizer_options or {}))

    def __getitem__(self, name: str) -> tuple[Candidate, ...]:
        return self.by_site[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)

    def code_bytes(self, name: str, candidate: Candidate) -> float:
        """Bytes of a site's codes with one of its candidates; of an activation, for one sample.

        Raises:
            HawqError: no such site.
        """
        if name not in self.numel:
            raise HawqError(f"There are no candidates for {name!r}.{nearest(name, self.numel)}")
        return code_bytes(self.numel[name], candidate.bits, candidate.code)

    def rows(self) -> list[dict[str, str | float]]:
        """One dict a candidate: ``site, kind, bits, code, bytes, perturbation, omega``, and ``q`` where it is known."""
        out: list[dict[str, str | float]] = []
        for name, candidates in self.items():
            for c in candidates:
                out.append({
                    "site": name, "kind": self.kinds.get(name, ""), "bits": c.bits, "code": c.code,
                    "bytes": self.code_bytes(name, c), "perturbation": c.perturbation, "omega": c.omega,
                })  # fmt: skip
                if c.q is not None:
                    out[-1]["q"] = c.q
        return out

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=4)
        rows = self.rows()
        last = f"  {'q':>10}" if any("q" in row for row in rows) else ""
        lines = [f"{'site':<{width}}  bits  code          bytes  perturbation       omega{last}"]
        for row in rows:
            lines.append(
                f"{row['site']:<{width}}  {row['bits']:>4}  {row['code']:<8}  {row['bytes']:>9,.0f}  "
                f"{row['perturbation']:>12.4g}  {row['omega']:>10.4g}" + (f"  {row['q']:>10.4g}" if "q" in row else "")
            )
        return "\n".join(lines)

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        sites = {
            name: {
                "kind": self.kinds.get(name, ""), "numel": self.numel.get(name, 0),
                "candidates": [{k: v for k, v in asdict(c).items() if v is not None} for c in candidates],
            }
            for name, candidates in self.items()
        }  # fmt: skip
        head = {"format": FORMAT, "version": VERSION, "quantizer": self.quantizer}
        return head | {"quantizer_options": dict(self.quantizer_options), "sites": without_infinity(sites)}

    @classmethod
    def from_dict(cls, data: object) -> Candidates:
        """Read what :meth:`to_dict` wrote.

        Raises:
            HawqError: not candidates, an unknown version, or a field out of range; the message names it.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise HawqError(f'These are no candidates: expected a JSON object with "format": "{FORMAT}".')
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise HawqError(
                f"Candidates of version {shown(data.get('version'))} are unknown here; this reads {VERSION}."
            )
        try:
            check_names(
                data, "it", ("format", "version", "quantizer", "quantizer_options", "sites"), (CHECKSUM,)
            )  # fmt: skip
            sites = {name: _read_site(name, raw) for name, raw in table(data["sites"], "sites").items()}
            return cls(
                {name: site[2] for name, site in sites.items()},
                {name: site[1] for name, site in sites.items()},
                {name: site[0] for name, site in sites.items()},
                text(data["quantizer"], "quantizer"),
                table(data["quantizer_options"], "quantizer_options"),
            )
        except HawqError as error:
            raise HawqError(f"The candidates are damaged: {str(error).rstrip('.')}.") from error

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically, with a checksum of what it says."""
        write_text(path, json_text(sealed(self.to_dict()), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Candidates:
        """Read JSON written by :meth:`save`, or by hand; warns of a file that was changed since it was written.

        Raises:
            HawqError: no such file, no JSON, or no candidates; the message names file and field.
        """
        return load_sealed(path, "candidates file", cls.from_dict)


def _read_site(name: str, raw: object) -> tuple[str, int, tuple[Candidate, ...]]:
    """Kind, elements and candidates of a site."""
    data = table(raw, f"site {shown(name)}")
    check_names(data, f"site {shown(name)}", ("kind", "numel", "candidates"))
    kind, numel = text(data["kind"], f"kind of {shown(name)}"), whole(data["numel"], f"numel of {shown(name)}", 0)
    listed = [read_candidate(name, kind, c) for c in sequence(data["candidates"], f"candidates of {shown(name)}")]
    if not listed:
        raise HawqError(f"site {shown(name)} has no candidates")
    widths = [c.bits for c in listed]
    if widths != sorted(widths):
        raise HawqError(f"bits of {shown(name)} are {shown(widths)}; they must ascend")
    return kind, numel, tuple(listed)
