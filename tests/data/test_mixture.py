"""Which source an example comes from: exact shares, a function of its number."""

import numpy as np
import pytest

from bertjax.data import loader, mixture
from bertjax.data.dataset import Arrays
from bertjax.data.masking import Masking


@pytest.fixture
def three():
  return mixture.Mixture({'a': 0.7, 'b': 0.2994, 'c': 0.0006}, seed=3)


def test_ten_thousand_examples_have_the_shares(three):
  source, _ = three.locate(np.arange(10_000))
  assert np.bincount(source).tolist() == [7000, 2990, 10]  # the largest remainder: c has 0.6
  assert three.used(10_000) == {'a': 7000, 'b': 2990, 'c': 10}


def test_an_example_asked_at_random_is_the_same(three):
  source, rank = three.locate(np.arange(5_000))
  for index in np.random.default_rng(0).integers(0, 5_000, 50).tolist():
    assert three.locate(index) == (source[index], rank[index])
  for number in range(3):  # every example of a source once
    assert sorted(rank[source == number]) == list(range((source == number).sum()))
  assert three.used(3_456) == {name: (source[:3_456] == i).sum() for i, name in enumerate('abc')}


def test_windows_have_other_orders(three):
  source, _ = three.locate(np.arange(2_000))
  assert (source[:1000] != source[1000:]).any()
  assert (
    mixture.Mixture({'a': 0.7, 'b': 0.3}, 4).locate(np.arange(1000))[0] != source[:1000]
  ).any()


def test_shares_follow_sizes_with_an_exponent():
  """Three languages of 1,000,000, 100,000 and 10,000 records: docs/data.md."""
  sizes = {'en': 1_000_000, 'sw': 100_000, 'yo': 10_000}
  for exponent, counts in ((1.0, [901, 90, 9]), (0.7, [807, 161, 32]), (0.0, [334, 333, 333])):
    shares = mixture.read_shares('', sizes, exponent)
    assert mixture.Mixture(shares, 0).counts.tolist() == counts


@pytest.mark.parametrize(('value', 'message'), [
  ('wiki=0.7,books=0.2', r'their sum 1, got wiki=0\.7,books=0\.2'),
  ('wiki=0.7,boks=0.3', r"'boks', which is no source, did you mean 'books'"),
  ('wiki=1.0', 'must give each source a share once'),
  ('wiki=0.7,books=0.3,wiki=0.7', 'must give each source a share once'),
  ('wiki=0.7,books', r'is written wiki=0\.7,books=0\.3'),
  ('wiki=nan,books=0.3', 'their sum 1'),
  ('wiki=1.2,books=-0.2', 'must be positive'),
  ('wiki=0.9999,books=0.0001', r'at least 0\.001.* got books=0\.0001'),
])  # fmt: skip
def test_wrong_shares_get_one_sentence(value, message):
  sizes = {'wiki': 10, 'books': 10}
  with pytest.raises(ValueError, match=message):
    mixture.Mixture(mixture.read_shares(value, sizes), 0)


def test_sources_have_names_or_none_has(tmp_path):
  assert mixture.read_sources('wiki=/a,books=hf:b:train') == {'wiki': '/a', 'books': 'hf:b:train'}
  assert mixture.read_sources('/a,/b') == {'': '/a,/b'}
  (tmp_path / 'x=1').mkdir()
  assert mixture.read_sources(str(tmp_path / 'x=1')) == {'': str(tmp_path / 'x=1')}
  for wrong in ('wiki=/a,/b', 'wiki=/a,wiki=/b'):
    with pytest.raises(ValueError, match='each with its own name'):
      mixture.read_sources(wrong)


def test_each_row_of_a_source_is_read_once_an_epoch():
  """By any process, from any step."""
  sizes = {'a': 30, 'b': 12}
  parts = {
    name: Arrays({'input_ids': np.full((size, 8), 5 + i, np.uint16),
                  'ends': np.full((size, 1, 2), 8, np.uint16)})
    for i, (name, size) in enumerate(sizes.items())
  }  # fmt: skip
  rows = mixture.Mixed(parts, mixture.Mixture({'a': 0.5, 'b': 0.5}, 1))
  epoch, row = rows.training_slots(np.arange(1000), seed=1)
  for start, size in ((0, 30), (30, 12)):
    own = (row >= start) & (row < start + size)
    assert own.sum() == 500
    for number in range(1, 500 // size + 1):
      assert sorted(row[own & (epoch == number)]) == list(range(start, start + size))
  special = {'pad': 0, 'cls': 2, 'sep': 3, 'mask': 4}
  batches = loader.Batches(rows, 16, 1, Masking(), 20, special, first=100)
  whole = batches.training(3)
  assert batches.progress(3) == rows.epochs(148)
  assert rows.epochs(1000) == {'epoch/a': 500 / 30, 'epoch/b': 500 / 12}
  for local in np.split(np.arange(16), 4):
    part = loader.Batches(rows, 16, 1, Masking(), 20, special, local=local, first=100).training(3)
    for name, column in part.items():
      np.testing.assert_array_equal(column, whole[name][local])


def test_a_later_stage_begins_behind_the_examples_that_are_used(three):
  parts = {name: Arrays({'x': np.arange(100)}) for name in three.names}
  other = mixture.Mixture({'c': 0.3, 'a': 0.7}, seed=3)
  first = mixture.Mixed(parts, three).training_slots(np.arange(345), seed=1)
  later = mixture.Mixed(parts, other, three.used(345))
  second = later.training_slots(np.arange(345), seed=1)
  assert sum(three.used(345).values()) == 345
  trained = [  # (epoch, row) of source a, which begins at 0 there and at 100 here
    *((e, r) for e, r in zip(*first, strict=True) if r < 100),
    *((e, r - 100) for e, r in zip(*second, strict=True) if r >= 100),
  ]
  complete = len(trained) // 100
  for epoch in range(1, complete + 1):  # no row twice, none skipped
    assert sorted(r for e, r in trained if e == epoch) == list(range(100))
  assert complete >= 4
  assert later.epochs(345)['epoch/a'] == pytest.approx(len(trained) / 100)
