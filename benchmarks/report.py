"""The result document as text: tables and bars, the same on the screen and in RESULTS.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.names import communicates, formula_sent_bytes, stage_of
from benchmarks.stats import Contestant, Spread, peak_rss_bytes, ran, ratio, steps

SPREAD_COLUMNS = ["q1–q3", "min"]
RATIO_COLUMNS = ["wall/fsdp2", "CPU/fsdp2", "wall/ddp", "CPU/ddp"]
TIME_COLUMNS = ["contestant", "wall ms", *SPREAD_COLUMNS, "CPU ms", *SPREAD_COLUMNS, "sys", *RATIO_COLUMNS]
MEMORY_COLUMNS = ["peak RSS MB", "at start", "buffers MB", "by formula"]
TRAFFIC_COLUMNS = ["wire MB/step", "sent MB/step", "by formula", "sent/formula", "waiting", "calls"]
BYTE_COLUMNS = ["contestant", *MEMORY_COLUMNS, *TRAFFIC_COLUMNS, "faults/step", "last loss"]
NOISY = 0.1
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
Run = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """``ours`` may need at most ``limit`` times what ``peer`` needs; without a limit it is only told."""

    ours: str
    peer: str
    limit: float | None


BARS = (
    Bar("stage3", "ddp", 1.00),
    Bar("stage3", "ddp-fused", None),
    Bar("stage3", "fsdp2", 0.82),
    Bar("stage3", "fsdp2-fused", None),
    Bar("stage3", "deepspeed3", 0.70),
    Bar("stage3", "deepspeed3-tuned", 0.70),
    Bar("stage2", "deepspeed2", 0.78),
    Bar("stage1", "deepspeed1", 0.78),
    Bar("stage1", "ddp-zero", 0.95),
    Bar("stage0", "ddp", 0.97),
    Bar("stage0", "ddp-fused", None),
    Bar("stage3-alone", "plain-fused", 1.02),
    Bar("stage3", "plain-x2", None),
    Bar("plain-x2", "deepspeed1", None),
    Bar("plain-x2", "deepspeed2", None),
    Bar("plain-x2", "deepspeed3", None),
    Bar("plain-x2", "deepspeed3-tuned", None),
)

RIVALS_IN_MEMORY = (
    ("stage3", "fsdp2"),
    ("stage3", "deepspeed3"),
    ("stage3", "deepspeed3-tuned"),
    ("stage2", "deepspeed2"),
    ("stage1", "deepspeed1"),
)


def document(result: dict[str, Any]) -> str:
    """The whole text of one result."""
    parts = [_heading(result)]
    for dtype, run in result["runs"].items():
        parts += [
            f"### {dtype}",
            _times(run),
            _bytes(run, dtype, result),
            _bars(run, dtype),
            _quality(run, result),
        ]
    return "\n\n".join(part for part in parts if part)


def _heading(result: dict[str, Any]) -> str:
    machine, config = result["machine"], result["config"]
    model = config["model"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}, torch {machine['torch']}, {machine['date']}, load before {machine['load']:.2f}"
        + (f", malloc {machine['malloc']}" if machine["malloc"] else "")
        + f".\nGPT {model['layers']} layers, d={model['dim']}, {model['heads']} heads, seq {model['seq']}, "
        f"vocab {model['vocab']}, batch {model['batch']} per rank; {config['ranks']} ranks, one thread each, "
        f"gloo on loopback; {config['rounds']} rounds of {config['steps']} steps, seed {config['seed']}."
    )


def _times(run: Run) -> str:
    """Milliseconds of a step: wall of the slowest rank, CPU as the mean of the ranks."""
    everyone = run["contestants"]
    rows = [TIME_COLUMNS]
    for name, contestant in everyone.items():
        if not ran(contestant):
            rows.append([name, f"n/a: {contestant.get('failed', 'no round')}"])
            continue
        wall, cpu = (Spread.of(1e3 * s for s in steps(contestant, key)) for key in ("wall_s", "cpu_s"))
        system = sum(steps(contestant, "sys_s")) / max(sum(steps(contestant, "cpu_s")), 1e-9)
        versus = [_ratio_cell(contestant, everyone.get(peer), key) for peer in ("fsdp2", "ddp")
                  for key in ("wall_s", "cpu_s")]  # fmt: skip
        rows.append([name, *_spread_cells(wall), *_spread_cells(cpu), f"{system:.0%}", *versus])
    return _table(rows)


def _spread_cells(spread: Spread) -> list[str]:
    return [f"{spread.median:.1f}", f"{spread.q1:.1f}–{spread.q3:.1f}", f"{spread.low:.1f}"]


def _ratio_cell(contestant: Contestant, peer: Contestant | None, key: str) -> str:
    if peer is None or not ran(peer):
        return ""
    spread = ratio(contestant, peer, key)
    return f"{spread.median:.3f} [{spread.q1:.3f}–{spread.q3:.3f}]"


def _bytes(run: Run, dtype: str, result: dict[str, Any]) -> str:
    """Memory, traffic and page faults; our own counters beside their formulas."""
    ranks = result["config"]["ranks"]
    rows = [BYTE_COLUMNS]
    for name, contestant in run["contestants"].items():
        if ran(contestant):
            rows.append([name, *_byte_cells(name, contestant, dtype, ranks)])
    return _table(rows)


def _byte_cells(name: str, contestant: Contestant, dtype: str, ranks: int) -> list[str]:
    memory = contestant["memory"][0]
    wire = Spread.of(turn["wire_bytes"] for turn in contestant["rounds"]).median
    sent = _median(steps(contestant, "sent_bytes"))
    formula = formula_sent_bytes(name, dtype, contestant["params_numel"], ranks)
    return [
        f"{peak_rss_bytes(contestant) / 1e6:.0f}",
        f"{memory['rss_base_bytes'] / 1e6:.0f}",
        _megabytes(memory.get("bytes_peak")),
        _megabytes(memory.get("bytes_formula")),
        _megabytes(wire) if communicates(name) else "",
        _megabytes(sent),
        _megabytes(formula),
        f"{sent / formula:.3f}" if sent is not None and formula else "",
        _waiting(contestant),
        _number(_median(steps(contestant, "calls"))),
        _number(_median(steps(contestant, "faults"))),
        f"{steps(contestant, 'loss')[-1]:.5f}",
    ]


def _median(values: list[float]) -> float | None:
    return Spread.of(values).median if values else None


def _megabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _waiting(contestant: Contestant) -> str:
    """The share of a step's wall time in which a rank waits for collectives."""
    waits = steps(contestant, "wait_s")
    if not waits:
        return ""
    return f"{sum(waits) / sum(steps(contestant, 'wall_s')):.1%}"


