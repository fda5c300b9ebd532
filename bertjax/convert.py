"""Convert: a model from one library's files to another's.

  bertjax convert --from=uncased_L-12_H-768_A-12 --out=DIR
  bertjax convert --from=bert-base-uncased --out=DIR --format=google

  bertjax convert --from=WORKDIR --checkpoint=30000 --out=DIR
  bertjax convert --from=WORKDIR --out=DIR --hub=OWNER/NAME
  bertjax convert --from=ADAPTERS --base=MODEL --out=DIR

The first turns Google's files into Hugging Face's, the second goes back, the third makes a model of
a checkpoint of a run, the fourth uploads it to the Hugging Face hub, private and with a model card,
and the last merges adapters (PEFT's LoRA) with their base model. Reads Hugging Face's folders and
hub names (model.safetensors, pytorch_model.bin, former Flax's flax_model.msgpack) and Google's TF1
checkpoints, and says which it found. Weights stay bit for bit.
"""

import logging

from etils import epath

from bertjax.interop import files, loading, sentences
from bertjax.interop import hub as hub_lib

_log = logging.getLogger(__name__)


def run(
  *, out: str, format: str = 'hf', heads: str = '', gelu='erf', lowercase='', checkpoint: int = -1,
  base: str = '', hub: str = '', **flags,
) -> None:  # fmt: skip
  """Converts a model; `from` is among the flags because it is a word of Python's.

  Raises:
    ValueError: if the source cannot be read, or `out` exists and is not empty.
  """
  source = given = flags.pop('from', '')
  if not source or not out:
    raise ValueError('convert needs --from=MODEL and --out=DIR.')
  if format not in ('hf', 'google') or lowercase not in ('', 'true', 'false'):
    raise ValueError(
      f"--format is 'hf' or 'google', --lowercase 'true' or 'false', got {format!r}, {lowercase!r}."
    )
  if gelu not in ('erf', 'tanh'):
    raise ValueError(f"--gelu is 'erf' or 'tanh', got {gelu!r}.")
  if hub:
    hub_lib.check_name(hub)
    if format != 'hf':
      raise ValueError(f'--hub uploads a model directory, --format=hf; got --format={format}.')
  target = epath.Path(out)
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise ValueError(f'{target} exists already; remove it or choose another --out.')
  source = (
    loading.find_checkpoint(source, checkpoint) if checkpoint >= 0 else loading.find_model(source)
  )
  names = tuple(heads.split(',')) if heads else None
  case = {'true': True, 'false': False}.get(lowercase)
  model = loading.load_model(source, heads=names, gelu=gelu, lowercase=case, base=base)
  labels, problem_type = loading.read_labels(source)
  sentence = _sentence(source, model[0].heads) if format == 'hf' else None
  loading.save_model(
    out, *model, labels=labels, problem_type=problem_type, format=format, sentence=sentence
  )
  if loading.has_sentence_layers(source) and not sentence:
    _log.warning(
      "%s: the pooling and layers of sentence-transformers (modules.json) are not converted; %s's "
      'embeddings are means of length 1.', source, out,
    )  # fmt: skip
  _log.info('written to %s: %s', out, ', '.join(model[1]))
  if hub:
    about = files.read_json(epath.Path(given) / 'run.json', optional=True)
    card = hub_lib.model_card(hub, model[0], model[1], labels, _scores(given), about)
    (target / 'README.md').write_text(card, encoding='utf-8')
    _log.info('uploaded to %s', hub_lib.push(target, hub))


def _sentence(source, heads) -> dict | None:
  """Pooling, prompts and maximum length of embeddings of length 1, or the activation of a
  reranker's scores; None for other layers."""
  try:
    layers = loading.read_sentence_layers(source)
    if not layers and 'classification' in heads and (found := loading.read_activation(source)):
      return {'activation': found}
  except ValueError:
    return None
  if not layers or layers.steps != (sentences.normalise,) or layers.default_prompt:
    return None
  return {name: getattr(layers, name) for name in ('pooling', 'prompts', 'max_length')}


def _scores(source) -> dict[str, float]:
  """The final metrics of a run's workdir; {} for other sources."""
  content = files.read_json(epath.Path(source) / 'metrics.json', optional=True)
  return {name: value for name, value in content.items() if isinstance(value, int | float)}
