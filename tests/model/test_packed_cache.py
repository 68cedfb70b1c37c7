"""Paged = whole: many sequences through pages and slots, in any cuts and mixtures, are what each is without a cache."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tests.conftest import EVERY_EXPERT, tiny_model
from tests.model.reference import relative_error
from torch import Tensor

import qwen3_next
from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.errors import InputError
from qwen3_next.model import PackedCache, PackedInputs, PackedMemory
from qwen3_next.model.network import Wanted
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots

TOLERANCE = 1e-5
ASSETS = Path(qwen3_next.__file__).parent / "assets"
PAGES_OF_EACH, PENDING, SPARE = 5, 4, 2


@pytest.fixture(scope="module")
def shipped() -> Qwen3NextForCausalLM:
    return Qwen3NextForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval()


def random_tokens(model: Qwen3NextForCausalLM, lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, model.config.vocab_size, (length,), generator=generator) for length in lengths]
    return [t.to(model.device) for t in tokens]


def inputs_of(tokens: Sequence[Tensor], before: Sequence[int]) -> PackedInputs:
    """New tokens of each sequence, after so many."""
    device = tokens[0].device
    segments = Segments.from_lengths([len(t) for t in tokens], device)
    starts = torch.tensor(before, device=device)
    return PackedInputs(torch.cat(list(tokens)), segments.offsets + starts[segments.sequence_ids], segments)


@torch.no_grad()
def whole(model: Qwen3NextForCausalLM, tokens: Sequence[Tensor]) -> list[Tensor]:
    inputs = inputs_of(tokens, [0] * len(tokens))
    return list(model.model.forward_packed(inputs).hidden.split([len(t) for t in tokens]))


@dataclass
class Book:
    """Who owns which page and slot: the plainest owner, each sequence a fixed number of pages in a random order."""

    model: Qwen3NextForCausalLM
    count: int
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        pages, device, dtype = self.count * PAGES_OF_EACH, self.model.device, self.model.dtype
        self.memory = PackedMemory.allocate(
            self.model.config,
            pages=pages,
            slots=self.count + SPARE,
            pending=PENDING,
            page=16,
            dtype=dtype,
            device=device,
        )
        # What others left behind must not matter.
        for kept in (self.memory.keys, self.memory.values, self.memory.recurrent, self.memory.conv):
            kept.fill_(3.0)
        self.table = torch.randperm(pages, generator=generator).view(self.count, -1).int().to(device)
        self.slots = torch.randperm(self.count + SPARE, generator=generator).int().to(device)
        self.memory.clear_(self.slots[: self.count])
        self.lengths = [0] * self.count

    @torch.no_grad()
    def read(
        self,
        tokens: Sequence[Tensor],
        accepted: Sequence[int] | None = None,
        snapshots: Snapshots | None = None,
        steps: int | None = None,
    ) -> list[Tensor]:
        """Hidden states of new tokens; `lengths` counts all of them afterwards."""
        device, inputs = self.model.device, inputs_of(tokens, self.lengths)
        self.lengths = [a + len(b) for a, b in zip(self.lengths, tokens, strict=True)]
        cache = PackedCache(
            self.memory,
            self.table,
            torch.tensor(self.lengths, dtype=torch.int32, device=device),
            self.slots[: self.count],
            None if accepted is None else torch.tensor(accepted, dtype=torch.int32, device=device),
            tuple(self.lengths),
            snapshots,
            steps,
        )
        return list(self.model.model.forward_packed(inputs, cache).hidden.split([len(t) for t in tokens]))


ROUNDS = [
    [(1, 1, 1, 1)] * 12,  # decoding from the first token on
    [(70, 3, 33, 1), (1, 1, 1, 1), (2, 0, 8, 5), (0, 40, 1, 17), (1, 1, 9, 1), (3, 3, 3, 3)],
    [(8, 0, 0, 0), (8, 0, 1, 0), (40, 20, 2, 64), (1, 1, 1, 1)],
]


@pytest.mark.parametrize("rounds", ROUNDS, ids=["one by one", "mixed", "late sequences"])
def test_any_cuts_and_mixtures_equal_each_sequence_at_once(
    shipped: Qwen3NextForCausalLM, rounds: list[tuple[int, ...]]
) -> None:
    cuts = list(zip(*rounds, strict=True))
    tokens = random_tokens(shipped, [sum(cut) for cut in cuts])
    parts = [t.split(cut) for t, cut in zip(tokens, cuts, strict=True)]
    book = Book(shipped, len(tokens))
    outputs = [book.read(new) for new in zip(*parts, strict=True)]
    for ours, expected in zip(zip(*outputs, strict=True), whole(shipped, tokens), strict=True):
        assert relative_error(torch.cat(ours), expected) < TOLERANCE


def test_rejected_drafts_leave_no_trace(shipped: Qwen3NextForCausalLM) -> None:
    """Each round a sequence brings its next token and drafts, of which some prove right; prompts come in between."""
    tokens = random_tokens(shipped, [80, 80, 80])
    expected, book = whole(shipped, tokens), Book(shipped, 3)
    # For each round and sequence: tokens that are right, and wrong ones after them.
    rounds = [
        [(30, 0), (1, 0), (12, 0)],
        [(1, 3), (2, 2), (4, 0)],
        [(4, 0), (1, 0), (0, 0)],
        [(2, 1), (0, 0), (3, 1)],
        [(20, 0), (1, 0), (9, 0)],  # in chunks, after drafts
        [(1, 1), (1, 3), (2, 0)],
        [(1, 0), (1, 0), (1, 0)],
    ]
    accepted, was_long = [0, 0, 0], True
    for news in rounds:
        is_long = max(right + wrong for right, wrong in news) > 8
        parts: list[Tensor] = []
        for t, done, (right, wrong) in zip(tokens, book.lengths, news, strict=True):
            parts.append(torch.cat([t[done : done + right], (t[done + right : done + right + wrong] + 1) % 4000]))
        before = list(book.lengths)
        outputs = book.read(parts, [0] * 3 if was_long else accepted)
        for n, (right, _) in enumerate(news):
            if right:
                assert relative_error(outputs[n][:right], expected[n][before[n] : before[n] + right]) < TOLERANCE
            book.lengths[n] = before[n] + right
        # Of a sequence without tokens nothing is pending.
        accepted, was_long = [right for right, _ in news], is_long


def test_steps_that_await_a_verdict_and_chunks_of_prompts_share_a_call(shipped: Qwen3NextForCausalLM) -> None:
    tokens = random_tokens(shipped, [40, 30, 70])
    expected, book = whole(shipped, tokens), Book(shipped, 3)
    spare = int(book.slots[3])
    first = book.read([tokens[0][:20], tokens[1][:9], tokens[2][:2]], steps=0)  # a chunk of two tokens counts at once
    wrong = (tokens[0][22:24] + 1) % 4000
    drafts = [torch.cat([tokens[0][20:22], wrong]), tokens[1][9:12], tokens[2][2:35]]
    second = book.read(drafts, [0, 0, 0], Snapshots.at([14], [spare]), steps=2)
    book.lengths = [22, 12, 35]  # the two wrong drafts do not count
    third = book.read([tokens[0][22:23], tokens[1][12:29], tokens[2][35:]], [2, 3, 0], steps=1)
    for n, (a, b, c) in enumerate(zip(first, second, third, strict=True)):
        b = b[:2] if n == 0 else b
        assert relative_error(torch.cat([a, b, c]), expected[n][: len(a) + len(b) + len(c)]) < TOLERANCE
    book.slots, book.lengths = torch.stack([book.slots[0], book.slots[1], book.slots[3]]), [23, 29, 16]
    resumed = book.read([tokens[0][23:24], tokens[1][29:], tokens[2][16:40]], [1, 0, 0], steps=1)
    assert relative_error(resumed[2], expected[2][16:40]) < TOLERANCE


def test_null_sequences_change_nothing(shipped: Qwen3NextForCausalLM) -> None:
    tokens = random_tokens(shipped, [9, 12])
    expected, book = whole(shipped, tokens), Book(shipped, 2)
    book.read([t[:-1] for t in tokens])
    inputs = inputs_of([tokens[0][-1:], tokens[0][:1], tokens[1][-1:], tokens[0][:1]], [8, 0, 11, 0])
    table = torch.zeros(4, PAGES_OF_EACH, dtype=torch.int32)
    table[0::2] = book.table
    slots = torch.tensor([book.slots[0], -1, book.slots[1], -1], dtype=torch.int32)
    cache = PackedCache(book.memory, table, torch.tensor([9, 0, 12, 0], dtype=torch.int32), slots)
    with torch.no_grad():
        hidden = shipped.model.forward_packed(inputs, cache).hidden
    assert hidden.isfinite().all()
    for row, of_sequence in zip((0, 2), expected, strict=True):
        assert relative_error(hidden[row], of_sequence[-1]) < TOLERANCE


def test_a_sequence_goes_on_from_a_snapshot_and_the_same_pages(shipped: Qwen3NextForCausalLM) -> None:
    tokens = random_tokens(shipped, [60])
    expected, book = whole(shipped, tokens), Book(shipped, 1)
    spare = int(book.slots[1])
    book.read([tokens[0][:40]], snapshots=Snapshots.at([32], [spare]))
    book.slots, book.lengths = book.slots[1:], [32]
    assert relative_error(book.read([tokens[0][32:]])[0], expected[0][32:]) < TOLERANCE


def test_the_mtp_layer_reads_pages_of_its_own() -> None:
    model = tiny_model(3, **EVERY_EXPERT)
    assert model.mtp is not None
    tokens = random_tokens(model, [23])
    with torch.no_grad():
        inputs = inputs_of(tokens, [0])
        output = model.model.forward_packed(inputs)
        following = torch.cat([output.embeddings[1:], output.embeddings[:1]])
        rotary = model.model.rotary_emb(output.hidden, inputs.positions)
        expected = model.mtp(following, output.hidden, inputs, rotary).hidden
        memory = PackedMemory.allocate(
            model.config, pages=2, slots=0, layer_types=("full_attention",), page=16, dtype=torch.float32
        )
        table, slots = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
        ours: list[Tensor] = []
        for start, end in itertools.pairwise((0, 9, 10, 12, 23)):
            part = inputs_of([tokens[0][start:end]], [start])
            cache = PackedCache(memory, table, torch.tensor([end], dtype=torch.int32), slots)
            tables = model.model.rotary_emb(output.hidden, part.positions)
            ours.append(model.mtp(following[start:end], output.hidden[start:end], part, tables, cache).hidden)
    assert relative_error(torch.cat(ours), expected) < TOLERANCE


def test_attention_weights_over_pages_are_refused(shipped: Qwen3NextForCausalLM) -> None:
    book = Book(shipped, 1)
    lengths, slots = torch.tensor([4], dtype=torch.int32), book.slots[:1]
    with pytest.raises(InputError, match="not computed over pages"):
        shipped.model.forward_packed(
            inputs_of(random_tokens(shipped, [4]), [0]),
            PackedCache(book.memory, book.table, lengths, slots),
            wanted=Wanted(attention_weights=True),
        )


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_in_a_graph_equals_the_whole_on_a_gpu() -> None:
    model = Qwen3NextForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval().cuda()
    tokens = random_tokens(model, [50, 21])
    expected, book = whole(model, tokens), Book(model, 2)
    book.read([t[:-4] for t in tokens])
    new = [torch.zeros_like(t[-1:]) for t in tokens]
    inputs = inputs_of(new, [0, 0])
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
    cache = PackedCache(book.memory, book.table, lengths, book.slots[:2].contiguous())
    null = PackedCache(book.memory, book.table, lengths, torch.full_like(cache.slots, -1))
    model.model.forward_packed(inputs, null)  # compiles what the graph holds
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = model.model.forward_packed(inputs, cache).hidden
    assert inputs.token_ids is not None
    for step in range(4, 0, -1):
        inputs.token_ids.copy_(torch.stack([t[-step] for t in tokens]))
        inputs.positions.copy_(torch.tensor([50 - step, 21 - step]))
        lengths.copy_(torch.tensor([51 - step, 22 - step]))
        graph.replay()
        for row, of_sequence in zip(hidden, expected, strict=True):
            assert relative_error(row, of_sequence[-step]) < 1e-3
