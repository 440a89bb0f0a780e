from dataclasses import replace

from sim.reports.html.origins import commands_of, model_table, references_of

MLP = {
    "model": {"name": "mlp", "options": {"hidden": [4], "dropout": 0.0, "embedding": 16}},
    "sides": [1, 2, 2],
    "vocabulary": None,
    "classes": 3,
}


def test_networks_stand_with_the_numbers_that_they_learn(make_run):
    run = make_run()
    result = {**run.result, "networks": [MLP], "backends": {"mlp": ["vmap"]}}
    own = {**MLP, "model": {"name": "my_package:net", "options": {}}}
    other = replace(run, result={**result, "networks": [own]})
    table = model_table({"a": [replace(run, result=result)], "b": [other]})
    # 4 * 4 + 4 and 4 * 3 + 3; of code that is not ours nothing is built.
    assert table.rows[0][1:4] == ["a", "1 x 2 x 2", "35"]
    assert table.rows[1][1:4] == ["b", "1 x 2 x 2", "–"]  # noqa: RUF001
    assert model_table({"a": [run]}) is None


def test_algorithms_of_the_package_have_their_sources(make_run):
    mine = replace(make_run(), settings={"strategy": {"name": "my_package.mine:Mine"}})
    (found,) = references_of({"dml": [make_run(), make_run()], "mine": [mine]})
    assert found.name == "dml"
    assert "2018" in found.source
    assert found.address.startswith("https://")


def test_commands_lead_from_the_report_to_its_runs(make_run, tmp_path):
    one, two = make_run(), make_run(seed=1)
    (again, _), (report, _) = commands_of({"dml": [one, two]}, tmp_path)
    assert again == "fedkd run run-1/settings.yaml"
    assert report == "fedkd report run-1 run-2"
    assert commands_of({"dml": [one]}, one.folder)[0][0] == "fedkd run settings.yaml"
    (tmp_path / "study.json").write_text("{}")
    assert commands_of({"dml": [one, two]}, tmp_path)[1][0] == "fedkd report ."
