#!/usr/bin/env bash
# Prints the Cluster Toolkit's command that runs a `relearn` command on TPU slices of a GKE cluster; NEVER RUN YET: it is
# compared with a file alone. It makes a JobSet, as launch/kubernetes/jobset.py does, and queues it by Kueue.
#
# usage: launch/tpu/gcluster.sh NAME CLUSTER LOCATION IMAGE TYPE SLICES VOLUME -- relearn audit --workdir=/data/... [...]
#   TYPE is the toolkit's name of a slice, such as v6e-16; VOLUME (a bucket, a claim) is mounted at /data. Review, then
#   pipe into bash.
set -euo pipefail
if [ "$#" -lt 9 ] || [ "$8" != "--" ]; then
  sed -n '5,7p' "$0" >&2
  exit 2
fi
name=$1 cluster=$2 location=$3 image=$4 type=$5 slices=$6 volume=$7
shift 8
echo "gcluster job submit --name=$name --cluster=$cluster --location=$location --image=$image \\"
echo "  --compute-type=$type --num-slices=$slices --mount=$volume:/data:rw --grace-period=2m \\"
echo "  --command=$(printf '%q' "$(printf '%q ' "$@" | sed 's/ $//')")"
