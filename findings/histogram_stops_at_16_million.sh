#!/usr/bin/env bash
# torch.histc and torch.histogram count in the type of the data: a bin stops at 16,777,216.
#
# Version: torch 2.13.0, on a CPU with one thread.
# Guess: counts are exact, or at worst rounded to seven digits.
# Seen: of 20 million equal float32 numbers the bin holds 16,777,216, because 2**24 + 1 is 2**24
#   in float32. bincount, which counts in integers, holds all of them. With more threads each has
#   its own limit, so that the count depends on the number of threads.
# Why it matters: the histogram of the pixels or latents of a data set (300 images of 256 px are
#   enough) or the use of a codebook's entries is flattened exactly where it is highest.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0
"$folder/bin/python" -W ignore - <<'END'
import torch

torch.set_num_threads(1)
pixels = torch.full((20_000_000,), 0.5)
by_histc = torch.histc(pixels, 4, 0, 1)
by_histogram = torch.histogram(pixels, 4, range=(0.0, 1.0)).hist
by_bincount = (pixels * 4).long().bincount(minlength=4)
print(by_histc, by_histogram, by_bincount, sep="\n")
assert by_histc.tolist() == [0, 0, 2**24, 0]
assert by_histogram.tolist() == [0, 0, 2**24, 0]
assert by_bincount.tolist() == [0, 0, 20_000_000, 0]
assert torch.histc(pixels.double(), 4, 0, 1).tolist() == [0, 0, 20_000_000, 0]
END
