"""The objectives of the fine-tuning stages against the NumPy formulas: terms, gradients, splits."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest

from chronos.common.data import IGNORE, Batch
from chronos.common.text.sampling import SamplingParams
from chronos.common.training import losses
from chronos.common.training.objectives import (
    Counts,
    Distillation,
    NextToken,
    OddsRatio,
    PolicyGradient,
    Preference,
)
from chronos.common.training.recipe import OptimizerRecipe
from chronos.run.sequence import OneSequence
from chronos.testing import oracle
from chronos.testing.tolerances import assert_close
from chronos.testing.train_tests import TINY, difference, rows

RECIPE = OptimizerRecipe(clip=1e9, beta1=0.5, seed=3)
PREFERENCES = [
    Preference(),
    Preference(label_smoothing=0.1),
    Preference(kind="ipo"),
    Preference(kind="robust", label_smoothing=0.2),
    Preference(kind="sigmoid_norm", beta=0.5),
    Preference(ld_alpha=0.5),
    Preference(sft=0.3),
]
POLICIES = [
    PolicyGradient(kind=kind, level=level, beta=beta, epsilon=0.1, epsilon_high=0.15, max_tokens=9)
    for kind in ("dapo", "grpo", "dr_grpo", "bnpo")
    for level, beta in (("token", 0.0), ("sequence", 0.1))
]
DISTILLATIONS = [
    Distillation(temperature=2.0),
    *(Distillation(alpha=1.0, jsd=jsd, temperature=2.0) for jsd in (0.0, 0.3, 1.0)),
]
ALL = [
    NextToken(details=True, routing=TINY.loss_weights),
    NextToken(dft=True),
    *PREFERENCES,
    OddsRatio(),
    *POLICIES,
    *DISTILLATIONS,
]


def pairs(count: int = 2, length: int = 12, seed: int = 0) -> Batch:
    """Rows chosen, rejected, ...: a prompt of a few tokens, an answer, pads; of all lengths, one
    answer of a single token, and everything an objective may ask for."""
    rng = np.random.default_rng(seed)
    B, V = 2 * count, TINY.vocab_size
    ids = rng.integers(0, V, (B, length)).astype(np.int32)
    labels, segments = np.full_like(ids, IGNORE), np.zeros_like(ids)
    for row in range(B):
        prompt = int(rng.integers(1, length - 4))
        end = prompt + 1 if row == 1 else int(rng.integers(prompt + 1, length + 1))
        labels[row, prompt - 1 : end - 1] = ids[row, prompt:end]
        segments[row, end:], ids[row, end:] = -1, 0
    N = int((labels != IGNORE).sum())
    extra = {
        "reference": np.where(labels == IGNORE, 0, rng.normal(-4, 1, ids.shape)),
        "old": np.where(labels == IGNORE, 0, rng.normal(-4.2, 0.3, ids.shape)),
        "answer": labels != IGNORE,
        "advantages": rng.normal(0, 1, B),
    }
    arrays = {k: v if v.dtype == bool else v.astype(np.float32) for k, v in extra.items()}
    arrays["teacher"] = rng.normal(0, 1, (N, V)).astype(np.float32)
    return Batch(ids, labels, segments, arrays)


def part(batch: Batch, first: int, last: int) -> Batch:
    """Some rows, and of the teacher the logits at their labels."""
    before = int((batch.labels_BT[:first] != IGNORE).sum())
    inside = int((batch.labels_BT[first:last] != IGNORE).sum())
    found = rows(batch, first, last)
    teacher = batch.extra["teacher"][before : before + inside]
    return dataclasses.replace(found, extra=dict(found.extra) | {"teacher": teacher})


def by_formula(o: Any, logits_BTV: np.ndarray, data: Batch) -> dict[str, float]:
    """The terms of one batch. Where the ratio's `old` is near, both sides of the clip occur."""
    labels, extra = data.labels_BT, data.extra
    lp = losses.label_log_probs(logits_BTV, labels, getattr(o, "temperature", 1.0))
    at = labels != IGNORE
    logp = losses.log_softmax(logits_BTV)
    hit_BT, entropy_BT = at & (logp.argmax(-1) == labels), -(np.exp(logp) * logp).sum(-1)
    if isinstance(o, NextToken):
        found = {
            "ce": losses.dft(lp, labels) if o.dft else losses.cross_entropy(logits_BTV, labels)
        }
        if o.details:
            found["mean_token_accuracy"] = float(hit_BT[at].mean())
            found["entropy"] = float(entropy_BT[at].mean())
        return found
    if isinstance(o, Preference):
        names = ("kind", "beta", "label_smoothing", "ld_alpha")
        found = losses.dpo(lp, extra["reference"], labels, **{n: getattr(o, n) for n in names})
        mean_BT, chosen, rejected = logits_BTV.mean(-1), at[::2], at[1::2]
        found |= {
            "entropy": float(entropy_BT[at].mean()),
            "mean_token_accuracy": float(hit_BT[::2][chosen].mean()),
            "logits/chosen": float(mean_BT[::2][chosen].mean()),
            "logits/rejected": float(mean_BT[1::2][rejected].mean()),
        }
        if o.sft:
            found["nll_loss"] = -float(lp[::2].sum() / (labels[::2] != IGNORE).sum())
        return found
    if isinstance(o, OddsRatio):
        return losses.orpo(lp, extra["answer"], labels, o.beta)
    if isinstance(o, PolicyGradient):
        names = ("kind", "level", "beta", "epsilon", "epsilon_high", "max_tokens")
        found = losses.grpo(
            lp,
            extra["old"],
            extra["reference"],
            extra["advantages"],
            labels,
            **{n: getattr(o, n) for n in names},
        )
        return found if o.beta else {k: v for k, v in found.items() if k != "kl"}
    logits_NV = logits_BTV[labels != IGNORE]
    kd = losses.divergence(logits_NV, extra["teacher"], o.temperature, o.jsd)
    return {"kd": float(kd.mean()), "ce": losses.cross_entropy(logits_BTV, labels)}


