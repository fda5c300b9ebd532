"""Export: a model as a program that runs without bertjax.

  bertjax export --model=DIR --out=OUT                        a TensorFlow SavedModel, texts in
  bertjax export --model=DIR --out=OUT --format=stablehlo     a StableHLO program, token ids in

The SavedModel has the tokenizer inside. Import tensorflow_text before loading it, for its
operations:

  import tensorflow as tf, tensorflow_text
  run = tf.saved_model.load('OUT').signatures['serving_default']
  run(text=tf.constant(['A fine film.']))['probabilities']

It has the signature 'pairs' (text=, pair=) too; for --head=span, nsp and choice serving_default
is of pairs. A text beyond the model's limit is an error of the program.

The StableHLO program is for CPU, TPU and CUDA and for any batch and length:

  run = jax.export.deserialize(open('OUT/model.stablehlo', 'rb').read()).call
  run(input_ids, token_type_ids, segment_ids)   # int32 [B, L] each, segment_ids 1, and 0 at padding

Both return a dict: 'embedding' of unit length, or 'logits'; for classes also 'probabilities', and
in a SavedModel their 'labels' [C]; heads with an output per token add 'input_ids' to a SavedModel.

Before OUT appears, the program is loaded, run on a few texts and compared with the Predictor. A
StableHLO program expires: jax promises to read it for six months after the release of the jax that
wrote it; signature.json has that version and the date. A SavedModel is serialised for the StableHLO
version of the installed TensorFlow, and later releases of TensorFlow run it too.
"""

import datetime
import json
import logging
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from bertjax import io
from bertjax.inference.predictor import Predictor
from bertjax.inference.runner import POOLINGS
from bertjax.interop import sentences
from bertjax.model.config import TASK_HEADS

_log = logging.getLogger(__name__)


_PLATFORMS = ('cpu', 'tpu', 'cuda')
_INPUTS = ('input_ids', 'token_type_ids', 'segment_ids')
_BY_TOKEN = ('tagging', 'span', 'mlm')
_TWO_TEXTS = ('span', 'nsp', 'choice')
# What an exported program is tried on; a batch of one short text, and a batch with padding.
_SAMPLES = (['a'], ['The film was good.', '', 'Größe: 1½, "naïve" 中文。', 'a b c d ' * 6])


def run(
  *, model: str, out: str, format: str = 'savedmodel', head: str = '', pooling: str = ''
) -> None:
  """Exports a model.

  Raises:
    ValueError: if the model lacks what is asked for, or the folder is there already.
    RuntimeError: if the exported program cannot be run, or differs from the Predictor.
  """
  if not model or not out or format not in ('savedmodel', 'stablehlo'):
    raise ValueError(
      "export needs --model=DIR, --out=DIR, and --format='savedmodel' or 'stablehlo'."
    )
  if head and pooling:
    raise ValueError(
      f'--head={head} and --pooling={pooling} exclude each other: an export has one output.'
    )
  if '://' in out:
    raise ValueError(f'--out must be a local folder, got {out}; copy it from there.')
  folder = pathlib.Path(out)
  if folder.exists():
    raise ValueError(f'{folder} is there already; delete it or name another.')
  predictor = Predictor.from_dir(model)
  output = (
    head or pooling or next((head for head in TASK_HEADS if head in predictor.runner.params), '')
  )
  limit = predictor.config.max_positions
  if not output:
    output = predictor.layers.pooling
    limit = min(predictor.layers.max_length or limit, limit)
    if predictor.layers.default_prompt:
      raise ValueError(
        f'{model} has the default prompt {predictor.layers.default_prompt!r}, which is not '
        f'exported; --pooling={output} exports its encoder, for texts with their prompt.'
      )
    if predictor.layers.steps not in ((), (sentences.normalise,)):
      raise ValueError(
        f'{model} has dense layers after its pooling, which are not exported; --pooling={output} '
        'exports the vectors before them.'
      )
  if output not in POOLINGS:
    predictor.runner.need(output)
  if output == 'tagging' and predictor.config.crf:
    raise ValueError('a CRF chooses among the tags of words, which the program does not know.')
  save, load = {'savedmodel': (save_savedmodel, _load_savedmodel),
                'stablehlo': (save_stablehlo, _load_stablehlo)}[format]  # fmt: skip
  with io.replacing(folder) as temporary:
    temporary.mkdir()
    save(temporary, predictor, output, limit)
    check(load(temporary, predictor), predictor, output, limit)
  _log.info('%s: %s as %s', folder, output, format)


