#!/bin/bash
# CLUSTER=... IMAGE=... BUCKET=... bash docs/launch/xpk.sh: two slices of v5p-256 on GKE, by xpk 1.16.
# gcloud knows the project and the zone. BUCKET is a Cloud Storage bucket, without gs://.
set -euo pipefail
: "${CLUSTER:?}" "${IMAGE:?}" "${BUCKET:?}"
NAME=${NAME:-gla}

# Once a cluster: the bucket, as a folder of every workload that names it.
xpk storage attach "$NAME-bucket" --cluster="$CLUSTER" --type=gcsfuse --bucket="$BUCKET" --size=1000 \
  --mount-point=/gcs --readonly=false --auto-mount=false

# Exit code 1 may pass (a disk, another process that was lost) and is started again; 2 is bad input.
# exec: xpk sends SIGTERM to the shell around the command, which is then the command itself.
xpk workload create --cluster="$CLUSTER" --workload="$NAME" --docker-image="$IMAGE" \
  --tpu-type=v5p-256 --num-slices=2 --storage="$NAME-bucket" \
  --max-restarts=20 --restart-on-exit-codes=1 --termination-grace-period-seconds=120 \
  --command="exec gatedjax-train --config=gla_1p3b --config.mesh.data=2 --config.mesh.fsdp=128 \
    --workdir=/gcs/runs/gla --config.data.cache_dir=/gcs/cache --compile_cache=/gcs/xla"
