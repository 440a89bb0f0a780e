"""Every combination of the values of a sweep is an arm; equal ones are one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.commands.arms import Study, load_study
from sim.commands.cli.words import sweep_words
from sim.commands.running import run
from sim.commands.sweeps import drafts, name_of, patch_of, sweep_notes
from sim.reports.grids import Axis
from sim.settings import SettingsError, load_settings
from sim.settings.schema import StudySettings

CONF = Path(__file__).parents[3] / "conf" / "examples"
Read = Callable[..., Study]


@pytest.fixture
def study(tmp_path: Path) -> Read:
    def read(file: str, *words: str, arms: Sequence[str] | None = None) -> Study:
        path = tmp_path / "study.yaml"
        path.write_text(file)
        return load_study(str(path), words, arms=arms)

    return read


TWO_BY_TWO = """
strategy: {name: dsfl, kd_weight: 0.5}
study:
  sweep:
    strategy.temperature: [1, 2.5]
    exchange.up: [float32, {kind: top_k, k: 3}]
"""


def test_every_combination_is_an_arm_with_a_name_of_its_values(study: Read) -> None:
    found = study(TWO_BY_TWO.replace("dsfl", "one_way"))
    assert list(found.arms) == ["1-float32", "1-top_k-3", "2.5-float32", "2.5-top_k-3"]
    told = [
        (arm.strategy.temperature.value, arm.exchange.up.kind)  # type: ignore[attr-defined]
        for arm in found.arms.values()
    ]
    assert told == [(1, "float32"), (1, "top_k"), (2.5, "float32"), (2.5, "top_k")]
    # What the file says for all holds for them.
    assert {arm.strategy.kd_weight.value for arm in found.arms.values()} == {0.5}  # type: ignore[attr-defined]
    assert list(found.differs["strategy.temperature"].values()) == [
        arm.to_table()["strategy"]["temperature"] for arm in found.arms.values()
    ]
    assert found.grid is not None
    assert found.grid.axes[0] == Axis("strategy.temperature", (1, 2.5))
    assert found.grid.arms == tuple(found.arms)
    assert found.remarks == []


def test_a_sweep_is_of_every_arm_there_is(study: Read) -> None:
    file = (
        "study: {arms: {a: {rounds: 3}, b: {rounds: 5, seed: 1}}, sweep: {clients.count: [2, 4]}}"
    )
    found = study(file)
    assert {name: (arm.rounds, arm.clients.count) for name, arm in found.arms.items()} == {
        "a-2": (3, 2),
        "a-4": (3, 4),
        "b-2": (5, 2),
        "b-4": (5, 4),
    }
    assert found.grid is not None
    assert found.grid.axes == (Axis("arm", ("a", "b")), Axis("clients.count", (2, 4)))
    # One arm of the file, one that the sweep makes, and a strategy that the file does not name.
    assert list(study(file, arms=["b"]).arms) == ["b-2", "b-4"]
    one = study(file, arms=["a-4"])
    assert list(one.arms) == ["a-4"]
    assert one.grid is not None
    assert one.grid.arms == ("", "a-4", "", "")
    assert list(study(file, arms=["fedavg"]).arms) == ["fedavg-2", "fedavg-4"]
    with pytest.raises(SettingsError, match=r"unknown arm 'a-3'; known: a, b, a-2, .* 'a-4'"):
        study(file, arms=["a-3"])


def test_a_table_and_a_dotted_name_are_one_setting_and_a_word_replaces_its_values(
    study: Read,
) -> None:
    nested = study("study: {sweep: {clients: {local: {epochs: [1, 2]}}}}")
    assert list(nested.settings.study.sweep) == ["clients.local.epochs"]
    other = study(
        "study: {sweep: {clients.local.epochs: [1, 2]}}", "study.sweep.clients.local.epochs=[7]"
    )
    assert [arm.clients.local.epochs for arm in other.arms.values()] == [7]


def test_combinations_that_differ_in_no_number_run_once(study: Read) -> None:
    file = """
    study:
      sweep:
        strategy.name: [local, one_way]
        strategy.temperature: [1, 4]
        engine.backend: [inline, ray]
    """
    found = study(file)
    # local has no temperature, and where clients run changes no bit.
    assert list(found.arms) == ["local", "one_way-1", "one_way-4"]
    assert found.remarks == [
        "strategy.temperature: not for local, without such a setting",
        "study.sweep: 8 combinations are 3 arms: those that are equal in effect run once",
    ]
    assert found.grid is not None
    assert found.grid.arms == ("local",) * 4 + ("one_way-1",) * 2 + ("one_way-4",) * 2


def test_a_word_for_all_arms_holds_over_the_sweep(study: Read) -> None:
    found = study(TWO_BY_TWO.replace("dsfl", "one_way"), "strategy.temperature=8")
    assert list(found.arms) == ["float32", "top_k-3"]
    assert {arm.strategy.temperature.value for arm in found.arms.values()} == {8}  # type: ignore[attr-defined]


def test_a_sweep_over_strategies_keeps_what_holds_for_all_of_them(study: Read) -> None:
    found = study("strategy: {name: dml, temperature: 3}\nstudy: {sweep: {strategy: [dml, local]}}")
    assert [arm.strategy.name for arm in found.arms.values()] == ["dml", "local"]
    assert found.arms["dml"].strategy.temperature.value == 3  # type: ignore[attr-defined]
    assert found.remarks == ["strategy.temperature: not for local, without such a setting"]


def test_a_kind_and_its_settings_may_be_swept_over_together() -> None:
    # Over another kind of the file; a table of another kind replaces it whole.
    patch = patch_of({"a.kind": "top_k", "a.k": 2})
    assert patch == {"a": {"kind": "top_k", "k": 2}}


def test_a_word_can_leave_out_the_sweep_of_a_file(study: Read) -> None:
    found = study(
        TWO_BY_TWO.replace("dsfl", "one_way"), "study.sweep=null", arms=["local", "one_way"]
    )
    assert list(found.arms) == ["local", "one_way"]
    assert found.grid is None


@pytest.mark.parametrize(
    ("example", "combinations", "arms"),
    # 4 attacks x 4 rules x 2 shares and 4 without liars; 8 x 8 x 5 and 8.
    [("byzantine", 48, 36), ("byzantine-full", 384, 328)],
)
def test_without_liars_each_rule_of_the_byzantine_studies_runs_once(
    example: str, combinations: int, arms: int
) -> None:
    found = load_study(str(CONF / f"{example}.yaml"))
    assert found.grid is not None
    assert (len(found.grid.arms), len(found.arms)) == (combinations, arms)
    honest = [name for name, arm in found.arms.items() if arm.adversary.kind == "none"]
    assert honest == [name for name in found.arms if name.endswith("-0")]
    (rules,) = {plane.rows.labels for plane in found.grid.planes}
    assert honest == [f"{rule}-0" for rule in rules]


MISTAKES = {
    "no list": ("{rounds: 3}", r"study\.sweep\.rounds must be a list of values, got 3"),
    "no value": ("{rounds: []}", r"study\.sweep\.rounds must have 1 to 1000 values, got 0"),
    "twice": ("{rounds: [2, 2]}", r"study\.sweep\.rounds has the value 2 twice"),
    "inside": (
        "{exchange.up: [float32], exchange.up.k: [1]}",
        r"study\.sweep: exchange\.up\.k is part of exchange\.up",
    ),
    "seed": ("{seed: [1, 2]}", r"study\.sweep: seed cannot be swept: study\.seeds"),
    "output": ("{output: [a]}", r"study\.sweep: output cannot be swept"),
    "typing": ("{rouns: [1, 2]}", r"study\.sweep, arm 1: unknown setting 'rouns'; did you mean"),
    "value": ("{rounds: [1, 0]}", r"study\.sweep, arm 0: rounds: must be"),
    "no strategy has it": (
        "{strategy.temprature: [1, 2]}",
        r"unknown setting 'strategy\.temprature' in all arms \(1, 2\); did you mean 'temperature'",
    ),
    "one name": (
        "{data.source: [a/b, a_b]}",
        r"data\.source=a/b and data\.source=a_b are both named 'a_b'",
    ),
    "long": (
        f"{{data.source: [{'a' * 65}]}}",
        r"values of an arm, joined, must be 1 to 64 letters",
    ),
    "many": (
        f"{{rounds: {list(range(1, 41))}, clients.count: {list(range(1, 41))}}}",
        r"makes 1600 combinations \(40 of rounds x 40 of clients\.count\), at most 1000",
    ),
}


@pytest.mark.parametrize(("sweep", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_a_sweep_is_named(study: Read, sweep: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        study(f"study: {{sweep: {sweep}}}")


def test_an_arm_and_a_combination_of_another_cannot_share_a_name(study: Read) -> None:
    file = "study: {arms: {a: {}, a-1: {rounds: 9}}, sweep: {data.source: [1-x, x]}}"
    with pytest.raises(SettingsError, match=r"a-1, data\.source=x are both named 'a-1-x'"):
        study(file)


def test_a_run_of_the_file_takes_no_notice_of_the_sweep() -> None:
    settings = load_settings(None, ["study.sweep={rounds: [2, 3]}"])
    assert settings.rounds == 20
    assert load_settings(None, [f"study={settings.study.model_dump_json()}"]) == settings


@given(
    st.lists(st.lists(st.integers(), min_size=1, max_size=4, unique=True), min_size=1, max_size=3)
)
def test_drafts_are_the_product(values: list[list[int]]) -> None:
    sweep = {f"s{place}": of_setting for place, of_setting in enumerate(values)}
    made = drafts(["a", "b"], StudySettings.model_validate({"sweep": sweep}))
    expected = 2
    for of_setting in values:
        expected *= len(of_setting)
    assert len(made) == expected
    told = [(draft.base, *draft.swept.values()) for draft in made]
    assert len(set(told)) == expected
    # The last setting runs fastest, as in a grid.
    assert told == sorted(
        told,
        key=lambda each: (each[0], *(values[i].index(v) for i, v in enumerate(each[1:]))),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (["median", "lma", 0.2], "median-lma-0.2"),
        ([{"kind": "lma", "fraction": 0.2}], "lma-0.2"),
        ([{"mechanism": "dp_sgd", "epsilon": 8}, None, True], "dp_sgd-8-none-true"),
        (["path/to/set", ["mlp", "cnn"]], "path_to_set-mlp_cnn"),
    ],
)
def test_names_are_read_as_the_values(values: list[object], name: str) -> None:
    assert name_of("", values) == name
    assert name_of("arm", values) == f"arm-{name}"


LIARS = """
strategy: {name: fedmd, aggregation: median}
study:
  sweep:
    adversary.kind: [lma, fdla, backdoor]
    adversary.fraction: [0, 0.09, 0.4]
