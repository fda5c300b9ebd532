"""Evaluate: a run, or a model directory, on held-out text or on a task's examples.

  bertjax evaluate --workdir=DIR                      the run's best checkpoint
  bertjax evaluate --workdir=DIR --checkpoint=newest  or its newest
  bertjax evaluate --config=... --model=DIR           any model directory, on the config's data
  bertjax evaluate --config=... --model=DIR --config.data.heldout_fraction=1 --unigram=TEXTS
                                                      on all of a test text
  bertjax evaluate --workdir=DIR --split=test         of a task: its best model, on any split

Of a task it prints the official metrics. Of pre-training it prints masked-LM loss, accuracy and
perplexity at the frozen masked tokens, next-sentence accuracy, and beside them the unigram
cross-entropy of the same tokens: what knowing only how often each token occurs would give, in the
training rows or in the texts of --unigram.
"""

import json
import logging
import pathlib

import jax
import numpy as np
from etils import epath

from bertjax import adapters, build, build_objective, plan, prepare, scoring
from bertjax import config as config_lib
from bertjax.data import loader as loader_lib
from bertjax.data import text as text_lib
from bertjax.data import unigram as unigram_lib
from bertjax.data.tokenizer import Tokenizer
from bertjax.interop import loading
from bertjax.model import encoder, heads
from bertjax.tasks import report
from bertjax.tasks import task as task_lib
from bertjax.training import distributed, loop
from bertjax.training import layout as layout_lib
from bertjax.training import mesh as mesh_lib
from bertjax.training.checkpoint import Checkpoints, check_path

_log = logging.getLogger(__name__)


def run(
  config=None, *, workdir: str = '', model: str = '', checkpoint: str = 'best',
  max_eval_examples: int = 0, split: str = '', out: str = '', unigram: str = '', **processes,
) -> dict[str, float]:  # fmt: skip
  """Evaluates, prints the metrics as JSON and returns them; process 0 prints for all.

  Raises:
    ValueError: unless either workdir, or model and config, are given and can be read.
  """
  if bool(workdir) == bool(model) or bool(model) != (config is not None):
    raise ValueError(
      'evaluate needs --workdir=DIR (a run, which has its own config), or --model=DIR and '
      '--config=RECIPE with its data.'
    )
  distributed.start(**processes)
  config = config if model else run_config(check_path(workdir))
  if 'task' not in config:
    if split or out:
      raise ValueError('--split and --out are for tasks; pre-training has held-out rows only.')
    scores = evaluate_text(config, workdir, model, checkpoint, max_eval_examples, unigram)
  elif max_eval_examples or unigram or checkpoint != 'best':
    raise ValueError(
      '--max_eval_examples, --unigram and --checkpoint are for pre-training; a task has '
      'its best model.'
    )
  else:
    scores = evaluate_task(config, model or str(epath.Path(workdir) / 'model'), split, out)
  if jax.process_index() == 0:
    print(json.dumps(scores, indent=2))
  return scores


