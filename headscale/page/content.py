"""Everything the page says, gathered from saved results before it is written in any format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscale import __version__
from headscale.page.advice import Application, Band, applications, bands
from headscale.page.commands import commands_for, line
from headscale.page.rows import Table, tables
from headscale.page.story import further_sentences, verdict_sentence

if TYPE_CHECKING:
    from headscale.page.plates import Plate
    from headscale.records import TextSettings
    from headscale.results import Results

MOST_LISTED = 12  # values of an input; the rest is counted


@dataclass(frozen=True)
class Fact:
    """A line of the inputs or of the environment."""

    name: str
    value: str


@dataclass(frozen=True)
class Report:
    """The page, part by part, in its order.

    Args:
        title: of the document.
        verdict: the sentence it opens with.
        sentences: what else there is to say, a backbone each.
        under_way: trainings that go on or that were interrupted, in a sentence; "" for none.
        tables: of the results.
        plates: the figures, drawn or not.
        bands: what good looks like.
        applications: how to use each constant.
        inputs: what was computed from.
        environment: with which versions, where.
        commands: that make the results and this page again.
        unreadable: (path, reason) of what was left out.
    """

    title: str
    verdict: str
    sentences: tuple[str, ...]
    under_way: str
    tables: tuple[Table, ...]
    plates: tuple[Plate, ...]
    bands: tuple[Band, ...]
    applications: tuple[Application, ...]
    inputs: tuple[Fact, ...]
    environment: tuple[Fact, ...]
    commands: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...]


def report_of(
    results: Results, plates: Iterable[Plate], *, output: str = "", effectiveness: str | None = None
) -> Report:
    """Gather a report.

    Args:
        results: what was read.
        plates: its figures (`headscale.page.plates`).
        output: the file it goes to, for the command that makes it again.
        effectiveness: the file with published figures that it was drawn with.
    """
    run = Path(results.inputs[0] if results.inputs else "headscale-runs")
    again = line("headscale", "report", *results.inputs, effectiveness=effectiveness, output=output or None)
    return Report(
        title=_title(results),
        verdict=verdict_sentence(results),
        sentences=tuple(further_sentences(results)),
        under_way=_under_way(results),
        tables=tables(results),
        plates=tuple(plates),
        bands=bands(),
        applications=applications(results),
        inputs=tuple(_inputs(results, effectiveness)),
        environment=tuple(_environment(results)),
        commands=(*commands_for(results, run if run.is_dir() else run.parent), again),
        unreadable=results.unreadable,
    )


def _title(results: Results) -> str:
    from headscale.results import backbones

    guessed = {one.backbone for one in results.trainings if "lr" not in one.training}  # from the names of folders
    names = [name.removeprefix("bundled:") for name in backbones(results) if name not in guessed]
    return f"headscale: {_listed(names, 3)}" if names else "headscale"


def _under_way(results: Results) -> str:
    parts = []
    running = [one for one in results.trainings if one.status == "running"]
    if running:
        steps = _listed([f"{one.backbone.removeprefix('bundled:')} at step {one.steps_done()}" for one in running], 3)
        parts.append(f"{len(running)} under way: {steps}")
    for status in ("interrupted", "failed"):
        count = sum(one.status == status for one in results.trainings)
        if count:
            parts.append(f"{count} {status}")
    return f"Of {len(results.trainings)} trainings, {'; '.join(parts)}." if parts else ""


# --- inputs --------------------------------------------------------------------------------------------------------


def _inputs(results: Results, effectiveness: str | None) -> Iterable[Fact]:
    yield Fact("results", _listed(list(results.inputs), MOST_LISTED))
    if effectiveness:
        yield Fact("published figures", effectiveness)
    names = {**{i.name: i.revision for i in results.inspections}, **{c.name: c.revision for c in results.calibrations}}
    names |= {e.name: e.revision for e in results.evaluations}
    known = [t for t in results.trainings if "lr" in t.training]  # one that has just begun has but its folder's name
    names |= {t.backbone: t.configuration.get("revision") or names.get(t.backbone) for t in known}
    told = [f"{name} at {str(revision)[:12]}" if revision else name for name, revision in names.items()]
    yield Fact("backbones", _listed(told, MOST_LISTED))
    if results.references:
        yield Fact("reference", _listed(list(results.references), MOST_LISTED))
    measured = [
        *(i.texts for i in results.inspections if i.texts is not None),
        *(c.texts for c in results.calibrations if c.texts is not None),
    ]
    if measured:
        yield Fact("texts measured on", _listed(list(dict.fromkeys(map(_texts, measured))), MOST_LISTED))
    for one in {e.collection.fingerprint: e.collection for e in results.evaluations}.values():
        counts = f"{one.queries:,} queries, {one.documents:,} documents, {one.judgements:,} judgements"
        yield Fact("collection", f"{one.name} ({one.split}), {counts}, fingerprint {one.fingerprint}")
    yield from _training_inputs(results)


def _texts(one: TextSettings) -> str:
    source = "docstrings of installed packages" if one.source == "built-in" else one.source
    lengths = f"{one.query_length}/{one.document_length} tokens"
    return f"{one.pairs} pairs of {source}, {lengths}, fingerprint {one.fingerprint}"


def _training_inputs(results: Results) -> Iterable[Fact]:
    """What all trainings share, and what differs between them."""
    if not results.trainings:
        return
    texts = [one.configuration["texts"] for one in results.trainings if "texts" in one.configuration]
    for told in dict.fromkeys(map(_training_texts, texts)):
        yield Fact("trained on", told)
    shared, varied = [], []
    for name in dict.fromkeys(name for one in results.trainings for name in one.training):
        known = {repr(v): v for one in results.trainings if (v := one.training.get(name, "")) != ""}.values()
        ordered = sorted(known, key=lambda v: (not isinstance(v, int | float), v if isinstance(v, int | float) else 0))
        values = list(dict.fromkeys(map(_value, ordered)))
        if len(values) == 1 and values != ["-"]:
            shared.append(f"{name} {values[0]}")
        elif len(values) > 1:
            varied.append(f"{name} {_listed(values, MOST_LISTED)}")
    if varied:
        yield Fact("what differs between trainings", "; ".join(varied))
    yield Fact("what all trainings share", ", ".join(shared))


def _training_texts(texts: dict[str, Any]) -> str:
    source = texts["pairs"] or f"docstrings of {', '.join(texts['packages'])}"
    prints = ", ".join(f"{split} {digits}" for split, digits in texts["fingerprints"].items() if digits)
    return f"{source}; fingerprints {prints}"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- environment ---------------------------------------------------------------------------------------------------


def _environment(results: Results) -> Iterable[Fact]:
    """What the results were made with, as far as they keep it; then what drew this page."""
    from headscale.environment import environment

    versions = dict.fromkeys(v for one in results.trainings if (v := one.configuration.get("headscale")))
    if versions and not results.environments:
        yield Fact("trained with headscale", ", ".join(versions))
    runs = [one.cell.run for one in results.trainings if one.cell is not None]
    devices = {f"{run.device} ({run.device_reason})" for run in runs}
    if devices:
        yield Fact("trained on", _listed(sorted(devices), 3))
    for number, found in enumerate(results.environments, start=1):
        several = f" ({number})" if len(results.environments) > 1 else ""
        yield Fact(f"made with{several}", f"headscale {found.get('headscale')}, {_versions(found)}")
    yield Fact("page drawn with", f"headscale {__version__}, {_versions(environment())}")


def _versions(found: dict[str, Any]) -> str:
    packages = {name: version for name, version in found.get("packages", {}).items() if version}
    machine = ", ".join(str(found[name]) for name in ("platform",) if name in found)
    return ", ".join([f"Python {found.get('python')} on {machine}", *(f"{n} {v}" for n, v in packages.items())])


def _listed(values: list[str], most: int) -> str:
    shown = ", ".join(values[:most])
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown
