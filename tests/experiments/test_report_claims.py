"""Verdicts follow the numbers: they flip when the numbers do, and need more than one seed."""

import pytest

from experiments.common import claims_intervals as intervals
from experiments.common.claims_all import every
from experiments.common.report_findings import judge
from tests.experiments import made_results as made

YES, NO, OPEN = "reproduced", "not reproduced", "not decidable at this scale"
CLAIMS = {c.id: c for c in every()}
# What is asked for by seed: above the claim's line, below it, on both sides, and one seed alone.
SIDES = ([0.05, 0.06, 0.055], [-0.05, -0.06, -0.055], [0.3, -0.3, 0.0], [0.05])
WIDE, NARROW, BETWEEN = [-0.1, 0.1] * 3, [-0.001, 0.001] * 3, [-0.02, 0.02, 0.0]
CASES = {
    **{f"1a-{k.lower()}": (made.dimension(k), SIDES) for k in ("SAID", "DID")},
    **{f"1b-{k.lower()}": (made.dimension(k, steps=True), SIDES) for k in ("SAID", "DID")},
    "1c": (
        lambda gaps: made.swept(
            "intrinsic_dimension", {"full": [0.8] * len(gaps), "SAID_5": [0.72 + g for g in gaps]},
            scores={"SAID": {"5": {}}}, d90={"SAID": 5}, full={"mean": 0.8}, constant=0.5,
        ),
        SIDES,
    ),
    "2a": (made.higher("full", "prompt_20"), SIDES),
    "2b": (
        made.methods(lambda g, k: {"full": [0.8] * len(g), "prompt": [0.6 + k * x for x in g]}),
        SIDES,
    ),
    "2c": (made.higher("prompt_20", "fixed_prompt"), SIDES),
    "2d": (made.higher("prompt_20", "prompt_1"), SIDES),
    "2e": (made.higher("prompt_20", "prompt_100"), SIDES),
    "2f": (made.higher("prefix", "prompt"), SIDES),
    "2g": (made.higher("prefix", "full"), SIDES),
    "3a": (made.adapters(), SIDES),
    "3b": (made.adapters(), SIDES),
    "4a": (made.two("lora_rank", "qv_r1", "qv_r8", scores={"q,v": {"1": {}, "8": {}}}), SIDES),
    "4b": (
        made.two("lora_rank", "qv_r8", "q_r8", scores={"q": {"8": {}}, "q,v": {"8": {}}}), SIDES,
    ),
    "4c": (made.answers, SIDES),
    "4d": (made.answers, SIDES),
    "5a": (made.plus, SIDES),
    "5b": (made.plus, SIDES),
    "5f": (made.plus_by_width, SIDES),
    "5c": (made.dylora, SIDES),
    "5d": (made.dylora, SIDES),
    "5e": (made.dylora, SIDES),
    "6a": (made.two("qlora", "nf4", "bf16", rows={"nf4": {}, "bf16": {}}), SIDES),
    "6c": (made.longlora("lora"), SIDES),
    "6d": (made.longlora("full"), ([0.0, 0.01, 0.005], [-0.2, -0.21, -0.2], *SIDES[2:])),
    "7a": (
        made.in_context(lambda g: {
            "k_shot": {"16": made.scores([0.6] * len(g))},
            "peft": {"16": made.scores([0.6 + x for x in g])},
        }),
        SIDES,
    ),
    "7b": (made.spread("orders"), (WIDE, NARROW, BETWEEN, [0.1])),
    "7c": (made.spread("wordings"), (WIDE, NARROW, BETWEEN, [0.1])),
    "7e": (
        made.in_context(lambda g: {
            "k_shot": {"16": made.scores([0.8 + 0.001 * i for i in range(len(g))])},
            "random_labels": made.scores([0.75 + x for x in g]),
        }),
        SIDES,
    ),
    "8b": (made.precision("mixed", -1), SIDES),
    "8c": (made.precision("bfloat16 alone", 1), SIDES),
    "10a": (made.beside("lora", "full"), SIDES),
    "10b": (made.beside("adapter", "full"), SIDES),
    "10c": (made.beside("full", "prompt"), SIDES),
}  # fmt: skip


def kinds(claim, results):
    found = judge(CLAIMS[claim], results).findings
    return [f.verdict.kind for f in found if f.verdict]


@pytest.mark.parametrize("claim", CASES)
@pytest.mark.parametrize(
    ("side", "kind"),
    [(0, YES), (1, NO), (2, OPEN), (3, OPEN)],
    ids=["above", "below", "both", "few"],
)
def test_a_verdict_follows_its_numbers(claim, side, kind):
    of, sides = CASES[claim]
    assert kinds(claim, of(sides[side])) == [kind]


EXACT = {
    "6b": (made.account(51e9, 43e9), made.account(51e9, 49e9)),
    "6e": (made.cost(1), made.cost(1.5)),
    "7d": (made.tokens(90), made.tokens(9)),
    "9a": (made.zero(), made.zero(optimiser=2)),
    "9b": (made.zero(), made.zero(kept=8)),
    "9c": (made.rule(24e9), made.rule(30e9)),
}


@pytest.mark.parametrize("claim", EXACT)
def test_what_is_counted_needs_no_seeds(claim):
    for results, kind in zip(EXACT[claim], (YES, NO), strict=True):
        assert kinds(claim, results) == [kind]


