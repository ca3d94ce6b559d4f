"""What an evaluation reports: BLEU-4 and ROUGE of generated texts, loss figures of label tokens.

Words come first, since both scores count n-grams of words. A pair whose reference holds
Chinese characters is cut by jieba, any other pair at white space and punctuation; the
reference decides for both texts, so that a prediction in the wrong language is compared on
the reference's terms. docs/metrics.md gives the formulas.

jieba costs about one second once per process, and only where Chinese is met.
"""

import functools
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence

BLEU_ORDER = 4
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

# The CJK ideograph blocks: unified, extension A, compatibility, and the supplementary planes.
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def generation_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Scores generated texts against one reference each.

    BLEU-4 is taken over the whole corpus (Papineni et al., 2002), ROUGE is the mean of the
    pairs' F1 (Lin, 2004). An empty prediction scores 0 and is no error.

    Args:
        predictions: Generated texts.
        references: The text expected in the same place of `predictions`.

    Returns:
        `bleu4`, `rouge1`, `rouge2`, `rougel`, each in 0..1.

    Raises:
        ValueError: The lists differ in length or are empty.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: there must be one of each per pair"
        )
    if not references:
        raise ValueError("no texts to score: predictions and references are empty")
    pairs = list(zip(predictions, references, strict=True))
    scores = {"bleu4": corpus_bleu4([split_pair(*pair) for pair in pairs])}
    scores.update(mean_rouge([split_pair(*pair, for_rouge=True) for pair in pairs]))
    return scores


def loss_metrics(loss_sum: float, num_tokens: int, num_correct: int) -> dict[str, float]:
    """Turns the sums of an evaluation into its means.

    Args:
        loss_sum: Cross-entropy in nats, summed over all label tokens.
        num_tokens: How many label tokens there were.
        num_correct: How many of them had the largest logit.

    Returns:
        `loss` (nats per label token), `perplexity` (exp(loss), infinite where that overflows)
        and `accuracy`.

    Raises:
        ValueError: There were no label tokens.
    """
    if num_tokens <= 0:
        raise ValueError(f"the evaluation counted {num_tokens} label tokens: a mean loss needs at least one")
    loss = loss_sum / num_tokens
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    return {"loss": loss, "perplexity": perplexity, "accuracy": num_correct / num_tokens}


def split_pair(prediction: str, reference: str, *, for_rouge: bool = False) -> tuple[list[str], list[str]]:
    """Cuts both texts of a pair into words, by the rule that the reference calls for.

    Args:
        prediction: Generated text.
        reference: Expected text; it alone decides between jieba and plain words.
        for_rouge: Plain words are then lower-cased and without punctuation, as in every
            common ROUGE scorer. Chinese words are the same for both scores.

    Returns:
        Words of the prediction, words of the reference.
    """
    split: Callable[[str], list[str]]
    if _CHINESE.search(reference):
        split = split_chinese
    else:
        split = split_plain_for_rouge if for_rouge else split_plain
    return split(prediction), split(reference)


def split_plain(text: str) -> list[str]:
    """Words between white space; every punctuation mark or symbol is a word of its own."""
    return "".join(f" {char} " if _is_punctuation(char) else char for char in text).split()


def split_plain_for_rouge(text: str) -> list[str]:
    """Lower-cased words without punctuation; on ASCII text the same words as rouge-score's own."""
    return "".join(" " if _is_punctuation(char) else char for char in text.lower()).split()


def split_chinese(text: str) -> list[str]:
    """Words of jieba (accurate mode), white space dropped, punctuation kept."""
    return [word for word in _jieba_cut()(text) if not word.isspace()]


def corpus_bleu4(pairs: Sequence[tuple[list[str], list[str]]]) -> float:
    """Corpus BLEU with uniform weights over 1- to 4-grams, brevity penalty and no smoothing.

    The counts and the penalty are nltk's; two habits of its `corpus_bleu` are left out. For a
    prediction shorter than n words it counts one n-gram that does not exist, which lowers the
    score (sacrebleu and the paper count none); and an order without any match becomes 2e-308
    with a warning, where the geometric mean is 0.

    Args:
        pairs: Words of the prediction and words of the reference.

    Returns:
        BLEU in 0..1; exactly 0.0 when some order has no match in the whole corpus.
    """
    from nltk.translate.bleu_score import brevity_penalty, modified_precision

    num_matches = [0] * BLEU_ORDER
    num_ngrams = [0] * BLEU_ORDER
    for prediction, reference in pairs:
        for order in range(1, min(BLEU_ORDER, len(prediction)) + 1):
            precision = modified_precision([reference], prediction, order)
            num_matches[order - 1] += precision.numerator
            num_ngrams[order - 1] += precision.denominator
    if min(num_matches) == 0:
        return 0.0
    log_precision = (
        math.fsum(math.log(m / n) for m, n in zip(num_matches, num_ngrams, strict=True)) / BLEU_ORDER
    )
    penalty = brevity_penalty(sum(len(ref) for _, ref in pairs), sum(len(pred) for pred, _ in pairs))
    return float(penalty * math.exp(log_precision))


def mean_rouge(pairs: Sequence[tuple[list[str], list[str]]]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over the pairs.

    Args:
        pairs: Words of the prediction and words of the reference.

    Returns:
        `rouge1`, `rouge2`, `rougel`, each in 0..1.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE_TYPES, tokenizer=_SplitAlready())
    results = [scorer.score(reference, prediction) for prediction, reference in pairs]
    return {kind.lower(): math.fsum(r[kind].fmeasure for r in results) / len(results) for kind in ROUGE_TYPES}


class _SplitAlready:
    """The tokenizer handed to rouge-score: its own knows only a-z and 0-9, ours ran before."""

    def tokenize(self, words: list[str]) -> list[str]:
        return words


def _is_punctuation(char: str) -> bool:
    # Unicode categories instead of `\w`: that one splits Hindi or Arabic words at their vowel signs.
    return unicodedata.category(char)[0] in "PS"


@functools.cache
def _jieba_cut() -> Callable[[str], list[str]]:
    """A jieba tokenizer with its dictionary in memory.

    jieba's own start writes log lines to stderr and shares a cache file in the temporary folder
    with every process and user of the machine; reading the dictionary directly does neither.
    """
    with warnings.catch_warnings():
        # jieba 0.42 imports pkg_resources and has invalid escapes, both of which warn.
        warnings.simplefilter("ignore")
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    cut: Callable[[str], list[str]] = tokenizer.lcut
    return cut
