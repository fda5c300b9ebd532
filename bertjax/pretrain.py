"""Pretrain: BERT from text, with masked-LM and next-sentence prediction (paper, section 3.1).

  bertjax pretrain --config=configs/pretrain/bert_mini.py --workdir=DIR \\
      --config.data.input=TEXTS --config.data.vocab=vocab.txt

`set_up` turns the config into data, tokenizer, models and optimizer: raw text is prepared first,
into a cache (`data.preprocess`), or read while training with data.streaming=True
(`data.streaming`). `make_stages` makes the batches, which get new masks in every epoch
(`data.loader`), and the objective. The engine (`training.run`) trains and saves checkpoints, and
`save` writes the model.

The same command started again resumes from the newest checkpoint in the workdir, to the same losses
and parameters, bit for bit. SIGTERM saves and exits with code 75; a first Ctrl-C saves and exits, a
second aborts. The workdir gets `checkpoints/`, `logs/` (JSONL, TensorBoard), `loss.png`,
`run.json`, `metrics.json` and `model/`, a model directory that Hugging Face's transformers loads.
"""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
import optax

from bertjax import adapters, build, build_objective, io, plan, prepare
from bertjax import config as config_lib
from bertjax.config import flat
from bertjax.data import loader as loader_lib
from bertjax.data import streaming, unigram
from bertjax.data.masking import Masking
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import families, hub, huggingface, loading
from bertjax.model import heads
from bertjax.objectives import electra
from bertjax.training import checkpoint, distributed
from bertjax.training import layout as layout_lib
from bertjax.training import mesh as mesh_lib
from bertjax.training import run as run_lib

_log = logging.getLogger(__name__)


class Setup(NamedTuple):
  """All of a run that does not change while it trains."""

  config: ml_collections.ConfigDict  # with the values that the prepared rows decide
  stages: list[plan.StagePlan]
  tokenizer: Tokenizer
  models: list[heads.Bert]  # of each stage; they differ in no shape of a parameter
  optimizer: optax.GradientTransformation
  layout: layout_lib.Layout
  loader: str  # 'threads' or 'tfdata'
  identity: dict  # what a resumed run must share with its start
  hub_commits: Mapping[str, str] = MappingProxyType({})  # {data set of the hub: commit}
  lora: adapters.Lora | None = None  # with adapters


def run(config, *, workdir: str, **processes) -> dict[str, float]:
  """Pre-trains, from a checkpoint in `workdir` if there is one; returns the last evaluation.

  `processes` are the arguments of `distributed.start`.

  Raises:
    ValueError: for a config that cannot be trained, before anything compiles.
    loop.DivergedError: if a loss is not finite.
    SystemExit: with code 75, after SIGTERM and a save.
    KeyboardInterrupt: after the first Ctrl-C and a save, or at the second.
  """
  if not workdir:
    raise ValueError('pretrain needs --workdir=DIR, the folder of the run.')
  workdir = checkpoint.check_path(workdir)
  build.check_run(workdir)
  distributed.start(**processes)
  if config.compilation_cache_dir:  # perhaps in a bucket, without the locks that a limit needs
    jax.config.update('jax_compilation_cache_dir', config.compilation_cache_dir)
    jax.config.update('jax_compilation_cache_max_size', -1)
  setup = set_up(config, run_lib.saved_run(workdir).get('hub_commits', {}))
  stages = make_stages(setup)

  def finish(params, step, evaluations):
    scored = {e['step']: e['scores'][0] for e in evaluations}
    # A checkpoint that `num_train_steps` was lowered to may lack scores.
    scores = scored.get(step) or stages[-1].evaluate(params)[0]
    save(workdir, setup, params, scores)
    return scores

  return run_lib.train(
    stages, setup.optimizer, layout=setup.layout, workdir=workdir, identity=setup.identity,
    config=config_lib.to_dict(setup.config), finish=finish,
    about={'losses': describe_losses(setup), 'hub_commits': setup.hub_commits},
    options=build.run_options(setup.config),
    load=functools.partial(load, setup) if setup.config.init_from else None,
    begin=lambda: setup.tokenizer.save(
      workdir / 'tokenizer', max_length=setup.models[-1].config.max_positions
    ),
  )  # fmt: skip


