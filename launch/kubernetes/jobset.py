"""Writes a JobSet that runs a `relearn` command, for `kubectl apply -f -`.

usage: python launch/kubernetes/jobset.py --name=NAME --image=IMAGE --claim=PVC [...] -- relearn audit --flag=value ...

One audit on four nodes of eight GPUs: --gpu=nvidia-h100-80gb --per_node=8 --nodes=4
On a TPU slice of 16 chips, four a host: --tpu=tpu-v6e-slice --topology=4x4 --per_node=4 (two of them: --replicas=2)
A grid by sixteen GPUs, each with a command of its own: --gpu=nvidia-l4 --replicas=16 -- relearn audit --claim ...

`rbac.yaml` beside this file comes first: jax asks which pods belong together. A pod that is to go (preemption, a node
that is drained) has `--grace` seconds to save; it, and one that ended with status 75, is made again and not counted as
failed.
The volume claim is mounted at /data, and must be one that all pods may write to (ReadWriteMany).
"""

import argparse
import math
import sys
from typing import Any

import yaml

PREEMPTED = 75  # exit status of relearn after SIGTERM
CONTAINER = "relearn"


def jobset(given: argparse.Namespace) -> dict[str, Any]:
  """The JobSet as plain values."""
  nodes = given.nodes
  selector: dict[str, str] = {}
  resources: dict[str, Any] = {}
  if given.gpu:
    selector["cloud.google.com/gke-accelerator"] = given.gpu
    resources = {"limits": {"nvidia.com/gpu": given.per_node}}
  if given.tpu:
    nodes = math.prod(map(int, given.topology.split("x"))) // given.per_node
    selector = {"cloud.google.com/gke-tpu-accelerator": given.tpu, "cloud.google.com/gke-tpu-topology": given.topology}
    resources = {"limits": {"google.com/tpu": given.per_node}}
  selector |= dict(pair.split("=", 1) for pair in given.selector)
  if given.spot:
    selector["cloud.google.com/gke-spot"] = "true"
  command = given.command[given.command[0] == "relearn":]  # the image's entry point
  if nodes == 1 and not given.tpu:
    command.append("--num_processes=1")  # replicas are commands of their own
  container = {
      "name": CONTAINER, "image": given.image, "args": command,
      "env": [{"name": "RELEARN_CACHE", "value": "/data/cache"}],
      "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "memory", "mountPath": "/dev/shm"}]}
  if resources:
    container["resources"] = resources
  pod: dict[str, Any] = {
      "serviceAccountName": "relearn", "restartPolicy": "Never", "terminationGracePeriodSeconds": given.grace,
      "containers": [container],
      "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": given.claim}},
                  {"name": "memory", "emptyDir": {"medium": "Memory"}}]}  # the exchange between GPUs of a node
  if selector:
    pod["nodeSelector"] = selector
  if given.priority:
    pod["priorityClassName"] = given.priority
  job = {
      "completions": nodes, "parallelism": nodes, "completionMode": "Indexed", "backoffLimit": given.retries,
      "podReplacementPolicy": "Failed",  # not before the old one has saved
      "podFailurePolicy": {"rules": [
          {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
          {"action": "Ignore", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [PREEMPTED]}}]},
      "template": {"spec": pod}}
  metadata: dict[str, Any] = {"name": given.name}
  if given.namespace:
    metadata["namespace"] = given.namespace
  if given.tpu:  # a job a slice
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": {
      "network": {"enableDNSHostnames": True}, "failurePolicy": {"maxRestarts": given.retries},
      "replicatedJobs": [{"name": "r", "replicas": given.replicas, "template": {"spec": job}}]}}


def parse(arguments: list[str]) -> argparse.Namespace:
  """The command line; refuses what does not fit together."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--name", required=True, help="of the JobSet")
  parser.add_argument("--image", required=True, help="see launch/docker")
  parser.add_argument("--claim", required=True, help="persistent volume claim of everything that is read and written")
  parser.add_argument("--namespace", default="", help="of Kubernetes")
  parser.add_argument("--nodes", type=int, default=1, help="pods of one command; a TPU slice has its own")
  parser.add_argument("--replicas", type=int, default=1, help="commands of their own; with --tpu, slices of one")
  parser.add_argument("--gpu", default="", help="kind of accelerator, as nodes are labelled on GKE")
  parser.add_argument("--tpu", default="", help="kind of slice, as nodes are labelled on GKE")
  parser.add_argument("--topology", default="", help="of the slice, such as 4x4")
  parser.add_argument("--per_node", type=int, default=1, help="GPUs or TPU chips of a node")
  parser.add_argument("--selector", action="append", default=[], metavar="LABEL=VALUE", help="of nodes elsewhere")
  parser.add_argument("--spot", action="store_true", help="nodes that may be taken away (GKE)")
  parser.add_argument("--priority", default="", help="priority class")
  parser.add_argument("--grace", type=int, default=120, help="seconds from SIGTERM to SIGKILL")
  parser.add_argument("--retries", type=int, default=3, help="failures, preemption not counted")
  parser.add_argument("command", nargs="+", help="after --: relearn COMMAND --flag=value ...")
  given = parser.parse_args(arguments)
  if given.gpu and given.tpu:
    parser.error("--gpu and --tpu exclude each other")
  if bool(given.tpu) != bool(given.topology):
    parser.error("--tpu and --topology go together")
  if wrong := [pair for pair in given.selector if "=" not in pair]:
    parser.error(f"--selector={wrong[0]}: expected LABEL=VALUE")
  return given


def main(arguments: list[str]) -> None:
  """See the top of the file."""
  given = parse(arguments)
  found = jobset(given)
  print(yaml.safe_dump(found, sort_keys=False, width=120), end="")


if __name__ == "__main__":
  main(sys.argv[1:])