def evaluate_text(
  config, workdir, model: str, which: str, rows: int, unigram: str
) -> dict[str, float]:
  """Scores a checkpoint of a run, or a model directory, on the held-out rows of the config's text.

  Args:
    config: of the run, or with the data for the model.
    workdir: of the run; '' = score the model.
    model: a model directory; '' = score the run.
    which: checkpoint of the run: 'best', 'newest' or a step.
    rows: maximum number of held-out rows; 0 = the config's.
    unigram: texts to count tokens in; '' = the training rows.
  """
  stages = plan.stages(config)
  stage = stages[-1]
  if workdir:  # a checkpoint of short rows has not learnt the positions of long ones
    checkpoints, step = _choose(config, workdir, which)
    stage = next((s for s in stages if step <= s.stop), stage)
  config = stage.config
  rows = rows or config.max_eval_examples
  if rows < 1:
    raise ValueError(f'--max_eval_examples must be at least 1, got {rows}.')
  mesh = mesh_lib.make_dividing_mesh(config.batch_size, 'rows of a batch')  # whatever the run had
  config.model.attention = 'auto'
  if config.data.streaming:
    data = prepare.streamed_text(config)
  else:
    data = prepare.prepared_rows(config, jax.process_count())
  tokenizer = data.tokenizer
  if workdir:
    named = {f'{stage.name}.{name}'.lstrip('.'): value for name, value in data.identity.items()}
    _check_rows(workdir, named | {'tokenizer': tokenizer.fingerprint})
  heldout = {
    name: build.make_batches(config, part, tokenizer, mesh)
    for name, part in data.heldout(rows).items()
  }
  if workdir:
    bert = build.make_model(config, tokenizer.vocab_size)
    objective = build_objective.make_objective(config, bert, mesh, tokenizer)
    if lora := adapters.of_text(config, bert):
      _check_rows(workdir, {'lora.base': lora.digest})
      objective = lora.adapt(objective, lora.place(mesh, bert.config.dtype))
    params = _checkpoint_params(config, objective, mesh, checkpoints, step)
  else:
    bert, params = _directory_params(config, model, tokenizer, mesh)
    objective = build_objective.make_objective(config, bert, mesh, tokenizer)
  score = build.make_evaluate(objective, mesh, loader_lib.choose_loader(config.data.loader))
  scores = score(params, heldout, rows)
  if unigram:
    counts = count_text(unigram, tokenizer, config.data)
  elif config.data.heldout_fraction < 1 and len(train := data.sample()):
    counts = unigram_lib.count_rows(train, tokenizer.vocab_size)
  else:
    _log.info('no unigram figure: all text is held out; --unigram=TEXTS names texts to count.')
    return scores
  never = unigram_lib.never_predicted(tokenizer, config.objective)
  batches = unigram_lib.heldout(heldout, rows)
  baseline = unigram_lib.cross_entropy(counts, batches, exclude=never, total=distributed.total)
  return scores | {'unigram_cross_entropy': baseline}


def evaluate_task(config, model: str, split: str = '', out: str = '') -> dict[str, float]:
  """Scores a model directory on a split of the config's task; writes its predictions into `out`.

  A split without labels gets no scores ({}), so it needs `out`. Other splits than dev are answered
  with the threshold that the run tuned on dev (SQuAD 2.0), from the metrics.json beside the model.
  """
  task, tokenizer = build.make_task(config, model).judge, loading.load_tokenizer(model)
  mesh = mesh_lib.make_dividing_mesh(config.batch_size, 'rows of a batch')
  encoder_config, params = loading.load_weights(model)
  for head in task.heads:
    if head not in params:
      raise ValueError(f'{model} has no {head} head, it has {sorted(params)}.')
    scoring.check_labels(model, params, task)
  split = split or config.data.dev
  bert = heads.Bert(
    encoder_config, heads=task.heads, pooler='pooler' in params, num_labels=task.num_labels
  )
  examples = task.read(split)
  encoded = task_lib.encode_split(task, examples, tokenizer, config.data.length, split)
  names = {'encoder', *task.heads, *({'pooler'} & set(params))}
  params = mesh_lib.replicate({name: params[name] for name in names}, mesh)
  predict = scoring.make_predict(bert, task, mesh, config.batch_size, config.data.buckets)
  threshold = None if split == config.data.dev else tuned_threshold(model)
  if out and any(example.label is None for example in examples):
    logits, _ = predict(params, encoded)
    predictions, scores = task.decode(examples, encoded, logits[0], threshold or 0.0), {}
  else:
    predictions, scores, _ = scoring.score(task, examples, encoded, predict, params, threshold)
  report.remarks(task, split, examples, predictions, scores)
  if out and jax.process_index() == 0:
    folder = pathlib.Path(out)
    earlier = {*folder.glob('*'), *folder.glob(f'{split}/*')}
    paths = task.write(folder, split, examples, predictions)
    _log.info('predictions written to %s', ', '.join(map(str, paths)))
    if replaced := sorted(earlier & set(paths)):
      _log.warning('replaced existing files: %s', ', '.join(map(str, replaced)))
  return scores


def tuned_threshold(model) -> float:
  """The null odds above which a run's model refuses to answer, tuned on its dev split; else 0."""
  path = epath.Path(loading.find_model(model)).parent / 'metrics.json'
  return json.loads(path.read_text()).get('best_f1_threshold', 0.0) if path.exists() else 0.0


