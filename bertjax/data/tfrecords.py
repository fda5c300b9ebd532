"""TFRecords of google-research/bert's create_pretraining_data.py, read into rows and written.

Their masks are static: `input_ids` are masked already, and the predictions are separate columns
(`masked_columns`) beside those of `examples`. Name trap: Google's `segment_ids` are our
`token_type_ids`, and its `input_mask` is our `segment_ids > 0`. TensorFlow is imported by the
functions that read and write files, and by nothing else.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bertjax import io
from bertjax.data import dataset, files, instances, prng
from bertjax.data.loader import PREDICTIONS
from bertjax.data.masking import unmasked

_INTEGERS = (
  'input_ids', 'input_mask', 'segment_ids', 'masked_lm_positions', 'masked_lm_ids',
  'next_sentence_labels',
)  # fmt: skip


def masked_columns(length: int, predictions: int, vocab_size: int) -> dict:
  """The dataset's columns of rows with static masks: {name: (dtype, shape)}."""
  columns = instances.columns('nsp', length, vocab_size)
  dtypes = ('uint16', columns['input_ids'][0], 'uint8')
  masks = zip(PREDICTIONS, dtypes, strict=True)
  return columns | {name: (dtype, (predictions,)) for name, dtype in masks}


def rows_from_tfrecords(
  source: str, vocab_size: int, *, size: int = 4096
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the rows of TFRecord files in order, as the columns of `masked_columns`.

  Args:
    source: file, folder or glob; several joined by commas. Not compressed, as Google writes them.
    vocab_size: V; ids must be below it.
    size: rows read at a time.

  Raises:
    ValueError: for a corrupt file, a missing feature, other lengths than in the rows before, or
      values that no such row can have; the file and the record are named.
  """
  known = None
  for path in itertools.chain.from_iterable(map(files.list_files, files.split_source(source))):
    start = 0
    for features in _read(path, size):
      lengths = (features['input_ids'].shape[1], features['masked_lm_ids'].shape[1])
      known = known or lengths
      if lengths != known:
        raise ValueError(
          f'{path} has rows of {lengths[0]} tokens and {lengths[1]} predictions, those before it '
          f'{known[0]} and {known[1]}; rows of one preparation must be alike.'
        )
      yield _columns(features, vocab_size, path, start)
      start += len(features['input_ids'])


def _read(path, size: int) -> Iterator[dict[str, np.ndarray]]:
  """The features of one file, each an array [n, length]."""
  tf = io.import_tensorflow(str(path), 'prepare its rows (`bertjax prepare`)')
  spec = {name: tf.io.RaggedFeature(tf.int64) for name in _INTEGERS}
  spec['masked_lm_weights'] = tf.io.RaggedFeature(tf.float32)
  records = tf.data.TFRecordDataset(os.fspath(path)).batch(size)
  try:
    for features in records.map(lambda batch: tf.io.parse_example(batch, spec)):
      yield {name: _dense(ragged, name, path) for name, ragged in features.items()}
  except tf.errors.DataLossError as error:
    raise ValueError(f'{path} is corrupt, or no uncompressed TFRecord file.') from error
  except tf.errors.InvalidArgumentError as error:
    reason = error.message.splitlines()[0]
    raise ValueError(
      f'{path} holds other records than create_pretraining_data.py: {reason}'
    ) from error


def _dense(ragged, name: str, path) -> np.ndarray:
  lengths = ragged.row_lengths().numpy()
  if not lengths.all():
    raise ValueError(f'{path} has a record without the feature {name}.')
  if (lengths != lengths[0]).any():
    raise ValueError(f'{path} has records with {name} of {lengths.min()} and {lengths.max()}.')
  return ragged.flat_values.numpy().reshape(len(lengths), -1)


def _columns(features: dict, vocab_size: int, path, start: int) -> dict[str, np.ndarray]:
  """Checks features and turns them into the dataset's columns."""
  ids, mask, types = (features[name] for name in ('input_ids', 'input_mask', 'segment_ids'))
  positions, targets, weights = (features[name] for name in PREDICTIONS)
  label = features['next_sentence_labels']
  end = mask.sum(1, keepdims=True)
  first_end = end - types.sum(1, keepdims=True)
  column = np.arange(ids.shape[1])
  text = column < end
  wrong = {
    'input_mask is not ones and then zeros': mask != text,
    'segment_ids are not zeros, then ones to the padding': types != (text & (column >= first_end)),
    'masked_lm_weights are not all 0 or 1': (weights != 0) & (weights != 1),
    'masked_lm_positions point at padding': (positions < 0) | (positions >= np.maximum(end, 1)),
    'next_sentence_labels is not 0 or 1': (label < 0) | (label > 1),
  }
  for name in ('input_ids', 'masked_lm_ids'):
    beyond = (features[name] < 0) | (features[name] >= vocab_size)
    wrong[f'{name} has ids beyond the vocabulary of {vocab_size}'] = beyond
  for message, where in wrong.items():
    if where.any():
      raise ValueError(f'{path}, record {start + int(np.nonzero(where)[0][0])}: {message}.')
  columns = dict(zip(PREDICTIONS, (positions, targets, weights), strict=True))
  columns |= {
    'input_ids': ids, 'ends': np.stack([first_end, end], -1), 'next_sentence_labels': label,
  }  # fmt: skip
  dtypes = masked_columns(ids.shape[1], positions.shape[1], vocab_size)
  return {name: columns[name].astype(dtype) for name, (dtype, _) in dtypes.items()}


def prepare(source, tokenizer, settings, directory) -> dict:
  """Writes a prepared dataset from the records of create_pretraining_data.py, with their masks.

  The files have no documents, so records are held out by a hash of their unmasked ids: copies of a
  record with other masks stay together, but records of one document may be in both splits.

  Args and returns: as `preprocess.prepare`.
  """
  first = next(rows_from_tfrecords(source, tokenizer.vocab_size, size=1), None)
  if first is None:
    raise ValueError(f'data.input={source} holds no records.')
  length, slots = first['input_ids'].shape[1], first['masked_lm_ids'].shape[1]
  if (settings.kind, settings.length, settings.max_sequences_per_row) != ('nsp', length, 1):
    raise ValueError(
      f'data.input={source} holds sentence pairs (nsp=True) of {length} tokens, one a row; got '
      f'kind={settings.kind}, data.length={settings.length}, '
      f'data.max_sequences_per_row={settings.max_sequences_per_row}.'
    )
  columns = masked_columns(length, slots, tokenizer.vocab_size)
  plan = {'settings': dataclasses.asdict(settings), 'tokenizer': tokenizer.fingerprint}
  with dataset.writing(directory, plan, columns) as writer:
    for split in dataset.SPLITS if writer else ():
      counts = collections.Counter()
      batches = (
        _in_split(batch, settings.heldout_fraction, split == 'heldout', tokenizer, counts)
        for batch in rows_from_tfrecords(source, tokenizer.vocab_size)
      )
      rows = writer.add_shard(split, 0, batches, counts)['rows']
      if not rows and not (split == 'train' and settings.heldout_fraction == 1):
        now = settings.heldout_fraction
        raise ValueError(f'no row was assigned to {split}; set data.heldout_fraction (now {now}).')
    if writer:
      tokenizer.save(writer.folder)
      writer.finish(dict.fromkeys(dataset.SPLITS, 1), source=source)
  return dataset.read_manifest(directory)


def _in_split(batch: dict, fraction: float, wanted: bool, tokenizer, counts) -> dict:
  """The records of a batch that are in one split, added to its counts."""
  ids = unmasked(batch)
  chosen = np.array(prng.choose_heldout(ids, fraction)[1]) == wanted
  batch, ids = {name: array[chosen] for name, array in batch.items()}, ids[chosen]
  outside = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)
  counts.update(
    tokens=int((~np.isin(ids, outside)).sum()), unknown=int((ids == tokenizer.unk_id).sum()),
    pairs=len(ids), label_1=int(batch['next_sentence_labels'].sum()),
  )  # fmt: skip
  return batch


