"""The command: one sentence for each mistake, the flags of every verb, what a model may be."""

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from bertjax import config as config_lib
from bertjax import evaluate, finetune, io
from bertjax.__main__ import main, parse
from bertjax.flags import ALIASES, VERBS
from bertjax.inference.predictor import CALLS, Predictor
from bertjax.interop import loading
from bertjax.training import run as run_lib
from tests.models import model


@pytest.fixture(scope='module')
def run(tmp_path_factory, vocab):
  """The workdir of a finished fine-tuning run, as far as programs that take a model read it."""
  folder = tmp_path_factory.mktemp('run')
  bert, params, tokenizer = model(vocab, 'classification')
  loading.save_model(folder / 'model', bert, params, tokenizer, labels=['bad', 'good'])
  (folder / 'run.json').write_text('{}')
  return folder


def test_a_workdir_is_a_model(run, tmp_path):
  assert loading.find_model(str(run)) == run / 'model'
  assert loading.find_model(run / 'model') == run / 'model'
  assert loading.find_model('bert-base-uncased') == 'bert-base-uncased'
  config, params = loading.load_weights(str(run))
  assert config.num_layers == 4 and 'classification' in params
  assert loading.read_labels(run)[0] == ['bad', 'good']
  assert loading.load_tokenizer(run).fingerprint
  (tmp_path / 'run.json').write_text('{}')
  with pytest.raises(ValueError, match='has no complete checkpoint; once the run'):
    loading.load_model(tmp_path)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      'finetune --config=bert_base',
      r'bert_base is a recipe for pretrain; finetune takes choice, ',
    ),
    ('pretrain --config=glue', r'is a recipe for finetune; pretrain takes albert_base, bert_base'),
    ('compile --config=glue --topology=v5e:2x2', r'glue is a recipe for finetune; compile takes'),
    ('finetune --help --config=bert_base', r'bert_base is a recipe for pretrain'),
    (
      'quickstart --config=glue',
      r'is a recipe for finetune; quickstart takes albert_base, bert_base',
    ),
    ('pretrain --config=setup.cfg', r'setup.cfg is no recipe; a recipe is a Python file'),
    ('quickstart --workdir=', r'quickstart needs --workdir'),
    pytest.param(  # after a vocabulary is trained
      'quickstart --workdir=setup.cfg',
      r'setup.cfg.* there is a file where a directory is needed',
      marks=pytest.mark.e2e,
    ),
    (
      'pretrain --workdir=w --num_processes=2',
      r'--num_processes=2 and --process_id=-1 need --coord',
    ),
    ('prepare --config=table --out=p', r'no model is named'),
    ('prepare --out=p --workers=-7', r'--workers must be at least -1, got -7'),
    ('vocab --input=x --out=v.txt --workers=-3', r'--workers must be at least -1, got -3'),
    ('explain --model=m --out= text', r"--out must be a local file such as explain.html, got ''"),
    ('predict --config=glue --model=m a', r'unknown flag --config; known are --model'),
    ('export --config.batch_size=3', r'unknown flag --config.batch_size; known are --model'),
    ('vocab --config bert_base', r'unknown flag --config; known'),
    ('pretrain --learning_rate=1', r'--learning_rate, did you mean --config.learning_rate; known'),
    ('explain --model=m --to=x a', r'unknown flag --to, did you mean --out; known are'),
    ('convert --from=m --to=x', r'unknown flag --to, did you mean --out; known are'),
    ('convert --from=m --case=keep', r'did you mean --lowercase;'),
    ('convert --from=m --step=3', r'did you mean --checkpoint;'),
    ('export --output=span', r'unknown flag --output, did you mean --head;'),
    ('export --model=m --out=o --head=mlm --pooling=cls', r'--head=mlm and --pooling=cls exclude'),
    ('predict --output=a.jsonl', r'unknown flag --output, did you mean --out;'),
    ('vocab --case=keep', r'unknown flag --case, did you mean --lowercase;'),
    ('vocab --lowercase=keep', r"--lowercase takes bool, such as True; got 'keep'"),
    ('vocab --report=report.json', r"--report takes bool, such as True; got 'report.json'"),
    ('evaluate --which=newest', r'unknown flag --which, did you mean --checkpoint;'),
    ('evaluate --rows=3', r'unknown flag --rows, did you mean --max_eval_examples;'),
    ('quickstart --recipe=quickstart', r'unknown flag --recipe, did you mean --config;'),
    ('quickstart --seed=1', r'unknown flag --seed, did you mean --config.seed;'),
    ('serve --warm_up=2', r"--warm_up takes bool, such as True; got '2'"),
    ('pretrain --coordinator=a:1', r'did you mean --coordinator_address;'),
    ('finetune --processes=2', r'did you mean --num_processes;'),
    ('evaluate --process=2', r'did you mean --process_id;'),
    ('finetune --num_train_epochs=3', r'did you mean --config.num_train_epochs;'),
    ('pretrain --num_train_epochs=3', r'did you mean --config.num_train_steps;'),
    ('finetune --per_device_train_batch_size 8', r'did you mean --config.batch_size;'),
    ('finetune --max_seq_length=64', r'did you mean --config.data.length;'),
    ('finetune --output_dir=x', r'did you mean --workdir;'),
    ('export --output_dir=x', r'did you mean --out;'),
    ('vocab --output_file=x', r'did you mean --out;'),
    ('finetune --model_name_or_path=x', r'did you mean --config.init_from;'),
    ('predict --model_name_or_path=x', r'did you mean --model;'),
    ('convert --model_name_or_path=x', r'did you mean --from;'),
    (
      'finetune --config.epochs=3',
      r"no field 'epochs', did you mean --config",
    ),
    ('finetune --config.max_seq_length=3', r'did you mean --config.data.length'),
    ('pretrain --config.lenght=3', r'did you mean --config.data.length'),
    ('pretrain --config.data.lenght=3', r'did you mean --config.data.length'),
    (
      'pretrain --config.num_train_steps=many',
      r"--config.num_train_steps takes int, such as 40000; got 'many'",
    ),
    ('pretrain --config.num_train_steps', r'[Mm]issing value for .*--config.num_train_steps'),
    ('pretrain --config', r'--config needs a recipe'),
    ('predict --batch_size=x', r"--batch_size takes int, such as 32; got 'x'"),
    ('convert --from=m --out=c --gelu=x', r"--gelu is 'erf' or 'tanh', got 'x'"),
    ('predict --model', r'[Mm]issing value for flag --model'),
  ],
)
def test_a_wrong_flag_gets_one_sentence(arguments, message, capsys):
  assert main(arguments.split()) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert re.search(message, line), line