def check(run, predictor: Predictor, output: str, limit: int) -> None:
  """Compares an exported program with the Predictor on a few texts.

  Args:
    run: (texts, pairs or None) -> outputs, as arrays.
    predictor: the model that was exported.
    output: a head, or a pooling.
    limit: tokens of a text at most, with its special ones.

  Raises:
    RuntimeError: if the program cannot be run, or an output differs by more than rounding.
  """
  # Matmuls have float32's rounding on a CPU, TF32's or bfloat16's on accelerators.
  exact = jax.default_backend() == 'cpu' and predictor.config.dtype == 'float32'
  tolerance = 1e-4 if exact else 2e-2
  for sample in _SAMPLES:
    for paired in (True,) if output in _TWO_TEXTS else (False, True):
      fits = [t for t in sample if predictor.tokenizer([t], [t])['input_ids'].shape[1] <= limit]
      if not fits:
        continue
      texts, pairs = fits, fits[::-1] if paired else None
      try:
        found = run(texts, pairs)
      except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
          f'the exported program does not run ({reason}); nothing was written. Install '
          'versions of jax and TensorFlow that setup.cfg names.'
        ) from error
      for name, expected in _expected(predictor, output, texts, pairs).items():
        expected, got = np.asarray(expected), np.asarray(found[name])
        error = np.abs(got - expected).max() if got.shape == expected.shape else np.inf
        if not error <= tolerance * max(1, np.abs(expected).max()):  # NaN fails too
          raise RuntimeError(
            f'the exported program differs from the Predictor by {error:.3g} in {name!r} on '
            f'{texts}; nothing was written.'
          )


def _expected(predictor: Predictor, output: str, texts, pairs) -> dict:
  """The Predictor's outputs [B, ...] for texts, by the names of the program's."""
  batch, runner = predictor.tokenizer(texts, pairs), predictor.runner
  if output in POOLINGS:
    vectors = np.asarray(jax.jit(partial(runner.read, output=output))(runner.params, batch))
    return {'embedding': vectors / np.linalg.norm(vectors, axis=1, keepdims=True)}
  logits = jax.jit(partial(runner.logits, head=output))(runner.params, batch)
  expected = {'logits': logits}
  if output == 'classification' and predictor.problem_type != 'regression':
    found = predictor.classify(texts, pairs)
    expected['probabilities'] = [[*item.scores.values()] for item in found]
  return expected


def make_program(predictor: Predictor, output: str):
  """The function (params, *_INPUTS [B, L]) -> outputs, see above."""

  def program(params, *arrays):
    batch = dict(zip(_INPUTS, arrays, strict=True))
    if output in POOLINGS:
      vectors = predictor.runner.read(params, batch, output=output)
      return {'embedding': vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)}
    logits = predictor.runner.logits(params, batch, output)
    if output != 'classification' or predictor.problem_type == 'regression':
      return {'logits': logits}
    probs = jax.nn.sigmoid(logits) if predictor.multi_label else jax.nn.softmax(logits)
    return {'logits': logits, 'probabilities': probs}

  return program


def save_stablehlo(folder, predictor: Predictor, output: str, limit: int) -> None:
  """Writes model.stablehlo, the vocabulary and signature.json; see `check`."""
  program, params = make_program(predictor, output), predictor.runner.params
  exported = _export(lambda *arrays: program(params, *arrays), limit)
  (folder / 'model.stablehlo').write_bytes(exported.serialize())
  predictor.tokenizer.save(folder, max_length=limit)
  signature = {'inputs': _INPUTS, 'output': output, 'labels': predictor.labels,
               'max_length': limit, 'platforms': _PLATFORMS,
               'jax': jax.__version__, 'date': f'{datetime.date.today()}'}  # fmt: skip
  (folder / 'signature.json').write_text(json.dumps(signature, indent=2) + '\n')


