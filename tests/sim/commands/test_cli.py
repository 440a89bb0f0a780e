import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from sim.commands import cli
from sim.keeping.records import read_rows

Words = tuple[str, ...]
Fedkd = Callable[..., tuple[int, str, str]]


def test_version_and_help_with_examples(fedkd: Fedkd) -> None:
    code, out, _ = fedkd("--version")
    assert (code, out) == (0, "fedkd 0.1.0\n")
    for words in [
        [name, "--help"]
        for name in ("run", "compare", "attack", "distill", "data", "report", "predict", "export")
    ]:
        code, out, _ = fedkd(*words)
        assert code == 0
        assert "Examples" in out
        assert "fedkd" in out


BAD = {
    "unknown key": (["run", "rouns=3"], "unknown setting 'rouns'; did you mean 'rounds'?"),
    "wrong type": (["run", "rounds=many"], "rounds: must be a valid integer"),
    "temperature 0": (["run", "strategy.temperature=0"], "strategy.temperature: must be >= 0.001"),
    "negative rounds": (["run", "rounds=-3"], "rounds: must be greater than or equal to 1"),
    "participants": (["run", "clients.participants=99"], "clients.count (10), got 99"),
    "gpus": (["run", "engine.gpus_per_worker=512"], "engine.gpus_per_worker must be at most"),
    "strategy": (
        ["run", "strategy.name=fedfd"],
        "unknown strategy 'fedfd'; known: cfd, codistillation, ",
    ),
    "model": (["run", "clients.models=[lenett]"], "unknown model 'lenett'; known: mlp"),
    "arm": (["compare", "--arms", "local,dmll"], "unknown arm 'dmll'; known: cfd"),
    "nothing to accept": (["run", "--accept-code"], "--accept-code is about earlier runs"),
    "a setting of no arm": (
        ["compare", "--arms", "local,fedavg", "strategy.temperature=8"],
        "no arm has the setting 'strategy.temperature' (local, fedavg)",
    ),
    "missing folder": (["run", "data.source=./no/such/folder"], "data.source"),
    "missing config": (["run", "no.yaml"], "config 'no.yaml' does not exist"),
    "two configs": (["run", "a.yaml", "b.yaml"], "at most one config file"),
    "too many clients": (["run", "clients.count=5000"], "clients.count"),
    "public too large": (["run", "data.public.size=5000"], "data.public.size"),
    "no such run": (["report", "nowhere"], "nowhere"),
    "custom model": (["run", "clients.models=['nowhere:net']"], "nowhere"),
    "nothing to resume": (["run", "--resume", "nowhere"], "'nowhere' is not the folder of a run"),
    "resume with a config": (["run", "--resume", "a", "b.yaml"], "leave the config out"),
    "checkpoints": (["run", "checkpoints.keep=0"], "checkpoints.keep: must be greater than"),
    "judged": (["run", "evaluation.clients=11"], "at most clients.count (10), got 11"),
    "setting as option": (["run", "--rounds", "3"], "key=value: fedkd run rounds=3"),
    "setting as option with =": (["run", "--rounds=3"], "key=value: fedkd run rounds=3"),
    "setting as short option": (["run", "-rounds=3"], "no option '-rounds'"),
    "option of another command": (["run", "--seeds", "3"], "no option '--seeds'"),
    "arms with spaces": (["compare", "--arms", "dml", "local"], "commas: --arms dml,local"),
    "arms in one word": (["compare", "--arms", "dml local"], "arms are separated by commas"),
    "arms without the option": (["compare", "local", "dml"], "commas: --arms local,dml"),
    "arms twice": (["compare", "--arms", "dml", "--arms", "local"], "commas: --arms dml,local"),
    "seeds twice": (["compare", "--seeds", "3", "--seeds", "4"], "--seeds is given 2 times"),
    "seeds": (["compare", "--seeds", "x"], "'x' is not a valid integer"),
    "no seeds": (["compare", "--seeds"], "'--seeds' requires an argument"),
    "baseline": (
        ["compare", "--arms", "local,dml", "--baseline", "dmll"],
        "baseline must be one of the arms (local, dml), got 'dmll'; did you mean 'dml'?",
    ),
    "baseline in settings": (
        ["compare", "--arms", "local,dml", "study.baseline=x"],
        "study.baseline must be one of the arms (local, dml), got 'x'",
    ),
    "strategy as command": (["dml"], "did you mean 'fedkd run strategy.name=dml'?"),
    "command": (["comapre"], "did you mean 'fedkd compare'?"),
    "spaces around =": (["run", "rounds", "=", "3"], "no space around ="),
    "unquoted list": (["run", "clients.models=[mlp,", "cnn]"], "quote what has spaces"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_line_and_exit_code_2(
    fedkd: Fedkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words, complaint = BAD[mistake]
    started: list[object] = []
    monkeypatch.setattr(ray, "init", lambda *_, **__: started.append(1))
    code, out, err = fedkd(*words)
    assert code == 2, err
    assert complaint in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err
    assert not started, "Ray must not start before the mistake is found"
    assert not list(tmp_path.iterdir()), "nothing is left where nothing was run"


def test_a_folder_without_labels_is_named(fedkd: Fedkd, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # As the Hugging Face layout has it, but for the label.
    pictures = [{"bytes": b"not read before the label is missed", "path": None}] * 2
    folder = tmp_path / "pictures"
    folder.mkdir()
    pq.write_table(pa.table({"image": pictures}), folder / "train-00000-of-00001.parquet")
    code, _, err = fedkd("run", f"data.source={folder}")
    assert code == 2
    assert "data.label_column" in err
    assert len(err.strip().splitlines()) == 1


def test_an_unwritable_output_is_named(fedkd: Fedkd, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    code, _, err = fedkd("run", f"output={in_the_way}/runs", "engine.backend=inline")
    assert code == 2
    assert "output" in err


def test_run_prints_a_table_and_draws_nothing_unless_asked(
    fedkd: Fedkd, tmp_path: Path, small_words: Words
) -> None:
    code, out, err = fedkd("run", *small_words, f"output={tmp_path}")
    assert code == 0
    assert [line.split(",")[0] for line in err.splitlines()] == [
        "dml: 1/2 rounds",
        "dml: 2/2 rounds",
    ]
    assert "mean client accuracy" in out
    (folder,) = tmp_path.glob("*/*")
    assert f"run    {folder}\ndraw   fedkd report {folder}\n" in out
    assert not (folder / "report.html").exists()
    assert not (folder / "figures").exists()


def test_run_leaves_a_report_where_asked(fedkd: Fedkd, tmp_path: Path, small_words: Words) -> None:
    _, out, _ = fedkd("run", *small_words, f"output={tmp_path}", "--json")
    folder = Path(json.loads(out)["folder"])
    # A finished run is only drawn.
    code, out, _ = fedkd("run", "--resume", str(folder), "--report")
    assert code == 0
    assert f"report {folder / 'report.html'}\n" in out
    assert (folder / "report.html").is_file()
    assert (folder / "figures" / "accuracy_by_round.svg").is_file()
    _, out, _ = fedkd("run", "--resume", str(folder), "--report", "--json")
    assert json.loads(out)["report"] == str(folder / "report.html")


def test_json_is_one_object_and_nothing_else(
    fedkd: Fedkd, tmp_path: Path, small_words: Words
) -> None:
    code, out, err = fedkd("run", *small_words, f"output={tmp_path}", "--json")
    assert (code, err) == (0, "")
    row = json.loads(out)
    assert len(row["weights_sha256"]) == 64
    assert row["status"] == "finished"


def test_a_model_of_one_s_own_is_found_in_the_current_folder(
    fedkd: Fedkd, tmp_path: Path, small_words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_models.py").write_text(
        "from torch import nn\n"
        "def net(*, input_shape, num_classes):\n"
        "    c, h, w = input_shape\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    words = [*small_words, "clients.models=['my_own_models:net']", f"output={tmp_path / 'runs'}"]
    assert fedkd("run", *words, "--quiet") == (0, "", "")


def test_code_that_only_a_file_names_runs_when_it_is_allowed(
    fedkd: Fedkd, tmp_path: Path, small_words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_models.py").write_text(
        "from pathlib import Path\n"
        "from torch import nn\n"
        "Path(__file__).with_name('was-here').touch()\n"
        "def net(*, input_shape, num_classes):\n"
        "    c, h, w = input_shape\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, num_classes))\n"
    )
    config = tmp_path / "theirs.yaml"
    config.write_text("clients: {models: ['their_models:net']}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    words = [str(config), *(word for word in small_words if "models" not in word)]
    words.append(f"output={tmp_path / 'runs'}")
    for command in ("run", "compare"):
        code, _, err = fedkd(command, *words)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "add --allow their_models" in err
    assert not (tmp_path / "was-here").exists()
    code, out, err = fedkd("run", *words, "--allow", "their_models", "--json")
    assert (code, err) == (0, "")
    folder = json.loads(out)["folder"]
    (tmp_path / "was-here").unlink()
    sys.modules.pop("their_models")
    code, _, err = fedkd("run", "--resume", folder)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "add --allow their_models" in err
    assert fedkd("report", folder)[0] == 0
    # Neither a refusal nor a report has run a line of theirs.
    assert not (tmp_path / "was-here").exists()
    assert fedkd("run", "--resume", folder, "--allow", "their_models", "--json")[0] == 0


def test_a_function_that_only_a_file_names_deals_rows_when_it_is_allowed(
    fedkd: Fedkd, tmp_path: Path, small_words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_parts.py").write_text(
        "import numpy as np\n"
        "from pathlib import Path\n"
        "Path(__file__).with_name('was-here').touch()\n"
        "def in_turn(labels, *, num_clients, rng):\n"
        "    return [np.arange(k, len(labels), num_clients) for k in range(num_clients)]\n"
    )
    config = tmp_path / "theirs.yaml"
    config.write_text("data: {partition: {kind: 'their_parts:in_turn'}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    words = [str(config), *small_words, f"output={tmp_path / 'runs'}"]
    for command in ("data", "run"):
        code, _, err = fedkd(command, *words)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "data.partition.kind: 'their_parts:in_turn' is code that only a file names" in err
    assert not (tmp_path / "was-here").exists()
    code, out, _ = fedkd("data", *words, "--allow", "their_parts", "--json")
    assert code == 0
    sizes = [row["rows"] for row in json.loads(out)["clients"]]
    assert max(sizes) - min(sizes) <= 1
    code, out, _ = fedkd("run", *words, "--allow", "their_parts", "--json")
    assert code == 0
    folder = json.loads(out)["folder"]
    assert "add --allow their_parts" in fedkd("run", "--resume", folder)[2]
    assert fedkd("run", "--resume", folder, "--allow", "their_parts", "--json")[0] == 0


def test_a_finished_run_says_so_and_shows_its_result(
    fedkd: Fedkd, tmp_path: Path, small_words: Words
) -> None:
    _, out, _ = fedkd("run", *small_words, f"output={tmp_path}", "--json")
    first = json.loads(out)
    code, out, err = fedkd("run", "--resume", first["folder"], "--json")
    assert (code, err) == (0, f"{first['folder']} is finished already\n")
    assert json.loads(out) == first
    code, out, _ = fedkd("run", "--resume", first["folder"])
    assert code == 0
    assert "mean client accuracy" in out


def test_a_run_is_resumed_with_its_own_settings(
    fedkd: Fedkd, tmp_path: Path, small_words: Words
) -> None:
    _, out, _ = fedkd("run", *small_words, f"output={tmp_path}", "--json")
    first = json.loads(out)
    folder = Path(first["folder"])
    # As a process leaves it that was killed before it could write its result.
    (folder / "result.json").unlink()
    code, _, err = fedkd("run", "--resume", str(folder), "rounds=9")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "rounds: a resumed run cannot change it" in err
    code, out, err = fedkd("run", "--resume", str(folder), "checkpoints.every=1", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["weights_sha256"] == first["weights_sha256"]
    for manifest in (folder / "checkpoints").glob("*/MANIFEST.json"):
        manifest.write_bytes(b"")
    (folder / "result.json").unlink()
    code, _, err = fedkd("run", "--resume", str(folder))
    assert (code, len(err.splitlines())) == (1, 1)
    assert "no checkpoint can be used: checkpoint" in err


def test_quiet_prints_nothing(fedkd: Fedkd, tmp_path: Path, small_words: Words) -> None:
    assert fedkd("run", *small_words, f"output={tmp_path}", "--quiet") == (0, "", "")


def test_a_comparison_ends_with_its_answer(
    fedkd: Fedkd, tmp_path: Path, small_words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--arms", "local,fedavg", "--seeds", "2", "--baseline", "fedavg"]
    words += ["--parallel", "1"]
    code, out, err = fedkd("compare", *words, *small_words, f"output={tmp_path}")
    assert code == 0
    assert [line.split(",")[0] for line in err.splitlines()] == [
        "fedkd: 4 runs: 2 arms x 2 seeds; one after the other (study.parallel is 1)",
        "local seed 0: 1/2 rounds",
        *(f"{arm} seed {seed}: 2/2 rounds" for seed in (0, 1) for arm in ("local", "fedavg")),
    ]
    *_, heading, answer, remark = out.splitlines()
    assert heading.startswith("Against fedavg, by mean client accuracy at the last round")
    assert "whether local beats fedavg" in answer or answer.startswith("local ")
    assert remark.startswith("* two seeds are few")
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = fedkd("compare", *words, *small_words, f"output={tmp_path}")
    table = out.split("report ")[0]
    assert all(len(line) <= 40 for line in table.splitlines())
    assert "local" in table
    assert "--wide shows" in " ".join(table.split())
    _, out, _ = fedkd("compare", "--wide", *words, *small_words, f"output={tmp_path}")
    assert "left out" not in out.split("report ")[0]


def test_what_an_error_quotes_moves_no_cursor(fedkd: Fedkd) -> None:
    code, out, err = fedkd("run", "name=\x1b[2J\nx")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "\x1b" not in err


def test_a_run_that_was_asked_for_nothing_shows_help(fedkd: Fedkd) -> None:
    code, out, err = fedkd()
    assert code == 2
    assert "fedkd compare" in out + err


def test_data_shows_the_split_and_draws_it(
    fedkd: Fedkd, tmp_path: Path, small_words: Words
) -> None:
    code, out, _ = fedkd("data", *small_words, f"output={tmp_path}", "--json")
    assert code == 0
    shown = json.loads(out)
    assert sum(client["rows"] for client in shown["clients"]) == shown["sizes"]["private"]
    assert Path(shown["figure"]).read_bytes().startswith(b"\x89PNG")
    code, out, _ = fedkd("data", *small_words, f"output={tmp_path}")
    assert code == 0
    assert "figure" in out


def test_ctrl_c_exits_with_130_and_leaves_a_readable_folder(
    tmp_path: Path, small_words: Words
) -> None:
    words = [*small_words, "rounds=500", f"output={tmp_path}", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedkd", "run", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob("*/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    while time.monotonic() < deadline:
        (metrics,) = tmp_path.glob("*/*/metrics.jsonl")
        if metrics.stat().st_size:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in err
    assert str(tmp_path) in err
    assert "Traceback" not in err
    assert read_rows(metrics)[0]["round"] == 1
    assert json.loads((metrics.parent / "result.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("library", ["says which", "says Ctrl-C"])
def test_a_signal_before_anything_runs_is_one_line_and_its_own_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
    library: str,
) -> None:
    def settings(*_: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if library == "says which":
                raise
            raise KeyboardInterrupt from None

    monkeypatch.setattr(sys, "argv", ["fedkd", "run"])
    monkeypatch.setattr("sim.commands.cli.runs.read_settings", settings)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    assert capsys.readouterr().err == "fedkd: interrupted\n"


def test_the_last_line_of_a_run_says_what_was_spent_where_something_is_promised() -> None:
    from sim.commands.cli.printing import privacy_text

    spent = {
        "mechanism": "dp_sgd",
        "unit": "example",
        "delta": 1e-5,
        "budget": 8,
        "epsilon": 7.99996,
    }
    assert privacy_text(spent) == "; epsilon 8 of 8 for each example, delta 1e-05"
    noised = {
        "mechanism": "gaussian",
        "unit": "client",
        "delta": 1e-5,
        "budget": None,
        "epsilon": 12.3456,
    }
    assert privacy_text(noised) == "; epsilon 12.35 for each client, delta 1e-05"
    assert privacy_text({}) == ""
    assert "–" in privacy_text({"mechanism": "own:Noise", "unknown": "nobody knows"})  # noqa: RUF001


SWEPT = (
    "study={seeds: 1, refused: show, sweep: {strategy.name: [fedmd, fedavg], "
    "exchange.up: [float32, {kind: top_k, k: 2}]}}"
)


def test_a_sweep_ends_with_its_table_and_refusals_are_told_once(
    fedkd: Fedkd, small_words: Words, tmp_path: Path
) -> None:
    code, out, err = fedkd("compare", "--wide", SWEPT, *small_words, f"output={tmp_path}")
    assert code == 0
    words = [line.split() for line in out.splitlines()]
    # Every line a row of the heat map; what cannot run says so in its cell.
    assert [line[0] for line in words[-3:]] == ["strategy", "fedmd", "fedavg"]
    assert words[-1][-1] == "refused"
    assert "fedavg-top_k-2 (refused)" in out
    assert (out + err).count("refused: fedavg-top_k-2: exchange.up top_k") == 1


def test_what_a_swept_study_would_spend_is_said_of_every_arm(
    fedkd: Fedkd, small_words: Words
) -> None:
    mechanism = "[{mechanism: none}, {mechanism: gaussian, noise: 4}]"
    words = (*small_words, f"study.sweep={{strategy.name: [fedmd, fedavg], privacy: {mechanism}}}")
    code, _, _ = fedkd("privacy", *words)
    assert code == 2
    code, out, _ = fedkd("privacy", *words, "study.refused=show", "--json")
    told = json.loads(out)
    assert code == 0
    assert [arm["name"] for arm in told["arms"]] == [
        "fedmd-none",
        "fedmd-gaussian-4",
        "fedavg-none",
    ]
    assert list(told["refused"]) == ["fedavg-gaussian-4"]
