"""lm-eval's own client of the interface, as it is."""

import json
import pathlib

import pytest

from relearn_jax.metrics.answer_files import score_file

from ..small import write_checkpoint, write_lines
from .served import served

ROWS = [("James Robert", [" John", " Michael", " David William"], 1), ("David", [" William", " Thomas Paul"], 0),
        ("Paul John James", [" Joseph", " Richard"], 1)]


@pytest.mark.slow
def test_local_completions(tmp_path: pathlib.Path) -> None:
  lm_eval = pytest.importorskip("lm_eval")
  from lm_eval.tasks import TaskManager
  model = write_checkpoint(tmp_path / "small")
  data = write_lines(tmp_path / "rows.jsonl", [{"q": q, "choices": c, "gold": g} for q, c, g in ROWS])
  (tmp_path / "tasks").mkdir()
  common = (f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
            "doc_to_text: \"{{q}}\"\ntarget_delimiter: \"\"\n")
  (tmp_path / "tasks" / "choose.yaml").write_text(
      "task: choose\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n" + common)
  (tmp_path / "tasks" / "say.yaml").write_text(
      "task: say\noutput_type: generate_until\ndoc_to_target: \"{{choices[gold]}}\"\n"
      "generation_kwargs:\n  until: [\" Paul\"]\n  max_gen_toks: 4\n  temperature: 0\n" + common)
  with served(model, tmp_path / "work") as (api, _):
    results = lm_eval.simple_evaluate(
        model="local-completions", tasks=["choose", "say"], log_samples=True, bootstrap_iters=0,
        model_args={"model": "small", "base_url": f"{api.base_url}completions", "tokenizer": str(model),
                    "add_bos_token": True, "num_concurrent": 1, "max_retries": 1, "max_length": 150},
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False))
    said = [api.completions.create(model="small", prompt=q, max_tokens=4, temperature=0, stop=[" Paul"]).choices[0].text
            for q, _, _ in ROWS]
  pairs = [{"id": f"{i}-{j}", "prompt": q, "answer": c} for i, (q, choices, _) in enumerate(ROWS)
           for j, c in enumerate(choices)]
  score_file(str(model), write_lines(tmp_path / "in.jsonl", pairs), tmp_path / "out.jsonl", batch_size=4)
  ours = {row["id"]: row["logprob_sum"] for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
  samples = sorted(results["samples"]["choose"], key=lambda one: one["doc_id"])
  for number, sample in enumerate(samples):
    got = [float(one[0][0]) if isinstance(one[0], (list, tuple)) else float(one[0]) for one in sample["resps"]]
    assert got == pytest.approx([ours[f"{number}-{j}"] for j in range(len(got))], abs=1e-4)
  right = [max(range(len(c)), key=lambda j, i=i: ours[f"{i}-{j}"]) == g for i, (_, c, g) in enumerate(ROWS)]
  assert results["results"]["choose"]["acc,none"] == pytest.approx(sum(right) / len(ROWS))
  generated = sorted(results["samples"]["say"], key=lambda one: one["doc_id"])
  assert [one["resps"][0][0] for one in generated] == said and any(said)
