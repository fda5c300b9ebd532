"""Pretrain: BERT from text, with masked-LM and next-sentence prediction (paper, section 3.1).

  bertjax pretrain --config=configs/pretrain/bert_mini.py --workdir=DIR \\
      --config.data.input=TEXTS --config.data.vocab=vocab.txt

Raw text is prepared first, into a cache. The same command started again resumes from the newest
checkpoint in the workdir, to the same losses and parameters, bit for bit. SIGTERM saves and exits
with code 75; a first Ctrl-C saves and exits, a second aborts. The workdir gets `checkpoints/`,
`logs/` (JSONL, TensorBoard), `loss.png`, `run.json`, `metrics.json` and `model/`, a model directory
that Hugging Face's transformers loads.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from typing import NamedTuple

import jax
import ml_collections
import optax
from etils import epath

from bertjax import io, prepare
from bertjax.config import OF_TASKS
from bertjax.data import dataset, instances, masking
from bertjax.data import loader as loader_lib
from bertjax.data.masking import Masking
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import loading
from bertjax.model import config as model_config
from bertjax.model import encoder, flops, heads, losses
from bertjax.training import checkpoint, distributed, log, loop, optimizer, trials
from bertjax.training import mesh as mesh_lib
from bertjax.training import run as run_lib

_log = logging.getLogger(__name__)


LOSSES = {  # for loss.png
  'mlm_loss': {'unit': 'nats per predicted token'},
  'nsp_loss': {'unit': 'nats per pair', 'baseline': math.log(2), 'baseline_name': 'chance'},
}


def run(config, *, workdir: str, **peers) -> dict[str, float]:
  """Pre-trains, from a checkpoint in `workdir` if there is one; returns the last evaluation.

  Raises:
    ValueError: for a config that cannot be trained, before anything compiles.
    loop.DivergedError: if a loss is not finite.
    SystemExit: with code 75, after SIGTERM and a save.
    KeyboardInterrupt: after the first Ctrl-C and a save, or at the second.
  """
  if not workdir:
    raise ValueError('pretrain needs --workdir=DIR, the folder of the run.')
  workdir = checkpoint.check_path(workdir)
  distributed.start(**peers)
  if config.compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', config.compilation_cache_dir)
  setup = set_up(config)
  config = setup.config
  run_lib.check_same(workdir, setup.identity)
  distributed.agree('configuration', [setup.identity, config.to_dict()])
  workdir.mkdir(parents=True, exist_ok=True)
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', keep=config.max_to_keep)
  state, shardings, meta = start(setup, checkpoints)
  if jax.process_index() == 0:
    log.write_run(workdir / 'run.json', config.to_dict(), identity=setup.identity, losses=LOSSES)
    setup.tokenizer.save(workdir / 'tokenizer', max_length=setup.bert.config.max_positions)
  loss = losses.pretraining_loss(setup.bert)
  train_step = loop.make_train_step(
    *loss, setup.transform, mesh=setup.mesh, state_shardings=shardings,
    accumulation=config.gradient_accumulation_steps,
  )  # fmt: skip
  eval_step = loop.make_eval_step(*loss, mesh=setup.mesh)
  run_log = log.RunLog(
    workdir, steps=config.num_train_steps, start=int(state.step), active=jax.process_index() == 0
  )
  skipped = meta.get('skipped', [])  # batches that are left out, see `on_divergence`
  history = meta.get('evaluations', [])  # {'step', 'loss'}
  scores, stopped = {}, 0
  try:
    for phase in setup.phases:
      if not stopped and int(state.step) < phase.stop:
        state, scores, stopped = train(
          setup, phase, state, train_step, eval_step, checkpoints, skipped, history, run_log
        )
    if config.save_model == 'best' and not (stopped and state.step < config.num_train_steps):
      state, scores, stopped = best(setup, state, checkpoints), {}, 0
  finally:
    checkpoints.close()  # first: it waits for what is still being written
    run_log.close()
  if state.step < config.num_train_steps:
    run_lib.exit_if_stopped(stopped, int(state.step))
  if not scores:  # a run that had already ended, or its best step
    scores = evaluator(setup, setup.phases[-1], eval_step)(state.params)
  finish(workdir, setup.bert, state.params, setup.tokenizer, scores)
  return scores


class Phase(NamedTuple):
  """Steps start..stop-1 of a run, on rows of one length."""

  start: int
  stop: int
  config: ml_collections.ConfigDict  # the run's as of then
  folder: epath.Path | None = None  # of the prepared rows


class Setup(NamedTuple):
  """All of a run that does not change while it trains."""

  config: ml_collections.ConfigDict
  phases: list[Phase]
  tokenizer: Tokenizer
  bert: heads.Bert
  transform: optax.GradientTransformation
  loader: str
  mesh: jax.sharding.Mesh
  identity: dict


def set_up(config) -> Setup:
  """Checks a config, prepares its text if need be, and makes what a run needs."""
  check_intervals(config)
  if config.data.input and config.data.heldout_fraction == 1:
    raise ValueError(
      'data.heldout_fraction=1 leaves no document to train on; it is for `bertjax evaluate`. Use 0.05.'
    )
  config = config.copy_and_resolve_references()
  mesh = mesh_lib.make_mesh(**config.mesh)
  phases = make_phases(config)
  for phase in phases:
    mesh_lib.check_batch_size(mesh, phase.config.batch_size, config.gradient_accumulation_steps)
  transform = make_transform(config)
  loader = loader_lib.choose_loader(config.data.loader)
  for phase in phases:  # raises now what it would raise after a long preparation
    make_model(phase.config, vocab_size=1)
    Masking(**phase.config.masking)
  phases = [phase._replace(folder=prepared_folder(phase.config)) for phase in phases]
  tokenizer = Tokenizer.from_dir(phases[0].folder)
  bert = make_model(config, tokenizer.vocab_size)
  identity = run_identity(config, bert.config, phases)
  return Setup(config, phases, tokenizer, bert, transform, loader, mesh, identity)


def make_phases(config) -> list[Phase]:
  """One phase, or two where `long.share` gives the end of the run to longer rows."""
  long = config.long
  if not 0 <= long.share < 1:
    raise ValueError(f'long.share must be at least 0 and below 1, got {long.share}.')
  switch = config.num_train_steps - round(long.share * config.num_train_steps)
  derive_predictions(config)
  if switch == config.num_train_steps:
    return [Phase(0, config.num_train_steps, config)]
  if bool(config.data.prepared) != bool(long.prepared):
    raise ValueError(
      'a run of two lengths needs two prepared folders, or raw text: got data.prepared='
      f'{config.data.prepared!r} and long.prepared={long.prepared!r}.'
    )
  later = ml_collections.ConfigDict(config.to_dict())
  later.batch_size, later.masking.max_predictions = long.batch_size, long.max_predictions
  later.data.update(length=long.length, prepared=long.prepared)
  derive_predictions(later)
  long.max_predictions = later.masking.max_predictions
  return [Phase(0, switch, config), Phase(switch, config.num_train_steps, later)]


def derive_predictions(config) -> None:
  """Replaces `masking.max_predictions=-1` by the number that rate and length need."""
  sequences = config.data.max_sequences_per_row
  if config.data.prepared:  # packed as the folder says
    sequences = dataset.read_manifest(config.data.prepared)['settings'].get(
      'max_sequences_per_row', sequences
    )
  if config.objective == 'mlm' or config.masking.max_predictions == -1:
    config.masking.max_predictions = masking.predictions(
      config.masking, config.data.length, sequences
    )


def train(
  setup, phase, state, train_step, eval_step, checkpoints, skipped: list, history: list, run_log
):
  """Trains to the end of a phase; returns what `loop.fit` does. `skipped` grows at divergences,
  `history` at evaluations."""
  config, mesh = setup.config, setup.mesh
  size, length = phase.config.batch_size, phase.config.data.length
  run_log.tokens_per_step = size * length
  run_log.flops_per_step = size * flops.train_flops(
    setup.bert.config, length, phase.config.masking.max_predictions
  )
  batches = make_batches(phase.config, phase.folder, 'train', setup.tokenizer, mesh)
  evaluate = evaluator(setup, phase, eval_step)

  def save(state, step, scores):
    if scores:
      history.append({'step': step, 'loss': scores['loss']})
    meta = {'identity': setup.identity, 'config': config.to_dict(), 'next_batch': step,
            'skipped': skipped, 'evaluations': history,
            'model': run_lib.model_facts(setup.bert.config)}  # fmt: skip
    last = step > setup.phases[-1].start  # losses on rows of two lengths cannot be compared
    checkpoints.save(step, state, meta, scores if last else None)

  def finished():
    metric = [[-e['loss']] for e in history if e['step'] > setup.phases[-1].start]
    return not trials.running(metric, config.patience, 1)[0]

  def fit(state):
    history[:] = [e for e in history if e['step'] <= int(state.step)]  # after a divergence
    left_out = sum(s['batches'] for s in skipped if s['step'] >= phase.start)
    next_batch = max(int(state.step), phase.start) - phase.start + left_out
    with (
      contextlib.closing(
        loader_lib.iterate(batches.training, next_batch, loader=setup.loader)
      ) as stream,
      distributed.Watch(config.stall_seconds) as watch,
    ):
      return loop.fit(
        state, train_step, loop.to_device(run_log.watched(stream), mesh), steps=phase.stop,
        log=run_log, log_every=config.log_every, evaluate_fn=evaluate,
        eval_every=config.eval_every, save=save, save_every=config.save_every, watch=watch.at,
        spike=config.loss_spike_threshold, finished=finished,
      )  # fmt: skip

  skip = config.on_divergence == 'skip'
  return run_lib.recovering(
    fit, state, checkpoints, skipped if skip else None, run_log, phase.start
  )


def best(setup, state, checkpoints):
  """The state of the best evaluation on rows of the last phase's length."""
  checkpoints.wait()
  step = checkpoints.best_step()
  if step == int(state.step):
    return state
  _log.info('save_model=best: step %d', step)
  return checkpoints.restore(step, run_lib.abstract_of(state))[0]


