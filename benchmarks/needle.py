"""A needle in a context: a tiny ModernBERT finds one sentence in 1,024 and 4,096 tokens.

  python -m benchmarks needle --books=BOOKS --out=benchmarks/results/needle.json

Each text is prose from the books with four sentences at random positions: one says that the
password is one of four words, the others that the answer is one of the other three. The class is
the word of the password, so counting words is no help: a local layer has to relate `password` to
its word, and [CLS] to find them in a global layer. The model begins with random weights, learns in
texts of 64 tokens without the other three sentences, then with them, then in ever longer ones. The
control has the same texts with `password` replaced by `answer`: chance is 0.25.
"""

import dataclasses
import json
import pathlib
import random
import time

import jax
import jax.numpy as jnp

from benchmarks import machine
from bertjax import finetune, vocab
from bertjax.config import load_recipe
from bertjax.data.tokenizer import Tokenizer
from bertjax.inference.predictor import Predictor
from bertjax.interop import loading
from bertjax.model.config import modernbert_base
from bertjax.model.heads import Bert

FLAGS = {
  'books': ('', 'a folder of prose'),
  'workdir': ('runs/needle', 'folder of texts and runs, which resume'),
  'width': (64, 'of the model'),
  'layers': (4, 'of the model; each third is global, from the first on'),
  'rate': (1e-3, 'peak learning rate'),
  'seed': (0, 'of weights, texts and batches'),
  'stages': ('64x64x1200,64x64x800,256x32x200,1024x16x100,4096x4x60', 'LENGTHxBATCHxSTEPS each'),
  'dev': (200, 'texts that are scored'),
  'out': ('', 'JSON file to write'),
}
CLASSES = ('red', 'green', 'white', 'black')
KEY, OTHER = 'password', 'answer'


def run(books, workdir, width, layers, rate, seed, stages, dev, out):
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  if not (folder / 'vocab.txt').exists():
    vocab.run(input=books, out=str(folder / 'vocab.txt'), kind='wordpiece', size=4096, report=False)
  tokenizer = Tokenizer.from_file(folder / 'vocab.txt')
  prose = words_of(books, tokenizer)
  config = modernbert_base(
    num_layers=layers, hidden_size=width, mlp_size=2 * width, num_heads=max(1, width // 32),
    vocab_size=tokenizer.vocab_size, initializer_range=0.1, max_positions=8192,
  )  # fmt: skip
  model, start = Bert(config, heads=()), folder / 'start'
  params = model.init(jax.random.key(seed), {'input_ids': jnp.zeros((1, 8), jnp.int32)})['params']
  loading.save_model(start, model, params, tokenizer)
  rows = []
  for number, stage in enumerate(stages.split(',')):
    length, batch_size, steps = map(int, stage.split('x'))
    others = number > 0  # the first stage has the password only
    path, begun = folder / f'{number}-{stage}', time.perf_counter()
    path.mkdir(exist_ok=True)
    files = {}
    for split, count in (('train', batch_size * steps), ('dev', dev)):
      draw = random.Random(f'{seed} {number} {split}')
      texts = [make_text(draw, prose, tokenizer, length, others) for _ in range(count)]
      files[split] = path / f'{split}.jsonl'
      files[split].write_text(''.join(json.dumps(text) + '\n' for text in texts), 'utf-8')
    scores = train(start, path / 'run', files, length, batch_size, rate, seed)
    start = path / 'run' / 'model'
    rows.append({'length': length, 'batch_size': batch_size, 'steps': steps, 'others': others,
                 'accuracy': scores['accuracy'], 'control': control(start, files['dev']),
                 'seconds': time.perf_counter() - begun})  # fmt: skip
    print(rows[-1], flush=True)
  result = {'config': dataclasses.asdict(config), 'stages': rows} | machine()
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result


def words_of(books, tokenizer) -> list[tuple[str, int]]:
  """Words of the books without those of the sentences, each with its number of tokens."""
  words = []
  for path in sorted(pathlib.Path(books).iterdir())[:40]:
    words += path.read_text('utf-8').lower().split()
  words = [word for word in words if not {KEY, OTHER, *CLASSES} & set(word.split("'"))]
  different = sorted(set(words))
  sizes = dict(zip(different, map(len, tokenizer.encode(different)), strict=True))
  return [(word, sizes[word]) for word in words]


def make_text(draw, prose, tokenizer, length: int, others: bool) -> dict[str, str]:
  """{'text', 'label'}: at most `length` tokens with the special ones."""
  labels = draw.sample(CLASSES, len(CLASSES) if others else 1)
  inserted = [f'the {KEY} is {labels[0]} .', *(f'the {OTHER} is {label} .' for label in labels[1:])]
  room = length - 2 - sum(map(len, tokenizer.encode(inserted)))
  begin = draw.randrange(len(prose) - length)
  words = []
  for word, size in prose[begin : begin + length]:
    if (room := room - size) < 0:
      break
    words.append(word)
  places = sorted(draw.sample(range(len(words) + 1), len(inserted)), reverse=True)
  draw.shuffle(inserted)
  for place, sentence in zip(places, inserted, strict=True):
    words.insert(place, sentence)
  return {'text': ' '.join(words), 'label': labels[0]}


def train(start, workdir, files, length, batch_size, rate, seed) -> dict:
  """One epoch over the texts; the dev scores of its end."""
  config = load_recipe('table')
  config.update({
    'init_from': str(start), 'batch_size': batch_size, 'learning_rate': rate, 'seed': seed,
    'num_train_epochs': 1.0, 'save_model': 'last', 'reinit_head': False, 'log_every': 50,
  })  # fmt: skip
  config.data.update({'train_file': str(files['train']), 'dev_file': str(files['dev']),
                      'length': length, 'packed_length': 0})  # fmt: skip
  config.task.update({'text': 'text', 'labels': '|'.join(CLASSES)})
  config.optimizer.update({'name': 'adamw', 'b2': 0.98})
  return finetune.run(config, workdir=str(workdir))


def control(model, file) -> float:
  """The accuracy on texts whose password is an answer like the others."""
  lines = [json.loads(line) for line in file.read_text('utf-8').splitlines()]
  texts = [line['text'].replace(KEY, OTHER) for line in lines]
  found = Predictor.from_dir(model, batch_size=8).classify(texts)
  hits = [line['label'] in each.labels for line, each in zip(lines, found, strict=True)]
  return sum(hits) / len(hits)
