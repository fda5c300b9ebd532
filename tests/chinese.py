"""Chinese from a small grammar: documents, reviews, tagged sentences, questions with answers."""

import random
import re

NAMES = {
  'PER': ('王小明', '李华', '张伟', '刘洋', '陈静', '赵丽', '孙宁', '周强', '吴敏', '欧阳雪'),
  'LOC': ('北京', '上海', '广州', '成都', '西安', '杭州', '南京', '昆明', '哈尔滨', '乌鲁木齐'),
  'ORG': (
    '新华书店',
    '第一中学',
    '人民医院',
    '东方公司',
    '科学院',
    '市图书馆',
    '长江大学',
    '铁路局',
  ),
}
SLOTS = NAMES | {
  'TIME': ('去年', '今年春天', '上个星期', '昨天下午', '十月', '周末', '三年前'),
  'DAY': ('早上', '中午', '傍晚', '半夜', '第二天', '刚才'),
  'DISH': ('牛肉面', '小笼包', '火锅', '烤鸭', '豆腐', '米粉', '饺子'),
  'TASTE': ('又香又辣', '很清淡', '有点咸', '非常好吃', '热乎乎的'),
  'THING': ('望远镜', '机器人', '新手机', '显微镜', '电动汽车', '气象卫星'),
  'SPORT': ('足球', '篮球', '乒乓球', '游泳', '长跑', '羽毛球'),
  'SKY': ('下起了大雨', '刮起了北风', '出了太阳', '飘着小雪', '起了浓雾'),
  'BOOK': ('《红楼梦》', '《西游记》', '《水浒传》', '《三国演义》'),
  'N': ('两', '三', '五', '十', '二十', '一百'),
}
TOPICS = {
  '旅行': (
    '{TIME}，{PER}坐火车去了{LOC}。',
    '从{LOC}到{LOC}要走{N}个小时。',
    '车窗外是一片金黄的麦田！',
    '{PER}问：“我们什么时候到{LOC}？”',
    '导游笑着说：“别着急，{DAY}就到了。”',
    '旅馆就在湖边，推开窗户能看见远山。',
    '{LOC}的老街有几百年的历史。',
    '{PER}拍了{N}张照片，寄给了在{LOC}的朋友。',
  ),
  '饮食': (
    '{LOC}的{DISH}全国有名。',
    '这家店的{DISH}{TASTE}。',
    '{PER}一口气吃了{N}碗{DISH}！',
    '你尝过{LOC}的{DISH}吗？',
    '师傅说：“做{DISH}，火候最要紧。”',
    '{DAY}，厨房里飘出{DISH}的香味。',
    '{PER}觉得{DISH}{TASTE}，又要了一份。',
    '面要揉透，汤要慢慢地熬。',
  ),
  '科技': (
    '{TIME}，{ORG}展出了{N}台{THING}。',
    '{PER}在{ORG}研究{THING}。',
    '这种{THING}的价格只有过去的一半。',
    '它为什么这么快？',
    '{PER}解释说：“关键在于新的材料。”',
    '{ORG}计划在{LOC}建立一个实验室。',
    '数据每天更新{N}次，误差很小。',
    '许多家庭已经买了{THING}！',
  ),
  '体育': (
    '{TIME}的{SPORT}比赛在{LOC}举行。',
    '{PER}代表{ORG}参加了{SPORT}比赛。',
    '全场观众都站了起来！',
    '谁也没有想到{PER}会赢。',
    '教练说：“坚持到最后，就是胜利！”',
    '他们每天{DAY}训练{N}个小时。',
    '{ORG}以{N}分的优势取得了冠军。',
    '比赛结束以后，大家互相握手。',
  ),
  '学校': (
    '{PER}在{ORG}教语文。',
    '{DAY}，同学们在教室里读{BOOK}。',
    '{PER}最喜欢的书是{BOOK}。',
    '你读过{BOOK}吗？',
    '老师说：“学习不能只靠记忆。”',
    '{ORG}有{N}个班，图书馆在三楼。',
    '{TIME}，{PER}考上了{ORG}！',
    '放学以后，操场上很热闹。',
  ),
  '天气': (
    '{DAY}，{LOC}{SKY}。',
    '气温下降了{N}度。',
    '{PER}出门忘了带伞。',
    '明天还会下雨吗？',
    '{ORG}提醒大家注意安全！',
    '{LOC}和{LOC}之间的公路封闭了{N}个小时。',
    '奶奶说：“春天的天气，说变就变。”',
    '云散了，天边出现一道彩虹。',
  ),
}
GOOD = (
  '质量很好，非常满意',
  '物流很快，包装也漂亮',
  '味道不错，下次还来',
  '服务热情，值得推荐',
  '屏幕清楚，用着顺手',
)
BAD = (
  '质量太差，非常失望',
  '等了很久，包装也破了',
  '味道很怪，不会再来',
  '服务冷淡，不值这个钱',
  '屏幕模糊，经常死机',
)
OPENINGS = (
  '在{LOC}买的{THING}，',
  '和{PER}一起来的，',
  '{TIME}在{ORG}订的，',
  '第一次吃{DISH}，',
  '',
)
FACTS = (
  ('{PER}出生在{LOC}。', ('{PER}出生在哪里？', 'LOC'), ('谁出生在{LOC}？', 'PER')),
  ('{PER}在{ORG}工作。', ('{PER}在哪里工作？', 'ORG'), ('谁在{ORG}工作？', 'PER')),
  ('{PER}最爱吃{DISH}。', ('{PER}最爱吃什么？', 'DISH'), ('谁最爱吃{DISH}？', 'PER')),
)


