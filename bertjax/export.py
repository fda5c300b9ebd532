"""Export: a model as a program that runs without bertjax.

  bertjax export --model=DIR --to=OUT                        a TensorFlow SavedModel, texts in
  bertjax export --model=DIR --to=OUT --format=stablehlo     a StableHLO program, token ids in

The SavedModel has the tokenizer inside. Whoever loads it imports tensorflow_text first, for its
operations:

  import tensorflow as tf, tensorflow_text
  run = tf.saved_model.load('OUT').signatures['serving_default']
  run(text=tf.constant(['A fine film.']))['probabilities']

It has the signature 'pairs' (text=, pair=) too; for --output=span, nsp and choice serving_default
is of pairs. A text beyond the model's limit is an error of the program.

The StableHLO program is for CPU, TPU and CUDA and for any batch and length:

  run = jax.export.deserialize(open('OUT/model.stablehlo', 'rb').read()).call
  run(input_ids, token_type_ids, segment_ids)   # int32 [B, L] each, segment_ids 1, and 0 at padding

Both give a dict: 'embedding' of unit length, or 'logits'; of classes 'probabilities' as well, and
the SavedModel their 'labels' [C]; for heads that answer for each token, it adds 'input_ids'.
"""

import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
from jax import export as jax_export

from bertjax.inference.forward import POOLINGS
from bertjax.inference.predictor import Predictor
from bertjax.interop import sentences
from bertjax.model.config import HEADS

_log = logging.getLogger(__name__)

FLAGS = {
  'model': ('', 'a model directory, a folder of another library, or a hub name'),
  'to': ('', 'the folder to write'),
  'format': ('savedmodel', "'savedmodel' or 'stablehlo'"),
  'output': (
    '', f"a head, or a pooling: {', '.join(POOLINGS)}; '' = the task's head, or the model's pooling"
  ),
}  # fmt: skip

_PLATFORMS = ('cpu', 'tpu', 'cuda')
_INPUTS = ('input_ids', 'token_type_ids', 'segment_ids')
_BY_TOKEN = ('tagging', 'span', 'mlm')


def run(*, model: str, to: str, format: str = 'savedmodel', output: str = '') -> None:
  """Exports a model.

  Raises:
    ValueError: if the model lacks what is asked for, or the folder is there already.
  """
  if not model or not to or format not in ('savedmodel', 'stablehlo'):
    raise ValueError(
      "export needs --model=DIR, --to=DIR, and --format='savedmodel' or 'stablehlo'."
    )
  if '://' in to:
    raise ValueError(f'--to must be a local folder, got {to}; copy it from there.')
  folder = pathlib.Path(to)
  if folder.exists():
    raise ValueError(f'{folder} is there already; delete it or name another.')
  predictor = Predictor.from_dir(model)
  output = output or next((head for head in HEADS[2:] if head in predictor.forward.params), '')
  if not output:
    output = predictor.layers.pooling
    if predictor.layers.steps not in ((), (sentences.normalise,)):
      raise ValueError(
        f'{model} has dense layers after its pooling, which are not exported; --output={output} '
        'exports the vectors before them.'
      )
  if output not in POOLINGS:
    predictor.forward.need(output)
  if output == 'tagging' and predictor.config.crf:
    raise ValueError('a CRF chooses among the tags of words, which the program does not know.')
  temporary = folder.with_name(folder.name + '.tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  {'savedmodel': save_savedmodel, 'stablehlo': save_stablehlo}[format](temporary, predictor, output)
  temporary.replace(folder)
  _log.info('%s: %s as %s', folder, output, format)


def make_program(predictor: Predictor, output: str):
  """The function (params, *_INPUTS [B, L]) -> outputs, see above."""

  def program(params, *arrays):
    batch = dict(zip(_INPUTS, arrays, strict=True))
    if output in POOLINGS:
      vectors = predictor.forward.read(params, batch, output=output)
      return {'embedding': vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)}
    logits = predictor.forward.logits(params, batch, output)
    if output != 'classification' or predictor.problem_type == 'regression':
      return {'logits': logits}
    probs = jax.nn.sigmoid(logits) if predictor.multi_label else jax.nn.softmax(logits)
    return {'logits': logits, 'probabilities': probs}

  return program


