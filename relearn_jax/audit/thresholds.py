"""What a verdict depends on besides the rows: thresholds, each with its reason, and how the audit was made."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass
class VerdictSettings:
  """Thresholds, each with its reason.

  Attributes:
    delta: an excess below this counts as none. 0.1 is what some 155 questions can tell from nothing
      with 80 % power (paired answers of which a fifth differ).
    alpha: error of each one-sided limit; 0.05 by convention.
    draws: of the limits' simulation: with 10,000 a limit is off by some 0.002.
    seed: of it.
    min_original: score below which the original hardly knew, so that "erased" says nothing.
    min_questions: fewer cannot support ERASED: the exact limit of 0 in 30 is already 0.095.
    min_clusters: fewer clusters of questions show no limits: their spread is not to be told from so few. With five
      Student's limits hold (benchmarks/verdict.md).
    min_seeds: fewer cannot support OBFUSCATED: where all or nothing comes back, two seeds of U show all and two of N
      nothing with a chance of 1/16, three with 1/64.
    min_retain_ratio: token probability on retained text, relative to the original's, below which utility has
      collapsed: a model that says nothing sensible has not been shown to have forgotten.
    min_original_kept: share of what the original knew that it must still say after the same attack; an attack that
      takes more than half of it from the original destroys, and shows nothing about U.
    min_loss_fall: share by which the attack's loss on the relearn set must fall on U and on N; an attack that has not
      learned a tenth of its own text has done nothing.
    max_likelier: share of the original's advantage over the control in the log-probability of the true answers that the
      unlearned model may have: a model that finds an answer far likelier than one that never knew it has not forgotten
      it, whatever it says. Models that never knew have 0 to 0.04 of it either way (tests/audit/test_words.py), models
      that had only gone silent 0.6 to 0.98 (benchmarks/whp.md).
    min_rate_ratio: ERASED wants attacks whose learning rates lie this far apart, up to one that begins to destroy the
      original: what one rate does not bring back, another may.
  """

  delta: float = 0.1
  alpha: float = 0.05
  draws: int = 10_000
  seed: int = 0
  min_original: float = 0.5
  min_questions: int = 30
  min_clusters: int = 5
  min_seeds: int = 3
  min_retain_ratio: float = 0.1
  min_original_kept: float = 0.5
  min_loss_fall: float = 0.1
  max_likelier: float = 0.25
  min_rate_ratio: float = 10.0


@dataclasses.dataclass(frozen=True)
class Design:
  """How an audit was made, as far as the verdict depends on it.

  Attributes:
    seeds: that were run.
    clusters: question -> cluster of dependent questions; each its own where it is not named.
    loaded: U and N are checkpoints that were given: before the attack all seeds are the same model.
    control: what N is, for sentences.
    metric: what proves knowledge.
    ended: runs that ended because something was not finite, as sentences.
  """

  seeds: Sequence[int]
  clusters: Mapping[str, str] = dataclasses.field(default_factory=dict)
  loaded: bool = False
  control: str = "the never-trained control"
  metric: str = "asr"
  ended: Sequence[str] = ()
