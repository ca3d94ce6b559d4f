"""Scores against sacrebleu, nltk, rouge-score's own tokenizer, and cases worked by hand."""

import math
import random
import subprocess
import sys
import warnings

import pytest
import sacrebleu
from nltk.translate.bleu_score import corpus_bleu
from rouge_score.rouge_scorer import RougeScorer

from finetune.training.metrics import (
    corpus_bleu4,
    generation_metrics,
    loss_metrics,
    split_chinese,
    split_pair,
    split_plain,
    split_plain_for_rouge,
)

ENGLISH = [
    ("The cat sat on the mat, quietly.", "The cat sat quietly on the mat."),
    ("A light cotton shirt for the summer days.", "A light cotton shirt, made for warm summer days."),
    ("yes", "Yes, it is made of pure wool and silk."),
    ("", "Nothing was written here at all."),
]
CHINESE = [
    ("这款衬衫采用纯棉面料，穿着舒适透气。", "这款衬衫采用优质纯棉面料，穿着非常舒适透气。"),
    ("时尚的拼接设计，丰富了服装的层次感。", "时尚加分的拼接设计，在视觉上丰富了服装的层次感。"),
    ("好", "经典的黑色半身裙，显瘦又百搭。"),
    ("", "宽松的版型不挑身材。"),
]


def sacrebleu_score(pairs):
    hypotheses = [" ".join(prediction) for prediction, _ in pairs]
    references = [" ".join(reference) for _, reference in pairs]
    score = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none", smooth_method="none", force=True)
    return score.score / 100


def random_pairs(num_pairs, *, min_words, seed):
    rng = random.Random(seed)
    pairs = []
    for _ in range(num_pairs):
        reference = rng.choices("abcdefgh", k=rng.randint(4, 30))
        prediction = [word if rng.random() < 0.8 else rng.choice("abcdefgh") for word in reference]
        keep = rng.randint(min(min_words, len(prediction)), len(prediction))
        pairs.append((prediction[:keep], reference))
    return pairs


@pytest.mark.parametrize("texts", [ENGLISH, CHINESE, ENGLISH + CHINESE], ids=["english", "chinese", "mixed"])
def test_bleu_equals_sacrebleu(texts):
    pairs = [split_pair(*pair) for pair in texts]
    expected = sacrebleu_score(pairs)
    assert 0.1 < expected < 0.9
    predictions, references = zip(*texts, strict=True)
    assert generation_metrics(list(predictions), list(references))["bleu4"] == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
def test_bleu_equals_sacrebleu_on_random_words_with_short_and_empty_predictions(seed):
    pairs = random_pairs(50, min_words=0, seed=seed)
    assert corpus_bleu4(pairs) == pytest.approx(sacrebleu_score(pairs), abs=1e-12)


def test_bleu_equals_nltk_from_four_words_on_and_not_below():
    pairs = random_pairs(50, min_words=4, seed=1)

    def by_nltk(pairs):
        return corpus_bleu([[reference] for _, reference in pairs], [prediction for prediction, _ in pairs])

    assert corpus_bleu4(pairs) == pytest.approx(by_nltk(pairs), abs=1e-12)
    # nltk counts an n-gram of each order for the empty prediction, the paper none.
    pairs.append(([], list("abcd")))
    assert by_nltk(pairs) < corpus_bleu4(pairs) - 1e-4


