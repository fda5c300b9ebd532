"""ELECTRA (Clark et al. 2020): a discriminator finds the tokens that a small generator replaced.

The generator is a masked LM; at the masked positions its samples replace the text, and the
discriminator says of every token whether it is the original. No gradient goes through the samples.
They are a function of the batch and the parameters, not of the dropout key, so that microbatches,
devices and evaluation sample the same tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bertjax.model.config import EncoderConfig
from bertjax.model.heads import SHARED_EMBEDDINGS, Bert, generator_params, init_params
from bertjax.objectives import Objective
from bertjax.objectives.mlm import pretraining_sums, pretraining_weights, token_weights


def make_generator(config: EncoderConfig, size: float = 0.25) -> Bert:
  """The generator of a discriminator: as deep, `size` times as wide, with heads of the same width.

  Its word, position and token-type embeddings and their normalisation are the discriminator's.

  Raises:
    ValueError: if `size` is not in (0, 1], or leaves heads of a fraction of a unit.

  Example:
    >>> import bertjax
    >>> bertjax.objectives.electra.make_generator(bertjax.electra_small()).config.hidden_size
    64
  """
  if not 0 < size <= 1:
    raise ValueError(f'generator_size must be above 0 and at most 1, got {size}.')
  width, heads = round(size * config.hidden_size), max(1, round(size * config.num_heads))
  if not width or width % heads:
    raise ValueError(
      f'generator_size={size} of hidden_size={config.hidden_size} and num_heads={config.num_heads} '
      f'is {width} wide with {heads} heads, which do not divide it; set a size of which they do, '
      f'such as {1 / config.num_heads:g} or 1.'
    )
  embedding = config.embedding_width
  smaller = dataclasses.replace(
    config, hidden_size=width, num_heads=heads, mlp_size=max(1, round(size * config.mlp_size)),
    num_kv_heads=max(1, round(size * config.num_kv_heads)) if config.num_kv_heads else 0,
    embedding_size=0 if embedding == width else embedding,
  )  # fmt: skip
  return Bert(smaller, heads=('mlm',), pooler=False)


def pretraining(discriminator: Bert, generator: Bert, rtd_weight: float = 50.0) -> Objective:
  """The objective of both models: masked LM + `rtd_weight` * replaced-token detection.

  Params are the discriminator's, and 'generator' without the embeddings that it shares. Metrics
  are 'mlm_accuracy' of the generator, and over all tokens but padding 'rtd_accuracy', with the
  precision and recall of replaced tokens.

  Args:
    discriminator: `Bert` with the one head 'rtd'.
    generator: `Bert` with the one head 'mlm' and embeddings as wide, see `make_generator`.
    rtd_weight: weight of the discriminator's loss.

  Batches have 'masked_lm_positions', 'masked_lm_ids' and 'masked_lm_weights', and
  'sample_seeds' int32 [B], which seed the samples of each row.

  Example:
    >>> import bertjax, jax
    >>> config = bertjax.electra_small(vocab_size=50, num_layers=1, hidden_size=16, num_heads=4)
    >>> electra = bertjax.objectives.electra
    >>> discriminator = bertjax.Bert(config, heads=('rtd',), pooler=False)
    >>> objective = electra.pretraining(discriminator, electra.make_generator(config))
    >>> sorted(objective.init(jax.random.key(0)))
    ['encoder', 'generator', 'rtd']
  """

  def init(rng):
    keys = jax.random.split(rng)
    small = init_params(generator, keys[1])
    return init_params(discriminator, keys[0]) | {'generator': without_shared(small)}

  def loss(params, batch, rng):
    keys = (None, None) if rng is None else jax.random.split(rng)
    filled = _apply(generator, generator_params(params), batch, keys[0])
    losses, metrics = pretraining_sums(filled, batch, ('mlm',))
    ids, replaced = replace_masked(filled['mlm_logits'], batch)
    own = {name: part for name, part in params.items() if name != 'generator'}
    logits = _apply(discriminator, own, batch | {'input_ids': ids}, keys[1])['rtd_logits']
    weights, found = token_weights(batch), logits > 0
    nats = optax.losses.sigmoid_binary_cross_entropy(logits, replaced.astype(jnp.float32))
    hits = ((found & replaced) * weights).sum()
    return losses | {'rtd': (nats * weights).sum()}, metrics | {
      'rtd_accuracy': ((found == replaced) * weights).sum(),
      'rtd_precision': (hits, (found * weights).sum()),
      'rtd_recall': (hits, (replaced * weights).sum()),
    }

  def weights(batch):
    return pretraining_weights(batch, ('mlm',)) | {'rtd': token_weights(batch).sum()}

  return Objective(init, loss, weights, scale={'rtd': rtd_weight})


def _apply(model: Bert, params: dict, batch: dict, rng) -> Any:
  rngs = None if rng is None else {'dropout': rng}
  return model.apply({'params': params}, batch, train=rng is not None, rngs=rngs)


def replace_masked(logits: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array]:
  """Samples a token for each prediction.

  Args:
    logits: of the generator, [B, P, V].
    batch: as for `pretraining`.

  Returns:
    The text with the samples, int32 [B, L], and which of its tokens are not the original, bool
    [B, L]: a sample that is the original token counts as original.
  """

  def sample(seed, logits):  # a key for each row, whichever batch the row is in
    return jax.random.categorical(jax.random.key(seed, impl='threefry2x32'), logits)

  samples = jax.vmap(sample)(batch['sample_seeds'], jax.lax.stop_gradient(logits))
  length = batch['input_ids'].shape[1]
  used = jnp.where(batch['masked_lm_weights'] > 0, batch['masked_lm_positions'], length)
  put = jax.vmap(lambda ids, positions, new: ids.at[positions].set(new, mode='drop'))
  original = put(batch['input_ids'], used, batch['masked_lm_ids'])
  ids = put(original, used, samples.astype(original.dtype))
  return ids, ids != original


def without_shared(params: dict) -> dict:
  """The parameters of a generator without those embeddings that are the discriminator's."""
  embeddings = params['encoder']['embeddings']
  own = {name: part for name, part in embeddings.items() if name not in SHARED_EMBEDDINGS}
  return params | {'encoder': params['encoder'] | {'embeddings': own}}
