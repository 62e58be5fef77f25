"""Write the sample task again: `python -m experiments.common.sample.make`.

Every sentence is put together from the lists below, with a seed. The words alone do not tell the
answer: half of the sentences deny their adjective, or set a lesser remark against the verdict.
A third of the adjectives and nouns appear in the dev set only.
"""

from __future__ import annotations

import pathlib
import random
import re

from experiments.common.sample import SAMPLE


def _words(text: str) -> list[str]:
    return text.split()


GOOD = _words("""
wonderful delightful superb charming brilliant moving gripping funny elegant tender fresh witty
warm dazzling clever graceful touching thrilling honest inspired memorable absorbing lovely
joyful stunning marvellous captivating splendid heartfelt masterful
""")
BAD = _words("""
awful tedious dreadful clumsy boring hollow dull shallow bland messy stale tiresome cold
lifeless silly sluggish pointless irritating false uninspired forgettable confusing ugly dreary
shoddy horrible plodding dismal insincere amateurish
""")
WORKS = _words("""
film novel concert play album meal exhibition series lecture musical documentary opera
restaurant story comedy drama hotel performance recital podcast
""")
PARTS = _words("""
opening ending music dialogue setting pacing cast lighting service premise plot photography
costumes sound humour finale writing decor narration staging
""")
VERDICTS = (
    "the {w} was {a}",
    "what a {a} {w}",
    "i found the {w} {a} from start to finish",
    "all in all it is a {a} {w}",
    "my friends thought this {w} was {a}",
)
DENIALS = (
    "the {w} was anything but {a}",
    "nobody could call this {w} {a}",
    "there is nothing {a} about the {w}",
    "the {w} is far from {a}",
    "this {w} is never {a}",
)
CONTRASTS = (
    "the {p} was {b} , but the {w} as a whole was {a}",
    "despite a {b} {p} , the {w} is {a}",
    "the {w} is {a} , even if the {p} is {b}",
    "i expected a {b} {w} and got a {a} one",
    "people say the {w} is {b} ; it is {a}",
)


def sentence(rng: random.Random, label: int, share: float) -> str:
    """One sentence of the class `label`, from the first `share` of each list."""

    def pick(words: list[str]) -> str:
        return rng.choice(words[: int(len(words) * share)])

    same, other = (GOOD, BAD) if label else (BAD, GOOD)
    kind = rng.choice((VERDICTS, VERDICTS, DENIALS, CONTRASTS))
    fields = {"w": pick(WORKS), "p": pick(PARTS), "b": pick(other)}
    fields["a"] = pick(other if kind is DENIALS else same)
    return re.sub(r"\ba (?=[aeiou])", "an ", rng.choice(kind).format(**fields))


def make(seed: int = 0, train: int = 2400, dev: int = 600) -> dict[str, list[tuple[str, int]]]:
    """Both splits; no sentence stands twice, in one or in both."""
    rng = random.Random(seed)
    seen: set[str] = set()
    out: dict[str, list[tuple[str, int]]] = {}
    for name, count, share in (("train", train, 2 / 3), ("dev", dev, 1.0)):
        rows: list[tuple[str, int]] = []
        while len(rows) < count:
            label = len(rows) % 2
            text = sentence(rng, label, share)
            if text not in seen:
                seen.add(text)
                rows.append((text, label))
        rng.shuffle(rows)
        out[name] = rows
    return out


def write(folder: pathlib.Path = SAMPLE) -> None:
    """Both files."""
    for name, rows in make().items():
        lines = "".join(f"{text}\t{label}\n" for text, label in rows)
        (folder / f"{name}.tsv").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write()
