"""What every console script shares: early checks of the command line, and errors that are one line."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pickle import UnpicklingError
from typing import Any, NoReturn, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning.cli._renamed_keys import check_renamed
from hawq_lightning.cli._targets import working_folder_first

T = TypeVar("T")
CONFIG_PATH = "pkg://hawq_lightning.conf"
_CHOICE = re.compile(r"^\+{0,2}/?(?P<group>[a-z_/]+)(@[\w.]+)?=\[?(?P<names>[\w,.\-/ ]+)\]?$")
_NULL = re.compile(r"^/?(?P<group>[a-z_]+)=null$")
_WITH_VALUE = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")
_NULL_BY_DEFAULT = ("launcher", "experiment", "debug")
_EXCLUDED = "hydra.job.config.override_dirname.exclude_keys"
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
_FULL_ERROR = "HYDRA_FULL_ERROR"
_OURS = "HAWQ_LIGHTNING_SET_FULL_ERROR"  # and not the user: processes that are started inherit both
_LAUNCHERS = {  # package and extra
    "joblib": ("hydra_joblib_launcher", "sweep"),
    "ray": ("hydra_ray_launcher", "ray"),
    **dict.fromkeys(("slurm", "local", "submitit_slurm", "submitit_local"), ("hydra_submitit_launcher", "sweep")),
}


def check_choices(argv: Sequence[str]) -> None:
    """Find ``group=option`` where the option does not exist, before Hydra lists them all.

    Args:
        argv: arguments of the command line, without the program's name.

    Raises:
        HawqError: an unknown option; the message suggests the nearest. Or a launcher whose extra is not installed.
    """
    if any("searchpath" in a or a.startswith(("--config-dir", "-cd")) for a in argv):
        return  # options may come from elsewhere
    conf = files("hawq_lightning.conf")
    for argument in argv:
        match = _CHOICE.match(argument)
        if match is not None:
            _check_launcher(match["group"], match["names"].strip())
        folder = conf.joinpath(match["group"]) if match else conf
        if match is None or match["group"].startswith("hydra/") or not folder.is_dir():  # Hydra has options of its own
            continue
        options = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
        for name in match["names"].split(","):
            if name.strip() not in (*options, "null"):
                hint = nearest(name.strip(), options) or f" Known: {', '.join(options)}."
                raise HawqError(f"There is no {match['group']}={name.strip()}.{hint}")


def _check_launcher(group: str, name: str) -> None:
    package, extra = _LAUNCHERS.get(name, ("", "")) if group in ("launcher", "hydra/launcher") else ("", "")
    if package and find_spec(f"hydra_plugins.{package}") is None:
        raise HawqError(f"{group}={name} needs {package.replace('_', '-')}: pip install 'hawq-lightning[{extra}]'.")


def without_null(argv: Sequence[str]) -> list[str]:
    """``group=null`` as Hydra writes it, ``~group``; groups that have no option by default are left out.

    Args:
        argv: arguments of the command line, without the program's name.
    """
    given: list[str] = []
    for argument in argv:
        match = _NULL.match(argument)
        if match is None or not files("hawq_lightning.conf").joinpath(match["group"]).is_dir():
            given.append(argument)
        elif match["group"] not in _NULL_BY_DEFAULT:
            given.append(f"~{match['group']}")
    return given


def flags_first(argv: Sequence[str]) -> list[str]:
    """The same command line with its folder of configs and ``-m`` before the overrides: Hydra wants these in one row.

    Args:
        argv: arguments of the command line, without the program's name.
    """
    flags: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word in _WITH_VALUE:
            flags += [word, *([] if (value := next(words, None)) is None else [value])]
        elif word in ("-m", "--multirun") or word.startswith(tuple(f"{flag}=" for flag in _WITH_VALUE)):
            flags.append(word)
        else:
            rest.append(word)
    return [*flags, *rest]


def sweep_dirname_overrides(argv: Sequence[str]) -> list[str]:
    """What to add to the command line of a sweep over keys that folders are not named after, so that they are then.

    Args:
        argv: arguments of the command line, without the program's name.
    """
    if not {"-m", "--multirun"} & set(argv) or any(a.startswith(_EXCLUDED) for a in argv):
        return []
    given = [a for a in argv if "=" in a and not a.startswith("-")]
    try:
        swept = {o.key_or_group for o in OverridesParser.create().parse_overrides(given) if o.is_sweep_override()}
    except HydraException:
        return []  # Hydra will say what is wrong
    conf: Any = OmegaConf.load(str(files("hawq_lightning.conf").joinpath("hydra/default.yaml")))
    without = list(conf.job.config.override_dirname.exclude_keys)
    still_excluded = [key for key in without if key not in swept]
    return [] if len(still_excluded) == len(without) else [f"{_EXCLUDED}=[{','.join(still_excluded)}]"]


def run_main(main: Callable[[], object]) -> None:
    """Run a Hydra main; bad input ends the program with one line and exit code 1."""
    try:
        check_renamed(sys.argv[1:])
        check_choices(sys.argv[1:])
        sys.argv[1:] = flags_first(without_null(sys.argv[1:]))
        sys.argv += sweep_dirname_overrides(sys.argv[1:])
    except HawqError as error:
        stop(error)
    if _full_error_wished():
        main()
        return
    # Hydra prints tracebacks of its own where a folder cannot be made; with this it raises
    os.environ |= {_FULL_ERROR: "1", _OURS: "1"}
    try:
        main()
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        stop(sentence)
    finally:
        for name in (_FULL_ERROR, _OURS):
            os.environ.pop(name, None)


def _full_error_wished() -> bool:
    return os.environ.get(_FULL_ERROR) == "1" and _OURS not in os.environ


def run_job(job: Callable[[], T]) -> T:
    """Run the body of a Hydra main; bad input ends it with one line unless ``HYDRA_FULL_ERROR=1``."""
    quiet_down()
    working_folder_first()
    try:
        return job()
    except Exception as error:
        sentence = explain(error)
        if sentence is None or _full_error_wished():
            raise
        stop(sentence)


def explain(error: BaseException) -> str | None:
    """The sentence that a user should read, or ``None`` when the error is not one of bad input."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HawqError):
            # a worker process wraps the message into its traceback
            return str(cause).split("HawqError: ")[-1].strip()
        cause = cause.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set; add {error.full_key}=..."
    if isinstance(error, (HydraException, OmegaConfBaseException, MisconfigurationException)):
        more = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        return " ".join(line.strip() for line in f"{error}{more}".splitlines() if line.strip())
    if isinstance(error, UnpicklingError):
        return f"A checkpoint holds more than tensors and plain values: {str(error).splitlines()[0]}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error}: pip install it, or hawq-lightning with its extra."
    if isinstance(error, OSError) and error.strerror:
        if error.filename is not None:
            return f"{error.filename2 or error.filename}: {error.strerror}."
        if error.errno in _OF_THE_DISK:
            return f"Cannot write: {error.strerror}."
    return None


def stop(message: object) -> NoReturn:
    """Print one line to the standard error and exit with 1."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def quiet_down() -> None:
    """Hide Lightning's advertisements and advice that does not concern this program's users; the rest is logged."""
    # through Hydra's handlers, into the log file; which name of Lightning speaks is the last one's that was imported
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.captureWarnings(True)
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(f"{name}.utilities.rank_zero").addFilter(_is_ours)
    for text in _ADVICE:
        warnings.filterwarnings("ignore", text)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or str(record.msg).startswith("HAWQ")


_ADVICE = (
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*GPU available but not used.*",
    ".*number of training batches.*smaller than the logging interval.*",
    ".*exists and is not empty.*",
    ".*self.trainer` reference is not registered.*",
)
