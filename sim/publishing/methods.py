"""The methods paragraph: what a study did, in plain English, generated from its settings.

A sentence is written only where all runs share what it says; what arms differ in is left to the
table. Names of data, arms and models are written out for LaTeX, and sources are cited by the keys
of ``references.bib``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from sim.publishing.bibliography import bibtex, keys_of, plain_text, references
from sim.publishing.latex import escape
from sim.publishing.studies import Study, common, open_study
from sim.publishing.wording import (
    check_choice,
    counted,
    data_set,
    data_words,
    listed,
    matching_words,
    options_words,
    own_models,
    partition_words,
)
from sim.reports.runs import RunRecord, model_label
from sim.reports.statistics import ENOUGH_SEEDS
from sim.settings import SettingsError
from sim.settings.combinations import ARM
from strategies import STRATEGIES

Format = Literal["bibtex", "text", "methods"]

OF_DATA: Mapping[str, tuple[str, ...]] = {
    "digits": ("alpaydin1998digits", "pedregosa2011sklearn"),
    "mnist": ("lecun1998gradient",),
    "fashion_mnist": ("xiao2017fashion",),
    "fashion-mnist": ("xiao2017fashion",),
    "cifar10": ("krizhevsky2009cifar",),
    "cifar-10": ("krizhevsky2009cifar",),
}
OF_PARTITION = {
    "dirichlet": "yurochkin2019dirichlet",
    "pathological": "li2021silos",
    "quantity": "li2021silos",
    "shard": "mcmahan2017fedavg",
}
OF_OPTIMIZER = {"adam": "kingma2015adam", "adamw": "loshchilov2019adamw"}
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSProp"}
OF_MECHANISM = {"dp_sgd": ("abadi2016dpsgd", "mironov2019sampled")}


def cite(names: Sequence[str], format: str = "bibtex") -> str:
    """Return the references, or the methods paragraph, of a study or of algorithms.

    Args:
        names: one study or run folder; or algorithms.
        format: ``bibtex``; ``text``, a line for each; or ``methods``, a paragraph for LaTeX that
            cites them, which needs a study.

    Raises:
        SettingsError: names what is neither a folder nor an algorithm, or the format.
    """
    check_choice("format", format, get_args(Format))
    if not names:
        raise SettingsError("name a study's folder, or algorithms, such as dml or fedmd")
    folders = [name for name in names if name not in STRATEGIES and Path(name).is_dir()]
    if folders and len(names) > 1:
        raise SettingsError(f"give one folder, or algorithms, got {', '.join(names)}")
    if folders:
        study = open_study(Path(folders[0]))
        return methods(study) if format == "methods" else _written(keys_of_study(study), format)
    for name in names:
        if "/" in name:
            raise SettingsError(f"there is no folder {name}")
        if ":" in name:
            raise SettingsError(
                f"cite knows fedkd's own algorithms only, got {name!r}; `fedkd algorithms {name}` "
                "shows its source"
            )
    if format == "methods":
        raise SettingsError("--format methods is about a study; name its folder")
    return _written([key for name in names for key in keys_of(name)], format)


def _written(keys: Iterable[str], format: str) -> str:
    return bibtex(keys) if format == "bibtex" else plain_text(keys)


def keys_of_study(study: Study) -> list[str]:
    """Return the keys of everything that the methods paragraph of a study cites."""
    text = methods(study)
    return [key for key in references() if key in _cited(text)]


def _cited(text: str) -> set[str]:
    found = text.split(r"\cite{")[1:]
    return {key.strip() for part in found for key in part.partition("}")[0].split(",")}


def methods(study: Study) -> str:
    """Return a paragraph on what a study did, for LaTeX."""
    runs = list(study.records)
    sentences = [
        _data(runs),
        _partition(runs),
        _models(runs),
        _training(runs),
        _arms(study),
        _budget(study),
        _exchange(runs),
        _privacy(study),
        _adversary(runs),
        _seeds(study),
        _software(runs),
    ]
    return " ".join(sentence for sentence in sentences if sentence) + "\n"


def _cite(*keys: str) -> str:
    return rf"~\cite{{{','.join(keys)}}}" if keys else ""


def _data(runs: Sequence[RunRecord]) -> str:
    source = common(runs, "data.source")
    if source is None:
        return ""
    sources = OF_DATA.get(data_set(source), ())
    first = f"The data were {escape(data_words(source))}{_cite(*sources)}"
    validation, size = common(runs, "data.validation_fraction"), common(runs, "data.public.size")
    told = [first]
    if size:
        labelled = "labelled" if common(runs, "data.public.labelled") else "unlabelled"
        told.append(f"{size} {labelled} rows were public")
    if validation is not None:
        told.append(f"{100 * validation:g}\\,\\% of the rows left for training were for validation")
    told.append("the test split, common to all clients, was used for no choice")
    return f"{'; '.join(told)}."


def _partition(runs: Sequence[RunRecord]) -> str:
    partition, clients = common(runs, "data.partition"), common(runs, "clients.count")
    if partition is None or clients is None:
        return ""
    source = OF_PARTITION.get(str(partition.get("kind")))
    told = escape(partition_words(partition)) + _cite(*([source] if source else []))
    least = partition.get("min_rows")
    at_least = f", at least {least} to each" if isinstance(least, int) else ""
    return f"Private rows were dealt to {counted(clients, 'client')} {told}{at_least}."


def _models(runs: Sequence[RunRecord]) -> str:
    models = common(runs, "clients.models")
    if not models:
        return ""
    names = [escape(model_label(model)) for model in models]
    told = (
        f"Every client had a model of one architecture, {names[0]}"
        if len(names) == 1
        else f"Models of {len(names)} architectures ({listed(names)}) were given to clients in turn"
    )
    others = [
        f"the {role} of \\texttt{{{escape(strategy)}}} was {escape(label)}"
        for strategy, (role, label) in own_models(runs).items()
    ]
    return f"{'; '.join([told, *others])}."


def _training(runs: Sequence[RunRecord]) -> str:
    rounds, local = common(runs, "rounds"), common(runs, "clients.local")
    optimizer, batch = common(runs, "clients.optimizer"), common(runs, "clients.batch_size")
    parts = []
    if isinstance(local, Mapping) and local.get("steps"):
        parts.append(f"for {counted(local['steps'], 'step')} a round")
    elif isinstance(local, Mapping) and local.get("epochs"):
        parts.append(f"for {counted(local['epochs'], 'local epoch')} a round")
    if isinstance(optimizer, Mapping):
        name = str(optimizer.get("name"))
        source = [OF_OPTIMIZER[name]] if name in OF_OPTIMIZER else []
        told = f"with {escape(OPTIMIZERS.get(name, name))}{_cite(*source)}"
        told += f" at a learning rate of {optimizer.get('lr'):g}"
        decay, momentum = optimizer.get("weight_decay"), optimizer.get("momentum")
        told += f", a weight decay of {decay:g}" if decay else ""
        told += f", a momentum of {momentum:g}" if momentum else ""
        parts.append(told)
    if batch:
        parts.append(f"in batches of {batch}")
    if rounds:
        parts.append(f"over {counted(rounds, 'round')}")
    elif numbers := sorted({run.settings["rounds"] for run in runs}):
        parts.append(f"over {numbers[0]} to {numbers[-1]} rounds, by arm")
    if not parts:
        return ""
    share = common(runs, "clients.participation")
    some = (
        f"; in each round {100 * share:g}\\,\\% of the clients took part"
        if isinstance(share, float) and share < 1 and not common(runs, "clients.participants")
        else ""
    )
    return f"Clients trained {', '.join(parts)}{some}."


def _arms(study: Study) -> str:
    by_strategy = {str(run.settings["strategy"]["name"]): None for run in study.records}
    told = []
    for name in by_strategy:
        own = name not in STRATEGIES
        note = " (of our own)" if own else _cite(*keys_of(name))
        told.append(f"\\texttt{{{escape(name)}}}{note}")
    if len(study.runs) == 1:
        return f"The algorithm was {told[0]}."
    noun = "algorithm" if len(told) == 1 else "algorithms"
    more = f" in {len(study.runs)} arms" if len(study.runs) > len(told) else ""
    against = f"; others are compared with the arm \\texttt{{{escape(study.baseline)}}}"
    swept = [
        f"\\texttt{{{escape(axis.name)}}} in \\{{{', '.join(map(escape, axis.labels))}\\}}"
        for axis in (study.grid.axes if study.grid is not None else ())
        if axis.name != ARM and len(axis.values) > 1
    ]
    over = f"; we varied {listed(swept)}" if swept else ""
    return f"We compared the {noun} {listed(told)}{more}{over}{against}."


def _budget(study: Study) -> str:
    told = matching_words(study, lambda arm: f"\\texttt{{{escape(arm)}}}")
    return f"{told[0].upper()}{told[1:]}." if told else ""


def _exchange(runs: Sequence[RunRecord]) -> str:
    up, down = common(runs, "exchange.up"), common(runs, "exchange.down")
    budget = common(runs, "exchange.budget_kb")
    if not isinstance(up, Mapping) or not isinstance(down, Mapping):
        return ""
    names = [f"{table.get('kind')}{options_words(table, 'kind')}" for table in (up, down)]
    told = (
        f"as {escape(names[0])} in both directions"
        if names[0] == names[1]
        else f"as {escape(names[0])} to the server and as {escape(names[1])} from it"
    )
    within = f", within {budget:g}\\,kB of a client" if budget else ""
    return f"Payloads travelled {told}{within}."


def _privacy(study: Study) -> str:
    runs = list(study.records)
    told = [run.privacy for run in runs if run.protected]
    if not told:
        return ""
    settings = [run.settings["privacy"] for run in runs if run.protected]
    kinds = dict.fromkeys(str(table["mechanism"]["kind"]) for table in settings)
    places = dict.fromkeys(str(table.get("where")) for table in settings)
    spent = [value for run in runs if (value := run.epsilon) is not None]
    delta = common([run for run in runs if run.protected], "privacy.delta")
    names = [escape(kind.replace("_", " ")) + _cite(*OF_MECHANISM.get(kind, ())) for kind in kinds]
    most = (
        f"; no client spent more than epsilon {max(spent):.4g} at delta {delta:g}"
        if spent and isinstance(delta, float)
        else ""
    )
    some = "" if len(told) == len(runs) else " in some arms"
    where = listed([f"at the {place}" for place in places])
    return f"Client data were protected{some} by {listed(names)} {where}{most}."


def _adversary(runs: Sequence[RunRecord]) -> str:
    kinds = {
        str(table.get("kind"))
        for run in runs
        if isinstance(table := run.settings.get("adversary"), Mapping)
    } - {"none"}
    if not kinds:
        return ""
    return f"Some clients were dishonest ({listed([escape(kind) for kind in sorted(kinds)])})."


def _seeds(study: Study) -> str:
    seeds = study.seeds
    if len(seeds) == 1:
        return f"There was one seed, {seeds[0]}, so that nothing is said of chance."
    last = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 2 else f"{seeds[0]} and {seeds[1]}"
    told = (
        f"Every arm was run with {len(seeds)} seeds ({last}), which fix the split, the first "
        "weights and the order of batches in all arms alike; "
        "means have two-sided 95\\,\\% t-intervals over seeds"
    )
    if len(study.runs) > 1:
        told += (
            f", and differences are paired by seed, with paired t-tests{_cite('student1908mean')}"
            f" corrected by Holm's method{_cite('holm1979simple')}"
        )
        if len(seeds) < ENOUGH_SEEDS:
            told += (
                f". With so few seeds the exact sign-flip test{_cite('fisher1935design')} cannot "
                f"fall below p = {2 / 2 ** len(seeds):.3g}"
            )
    return f"{told}."


def _software(runs: Sequence[RunRecord]) -> str:
    packages = [run.environment.get("packages") for run in runs]
    known: Mapping[str, Any] = next((each for each in packages if isinstance(each, Mapping)), {})
    tools = [("Flower", "flwr", "beutel2020flower"), ("PyTorch", "torch", "paszke2019pytorch")]
    if common(runs, "engine.backend") == "ray":
        tools.insert(1, ("Ray", "ray", "moritz2018ray"))
    told = [
        f"{name} {escape(str(known[package]))}{_cite(key)}"
        for name, package, key in tools
        if package in known
    ]
    if not told:
        return ""
    return f"Runs were made with fedkd {escape(str(known.get('fedkd', '')))} on {listed(told)}."
