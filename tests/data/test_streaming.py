"""Batches from raw text: the same for any loader, workers, hosts and interruptions."""

import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import re
import threading

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from bertjax import prepare
from bertjax.config import pretraining
from bertjax.data import blocks, loader, mixture, preprocess, prng, remote, streaming
from bertjax.data import text as text_lib
from bertjax.data.masking import Masking
from bertjax.data.preprocess import Settings
from bertjax.data.tokenizer import Tokenizer
from tests.data.test_remote import hub, table  # noqa: F401 (a fixture)
from tests.data.test_text import write_tfds
from tests.waiting import until

WORDS = [f'w{i:03d}' for i in range(300)]
BATCH = 8
LOADERS = ['threads'] + ['tfdata'] * bool(importlib.util.find_spec('tensorflow_text'))
EACH = [pytest.param(name, marks=pytest.mark.e2e) if name == 'tfdata' else name for name in LOADERS]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(blocks, '_BLOCK_CHARS', 3000)
  monkeypatch.setattr(streaming, '_MIXED_BLOCKS', 4)


@pytest.fixture
def tokenizer(tmp_path):
  path = tmp_path / 'vocab.txt'
  path.write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', 'doc', *WORDS]))
  return Tokenizer.from_file(path)


def documents(count: int, seed: int = 0) -> list[str]:
  """Documents of 3 to 12 sentences; the first word of document n is unique to it where n < 300."""
  rng = np.random.default_rng(seed)
  result = []
  for number in range(count):
    sentences = [
      ' '.join(rng.choice(WORDS, rng.integers(3, 12))).capitalize() + '.'
      for _ in range(rng.integers(3, 12))
    ]
    result.append(f'Doc {WORDS[number % 300]}. ' + ' '.join(sentences))
  return result


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / 'texts'
  folder.mkdir()
  for number, part in enumerate(np.array_split(documents(120), 5)):
    lines = [json.dumps({'text': str(text)}) + '\n' for text in part]
    (folder / f'{number}.jsonl').write_text(''.join(lines))
  return folder


def stream(source, tokenizer, *, batch_size=BATCH, options=(),
           **settings):  # fmt: skip
  settings = {'kind': 'doc_sentences', 'length': 32, 'format': 'jsonl', 'seed': 3} | settings
  text = blocks.Text(str(source), tokenizer, Settings(**settings))
  heldout = loader.Batches(
    text.heldout(16), batch_size, 3, Masking(), tokenizer.vocab_size, tokenizer.special,
  )  # fmt: skip
  return streaming.Stream({'': text}, batch_size, heldout.targets, **dict(options))


def take(batches, count: int) -> list[dict]:
  made = list(itertools.islice(batches, count))
  batches.close()
  return made


def hashes(batches) -> list[str]:
  return [digest(batch) for batch in batches]


def digest(batch: dict) -> str:
  content = [(name, batch[name].dtype.str, batch[name].tobytes()) for name in sorted(batch)]
  return hashlib.sha256(repr(content).encode()).hexdigest()


@pytest.mark.parametrize(
  ('kind', 'sequences'), [('nsp', 1), ('sop', 3), ('doc_sentences', 3), ('full_sentences', 1)]
)
def test_batches_do_not_depend_on_workers(source, tokenizer, kind, sequences):
  one, eight = (
    hashes(take(stream(
      source, tokenizer, kind=kind, max_sequences_per_row=sequences, options={'workers': workers},
    ).batches(), 30))
    for workers in (1, 8)
  )  # fmt: skip
  assert one == eight
  assert len(set(one)) == 30


@pytest.mark.e2e
@pytest.mark.skipif(LOADERS == ['threads'], reason='no tensorflow_text')
@pytest.mark.parametrize(
  ('kind', 'sequences', 'workers'), [('nsp', 1, 1), ('sop', 3, 8), ('full_sentences', 1, 8)]
)
def test_tf_data_makes_the_same_batches(source, tokenizer, kind, sequences, workers):
  """With resuming, two groups, and positions that move at the same pace."""
  made = []
  for name in LOADERS:
    options = {'loader': name, 'workers': workers, 'groups': 2}
    settings = {'kind': kind, 'max_sequences_per_row': sequences}
    whole = stream(source, tokenizer, options=options, **settings)
    batches = hashes(take(whole.batches(), 20))
    position = whole.position(17)
    again = stream(source, tokenizer, options=options, **settings)
    assert hashes(take(again.batches(18, position), 2)) == batches[18:]
    made.append((batches, position))
  assert made[0] == made[1]