def fill(template: str, rng: random.Random, known: dict | None = None) -> list[tuple[str, str]]:
  """The parts of a sentence, (text, placeholder); '' for text without one."""
  parts = re.split(r'\{(\w+)\}', template)
  known = known or {}
  made = [
    (known.get(p) or rng.choice(SLOTS[p]), p) if i % 2 else (p, '') for i, p in enumerate(parts)
  ]
  return [part for part in made if part[0]]


def text_of(parts) -> str:
  return ''.join(text for text, _ in parts)


def document(rng: random.Random, paragraphs: int = 3) -> str:
  """Paragraphs of four to seven sentences on one topic, without a blank anywhere."""
  topic = rng.choice(sorted(TOPICS))
  blocks = [rng.sample(TOPICS[topic], rng.randint(4, 7)) for _ in range(paragraphs)]
  return '\n\n'.join(''.join(text_of(fill(s, rng)) for s in block) for block in blocks)


def documents(count: int, seed: int = 0) -> list[str]:
  rng = random.Random(seed)
  return [document(rng) for _ in range(count)]


def reviews(count: int, seed: int = 0) -> list[tuple[str, str]]:
  """(text, label), 好评 and 差评 by turns."""
  rng = random.Random(seed)
  rows = []
  for number in range(count):
    label, phrases = (('好评', GOOD), ('差评', BAD))[number % 2]
    start = text_of(fill(rng.choice(OPENINGS), rng))
    rows.append((f'{start}{"，".join(rng.sample(phrases, 2))}。', label))
  return rows


def tagged(count: int, seed: int = 0) -> list[list[tuple[str, str]]]:
  """Sentences of (character, BIO tag)."""
  rng = random.Random(seed)
  templates = [s for group in TOPICS.values() for s in group if re.search('PER|LOC|ORG', s)]
  sentences = []
  for _ in range(count):
    rows = []
    for text, slot in fill(rng.choice(templates), rng):
      tags = [f'B-{slot}', *[f'I-{slot}'] * (len(text) - 1)] if slot in NAMES else ['O'] * len(text)
      rows += zip(text, tags, strict=True)
    sentences.append(rows)
  return sentences


def questions(count: int, seed: int = 0) -> dict:
  """A file in SQuAD's format: contexts of three facts, a question about one of them."""
  rng = random.Random(seed)
  paragraphs = []
  for number in range(count):
    people = rng.sample(NAMES['PER'], len(FACTS))
    order = rng.sample(range(len(FACTS)), len(FACTS))
    known = [dict(fill_slots(FACTS[i][0], rng), PER=p) for i, p in zip(order, people, strict=True)]
    facts = [text_of(fill(FACTS[i][0], rng, k)) for i, k in zip(order, known, strict=True)]
    at = rng.randrange(len(FACTS))
    question, slot = rng.choice(FACTS[order[at]][1:])
    start = sum(map(len, facts[:at])) + facts[at].index(known[at][slot])
    answers = [{'text': known[at][slot], 'answer_start': start}]
    asked = text_of(fill(question, rng, known[at]))
    paragraphs.append(
      {
        'context': ''.join(facts),
        'qas': [{'id': str(number), 'question': asked, 'answers': answers}],
      }
    )
  return {'version': '1.1', 'data': [{'title': '事实', 'paragraphs': paragraphs}]}


def fill_slots(template: str, rng: random.Random) -> dict[str, str]:
  return {slot: text for text, slot in fill(template, rng) if slot}