def set_up(config, hub_commits: Mapping[str, str] = MappingProxyType({})) -> Setup:
  """Checks the config, prepares its text if need be, and makes what a run needs.

  `hub_commits` are those with which a run that resumes was started.
  """
  config = config.copy_and_resolve_references()
  build.check(config)
  layout = build.make_layout(config)
  hub_commits = build.pin_hub_data(config, hub_commits)
  planned = plan.stages(config)
  for stage in planned:  # raises now what it would raise after a long preparation
    mesh_lib.check_batch_size(layout.mesh, stage.config.batch_size, layout.accumulation)
    model = build.make_model(stage.config, vocab_size=1)
    families.family_of(model.config)  # could it be saved?
    build_objective.make_generator(stage.config, model)
    build_objective.check_teacher(stage.config)
    adapters.check(stage.config)
    Masking(**stage.config.masking)
  optimizer = build.make_optimizer(config, plan.make_schedule(config))
  loader = loader_lib.choose_loader(config.data.loader)
  if config.data.streaming:
    texts = {}  # the parts of a stage whose batch grows share their text
    for stage in planned:
      texts[stage.name] = texts.get(stage.name) or prepare.streamed_text(stage.config)
    stages = [stage._replace(text=texts[stage.name]) for stage in planned]
  else:
    stages = [
      stage._replace(rows=prepare.prepared_rows(stage.config, jax.process_count()))
      for stage in planned
    ]
  tokenizer = stages[0].data.tokenizer
  models = [build.make_model(stage.config, tokenizer.vocab_size) for stage in stages]
  huggingface.check_padding(models[0].config, tokenizer.pad_id)
  lora = adapters.of_text(config, models[-1])
  identity = build.pretraining_identity(config, models[0].config, stages)
  identity |= adapters.identity(config, lora)
  return Setup(
    config, stages, tokenizer, models, optimizer, layout, loader, identity, hub_commits, lora
  )


def make_stages(setup: Setup) -> list[run_lib.Stage]:
  """The engine's stages: those of `setup` as iterators over batches and functions that evaluate."""
  mesh = setup.layout.mesh
  iterate = functools.partial(loader_lib.iterate, loader=setup.loader)
  stages = []
  base = setup.lora and setup.lora.place(mesh, setup.models[0].config.dtype)

  @functools.cache  # stages with the same model share its programs
  def programs(model):
    objective = build_objective.make_objective(setup.config, model, mesh, setup.tokenizer)
    if setup.lora:
      objective = setup.lora.adapt(objective, base)
    return objective, build.make_evaluate(objective, mesh, setup.loader)

  def evaluate(params, score, heldout):  # a list: the scores of each run, of which there is one
    return [score(params, heldout, setup.config.max_eval_examples)]

  for number, (stage, model) in enumerate(zip(setup.stages, setup.models, strict=True)):
    objective, score = programs(model)
    size, length = stage.config.batch_size, stage.config.data.length
    heldout = heldout_batches(setup, stage)
    if stage.text:
      batches, position, progress = streamed_batches(setup, stage, heldout)
    else:
      used = plan.examples_before(setup.stages, number)
      rows, first = stage.rows.training(used), used.get('', 0)  # '': rows of no named source
      train = build.make_batches(stage.config, rows, setup.tokenizer, mesh, first)
      batches, position = functools.partial(iterate, train.training), None
      progress = train.progress
    predictions = stage.config.masking.max_predictions
    flops_per_row = build_objective.train_flops(stage.config, model, predictions)
    if setup.lora:  # fewer, by how much depends on the targets
      flops_per_row = 0.0
    changes = plan.describe_stage(stage, setup.stages[number - 1] if number else None)
    stages.append(run_lib.Stage(
      stage.stop, objective, batches,
      functools.partial(evaluate, score=score, heldout=heldout),
      model_facts(setup, model), size * length, size * flops_per_row, position,
      stage.label, changes, progress,
    ))  # fmt: skip
  return stages


def model_facts(setup: Setup, model: heads.Bert) -> dict:
  """What a checkpoint says of its model, and of ELECTRA's generator."""
  facts = run_lib.model_facts(model.config, lora=setup.lora and setup.lora.facts())
  generator = build_objective.make_generator(setup.config, model)
  return facts | ({'generator': run_lib.model_facts(generator.config)} if generator else {})


def heldout_batches(setup: Setup, stage: plan.StagePlan) -> dict[str, loader_lib.Batches]:
  """The held-out batches of each source of a stage, from memory where text is streamed."""
  return {
    name: build.make_batches(stage.config, rows, setup.tokenizer, setup.layout.mesh)
    for name, rows in stage.data.heldout(setup.config.max_eval_examples).items()
  }


