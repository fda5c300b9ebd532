"""Configs: the stages of a run and what is refused about them."""

import jax
import numpy as np
import pytest

from bertjax import build
from bertjax import config as config_lib
from bertjax import plan as plan_lib
from bertjax.__main__ import main, parse
from bertjax.config import stage
from bertjax.data import mixture
from bertjax.fields import REPLACED


def plan(*sections, **fields):
  config = config_lib.pretraining('tiny')
  config.update(num_train_steps=1000, batch_size=64, stages=sections, **fields)
  return plan_lib.stages(config)


def test_a_stage_takes_missing_fields_from_the_run():
  first, second, third = plan(
    stage(), stage(steps=200, length=256, max_predictions=-1, mask_rate=0.3),
    stage(steps=100, batch_size=32),
  )  # fmt: skip
  assert [(s.name, s.label, s.start, s.stop) for s in (first, second, third)] == [
    ('stages[0]', '1 of 3', 0, 700), ('stages[1]', '2 of 3', 700, 900),
    ('stages[2]', '3 of 3', 900, 1000),
  ]  # fmt: skip
  sizes = [(s.config.data.length, s.config.batch_size) for s in (first, second, third)]
  assert sizes == [(128, 64), (256, 64), (128, 32)]
  masks = [(s.config.masking.rate, s.config.masking.max_predictions) for s in (second, third)]
  assert masks == [(0.3, 77), (0.15, 20)]


def test_a_run_without_stages_is_one_without_a_name():
  (only,) = plan()
  assert (only.name, only.start, only.stop) == ('', 0, 1000)


def test_stage_fields_are_flags():
  flags = [
    '--config=bert_mini:two_lengths',
    '--config.stages[1].length=256',
    '--config.stages[2].steps=2_000',  # the next number adds a stage
    '--config.stages[2].mask_rate', '0.05',
  ]  # fmt: skip
  config = parse('pretrain', flags)['config']
  stages = plan_lib.stages(config)
  assert [s.stop for s in stages] == [34_000, 38_000, 40_000]
  assert [s.config.data.length for s in stages] == [128, 256, 128]
  assert stages[2].config.masking.rate == 0.05
  assert stages[1].config.masking.max_predictions == 76  # the paper's


def test_num_train_steps_0_is_the_sum_of_the_stages():
  config = config_lib.pretraining('tiny')
  config.update(num_train_steps=0, stages=(stage(steps=30), stage(steps=12)))
  assert plan_lib.stages(config)[-1].stop == config.num_train_steps == 42


def test_words_of_stages_are_relative_to_the_other_words():
  for words in ('smoke,two_lengths', 'two_lengths,smoke'):
    config = config_lib.load_recipe(f'bert_base:{words}')
    first, second = plan_lib.stages(config)
    assert (second.start, second.stop, second.config.data.length) == (18, 20, 256)
    assert config.model.max_positions == 256 and first.config.data.length == 64


def test_the_word_mini_gives_any_recipe_the_sizes_of_bert_mini_and_its_own_proportions():
  for recipe, mlp in (('bert_base', 1024), ('roberta_base', 1024), ('modernbert_base', 384)):
    model = config_lib.load_recipe(f'{recipe}:mini').model
    assert (model.num_layers, model.hidden_size, model.num_heads) == (4, 256, 4)
    assert (model.mlp_size, model.dtype) == (mlp, 'float32')
  config = config_lib.load_recipe('modernbert_base:size_10_512_8,mini,smoke')
  assert (config.model.num_layers, config.masking.rate) == (2, 0.3)  # mini comes first


def test_three_stages_of_modernbert_change_the_rotary_base():
  stages = plan_lib.stages(config_lib.load_recipe('modernbert_base:three_stages'))
  assert [s.stop - s.start for s in stages] == [76_000, 9_500, 9_500]
  facts = [(s.config.data.length, s.config.batch_size, s.config.masking.rate) for s in stages]
  assert facts == [(1024, 512, 0.3), (8192, 64, 0.3), (8192, 64, 0.15)]
  models = [build.make_model(s.config, 100) for s in stages]
  assert [model.config.rope_theta for model in models] == [10_000.0, 160_000.0, 160_000.0]


def test_fields_of_the_model_in_a_stage_change_no_parameter():
  changes = {'rope_theta': 160_000.0, 'remat': 'full'}
  assert {name for name, field in REPLACED.items() if field.startswith('model.')} == set(changes)
  config = config_lib.pretraining('tiny')
  config.model.positions, config.stages = 'rotary', (stage(steps=1), stage(**changes))
  shapes = []
  for planned in plan_lib.stages(config):
    model = build.make_model(planned.config, 100)
    batch = np.zeros((1, 8), np.int32)
    shapes.append(jax.eval_shape(model.init, jax.random.key(0), {'input_ids': batch}))
  assert jax.tree.map(lambda x: x.shape, shapes[0]) == jax.tree.map(lambda x: x.shape, shapes[1])


def test_the_batch_size_warms_up_in_three_doublings():
  stages = plan(stage(steps=900, batch_size_warmup_steps=10), stage())
  assert [(s.label, s.stop - s.start, s.config.batch_size) for s in stages] == [
    ('1 of 2', 3, 8), ('1 of 2', 4, 16), ('1 of 2', 3, 32), ('1 of 2', 890, 64), ('2 of 2', 100, 64)
  ]  # fmt: skip


