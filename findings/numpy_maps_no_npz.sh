#!/usr/bin/env bash
# np.load(path, mmap_mode="r") of a .npz maps nothing, and reads an array again at each access.
#
# Version: numpy 2.4.6.
# Guess: arrays of an uncompressed .npz are mapped like those of a .npy, or the option is refused.
# Seen: the option is ignored without a word. Each f["arr_0"] reads the whole array into memory
#   anew, also inside of a loop: two accesses give two copies.
# Why it matters: samples for ADM's evaluation and reference batches are .npz of 10 GB. A loop over
#   f["arr_0"][i] reads 10 GB per image, and "mapped" data in each worker is a copy per worker.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile numpy==2.4.6
cd "$folder"
bin/python -W error - <<'END'
import tracemalloc
import numpy as np

images = np.zeros((1000, 32, 32, 3), np.uint8)
np.save("images.npy", images)
np.savez("images.npz", images)              # stored, not compressed
assert isinstance(np.load("images.npy", mmap_mode="r"), np.memmap)

f = np.load("images.npz", mmap_mode="r")
first = f["arr_0"]
assert type(first) is np.ndarray
assert not np.shares_memory(first, f["arr_0"])             # the second access is another copy
tracemalloc.start()
f["arr_0"][0]                               # one image
_, peak = tracemalloc.get_traced_memory()
print(f"one image of {images[0].nbytes} bytes took {peak} bytes; the file has {images.nbytes}")
assert peak > images.nbytes
END