def streamed_batches(setup: Setup, stage: plan.StagePlan, heldout: dict[str, loader_lib.Batches]):
  """The training batches of streamed text, masked as the held-out ones, their positions, and the
  epochs of the sources of a mixture."""
  like = next(iter(heldout.values()))
  made = streaming.Stream(
    stage.text.texts, stage.config.batch_size, like.targets, mixture=stage.text.mixture,
    groups=min(jax.process_count(), *(s.config.batch_size for s in setup.stages)),
    stage=stage.start, local=like.local, loader=setup.loader,
  )  # fmt: skip
  position = lambda n: streaming.merge(distributed.gather(made.position(n)))  # noqa: E731
  return made.batches, position, made.epochs


def describe_losses(setup: Setup) -> dict:
  """Units and baselines of the losses, for `loss.png`: chance, and on 1,024 held-out rows the token
  frequencies of 65,536 training rows."""
  stage, tokenizer = setup.stages[-1], setup.tokenizer
  heldout, mlm_loss = heldout_batches(setup, stage), {'unit': 'nats per token'}
  if all(len(batches.rows) for batches in heldout.values()):
    baseline = unigram.cross_entropy(
      unigram.count_rows(stage.data.sample(), tokenizer.vocab_size, most=65_536),
      unigram.heldout(heldout, 1024),
      exclude=unigram.never_predicted(tokenizer, stage.config.objective),
      total=distributed.total,
    )
    mlm_loss |= {'baseline': baseline, 'baseline_name': 'unigram'}
  chance = {'unit': 'nats per pair', 'baseline': math.log(2), 'baseline_name': 'chance'}
  detection = {'unit': 'nats per token'}
  return {'mlm_loss': mlm_loss, 'nsp_loss': chance, 'rtd_loss': detection}


def load(setup: Setup, make) -> dict:
  """The weights of `init_from`; `make()` returns freshly initialised ones.

  Their `rope_theta` is that of the run's model; its first stage may have another one.
  """
  config, model = setup.config, setup.models[0]
  trained, first = config.model.rope_theta, model.config.rope_theta
  change = '' if first == trained else f', from rope_theta={trained} to {first}'
  _log.info('starting from the weights of %s%s', config.init_from, change)
  model = model.clone(config=dataclasses.replace(model.config, rope_theta=trained))
  options: dict = {'tokenizer': setup.tokenizer, 'resize': config.init_resize}
  initial = make() if config.init_resize or setup.lora else None
  weights = build_objective.source_weights(config) if config.init_layers else None
  params = loading.load_params(config.init_from, model, initial=initial, weights=weights, **options)
  if setup.lora:
    return setup.lora.start(params, initial)
  if generator := build_objective.make_generator(config, model):
    _log.info('starting from the generator %s', config.generator_from)
    initial = heads.generator_params(initial) if initial else None
    full = loading.load_params(config.generator_from, generator, initial=initial, **options)
    params['generator'] = electra.without_shared(full)
    shared = heads.generator_params(params)
    for path, table in flat(full['encoder']['embeddings']).items():
      if not np.array_equal(flat(shared['encoder']['embeddings'])[path], table):
        raise ValueError(
          f'{config.generator_from} and {config.init_from} have other embeddings ({path}); ELECTRA '
          'shares them, so start from two models that were trained together.'
        )
  return params


def save(workdir, setup: Setup, params, scores) -> None:
  """Writes the model directory and the final metrics."""
  params = distributed.host_copy(params)
  if jax.process_index() == 0:
    model = setup.models[-1]
    if generator := build_objective.make_generator(setup.config, model):
      full = heads.generator_params(params)
      loading.save_model(workdir / 'generator', generator, full, setup.tokenizer)
      _log.info('generator written to %s', workdir / 'generator')
      params = {name: part for name, part in params.items() if name != 'generator'}
    params, write = adapters.complete(setup.lora, setup.config.lora.save, params)
    about = json.loads((workdir / 'run.json').read_text())
    card = hub.model_card(f'{workdir.name}/model', model, params, scores=scores, run=about)
    write(workdir / 'model', model, params, setup.tokenizer, card=card)
    io.write_json(workdir / 'metrics.json', scores)
    _log.info('model written to %s', workdir / 'model')
