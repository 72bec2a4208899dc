"""What Together's client expects to talk to, on this machine: jobs that are over at once, and a model of words."""

import datetime
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

LIMITS = {"default_gradient_accumulation_steps": 1, "max_learning_rate": 0.1, "max_num_checkpoints": 10,
          "max_num_epochs": 20, "max_num_evals": 5, "max_seq_length_dpo": 100, "max_seq_length_sft": 100,
          "merge_output_lora": True, "min_learning_rate": 1e-8, "min_max_seq_length": 1, "model_name": "base",
          "supports_full_training": True, "supports_reasoning": False, "supports_tools": False,
          "supports_vision": False,
          "lora_training": {"default_rank": 8, "max_batch_size": 64, "max_batch_size_dpo": 8, "max_rank": 64,
                            "min_batch_size": 1, "target_modules": ["q_proj"]},
          "full_training": {"max_batch_size": 64, "max_batch_size_dpo": 8, "min_batch_size": 1}}
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).isoformat()


class Provider:
  """Its state.

  Attributes:
    files, jobs: by identifier; the bodies of what was asked for are in `jobs`.
    status: of every job.
    price: of every job.
  """

  def __init__(self) -> None:
    self.files, self.jobs = dict[str, bytes](), dict[str, dict[str, Any]]()
    self.status, self.price, self.cancelled = "completed", 2.5, list[str]()

  def about(self, job: str) -> dict[str, Any]:
    """A job as the client reads it."""
    body = self.jobs[job]
    return {"id": job, "object": "fine-tune", "status": "cancelled" if job in self.cancelled else self.status,
            "created_at": NOW, "updated_at": NOW, "model": body["model"], "training_file": body["training_file"],
            "suffix": body.get("suffix"), "token_count": 77, "n_epochs": body["n_epochs"],
            "model_output_name": f"me/{job}", "adapter_output_name": None}


def make_app(provider: Provider) -> FastAPI:
  """The routes that the client calls."""
  app = FastAPI()

  @app.post("/v1/files")
  async def ask_to_upload(request: Request) -> Any:
    name = f"file-{len(provider.files)}"
    return Response(status_code=302, headers={"Location": f"{request.base_url}put/{name}", "X-Together-File-Id": name})

  @app.put("/put/{name}")
  async def put(name: str, request: Request) -> Any:
    provider.files[name] = await request.body()
    return Response(status_code=200)

  @app.post("/v1/files/{name}/preprocess")
  async def preprocess(name: str) -> Any:
    return {"id": name, "object": "file", "bytes": len(provider.files[name]), "created_at": 0, "filename": "rows.jsonl",
            "FileType": "jsonl", "purpose": "fine-tune"}

  @app.get("/v1/fine-tunes/models/limits")
  async def limits() -> Any:
    return LIMITS

  @app.post("/v1/fine-tunes/estimate-price")
  async def estimate() -> Any:
    return {"estimation_available": True, "estimated_total_price": provider.price, "allowed_to_proceed": True}

  @app.post("/v1/fine-tunes")
  async def create(request: Request) -> Any:
    if provider.status == "payment":
      return JSONResponse({"error": {"message": "no credit is left"}}, 402)
    job = f"ft-{len(provider.jobs)}"
    provider.jobs[job] = await request.json()
    return provider.about(job)

  @app.get("/v1/fine-tunes")
  async def listing() -> Any:
    return {"data": [provider.about(job) for job in provider.jobs]}

  @app.get("/v1/fine-tunes/{job}")
  async def retrieve(job: str) -> Any:
    return provider.about(job)

  @app.post("/v1/fine-tunes/{job}/cancel")
  async def cancel(job: str) -> Any:
    provider.cancelled.append(job)
    return {"data": {}, **provider.about(job)}

  @app.get("/v1/fine-tunes/{job}/events")
  async def events(job: str) -> Any:
    kind, level = ("job_error", "error") if provider.status == "error" else ("training_complete", "info")
    return {"data": [{"object": "fine-tune-event", "created_at": NOW, "message": "a disk broke", "type": kind,
                      "level": level}]}

  @app.get("/v1/fine-tunes/{job}/checkpoints")
  async def checkpoints(job: str) -> Any:
    return {"data": [{"checkpoint_type": "Intermediate", "created_at": NOW, "path": "s3://x", "step": 4,
                      "object_name": f"me/{job}-4"},
                     {"checkpoint_type": "Final", "created_at": NOW, "path": "s3://x", "step": 8}]}

  @app.post("/v1/completions")
  async def completions(request: Request) -> Any:
    body = await request.json()
    tokens = re.findall(r" ?\w+|.", body["prompt"])
    logprobs = {"tokens": tokens, "token_logprobs": [None, *(-0.5 * i for i in range(1, len(tokens)))]}
    echoed = [{"text": body["prompt"], "logprobs": logprobs}] if body.get("echo") else []
    return {"id": "c", "created": 0, "model": body["model"], "object": "text.completion", "prompt": echoed,
            "choices": [{"text": f" {body['model']}!", "finish_reason": "length"}]}

  @app.post("/v1/chat/completions")
  async def chat(request: Request) -> Any:
    body = await request.json()
    said = body["messages"][-1]["content"].upper()
    return {"id": "c", "created": 0, "model": body["model"], "object": "chat.completion",
            "choices": [{"index": 0, "finish_reason": "stop", "text": "", "message": {"role": "assistant",
                                                                                    "content": said}}]}
  return app
