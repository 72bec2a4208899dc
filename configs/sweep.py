"""Hyper-parameters of the methods: a small grid each, on seeds that no audit uses.

`relearn sweep --config=configs/sweep.py --workdir=runs/sweep` runs it on the names case; `--config.methods="('ga',
'npo')"` only some. `configs/sweep.py:tofu` is that of the embedded TOFU case, and `:tofu_mini` that of its mini;
`:whp_name` and `:whp_verbatim` are those of the invented novel, `:wmdp` that of the invented craft.
The rule looks at unlearned models alone (`relearn_jax/audit/sweep.py`). What it chose for names stands in
`relearn_jax/cases/names.py`, its output in benchmarks/methods.md; for the others
in their configurations, benchmarks/tofu.md and benchmarks/whp.md.

Where the grids come from: learning rates around the 5e-5 with which gradient ascent was first tried on this case;
around the published values otherwise, or between these and what a model of this size needs to move at all.
"""

import dataclasses
import pathlib

from relearn_jax.audit.audit_config import Audit
from relearn_jax.audit.sweep import Sweep
from relearn_jax.config_files import load_config_file
from relearn_jax.errors import InputError

Grid = dict[str, tuple[float, ...]]
RATES: Grid = {"learning_rate": (2e-5, 5e-5, 1e-4)}
FAST: Grid = {"learning_rate": (1e-4, 2e-4, 5e-4)}
VERBATIM: Grid = {"learning_rate": (1e-4, 2e-4)}  # at 5e-5 gradient ascent takes more than 24 steps
ONE_WEIGHT: Grid = {"retain_weight": (1.0,)}
LABELS: Grid = {"learning_rate": (2e-4, 5e-4)}
WEIGHTS: Grid = {"retain_weight": (1.0, 5.0)}
# NPO is a sum over a row's tokens, and NLL on retain a mean over tokens: a weight of 1 keeps nothing here.
HEAVY: Grid = {"beta": (0.02,), "retain_weight": (10.0, 50.0)}
DEFENDED: Grid = {"learning_rate": (5e-5, 1e-4)} | HEAVY

GRIDS: dict[str, Grid] = {
    "ga": RATES, "gd": RATES | WEIGHTS, "kl": RATES | WEIGHTS,
    "npo": RATES | {"beta": (0.02, 0.1)}, "npo_gd": RATES | HEAVY, "npo_kl": RATES | HEAVY,
    "simnpo": FAST | {"beta": (0.5, 2.5)},
    "scrub": {"learning_rate": (5e-5, 1e-4, 2e-4), "period": (1, 5), "max_phases": (10,), "retain_weight": (1.0,)},
    "whp_relabel": FAST, "whp_logits": FAST | {"alpha": (5.0, 20.0), "reinforce_learning_rate": (5e-4,)},
    "rmu": FAST | {"depth": (0.5,), "retain_weight": (1.0, 100.0)},
    "idk_nll": FAST, "idk_dpo": {"learning_rate": (2e-4, 5e-4, 1e-3), "beta": (0.05,), "retain_weight": (1.0, 10.0)},
    "altpo": FAST | {"beta": (0.05, 0.1)},
    "undial": FAST | {"beta": (3.0, 10.0), "retain_weight": (1.0,)},
    "wga": RATES | {"beta": (0.1, 1.0)}, "satimp": FAST | {"beta1": (1.0, 5.0), "forget_weight": (1.0,)},
    "ceu": FAST | {"skip_first": (0.0,)},
    "pdu": {"learning_rate": (2e-4, 5e-4, 1e-3), "dual": (1.0, 10.0), "dual_warmup": (20,)},
    "task_vector": RATES | {"alpha": (1.0, 5.0)},
    "npo_gd+sam": DEFENDED | {"rho": (0.01, 0.1)}, "npo_gd+smoothing": DEFENDED | {"radius": (1e-4, 1e-3)},
    "npo_gd+gradient_penalty": DEFENDED | {"penalty": (1e-3, 1e-1)},
    "npo_gd+averaging": DEFENDED | {"average_from": (5,)},
}


def of_audit(file: str, grids: dict[str, Grid], max_steps: int) -> Sweep:
  """A sweep of an audit's methods, on other seeds."""
  audit: Audit = load_config_file(str(pathlib.Path(__file__).with_name(file)))
  return Sweep(grids, audit=dataclasses.replace(
      audit, seeds=(100, 101), unlearn=dataclasses.replace(audit.unlearn, max_steps=max_steps, depths=1)))


def get_config(what: str = "names") -> Sweep:
  """The sweep of that name."""
  if what == "tofu":
    return of_audit("tofu.py:embedded", {"ga": RATES, "npo": RATES | {"beta": (0.02, 0.1)}}, 100)
  if what == "tofu_mini":
    wide: Grid = {"learning_rate": (1e-4, 3e-4)}
    return of_audit("tofu.py:mini", {"ga": wide, "npo": wide, "rmu": wide}, 60)
  if what == "whp_verbatim":
    return of_audit("whp_verbatim.py:embedded", {
        "ga": VERBATIM, "gd": VERBATIM | ONE_WEIGHT, "kl": VERBATIM | ONE_WEIGHT, "npo": VERBATIM | {"beta": (0.1,)},
        "scrub": VERBATIM | ONE_WEIGHT | {"period": (4,), "max_phases": (5,)}}, 24)
  if what == "whp_name":
    return of_audit("whp_name.py:embedded", {
        "ga": {"learning_rate": (1e-4, 2e-4)}, "whp_relabel": LABELS,
        "whp_logits": LABELS | {"alpha": (5.0,), "reinforce_learning_rate": (5e-4,), "reinforce_steps": (40,)}}, 48)
  if what == "wmdp":
    pairs: Grid = {"learning_rate": (5e-5, 1e-4)}
    kept: Grid = {"learning_rate": (1e-4, 2e-4)} | ONE_WEIGHT
    return of_audit("wmdp.py:embedded", {
        "ga": pairs, "gd": kept, "kl": kept, "npo": pairs | {"beta": (0.1,)},
        "scrub": kept | {"period": (4,), "max_phases": (5,)},
        "rmu": LABELS | {"depth": (0.5,), "retain_weight": (1.0,)}}, 32)
  if what != "names":
    raise InputError(f"is {what!r}", field="configs/sweep.py:...",
                     mend="expected names, tofu, tofu_mini, whp_name, whp_verbatim or wmdp")
  found = of_audit("names.py", GRIDS, 100)
  return dataclasses.replace(found, audit=dataclasses.replace(
      found.audit, case=dataclasses.replace(found.audit.case, variants=(7,))))
