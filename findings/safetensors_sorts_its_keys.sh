#!/usr/bin/env bash
# A safetensors file does not keep the order of its tensors.
#
# Version: safetensors 0.8.0.
# Guess: load_file gives a dict in the order in which save_file got it, as torch.save does.
# Seen: tensors are sorted by the size of their type, largest first, then by name as text: layer 10
#   comes before layer 2, and a bfloat16 or float16 tensor after all of float32.
# Why it matters: an EMA or optimiser that keeps a list of tensors, saved as a dict and zipped with
#   model.parameters() after loading, is assigned to the wrong layers. Equal shapes, as in a
#   transformer's blocks, hide it: nothing fails, samples are bad. Match by name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile safetensors==0.8.0 numpy==2.4.6
cd "$folder"
bin/python - <<'END'
import numpy as np
from safetensors.numpy import load_file, save_file

weights = {"patch.half": np.zeros(4, np.float16)}
for layer in range(12):
    weights[f"blocks.{layer}"] = np.full(4, layer, np.float32)
save_file(weights, "ema.safetensors")
loaded = load_file("ema.safetensors")
print(list(loaded))
assert list(loaded)[:5] == ["blocks.0", "blocks.1", "blocks.10", "blocks.11", "blocks.2"]
assert list(loaded)[-1] == "patch.half"     # it was the first one
assert sorted(loaded) == sorted(weights)    # the contents are right, by name
for name, value in weights.items():
    assert (loaded[name] == value).all()
END
