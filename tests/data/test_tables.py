"""The one reader of tables: formats, headers, delimiters, encodings, rows that cannot be used."""

import gzip
import json

import pytest

from bertjax.data import tables

pa = pytest.importorskip('pyarrow')
from pyarrow import parquet  # noqa: E402

ROWS = [('ham', 'see you, at "noon"'), ('spam', 'win money'), ('ham', 'naïve')]


def read(path, columns=('text', 'label'), **options):
  return [
    row.error or tuple(row.values.values()) for row in tables.read_table(path, columns, **options)
  ]


def write_all(folder):
  """The same rows in every format; returns {path: options}."""
  quoted = ['{},"{}"'.format(label, text.replace('"', '""')) for label, text in ROWS]
  plain = [f'{label}\t{text}' for label, text in ROWS]
  files = {
    'a.csv': ('\r\n'.join(['label,text', *quoted]) + '\r\n', {}),
    'b.csv': ('\n'.join(['label, text', *quoted]), {}),
    'semicolon.csv': ('\n'.join(['label;text', *(q.replace(',"', ';"') for q in quoted)]),
                      {'delimiter': 'semicolon'}),
    'a.tsv': ('\ufeff' + '\n'.join(['label\ttext', *plain]), {}),
    'cr.tsv': ('\r'.join(['label\ttext', *plain]), {}),
    'tab.txt': ('\n\n'.join(['label\ttext', *plain]) + '\n\n', {'delimiter': 'tab'}),
    'pipe.TXT': ('\n'.join(['label|text', *(q.replace(',"', '|"') for q in quoted)]),
                 {'delimiter': '|'}),
    'a.jsonl': ('\n'.join(json.dumps({'label': a, 'text': b, 'x': 1}) for a, b in ROWS), {}),
  }  # fmt: skip
  for name, (text, _) in files.items():
    (folder / name).write_text(text, encoding='utf-8', newline='')
  found = {folder / name: options for name, (_, options) in files.items()}
  table = pa.Table.from_pylist([{'label': a, 'text': b, 'x': 1} for a, b in ROWS])
  parquet.write_table(table, folder / 'a.parquet', row_group_size=2)
  (folder / 'a.csv.GZ').write_bytes(gzip.compress((folder / 'a.csv').read_bytes()))
  (folder / 'latin.csv').write_bytes(files['b.csv'][0].encode('latin-1'))
  (folder / 'wide.tsv').write_bytes(files['a.tsv'][0].lstrip('\ufeff').encode('utf-16'))
  return found | {folder / 'a.parquet': {}, folder / 'a.csv.GZ': {},
                  folder / 'latin.csv': {'encoding': 'latin-1'},
                  folder / 'wide.tsv': {'encoding': 'utf-16'}}  # fmt: skip


def test_every_format_gives_the_same_rows(tmp_path):
  files = write_all(tmp_path)
  assert len(files) == 12
  for path, options in files.items():
    assert read(path, **options) == [(text, label) for label, text in ROWS], path


def test_a_folder_of_parquet_files_and_a_glob_are_one_table(tmp_path):
  for i in (0, 1):
    table = pa.Table.from_pylist([{'text': f'{i}{j}'} for j in range(2)])
    parquet.write_table(table, tmp_path / f'train-0000{i}-of-00002.parquet')
  expected = [('00',), ('01',), ('10',), ('11',)]
  assert read(tmp_path, ['text']) == read(tmp_path / 'train-*.parquet', ['text']) == expected


def test_columns_by_number_need_no_header(tmp_path):
  (tmp_path / 'a.tsv').write_text('ham\tsee you at noon\nspam\twin money now\nham\tok\n')
  rows = list(tables.read_table(tmp_path / 'a.tsv', ['1'], optional=['0']))
  assert rows[0] == (f'{tmp_path}/a.tsv:1', {'1': 'see you at noon', '0': 'ham'}, '')
  assert [row.values['0'] for row in rows] == ['ham', 'spam', 'ham']
  assert read(tmp_path / 'a.tsv', [1, 0]) == read(tmp_path / 'a.tsv', ['1', '0'])
  (tmp_path / 'named.csv').write_text('0,1\nham,ok\n')  # as pandas writes columns without names
  assert read(tmp_path / 'named.csv', ['1', '0']) == [('ok', 'ham')]
  (tmp_path / 'years.csv').write_text('2019,2020\nham,ok\n')
  assert read(tmp_path / 'years.csv', ['2020']) == [('ok',)]
  (tmp_path / 'ids.csv').write_text('1,ok\n0,no\n')  # a cell that looks like the column's number
  assert read(tmp_path / 'ids.csv', ['1']) == [('ok',), ('no',)]
  with pytest.raises(ValueError, match=r"no column '2'; it has \['0', '1'\] \(counted from 0\)"):
    read(tmp_path / 'ids.csv', ['2'])