@pytest.mark.e2e
@pytest.mark.parametrize('groups', [1, 2, 7])
def test_a_stream_resumes_from_any_position(source, tokenizer, groups):
  """Also past the end of an epoch, with more groups than shards, and twice."""
  make = lambda: stream(source, tokenizer, options={'groups': groups})  # noqa: E731
  whole = make()
  expected, positions = [], []
  batches = whole.batches()
  for number in range(60):
    expected.append(digest(next(batches)))
    positions.append(json.loads(json.dumps(whole.position(number + 1))))
  batches.close()
  for start in (1, 2, 13, 37):
    again = make()
    first = hashes(take(again.batches(start, positions[start - 1]), 5))
    assert first == expected[start : start + 5]
    third = make()
    assert (
      hashes(take(third.batches(start + 5, again.position(start + 5)), 9))
      == (expected[start + 5 : start + 14])
    )
  skipping = make()  # 10 batches after a saved position
  assert hashes(take(skipping.batches(23, positions[12]), 3)) == expected[23:26]


@pytest.mark.parametrize(
  ('kind', 'made_by'),
  [('hub', 'threads'), *(pytest.param('tfds', name, marks=pytest.mark.e2e) for name in LOADERS)],
)
def test_a_stream_of_the_hub_or_tfds_resumes(tmp_path, tokenizer, hub, kind, made_by):  # noqa: F811
  """The batches after a saved position are those of an uninterrupted stream."""
  texts = [part.tolist() for part in np.array_split(documents(90), 3)]
  if kind == 'hub':
    hub.files['me/texts', 'main'] = {
      f'train-0000{i}-of-00003.parquet': table(part, group=10) for i, part in enumerate(texts)
    }
    source, format = 'hf:me/texts:train', 'parquet'
  else:
    pytest.importorskip('tensorflow_datasets')
    source, format = write_tfds(tmp_path, {'train': [*itertools.chain(*texts)]}), 'tfds'
  make = lambda loader: stream(  # noqa: E731
    source, tokenizer, format=format, options={'groups': 2, 'loader': loader}
  )
  expected = make('threads')
  assert len(expected._text.shards) == 3
  whole, positions = expected.batches(), []
  batches = []
  for number in range(40):
    batches.append(digest(next(whole)))
    positions.append(json.loads(json.dumps(expected.position(number + 1))))
  whole.close()
  for start in (6, 25)[: 1 if made_by == 'tfdata' else 2]:
    again = hashes(take(make(made_by).batches(start, positions[start - 1]), 10))
    assert again == batches[start : start + 10]


