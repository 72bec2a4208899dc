"""The HTTP interface: what stands behind it, and its routes."""

import asyncio
import json
import pathlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse

from relearn_jax.serve.catalog import Catalog
from relearn_jax.serve.conversations import Moderate, blocks, read_conversations
from relearn_jax.serve.engine import Busy, Engine
from relearn_jax.serve.guard import Guard, Refusal, add_errors
from relearn_jax.serve.jobs import Trainer, new_job, read_budget, tuned_name
from relearn_jax.serve.limits import Limits
from relearn_jax.serve.store import LEFT, Record, Store, is_id
from relearn_jax.serve.wire import (
  Body,
  chat_body,
  completion_body,
  read_chat,
  read_completion,
  read_job,
)

CHUNK = 1024**2
BEGAN = int(time.time())


class Service:
  """Everything behind the interface.

  Attributes:
    store, catalog, engine, trainer, limits: its parts.
  """

  def __init__(self, models: Mapping[str, str], workdir: pathlib.Path, limits: Limits, *,
               moderate: Moderate | None = None, dtype: str = "auto", save_every: float = 60.0):
    """
    Args:
      models: name -> folder or hub id of a checkpoint.
      workdir: everything is kept here; jobs that were left there go on.
      limits: what is permitted.
      moderate: which texts are refused; by default those that hold a blocked word.
      dtype: precision of products.
      save_every: seconds of work that a killed job loses at most, about.

    Raises:
      InputError: a checkpoint is wrong.
    """
    self.limits, self.catalog = limits, Catalog(models, dtype)
    self.store = Store(workdir)
    self.engine = Engine(self.catalog, limits.max_waiting)
    self.trainer = Trainer(self.store, self.catalog, limits, moderate or blocks(limits.blocked_words), save_every)

  def close(self) -> None:
    """Ends both threads; jobs that are under way go on when the workdir is served again."""
    self.trainer.close()
    self.engine.close()


def _page(rows: list[Record], after: str | None, limit: int) -> dict[str, Any]:
  """A part of a list, from behind one of its entries on."""
  if after:
    rows = rows[next((i + 1 for i, row in enumerate(rows) if row["id"] == after), len(rows)):]
  part = rows[:min(max(limit, 1), 10_000)]
  return {"object": "list", "data": part, "has_more": len(part) < len(rows),
          "first_id": part[0]["id"] if part else None, "last_id": part[-1]["id"] if part else None}


def make_app(service: Service, key: str = "") -> FastAPI:
  """The application.

  Args:
    service: what it talks to.
    key: that clients must send; "": none is asked for.
  """
  app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  app.add_middleware(Guard, key=key, limits=service.limits)
  add_errors(app)
  _add_files(app, service)
  _add_jobs(app, service)
  _add_answers(app, service)
  return app


async def _body(request: Request) -> Body:
  """The JSON object that was sent.

  Raises:
    Refusal: it is none.
  """
  try:
    body = json.loads(await request.body())
  except (ValueError, RecursionError) as error:
    raise Refusal(400, f"The body is no JSON ({str(error)[:100]}).") from None
  if not isinstance(body, dict):
    raise Refusal(400, "The body is no JSON object.")
  return body


