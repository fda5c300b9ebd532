"""Vocabularies: trained exactly, deterministically and by the rule; counts of a report."""

import collections
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data import sentencepiece, vocabulary
from bertjax.data import text as text_lib
from bertjax.data import workers as worker_lib
from bertjax.data.normalization import word_splitter
from bertjax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from bertjax.data.vocabulary import WordCounts, count_words, train_wordpiece

HEADER = 104  # [PAD], 99 unused entries, [UNK], [CLS], [SEP], [MASK]


def plain_wordpiece(counts: dict[str, int], min_count: int) -> list[str]:
  """The rule with everything recounted after each merge: characters, then merges."""
  words = {word: [word[0], *('##' + c for c in word[1:])] for word in counts}
  entries = dict.fromkeys(sorted({piece for word in words.values() for piece in word}))
  while True:
    pairs = collections.Counter()
    for word, pieces in words.items():
      for pair in itertools.pairwise(pieces):
        pairs[pair] += counts[word]
    best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
    if best is None or pairs[best] < min_count:
      return list(entries)
    merged = best[0] + best[1].removeprefix('##')
    entries.setdefault(merged)
    for pieces in words.values():
      i = 0
      while i < len(pieces) - 1:
        if (pieces[i], pieces[i + 1]) == best:
          pieces[i : i + 2] = [merged]
        i += 1


def test_the_most_frequent_pair_is_merged_first_and_ties_go_by_spelling():
  # Pairs at first: ##u ##g 20, p ##u 17, ##u ##n 16, h ##u 15, ##g ##s 5, b ##u 4.
  counts = {'hug': 10, 'pug': 5, 'pun': 12, 'bun': 4, 'hugs': 5}
  merges = ['##ug', '##un', 'hug', 'pun', 'hugs', 'pug', 'bun']  # 20, 16, 15, 12, 5, 5, 4
  letters = ['##g', '##n', '##s', '##u', 'b', 'h', 'p']
  assert train_wordpiece(counts, HEADER + 14)[HEADER:] == letters + merges


@given(
  st.dictionaries(st.text('abc', min_size=1, max_size=8), st.integers(1, 9), min_size=1),
  st.integers(1, 6),
)
@settings(deadline=None, max_examples=150)
def test_training_equals_the_plain_rule_on_any_words(counts, min_count):
  entries = plain_wordpiece(counts, min_count)
  size = HEADER + len(entries)
  assert train_wordpiece(counts, size, min_count=min_count)[HEADER:] == entries
  with pytest.raises(ValueError, match=f'yields only {size} entries, {size + 1} were asked'):
    train_wordpiece(counts, size + 1, min_count=min_count)


@pytest.mark.parametrize('size', [240, 500])
def test_the_size_is_exact_and_no_entry_stands_twice(documents, size):
  vocab = train_wordpiece(count_words(documents), size)
  assert len(vocab) == len(set(vocab)) == size


def test_special_tokens_have_the_ids_of_google(vocab):
  entries = vocab.read_text(encoding='utf-8').splitlines()
  assert [entries.index(token) for token in SPECIAL_TOKENS] == [0, 100, 101, 102, 103]
  assert entries[1:100] == [f'[unused{i}]' for i in range(99)]


def test_two_processes_with_different_hash_seeds_train_the_same_vocabulary():
  script = """if True:
    from bertjax.data import vocabulary
    words = ['%x' % (i * i * 7919 % 65521) for i in range(3000)]
    print(vocabulary.train_wordpiece(vocabulary.count_words([' '.join(words)]), 900))"""
  environments = [os.environ | {'PYTHONHASHSEED': seed} for seed in ('1', '2')]
  one, other = (
    subprocess.check_output([sys.executable, '-c', script], env=e) for e in environments
  )
  assert one == other and one.count(b',') == 899


def test_words_are_counted_as_bert_splits_them():
  counts = count_words(["Don't! DON", 'Don\u00ad Élan 字字'])
  assert counts == {'don': 3, "'": 1, 't': 1, '!': 1, 'elan': 1, '字': 2}
  assert count_words(['Élan'], lowercase=False) == {'Élan': 1}


def test_a_size_below_the_alphabet_is_refused_with_the_least_size():
  with pytest.raises(ValueError, match=r'104 special entries and 3 single.* at least 107'):
    train_wordpiece({'abc': 5}, 106)
  assert len(train_wordpiece({'abc': 5}, 107)) == 107


def test_every_character_seen_twice_is_kept(tmp_path):
  letters = [chr(0x4E00 + i) for i in range(5000)]
  counts = dict.fromkeys(letters[:4000], 2) | dict.fromkeys(letters[4000:], 1)
  message = r'104 special ones, 4000 for its 4000 characters .1000 more .* size of at most 4104'
  with pytest.raises(ValueError, match=message):
    train_wordpiece(counts, 8000)
  assert train_wordpiece(counts, 4104)[HEADER:] == letters[:4000]


def test_rare_characters_take_no_more_than_half_of_the_vocabulary():
  counts = {'ab': 10**9, 'abc': 10**6} | {chr(0x4E00 + i): 2 for i in range(3000)}
  vocab = train_wordpiece(counts, HEADER + 1002)
  assert vocab[HEADER + 1000 :] == ['ab', 'abc'] and len([c for c in vocab if c >= '一']) == 997


def test_characters_that_do_not_fit_are_warned_about_if_they_are_few(caplog):
  counts = {chr(0x4E00 + i): 10**6 for i in range(1500)} | {
    chr(0x8000 + i): 100 for i in range(2500)
  }
  vocab = train_wordpiece(counts, HEADER + 2000)
  assert len(vocab) == HEADER + 2000 and vocab[HEADER + 1999] == chr(0x8000 + 499)
  assert 'holds the 2000 most frequent characters of the text; 2000 others' in caplog.text
  with pytest.raises(
    ValueError, match='and 4000 single characters; choose a size of at least 4104'
  ):
    train_wordpiece(counts, HEADER + 1400)


