"""What a benchmark's measurements come to: medians, ratios, and the table that is printed."""

import re
import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# Dense bf16/fp16 peak in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12,
}  # fmt: skip


def summarise(results: dict[str, list[dict[str, Any]]], scoring: dict[str, Any] | None) -> dict[str, Any]:
    """Medians over repeats, and ratios as medians of each repeat's ratio, so that slow spells cancel.

    Args:
        results: of `stock`, `stock_tuned` and `ours` each repeat's `benchmark_worker.measure_training`; an
            empty list for a stock trainer that ran out of memory.
        scoring: `benchmark_worker.measure_scoring`, None if that ran out of memory.

    Returns:
        the figures of `benchmark.json`. What has no measurement, and every ratio to it, is None. The
        tuned ratio is to the better of stock's two batches.
    """
    content: dict[str, Any] = {name: _medians(repeats) for name, repeats in results.items()}
    speeds = {name: [speed(result) for result in repeats] for name, repeats in results.items()}
    memory = {name: [result["peak_memory_bytes"] for result in repeats] for name, repeats in results.items()}
    stocks = [each for each in (speeds["stock"], speeds["stock_tuned"]) if each]
    best = [max(each) for each in zip(*stocks, strict=True)] if speeds["stock_tuned"] else []
    content["ratio"] = {
        "comparisons_per_s": _ratio(speeds["ours"], speeds["stock"]),
        "peak_memory": _ratio(memory["ours"], memory["stock"]),
        "tuned_comparisons_per_s": _ratio(speeds["ours"], best),
        "tuned_peak_memory": _ratio(memory["ours"], memory["stock_tuned"]),
        "scoring": _ratio(scoring["ours"], scoring["plain"]) if scoring else None,
    }
    differences = []
    if stocks:
        stock = (results["stock"] or results["stock_tuned"])[0]  # the same samples at either batch
        differences = [abs(a - b) for a, b in zip(stock["losses"], results["ours"][0]["losses"], strict=True)]
    content["max_loss_difference"] = max(differences, default=None)
    content["first_loss_difference"] = differences[0] if differences else None
    content["scoring"] = scoring and {
        "plain_conversations_per_s": statistics.median(scoring["plain"]),
        "conversations_per_s": statistics.median(scoring["ours"]),
        "max_reward_difference": scoring["max_reward_difference"],
        "comparisons": scoring["comparisons"],
    }
    return content


def speed(result: dict[str, Any]) -> float:
    """Comparisons a second of one measurement."""
    return float(result["comparisons"] / result["seconds"])


def _ratio(top: list[float], bottom: list[float]) -> float | None:
    if not bottom:
        return None
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


def _medians(repeats: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not repeats:
        return None
    first = repeats[0]
    tokens_per_s = statistics.median(result["tokens"] / result["seconds"] for result in repeats)
    return {
        "comparisons_per_s": statistics.median(map(speed, repeats)),
        "comparisons_per_s_each": [speed(result) for result in repeats],
        "tokens_per_s": tokens_per_s,
        "padding_share": first["padding"] / (first["padding"] + first["tokens"]),
        "peak_memory_bytes": round(statistics.median(result["peak_memory_bytes"] for result in repeats)),
        "model_flop_utilisation": utilisation(tokens_per_s * first["flop_per_token"]),
        "losses": first["losses"],
    }


def utilisation(flop_per_s: float) -> float | None:
    """Model FLOP/s over the GPU's peak in half precision; None without a known GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
    return flop_per_s / peak if peak else None


def print_benchmark(content: dict[str, Any], console: Console | None = None) -> None:
    """The figures as a table of 80 columns, and the ratios in words.

    Args:
        content: what `benchmark.json` holds.
    """
    table = Table(title="Training", title_justify="left")
    table.add_column("trainer")
    for heading in ("comparisons/s", "tokens/s", "padding", "peak memory", "MFU"):
        table.add_column(heading, justify="right", no_wrap=True)
    tuned = content["setting"]["stock_batch"]
    names = {"stock": "stock TRL", "stock_tuned": f"stock, batch {tuned}", "ours": "rm_recipe"}
    for key, name in names.items():
        table.add_row(name, *_cells(content[key]))
    console = console or Console()
    console.print(table)
    for sentence in _sentences(content):
        console.print(sentence, highlight=False)


def _cells(figures: dict[str, Any] | None) -> list[str]:
    if figures is None:
        return ["out of memory"]
    share = figures["model_flop_utilisation"]
    return [
        f"{figures['comparisons_per_s']:.2f}",
        f"{figures['tokens_per_s']:.0f}",
        f"{figures['padding_share']:.0%}",
        f"{figures['peak_memory_bytes'] / 1e9:.2f} GB",
        "-" if share is None else f"{share:.0%}",
    ]


def _sentences(content: dict[str, Any]) -> list[str]:
    ratio, scoring, ours = content["ratio"], content["scoring"], content["ours"]
    sentences = ["Tokens without padding."]
    stock = content["stock"] or content["stock_tuned"]
    if stock:
        fewer = _tokens_per_comparison(ours) / _tokens_per_comparison(stock)
        sentences = [f"Tokens without padding; rm_recipe computes {fewer:.2f} of stock TRL's."]
    if ratio["comparisons_per_s"]:
        sentences.append(
            f"{ratio['comparisons_per_s']:.2f} times stock TRL's speed at {ratio['peak_memory']:.2f} of its "
            "memory."
        )
    if ratio["tuned_comparisons_per_s"]:
        sentences.append(
            f"{ratio['tuned_comparisons_per_s']:.2f} times stock TRL at its best batch, at "
            f"{ratio['tuned_peak_memory']:.2f} of the memory of batch {content['setting']['stock_batch']}."
        )
    if stock:
        sentences.append(
            f"Losses differ by {content['first_loss_difference']:.1e} in the first step and by at most "
            f"{content['max_loss_difference']:.1e} in {len(ours['losses'])}."
        )
    if scoring is None:
        return [*sentences, "Scoring: the padded loop ran out of memory."]
    sentences.append(
        f"Scoring: {scoring['conversations_per_s']:.1f} conversations/s, {ratio['scoring']:.2f} times a "
        f"loop over padded batches in the data's order ({scoring['plain_conversations_per_s']:.1f}); rewards "
        f"differ by at most {scoring['max_reward_difference']:.1e}."
    )
    return sentences


def _tokens_per_comparison(figures: dict[str, Any]) -> float:
    return float(figures["tokens_per_s"] / figures["comparisons_per_s"])
