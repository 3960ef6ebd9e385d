"""A stranger's regular expression is taken only where matching it ends."""

import pytest

from clients.patterns import odd_pattern
from strategies.cores import CORE_AND_HEAD
from strategies.tensors import A_AND_HEAD, ALL_TRAINED, B_AND_HEAD

OWN = [
    "",
    ALL_TRAINED,
    A_AND_HEAD,
    B_AND_HEAD,
    CORE_AND_HEAD,
    r".*\.lora_B\..*",
    rf"(?!.*\.past_[AB]\.weight$){ALL_TRAINED}",
    "q_proj|v_proj",
    r"layer\.[0-3]\.(query|value)",
    r"(0|1|2|3|4)\.(query|key|value)",
    "head\\..*",
]


@pytest.mark.parametrize("pattern", OWN)
def test_what_weft_says_itself_is_taken(pattern):
    assert odd_pattern(pattern) == ""


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(a*)*b", "repeats what is in parentheses"),
        ("(a|a)+b", "repeats what is in parentheses"),
        ("(?:a|aa){30}", "repeats what is in parentheses"),
        ("(?=(a+))*b", "repeats what is in parentheses"),
        ("a?" * 30 + "a" * 30, "in a row"),
        ("(a|a)" * 30 + "b", "in a row"),
        (".*" * 9 + "x", "in a row"),
        (r"(.*)\1", "refers to what it matched"),
        ("(?P<x>a*)(?P=x)", "refers to what it matched"),
        ("(?x)( a * ) *", "sets flags"),
        ("x" * 1001, "letters"),
        ("[", "no regular expression"),
        ("a{1,99999999999999999999}", "no regular expression"),
    ],
)
def test_what_may_take_for_ever_is_not(pattern, why):
    assert why in odd_pattern(pattern)
