"""Several sequences in one engine: each writes, byte for byte, what it writes alone.

At every budget, streamed and resident, greedy and sampled, native models and guests, on every
backend; and what of a sequence can be kept, forked and given up.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.errors import ShapeMismatch, StoreError, UsageError
from chronos.common.experts.feed import FeedStep
from chronos.common.experts.residency import NOBODY
from chronos.common.layout import open_layout, pack
from chronos.common.text.sampling import PIECE, Rules, SamplingParams, Work, draw, pieces
from chronos.run.batch import Batch
from chronos.run.engine import Engine, load
from chronos.run.sequence import OneSequence
from chronos.testing.tiny import CONFIG, tiny_model
from tests.support.company import as_read

GREEDY = SamplingParams()
TOP_K, LAYERS = CONFIG.num_experts_per_tok, CONFIG.num_hidden_layers
VOCAB = CONFIG.vocab_size
# A single token, a few, more than a window, and more than one piece.
PROMPTS = [
    [5],
    [80, 41, 7],
    [7 * i % VOCAB for i in range(3 * CONFIG.sliding_window)],
    [11 * i % VOCAB for i in range(PIECE + 30)],
]
SAMPLED = [
    GREEDY,
    SamplingParams(temperature=1.3, top_k=60, top_p=0.95, seed=11),
    SamplingParams(temperature=2.0, seed=5),
    SamplingParams(temperature=0.8, min_p=0.02, repetition_penalty=1.2, seed=11),
]
BUDGETS = ["resident", "all", "50%", "25%", TOP_K]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    source = tiny_model(folder / "model", max_position_embeddings=4 * PIECE)
    pack(source, folder / "packed")
    return folder / "packed"


def opened(backend: Any, folder: Path, budget: str | int, **options: Any) -> Engine:
    """budget: as `load` takes it, or a number of experts."""
    if isinstance(budget, int):
        budget *= open_layout(folder).record_nbytes
    engine = load(folder, backend=backend.name, budget=budget, **options)
    engine.stop_ids = frozenset()  # random weights like the end token
    return engine


@pytest.fixture(scope="module")
def alone(backend: Any, folder: Path) -> list[list[int]]:
    """What each prompt is answered with by a resident model that has it to itself."""
    with opened(backend, folder, "resident") as engine:
        return [
            engine.generate(prompt, sampling, max_tokens=12).result.tokens
            for prompt, sampling in zip(PROMPTS, SAMPLED, strict=True)
        ]


@pytest.mark.parametrize("prefetch", ["auto", "off"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_four_prompts_together_write_what_each_writes_alone(
    backend: Any, folder: Path, alone: list[list[int]], budget: str | int, prefetch: str
) -> None:
    with opened(backend, folder, budget, prefetch=prefetch) as engine:
        for at_a_time in (4, 3):
            results = engine.generate_many(PROMPTS, SAMPLED, max_tokens=12, max_sequences=at_a_time)
            assert [result.tokens for result in results] == alone
            assert {result.finish_reason for result in results} == {"length"}
        if engine.feed is not None:
            stats = engine.feed.stats()
            assert stats.hits + stats.late + stats.misses == stats.routed
            assert stats.peak_expert_bytes <= engine.budget_bytes


@pytest.mark.parametrize("slots", [TOP_K, TOP_K + 1, 5, 12])
def test_logits_of_company_are_those_of_a_sequence_alone(
    backend: Any, folder: Path, slots: int
) -> None:
    """A prompt's piece beside single tokens, others that come and go: bit for bit, each pass."""
    with opened(backend, folder, "resident") as engine:
        expected = [logits(OneSequence(engine.session), prompt) for prompt in PROMPTS]
    with opened(backend, folder, slots) as engine:
        session, found = engine.session, [[] for _ in PROMPTS]
        left = [list(pieces(seq, prompt, GREEDY)) for seq, prompt in enumerate(PROMPTS)]
        for turn in range(14):
            work = []
            for seq, todo in enumerate(left):
                if turn < 2 * seq:  # each begins two passes after the one before
                    continue
                if todo:
                    work.append(todo.pop(0))
                elif len(found[seq]) < 6:
                    work.append(Work(seq, [9 + len(found[seq])], GREEDY))
            for each, out in zip(work, session.run(work), strict=True):
                assert not isinstance(out, Exception)
                assert (out is None) == (not each.last)
                if each.last:
                    found[each.seq].append(session.logits(each.seq))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs[: len(mine)])
        assert len(mine) >= 5


def logits(sequence: OneSequence, prompt: Sequence[int], steps: int = 5) -> list[np.ndarray]:
    """After the prompt, and after each of some tokens."""
    sequence.prefill(prompt, GREEDY)
    found = [sequence.logits()]
    for number in range(1, steps + 1):
        sequence.decode(9 + number - 1 + 1, GREEDY)
        found.append(sequence.logits())
    return found


@pytest.mark.parametrize("slots", [TOP_K, 12])
def test_the_policy_is_told_what_each_sequence_needs(
    backend: Any, folder: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And which sequences there are, until each has ended."""
    with opened(backend, folder, slots) as engine:
        assert engine.feed is not None
        session, policy, told = engine.session, engine.feed.tier.policy, []
        observe, follow = policy.observe, policy.follow
        monkeypatch.setattr(
            policy, "observe",
            lambda layer, experts, by: told.append((layer, by)) or observe(layer, experts, by),
        )  # fmt: skip
        followed: list[list[int]] = []
        monkeypatch.setattr(policy, "follow", lambda seqs: followed.append([*seqs]) or follow(seqs))
        for seq in (4, 6):
            session.run([Work(seq, [seq, 9], GREEDY, prompt=2)])
        told.clear()
        session.run([Work(seq, [seq + 1], GREEDY) for seq in (4, 6)], record=True)
        for seq in (4, 6):
            [(ids_TLK, _)] = session.routing(seq)
            needs = [[(layer, set(by[seq])) for layer, by in told if seq in by]]
            assert needs == [list(enumerate(set(row) for row in ids_TLK[0].tolist()))]
        session.drop(4)
        session.run([Work(6, [3], GREEDY)])
        assert followed == [[4, 6], [6]]


def test_an_expert_is_read_once_for_all_who_need_it(backend: Any, folder: Path) -> None:
    """Four times the same sequence: as many reads, and as many needs, as one of them has."""
    needs, reads = [], []
    for count in (1, 4):
        with opened(backend, folder, TOP_K, prefetch="off", predictor="lfu") as engine:
            engine.generate_many([PROMPTS[1]] * count, max_tokens=10)
            assert engine.feed is not None
            needs.append(engine.feed.stats().routed)
            reads.append(engine.feed.stats().bytes_read)
    assert needs[0] == needs[1] and reads[0] == reads[1] > 0


def test_texts_are_encoded_as_prompts(backend: Any, folder: Path) -> None:
    with opened(backend, folder, "50%") as engine:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode_prompt("def f(x):")
        text, given = engine.generate_many(["def f(x):", ids], max_tokens=5)
        assert text.tokens == given.tokens == engine.generate(ids, max_tokens=5).result.tokens
        assert text.text == given.text and text.prompt_tokens == len(ids)
        assert engine.generate_many([]) == []


def test_each_ends_by_its_own_rule(backend: Any, folder: Path) -> None:
    context = 4 * PIECE
    with opened(backend, folder, "50%") as engine:
        free = engine.generate(PROMPTS[1], max_tokens=20).result.tokens
        engine.stop_ids = frozenset({free[4]})
        full = [3] * context
        stopped, filled = engine.generate_many([PROMPTS[1], full], max_tokens=20)
    assert stopped.finish_reason == "stop" and stopped.tokens == free[: free.index(free[4])]
    assert filled.finish_reason in ("context", "stop") and len(filled.tokens) <= 1


@pytest.mark.parametrize(
    ("sampling", "options"),
    [([GREEDY], {}), (GREEDY, {"max_sequences": 0}), (GREEDY, {"max_tokens": 0})],
)
def test_nonsense_is_refused(
    backend: Any, folder: Path, sampling: Any, options: dict[str, Any]
) -> None:
    with opened(backend, folder, "50%") as engine, pytest.raises(UsageError):
        engine.generate_many(PROMPTS, sampling, **options)


def test_one_that_fails_leaves_the_others_as_they_are(
    backend: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that fails reaches those who need the expert; they can only be dropped."""
    with opened(backend, folder, "50%", prefetch="off") as engine:
        session = engine.session
        lonely = OneSequence(session, seq=7)
        expected = [lonely.prefill(PROMPTS[1], GREEDY), *(lonely.decode(t, GREEDY) for t in (9, 8))]
        sequences = [OneSequence(session, seq=seq) for seq in (0, 1)]
        first = [
            each.prefill(prompt, GREEDY)
            for each, prompt in zip(sequences, PROMPTS[:2], strict=True)
        ]
        assert first[1] == expected[0]
        needed: list[list[int]] = []
        acquire = FeedStep.acquire

        def fails(step: FeedStep, layer: int, experts: Sequence[int], by: Any = NOBODY) -> Any:
            if layer == LAYERS - 1:
                needed.append(list(experts))
                if len(experts) > TOP_K or len(needed) == 2:  # the union, then the first alone
                    raise StoreError("a disk that is gone")
            return acquire(step, layer, experts, by)

        work = [Work(0, [9], GREEDY), Work(1, [9], GREEDY)]
        with monkeypatch.context() as patch:
            patch.setattr(FeedStep, "acquire", fails)
            broken, fine = session.run(work)
        assert isinstance(broken, StoreError) and fine == expected[1]
        again, fine = session.run([Work(0, [8], GREEDY), Work(1, [8], GREEDY)])
        assert isinstance(again, UsageError) and "middle of a step" in str(again)
        assert fine == expected[2]
        with pytest.raises(UsageError, match="middle of a step"):
            session.fork(0, 5)
        session.drop(0)
        assert session.position(0) == 0 and session.position(1) == len(PROMPTS[1]) + 2
        [token] = session.run(list(pieces(0, PROMPTS[0], GREEDY)))
        assert token == first[0]


def test_a_read_that_fails_for_good_ends_generate_many_and_not_the_engine(
    backend: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, alone: list[list[int]]
) -> None:
    with opened(backend, folder, "25%", prefetch="off") as engine:

        def fails(*_: Any) -> Any:
            raise StoreError("a disk that is gone")

        with monkeypatch.context() as patch:
            patch.setattr(FeedStep, "acquire", fails)
            with pytest.raises(StoreError, match="gone"):
                engine.generate_many(PROMPTS[:2])
        results = engine.generate_many(PROMPTS, SAMPLED, max_tokens=12)
        assert [result.tokens for result in results] == alone


def test_a_mask_says_what_may_be_drawn(backend: Any, folder: Path) -> None:
    sampling = SamplingParams(temperature=1.5, top_k=5, seed=3)
    allowed = np.zeros(VOCAB, bool)
    allowed[[3, 50, 77]] = True
    with opened(backend, folder, "50%") as engine:
        session = engine.session
        for params in (GREEDY, sampling):
            for mask in (allowed, None):
                session.drop(0)
                [token] = session.run(list(pieces(0, PROMPTS[1], params, mask=mask)))
                seen = session.logits(0)
                masked = seen if mask is None else np.where(mask, seen, -np.inf)
                assert token == draw(masked, params, random.Random(3).random())
        for wrong in (np.zeros(VOCAB, bool), np.ones(3, bool)):
            with pytest.raises(UsageError, match="mask"):
                session.run([Work(1, [5], GREEDY, mask=wrong)])


def test_a_bias_is_added_to_the_logits_of_its_sequence_alone(backend: Any, folder: Path) -> None:
    bias = np.zeros(VOCAB, np.float32)
    bias[[3, 50]] = 100.0, 99.0
    allowed = np.ones(VOCAB, bool)
    allowed[3] = False
    with opened(backend, folder, "50%") as engine:
        session = engine.session
        works = [
            *pieces(0, PROMPTS[1], GREEDY, bias=bias),
            *pieces(1, PROMPTS[1], GREEDY),
            *pieces(2, PROMPTS[1], GREEDY, bias=bias, mask=allowed),
        ]
        biased, plain, masked = session.run(works)
        assert (biased, masked) == (3, 50)
        assert plain == int(session.logits(1).argmax())
        np.testing.assert_array_equal(session.logits(0), session.logits(1))  # as the model has them
        for wrong in (np.zeros(3, np.float32), np.full(VOCAB, np.inf, np.float32)):
            with pytest.raises(UsageError, match="bias"):
                session.run([Work(3, [5], GREEDY, bias=wrong)])


@pytest.mark.parametrize("budget", ["all", "25%", TOP_K])
def test_prompts_read_layer_by_layer_beside_tokens_have_the_bits_of_each_alone(
    backend: Any, folder: Path, alone: list[list[int]], budget: str | int
) -> None:
    """A few layers of a piece in each pass, so that tokens do not wait for it."""
    with opened(backend, folder, budget) as engine:
        batch, run, passes = engine.batch(5), engine.session.run, list[Sequence[Work]]()

        def watched(work: Sequence[Work], **options: Any) -> Any:
            passes.append(work)
            return run(work, **options)

        engine.session.run = watched  # type: ignore[method-assign]
        batch.add(0, PROMPTS[0], SAMPLED[0], max_tokens=12)
        batch.step()
        for seq in (1, 2, 3):
            batch.add(seq, PROMPTS[seq], SAMPLED[seq], max_tokens=12)
        batch.add(9, LONG, GREEDY, max_tokens=1)
        batch.step()
        resting = engine.session._resting  # type: ignore[attr-defined]
        assert resting.keys() == {2, 3, 9}
        with pytest.raises(UsageError, match="in the middle"):
            engine.session.fork(3, 20)
        batch.cancel(2)
        assert resting.keys() == {3, 9} and engine.session.position(2) == 0
        batch.add(12, PROMPTS[2], SAMPLED[2], max_tokens=12)
        while len(batch.results) < 6:
            batch.step()
        tokens = {seq: result.tokens for seq, result in batch.results.items()}  # type: ignore[union-attr]
        assert [tokens[seq] for seq in (0, 1, 12, 3)] == alone
        assert not resting
        first = [
            work.layers
            for each in passes
            for work in each
            if (work.seq, len(work.tokens)) == (3, PIECE)
        ]
        assert first == [1] * LAYERS


def test_work_that_makes_no_sense_is_refused(backend: Any, folder: Path) -> None:
    with opened(backend, folder, "50%") as engine:
        twice = [Work(0, [5], GREEDY), Work(0, [6], GREEDY)]
        for work in (twice, [Work(0, [], GREEDY)], [Work(0, [5] * (PIECE + 1), GREEDY)]):
            with pytest.raises(UsageError):
                engine.session.run(work)
        with pytest.raises(UsageError, match="no sequence"):
            engine.session.logits(3)
        assert engine.session.run([]) == []


# What a prefix cache needs.

LONG = [13 * i % VOCAB for i in range(2 * PIECE + 40)]
OTHER = LONG[: 2 * PIECE] + [3, 1, 4]


def run_from(session: Any, seq: int, prompt: Sequence[int], start: int) -> list[Any]:
    found = []
    for work in pieces(seq, prompt, SAMPLED[1], start=start):
        [token] = session.run([work])
    for _ in range(4):
        found.append((token, session.logits(seq).tobytes()))
        [token] = session.run([Work(seq, [token], SAMPLED[1])])
    return found


@pytest.mark.parametrize("budget", ["resident", "25%"])
def test_a_forked_prefix_gives_the_bits_of_a_cold_one(
    backend: Any, folder: Path, budget: str
) -> None:
    with opened(backend, folder, budget) as engine:
        session = engine.session
        cold = run_from(session, 0, OTHER, 0)
        session.drop(0)
        first, second, _ = pieces(0, LONG, GREEDY)
        session.run([first])
        session.run([second])
        session.fork(0, 1)
        assert session.position(1) == 2 * PIECE
        own = run_from(session, 0, LONG, 2 * PIECE)
        assert run_from(session, 1, OTHER, 2 * PIECE) == cold  # whatever 0 did meanwhile
        session.drop(0)
        assert run_from(session, 0, LONG, 0) == own
        with pytest.raises(UsageError, match="there is a sequence"):
            session.fork(0, 1)
        with pytest.raises(UsageError, match="no sequence"):
            session.fork(8, 9)


@pytest.mark.parametrize("routing", ["gate", "history"])
def test_what_was_saved_of_a_sequence_gives_the_bits_of_a_cold_one(
    backend: Any, tmp_path: Path, routing: str
) -> None:
    """Windows that went round, latents, what routing keeps of the past; in another process as well,
    which a second engine stands for."""
    options: dict[str, Any] = {"max_position_embeddings": 4 * PIECE, "routing_source": routing}
    if routing == "history":
        options |= {"num_resident_experts": 2, "num_resident_experts_per_tok": 1}
    pack(tiny_model(tmp_path / "model", **options), tmp_path / "packed")
    with opened(backend, tmp_path / "packed", "50%") as engine:
        cold = run_from(engine.session, 0, OTHER, 0)
        first, second, _ = pieces(1, LONG, GREEDY)
        engine.session.run([first])
        engine.session.run([second])
        saved = as_read(engine.session.save(1))
    with opened(backend, tmp_path / "packed", "all") as engine:
        session, ids = engine.session, LONG[: 2 * PIECE]
        session.restore(3, ids, saved)
        assert session.position(3) == 2 * PIECE
        session.fork(3, 4)
        for _, data in saved:  # nothing shares the file's memory
            data[:] = bytes(len(data))
        assert run_from(session, 4, OTHER, 2 * PIECE) == cold
        assert run_from(session, 3, OTHER, 2 * PIECE) == cold


def test_what_does_not_fit_makes_no_sequence(backend: Any, folder: Path) -> None:
    with opened(backend, folder, "50%") as engine:
        session, [first, *_] = engine.session, pieces(0, LONG, GREEDY)
        session.run([first])
        saved, ids = as_read(session.save(0)), LONG[:PIECE]
        (entry, data), *others = saved
        rows = entry.shape[1] // 2
        half = entry._replace(shape=(entry.shape[0], rows, *entry.shape[2:]))
        wrong = [
            others,
            [(half, data[: len(data) // 2]), *others],
            [*saved, (entry._replace(name="more"), data)],
            [(entry._replace(dtype="BF16", shape=(*entry.shape, 2)), data), *others],
        ]
        for tensors in wrong:
            with pytest.raises(ShapeMismatch):
                session.restore(5, ids, tensors)
            assert session.position(5) == 0
        with pytest.raises(UsageError, match="there is a sequence"):
            session.restore(0, ids, saved)


def test_a_fork_of_a_reply_goes_on_as_the_reply(backend: Any, folder: Path) -> None:
    with opened(backend, folder, "25%") as engine:
        session, params = engine.session, SAMPLED[2]
        [token] = session.run(list(pieces(0, PROMPTS[1], params)))
        session.fork(0, 1)
        draws: dict[int, list[Any]] = {0: [token], 1: [token]}
        for _ in range(6):
            work = [Work(seq, [made[-1]], params) for seq, made in draws.items()]
            for seq, out in zip(draws, session.run(work), strict=True):
                draws[seq].append(out)
        assert draws[0] == draws[1]
        assert len(set(draws[0])) > 2


@pytest.mark.parametrize("budget", ["resident", "25%"])
def test_what_is_kept_of_a_sequence_gives_the_bits_of_a_cold_one(
    backend: Any, tmp_path: Path, budget: str
) -> None:
    """Whole pieces of its prompt, where every layer can go back: with windows that never fill."""
    wide = {"max_position_embeddings": 8 * PIECE, "sliding_window": 8 * PIECE}
    pack(tiny_model(tmp_path / "model", **wide), tmp_path / "packed")
    with opened(backend, tmp_path / "packed", budget) as engine:
        session = engine.session
        cold = run_from(session, 0, OTHER, 0)
        session.drop(0)
        run_from(session, 0, LONG, 0)
        assert session.keep(0, len(OTHER)) == 2 * PIECE == session.position(0)
        assert run_from(session, 0, OTHER, 2 * PIECE) == cold
        assert session.keep(0, PIECE + 100) == PIECE
        assert session.keep(0, 100) == session.position(0) == 0
        assert run_from(session, 0, OTHER, 0) == cold


def test_a_full_window_cannot_go_back(backend: Any, folder: Path) -> None:
    with opened(backend, folder, "25%") as engine:
        session = engine.session
        cold = run_from(session, 0, LONG, 0)
        assert session.keep(0, 2 * PIECE) == session.position(0) == 0
        assert run_from(session, 0, LONG, 0) == cold


def test_what_a_sequence_decoded_is_never_kept(backend: Any, folder: Path) -> None:
    """Single tokens have other bits than the same tokens in a prompt."""
    with opened(backend, folder, "25%") as engine:
        session = engine.session
        session.run(list(pieces(0, PROMPTS[1], GREEDY)))
        for _ in range(3):
            session.run([Work(0, [9], GREEDY)])
        assert session.keep(0, 6) == 0


def test_the_prompt_is_over_once(
    backend: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many pieces it has: the policy is told at its end, of all its tokens."""
    with opened(backend, folder, "25%") as engine:
        assert engine.feed is not None
        tier, told = engine.feed.tier, []
        for name in ("begin_prompt", "end_prompt", "end_token"):
            told_of = getattr(tier, name)

            def note(*args: Any, name: str = name, told_of: Callable[..., Any] = told_of) -> Any:
                told.append((name, *(len(ids_TLK) for ids_TLK in args[:1])))
                return told_of(*args)

            monkeypatch.setattr(tier, name, note)
        assert len(engine.generate(LONG, max_tokens=3).result.tokens) == 3
    expected = [("begin_prompt",), ("end_prompt", len(LONG)), ("end_token",), ("end_token",)]
    assert told == expected


def test_a_prompt_that_is_given_up_leaves_no_sequence(backend: Any, folder: Path) -> None:
    cancel = threading.Event()
    with opened(backend, folder, "25%") as engine:
        run = engine.session.run

        def stops(work: Sequence[Work], **options: Any) -> Any:
            cancel.set()
            return run(work, **options)

        engine.session.run = stops  # type: ignore[method-assign]
        result = engine.generate(LONG, cancel=cancel).result
        assert (result.finish_reason, result.tokens) == ("cancelled", [])
        assert result.stats["decode_tokens"] == 0
        assert not engine.session._sequences  # type: ignore[attr-defined]


def broken(engine: Engine, layer: int = 1) -> Callable[[], None]:
    """Nobody gets experts of that layer until what is returned is called."""
    assert engine.feed is not None
    tier, acquire = engine.feed.tier, engine.feed.tier.acquire

    def refuse(at: int, experts: Sequence[int], by: Any, **options: Any) -> Any:
        if at == layer:
            raise StoreError("broken on purpose")
        return acquire(at, experts, by, **options)

    tier.acquire = refuse  # type: ignore[method-assign]
    return lambda: setattr(tier, "acquire", acquire)


def test_nothing_is_kept_of_a_piece_that_went_half_way(backend: Any, folder: Path) -> None:
    """The second piece is in the caches of some layers when its read fails: `keep` begins anew."""
    with opened(backend, folder, "resident") as engine:
        expected = logits(OneSequence(engine.session), PROMPTS[3], steps=0)[0]
    with opened(backend, folder, TOP_K) as engine:
        session = engine.session
        first, second = pieces(0, PROMPTS[3], GREEDY)
        session.run([first])
        mend = broken(engine)
        [error] = session.run([second])
        assert isinstance(error, StoreError)
        mend()
        start = session.keep(0, PIECE)
        for work in pieces(0, PROMPTS[3], GREEDY, start=start):
            session.run([work])
        np.testing.assert_array_equal(session.logits(0), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_pass_that_raises_is_never_repeated_on_top_of_itself(
    backend: Any, folder: Path, error: type[BaseException]
) -> None:
    """The tokens are in the caches, but nobody was told: running them again would double them."""
    with opened(backend, folder, TOP_K) as engine:
        session, feed = engine.session, engine.feed
        assert feed is not None
        for seq in (0, 1):
            session.run(list(pieces(seq, PROMPTS[1], GREEDY)))
        end = feed.tier.end_token

        def fail() -> Any:
            raise error

        feed.tier.end_token = fail  # type: ignore[method-assign]
        with pytest.raises(error):
            session.run([Work(0, [9], GREEDY), Work(1, [9], GREEDY)])
        feed.tier.end_token = end  # type: ignore[method-assign]
        for out in session.run([Work(0, [9], GREEDY), Work(1, [9], GREEDY)]):
            assert isinstance(out, UsageError)
        session.drop(0)
        [out] = session.run(list(pieces(0, PROMPTS[1], GREEDY)))
        assert isinstance(out, int) and out >= 0


def test_a_prompt_that_fails_at_once_is_over_once_it_is_dropped(backend: Any, folder: Path) -> None:
    with opened(backend, folder, 4, predictor="token-table") as engine:
        session, feed = engine.session, engine.feed
        assert feed is not None
        session.run(list(pieces(1, PROMPTS[1], GREEDY)))
        told: list[str] = []
        begin, end = feed.tier.begin_prompt, feed.tier.end_prompt

        def ended(ids_TLK: np.ndarray, seq: int) -> None:
            told.append(f"end {len(ids_TLK)} of {seq}")
            end(ids_TLK, seq)

        feed.tier.begin_prompt = lambda: (told.append("begin"), begin())[1]  # type: ignore[func-returns-value,method-assign]
        feed.tier.end_prompt = ended  # type: ignore[method-assign]
        mend = broken(engine, layer=0)
        [error] = session.run(list(pieces(0, PROMPTS[1], GREEDY)))
        assert isinstance(error, StoreError)
        mend()
        session.drop(0)
        assert told == ["begin", "end 0 of 0"]
        session.run([Work(1, [9], GREEDY)])
        assert told == ["begin", "end 0 of 0"]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, seed=3)])
def test_no_token_is_made_up_where_none_is_allowed(
    backend: Any, folder: Path, sampling: SamplingParams
) -> None:
    """The mask allows one token and the rules forbid it."""
    mask = np.zeros(VOCAB, bool)
    mask[7] = True
    ruled = dataclasses.replace(sampling, rules=Rules(suppress=(7,)))
    with opened(backend, folder, "resident") as engine:
        session = engine.session
        assert session.run(list(pieces(0, [1, 2], ruled, mask=mask))) == [-1]
        assert session.run(list(pieces(1, [1, 2], sampling, mask=mask[::-1]))) == [VOCAB - 8]
        with pytest.raises(UsageError, match="mask"):
            session.run(list(pieces(2, [1, 2], sampling, mask=mask.astype(np.uint8))))


def test_cancelling_what_has_ended_changes_nothing(backend: Any, folder: Path) -> None:
    with opened(backend, folder, "resident") as engine:
        batch = Batch(engine.session, engine.feed, context=engine.context)
        batch.add(0, [1, 2], GREEDY, max_tokens=1)
        batch.step()
        assert batch.cancel(0) == [] and batch.cancel(9) == []
        result = batch.results[0]
        assert not isinstance(result, Exception) and result.finish_reason == "length"
