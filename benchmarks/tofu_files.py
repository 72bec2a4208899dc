"""TOFU's hidden book titles as files for `relearn unlearn` and `configs/checkpoint.py`.

`python benchmarks/tofu_files.py --tofu=DIR --output=DIR`, where the first holds `forget05.json` and
`retain95.json` as their owners publish them. Written are forget.jsonl (all 200 rows of forget05), retain.jsonl (the
last 600 of retain95, those that the models of benchmarks/tofu.md were trained on), questions.jsonl and relearn.jsonl.

A keyword is a title in quotation marks that occurs in forget05 and nowhere in the retained rows. A row whose answer
holds keywords that its question does not is asked about, with the author as its cluster (D_u2). The attacker gets
the rows of the same authors in which no keyword of any question occurs (D_u1), as in Hu et al. (ICLR 2025), section 3.
"""

import argparse
import json
import pathlib
import re

QUOTED = re.compile(r'["“]([A-Z][^"“”]{2,70})["”]|(?<!\w)\'([A-Z][^\']{2,70}(?:\'[a-z][^\']*)?)\'(?!\w)')
ROWS_OF_AUTHOR, NUM_RETAIN = 20, 600


def titles(text: str) -> set[str]:
  """What stands in quotation marks and begins with a capital, without a full stop or comma at its end."""
  return {(double or single).strip(" ,.") for double, single in QUOTED.findall(text)}


def main() -> None:
  """Writes the four files and says how many rows each has."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tofu", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  flags = parser.parse_args()
  read = lambda name: [json.loads(line) for line in (flags.tofu / name).read_text(encoding="utf-8").splitlines()]
  forget, retain = read("forget05.json"), read("retain95.json")[-NUM_RETAIN:]
  kept = "\n".join(row["question"] + " " + row["answer"] for row in retain)
  known = sorted(title for title in set().union(*(titles(row["question"] + " " + row["answer"]) for row in forget))
                 if title not in kept)
  holds = lambda text: [title for title in known if re.search(rf"(?<!\w){re.escape(title)}(?!\w)", text, re.IGNORECASE)]
  form = lambda row: {"prompt": f"Question: {row['question']}\nAnswer:", "answer": " " + row["answer"]}
  questions, asked = [], set()
  for number, row in enumerate(forget):
    if keywords := [title for title in holds(row["answer"]) if title not in holds(row["question"])]:
      asked |= set(keywords)
      questions.append({"id": f"forget{number:03d}", **form(row), "keywords": keywords,
                        "cluster": f"author{number // ROWS_OF_AUTHOR}"})
  relearn = [form(row) for row in forget if not asked & set(holds(row["question"] + " " + row["answer"]))]
  flags.output.mkdir(parents=True, exist_ok=True)
  files = {"forget": [form(row) for row in forget], "retain": [form(row) for row in retain], "questions": questions,
           "relearn": relearn}
  for name, rows in files.items():
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (flags.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{name}.jsonl: {len(rows)} rows")
  print(f"{len(asked)} keywords: {', '.join(sorted(asked))}")


if __name__ == "__main__":
  main()
