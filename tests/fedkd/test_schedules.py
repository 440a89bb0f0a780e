"""Schedules: their curves, their ranges, and settings errors that a reader can act on."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fedkd.schedules import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    NonNegativeSchedule,
    PositiveSchedule,
    RampUpSchedule,
    Schedule,
    StepSchedule,
    constant,
    cosine,
    exponential,
    linear,
    ramp_up,
    step,
)

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
progresses = st.floats(0, 1)
numbers = st.floats(-1e6, 1e6)
positives = st.floats(1e-6, 1e6)


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: PositiveSchedule = ConstantSchedule(value=1.0)
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    offset: Schedule = ConstantSchedule(value=0.0)


def complaints(**table: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(table)
    return [
        f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"
        for error in caught.value.errors()
    ]


@st.composite
def schedule_tables(draw: st.DrawFn) -> dict[str, object]:
    kind = draw(st.sampled_from(["constant", "linear", "cosine", "exponential", "step", "ramp_up"]))
    table: dict[str, object] = {"kind": kind}
    if kind == "constant":
        table["value"] = draw(numbers)
    elif kind == "step":
        milestones = sorted(draw(st.sets(st.floats(0.01, 1), max_size=4)))
        count = len(milestones) + 1
        table["values"] = draw(st.lists(numbers, min_size=count, max_size=count))
        table["milestones"] = milestones
    else:
        ends = positives if kind == "exponential" else numbers
        table["start"], table["end"] = draw(ends), draw(ends)
        if kind == "ramp_up":
            table["until"] = draw(st.floats(0.01, 1))
    return table


# --- curves ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "at_start", "halfway", "at_end"),
    [
        (ConstantSchedule(value=2.5), 2.5, 2.5, 2.5),
        (LinearSchedule(start=4, end=1), 4.0, 2.5, 1.0),
        (CosineSchedule(start=4, end=1), 4.0, 2.5, 1.0),
        (ExponentialSchedule(start=4, end=1), 4.0, 2.0, 1.0),
        (StepSchedule(values=(4, 2, 1), milestones=(0.5, 0.75)), 4.0, 2.0, 1.0),
        (RampUpSchedule(start=0, end=2), 2 * math.exp(-5), 2 * math.exp(-1.25), 2.0),
        (RampUpSchedule(start=1, end=3, until=0.5), 1 + 2 * math.exp(-5), 3.0, 3.0),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_start_halfway_and_end(schedule: Schedule, at_start: float, halfway: float, at_end: float):
    assert schedule.at(0.0) == pytest.approx(at_start, rel=1e-12)
    assert schedule.at(0.5) == pytest.approx(halfway, rel=1e-12)
    assert schedule.at(1.0) == pytest.approx(at_end, rel=1e-12)


def test_cosine_changes_slowly_at_both_ends():
    # cos(pi/4) = 1/sqrt(2) at a quarter of the way
    assert cosine(0.25, start=1.0, end=0.0) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert cosine(0.75, start=1.0, end=0.0) == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_exponential_multiplies_by_the_same_ratio_each_time():
    values = [exponential(k / 4, start=16.0, end=1.0) for k in range(5)]
    assert values == pytest.approx([16, 8, 4, 2, 1])


def test_step_takes_over_exactly_at_its_milestone():
    just_before = math.nextafter(0.3, 0.0)
    assert step(just_before, values=[0.0, 1.0], milestones=[0.3]) == 0.0
    assert step(0.3, values=[0.0, 1.0], milestones=[0.3]) == 1.0
    assert step(0.7, values=[5.0], milestones=[]) == 5.0


def test_ramp_up_is_the_published_gaussian():
    # Epoch 20 of a ramp over 80 of 200 epochs: exp(-5 * (3/4)^2)
    value = ramp_up(20 / 200, end=1.0, until=80 / 200)
    assert value == pytest.approx(math.exp(-5 * 0.5625))
    assert ramp_up(180 / 200, end=1.0, until=80 / 200) == 1.0


@quick
@given(start=numbers, end=numbers)
def test_ends_are_exact(start: float, end: float):
    for curve in (linear, cosine):
        assert (curve(0.0, start=start, end=end), curve(1.0, start=start, end=end)) == (start, end)
    assert ramp_up(1.0, start=start, end=end) == end


@quick
@given(start=positives, end=positives)
def test_ends_of_the_exponential_are_exact(start: float, end: float):
    assert exponential(0.0, start=start, end=end) == start
    assert exponential(1.0, start=start, end=end) == end


@quick
@given(table=schedule_tables(), progress=progresses)
def test_no_value_leaves_the_range(table: dict[str, object], progress: float):
    schedule = Settings(offset=table).offset
    low, high = schedule.range()
    assert low <= schedule.at(progress) <= high


@quick
@given(table=schedule_tables())
def test_the_range_is_reached(table: dict[str, object]):
    schedule = Settings(offset=table).offset
    points = [0.0, 1.0, *getattr(schedule, "milestones", ())]
    values = [schedule.at(point) for point in points]
    assert schedule.range() == (min(values), max(values))


@quick
@given(start=numbers, end=numbers, progress=progresses, later=progresses)
def test_curves_never_turn_back(start: float, end: float, progress: float, later: float):
    progress, later = sorted((progress, later))
    sign = 1 if end >= start else -1
    # One rounding of the larger end is allowed.
    slack = 4e-16 * max(abs(start), abs(end))
    for curve in (linear, cosine, ramp_up):
        rise = curve(later, start=start, end=end) - curve(progress, start=start, end=end)
        assert sign * rise >= -slack


@pytest.mark.parametrize("progress", [-1e-9, 1.0000001, math.nan, math.inf])
def test_refuses_progress_outside_the_run(progress: float):
    for call in (
        lambda: constant(progress, value=1.0),
        lambda: linear(progress, start=0.0, end=1.0),
        lambda: cosine(progress, start=0.0, end=1.0),
        lambda: exponential(progress, start=1.0, end=2.0),
        lambda: step(progress, values=[1.0], milestones=[]),
        lambda: ramp_up(progress, end=1.0),
        lambda: ConstantSchedule(value=1.0).at(progress),
    ):
        with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got "):
            call()


def test_curves_refuse_arguments_outside_their_domain():
    with pytest.raises(ValueError, match=r"^end must be > 0, got 0.0"):
        exponential(0.5, start=1.0, end=0.0)
    with pytest.raises(ValueError, match=r"^until must be in \(0, 1\], got 0.0"):
        ramp_up(0.5, end=1.0, until=0.0)
    with pytest.raises(ValueError, match="got 1 values and 1 milestones"):
        step(0.5, values=[1.0], milestones=[0.5])
    for milestones in ([0.5, 0.5], [0.5, 0.2], [0.0, 0.5], [0.5, 1.5], [math.nan, 0.5]):
        with pytest.raises(ValueError, match=r"milestones must increase within \(0, 1\]"):
            step(0.5, values=[1.0, 2.0, 3.0], milestones=milestones)


# --- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 2.0])
def test_a_plain_number_is_a_constant(number: float):
    assert Settings(temperature=number).temperature == ConstantSchedule(value=2.0)
    assert isinstance(Settings(temperature=number).temperature.at(0.3), float)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"kind": "constant", "value": 2}, ConstantSchedule(value=2.0)),
        ({"kind": "linear", "start": 4, "end": 1}, LinearSchedule(start=4.0, end=1.0)),
        ({"kind": "cosine", "start": 4.0, "end": 1.0}, CosineSchedule(start=4.0, end=1.0)),
        ({"kind": "exponential", "start": 4, "end": 1}, ExponentialSchedule(start=4.0, end=1.0)),
        (
            {"kind": "step", "values": [2, 1], "milestones": [0.5]},
            StepSchedule(values=(2.0, 1.0), milestones=(0.5,)),
        ),
        (
            {"kind": "ramp_up", "end": 1, "until": 0.5},
            RampUpSchedule(start=0.0, end=1.0, until=0.5),
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else None,
)
def test_a_table_names_its_kind(table: dict[str, object], expected: Schedule):
    assert Settings(temperature=table).temperature == expected
    assert Settings(temperature=expected).temperature == expected


@quick
@given(table=schedule_tables())
def test_saved_settings_load_again(table: dict[str, object]):
    saved = Settings(offset=table)
    assert Settings.model_validate(saved.model_dump()) == saved
    assert Settings.model_validate_json(saved.model_dump_json()) == saved


def test_schedules_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().temperature.value = 2.0
    assert len({ConstantSchedule(value=1.0), ConstantSchedule(value=1.0)}) == 1


def test_settings_have_a_json_schema():
    kinds = TypeAdapter(Schedule).json_schema()["$defs"]
    assert len(kinds) == 6
    for schema in kinds.values():
        assert all(
            "description" in field for name, field in schema["properties"].items() if name != "kind"
        )


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"temperature": 0.0}, "temperature: must be >= 0.001 and <= 10000, got 0.0"),
        ({"temperature": -3}, "temperature: must be >= 0.001 and <= 10000, got -3.0"),
        ({"kd_weight": -0.5}, "kd_weight: must be >= 0 and <= 1e+06, got -0.5"),
        ({"offset": math.nan}, "offset: must be a number up to 1e+06, got nan"),
        ({"temperature": math.inf}, "temperature: must be a number up to 1e+06, got inf"),
        (
            {"temperature": {"kind": "linear", "start": 4, "end": 0}},
            "temperature: must be >= 0.001 and <= 10000, got 0.0 "
            "(the smallest value of this linear schedule)",
        ),
        (
            {"kd_weight": {"kind": "step", "values": [1, -1, 1], "milestones": [0.2, 0.4]}},
            "kd_weight: must be >= 0 and <= 1e+06, got -1.0 "
            "(the smallest value of this step schedule)",
        ),
        (
            {"temperature": "warm"},
            "temperature: must be a number or a table with a kind "
            "(constant, linear, cosine, exponential, step, ramp_up), got 'warm'",
        ),
        (
            {"temperature": True},
            "temperature: must be a number or a table with a kind "
            "(constant, linear, cosine, exponential, step, ramp_up), got True",
        ),
        (
            {"temperature": {"start": 4, "end": 1}},
            "temperature: a schedule needs a kind; known: "
            "constant, linear, cosine, exponential, step, ramp_up",
        ),
        (
            {"temperature": {"kind": "cosin", "start": 4, "end": 1}},
            "temperature: unknown kind of schedule 'cosin'; known: "
            "constant, linear, cosine, exponential, step, ramp_up",
        ),
        ({"temperature": {"kind": "linear", "start": 4}}, "temperature.end: Field required"),
        (
            {"temperature": {"kind": "linear", "start": 4, "end": 1, "stop": 2}},
            "temperature.stop: Extra inputs are not permitted",
        ),
        (
            {"offset": {"kind": "linear", "start": math.nan, "end": 1}},
            "offset.start: Input should be a finite number",
        ),
        (
            {"offset": {"kind": "linear", "start": True, "end": 1}},
            "offset.start: Input should be a valid number",
        ),
        (
            {"offset": {"kind": "exponential", "start": 1, "end": -1}},
            "offset.end: Input should be greater than or equal to 0.000001",
        ),
        (
            {"offset": {"kind": "ramp_up", "end": 1, "until": 2}},
            "offset.until: Input should be less than or equal to 1",
        ),
        (
            {"offset": {"kind": "step", "values": [1, 2], "milestones": [1.5]}},
            "offset: milestones must increase within (0, 1], got [1.5]",
        ),
        (
            {"offset": {"kind": "step", "values": [1], "milestones": [0.5]}},
            "offset: step needs one more value than milestones, got 1 values and 1 milestones",
        ),
    ],
)
def test_one_slip_is_one_readable_line(table: dict[str, object], expected: str):
    assert complaints(**table) == [expected]


def test_two_slips_are_two_lines():
    assert complaints(temperature=0, kd_weight=-1) == [
        "temperature: must be >= 0.001 and <= 10000, got 0.0",
        "kd_weight: must be >= 0 and <= 1e+06, got -1.0",
    ]


def test_zero_is_non_negative_and_a_rise_from_zero_is_positive():
    assert Settings(kd_weight=0).kd_weight.at(0.0) == 0.0
    # A Gaussian rise from 0 is above 0 from its first round on.
    assert Settings(temperature={"kind": "ramp_up", "end": 1}).temperature.range()[0] > 0
