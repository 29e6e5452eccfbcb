"""The folder ``.hydra`` of a run, written once it is known that the run may use its folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hawq_lightning._io import write_text


def writes_hydra_files(cfg: DictConfig) -> bool:
    """Whether :func:`write_hydra_files` writes: not where Hydra has (``hydra.output_subdir``), nor without Hydra."""
    if not HydraConfig.initialized():
        return False
    hydra = HydraConfig.get()
    return hydra.output_subdir is None and str(cfg.paths.output_dir) == str(hydra.runtime.output_dir)


def write_hydra_files(cfg: DictConfig) -> None:
    """Write ``config.yaml``, ``hydra.yaml`` and ``overrides.yaml``, interpolations as they are.

    Hydra would write them, and over those of somebody else's folder, before the program's first line.
    """
    if not writes_hydra_files(cfg):
        return
    hydra: Any = HydraConfig.instance().cfg
    folder = Path(cfg.paths.output_dir) / ".hydra"
    own = OmegaConf.masked_copy(hydra, ["hydra"])
    for name, content in (("config", cfg), ("hydra", own), ("overrides", hydra.hydra.overrides.task)):
        write_text(folder / f"{name}.yaml", OmegaConf.to_yaml(content))


def files_named(cfg: DictConfig, folder: Path) -> list[str]:
    """Files of a folder that settings name, such as ``ckpt_path=runs/first/checkpoints/fine_tuning/last.ckpt``."""
    try:
        content = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:
        content = OmegaConf.to_container(cfg, resolve=False)
    home = os.path.realpath(folder)
    paths = (os.path.realpath(text) for text in _texts(content) if "\0" not in text)
    return [os.path.relpath(path, home) for path in paths if path.startswith(home + os.sep)]


def _texts(content: object) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)
