"""The objective that a config names: its heads, ELECTRA's generator, the teacher, its FLOPs."""

import dataclasses
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.interop import families, huggingface, loading
from bertjax.model import encoder, flops, heads
from bertjax.objectives import Objective, distill, electra, mlm
from bertjax.training import mesh as mesh_lib

_log = logging.getLogger(__name__)


def loss_terms(config) -> tuple[str, ...]:
  """The heads of the model that a config trains: its discriminator with ELECTRA."""
  if config.objective == 'electra':
    return ('rtd',)
  if config.objective == 'distill' and not config.distill.mlm_weight + config.distill.soft_weight:
    return ()
  return ('mlm', 'nsp') if config.nsp else ('mlm',)


def make_generator(config, model: heads.Bert) -> heads.Bert | None:
  """The generator beside a model that is ELECTRA's discriminator; None beside others.

  Raises:
    ValueError: for settings that ELECTRA does not have.
  """
  if config.objective != 'electra':
    if config.generator_from:
      raise ValueError(
        f"generator_from={config.generator_from!r} is for objective='electra', got "
        f'{config.objective!r}; leave it out.'
      )
    return None
  if config.nsp:
    raise ValueError("objective='electra' has no next-sentence prediction; set nsp=False.")
  family = families.family_of(model.config)
  if ('rtd',) not in family.classes:
    raise ValueError(
      f"objective='electra' needs the model's switches to be ELECTRA's, got those of a "
      f"{family.model_type}; set model.classifier_hidden='gelu', as in the recipe electra_small."
    )
  if bool(config.init_from) != bool(config.generator_from):
    raise ValueError(
      f'ELECTRA starts from a discriminator and a generator, got init_from={config.init_from!r} '
      f'and generator_from={config.generator_from!r}; name both, or none.'
    )
  if not 0 < config.rtd_weight < math.inf:
    raise ValueError(f'rtd_weight must be above 0, got {config.rtd_weight}.')
  return electra.make_generator(model.config, config.generator_size)


def make_objective(config, model: heads.Bert, mesh, tokenizer) -> Objective:
  """The pre-training objective of a config, its teacher on the devices of a mesh."""
  if generator := make_generator(config, model):
    return electra.pretraining(model, generator, config.rtd_weight)
  check_teacher(config)
  if config.objective != 'distill':
    return mlm.pretraining(model)
  options = config.distill.to_dict()
  scale = {term: options[f'{term}_weight'] for term in (*distill.DISTILBERT, *distill.MINILM)}
  teacher, frozen = load_teacher(
    config, model, ('mlm',) if scale['soft'] else (), mesh, tokenizer, config.data.length
  )
  return distill.pretraining(
    model, teacher, scale, temperature=options['temperature'], layer=options['layer'],
    frozen=frozen,
  )  # fmt: skip


def check_teacher(config) -> None:
  """Raises ValueError if pre-training has a teacher without distillation, or the reverse."""
  if (config.objective == 'distill') != bool(config.distill.teacher):
    raise ValueError(
      f'objective={config.objective} and distill.teacher={config.distill.teacher!r} do not fit: '
      "distillation needs a teacher; set objective='distill' and name one, or neither."
    )
  if config.objective == 'distill' and config.nsp:
    raise ValueError("objective='distill' has no next-sentence prediction; set nsp=False.")


def load_teacher(config, model: heads.Bert, names: tuple[str, ...], mesh, tokenizer, length: int):
  """The teacher of a config and its parameters {'teacher': bfloat16 arrays} on a mesh.

  Args:
    config: of a run.
    model: the student.
    names: the heads of the teacher that the loss reads.
    mesh: of the run.
    tokenizer: of the run.
    length: tokens of the longest row.

  Raises:
    ValueError: if the teacher has another vocabulary, no such head or too few positions.
  """
  source = config.distill.teacher
  if loading.load_tokenizer(source).fingerprint != tokenizer.fingerprint:
    raise ValueError(
      f'the teacher {source} has another vocabulary than the student; train the student with '
      f'--config.data.vocab={source}, or start it from a model with the same tokenizer.'
    )
  encoder_config, params = loading.load_weights(source)
  huggingface.check_heads(names, params, source)
  if length > encoder_config.max_positions:
    raise ValueError(
      f'rows have {length} tokens, and the teacher {source} only {encoder_config.max_positions} '
      'positions; lower data.length.'
    )
  encoder_config = dataclasses.replace(
    encoder_config, dtype=model.config.dtype, attention=model.config.attention
  )
  pooler = bool({*names} & {*encoder_config.pooled_heads})
  teacher = heads.Bert(encoder_config, heads=names, pooler=pooler, num_labels=model.num_labels)
  parts = {'encoder', *names, *(['pooler'] if pooler else [])}
  kept = {'teacher': {name: params[name] for name in sorted(parts)}}
  kept = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), kept)
  _log.info('teacher: %s, %d layers of width %d, frozen', source, encoder_config.num_layers,
            encoder_config.hidden_size)  # fmt: skip
  return teacher, jax.device_put(kept, mesh_lib.tree_shardings(mesh, encoder.PARAM_AXES, kept))


def source_weights(config):
  """The config and parameters of `init_from`, with the layers of `init_layers` only."""
  weights = loading.load_weights(config.init_from)
  if not config.init_layers:
    return weights
  try:
    layers = [int(number) for number in config.init_layers.split(',')]
  except ValueError:
    raise ValueError(f"init_layers are written '0,2,4', got {config.init_layers!r}.") from None
  return loading.take_layers(*weights, layers, config.init_from)


def train_flops(config, model: heads.Bert, predictions: int) -> float:
  """FLOPs of one row with so many predictions, see `flops.train_flops`; of both of ELECTRA's
  models."""
  length, width = config.data.length, model.config.hidden_size
  generator = make_generator(config, model)
  if not generator:
    return flops.train_flops(model.config, length, predictions)
  rtd = 6 * length * width * (width + 1)
  own = flops.train_flops(model.config, length, 0) + rtd
  return own + flops.train_flops(generator.config, length, predictions)
