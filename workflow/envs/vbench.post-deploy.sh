#!/usr/bin/env bash
# VBench with the fixes of its main branch, as a clone, because its packages leave VBench-Long's configuration out; and
# detectron2, which four dimensions need and which is built against the torch that is there.
set -euo pipefail
pip="$CONDA_PREFIX/bin/python -m pip install --no-deps --no-build-isolation"
mkdir -p "$CONDA_PREFIX/src"
[ -d "$CONDA_PREFIX/src/vbench" ] || git clone https://github.com/Vchitect/VBench "$CONDA_PREFIX/src/vbench"
git -C "$CONDA_PREFIX/src/vbench" checkout --quiet 45e79ec
$pip --editable "$CONDA_PREFIX/src/vbench"
$pip "detectron2 @ git+https://github.com/facebookresearch/detectron2@fd27788985af0f4ca800bca563acdb700bb890e2"
