"""The conditional random field against all sequences written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bertjax.model import crf


def make(rng, rows, length, tags):
  """(parameters, logits, mask); every third position or so is a hole."""
  scores = {name: rng.normal(size=shape) for name, shape in crf.shapes(tags).items()}
  scores = {name: jnp.float32(value) for name, value in scores.items()}
  logits = jnp.float32(rng.normal(size=(rows, length, tags)))
  return scores, logits, jnp.asarray(rng.random((rows, length)) < 0.7)


def all_paths(scores, logits, mask):
  """{tags of one row's chain: score}, written out."""
  places = np.flatnonzero(mask)
  found = {}
  for path in itertools.product(range(logits.shape[-1]), repeat=len(places)):
    score = sum(logits[place, tag] for place, tag in zip(places, path, strict=True))
    score += sum(scores['transitions'][a, b] for a, b in itertools.pairwise(path))
    found[path] = score + scores['start'][path[0]] + scores['end'][path[-1]]
  return found


def rows_of(scores, logits, mask):
  """(row, its paths) where there is a chain."""
  scores, logits = jax.tree.map(np.float64, (scores, logits))
  return [(i, all_paths(scores, logits[i], mask[i])) for i in np.flatnonzero(mask.any(1))]


@pytest.mark.e2e
@pytest.mark.parametrize('length', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('tags', [3, 4])
def test_partition_score_and_best_path_are_those_of_all_sequences(length, tags):
  case = make(np.random.default_rng(10 * length + tags), 8, length, tags)
  scores, logits, mask = case
  partition, best = jax.jit(crf.log_partition)(*case), np.asarray(jax.jit(crf.viterbi)(*case))
  assert ((best >= 0) == mask).all() and best.dtype == np.int32
  chains = rows_of(*case)
  assert chains
  for row, paths in chains:
    values = np.array(list(paths.values()))
    assert float(partition[row]) == pytest.approx(np.logaddexp.reduce(values), abs=1e-5)
    assert tuple(best[row][mask[row]]) == max(paths, key=paths.get)
    path = list(paths)[len(paths) // 3]
    labels = np.full((1, length), -1)
    labels[0, mask[row]] = path
    score = jax.jit(crf.sequence_score)(scores, logits[row : row + 1], labels)
    assert float(score[0]) == pytest.approx(paths[path], abs=1e-5)


def test_gradients_are_the_numerical_ones():
  scores, logits, mask = make(np.random.default_rng(0), 3, 5, 3)
  labels = jnp.where(mask, np.random.default_rng(1).integers(0, 3, mask.shape), -1)
  check_grads(
    jax.jit(lambda s, x: crf.negative_log_likelihood(s, x, labels).sum()), (scores, logits), 1,
    modes=['rev'], atol=1e-2, rtol=1e-2,
  )  # fmt: skip


def test_the_gradient_is_marginals_that_sum_to_one_and_agree_with_all_sequences():
  case = make(np.random.default_rng(2), 6, 5, 4)
  scores, logits, mask = case
  marginals = jax.jit(jax.grad(lambda x: crf.log_partition(scores, x, mask).sum()))(logits)
  np.testing.assert_allclose(marginals.sum(-1), mask, atol=1e-5)
  for row, paths in rows_of(*case):
    values = np.array(list(paths.values()))
    weights = np.exp(values - np.logaddexp.reduce(values))
    first = np.zeros(4)
    np.add.at(first, [path[0] for path in paths], weights)
    np.testing.assert_allclose(marginals[row, np.argmax(mask[row])], first, atol=1e-5)


def test_rows_without_a_tagged_token_cost_nothing_and_are_no_nan():
  scores, logits, _ = make(np.random.default_rng(3), 2, 4, 3)
  labels = jnp.array([[-1, -1, -1, -1], [-1, 2, -1, -1]])
  loss, grads = jax.jit(
    jax.value_and_grad(lambda s, x: crf.negative_log_likelihood(s, x, labels)[0], argnums=(0, 1))
  )(scores, logits)
  assert float(loss) == 0
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))
  assert (crf.viterbi(scores, logits, labels >= 0)[0] == -1).all()
  grads = jax.jit(jax.grad(lambda s: crf.negative_log_likelihood(s, logits, labels).sum()))(scores)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_holes_and_padding_change_nothing():
  scores, logits, mask = make(np.random.default_rng(4), 1, 12, 3)
  places = np.flatnonzero(mask[0])
  dense = logits[:, places]
  whole = jnp.ones((1, len(places)), bool)
  np.testing.assert_allclose(
    crf.log_partition(scores, logits, mask), crf.log_partition(scores, dense, whole), rtol=1e-6
  )
  np.testing.assert_array_equal(
    crf.viterbi(scores, logits, mask)[0][places], crf.viterbi(scores, dense, whole)[0]
  )


def test_vmap_over_models_equals_separate_calls():
  cases = [make(np.random.default_rng(seed), 2, 5, 3) for seed in (5, 6)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
  for function in (crf.log_partition, crf.viterbi):
    together = jax.vmap(function)(*stacked)
    np.testing.assert_allclose(together, [function(*case) for case in cases], rtol=1e-6)


def test_bfloat16_logits_and_long_rows_stay_in_float32():
  scores, logits, _ = make(np.random.default_rng(7), 2, 512, 9)
  half = (30 * logits).astype(jnp.bfloat16)
  labels = crf.viterbi(scores, half, jnp.ones((2, 512), bool))
  loss = crf.negative_log_likelihood(scores, half, labels)
  assert loss.dtype == jnp.float32 and np.isfinite(loss).all() and (loss >= 0).all()
  score = crf.sequence_score(scores, half, labels)
  exact = np.take_along_axis(np.float64(half), np.asarray(labels)[..., None], -1).sum((1, 2))
  exact += [np.float64(scores['transitions'])[row[:-1], row[1:]].sum() for row in labels]
  exact += np.float64(scores['start'])[labels[:, 0]] + np.float64(scores['end'])[labels[:, -1]]
  np.testing.assert_allclose(score, exact, rtol=1e-5)


def test_scores_of_zero_are_one_softmax_for_each_token():
  _, logits, mask = make(np.random.default_rng(8), 3, 6, 4)
  scores = {name: jnp.zeros(shape) for name, shape in crf.shapes(4).items()}
  labels = jnp.where(mask, 1, -1)
  tokens = -jax.nn.log_softmax(logits)[..., 1] * mask
  np.testing.assert_allclose(
    crf.negative_log_likelihood(scores, logits, labels), tokens.sum(1), atol=1e-5
  )
  np.testing.assert_array_equal(
    crf.viterbi(scores, logits, mask), np.where(mask, logits.argmax(-1), -1)
  )
