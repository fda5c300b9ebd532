"""Batches: every row in its place, the same from every loader, at any start, on any process."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data import dataset
from bertjax.data import loader as loader_lib
from bertjax.data.masking import Masking
from bertjax.data.prng import training_slots
from bertjax.data.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def make(tiny_rows):
  """make(split, **fields) -> Batches of the tiny prepared rows."""
  tokenizer = Tokenizer.from_dir(tiny_rows)
  fixed = {'vocab_size': tokenizer.vocab_size, 'special': tokenizer.special}

  def make(split='train', **fields):
    fields = {'batch_size': 7, 'seed': 1, 'masking': Masking(max_predictions=10)} | fields | fixed
    return loader_lib.Batches(dataset.Dataset(tiny_rows, split), **fields)

  return make


def assert_same(one, other):
  assert list(one) == list(other)
  for name in one:
    assert one[name].dtype == other[name].dtype, name
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def join(parts):
  parts = list(parts)
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_a_batch_has_the_schema_of_the_design(make):
  row, predictions = ('int32', (7, 64)), ('int32', (7, 10))
  found = {name: (array.dtype.name, array.shape) for name, array in make().training(0).items()}
  assert found == {
    **dict.fromkeys(['input_ids', 'token_type_ids', 'segment_ids'], row),
    **dict.fromkeys(['masked_lm_positions', 'masked_lm_ids'], predictions),
    'masked_lm_weights': ('float32', (7, 10)),
    'next_sentence_labels': ('int32', (7,)),
    'example_weights': ('float32', (7,)),
  }


sequence = st.tuples(st.integers(2, 9), st.integers(0, 6))  # tokens of A and of B


@given(
  st.integers(1, 4).flatmap(
    lambda s: st.tuples(
      st.just(s), st.lists(st.lists(sequence, min_size=1, max_size=s), min_size=1, max_size=6)
    )
  ),
  st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_expand_equals_its_slow_reference(case, nsp):
  sequences, rows = case
  row, each = (len(rows), 64), (len(rows), sequences)
  wanted = {name: np.zeros(row, int) for name in ('input_ids', 'token_type_ids', 'segment_ids')}
  wanted |= {'example_weights': np.zeros(each, np.float32)}
  wanted |= {'position_ids': np.zeros(row, int), 'cls_positions': np.zeros(each, int)}
  wanted |= {'next_sentence_labels': np.arange(sequences * len(rows)).reshape(each)}
  ends = np.zeros((*each, 2), np.uint16)
  for i, parts in enumerate(rows):
    position = 0
    for j, (first, second) in enumerate(parts):
      wanted['example_weights'][i, j], wanted['cls_positions'][i, j] = 1, position
      ends[i, j] = position + first, position + first + second
      for p in range(first + second):
        wanted['input_ids'][i, position] = 60_000 + position
        wanted['token_type_ids'][i, position] = p >= first
        wanted['segment_ids'][i, position] = j + 1
        wanted['position_ids'][i, position] = p
        position += 1
  columns = {'input_ids': wanted['input_ids'].astype(np.uint16), 'ends': ends}
  if nsp:
    columns['next_sentence_labels'] = wanted['next_sentence_labels'].astype(np.uint8)
  else:
    del wanted['next_sentence_labels']
  if sequences == 1:  # a row is an example
    del wanted['position_ids'], wanted['cls_positions']
    wanted |= {name: a[:, 0] for name, a in wanted.items() if a.shape == each}
  wanted = {name: a.astype(np.int32) if a.dtype == int else a for name, a in wanted.items()}
  assert_same(loader_lib.expand(columns), wanted)


def test_evaluation_covers_each_row_once_and_pads_with_weight_0(make):
  size = len(make('heldout').rows)
  data = make('heldout', objective='next_token', batch_size=size // 2 + 1)  # keeps the ids
  whole = join(data.evaluation(step) for step in range(data.evaluation_steps))
  real = whole['example_weights'] == 1
  assert len(real) > size and data.evaluation_steps == 2
  np.testing.assert_array_equal(whole['example_weights'], np.arange(len(real)) < size)
  np.testing.assert_array_equal(whole['input_ids'][real], data.rows[np.arange(size)]['input_ids'])
  assert (
    not whole['masked_lm_weights'][~real].any() and whole['masked_lm_weights'][real].any(1).all()
  )


def test_evaluation_s_masks_are_frozen_whatever_the_batch_size(make):
  joined = []
  for size in (3, 8):
    data = make('heldout', batch_size=size)
    whole = join(data.evaluation(step) for step in range(data.evaluation_steps))
    joined.append({name: array[: len(data.rows)] for name, array in whole.items()})
  assert joined[0]['masked_lm_weights'].any()
  assert_same(*joined)


def test_a_training_batch_has_the_examples_of_its_indices(make):
  data = make(objective='next_token')
  for step in (0, 3, 10**6):
    row = training_slots(step, 7, len(data.rows), 1)[1]
    np.testing.assert_array_equal(data.training(step)['input_ids'], data.rows[row]['input_ids'])


def test_a_row_gets_other_masks_in_the_next_epoch(make):
  size = len(make().rows)
  data, positions = make(batch_size=size), []
  for step in range(2):
    by_row = np.argsort(training_slots(step, size, size, 1)[1])
    positions.append(data.training(step)['masked_lm_positions'][by_row])
  assert (positions[0] == positions[1]).all(1).mean() < 0.1


@pytest.mark.parametrize('loader', ['threads', 'tfdata'])
@pytest.mark.parametrize('objective', ['mlm', 'next_token'])
@pytest.mark.parametrize('start', [0, 5, 1000])
def test_a_loader_gives_each_step_its_batch_from_any_start(make, loader, objective, start):
  data = make(objective=objective)
  stream = loader_lib.iterate(data.training, start, loader=loader)
  for step in range(start, start + 12):
    assert_same(next(stream), data.training(step))
  stream.close()


@pytest.mark.parametrize('loader', ['threads', 'tfdata'])
@pytest.mark.parametrize('start, stop', [(2, 9), (2, 3), (4, 4)])
def test_a_loader_ends_at_its_stop(make, loader, start, stop):
  data = make('heldout', batch_size=1)
  found = list(loader_lib.iterate(data.evaluation, start, stop, loader=loader))
  assert len(found) == stop - start
  for step, batch in zip(range(start, stop), found, strict=True):
    assert_same(batch, data.evaluation(step))


@pytest.mark.parametrize('processes', [2, 8])
def test_the_parts_of_all_processes_make_the_global_batch(make, processes):
  whole, locals_ = make(batch_size=16), np.arange(16).reshape(processes, -1)
  parts = [make(batch_size=16, local=local) for local in locals_]
  for step in (0, 9):
    assert_same(join(part.training(step) for part in parts), whole.training(step))
    assert_same(join(part.evaluation(step) for part in parts), whole.evaluation(step))


def test_a_closed_stream_makes_no_more_batches_and_leaves_no_thread():
  made, before = [], threading.active_count()
  stream = loader_lib.iterate(lambda step: made.append(step) or step, 10)
  assert list(itertools.islice(stream, 3)) == [10, 11, 12]
  stream.close()
  assert max(made) <= 16 and threading.active_count() == before


def test_an_error_in_the_background_reaches_the_reader():
  stream = loader_lib.iterate(lambda step: 6 // (2 - step), 0)
  assert [next(stream), next(stream)] == [3, 6]
  with pytest.raises(ZeroDivisionError):
    next(stream)


def test_an_unknown_loader_is_refused():
  with pytest.raises(ValueError, match=r"loader must be 'tfdata' or 'threads', got 'thread'"):
    next(loader_lib.iterate(lambda step: step, 0, loader='thread'))


def test_an_unknown_objective_is_refused(make):
  with pytest.raises(ValueError, match=r"objective must be one of .* got 'clm'"):
    make(objective='clm')


def test_a_split_without_rows_is_refused(tmp_path):
  writer = dataset.Writer(tmp_path / 'rows', {}, {'ends': ('uint16', (1, 2))})
  assert writer.finish({'train': 0, 'heldout': 0})
  with pytest.raises(ValueError, match=f'{tmp_path}/rows has no records'):
    loader_lib.Batches(dataset.Dataset(tmp_path / 'rows', 'train'), 8, 0, Masking(), 600, {})
