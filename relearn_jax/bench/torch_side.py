"""The other side of comparisons: what a user would run with transformers and torch. Imports torch only when asked to.

Models are read from the folder that `models.export` wrote, so that weights are the same; batches are the same arrays.
"""

import importlib.metadata
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors")
IGNORED = -100  # label of a token that does not count


def describe() -> dict[str, Any]:
  """Python, packages, threads and device of the other side."""
  import torch
  found: dict[str, str | None] = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
  return {"python": platform.python_version(), "packages": found, "device": where, "threads": torch.get_num_threads()}


def device() -> Any:
  """Where torch computes."""
  import torch
  return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(folder: pathlib.Path, dtype: str = "float32") -> Any:
  """A checkpoint as transformers has it, with its default attention."""
  import torch
  from transformers import AutoModelForCausalLM
  from transformers.utils import logging
  logging.disable_progress_bar()
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
  return model.to(device())


def wait() -> None:
  """Waits for what was started on an accelerator."""
  import torch
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def make_adamw(model: Any, learning_rate: float) -> Any:
  """AdamW as the package has it, on what is trained."""
  import torch
  trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
  return torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def batch(tokens: np.ndarray, mask: np.ndarray) -> tuple[Any, Any]:
  """Token ids, and labels of those that count."""
  import torch
  ids = torch.tensor(np.asarray(tokens), dtype=torch.long, device=device())
  return ids, torch.where(torch.tensor(np.asarray(mask) > 0, device=device()), ids, IGNORED)


def step(model: Any, adamw: Any, ids: Any, labels: Any, sign: float = 1.0, dtype: str = "float32") -> Any:
  """One step of AdamW on the mean loss of the tokens that count, which is returned; `sign` -1 ascends.

  Masters are fp32; with another `dtype` products are made in it, by autocast.
  """
  import torch
  adamw.zero_grad(set_to_none=True)
  with torch.autocast(device().type, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
    loss = sign * model(input_ids=ids, labels=labels, use_cache=False).loss
  loss.backward()
  adamw.step()
  return loss.detach()


def trainers(folder: pathlib.Path, tokens: np.ndarray, mask: np.ndarray, learning_rate: float, dtype: str, *,
             lora: Any = None, compiled: bool = False) -> Callable[[], float]:
  """A call that takes a step of each of several models, one after the other, and returns the first one's loss.

  Args:
    folder: the checkpoint that all begin as.
    tokens, mask: `[runs, rows, T]`.
    learning_rate: of AdamW.
    dtype: of products.
    lora: rank, alpha of an adapter on all linear layers, by peft; None: all parameters are trained.
    compiled: by torch.compile.
  """
  import torch
  held = []
  for run_tokens, run_mask in zip(tokens, mask, strict=True):
    model = load(folder)
    if lora is not None:
      import peft
      rank, alpha = lora
      model = peft.get_peft_model(model, peft.LoraConfig(
          r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    held.append((torch.compile(model) if compiled else model, make_adamw(model, learning_rate),
                 *batch(run_tokens, run_mask)))

  def call() -> float:
    losses = [step(*one, dtype=dtype) for one in held]
    wait()
    return float(losses[0])
  return call


def generate(model: Any, prompts: Sequence[Sequence[int]] | np.ndarray, new_tokens: int, *, ends: bool = False
             ) -> np.ndarray:
  """New tokens `[rows, new_tokens]` by transformers' greedy generate, prompts padded on the left.

  Args:
    model: of transformers.
    prompts: token ids.
    new_tokens: after each prompt.
    ends: whether an EOS ends a row (0 after it); otherwise every row goes on.
  """
  import torch
  longest = max(map(len, prompts))
  ids, there = np.zeros((len(prompts), longest), np.int64), np.zeros((len(prompts), longest), np.int64)
  for row, prompt in enumerate(prompts):
    ids[row, longest - len(prompt):], there[row, longest - len(prompt):] = prompt, 1
  how: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": 0,
                         **({} if ends else {"min_new_tokens": new_tokens, "eos_token_id": None})}
  with torch.no_grad():
    out = model.generate(input_ids=torch.tensor(ids, device=device()),
                         attention_mask=torch.tensor(there, device=device()), **how)
  wait()
  found = np.zeros((len(prompts), new_tokens), np.int64)
  new = out[:, longest:].cpu().numpy()
  found[:, :new.shape[1]] = new
  return found