def test_a_stage_on_the_same_rows_continues_where_the_one_before_ended():
  stages = plan(stage(steps=9, batch_size_warmup_steps=3), stage(batch_size=8))
  stages = [s._replace(rows=mixture.Prepared({'': 'rows'}, None)) for s in stages]
  firsts = [plan_lib.examples_before(stages, number)[''] for number in range(5)]
  assert firsts == [0, 8, 24, 56, 56 + 6 * 64]
  stages[-1] = stages[-1]._replace(rows=mixture.Prepared({'': 'others'}, None))
  assert plan_lib.examples_before(stages, 4) == {'': 0}


def test_a_stage_with_another_mixture_continues_each_of_its_sources():
  stages = plan(stage(steps=500), stage())
  fractions = {'a': 0.75, 'b': 0.25}, {'a': 0.5, 'c': 0.5}
  rows = [
    mixture.Prepared({name: f'rows/{name}' for name in each}, None, mixture.Mixture(each, 0))
    for each in fractions
  ]
  stages = [s._replace(rows=r) for s, r in zip(stages, rows, strict=True)]
  assert plan_lib.examples_before(stages, 1) == {'a': 500 * 64 * 3 // 4, 'c': 0}


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    ([stage(), stage()], '2 of 2 stages have steps=0; only one'),
    ([stage(steps=1000), stage()], r'num_train_steps=1000 leaves no steps for stages\[1\]'),
    ([stage(steps=500), stage(steps=501)], 'num_train_steps=1000, but the stages have 1001 steps'),
    ([stage(batch_size_warmup_steps=2)], r'stages\[0\].batch_size_warmup_steps=2 .* from 3 to 999'),
    ([stage(batch_size=12, batch_size_warmup_steps=9)], 'batch_size=12 a multiple of 8'),
    ([stage(prepared='a', input='b')], r'stages\[0\] has both prepared rows \(a\) and input \(b\)'),
  ],
)
def test_stages_that_do_not_add_up_are_refused(sections, message):
  with pytest.raises(ValueError, match=message):
    plan(*sections)


def test_stages_without_schedules_share_that_of_the_run_bit_for_bit():
  one, two = plan(warmup_steps=100), plan(stage(), stage(steps=300), warmup_steps=100)
  steps = np.arange(1001)
  curves = [jax.jit(jax.vmap(plan_lib.make_schedule(p[-1].config)))(steps) for p in (one, two)]
  np.testing.assert_array_equal(*curves)


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    ([stage(steps=9), stage(schedule='linear')], r'stages\[0\] has no schedule, but another'),
    ([stage(steps=9), stage(start_factor=0.5)], r'stages\[0\] has no schedule, but another'),
    ([stage(schedule='cosin')], "schedule must be one of .*'cosine'.* got 'cosin'"),
    ([stage(schedule='constant', end_factor=0.1)], r'end_factor=0\.1 is for a decay'),
    ([stage(steps=9, schedule='constant'), stage(schedule='linear')], r'warmup_steps=10000 is not'),
  ],
)
def test_schedules_that_do_not_fit_are_refused(sections, message):
  config = plan(*sections)[-1].config
  with pytest.raises(ValueError, match=message):
    plan_lib.make_schedule(config)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ('--config.stage2.fraction=0.1', r'did you mean --config.stages[1].steps (a number of steps)'),
    ('--config.stage3.length=512', 'did you mean --config.stages[2].length'),
    ('--config.stages[1].steps=5', 'a field of stage 2, but the config has 0 stages'),
    ('--config.stages[0].lenght=64', "no field 'stages[0].lenght', did you mean"),
    ('--config.stages[0].steps=0.1', "--config.stages[0].steps takes int, such as 0; got '0.1'"),
    ('--config.stages[0].length=-1', 'stages[0].length must be at least 0, got -1'),
    ('--config.stages[0].mask_rate=nan', 'stages[0].mask_rate must be at least 0, got nan'),
  ],
)
def test_a_wrong_flag_of_a_stage_gets_one_sentence(flags, message, tmp_path, capsys):
  assert main(['pretrain', '--config=bert_mini:smoke', f'--workdir={tmp_path}/run', flags]) == 2
  (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('bertjax')]
  assert message in line


def test_a_recipe_with_a_wrong_stage_is_refused(tmp_path):
  path = tmp_path / 'mine.py'
  text = 'from bertjax.config import pretraining, stage\ndef get_config(arg):\n'
  text += '  config = pretraining()\n  config.stages = (stage(lenght=512),)\n  return config\n'
  path.write_text(text)
  with pytest.raises(ValueError, match=r"mine.py, line 4: the config has no field 'lenght'"):
    config_lib.load_recipe(str(path))


def test_help_lists_the_fields_of_a_stage(capsys):
  assert main(['pretrain', '--config=bert_base:two_lengths', '--help']) == 0
  text = capsys.readouterr().out
  assert '--config.stages[1].length=512' in text and 'batch_size_warmup_steps=0' in text
