"""How classification tasks are put in words for a language model: templates, and labels' words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Wording:
    """A template.

    **Attributes:** `pattern`, with the text at {0}, of a pair the second one at {1}, up to where
    the label's word follows; `words`, the labels' in the order of the task's; `end`, what follows
    the word of a demonstration.
    """

    pattern: str
    words: tuple[str, ...]
    end: str = ".\n"

    def text(self, texts: Sequence[str], label: int) -> str:
        """The texts in the template, with the word of a label."""
        return f"{self.pattern.format(*texts)} {self.words[label]}"


def _each(patterns: Mapping[str, tuple[str, ...]]) -> tuple[Wording, ...]:
    return tuple(Wording(p, w) for p, w in patterns.items())


_SENTIMENT = _each(
    {
        "{0} It was": ("terrible", "great"),
        "Review: {0}\nSentiment:": ("negative", "positive"),
        '"{0}" This means that the film was': ("bad", "good"),
        "{0} All in all, they thought that it was": ("poor", "fine"),
    }
)
_PARAPHRASE = _each(
    {
        "{0} {1} Do both mean the same?": ("no", "yes"),
        "First: {0}\nSecond: {1}\nThe two are": ("different", "equal"),
        '"{0}" "{1}" That he said the same twice is': ("false", "true"),
        "{0} In other words: {1} This is": ("wrong", "right"),
    }
)
WORDINGS: Mapping[str, tuple[Wording, ...]] = {
    "sample": _SENTIMENT,
    "sst2": _SENTIMENT,
    "mrpc": _PARAPHRASE,
    "qqp": _PARAPHRASE,
    "cola": _each(
        {
            "{0} Is this good English?": ("no", "yes"),
            "Sentence: {0}\nGrammar:": ("wrong", "right"),
            '"{0}" To say this is': ("bad", "good"),
            "{0} Was that well said?": ("no", "yes"),
        }
    ),
    "rte": _each(
        {
            "{0} Is it then true that {1}?": ("yes", "no"),
            "Text: {0}\nClaim: {1}\nThe claim is": ("true", "false"),
            '{0} So he said: "{1}" This was': ("right", "wrong"),
            "{0} Does it follow that {1}?": ("yes", "no"),
        }
    ),
    "qnli": _each(
        {
            "{1} Does this answer the question: {0}": ("yes", "no"),
            "Question: {0}\nText: {1}\nAnswered:": ("yes", "no"),
            '"{0}" she asked. "{1}" he said. Was it an answer?': ("yes", "no"),
            "{0} {1} That the second answers the first is": ("true", "false"),
        }
    ),
    "mnli": _each(
        {
            "{0} Is it then true that {1}?": ("yes", "maybe", "no"),
            "Text: {0}\nClaim: {1}\nThe claim is": ("true", "possible", "false"),
            '{0} So he said: "{1}" This was': ("right", "unknown", "wrong"),
            "{0} Does it follow that {1}?": ("yes", "perhaps", "no"),
        }
    ),
}
