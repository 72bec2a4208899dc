"""The published unlearning methods, each in a line or two, by the name a configuration uses.

To add one, add a row: what it does with the forget set and with the retain set, as builders from hyper-parameters
(which may be traced) to an `Objective`, the formula that `--config.method=help` prints, where it is from, and the
hyper-parameters with their defaults and domains. Everything else - the data sets, the cache of references, the jitted
step, the flags - follows. Defaults are the published ones, where one was published; other models want others.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from relearn_jax.errors import InputError
from relearn_jax.objectives import losses
from relearn_jax.objectives.combinators import (
  add,
  alternate,
  ascend,
  gradient_penalty,
  random_smoothing,
  scale,
  sharpness_aware,
  task_vector,
  weight_average,
)
from relearn_jax.objectives.core import Objective
from relearn_jax.objectives.losses import nll
from relearn_jax.objectives.settings import Setting, Settings, positive

Hyper = Mapping[str, Any]  # name -> value: a number, or a traced scalar where it is not static
Build = Callable[[Hyper], Objective]


@dataclasses.dataclass(frozen=True)
class Method:
  """A published method: how it is built, and what a person should know of it.

  Attributes:
    forget: hyper-parameters -> what it does with the forget set; defences are put around this.
    formula: the loss, in one line.
    source: where it is from, and where its defaults are from.
    retain: hyper-parameters -> the term on the retain set, where the two are a sum.
    settings: its hyper-parameters.
    release: hyper-parameters and the whole objective -> the objective with the weights that it releases.
  """

  forget: Build
  formula: str
  source: str
  retain: Build | None = None
  settings: Settings = dataclasses.field(default_factory=dict)
  release: Callable[[Hyper, Objective], Objective] = lambda _, objective: objective

  @property
  def reinforces(self) -> bool:
    """Whether a second model is made first: one that learns the forget set even better."""
    return "reinforce_steps" in self.settings


@dataclasses.dataclass(frozen=True)
class Defence:
  """What is put around a method so that it survives relearning: around its forget part, or around all of it."""

  wrap: Callable[[Hyper, Objective], Objective]
  formula: str
  source: str
  settings: Settings = dataclasses.field(default_factory=dict)
  around: str = "forget"


RETAIN = {"retain_weight": Setting(1.0, "weight of the term on retain")}
BETA = {"beta": positive(0.1, "how fast it lets go of what is forgotten")}
RETAIN_NLL: Build = lambda h: scale(h["retain_weight"], nll("retain"))
RETAIN_KL: Build = lambda h: scale(h["retain_weight"], losses.kl_to_reference("retain"))
REINFORCE = {
    "reinforce_steps": positive(100, "steps of the second model", whole=True, static=True),
    "reinforce_learning_rate": positive(3e-6, "of the second model", static=True)}
GA: Build = lambda _: ascend(nll("forget"))
NPO: Build = lambda h: losses.npo("forget", h["beta"])

METHODS: dict[str, Method] = {
    "ga": Method(GA, "-NLL(forget)", "gradient ascent; Jang et al., 2023"),
    "gd": Method(GA, "-NLL(forget) + retain_weight NLL(retain)", "gradient difference; Liu et al., 2022",
                 RETAIN_NLL, RETAIN),
    "kl": Method(GA, "-NLL(forget) + retain_weight KL(reference || model on retain)", "Maini et al., 2024 (TOFU)",
                 RETAIN_KL, RETAIN),
    "npo": Method(NPO, "(2/beta) softplus(beta (s - s_ref)) on forget", "Zhang et al., 2024", settings=BETA),
    "npo_gd": Method(NPO, "NPO + retain_weight NLL(retain)", "Zhang et al., 2024", RETAIN_NLL, BETA | RETAIN),
    "npo_kl": Method(NPO, "NPO + retain_weight KL(reference || model on retain)", "Zhang et al., 2024", RETAIN_KL,
                     BETA | RETAIN),
    "simnpo": Method(
        lambda h: scale(h["forget_weight"], losses.simnpo("forget", h["beta"], h["delta"])),
        "forget_weight (2/beta) softplus(-beta (-s/n - delta)) on forget + retain_weight NLL(retain)",
        "Fan et al., 2024; defaults of its TOFU forget10 runs", RETAIN_NLL,
        {"beta": positive(4.5, BETA["beta"].what), "delta": Setting(0.0, "margin, in nats a token"),
         "forget_weight": positive(0.125, "weight of the term on forget")} | RETAIN),
    "scrub": Method(
        lambda h: alternate(
            ascend(losses.kl_to_reference("forget", h["temperature"])),
            add(scale(h["kl_weight"], losses.kl_to_reference("retain", h["temperature"])), RETAIN_NLL(h)),
            h["period"], h["max_phases"]),
        "max phase: -T^2 KL(reference/T || model/T) on forget; min phase: kl_weight T^2 KL on retain + retain_weight "
        "NLL(retain)",
        "Kurmanji et al., 2023; weights of BLUR's runs on language models; a phase is an epoch there",
        settings={"temperature": positive(4.0, "T"), "kl_weight": Setting(0.001, "weight of KL in the min phase"),
                  "retain_weight": Setting(0.1, "weight of NLL in the min phase"),
                  "period": positive(10, "steps of a phase", whole=True),
                  "max_phases": positive(2, "max phases, each followed by a min phase; then min alone", whole=True)}),
    "whp_relabel": Method(
        lambda _: nll("relabelled"), "NLL on forget with the terms of `anchors` replaced by generic ones in the labels",
        "Eldan and Russinovich, 2023, with labels from the replaced text itself"),
    "whp_logits": Method(
        lambda h: losses.generic_nll("forget", h["alpha"]),
        "NLL on forget of argmax(v_base - alpha relu(v_reinforced - v_base))",
        "Eldan and Russinovich, 2023 (alpha, learning rate of the reinforced model)",
        settings={"alpha": Setting(5.0, "how far away from the reinforced model", static=True)} | REINFORCE),
    "rmu": Method(
        lambda h: losses.misdirect("forget", h["depth"], h["steering"], h["seed"]),
        "mean (h - steering u)^2 on forget + retain_weight mean (h - h_ref)^2 on retain, h of a layer",
        "Li et al., 2024 (WMDP); its Zephyr run",
        lambda h: scale(h["retain_weight"], losses.preserve("retain", h["depth"])),
        {"depth": positive(0.25, "share of the layers below h: 8 of 32", high=1.0, static=True),
         "steering": positive(6.5, "length of the direction"),
         "retain_weight": Setting(1200.0, RETAIN["retain_weight"].what),
         "seed": Setting(0, "of the direction u", whole=True)}),
    "idk_nll": Method(lambda _: losses.nll_union("idk", "retain"),
                      "NLL on refusals of the forget prompts and on retain, as one set", "Maini et al., 2024 (TOFU)"),
    "idk_dpo": Method(
        lambda h: losses.dpo("idk", "forget", h["beta"]),
        "(2/beta) softplus(-beta ((s - s_ref) of the refusal - (s - s_ref) of the answer)) + retain_weight NLL(retain)",
        "Zhang et al., 2024, after Rafailov et al., 2023", RETAIN_NLL, BETA | RETAIN),
    "altpo": Method(
        lambda h: losses.dpo("alternate", "forget", h["beta"]),
        "as idk_dpo, with plausible other answers in place of refusals", "Mekala et al., 2024", RETAIN_NLL,
        BETA | RETAIN),
    "undial": Method(
        lambda h: losses.undial("forget", h["beta"]),
        "CE(softmax(z_ref - beta onehot), softmax(z)) on forget + retain_weight NLL(retain)", "Dong et al., 2024",
        RETAIN_NLL, {"beta": positive(10.0, "by how much the true token's logit is lowered"),
                     "retain_weight": Setting(0.0, RETAIN["retain_weight"].what)}),
    "wga": Method(
        lambda h: ascend(losses.weighted_nll("forget", lambda p: p ** h["beta"])),
        "-p^beta NLL on forget, p fixed, + retain_weight NLL(retain)", "Wang et al., 2025", RETAIN_NLL,
        {"beta": Setting(1.0, "0 is gradient difference")} | RETAIN),
    "satimp": Method(
        lambda h: scale(-h["forget_weight"], losses.weighted_nll(
            "forget", lambda p: p ** h["beta1"] * (1 - p) ** h["beta2"])),
        "-forget_weight p^beta1 (1-p)^beta2 NLL on forget, p fixed, + retain_weight NLL(retain)", "Yang et al., 2025",
        RETAIN_NLL, {"beta1": Setting(5.0, "of saturation"), "beta2": Setting(1.0, "of importance"),
                     "forget_weight": positive(0.1, "weight of the term on forget")} | RETAIN),
    "ceu": Method(
        lambda h: losses.ce_u("forget", h["skip_first"]),
        "CE(softmax(z without the true token), softmax(z)) on forget", "Yang, 2025",
        settings={"skip_first": Setting(1.0, "1 leaves out each answer's first token, 0 does not", high=1.0)}),
    "pdu": Method(
        lambda h: losses.logit_margin("forget"),
        "(max z - mean z)^2 on forget + lambda (NLL(retain) - epsilon), lambda <- max(0, lambda + dual_rate (NLL - "
        "epsilon))",
        "Entesari et al., 2025; its TOFU runs (warm-up of 5 epochs of forget10 in batches of 32)",
        lambda h: losses.retain_constraint("retain", h["epsilon"], h["dual"], h["dual_rate"], h["dual_warmup"]),
        {"epsilon": Setting(0.3, "NLL allowed on retain"), "dual": Setting(100.0, "lambda at step 0"),
         "dual_rate": Setting(5.0, "step of lambda"),
         "dual_warmup": Setting(62, "steps before lambda changes", whole=True)}),
    "task_vector": Method(
        lambda _: nll("forget"), "NLL(forget); releases w0 - alpha (w - w0)",
        "Ilharco et al., 2023; alpha of MUSE's runs", settings={"alpha": positive(5.0, "how far the other way")},
        release=lambda h, objective: task_vector(objective, h["alpha"])),
}

DEFENCES: dict[str, Defence] = {
    "sam": Defence(lambda h, o: sharpness_aware(o, h["rho"]), "the forget part at w + rho g / |g|", "Fan et al., 2025",
                   {"rho": Setting(0.01, "how far away")}),
    "smoothing": Defence(
        lambda h, o: random_smoothing(o, h["radius"], int(h["draws"]), h["noise_seed"]),
        "the forget part's mean over draws of w + N(0, radius^2)", "Fan et al., 2025",
        {"radius": Setting(1e-4, "standard deviation"), "draws": positive(3, "draws a step", whole=True, static=True),
         "noise_seed": Setting(0, "of the draws", whole=True)}),
    "gradient_penalty": Defence(
        lambda h, o: gradient_penalty(o, h["penalty"]), "the forget part + penalty |g|^2",
        "Fan et al., 2025, whose code has no gradient there; the default is no published value",
        {"penalty": Setting(1.0, "its weight")}),
    "averaging": Defence(
        lambda h, o: weight_average(o, h["average_from"], h["average_every"]),
        "releases the mean of the weights after steps average_from, average_from + average_every, ...",
        "Fan et al., 2025, after Izmailov et al., 2018",
        {"average_from": Setting(100, "first step", low=1, whole=True),
         "average_every": positive(5, "steps between", whole=True)}, around="all"),
}
NO_DEFENCE = "none"


def _get(table: Mapping[str, Any], name: str, field: str, what: str, *also: str) -> Any:
  if name not in table:
    near = difflib.get_close_matches(name.lower(), table, 3, 0.3)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    raise InputError(f"is {name!r}, which is no {what}{hint}", field=field,
                     mend=f"expected one of {', '.join((*also, *table))}")
  return table[name]


def get_method(name: str, field: str = "method") -> Method:
  """The method called `name`; `InputError` lists the nearest names otherwise."""
  method: Method = _get(METHODS, name, field, "unlearning method")
  return method


def get_defence(name: str, field: str = "defence") -> Defence | None:
  """The defence called `name`, None for "none"; `InputError` lists the nearest names otherwise."""
  return None if name == NO_DEFENCE else _get(DEFENCES, name, field, "defence", NO_DEFENCE)