ROUTING: dict[str, dict[str, Any]] = {
    "gate": {},
    "history": {
        "routing_source": "history", "num_resident_experts": 2, "num_resident_experts_per_tok": 1,
    },
}  # fmt: skip


def start(backend: Any, **changes: Any) -> Any:
    config = dataclasses.replace(TINY, **changes)
    return backend.train_step(backend.build(config, seed=7), RECIPE)


def state_of(step: Any) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(bytes(data), np.float32).reshape(shape).astype(np.float64)
        for name, _, shape, data in step.state()
    }


def gradients(step: Any) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("exp_avg."): moment / (1 - RECIPE.beta1)
        for name, moment in state_of(step).items()
        if name.startswith("exp_avg.")
    }


@pytest.mark.parametrize(
    "data", [pairs(), pairs(1, seed=1), pairs(3, 9, seed=2)], ids=lambda b: str(b.ids_BT.shape)
)
@pytest.mark.parametrize("o", ALL, ids=repr)
def test_terms_are_the_formulas(backend: Any, o: Any, data: Batch) -> None:
    step = start(backend)
    out = backend.forward(step.model, data.ids_BT, segments_BT=data.segments_BT)
    expected = by_formula(o, out.logits_BTV, data)
    found = step.evaluate([data], o)
    for name, value in expected.items():
        assert_close(found[name], value, "losses", name)
    mix = sum(w * found[n] for n, w in o.weights.items() if w and n in found)
    assert found["loss"] == pytest.approx(mix, rel=1e-6)


@pytest.mark.parametrize("o", ALL, ids=repr)
def test_gradients_by_finite_differences(backend: Any, o: Any) -> None:
    """Along the whole gradient and a random direction together, in float64 by the oracle. DFT's
    weights are those of the start: they have no gradient."""
    o = dataclasses.replace(o, routing=Preference().routing)
    data = pairs()
    step = start(backend)
    weights = state_of(step)
    weights.pop("optimizer.step", None)
    step.step([data], o, 1e-3, 0)
    found = {n: g for n, g in gradients(step).items() if not n.startswith("lookahead.")}
    rng, size = np.random.default_rng(1), 1e-5
    norm = np.sqrt(sum(np.square(g).sum() for g in found.values()))
    direction = {n: g / norm + 0.01 * rng.standard_normal(g.shape) for n, g in found.items()}

    def lp(sign: int) -> Any:
        moved = weights | {n: weights[n] + sign * size * d for n, d in direction.items()}
        return oracle.forward(moved, TINY, data.ids_BT, segments_BT=data.segments_BT).logits_BTV

    start_lp = losses.label_log_probs(lp(0), data.labels_BT)

    def loss(sign: int) -> float:
        if getattr(o, "dft", False):
            gain = np.exp(start_lp) * losses.label_log_probs(lp(sign), data.labels_BT)
            return -float(gain[data.labels_BT != IGNORE].mean())
        terms = by_formula(o, lp(sign), data)
        return sum(w * terms[n] for n, w in o.weights.items() if w and n in terms)

    slope = (loss(1) - loss(-1)) / (2 * size)
    assert norm > 1e-3
    assert_close(sum((found[n] * direction[n]).sum() for n in found), slope, "finite differences")


