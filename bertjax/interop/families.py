"""The models of transformers that the encoder can be, as data: one `Family` for each.

A new family is one record here; no other module names a model.
"""

from collections.abc import Mapping

from bertjax.interop.family import CLASSES, CONSTANTS, FIELDS, Family
from bertjax.model.config import TASK_HEADS, EncoderConfig

_EMBEDDINGS = {
  'encoder/embeddings/word': '.embeddings.word_embeddings',
  'encoder/embeddings/position': '.embeddings.position_embeddings',
  'encoder/embeddings/token_type': '.embeddings.token_type_embeddings',
  'encoder/embeddings/layer_norm': '.embeddings.LayerNorm',
}
_LAYERS = {
  'encoder/layers/attention/query': '.encoder.layer.{}.attention.self.query',
  'encoder/layers/attention/key': '.encoder.layer.{}.attention.self.key',
  'encoder/layers/attention/value': '.encoder.layer.{}.attention.self.value',
  'encoder/layers/attention/out': '.encoder.layer.{}.attention.output.dense',
  'encoder/layers/attention_layer_norm': '.encoder.layer.{}.attention.output.LayerNorm',
  'encoder/layers/mlp/in': '.encoder.layer.{}.intermediate.dense',
  'encoder/layers/mlp/out': '.encoder.layer.{}.output.dense',
  'encoder/layers/mlp_layer_norm': '.encoder.layer.{}.output.LayerNorm',
}
_LINEAR_HEADS = {'classification': 'classifier', 'tagging': 'classifier', 'choice': 'classifier',
                 'span': 'qa_outputs'}  # fmt: skip
_DENSE_CLASSIFIER = {'classification/hidden': 'classifier.dense',
                     'classification': 'classifier.out_proj'}  # fmt: skip
_WORDS = '.embeddings.word_embeddings.weight'


def _without(names: Mapping, *left_out: str) -> dict:
  return {name: value for name, value in names.items() if name not in left_out}


_BERT = Family(
  'bert', 'Bert', 'bert',
  modules=_EMBEDDINGS | _LAYERS | _LINEAR_HEADS | {
    'pooler': '.pooler.dense',
    'mlm': 'cls.predictions',
    'mlm/transform': 'cls.predictions.transform.dense',
    'mlm/layer_norm': 'cls.predictions.transform.LayerNorm',
    'nsp': 'cls.seq_relationship',
  },
  classes=CLASSES | {('mlm', 'nsp'): 'ForPreTraining', ('nsp',): 'ForNextSentencePrediction'},
  tied={'cls.predictions.decoder.weight': _WORDS,
        'cls.predictions.decoder.bias': 'cls.predictions.bias'},
)  # fmt: skip
_LM_HEAD = {'mlm': 'lm_head', 'mlm/transform': 'lm_head.dense',
            'mlm/layer_norm': 'lm_head.layer_norm'}  # fmt: skip
_ROBERTA = Family(
  'roberta', 'Roberta', 'roberta',
  modules=_EMBEDDINGS | _LAYERS | _LINEAR_HEADS | _LM_HEAD | _DENSE_CLASSIFIER | {
    'pooler': '.pooler.dense',
  },
  aliases={'xlm-roberta': 'XLMRoberta', 'camembert': 'Camembert'},
  fixed={'classifier_hidden': 'tanh', 'activation': 'gelu'},
  least={'position_offset': 1},
  tied={'lm_head.decoder.weight': _WORDS, 'lm_head.decoder.bias': 'lm_head.bias'},
  pad_offset=True,
)  # fmt: skip

