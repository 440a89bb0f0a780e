from pathlib import Path

import pytest

from sim.settings import (
    Settings,
    SettingsError,
    load_distill_settings,
    load_settings,
    read_settings,
)
from sim.settings.permission import allow_flags, is_permitted, permitted

NAMING = {
    "a list of models": "clients: {models: ['mine.nets:net', mlp]}",
    "one with options": "clients: {models: {name: 'mine.nets:net', options: {width: 3}}}",
    "a strategy's model": "strategy: {name: one_way, model: 'mine.nets:net'}",
    "an arm": "study: {arms: {a: {clients: {models: ['mine.nets:net']}}}}",
    "a reference": "name: a\ndata: {config: 'mine.nets:net'}\n"
    "clients: {models: ['${data.config}']}",
}


def written(text: str, folder: Path) -> Path:
    path = folder / "a.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("where", NAMING)
def test_code_that_only_a_file_names_is_refused_with_the_flag_to_add(
    where: str, tmp_path: Path
) -> None:
    config = written(NAMING[where], tmp_path)
    with pytest.raises(SettingsError, match=r"'mine\.nets:net' .*--allow mine.*FEDKD_ALLOW=mine"):
        load_settings(config)
    for allow in ("mine", "mine.nets", "mine.nets:net", "other, mine"):
        assert load_settings(config, allow=[allow])
    for allow in ("min", "mine.net", "nets", "mine.nets:other"):
        with pytest.raises(SettingsError, match="only a file names"):
            load_settings(config, allow=[allow])


def test_a_distillation_asks_too(tmp_path: Path) -> None:
    config = written("teacher: {models: 'mine:net'}", tmp_path)
    with pytest.raises(SettingsError, match=r"^teacher\.models\.0\.name: 'mine:net'"):
        load_distill_settings(config)
    assert load_distill_settings(config, allow=["mine"])
    assert load_distill_settings(None, ["teacher.models=mine:net"])


def test_what_a_word_or_the_environment_names_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written("clients: {models: ['mine:net']}", tmp_path)
    assert load_settings(None, ["clients.models=['mine:net', mlp]"])
    assert load_settings(config, ["clients.models=['mine:net']"])
    with pytest.raises(SettingsError, match="only a file names"):
        load_settings(config, ["name=mine"])
    monkeypatch.setenv("FEDKD_ALLOW", "other, mine:net")
    assert load_settings(config)
    monkeypatch.setenv("FEDKD_ALLOW", "; rm")
    with pytest.raises(SettingsError, match="FEDKD_ALLOW takes packages"):
        load_settings(config)


def test_what_is_only_read_asks_nobody(tmp_path: Path) -> None:
    config = written("clients: {models: ['mine:net']}", tmp_path)
    assert read_settings(config).clients.models[0].name == "mine:net"


def test_models_that_are_no_code_need_no_leave(tmp_path: Path) -> None:
    config = written("clients: {models: [mlp, 'timm:resnet18']}", tmp_path)
    assert load_settings(config)
    assert allow_flags(Settings()) == ""


def test_a_command_to_resume_says_again_what_was_allowed() -> None:
    settings = load_settings(None, ["clients.models=['a.b:net', 'c:net', 'a:other']"])
    assert allow_flags(settings) == " --allow a --allow c"
    assert is_permitted("a.b:net", permitted(["a,c"]))
