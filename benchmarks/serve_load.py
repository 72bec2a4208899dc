"""Tokens per second of `relearn serve` at 1, 8, 64 and 200 clients, beside `relearn generate` on the same prompts.

usage: python benchmarks/serve_load.py MODEL FOLDER   (a checkpoint's folder, and one for what is written)
"""

import concurrent.futures
import json
import pathlib
import sys
import time

import openai

from relearn_jax.generation.prompt_files import generate_file
from relearn_jax.parallel.start import start
from relearn_jax.serve.http_server import beside
from relearn_jax.serve.limits import Limits

CLIENTS, NEW, EACH = (1, 8, 64, 200), 64, 2
WORDS = "Who wrote the book and where was the author born what is the title".split()


def prompt(number: int) -> str:
  """A question of 6 to 12 words."""
  return " ".join(WORDS[(number * 5 + i) % len(WORDS)] for i in range(6 + number % 7))


def main(model: str, folder: pathlib.Path) -> None:
  """Prints a table in Markdown."""
  start()
  folder.mkdir(parents=True, exist_ok=True)
  print("| clients | requests | new tokens | seconds | tokens/s | largest batch |")
  print("| --- | --- | --- | --- | --- | --- |")
  with beside({"model": model}, folder / "work", Limits(max_waiting=1024)) as (url, service):
    api = openai.OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)

    def ask(number: int) -> int:
      found = api.completions.create(model="model", prompt=prompt(number), max_tokens=NEW, temperature=0)
      assert found.usage
      return found.usage.completion_tokens
    for clients in CLIENTS:
      numbers = range(clients * EACH if clients > 1 else 8)
      with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for _ in range(2):  # the first time programs are compiled
          service.engine.batches, begin = [], time.perf_counter()
          tokens = sum(pool.map(ask, numbers))
          seconds = time.perf_counter() - begin
      print(f"| {clients} | {len(numbers)} | {tokens} | {seconds:.2f} | {tokens / seconds:.0f} | "
            f"{max(service.engine.batches)} |", flush=True)
  rows = [{"id": i, "prompt": prompt(i)} for i in range(64)]
  (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for _ in range(2):
    begin = time.perf_counter()
    generate_file(model, folder / "prompts.jsonl", folder / "out.jsonl", max_new_tokens=NEW, batch_size=64)
    seconds = time.perf_counter() - begin
  tokens = sum(len(json.loads(line)["token_ids"]) for line in (folder / "out.jsonl").read_text().splitlines())
  print(f"| `relearn generate`, with loading | 64 | {tokens} | {seconds:.2f} | {tokens / seconds:.0f} | 64 |")


if __name__ == "__main__":
  main(sys.argv[1], pathlib.Path(sys.argv[2]))