def test_words_of_the_most_frequent_letters_can_be_tokenised_and_no_others(documents):
  counts = count_words(documents)
  letters = collections.Counter(letter for word in counts.elements() for letter in word)
  kept = {letter for letter, _ in letters.most_common(30)}
  tokenizer = Tokenizer(train_wordpiece(counts, 300, alphabet=30))
  words = [word for word in counts if kept.issuperset(word)]
  others = [word for word in counts if not kept.issuperset(word)]
  assert len(words) > 1000 and len(others) > 20
  assert not any(tokenizer.unk_id in ids for ids in tokenizer.encode(words))
  assert all(tokenizer.unk_id in ids for ids in tokenizer.encode(others))


@given(
  st.text(
    st.sampled_from([*map(chr, range(33, 127)), ' ', '\t', 'é', '\u0301', '字', '\x07', '\u200b'])
  )
)
@settings(deadline=None, max_examples=300)
def test_counting_equals_the_tokenizer_s_own_splitting(text):
  for lowercase in (True, False):
    normalizer, splitter = word_splitter(lowercase)
    words = splitter.pre_tokenize_str(normalizer.normalize_str(text))
    assert count_words([text], lowercase=lowercase) == collections.Counter(w for w, _ in words)


def test_a_text_without_white_space_is_counted_in_chunks():
  assert count_words(['字' * 25_000]) == {'字': 25_000}
  assert sum(len(w) * n for w, n in count_words(['é' * 25_000]).items()) == 25_000


def test_the_rare_half_is_pruned_and_what_may_be_lost_is_kept():
  counts = WordCounts(a=9, b=5, c=5, d=2, e=1)
  counts.prune(5)
  assert (counts.error, len(counts)) == (0, 5)
  counts.prune(4)  # at most two stay: those above the third's count
  assert (counts, counts.error) == ({'a': 9}, 5)


ODD = 'A\u00a0b\x1cc\u200bd  [MASK]x[UNK]\n\n字字。Élan\tÉlan!\r\nEnd of\u2028it… Then ﬁn.'


def plainly(texts, tokenizer) -> dict:
  """The report's counts, sentence by sentence."""
  documents = [tokenizer.encode(text_lib.split_document(text, 'prose')) for text in texts]
  sentences = list(itertools.chain.from_iterable(documents))
  ids = list(itertools.chain.from_iterable(sentences))
  histogram = collections.Counter(int(np.searchsorted(vocabulary.EDGES, len(s))) for s in sentences)
  return {
    'documents': len(texts),
    'sentences': len(sentences),
    'tokens': len(ids),
    'unknown': ids.count(tokenizer.unk_id),
    'documents_for_nsp': sum(len(document) > 1 for document in documents),
    'sentences_by_length': [histogram[i] for i in range(len(vocabulary.EDGES) + 1)],
    'duplicates': len(texts) - len(set(texts)),
  }


@pytest.fixture(scope='module')
def vocabularies(documents, vocab, tmp_path_factory):
  """A vocabulary of either kind."""
  path = tmp_path_factory.mktemp('model') / 'spiece.model'
  path.write_bytes(sentencepiece.train_sentencepiece(documents, 500))
  return {'wordpiece': vocab, 'sentencepiece': path}


@pytest.mark.parametrize('kind', ['wordpiece', 'sentencepiece'])
@pytest.mark.parametrize('lowercase', [True, False])
def test_the_report_counts_what_the_tokenizer_makes_of_every_sentence(
  documents, vocabularies, kind, lowercase
):
  vocab = vocabularies[kind]
  texts = [*documents, ODD, 'One.', documents[3], documents[3], 'Two']
  found = vocabulary.describe(texts, vocab, lowercase=lowercase)
  expected = plainly(texts, Tokenizer.from_file(vocab, lowercase=lowercase))
  assert expected['unknown'] > 1 and expected['duplicates'] == 2
  assert {name: found[name] for name in expected} == expected
  assert sum(found['documents_by_length']) == len(texts)
  # ODD has '字字。Élan', three words between white space.
  assert found['words'] == sum(len(text.split()) for text in texts) + 2 and found['nsp'] is True


def test_lengths_fall_into_the_bucket_that_their_edge_closes():
  assert vocabulary._histogram([0, 1, 16, 17, 64, 8192, 8193]).tolist() == [3, 2, 0, 0, 0, 1, 1]


@pytest.mark.parametrize('workers', [1, 2])
def test_neither_units_nor_workers_change_the_counts(documents, vocab, monkeypatch, workers):
  words, facts = vocabulary.count_words(documents), vocabulary.describe(documents, vocab)
  monkeypatch.setattr(worker_lib, '_UNIT', 10_000)
  assert len(list(worker_lib.map_units(len, documents))) > 2
  assert vocabulary.count_words(documents, workers=workers) == words
  assert vocabulary.describe(documents, vocab, workers=workers) == facts


def test_pruned_counts_are_bounded_reported_and_the_same_for_any_workers(documents, monkeypatch):
  exact = vocabulary.count_words(documents)
  monkeypatch.setattr(worker_lib, '_UNIT', 10_000)
  one, two = (vocabulary.count_words(documents, max_words=500, workers=n) for n in (1, 2))
  assert list(one.items()) == list(two.items()) and one.error == two.error > 0
  assert len(one) <= 500 < len(exact) and exact.error == 0
  assert all(exact[word] - one.error <= count <= exact[word] for word, count in one.items())
  assert not [word for word, count in exact.items() if count > one.error and word not in one]
