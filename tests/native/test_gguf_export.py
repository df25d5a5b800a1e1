"""`chronos export --to gguf`, with llama.cpp as judge: it computes from the file what we compute.

xllamacpp carries llama.cpp; where it is absent these tests are skipped by name. Its first run costs
seconds, so all files are judged in one.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from chronos.backends.torch.checkpoint import dequantised_bytes, load_model
from chronos.common.disk.io import FileIO
from chronos.common.errors import ConfigError, DiskFullError, ShapeMismatch, UsageError
from chronos.common.layout import pack, unpack
from chronos.common.text.tokenizer import Tokenizer
from chronos.interop.gguf import export_gguf
from chronos.testing.tiny import TEXTS, tiny_model, tiny_tokenizer
from tests.support import quantised
from tests.support.guests import ARCHITECTURES, BASE, tiny_guest

ROOT = Path(__file__).parents[2]
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's word: pip install xllamacpp"
)
KINDS = ["f32", "f16", "bf16", "q8_0", "mxfp4"]
PROMPT = np.random.default_rng(3).integers(6, 262, 23).tolist()
# Ids that are no text by themselves: llama.cpp's server says nothing of a step that has one.
BANNED = [
    token
    for token, name in enumerate(
        map(tiny_tokenizer(300).token_bytes, range(tiny_tokenizer(300).vocab_size))
    )
    if not name or max(name) > 127
]
CHAT = [{"role": "user", "content": "add left to right"}]
LLAMA3 = (  # the rule in tokenizer.json of Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(rule: str) -> dict[str, Any]:
    """Text cut by a rule, then into bytes, as tokenizer.json has it."""
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    first = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
    parts = [first, byte | {"use_regex": False}]
    return {"type": "Sequence", "pretokenizers": parts}


GPT4O = (  # that of gpt-oss
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ODD = "def  I'LL don't x=1234567\n\n   return \u00c0\u00e9\u65e5 HelloWORLDs's//\r\n\t.. a\u0301 "


def cutters() -> dict[str, dict[str, Any]]:
    """Tokenizers by llama.cpp's name for how they cut text, each with words of its own."""
    digits = {"type": "Digits", "individual_digits": True}
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    found = {
        "smollm": trained({"type": "Sequence", "pretokenizers": [digits, byte]}),
        "llama-bpe": trained(split(LLAMA3)),
        "qwen2": trained(split(LLAMA3.replace("{1,3}", ""))),
        "gpt-4o": trained(split(GPT4O)),
    }
    found["llama-bpe"]["model"]["ignore_merges"] = True
    return found | {"spaced": spaced()}


