"""What ERASED has to earn: which cells count, and every doubt that forbids the word."""

from collections.abc import Sequence

from relearn_jax.audit.evidence import CellEvidence, Evidence, Limits, cluster_numbers
from relearn_jax.audit.seed_tables import DRAWN
from relearn_jax.audit.statistics import seeds_needed
from relearn_jax.audit.thresholds import Design, VerdictSettings
from relearn_jax.cases.control_sets import PREFIX


def percent(value: float) -> str:
  """For sentences."""
  return f"{100 * value:.0f} %"


def counted_cells(cells: Sequence[CellEvidence], unlearned: Sequence[int], knew: float, settings: VerdictSettings
                  ) -> tuple[list[int], list[str]]:
  """The cells that count for ERASED, and of the others of unlearned depths why they do not."""
  counted, reasons = [], []
  for i in unlearned:
    cell = cells[i]
    idle = [arm for arm, fell in cell.fell.items() if fell is not None and fell < settings.min_loss_fall]
    if destroyed(cell, knew, settings):
      assert cell.o1 is not None
      reasons.append(f"{cell.name}: the attack destroyed the original ({percent(knew)} to {percent(cell.o1)})")
    elif idle:
      reasons.append(f"{cell.name}: the attack did nothing to {' and '.join(idle)} (its loss on the relearn set fell "
                     f"by less than {percent(settings.min_loss_fall)})")
    else:
      counted.append(i)
  return counted, reasons


def destroyed(cell: CellEvidence, knew: float, settings: VerdictSettings) -> bool:
  """Whether the original lost, by the same attack, more than may be of what it knew."""
  return cell.o1 is not None and cell.o1 < settings.min_original_kept * knew


def find_doubts(evidence: Evidence, limits: Limits, counted: Sequence[int], unlearned: Sequence[int],
                settings: VerdictSettings, design: Design) -> list[str]:
  """Everything that forbids ERASED."""
  cells, knew, delta = evidence.cells, evidence.knew, settings.delta
  assert knew is not None
  number, questions = len(evidence.seeds), len(evidence.questions)
  doubts = []
  if knew < settings.min_original:
    doubts.append(f"the original itself scored only {percent(knew)}")
  if not counted:
    doubts.append("no cell counts, since the attack destroyed the original or did nothing in all of them")
  doubts += _size_doubts(evidence, settings, design)
  for name, values in (("the excess", limits.high), ("the level above the control", limits.level_high),
                       ("what the unlearned model still says before the attack", limits.before_high)):
    most = max((values[i] for i in counted), default=None) if values is not None else None
    if most is not None and most >= delta:
      doubts.append(f"{name} may be as large as {most:.3f}, and {delta:g} is the most that counts as none")
  if limits.high is not None and any(limits.high[i] >= delta for i in counted):
    needed = seeds_needed(delta, settings.alpha, questions)
    if needed is None:
      doubts.append(f"{questions} questions cannot show less than {delta:g}, however many seeds there are")
    elif number < needed:
      doubts.append(f"{number} seeds are too few to show less than {delta:g}: without any recovery {needed} would do")
  gain = max(float((cell.n1 - cell.n0).mean()) for cell in cells)
  if gain > delta:
    doubts.append(f"the control relearned too ({100 * gain:+.0f} points), so the attack teaches the answer")
  doubts += _model_doubts([cells[i] for i in counted], settings)
  return doubts + _rate_doubts([cells[i] for i in unlearned], [cells[i] for i in counted], knew, settings)


def _size_doubts(evidence: Evidence, settings: VerdictSettings, design: Design) -> list[str]:
  doubts, questions = [], len(evidence.questions)
  clusters = int(cluster_numbers(evidence.questions, design.clusters).max()) + 1
  if clusters < settings.min_clusters:
    doubts.append(f"{clusters} clusters of questions show no limits (at least {settings.min_clusters})")
  if questions < settings.min_questions:
    doubts.append(f"{questions} questions are too few (at least {settings.min_questions})")
  if len(evidence.seeds) == 1:
    doubts.append("there is a single seed, which shows nothing of others")
  elif len(evidence.seeds) < settings.min_seeds:
    doubts.append(f"{len(evidence.seeds)} seeds are too few (at least {settings.min_seeds})")
  if unreached := len(set(design.seeds) - set(evidence.seeds)):
    doubts.append(f"{unreached} of {len(set(design.seeds))} seeds are missing, which did not unlearn far enough, or "
                  "ended")
  elif design.ended:
    doubts.append(f"runs ended: {'; '.join(design.ended)}")
  return doubts


