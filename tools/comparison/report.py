"""The table and the plot."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

__all__ = ["paired", "write_report"]

_OURS = "prunegate"
_PEERS = ("torch-pruning", "kirigami")


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, int]:
    """Mean of the differences over common seeds, its standard error (nan for one seed), and the number of seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if not differences:
        return float("nan"), float("nan"), 0
    error = statistics.stdev(differences) / len(seeds) ** 0.5 if len(seeds) > 1 else float("nan")
    return statistics.mean(differences), error, len(seeds)


def _difference(mean: float, error: float, seeds: int) -> str:
    """As text; one seed has no error."""
    return f"{mean:+.2f} ± {error:.2f}" if seeds > 1 else f"{mean:+.2f}"


def best_peer(found: dict[str, dict[int, float]]) -> str | None:
    """The other library's method of greatest mean over the seeds that PruneGate has too; ``None`` without any.

    Args:
        found: Accuracies of one network at one budget, by method and seed. Methods with fewer seeds than others are
            left out, for a lucky seed makes no best method.
    """
    seeds = found.get(_OURS, {}).keys()
    common = {method: seeds & of_seed.keys() for method, of_seed in found.items()
              if method.startswith(_PEERS) and " + " not in method}  # fmt: skip
    most = max(map(len, common.values()), default=0)
    means = {method: statistics.mean(found[method][seed] for seed in own)
             for method, own in common.items() if own and len(own) == most}  # fmt: skip
    return max(means, key=lambda method: means[method]) if means else None


def write_report(rows: list[dict[str, Any]], tested: dict[str, float], output: Path, recipe: dict[str, Any]) -> None:
    """Writes table.md and accuracy.png.

    Args:
        rows: What has been measured.
        tested: Test accuracy by file name; empty before the test file was read, then validation is shown.
        output: Folder.
        recipe: What was equal for all, for the caption.
    """
    values: dict[tuple[str, float], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    shares: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    befores: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    failed: dict[tuple[str, str], str] = {}
    for row in rows:
        if "error" in row:
            failed[row["network"], row["method"]] = row["error"]
            continue
        name = "-".join(str(row[key]).replace(" ", "_") for key in ("network", "budget", "method", "seed")) + ".pt"
        value = tested.get(name, float("nan")) if tested else row["validation"]
        values[row["network"], row["budget"]][row["method"]][row["seed"]] = value
        shares[row["network"], row["budget"], row["method"]].append(row["share"])
        if "before" in row:
            befores[row["network"], row["budget"], row["method"]].append(row["before"])
    what = "test" if tested else "validation"
    lines = [f"Top-1 in per cent ({what}), mean over seeds; {', '.join(f'{k} {v}' for k, v in recipe.items())}.",
             "Before: validation right after the cut; for PruneGate the weights have been through the search.", ""]
    lines += _summary(values)
    for network in dict.fromkeys(network for network, _ in values):
        dense = values[network, 1.0].get("dense", {})
        longer = [row["longer"] - row["validation"] for row in rows if row["network"] == network and "longer" in row]
        gain = statistics.mean(longer) if longer else float("nan")
        lines += [f"### {network}", ""]
        if dense:
            lines += [f"Dense: {statistics.mean(dense.values()):.2f} ({len(dense)} seeds); "
                      f"as many steps more: {gain:+.2f} (validation).", ""]  # fmt: skip
        lines += ["| FLOPs | method | kept | before | top-1 | seeds | PruneGate minus this |", "|---" * 7 + "|"]
        for budget in sorted({b for n, b in values if n == network and b < 1}, reverse=True):
            found = values[network, budget]
            for method in sorted(found, key=lambda m: -statistics.mean(found[m].values())):
                reference = _OURS + method[method.index(" + ") :] if " + " in method else _OURS
                mean, error, seeds = paired(found.get(reference, {}), found[method])
                against = "" if method == reference or not seeds else f"{_difference(mean, error, seeds)} ({seeds})"
                share = statistics.mean(shares[network, budget, method])
                shown = f"**{method}**" if method.startswith(_OURS) else method
                before = statistics.mean(befores[network, budget, method])
                top1 = statistics.mean(found[method].values())
                lines.append(f"| {budget} | {shown} | {share:.3f} | {before:.1f} | {top1:.2f} | {len(found[method])} "
                             f"| {against} |")  # fmt: skip
        lines.append("")
    if failed:
        lines += ["What could not be done:", ""]
        lines += [f"- {network}, {method}: {error}" for (network, method), error in failed.items()]
        lines.append("")
    (output / "table.md").write_text("\n".join(lines))
    _plot(values, output / "accuracy.png", what)


def _summary(values: dict[tuple[str, float], dict[str, dict[int, float]]]) -> list[str]:
    """One line a cell: how far PruneGate is from the best method of another library."""
    lines = ["| network | FLOPs | PruneGate | best other library | its mean | difference | seeds | |", "|---" * 8 + "|"]
    networks = list(dict.fromkeys(network for network, _ in values))
    for network, budget in sorted(values, key=lambda key: (networks.index(key[0]), -key[1])):
        found = values[network, budget]
        peer = best_peer(found)
        if budget == 1 or peer is None:
            continue
        mean, error, seeds = paired(found[_OURS], found[peer])
        common = found[_OURS].keys() & found[peer].keys()
        ours, theirs = (statistics.mean(found[method][seed] for seed in common) for method in (_OURS, peer))
        verdict = "ahead" if mean > 2 * error else "behind" if mean < -2 * error else "no difference shown"
        verdict = verdict if seeds > 1 else "one seed"
        difference = _difference(mean, error, seeds)
        cells = (network, budget, f"{ours:.2f}", peer, f"{theirs:.2f}", difference, seeds, verdict)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, "", "Ahead and behind: by more than two standard errors.", ""] if len(lines) > 2 else []


def _plot(values: dict[tuple[str, float], dict[str, dict[int, float]]], path: Path, what: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = list(dict.fromkeys(network for network, _ in values))
    if not networks:
        return
    figure, axes = pyplot.subplots(1, len(networks), figsize=(4.2 * len(networks), 3.6), squeeze=False)
    for axis, network in zip(axes[0], networks, strict=True):
        curves: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for (name, budget), found in values.items():
            if name != network or budget == 1:
                continue
            for method, of_seed in found.items():
                points = list(of_seed.values())
                error = statistics.stdev(points) / len(points) ** 0.5 if len(points) > 1 else 0.0
                curves[method].append((budget, statistics.mean(points), 2 * error))
        for method, points_of in curves.items():
            x, y, e = zip(*sorted(points_of), strict=True)
            ours = method.startswith(_OURS)
            axis.errorbar(x, y, e, label=method, capsize=2, linewidth=2.2 if ours else 1, zorder=3 if ours else 2)
        axis.set(title=network, xlabel="share of FLOPs", ylabel=f"top-1, % ({what})")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
