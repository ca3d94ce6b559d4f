"""Messages for users."""

import pytest

from finetune.errors import UserError, list_some


@pytest.mark.parametrize(
    ("num_items", "separator", "text"),
    [
        (0, "; ", ""),
        (1, "; ", "a"),
        (3, "; ", "a; b; c"),
        (4, "; ", "a; b; c; and 1 more"),
        (9, "; ", "a; b; c; and 6 more"),
        (3, ", ", "a, b, c"),
        (5, ", ", "a, b, c and 2 more"),
    ],
)
def test_a_long_list_is_cut_and_counted(num_items, separator, text):
    assert list_some(list("abcdefghi")[:num_items], 3, separator=separator) == text


def test_one_message_or_several():
    assert UserError("a").faults == ("a",)
    error = UserError(["a", "b"])
    assert error.faults == ("a", "b") and str(error) == "a\nb"
