"""The results of a benchmark as Markdown, made to be read as it stands."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table with columns of even width; all but the first are set to the right."""
  widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
  cells = lambda row: [cell.ljust(w) if place == 0 else cell.rjust(w)
                       for place, (cell, w) in enumerate(zip(row, widths, strict=True))]
  rule = ["-" * w if place == 0 else "-" * (w - 1) + ":" for place, w in enumerate(widths)]
  return "\n".join("| " + " | ".join(line) + " |" for line in (cells(head), rule, *map(cells, rows)))


def number(value: float | None, unit: float = 1.0) -> str:
  """Three digits; – for nothing.

  >>> number(1234.5), number(0.01234), number(None)
  ('1,230', '0.0123', '–')
  """
  if value is None:
    return "–"
  text = f"{value / unit:.3g}"
  return f"{float(text):,.0f}" if "e" in text or abs(value / unit) >= 1000 else text


def spread(value: Row | None, unit: float = 1.0) -> str:
  """Median, and in brackets the range."""
  if value is None:
    return "–"
  return f"{number(value['median'], unit)} [{number(value['low'], unit)}, {number(value['high'], unit)}]"


def percent(value: float | None) -> str:
  """With a decimal below 10 %."""
  return "–" if value is None else f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def _train(rows: Sequence[Row]) -> str:
  return table(
      ["step", "ms", "real tokens/s", "padded tokens/s", "MFU", "MFU, real", "trace, s", "compile, s", "cached, s"],
      [[row["name"], spread(row["step_seconds"], 1e-3), number(row["real_tokens_per_second"]["median"]),
        number(row["padded_tokens_per_second"]["median"]), percent(row["mfu"]["median"]), percent(row["mfu_real"]),
        number(row["trace_seconds"]), number(row["compile_seconds_cold"]), _cached(row)] for row in rows])


def _cached(row: Row) -> str:
  return number(row["compile_seconds_cached"]) if row["cache_hit"] else "not cached"


def _memory(rows: Sequence[Row]) -> str:
  made = [[row["name"], *(number(row["memory"][key], 1e6) for key in ("plan", "compiler", "peak")),
           number(row["memory"]["plan_over_compiler"]), number(row["memory"]["plan_over_peak"])] for row in rows]
  sources = dict.fromkeys(row["memory"]["source"] for row in rows)
  return (table(["memory of a device, MB", "plan", "compiler", "peak", "plan / compiler", "plan / peak"], made)
          + f"\n\nMB of 10^6 bytes; peak: {'; '.join(sources)}; –: nothing tells, or an earlier part had used more.")


def _decode(rows: Sequence[Row]) -> str:
  return table(
      ["decoding", "ms a step", "tokens/s", "of bandwidth", "prompt tokens/s", "trace, s", "compile, s", "cached, s"],
      [[row["name"], spread(row["decode_seconds"], 1e-3), spread(row["tokens_per_second"]),
        percent(row["bandwidth_share"]["median"]), number(row["prompt_tokens_per_second"]["median"]),
        number(row["trace_seconds"]), number(row["compile_seconds_cold"]), _cached(row)] for row in rows])


def _load(rows: Sequence[Row]) -> str:
  return table(
      ["loading", "files", "on disk, MB", "GiB/s, disk", "GiB/s, page cache", "loaded, MB", "host beside it, MB"],
      [[row["name"], str(row["files"]), number(row["bytes"], 1e6), spread(row["gib_per_second_disk"]),
        spread(row["gib_per_second_page_cache"]), number(row["memory"]["loaded"], 1e6),
        number(row["memory"]["beside"], 1e6)] for row in rows])


def _attention(rows: Sequence[Row]) -> str:
  return table(
      ["attention", "tokens a row", "rows", "forward, ms", "with backward, ms", "of matmul rate", "with backward",
       "with backward, ours = 1"],
      [[row["name"] + (f" ({row['form']})" if "form" in row else ""), str(row["length"]), str(row["rows"]),
        *((row["failed"], "–", "–", "–", "–") if "failed" in row else (
            spread(row["forward_seconds"], 1e-3), spread(row["with_backward_seconds"], 1e-3),
            percent(row["forward_share"]), percent(row["with_backward_share"]),
            spread(row["with_backward_of_ours"]) if "with_backward_of_ours" in row else "–"))] for row in rows])


def _grid(rows: Sequence[Row]) -> str:
  return table(
      ["grid", "mesh", "cells", "seconds", "cells an hour", "attack alone, cells an hour"],
      [[row["name"], _mesh(row["mesh"]), str(row["cells"]), spread(row["seconds"]), spread(row["cells_per_hour"]),
        spread(row["attack_cells_per_hour"])] for row in rows])


def _mesh(mesh: Row) -> str:
  return ",".join(f"{axis}:{size}" for axis, size in mesh.items()) or "1 device"


def _compare(rows: Sequence[Row]) -> str:
  made = table(
      ["beside torch", "other side", "other side, s", "ours, s", "speed-up"],
      [[row["name"], other, spread(row["seconds"][other]), spread(row["seconds"]["relearn_jax"]), spread(faster)]
       for row in rows for other, faster in row["times_as_fast_as"].items()])
  return "\n".join([made, *(f"\n{_amount(row)}" for row in rows if "amount" in row)])


def _amount(row: Row) -> str:
  """How much an audit was, and how far its results are apart."""
  sides: dict[str, list[str]] = {}
  for side, amount in row["amount"].items():
    told = ", ".join(f"{value:,} {key}" for key, value in amount.items())
    sides.setdefault(told, []).append(side)
  told = "; ".join(f"{amount} ({' and '.join(names)})" for amount, names in sides.items())
  apart = ", ".join(f"{value:.1e} ({which})" for which, value in row["difference_of_mean_answer_logprobs"].items())
  return f"{row['name']}: {told}. Mean log-probabilities of answers differ by {apart}."


SECTIONS = (("train", _train), ("decode", _decode), ("load", _load), ("attention", _attention), ("grid", _grid),
            ("compare", _compare))


def bench_text(found: Mapping[str, Any]) -> str:
  """Tables of everything that was measured, with machine, versions and command; `found` as in the JSON file."""
  device, model, rates, versions = (found[key] for key in ("device", "model", "rates", "versions"))
  lines = [
      f"`{found['command']}`", "",
      f"{found['date']}, {device['number']} x {device['kind']}, {device['cores']} cores of {device['processor']}, "
      + ", ".join(f"{name} {version}" for name, version in versions.items()), "",
      f"Model: {model['name']}, {number(model['parameters'], 1e6)} M parameters, {model['compute_dtype']}. Measured: "
      f"{spread(rates['matmul'], 1e9)} GFLOP/s of products, {number(rates['bandwidth_bytes'], 1e9)} GB/s of memory "
      f"(reading {spread(rates['read'], 1e9)}, in place {spread(rates['update'], 1e9)}). Medians, ranges in brackets."]
  for key, section in SECTIONS:
    if found.get(key):
      lines += ["", section(found[key])]
  if measured := [row for key in ("train", "decode") for row in found.get(key, ())]:
    lines += ["", _memory(measured)]
  if "other_side" in found:
    other = found["other_side"]
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in other["packages"].items())
    lines += ["", f"Other side: Python {other['python']}, {packages}, {other['threads']} threads, on "
              f"{other['device']}."]
  lines += [f"\nLeft out: {one['part']}: {one['why']}" for one in found["left_out"]]
  return "\n".join(lines)