def _bars(run: Run, dtype: str) -> str:
    lines = [line for bar in BARS for line in _bar_lines(bar, run["contestants"], dtype)]
    lines += _memory_lines(run["contestants"], dtype) + _loss_lines(run["contestants"], dtype)
    return "\n".join(f"- {line}" for line in lines)


def _bar_lines(bar: Bar, everyone: dict[str, Contestant], dtype: str) -> list[str]:
    """One line a bar, wall and CPU each with its own verdict."""
    ours, peer = everyone.get(bar.ours), everyone.get(bar.peer)
    title = f"{dtype} {bar.ours} / {bar.peer}"
    if ours is None or peer is None:
        return []
    if not ran(ours) or not ran(peer):
        return [f"{title}: not measured"]
    verdicts = [f"{label} {_verdict(ratio(ours, peer, key), bar.limit)}"
                for label, key in (("wall", "wall_s"), ("CPU", "cpu_s"))]  # fmt: skip
    limit = f" (bar {bar.limit:.2f})" if bar.limit is not None else " (no bar, told for honesty)"
    return [f"{title}{limit}: {'; '.join(verdicts)}"]


def _verdict(spread: Spread, limit: float | None) -> str:
    text = f"{spread.median:.3f} [{spread.q1:.3f}–{spread.q3:.3f}]"
    if limit is None:
        return text
    verdict = "met" if spread.median <= limit else "missed"
    return f"{text} {verdict}" + (", but the quartiles straddle the bar" if spread.q1 <= limit < spread.q3 else "")