def save_stablehlo(folder, predictor: Predictor, output: str) -> None:
  """Writes model.stablehlo, the vocabulary and signature.json."""
  program, params = make_program(predictor, output), predictor.forward.params
  limit = predictor.config.max_positions
  shape = jax_export.symbolic_shape('b, l', constraints=[f'l <= {limit}'])
  arrays = [jax.ShapeDtypeStruct(shape, jnp.int32)] * len(_INPUTS)
  exported = jax_export.export(
    jax.jit(lambda *arrays: program(params, *arrays)), platforms=_PLATFORMS
  )(*arrays)
  (folder / 'model.stablehlo').write_bytes(exported.serialize())
  predictor.tokenizer.save(folder)
  signature = {'inputs': _INPUTS, 'output': output, 'labels': predictor.labels,
               'max_length': limit, 'platforms': _PLATFORMS}  # fmt: skip
  (folder / 'signature.json').write_text(json.dumps(signature, indent=2) + '\n')


def save_savedmodel(folder, predictor: Predictor, output: str) -> None:
  """Writes a SavedModel from texts to outputs."""
  import tensorflow as tf
  from jax.experimental import jax2tf

  from bertjax.data.graph_tokenizer import GraphTokenizer

  limit = predictor.config.max_positions
  program = jax2tf.convert(
    make_program(predictor, output), with_gradient=False,
    polymorphic_shapes=[None, *['b, l'] * len(_INPUTS)],
    polymorphic_constraints=[f'l <= {limit}'], native_serialization_platforms=_PLATFORMS,
  )  # fmt: skip
  graph = GraphTokenizer(predictor.tokenizer)
  module = tf.Module()
  module.params = jax.tree.map(tf.Variable, jax.device_get(predictor.forward.params))
  strings = tf.TensorSpec([None], tf.string)

  def answer(*texts):
    arrays = _rows(tf, predictor.tokenizer, [graph(part) for part in texts], limit)
    outputs = program(module.params, *arrays)
    if output in _BY_TOKEN:
      outputs['input_ids'] = arrays[0]
    if 'probabilities' in outputs:
      outputs['labels'] = tf.constant(predictor.labels)
    return outputs

  one = tf.function(lambda text: answer(text), [strings], autograph=False)
  two = tf.function(lambda text, pair: answer(text, pair), [strings] * 2, autograph=False)
  if output in ('span', 'nsp', 'choice'):
    signatures = {'serving_default': two}
  else:
    signatures = {'serving_default': one, 'pairs': two}
  tf.saved_model.save(module, str(folder), signatures=signatures)


def _rows(tf, tokenizer, parts, limit: int) -> list:
  """[CLS] A [SEP], or [CLS] A [SEP] B [SEP], as tensors [B, L]: _INPUTS."""
  count = parts[0].nrows()

  def special(token):
    return tf.RaggedTensor.from_uniform_row_length(tf.fill([count], token), 1)

  parts = [tf.concat([part, special(tokenizer.sep_id)], 1) for part in parts]
  parts[0] = tf.concat([special(tokenizer.cls_id), parts[0]], 1)
  types = tf.concat([tf.ones_like(part) * number for number, part in enumerate(parts)], 1)
  ids = tf.concat(parts, 1)
  longest = tf.reduce_max(ids.row_lengths())
  fits = tf.debugging.Assert(
    longest <= limit, [f'a text has more tokens than the model takes, {limit}:', longest]
  )
  with tf.control_dependencies([fits]):
    lengths = tf.identity(ids.row_lengths())
  return [ids.to_tensor(tokenizer.pad_id), types.to_tensor(0),
          tf.sequence_mask(lengths, dtype=tf.int32)]  # fmt: skip
