"""A plain fine-tuning loop of transformers and torch, on our batches."""

import types

import numpy as np
import torch
import transformers

_CLASSES = {  # by our head
  'classification': 'BertForSequenceClassification',
  'tagging': 'BertForTokenClassification',
  'span': 'BertForQuestionAnswering',
  'choice': 'BertForMultipleChoice',
}


class TransformersLoop:
  """AdamW with bias correction, no decay on biases and LayerNorm, the gradient's norm clipped.

  Args:
    directory: a saved model with the task's head.
    task: of `bertjax.TASKS`.
    train_padding: give the [PAD] row of the word table its gradient, as we do; they give it none.
  """

  def __init__(self, directory, task, *, train_padding: bool):
    self.task = task
    cls = getattr(transformers, _CLASSES[task.head])
    model = cls.from_pretrained(directory, **({'num_labels': 1} if task.label.numeric else {}))
    if train_padding:
      model.bert.embeddings.word_embeddings.padding_idx = None
    self._train(model)

  def _train(self, model):
    self.model = model.train()
    named = list(self.model.named_parameters())
    plain = [p for n, p in named if 'bias' in n or 'LayerNorm' in n]
    decayed = [p for n, p in named if not ('bias' in n or 'LayerNorm' in n)]
    groups = [{'params': plain, 'weight_decay': 0.0}, {'params': decayed, 'weight_decay': 0.01}]
    self._adamw = torch.optim.AdamW(groups, lr=0.0, eps=1e-6)

  def step(self, batch: dict, rate: float) -> float:
    """One step at a learning rate; returns the loss before it."""
    loss = self._run(batch, labels=True).loss
    self._adamw.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    for group in self._adamw.param_groups:
      group['lr'] = rate
    self._adamw.step()
    return loss.item()

  @torch.inference_mode()
  def logits(self, batch: dict) -> np.ndarray:
    """As our head of the same kind gives them."""
    self.model.eval()
    out = self._run(batch, labels=False)
    self.model.train()
    if self.task.head == 'span':
      return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return out.logits.numpy().reshape(-1) if self.task.choices > 1 else out.logits.numpy()

  def _inputs(self, batch) -> dict:
    if np.max(batch['segment_ids']) > 1:
      raise ValueError('a row of several sequences, which would attend to each other.')
    names = {'input_ids': 'input_ids', 'token_type_ids': 'token_type_ids',
             'attention_mask': 'segment_ids'}  # fmt: skip
    return {name: torch.tensor(np.asarray(batch[ours])).long() for name, ours in names.items()}

  def _run(self, batch, labels: bool):
    inputs, choices = self._inputs(batch), self.task.choices
    if choices > 1:
      inputs = {n: x.reshape(-1, choices, x.shape[1]) for n, x in inputs.items()}
    return self.model(**inputs, **(self._labels(batch) if labels else {}))

  def _labels(self, batch) -> dict:
    labels = torch.tensor(np.asarray(batch['labels']))
    if self.task.label.numeric:
      return {'labels': labels}
    labels = labels.long()
    if self.task.head == 'span':
      return {'start_positions': labels[:, 0], 'end_positions': labels[:, 1]}
    if self.task.label.per_token:
      labels = torch.where(labels < 0, -100, labels)
    return {
      'labels': labels.reshape(-1, self.task.choices)[:, 0] if self.task.choices > 1 else labels
    }


class SentenceLoop(TransformersLoop):
  """The same loop with sentence-transformers' model and contrastive loss, of texts of R columns."""

  def __init__(self, directory, rows: int, temperature: float):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    self.rows = rows
    self._train(SentenceTransformer(str(directory), device='cpu'))
    self.loss = losses.MultipleNegativesRankingLoss(self.model, scale=1 / temperature)

  def _run(self, batch, labels: bool):
    inputs = self._inputs(batch)
    columns = [{name: x[i :: self.rows] for name, x in inputs.items()} for i in range(self.rows)]
    return types.SimpleNamespace(loss=self.loss(columns, None))
