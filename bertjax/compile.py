"""Compile: the train step of a recipe for a pod that is not there, and what it will cost.

  bertjax compile --config=bert_base --topology=v5e:16x16 --config.batch_size=8192
  bertjax compile --config=bert_large --topology=v5p:4x4x8 --config.batch_size=4096 \\
      --sweep='model.remat=none,dots;mesh.fsdp=1,16'

Compiles the very step that `bertjax pretrain` runs, from shapes only, and reports for one chip the
parameters, memory, FLOPs, memory traffic and collectives. With the chip's data sheet these bound
the step: it takes at least as long as its matmuls, its traffic or its collectives. Needs
libtpu (`pip install libtpu`) and no TPU. Without --topology it compiles for the devices of this
machine, runs some steps on random text and prints their time beside the bound.
"""

import contextlib
import itertools
import logging
import math
import os
import tempfile
import time

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from bertjax import build, build_objective, io, plan
from bertjax import config as config_lib
from bertjax.data.dataset import Arrays
from bertjax.data.loader import Batches
from bertjax.data.masking import Masking
from bertjax.model import flops
from bertjax.training import hlo
from bertjax.training import layout as layout_lib
from bertjax.training import mesh as mesh_lib
from bertjax.training.hardware import chip

_log = logging.getLogger(__name__)

VOCAB_SIZE = 30522  # bert-base-uncased's, where model.vocab_size=0 leaves it to the vocabulary
MEASURED_STEPS = 10


def run(config, *, topology: str = '', sweep: str = '', out: str = '') -> list[dict]:
  """Compiles every combination of `sweep`, prints a report of each, names the best that fits.

  Raises:
    ValueError: for an unknown topology or field, or a batch that the mesh cannot share.
  """
  devices = slice_devices(topology) if topology else jax.devices()
  variants = [(s, words) for variant, words in vary(config, sweep) for s in plan.stages(variant)]
  reports = []
  with io.progress('compiling', len(variants)) as update:
    for stage, words in variants:
      _log.info('compiling %s %s', f'{len(reports) + 1} of {len(variants)}', words)
      report = {'sweep': words} if sweep else {}
      report |= {'topology': topology} | report_of(stage, devices, measure=not topology)
      print(describe(report), flush=True)
      reports.append(report)
      update(len(reports))
  fitting = [report for report in reports if 'tokens_per_second' in report]
  if sweep and fitting:
    print('best that fits:', max(fitting, key=lambda r: r['tokens_per_second'])['sweep'])
  if out:
    io.write_json(out, reports)
  return reports


def slice_devices(topology: str) -> list:
  """The devices of a TPU slice by its name, or of n slices by n*name, without a TPU.

  Raises:
    ValueError: if libtpu is missing or does not know the name.
  """
  # No question to the cloud where this is, no lock on chips that are not used, warnings to count.
  os.environ.update(
    TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1', TPU_MIN_LOG_LEVEL='1',
    TPU_STDERR_LOG_LEVEL='1',
  )  # fmt: skip
  jax.config.update('jax_platforms', 'cpu')
  try:
    count, name = topology.split('*') if '*' in topology else ('1', topology)
    with _captured_stderr():
      return list(topologies.get_topology_desc(name, 'tpu', num_slices=int(count)).devices)
  except Exception as error:  # jaxlib and libtpu each raise their own
    raise ValueError(
      f'--topology must name a TPU slice, as v5e:2x4, v5p:4x4x8 or v6e:16x16, got {topology!r} '
      f'({str(error).strip().splitlines()[0]}); `pip install libtpu` brings the compiler.'
    ) from error


def vary(config, sweep: str):
  """Yields (config, words) for each combination of 'field=a,b;other=c,d'; one for ''.

  Raises:
    ValueError: for a field that the config lacks or a value of another type.
  """
  fields = config_lib.flat(config)
  names, choices = [], []
  for item in filter(None, sweep.split(';')):
    name, _, values = item.strip().partition('=')
    try:
      names.append(name)
      kind = type(fields[name])
      read = {'True': True, 'False': False}.__getitem__ if kind is bool else kind
      choices.append([read(value) for value in values.split(',')])
    except (KeyError, ValueError) as error:
      raise ValueError(
        f"--sweep takes fields of the config, as 'batch_size=256,512;mesh.fsdp=1,8', got {item!r}."
      ) from error
  for values in itertools.product(*choices):
    variant = config.copy_and_resolve_references()
    variant.stages = tuple(s.copy_and_resolve_references() for s in config.stages)  # shared before
    config_lib.update(variant, dict(zip(names, values, strict=True)))
    yield variant, ' '.join(f'{n}={v}' for n, v in zip(names, values, strict=True))


