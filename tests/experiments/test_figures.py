"""The README's figures are those of the committed results."""

import pytest

from experiments import figures


def test_the_readme_holds_the_results_as_they_are():
    assert figures.main(figures.Config(check=True)) == 0


def test_a_page_that_differs_is_told_and_mended(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: peers -->\nold\n<!-- end -->\nafter\n")
    assert figures.main(figures.Config(page, check=True)) == 1
    assert "old" in page.read_text()
    assert figures.main(figures.Config(page)) == 0
    text = page.read_text()
    assert "32x64 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_an_unknown_table_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- figures: nothing -->\n<!-- end -->\n")
    with pytest.raises(figures.FiguresError, match="no table 'nothing'"):
        figures.main(figures.Config(page))
