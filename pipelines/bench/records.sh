#!/usr/bin/env bash
# Measures what the tables of the READMEs show, on the GPU at hand, which nothing else should use meanwhile:
#     pipelines/bench/records.sh PART...     PART: kernels, models, compiled, one model's name, streams, long
# Records go on where they stopped, and each row says its commit. Remove a record to measure all of it again.
set -euo pipefail
cd "$(dirname "$0")/../.."

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader -i 0 | grep -oE '(RTX )?[A-Z]?[0-9]{2,}' | head -1 | tr 'A-Z ' 'a-z-')
kernels=kernels/bench/results
pipelines=pipelines/bench/results
models="wan2.1-14b-720p wan2.1-14b-480p wan2.1-1.3b-480p hunyuan-video hunyuan-video-1.5 cogvideox-5b cogvideox-1.5"

# A row that failed is in its record; the others go on.
failed=0
vidaccel() { python3 -m vidaccel "$@" --format quiet || failed=1; }

patterns=radial,topk,sliding-window,light-forcing,svg,ann,pyramid,freeswim,neighborhood

model() {
  local name=$1 size=() layers=4 dense=flash3
  shift
  case $name in
    *-720p) size=(--height 720 --width 1280) ;;
    *-480p) size=(--height 480 --width 832) ;;
    hunyuan-video) layers=2 ;;
    hunyuan-video-1.5) dense="flash3 (text trimmed)" ;;
  esac
  vidaccel bench model -m "${name%-[47]*0p}" "${size[@]}" -a $patterns -d 0.25 --layers $layers --dense "$dense" "$@" \
    -o "$pipelines/$name-$gpu.json"
}

streams() {
  local record=$1
  shift
  vidaccel bench causal --graphs --alone "$@" -o "$pipelines/causal-wan-1.3b-$record-$gpu.json"
}

for part in "$@"; do
  case $part in
    kernels)
      vidaccel bench kernels --device cuda --only "Wan 480p" -o "$kernels/wan-480p-$gpu.json"
      vidaccel bench kernels --device cuda --only "Wan 720p" -o "$kernels/wan-720p-$gpu.json"
      vidaccel bench kernels --device cuda --only HunyuanVideo -o "$kernels/hunyuan-720p-$gpu.json"
      vidaccel bench kernels --device cuda --only CogVideoX -o "$kernels/cogvideox-$gpu.json"
      vidaccel bench around -o "$kernels/around-$gpu.json"
      ;;
    models) for each in $models; do model "$each"; done ;;
    compiled) for each in $models; do model "$each" --compile; done ;;
    streams)
      streams 480p --size 480p
      streams 720p --size 720p
      streams 480p-window-21 --size 480p --window 21 --no-vae --only flashblock --only "light-forcing 0.15"
      streams 480p-compiled --size 480p --compile --only "flashblock, reuse 0.65, clean pass too"
      ;;
    long) streams 480p-3000-frames --size 480p --frames 750 --no-vae --only "tempcache 3" ;;
    *)
      [[ " $models " == *" $part "* ]] || { echo "there is no part $part; read the head of $0" >&2; exit 2; }
      model "$part" --compile
      ;;
  esac
done
exit $failed
