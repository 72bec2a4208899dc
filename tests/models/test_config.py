"""Configurations: what is read, and what is refused in which words."""

import json

import pytest

from relearn_jax.models.architectures import parse_config
from relearn_jax.models.config import RopeScaling
from relearn_jax.models.export import to_hf_config

from .tiny import CONFIG, refuses

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ABSENT = object()
PATH = "somewhere/config.json"


def test_reads_every_field() -> None:
  config = parse_config(CONFIG, PATH)
  assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers) == (12, 8, 10, 2)
  assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_positions) == (2, 1, 4, 32)
  assert (config.norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 10000.0, None)
  assert (config.tie_embeddings, config.bos_id, config.eos_ids) == (False, 1, (2,))


def test_defaults_are_those_of_transformers() -> None:
  needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
  config = parse_config({name: CONFIG[name] for name in needed}, PATH)
  assert (config.num_kv_heads, config.head_dim, config.max_positions) == (2, 4, 2048)
  assert (config.norm_eps, config.rope_theta, config.tie_embeddings) == (1e-6, 10000.0, False)
  assert (config.bos_id, config.eos_ids) == (None, ())


@pytest.mark.parametrize("fields", [
    {"rope_parameters": LLAMA3},
    {"rope_theta": 500000, "rope_scaling": {name: v for name, v in LLAMA3.items() if name != "rope_theta"}}])
def test_rope_scaling_in_the_new_and_the_old_form(fields: dict) -> None:
  config = parse_config({name: v for name, v in CONFIG.items() if name != "rope_theta"} | fields, PATH)
  assert config.rope_theta == 500000.0
  assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("fields", [{}, {"rope_parameters": LLAMA3}, {"eos_token_id": [2, 3]}, {"eos_token_id": None},
                                    {"tie_word_embeddings": True, "head_dim": 6}])
def test_what_is_exported_is_read_back(fields: dict) -> None:
  config = parse_config(CONFIG | fields, PATH)
  assert parse_config(json.loads(json.dumps(to_hf_config(config))), PATH) == config


def with_rope(**fields: object) -> dict:
  return {"rope_parameters": LLAMA3 | fields}


