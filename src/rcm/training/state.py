"""The state of an unfinished run: the last states in a folder, each whole or absent, written while training goes on.

A state is a folder `STEP/` of tensors in DCP's format (`rcm.checkpoints.dcp`), so that any number of ranks continues
what any other number began, and a manifest: step, configuration, numbers, and the SHA-256 of every file. It is written
under a hidden name and renamed by rank 0 when the files of all ranks are on the disk.
"""

import datetime
import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Optimizer

from rcm.artefact import MANIFEST, UserError, read_json, reason, sha256_json, sync, write_json
from rcm.checkpoints.dcp import damage, described, read_parts, write_parts
from rcm.checkpoints.flat import misfits, some
from rcm.collective import everywhere
from rcm.parallel.mesh import Mesh

KEPT = 2  # complete states in the folder: the second is for the day on which the first is damaged
_LOCK = ".lock"  # file in the folder, locked by the process that works there; the kernel unlocks when that dies
_PARTIAL = ".partial"  # ending of the hidden folders, in which nothing is whole


class States:
    """The states of one run in `folder`; all methods are collective over the ranks of `mesh`.

    A state is a tree of dicts whose leaves are tensors, DTensors, and what JSON holds (numbers, strings, None, lists);
    plain tensors and JSON values are equal on all ranks. `identity` is the configuration of the run, a tree that JSON
    can hold; the number of ranks is not part of it. `timeout` is in seconds, for the ranks that wait for one another
    in the background. Use it as a context: leaving it waits for the state that is being written. Raises UserError
    where another process works in `folder`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], mesh: Mesh, timeout: float = 600):
        self.folder, self.mesh = folder, mesh
        self.identity = json.loads(json.dumps(identity, allow_nan=False))
        self._lock: IO[str] | None = None
        everywhere(self._begin, mesh.group)
        limit = datetime.timedelta(seconds=timeout)
        # the writing thread needs a group of its own: the calls of two threads would meet in one group in any order
        self.group = None if mesh.group is None else dist.new_group(backend="gloo", timeout=limit)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        self._pending: tuple[int, Future[None]] | None = None

    def __enter__(self) -> "States":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._lock is not None:
                self._lock.close()
            if self.group is not None:
                dist.destroy_process_group(self.group)

    def save(self, step: int, tree: Mapping[str, Any], *, wait: bool = False) -> None:
        """Take a copy of the state after `step` into host memory and have it written, by the end of the call if `wait`.

        What becomes of the tensors afterwards does not matter. Waits for the state before, and raises if that failed.
        """
        self.wait()
        leaves = {name: holder[key] for name, (holder, key) in _leaves(tree).items()}
        tensors = {name: _copied(leaf) for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        values = {name: leaf for name, leaf in leaves.items() if name not in tensors}
        body = {"step": step, "config": self.identity, "values": json.loads(json.dumps(values, allow_nan=False))}
        self._pending = step, self._thread.submit(self._write, body, tensors)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the last state is on the disk, with older ones removed; raises what went wrong with it."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except OSError as error:
            raise UserError(
                f"the state after step {step} could not be written to {self.folder} ({reason(error)}): make room or "
                "mend it, and run again from the state before"
            ) from error

    def load(self, tree: Mapping[str, Any]) -> int | None:
        """Fill `tree` with the newest whole state and return its step; None, and nothing done, where there is no state.

        Tensors are filled in place, each rank reading its own chunks; JSON values are replaced in the dicts that hold
        them. Every rank verifies its share of the files. A damaged state is left out with a line on stderr. Raises
        UserError where all are damaged, or where the state belongs to another configuration, or to other networks than
        those of `tree`.
        """
        told: list[str] = []
        for path, manifest in everywhere(self._found, self.mesh.group)[0]:
            faults = [f"{path / MANIFEST} is damaged or missing"]
            if manifest is not None:
                self._check_identity(manifest["config"])
                shares = everywhere(partial(damage, path, manifest["files"], self.mesh), self.mesh.group)
                faults = [fault for share in shares for fault in share]
                if not faults:
                    everywhere(partial(_read, path, manifest, tree), self.mesh.group)
                    return manifest["step"]
            told.append(faults[0])
            if self.mesh.is_main:
                print(f"warning: {path} is damaged, looking for a state before it ({faults[0]})", file=sys.stderr)
        if told:
            raise UserError(
                f"all states in {self.folder} are damaged ({told[0]}): mend or restore them, or delete the folder to "
                "start anew"
            )
        return None

    def _begin(self) -> None:
        """On rank 0: have the folder alone, without what a run that was killed did not complete."""
        if not self.mesh.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / _LOCK).open("a")  # for writing, which NFS asks for
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process works in {self.folder}: wait for its end, or give this run a folder of its own"
            ) from None
        except OSError:  # a file system without locks
            pass
        self._remove_hidden()

    def _found(self) -> list[tuple[Path, dict[str, Any] | None]]:
        """The states, newest first, with their manifests, of which a damaged one is None; rank 0 looks for all."""
        return [(path, _manifest(path)) for path in _states(self.folder)] if self.mesh.is_main else []

    def _check_identity(self, config: Mapping[str, Any]) -> None:
        if changed := differences(config, self.identity):
            raise UserError(
                f"{self.folder} holds an unfinished run of another configuration ({'; '.join(changed)}): "
                "set these values again to continue it, or delete the folder to start anew"
            )

    # --- in the background

    def _write(self, body: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        hidden = self.folder / f".{body['step']:09d}{_PARTIAL}"
        try:
            write_parts(hidden, tensors, self.group, lambda files: self._complete(hidden, body | {"files": files}))
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise

    def _complete(self, hidden: Path, body: dict[str, Any]) -> None:
        """On rank 0: a state appears under its name, whole; those that it makes superfluous go."""
        write_json(hidden / MANIFEST, {"sha256": sha256_json(body), **body})
        path = self.folder / f"{body['step']:09d}"
        if path.exists():
            _hide(path)
        hidden.rename(path)
        sync(self.folder)
        valid = [state for state in _states(self.folder) if state.name <= path.name]  # a newer one was found damaged
        for state in _states(self.folder):
            if state not in valid[:KEPT]:
                _hide(state)
        self._remove_hidden()

    def _remove_hidden(self) -> None:
        """What was not completed, of a run that was killed, or is not needed any more."""
        for path in self.folder.glob(f".[0-9]*{_PARTIAL}"):
            shutil.rmtree(path)


def remove_states(folder: Path) -> None:
    """Remove the state of a run that is finished and whose results are safe."""
    for state in reversed(_states(folder)):  # half of the newest would look like a damaged one
        _hide(state)
    shutil.rmtree(folder, ignore_errors=True)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, as `key was A, is B`."""
    a, b = _flat(before), _flat(now)
    absent = "absent"
    return [
        f"{key} was {a.get(key, absent)}, is {b.get(key, absent)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, absent) != b.get(key, absent)
    ]


