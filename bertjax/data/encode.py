"""Texts to token ids, each document to the shard it falls to; what a worker process does."""

import collections
import functools
import hashlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable

import numpy as np

from bertjax.data import text as text_lib
from bertjax.data.prng import SHARD, hash_u64
from bertjax.data.spill import Part, output_name
from bertjax.data.tokenizer import Tokenizer

_PIECE_CHARS = 100_000  # longer sentences are tokenised in parts, cut at white space


def encode(made_by: tuple, texts: list[str]) -> dict[str, Part]:
  """The token ids of documents, {output: part}, by `encoder(*made_by)`."""
  return encoder(*made_by)(texts)


@functools.lru_cache(1)
def encoder(folder: str, format: str, heldout: float, shards: int, outputs: tuple) -> Callable:
  """Made once in a process: documents to the token ids of each output."""
  tokenizer = Tokenizer.from_dir(folder)
  encode = tokenizer.encode_flat
  if importlib.util.find_spec('tensorflow_text'):
    from bertjax.data import tokenizer_tf

    if not tokenizer_tf.unsupported(tokenizer):
      encode = tokenizer_tf.make_flat_encoder(tokenizer)

  def run(texts: list[str]) -> dict[str, Part]:
    kept, sentences = [], []
    for text, output in zip(texts, _outputs(texts, heldout, shards), strict=True):
      if output in outputs:
        pieces = text_lib.split_document(text, format)
        kept.append((output_name(output), len(pieces)))
        sentences += pieces
    tokens, lengths = _encode_sentences(encode, sentences)
    return _divide(kept, tokens, lengths)

  return run


def draw_heldout(contents: Iterable, share: float) -> tuple[np.ndarray, list[bool]]:
  """A key [N] uint64 for each content (bytes or an array), and whether it is held out; both are
  functions of the content alone."""
  digests = (hashlib.blake2b(content, digest_size=8).digest() for content in contents)
  keys = np.array([int.from_bytes(digest, 'little') for digest in digests], np.uint64)
  return keys, [key < share * 2**64 for key in hash_u64(keys).tolist()]


def _outputs(texts, heldout: float, shards: int) -> list[tuple[str, int]]:
  """Where each text goes, by a hash of it: exact duplicates go together."""
  keys, held = draw_heldout((text.encode('utf-8', 'surrogatepass') for text in texts), heldout)
  numbers = (hash_u64(keys, SHARD) % np.uint64(max(shards, 1))).tolist()  # 0 where all are held out
  return [('heldout', 0) if h else ('train', n) for h, n in zip(held, numbers, strict=True)]


def _encode_sentences(encode, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
  """All ids end to end, and how many each sentence has."""
  pieces = sentences
  if huge := any(len(sentence) > _PIECE_CHARS for sentence in sentences):
    cut = [_cut(sentence) for sentence in sentences]
    pieces = list(itertools.chain.from_iterable(cut))
  tokens, lengths = encode(pieces)
  if huge:
    of = np.repeat(np.arange(len(cut)), [len(parts) for parts in cut])
    lengths = np.bincount(of, lengths, len(cut)).astype(np.int64)
  return tokens, lengths


def _cut(sentence: str) -> list[str]:
  """Cuts a huge sentence at the white space that no tokenizer drops, so words end there anyway."""
  inside = r'[^ \t\n\r]'
  return re.findall(rf'(?s).{{1,{_PIECE_CHARS}}}(?!{inside})|{inside}+', sentence)


def _divide(kept: list[tuple[str, int]], tokens, lengths) -> dict[str, Part]:
  """Sorts the documents, (output, number of sentences) each, into the outputs."""
  parts = collections.defaultdict(lambda: ([], [], []))
  ends, sentence = np.concatenate([[0], np.cumsum(lengths)]), 0
  for name, count in kept:
    own = lengths[sentence : sentence + count]
    own = own[own > 0]
    if len(own):
      start, sentence_end = ends[sentence], sentence + count
      for column, value in zip(
        parts[name], (tokens[start : ends[sentence_end]], own, [len(own)]), strict=True
      ):
        column.append(value)
    sentence += count
  return {name: tuple(map(np.concatenate, part)) for name, part in parts.items()}