def evaluator(setup, phase, eval_step):
  """`evaluate(params)` on the held-out rows of a phase."""
  heldout = make_batches(phase.config, phase.folder, 'heldout', setup.tokenizer, setup.mesh)
  return functools.partial(
    evaluate_rows, eval_step, heldout=heldout, rows=setup.config.max_eval_examples, mesh=setup.mesh,
    loader=setup.loader,
  )  # fmt: skip


def finish(workdir, bert, params, tokenizer, scores) -> None:
  """Writes the model directory and the final metrics."""
  params = distributed.host_copy(params)
  if jax.process_index():
    return
  loading.save_model(workdir / 'model', bert, params, tokenizer)
  io.write_json(workdir / 'metrics.json', scores)
  _log.info('model written to %s', workdir / 'model')


def check_intervals(config) -> None:
  """Raises ValueError for counts that are out of range."""
  run_lib.check_integers(config)
  counts = (
    'num_train_steps',
    'log_every',
    'max_eval_examples',
    'max_to_keep',
    'long.length',
    'long.batch_size',
  )
  run_lib.check_least(config, 1, counts)
  run_lib.check_save_model(config)
  run_lib.check_least(
    config, 0, ('patience', 'eval_every', 'save_every', 'stall_seconds', 'loss_spike_threshold')
  )
  optimizer.check_rate('learning_rate', config.learning_rate)
  if config.on_divergence not in ('stop', 'skip'):
    raise ValueError(f"on_divergence must be 'stop' or 'skip', got {config.on_divergence!r}.")
  if config.objective not in loader_lib.OBJECTIVES:
    raise ValueError(f'objective must be one of {loader_lib.OBJECTIVES}, got {config.objective!r}.')


