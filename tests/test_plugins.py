"""The registry: how plug-ins are found, and what their options may be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from strategies.plugins import BadOptions, Family, Form, Option, Plugin, Range, UnknownPlugin

O_LORA = '''
"""Orthogonal subspaces.

Source: arXiv 2310.14152.
"""
from dataclasses import dataclass
from typing import Annotated
from strategies.plugins import Range

class Helper:
    """Not a plug-in: its name is not the module's."""

@dataclass(frozen=True)
class OLoRA:
    """Keeps tasks orthogonal.

    More about it.
    """

    weight: Annotated[float, Range(0)] = 0.5
'''
MANY = """
from strategies.plugins import Option, Plugin

def plugins():
    for name in ("zeta", "alpha"):
        yield Plugin("gadget", name, dict, "Makes a dict.", explicit_options=(Option("r", int, 8),))
"""
SCALE = '''
def scale(values, factor: int = 2):
    """Multiply."""
    return [factor * v for v in values]
'''


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Return a family over a folder of the given modules, importable under a name of its own."""

    def make(entry_points="", context=(), **modules):
        package = f"gadgets_{tmp_path.name.replace('-', '_')}"
        (tmp_path / package).mkdir()
        for name, source in {"__init__": "", **modules}.items():
            (tmp_path / package / f"{name}.py").write_text(source)
        if entry_points:
            info = tmp_path / f"{package}-1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
            (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(tmp_path)
        return Family("gadget", package, context)

    return make


@pytest.fixture
def o_lora(family):
    return family(o_lora=O_LORA).get("o-lora")


# finding


def test_a_module_is_found_by_the_callable_that_is_named_like_it(o_lora):
    assert (o_lora.kind, o_lora.name, o_lora.summary, o_lora.source) == (
        "gadget",
        "o-lora",
        "Keeps tasks orthogonal.",
        "2310.14152",
    )


@pytest.mark.parametrize("name", ["o-lora", "o_lora", "O-LoRA"])
def test_underscores_and_case_of_a_name_do_not_matter(family, name):
    assert family(o_lora=O_LORA).get(name).name == "o-lora"


def test_a_module_without_a_plugin_is_passed_over(family):
    assert family(o_lora=O_LORA, tensors="def norm(): ...").names() == ("o-lora",)


def test_what_a_module_imports_is_not_its_plugin(family):
    found = family(counter="from collections import Counter", o_lora=O_LORA)
    assert found.names() == ("o-lora",)


def test_one_module_may_stand_for_many(family):
    found = family(many=MANY)
    assert found.names() == ("alpha", "zeta")
    assert found.get("zeta").build() == {"r": 8}


def test_an_installed_entry_point_is_found(family, tmp_path):
    (tmp_path / "elsewhere.py").write_text(MANY)
    found = family("[weft.gadget]\nelsewhere = elsewhere\n", o_lora=O_LORA)
    assert found.names() == ("alpha", "o-lora", "zeta")


def test_an_entry_point_of_another_kind_is_not_found(family, tmp_path):
    (tmp_path / "elsewhere.py").write_text(MANY)
    assert family("[weft.widget]\nelsewhere = elsewhere\n", o_lora=O_LORA).names() == ("o-lora",)


def test_two_plugins_of_one_name_are_an_error(family):
    with pytest.raises(RuntimeError, match="two plug-ins are called gadget 'zeta'"):
        family(many=MANY, more=MANY).names()


def test_an_unknown_name_gets_the_nearest(family):
    with pytest.raises(UnknownPlugin, match="no gadget is called 'o-lorra'; did you mean 'o-lora'"):
        family(o_lora=O_LORA).get("o-lorra")


def test_a_name_near_to_none_gets_the_list(family):
    with pytest.raises(UnknownPlugin, match=r"no gadget is called 'xyz' \(alpha, zeta\)"):
        family(many=MANY).get("xyz")


# checking options


@dataclass(frozen=True)
class Gadget:
    size: int
    rate: Annotated[float, Range(0, 1, open_low=True)] = 0.5
    rank: Annotated[int | None, Range(1)] = None
    mode: Literal["soft", "hard", 1] = "soft"
    names: Sequence[str] = ()
    pair: tuple[int, ...] = (1, 2)
    table: Mapping[str, float] | None = None
    flag: bool = False
    anything: Any = None


GADGET = Plugin("gadget", "gadget", Gadget, "A gadget.")


def test_defaults_are_filled_in():
    assert GADGET.check({"size": 3}) == {
        "size": 3,
        "rate": 0.5,
        "rank": None,
        "mode": "soft",
        "names": (),
        "pair": (1, 2),
        "table": None,
        "flag": False,
        "anything": None,
    }


@pytest.mark.parametrize(
    ("option", "given", "parsed"),
    [
        ("rate", 1, 1.0),
        ("rank", 4, 4),
        ("rank", None, None),
        ("mode", "hard", "hard"),
        ("mode", 1, 1),
        ("names", ["a", "b"], ["a", "b"]),
        ("pair", [3, 4], (3, 4)),
        ("table", {"x": 1}, {"x": 1.0}),
        ("flag", True, True),
        ("anything", {1, 2}, {1, 2}),
    ],
)
def test_a_value_of_the_type_is_taken(option, given, parsed):
    result = GADGET.check({"size": 3, option: given})[option]
    assert result == parsed
    assert type(result) is type(parsed)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("size", "3", "size must be int, got '3'"),
        ("size", True, "size must be int, got True"),
        ("size", 3.0, "size must be int, got 3.0"),
        ("rate", "fast", "rate must be float > 0 and <= 1, got 'fast'"),
        ("rate", False, "rate must be float > 0 and <= 1, got False"),
        ("rate", 0, "rate must be > 0 and <= 1, got 0"),
        ("rate", 1.01, "rate must be > 0 and <= 1, got 1.01"),
        ("rate", float("nan"), "rate must be > 0 and <= 1, got nan"),
        ("rank", 0, "rank must be >= 1, got 0"),
        ("rank", 1.5, "rank must be int or null >= 1, got 1.5"),
        ("mode", "sort", "mode must be one of 'soft', 'hard', 1, got 'sort'"),
        ("mode", True, "mode must be one of 'soft', 'hard', 1, got True"),
        ("names", "ab", "names must be list of str, got 'ab'"),
        ("names", [1], r"names must be list of str, got \[1\]"),
        ("table", {"x": "y"}, "table must be mapping or null, got"),
        ("flag", 1, "flag must be bool, got 1"),
    ],
)
def test_a_value_of_another_type_or_range_is_refused(option, value, message):
    with pytest.raises(BadOptions, match=f"gadget 'gadget': {message}"):
        GADGET.check({"size": 3, option: value})


def test_an_unknown_option_gets_the_nearest_and_the_list():
    message = r"gadget 'gadget' has no option 'raet'; did you mean 'rate'\? \(options: size, rate, "
    with pytest.raises(BadOptions, match=message):
        GADGET.check({"size": 3, "raet": 0.1})


def test_a_missing_option_is_named_with_its_type():
    with pytest.raises(BadOptions, match=r"gadget 'gadget' needs the option 'size' \(int\)"):
        GADGET.check({})


def test_a_plugin_without_options_says_so(family):
    plugin = family(f="def f():\n    '''Nothing.'''\n").get("f")
    with pytest.raises(BadOptions, match=r"has no option 'x' \(options: none\)"):
        plugin.check({"x": 1})


def test_leading_context_is_no_option(family):
    plugin = family(context=("values",), scale=SCALE).get("scale")
    assert list(plugin.options) == ["factor"]
    assert plugin.build([1, 2], factor=3) == [3, 6]


OUTER = """
from dataclasses import dataclass
from typing import Annotated, Any
from strategies.plugins import Nested

@dataclass(frozen=True)
class Outer:
    'Wraps another.'

    inner: Annotated[Any, Nested()] = "o-lora"
"""


def test_a_nested_plugin_is_checked_with_its_options_and_built(family):
    outer = family(outer=OUTER, o_lora=O_LORA).get("outer")
    assert outer.check({}) == {"inner": {"name": "o-lora", "weight": 0.5}}
    deep = {"name": "outer", "inner": {"name": "O_LoRA", "weight": 2}}
    assert outer.check({"inner": deep})["inner"]["inner"] == {"name": "o-lora", "weight": 2.0}
    assert outer.build(inner=deep).inner.inner.weight == 2.0
    assert outer.check(outer.check({})) == outer.check({})


INSTANCE = """
from dataclasses import dataclass
from typing import Annotated, Any
from .o_lora import OLoRA
from strategies.plugins import Nested

_DEFAULT = OLoRA(weight=0.25)

@dataclass(frozen=True)
class Wrapper:
    'Wraps another.'

    inner: Annotated[Any, Nested()] = _DEFAULT
"""


def test_a_nested_default_that_is_built_already_is_told_as_it_would_be_written(family):
    wrapper = family(wrapper=INSTANCE, o_lora=O_LORA).get("wrapper")
    assert wrapper.options["inner"].default == {"name": "o-lora", "weight": 0.25}
    assert wrapper.build() == wrapper.factory()


def test_a_text_of_another_form_is_refused():
    form = Form("all|label:.+", "all or label:NAME")
    option = Option("who", str, "all", form=form)
    assert option.parse("label:ward") == "label:ward"
    assert option.describe_type() == "all or label:NAME"
    with pytest.raises(BadOptions, match="who must be all or label:NAME, got 'some'"):
        option.parse("some")


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (3, "gadget 'outer': 3 names no gadget"),
        ({"weight": 1}, "names no gadget"),
        ("o-lorra", "did you mean 'o-lora'"),
        ({"name": "o-lora", "weight": -1}, "weight must be >= 0"),
        ({"name": "o-lora", "wieght": 1}, "did you mean 'weight'"),
    ],
)
def test_a_nested_plugin_that_is_wrong_is_refused(family, inner, message):
    with pytest.raises(BadOptions, match=message):
        family(outer=OUTER, o_lora=O_LORA).get("outer").check({"inner": inner})


def test_build_returns_what_the_factory_makes():
    assert GADGET.build(size=3, rate=1) == Gadget(size=3, rate=1.0)


def test_a_combination_that_the_factory_refuses_is_a_bad_option():
    def factory(low: int = 0, high: int = 1) -> None:
        raise ValueError(f"low must be below high, got {low} and {high}")

    plugin = Plugin("gadget", "span", factory, "A span.")
    with pytest.raises(BadOptions, match="gadget 'span': low must be below high, got 3 and 1"):
        plugin.build(low=3)


def test_explicit_options_stand_for_the_signature():
    plugin = Plugin("gadget", "open", dict, "Open.", explicit_options=(Option("r", int, 8),))
    assert plugin.build() == {"r": 8}
    with pytest.raises(BadOptions, match="r must be int, got 'x'"):
        plugin.check({"r": "x"})


# ranges


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text"),
    [
        (Range(0), [0, 5], [-1], ">= 0"),
        (Range(0, open_low=True), [0.1], [0, -1], "> 0"),
        (Range(0, 1, open_high=True), [0, 0.99], [1, -0.1], ">= 0 and < 1"),
        (Range(high=4), [-100, 4], [5], "<= 4"),
    ],
)
def test_ranges_say_what_they_hold(bounds, inside, outside, text):
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)
    assert str(bounds) == text
