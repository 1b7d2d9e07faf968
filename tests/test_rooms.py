"""The rooms of `mscnn_parts`: each imports only from those before it, stays small, and is as light as it can be."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT, SOURCES

FLOORS = """
zoo settings files checks quiet output
on_disk data downloads pictures sources decision thresholds ood metrics data_checks
torch_files kernels layers networks
inference model_files model
optimizers callbacks fitting transfer training explanation
figures explorer diagnosis
run_folder runs pages execution commands cli lab
tuning exercises
"""
ROOMS = FLOORS.split()
# the rooms that need TensorFlow when they are imported
HEAVY = {"kernels", "layers", "networks", "inference", "model_files", "model", "optimizers", "callbacks", "training"}
HEAVY |= {"runs", "explanation", "fitting", "transfer", "diagnosis", "tuning", "exercises"}


def path_of(room: str):
    return ROOT / "mscnn_parts" / ("zoo/__init__.py" if room == "zoo" else f"{room}.py")


def imported(room: str) -> set[str]:
    """What a room imports of the project, but for types."""
    tree = ast.parse(path_of(room).read_text("utf-8"))
    types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for node in types for inner in ast.walk(node)}
    nodes = [node for node in ast.walk(tree) if id(node) not in skipped]
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    found |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return {name.removeprefix("mscnn_parts.") for name in found if name.startswith("mscnn_")}


def test_every_room_has_its_place():
    rooms = (ROOT / "mscnn_parts").glob("[!_]*")
    assert sorted(ROOMS) == sorted(
        path.stem for path in rooms if path.suffix == ".py" or (path / "__init__.py").exists()
    )


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_those_before_it(room):
    door = {"mscnn_helpers"} if room in ("commands", "cli") else set()
    assert imported(room) - door <= set(ROOMS[: ROOMS.index(room)])
    assert len(path_of(room).read_text("utf-8").splitlines()) <= 450


def test_light_rooms_load_no_tensorflow():
    light = [f"mscnn_parts.{room}" for room in ROOMS if room not in HEAVY]
    code = f"import sys, {', '.join(light)}; sys.exit(bool({{'tensorflow', 'keras'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_public_functions_are_annotated(path):
    """But methods that Keras prescribes."""
    prescribed = {"call", "build", "get_config", "from_config", "convolution_op", "update_step"}
    for owner in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(owner, (ast.Module, ast.ClassDef)):
            continue
        for function in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
            if function.name.startswith(("_", "on_")) or function.name in prescribed:
                continue
            arguments = [*function.args.args, *function.args.kwonlyargs]
            bare = [one.arg for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
            assert not bare and function.returns is not None, f"{function.name}: {bare}"
