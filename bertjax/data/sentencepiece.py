"""SentencePiece as ALBERT uses it: training unigram models, and the engine behind `Tokenizer`."""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

SPECIAL_PIECES = ('<pad>', '<unk>', '[CLS]', '[SEP]', '[MASK]')  # ALBERT's names and places
_MAX_BYTES = 4192  # SentencePiece's trainer leaves longer lines out


def train_sentencepiece(
  texts: Iterable[str],
  size: int,
  *,
  lowercase: bool = True,
  sentences: int = 10_000_000,
  seed: int = 0,
) -> bytes:
  """Trains a unigram model of exactly `size` pieces; the same texts give the same bytes.

  Args:
    texts: documents, of any length.
    size: pieces, special ones included.
    lowercase: lower and strip accents first, as the uncased tokenizer will.
    sentences: lines to learn from at most; of more, a random sample drawn with `seed`.
    seed: of the sample.

  Returns:
    The content of a `spiece.model`.

  Raises:
    ValueError: if there is no text, or it does not suit the size.
  """
  model = io.BytesIO()
  sentencepiece.set_random_generator_seed(seed)
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_lines(texts, lowercase),
      model_writer=model,
      model_type='unigram',
      vocab_size=size,
      pad_id=0,
      unk_id=1,
      bos_id=-1,
      eos_id=-1,
      pad_piece=SPECIAL_PIECES[0],
      unk_piece=SPECIAL_PIECES[1],
      control_symbols=list(SPECIAL_PIECES[2:]),
      character_coverage=0.9995,
      input_sentence_size=sentences,
      shuffle_input_sentence=True,
      num_threads=16,  # sums depend on how many there are, so never on the machine
      minloglevel=2,
    )
  except RuntimeError as error:
    reason = re.sub(r'^.*\] *', '', str(error)) or 'it holds no text'
    raise ValueError(f'no SentencePiece model of {size} pieces from this text: {reason}') from error
  return model.getvalue()


def _lines(texts: Iterable[str], lowercase: bool) -> Iterator[str]:
  for text in texts:
    for line in text.splitlines():
      yield line.lower() if lowercase else line