@pytest.mark.parametrize(("fields", "field", "problem", "mend"), [
    ({"model_type": "gpt2"}, "model_type", "is 'gpt2', which is not supported", "use a checkpoint of one of: llama"),
    ({"model_type": ABSENT}, "model_type", "is missing", "state the model's model_type"),
    ({"hidden_size": ABSENT}, "hidden_size", "is missing", "state the model's hidden_size"),
    ({"hidden_size": ABSENT, "hiden_size": 8}, "hidden_size", "is missing (there is `hiden_size`)", "state"),
    ({"hidden_size": None}, "hidden_size", "is null", "state the model's hidden_size"),
    ({"hidden_size": "8"}, "hidden_size", "is '8'", "expected int"),
    ({"hidden_size": 8.0}, "hidden_size", "is 8.0", "expected int"),
    ({"num_hidden_layers": True}, "num_hidden_layers", "is True", "expected int"),
    ({"vocab_size": 0}, "vocab_size", "is 0", "expected a positive number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "is nan", "expected a positive number"),
    ({"rms_norm_eps": [1]}, "rms_norm_eps", "is [1]", "expected float"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "is 'yes'", "expected bool"),
    ({"eos_token_id": "</s>"}, "eos_token_id", "is '</s>'", "expected a token id"),
    ({"eos_token_id": [2, 3.5]}, "eos_token_id", "is [2, 3.5]", "expected a token id"),
    ({"bos_token_id": "<s>"}, "bos_token_id", "is '<s>'", "expected int"),
    ({"hidden_act": "gelu"}, "hidden_act", "is 'gelu', which is not supported", "expected 'silu'"),
    ({"attention_bias": True}, "attention_bias", "is True, which is not supported", "expected False"),
    ({"mlp_bias": True}, "mlp_bias", "is True, which is not supported", "expected False"),
    ({"quantization_config": {"bits": 4}}, "quantization_config", "quantized weights", "use the checkpoint in"),
    ({"num_key_value_heads": 3}, "num_key_value_heads", "is 3", "expected a divisor of num_attention_heads=2"),
    ({"head_dim": 5}, "head_dim", "is 5", "expected an even number"),
    ({"head_dim": None, "hidden_size": 9}, "hidden_size", "is 9", "expected a multiple of num_attention_heads=2"),
    ({"rope_parameters": [1]}, "rope_parameters", "is [1]", "expected an object or null"),
    (with_rope(rope_type="yarn"), "rope_parameters.rope_type", "is 'yarn', which is not supported", "'llama3'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type", "is 'linear'", "'llama3'"),
    (with_rope(factor=None), "rope_parameters.factor", "is null", "state the model's factor"),
    (with_rope(factor="8"), "rope_parameters.factor", "is '8'", "expected float"),
    (with_rope(low_freq_factor=4.0), "rope_parameters.low_freq_factor", "is 4.0", "less than high_freq_factor=4.0"),
    (with_rope(partial_rotary_factor=0.5), "rope_parameters.partial_rotary_factor", "is 0.5", "expected 1.0"),
])
def test_refuses(fields: dict, field: str, problem: str, mend: str) -> None:
  with refuses(problem, file=PATH, field=field, mend=mend):
    parse_config({name: value for name, value in (CONFIG | fields).items() if value is not ABSENT}, PATH)


PHI = {name: value for name, value in CONFIG.items() if name not in ("rms_norm_eps", "num_key_value_heads", "head_dim")}
PHI |= {"model_type": "phi", "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}


@pytest.mark.parametrize(("fields", "window"), [
    ({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 7}, 7)])
def test_mistral_windows(fields: dict, window: int | None) -> None:
  config = parse_config(CONFIG | {"model_type": "mistral"} | fields, PATH)
  assert (config.architecture, config.sliding_window) == ("mistral", window)
  assert parse_config(to_hf_config(config), PATH) == config


@pytest.mark.parametrize(("fields", "turned"), [
    ({}, 2), ({"partial_rotary_factor": 0.5}, 2), ({"partial_rotary_factor": 1.0}, None),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5}}, 2)])
def test_phi_turns_a_part_of_a_head(fields: dict, turned: int | None) -> None:
  config = parse_config(PHI | fields, PATH)
  assert (config.architecture, config.rotary_dim, config.norm_eps, config.num_kv_heads) == ("phi", turned, 1e-5, 2)
  written = to_hf_config(config)
  assert written["architectures"] == ["PhiForCausalLM"] and written["layer_norm_eps"] == 1e-5
  assert parse_config(written, PATH) == config


def test_qwen2_is_read_back() -> None:
  config = parse_config(CONFIG | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}, PATH)
  assert config.architecture == "qwen2" and config.sliding_window is None
  assert parse_config(to_hf_config(config), PATH) == config


@pytest.mark.parametrize(("values", "field", "problem"), [
    (CONFIG | {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window", "is True, which is not"),
    (CONFIG | {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types",
     "has full_attention, sliding_attention, of which only full attention is supported"),
    (CONFIG | {"model_type": "mistral"} | with_rope(), "rope_parameters.rope_type", "is 'llama3', which is not"),
    (CONFIG | {"model_type": "mistral", "sliding_window": 0}, "sliding_window", "is 0"),
    (PHI | {"qk_layernorm": True}, "qk_layernorm", "is True, which is not supported"),
    (PHI | {"partial_rotary_factor": 1.5}, "rope_scaling.partial_rotary_factor", "is 1.5, which is not supported"),
    *((CONFIG | {"model_type": kind} | with_rope(rope_type=rope), "rope_parameters.rope_type", f"is '{rope}', which")
      for kind in ("llama", "mistral", "qwen2") for rope in ("yarn", "dynamic", "linear", "longrope"))])
def test_what_the_families_do_not_compute_is_refused(values: dict, field: str, problem: str) -> None:
  with refuses(problem, file=PATH, field=field, mend=""):
    parse_config(values, PATH)