_MPNET = Family(
  'mpnet', 'MPNet', 'mpnet',
  modules=_EMBEDDINGS | _LAYERS | _LINEAR_HEADS | _LM_HEAD | _DENSE_CLASSIFIER | {
    'encoder/layers/attention/query': '.encoder.layer.{}.attention.attn.q',
    'encoder/layers/attention/key': '.encoder.layer.{}.attention.attn.k',
    'encoder/layers/attention/value': '.encoder.layer.{}.attention.attn.v',
    'encoder/layers/attention/out': '.encoder.layer.{}.attention.attn.o',
    'encoder/layers/attention_layer_norm': '.encoder.layer.{}.attention.LayerNorm',
    'encoder/relative': '.encoder.relative_attention_bias',
    'pooler': '.pooler.dense',
  },
  fields=_without(FIELDS, 'type_vocab_size', 'classifier_dropout', 'causal')
  | {'relative_buckets': 'relative_attention_num_buckets'},
  fixed={'classifier_hidden': 'tanh', 'activation': 'gelu', 'position_offset': 2,
         'type_vocab_size': 0},
  least={'relative_buckets': 1},
  defaults={'vocab_size': 30527, 'relative_buckets': 32},
  constants={'pad_token_id': 1},
  tied={'lm_head.decoder.weight': _WORDS, 'lm_head.decoder.bias': 'lm_head.bias'},
)  # fmt: skip
_DISTILBERT = Family(
  'distilbert', 'DistilBert', 'distilbert',
  modules=_without(_EMBEDDINGS, 'encoder/embeddings/token_type') | _LINEAR_HEADS | {
    'encoder/layers/attention/query': '.transformer.layer.{}.attention.q_lin',
    'encoder/layers/attention/key': '.transformer.layer.{}.attention.k_lin',
    'encoder/layers/attention/value': '.transformer.layer.{}.attention.v_lin',
    'encoder/layers/attention/out': '.transformer.layer.{}.attention.out_lin',
    'encoder/layers/attention_layer_norm': '.transformer.layer.{}.sa_layer_norm',
    'encoder/layers/mlp/in': '.transformer.layer.{}.ffn.lin1',
    'encoder/layers/mlp/out': '.transformer.layer.{}.ffn.lin2',
    'encoder/layers/mlp_layer_norm': '.transformer.layer.{}.output_layer_norm',
    'mlm': 'vocab_projector',
    'mlm/transform': 'vocab_transform',
    'mlm/layer_norm': 'vocab_layer_norm',
    'classification/hidden': 'pre_classifier',
    'choice/hidden': 'pre_classifier',
  },
  fields={
    'vocab_size': 'vocab_size', 'hidden_size': 'dim', 'num_layers': 'n_layers',
    'num_heads': 'n_heads', 'mlp_size': 'hidden_dim', 'max_positions': 'max_position_embeddings',
    'activation': 'activation', 'hidden_dropout': 'dropout',
    'attention_dropout': 'attention_dropout', 'classifier_dropout': 'seq_classif_dropout',
    'initializer_range': 'initializer_range',
  },
  fixed={'classifier_hidden': 'relu', 'type_vocab_size': 0},
  defaults={'num_layers': 6, 'classifier_dropout': 0.2},
  constants={},
  same={'qa_dropout': 'hidden_dropout'},
  tied={'vocab_projector.weight': _WORDS},
)  # fmt: skip
_ELECTRA = Family(
  'electra', 'Electra', 'electra',
  modules=_EMBEDDINGS | _LAYERS | _LINEAR_HEADS | _DENSE_CLASSIFIER | {
    'encoder/embeddings/project': '.embeddings_project',
    'mlm': 'generator_lm_head',
    'mlm/transform': 'generator_predictions.dense',
    'mlm/layer_norm': 'generator_predictions.LayerNorm',
    'rtd': 'discriminator_predictions.dense_prediction',
    'rtd/hidden': 'discriminator_predictions.dense',
    'choice/hidden': 'sequence_summary.summary',
  },
  fields=FIELDS | {'embedding_size': 'embedding_size'},
  fixed={'classifier_hidden': 'gelu', 'activation': 'gelu'},
  defaults={'embedding_size': 128, 'hidden_size': 256, 'num_heads': 4, 'mlp_size': 1024},
  constants=CONSTANTS | {'summary_type': 'first', 'summary_use_proj': True,
                          'summary_activation': 'gelu'},
  classes=CLASSES | {('rtd',): 'ForPreTraining'},
  tied={'generator_lm_head.weight': _WORDS},
)  # fmt: skip
_ALBERT_LAYER = '.encoder.albert_layer_groups.0.albert_layers.0.'
_ALBERT = Family(
  'albert', 'Albert', 'albert',
  modules=_EMBEDDINGS | _LINEAR_HEADS | {
    'encoder/embeddings/project': '.encoder.embedding_hidden_mapping_in',
    'encoder/layers/attention/query': f'{_ALBERT_LAYER}attention.query',
    'encoder/layers/attention/key': f'{_ALBERT_LAYER}attention.key',
    'encoder/layers/attention/value': f'{_ALBERT_LAYER}attention.value',
    'encoder/layers/attention/out': f'{_ALBERT_LAYER}attention.dense',
    'encoder/layers/attention_layer_norm': f'{_ALBERT_LAYER}attention.LayerNorm',
    'encoder/layers/mlp/in': f'{_ALBERT_LAYER}ffn',
    'encoder/layers/mlp/out': f'{_ALBERT_LAYER}ffn_output',
    'encoder/layers/mlp_layer_norm': f'{_ALBERT_LAYER}full_layer_layer_norm',
    'pooler': '.pooler',
    'mlm': 'predictions',
    'mlm/transform': 'predictions.dense',
    'mlm/layer_norm': 'predictions.LayerNorm',
    'nsp': 'sop_classifier.classifier',
  },
  fields=_without(FIELDS, 'causal')
  | {'embedding_size': 'embedding_size', 'classifier_dropout': 'classifier_dropout_prob'},
  fixed={'shared_layers': True},
  least={'embedding_size': 1},  # it projects even where the two widths are the same
  defaults={'vocab_size': 30000, 'embedding_size': 128, 'hidden_size': 4096, 'num_heads': 64,
            'mlp_size': 16384, 'activation': 'gelu_new', 'hidden_dropout': 0.0,
            'attention_dropout': 0.0, 'classifier_dropout': 0.1},
  constants={'position_embedding_type': 'absolute', 'num_hidden_groups': 1, 'inner_group_num': 1},
  classes=CLASSES | {('mlm', 'nsp'): 'ForPreTraining'},
  tied={'predictions.decoder.weight': _WORDS, 'predictions.decoder.bias': 'predictions.bias'},
)  # fmt: skip

