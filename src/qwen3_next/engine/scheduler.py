"""Which sequences take part in the next call of the model, and with how many tokens. No torch.

Every request has a rank, fixed when it comes: the number of the call at which it came, less `priority * aging`. Ranks
of later requests only rise, so each request in time is the first, and the first is never preempted and always goes on:
nobody starves. Steps (decodes and verifications) are in every call; the rest of the token budget goes to chunks of
prompts, by rank. A request is admitted with the pages of its whole prompt. Where a page is missing, unused pages of the
prefix cache are evicted, then the request of the last rank is preempted: its pages and its state go to the prefix
cache, from where it will start again as far as they survive. Where nobody of a later rank is left, the request keeps
what it has and waits.

Plans may be made ahead of the commits of earlier ones. Pages and slots of a request are given back only when none of
its calls is in flight; so preemption, abort and the end of a request wait for the commit of the last of them.
"""

import itertools
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Sequence

from qwen3_next.engine.memory import Memory
from qwen3_next.engine.plan import Plan, ScheduledSequence, SequenceResult, SnapshotOrder
from qwen3_next.engine.prefix_cache import Match, MatchEnd
from qwen3_next.engine.queue_entry import Entry, is_held_back_by, rank_of
from qwen3_next.engine.request import FinishReason, Request, RequestOutput, Status
from qwen3_next.engine.scheduler_config import SchedulerConfig, SchedulerFigures
from qwen3_next.errors import CapacityError, InputError, Qwen3NextError

__all__ = ["Scheduler"]


