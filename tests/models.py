"""Tiny random models, texts for them, and steps of training."""

import functools

import jax

from bertjax.data.tokenizer import Tokenizer
from bertjax.model.config import EncoderConfig
from bertjax.model.encoder import PARAM_AXES
from bertjax.model.heads import Bert, init_params
from bertjax.training import layout, loop, mesh

SIZES = {'hidden_size': 32, 'num_layers': 4, 'num_heads': 2, 'mlp_size': 48, 'max_positions': 48}


TEXTS = ['the file is open', 'A value, or None.', 'Returns the name of the module (or class)!']


LONG = ' '.join(TEXTS * 9)


@functools.cache
def model(vocab, *heads, labels=2, seed=0, std=0.3, **changes):
  """A tiny random model: (module, params, tokenizer)."""
  tokenizer = Tokenizer.from_file(vocab)
  config = EncoderConfig(vocab_size=tokenizer.vocab_size, initializer_range=std, **SIZES, **changes)
  pooler = bool({'nsp', 'classification', 'choice'} & set(heads))
  bert = Bert(config, heads=heads, pooler=pooler, num_labels=labels)
  params = jax.jit(lambda key: init_params(bert, key))(jax.random.key(seed))
  return bert, jax.device_get(params), tokenizer


@functools.cache
def applied(config, heads=(), labels=2, capture=()):
  """The model as one compiled function, for rows as they are."""
  pooler = bool({'nsp', 'classification', 'choice'} & set(heads))
  bert = Bert(config, heads=heads, pooler=pooler, num_labels=labels)
  return jax.jit(lambda params, batch: bert.apply({'params': params}, batch, capture=capture))


def steps_of(objective, optimizer, batches, devices=1, accumulation=1):
  """The losses of steps on these batches, and the last parameters."""
  where = mesh.make_mesh(devices=jax.devices()[:devices])
  run = layout.Layout(where, PARAM_AXES, accumulation=accumulation)
  state, shardings, _ = layout.restore_or_init(objective, optimizer, run)
  step, losses = run.train_step(objective, optimizer, shardings), []
  for batch in loop.to_device(batches, where):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  return losses, jax.device_get(state.params)
