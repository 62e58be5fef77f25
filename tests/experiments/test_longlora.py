"""LongLoRA's experiment and the texts that it reads, small; and longer Llamas."""

import dataclasses
import functools
import importlib.util
import io
import json
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import jpeft
from experiments import longlora
from experiments.common.long_texts import draw_rows, read_texts
from experiments.common.models import ModelError
from experiments.common.next_tokens import extended, losses, perplexities
from experiments.common.readers import DataError
from jpeft.hf import save_model
from jpeft.models.llama import Llama, LlamaConfig
from jpeft.models.llama2c import Vocabulary
from jpeft.models.rope import Rope

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 8,
}
QUICK = {"length": 64, "steps": 6, "rows": 2, "rounds": 1}


def said(**options):
    out = io.StringIO()
    result = longlora.main(longlora.Config(**options), Console(file=out, width=200))
    return result, out.getvalue()


def refused(match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        longlora.main(longlora.Config(**options), Console(quiet=True))


@pytest.fixture
def texts():
    """Three texts of words that tell them apart."""
    return {f"{n}.txt": " ".join(f"{n}{i}" for i in range(90)) for n in "abc"}


def write_archive(path, members, *more):
    with tarfile.open(path, "w:xz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
        for info in more:
            archive.addfile(info)


def test_every_variant_on_the_sample(tmp_path):
    out = tmp_path / "out"
    result, text = said(**QUICK, out=out)
    rows = result["rows"]
    assert list(rows) == list(longlora.VARIANTS)
    assert result["sizes"] == {"trained": 64, "length": 64, "lengths": (16, 32, 64), "group": 16}
    for name, row in rows.items():
        assert name in text
        assert set(row["perplexity"]) == {"16", "32", "64"}
        assert f"{row['perplexity']['64']:.2f}" in text
        if name in ("original", "none"):
            assert set(row) == {"perplexity"}
            continue
        assert all(row["perplexity"][n] < rows["none"]["perplexity"][n] for n in ("16", "64"))
        assert len(row["losses"]) == 6
        assert row["ms"] > 0
    trained = {n: r["trained"] for n, r in rows.items() if "trained" in r}
    assert trained["lora"] < trained["longlora"] == trained["longlora_full"] < trained["full"]
    # A row's whole attention holds four times the scores of its groups'.
    assert rows["longlora"]["mib"] < rows["longlora_full"]["mib"]
    on_disk = json.loads((out / "result.json").read_text())
    assert on_disk["rows"] == rows
    assert on_disk["config"]["out"] is None
    if importlib.util.find_spec("matplotlib"):
        assert (out / "longlora.png").stat().st_size > 5000
        assert "<svg" in (out / "longlora.svg").read_text()
    else:
        assert "no plot: it needs the extra" in text


def test_runs_repeat_and_seeds_differ():
    options = QUICK | {"steps": 1, "variants": ("none",)}
    first, second, other = (said(**options, seed=s)[0]["rows"]["none"] for s in (0, 0, 1))
    assert first == second != other


def test_a_hugging_face_directory(tmp_path, texts):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder, data = tmp_path / "model", tmp_path / "texts"
    save_model(Llama(LlamaConfig(**TINY), rngs=nnx.Rngs(0)), folder)
    words = ["[UNK]", *(f"{n}{i}" for n in "abc" for i in range(10))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    data.mkdir()
    for name, text in texts.items():
        (data / name).write_text(text)
    options = {"model": folder, "data": data, "held_out": 1, "steps": 2, "rows": 2, "rounds": 1}
    result, _ = said(**options, variants=("none", "lora"), lengths=(16, 32))
    assert result["sizes"] == {"trained": 8, "length": 32, "lengths": (16, 32), "group": 8}
    assert len(result["held_out"]) == 1
    assert result["trained_on"] == 2
    assert result["config"]["model"] == "model"
    (folder / "tokenizer.json").unlink()
    refused("tokenizer", Exception, **options)


def test_llama2c_and_its_vocabulary(data, tmp_path):
    weights = data / "weights" / "stories260K"
    path = weights / "tok512_stories.bin"
    vocabulary = Vocabulary.read(path, 512)
    # Words are joined each by itself: the same as the whole text at once.
    text = "Once upon a time,  a café was JANE's; she said “no” to it.\nAnd so "
    index = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    assert vocabulary.encode(text)[1:] == vocabulary._joined(f" {text}", index)
    assert vocabulary.decode(vocabulary.encode(text)) == text
    options = QUICK | {"model": weights / "stories260K.bin"}
    refused("needs --vocabulary", ModelError, **options)
    refused("there is no such file", ModelError, **options, vocabulary=tmp_path / "none.bin")
    for held, match in ((path.read_bytes()[:-9], "holds 511 whole pieces"), (None, "more than")):
        cut = tmp_path / "cut.bin"
        cut.write_bytes(held or path.read_bytes() + b"\0" * 12)
        refused(match, Exception, **options, vocabulary=cut)
    result, _ = said(**options, vocabulary=path, variants=("none",), lengths=(32, 64))
    assert 5 < result["rows"]["none"]["perplexity"]["64"] < 512


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"variants": ("none", "qlora")}, "--variants qlora: there are original, none, lora,"),
        ({"group": 24}, "--length 64 does not split into groups of 24"),
        ({"group": 1}, "groups of 1: give a --group that is even"),
        ({"lengths": (48,)}, "--lengths 48: a context has 2 tokens or more and divides 64"),
        ({"lengths": (128,)}, "--lengths 128"),
        ({"steps": 0}, "--steps, --batch, --rows, --rounds and --held-out are 1 or more"),
        ({"vocabulary": "some.bin"}, "--vocabulary goes with a --model in llama2.c's format"),
        ({"length": 40_000}, "dev has fewer than the 40000 tokens of a row"),
    ],
)
def test_wrong_options_are_told(options, match, tmp_path):
    refused(match, **QUICK | {"out": tmp_path / "out"} | options)
    assert not (tmp_path / "out" / "result.json").exists()


