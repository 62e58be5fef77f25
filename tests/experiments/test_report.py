"""The report: every result taken up, nothing fetched, errors that name the file."""

import base64
import html
import importlib
import io
import json
import re
import shlex
import shutil

import pytest
import tyro
from rich.console import Console

from experiments import report
from experiments.common.claims_all import every
from experiments.common.command import command
from experiments.common.report import model_title
from experiments.common.report_command import command_of
from experiments.common.report_findings import judge
from experiments.common.report_read import ReportError, read_results
from tests.experiments import made_results as made

RESULTS = report.ROOT / "docs" / "results"
ABOUT = {
    "machine": {"date": "2026-01-02", "processor": "P", "cores": 2},
    "versions": {"jax": "0.1"},
}


@pytest.fixture(scope="module")
def committed():
    return report.made(RESULTS, report.ROOT / "docs" / "report", every())


def write(folder, **data):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(ABOUT | data))
    return folder


def quiet():
    return Console(file=io.StringIO(), width=200)


# -- the page of the committed results ----------------------------------------------------------


def test_every_committed_result_is_taken_up(committed):
    found = {p.parent.relative_to(RESULTS).as_posix() for p in RESULTS.rglob("result.json")}
    used = {r.name for j in committed.judged for f in j.findings for r in f.results}
    assert used | {r.name for r in committed.rest} == found
    for page in (committed.html, committed.markdown):
        assert not [n for n in found if f"docs/results/{n}" not in page]


def test_every_claim_is_there_and_those_not_run_have_their_command(committed):
    text = re.sub(r"<[^>]+>", "", committed.html)
    for j in committed.judged:
        assert html.escape(j.claim.sentence) in committed.html
        assert f'id="claim-{j.claim.id}"' in committed.html
        assert f"claim-{j.claim.id}" in committed.markdown
        assert j.findings
        for f in j.findings:
            if f.verdict is None:
                assert f.command in html.unescape(text)
                assert f.command in committed.markdown
            else:
                assert html.escape(f.verdict.ours) in committed.html


def test_the_committed_page_is_as_the_results_are():
    report.main(report.Config(check=True), quiet())


def test_the_page_needs_no_other_file(committed):
    page = committed.html
    assert re.findall(r"<(script|link|iframe|object|embed|base)\b", page) == []
    assert re.findall(r"@import|url\(", page) == []
    addresses = re.findall(r"""\b(?:src|href|srcset)\s*=\s*["']?([^"'\s>]*)""", page)
    assert len(addresses) > 50
    assert [a for a in addresses if not a.startswith(("#", "data:image/"))] == []
    for target in {a[1:] for a in addresses if a.startswith("#")}:
        assert page.count(f'id="{target}"') == 1
    pictures = re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)
    assert len(pictures) == sum(len(r.pictures) for r in read_results(RESULTS))
    for picture in pictures:
        drawn = base64.b64decode(picture).decode()
        links = re.findall(r"""(?:href|src)=["']([^"']*)""", drawn)
        assert [x for x in links if not x.startswith(("#", "data:"))] == []
        assert "<!DOCTYPE" not in drawn


def test_the_pictures_of_the_markdown_page_are_there(committed):
    links = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", committed.markdown)
    assert links
    assert [x for x in links if not (report.ROOT / "docs" / x).is_file()] == []


def commands(committed):
    for j in committed.judged:
        task = (*j.claim.wanted, "sst2")[0]
        yield from j.claim.command.format(task=task).split("; do ")[-1:]
    for r in read_results(RESULTS):
        yield command_of(r)


def test_every_command_is_one(committed):
    for line in commands(committed):
        found = re.search(r"python -m experiments\.(\w+) ?([^;\n]*)", line)
        module = importlib.import_module(f"experiments.{found[1]}")
        words = shlex.split(found[2].replace("$s", "0"))
        try:
            tyro.cli(module.Config, args=words)
        except SystemExit:
            pytest.fail(f"no such options: {line}")


# -- other folders ------------------------------------------------------------------------------


def test_both_pages_are_written_and_checked(tmp_path):
    write(tmp_path / "results" / "memory" / "rule", config={"params": 1e9, "precision": "float32",
          "devices": 1}, total=24e9, bytes_per_device={"trained": 24e9})  # fmt: skip
    config = report.Config(tmp_path / "results", tmp_path / "out" / "page")
    assert report.main(config, quiet())["reproduced"] == 2  # with the claim that is arithmetic
    assert "24.0 GB for 1,000,000,000 parameters" in (tmp_path / "out" / "page.html").read_text()
    checked = report.Config(config.results, config.out, check=True)
    report.main(checked, quiet())
    (tmp_path / "out" / "page.md").write_text("another")
    with pytest.raises(ReportError, match="page.md is not as the results are"):
        report.main(checked, quiet())


