#!/usr/bin/env bash
# A torchvision of another torch fails at import, and the next import fails with another error.
#
# Versions: torch 2.9.0 and torchvision 0.25.0, which was built for torch 2.10.
# Guess: an import that failed leaves nothing behind, so a second one ends in the same error, and
#   to declare the operator that lacks is enough.
# Seen: the first import says that the operator torchvision::nms does not exist. Python then forgets
#   the package, but not its submodules. So the second import does not load torchvision.extension
#   again, the new package lacks it as an attribute, and an AttributeError says "most likely due to
#   a circular import", also with the operators declared. After the submodules are forgotten, too,
#   it works.
# Why it matters: who runs a cell of a notebook again, or catches the first error and tries again,
#   looks for a circular import that is not there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.9.0 numpy==2.4.6 pillow==13.0.0
"$folder/bin/pip" install --quiet --no-compile --no-deps torchvision==0.25.0
"$folder/bin/python" - <<'END'
import sys
import torch

def import_torchvision():
    try:
        import torchvision
        return torchvision.__version__
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print("first: ", import_torchvision())
for op in ("nms", "qnms"):
    torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float t) -> Tensor")
print("second:", second := import_torchvision())
assert second.startswith("AttributeError: partially initialized module 'torchvision'")
for name in list(sys.modules):
    if name.startswith("torchvision"):
        del sys.modules[name]
print("third: ", third := import_torchvision())
assert third.startswith("0.25.0")
END