def report_of(stage, devices, *, measure: bool = False) -> dict:
  """Compiles the step of one stage of a run; with `measure` also runs it on `devices`."""
  config, layout = stage.config, build.make_layout(stage.config, devices)
  if config.objective == 'distill':
    raise ValueError(
      "compile knows no teacher; set --config.objective=mlm for the student's step without it."
    )
  if config.lora.rank:
    raise ValueError('compile knows no adapters; set --config.lora.rank=0.')
  mesh = layout.mesh
  mesh_lib.check_batch_size(mesh, config.batch_size, layout.accumulation)
  bert = build.make_model(config, config.model.vocab_size or VOCAB_SIZE)
  optimizer = build.make_optimizer(config, plan.make_schedule(config))
  objective = build_objective.make_objective(config, bert, mesh, None)
  abstract, shardings = layout_lib.abstract_state(objective, optimizer, layout)
  step = layout.train_step(objective, optimizer, shardings)
  sharding, size = mesh_lib.batch_sharding(mesh), config.batch_size
  rows = random_batch(config, bert.config.vocab_size)
  batch = {
    name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=sharding)
    for name, x in rows.items()
  }
  model_flops = build_objective.train_flops(config, bert, rows['masked_lm_ids'].shape[1]) * size
  report = {'stage': stage.label} if stage.label else {}
  report |= {
    'device': devices[0].device_kind, 'devices': len(devices), 'mesh': dict(mesh.shape),
    'batch_size': size, 'length': config.data.length, 'steps': stage.stop - stage.start,
    'model': bert.config.__dict__ | {'heads': bert.heads},
    'parameters': sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params)),
    'model_flops': model_flops / len(devices),
  }  # fmt: skip
  begun = time.perf_counter()
  try:
    with _without_cache(), _captured_stderr() as written:
      compiled = step.lower(abstract, batch).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'out of memory' not in str(error):
      raise
    return report | {'does_not_fit': str(error).strip().splitlines()[0]}
  report['compile_seconds'] = time.perf_counter() - begun
  # XLA's warning that a sharding makes every device hold a complete array for a moment.
  report['rematerialized'] = written[0].count('nvoluntary full rematerialization')
  report |= costs_of(compiled)
  report['kernel_flops'] = 0.0  # which the program's text does not have
  if 'splash_mha' in compiled.as_text():
    models = filter(None, (bert, build_objective.make_generator(config, bert)))
    each = sum(flops.splash_flops(model.config, config.data.length) for model in models)
    report['kernel_flops'] = each * size / len(devices)
  report |= bounds_of(report)
  if measure:
    state, _, _ = layout_lib.restore_or_init(objective, optimizer, layout)
    rows = jax.tree.map(lambda x: np.repeat(x, size, axis=0), rows)
    report |= measured(compiled, state, mesh_lib.shard_batch(rows, sharding), report)
  return report


