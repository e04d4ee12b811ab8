"""The loop of a model's process: requests take slots, prompts are read in pieces between steps that serve all slots.

One turn of the loop is a step of every text that is being generated, then at most _PIECE tokens of prompts. A prompt takes
over the longest beginning that any slot's keys and values share with it. Log-probabilities of a prompt are computed from
an empty sequence in the pieces of an evaluation, since other pieces round otherwise (by 0.1 % of a perplexity).
"""

from __future__ import annotations

import queue
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ggtool.backends import Logits
from ggtool.serve.engine.grammar import Matcher
from ggtool.serve.engine.requests import Generate, RequestError
from ggtool.serve.engine.sampler import NOT_FINITE, Sampler
from ggtool.serve.engine.scoring import Scorer
from ggtool.serve.engine.sequences import Sequences
from ggtool.serve.engine.slots import Slot, describe_token, score_row

Event = list[Any]
_PIECE = 512  # tokens of prompts between two steps of the texts that are being generated
# Tokens behind a text's first are sent no sooner than this after the ones before: a message wakes the server and the client,
# which take a CPU from the model, and nobody reads faster than a screen is drawn.
_FRAME_S = 1 / 30
_LOOK_S = 0.05  # between two looks at the requests' deadlines
_WORTH_COPYING = 32  # shared tokens below which reading them again is as quick as copying a whole buffer


