"""Ways to damage a file: bytes, what valid JSON says, and both with a checksum that is made anew."""

from __future__ import annotations

import copy
import hashlib
import json
import sys

from hawq_lightning.cli import sealed_text

VALUES = [
    None, True, False, 0, 1, -1, 3, 9, 255, 256, 2**31, 2**40, 2**63, 10**400, -(10**30), 0.0, -0.5, 1e-300, 1e308,
    float("nan"), float("inf"), "", "0", "affine", "codebook", "__import__('os').system('true')", "../../etc/passwd",
    "os.system", "\ud800", "\x00", "é" * 3, "n" * 10000, [], {}, [[]], [0] * 1000, {"_target_": "os.abort"},
    {"__reduce__": ["os.abort", []]},
]  # fmt: skip
_CELLS = ["", "0", "-1", "2.5", "nan", "inf", "1e999", "9" * 400, "=1+1", "\x00", '"', "x" * 5000, "\ud800", "4", "8"]


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, draw):
    """A copy of a JSON value with one thing in it replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    path = draw.choice([p for p in places(value) if p])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, how = path[-1], draw.choice(["replace", "replace", "remove", "double", "rename", "nudge", "nest"])
    if how == "remove":
        del parent[key]
    elif how == "double" and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif how == "rename" and isinstance(parent, dict):
        parent[draw.choice([str(key) + "x", "_target_", "__class__", "bits", ""])] = parent.pop(key)
    elif how == "nudge" and isinstance(parent[key], (int, float)):
        parent[key] = draw.choice([parent[key] + 1, parent[key] - 1, -parent[key], parent[key] * 1e6, str(parent[key])])
    elif how == "nest":
        for _ in range(draw.choice([1, 3, 200])):
            parent[key] = [parent[key]]
    else:
        parent[key] = copy.deepcopy(draw.choice(VALUES))
    return value


def raw_damage(raw: bytes, draw) -> bytes:
    """Bytes with bits flipped, pieces cut, moved, doubled, or rubbish between."""
    data, n = bytearray(raw), len(raw)
    at = draw.choice([draw.randrange(n), draw.randrange(min(n, 400)), n - 1 - draw.randrange(min(n, 400))])
    size = draw.choice([1, 1, 2, 8, draw.randrange(1, n)])
    how = draw.choice(["flip", "flip", "byte", "cut", "delete", "double", "insert", "zero", "swap", "several"])
    if how == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif how == "byte":
        data[at] = draw.randrange(256)
    elif how == "cut":
        del data[at:]
    elif how == "delete":
        del data[at : at + size]
    elif how == "double":
        data[at:at] = data[at : at + size]
    elif how == "insert":
        data[at:at] = draw.randbytes(size)
    elif how == "zero":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif how == "swap":
        other = draw.randrange(n)
        data[at], data[other] = data[other], data[at]
    else:
        for _ in range(draw.randrange(2, 20)):
            data[draw.randrange(n)] = draw.randrange(256)
    return bytes(data)


def header_damage(raw: bytes, draw) -> bytes:
    """A packed file whose header, valid JSON, says something else; lengths agree with it."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(changed(header, draw)).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def resealed(raw: bytes, draw) -> bytes:
    """A packed file with other sites, entries or values and a checksum that is right."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    meta = header["__metadata__"]
    how = draw.random()
    if how < 0.6:
        meta["sites"] = json.dumps(changed(json.loads(meta["sites"]), draw))
    elif how < 0.8:
        entries = changed({k: v for k, v in header.items() if k != "__metadata__"}, draw)
        header = {"__metadata__": meta, **entries}
    for _ in range(draw.choice([0, 1, 20])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    meta["sha256"] = "0" * 64
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    text = text.replace(b"0" * 64, hashlib.sha256(text + bytes(data)).hexdigest().encode())
    return len(text).to_bytes(8, "little") + text + bytes(data)


def json_damage(raw: bytes, draw) -> bytes:
    """JSON with one to three things changed."""
    return _text(_with_changes(raw, draw))


def json_resealed(raw: bytes, draw) -> bytes:
    """Likewise, with a checksum of what it then says."""
    return sealed_text(_with_changes(raw, draw)).encode()


def digest_resealed(raw: bytes, draw) -> bytes:
    """Bytes damaged behind a digest that is made anew, as an unfinished measurement has it in front."""
    data = raw_damage(raw[32:], draw)
    return hashlib.sha256(data).digest() + data


def table_damage(raw: bytes, draw) -> bytes:
    """A CSV table with cells replaced, removed or doubled."""
    rows = [line.split(",") for line in raw.decode().splitlines()]
    for _ in range(draw.choice([1, 1, 3])):
        row = draw.choice(rows)
        if row:
            at = draw.randrange(len(row))
            row[at : at + 1] = draw.choice([[], [row[at]] * 2, [str(draw.choice(_CELLS))]])
    return "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")


def _with_changes(raw: bytes, draw):
    value = json.loads(raw)
    for _ in range(draw.choice([1, 1, 1, 3])):
        value = changed(value, draw)
    return value


def _text(value) -> bytes:
    sys.set_int_max_str_digits(0)  # to write numbers of thousands of digits
    try:
        return json.dumps(value, indent=1).encode("utf-8", "surrogatepass")
    finally:
        sys.set_int_max_str_digits(4300)