def count_text(source: str, tokenizer: Tokenizer, data) -> np.ndarray:
  """How often each id occurs in texts, int64 [V]; `data` is the config's section on reading them.

  Raises:
    ValueError: if a text cannot be read.
  """
  counts = np.zeros(tokenizer.vocab_size, np.int64)
  texts = text_lib.read_documents(
    source, data.format, text_key=data.text_key, binary=data.binary, encoding=data.encoding,
    on_bad_row=data.on_bad_row,
  )  # fmt: skip
  for text in texts:
    ids, _ = tokenizer.encode_flat(
      tokenizer.as_running_text(text_lib.split_document(text, data.format))
    )
    counts += np.bincount(ids, minlength=len(counts))
  return counts


def run_config(workdir: str):
  """The config a run was started with, from its run.json, on top of the defaults of today."""
  path = epath.Path(workdir) / 'run.json'
  if not path.exists():
    raise ValueError(f'{workdir} holds no run: it has no run.json.')
  before = json.loads(path.read_text())['config']
  config = config_lib.finetuning() if 'task' in before else config_lib.pretraining()
  build.check_run(path.parent)
  fields = config_lib.flat(before)
  config_lib.add_stages(config, fields)
  known = config_lib.flat(config)
  if unknown := sorted(fields.keys() - known.keys()):
    _log.warning('%s: fields of another version are ignored: %s', path, ', '.join(unknown))
  config_lib.update(config, {k: v for k, v in fields.items() if k in known})
  return config


def _check_rows(workdir, identity: dict) -> None:
  """Text, vocabulary and base model must be those of the run; they may have changed since."""
  before = json.loads((epath.Path(workdir) / 'run.json').read_text())['identity']
  if any(before.get(name) != value for name, value in identity.items()):
    raise ValueError(
      f'the text, the vocabulary or the base model of {workdir} has changed since its run; '
      'evaluate its model/ with --model and --config instead.'
    )


def _choose(config, workdir, which: str):
  """The run's checkpoints, and the step of the one that is asked for."""
  folder = epath.Path(workdir) / 'checkpoints'
  checkpoints = Checkpoints(folder, keep=config.max_to_keep, read_only=True)
  steps = checkpoints.steps()
  if not steps:
    raise ValueError(f'{folder} holds no checkpoint yet.')
  named = {'best': checkpoints.best_step(), 'newest': steps[-1]} | {str(s): s for s in steps}
  if which not in named:
    raise ValueError(
      f'--checkpoint must be best, newest or one of the steps {steps}, got {which!r}.'
    )
  return checkpoints, named[which]


def _checkpoint_params(config, objective, mesh, checkpoints, step: int):
  layout = layout_lib.Layout(mesh, encoder.PARAM_AXES, config.seed, config.prng_impl)
  optimizer = build.make_optimizer(config, plan.make_schedule(config))
  abstract, _ = layout_lib.abstract_state(objective, optimizer, layout)
  state, _ = checkpoints.restore(step, abstract)
  return loop.trained_params(state)


def _directory_params(config, model, tokenizer, mesh):
  if config.objective == 'electra':
    raise ValueError(
      f'{model} is one model, and ELECTRA is a pair; evaluate its --workdir, or the generator '
      'with --config.objective=mlm.'
    )
  encoder_config, params = loading.load_weights(model)
  own = loading.load_tokenizer(model)
  if own.fingerprint != tokenizer.fingerprint:
    raise ValueError(
      f'{model} has another vocabulary than the prepared rows; prepare the text with '
      f'--config.data.vocab={loading.find_model(model)} '
      f'--config.data.lowercase={own.lowercase}.'
    )
  terms = build_objective.loss_terms(config)
  missing = [term for term in terms if term not in params]
  if missing:
    raise ValueError(f'{model} has no {missing} head; it has {sorted(params)}.')
  names = {'encoder', *terms, *(['pooler'] if config.nsp else [])}
  bert = heads.Bert(encoder_config, heads=terms, pooler=config.nsp)
  return bert, mesh_lib.replicate({name: params[name] for name in names}, mesh)
