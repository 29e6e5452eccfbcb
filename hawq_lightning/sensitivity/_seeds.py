"""Where every random number of a measurement comes from: one seed, mixed with what the number is for.

Results therefore depend neither on the number of processes nor on where a measurement was interrupted. Of measurement
seed s, batch b and step t:

- signs and vectors of a whole batch: ``derive_seed(s, b, t)``;
- of a part of it that begins at sample i, where memory ran out: ``derive_seed(s, b, t, i)``;
- which samples of the batch are drawn: ``derive_seed(s, t, b, 0)``;
- signs of drawn samples, the first of which is sample i: ``derive_seed(s, t, b, 1 + i)``.
"""

from __future__ import annotations

import hashlib


def derive_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
