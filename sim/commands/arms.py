"""The arms of a study: what they have in common, what each says itself, what holds for all.

From weak to strong: defaults; what the file says for all; what an arm says; what a sweep says; what
the command line says for all; what the command line says for an arm. A setting of a strategy holds
for every arm whose strategy has it. Which strategy an arm has is the arm's, or the sweep's, to say.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedkd.names import nearest
from sim.commands.budgets import Matching
from sim.commands.sweeps import Draft, drafts, grid_of, name_of, patch_of, settle
from sim.keeping.identity import fingerprint, numbers_of
from sim.reports.families import Families
from sim.reports.grids import Grid
from sim.settings import (
    Settings,
    SettingsError,
    asked,
    merge_tables,
    named,
    nested_table,
    read_file,
    read_over,
    settings_from_table,
    strategy_fields,
)
from sim.settings.combinations import ARM, values_meant
from sim.settings.schema import StudySettings
from sim.settings.tables import read_word
from strategies import STRATEGIES

DEFAULT_ARMS = ("local", "one_way", "fedmd", "dml", "fedavg")

_COMMAS = "; arms are separated by commas: local,dml"

Table = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Study:
    """What `sim.commands.study.compare` runs.

    Attributes:
        settings: what all arms have in common, and ``study``; its strategy is no arm's.
        arms: the settings of each, in the order of the table.
        remarks: arms that do not have what was said for all.
        notes: arms that are equal, and what makes them so.
        grid: how arms that come from a sweep lie side by side.
        families: arms that are compared with each other, by the family's name.
        matching: how arms were made equal in steps or bytes; None where nobody asked for that.
    """

    settings: Settings
    arms: Mapping[str, Settings]
    remarks: Sequence[str] = ()
    notes: Sequence[str] = ()
    grid: Grid | None = None
    families: Families = field(default_factory=dict)
    matching: Matching | None = None

    @property
    def combinations(self) -> int:
        """How many combinations a sweep makes of these arms; without one the number of arms."""
        if self.grid is None:
            return len(self.arms)
        return sum(name in self.arms for name in self.grid.arms)

    @property
    def differs(self) -> dict[str, dict[str, Any]]:
        """Each setting that arms differ in: its value in every arm that has it."""
        return differing(self.arms)


def load_study(
    config: str | None = None,
    words: Sequence[str] = (),
    *,
    arms: Sequence[str] | None = None,
    allow: Sequence[str] = (),
) -> Study:
    """Read a study: a file, and words that hold for every arm.

    Args:
        config: a YAML file.
        words: such as ``strategy.temperature=8``; over what an arm says itself, too.
        arms: names from ``study.arms``, of strategies with their defaults, or of arms that
            ``study.sweep`` makes; by default all of ``study.arms``, or a standard set where there
            are none and nothing is swept over.
        allow: packages, or ``package.module:callable``, whose code the file may name.

    Raises:
        SettingsError: a file that cannot be read, an unknown arm or setting, one that no arm has,
            a value that cannot work, or a callable that only the file names.
    """
    with asked(words, allow):
        return _Reader(read_file(config), words).study(arms)


def study_of(
    settings: Settings, arms: Sequence[str] | None = None, words: Sequence[str] = ()
) -> Study:
    """Return the study that settings describe; what was set in them holds for every arm."""
    whole = settings.to_table()
    table = {key: whole[key] for key in whole if key in settings.model_fields_set}
    if "strategy" in table:
        said = {"name", *settings.strategy.model_fields_set}
        strategy = table["strategy"]
        table["strategy"] = {key: strategy[key] for key in strategy if key in said}
    return _Reader(table, words).study(arms)


@dataclass(frozen=True, slots=True)
class _Words:
    """What the command line says, sorted by whom it is for.

    Attributes:
        study: words on the study itself.
        common: words for every arm; a table of strategy settings is one word for each of them.
        strategy: the strategy that is named; for arms that name none.
        arms: what is said for single arms.
    """

    study: Sequence[str]
    common: Sequence[str]
    strategy: str | None
    arms: Mapping[str, Any]

    @classmethod
    def sorted(cls, words: Sequence[str]) -> "_Words":
        study, common = [], []
        strategy: str | None = None
        arms: Mapping[str, Any] = {}
        for word in words:
            try:
                path, value = read_word(word)
            except ValueError as error:
                raise SettingsError(str(error)) from None
            if path[0] == "study":
                study.append(word)
                told = nested_table(path, value)["study"]
                of_arms = told.get("arms") if isinstance(told, Mapping) else None
                if isinstance(of_arms, Mapping):
                    arms = merge_tables(arms, of_arms)
            elif path in (("strategy",), ("strategy", "name")):
                table = named("strategy", value) if len(path) == 1 else {"name": value}
                if isinstance(table, Mapping):
                    strategy = table.get("name", strategy)
                    keys = [key for key in table if key != "name"]
                    common += [f"strategy.{key}={_text(table[key])}" for key in keys]
                else:
                    common.append(word)
            else:
                common.append(word)
        return cls(study, common, strategy, arms)


@dataclass
class _Reader:
    """Puts the arms together.

    Attributes:
        table: what the file says.
        words: what the command line says.
        absent: settings said for all, each with the labels of drafts that do not have it.
    """

    table: Table
    words: Sequence[str]
    absent: dict[str, list[str]] = field(default_factory=dict)

    def study(self, chosen: Sequence[str] | None) -> Study:
        said = _Words.sorted(self.words)
        of_all = [word for word in said.common if not word.startswith("strategy")]
        bare = {key: value for key, value in self.table.items() if key != "strategy"}
        # Without the strategy, whose settings are the arms': mistakes of all are told once.
        settings = settings_from_table(read_over(bare, [*of_all, *said.study]))
        known, sweep = settings.study.arms, settings.study.sweep
        # With a sweep a name may be one that the sweep makes, which is known when it is made.
        swept_arms = [name for name in chosen or () if sweep and not _is_arm(name, known)]
        bases = [name for name in chosen or () if name not in swept_arms]
        if not chosen or swept_arms:
            of_all = list(known) or ([""] if sweep else list(DEFAULT_ARMS))
            bases = list(dict.fromkeys([*of_all, *bases]))
        self._check_conditions(settings.study, known)
        made = drafts(bases, settings.study)
        read = [(draft, self._arm(draft, known, said, said.common)) for draft in made]
        names, found = settle(read)
        self._check_absent(made)
        arms = {
            name: found[name]
            for draft, name in zip(made, names, strict=True)
            if not chosen or draft.base in chosen or name in chosen
        }
        for name in swept_arms:
            if name not in arms:
                raise _unknown(name, [*known, *found])
        combined = list(zip(made, names, strict=True))
        kept = {name: draft for draft, name in combined if name in arms}
        labels = {draft.label: name for draft, name in combined}
        remarks = self._remarks({label: name for label, name in labels.items() if name in arms})
        if len(found) < len(made):
            remarks.append(
                f"study.sweep: {len(made)} combinations are {len(found)} arms: those that are "
                "equal in effect run once"
            )
        return Study(
            settings,
            arms,
            remarks,
            self._equal(arms, kept, known, said),
            grid_of(bases, settings.study, combined, arms) if sweep else None,
            self._families(settings.study.families, combined, arms, known),
        )

    @staticmethod
    def _check_conditions(study: StudySettings, known: Table) -> None:
        """Refuse a condition on an arm that there is not."""
        for condition in (*study.only, *study.without):
            for name in values_meant(condition.get(ARM, ()), ()):
                if not _is_arm(str(name), known):
                    raise SettingsError(
                        f"study.only, study.without: {_unknown(str(name), [*known, *STRATEGIES])}"
                    )

    def _families(
        self,
        families: Mapping[str, Sequence[str]],
        made: Sequence[tuple[Draft, str]],
        arms: Mapping[str, Settings],
        known: Table,
    ) -> Families:
        """Return the arms of each family; with a sweep it is one for each combination of values.

        An arm that several combinations have in common is in the family of each of them; families
        of the same arms are one.

        Args:
            families: the names of arms before they are swept over.
            made: each combination, and the arm that it is.
            arms: of the study.
            known: arms that the file has.

        Raises:
            SettingsError: if a family names an arm that there is not.
        """
        found: dict[str, list[str]] = {}
        for family, bases in families.items():
            strangers = [base for base in bases if not _is_arm(base, known)]
            if strangers:
                raise SettingsError(
                    f"study.families.{family}: {_unknown(strangers[0], list(known))}"
                )
            of_values: dict[str, list[str]] = {}
            for base in bases:
                for draft, name in made:
                    if draft.base == base and name in arms:
                        of_values.setdefault(name_of(family, draft.swept.values()), []).append(name)
            apart: list[list[str]] = []
            for told, members in of_values.items():
                if len(members) > 1 and members not in apart:
                    found[told] = members
                    apart.append(members)
        return found

    def _arm(self, draft: Draft, known: Table, said: _Words, words: Sequence[str]) -> Settings:
        name, label = draft.base, draft.label
        if name in known:
            patch = known[name]
        elif name in STRATEGIES:
            patch = {"strategy": {"name": name}}
        elif name:
            raise _unknown(name, [*known, *(each for each in STRATEGIES if each not in known)])
        else:
            patch = {}
        common = {key: value for key, value in self.table.items() if key != "study"}
        if said.strategy is not None:
            common = merge_tables(common, {"strategy": {"name": said.strategy}})
        try:
            patch = self._swept_over(common, patch, draft)
            table = self._laid_over(common, patch, label)
            table = read_over(table, self._had(words, table, label))
            own = said.arms.get(name)
            return settings_from_table(merge_tables(table, own) if own else table)
        except SettingsError as error:
            where = f"study.arms.{name}" if not draft.swept else f"study.sweep, arm {label}"
            raise SettingsError(f"{where}: {error}") from None

    def _swept_over(self, common: Table, patch: Table, draft: Draft) -> Table:
        """Lay a combination over what its arm says, as far as the strategy of both has it."""
        if not draft.swept:
            return patch
        whole = merge_tables(patch, patch_of(draft.swept))
        shared, own = (named("strategy", table.get("strategy", {})) for table in (common, whole))
        name = own.get("name", shared.get("name", _default_strategy()))
        had = {}
        for setting, value in draft.swept.items():
            section, _, key = setting.partition(".")
            if section == "strategy" and key and not _has(name, key.partition(".")[0]):
                self.absent.setdefault(setting, []).append(draft.label)
            else:
                had[setting] = value
        return merge_tables(patch, patch_of(had))

    def _laid_over(self, common: Table, patch: Table, arm: str) -> dict[str, Any]:
        """Lay what an arm says over what all have in common, as far as its strategy has it."""
        merged = merge_tables(common, patch)
        shared, own = (named("strategy", table.get("strategy")) for table in (common, patch))
        if not (isinstance(shared, Mapping) and isinstance(own, Mapping)):
            return merged
        strategy = own.get("name", shared.get("name", _default_strategy()))
        kept = {}
        for key, value in shared.items():
            if key == "name":
                continue
            if _has(strategy, key):
                kept[key] = value
            else:
                self.absent.setdefault(f"strategy.{key}", []).append(arm)
        merged["strategy"] = merge_tables({**kept, "name": strategy}, own)
        return merged

    def _had(self, words: Sequence[str], table: Table, arm: str) -> list[str]:
        """Return the words that an arm's strategy has a setting for."""
        strategy = named("strategy", table.get("strategy", _default_strategy()))
        name = strategy.get("name", _default_strategy()) if isinstance(strategy, Mapping) else None
        had = []
        for word in words:
            path, _ = read_word(word)
            if path[0] == "strategy" and len(path) > 1 and not _has(name, path[1]):
                self.absent.setdefault(".".join(path[:2]), []).append(arm)
            else:
                had.append(word)
        return had

    def _check_absent(self, made: Sequence[Draft]) -> None:
        for setting, arms in self.absent.items():
            if set(arms) != {draft.label for draft in made}:
                continue
            key = setting.split(".")[1]
            having = [name for name, s in STRATEGIES.items() if key in s.Settings.model_fields]
            among = _first(list(dict.fromkeys(draft.base or draft.label for draft in made)))
            if having:
                raise SettingsError(
                    f"no arm has the setting {setting!r} ({among}); {_first(having)} have it"
                )
            known = {name for s in STRATEGIES.values() for name in s.Settings.model_fields}
            raise SettingsError(
                f"unknown setting {setting!r} in all arms ({among})"
                f"{nearest(key, sorted(known - {'name'}))}"
            )

    def _remarks(self, names: Mapping[str, str]) -> list[str]:
        """Say which arms are without a setting; names of arms by the labels of their drafts."""
        together: dict[tuple[str, ...], list[str]] = {}
        for setting, drafted in self.absent.items():
            without = tuple(dict.fromkeys(names[label] for label in names if label in drafted))
            together.setdefault(without, []).append(setting)
        return [
            f"{', '.join(settings)}: not for {', '.join(arms)}, without such a setting"
            for arms, settings in together.items()
            if arms
        ]

    def _equal(
        self,
        arms: Mapping[str, Settings],
        made: Mapping[str, Draft],
        known: Table,
        said: _Words,
    ) -> list[str]:
        notes = []
        for group in _groups(arms):
            before = {name: self._arm(made[name], known, said, ()) for name in group}
            if len(set(map(fingerprint, before.values()))) > 1:
                why = f"have become equal: {', '.join(said.common)} holds for every arm"
            else:
                why = "are equal: they differ in nothing that changes a number"
            notes.append(f"arms {', '.join(group)} {why}")
        return notes


