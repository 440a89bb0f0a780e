"""What a process imports before it works: without a clock, for clocks depend on the machine."""

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

PROGRAM = """
import sys
from sim.commands.cli import main
sys.argv = ["fedkd", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""

PRINTS = "print('loaded', *sorted(sys.modules))"

NO_RUN_NEEDS = (
    "datasets",
    "fedkd.distillation",
    "fedkd.figures",
    "flwr_datasets",
    "jinja2",
    "matplotlib",
    "pandas",
    "pyarrow",
    "scipy",
    "seaborn",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torchvision",
)
"""Seconds of imports: what draws, compiles, tests or reads other data."""


def loaded(program: str, *words: str) -> set[str]:
    """Run a program in a process of its own and return the modules it ended with."""
    ran = subprocess.run(
        [sys.executable, "-c", f"{program}\n{PRINTS}", *words], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.splitlines()[-1].split())


def among(modules: Collection[str], packages: Collection[str]) -> list[str]:
    """Return the packages of which any module is loaded."""
    return [
        package
        for package in packages
        if any(module == package or module.startswith(f"{package}.") for module in modules)
    ]


def test_help_and_version_load_no_library_that_computes() -> None:
    heavy = ("torch", "numpy", "flwr", "ray", "pydantic", "omegaconf")
    assert not among(loaded(PROGRAM, "run", "--help"), heavy)


def test_an_inline_run_loads_nothing_that_it_does_not_use(
    tmp_path: Path, small_words: tuple[str, ...]
) -> None:
    models = "clients.models=[mlp,cnn,gru,transformer]"
    modules = loaded(PROGRAM, "run", *small_words, models, f"output={tmp_path}", "--quiet")
    assert len(list(tmp_path.glob("*/*/result.json"))) == 1
    assert not among(modules, (*NO_RUN_NEEDS, "ray"))
    # Were the names misspelt, the line above would say nothing.
    assert {"torch", "flwr", "fedkd.training", "strategies"} <= modules


def test_a_worker_loads_no_more_than_a_run() -> None:
    modules = loaded("import sys, sim.engine.session")
    assert not among(modules, NO_RUN_NEEDS)
    assert {"torch", "ray", "sim.engine.runtime"} <= modules


def test_operations_are_counted_without_the_compiler() -> None:
    counts = "import sys, torch; from fedkd.compression.cost import row_flops as count"
    modules = loaded(f"{counts}; assert count(torch.nn.Linear(2, 3), (2,)).predicted == 12")
    assert not among(modules, NO_RUN_NEEDS)