def test_bleu_by_hand():
    # Matches: 4 of 5 words, 3 of 4 pairs, 2 of 3, 1 of 2; lengths 5 and 6.
    value = corpus_bleu4([(["a", "b", "c", "d", "x"], ["a", "b", "c", "d", "e", "f"])])
    assert value == pytest.approx(math.exp(1 - 6 / 5) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # A word is matched no more often than the reference has it.
    clipped = corpus_bleu4([(["a", "b", "c", "d", "a", "a"], ["a", "b", "c", "d", "e", "f"])])
    assert clipped == pytest.approx((4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("a b c x d e", "a b c y d e"), ("x", "a b c d"), ("a b c", "a b c"), ("", "a b c d")],
)
def test_bleu_without_a_match_of_some_order_is_exactly_zero_and_silent(prediction, reference):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generation_metrics([prediction], [reference])["bleu4"] == 0.0


@pytest.mark.parametrize("text", ["the cat sat on the mat", "这款衬衫采用优质纯棉面料，穿着舒适。"])
def test_the_same_text_scores_one(text):
    assert generation_metrics([text], [text]) == pytest.approx(
        {"bleu4": 1.0, "rouge1": 1.0, "rouge2": 1.0, "rougel": 1.0}
    )


def test_rouge_by_hand():
    # Words: 3 of 4 and 3 of 5. Pairs: "a b" of 3 and of 4. Longest common subsequence: a b d.
    scores = generation_metrics(["a b x d"], ["a b c d e"])
    assert scores["rouge1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert scores["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert scores["rougel"] == pytest.approx(2 / 3)
    # The order counts for ROUGE-L alone.
    swapped = generation_metrics(["d c b a"], ["a b c d"])
    assert (swapped["rouge1"], swapped["rougel"]) == pytest.approx((1.0, 0.25))


def test_rouge_by_hand_on_chinese():
    assert split_chinese("我喜欢北京") == ["我", "喜欢", "北京"]
    assert split_chinese("我喜欢上海") == ["我", "喜欢", "上海"]
    scores = generation_metrics(["我喜欢上海"], ["我喜欢北京"])
    assert scores["rouge1"] == pytest.approx(2 / 3)
    assert scores["rouge2"] == pytest.approx(1 / 2)
    assert scores["rougel"] == pytest.approx(2 / 3)


def test_rouge_equals_the_usual_scorer_on_english_and_is_a_mean_over_pairs():
    texts = [*ENGLISH, ("Don't stop_me now: 3.5% OFF", "don't stop me NOW, 3.5 percent off!")]
    usual = RougeScorer(["rouge1", "rouge2", "rougeL"])
    results = [usual.score(reference, prediction) for prediction, reference in texts]
    predictions, references = zip(*texts, strict=True)
    scores = generation_metrics(list(predictions), list(references))
    for kind in ("rouge1", "rouge2", "rougeL"):
        expected = sum(result[kind].fmeasure for result in results) / len(results)
        assert scores[kind.lower()] == pytest.approx(expected, abs=1e-12)
        assert expected > 0.2


def test_the_usual_tokenizer_would_lose_chinese():
    assert RougeScorer(["rouge1"]).score("我喜欢北京", "我喜欢北京")["rouge1"].fmeasure == 0.0


def test_the_reference_decides_the_words_of_both_texts():
    assert split_pair("the mat", "我喜欢北京")[0] == ["the", "mat"]
    assert split_pair("我喜欢北京", "the mat") == (["我喜欢北京"], ["the", "mat"])


def test_plain_words():
    assert split_plain("It's 3,5 € (Или) नमस्ते") == [
        "It",
        "'",
        "s",
        "3",
        ",",
        "5",
        "€",
        "(",
        "Или",
        ")",
        "नमस्ते",
    ]
    assert split_plain_for_rouge("It's 3,5 € (Или) नमस्ते") == ["it", "s", "3", "5", "или", "नमस्ते"]
    assert split_plain(" \n\t ") == []


@pytest.mark.parametrize("prediction", ["", "  \n"])
@pytest.mark.parametrize("reference", ["the cat", "我喜欢北京", ""])
def test_empty_texts_count_zero(prediction, reference):
    assert set(generation_metrics([prediction], [reference]).values()) == {0.0}


def test_an_empty_prediction_lowers_the_mean():
    scores = generation_metrics(["a b c d", ""], ["a b c d", "a b c d"])
    assert scores["rouge1"] == pytest.approx(0.5)
    assert scores["bleu4"] == pytest.approx(math.exp(1 - 8 / 4))


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        generation_metrics(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="predictions and references are empty"):
        generation_metrics([], [])


def test_jieba_starts_late_and_quietly_and_leaves_no_cache(tmp_path):
    script = (
        "import sys\n"
        "from finetune.training.metrics import generation_metrics\n"
        "generation_metrics(['a b'], ['a c'])\n"
        "assert 'jieba' not in sys.modules\n"
        "assert generation_metrics(['我喜欢北京'], ['我喜欢北京'])['rouge1'] == 1\n"
        "assert 'paddle' not in sys.modules\n"
    )
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "jieba" not in done.stderr and "prefix dict" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_loss_metrics():
    assert loss_metrics(6.0, 4, 3) == pytest.approx(
        {"loss": 1.5, "perplexity": math.exp(1.5), "accuracy": 0.75}
    )
    assert loss_metrics(0.0, 2, 2) == {"loss": 0.0, "perplexity": 1.0, "accuracy": 1.0}
    assert loss_metrics(800.0, 1, 0)["perplexity"] == math.inf
    assert math.isnan(loss_metrics(math.nan, 1, 0)["perplexity"])


@pytest.mark.parametrize("num_tokens", [0, -1])
def test_loss_metrics_need_a_label_token(num_tokens):
    with pytest.raises(ValueError, match="at least one"):
        loss_metrics(1.0, num_tokens, 0)