# Modules of Google's ALBERT -> the names of its TF1 code, where BERT's rule does not give them.
_GOOGLE_LAYER = 'bert.encoder.transformer.group_0.inner_group_0.'
GOOGLE_ALBERT = {
  _ALBERT.expand(theirs): google
  for theirs, google in {
    f'{_ALBERT_LAYER}attention.query': f'{_GOOGLE_LAYER}attention_1.self.query',
    f'{_ALBERT_LAYER}attention.key': f'{_GOOGLE_LAYER}attention_1.self.key',
    f'{_ALBERT_LAYER}attention.value': f'{_GOOGLE_LAYER}attention_1.self.value',
    f'{_ALBERT_LAYER}attention.dense': f'{_GOOGLE_LAYER}attention_1.output.dense',
    f'{_ALBERT_LAYER}attention.LayerNorm': f'{_GOOGLE_LAYER}LayerNorm',
    f'{_ALBERT_LAYER}ffn': f'{_GOOGLE_LAYER}ffn_1.intermediate.dense',
    f'{_ALBERT_LAYER}ffn_output': f'{_GOOGLE_LAYER}ffn_1.intermediate.output.dense',
    f'{_ALBERT_LAYER}full_layer_layer_norm': f'{_GOOGLE_LAYER}LayerNorm_1',
    '.encoder.embedding_hidden_mapping_in': 'bert.encoder.embedding_hidden_mapping_in',
    '.pooler': 'bert.pooler.dense',
    'predictions': 'cls.predictions',
    'predictions.dense': 'cls.predictions.transform.dense',
    'predictions.LayerNorm': 'cls.predictions.transform.LayerNorm',
    'sop_classifier.classifier': 'cls.seq_relationship',
    **{theirs: f'bert{theirs}' for theirs in _EMBEDDINGS.values()},
  }.items()
}  # fmt: skip

# Sizes and rates of the pre-norm families.
_PRE_NORM_FIELDS = {
  'vocab_size': 'vocab_size', 'hidden_size': 'hidden_size', 'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads', 'mlp_size': 'intermediate_size',
  'max_positions': 'max_position_embeddings', 'initializer_range': 'initializer_range',
  'attention_dropout': 'attention_dropout', 'classifier_pooling': 'classifier_pooling',
  'tied_embeddings': 'tie_word_embeddings',
}  # fmt: skip
_PRE_NORM = {'positions': 'rotary', 'norm_position': 'pre', 'type_vocab_size': 0,
             'linear_bias': False, 'gated_mlp': True}  # fmt: skip
