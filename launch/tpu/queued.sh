#!/usr/bin/env bash
# Prints the gcloud commands that run a `relearn` command on TPU slices; NEVER RUN YET: they are compared with files alone.
#
# usage: launch/tpu/queued.sh NAME ZONE TYPE SLICES SHARE -- relearn audit --workdir=/data/... [...]
#   TYPE is v5p-16, v6e-16 and the like; several slices are one job (multi-slice). Review, then pipe into bash.
#   SHARE is a Filestore export, HOST:/FOLDER, mounted at /data on every host; it has this repository at src/relearn_jax.
#
# On preemption (spot slices) SIGTERM comes 30 s before the end; relearn saves, and ends with status 75. The loop on the
# hosts starts it again as long as there is the slice; a slice that is gone is asked for again by these same commands.
set -euo pipefail
if [ "$#" -lt 7 ] || [ "$6" != "--" ]; then
  sed -n '4,6p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 type=$3 slices=$4 share=$5
shift 6
case "$type" in
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) echo "launch/tpu/queued.sh: TYPE is $type; expected v5p-N or v6e-N" >&2; exit 2 ;;
esac
nodes=(--node-id="$name")
if [ "$slices" -gt 1 ]; then
  nodes=(--node-count="$slices" --node-prefix="$name")
fi
hosts=("$name")
for ((number = 0; slices > 1 && number < slices; number++)); do
  hosts[number]="$name-$number"
done
line="$(printf '%q ' "$@")"
setup="sudo mkdir -p /data && { mountpoint -q /data || sudo mount -t nfs $share /data; }"
setup="$setup && pip install -q '/data/src/relearn_jax[tpu]'"
loop="while :; do $line; status=\$?; [ \$status = 75 ] || exit \$status; sleep 5; done"

echo "gcloud compute tpus queued-resources create $name --zone=$zone --accelerator-type=$type \\"
echo "  --runtime-version=$runtime ${nodes[*]} --spot"
echo "gcloud compute tpus queued-resources describe $name --zone=$zone --format='value(state.state)'  # until ACTIVE"
for host in "${hosts[@]}"; do
  echo "gcloud compute tpus tpu-vm ssh $host --zone=$zone --worker=all --command=$(printf '%q' "$setup")"
done
for host in "${hosts[@]}"; do  # all at once: they wait for each other
  echo "gcloud compute tpus tpu-vm ssh $host --zone=$zone --worker=all --command=$(printf '%q' "$loop") &"
done
echo "wait"
