"""BERT, RoBERTa and ModernBERT of one size, pre-trained on the same books, side by side.

  python -m benchmarks family --books=BOOKS --folder=RUNS --out=benchmarks/results/family.json
  python -m benchmarks family --seeds=0                    only the tokens/s of a step: 3 minutes

Each recipe with the word `mini`: 4 layers, 256 wide, 16 rows of 128 tokens. All read full sentences
with a vocabulary of --size entries that keeps case: WordPiece, or byte-level BPE where the family
has it. Optimizer and mask rate are the recipe's. The last checkpoint is scored with 15% masks on
the held-out books, which are the same for both vocabularies; as their tokens differ, the loss is
also given in bits per byte of text. Runs that the JSON already holds are not repeated.
"""

import json
import math
import pathlib
import statistics

import jax

from benchmarks import machine
from bertjax import compile as compile_lib
from bertjax import config as config_lib
from bertjax import evaluate, plan, prepare, pretrain, vocab
from bertjax.data import prng
from bertjax.data import text as text_lib

FLAGS = {
  'books': ('', 'a folder of prose, a file a document'),
  'folder': ('', 'folder of vocabularies, prepared rows and runs'),
  'only': ('', 'recipes, by commas; all if empty'),
  'size': (8192, 'entries of a vocabulary'),
  'steps': (600, 'steps of a run, of 2,048 tokens'),
  'seeds': (2, 'runs of each, from seed 0; 0 = none'),
  'repeats': (3, 'rounds of the tokens/s of a step; 0 = none'),
  'words': ('mini', 'words after the recipe'),
  'out': ('', 'JSON file; runs in it are kept'),
}
RECIPES = {'bert_base': 'wordpiece', 'roberta_base': 'bpe', 'modernbert_base': 'bpe'}
SAME = {'nsp': False, 'data.kind': 'full_sentences', 'data.lowercase': False,
        'data.short_seq_prob': 0.0, 'data.max_sequences_per_row': 1,
        'data.dupe_factor': 1}  # fmt: skip


def run(books, folder, only, size, steps, seeds, repeats, words, out):
  path, base = pathlib.Path(out or 'family.json'), pathlib.Path(folder)
  result = json.loads(path.read_text()) if out and path.exists() else {'runs': {}, 'speed': {}}
  recipes = only.split(',') if only else list(RECIPES)

  def write():
    if out:
      path.write_text(json.dumps(result | machine(), indent=1) + '\n')

  for _ in range(repeats):  # in turn, so that other work on the machine meets all alike
    for recipe in recipes:
      config = make_config(recipe, words)
      config.model.vocab_size = size
      report = compile_lib.report_of(plan.stages(config)[0], jax.devices()[:1], measure=True)
      result['speed'].setdefault(recipe, []).append(report['measured_tokens_per_second'])
      write()
  for seed in range(seeds):
    for recipe in recipes:
      name = f'{recipe} {steps} seed {seed}'
      if name not in result['runs']:
        rows = prepared(books, base, RECIPES[recipe], size, words)
        result['runs'][name] = {'recipe': recipe, 'seed': seed, 'steps': steps, 'size': size} | (
          trained(recipe, words, rows, base / name.replace(' ', '_'), seed, steps)
        )
        write()
  print(table(result))
  return result


def make_config(recipe: str, words: str):
  config = config_lib.load_recipe(f'{recipe}:{words}')
  config_lib.update(config, SAME)
  return config


def prepared(books, base, kind: str, size: int, words: str) -> pathlib.Path:
  """Rows of the books by a vocabulary of a kind, trained first."""
  path = base / {'wordpiece': 'vocab.txt', 'bpe': 'tokenizer.json'}[kind]
  if not path.exists():
    base.mkdir(parents=True, exist_ok=True)
    vocab.run(input=books, out=str(path), size=size, kind=kind, lowercase=False, report=False)
  rows = base / kind
  if not rows.exists():
    config = make_config('bert_base', words)
    config.data.input, config.data.vocab = str(books), str(path)
    manifest = prepare.run(config, out=str(rows))
    facts = {'bytes': heldout_bytes(books, config.data.heldout_fraction)}
    facts['tokens'] = manifest['counts']['heldout_tokens']
    (base / f'{kind}.json').write_text(json.dumps(facts))
  return rows


def heldout_bytes(books, fraction: float) -> int:
  """UTF-8 bytes of the documents that are held out."""
  texts = [text.encode() for text in text_lib.read_documents(str(books))]
  chosen = prng.choose_heldout(texts, fraction)[1]
  return sum(len(text) for text, out in zip(texts, chosen, strict=True) if out)


def trained(recipe, words, rows, workdir, seed: int, steps: int) -> dict:
  config = make_config(recipe, words)
  config.data.prepared, config.seed = str(rows), seed
  config.num_train_steps, config.warmup_steps = steps, max(1, steps // 10)
  config.eval_every = max(1, steps // 4)
  pretrain.run(config, workdir=str(workdir))
  config = make_config(recipe, words)
  config.data.prepared, config.masking.rate, config.masking.max_predictions = str(rows), 0.15, 20
  scores = evaluate.run(config, model=str(workdir / 'model'))
  facts = json.loads(rows.with_suffix('.json').read_text())
  bits = scores['mlm_loss'] / math.log(2) * facts['tokens'] / facts['bytes']
  return scores | {'bits_per_byte': bits, 'bytes_per_token': facts['bytes'] / facts['tokens']}


def table(result: dict) -> str:
  """A row for each recipe and number of steps; means over seeds, the range behind them."""
  lines = ['| recipe | tokens | held-out masked-LM loss | unigram | bits per byte | accuracy | '
           'tokens/s |', '|---' * 7 + '|']  # fmt: skip
  cells = result['runs'].values()
  for recipe, steps in sorted({(c['recipe'], c['steps']) for c in cells}):
    same = [c for c in cells if (c['recipe'], c['steps']) == (recipe, steps)]

    def mean(name, form, same=same):
      values = [cell[name] for cell in same]
      span = f' ({min(values):{form}}..{max(values):{form}})' if len(same) > 1 else ''
      return f'{statistics.mean(values):{form}}{span}'

    speed = result['speed'].get(recipe)
    lines.append(
      f'| {recipe} | {steps * 2048:,} | {mean("mlm_loss", ".3f")} | '
      f'{mean("unigram_cross_entropy", ".2f")} | {mean("bits_per_byte", ".3f")} | '
      f'{mean("mlm_accuracy", ".3f")} | {f"{statistics.median(speed):,.0f}" if speed else ""} |'
    )
  if not cells:
    lines += [f'| {recipe} {"| " * 5}| {statistics.median(rates):,.0f} ({min(rates):,.0f}..'
              f'{max(rates):,.0f}) |' for recipe, rates in result['speed'].items()]  # fmt: skip
  return '\n'.join(lines)
