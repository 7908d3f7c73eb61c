"""The report page in a real browser: what it asks for, what it shows, whether people can read it."""

import pytest

from snella.report.report import write_report

from ..browser import CONTRAST, FAULTY_TEXTS, SMALLEST_TEXT

SECTIONS = [
    *("results", "comparison", "confusion", "ranking", "examples", "use"),
    *("curves", "update", "sparsity", "budgets", "importance", "matrices", "configuration"),
]


def test_the_page_shows_all_sections_and_pictures_and_asks_the_network_for_nothing(browser, compared_report):
    browser.open(compared_report)
    assert browser.evaluate("[...document.querySelectorAll('section')].map(s => s.id)") == SECTIONS
    widths = browser.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert len(widths) == 24
    assert min(widths) > 0
    assert browser.evaluate("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 200)")
    assert browser.complaints() == []
    assert [url for url in browser.requested() if not url.startswith("data:")] == [compared_report.resolve().as_uri()]
    assert browser.evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))") == []


def test_a_page_that_asks_for_something_is_noticed(browser, compared_report, tmp_path):
    text = compared_report.read_text(encoding="utf-8")
    asking = tmp_path / "asking.html"
    asking.write_text(text.replace("</main>", '<img src="missing.png" alt=""></main>'), encoding="utf-8")
    assert any("Content Security Policy" in str(entry) for entry in browser.open(asking).complaints())


@pytest.mark.parametrize("width", [1200, 768, 400])
def test_no_text_is_cut_or_covered_or_tiny_at_any_width(browser, compared_report, width):
    browser.open(compared_report, width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(FAULTY_TEXTS) == []
    assert browser.evaluate(SMALLEST_TEXT) >= 8.5


@pytest.mark.parametrize(("width", "is_shown"), [(390, True), (1280, False)])
def test_a_narrow_screen_says_where_to_scroll(browser, compared_report, width, is_shown):
    browser.open(compared_report, width)
    hints = "[...document.querySelectorAll('#sparsity .sideways')].map(e => e.getBoundingClientRect().height > 0)"
    assert browser.evaluate(hints) == [is_shown]
    overflows = "(e => e.scrollWidth > e.clientWidth)(document.querySelector('#sparsity .scroll'))"
    assert browser.evaluate(overflows) or not is_shown


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_the_ground_in_both_modes(browser, compared_report, dark):
    browser.open(compared_report, dark=dark)
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(17, 21, 27)") == dark
    assert browser.evaluate(CONTRAST) >= 4.5
    ink = browser.evaluate("getComputedStyle(document.querySelector('#curves svg text')).fill")
    assert ink == ("rgb(230, 234, 240)" if dark else "rgb(28, 37, 49)")


@pytest.mark.parametrize("n", [2, 10, 37, 120])
def test_confusion_matrices_are_readable_for_few_and_for_many_classes(browser, run, n):
    names = [f"a rather long class name, number {i}" if i % 2 else f"c{i}" for i in range(n)]
    report = write_report(run.finished(classes=names, method="lora", images=50 * n).folder)
    for width in (1200, 400):
        browser.open(report, width)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(FAULTY_TEXTS) == []
        assert browser.evaluate(SMALLEST_TEXT) >= 8.5


def test_names_that_look_like_markup_stay_text(browser, run):
    evil = "<img src=x onerror='document.title=1'>"
    run.finished(classes=(evil, "--></svg><script>document.title = 2</script>"), method="lora")
    report = write_report(run.folder)
    browser.open(report)
    assert browser.evaluate("document.title") == "lora on elpv · snella report"
    assert browser.evaluate("document.scripts.length + document.images.length") == 0
    assert browser.evaluate("document.querySelector('#confusion tbody th').textContent") == evil
    assert browser.complaints() == []


def test_the_table_of_matrices_opens(browser, compared_report):
    browser.open(compared_report)
    assert browser.evaluate("document.querySelector('#matrices table').checkVisibility()") is False
    browser.evaluate("document.querySelector('#matrices summary').click()")
    assert browser.evaluate("document.querySelector('#matrices table').checkVisibility()") is True
    assert browser.evaluate("document.querySelectorAll('#matrices tbody tr').length") == 72
