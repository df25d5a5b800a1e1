"""Generation on every backend: how it ends, what it refuses, what it counts, how it draws."""

from __future__ import annotations

import dataclasses
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chronos.common.errors import BudgetError, UsageError
from chronos.common.layout import open_layout
from chronos.common.text.generation_config import ReplyDefaults
from chronos.common.text.sampling import Rules, SamplingParams, Work, adjust_logits, draw
from chronos.run.engine import Engine, load
from chronos.run.sequence import OneSequence
from chronos.testing.tiny import CONFIG, tiny_packed

PROMPT = [5, 80, 41]
CONTEXT = CONFIG.max_position_embeddings
# Keys of `generate --json` that a user may rely on.
STATS = (
    "ttft_s decode_tps hits late misses bytes_read bytes_wasted stall_s peak_expert_bytes"
    " fallback_weight"
).split()
LIMIT = "t_res_s t_limit_s eta_limit eta_res eta_bytes".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_packed(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture(scope="module")
def engine(backend: Any, folder: Path) -> Iterator[Engine]:
    with load(folder, backend=backend.name, budget="50%") as engine:
        engine.stop_ids = frozenset()  # random weights like the end token; most tests do not
        yield engine


def greedy(engine: Engine, count: int = 24) -> list[int]:
    return engine.generate(PROMPT, max_tokens=count).result.tokens


def text_of(engine: Engine, tokens: list[int]) -> str:
    assert engine.tokenizer is not None
    return engine.tokenizer.decode(tokens)


def test_steps_join_to_the_result(engine: Engine) -> None:
    steps = engine.generate(PROMPT, max_tokens=24)
    seen = list(steps)
    result = steps.result
    assert [step.token for step in seen if step.token is not None] == result.tokens
    assert "".join(step.text for step in seen) == result.text == text_of(engine, result.tokens)
    assert (result.finish_reason, len(result.tokens), result.prompt_tokens) == ("length", 24, 3)


def test_the_same_again_is_the_same(engine: Engine) -> None:
    assert greedy(engine) == greedy(engine)


def test_what_layers_met_sums_to_the_whole(backend: Any, folder: Path) -> None:
    """Where some must be read again, and where all come to have room."""
    for budget in ("50%", "all"):
        with load(folder, backend=backend.name, budget=budget) as engine:
            greedy(engine)
            assert engine.feed is not None
            layers, stats = engine.feed.layer_stats(), engine.feed.stats()
            assert [each["layer"] for each in layers] == list(engine.feed.layout.moe_layers)
            for name in ("hits", "late", "misses", "bytes_read", "stall_s"):
                whole = getattr(stats, name)
                assert sum(each[name] for each in layers) == pytest.approx(whole), name
            assert stats.routed == sum(e["hits"] + e["late"] + e["misses"] for e in layers) > 0


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(engine: Engine) -> None:
    tokens = greedy(engine)
    text = text_of(engine, tokens)
    ends = [len(text_of(engine, tokens[:count])) for count in range(len(tokens))]
    # Two characters that two tokens bring, and that no earlier text holds.
    at = next(e for e in ends if 0 < e < len(text) - 1 and text.find(text[e - 1 : e + 1]) == e - 1)
    steps = engine.generate(PROMPT, max_tokens=24, stop=["nowhere", text[at - 1 : at + 1]])
    shown = "".join(step.text for step in steps)
    assert shown == steps.result.text == text[: at - 1]
    assert steps.result.finish_reason == "stop"
    assert len(steps.result.tokens) < 24


def test_text_held_back_for_a_stop_string_is_released_at_the_end(engine: Engine) -> None:
    text = text_of(engine, greedy(engine))
    never = text[-1] + "\0"
    assert engine.generate(PROMPT, max_tokens=24, stop=[never]).result.text == text


def test_the_end_token_ends_the_reply_and_is_not_part_of_it(engine: Engine) -> None:
    tokens = greedy(engine)
    last = next(t for at, t in enumerate(tokens) if at > 2 and t not in tokens[:at])
    engine.stop_ids = frozenset({last})
    try:
        result = engine.generate(PROMPT, max_tokens=24).result
    finally:
        engine.stop_ids = frozenset()
    assert result.tokens == tokens[: tokens.index(last)]
    assert result.finish_reason == "stop"


def test_penalties_choose_by_the_ids_so_far(engine: Engine) -> None:
    """Token by token as the formula in NumPy says, of the prompt and of what was written."""
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2)
    found = engine.generate(PROMPT, params, max_tokens=24).result.tokens
    assert found != greedy(engine)
    runner, expected = OneSequence(engine.session), []
    runner.prefill(PROMPT, SamplingParams())
    for _ in found:
        logits = adjust_logits(runner.logits(), PROMPT + expected, len(PROMPT), params)
        expected.append(int(logits.argmax()))
        runner.decode(expected[-1], SamplingParams())
    assert found == expected