def test_every_alias_is_a_flag_or_a_field_somewhere():
  known = set(config_lib.PRETRAINING) | set(config_lib.FINETUNING)
  for verb in VERBS:
    known |= set(VERBS[verb].flags)
  assert {ours for names in ALIASES.values() for ours in names} <= known


@pytest.mark.parametrize(
  ('body', 'message'),
  [
    (
      'config.data.lenght = 64',
      r"line 4: the config has no field 'lenght', did you mean data.length",
    ),
    ('config.epochs = 2', r"no field 'epochs', did you mean num_train_epochs"),
    ('print(config.data.lenght)', r"line 4: the config has no field 'lenght', did you mean data.l"),
    ("config.update_from_flattened_dict({'data.lenght': 64})", r'did you mean data.length'),
    ("config.update_from_flattened_dict({'dat.length': 64})", r"'dat.length', did you mean data.l"),
    ("config.update({'data': {'lenght': 64}})", r'did you mean data.length'),
    ("config['lenght'] = 64", r"no field 'lenght', did you mean data.length"),
    ("config.batch_size = '32'", r'line 4: batch_size takes int, got str 32'),
    ('config.batch_size = 32.0', r'line 4: batch_size takes int, got float 32.0'),
    ("config.update_from_flattened_dict({'data.length': 'x'})", r'length takes int, got str x'),
    ('config.data = 3', r'data takes ConfigDict, got int 3'),
    ('config.batch_size = None', r'batch_size takes int, such as 32; got None'),
    ('config.batch_size = True', r'batch_size takes int, such as 32; got True'),
    ('config.unlock().data.extra = 1', r"has no field 'data.extra'"),
    ('return {}', r'get_config must return a config'),
    ('return None', r'get_config must return a config'),
    ('config.num_train_epochs = epochz', r"line 4: NameError: name 'epochz' is not defined"),
    ('config.num_train_epochs = = 3', r'line 4: SyntaxError: invalid syntax'),
    ("raise ValueError('say why')", r'say why'),
  ],
)
def test_a_mistake_in_a_recipe_gets_one_sentence(body, message, tmp_path, capsys):
  recipe = tmp_path / 'mine.py'
  recipe.write_text(
    'from bertjax.config import finetuning\n'
    "def get_config(arg=''):\n"
    '  config = finetuning()\n'
    f'  {body}\n'
    '  return config\n'
  )
  assert main(['finetune', f'--config={recipe}', f'--workdir={tmp_path}/run']) == 2
  [line] = capsys.readouterr().err.splitlines()
  assert re.search(message, line), line
  assert not (tmp_path / 'run').exists()