def write_tfrecords(paths: Sequence, batches: Iterable[dict[str, np.ndarray]]) -> int:
  """Writes masked batches as create_pretraining_data.py would; returns the number of rows.

  Args:
    paths: files to write; rows go to them in turn.
    batches: of `Batches`; rows of weight 0 are skipped.

  Raises:
    ValueError: if a batch has no next-sentence labels or holds packed rows, which those files
      cannot; nothing is left behind.
  """
  tf = io.import_tensorflow('TFRecords', 'write them')
  count = 0
  with contextlib.ExitStack() as renames, contextlib.ExitStack() as closes:
    files = [renames.enter_context(io.replacing(path)) for path in paths]
    writers = [closes.enter_context(tf.io.TFRecordWriter(os.fspath(file))) for file in files]
    for batch in batches:
      for features in _features(batch):
        example = tf.train.Example(features=tf.train.Features(feature=features))
        writers[count % len(writers)].write(example.SerializeToString())
        count += 1
  return count


def _features(batch: dict[str, np.ndarray]) -> Iterator[dict]:
  """The tf.train.Feature of each row by Google's names."""
  import tensorflow as tf

  if 'next_sentence_labels' not in batch or batch['segment_ids'].max() > 1:
    raise ValueError(
      "Google's TFRecords hold sentence pairs with next-sentence labels; prepare them with "
      '--config.nsp=True and without packing.'
    )
  columns = {name: batch[name] for name in ('input_ids', *PREDICTIONS[:2])} | {
    'input_mask': batch['segment_ids'],
    'segment_ids': batch['token_type_ids'],
    'next_sentence_labels': batch['next_sentence_labels'][:, None],
  }
  for row in np.flatnonzero(batch['example_weights']):
    integers = ((name, tf.train.Int64List(value=column[row])) for name, column in columns.items())
    features = {name: tf.train.Feature(int64_list=values) for name, values in integers}
    weights = tf.train.FloatList(value=batch['masked_lm_weights'][row])
    yield features | {'masked_lm_weights': tf.train.Feature(float_list=weights)}
