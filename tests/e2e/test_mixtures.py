"""Pre-training on mixtures: prepared and streamed, evaluated by source, resumed, refused."""

import json

import numpy as np
import pytest

from bertjax.__main__ import main
from bertjax.data.mixture import Mixture
from bertjax.training.metrics import read_metrics
from tests.test_pretrain import QUIET, losses

pytestmark = pytest.mark.full

TINY = ['--config=bert_mini:smoke,no_nsp', '--config.data.heldout_fraction=0.2',
        '--config.num_train_steps=20', '--config.learning_rate=3e-3']  # fmt: skip
MIXTURE = '--config.data.mixture=many=0.75,few=0.25'


@pytest.fixture(scope='module')
def sources(documents, tmp_path_factory):
  """Two folders of texts."""
  folder = tmp_path_factory.mktemp('sources')
  for name, part in (('many', documents[:28]), ('few', documents[28:])):
    (folder / name).mkdir()
    for number, text in enumerate(part):
      (folder / name / f'{number:02d}.txt').write_text(text)
  return {name: folder / name for name in ('many', 'few')}


@pytest.fixture(scope='module')
def rows(sources, vocab, tmp_path_factory):
  folder = tmp_path_factory.mktemp('mixture')
  for name, texts in sources.items():
    args = [f'--out={folder / name}', f'--input={texts}', f'--vocab={vocab}', '--workers=0']
    assert main(['prepare', *TINY, *args]) == 0
  return {name: folder / name for name in sources}


def named(paths) -> str:
  return ','.join(f'{name}={path}' for name, path in paths.items())


@pytest.fixture(scope='module')
def run(rows, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  args = [*TINY, f'--workdir={workdir}', f'--config.data.prepared={named(rows)}', MIXTURE]
  assert main(['pretrain', *args]) == 0
  return workdir, args


def test_losses_and_epochs_are_logged_by_source(run, rows):
  workdir, _ = run
  logged = read_metrics(workdir)
  train = [row for row in logged if row['kind'] == 'train'][-1]
  used = Mixture({'many': 0.75, 'few': 0.25}, seed=0).used(20 * 8)
  for name, folder in rows.items():
    size = json.loads((folder / 'manifest.json').read_text())['counts']['train_rows']
    assert train[f'epoch/{name}'] == pytest.approx(used[name] / size)
  evaluation = [row for row in logged if row['kind'] == 'eval'][-1]
  by_source = evaluation['mlm_loss/many'], evaluation['mlm_loss/few']
  assert min(by_source) <= evaluation['mlm_loss'] <= max(by_source)


def test_the_loss_of_a_source_is_that_of_a_run_on_its_rows(run, rows, capsys):
  workdir, _ = run
  scores = json.loads((workdir / 'metrics.json').read_text())
  for name, folder in rows.items():
    capsys.readouterr()
    assert main(['evaluate', *TINY, f'--model={workdir}/model',
                 f'--config.data.prepared={folder}']) == 0  # fmt: skip
    single = json.loads(capsys.readouterr().out)
    assert scores[f'mlm_loss/{name}'] == pytest.approx(single['mlm_loss'], rel=1e-5)
  assert main(['evaluate', f'--workdir={workdir}', '--checkpoint=newest']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['mlm_loss/few'] == pytest.approx(scores['mlm_loss/few'], rel=1e-5)
  assert np.isfinite(found['unigram_cross_entropy'])


def test_another_mixture_is_another_run(run, capsys):
  _, args = run
  other = [*args[:-1], '--config.data.mixture=many=0.5,few=0.5', '--config.num_train_steps=30']
  assert main(['pretrain', *other]) == 2
  assert 'data.mixture: many=0.75,few=0.25 there, many=0.5,few=0.5 here' in capsys.readouterr().err


def test_a_streamed_mixture_resumes_bitwise(sources, vocab, tmp_path):
  args = [*TINY, '--config.data.streaming=True', f'--config.data.input={named(sources)}', MIXTURE,
          f'--config.data.vocab={vocab}', '--config.schedule=constant', *QUIET]  # fmt: skip
  whole, half = tmp_path / 'whole', tmp_path / 'half'
  assert main(['pretrain', *args, f'--workdir={whole}']) == 0
  for steps in (10, 20):
    fields = [f'--workdir={half}', f'--config.num_train_steps={steps}']
    assert main(['pretrain', *args, *fields]) == 0
  assert losses(half) == losses(whole)
  scores = json.loads((half / 'metrics.json').read_text())
  assert {'mlm_loss/many', 'mlm_loss/few'} <= scores.keys()


def test_mistakes_get_one_sentence(rows, sources, vocab, tiny_rows, tmp_path, capsys):
  def fails(*args, verb='pretrain', out='--workdir'):
    assert main([verb, *TINY, f'{out}={tmp_path / "none"}', *args]) == 2
    error = capsys.readouterr().err
    assert 'Traceback' not in error
    return error

  prepared = f'--config.data.prepared={named(rows)}'
  assert "did you mean 'few'" in fails(prepared, '--config.data.mixture=many=0.5,fex=0.5')
  assert 'their sum 1' in fails(prepared, '--config.data.mixture=many=0.5,few=0.4')
  for used in ([prepared, MIXTURE], [f'--config.data.prepared={rows["few"]}']):
    assert 'leave it 1.0' in fails(*used, '--config.data.mixture_exponent=0.7')
  unnamed = fails(f'--config.data.prepared={rows["few"]}', MIXTURE)
  assert 'has no names' in unnamed
  assert 'prepare writes the records of one source' in fails(
    f'--input={named(sources)}', f'--vocab={vocab}', verb='prepare', out='--out'
  )
  other = f'--config.data.prepared=many={rows["many"]},few={tiny_rows}'
  assert 'data.kind=nsp' in fails(other, MIXTURE)
