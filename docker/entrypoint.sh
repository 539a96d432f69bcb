#!/bin/sh
# The image's entry point. With arguments: that eamdeploy command. Without: the embedded default, which builds engines of the
# frozen digits model and of its unfrozen twin, evaluates them on held-out digits and profiles them.
#   EAMDEPLOY_ENGINE   ort (default), or trt where the base image has TensorRT and the container a GPU
# Engines and JSON go to the working folder, or to /tmp where that can't be written.
set -eu

[ $# -eq 0 ] || exec eamdeploy "$@"

share=$(dirname "$0")
out=$(pwd)
[ -w "$out" ] || out=/tmp

case ${EAMDEPLOY_ENGINE:-ort} in
ort)
    suffix=ort.onnx
    set -- build-ort
    ;;
trt)
    suffix=plan
    set -- build-trt --fp16
    ;;
*)
    echo "error: EAMDEPLOY_ENGINE can't be used; expected ort or trt; got $EAMDEPLOY_ENGINE" >&2
    exit 2
    ;;
esac

frozen=$out/digits_deit.$suffix
twin=$out/digits_deit_baseline.$suffix
eamdeploy "$@" "$share/digits_deit.onnx" -o "$frozen"
eamdeploy "$@" "$share/digits_deit_baseline.onnx" -o "$twin"
eamdeploy evaluate "$frozen" --reference "$twin" --data "$share/heldout" -o "$out/evaluation.json"
exec eamdeploy profile "$frozen" --baseline "$twin" -o "$out/profile.json"
