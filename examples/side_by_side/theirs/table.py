"""A table with paired differences, and a figure, of a sweep."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

runs = pd.DataFrame([json.loads(path.read_text()) for path in Path("sweep").glob("*/result.json")])
runs["last"] = [100 * curve[-1] for curve in runs["accuracies"]]
wide = runs.pivot(index="seed", columns=["alpha", "method"], values="last")


def interval(values) -> str:
    """Return the mean with its 95 % t-interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.1f} ± {half:.1f}"


rows = []
for alpha in sorted(runs["alpha"].unique()):
    pair = wide[alpha]
    rows.append(
        {
            "alpha": alpha,
            **{method: interval(pair[method]) for method in ("mean", "surest")},
            "surest - mean": interval(pair["surest"] - pair["mean"]),
            "p": stats.ttest_rel(pair["surest"], pair["mean"]).pvalue,
        }
    )
table = pd.DataFrame(rows)
print(table.to_string(index=False))
table.to_latex("table.tex", index=False)

figure, axes = plt.subplots()
for (alpha, method), group in runs.groupby(["alpha", "method"]):
    axes.plot(100 * np.mean(group["accuracies"].tolist(), axis=0), label=f"{method}, {alpha}")
axes.set(xlabel="round", ylabel="mean client accuracy, %")
axes.legend()
figure.savefig("curves.pdf")