def prepared_folder(config) -> epath.Path:
  """The prepared folder a config trains from; prepares raw text into the cache if it must.

  Raises:
    ValueError: if both or neither of `data.prepared` and `data.input` are given, if several
      processes were to prepare the same text, or the folder's settings are not the config's.
  """
  data = config.data
  if bool(data.prepared) == bool(data.input):
    raise ValueError(
      'give either raw text (--config.data.input=PATH) or prepared rows '
      f'(--config.data.prepared=DIR), got data.input={data.input!r}, '
      f'data.prepared={data.prepared!r}.'
    )
  if not data.prepared:
    if jax.process_count() > 1:
      raise ValueError(
        f'{jax.process_count()} processes would each prepare the text; run `bertjax prepare` once '
        'and give every process --config.data.prepared=DIR.'
      )
    return prepare.cached(config, data.cache_dir)
  folder = dataset.local(data.prepared, prepare.cache_folder(data.cache_dir))
  manifest = dataset.read_manifest(folder)
  found = manifest['settings']
  if 'kind' not in found:
    raise ValueError(f'{folder} holds the rows of a task, not of pre-training; see `finetune`.')
  wanted = prepare.settings_of(config)
  if 'report' in manifest:
    dataset.log_report(manifest['report'], wanted.length)
  for name in ('kind', 'length'):
    if found[name] != getattr(wanted, name):
      pairs = f' --config.nsp={found["kind"] in instances.PAIR_KINDS}' if name == 'kind' else ''
      raise ValueError(
        f'{folder} was prepared with {name}={found[name]!r}, this run wants '
        f'{getattr(wanted, name)!r}; pass --config.data.{name}={found[name]}{pairs}, or prepare '
        'again.'
      )
  check_prepared_tokenizer(folder, manifest, data)
  for name, value in dataclasses.asdict(wanted).items():
    if name in data and found.get(name, value) != value:
      _log.warning(
        '%s was prepared with data.%s=%r; the value of the config, %r, is replaced by it.',
        folder, name, found[name], value,
      )  # fmt: skip
      data[name] = found[name]
  return folder


