"""Articles in six languages, of five paragraphs of about 100 to 140 words, made of phrases."""

import random

# Letters of a word and, of a sentence: when, who, did, what, why, end.
PHRASES = {
  'Russian': (7.3,
    'В начале прошлого века|После долгой войны|Весной того же года|По данным архива|'
    'Несмотря на холодную зиму',
    'жители старого города|молодой инженер из Казани|члены научного общества|'
    'правительство республики|его ученики',
    'решили построить|впервые подробно описали|с большим трудом восстановили|'
    'продали за бесценок|долго изучали',
    'каменный мост через реку|собрание редких рукописей|железную дорогу до моря|'
    'три новых университета|древнюю крепость на холме',
    ', потому что торговля быстро росла|, хотя денег почти не осталось|'
    ', как писали тогда газеты||, и это изменило жизнь всей области',
    '. |. |! ',
  ),
  'lower-cased English': (5.7,
    'early in the last century|after the long war|in the spring of that year|'
    'according to the archive|despite a cold winter',
    'the people of the old town|a young engineer from leeds|members of the royal society|'
    'the government of the republic|his students',
    'decided to build|were the first to describe|restored with great effort|'
    'sold for very little money|studied for many years',
    'a stone bridge across the river|the collection of rare manuscripts|'
    'a railway down to the sea|three new universities|the ancient fortress on the hill',
    ', because trade was growing quickly|, although hardly any money was left|'
    ', as the papers wrote at the time||, and it changed the life of the whole county',
    '. |. |! ',
  ),
  'Arabic': (5.9,
    'في بداية القرن الماضي|بعد الحرب الطويلة|في ربيع ذلك العام|وفقا لسجلات المدينة|'
    'رغم الشتاء البارد',
    'سكان المدينة القديمة|مهندس شاب من حلب|أعضاء الجمعية العلمية|حكومة الجمهورية|'
    'تلاميذ الشيخ',
    'قرروا بناء|وصفوا لأول مرة|أعادوا بجهد كبير ترميم|باعوا بثمن قليل|درسوا سنوات طويلة',
    'الجسر الحجري فوق النهر|مجموعة المخطوطات النادرة|سكة الحديد إلى البحر|'
    'ثلاث جامعات جديدة|القلعة القديمة على التل',
    '، لأن التجارة كانت تنمو بسرعة|، مع أن المال كاد ينفد|، كما كتبت الصحف آنذاك||'
    '، وقد غير ذلك حياة الناس في المنطقة كلها',
    '. |. |؟ ',
  ),
  'Hindi': (4.9,
    'पिछली सदी की शुरुआत में|लंबे युद्ध के बाद|उस साल के वसंत में|'
    'पुराने अभिलेखों के अनुसार|ठंडी सर्दियों के बावजूद',
    'पुराने शहर के लोगों ने|कानपुर के एक युवा इंजीनियर ने|विज्ञान परिषद के सदस्यों ने|'
    'राज्य की सरकार ने|उनके छात्रों ने',
    'नदी पर पत्थर का पुल|दुर्लभ पांडुलिपियों का संग्रह|समुद्र तक की रेल लाइन|'
    'तीन नए विश्वविद्यालय|पहाड़ी पर बना प्राचीन किला',
    'बनाने का निश्चय किया|पहली बार विस्तार से देखा|बड़ी मेहनत से ठीक किया|'
    'बहुत कम दाम पर बेच दिया|कई वर्षों तक समझा',
    ', क्योंकि व्यापार तेज़ी से बढ़ रहा था|, हालाँकि पैसा लगभग समाप्त था|'
    ', जैसा अख़बारों ने लिखा||, और इससे पूरे ज़िले का जीवन बदल गया',
    '। |। |? ',
  ),
  'Thai': (4.2,
    'ในตอนต้นของศตวรรษที่แล้ว|หลังจากสงครามอันยาวนาน|ในฤดูร้อนของปีเดียวกัน|'
    'ตามบันทึกของหอจดหมายเหตุ|แม้ว่าฤดูหนาวจะยาวนาน',
    'ชาวเมืองเก่า|วิศวกรหนุ่มจากเชียงใหม่|สมาชิกของสมาคมวิทยาศาสตร์|รัฐบาลของสาธารณรัฐ|'
    'ลูกศิษย์ของเขา',
    'ตัดสินใจสร้าง|ได้บรรยายเป็นครั้งแรกถึง|บูรณะด้วยความพยายามอย่างมาก|ขายในราคาถูก|'
    'ศึกษาเป็นเวลาหลายปี',
    'สะพานหินข้ามแม่น้ำ|ต้นฉบับหายาก|ทางรถไฟไปทะเล|มหาวิทยาลัยใหม่สามแห่ง|'
    'ป้อมโบราณบนเนินเขา',
    'เพราะการค้าเติบโตอย่างรวดเร็ว|ถึงแม้เงินเกือบจะหมดแล้ว|ตามที่หนังสือพิมพ์เขียนไว้||'
    'และทำให้ชีวิตของผู้คนทั้งจังหวัดเปลี่ยนไป',
    ' | | ',
  ),
  'Chinese': (1.6,
    '上个世纪初|漫长的战争以后|那一年的春天|根据档案馆的记载|虽然冬天十分寒冷',
    '，古城的居民|，一位来自苏州的年轻工程师|，科学学会的会员|，共和国的政府|，他的学生',
    '决定修建|第一次详细描述了|费了很大力气修复|以很低的价格卖掉了|花了多年时间研究',
    '河上的石桥|那批珍贵的手稿|通往海边的铁路|三所新的大学|山上古老的城堡',
    '，因为贸易发展得很快|，尽管钱几乎用完了|，正如当时的报纸所写||，这改变了整个地区的生活',
    '。|。|！',
  ),
}  # fmt: skip


def articles(language: str, count: int = 48, seed: int = 0) -> list[str]:
  rng = random.Random(seed)
  letters, *phrases = PHRASES[language]
  slots = [slot.split('|') for slot in phrases]
  blank = '' if language == 'Chinese' else ' '

  def sentence():
    when, who, did, what, why, end = map(rng.choice, slots)
    if language == 'Thai':  # blanks only between clauses
      return f'{when} {who}{did}{what} {why}'.strip() + end
    return blank.join((when, who, did, what)) + why + end

  def paragraph():
    text, length = '', letters * rng.randint(100, 140)
    while len(text) < length:
      text += sentence()
    return text.strip()

  return ['\n\n'.join(paragraph() for _ in range(5)) for _ in range(count)]


def write(folder, language: str) -> list[str]:
  """Writes articles, a file each, and returns them."""
  texts = articles(language)
  folder.mkdir()
  for i, text in enumerate(texts):
    (folder / f'{i:02}.txt').write_text(text, encoding='utf-8')
  return texts
