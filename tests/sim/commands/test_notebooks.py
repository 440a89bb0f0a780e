"""What a notebook shows of a run and a study that are called from Python."""

import re
import sys
from types import SimpleNamespace

import nbclient
import nbformat

from sim.commands.notebooks import NotebookLine, in_notebook, shown
from sim.commands.running import run
from sim.commands.study import compare
from sim.publishing.hypertext import to_html

CELLS = (
    """
import fedkd
words = ["rounds=2", "clients.count=2", "clients.models=[mlp]", "clients.local.epochs=1",
         "engine.backend=inline", "data.private_rows=80", "data.public.size=30"]
result = fedkd.run(fedkd.load_settings(None, words))
result
""",
    "result = fedkd.run(fedkd.load_settings(None, words), progress=False)",
)


def test_a_notebook_sees_a_line_that_changes_and_a_small_table(tmp_path):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in CELLS])
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=60, resources=place).execute()
    (line, table), silent = (cell.outputs for cell in book.cells)
    assert re.fullmatch(
        r"dml: 2/2 rounds, accuracy \d+\.\d %; \d:\d\d:\d\d", line["data"]["text/plain"]
    )
    assert "<td>finished</td>" in table["data"]["text/html"]
    assert len(table["data"]["text/plain"]) < 500
    assert silent == []


def test_a_plain_script_sees_nothing_unless_it_asks(small, capsys):
    assert not in_notebook()
    run(small("strategy.name=local"))
    assert capsys.readouterr() == ("", "")
    run(small("strategy.name=local", "seed=1"), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "local: 2/2 rounds" in err


def test_a_study_counts_its_runs_and_is_a_frame_and_a_table(small, capsys):
    study = compare(small(), arms=["local", "dml"], seeds=2, progress=True)
    assert "4/4 runs" in capsys.readouterr().err
    frame = study.to_pandas()
    assert frame[["arm", "seed"]].to_numpy().tolist() == [
        ["local", 0],
        ["local", 1],
        ["dml", 0],
        ["dml", 1],
    ]
    assert frame["accuracy"].tolist()[2] == study.runs["dml"][0].last["accuracy"]
    assert len(study.to_pandas("clients")) == sum(
        len(each.clients) for of_arm in study.runs.values() for each in of_arm
    )
    text = study._repr_html_()
    assert text.count("<tr>") == 3
    assert "<td>local</td>" in text
    assert "color" not in text


def test_the_line_is_drawn_once_and_then_changed_with_pauses(monkeypatch):
    drawn = []
    handle = SimpleNamespace(update=lambda line, raw: drawn.append(line["text/plain"]))

    def display(line, **how):
        drawn.append(line["text/plain"])
        return handle

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    now = [0.0]
    with NotebookLine(clock=lambda: now[0]) as line:
        task = line.begin("dml")
        for completed, seconds in enumerate([0.0, 0.1, 0.15, 3.0], start=1):
            now[0] = seconds
            line.reached(task, completed, 5, "")
    assert drawn == [f"dml: {done}/5 rounds; 0:00:0{at}" for done, at in ((1, 0), (4, 3), (4, 3))]


def test_a_kernel_is_a_notebook_and_a_shell_is_not(monkeypatch):
    for shell, expected in (
        (SimpleNamespace(kernel=object()), True),
        (SimpleNamespace(), False),
        (None, False),
    ):
        ipython = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        assert in_notebook() is expected
    with shown(False) as signs:
        assert signs is None


def test_html_is_escaped():
    html = to_html(["<i>"], [["a & b"]], ["<b>"])
    assert "<th>&lt;i&gt;</th>" in html
    assert "<td>a &amp; b</td>" in html
    assert "<div>&lt;b&gt;</div>" in html
