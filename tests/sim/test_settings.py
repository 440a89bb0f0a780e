from pathlib import Path

import pytest

from fedkd.distillation.settings import DistillSettings
from sim.settings import (
    Settings,
    SettingsError,
    load_distill_settings,
    load_settings,
    merge_tables,
    settings_from_table,
)
from strategies import STRATEGIES

BAD = {
    "rouns=3": "unknown setting 'rouns'; did you mean 'rounds'?",
    "data.partition.alpa=1": "'data.partition.alpa'; did you mean 'data.partition.alpha'?",
    "strategy.temperatur=1": "'strategy.temperatur'; did you mean 'strategy.temperature'?",
    "rounds=abc": "rounds: must be a valid integer",
    "rounds=-1": "rounds: must be greater than or equal to 1, got -1",
    "clients=3": "clients is a section of settings, got 3; did you mean clients.count=3?",
    "strategy.temperature=0": "strategy.temperature: must be > 0, got 0.0",
    "strategy.temperature={kind: cosine, start: 4, end: 0}": "strategy.temperature: must be > 0",
    "strategy.kd_weight=-1": "strategy.kd_weight: must be >= 0, got -1.0",
    "strategy.name=fedfd": "unknown strategy 'fedfd'; known: dml, fedavg, fedmd",
    "clients.models=[mlq]": "unknown model 'mlq'; known: mlp, cnn",
    "clients.models=[]": "clients.models: need at least one model",
    "clients.participants=20": "clients.participants must be at most clients.count (10), got 20",
    "clients.participation=1.5": "clients.participation: must be less than or equal to 1, got 1.5",
    "clients.optimizer.lr=.nan": "clients.optimizer.lr",
    "exchange.rows_per_round=600": "exchange.rows_per_round must be at most data.public.size (500)",
    "name=../elsewhere": "name must be 1 to 64 letters",
    "name=..": "name must be 1 to 64 letters",
    "engine.backend=spark": "engine.backend: must be 'ray' or 'inline', got 'spark'",
    "seed=-1": "seed: must be greater than or equal to 0, got -1",
}


@pytest.mark.parametrize("override", BAD)
def test_a_setting_that_cannot_work_is_one_line_that_names_it(override: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, [override])
    assert BAD[override] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["rounds", "=3"])
def test_overrides_are_written_key_value(text: str) -> None:
    with pytest.raises(SettingsError, match="key=value"):
        load_settings(None, [text])


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("rounds: 3\nseed: 5\nname: from-${seed}\n")
    settings = load_settings(config, ["seed=6"])
    assert (settings.rounds, settings.seed, settings.name) == (3, 6, "from-6")
    assert settings.clients.count == Settings().clients.count


def test_naming_another_strategy_drops_the_old_one_s_settings(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("strategy: {name: dml, temperature: 2.0}\n")
    assert load_settings(config, ["strategy.name=local"]).strategy.name == "local"
    assert load_settings(config, ["strategy=fedmd"]).strategy.name == "fedmd"


def test_another_kind_of_schedule_replaces_the_old_one_whole() -> None:
    table = {"strategy": {"name": "dml", "temperature": {"kind": "constant", "value": 2.0}}}
    patch = {"strategy": {"temperature": {"kind": "linear", "start": 3, "end": 1}}}
    merged = merge_tables(table, patch)
    assert merged["strategy"]["temperature"] == {"kind": "linear", "start": 3, "end": 1}
    assert merged["strategy"]["name"] == "dml"


def test_a_new_name_of_the_run_keeps_all_other_settings() -> None:
    assert merge_tables({"name": "a", "rounds": 3}, {"name": "b"}) == {"name": "b", "rounds": 3}


@pytest.mark.parametrize("name", STRATEGIES)
def test_saved_settings_load_to_equal_settings(name: str, tmp_path: Path) -> None:
    settings = load_settings(None, [f"strategy.name={name}", "clients.models=[mlp,resnet8]"])
    saved = tmp_path / "settings.yaml"
    saved.write_text(settings.to_yaml())
    assert load_settings(saved) == settings
    assert settings_from_table(settings.to_table()) == settings


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("- 1\n", "table of keys"), ("a: [1\n", "cannot read config"), ("a: ${b}\n", "'b' not found")],
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=complaint):
        load_settings(config)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        load_settings(tmp_path / "no.yaml")
    with pytest.raises(SettingsError, match="is a folder"):
        load_settings(tmp_path)


def test_yaml_that_asks_for_objects_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(SettingsError, match="cannot read config"):
        load_settings(config)


