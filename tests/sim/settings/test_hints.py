"""A mistake is answered with what to type instead."""

from pathlib import Path

import pytest

from fedkd.distillation.settings import DistillSettings
from sim.settings import Settings, SettingsError, load_distill_settings, load_settings
from sim.settings.hints import (
    colon_hint,
    command_hint,
    meant_settings,
    option_hint,
    setting_paths,
    stray_hint,
)


def complaint(load, *words, config=None):
    with pytest.raises(SettingsError) as caught:
        load(config, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


RUN = {
    "lr=0.1": "unknown setting 'lr'; did you mean 'clients.optimizer.lr' or",
    "model=cnn": "did you mean 'clients.models'",
    "data.alpha=0.3": "did you mean 'data.partition.alpha'?",
    "epochs=3": "did you mean 'clients.local.epochs'?",
    "optimizer.lr=1": "unknown setting 'optimizer'; did you mean 'clients.optimizer.lr' or",
    "client.count=3": "unknown setting 'client'; did you mean 'clients.count'?",
    "learning_rate=1": "did you mean 'clients.optimizer.lr'?",
    "seeds=5": "did you mean 'seed' or 'study.seeds'? (an option of fedkd compare: --seeds)",
    "strategy.temperatur=3": "did you mean 'strategy.temperature'?",
    "clients=20": "clients is a section of settings, got 20; did you mean clients.count=20?",
    "data.partition=iid": "did you mean data.partition.kind=iid?",
    "data.label_noise=0.3": "did you mean data.label_noise.rate=0.3?",
    "strategy=DML": "unknown strategy 'DML'",
    "strategy={name:dml}": "write a space after the colon: {name: dml}",
    "clients.models=[{name:mlp}]": "write a space after the colon: {name: mlp}",
    "strategy.temperature={kind:cosine}": "write a space after the colon: {kind: cosine}",
    "clients.models=mlp,cnn": "several models are a list: clients.models=[mlp,cnn]",
    "method=offline": "unknown setting 'method': it belongs to fedkd distill, type that instead",
    "foo=1": "unknown setting 'foo'; known there: name, seed, rounds",
}


@pytest.mark.parametrize("word", RUN)
def test_a_setting_that_is_not_there_is_searched_in_the_whole_tree(word):
    assert RUN[word] in complaint(load_settings, word)


DISTILL = {
    "lr=1": "'training.optimizer.lr'",
    "temperature=2": "'objective.kd.temperature'",
    "student=mlp": "did you mean student.model=mlp?",
    "method=offlin": "did you mean 'offline'?",
    "objective={ce:1}": "write a space after the colon: {ce: 1}",
    "rounds=3": "unknown setting 'rounds': it belongs to fedkd run or fedkd compare",
}


@pytest.mark.parametrize("word", DISTILL)
def test_a_distillation_s_settings_are_searched_too(word):
    assert DISTILL[word] in complaint(load_distill_settings, word)


def test_a_file_of_another_command_names_that_command():
    conf = Path(__file__).parents[3] / "conf"
    assert "'teacher', 'student'" in (
        text := complaint(load_settings, config=conf / "distill.yaml")
    )
    assert "they belong to fedkd distill, type that instead" in text
    text = complaint(load_distill_settings, config=conf / "quickstart.yaml")
    assert "they belong to fedkd run or fedkd compare, type that instead" in text


@pytest.mark.parametrize("kind", [Settings, DistillSettings])
def test_every_setting_s_last_name_leads_to_it(kind):
    paths = setting_paths(kind)
    assert len(paths) == len(set(paths)) > 40
    for path in paths:
        name = path.split(".")[-1]
        found = meant_settings(kind, [name])
        assert name in paths or any(each.split(".")[-1] == name for each in found), path


def test_commands_options_and_words_are_answered():
    commands, strategies = ("run", "compare", "distill"), ("dml", "local")
    for word, instead in {
        "dml": "'fedkd run strategy.name=dml'",
        "comapre": "'fedkd compare'",
        "conf/x.yaml": "'fedkd run conf/x.yaml'",
        "rounds=3": "'fedkd run rounds=3'",
        "zzz": "known: run, compare, distill",
    }.items():
        assert instead in command_hint(word, commands, strategies)

    def option(name, value, kind=Settings, command="run"):
        return option_hint(name, value, known=["--seeds", "--quiet"], kind=kind, command=command)

    assert "key=value: fedkd run rounds=3" in option("--rounds", "3")
    assert "fedkd run clients.optimizer.lr=VALUE" in option("--lr", "")
    assert "fedkd run 'clients.models=[mlp, cnn]'" in option("--model", "[mlp, cnn]")
    assert "by itself: fedkd run conf/x.yaml" in option("--config", "conf/x.yaml")
    assert option("--quite", "").endswith("did you mean '--quiet'?")
    assert option("--seeds-", "", kind=None, command="report").endswith("did you mean '--seeds'?")


WORDS = {
    ("local",): "did you mean strategy.name=local?",
    ("rounds", "3"): "settings are written key=value: rounds=3",
    ("rounds:3",): "settings are written key=value: rounds=3",
    ("rounds", "=3"): "no space around =: rounds=3",
    ("nothing.yaml",): "",
}


@pytest.mark.parametrize("words", WORDS)
def test_words_that_are_no_settings_are_answered(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hint = stray_hint(words, 0, arms=None, known_arms=["local", "dml"])
    assert hint == (f"; {WORDS[words]}" if WORDS[words] else "")


def test_arms_are_separated_by_commas_wherever_they_stand():
    def hint(arms, *words):
        return stray_hint(words, len(words) - 1, arms=arms, known_arms=["local", "dml"])

    assert hint("dml", "local").endswith("--arms dml,local")
    assert hint("dml,", "local").endswith("--arms dml,local")
    assert hint("", "local", "dml").endswith("--arms local,dml")
    assert hint("dml", "of-the-file").endswith("--arms dml,of-the-file")


def test_a_file_of_a_similar_name_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "quickstart.yaml").write_text("")
    for word in ("quickstart", "conf/quickstat.yaml", "quickstart.yml"):
        assert stray_hint([word], 0, arms=None, known_arms=[]) == (
            "; did you mean conf/quickstart.yaml?"
        )


def test_only_a_missing_space_is_called_one():
    assert colon_hint({"name:mlp": None}) == "; write a space after the colon: {name: mlp}"
    for value in ({"name": None}, {"a:b": 1}, {"hint": "mlp"}, "a:b", None):
        assert colon_hint(value) == ""
