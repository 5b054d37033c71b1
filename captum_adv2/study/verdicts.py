# SPDX-License-Identifier: MIT
"""Verdicts as tables: every criterion with the paper's number beside it, and all at a glance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pandas as pd

from captum_adv2.study.claims import Answer, Check, Verdict, judge
from captum_adv2.study.estimates import Evidence
from captum_adv2.study.paper import PAPER, counterpart

_PAPER_WORDS = {"too few images": "too few digits", None: "no numbers printed"}


class Glance(NamedTuple):
    """An observation in a line: its answer for each classifier, and for the paper's own tables."""

    number: int
    text: str
    models: Sequence[tuple[Answer | None, str]]  # with what was not measured, in words
    paper: str


def word(answer: Answer | None) -> str:
    """Return an answer in words."""
    return answer or "not measured"


def on_paper(answer: Answer | None) -> str:
    """Return an answer of a rule on the paper's tables in words."""
    return _PAPER_WORDS.get(answer) or str(answer)


def glance(verdicts: Sequence[Verdict]) -> list[Glance]:
    """Return the nine observations, a line each."""
    return [
        Glance(ours.number, ours.claim.text, _answers(ours), on_paper(theirs.answer))
        for ours, theirs in zip(verdicts, judge(PAPER), strict=True)
    ]


def _answers(verdict: Verdict) -> list[tuple[Answer | None, str]]:
    """Return each classifier's answer, and what it is without."""
    lists = {model: " and ".join(verdict.without(model)) for model in verdict.models}
    return [(a, f", without {lists[m]}" * bool(lists[m])) for m, a in verdict.models.items()]


def criteria(verdict: Verdict, skin: bool) -> pd.DataFrame:
    """Return the criteria of a verdict as texts, the paper's numbers beside; failures first."""
    theirs = judge(PAPER)[verdict.number - 1]
    order = ["does not hold", "too few images", "holds", None]
    rows = []
    for model, checks in verdict.checks.items():
        printed = _by_key(theirs.checks[counterpart(model, skin)])
        for check in sorted(checks, key=lambda each: order.index(each.answer)):
            paper = printed.get((check.subject, check.quantity))
            row = {"classifier": model} | _row(check)
            rows.append(row | {"paper": "–" if paper is None else str(paper.found)})
    return pd.DataFrame(rows)


def summary(verdicts: Sequence[Verdict], skin: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the answers for each classifier, and the criteria that are not met, as texts."""
    answers = [
        {
            "observation": f"{line.number}. {line.text}",
            **dict(zip(verdict.models, (word(a) + rest for a, rest in line.models), strict=True)),
            "the paper's tables": line.paper,
        }
        for line, verdict in zip(glance(verdicts), verdicts, strict=True)
    ]
    rows = [criteria(each, skin).assign(observation=str(each.number)) for each in verdicts]
    every = pd.concat([table for table in rows if len(table)] or [pd.DataFrame(columns=["answer"])])
    return pd.DataFrame(answers), every[every.answer.isin(["does not hold", "too few images"])]


def _by_key(checks: Sequence[Check]) -> dict[tuple[str, str], Check]:
    return {(each.subject, each.quantity): each for each in checks if each.answer is not None}


def _row(check: Check) -> dict[str, str]:
    return {
        "of": check.subject,
        "what": check.quantity,
        "here": str(check.found),
        "rule": check.wanted,
        "answer": word(check.answer) if check.decides else f"({word(check.answer)})",
    }


def shares(evidence: Evidence, skin: bool) -> pd.DataFrame:
    """Return L1 to the benign map after ADV2 and after PGD, ours and the paper's."""
    rows = []
    for name in evidence.interpreters:
        row = {"interpreter": name}
        for model in evidence.models:
            row[model] = _pair(evidence, model, name)
        for model in dict.fromkeys(counterpart(each, skin) for each in evidence.models):
            row[f"paper, {model}"] = _pair(PAPER, model, name)
        rows.append(row)
    return pd.DataFrame(rows)


def _pair(evidence: Evidence, model: str, name: str) -> str:
    ours, theirs = (evidence.estimate("L1", model, attack, name) for attack in ("ADV2", "PGD"))
    if not (ours.size and theirs.size and theirs.mean > 0):
        return "–"
    digits = 2 if evidence is PAPER else 3
    share = f"{100 * ours.mean / theirs.mean:.0f} %"
    return f"{ours.mean:.{digits}f}, {theirs.mean:.{digits}f} ({share})"


def paper_rows() -> Iterator[dict[str, str]]:
    """Yield all criteria on the paper's tables."""
    for verdict in judge(PAPER):
        known = [(m, c) for m, checks in verdict.checks.items() for c in checks if c.answer]
        for model, check in known:
            answer = on_paper(check.answer)
            row = {"observation": str(verdict.number), "classifier": model} | _row(check)
            yield row | {"answer": answer if check.decides else f"({answer})"}


def rules() -> str:
    """Return the rule of every observation, and what it makes of the paper's tables, as text."""
    table = pd.DataFrame(paper_rows())
    lines = []
    for verdict in judge(PAPER):
        lines += [f"{verdict.number}. {verdict.claim.text}", f"   Rule: {verdict.claim.rule}"]
        lines += [f"   On the paper's own tables: {on_paper(verdict.answer)}.", ""]
        own = table[table.observation == str(verdict.number)].drop(columns="observation")
        if len(own):
            text = own.rename(columns={"here": "printed"}).to_string(index=False)
            lines += [*(f"   {line}" for line in text.splitlines()), ""]
    return "\n".join(lines)
