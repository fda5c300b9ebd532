"""Pre-training on streamed text: interrupted, on other hosts, after a divergence, refused."""

import itertools
import json
import random
import signal
import time

import numpy as np
import pytest

from bertjax import pretrain
from bertjax.__main__ import main
from bertjax.data import remote
from bertjax.training import loop
from bertjax.training.checkpoint import Checkpoints
from bertjax.training.metrics import RunLog
from tests.data.test_remote import hub, table  # noqa: F401 (a fixture)
from tests.e2e import test_distributed as distributed
from tests.e2e.test_recovery import config_of
from tests.test_pretrain import QUIET, finish, losses, start, wait_for_step, weights

pytestmark = pytest.mark.full


def arguments(corpus, vocab, workdir, *more):
  return [
    'pretrain', '--config=bert_mini:smoke', f'--workdir={workdir}', '--config.data.streaming=True',
    f'--config.data.input={corpus}', f'--config.data.vocab={vocab}',
    '--config.data.heldout_fraction=0.2', '--config.learning_rate=3e-3', *more,
  ]  # fmt: skip


STAGES = ['--config.num_train_steps=90', '--config.stages[0].steps=54',
          '--config.stages[1].batch_size=16', *QUIET]  # fmt: skip


def test_an_interrupted_run_resumes_bitwise(corpus, vocab, tmp_path, monkeypatch):
  """Of two stages, one in one go and fed by tf.data."""
  fields = ['--config.num_train_steps=24', '--config.stages[0].steps=14', *STAGES[2:],
            '--config.save_every=5']  # fmt: skip
  loaders = {'whole': 'tfdata', 'cut': 'threads'}
  whole, cut = (
    arguments(corpus, vocab, tmp_path / name, *fields, f'--config.data.loader={loader}')
    for name, loader in loaders.items()
  )
  assert main(whole) == 0
  train, last = RunLog.train, random.randint(6, 23)

  def interrupted(self, now, *rest):
    if now == last:
      raise KeyboardInterrupt
    train(self, now, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(RunLog, 'train', interrupted)
    assert main(cut) == 130
  assert main(cut) == 0
  assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
  assert weights(tmp_path / 'cut') == weights(tmp_path / 'whole')


@pytest.fixture(scope='module')
def uninterrupted(corpus, vocab, tmp_path_factory):
  """Two stages in one go, fed by tf.data; both read the text more than once."""
  folder = tmp_path_factory.mktemp('uninterrupted')
  finish(start(arguments(corpus, vocab, folder, *STAGES, '--config.data.loader=tfdata')))
  return folder


@pytest.mark.slow  # smaller version: the interrupted run above
@pytest.mark.parametrize(
  ('kill', 'code'), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)]
)
def test_a_killed_run_resumes_bitwise(kill, code, uninterrupted, corpus, vocab, tmp_path):
  args = arguments(corpus, vocab, tmp_path, *STAGES, '--config.data.loader=threads')
  process = start(args)
  wait_for_step(process, tmp_path, random.randint(21, 80))
  process.send_signal(kill)
  finish(process, code)
  finish(start(args))
  assert losses(tmp_path) == losses(uninterrupted)
  assert weights(tmp_path) == weights(uninterrupted)


@pytest.mark.slow  # smaller version: batches of many hosts in tests/data/test_streaming.py
def test_two_processes_resume_as_one(corpus, vocab, tmp_path):
  """The batches of the steps after the resumption are those of two processes."""
  fields = {'data.input': str(corpus), 'data.vocab': str(vocab), 'data.streaming': True,
            'data.heldout_fraction': 0.2, 'max_to_keep': 9}  # fmt: skip
  whole = distributed.run(tmp_path / 'whole', '', 2, **fields)
  folder = tmp_path / 'run'
  codes, errors = distributed.finish(
    distributed.launch(folder, '', 2, fault='save 0,1 12', **fields)
  )
  assert codes == [-signal.SIGKILL] * 2, errors
  distributed.run(folder, '', 1, **fields)
  assert distributed.losses(folder) == pytest.approx(distributed.losses(whole), rel=2e-4)
  ends = [Checkpoints(f / 'run/checkpoints', read_only=True).meta(20)['position']
          for f in (whole, folder)]  # fmt: skip
  assert ends[0] == ends[1]
  assert list(ends[0]['groups']) == ['0', '1']