def test_a_recipe_without_get_config_is_named(tmp_path, capsys):
  (tmp_path / 'mine.py').write_text('x = 1\n')
  assert main(['pretrain', f'--config={tmp_path}/mine.py']) == 2
  assert 'get_config' in capsys.readouterr().err


@pytest.mark.e2e
def test_predict_takes_a_workdir_and_the_task_of_its_only_head(
  run, vocab, tmp_path, capsys, caplog
):  # fmt: skip
  assert main(['predict', f'--model={run}', '--text=the name']) == 0
  printed = capsys.readouterr().out
  expected = Predictor.from_dir(run / 'model').classify('the name')
  assert json.loads(printed)['scores'] == pytest.approx(expected.scores, abs=1e-5)
  assert f'--do=classify, by the only head of {run}' in caplog.messages
  loading.save_model(tmp_path / 'bare', *model(vocab))
  assert main(['predict', f'--model={tmp_path}/bare', '--text=the name']) == 0
  assert len(json.loads(capsys.readouterr().out)) == 32  # a vector
  loading.save_model(tmp_path / 'two', *model(vocab, 'mlm', 'nsp'))
  assert main(['predict', f'--model={tmp_path}/two', '--text=the [MASK]']) == 2
  assert 'has the heads mlm, nsp; choose fill_mask, infill' in capsys.readouterr().err


def test_a_run_of_another_version_is_read_and_unknown_fields_are_named(tmp_path, caplog):
  fields = config_lib.pretraining().to_dict() | {'num_train_steps': 7, 'gone': 1}
  fields['data'] |= {'lenght': 3}
  (tmp_path / 'run.json').write_text(json.dumps({'config': fields}))
  config = evaluate.run_config(str(tmp_path))
  assert (
    config.num_train_steps == 7
    and config.to_dict().keys() == config_lib.pretraining().to_dict().keys()
  )
  assert 'fields of another version are ignored: data.lenght, gone' in caplog.text


DIALECT = (
  r'tells?|told|goes on|go on|by itself|of its own|drawn|afresh|anew|sees|whoever|share of|pieces|'
  r'slots'
)


def help_texts():
  """(name, help) of every flag, field and word of every verb."""
  for verb, (summary, flags, *_) in VERBS.items():
    yield verb, summary
    for flag, (_, text) in flags.items():
      yield f'{verb} --{flag}', text
  for table in (config_lib.PRETRAINING, config_lib.FINETUNING):
    for field, (_, text) in table.items():
      yield f'--config.{field}', text
  yield from config_lib.WORDS.items()


@pytest.mark.parametrize(
  ('verb', 'short'), [(verb, short) for verb in VERBS for short in VERBS[verb].short]
)
def test_a_short_flag_sets_its_field(verb, short):
  field = VERBS[verb].short[short]
  recipe = 'table' if field in config_lib.FINETUNING else 'bert_mini'
  recipe = VERBS[verb].flags['config'][0] if VERBS[verb].recipes else recipe
  config = parse(verb, [f'--config={recipe}', f'--{short}=x'])['config']
  assert config_lib.flat(config)[field] == 'x'


def test_short_flags_name_ones_own_data():
  arguments = ['--config=table', '--train_file=~/a.csv', '--dev_file', 'b.csv', '--text=review',
               '--label=stars', '--model=M', '--workdir=w']  # fmt: skip
  config = parse('finetune', arguments)['config']
  assert config.data.train_file == f'{pathlib.Path.home()}/a.csv' and config.init_from == 'M'
  assert (config.data.dev_file, config.task.text, config.task.label) == ('b.csv', 'review', 'stars')