class Scheduler:
    """Serves requests from other threads until `stop`; `send` gets lists of events."""

    def __init__(self, sequences: Sequences, send: Callable[[list[Event]], None]) -> None:
        self._sequences, self._send = sequences, send
        self._vocabulary = sequences.vocabulary
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[tuple[Generate, list[int], str, Matcher | None, float]] = deque()
        self._tasks: deque[tuple[int, Callable[[int], None]]] = deque()
        self._slots: list[Slot | None] = [None] * sequences.n_sequences
        self._running: list[Slot] = []  # those of them that are taken; a new list after each change
        # What each sequence holds, kept after its request is gone, for the next one to share.
        self._held: list[list[int]] = [[] for _ in range(sequences.n_sequences)]
        self._used_s = [0.0] * sequences.n_sequences
        self._events: list[Event] = []
        self._is_urgent = False
        self._sent_s = 0.0
        self._scorer = Scorer(sequences.n_vocab)
        self._status: list[Any] = []
        self._looked_s = 0.0
        self._stopping = False

    # From any thread.

    def submit(self, request: Generate, prompt: list[int], opening: str, matcher: Matcher | None) -> None:
        """Queue a generation from `prompt`; opening is the end of a rendered chat prompt."""
        arrived = time.monotonic()
        self._inbox.put(lambda: self._waiting.append((request, prompt, opening, matcher, arrived)))

    def embed(self, number: int, texts: Sequence[list[int]]) -> None:
        """Queue the embedding of texts; the reply to `number` is their vectors and the number of tokens."""

        def run(sequence: int) -> None:
            self._held[sequence] = []
            vectors = [self._sequences.embed(sequence, text).tolist() for text in texts]
            self._emit("reply", number, [vectors, sum(map(len, texts))])

        self._inbox.put(lambda: self._tasks.append((number, run)))

    def cancel(self, number: int) -> None:
        """Give up a request, wherever it is; no event of it follows."""
        self._inbox.put(lambda: self._drop(number))

    def stop(self) -> None:
        """Leave the loop after its current turn."""

        def leave() -> None:
            self._stopping = True

        self._inbox.put(leave)

    # In the loop's thread.

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping:
            # Between two steps this is cold code, so that each line of it costs a microsecond: what is seldom to do is asked for first.
            self._take_messages(block=self._is_idle)
            now = time.monotonic()
            if now > self._looked_s + _LOOK_S:
                self._looked_s = now
                self._expire(now)
            if self._tasks or self._waiting:
                self._admit()
            self._predict()
            if not all(slot.is_predicting for slot in self._running):
                self._report(before_prompts=True)
                self._read_prompts()
            self._report()

    @property
    def _is_idle(self) -> bool:
        return not (self._running or self._waiting or self._tasks)

    def _take_messages(self, *, block: bool) -> None:
        while block or not self._inbox.empty():
            self._inbox.get()()
            block = False

    def _drop(self, number: int) -> None:
        self._waiting = deque(entry for entry in self._waiting if entry[0].id != number)
        self._tasks = deque(entry for entry in self._tasks if entry[0] != number)
        for slot in self._running:
            if slot.request.id == number:
                self._free(slot)

    def _set_slot(self, number: int, slot: Slot | None) -> None:
        self._slots[number] = slot
        self._running = [slot for slot in self._slots if slot is not None]

    def _expire(self, now: float) -> None:
        for entry in list(self._waiting):
            if now > entry[4] + entry[0].deadline_s:
                self._waiting.remove(entry)
                self._fail(entry[0].id, RequestError(503, "the request waited too long for a free slot."))
        for slot in self._running:
            if now > slot.started_s + slot.request.deadline_s:
                error = f"the request took longer than {slot.request.deadline_s:g} s and was stopped."
                self._abandon(slot, RequestError(503, error))

    def _admit(self) -> None:
        while self._tasks and (sequence := self._free_sequence()) is not None:
            number, task = self._tasks.popleft()
            try:
                task(sequence)
            except RequestError as error:
                self._fail(number, error)
        blocked: list[tuple[Generate, list[int], str, Matcher | None, float]] = []
        while self._waiting and self._free_sequence() is not None:
            entry = self._waiting.popleft()
            if self._waits_for_leader(entry[0]):
                blocked.append(entry)
            else:
                self._start(*entry)
        self._waiting.extendleft(reversed(blocked))

    def _waits_for_leader(self, request: Generate) -> bool:
        if request.leader is None:
            return False
        if any(entry[0].id == request.leader for entry in self._waiting):
            return True
        return any(slot.request.id == request.leader and not slot.is_predicting for slot in self._running)

    def _free_sequence(self) -> int | None:
        free = [number for number, slot in enumerate(self._slots) if slot is None]
        return min(free, key=lambda number: self._used_s[number], default=None)

    def _start(
        self, request: Generate, prompt: list[int], opening: str, matcher: Matcher | None, _arrived: float
    ) -> None:
        needs_scores = request.echo and request.logprobs is not None
        if needs_scores:
            sequence = self._free_sequence()
            assert sequence is not None
            shared = self._sequences.keep(sequence, 0)
        else:
            sequence, shared = self._share(prompt)
        sampler = Sampler(request.sampling, prompt, self._sequences.end_tokens)
        slot = Slot(sequence, request, prompt, sampler, matcher)
        slot.begin(self._vocabulary)
        self._set_slot(sequence, slot)
        self._held[sequence] = slot.tokens
        self._emit("started", request.id, len(prompt), shared, opening)
        if needs_scores:
            slot.scoring = self._sequences.score(sequence, prompt)
            slot.scored.append(describe_token(self._vocabulary, prompt[0], 0, None))
            slot.decode(prompt[0])
        elif request.echo:
            self._echo(slot)
        if request.n_predict == 0 and not needs_scores:
            self._end(slot, "length", slot.rest())

    def _share(self, prompt: list[int]) -> tuple[int, int]:
        """Choose a free sequence for `prompt` and give it what any sequence has of it; return it and how much."""
        lengths = [_shared(held, prompt) for held in self._held]
        lengths = [min(n, self._sequences.length(number)) for number, n in enumerate(lengths)]
        best = max(range(len(lengths)), key=lambda number: (lengths[number], self._slots[number] is None))
        if self._slots[best] is None and self._is_worth_keeping(best, lengths[best]):
            return best, self._sequences.keep(best, lengths[best])
        target = self._free_sequence()
        assert target is not None
        if best != target and lengths[best] - lengths[target] >= _WORTH_COPYING:
            return target, self._sequences.copy(best, target, lengths[best])
        return target, self._sequences.keep(target, lengths[target])

    def _is_worth_keeping(self, sequence: int, shared: int) -> bool:
        """Whether a free sequence is cut back itself, rather than copied to the one that was idle the longest."""
        return shared > 0 and (shared >= _WORTH_COPYING or shared * 2 > len(self._held[sequence]))

    def _predict(self) -> None:
        """Take one token further every text that is being generated."""
        slots = [slot for slot in self._running if slot.is_predicting]
        if not slots:
            return
        try:
            rows = self._sequences.step([(slot.sequence, slot.tokens[-1]) for slot in slots])
        except RequestError as error:
            for slot in slots:
                self._abandon(slot, error)
            return
        for slot, row in zip(slots, rows, strict=True):
            self._sample(slot, row)

    def _read_prompts(self) -> None:
        budget, is_scoring = _PIECE, False
        for slot in sorted(self._running, key=lambda slot: slot.started_s):
            if slot.is_predicting or budget <= 0 or (slot.scoring is not None and is_scoring):
                continue
            try:
                if slot.scoring is not None:
                    is_scoring = True  # texts are scored one after the other
                    budget -= self._score_piece(slot)
                else:
                    budget -= self._read_piece(slot, budget)
            except RequestError as error:
                self._abandon(slot, error)

    def _read_piece(self, slot: Slot, budget: int) -> int:
        done = self._sequences.length(slot.sequence)
        piece = slot.tokens[done : done + budget]
        is_last = done + len(piece) == len(slot.tokens)
        row = self._sequences.extend(slot.sequence, piece, wants_logits=is_last)
        if row is not None:
            self._sample(slot, row)
        return len(piece)

    def _score_piece(self, slot: Slot) -> int:
        """Score the next block of an echoed prompt."""
        assert slot.scoring is not None
        rows = next(slot.scoring, None)
        if rows is None:  # the last token is still to be read, for the logits behind it
            self._finish_scoring(slot, None)
            return 0
        first = slot.n_scored
        targets = slot.tokens[first + 1 : first + 1 + len(rows)]
        n_top = slot.request.logprobs or 0
        for token, scored in zip(
            targets, self._scorer.score(rows[: len(targets)], targets, n_top), strict=True
        ):
            if not np.isfinite(scored[0]):
                raise RequestError(500, NOT_FINITE)
            slot.scored.append(describe_token(self._vocabulary, token, slot.offset, scored))
            slot.decode(token)
        slot.n_scored += len(rows)
        if slot.n_scored == slot.n_prompt:
            self._finish_scoring(slot, np.array(rows[-1]))
        return len(rows)

    def _finish_scoring(self, slot: Slot, last: Logits | None) -> None:
        """Send the scored prompt and go on from the logits behind it, if they are there already."""
        slot.scoring = None
        self._emit("prompt", slot.request.id, self._prompt_text(slot), slot.scored)
        slot.scored = []
        if slot.request.n_predict == 0:
            self._end(slot, "length", "")
        elif last is not None:
            self._sample(slot, last)

    def _echo(self, slot: Slot) -> None:
        scored = []
        for token in slot.tokens:
            scored.append(describe_token(self._vocabulary, token, slot.offset, None))
            slot.decode(token)
        self._emit("prompt", slot.request.id, self._prompt_text(slot), scored)

    def _prompt_text(self, slot: Slot) -> str:
        decoder = self._vocabulary.decoder()
        return "".join(decoder.add(token) for token in slot.tokens[: slot.n_prompt])

    def _sample(self, slot: Slot, row: Logits) -> None:
        """Draw the token behind `row` and send it, or end the text."""
        request = slot.request
        if slot.n_predicted == 0:
            slot.first_token_s = time.monotonic()
        try:
            # The sampler changes the row, and probabilities are the model's own.
            raw = np.array(row) if request.logprobs is not None else row
            allowed = None if slot.matcher is None else slot.matcher.allowed()
            token = slot.sampler.choose(row, allowed)
            if slot.matcher is not None:
                slot.matcher.accept(token)
        except RequestError as error:
            self._abandon(slot, error)
            return
        except Exception as error:  # noqa: BLE001 - one request must not end the others
            traceback.print_exc()  # into the log that the server shows when the process ends
            name = type(error).__name__
            self._abandon(slot, RequestError(500, f"the next token could not be chosen ({name})."))
            return
        if token in self._sequences.end_tokens and not request.sampling.ignore_eos:
            self._end(slot, "eog", slot.rest())
            return
        offset = slot.offset
        text, stopped = slot.release(slot.decode(token))
        scored: list[list[Any]] = []
        if request.logprobs is not None:
            found = score_row(self._scorer, raw, token, request.logprobs)
            scored = [describe_token(self._vocabulary, token, offset, found)]
        slot.tokens.append(token)
        slot.is_predicting = self._sequences.length(slot.sequence) == len(slot.tokens) - 1
        self._events.append(["token", request.id, text, scored])
        self._is_urgent |= slot.n_predicted == 1
        if stopped:
            self._end(slot, "stop", "")
        elif slot.n_predicted == request.n_predict:
            self._end(slot, "length", slot.rest())
        elif len(slot.tokens) >= self._sequences.n_ctx:
            self._end(slot, "context", slot.rest())
        elif slot.matcher is not None and slot.matcher.is_done:
            self._end(slot, "eog", slot.rest())

    def _end(self, slot: Slot, reason: str, text: str) -> None:
        now = time.monotonic()
        first = slot.first_token_s or now
        self._emit(
            "end",
            slot.request.id,
            reason,
            text,
            slot.n_predicted,
            first - slot.started_s,
            now - first,
            slot.stopped_by,
        )
        self._free(slot)

    def _abandon(self, slot: Slot, error: RequestError) -> None:
        self._fail(slot.request.id, error)
        self._free(slot)

    def _fail(self, number: int, error: RequestError) -> None:
        self._emit("error", number, error.status, error.message, error.param)

    def _free(self, slot: Slot) -> None:
        number = slot.sequence
        self._set_slot(number, None)
        self._held[number] = slot.tokens[: self._sequences.length(number)]
        self._used_s[number] = time.monotonic()

    def _emit(self, *event: Any) -> None:
        """Add an event that is sent at once, with all that wait."""
        self._events.append(list(event))
        self._is_urgent = True

    def _report(self, *, before_prompts: bool = False) -> None:
        """Send the events, or leave tokens for later; not before prompts are read, which takes longer than a step."""
        status = [len(self._running), len(self._waiting)]
        if status != self._status:
            self._status = status
            self._emit("status", {"busy": status[0], "waiting": status[1]})
        if not self._events:
            return
        now = time.monotonic()
        if self._is_urgent or before_prompts or now >= self._sent_s + _FRAME_S:
            self._send(self._events)
            self._events, self._is_urgent, self._sent_s = [], False, now


def _shared(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many tokens of `prompt` are held; its last is read again, for its logits."""
    n = min(len(held), len(prompt) - 1)
    if n <= 0:
        return 0
    differ = np.flatnonzero(np.asarray(held[:n]) != np.asarray(prompt[:n]))
    return int(differ[0]) if len(differ) else n