def test_wrong_data_is_told(tmp_path, texts):
    refused("there is no such folder", DataError, **QUICK, data=tmp_path / "none")
    refused("holds 0 texts", DataError, **QUICK, data=tmp_path)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    refused("b.txt is not UTF-8 text: invalid start byte at byte 0", **QUICK, data=tmp_path)
    (tmp_path / "b.txt").write_text("short")
    refused("holds 1 texts.*the 1 of --held-out", **QUICK, data=tmp_path, held_out=1)
    write_archive(tmp_path / "a.tar.xz", texts)
    whole = (tmp_path / "a.tar.xz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive"):
        (tmp_path / "a.tar.xz").write_bytes(damaged)
        refused("is no whole .tar.xz", DataError, **QUICK, data=tmp_path)


def test_an_archive_is_read_and_never_unpacked(tmp_path, texts, monkeypatch):
    folder, elsewhere = tmp_path / "in" / "data", tmp_path / "in" / "cwd"
    folder.mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    link = tarfile.TarInfo("link.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("hard.txt")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../secret"
    members = {"../../up.txt": "up", f"{tmp_path}/absolute.txt": "absolute", "notes.md": "no"}
    write_archive(folder / "a.tar.xz", {**texts, **members}, link, hard)
    before = sorted(tmp_path.rglob("*"))
    train, held = read_texts(folder, 1, 0)
    assert {**train, **held} == {**texts, "up.txt": "up", "absolute.txt": "absolute"}
    assert sorted(tmp_path.rglob("*")) == before


def test_texts_are_kept_apart_and_rows_are_their_words(tmp_path, texts):
    for name, text in texts.items():
        (tmp_path / name).write_text("\ufeff" + text.replace(" ", "\n  "), encoding="utf-8")
    train, held = read_texts(tmp_path, 1, 0)
    assert len(train) == 2
    assert not train.keys() & held.keys()

    def encode(text):
        return [100 * "abc".index(w[0]) + int(w[1:]) for w in text.split()]

    rows = draw_rows(train, encode, 6, 20, np.random.default_rng(0))
    assert rows.shape == (6, 20)
    for row in rows:
        assert f"{'abc'[row[0] // 100]}.txt" in train
        assert (np.diff(row) == 1).all()
    with pytest.raises(DataError, match="has fewer than the 91 tokens of a row"):
        draw_rows(train, encode, 1, 91, np.random.default_rng(0))


def test_extended_positions_are_those_of_the_trained_context():
    config = LlamaConfig(**TINY)
    assert config.extended(8) is config
    longer = config.extended(20)
    assert longer.rope == Rope(rope_type="linear", factor=3.0)
    assert longer.max_position_embeddings == 20
    assert LlamaConfig.from_hf(longer.to_hf()).rope == longer.rope
    with pytest.raises(ValueError, match=r"scaled already \('linear'\)"):
        longer.extended(40)
    assert longer.extended(20) is longer
    # Every third token of the longer one stands where a token of the trained context stood.
    model = Llama(config, rngs=nnx.Rngs(0))
    ids = jnp.arange(6)[None]
    got = extended(model, 20)(jpeft.functional(model).params, ids, position_ids=3 * ids)
    np.testing.assert_allclose(got, model(ids), atol=1e-5)
    assert dataclasses.replace(longer, rope=config.rope, max_position_embeddings=8) == config


def test_perplexity_is_that_of_the_pieces():
    model = Llama(LlamaConfig(**TINY), rngs=nnx.Rngs(0))
    apply, params = jpeft.functional(model)
    rows = np.random.default_rng(0).integers(0, 32, (2, 8), dtype=np.int32)
    got = perplexities(jax.jit(functools.partial(losses, apply)), params, rows, (4, 8))
    for n in (4, 8):
        pieces = rows.reshape(-1, n)
        logits = model(jnp.asarray(pieces))[:, :-1]
        wanted = jnp.take_along_axis(jax.nn.log_softmax(logits), pieces[:, 1:, None], axis=2)
        assert got[str(n)] == pytest.approx(float(jnp.exp(-wanted.mean())), rel=1e-5)


def test_over_devices_it_trains_the_same():
    config = longlora.Config(variants=("lora",), batch=8, **QUICK)
    alone, split = (
        longlora.main(c, Console(quiet=True))["rows"]["lora"]["losses"]
        for c in (config, dataclasses.replace(config, mesh="all"))
    )
    np.testing.assert_allclose(split, alone, atol=1e-4)