def _add_files(app: FastAPI, service: Service) -> None:
  store, limits = service.store, service.limits

  def found(identifier: str) -> Record:
    if not is_id(identifier, "file") or identifier not in store.files:
      raise Refusal(404, "There is no such file.", param="file_id", code="not_found")
    return store.files[identifier]

  @app.post("/v1/files")
  async def create(request: Request) -> Any:
    async with request.form(max_files=1, max_fields=8) as form:
      file, purpose = form.get("file"), form.get("purpose")
      if not isinstance(file, UploadFile) and not hasattr(file, "read"):
        raise Refusal(400, "`file` is missing.", param="file")
      if purpose != "fine-tune":
        raise Refusal(400, "`purpose` must be fine-tune.", param="purpose")
      name = pathlib.PurePath((getattr(file, "filename", None) or "file").replace("\\", "/")).name[:200]
      with store.new_file(name, "fine-tune") as (path, record):
        size = 0
        with path.open("wb") as target:
          while chunk := await file.read(CHUNK):  # type: ignore[union-attr]
            size += len(chunk)
            if size > limits.max_upload:
              raise Refusal(413, f"The file is larger than {limits.max_upload} bytes.", code="request_too_large")
            target.write(chunk)
        # In another thread: a large file takes seconds, in which others are answered.
        rows = await asyncio.to_thread(read_conversations, path, name)
        if len(rows) > limits.max_rows:
          raise Refusal(400, f"{name}: has {len(rows)} rows; expected at most {limits.max_rows}.", param="file")
      return record

  @app.get("/v1/files")
  async def listing(after: str | None = None, limit: int = 10_000) -> Any:
    return _page(list(reversed(store.files.values())), after, limit)

  @app.get("/v1/files/{file_id}")
  async def retrieve(file_id: str) -> Any:
    return found(file_id)

  @app.get("/v1/files/{file_id}/content")
  async def content(file_id: str) -> Any:
    found(file_id)
    return FileResponse(store.content(file_id), media_type="application/jsonl")

  @app.delete("/v1/files/{file_id}")
  async def delete(file_id: str) -> Any:
    found(file_id)
    store.remove_file(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def _add_jobs(app: FastAPI, service: Service) -> None:
  store, trainer, limits, catalog = service.store, service.trainer, service.limits, service.catalog

  def found(identifier: str) -> str:
    if not is_id(identifier, "ftjob") or identifier not in store.jobs:
      raise Refusal(404, "There is no such job.", param="fine_tuning_job_id", code="not_found")
    return identifier

  @app.post("/v1/fine_tuning/jobs")
  async def create(request: Request) -> Any:
    model, file, hyper, seed, suffix, metadata = read_job(await _body(request))
    if model not in catalog.bases:
      raise Refusal(404, f"There is no model {model[:100]!r} to begin from.", param="model", code="model_not_found")
    if not is_id(file, "file") or file not in store.files:
      raise Refusal(400, "There is no such file.", param="training_file", code="not_found")
    budget = read_budget(hyper, limits)
    if sum(one["job"]["status"] in LEFT for one in list(store.jobs.values())) >= limits.max_waiting:
      raise Busy
    unit = 1.0 if limits.absolute_rates else limits.base_rate
    stated = "learning_rate" if limits.absolute_rates else "learning_rate_multiplier"
    settled = {"n_epochs": budget.epochs, "batch_size": budget.batch_size, stated: budget.learning_rate / unit}
    made = new_job(model, file, settled, seed, suffix, metadata)
    job = store.add_job(made, request.headers.get("idempotency-key", "")[:200])
    if job["id"] == made["id"]:
      trainer.submit(job["id"])
    return job

  @app.get("/v1/fine_tuning/jobs")
  async def listing(after: str | None = None, limit: int = 20) -> Any:
    with store.lock:
      jobs = [record["job"] for record in store.jobs.values()]
    return _page(sorted(jobs, key=lambda job: job["created_at"], reverse=True), after, limit)

  @app.get("/v1/fine_tuning/jobs/{job_id}")
  async def retrieve(job_id: str) -> Any:
    return store.job(found(job_id))

  @app.post("/v1/fine_tuning/jobs/{job_id}/cancel")
  async def cancel(job_id: str) -> Any:
    return trainer.cancel(found(job_id))

  @app.get("/v1/fine_tuning/jobs/{job_id}/events")
  async def events(job_id: str, after: str | None = None, limit: int = 20) -> Any:
    return _page(store.events(found(job_id)), after, limit)

  @app.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
  async def checkpoints(job_id: str, after: str | None = None, limit: int = 10) -> Any:
    job, rows = store.job(found(job_id)), []
    losses = {event["data"]["step"]: event["data"]["train_loss"] for event in store.events(job_id)
              if event["type"] == "metrics"}
    for step in reversed(await asyncio.to_thread(trainer.steps, job_id)):
      if tuned_name(job, step) in catalog:
        rows.append({"id": f"{job_id}-step-{step}", "object": "fine_tuning.job.checkpoint", "step_number": step,
                     "created_at": job["created_at"], "fine_tuning_job_id": job_id,
                     "fine_tuned_model_checkpoint": tuned_name(job, step),
                     "metrics": {"step": step, "train_loss": losses.get(step)}})
    return _page(rows, after, limit)


def _add_answers(app: FastAPI, service: Service) -> None:
  limits, catalog = service.limits, service.catalog
  about = lambda name, base: {"id": name, "object": "model", "created": BEGAN, "owned_by": base or "local"}

  @app.get("/v1/models")
  async def models() -> Any:
    return {"object": "list", "data": [about(name, base) for name, base in catalog.names()]}

  @app.get("/v1/models/{name:path}")
  async def model(name: str) -> Any:
    base = dict(catalog.names()).get(name)
    if base is None:
      raise Refusal(404, f"There is no model {name[:100]!r}.", param="model", code="model_not_found")
    return about(name, base)

  async def answer(request: Request, read: Callable[..., Any], write: Callable[..., Any]) -> Any:
    asks = read(await _body(request), limits.max_prompts)
    if asks[0].model not in catalog:
      raise Refusal(404, f"There is no model {asks[0].model[:100]!r}.", param="model", code="model_not_found")
    if not limits.logprobs and asks[0].top is not None:
      raise Refusal(400, "Log-probabilities are not told here.", param="logprobs", code="unsupported_value")
    waits: list[Awaitable[Any]] = [asyncio.wrap_future(one) for one in service.engine.submit(asks)]
    found = await asyncio.gather(*waits, return_exceptions=True)
    for one in found:
      if isinstance(one, BaseException):
        raise one
    return JSONResponse(write(asks, found))

  @app.post("/v1/completions")
  async def completions(request: Request) -> Any:
    return await answer(request, read_completion, completion_body)

  @app.post("/v1/chat/completions")
  async def chat(request: Request) -> Any:
    return await answer(request, read_chat, chat_body)
