"""Writes the sample data set: product attributes and the Chinese advertising text that they call for.

A product belongs to a family (clothing, shoes, ...) that says which attributes and values it can have. A text is
one clause for each attribute, in the order of the source. Three things decide how a clause reads:

- the value brings its own words (two phrases, ``a`` and ``b``, in the tables below);
- the tone, which follows from the style (plain when no style is given), chooses the frame of *every* clause,
  so that one attribute changes the wording of all the others; the second half of a sentence has its own frames;
- a colour directly followed by a pattern becomes one clause with frames of its own.

A share of the clauses (``FREE_SHARE``) takes a frame at random, as human authors would: the best possible model
still does not reach a score of 1. The development set has only attribute combinations that the training set
lacks, so a model must learn the parts and how they combine; whole texts cannot be remembered.

    python data/generate.py [--out data] [--num_train 3200] [--num_dev 200] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

TONES = ("plain", "quiet", "lively", "steady")
FREE_SHARE = 0.15
SOURCE_CHARS = (20, 50)
TARGET_CHARS = (40, 90)

# Families: name, noun for the material, group, words of use, attributes besides the type.
FAMILIES = """
服装 面料 wear 穿上它 材质 颜色 图案 风格 版型 细节 季节 人群 场合
鞋履 鞋面 wear 踩上它 材质 颜色 风格 细节 季节 人群 场合
箱包 包身 wear 带上它 材质 颜色 图案 风格 细节 人群 场合
家纺 面料 home 换上它 材质 颜色 图案 风格 细节 季节 人群
器皿 材质 home 用着它 材质 颜色 图案 风格 细节 人群 空间
家具 材质 home 摆上它 材质 颜色 风格 细节 人群 空间
灯具 材质 home 点亮它 材质 颜色 图案 风格 细节 人群 空间
"""

# Types: family, then measure word and name in turn.
TYPES = """
服装 件衬衫 条连衣裙 条半身裙 件风衣 件外套 件马甲 条长裤 条背带裙
鞋履 双板鞋 双休闲鞋 双短靴 双凉鞋 双单鞋 双牛津鞋
箱包 只双肩包 只手提包 只斜挎包 只托特包 只水桶包 只旅行袋
家纺 幅窗帘 条盖毯 只抱枕 块地毯 块桌布 条床单
器皿 只茶杯 只餐盘 只花瓶 把茶壶 只汤碗 只咖啡杯
家具 张书桌 张边几 把扶手椅 个书架 个斗柜 张茶几
灯具 盏台灯 盏落地灯 盏吊灯 盏壁灯 盏床头灯
"""

# Values: attribute, families that have it (* = all), value, phrase a, phrase b.
VALUES = """
材质 服装家纺 纯棉 柔软 吸汗透气
材质 服装家纺 亚麻 清爽 透气吸湿
材质 服装 真丝 顺滑 泛着柔光
材质 服装家纺 羊毛 蓬松 轻盈保暖
材质 服装 牛仔布 硬挺 耐磨耐洗
材质 服装 灯芯绒 绵厚 纹理分明
材质 服装 天丝 丝滑 垂顺凉爽
材质 鞋履箱包 牛皮 厚实 越用越有光泽
材质 鞋履箱包 羊皮 绵软 细滑贴合
材质 鞋履 麂皮 细腻 不易起皱
材质 鞋履箱包 帆布 结实 耐脏好打理
材质 鞋履 网布 轻巧 透气不闷
材质 箱包 尼龙 轻便 防水防刮
材质 箱包 草编 轻盈 带着自然气息
材质 家纺 法兰绒 厚软 蓄热又不掉毛
材质 家纺 雪尼尔 饱满 垂感十足
材质 器皿 白瓷 温润 釉面光洁
材质 器皿 粗陶 质朴 留有手作的温度
材质 器皿 骨瓷 细薄 透光如玉
材质 器皿 珐琅 亮泽 耐磕耐用
材质 器皿灯具 玻璃 通透 擦拭省力
材质 家具灯具 胡桃木 沉实 纹理深邃
材质 家具 榉木 坚韧 不易变形
材质 家具 楠竹 清雅 防潮耐用
材质 家具灯具 藤编 自然 手工细密
材质 家具灯具 铁艺 稳固 线条利落
材质 灯具 黄铜 厚重 越久越有韵味
颜色 * 米白 温柔 像一杯热牛奶
颜色 * 浅蓝 清澈 像雨后的天空
颜色 * 墨绿 沉静 像深林里的苔藓
颜色 * 酒红 典雅 像天边的晚霞
颜色 * 焦糖 醇厚 像刚出炉的布丁
颜色 * 雾灰 内敛 像清晨的薄雾
颜色 * 藏青 深邃 像入夜的海面
颜色 * 鹅黄 明亮 像初春的阳光
颜色 * 樱粉 甜美 像枝头的花瓣
颜色 * 纯黑 利落 像夜色一样神秘
颜色 * 薄荷绿 清新 像湖边的微风
颜色 * 姜黄 醒目 像秋日的银杏
图案 * 条纹 疏密有致 显得干净清爽
图案 * 格纹 横竖交织 透着书卷气息
图案 * 碎花 星星点点 仿佛走进花园
图案 * 波点 大小错落 俏皮又有秩序
图案 * 几何 棱角分明 充满现代感
图案 * 水墨 浓淡相宜 晕开东方韵味
图案 * 枝叶 舒展自在 把自然带到身边
图案 * 云朵 圆润可爱 藏着一点童心
图案 * 回纹 连绵不断 寓意吉祥绵长
版型 服装 宽松 不挑身材 活动自如
版型 服装 修身 勾勒曲线 显得高挑
版型 服装 直筒 线条顺直 遮住小肉
版型 服装 斜裁 垂坠自然 行走生风
版型 服装 立体 贴合身形 久坐不皱
细节 服装 荷叶边 层层叠叠 平添灵动
细节 服装 抽绳 可松可紧 调节随心
细节 服装 大口袋 容量充足 解放双手
细节 服装 蝴蝶结 轻轻一系 点亮造型
细节 服装 双排扣 排列整齐 端正有型
细节 鞋履 厚底 不动声色 悄悄增高
细节 鞋履 魔术贴 一贴即合 穿脱方便
细节 鞋履箱包 金属扣 闪着微光 提升质感
细节 鞋履 系带 松紧随心 贴合脚型
细节 鞋履 防滑底 抓地有力 雨天也安心
细节 箱包 磁扣 轻轻一合 开关顺手
细节 箱包 内袋 分区清楚 找东西不慌
细节 箱包 宽肩带 分散重量 久背不累
细节 箱包 双拉链 顺滑不卡 取放方便
细节 家纺 流苏边 自然垂落 增添情调
细节 家纺 滚边 针脚细密 久洗不散
细节 家纺服装 刺绣 一针一线 精致立体
细节 家纺 提花 若隐若现 层次丰富
细节 器皿 金边 细细一圈 精致醒目
细节 器皿 宽口 敞开圆润 清洗方便
细节 器皿 磨砂底 稳稳当当 不伤桌面
细节 器皿 浮雕 凹凸有致 触手生趣
细节 家具 圆角 打磨光滑 不怕磕碰
细节 家具 收纳格 大小合宜 杂物归位
细节 家具 静音脚垫 轻挪无声 保护地板
细节 家具 细腿 轻巧通透 打扫方便
细节 灯具 触控开关 一碰即亮 夜里也好找
细节 灯具 调光旋钮 轻轻一转 明暗随心
细节 灯具 防眩灯罩 光线柔和 久看不累
细节 灯具 定时功能 到点熄灯 省电省心
季节 * 春季 乍暖还寒的日子 草木初醒
季节 * 夏季 烈日炎炎的午后 蝉声阵阵
季节 * 秋季 落叶纷飞的傍晚 天高云淡
季节 * 冬季 寒风凛冽的清晨 白雪皑皑
人群 * 上班族 忙里也能偷个闲 奔波的日子多些慰藉
人群 * 学生 价格也很友好 毕业多年仍会想起
人群 * 新手妈妈 省心又省力 手忙脚乱也不怕
人群 * 长辈 送上一份体贴 闲话家常时常提起
人群 * 年轻情侣 成双成对更有爱 平淡日子也浪漫
人群 * 租房一族 搬家也舍不得丢 小屋里也有讲究
人群 * 手艺人 细微之处见功夫 一眼看得出用心
场合 * 通勤 地铁里也保持体面 早高峰不慌不忙
场合 * 约会 悄悄为好感加分 让对方眼前一亮
场合 * 旅行 随手一拍都是大片 走多远都轻松
场合 * 聚会 成为人群里的焦点 和老友有聊不完的话
场合 * 郊游 在草地上席地而坐 把春光装进口袋
空间 * 客厅 招待朋友很有面子 一家人围坐闲谈
空间 器皿家具 餐厅 一日三餐更有滋味 饭菜也香了几分
空间 * 书房 读书写字更专心 陪你度过漫漫长夜
空间 * 阳台 晒着太阳发会儿呆 看云卷云舒
空间 灯具家具 卧室 伴你一夜好眠 卸下一身疲惫
空间 * 民宿 远道的客人也夸赞 让旅人有家的感觉
"""

# Styles: tone, style, what is special about it.
STYLES = """
quiet 简约 没有多余的装饰
quiet 文艺 像一首安静的小诗
quiet 森系 仿佛带着草木清香
quiet 日系 处处透着恬淡
lively 甜美 让人嘴角上扬
lively 街头 随性又有态度
lively 童趣 勾起儿时的回忆
lively 撞色 大胆又不失协调
steady 复古 沉淀着时光的味道
steady 商务 分寸拿捏得刚好
steady 轻奢 精致却不张扬
steady 中式 含蓄而有底蕴
"""

# Frames: attribute, then one frame for each of TONES (- = none). S: the product when it opens the text; P: the
# same with 的. The rows with a + are for the second half of a sentence.
FRAMES = """
材质 {S}采用{v}{noun}，{a}，而且{b} {S}以{v}制成，质感{a}，{b} {S}用上了{a}的{v}，{b}，一摸就爱上 {S}甄选上乘{v}，做工扎实，{a}且{b}
颜色 {P}{v}色{a}耐看，{b} {S}染上一层{v}，{b}，{a}而不喧闹 {S}选了{a}的{v}色，{b}，叫人移不开眼 {S}以{v}为主色，{a}大方，{b}
图案 {P}{v}图案{a}，{b} {S}缀以{a}的{v}，{b} {S}布满{a}的{v}，{b}，趣味满满 {S}饰有{v}纹样，{a}，{b}
颜色图案 {S}采用{v}色搭配{w}图案，{a}耐看，{d} {S}在{v}底色上落下{c}的{w}，{b} {S}在{a}的{v}底色上撒满{c}的{w}，{b}，{d} {S}以{a}的{v}作底、{w}为饰，{d}
版型 {S}是{v}版型，{a}，也{b} {S}依{v}剪裁，{b}，{a} {P}{v}版型太懂你，{a}，{b} {S}讲究{v}剪裁，{a}，{b}
细节 {S}带{v}设计，{a}，{b} {P}{v}{a}，不经意间{b} {S}还加了{v}，{a}，{b}，真是贴心 {S}配以{v}，{a}，{b}
季节 {S}适合{v}，{a}也很舒服 {S}与{v}相宜，{b}，自有一份安适 {S}陪你过{v}，{a}也能元气满满 {S}为{v}而备，{a}依然妥帖
人群 {S}很适合{v}，{a} {S}送给懂生活的{v}，{b} {S}最懂{v}的心，{a} {S}专为{v}打造，{b}
场合 {S}用来{v}正好，{a} {S}伴你{v}，{b} {S}陪你{v}，{a}，快乐加倍 {S}足以应对{v}，{b}
空间 {S}放在{v}正好，{a} {S}安放在{v}，{b} {S}一进{v}就抢镜，{a} {S}置于{v}，{b}，尽显格调
材质+ 用的是{v}，{a}，{b} {v}的质地{a}，{b} {v}摸起来{a}极了，{b} {v}用料考究，{a}，{b}
颜色+ 颜色是{v}，{a}，{b} 一抹{v}{b}，{a}得恰到好处 {a}的{v}上阵，{b}，越看越喜欢 {v}色调{a}，{b}，经得起细看
图案+ 还有{v}图案，{a}，{b} {v}{a}，{b} 满眼都是{v}，{a}，{b} {v}点缀其间，{a}，{b}
细节+ 又有{v}，{a}，{b} 另有{v}，{a}，{b} 小小的{v}{a}，{b}，想得真周到 {v}亦见用心，{a}，{b}
人群+ {v}用着合适，{b} 留给{v}，{a} {v}一定喜欢，{b} 深得{v}青睐，{a}
风格-wear - {S}走{v}路线，{a}，{use}举止也从容起来 {S}满是{v}气息，{a}，{use}立刻神采飞扬 {S}秉承{v}格调，{a}，{use}气场自然显现
风格-home - {S}走{v}路线，{a}，{use}屋子也安静下来 {S}满是{v}气息，{a}，{use}整个家都热闹起来 {S}秉承{v}格调，{a}，{use}品位自然显现
"""

# What opens the second and the third sentence, by tone.
LINKS = {
    "plain": ("同时，", "另外，"),
    "quiet": ("", "闲时细看，"),
    "lively": ("更棒的是，", "还有惊喜，"),
    "steady": ("此外，", "更难得的是，"),
}

# Values that no honest shop would offer together.
CONFLICTS = """
夏季 羊毛 灯芯绒 法兰绒 雪尼尔 短靴
冬季 亚麻 真丝 天丝 网布 凉鞋 草编
郊游 真丝
轻奢 帆布 草编
撞色 雾灰 纯黑
"""


class Family(NamedTuple):
    """What the products of one family share."""

    noun: str
    group: str
    use: str
    attributes: list[str]
    types: dict[str, str]
    values: dict[str, list[str]]


Product = dict[str, str]


def rows(table: str) -> list[list[str]]:
    """Splits a table into lines and words."""
    return [line.split() for line in table.strip().splitlines()]


PHRASES = {(attribute, value): (a, b) for attribute, _, value, a, b in rows(VALUES)}
STYLE_TONE = {style: tone for tone, style, _ in rows(STYLES)}
PHRASES.update({("风格", style): (phrase, "") for _, style, phrase in rows(STYLES)})
FRAME = {(row[0], tone): frame for row in rows(FRAMES) for tone, frame in zip(TONES, row[1:], strict=True)}
CONFLICTING = {frozenset((row[0], other)) for row in rows(CONFLICTS) for other in row[1:]}


def build_families() -> dict[str, Family]:
    """Joins the tables by family."""
    types = {row[0]: {word[1:]: word[0] for word in row[1:]} for row in rows(TYPES)}
    families = {}
    for name, noun, group, use, *attributes in rows(FAMILIES):
        values: dict[str, list[str]] = {attribute: [] for attribute in attributes}
        for attribute, owners, value, _, _ in rows(VALUES):
            if attribute in values and (owners == "*" or name in owners):
                values[attribute].append(value)
        values["风格"] = list(STYLE_TONE)
        families[name] = Family(noun, group, use, attributes, types[name], values)
    return families


FAMILY = build_families()
FAMILY_OF = {kind: family for family in FAMILY.values() for kind in family.types}


def draw_product(rng: random.Random) -> Product:
    """Draws a type and three to five attributes; the order of the dictionary is the order of the source."""
    family = FAMILY[rng.choice(list(FAMILY))]
    kind = rng.choice(list(family.types))
    names = rng.sample(family.attributes, rng.choice((3, 4, 4, 5)))
    return {"类型": kind, **{name: rng.choice(family.values[name]) for name in names}}


def is_plausible(product: Product) -> bool:
    """Says whether no two values contradict each other."""
    values = list(product.values())
    return not any(frozenset((v, w)) in CONFLICTING for i, v in enumerate(values) for w in values[:i])


def plan(product: Product) -> list[tuple[str, ...]]:
    """Groups the attributes into clauses: one each, but colour and pattern together when they follow each other."""
    clauses: list[tuple[str, ...]] = []
    for name in list(product)[1:]:
        if name == "图案" and clauses and clauses[-1] == ("颜色",):
            clauses[-1] = ("颜色", "图案")
        else:
            clauses.append((name,))
    return clauses


def realise(product: Product, clause: tuple[str, ...], tone: str, *, subject: str, follows: bool) -> str:
    """Fills the frame of one clause with the words of its values.

    Args:
        product: attribute -> value.
        clause: the attributes that the clause tells.
        tone: chooses the frame, except for the style, which has its own tone.
        subject: what the clause begins with when it opens the text, else empty.
        follows: whether the clause is the second half of a sentence.
    """
    family = FAMILY_OF[product["类型"]]
    key = "".join(clause)
    if key == "风格":
        key, tone = f"风格-{family.group}", STYLE_TONE[product["风格"]]
    if follows and (key + "+", tone) in FRAME:
        key += "+"
    words = {"S": subject, "P": subject and subject + "的", "noun": family.noun, "use": family.use}
    for name, (value, a, b) in zip(clause, (("v", "a", "b"), ("w", "c", "d")), strict=False):
        words[value] = product[name]
        words[a], words[b] = PHRASES[name, product[name]]
    return FRAME[key, tone].format(**words)


def describe(product: Product, rng: random.Random | None = None) -> str:
    """Writes the advertising text of a product.

    Args:
        product: attribute -> value, the type first.
        rng: source of free variation; without it every clause takes the frame of the product's tone.
    """
    kind = product["类型"]
    tone = STYLE_TONE.get(product.get("风格", ""), "plain")
    clauses = plan(product)
    text = ""
    for i, clause in enumerate(clauses):
        frame_tone = rng.choice(TONES) if rng and rng.random() < FREE_SHARE else tone
        subject = "" if i else f"这{FAMILY_OF[kind].types[kind]}{kind}"
        # Two clauses to a sentence, counted from the end, so that the last sentence is never a fragment.
        closes = (len(clauses) - i) % 2 == 1
        link = LINKS[tone][text.count("。") - 1] if text.endswith("。") else ""
        follows = text.endswith("；")
        text += link + realise(product, clause, frame_tone, subject=subject, follows=follows)
        text += "。" if closes else "；"
    return text


def source_of(product: Product) -> str:
    """Writes the attributes in the notation of the data set."""
    return "*".join(f"{name}#{value}" for name, value in product.items())


def generate(num_examples: int, seed: int) -> list[dict[str, str]]:
    """Draws examples, no two with the same set of attribute values."""
    rng = random.Random(seed)
    seen: set[frozenset[str]] = set()
    examples: list[dict[str, str]] = []
    while len(examples) < num_examples:
        product = draw_product(rng)
        combination = frozenset(product.values())
        example = {"src": source_of(product), "tgt": describe(product, rng)}
        fits = all(
            low <= len(example[field]) <= high
            for field, (low, high) in (("src", SOURCE_CHARS), ("tgt", TARGET_CHARS))
        )
        if fits and combination not in seen and is_plausible(product):
            seen.add(combination)
            examples.append(example)
    return examples


def write_lines(path: Path, examples: list[dict[str, str]]) -> None:
    """Writes one JSON object a line, UTF-8, with a newline at the end of each on every system."""
    text = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    path.write_bytes(text.encode("utf-8"))


def main(argv: list[str] | None = None) -> None:
    """Writes train.json and dev.json."""
    parser = argparse.ArgumentParser(description="Write the sample data set (train.json and dev.json).")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--num_train", type=int, default=3200, help="number of training pairs")
    parser.add_argument("--num_dev", type=int, default=200, help="number of development pairs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing")
    args = parser.parse_args(argv)
    examples = generate(args.num_train + args.num_dev, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_lines(args.out / "dev.json", examples[: args.num_dev])
    write_lines(args.out / "train.json", examples[args.num_dev :])


if __name__ == "__main__":
    main()