def test_every_claim_is_tried_here():
    assert {*CASES, *EXACT, "8a"} == {*CLAIMS}
    assert len(CLAIMS) == len(every())


def test_a_run_on_a_device_decides_by_its_peak():
    assert kinds("6b", made.step(41e9) + made.step(49e9)) == [YES, NO]
    assert kinds("6b", made.step(None)) == [OPEN]


def test_bf16_is_as_it_is():
    verdict = judge(CLAIMS["8a"], []).findings[0].verdict
    assert verdict.kind == YES
    assert "100% differ from x(1 + 2^-7) and 0% from x(1 + 2^-9)" in verdict.ours


def test_a_dimension_that_was_not_reached_lies_anywhere_above():
    results = made.dimension("SAID")([0.1, 0.1, 0.1])
    models = results[0].data["models"]
    models[0]["d90_seeds"]["SAID"] = [None] * 3  # the smallest model's: more than the most tried
    assert kinds("1a-said", results) == [YES]
    models[0]["d90_seeds"]["SAID"] = [2**8] * 3
    models[2]["d90_seeds"]["SAID"] = [None] * 3  # the largest's
    assert kinds("1a-said", results) == [NO]
    models[0]["d90_seeds"]["SAID"] = [None] * 3
    assert kinds("1a-said", results) == [OPEN]


def test_a_dimension_that_was_reached_lies_anywhere_above_the_one_before():
    results = made.dimension("SAID")([0.1, 0.1, 0.1])
    models = results[0].data["models"]
    for model in models:  # all at one: the same, as far as what was tried tells
        model["d90_seeds"]["SAID"] = [2**8] * 3
    assert kinds("1a-said", results) == [OPEN]
    for model, d in zip(models, (8, 8, 6), strict=True):
        model["d90_seeds"]["SAID"] = [2**d] * 3
        model["scores"]["SAID"] = {"64": {}, "256": {}, "1024": {}}
    assert kinds("1a-said", results) == [OPEN]  # from 65 and 256 to 1 and 64


def test_a_model_whose_largest_class_is_at_90_percent_is_left_out():
    results = made.dimension("SAID")([0.1, 0.1, 0.1])
    results[0].data["constant"] = 0.75
    found = judge(CLAIMS["1a-said"], results).findings[0].verdict
    assert found.kind == OPEN
    assert "left out" in found.ours


def test_a_fixed_prompt_without_seeds_stands_against_each():
    of = made.methods(lambda g, k: {"fixed_prompt": [0.6], "prompt_20": [0.6 + x for x in g]})
    assert kinds("2c", of(SIDES[0])) == [YES]


def test_percentiles_need_five_tasks():
    assert kinds("3a", made.adapters(made.TASKS[:4])(SIDES[0])) == [OPEN]


def test_random_labels_say_nothing_of_a_model_that_does_not_learn_from_true_ones():
    of = made.in_context(
        lambda g: {
            "k_shot": {"16": made.scores([0.5, 0.51, 0.49])},
            "random_labels": made.scores([0.5] * 3),
        }
    )
    assert kinds("7e", of([])) == [OPEN]


def test_a_model_that_always_answers_the_same_is_moved_by_nothing():
    shots = {"k_shot": {"16": made.scores([0.5] * 3)}, "orders": {"values": [0.5] * 8}}
    found = made.in_context(lambda gaps: shots | {"wordings": {"values": [0.5, 0.4, 0.5]}})([])
    assert {k for claim in ("7b", "7c") for k in kinds(claim, found)} == {OPEN}


def test_answers_that_are_hardly_ever_right_say_nothing():
    few = made.answers([0.001] * 3, right=0.01)
    assert {k for claim in ("4c", "4d") for k in kinds(claim, few)} == {OPEN}


def test_lora_plus_without_losses_by_seed_is_open():
    results = made.plus(SIDES[0])
    for row in results[0].data["rows"].values():
        del row["curves"]
    assert kinds("5a", results) == [OPEN]


def test_intervals():
    assert intervals.of_mean([1.0]) is None
    found = intervals.of_mean([1.0, 2.0, 3.0])
    assert (found.mid, found.high) == (2.0, pytest.approx(2 + 4.302653 / 3**0.5))
    paired = intervals.of_difference({0: 1.0, 1: 5.0}, {1: 4.0, 0: 0.0})
    assert (paired.low, paired.high) == (1.0, 1.0)
    welch = intervals.of_difference({0: 1.0, 1: 2.0}, {2: 3.0, 3: 4.0})
    assert welch.how.startswith("Welch")
    assert welch.low == pytest.approx(-2 - 4.302653 * 0.5**0.5)
    groups = intervals.of_groups([[1.0, 1.2], [2.0, 2.2], [3.0, 3.2]], "tasks")
    assert 1.0 <= groups.low < groups.mid < groups.high <= 3.2
    assert intervals.of_groups([[1.0, 2.0]], "tasks") is None
    deviation = intervals.of_deviation([[0.0, 2.0], [5.0, 7.0]], "orders")
    assert deviation.low < deviation.mid < deviation.high
    assert deviation.mid == pytest.approx(2**0.5)
