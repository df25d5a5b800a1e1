"""Native models through Transformers' own doors: loading, outputs, generation, saving."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

import chronos
import chronos.interop.transformers
from chronos.backends import torch as backend
from chronos.cli import main
from chronos.common.errors import ConfigError, ShapeMismatch, UsageError
from chronos.common.layout import pack
from chronos.common.model.config import ModelConfig
from chronos.common.model.rope import lengthened
from chronos.common.text import sampling
from chronos.common.text.sampling import SamplingParams
from chronos.interop.transformers import ChronosConfig, ChronosForCausalLM
from chronos.run.models import resolve_model
from chronos.run.sequence import OneSequence
from chronos.testing.tiny import CONFIG, TEXTS, tiny_model, tiny_packed
from tests.support.toy_codec import NAME, register

IDS = np.random.default_rng(5).integers(6, CONFIG.vocab_size, (2, 21))
FRESH = """
import hashlib, sys, chronos.interop.transformers, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[2]))  # how a product is split shows in its last bit
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(6, 40)[None]).logits
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_packed(tmp_path_factory.mktemp("auto") / "packed")


@pytest.fixture(scope="module")
def model(packed: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(packed)


def unpacked(folder: Path) -> Path:
    return folder.with_name(folder.name + "-unpacked")


def engine_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    with chronos.load(folder, backend="torch", budget="30%") as engine:
        engine.stop_ids = frozenset()
        return [step.token for step in engine.generate(prompt, max_tokens=count)]


def greedy(model: Any, ids: Any, count: int, **options: Any) -> torch.Tensor:
    settings = {"eos_token_id": None, "do_sample": False, "pad_token_id": 0} | options
    ids = torch.as_tensor(ids)
    return model.generate(ids, max_new_tokens=count, **settings)[:, ids.shape[1] :]


def test_routing_by_the_past_has_the_same_logits_and_tokens(tmp_path: Path) -> None:
    history = {
        "routing_source": "history", "num_experts_per_tok": 3,
        "num_resident_experts": 2, "num_resident_experts_per_tok": 1,
    }  # fmt: skip
    folder = tiny_packed(tmp_path / "packed", **history)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found = model(torch.from_numpy(IDS)).logits
    assert np.array_equal(found.numpy(), backend.forward(backend.load(folder), IDS).logits_BTV)
    prompt = IDS[:1].tolist()
    with chronos.load(folder, backend="torch", budget="60%") as engine:
        engine.stop_ids = frozenset()
        wanted = [step.token for step in engine.generate(prompt[0], max_tokens=12)]
    assert greedy(model, prompt, 12)[0].tolist() == wanted
    beams = greedy(model, prompt, 6, num_beams=2)  # caches are copied and reordered
    assert torch.equal(beams, greedy(model, prompt, 6, num_beams=2, use_cache=False))


def test_both_kinds_of_folder_load_with_the_logits_of_the_backend(packed: Path) -> None:
    wanted = backend.forward(backend.load(packed), IDS).logits_BTV
    for folder in (packed, unpacked(packed)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(model, ChronosForCausalLM) and not model.training
        with torch.no_grad():
            found = model(torch.from_numpy(IDS)).logits
        assert np.array_equal(found.numpy(), wanted)


def test_experts_that_are_no_parameters_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "torch")
    pack(tiny_model(tmp_path / "model"), tmp_path / "packed", encoding=NAME)
    with pytest.raises(UsageError, match=f"encoded as {NAME}, which Transformers does not hold"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_the_config_keeps_both_spellings(packed: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(packed)
    assert isinstance(config, ChronosConfig)
    assert config.native() == CONFIG
    assert config.num_local_experts == config.num_experts == CONFIG.num_experts
    config.num_experts_per_tok = 3
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e4}
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["num_experts"] == written["num_local_experts"] == CONFIG.num_experts
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e4
    assert ModelConfig.from_json(tmp_path).num_experts_per_tok == 3
    assert AutoConfig.from_pretrained(tmp_path).native() == config.native()
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        ChronosConfig(num_experts=2, num_experts_per_tok=3)


def test_a_context_that_grew(packed: Path, tmp_path: Path) -> None:
    """Config, both spellings of it, and logits beyond what the model was trained for."""
    native = lengthened(CONFIG, 4 * CONFIG.max_position_embeddings, 8)
    made = backend.build(native, seed=3, device="cpu")
    backend.save(made, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.native() == native
    assert model.config.rope_parameters == native.to_json()["rope_parameters"]
    found = model(torch.from_numpy(IDS)).logits.detach().numpy()
    np.testing.assert_allclose(found, backend.forward(made, IDS).logits_BTV, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    assert ModelConfig.from_json(tmp_path / "again") == native
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": native.rope_theta}
    assert model.config.native().rope_scaling is None


def test_greedy_tokens_are_those_of_the_engine(packed: Path, model: Any) -> None:
    wanted = engine_tokens(packed, IDS[0].tolist(), 40)  # past the window of 32
    assert greedy(model, IDS[:1], 40)[0].tolist() == wanted
    assert greedy(model, IDS[:1], 40, use_cache=False)[0].tolist() == wanted


def test_a_batch_padded_on_the_left_generates_what_its_rows_do(packed: Path, model: Any) -> None:
    lengths = (21, 4)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, :-4] = 0
    ids = torch.from_numpy(IDS) * mask
    for cached in (True, False):
        found = greedy(model, ids, 16, attention_mask=mask, use_cache=cached)
        for row, length in enumerate(lengths):
            wanted = engine_tokens(packed, IDS[row, 21 - length :].tolist(), 16)
            assert found[row].tolist() == wanted


def test_long_prompts_run_in_the_pieces_of_a_session(
    packed: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chronos.interop.transformers, "PIECE", 8)
    monkeypatch.setattr(sampling, "PIECE", 8)
    runner = OneSequence(backend.session(backend.load(packed)))
    runner.prefill(IDS[0].tolist(), SamplingParams())
    with torch.no_grad():
        ids = torch.from_numpy(IDS[:1])
        last = model(ids, use_cache=True, logits_to_keep=1).logits
        every = model(ids, use_cache=True).logits
    assert np.array_equal(last[0, 0].numpy(), runner.logits())
    assert every.shape == (1, 21, CONFIG.vocab_size)
    torch.testing.assert_close(every[:, -1:], last)


def test_beams_and_samples(model: Any) -> None:
    ids = torch.from_numpy(IDS)
    beams = greedy(model, ids, 8, num_beams=3)
    assert torch.equal(beams, greedy(model, ids, 8, num_beams=3, use_cache=False))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(greedy(model, ids, 8, do_sample=True, num_return_sequences=2))
    assert draws[0].shape == (4, 8)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_second_turn_goes_on_behind_the_cache(model: Any) -> None:
    ids = torch.from_numpy(IDS[:1])
    options = {"eos_token_id": None, "do_sample": False, "max_new_tokens": 6}
    first = model.generate(ids, return_dict_in_generate=True, **options)
    longer = torch.cat((first.sequences, ids[:, :5]), dim=1)
    found = model.generate(longer, past_key_values=first.past_key_values, **options)
    assert torch.equal(found, model.generate(longer, **options))


def test_the_tokenizer_loads_and_replies_end_where_the_engine_ends(
    packed: Path, model: Any
) -> None:
    ours = chronos.load(packed, backend="torch").tokenizer
    theirs = AutoTokenizer.from_pretrained(packed)
    assert ours is not None
    assert [theirs(text).input_ids for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    chat = [{"role": "user", "content": "add"}]
    found = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert found == ours.apply_chat(chat)
    assert set(model.generation_config.eos_token_id) == ours.stop_ids
    writer = pipeline("text-generation", model=model, tokenizer=theirs)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=ours.pad_id)
    text = writer(TEXTS[0], generation_config=settings)[0]["generated_text"]
    assert text.startswith(TEXTS[0])


def test_the_loss_is_the_next_tokens_and_padding_is_no_part_of_it(model: Any) -> None:
    ids = torch.from_numpy(IDS[:1])
    out = model(ids, labels=ids)
    wanted = F.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(out.loss, wanted)
    for side in ((4, 0), (0, 4)):
        padded = F.pad(ids, side)
        mask = F.pad(torch.ones_like(ids), side)
        labels = padded.masked_fill(mask == 0, -100)
        labels[:, side[0]] = -100  # what would follow the padding
        found = model(padded, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(found, wanted)


def test_micro_batches_share_the_labels_of_their_update(model: Any) -> None:
    """Their losses are parts of the joined batch's, however few labels one has."""
    ids = torch.from_numpy(IDS)
    labels = ids.clone()
    labels[0, :-3] = -100
    whole = model(ids, labels=labels).loss
    parts = [
        model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=3 + 20).loss
        for row in (0, 1)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_options_of_other_models_are_refused_where_they_are_set(model: Any) -> None:
    ids = torch.from_numpy(IDS)
    wanted = model(ids).logits
    unset = {"inputs_embeds": None, "output_attentions": None, "output_hidden_states": False}
    assert torch.equal(model(ids, **unset).logits, wanted)
    states = model.base_model(ids, **unset).last_hidden_state
    assert torch.equal(model(ids, return_dict=False)[0], wanted)
    assert torch.equal(model.base_model(ids, return_dict=False)[0], states)
    for call in (model, model.base_model):
        with pytest.raises(UsageError, match="takes no output_hidden_states"):
            call(ids, output_hidden_states=True)


def test_router_logits_are_scores_of_the_routers(model: Any) -> None:
    with torch.no_grad():
        out = model(torch.from_numpy(IDS), output_router_logits=True)
    observed = backend.forward(model.native, IDS)
    assert len(out.router_logits) == CONFIG.num_hidden_layers
    for scores_TE, probs_TE in zip(out.router_logits, observed.probs_LNE, strict=True):
        np.testing.assert_allclose(scores_TE.softmax(-1).numpy(), probs_TE, rtol=1e-5)


@pytest.mark.timeout(300)  # imports both libraries twice
def test_saved_and_read_in_a_fresh_process_the_logits_are_the_same(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(ChronosConfig(**CONFIG.to_json()))
    ids = torch.from_numpy(IDS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    tiny_model(tmp_path)  # an older model and its tokenizer lie there
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(torch.arange(6, 40)[None]).logits.numpy().tobytes()
    fresh = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, str(tmp_path), str(torch.get_num_threads())],
        capture_output=True, text=True,
    )  # fmt: skip
    assert fresh.stdout.strip() == hashlib.sha256(wanted).hexdigest(), fresh.stderr
    assert main.run(["generate", str(tmp_path), "-p", "def", "-n", "3", "--backend", "torch"]) == 0
    assert engine_tokens_resident(tmp_path, 9) == greedy(model, IDS[:1], 9)[0].tolist()


def engine_tokens_resident(folder: Path, count: int) -> list[int]:
    with chronos.load(folder, backend="torch") as engine:
        engine.stop_ids = frozenset()
        prompt = IDS[0].tolist()
        return [step.token for step in engine.generate(prompt, max_tokens=count)]


def test_a_state_dict_replaces_the_weights_that_are_saved(model: Any, tmp_path: Path) -> None:
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    with pytest.raises(ShapeMismatch):
        model.save_pretrained(tmp_path, state_dict=dict(list(state.items())[1:]))


def test_the_file_of_a_folder_is_a_state_dict(model: Any, tmp_path: Path) -> None:
    """By the names it has on disk, as a Trainer that resumes loads it."""
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_config(model.config)
    found = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith("native.lookahead.") for name in found.missing_keys)
    ids = torch.from_numpy(IDS)
    assert torch.equal(other.eval()(ids).logits, model(ids).logits)
    assert not other.load_state_dict(model.state_dict()).missing_keys


def test_random_weights_follow_the_seed() -> None:
    config = ChronosConfig(**CONFIG.to_json())
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(AutoModelForCausalLM.from_config(config).native.model.embed_tokens.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.9 < weights[0].std().item() / CONFIG.initializer_range < 1.1


def test_the_model_that_ships_loads_and_a_dtype_is_kept(tmp_path: Path) -> None:
    demo = AutoModelForCausalLM.from_pretrained(resolve_model("demo"))
    experts = demo.native.model.layers[0].mlp.experts[0]
    assert experts.gate_up_proj.weight.dtype == torch.bfloat16
    assert demo.native.model.embed_tokens.weight.dtype == torch.float32
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        wanted = demo(ids).logits
        wide = AutoModelForCausalLM.from_pretrained(resolve_model("demo"), dtype=torch.float32)
        torch.testing.assert_close(wide(ids).logits, wanted)
        narrow = wide.to(torch.bfloat16)(ids).logits
    assert narrow.dtype == torch.bfloat16
    assert F.cosine_similarity(narrow.float(), wanted, dim=-1).min() > 0.99
    demo.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, wanted)


def test_a_model_without_lookahead_stays_so(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "first")
    (folder / "lookahead.safetensors").unlink()
    model = ChronosForCausalLM.from_pretrained(folder)
    model.save_pretrained(tiny_model(tmp_path / "second", seed=1))
    assert not (tmp_path / "second" / "lookahead.safetensors").exists()
    assert ChronosForCausalLM.from_pretrained(tmp_path / "second").native.lookahead is None


def test_states_and_head_make_the_logits(model: Any) -> None:
    """What trainers take apart to make logits for labels only."""
    ids, mask = torch.from_numpy(IDS), torch.ones(2, 21, dtype=torch.long)
    mask[0, :4] = mask[1, -6:] = 0
    with torch.no_grad():
        out = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        whole = model(ids, attention_mask=mask, output_router_logits=True)
        assert torch.equal(model.get_output_embeddings()(out.last_hidden_state), whole.logits)
        scores = model.base_model(ids, mask, output_router_logits=True).router_logits
    assert out.router_logits is None
    torch.testing.assert_close(scores, whole.router_logits, rtol=0, atol=0)
    with pytest.raises(UsageError, match="without a cache"):
        model.base_model(ids, use_cache=True)


def test_the_head_is_the_embedding(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    head, names = model.get_output_embeddings(), model.state_dict().keys()
    assert head.weight is model.get_input_embeddings().weight and head.bias is None
    model.set_output_embeddings(head)
    with pytest.raises(UsageError, match="head is the embedding"):
        model.set_output_embeddings(torch.nn.Linear(2, 2))
    model.resize_token_embeddings(CONFIG.vocab_size + 4, mean_resizing=False)
    assert model.get_output_embeddings().out_features == CONFIG.vocab_size + 4
    assert model(torch.from_numpy(IDS)).logits.shape[-1] == CONFIG.vocab_size + 4
    assert model.state_dict().keys() == names


def test_no_code_is_named_beside_the_weights(packed: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(packed)
    assert config.auto_map == {}
    config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_training_has_no_misses_and_dropout_can_be_switched_off(tmp_path: Path) -> None:
    """A policy in training mode is its reference; what is saved still asks for both."""
    folder = tiny_model(tmp_path / "model", dropout=0.5, fallback_mask_prob=0.9)
    ids = torch.from_numpy(IDS)
    for model in (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)),
    ):
        wanted = model.eval()(ids).logits
        assert not torch.allclose(model.train()(ids).logits, wanted)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # as TRL does
        torch.testing.assert_close(model(ids).logits, wanted)
        model.save_pretrained(tmp_path / "saved")
        saved = ModelConfig.from_json(tmp_path / "saved")
        assert (saved.dropout, saved.fallback_mask_prob) == (0.5, 0.9)


@pytest.mark.parametrize(
    ("mask", "options", "text"),
    [
        ([1, 1, 0, 1], {}, "hole"),
        ([1, 1, 1], {}, r"attention_mask is \[1, 3\]"),
        ([1, 1, 1, 0], {"use_cache": True}, "on the left"),
        ([0, 0, 0, 0], {"use_cache": True}, "padding alone"),
        ([1, 1, 1], {"use_cache": True}, "3 columns, not 4"),
    ],
)
def test_masks_that_cannot_be_kept_are_refused(
    model: Any, mask: list[int], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        model(torch.arange(6, 10)[None], attention_mask=torch.tensor([mask]), **options)


def test_what_does_not_apply_is_refused(packed: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="load_in_8bit"):
        AutoModelForCausalLM.from_pretrained(packed, load_in_8bit=True)
    with pytest.raises(UsageError, match="cannot spread"):
        AutoModelForCausalLM.from_pretrained(packed, device_map={"model": 0, "head": "cpu"})
    with pytest.raises(UsageError, match="packed"):
        model.save_pretrained(packed)
    with pytest.raises(UsageError, match="hf upload"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ShapeMismatch, match="geometry"):
        AutoModelForCausalLM.from_pretrained(packed, num_shared_experts=2)
    with pytest.raises(UsageError, match="2 rows"):
        cache = model(torch.from_numpy(IDS), use_cache=True).past_key_values
        model(torch.from_numpy(IDS[:1]), past_key_values=cache)


def test_an_id_of_the_hub_is_fetched_as_transformers_would(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(packed)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = ChronosForCausalLM.from_pretrained("someone/tiny", revision="main", token=None)
    assert model.native.config == CONFIG and model.name_or_path == "someone/tiny"
    assert asked.pop("allow_patterns") and asked == {"name": "someone/tiny", "revision": "main"}


def test_without_transformers_the_pip_line_is_named() -> None:
    code = "import sys; sys.modules['transformers'] = None; import chronos.interop.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingBackendError" in done.stderr and "chronos-moe[guests]" in done.stderr