_NO_DROPOUT = {'hidden_dropout': 0.0, 'attention_dropout': 0.0}
_MODERNBERT = Family(
  'modernbert', 'ModernBert', 'model',
  modules={
    'encoder/embeddings/word': '.embeddings.tok_embeddings',
    'encoder/embeddings/layer_norm': '.embeddings.norm',
    'encoder/layers/attention_layer_norm': '.layers.{}.attn_norm',
    'encoder/layers/attention/qkv': '.layers.{}.attn.Wqkv',
    'encoder/layers/attention/out': '.layers.{}.attn.Wo',
    'encoder/layers/mlp_layer_norm': '.layers.{}.mlp_norm',
    'encoder/layers/mlp/gated_in': '.layers.{}.mlp.Wi',
    'encoder/layers/mlp/out': '.layers.{}.mlp.Wo',
    'encoder/final_layer_norm': '.final_norm',
    'mlm': 'decoder',
    'mlm/output': 'decoder',
    'mlm/transform': 'head.dense',
    'mlm/layer_norm': 'head.norm',
  } | dict.fromkeys(TASK_HEADS, 'classifier')
  | {f'{head}/hidden': 'head.dense' for head in TASK_HEADS}
  | {f'{head}/hidden_layer_norm': 'head.norm' for head in TASK_HEADS},
  fields=_PRE_NORM_FIELDS | {
    'layer_norm_eps': 'norm_eps', 'norm_bias': 'norm_bias', 'activation': 'hidden_activation',
    'hidden_dropout': 'embedding_dropout', 'classifier_dropout': 'classifier_dropout',
    'rope_theta': 'global_rope_theta', 'local_rope_theta': 'local_rope_theta',
    'local_window': 'local_attention', 'global_every': 'global_attn_every_n_layers',
    'mlm_bias': 'decoder_bias',
  },
  fixed=_PRE_NORM | {'classifier_hidden': 'gelu', 'classifier_norm': True},
  choices={'classifier_pooling': ('cls', 'mean')},
  defaults=_NO_DROPOUT | {
    'vocab_size': 50368, 'num_layers': 22, 'mlp_size': 1152, 'max_positions': 8192,
    'layer_norm_eps': 1e-5, 'norm_bias': False, 'classifier_dropout': 0.0,
    'rope_theta': 160_000.0, 'local_window': 128, 'scaled_init': True,
  },
  constants={'attention_bias': False, 'mlp_bias': False, 'classifier_bias': False,
             'classifier_activation': 'gelu', 'mlp_dropout': 0.0},
  tied={'decoder.weight': '.embeddings.tok_embeddings.weight'},
  tokens={'bos_token_id': 'cls', 'cls_token_id': 'cls', 'eos_token_id': 'sep',
          'sep_token_id': 'sep'},
)  # fmt: skip
_EUROBERT = Family(
  'eurobert', 'EuroBert', 'model',
  modules={
    'encoder/embeddings/word': '.embed_tokens',
    'encoder/layers/attention_layer_norm': '.layers.{}.input_layernorm',
    'encoder/layers/attention/query': '.layers.{}.self_attn.q_proj',
    'encoder/layers/attention/key': '.layers.{}.self_attn.k_proj',
    'encoder/layers/attention/value': '.layers.{}.self_attn.v_proj',
    'encoder/layers/attention/out': '.layers.{}.self_attn.o_proj',
    'encoder/layers/mlp_layer_norm': '.layers.{}.post_attention_layernorm',
    'encoder/layers/mlp/gate': '.layers.{}.mlp.gate_proj',
    'encoder/layers/mlp/up': '.layers.{}.mlp.up_proj',
    'encoder/layers/mlp/out': '.layers.{}.mlp.down_proj',
    'encoder/final_layer_norm': '.norm',
    'mlm/output': 'lm_head',
    'classification': 'classifier',
    'classification/hidden': 'dense',
    'tagging': 'classifier',
  },
  fields=_PRE_NORM_FIELDS | {
    'num_kv_heads': 'num_key_value_heads', 'activation': 'hidden_act',
    'layer_norm_eps': 'rms_norm_eps', 'rope_theta': 'rope_theta',
  },
  fixed=_PRE_NORM | {'norm': 'rms', 'embedding_norm': False, 'classifier_hidden': 'gelu',
                     'mlm_transform': False, 'mlm_bias': False, 'tied_embeddings': False},
  defaults=_NO_DROPOUT | {
    'vocab_size': 128256, 'max_positions': 8192, 'activation': 'silu', 'layer_norm_eps': 1e-5,
    'classifier_pooling': 'late',
  },
  constants={'attention_bias': False, 'mlp_bias': False},
  classes={heads: end for heads, end in CLASSES.items() if heads not in (('span',), ('choice',))},
  values={'classifier_pooling': {'bos': 'cls'}},
  tokens={'bos_token_id': 'cls', 'eos_token_id': 'sep', 'mask_token_id': 'mask'},
)  # fmt: skip

