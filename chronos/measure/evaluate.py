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
    counted,
    encode_documents,
    pack_documents,
    read_documents,
    split_documents,
    stdlib_documents,
)
from chronos.common.data.packing import IGNORE, Ints
from chronos.common.errors import DataError
from chronos.common.text.sampling import SamplingParams
from chronos.common.traces.trace import RoutingTrace, TraceRecorder
from chronos.run.sequence import OneSequence

if TYPE_CHECKING:
    from chronos.backends.protocol import Observed, Session
    from chronos.common.model.guest import Geometry
    from chronos.common.text.tokenizer import Tokenizer

STDLIB = "stdlib"
STDLIB_HELD_OUT = 0.02  # the share that the recipe `demo` keeps from training
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
            f"a share of {held_out} keeps no part of {counted(len(documents), 'document')} from"
            " training",
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
    wanted = list(_within(sequences, max_tokens, new_tokens))
    done, total = 0, sum(count for _, count in wanted)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for ids, count in wanted:
        sequence.reset()
        recorder.new_sequence()
        tokens = ids
        if new_tokens:
            tokens = _written(sequence, ids, count, advance)
        else:
            sequence.prefill(ids, SamplingParams(), advance=advance)
        for ids_TLK, weights_TLK in sequence.routing():
            recorder.append(ids_TLK, weights_TLK, tokens[: len(ids_TLK)])
            tokens = tokens[len(ids_TLK) :]
    return recorder.trace()


def _within(
    sequences: Iterable[Sequence[int]], max_tokens: int, new_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """The sequences that are run, and how many tokens are recorded of each: `max_tokens` in all."""
    left = max_tokens
    for ids in sequences:
        if left <= 0:
            return
        kept = list(ids) if new_tokens else list(ids)[:left]
        count = min(new_tokens, left) if new_tokens else len(kept)
        yield kept, count
        left -= count


def _written(
    sequence: OneSequence, prompt: list[int], new_tokens: int, advance: Callable[[int], None]
) -> list[int]:
    """What the model writes after a prompt, greedily; the prompt's routing is dropped."""
    greedy = SamplingParams()
    token = sequence.prefill(prompt, greedy)
    sequence.routing()
    written = []
    for _ in range(new_tokens):
        written.append(token)
        token = sequence.decode(token, greedy)
        advance(1)
    return written


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


def rows_of(dataset: PackedDataset, max_tokens: int) -> list[Batch]:
    """Rows of at most `max_tokens` tokens in all, at least one, each a batch: the same ones
    whatever is held in memory and however many are computed at a time."""
    count = min(len(dataset), max(1, max_tokens // dataset.seq_len))
    return [dataset.batch(row, 1) for row in range(count)]


def together(rows: Sequence[Batch], batch_size: int) -> Iterator[Batch]:
    """The rows, so many at a time; the last batch may have fewer."""
    for start in range(0, len(rows), batch_size):
        group = rows[start : start + batch_size]
        yield Batch(
            np.concatenate([row.ids_BT for row in group]),
            np.concatenate([row.labels_BT for row in group]),
            np.concatenate([row.segments_BT for row in group]),
        )


def pieces_of(rows: Iterable[Batch]) -> Iterator[tuple[Ints, Ints]]:
    """(ids, labels) of each document's part of a row, which sees nothing of the others."""
    for row in rows:
        ids_T, labels_T, segments_T = row.ids_BT[0], row.labels_BT[0], row.segments_BT[0]
        for number in range(segments_T.max() + 1):
            yield ids_T[segments_T == number], labels_T[segments_T == number]


def sequence_loss(
    forward: Callable[[npt.NDArray[Any]], Observed], pieces: Iterable[tuple[Ints, Ints]]
) -> dict[str, float]:
    """The loss of packed rows without their packing, which guests do not take: each piece from an
    empty context."""
    nats, count = 0.0, 0
    for ids_T, labels_T in pieces:
        at = np.flatnonzero(labels_T != IGNORE)
        logits_NV = forward(ids_T[None].astype(np.int64)).logits_BTV[0, at]
        top_N = logits_NV.max(-1, initial=-np.inf)
        mass_N = np.exp(logits_NV - top_N[:, None]).sum(-1, dtype=np.float64)
        right_N = logits_NV[np.arange(len(at)), labels_T[at]]
        nats += float((np.log(mass_N) + top_N - right_N).sum())
        count += len(at)
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
