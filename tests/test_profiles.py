"""Records that survive their files, and references that are found, kept, measured again or refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from test_diagnosis import HEALTHY
from tiny_models import tiny_checkpoint

from headscale import bundled, profiles
from headscale.activations import Encoding
from headscale.api import Loading
from headscale.calibration import choose
from headscale.errors import HeadscaleError, NotFoundError, UnreadableError
from headscale.inspection import Measured, inspect_weights, measure, texts_of
from headscale.profiles import DEFAULT_REFERENCE, from_dict, profile_of, read_profile, resolve_reference, write_profile
from headscale.records import Calibration, Inspection, OutputStatistics, Profile, Proof, TextSettings, Written
from headscale.texts import Pair

pytest.importorskip("torch")

PAIRS = [Pair(f"w{i} w{i + 1}", f"w{i} w{i + 2} w{i + 3}") for i in range(10, 14)]
TEXTS = texts_of(PAIRS, "given", Encoding(8, 16, 2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def measured(checkpoint: Path) -> Measured:
    return measure(Loading().open(checkpoint), TEXTS, spectral=True)


# --- records through JSON ------------------------------------------------------------------------------------------


def again(record: Any) -> Any:
    return from_dict(type(record), json.loads(json.dumps(record.to_dict(), allow_nan=False)))


def test_every_kind_of_record_comes_back_equal(measured: Measured, checkpoint: Path) -> None:
    inspection = measured.inspection
    profile = profile_of(inspection)
    calibration = choose(measured, profiles.Reference(profile, "given"))
    written = Written(
        "d", "untie", "as asked", 0.5, True, 0.0, ("a",), (), ("b", "c"), (), (), {"tie_word_embeddings": False},
        (Proof("transformers 5", 0.0, True, None), Proof("other", 1e-7, False, True)), (),
    )  # fmt: skip
    weights_only = inspect_weights(checkpoint)
    assert weights_only.output is None
    records = (inspection, weights_only, profile, profile_of(weights_only), calibration)
    for record in (*records, replace(calibration, written=written, scale=None, after=None)):
        assert again(record) == record
    assert isinstance(again(calibration).curve.scale, tuple)
    assert isinstance(again(calibration), Calibration)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_written_as_null_and_stay_so(value: float) -> None:
    output = replace(HEALTHY, fp16_headroom=value, bf16_resolution=value, non_finite=2)
    assert output.to_dict()["fp16_headroom"] is None
    back = again(output)
    assert math.isnan(back.fp16_headroom)
    assert back.to_dict() == output.to_dict()
    assert replace(back, fp16_headroom=1.0, bf16_resolution=1.0) == replace(
        output, fp16_headroom=1.0, bf16_resolution=1.0
    )


def changed(change: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(HEALTHY.to_dict()))
    change(values)
    return values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop("loss"), "lacks or does not know loss"),
        (lambda v: v.update(extra=1), "lacks or does not know extra"),
        (lambda v: v["query"].pop("l1"), "SideStatistics lacks"),
        (lambda v: v.update(loss="high"), "loss is 'high', not a number"),
        (lambda v: v.update(loss=True), "loss is True, not a number"),
        (lambda v: v.update(batches=2.5), "batches is 2.5, not of type int"),
        (lambda v: v.update(batches=True), "batches is True, not of type int"),
        (lambda v: v.update(batches=None), "batches is None, not of type int"),
        (lambda v: v.update(query=[1]), "SideStatistics is list, not an object"),
        (lambda v: v.update(query=None), "SideStatistics is NoneType, not an object"),
        (lambda v: v.update(common_terms="the"), "common_terms is 'the', not a list"),
        (lambda v: v.update(common_terms=[["the"]]), "argument"),
        (lambda v: v.update(common_terms=[[1, 0.5]]), "common_terms is 1, not of type str"),
    ],
)
def test_records_that_are_not_whole_are_refused(change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_dict(OutputStatistics, changed(change))


@pytest.mark.parametrize("value", [None, [], "text", 7])
def test_what_is_no_object_is_no_record(value: Any) -> None:
    with pytest.raises(ValueError, match="not an object"):
        from_dict(Inspection, value)


def test_whole_numbers_count_as_floats() -> None:
    assert from_dict(OutputStatistics, changed(lambda v: v.update(loss=3))).loss == 3.0


# --- profile files -------------------------------------------------------------------------------------------------


def test_a_profile_through_its_file(measured: Measured, tmp_path: Path) -> None:
    profile = profile_of(measured.inspection)
    write_profile(profile, tmp_path / "deep" / "p.json")
    assert read_profile(tmp_path / "deep" / "p.json") == profile
    assert (profile.origin, profile.weights.spectral_norm is None) == ("measured", False)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["p.json"]


def test_origins(checkpoint: Path, measured: Measured) -> None:
    assert profile_of(inspect_weights(checkpoint)).origin == "weights only"
    assert profile_of(measured.inspection, origin="bundled").origin == "bundled"


BAD = {
    "not JSON": b"{",
    "not UTF-8": b'"\xff"',
    "a list": b"[]",
    "another schema": b'{"schema": "headscale.profile/0", "profile": {}}',
    "no profile": b'{"schema": "headscale.profile/1"}',
    "a list for a profile": b'{"schema": "headscale.profile/1", "profile": []}',
    "an empty profile": b'{"schema": "headscale.profile/1", "profile": {}}',
    "a profile of nothing": b'{"schema": "headscale.profile/1", "profile": {"name": 1}}',
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_are_no_profiles(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(BAD[kind])
    for read in (read_profile, lambda f: resolve_reference(str(f), None, measure=never)):
        with pytest.raises(UnreadableError) as error:
            read(file)
        assert "headscale profile" in error.value.hint


def test_a_profile_that_is_not_there() -> None:
    with pytest.raises(NotFoundError, match=r"no profile `elsewhere\.json`"):
        resolve_reference("elsewhere.json", None, measure=never)


# --- finding a reference -------------------------------------------------------------------------------------------


def never(name: str, weights_only: bool) -> Inspection:
    raise AssertionError(f"measured `{name}`")


class Measuring:
    """Stands in for a measurement, counts, and fails for the names it is told to."""

    def __init__(self, inspection: Inspection, fails: dict[str, HeadscaleError] | None = None) -> None:
        self.inspection = inspection
        self.fails = fails or {}
        self.calls: list[tuple[str, bool]] = []

    def __call__(self, name: str, weights_only: bool) -> Inspection:
        self.calls.append((name, weights_only))
        if name in self.fails:
            raise self.fails[name]
        texts = None if weights_only else self.inspection.texts
        output = None if weights_only else self.inspection.output
        return replace(self.inspection, name=name, texts=texts, output=output)


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_a_directory_is_measured_once(copied: Path, measured: Measured, tmp_path: Path) -> None:
    measuring, cache = Measuring(measured.inspection), tmp_path / "cache"
    first = resolve_reference(str(copied), TEXTS.settings, measure=measuring, cache=cache)
    second = resolve_reference(str(copied), TEXTS.settings, measure=never, cache=cache)
    assert measuring.calls == [(str(copied), False)]
    assert (first.origin, second.origin) == ("measured", "cached profile")
    assert second.profile == first.profile
    assert second.profile.output == measured.inspection.output


def test_what_makes_it_measured_again(
    copied: Path, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring, cache = Measuring(measured.inspection), tmp_path / "cache"

    def resolve(texts: TextSettings | None = TEXTS.settings) -> int:
        resolve_reference(str(copied), texts, measure=measuring, cache=cache)
        return len(measuring.calls)

    assert (resolve(), resolve()) == (1, 1)
    assert resolve(replace(TEXTS.settings, document_length=17)) == 2
    assert resolve(None) == 3
    assert measuring.calls[-1] == (str(copied), True)
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    assert (resolve(), resolve()) == (4, 4)
    (copied / "0_Transformer").mkdir()
    (copied / "0_Transformer" / "model.safetensors").write_bytes(b"1")
    assert (resolve(), resolve()) == (5, 5)
    monkeypatch.setattr(profiles, "__version__", "9.9.9")
    assert (resolve(), resolve()) == (6, 6)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"schema": "headscale.profile/0"}'])
def test_a_cached_profile_that_cannot_be_read_is_replaced(
    damage: bytes, copied: Path, measured: Measured, tmp_path: Path
) -> None:
    measuring, cache = Measuring(measured.inspection), tmp_path / "cache"
    resolve_reference(str(copied), TEXTS.settings, measure=measuring, cache=cache)
    next(cache.iterdir()).write_bytes(damage)
    for _ in range(2):
        resolve_reference(str(copied), TEXTS.settings, measure=measuring, cache=cache)
    assert len(measuring.calls) == 2


def test_a_cache_that_cannot_be_written_only_costs_time(copied: Path, measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    found = resolve_reference(
        str(copied), TEXTS.settings, measure=Measuring(measured.inspection), cache=tmp_path / "cache"
    )
    assert found.origin == "measured"


NOWHERE = NotFoundError("`x` is not in the hub cache, and the hub is switched off", "connect")


def test_the_default_falls_back_on_the_bundled_bert_and_says_so(measured: Measured, tmp_path: Path) -> None:
    measuring = Measuring(measured.inspection, {DEFAULT_REFERENCE: NOWHERE})
    told: list[str] = []
    for _ in range(2):
        found = resolve_reference(
            DEFAULT_REFERENCE, TEXTS.settings, measure=measuring, cache=tmp_path, tell=told.append
        )
        assert found.profile.name == f"bundled:{bundled.REFERENCE}"
        assert found.profile.origin == "bundled"
        assert found.profile.output is not None
        assert found.origin == f"bundled, as {DEFAULT_REFERENCE} is not here"
    assert (
        told
        == [f"`{DEFAULT_REFERENCE}` is out of reach ({NOWHERE.message}): the bundled BERT is the reference instead"] * 2
    )
    bert = f"bundled:{bundled.REFERENCE}"
    assert measuring.calls == [(DEFAULT_REFERENCE, True), (bert, False), (DEFAULT_REFERENCE, True)]


@pytest.mark.parametrize("name", ["someone/model", "bert-large-uncased"])
def test_a_reference_that_was_named_is_never_replaced(name: str, measured: Measured, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as error:
        resolve_reference(name, TEXTS.settings, measure=Measuring(measured.inspection, {name: NOWHERE}), cache=tmp_path)
    assert error.value is NOWHERE


def test_a_damaged_default_is_not_replaced_either(measured: Measured, tmp_path: Path) -> None:
    damaged = Measuring(measured.inspection, {DEFAULT_REFERENCE: UnreadableError("truncated")})
    with pytest.raises(UnreadableError, match="truncated"):
        resolve_reference(DEFAULT_REFERENCE, TEXTS.settings, measure=damaged, cache=tmp_path)


def test_an_id_out_of_the_cache_gives_its_head_and_is_measured_once_it_is_here(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headscale import hub

    here: list[tuple[Path, str]] = []
    monkeypatch.setattr(hub, "cached_snapshot", lambda name, **_: here[0] if here else None)
    measuring, told = Measuring(measured.inspection), []

    def resolve() -> profiles.Reference:
        return resolve_reference("some/model", TEXTS.settings, measure=measuring, cache=tmp_path, tell=told.append)

    for origin in ("its weights alone", "cached profile"):
        found = resolve()
        assert (found.origin, found.profile.output) == (origin, None)
    assert told == ["only the head of `some/model` was read: targets that need its outputs are left out"] * 2
    here.append((tmp_path, "a" * 40))
    assert resolve().profile.output is not None
    here[0] = (tmp_path, "b" * 40)  # another commit
    assert resolve().origin == "measured"
    assert [weights_only for _, weights_only in measuring.calls] == [True, False, False]
    assert len(told) == 2


def test_a_real_fallback_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscale import api

    monkeypatch.setattr(profiles, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told: list[str] = []
    found = api.find_reference(DEFAULT_REFERENCE, None, Loading(tell=told.append))
    assert found.profile.name == f"bundled:{bundled.REFERENCE}"
    assert any("is out of reach" in sentence for sentence in told)
    with pytest.raises(NotFoundError):
        api.find_reference("bert-base-cased", None, Loading())


def test_a_profile_names_every_field_of_its_record(measured: Measured) -> None:
    assert set(profile_of(measured.inspection).to_dict()) == {f.name for f in fields(Profile)}
