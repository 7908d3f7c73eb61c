import pytest

from snella_app.text import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one line"), "one line"),
        (OSError("\n first line\nsecond line"), "first line"),
        (RuntimeError(), "RuntimeError"),
        (KeyError(" \n "), "' \\n '"),
        (TimeoutError(" \n "), "TimeoutError"),
    ],
)
def test_the_first_line_of_an_empty_message_is_the_name_of_the_error_type(error, line):
    assert first_line(error) == line