def test_a_resumed_stream_does_not_fetch_what_it_has_read(tokenizer, hub):  # noqa: F811
  texts = documents(400)
  hub.files['me/texts', 'main'] = {'train.parquet': table(texts, group=20)}
  front = stream('hf:me/texts', tokenizer, format='parquet')
  hub.ranges.clear()
  batches = front.batches()
  for _ in range(80):
    next(batches)
  batches.close()
  (_, read), *_ = json.loads(json.dumps(front.position(80)))['groups']['0']['open']
  assert read >= 40
  text = front._text
  hub.ranges.clear()
  number, *_ = next(text.documents(text.shards[0], read))
  assert number == read + 1
  metadata = pq.ParquetFile(
    pa.BufferReader(hub.files['me/texts', 'main']['train.parquet'])
  ).metadata
  group = metadata.row_group(read // 20).column(0)
  begin = group.dictionary_page_offset or group.data_page_offset
  first, *_ = [at for _, at, count in hub.ranges if count == group.total_compressed_size]
  assert first == begin


def test_the_commit_of_the_hub_s_files_belongs_to_a_run(tokenizer, hub):  # noqa: F811
  hub.files['me/texts', 'main'] = {'train.parquet': table(documents(30))}
  made = stream('hf:me/texts', tokenizer, format='parquet')._text.identity['data.input']
  assert made.startswith('1 shards ') and made.endswith('commit ' + 'a' * 40)
  remote.list_data_set.cache_clear()
  hub.commits['main'] = 'd' * 40
  moved = stream('hf:me/texts', tokenizer, format='parquet')._text.identity['data.input']
  assert moved != made
  hub.commits |= {'main': 'a' * 40, 'a' * 40: 'a' * 40}
  hub.files['me/texts', 'a' * 40] = hub.files['me/texts', 'main']
  source = f'hf:me/texts@{"a" * 40}'
  assert stream(source, tokenizer, format='parquet')._text.identity['data.input'] == made


def test_sizes_of_hub_files_come_with_the_listing(tokenizer, hub, tmp_path):  # noqa: F811
  """They give the shares of a mixture and the epoch, without a request for each file."""
  texts = documents(400)
  for name, part in (('many', texts[:300]), ('few', texts[300:])):
    files = {f'train-{i}.parquet': table(part[i::3], group=20) for i in range(3)}
    hub.files[f'me/{name}', 'main'] = files
  text = blocks.Text('hf:me/many', tokenizer, Settings(format='parquet', heldout_fraction=1e-9))
  assert text.size == sum(map(len, hub.files['me/many', 'main'].values()))
  config = pretraining('tiny')
  config.data.update(input='many=hf:me/many,few=hf:me/few', vocab=f'{tmp_path}/vocab.txt',
                     dupe_factor=1)  # fmt: skip
  many, few = prepare.streamed_text(config).mixture.counts / mixture.WINDOW
  assert few == pytest.approx(0.25, abs=0.02) and many == 1 - few
  assert not hub.ranges
  assert len(list(text.documents(text.shards[0]))) == 100
  assert sum(count == 1 for *_, count in hub.ranges) == 0
  assert text.epochs(2, 150, groups=1) == pytest.approx(1.5, abs=0.15)  # files have footers


def test_parts_of_a_preparation_read_one_commit(tmp_path, tokenizer, hub):  # noqa: F811
  hub.files['me/texts', 'main'] = {'train.parquet': table(documents(30))}
  settings = Settings(kind='doc_sentences', length=32, format='parquet')
  make = functools.partial(
    preprocess.prepare, 'hf:me/texts', tokenizer, settings, tmp_path / 'rows', workers=0
  )
  assert make(part=(0, 2)) is None
  hub.push('me/texts', {'train.parquet': table(documents(30, seed=1))})
  remote.list_data_set.cache_clear()
  with pytest.raises(ValueError, match=r'rows\.incomplete'):
    make(part=(1, 2))


def test_a_hub_that_fails_while_training_ends_the_stream(tokenizer, hub):  # noqa: F811
  hub.files['me/texts', 'main'] = {'train.parquet': table(documents(400), group=20)}
  batches = stream('hf:me/texts', tokenizer, format='parquet').batches()
  next(batches)
  hub.trouble = [500] * 1000
  with pytest.raises(ValueError, match='cannot be read after 3 tries') as error:
    for _ in range(200):
      next(batches)
  assert error.value.exit_code == 75


def test_an_unknown_column_of_a_shard_is_named(tokenizer, hub):  # noqa: F811
  hub.files['me/texts', 'main'] = {'train.parquet': table(documents(30))}
  with pytest.raises(ValueError, match="has no column 'body'; it has"):
    stream('hf:me/texts', tokenizer, format='parquet', text_key='body')


@pytest.mark.parametrize(('groups', 'hosts'), [(1, 2), (1, 8), (2, 4), (4, 1), (4, 2)])
def test_batches_do_not_depend_on_hosts(source, tokenizer, groups, hosts):
  """Hosts that join later share the groups of the run's start; positions merge to the same."""
  alone = stream(source, tokenizer, options={'groups': groups})
  batches = alone.batches()
  whole = [next(batches) for _ in range(20)]
  position = alone.position(10)
  parts, positions = [], []
  for local in np.split(np.arange(BATCH), hosts):
    host = stream(source, tokenizer, options={'groups': hosts, 'local': local})
    made = host.batches(10, position)
    parts.append([next(made) for _ in range(10)])
    positions.append(host.position(20))
  for number in range(10):
    for name, expected in whole[10 + number].items():
      joined = np.concatenate([part[number][name] for part in parts])
      np.testing.assert_array_equal(joined, expected)
  assert streaming.merge(positions) == alone.position(20)


@pytest.mark.parametrize('groups', [1, 3, 8])
def test_a_group_reads_every_document_once_an_epoch(source, tokenizer, groups):
  text = stream(source, tokenizer)._text
  read = []
  for group in range(groups):
    reader = streaming.Reader(text, None, group, groups, streaming._START, BATCH)
    for epoch, _, texts in reader.blocks():
      if epoch > 1:
        break
      read += texts
  heldout = {t for shard in text.shards for _, t, out in text.documents(shard) if out}
  assert sorted([*read, *heldout]) == sorted(documents(120))
  assert heldout
  assert not heldout & set(read)


def test_a_record_goes_with_one_of_the_next_blocks_of_its_epoch(source, tokenizer):
  text = stream(source, tokenizer)._text
  reader = streaming.Reader(text, None, 0, 1, streaming._START, BATCH)
  came, went, last = {}, {}, {}
  for block in reader.blocks():
    if block[0] > 3:
      break
    records = reader.encode(block)
    came |= {(block[0], key): block[1] for key in records['key'].tolist()}
    last[block[0]] = block[1]
    records = reader.shuffle(records)
    marks = [records[name].tolist() for name in ('epoch', 'key', 'block', 'index')]
    assert marks[3] == list(range(len(marks[3])))
    assert set(marks[2]) <= {block[1]}
    went |= dict.fromkeys(zip(*marks[:2], strict=True), block[1])
  assert {key for key in came if key[0] < 3} == {key for key in went if key[0] < 3}
  waited = np.array([block - came[key] for key, block in went.items()])
  assert len(waited) > 400
  np.testing.assert_allclose(np.bincount(waited) / len(waited), np.full(4, 1 / 4), atol=0.1)
  for (epoch, _), block in went.items():
    assert epoch == 3 or block <= last[epoch] + 1  # with the first block of the next


def test_epochs_have_other_orders_and_masks(source, tokenizer):
  batches = take(stream(source, tokenizer).batches(), 80)
  ids = np.concatenate([batch['input_ids'] for batch in batches])
  assert len(np.unique(ids, axis=0)) > 0.95 * len(ids)  # some are very short


def records(source, tokenizer, **options):
  """A stream of records without masks, with the epoch and key of each."""
  made = stream(source, tokenizer, **options)
  made._targets = lambda records, epoch, key: records | {'epoch': epoch, 'key': key}
  return made


@pytest.mark.parametrize('groups', [1, 2])
def test_a_stage_continues_where_the_one_before_ended(source, tokenizer, groups):
  """With records of another length, no document is read twice in an epoch; bitwise resumable."""
  options = {'groups': groups}
  first = records(source, tokenizer, options=options)
  batches = take(first.batches(), 9)
  settings = {'length': 64, 'batch_size': 4, 'options': options | {'stage': 9}}
  second, position = records(source, tokenizer, **settings), first.position(9)
  later = take(second.batches(0, json.loads(json.dumps(position))), 40)
  begun = [
    (epoch, int(word))
    for batch in (*batches, *later)
    for ids, epoch in zip(batch['input_ids'].tolist(), batch['epoch'].tolist(), strict=True)
    for doc, word in itertools.pairwise(ids)
    if doc == tokenizer.vocab.index('doc')
  ]  # a document begins with its number
  assert len(set(begun)) == len(begun) > 100
  assert len({epoch for epoch, _ in begun}) > 1
  for start in (1, 12):
    again = records(source, tokenizer, **settings)
    assert hashes(take(again.batches(start, second.position(start)), 3)) == (
      hashes(later[start : start + 3])
    )


@pytest.mark.parametrize('groups', [1, 2])
def test_a_larger_batch_of_the_same_records_leaves_none_out(source, tokenizer, groups):
  """As in the warm-up of the batch size, across the end of an epoch."""
  options = {'groups': groups}
  whole = records(source, tokenizer, options=options)
  expected = take(whole.batches(), 60)
  first = records(source, tokenizer, options=options)
  batches = take(first.batches(), 9)
  second = records(source, tokenizer, batch_size=2 * BATCH, options={'groups': 1, 'stage': 9})
  batches += take(second.batches(0, first.position(9)), 20)
  for group in range(groups):
    rows, wanted = (
      np.concatenate([np.split(batch['key'], groups)[group] for batch in made])
      for made in (batches, expected)
    )
    np.testing.assert_array_equal(rows, wanted[: len(rows)])


def test_a_stage_on_other_text_begins_at_its_front(source, tokenizer, tmp_path):
  (tmp_path / 'other.jsonl').write_text((source / '0.jsonl').read_text())
  first = stream(source, tokenizer, options={'groups': 2})
  take(first.batches(), 5)
  make = lambda: stream(  # noqa: E731
    tmp_path / 'other.jsonl', tokenizer, options={'groups': 2, 'stage': 5}
  )
  assert hashes(take(make().batches(0, first.position(5)), 5)) == hashes(take(make().batches(), 5))


@pytest.mark.parametrize('format', ['prose', 'google', 'wikitext', 'parquet', 'jsonl'])
def test_reading_starts_after_any_record(tmp_path, format):
  texts = documents(30)
  if format == 'prose':
    texts = texts[:1]
  if format == 'parquet':
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({'text': [*texts[:7], ' ', *texts[7:]]})
    parquet.write_table(table, tmp_path / 'a', row_group_size=4)
  elif format == 'jsonl':
    lines = [json.dumps({'text': text}) for text in texts]
    (tmp_path / 'a').write_text('\n'.join([*lines[:7], '', *lines[7:]]))
  else:
    joined = {
      'prose': '', 'google': '\n\n', 'wikitext': '\n = Title = \n'
    }[format].join(texts)  # fmt: skip
    (tmp_path / 'a').write_text(joined)

  def read(skip):
    return list(text_lib.read_shard(
      str(tmp_path / 'a'), format, text_key='text', binary='refuse', encoding='utf-8',
      on_bad_row='stop', report=text_lib.Report(), skip=skip,
    ))  # fmt: skip

  everything = read(0)
  assert len(everything) == len(texts)
  for place, (number, _) in enumerate(everything, 1):
    assert read(number) == everything[place:]


def test_records_before_a_position_are_not_parsed(tmp_path):
  (tmp_path / 'a.jsonl').write_text('no JSON\n{"text": "Fine."}\n')
  options = {'text_key': 'text', 'binary': 'refuse', 'encoding': 'utf-8', 'on_bad_row': 'stop'}
  rows = text_lib.read_shard(
    str(tmp_path / 'a.jsonl'), 'jsonl', **options, report=text_lib.Report(), skip=1
  )
  assert list(rows) == [(2, 'Fine.')]


# Bad input: one sentence, from either loader, and nothing hangs


@pytest.mark.parametrize('name', EACH)
def test_a_shard_that_vanishes_is_named(source, tokenizer, name):
  made = stream(source, tokenizer, options={'loader': name})
  (source / '3.jsonl').unlink()
  with pytest.raises(ValueError, match=r'3\.jsonl can no longer be read: No such file'):
    take(made.batches(), 60)


def test_a_shard_that_changes_is_named(source, tokenizer):
  made = stream(source, tokenizer)
  with (source / '2.jsonl').open('a') as file:
    file.write('{"text": "More."}\n')
  with pytest.raises(ValueError, match=r'2\.jsonl has .* bytes and had .* when the run started'):
    take(made.batches(), 60)


def test_truncated_gzip_is_named(source, tokenizer):
  made = stream(source, tokenizer)
  lines = (source / '0.jsonl').read_bytes()
  (source / '0.jsonl').unlink()
  (source / 'z.jsonl.gz').write_bytes(gzip.compress(lines)[:-100])
  with pytest.raises(ValueError, match=r'z\.jsonl\.gz is not a complete \.gz file'):
    made = stream(source, tokenizer)
    take(made.batches(), 60)


def test_truncated_parquet_is_named(tmp_path, tokenizer):
  import pyarrow as pa
  from pyarrow import parquet

  folder = tmp_path / 'parquet'
  folder.mkdir()
  table = pa.table({'text': documents(80)})
  for shard in 'ab':
    parquet.write_table(table, folder / f'{shard}.parquet')
  data = (folder / 'b.parquet').read_bytes()
  (folder / 'b.parquet').write_bytes(data[: len(data) // 2])
  with pytest.raises(ValueError, match=r'b\.parquet is not a complete Parquet file'):
    take(stream(folder, tokenizer, format='parquet').batches(), 60)


def error_of(batches, seconds: float = 300) -> str:
  """The one sentence that reading further raises within some time."""
  errors = []

  def read():
    try:
      take(batches, 200)
    except ValueError as error:
      errors.append(str(error))

  thread = threading.Thread(target=read, daemon=True)
  thread.start()
  until(lambda: not thread.is_alive(), 'an error', seconds)
  (error,) = errors
  assert '\n' not in error
  return error


@pytest.fixture
def shards(hub):  # noqa: F811
  """Three shards of the hub, a dict that the server reads."""
  parts = np.array_split(documents(120), 3)
  files = {f'train-{i}.parquet': table(part.tolist(), group=10) for i, part in enumerate(parts)}
  hub.files['me/texts', 'main'] = files
  return files


@pytest.mark.parametrize(('name', 'kind'), [
  ('threads', 'hub'), ('threads', 'addresses'),
  *(pytest.param(name, 'hub', marks=pytest.mark.e2e) for name in LOADERS[1:]),
])  # fmt: skip
def test_a_remote_shard_that_vanishes_in_mid_run_is_named(tokenizer, shards, name, kind):
  source = 'hf:me/texts'
  if kind == 'addresses':
    source = ','.join(map(str, remote.list_data_set(source)))
  batches = stream(source, tokenizer, format='parquet', options={'loader': name}).batches()
  next(batches)
  del shards['train-1.parquet']
  assert 'train-1.parquet cannot be read: Entry Not Found' in error_of(batches)


@pytest.mark.parametrize('name', EACH)
@pytest.mark.parametrize('ending', ['jsonl.gz', 'parquet'])
def test_a_truncated_remote_shard_is_named(tokenizer, shards, name, ending):
  if ending == 'jsonl.gz':
    lines = [json.dumps({'text': text}) for text in documents(60, seed=1)]
    content = gzip.compress('\n'.join(lines).encode())
    shards.clear()
    shards |= {'train-0.jsonl.gz': content, 'train-1.jsonl.gz': content}
  shards[f'train-2.{ending}'] = shards[f'train-1.{ending}'][:-200]
  settings = {'format': 'parquet', 'heldout_fraction': 0.3, 'options': {'loader': name}}
  batches = stream('hf:me/texts', tokenizer, **settings).batches()
  assert f'train-2.{ending} is not a complete' in error_of(batches)


def test_a_server_that_stops_answering_ends_the_stream(tokenizer, shards, hub, monkeypatch):  # noqa: F811
  monkeypatch.setattr(remote, '_TIMEOUT', 0.1)
  batches = stream('hf:me/texts', tokenizer, format='parquet').batches()
  next(batches)
  hub.trouble = ['hang'] * 100
  assert 'cannot be read after 3 tries: ' in error_of(batches)


def test_a_group_with_only_heldout_documents_is_refused(tmp_path, tokenizer):
  texts = documents(120)
  heldout = np.array(prng.choose_heldout([text.encode() for text in texts], 0.3)[1])
  for name, chosen in (('out', heldout), ('train', ~heldout)):
    lines = [json.dumps({'text': text}) for text, one in zip(texts, chosen, strict=True) if one]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  source = f'{tmp_path}/out.jsonl,{tmp_path}/train.jsonl'
  made = stream(source, tokenizer, heldout_fraction=0.3, options={'groups': 2})
  assert re.search(r'has 0 documents .* one of the processes \(of .*out\.jsonl\)',
                   error_of(made.batches()))  # fmt: skip


def test_an_empty_source_of_a_mixture_is_named(tmp_path, source, tokenizer):
  (tmp_path / 'empty.jsonl').write_text('')
  config = pretraining('tiny')
  config.data.update(format='jsonl', vocab=f'{tmp_path}/vocab.txt', dupe_factor=1,
                     input=f'full={source},empty={tmp_path}/empty.jsonl')  # fmt: skip
  with pytest.raises(ValueError, match='the source empty is empty or of unknown size'):
    prepare.streamed_text(config)
  config.data.mixture = 'full=0.5,empty=0.5'
  with pytest.raises(ValueError, match=r'held-out documents of data\.input=.*/empty\.jsonl'):
    prepare.streamed_text(config).heldout(64)


@pytest.mark.parametrize('kind', ['nsp', 'doc_sentences'])
def test_a_group_without_enough_documents_is_refused(tmp_path, tokenizer, kind):
  path = tmp_path / 'few.jsonl'
  texts = documents(8)
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  groups = 8 if kind == 'nsp' else 64
  options = {'groups': groups}
  made = stream(path, tokenizer, batch_size=64, kind=kind, heldout_fraction=0.4, options=options)
  with pytest.raises(ValueError, match='documents to train on for one of the processes'):
    take(made.batches(), 2)


def test_a_text_that_is_smaller_than_a_batch_is_refused(source, tokenizer):
  made = stream(source, tokenizer, batch_size=1024)
  with pytest.raises(ValueError, match=r'fewer training records than a batch has.*1024'):
    take(made.batches(), 2)


def test_a_text_without_any_record_is_refused(tmp_path, tokenizer):
  """Sentence order has nothing to learn from documents of one sentence."""
  made = stream(_pairs(tmp_path), tokenizer, kind='doc_sentences')
  text = blocks.Text(
    str(tmp_path / 'one.jsonl'), tokenizer, Settings(kind='sop', length=32, format='jsonl')
  )
  made = streaming.Stream({'': text}, BATCH, made._targets)
  with pytest.raises(ValueError, match='fewer training records than a batch has'):
    take(made.batches(), 1)


def _pairs(tmp_path):
  path = tmp_path / 'one.jsonl'
  path.write_text(''.join(json.dumps({'text': f'{word} .'}) + '\n' for word in WORDS))
  return path


def test_what_only_preparation_has_is_refused(source, tokenizer):
  for wrong, match in (
    ({'dupe_factor': 2, 'kind': 'nsp'}, r'data\.dupe_factor=2 is for prepared rows'),
    ({'num_shards': 3}, r'data\.num_shards=3 is for prepared rows'),
    ({'format': 'tfrecord'}, 'prepare TFRecords'),
  ):
    with pytest.raises(ValueError, match=match):
      stream(source, tokenizer, **wrong)


def test_no_heldout_document_is_refused(source, tokenizer):
  with pytest.raises(ValueError, match=r'raise data\.heldout_fraction \(now 1e-12\)'):
    stream(source, tokenizer, heldout_fraction=1e-12)


# Mixtures


@pytest.fixture
def mixed(source, tokenizer, tmp_path):
  """mixed(**options) -> a stream of two sources, one of them rare and small."""
  path = tmp_path / 'rare.jsonl'
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in documents(40, seed=9)))
  settings = Settings(kind='doc_sentences', length=32, format='jsonl', seed=3)
  texts = {'many': blocks.Text(str(source), tokenizer, settings),
           'rare': blocks.Text(str(path), tokenizer, settings)}  # fmt: skip
  shares = mixture.Mixture({'many': 0.9, 'rare': 0.1}, seed=3)

  def make(**options):
    heldout = loader.Batches(
      texts['many'].heldout(16), BATCH, 3, Masking(), tokenizer.vocab_size, tokenizer.special
    )
    return streaming.Stream(texts, BATCH, heldout.targets, mixture=shares, **options)

  return make


@pytest.mark.parametrize('groups', [1, 4])
def test_a_mixture_does_not_depend_on_workers_hosts_and_interruptions(mixed, groups):
  whole = mixed(groups=groups, workers=1)
  batches = whole.batches()
  expected, positions = [], []
  for number in range(25):
    expected.append(next(batches))
    positions.append(json.loads(json.dumps(whole.position(number + 1))))
  batches.close()
  assert whole.epochs(25)['epoch/many'] > 0
  assert hashes(take(mixed(groups=groups, workers=8).batches(), 25)) == hashes(expected)
  for start in (3, 14):
    again = take(mixed(groups=1).batches(start, positions[start - 1]), 5)
    assert hashes(again) == hashes(expected[start : start + 5])
  parts = [take(mixed(groups=2, local=local).batches(10, positions[9]), 4)
           for local in np.split(np.arange(BATCH), 2)]  # fmt: skip
  for number in range(4):
    for name, column in expected[10 + number].items():
      joined = np.concatenate([part[number][name] for part in parts])
      np.testing.assert_array_equal(joined, column)


@pytest.mark.e2e
@pytest.mark.skipif(LOADERS == ['threads'], reason='no tensorflow_text')
def test_tf_data_makes_the_same_mixture(mixed):
  one, other = (hashes(take(mixed(groups=2, loader=n).batches(), 20)) for n in LOADERS)
  assert one == other
