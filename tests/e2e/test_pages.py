"""The pages in a browser, Chromium: the demo of the service, an explanation."""

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from bertjax.inference import inspect
from bertjax.inference.predictor import Predictor
from bertjax.inference.search import Index
from bertjax.tasks import TASKS, report
from bertjax.tasks.task import Example
from tests.models import model

sync_api = pytest.importorskip('playwright.sync_api')
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no Chromium here')


@pytest.fixture(scope='module')
def browser():
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
    yield browser
    browser.close()


@pytest.fixture
def page(browser):
  """A page that must not report an error and must not ask another host."""
  page, problems = browser.new_page(), []
  page.set_default_timeout(120_000)  # a first answer compiles
  page.on('pageerror', lambda error: problems.append(str(error)))
  page.on(
    'requestfailed',
    lambda request: request.failure == 'net::ERR_ABORTED' or problems.append(request.url),
  )  # an answer that nobody waits for is given up
  near = ('http://127.0.0.1', 'file:', 'about:')
  page.on('request', lambda request: request.url.startswith(near) or problems.append(request.url))
  yield page
  page.close()
  assert problems == []


@pytest.fixture(scope='module')
def predictor(vocab):
  parts = model(vocab, 'mlm', 'nsp', 'classification', 'tagging', 'span', labels=3)
  return Predictor(*parts, labels=['x', 'y', 'z'], batch_size=4)


@pytest.fixture(scope='module')
def url(predictor):
  pytest.importorskip('fastapi')
  from tests.test_serve import serving

  index = Index(
    ['a class', 'the name', 'or None'], predictor.embed(['a class', 'the name', 'or None'])
  )
  with serving(predictor, index, timeout=120) as client:
    yield str(client.base_url)


def ask(page, do, *texts):
  """Chooses a task, writes the texts, presses Ask; returns what is shown."""
  page.click(f'nav button[value={do}]')
  for area, text in zip(page.query_selector_all('textarea'), texts, strict=True):
    area.fill(text)
  page.click('#go')
  page.wait_for_function("document.querySelector('#result').textContent != '…'")
  return page.inner_text('#result')


def bars(page):
  """(name, number) of each bar."""
  names, numbers = (page.locator(f'.bar {part}').all_inner_texts() for part in ('span', 'b'))
  return dict(zip(names, map(float, numbers), strict=True))


def test_the_demo_shows_the_predictors_answers(page, url, predictor):
  page.goto(url)
  page.wait_for_selector('nav button')
  assert page.inner_text('#model') == 'tiny'
  assert not page.query_selector('nav button[value=choose]')  # it has no such head

  ask(page, 'fill_mask', 'the [MASK] of a class')
  expected = predictor.fill_mask('the [MASK] of a class')[0]
  assert bars(page) == pytest.approx({f.token: f.probability for f in expected}, abs=2e-3)

  ask(page, 'classify', 'the name', '')
  expected = predictor.classify('the name').scores
  assert bars(page) == pytest.approx(expected, abs=2e-3)

  text = 'the name of a 😀 class'  # JavaScript counts an emoji as two
  shown = ask(page, 'tag', text)
  spans = predictor.tag(text)
  assert page.locator('mark sub').all_inner_texts() == [span.label for span in spans]
  for span in spans:
    assert f'{text[span.start : span.end]}{span.label}' in shown.replace('\n', '')

  ask(page, 'answer', 'the name?', 'the name of a class')
  assert predictor.answer('the name?', 'the name of a class').text in bars(page)

  ask(page, 'explain', 'the name', '')
  inside = page.frame_locator('iframe')
  inside.locator('canvas').first.wait_for()
  assert inside.locator('canvas').count() == 4 * 2  # layers, heads


def test_the_service_shows_embeddings_and_neighbours(page, url, predictor):
  page.goto(url)
  texts = ['the name', 'of a class']
  shown = ask(page, 'embed', '\n'.join(texts))
  one, other = predictor.embed(texts)
  assert bars(page) == pytest.approx(dict.fromkeys(texts, float(one @ other)), abs=2e-3)
  assert page.locator('#result canvas').count() == 2
  assert f'{len(one)} numbers: {one[0]:.3f}, ' in shown and len(shown) < 300
  ask(page, 'nearest', 'the name')
  assert next(iter(bars(page).items())) == ('the name', pytest.approx(1, abs=2e-3))


def test_the_service_of_a_reranker_ranks_documents(page, vocab):
  from tests.test_serve import serving

  reranker = Predictor(*model(vocab, 'classification', labels=1), batch_size=4)
  texts = ['the name of a class', 'or None', 'the value']
  with serving(reranker, timeout=120) as client:
    page.goto(str(client.base_url))
    ask(page, 'rerank', 'the name', '\n'.join(texts))
    expected = {hit.text: hit.score for hit in reranker.rerank('the name', texts)}
    assert bars(page) == pytest.approx(expected, abs=2e-3) and list(bars(page)) == list(expected)
    assert '/rerank' in page.inner_text('#curl')