def broken(case, folder):
    if case == "corrupt":
        write(folder).joinpath("result.json").write_text('{"rows": [1, ')
    elif case == "not text":
        write(folder).joinpath("result.json").write_bytes(b"\xff\xfe{")
    elif case == "a list":
        write(folder).joinpath("result.json").write_text("[]")
    elif case == "no machine":
        write(folder).joinpath("result.json").write_text('{"versions": {}}')
    elif case == "only a configuration":
        shutil.move(write(folder) / "result.json", folder / "config.json")
    elif case == "only a picture":
        shutil.move(write(folder) / "result.json", folder / "zero.svg")
    else:
        write(folder, config={"layers": 2}, shares={}, walks={"0": {}})


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("corrupt", "no JSON"),
        ("not text", "no JSON"),
        ("a list", "a result is an object"),
        ("no machine", "lacks 'machine'"),
        ("only a configuration", "absent"),
        ("only a picture", "absent"),
        ("another form", "not of the form that claim 9a reads: KeyError"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, case, told):
    broken(case, tmp_path / "zero" / "a")
    write(tmp_path / "finetune" / "b")
    with pytest.raises(ReportError, match=f"zero/a/result.json.*{told}"):
        report.made(tmp_path, tmp_path / "page", every())


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(ReportError, match="holds no result.json"):
        read_results(tmp_path)
    with pytest.raises(ReportError, match="nothing is no folder"):
        read_results(tmp_path / "nothing")


def test_the_command_tells_a_user_of_errors(tmp_path, monkeypatch, capsys):
    write(tmp_path / "zero").joinpath("result.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["report", "--results", str(tmp_path)])
    monkeypatch.setattr("experiments.common.runtime.cache_programs", lambda folder: None)
    assert command("report", report.Config, report.main, report.__doc__) == 2
    assert "zero/result.json is no JSON" in capsys.readouterr().err


def test_parts_of_a_run_are_not_results(tmp_path):
    write(tmp_path / "lora_rank" / "a")
    write(tmp_path / "lora_rank" / "a" / "runs" / "q_r1" / "seed0")
    assert [r.name for r in read_results(tmp_path)] == ["lora_rank/a"]


def test_one_seed_a_file_is_brought_together():
    claim = next(c for c in every() if c.id == "8c")
    results = made.precision("bfloat16 alone", 1)([0.1, 0.2])
    other = made.result("precision/other", **results[0].data | {"config": {"seed": 0, "lr": 1}})
    again = made.result("precision/again", **results[0].data)
    found = judge(claim, [*results, other, again]).findings
    names = [[r.name for r in f.results] for f in found]
    assert names[:3] == [["precision/0", "precision/1"], ["precision/other"], ["precision/again"]]


def test_text_of_results_is_only_text(tmp_path):
    mark = "<script>alert(1)</script>"
    write(tmp_path / "finetune" / "x", experiment="other", config={"task": mark}, score=0.5)
    shown = report.made(tmp_path, tmp_path / "page", every())
    assert "<script" not in shown.html
    assert html.escape("<script>alert(1)</script>") in shown.html


def test_a_command_is_made_again_from_its_configuration():
    config = {
        "task": "sst2", "data": "/a/b/sst2", "model": "/a/b/model", "quantize": None, "rank": 8,
        "baseline": False, "targets": ["x$"], "out": "/a", "resume": True, "unknown": 1,
    }  # fmt: skip
    result = made.result("lora_glue/x", config=config)
    words = shlex.split(command_of(result))
    for part in ("--task sst2", "--data DIR", "--model model", "--no-baseline", "--targets x$"):
        assert part in " ".join(words)
    for part in ("--rank", "--quantize", "--resume", "--unknown", "/a"):
        assert part not in words
    large = made.result("bench_large/x", config={"quantize": None}, limit_fraction="0.3")
    assert command_of(large) == (
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.3 python -m experiments.bench_large --quantize None "
        "--out docs/results/bench_large/x"
    )


@pytest.mark.parametrize(
    ("model", "title", "told"),
    [
        ("novels", "novels", []),
        ("minilm", "minilm", ["--model", "minilm"]),
        ("encoder/1m/model", "encoder 1m", ["--model", "MODELS/encoder/1m/model"]),
        ("encoder/1m/step_000256", "encoder 1m, step 256",
         ["--model", "MODELS/encoder/1m/step_000256"]),
        ("org/name", "name", ["--model", "org/name"]),
    ],
)  # fmt: skip
def test_a_model_is_told_by_family_and_size(model, title, told):
    assert model_title(model) == title
    result = made.result("lora_rank/x", config={"task": "sample", "model": model})
    assert shlex.split(command_of(result))[3:-2] == told
