"""Many questions, answered in batches by one process or by several: each takes the next batch when it is free.

Which questions make a batch follows from their order alone. So the answers are the same whatever the number of processes, and
after a run that was killed between two batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from .distributed.processes import Process, Tasks
from .errors import InputError
from .inputs.questions import Question
from .load import Llava

Lines = list[dict[str, Any]]


def answer_all(
    model: Llava,
    questions: Iterable[Question],
    numbers: Sequence[int],
    write: Callable[[list[int], Lines], object],
    process: Process,
    batch: int = 8,
    *,
    skip_unusable: bool = False,
    **options: Any,
) -> float:
    """Answer those `questions` whose numbers are in `numbers`, ascending, together with the other processes.

    questions      numbered from 0; a process reads on only to those that it takes
    write          called with the numbers and the lines of a batch that this process has answered. A line has what `Question`
                   says to write beside the answer, "answer", "finish" and "visual_tokens" (see `Answer`)
    batch          at most so many questions at once: those with the numbers 0 … batch - 1, batch … 2·batch - 1, and so on
    skip_unusable  a question that cannot be asked gets a line with "error" in place of the answer. Otherwise its InputError is
                   raised, with its place or, of a batch, the numbers from 1

    Returns the seconds that this process took to open its pictures, read and answer. The first process shows a bar.
    """
    batches: dict[int, list[int]] = {}
    for number in numbers:
        batches.setdefault(number // batch, []).append(number)
    todo = list(batches.values())
    tasks, seconds = Tasks(process, len(todo)), 0.0
    with tqdm(total=len(numbers), disable=None if process.rank == 0 else True, desc="questions") as bar:

        def show(more: int = 0) -> int:
            done = tasks.done(more)
            bar.update(done - bar.n)
            return done

        for own, asked in _taken(enumerate(questions), todo, tasks):
            begun = time.perf_counter()
            lines = _answers(model, asked, own, skip_unusable, options)
            seconds += time.perf_counter() - begun
            write(own, lines)
            show(len(own))
        while process.count > 1 and show() < len(numbers):  # no collective, whose time-out a slow batch might exceed
            time.sleep(0.1)
    return seconds


def _taken(
    supply: Iterator[tuple[int, Question]], todo: Sequence[list[int]], tasks: Tasks
) -> Iterator[tuple[list[int], list[Question]]]:
    """The batches that this process takes."""
    for task in tasks:
        wanted = set(todo[task])
        own: list[tuple[int, Question]] = []
        while len(own) < len(wanted):
            number, question = next(supply, (None, None))
            if number is None or question is None:
                raise InputError(f"questions: expected one of number {todo[task][len(own)]}, got fewer")
            if number in wanted:
                own.append((number, question))
        yield [number for number, _ in own], [question for _, question in own]


def _answers(
    model: Llava, questions: Sequence[Question], numbers: Sequence[int], skip_unusable: bool, options: dict[str, Any]
) -> Lines:
    try:
        answers = model.generate_batch(
            [list(one.images) for one in questions], [one.text for one in questions], **options
        )
    except InputError as error:
        if not skip_unusable:
            place = f"questions {numbers[0] + 1} to {numbers[-1] + 1}" if len(numbers) > 1 else questions[0].place
            raise InputError(f"{place}: {error}") from error
        if len(questions) > 1:  # which of them it is, and what the others' answers are
            pairs = zip(questions, numbers, strict=True)
            return [_answers(model, [one], [number], True, options)[0] for one, number in pairs]
        return [{**questions[0].about, "error": f"{questions[0].place}: {error}"}]
    return [
        {**one.about, "answer": answer.text, "finish": answer.finish, "visual_tokens": vars(answer.tokens)}
        for one, answer in zip(questions, answers, strict=True)
    ]