"""


def test_an_attack_of_nobody_is_none_and_one_with_a_goal_is_kept(study: Read) -> None:
    # 0.09 of ten clients is nobody. A backdoor's success is measured without any client, too.
    found = study(LIARS)
    assert list(found.arms) == [
        "fedmd",
        "lma-0.4",
        "fdla-0.4",
        "backdoor-0",
        "backdoor-0.09",
        "backdoor-0.4",
    ]
    assert found.arms["fedmd"].adversary.kind == "none"
    assert found.grid is not None
    assert found.grid.arms[:6] == ("fedmd", "fedmd", "lma-0.4", "fedmd", "fedmd", "fdla-0.4")
    (plane,) = found.grid.planes
    assert plane.columns.name == "adversary.fraction"


def test_nobody_s_attack_has_the_bits_of_none(tmp_path: Path) -> None:
    words = ["rounds=2", "clients={count: 4, models: [mlp], local: {epochs: 1}}"]
    words += [
        "data={private_rows: 120, test_rows: 60, public: {size: 40}, partition: {min_rows: 2}}"
    ]
    words += ["engine.backend=inline", f"output={tmp_path}", "strategy=fedmd"]
    digests = {
        run(load_settings(None, [*words, f"adversary={adversary}"])).weights_sha256
        for adversary in ("none", "{kind: lma, fraction: 0}", "{kind: fdla, fraction: 0.2}")
    }
    assert len(digests) == 1


FAMILIES = """
study:
  arms: {one: {strategy: {name: local}}, two: {strategy: {name: dml}}, three: {rounds: 3}}
  families: {pair: [two, one], all: [one, two, three]}
  sweep: {clients.count: [2, 4]}
