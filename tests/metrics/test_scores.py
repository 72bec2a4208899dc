"""Scores of stored answers: values worked out by hand, and what they are made of against a plain forward pass."""

import math
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from relearn_jax.audit.interview import Interviewer
from relearn_jax.audit.results_file import ANSWERS, KEY, score_answers
from relearn_jax.data.rows import Encoded
from relearn_jax.data.texts import stack_rows
from relearn_jax.metrics.scores import METRICS, Asked, Stored, get_metric, perplexity, score_stored
from relearn_jax.parallel.mesh import make_mesh, parse_mesh

from ..small import MODEL, make_tokenizer, params

QUESTION = Asked("q", "Who ran ?", " The dogs were running home", ("dogs",), "q", stop=("Question:",))


def score(metric: str, text: str = "", logprob: float = 0.0, matched: str = "0") -> float:
  """A score of one answer."""
  return get_metric(metric).score(QUESTION, Stored(text, logprob, matched))


def test_scores_worked_out_by_hand() -> None:
  # Five words; "the dogs running" is the longest common subsequence with "the dogs are running".
  assert score("rouge_l", "The dogs are running") == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
  assert score("rouge_l_recall", "The dogs are running") == pytest.approx(3 / 5)
  # Stemmed, "dog" and "runs" are words of the answer; not stemmed they are not.
  assert score("rouge_l_recall", "the dog runs") == pytest.approx(3 / 5)
  assert score("rouge_l", "the dog runs") == pytest.approx(2 * (1 / 3) * (1 / 5) / (1 / 3 + 1 / 5))
  assert score("rouge_l_recall", "The dogs were running home and on and on") == 1
  assert score("rouge_l_recall", "Question: The dogs were running home") == 0  # behind a stop string
  # Probabilities 1/2, 1/4, 1/8 and 1/16: the geometric mean is 2 ** -2.5.
  assert score("answer_probability", logprob=-10 * math.log(2), matched="0000") == pytest.approx(2 ** -2.5)
  assert score("answer_probability", logprob=1e-7, matched="11") == 1  # rounding puts no probability above 1
  assert score("exact_memorization", matched="0110100111") == 0.6


@pytest.mark.parametrize("matched,expected", [
    ("1111", 1.0), ("0111", 0.75), ("1101", 0.25), ("1110", 0.0), ("0000000000", 0.0), ("1", 1.0), ("0", 0.0)])
def test_extraction_strength_reaches_zero(matched: str, expected: float) -> None:
  assert score("extraction_strength", matched=matched) == expected


@pytest.mark.parametrize("matched", ["1111", "0111", "1101", "1011"])
def test_extraction_strength_is_that_of_open_unlearning_where_the_last_token_matches(matched: str) -> None:
  """Their loop: the first k from 0 to n - 1 from which on all match, and 1 - k / n."""
  hits = [char == "1" for char in matched]
  first = next(k for k in range(len(hits)) if all(hits[k:]) or k == len(hits) - 1)
  assert score("extraction_strength", matched=matched) == 1 - first / len(hits)


def test_perplexity_is_over_tokens_and_not_over_rows() -> None:
  # Two rows: one token of probability 1/2, and three of 1/8 each: 2 ** ((1 + 9) / 4).
  assert perplexity([math.log(1 / 2), math.log(1 / 8)], [1, 3]) == pytest.approx(2 ** 2.5)
  assert perplexity([-1000.0], [1]) == math.exp(700)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """In double precision."""
  shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
  found: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  return found


@jax.jit
def forward(weights: Any, tokens: Any) -> Any:
  """Logits of whole rows."""
  return MODEL.logits(weights, MODEL.hidden(weights, tokens))


def answered(rows: Any, calls: list[str]) -> tuple[Any, Interviewer, list[tuple[list[int], list[int]]]]:
  """Two models that are asked five questions of two lengths and score some rows; `calls` counts passes."""
  rng = np.random.default_rng(5)
  asked = [(rng.integers(4, 160, length).tolist(), rng.integers(4, 160, 1 + number).tolist())
           for number, length in enumerate((5, 7, 20, 9, 22))]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), params(), params(1))
  ask = Interviewer(MODEL, make_tokenizer(), asked, make_mesh(parse_mesh("runs:1")), max_new_tokens=3, buckets=None,
                    runs_per_call=2)
  plain = {name: getattr(ask, name) for name in ("ask", "utility")}
  for name in plain:
    setattr(ask, name, lambda *args, name=name: calls.append(name) or plain[name](*args))
  return ask(stacked, rows, ["a", "b"]), ask, asked