def random_batch(config, vocab_size: int) -> dict:
  """A batch of one full row of random text, by the code that makes real ones."""
  length, sequences = config.data.length, config.data.max_sequences_per_row
  ends = np.arange(1, sequences + 1)[:, None] * (length // sequences) - np.array([2, 0])
  ids = np.random.default_rng(0).integers(5, vocab_size, (1, length))
  columns = {'input_ids': ids, 'ends': ends[None]}
  if config.nsp:
    columns['next_sentence_labels'] = np.ones((1, sequences))
  special = {'pad': 0, 'cls': 2, 'sep': 3, 'mask': 4}
  return Batches(
    Arrays(columns), 1, config.seed, Masking(**config.masking), vocab_size, special,
    objective=config.objective, word_flags=np.ones(vocab_size, bool),
  ).training(0)  # fmt: skip


def costs_of(compiled) -> dict:
  """Memory and work of the compiled step on one device."""
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  costs = hlo.costs(compiled.as_text())
  return {
    'argument_bytes': memory.argument_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'peak_bytes': held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
    'flops': costs.flops, 'product_flops': costs.product_flops, 'traffic_bytes': costs.bytes,
    'collectives': costs.collectives,
  }  # fmt: skip


def bounds_of(report: dict) -> dict:
  """The roofline bound of the data sheet; nothing for a device without one."""
  sheet = chip(report['device'])
  if not sheet:
    return {}
  sent = sum(
    size * (2 if kind == 'all-reduce' else 1)  # a ring sends everything twice to add it up
    for kind, (_, size) in report['collectives'].items()
  )
  seconds = {
    'products': (report['product_flops'] + report['kernel_flops']) / sheet.flops,
    'traffic': report['traffic_bytes'] / sheet.hbm_bandwidth,
    'collectives': sent / sheet.network if report['devices'] > 1 else 0.0,
  }
  step = max(seconds.values())
  return {
    'hbm_bytes': sheet.hbm, 'bound_seconds': seconds, **speed(report, step),
    'chip_hours': step * report['steps'] * report['devices'] / 3600,
  }  # fmt: skip


def speed(report: dict, seconds: float, prefix: str = '') -> dict:
  """Time, tokens/s and MFU of steps that take so long; no MFU for a device without data sheet."""
  sheet = chip(report['device'])
  facts = {
    'step_seconds': seconds,
    'tokens_per_second': report['batch_size'] * report['length'] / seconds,
  }
  if sheet:
    facts['mfu'] = report['model_flops'] / sheet.flops / seconds
  return {prefix + name: value for name, value in facts.items()}


def measured(compiled, state, batch, report: dict) -> dict:
  """Runs the step; the median of `MEASURED_STEPS` steps after two warm ones."""
  times = []
  for _ in range(MEASURED_STEPS + 2):
    begun = time.perf_counter()
    state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    times.append(time.perf_counter() - begun)
  facts = speed(report, float(np.median(times[2:])), 'measured_')
  if stats := jax.devices()[0].memory_stats():
    facts['measured_peak_bytes'] = stats['peak_bytes_in_use']
  return facts


def describe(report: dict) -> str:
  """The report as text."""
  r, gb = report, 1e9
  mesh = ' x '.join(f'{name} {size}' for name, size in r['mesh'].items())
  stage = f', stage {r["stage"]}' if 'stage' in r else ''
  title = (
    f'{r["topology"] or "here"}{stage}: {r["devices"]} x {r["device"]}, {mesh}; '
    f'{r["batch_size"]:,} rows of {r["length"]} tokens, '
    f'{r["model"]["num_layers"]} layers, remat {r["model"]["remat"]}'
  )
  rows = {'parameters': f'{r["parameters"]:,}'}
  if 'does_not_fit' in r:
    rows['does not fit'] = r['does_not_fit']
  else:
    of = f' of {r["hbm_bytes"] / gb:.0f}' if 'hbm_bytes' in r else ''
    sent = [f'{count:.0f} {kind} of {size / gb:.3f} GB'
            for kind, (count, size) in sorted(r['collectives'].items())]  # fmt: skip
    kernels = f', flash kernels {r["kernel_flops"] / r["model_flops"]:.3f}'
    rows |= {
      'memory': f'{r["peak_bytes"] / gb:.2f}{of} GB a device: arguments '
      f'{r["argument_bytes"] / gb:.2f}, temporaries {r["temporary_bytes"] / gb:.2f}',
      'FLOPs': f'{r["flops"]:.4g} compiled a device, {r["model_flops"]:.4g} of the model: '
      f'{r["flops"] / r["model_flops"]:.3f} (matmuls only '
      f'{r["product_flops"] / r["model_flops"]:.3f}{kernels if r["kernel_flops"] else ""})',
      'traffic': f'{r["traffic_bytes"] / gb:.1f} GB a device',
      'collectives': f'{", ".join(sent) or "none"}; {r["rematerialized"]} involuntary '
      'rematerializations',
    }
  if 'step_seconds' in r:
    parts = ', '.join(f'{name} {s * 1e3:.1f}' for name, s in r['bound_seconds'].items())
    hours = f'{r["chip_hours"]:,.0f} chip-hours for {r["steps"]:,} steps'
    rows['bound'] = f'{_pace(r)} ({parts}); {hours}'
  if 'measured_step_seconds' in r:
    rows['measured'] = _pace(r, 'measured_')
  return '\n'.join([title, *(f'  {name:<12} {text}' for name, text in rows.items())])


def _pace(r: dict, prefix: str = '') -> str:
  mfu = f', MFU {r[f"{prefix}mfu"]:.2f}' if f'{prefix}mfu' in r else ''
  seconds, tokens = r[f'{prefix}step_seconds'], r[f'{prefix}tokens_per_second']
  return f'{seconds * 1e3:.1f} ms a step, {tokens:,.0f} tokens/s{mfu}'


@contextlib.contextmanager
def _without_cache():
  """Compiles again: a program from the disk comes without its warnings and its time."""
  before = jax.config.jax_enable_compilation_cache
  try:
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # jax asks once whether there is one
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', before)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def _captured_stderr():
  """Takes what XLA's C++ writes to stderr; the list that it yields holds the text afterwards."""
  with tempfile.TemporaryFile('w+') as file:
    before, written = os.dup(2), []
    os.dup2(file.fileno(), 2)
    try:
      yield written
    finally:
      os.dup2(before, 2)
      os.close(before)
      file.seek(0)
      written.append(file.read())
