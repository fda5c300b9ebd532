"""F1 of `tag` on plain text, where it has to find the words, against the tokenised file.

  bertjax finetune --config=tagging --workdir=RUN --config.init_from=MODEL \\
      --config.data.source=CONLL2003
  python -m benchmarks tag_text --model=RUN --file=CONLL2003/eng.testa

Sentences become plain text by usual typography: no blank before `. , ; : ? ! % )` and clitics like
`'s`, none after `( $`, none inside quotation marks. A span is right if its characters and type are.
"""

import json
import pathlib

from benchmarks import machine
from bertjax.inference.predictor import Predictor
from bertjax.objectives.entities import entities
from bertjax.tasks.tagging import read_conll

FLAGS = {
  'model': ('', 'a tagging model: a model directory or the workdir of a run'),
  'file': ('', 'a file in the format of CoNLL-2003'),
  'count': (0, 'sentences to read; 0 = all'),
  'out': ('', 'JSON file to write'),
}


def run(model, file, count, out):
  predictor = Predictor.from_dir(model, long='window')
  items = [item for _, item in read_conll(file)][: count or None]
  texts, places = zip(*(plain_text(item.texts) for item in items), strict=True)
  tokenised, joined = zip(*(spaced(item.texts) for item in items), strict=True)
  contenders = {
    'tokenised, its words given': ([list(item.texts) for item in items], {}, joined),
    "tokenised, words='spaces'": (tokenised, {'words': 'spaces'}, joined),
    "plain text, words='text'": (texts, {'words': 'text'}, places),
    "plain text, words='spaces'": (texts, {'words': 'spaces'}, places),
    "plain text, words='tokens'": (texts, {'words': 'tokens'}, places),
  }
  rows = []
  print('| input | F1 | precision | recall |\n|---|---|---|---|')
  for name, (given, options, offsets) in contenders.items():
    found = [
      {(s.label, s.start, s.end) for s in spans} for spans in predictor.tag(given, **options)
    ]
    gold = [{(kind, place[a][0], place[b - 1][1]) for kind, a, b in entities(item.label)}
            for item, place in zip(items, offsets, strict=True)]  # fmt: skip
    right = sum(len(a & b) for a, b in zip(found, gold, strict=True))
    precision, recall = (right / max(1, sum(map(len, side))) for side in (found, gold))
    f1 = 2 * right / max(1, sum(map(len, [*found, *gold])))
    print(f'| {name} | {f1:.3f} | {precision:.3f} | {recall:.3f} |')
    rows.append({'name': name, 'f1': f1, 'precision': precision, 'recall': recall})
  result = {'benchmark': 'tag_text', 'sentences': len(items), 'rows': rows, **machine()}
  if out:
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + '\n')
  return result


def spaced(words) -> tuple[str, list[tuple[int, int]]]:
  """Words with a blank between them, and the first character and end of each."""
  return _put_together(words, [True] * len(words))


def plain_text(words) -> tuple[str, list[tuple[int, int]]]:
  """Words as one would print them, and the first character and end of each."""
  blank, quoted = [], False
  for before, word in zip(['', *words], words, strict=False):
    closes = word == '"' and quoted
    tight = word in list('.,;:?!%)]') or word.lower() in (
      "'s",
      "'re",
      "'ve",
      "'ll",
      "'d",
      "n't",
      "'",
    )
    opened = before in list('([$') or (before == '"' and quoted)
    blank.append(not (tight or closes or opened))
    quoted ^= word == '"'
  return _put_together(words, blank)


def _put_together(words, blank):
  text, places = '', []
  for word, apart in zip(words, blank, strict=True):
    text += ' ' * (apart and bool(text))
    places.append((len(text), len(text) + len(word)))
    text += word
  return text, places
