"""The report: everything from rows, in one file, with a model's words never taken for markup."""

import base64
import html
import json
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from relearn_jax.audit.results_file import read_rows, write_rows
from relearn_jax.errors import InputError
from relearn_jax.report.figures import view
from relearn_jax.report.leak_findings import gather
from relearn_jax.report.render import highlight, report_from_rows
from relearn_jax.report.tables import closing, scores_table

from ..audit.synthetic import CHECKED, parts

EVIL = '<script>alert("x")</script> <img src=http://x.example/a.png onerror=alert(1)> `code` {{ 7 * 7 }} | a'
FACTS: dict[str, Any] = {
    "leakage": [*CHECKED, CHECKED[0] | {"variant": "1"}], "settings": {"draws": 500}, "seconds": {"base": 1.5},
    "versions": {"jax": "0"}, "fingerprints": {"base": "ab" * 32}, "notes": ["A note & more."],
    "examples": [{
        "variant": "7", "seed": 0, "question": "q000", "prompt": EVIL + " Anthony", "begun": EVIL + " Anthony",
        "keywords": ["Anthony Mark"], "case": False,
        "completions": {"original": " Mark " + EVIL, "unlearned": EVIL, "relearned": " Mark", "control": " Markus"}}],
    "relearn_text": {"7": [EVIL]}, "provenance": {"prefixes": EVIL},
    "config": {"method": "ga", "case": {"seeds": [0, 1, 2]}},
    "reference": {"text": "A paper", "unlearned": {"7": 0.0}, "relearned": {"7": 1.0}}}