def _memory_lines(everyone: dict[str, Contestant], dtype: str) -> list[str]:
    """Peak RSS against FSDP2, and our own buffers against the formula."""
    lines = []
    for name, rival in RIVALS_IN_MEMORY:
        ours, peer = everyone.get(name), everyone.get(rival)
        if ran(ours) and ran(peer):
            share = peak_rss_bytes(everyone[name]) / peak_rss_bytes(everyone[rival])
            verdict = "met" if share <= 1 else "missed"
            lines.append(f"{dtype} {name} / {rival}, peak RSS (bar 1.00): {share:.3f} {verdict}")
    for name, contestant in everyone.items():
        if stage_of(name) is not None and ran(contestant):
            lines.append(f"{dtype} {name}, bytes of its own buffers: {_formula_verdict(contestant['memory'])}")
    return lines


def _formula_verdict(ranks: list[dict[str, Any]]) -> str:
    """Peak and formula must agree to the byte on every rank."""
    for rank, memory in enumerate(ranks):
        peak, formula = memory.get("bytes_peak"), memory.get("bytes_formula")
        if peak is None or formula is None:
            return "the engine does not tell them"
        if peak != formula:
            return f"on rank {rank} the peak is {peak}, by formula {formula}: missed"
    return "peak equals formula on every rank: met"


def _loss_lines(everyone: dict[str, Contestant], dtype: str) -> list[str]:
    """All that reduce gradients must have trained the same model, or the race is void."""
    reference = everyone.get("ddp")
    if reference is None or not ran(reference):
        return []
    expected = steps(reference, "loss")[-1]
    lines = []
    for name, contestant in everyone.items():
        if communicates(name) and ran(contestant):
            got = steps(contestant, "loss")[-1]
            if not abs(got - expected) <= LOSS_TOLERANCE[dtype] * abs(expected):
                lines.append(f"{dtype} {name}: last loss {got:.5f}, but ddp's is {expected:.5f}: not the same training")
    return lines


def _quality(run: Run, result: dict[str, Any]) -> str:
    """How quiet the machine was: everything that was busy and was not the contestant at work."""
    quality = run["quality"]
    capacity_s = max(quality["wall_s"] * result["machine"]["cores"], 1e-9)
    turns = [turn for contestant in run["contestants"].values() for turn in contestant.get("rounds", [])]
    foreign_s = sum(turn["foreign_cpu_s"] for turn in turns)
    noisy = foreign_s + quality["steal_s"] > NOISY * capacity_s
    return (
        f"The rounds took {quality['wall_s']:.0f} s. Of the machine's CPU time, others took "
        f"{foreign_s / capacity_s:.1%} (in part the kernel, for loopback traffic), "
        f"the hypervisor {quality['steal_s'] / capacity_s:.1%}."
        + (" The machine was not quiet: trust ratios, not milliseconds." if noisy else "")
    )


def _table(rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned for the eye; a short row leaves the rest empty."""
    columns = max(len(row) for row in rows)
    full = [row + [""] * (columns - len(row)) for row in rows]
    measured = [row for row in full if any(row[2:])]
    widths = [max(len(row[i]) for row in measured) for i in range(columns)]
    lines = [_line(row, widths) for row in full]
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    return "\n".join([lines[0], _line(rule, widths), *lines[1:]])


def _line(row: list[str], widths: list[int]) -> str:
    cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
    return f"| {' | '.join(cells)} |"
