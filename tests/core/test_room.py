"""How much room a transform's prompts and prefixes take."""

import pytest

import jpeft

PROMPT = jpeft.PromptTuning(5, "embedding$")
PREFIX = jpeft.PrefixTuning(4, "bias$")
AFTER = jpeft.PrefixTuning(4, "bias$", after=5)
LORA = jpeft.LoRA(2, 2.0, "kernel$")


@pytest.mark.parametrize(
    ("transform", "want"),
    [
        (LORA, 0),
        (PROMPT, 5),
        (PREFIX, 4),
        (jpeft.chain(LORA, PROMPT), 5),
        (jpeft.chain(jpeft.chain(LORA, PREFIX), jpeft.Train("x")), 4),
        (jpeft.chain(PROMPT, AFTER), 9),
    ],
)
def test_room(transform, want):
    assert jpeft.room(transform) == want


def test_a_prompts_ids_follow_the_tables():
    assert jpeft.first_virtual_id(jpeft.chain(LORA, PROMPT), 40) == 40
    assert jpeft.first_virtual_id(jpeft.chain(LORA, PREFIX), 40) == 0
