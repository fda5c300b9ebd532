"""The tf.data side of the input; the batches are those of `data.loader`, made in NumPy."""

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

# TensorFlow only feeds; it must not take the accelerators' memory.
for _kind in ('GPU', 'TPU'):
  tf.config.set_visible_devices([], _kind)


def tfdata_batches(
  make: Callable[[int], dict[str, np.ndarray]], start: int, stop: int | None
) -> Iterator[dict[str, np.ndarray]]:
  """Maps `make` over the steps in parallel, in order, with prefetching.

  The masks are drawn in NumPy by `tf.numpy_function`, so that there is one implementation, with
  and without TensorFlow, whose numbers no TensorFlow version can change.
  """
  example = make(start)  # names and dtypes; the shapes of batches may change from step to step
  names = list(example)

  def arrays(step):
    batch = make(int(step))
    return [batch[name] for name in names]

  def one(step):
    outputs = tf.numpy_function(arrays, [step], [example[name].dtype for name in names])
    return dict(zip(names, outputs, strict=True))

  steps = tf.data.Dataset.range(start, np.iinfo(np.int64).max if stop is None else stop)
  dataset = steps.map(one, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  yield from dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