def _is_arm(name: str, known: Table) -> bool:
    return name in known or name in STRATEGIES


def _unknown(name: str, names: Sequence[str]) -> SettingsError:
    return SettingsError(
        f"unknown arm {name!r}; known: {', '.join(names)}"
        + (_COMMAS if name.split()[1:] else nearest(name, names))
    )


def _groups(arms: Mapping[str, Settings]) -> list[list[str]]:
    """Return the arms that are equal to another one, together."""
    alike: dict[str, list[str]] = {}
    for name, settings in arms.items():
        alike.setdefault(fingerprint(settings), []).append(name)
    return [group for group in alike.values() if len(group) > 1]


def differing(arms: Mapping[str, Settings]) -> dict[str, dict[str, Any]]:
    """Return each setting that arms have different values of, with the values.

    A setting of a strategy counts whole, and where an arm's strategy does not have it the arm is
    left out; which strategy an arm has goes without saying.
    """
    values: dict[str, dict[str, Any]] = {}
    for arm, settings in arms.items():
        for path, value in numbers_of(settings).items():
            if not path.startswith("strategy."):
                values.setdefault(path, {})[arm] = value
        for key, value in settings.to_table()["strategy"].items():
            if key != "name":
                values.setdefault(f"strategy.{key}", {})[arm] = value
    return {
        path: of_arms
        for path, of_arms in values.items()
        if any(value != next(iter(of_arms.values())) for value in of_arms.values())
    }