@pytest.mark.parametrize("o", ALL, ids=repr)
def test_any_split_of_a_batch_is_the_batch(backend: Any, o: Any) -> None:
    """bnpo's divisor is each micro-batch's own: of parts with as many labels it is the joined."""
    joined = pairs(4)
    splits = [(0, 2), (2, 8)]
    if getattr(o, "kind", "") == "bnpo":
        half, splits = part(joined, 0, 4), [(0, 4), (4, 8)]
        ids, labels, segments = (
            np.concatenate([x, x]) for x in (half.ids_BT, half.labels_BT, half.segments_BT)
        )
        twice = {name: np.concatenate([x, x]) for name, x in half.extra.items()}
        joined = Batch(ids, labels, segments, twice)
    found = []
    for batches in ([joined], [part(joined, *split) for split in splits]):
        step = start(backend)
        terms = step.step(batches, o, 1e-3, 0)
        found.append((terms, gradients(step)))
    for name, value in found[0][0].items():
        if name in ("clip_ratio/low_min", "clip_ratio/high_max"):  # of micro-batches, as TRL's
            continue
        assert found[1][0][name] == pytest.approx(value, rel=2e-6, abs=2e-6), name
    assert difference(found[1][1], found[0][1]) < 1e-6


@pytest.mark.parametrize("o", [Preference(), OddsRatio(), DISTILLATIONS[0]], ids=repr)
def test_logits_in_tiles_are_the_same(
    backend: Any, o: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, found = pairs(3), []
    for tile in (None, 4 * TINY.vocab_size * 5):
        if tile:
            module = importlib.import_module(f"{backend.__name__}.losses")
            monkeypatch.setattr(module, "TILE_BYTES", tile)
        step = start(backend)
        found.append((step.step([data], o, 1e-3, 0), gradients(step)))
    assert found[0][0]["loss"] == pytest.approx(found[1][0]["loss"], rel=1e-6)
    assert difference(found[1][1], found[0][1]) < 1e-6


@pytest.mark.parametrize("frozen", ["gate", "states"])
@pytest.mark.parametrize("routing", ROUTING)
def test_anchor(backend: Any, frozen: str, routing: str) -> None:
    """0 and without gradient where nothing has moved; the formula's value and a gradient into the
    gates where it has."""
    o = NextToken(anchor=2.0, routing=Preference().routing)
    data = pairs()
    step = start(backend, **ROUTING[routing])
    if frozen == "gate":
        backend.anchor(step.model)
    else:
        known = backend.score(step.model, data)
        extra = {"reference_probs": known.probs_BTLE, "reference_ids": known.ids_BTLK}
        data = dataclasses.replace(data, extra=dict(data.extra) | extra)
    terms = step.step([data], o, 1e-2, 0)
    assert terms["anchor"] == pytest.approx(0, abs=1e-7) and terms["router/shift"] == 0
    out = backend.score(step.model, data)
    found = step.evaluate([data], o)
    assert found["anchor"] > 1e-6
    if frozen == "states":
        p, r = (np.moveaxis(x, 2, 0) for x in (out.probs_BTLE, data.extra["reference_probs"]))
        assert_close(found["anchor"], losses.anchor(p, r, data.segments_BT), "losses")
        ids, known_ids = (np.moveaxis(x, 2, 0) for x in (out.ids_BTLK, data.extra["reference_ids"]))
        moved = losses.shift(ids, known_ids, data.segments_BT)
        assert found["router/shift"] == pytest.approx(moved, abs=1e-6)
    held = []
    for anchor in (0.0, 1000.0):
        step = start(backend, **ROUTING[routing])
        backend.anchor(step.model)
        for i in range(5):
            step.step([pairs()], dataclasses.replace(o, anchor=anchor), 1e-3, i)
        held.append(step.evaluate([pairs()], o)["anchor"])
    assert held[1] < held[0] / 3


def test_policy_is_reference(backend: Any) -> None:
    """DPO's loss is ln 2 and its margins 0; the divergence is 0; the ratio exactly 1."""
    data, step = pairs(), start(backend)
    known = backend.score(step.model, data).log_probs_BT
    same = dataclasses.replace(data, extra=dict(data.extra) | {"reference": known})
    terms = step.evaluate([same], Preference())
    assert terms["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert terms["rewards/margins"] == pytest.approx(0, abs=1e-6)
    extra = {n: a for n, a in same.extra.items() if n != "old"}
    terms = step.evaluate([dataclasses.replace(same, extra=extra)], PolicyGradient(beta=0.1))
    assert terms["kl"] == pytest.approx(0, abs=1e-6)
    assert terms["clip_ratio/region_mean"] == 0
    labels = (data.labels_BT != IGNORE).sum(1)
    gain = (labels * data.extra["advantages"]).sum() / labels.sum()
    assert terms["policy"] == pytest.approx(-gain, rel=1e-5)


def test_clip_ratios_of_answers(backend: Any) -> None:
    """The least and the most of an answer's tokens that were clipped; one that trains nothing does
    not count."""
    step, random = start(backend), np.random.default_rng(0)
    ids = random.integers(3, 60, (5, 9)).astype(np.int32)
    labels = np.roll(ids, -1, 1)
    labels[:, :3], labels[0, 6:], labels[4] = IGNORE, IGNORE, IGNORE
    data, signs = Batch(ids, labels, np.zeros_like(ids)), np.array([1, -1, -1, -1, 1], np.float32)
    known = backend.score(step.model, data).log_probs_BT
    old = known + 0.8 * random.standard_normal(known.shape).astype(np.float32)
    terms = step.evaluate(
        [data.with_extra({"advantages": signs, "old": old})], PolicyGradient(epsilon_high=0.2)
    )
    trained, ratio, up = labels != IGNORE, np.exp(known - old), signs[:, None] > 0
    shares = [
        (clipped & trained).sum(1)[:4] / trained.sum(1)[:4]
        for clipped in ((ratio < 0.8) & ~up, (ratio > 1.2) & up)
    ]
    assert terms["clip_ratio/low_min"] == pytest.approx(shares[0].min(), abs=1e-6)
    assert terms["clip_ratio/high_max"] == pytest.approx(shares[1].max(), abs=1e-6)
    assert shares[1].max() > 0


@pytest.mark.parametrize("routing", ROUTING)
def test_replayed_experts(backend: Any, routing: str) -> None:
    """Those the routers choose by themselves change no gradient, the gates' least of all; others
    change the loss, and the gates that weigh them learn still."""
    o, data, found = PolicyGradient(), pairs(), []
    model = start(backend, **ROUTING[routing]).model
    own = backend.score(model, data).ids_BTLK
    others = (own + 1) % TINY.num_experts if routing == "gate" else own[:, ::-1]
    for picks in (None, own, others):
        more = {} if picks is None else {"picks": picks.astype(np.int32)}
        step = start(backend, **ROUTING[routing])
        found.append((step.step([data.with_extra(more)], o, 1e-3, 0), gradients(step)))
    (terms, plain), (same_terms, same), (other_terms, other) = found
    assert same_terms["loss"] == terms["loss"] and difference(same, plain) < 1e-7
    assert abs(other_terms["loss"] - terms["loss"]) > 1e-5
    for gradient in (same, other):
        gates = [gradient[name] for name in gradient if name.endswith("mlp.gate.weight")]
        assert gates and all(np.abs(gate).max() > 1e-7 for gate in gates)
    named = data.with_extra({"picks": others.astype(np.int32)})
    scores = backend.score(model, named, replay=True)
    np.testing.assert_array_equal(scores.ids_BTLK, others)
    assert np.abs(scores.log_probs_BT - backend.score(model, named).log_probs_BT).max() > 1e-5


def test_teacher_is_student(backend: Any) -> None:
    data, step = pairs(), start(backend)
    out = backend.forward(step.model, data.ids_BT, segments_BT=data.segments_BT)
    same = dict(data.extra) | {"teacher": out.logits_BTV[data.labels_BT != IGNORE]}
    for o in DISTILLATIONS:
        found = step.evaluate([dataclasses.replace(data, extra=same)], o)
        assert found["kd"] == pytest.approx(0, abs=1e-6)


def padded(batch: Batch, left: int, right: int) -> Batch:
    """The rows between padding of random tokens."""
    rng, sides = np.random.default_rng(4), ((0, 0), (left, right))
    outside = np.pad(np.zeros(batch.ids_BT.shape, bool), sides, constant_values=True)
    noise = rng.integers(0, TINY.vocab_size, outside.shape).astype(np.int32)
    return Batch(
        np.where(outside, noise, np.pad(batch.ids_BT, sides)),
        np.pad(batch.labels_BT, sides, constant_values=IGNORE),
        np.pad(batch.segments_BT, sides, constant_values=-1),
    )


def test_scores_do_not_depend_on_padding_or_company(backend: Any) -> None:
    data, model = pairs(3), backend.build(TINY, seed=7)
    at = data.labels_BT != IGNORE
    expected = backend.score(model, data).log_probs_BT
    for left, right in ((5, 0), (0, 6), (3, 2)):
        found = backend.score(model, padded(data, left, right)).log_probs_BT
        np.testing.assert_allclose(found[:, left : left + at.shape[1]][at], expected[at], atol=2e-6)
    arrays = (data.ids_BT, data.labels_BT, data.segments_BT)
    turned = Batch(*(x[::-1].copy() for x in arrays))
    found = backend.score(model, turned).log_probs_BT[::-1]
    np.testing.assert_allclose(found[at], expected[at], atol=2e-6)
    for row in range(len(at)):
        used = int((data.segments_BT[row] >= 0).sum())
        alone = Batch(*(x[row : row + 1, :used] for x in arrays))
        found = backend.score(model, alone).log_probs_BT[0]
        np.testing.assert_allclose(found, expected[row, :used], atol=2e-6)


def test_scores_are_those_of_decoding(backend: Any) -> None:
    """A label's log-probability is what sampling gives that token after the ones before it."""
    data, model = pairs(1), backend.build(TINY, seed=7)
    scores = backend.score(model, data).log_probs_BT[0]
    runner, sampling = OneSequence(backend.session(model)), SamplingParams()
    for t in range(int((data.segments_BT[0] >= 0).sum())):
        step, token = (runner.decode if t else runner.prefill), int(data.ids_BT[0, t])
        step(token if t else [token], sampling)
        if (label := data.labels_BT[0, t]) != IGNORE:
            assert losses.log_softmax(runner.logits())[label] == pytest.approx(scores[t], abs=2e-6)


def test_a_masked_answer_leaves_the_denominator(backend: Any) -> None:
    """DAPO's loss with one of three answers masked is that of the other two."""
    whole = pairs(2)
    three, cut = part(whole, 0, 3), part(whole, 0, 3)
    labels = three.labels_BT.copy()
    labels[2] = IGNORE
    cut = dataclasses.replace(cut, labels_BT=labels)
    for kind in ("dapo", "grpo", "dr_grpo"):
        o = PolicyGradient(kind=kind, max_tokens=9)
        step = start(backend)
        found, expected = step.evaluate([cut], o), step.evaluate([part(whole, 0, 2)], o)
        assert found["policy"] == pytest.approx(expected["policy"], rel=1e-6)
        assert found["policy"] != pytest.approx(step.evaluate([three], o)["policy"], rel=1e-3)


def test_accuracies_are_of_pairs_in_any_split(backend: Any) -> None:
    """Three of four pairs, in micro-batches of one and three."""
    joined, step = pairs(4), start(backend)
    own = backend.score(step.model, joined).log_probs_BT
    at = joined.labels_BT != IGNORE
    margin = np.array([0.5, -0.5] * 3 + [-50.0, 0.5])[:, None]  # of chosen and rejected
    known = np.where(at, own - margin, 0).astype(np.float32)
    joined = dataclasses.replace(joined, extra=dict(joined.extra) | {"reference": known})
    parts = [part(joined, 0, 2), part(joined, 2, 8)]
    for batches in ([joined], parts):
        found = step.step(batches, Preference(), 0.0, 0)
        assert found["rewards/accuracies"] == pytest.approx(0.75)
        assert found["rewards/margins"] < 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_an_old_policy_the_own_one_is_it(backend: Any, level: str) -> None:
    """Its gradient too: ratios are 1 and not constant."""
    o = PolicyGradient(kind="grpo", level=level, beta=0.1)
    data, found = pairs(), []
    known = backend.score(start(backend).model, data).log_probs_BT
    for extra in ({"old": known}, {}):
        step = start(backend)
        kept = {name: array for name, array in data.extra.items() if name != "old"} | extra
        step.step([dataclasses.replace(data, extra=kept)], o, 1e-3, 0)
        found.append(gradients(step))
    assert max(np.abs(gradient).max() for gradient in found[1].values()) > 1e-3
    assert difference(found[1], found[0]) < 1e-5


def formula(backend: Any, o: Any, logits_NV: np.ndarray, data: Batch, term: str) -> Any:
    """A term of one backend's loss of these logits, rows of one token each, and its gradient."""
    module = importlib.import_module(f"{backend.__name__}.losses")
    own = dict(o.count(data))
    counts = Counts({name: max(number, 1) for name, number in own.items()}, (len(logits_NV),))

    def value(x: Any, arrays: Any) -> Any:
        def labels(function: Any, *others: Any) -> Any:
            return [y[:, None] for y in function(x, arrays["labels"][:, 0], *others)]

        return module.OBJECTIVES[o.name](labels, arrays, o, counts)[term]

    if backend.name == "torch":
        import torch

        arrays = module.tensors_of(data, torch.device("cpu"))
        x = torch.tensor(logits_NV, dtype=torch.float32, requires_grad=True)
        found = value(x, arrays)
        found.backward()
        return float(found.detach()), x.grad.numpy()
    import mlx.core as mx

    arrays = module.tensors_of(data)
    found, slope = mx.value_and_grad(lambda x: value(x, arrays))(mx.array(logits_NV, mx.float32))
    return float(found), np.array(slope)


def tokens_of(labels: Any, **extra: Any) -> Batch:
    """A row for each label, of one token."""
    labels_B1 = np.array(labels, np.int32)[:, None]
    arrays = {name: np.array(array, np.float32) for name, array in extra.items()}
    return Batch(np.zeros_like(labels_B1), labels_B1, np.zeros_like(labels_B1), arrays)


def test_the_divergences_gradient_is_that_of_reverse_kl(backend: Any) -> None:
    """k3 alone has the gradient of the forward one. Samples are the policy of three
    tokens itself, so its expectation is exact."""
    p, q, labels = np.array([3, 2, 1]) / 6, np.array([0.2, 0.5, 0.3]), [0, 0, 0, 1, 1, 2]
    data = tokens_of(labels, advantages=np.zeros(6), reference=np.log(q)[labels][:, None])
    logits = np.tile(np.log(p), (6, 1))
    value, slope = formula(backend, PolicyGradient(beta=1.0), logits, data, "policy")
    kl = float((p * np.log(p / q)).sum())
    assert value == pytest.approx(kl, rel=1e-5)
    np.testing.assert_allclose(slope.sum(0), p * (np.log(p / q) - kl), atol=1e-6)


@pytest.mark.parametrize("gap", [20.0, 9.0, 0.0, -50.0])
def test_odds_near_certainty_have_a_finite_gradient(backend: Any, gap: float) -> None:
    """Of a token whose logit lies so far above the other's: float64's up to where float32 knows
    no probability below 1 any more."""
    data = tokens_of([0, 0], answer=[[1], [1]])
    logits = np.array([[gap, 0.0], [1.0, 0.0]])
    value, slope = formula(backend, OddsRatio(), logits, data, "log_odds_ratio")
    assert np.isfinite(value) and np.isfinite(slope).all()
    if gap < 15:  # the odds of the two tokens are e^gap and e
        assert value == pytest.approx(-np.logaddexp(0, 1 - gap), rel=1e-3)
        share = 1 / (1 + np.exp(gap - 1))
        np.testing.assert_allclose(slope[0], [share, -share], rtol=1e-3, atol=1e-6)
