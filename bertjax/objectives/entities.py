"""Typed spans of tag sequences."""

from collections.abc import Sequence

_IOBES = {'L': 'E', 'U': 'S', 'M': 'I'}


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
  """Typed spans (type, first, last + 1) of tags in IOB1, IOB2 or IOBES, as conlleval reads them.

  A span ends before O, B and S, after E and S, and where the type changes. The tags of BILOU (L, U)
  and BMES (M) are read as those of IOBES.
  """
  found, start, before = [], 0, ('O', '')
  for place, tag in enumerate([*tags, 'O']):
    prefix, _, name = tag.partition('-')
    prefix = _IOBES.get(prefix, prefix)
    breaks = prefix in 'OBS' or before[0] in 'OES' or name != before[1]
    if breaks and before[0] != 'O':
      found.append((before[1], start, place))
    if breaks:
      start = place
    before = (prefix, name)
  return found
