#!/bin/bash
# NAME=gla ZONE=us-east5-a bash docs/launch/tpu_vm.sh: a spot v5p-32, made, set up, started.
# BUCKET is a Cloud Storage bucket in the same region, without gs://.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${BUCKET:?}"
TYPE=${TYPE:-v5p-32}
IMAGE=${IMAGE:-v2-alpha-tpuv5}
REPOSITORY=https://github.com/gatedjax/gatedjax

# Waits until there is one, and makes it again when it was taken away.
gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
  --accelerator-type="$TYPE" --runtime-version="$IMAGE" --spot
until gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
  --format='value(state.state)' | grep -q ACTIVE; do sleep 30; done

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

# The image's Python is older than 3.12: uv brings one.
on_all_hosts "pip3 install --user --quiet uv && ~/.local/bin/uv venv --python=3.12 ~/env && \
  ~/.local/bin/uv pip install --python ~/env/bin/python 'gatedjax[tpu] @ git+$REPOSITORY'"
on_all_hosts "mkdir -p ~/bucket && (mountpoint -q ~/bucket || gcsfuse --implicit-dirs $BUCKET ~/bucket)"

# A service of systemd: a spot TPU that goes sends it SIGTERM 30 seconds before, and it saves.
on_all_hosts "sudo systemd-run --unit=train --uid=\$USER --setenv=HOME=\$HOME \
  --property=TimeoutStopSec=30 --property=Restart=on-failure --property=RestartSec=30 \
  --property=RestartPreventExitStatus=2 \
  ~/env/bin/gatedjax-train --config=gla_1p3b --config.mesh.fsdp=16 \
    --workdir=\$HOME/bucket/runs/gla --compile_cache=\$HOME/bucket/xla"
echo "log: gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=0 --command='journalctl -fu train'"
