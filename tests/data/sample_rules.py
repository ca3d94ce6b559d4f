"""The rules of finetune/data/samples/tokenize.py once more, token by token: slow, and short enough to be read."""

from __future__ import annotations

import itertools

from finetune.data.templates.pieces import Piece

TOO_LONG = "too long"


def expect_sample(conversation, encoder, template, *, src_length, max_length, truncation, train_on):
    """Tokens, flags of the learned ones, what was cut and dropped; None or `TOO_LONG` without a sample."""
    rounds = list(conversation.shortened()) if truncation in ("left", "right") else [conversation]
    prefix = [(index, False) for index in encoder.prefix_ids]
    for kept in rounds:
        tokens = [*prefix, *_tokens(kept, encoder, template, train_on)]
        if len(tokens) <= max_length:
            break
    answers = [turn.response.strip() for turn in kept.turns]
    if not any(answers[-1:] if train_on == "last" else answers):
        return None
    if len(tokens) > max_length and truncation in ("drop", "error"):
        return TOO_LONG
    source = list(itertools.takewhile(lambda token: not token[1], tokens))
    target = tokens[len(source) :]
    shown = source
    if truncation == "left" and kept.num_rounds == 1:
        while len(shown) > max(src_length, len(prefix)):
            shown = [*prefix, *shown[len(prefix) + 1 :]]
    whole = [*shown, *target]
    ids = [index for index, _ in whole[:max_length]] if len(shown) < max_length else []
    learned = [False, *(flag for _, flag in whole[1:])][: len(ids)]
    if all(not flag or index == encoder.eos_token_id for index, flag in zip(ids, learned, strict=True)):
        return None
    cuts = len(shown) < len(source), len(ids) < len(whole)
    return ids, learned, cuts, conversation.num_rounds - kept.num_rounds


def _tokens(conversation, encoder, template, train_on):
    """(id, learned) of a conversation behind the prefix, to the last learned one."""
    if conversation.is_text:
        pieces, appends_eos = [Piece(conversation.messages[0].content, learned=True)], True
    else:
        pieces, appends_eos = template.render(conversation), template.appends_eos
    tokens, starts = [], [0]
    for place, piece in enumerate(pieces):
        if piece.learned and (place == 0 or not pieces[place - 1].learned):
            starts.append(len(tokens))
        ids = _ids(piece, encoder, template)
        if appends_eos and piece.learned and not (place + 1 < len(pieces) and pieces[place + 1].learned):
            ids = ids if ids[-1:] == [encoder.eos_token_id] else [*ids, encoder.eos_token_id]
        tokens += [(index, piece.learned) for index in ids]
    if train_on == "last":
        tokens = [(index, flag and place >= starts[-1]) for place, (index, flag) in enumerate(tokens)]
    while tokens and not tokens[-1][1]:
        tokens.pop()
    prefix = [(index, False) for index in encoder.prefix_ids]
    return tokens[len(prefix) :] if tokens[: len(prefix)] == prefix else tokens


def _ids(piece, encoder, template):
    if piece.special and not piece.data:
        return encoder.encode_special(piece.text)
    if piece.special:  # the example's own text, trimmed, is encoded as text
        data = piece.data.strip()
        if encoder.encode(data) != encoder.encode_special(data):
            before, _, after = piece.text.partition(data)
            return [*encoder.encode_special(before), *encoder.encode(data), *encoder.encode_special(after)]
        return encoder.encode_special(piece.text)
    writes_blanks = encoder.encode("a b") == encoder.encode("a") + encoder.encode("b")
    return _plain_ids(piece.text[piece.joined and writes_blanks :], encoder, template)


def _plain_ids(text, encoder, template):
    marks = [mark for mark in template.special_tokens if encoder.encode(mark) == encoder.encode_special(mark)]
    for mark in marks:
        if mark in text:
            cut = text.index(mark) + 1
            return _plain_ids(text[:cut], encoder, template) + _plain_ids(text[cut:], encoder, template)
    return encoder.encode(text)
