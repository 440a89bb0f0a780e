"""What averaging the clients' predictions costs in memory and time beside stacking them first.

50,000 public rows x 100 classes of float32 logits a client, 20 MB each. Ours is `StreamingMean`:
each upload is folded in as it comes and the mean is popped at the end. Stack-and-mean keeps every
upload until the last one is there and then does ``np.stack(uploads).mean(axis=0)``, in float32
where ours sums in float64. Both start from uploads in a buffer that the next ones overwrite, as
those of a transport, so stack-and-mean has to copy what it keeps.

Every measurement is a process of its own with one thread. Its clock runs from the first upload
to the mean; its memory is the highest resident memory in that time above what was resident
before, in payloads of 20 MB. Both sides take turns over the same numbers of clients; ours also
averages more clients than any stack has room for, so that its memory shows whether it grows. The
means of both must agree within the rounding of float32, or the comparison is void.

    python benchmarks/aggregation.py           # about 3 minutes
    python benchmarks/aggregation.py --check   # exit status 1 where a target is missed
    python benchmarks/aggregation.py --quick   # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from measurement import (
    Samples,
    add_common_arguments,
    describe,
    exit_status,
    machine,
    ratios,
    row,
    verdict,
)

SIDES = ("stacked", "ours")
UPLOADS_AT_HAND = 4
"""Different uploads that are sent in turn; together larger than a processor's cache."""
BLOCK_ALLOWANCE = 0.1
"""Payloads of working space beside the sum: a block of 1 MiB, and whole pages."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000, help="public rows")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--most-clients", type=int, default=1000, help="ours only: the longest")
    parser.add_argument("--at-most-payloads", type=float, default=2.0, help="target of the memory")
    add_common_arguments(parser, repeats=5, at_most=1 / 20)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rows, options.clients, options.most_clients, options.repeats = 100, [3], 5, 1
    return options


def main() -> int:
    options = arguments()
    if options.side is not None:
        sys.stdout.write(json.dumps(measure(options)) + "\n")
        return 0
    before = machine()
    counts = [*options.clients, options.most_clients]
    milliseconds = {(side, count): Samples() for side in SIDES for count in counts}
    payloads = {(side, count): Samples() for side in SIDES for count in counts}
    for repeat in range(options.repeats):
        for count in counts:
            # Turned round each time, so that neither side always follows the other.
            sides = SIDES if count in options.clients else ("ours",)
            means = {}
            for side in sides if repeat % 2 == 0 else reversed(sides):
                seconds, memory, means[side] = one_process(side, count, options)
                milliseconds[side, count].values.append(1e3 * seconds / count)
                payloads[side, count].values.append(memory)
            if len(means) == 2 and not np.allclose(means["ours"], means["stacked"], atol=1e-4):
                print(f"the two did not compute the same mean of {count} clients: void")
                return 1
    print(describe(before, os.getloadavg()[0]))
    print(f"{options.rows} rows x {options.classes} classes, milliseconds a client and payloads:")
    for side, count in milliseconds:
        if milliseconds[side, count].values:
            print(
                f"  {side:<8}{count:>5} clients  {milliseconds[side, count].text()} ms  "
                f"{payloads[side, count].text()} payloads"
            )
    most = Samples(
        [max(payloads["ours", count].values[i] for count in counts) for i in range(options.repeats)]
    )
    print(f"memory {most.text()} payloads; {memory_verdict(most, options)}")
    for count in options.clients[:-1]:
        ratio = ratios(milliseconds["ours", count], milliseconds["stacked", count])
        print(f"time of {count} clients: ratio {ratio.text()}, that is 1/{1 / ratio.median:.1f}")
    largest = options.clients[-1]
    ratio = ratios(milliseconds["ours", largest], milliseconds["stacked", largest])
    row(
        "B6",
        f"aggregation, {options.rows} x {options.classes}, up to {max(counts)} clients: memory",
        f"{most.text()} payloads",
        f"at most {options.at_most_payloads:g} (+ {BLOCK_ALLOWANCE:g})",
        not memory_missed(most, options),
        options,
    )
    row(
        "B6",
        f"the same, time of {largest} clients against stack-and-mean",
        f"1/{1 / ratio.median:.1f}",
        f"at most 1/{1 / options.at_most:.0f}",
        ratio.median <= options.at_most,
        options,
    )
    if options.json:
        table = {
            f"{side} {count}": {
                "milliseconds": milliseconds[side, count].to_table(),
                "payloads": payloads[side, count].to_table(),
            }
            for side, count in milliseconds
        }
        print(json.dumps({**before, **table, "ratio": ratio.to_table()}))
    print(
        f"ratio {ratio.text()}, that is 1/{1 / ratio.median:.1f} for {largest} clients; "
        f"{verdict(ratio, options)}"
    )
    return max(exit_status(ratio, options), int(memory_missed(most, options) and options.check))


def memory_missed(most: Samples, options: argparse.Namespace) -> bool:
    return not options.quick and most.median > options.at_most_payloads + BLOCK_ALLOWANCE


def memory_verdict(most: Samples, options: argparse.Namespace) -> str:
    if options.quick:
        return "no verdict"
    word = "MISSED" if memory_missed(most, options) else "met"
    return (
        f"target at most {options.at_most_payloads:g} and {BLOCK_ALLOWANCE:g} of working space: "
        f"{word}"
    )


def one_process(
    side: str, clients: int, options: argparse.Namespace
) -> tuple[float, float, list[float]]:
    """Return seconds, payloads of memory and a sample of the mean, measured in a new process."""
    command = [sys.executable, __file__, "--side", side, "--clients", str(clients)]
    command += ["--rows", str(options.rows), "--classes", str(options.classes)]
    # One thread on either side.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the side {side!r} failed:\n{done.stderr}")
    seconds, memory, sample = json.loads(done.stdout.splitlines()[-1])
    return seconds, memory, sample


# -- in the measured process -------------------------------------------------------------------


def measure(options: argparse.Namespace) -> tuple[float, float, list[float]]:
    clients = options.clients[0]
    shape = options.rows, options.classes
    rng = np.random.default_rng(0)
    uploads = [rng.standard_normal(shape, dtype=np.float32) for _ in range(UPLOADS_AT_HAND)]
    average = streamed if options.side == "ours" else stacked
    # Whatever is imported or set up on first use is not what is measured.
    average([table[:2] for table in uploads], 2)
    before = start_of_peak()
    started = time.perf_counter()
    mean = average(uploads, clients)
    seconds = time.perf_counter() - started
    memory = (resident("VmHWM") - before) / uploads[0].nbytes
    return seconds, memory, mean.ravel()[:: max(1, mean.size // 1000)].astype(float).tolist()


def streamed(uploads: list[np.ndarray], clients: int) -> np.ndarray:
    from fedkd.targets import StreamingMean

    mean = StreamingMean()
    for client in range(clients):
        mean.add(uploads[client % len(uploads)])
    return mean.pop_mean().numpy()


def stacked(uploads: list[np.ndarray], clients: int) -> np.ndarray:
    kept = [uploads[client % len(uploads)].copy() for client in range(clients)]
    mean: np.ndarray = np.stack(kept).mean(axis=0)
    return mean


def start_of_peak() -> int:
    """Forget the highest resident memory so far; return the present one in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> int:
    """Return ``VmRSS`` (now) or ``VmHWM`` (highest) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())