def check_prepared_tokenizer(folder, manifest: dict, data) -> None:
  """Raises ValueError if the config's vocabulary, case or rules are not those of prepared rows."""
  tokenizer = Tokenizer.from_dir(folder)
  for name in ('lowercase', 'rules'):
    if data[name] != getattr(tokenizer, name):
      value = getattr(tokenizer, name)
      raise ValueError(
        f'{folder} was prepared with data.{name}={value}, this run wants {data[name]}; pass '
        f'--config.data.{name}={value}, or prepare again.'
      )
  if data.vocab and prepare.load_vocab(data).fingerprint != manifest['tokenizer']:
    raise ValueError(
      f'{folder} was prepared with another vocabulary than data.vocab={data.vocab}; prepare again, '
      'or leave data.vocab empty to use the one in the folder.'
    )
  prepare.warn_of_case(tokenizer)


def make_model(config, vocab_size: int) -> heads.Bert:
  """The model of a config, its vocabulary size checked against the tokenizer's."""
  fields = config.model.to_dict()
  fields['vocab_size'] = fields['vocab_size'] or vocab_size
  if fields['vocab_size'] < vocab_size:
    raise ValueError(
      f'model.vocab_size={fields["vocab_size"]} is smaller than the vocabulary, which has '
      f"{vocab_size} entries; leave it 0 to take the vocabulary's size."
    )
  encoder_config = model_config.EncoderConfig(**fields)
  if config.data.length > encoder_config.max_positions:
    raise ValueError(
      f'data.length={config.data.length} is longer than '
      f'model.max_positions={encoder_config.max_positions}.'
    )
  if (config.objective == 'next_token') != encoder_config.causal:
    raise ValueError(
      f'objective={config.objective} with model.causal={encoder_config.causal}: predicting the '
      'next token needs a causal encoder, and masked LM one that sees both sides.'
    )
  if config.nsp and (encoder_config.causal or encoder_config.type_vocab_size < 2):
    raise ValueError(
      'next-sentence prediction needs model.type_vocab_size of 2 and an encoder that sees both '
      f'sides, got {encoder_config.type_vocab_size} and model.causal={encoder_config.causal}; set '
      '--config.nsp=False.'
    )
  return heads.Bert(encoder_config, heads=loss_terms(config), pooler=config.nsp)