def test_a_refused_resumption_names_the_flag_that_was_typed(tmp_path, monkeypatch, capsys):
  def check(config, workdir, **_):
    rows = hashlib.sha256(config.data.train_file.encode()).hexdigest()
    identity = {'rows': rows, 'batch_size': config.batch_size, 'init_from': config.init_from}
    run_lib.check_same(workdir, identity, config.to_dict())
    (tmp_path / 'checkpoints' / '4').mkdir(parents=True, exist_ok=True)
    content = {'identity': identity, 'config': config.to_dict()}
    (tmp_path / 'run.json').write_text(json.dumps(content))

  monkeypatch.setattr(finetune, 'run', check)
  start = ['finetune', '--config=table', f'--workdir={tmp_path}', '--train_file=a.csv']
  assert main(start) == 0
  assert main([*start, '--config.log_every=3']) == 0  # may change
  more = ['--train_file=b.csv', '--config.batch_size', '8', '--config.log_every=4', '--model=m']
  assert main([*start, *more]) == 2
  error = capsys.readouterr().err
  for change in ('--train_file: a.csv there, b.csv here', '--config.batch_size: 32 there, 8 here',
                 '--model:  there, m here'):  # fmt: skip
    assert f'{change}, ' in error or f'{change})' in error, error
  assert 'log_every' not in error and 'data.train_file' not in error
  assert main([*start[:-1], '--config.data.train_file=b.csv']) == 2
  assert '--config.data.train_file: a.csv there, b.csv here' in capsys.readouterr().err


def test_every_help_text_can_be_read_separately():
  for name, text in help_texts():
    assert len(text) > 3 and not text.endswith('.'), name
    assert not re.match(
      r'(or|of|and|two|by|not|instead|also|in place|for|True|False|it)\b', text
    ), name
    assert not re.search(rf'\b({DIALECT})\b', text), f'{name}: {text}'
    assert text.count('(') == text.count(')'), name


def test_a_flag_means_the_same_in_every_verb():
  types = {}
  for verb in VERBS.values():
    for flag, (default, _) in verb.flags.items():
      types.setdefault(flag, set()).add(type(default))
  assert {flag for flag, kinds in types.items() if len(kinds) > 1} == {
    'checkpoint', 'lowercase'  # best, newest or a step; and true, false or as the files say
  }  # fmt: skip


@pytest.mark.parametrize('verb', VERBS)
def test_help_lists_every_flag_and_field_and_imports_no_jax(verb):
  code = (
    'import sys\n'
    'from bertjax.__main__ import main\n'
    f'assert main([{verb!r}, "--help"]) == 0\n'
    "heavy = {'jax', 'flax', 'optax', 'tensorflow', 'torch', 'transformers', 'pyarrow', 'numpy'}\n"
    'print(sorted(heavy & sys.modules.keys()), file=sys.stderr)'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '[]\n')
  lines = done.stdout.splitlines()
  flags = [line for line in lines if re.match(r'  --(?!config\.)\w+=', line)]
  assert [re.match(r'  --(\w+)=', line)[1] for line in flags] == list(VERBS[verb].flags)
  assert all(len(line.split(None, 1)) == 2 for line in lines if line.startswith('  --'))
  assert 'Raises:' not in done.stdout and 'Args:' not in done.stdout
  fields = [line for line in lines if line.startswith('  --config.')]
  expected = 0
  if recipe := VERBS[verb].flags.get('config'):
    expected = len(config_lib.flat(config_lib.load_recipe(recipe[0] or 'bert_mini')))
  assert len(fields) == expected


def test_the_overview_imports_nothing_heavy():
  code = (
    'import sys\n'
    'from bertjax.__main__ import main\n'
    'assert main(["--help"]) == 0\n'
    "heavy = {'jax', 'absl', 'ml_collections', 'numpy', 'tensorflow', 'etils'}\n"
    'print(sorted(heavy & sys.modules.keys()), file=sys.stderr)'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '[]\n')
  assert all(f'  {verb} ' in done.stdout for verb in VERBS)