def test_the_services_page_has_examples_latency_and_a_curl_line(page, url):
  page.goto(url)
  page.click('nav button[value=classify]')
  page.locator('#examples button').nth(1).click()
  assert page.input_value('textarea') == 'I waited an hour and the food was cold.'
  ask(page, 'classify', "it's the name", '')
  assert re.fullmatch(r'answered in \d+ ms', page.inner_text('#took'))
  command = page.inner_text('#curl')
  page.click('#copy')
  assert page.evaluate('getSelection().toString()') == command
  said = subprocess.run(['bash', '-c', command], capture_output=True, check=True, text=True).stdout
  [result] = json.loads(said)['results']
  assert bars(page) == pytest.approx(result['scores'], abs=2e-3)


@pytest.mark.parametrize('width', [390, 1280])
def test_the_service_fits_the_screen(browser, url, width):
  page = browser.new_page(viewport={'width': width, 'height': 800})
  page.goto(url)
  for do in ('classify', 'answer', 'embed', 'explain'):
    page.click(f'nav button[value={do}]')
    assert page.evaluate('document.documentElement.scrollWidth') <= width
  page.close()


def test_a_late_answer_is_not_shown_under_another_tab(page, url):
  held = []

  def hold(route):
    held.append(route) if '"classify"' in route.request.post_data else route.continue_()

  def late(route, name):
    with contextlib.suppress(sync_api.Error):  # given up
      route.fulfill(json={'results': [{'labels': [name], 'scores': {name: 1.0}}]})

  page.goto(url)
  page.wait_for_selector('nav button')
  page.route('**/predict', hold)
  page.click('nav button[value=classify]')
  page.click('#go')
  page.wait_for_timeout(200)
  page.click('nav button[value=fill_mask]')
  late(held.pop(), 'tardy')
  page.wait_for_timeout(300)
  assert page.locator('#result').is_hidden() and 'tardy' not in page.content()
  ask(page, 'fill_mask', 'the [MASK]')
  assert 'tardy' not in page.content() and '[MASK] 1' in page.inner_text('#result')

  page.click('nav button[value=classify]')
  for _ in range(2):  # asked twice: the second answer stays, though the first comes after it
    page.click('#go')
    page.wait_for_timeout(200)
  late(held[1], 'second')
  page.wait_for_selector('.bar')
  late(held[0], 'first')
  page.wait_for_timeout(300)
  assert bars(page) == {'second': 1.0}


def test_the_demo_shows_what_is_wrong_with_a_text(page, url):
  page.goto(f'{url}#classify')
  page.wait_for_selector('.bar')  # a link starts a request
  assert 'has no [MASK]' in ask(page, 'fill_mask', 'no mask here')
  assert page.get_attribute('#result', 'class') == 'error'


def test_an_explanation_can_be_looked_through(page, predictor, tmp_path):
  found = inspect.explain(predictor, 'the [MASK] of a class')
  file = tmp_path / 'page.html'
  file.write_text(inspect.to_html(found, 'tiny'))
  page.goto(file.as_uri())
  size = len(found.tokens)
  assert page.inner_text('#title') == f'tiny · {size} tokens, 4 layers of 2 heads'
  cells = page.locator('#lens tbody tr').last.locator('td').all_inner_texts()
  assert cells == [best[0][0] for best in found.layers[-1]]

  boxes = page.locator('.output').all()
  assert len(boxes) == len(found.attributions) > 1
  for box, attribution in zip(boxes, found.attributions, strict=True):
    told, change = box.inner_text(), attribution.values.sum()
    assert attribution.predicted != ('not predicted' in told)
    assert attribution.name in told and f'probability {attribution.probability:#.3g}' in told
    assert f'The words add {change:+.2f}'.replace('-', '−') in told
    words = [attribution.values[a:b].sum() for _, a, b in found.words]
    shown = [float(n.replace('−', '-')) if n else 0 for n in box.locator('small').all_inner_texts()]
    assert shown == pytest.approx(words, abs=0.0051)
    assert f'±{max(map(abs, words)):.2f}' in told  # the scale of the colours
    strongest = box.locator('.words button').nth(int(np.abs(words).argmax()))
    assert '0.75)' in strongest.get_attribute('style')  # full colour

  lines = page.locator('svg line')
  before = lines.evaluate_all('all => all.map(line => line.getAttribute("stroke"))')
  page.locator('canvas').nth(5).click()
  assert 'layer 3, head 2' in page.locator('svg text').first.text_content()
  assert lines.evaluate_all('all => all.map(line => line.getAttribute("stroke"))') != before
  page.locator('svg text').nth(1).dispatch_event(
    'mouseenter'
  )  # the first token on the left: only its lines
  assert lines.count() == ((found.attention[2, 1, 0] * 255).round() > 5).sum()

  page.locator('#rollout button').nth(2).click()
  title = page.locator('#rollout button').nth(1).get_attribute('title')
  assert float(title) == pytest.approx(found.rollout[2][1], abs=1e-4)


