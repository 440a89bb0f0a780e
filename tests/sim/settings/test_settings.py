from pathlib import Path

import pytest

from fedkd.distillation.settings import DistillSettings
from sim.settings import (
    Settings,
    SettingsError,
    check_seeds,
    load_distill_settings,
    load_settings,
    merge_tables,
    settings_from_table,
)
from strategies import STRATEGIES

BAD = {
    "rouns=3": "unknown setting 'rouns'; did you mean 'rounds'?",
    "data.partition.alpa=1": "'data.partition.alpa'; did you mean 'data.partition.alpha'?",
    "data.partition={kind: iid, alpha: 1}": (
        "unknown setting 'data.partition.alpha'; known there: kind, min_rows"
    ),
    "data.partition.kind=shards": "unknown partition 'shards'; known: iid, dirichlet, ",
    "data.label_noise.rate=40": "label_noise.rate: must be a share from 0 to 1, as 0.4 for 40 %",
    "data.feature_shift.shifts=[{kind: rotate}]": (
        "data.feature_shift.shifts.0: unknown kind 'rotate'; known: none, rotation, blur, colour, "
        "noise, scale, offset; did you mean 'rotation'?"
    ),
    "strategy.temperatur=1": "'strategy.temperatur'; did you mean 'strategy.temperature'?",
    "rounds=abc": "rounds: must be a valid integer",
    "rounds=-1": "rounds: must be greater than or equal to 1, got -1",
    "clients=3": "clients is a section of settings, got 3; did you mean clients.count=3?",
    "strategy.temperature=0": "strategy.temperature: must be >= 0.001 and <= 10000, got 0.0",
    "strategy.temperature={kind: cosine, start: 4, end: 0}": "strategy.temperature: must be >=",
    "strategy.kd_weight=-1": "strategy.kd_weight: must be >= 0 and <= 1e+06, got -1.0",
    "strategy.name=fedfd": "unknown strategy 'fedfd'; known: cfd, codistillation, ",
    "clients.models=[mlq]": "unknown model 'mlq'; known: mlp, cnn",
    "clients.models=[]": "clients.models: need at least one model",
    "clients.participants=20": "clients.participants must be at most clients.count (10), got 20",
    "clients.participation=1.5": "clients.participation: must be less than or equal to 1, got 1.5",
    "clients.optimizer.lr=.nan": "clients.optimizer.lr",
    "exchange.rows_per_round=600": "exchange.rows_per_round must be at most data.public.size (500)",
    "name=../elsewhere": "name must be 1 to 64 letters",
    "name=..": "name must be 1 to 64 letters",
    "engine.backend=spark": "engine.backend: must be 'auto', 'ray' or 'inline', got 'spark'",
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
    from sim.settings.tables import yaml_text

    words = ["method.name=dml", "teacher.models=[cnn,mlp]", "seeds=2"]
    settings = load_distill_settings(None, words)
    saved = tmp_path / "settings.yaml"
    saved.write_text(yaml_text(settings.to_table()))
    assert load_distill_settings(saved) == settings


@pytest.mark.parametrize("name", ["distill", "tutorial"])
def test_the_configs_that_come_with_it_are_settings(name: str) -> None:
    config = Path(__file__).parents[3] / "conf" / f"{name}.yaml"
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


NONSENSE = {
    "strategy.name=[a]": "strategy: unknown strategy ['a']",
    "strategy=[a]": "strategy: must be a name or a table with a name, got ['a']",
    "strategy=true": "strategy: must be a name or a table with a name, got True",
    "strategy.name={a: b}": "strategy: unknown strategy {'a': 'b'}",
    "rounds=true": "rounds: must be a valid integer, got True",
    "rounds=12:30": "rounds: must be a valid integer, got '12:30'",
    "rounds='3'": "rounds: must be a valid integer, got '3'",
    "rounds=1e30": "rounds: must be a valid integer, got 1e+30",
    "rounds=2.5": "rounds: must be a valid integer",
    "rounds=1000000000": "rounds: must be less than or equal to 1000000",
    "clients.local.epochs=1000000000": "clients.local.epochs: must be less than or equal",
    "clients.count=1000000000": "clients.count: must be less than or equal",
    "clients.models=7": "clients.models",
    "clients.models=[[mlp]]": "clients.models.0",
    "clients.models={name: [mlp]}": "clients.models.0",
    "clients.models={name: mlp, options: {hidden: [true]}}": "hidden.0",
    "clients.models={name: mlp, options: {hidden: [10000000]}}": "hidden.0",
    "study.seeds=100000000000000000000": "study.seeds: must be a number below 2**63",
    "study.seeds=1000000": "study.seeds: must be less than or equal to 1000",
    "study.arms=[a]": "study.arms",
    "seed=4294967296": "seed: must be less than or equal to 4294967295",
    "engine.deadline_s=.inf": "engine.deadline_s: must be a finite number, got inf",
    "engine.deadline_s=true": "engine.deadline_s: must be a valid number, got True",
    "engine.cpus_per_worker=1e-300": "engine.cpus_per_worker",
    'engine.address="a\\tb"': "engine.address",
    "clients.optimizer.lr=1e30": "clients.optimizer.lr: must be less than or equal to 1000",
    "clients.optimizer.lr=1e-300": "clients.optimizer.lr: must be greater than or equal to",
    "clients.participation=1e-300": "clients.participation: must be greater than",
    "strategy.temperature=1e-300": "strategy.temperature: must be >= 0.001",
    "strategy.temperature=1e300": "strategy.temperature: must be",
    "strategy.kd_weight=1e30": "strategy.kd_weight: must be",
    "data.test_fraction=1e-300": "data.test_fraction: must be greater than or equal to 0.001",
    "data.seed=4294967296": "data.seed",
    "data.source=''": "data.source",
    'output="a\\0b"': "output: must be text without control characters",
    "evaluation.clients=true": "evaluation.clients: must be all, participants or a number",
    "evaluation.clients=[all]": "evaluation.clients: must be all, participants or a number",
    "checkpoints.every=1e9": "checkpoints.every",
    "faults=[{kind: delay, seconds: 1e30}]": "faults.0.seconds",
    "faults=[{kind: delay, clients: [true]}]": "faults.0.clients.0",
    "clients.models={name: 'os:system'}": "'os:system' is no model",
    "clients.models={name: 'torch.hub:load'}": "'torch.hub:load' is no model",
    "clients.models={name: 'builtins:eval'}": "'builtins:eval' is no model",
    "clients.models={name: 'mine:net', options: {a: .nan}}": "clients.models.options.a: must be",
}


@pytest.mark.parametrize("word", NONSENSE)
def test_nonsense_is_one_line_that_names_the_setting(word: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, [word])
    assert NONSENSE[word] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        "threads=100000",
        "seeds=100000000000000000000",
        "training.epochs=1000000000",
        "method=[a]",
        "method.name={a: b}",
        "search.temperatures=[1e-300]",
        "search.weights=[true]",
        "objective={kd: {temperature: 1e-300}}",
        "objective.kd=[a]",
        "objective={kd: {kind: [a]}}",
        "teacher.models={name: [a]}",
        "teacher.tasks={a: [true, 1]}",
        "student.prune={amount: 1e300}",
        "diagnostics.noise=[1e-300]",
        'teacher.weights="a\\0b"',
    ],
)
def test_nonsense_of_a_distillation_is_one_line_that_names_the_setting(word: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"^{word.partition('.')[0].partition('=')[0]}"
    ) as caught:
        load_distill_settings(None, [word])
    assert "\n" not in str(caught.value)


