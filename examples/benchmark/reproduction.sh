#!/usr/bin/env bash
# The six studies of docs/reproduction.md, and their tables: days on a CPU, most of them MASK's.
#
#     bash examples/benchmark/reproduction.sh REAL ISIC OUT
#
# REAL is the folder of models and pictures that real.py describes, with ham10000.zip; ISIC is what
# isic.py wrote. Of ImageNet there are 40 pictures, of which MobileNetV2 gets 36 right: their mirror
# images are held out. At the end the curves of trust.
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
    python -m captum_adv2 study --out "$out/$name" --resume --chunk 100 "$@"
}
curve() {
    study "curve-$@" --curve --held-out 0 --tuned 0 --frameworks pgd --targets --detectors
}

four=(GRAD CAM MASK GradCAM)
long=(--steps 300 --keep 12)
resnet=(--models embedded:resnet)
densenet=(--models embedded:densenet)
resnet56=(--models real:resnet56 --images "$real/cifar10_dev.pt")
squeezenet=(--models real:squeezenet --images "$out/imagenet.pt" --count 40)
mobilenet=(--models real:mobilenet --images "$out/imagenet.pt" --count 36)
isic=(--models "isic:classifier=$isic/classifier.pt" --size 160 --masking-model "$isic/rts.pt"
    --images "isic:lesions=$real/ham10000.zip:$isic/held-out.csv" --count 40)

study resnet "${resnet[@]}" "${long[@]}" --adaptive RTS --held-out 200
study densenet "${densenet[@]}" "${long[@]}" --adaptive RTS --held-out 200
study resnet56 "${resnet56[@]}" "${long[@]}" --interpreters "${four[@]}" \
    --adaptive CAM --held-out 200 --tuned 0
study squeezenet "${squeezenet[@]}" "${long[@]}" --flow-steps 400 --interpreters "${four[@]}" \
    --adaptive CAM --held-out 40 --tuned 0
study mobilenet "${mobilenet[@]}" "${long[@]}" --interpreters "${four[@]}" \
    --adaptive CAM --held-out 40 --tuned 0
study isic "${isic[@]}" "${long[@]}" --interpreters GRAD CAM MASK RTS --adaptive RTS --tuned 40
study mask-adaptive "${resnet[@]}" --interpreters MASK --adaptive MASK --frameworks pgd \
    --targets benign --count 40 --held-out 200 --tuned 0

curve resnet "${resnet[@]}" --count 40 --interpreters GRAD CAM GradCAM RTS Ensemble RTS-A
curve densenet "${densenet[@]}" --count 40 --interpreters GRAD CAM GradCAM RTS
curve resnet56 "${resnet56[@]}" --count 40 --interpreters GRAD CAM GradCAM
curve squeezenet "${squeezenet[@]}" --interpreters GRAD CAM GradCAM
curve mobilenet "${mobilenet[@]}" --interpreters GRAD CAM GradCAM
curve isic "${isic[@]}" --interpreters GRAD CAM RTS

every=(resnet densenet resnet56 squeezenet mobilenet isic)
python "$here/reproduction.py" "${every[@]/#/$out/}" --curves "${every[@]/#/$out/curve-}" --out "$out"
