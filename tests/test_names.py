"""Laws of errors about names: short, the nearest name first, and then where all of them are."""

import pytest

from gradcodec.distributed.coding import named_codec
from gradcodec.distributed.plan import Plan
from gradcodec.errors import ConfigError
from gradcodec.names import FEW, nearest, wrong_name

MANY = [f"name{i}" for i in range(FEW + 1)]


def test_the_nearest_name_stands_before_the_list() -> None:
    text = wrong_name("a fruit", "aple", ["pear", "apple", "plum"])
    assert text == (
        "expected a fruit, got 'aple'; did you mean 'apple'? there are 'pear', 'apple', 'plum'"
    )


def test_many_names_are_not_listed() -> None:
    assert wrong_name("a name", "zz", MANY, "see there") == "expected a name, got 'zz'; see there"


def test_few_names_are_listed_wherever_all_are() -> None:
    assert wrong_name("a name", "zz", MANY[:2], "see there").endswith("there are 'name0', 'name1'")


@pytest.mark.parametrize(
    ("name", "found"),
    [("INT4", ["int4"]), ("low-rank", ["lowrank"]), ("", []), (4, []), (None, [])],
)
def test_near_is_what_looks_alike(name: object, found: list[str]) -> None:
    assert nearest(name, ("int4", "lowrank", "auto")) == found


@pytest.mark.parametrize(("name", "meant"), [("low-rank", "lowrank"), ("Auto", "auto")])
def test_a_scheme_of_ddp_is_suggested_where_it_is_taken(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"got '{name}'; did you mean '{meant}'"):
        Plan({"w": (4,)}, name, 0, [])
    with pytest.raises(ConfigError, match=f"got '{name}'; `gradcodec info`"):
        named_codec(name)
