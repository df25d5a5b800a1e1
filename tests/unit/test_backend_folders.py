"""The backend folders read side by side: same files, same classes, same signatures, same order.

Read as syntax, without a framework. The folders `guest/` (models other libraries build) and `fast/`
are a backend's own.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import chronos.backends

BACKENDS = Path(chronos.backends.__file__).parent
# torch carries two libraries for products on x86, MLX one; MLX has products of its own for what
# MLX-LM quantises, and computes with nothing else that is quantised; compiled kernels sum in the
# order of torch's libraries.
OWN = {"products.py", "quantised.py", "kernels.py"}
FILES = sorted({p.name for p in (BACKENDS / "torch").glob("*.py")} - OWN)
# What one framework has no use for, with the reason. A name that is no difference is an error.
ONLY = {
    "attention.RMSNorm": "mlx.nn has one in every version",
    "attention.Rotary.tables": "mx.fast.rope computes the rotation; there are no tables",
    "attention.LatentAttention.front": "parts of a CUDA graph's step: see graphs.py",
    "attention.LatentAttention.core": "see front",
    "attention.LatentAttention.back": "see front",
    "attention.WindowAttention.front": "parts of a CUDA graph's step: see graphs.py",
    "attention.WindowAttention.core": "see front",
    "attention.WindowAttention.back": "see front",
    "moe.MoE.mix": "a part of a CUDA graph's step: see graphs.py",
    "codecs.Raw": "MLX views bytes as strides of one array; torch slices a slot's row",
    "codecs.memory": "an MLX array is written to by its buffer, a torch tensor by `numpy()`",
    "codecs.Codec.gathered": "gather_mm over a stack; torch computes expert by expert",
    "codecs.Swiglu.gathered": "see codecs.Codec.gathered",
    "codecs.Affine.gathered": "see codecs.Codec.gathered",
    "codecs.TransformersAffine": "torch dequantises these too: see codecs.Quantised",
    "codecs.TransformersMxfp4": "see codecs.TransformersAffine",
    "codecs.MlxLm": "MLX-LM's experts; torch dequantises those: see codecs.Quantised",
    "codecs.Coded": "see OWN",
    "codecs.Quantised": "see OWN",
    "codecs.Quantised.view": "see OWN",
    "codecs.Quantised.parameters": "see OWN",
    "codecs.Quantised.projector": "see OWN",
    "codecs.Quantised.shapes": "see OWN",
    "codecs.Switch": "what MLX-LM's module has beside its experts; torch hands in the module",
    "codecs.Transformers.forward": "MLX computes these as MLX-LM's, and takes its methods",
    "codecs.Transformers.parameters": "see codecs.Transformers.forward",
    "codecs.Transformers.projector": "see OWN",
    "codecs.Transformers.shapes": "torch hands the library's module shells of these shapes",
    "codecs.Named": "oneDNN's products want another layout; MLX's take the bytes read",
    "codecs.silu": "a function of torch",
    "codecs.swiglu": "MLX uses it in two kernels, torch in one",
    "arena.CudaCopies": "unified memory: nothing is copied to a device",
    "arena.DirectCopies": "unified memory: nothing is copied to a device",
    "arena.Done": "unified memory: nothing is copied to a device",
    "arena.Place": "MLX gathers from stacks of slots: a layer needs the slot's index",
    "session.Session.keep": "torch cuts and copies a cache in inference mode; MLX inherits it",
    "session.Session.fork": "see session.Session.keep",
    "checkpoint.dequantised_bytes": "see OWN",
    "streamed.routed_sum": "MLX-LM's blocks weigh the outputs themselves",
    "streamed.routed_outputs": "see streamed.routed_sum",
    "streamed.Climb.top": "MLX differentiates functions, torch what came of them",
    "lora.LoraWeight": "Transformers has gates that are no linear layers",
    "lora.LoraLinear.bias": "MLX reads no bias of a layer it did not call",
    "lora.LoraExpert.of": "MLX transforms arrays that a function is given, torch those it meets",
    "model.Model.head_weight": "see lora.LoraExpert.of",
    "model.Model.head_by": "see lora.LoraExpert.of",
    "checkpoint.blank": "MLX arrays cannot be on a meta device: stacks are allocated, then filled",
    "checkpoint.named": "MLX stacks experts; torch names parameters as the disk does",
    "checkpoint.tensor_at": "see checkpoint.named",
    "checkpoint.overwrite": "see checkpoint.named",
}
PARAMETERS = {
    "codecs.Codec.view": "torch gives a slot's memory back: see codecs.Named",
    "codecs.Swiglu.view": "see codecs.Codec.view",
    "codecs.Affine.view": "see codecs.Codec.view",
    "codecs.Transformers.view": "see codecs.Codec.view",
    "checkpoint.load_model": "MLX widens the dense part on a CPU in any case",
    "losses.tensors_of": "MLX arrays are on no device until they are computed with",
    "moe.Next.__init__": "see losses.tensors_of",
    "moe.MoE.compute": "see lora.LoraExpert.of",
    "moe.ExpertWeights.__init__": "a stack needs the number of its experts",
    "arena.Arena.__init__": "torch takes a CopyEngine",
    "streamed.Climb.down": "MLX multiplies in one precision",
    "losses.losses": "see streamed.Climb.top: MLX calls the model anew, torch has its output",
    "optimizers.Optimizer.update": "torch's parameters carry their gradients; MLX's are values",
}


def tree(backend: str, file: str) -> ast.Module:
    return ast.parse((BACKENDS / backend / file).read_text("utf-8"))


def public(nodes: list[ast.stmt]) -> list[ast.ClassDef | ast.FunctionDef]:
    """Public definitions; MLX modules are called where torch's have a forward."""
    found = []
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            if node.name == "__call__":
                node.name = "forward"
            if not node.name.startswith("_") or node.name == "__init__":
                found.append(node)
    return found


