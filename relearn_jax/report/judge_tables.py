"""What judges said, as tables: ratings of the models of the main table, how many are missing, and agreement."""

from collections.abc import Mapping, Sequence
from typing import Any

from relearn_jax.judge.judge_prompts import PROMPTS
from relearn_jax.report.figures import last_step, pick, view
from relearn_jax.report.tables import TextTable


def _shown(cell: Mapping[str, Any] | None, prompt: str) -> str:
  """A mean and its interval on the judge's own scale."""
  if cell is None:
    return "–"
  scale = PROMPTS[prompt].scale
  say = lambda value: f"{scale.shown(value):.{scale.decimals}f}"
  return say(cell["mean"]) + ("" if cell["low"] is None else f" [{say(cell['low'])}, {say(cell['high'])}]")


def ratings_table(summary: Mapping[str, Any]) -> TextTable | None:
  """Ratings of every judge, of the models of the main table; None where there is no judge."""
  rows, step = [], last_step(summary)
  for metric, about in summary["judges"].items():
    for method in summary["methods"]:
      shown = view(dict(summary), method)
      for variant in shown["verdicts"]:
        def get(arm: str, point: str, depth: int | None, at: int, cells: Any = shown["cells"], v: str = variant,
                m: str = metric, prompt: str = about["prompt"]) -> str:
          found = pick(cells, variant=v, arm=arm, point=point, depth=depth, relearn_step=at, metric=m)
          return _shown(found[0] if found else None, prompt)
        word = about["verdicts"][method][variant]["verdict"] if about["verdicts"] else "–"
        rows.append((about["judge"], about["prompt"], method, variant, get("O", "original", None, 0),
                     get("U", "unlearned", 0, 0), get("U", "relearned", 0, step), get("N", "relearned", 0, step), word))
  kinds = "; ".join(f"{name}: {PROMPTS[name].about}"
                    for name in dict.fromkeys(about["prompt"] for about in summary["judges"].values()))
  return TextTable(
      f"Judges' mean ratings and 95 % intervals over the answers that have one, before and after {step} relearning "
      f"steps ({kinds}); a verdict by a judge's ratings only where it rated the answers of all cells",
      ("judge", "asked for", "method", "variant", "original", "unlearned", "relearned", "control", "verdict by it"),
      tuple(rows)) if rows else None


def counts_table(summary: Mapping[str, Any]) -> TextTable | None:
  """How many answers each judge was given, and what became of them; None where there is no judge."""
  rows = []
  for about in summary["judges"].values():
    why = "; ".join(f"{count} {problem}" for problem, count in about["problems"].items()) or "–"
    cost = "–" if about["cost"] is None else f"{about['cost']:.2f}"
    rows.append((about["judge"], about["prompt"], ", ".join(about["models"]) or "–", about["answers"],
                 str(about["distinct"]), str(about["missing"]), why, str(about["cut"]), str(about["cached"]),
                 "{} + {}".format(*about["tokens"]), cost))
  return TextTable(
      "Distinct answers that each judge was given. A missing rating is no rating: nothing stands in its place, and the "
      "question is left out of means in which it is missing. Tokens and cost are those of the last run",
      ("judge", "asked for", "it calls itself", "answers of", "distinct", "missing", "why", "cut", "from cache",
       "tokens in + out", "cost"), tuple(rows)) if rows else None


def agreement_table(summary: Mapping[str, Any]) -> TextTable | None:
  """How far each two judges say the same; None where there are no two."""
  number = lambda value: "–" if value is None else f"{value:.3f}"
  name = lambda metric: metric.removeprefix("judge:")
  rows = tuple((name(one["first"]), name(one["second"]), str(one["answers"]),
                *(number(one[key]) for key in ("same", "difference", "distance", "correlation")))
               for one in summary["agreement"])
  return TextTable(
      "Agreement of judges on the distinct answers that both rated; ratings from 0 to 1",
      ("one", "other", "answers", "share rated the same", "other − one, mean", "absolute difference, mean",
       "rank correlation"), rows) if rows else None


def every_table(summary: Mapping[str, Any]) -> Sequence[TextTable]:
  """All of these that there are."""
  found = (ratings_table(summary), counts_table(summary), agreement_table(summary))
  return [table for table in found if table is not None]