@pytest.mark.slow  # smaller version: a mixture of hosts in tests/data/test_streaming.py
def test_a_mixture_of_two_processes_resumes_bitwise_after_a_kill(documents, vocab, tmp_path):
  for number, text in enumerate(documents):
    folder = tmp_path / ('few' if number > 28 else 'many')
    folder.mkdir(exist_ok=True)
    (folder / f'{number}.txt').write_text(text)
  fields = {'data.input': f'many={tmp_path}/many,few={tmp_path}/few', 'data.vocab': str(vocab),
            'data.mixture': 'many=0.75,few=0.25', 'data.streaming': True,
            'data.heldout_fraction': 0.2}  # fmt: skip
  whole = distributed.run(tmp_path / 'whole', '', 2, **fields)
  folder = tmp_path / 'run'
  codes, errors = distributed.finish(
    distributed.launch(folder, '', 2, fault='kill 0,1 18', **fields)
  )
  assert codes == [-signal.SIGKILL] * 2, errors
  kept = distributed.checkpoint_steps(folder)[-1]
  distributed.run(folder, '', 2, **fields)
  expected, resumed = distributed.batches(whole, 2), distributed.batches(folder, 2)
  assert min(resumed) == kept > 0
  for step in range(kept, distributed.STEPS):
    np.testing.assert_array_equal(resumed[step], expected[step])
  assert distributed.losses(folder) == distributed.losses(whole)


@pytest.mark.slow  # smaller version: a truncated shard in tests/data/test_streaming.py
def test_a_shard_that_one_process_cannot_read_ends_both(corpus, vocab, tmp_path):
  fields = {'data.input': str(corpus), 'data.vocab': str(vocab), 'data.streaming': True,
            'data.heldout_fraction': 0.2}  # fmt: skip
  processes = distributed.launch(tmp_path / 'run', '', 2, fault='fail 1 9', **fields)
  assert any('ValueError: a.jsonl can no longer be read.' in line for line in processes[1].stderr)
  start = time.monotonic()
  codes, _ = distributed.finish(processes)
  assert codes[0] != 0 and codes[1] == 1
  assert time.monotonic() - start < 200  # jax's own end waits 300 s for the other process


@pytest.mark.slow  # smaller versions: test_recovery.py, and tests/data/test_streaming.py
def test_a_divergence_skips_batches_of_the_stream(corpus, vocab, tmp_path, monkeypatch):
  """After it, batches continue behind those since the checkpoint."""
  make_train_step, seen = loop.make_train_step, []

  def make(*args, **kwargs):
    step, calls = make_train_step(*args, **kwargs), itertools.count()

    def noting(state, batch):
      seen.append(np.asarray(batch['input_ids']))
      state, metrics = step(state, batch)
      return state, metrics | ({'loss': np.float32('nan')} if next(calls) == 13 else {})

    return noting

  monkeypatch.setattr(loop, 'make_train_step', make)
  text = {'data.input': str(corpus), 'data.vocab': str(vocab), 'data.streaming': True,
          'data.heldout_fraction': 0.2}  # fmt: skip
  pretrain.run(config_of('', **text), workdir=str(tmp_path / 'skipping'))
  skipping = seen.copy()
  seen.clear()
  monkeypatch.setattr(loop, 'make_train_step', make_train_step)
  monkeypatch.setattr(loop, 'make_train_step', lambda *a, **k: _noting(make_train_step, seen, a, k))
  pretrain.run(config_of('', **text, num_train_steps=24), workdir=str(tmp_path / 'plain'))
  np.testing.assert_array_equal(skipping[-10:], seen[14:24])  # 4 batches are skipped
  meta = Checkpoints(tmp_path / 'skipping/checkpoints', read_only=True).meta(20)
  assert meta['position']['batch'] == 24


def _noting(make_train_step, seen, args, kwargs):
  step = make_train_step(*args, **kwargs)

  def noting(state, batch):
    seen.append(np.asarray(batch['input_ids']))
    return step(state, batch)

  return noting