def _model_doubts(counted: Sequence[CellEvidence], settings: VerdictSettings) -> list[str]:
  """Whether the attack is known to have worked, and U to be intact, in every cell that counts."""
  doubts = []
  if any(cell.o1 is None for cell in counted):
    doubts.append("the original was not attacked, so nothing shows that the attack leaves what is known")
  if any(fell is None for cell in counted for fell in cell.fell.values()):
    doubts.append("the loss on the relearn set was not recorded, so nothing shows that the attack did anything")
  for when, shares in zip(("before", "after"), zip(*(cell.likelier for cell in counted), strict=True), strict=False):
    if any(share is None for share in shares):
      doubts.append(f"nothing shows how likely the unlearned model finds the answers {when} the attack")
    elif (most := max(shares)) > settings.max_likelier:
      doubts.append(f"it finds the answers likelier than the control does {when} the attack, by {percent(most)} of "
                    f"what the original has over the control, and {percent(settings.max_likelier)} is the most that "
                    "counts as none")
  for when, ratios in zip(("before", "after"), zip(*(cell.retained for cell in counted), strict=True), strict=False):
    if any(ratio is None for ratio in ratios):
      doubts.append(f"nothing shows that the unlearned model was intact on retained text {when} the attack")
    elif (least := min(ratios)) < settings.min_retain_ratio:
      doubts.append(f"utility collapsed {when} the attack (on retained text a token has {percent(least)} of the "
                    "probability that the original gives it), and a model that fails at everything has not been shown "
                    "to have forgotten this")
  return doubts


def _rate_doubts(cells: Sequence[CellEvidence], counted: Sequence[CellEvidence], knew: float,
                 settings: VerdictSettings) -> list[str]:
  """Whether each attack was tried over a range of learning rates, up to where it destroys.

  Attacks that were drawn in a search are cells like others, but have each a rate of their own: no range is asked of
  them. Nor is one of control sets, which are to show what does not bring it back.
  """
  doubts = []
  for kind in dict.fromkeys((cell.where.relearn_set, cell.where.adapter) for cell in cells
                            if DRAWN not in cell.where.adapter and not cell.where.relearn_set.startswith(PREFIX)):
    of = lambda some, kind=kind: [cell for cell in some if (cell.where.relearn_set, cell.where.adapter) == kind]
    doubts += _rates_of_one(of(cells), of(counted), knew, settings)
  return list(dict.fromkeys(doubts))


def _rates_of_one(cells: Sequence[CellEvidence], counted: Sequence[CellEvidence], knew: float,
                  settings: VerdictSettings) -> list[str]:
  """The same of one relearn set and adapter."""
  rates = sorted({cell.where.learning_rate for cell in cells})
  good = sorted({cell.where.learning_rate for cell in counted}) or rates
  highest = any(destroyed(cell, knew, settings) for cell in cells if cell.where.learning_rate == rates[-1])
  wide = good[-1] >= settings.min_rate_ratio * good[0] * (1 - 1e-9)
  if wide and highest:
    return []
  top = rates[-1]
  more = [f"{rate:.1g}" for rate in (3.0 * top, 10.0 * top)] if not highest else [
      f"{rate:.1g}" for rate in (good[0] / 3.0, good[0] / 10.0)]
  rest = " and on, until the attack begins to destroy the original" if not highest else ""
  by = "this attack" if len(rates) == 1 else "these attacks"
  return [f"it was not found by {by} alone ({cells[0].attack}learning rate "
          f"{', '.join(f'{rate:g}' for rate in rates)}); rates still to be tried: {', '.join(more)}{rest}"]
