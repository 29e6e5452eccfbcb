#!/usr/bin/env bash
# usage: collect_wheels.sh [PYTHON_VERSION] [PLATFORM]: wheels of packages.txt into tests/gpu/wheels, to be carried to a
# machine without a network; by default for this Python, on x86-64 Linux.
set -euo pipefail
cd "$(dirname "$0")"
version=${1:-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
platform=${2:-manylinux_2_28_x86_64}
mkdir -p wheels
# of this one there is no wheel to download; the one that is built runs everywhere
python3 -m pip wheel -q --no-deps -w wheels "$(grep '^antlr4' packages.txt)"
fetch() {
  python3 -m pip download -q -d wheels --find-links wheels --only-binary=:all: --python-version "$version" \
    --platform "$platform" --platform manylinux2014_x86_64 --platform any "$@"
}
grep -v '^pytorchcv' packages.txt >wheels/most.txt
fetch -r wheels/most.txt requests # which pytorchcv needs beside torch, gigabytes that the machine has
fetch --no-deps "$(grep '^pytorchcv' packages.txt)"
rm wheels/most.txt
du -sh wheels
