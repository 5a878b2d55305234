#!/bin/bash
# HOSTS="node0 node1" bash docs/launch/ssh.sh: a process on each, the first one coordinates.
# /shared is the same folder on all; gatedjax is installed in ~/env on each.
set -euo pipefail
read -ra hosts <<< "${HOSTS:?names of the machines, with spaces between}"
for i in "${!hosts[@]}"; do
  ssh "${hosts[$i]}" "source ~/env/bin/activate && nohup \
    python -m gatedjax.runtime.supervise -- \
    gatedjax-train --config=tiny --workdir=/shared/runs/tiny \
      --config.data.cache_dir=/shared/cache --config.mesh.fsdp=2 \
      --coordinator=${hosts[0]}:8476 --num_processes=${#hosts[@]} --process_id=$i \
      > run-$i.log 2>&1 < /dev/null &"
done
