"""Instruction corpora whose interactions are known by construction.

The command `instructmix planted` writes them, to check estimators of effects against known truth.
There are nine small tasks over made-up words.  Each task is a table of facts (key -> answer) with
its own wording of the question:

    colour             "colour of K ?"            -> C          16 keys, 8 answers
    colour-reworded    the same table, other words              duplicates: each helps the other
    colour-contradicted  the prompts of `colour`, other answers contradictory: each harms the other
    size               other keys, other answers                unrelated to all others
    first-step         "where does K lead ?"      -> M          a part of `journey`
    second-step        "what does M become ?"     -> L          a part of `journey`
    journey            "journey of K ?"           -> "M then L" composition: its parts help it, and
                                                                its answers hold the parts' facts
    place              other keys, other answers                unrelated to all others
    weather            answers drawn at random                  noise: nothing helps it, and its own
                                                                effect is not identifiable

A prompt also has filler words without meaning.  So held-out prompts are new, but their keys are
not, and the effect of one task on another shows in its held-out loss.

`warm.jsonl` has the same words, the same wordings, and the same relations between tasks, but other
keys.  A model that is warmed up on it knows how such questions are answered, but not the answers.
So it learns facts fast, and effects are not hidden by competition for capacity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_KEYS = 16
NUM_WARM_KEYS = 32
NUM_ANSWERS = 8
NUM_FILLERS = 24
_SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "lo", "mi", "nu", "pe", "ra", "so", "ti", "vu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One category: the wording of its questions and its table of facts."""

    name: str
    wording: str
    """Prompt with the fields `key` and `a`, `b` (filler words)."""
    facts: Mapping[str, str] | None
    """Key -> response, with warm keys; None: the response is drawn at random from `answers`."""
    keys: tuple[str, ...]
    warm_keys: tuple[str, ...]
    """Keys of the warm-up only; empty if another task has the same wording."""
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedWorld:
    """The tasks, the filler words, and the known interactions."""

    tasks: tuple[Task, ...]
    fillers: tuple[str, ...]
    seed: int

    def rows(self, task: Task, num_rows: int) -> Iterator[dict[str, str]]:
        """Alpaca rows of a task: all different, each key about equally often."""
        rng = np.random.default_rng([self.seed, 1, _number(task.name)])
        return self._draw(task, num_rows, rng)

    def warm_rows(self, num_rows: int) -> Iterator[dict[str, str]]:
        """Rows of the warm-up: all wordings with warm keys, and prompts to repeat words."""
        rng = np.random.default_rng([self.seed, 2])
        words = sorted(self._words())
        tasks = [task for task in self.tasks if task.warm_keys]
        for row in range(num_rows):
            if row % 4 == 3:
                text = " ".join(rng.choice(words, size=6))
                yield _row(f"repeat {text}", text)
                continue
            task = tasks[int(rng.integers(len(tasks)))]
            key = str(rng.choice(task.warm_keys))
            yield _row(self._prompt(task.wording, key, rng), _answer(task, key, rng))

    def truth(self) -> dict[str, Any]:
        """The content of `truth.json`: signs of effects, and gammas that the construction fixes."""
        names = [task.name for task in self.tasks]
        return {
            "categories": names,
            "relations": [
                {"target": target, "source": source, **_relation(target, source)}
                for target in names
                for source in names
            ],
            "seed": self.seed,
        }

    def _draw(
        self, task: Task, num_rows: int, rng: np.random.Generator
    ) -> Iterator[dict[str, str]]:
        seen: set[tuple[str, str]] = set()
        row = 0
        while len(seen) < num_rows:
            key = task.keys[row % len(task.keys)]
            answer = _answer(task, key, rng)
            prompt = self._prompt(task.wording, key, rng)
            row += 1
            if (prompt, answer) not in seen:
                seen.add((prompt, answer))
                yield _row(prompt, answer)

    def _prompt(self, wording: str, key: str, rng: np.random.Generator) -> str:
        first, second = rng.choice(self.fillers, size=2)
        return wording.format(key=key, a=first, b=second)

    def _words(self) -> set[str]:
        words = set(self.fillers)
        for task in self.tasks:
            words |= {*task.keys, *task.warm_keys}
            words |= {*(word for answer in task.answers for word in answer.split())}
        return words


