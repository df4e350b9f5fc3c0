#!/usr/bin/env bash
# VaeImageProcessor.preprocess decides by the darkest pixel of the batch what its range is.
#
# Version: diffusers 0.42.1, torch 2.13.0.
# Guess: a tensor in [-1, 1] either passes unchanged or is refused; in any case by one rule for all.
# Seen: if any value of the batch is negative the tensor is left as it is, with a FutureWarning;
#   if none is, it is taken for [0, 1] and becomes 2 x - 1. A grey of .5 becomes 0 or stays .5,
#   and one dark pixel in another image of the batch decides.
# Why it matters: bright images in [-1, 1] (snow, paper, masks) are encoded at the wrong brightness
#   when the batch happens to be bright, more often with a batch of 1. Give [0, 1], always.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 pillow==13.0.0 \
    diffusers==0.42.1
"$folder/bin/python" - <<'END'
import warnings
import torch
from diffusers.image_processor import VaeImageProcessor

processor = VaeImageProcessor(vae_scale_factor=8)
bright = torch.full((1, 3, 16, 16), 0.5)
dark = bright.clone()
dark[0, 0, 0, 0] = -0.1

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    alone = processor.preprocess(bright)
    assert not caught                       # the silent case is the one that changes the image
    beside_dark = processor.preprocess(torch.cat([bright, dark]))[:1]
print("a grey of .5 alone:", alone.unique().tolist())
print("beside a dark image:", beside_dark.unique().tolist())
assert (alone == 0).all()
assert (beside_dark == 0.5).all()
END
