"""The commands of `relearn`: their flags, and which function each calls; no logic."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from relearn_jax.bench.bench_flags import define_bench, run_bench
from relearn_jax.config_files import expand_paths
from relearn_jax.errors import InputError
from relearn_jax.parallel.processes import agree, by_first
from relearn_jax.workdir import nothing_left


@dataclasses.dataclass(frozen=True)
class Command:
  """A command.

  Attributes:
    summary: a line of help.
    define: defines its flags, all but `--config`.
    run: does what the flags say and returns what is printed at the end.
    config: examples of its configuration files; empty where it takes none.
    continues: whether the same command goes on where it was interrupted.
    spreads: whether it runs on several processes.
  """

  summary: str
  define: Callable[[flags.FlagValues], None]
  run: Callable[[flags.FlagValues], str]
  config: str = ""
  continues: bool = False
  spreads: bool = False


class _Path(flags.ArgumentParser[str]):
  """Of the flags that name a file or a folder: the shell leaves the ~ of --flag=~/there as it is."""

  def parse(self, argument: str) -> str:
    return os.path.expanduser(argument)


def _path_flag(values: flags.FlagValues, name: str, text: str) -> None:
  flags.DEFINE(_Path(), name, None, text, flag_values=values, serializer=flags.ArgumentSerializer())


def _required(values: flags.FlagValues, *names: str) -> None:
  for name in names:
    if getattr(values, name) is None:
      raise InputError("is not given", field=f"--{name}", mend="see --help")


def _workdir_flag(values: flags.FlagValues, text: str) -> None:
  _path_flag(values, "workdir", text)


def _watch_flags(values: flags.FlagValues) -> None:
  """What commands have that train."""
  _path_flag(values, "tensorboard", "Folder for TensorBoard: losses, norms, tokens per second and, of known devices, "
             "MFU of each stage (extra `tensorboard`).")
  flags.DEFINE_string("profile_steps", None, "FIRST:LAST, such as 5:8: a trace of these steps of each stage, in "
                      "profile/ of the workdir.", flag_values=values)


def _config(values: flags.FlagValues, *kinds: type) -> tuple[Any, str]:
  """The configuration, which must be of one of `kinds`, and the file that it came from."""
  path = config_flags.get_config_filename(values["config"])
  if not isinstance(values.config, kinds):
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise InputError(f"describes a {type(values.config).__name__}, and this command wants {wanted}",
                     file=path, field="--config", mend="give a file that is meant for it")
  expand_paths(values.config)
  return values.config, path


def _define_audit(values: flags.FlagValues) -> None:
  _workdir_flag(values, "Folder for everything that is written. Run again with it, an audit continues.")
  flags.DEFINE_string("mesh", "runs:-1", "Sizes of the axes runs, data, fsdp and tensor over the devices (-1: all that "
                      "are left), such as runs:2,fsdp:4.", flag_values=values)
  flags.DEFINE_bool("allow_leakage", False, "Go on although a relearn set holds what is asked about.",
                    flag_values=values)
  flags.DEFINE_float("max_cost", None, "Of all that a provider trains, by config.attack.api.price; an audit that would "
                     "cost more is refused.", flag_values=values)
  flags.DEFINE_bool("claim", False, "Share the workdir with other commands that are started like this one, on any "
                    "number of hosts: each claims a stage of the grid, does it, and claims the next.",
                    flag_values=values)
  _watch_flags(values)


def _audit(values: flags.FlagValues) -> str:
  _required(values, "config", "workdir")
  from relearn_jax.audit.audit_config import Audit
  from relearn_jax.audit.pipeline import audit
  from relearn_jax.parallel.start import cache_dir, start
  from relearn_jax.plan.fit import fitting
  from relearn_jax.report.render import report_from_rows
  from relearn_jax.report.stored import closing
  from relearn_jax.training.watching import watching
  config, path = _config(values, Audit)
  start()
  workdir = pathlib.Path(values.workdir)
  with watching(values.tensorboard, values.profile_steps, workdir):
    done = audit(config, path, workdir, cache_dir(), allow_leakage=values.allow_leakage, mesh=values.mesh,
                 at_once=fitting, max_cost=values.max_cost, claim=values.claim)
  if done:
    by_first(lambda: report_from_rows(workdir))
  return nothing_left(workdir, done) + agree(lambda: closing(workdir))


def _define_status(values: flags.FlagValues) -> None:
  _workdir_flag(values, "Folder of an audit that was started, with --claim or without; nothing is written.")


def _status(values: flags.FlagValues) -> str:
  _required(values, "workdir")
  from relearn_jax.audit.status import status
  return status(pathlib.Path(values.workdir))


def _define_report(values: flags.FlagValues) -> None:
  _workdir_flag(values, "Folder of an audit; its stored results are read, no model is needed.")
  flags.DEFINE_list("metrics", [], "Scores to add to its results, from the stored answers, such as rouge_l.",
                    flag_values=values)


def _report(values: flags.FlagValues) -> str:
  _required(values, "workdir")
  from relearn_jax.report.stored import report
  return report(pathlib.Path(values.workdir), values.metrics)


def _define_replies(values: flags.FlagValues) -> None:
  """What every command has that asks a model in words."""
  flags.DEFINE_string("base_url", "https://api.openai.com/v1", "Address of the endpoint.", flag_values=values)
  flags.DEFINE_integer("max_requests", 2000, "More than these are not begun; replies of earlier runs cost none.",
                       flag_values=values)
  flags.DEFINE_list("prices", [], "Of a million tokens in and out, such as 2.5,10: cost is stated before the start.",
                    flag_values=values)
  flags.DEFINE_float("max_cost", 0.0, "More than this is not spent; needs --prices. 0: no limit.", flag_values=values)
  flags.DEFINE_integer("concurrency", 8, "Requests at a time.", flag_values=values)
  flags.DEFINE_float("timeout", 120.0, "Seconds of a try; it is tried 6 times.", flag_values=values)
  flags.DEFINE_integer("seed", 0, "Sent with each request.", flag_values=values)


def _define_collect(values: flags.FlagValues) -> None:
  flags.DEFINE_string("model", None, "openai:MODEL behind an OpenAI-compatible endpoint (the key is read from "
                      "OPENAI_API_KEY alone), or local:FOLDER of a checkpoint.", flag_values=values)
  _path_flag(values, "prompts", "Text file of prompts, parted by empty lines, with {topic} where a topic is to stand.")
  flags.DEFINE_list("topics", [], "What is asked about, parted by commas.", flag_values=values)
  flags.DEFINE_string("questions", "", "Source of an audit's questions: rows that give one away are left out.",
                      flag_values=values)
  _path_flag(values, "output", 'JSON lines {"text", "collected"}: a relearn set that says where it comes from.')
  _define_replies(values)


def _collect(values: flags.FlagValues) -> str:
  _required(values, "model", "prompts", "output")
  from relearn_jax.judge.collecting import CollectSettings, collect
  from relearn_jax.judge.replies import Limits, prices_of
  from relearn_jax.parallel.start import cache_dir, start
  limits = Limits(values.concurrency, values.max_requests, prices_of(values.prices), values.max_cost)
  settings = CollectSettings(values.model, pathlib.Path(values.prompts), tuple(values.topics), values.questions,
                             values.base_url, values.seed, values.timeout, limits)
  start()
  return collect(settings, pathlib.Path(values.output), cache_dir() / "collect")


def _define_judge(values: flags.FlagValues) -> None:
  _workdir_flag(values, "Folder of an audit; its stored answers are rated.")
  flags.DEFINE_string("judge", None, "openai:MODEL behind an OpenAI-compatible endpoint, pinned to a version where it "
                      "has one (the key is read from OPENAI_API_KEY alone), or local:FOLDER of a checkpoint.",
                      flag_values=values)
  flags.DEFINE_string("prompt", "quality", "What it is asked: quality (1 to 10), or fact (whether the answer states "
                      "the reference).", flag_values=values)
  flags.DEFINE_string("answers", "table", "Which answers it rates: table (those behind the report's main table), or "
                      "cells (all that a verdict looks at). Each distinct one is rated once.", flag_values=values)
  flags.DEFINE_string("name", "", "Of the judge in the results; by default its model's.", flag_values=values)
  _define_replies(values)
  flags.DEFINE_integer("batch_size", 8, "Answers that a local judge is asked about together.", flag_values=values)


def _judge(values: flags.FlagValues) -> str:
  _required(values, "workdir", "judge")
  from relearn_jax.judge.judging import JudgeSettings, judge_workdir
  from relearn_jax.judge.replies import Limits, prices_of
  from relearn_jax.parallel.start import cache_dir, start
  from relearn_jax.report.stored import judged_closing, report
  limits = Limits(values.concurrency, values.max_requests, prices_of(values.prices), values.max_cost)
  settings = JudgeSettings(values.judge, values.prompt, values.answers, values.name, values.base_url, values.seed,
                           values.timeout, values.batch_size, limits)
  start()
  workdir = pathlib.Path(values.workdir)
  judge_workdir(workdir, settings, cache_dir() / "judge")
  report(workdir)
  return judged_closing(workdir)


def _define_model(values: flags.FlagValues) -> None:
  _path_flag(values, "model", "Folder of a Hugging Face checkpoint (Llama, Mistral, Phi, Qwen2; safetensors), "
                      "or a hub id.")
  flags.DEFINE_string("mesh", None, "Devices that share the model, such as fsdp:-1 or data:2,fsdp:2,tensor:2 (-1: all "
                      "that are left); one device by default.", flag_values=values)
  flags.DEFINE_integer("batch_size", 32, "Rows computed together.", flag_values=values)
  flags.DEFINE_string("dtype", "auto", "Precision of products: auto (bfloat16 on accelerators, float32 on CPU), "
                      "float32 or bfloat16.", flag_values=values)
  _define_chat(values)


def _define_chat(values: flags.FlagValues) -> None:
  flags.DEFINE_bool("chat_template", False, "Render prompts by the checkpoint's chat template, as the user's turn.",
                    flag_values=values)
  flags.DEFINE_string("chat_name", "", "Which of the checkpoint's chat templates, where it has several.",
                      flag_values=values)
  flags.DEFINE_string("chat_system", "", "Text of the system's turn before the user's.", flag_values=values)
  flags.DEFINE_string("chat_date", "2024-07-26", "What a chat template that asks for today's date is told.",
                      flag_values=values)
  flags.DEFINE_string("chat_arguments", "", 'JSON object of what else the chat template reads, such as '
                      '{"enable_thinking": false}.', flag_values=values)


def _chat(values: flags.FlagValues) -> Any:
  """What the chat template is told; None where none is asked for."""
  from relearn_jax.data.chat import ChatSettings, check_chat
  settings = ChatSettings(values.chat_name, values.chat_system, values.chat_date, values.chat_arguments)
  check_chat(settings, values.chat_template, None, "--chat_")
  return settings if values.chat_template else None


def _define_generate(values: flags.FlagValues) -> None:
  _define_model(values)
  _path_flag(values, "prompts", 'Rows {"id", "prompt"} of a file, or hf: or tfds: and what follows.')
  _path_flag(values, "output", 'JSON lines {"id", "prompt", "completion", "token_ids", "finish_reason"}, in the '
                      "order of the prompts.")
  flags.DEFINE_integer("max_new_tokens", None, "New tokens at most, whatever the prompt's length.", flag_values=values)
  flags.DEFINE_float("temperature", 0.0, "0 is greedy.", flag_values=values)
  flags.DEFINE_integer("samples", 1, "Completions of each prompt, at a temperature above 0.", flag_values=values)
  flags.DEFINE_integer("seed", 0, "Decides what is sampled.", flag_values=values)
  flags.DEFINE_multi_string("stop", [], "A completion ends before this text; may be given several times.",
                            flag_values=values)
  _path_flag(values, "prefix", "Text file that is put before every prompt as it is, and read once.")


def _generate(values: flags.FlagValues) -> str:
  _required(values, "model", "prompts", "output", "max_new_tokens")
  from relearn_jax.generation.prompt_files import generate_file
  from relearn_jax.generation.prompts import read_prefix_text
  from relearn_jax.parallel.start import start
  start()
  number = generate_file(
      values.model, values.prompts, pathlib.Path(values.output), max_new_tokens=values.max_new_tokens,
      batch_size=values.batch_size, temperature=values.temperature, seed=values.seed,
      samples=values.samples, stop=values.stop, mesh=values.mesh, chat=_chat(values), dtype=values.dtype,
      prefix=read_prefix_text(pathlib.Path(values.prefix)) if values.prefix else "")
  return f"{number} completions: {values.output}"


def _define_score(values: flags.FlagValues) -> None:
  _define_model(values)
  _path_flag(values, "data", 'Rows {"id", "prompt", "answer"} of a file, or hf: or tfds: and what follows.')
  _path_flag(values, "output", 'JSON lines {"id", "logprob_sum", "num_tokens", "token_logprobs"} of the '
                      "answers.")


def _score(values: flags.FlagValues) -> str:
  _required(values, "model", "data", "output")
  from relearn_jax.metrics.answer_files import score_file
  from relearn_jax.parallel.start import start
  start()
  number = score_file(values.model, values.data, pathlib.Path(values.output),
                      batch_size=values.batch_size, mesh=values.mesh, chat=_chat(values), dtype=values.dtype)
  return f"{number} answers scored: {values.output}"


def _define_export(values: flags.FlagValues) -> None:
  _path_flag(values, "checkpoint", "A step's folder, such as WORKDIR/checkpoints/unlearn/000040.")
  _path_flag(values, "output", "Hugging Face folder to write; must not exist.")
  flags.DEFINE_bool("merge", False, "Write an adapter merged into its base, instead of as a PEFT folder.",
                    flag_values=values)
  flags.DEFINE_string("run", None, 'Which of the stacked runs, such as "U-7-0" (arm, variant, seed).',
                      flag_values=values)
  flags.DEFINE_string("save_dtype", "float32", "Of the weights that are written: float32, as they were trained, or "
                      "bfloat16, which may round away what was unlearned.", flag_values=values)


def _export(values: flags.FlagValues) -> str:
  _required(values, "checkpoint", "output")
  from relearn_jax.training.export_run import export_run
  run, rounded = export_run(pathlib.Path(values.checkpoint), pathlib.Path(values.output), values.run,
                            merge=values.merge, save_dtype=values.save_dtype)
  return f"{rounded}\n{run}: {values.output}".lstrip()


def _define_prepare(values: flags.FlagValues) -> None:
  _path_flag(values, "model", "Folder of a Hugging Face checkpoint, or a hub id, whose tokenizer makes the tokens.")
  flags.DEFINE_string("source", None, 'Rows {"prompt", "answer"} or {"text"} of a file, or hf: or tfds: and what '
                      "follows.", flag_values=values)
  flags.DEFINE_string("columns", "{}", 'JSON object of our fields and the columns of the source, such as '
                      '{"text": "content"}.', flag_values=values)
  _path_flag(values, "output", "Folder to write, for prepared:FOLDER as a source of `relearn unlearn`; must not exist.")
  flags.DEFINE_integer("rows_per_shard", 2**16, "Rows of a file.", flag_values=values)
  _define_chat(values)


def _prepare(values: flags.FlagValues) -> str:
  _required(values, "model", "source", "output")
  if "://" in values.output:
    raise InputError("is an address, and rows are written to a disk", file=values.output, field="--output",
                     mend="give a folder, and copy it there once it is written")
  from relearn_jax.training.prepare import PrepareSettings, parse_columns, prepare
  settings = PrepareSettings(values.model, values.source, parse_columns(values.columns, "--columns"),
                             values.rows_per_shard, _chat(values))
  return prepare(settings, pathlib.Path(values.output))


def _define_unlearn(values: flags.FlagValues) -> None:
  _workdir_flag(values, "Folder for everything that is written. Run again with it, a job continues.")
  flags.DEFINE_string("mesh", None, "Sizes of the axes data, fsdp and tensor over the devices; by default fsdp:-1 on "
                      "accelerators, one device on CPU.", flag_values=values)
  _watch_flags(values)


def _unlearn(values: flags.FlagValues) -> str:
  _required(values, "config")
  from relearn_jax.training.job import UnlearnJob
  config, path = _config(values, UnlearnJob)
  if config.method == "help":
    from relearn_jax.objectives.recipe import method_help
    return method_help()
  _required(values, "workdir")
  from relearn_jax.parallel.start import start
  from relearn_jax.training.unlearn import unlearn
  from relearn_jax.training.watching import watching
  start()
  workdir = pathlib.Path(values.workdir)
  with watching(values.tensorboard, values.profile_steps, workdir):
    done = unlearn(config, path, workdir, values.mesh)
  return nothing_left(workdir, done) + f"Unlearned by {config.method}: {workdir / 'model'}"


def _define_bench(values: flags.FlagValues) -> None:
  _path_flag(values, "model", "Folder of a Hugging Face checkpoint, or a hub id, in place of a named shape.")
  _path_flag(values, "output", "JSON file of everything that was measured.")
  define_bench(values)


def _define_sweep(values: flags.FlagValues) -> None:
  _workdir_flag(values, "Folder for everything that is written. Run again with it, a sweep continues.")
  flags.DEFINE_string("mesh", "runs:-1", "Sizes of the axes runs, data, fsdp and tensor over the devices.",
                      flag_values=values)
  _watch_flags(values)


def _sweep(values: flags.FlagValues) -> str:
  _required(values, "config", "workdir")
  from relearn_jax.audit.sweep import Sweep, sweep, sweep_table
  from relearn_jax.parallel.start import cache_dir, start
  from relearn_jax.training.watching import watching
  config, path = _config(values, Sweep)
  start()
  workdir = pathlib.Path(values.workdir)
  with watching(values.tensorboard, values.profile_steps, workdir):
    found = sweep(config, path, workdir, cache_dir(), values.mesh)
  return f"{sweep_table(found)}\n\nResults: {workdir / 'sweep.json'}"


def _define_serve(values: flags.FlagValues) -> None:
  flags.DEFINE_multi_string("model", [], "NAME=DIR: a Hugging Face folder or a hub id, under the name that clients "
                            "use; may be given several times.", flag_values=values)
  _workdir_flag(values, "Folder for uploads and jobs. Run again with it, jobs go on.")
  flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; one that other machines reach needs a key in "
                      "RELEARN_API_KEY.", flag_values=values)
  flags.DEFINE_integer("port", 8000, "Port to listen on; 0: any that is free.", flag_values=values)
  flags.DEFINE_multi_string("limit", [], "FIELD=VALUE of what the provider permits, such as min_rows=10, "
                            "adapter=full, max_epochs=5, absolute_rates=true, blocked_words=WORD; may be given several "
                            "times.", flag_values=values)
  flags.DEFINE_string("dtype", "auto", "Precision of products: auto (bfloat16 on accelerators, float32 on CPU), "
                      "float32 or bfloat16.", flag_values=values)


def _serve(values: flags.FlagValues) -> str:
  _required(values, "workdir")
  from relearn_jax.models.precision import check_dtype
  from relearn_jax.parallel.start import start
  from relearn_jax.serve.http_server import serve
  from relearn_jax.serve.limits import parse_limits
  check_dtype(values.dtype, None, "--dtype")
  limits = parse_limits(values.limit)
  start()
  return serve(values.model, pathlib.Path(values.workdir), values.host, values.port, limits, values.dtype)


def _define_plan(values: flags.FlagValues) -> None:
  flags.DEFINE_string("device", "h200", "Kind of device: h200, h100, a100, v5p, v6e or cpu.", flag_values=values)
  flags.DEFINE_integer("num_devices", 1, "Number of devices (of cores, for cpu).", flag_values=values)
  flags.DEFINE_string("mesh", "fsdp:-1", "Sizes of the axes runs, data, fsdp and tensor over them.",
                      flag_values=values)
  flags.DEFINE_integer("num_commands", 1, "Commands that share the grid by --claim, each on --num_devices of its own.",
                       flag_values=values)
  flags.DEFINE_float("memory_gib", None, "Memory of a device, where it is not the table's; needed for cpu.",
                     flag_values=values)
  flags.DEFINE_integer("rows", 400, "Rows of a data set whose file is not given.", flag_values=values)
  flags.DEFINE_integer("length", 512, "Its longest row, in tokens.", flag_values=values)
  flags.DEFINE_integer("counted", 128, "Tokens of a row that count in its loss.", flag_values=values)
  _path_flag(values, "bench", "JSON file of `relearn bench` on such a device: its rates in place of the table's.")


def _plan(values: flags.FlagValues) -> str:
  _required(values, "config")
  from relearn_jax.plan.audit_plan import Size
  from relearn_jax.plan.command import plan
  config, path = _config(values, object)
  return plan(config, path, device=values.device, num_devices=values.num_devices, mesh=values.mesh,
              memory_gib=values.memory_gib, default=Size(values.rows, values.length, values.counted),
              bench=values.bench, commands=values.num_commands)


COMMANDS = {
    "plan": Command("what a configuration needs of memory and time, before it is launched", _define_plan, _plan,
                    "configs/unlearn.py, configs/checkpoint.py or configs/names.py"),
    "bench": Command("measure speed and memory on this machine, on its own or beside torch", _define_bench, run_bench),
    "prepare": Command("write a corpus as shards of tokens, which any number of hosts read", _define_prepare, _prepare),
    "unlearn": Command("make a checkpoint unlearn a forget set", _define_unlearn, _unlearn, "configs/unlearn.py",
                       continues=True, spreads=True),
    "sweep": Command("choose hyper-parameters of methods by their unlearned models", _define_sweep, _sweep,
                     "configs/sweep.py", continues=True, spreads=True),
    "audit": Command("unlearn, attack and judge: the whole experiment of a configuration file", _define_audit, _audit,
                     "configs/names.py, configs/methods.py or configs/checkpoint.py", continues=True, spreads=True),
    "status": Command("how far an audit is: stages done, running (where), failed and left", _define_status, _status),
    "report": Command("render an audit's report again from its stored rows", _define_report, _report),
    "collect": Command("collect a relearn set from what a model tells about topics", _define_collect, _collect),
    "judge": Command("have a judge rate an audit's stored answers", _define_judge, _judge),
    "generate": Command("complete prompts with a checkpoint", _define_generate, _generate, spreads=True),
    "score": Command("log-probabilities of answers under a checkpoint", _define_score, _score, spreads=True),
    "serve": Command("a provider's fine-tuning interface on checkpoints of this machine", _define_serve, _serve,
                     continues=True),
    "export": Command("write a trained state as a Hugging Face folder", _define_export, _export)}