def test_a_wrong_flag_is_refused_before_jax_is_imported():
  code = (
    'import sys\n'
    'from bertjax.__main__ import main\n'
    'assert main(["finetune", "--config.lenght=3"]) == 2\n'
    "assert 'jax' not in sys.modules and 'tensorflow' not in sys.modules"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_pretraining_loads_no_statistics():
  code = "import sys, bertjax.pretrain; assert 'scipy.stats' not in sys.modules"
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.e2e
def test_predict_imports_little_and_compiles_one_program_which_the_next_start_reads(run, tmp_path):
  code = (
    'import collections, sys\n'
    'from bertjax import __main__, io\n'
    'io.use_compilation_cache()\n'
    'import jax\n'
    'events = collections.Counter()\n'
    'jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))\n'
    'assert __main__.main(sys.argv[1:]) == 0\n'
    "counts = [events[f'/jax/compilation_cache/cache_{what}'] for what in ('misses', 'hits')]\n"
    "heavy = {'tensorflow', 'torch', 'optax', 'orbax', 'scipy', 'matplotlib', 'pyarrow',\n"
    "         'huggingface_hub', 'ml_collections', 'tensorboardX', 'flax.nnx'}\n"
    'print(*counts, *sorted(heavy & sys.modules.keys()), file=sys.stderr)'
  )
  env = {name: value for name, value in os.environ.items() if 'CACHE' not in name}
  env |= {'BERTJAX_CACHE': str(tmp_path)}
  for expected in ('1 0', '0 1'):
    done = subprocess.run(
      [sys.executable, '-c', code, 'predict', f'--model={run}', 'the name'],
      capture_output=True, text=True, env=env, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, expected)
  assert len(list((tmp_path / 'compiled').glob('*/*-cache'))) == 1


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
@pytest.mark.parametrize('setting, reused', [({}, True), ({'MALLOC_ARENA_MAX': '2'}, False)])
def test_large_blocks_are_reused_unless_the_environment_has_settings(setting, reused):
  """The second block of a size needs no new pages, also in a thread, as in XLA's steps."""
  code = (
    'import resource, threading, numpy as np\n'
    'from bertjax import io\n'
    'io.reuse_memory()\n'
    'for _ in range(2):\n'
    '  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
    '  thread = threading.Thread(target=lambda: np.full(10_000_000, 1.0).sum())\n'
    '  thread.start(), thread.join()\n'
    'print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)'
  )
  env = {name: value for name, value in os.environ.items() if 'MALLOC' not in name}
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    env=env | setting | {'NUMPY_MADVISE_HUGEPAGE': '0'},
  )
  pages = 80_000_000 / os.sysconf('SC_PAGE_SIZE')
  assert (int(done.stdout) < pages / 20) == reused


@pytest.mark.parametrize('cache', ['file', 'gs://bucket/cache'])
def test_without_a_folder_to_write_to_there_is_no_compilation_cache(cache, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('BERTJAX_CACHE', cache)
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  io.use_compilation_cache()
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_the_help_of_do_lists_every_prediction():
  [_, text] = VERBS['predict'].flags['do']
  assert list(CALLS) == re.findall(r'\w+', text.partition(':')[2].partition(';')[0])


def test_help_of_a_recipe_shows_its_values(capsys):
  assert main(['pretrain', '--config=bert_mini', '--help']) == 0
  text = capsys.readouterr().out
  assert '  --config.batch_size=16 ' in text and '  size_LAYERS_WIDTH_HEADS' in text
  assert main(['evaluate', '--config=squad', '--help']) == 0
  text = capsys.readouterr().out
  assert '  --config.data.length=384 ' in text and 'Recipes: choice, ' in text


def test_an_import_of_tensorflow_leaves_its_remarks_off_the_console(capfd):
  with io.without_remarks():
    os.write(2, b'WARNING: All log messages before absl::InitializeLog() are written to STDERR\n')
    os.write(2, b'I0000 00:00:1795635681.518418   29732 port.cc:153] oneDNN is on.\n')
    os.write(2, b'E0000 00:00:1795635681.518418   29732 cuda.cc:15] no driver\n')
    os.write(2, b'a warning\n')
  assert capfd.readouterr().err.splitlines() == [
    'E0000 00:00:1795635681.518418   29732 cuda.cc:15] no driver', 'a warning'
  ]  # fmt: skip


@pytest.mark.full
def test_the_console_has_only_our_lines(run, tmp_path):
  """With TensorFlow, which Google's files need, and JAX's and orbax's loggers."""
  pytest.importorskip('tensorflow')
  source, target = tmp_path / 'google', tmp_path / 'hf'
  for arguments, last in (
    ([f'--from={run}', f'--out={source}', '--format=google'], f'written to {source}: '),
    ([f'--from={source}', f'--out={target}'], f'written to {target}: '),
  ):
    done = subprocess.run(
      [sys.executable, '-m', 'bertjax', 'convert', *arguments],
      capture_output=True, text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not re.search(r'(?m)^([IWEF]\d{4} |WARNING|absl)|\.cc:\d+|oneDNN', done.stderr)
    assert done.stderr.splitlines()[-1].startswith(last)


def test_a_closed_pipe_ends_a_command_silently():
  """As in `bertjax pretrain --help | head -1`."""
  command = [sys.executable, '-m', 'bertjax', 'pretrain', '--help']
  read, write = os.pipe()
  os.close(read)
  ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
  os.close(write)
  assert (ended.returncode, ended.stderr) == (141, b'')