def definitions(backend: str, file: str) -> dict[str, list[str] | None]:
    """Qualified names in order: parameters of functions and methods, None for classes."""
    stem, found = file.removesuffix(".py"), {}
    for node in public(tree(backend, file).body):
        if isinstance(node, ast.ClassDef):
            found[f"{stem}.{node.name}"] = None
            for method in public(node.body):
                assert isinstance(method, ast.FunctionDef)
                found[f"{stem}.{node.name}.{method.name}"] = parameters(method)
        else:
            found[f"{stem}.{node.name}"] = parameters(node)
    return found


def parameters(function: ast.FunctionDef) -> list[str]:
    a = function.args
    return [x.arg for x in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if x]


def excused(name: str, reasons: dict[str, str]) -> bool:
    return any(name == known or name.startswith(known + ".") for known in reasons)


def test_the_same_files() -> None:
    mlx = sorted(p.name for p in (BACKENDS / "mlx").glob("*.py"))
    assert mlx == FILES


@pytest.mark.parametrize("file", FILES)
def test_the_same_definitions_in_the_same_order(file: str) -> None:
    torch, mlx = definitions("torch", file), definitions("mlx", file)
    assert [n for n in torch if not excused(n, ONLY)] == [n for n in mlx if not excused(n, ONLY)]


@pytest.mark.parametrize("file", FILES)
def test_the_same_parameters(file: str) -> None:
    torch, mlx = definitions("torch", file), definitions("mlx", file)
    for name in torch.keys() & mlx.keys():
        if not excused(name, PARAMETERS):
            assert torch[name] == mlx[name], name


def test_no_excuse_is_left_over() -> None:
    torch, mlx = (
        {name: found for file in FILES for name, found in definitions(backend, file).items()}
        for backend in ("torch", "mlx")
    )
    assert [name for name in ONLY if (name in torch) == (name in mlx)] == []
    assert [name for name in PARAMETERS if torch[name] == mlx[name]] == []


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_the_protocol_is_offered(backend: str) -> None:
    """Each function of `Backend` with its parameters; each method of the objects behind it."""
    protocol = {
        node.name: {m.name: parameters(m) for m in public(node.body)}
        for path in (BACKENDS / "protocol.py", BACKENDS.parent / "common/experts/feed.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    module = definitions(backend, "__init__.py")
    for name, wanted in protocol["Backend"].items():
        assert_takes(module[f"__init__.{name}"], wanted[1:], name)
    assert_takes(module["__init__.open_arena"], protocol["OpenArena"]["forward"][1:], "open_arena")
    for file, owner in (("arena", "Arena"), ("session", "Session"), ("train", "TrainStep")):
        offered = definitions(backend, f"{file}.py")
        if owner == "Session":
            offered = inherited(backend) | offered
        for name, wanted in protocol[owner].items():
            assert_takes(offered[f"{file}.{owner}.{name}"], wanted, f"{owner}.{name}")


def inherited(backend: str) -> dict[str, list[str] | None]:
    """What a Session has of `Sequences`, under its own name."""
    classes = {
        node.name: node
        for path in (BACKENDS / "sequences.py", BACKENDS / backend / "session.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    assert [ast.unparse(base) for base in classes["Session"].bases] == ["Sequences"]
    return {
        f"session.Session.{method.name}": parameters(method)
        for method in public(classes["Sequences"].body)
        if isinstance(method, ast.FunctionDef)
    }


def assert_takes(found: list[str] | None, wanted: list[str], name: str) -> None:
    assert found is not None
    named = [parameter for parameter in wanted if parameter != "options"]
    assert [parameter for parameter in found if parameter in named] == named, name
