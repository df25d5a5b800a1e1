"""What a model does on text: its routing as a trace, its loss, how well its lookahead is right.

Given a backend's model or session; tokens in, plain numbers out. Locality is always reported with
the entropy it may have been bought with. Not covered: task quality.

Shape legend: T tokens, L layers, K top-k, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chronos.common.data import (
    Batch,
    Document,
    PackedDataset,
    encode_documents,
    pack_documents,
    read_documents,
    split_documents,
    stdlib_documents,
)
from chronos.common.errors import DataError
from chronos.common.text.sampling import SamplingParams
from chronos.common.traces.trace import RoutingTrace, TraceRecorder
from chronos.run.sequence import OneSequence

if TYPE_CHECKING:
    from chronos.backends.protocol import Observed, Session
    from chronos.common.model.guest import Geometry
    from chronos.common.text.tokenizer import Tokenizer

STDLIB = "stdlib"
STDLIB_HELD_OUT = 0.02  # the share that recipes/demo.toml keeps from training
Progress = Callable[[int, int], None]


def documents_of(data: str, held_out: float | None = None, skip_bad: int = 0) -> list[Document]:
    """Documents of a path or of `stdlib`; with `held_out`, those a recipe with that
    validation_share does not train on (for stdlib, STDLIB_HELD_OUT unless 0 is asked for)."""
    if data == STDLIB:
        documents = stdlib_documents()
        held_out = STDLIB_HELD_OUT if held_out is None else held_out
    else:
        documents = list(read_documents(data, skip_bad))
    if not held_out:
        return documents
    kept = split_documents(documents, held_out)[1]
    if not kept:
        raise DataError(
            f"a share of {held_out} keeps none of the {len(documents)} documents from training",
            data,
            "a text file is one document: give more files or rows, or --held-out 0 for all",
        )
    return kept


def record(
    session: Session,
    config: Geometry,
    sequences: Iterable[Sequence[int]],
    *,
    max_tokens: int,
    new_tokens: int = 0,
    model: str = "",
    layers: Sequence[int] | None = None,
    expert_bytes: int | None = None,
    progress: Progress = lambda done, total: None,
) -> RoutingTrace:
    """Routing of the sequences, each from an empty context, up to `max_tokens` tokens in all.

    layers: those with experts, where others have none. expert_bytes: of one record, kept in meta.

    With `new_tokens` every sequence is a prompt, and only what the model writes after it, greedily,
    is recorded.
    """
    phase = "generation" if new_tokens else "prefill"
    recorder = TraceRecorder(
        config.num_experts,
        config.num_experts_per_tok,
        model=model,
        phase=phase,
        layers=layers,
        extra={"expert_bytes": expert_bytes} if expert_bytes else None,
    )
    sequence = OneSequence(session, record=True)
    done = 0
    for ids in sequences:
        if done >= max_tokens:
            break
        sequence.reset()
        recorder.new_sequence()
        ids = list(ids) if new_tokens else list(ids)[: max_tokens - done]
        count = min(new_tokens, max_tokens - done)
        tokens, parts = _routing(sequence, ids, count)
        for ids_TLK, weights_TLK in parts:
            recorder.append(ids_TLK, weights_TLK, tokens[: len(ids_TLK)])
            tokens = tokens[len(ids_TLK) :]
            done += len(ids_TLK)
        progress(done, max_tokens)
    return recorder.trace()


def _routing(
    sequence: OneSequence, ids: list[int], new_tokens: int
) -> tuple[list[int], Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any] | None]]]:
    """The tokens that were run, and the routing of them in parts."""
    greedy = SamplingParams()
    token = sequence.prefill(ids, greedy)
    if not new_tokens:
        return ids, sequence.routing()
    sequence.routing()
    written = []
    for _ in range(new_tokens):
        written.append(token)
        token = sequence.decode(token, greedy)
    return written, sequence.routing()


def cut(tokenizer: Tokenizer, documents: Sequence[Document], length: int) -> Iterator[list[int]]:
    """Token ids of pieces of documents, each of at most `length` and more than one.

    Rows of conversations, completions and prompts come first, each piece by piece, a prompt of
    messages opened for the answer; then the beginnings of texts, then what follows further on in
    each. Raises DataError for preference rows.
    """
    for document in documents:
        if document.kind != "text":
            for ids, _ in _windows(_row(tokenizer, document), (), length):
                yield ids
    yield from _cut_texts(tokenizer, documents, length)


def labelled(
    tokenizer: Tokenizer, documents: Sequence[Document], length: int
) -> Iterator[tuple[list[int], Sequence[bool]]]:
    """The pieces of `cut`, each with the ids that count as labels, as training has them. Raises
    DataError for rows without any."""
    for document in documents:
        if document.kind != "text":
            encoded = encode_documents(tokenizer, [document])
            yield from _windows(encoded.ids[0].tolist(), encoded.trained[0].tolist(), length)
    for ids in _cut_texts(tokenizer, documents, length):
        yield ids, [True] * len(ids)


def _cut_texts(
    tokenizer: Tokenizer, documents: Sequence[Document], length: int
) -> Iterator[list[int]]:
    texts, stride = [document.text for document in documents], 8 * length
    for start in range(0, max(map(len, texts), default=0), stride):
        for text in texts:
            ids = tokenizer.encode_prompt(text[start : start + 2 * stride])[:length]
            if start < len(text) and len(ids) > 1:
                yield ids


def _row(tokenizer: Tokenizer, document: Document) -> list[int]:
    """Ids of a row as the model would read it."""
    if document.kind == "messages":
        return tokenizer.apply_chat(document.messages, reply=False)
    if document.kind not in ("prompt", "completion"):
        raise DataError(f"{document.where}: a {document.kind!r} row has no one text to read")
    prompt, completion = document.prompt, document.completion
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt) + tokenizer.encode(str(completion))
    return tokenizer.apply_chat([*prompt, *completion], reply=not completion)


def _windows(
    ids: list[int], trained: Sequence[bool], length: int
) -> Iterator[tuple[list[int], Sequence[bool]]]:
    for start in range(0, len(ids), length):
        if len(ids) - start > 1:
            yield ids[start : start + length], trained[start : start + length]


def locality(trace: RoutingTrace) -> dict[str, Any]:
    """How much of a token's routing repeats the token before, and how evenly experts are used.

    `repeat` is the share of picks the previous token of the sequence made too, in the same layer;
    `repeat_by_chance` what independent picks of the same frequencies would reach. Entropy is that
    of each layer's picks, in nats; effective experts are its exponential, averaged over layers.
    """
    ids_TLK, seq_T = trace.ids_TLK, trace.seq_T
    share_LE = _shares(trace)
    follows = seq_T[1:] == seq_T[:-1]
    again = (ids_TLK[1:, :, :, None] == ids_TLK[:-1, :, None, :]).any(-1)[follows]
    entropy_L = -(share_LE * np.log(np.maximum(share_LE, 1e-12))).sum(-1)
    chance = np.minimum(1.0, trace.top_k * share_LE)
    return {
        "tokens": trace.num_tokens,
        "repeat": float(again.mean()) if again.size else None,
        "repeat_by_chance": float((share_LE * chance).sum(-1).mean()),
        "entropy": float(entropy_L.mean()),
        "entropy_max": math.log(trace.num_experts),
        "effective_experts": float(np.exp(entropy_L).mean()),
        "largest_share": float(share_LE.max()),
    }


def _shares(trace: RoutingTrace) -> npt.NDArray[np.float64]:
    """[L, E]: each expert's share of its layer's picks."""
    counts = [
        np.bincount(trace.ids_TLK[:, layer].ravel(), minlength=trace.num_experts)
        for layer in range(trace.num_layers)
    ]
    return np.array(counts) / (trace.num_tokens * trace.top_k)


def packed(tokenizer: Tokenizer, documents: Sequence[Document], seq_len: int) -> PackedDataset:
    """The documents as rows to evaluate on."""
    encoded = encode_documents(tokenizer, documents)
    return pack_documents(
        encoded.ids,
        seq_len=seq_len,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        trained=encoded.trained,
    )


def batches(dataset: PackedDataset, *, batch_size: int, max_tokens: int) -> list[Batch]:
    """At most `max_tokens` tokens of the rows, in whole batches."""
    batch_size = min(batch_size, len(dataset))
    rows = max(batch_size, min(len(dataset), max_tokens // dataset.seq_len))
    return [dataset.batch(i, batch_size) for i in range(rows // batch_size)]


def sequence_loss(
    forward: Callable[[npt.NDArray[Any]], Observed],
    sequences: Iterable[tuple[Sequence[int], Sequence[bool]]],
    *,
    max_tokens: int,
) -> dict[str, float]:
    """`loss` without packed rows, which guests do not take: each sequence, with its labels as
    `labelled` gives them, from an empty context. Raises DataError where no token is a label."""
    nats, count, done = 0.0, 0, 0
    for ids, trained in sequences:
        ids_T = np.array(ids[: max_tokens - done + 1])
        if len(ids_T) < 2:
            break
        is_label_T = np.array(trained[1 : len(ids_T)], bool)
        logits_TV = forward(ids_T[None]).logits_BTV[0, :-1]
        top_T = logits_TV.max(-1)
        mass_T = np.exp(logits_TV - top_T[:, None]).sum(-1, dtype=np.float64)
        right_T = logits_TV[np.arange(len(logits_TV)), ids_T[1:]]
        nats += float((np.log(mass_T) + top_T - right_T)[is_label_T].sum())
        count += int(is_label_T.sum())
        done += len(logits_TV)
    if not count:
        raise DataError("no token of the data is a label", "", "raise --max-tokens or --seq-len")
    return {"ce": nats / count}


def summary(
    terms: dict[str, float], dataset: PackedDataset, documents: Sequence[Document]
) -> dict[str, Any]:
    """Loss in nats, perplexity, bits per byte of text, and lookahead recall by tokens ahead.

    Bytes per token are those of the whole data; rows without text (chats) make them an estimate.
    """
    nbytes = sum(len(d.text.encode("utf-8", "surrogatepass")) for d in documents)
    recall = [terms[f"recall_{j}"] for j in range(len(terms)) if f"recall_{j}" in terms]
    nats = terms["ce"]
    return {
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": nats / math.log(2) * dataset.tokens / nbytes if nbytes else None,
        "lookahead_recall": recall,
        "terms": terms,
    }
