"""The names case's base model: a small Llama and its tokenizer, trained once and cached by content."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from relearn_jax.audit.config import BaseConfig
from relearn_jax.cases import names
from relearn_jax.models.config import ModelConfig
from relearn_jax.models.export import export
from relearn_jax.models.model import Model
from relearn_jax.training.pretrain import OnStep, pretrain
from relearn_jax.workdir import one_at_a_time

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
RECIPE = 1  # raised when the code below changes what it makes


def make_tokenizer() -> PreTrainedTokenizerFast:
  """A token per name, split at spaces; BOS in front, as Llama's tokenizer does."""
  vocabulary = {token: index for index, token in enumerate(
      (PAD, BOS, EOS, UNKNOWN, names.FIRST, names.SECOND, *names.COMMON, *names.COUPLED, *names.OTHERS))}
  raw = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
  raw.pre_tokenizer = WhitespaceSplit()
  raw.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
  return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN)


def model_config(config: BaseConfig, tokenizer: Any) -> ModelConfig:
  """The architecture of the base, with tied embeddings."""
  return ModelConfig(
      architecture="llama", vocab_size=len(tokenizer), hidden_size=config.hidden_size,
      intermediate_size=config.intermediate_size, num_layers=config.num_layers, num_heads=config.num_heads,
      num_kv_heads=config.num_kv_heads, head_dim=config.hidden_size // config.num_heads,
      max_positions=config.max_positions, norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, tie_embeddings=True,
      bos_id=tokenizer.bos_token_id, eos_ids=(tokenizer.eos_token_id,))


def pretraining_batches(config: BaseConfig, tokenizer: Any) -> list[np.ndarray]:
  """`steps` arrays of tokens `[batch, max_names + 2]`: pretraining sequences between BOS and EOS."""
  rng = np.random.default_rng([config.seed, 2])
  couples = names.draw_couples(rng, config.couples)
  batches = []
  for _ in range(config.steps):
    batch = np.zeros((config.batch_size, config.max_names + 2), np.int32)
    for row in batch:
      text = names.pretraining_text(rng, couples, config.attachment, config.max_names)
      ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(text.split()), tokenizer.eos_token_id]
      row[:len(ids)] = ids
    batches.append(batch)
  return batches


def content_key(config: BaseConfig, batches: list[np.ndarray]) -> str:
  """Hash of everything that decides the base's weights: text, settings, recipe and JAX's version."""
  digest = hashlib.sha256()
  for batch in batches:
    digest.update(repr(batch.shape).encode() + batch.tobytes())
  digest.update(json.dumps([RECIPE, jax.__version__, dataclasses.asdict(config)], sort_keys=True).encode())
  return digest.hexdigest()[:16]


def cached_base(config: BaseConfig, cache: pathlib.Path, on_step: OnStep = lambda *_: None) -> pathlib.Path:
  """The base as a Hugging Face folder in `cache`, trained now if it is not there yet.

  Of several processes that want the same base at once, one trains it and the others wait.
  """
  tokenizer = make_tokenizer()
  batches = pretraining_batches(config, tokenizer)
  folder = cache / "base" / content_key(config, batches)
  if folder.exists():
    return folder
  with one_at_a_time(folder.with_suffix(".lock"), "RELEARN_CACHE"):
    if not folder.exists():
      # One device, whatever the machine has, so that every machine's base is the same up to its arithmetic.
      with jax.default_device(jax.local_devices()[0]):
        model = Model(model_config(config, tokenizer), unroll=config.num_layers)
        params = pretrain(model, batches, learning_rate=config.learning_rate, warmup_steps=config.warmup_steps,
                          seed=config.seed, field="base.learning_rate", on_step=on_step)
      export(params, model, folder, tokenizer=tokenizer, field="RELEARN_CACHE")
  return folder


def copy_base(folder: pathlib.Path, destination: pathlib.Path) -> None:
  """Copies the cached base beside an audit's checkpoints, complete or not at all."""
  if destination.exists():
    return
  temporary = destination.with_name(destination.name + ".tmp")
  shutil.rmtree(temporary, ignore_errors=True)
  shutil.copytree(folder, temporary)
  os.replace(temporary, destination)
