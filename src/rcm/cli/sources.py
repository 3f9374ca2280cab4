"""Which source code and packages a stage runs, so that its outputs are made again when these change, and only then.

Found by following imports in the syntax tree, from the stage's function on. Templates beside a module count; comments,
formatting and docstrings do not, nor does what SILENT and NUMBERLESS name: it cannot change a number of the tiny world.
Imports nothing heavy.
"""

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rcm.cli.parser import STAGES

PACKAGES = ("rcm", "flash_jvp")
SILENT = {  # modules, or MODULE:FUNCTION
    *("rcm", "rcm.__main__", "rcm.artefact", "rcm.usage"),
    *("rcm.cli", "rcm.cli.config", "rcm.cli.parser", "rcm.cli.progress"),
    *("rcm.cli.train:_previewer", "rcm.training.signals"),  # what is looked at during a training, and when it stops
    *("rcm.checkpoints.download", "rcm.checkpoints.origins", "rcm.checkpoints.transfer"),  # what comes is known by hash
    *("flash_jvp.tuning", "flash_jvp.sweep"),  # which tiles are fastest
    # evaluators of real models, of which nothing is made again for code: the tiny world is scored without them
    *("rcm.cli.measure", "rcm.cli.evaluators", "rcm.evaluation.geneval_scores", "rcm.evaluation.vbench"),
    *("rcm.evaluation.features", "rcm.evaluation.small_text", "rcm.data.text_prompts", "rcm.data.vbench_prompts"),
}


NUMBERLESS = {
    *("wandb", "yaml", "safetensors"),  # curves; the configuration, which is compared itself; tensors, kept as they are
    *("triton", "flash_attn", "transformer_engine"),  # of GPUs, of which no published figure of the tiny world is
    *("transformers", "tokenizers", "ftfy", "imageio_ffmpeg"),  # texts, weights and films of real models
    "ruamel",  # DVC's files
}
DISTRIBUTIONS = {"cv2": ("opencv-python-headless", "opencv-python"), "PIL": ("pillow",)}  # where named otherwise


@cache
def stage_code(stage: str) -> str:
    """What `rcm STAGE` rests on, to be compared: the digest of its code, and the packages that can change its numbers.

    Such as "3f9a0c217be44d05 numpy 2.5.1 torch 2.13.0", without a build's local part (+cpu). Stages of the tiny world
    are made again when it changes: the rules' param `code`, and data/code.json for DVC, hold it.
    """
    packages = sorted(reached(stage)[2] - NUMBERLESS, key=str.lower)
    return " ".join([code_digest(stage)[:16], *(f"{name} {found}" for name in packages if (found := _version(name)))])


@cache
def code_digest(stage: str) -> str:
    """SHA-256 over the code that `rcm STAGE` can reach."""
    parts, modules, _ = reached(stage)
    parts += [f"{name}\n{_text(_tree(name))}" for name in modules]
    parts += [path.read_text(encoding="utf-8") for path in sorted(set().union(*map(_data, modules)))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def reached(stage: str) -> tuple[list[str], list[str], set[str]]:
    """Of a stage, the code beside its function, the modules that all of it needs, and the packages that these need."""
    module, function = STAGES[stage].where.split(":")
    parts, imports = _reached(module, function)
    modules: set[str] = set()
    packages: set[str] = set()
    queue = sorted(imports)
    while queue:
        name = queue.pop()
        if name.split(".")[0] not in PACKAGES:
            packages.add(name)
        elif name not in modules | SILENT:
            modules.add(name)
            queue += _imports(_tree(name), name)
    return parts, sorted(modules), packages


def _version(package: str) -> str | None:
    """The public part of the installed version of what `import package` finds; None where that is not installed."""
    for name in DISTRIBUTIONS.get(package, (package,)):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            pass
    return None


def _reached(module: str, function: str) -> tuple[list[str], set[str]]:
    """Of a module, the definitions that a function needs, as text, and the modules that these import."""
    tree = _tree(module)
    bound: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for name in _names_bound(statement):
            bound.setdefault(name, []).append(statement)
    if function not in bound:
        raise ValueError(f"{module} does not define {function}")
    seen: set[str] = set()
    queue, parts, imports = [function], [], set()
    while queue:
        name = queue.pop()
        if name in seen or f"{module}:{name}" in SILENT:
            continue
        seen.add(name)
        for statement in bound.get(name, []):
            imports |= set(_imports(statement, module, name))
            if not isinstance(statement, ast.Import | ast.ImportFrom | ast.If):
                parts.append(_text(statement))
                queue += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return sorted(parts), imports


def _names_bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement of a module defines."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            for alias in names:
                yield alias.asname or alias.name.split(".")[0]
        case _:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id


@cache
def _imports(tree: ast.AST, module: str, only: str | None = None) -> list[str]:
    """What code imports, at any depth: modules of this project, other packages; of an import statement only what binds
    a name."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [a.name for a in node.names if node is not tree or only in (None, a.asname or a.name.split(".")[0])]
        if isinstance(node, ast.Import):
            found |= {*names}
        else:
            found |= {provider for name in names for provider in _providers(_absolute(node, module), name)}
    own = {name for name in found if name.split(".")[0] in PACKAGES}
    others = {name.split(".")[0] for name in found - own} - sys.stdlib_module_names
    return sorted(others.union(name for name in own if _path(name) is not None))


def _providers(source: str, name: str) -> list[str]:
    """Modules behind `from source import name`: of a package, the one that it has the name from."""
    if source.split(".")[0] not in PACKAGES:
        return [source]
    path = _path(source)
    if _path(f"{source}.{name}") is not None:
        return [f"{source}.{name}"]
    if path is not None and path.name == "__init__.py":
        for statement in _tree(source).body:
            if isinstance(statement, ast.ImportFrom) and name in _names_bound(statement):
                return _imports(statement, source, name)
    return [source]


def _absolute(node: ast.ImportFrom, module: str) -> str:
    """The module that `from ... import` names, also where it is relative."""
    if not node.level:
        return node.module or ""
    path = _path(module)
    parents = module.split(".")
    keep = len(parents) - node.level + (path is not None and path.name == "__init__.py")
    return ".".join([*parents[:keep], *([node.module] if node.module else [])])


@cache
def _path(module: str) -> Path | None:
    """The file of a module of this project, found without importing it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in (Path(root, *rest, "__init__.py"), Path(root, *rest).with_suffix(".py")):
            if path.is_file() and (rest or path.name == "__init__.py"):
                return path
    return None


def _data(module: str) -> set[Path]:
    """Files beside a module that it names and that are no code, such as templates."""
    path, text = _path(module), _text(_tree(module))
    beside = path.parent.iterdir() if path else ()
    return {file for file in beside if file.suffix != ".py" and file.is_file() and repr(file.name) in text}


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def _tree(module: str) -> ast.Module:
    """The syntax tree of a module, without docstrings."""
    path = _path(module)
    if path is None:
        raise ValueError(f"there is no module {module}")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@cache
def _text(tree: ast.AST) -> str:
    """Code without comments and layout: its syntax tree, alike in all versions of Python."""
    return _shown(tree)


def _shown(value: object) -> str:
    if isinstance(value, ast.AST):
        # newer versions have further fields, which are empty where they are not used
        fields = ((name, getattr(value, name)) for name in value._fields if name not in ("kind", "ctx"))
        shown = [f"{name}={_shown(field)}" for name, field in fields if field is not None and field != []]
        return f"{type(value).__name__}({', '.join(shown)})"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list) else ascii(value)