def test_the_models_own_penalties_and_rules_are_taken(engine: Engine) -> None:
    plain = greedy(engine)
    engine.defaults = ReplyDefaults(1.5, Rules(suppress=(plain[0],)))
    try:
        own, asked = greedy(engine), engine.generate(
            PROMPT, SamplingParams(repetition_penalty=1.0), max_tokens=24
        ).result.tokens  # fmt: skip
    finally:
        engine.defaults = ReplyDefaults()
    params = SamplingParams(repetition_penalty=1.5, rules=Rules(suppress=(plain[0],)))
    assert own == engine.generate(PROMPT, params, max_tokens=24).result.tokens
    assert plain[0] not in own + asked and own != asked


@pytest.mark.parametrize(("length", "made"), [(CONTEXT - 2, 3), (CONTEXT - 1, 2), (CONTEXT, 1)])
def test_a_full_context_ends_the_generation(engine: Engine, length: int, made: int) -> None:
    result = engine.generate([7] * length, max_tokens=10).result
    assert (result.finish_reason, len(result.tokens)) == ("context", made)


def test_a_prompt_above_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    with pytest.raises(UsageError, match=f"{CONTEXT + 1} tokens.* {CONTEXT}") as caught:
        engine.generate([7] * (CONTEXT + 1))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([], {}),
        ([-1], {}),
        ([CONFIG.vocab_size], {}),
        (PROMPT, {"max_tokens": 0}),
        (PROMPT, {"stop": [""]}),
    ],
)
def test_nonsense_is_refused_at_once(
    engine: Engine, prompt: list[int], options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        engine.generate(prompt, **options)


def test_cancel_takes_effect_at_the_next_token(engine: Engine) -> None:
    cancel = threading.Event()
    steps = engine.generate(PROMPT, max_tokens=50, cancel=cancel)
    next(steps)
    next(steps)
    cancel.set()
    assert (steps.result.finish_reason, len(steps.result.tokens)) == ("cancelled", 2)
    before = engine.generate(PROMPT, cancel=cancel).result
    assert (before.finish_reason, before.tokens) == ("cancelled", [])


def test_cancel_takes_effect_within_a_long_prompt(backend: Any, tmp_path: Path) -> None:
    folder = tiny_packed(tmp_path / "model", max_position_embeddings=4096)
    cancel = threading.Event()
    with load(folder, backend=backend.name, budget="25%") as engine:
        run, calls = engine.session.run, []

        def counted(work: Sequence[Work], **options: Any) -> list[int | None | Exception]:
            calls.append([len(each.tokens) for each in work])
            cancel.set()
            return run(work, **options)

        engine.session.run = counted  # type: ignore[method-assign]
        result = engine.generate([7] * 2000, cancel=cancel).result
    assert (result.finish_reason, result.tokens) == ("cancelled", [])
    assert calls == [[512]]


def test_a_new_generation_ends_the_one_before(engine: Engine) -> None:
    first = engine.generate(PROMPT, max_tokens=50)
    next(first)
    assert greedy(engine) == greedy(engine)
    assert list(first) == []
    with pytest.raises(UsageError, match="closed"):
        _ = first.result


def test_seeds_repeat_and_differ(engine: Engine) -> None:
    def sampled(seed: int | None) -> list[int]:
        params = SamplingParams(temperature=2.0, seed=seed)
        return engine.generate(PROMPT, params, max_tokens=24).result.tokens

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    assert sampled(None) != sampled(None)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.5),
        SamplingParams(temperature=0.7, top_k=20),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=2.0, top_k=50, top_p=0.9, min_p=0.02),
    ],
)
def test_draws_are_those_of_the_reference(engine: Engine, params: SamplingParams) -> None:
    """Every backend takes what `common.sampling.draw` takes; a seed is that of `random.Random`."""
    runner = OneSequence(engine.session)
    for seed in range(20):
        runner.reset()
        token = runner.prefill(PROMPT, dataclasses.replace(params, seed=seed))
        assert token == draw(runner.logits(), params, random.Random(seed).random())


def test_a_prompt_is_text_or_ids_of_any_kind(engine: Engine) -> None:
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode_prompt("def f(")
    want = engine.generate(ids, max_tokens=8).result
    for prompt in ("def f(", tuple(ids), np.array(ids), np.array(ids, np.uint16), iter(ids)):
        assert engine.generate(prompt, max_tokens=8).result.tokens == want.tokens
    many = engine.generate_many(["def f(", np.array(ids)], max_tokens=8)
    assert [result.tokens for result in many] == [want.tokens] * 2


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([1.0, 2.0], "a list with float"),
        (["def"], "a list with str"),
        (np.array([1.0, 2.0]), r"an array of float64 \(2,\)"),
        (np.ones((2, 3), int), r"an array of int64 \(2, 3\)"),
        (b"def", "bytes"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(engine: Engine, prompt: Any, named: str) -> None:
    with pytest.raises(UsageError, match=f"a text or a row of token ids, not {named}\n") as caught:
        engine.generate(prompt)
    assert "list of int" in caught.value.fix and "\n" not in caught.value.what
    with pytest.raises(UsageError, match="takes a list of prompts"):
        engine.generate_many("def")


def in_a_thread(call: Callable[[], Any]) -> Any:
    """What a call in another thread gives, or the error that it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).exception() or pool.submit(call).result()


def test_a_second_thread_is_refused_until_the_first_ones_generation_ends(engine: Engine) -> None:
    first = engine.generate(PROMPT, max_tokens=24)
    made = [next(first).token]
    for call in (
        lambda: engine.generate(PROMPT),
        lambda: engine.generate_many([PROMPT]),
    ):
        error = in_a_thread(call)
        assert isinstance(error, UsageError), error
        assert "answering in another thread" in error.what and "generate_many" in error.fix
    assert made + [step.token for step in first] == greedy(engine)
    assert not isinstance(in_a_thread(lambda: engine.generate(PROMPT).close()), Exception)
    abandoned = engine.generate(PROMPT)
    next(abandoned)
    del abandoned  # nobody can ask for its next step
    assert not isinstance(in_a_thread(lambda: engine.generate(PROMPT).close()), Exception)
    assert len(greedy(engine)) == 24


def test_a_step_that_another_thread_makes_is_not_disturbed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for a step, closing and a new call, while a pass runs: each is refused."""
    first, errors = engine.generate(PROMPT, max_tokens=24), []
    run = type(engine.session).run

    def meddle() -> None:
        for call in (lambda: next(first), first.close, engine.close, lambda: greedy(engine)):
            with pytest.raises(UsageError, match="another thread") as caught:
                call()
            errors.append(caught.value)

    def slow(self: Any, work: Any, **options: Any) -> Any:
        if not errors:
            thread = threading.Thread(target=meddle)
            thread.start()
            thread.join()
        return run(self, work, **options)

    monkeypatch.setattr(type(engine.session), "run", slow)
    tokens = first.result.tokens
    assert len(errors) == 4 and tokens == greedy(engine)


def test_the_public_names_of_an_engine_are_few_and_documented() -> None:
    methods = {"generate", "generate_many", "batch", "check", "limit", "prefetch_stats", "close"}
    sizes = {"expert_bytes_total", "budget_bytes"}
    assert {name for name in vars(Engine) if not name.startswith("_")} == methods | sizes
    assert all(getattr(Engine, name).__doc__ for name in methods | sizes)


def test_the_attributes_of_an_engine_are_in_its_docstring(engine: Engine) -> None:
    told = set(re.findall(r"\w+", Engine.__doc__ or ""))
    assert {name for name in vars(engine) if not name.startswith("_")} <= told


def test_stats_add_up_and_name_the_limit(engine: Engine) -> None:
    steps = engine.generate(PROMPT, max_tokens=24, record=True)
    for _ in steps:
        assert engine.feed is not None
        assert engine.feed.stats().live_bytes <= engine.budget_bytes
    stats = steps.result.stats
    assert set(STATS) <= stats.keys()
    assert stats["hits"] + stats["late"] + stats["misses"] == stats["routed"]
    needs = CONFIG.num_hidden_layers * CONFIG.num_experts_per_tok * 23  # the last is not fed back
    assert needs < stats["routed"] <= needs + len(PROMPT) * needs // 23
    assert stats["peak_expert_bytes"] <= engine.budget_bytes < engine.expert_bytes_total
    assert stats["decode_tokens"] == 23
    shares = {"prefetch_precision", "prefetch_recall"}  # of what may not have happened
    assert all(value is not None for name, value in stats.items() if name not in shares)
    limit = engine.limit(steps.result)
    assert limit is not None and set(LIMIT) <= limit.keys()
    assert 0 < limit["eta_bytes"] <= 1


def test_the_limit_is_computed_where_it_is_asked_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine.generate(PROMPT, max_tokens=24, record=True).result
    limit = engine.limit(first)
    with monkeypatch.context() as patch:
        patch.delattr("chronos.run.meter.simulate")
        plain = engine.generate(PROMPT, max_tokens=24).result
    assert "limit" not in plain.stats
    with pytest.raises(UsageError, match="not recorded") as caught:
        engine.limit(plain)
    assert "record=True" in caught.value.fix
    assert engine.limit(first) == limit  # whatever has run since


def test_a_resident_model_reads_nothing(backend: Any, folder: Path, engine: Engine) -> None:
    with load(folder, backend=backend.name, budget="resident") as resident:
        resident.stop_ids = frozenset()
        result = resident.generate(PROMPT, max_tokens=24).result
        assert resident.feed is None
        assert resident.budget_bytes == resident.expert_bytes_total
    assert result.tokens == greedy(engine)
    assert result.stats["bytes_read"] == result.stats["routed"] == 0


def test_a_budget_below_the_minimum_names_it(backend: Any, folder: Path) -> None:
    record = open_layout(folder).record_nbytes
    with pytest.raises(BudgetError, match=f"at least {CONFIG.num_experts_per_tok * record} bytes"):
        load(folder, backend=backend.name, budget=record)


def test_an_unpacked_folder_runs_resident_and_only_so(backend: Any, folder: Path) -> None:
    unpacked = folder.with_name(folder.name + "-unpacked")
    with load(unpacked, backend=backend.name) as engine:
        assert engine.feed is None
    with pytest.raises(UsageError, match="chronos pack"):
        load(unpacked, backend=backend.name, budget="25%")


@pytest.mark.parametrize(
    "options",
    [
        {"miss": "maybe"},
        {"prefetch": "on"},
        {"predictor": "mru"},
        {"budget": "lots"},
        {"warm": "lots"},
        {"warm": "lots", "budget": "resident"},
    ],
)
def test_unknown_choices_are_refused_before_a_framework_is_imported(
    backend: Any, folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("chronos.backends.load")
    with pytest.raises(UsageError):
        load(folder, backend=backend.name, **options)


def test_a_warm_tier_where_nothing_is_streamed_is_said_to_be_unused(
    backend: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with load(folder, backend=backend.name, budget="resident", warm="1MiB") as whole:
        assert whole.feed is None
    assert "warm tier of 1MiB is not used" in caplog.text


def test_close_twice_and_use_after(backend: Any, folder: Path) -> None:
    threads = threading.active_count()
    engine = load(folder, backend=backend.name, budget="25%")
    steps = engine.generate(PROMPT, max_tokens=9)
    next(steps)
    engine.close()
    engine.close()
    assert list(steps) == []
    assert threading.active_count() == threads