def optimizer_state(network: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimiser's own tensors, by parameter name and then by their name, such as `exp_avg` and `step`.

    A parameter without state, for it has not been updated yet, is given the state that its first update would begin
    with. Settings of the parameter groups are not part of it.
    """
    _begin(optimizer)
    return get_optimizer_state_dict(network, optimizer)["state"]  # type: ignore[return-value]


def _begin(optimizer: Optimizer) -> None:
    """Have the optimiser make the state that is missing, by a step of rate zero along no gradient, not counted."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for p in parameters if p.requires_grad and not optimizer.state.get(p)]
    if not new:
        return
    gradients = [p.grad for p in parameters]
    settings = [dict(group) for group in optimizer.param_groups]
    for p in parameters:
        p.grad = None
    for p in new:
        p.grad = p.detach().clone().zero_()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for p in new:
        if "step" in optimizer.state[p]:
            optimizer.state[p]["step"].zero_()
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.clear()
        group.update(setting)


def _copied(tensor: Tensor) -> Tensor:
    """The tensor, or the part of this rank, in host memory of its own."""
    return tensor.detach().to("cpu", copy=True)


def _read(path: Path, manifest: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    """Fill the tree with a verified state; a UserError where it does not fit, before anything is changed."""
    places = _leaves(tree)
    own = {name: holder[key].detach() for name, (holder, key) in places.items() if isinstance(holder[key], Tensor)}
    with _readable(path):
        saved, values = described(path, manifest["files"]), manifest["values"]
    faults = misfits(own, saved)
    if types := [
        f"{name} is {saved[name].dtype}, needs {own[name].dtype}"
        for name in sorted(own.keys() & saved.keys())
        if own[name].dtype != saved[name].dtype
    ]:
        faults.append(f"types differ: {some(types)}")
    if others := sorted(values.keys() ^ (places.keys() - own.keys())):
        faults.append(f"missing or unexpected {some(others)}")
    if faults:
        raise UserError(
            f"{path} is the state of other networks ({'; '.join(faults)}): "
            "go back to those to continue it, or delete the folder to start anew"
        )
    with _readable(path):
        read_parts(path, own)
    for name, value in values.items():
        holder, key = places[name]
        holder[key] = value


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what a state raises whose files are as its manifest says, and yet no state, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # odd bytes fail in many ways
        raise UserError(
            f"{path} cannot be read ({reason(error)}): restore it, or delete the folder to start anew"
        ) from error


def _leaves(tree: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """(dict that holds it, key) of every leaf, by the keys on the way to it, joined by dots."""
    leaves: dict[str, tuple[Any, Any]] = {}
    for key, value in tree.items():
        found = _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": (tree, key)}
        if twice := leaves.keys() & found.keys():
            raise ValueError(f"two leaves of the state have the name {min(twice)}")
        leaves |= found
    return leaves


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: holder[key] for name, (holder, key) in _leaves(tree).items()}


def _manifest(path: Path) -> dict[str, Any] | None:
    """What the manifest of a state says; None where it is missing or damaged."""
    try:
        content = read_json(path / MANIFEST)
        sha256 = content.pop("sha256")
    except (UserError, AttributeError, KeyError, TypeError):
        return None
    return content if sha256 == sha256_json(content) and content["step"] == int(path.name) else None


def _hide(path: Path) -> None:
    """Rename, so that the folder is never seen half removed."""
    path.rename(path.with_name(f".{path.name}.old{_PARTIAL}"))


def _states(folder: Path) -> list[Path]:
    """The folders of states, newest first."""
    return sorted((p for p in folder.glob("*") if p.is_dir() and p.name.isdecimal()), reverse=True)
