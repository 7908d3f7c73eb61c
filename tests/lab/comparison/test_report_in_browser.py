"""Layout of the report in a browser, for complete and partial results."""

import pytest

from snella_lab.comparison.report import write_page
from snella_lab.comparison.summary import summarize
from tests.browser import CLIPPED_OR_OVERLAPPING_TEXT, MIN_FONT_SIZE


@pytest.fixture(scope="module", params=["complete", "partial"])
def page(request, tmp_path_factory):
    """Write the report of all rows, or of a subset with missing results."""
    experiment, rows = request.getfixturevalue("large_once")
    if request.param == "partial":
        tasks = {"fashion", "elpv"}
        rows = [row for row in rows if row.task_name in tasks or row.experiment_name in ("lora-8", "linear")]
    return write_page(tmp_path_factory.mktemp(request.param), summarize(experiment, rows))


@pytest.mark.parametrize("width", [1200, 768, 400])
def test_text_is_neither_clipped_nor_covered_nor_tiny(browser, page, width):
    browser.open(page, width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CLIPPED_OR_OVERLAPPING_TEXT) == []
    assert browser.evaluate(MIN_FONT_SIZE) >= 8.5


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_zero_line_is_visible_and_headings_are_separated(browser, page, width):
    browser.open(page, width)
    zeros = browser.evaluate("""
        [...document.querySelectorAll('#differences svg.figure')].filter(svg => svg.checkVisibility()).map(svg => {
          const zero = [...svg.querySelectorAll('text')].find(t => t.textContent.trim() === '0').getBoundingClientRect()
          const frame = svg.closest('.scroll').getBoundingClientRect()
          return [zero.left - frame.left, frame.right - zero.right] })""")
    assert len(zeros) == 1 and min(zeros[0]) >= 0
    gap = browser.evaluate("""
        Math.min(...[...document.querySelectorAll('#accuracy table.scores thead')].filter(h => h.checkVisibility())
          .flatMap(head => [...head.querySelectorAll('th')].map(th => {
            const range = document.createRange(); range.selectNodeContents(th); return range.getBoundingClientRect() })
            .map((box, i, all) => i ? box.left - all[i - 1].right : Infinity)))""")
    assert gap >= 12


@pytest.mark.parametrize(("width", "is_shown"), [(390, True), (1280, False)])
def test_narrow_screens_show_scroll_hints(browser, table_page, width, is_shown):
    browser.open(table_page[0], width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    shown = "[...document.querySelectorAll('.sideways')].filter(hint => hint.checkVisibility()).length > 0"
    assert browser.evaluate(shown) == is_shown
    without_hint = """
        [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)
          .filter(e => !e.nextElementSibling?.checkVisibility() || !e.nextElementSibling.matches('.sideways'))
          .map(e => e.getAttribute('aria-label'))"""
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate(without_hint) == []


def test_scores_are_visible_on_narrow_screens_without_scrolling(browser, page, table_page):
    for path in (page, table_page[0]):
        browser.open(path, 390)
        cut = browser.evaluate("""
            [...document.querySelectorAll('#accuracy table.scores')].filter(table => table.checkVisibility())
              .flatMap(table => { const frame = table.closest('.scroll').getBoundingClientRect()
                return [...table.rows].map(row => row.cells[1].getBoundingClientRect().right - frame.right) })""")
        assert cut and max(cut) <= 0


def test_long_task_names_wrap_between_their_parts(browser, table_page):
    browser.open(table_page[0], 390)
    lines = browser.evaluate("""
        (() => { const th = document.querySelector('#accuracy table.scores thead th:nth-child(2)'), lines = []
          const texts = document.createTreeWalker(th, NodeFilter.SHOW_TEXT)
          while (texts.nextNode()) { const range = document.createRange(); range.selectNode(texts.currentNode)
            lines.push([texts.currentNode.data, range.getClientRects().length]) }
          return lines })()""")
    assert "".join(text for text, _ in lines) == "csv:people/photographs_and_labels.csv"
    assert [text for text, count in lines if count != 1] == []
    first = "document.querySelector('#accuracy table.scores thead th')"
    assert browser.evaluate(f"[{first}.textContent, getComputedStyle({first}).whiteSpace]") == ["method", "nowrap"]


def test_report_makes_no_requests_and_logs_no_errors(browser, page):
    browser.open(page)
    assert browser.issues() == []
    assert [url for url in browser.requested_urls() if not url.startswith("data:")] == [page.resolve().as_uri()]