def _load_stablehlo(folder, predictor: Predictor):
  exported = jax_export.deserialize((folder / 'model.stablehlo').read_bytes())

  def run(texts, pairs):
    batch = predictor.tokenizer(texts, pairs)
    return exported.call(*(batch[name] for name in _INPUTS))

  return run


def _export(program, limit: int, *leading) -> jax_export.Exported:
  """Exports (*leading, *_INPUTS [B, L]) -> outputs for any batch size and lengths up to `limit`."""
  shape = jax_export.symbolic_shape('b, l', constraints=[f'l <= {limit}'])
  arrays = [jax.ShapeDtypeStruct(shape, jnp.int32)] * len(_INPUTS)
  return jax_export.export(jax.jit(program), platforms=_PLATFORMS)(*leading, *arrays)


def save_savedmodel(folder, predictor: Predictor, output: str, limit: int) -> None:
  """Writes a SavedModel from texts to outputs; see `check`."""
  from bertjax.data.tokenizer_tf import GraphTokenizer, tf

  graph = GraphTokenizer(predictor.tokenizer)
  params = jax.device_get(predictor.runner.params)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
  program = _as_tensorflow(tf, _export(make_program(predictor, output), limit, shapes))
  module = tf.Module()
  variables = jax.tree.map(tf.Variable, params)
  module.params = jax.tree.map(lambda x: x, variables)  # a copy: TensorFlow wraps the dicts it gets
  module.tokenizer = graph
  strings = tf.TensorSpec([None], tf.string)

  def answer(*texts):
    arrays = _rows(tf, predictor.tokenizer, [graph(part) for part in texts], limit)
    outputs = program(variables, *arrays)
    if output in _BY_TOKEN:
      outputs['input_ids'] = arrays[0]
    if 'probabilities' in outputs:
      outputs['labels'] = tf.constant(predictor.labels)
    return outputs

  one = tf.function(lambda text: answer(text), [strings], autograph=False)
  two = tf.function(lambda text, pair: answer(text, pair), [strings] * 2, autograph=False)
  if output in _TWO_TEXTS:
    signatures = {'serving_default': two}
  else:
    signatures = {'serving_default': one, 'pairs': two}
  tf.saved_model.save(module, str(folder), signatures=signatures)


def _load_savedmodel(folder, predictor: Predictor):
  import tensorflow as tf

  module = tf.saved_model.load(str(folder))

  def run(texts, pairs):
    if pairs is None:
      return module.signatures['serving_default'](text=tf.constant(texts))
    name = 'pairs' if 'pairs' in module.signatures else 'serving_default'
    return module.signatures[name](text=tf.constant(texts), pair=tf.constant(pairs))

  return run


def _portable(exported: jax_export.Exported) -> bytes:
  """The program for the StableHLO version that the installed TensorFlow reads."""
  from jax.extend.mlir.dialects import stablehlo
  from tensorflow.compiler.mlir.stablehlo import stablehlo as reader

  version = reader.get_smaller_version(
    reader.get_current_version(), stablehlo.get_current_version()
  )
  return stablehlo.serialize_portable_artifact_str(exported.mlir_module(), version)


def _as_tensorflow(tf, exported: jax_export.Exported):
  """The exported program as a function of TensorFlow's tensors.

  `jax2tf` does the same for the StableHLO version of jax, which TensorFlow 2.21 no longer reads.
  """
  from tensorflow.compiler.tf2xla.python import xla

  code = _portable(exported)

  def program(*arguments):
    tensors = jax.tree.leaves(arguments)
    outputs = xla.call_module(
      [tensors[i] for i in exported.module_kept_var_idx],
      version=exported.calling_convention_version, module=code,
      platforms=[name.upper() for name in exported.platforms],
      Tout=[tf.as_dtype(aval.dtype) for aval in exported.out_avals],
      Sout=[[d if isinstance(d, int) else None for d in aval.shape] for aval in exported.out_avals],
    )  # fmt: skip
    return jax.tree.unflatten(exported.out_tree, outputs)

  return program


def _rows(tf, tokenizer, parts, limit: int) -> list:
  """[CLS] A [SEP], or [CLS] A [SEP] B [SEP], as tensors [B, L]: _INPUTS.

  A tokenizer that can be a graph has BERT's template.
  """
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
