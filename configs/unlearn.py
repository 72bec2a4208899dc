"""Unlearning one checkpoint.

`relearn unlearn --config=configs/unlearn.py --config.model=DIR --config.method=npo --config.forget=forget.jsonl
--config.retain=retain.jsonl --workdir=runs/unlearned` trains and writes `runs/unlearned/model`, a folder that
transformers loads. Rows may come from the hub, as `hf:locuslab/TOFU:forget05` with
`--config.columns="{'prompt': 'Question: {question}\\nAnswer:', 'answer': ' {answer}'}"`.
`--config.method=help` lists methods and defences; `--help` with this file lists the fields.

Where the numbers come from: learning rate 1e-5 and batches of 32 are those of TOFU's published runs (Maini et
al., 2024); those of each method and defence are given with it in relearn_jax/objectives/methods.py.
"""

from relearn_jax.training.job import UnlearnJob


def get_config() -> UnlearnJob:
  """The default job; model and files have to be given."""
  return UnlearnJob()
