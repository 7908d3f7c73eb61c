"""The report page in a real browser: requests, content and readability."""

import pytest

from snella_app.report.report import write_report
from tests.browser import CLIPPED_OR_OVERLAPPING_TEXT, CONTRAST, MIN_FONT_SIZE

SECTIONS = ["results", "comparison", "confusion", "examples", "use", "curves", "ranking", "method", "configuration"]
OPEN_ALL = "document.querySelectorAll('details').forEach(details => details.open = true)"


def test_the_page_loads_no_external_resources(browser, compared_report):
    browser.open(compared_report)
    browser.evaluate(OPEN_ALL)
    assert browser.evaluate("[...document.querySelectorAll('section')].map(s => s.id)") == SECTIONS
    widths = browser.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert len(widths) == 24
    assert min(widths) > 0
    assert browser.evaluate("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 200)")
    assert browser.issues() == []
    urls = [url for url in browser.requested_urls() if not url.startswith("data:")]
    assert urls == [compared_report.resolve().as_uri()]
    assert browser.evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))") == []


def test_external_requests_are_detected(browser, compared_report, tmp_path):
    text = compared_report.read_text(encoding="utf-8")
    requesting = tmp_path / "requesting.html"
    requesting.write_text(text.replace("</main>", '<img src="missing.png" alt=""></main>'), encoding="utf-8")
    assert any("Content Security Policy" in str(entry) for entry in browser.open(requesting).issues())


@pytest.mark.parametrize("width", [1200, 768, 400])
def test_text_is_readable_at_any_width(browser, compared_report, width):
    browser.open(compared_report, width)
    browser.evaluate(OPEN_ALL)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CLIPPED_OR_OVERLAPPING_TEXT) == []
    assert browser.evaluate(MIN_FONT_SIZE) >= 8.5


@pytest.mark.parametrize(("width", "is_shown"), [(390, True), (1280, False)])
def test_a_narrow_screen_shows_scroll_hints(browser, compared_report, width, is_shown):
    browser.open(compared_report, width)
    browser.evaluate(OPEN_ALL)
    hints = "[...document.querySelectorAll('#sparsity .sideways')].map(e => e.getBoundingClientRect().height > 0)"
    assert browser.evaluate(hints) == [is_shown]
    overflows = "(e => e.scrollWidth > e.clientWidth)(document.querySelector('#sparsity .scroll'))"
    assert browser.evaluate(overflows) or not is_shown


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast_in_both_modes(browser, compared_report, dark):
    browser.open(compared_report, dark=dark)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(17, 21, 27)") == dark
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
        assert browser.evaluate(CLIPPED_OR_OVERLAPPING_TEXT) == []
        assert browser.evaluate(MIN_FONT_SIZE) >= 8.5


def test_names_are_escaped(browser, run):
    evil = "<img src=x onerror='document.title=1'>"
    run.finished(classes=(evil, "--></svg><script>document.title = 2</script>"), method="lora")
    report = write_report(run.folder)
    browser.open(report)
    assert browser.evaluate("document.title") == "lora on elpv · snella report"
    assert browser.evaluate("[document.scripts.length, document.images.length]") == [1, 0]  # copy buttons
    assert browser.evaluate("document.querySelector('#confusion tbody th').textContent") == evil
    assert browser.issues() == []


def test_method_details_are_collapsed_until_their_link_is_followed(browser, compared_report):
    browser.open(compared_report)
    shown = "document.querySelector('#sparsity').checkVisibility()"
    assert browser.evaluate(shown) is False
    browser.evaluate("location.hash = '#sparsity'")
    assert browser.evaluate(shown) is True
    assert browser.evaluate("document.querySelector('#matrices table').checkVisibility()") is False
    browser.evaluate("document.querySelector('#matrices summary').click()")
    assert browser.evaluate("document.querySelector('#matrices table').checkVisibility()") is True
    assert browser.evaluate("document.querySelectorAll('#matrices tbody tr').length") == 72


def test_every_code_block_has_a_copy_button(browser, compared_report):
    browser.open(compared_report)
    codes = browser.evaluate("[...document.querySelectorAll('#use pre')].map(pre => pre.textContent)")
    assert len(codes) == 7 and browser.evaluate("document.querySelectorAll('#use .code > button').length") == 7
    copied = browser.evaluate("""
        (async () => { const texts = []
          navigator.clipboard.writeText = async text => { texts.push(text) }
          for (const button of document.querySelectorAll('#use button')) button.click()
          await new Promise(done => setTimeout(done, 50))
          return [texts, [...document.querySelectorAll('#use button')].map(button => button.textContent)] })()""")
    assert copied == [codes, ["Copied"] * 7]
    assert browser.issues() == []


def test_other_scripts_are_blocked(browser, compared_report, tmp_path):
    text = compared_report.read_text(encoding="utf-8")
    changed = tmp_path / "changed.html"
    changed.write_text(text.replace("</main>", "</main><script>document.title = 'ran'</script>"), encoding="utf-8")
    browser.open(changed)
    assert browser.evaluate("document.title") == "snella on elpv · snella report"
    assert any("Content Security Policy" in str(entry) for entry in browser.issues())


@pytest.mark.parametrize("width", [390, 1280])
def test_the_headline_score_has_the_largest_font_and_is_on_the_first_screen(browser, compared_report, width):
    browser.open(compared_report, width)
    sizes = browser.evaluate("""
        [...document.querySelectorAll('#results .value')].filter(e => e.checkVisibility())
          .map(e => parseFloat(getComputedStyle(e).fontSize))""")
    assert sizes[0] >= 2 * max(sizes[1:])
    box = "(b => [b.left, b.right, b.bottom])(document.querySelector('.hero .value').getBoundingClientRect())"
    left, right, bottom = browser.evaluate(box)
    assert left >= 0 and right <= width and bottom <= 900
