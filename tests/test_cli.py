"""The command line as its users meet it: streams, formats, exit codes, and the sentences of every error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_checkpoint, tiny_model

from headscale.cli import run

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADSCALE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [f"w{5 + i} w{40 + i}\tw{40 + i} w{60 + i % 30} w{5 + i} w{7 + i % 11}" for i in range(32)]
    (tmp_path / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return "pairs.tsv"


@pytest.fixture
def reference(tmp_path: Path) -> str:
    return str(tiny_checkpoint("bert", tmp_path / "reference"))


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    model = tiny_model("modernbert", seed=3)
    with torch.no_grad():
        model.head.norm.weight.mul_(60.0)
    model.save_pretrained(tmp_path / "large")
    tiny_checkpoint("modernbert", tmp_path / "spare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "large" / name).write_bytes((tmp_path / "spare" / name).read_bytes())
    return "large"


def test_inspect_prints_tsv_when_piped(capsys: Any, backbone: str, reference: str, pairs: str) -> None:
    assert run(["inspect", backbone, "--reference", reference, "--pairs", pairs]) == 0
    out, err = capsys.readouterr()
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == ["backbone", reference, backbone]
    assert all(len(line) == len(lines[0]) for line in lines)
    table = dict(zip(lines[0], lines[2], strict=True))
    assert float(table["||W|| [L2]"]) > 0
    assert table["verdict"] in {"ok", "too high", "too low", "degenerate"}
    assert "headscale 0.1.0: inspecting large" in err


def test_json_is_one_object_with_the_same_numbers(capsys: Any, backbone: str, reference: str, pairs: str) -> None:
    command = ["inspect", backbone, "--reference", reference, "--pairs", pairs]
    assert run([*command, "--json", "-o", "copy.json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(Path("copy.json").read_text())
    assert document["schema"] == "headscale.inspect/1"
    assert document["errors"] == []
    assert run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    table = dict(zip(lines[0].split("\t"), lines[2].split("\t"), strict=True))
    assert float(table["||W|| [L2]"]) == document["results"][0]["weights"]["frobenius"]


def test_check_fails_on_a_head_that_is_too_high(capsys: Any, backbone: str, reference: str, pairs: str) -> None:
    command = ["inspect", backbone, "--reference", reference, "--pairs", pairs, "--json"]
    run(command)
    word = json.loads(capsys.readouterr().out)["results"][0]["verdict"]["word"]
    assert word == "too high"
    assert run([*command, "--check"]) == 1


def test_results_are_kept_reused_and_forced(capsys: Any, backbone: str, reference: str, pairs: str) -> None:
    command = ["inspect", backbone, "--reference", reference, "--pairs", pairs, "--json"]
    run(command)
    first = capsys.readouterr()
    cells = list(Path("headscale-runs").glob("inspect-large-*/cell.json"))
    assert len(cells) == 1
    stamp = cells[0].stat().st_mtime_ns
    run(command)
    again = capsys.readouterr()
    assert "reusing" in again.err
    assert json.loads(again.out)["results"] == json.loads(first.out)["results"]
    assert cells[0].stat().st_mtime_ns == stamp
    run([*command, "--force"])
    assert cells[0].stat().st_mtime_ns > stamp


def test_quiet_never_touches_stdout(capsys: Any, backbone: str, reference: str, pairs: str) -> None:
    command = ["inspect", backbone, "--reference", reference, "--pairs", pairs]
    run(command)
    loud = capsys.readouterr()
    run([*command, "-q"])
    quiet = capsys.readouterr()
    assert quiet.out == loud.out
    assert quiet.err == ""


def test_one_bad_backbone_does_not_cost_the_others(capsys: Any, backbone: str, reference: str, pairs: str) -> None:
    code = run(["inspect", "./missing", backbone, "--reference", reference, "--pairs", pairs, "--json"])
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert code == 3
    assert [r["name"] for r in document["results"]] == [backbone]
    assert [e["subject"] for e in document["errors"]] == ["./missing"]
    assert "error: no file or directory `./missing`\n\nhint: " in err


def test_weights_only_says_unjudged_without_importing_torch(backbone: str, reference: str) -> None:
    code = (
        "import sys\nfrom headscale.cli import run\n"
        f"code = run(['inspect', {backbone!r}, '--weights-only', '--reference', {reference!r}, '--spectral'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("unjudged")


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom headscale.cli import run\n"
        "assert run(['--help']) == 0 and run(['--version']) == 0 and run(['inspect', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "headscale 0.1.0" in done.stdout


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headscale", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("headscale ")


def test_calibrate_chooses_writes_and_proves(capsys: Any, backbone: str, reference: str, pairs: str) -> None:
    code = run(["calibrate", backbone, "--reference", reference, "--pairs", pairs, "--save", "out", "--json"])
    document = json.loads(capsys.readouterr().out)
    result = document["results"][0]
    assert code == (0 if result["verdict"]["word"] == "matched" else 1)
    assert 0 < result["scale"] < 1
    written = json.loads(Path("out/headscale.json").read_text())
    assert written["scale"] == result["scale"]
    assert written["reference"]["name"] == reference
    assert all(p["max_error"] <= 1e-5 for p in written["proofs"])
    assert {t["name"] for t in result["targets"]} >= {"norm", "activation", "score", "loss", "constant", "width"}


def test_calibrate_takes_what_was_inspected_before(capsys: Any, backbone: str, reference: str, pairs: str) -> None:
    run(["inspect", backbone, "--reference", reference, "--pairs", pairs])
    capsys.readouterr()
    run(["calibrate", "--reference", reference, "--pairs", pairs, "--json"])
    out, err = capsys.readouterr()
    assert [r["name"] for r in json.loads(out)["results"]] == [backbone]
    assert "no backbone given: those inspected in" in err


def test_profile_is_a_reference(capsys: Any, backbone: str, reference: str, pairs: str) -> None:
    assert run(["profile", reference, "-o", "reference.json", "--pairs", pairs]) == 0
    assert capsys.readouterr().out.strip() == "reference.json"
    by_name = _scales(capsys, ["calibrate", backbone, "--reference", reference, "--pairs", pairs])
    by_file = _scales(capsys, ["calibrate", backbone, "--reference", "reference.json", "--pairs", pairs])
    assert by_name == by_file


def _scales(capsys: Any, command: list[str]) -> list[Any]:
    run([*command, "--json"])
    result = json.loads(capsys.readouterr().out)["results"][0]
    return [t["scale"] for t in result["targets"]]


def test_plots_are_written_by_suffix(capsys: Any, backbone: str, reference: str, pairs: str) -> None:
    run(["calibrate", backbone, "--reference", reference, "--pairs", pairs, "--plot", "a.svg"])
    assert "<svg" in Path("a.svg").read_text()[:500]
    assert run(["calibrate", backbone, "--reference", reference, "--pairs", pairs, "--plot", "a.gif"]) == 2


USAGE = [
    (["inspect"], "missing argument"),
    (["inspect", "x", "--bogus"], "no such option"),
    (["calibrate", "x", "--match", "magic", "--k", "-2"], "`--match magic` is none of"),
    (["calibrate", "x", "--mode", "logits"], "`--mode logits` is none of"),
    (["inspect", "x", "--num-pairs", "0"], "--num-pairs"),
    (["profile", "x", "-o", "x.txt"], "does not end in `.json`"),
]


@pytest.mark.parametrize(("command", "expected"), USAGE)
def test_usage_errors(capsys: Any, command: list[str], expected: str) -> None:
    assert run(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err.replace("Missing", "missing")
    assert "\n\nhint: " in err
    assert "Traceback" not in err


def test_a_usage_error_under_json_is_still_one_object(capsys: Any) -> None:
    assert run(["calibrate", "x", "--match", "magic", "--json"]) == 2
    assert "none of" in json.loads(capsys.readouterr().out)["errors"][0]["message"]


def _break_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{not json here}")


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _nan(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["bert.embeddings.word_embeddings.weight"][7, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _pickle(folder: Path) -> None:
    import os
    import pickle

    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {folder.parent / 'owned'}",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Payload()}))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _base_model(folder: Path) -> None:
    tiny_model("bert", "BertModel").save_pretrained(folder)


def _deberta(folder: Path) -> None:
    tiny_model("deberta-v2", legacy=False).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["legacy"]
    (folder / "config.json").write_text(json.dumps(config))


BROKEN = [
    (_break_header, "model.safetensors"),
    (_truncate, "truncated"),
    (_nan, "not finite"),
    (_pickle, "pytorch_model.bin"),
    (_no_weights, "holds no model weights"),
    (_base_model, "no trained MLM head"),
    (_deberta, "lm_predictions"),
]


@pytest.mark.parametrize("verb", ["inspect", "calibrate", "weights"])
@pytest.mark.parametrize(("harm", "expected"), BROKEN)
def test_a_bad_checkpoint_is_one_sentence_a_hint_and_exit_3(
    capsys: Any, harm: Any, expected: str, verb: str, reference: str, pairs: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("bert", tmp_path / "broken")
    harm(folder)
    options = ["--reference", reference, "--pairs", pairs]
    command = {
        "inspect": ["inspect", str(folder), *options],
        "calibrate": ["calibrate", str(folder), *options, "--save", "out"],
        "weights": ["inspect", str(folder), "--reference", reference, "--weights-only"],
    }[verb]
    before = sorted(p.name for p in tmp_path.iterdir())
    assert run(command) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.count("error: ") == 1
    assert err.count("hint: ") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "owned").exists()
    assert {p.name for p in tmp_path.iterdir()} - set(before) <= {"cache"}


TEXTS = [
    (b"", "empty"),
    (b"caf\xe9 au lait\n" * 40, "UTF-8"),
    (b"one column only\n" * 40, "row 1"),
]


@pytest.mark.parametrize(("content", "expected"), TEXTS)
def test_bad_text_files(capsys: Any, content: bytes, expected: str, backbone: str, reference: str) -> None:
    Path("bad.tsv").write_bytes(content)
    assert run(["inspect", backbone, "--reference", reference, "--pairs", "bad.tsv"]) == 3
    err = capsys.readouterr().err
    assert expected in err
    assert "hint: " in err


def test_an_id_that_cannot_be_had_offline(capsys: Any, reference: str, pairs: str) -> None:
    assert run(["inspect", "nobody/nothing", "--reference", reference, "--pairs", pairs]) == 3
    err = capsys.readouterr().err
    assert "`nobody/nothing`" in err
    assert "hint: " in err


def test_the_default_reference_falls_back_to_the_bundled_bert_aloud(capsys: Any, backbone: str) -> None:
    assert run(["inspect", backbone, "--weights-only", "--json"]) == 0
    assert "the bundled BERT is the reference instead" in capsys.readouterr().err


def test_interrupted_says_what_is_kept(capsys: Any, monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    import headscale.api

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(headscale.api, "find_reference", interrupt)
    assert run(["inspect", backbone, "--weights-only"]) == 130
    assert "interrupted: what was finished is in `headscale-runs`" in capsys.readouterr().err


def test_a_closed_pipe_ends_quietly(backbone: str, reference: str) -> None:
    command = f"{sys.executable} -m headscale inspect {backbone} --weights-only --reference {reference} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_env_names_versions(capsys: Any) -> None:
    assert run(["env"]) == 0
    out = capsys.readouterr().out
    assert f"torch\t{torch.__version__.split('+')[0]}" in out


def test_a_terminal_gets_a_table(backbone: str, reference: str) -> None:
    pty = pytest.importorskip("pty")
    import os

    parent, child = pty.openpty()
    os.set_inheritable(child, True)
    command = [sys.executable, "-m", "headscale", "inspect", backbone, "--weights-only", "--reference", reference, "-q"]
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run(command, stdout=child, stderr=subprocess.PIPE, timeout=60, check=False, env=environment)
    os.close(child)
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    assert done.returncode == 0, done.stderr
    assert "\t" not in shown
    assert "unjudged" in shown
    assert "\x1b[3" not in shown