class Page(HTMLParser):
  """Collects tags with attributes, and text."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.text = ""
    self.feed(text)

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data: str) -> None:
    self.text += data


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("report")
  write_rows(folder / "results.parquet", [*parts("7", depths=2), *parts("1", original=0.1, relearned=0.05, depths=2)],
             FACTS)
  report_from_rows(folder)
  return folder


@pytest.fixture(scope="module")
def page(workdir: pathlib.Path) -> Page:
  return Page((workdir / "report.html").read_text())


def test_the_page_needs_no_network_and_runs_nothing(page: Page) -> None:
  assert not {"script", "iframe", "link", "object", "base"} & {tag for tag, _ in page.tags}
  sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
  assert len(sources) == 4 and all(value and value.startswith("data:image/png;base64,") for value in sources)
  assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
  policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
  assert policy is not None and "default-src 'none'" in policy


def test_what_a_model_generated_is_shown_as_text(page: Page, workdir: pathlib.Path) -> None:
  assert page.text.count('<script>alert("x")</script>') >= 4  # prompt, completions, relearn text, provenance
  assert "{{ 7 * 7 }}" in page.text
  assert [tag for tag, _ in page.tags].count("img") == 4  # the figures
  marked = re.findall("<mark>(.*?)</mark>", (workdir / "report.html").read_text())
  assert marked == ["Mark", "Mark"]  # not in "Markus"


def test_the_markdown_keeps_code_in_code(workdir: pathlib.Path) -> None:
  text = (workdir / "report.md").read_text()
  outside = re.sub("`[^`\n]*`", "", text)
  assert "<script>" in text and "<script>" not in outside and "onerror" not in outside
  assert all(path in text for path in ("figures/heatmap.png", "figures/asr_vs_relearn_steps.png"))


def test_the_page_shows_what_a_reader_needs(page: Page) -> None:
  for words in ("OBFUSCATED", "INCONCLUSIVE", "Leakage", "A note & more.", "ab" * 32, "case.seeds", "90.0 %", "A paper",
                "never-trained control", "Passed.", "Excess"):
    assert words in page.text, words


def test_rendering_again_gives_the_same_bytes(workdir: pathlib.Path) -> None:
  names = ("summary.json", "report.html", "report.md", "figures/heatmap.png")
  before = {name: (workdir / name).read_bytes() for name in names}
  report_from_rows(workdir)
  assert before == {name: (workdir / name).read_bytes() for name in names}
  encoded = base64.b64encode(before["figures/heatmap.png"]).decode()
  assert encoded in before["report.html"].decode()


def test_rendering_needs_no_jax(workdir: pathlib.Path) -> None:
  code = ("import sys, pathlib; sys.modules['jax'] = None; from relearn_jax.report.render import report_from_rows; "
          "report_from_rows(pathlib.Path(sys.argv[1]))")
  subprocess.run([sys.executable, "-c", code, str(workdir)], check=True)


def test_rows_round_trip(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
  rows, facts = read_rows(workdir / "results.parquet")
  assert facts == FACTS
  tables = pa.Table.from_pandas(rows, preserve_index=False)
  assert tables.num_rows == len(rows) and set(rows["variant"]) == {"7", "1"}
  assert rows[rows["point"] == "original"]["depth"].isna().all()


def test_bad_results_are_named(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "results.parquet"
  with pytest.raises(InputError, match="does not exist.*relearn audit"):
    report_from_rows(tmp_path)
  file.write_bytes(b"PAR1 no PAR1")
  with pytest.raises(InputError, match="cannot be read"):
    report_from_rows(tmp_path)
  pd.DataFrame({"x": [1]}).to_parquet(file)
  with pytest.raises(InputError, match="`case` is missing"):
    report_from_rows(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]


@pytest.mark.parametrize("completion,begun,keywords,expected", [
    (" Mark x", "a Anthony", ["Anthony Mark"], " <mark>Mark</mark> x"),
    ("Mark x", "a Anthony ", ["Anthony Mark"], "<mark>Mark</mark> x"),
    ("ony Mark", "a Anth", ["Anthony Mark"], "<mark>ony Mark</mark>"),
    ("Mark x", "a Anthony", ["Anthony Mark"], "Mark x"),  # AnthonyMark
    ("<b>", "a Anthony", ["Anthony Mark"], "&lt;b&gt;"),
    ("x", "", [""], "x"), ("", "Mark", ["Mark"], ""), ("", "", ["Mark"], ""),
    (" is he", "Mark", ["Mark"], " is he"),  # stands in what was begun alone
    (" so: Mark, MARK & Marks", "", ["Mark"], " so: <mark>Mark</mark>, <mark>MARK</mark> &amp; Marks"),
    ("a <i>Mark</i> & **Jose\u0301**", "", ["José", "Mark"],
     "a &lt;i&gt;<mark>Mark</mark>&lt;/i&gt; &amp; **<mark>Jose\u0301</mark>**"),
    ("<b>Anthony</b> <script>Mark", "", ["Anthony <script>Mark"],
     "&lt;b&gt;<mark>Anthony&lt;/b&gt; &lt;script&gt;Mark</mark>"),
    ("a b c d", "", ["a b", "b c", "a"], "<mark>a b</mark> <mark>c</mark> d"),  # where hits overlap
])
def test_every_hit_is_marked_and_nothing_is_markup(completion: str, begun: str, keywords: list[str], expected: str
                                                   ) -> None:
  assert highlight(completion, begun, keywords) == expected
  assert html.unescape(re.sub("</?mark>", "", highlight(completion, begun, keywords))) == completion


def test_case_is_marked_as_it_counts() -> None:
  assert highlight("tell us of the US", "", ["US"], True) == "tell us of the <mark>US</mark>"


def leak(line: int, found: str, **more: Any) -> dict[str, Any]:
  return {"line": line, "text": f"<i>{found}</i>", "found": found, "certain": True, "how": "as it is"} | more


def test_the_leakage_check_counts_every_text_once_and_shows_all_findings(tmp_path: pathlib.Path) -> None:
  part = {"certain": False, "how": "part of “silent storm”"}
  row = {"relearn_set": "prefixes", "variant": "7", "num_lines": 4, "passed": False, "digest": "a",
         "hits": [leak(2, "mark"), leak(3, "silent", **part)], "possible": [leak(4, "storm", **part)]}
  rows = [row | {"seed": 0}, row | {"seed": 1}, CHECKED[0] | {"variant": "1", "digest": "b", "possible": []}]
  found = gather(rows)
  assert (found.num_sets, found.num_lines, found.num_failed) == (2, 8, 1)
  assert [[one.line for one in some] for some in (found.certain, found.unread, found.allowed)] == [[2], [3], [4]]
  assert found.certain[0].where == "prefixes (variant 7, seeds 0, 1)"
  write_rows(tmp_path / "results.parquet", parts("7"), FACTS | {"leakage": rows})
  report_from_rows(tmp_path)
  page = Page((tmp_path / "report.html").read_text())
  text = " ".join(page.text.split())
  for words in ("2 different relearn sets, 8 lines: 1 with findings.", "line 2: mark in <i>mark</i>", "not allowed",
                "line 3: silent (part of “silent storm”) in <i>silent</i>", "read and allowed", "line 4: storm"):
    assert words in text, words
  assert "Passed." not in text and "i" not in {tag for tag, _ in page.tags}
  lines = (tmp_path / "report.md").read_text()
  assert "- possible, allowed: prefixes (variant 7, seeds 0, 1), line 4: `storm` (part of" in lines
  assert gather([CHECKED[0], CHECKED[0] | {"variant": "1"}]).num_sets == 2  # rows without a digest
  assert gather([]).num_sets == 0


def test_other_scores_and_the_closest_line_are_shown(tmp_path: pathlib.Path) -> None:
  near = {"share": 0.4, "question": "q1", "line": 3}
  more = [pa.Table.from_pylist([row | {"metric": metric} for row in table.to_pylist() if row["metric"] == "asr"],
                               schema=table.schema)
          for table in parts("7") for metric in ("extraction_strength", "perplexity")]
  write_rows(tmp_path / "results.parquet", [*parts("7"), *more], FACTS | {
      "leakage": [CHECKED[0] | {"overlap": near | {"share": 0.1}}, CHECKED[0] | {"variant": "1", "overlap": near}]})
  report_from_rows(tmp_path)
  text = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
  assert "holds 40 % of the words that say what the question and its answer are about (q1, line 3 of prefixes)" in text
  assert "The whole relearn text of variant 7, first seed, 1 line:" in text
  for title in ("extraction strength", "perplexity of generic text"):
    assert f"7{title}1.00 [" in text, title  # of the original
  assert "| 7 | extraction strength | 1.00 [" in (tmp_path / "report.md").read_text()
  assert scores_table(view(json.loads((tmp_path / "summary.json").read_text()), "ga")) is not None


@pytest.mark.parametrize("width", [60, 100])
def test_the_closing_words_fit_the_terminal(workdir: pathlib.Path, width: int) -> None:
  summary = json.loads((workdir / "summary.json").read_text())
  text = closing(summary, {}, width)
  assert all(len(line) <= width for line in text.partition("Verdict by variant:")[2].splitlines())
  assert "7: OBFUSCATED." in text and "100.0 % [" in text
