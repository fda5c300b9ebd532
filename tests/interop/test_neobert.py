"""NeoBERT, which transformers does not have, against its published equations in torch."""

import json

import jax
import numpy as np
import pytest

from bertjax.interop import huggingface
from bertjax.interop.huggingface import load_hf, save_hf
from bertjax.interop.loading import load_model, save_model
from bertjax.model.heads import Bert
from tests.interop.models import check_same, random_params
from tests.interop.test_families import LABELS, V, batch_of, check_close, vocabulary

torch = pytest.importorskip('torch')
safetensors = pytest.importorskip('safetensors.torch')

D, HEADS, LAYERS, MLP = 32, 4, 2, 40  # 2/3 of 56, rounded up to a multiple of 8
CONTENT = {
  'model_type': 'neobert', 'architectures': ['NeoBERTLMHead'], 'vocab_size': V, 'hidden_size': D,
  'num_hidden_layers': LAYERS, 'num_attention_heads': HEADS, 'intermediate_size': 56,
  'max_length': 64, 'norm_eps': 1e-5, 'pad_token_id': 0,
}  # fmt: skip


def tensors(seed=0, words=V):
  """A random model under the names of the authors' files, with both heads."""
  shapes = {'model.encoder.weight': (words, D), 'model.layer_norm.weight': (D,),
            'decoder.weight': (words, D), 'decoder.bias': (words,), 'dense.weight': (D, D),
            'dense.bias': (D,), 'classifier.weight': (LABELS, D),
            'classifier.bias': (LABELS,)}  # fmt: skip
  for i in range(LAYERS):
    layer = f'model.transformer_encoder.{i}.'
    shapes |= {f'{layer}qkv.weight': (3 * D, D), f'{layer}wo.weight': (D, D),
               f'{layer}ffn.w12.weight': (2 * MLP, D), f'{layer}ffn.w3.weight': (D, MLP),
               f'{layer}attention_norm.weight': (D,), f'{layer}ffn_norm.weight': (D,)}  # fmt: skip
  torch.manual_seed(seed)
  return {name: (torch.randn(shape) * 0.2 + ('norm' in name)).requires_grad_()
          for name, shape in shapes.items()}  # fmt: skip


def write(folder, weights):
  """A folder as the authors' are; returns the tensors in it."""
  folder.mkdir()
  own = {name: w.detach().contiguous() for name, w in weights.items()}
  safetensors.save_file(own, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(CONTENT))
  return own


def turn(x):
  """Rotary positions as complex numbers: neighbours are real and imaginary part."""
  length, size = x.shape[1], x.shape[-1]
  angles = torch.outer(torch.arange(length), 10_000.0 ** (-torch.arange(0, size, 2) / size))
  pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], size // 2, 2))
  turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
  return torch.view_as_real(turned).flatten(-2)


def reference(w, ids, real):
  """(final states, masked-LM logits, classification logits)."""

  def norm(x, name):
    return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-5) * w[f'{name}.weight']

  x = w['model.encoder.weight'][ids]
  for i in range(LAYERS):
    layer = f'model.transformer_encoder.{i}.'
    mixed = norm(x, f'{layer}attention_norm') @ w[f'{layer}qkv.weight'].T
    q, k, v = mixed.reshape(*ids.shape, HEADS, 3 * D // HEADS).chunk(3, dim=-1)
    scores = torch.einsum('bqhk,bshk->bhqs', turn(q), turn(k)) * (D // HEADS) ** -0.5
    probs = scores.masked_fill(~real[:, None, None], -1e9).softmax(-1)
    context = torch.einsum('bhqs,bshk->bqhk', probs, v).flatten(-2)
    x = x + context @ w[f'{layer}wo.weight'].T
    gate, up = (norm(x, f'{layer}ffn_norm') @ w[f'{layer}ffn.w12.weight'].T).chunk(2, dim=-1)
    x = x + (torch.nn.functional.silu(gate) * up) @ w[f'{layer}ffn.w3.weight'].T
  x = norm(x, 'model.layer_norm')
  pooled = torch.tanh(x[:, 0] @ w['dense.weight'].T + w['dense.bias'])
  return (x, x @ w['decoder.weight'].T + w['decoder.bias'],
          pooled @ w['classifier.weight'].T + w['classifier.bias'])  # fmt: skip


def test_outputs_and_gradients_equal_the_published_equations_and_files_the_way_back(tmp_path):
  weights, batch = tensors(), batch_of()
  own = write(tmp_path / 'theirs', weights)
  config, params = load_hf(tmp_path / 'theirs')
  assert (config.mlp_size, config.max_positions) == (MLP, 64)
  bert = Bert(config, ('mlm', 'classification'), False, LABELS)
  batch = {name: batch[name] for name in ('input_ids', 'segment_ids')}
  real = batch['segment_ids'] > 0

  def total(params):
    out = bert.apply({'params': params}, batch)
    value = (out['mlm_logits'] ** 2 * real[..., None]).sum()
    return value + (out['classification_logits'] ** 2).sum(), out

  grads, out = jax.jit(jax.grad(total, has_aux=True))(params)
  x, mlm, classes = reference(weights, torch.tensor(batch['input_ids']).long(), torch.tensor(real))
  check_close(np.asarray(out['hidden'])[real], x.detach().numpy()[real])
  check_close(np.asarray(out['mlm_logits'])[real], mlm.detach().numpy()[real])
  check_close(np.asarray(out['classification_logits']), classes)
  ((mlm**2 * torch.tensor(real)[..., None]).sum() + (classes**2).sum()).backward()
  for name, grad in huggingface.to_tensors(config, jax.device_get(grads)).items():
    check_close(grad, weights[name].grad, name)
  save_hf(tmp_path / 'ours', config, params, vocabulary(0), labels=('a', 'b', 'c'))
  saved = safetensors.load_file(tmp_path / 'ours' / 'model.safetensors')
  assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)
  again, params_again = load_hf(tmp_path / 'ours')
  assert again == config
  check_same(params, params_again)


def test_a_head_that_the_authors_do_not_have_is_saved_with_our_names(tmp_path, caplog):
  write(tmp_path / 'theirs', tensors())
  config, params = load_hf(tmp_path / 'theirs', heads=())
  bert = Bert(config, ('span',), pooler=False)
  params |= random_params(config, ('span',), pooler=False)
  save_model(tmp_path / 'ours', bert, params, vocabulary(0))
  assert "no class with the heads ('span',); saved as NeoBERT" in caplog.text
  again, params_again, _ = load_model(tmp_path / 'ours')
  assert again == bert
  check_same(params, params_again)
