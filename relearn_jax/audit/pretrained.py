"""A small Llama that a case is built on: its tokenizer and weights, pretrained once and cached by content."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from relearn_jax.audit.audit_config import PretrainSettings
from relearn_jax.cases.base import CaseConfig
from relearn_jax.errors import InputError
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.export import export
from relearn_jax.models.model import Model
from relearn_jax.parallel.processes import folder_atomically
from relearn_jax.training.pretrain import OnStep, pretrain
from relearn_jax.workdir import one_at_a_time

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
RECIPE = 2  # raised when the code below changes what it makes


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
  """A token per word, split at spaces; BOS in front, as Llama's tokenizer does."""
  vocabulary = {token: index for index, token in enumerate((PAD, BOS, EOS, UNKNOWN, *words))}
  raw = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
  raw.pre_tokenizer = WhitespaceSplit()
  raw.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
  return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN)


def model_config(settings: PretrainSettings, tokenizer: Any) -> ModelConfig:
  """The architecture, with tied embeddings."""
  return ModelConfig(
      architecture="llama", vocab_size=len(tokenizer), hidden_size=settings.hidden_size,
      intermediate_size=settings.intermediate_size, num_layers=settings.num_layers, num_heads=settings.num_heads,
      num_kv_heads=settings.num_kv_heads, head_dim=settings.hidden_size // settings.num_heads,
      max_positions=settings.max_positions, norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, tie_embeddings=True,
      bos_id=tokenizer.bos_token_id, eos_ids=(tokenizer.eos_token_id,))


def pretraining_batches(settings: PretrainSettings, case: CaseConfig, tokenizer: Any) -> list[np.ndarray]:
  """`steps` arrays of tokens `[batch, longest]`: the case's texts between BOS and EOS.

  Raises:
    InputError: a text is longer than the model's positions.
  """
  size = settings.batch_size
  texts = itertools.islice(case.pretraining_texts(settings.seed), settings.steps * size)
  rows = [[tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(text.split()), tokenizer.eos_token_id]
          for text in texts]
  longest = max(map(len, rows))
  if longest > settings.max_positions:
    raise InputError(f"is {settings.max_positions}, and a pretraining text has {longest} tokens",
                     field="arms.pretrain.max_positions", mend=f"expected at least {longest}")
  tokens = np.zeros((settings.steps, size, longest), np.int32)
  for place, ids in enumerate(rows):
    tokens[place // size, place % size, :len(ids)] = ids
  return list(tokens)


def content_key(settings: PretrainSettings, batches: list[np.ndarray]) -> str:
  """Hash of everything that decides the weights: text, settings, recipe and JAX's version."""
  digest = hashlib.sha256()
  for batch in batches:
    digest.update(repr(batch.shape).encode() + batch.tobytes())
  digest.update(json.dumps([RECIPE, jax.__version__, dataclasses.asdict(settings)], sort_keys=True).encode())
  return digest.hexdigest()[:16]


def cached_base(settings: PretrainSettings, case: CaseConfig, cache: pathlib.Path, on_step: OnStep = lambda *_: None
                ) -> pathlib.Path:
  """The model as a Hugging Face folder in `cache`, trained now if it is not there yet.

  Of several processes that want the same one at once, one trains it and the others wait.
  """
  tokenizer = word_tokenizer(case.vocabulary())
  batches = pretraining_batches(settings, case, tokenizer)
  folder = cache / "base" / content_key(settings, batches)
  if folder.exists():
    return folder
  with one_at_a_time(folder.with_suffix(".lock"), "RELEARN_CACHE"):
    if not folder.exists():
      # One device, whatever the machine has, so that every machine's base is the same up to its arithmetic.
      with jax.default_device(jax.local_devices()[0]):
        model = Model(model_config(settings, tokenizer), unroll=settings.num_layers)
        params = pretrain(model, batches, learning_rate=settings.learning_rate, warmup_steps=settings.warmup_steps,
                          seed=settings.seed, field="arms.pretrain.learning_rate", on_step=on_step)
      export(params, model, folder, tokenizer=tokenizer, field="RELEARN_CACHE")
  return folder


def copy_base(folder: pathlib.Path, destination: pathlib.Path) -> None:
  """Copies the cached model beside an audit's checkpoints, complete or not at all."""
  if destination.exists():
    return
  with folder_atomically(destination) as temporary:
    shutil.copytree(folder, temporary, dirs_exist_ok=True)
