"""Tiny random models, and texts for them."""

import functools

import jax

from bertjax.data.tokenizer import Tokenizer
from bertjax.model.config import EncoderConfig
from bertjax.model.heads import Bert, init_params

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
