"""A term of another package: named by its kind, checked, bound and saved like one of ours."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fedkd import own_code
from fedkd.objectives import Objective, View
from fedkd.targets import Targets

KIND = "lone_terms.margin:Margin"
TERM = '''
from typing import ClassVar, Literal

from pydantic import Field

from fedkd.objectives import Term
from fedkd.objectives.basic import LogitMSE


class Margin(LogitMSE):
    """So many times the squared distance of logits."""

    kind: str = ""
    times: float = Field(2.0, ge=1)

    def value(self, view, parts, pairs):
        return self.times * super().value(view, parts, pairs)


class Fixed(Margin):
    kind: Literal["margin"] = "margin"


class Empty(Term):
    source: ClassVar[str] = ""


number = 3
'''


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "lone_terms"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "margin.py").write_text(TERM)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("lone_terms")]:
        del sys.modules[name]


def test_it_stands_beside_terms_of_ours_and_is_saved_by_its_full_name() -> None:
    objective = Objective.model_validate({"ce": 1.0, "far": {"kind": KIND, "weight": 0.5}})
    saved = objective.model_dump(mode="json")
    assert (saved["far"]["kind"], saved["far"]["times"]) == (KIND, 2)
    assert Objective.model_validate(saved) == objective
    # In Python the class itself is enough.
    made = type(objective.terms["far"])(weight=0.5)  # type: ignore[arg-type]
    assert made == objective.terms["far"]


def test_it_is_computed() -> None:
    far = {"mse": 1.0, "far": {"kind": KIND, "times": 3}}
    student = torch.tensor([[1.0, 0.0]], requires_grad=True)
    step = View(logits=student, targets=Targets(torch.tensor([[0.0, 0.0]])))
    model = torch.nn.Linear(1, 2)
    bound = Objective.model_validate(far).bind(
        model, None, torch.zeros(2, 1, 1, 1), num_classes=2, rows=1, seed=0
    )
    losses = bound.losses(step)
    assert losses["mse"].item() == pytest.approx(0.5)
    assert losses["far"].item() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"kind": KIND, "time": 3}, r"unknown setting 'objective.far.time'.*mean 'times'"),
        ({"kind": KIND, "times": 0}, r"objective.far.times: must be greater than .* got 0"),
        ({"kind": "lone_terms.margin:Nope"}, r"objective.far.kind '.*' has no attribute 'Nope'"),
        ({"kind": "lone_terms.margin:number"}, r"must be a class that is a fedkd.*Term, got a int"),
        ({"kind": "pathlib:Path"}, r"objective.far.kind 'pathlib:Path' must be a subclass of"),
        ({"kind": "lone_terms.margin:Empty"}, r"lacks value of fedkd.objectives.terms.Term"),
        ({"kind": "lone_terms.margin:Fixed"}, r"must have 'kind: str', got 'kind: Literal"),
        ({"kind": "nowhere_at_all:X"}, r"objective.far.kind 'nowhere_at_all:X': cannot import"),
        ({"kind": "margin"}, r"unknown term 'margin' in objective.*or kind: package.module:Class"),
    ],
)
def test_what_cannot_work_names_the_setting(table: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Objective.model_validate({"far": table})


def test_nothing_is_loaded_that_is_only_looked_at_or_refused() -> None:
    def refuse(name: str) -> bool:
        raise ValueError(f"{name!r} is refused")

    table = {"far": {"kind": KIND, "times": 3}}
    with own_code.asking(lambda _: False):
        seen = Objective.model_validate(table)
    assert seen.model_dump(mode="json")["far"]["times"] == 3
    with (
        own_code.asking(refuse),
        pytest.raises(ValidationError, match=r"objective\.far\.kind: '.*' is refused"),
    ):
        Objective.model_validate(table)
    assert "lone_terms" not in sys.modules
