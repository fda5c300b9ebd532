"""Sentences in any language: nothing is lost, in linear time."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertjax.data import sentences
from bertjax.data import text as text_lib

HARD = ['a', 'Mr. A. ', '."', 'so it is, ', 'It is. ', '他。', '。"，', '“他！', 'ก ', '. « ']


@pytest.mark.parametrize('piece', HARD)
def test_splitting_one_long_line_takes_linear_time(piece):
  def seconds(count):
    text, start = piece * (count // len(piece)), time.process_time()
    sentences.split_prose(text)
    return time.process_time() - start

  assert seconds(1_000_000) < 40 * max(seconds(100_000), 0.01)  # 100 times when quadratic


@pytest.mark.parametrize(
  'marked',  # '|' stands where one sentence ends
  [
    'Mr. Smith met Dr. Jones.| They sat, etc. Quietly.',
    'By J. R. R. Tolkien.| He wrote.| It was I.| He knew.',
    '"Stop!" he said.| "Why?"| She\nleft.| (He left.)| Then it rained.',
    'He waited…| Then he left...| Really?!| It was 1815.| 1816 followed.| Été came.',
    'It costs 3.50 or... less, e.g. nothing. now',
    'A Title\n\n|and a text\nwrapped\n \t\n|and another',
    'See No. 7.| "No."| She left.| No.| She stayed, as No. 3 did.| Yes "etc."| Oh.',
  ],
)
def test_prose_is_split_at_the_ends_of_sentences(marked):
  expected = [' '.join(sentence.split()) for sentence in marked.split('|')]
  assert sentences.split_prose(marked.replace('|', '')) == expected


def test_wikitext_sentences_end_at_separate_marks():
  text = ' = Dogs = \n The U.S. dog , at 4 @.@ 5 kg , barked . It ran ! \n Why ? \n'
  expected = ['= Dogs =', 'The U.S. dog , at 4 @.@ 5 kg , barked .', 'It ran !', 'Why ?']
  assert text_lib.split_document(text, 'wikitext') == expected


LANGUAGES = {  # '|' marks where one sentence ends
  'lower-cased English': 'he came home.| it was late, e.g. after ten... maybe.| "stop!" he said.| '
  'then he left!| why?| see no. 7 and fig. 3 etc. and so on.| mr. smith sat.',
  'lower-cased Russian': 'он пришёл домой.| было поздно.| кто там?| никто не знает.',
  'Russian': 'Он пришёл домой.| А. С. Пушкин родился в Москве.| «Да!» — сказал он.| '
  'Она жила на ул. Гоголя.| Он сказал: «Нет».| Потом ушёл…| Это я.| Он, т. е. друг, ушёл.',
  'Greek': 'Πού πας;| Πάω σπίτι.| Είναι καλό· πολύ καλό!| «Ναι.»| Είπε ο κ. Παπαδόπουλος.',
  'Armenian': 'Բարեւ ձեզ։| Ինչպե՞ս եք:| Լավ եմ։',
  'Georgian': 'ის სახლში წავიდა.| მერე დაბრუნდა.| კარგია.',
  'French': 'Oui.| « Bonjour ! » dit-il.| « Viens. »| Elle vint.| Œuvre…| Où ?| M. Dupont arriva.',
  'Spanish': '¿Qué hora es?| ¡Hola!| ¿Vienes?| No lo sé.| El Sr. López llegó.',
  'German': 'Er sagte: „Ja.“| Dann ging er.| »Nein.«| »Doch!«| Er lief, z.B. heute.',
  'Arabic': 'ذهب الولد إلى المدرسة.| هل أنت بخير؟| نعم، أنا بخير!| قال د. أحمد إنه سيأتي.| ثم عاد.',
  'Urdu': 'یہ ایک کتاب ہے۔| آپ کیسے ہیں؟| میں ٹھیک ہوں۔|شکریہ۔',
  'Hebrew': 'הוא הלך הביתה.| היא נשארה.| מה שלומך?| טוב!',
  'Hindi': 'राम घर गया।| क्या तुम आओगे?| हाँ!| "मैं आऊँगा।"| उसने कहा।| वह 3.5 किलो लाया।।',
  'Amharic': 'ሰላም ለዓለም።| እንዴት ነህ?| ደህና ነኝ፡፡| እግዚአብሔር ይመስገን።',
  'Burmese': 'သူသွားသည်။| သူမလာသည်။',
  'Khmer': 'ខ្ញុំទៅផ្ទះ។| គាត់មកវិញ។',
  'Korean': '안녕하세요.| 저는 학생입니다.| 정말요?| 네.| 알겠습니다!| "그래요."| 값은 3.5입니다.',
  'Chinese': '今天天气很好。|他说：“我们去公园吧！”|她没有回答……|她问：“真的吗？”，他点点头。|'
  '价格是3.5元；|数量为１２．５吨！|真好！！|“好。”|他说："你好。"|'
  '她说："再见!"|然后走了。|OK.| 好的。|他走了（很远）。',
  'Japanese': '「はい。」と彼は言った。|本当ですか？|ええ、そうです！|「いいえ」\n|'
  '「そうか」\n|彼は笑った（笑。）。|'
  '３．１４は円周率です。',
  'Thai': 'สวัสดีครับ ผมชื่อสมชาย ผมเป็นนักเรียนอยู่ที่กรุงเทพมหานคร|'
  ' วันนี้อากาศดีมาก เราจะไปเที่ยวทะเลกันในวันหยุดสุดสัปดาห์นี้|'
  ' เมื่อ พ.ศ. 2560 มีคนต่าง ๆ มากมาย',
}  # fmt: skip


@pytest.mark.parametrize('language', LANGUAGES)
def test_sentences_are_found_in_any_language(language):
  marked = LANGUAGES[language]
  expected = [' '.join(sentence.split()) for sentence in marked.split('|')]
  assert sentences.split_prose(marked.replace('|', '')) == expected


PIECES = ['a', 'Mr', 'X', '.', '!', '?', '…', '"', ')', ' ', '\n', '\n\n', '\t', '\u2028', '=',
          '他', '。', '”', '「', '」', 'と', 'ก', '।', 'Ω', ';', '«']  # fmt: skip


@given(
  st.lists(st.sampled_from(PIECES)).map(''.join) | st.text(),
  st.sampled_from(['prose', 'google', 'wikitext']),
)
@settings(deadline=None, max_examples=150)
def test_splitting_loses_nothing_but_white_space(text, format):
  found = text_lib.split_document(text, format)
  assert ''.join(''.join(found).split()) == ''.join(text.split())
  assert all(sentence.strip() for sentence in found)


def test_splitting_takes_linear_time_on_a_long_run_of_dots():
  start = time.process_time()
  assert len(sentences.split_prose('Contents ' + '.' * 100_000 + '7')) == 1
  assert time.process_time() - start < 10  # 100 s when quadratic


@pytest.mark.data
def test_english_prose_keeps_its_sentences(data_dir):
  book = next(data_dir.glob('books/Bram_Stoker_-_Dracula.md'))
  text = book.read_text(encoding='utf-8')
  found = sentences.split_prose(text)
  assert (
    len(found) == 8939
  )  # the English-only rule found 8,936; the others begin with a stray quote
