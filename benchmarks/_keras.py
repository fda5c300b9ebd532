"""KerasHub's BERT on the JAX backend, with our weights; its steps are compiled once, as ours are.

Keras' loops (`fit`, `train_on_batch`, `predict`) call the same compiled functions and synchronise
with the host in between; `Model.train_step` and `stateless_call`, which Keras documents for loops
of one's own, do not, and are what is measured where both exist.
"""

import os

os.environ.setdefault('KERAS_BACKEND', 'jax')

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np

if keras.backend.backend() != 'jax':
  raise RuntimeError(f'set KERAS_BACKEND=jax; Keras runs on {keras.backend.backend()!r}.')


def backbone(folder, dropout: float):
  """The encoder of a folder that `bertjax.save_model` wrote; its activation is the tanh GELU."""
  return keras_hub.models.BertBackbone.from_preset(str(folder), dropout=dropout)


def tokenizer(folder):
  return keras_hub.models.BertTokenizer(f'{folder}/vocab.txt', lowercase=True)


def _in_parallel(items, batch_size: int, layer):
  """A tf.data.Dataset of batches that a preprocessing layer made, as its documentation shows."""
  import tensorflow as tf

  data = tf.data.Dataset.from_tensor_slices(items).batch(batch_size)
  return data.map(layer, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def masked(ids, batch_size: int, special: dict, vocab_size: int, predictions: int):
  """Masked batches of records of ids [N, L]."""
  layer = keras_hub.layers.MaskedLMMaskGenerator(
    vocabulary_size=vocab_size, mask_selection_rate=0.15, mask_token_id=special['mask'],
    mask_selection_length=predictions,
    unselectable_token_ids=[special[name] for name in ('pad', 'cls', 'sep')],
  )  # fmt: skip
  return _in_parallel(ids, batch_size, layer)


def masked_texts(texts, batch_size: int, folder, length: int, predictions: int):
  """Masked batches of texts, a record of each."""
  layer = keras_hub.models.BertMaskedLMPreprocessor(
    tokenizer(folder), sequence_length=length, mask_selection_length=predictions
  )
  return _in_parallel(texts, batch_size, layer)


def masked_lm(folder, head: dict, dropout: float):
  """BertMaskedLM with the weights, activation and epsilon of our masked-LM head."""
  model = keras_hub.models.BertMaskedLM(backbone(folder, dropout))
  theirs = model.masked_lm_head
  dense, norm = theirs._intermediate_dense, theirs._intermediate_layer_norm
  dense.activation, norm.epsilon = model.backbone.transformer_layers[0].activation, 1e-12
  dense.set_weights([head['transform']['kernel'], head['transform']['bias']])
  norm.set_weights([head['layer_norm']['scale'], head['layer_norm']['bias']])
  theirs._bias.assign(head['bias'])
  return model


def classifier(folder, head: dict, dropout: float):
  """BertTextClassifier with the weights of our classification head."""
  model = keras_hub.models.BertTextClassifier(
    backbone(folder, dropout), num_classes=len(head['bias']), dropout=dropout
  )
  model.output_dense.set_weights([head['kernel'], head['bias']])
  return model


def inputs(batch: dict) -> dict:
  """Our batch as the arguments of a model."""
  names = {'token_ids': 'input_ids', 'segment_ids': 'token_type_ids',
           'mask_positions': 'masked_lm_positions'}  # fmt: skip
  x = {theirs: batch[ours] for theirs, ours in names.items() if ours in batch}
  return x | {'padding_mask': (batch['segment_ids'] > 0).astype(np.int32)}


def data(batch: dict) -> tuple:
  """(x, y, sample_weight) of our batch."""
  if 'masked_lm_ids' in batch:
    return inputs(batch), batch['masked_lm_ids'], batch['masked_lm_weights']
  return inputs(batch), batch['labels'], batch['example_weights']


def compiled(model, batch: dict, rate: float) -> np.ndarray:
  """Compiles the model with our AdamW; returns the logits of a batch without dropout."""
  adamw = keras.optimizers.AdamW(rate, weight_decay=0.01, epsilon=1e-6, global_clipnorm=1.0)
  adamw.exclude_from_weight_decay(var_names=['bias', 'beta', 'gamma'])
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile(adamw, loss, weighted_metrics=[], jit_compile=True)
  adamw.build(model.trainable_variables)
  model.test_on_batch(*data(batch))  # makes the variables of the metrics
  return model.predict_on_batch(inputs(batch))


def program(model):
  """(train step, state) of a model that `compiled` prepared; the state is donated."""
  groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables,
            model.metrics_variables)  # fmt: skip
  state = tuple([jnp.array(variable.value) for variable in group] for group in groups)
  return jax.jit(model.train_step, donate_argnums=0), state


def training(model, batches: list[dict], work: int):
  """A contender: a step on each batch."""
  step, state = program(model)
  batches = [data(batch) for batch in batches]

  def once():
    nonlocal state
    for batch in batches:
      logs, state = step(state, batch)
    assert np.isfinite(float(logs['loss']))
    return work

  return once


class Embedder:
  """Normalised mean vectors of texts by BertTextEmbedder, batches of 32."""

  def __init__(self, folder, length: int, batch_size: int = 32):
    self.batch_size = batch_size
    self.preprocessor = keras_hub.models.BertTextEmbedderPreprocessor(
      tokenizer(folder), sequence_length=length
    )
    model = keras_hub.models.BertTextEmbedder(backbone(folder, 0.0))
    groups = (model.trainable_variables, model.non_trainable_variables)
    state = [[variable.value for variable in group] for group in groups]
    self._call = jax.jit(lambda x: model.stateless_call(*state, x, training=False)[0])

  def padded(self, texts) -> np.ndarray:
    """All texts padded to the preprocessor's length."""
    x = {name: np.asarray(value) for name, value in self.preprocessor(texts).items()}
    return self._run(x, np.arange(len(texts)), x['token_ids'].shape[1:])

  def by_length(self, texts, lengths) -> np.ndarray:
    """Sorted by length, and each batch padded to the shortest of some lengths that holds it."""
    x = {name: np.asarray(value) for name, value in self.preprocessor(texts).items()}
    return self._run(x, np.argsort(x['padding_mask'].sum(1), kind='stable'), lengths)

  def _run(self, x, order, lengths):
    sizes, parts = x['padding_mask'].sum(1), []
    for start in range(0, len(order), self.batch_size):
      rows = np.resize(order[start : start + self.batch_size], self.batch_size)
      length = min(n for n in lengths if n >= sizes[rows].max())
      parts.append(self._call({name: value[rows, :length] for name, value in x.items()}))
    vectors = np.concatenate(jax.device_get(parts))[: len(order)]
    return vectors[np.argsort(order)]
