"""What the answers of a blind study say: counts, an exact test, an interval."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmd.fields import read_json
from training.evaluate.shared.intervals import binomial
from training.evaluate.study.page import SIDES

_COLUMNS = ("study", "reader", "trial", "choice")
TIE = "tie"


@dataclass(frozen=True)
class Answer:
    """One reader's choice in one trial: "first", "second" or "tie", and the side that was chosen, if one was."""

    reader: str
    trial: int
    choice: str
    side: str | None


def read_key(path: Path) -> dict[str, Any]:
    """The key of a study.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --key takes the key.json that rmd study wrote")
    key = read_json(path)
    if not isinstance(key, dict) or not {"study", "first", "second", "trials"} <= key.keys():
        raise ValueError(f"{path} is no key of a study; --key takes the key.json that rmd study wrote")
    return key


def read_answers(files: Sequence[Path], key: Mapping[str, Any]) -> list[Answer]:
    """The answers in the files that readers saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another study, without a column, with an unknown trial or choice, or with a reader's
            second answer to one trial.
    """
    sides = {trial["trial"]: {side: trial[side] for side in SIDES} for trial in key["trials"]}
    answers: dict[tuple[str, int], Answer] = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give the CSV files that the page saved")
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
                raise ValueError(f"{path} has no column {missing[0]!r}: give the CSV files that the page saved")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if row["study"] != key["study"]:
                    raise ValueError(f"{where} is of study {row['study']}, the key of {key['study']}")
                trial = int(row["trial"]) if row["trial"].isdecimal() else 0
                if trial not in sides:
                    raise ValueError(f"{where}: there is no trial {row['trial']!r}")
                if row["choice"] not in (*SIDES, TIE):
                    raise ValueError(f"{where}: the choice {row['choice']!r} is not left, right or tie")
                if (row["reader"], trial) in answers:
                    raise ValueError(f"{where}: {row['reader']!r} has answered trial {trial} before")
                side = None if row["choice"] == TIE else row["choice"]
                choice = TIE if side is None else sides[trial][side]
                answers[row["reader"], trial] = Answer(row["reader"], trial, choice, side)
    return list(answers.values())


def study_report(answers: Sequence[Answer], key: Mapping[str, Any]) -> dict[str, Any]:
    """Counts and tests.

    `answers` pools all answers, as if each were independent; `trials` gives each pair of pictures one vote, its
    readers' majority, and is the one to trust where several readers saw the same pairs. Ties are left out of a share.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("there are no answers")
    votes: dict[int, Counter[str]] = {}
    for answer in answers:
        votes.setdefault(answer.trial, Counter())[answer.choice] += 1
    majorities = Counter(
        TIE if count["first"] == count["second"] else max(("first", "second"), key=count.__getitem__)
        for count in votes.values()
    )
    by_reader: dict[str, Counter[str]] = {}
    for answer in answers:
        by_reader.setdefault(answer.reader, Counter())[answer.choice] += 1
    sided = Counter(answer.side for answer in answers if answer.side is not None)
    return {
        "study": key["study"],
        "first": key["first"]["name"],
        "second": key["second"]["name"],
        "answers": _tested(Counter(answer.choice for answer in answers)),
        "trials": {**_tested(majorities), "unanswered": len(key["trials"]) - len(votes)},
        "readers": {reader: _counts(count) for reader, count in by_reader.items()},
        "sides": {side: sided[side] for side in SIDES},
    }


def _counts(votes: Mapping[str, int]) -> dict[str, int]:
    return {name: votes.get(name, 0) for name in ("first", "second", TIE)}


def _tested(votes: Mapping[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = _counts(votes)
    decided = found["first"] + found["second"]
    if decided:
        share, p_value = binomial(found["first"], decided)
        found.update(share_of_first=share.to_dict(), p_value=p_value)
    return found


def study_markdown(report: Mapping[str, Any]) -> str:
    """The table of a report."""
    readers = len(report["readers"])
    lines = [
        f"# {report['first']} against {report['second']}",
        "",
        f"Blind pairs, study {report['study']}, {readers} reader{'' if readers == 1 else 's'}; "
        f"the left one was chosen {report['sides']['left']} times, the right one {report['sides']['right']} times.",
        "",
        f"| | {report['first']} | {report['second']} | tie | share of the first | p |",
        "|---|---:|---:|---:|---:|---:|",
        _line("answers, pooled", report["answers"]),
        _line("pairs, by their readers' majority", report["trials"]),
        *(_line(reader, count) for reader, count in report["readers"].items() if readers > 1),
        "",
        "Share without ties, with its exact 95 % interval (Clopper-Pearson); p of the two-sided binomial test against "
        "one half. Pooled answers count readers of one pair as independent, which they are not.",
    ]
    if report["trials"]["unanswered"]:
        lines.append(f"{report['trials']['unanswered']} pairs have no answer.")
    return "\n".join(lines) + "\n"


def _line(name: str, count: Mapping[str, Any]) -> str:
    share = count.get("share_of_first")
    shown = "" if share is None else f"{share['value']:.3f} ({share['low']:.3f} to {share['high']:.3f})"
    p_value = f"{count['p_value']:.3g}" if "p_value" in count else ""
    return f"| {name} | {count['first']} | {count['second']} | {count[TIE]} | {shown} | {p_value} |"
