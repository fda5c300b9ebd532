"""One pre-training step of ours and of transformers, on the same rows with the same optimizer."""

import functools

import jax
import numpy as np

from bertjax.model import heads
from bertjax.model.encoder import PARAM_AXES
from bertjax.objectives import mlm
from bertjax.training import loop, optimizer
from bertjax.training import mesh as mesh_lib

RATE = 1e-4


def make_batch(config, rows: int, length: int, predictions: int, seed: int = 0) -> dict:
  """Random ids without padding, `predictions` masked positions per sequence.

  The k-th id is as frequent as the k-th word of a text (1 / k), and masked positions have one id,
  since the gradient of a look-up adds up the rows of equal tokens.
  """
  rng = np.random.default_rng(seed)
  places = np.argsort(rng.random((rows, length)), 1)[:, :predictions]

  def ids(high, *shape):
    return rng.integers(0, high, shape, np.int32)

  words = (config.vocab_size ** rng.random((rows, length))).astype(np.int32)
  np.put_along_axis(words, places, 103, 1)  # [MASK] of bert-base-uncased
  return {
    'input_ids': words,
    'token_type_ids': ids(2, rows, length),
    'segment_ids': np.ones((rows, length), np.int32),
    'masked_lm_positions': np.sort(places, 1).astype(np.int32),
    'masked_lm_ids': ids(config.vocab_size, rows, predictions),
    'masked_lm_weights': np.ones((rows, predictions), np.float32),
    'next_sentence_labels': ids(2, rows),
    'example_weights': np.ones(rows, np.float32),
  }


def our_program(config, batch: dict, prng_impl: str = 'threefry2x32', bert=None):
  """(train step, state, device batch) on the first device."""
  bert, transform = bert or heads.Bert(config), optimizer.make_optimizer('adamw', RATE)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])

  def make_state():
    params = heads.init_params(bert, jax.random.key(0))
    return loop.TrainState.create(params, transform, jax.random.key(1, impl=prng_impl))

  state, shardings = loop.init_state(make_state, mesh_lib.sharder(mesh, PARAM_AXES))
  objective = mlm.pretraining(bert)
  step = loop.make_train_step(
    objective.loss, objective.weights, transform, mesh=mesh, state_shardings=shardings
  )
  return step, state, loop.shard_batch(batch, mesh_lib.batch_sharding(mesh))


def ours(config, batch: dict, steps: int, prng_impl: str = 'threefry2x32', bert=None):
  """A contender: so many steps, in tokens."""
  step, state, batch = our_program(config, batch, prng_impl, bert)

  def once():
    nonlocal state
    for _ in range(steps):
      state, metrics = step(state, batch)
    assert np.isfinite(metrics['loss'])  # and waits for the device
    return steps * batch['input_ids'].size

  return once


def theirs(config, batch: dict, steps: int, *, compiled: bool = False, device: str = 'cpu'):
  """A contender: BertForPreTraining or ModernBertForMaskedLM with SDPA; logits at all positions.

  On a GPU in bfloat16 autocast if `config.dtype` says so, with the fused AdamW.
  """
  import torch
  import transformers

  model = _their_model(config, transformers).to(device).train()
  plain, decayed = [], []
  for name, parameter in model.named_parameters():
    (plain if 'bias' in name or 'norm' in name.lower() else decayed).append(parameter)
  groups = [{'params': plain, 'weight_decay': 0.0}, {'params': decayed, 'weight_decay': 0.01}]
  adamw = torch.optim.AdamW(groups, lr=0.0, eps=1e-6, fused=device == 'cuda')
  for parameter in model.parameters():  # its moments are there before anything is measured
    parameter.grad = torch.zeros_like(parameter)
  adamw.step()
  adamw.zero_grad()
  for group in adamw.param_groups:
    group['lr'] = RATE
  inputs = _inputs(batch)
  if is_modernbert(config):
    inputs = {name: inputs[name] for name in ('input_ids', 'labels')}
  inputs = {name: torch.tensor(value).long().to(device) for name, value in inputs.items()}
  run = torch.compile(model) if compiled else model
  narrow = functools.partial(
    torch.autocast, device, torch.bfloat16, enabled=config.dtype == 'bfloat16'
  )

  def once():
    for _ in range(steps):
      with narrow():
        loss = run(**inputs).loss
      adamw.zero_grad()
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      adamw.step()
    assert np.isfinite(loss.item())
    if device == 'cuda':
      torch.cuda.synchronize()
    return steps * batch['input_ids'].size

  return once


def is_modernbert(config) -> bool:
  return config.positions == 'rotary' and config.local_window > 0


def _their_model(config, transformers):
  shared = {
    'vocab_size': config.vocab_size, 'hidden_size': config.hidden_size,
    'num_hidden_layers': config.num_layers, 'num_attention_heads': config.num_heads,
    'intermediate_size': config.mlp_size, 'max_position_embeddings': config.max_positions,
    'attn_implementation': 'sdpa',
  }  # fmt: skip
  if is_modernbert(config):  # the other fields of ModernBERT's sizes are defaults
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**shared))
  return transformers.BertForPreTraining(transformers.BertConfig(
    hidden_dropout_prob=config.hidden_dropout,
    attention_probs_dropout_prob=config.attention_dropout, **shared,
  ))  # fmt: skip


def _inputs(batch):
  labels = np.full(batch['input_ids'].shape, -100, np.int32)
  np.put_along_axis(labels, batch['masked_lm_positions'], batch['masked_lm_ids'], 1)
  return {
    'input_ids': batch['input_ids'], 'token_type_ids': batch['token_type_ids'],
    'attention_mask': batch['segment_ids'], 'labels': labels,
    'next_sentence_label': batch['next_sentence_labels'],
  }  # fmt: skip