class Scheduler:
    """Plans calls of the model for requests in any state of completion, on memory that they share."""

    def __init__(self, config: SchedulerConfig, memory: Memory) -> None:
        """Schedule on this memory.

        Raises:
            CapacityError: one request of `max_context` tokens does not fit the memory.
        """
        room = (memory.page_count - 2) * memory.page_size
        if config.max_context > room:
            raise CapacityError(
                f"max_context = {config.max_context} does not fit {memory.page_count} pages of {memory.page_size} "
                f"tokens. Allowed: at most {room} (one page is reserved and one is for a copy). Lower max_context."
            )
        self.config, self.memory = config, memory
        self._entries: dict[str, Entry] = {}
        self._waiting: list[Entry] = []
        self._running: list[Entry] = []
        self._plans: deque[Plan] = deque()
        self._reports: list[RequestOutput] = []
        self._arrivals = itertools.count()
        self._planned = 0
        self._counts: Counter[str] = Counter()
        self._matches: Counter[MatchEnd] = Counter()

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            CapacityError: its prompt leaves no room for a token in the context.
            InputError: another unfinished request has the same id.
        """
        if len(request.prompt) >= self.config.max_context:
            raise CapacityError(
                f"request {request.request_id!r}: {len(request.prompt)} tokens of prompt cannot be served. Allowed: at "
                f"most {self.config.max_context - 1}, one less than the context. Shorten the prompt."
            )
        if request.request_id in self._entries or request.params.n != 1:
            raise InputError(
                f"request {request.request_id!r} with n = {request.params.n} cannot be queued. Allowed: an id that no "
                "unfinished request has, and n = 1. Choose another id; queue each of Request.samples()."
            )
        request.arrival = self._planned
        entry = Entry(request, (self._planned - request.priority * self.config.aging, next(self._arrivals)))
        self._entries[request.request_id] = entry
        insort(self._waiting, entry, key=rank_of)

    def abort(self, request_id: str) -> bool:
        """End a request; the next commit reports it. False: it has ended already, or never was."""
        entry = self._entries.get(request_id)
        if entry is None or entry.request.finish is not None:
            return False
        self._end(entry, FinishReason.ABORT)
        self._reports.append(RequestOutput.of(entry.request))
        return True

    def plan(self, next_drafts: int = 0) -> Plan:
        """Choose the sequences of the next call.

        Args:
            next_drafts: how many proposals each step leaves for the next, at most `max_drafts`; the proposals that
                earlier calls left are verified whatever it is.
        """
        self._planned += 1
        next_drafts = min(next_drafts, self.config.max_drafts)
        joins = not any(entry.next_drafts or entry.has_pending for entry in self._running if entry.takes_a_step)
        sequences = self._plan_steps(next_drafts, joins)
        budget = self.config.token_budget - sum(sequence.length for sequence in sequences)
        sequences += self._plan_chunks(budget, next_drafts, joins)
        plan = Plan(self._planned, tuple(sorted(sequences, key=lambda one: not one.awaits_verdict)), joins)
        self._plans.append(plan)
        return plan

    def commit(self, plan: Plan, results: Sequence[SequenceResult]) -> list[RequestOutput]:
        """Take note of what a call did. Plans are committed in the order in which they were made.

        Args:
            results: one for each sequence of the plan.
        """
        first = self._plans.popleft()
        assert plan is first, "plans are committed in their order"
        for sequence, result in zip(plan, results, strict=True):
            self._land(self._entries[sequence.request.request_id], sequence, result)
        reports, self._reports = self._reports, []
        return reports

    def withdraw(self, plan: Plan) -> None:
        """A call failed as a whole, for want of memory for example: whoever took part starts again from the cache.

        What the call left in its slots is not used, however far it came. Withdraw the last plan first.
        """
        last = self._plans.pop()
        assert plan is last, "the last plan is withdrawn first"
        for sequence in plan:
            entry = self._entries[sequence.request.request_id]
            entry.flights.pop()
            entry.survives = False
            entry.request.status = Status.LEAVING
            self._leave_if_landed(entry)

    def withdraw_all(self) -> None:
        """The same for every request that owns memory, whichever calls are in flight or were committed half."""
        self._plans.clear()
        for entry in list(self._running):
            entry.flights.clear()
            entry.survives = False
            entry.request.status = Status.LEAVING
            self._leave_if_landed(entry)

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or an end was not reported."""
        return bool(self._entries or self._reports)

    @property
    def figures(self) -> SchedulerFigures:
        """Queues and counts."""
        return SchedulerFigures(
            waiting=len(self._waiting),
            running=len(self._running),
            preemptions=self._counts["preemptions"],
            looked_up_tokens=self._counts["looked up"],
            cached_tokens=self._counts["cached"],
            matches=dict(self._matches),
        )

    def check(self) -> None:
        """Assert that the queues, the requests and the memory agree."""
        self.memory.check()
        assert len(self._running) <= self.config.max_sequences
        assert {id(e) for e in self._entries.values()} == {id(e) for e in (*self._running, *self._waiting)}
        for queue in (self._running, self._waiting):
            assert [entry.rank for entry in queue] == sorted(entry.rank for entry in queue)
        for entry in self._waiting:
            assert (entry.request.status, len(entry.flights), entry.request.computed) == (Status.WAITING, 0, 0)
        for entry in self._running:
            request = entry.request
            assert entry.flights if request.status is Status.LEAVING else request.status is Status.RUNNING
            assert request.finish is None or request.status is Status.LEAVING
            assert 0 <= request.pending <= request.computed <= len(request.tokens)
            assert len(self.memory.page_table(request.request_id)) >= self.memory.pages_for(request.computed)

    def _plan_steps(self, next_drafts: int, joins: bool) -> list[ScheduledSequence]:
        steps: list[ScheduledSequence] = []
        for entry in list(self._running):  # by rank: whoever is preempted on the way has not had its turn
            request = entry.request
            start, uncertain = entry.next_start()
            room = self.config.most_tokens(request) - (start + uncertain) - 2
            if not entry.takes_a_step or room < 0:
                continue
            drafts = min(entry.next_drafts, room)
            length = start + uncertain + 1 + drafts
            if self._make_room(entry, lambda r=request, n=length: self.memory.grow(r.request_id, n)):
                steps.append(self._schedule(entry, 1 + drafts, drafts, next_drafts, joins))
        return steps

    def _plan_chunks(self, budget: int, next_drafts: int, joins: bool) -> list[ScheduledSequence]:
        chunks: list[ScheduledSequence] = []
        admitted = self._admit_some(budget)
        for entry in list(self._running):
            missing = len(entry.request.tokens) - entry.next_start()[0]
            # Of those admitted before, who lacks but the last token had its turn as a step.
            if budget > 0 and entry.request.status is Status.RUNNING and missing >= (1 if entry in admitted else 2):
                chunks.append(self._schedule(entry, self._chunk_length(entry, budget), 0, next_drafts, joins))
                budget -= chunks[-1].length
        return chunks

    def _admit_some(self, budget: int) -> list[Entry]:
        """Admit requests by rank, until the budget or the memory is used up.

        Who shares a prompt with another is found before any chunk of this call is cut, and among those too that will
        have their turn later: a state in the middle of a chunk must be asked for before it is computed.
        """
        admitted: list[Entry] = []
        computing = [entry for entry in self._running if entry.is_computing_its_prompt]
        is_full, size = False, self.memory.page_size
        for entry in sorted((*computing, *self._waiting[: self.config.max_sequences]), key=rank_of):
            if entry.request.status is Status.WAITING:
                is_held_back = self._may_look_up(entry.request) and is_held_back_by(entry, computing, size)
                if is_held_back or is_full or budget <= 0:
                    continue
                is_full = not self._admit(entry)
                if is_full:
                    continue
                admitted.append(entry)
                computing.append(entry)
            budget -= len(entry.request.tokens) - entry.next_start()[0]
        return admitted

    def _chunk_length(self, entry: Entry, budget: int) -> int:
        """Up to the end of the prompt, or of a page: chunks of whole pages are computed alike however they are cut."""
        start, size = entry.next_start()[0], self.memory.page_size
        end = min(len(entry.request.tokens), start + budget)
        aligned = end // size * size
        return (aligned if start < aligned and end < len(entry.request.tokens) else end) - start

    def _schedule(self, entry: Entry, length: int, drafts: int, next_drafts: int, joins: bool) -> ScheduledSequence:
        request, memory, name = entry.request, self.memory, entry.request.request_id
        start, uncertain = entry.next_start()
        is_first, is_step = not entry.flights, start >= len(request.tokens) - 1
        samples = is_step or start + length == len(request.tokens)
        wanted = [] if is_step else [p for p in entry.snapshots if start < p <= start + length]
        slots = {position: memory.reserve_snapshot(name, position) for position in sorted(wanted, reverse=True)}
        sequence = ScheduledSequence(
            request=request,
            start=start,
            uncertain=uncertain,
            length=length,
            pages=memory.page_table(name),
            slot=memory.slot(name),
            accepted=request.pending if is_first else int(entry.flights[-1].leaves_pending),
            drafts=drafts,
            next_drafts=next_drafts if samples else 0,
            awaits_verdict=is_step,
            joins=joins,
            samples=samples,
            starts_empty=start == 0,
            state_copy=memory.state_copy(name) if is_first else None,
            page_copy=memory.page_copy(name) if is_first else None,
            snapshots=tuple(SnapshotOrder(p, slot) for p, slot in sorted(slots.items()) if slot is not None),
        )
        entry.flights.append(sequence)
        return sequence

    def _admit(self, entry: Entry) -> bool:
        """Give a request memory, and start it where the prefix cache ends. False: there is no room yet."""
        request, memory = entry.request, self.memory
        victims = [e for e in self._running if e.rank > entry.rank and e.request.priority < request.priority]
        is_full = len(self._running) >= self.config.max_sequences
        if not victims and (is_full or not memory.available_slots):
            return False
        match = self._lookup(request)

        def attempt() -> bool:
            if len(self._running) >= self.config.max_sequences:
                return False
            return memory.admit(request.request_id, match, len(request.tokens))

        hoped_for = sum(len(memory.page_table(e.request.request_id)) for e in victims)
        if memory.pages_for(len(request.tokens)) - len(match.nodes) > memory.available_pages + hoped_for:
            return False
        if not self._make_room(entry, attempt, request.priority):
            return False
        self._waiting.remove(entry)
        insort(self._running, entry, key=rank_of)
        request.status = Status.RUNNING
        request.computed = request.cached = match.position
        request.pending = 0 if match.snapshot is None else match.snapshot.pending
        entry.snapshots = self.config.wanted_snapshots(request, match, memory.page_size)
        entry.awaited, entry.survives = None, True
        self._matches[match.end] += 1
        self._counts["looked up"] += len(request.tokens)
        self._counts["cached"] += match.position
        return True

    def _lookup(self, request: Request) -> Match:
        """What of a request is cached; its last token is computed in any case, for the logits."""
        limit = len(request.tokens) - 1 if self._may_look_up(request) else 0
        return self.memory.lookup(request.tokens, limit)

    def _may_look_up(self, request: Request) -> bool:
        """The log-probabilities of a prompt come from computing it."""
        is_told = request.params.prompt_logprobs is None or request.output_length > 0
        return self.config.prefix_cache and is_told

    def _make_room(self, entry: Entry, attempt: Callable[[], bool], below: int | None = None) -> bool:
        """Try until it works, each time with one request less of a later rank (and a priority below the one given)."""
        while not attempt():
            victim = self._victim(entry, below)
            if victim is None or not self._preempt(victim):
                return False
        return True

    def _victim(self, entry: Entry, below: int | None) -> Entry | None:
        if any(other.request.status is Status.LEAVING for other in self._running):
            return None  # room is coming
        for other in reversed(self._running):
            if other.rank <= entry.rank:
                return None
            if below is None or other.request.priority < below:
                return other
        return None

    def _preempt(self, entry: Entry) -> bool:
        """Let a request give back its memory and queue again. False: it will, once its calls are committed."""
        self._counts["preemptions"] += 1
        entry.request.preemptions += 1
        entry.request.status = Status.LEAVING
        return self._leave_if_landed(entry)

    def _land(self, entry: Entry, sequence: ScheduledSequence, result: SequenceResult) -> None:
        """Take in the outcome of one sequence's share of a call."""
        request, memory, name = entry.request, self.memory, entry.request.request_id
        first = entry.flights.popleft()
        assert first is sequence
        memory.copied(name)
        if request.finish is None and result.error is not None:
            self._end(entry, FinishReason.ERROR, result.error)
            self._reports.append(RequestOutput.of(request))
        elif request.finish is None:
            self._advance(entry, sequence, result)
        elif entry.survives and sequence.awaits_verdict and sequence.joins:
            request.computed += 1  # it ended with the token that this step let join
        self._leave_if_landed(entry)

    def _advance(self, entry: Entry, sequence: ScheduledSequence, result: SequenceResult) -> None:
        request = entry.request
        sampled = range(1, sequence.drafts + 2) if sequence.samples else range(1)
        assert len(result.tokens) in sampled or result.finish, f"{len(result.tokens)} tokens of {sequence}"
        tokens, finish = self.config.cut(request, result)
        request.computed = sequence.end if not sequence.awaits_verdict else request.computed + len(tokens)
        request.pending = len(tokens) if sequence.leaves_pending else 0
        request.tokens += tokens
        request.drafts = result.drafts
        if self.config.prefix_cache:
            self.memory.publish(request.request_id, request.tokens, request.computed)
            for order in sequence.snapshots:
                self.memory.keep_snapshot(request.request_id, order.position)
        if finish is not None:
            # The device goes on from all it has accepted, should it have begun the next call.
            entry.survives = result.finish is None and len(tokens) == len(result.tokens)
            self._end(entry, finish)
        if tokens or finish:
            self._reports.append(RequestOutput.of(request, tokens))

    def _end(self, entry: Entry, finish: FinishReason, error: Qwen3NextError | None = None) -> None:
        request = entry.request
        request.finish, request.error, request.drafts = finish, error, ()
        if request.status is Status.WAITING:
            self._waiting.remove(entry)
            self._forget(entry)
            return
        request.status = Status.LEAVING
        # A step in flight lets what is pending join the state; of its own tokens it lets the first join, which is the
        # last one committed, or all are rejected. A second one, or a chunk, lets tokens join that are not committed.
        if entry.flights:
            is_one_step = len(entry.flights) == 1 and entry.flights[0].awaits_verdict
            entry.survives = entry.survives and is_one_step
            request.pending = 0
        self._leave_if_landed(entry)

    def _leave_if_landed(self, entry: Entry) -> bool:
        """Take the memory of a request that leaves, unless a call that may touch it is in flight."""
        request = entry.request
        if request.status is not Status.LEAVING or entry.flights:
            return False
        if request.error is not None:
            self.memory.discard(request.request_id)
        else:
            computed = request.computed if self.config.prefix_cache else 0
            pending = request.pending if entry.survives else None
            self.memory.release(request.request_id, request.tokens, computed, pending)
        self._running.remove(entry)
        if request.finish is not None:
            self._forget(entry)
        else:
            request.status, request.computed, request.pending, request.drafts = Status.WAITING, 0, 0, ()
            insort(self._waiting, entry, key=rank_of)
        return True

    def _forget(self, entry: Entry) -> None:
        entry.request.status = Status.FINISHED
        del self._entries[entry.request.request_id]