def difference_notes(differs: Mapping[str, Mapping[str, Any]], most: int = 6) -> list[str]:
    """Say in words what arms differ in, besides their strategies."""
    if not differs:
        return []
    told = []
    for path, of_arms in list(differs.items())[:most]:
        alike: dict[str, list[str]] = {}
        for arm, value in of_arms.items():
            alike.setdefault(_short(value), []).append(arm)
        values = [f"{text} in {_first(some)}" for text, some in alike.items()]
        told.append(f"{path} ({'; '.join(values)})")
    more = f" and {len(differs) - most} more" if len(differs) > most else ""
    return [f"arms differ in {', '.join(told)}{more}"]


def refused_notes(refused: Mapping[str, str]) -> list[str]:
    """Say which arms could not run, and why: those with one reason together."""
    together: dict[str, list[str]] = {}
    for arm, reason in refused.items():
        together.setdefault(reason, []).append(arm)
    return [f"refused: {', '.join(arms)}: {reason}" for reason, arms in together.items()]


def _first(arms: Sequence[str], most: int = 6) -> str:
    more = f" and {len(arms) - most} more" if len(arms) > most else ""
    return ", ".join(arms[:most]) + more


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and value.get("kind") == "constant":
        return _short(value["value"])
    if isinstance(value, Mapping) and {"kind", "start", "end"} <= value.keys():
        return f"{value['kind']} {value['start']:g} to {value['end']:g}"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else _text(value)


def _text(value: Any) -> str:
    """Write a value as a word has it."""
    return json.dumps(value, ensure_ascii=False)


def _default_strategy() -> str:
    name: str = Settings.model_fields["strategy"].default.name
    return name


def _has(strategy: object, key: str) -> bool:
    # Of a strategy that does not exist nothing is known; that is another error.
    fields = strategy_fields(strategy)
    return fields is None or key in fields
