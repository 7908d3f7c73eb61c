import pytest

from snella_app.methods.method import check_by, integer, number, one_of

CHECK = check_by(
    {
        "r": integer(),
        "rate": number(0, 1),
        "scale": number(),
        "kind": one_of("a", "b"),
    }
)


def test_valid_and_missing_values_pass():
    assert CHECK({}) == []
    assert CHECK({"r": 1, "rate": 0, "scale": 1e9, "kind": "b"}) == []


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("r", 0, "r must be an integer of at least 1, got 0"),
        ("r", True, "r must be an integer of at least 1, got True"),
        ("r", "8", "r must be an integer of at least 1, got '8'"),
        ("rate", 1.0, "rate must be a number in [0, 1), got 1.0"),
        ("scale", float("nan"), "scale must be a finite number of at least 0, got nan"),
        ("kind", "c", "kind must be one of 'a', 'b', got 'c'"),
    ],
)
def test_an_invalid_value_is_reported_with_the_requirement(name, value, error):
    assert CHECK({name: value}) == [error]


def test_all_errors_are_reported_together():
    assert len(CHECK({"r": -1, "kind": 3})) == 2
