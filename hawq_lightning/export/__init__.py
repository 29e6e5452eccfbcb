"""What leaves the workshop: the packed file."""

from hawq_lightning.export.packed import PackedFile, load_packed, packed_overhead, read_packed, save_packed

__all__ = ["PackedFile", "load_packed", "packed_overhead", "read_packed", "save_packed"]
