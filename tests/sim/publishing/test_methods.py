from dataclasses import replace

import pytest

from sim.publishing.bibliography import references
from sim.publishing.methods import cite, keys_of_study, methods
from sim.publishing.tables import table_texts
from sim.settings import SettingsError


def test_the_paragraph_says_what_the_settings_say_and_cites_what_they_use(study):
    text = methods(study)
    for words in (
        r"the digits of scikit-learn~\cite{alpaydin1998digits,pedregosa2011sklearn}",
        "30 unlabelled rows were public",
        r"dealt to 2 clients by a Dirichlet distribution over classes with concentration 1~\cite{"
        "yurochkin2019dirichlet}, at least 2 to each.",
        "one architecture, mlp(hidden=[8]).",
        r"for 1 local epoch a round, with Adam~\cite{kingma2015adam} at a learning rate of 0.001, "
        "in batches of 32, over 2 rounds.",
        r"\texttt{local} and \texttt{dml}~\cite{zhang2018dml}; others are compared",
        "as float32 in both directions",
        "2 seeds (0 and 1)",
        "cannot fall below p = 0.5.",
    ):
        assert words in text, text
    # Nothing ran on Ray.
    assert "moritz2018ray" not in text
    assert "None" not in text
    assert "nan" not in text.split()


def test_every_key_that_is_cited_is_printed_as_bibtex(finished, study):
    keys = keys_of_study(study)
    assert {"zhang2018dml", "holm1979simple", "paszke2019pytorch"} <= set(keys) <= set(references())
    text = cite([str(finished)])
    assert [line.partition("{")[2][:-1] for line in text.splitlines() if line[:1] == "@"] == keys
    assert cite([str(finished)], "methods") == methods(study)


def test_what_arms_differ_in_is_left_out(swept):
    text = cite([str(swept)], "methods")
    assert "dealt to" not in text
    assert "in 4 arms" in text
    assert "one seed, 0" in text


def test_what_was_swept_and_matched_is_told_and_rounds_that_differ(swept, study):
    assert r"; we varied \texttt{" in cite([str(swept)], "methods")
    first, other = study.runs
    longer = [replace(run, settings={**run.settings, "rounds": 5}) for run in study.runs[other]]
    told = methods(replace(study, runs={**study.runs, other: longer}, matched=("steps", first)))
    assert "over 2 to 5 rounds, by arm" in told
    assert rf"as many optimizer steps as \texttt{{{first}}}, as near" in told
    assert "set beforehand" not in methods(study)
    matched = table_texts(replace(study, matched=("bytes", first)))[0].caption
    assert "The rounds of each arm were set beforehand so that all take as many bytes" in matched
    assert f"exchanged as {first}," in matched


def test_the_model_that_an_algorithm_has_of_its_own_is_told(study):
    taught = with_settings(
        study,
        strategy={"name": "one_way", "direction": "teacher_to_clients", "model": {"name": "cnn"}},
    )
    assert r", mlp(hidden=[8]); the teacher of \texttt{one\_way} was cnn." in methods(taught)
    assert "one_way: teacher cnn" in table_texts(taught)[0].caption
    server = with_settings(study, strategy={"name": "cfd", "server_model": {"name": "mlp"}})
    assert r"the server model of \texttt{cfd} was mlp." in methods(server)
    assert "teacher" not in methods(study) + table_texts(study)[0].caption


def with_settings(study, **settings):
    runs = {
        arm: [replace(run, settings={**run.settings, **settings}) for run in of_arm]
        for arm, of_arm in study.runs.items()
    }
    return replace(study, runs=runs)


def test_a_data_folder_is_named_by_its_end_alone(study):
    data = {**study.runs["dml"][0].settings["data"], "source": "/home/somebody/sets/mnist"}
    text = methods(with_settings(study, data=data))
    assert r"The data were MNIST~\cite{lecun1998gradient}" in text
    assert "somebody" not in text
    of_own = methods(with_settings(study, data={**data, "source": "/home/somebody/my_table.csv"}))
    assert r"The data were my\_table.csv;" in of_own
    assert "somebody" not in of_own


def test_adversaries_and_ray_and_own_algorithms_are_told(study):
    settings = study.runs["dml"][0].settings
    told = methods(
        with_settings(
            study,
            adversary={"kind": "sign_flip"},
            engine={**settings["engine"], "backend": "ray"},
            strategy={"name": "my_package.my_module:Method"},
        )
    )
    assert r"dishonest (sign\_flip)" in told
    assert "moritz2018ray" in told
    assert r"\texttt{my\_package.my\_module:Method} (of our own)" in told


def test_the_least_p_is_not_rounded_below_what_it_is(study):
    runs = {
        arm: tuple(replace(of_arm[0], seed=s) for s in range(4))
        for arm, of_arm in study.runs.items()
    }
    assert "cannot fall below p = 0.125." in methods(replace(study, runs=runs))


@pytest.mark.parametrize(
    ("names", "format", "said"),
    [
        (["dlm"], "bibtex", "unknown algorithm 'dlm'"),
        (["runs/nowhere"], "bibtex", "there is no folder runs/nowhere"),
        (["package:Class"], "bibtex", "`fedkd algorithms package:Class` shows its source"),
        ([], "bibtex", "name a study's folder"),
        (["dml"], "methods", "format methods is about a study"),
        (
            ["dml"],
            "bib",
            "--format must be one of .*, got 'bib'; did you mean 'bibtex'",
        ),
    ],
)
def test_slips_are_named(names, format, said):
    with pytest.raises(SettingsError, match=said):
        cite(names, format)
