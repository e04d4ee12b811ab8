"""The levels section: the 16 values of int4, FP4, NF4 and IQ4 over this model's weights."""

from __future__ import annotations

from itertools import pairwise

from ggtool.report.compare import are_kld_apart, kld, kld_error
from ggtool.report.document import (
    Block,
    Cell,
    Column,
    Figure,
    Paragraph,
    Section,
    Table,
)
from ggtool.report.drawing import INK, SHADE, Drawing, new_drawing
from ggtool.report.numbers import digits, percent, with_error
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts, LevelSet, WeightFacts

_TITLE = "Linear levels against NF4"
_HOW = (
    "The model's weights were not looked at. `ggtool report RESULTS --model M` draws their distribution with the levels of "
    "linear int4, FP4, NF4 and IQ4 over it, and measures what rounding to each does to them."
)
_COLUMNS = (
    Column("levels", kind="text"),
    Column(
        "error, absmax %",
        "squared error over the weights' power, the largest of 64 weights on the table's end",
    ),
    Column("error, searched %", "the same with the searched scale of a scratch-* format, 32 weights a scale"),
    Column("code bits", "entropy of the codes: 4 when all 16 are used equally often"),
)
# Pairs that differ in their levels alone.
_PAIRS = (("scratch-int4", "scratch-nf4"), ("scratch-int4", "scratch-iq4"), ("bnb-fp4", "bnb-nf4"))


def section(subject: Subject, facts: Facts) -> Section:
    """Return the distribution of weights with each table's levels, and the errors in weights and predictions."""
    weights = facts.weights
    blocks: list[Block] = []
    if weights is None:
        blocks.append(Paragraph(_HOW))
    else:
        blocks += [
            Paragraph(_explanation(weights)),
            Figure(
                "levels",
                _draw(weights),
                f"Density of {weights.n_weights:,} weights of {weights.n_matrices} matrices, each divided by the largest "
                "absolute one of its 64, and the 16 values that a weight may become.",
            ),
            Table("levels", _COLUMNS, tuple(_row(levels) for levels in weights.levels)),
        ]
    blocks.append(Paragraph(_measured(subject)))
    return Section("levels", _TITLE, tuple(blocks))


def _explanation(weights: WeightFacts) -> str:
    sets = {levels.name: levels for levels in weights.levels}
    even, normal = sets["linear int4"], sets["NF4"]
    said = (
        "Four bits name 16 values. Linear int4 spaces them evenly; NF4 puts them at quantiles of the normal distribution, "
        "close together around zero, where trained weights are most often, so that each is used about equally often; FP4 "
        "has the steps of a small float, IQ4 those of llama.cpp's IQ4_NL. "
        f"On the weights of {weights.model}, codes carry {digits(even.code_bits)} bits with even steps and "
        f"{digits(normal.code_bits)} with NF4's. "
    )
    change = 1 - normal.absmax_error / even.absmax_error
    said += (
        f"With the largest weight of each 64 on the table's end, as bitsandbytes does it, NF4 leaves a squared error of "
        f"{percent(normal.absmax_error)} of the weights' power where even steps leave {percent(even.absmax_error)}: "
        f"{percent(abs(change))} {'less' if change > 0 else 'more'}."
    )
    best = min(weights.levels, key=lambda levels: levels.searched_error)
    change = 1 - normal.searched_error / even.searched_error
    return (
        f"{said} A searched scale narrows the gap to {percent(abs(change))} {'less' if change > 0 else 'more'}; then "
        f"{best.name} is best with {percent(best.searched_error)}."
    )


def _measured(subject: Subject) -> str:
    """Compare predictions of each pair of formats that differ in their levels alone."""
    sentences = []
    for even, other in _PAIRS:
        a, b = subject.find(even), subject.find(other)
        if a is None or b is None or not (a.divergence and b.divergence):
            continue
        numbers = f"{with_error(kld(a), kld_error(a))} nats with `{even}`, {with_error(kld(b), kld_error(b))} with `{other}`"
        if are_kld_apart(a, b):
            nearer, farther = (b, a) if kld(b) < kld(a) else (a, b)
            factor = digits(kld(farther) / kld(nearer), 2)
            sentences.append(
                f"Divergence from the reference: {numbers}; `{nearer.label}` is {factor} times nearer."
            )
        else:
            sentences.append(f"Divergence from the reference: {numbers}; the errors do not tell them apart.")
    linear = subject.find("scratch-int8")
    normal = subject.find("scratch-nf4") or subject.find("bnb-nf4")
    # With its head in float, bitsandbytes' model can take more bits than one in int8 throughout.
    if linear and normal and linear.divergence and normal.divergence and normal.bpw < linear.bpw:
        sentences.append(
            f"Linear levels with twice the bits are another trade: `scratch-int8` has 256 even steps and a divergence of "
            f"{with_error(kld(linear), kld_error(linear))} nats in {digits(linear.bpw)} bits per weight of the whole model, "
            f"`{normal.label}` {with_error(kld(normal), kld_error(normal))} in {digits(normal.bpw)}."
        )
    if sentences:
        return " ".join(sentences)
    command = subject.sweep_command("scratch-int4,scratch-nf4,bnb-fp4,bnb-nf4")
    return f"No two formats were measured that differ in their levels alone; `{command}` measures them."


def _row(levels: LevelSet) -> tuple[Cell, ...]:
    return (
        Cell(levels.name),
        Cell(digits(100 * levels.absmax_error), levels.absmax_error),
        Cell(digits(100 * levels.searched_error), levels.searched_error),
        Cell(digits(levels.code_bits), levels.code_bits),
    )


def _draw(weights: WeightFacts) -> Drawing:
    alt = "The distribution of the weights with the sixteen levels of four tables drawn over it"
    drawing, axes = new_drawing(alt, 5.2, rows=len(weights.levels), sharex=True)
    middles = [(low + high) / 2 for low, high in pairwise(weights.edges)]
    for ax, levels in zip(axes, weights.levels, strict=True):
        ax.fill_between(middles, weights.density, step="mid", color=SHADE, alpha=0.35, linewidth=0)
        for value in levels.values:
            ax.axvline(
                value,
                ymax=0.92,
                color=INK,
                linewidth=1.1,
                gid=drawing.mark("", f"{levels.name}: {value:.4f}"),
            )
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.set_title(levels.name, loc="left", fontsize=9, pad=2)
    axes[-1].set_xlabel("weight / largest absolute weight of its 64")
    axes[-1].set_xlim(-1.05, 1.05)
    return drawing
