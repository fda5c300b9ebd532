"""Training rows: sentence pairs by Google's rule, full sentences, and the store's columns."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data import examples
from bertjax.data.order import EXAMPLES, mix


def make_documents(seed, *, count=6, sentences=8, tokens=12):
  """Random documents; every token is a number of its own, counting up, so it can be traced."""
  rng, numbers = random.Random(seed), itertools.count(1)

  def sentence():
    return list(itertools.islice(numbers, rng.randint(1, tokens)))

  return [[sentence() for _ in range(rng.randint(1, sentences))] for _ in range(count)]


def homes(documents) -> dict[int, int]:
  """{token: its document}, in order."""
  return {token: n for n, d in enumerate(documents) for sentence in d for token in sentence}


def build(documents, *, kind='nsp', length=32, **options):
  return list(examples.build_rows(documents, kind, length=length, **options))


def google_rows(documents, index, rng, max_seq_length, short_seq_prob):
  """create_instances_from_document of google-research/bert, without its masking."""

  def randint(low, high):  # random.randint's stream differs between Python versions
    return low + int(rng.random() * (high - low + 1))

  document, max_num_tokens = documents[index], max_seq_length - 3
  target_seq_length = max_num_tokens
  if rng.random() < short_seq_prob:
    target_seq_length = randint(2, max_num_tokens)
  instances, chunk, i = [], [], 0
  while i < len(document):
    chunk.append(document[i])
    if i == len(document) - 1 or sum(map(len, chunk)) >= target_seq_length:
      a_end = 1
      if len(chunk) >= 2:
        a_end = randint(1, len(chunk) - 1)
      tokens_a, tokens_b, is_random_next = list(itertools.chain(*chunk[:a_end])), [], False
      if len(chunk) == 1 or rng.random() < 0.5:
        is_random_next = True
        for _ in range(10):
          random_document_index = randint(0, len(documents) - 1)
          if random_document_index != index:
            break
        random_document = documents[random_document_index]
        for j in range(randint(0, len(random_document) - 1), len(random_document)):
          tokens_b.extend(random_document[j])
          if len(tokens_b) >= target_seq_length - len(tokens_a):
            break
        i -= len(chunk) - a_end  # the unused segments go back
      else:
        tokens_b = list(itertools.chain(*chunk[a_end:]))
      while len(tokens_a) + len(tokens_b) > max_num_tokens:  # truncate_seq_pair
        longer = tokens_a if len(tokens_a) > len(tokens_b) else tokens_b
        longer.pop(0 if rng.random() < 0.5 else -1)
      instances.append((tokens_a, tokens_b, int(is_random_next)))
      chunk = []
    i += 1
  return instances


@given(st.integers(0, 2**32), st.integers(8, 48), st.sampled_from([0, 0.1, 1]), st.integers(2, 6))
@settings(deadline=None, max_examples=150)
def test_rows_are_those_of_google_s_rule(seed, length, short, count):
  documents, wanted = make_documents(seed, count=count), []
  for number, index in itertools.product(range(2), range(count)):
    rng = random.Random(int(mix(seed, EXAMPLES, number, index)))
    wanted += google_rows(documents, index, rng, length, short)
  assert build(documents, length=length, short_probability=short, passes=2, seed=seed) == wanted


@given(st.integers(0, 2**32), st.integers(8, 40), st.sampled_from(examples.KINDS))
@settings(deadline=None, max_examples=100)
def test_no_row_is_longer_than_its_length_and_none_is_empty(seed, length, kind):
  for a, b, _ in build(make_documents(seed, tokens=60), kind=kind, length=length):
    assert a and (b or kind == 'full_sentences')
    assert 1 + len(a) + 1 + (len(b) + 1 if b else 0) <= length


def test_more_than_half_of_the_second_parts_are_random():
  labels = [label for *_, label in build(make_documents(1, count=400, sentences=40))]
  assert len(labels) > 2000
  assert 0.53 < np.mean(labels) < 0.75  # single sentences always get a random partner


def test_label_0_continues_the_same_document_and_label_1_comes_from_another():
  documents = make_documents(2, count=40, sentences=30)
  home, rows = homes(documents), build(documents)
  assert {label for *_, label in rows} == {0, 1}
  for a, b, label in rows:
    assert (home[a[0]] == home[b[0]]) == (label == 0)
    if label == 0 and len(a) + len(b) < 29:  # nothing was cut
      assert b[0] == a[-1] + 1


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_displaced_sentences_are_used_again(seed):
  documents = make_documents(seed, sentences=60, tokens=1)  # so that nothing is ever cut off
  rows = build(documents, length=16, short_probability=0.3, seed=seed)
  used = [token for a, b, label in rows for token in (a if label else a + b)]
  assert used == list(homes(documents))


def test_long_parts_are_cut_at_both_ends_until_they_fit_evenly():
  documents = [[list(range(100))], [list(range(100, 300))]]
  for a, b, _ in build(documents, length=64, short_probability=0.0, passes=20):
    assert len(a) + len(b) == 61 and abs(len(a) - len(b)) == 1
    for part, whole in ((a, documents[a[0] >= 100][0]), (b, documents[b[0] >= 100][0])):
      assert part == list(range(part[0], part[0] + len(part)))
      assert part[0] > whole[0] and part[-1] < whole[-1]


def test_a_short_target_is_drawn_once_for_a_document():
  documents = [[[n]] * 300 for n in range(30)]  # sentences of one token
  rows = build(documents, length=64, short_probability=1.0)
  sizes = {}
  for document, group in itertools.groupby(rows, key=lambda row: row[0][0]):
    whole = [len(a) + len(b) for a, b, label in list(group)[:-1] if not label]
    assert len(set(whole)) <= 1, document
    sizes |= dict.fromkeys(whole, document)
  assert len(sizes) > 10 and min(sizes) >= 2 and max(sizes) <= 61


def test_every_pass_makes_other_pairs_and_the_seed_too():
  documents = make_documents(3, count=30)
  once, both = build(documents), build(documents, passes=2)
  assert both[: len(once)] == once
  assert both[len(once) :] != once and build(documents, seed=1) != once


def test_one_document_is_too_few_for_next_sentences():
  with pytest.raises(ValueError, match=r'got 1 document.*--config.nsp=False'):
    build(make_documents(0, count=1))


@given(st.integers(0, 2**32), st.integers(8, 40))
@settings(deadline=None, max_examples=100)
def test_full_sentences_lose_no_token_and_mix_no_documents(seed, length):
  documents = make_documents(seed, tokens=60)
  rows = build(documents, kind='full_sentences', length=length)
  home = homes(documents)
  assert [token for a, *_ in rows for token in a] == list(home)
  assert all(len({home[token] for token in a}) == 1 for a, *_ in rows)


def test_full_sentences_fill_rows_and_cut_only_sentences_longer_than_a_row():
  document = [[1] * 3, [2] * 3, [3] * 2, [4] * 14, [5] * 4, [6]]
  rows = [a for a, *_ in examples.full_sentences(document, 6)]
  assert rows == [[1, 1, 1, 2, 2, 2], [3, 3], [4] * 6, [4] * 6, [4, 4, 5, 5, 5, 5], [6]]


def test_rows_are_laid_out_with_special_tokens_ends_and_labels():
  rows = [([5, 6], [7], 1), ([8], [9, 10, 11], 0), ([5, 6, 7], [], 0)]
  first, second = examples.to_columns(rows, 8, cls_id=101, sep_id=102, pad_id=1, size=2)
  wanted = [[101, 5, 6, 102, 7, 102, 1, 1], [101, 8, 102, 9, 10, 11, 102, 1]]
  assert first['input_ids'].tolist() == wanted
  assert first['ends'].tolist() == [[4, 6], [3, 7]]
  assert first['next_sentence_labels'].tolist() == [1, 0]
  assert second['input_ids'].tolist() == [[101, 5, 6, 7, 102, 1, 1, 1]]
  assert second['ends'].tolist() == [[5, 5]]


def test_ids_take_two_bytes_as_long_as_they_fit():
  wanted = {'input_ids': ('uint16', (64,)), 'ends': ('uint16', (2,))}
  assert examples.columns('full_sentences', 64, 2**16) == wanted
  labels = {'next_sentence_labels': ('uint8', ())}
  wide = {'input_ids': ('int32', (64,))}
  assert examples.columns('nsp', 64, 2**16 + 1) == wanted | wide | labels
