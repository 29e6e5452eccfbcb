"""What the groups ``task``, ``data`` and ``model`` name by ``_target_``: this package's classes, or the user's own."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from importlib.resources import files
from types import ModuleType

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._types import JsonObject

_OWN = "hawq_lightning"


def working_folder_first() -> None:
    """Let modules of the working folder be imported, as ``python -m`` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def target_of(node: DictConfig, group: str) -> object:
    """The class or function of a group.

    Args:
        node: the group's settings.
        group: its name, for messages.

    Raises:
        HawqError: none is named, or there is none of that name; the message has the nearest.
    """
    if node.get("_target_") is None:
        raise HawqError(f"{group}._target_ is not set; add {group}._target_=module.Class, of your own package.")
    return located(str(node._target_), f"{group}._target_")


def located(target: str, key: str) -> object:
    """What a dotted name means.

    Args:
        target: ``package.module.Class``.
        key: where it was given, for messages.

    Raises:
        HawqError: there is no such thing; the message has the part that is wrong and the nearest choice.
    """
    said = f"{key}={target}"
    first, *rest = target.split(".")
    if not rest or not all(part.isidentifier() for part in (first, *rest)):
        raise HawqError(f"{said} is no dotted name; write module.{rest[-1] if rest else first} with its module.")
    found: object = _imported(first, said)
    if found is None:
        choices = [m.name for m in pkgutil.iter_modules([os.getcwd()])]
        raise HawqError(
            f"{said}: there is no module {first!r}, neither installed nor in {os.getcwd()}.{nearest(first, choices)}"
        )
    path = first
    for part in rest:
        above, path = found, f"{path}.{part}"
        if isinstance(above, ModuleType) and not hasattr(above, part):
            found = _imported(path, said)
        else:
            found = getattr(above, part, None)
        if found is None:
            raise HawqError(f"{said}: {path.rpartition('.')[0]} has no {part!r}.{nearest(part, _names(above))}")
    if not callable(found):
        raise HawqError(f"{said} is a {type(found).__name__}, no class or function.")
    return found


def made(node: DictConfig, group: str, **more: object) -> object:
    """The object of a group, with the keys that are meant for it.

    Where a class of the user's own stands in a file of this package (``task._target_=my.Task`` beside the default
    ``task=classification_smoothed``), that file's other settings are not handed to it.

    Args:
        node: the group's settings.
        group: its name.
        more: further arguments.

    Raises:
        HawqError: no such target, or it refuses its arguments.
    """
    target = target_of(node, group)
    node = node.copy()
    OmegaConf.set_struct(node, False)
    if left_out := _not_meant(node, group, target):
        print(f"{node._target_} is not of {_OWN}: it is given nothing of {group}'s {', '.join(left_out)}")
        for key in left_out:
            del node[key]
    for key, inner in _targets(OmegaConf.to_container(node, resolve=True), group):
        located(inner, key)
    node.setdefault("_convert_", "all")
    try:
        return instantiate(node, **more)
    except InstantiationException as error:
        if isinstance(error.__cause__, TypeError):  # arguments, or whatever its code raises
            said = str(error.__cause__).partition(". Did you mean")[0]  # which Python 3.13 adds; the names follow here
            raise HawqError(f"{group}._target_={node._target_}: {said}. {_signature(target, group)}") from error
        raise


def is_own(target: object) -> bool:
    """Whether a class or function is of this package, or a class derived from one that is."""
    origins = (inspect.getmodule(c) for c in (target.__mro__ if isinstance(target, type) else (target,)))
    return any(m is not None and m.__name__.partition(".")[0] == _OWN for m in origins)


def takes(target: object, name: str) -> bool:
    """Whether a call may have the keyword ``name``."""
    known = _parameters(target)
    return name in known or any(p.kind is p.VAR_KEYWORD for p in known.values())


def _parameters(target: object) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # built in
        return {}


def _signature(target: object, group: str) -> str:
    known = {n: p for n, p in _parameters(target).items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = [n for n, p in known.items() if p.default is p.empty]
    example = f"; give one as +{group}.{needed[0]}=..." if needed else ""
    return f"It takes {', '.join(known) or 'no arguments'}{example}."


def _not_meant(node: DictConfig, group: str, target: object) -> list[str]:
    """Keys that stand there because of a file of this package, with the value of that file."""
    if is_own(target):
        return []
    own = _own_files(group)
    if HydraConfig.initialized() and HydraConfig.get().runtime.choices.get(group) not in own:
        return []
    content = OmegaConf.to_container(node, resolve=False)
    raw = {str(k): v for k, v in content.items()} if isinstance(content, dict) else {}
    if not any(len(settings) > 1 and settings.keys() <= raw.keys() for settings in own.values()):
        return []
    needed = {n for n, p in _parameters(target).items() if p.default is p.empty}
    return [
        key for key, value in raw.items()
        if key != "_target_" and key not in needed and f"{group}.{key}" not in _overridden()
        and any(key in settings and settings[key] == value for settings in own.values())
    ]  # fmt: skip


def _own_files(group: str) -> dict[str, JsonObject]:
    """Option -> its settings, of those that name a class of this package."""
    found: dict[str, JsonObject] = {}
    for path in files("hawq_lightning.conf").joinpath(group).iterdir():
        if path.name.endswith(".yaml"):
            content: JsonObject = yaml.safe_load(path.read_text("utf-8"))
            content.pop("defaults", None)
            found[path.name.removesuffix(".yaml")] = content
    return found


def _overridden() -> set[str]:
    """Keys that the command line sets."""
    if not HydraConfig.initialized():
        return set()
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return {o.key_or_group for o in overrides}


def _imported(name: str, said: str) -> ModuleType | None:
    """The module, ``None`` if there is none.

    Raises:
        HawqError: it is there, and something that it imports or does fails.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise HawqError(f"{said}: {name} cannot be imported: {error}.") from error
    except Exception as error:
        raise HawqError(f"{said}: {name} cannot be imported: {type(error).__name__}: {error}.") from error


def _names(found: object) -> Iterator[str]:
    """What stands in a module or class, submodules included."""
    yield from (n for n in dir(found) if not n.startswith("_"))
    path: Iterable[str] = getattr(found, "__path__", ())
    yield from (m.name for m in pkgutil.iter_modules(path))


def _targets(content: object, key: str) -> Iterator[tuple[str, str]]:
    """Every ``_target_`` inside, with its full key."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name == "_target_":
                yield f"{key}._target_", str(value)
            yield from _targets(value, f"{key}.{name}")
    elif isinstance(content, list):
        for position, value in enumerate(content):
            yield from _targets(value, f"{key}[{position}]")
