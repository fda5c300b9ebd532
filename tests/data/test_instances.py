"""Training rows: sentence pairs by Google's rule and others, packing, the store's columns."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data import instances, packing
from bertjax.data.instances import Instance
from bertjax.data.prng import EXAMPLES, hash_u64
from tests.conftest import make_corpus

BERT = instances.Template(101, 102, (102,))


def make_documents(seed, *, count=6, sentences=8, tokens=12):
  """Random documents; every token is a different number, counting up, so it can be traced."""
  rng, numbers = random.Random(seed), itertools.count(1)

  def sentence():
    return list(itertools.islice(numbers, rng.randint(1, tokens)))

  return [[sentence() for _ in range(rng.randint(1, sentences))] for _ in range(count)]


def homes(documents) -> dict[int, int]:
  """{token: its document}, in order."""
  return {token: n for n, d in enumerate(documents) for sentence in d for token in sentence}


def build(documents, *, kind='nsp', length=32, **options):
  """[(tokens of each span ..., label)]."""
  corpus = make_corpus(documents)
  return [
    (*(corpus.tokens[start:stop].tolist() for start, stop in item.spans), item.label)
    for item in instances.build(corpus, kind, length=length, **options)
  ]


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
    rng = random.Random(int(hash_u64(seed, EXAMPLES, number, index)))
    wanted += google_rows(documents, index, rng, length, short)
  assert build(documents, length=length, short_seq_prob=short, dupe_factor=2, seed=seed) == wanted


@given(st.integers(0, 2**32), st.integers(8, 40), st.sampled_from(instances.KINDS))
@settings(deadline=None, max_examples=100)
def test_no_row_is_longer_than_its_length_and_none_is_empty(seed, length, kind):
  pair = kind in instances.PAIR_KINDS
  for item in instances.build(make_corpus(make_documents(seed, tokens=60)), kind, length=length):
    assert BERT.size(item) == 1 + sum(stop - start + 1 for start, stop in item.spans) <= length
    assert all(start < stop for start, stop in item.spans)
    assert item.pair == pair and (len(item.spans) == 2 if pair else item.label == 0)
    assert len(item.spans) == 1 or kind != 'doc_sentences'


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
    if label == 0 and len(a) + len(b) < 29:  # nothing was truncated
      assert b[0] == a[-1] + 1


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_displaced_sentences_are_used_again(seed):
  documents = make_documents(seed, sentences=60, tokens=1)  # so that nothing is ever truncated
  rows = build(documents, length=16, short_seq_prob=0.3, seed=seed)
  used = [token for a, b, label in rows for token in (a if label else a + b)]
  assert used == list(homes(documents))


def test_long_segments_are_truncated_at_both_ends_until_they_fit_evenly():
  documents = [[list(range(100))], [list(range(100, 300))]]
  for a, b, _ in build(documents, length=64, short_seq_prob=0.0, dupe_factor=20):
    assert len(a) + len(b) == 61 and abs(len(a) - len(b)) == 1
    for part, whole in ((a, documents[a[0] >= 100][0]), (b, documents[b[0] >= 100][0])):
      assert part == list(range(part[0], part[0] + len(part)))
      assert part[0] > whole[0] and part[-1] < whole[-1]


def test_a_short_target_is_drawn_once_for_a_document():
  documents = [[[n]] * 300 for n in range(30)]  # sentences of one token
  rows = build(documents, length=64, short_seq_prob=1.0)
  sizes = {}
  for document, group in itertools.groupby(rows, key=lambda row: row[0][0]):
    whole = [len(a) + len(b) for a, b, label in list(group)[:-1] if not label]
    assert len(set(whole)) <= 1, document
    sizes |= dict.fromkeys(whole, document)
  assert len(sizes) > 10 and min(sizes) >= 2 and max(sizes) <= 61


def test_every_pass_makes_other_pairs_and_the_seed_too():
  documents = make_documents(3, count=30)
  once, both = build(documents), build(documents, dupe_factor=2)
  assert both[: len(once)] == once
  assert both[len(once) :] != once and build(documents, seed=1) != once


def test_one_document_is_too_few_for_next_sentences():
  with pytest.raises(ValueError, match=r'got 1 document.*data.num_shards.*--config.nsp=False'):
    build(make_documents(0, count=1))


@given(st.integers(0, 2**32), st.integers(8, 40))
@settings(deadline=None, max_examples=100)
def test_ordered_pairs_are_neighbours_of_one_document_and_label_1_says_swapped(seed, length):
  documents = make_documents(seed)
  home, last = homes(documents), {sentence[-1] for d in documents for sentence in d}
  for *pair, label in build(documents, kind='sop', length=length, seed=seed):
    first, second = pair[::-1] if label else pair
    assert home[first[0]] == home[second[-1]] and first[-1] < second[0]
    if len(first) + len(second) < length - 3:  # nothing was truncated
      assert first[-1] in last and second[0] == first[-1] + 1
    else:
      assert len(first) + len(second) == length - 3


def test_half_of_the_ordered_pairs_are_swapped():
  labels = [label for *_, label in build(make_documents(1, count=600, sentences=40), kind='sop')]
  assert len(labels) > 2000
  assert abs(np.mean(labels) - 0.5) < 5 * 0.5 / len(labels) ** 0.5


def test_a_single_sentence_has_no_order_and_is_skipped():
  documents = [[[1] * 20], [[2] * 3, [3] * 3, [4] * 3]]  # 5 tokens fit: two sentences, then one
  pairs = build(documents, kind='sop', length=8, short_seq_prob=0.0)
  assert [{*a, *b} for a, b, _ in pairs] == [{2, 3}]


@given(st.integers(0, 2**32), st.integers(8, 40))
@settings(deadline=None, max_examples=100)
def test_sentences_of_a_document_lose_no_token_and_mix_no_documents(seed, length):
  documents = make_documents(seed, tokens=60)
  rows = build(documents, kind='doc_sentences', length=length)
  home = homes(documents)
  assert [token for a, _ in rows for token in a] == list(home)
  assert all(len({home[token] for token in a}) == 1 for a, _ in rows)


def test_sentences_of_a_document_fill_sequences_and_only_longer_ones_are_split():
  documents = [[[1] * 3, [2] * 3, [3] * 2, [4] * 14, [5] * 4, [6]]]
  rows = build(documents, kind='doc_sentences', length=8, short_seq_prob=0.0)
  assert [a for a, _ in rows] == [
    [1, 1, 1, 2, 2, 2], [3, 3], [4] * 6, [4] * 6, [4, 4, 5, 5, 5, 5], [6],
  ]  # fmt: skip


@given(st.integers(0, 2**32), st.integers(8, 40), st.sampled_from([0, 0.5]))
@settings(deadline=None, max_examples=100)
def test_full_sentences_lose_no_token_and_a_span_ends_where_its_document_does(seed, length, short):
  documents = make_documents(seed, tokens=60)
  rows = build(documents, kind='full_sentences', length=length, short_seq_prob=short)
  home = homes(documents)
  assert [token for *spans, _ in rows for span in spans for token in span] == list(home)
  for *spans, _ in rows:
    assert all(home[span[0]] == home[span[-1]] for span in spans)
    for one, other in itertools.pairwise(spans):
      assert home[one[-1]] != home[other[0]]


@given(st.integers(0, 2**32), st.integers(8, 40))
@settings(deadline=None, max_examples=100)
def test_a_row_of_full_sentences_has_no_room_for_the_next_sentence(seed, length):
  documents = make_documents(seed, tokens=60, count=12)
  home = homes(documents)
  left = {token: s[-1] - token + 1 for d in documents for s in d for token in s}  # of its sentence
  rows = build(documents, kind='full_sentences', length=length, short_seq_prob=0.0)
  for (*spans, _), (following, *_) in itertools.pairwise(rows):
    size = 1 + sum(len(span) + 1 for span in spans)
    separator = home[spans[-1][-1]] != home[following[0]]
    assert size + left[following[0]] + separator > length


def test_full_sentences_continue_in_the_next_document_after_a_separator():
  documents = [[[1] * 3, [2] * 2], [[3]], [[4] * 9], [[5] * 2], [[6] * 7]]
  rows = build(documents, kind='full_sentences', length=10, short_seq_prob=0.0)
  wanted = [
    [[1, 1, 1, 2, 2], [3]],
    [[4] * 8],
    [[4], [5, 5]],
    [[6] * 7],
  ]  # only the 4s must be split
  assert [spans for *spans, _ in rows] == wanted


def test_short_rows_of_full_sentences_have_all_lengths():
  documents = [[[n]] * 500 for n in range(10)]
  rows = build(documents, kind='full_sentences', length=32, short_seq_prob=1.0)
  sizes = {1 + sum(len(span) + 1 for span in spans) for *spans, _ in rows}
  assert sizes >= set(range(3, 32))


def sequences_of(sizes):
  """An example of each size, one behind the other in the text."""
  starts = np.cumsum([0, *sizes]).tolist()
  return [
    Instance(((start, start + size - 2),)) for start, size in zip(starts, sizes, strict=False)
  ]


@given(st.lists(st.integers(3, 32), max_size=300), st.integers(1, 6))
@settings(deadline=None, max_examples=100)
def test_packed_rows_hold_every_sequence_once_and_never_too_many(sizes, sequences):
  items = sequences_of(sizes)
  rows = list(packing.first_fit(items, 32, sequences, BERT.size))
  assert sorted(item for row in rows for item in row) == items
  for row in rows:
    assert 1 <= len(row) <= sequences and sum(map(BERT.size, row)) <= 32
    assert row == sorted(row)


def test_packing_fills_rows_and_the_more_sequences_the_better():
  rng = random.Random(0)
  items = sequences_of([rng.randint(5, 64) for _ in range(5000)])
  tokens = sum(map(BERT.size, items))
  rows = {s: list(packing.first_fit(items, 128, s, BERT.size)) for s in (1, 2, 8)}
  filled = {s: tokens / 128 / len(rows[s]) for s in rows}
  assert [len(row) for row in packing.first_fit(sequences_of([20, 12]), 32, 2, BERT.size)] == [2]
  assert filled[1] < 0.3 and filled[2] > 1.8 * filled[1] and filled[8] > 0.97


def test_rows_of_an_endless_stream_are_not_kept_open_for_ever():
  item = Instance(((0, 15),))  # of 17 tokens: no two of them fit
  assert next(packing.first_fit(itertools.repeat(item), 32, 4, BERT.size)) == [item]


def to_columns(rows, tokens, length, sequences, **options):
  options = {'template': BERT, 'pad_id': 1} | options
  return list(instances.to_columns(rows, tokens, length, sequences, **options))


def test_rows_are_laid_out_with_special_tokens_ends_and_labels():
  tokens = np.arange(5, 20)
  rows = [
    [Instance(((0, 2), (2, 3)), 1, True)],
    [Instance(((3, 4), (4, 7)), 0, True)],
    [Instance(((0, 3),))],
    [Instance(((0, 1), (5, 7)))],
  ]
  first, second = to_columns(rows, tokens, 8, 1, size=2)
  wanted = [[101, 5, 6, 102, 7, 102, 1, 1], [101, 8, 102, 9, 10, 11, 102, 1]]
  assert first['input_ids'].tolist() == wanted
  assert first['ends'].tolist() == [[[4, 6]], [[3, 7]]]
  assert first['next_sentence_labels'].tolist() == [[1], [0]]
  wanted = [[101, 5, 6, 7, 102, 1, 1, 1], [101, 5, 102, 10, 11, 102, 1, 1]]
  assert second['input_ids'].tolist() == wanted
  assert second['ends'].tolist() == [[[5, 5]], [[6, 6]]]  # all of it is A


def test_packed_rows_are_laid_out_one_sequence_behind_the_other():
  rows = [[Instance(((0, 2), (2, 3)), 1, True), Instance(((3, 4), (4, 5)), 0, True)]]
  (columns,) = to_columns(rows, np.arange(5, 20), 12, 3)
  assert columns['input_ids'].tolist() == [[101, 5, 6, 102, 7, 102, 101, 8, 102, 9, 102, 1]]
  assert columns['ends'].tolist() == [[[4, 6], [9, 11], [0, 0]]]
  assert columns['next_sentence_labels'].tolist() == [[1, 0, 0]]


def test_ids_take_two_bytes_as_long_as_they_fit():
  wanted = {'input_ids': ('uint16', (64,)), 'ends': ('uint16', (1, 2))}
  assert instances.columns('doc_sentences', 64, 2**16) == wanted
  labels = {'next_sentence_labels': ('uint8', (1,))}
  wide = {'input_ids': ('int32', (64,))}
  assert instances.columns('nsp', 64, 2**16 + 1) == wanted | wide | labels
  packed = {'ends': ('uint16', (4, 2)), 'next_sentence_labels': ('uint8', (4,))}
  assert instances.columns('sop', 64, 2**16, 4) == wanted | packed
