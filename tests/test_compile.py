"""Compiling for a TPU slice that is not there; costs read from the compiled program."""

import json

import pytest

from bertjax import __main__ as command
from bertjax import compile as compile_lib
from bertjax import config as config_lib
from bertjax import plan
from bertjax.model import encoder
from bertjax.training import mesh as mesh_lib


def small(**fields):
  """Two layers, 256 wide, bfloat16: compiles in seconds."""
  config = config_lib.pretraining('mini')
  config.update_from_flattened_dict(
    {'model.num_layers': 2, 'model.vocab_size': 2048, 'model.dtype': 'bfloat16', 'batch_size': 64}
    | {'model.hidden_dropout': 0.0, 'model.attention_dropout': 0.0}
    | fields
  )
  return config


@pytest.fixture(scope='module')
def slice_of_8():
  pytest.importorskip('libtpu')
  return compile_lib.slice_devices('v5e:2x4')


def report_of(devices, **fields):
  (stage,) = plan.stages(small(**fields))
  return compile_lib.report_of(stage, devices)


@pytest.fixture(scope='module')
def report(slice_of_8):
  return report_of(slice_of_8)


@pytest.mark.full
@pytest.mark.stack
def test_the_step_for_an_absent_slice_has_the_models_flops_and_fits(report):
  assert report['devices'] == 8 and report['device'] == 'TPU v5 lite'
  assert report['product_flops'] == pytest.approx(report['model_flops'], rel=1e-3)
  assert report['argument_bytes'] > 12 * report['parameters']  # weights and two moments
  assert report['temporary_bytes'] < report['peak_bytes'] < report['hbm_bytes']
  (kind,) = report['collectives']
  assert kind == 'all-reduce' and report['collectives'][kind][1] > 2 * report['parameters']
  assert 0 < report['mfu'] < 1 and report['step_seconds'] == max(report['bound_seconds'].values())


@pytest.mark.full
def test_a_scan_costs_what_the_unrolled_layers_cost(slice_of_8, report):
  unrolled = report_of(slice_of_8, **{'model.unroll': 2})
  assert report['product_flops'] == pytest.approx(unrolled['product_flops'], rel=1e-3)
  assert report['flops'] == pytest.approx(unrolled['flops'], rel=0.03)


MESH = {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}


@pytest.mark.full
@pytest.mark.parametrize('times', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_rules_rematerialize_nothing_and_a_bad_one_is_counted(slice_of_8, monkeypatch, times):
  report = report_of(slice_of_8, **MESH)
  assert report['rematerialized'] == 0 and 'all-gather' in report['collectives']
  bad = ((r'embeddings/word/embedding$', (None, 'embed')), *encoder.PARAM_AXES[1:])
  monkeypatch.setattr(encoder, 'PARAM_AXES', bad)
  for _ in range(times):  # the second program is not read from the disk, without warnings
    assert report_of(slice_of_8, **MESH)['rematerialized'] > 0


@pytest.mark.slow  # smaller version: memory and FLOPs of windows in tests/model/test_attention.py
def test_local_windows_cost_their_blocks_and_rematerialize_nothing(slice_of_8):
  config = config_lib.pretraining('modernbert_base')
  config.update_from_flattened_dict({
    'model.num_layers': 4, 'model.hidden_size': 256, 'model.num_heads': 4, 'model.mlp_size': 384,
    'model.vocab_size': 2048, 'model.dtype': 'bfloat16', 'model.attention': 'xla', 'nsp': False,
    'batch_size': 16, 'data.length': 512, 'data.max_sequences_per_row': 4, 'masking.rate': 0.3,
    'masking.max_predictions': -1, **MESH,
  })  # fmt: skip
  (stage,) = plan.stages(config)
  report = compile_lib.report_of(stage, slice_of_8)
  assert report['rematerialized'] == 0
  # Blocks of 64 tokens with 192 keys, of which a token attends to 129, cost 1.02, and XLA computes
  # one of attention's matmuls again; complete matrices in local layers would cost 1.2.
  assert 1 <= report['product_flops'] / report['model_flops'] < 1.1


@pytest.mark.full
def test_several_slices_share_the_data_axis(slice_of_8):
  mesh = mesh_lib.make_mesh(-1, 2, 1, devices=compile_lib.slice_devices('2*v5e:2x4'))
  where = [{device.slice_index for device in row.flat} for row in mesh.devices]
  assert where == [{0}] * 4 + [{1}] * 4  # fsdp stays within a slice
  with pytest.raises(ValueError, match=r'multiple of 2, got .*16'):
    mesh_lib.make_mesh(1, 16, 1, devices=list(mesh.devices.flat))


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.e2e
def test_a_batch_that_does_not_fit_is_reported_with_the_largest_that_fits(
  slice_of_8, report, tmp_path, capsys, monkeypatch, compiled
):
  real = compile_lib.report_of
  names = ('device', 'devices', 'mesh', 'batch_size', 'length', 'model', 'parameters')
  if not compiled:  # XLA tries for minutes to make it fit

    def real(*_, **__):
      return {name: report[name] for name in names} | {'does_not_fit': 'out of memory'}

  def known(stage, devices, **kwargs):  # the one of 64 rows is compiled already
    return report if stage.config.batch_size == 64 else real(stage, devices, **kwargs)

  monkeypatch.setattr(compile_lib, 'report_of', known)
  sweep = 'batch_size=64,4194304'
  compile_lib.run(small(), topology='v5e:2x4', sweep=sweep, out=str(tmp_path / 'out.json'))
  out = capsys.readouterr().out
  assert 'does not fit' in out and out.endswith('best that fits: batch_size=64\n')
  fits, not_fits = json.loads((tmp_path / 'out.json').read_text())
  assert 'step_seconds' in fits and 'does_not_fit' in not_fits


@pytest.mark.full
def test_the_devices_here_are_measured_in_every_stage(capsys):
  config = small(**config_lib.SMOKE, **{'model.vocab_size': 100})
  config.stages = (config_lib.stage(), config_lib.stage(steps=5, length=32))
  reports = compile_lib.run(config)
  facts = [(r['stage'], r['length'], r['steps']) for r in reports]
  assert facts == [('1 of 2', 64, 15), ('2 of 2', 32, 5)]
  assert all(r['measured_step_seconds'] > 0 for r in reports)
  assert 'here, stage 2 of 2: ' in capsys.readouterr().out


def test_a_sweep_varies_a_field_of_a_stage():
  config = small()
  config.stages = (config_lib.stage(), config_lib.stage(steps=5))
  variants = compile_lib.vary(config, 'stages[1].length=32,64')
  assert [plan.stages(v)[1].config.data.length for v, _ in variants] == [32, 64]
  assert config.stages[1].length == 0


@pytest.mark.parametrize('sweep', ['batchsize=4', 'batch_size', 'batch_size=many', 'mesh=1'])
def test_a_sweep_of_no_field_is_one_sentence(sweep):
  with pytest.raises(ValueError, match='--sweep takes fields'):
    list(compile_lib.vary(small(), sweep))


def test_an_unknown_slice_is_one_sentence(slice_of_8, capsys):
  flags = ['compile', '--config=bert_mini', '--topology=v5e:3x5']
  assert command.main(flags) == 2
  assert 'v5e:2x4' in capsys.readouterr().err