"""


def test_a_family_is_one_for_each_value_of_a_sweep(study: Read) -> None:
    assert study(FAMILIES).families == {
        "pair-2": ["two-2", "one-2"],
        "pair-4": ["two-4", "one-4"],
        "all-2": ["one-2", "two-2", "three-2"],
        "all-4": ["one-4", "two-4", "three-4"],
    }
    plain = study(FAMILIES, "study.sweep=null")
    assert plain.families == {"pair": ["two", "one"], "all": ["one", "two", "three"]}
    # Of a family that has one arm left there is nothing to compare.
    few = study(FAMILIES, "study.sweep=null", arms=["one", "three"])
    assert few.families == {"all": ["one", "three"]}


def test_an_arm_that_combinations_have_in_common_is_in_the_family_of_each(study: Read) -> None:
    # `local` has no temperature, and without anybody an adversary changes nothing: one arm each.
    for sweep, expected in (
        (
            "{strategy.temperature: [1, 3]}",
            {"pair-1": ["two-1", "one"], "pair-3": ["two-3", "one"]},
        ),
        (
            "{adversary: [{kind: none}, {kind: sign_flip, fraction: 0.0}]}",
            {"pair-none": ["two", "one"]},
        ),
    ):
        read = study(
            "study: {arms: {one: {strategy: {name: local}}, two: {strategy: {name: dml}}}, "
            f"families: {{pair: [two, one]}}, sweep: {sweep}}}"
        )
        assert read.families == expected


@pytest.mark.parametrize(
    ("families", "told"),
    [
        ("{a: [one, tow]}", "study.families.a: unknown arm 'tow'.*two"),
        ("{a: [one]}", "families.a must name at least two arms, each once, got"),
        ("{a: [one, two, one]}", "families.a must name at least two arms, each once, got"),
    ],
)
def test_a_family_that_cannot_be_compared_is_refused(study: Read, families: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        study(FAMILIES, "study.families=null", f"study.families={families}")


# -- settings that change together, and conditions -----------------------------------------------

STEPS = """
study:
  sweep:
    rounds: [20, 10]
    strategy.temperature: [1, 4]
    clients.local.epochs: [1, 2]
  together: [[rounds, clients.local.epochs]]