def test_an_explanation_names_what_is_predicted_and_filters_by_sentence(page, predictor, tmp_path):
  found = inspect.explain(predictor, 'the name', 'of a class')
  file = tmp_path / 'page.html'
  file.write_text(inspect.to_html(found, 'tiny'))
  page.goto(file.as_uri())
  scores = predictor.classify('the name', 'of a class').scores
  best = max(scores, key=scores.get)
  assert page.inner_text('#predicted').startswith(
    f'Predicted: {best} (probability {scores[best]:#.3g})'
  )
  assert [a.name for a in found.attributions if a.name in scores and a.predicted] == [best]
  types = np.array(found.types)
  assert types.tolist() == [0] * 4 + [1] * 4
  strong = (found.attention[0, 0] * 255).round() > 5
  page.click('text="A → B"')
  assert page.locator('svg line').count() == strong[:4, 4:].sum()
  page.click('#filter button:has-text("all")')
  assert page.locator('svg line').count() == strong.sum()


def test_an_explanation_can_be_read_by_keyboard_and_touch(browser, predictor, tmp_path):
  found = inspect.explain(predictor, 'the [MASK] of a class')
  file = tmp_path / 'page.html'
  file.write_text(inspect.to_html(found, 'tiny'))
  page = browser.new_page(has_touch=True, viewport={'width': 390, 'height': 800})
  page.goto(file.as_uri())
  page.locator('canvas').first.focus()
  page.keyboard.press('ArrowDown')
  page.keyboard.press('ArrowRight')
  assert page.locator('svg text').first.text_content() == 'layer 2, head 2'
  strong = (found.attention[1, 1] * 255).round() > 5
  page.locator('svg text').nth(3).tap()
  assert page.locator('svg line').count() == strong[1].sum()
  page.locator('svg text').nth(3).tap()
  assert page.locator('svg line').count() == strong.sum()
  page.locator('.lens td').nth(1).tap()
  token, probability = found.layers[0][1][1]
  assert f'embeddings, {found.tokens[1]}: ' in page.inner_text('#runners')
  assert f'{token} {probability:.3f}' in page.inner_text('#runners')
  page.locator('.words button').nth(1).focus()
  assert page.locator('.output .soft').nth(1).inner_text().startswith(f'{found.tokens[1]} ')
  page.close()


@pytest.mark.parametrize('width', [375, 1280])
def test_an_explanation_fits_the_screen(browser, predictor, tmp_path, width):
  found = inspect.explain(predictor, 'the name of a class ' * 4, 'or None')
  wide = np.repeat(found.attention, 8, 1)  # 16 heads
  file = tmp_path / 'page.html'
  file.write_text(inspect.to_html(dataclasses.replace(found, attention=wide), 'tiny'))
  page = browser.new_page(viewport={'width': width, 'height': 800})
  page.goto(file.as_uri())
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  page.close()


@pytest.mark.parametrize('width', [390, 1280])
def test_a_report_fits_the_screen(browser, width):
  table = TASKS['table'](files={}, text='text', labels=('ham', 'spam'))
  items = [Example(str(i), ('word ' * 90, 'x' * 90), i % 2) for i in range(30)]
  logits = np.random.default_rng(0).normal(size=(30, 2))
  scores = table.score(items, logits.argmax(1))
  rows = [{'kind': 'eval', 'step': s, 'loss': 1.0, 'accuracy': 0.5} for s in (1, 2)]
  facts = {'command': 'bertjax ' + 'a' * 200}
  content = report.page(table, items, logits.argmax(1), logits, scores, rows, facts, {})
  page = browser.new_page(viewport={'width': width, 'height': 800})
  page.set_content(content)
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  for box in page.locator('svg').all():
    assert box.bounding_box()['width'] <= width
  page.close()


def test_labels_in_any_script_are_text_in_the_figures_of_a_report(page, recwarn):
  names = ['好评', '差评', 'нейтрально', 'محايد']
  svg = report._confusion(np.diag([5, 3, 2, 1]), names)
  assert not [w for w in recwarn if 'Glyph' in str(w.message)]  # matplotlib's font lacks them
  page.set_content(f'<!doctype html><meta charset="utf-8">{svg}')
  texts = page.locator('svg text')
  shown = texts.all_text_contents()
  assert [shown.count(name) for name in names] == [2] * 4
  for place in [i for i, text in enumerate(shown) if text in names]:
    box = texts.nth(place).bounding_box()
    assert box['width'] > 10 and box['height'] > 5
