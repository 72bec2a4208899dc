"""The stages of audits of the names case: of one method, of several side by side, and of a sweep."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from relearn_jax.audit.arms import all_cases
from relearn_jax.audit.base import make_tokenizer, model_config
from relearn_jax.audit.comparison import MethodsAudit, one_audit
from relearn_jax.audit.config import AuditConfig, check_config
from relearn_jax.audit.sweep import Sweep, candidate_groups, check_sweep
from relearn_jax.cases.base import Case, Text
from relearn_jax.errors import InputError
from relearn_jax.objectives.recipe import Recipe
from relearn_jax.plan.recipes import step_fields
from relearn_jax.plan.work import Work

# Data set that an objective reads -> rows of a case.
ROWS: dict[str, Callable[[Case], Sequence[Text]]] = {
    "forget": lambda case: case.forget, "retain": lambda case: case.retain, "idk": lambda case: case.refusals,
    "alternate": lambda case: case.alternates, "relabelled": lambda case: case.forget}
NOTE = "unlearning is planned to its last step, although runs that are through end it before"


class _Names:
  """The cases of an audit, and the stages that are made of them."""

  def __init__(self, audit: AuditConfig):
    self.audit, self.config = audit, model_config(audit.base, make_tokenizer())
    self.cases = all_cases(audit)
    self.length = self.longest(lambda case: case.memorize)
    self.common: dict[str, Any] = {"length": self.length, "counted": self.length - 1}

  def longest(self, select: Callable[[Case], Sequence[Text]]) -> int:
    """Tokens of the longest row, with the BOS, and the EOS where it is complete."""
    return max(len(f"{row.prompt} {row.text}".split()) + 1 + row.complete
               for case in self.cases.values() for row in select(case))

  def most(self, select: Callable[[Case], Sequence[Text]]) -> int:
    """Rows of the case that has the most."""
    return max(len(select(case)) for case in self.cases.values())

  def note(self) -> str:
    """What was found."""
    return f"rows of at most {self.length} tokens; {NOTE}"

  def before(self) -> list[Work]:
    """What does not depend on the method."""
    base, runs = self.audit.base, len(self.cases)
    return [
        Work("pretrain", "train", self.config, rows=base.batch_size, length=base.max_names + 2,
             counted=base.max_names + 1, steps=base.steps),
        Work("memorize", "train", self.config, runs=runs, rows=self.most(lambda case: case.memorize),
             steps=self.audit.memorize.steps, **self.common)]

  def unlearn(self, recipe: Recipe, runs: int, steps: int, name: str = "unlearn", reinforce: str = "reinforce"
              ) -> list[Work]:
    """Unlearning, and the second model's training before it; the statistics of frozen models are one pass, left out."""
    rows = {name: self.most(ROWS[name]) for name in sorted(recipe.objective.rows)}
    longest = max(self.length, *(self.longest(ROWS[name]) for name in rows))
    common: dict[str, Any] = {"length": longest, "counted": longest - 1, "runs": runs}
    work = Work(name, "train", self.config, rows=sum(rows.values()), steps=steps, **common)
    work = dataclasses.replace(work, **step_fields(recipe, rows, rows, work))
    if not recipe.published.reinforces:
      return [work]
    # The models before it wait for those that are reinforced.
    return [Work(reinforce, "train", self.config, rows=rows["forget"], steps=int(recipe.hyper["reinforce_steps"]),
                 copies=1, **common), work]

  def relearn(self, audits: int = 1) -> Work:
    """The attack, of all seeds."""
    rows = lambda case: case.relearn_sets[0].rows
    attack = self.audit.relearn
    return Work("relearn", "train", self.config, runs=self.cells * len(attack.learning_rates), rows=self.most(rows),
                length=self.longest(rows), counted=self.longest(rows) - 1,
                steps=audits * len(self.audit.case.seeds) * attack.keep_steps[-1])

  @property
  def cells(self) -> int:
    """Models that are attacked together, at each of its rates."""
    return len(self.audit.case.variants) * (2 * self.audit.unlearn.depths + 1)

  def interviews(self) -> int:
    """Calls in which one audit's models are asked, but for those that have only memorised."""
    unlearn, seeds = self.audit.unlearn, len(self.audit.case.seeds)
    return ((1 + unlearn.max_steps // unlearn.keep_every) * self.blocks(len(self.cases) // 2)
            + seeds * (self.blocks(self.cells) + len(self.audit.relearn.keep_steps)
                       * self.blocks(self.cells * len(self.audit.relearn.learning_rates))))

  def blocks(self, runs: int) -> int:
    """Calls that so many models take."""
    return -(-runs // self.audit.evaluate.runs_per_call)

  def ask(self, calls: int, waiting: int) -> Work:
    """Interviews."""
    asked = self.audit.evaluate
    return Work("ask", "generate", self.config, runs=min(asked.runs_per_call, waiting),
                rows=self.audit.case.num_questions, length=max(asked.buckets), counted=1, steps=calls,
                max_new_tokens=asked.max_new_tokens, moments=True, waiting=waiting)


def plan_audit(audit: AuditConfig) -> tuple[list[Work], str]:
  """The stages of an audit, and what was found."""
  names = _Names(audit)
  runs = len(names.cases)
  return [*names.before(), *names.unlearn(audit.recipe, runs, audit.unlearn.max_steps), names.relearn(),
          names.ask(names.blocks(runs) + names.interviews(), runs)], names.note()


def plan_methods(config: MethodsAudit, where: str) -> tuple[list[Work], str]:
  """The stages of a comparison: what the methods share, unlearning by each, the attacks and interviews of all.

  Raises:
    InputError: a setting that the command would refuse.
  """
  audits = _each(config.audit, config.methods, where)
  names = _Names(config.audit)
  runs, works = len(names.cases), names.before()
  for name, audit in audits.items():
    works += names.unlearn(audit.recipe, runs, audit.unlearn.max_steps, name, f"{name} reinforce")
  calls = len(audits) * (names.blocks(runs) + names.interviews())
  return [*works, names.relearn(len(audits)), names.ask(calls, runs)], names.note()


def plan_sweep(config: Sweep, where: str) -> tuple[list[Work], str]:
  """The stages of a sweep: a method's candidates are stacked, those that one compiled step cannot serve in turn.

  Raises:
    InputError: a setting that the command would refuse.
  """
  audits, names = check_sweep(config, where), _Names(config.audit)
  unlearn, u_runs = config.audit.unlearn, len(names.cases) // 2
  works, calls, most = names.before(), 0, 1
  for name, audit in audits.items():
    groups = candidate_groups(audit, config.grids[name])
    runs = [len(members) * u_runs for _, members in groups]
    stages = names.unlearn(groups[0][0].recipe, max(runs), unlearn.max_steps, name, f"{name} reinforce")
    works += [dataclasses.replace(work, steps=work.steps * len(groups)) for work in stages]
    calls += sum((unlearn.max_steps // unlearn.keep_every) * names.blocks(number) for number in runs)
    most = max(most, *runs)
  return [*works, names.ask(calls, most)], names.note()


def _each(audit: AuditConfig, methods: Collection[str], where: str) -> dict[str, AuditConfig]:
  if not methods:
    raise InputError("is empty", file=where, field="methods", mend="expected names of methods")
  found = {}
  for name in methods:
    try:
      found[name] = one_audit(audit, name)
    except InputError as error:
      raise InputError(error.problem, file=where, field=error.field, mend=error.mend) from None
    check_config(found[name], where)
  return found