# Not in transformers: as its authors' files are (Le Breton et al. 2025, chandar-lab/NeoBERT).
_NEOBERT = Family(
  'neobert', 'NeoBERT', 'model',
  modules={
    'encoder/embeddings/word': '.encoder',
    'encoder/layers/attention_layer_norm': '.transformer_encoder.{}.attention_norm',
    'encoder/layers/attention/qkv': '.transformer_encoder.{}.qkv',
    'encoder/layers/attention/out': '.transformer_encoder.{}.wo',
    'encoder/layers/mlp_layer_norm': '.transformer_encoder.{}.ffn_norm',
    'encoder/layers/mlp/gated_in': '.transformer_encoder.{}.ffn.w12',
    'encoder/layers/mlp/out': '.transformer_encoder.{}.ffn.w3',
    'encoder/final_layer_norm': '.layer_norm',
    'mlm': 'decoder',
    'mlm/output': 'decoder',
    'classification': 'classifier',
    'classification/hidden': 'dense',
  },
  fields={
    'vocab_size': 'vocab_size', 'hidden_size': 'hidden_size', 'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads', 'mlp_size': 'intermediate_size',
    'max_positions': 'max_length', 'layer_norm_eps': 'norm_eps',
    'initializer_range': 'embedding_init_range', 'classifier_dropout': 'classifier_dropout',
  },
  fixed=_PRE_NORM | {
    'norm': 'rms', 'embedding_norm': False, 'activation': 'silu', 'classifier_hidden': 'tanh',
    'mlm_transform': False, 'tied_embeddings': False,
  },
  defaults=_NO_DROPOUT | {'num_layers': 28, 'mlp_size': 3072, 'max_positions': 1024,
                          'layer_norm_eps': 1e-6, 'classifier_dropout': 0.1},
  constants={'rope': True, 'rms_norm': True, 'swiglu_packed': True},
  classes={(): '', ('mlm',): 'LMHead', ('classification',): 'ForSequenceClassification'},
  mlp_scale=1.5,
  interleaved=True,
)  # fmt: skip

FAMILIES = (_BERT, _ROBERTA, _ALBERT, _DISTILBERT, _ELECTRA, _MPNET, _MODERNBERT, _EUROBERT,
            _NEOBERT)  # fmt: skip


def flatten(content: Mapping, source) -> dict:
  """`config.json` with rotary settings and the pattern of layers as single numbers, as the first
  releases of ModernBERT and EuroBERT had them.

  Raises:
    ValueError: for scaled rotary positions, or a pattern other than every n-th layer global.
  """
  result = dict(content)
  rope = result.pop('rope_parameters', None) or {}
  for kind, name in (('full_attention', 'global_rope_theta'),
                     ('sliding_attention', 'local_rope_theta'), ('', 'rope_theta')):  # fmt: skip
    settings = rope if not kind else rope.get(kind) or {}
    if 'rope_theta' in settings:
      result[name] = settings['rope_theta']
  scaled = [result.get('rope_scaling')] + [
    settings for settings in (rope, *rope.values()) if isinstance(settings, Mapping)
    and settings.get('rope_type', settings.get('type', 'default')) != 'default'
  ]  # fmt: skip
  for settings in filter(None, scaled):
    raise ValueError(f'{source}: scaled rotary positions are not supported, got {settings}.')
  if kinds := result.pop('layer_types', None):
    every = next((n for n in (3, 2, *range(4, len(kinds) + 1), 1) if kinds == [
      'sliding_attention' if i % n else 'full_attention' for i in range(len(kinds))
    ]), 0)  # fmt: skip
    if not every:
      raise ValueError(
        f'{source}: layer_types must make every n-th layer full_attention, from the first on, and '
        f'the others sliding_attention; got {kinds}.'
      )
    result['global_attn_every_n_layers'] = every
  return result


def family_of(config: EncoderConfig) -> Family:
  """The family that a config is a model of.

  Raises:
    ValueError: if there is none; names the fields in which the nearest one differs.
  """
  nearest = min(FAMILIES, key=lambda family: len(family.differences(config)))
  if wrong := nearest.differences(config):
    given = ', '.join(f'{name}={getattr(config, name)!r}' for name in wrong)
    raise ValueError(
      f'transformers has no model with {given}; a {nearest.model_type} is the nearest. Take the '
      'switches of one row of the table in bertjax/model/encoder.py.'
    )
  return nearest


def family_in(content: Mapping, source) -> Family:
  """The family that `config.json` names.

  Raises:
    ValueError: if that is none of ours; lists those that are.
  """
  known = {}
  for family in FAMILIES:
    for kind, name in {family.model_type: family.name, **family.aliases}.items():
      known[kind] = family, name
  architecture = (content.get('architectures') or ['BertModel'])[0]
  kind = content.get('model_type')
  if kind is None:
    start = architecture.partition('For')[0].removesuffix('Model')
    kind = next((kind for kind, (_, name) in known.items() if name == start), architecture)
  if kind not in known:
    raise ValueError(f'{source} describes a {kind!r} model; known are {", ".join(sorted(known))}.')
  return known[kind][0]