"""


def test_settings_that_change_together_are_one_axis(study: Read) -> None:
    found = study(STEPS, arms=["one_way", "dml"])
    assert {name: (arm.rounds, arm.clients.local.epochs) for name, arm in found.arms.items()} == {
        f"{base}-{steps}-{temperature}": (int(steps[:2]), int(steps[3:]))
        for base in ("one_way", "dml")
        for steps in ("20-1", "10-2")
        for temperature in (1, 4)
    }
    assert found.grid is not None
    # The first of them stands for both, and has a scale.
    assert found.grid.axes[1:] == (Axis("rounds", (20, 10)), Axis("strategy.temperature", (1, 4)))
    assert found.grid.arms == tuple(found.arms)
    assert sweep_notes(found.settings.study) == [
        "swept over rounds with clients.local.epochs (20 with 1, 10 with 2), strategy.temperature "
        "(1, 4)"
    ]


def test_steps_that_no_setting_tells_apart_are_named_by_all(study: Read) -> None:
    found = study(
        "study: {sweep: {rounds: [2, 2, 4], clients.count: [2, 4, 4]}, "
        "together: [rounds, clients.count]}"
    )
    assert found.grid is not None
    assert found.grid.axes == (Axis("rounds+clients.count", ([2, 2], [2, 4], [4, 4])),)
    assert list(found.arms) == ["2-2", "2-4", "4-4"]


def test_a_condition_leaves_holes_and_an_axis_only_what_there_is(study: Read) -> None:
    file = """
    study:
      sweep: {strategy.temperature: [1, 2, 4], rounds: [5, 10, 20]}
      without:
      - {arm: dml, strategy.temperature: [2, 4]}
      - {rounds: 20}
    """
    found = study(file, arms=["one_way", "dml"])
    assert list(found.arms) == [
        *(f"one_way-{t}-{r}" for t in (1, 2, 4) for r in (5, 10)),
        "dml-1-5",
        "dml-1-10",
    ]
    assert found.grid is not None
    assert found.grid.axes[2] == Axis("rounds", (5, 10))
    assert found.grid.arms[-4:] == ("",) * 4
    assert found.combinations == 8
    # Every plane is drawn, with nothing in the holes.
    assert [plane.title for plane in found.grid.planes] == [f"temperature: {t}" for t in (1, 2, 4)]
    only = study(file, "study.only={strategy.temperature: 1}", arms=["one_way", "dml"])
    assert list(only.arms) == ["one_way-1-5", "one_way-1-10", "dml-1-5", "dml-1-10"]
    assert sweep_notes(only.settings.study)[1:] == [
        "study.only: strategy.temperature=1",
        "study.without: arm=dml, strategy.temperature=2 or 4; rounds=20",
    ]
    # Conditions of a file are left out by a word.
    assert len(study(file, "study.without=null", arms=["one_way", "dml"]).arms) == 18


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["study.only={rounds: 20, strategy.temperature: 3}"], "swept over 1, 4, got 3"),
        (["study.without=[{arm: dlm}]"], "unknown arm 'dlm'.*did you mean 'dml'"),
        (["study.without=[{rounds: [10, 20]}]"], "leave none of 4 combinations"),
        (["study.together=[[rounds, clients.count]]"], "'clients.count' is not swept over"),
    ],
)
def test_a_mistake_in_a_condition_is_named(study: Read, words: list[str], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        study(STEPS, *words)


def test_conditions_may_leave_few_of_very_many(study: Read) -> None:
    many = f"rounds: {list(range(1, 101))}, clients.count: {list(range(1, 101))}"
    file = f"study: {{sweep: {{{many}}}, only: [{{rounds: 7, clients.count: [3, 5]}}]}}"
    assert list(study(file).arms) == ["7-3", "7-5"]
    with pytest.raises(SettingsError, match=r"10000 combinations .* at most 1000"):
        study(file, "study.only=null")


# -- on the command line -------------------------------------------------------------------------


def test_options_of_a_sweep_are_words_on_the_study(study: Read) -> None:
    words = sweep_words(
        [
            "exchange.up=float32,{kind: top_k, k: 2}",
            "clients.models=[mlp],[mlp,cnn]",
            "rounds= 2, 4",
        ],
        ["rounds, clients.models"],
        None,
        ["rounds=2,exchange.up=[float32]"],
    )
    found = study(TWO_BY_TWO.replace("dsfl", "one_way"), *words).settings.study
    assert found.sweep == {
        # What the file sweeps over beside it stays.
        "strategy.temperature": (1, 2.5),
        "exchange.up": ("float32", {"kind": "top_k", "k": 2}),
        "clients.models": (["mlp"], ["mlp", "cnn"]),
        "rounds": (2, 4),
    }
    assert found.together == (("rounds", "clients.models"),)
    assert found.without == ({"rounds": 2, "exchange.up": ["float32"]},)
    assert sweep_words(['a="x,y",z'], None, None, None) == ['study.sweep.a=["x,y", "z"]']
    assert sweep_words(None, None, None, None) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sweep": ["rounds"]}, "--sweep is written SETTING=VALUE,VALUE,..., got 'rounds'"),
        ({"sweep": ["rounds="]}, "--sweep rounds has no value"),
        ({"sweep": ["rounds=1,,2"]}, "--sweep rounds has an empty value, got 'rounds=1,,2'"),
        ({"sweep": ["rounds=1,2,"]}, "--sweep rounds has an empty value"),
        ({"sweep": ["rounds=[1,2]"]}, "without brackets: --sweep rounds=1,2"),
        ({"sweep": ["rounds=1", "rounds=2"]}, "--sweep rounds stands there twice"),
        ({"sweep": ["rounds={a: 1"]}, "--sweep rounds={a: 1: cannot read"),
        ({"without": ["rounds"]}, "--without is written SETTING=VALUE"),
        ({"only": ["rounds=1,rounds=2"]}, "--only rounds=1,rounds=2 names rounds twice"),
    ],
)
def test_a_mistake_in_an_option_of_a_sweep_is_named(
    options: dict[str, list[str]], told: str
) -> None:
    given = {name: options.get(name) for name in ("sweep", "together", "only", "without")}
    with pytest.raises(SettingsError) as error:
        sweep_words(**given)
    assert told in str(error.value)


def test_a_setting_that_no_arm_has_names_algorithms_that_have_it(study: Read) -> None:
    words = sweep_words(["strategy.temperature=1,2"], None, None, None)
    with pytest.raises(SettingsError, match=r"no arm has the setting .* \(local, fedavg\); .*dml"):
        study("{}", *words, arms=["local", "fedavg"])