def test_many_problems_are_told_in_a_few_lines_words() -> None:
    with pytest.raises(SettingsError, match="and 95 more") as caught:
        load_settings(None, [f"clients.local.k{i}={'x' * 1000}" for i in range(100)])
    assert len(str(caught.value)) < 5000


def test_a_whole_number_may_have_an_exponent() -> None:
    assert load_settings(None, ["rounds=1e3"]).rounds == 1000


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "hush")
    config = tmp_path / "a.yaml"
    config.write_text("data: {source: '${oc.env:SECRET}'}\n")
    for arguments in ((config, []), (None, ["data.source=${oc.env:SECRET}"])):
        with pytest.raises(SettingsError, match=r"^data\.source: .*not the environment") as caught:
            load_settings(*arguments)
        assert "hush" not in str(caught.value)


def test_text_that_looks_like_a_reference_is_saved_as_text(tmp_path: Path) -> None:
    settings = load_settings(None, [r"data.source=\${oc.env:HOME}", "data.config='12:30'"])
    assert settings.data.source == "${oc.env:HOME}"
    saved = tmp_path / "settings.yaml"
    saved.write_text(settings.to_yaml())
    assert load_settings(saved) == settings


def test_an_arm_that_cannot_work_is_refused_where_it_is_read(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("study: {arms: {far: {clients: {optimizer: {lr: 1.0e+30}}}}}\n")
    with pytest.raises(SettingsError, match=r"^study\.arms\.far: clients\.optimizer\.lr"):
        load_settings(config)


@pytest.mark.parametrize(
    ("first", "count", "complaint"),
    [(0, 0, "from 1 to 1000, got 0"), (0, 10**20, "from 1 to 1000"), (2**32 - 2, 3, "must end at")],
)
def test_there_are_so_many_seeds_and_no_more(first: int, count: int, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        check_seeds(first, count)
    check_seeds(2**32 - 2, 2)


def test_a_run_has_a_twin_without_its_mechanism():
    words = ["privacy.mechanism=dp_sgd", "privacy.epsilon=8", "privacy.clip=1"]
    assert not load_settings(None, [*words, "privacy.mechanism=none"]).privacy.on
    with pytest.raises(SettingsError, match=r"epsilon belongs to a mechanism"):
        load_settings(None, ["privacy.epsilon=8"])
    with pytest.raises(SettingsError, match=r"epsilonn"):
        load_settings(None, [*words, "privacy.mechanism=none", "privacy.epsilonn=8"])
