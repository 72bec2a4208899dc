"""Where to stop unlearning: hits and utility along the trajectories of several `relearn unlearn` jobs.

`python benchmarks/tofu_select.py --files=DIR --model=DIR --max_score=0.05 JOB...` asks every kept step of every job the
questions, and picks, of the jobs' first steps with a share of hits of at most `max_score`, the one with the highest
log-probability of retained text. The relearned models play no part in it. The picked step is written as a Hugging Face
folder to --output.
"""

import argparse
import pathlib

import jax
import numpy as np

from relearn_jax.audit.audit_config import ArmsSettings, Audit
from relearn_jax.audit.experiment import Experiment
from relearn_jax.audit.grid import Chain
from relearn_jax.cases.files import VARIANT, FilesConfig
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh
from relearn_jax.parallel.start import cache_dir, start
from relearn_jax.training import checkpoints
from relearn_jax.training.export_run import export_run


def main() -> None:
  """Prints a row for each kept step, and writes the picked one."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name in ("files", "model", "output"):
    parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
  parser.add_argument("--max_score", type=float, default=0.05)
  parser.add_argument("jobs", type=pathlib.Path, nargs="+")
  flags = parser.parse_args()
  start()
  file = lambda name: str(flags.files / f"{name}.jsonl")
  case = FilesConfig("tofu", file("forget"), file("retain"), (file("relearn"),), file("questions"))
  arms = ArmsSettings(unlearned=str(flags.model), dtype="float32")
  audit = Experiment(Audit(case, seeds=(0,), arms=arms), "", flags.output)
  mesh = runs_mesh(1)
  audit.open(mesh, cache_dir(), 1, lambda _: None)
  ask, retain = audit.interviewer(), {"retain": audit.rows([Chain("U", VARIANT, 0)], "retain", scored=True)}
  found = []
  print("job, step, hits, mean log-probability of a retained token")
  for job in flags.jobs:
    enough = None
    for step in checkpoints.saved_steps(job / "checkpoints" / "unlearn"):
      folder = checkpoints.step_path(job / "checkpoints" / "unlearn", step)
      params = jax.tree.map(lambda leaf: leaf[0], checkpoints.load_tree(folder, audit.model.abstract(), 1))
      answers = ask(repeat_runs(params, 1, mesh), retain, ["U"])
      hits, kept = float(audit.mean_scores(answers)[0]), float(np.mean(answers.retain))
      print(f"{job}, {step}, {100 * hits:.1f} %, {kept:.3f}", flush=True)
      if enough is None and hits <= flags.max_score:
        enough = (kept, folder)
    found += [enough] if enough else []
  if not found:
    raise SystemExit("no job came that far")
  kept, folder = max(found, key=lambda item: item[0])
  export_run(folder, flags.output)
  print(f"picked {folder}: {flags.output}")


if __name__ == "__main__":
  main()
