"""Results made a second time: held against the interval that the first ones stated."""

import json

import pytest

from experiments import report
from experiments.common import report_again as again
from experiments.common.claims_all import every
from experiments.common.report_findings import judge
from experiments.common.report_read import ReportError
from tests.experiments import made_results as made
from tests.experiments.test_report import quiet

CLAIMS = {c.id: c for c in every()}
GAPS = [0.05, 0.06, 0.055]
RULE = {
    "config": {"params": 1e9, "precision": "float32", "devices": 1},
    "total": 24e9,
    "bytes_per_device": {"trained": 24e9},
}


def verdict(claim, results):
    (finding,) = judge(CLAIMS[claim], results).findings
    return finding.verdict


@pytest.mark.parametrize(
    ("gaps", "kind"),
    [
        (GAPS, again.SAME),
        ([0.05, 0.061, 0.055], again.WITHIN),
        ([0.1, 0.12, 0.11], again.OUTSIDE),
        ([0.01, -0.02, 0.0], again.OUTSIDE),
    ],
)
def test_the_interval_stated_first_decides(gaps, kind):
    plus = made.plus
    assert again.compared(verdict("5b", plus(GAPS)), verdict("5b", plus(gaps))) == kind


def test_an_interval_of_today_does_not_widen_the_first():
    wide = [0.3, -0.3, 0.3]
    assert again.compared(verdict("5b", made.plus(GAPS)), verdict("5b", made.plus(wide))) == (
        again.OUTSIDE
    )
    # And the other way round: what was not decided has an interval as well.
    assert again.compared(verdict("5b", made.plus(wide)), verdict("5b", made.plus(GAPS))) == (
        again.WITHIN
    )


def test_what_has_no_interval_is_compared_by_its_figures():
    one, other = verdict("5b", made.plus([0.05])), verdict("5b", made.plus([0.06]))
    assert again.compared(one, one) == again.SAME
    assert again.compared(one, other) == again.NONE
    rule, more = (
        verdict("9c", [made.result("memory/rule", **RULE | {"total": t})]) for t in (24e9, 24.1e9)
    )
    wrong = verdict("9c", [made.result("memory/rule", **RULE | {"total": 30e9})])
    assert again.compared(rule, rule) == again.SAME
    assert again.compared(rule, more) == again.ALSO
    assert again.compared(rule, wrong) == again.OTHER


def write(folder, day, **data):
    folder.mkdir(parents=True)
    about = {"machine": {"date": day, "processor": "P", "cores": 2}, "versions": {"jax": "0.1"}}
    (folder / "result.json").write_text(json.dumps(about | data))


def test_the_page_tells_what_was_made_again(tmp_path):
    results, later = tmp_path / "results", tmp_path / "again"
    write(results / "memory" / "rule", "2026-01-02", **RULE)
    write(results / "zero_like" / "a", "2026-01-02", seconds=1.5)
    config = report.Config(results, tmp_path / "page")
    report.main(config, quiet())
    assert "on another day" not in (tmp_path / "page.md").read_text()
    write(later / "memory" / "rule", "2026-01-03", **RULE)
    write(later / "zero_like" / "a", "2026-01-03", seconds=2.5)
    report.main(config, quiet())  # the folder beside the results, without being named
    for page in ("page.md", "page.html"):
        text = (tmp_path / page).read_text()
        assert f"2026-01-03, {again.SAME}" in text
        assert "1 findings; the same figures: 1." in text
        assert "made again 2026-01-03" in text
        assert "2.5" in text
    file = later / "memory" / "rule" / "result.json"
    file.write_text(file.read_text().replace("24000", "30000"))
    with pytest.raises(ReportError, match="page.md is not as the results are"):
        report.main(report.Config(results, tmp_path / "page", check=True), quiet())


def test_a_finding_of_several_files_waits_for_all_of_them():
    results = made.precision("bfloat16 alone", 1)([0.1, 0.2])
    judged = [judge(CLAIMS["8c"], results)]
    (part,) = again.held(judged, {results[0].name: results[0]})[0].findings
    assert part.again is None
    (whole,) = again.held(judged, {r.name: r for r in results})[0].findings
    assert whole.again.kind == again.SAME
    assert again.summary(again.held(judged, {r.name: r for r in results}))
    assert not again.summary(judged)


def test_what_was_never_there_cannot_be_made_again(tmp_path):
    write(tmp_path / "results" / "memory" / "rule", "2026-01-02", **RULE)
    write(tmp_path / "other" / "memory" / "rul", "2026-01-03", **RULE)
    config = report.Config(tmp_path / "results", tmp_path / "page", tmp_path / "other")
    with pytest.raises(ReportError, match=r"rul/result.json is no result made again"):
        report.main(config, quiet())
    with pytest.raises(ReportError, match="nothing is no folder"):
        report.main(report.Config(config.results, config.out, tmp_path / "nothing"), quiet())