def trained(cut: dict[str, Any]) -> dict[str, Any]:
    """Tokens are learnt of texts in one piece, so that every cut shows."""
    data = json.loads(tiny_tokenizer(300)._core.to_str())
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=[token["content"] for token in data["added_tokens"]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([ODD, *TEXTS], trainer)
    model = json.loads(core.to_str())["model"]
    return {"added_tokens": data["added_tokens"], "pre_tokenizer": cut, "model": model}


def spaced() -> dict[str, Any]:
    """A tokenizer as SentencePiece's converters write it: every way to a token is a merge."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    core.train_from_iterator([f"{text} don't return" for text in TEXTS], trainer)
    data = json.loads(core.to_str())
    vocabulary = data["model"]["vocab"]
    merges = [
        (token[:at], token[at:])
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        for at in range(1, len(token))
        if token not in special and {token[:at], token[at:]} <= vocabulary.keys()
    ]
    core.model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    core.add_special_tokens(special[:3])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    data = json.loads(core.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < 3]
    return data


OURS: dict[str, dict[str, Any]] = {
    "latents": {
        "hybrid_pattern": ("mla",), "norm_topk_prob": False, "num_shared_experts": 2,
        "moe_intermediate_size": 32,
    },
    "normed": {"hybrid_pattern": ("mla",)},
    "windows": {"hybrid_pattern": ("sliding",), "num_shared_experts": 0, "sliding_window": 256},
}  # fmt: skip
GUESTS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


def build(folder: Path, model_type: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    own = ARCHITECTURES[model_type] | GUESTS[model_type] | changes
    settings = BASE | {"vocab_size": 300, "initializer_range": 0.3} | own
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, value in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer(300).save(folder)
    return model.eval()


@torch.no_grad()
def wanted(forward: Callable[..., Any], prompt: list[int]) -> dict[str, Any]:
    """What the judge says, said by a model of ours or of Transformers."""
    ids, first = list(prompt), None
    for _ in range(24):
        logits = forward(torch.tensor([ids])).logits[0, -1]
        first = logits.log_softmax(-1).numpy() if first is None else first
        logits[BANNED] = -torch.inf
        ids.append(int(logits.argmax()))
    return {"first": first, "tokens": ids[len(prompt) :], "prompt": len(prompt)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def both(home: Path) -> dict[str, list[tuple[Any, Any]]]:
    """Of every file, what is wanted and what llama.cpp says, prompt by prompt."""
    asked: dict[str, Any] = {}
    known: dict[str, list[Any]] = {}
    tokenizer = tiny_tokenizer(300)
    texts = [PROMPT, TEXTS[0] + "x = 12  # a\u00e9", CHAT]
    for name, changes in OURS.items():
        source = tiny_model(home / f"{name}-src", **changes)
        forward = load_model(source, torch.device("cpu"), True)
        ids = [PROMPT, tokenizer.encode_prompt(texts[1]), tokenizer.apply_chat(CHAT)]
        for kind in KINDS if name == "latents" else KINDS[:1]:
            export_gguf(source, home / f"{name}-{kind}", kind=kind)
            asked[f"{name}-{kind}"] = texts
            known[f"{name}-{kind}"] = [wanted(forward, prompt) for prompt in ids]
    for name in GUESTS:
        forward = build(home / f"{name}-src", name)
        pack(home / f"{name}-src", home / f"{name}-packed")
        export_gguf(home / f"{name}-packed", home / name)
        asked[name], known[name] = [PROMPT], [wanted(forward, PROMPT)]
    for name, core in cutters().items():
        folder = tiny_model(home / f"{name}-src", **OURS["normed"], vocab_size=480)
        own = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(own | core))
        if name == "spaced":
            named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(named))
        forward = load_model(folder, torch.device("cpu"), True)
        # llama.cpp's "gpt-4o" cuts at combining marks and last spaces as the rule does not.
        text = ODD.replace("\u0301", "").strip() if name == "gpt-4o" else ODD
        ids = Tokenizer.load(folder).encode_prompt(text)
        plain = Tokenizer.load(folder)
        plain._core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert name == "spaced" or plain.encode_prompt(text) != ids  # the rule matters here
        export_gguf(folder, home / name)
        asked[name], known[name] = [text], [wanted(forward, ids)]
    files = {str(home / name / "model.gguf"): name for name in asked}
    task = {
        file: {"ids": 480, "banned": BANNED, "prompts": asked[name]} for file, name in files.items()
    }
    judge = ROOT / "tests/support/llama_judge.py"
    done = subprocess.run(
        [sys.executable, judge], input=json.dumps(task), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    return {name: list(zip(known[name], found[file], strict=True)) for file, name in files.items()}


def first(said: dict[str, Any]) -> np.ndarray:
    assert len(said["first"]) in (300, 480)
    return np.array([said["first"][str(token)] for token in range(len(said["first"]))])


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_llama
@pytest.mark.parametrize("name", [*(f"{name}-f32" for name in OURS), *GUESTS])
def test_llama_cpp_computes_the_same(name: str, both: Any) -> None:
    for ours, theirs in both[name]:
        assert theirs["prompt"] == ours["prompt"]  # a text and a chat become as many ids
        np.testing.assert_allclose(first(theirs), ours["first"], rtol=0, atol=2e-4)
        assert theirs["tokens"] == ours["tokens"]
        assert float(ours["first"].std()) > 0.5
    assert len({token for ours, _ in both[name] for token in ours["tokens"]}) > 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_llama
@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "qwen2", "gpt-4o", "spaced"])
def test_llama_cpp_cuts_text_into_our_ids(name: str, both: Any, home: Path) -> None:
    ((ours, theirs),) = both[name]
    assert theirs["prompt"] == ours["prompt"]
    np.testing.assert_allclose(first(theirs), ours["first"], rtol=0, atol=2e-4)
    said = fields(home / name)
    assert said.get("tokenizer.ggml.pre", "spaced") == name


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_llama
@pytest.mark.parametrize(
    ("kind", "near", "same"),
    [("f16", 0.01, True), ("bf16", 0.1, True), ("q8_0", 0.5, False), ("mxfp4", 1.0, False)],
)
def test_other_types_are_near(kind: str, near: float, same: bool, both: Any, home: Path) -> None:
    for ours, theirs in both[f"latents-{kind}"]:
        apart = np.abs(first(theirs) - ours["first"]).max()
        assert 1e-4 < apart < near
        assert not same or theirs["tokens"] == ours["tokens"]
    types = {t.name: t.tensor_type.name for t in read(home / f"latents-{kind}").tensors}
    assert types["blk.1.ffn_down_exps.weight"] == kind.upper()
    assert types["blk.1.attn_q.weight"] == ("F32" if kind == "mxfp4" else kind.upper())
    assert types["blk.1.attn_norm.weight"] == types["blk.1.ffn_gate_inp.weight"] == "F32"


def read(folder: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(folder / "model.gguf")


def fields(folder: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in read(folder).fields.items()}


def test_tokens_and_template_travel(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(300)
    export_gguf(tiny_model(tmp_path / "src", **OURS["normed"]), tmp_path / "out")
    said = fields(tmp_path / "out")
    assert said["general.architecture"] == "deepseek2"
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert {name: i for i, name in enumerate(said["tokenizer.ggml.tokens"])} == (
        tokenizer.vocabulary
    )
    assert said["tokenizer.ggml.token_type"][:7] == [3] * 6 + [1]
    assert said["tokenizer.chat_template"] == tokenizer.template.source
    ids = {"eos": 1, "eot": 5, "padding": 0}
    assert {key: said[f"tokenizer.ggml.{key}_token_id"] for key in ids} == ids
    assert said["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}, None),
        ({"type": "Whitespace"}, None),
        (split(r"\p{L}+|\s+"), None),
        (split(LLAMA3.replace("{1,3}", "")), "qwen2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
                ],
            },
            "smollm",
        ),
    ],
)
def test_a_tokenizer_is_named_or_refused(cut: Any, name: str | None, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "src", **OURS["normed"])
    path = source / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": cut}))
    if name is None:
        with pytest.raises(ConfigError, match="way this tokenizer cuts text"):
            export_gguf(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    export_gguf(source, tmp_path / "out")
    assert fields(tmp_path / "out")["tokenizer.ggml.pre"] == name


def test_what_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    for changes, why in (
        ({}, "layers 1 attend to a window"),
        (OURS["windows"] | {"sliding_window": 32}, "window of 32"),
        (OURS["windows"] | {"norm_topk_prob": False}, "norm_topk_prob is false"),
    ):
        source = tiny_model(tmp_path / "src", **changes)
        with pytest.raises(ConfigError, match=f"{why}(.|\n)*--with-code"):
            export_gguf(source, tmp_path / "out")
    source = tiny_model(tmp_path / "src", **OURS["normed"])
    with pytest.raises(ConfigError, match=r"rows of 24 numbers(.|\n)*--type f32"):
        export_gguf(source, tmp_path / "out", kind="q8_0")
    with pytest.raises(UsageError, match="'q4_k' is no type"):
        export_gguf(source, tmp_path / "out", kind="q4_k")
    path = source / "tokenizer.json"
    core = json.loads(path.read_text())
    core["added_tokens"].append(core["added_tokens"][-1] | {"id": 300, "content": "<more>"})
    path.write_text(json.dumps(core))
    with pytest.raises(ConfigError, match=r"has a token 300, the model's vocabulary ends at 299"):
        export_gguf(source, tmp_path / "out")
    guest = tiny_guest(tmp_path / "guest", model_type="dbrx")
    with pytest.raises(ConfigError, match=r"dbrx is not written as GGUF(.|\n)*own converter"):
        export_gguf(guest, tmp_path / "out")
    scaled = tiny_guest(tmp_path / "scaled", rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ConfigError, match=r"positions are scaled \(linear\)"):
        export_gguf(scaled, tmp_path / "out")
    assert not any(path.name.endswith("chronos-new") for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 3},
        {"num_attention_heads": 0},
        {"num_attention_heads": "many"},
        {"num_key_value_heads": 5},
        {"hidden_size": 31},
        {"rms_norm_eps": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "far"}},
    ],
)
def test_a_config_that_the_tensors_do_not_fit_is_named(changes: Any, tmp_path: Path) -> None:
    packed = tiny_guest(tmp_path / "guest", **changes)
    with pytest.raises((ConfigError, ShapeMismatch), match=r"config"):
        export_gguf(packed, tmp_path / "out")
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_an_interrupted_one_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    source = tiny_model(tmp_path / "src", **OURS["normed"])
    with pytest.raises(KeyboardInterrupt):
        export_gguf(source, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_disk_that_fills_is_an_error_with_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = tiny_model(tmp_path / "src", **OURS["normed"])
    with monkeypatch.context() as patch, pytest.raises(DiskFullError, match="10 bytes free"):
        patch.setattr(FileIO, "free_bytes", lambda self, folder: 10)
        export_gguf(source, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(DiskFullError, match=r"model\.gguf"):
        patch.setattr(gguf.quants, "quantize", full)
        export_gguf(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_numbers_that_were_mxfp4_are_coded_as_they_were() -> None:
    """So a checkpoint that was made plain loses nothing: FP4 (e2m1) times a power of 2."""
    random = np.random.default_rng(0)
    fp4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = fp4[random.integers(0, 8, (64, 32))] * random.choice([-1, 1], (64, 32))
    values[:8] = fp4[random.integers(0, 3, (8, 32))]  # blocks without a large one
    values = (values * 2.0 ** random.integers(-20, 4, (64, 1))).astype(np.float32)
    kind = gguf.GGMLQuantizationType.MXFP4
    assert np.array_equal(gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind), values)


def test_published_mxfp4_keeps_its_codes(tmp_path: Path) -> None:
    """Beside the way through the plain checkpoint: the same types, and the same numbers."""
    wide = {"hidden_size": 64, "intermediate_size": 32}
    model = build(tmp_path / "any", "gpt_oss", **wide)
    quantised.save(model, tmp_path / "src", "mxfp4", lambda name: ".experts." in name)
    tiny_tokenizer(300).save(tmp_path / "src")
    pack(tmp_path / "src", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "plain", dequantise=dequantised_bytes)
    found = {}
    for name, kind in (("plain", "mxfp4"), ("packed", ""), ("src", "mxfp4")):
        export_gguf(tmp_path / name, tmp_path / f"{name}-out", kind=kind)
        found[name] = {t.name: t for t in read(tmp_path / f"{name}-out").tensors}
    experts = [name for name in found["packed"] if name.endswith("_exps.weight")]
    assert len(experts) == 9
    for name, tensor in found["packed"].items():
        plain, same = found["plain"][name], found["src"][name]
        assert tensor.tensor_type == plain.tensor_type
        assert np.array_equal(tensor.data, same.data)
        values = [gguf.quants.dequantize(t.data, t.tensor_type) for t in (tensor, plain)]
        assert np.array_equal(*values)
        assert (name in experts) == (tensor.tensor_type.name == "MXFP4")
    with pytest.raises(UsageError, match="written as such, not as f16"):
        export_gguf(tmp_path / "packed", tmp_path / "out", kind="f16")
