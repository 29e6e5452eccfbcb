"""The files of versions agree with what pyproject.toml promises."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.versions.write import name_of

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ROOT / "tests" / "versions"


def promised(kind):
    """``name -> number`` behind ``>=`` of everything but the developers' tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["vision"], *extras["detection"], *extras["export"]]
    return {name_of(line): re.search(rf"{kind}([\d.]+)", line)[1] for line in wanted if kind in line}


def listed(file):
    lines = (line.partition("#")[0].strip() for line in (VERSIONS / file).read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def release(text):
    """Of a version, so that 1.20 is 1.20.0."""
    numbers = [int(n) for n in re.match(r"[\d.]*\d", text)[0].split(".")]
    return tuple(numbers + [0] * (4 - len(numbers)))


def test_the_lowest_versions_are_those_that_are_promised():
    lowest = listed("lowest.txt")
    wrong = {n: (v, lowest.get(n)) for n, v in promised(">=").items() if release(lowest.get(n, "0")) != release(v)}
    assert not wrong


@pytest.mark.parametrize("file", ["lowest.txt", "newest.txt"])
def test_no_tested_version_is_one_that_pip_refuses(file):
    versions, below = listed(file), promised("<")
    assert versions and below
    assert not {n for n, v in promised(">=").items() if n in versions and release(versions[n]) < release(v)}
    assert not {n for n, v in below.items() if n in versions and release(versions[n]) >= release(v)}


def test_the_newest_versions_name_what_users_install():
    assert set(promised(">=")) <= set(listed("newest.txt"))
