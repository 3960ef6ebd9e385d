import math

import pytest
import torch

from storage.canonical import NotJson, canonical_json


def test_keys_are_sorted_and_text_stays_as_it_is():
    assert canonical_json({"b": [1, 2.5, None], "a": "ε"}, "x") == '{"a":"ε","b":[1,2.5,null]}'


def test_tuples_and_lists_are_the_same_document():
    assert canonical_json((1, (2,)), "x") == canonical_json([1, [2]], "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": math.nan}}, r"recipe\.a\.b must be a finite number, got nan"),
        ({"a": [0, math.inf]}, r"recipe\.a\[1\] must be a finite number, got inf"),
        ({"a": torch.zeros(2)}, r"recipe\.a must be JSON .*, got a Tensor"),
        ({1: "a"}, r"recipe has the key 1, and keys must be strings"),
        ({"a": {1, 2}}, r"recipe\.a must be JSON .*, got a set"),
        ({"a": "\ud800"}, r"recipe\.a must be text that UTF-8 can write"),
    ],
)
def test_what_is_not_json_is_refused_where_it_stands(value, message):
    with pytest.raises(NotJson, match=message):
        canonical_json(value, "recipe")