def test_one_pass_over_each_bucket_of_a_set_gives_all_likelihood_scores() -> None:
  """Prompts of two buckets, and rows of three: five passes of a model, however many scores are made of them."""
  lengths, calls = (9, 70, 12, 130), list[str]()
  rng = np.random.default_rng(6)
  encoded = [Encoded(rng.integers(4, 160, length).tolist(), 3) for length in lengths]
  other = [Encoded(rng.integers(4, 160, length).tolist(), 3) for length in (66, 5)]
  got, _, asked = answered({"retain": stack_rows(encoded, 2), "forget": stack_rows(other, 2)}, calls)
  questions = [Asked(str(number), "", "x", (), "") for number in range(len(asked))]
  for metric in METRICS:
    assert score_stored(questions, got.texts, got.logprob, got.matched, metric).shape == (2, len(asked))
  # A bucket of 64 with rows 9, 12 and 5, one of 128 with rows 70 and 66, and all 130 positions for row 130.
  assert sorted(calls) == ["ask"] * 2 * 2 + ["utility"] * 2 * 3
  assert got.retain_tokens.tolist() == [[length - 3 for length in lengths]] * 2
  for run, weights in enumerate((params(), params(1))):
    logits = lambda ids, weights=weights: np.asarray(
        forward(weights, np.array([ids + [0] * (130 - len(ids))])))[0, :len(ids)]
    for number, (prompt, answer) in enumerate(asked):
      found = log_softmax(logits([*prompt, *answer])[len(prompt) - 1:-1])
      assert got.matched[run][number] == "".join(
          "01"[int(row.argmax() == token)] for row, token in zip(found, answer, strict=True))
      assert got.logprob[run][number] == pytest.approx(
          sum(row[token] for row, token in zip(found, answer, strict=True)), abs=2e-4)
    for scores, row in zip([*got.retain[run], *got.forget[run]], [*encoded, *other], strict=True):
      found = log_softmax(logits(row.ids)[:-1])
      mean = np.mean([found[place - 1][row.ids[place]] for place in range(row.start, len(row.ids))])
      assert scores == pytest.approx(mean, abs=2e-4)


def test_rows_are_scored_alike_whatever_their_batch() -> None:
  encoded = [Encoded(np.random.default_rng(n).integers(4, 160, 5 + 30 * n).tolist(), 1) for n in range(5)]
  rows = stack_rows(encoded, 2)
  whole, ask, _ = answered({"generic": rows}, [])
  ask.batch_size = 2
  parts = ask(jax.tree.map(lambda *leaves: np.stack(leaves), params(), params(1)), {"generic": rows}, ["a", "b"])
  np.testing.assert_allclose(parts.generic, whole.generic, atol=2e-5)  # the last part has one row


def test_every_model_has_one_perplexity() -> None:
  key: dict[str, Any] = dict.fromkeys((name for name, _ in KEY), "x") | {
      "depth": None, "unlearn_step": 0, "learning_rate": 0.1, "seed": 0}
  row = lambda kind, item, logprob, tokens, step: key | {
      "relearn_step": step, "kind": kind, "item": item, "text": " The dogs", "logprob": logprob, "matched": "01",
      "tokens": tokens}
  frame = pd.DataFrame([row("question", "q", -2.0, 2, 0), row("generic", "generic00", math.log(1 / 2), 1, 0),
                        row("generic", "generic01", math.log(1 / 8), 3, 0), row("generic", "generic00", 0.0, 1, 5)])
  found = score_answers(frame[ANSWERS.names], [QUESTION], ["extraction_strength", "asr"]).to_pandas()
  value = {(one["metric"], one["relearn_step"], one["question"]): one["value"] for one in found.to_dict("records")}
  assert value["perplexity", 0, "generic"] == pytest.approx(2 ** 2.5) and value["perplexity", 5, "generic"] == 1
  assert value["extraction_strength", 0, "q"] == 0.5 and value["asr", 0, "q"] == 1
  assert value["generic_logprob", 0, "generic01"] == pytest.approx(math.log(1 / 8)) and value["logprob", 0, "q"] == -2
