import pytest

from snella_app.text import bytes_text, count_text, decimal_text, first_line, measure_text, seconds_text


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


def test_numbers_that_round_up_to_the_next_unit_use_it():
    counts = {999_499: "999 k", 999_500: "1.00 M", 999_499_999: "999 M", 999_600_000: "1.00 G"}
    durations = {59.94: "59.9 s", 59.96: "1 min 0 s", 3_599.4: "59 min 59 s", 3_599.6: "1 h 0 min"}
    sizes = {1023.4: "1023 B", 1023.6: "1.00 KiB", 2**20 - 1: "1.00 MiB", 2**30 - 1: "1.00 GiB", 2**20: "1.00 MiB"}
    assert {size: bytes_text(size).replace("\xa0", " ") for size in sizes} == sizes
    assert {count: count_text(count).replace("\xa0", " ") for count in counts} == counts
    assert {seconds: seconds_text(seconds).replace("\xa0", " ") for seconds in durations} == durations


def test_numbers_have_no_negative_zero():
    assert (decimal_text(-0.0, 1), measure_text(-0.0)) == ("0.0", "0")
