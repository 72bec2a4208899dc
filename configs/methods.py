"""All unlearning methods on the names case, side by side, under the same attacks.

`relearn audit --config=configs/methods.py --workdir=runs/methods` runs it; `--config.unlearn.methods="('ga', 'npo')"`
only some, and any field of the audit can be set, for example `--config.seeds="(0, 1, 2, 3, 4)"`.

Where the numbers come from: learning rates and hyper-parameters were chosen by `configs/sweep.py` on other seeds, by
unlearned models only (benchmarks/methods.md); one variant, the pair repeated 7 times, and one unlearn depth; three
learning rates of the attack, up to the highest that leaves the original what it knows, each on all parameters and on
an adapter; everything else is as in configs/names.py.
"""

import dataclasses
import pathlib

from relearn_jax.audit.audit_config import Audit
from relearn_jax.config_files import load_config_file
from relearn_jax.objectives.methods import METHODS

DEFENDED = ("npo_gd+sam", "npo_gd+smoothing", "npo_gd+gradient_penalty", "npo_gd+averaging")


def get_config() -> Audit:
  """The default comparison."""
  names: Audit = load_config_file(str(pathlib.Path(__file__).with_name("names.py")))
  return dataclasses.replace(
      names, case=dataclasses.replace(names.case, variants=(7,)),
      unlearn=dataclasses.replace(names.unlearn, methods=(*METHODS, *DEFENDED), depths=1),
      attack=dataclasses.replace(names.attack, learning_rates=(1e-4, 3e-4, 1e-3), adapters=("full", "lora")))