def planted_world(seed: int = 0) -> PlantedWorld:
    """The world of a seed; another seed gives other words and facts, but the same interactions."""
    rng = np.random.default_rng([seed, 0])
    words = _made_up_words(rng)

    def take(count: int) -> tuple[str, ...]:
        return tuple(words.pop() for _ in range(count))

    def keys() -> tuple[str, ...]:
        return take(NUM_KEYS + NUM_WARM_KEYS)

    def task(name: str, wording: str, facts: dict[str, str] | None, over: tuple[str, ...]) -> Task:
        answers = tuple(sorted(set(facts.values()))) if facts else take(NUM_ANSWERS)
        return Task(
            name=name,
            wording=wording,
            facts=facts,
            keys=over[:NUM_KEYS],
            warm_keys=over[NUM_KEYS:],
            answers=answers,
        )

    fillers = take(NUM_FILLERS)
    things, starts, middles, sized, placed = keys(), keys(), keys(), keys(), keys()
    colours, ends = take(NUM_ANSWERS), take(NUM_ANSWERS)
    colour_of = _table(things, colours, rng)
    # Every key has another colour than in `colour`, because the shift is never a multiple of 8.
    other = {
        thing: colours[(colours.index(colour) + 3) % NUM_ANSWERS]
        for thing, colour in colour_of.items()
    }
    leads = _steps(starts, middles, rng)
    becomes = _table(middles, ends, rng)
    journeys = {start: f"{leads[start]} then {becomes[leads[start]]}" for start in starts}
    colour = "{a} colour of {key} {b} ?"
    tasks = (
        task("colour", colour, colour_of, things),
        task("colour-reworded", "say {a} which paint {key} wears {b} .", colour_of, things),
        task("colour-contradicted", colour, other, things[:NUM_KEYS]),
        task("size", "{a} how large is {key} {b} ?", _table(sized, take(NUM_ANSWERS), rng), sized),
        task("first-step", "{a} where does {key} lead {b} ?", leads, starts),
        task("second-step", "{a} what does {key} become {b} ?", becomes, middles),
        task("journey", "tell {a} the journey of {key} {b} .", journeys, starts),
        task(
            "place",
            "{a} find {key} on the map {b} .",
            _table(placed, take(NUM_ANSWERS), rng),
            placed,
        ),
        task("weather", "{a} weather of {key} today {b} ?", None, keys()),
    )
    return PlantedWorld(tasks=tasks, fillers=fillers, seed=seed)


def _relation(target: str, source: str) -> dict[str, Any]:
    """Sign of the effect of source on target; None if the construction does not fix it.

    `gamma` is 1 if the two tasks share all facts, 0 if they share none, and None otherwise.
    """
    pair = {target, source}
    if target == source:
        if target == "weather":
            return {"relation": "noise", "sign": 0, "gamma": None}
        return {"relation": "own", "sign": 1, "gamma": 1.0}
    if pair == {"colour", "colour-reworded"}:
        return {"relation": "duplicate", "sign": 1, "gamma": 1.0}
    if pair == {"colour", "colour-contradicted"}:
        return {"relation": "contradiction", "sign": -1, "gamma": None}
    if pair == {"colour-reworded", "colour-contradicted"}:
        return {"relation": "contradiction", "sign": None, "gamma": None}
    if "journey" in pair and pair & {"first-step", "second-step"}:
        return {"relation": "part", "sign": 1, "gamma": None}
    if pair == {"first-step", "second-step"}:
        return {"relation": "shared words", "sign": None, "gamma": None}
    return {"relation": "unrelated", "sign": 0, "gamma": 0.0}


def _answer(task: Task, key: str, rng: np.random.Generator) -> str:
    return str(rng.choice(task.answers)) if task.facts is None else task.facts[key]


def _steps(
    starts: tuple[str, ...], middles: tuple[str, ...], rng: np.random.Generator
) -> dict[str, str]:
    """A one-to-one table; keys of the data and keys of the warm-up stay apart."""
    steps = {}
    for part in (slice(0, NUM_KEYS), slice(NUM_KEYS, None)):
        steps |= dict(zip(starts[part], rng.permutation(middles[part]).tolist(), strict=True))
    return steps


def _table(
    keys: tuple[str, ...], answers: tuple[str, ...], rng: np.random.Generator
) -> dict[str, str]:
    """A random table in which all answers have the same number of keys."""
    even = np.arange(len(keys)) % len(answers)
    return {key: answers[int(k)] for key, k in zip(keys, rng.permutation(even), strict=True)}


def _made_up_words(rng: np.random.Generator) -> list[str]:
    """All words of two different syllables and a closing letter, shuffled."""
    words = [
        first + second + last
        for first in _SYLLABLES
        for second in _SYLLABLES
        for last in ("n", "r", "l")
        if first != second
    ]
    return [words[int(index)] for index in rng.permutation(len(words))]


def _row(prompt: str, response: str) -> dict[str, str]:
    return {"instruction": prompt, "input": "", "output": response}


def _number(name: str) -> int:
    return int.from_bytes(name.encode()[:6], "big") + len(name)