def weights(settings: DistillSettings) -> dict[str, float]:
    return {name: term.weight.at(0.0) for name, term in settings.objective.terms.items()}


def test_a_word_changes_one_term_of_the_default_objective_and_leaves_the_others() -> None:
    settings = load_distill_settings(None, ["objective.kd.weight=0.3", "objective.mse=2"])
    assert weights(settings) == {"ce": 0.1, "kd": 0.3, "mse": 2.0}
    assert settings.objective.terms["kd"].model_dump()["temperature"]["value"] == 4.0


def test_an_objective_that_is_written_whole_replaces_the_old_one(tmp_path: Path) -> None:
    assert weights(load_distill_settings(None, ["objective={mse: 1}"])) == {"mse": 1.0}
    config = tmp_path / "a.yaml"
    config.write_text("objective: {ce: 1, kd: {weight: 2, temperature: 3}}\n")
    assert weights(load_distill_settings(config)) == {"ce": 1.0, "kd": 2.0}
    assert weights(load_distill_settings(config, ["objective={mse: 1}"])) == {"mse": 1.0}
    changed = load_distill_settings(config, ["objective.kd.temperature=8"])
    assert weights(changed) == {"ce": 1.0, "kd": 2.0}
    assert changed.objective.terms["kd"].model_dump()["temperature"]["value"] == 8.0


def test_one_setting_of_the_data_leaves_the_defaults_of_the_others() -> None:
    data = load_distill_settings(None, ["data.seed=3", "data.public.labelled=true"]).data
    assert (data.seed, data.private_rows, data.public.size) == (3, 100, 1000)


def test_settings_of_a_distillation_load_to_equal_settings(tmp_path: Path) -> None:
    from sim.settings import yaml_text

    words = ["method.name=dml", "teacher.models=[cnn,mlp]", "seeds=2"]
    settings = load_distill_settings(None, words)
    saved = tmp_path / "settings.yaml"
    saved.write_text(yaml_text(settings.to_table()))
    assert load_distill_settings(saved) == settings


@pytest.mark.parametrize("name", ["distill", "tutorial"])
def test_the_configs_that_come_with_it_are_settings(name: str) -> None:
    config = Path(__file__).parents[2] / "conf" / f"{name}.yaml"
    settings = load_distill_settings(config)
    assert settings.name == name
    if name == "distill":
        assert settings == DistillSettings()
    else:
        assert (settings.data.private_rows, settings.data.public.size) == (None, 0)
        assert weights(settings) == {"ce": 0.5, "kd": 0.5}
        assert settings.student.model.name == "tutorial_student"


def test_a_section_written_as_its_name_keeps_it_when_a_word_adds_to_it(tmp_path: Path) -> None:
    """Otherwise another algorithm than the one that was named would run, without a word."""
    words = load_settings(None, ["strategy=fedmd", "strategy.weighting=examples"])
    assert words.strategy.name == "fedmd"
    config = tmp_path / "a.yaml"
    config.write_text("strategy: fml\nclients: {models: [mlp]}\n")
    settings = load_settings(config, ["strategy.meme=cnn", "strategy.weighting=examples"])
    assert settings.strategy.name == "fml"
    assert settings.strategy.model_dump()["weighting"] == "examples"
    distilled = load_distill_settings(
        None, ["method=dml", "method.peers=3", "student.model=cnn", "student.model.options={}"]
    )
    assert distilled.method.name == "dml"
    assert distilled.student.model.name == "cnn"


def test_an_option_of_another_method_is_named_as_unknown() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting 'method\.peers'"):
        load_distill_settings(None, ["method.peers=3"])


def test_a_word_changes_one_term_of_a_strategys_default_objective() -> None:
    settings = load_settings(None, ["strategy.name=fml", "strategy.objective.kd.temperature=2"])
    terms = settings.strategy.model_dump(mode="json")["objective"]
    assert terms["ce"]["weight"]["value"] == terms["kd"]["weight"]["value"] == 0.5
    assert terms["kd"]["temperature"]["value"] == 2
    whole = load_settings(None, ["strategy.name=fml", "strategy.objective={ce: 1}"])
    assert list(whole.strategy.model_dump()["objective"]) == ["ce"]


def test_a_word_that_cannot_be_read_is_named_alone() -> None:
    with pytest.raises(SettingsError, match=r"^cannot read 'objective=\{ce: 1':"):
        load_distill_settings(None, ["seed=1", "objective={ce: 1"])
