"""`bundle`: one archive with what a reviewer needs, and the check that it still is that.

The same study gives the same bits: files are sorted, and no time is told. Paths of this machine are
replaced by their last part, and results whose files changed by that are sealed anew.
"""

import hashlib
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path, PurePath
from typing import Any

from fedkd.own_code import folder_of, is_own_code, package_of
from sim.keeping.parts import chunks
from sim.keeping.records import (
    ENVIRONMENT_FILE,
    IDENTITY_FILE,
    PEERS_FILE,
    RESULT_FILE,
    ROW_FILES,
    SETTINGS_FILE,
    SPLIT_FILE,
    sealed_anew,
    to_json,
)
from sim.publishing.bibliography import bibtex
from sim.publishing.figures import draw_study, load_style
from sim.publishing.frames import tidy_rows
from sim.publishing.latex import label_of
from sim.publishing.methods import keys_of_study, methods
from sim.publishing.studies import Study, open_study
from sim.publishing.tables import table_texts, to_csv, to_latex
from sim.reports.html.writing import REPORT_FILE
from sim.reports.runs import ATTACKS_FILE, STUDY_FILE, VALUE_FILE, RunRecord
from sim.settings import SettingsError
from sim.settings.tables import dotted, yaml_text

DIGESTS_FILE = "SHA256SUMS"
KEPT = (SETTINGS_FILE, IDENTITY_FILE, ENVIRONMENT_FILE, RESULT_FILE, *ROW_FILES)
"""Of every run; checkpoints and models are left out."""
IF_THERE = (SPLIT_FILE, PEERS_FILE, ATTACKS_FILE, VALUE_FILE)
STUDY_YAML = "study.yaml"
STUDY = "study"
"""The folder of the archive that ``fedkd report`` reads."""

_NO_TIME = (1980, 1, 1, 0, 0, 0)
_LARGEST = 2**33


def bundle(
    folder: Path, output: Path | None = None, *, models: bool = False, code: bool = False
) -> Path:
    """Write a study or a run with all that a paper shows of it into one archive.

    Args:
        folder: of the study or the run.
        output: the archive, ``<folder's name>.zip`` by default; an older one is replaced.
        models: take the trained models too.
        code: take the source of packages that settings name (``package.module:callable``) and that
            are not installed. It is yours, so it is not taken unasked.

    Returns:
        The archive.

    Raises:
        SettingsError: names the folder that cannot be read or the file that cannot be written.
    """
    study = open_study(folder)
    path = output if output is not None else Path(f"{folder.resolve().name}.zip")
    files = _files(study, models=models)
    if (settings := study_table(study)) is not None:
        files[STUDY_YAML] = yaml_text(settings).encode()
    files = _scrubbed(study, files)
    files |= _published(study)
    if code:
        files |= dict(_own_code(study))
    files["README.md"] = _readme(study, with_code=code).encode()
    digests = "".join(
        f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)
    )
    files[DIGESTS_FILE] = digests.encode()
    if path.exists() and not is_bundle(path):
        raise SettingsError(
            f"{str(path)!r} is there already and no bundle, so it is not replaced; name another "
            "file, such as --output bundle.zip"
        )
    try:
        path.write_bytes(_zipped(files))
    except OSError as error:
        raise SettingsError(f"--output: cannot write {str(path)!r}: {error.strerror}") from None
    return path


def is_bundle(path: Path) -> bool:
    """Tell whether a file is an archive that `bundle` wrote, sound or not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return DIGESTS_FILE in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _zipped(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _NO_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])
    return stream.getvalue()


# -- what is in it ------------------------------------------------------------------------------


def run_places(study: Study) -> dict[Path, str]:
    """Return where each run stands in the archive, seen from the study's folder."""
    if not study.whole:
        return {study.folder: "."}
    return {
        run.folder: f"{number}-{label_of(arm)}/{run.folder.name}"
        for number, (arm, of_arm) in enumerate(study.runs.items(), start=1)
        for run in of_arm
    }


def _files(study: Study, *, models: bool) -> dict[str, bytes]:
    files = {}
    places = run_places(study)
    for folder, place in places.items():
        inside = PurePath(STUDY) / place
        for name in (*KEPT, *IF_THERE):
            if (folder / name).is_file():
                # Lines, wherever the rows are: a zip has them small, and any tool reads them.
                text = (
                    chunks(folder / name) if name in ROW_FILES else [(folder / name).read_bytes()]
                )
                files[str(inside / name)] = b"".join(text)
        for path in sorted((folder / "models").glob("*")) if models else ():
            files[str(inside / "models" / path.name)] = path.read_bytes()
    if study.whole:
        table = json.loads((study.folder / STUDY_FILE).read_text(encoding="utf-8"))
        table["arms"] = {
            arm: [places[run.folder] for run in study.runs.get(arm, ())] for arm in table["arms"]
        }
        files[f"{STUDY}/{STUDY_FILE}"] = (to_json(table, indent=2) + "\n").encode()
    if (study.folder / REPORT_FILE).is_file():
        files[f"{STUDY}/{REPORT_FILE}"] = (study.folder / REPORT_FILE).read_bytes()
    return files