@pytest.fixture
def on_hub(hub, documents):  # noqa: F811
  """me/texts of the hub, with two files; push() moves its main to another commit."""
  files = {f'train-0000{i}-of-00002.parquet': table(documents[i::2], group=5) for i in (0, 1)}
  hub.files['me/texts', 'main'] = files

  def push():
    hub.push('me/texts', dict.fromkeys(files, table(documents[::-1], group=5)))
    remote.list_data_set.cache_clear()  # as in a new process

  return push


@pytest.mark.parametrize(
  ('streamed', 'source'), [(True, 'hf:me/texts:train'), (False, 'hf:me/texts@main')]
)
def test_a_run_resumes_with_the_commit_it_was_started_with(
  streamed, source, on_hub, vocab, tmp_path, capsys
):
  """The same command, after the repository has moved; prepared rows are found in the cache."""
  args = arguments(source, vocab, tmp_path / 'half', '--config.schedule=constant', *QUIET,
                   '--config.data.loader=threads',
                   f'--config.data.cache_dir={tmp_path}/cache')  # fmt: skip
  args = args if streamed else [arg for arg in args if 'streaming' not in arg]
  assert main([*args, f'--workdir={tmp_path}/whole']) == 0
  assert main([*args, '--config.num_train_steps=10']) == 0
  on_hub()
  assert main(args) == 0
  on_hub()
  assert losses(tmp_path / 'half') == losses(tmp_path / 'whole')
  assert main(['evaluate', f'--workdir={tmp_path}/half', '--checkpoint=newest']) == 0
  assert len(list((tmp_path / 'cache').glob('*'))) == (0 if streamed else 1)
  (newest,) = set(remote.pin(source, {})[1].values())
  capsys.readouterr()
  other = [arg.replace(source, f'{source.partition("@")[0]}@{newest}') for arg in args]
  assert main([*other, '--config.num_train_steps=30']) == 2
  assert newest in capsys.readouterr().err


def test_a_changed_source_is_refused(corpus, vocab, tmp_path, capsys):
  folder = tmp_path / 'texts'
  folder.mkdir()
  for path in corpus.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  args = arguments(folder, vocab, tmp_path / 'run', *QUIET)
  assert main(args) == 0
  (folder / 'more.txt').write_text('One more document. It has two sentences.')
  assert main([*args, '--config.num_train_steps=30']) == 2
  assert 'data.input: 40 shards' in capsys.readouterr().err


@pytest.mark.parametrize(('fields', 'words'), [
  (['--config.data.prepared=rows'], 'data.streaming=True reads raw text'),
  (['--config.data.dupe_factor=5'], 'data.dupe_factor=5 is for prepared rows'),
  (['--config.data.vocab='], 'data.vocab is empty'),
])  # fmt: skip
def test_a_mistake_gets_one_sentence(corpus, vocab, tmp_path, capsys, fields, words):
  assert main(arguments(corpus, vocab, tmp_path / 'run', *fields)) == 2
  error = capsys.readouterr().err
  assert words in error
  assert 'Traceback' not in error


def test_an_empty_source_gets_one_sentence(vocab, tmp_path, capsys):
  (tmp_path / 'empty.jsonl').write_text('\n')
  fields = '--config.data.format=jsonl'
  assert main(arguments(tmp_path / 'empty.jsonl', vocab, tmp_path / 'run', fields)) == 2
  assert 'no record can be made of the held-out documents' in capsys.readouterr().err


def test_a_run_records_its_position_and_is_evaluated_on_the_same_rows(
  corpus, vocab, tmp_path, capsys
):
  assert main(arguments(corpus, vocab, tmp_path)) == 0
  capsys.readouterr()
  assert main(['evaluate', f'--workdir={tmp_path}', '--checkpoint=newest']) == 0
  found, wanted = (
    json.loads(text) for text in (capsys.readouterr().out, (tmp_path / 'metrics.json').read_text())
  )
  assert found.pop('unigram_cross_entropy') > 0
  assert found == pytest.approx(wanted, rel=1e-5)
  meta = Checkpoints(tmp_path / 'checkpoints', read_only=True).meta(20)
  assert json.loads(json.dumps(meta['position']))['batch'] == 20
  assert meta['position']['groups']['0']['taken'] > 0
