#!/usr/bin/env bash
# The six studies of docs/reproduction.md, and their tables: hours, or minutes each on a GPU.
#
#     bash examples/benchmark/reproduction.sh REAL ISIC OUT
#
# REAL is the folder of models and pictures that real.py describes, with ham10000.zip; ISIC is what
# isic.py wrote. Of ImageNet there are 40 pictures: their mirror images are held out.
set -euo pipefail
real="$1" isic="$2" out="$3" here="$(cd "$(dirname "$0")" && pwd)"
export REAL="$real" PYTHONPATH="$here:$here/..:$here/../..${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
python - "$real/imagenet_dev.pt" "$out/imagenet.pt" <<'PYTHON'
import sys

import torch

found = torch.load(sys.argv[1], weights_only=True)
images = torch.cat([found["images"], found["images"].flip(-1)])
torch.save({"images": images, "labels": found["labels"].repeat(2)}, sys.argv[2])
PYTHON

study() {
    local name="$1"
    shift
    python -m captum_adv2 study --out "$out/$name" --resume --count 40 --chunk 40 --steps 300 "$@"
}

four=(GRAD CAM MASK GradCAM)
study resnet --models embedded:resnet --adaptive RTS --held-out 200
study densenet --models embedded:densenet --interpreters "${four[@]}" RTS --adaptive RTS --held-out 200
study resnet56 --models real:resnet56 --images "$real/cifar10_dev.pt" --interpreters "${four[@]}" \
    --adaptive CAM --held-out 200 --tuned 0
study squeezenet --models real:squeezenet --images "$out/imagenet.pt" --interpreters "${four[@]}" \
    --adaptive CAM --held-out 40 --tuned 0
study mobilenet --models real:mobilenet --images "$out/imagenet.pt" --interpreters "${four[@]}" \
    --adaptive CAM --held-out 36 --tuned 0
study isic --models "isic:classifier=$isic/classifier.pt" --size 160 --tuned 40 --adaptive \
    --images "isic:lesions=$real/ham10000.zip:$isic/held-out.csv" --masking-model "$isic/rts.pt" \
    --interpreters GRAD CAM MASK RTS --frameworks pgd --targets benign
python "$here/reproduction.py" "$out"/{resnet,densenet,resnet56,squeezenet,mobilenet,isic}
