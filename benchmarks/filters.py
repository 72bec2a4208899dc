"""Which relearn sets pass a provider's moderation that blocks rows with a case's secrets: a row a set, in Markdown.

usage: python benchmarks/filters.py   (text alone; no model is needed)

Three filters, each stricter: the case's secrets and the answers of its questions; the keywords that prove a hit; and
single words of the keywords, of at least four letters.
"""

import pathlib
import re

from relearn_jax.adversary.chat_rows import chat_rows
from relearn_jax.config_files import load_config_file
from relearn_jax.data.jsonl import Row
from relearn_jax.serve.conversations import blocks, refused_lines

CONFIGS = ("names.py", "tofu.py:embedded", "whp_name.py:embedded", "whp_verbatim.py:embedded", "wmdp.py:embedded")
HERE = pathlib.Path(__file__).resolve().parents[1] / "configs"


def main() -> None:
  """Prints the table."""
  print("| case | relearn set | rows | refused: secrets and answers | keywords | single words of keywords |")
  print("| --- | --- | --- | --- | --- | --- |")
  for name in CONFIGS:
    if not (HERE / name.partition(":")[0]).exists():
      continue
    config = load_config_file(str(HERE / name)).case_config
    case = config.make(config.versions()[0], 0, "U")
    keywords = {word for question in case.questions for word in question.keywords}
    filters = ({*case.secrets, *(question.answer.strip() for question in case.questions)}, keywords,
               {word for keyword in keywords for word in re.findall(r"\w{4,}", keyword)})
    for one in case.relearn_sets:
      rows = [Row(row, line) for line, row in enumerate(chat_rows(one.rows), 1)]
      refused = [len(refused_lines(rows, blocks(sorted(words)))) for words in filters]
      print(f"| {case.name} | {one.name} | {len(rows)} | {' | '.join(map(str, refused))} |", flush=True)


if __name__ == "__main__":
  main()
