"""Where to stop unlearning: hits and utility along the trajectories of several `relearn unlearn` jobs.

`python benchmarks/tofu_select.py --files=DIR --model=DIR --max_asr=0.05 JOB...` asks every kept step of every job the
questions, and picks, of the jobs' first steps with at most `max_asr` hits, the one with the highest log-probability of
retained text. The relearned models play no part in it. The picked step is written as a Hugging Face folder to --output.
"""

import argparse
import pathlib

import jax
import numpy as np

from relearn_jax.audit.release import ReleaseAudit
from relearn_jax.audit.release_run import Release
from relearn_jax.parallel.mesh import repeat_runs, runs_mesh
from relearn_jax.parallel.start import start
from relearn_jax.training import checkpoints
from relearn_jax.training.export import export_run
from relearn_jax.training.settings import TrainSettings, make_model


def main() -> None:
  """Prints a row for each kept step, and writes the picked one."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name in ("files", "model", "output"):
    parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
  parser.add_argument("--max_asr", type=float, default=0.05)
  parser.add_argument("jobs", type=pathlib.Path, nargs="+")
  flags = parser.parse_args()
  start()
  names = ("forget", "retain", "relearn", "questions")
  config = ReleaseAudit(unlearned=str(flags.model), **{name: str(flags.files / f"{name}.jsonl") for name in names})
  audit, mesh = Release(config, "", flags.output), runs_mesh(1)
  model = make_model(audit.checked["U"], TrainSettings(), np.float32)
  ask, retain = audit.interviewer(model, mesh, 1), audit.rows("retain", 1)
  found = []
  print("job, step, hits, mean log-probability of a retained token")
  for job in flags.jobs:
    enough = None
    for step in checkpoints.saved_steps(job / "checkpoints" / "unlearn"):
      folder = checkpoints.step_path(job / "checkpoints" / "unlearn", step)
      params = jax.tree.map(lambda leaf: leaf[0], checkpoints.load_tree(folder, model.abstract(), 1))
      scores = ask(repeat_runs(params, 1, mesh), retain, 1)
      hits, kept = float(scores.asr.mean()), float(scores.retain.mean())
      print(f"{job}, {step}, {100 * hits:.1f} %, {kept:.3f}", flush=True)
      if enough is None and hits <= flags.max_asr:
        enough = (kept, folder)
    found += [enough] if enough else []
  if not found:
    raise SystemExit("no job came that far")
  kept, folder = max(found, key=lambda item: item[0])
  export_run(folder, flags.output)
  print(f"picked {folder}: {flags.output}")


if __name__ == "__main__":
  main()