def loss_terms(config) -> tuple[str, ...]:
  return ('mlm', 'nsp') if config.nsp else ('mlm',)


def make_transform(config):
  schedule = optimizer.make_schedule(config.schedule, config.num_train_steps, config.warmup_steps)
  return optimizer.make_optimizer(
    **config.optimizer.to_dict(), learning_rate=config.learning_rate, schedule=schedule,
    param_axes=encoder.PARAM_AXES,
  )  # fmt: skip


def make_batches(config, folder, split, tokenizer, mesh) -> loader_lib.Batches:
  """The batches of one split, with this process's share of rows."""
  sharding = mesh_lib.batch_sharding(mesh)
  return loader_lib.Batches(
    dataset.Dataset(folder, split), config.batch_size, config.seed, Masking(**config.masking),
    vocab_size=tokenizer.vocab_size, special=tokenizer.special, objective=config.objective,
    word_flags=tokenizer.word_flags, local=mesh_lib.local_rows(sharding, config.batch_size),
  )  # fmt: skip


def evaluate_rows(eval_step, params, heldout, rows: int, mesh, loader: str) -> dict[str, float]:
  """Evaluates on the first `rows` held-out rows (rounded up to whole batches), frozen masks."""
  stream = loader_lib.iterate(heldout.evaluation, 0, heldout.steps_for(rows), loader=loader)
  scores = loop.evaluate(eval_step, params, loop.to_device(stream, mesh))
  return scores | {'mlm_perplexity': math.exp(min(scores['mlm_loss'], 80.0))}


def state_maker(config, bert, transform):
  """`make(params=None)`, a state at step 0; for `run.start` and `run.abstract_state`."""
  init = functools.partial(heads.init_params, bert)
  return functools.partial(run_lib.make_state, init, transform, config.seed)


def start(setup, checkpoints):
  """The state of the newest checkpoint, else with the weights of `init_from`, else random."""
  config = setup.config
  make = state_maker(config, setup.bert, setup.transform)

  def load():
    _log.info('starting from the weights of %s', config.init_from)
    initial = jax.device_get(jax.jit(make)().params) if config.init_resize else None
    return loading.load_params(
      config.init_from, setup.bert, tokenizer=setup.tokenizer, resize=config.init_resize,
      initial=initial,
    )  # fmt: skip

  shard = mesh_lib.sharder(setup.mesh, encoder.PARAM_AXES)
  return run_lib.start(
    make, shard, checkpoints, load if config.init_from else None, steps=config.num_train_steps
  )


# What a resumed run must share with the one it goes on with.
_SAME = ('init_from', 'init_resize', 'nsp', 'objective', 'seed', 'batch_size', 'gradient_accumulation_steps',
         'learning_rate', 'warmup_steps', 'schedule', 'optimizer', 'masking')  # fmt: skip


def run_identity(config, encoder_config, phases) -> dict:
  """Flat {field: value} of all that may not change between a start and its resumption."""
  flat = run_lib.flatten(config, _SAME)
  model = dataclasses.asdict(encoder_config)
  free = ('attention', 'classifier_dropout', 'remat', 'unroll', *OF_TASKS)  # change nothing here
  flat |= {f'model.{k}': v for k, v in model.items() if k not in free}
  manifests = [dataset.read_manifest(phase.folder) for phase in phases]
  flat |= {'tokenizer': manifests[0]['tokenizer'], 'rows': dataset.manifest_hash(manifests[0])}
  if len(phases) == 1:
    return flat
  if manifests[1]['tokenizer'] != flat['tokenizer']:
    folders = f'{phases[0].folder} and {phases[1].folder}'
    raise ValueError(f'{folders} were prepared with different tokenizers.')
  long = {'start': phases[1].start, 'batch_size': config.long.batch_size}
  long |= {
    'max_predictions': config.long.max_predictions,
    'rows': dataset.manifest_hash(manifests[1]),
  }
  return flat | {f'long.{name}': value for name, value in long.items()}