def _scrubbed(study: Study, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Replace every path of this machine in text by its last part."""
    found = {str(study.folder.resolve()), str(Path.home())}
    for run in study.records:
        texts = [*_texts(run.settings), str(run.result.get("folder", ""))]
        found |= {text for text in texts if PurePath(text).is_absolute()}
    # The longest first: what is inside another is not cut in its middle.
    paths = sorted((path for path in found if len(path) > 1), key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(path) for path in paths))
    done = {
        name: content
        if name.endswith(".safetensors")
        else pattern.sub(lambda path: PurePath(path[0]).name, content.decode("utf-8")).encode()
        for name, content in files.items()
    }
    for name in done:
        if PurePath(name).name == RESULT_FILE:
            beside = {
                each: done.get(str(PurePath(name).with_name(each)), b"") for each in ROW_FILES
            }
            row = sealed_anew(json.loads(done[name]), beside)
            done[name] = (to_json(row, indent=2) + "\n").encode()
    return done


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def _published(study: Study) -> dict[str, bytes]:
    """Return tables, figures, methods, references and requirements."""
    found = {f"tables/{name}": text.encode() for name, text in table_files(study).items()}
    for format in ("svg", "pdf"):
        drawn = draw_study(study, load_style(None), format=format)
        found |= {f"figures/{name}.{format}": content for name, content in drawn.items()}
    found["methods.tex"] = methods(study).encode()
    found["references.bib"] = bibtex(keys_of_study(study)).encode()
    found["requirements.txt"] = requirements(study).encode()
    return found


def table_files(study: Study) -> dict[str, str]:
    """Return the tables of an archive by file name: those that ``--check`` makes again."""
    return {
        "table.tex": "\n".join(to_latex(each) for each in table_texts(study)),
        **{f"{rows}.csv": to_csv(tidy_rows(study, rows)) for rows in ("arms", "runs", "rounds")},
    }


def requirements(study: Study) -> str:
    """Return the exact versions of fedkd's dependencies: those of the runs, else those here."""
    of_runs: dict[str, str] = {}
    for run in study.records:
        packages = run.environment.get("packages")
        of_runs |= packages if isinstance(packages, dict) else {}
    lines = []
    for name in sorted(_needed("fedkd"), key=str.lower):
        known = str(of_runs.get(name, version(name)))
        # What follows + names a build, which no registry has.
        lines.append(f"{name}=={known.partition('+')[0]}\n")
    return "".join(lines)


def _needed(package: str) -> set[str]:
    found: set[str] = set()
    left = [package]
    while left:
        name = left.pop()
        try:
            version(name)
        except PackageNotFoundError:
            continue
        if name in found:
            continue
        found.add(name)
        for line in requires(name) or ():
            if "extra ==" not in line:
                left.append(re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("_", "-"))
    return found


def own_packages(records: Iterable[RunRecord]) -> list[str]:
    """Return the packages of code that settings name and that is not fedkd's."""
    names = {text for run in records for text in _texts(run.settings) if is_own_code(text)}
    return sorted({package_of(name).split(".")[0] for name in names} - {"fedkd", "strategies"})


def _own_code(study: Study) -> Iterator[tuple[str, bytes]]:
    for package in own_packages(study.records):
        folder = folder_of(package)
        if folder is None or "site-packages" in folder:
            continue
        module, inside = Path(folder) / f"{package}.py", Path(folder) / package
        for path in [module] if module.is_file() else sorted(inside.rglob("*.py")):
            yield f"code/{path.relative_to(folder)}", path.read_bytes()


def _readme(study: Study, *, with_code: bool) -> str:
    places = run_places(study)
    commit = next(
        (commit for run in study.records if (commit := run.environment.get("git_commit"))), None
    )
    runs = [
        f"fedkd run {PurePath(STUDY) / places[run.folder] / SETTINGS_FILE} output=again  "
        f"# {arm}, seed {run.seed}: {run.result.get('weights_sha256')}"
        for arm, of_arm in study.runs.items()
        for run in of_arm
    ]
    own = own_packages(study.records)
    data = [
        path
        for run in study.records
        for path, value in dotted(run.settings).items()
        if isinstance(value, str) and PurePath(value).is_absolute() and path != "output"
    ]
    notes = []
    if own:
        where = "in `code/`" if with_code else "not included"
        notes.append(f"Settings name code of {', '.join(own)}, which is {where}.")
    if data:
        notes.append(
            f"Paths in {', '.join(dict.fromkeys(data))} are cut to their last part: put your own."
        )
    return "\n".join(
        [
            f"# {study.name}",
            "",
            "Everything that was measured, and what was made of it.",
            "",
            *_one_file(study),
            "- `study/`: settings, metrics, exchange, events, results; `fedkd report study` reads",
            "  them",
            "- `tables/`, `figures/`, `methods.tex`, `references.bib`: for the paper",
            "- `requirements.txt`: exact versions of packages",
            f"- `{DIGESTS_FILE}`: of every file; `fedkd bundle FILE.zip --check` holds them",
            "  against the files, and the tables against the metrics",
            "",
            "Checkpoints and data are not included." + "".join(f" {note}" for note in notes),
            "",
            "## Run it again",
            "",
            f"With fedkd at commit {commit}," if commit else "With the same fedkd,",
            "after `pip install -r requirements.txt`, each line gives a run whose weights have the",
            "SHA-256 that stands behind it (on the kind of processor in `environment.json`):",
            "",
            "```",
            *runs,
            "```",
            "",
            *_all_again(study),
        ]
    )


def _one_file(study: Study) -> list[str]:
    whole = study_table(study) is not None
    return [f"- `{STUDY_YAML}`: the settings of all runs"] if whole else []


def _all_again(study: Study) -> list[str]:
    if study_table(study) is None:
        return []
    command = f"fedkd compare {STUDY_YAML} output=again"
    return ["All of them, with table and report:", "", "```", command, "```", ""]


def study_table(study: Study) -> dict[str, Any] | None:
    """Return settings with which ``fedkd compare`` makes the whole study.

    Sections that all runs share stand once, and those in which runs differ stand whole in each arm.

    Returns:
        None for a single run, and where arms have other seeds than each other or seeds with gaps:
        no settings stand for those.
    """
    seeds = study.seeds
    of_arms = {arm: {run.seed for run in of_arm} for arm, of_arm in study.runs.items()}
    whole = set(range(seeds[0], seeds[0] + len(seeds)))
    if not study.whole or any(of_arm != whole for of_arm in of_arms.values()):
        return None
    first = {arm: dict(of_arm[0].settings) for arm, of_arm in study.runs.items()}
    keys = dict.fromkeys(key for table in first.values() for key in table if key not in _OF_STUDY)
    same = [
        key
        for key in keys
        if len({json.dumps(table.get(key), sort_keys=True) for table in first.values()}) == 1
        and key != "strategy"
    ]
    some = next(iter(first.values()))
    return {
        **{key: some[key] for key in same},
        "seed": seeds[0],
        "study": {
            "seeds": len(seeds),
            "baseline": study.baseline,
            "arms": {
                arm: {key: table[key] for key in keys if key in table and key not in same}
                for arm, table in first.items()
            },
        },
    }


_OF_STUDY = ("output", "seed", "study")

# -- whether it still is that -------------------------------------------------------------------


def check_bundle(path: Path) -> int:
    """Check an archive: every file by its SHA-256, and the tables by the metrics.

    Returns:
        How many files were checked.

    Raises:
        SettingsError: names what is wrong.
    """
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "is not there"
        raise SettingsError(f"{str(path)!r} {there}; --check takes an archive of fedkd bundle")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _LARGEST:
                raise SettingsError(f"{str(path)!r} holds more than {_LARGEST / 1e9:.0f} GB")
            files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise SettingsError(f"{str(path)!r} cannot be read as an archive: {error}") from None
    lines = files.pop(DIGESTS_FILE, b"").decode("utf-8", "replace").splitlines()
    told = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    wrong = [
        f"{name} "
        + ("is missing" if name not in files else "is new" if name not in told else "changed")
        for name in sorted({*told, *files})
        if name not in files or hashlib.sha256(files[name]).hexdigest() != told.get(name)
    ]
    if wrong:
        raise SettingsError(f"{str(path)!r} is not what was bundled: {'; '.join(wrong[:5])}")
    with tempfile.TemporaryDirectory() as place:
        for name, content in files.items():
            target = Path(place) / name
            if not target.resolve().is_relative_to(Path(place).resolve()):
                raise SettingsError(f"{str(path)!r} names a file outside itself: {name!r}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        again = table_files(open_study(Path(place) / STUDY))
    differing = [
        name for name, text in again.items() if files.get(f"tables/{name}") != text.encode()
    ]
    if differing:
        raise SettingsError(
            f"{str(path)!r}: what tables say does not follow from the metrics: "
            f"{', '.join(differing)}"
        )
    return len(files)
