"""The losses of fine-tuning, step by step, beside a plain transformers loop on the same batches."""

import jax
import numpy as np
import pytest

from bertjax import finetune, pretrain
from bertjax.interop import directory
from bertjax.model import encoder, losses
from bertjax.tasks import TASKS, rows
from bertjax.training import loop, optimizer
from bertjax.training import mesh as mesh_lib
from tests.test_finetune import make, model  # noqa: F401 (fixtures)

transformers = pytest.importorskip('transformers')
torch = pytest.importorskip('torch')

STEPS, RATE = 8, 1e-3
CLASSES = {
  'class': 'BertForSequenceClassification',
  'regression': 'BertForSequenceClassification',
  'tags': 'BertForTokenClassification',
  'span': 'BertForQuestionAnswering',
  'choice': 'BertForMultipleChoice',
}


def their_loss(theirs, kind, batch, choices):
  """The loss of transformers' class, as its users get it."""
  t = {name: torch.tensor(np.asarray(array)) for name, array in batch.items()}
  text = {
    'input_ids': t['input_ids'].long(), 'token_type_ids': t['token_type_ids'].long(),
    'attention_mask': t['segment_ids'].long(),
  }  # fmt: skip
  labels = t['labels']
  if kind == 'choice':
    text = {name: value.reshape(-1, choices, value.shape[1]) for name, value in text.items()}
    return theirs(**text, labels=labels.reshape(-1, choices)[:, 0].long()).loss
  if kind == 'span':
    return theirs(
      **text, start_positions=labels[:, 0].long(), end_positions=labels[:, 1].long()
    ).loss
  if kind == 'tags':
    labels = torch.where(labels < 0, -100, labels)
  return theirs(**text, labels=labels if kind == 'regression' else labels.long()).loss


@pytest.mark.parametrize(
  ('task', 'recipe'),
  [('sst2', 'glue'), ('stsb', 'glue'), ('conll2003', 'tagging'), ('squad1', 'squad'),
   ('codah', 'choice')],
)  # fmt: skip
def test_losses_follow_transformers(make, model, tmp_path, task, recipe):  # noqa: F811
  config = make(task, recipe)
  config.span_over_padding = True  # as transformers, and run_squad.py
  task = TASKS[task](config.data.source)
  tokenizer, bert = (
    directory.load_tokenizer(model),
    finetune.make_model(config, task, directory.load_weights(model)[0]),
  )
  one = mesh_lib.make_mesh(devices=jax.devices()[:1])
  schedule = optimizer.unit_schedule('google', STEPS, 2)
  config.optimizer.name, config.learning_rate = 'adamw', RATE
  transform = finetune.make_transform(config, bert)
  make_state = pretrain.state_maker(config, bert, transform)
  initial = jax.device_get(make_state().params)
  params = directory.load_params(model, bert, initial=initial, fresh=('pooler', task.head))
  problem = finetune._PROBLEMS.get(task.kind, '')
  labels = task.labels if task.kind in ('class', 'tags') else ()
  directory.save_model(
    tmp_path / 'start', bert.config, params, tokenizer, labels=labels, problem_type=problem
  )
  theirs = getattr(transformers, CLASSES[task.kind]).from_pretrained(
    tmp_path / 'start', **({'num_labels': 1} if task.kind == 'regression' else {})
  )
  theirs.train()
  theirs.bert.embeddings.word_embeddings.padding_idx = None  # they give [PAD] no gradient
  kept = [p for n, p in theirs.named_parameters() if 'bias' in n or 'LayerNorm' in n]
  decayed = [p for n, p in theirs.named_parameters() if not ('bias' in n or 'LayerNorm' in n)]
  groups = [{'params': kept, 'weight_decay': 0.0}, {'params': decayed, 'weight_decay': 0.01}]
  adamw = torch.optim.AdamW(groups, lr=RATE, eps=1e-6)

  state, shardings = loop.init_state(make_state, mesh_lib.sharder(one, encoder.PARAM_AXES), params)
  loss_fn, weights = losses.task_loss(bert, task.kind, choices=task.choices, span_over_padding=True)
  step = loop.make_train_step(
    loss_fn, weights, transform, schedule, mesh=one, state_shardings=shardings
  )
  encoded = rows.encode(task, task.read('train'), tokenizer, config.data.length, 'train')
  batches = finetune.task_batches(config, task, encoded.columns)
  for number in range(STEPS):
    batch = batches.training(number)
    loss = their_loss(theirs, task.kind, batch, task.choices)
    adamw.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    for group in adamw.param_groups:
      group['lr'] = RATE * float(schedule(number))
    adamw.step()
    state, metrics = step(state, batch)
    assert float(metrics['loss']) == pytest.approx(loss.item(), rel=1e-4, abs=1e-6), number
