"""From a stranger's file to a trained, opened and exported model."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sim.commands.models import Predictions, export, load_model, predict
from sim.commands.running import run
from sim.settings import Settings, SettingsError

Small = Callable[..., Settings]
Fedkd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """A table that anybody could have: two kinds of people, told apart by all that is in it."""
    rng = np.random.default_rng(0)
    path = tmp_path / "people.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "pet", "income", "label"])
        for number in range(240):
            old = number % 2
            age = 30 + 30 * old + rng.normal(scale=4)
            writer.writerow([age, ("cat", "dog")[old], 1000 + 500 * old, ("young", "old")[old]])
    return path


@pytest.mark.parametrize("name", ["fedavg", "distill"])
def test_a_csv_file_to_predictions(
    small: Small, people: Path, tmp_path: Path, fedkd: Fedkd, name: str
) -> None:
    words = [f"data.source={people}", "data.test_rows=40", "data.public.size=20"]
    if name == "distill":
        code, out, _ = fedkd(
            *("distill", *words, "data.private_rows=100", "teacher.training.epochs=3"),
            *("training.epochs=3", f"output={tmp_path / 'runs'}", "--json"),
        )
        assert code == 0
        folder = Path(json.loads(out)["folder"])
    else:
        words += ["clients.models=mlp", "strategy.name=fedavg", "clients.local.epochs=8"]
        settings = small(*words)
        folder = run(settings).folder
    assert load_model(folder).class_names == ("old", "young")
    new = tmp_path / "new.csv"
    # In another order, with a column more, without labels, and with a pet that nobody knew.
    new.write_text("pet,age,name,income\ndog,65,Ann,1500\ncat,28,Bob,1000\nemu,28,Cy,1000\n")
    table = tmp_path / "predictions.csv"
    code, out, err = fedkd("predict", folder, new, "--output", table)
    assert code == 1
    assert f"{new}, line 4: column 'pet': holds 'emu'" in err
    rows = list(csv.DictReader(table.open()))
    assert [row["class"] for row in rows] == ["old", "young", ""]
    assert float(rows[0]["p(old)"]) + float(rows[0]["p(young)"]) == pytest.approx(1, abs=1e-5)
    assert "old" in out
    assert str(table) in out
    new.write_text("pet,age,income\ndog,65,1500\n")
    code, out, _ = fedkd("predict", folder, new, "--json")
    assert code == 0
    (only,) = json.loads(out)["predictions"]
    assert (only["row"], only["class"]) == (0, "old")
    assert sum(only["probabilities"]) == pytest.approx(1, abs=1e-5)


def test_the_line_below_predictions_leaves_no_class_out(small: Small) -> None:
    model = load_model(run(small("clients.models=mlp", "strategy.name=fedavg", "rounds=1")).folder)
    counts = Counter({str(digit): 100 - digit for digit in range(10)})
    caption = Predictions(model, counts=counts).table().caption
    # 1000 - 45 inputs; the two rarest classes have 92 and 91 of them.
    assert "955 inputs: 100 x 0, " in str(caption)
    assert "93 x 7, 183 of 2 more classes" in str(caption)
    del counts["9"]
    assert "93 x 7, 92 of 1 more class;" in str(Predictions(model, counts=counts).table().caption)


def test_export_says_how_well_the_file_agrees(
    small: Small, fedkd: Fedkd, people: Path, tmp_path: Path
) -> None:
    words = [f"data.source={people}", "data.test_rows=40", "data.public.size=20"]
    folder = run(small(*words, "clients.models=mlp", "strategy.name=fedavg")).folder
    code, out, _ = fedkd("export", folder, "--format", "torch", "--inputs", people)
    assert code == 0
    assert (folder / "models" / "server.pt2").is_file()
    # 72 random inputs, and as many from the file as are read at once.
    assert "agrees with the model: 312 inputs, logits differ by at most 0" in out
    code, out, _ = fedkd(
        *("export", folder, "--format", "torch", "--output", tmp_path / "m.pt2", "--json")
    )
    assert json.loads(out)["path"] == str(tmp_path / "m.pt2")
    bad = tmp_path / "bad.csv"
    bad.write_text("pet,age,income\ndog,65,1500\nemu,65,1500\n")
    for given, told in ((bad, "line 3"), (tmp_path / "nope.csv", "does not exist")):
        code, _, err = fedkd("export", folder, "--format", "torch", "--inputs", given)
        assert code == 2
        assert "--inputs" in err
        assert told in err
    with pytest.raises(SettingsError, match=r"is an export for torch\.export\.load"):
        load_model(folder / "models" / "server.pt2")
    # Exported files are no models that a run keeps.
    assert load_model(folder).path.name == "server.safetensors"


def test_mistakes_are_one_line(small: Small, fedkd: Fedkd, tmp_path: Path) -> None:
    folder = run(small("rounds=1", "strategy.name=local")).folder
    for words, told in (
        (["export", folder, "--format", "h5"], "format must be torch or onnx, got 'h5'"),
        (
            ["export", folder, "--output", tmp_path / "no" / "m.pt2", "--format", "torch"],
            "no folder",
        ),
        (["predict", tmp_path, "x.png"], "holds no models: it is not the folder of a run"),
        (["predict", folder, "x.png", "--model", "server"], "holds no model 'server', but client-"),
        (["predict", tmp_path / "m.pth", "x.png"], "may run code when they are read"),
    ):
        code, _, err = fedkd(*words)
        assert code in (1, 2)
        assert told in err
        assert err.count("\n") == 1
    with pytest.raises(SettingsError, match="holds no picture files"):
        predict(folder, [folder / "checkpoints"])
    with pytest.raises(SettingsError, match="holds no models"):
        export(tmp_path)
