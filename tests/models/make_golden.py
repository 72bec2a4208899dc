"""Writes the golden checkpoints and outputs that test_parity.py compares with.

Needs torch and transformers (`pip install -e '.[parity]'`); run from the repository root:

  python tests/models/make_golden.py

Each case becomes a folder `golden/<case>` as transformers saves it, with `golden.npz` beside the
weights: `tokens [3, 72]` (right-padded with 0), `lengths [3]`, `logits [3, 72, vocab]` and
`logprobs [3, 71]` in fp32 (those past a row's length are not to be compared), `prompt_lengths [3]` and
`greedy [3, 64]`; and `gradients.npz`, the gradients of the mean cross-entropy, by tensor name. Weights
are drawn at a scale at which greedy decoding neither repeats one token nor meets a near-tie, so that
identical tokens are a fair thing to ask, and at which rounding is not amplified to the tolerance: with
matrices of 2 / sqrt(in) and embeddings of 0.5, transformers in fp32 was 6e-5 from itself in fp64, too
near to 1e-4 to tell a right implementation from a wrong one.
"""

import argparse
import pathlib
import shutil
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PhiConfig, Qwen2Config

VOCAB, ROWS, LENGTH, NEW_TOKENS = 96, 3, 72, 64
MARGIN, DISTINCT = 3e-3, 16
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KINDS = {"mistral": MistralConfig, "phi": PhiConfig, "qwen2": Qwen2Config}  # Llama where the name says no other
# Fields of the configuration, dtype of the stored weights, size of a shard.
CASES: dict[str, tuple[dict[str, Any], torch.dtype, str]] = {
    "multi_head_tied": ({"tie_word_embeddings": True}, torch.float32, "1GB"),
    "grouped_query_untied": ({"num_key_value_heads": 2, "num_hidden_layers": 3, "eos_token_id": [2, 3],
                              "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
                             torch.bfloat16, "60KB"),
    # 32 original positions and heads of 16: one frequency is kept, one interpolated, the rest divided.
    "llama3_rope": ({"hidden_size": 64, "num_key_value_heads": 2,
                     "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                         "original_max_position_embeddings": 32}}, torch.float16, "1GB"),
    "wide_heads": ({"hidden_size": 32, "head_dim": 24, "num_key_value_heads": 1, "num_hidden_layers": 3},
                   torch.float32, "1GB"),
    # A window shorter than the rows and than the prompts, so that it matters in prefill and in decoding.
    "mistral_window": ({"num_key_value_heads": 2, "sliding_window": 20, "head_dim": 12}, torch.bfloat16, "1GB"),
    "phi_partial": ({"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}, torch.float32, "1GB"),
    "qwen2_bias": ({"num_key_value_heads": 2, "tie_word_embeddings": True}, torch.float16, "1GB"),
}


def draw(config: Any, dtype: torch.dtype, seed: int) -> Any:
  """A model whose fp32 weights are exactly representable in `dtype`."""
  model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      noise = torch.randn(weight.shape, generator=generator)
      if name.endswith(".bias"):
        value = 0.2 * noise
      elif weight.ndim == 1:
        value = 1 + 0.1 * noise
      elif "embed_tokens" in name or "lm_head" in name:
        value = 0.25 * noise
      else:
        value = 1.5 * noise / weight.shape[1] ** 0.5
      weight.copy_(value.to(dtype).float())
  return model


@torch.no_grad()
def greedy(model: Any, prompt: torch.Tensor) -> tuple[np.ndarray, float]:
  """64 tokens by transformers' generate, and the smallest margin between first and second choice."""
  model.generation_config.eos_token_id = None
  tokens = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False,
                          max_new_tokens=NEW_TOKENS, pad_token_id=0)
  top = model(tokens).logits[0, len(prompt) - 1:-1].topk(2).values
  return tokens[0, len(prompt):].numpy(), float((top[:, 0] - top[:, 1]).min())


def gradients(model: Any, tokens: torch.Tensor, lengths: torch.Tensor) -> dict[str, np.ndarray]:
  """Of the mean cross-entropy over the real tokens, by tensor name; a tied head's is the embedding's."""
  model.zero_grad()
  logprobs = model(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
  real = torch.arange(1, tokens.shape[1]) < lengths[:, None]
  (-logprobs[real].mean()).backward()
  return {name: weight.grad.numpy().copy() for name, weight in model.named_parameters()}


def make(case: str, folder: pathlib.Path) -> None:
  """Writes one case; tries seeds until decoding is neither degenerate nor near a tie."""
  fields, dtype, shard = CASES[case]
  for seed in range(200):
    kind = KINDS.get(case.split("_")[0], LlamaConfig)
    known = {name: value for name, value in COMMON.items() if hasattr(kind(), name)}  # the rest would be kept unread
    model = draw(kind(**known | fields), dtype, seed)
    rng = np.random.default_rng(seed)
    lengths, prompt_lengths = np.array([LENGTH, 41, 9]), np.array([48, 17, 1])
    tokens = rng.integers(4, VOCAB, (ROWS, LENGTH))
    tokens[np.arange(LENGTH) >= lengths[:, None]] = 0
    answers = [greedy(model, torch.from_numpy(row[:n])) for row, n in zip(tokens, prompt_lengths, strict=True)]
    if min(margin for _, margin in answers) > MARGIN and min(len(set(a)) for a, _ in answers) >= DISTINCT:
      break
  else:
    raise RuntimeError(f"{case}: no seed gives clear and varied greedy tokens")
  with torch.no_grad():
    logits = model(torch.from_numpy(tokens)).logits
    logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, torch.from_numpy(tokens)[:, 1:, None])[..., 0]
  loss_gradients = gradients(model, torch.from_numpy(tokens), torch.from_numpy(lengths))
  shutil.rmtree(folder, ignore_errors=True)
  model.generation_config.eos_token_id = model.config.eos_token_id
  model.to(dtype).save_pretrained(folder, max_shard_size=shard)
  np.savez_compressed(folder / "golden.npz", tokens=tokens.astype(np.int32), lengths=lengths.astype(np.int32),
                      prompt_lengths=prompt_lengths.astype(np.int32), logits=logits.numpy(), logprobs=logprobs.numpy(),
                      greedy=np.stack([a for a, _ in answers]).astype(np.int32))
  np.savez_compressed(folder / "gradients.npz", **loss_gradients)
  for file in folder.glob("*.safetensors"):
    file.chmod(0o644)  # safetensors leaves them readable by their owner alone
  print(f"{case}: seed {seed}, margin {min(m for _, m in answers):.4f}, distinct {[len(set(a)) for a, _ in answers]}, "
        f"logits within {logits.abs().max():.1f}")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "golden")
  parser.add_argument("cases", nargs="*", default=list(CASES))
  arguments = parser.parse_args()
  torch.set_num_threads(1)
  for one in arguments.cases:
    make(one, arguments.output / one)
