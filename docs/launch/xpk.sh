#!/bin/bash
# PROJECT=... ZONE=... CLUSTER=... BUCKET=... bash docs/launch/xpk.sh: two slices of v5p-256 on GKE.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${CLUSTER:?}" "${BUCKET:?}"