def test_rows_that_cannot_be_used_say_why_and_the_others_are_read(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n\n{"b": 1}\n[1]\n{"text"\n{"text": null}\n')
  found = list(tables.read_table(tmp_path / 'a.jsonl', ['text']))
  assert [row.where.rpartition(':')[2] for row in found] == ['1', '3', '4', '5', '6']
  assert [row.error.partition(' (')[0] for row in found] == [
    '', "no column 'text'; it has ['b']", "a line must hold a JSON object, got '[1]'", 'not JSON',
    '',
  ]  # fmt: skip
  assert tables.text_problem(found[4].values, ['text']) == "column 'text' holds no text but null"
  (tmp_path / 'a.csv').write_text('id,text\n1,one\n2\n\n3,a,b\n4,"four\n4"\n5,five\n')
  found = list(tables.read_table(tmp_path / 'a.csv', ['text']))
  assert [row.where.rpartition(':')[2] for row in found] == ['2', '3', '5', '6', '8']
  assert [row.error or row.values['text'] for row in found] == [
    'one', '1 fields, the first row has 2', '3 fields, the first row has 2', 'four\n4', 'five'
  ]  # fmt: skip


@pytest.mark.parametrize('name', ['long.csv', 'long.tsv', 'long.jsonl'])
def test_cells_of_any_length_are_read(tmp_path, name):
  text = 'word ' * 30_000  # csv's own limit is 131,072 characters
  line = json.dumps({'text': text, 'label': 'x'}) + '\n'
  blank = ',' if name == 'long.csv' else '\t'
  (tmp_path / name).write_text(
    line if name == 'long.jsonl' else f'text{blank}label\n{text}{blank}x\n'
  )
  assert read(tmp_path / name) == [(text, 'x')]


def test_a_blank_line_is_an_empty_cell_where_there_is_but_one_column(tmp_path):
  for name in ('a.csv', 'a.tsv', 'a.txt'):
    (tmp_path / name).write_text('text\nx\n\ny\n')
    expected = [('x',), ('',), ('y',)]
    assert read(tmp_path / name, ['text']) == [('text',)] * (name == 'a.txt') + expected
  (tmp_path / 'b.csv').write_text('text,more\nx,1\n\ny,2\n')
  assert read(tmp_path / 'b.csv', ['text']) == [('x',), ('y',)]


@pytest.mark.parametrize(
  'name, data, message',
  [
    ('none.tsv', None, 'none.tsv cannot be read: there is no such file'),
    ('t.xlsx', b'a', r"t.xlsx: tables end in .csv, .tsv, .txt, .jsonl, .parquet, got '.xlsx'"),
    ('t', b'a', r"t: tables end in .*, got ''"),
    ('t.txt', b'a b', r"a .txt file has one text a line; for \['a', 'b'\] name the delimiter"),
    ('t.csv', b'', 't.csv is empty'),
    ('t.csv', b'a,c\n', r"t.csv has no column 'b'; it has \['a', 'c'\]; columns of a file without"),
    ('t.csv', b'a,b,a\n1,2,3\n', r"t.csv has the column 'a' twice"),
    ('t.csv', b'a,b\n1,2\n"open', r't.csv:3: no CSV \(unexpected end of data\)'),
    ('t.tsv', b'a\tb\n\xff\tc\n', r't.tsv:2: not UTF-8 text.*Name the encoding of the file'),
    ('t.jsonl', '{"a": 1}\n{"a": "这是的"}'.encode('gb18030'), r'looks like gb18030.*g=gb18030\)'),
    ('t.parquet', b'none', 't.parquet is not a complete Parquet file'),
    ('t.csv.gz', b'a,b\n', 't.csv.gz is not a complete .gz file'),
  ],
)  # fmt: skip
def test_unreadable_files_are_named(tmp_path, name, data, message):
  if data is not None:
    (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=message):
    list(tables.read_table(tmp_path / name, ['a', 'b']))


@pytest.mark.parametrize('encoding', ['utf_8', 'cp1252', 'shift_jis', 'utf-16'])
def test_invalid_bytes_are_refused_by_any_name_of_an_encoding(tmp_path, encoding):
  data = 'a\nx'.encode(encoding) + b'\x81\xff\x81'
  (tmp_path / 't.csv').write_bytes(data)
  with pytest.raises(
    ValueError, match=rf't.csv:2: not {encoding.upper()} text\. Name the encoding'
  ):
    read(tmp_path / 't.csv', ['a'], encoding=encoding)


def test_a_text_in_parquet_that_is_not_utf_8_is_an_error_of_its_row(tmp_path):
  column = pa.array([b'caf\xe9', None, b''])
  text = pa.Array.from_buffers(pa.string(), 3, column.buffers())
  parquet.write_table(pa.table({'a': text}), tmp_path / 't.parquet')
  assert read(tmp_path / 't.parquet', ['a']) == [
    "column 'a' is not UTF-8 text", (None,), ('',)
  ]  # fmt: skip


def test_mistakes_in_options_are_named(tmp_path):
  (tmp_path / 't.csv').write_text('a\n1\n')
  with pytest.raises(ValueError, match=r"must be a character or one of \('tab', .*, got 'comma2'"):
    read(tmp_path / 't.csv', ['a'], delimiter='comma2')
  with pytest.raises(ValueError, match='no text encoding'):
    read(tmp_path / 't.csv', ['a'], encoding='utf-80')
  parquet.write_table(pa.table({'x': [1]}), tmp_path / 't.parquet')
  with pytest.raises(ValueError, match=r"t.parquet has no column 'a'; it has \['x'\]"):
    read(tmp_path / 't.parquet', ['a'])
