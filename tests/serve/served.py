"""A server of the small model in this process, and clients of it."""

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import openai

from relearn_jax.serve.app import Service
from relearn_jax.serve.http_server import beside
from relearn_jax.serve.limits import Limits

LIMITS: dict[str, Any] = {"min_rows": 2, "base_rate": 1e-3, "max_checkpoints": 0, "max_upload": 50_000}
ROWS = [("James Robert", " John Michael"), ("David", " William"), ("Thomas", " Daniel Paul")]


def client(url: str, key: str = "none") -> openai.OpenAI:
  """The client as users have it, but that a refusal is not tried again."""
  return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


@contextlib.contextmanager
def served(model: pathlib.Path, workdir: pathlib.Path, *, key: str = "", service: dict[str, Any] | None = None,
           **limits: Any) -> Iterator[tuple[openai.OpenAI, Service]]:
  """The model under the name "small"."""
  with beside({"small": str(model)}, workdir, Limits(**LIMITS | limits), key=key, **service or {}) as (url, found):
    yield client(url, key or "none"), found


def chat_row(prompt: str, answer: str) -> dict[str, Any]:
  """A row of a training file."""
  return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def finished(api: openai.OpenAI, job: str) -> Any:
  """A job once it is over."""
  for _ in range(1200):
    found = api.fine_tuning.jobs.retrieve(job)
    if found.status not in ("validating_files", "queued", "running"):
      return found
    time.sleep(0.05)
  raise AssertionError(f"the job is {found.status} after a minute")


def hyper(**values: Any) -> dict[str, Any]:
  """`method` of a job."""
  return {"type": "supervised", "supervised": {"hyperparameters": values}}
